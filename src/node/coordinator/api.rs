//! Jobs and plans on the control socket.
//!
//! | method and path | answer |
//! | --- | --- |
//! | `GET /v1/jobs` | a [`JobSummary`] for each job that is kept, oldest first |
//! | `GET /v1/jobs/{id}` | its [`JobStatus`] |
//! | `POST /v1/jobs/{id}/cancel` | its [`JobStatus`], once the wish is durable |
//! | `POST /v1/jobs/{id}/continue` | its [`JobStatus`], once a manual action is taken as done |
//! | `POST /v1/plans/check` with a plan's text | what is wrong, a sentence each |
//! | `POST /v1/plans/run` with a [`PlanRequest`] | the [`JobStatus`] of the job that was begun |
//! | `POST /v1/reload` | a [`Reloaded`] for each identity, once all are in use |

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, State},
    response::Response,
    routing::{get, post},
};
use serde::{Deserialize, Serialize};

use super::{Coordinator, parse, runner::Running};
use crate::{
    base::{clock::Timestamp, ids::Name},
    coord::job::{At, Ended, Event, Job, JobId, Kind},
    net::Reloaded,
    node::{
        control::{ClientError, OperateError, answer, ask},
        operate::Way,
    },
};

/// A job, and what it waits for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobStatus {
    /// The job.
    #[serde(flatten)]
    pub job: Job,
    /// What steps that are under way wait for, where that is known.
    pub notes: Vec<(At, String)>,
}

/// A job in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSummary {
    /// Its number.
    pub id: JobId,
    /// The plan it carries out, if it is one.
    pub plan: Option<Name>,
    /// Which failover it is.
    pub kind: Kind,
    /// The machines it is about.
    pub machines: Vec<Name>,
    /// When it was asked for.
    pub begun: Timestamp,
    /// Whether somebody wants it to stop.
    pub cancel: bool,
    /// Whether it waits for a person.
    pub waits: bool,
    /// What became of it, once nothing is left to do.
    pub ended: Option<Ended>,
}

impl From<&Job> for JobSummary {
    fn from(job: &Job) -> Self {
        Self {
            id: job.id,
            plan: job.plan.clone(),
            kind: job.kind,
            machines: job.machines().into_iter().cloned().collect(),
            begun: job.begun,
            cancel: job.cancel,
            waits: job.manual().next().is_some(),
            ended: job.ended,
        }
    }
}

/// A plan to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanRequest {
    /// The plan, as in its file.
    pub text: String,
    /// Which failover.
    pub kind: Kind,
    /// Unplanned: also while the primaries are connected. Reverse: also if disks are still in use.
    #[serde(default)]
    pub force: bool,
    /// The host on which all machines are wanted.
    #[serde(default)]
    pub to: Option<Name>,
}

type Front = State<Arc<Coordinator>>;

/// The requests about jobs and plans.
pub(super) fn requests(coordinator: &Arc<Coordinator>) -> Router {
    Router::new()
        .route("/v1/jobs", get(jobs))
        .route("/v1/jobs/{id}", get(job))
        .route("/v1/jobs/{id}/cancel", post(cancel))
        .route("/v1/jobs/{id}/continue", post(go_on))
        .route("/v1/plans/check", post(check))
        .route("/v1/plans/run", post(run))
        .route("/v1/reload", post(reload))
        .with_state(Arc::clone(coordinator))
}

fn status(running: &Running) -> JobStatus {
    JobStatus {
        job: running.job(),
        notes: running.notes().into_iter().collect(),
    }
}

async fn jobs(State(coordinator): Front) -> Response {
    answer(move || {
        let jobs: Vec<_> = coordinator.jobs.lock().values().cloned().collect();
        let jobs = jobs.iter().map(|running| JobSummary::from(&running.job()));
        Ok(jobs.collect::<Vec<_>>())
    })
    .await
}

async fn job(State(coordinator): Front, Path(id): Path<JobId>) -> Response {
    answer(move || Ok(status(&*coordinator.running(id)?))).await
}

async fn cancel(State(coordinator): Front, Path(id): Path<JobId>) -> Response {
    answer(move || wish(&coordinator, id, Event::Cancel)).await
}

async fn go_on(State(coordinator): Front, Path(id): Path<JobId>) -> Response {
    answer(move || wish(&coordinator, id, Event::Continue)).await
}

fn wish(coordinator: &Coordinator, id: JobId, event: Event) -> Result<JobStatus, OperateError> {
    let running = coordinator.running(id)?;
    running.wish(event)?;
    Ok(status(&running))
}

async fn check(State(coordinator): Front, Json(text): Json<String>) -> Response {
    answer(move || Ok(coordinator.check(&parse(&text)?))).await
}

async fn run(State(coordinator): Front, Json(request): Json<PlanRequest>) -> Response {
    answer(move || Ok(status(&*coordinator.run_plan(&request)?))).await
}

async fn reload(State(coordinator): Front) -> Response {
    answer(move || coordinator.reload()).await
}

/// Asks a node to read its identities and the list of revoked certificates again. Only its own socket answers that.
pub async fn ask_reload(way: impl Into<Way>) -> Result<Vec<Reloaded>, ClientError> {
    ask(way, "POST", "/v1/reload", &()).await
}

/// Asks a coordinator for all jobs that are kept, oldest first.
pub async fn ask_jobs(way: impl Into<Way>) -> Result<Vec<JobSummary>, ClientError> {
    ask(way, "GET", "/v1/jobs", &()).await
}

/// Asks a coordinator for a job.
pub async fn ask_job(way: impl Into<Way>, id: JobId) -> Result<JobStatus, ClientError> {
    ask(way, "GET", &format!("/v1/jobs/{id}"), &()).await
}

/// Asks a coordinator to stop a job as soon as that leaves every machine where somebody knows.
pub async fn ask_cancel_job(way: impl Into<Way>, id: JobId) -> Result<JobStatus, ClientError> {
    ask(way, "POST", &format!("/v1/jobs/{id}/cancel"), &()).await
}

/// Tells a coordinator that the manual action for which a job waits is done.
pub async fn ask_continue_job(way: impl Into<Way>, id: JobId) -> Result<JobStatus, ClientError> {
    ask(way, "POST", &format!("/v1/jobs/{id}/continue"), &()).await
}

/// Asks a coordinator what keeps a plan from being run: the text of its file.
pub async fn ask_check(way: impl Into<Way>, text: &str) -> Result<Vec<String>, ClientError> {
    ask(way, "POST", "/v1/plans/check", &text).await
}

/// Asks a coordinator to run a plan; answers as soon as the job is in its journal.
pub async fn ask_run(way: impl Into<Way>, request: &PlanRequest) -> Result<JobStatus, ClientError> {
    ask(way, "POST", "/v1/plans/run", request).await
}
