//! A host dies in the middle of a job, or the host and the coordinator in one process. After a restart the job is done, or
//! nothing of it is left.

use std::{
    fs,
    io::{self, Write as _},
    time::Instant,
};

use understudy::{
    coord::{job::Outcome, role::Part},
    node::status::MachineStatus,
};

use super::stage::{
    GLANCE, MACHINES, PATIENCE, Stage, check, does, ended, machine, part, protected,
    protected_somewhere, write,
};
use crate::support::{Node, can_mount, send};

// What a host logs when a step is durable.
const STEPPED_DOWN: &str = "is=\"a primary that stepped down\"";
const PRIMARY: &str = "is=\"the primary\"";
const REPLICA: &str = "is=\"a replica\"";
const FAILED_OVER: &str = "is=\"in a failover that is not committed\"";
const RETURNING: &str = "is=\"about to become a replica\"";
const TEST: &str = "test failover machine=";
const TEST_ENDED: &str = "test failover ended";

/// Both hosts, what drives them, and how far it is.
struct Hosts {
    stage: Stage,
    nodes: [Option<Node>; 2],
    coord: Node,
    plan: String,
    jobs: u64,
}

impl Hosts {
    fn new() -> Self {
        let stage = Stage::new();
        let nodes = [Some(stage.alpha()), Some(stage.beta())];
        let coord = stage.coordinator();
        let group = "[[group]]\nname = \"g\"\nmachines = [\"db\", \"web\"]\n";
        let plan = stage.plan("all", group);
        let hosts = Self {
            stage,
            nodes,
            coord,
            plan,
            jobs: 0,
        };
        hosts.protected();
        hosts
    }

    fn node(&self, host: usize) -> &Node {
        self.nodes[host].as_ref().expect("the host lives")
    }

    fn start(&mut self, host: usize) {
        let start = [Stage::alpha, Stage::beta][host];
        self.nodes[host] = Some(start(&self.stage));
    }

    fn kill(&mut self, host: usize) {
        self.nodes[host].take().expect("the host lives").kill();
    }

    /// The host that serves both machines.
    fn protected(&self) -> usize {
        protected_somewhere([self.node(0), self.node(1)])
    }

