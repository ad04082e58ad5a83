//! Policies in the configuration: what a group says, what its machines inherit, and what each of them ends up with.
//!
//! ```text
//!   top level  ──>  [groups.gold]  ──>  [machines.web]  group = "gold"            how it is replicated
//!   [replicas] ──>  [groups.gold]  ──>  [replicas.machines.web]  group = "gold"   how its replica is kept here
//! ```
//! Of each setting the last one that is there counts. Bandwidth is not inherited: each level is a limit of its own, for all
//! machines below it together, and a machine keeps to all of them.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc, time::Duration};

use serde::Deserialize;

use super::{
    config::{HostConfig, KeptConfig, ReplicationConfig},
    file::{Wrong, interval, required, size, text},
};
use crate::{
    base::{
        clock::Clock,
        ids::Name,
        limits::{KEEP_HOURS_MAX, KEEP_NEWEST_MAX},
        units::Bytes,
    },
    delta::policy::Setting,
    disk::image::Format,
    node::{
        initial_copy::InitialCopy,
        pacing::{Limiter, Pacing},
        policy::{Bandwidth, Days, Limit, TimeOfDay, Window, interval_text},
        served::Keeping,
        sync_flush::SyncOnFlush,
    },
    replica::Retention,
};

/// Windows of one limit, at most: two for every hour of a week.
const WINDOWS_MAX: usize = 336;

/// `[groups.NAME]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct GroupTable {
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
    keep: Option<u32>,
    hourly: Option<u32>,
    #[serde(default, deserialize_with = "size")]
    space_max: Option<u64>,
}

/// `[replicas.machines.NAME]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct KeptTable {
    group: Option<Name>,
    #[serde(default, deserialize_with = "text")]
    format: Option<Format>,
    keep: Option<u32>,
    hourly: Option<u32>,
    #[serde(default, deserialize_with = "size")]
    space_max: Option<u64>,
}

/// One of `bandwidth-windows`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WindowTable {
    #[serde(deserialize_with = "required")]
    from: TimeOfDay,
    #[serde(deserialize_with = "required")]
    to: TimeOfDay,
    #[serde(default, deserialize_with = "text")]
    days: Option<Days>,
    #[serde(deserialize_with = "required")]
    limit: Limit,
}

/// What is inherited of how a machine is replicated.
#[derive(Clone, Debug, Default)]
pub(super) struct Replicating {
    pub(super) interval: Option<Duration>,
    pub(super) compression: Option<Setting>,
    pub(super) sync_on_flush: Option<SyncOnFlush>,
    pub(super) initial_copy: Option<InitialCopy>,
}

impl Replicating {
    /// What is said here, and what `above` says of the rest.
    fn or(self, above: &Self) -> Self {
        Self {
            interval: self.interval.or(above.interval),
            compression: self.compression.or(above.compression),
            sync_on_flush: self.sync_on_flush.or(above.sync_on_flush),
            initial_copy: self.initial_copy.or(above.initial_copy),
        }
    }

    fn config(self, group: Option<Name>, bandwidth: Bandwidth) -> ReplicationConfig {
        let default = ReplicationConfig::default();
        ReplicationConfig {
            group,
            interval: self.interval.unwrap_or(default.interval),
            compression: self.compression.unwrap_or(default.compression),
            sync_on_flush: self.sync_on_flush,
            initial_copy: self.initial_copy.unwrap_or(default.initial_copy),
            bandwidth,
        }
    }
}

/// Which points of a replica are kept, as far as it is said.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Retaining {
    pub(super) keep: Option<u32>,
    pub(super) hourly: Option<u32>,
    pub(super) space_max: Option<u64>,
}

impl Retaining {
    /// `above`, with what is said here in its place.
    pub(super) fn over(self, above: &Keeping) -> Result<Keeping, Wrong> {
        for (key, value, most) in [
            ("keep", self.keep, KEEP_NEWEST_MAX),
            ("hourly", self.hourly, KEEP_HOURS_MAX),
        ] {
            if let Some(value) = value.filter(|value| *value > most) {
                return Err((key.into(), format!("{value} is more than {most}")));
            }
        }
        Ok(Keeping {
            retention: Retention {
                newest: self.keep.unwrap_or(above.retention.newest),
                hourly: self.hourly.unwrap_or(above.retention.hourly),
            },
            space_max: self.space_max.or(above.space_max),
            ..above.clone()
        })
    }
}

