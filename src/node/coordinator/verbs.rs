//! The verbs of a host, at a coordinator: each goes to the host that has to do it.
//!
//! What changes where a machine runs is a job, and whoever asked waits for its end; if he goes away, it goes on. What looks,
//! and what is one call to one host, is passed on.

use std::sync::Arc;

use super::{Coordinator, Looked, NotAsked, runner::Running};
use crate::{
    base::ids::{Lineage, Name},
    coord::{
        job::{Deed, Job, Kind, Stage, Step, StepState, Task, Verb},
        view::{self, Place},
    },
    node::{
        control::{
            CancelReport, CancelRequest, ExportReport, FailoverKind, FailoverReport,
            FailoverRequest, FolderRequest, ImportReport, Operate, OperateError, ResizeReport,
            ResizeRequest, ReverseRequest, SuspendReport, SuspendRequest, TestRequest,
            VerifyRequest, ask_cancel, ask_copy, ask_cut, ask_points, ask_resize, ask_resume,
            ask_resync, ask_suspend, ask_test, ask_verify,
        },
        operate::Way,
        status::{NodeStatus, PointStatus, TestStatus},
    },
};

/// A coordinator of several hosts, as what a control socket talks to.
#[derive(Debug)]
pub(super) struct Front(pub(super) Arc<Coordinator>);

impl Operate for Front {
    fn status(&self) -> NodeStatus {
        NodeStatus {
            coordinates: self.0.ways.keys().cloned().collect(),
            ..self.0.host.status()
        }
    }

    fn cut(&self, machine: &Name) -> Result<Lineage, OperateError> {
        let way = self.find(Kind::Planned, machine)?;
        self.on(ask_cut(&way, machine))
    }

    fn resync(&self, machine: &Name) -> Result<(), OperateError> {
        let way = self.find(Kind::Planned, machine)?;
        self.on(ask_resync(&way, machine))
    }

    fn verify(&self, machine: &Name, request: VerifyRequest) -> Result<(), OperateError> {
        let way = self.find(Kind::Planned, machine)?;
        self.on(ask_verify(&way, machine, request))
    }

    fn suspend(
        &self,
        machine: &Name,
        request: SuspendRequest,
    ) -> Result<SuspendReport, OperateError> {
        let way = self.find(Kind::Planned, machine)?;
        self.on(ask_suspend(&way, machine, request))
    }

    fn resume(&self, machine: &Name) -> Result<SuspendReport, OperateError> {
        let way = self.find(Kind::Planned, machine)?;
        self.on(ask_resume(&way, machine))
    }

    fn copy(&self, machine: &Name) -> Result<(), OperateError> {
        let way = self.find(Kind::Planned, machine)?;
        self.on(ask_copy(&way, machine))
    }

    fn export(&self, machine: &Name, _: &FolderRequest) -> Result<ExportReport, OperateError> {
        Err(on_the_spot(machine))
    }

    fn import(&self, machine: &Name, _: &FolderRequest) -> Result<ImportReport, OperateError> {
        Err(on_the_spot(machine))
    }

    fn resize(
        &self,
        machine: &Name,
        request: &ResizeRequest,
    ) -> Result<ResizeReport, OperateError> {
        let way = self.find(Kind::Planned, machine)?;
        self.on(ask_resize(&way, machine, request))
    }

    fn points(&self, machine: &Name) -> Result<Vec<PointStatus>, OperateError> {
        let way = self.find(Kind::Test, machine)?;
        self.on(ask_points(&way, machine))
    }

    fn start_test(&self, machine: &Name, request: TestRequest) -> Result<TestStatus, OperateError> {
        let way = self.find(Kind::Test, machine)?;
        self.on(ask_test(&way, machine, request))
    }

    fn failover(
        &self,
        machine: &Name,
        request: FailoverRequest,
    ) -> Result<FailoverReport, OperateError> {
        let FailoverRequest { kind, point, force } = request;
        match kind {
            FailoverKind::Planned => self.job(Kind::Planned, machine, Verb::Planned),
            FailoverKind::Unplanned => {
                self.job(Kind::Unplanned, machine, Verb::Unplanned { point, force })
            }
        }
    }

    fn commit(&self, machine: &Name) -> Result<FailoverReport, OperateError> {
        self.job(Kind::Commit, machine, Verb::Commit)
    }

