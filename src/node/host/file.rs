//! A host's configuration as a TOML file, for `understudy serve`.
//!
//! ```toml
//! store    = "/var/lib/understudy"      # records, tracking, replicas
//! identity = "/etc/understudy/host-a"   # this host's certificate and key
//! crl      = "/etc/understudy/ca.crl"   # revoked certificates; `understudy reload` reads it and the identity again
//! listen   = "0.0.0.0:7171"
//! bandwidth = "50M"                     # bytes per second that all machines together may send
//! mount-helper = "/run/understudy-mount/helper.sock"    # who mounts (`understudy mount-helper`); without it this process does
//!
//! [peers.host-b]                        # the only hosts that are let in
//! address = "host-b.example:7171"       # where it listens, to replicate to it
//!
//! machines  = ["mail"]                  # that it may feed; without it all but those of other hosts
//! store     = "/srv/host-b"             # where their replicas lie, instead of below `store`
//! quota     = "2T"                      # that they may take together
//! rate      = "100M"                    # bytes per second that are taken from it
//! group     = "gold"                    # how they are kept, unless [replicas.machines] says more
//!
//! [keys]                                # who has one of these names must hold one of its keys
//! host-b = ["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"]    # as `pki issue` says
//!
//! # operators = ["coord"]               # identities that may operate this host over the network
//!
//! [coordinator]                         # other hosts whose machines are moved from here
//! identity = "/etc/understudy/coord"    # an operator of each of them
//! [coordinator.hosts]
//! host-b = "host-b.example:7171"
//!
//! [replicas]                            # how machines of other hosts are kept
//! keep      = 24
//! hourly    = 24
//! space-max = "200G"
//! seed      = true                      # a new replica begins with the images that lie in its folder
//!
//! [replicas.machines.mail]              # one of them, differently
//! group = "gold"
//! keep  = 100
//!
//! [groups.gold]                         # what its machines inherit
//! interval      = "500ms"
//! compression   = "zstd"
//! sync-on-flush = "strict"              # or "available"; without it no flush waits for the replica
//! bandwidth     = "20M"                 # that they together may send
//! bandwidth-windows = [{ from = "08:00", to = "18:00", days = "mon-fri", limit = "5M" }]    # UTC
//! initial-copy  = "22:00"               # UTC; or "now", "2026-11-30T22:00:00Z", "portable"
//! keep          = 24                    # of their replicas that are kept here
//!
//! [machines.web]                        # a machine whose images lie here
//! images   = ["/vm/web-os.vhdx", "/vm/web-data.vhdx"]
//! at       = "/mnt/web"
//! peer     = "host-b"
//! group    = "gold"
//! interval = "1s"                       # its own settings go before those of the group
//! ```
//! Relative paths are relative to the file. An unknown key is an error: a setting that is not obeyed must not look as if
//! it were.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;

use super::{
    CoordinatorConfig, HostConfig, Keeping, MachineConfig, PeerConfig, ReplicationConfig,
    parse_interval,
    policy::{GroupTable, KeptTable, Policies, Replicating, Retaining, WindowTable, bandwidth},
};
use crate::{
    base::{checksum::Digest, ids::Name, units::parse_size},
    delta::policy::Setting,
    disk::image::Format,
    net,
    node::{
        images::{ImageConfig, ImageError},
        initial_copy::InitialCopy,
        policy::Limit,
        primary::ShowConfig,
        sync_flush::SyncOnFlush,
    },
    shim::{Mounter, Owner, THREADS_DEFAULT, Visibility, helper},
};

