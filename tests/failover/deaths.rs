//! Deaths in the middle of a change of roles: SIGKILL of either host at each step that a host logs, and at moments in
//! between. After each one the host is started again, the verb is repeated where it was not done, and the machine is
//! protected: one primary, one replica, everything that was acknowledged, once.

use std::{
    fmt,
    io::{self, Write as _},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use understudy::{
    coord::{role::Part, state::ReplicationState},
    storage::{file::FileFolder, ledger::Ledger},
};

use super::roles::{Files, Pair, check, epoch, planned, verb, write};
use super::tests::{call, mark, marked};
use crate::support::{MACHINE, Node, PROGRAM, can_mount};

/// How long anything may take before a test gives up; it is no measure of speed.
const PATIENCE: Duration = Duration::from_mins(2);
/// Between two looks at a log: less than a step that is made durable takes.
const GLANCE: Duration = Duration::from_millis(1);
const LOOK: Duration = Duration::from_millis(20);
/// A block that a primary writes last, when its replica does not hear it any more.
const APART: u64 = 3000;

const PLANNED: [&str; 3] = ["failover", MACHINE, "--planned"];
// Forced: a host that is dead is not noticed for as long as a link may be silent.
const UNPLANNED: [&str; 4] = ["failover", MACHINE, "--unplanned", "--force"];
const COMMIT: [&str; 2] = ["commit", MACHINE];
const CANCEL: [&str; 2] = ["cancel", MACHINE];
const REVERSE: [&str; 2] = ["reverse", MACHINE];

// What a host logs when a step is durable. Parts are logged as what was and what is.
const STEPPED_DOWN: &str = "\"a primary that stepped down\"";
const PRIMARY: &str = "\"the primary\"";
const REPLICA: &str = "\"a replica\"";
const FAILED_OVER: &str = "\"in a failover that is not committed\"";
const RETURNING: &str = "\"about to become a replica\"";
const ADOPTED: &str = "images adopted";
const SETTLES: &str = "settles on a recovery point";
const RETIRED: &str = "replica retired";
const FOLDED: &str = "folded into the images";
const TOLD: &str = "tells the new primary where";
const OWED: &str = "the former primary may differ in these";

/// A host, by what it is when a lap begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Host {
    Source,
    Target,
}
use Host::{Source, Target};

/// The moment at which a host is killed.
#[derive(Clone, Copy)]
enum When {
    /// As soon as a host logs this once more.
    Logs(Host, &'static str),
    /// So many milliseconds after the verb was sent.
    After(u64),
}
use When::{After, Logs};

impl fmt::Debug for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Logs(host, words) => write!(f, "when the {host:?} logs {words}"),
            After(millis) => write!(f, "after {millis} ms"),
        }
    }
}

/// A machine on two hosts, what it should hold, and where it is.
struct Stage {
    pair: Pair,
    nodes: [Option<Node>; 2],
    source: usize,
    number: u8,
    apart: u8,
}

impl Stage {
    fn new() -> Self {
        let pair = Pair::new();
        let nodes = [Some(pair.alpha()), Some(pair.beta())];
        let mut stage = Self {
            pair,
            nodes,
            source: 0,
            number: 0,
            apart: 0,
        };
        stage.protected();
        stage
    }

    fn index(&self, host: Host) -> usize {
        match host {
            Source => self.source,
            Target => 1 - self.source,
        }
    }

    fn node(&self, host: Host) -> &Node {
        let node = self.nodes[self.index(host)].as_ref();
        node.expect("the host lives")
    }

    fn start(&mut self, host: Host) {
        let index = self.index(host);
        let node = [Pair::alpha, Pair::beta][index](&self.pair);
        self.nodes[index] = Some(node);
    }

    fn kill(&mut self, host: Host) {
        let index = self.index(host);
        self.nodes[index].take().expect("the host lives").kill();
    }

    fn files(&self, host: Host) -> Files {
        [Pair::on_alpha, Pair::on_beta][self.index(host)](&self.pair)
    }