/// What is said at the top level and for groups.
#[derive(Debug)]
pub(super) struct Policies {
    host: Replicating,
    keeping: Keeping,
    groups: BTreeMap<Name, (Replicating, Keeping)>,
    /// What each group may send.
    pub(super) bandwidths: BTreeMap<Name, Bandwidth>,
}

impl Policies {
    pub(super) fn new(
        host: Replicating,
        keeping: Keeping,
        tables: BTreeMap<Name, GroupTable>,
    ) -> Result<Self, Wrong> {
        let (mut groups, mut bandwidths) = (BTreeMap::new(), BTreeMap::new());
        for (name, table) in tables {
            let within = |(key, why): Wrong| (format!("groups.{name}.{key}"), why);
            let retaining = Retaining {
                keep: table.keep,
                hourly: table.hourly,
                space_max: table.space_max,
            };
            let kept = retaining.over(&keeping).map_err(within)?;
            let limit = bandwidth(table.bandwidth, table.bandwidth_windows).map_err(within)?;
            let replicating = Replicating {
                interval: table.interval,
                compression: table.compression,
                sync_on_flush: table.sync_on_flush,
                initial_copy: table.initial_copy,
            };
            groups.insert(name.clone(), (replicating.or(&host), kept));
            bandwidths.insert(name, limit);
        }
        Ok(Self {
            host,
            keeping,
            groups,
            bandwidths,
        })
    }

    /// How machines replicate of which nothing else is said.
    pub(super) fn default(&self) -> ReplicationConfig {
        self.host.clone().config(None, Bandwidth::default())
    }

    /// How a machine replicates that says this of itself.
    pub(super) fn of(
        &self,
        group: Option<Name>,
        own: Replicating,
        bandwidth: Bandwidth,
    ) -> Result<ReplicationConfig, Wrong> {
        let (above, _) = self.above(group.as_ref())?;
        Ok(own.or(above).config(group, bandwidth))
    }

    /// What the machines of a peer inherit that belongs to a group.
    pub(super) fn group(&self, group: Name) -> Result<KeptConfig, Wrong> {
        let (_, keeping) = self.above(Some(&group))?;
        let keeping = keeping.clone();
        let replication = self.of(Some(group), Replicating::default(), Bandwidth::default())?;
        Ok(KeptConfig {
            keeping,
            replication,
        })
    }

    /// How the replicas of machines are kept that are named, or that belong to a group. `machines` replicate from here.
    pub(super) fn kept(
        &self,
        tables: BTreeMap<Name, KeptTable>,
        machines: &BTreeMap<Name, ReplicationConfig>,
    ) -> Result<BTreeMap<Name, KeptConfig>, Wrong> {
        let mut kept = BTreeMap::new();
        for (name, replication) in machines {
            if replication.group.is_none() {
                continue;
            }
            let (_, keeping) = self.above(replication.group.as_ref())?;
            let (keeping, replication) = (keeping.clone(), replication.clone());
            let config = KeptConfig {
                keeping,
                replication,
            };
            kept.insert(name.clone(), config);
        }
        for (name, table) in tables {
            let within = |(key, why): Wrong| (format!("replicas.machines.{name}.{key}"), why);
            let replication = match (machines.get(&name), table.group) {
                (None, group) => self
                    .of(group, Replicating::default(), Bandwidth::default())
                    .map_err(within)?,
                (Some(known), None) => known.clone(),
                (Some(_), Some(_)) => {
                    let why = format!("a machine has one group: say it in [machines.{name}]");
                    return Err(within(("group".into(), why)));
                }
            };
            let retaining = Retaining {
                keep: table.keep,
                hourly: table.hourly,
                space_max: table.space_max,
            };
            let (_, above) = self.above(replication.group.as_ref()).map_err(within)?;
            let mut keeping = retaining.over(above).map_err(within)?;
            keeping.format = table.format.or(keeping.format);
            let config = KeptConfig {
                keeping,
                replication,
            };
            kept.insert(name, config);
        }
        Ok(kept)
    }