/// Threads of a mount, at most.
const THREADS_MAX: usize = 256;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is not what this program understands.
    #[error("{}: {source}", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// Where, and why.
        source: Box<toml::de::Error>,
    },
    /// A value makes no sense.
    #[error("{}: {key}: {why}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Why not.
        why: String,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct HostTable {
    store: PathBuf,
    identity: Option<PathBuf>,
    crl: Option<PathBuf>,
    #[serde(default)]
    keys: BTreeMap<Name, Vec<String>>,
    listen: Option<SocketAddr>,
    #[serde(default, deserialize_with = "interval")]
    interval: Option<Duration>,
    #[serde(default, deserialize_with = "text")]
    compression: Option<Setting>,
    sync_on_flush: Option<SyncOnFlush>,
    initial_copy: Option<InitialCopy>,
    #[serde(default, deserialize_with = "text")]
    bandwidth: Option<Limit>,
    #[serde(default)]
    bandwidth_windows: Vec<WindowTable>,
    mount_helper: Option<PathBuf>,
    #[serde(default)]
    groups: BTreeMap<Name, GroupTable>,
    #[serde(default)]
    replicas: ReplicasTable,
    #[serde(default)]
    peers: BTreeMap<Name, PeerTable>,
    #[serde(default)]
    operators: BTreeSet<Name>,
    coordinator: Option<CoordinatorTable>,
    #[serde(default)]
    machines: BTreeMap<Name, MachineTable>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ReplicasTable {
    #[serde(default, deserialize_with = "text")]
    format: Option<Format>,
    keep: Option<u32>,
    hourly: Option<u32>,
    #[serde(default, deserialize_with = "size")]
    space_max: Option<u64>,
    #[serde(default)]
    seed: bool,
    tests: Option<PathBuf>,
    #[serde(default)]
    machines: BTreeMap<Name, KeptTable>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct CoordinatorTable {
    identity: PathBuf,
    hosts: BTreeMap<Name, String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct PeerTable {
    address: Option<String>,
    machines: Option<BTreeSet<Name>>,
    store: Option<PathBuf>,
    #[serde(default, deserialize_with = "size")]
    quota: Option<u64>,
    #[serde(default, deserialize_with = "text")]
    rate: Option<Limit>,
    group: Option<Name>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct MachineTable {
    images: Vec<PathBuf>,
    #[serde(default, deserialize_with = "text")]
    format: Option<Format>,
    parents: Option<PathBuf>,
    at: PathBuf,
    #[serde(default)]
    all_users: bool,
    #[serde(default, deserialize_with = "text")]
    owner: Option<Owner>,
    threads: Option<usize>,
    peer: Option<Name>,
    group: Option<Name>,
    #[serde(default, deserialize_with = "interval")]
    interval: Option<Duration>,
    #[serde(default, deserialize_with = "text")]
    compression: Option<Setting>,
    sync_on_flush: Option<SyncOnFlush>,
    initial_copy: Option<InitialCopy>,
    #[serde(default, deserialize_with = "text")]
    bandwidth: Option<Limit>,
    #[serde(default)]
    bandwidth_windows: Vec<WindowTable>,
}

/// Reads the configuration at `path`.
pub fn read(path: &Path) -> Result<HostConfig, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    parse(&text, path)
}

/// Parses what the file at `path` holds.
fn parse(text: &str, path: &Path) -> Result<HostConfig, ConfigError> {
    let table: HostTable = toml::from_str(text).map_err(|source| ConfigError::Toml {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    let from = path.parent().unwrap_or_else(|| Path::new("."));
    table.config(from).map_err(|(key, why)| ConfigError::Value {
        path: path.to_owned(),
        key,
        why,
    })
}

/// The key of a value that makes no sense, and why it does not.
pub(super) type Wrong = (String, String);

impl HostTable {
    /// What it means, with paths below `from`.
    fn config(self, from: &Path) -> Result<HostConfig, Wrong> {
        let linked = self.listen.is_some() || !self.peers.is_empty() || !self.operators.is_empty();
        if self.identity.is_none() && linked {
            let why = "needed to listen and to call peers: there is no link without certificates";
            return Err(("identity".into(), why.into()));
        }
        if self.crl.is_some() && self.identity.is_none() && self.coordinator.is_none() {
            let why = "without an identity nobody is let in or called";
            return Err(("crl".into(), why.into()));
        }
        let both = |operator: &&Name| {
            let mut peers = self.peers.keys();
            peers.any(|peer| peer.as_str().eq_ignore_ascii_case(operator.as_str()))
        };
        if let Some(operator) = self.operators.iter().find(both) {
            let why = format!(
                "{operator} is a peer: whoever operates this host has an identity of its own, which replicates nothing"
            );
            return Err(("operators".into(), why));
        }
        let replicating = Replicating {
            interval: self.interval,
            compression: self.compression,
            sync_on_flush: self.sync_on_flush,
            initial_copy: self.initial_copy,
        };
        let (keeping, kept) = self.replicas.config(from)?;
        let policies = Policies::new(replicating, keeping.clone(), self.groups)?;
        let peers = self.peers.into_iter();
        let peers = peers
            .map(|(name, peer)| {
                let within = |(key, why): Wrong| (format!("peers.{name}.{key}"), why);
                let peer = peer.config(from, &policies).map_err(within)?;
                Ok((name, peer))
            })
            .collect::<Result<BTreeMap<_, _>, Wrong>>()?;
        let (mut machines, mut replications) = (BTreeMap::new(), BTreeMap::new());
        for (name, machine) in self.machines {
            let within = |(key, why): Wrong| (format!("machines.{name}.{key}"), why);
            if let Some(peer) = machine
                .peer
                .as_ref()
                .filter(|peer| !peers.contains_key(*peer))
            {
                let why = format!("there is no [peers.{peer}]");
                return Err(within(("peer".into(), why)));
            }
            let machine = machine.config(from, &policies).map_err(within)?;
            replications.insert(name.clone(), machine.replication.clone());
            machines.insert(name, machine);
        }
        let coordinator = self.coordinator.map(|table| table.config(from));
        Ok(HostConfig {
            store: from.join(self.store),
            identity: self.identity.map(|identity| from.join(identity)),
            crl: self.crl.map(|crl| from.join(crl)),
            keys: keys(self.keys)?,
            listen: self.listen,
            peers,
            operators: self.operators,
            coordinator: coordinator.transpose()?,
            bandwidth: bandwidth(self.bandwidth, self.bandwidth_windows)?,
            kept: policies.kept(kept, &replications)?,
            replication: policies.default(),
            groups: policies.bandwidths,
            keeping,
            tolerant: true,
            mounter: mounter(self.mount_helper, from),
            machines,
        })
    }
}

/// Who mounts: the helper that listens on this socket, or this process.
fn mounter(socket: Option<PathBuf>, from: &Path) -> Mounter {
    socket.map_or(Mounter::Itself, |socket| {
        Mounter::Helper(Arc::new(helper::Client::new(from.join(socket))))
    })
}

/// Reads `[keys]`.
fn keys(table: BTreeMap<Name, Vec<String>>) -> Result<BTreeMap<Name, Vec<Digest>>, Wrong> {
    let key = |name: &Name, text: String| {
        let wrong =
            || format!("{text:?} is not the SHA-256 of a public key: 64 hexadecimal digits");
        text.parse().map_err(|_| (format!("keys.{name}"), wrong()))
    };
    let named = table.into_iter().map(|(name, texts)| {
        if texts.is_empty() {
            return Err((format!("keys.{name}"), "no key would be let in".into()));
        }
        let keys: Result<Vec<_>, Wrong> = texts.into_iter().map(|text| key(&name, text)).collect();
        Ok((name, keys?))
    });
    named.collect()
}

impl CoordinatorTable {
    fn config(self, from: &Path) -> Result<CoordinatorConfig, Wrong> {
        for (name, address) in &self.hosts {
            net::host_of(address)
                .map_err(|error| (format!("coordinator.hosts.{name}"), error.to_string()))?;
        }
        Ok(CoordinatorConfig {
            identity: from.join(self.identity),
            hosts: self.hosts,
        })
    }
}

impl PeerTable {
    fn config(self, from: &Path, policies: &Policies) -> Result<PeerConfig, Wrong> {
        if let Some(address) = &self.address {
            net::host_of(address).map_err(|error| ("address".into(), error.to_string()))?;
        }
        Ok(PeerConfig {
            address: self.address,
            machines: self.machines,
            store: self.store.map(|store| from.join(store)),
            quota: self.quota,
            rate: self.rate.unwrap_or_default(),
            kept: self.group.map(|group| policies.group(group)).transpose()?,
        })
    }
}

impl ReplicasTable {
    /// How replicas are kept, and which of them differently.
    fn config(self, from: &Path) -> Result<(Keeping, BTreeMap<Name, KeptTable>), Wrong> {
        let retaining = Retaining {
            keep: self.keep,
            hourly: self.hourly,
            space_max: self.space_max,
        };
        let keeping = Keeping {
            format: self.format,
            seed: self.seed,
            tests: self.tests.map(|tests| from.join(tests)),
            ..Keeping::default()
        };
        let keeping = retaining.over(&keeping);
        let keeping = keeping.map_err(|(key, why)| (format!("replicas.{key}"), why))?;
        Ok((keeping, self.machines))
    }
}

impl MachineTable {
    fn config(self, from: &Path, policies: &Policies) -> Result<MachineConfig, Wrong> {
        let threads = self.threads.unwrap_or(THREADS_DEFAULT);
        if !(1..=THREADS_MAX).contains(&threads) {
            let why = format!("{threads} is not between 1 and {THREADS_MAX}");
            return Err(("threads".into(), why));
        }
        if self.images.is_empty() {
            return Err(("images".into(), "a machine has at least one disk".into()));
        }
        if self.sync_on_flush.is_some() && self.peer.is_none() {
            let why = "there is no replica to be in sync with: name the peer";
            return Err(("sync-on-flush".into(), why.into()));
        }
        if self.initial_copy.is_some() && self.peer.is_none() {
            let why = "there is nobody to copy it to: name the peer";
            return Err(("initial-copy".into(), why.into()));
        }
        let replicating = Replicating {
            interval: self.interval,
            compression: self.compression,
            sync_on_flush: self.sync_on_flush,
            initial_copy: self.initial_copy,
        };
        let bandwidth = bandwidth(self.bandwidth, self.bandwidth_windows)?;
        let replication: ReplicationConfig = policies.of(self.group, replicating, bandwidth)?;
        let parents = self.parents.map(|parents| from.join(parents));
        let image = |image: PathBuf| {
            let config = ImageConfig::new(from.join(image), self.format)?;
            Ok(config.with_parents(parents.clone()))
        };
        let images: Result<Vec<_>, ImageError> = self.images.into_iter().map(image).collect();
        let images = images.map_err(|error| ("images".into(), error.to_string()))?;
        Ok(MachineConfig {
            images,
            show: ShowConfig {
                visibility: if self.all_users {
                    Visibility::AllUsers
                } else {
                    Visibility::Owner
                },
                owner: self.owner,
                threads,
                ..ShowConfig::new(from.join(self.at))
            },
            peer: self.peer,
            replication,
        })
    }
}

pub(super) fn text<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: FromStr<Err: std::fmt::Display>,
{
    by(deserializer, |text| {
        text.parse().map_err(|error: T::Err| error.to_string())
    })
}

pub(super) fn required<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: FromStr<Err: std::fmt::Display>,
{
    let value = text(deserializer)?;
    Ok(value.expect("a text that was read is there"))
}

pub(super) fn interval<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Duration>, D::Error> {
    by(deserializer, parse_interval)
}

pub(super) fn size<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<u64>, D::Error> {
    by(deserializer, parse_size)
}

fn by<'de, D: serde::Deserializer<'de>, T>(
    deserializer: D,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Result<Option<T>, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse(&text).map(Some).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replica::Retention;

    const FULL: &str = r#"
        store = "store"
        identity = "/etc/understudy/a"
        listen = "0.0.0.0:7171"
        interval = "500ms"
        operators = ["coord"]
        [peers.b]
        address = "b.example:7171"
        [peers.c]
        [coordinator]
        identity = "coord"
        [coordinator.hosts]
        b = "b.example:7171"
        [replicas]
        keep = 24
        hourly = 12
        space-max = "2G"
        [machines.web]
        images = ["os.vhdx", "/vm/data.raw"]
        at = "/mnt/web"
        peer = "b"
        owner = "107:36"
        compression = "lz4"
        sync-on-flush = "available"
    "#;

    fn parsed(text: &str) -> Result<HostConfig, String> {
        parse(text, Path::new("/etc/understudy/host.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn a_host_is_as_its_file_says() {
        let host = parsed(FULL).unwrap();
        assert_eq!(host.store, Path::new("/etc/understudy/store"));
        let web = &host.machines[&Name::new("web").unwrap()];
        assert_eq!(web.images[0].path, Path::new("/etc/understudy/os.vhdx"));
        assert_eq!(web.images[1].format, Format::Raw);
        assert_eq!(web.replication.interval, Duration::from_millis(500));
        assert_eq!(web.replication.compression, Setting::Lz4);
        assert_eq!(web.replication.sync_on_flush, Some(SyncOnFlush::Available));
        assert_eq!(host.replication.sync_on_flush, None);
        let owner = web.show.owner.unwrap();
        assert_eq!((owner.user, owner.group), (107, 36));
        assert_eq!(host.keeping.retention.newest, 24);
        assert_eq!(host.keeping.space_max, Some(2 << 30));
        let c = &host.peers[&Name::new("c").unwrap()];
        assert_eq!(c.address, None);
        let coordinator = host.coordinator.unwrap();
        assert_eq!(coordinator.identity, Path::new("/etc/understudy/coord"));
        assert_eq!(coordinator.hosts.len(), 1);
        assert_eq!(host.operators, [Name::new("coord").unwrap()].into());
    }

    const GROUPS: &str = r#"
        store = "store"
        identity = "a"
        interval = "2s"
        bandwidth = "50M"
        [groups.gold]
        interval = "500ms"
        sync-on-flush = "strict"
        initial-copy = "22:00"
        bandwidth = "20M"
        bandwidth-windows = [
            { from = "08:00", to = "18:00", days = "mon-fri", limit = "5M" },
            { from = "22:00", to = "06:00", limit = "none" },
        ]
        keep = 7
        space-max = "1G"
        [groups.slow]
        compression = "none"
        [peers.b]
        [replicas]
        keep = 3
        hourly = 2
        format = "raw"
        [replicas.machines.mail]
        group = "gold"
        hourly = 24
        [replicas.machines.web]
        keep = 9
        [machines.web]
        images = ["web.raw"]
        at = "web"
        peer = "b"
        group = "gold"
        interval = "100ms"
        initial-copy = "portable"
        bandwidth = "1M"
        [machines.db]
        images = ["db.raw"]
        at = "db"
        peer = "b"
        group = "slow"
        [machines.lone]
        images = ["lone.raw"]
        at = "lone"
    "#;

    #[test]
    fn machines_inherit_from_their_group_and_it_from_the_host() {
        let host = parsed(GROUPS).unwrap();
        let name = |text: &str| Name::new(text).unwrap();
        let millis = |text: &str| host.replication_of(&name(text), None).interval.as_millis();
        assert_eq!(millis("web"), 100, "its own");
        assert_eq!(millis("mail"), 500, "its group's, once it came to here");
        assert_eq!(millis("db"), 2000, "the host's, through a silent group");
        assert_eq!(millis("lone"), 2000);
        assert_eq!(millis("stranger"), 2000);
        let sync = |text: &str| host.replication_of(&name(text), None).sync_on_flush;
        assert_eq!(sync("web"), Some(SyncOnFlush::Strict));
        assert_eq!(sync("db"), None);
        let kept = |text: &str| {
            let keeping = host.keeping_of(&name(text), None);
            let Retention { newest, hourly } = keeping.retention;
            assert_eq!(keeping.format, Some(Format::Raw));
            (newest, hourly, keeping.space_max)
        };
        assert_eq!(kept("mail"), (7, 24, Some(1 << 30)));
        assert_eq!(kept("web"), (9, 2, Some(1 << 30)));
        assert_eq!(kept("stranger"), (3, 2, None));
        assert_eq!(
            host.describe(),
            [
                "host: 50.0 MiB/s",
                "group gold: together 20.0 MiB/s; 5.00 MiB/s from 08:00 to 18:00 UTC, mon,tue,wed,thu,fri; \
                 no limit from 22:00 to 06:00 UTC, every day",
                "group slow: together no limit",
                "machine db: replicates to b every 2s, compression none, no limit (group slow)",
                "machine lone: not replicated",
                "machine web: replicates to b every 100ms, compression auto, sync-on-flush strict, initial copy by portable disk, 1.00 MiB/s \
                 (group gold)",
                "replicas: the latest point, the 3 newest beside it, 2 hourly ones, as raw",
                "replica of db: the latest point, the 3 newest beside it, 2 hourly ones, as raw",
                "replica of mail: the latest point, the 7 newest beside it, 24 hourly ones, in 1.00 GiB at most, as raw; \
                 after a failover to here it replicates every 500ms, compression auto, sync-on-flush strict, \
                 initial copy at 22:00 (UTC), no limit (group gold)",
                "replica of web: the latest point, the 9 newest beside it, 2 hourly ones, in 1.00 GiB at most, as raw",
            ]
        );
    }

    #[test]
    fn a_peer_may_what_its_entry_says() {
        let key = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
        let more = format!(
            "[peers.b]\nmachines = [\"mail\"]\nstore = \"b\"\nquota = \"2G\"\nrate = \"1M\"\ngroup = \"gold\"\n\
             [keys]\nb = [\"{key}\"]"
        );
        let host = parsed(&GROUPS.replacen("[peers.b]", &more, 1)).unwrap();
        let name = |text: &str| Name::new(text).unwrap();
        let b = host.peer(&name("B")).unwrap();
        assert_eq!(b.machines, Some([name("mail")].into()));
        assert_eq!(b.store.as_deref(), Some(Path::new("/etc/understudy/b")));
        assert_eq!((b.quota, b.rate), (Some(2 << 30), Limit(Some(1 << 20))));
        assert_eq!(host.keys[&name("b")][0].to_string(), key);
        let newest = |machine: &str| {
            let keeping = host.keeping_of(&name(machine), Some(&name("b")));
            keeping.retention.newest
        };
        assert_eq!(newest("stranger"), 7, "its peer's group");
        assert_eq!(newest("web"), 9, "its own");
        let replication = host.replication_of(&name("stranger"), Some(&name("b")));
        assert_eq!(replication.sync_on_flush, Some(SyncOnFlush::Strict));
        for (was, is, said) in [
            ("\"2G\"", "\"much\"", "quota"),
            ("\"1M\"", "\"1K\"", "is not between"),
            (
                "group = \"gold\"\n[keys]",
                "group = \"tin\"\n[keys]",
                "peers.b.group",
            ),
            (key, "9f86", "keys.b"),
            ("[\"9f", "[] #", "keys.b"),
        ] {
            let text = GROUPS.replacen("[peers.b]", &more.replacen(was, is, 1), 1);
            let why = parsed(&text).map(|_| ()).unwrap_err();
            assert!(why.contains(said), "{is}: {why}");
        }
    }

    #[test]
    fn policies_that_make_no_sense_are_named() {
        for (was, is, said) in [
            (
                "group = \"slow\"",
                "group = \"silver\"",
                "machines.db.group: there is no [groups.silver]",
            ),
            (
                "[groups.slow]",
                "[groups.slow]\nretention = 3",
                "unknown field `retention`",
            ),
            ("\"50M\"", "\"50MB/s\"", "bytes per second"),
            ("\"50M\"", "\"1K\"", "is not between 64.0 KiB/s"),
            ("\"18:00\"", "\"08:00\"", "groups.gold.bandwidth-windows"),
            ("mon-fri", "weekdays", "is not a day"),
            ("keep = 7", "keep = 70000", "groups.gold.keep"),
            ("keep = 9", "keep = 70000", "replicas.machines.web.keep"),
            ("keep = 9", "group = \"slow\"", "a machine has one group"),
            ("\"portable\"", "\"ten\"", "neither now, nor portable"),
            ("hourly = 24", "houry = 24", "unknown field `houry`"),
        ] {
            let text = GROUPS.replacen(was, is, 1);
            assert_ne!(text, GROUPS, "{was}");
            let why = parsed(&text).map(|_| ()).unwrap_err();
            assert!(why.contains(said), "{is}: {why}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (was, is, said) in [
            ("listen", "lisen", "unknown field `lisen`"),
            ("identity = \"/etc/understudy/a\"", "", "identity: needed"),
            ("peer = \"b\"", "peer = \"x\"", "no [peers.x]"),
            (
                "address = \"b.example:7171\"",
                "address = \"b\"",
                "peers.b.address",
            ),
            ("b = \"b.example:7171\"", "b = \"b\"", "coordinator.hosts.b"),
            ("identity = \"coord\"", "", "missing field `identity`"),
            ("\"coord\"", "\"B\"", "operators: B is a peer"),
            ("500ms", "5 parsecs", "has no unit"),
            ("keep = 24", "keep = 4000000000", "replicas.keep"),
            ("os.vhdx", "os", "machines.web.images"),
            (
                "\"available\"",
                "\"always\"",
                "expected `strict` or `available`",
            ),
            ("peer = \"b\"", "", "web.sync-on-flush: there is no replica"),
            (
                "[machines.web]",
                "[machines.\"../web\"]",
                "must not contain",
            ),
        ] {
            let text = FULL.replace(was, is);
            assert_ne!(text, FULL);
            let why = parsed(&text).map(|_| ()).unwrap_err();
            assert!(why.contains(said), "{is}: {why}");
        }
    }
}