    fn reverse(
        &self,
        machine: &Name,
        request: ReverseRequest,
    ) -> Result<FailoverReport, OperateError> {
        let force = request.force;
        self.job(Kind::Reverse, machine, Verb::Reverse { force })
    }

    fn cancel(&self, machine: &Name, request: CancelRequest) -> Result<CancelReport, OperateError> {
        let of_tests = request.tests || request.number.is_some() || request.rescue;
        if !of_tests {
            self.0.free(machine)?;
        }
        let way = match self.find(Kind::Cancel, machine) {
            Ok(way) if !of_tests => way,
            _ => self.find(Kind::Test, machine)?,
        };
        self.on(ask_cancel(&way, machine, request))
    }
}

impl Front {
    /// Waits for a request to a host.
    fn on<T>(
        &self,
        asked: impl Future<Output = Result<T, crate::node::control::ClientError>>,
    ) -> Result<T, OperateError> {
        let answer = self.0.runtime.block_on(asked);
        answer.map_err(|error| NotAsked::from(error).into())
    }

    fn look(&self, machine: &Name) -> Looked {
        self.0.runtime.block_on(self.0.look(machine, |_| true))
    }

    /// The way to the host that would have to do `kind`.
    fn find(&self, kind: Kind, machine: &Name) -> Result<Way, OperateError> {
        let place = view::place(kind, machine, &self.look(machine).view, None);
        match place.map_err(|nowhere| OperateError::NotNow(nowhere.to_string()))? {
            Place::On(host, _) => {
                let way = self.0.way(&host).cloned();
                way.ok_or_else(|| OperateError::NoSuchMachine(machine.clone()))
            }
            Place::Already(text) => Err(OperateError::NotNow(format!("machine {machine}: {text}"))),
        }
    }

    /// Does one verb for one machine, and waits for the end.
    fn job(&self, kind: Kind, machine: &Name, verb: Verb) -> Result<FailoverReport, OperateError> {
        let looked = self.look(machine);
        let place = view::place(kind, machine, &looked.view, None);
        match place.map_err(|nowhere| OperateError::NotNow(nowhere.to_string()))? {
            Place::On(host, generation) => {
                let task = Task {
                    machine: machine.clone(),
                    verb,
                    host,
                    generation,
                };
                let stage = Stage {
                    name: kind.to_string(),
                    always: false,
                    steps: vec![Step::new(Deed::Machine(task))],
                };
                let running = self.0.begin(None, kind, vec![stage])?;
                report(&running)
            }
            Place::Already(text) => {
                let status = looked.machines.values().next();
                let generation = status.and_then(|status| status.generation);
                let none = || OperateError::NoSuchMachine(machine.clone());
                Ok(FailoverReport {
                    generation: generation.ok_or_else(none)?,
                    files: Vec::new(),
                    text,
                })
            }
        }
    }
}

/// Why a folder is not named from elsewhere.
fn on_the_spot(machine: &Name) -> OperateError {
    OperateError::NotNow(format!(
        "machine {machine}: a portable copy is exported and imported on the host that the disk is attached to: ask the \
         node there"
    ))
}

/// What became of the one step of a job.
fn report(running: &Running) -> Result<FailoverReport, OperateError> {
    let job = running.wait();
    let failed = |why: String| Err(OperateError::Failed(why));
    let (generation, state) = only(&job)?;
    match state {
        StepState::Done(report) => Ok(FailoverReport {
            generation: report.generation.unwrap_or(generation),
            files: report.files.clone(),
            text: report.text.clone(),
        }),
        StepState::Failed(failure) if failure.refused => {
            Err(OperateError::NotNow(failure.why.clone()))
        }
        StepState::Failed(failure) => failed(failure.why.clone()),
        StepState::Undone(text) => failed(format!("job {} was cancelled: {text}", job.id)),
        StepState::Skipped => failed(format!("job {} was cancelled", job.id)),
        StepState::Waiting | StepState::UnderWay => failed(format!(
            "the coordinator is being stopped; job {} goes on when it is started again",
            job.id
        )),
    }
}

fn only(job: &Job) -> Result<(crate::base::ids::Generation, &StepState), OperateError> {
    let step = job.steps().next().map(|(_, step)| step);
    match step {
        Some(Step {
            deed: Deed::Machine(task),
            state,
            ..
        }) => Ok((task.generation, state)),
        _ => Err(OperateError::Failed(format!(
            "job {} is not about a machine",
            job.id
        ))),
    }
}
