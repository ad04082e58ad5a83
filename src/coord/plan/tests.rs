//! Plans: what they become, and what is no plan.

use super::*;
use crate::{
    base::ids::Generation,
    coord::{
        role::Part,
        state::{Health, ReplicationState},
    },
};

const SHOP: &str = r#"
    name = "shop"
    [[group]]
    name = "database"
    machines = ["db-1", "db-2"]
    [group.planned]
    pre = [{ run = ["/bin/stop", "db"], timeout = "5m" }]
    post = [{ run = ["/bin/start"] }, { manual = "look" }]
    [group.unplanned]
    post = [{ run = ["/bin/start"] }]
    [[group]]
    name = "front"
    machines = ["web"]
    [group.test]
    post = [{ manual = "try the shop" }]
"#;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// On host a, whatever the machine.
fn on(machine: &Name) -> Result<Place, Nowhere> {
    let sight = view::Sight {
        part: Part::Replica { abandoned: false },
        generation: Generation {
            number: 1,
            id: Uuid::from_u128(1),
        },
        state: ReplicationState::Replicating,
        health: Health::Normal,
        reasons: Vec::new(),
        tests: Vec::new(),
    };
    let view = view::View::from([(name("a"), view::Seen::Present(sight))]);
    view::place(Kind::Test, machine, &view, None)
}

fn nowhere(machine: &Name) -> Result<Place, Nowhere> {
    view::place(Kind::Unplanned, machine, &view::View::new(), None)
}

/// A line for each stage: its name and its deeds.
fn outline(stages: &[Stage]) -> Vec<String> {
    let deeds = |stage: &Stage| {
        let deeds: Vec<_> = stage
            .steps
            .iter()
            .map(|step| step.deed.to_string())
            .collect();
        let always = if stage.always { "always, " } else { "" };
        format!("{always}{}: {}", stage.name, deeds.join(" | "))
    };
    stages.iter().map(deeds).collect()
}

#[test]
fn a_plan_becomes_stages_in_order() {
    let plan = Plan::parse(SHOP).unwrap();
    let stages = |kind| plan.stages(kind, false, on, || Uuid::from_u128(7)).unwrap();
    assert_eq!(
        outline(&stages(Kind::Planned)),
        [
            "database, pre: /bin/stop db",
            "database: failover db-1 --planned, from a | failover db-2 --planned, from a",
            "database, post: /bin/start",
            "database, post: look",
            "front: failover web --planned, from a",
        ]
    );
    assert_eq!(
        outline(&stages(Kind::Test)),
        [
            "database: failover db-1 --test, on a | failover db-2 --test, on a",
            "front: failover web --test, on a",
            "front, post: try the shop",
            "always, clean up: end the test of db-1 on a | end the test of db-2 on a | end the test of web on a",
        ]
    );
    assert_eq!(
        outline(&stages(Kind::Commit)).len(),
        2,
        "no actions around a commit"
    );
    let Deed::Script(script) = &stages(Kind::Planned)[0].steps[0].deed else {
        panic!("not a script");
    };
    assert_eq!(script.within, Duration::from_mins(5));
    assert_eq!(script.machines, [name("db-1"), name("db-2")]);
    let programs: Vec<_> = plan.programs().into_iter().collect();
    assert_eq!(programs, [Path::new("/bin/start"), Path::new("/bin/stop")]);
}

#[test]
fn a_machine_that_is_not_found_stops_what_stops_on_errors() {
    let plan = Plan::parse(SHOP).unwrap();
    let place = |machine: &Name| match machine.as_str() {
        "db-2" => nowhere(machine),
        "web" => Ok(Place::Already("there already".into())),
        _ => on(machine),
    };
    let stages = |kind, place: &dyn Fn(&Name) -> Result<Place, Nowhere>| {
        plan.stages(kind, false, place, || Uuid::from_u128(7))
    };
    let why = stages(Kind::Planned, &place).unwrap_err().to_string();
    assert!(why.starts_with("machine db-2: "), "{why}");
    let going_on = stages(Kind::Unplanned, &place).unwrap();
    let states: Vec<_> = going_on
        .iter()
        .flat_map(|stage| &stage.steps)
        .map(|step| &step.state)
        .collect();
    assert!(
        matches!(
            states[..],
            [
                StepState::Waiting,
                StepState::Failed(_),
                StepState::Waiting,
                StepState::Done(_)
            ]
        ),
        "{states:?}"
    );
    assert!(
        stages(Kind::Unplanned, &nowhere).is_err(),
        "nothing could be done"
    );
}

