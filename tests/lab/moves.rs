//! Machines that change hosts in a lap.

use std::{
    process::Child,
    thread,
    time::{Duration, Instant},
};

use understudy::{
    base::ids::Name,
    coord::role::Part,
    node::{
        control::{
            self, CancelRequest, ClientError, FailoverKind, FailoverReport, FailoverRequest,
            ReverseRequest,
        },
        coordinator::JobSummary,
    },
};

use super::{
    fault::Keep,
    lap::Lab,
    stage::{COORD, NODES},
};
use crate::support::{call, runtime, send};

/// Writes of a guest on a host that is not committed yet.
const WRITES_THERE: u64 = 20;

impl Lab {
    /// A planned failover by the coordinator, perhaps with a death in it; where the machine runs then.
    pub(super) fn moves(&mut self, machine: usize, killed: Option<(usize, u64)>) -> usize {
        let from = self.stage.protected(machine);
        self.stage.end(machine);
        let name = self.stage.machines[machine].name();
        let verb = self.hand_over(name);
        if let Some((node, delay)) = killed {
            thread::sleep(Duration::from_millis(delay));
            self.stage.kill(node);
            self.stage.start(node);
        }
        self.wait_jobs(verb);
        let mut host = self.stage.protected(machine);
        if killed.is_none() && host == from {
            // On a bad link a host may not answer in time. Nothing has changed then, and the same command is given again.
            self.count("planned failovers refused", 1);
            self.mend();
            let verb = self.hand_over(name);
            self.wait_jobs(verb);
            host = self.stage.protected(machine);
            assert_eq!(host, 1 - from, "{name} was handed over");
        }
        if host != from {
            self.count("machines handed over", 1);
        }
        // The job has ended well or left everything as it was. Nothing is lost either way.
        let disks = self.stage.disks(machine, host);
        let seen = self.judge(machine, &disks, None);
        let history = self.stage.machines[machine].history();
        let last = history.last();
        assert!(
            history.holds(seen, last),
            "{name}: {last} was written, {seen:?} was handed over"
        );
        self.stage.begin(machine, host);
        host
    }

    /// Tells the coordinator to hand a machine over.
    fn hand_over(&self, machine: &str) -> Child {
        send(self.stage.node(COORD), &["failover", machine, "--planned"])
    }

    /// Waits until the coordinator has no more to do.
    fn wait_jobs(&self, mut verb: Child) {
        let began = Instant::now();
        loop {
            let asked = verb.try_wait().unwrap().is_some();
            let (code, out, err) = call(self.stage.node(COORD), &["jobs", "--json"]);
            assert_eq!(code, 0, "{out}{err}");
            let jobs: Vec<JobSummary> = serde_json::from_str(&out).unwrap();
            if asked && jobs.iter().all(|job| job.ended.is_some()) {
                return;
            }
            self.stage
                .wait_on(began, || format!("a job does not end: {out}"));
        }
    }

    /// A host dies; its machines are failed over to points, looked at, kept or taken back; it returns.
    pub(super) fn loses(&mut self, host: usize, keep: Keep, hosts: &mut [usize]) {
        let other = 1 - host;
        for machine in self.machines() {
            self.stage.protected(machine);
        }
        self.stage.kill(host);
        let lost: Vec<_> = self
            .machines()
            .filter(|&machine| hosts[machine] == host)
            .collect();
        for &machine in &lost {
            self.stage.end(machine);
            self.is_promoted(machine, other, keep);
        }
        self.stage.start(host);
        for &machine in &lost {
            if keep == Keep::Committed {
                let name = self.stage.machines[machine].name();
                self.stage.node(host).wait("fencing", |m| {
                    m.name.as_str() == name && matches!(m.part, Some(Part::Fenced { .. }))
                });
                let name = Name::new(name).unwrap();
                let socket = self.stage.node(host).socket();
                let request = ReverseRequest::default();
                done(runtime().block_on(control::ask_reverse(socket, &name, request)));
                hosts[machine] = other;
            }
            let now = self.stage.protected(machine);
            assert_eq!(
                now,
                hosts[machine],
                "where {} runs",
                self.stage.machines[machine].name()
            );
            // What only the lost host had is of no use here. Where there is nothing of that kind, this is refused.
            let rescue = CancelRequest {
                rescue: true,
                ..CancelRequest::default()
            };
            if self.cancel(machine, host, rescue).is_ok() {
                self.count("rescue points", 1);
            }
            self.stage.begin(machine, hosts[machine]);
        }
    }

    /// The replica of a lost machine is promoted at the latest point or at a known one; a guest writes there.
    fn is_promoted(&mut self, machine: usize, host: usize, keep: Keep) {
        let name = Name::new(self.stage.machines[machine].name()).unwrap();
        let socket = self.stage.node(host).socket().to_owned();
        let points = &self.stage.machines[machine].points;
        let known = *points.last().expect("a lap begins with a cut");
        let back = self.stage.random.percent(30);
        let request = |back: bool| FailoverRequest {
            kind: FailoverKind::Unplanned,
            point: back.then_some(known.point.epoch),
            force: true,
        };
        let mut back = back;
        let mut promoted = runtime().block_on(control::ask_failover(&socket, &name, request(back)));
        if back && promoted.is_err() {
            // It was thinned away.
            back = false;
            promoted = runtime().block_on(control::ask_failover(&socket, &name, request(back)));
        }
        done(promoted);
        let disks = self.stage.disks(machine, host);
        let seen = self.judge(machine, &disks, back.then_some(known));
        let it = &mut self.stage.machines[machine];
        if !back {
            let least = known.from.max(it.synced);
            let holds = it.history().holds(seen, least);
            assert!(
                holds,
                "{name} was promoted with {seen:?} and must hold {least}"
            );
        }
        let before = it.history().clone();
        it.history().roll_back(seen);
        // Nothing is in sync with a replica now.
        it.strict = false;
        self.stage.begin(machine, host);
        let guest = self.stage.machines[machine].guest();
        guest.expect("begun above").wait_written(WRITES_THERE);
        self.stage.end(machine);
        if keep == Keep::Committed {
            done(runtime().block_on(control::ask_commit(&socket, &name)));
            self.stage.machines[machine].points.clear();
        } else {
            let cancelled = self.cancel(machine, host, CancelRequest::default());
            cancelled.unwrap_or_else(|error| panic!("{name} on {}: {error}", NODES[host]));
            let it = &mut self.stage.machines[machine];
            let mut history = before;
            history.continue_after(it.history());
            *it.history() = history;
        }
    }
}

fn done(answer: Result<FailoverReport, ClientError>) {
    answer.unwrap_or_else(|error| panic!("a role does not change: {error}"));
}
