//! Recovery plans: groups in order, what is done around them, what stops and what goes on.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Child,
};

use understudy::{
    coord::{
        job::{Outcome, StepState},
        role::Part,
    },
    node::coordinator::JobStatus,
};

use super::stage::{
    MACHINES, Stage, check, does, ended, fails, job, machine, part, protected, write,
};
use crate::support::{Node, call, can_mount, parsed, send};

/// Two groups, with a script that notes what it is told around each of them.
fn shop(stage: &Stage) -> (String, PathBuf) {
    let notes = stage.hosts.path("notes");
    let note = format!(
        "echo \"$UNDERSTUDY_PLAN $UNDERSTUDY_KIND $UNDERSTUDY_GROUP $UNDERSTUDY_PHASE: $UNDERSTUDY_MACHINES: $(echo \"$UNDERSTUDY_DISKS\" | cut -f 1,2 | tr '\\t\\n' '@ ')\" >> {}; echo noted",
        notes.display()
    );
    let note = stage.script("note", &note);
    let actions = |kind: &str| {
        format!(
            "[group.{kind}]\npre = [{{ run = [{note:?}] }}]\npost = [{{ run = [{note:?}], timeout = \"1m\" }}]\n"
        )
    };
    let group = |name: &str, machine: &str| {
        let actions: String = ["planned", "unplanned", "test"].map(actions).concat();
        format!("[[group]]\nname = {name:?}\nmachines = [{machine:?}]\n{actions}")
    };
    let groups = [group("database", "db"), group("front", "web")].concat();
    (stage.plan("shop", &groups), notes)
}

fn noted(notes: &Path) -> Vec<String> {
    let text = fs::read_to_string(notes).unwrap();
    fs::remove_file(notes).unwrap();
    text.lines()
        .map(|line| line.trim_end().to_owned())
        .collect()
}

#[test]
fn a_plan_goes_there_planned_and_back_unplanned() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new();
    let (alpha, beta, coord) = (stage.alpha(), stage.beta(), stage.coordinator());
    let (shop, notes) = shop(&stage);
    protected(&alpha, &beta);
    assert!(does(&coord, &["plan", "check", &shop]).contains("no complaints"));
    for machine in MACHINES {
        write(&stage.disk(0, machine), 1);
    }

    let told = does(&coord, &["plan", "run", &shop, "--planned"]);
    assert!(
        told.contains("database, pre: ") && told.contains("    | noted"),
        "{told}"
    );
    assert!(told.contains("job 1 (plan shop, planned): done"), "{told}");
    assert_eq!(
        noted(&notes),
        [
            "shop planned database pre: db:",
            "shop planned database post: db: db@beta",
            "shop planned front pre: web: db@beta",
            "shop planned front post: web: db@beta web@beta",
        ]
    );
    protected(&beta, &alpha);
    for machine in MACHINES {
        check(&stage.disk(1, machine), 1);
        write(&stage.disk(1, machine), 2);
    }
    // Where all are already, nothing is done; in the other direction it would.
    does(&coord, &["plan", "run", &shop, "--planned", "--to", "beta"]);
    assert_eq!(noted(&notes).len(), 4);
    protected(&beta, &alpha);
    assert!(
        fails(
            &coord,
            &["plan", "run", &shop, "--planned", "--to", "gamma"],
            3
        )
        .contains("no host called gamma")
    );
    assert!(fails(&coord, &["plan", "run", &shop, "--commit", "--force"], 2).contains("--force"));

    stage.cut(1);
    beta.kill();
    comes_back(&stage, &shop, (&alpha, &coord));
    assert_eq!(
        noted(&notes)[3],
        "shop unplanned front post: web: db@alpha web@alpha"
    );
}

