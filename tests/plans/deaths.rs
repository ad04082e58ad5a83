//! The coordinator dies at each step of its jobs, and goes on when it is started again.

use std::{
    io::{self, Write as _},
    time::Instant,
};

use understudy::coord::{
    job::{Outcome, StepState},
    role::Part,
};

use super::stage::{
    GLANCE, MACHINES, PATIENCE, Stage, check, ended, machine, part, protected, write,
};
use crate::support::{Node, call, can_mount, send};

/// What a coordinator logs when something of a job is durable.
const MOMENTS: [(&str, usize); 6] = [
    ("begins a job", 1),
    ("begins: ", 1),
    ("begins: ", 2),
    ("done: ", 1),
    ("done: ", 2),
    ("begins: ", 4),
];

/// Sends a verb, kills the coordinator as soon as it has logged these words so often, and starts it again.
fn dies(stage: &Stage, coord: Node, args: &[&str], (words, times): (&str, usize)) -> Node {
    let _ = writeln!(
        io::stderr(),
        "{args:?}: the coordinator dies at {words:?}, time {times}"
    );
    let before = coord.log().matches(words).count();
    let mut verb = send(&coord, args);
    let began = Instant::now();
    while coord.log().matches(words).count() < before + times {
        assert!(
            began.elapsed() < PATIENCE,
            "not logged: {words} {times} times"
        );
        std::thread::sleep(GLANCE);
    }
    coord.kill();
    let coord = stage.coordinator();
    // It waits for the job, or has lost its way to it.
    let _ = verb.kill();
    verb.wait().unwrap();
    coord
}

#[test]
fn a_plan_goes_on_after_the_coordinator_died_at_each_step() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new();
    let (alpha, beta) = (stage.alpha(), stage.beta());
    let mut coord = stage.coordinator();
    let runs = stage.hosts.path("runs");
    let script = stage.script(
        "script",
        &format!("echo $UNDERSTUDY_JOB >> {}", runs.display()),
    );
    let plan = stage.plan(
        "shop",
        &format!(
            "[[group]]\nname = \"one\"\nmachines = [\"db\"]\n[group.planned]\npre = [{{ run = [{script:?}] }}]\n\
             [[group]]\nname = \"two\"\nmachines = [\"web\"]\n[group.planned]\npost = [{{ run = [{script:?}] }}]\n"
        ),
    );
    protected(&alpha, &beta);
    for (id, moment) in (1u8..).zip(MOMENTS) {
        let (from, to) = if id % 2 == 1 {
            ((&alpha, 0), (&beta, 1))
        } else {
            ((&beta, 1), (&alpha, 0))
        };
        for machine in MACHINES {
            write(&stage.disk(from.1, machine), id);
        }
        coord = dies(&stage, coord, &["plan", "run", &plan, "--planned"], moment);
        let (outcome, job) = ended(&coord, id.into());
        assert_eq!(outcome, Outcome::Done, "{job:#?}");
        assert_eq!(job.job.steps().count(), 4);
        protected(to.0, from.0);
        for machine in MACHINES {
            check(&stage.disk(to.1, machine), id);
        }
        // Each machine was moved once, each script was run at least once and no more often than it was begun.
        let generations =
            MACHINES.map(|name| machine(to.0, name).unwrap().generation.unwrap().number);
        assert_eq!(generations, [u64::from(id) + 1; 2]);
        let begun: u32 = job.job.steps().map(|(_, step)| step.attempts).sum();
        assert!(
            (4..=5).contains(&begun),
            "only the step under way is begun again: {begun}"
        );
        let text = std::fs::read_to_string(&runs).unwrap();
        let runs = text.lines().filter(|line| *line == id.to_string()).count();
        assert!((2..=3).contains(&runs), "{runs}");
    }
}

#[test]
fn an_unplanned_failover_and_its_way_back_survive_deaths_of_the_coordinator() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new();
    let mut nodes = [Some(stage.alpha()), Some(stage.beta())];
    let mut coord = stage.coordinator();
    let plan = stage.plan(
        "all",
        "[[group]]\nname = \"g\"\nmachines = [\"db\", \"web\"]\n",
    );
    let mut id = 0;
    for (lap, moment) in MOMENTS.into_iter().take(3).enumerate() {
        let (lost, taker) = (lap % 2, 1 - lap % 2);
        protected(
            nodes[lost].as_ref().unwrap(),
            nodes[taker].as_ref().unwrap(),
        );
        let number = u8::try_from(lap + 1).unwrap();
        for machine in MACHINES {
            write(&stage.disk(lost, machine), number);
        }
        stage.cut(lost);
        nodes[lost].take().unwrap().kill();
        for verb in ["--unplanned", "--commit"] {
            let force: &[&str] = if verb == "--unplanned" {
                &["--force"]
            } else {
                &[]
            };
            let args = [&["plan", "run", &plan, verb][..], force].concat();
            coord = dies(&stage, coord, &args, moment);
            id += 1;
            let (outcome, job) = ended(&coord, id);
            assert_eq!(outcome, Outcome::Done, "{job:#?}");
        }
        nodes[lost] = Some(match lost {
            0 => stage.alpha(),
            _ => stage.beta(),
        });
        for machine in MACHINES {
            nodes[lost].as_ref().unwrap().wait("fencing", |m| {
                m.name.as_str() == machine && matches!(m.part, Some(Part::Fenced { .. }))
            });
        }
        coord = dies(&stage, coord, &["plan", "run", &plan, "--reverse"], moment);
        id += 1;
        assert_eq!(ended(&coord, id).0, Outcome::Done);
        protected(
            nodes[taker].as_ref().unwrap(),
            nodes[lost].as_ref().unwrap(),
        );
        for machine in MACHINES {
            check(&stage.disk(taker, machine), number);
            assert_eq!(
                part(nodes[taker].as_ref().unwrap(), machine),
                Some(Part::Primary)
            );
        }
        // What only the lost host had is looked at by nobody here.
        for machine in MACHINES {
            let node = nodes[lost].as_ref().unwrap();
            call(node, &["cancel", machine, "--rescue"]);
        }
    }
}

#[test]
fn a_test_is_started_once_and_ended_after_deaths_of_the_coordinator() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new();
    let (alpha, beta) = (stage.alpha(), stage.beta());
    let mut coord = stage.coordinator();
    protected(&alpha, &beta);
    for machine in MACHINES {
        write(&stage.disk(0, machine), 1);
    }
    let plan = stage.plan(
        "all",
        "[[group]]\nname = \"g\"\nmachines = [\"db\", \"web\"]\n",
    );
    for (id, moment) in (1u64..).zip(MOMENTS) {
        coord = dies(&stage, coord, &["plan", "test", &plan], moment);
        let (outcome, job) = ended(&coord, id);
        assert_eq!(outcome, Outcome::Done, "{job:#?}");
        let done = |state: &StepState| matches!(state, StepState::Done(_));
        assert!(job.job.steps().all(|(_, step)| done(&step.state)));
        for name in MACHINES {
            let on_beta = machine(&beta, name).unwrap();
            assert_eq!(on_beta.tests, []);
            assert_eq!(
                u64::from(on_beta.last_test.unwrap().number),
                id,
                "one test for each run"
            );
        }
    }
}
