//! A recovery plan: machines in ordered groups, with what has to be done around them, as a TOML file.
//!
//! ```toml
//! name = "shop"
//!
//! [[group]]
//! name     = "database"
//! machines = ["db-1", "db-2"]           # moved beside each other
//!
//! [group.planned]                       # what is done in a planned failover, before and after
//! pre  = [{ run = ["/etc/understudy/shop/stop", "db"], timeout = "5m" }]
//! post = [{ run = ["/etc/understudy/shop/start", "db"] }, { manual = "look whether the ledger balances" }]
//!
//! [group.unplanned]
//! post = [{ run = ["/etc/understudy/shop/start", "db"] }]
//!
//! [group.test]
//! post = [{ manual = "try the shop" }]
//!
//! [[group]]                             # begins when the first one is done
//! name     = "front"
//! machines = ["web"]
//! ```
//! Actions of a group are done one after the other, the machines between them beside each other. A group without machines
//! is a place for actions. An unknown key is an error, and so is a limit that is exceeded: a step that is not done must not
//! look as if it were.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

use serde::Deserialize;
use uuid::Uuid;

use super::{
    job::{Deed, Failure, Kind, Phase, Report, Script, Stage, Step, StepState, Task, Verb},
    view::{self, Nowhere, Place},
};
use crate::base::ids::Name;

/// Largest plan, in bytes of its file.
pub const PLAN_BYTES_MAX: usize = 256 * 1024;
/// Most groups of a plan.
pub const GROUPS_MAX: usize = 64;
/// Most machines of a plan.
pub const MACHINES_MAX: usize = 256;
/// Most actions of a plan for one kind of failover: with the output of each, a job stays below a megabyte.
pub const ACTIONS_MAX: usize = 64;
/// Most bytes of a program's path and arguments, and of the text of a manual action.
pub const ACTION_BYTES_MAX: usize = 4096;
/// How long a script may take unless it says otherwise: what Site Recovery allows.
pub const SCRIPT_WITHIN_DEFAULT: Duration = Duration::from_mins(10);
/// How long a script may be allowed to take.
pub const SCRIPT_WITHIN_MAX: Duration = Duration::from_hours(24);

/// A plan that makes sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What people call it.
    pub name: Name,
    groups: Vec<Group>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    name: String,
    machines: Vec<Name>,
    actions: BTreeMap<Kind, Actions>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Actions {
    pre: Vec<Action>,
    post: Vec<Action>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Run { run: Vec<String>, within: Duration },
    Manual { text: String },
}

/// Why a text is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// It is not what this program understands.
    #[error("{0}")]
    Toml(#[from] Box<toml::de::Error>),
    /// It is too large.
    #[error("a plan has at most {PLAN_BYTES_MAX} bytes, this one has {0}")]
    TooLong(usize),
    /// A value makes no sense.
    #[error("{at}: {why}")]
    Value {
        /// The key.
        at: String,
        /// Why not.
        why: String,
    },
}

