//! The coordinator: what concerns several hosts, done step by step, each step durable.
//!
//! ```text
//!   verbs, plans ──> Coordinator ── look at the hosts (view) ──> a job, in the journal
//!                                                                 |
//!                     runner: one thread for each job: event -> coord::job -> journal -> act
//!                                                                 |
//!                     deeds: look, ask, look again   <────────────+────────────>   script
//! ```
//! Every host embeds one; a host without machines is a coordinator on a third host. The truth about roles lives with the
//! disks: a coordinator only drives, remembers nothing of the hosts but what its jobs say, and may die at any moment.
//! Its own host it asks within the process, the others as an [operator](super::operate).
//!
//! # Rules
//! - A job is in the journal before anything is done for it. When the coordinator starts, it goes on with every job that
//!   has not ended ([`crate::coord::job`] has the crash contract).
//! - A machine is in the hands of one job at a time. The journal is what knows: a job owns its machines from the moment it
//!   is there until it has ended there.
//! - A coordinator that knows no other host has nothing to coordinate: verbs go to its own host as they are.

mod api;
mod deeds;
mod journal;
mod runner;
mod script;
mod verbs;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use axum::Router;
use parking_lot::Mutex;
use tokio::runtime::Handle;

pub use self::api::{
    JobStatus, JobSummary, PlanRequest, ask_cancel_job, ask_check, ask_continue_job, ask_job,
    ask_jobs, ask_reload, ask_run,
};
use self::{journal::Journal, runner::Running};
use super::{
    audit::Event,
    control::{self, ClientError, Operate, OperateError, ask_status},
    host::{Host, HostError},
    operate::Way,
    status::MachineStatus,
};
use crate::{
    base::{
        chain::chain,
        clock::Clock,
        ids::{Ids, Name},
    },
    coord::{
        job::{Job, JobId, Kind, Stage},
        plan::Plan,
        view::{self, Seen, Sight, View},
    },
    net::{Identity, Reloaded, Reread},
};

/// Jobs that have not ended, at most: each has a thread.
const JOBS_OPEN_MAX: usize = 64;
/// Jobs that have ended and are kept to be read, at most; the oldest go first.
const JOBS_KEPT_MAX: usize = 100;
/// How long a host may take to say where it stands.
const LOOK_WITHIN: Duration = Duration::from_secs(5);

/// Drives machines on several hosts.
#[derive(Debug)]
pub struct Coordinator {
    host: Arc<Host>,
    ways: BTreeMap<Name, Way>,
    /// What it operates other hosts as.
    operator: Option<Identity>,
    journal: Journal,
    clock: Arc<dyn Clock>,
    ids: Arc<dyn Ids>,
    runtime: Handle,
    /// All that are kept, ended or not.
    jobs: Mutex<BTreeMap<JobId, Arc<Running>>>,
}

/// What the hosts say of one machine.
#[derive(Debug, Default)]
struct Looked {
    view: View,
    machines: BTreeMap<Name, MachineStatus>,
}

impl Coordinator {
    /// The coordinator of a host; goes on with the jobs in its journal.
    pub fn start(host: &Arc<Host>) -> Result<Arc<Self>, HostError> {
        let shared = host.shared();
        let identity = shared.identity.as_ref();
        let own = identity.map_or_else(
            || Name::new("localhost").expect("it is a name"),
            |identity| identity.name().clone(),
        );
        let mut ways = BTreeMap::new();
        let mut operator = None;
        if let Some(config) = &shared.config.coordinator {
            let loaded = Identity::load_with(&config.identity, shared.config.trust())?;
            let operator = operator.insert(loaded);
            for (name, address) in &config.hosts {
                let way = Way::to(address.clone(), Some(name.clone()), operator.clone());
                ways.insert(name.clone(), way);
            }
        }
        ways.insert(own.clone(), Way::here(host));
        let journal = Journal::new(Arc::clone(&shared.ledger));
        let coordinator = Arc::new(Self {
            host: Arc::clone(host),
            ways,
            operator,
            clock: Arc::clone(&shared.clock),
            ids: Arc::clone(&shared.ids),
            runtime: shared.runtime.clone(),
            jobs: Mutex::default(),
            journal,
        });
        let mut jobs = coordinator.jobs.lock();
        for job in coordinator.journal.jobs()? {
            let id = job.id;
            if job.ended.is_none() {
                tracing::info!(job = %id, "goes on with a job");
            }
            jobs.insert(id, Running::start(&coordinator, job));
        }
        drop(jobs);
        Ok(coordinator)
    }

    /// What a control socket answers: everything a host does, and jobs and plans.
    pub fn requests(self: &Arc<Self>) -> Router {
        let verbs: Arc<dyn Operate> = if self.coordinates() {
            Arc::new(verbs::Front(Arc::clone(self)))
        } else {
            Arc::clone(&self.host) as _
        };
        let requests = control::requests(verbs).merge(api::requests(self));
        control::audited(requests, "socket", &self.host.shared().audit)
    }

