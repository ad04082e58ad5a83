//! The audit log: who asked this host for what, who was refused, and what became of its machines' roles.
//!
//! `audit.log` in the host's store holds a line of JSON for each event. A line carries the SHA-256 of the line before it
//! (`prev`), as bytes without the newline, and a number; so a line that was changed, removed or put in between is found by
//! [`verify`], and so is everything before it that does not belong together. What is cut off at the end is found by whoever
//! kept the last line: the same lines go to the program's log.
//!
//! ```text
//!   {"seq":7,"at":1795000000000000,"event":"asked","who":"coord","what":"POST /v1/machines/web/commit",..,"prev":"9f86.."}
//! ```
//! A file that is full is renamed to `audit.log.1`, that one to `audit.log.2` and so on; the next file's first line carries
//! the digest of the full one's last. The oldest of [`FILES_MAX`] is dropped.
//!
//! # Crash contract
//! A line is appended in one write and synced before [`Audit::record`] returns, and so before what it tells of is begun. A
//! line that a power cut tore is cut off at the next start, which the line after it says. A host that cannot write its
//! audit log says so in the program's log and goes on: a full disk must not keep a machine from being failed over.
//! Guest writes know nothing of it.
//!
//! # Strangers
//! To be refused costs nothing, and hosts that are refused try again. So [`Audit::refused`] writes the same once an hour,
//! [`REFUSALS_PER_MINUTE`] of these lines at most, counts the rest, and syncs none of them.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::base::{
    checksum::{Digest, Sha256},
    clock::{Clock, Timestamp},
    ids::{Generation, Name},
};

/// Name of the file in the store.
pub const AUDIT_FILE: &str = "audit.log";
/// Size at which a file is full, in bytes.
pub const FILE_BYTES_MAX: u64 = 8 << 20;
/// Files that are kept, with the one that is written.
pub const FILES_MAX: u32 = 8;
/// Refused strangers that are written down in a minute.
pub const REFUSALS_PER_MINUTE: usize = 30;
const REFUSALS_WITHIN: Duration = Duration::from_mins(1);
/// The same is not written down again for so long.
const SAME_WITHIN: Duration = Duration::from_hours(1);
/// Refusals that are remembered, at most.
const REMEMBERED_MAX: usize = 256;
/// Longest text of one field, in bytes.
const TEXT_BYTES_MAX: usize = 2048;
/// Longest line that is read, in bytes: three fields in which every byte is escaped, and the rest.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The host was started.
    Started {
        /// Of the program.
        version: String,
        /// Bytes of a torn line that were cut off.
        cut: u64,
    },
    /// Somebody is about to be given what he asked for, or is about to be told that he is not.
    Asked {
        /// An operator's name; `socket` for this host's own users, `coordinator` for its jobs.
        who: String,
        /// Method and path of the request.
        what: String,
        /// Its body.
        with: String,
    },
    /// What became of that.
    Answered {
        /// Who asked.
        who: String,
        /// What for.
        what: String,
        /// Status of the answer: 200 is a success.
        status: u16,
        /// Why not.
        error: String,
    },
    /// Somebody was not let in, or may not have what he wants.
    Refused {
        /// Who, and where: as far as it is known.
        who: String,
        /// Why.
        why: String,
        /// How many were refused before that are not written down.
        before: u64,
    },
    /// A machine's role has changed.
    Role {
        /// The machine.
        machine: Name,
        /// The generation it is in.
        generation: Generation,
        /// What this host was for it.
        was: String,
        /// What it is.
        is: String,
    },
    /// Identities and revoked certificates were read again.
    Reloaded {
        /// What was found and done, or why nothing was.
        what: String,
    },
}

/// A line, as it is written.
#[derive(Debug, Serialize)]
struct Line<'e> {
    seq: u64,
    at: Timestamp,
    #[serde(flatten)]
    event: &'e Event,
    prev: String,
}

/// What a line must hold to be one of a chain.
#[derive(Debug, Deserialize)]
struct Link {
    seq: u64,
    prev: String,
}

/// The log of one host.
#[derive(Debug)]
pub struct Audit {
    path: PathBuf,
    clock: Arc<dyn Clock>,
    end: Mutex<End>,
    refusals: Mutex<Refusals>,
}

#[derive(Debug)]
struct End {
    file: File,
    bytes: u64,
    seq: u64,
    prev: Digest,
}

