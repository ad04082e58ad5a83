//! Peers of another release, played by the library: both sides name both versions, and go on living.

use understudy::{
    base::{
        ids::{Generation, Ids, MachineId, Name, SystemIds},
        limits::CREDIT_BYTES,
    },
    coord::state::{Health, ReplicationState},
    net::{Allow, Identity, Listener, dial},
    protocol::{
        claim::Claim,
        message::{self, DiskSpec, Head, Hello, Refusal, ToPrimary, ToReplica, Version},
    },
};

use crate::support::{Hosts, can_mount, runtime};

/// Of a release to come.
const ANOTHER: Version = Version(Version::CURRENT.0 + 1);

#[test]
fn a_replica_of_another_version_is_told_apart() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 16);
    let identity = Identity::load(&hosts.path("beta")).unwrap();
    let (port, bound) = std::sync::mpsc::channel();
    let played = std::thread::spawn(move || {
        runtime().block_on(async {
            let allow: Allow = [Name::new("alpha").unwrap()].into_iter().collect();
            let address = "127.0.0.1:0".parse().unwrap();
            let mut listener = Listener::bind(address, &identity, allow).unwrap();
            port.send(listener.address().unwrap().port()).unwrap();
            let (link, mut control) = listener.accept().await.unwrap();
            let hello = control.receiver.receive().await.unwrap().unwrap();
            let ToReplica::Hello(hello) = message::decode_to_replica(&hello).unwrap() else {
                panic!("a greeting comes first");
            };
            assert_eq!(hello.version, Version::CURRENT);
            let welcome = ToPrimary::Welcome {
                version: ANOTHER,
                follows: hello.claim.generation,
                head: Head::Empty,
                granted: CREDIT_BYTES,
            };
            let welcome = message::encode(&welcome).into();
            control.sender.send(welcome).await.unwrap();
            link.closed().await
        })
    });
    hosts.set_port(bound.recv().unwrap());
    let primary = hosts.primary(&[&image], &[]);
    let refused = primary.wait("a refusal", |m| m.state == ReplicationState::Error);
    assert_eq!(refused.health, Health::Critical);
    let reasons = refused.reasons.join(" ");
    let both = format!("version {}, this host {}", ANOTHER.0, Version::CURRENT.0);
    assert!(reasons.contains(&both), "{reasons}");
    played.join().unwrap();
    primary.stop();
}

#[test]
fn a_primary_of_another_version_is_told_so() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let replica = hosts.replica(&[]);
    let identity = Identity::load(&hosts.path("alpha")).unwrap();
    let address = replica.status().listening.unwrap().to_string();
    let ids = SystemIds::default();
    let mut hello = Hello {
        version: ANOTHER,
        machine: MachineId(ids.uuid()),
        name: Name::new("vm").unwrap(),
        claim: Claim {
            generation: Generation::first(&ids),
            active: true,
            born: None,
            wants: None,
        },
        disks: vec![DiskSpec {
            name: Name::new("disk").unwrap(),
            size: 1 << 20,
            logical_sector: 512,
            physical_sector: 4096,
            format: "raw".into(),
        }],
    };
    let answer = |first: Vec<u8>| {
        runtime().block_on(async {
            let (_link, mut control) = dial(&address, None, &identity).await.unwrap();
            control.sender.send(first.into()).await.unwrap();
            let answer = control.receiver.receive().await.unwrap().unwrap();
            message::decode_to_primary(&answer).unwrap()
        })
    };
    let theirs = Version::CURRENT;
    let refused = answer(message::encode(&ToReplica::Hello(hello.clone())));
    assert_eq!(refused, ToPrimary::Refused(Refusal::Version { theirs }));
    for garbage in [&b"{}"[..], b"\xff\xfe", b"{\"say\":\"hello\"}"] {
        let refused = answer(garbage.to_vec());
        assert!(
            matches!(refused, ToPrimary::Refused(Refusal::Malformed { .. })),
            "{refused:?}"
        );
    }
    assert!(replica.status().machines.is_empty(), "nothing was begun");
    hello.version = theirs;
    let welcome = answer(message::encode(&ToReplica::Hello(hello)));
    assert!(
        matches!(
            welcome,
            ToPrimary::Welcome {
                head: Head::Empty,
                ..
            }
        ),
        "{welcome:?}"
    );
    replica.stop();
}