    fn part(&self, host: Host) -> Part {
        self.node(host).machine().part.unwrap()
    }

    fn heard(&self, when: When) -> usize {
        match when {
            Logs(host, words) => self.node(host).log().matches(words).count(),
            After(_) => 0,
        }
    }

    fn send(&self, asked: Host, args: &[&str]) -> Child {
        Command::new(PROGRAM)
            .args(args)
            .arg("--control")
            .arg(self.node(asked).socket())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Waits for the moment, kills the host and starts it again.
    fn dies(&mut self, victim: Host, when: When, heard: usize, asked: Option<&mut Child>) -> bool {
        let began = Instant::now();
        match when {
            Logs(..) => {
                while self.heard(when) == heard {
                    assert!(began.elapsed() < PATIENCE, "not {when:?}");
                    std::thread::sleep(GLANCE);
                }
            }
            After(millis) => std::thread::sleep(Duration::from_millis(millis)),
        }
        let done = asked.is_some_and(|verb| verb.try_wait().unwrap().is_some());
        self.kill(victim);
        if matches!(when, Logs(_, RETIRED)) {
            self.forget_settling(victim);
        }
        self.start(victim);
        done
    }

    /// Puts the record of a dead host back to where it was between retiring the replica and recording that: a moment that
    /// is too short to be met by a kill.
    fn forget_settling(&self, host: Host) {
        let store = ["alpha-store", "beta-store"][self.index(host)];
        let folder = FileFolder::open(&self.pair.hosts.path(store)).unwrap();
        let ledger = Ledger::open_in(&folder, "node.redb").unwrap();
        let key = format!("role/{MACHINE}");
        let mut record: serde_json::Value = ledger.get(&key).unwrap().unwrap();
        // Where the fold was faster than the kill, there are no layers any more.
        if let Some(settled) = record.pointer_mut("/layers/settled") {
            say(&format!("settled: {settled}, and forgotten"));
            *settled = false.into();
            ledger.put(&key, &record).unwrap();
        }
    }

    /// Kills a host in the middle of a verb and starts it again; whether the verb had returned before.
    fn cut_short(&mut self, asked: Host, args: &[&str], victim: Host, when: When) -> bool {
        let host = self.index(asked);
        say(&format!(
            "{args:?} of the {asked:?}, host {host}: the {victim:?} dies {when:?}"
        ));
        let heard = self.heard(when);
        let mut child = self.send(asked, args);
        let done = self.dies(victim, when, heard, Some(&mut child));
        child.wait().unwrap();
        done
    }

    /// Marks the machine, and makes a point of it.
    fn epoch(&mut self) {
        self.number += 1;
        epoch(self.node(Source), &self.files(Source), self.number);
    }

    /// Waits until one host is the primary, with nothing left to do, and the other one its replica; the disks hold what
    /// they should. From here on that primary is the source.
    fn protected(&mut self) {
        let began = Instant::now();
        loop {
            let looks = [0, 1].map(|index: usize| {
                let status = self.nodes[index].as_ref().expect("lives").status();
                status.machines.into_iter().next()
            });
            let is = |index: usize, part: Part| {
                looks[index].as_ref().is_some_and(|machine| {
                    let fine = part != Part::Primary || machine.reasons.is_empty();
                    fine && machine.part == Some(part)
                        && machine.state == ReplicationState::Replicating
                })
            };
            let replica = Part::Replica { abandoned: false };
            let found = [0, 1]
                .into_iter()
                .find(|&index| is(index, Part::Primary) && is(1 - index, replica));
            if let Some(primary) = found {
                self.source = primary;
                break;
            }
            assert!(began.elapsed() < PATIENCE, "not protected: {looks:#?}");
            std::thread::sleep(LOOK);
        }
        self.holds(Source);
    }

    fn holds(&self, host: Host) {
        let files = self.files(host);
        check(&files, self.number);
        assert_eq!(marked(&files[0], APART), self.apart);
    }

    /// A planned failover with a death in it. Whether the verb had returned before.
    fn planned_dies(&mut self, victim: Host, when: When) -> bool {
        self.epoch();
        // Acknowledged to the guest and not sent yet.
        self.number += 1;
        write(&self.files(Source), self.number);
        let from = self.source;
        let done = self.cut_short(Source, &PLANNED, victim, when);
        self.protected();
        if self.source == from {
            assert!(!done, "the verb had returned");
            planned(self.node(Source));
            self.protected();
        }
        assert_ne!(self.source, from);
        done
    }

    /// The source is lost with writes that nobody else has; the target is failed over to, and dies in that.
    fn loses_its_primary(&mut self, when: When) {
        self.epoch();
        self.node(Target).pause();
        mark(&self.files(Source)[0], APART, self.apart + 1);
        self.kill(Source);
        self.node(Target).resume();
        self.cut_short(Target, &UNPLANNED, Target, when);
        verb(self.node(Target), &UNPLANNED);
        self.holds(Target);
    }

    /// The target is kept, with a death in it; then the source returns, with another.
    fn is_replaced(&mut self, promoted: When, committed: When, (victim, returned): (Host, When)) {
        self.loses_its_primary(promoted);
        self.number += 1;
        write(&self.files(Target), self.number);
        self.cut_short(Target, &COMMIT, Target, committed);
        verb(self.node(Target), &COMMIT);
        self.holds(Target);
        self.start(Source);
        self.node(Source).wait("fencing", |machine| {
            matches!(machine.part, Some(Part::Fenced { .. }))
        });
        self.cut_short(Source, &REVERSE, victim, returned);
        if matches!(self.part(Source), Part::Fenced { .. }) {
            verb(self.node(Source), &REVERSE);
        }
        let lost = self.source;
        self.protected();
        assert_ne!(self.source, lost);
    }

    /// The failover is cancelled, with a death in it, and the source takes the machine back.
    fn is_taken_back(&mut self, promoted: When, cancelled: When, early: bool) {
        self.loses_its_primary(promoted);
        // Gone with the cancel.
        write(&self.files(Target), self.number + 1);
        let source = self.source;
        if early {
            self.start(Source);
            self.node(Source).wait("fencing", |machine| {
                matches!(machine.part, Some(Part::Fenced { .. }))
            });
        }
        self.cut_short(Target, &CANCEL, Target, cancelled);
        if matches!(self.part(Target), Part::FailedOver { .. }) {
            assert_eq!(call(self.node(Target), &CANCEL).0, 0);
        }
        if !early {
            self.start(Source);
        }
        self.apart += 1;
        self.protected();
        assert_eq!(self.source, source);
    }

    /// A hand-over that the target did not hear is taken back, with a death in it.
    fn reclaims(&mut self, victim: Host) {
        self.epoch();
        let source = self.source;
        let (stepped, taken) = (Logs(Source, STEPPED_DOWN), Logs(Target, PRIMARY));
        let (before, not_taken) = (self.heard(stepped), self.heard(taken));
        let mut child = self.send(Source, &PLANNED);
        while self.heard(stepped) == before {
            std::thread::sleep(GLANCE);
        }
        self.node(Target).pause();
        assert_eq!(
            self.heard(taken),
            not_taken,
            "a hand-over takes longer than a glance"
        );
        let consent = Logs(Target, REPLICA);
        let heard = self.heard(consent);
        self.kill(Target);
        child.wait().unwrap();
        assert_eq!(call(self.node(Source), &CANCEL).0, 0);
        assert!(matches!(self.part(Source), Part::SteppedDown { .. }));
        self.start(Target);
        say(&format!(
            "a hand-over is taken back: the {victim:?} dies {consent:?}"
        ));
        self.dies(victim, consent, heard, None);
        self.protected();
        assert_eq!(self.source, source);
    }

    /// The machine goes home, and both hosts hold the same.
    fn end(mut self) {
        if self.source == 1 {
            planned(self.node(Source));
            self.protected();
        }
        self.epoch();
        // Nothing is merged over a rescue point; where there is none, this is refused.
        call(self.node(Target), &["cancel", MACHINE, "--rescue"]);
        let [alpha, beta] = self.nodes.map(|node| node.expect("lives"));
        self.pair.end(alpha, beta);
    }
}

/// For whoever reads why a test failed.
fn say(what: &str) {
    let _ = writeln!(io::stderr(), "{what}");
}

#[test]
fn a_planned_failover_survives_the_death_of_either_host_at_each_step() {
    if !can_mount() {
        return;
    }
    let mut stage = Stage::new();
    for (victim, when) in [
        (Target, Logs(Target, RETIRED)),
        (Source, Logs(Source, STEPPED_DOWN)),
        (Source, Logs(Target, PRIMARY)),
        (Source, Logs(Source, REPLICA)),
        (Source, Logs(Source, ADOPTED)),
        (Target, Logs(Source, STEPPED_DOWN)),
        (Target, Logs(Target, PRIMARY)),
        (Target, Logs(Source, ADOPTED)),
        (Target, Logs(Target, SETTLES)),
        (Target, Logs(Target, RETIRED)),
        (Target, Logs(Target, FOLDED)),
    ] {
        stage.planned_dies(victim, when);
    }
    stage.end();
}

/// Kills at growing delays until the verb had returned before, twice for each host.
fn sweep(step: u64) {
    let mut stage = Stage::new();
    for victim in [Source, Target, Source, Target] {
        let mut delay = step / 2;
        while !stage.planned_dies(victim, After(delay)) {
            delay += step;
        }
    }
    stage.end();
}

#[test]
fn a_planned_failover_survives_a_death_at_any_moment() {
    if can_mount() {
        sweep(150);
    }
}

#[test]
#[ignore = "hundreds of failovers: for a change of how roles are kept"]
fn a_planned_failover_survives_a_death_at_every_moment() {
    if can_mount() {
        sweep(5);
    }
}

#[test]
fn an_unplanned_failover_and_its_reversal_survive_a_death_at_each_step() {
    if !can_mount() {
        return;
    }
    let mut stage = Stage::new();
    for (promoted, committed, (victim, returned)) in [
        (
            Logs(Target, FAILED_OVER),
            Logs(Target, PRIMARY),
            (Source, Logs(Source, RETURNING)),
        ),
        (
            After(5),
            Logs(Target, SETTLES),
            (Source, Logs(Source, TOLD)),
        ),
        (
            After(20),
            Logs(Target, RETIRED),
            (Source, Logs(Source, REPLICA)),
        ),
        (
            After(60),
            Logs(Target, FOLDED),
            (Source, Logs(Source, ADOPTED)),
        ),
        (After(40), After(5), (Target, Logs(Target, OWED))),
        (After(80), After(15), (Target, Logs(Source, REPLICA))),
    ] {
        stage.is_replaced(promoted, committed, (victim, returned));
    }
    stage.end();
}

#[test]
fn a_failover_that_is_taken_back_survives_a_death_at_each_step() {
    if !can_mount() {
        return;
    }
    let mut stage = Stage::new();
    stage.is_taken_back(Logs(Target, FAILED_OVER), Logs(Target, REPLICA), false);
    stage.is_taken_back(After(30), After(5), true);
    stage.is_taken_back(After(10), After(40), false);
    planned(stage.node(Source));
    stage.protected();
    stage.is_taken_back(After(50), Logs(Target, REPLICA), true);
    stage.end();
}

#[test]
fn a_hand_over_that_is_taken_back_survives_the_death_of_either_host() {
    if !can_mount() {
        return;
    }
    let mut stage = Stage::new();
    stage.reclaims(Source);
    stage.reclaims(Target);
    stage.end();
}