#[derive(Debug, Default)]
struct Refusals {
    /// When the latest were written, and what they said.
    written: VecDeque<(Duration, String)>,
    left_out: u64,
}

impl Audit {
    /// Opens the log in the folder `store`, begun if there is none, and notes that the host was started.
    pub fn open(store: &Path, clock: Arc<dyn Clock>) -> io::Result<Self> {
        let path = store.join(AUDIT_FILE);
        let mut file = append_to(&path)?;
        let (last, whole, bytes) = last_line(&mut file)?;
        if whole < bytes {
            file.set_len(whole)?;
        }
        // A file that was begun and has no line yet goes on from the one before.
        let last = match last {
            None if numbered(&path, 1).exists() => {
                last_line(&mut File::open(numbered(&path, 1))?)?.0
            }
            last => last,
        };
        let (seq, prev) = match last {
            None => (0, Digest::default()),
            Some(line) => {
                let seq = match serde_json::from_slice::<Link>(&line) {
                    Ok(link) => link.seq.saturating_add(1),
                    // The evidence stays: the numbers tell that the chain broke here.
                    Err(error) => {
                        tracing::error!(path = %path.display(), %error, "the audit log was tampered with or damaged");
                        0
                    }
                };
                (seq, digest(&line))
            }
        };
        let audit = Self {
            path,
            clock,
            end: Mutex::new(End {
                file,
                bytes: whole,
                seq,
                prev,
            }),
            refusals: Mutex::default(),
        };
        audit.record(&Event::Started {
            version: env!("CARGO_PKG_VERSION").into(),
            cut: bytes - whole,
        });
        Ok(audit)
    }

    /// Writes an event down, durably.
    pub fn record(&self, event: &Event) {
        self.write(event, true);
    }

    /// Writes down that somebody was refused, unless that happens all the time; whether it did.
    pub fn refused(&self, who: String, why: String) -> bool {
        let now = self.clock.monotonic();
        let said = format!("{who}: {why}");
        let within = |at: &Duration, span| now.saturating_sub(*at) < span;
        let mut refusals = self.refusals.lock();
        refusals.written.retain(|(at, _)| within(at, SAME_WITHIN));
        let written = || refusals.written.iter();
        let often = written()
            .filter(|(at, _)| within(at, REFUSALS_WITHIN))
            .count();
        if often >= REFUSALS_PER_MINUTE || written().any(|(_, known)| *known == said) {
            refusals.left_out += 1;
            return false;
        }
        if refusals.written.len() >= REMEMBERED_MAX {
            refusals.written.pop_front();
        }
        refusals.written.push_back((now, said));
        let before = std::mem::take(&mut refusals.left_out);
        self.write(&Event::Refused { who, why, before }, false);
        true
    }

    fn write(&self, event: &Event, durable: bool) {
        let mut end = self.end.lock();
        let line = Line {
            seq: end.seq,
            at: self.clock.wall(),
            event,
            prev: end.prev.to_string(),
        };
        let line = serde_json::to_string(&line).expect("an event is text and numbers");
        tracing::info!(target: "audit", "{line}");
        if let Err(error) = self.append(&mut end, &line, durable) {
            tracing::error!(path = %self.path.display(), %error, "the audit log cannot be written: the host goes on without");
        }
    }

    fn append(&self, end: &mut End, line: &str, durable: bool) -> io::Result<()> {
        let bytes = u64::try_from(line.len()).unwrap_or(u64::MAX) + 1;
        if end.bytes > 0 && end.bytes + bytes > FILE_BYTES_MAX {
            self.rotate(end)?;
        }
        if let Err(error) = end.file.write_all(format!("{line}\n").as_bytes()) {
            // Half a line would break the chain for every line after it.
            end.file.set_len(end.bytes)?;
            return Err(error);
        }
        end.bytes += bytes;
        end.seq += 1;
        end.prev = digest(line.as_bytes());
        if durable {
            end.file.sync_data()?;
        }
        Ok(())
    }

