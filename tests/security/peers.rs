//! What a peer may do on a host: its own machines, in its own place, within its quota, with its own key.

use std::{fs, os::unix::fs::FileExt, path::Path};

use understudy::{
    base::{checksum::Digest, ids::Name},
    coord::state::ReplicationState,
    net::{Identity, identity::key_digest},
    node::{
        control::{ClientError, ask_status},
        operate::Way,
        status::MachineStatus,
    },
};

use super::serve;
use crate::support::{Hosts, Node, assert_identical, can_mount, mark, runtime};

fn told(machine: &MachineStatus, words: &str) -> bool {
    machine.reasons.join("; ").contains(words)
}

#[test]
fn a_peer_feeds_its_own_machines_into_its_own_place() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 8);
    let beta = serve(
        &hosts,
        "[peers.alpha]\nmachines = [\"other\"]\nstore = \"elsewhere\"\n",
    );
    let primary = hosts.primary(&[&image], &[]);
    primary.wait("a refusal", |machine| {
        told(machine, "vm is not one of the machines of alpha")
    });
    assert_eq!(beta.status().machines.len(), 0);
    assert!(!hosts.path("elsewhere").exists() && !hosts.path("store/vm").exists());
    let log = fs::read_to_string(hosts.path("store/audit.log")).unwrap();
    assert!(
        log.contains("\"event\":\"refused\",\"who\":\"alpha\""),
        "{log}"
    );

    beta.stop();
    let beta = serve(
        &hosts,
        "[peers.alpha]\nmachines = [\"vm\"]\nstore = \"elsewhere\"\n",
    );
    primary.wait_replicating();
    mark(&hosts.disk("disk"), 3, 1);
    primary.cut();
    let replica = hosts.path("elsewhere/vm/disk.raw");
    assert!(replica.exists() && !hosts.path("store/vm").exists());

    // Where a replica lies is not for a later configuration to say.
    beta.stop();
    let beta = serve(&hosts, "[peers.alpha]\nstore = \"yet-elsewhere\"\n");
    primary.wait_replicating();
    mark(&hosts.disk("disk"), 4, 2);
    primary.cut();
    beta.merged();
    beta.stop();
    primary.stop();
    assert!(!hosts.path("yet-elsewhere").exists());
    assert_identical(&image, &replica);
}

#[test]
fn a_peer_over_its_quota_keeps_its_last_point_and_goes_on_when_there_is_room() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let image = hosts.image("disk.raw", 16);
    let beta = serve(&hosts, "[peers.alpha]\nquota = \"4M\"\n");
    let primary = hosts.primary(&[&image], &["--compression", "none"]);
    primary.wait_replicating();
    mark(&hosts.disk("disk"), 3, 1);
    let good = primary.cut();
    beta.merged();
    fill(&hosts.disk("disk"), 1 << 20, 8 << 20);
    let full = beta.wait("a full quota", |machine| {
        machine.state == ReplicationState::Error && told(machine, "its quota is 4.00 MiB")
    });
    // What was cut while it was written may have found room.
    let kept = full.durable.unwrap();
    assert!(kept.epoch >= good.epoch);
    primary.wait("the refusal", |machine| {
        told(machine, "its quota is 4.00 MiB")
    });
    // What was taken, and the same once more in the image that it is merged into.
    assert!(space(&hosts.path("store/vm")) <= 9 << 20);
    assert_eq!(
        beta.machine().durable,
        Some(kept),
        "the last complete point"
    );
    // The guest goes on.
    mark(&hosts.disk("disk"), 5, 2);

    beta.stop();
    let beta = serve(&hosts, "[peers.alpha]\nquota = \"40M\"\n");
    primary.wait_replicating();
    assert!(primary.cut().epoch > good.epoch);
    beta.merged();
    beta.stop();
    primary.stop();
    assert_identical(&image, &hosts.path("store/vm/disk.raw"));
}

/// Writes `len` bytes that are not zero from `offset`.
fn fill(disk: &Path, offset: u64, len: usize) {
    let file = fs::OpenOptions::new().write(true).open(disk).unwrap();
    file.write_all_at(&vec![0x5A; len], offset).unwrap();
    file.sync_all().unwrap();
}

/// Bytes of disk that the files in a folder take.
fn space(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap());
    let files = files.filter(|file| file.file_type().unwrap().is_file());
    files
        .map(|file| file.metadata().unwrap().blocks() * 512)
        .sum()
}

fn key_of(hosts: &Hosts, name: &str) -> Digest {
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    let file = hosts.path(name).join("host.crt");
    key_digest(&CertificateDer::from_pem_file(file).unwrap()).unwrap()
}

fn operator(hosts: &Hosts, beta: &Node) -> Result<(), ClientError> {
    let identity = Identity::load(&hosts.path("coord")).unwrap();
    let address = format!("localhost:{}", beta.status().listening.unwrap().port());
    let way = Way::to(address, Some(Name::new("beta").unwrap()), identity);
    runtime().block_on(ask_status(&way)).map(|_| ())
}

/// A certificate with the right name is not enough where the key is known: another authority, or a thief of this one's key,
/// could have made it.
#[test]
fn a_name_with_another_key_is_refused() {
    let hosts = Hosts::new();
    hosts.issue("coord");
    let known = key_of(&hosts, "coord");
    let host = format!("operators = [\"coord\"]\n[keys]\nCoord = [\"{known}\"]\n");
    let beta = serve(&hosts, &host);
    operator(&hosts, &beta).unwrap();
    fs::remove_dir_all(hosts.path("coord")).unwrap();
    hosts.issue("coord");
    let refused = operator(&hosts, &beta).unwrap_err().to_string();
    let words = format!(
        "the key {} is not one that coord may have",
        key_of(&hosts, "coord")
    );
    assert!(refused.contains(&words), "{refused}");
    beta.stop();

    // A host that calls knows the keys of those it calls, too.
    let (renewed, beta_key) = (key_of(&hosts, "coord"), key_of(&hosts, "beta"));
    let both = format!("operators = [\"coord\"]\n[keys]\ncoord = [\"{known}\", \"{renewed}\"]\n");
    let beta = serve(&hosts, &both);
    operator(&hosts, &beta).unwrap();
    let trust = |key: Digest| understudy::net::Trust {
        keys: [(Name::new("beta").unwrap(), vec![key])].into(),
        ..Default::default()
    };
    let dial = |key| {
        let identity = Identity::load_with(&hosts.path("coord"), trust(key)).unwrap();
        let way = Way::to(
            format!("localhost:{}", hosts.port()),
            Some(Name::new("beta").unwrap()),
            identity,
        );
        runtime().block_on(ask_status(&way)).map(|_| ())
    };
    dial(beta_key).unwrap();
    let refused = dial(known).unwrap_err().to_string();
    assert!(refused.contains("its key is not one"), "{refused}");
    drop(beta);
}
