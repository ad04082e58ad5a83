//! Two hosts, a network, a guest, an operator, and chance: one run of the simulation.

mod calls;
mod coordinate;
mod guest;
mod heal;
mod look;
mod operator;
mod rot;
mod talk;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use super::{
    Bug, Failure, Report,
    coordinator::Coordinator,
    host::{Host, Unmount},
    medium::{Fault, Kind},
    network::Network,
    oracle::{Broken, Oracle, Turn},
    random::Random,
    record::{Asked, Done, No},
    setup::Setup,
};
use crate::{
    base::{
        clock::{Clock, ManualClock},
        ids::Lineage,
        units::to_u64,
    },
    coord::role::Part,
};

/// Events of a run.
const STEPS: (u64, u64) = (100, 400);
/// Events that a failure shows.
const EVENTS_SHOWN: usize = 80;

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    Kill,
    PowerCut,
}

pub(super) fn run(seed: u64, bug: Option<Bug>) -> Result<Report, Failure> {
    let mut random = Random::new(seed);
    let setup = Arc::new(Setup::draw(&mut random, seed, bug));
    let clock = Arc::new(ManualClock::default());
    let hosts = [0, 1].map(|index| Host::new(index, &setup, &clock, random.next()));
    let mut world = World {
        coordinator: Coordinator::of(seed, &clock, bug),
        hosts,
        oracle: Oracle::new(setup.disks),
        network: Network::default(),
        random,
        setup,
        clock,
        calm: true,
        rescanned: false,
        taken: None,
        troubled: [false; 2],
        doom: [None; 2],
        tests: 0,
        events: VecDeque::new(),
        report: Report::default(),
    };
    let done = world.live();
    world.report.epochs = to_u64(world.oracle.points());
    world.report.simulated = world.clock.monotonic();
    // Two runs that do the same calls on their disks did the same.
    for host in 0..2 {
        world.trace(world.hosts[host].medium.calls());
    }
    match done {
        Ok(()) => Ok(world.report),
        Err(what) => Err(Failure {
            seed,
            step: world.report.steps,
            what,
            events: world.events.into_iter().collect(),
        }),
    }
}

/// A run under way.
struct World {
    setup: Arc<Setup>,
    random: Random,
    clock: Arc<ManualClock>,
    hosts: [Host; 2],
    /// Many runs have none: then persons do it all.
    coordinator: Option<Coordinator>,
    network: Network,
    oracle: Oracle,
    /// No call ever failed that leaves a host unsure of what it has.
    calm: bool,
    /// A host took its peer back at another point than the one it was left at, and compares everything.
    rescanned: bool,
    /// The point from which the last primary that took its peer back goes on.
    taken: Option<Lineage>,
    /// Whether a call may have failed in this life of the process: then errors are no wonder, wrong results still are.
    troubled: [bool; 2],
    /// How the process that is about to die will end.
    doom: [Option<Death>; 2],
    /// Test failovers so far.
    tests: u64,
    events: VecDeque<String>,
    report: Report,
}

type Checked = Result<(), Broken>;

impl World {
    fn live(&mut self) -> Checked {
        self.note(&format!("{:?}", self.setup));
        self.hosts[0].make_images()?;
        let steps = self.random.between(STEPS.0, STEPS.1);
        for _ in 0..steps {
            self.step()?;
        }
        self.heal()
    }

    fn note(&mut self, event: &str) {
        for byte in event.bytes() {
            self.trace(u64::from(byte));
        }
        if self.events.len() == EVENTS_SHOWN {
            self.events.pop_front();
        }
        let now = self.clock.monotonic();
        self.events
            .push_back(format!("{} {now:?} {event}", self.report.steps));
    }

    /// FNV-1a.
    fn trace(&mut self, number: u64) {
        self.report.trace = (self.report.trace ^ number).wrapping_mul(0x0100_0000_01B3);
    }

    /// Anything may happen.
    fn step(&mut self) -> Checked {
        self.report.steps += 1;
        if self.is_coordinated() {
            self.coordinate()?;
        } else if self.random.below(1000) < self.setup.verbs {
            self.operate()?;
        } else {
            self.pass()?;
        }
        self.bury()
    }

