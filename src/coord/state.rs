//! Role, replication state and health: what `status` shows.
//!
//! The state names are those of Hyper-V Replica's PowerShell `VMReplicationState`, so that people and their monitoring
//! find the words they know. They are stable: a name is never reused for another meaning.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// The part a host plays for a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Its disks are written here.
    Primary,
    /// It is kept up to date here.
    Replica,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Primary => "primary",
            Self::Replica => "replica",
        })
    }
}

/// Where a machine's replication stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplicationState {
    /// No replica is configured.
    Disabled,
    /// Primary: a replica is configured, and the initial copy has not begun.
    ReadyForInitialReplication,
    /// Both: the initial copy is running.
    InitialReplicationInProgress,
    /// Replica: prepared, nothing received yet.
    WaitingForInitialReplication,
    /// Both: changes flow.
    Replicating,
    /// Primary: the machine was replicated and its replica cannot be reached, or an operator suspended it; changes are only
    /// tracked. Replica: the primary said that it is suspended, or a failover was cancelled.
    Suspended,
    /// Both: stopped for a reason that does not mend itself.
    Error,
    /// Primary: the replica has to be brought back in step by comparing.
    Resynchronizing,
    /// Stepped down in a planned failover; the other host has not taken over yet.
    PreparedForFailover,
    /// Failed over, and neither committed nor cancelled yet.
    FailedOverWaitingCompletion,
    /// Failed over and committed, and nothing replicates it.
    FailedOver,
    /// Was the primary, and waits for the new one to bring it back in step.
    WaitingForStartResynchronize,
}

impl fmt::Display for ReplicationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Disabled => "Disabled",
            Self::ReadyForInitialReplication => "ReadyForInitialReplication",
            Self::InitialReplicationInProgress => "InitialReplicationInProgress",
            Self::WaitingForInitialReplication => "WaitingForInitialReplication",
            Self::Replicating => "Replicating",
            Self::Suspended => "Suspended",
            Self::Error => "Error",
            Self::Resynchronizing => "Resynchronizing",
            Self::PreparedForFailover => "PreparedForFailover",
            Self::FailedOverWaitingCompletion => "FailedOverWaitingCompletion",
            Self::FailedOver => "FailedOver",
            Self::WaitingForStartResynchronize => "WaitingForStartResynchronize",
        })
    }
}

/// How a machine fares, worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Health {
    /// No replication is configured.
    NotApplicable,
    /// As promised.
    Normal,
    /// Working, and the promise is in danger.
    Warning,
    /// Not protected any further until somebody acts.
    Critical,
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::NotApplicable => "NotApplicable",
            Self::Normal => "Normal",
            Self::Warning => "Warning",
            Self::Critical => "Critical",
        })
    }
}

/// What health is judged by.
#[derive(Clone, Debug)]
pub struct Signs {
    /// The machine's state.
    pub state: ReplicationState,
    /// Why it stopped, if it did.
    pub stopped: Option<String>,
    /// Why a disk refuses work, if one does.
    pub disk: Option<String>,
    /// Why fewer recovery points are there than were asked for, if that is so.
    pub points: Option<String>,
    /// Time from one cut to the next that was asked for.
    pub interval: Duration,
    /// Age of the last durable point, if there is one.
    pub rpo: Option<Duration>,
}

/// Intervals that a point may be late before somebody should look: Hyper-V Replica warns when more than 20 % of its
/// cycles were missed, which for a continuous replication means that the point is several cycles old.
const LATE_INTERVALS: u32 = 5;
/// The shortest delay that is worth a warning.
const LATE_AT_LEAST: Duration = Duration::from_secs(30);
/// A point this old is a warning whatever the interval (Hyper-V Replica: one hour since the last synchronisation).
const LATE_AT_MOST: Duration = Duration::from_hours(1);

