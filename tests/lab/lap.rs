//! A lap: load on all machines, faults, what an operator does meanwhile, and a comparison byte by byte in the end.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Seek as _, SeekFrom},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    thread,
};

use nix::fcntl::OFlag;
use understudy::{
    base::ids::{Lineage, Name},
    node::{
        control::{self, CancelRequest, TestRequest},
        status::TestStatus,
    },
};

use super::{
    fault::{Errand, Fault},
    guest::Guest,
    history::Seen,
    network::Weather,
    stage::{Known, LOOK, NODES, Stage},
};
use crate::support::{Aligned, open_direct, runtime};

/// Writes of each guest before anything goes wrong.
const WRITES_BEFORE: u64 = 30;
/// Unit of comparison, in bytes.
const PIECE: usize = 1 << 20;

/// A stage on which laps are run.
pub(super) struct Lab {
    pub(super) stage: Stage,
    /// How often what happened.
    pub(super) counts: BTreeMap<&'static str, u64>,
    /// What a lap is about, for whoever reads why it failed.
    pub(super) plan: String,
    /// How far the logs of the hosts were read.
    read: [u64; 2],
    /// Machines whose tracking may be lost, because a store had no space for it.
    excused: bool,
}

impl Lab {
    pub(super) fn new(seed: u64) -> Self {
        let mut lab = Self {
            stage: Stage::new(seed),
            counts: BTreeMap::new(),
            plan: "the first copy".into(),
            read: [0; 2],
            excused: false,
        };
        for machine in lab.machines() {
            lab.stage.protected(machine);
        }
        // The first copies.
        lab.excused = true;
        lab.look_at_logs();
        lab.excused = false;
        lab
    }

    pub(super) fn machines(&self) -> std::ops::Range<usize> {
        0..self.stage.machines.len()
    }

    pub(super) fn count(&mut self, what: &'static str, times: u64) {
        *self.counts.entry(what).or_default() += times;
    }

    pub(super) fn lap(&mut self) {
        let random = &mut self.stage.random;
        let faults: Vec<_> = (0..random.between(1, 2))
            .map(|_| Fault::draw(random))
            .collect();
        let errand = Errand::draw(random, self.stage.machines.len());
        let early = random.percent(50);
        let when = if early { "before" } else { "after" };
        let texts: Vec<_> = faults.iter().map(Fault::to_string).collect();
        self.plan = format!("{}; {errand:?} {when} it is mended", texts.join("; "));
        let mut hosts = Vec::new();
        for machine in self.machines() {
            hosts.push(self.rise(machine));
        }
        for fault in &faults {
            self.count(fault.name(), 1);
            self.strike(*fault);
            if !fault.cuts_links() && self.stage.random.percent(30) {
                let machine = self.stage.random.index(hosts.len());
                // Where it cannot be done now, it is refused.
                let _ = self.stage.cut(machine, hosts[machine]);
            }
        }
        self.count(errand.name(), 1);
        if early && Self::may_run(errand, &faults) {
            self.run(errand, &mut hosts);
            self.mend();
        } else {
            self.mend();
            self.run(errand, &mut hosts);
        }
        for machine in self.machines() {
            self.fall(machine);
        }
        self.look_at_logs();
        self.count("laps", 1);
    }

    /// Errands that need the network wait for it; a host without space is not asked to take machines.
    fn may_run(errand: Errand, faults: &[Fault]) -> bool {
        let full = |fault: &Fault| matches!(fault, Fault::Full(..));
        match errand {
            Errand::Watch => true,
            Errand::Test(_) => !faults.iter().any(Fault::cuts_links),
            Errand::Planned(..) | Errand::Lost(..) => {
                !faults.iter().any(|fault| fault.cuts_links() || full(fault))
            }
        }
    }

