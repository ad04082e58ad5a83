//! What a peer may do here: for which machines it may speak, how fast it may feed them, and how much they may take.
//!
//! # The quota
//! What counts is what the replicas of the peer's machines take of this host's disk, images and delta logs, complete or not.
//! It is looked at before a piece of a log is taken that might not fit, so a log that does not fit is given up unfinished:
//! the peer is told, the replica stays as it was at its last complete point, and the peer goes on with its maps and tries
//! again. Merging what was taken before may go beyond the quota by as much as that expands; then nothing more is taken.

use std::{collections::BTreeMap, fs, os::unix::fs::MetadataExt, path::Path, sync::Arc};

use super::{
    host::{Host, HostConfig},
    pacing::{Limiter, Pacing},
};
use crate::{
    base::{
        clock::Clock,
        ids::Name,
        units::{Bytes, MIB},
    },
    protocol::message::Refusal,
};

/// Bytes that may pass between two looks at the disk, at most.
const LOOK_EVERY: u64 = 16 * MIB;
/// Unit of what stat(2) says of the space of a file, in bytes.
const STAT_BLOCK: u64 = 512;

/// What all peers may do.
#[derive(Debug)]
pub(super) struct Allowances {
    /// By names in small letters.
    peers: BTreeMap<String, (Option<Vec<Name>>, Arc<Limiter>)>,
}

impl Allowances {
    pub(super) fn of(config: &HostConfig) -> Self {
        let peers = config.peers.iter().map(|(name, peer)| {
            let machines = peer.machines.as_ref();
            let machines = machines.map(|machines| machines.iter().cloned().collect());
            let limiter = Arc::new(Limiter::new(peer.rate.into()));
            (name.as_str().to_ascii_lowercase(), (machines, limiter))
        });
        Self {
            peers: peers.collect(),
        }
    }

    /// Whether a peer may speak for a machine of this name.
    pub(super) fn may(&self, peer: &Name, machine: &Name) -> Result<(), Refusal> {
        match self.peers.get(&peer.as_str().to_ascii_lowercase()) {
            Some((None, _)) => Ok(()),
            Some((Some(machines), _)) if machines.contains(machine) => Ok(()),
            _ => Err(Refusal::Denied {
                detail: format!("{machine} is not one of the machines of {peer}"),
            }),
        }
    }

    /// The rate that all connections of a peer keep together.
    pub(super) fn pacing(&self, peer: &Name, clock: &Arc<dyn Clock>) -> Pacing {
        let known = self.peers.get(&peer.as_str().to_ascii_lowercase());
        let limiter = known.map(|(_, limiter)| Arc::clone(limiter));
        Pacing::new(limiter.into_iter().collect(), Arc::clone(clock))
    }
}

/// The quota of a peer, as one of its connections sees it.
#[derive(Debug)]
pub(super) struct Quota {
    host: Arc<Host>,
    peer: Name,
    limit: Option<u64>,
    /// Bytes that may pass before the next look.
    room: u64,
}

/// There is no room for more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the machines of {peer} take {} here, and its quota is {}: make room, or raise the quota of [peers.{peer}]", Bytes(*used), Bytes(*limit))]
pub(super) struct OverQuota {
    peer: Name,
    used: u64,
    limit: u64,
}

impl Quota {
    pub(super) fn new(host: Arc<Host>, peer: Name) -> Self {
        let config = &host.shared().config;
        let limit = config.peer(&peer).and_then(|peer| peer.quota);
        Self {
            host,
            peer,
            limit,
            room: 0,
        }
    }

    /// Lets `bytes` more lie on the disk.
    pub(super) fn take(&mut self, bytes: u64) -> Result<(), OverQuota> {
        let Some(limit) = self.limit else {
            return Ok(());
        };
        if bytes > self.room {
            let used = self.host.space_of(&self.peer);
            self.room = limit.saturating_sub(used).min(LOOK_EVERY.max(bytes));
            if bytes > self.room {
                return Err(OverQuota {
                    peer: self.peer.clone(),
                    used,
                    limit,
                });
            }
        }
        self.room -= bytes;
        Ok(())
    }
}

/// Bytes of disk that the images and logs in a machine's folder take. What operators made of them (test failovers) lies in
/// folders below and does not count.
pub(super) fn space_of(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    let files = entries.flatten().filter_map(|entry| entry.metadata().ok());
    files
        .filter(fs::Metadata::is_file)
        .map(|file| file.blocks() * STAT_BLOCK)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{base::clock::ManualClock, node::host::PeerConfig, node::policy::Limit};

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    #[test]
    fn nobody_may_more_than_is_said() {
        let mut config = HostConfig::new("/nowhere".into());
        let named = PeerConfig {
            machines: Some([name("web")].into()),
            rate: Limit(Some(MIB)),
            ..PeerConfig::default()
        };
        config.peers.insert(name("Alpha"), named);
        config.peers.insert(name("beta"), PeerConfig::default());
        let allowances = Allowances::of(&config);
        let may = |peer: &str, machine: &str| allowances.may(&name(peer), &name(machine)).is_ok();
        assert!(may("alpha", "web") && may("beta", "web") && may("beta", "mail"));
        assert!(!may("alpha", "mail") && !may("stranger", "web") && !may("alpha", "Web"));

        let clock: Arc<dyn Clock> = Arc::new(ManualClock::default());
        let [first, second] = ["alpha", "ALPHA"].map(|peer| allowances.pacing(&name(peer), &clock));
        let burst = first.pass(100 * MIB).unwrap();
        assert!(burst < 2 * MIB, "{burst}");
        second.pass(MIB).unwrap_err();
        let free = allowances.pacing(&name("beta"), &clock);
        assert_eq!(free.pass(100 * MIB), Ok(100 * MIB));
    }
}
