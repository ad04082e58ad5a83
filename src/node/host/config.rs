//! What an operator says about a host.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::PathBuf,
    time::Duration,
};

use crate::{
    base::{checksum::Digest, ids::Name},
    delta::policy::Setting,
    net,
    node::{
        images::ImageConfig,
        initial_copy::InitialCopy,
        policy::{Bandwidth, Limit},
        primary::ShowConfig,
        served::Keeping,
        sync_flush::SyncOnFlush,
    },
    shim::Mounter,
};

/// A host.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Folder of records, replicas and tracking.
    pub store: PathBuf,
    /// Folder of this host's identity. Without it nobody is called, and nobody is listened to.
    pub identity: Option<PathBuf>,
    /// File of revoked certificates, whose holders are refused.
    pub crl: Option<PathBuf>,
    /// The keys that names may have, by their [`net::identity::key_digest`]; any for a name that is not here.
    pub keys: BTreeMap<Name, Vec<Digest>>,
    /// Where to listen for peers.
    pub listen: Option<SocketAddr>,
    /// The hosts that may feed or claim machines here, by the names in their certificates.
    pub peers: BTreeMap<Name, PeerConfig>,
    /// Who may operate this host over the network, by the names in their certificates. None of them is a peer.
    pub operators: BTreeSet<Name>,
    /// The other hosts that this one coordinates.
    pub coordinator: Option<CoordinatorConfig>,
    /// What all machines of the host together may send.
    pub bandwidth: Bandwidth,
    /// What all machines of a group together may send.
    pub groups: BTreeMap<Name, Bandwidth>,
    /// How replicas are kept that are not configured otherwise.
    pub keeping: Keeping,
    /// How a machine replicates that is not configured otherwise, because it was promoted here.
    pub replication: ReplicationConfig,
    /// Machines that are kept, or replicate after a failover to here, in a way of their own.
    pub kept: BTreeMap<Name, KeptConfig>,
    /// Whether the host serves what it can when a machine cannot be served: that one is shown as in trouble, and tried
    /// again. Without it the host does not start.
    pub tolerant: bool,
    /// Who makes the mounts of all machines and test failovers.
    pub mounter: Mounter,
    /// The machines whose images lie on this host.
    pub machines: BTreeMap<Name, MachineConfig>,
}

impl HostConfig {
    /// A host without machines that calls nobody and listens to nobody.
    pub fn new(store: PathBuf) -> Self {
        Self {
            store,
            identity: None,
            crl: None,
            keys: BTreeMap::new(),
            listen: None,
            peers: BTreeMap::new(),
            operators: BTreeSet::new(),
            coordinator: None,
            bandwidth: Bandwidth::default(),
            groups: BTreeMap::new(),
            keeping: Keeping::default(),
            replication: ReplicationConfig::default(),
            kept: BTreeMap::new(),
            tolerant: true,
            mounter: Mounter::Itself,
            machines: BTreeMap::new(),
        }
    }

    /// How a machine replicates when it is written here, to `peer`.
    pub fn replication_of(&self, machine: &Name, peer: Option<&Name>) -> &ReplicationConfig {
        if let Some(own) = self.machines.get(machine) {
            return &own.replication;
        }
        let kept = self.kept.get(machine);
        let kept = kept.or_else(|| self.peer(peer?)?.kept.as_ref());
        kept.map_or(&self.replication, |kept| &kept.replication)
    }

    /// How a machine's replica is kept here, which `peer` feeds.
    pub fn keeping_of(&self, machine: &Name, peer: Option<&Name>) -> &Keeping {
        let kept = self.kept.get(machine);
        let kept = kept.or_else(|| self.peer(peer?)?.kept.as_ref());
        kept.map_or(&self.keeping, |kept| &kept.keeping)
    }

    /// What is said of a peer. Names are compared without regard to case.
    pub fn peer(&self, name: &Name) -> Option<&PeerConfig> {
        let same = |known: &Name| known.as_str().eq_ignore_ascii_case(name.as_str());
        let found = self.peers.iter().find(|(known, _)| same(known));
        found.map(|(_, peer)| peer)
    }

