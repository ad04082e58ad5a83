//! Floor 4: a deterministic simulator of two hosts and the machine that they serve in turn.
//!
//! One thread runs both hosts, and in every fourth run a coordinator: the real role machine, jobs, tracking, sender, receiver,
//! replica store, layers, image formats, delta codec and node's store, over memory that forgets, a clock that is moved and a
//! network that loses links. Only what `node` does with threads and sockets is replaced, by modules that take the same durable
//! steps in the same order.
//! A run is drawn from its seed alone; equal seeds give equal runs.
//!
//! ```text
//!   seed ──> setup ──> world: step, step, step ... heal, converge, rot
//!                        |  picks an event: guest write, cut, delivery of some bytes, failover, death of a host ...
//!                        v
//!              host 0 ───── network ───── host 1             oracle: what is true
//!              Host: record, what runs: Serving or Following      contents of all disks at each cut,
//!              medium (memory, faults)    medium (memory, faults)  what was told, durable, kept; who must not write
//! ```
//! What is checked, and what is not simulated, stands in `tests/README.md`.
#![forbid(unsafe_code)]

mod content;
mod conversation;
mod coordinator;
mod host;
mod medium;
mod network;
mod oracle;
mod peers;
mod random;
mod record;
mod serving;
mod session;
mod setup;
mod truth;
mod verbs;
mod world;

use std::{fmt, time::Duration};

pub use random::Random;
pub use setup::Bug;

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Events.
    pub steps: u64,
    /// Time that passed in the simulation.
    pub simulated: Duration,
    /// A hash over all events: equal runs have the same.
    pub trace: u64,
    /// Epochs that became points of the history.
    pub epochs: u64,
    /// Epochs that were merged into the next one.
    pub merged: u64,
    /// Processes that were killed.
    pub kills: u64,
    /// Hosts whose power was cut.
    pub power_cuts: u64,
    /// Links that were lost.
    pub links_lost: u64,
    /// Calls of the storage that were made to fail, and times the replica's disk was full.
    pub faults: u64,
    /// Recovery points that were read and compared as a whole.
    pub views: u64,
    /// Rescue points that were compared with what the former primary had.
    pub rescues: u64,
    /// Test failovers.
    pub tests: u64,
    /// Planned failovers that came to their end.
    pub planned: u64,
    /// Unplanned failovers.
    pub failovers: u64,
    /// Of these, committed.
    pub commits: u64,
    /// And cancelled.
    pub cancels: u64,
    /// Former primaries that became replicas on their own images.
    pub reversals: u64,
    /// Split brains, counted on each host.
    pub splits: u64,
    /// Jobs that the coordinator was given.
    pub jobs: u64,
    /// Of these, the ones whose end was compared with what the hosts were.
    pub jobs_ended: u64,
    /// Processes of the coordinator that died.
    pub coordinator_deaths: u64,
    /// Bits that flipped on a replica at rest.
    pub flips: u64,
    /// Of these, what an error or a verification told; the others changed nothing that is shown.
    pub flips_told: u64,
}

impl Report {
    /// Adds another run's numbers.
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.simulated += other.simulated;
        self.trace ^= other.trace;
        self.epochs += other.epochs;
        self.merged += other.merged;
        self.kills += other.kills;
        self.power_cuts += other.power_cuts;
        self.links_lost += other.links_lost;
        self.faults += other.faults;
        self.views += other.views;
        self.rescues += other.rescues;
        self.tests += other.tests;
        self.planned += other.planned;
        self.failovers += other.failovers;
        self.commits += other.commits;
        self.cancels += other.cancels;
        self.reversals += other.reversals;
        self.splits += other.splits;
        self.jobs += other.jobs;
        self.jobs_ended += other.jobs_ended;
        self.coordinator_deaths += other.coordinator_deaths;
        self.flips += other.flips;
        self.flips_told += other.flips_told;
    }
}

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The seed of the run.
    pub seed: u64,
    /// The step in which it was noticed.
    pub step: u64,
    /// Which promise, and how.
    pub what: String,
    /// The last events.
    pub events: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}, step {}: {}", self.seed, self.step, self.what)?;
        for event in &self.events {
            writeln!(f, "  {event}")?;
        }
        write!(
            f,
            "replay: UNDERSTUDY_SEED={} cargo nextest run --test integration -E 'test(=simulate::replay)'",
            self.seed
        )
    }
}

impl std::error::Error for Failure {}

/// Simulates one run, with a known bug built in if one is given.
pub fn run(seed: u64, bug: Option<Bug>) -> Result<Report, Failure> {
    world::run(seed, bug)
}
