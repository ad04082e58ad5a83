//! A host's configuration as a TOML file, for `understudy serve`.
//!
//! ```toml
//! store    = "/var/lib/understudy"      # records, tracking, replicas
//! identity = "/etc/understudy/host-a"   # this host's certificate and key
//! listen   = "0.0.0.0:7171"
//!
//! [peers.host-b]                        # the only hosts that are let in
//! address = "host-b.example:7171"       # where it listens, to replicate to it
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
//! [machines.web]                        # a machine whose images lie here
//! images   = ["/vm/web-os.vhdx", "/vm/web-data.vhdx"]
//! at       = "/mnt/web"
//! peer     = "host-b"
//! interval = "1s"
//! sync-on-flush = "strict"              # or "available"; without it no flush waits for the replica
//! ```
//! Relative paths are relative to the file. An unknown key is an error: a setting that is not obeyed must not look as if
//! it were.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use serde::Deserialize;

use super::{
    CoordinatorConfig, HostConfig, Keeping, MachineConfig, PeerConfig, ReplicationConfig,
    parse_interval,
};
use crate::{
    base::{
        ids::Name,
        limits::{KEEP_HOURS_MAX, KEEP_NEWEST_MAX},
        units::parse_size,
    },
    delta::policy::Setting,
    disk::image::Format,
    net,
    node::{
        images::{ImageConfig, ImageError},
        primary::ShowConfig,
        sync_flush::SyncOnFlush,
    },
    replica::Retention,
    shim::{Owner, THREADS_DEFAULT, Visibility},
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
    listen: Option<SocketAddr>,
    #[serde(default, deserialize_with = "interval")]
    interval: Option<Duration>,
    #[serde(default, deserialize_with = "text")]
    compression: Option<Setting>,
    sync_on_flush: Option<SyncOnFlush>,
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
    #[serde(default)]
    keep: u32,
    #[serde(default)]
    hourly: u32,
    #[serde(default, deserialize_with = "size")]
    space_max: Option<u64>,
    #[serde(default)]
    seed: bool,
    tests: Option<PathBuf>,
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
    #[serde(default, deserialize_with = "interval")]
    interval: Option<Duration>,
    #[serde(default, deserialize_with = "text")]
    compression: Option<Setting>,
    sync_on_flush: Option<SyncOnFlush>,
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
type Wrong = (String, String);

impl HostTable {
    /// What it means, with paths below `from`.
    fn config(self, from: &Path) -> Result<HostConfig, Wrong> {
        let linked = self.listen.is_some() || !self.peers.is_empty() || !self.operators.is_empty();
        if self.identity.is_none() && linked {
            let why = "needed to listen and to call peers: there is no link without certificates";
            return Err(("identity".into(), why.into()));
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
        let replication = ReplicationConfig {
            interval: self
                .interval
                .unwrap_or_else(|| ReplicationConfig::default().interval),
            compression: self.compression.unwrap_or(Setting::Auto),
            sync_on_flush: self.sync_on_flush,
        };
        let peers = self.peers.into_iter();
        let peers = peers
            .map(|(name, peer)| Ok((name.clone(), peer.config(&name)?)))
            .collect::<Result<BTreeMap<_, _>, Wrong>>()?;
        let mut machines = BTreeMap::new();
        for (name, machine) in self.machines {
            if let Some(peer) = machine
                .peer
                .as_ref()
                .filter(|peer| !peers.contains_key(*peer))
            {
                let why = format!("there is no [peers.{peer}]");
                return Err((format!("machines.{name}.peer"), why));
            }
            let machine = machine.config(from, replication);
            let machine = machine.map_err(|(key, why)| (format!("machines.{name}.{key}"), why))?;
            machines.insert(name, machine);
        }
        Ok(HostConfig {
            store: from.join(self.store),
            identity: self.identity.map(|identity| from.join(identity)),
            listen: self.listen,
            peers,
            operators: self.operators,
            coordinator: self
                .coordinator
                .map(|coordinator| coordinator.config(from))
                .transpose()?,
            keeping: self.replicas.config(from)?,
            replication,
            tolerant: true,
            machines,
        })
    }
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
    fn config(self, name: &Name) -> Result<PeerConfig, Wrong> {
        if let Some(address) = &self.address {
            net::host_of(address)
                .map_err(|error| (format!("peers.{name}.address"), error.to_string()))?;
        }
        Ok(PeerConfig {
            address: self.address,
        })
    }
}

impl ReplicasTable {
    fn config(self, from: &Path) -> Result<Keeping, Wrong> {
        for (key, value, most) in [
            ("keep", self.keep, KEEP_NEWEST_MAX),
            ("hourly", self.hourly, KEEP_HOURS_MAX),
        ] {
            if value > most {
                return Err((
                    format!("replicas.{key}"),
                    format!("{value} is more than {most}"),
                ));
            }
        }
        Ok(Keeping {
            format: self.format,
            retention: Retention {
                newest: self.keep,
                hourly: self.hourly,
            },
            space_max: self.space_max,
            seed: self.seed,
            tests: self.tests.map(|tests| from.join(tests)),
        })
    }
}

impl MachineTable {
    fn config(self, from: &Path, host: ReplicationConfig) -> Result<MachineConfig, Wrong> {
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
            replication: ReplicationConfig {
                interval: self.interval.unwrap_or(host.interval),
                compression: self.compression.unwrap_or(host.compression),
                sync_on_flush: self.sync_on_flush.or(host.sync_on_flush),
            },
        })
    }
}

fn text<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: FromStr<Err: std::fmt::Display>,
{
    by(deserializer, |text| {
        text.parse().map_err(|error: T::Err| error.to_string())
    })
}

fn interval<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Duration>, D::Error> {
    by(deserializer, parse_interval)
}

fn size<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
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
