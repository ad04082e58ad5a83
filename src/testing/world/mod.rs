//! Two hosts, a network, a guest, and chance: one run of the simulation.

mod look;
mod talk;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use super::{
    Bug, Failure, Report,
    content::{SIZES, encode},
    host::{Done, Primary, Secondary, told},
    medium::{Fault, Kind},
    network::{Network, Side},
    oracle::{Broken, Oracle},
    random::Random,
    setup::Setup,
};
use crate::{
    base::{
        clock::{Clock, ManualClock},
        ids::Generation,
        units::{Extent, SECTOR_BYTES, to_u64},
    },
    disk::{Disk, Fua, Space},
    replica::Head,
};

/// Events of a run.
const STEPS: (u64, u64) = (100, 400);
/// Rounds after which two healthy hosts must have come together.
const ROUNDS_MAX: u32 = 4000;
/// Events that a failure shows.
const EVENTS_SHOWN: usize = 60;

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    Kill,
    PowerCut,
}

pub(super) fn run(seed: u64, bug: Option<Bug>) -> Result<Report, Failure> {
    let mut random = Random::new(seed);
    let setup = Arc::new(Setup::draw(&mut random, bug));
    let clock = Arc::new(ManualClock::default());
    let failed = |step, what, events| Failure {
        seed,
        step,
        what,
        events,
    };
    let primary =
        Primary::new(&setup, &clock, random.next()).map_err(|what| failed(0, what, Vec::new()))?;
    let mut world = World {
        generation: Generation::first(&*primary.ids),
        secondary: Secondary::new(&setup, random.next()),
        oracle: Oracle::new(setup.disks),
        primary,
        network: Network::default(),
        random,
        setup,
        clock,
        calm: true,
        troubled: [false; 2],
        doom: [None; 2],
        events: VecDeque::new(),
        report: Report::default(),
    };
    let done = world.live();
    world.report.epochs = to_u64(world.oracle.points());
    world.report.simulated = world.clock.monotonic();
    // Two runs that do the same calls on their disks did the same.
    world.trace(world.primary.medium.calls());
    world.trace(world.secondary.medium.calls());
    match done {
        Ok(()) => Ok(world.report),
        Err(what) => Err(failed(
            world.report.steps,
            what,
            world.events.into_iter().collect(),
        )),
    }
}

/// A run under way.
struct World {
    setup: Arc<Setup>,
    random: Random,
    clock: Arc<ManualClock>,
    generation: Generation,
    primary: Primary,
    secondary: Secondary,
    network: Network,
    oracle: Oracle,
    /// No call ever failed that leaves a host unsure of what it has.
    calm: bool,
    /// Whether a call may have failed in this life of the process: then errors are no wonder, wrong results still are.
    troubled: [bool; 2],
    /// How the process that is about to die will end.
    doom: [Option<Death>; 2],
    events: VecDeque<String>,
    report: Report,
}

type Checked = Result<(), Broken>;