fn wrong(at: impl Into<String>, why: impl Into<String>) -> PlanError {
    let (at, why) = (at.into(), why.into());
    PlanError::Value { at, why }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlanTable {
    name: Name,
    #[serde(default)]
    group: Vec<GroupTable>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupTable {
    name: Name,
    #[serde(default)]
    machines: Vec<Name>,
    #[serde(default)]
    planned: ActionsTable,
    #[serde(default)]
    unplanned: ActionsTable,
    #[serde(default)]
    test: ActionsTable,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionsTable {
    #[serde(default)]
    pre: Vec<ActionTable>,
    #[serde(default)]
    post: Vec<ActionTable>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionTable {
    run: Option<Vec<String>>,
    timeout: Option<String>,
    manual: Option<String>,
}

impl Plan {
    /// Reads the text of a plan.
    pub fn parse(text: &str) -> Result<Self, PlanError> {
        if text.len() > PLAN_BYTES_MAX {
            return Err(PlanError::TooLong(text.len()));
        }
        let table: PlanTable = toml::from_str(text).map_err(Box::new)?;
        if table.group.len() > GROUPS_MAX {
            return Err(wrong("group", format!("there are more than {GROUPS_MAX}")));
        }
        let mut names = BTreeSet::new();
        let mut machines = BTreeSet::new();
        let mut groups = Vec::new();
        for group in table.group {
            let at = format!("group {}", group.name);
            if !names.insert(group.name.clone()) {
                return Err(wrong(at, "there are two of that name"));
            }
            for machine in &group.machines {
                if !machines.insert(machine.clone()) {
                    let why = format!("machine {machine} is named twice: a plan moves it once");
                    return Err(wrong(at, why));
                }
            }
            groups.push(group.group(&at)?);
        }
        if machines.is_empty() || machines.len() > MACHINES_MAX {
            let why = format!(
                "it names {} machines, and has to name 1 to {MACHINES_MAX}",
                machines.len()
            );
            return Err(wrong("group", why));
        }
        let plan = Self {
            name: table.name,
            groups,
        };
        for kind in WITH_ACTIONS {
            if plan.actions(kind).count() > ACTIONS_MAX {
                let why =
                    format!("there are more than {ACTIONS_MAX} actions for one kind of failover");
                return Err(wrong(kind.to_string(), why));
            }
        }
        Ok(plan)
    }

    fn actions(&self, kind: Kind) -> impl Iterator<Item = &Action> {
        let actions = self
            .groups
            .iter()
            .filter_map(move |group| group.actions.get(&kind));
        actions.flat_map(|actions| actions.pre.iter().chain(&actions.post))
    }

    /// All machines, in the order of the plan.
    pub fn machines(&self) -> impl Iterator<Item = &Name> {
        self.groups.iter().flat_map(|group| &group.machines)
    }

    /// The programs that it runs, each once.
    pub fn programs(&self) -> BTreeSet<&Path> {
        let actions = WITH_ACTIONS.into_iter().flat_map(|kind| self.actions(kind));
        let programs = actions.filter_map(|action| match action {
            Action::Run { run, .. } => run.first().map(Path::new),
            Action::Manual { .. } => None,
        });
        programs.collect()
    }

    /// What a job does that carries out the plan. `place` says where each machine is; one that has no place is a step that
    /// failed before it began. `key` makes the key of a test failover.
    ///
    /// # Errors
    /// The first machine without a place, if `kind` stops on errors or there is none with one.
    pub fn stages(
        &self,
        kind: Kind,
        force: bool,
        place: impl Fn(&Name) -> Result<Place, Nowhere>,
        mut key: impl FnMut() -> Uuid,
    ) -> Result<Vec<Stage>, Nowhere> {
        let mut stages = Vec::new();
        let mut clean_up = Vec::new();
        let (mut nowhere, mut somewhere) = (None, false);
        for group in &self.groups {
            let actions = group.actions.get(&kind).cloned().unwrap_or_default();
            stages.extend(
                actions
                    .pre
                    .iter()
                    .map(|action| group.action(action, Phase::Pre)),
            );
            let mut steps = Vec::new();
            for machine in &group.machines {
                let machine = machine.clone();
                match place(&machine) {
                    Ok(Place::On(host, generation)) => {
                        let verb = view::verb(kind, force, key());
                        let task = Task {
                            machine,
                            verb,
                            host,
                            generation,
                        };
                        if let Verb::Test { key } = verb {
                            let verb = Verb::EndTest { key };
                            let task = task.clone();
                            clean_up.push(Step::new(Deed::Machine(Task { verb, ..task })));
                        }
                        steps.push(Step::new(Deed::Machine(task)));
                        somewhere = true;
                    }
                    Ok(Place::Already(text)) => {
                        let state = StepState::Done(Report::of(text));
                        let step = Step::new(Deed::Nothing { machine });
                        steps.push(Step { state, ..step });
                        somewhere = true;
                    }
                    Err(none) => {
                        let state = StepState::Failed(Failure::refused(none.to_string()));
                        let step = Step::new(Deed::Nothing { machine });
                        steps.push(Step { state, ..step });
                        nowhere.get_or_insert(none);
                    }
                }
            }
            if !steps.is_empty() {
                stages.push(Stage {
                    name: group.name.clone(),
                    always: false,
                    steps,
                });
            }
            stages.extend(
                actions
                    .post
                    .iter()
                    .map(|action| group.action(action, Phase::Post)),
            );
        }
        if let Some(nowhere) = nowhere.filter(|_| kind.stops_on_error() || !somewhere) {
            return Err(nowhere);
        }
        if !clean_up.is_empty() {
            stages.push(Stage {
                name: "clean up".into(),
                always: true,
                steps: clean_up,
            });
        }
        Ok(stages)
    }
}

/// The kinds of failover around which a plan does something.
const WITH_ACTIONS: [Kind; 3] = [Kind::Planned, Kind::Unplanned, Kind::Test];

impl Group {
    /// A stage of one action.
    fn action(&self, action: &Action, phase: Phase) -> Stage {
        let deed = match action {
            Action::Manual { text } => Deed::Manual { text: text.clone() },
            Action::Run { run, within } => Deed::Script(Script {
                run: run.clone(),
                within: *within,
                group: self.name.clone(),
                phase,
                machines: self.machines.clone(),
            }),
        };
        Stage {
            name: format!("{}, {phase}", self.name),
            always: false,
            steps: vec![Step::new(deed)],
        }
    }
}

impl GroupTable {
    fn group(self, at: &str) -> Result<Group, PlanError> {
        let Self {
            name,
            machines,
            planned,
            unplanned,
            test,
        } = self;
        let tables = [
            (Kind::Planned, planned),
            (Kind::Unplanned, unplanned),
            (Kind::Test, test),
        ];
        let actions = tables.into_iter().map(|(kind, table)| {
            let read = |phase, table: Vec<ActionTable>| {
                let read = table.into_iter().map(ActionTable::action);
                let read: Result<Vec<_>, String> = read.collect();
                read.map_err(|why| wrong(format!("{at}, {kind}.{phase}"), why))
            };
            let (pre, post) = (read(Phase::Pre, table.pre)?, read(Phase::Post, table.post)?);
            Ok((kind, Actions { pre, post }))
        });
        Ok(Group {
            name: name.to_string(),
            machines,
            actions: actions.collect::<Result<_, PlanError>>()?,
        })
    }
}

impl ActionTable {
    fn action(self) -> Result<Action, String> {
        match (self.run, self.manual, self.timeout) {
            (Some(run), None, timeout) => {
                let program = run.first().ok_or("run names no program")?;
                if !program.starts_with('/') {
                    return Err(format!(
                        "{program:?} is not an absolute path: nothing is searched for"
                    ));
                }
                let bytes: usize = run.iter().map(String::len).sum();
                if bytes > ACTION_BYTES_MAX || run.iter().any(|text| text.contains('\0')) {
                    return Err(format!(
                        "the program and its arguments have to be at most {ACTION_BYTES_MAX} bytes without NUL"
                    ));
                }
                let within =
                    timeout.map_or(Ok(SCRIPT_WITHIN_DEFAULT), |text| parse_timeout(&text))?;
                Ok(Action::Run { run, within })
            }
            (None, Some(text), None) if text.trim().is_empty() || text.len() > ACTION_BYTES_MAX => {
                Err(format!(
                    "manual says in 1 to {ACTION_BYTES_MAX} bytes what a person is to do"
                ))
            }
            (None, Some(text), None) => Ok(Action::Manual { text }),
            (None, Some(_), Some(_)) => Err("a person has no timeout".into()),
            _ => Err("an action is one of run and manual".into()),
        }
    }
}

/// Reads `30s`, `5m`, `2h`.
fn parse_timeout(text: &str) -> Result<Duration, String> {
    let wrong = || format!("timeout {text:?} is not a time from 1s to 24h: use s, m or h");
    let unit = text.chars().next_back().ok_or_else(wrong)?;
    let seconds: u64 = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    let within = number.checked_mul(seconds).map(Duration::from_secs);
    let within =
        within.filter(|within| (Duration::from_secs(1)..=SCRIPT_WITHIN_MAX).contains(within));
    within.ok_or_else(wrong)
}

#[cfg(test)]
mod tests;