impl Signs {
    /// The health these signs mean, and why, one sentence each.
    pub fn health(&self) -> (Health, Vec<String>) {
        let mut worst = match self.state {
            ReplicationState::Disabled => Health::NotApplicable,
            _ => Health::Normal,
        };
        let mut reasons = Vec::new();
        let mut say = |health: Health, reason: String| {
            worst = worst.max(health);
            reasons.push(reason);
        };
        if let Some(disk) = &self.disk {
            say(Health::Critical, disk.clone());
        }
        if let Some(points) = &self.points {
            say(Health::Warning, points.clone());
        }
        if let Some((health, why)) = self.of_the_state() {
            say(health, why);
        }
        let late = (self.interval * LATE_INTERVALS).clamp(LATE_AT_LEAST, LATE_AT_MOST);
        if let Some(rpo) = self
            .rpo
            .filter(|&rpo| rpo > late && self.state != ReplicationState::Disabled)
        {
            say(
                Health::Warning,
                format!("the last durable point is {} s old", rpo.as_secs()),
            );
        }
        (worst, reasons)
    }

    /// What the state alone means.
    fn of_the_state(&self) -> Option<(Health, String)> {
        let why = |otherwise: &str| self.stopped.clone().unwrap_or_else(|| otherwise.into());
        let (health, text) = match self.state {
            ReplicationState::Error => (Health::Critical, why("replication stopped")),
            ReplicationState::Suspended => {
                let why = why("the replica cannot be reached");
                let text = format!("{why}; changes are tracked and will be sent");
                (Health::Warning, text)
            }
            ReplicationState::ReadyForInitialReplication
            | ReplicationState::InitialReplicationInProgress
            | ReplicationState::WaitingForInitialReplication => {
                let why = self.stopped.as_ref().map(|why| format!("; {why}"));
                let text = format!(
                    "the initial copy is not complete: there is nothing to fail over to{}",
                    why.unwrap_or_default()
                );
                (Health::Warning, text)
            }
            ReplicationState::Resynchronizing => {
                let why = why("it may differ");
                let text = format!("the replica is being brought back in step: {why}");
                (Health::Warning, text)
            }
            // What a failover means for the health is said by whoever knows the role.
            ReplicationState::Disabled
            | ReplicationState::Replicating
            | ReplicationState::PreparedForFailover
            | ReplicationState::FailedOverWaitingCompletion
            | ReplicationState::FailedOver
            | ReplicationState::WaitingForStartResynchronize => return None,
        };
        Some((health, text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signs(state: ReplicationState) -> Signs {
        Signs {
            state,
            stopped: None,
            disk: None,
            points: None,
            interval: Duration::from_secs(1),
            rpo: None,
        }
    }

    #[test]
    fn health_is_the_worst_of_its_reasons() {
        assert_eq!(
            signs(ReplicationState::Replicating).health(),
            (Health::Normal, vec![])
        );
        assert_eq!(
            signs(ReplicationState::Disabled).health(),
            (Health::NotApplicable, vec![])
        );
        let mut late = signs(ReplicationState::Replicating);
        late.rpo = Some(Duration::from_secs(29));
        assert_eq!(late.health().0, Health::Normal);
        late.rpo = Some(Duration::from_secs(31));
        assert_eq!(
            late.health(),
            (
                Health::Warning,
                vec!["the last durable point is 31 s old".into()]
            )
        );
        let mut short = signs(ReplicationState::Replicating);
        short.points = Some("space is short".into());
        assert_eq!(
            short.health(),
            (Health::Warning, vec!["space is short".into()])
        );
        late.disk = Some("disk os stopped".into());
        let (health, reasons) = late.health();
        assert_eq!((health, reasons.len()), (Health::Critical, 2));
    }

    #[test]
    fn the_names_are_stable() {
        let json = serde_json::to_string(&ReplicationState::InitialReplicationInProgress).unwrap();
        assert_eq!(json, "\"InitialReplicationInProgress\"");
        assert_eq!(ReplicationState::Replicating.to_string(), "Replicating");
    }
}
