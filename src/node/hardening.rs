//! What the process gives up before it does anything: privileges that nothing in it needs.
//!
//! ```text
//!   no_new_privs     no program that is started from here gains a privilege          every host
//!   capabilities     all but KEPT are gone, for this process and its children        every host
//!   IO flusher       an allocation of a thread that serves a disk never waits for    a host that shows disks
//!                    that very disk to write something back (prctl(2))
//! ```
//! All three are attributes of a thread that the threads it starts inherit, so [`harden`] is called while there is one.
//!
//! # Why nothing more is dropped after mounting
//! A host mounts when a test failover begins and when a machine fails over to it, long after it was started: what
//! mounting needs (`CAP_SYS_ADMIN`) has to stay. A host that only keeps replicas needs none of it and is best started without:
//! `scripts/systemd/understudy-replica.service` does that, and confines the files and system calls as well. Landlock is
//! left to the unit for the same reason: it forbids mounting for good.
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

/// What a host needs of root's capabilities.
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

/// Whether the process shows disks that its own host may be waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// It may mount disks.
    Disks,
    /// It keeps replicas.
    Replicas,
}

/// Gives up what is not needed, for the calling thread and all that it starts. What the system does not let go of is
/// complained about, and the host goes on: it is as dangerous as before and no more.
pub fn harden(duty: Duty) {
    if duty == Duty::Disks
        && let Err(error) = configure_io_flusher_behavior(true)
    {
        tracing::info!(
            "not an IO flusher ({error}): with swap on a disk that is served here, memory pressure may stall it; it needs CAP_SYS_RESOURCE"
        );
    }
    if let Err(error) = drop_capabilities() {
        tracing::warn!("cannot drop capabilities: {error}");
    }
    if let Err(error) = set_no_new_privs(true) {
        tracing::warn!("cannot do without new privileges: {error}");
    }
}

fn drop_capabilities() -> io::Result<()> {
    let held = capabilities(None)?;
    // Whoever started this has seen to it, and may have forbidden the call as well.
    if KEPT
        .union(CapabilitySet::SYS_RESOURCE)
        .contains(held.permitted)
    {
        return Ok(());
    }
    if held.permitted.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all().difference(KEPT).iter() {
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
            effective: held.effective.intersection(KEPT),
            permitted: held.permitted.intersection(KEPT),
            inheritable: CapabilitySet::empty(),
        },
    )
}