    /// Anything may happen but what a person asks for.
    fn pass(&mut self) -> Checked {
        self.come_and_go()?;
        let roll = self.random.below(1000);
        let setup = Arc::clone(&self.setup);
        let mut below = 0;
        let mut falls = |often: u64| {
            below += often;
            roll < below
        };
        if falls(setup.kills) {
            return self.end(Death::Kill);
        }
        if falls(setup.power_cuts) {
            return self.end(Death::PowerCut);
        }
        if falls(setup.link_cuts) {
            self.cut_link();
            return Ok(());
        }
        if falls(setup.partitions) {
            self.network.parted = !self.network.parted;
            self.note(&format!("parted: {}", self.network.parted));
            self.cut_link();
            return Ok(());
        }
        if falls(setup.faults) {
            self.arm_fault();
            return Ok(());
        }
        match self.random.below(100) {
            0..22 => self.guest(),
            22..48 => self.work(),
            48..53 => self.hear_primary(),
            53..68 => self.deliver_log(),
            68..78 => self.deliver_back(),
            78..82 => self.sync_replica(),
            82..85 => self.upkeep(),
            85 => self.maintain(),
            86..92 => {
                let millis = self.random.pick(&[1, 20, 300, 2000]);
                self.clock.advance(Duration::from_millis(millis));
                Ok(())
            }
            92..94 => self.look(),
            94 => self.watch(),
            95 => self.close(),
            96 => self.deliver_late(),
            97..99 => self.look_after(),
            _ => {
                self.request_cut();
                Ok(())
            }
        }
    }

    /// Processes begin, links are dialled, ends of lost ones notice, and what was said of the roles is obeyed.
    fn come_and_go(&mut self) -> Checked {
        for host in 0..2 {
            if !self.hosts[host].is_up() && self.random.percent(15) {
                self.wake(host)?;
            }
        }
        self.notice(30);
        if self.random.percent(25) {
            self.dial();
        }
        if self.random.percent(30) {
            self.obey()?;
        }
        if self.random.percent(30) {
            self.fold()?;
        }
        Ok(())
    }

    /// A host dies: now, or in the middle of what it does next.
    fn end(&mut self, death: Death) -> Checked {
        let host = self.random.index(2);
        self.dooms(host, death);
        self.bury()
    }

    fn dooms(&mut self, host: usize, death: Death) {
        if self.hosts[host].medium.is_dead() {
            return;
        }
        let calls = self.random.pick(&[0, 3, 12, 60]);
        let calls = self.random.below(calls + 1);
        self.note(&format!("{death:?} of host {host} after {calls} calls"));
        self.doom[host] = Some(death);
        self.hosts[host].medium.die_after(calls);
    }

    /// Ends processes that cannot do anything any more.
    fn bury(&mut self) -> Checked {
        for host in 0..2 {
            if self.hosts[host].medium.is_dead() {
                self.die(host)?;
            }
        }
        Ok(())
    }

    fn die(&mut self, host: usize) -> Checked {
        let death = self.doom[host].take().unwrap_or(Death::Kill);
        // A change of roles that was made is made, also if nobody came to look at it.
        self.observe(host)?;
        self.troubled[host] = self.hosts[host].medium.is_full();
        let kept = self.random.pick(&[0, 30, 50, 100]);
        let random = &mut self.random;
        match death {
            Death::Kill => {
                self.hosts[host].die();
                self.report.kills += 1;
            }
            Death::PowerCut => {
                self.hosts[host].lose_power(&mut || random.percent(kept))?;
                self.report.power_cuts += 1;
            }
        }
        let doubted = self.hosts[host].medium.take_doubt();
        self.loses_trust(host, doubted || death == Death::PowerCut);
        self.network.lost_host(host);
        self.note(&format!("host {host} died: {death:?}"));
        Ok(())
    }

    /// What was not flushed may be old or new when the host is back, if so.
    fn loses_trust(&mut self, host: usize, so: bool) {
        if let Some(truth) = &mut self.oracle.hosts[host].truth
            && so
        {
            truth.lost_power();
        }
    }

    /// The process dies before it does anything more.
    fn dies_now(&mut self, host: usize) {
        self.doom[host].get_or_insert(Death::Kill);
        self.hosts[host].medium.die_after(0);
    }