#[test]
fn what_makes_no_sense_is_named() {
    for (was, is, said) in [
        ("name = \"shop\"", "", "missing field `name`"),
        ("timeout", "tiemout", "unknown field `tiemout`"),
        ("group.test", "group.tset", "unknown field `tset`"),
        (
            "\"web\"",
            "\"db-1\"",
            "group front: machine db-1 is named twice",
        ),
        ("\"front\"", "\"database\"", "there are two of that name"),
        (
            "\"/bin/stop\"",
            "\"stop\"",
            "group database, planned.pre: \"stop\" is not an absolute path",
        ),
        ("5m", "5", "is not a time from 1s to 24h"),
        ("5m", "25h", "is not a time from 1s to 24h"),
        ("5m", "0s", "is not a time from 1s to 24h"),
        ("5m", "99999999999999999999h", "is not a time"),
        ("\"look\"", "\" \"", "says in 1 to"),
        (
            "manual = \"look\"",
            "manual = \"look\", timeout = \"1s\"",
            "a person has no timeout",
        ),
        (
            "manual = \"look\"",
            "manual = \"look\", run = [\"/x\"]",
            "one of run and manual",
        ),
        (
            "run = [\"/bin/stop\", \"db\"]",
            "run = []",
            "names no program",
        ),
        ("\"web\"", "\"../web\"", "must not contain"),
        ("[\"db-1\", \"db-2\"]", "[]", ""),
    ] {
        let text = SHOP.replace(was, is);
        assert_ne!(text, SHOP);
        match Plan::parse(&text) {
            Ok(_) => assert_eq!(said, "", "{is} was taken"),
            Err(error) => assert!(
                error.to_string().contains(said) && !said.is_empty(),
                "{is}: {error}"
            ),
        }
    }
}

#[test]
fn limits_are_limits() {
    let long = format!("{SHOP}#{}", "x".repeat(PLAN_BYTES_MAX));
    assert!(matches!(Plan::parse(&long), Err(PlanError::TooLong(_))));
    let actions = vec!["{ run = [\"/x\"] }"; ACTIONS_MAX];
    let text =
        |actions: &str| SHOP.replace("{ run = [\"/bin/start\"] }, { manual = \"look\" }", actions);
    let refused = |text: &str| Plan::parse(text).unwrap_err().to_string();
    assert!(refused(&text(&actions.join(","))).contains("more than 64 actions"));
    assert!(Plan::parse(&text(&actions[1..].join(","))).is_ok());
    let machines: Vec<_> = (0..=MACHINES_MAX).map(|n| format!("\"m{n}\"")).collect();
    let many = |machines: &[String]| SHOP.replace("\"web\"", &machines.join(","));
    assert!(refused(&many(&machines)).contains("1 to 256"));
    assert!(refused("name = \"x\"").contains("0 machines"));
    let long = "x".repeat(ACTION_BYTES_MAX);
    assert!(
        refused(&SHOP.replace("\"db\"]", &format!("\"{long}\"]"))).contains("at most 4096 bytes")
    );
    let groups: Vec<_> = (0..=GROUPS_MAX)
        .map(|n| format!("[[group]]\nname = \"g{n}\"\n"))
        .collect();
    let groups = groups.concat();
    assert!(refused(&format!("name = \"x\"\n{groups}")).contains("more than 64"));
}

#[test]
fn the_plan_in_the_readme_is_one() {
    let readme = include_str!("../../../README.md");
    let plan = readme
        .lines()
        .skip_while(|line| !line.contains("name = \"shop\""));
    let plan = plan.take_while(|line| line.is_empty() || line.starts_with("    "));
    let plan: Vec<_> = plan.collect();
    let plan = Plan::parse(&plan.join("\n")).unwrap();
    assert_eq!(plan.machines().count(), 3);
    assert_eq!(plan.actions(Kind::Planned).count(), 3);
}
