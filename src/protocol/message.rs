//! What the two sides say on the control stream: JSON, one message per length-prefixed record.
//!
//! These are a few small messages a second; the bytes that matter travel in the delta log. Text can be read in a trace,
//! an unknown field is ignored and an unknown message is an error, so the version only has to change when the meaning
//! of what exists changes.

use serde::{Deserialize, Serialize};

use super::{
    claim::{Answer, Claim},
    compare::{Differing, Question},
};
use crate::base::{
    clock::Timestamp,
    ids::{Generation, Lineage, MachineId, Name},
    limits::{DISK_BYTES_MAX, DISKS_PER_MACHINE_MAX, MESSAGE_BYTES_MAX, NAME_BYTES_MAX},
};

/// Versions of the conversation. A peer that speaks another one is refused with both numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Version(pub u16);

impl Version {
    /// The first: greeting, delta logs, staged acknowledgements, byte grants.
    pub const V1: Self = Self(1);
    /// The replica answers questions of content: a resync is sent after it was compared.
    pub const V2: Self = Self(2);
    /// The version this program speaks.
    pub const CURRENT: Self = Self::V2;
}

/// One disk of a machine, as the primary sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// The image's name without its suffix.
    pub name: Name,
    /// Bytes the guest sees.
    pub size: u64,
    /// Smallest unit the guest addresses, in bytes.
    pub logical_sector: u32,
    /// Smallest unit the medium writes without reading first, in bytes.
    pub physical_sector: u32,
    /// Format of the primary's image: `raw`, `vhd` or `vhdx`.
    pub format: String,
}

/// The primary's greeting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Version the primary speaks.
    pub version: Version,
    /// The machine this connection is about.
    pub machine: MachineId,
    /// What people call it.
    pub name: Name,
    /// In which generation the primary is, or wants to be.
    pub claim: Claim,
    /// Its disks, in the order of the delta logs' disk table.
    pub disks: Vec<DiskSpec>,
}

/// How far a replica has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "head", content = "lineage")]
pub enum Head {
    /// It has nothing.
    Empty,
    /// The initial copy has begun and is not complete: no point to go back to yet.
    Copying,
    /// It holds all blocks, read at different times, or those of a former primary: only with the epoch after this point
    /// it has a point to go back to.
    Copied(Lineage),
    /// It holds everything up to here.
    Complete(Lineage),
}

/// Why a replica does not take part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case", tag = "refusal")]
pub enum Refusal {
    /// The peers speak different versions.
    #[error("the replica speaks protocol version {}, this host {}: install the same release on both", theirs.0, Version::CURRENT.0)]
    Version {
        /// What the replica speaks.
        theirs: Version,
    },
    /// The replica does not follow this host.
    #[error("{answer}")]
    Role {
        /// What it says instead.
        answer: Answer,
    },
    /// The call cannot be answered as things are.
    #[error("{detail}")]
    NotNow {
        /// Why not.
        detail: String,
    },
    /// The peer may not speak for this machine there.
    #[error("the other host does not allow it: {detail}")]
    Denied {
        /// What it does not allow.
        detail: String,
    },
    /// The machine's name is taken on the replica by another machine.
    #[error(
        "the replica already holds another machine called {name}: rename one of them with --machine"
    )]
    NameTaken {
        /// The name both have.
        name: Name,
    },
    /// The disks differ from what the replica holds.
    #[error("the machine's disks changed: {detail}")]
    Disks {
        /// Which disk, and how.
        detail: String,
    },
    /// The replica cannot work: its disk is full or failed.
    #[error("the replica cannot take changes: {detail}")]
    Failed {
        /// What it says.
        detail: String,
    },
    /// The greeting itself was not acceptable.
    #[error("the replica did not accept the greeting: {detail}")]
    Malformed {
        /// What was wrong.
        detail: String,
    },
}

