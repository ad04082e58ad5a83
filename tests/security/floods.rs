//! Too much of everything, against the real process: callers, silence, bytes. What it costs is measured and bounded.

use std::{fs::File, os::unix::fs::FileExt, time::Duration};

use quinn::{Connection, Endpoint, VarInt};
use tokio::task::JoinSet;
use understudy::{
    base::{
        ids::{Generation, MachineId, Name},
        units::MIB,
    },
    net::{Identity, Protocol, dial},
    protocol::{
        claim::Claim,
        message::{DiskSpec, Hello, ToReplica, Version, encode},
    },
};
use uuid::Uuid;

use super::serve;
use crate::{
    net::strangers::Stranger,
    support::{Hosts, can_mount, runtime},
};

/// Callers of one flood.
const CALLERS: usize = 10_000;
/// Of them at once.
const AT_ONCE: usize = 250;
/// What a flood of callers may add to the memory of a host: nothing is kept of whoever was refused, and allocators round up.
const CALLERS_COST_MAX: u64 = 64 * MIB;
/// What one link of a peer may make a host hold: a control stream and two logs of 25 MB each, and as much again on the way
/// from the socket to where it is read.
const LINK_COST_MAX: u64 = 160 * MIB;
/// What a guest may make a host hold that cannot reach its replica: 16 requests of 1 MiB, 256 MiB of maps and pre-images.
const GUEST_COST_MAX: u64 = 320 * MIB;

async fn knock(endpoint: Endpoint, port: u16) {
    let address = ([127, 0, 0, 1], port).into();
    if let Ok(connection) = endpoint.connect(address, "127.0.0.1").unwrap().await {
        // A caller has done its part of the handshake before it hears that it is refused.
        connection.closed().await;
    }
}

async fn patiently<T>(wait: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(Duration::from_mins(1), wait).await;
    done.expect("what is waited for must come")
}

