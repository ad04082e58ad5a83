//! Running a script of a plan: its own process group, a cleared environment, a time limit, the end of what it prints.

use std::{
    collections::VecDeque,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::{Pid, getpgid},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::Command,
    sync::mpsc,
};

use crate::coord::job::{Failure, OUTPUT_BYTES_MAX, Report, Script};

/// Where a script finds programs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long the output of a script that has ended is waited for: what it left running may hold the other end for ever.
const OUTPUT_WITHIN: Duration = Duration::from_millis(500);
/// How long a script that was left may take to die.
const KILLED_WITHIN: Duration = Duration::from_secs(10);
/// Pause before it is looked whether it has.
const KILL_AGAIN: Duration = Duration::from_millis(20);
/// Bytes that are read at once.
const CHUNK_BYTES: usize = 4096;

/// Why a program cannot be run, if that is known beforehand.
pub(super) fn complaint(program: &Path) -> Option<String> {
    let shown = program.display();
    match fs::metadata(program) {
        Err(error) => Some(format!("script {shown}: {error}")),
        Ok(meta) if !meta.is_file() => Some(format!("script {shown} is not a file")),
        Ok(meta) if meta.permissions().mode() & 0o111 == 0 => {
            Some(format!("script {shown} may not be executed: chmod it"))
        }
        Ok(_) => None,
    }
}

/// The variable by which a script that a dead coordinator left is known.
pub(super) const STEP: &str = "UNDERSTUDY_STEP";

/// Kills the process group of a script that a coordinator began and did not live to see the end of: two of them beside each
/// other would be worse than one that is begun again. What such a script has put into a group of its own lives on.
pub(super) async fn kill_left(step: &str) -> Result<(), Failure> {
    let began = Instant::now();
    while let Some(process) = left(step) {
        tracing::warn!(%process, "kills a script that was under way when the coordinator died");
        // An error says that it is gone.
        let _ = killpg(process, Signal::SIGKILL);
        if began.elapsed() >= KILLED_WITHIN {
            let why = format!("process {process} of the last attempt cannot be killed");
            return Err(Failure::of(why));
        }
        tokio::time::sleep(KILL_AGAIN).await;
    }
    Ok(())
}

/// The leader of a process group that was told to be this step. One that is dead says nothing any more.
fn left(step: &str) -> Option<Pid> {
    let ours = format!("{STEP}={step}");
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.map(Pid::from_raw).find(|&process| {
        let told = fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
        let mut told = told.split(|byte| *byte == 0);
        told.any(|variable| variable == ours.as_bytes()) && getpgid(Some(process)) == Ok(process)
    })
}

/// Runs `script` to its end, its time limit, or until the future is dropped: then nothing of its process group is left.
pub(super) async fn run(
    script: &Script,
    environment: &[(&str, String)],
) -> Result<Report, Failure> {
    let shown = script.run.join(" ");
    let (program, arguments) = script.run.split_first().expect("a plan names a program");
    let spawned = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn();
    let mut child =
        spawned.map_err(|error| Failure::of(format!("{shown} cannot be run: {error}")))?;
    let mut group = Group(child.id());
    let mut output = Output::of(
        child.stdout.take().expect("it is piped"),
        child.stderr.take().expect("it is piped"),
    );
    let ended = tokio::select! {
        ended = child.wait() => Some(ended),
        () = tokio::time::sleep(script.within) => None,
        () = output.read() => unreachable!("reading goes on for ever"),
    };
    let failed = |why: String, output: String| Failure {
        output,
        ..Failure::of(why)
    };
    match ended {
        Some(Ok(status)) => {
            // What it started is meant to stay: a guest, say.
            group.leave();
            let output = output.rest().await;
            if status.success() {
                return Ok(Report {
                    output,
                    ..Report::of(format!("{shown}: {status}"))
                });
            }
            Err(failed(format!("{shown}: {status}"), output))
        }
        Some(Err(error)) => Err(failed(format!("{shown}: {error}"), output.rest().await)),
        None => {
            drop(group);
            let why = format!(
                "{shown} was killed: it took longer than {} s",
                script.within.as_secs()
            );
            Err(failed(why, output.rest().await))
        }
    }
}

/// A process group that ends with this.
struct Group(Option<u32>);

impl Group {
    /// It lives on.
    fn leave(&mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(id) = self.0.and_then(|id| i32::try_from(id).ok()) {
            // An error says that there is nobody left.
            let _ = killpg(Pid::from_raw(id), Signal::SIGKILL);
        }
    }
}

/// What a program prints, on both its outputs, as it comes.
struct Output {
    chunks: mpsc::Receiver<Vec<u8>>,
    end: VecDeque<u8>,
    cut: bool,
}

impl Output {
    fn of(
        out: impl AsyncRead + Unpin + Send + 'static,
        err: impl AsyncRead + Unpin + Send + 'static,
    ) -> Self {
        let (sender, chunks) = mpsc::channel(1);
        tokio::spawn(copy(out, sender.clone()));
        tokio::spawn(copy(err, sender));
        Self {
            chunks,
            end: VecDeque::new(),
            cut: false,
        }
    }

    /// Reads as long as this is awaited.
    async fn read(&mut self) {
        loop {
            match self.chunks.recv().await {
                Some(chunk) => self.keep(&chunk),
                None => std::future::pending().await,
            }
        }
    }