/// From the primary to the replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "say")]
pub enum ToReplica {
    /// The greeting; first, once.
    Hello(Hello),
    /// Instead of a greeting, of a primary that stepped down: take over at `head`. Answered with
    /// [`ToPrimary::TookOver`].
    HandOver {
        /// The machine.
        machine: MachineId,
        /// What people call it.
        name: Name,
        /// The caller's generation.
        from: Generation,
        /// Its last point.
        head: Lineage,
    },
    /// Instead of a greeting, of a primary to the host that was the primary before: where may the images there differ?
    /// Answered with [`ToPrimary::Differs`], as often as needed, and [`ToPrimary::DiffersEnd`].
    Return {
        /// The machine.
        machine: MachineId,
        /// What people call it.
        name: Name,
        /// The caller's generation.
        by: Generation,
    },
    /// The blocks in which the peer's images differ are durably taken. Answered with [`ToPrimary::Returned`].
    Taken {
        /// The caller's generation.
        by: Generation,
        /// The point that its next epoch continues.
        point: Lineage,
        /// When that point was cut, or the failover was.
        cut: Timestamp,
    },
    /// Which of these blocks differ? Answered with [`ToPrimary::Compared`], in the order of the questions.
    Compare(Question),
    /// Nothing changed since the replica's head: that head is the machine's state as of `at`.
    Current {
        /// Wall-clock time of the primary.
        at: Timestamp,
    },
}

/// From the replica to the primary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "say")]
pub enum ToPrimary {
    /// The answer to the greeting; first, once.
    Welcome {
        /// Version the replica speaks.
        version: Version,
        /// The generation it follows: the caller's, or the one the caller asked it to move to.
        follows: Generation,
        /// Where it stands.
        head: Head,
        /// Delta-log bytes the primary may send on this connection, in all.
        granted: u64,
    },
    /// The replica does not take part; it closes the connection.
    Refused(Refusal),
    /// The answer to [`ToReplica::HandOver`]: this host is the primary now.
    TookOver {
        /// Its generation.
        generation: Generation,
    },
    /// Runs of a disk in which the images here may differ from what the caller's machine holds.
    Differs {
        /// The disk.
        disk: Name,
        /// Offset and length of each run, in bytes: at most [`RUNS_PER_MESSAGE_MAX`].
        runs: Vec<(u64, u64)>,
    },
    /// There are no more.
    DiffersEnd,
    /// This host is the caller's replica now.
    Returned,
    /// The first `frames` frames of the initial copy's log are durable.
    Copied {
        /// Frames from the start of the log.
        frames: u64,
    },
    /// The answer to [`ToReplica::Compare`]: what the replica holds durably at the point that was named.
    Compared {
        /// The question's.
        number: u64,
        /// Where it holds something else; nothing if that point is not there any more.
        differs: Option<Differing>,
    },
    /// The epoch is durable on the replica, and with it everything before.
    Staged {
        /// The replica's new head.
        lineage: Lineage,
    },
    /// The primary may send this many delta-log bytes on this connection, in all.
    Granted {
        /// Bytes since the connection began.
        bytes: u64,
    },
}

/// Most runs of one [`ToPrimary::Differs`]: what fits a message with the longest numbers and name.
pub const RUNS_PER_MESSAGE_MAX: usize = 4096;
const _: () = assert!(MESSAGE_BYTES_MAX > RUNS_PER_MESSAGE_MAX * 44 + NAME_BYTES_MAX * 6 + 1024);

/// Why a record is not a message.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Longer than [`MESSAGE_BYTES_MAX`].
    #[error("a control message of {0} bytes is longer than {MESSAGE_BYTES_MAX}")]
    TooLong(usize),
    /// Not a message of this version.
    #[error("the peer's control message is not readable")]
    Malformed(#[from] serde_json::Error),
    /// A greeting whose fields contradict each other or a limit.
    #[error("the greeting is not acceptable: {0}")]
    Hello(String),
}

/// Writes a message.
pub fn encode<M: Serialize>(message: &M) -> Vec<u8> {
    let bytes = serde_json::to_vec(message).expect("messages hold nothing that JSON cannot say");
    assert!(
        bytes.len() <= MESSAGE_BYTES_MAX,
        "the limits of a greeting keep it below the limit of a message"
    );
    bytes
}

/// Reads a message for the replica.
pub fn decode_to_replica(bytes: &[u8]) -> Result<ToReplica, MessageError> {
    let message = decode(bytes)?;
    if let ToReplica::Hello(hello) = &message {
        check_hello(hello).map_err(MessageError::Hello)?;
    }
    Ok(message)
}