#[test]
fn ten_thousand_strangers_leave_nothing_behind() {
    let hosts = Hosts::new();
    let beta = serve(&hosts, "[peers.alpha]\n");
    let alpha = Identity::load(&hosts.path("alpha")).unwrap();
    let run = runtime();
    let address = format!("localhost:{}", hosts.port());
    let beta_is = Name::new("beta").unwrap();
    let before = beta.memory_peak();
    run.block_on(async {
        let stranger = Stranger::new(&hosts.path("alpha"), false, Protocol::Replicate.alpn());
        for batch in 0..CALLERS / AT_ONCE {
            // A new socket for each: what is measured is the host, not one socket's buffer.
            let endpoint = stranger.endpoint("127.0.0.2:0");
            let mut callers = JoinSet::new();
            for _ in 0..AT_ONCE {
                callers.spawn(knock(endpoint.clone(), hosts.port()));
            }
            // Whoever belongs here gets in while they knock, as a driver does that tries again.
            if batch % 8 == 0 {
                let gets_in = async {
                    while dial(&address, Some(&beta_is), &alpha).await.is_err() {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                };
                patiently(gets_in).await;
            }
            patiently(callers.join_all()).await;
        }
    });
    let cost = beta.memory_peak() - before;
    eprintln!("{CALLERS} callers cost {} KiB", cost >> 10);
    assert!(cost < CALLERS_COST_MAX, "{cost} bytes");
    let audit = std::fs::read_to_string(hosts.path("store/audit.log")).unwrap();
    assert!(audit.contains("showed no certificate"), "{audit}");
    assert!(audit.lines().count() < 100);
}

/// Slow-loris: callers that prove who they are and then say nothing, as many as would fill every place.
#[test]
fn silence_from_one_address_keeps_no_other_out() {
    let hosts = Hosts::new();
    let _beta = serve(&hosts, "[peers.alpha]\n");
    let alpha = Identity::load(&hosts.path("alpha")).unwrap();
    let run = runtime();
    run.block_on(async {
        let stranger = Stranger::new(&hosts.path("alpha"), true, Protocol::Replicate.alpn());
        let endpoint = stranger.endpoint("127.0.0.2:0");
        let target = ([127, 0, 0, 1], hosts.port()).into();
        let mut silent: Vec<(Connection, _)> = Vec::new();
        for _ in 0..100 {
            let Ok(connection) = endpoint.connect(target, "127.0.0.1").unwrap().await else {
                continue;
            };
            let (mut send, recv) = connection.open_bi().await.unwrap();
            let _ = send.write_all(&[0]).await;
            silent.push((connection, (send, recv)));
        }
        assert!(silent.len() >= 16, "{} got as far as silence", silent.len());
        let address = format!("127.0.0.1:{}", hosts.port());
        dial(&address, None, &alpha).await.unwrap();
        for (connection, _streams) in &silent {
            patiently(connection.closed()).await;
        }
    });
}

fn hello() -> Hello {
    Hello {
        version: Version::CURRENT,
        machine: MachineId(Uuid::from_u128(7)),
        name: Name::new("vm").unwrap(),
        claim: Claim {
            generation: Generation {
                number: 1,
                id: Uuid::from_u128(9),
            },
            active: true,
            born: None,
            wants: None,
        },
        disks: vec![DiskSpec {
            name: Name::new("disk").unwrap(),
            size: 64 << 20,
            logical_sector: 512,
            physical_sector: 4096,
            format: "raw".into(),
        }],
    }
}

/// A peer that is allowed to feed a machine and then fills whatever it can fill.
#[test]
fn a_peer_makes_a_host_hold_no_more_than_its_windows() {
    let hosts = Hosts::new();
    let beta = serve(&hosts, "[peers.alpha]\n");
    let before = beta.memory_peak();
    runtime().block_on(async {
        let stranger = Stranger::new(&hosts.path("alpha"), true, Protocol::Replicate.alpn());
        let endpoint = stranger.endpoint("127.0.0.2:0");
        let target = ([127, 0, 0, 1], hosts.port()).into();
        let connection = endpoint
            .connect(target, "127.0.0.1")
            .unwrap()
            .await
            .unwrap();
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        send.write_all(&0_u32.to_le_bytes()).await.unwrap();
        let early = tokio::time::timeout(Duration::from_millis(500), connection.open_uni()).await;
        assert!(early.is_err(), "a log before anybody waits for one");
        let hello = encode(&ToReplica::Hello(hello()));
        let length = u32::try_from(hello.len()).unwrap().to_le_bytes();
        send.write_all(&[&length[..], &hello].concat())
            .await
            .unwrap();
        let mut greeting = [0xFF; 4];
        patiently(recv.read_exact(&mut greeting)).await.unwrap();
        // The first stream is what is read, and says nothing; the others are filled to the brim.
        let mut first = patiently(connection.open_uni()).await.unwrap();
        first.write_all(b"U").await.unwrap();
        let mut more = Vec::new();
        while let Ok(stream) =
            tokio::time::timeout(Duration::from_secs(2), connection.open_uni()).await
        {
            let mut stream = stream.unwrap();
            let filled = async { while stream.write_all(&[0x5A; 8_192]).await.is_ok() {} };
            let _ = tokio::time::timeout(Duration::from_secs(5), filled).await;
            more.push(stream);
            assert!(more.len() < 100, "streams without end");
        }
        assert_eq!(more.len(), 1, "streams beside the one that is read");
        let filled = async { while send.write_all(&[0x5A; 8_192]).await.is_ok() {} };
        let _ = tokio::time::timeout(Duration::from_secs(5), filled).await;
        connection.close(VarInt::from_u32(0), b"");
        endpoint.wait_idle().await;
    });
    let cost = beta.memory_peak() - before;
    eprintln!("a hostile peer's link costs {} KiB", cost >> 10);
    assert!(cost < LINK_COST_MAX, "{cost} bytes");
}

/// A guest that writes everywhere at once on a host that cannot reach its replica.
#[test]
fn a_guest_makes_a_host_hold_no_more_than_its_share() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 2048);
    let primary = hosts.primary(&[&image], &[]);
    let before = primary.memory_peak();
    let disk = hosts.disk("disk");
    let workers: Vec<_> = (0..8_u64)
        .map(|worker| {
            let disk = disk.clone();
            std::thread::spawn(move || {
                let file = File::options().read(true).write(true).open(disk).unwrap();
                let mut at = worker.wrapping_mul(0x9E37_79B9_7F4A_7C15);
                let mut long = vec![0x5A; 1 << 20];
                for turn in 0..400_u64 {
                    at = at
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(worker | 1);
                    let offset = (at >> 16) % (2047 << 20);
                    match turn % 8 {
                        0 => file.read_exact_at(&mut long, offset).unwrap(),
                        1 => file.write_all_at(&long[..1 << 20], offset).unwrap(),
                        _ => file.write_all_at(&long[..5], offset).unwrap(),
                    }
                }
                file.sync_all().unwrap();
            })
        })
        .collect();
    for worker in workers {
        worker.join().unwrap();
    }
    let cost = primary.memory_peak() - before;
    eprintln!("a hostile guest costs {} KiB", cost >> 10);
    assert!(cost < GUEST_COST_MAX, "{cost} bytes");
}