    /// What a machine of this group inherits.
    fn above(&self, group: Option<&Name>) -> Result<(&Replicating, &Keeping), Wrong> {
        let Some(name) = group else {
            return Ok((&self.host, &self.keeping));
        };
        let found = self.groups.get(name);
        let found = found.map(|(replicating, keeping)| (replicating, keeping));
        found.ok_or_else(|| ("group".into(), format!("there is no [groups.{name}]")))
    }
}

/// `bandwidth` and `bandwidth-windows` of one level.
pub(super) fn bandwidth(
    limit: Option<Limit>,
    windows: Vec<WindowTable>,
) -> Result<Bandwidth, Wrong> {
    let key = || "bandwidth-windows".to_owned();
    if windows.len() > WINDOWS_MAX {
        let why = format!("{} windows are more than {WINDOWS_MAX}", windows.len());
        return Err((key(), why));
    }
    let window = |table: WindowTable| {
        let days = table.days.unwrap_or(Days::ALL);
        Window::new(table.from, table.to, days, table.limit)
    };
    let windows: Result<Vec<_>, String> = windows.into_iter().map(window).collect();
    Ok(Bandwidth {
        limit: limit.unwrap_or_default(),
        windows: windows.map_err(|why| (key(), why))?,
    })
}

/// The limits that machines share.
#[derive(Debug)]
pub(super) struct Limiters {
    host: Arc<Limiter>,
    groups: BTreeMap<Name, Arc<Limiter>>,
}

impl Limiters {
    pub(super) fn of(config: &HostConfig) -> Self {
        let limiter = |bandwidth: &Bandwidth| Arc::new(Limiter::new(bandwidth.clone()));
        let groups = config.groups.iter();
        Self {
            host: limiter(&config.bandwidth),
            groups: groups
                .map(|(name, bandwidth)| (name.clone(), limiter(bandwidth)))
                .collect(),
        }
    }

    /// What a machine that is replicated like this keeps to.
    pub(super) fn pacing(&self, config: &ReplicationConfig, clock: &Arc<dyn Clock>) -> Pacing {
        let group = config.group.as_ref().and_then(|name| self.groups.get(name));
        let own = Arc::new(Limiter::new(config.bandwidth.clone()));
        let shared = std::iter::once(&self.host).chain(group).map(Arc::clone);
        Pacing::new(shared.chain([own]).collect(), Arc::clone(clock))
    }
}

impl HostConfig {
    /// What every machine ends up with, a line each.
    pub fn describe(&self) -> Vec<String> {
        let mut lines = vec![format!("host: {}", self.bandwidth)];
        let groups = self.groups.iter();
        lines.extend(groups.map(|(name, limit)| format!("group {name}: together {limit}")));
        for (name, machine) in &self.machines {
            let line = match &machine.peer {
                Some(peer) => {
                    let how = replicates(&machine.replication);
                    format!("machine {name}: replicates to {peer} {how}")
                }
                None => format!("machine {name}: not replicated"),
            };
            lines.push(line);
        }
        lines.push(format!("replicas: {}", keeps(&self.keeping)));
        for (name, kept) in &self.kept {
            let mut line = format!("replica of {name}: {}", keeps(&kept.keeping));
            if !self.machines.contains_key(name) {
                let how = replicates(&kept.replication);
                let _ = write!(line, "; after a failover to here it replicates {how}");
            }
            lines.push(line);
        }
        lines
    }
}

fn replicates(config: &ReplicationConfig) -> String {
    let mut text = format!(
        "every {}, compression {}",
        interval_text(config.interval),
        config.compression
    );
    if let Some(policy) = config.sync_on_flush {
        let _ = write!(text, ", sync-on-flush {policy}");
    }
    match config.initial_copy {
        InitialCopy::Now => {}
        InitialCopy::Portable => text.push_str(", initial copy by portable disk"),
        time => {
            let _ = write!(text, ", initial copy at {time} (UTC)");
        }
    }
    let _ = write!(text, ", {}", config.bandwidth);
    if let Some(group) = &config.group {
        let _ = write!(text, " (group {group})");
    }
    text
}

fn keeps(keeping: &Keeping) -> String {
    let Retention { newest, hourly } = keeping.retention;
    let mut text = format!("the latest point, the {newest} newest beside it, {hourly} hourly ones");
    if let Some(most) = keeping.space_max {
        let _ = write!(text, ", in {} at most", Bytes(most));
    }
    if let Some(format) = keeping.format {
        let _ = write!(text, ", as {format}");
    }
    text
}
