//! The journal: each job a record of the host's store, changed as a whole, durable when a call returns.

use std::sync::Arc;

use crate::{
    coord::job::{Job, JobId},
    storage::ledger::{Ledger, LedgerError},
};

/// Records with this prefix are jobs.
const PREFIX: &str = "job/";

/// Where jobs are kept.
#[derive(Debug)]
pub(super) struct Journal(Arc<Ledger>);

impl Journal {
    pub(super) fn new(ledger: Arc<Ledger>) -> Self {
        Self(ledger)
    }

    /// All jobs, by number. One that cannot be read is left where it is, and said: a host serves its machines without it.
    pub(super) fn jobs(&self) -> Result<Vec<Job>, LedgerError> {
        let mut jobs = Vec::new();
        for key in self.0.keys(PREFIX)? {
            match self.0.get::<Job>(&key) {
                Ok(job) => jobs.extend(job),
                Err(error @ LedgerError::Record { .. }) => {
                    tracing::error!("a job is lost: {error}");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(jobs)
    }

    pub(super) fn put(&self, job: &Job) -> Result<(), LedgerError> {
        self.0.put(&key(job.id), job)
    }

    pub(super) fn remove(&self, id: JobId) -> Result<(), LedgerError> {
        self.0.remove(&key(id))
    }
}

fn key(id: JobId) -> String {
    // Twenty digits hold every number, and sort.
    format!("{PREFIX}{:020}", id.0)
}