/// Both machines lose `beta`, go on on `alpha`, and are protected again by the same plan when it is back.
fn comes_back(stage: &Stage, plan: &str, (alpha, coord): (&Node, &Node)) {
    does(coord, &["plan", "run", plan, "--unplanned", "--force"]);
    for machine in MACHINES {
        let part = part(alpha, machine);
        assert!(matches!(part, Some(Part::FailedOver { .. })), "{part:?}");
        check(&stage.disk(0, machine), 2);
    }
    does(coord, &["plan", "run", plan, "--commit"]);
    let beta = stage.beta();
    for machine in MACHINES {
        beta.wait("fencing", |m| {
            m.name.as_str() == machine && matches!(m.part, Some(Part::Fenced { .. }))
        });
    }
    does(coord, &["plan", "run", plan, "--reverse"]);
    protected(alpha, &beta);
    for machine in MACHINES {
        check(&stage.disk(0, machine), 2);
    }
}

#[test]
fn a_check_finds_what_keeps_a_plan_from_being_run() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new();
    let (alpha, beta, coord) = (stage.alpha(), stage.beta(), stage.coordinator());
    protected(&alpha, &beta);
    let group = |machines: &str, run: &str| {
        format!(
            "[[group]]\nname = \"g\"\nmachines = [{machines}]\n[group.test]\npre = [{{ run = [{run:?}] }}]\n"
        )
    };
    let complaints = |groups: &str, words: &[&str]| {
        let plan = stage.plan("wrong", groups);
        let said = fails(&coord, &["plan", "check", &plan], 1);
        for word in words {
            assert!(said.contains(word), "{word}: {said}");
        }
    };
    let (missing, silent) = (stage.hosts.path("missing"), stage.hosts.path("notes"));
    fs::write(&silent, "").unwrap();
    complaints(
        &group("\"web\"", missing.to_str().unwrap()),
        &["missing: No such file", "1 complaints"],
    );
    complaints(
        &group("\"web\"", silent.to_str().unwrap()),
        &["may not be executed"],
    );
    complaints(
        &group("\"mail\", \"db\"", "/bin/true"),
        &["machine mail: no host knows it", "1 complaints"],
    );
    refuses_what_is_no_plan(&stage, &coord);

    let good = group("\"web\", \"db\"", "/bin/true");
    // A machine that another plan has in hand.
    let held = stage.plan("held", "[[group]]\nname = \"g\"\nmachines = [\"web\"]\n[group.test]\npost = [{ manual = \"look\" }]\n");
    let mut holder = send(&coord, &["plan", "test", &held]);
    job(&coord, 1, |job| job.job.manual().next().is_some());
    complaints(
        &good,
        &[
            "machine web is in the hands of job 1 (plan held)",
            "1 complaints",
        ],
    );
    does(&coord, &["jobs", "cancel", "1"]);
    assert_eq!(ended(&coord, 1).0, Outcome::Cancelled);
    assert!(!holder.wait().unwrap().success());
    // Machines that are not as they should be.
    does(&coord, &["failover", "web", "--unplanned", "--force"]);
    let failed_over = "machine web: on beta it is in a failover that is not committed";
    complaints(
        &good,
        &["machine web: no host follows as its replica", failed_over],
    );
    does(&coord, &["cancel", "web"]);
    beta.kill();
    complaints(
        &good,
        &["machine db: no host follows as its replica (not asked: beta)"],
    );
}

fn refuses_what_is_no_plan(stage: &Stage, coord: &Node) {
    let bad = stage.plan("bad", "[[group]]\nname = \"g\"\nmachine = [\"web\"]\n");
    for verb in [
        &["plan", "check", &bad][..],
        &["plan", "test", &bad],
        &["plan", "run", &bad, "--planned"],
    ] {
        assert!(fails(coord, verb, 3).contains("unknown field `machine`"));
    }
    let nothing = stage.hosts.path("no.plan");
    let said = fails(coord, &["plan", "check", nothing.to_str().unwrap()], 1);
    assert!(said.contains("cannot read the plan"), "{said}");
}