    /// All there was.
    async fn rest(mut self) -> String {
        let all = async {
            while let Some(chunk) = self.chunks.recv().await {
                self.keep(&chunk);
            }
        };
        let _ = tokio::time::timeout(OUTPUT_WITHIN, all).await;
        let text = String::from_utf8_lossy(self.end.make_contiguous()).into_owned();
        if self.cut { format!("...{text}") } else { text }
    }

    fn keep(&mut self, chunk: &[u8]) {
        self.end.extend(chunk);
        let over = self.end.len().saturating_sub(OUTPUT_BYTES_MAX);
        self.cut |= over > 0;
        self.end.drain(..over);
    }
}

/// Passes on what `from` says until nobody listens or nobody speaks.
async fn copy(mut from: impl AsyncRead + Unpin, to: mpsc::Sender<Vec<u8>>) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let count = from.read(&mut chunk).await?;
        if count == 0 || to.send(chunk[..count].to_vec()).await.is_err() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process;

    use super::*;
    use crate::coord::job::Phase;

    fn script(text: &str, within: Duration) -> Script {
        Script {
            run: vec!["/bin/sh".into(), "-c".into(), text.into()],
            within,
            group: "g".into(),
            phase: Phase::Pre,
            machines: Vec::new(),
        }
    }

    const LONG: Duration = Duration::from_mins(10);

    #[tokio::test]
    async fn a_script_is_alone_with_what_it_is_told() {
        let text = "env | sort; echo wrong >&2; exit 3";
        let told = [("UNDERSTUDY_KIND", "planned".to_owned())];
        let failure = run(&script(text, LONG), &told).await.unwrap_err();
        assert!(failure.why.ends_with("exit status: 3"), "{}", failure.why);
        assert!(
            failure.output.contains("UNDERSTUDY_KIND=planned"),
            "{}",
            failure.output
        );
        assert!(failure.output.contains("wrong"), "{}", failure.output);
        assert!(!failure.output.contains("CARGO"), "{}", failure.output);
        let ok = run(&script("echo fine", LONG), &[]).await.unwrap();
        assert_eq!(ok.output, "fine\n");
        let missing = Script {
            run: vec!["/no/such/program".into()],
            ..script("", LONG)
        };
        let why = run(&missing, &[]).await.unwrap_err().why;
        assert!(why.contains("/no/such/program cannot be run"), "{why}");
    }

    #[tokio::test]
    async fn only_the_end_of_much_output_is_kept() {
        let much = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; echo last";
        let output = run(&script(much, LONG), &[]).await.unwrap().output;
        assert_eq!(output.len(), OUTPUT_BYTES_MAX + 3);
        assert!(
            output.starts_with("...") && output.ends_with("last\n"),
            "{output}"
        );
    }

    /// Whether a process is there and no zombie.
    fn lives(pid: &str) -> bool {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(')')
            .next()
            .is_some_and(|rest| !rest.trim_start().starts_with('Z') && !rest.is_empty())
    }

    /// Waits until a process is gone.
    fn wait_gone(pid: &str) {
        let began = Instant::now();
        while lives(pid) {
            assert!(began.elapsed() < Duration::from_mins(1), "{pid} lives on");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[tokio::test]
    async fn a_script_that_takes_too_long_is_killed_with_all_it_started() {
        let text = "sleep 1000 & echo $!; echo waiting; wait";
        let failure = run(&script(text, Duration::from_secs(1)), &[])
            .await
            .unwrap_err();
        assert!(
            failure.why.contains("took longer than 1 s"),
            "{}",
            failure.why
        );
        wait_gone(failure.output.lines().next().unwrap());
        assert!(failure.output.ends_with("waiting\n"), "{}", failure.output);
    }

    #[tokio::test]
    async fn what_a_script_leaves_running_lives_on_and_is_not_waited_for() {
        let report = run(&script("sleep 1000 & echo $!", LONG), &[])
            .await
            .unwrap();
        let pid = report.output.trim().to_owned();
        assert!(lives(&pid));
        let id = Pid::from_raw(pid.parse().unwrap());
        assert_ne!(id.as_raw().cast_unsigned(), process::id());
        nix::sys::signal::kill(id, Signal::SIGKILL).unwrap();
    }

    #[tokio::test]
    async fn a_script_that_is_given_up_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let text = format!(
            "echo $$ > {0}.new; mv {0}.new {0}; sleep 1000",
            file.display()
        );
        let job = tokio::spawn(async move { run(&script(&text, LONG), &[]).await });
        while !file.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        job.abort();
        assert!(job.await.unwrap_err().is_cancelled());
        wait_gone(fs::read_to_string(&file).unwrap().trim());
    }

    #[tokio::test]
    async fn a_script_that_was_left_is_killed_and_no_other() {
        let step = |number: u32| format!("{}:{number}", process::id());
        let begin = |number: u32| {
            let mut left = process::Command::new("/bin/sleep");
            left.arg("1000").env(STEP, step(number));
            std::os::unix::process::CommandExt::process_group(&mut left, 0);
            left.spawn().unwrap()
        };
        let (mut left, mut other) = (begin(1), begin(11));
        kill_left(&step(1)).await.unwrap();
        assert!(!lives(&left.id().to_string()));
        left.wait().unwrap();
        assert!(lives(&other.id().to_string()));
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn a_program_that_cannot_be_run_is_told_beforehand() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("script");
        assert!(complaint(&file).unwrap().contains("No such file"));
        fs::write(&file, "#!/bin/sh\n").unwrap();
        assert!(complaint(&file).unwrap().contains("may not be executed"));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(complaint(&file), None);
        assert!(complaint(dir.path()).unwrap().contains("is not a file"));
    }
}
