//! One machine, moved from a third host that finds out by itself who has to do what.

use understudy::{
    base::ids::Name,
    coord::{
        job::{Outcome, StepState},
        role::Part,
    },
    node::{
        control::{FailoverReport, ask_cut},
        coordinator::JobSummary,
        status::{MachineStatus, TestStatus},
    },
};

use super::stage::{
    GLANCE, Stage, check, does, ended, fails, job, machine, part, protected, write,
};
use crate::support::{Node, can_mount, parsed, runtime, send};

#[test]
fn a_machine_is_moved_from_a_third_host_there_and_back() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new();
    let (alpha, beta, coord) = (stage.alpha(), stage.beta(), stage.coordinator());
    protected(&alpha, &beta);
    let (here, there) = (stage.disk(0, "web"), stage.disk(1, "web"));
    write(&here, 1);

    let moved: FailoverReport = parsed(&coord, &["failover", "web", "--planned"]);
    assert!(moved.text.contains("handed over"), "{}", moved.text);
    assert_eq!(
        (moved.generation.number, &moved.files[..]),
        (2, &[there.clone()][..])
    );
    check(&there, 1);
    assert_eq!(
        part(&alpha, "db"),
        Some(Part::Primary),
        "nothing else was moved"
    );

    refuses(&coord);
    // Looking, cutting and testing find their hosts, too.
    does(&coord, &["points", "web"]);
    let test: TestStatus = parsed(&coord, &["failover", "web", "--test"]);
    let number = test.number.to_string();
    assert_eq!(machine(&alpha, "web").unwrap().tests, [test]);
    does(&coord, &["cancel", "web", "--test", &number]);
    assert_eq!(machine(&alpha, "web").unwrap().tests, []);

    // Suspending does as well.
    does(&coord, &["suspend", "web"]);
    assert!(machine(&beta, "web").unwrap().suspended.is_some());
    let why = fails(&coord, &["resync", "web"], 3);
    assert!(why.contains("understudy resume web"), "{why}");
    does(&coord, &["resume", "web"]);

    // The host is lost, and its machine goes on elsewhere.
    let web = |machine: &MachineStatus| machine.name.as_str() == "web";
    beta.wait("a primary with nothing left to do", |m| {
        web(m) && m.reasons.is_empty()
    });
    write(&there, 2);
    let name = Name::new("web").unwrap();
    runtime().block_on(ask_cut(coord.socket(), &name)).unwrap();
    beta.kill();
    let promoted: FailoverReport = parsed(&coord, &["failover", "web", "--unplanned", "--force"]);
    assert_eq!(
        (promoted.generation.number, &promoted.files[..]),
        (3, &[here.clone()][..])
    );
    check(&here, 2);
    does(&coord, &["commit", "web"]);
    let beta = stage.beta();
    beta.wait("fencing", |m| matches!(m.part, Some(Part::Fenced { .. })));
    does(&coord, &["reverse", "web"]);
    protected(&alpha, &beta);
    check(&here, 2);

    tells_its_jobs(&coord);
}

/// What a host refuses is refused by the coordinator, in its words; so is what no host can do.
fn refuses(coord: &Node) {
    for (args, why) in [
        (
            &["failover", "web", "--unplanned"][..],
            "the primary of machine web is connected",
        ),
        (
            &["failover", "mail", "--planned"],
            "machine mail: a planned failover needs one primary; no host knows it",
        ),
        (&["commit", "mail"], "no host knows it"),
        (&["reverse", "mail"], "no host was fenced; no host knows it"),
        (&["cancel", "web"], "machine web has no test failover"),
        (&["jobs", "77"], "there is no job 77"),
        (&["jobs", "cancel", "1"], "job 1 has ended"),
        (&["jobs", "continue", "1"], "job 1 has ended"),
    ] {
        let said = fails(coord, args, 3);
        assert!(said.contains(why), "{args:?}: {said}");
    }
}

/// What was done before is listed, and told step by step.
fn tells_its_jobs(coord: &Node) {
    let jobs: Vec<JobSummary> = parsed(coord, &["jobs"]);
    let outcomes: Vec<_> = jobs.iter().map(|job| job.ended.unwrap().outcome).collect();
    assert_eq!(
        outcomes,
        [
            Outcome::Done,
            Outcome::Failed,
            Outcome::Done,
            Outcome::Done,
            Outcome::Done
        ]
    );
    let listed = does(coord, &["jobs"]);
    assert!(
        listed
            .lines()
            .next()
            .unwrap()
            .starts_with("job 1 (planned web), begun "),
        "{listed}"
    );
    let told = does(coord, &["jobs", "1", "--watch"]);
    assert!(
        told.contains("planned: failover web --planned, from alpha: done: handed over"),
        "{told}"
    );
}

/// A hand-over that does not come to its end: done when the other host is back, or taken back when a person wants that.
#[test]
fn a_planned_failover_that_hangs_is_finished_or_taken_back() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new();
    let (alpha, mut coord) = (stage.alpha(), stage.coordinator());
    let mut beta = stage.beta();
    let mut id = 0;
    for (machine_name, cancel) in [("web", false), ("db", true)] {
        if machine_name == "web" {
            protected(&alpha, &beta);
        }
        write(&stage.disk(0, machine_name), 1);
        let before = alpha.log().matches("a primary that stepped down").count();
        id += 1;
        let mut verb = send(&coord, &["failover", machine_name, "--planned"]);
        while alpha.log().matches("a primary that stepped down").count() == before {
            // Refused while the link is that of beta's former life. Nothing has changed then.
            if verb.try_wait().unwrap().is_some_and(|code| !code.success()) {
                id += 1;
                verb = send(&coord, &["failover", machine_name, "--planned"]);
            }
            std::thread::sleep(GLANCE);
        }
        beta.pause();
        // Whether the hand-over was heard is for chance; when it was not, the job waits.
        let paused = matches!(part(&alpha, machine_name), Some(Part::SteppedDown { .. }));
        beta.kill();
        if paused {
            let waits = job(&coord, id, |job| {
                !job.notes.is_empty() || job.job.ended.is_some()
            });
            assert_eq!(waits.job.ended, None, "{waits:#?}");
            let said = fails(&coord, &["failover", machine_name, "--planned"], 3);
            assert!(
                said.contains(&format!(
                    "machine {machine_name} is in the hands of job {id}"
                )),
                "{said}"
            );
        }
        // A coordinator that is asked to stop does not wait for the end of its jobs.
        coord.stop();
        coord = stage.coordinator();
        if cancel {
            does(&coord, &["jobs", "cancel", &id.to_string()]);
        }
        beta = stage.beta();
        let (outcome, told) = ended(&coord, id);
        verb.wait().unwrap();
        let (home, disk) = match (cancel && paused, &told.job.steps().next().unwrap().1.state) {
            (true, StepState::Undone(_)) => (&alpha, 0),
            (_, StepState::Done(_)) => (&beta, 1),
            (_, other) => panic!("{other:?}"),
        };
        assert_eq!(outcome == Outcome::Cancelled, disk == 0);
        home.wait("its machine", |m| {
            m.name.as_str() == machine_name && m.part == Some(Part::Primary)
        });
        check(&stage.disk(disk, machine_name), 1);
    }
}
