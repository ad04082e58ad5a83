//! What the process gives up before it does anything: privileges that nothing in it needs.
//!
//! ```text
//!   no_new_privs     no program that is started from here gains a privilege          everybody
//!   capabilities     all but those of its duty are gone, here and in children        everybody
//!   IO flusher       an allocation of a thread that serves a disk never waits for    a host that shows disks
//!                    that very disk to write something back (prctl(2))
//! ```
//! All three are attributes of a thread that the threads it starts inherit, so [`harden`] is called while there is one.
//!
//! # Why a host that mounts keeps what mounting needs
//! It mounts when a test failover begins and when a machine fails over to it, long after it was started: `CAP_SYS_ADMIN` has
//! to stay. With a [mount helper](crate::shim::helper) it goes, and the host can be confined in a mount namespace:
//! `scripts/systemd/understudy.service`. A host that only keeps replicas needs nothing at all.
//!
//! # Why there is no landlock
//! It would restrict which files the process reaches. The units do that already (`ProtectSystem=strict`, no devices, no homes),
//! for every thread and child, and an operator widens it with one line (`ReadWritePaths=`). A ruleset in here would have to
//! know all folders at the start (stores, images and their parents, identity, revocations, sockets, scripts of plans), and is
//! final: a folder that `export`, `import` or a coordinator's plan names later could not be let in any more.
//!
//! # Scripts
//! The scripts of recovery plans are children of the coordinator: they have what is kept here and gain nothing by
//! `sudo` or a file with the set-user-ID bit.

use rustix::{
    io,
    process::configure_io_flusher_behavior,
    thread::{
        CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
    },
};

/// What a host that mounts itself needs of root's capabilities.
///
/// `SYS_ADMIN` mounts and unmounts; `SYS_PTRACE` finds out who has a disk open, which a planned failover must know;
/// `DAC_OVERRIDE` and `DAC_READ_SEARCH` open images that belong to the hypervisor's user; `FOWNER` and `CHOWN` keep owner
/// and mode of images that are made anew; `NET_ADMIN` gives sockets the receive buffer of a long fast link;
/// `NET_BIND_SERVICE` listens on a port below 1024.
pub const KEPT: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::SYS_PTRACE)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::NET_BIND_SERVICE);

/// What the process is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// It mounts disks and serves them: its own host may be waiting for them.
    Disks,
    /// It serves disks that a helper mounts.
    MountedDisks,
    /// It keeps replicas.
    Replicas,
    /// It mounts for others.
    Mounting,
}

impl Duty {
    /// The capabilities that stay.
    pub fn kept(self) -> CapabilitySet {
        match self {
            Self::Disks | Self::Replicas => KEPT,
            Self::MountedDisks => KEPT.difference(CapabilitySet::SYS_ADMIN),
            Self::Mounting => CapabilitySet::SYS_ADMIN,
        }
    }

    fn serves_disks(self) -> bool {
        matches!(self, Self::Disks | Self::MountedDisks)
    }
}

/// Gives up what is not needed, for the calling thread and all that it starts. What the system does not let go of is
/// complained about, and the process goes on: it is as dangerous as before and no more.
pub fn harden(duty: Duty) {
    if duty.serves_disks()
        && let Err(error) = configure_io_flusher_behavior(true)
    {
        tracing::info!(
            "not an IO flusher ({error}): with swap on a disk that is served here, memory pressure may stall it; it needs CAP_SYS_RESOURCE"
        );
    }
    if let Err(error) = drop_capabilities(duty.kept()) {
        tracing::warn!("cannot drop capabilities: {error}");
    }
    if let Err(error) = set_no_new_privs(true) {
        tracing::warn!("cannot do without new privileges: {error}");
    }
}

fn drop_capabilities(kept: CapabilitySet) -> io::Result<()> {
    let held = capabilities(None)?;
    // Whoever started this has seen to it.
    if kept.contains(held.permitted) {
        return Ok(());
    }
    if held.permitted.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all().difference(kept).iter() {
            match remove_capability_from_bounding_set(capability) {
                // A capability that this kernel does not know.
                Ok(()) | Err(io::Errno::INVAL) => {}
                Err(error) => return Err(error),
            }
        }
    }
    clear_ambient_capability_set()?;
    set_capabilities(
        None,
        CapabilitySets {
            effective: held.effective.intersection(kept),
            permitted: held.permitted.intersection(kept),
            inheritable: CapabilitySet::empty(),
        },
    )
}
