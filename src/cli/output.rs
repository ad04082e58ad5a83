//! What a person reads: steps, lines and tables on standard output, problems on standard error. The only file that
//! prints.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "this is the program's voice"
)]

use std::{fmt::Write as _, io::IsTerminal as _};

use indicatif::{ProgressBar, ProgressStyle};

/// Standard output and standard error.
#[derive(Debug)]
pub struct Output {
    terminal: bool,
}

impl Default for Output {
    fn default() -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
        }
    }
}

impl Output {
    /// One line of result.
    pub fn line(&self, text: &str) {
        println!("{text}");
    }

    /// The beginning of a step that takes a while.
    pub fn step(&self, text: &str) {
        println!("==> {text}");
    }

    /// JSON, by itself.
    pub fn json(&self, value: &impl serde::Serialize) -> anyhow::Result<()> {
        println!("{}", serde_json::to_string_pretty(value)?);
        Ok(())
    }

    /// Something to know that is not a result.
    pub fn note(&self, text: &str) {
        eprintln!("{text}");
    }

    /// A failure with its causes, outermost first, each said once.
    pub fn failure(&self, error: &anyhow::Error) {
        eprintln!("understudy: {}", chain(error.as_ref()));
    }

    /// What is being done now: on a terminal one line that the next one overwrites, elsewhere nothing.
    pub fn progress_line(&self, text: &str) {
        if self.terminal {
            eprint!("\r\x1b[K{text}\r");
        }
    }

    /// Clears the terminal for a fresh picture; elsewhere a blank line.
    pub fn fresh(&self) {
        if std::io::stdout().is_terminal() {
            print!("\x1b[2J\x1b[H");
        } else {
            println!();
        }
    }

    /// A progress display of bytes: a bar on a terminal, plain lines elsewhere.
    pub fn progress(&self, what: &str) -> Progress {
        let bar = self.terminal.then(|| {
            let template = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} ETA {eta}";
            let style = ProgressStyle::with_template(template)
                .expect("the template is right")
                .progress_chars("=> ");
            ProgressBar::new(0)
                .with_style(style)
                .with_message(what.to_owned())
        });
        Progress {
            what: what.to_owned(),
            bar,
            tenths: None,
        }
    }
}

/// An error with its causes, outermost first, each said once.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = String::new();
    for cause in anyhow::Chain::new(error) {
        let cause = cause.to_string();
        if text.contains(&cause) {
            continue;
        }
        let separator = if text.is_empty() { "" } else { ": " };
        let _ = write!(text, "{separator}{cause}");
    }
    text
}

/// A running progress display.
#[derive(Debug)]
pub struct Progress {
    what: String,
    bar: Option<ProgressBar>,
    tenths: Option<u64>,
}

impl Progress {
    /// `done` of `total` bytes are done.
    pub fn set(&mut self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            return;
        }
        // Without a terminal a line for every tenth: enough to see it move, not enough to fill a journal.
        let tenths = done.saturating_mul(10).checked_div(total).unwrap_or(10);
        if self.tenths.is_none_or(|before| tenths > before) {
            self.tenths = Some(tenths);
            let (done, total) = (
                crate::base::units::Bytes(done),
                crate::base::units::Bytes(total),
            );
            eprintln!("{}: {}0 %, {done} of {total}", self.what, tenths.min(10));
        }
    }

    /// It is complete, or it failed and the failure is told elsewhere.
    pub fn finish_if(self, complete: bool) {
        match (complete, &self.bar) {
            (true, _) => self.finish(),
            (false, Some(bar)) => bar.finish_and_clear(),
            (false, None) => {}
        }
    }

    /// It is complete.
    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
        eprintln!("{}: complete", self.what);
    }
}