impl World {
    fn live(&mut self) -> Checked {
        self.note(&format!("{:?}", self.setup));
        let steps = self.random.between(STEPS.0, STEPS.1);
        for _ in 0..steps {
            self.report.steps += 1;
            self.step()?;
            self.bury()?;
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

    fn step(&mut self) -> Checked {
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
            92..95 => self.look(),
            95 => self.watch(),
            96 => self.close_primary(),
            _ => {
                if let Some(serving) = &mut self.primary.process
                    && let Some(conversation) = &mut serving.conversation
                {
                    conversation.request_cut();
                    self.note("a cut is asked for");
                }
                Ok(())
            }
        }
    }

    /// Processes begin, links are dialled, and ends of lost ones notice.
    fn come_and_go(&mut self) -> Checked {
        if self.primary.process.is_none() && self.random.percent(15) {
            self.wake_primary()?;
        }
        if self.secondary.process.is_none() && self.random.percent(15) {
            self.wake_secondary()?;
        }
        self.notice(30);
        if self.random.percent(25) {
            self.dial();
        }
        Ok(())
    }

    /// A host dies: now, or in the middle of what it does next.
    fn end(&mut self, death: Death) -> Checked {
        let host = self.random.index(2);
        let calls = self.random.pick(&[0, 3, 12, 60]);
        let calls = self.random.below(calls + 1);
        self.note(&format!("{death:?} of host {host} after {calls} calls"));
        self.doom[host] = Some(death);
        let medium = [&self.primary.medium, &self.secondary.medium][host];
        medium.die_after(calls);
        self.bury()
    }

    /// Ends processes that cannot do anything any more.
    fn bury(&mut self) -> Checked {
        if self.primary.medium.is_dead() {
            self.die(0)?;
        }
        if self.secondary.medium.is_dead() {
            self.die(1)?;
        }
        Ok(())
    }

    fn die(&mut self, host: usize) -> Checked {
        let death = self.doom[host].take().unwrap_or(Death::Kill);
        let medium = [&self.primary.medium, &self.secondary.medium][host];
        self.troubled[host] = medium.is_full();
        let kept = self.random.pick(&[0, 30, 50, 100]);
        let random = &mut self.random;
        let mut kept = || random.percent(kept);
        match (death, host) {
            (Death::Kill, 0) => self.primary.die(),
            (Death::Kill, _) => self.secondary.die(),
            (Death::PowerCut, 0) => {
                self.primary.lose_power(&mut kept)?;
                self.oracle.truth.lost_power();
            }
            (Death::PowerCut, _) => self.secondary.lose_power(&mut kept),
        }
        match death {
            Death::Kill => self.report.kills += 1,
            Death::PowerCut => self.report.power_cuts += 1,
        }
        let side = [Side::Primary, Side::Replica][host];
        self.network.lost_host(side);
        self.note(&format!("{side:?} died: {death:?}"));
        Ok(())
    }

    /// A call of the storage will fail.
    fn arm_fault(&mut self) {
        let host = self.random.index(2);
        let medium = Arc::clone([&self.primary.medium, &self.secondary.medium][host]);
        self.troubled[host] = true;
        self.report.faults += 1;
        if host == 1 && self.random.percent(30) {
            let full = self.random.percent(60);
            medium.set_full(full);
            self.note(&format!("the replica's disk is full: {full}"));
            return;
        }
        let kinds: &[Kind] = match host {
            0 => &[Kind::Image, Kind::Tracking, Kind::Ledger],
            _ => &[Kind::Log, Kind::Log, Kind::Image, Kind::Ledger],
        };
        let kind = self.random.pick(kinds);
        let fault = self
            .random
            .pick(&[Fault::Read, Fault::Write, Fault::Write, Fault::Sync]);
        self.calm &= host != 0;
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
        let medium = [&self.primary.medium, &self.secondary.medium][host];
        match done {
            Ok(value) => Ok(Some(value)),
            Err(_) if self.troubled[host] || medium.is_dead() => Ok(None),
            Err(why) => Err(format!("{what} failed although nothing was wrong: {why}")),
        }
    }

    fn wake_primary(&mut self) -> Checked {
        self.note("the primary starts");
        let woken = self.primary.wake();
        if self
            .excuse(0, "P1: the start of the primary", woken)?
            .is_none()
        {
            self.primary.process = None;
            return Ok(());
        }
        self.check_primary()
    }

    /// The guest finds what it was told, and what differs from the replica is marked.
    fn check_primary(&mut self) -> Checked {
        let Some(serving) = &self.primary.process else {
            return Ok(());
        };
        let machine = Arc::clone(&serving.machine);
        let found = serving.read();
        let Some(found) = self.excuse(0, "reading the disks", found)? else {
            // What they hold is to be known before the guest goes on.
            self.doom[0].get_or_insert(Death::Kill);
            self.primary.medium.die_after(0);
            return Ok(());
        };
        self.oracle.truth.meets(&found)?;
        self.check_marks()?;
        if self.calm
            && let Some(reason) = machine.state().resync
        {
            return Err(format!("P3: a whole disk is owed: {reason:?}"));
        }
        Ok(())
    }

    fn check_marks(&self) -> Checked {
        let Some(serving) = &self.primary.process else {
            return Ok(());
        };
        let Some(lineage) = serving.machine.lineage() else {
            return Ok(());
        };
        let told = serving.machine.divergence();
        self.oracle.covers(lineage, &told)
    }

    fn wake_secondary(&mut self) -> Checked {
        self.note("the replica starts");
        let woken = self.secondary.wake();
        let woken = self.excuse(1, "P2: the start of the replica", woken)?;
        if woken.is_none() {
            self.secondary.process = None;
            return Ok(());
        }
        self.check_replica()
    }

    /// Nothing that was said is gone, and the points are in order.
    fn check_replica(&mut self) -> Checked {
        let Some(following) = &self.secondary.process else {
            return Ok(());
        };
        let head = following.store.head();
        self.oracle.holds(head.lineage())?;
        let points = following.store.points();
        let ordered = |pair: &[crate::replica::Point]| {
            pair[0].lineage.epoch < pair[1].lineage.epoch && pair[0].cut <= pair[1].cut
        };
        if !points.windows(2).all(ordered) {
            return Err(format!("P2: the points are not in order: {points:?}"));
        }
        match head {
            Head::Complete(lineage)
                if points.last().map(|point| point.lineage) != Some(lineage) =>
            {
                Err(format!("P2: the head {lineage:?} is no point: {points:?}"))
            }
            _ => Ok(()),
        }
    }

    fn guest(&mut self) -> Checked {
        let Some(serving) = &self.primary.process else {
            return Ok(());
        };
        let machine = Arc::clone(&serving.machine);
        let disk = self.random.index(self.setup.disks);
        let volume = &machine.volumes()[disk];
        if self.random.percent(15) {
            self.note(&format!("flush of disk {disk}"));
            let flushed = if self.setup.has(Bug::FlushIgnored) {
                Ok(())
            } else {
                volume.flush().map_err(told)
            };
            if self.excuse(0, "P4: a guest's flush", flushed)?.is_some() {
                self.oracle.truth.flushed(disk);
            }
            return Ok(());
        }
        let sectors = SIZES[disk] / SECTOR_BYTES;
        let first = if self.random.percent(80) {
            self.random.below(self.setup.spread.min(sectors))
        } else {
            self.random.below(sectors)
        };
        let len = self.random.pick(&[1, 8, 32, 32, 600]);
        let len = self.random.between(1, len).min(sectors - first);
        let run = Extent::new(first * SECTOR_BYTES, len * SECTOR_BYTES);
        let fua = if self.random.percent(10) {
            Fua::Yes
        } else {
            Fua::No
        };
        let zeros = self.random.percent(15);
        let number = if zeros { 0 } else { self.oracle.number() };
        let done = if zeros {
            let space = self.random.pick(&[Space::Release, Space::Keep]);
            volume.zero(run, space, fua)
        } else {
            volume.write_at(run.offset, &encode(disk, run, number), fua)
        };
        self.note(&format!("write {number} to disk {disk} {run:?} {fua:?}"));
        let told = self.excuse(0, "P4: a guest's write", done.map_err(told))?;
        let told = told.is_some();
        self.oracle.truth.write(disk, run, number, told, fua);
        if !told {
            // A guest whose write failed starts again, and looks at its disks.
            self.doom[0].get_or_insert(Death::Kill);
            self.primary.medium.die_after(0);
        }
        let preserved = machine.counters().preserve_bytes;
        if preserved > self.setup.preserve_bytes_max {
            return Err(format!("P8: {preserved} bytes are preserved"));
        }
        Ok(())
    }

    fn upkeep(&mut self) -> Checked {
        let Some(following) = &self.secondary.process else {
            return Ok(());
        };
        let store = Arc::clone(&following.store);
        let done = store.upkeep().map_err(told);
        if let Some(Some(done)) = self.excuse(1, "upkeep", done)? {
            self.note(&format!("{done:?}"));
            let status = store.status();
            if let Some(limit) = status.space_max
                && status.log_bytes > limit
            {
                return Err(format!(
                    "P8: {} bytes of logs, not {limit}",
                    status.log_bytes
                ));
            }
            return self.look();
        }
        Ok(())
    }

    fn maintain(&mut self) -> Checked {
        let Some(serving) = &self.primary.process else {
            return Ok(());
        };
        let maintained = serving.machine.maintain().map_err(told);
        self.note("regions cool");
        self.excuse(0, "maintenance", maintained).map(|_| ())
    }

    fn close_primary(&mut self) -> Checked {
        if self.primary.process.is_none() || self.random.percent(70) {
            return Ok(());
        }
        self.note("the primary is stopped");
        let id = self.talks_over(Side::Primary);
        let closed = self.primary.close();
        if let Some(id) = id {
            self.network.leave(id, Side::Primary);
        }
        self.excuse(0, "the stop of the primary", closed)
            .map(|_| ())
    }

    /// Everything is mended: both hosts start again and come together.
    fn heal(&mut self) -> Checked {
        self.note("everything is mended");
        for host in 0..2 {
            self.doom[host] = None;
            self.die(host)?;
        }
        self.primary.medium.mend();
        self.secondary.medium.mend();
        self.network.parted = false;
        let roomy = Setup {
            space_max: None,
            ..(*self.setup).clone()
        };
        self.secondary.setup = Arc::new(roomy);
        self.wake_primary()?;
        self.wake_secondary()?;
        for _ in 0..ROUNDS_MAX {
            self.report.steps += 1;
            self.notice(100);
            self.dial();
            self.work()?;
            self.hear_primary()?;
            self.deliver_log()?;
            self.sync_replica()?;
            self.deliver_back()?;
            self.clock.advance(Duration::from_millis(100));
            if let Some(head) = self.in_step() {
                return self.compare_all(head);
            }
        }
        Err("P3: two healthy hosts do not come together".into())
    }
}
