//! `understudy reload` on a running host: nobody is disturbed but who has lost the right to be there.

use std::fs;

use understudy::{
    base::{
        clock::{Clock, SystemClock},
        ids::Name,
    },
    net::{Identity, revoke},
    node::{
        control::{ClientError, ask_status},
        coordinator::ask_reload,
        operate::Way,
    },
};

use super::serve;
use crate::support::{Hosts, call, can_mount, mark, runtime};

/// Signs the list of revoked certificates, with these names on it.
fn revoked(hosts: &Hosts, names: &[&str]) -> String {
    let names: Vec<_> = names.iter().map(|name| Name::new(name).unwrap()).collect();
    let now = SystemClock::default().wall();
    let list = revoke::revoke(&hosts.path("ca"), &names, &[], now).unwrap();
    list.path.to_str().unwrap().to_owned()
}

#[test]
fn a_revoked_primary_is_cut_off_and_a_renewed_one_goes_on() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    let list = revoked(&hosts, &[]);
    let image = hosts.image("disk.raw", 8);
    let replica = hosts.replica(&["--crl", &list]);
    let primary = hosts.primary(&[&image], &["--interval", "200ms"]);
    primary.wait_replicating();
    let before = primary.cut();

    // What cannot be used changes nothing.
    let good = fs::read(&list).unwrap();
    fs::write(&list, "rubbish").unwrap();
    let (code, _, said) = call(&replica, &["reload"]);
    assert_eq!(code, 1, "{said}");
    assert!(
        said.contains("nothing was reloaded") && said.contains(&list),
        "{said}"
    );
    fs::write(&list, good).unwrap();
    primary.cut();
    let (code, said, _) = call(&replica, &["reload"]);
    assert_eq!(code, 0);
    assert!(said.contains("0 certificates are revoked"), "{said}");
    mark(&hosts.disk("disk"), 3, 1);
    let cut = primary.cut();
    assert!(cut.epoch > before.epoch);

    revoked(&hosts, &["alpha"]);
    let (code, said, _) = call(&replica, &["reload"]);
    assert_eq!(code, 0);
    assert!(
        said.contains("1 certificates are revoked; closed a link with alpha"),
        "{said}"
    );
    primary.wait("a refusal", |machine| {
        let told = machine.reasons.join("; ");
        told.contains("our certificate was revoked")
    });
    mark(&hosts.disk("disk"), 4, 2);
    assert!(primary.try_cut().is_err());
    assert_eq!(replica.machine().durable, Some(cut), "nothing was taken");

    fs::remove_dir_all(hosts.path("alpha")).unwrap();
    hosts.issue("alpha");
    assert_eq!(call(&primary, &["reload"]).0, 0);
    primary.wait_replicating();
    assert!(primary.cut().epoch > cut.epoch);
}

/// Whoever operates a host from elsewhere has no business with its files.
#[test]
fn a_reload_is_asked_for_on_the_host_itself() {
    let hosts = Hosts::new();
    hosts.issue("coord");
    let beta = serve(&hosts, "operators = [\"coord\"]\n");
    let run = runtime();
    let reloaded = run.block_on(ask_reload(beta.socket())).unwrap();
    assert_eq!(reloaded[0].name.as_str(), "beta");
    assert_eq!(reloaded[0].revoked, None);
    let operator = Identity::load(&hosts.path("coord")).unwrap();
    let address = format!("localhost:{}", hosts.port());
    let way = Way::to(address, Some(Name::new("beta").unwrap()), operator);
    run.block_on(ask_status(&way)).unwrap();
    let refused = run.block_on(ask_reload(&way)).unwrap_err();
    assert!(matches!(refused, ClientError::Refused(_)), "{refused}");
}