    fn rotate(&self, end: &mut End) -> io::Result<()> {
        end.file.sync_data()?;
        for number in (1..FILES_MAX).rev() {
            let from = match number {
                1 => self.path.clone(),
                number => numbered(&self.path, number - 1),
            };
            match fs::rename(from, numbered(&self.path, number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        end.file = append_to(&self.path)?;
        end.bytes = 0;
        File::open(self.path.parent().unwrap_or_else(|| Path::new(".")))?.sync_all()
    }
}

/// At most so much of a text that others wrote.
pub(super) fn excerpt(text: &str) -> String {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

fn digest(line: &[u8]) -> Digest {
    let mut digest = Sha256::default();
    digest.update(line);
    digest.finish()
}

/// The last whole line, the bytes of all whole lines, and all bytes.
fn last_line(file: &mut File) -> io::Result<(Option<Vec<u8>>, u64, u64)> {
    let bytes = file.seek(SeekFrom::End(0))?;
    let from = bytes.saturating_sub(2 * LINE_BYTES_MAX);
    file.seek(SeekFrom::Start(from))?;
    let mut tail = Vec::new();
    file.take(2 * LINE_BYTES_MAX).read_to_end(&mut tail)?;
    let Some(end) = tail.iter().rposition(|&byte| byte == b'\n') else {
        return Ok((None, from, bytes));
    };
    let before = tail[..end].iter().rposition(|&byte| byte == b'\n');
    let begin = before.map_or(0, |before| before + 1);
    let whole = from + u64::try_from(end).unwrap_or(0) + 1;
    Ok((Some(tail[begin..end].to_vec()), whole, bytes))
}

/// A chain of lines that holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Lines.
    pub lines: u64,
    /// Number of the first line; what was before it was dropped, or is in files that were not named.
    pub first: u64,
    /// Number of the last line.
    pub last: u64,
    /// Digest of the last line: compare it with one that was kept elsewhere.
    pub head: Digest,
}

/// Why a log is not what was written.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The first line that does not belong where it is.
    #[error("{}: line {line}: {why}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: u64,
        /// What is wrong with it.
        why: String,
    },
    /// There is not one line.
    #[error("there is nothing in the audit log")]
    Empty,
}

/// Checks that every line of these files, oldest first, follows from the one before.
pub fn verify(paths: &[PathBuf]) -> Result<Verified, AuditError> {
    let mut found: Option<Verified> = None;
    for path in paths {
        let failed = |source| AuditError::Read {
            path: path.clone(),
            source,
        };
        let mut file = BufReader::new(File::open(path).map_err(failed)?);
        for number in 1.. {
            let mut line = Vec::new();
            let mut limited = (&mut file).take(LINE_BYTES_MAX);
            if limited.read_until(b'\n', &mut line).map_err(failed)? == 0 {
                break;
            }
            found = Some(follow(found, &line).map_err(|why| AuditError::Broken {
                path: path.clone(),
                line: number,
                why,
            })?);
        }
    }
    found.ok_or(AuditError::Empty)
}

fn follow(before: Option<Verified>, line: &[u8]) -> Result<Verified, String> {
    let line = line
        .strip_suffix(b"\n")
        .ok_or("it is not a whole line: torn by a power cut, or cut off")?;
    let link: Link = serde_json::from_slice(line)
        .map_err(|error| format!("not a line of an audit log: {error}"))?;
    let first = match &before {
        None if link.seq == 0 && link.prev != Digest::default().to_string() => {
            return Err("it is the first line, and names one before it".into());
        }
        None => link.seq,
        Some(before) if link.seq != before.last + 1 => {
            return Err(format!(
                "it has number {}, and the line before it {}: lines are missing, or from another log",
                link.seq, before.last
            ));
        }
        Some(before) if link.prev != before.head.to_string() => {
            return Err(
                "it does not follow from the line before it: one of them was changed".into(),
            );
        }
        Some(before) => before.first,
    };
    Ok(Verified {
        lines: before.map_or(0, |before| before.lines) + 1,
        first,
        last: link.seq,
        head: digest(line),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::clock::ManualClock;

    fn told(text: &str) -> Event {
        Event::Reloaded { what: text.into() }
    }

    fn open(dir: &Path) -> Audit {
        Audit::open(dir, Arc::new(ManualClock::default())).unwrap()
    }

    fn lines(path: &Path) -> Vec<String> {
        let text = fs::read_to_string(path).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn broken(path: &Path, lines: &[String]) -> (u64, String) {
        let forged = path.with_extension("forged");
        fs::write(&forged, lines.join("\n") + "\n").unwrap();
        match verify(&[forged]) {
            Err(AuditError::Broken { line, why, .. }) => (line, why),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_change_of_a_line_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(AUDIT_FILE);
        let audit = open(dir.path());
        for text in ["a", "b", "c\n\u{1F600}"] {
            audit.record(&told(text));
        }
        drop(audit);
        open(dir.path()).record(&told("after a restart"));
        let whole = lines(&path);
        let verified = verify(std::slice::from_ref(&path)).unwrap();
        assert_eq!((verified.lines, verified.first, verified.last), (6, 0, 5));
        assert_eq!(verified.head, digest(whole[5].as_bytes()));

        let mut changed = whole.clone();
        changed[1] = changed[1].replace("\"a\"", "\"A\"");
        assert_eq!(broken(&path, &changed).0, 3, "the line after it tells");
        let mut removed = whole.clone();
        removed.remove(2);
        assert_eq!(broken(&path, &removed).0, 3);
        let mut swapped = whole.clone();
        swapped.swap(1, 2);
        assert_eq!(broken(&path, &swapped).0, 2);
        let mut doubled = whole.clone();
        doubled.insert(3, whole[2].clone());
        assert_eq!(broken(&path, &doubled).0, 4);
        let mut headless = whole.clone();
        headless[0] = headless[0].replace("\"prev\":\"00", "\"prev\":\"01");
        assert_eq!(broken(&path, &headless).0, 1);
        let mut rubbish = whole.clone();
        rubbish[4] = "{}".into();
        assert_eq!(broken(&path, &rubbish).0, 5);
        // The end alone cannot tell that something followed: that is what the head is for.
        fs::write(&path, whole[..4].join("\n") + "\n").unwrap();
        assert_ne!(verify(&[path]).unwrap().head, verified.head);
    }

    #[test]
    fn a_torn_line_is_cut_off_and_said_to_be() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(AUDIT_FILE);
        open(dir.path()).record(&told("a"));
        let mut file = append_to(&path).unwrap();
        file.write_all(b"{\"seq\":2,\"at\"").unwrap();
        let torn = verify(std::slice::from_ref(&path)).unwrap_err();
        assert!(
            torn.to_string().contains("line 3: it is not a whole line"),
            "{torn}"
        );
        drop(open(dir.path()));
        assert_eq!(verify(std::slice::from_ref(&path)).unwrap().lines, 3);
        assert!(lines(&path)[2].contains("\"cut\":13"));
    }

    #[test]
    fn a_full_file_is_followed_by_one_that_chains_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(AUDIT_FILE);
        let audit = open(dir.path());
        let text = "x".repeat(TEXT_BYTES_MAX);
        let per_file = FILE_BYTES_MAX / u64::try_from(TEXT_BYTES_MAX).unwrap();
        for _ in 0..per_file * u64::from(FILES_MAX + 1) {
            audit.write(&told(&text), false);
        }
        let files: Vec<_> = (1..FILES_MAX)
            .rev()
            .map(|number| numbered(&path, number))
            .collect();
        assert!(!numbered(&path, FILES_MAX).exists());
        let all = [files, vec![path.clone()]].concat();
        for file in &all {
            assert!(fs::metadata(file).unwrap().len() <= FILE_BYTES_MAX);
        }
        let verified = verify(&all).unwrap();
        assert!(verified.first > 0, "the oldest was dropped");
        assert_eq!(verified.lines, verified.last - verified.first + 1);
        // A death between the renames and the first line of the new file.
        drop(audit);
        fs::rename(&path, numbered(&path, 1)).unwrap();
        File::create(&path).unwrap();
        drop(open(dir.path()));
        assert_eq!(
            verify(&[numbered(&path, 1), path]).unwrap().last,
            verified.last + 1
        );
    }

    #[test]
    fn strangers_do_not_fill_it() {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::default());
        let audit = Audit::open(dir.path(), Arc::clone(&clock) as Arc<dyn Clock>).unwrap();
        for number in 0..1000 {
            audit.refused(format!("10.0.0.{}", number % 500), "no certificate".into());
        }
        let path = dir.path().join(AUDIT_FILE);
        assert_eq!(lines(&path).len(), 1 + REFUSALS_PER_MINUTE);
        clock.advance(REFUSALS_WITHIN);
        audit.refused("10.0.0.0".into(), "no certificate".into());
        assert_eq!(lines(&path).len(), 1 + REFUSALS_PER_MINUTE, "said already");
        audit.refused("10.0.1.0".into(), "no certificate".into());
        let last = lines(&path).pop().unwrap();
        let left_out = 1000 - REFUSALS_PER_MINUTE + 1;
        assert!(last.contains(&format!("\"before\":{left_out}")), "{last}");
    }
}