/// Reads a message for the primary.
pub fn decode_to_primary(bytes: &[u8]) -> Result<ToPrimary, MessageError> {
    decode(bytes)
}

fn decode<'a, M: Deserialize<'a>>(bytes: &'a [u8]) -> Result<M, MessageError> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(MessageError::TooLong(bytes.len()));
    }
    Ok(serde_json::from_slice(bytes)?)
}

fn check_hello(hello: &Hello) -> Result<(), String> {
    if hello.disks.is_empty() || hello.disks.len() > DISKS_PER_MACHINE_MAX {
        return Err(format!(
            "{} disks, between 1 and {DISKS_PER_MACHINE_MAX} are possible",
            hello.disks.len()
        ));
    }
    for (index, disk) in hello.disks.iter().enumerate() {
        let DiskSpec {
            name,
            size,
            logical_sector,
            physical_sector,
            ..
        } = disk;
        if !matches!(logical_sector, 512 | 4096) || !matches!(physical_sector, 512 | 4096) {
            return Err(format!(
                "disk {name} has sectors of {logical_sector}/{physical_sector} bytes, not 512 or 4096"
            ));
        }
        if *size == 0 || *size > DISK_BYTES_MAX || size % u64::from(*logical_sector) != 0 {
            return Err(format!(
                "disk {name} has {size} bytes: not a whole number of sectors up to {DISK_BYTES_MAX}"
            ));
        }
        if hello.disks[..index].iter().any(|other| other.name == *name) {
            return Err(format!("two disks are called {name}"));
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::base::ids::SeededIds;

    pub(crate) fn hello() -> Hello {
        let ids = SeededIds::new(1);
        let disk = |name: &str| DiskSpec {
            name: Name::new(name).unwrap(),
            size: 1 << 30,
            logical_sector: 512,
            physical_sector: 4096,
            format: "vhdx".into(),
        };
        Hello {
            version: Version::CURRENT,
            machine: MachineId(crate::base::ids::Ids::uuid(&ids)),
            name: Name::new("web").unwrap(),
            claim: Claim {
                generation: Generation::first(&ids),
                active: true,
                born: None,
                wants: None,
            },
            disks: vec![disk("os"), disk("data")],
        }
    }

    #[test]
    fn the_largest_greeting_fits_the_limit() {
        let mut hello = hello();
        let longest = "\u{1F5A5}".repeat(NAME_BYTES_MAX / 4);
        hello.disks = (0..DISKS_PER_MACHINE_MAX)
            .map(|n| DiskSpec {
                name: Name::new(&format!("{n:04}{}", &longest[8..])).unwrap(),
                size: DISK_BYTES_MAX,
                ..hello.disks[0].clone()
            })
            .collect();
        let bytes = encode(&ToReplica::Hello(hello.clone()));
        assert_eq!(decode_to_replica(&bytes).unwrap(), ToReplica::Hello(hello));
    }

    #[test]
    fn greetings_that_make_no_sense_are_refused() {
        let refused = |change: fn(&mut Hello)| {
            let mut hello = hello();
            change(&mut hello);
            decode_to_replica(&encode(&ToReplica::Hello(hello))).is_err()
        };
        assert!(!refused(|_| {}));
        assert!(refused(|h| h.disks.clear()));
        assert!(refused(|h| h.disks[1].name = h.disks[0].name.clone()));
        assert!(refused(|h| h.disks[0].size = 513));
        assert!(refused(|h| h.disks[0].size = DISK_BYTES_MAX + 512));
        assert!(refused(|h| h.disks[0].logical_sector = 0));
        let path = br#"{"say":"hello","name":"../x"}"#;
        assert!(decode_to_replica(path).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic_the_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_to_replica(&bytes);
            let _ = decode_to_primary(&bytes);
        }

        #[test]
        fn a_mutated_greeting_is_read_or_refused(at in 0usize..400, byte in any::<u8>()) {
            let mut bytes = encode(&ToReplica::Hello(hello()));
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = decode_to_replica(&bytes);
        }
    }
}