#[test]
fn an_error_stops_a_planned_failover_and_not_an_unplanned_one() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new();
    let (alpha, beta, coord) = (stage.alpha(), stage.beta(), stage.coordinator());
    protected(&alpha, &beta);
    let wrong = stage.script("wrong", "echo this went wrong >&2; exit 7");
    let slow = stage.script("slow", "echo $$; sleep 1000");
    let actions =
        format!("pre = [{{ run = [{wrong:?}] }}, {{ run = [{slow:?}], timeout = \"1s\" }}]\n");
    let plan = stage.plan(
        "trouble",
        &format!(
            "[[group]]\nname = \"one\"\nmachines = [\"db\"]\n[[group]]\nname = \"two\"\nmachines = [\"web\"]\n\
             [group.planned]\n{actions}[group.unplanned]\n{actions}"
        ),
    );
    let said = fails(&coord, &["plan", "run", &plan, "--planned"], 1);
    assert!(
        said.contains("wrong: exit status: 7") && said.contains("    | this went wrong"),
        "{said}"
    );
    let stopped: JobStatus = parsed(&coord, &["jobs", "1"]);
    let states: Vec<_> = stopped.job.steps().map(|(_, step)| &step.state).collect();
    assert!(
        matches!(
            states[..],
            [
                StepState::Done(_),
                StepState::Failed(_),
                StepState::Skipped,
                StepState::Skipped
            ]
        ),
        "{states:?}"
    );
    assert_eq!(part(&beta, "db"), Some(Part::Primary));
    assert_eq!(part(&alpha, "web"), Some(Part::Primary));

    // It is begun again, with a direction: what has been moved stays.
    let said = fails(&coord, &["plan", "run", &plan, "--planned"], 3);
    assert!(
        said.contains("say with --to where all of them are to go"),
        "{said}"
    );
    stage.script("wrong", "exit 0");
    stage.script("slow", "exit 0");
    does(&coord, &["plan", "run", &plan, "--planned", "--to", "beta"]);
    protected(&beta, &alpha);

    stage.script("wrong", "exit 7");
    stage.script("slow", "echo $$; sleep 1000");
    let said = fails(&coord, &["plan", "run", &plan, "--unplanned", "--force"], 1);
    assert!(
        said.contains("exit status: 7") && said.contains("took longer than 1 s"),
        "{said}"
    );
    for machine in MACHINES {
        assert!(matches!(
            part(&alpha, machine),
            Some(Part::FailedOver { .. })
        ));
    }
    does(&coord, &["plan", "run", &plan, "--cancel"]);
    protected(&beta, &alpha);
}

#[test]
fn a_plan_waits_for_a_person_and_owns_its_machines() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new();
    let (alpha, beta, coord) = (stage.alpha(), stage.beta(), stage.coordinator());
    protected(&alpha, &beta);
    let text = |machine: &str| {
        format!(
            "[[group]]\nname = \"g\"\nmachines = [{machine:?}]\n[group.planned]\npre = [{{ manual = \"switch the guest off\" }}]\n"
        )
    };
    let (web, db) = (
        stage.plan("web", &text("web")),
        stage.plan("db", &text("db")),
    );
    let mut verb = send(&coord, &["plan", "run", &web, "--planned"]);
    let waits = job(&coord, 1, |job| job.job.manual().next().is_some());
    assert_eq!(
        waits.job.steps().next().unwrap().1.deed.to_string(),
        "switch the guest off"
    );
    let shown = does(&coord, &["jobs", "1"]);
    assert!(
        shown.contains("switch the guest off: waits for you: `understudy jobs continue 1`"),
        "{shown}"
    );
    // Nobody else touches its machines; others are free.
    for args in [
        &["plan", "run", &web, "--planned"][..],
        &["failover", "web", "--planned"],
        &["cancel", "web"],
    ] {
        let said = fails(&coord, args, 3);
        assert!(
            said.contains("machine web is in the hands of job 1 (plan web)"),
            "{said}"
        );
    }
    let mut other = send(&coord, &["plan", "run", &db, "--planned"]);
    job(&coord, 2, |job| job.job.manual().next().is_some());
    // Whoever watches may leave: the job stays. So it does when the coordinator is killed.
    verb.kill().unwrap();
    verb.wait().unwrap();
    coord.kill();
    let coord = stage.coordinator();
    let again = job(&coord, 1, |job| job.job.manual().next().is_some());
    assert_eq!(again.job.ended, None);
    let said = fails(&coord, &["failover", "web", "--planned"], 3);
    assert!(said.contains("in the hands of job 1"), "{said}");
    does(&coord, &["jobs", "continue", "1"]);
    assert_eq!(ended(&coord, 1).0, Outcome::Done);
    assert_eq!(part(&beta, "web"), Some(Part::Primary));
    does(&coord, &["jobs", "cancel", "2"]);
    assert_eq!(ended(&coord, 2).0, Outcome::Cancelled);
    assert_eq!(other.wait().unwrap().code(), Some(1));
    assert_eq!(part(&alpha, "db"), Some(Part::Primary));
}

