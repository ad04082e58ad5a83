//! What a checker of an image found: every breach of the format's rules, each with its place in the file.
//!
//! Opening an image stops at the first fault, because what follows from it cannot be trusted. A checker goes on as far as
//! the bytes allow, for a person who has to decide what can be saved. It never changes the file.

use std::fmt;

use serde::Serialize;

/// Most findings that a [`Report`] keeps, so that a hostile table of 2^26 entries cannot fill the memory; the rest is
/// counted. A person reads far fewer.
pub const FINDINGS_MAX: usize = 10_000;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The image breaks a rule of its format: it does not open, or what it holds cannot be trusted.
    Error,
    /// The image opens and reads right, and something is not as it should be: a torn copy, space that nothing uses.
    Warning,
}

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The structure concerned, as errors name it: `header`, `BAT`, `log`.
    pub part: &'static str,
    /// Where in the file, in bytes, if it has one place.
    pub offset: Option<u64>,
    /// Which rule, in lower case, without the place.
    pub message: String,
}

/// All findings of one check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// In the order of the check, at most [`FINDINGS_MAX`].
    pub findings: Vec<Finding>,
    /// Errors found, those beyond the limit too.
    pub errors: u64,
    /// Warnings found, those beyond the limit too.
    pub warnings: u64,
}

impl Report {
    /// The one finding that an open stops at, if it fails.
    pub fn of_opening<T, E: std::error::Error>(opened: Result<T, E>) -> Self {
        let mut report = Self::default();
        if let Err(error) = opened {
            let source = error.source().map(|source| format!(": {source}"));
            report.error(
                "file",
                None,
                format!("{error}{}", source.unwrap_or_default()),
            );
        }
        report
    }

    /// Notes a breach of a rule.
    pub fn error(
        &mut self,
        part: &'static str,
        offset: impl Into<Option<u64>>,
        message: impl Into<String>,
    ) {
        self.errors += 1;
        self.note(Severity::Error, part, offset.into(), message.into());
    }

    /// Notes what does no harm yet.
    pub fn warning(
        &mut self,
        part: &'static str,
        offset: impl Into<Option<u64>>,
        message: impl Into<String>,
    ) {
        self.warnings += 1;
        self.note(Severity::Warning, part, offset.into(), message.into());
    }

    /// Whether the image keeps all rules of its format; warnings are allowed.
    pub fn is_sound(&self) -> bool {
        self.errors == 0
    }

    /// Findings that were counted and not kept.
    pub fn omitted(&self) -> u64 {
        self.errors + self.warnings - crate::base::units::to_u64(self.findings.len())
    }

    fn note(
        &mut self,
        severity: Severity,
        part: &'static str,
        offset: Option<u64>,
        message: String,
    ) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(Finding {
                severity,
                part,
                offset,
                message,
            });
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Error => "error",
            Self::Warning => "warning",
        })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.severity, self.part)?;
        if let Some(offset) = self.offset {
            write!(f, " at file offset {offset:#x}")?;
        }
        write!(f, ": {}", self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_beyond_the_limit_are_counted() {
        let mut report = Report::default();
        report.warning("file", None, "unused space");
        for number in 0..20_000u64 {
            report.error("BAT", number, "reserved bits");
        }
        assert_eq!(report.findings.len(), FINDINGS_MAX);
        assert_eq!((report.errors, report.warnings), (20_000, 1));
        assert_eq!(report.omitted(), 10_001);
        assert!(!report.is_sound());
        assert_eq!(
            report.findings[1].to_string(),
            "error: BAT at file offset 0x0: reserved bits"
        );
        assert_eq!(
            report.findings[0].to_string(),
            "warning: file: unused space"
        );
    }
}