    /// Whom an identity of this host believes.
    pub fn trust(&self) -> net::Trust {
        net::Trust {
            crl: self.crl.clone(),
            keys: self.keys.clone(),
        }
    }
}

/// Another host, and what it may do here.
#[derive(Clone, Debug, Default)]
pub struct PeerConfig {
    /// Where it listens, as `HOST:PORT`: needed to replicate to it.
    pub address: Option<String>,
    /// The machines that it may begin, feed, claim or hand over; without it all but those of other hosts.
    pub machines: Option<BTreeSet<Name>>,
    /// Folder for the replicas of its machines that begin from now on, instead of the host's store.
    pub store: Option<PathBuf>,
    /// Bytes that the replicas of its machines may take together, images and delta logs: at it nothing more is taken.
    pub quota: Option<u64>,
    /// Bytes per second of delta logs that are taken from it.
    pub rate: Limit,
    /// How its machines are kept, and replicate after a failover to here, where nothing is said of themselves.
    pub kept: Option<KeptConfig>,
}

impl PeerConfig {
    /// A host that listens on `address`, as `HOST:PORT`, and may what is not denied to peers.
    pub fn at(address: String) -> Self {
        Self {
            address: Some(address),
            ..Self::default()
        }
    }
}

/// Other hosts to coordinate.
#[derive(Clone, Debug)]
pub struct CoordinatorConfig {
    /// Folder of the identity that operates them: one of their operators, and no host's that replicates.
    pub identity: PathBuf,
    /// Where they listen, as `HOST:PORT`, by the names in their certificates.
    pub hosts: BTreeMap<Name, String>,
}

/// A machine whose images lie on this host.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Its images.
    pub images: Vec<ImageConfig>,
    /// How its disks are shown.
    pub show: ShowConfig,
    /// The host to replicate to, one of the host's peers.
    pub peer: Option<Name>,
    /// How to replicate.
    pub replication: ReplicationConfig,
}

/// A machine whose replica is kept here in a way of its own.
#[derive(Clone, Debug)]
pub struct KeptConfig {
    /// How.
    pub keeping: Keeping,
    /// How it replicates after a failover to here.
    pub replication: ReplicationConfig,
}

/// How to replicate.
#[derive(Clone, Debug)]
pub struct ReplicationConfig {
    /// The group it belongs to.
    pub group: Option<Name>,
    /// Time from one cut to the next.
    pub interval: Duration,
    /// Compression on the link.
    pub compression: Setting,
    /// Whether the guest's flushes wait for the replica, and what becomes of them while it cannot be reached.
    pub sync_on_flush: Option<SyncOnFlush>,
    /// What the machine may send; below what its group and its host may.
    pub bandwidth: Bandwidth,
    /// When the initial copy begins.
    pub initial_copy: InitialCopy,
}

impl Default for ReplicationConfig {
    fn default() -> Self {
        Self {
            group: None,
            interval: Duration::from_secs(1),
            compression: Setting::Auto,
            sync_on_flush: None,
            bandwidth: Bandwidth::default(),
            initial_copy: InitialCopy::Now,
        }
    }
}

/// Reads `500ms`, `1s`, `15m`.
pub fn parse_interval(text: &str) -> Result<Duration, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not a time: use 500ms, 1s or 5m"))?;
    let millis = match unit {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        _ => return Err(format!("{text:?} has no unit: use ms, s or m")),
    };
    match millis {
        Some(millis @ 100..=900_000) => Ok(Duration::from_millis(millis)),
        _ => Err(format!("{text} is not between 100ms and 15m")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_have_a_unit_and_a_range() {
        assert_eq!(parse_interval("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(parse_interval("15m"), Ok(Duration::from_mins(15)));
        for bad in [
            "",
            "1",
            "s",
            "99ms",
            "16m",
            "1h",
            "-1s",
            "99999999999999999999s",
        ] {
            assert!(parse_interval(bad).is_err(), "{bad}");
        }
    }
}