    /// Reads the files of the host's identity and of the coordinator's again, and closes the links of peers that they do
    /// not accept any more. If one cannot be used nothing changes.
    fn reload(&self) -> Result<Vec<Reloaded>, OperateError> {
        let identities = self.host.shared().identity.iter().chain(&self.operator);
        let reread: Result<Vec<_>, _> = identities.map(Identity::reread).collect();
        let reread = reread.map_err(|error| {
            let why = format!("nothing was reloaded: {}", chain(&error));
            tracing::error!("{why}");
            OperateError::Failed(why)
        })?;
        if reread.is_empty() {
            let why = "this node has no identity: there is nothing to reload";
            return Err(OperateError::NotNow(why.into()));
        }
        let reloaded: Vec<_> = reread.into_iter().map(Reread::take).collect();
        for reloaded in &reloaded {
            tracing::info!("reloaded {reloaded}");
            self.host.shared().audit.record(&Event::Reloaded {
                what: reloaded.to_string(),
            });
        }
        Ok(reloaded)
    }

    /// Ends what is done for jobs, in the middle of it. They go on when the coordinator starts again.
    pub fn stop(&self) {
        for running in self.jobs.lock().values() {
            running.stop();
        }
    }

    /// Whether there is more than this host.
    fn coordinates(&self) -> bool {
        self.ways.len() > 1
    }

    /// The way to a host.
    fn way(&self, host: &Name) -> Option<&Way> {
        self.ways.get(host)
    }

    /// Asks these hosts for a machine.
    async fn look(&self, machine: &Name, at: impl Fn(&Name) -> bool) -> Looked {
        let mut looked = self.look_at_all(&[machine], at).await;
        looked.remove(machine).unwrap_or_default()
    }

    /// Asks hosts for machines, each host once and all beside each other.
    async fn look_at_all<'m>(
        &self,
        machines: &[&'m Name],
        at: impl Fn(&Name) -> bool,
    ) -> BTreeMap<&'m Name, Looked> {
        let mut asked = tokio::task::JoinSet::new();
        for (host, way) in self.ways.iter().filter(|(host, _)| at(host)) {
            let (host, way) = (host.clone(), way.clone());
            asked.spawn(async move {
                let answer = tokio::time::timeout(LOOK_WITHIN, ask_status(&way)).await;
                let answer = answer
                    .map_err(|_| format!("no answer within {} s", LOOK_WITHIN.as_secs()))
                    .and_then(|answer| answer.map_err(|error| chain(&error)));
                (host, answer)
            });
        }
        let mut looked: BTreeMap<&Name, Looked> = BTreeMap::new();
        for (host, answer) in asked.join_all().await {
            for machine in machines {
                let into = looked.entry(machine).or_default();
                let seen = match &answer {
                    Err(why) => Seen::Silent(why.clone()),
                    Ok(node) => match node.machines.iter().find(|known| known.name == **machine) {
                        None => Seen::Absent,
                        Some(status) => {
                            into.machines.insert(host.clone(), status.clone());
                            seen(status)
                        }
                    },
                };
                into.view.insert(host.clone(), seen);
            }
        }
        looked
    }

    /// Begins a job, unless somebody else has one of its machines in hand.
    fn begin(
        self: &Arc<Self>,
        plan: Option<Name>,
        kind: Kind,
        stages: Vec<Stage>,
    ) -> Result<Arc<Running>, OperateError> {
        let mut jobs = self.jobs.lock();
        let id = jobs
            .keys()
            .next_back()
            .map_or(1, |last| last.0.saturating_add(1));
        let job = Job::new(JobId(id), plan, kind, stages, self.clock.wall());
        let open: Vec<_> = jobs.values().map(|running| running.job()).collect();
        let open: Vec<_> = open.iter().filter(|job| job.ended.is_none()).collect();
        if open.len() >= JOBS_OPEN_MAX {
            let why = format!("{JOBS_OPEN_MAX} jobs have not ended: see `understudy jobs`");
            return Err(OperateError::NotNow(why));
        }
        if let Some(why) = owned(&open, &job.machines()) {
            return Err(OperateError::NotNow(why));
        }
        self.journal.put(&job)?;
        tracing::info!(job = %id, %kind, "begins a job");
        let running = Running::start(self, job);
        jobs.insert(JobId(id), Arc::clone(&running));
        self.forget_old(&mut jobs)?;
        Ok(running)
    }

    /// Removes what ended longest ago, beyond what is kept.
    fn forget_old(&self, jobs: &mut BTreeMap<JobId, Arc<Running>>) -> Result<(), OperateError> {
        let ended = jobs
            .iter()
            .filter(|(_, running)| running.job().ended.is_some());
        let ended: Vec<_> = ended.map(|(id, _)| *id).collect();
        for id in &ended[..ended.len().saturating_sub(JOBS_KEPT_MAX)] {
            self.journal.remove(*id)?;
            jobs.remove(id);
        }
        Ok(())
    }

    /// Refuses what a person asks of a machine while a job has it in hand.
    fn free(&self, machine: &Name) -> Result<(), OperateError> {
        let jobs: Vec<_> = self
            .jobs
            .lock()
            .values()
            .map(|running| running.job())
            .collect();
        let open: Vec<_> = jobs.iter().filter(|job| job.ended.is_none()).collect();
        match owned(&open, &BTreeSet::from([machine])) {
            Some(why) => Err(OperateError::NotNow(why)),
            None => Ok(()),
        }
    }

    fn running(&self, id: JobId) -> Result<Arc<Running>, OperateError> {
        let found = self.jobs.lock().get(&id).cloned();
        found.ok_or_else(|| {
            OperateError::NotNow(format!("there is no job {id}: see `understudy jobs`"))
        })
    }

    /// What keeps a plan from being run as things are now.
    fn check(&self, plan: &Plan) -> Vec<String> {
        let mut wrong: Vec<_> = plan
            .programs()
            .into_iter()
            .filter_map(script::complaint)
            .collect();
        let machines: Vec<_> = plan.machines().collect();
        let looked = self.runtime.block_on(self.look_at_all(&machines, |_| true));
        for machine in machines {
            let none = Looked::default();
            let looked = looked.get(machine).unwrap_or(&none);
            wrong.extend(view::complaints(machine, &looked.view));
            wrong.extend(self.free(machine).err().map(|error| error.to_string()));
        }
        wrong
    }

    /// Begins the job that carries out a plan.
    fn run_plan(self: &Arc<Self>, request: &PlanRequest) -> Result<Arc<Running>, OperateError> {
        let plan = parse(&request.text)?;
        let machines: Vec<_> = plan.machines().collect();
        let looked = self.runtime.block_on(self.look_at_all(&machines, |_| true));
        let to = request.to.as_ref();
        if let Some(to) = to.filter(|to| self.way(to).is_none()) {
            return Err(OperateError::NotNow(format!(
                "no host called {to} is known here"
            )));
        }
        let none = Looked::default();
        let view = |machine: &Name| &looked.get(machine).unwrap_or(&none).view;
        let place = |machine: &Name| view::place(request.kind, machine, view(machine), to);
        let stages = plan.stages(request.kind, request.force, place, || self.ids.uuid());
        let stages = stages.map_err(|nowhere| OperateError::NotNow(nowhere.to_string()))?;
        if request.kind == Kind::Planned && to.is_none() {
            one_direction(&stages)?;
        }
        self.begin(Some(plan.name), request.kind, stages)
    }
}