    /// A call of the storage will fail.
    fn arm_fault(&mut self) {
        let host = self.random.index(2);
        let medium = Arc::clone(&self.hosts[host].medium);
        let serves = self.hosts[host].serving().is_some();
        self.troubled[host] = true;
        self.report.faults += 1;
        let layered = self.hosts[host]
            .record()
            .is_some_and(|record| record.layers.is_some());
        if (!serves || layered) && self.random.percent(30) {
            let full = self.random.percent(60);
            medium.set_full(full);
            // A flush that finds no space for the map of a layer leaves the tracking unsure.
            self.calm &= !serves;
            self.note(&format!("the disk of host {host} is full: {full}"));
            return;
        }
        let kinds: &[Kind] = if serves {
            &[Kind::Image, Kind::Tracking, Kind::Ledger, Kind::Layer]
        } else {
            &[Kind::Log, Kind::Log, Kind::Image, Kind::Ledger]
        };
        let kind = self.random.pick(kinds);
        let fault = self
            .random
            .pick(&[Fault::Read, Fault::Write, Fault::Write, Fault::Sync]);
        self.calm &= !serves;
        let after = self.random.below(4);
        medium.fail(kind, fault, after);
        self.note(&format!(
            "host {host}: {fault:?} of {kind:?} fails after {after}"
        ));
        // Sooner or later somebody starts again what is in trouble.
        if self.random.percent(50) {
            self.doom[host] = Some(Death::Kill);
            medium.die_after(self.random.between(20, 200));
        }
    }

    /// An error is no wonder on a host that is dead or in trouble.
    fn excuse<T>(&self, host: usize, what: &str, done: Done<T>) -> Result<Option<T>, Broken> {
        match done {
            Ok(value) => Ok(Some(value)),
            Err(_) if self.troubled[host] || self.hosts[host].medium.is_dead() => Ok(None),
            Err(why) => Err(format!(
                "{what} failed on host {host} although nothing was wrong: {why}"
            )),
        }
    }

    /// The same for what may be refused.
    fn allow<T>(&mut self, host: usize, what: &str, asked: Asked<T>) -> Result<Option<T>, Broken> {
        self.observe(host)?;
        match asked {
            Ok(value) => Ok(Some(value)),
            Err(No::NotNow(why)) => {
                self.note(&format!("{what} is refused: {why}"));
                Ok(None)
            }
            Err(No::Failed(why)) => {
                self.note(&format!("{what} failed: {why}"));
                self.excuse(host, what, Err(why))
            }
        }
    }

    /// What a host did with its role so far, and the links that it has hung up.
    fn observe(&mut self, host: usize) -> Checked {
        for link in std::mem::take(&mut self.hosts[host].hung_up) {
            self.network.leave(link, host);
        }
        let Some(role) = self.hosts[host].role() else {
            return Ok(());
        };
        let turn = self.oracle.sees(host, role, self.taken)?;
        if turn == Turn::None {
            return Ok(());
        }
        self.note(&format!("host {host}: {turn:?}, {role:?}"));
        let report = &mut self.report;
        match turn {
            Turn::Promoted => report.failovers += 1,
            Turn::TookOver => report.planned += 1,
            Turn::Committed => report.commits += 1,
            Turn::Cancelled => report.cancels += 1,
            Turn::Returned => report.reversals += 1,
            Turn::Split => report.splits += 1,
            Turn::None | Turn::SteppedDown | Turn::Followed | Turn::Fenced => {}
        }
        Ok(())
    }

    fn wake(&mut self, host: usize) -> Checked {
        self.note(&format!("host {host} starts"));
        let woken = self.hosts[host].wake();
        if self.excuse(host, "P4: the start", woken)?.is_none() {
            self.hosts[host].process = None;
            return Ok(());
        }
        self.observe(host)?;
        if self.hosts[host].asks_first() {
            self.ask(host)?;
        }
        let arranged = self.hosts[host].arrange();
        if self.allow(host, "P4: the start", arranged)?.is_some() {
            self.check_serving(host)?;
            self.check_replica(host)?;
        }
        Ok(())
    }

    /// The host is stopped in good order; it starts again later.
    fn close(&mut self) -> Checked {
        let host = self.random.index(2);
        if !self.hosts[host].is_up() || self.random.percent(60) {
            return Ok(());
        }
        self.note(&format!("host {host} is stopped"));
        let how = self.random.pick(&[Unmount::IfUnused, Unmount::Detach]);
        let stopped = self.hosts[host].idle(how);
        if let Err(No::NotNow(_)) = stopped {
            return self.allow(host, "the stop", stopped).map(|_| ());
        }
        let clean = self.allow(host, "the stop", stopped)?.is_some();
        self.hosts[host].die();
        let doubted = self.hosts[host].medium.take_doubt();
        self.loses_trust(host, doubted && !clean);
        self.troubled[host] = self.hosts[host].medium.is_full();
        self.doom[host] = None;
        self.network.lost_host(host);
        Ok(())
    }

    /// The host that serves as the committed primary, if it is up.
    fn primary(&self) -> Option<usize> {
        (0..2).find(|&host| {
            let role = self.hosts[host].role();
            role.is_some_and(|role| role.part == Part::Primary)
        })
    }
}
