//! Who may operate a host over the network, and that a peer is not one of them.

use uuid::Uuid;

use understudy::{
    base::ids::Name,
    coord::role::Part,
    net::{DialError, Identity, Refusal, RefusedBy, dial},
    node::{
        control::{
            CancelRequest, ClientError, FailoverKind, FailoverRequest, TestRequest, ask_cancel,
            ask_cut, ask_failover, ask_points, ask_status, ask_test,
        },
        operate::Way,
    },
};

use super::stage::{COORDINATOR, Stage, check, part, protected, write};
use crate::support::{can_mount, runtime};

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

const PLANNED: FailoverRequest = FailoverRequest {
    kind: FailoverKind::Planned,
    point: None,
    force: false,
};

#[test]
fn an_operator_does_over_the_network_what_the_socket_does() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new();
    let (alpha, beta) = (stage.alpha(), stage.beta());
    protected(&alpha, &beta);
    let (to_alpha, to_beta) = (stage.way(0, COORDINATOR), stage.way(1, COORDINATOR));
    let run = runtime();
    let web = name("web");

    let status = run.block_on(ask_status(&to_alpha)).unwrap();
    assert_eq!(status.pid, alpha.status().pid);
    assert_eq!(status.machines.len(), 2);
    write(&stage.disk(0, "web"), 1);
    let cut = run.block_on(ask_cut(&to_alpha, &web)).unwrap();
    let points = run.block_on(ask_points(&to_beta, &web)).unwrap();
    assert_eq!(points.last().unwrap().point, cut);

    // A test that is asked for again with its key is the same one; without a key each is another.
    let keyed = TestRequest {
        key: Some(Uuid::from_u128(7)),
        ..TestRequest::default()
    };
    let tests = [keyed, keyed, TestRequest::default(), TestRequest::default()];
    let tests = tests.map(|test| run.block_on(ask_test(&to_beta, &web, test)).unwrap());
    assert_eq!(tests.map(|test| test.number), [1, 1, 2, 3]);
    let all = CancelRequest {
        tests: true,
        ..CancelRequest::default()
    };
    let ended = run.block_on(ask_cancel(&to_beta, &web, all)).unwrap();
    assert_eq!(ended.ended, [1, 2, 3]);

    // What the host refuses is refused, in its own words.
    let refused = run
        .block_on(ask_failover(&to_beta, &web, PLANNED))
        .unwrap_err();
    let ClientError::Refused(why) = refused else {
        panic!("{refused}");
    };
    assert!(why.contains("started on the primary"), "{why}");

    let moved = run
        .block_on(ask_failover(&to_alpha, &web, PLANNED))
        .unwrap();
    assert!(moved.text.contains("generation 2."), "{}", moved.text);
    assert_eq!(part(&beta, "web"), Some(Part::Primary));
    assert_eq!(part(&beta, "db"), Some(Part::Replica { abandoned: false }));
    check(&stage.disk(1, "web"), 1);
    beta.wait_logged("asks for");
}

/// The refusal of a dialler that was met.
fn refusal(error: DialError) -> (RefusedBy, Refusal, String) {
    match error {
        DialError::Refused {
            by, refusal, text, ..
        } => (by, refusal, text),
        other => panic!("{other}"),
    }
}

#[test]
fn whoever_is_no_operator_is_refused_and_an_operator_is_no_peer() {
    if !can_mount() {
        return;
    }
    let stage = Stage::new();
    stage.hosts.issue("mallory");
    let beta = stage.beta();
    let run = runtime();
    // A stranger with a certificate of the same authority, and a host that may replicate to this one.
    for who in ["mallory", "alpha"] {
        let ClientError::Dial(error) = run.block_on(ask_status(&stage.way(1, who))).unwrap_err()
        else {
            panic!("{who} was not refused at the door");
        };
        let (by, refusal, text) = refusal(error);
        assert_eq!((by, refusal), (RefusedBy::Peer, Refusal::NotAllowed));
        assert!(
            text.contains(&format!("{who}, which is not one of the operators")),
            "{text}"
        );
    }
    // The operator is let in to operate, and for nothing else.
    let to_beta = stage.way(1, COORDINATOR);
    run.block_on(ask_status(&to_beta)).unwrap();
    let identity = Identity::load(&stage.hosts.path(COORDINATOR)).unwrap();
    let fed = run.block_on(dial(&stage.address(1), Some(&name("beta")), &identity));
    let (by, refusal, _) = refusal(fed.unwrap_err());
    assert_eq!((by, refusal), (RefusedBy::Peer, Refusal::NotAllowed));
    // Another host that proves to be itself is not the one that was meant.
    let wrong = Way::to(stage.address(1), Some(name("alpha")), identity);
    let error = run.block_on(ask_status(&wrong)).unwrap_err();
    assert!(
        error.to_string().contains("does not hold the name"),
        "{error}"
    );
    drop(beta);
}