    /// A known point, and a guest that writes.
    fn rise(&mut self, machine: usize) -> usize {
        let host = self.stage.protected(machine);
        let it = &mut self.stage.machines[machine];
        it.history().fold();
        it.points.clear();
        it.synced = 0;
        let status = self.stage.look(machine, host).expect("it runs there");
        self.stage.machines[machine].strict = status.sync_on_flush.is_some();
        self.stage.cut_now(machine, host);
        self.stage.begin(machine, host);
        let guest = self.stage.machines[machine].guest();
        guest.expect("begun above").wait_written(WRITES_BEFORE);
        host
    }

    fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::Kill(nodes, back) => {
                for &node in nodes {
                    self.stage.kill(node);
                }
                thread::sleep(back);
                for &node in nodes {
                    self.stage.start(node);
                }
            }
            Fault::Pause(node, time) => {
                self.stage.node(node).pause();
                thread::sleep(time);
                self.stage.node(node).resume();
            }
            Fault::Links(_, weather, time) => {
                self.stage.set_weather(weather);
                thread::sleep(time);
            }
            Fault::Full(host, what, time) => {
                // A store that has no room for a record cannot promise that the next start needs no second copy.
                self.excused = true;
                self.stage.spaces[host][what].fill();
                thread::sleep(time);
            }
            Fault::Clock(node, seconds) => {
                self.stage.set_clock(node, seconds);
                thread::sleep(LOOK);
            }
        }
    }

    /// Links, space and clocks are as they should be.
    pub(super) fn mend(&mut self) {
        self.stage.set_weather(Weather::default());
        for space in self.stage.spaces.iter().flatten() {
            space.relieve();
        }
    }

    fn run(&mut self, errand: Errand, hosts: &mut [usize]) {
        match errand {
            Errand::Watch => {}
            Errand::Test(machine) => self.test_under_load(machine, hosts[machine]),
            Errand::Planned(machine, killed) => hosts[machine] = self.moves(machine, killed),
            Errand::Lost(host, keep) => self.loses(host, keep, hosts),
        }
    }

    /// A test failover to one of the known points, while the guest writes.
    fn test_under_load(&mut self, machine: usize, host: usize) {
        let points = &self.stage.machines[machine].points;
        let known = points[points.len() - 1];
        let Ok(test) = self.open_test(machine, 1 - host, known.point) else {
            // Thinned away, or the host has no room for a layer.
            return self.count("test failovers refused", 1);
        };
        self.stage.end(machine);
        self.judge(machine, &test.files, Some(known));
        self.close_test(machine, 1 - host, &test);
        self.stage.begin(machine, host);
    }

    /// All that the machine was told is there, and the replica holds the same, byte by byte, at a cut.
    fn fall(&mut self, machine: usize) {
        // A strict guest flushes again, and ends, when its replica is back.
        let host = self.stage.protected(machine);
        let guest = self.stage.machines[machine].guest();
        let errors = guest.map_or(0, Guest::errors);
        self.count("errors that guests saw", errors);
        self.stage.end(machine);
        let here = self.stage.disks(machine, host);
        // Of a write that got an error the guest learns by reading what became of it.
        let files: Vec<_> = here.iter().map(|disk| direct(disk)).collect();
        let settled = self.stage.machines[machine]
            .history()
            .settle(&files)
            .unwrap();
        let name = self.stage.machines[machine].name();
        settled.unwrap_or_else(|wrong| panic!("{name}, where it runs: {wrong}"));
        drop(files);
        let point = self.stage.cut_now(machine, host);
        let test = self
            .open_test(machine, 1 - host, point)
            .expect("the latest point can be looked at");
        let known = *self.stage.machines[machine]
            .points
            .last()
            .expect("cut above");
        self.judge(machine, &test.files, Some(known));
        let mut bytes = 0;
        for (ours, theirs) in here.iter().zip(&test.files) {
            bytes += compare(ours, theirs).unwrap_or_else(|wrong| panic!("{name}: {wrong}"));
        }
        self.count("bytes compared", bytes);
        self.close_test(machine, 1 - host, &test);
    }

    /// A view shows a prefix of the machine's history, and the right one.
    pub(super) fn judge(&mut self, machine: usize, view: &[PathBuf], known: Option<Known>) -> Seen {
        self.count("points compared", 1);
        let it = &mut self.stage.machines[machine];
        let name = it.name();
        let seen = it.history().seen(view);
        let seen = seen.unwrap_or_else(|wrong| panic!("{name} at {known:?}: {wrong}"));
        if let Some(known) = known {
            let holds = it.history().holds(seen, known.from);
            assert!(
                holds && seen.last <= known.to,
                "{name}: {known:?} shows {seen:?}"
            );
        }
        seen
    }

    fn open_test(
        &self,
        machine: usize,
        replica: usize,
        point: Lineage,
    ) -> Result<TestStatus, String> {
        let name = Name::new(self.stage.machines[machine].name()).unwrap();
        let request = TestRequest {
            point: Some(point.epoch),
            ..TestRequest::default()
        };
        let socket = self.stage.node(replica).socket();
        let test = runtime().block_on(control::ask_test(socket, &name, request));
        let test = test.map_err(|error| error.to_string())?;
        assert_eq!(
            test.point, point,
            "equal epochs of one history are the same point"
        );
        Ok(test)
    }

    fn close_test(&self, machine: usize, replica: usize, test: &TestStatus) {
        let request = CancelRequest {
            number: Some(test.number),
            ..CancelRequest::default()
        };
        self.cancel(machine, replica, request)
            .expect("a test is ended");
    }

    pub(super) fn cancel(
        &self,
        machine: usize,
        host: usize,
        request: CancelRequest,
    ) -> Result<(), String> {
        let name = Name::new(self.stage.machines[machine].name()).unwrap();
        let socket = self.stage.node(host).socket();
        let cancelled = runtime().block_on(control::ask_cancel(socket, &name, request));
        cancelled.map(drop).map_err(|error| error.to_string())
    }

    /// What the hosts logged since the last look: no panic, and nothing is copied a second time where that is promised.
    fn look_at_logs(&mut self) {
        for (host, name) in NODES.iter().enumerate().take(2) {
            let mut file = fs::File::open(self.stage.log(host)).unwrap();
            file.seek(SeekFrom::Start(self.read[host])).unwrap();
            let mut text = String::new();
            self.read[host] += u64::try_from(file.read_to_string(&mut text).unwrap()).unwrap();
            let line = |words: &str| {
                text.lines()
                    .find(|line| line.contains(words))
                    .map(str::to_owned)
            };
            if let Some(line) = line("panicked at") {
                panic!("{name}: {line}");
            }
            for words in [
                "reconciled=CopyNeeded",
                "a resync is needed",
                "blocks are sent again",
            ] {
                let Some(line) = line(words) else { continue };
                assert!(self.excused, "{name}: {line}");
                self.count("second copies and resyncs after a full disk", 1);
            }
        }
        self.excused = false;
    }
}

/// Opens a disk past the page cache.
fn direct(disk: &Path) -> fs::File {
    let opened = open_direct(disk, OFlag::empty());
    opened.unwrap_or_else(|error| panic!("{}: {error}", disk.display()))
}

/// Compares two disks; how many bytes that were.
fn compare(ours: &Path, theirs: &Path) -> Result<u64, String> {
    let (here, there) = (direct(ours), direct(theirs));
    let (mut one, mut other) = (Aligned::new(PIECE), Aligned::new(PIECE));
    let mut compared = 0;
    loop {
        let [len, other_len] = [(&here, &mut one), (&there, &mut other)].map(|(file, buffer)| {
            file.read_at(buffer.get_mut(), compared)
                .map_err(|error| error.to_string())
        });
        let (len, other_len) = (len?, other_len?);
        if one.get()[..len] != other.get()[..other_len] {
            return Err(format!(
                "{} and {} differ near byte {compared}",
                ours.display(),
                theirs.display()
            ));
        }
        if len == 0 {
            return Ok(compared);
        }
        compared += u64::try_from(len).unwrap();
    }
}
