//! What an operator asks of a machine, and the reports of what was done.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::base::{
    clock::Timestamp,
    ids::{Generation, Lineage, Name},
    units::Epoch,
};

/// How a machine is verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyRequest {
    /// Whether what differs is sent again.
    #[serde(default)]
    pub repair: bool,
    /// Bytes that are read in a second, at most.
    #[serde(default)]
    pub throttle: Option<u64>,
}

/// Which point to test.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TestRequest {
    /// Its epoch; the latest point if there is none.
    #[serde(default)]
    pub point: Option<Epoch>,
    /// The rescue point instead.
    #[serde(default)]
    pub rescue: bool,
    /// Asked again with the same key while the test runs, it is the same test.
    #[serde(default)]
    pub key: Option<Uuid>,
}

/// How a machine is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailoverKind {
    /// With the primary: nothing is lost.
    Planned,
    /// Without it.
    Unplanned,
}

/// A failover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailoverRequest {
    /// Planned on the primary, unplanned on the replica.
    pub kind: FailoverKind,
    /// Unplanned: the epoch to go to; the latest point if there is none.
    #[serde(default)]
    pub point: Option<Epoch>,
    /// Unplanned: also while the primary is connected.
    #[serde(default)]
    pub force: bool,
}

/// What a change of roles led to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverReport {
    /// The generation that this host obeys or is active in.
    pub generation: Generation,
    /// The machine's disks, as raw files, if they are served here now.
    pub files: Vec<PathBuf>,
    /// What was done, and what comes next.
    pub text: String,
}

/// How a former primary follows the new one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReverseRequest {
    /// Also if a disk is still in use here, whose user gets errors from then on.
    #[serde(default)]
    pub force: bool,
}

/// A suspension.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SuspendRequest {
    /// Also if the guest's flushes have to wait for the replica until the machine is resumed.
    #[serde(default)]
    pub force: bool,
}

/// A machine that is suspended, or was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SuspendReport {
    /// Since when; nothing if a machine that was resumed was not suspended.
    pub since: Option<Timestamp>,
}

/// A folder of the host that is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FolderRequest {
    /// Its absolute path.
    pub folder: PathBuf,
}

/// An initial copy that was exported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportReport {
    /// The file.
    pub file: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// What a replica is at that has it.
    pub lineage: Lineage,
}

/// An initial copy that was imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportReport {
    /// Length of the file.
    pub bytes: u64,
    /// What the replica is at now.
    pub lineage: Lineage,
}

/// A larger disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeRequest {
    /// Which.
    pub disk: Name,
    /// The bytes it shall have.
    pub size: u64,
}

/// A disk that has grown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResizeReport {
    /// The bytes it had.
    pub before: u64,
    /// The bytes it has.
    pub size: u64,
}

/// What to take back, or which test failovers to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CancelRequest {
    /// One of them; all if there is none.
    #[serde(default)]
    pub number: Option<u32>,
    /// All test failovers, and nothing else.
    #[serde(default)]
    pub tests: bool,
    /// The rescue point, and nothing else.
    #[serde(default)]
    pub rescue: bool,
    /// Also those that somebody uses, who gets errors from then on.
    #[serde(default)]
    pub force: bool,
}

/// What was ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelReport {
    /// Numbers of the test failovers.
    pub ended: Vec<u32>,
    /// What became of the failover that was taken back.
    #[serde(default)]
    pub failover: Option<String>,
}