/// The tests that run on a node.
fn tests(node: &Node) -> usize {
    let tests = MACHINES
        .iter()
        .map(|name| machine(node, name).unwrap().tests.len());
    tests.sum()
}

#[test]
fn a_plan_test_cleans_up_whatever_happens() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new();
    let (alpha, beta, mut coord) = (stage.alpha(), stage.beta(), stage.coordinator());
    protected(&alpha, &beta);
    for machine in MACHINES {
        write(&stage.disk(0, machine), 1);
    }
    stage.cut(0);
    let (shop, notes) = shop(&stage);
    does(&coord, &["plan", "test", &shop]);
    assert_eq!(
        noted(&notes)[3],
        "shop test front post: web: db@beta web@beta"
    );
    assert_eq!(tests(&beta), 0);

    let manual = stage.plan(
        "manual",
        "[[group]]\nname = \"g\"\nmachines = [\"db\", \"web\"]\n[group.test]\npost = [{ manual = \"look\" }]\n",
    );
    let start = |coord: &Node, id: u64| -> (Child, JobStatus) {
        let verb = send(coord, &["plan", "test", &manual]);
        let waits = job(coord, id, |job| job.job.manual().next().is_some());
        assert_eq!(tests(&beta), 2);
        (verb, waits)
    };
    // A test somebody started by hand is not the plan's.
    does(&coord, &["failover", "db", "--test"]);
    does(&coord, &["cancel", "db", "--tests"]);
    // A person has looked; the disks hold what they should, and are still in use when he goes on.
    let (mut verb, waits) = start(&coord, 2);
    let reports = waits.job.steps().filter_map(|(_, step)| match &step.state {
        StepState::Done(report) => Some(report.files[0].clone()),
        _ => None,
    });
    let disks: Vec<_> = reports.collect();
    for disk in &disks {
        check(disk, 1);
    }
    let guest = fs::File::open(&disks[0]).unwrap();
    does(&coord, &["jobs", "continue", "2"]);
    assert_eq!(ended(&coord, 2).0, Outcome::Done);
    assert!(verb.wait().unwrap().success());
    assert_eq!(tests(&beta), 0);
    drop(guest);
    // A cancel, and a kill of the coordinator before it.
    let (mut verb, _) = start(&coord, 3);
    coord.kill();
    coord = stage.coordinator();
    does(&coord, &["jobs", "cancel", "3"]);
    assert_eq!(ended(&coord, 3).0, Outcome::Cancelled);
    verb.wait().unwrap();
    assert_eq!(tests(&beta), 0);
    // An error in the middle.
    let wrong = stage.script("note", "exit 1");
    assert!(fails(&coord, &["plan", "test", &shop], 1).contains(&wrong));
    assert_eq!(tests(&beta), 0);
    protected(&alpha, &beta);
    let (code, _, _) = call(&coord, &["plan", "test", &manual, "--planned"]);
    assert_eq!(code, 2, "a test is a test");
}