    /// The verb and the options of a plan, and the plan.
    fn args<'a>(&'a self, args: &[&'a str]) -> Vec<&'a str> {
        [&["plan"], args, &[&self.plan]].concat()
    }

    /// Runs the plan; `victim` is killed as soon as `watched` logs these words, and started again.
    fn dies(&mut self, args: &[&str], victim: usize, (watched, words): (usize, &str)) -> Outcome {
        let _ = writeln!(
            io::stderr(),
            "{args:?}: host {victim} dies when host {watched} logs {words}"
        );
        let heard = self.node(watched).log().matches(words).count();
        let mut verb = send(&self.coord, &self.args(args));
        let began = Instant::now();
        while self.node(watched).log().matches(words).count() == heard {
            assert!(began.elapsed() < PATIENCE, "not logged: {words}");
            std::thread::sleep(GLANCE);
        }
        self.kill(victim);
        self.start(victim);
        self.jobs += 1;
        let (outcome, _) = ended(&self.coord, self.jobs);
        verb.wait().unwrap();
        outcome
    }

    /// Runs the plan to its end.
    fn run(&mut self, args: &[&str]) {
        self.jobs += 1;
        does(&self.coord, &self.args(args));
    }

    fn hold(&self, host: usize, number: u8) {
        for machine in MACHINES {
            check(&self.stage.disk(host, machine), number);
        }
    }
}

#[test]
fn a_planned_plan_survives_the_death_of_either_host_at_each_step() {
    if !can_mount() {
        return;
    }
    let mut hosts = Hosts::new();
    let mut number = 0;
    for (dies_source, source_logs, words) in [
        (true, true, STEPPED_DOWN),
        (false, true, STEPPED_DOWN),
        (true, false, PRIMARY),
        (false, false, PRIMARY),
        (true, true, REPLICA),
        (false, true, REPLICA),
    ] {
        let source = hosts.protected();
        let at = |is_source: bool| if is_source { source } else { 1 - source };
        let to = ["alpha", "beta"][1 - source];
        number += 1;
        for machine in MACHINES {
            write(&hosts.stage.disk(source, machine), number);
        }
        let planned = ["run", "--planned", "--to", to];
        let outcome = hosts.dies(&planned, at(dies_source), (at(source_logs), words));
        if outcome == Outcome::Failed {
            // Nothing is half done: each machine is where it was or where it is to be, and the plan is run again.
            for machine in MACHINES {
                let parts = [0, 1].map(|host| part(hosts.node(host), machine));
                let primaries = parts.iter().filter(|part| **part == Some(Part::Primary));
                assert_eq!(primaries.count(), 1, "{parts:?}");
            }
            protected_or_moved(&hosts);
            hosts.run(&planned);
        }
        assert_eq!(hosts.protected(), 1 - source);
        hosts.hold(1 - source, number);
    }
}

/// Waits until each machine has a replica that follows, wherever it runs.
fn protected_or_moved(hosts: &Hosts) {
    let follows = |machine: &str| {
        let parts = [0, 1].map(|host| part(hosts.node(host), machine));
        parts.contains(&Some(Part::Replica { abandoned: false }))
    };
    let began = Instant::now();
    while !MACHINES.iter().all(|machine| follows(machine)) {
        assert!(began.elapsed() < PATIENCE, "no replica follows");
        std::thread::sleep(GLANCE);
    }
    for host in [0, 1] {
        hosts.node(host).wait_replicating();
    }
}

#[test]
fn an_unplanned_plan_a_reversal_and_a_test_survive_the_death_of_a_host() {
    if !can_mount() {
        return;
    }
    let mut hosts = Hosts::new();
    for machine in MACHINES {
        write(&hosts.stage.disk(0, machine), 1);
    }
    hosts.stage.cut(0);
    // A test that was begun or is being ended comes back with its host, and is ended all the same.
    for words in [TEST, TEST_ENDED] {
        assert_eq!(hosts.dies(&["test"], 1, (1, words)), Outcome::Done);
        for name in MACHINES {
            assert_eq!(machine(hosts.node(1), name).unwrap().tests, []);
        }
    }
    assert_eq!(hosts.protected(), 0);
    hosts.kill(0);
    let unplanned = ["run", "--unplanned", "--force"];
    let done = Outcome::Done;
    assert_eq!(hosts.dies(&unplanned, 1, (1, FAILED_OVER)), done);
    hosts.hold(1, 1);
    // Taken back, and failed over once more.
    assert_eq!(hosts.dies(&["run", "--cancel"], 1, (1, REPLICA)), done);
    hosts.run(&unplanned);
    assert_eq!(hosts.dies(&["run", "--commit"], 1, (1, PRIMARY)), done);
    hosts.hold(1, 1);
    hosts.start(0);
    for machine in MACHINES {
        hosts.node(0).wait("fencing", |m| {
            m.name.as_str() == machine && matches!(m.part, Some(Part::Fenced { .. }))
        });
    }
    assert_eq!(hosts.dies(&["run", "--reverse"], 0, (0, RETURNING)), done);
    assert_eq!(hosts.protected(), 1);
    hosts.hold(1, 1);
}

#[test]
fn a_job_of_the_host_that_hands_over_goes_on_with_it() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new();
    let beta = stage.beta();
    let mut alpha = stage.alpha_coordinating();
    for (id, words) in (1u8..).zip(["begins: ", STEPPED_DOWN, REPLICA]) {
        protected(&alpha, &beta);
        for machine in MACHINES {
            write(&stage.disk(0, machine), id);
        }
        let heard = alpha.log().matches(words).count();
        let mut verb = send(&alpha, &["failover", "web", "--planned"]);
        while alpha.log().matches(words).count() == heard {
            std::thread::sleep(GLANCE);
        }
        alpha.kill();
        // It may have noticed.
        let _ = verb.kill();
        verb.wait().unwrap();
        alpha = stage.alpha_coordinating();
        let (outcome, job) = ended(&alpha, u64::from(id) * 2 - 1);
        assert_eq!(outcome, Outcome::Done, "{job:#?}");
        check(&stage.disk(1, "web"), id);
        // Home again, from where it is driven.
        let web = |m: &MachineStatus| m.name.as_str() == "web" && m.reasons.is_empty();
        beta.wait("a primary", |m| web(m) && m.part == Some(Part::Primary));
        let follows = Some(Part::Replica { abandoned: false });
        alpha.wait("a replica", |m| web(m) && m.part == follows);
        alpha.wait_replicating();
        does(&alpha, &["failover", "web", "--planned"]);
    }
    protected(&alpha, &beta);
}

#[test]
fn a_script_that_a_dead_coordinator_left_is_killed_before_it_is_begun_again() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new();
    let (alpha, beta) = (stage.alpha(), stage.beta());
    let coord = stage.coordinator();
    protected(&alpha, &beta);
    // The first attempt hangs, and must not be there when the second one begins.
    let runs = stage.hosts.path("runs");
    fs::write(&runs, "").unwrap();
    let text = format!(
        "for pid in $(cat {0}); do [ \"$(tr -d '\\0' < /proc/$pid/cmdline)\" ] && exit 9; done\n\
         echo $$ >> {0}\n[ $UNDERSTUDY_ATTEMPT = 1 ] && sleep 1000\nexit 0",
        runs.display()
    );
    let script = stage.script("script", &text);
    let group = format!(
        "[[group]]\nname = \"g\"\nmachines = [\"db\"]\n[group.test]\npre = [{{ run = [{script:?}] }}]\n"
    );
    let plan = stage.plan("hangs", &group);
    let mut verb = send(&coord, &["plan", "test", &plan]);
    let lines = || fs::read_to_string(&runs).unwrap().lines().count();
    while lines() == 0 {
        std::thread::sleep(GLANCE);
    }
    coord.kill();
    verb.kill().unwrap();
    verb.wait().unwrap();
    let coord = stage.coordinator();
    let (outcome, job) = ended(&coord, 1);
    assert_eq!(outcome, Outcome::Done, "{job:#?}");
    assert_eq!(lines(), 2);
}