fn parse(text: &str) -> Result<Plan, OperateError> {
    Plan::parse(text).map_err(|error| OperateError::NotNow(error.to_string()))
}

/// A plan that was stopped half way has machines on both sides: without a direction it would send the first ones back.
fn one_direction(stages: &[Stage]) -> Result<(), OperateError> {
    let steps = stages.iter().flat_map(|stage| &stage.steps);
    let hosts: BTreeSet<_> = steps.filter_map(|step| step.deed.host()).collect();
    if hosts.len() < 2 {
        return Ok(());
    }
    let hosts: Vec<_> = hosts.into_iter().map(Name::as_str).collect();
    Err(OperateError::NotNow(format!(
        "the machines of the plan have their primaries on {}: say with --to where all of them are to go",
        hosts.join(" and ")
    )))
}

/// Why these machines cannot be touched, if one of the jobs has one of them.
fn owned(open: &[&Job], machines: &BTreeSet<&Name>) -> Option<String> {
    open.iter().find_map(|job| {
        let theirs = job.machines();
        let machine = theirs.intersection(machines).next()?;
        let of = job.plan.as_ref().map_or_else(String::new, |plan| format!(" (plan {plan})"));
        Some(format!(
            "machine {machine} is in the hands of job {0}{of}: wait for it, or `understudy jobs cancel {0}`",
            job.id
        ))
    })
}

/// What a host says of a machine, as far as decisions depend on it.
fn seen(status: &MachineStatus) -> Seen {
    let (Some(part), Some(generation)) = (status.part, status.generation) else {
        // Nobody keeps roles for it there: it can be neither failed over nor followed.
        return Seen::Absent;
    };
    let tests = status.tests.iter().map(|test| (test.number, test.key));
    Seen::Present(Sight {
        part,
        generation,
        state: status.state,
        health: status.health,
        reasons: status.reasons.clone(),
        tests: tests.collect(),
    })
}

/// How a request to a host went wrong.
#[derive(Debug)]
enum NotAsked {
    /// The host said no.
    Refused(String),
    /// The host tried in vain.
    Failed(String),
    /// Whether it was heard is not known.
    Lost(String),
}

impl From<ClientError> for NotAsked {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(why) => Self::Refused(why),
            ClientError::Failed(why) => Self::Failed(why),
            error @ (ClientError::Connect { .. }
            | ClientError::Dial(_)
            | ClientError::Broken(_)) => Self::Lost(chain(&error)),
        }
    }
}

impl From<NotAsked> for OperateError {
    fn from(error: NotAsked) -> Self {
        match error {
            NotAsked::Refused(why) => Self::NotNow(why),
            NotAsked::Failed(why) | NotAsked::Lost(why) => Self::Failed(why),
        }
    }
}
