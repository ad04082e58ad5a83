//! What is asked of a running host, and what it refuses, stands in its audit log.

use std::{fs, path::Path};

use understudy::{
    base::ids::Name,
    net::Identity,
    node::{
        audit,
        control::{CancelRequest, ask_cancel, ask_status},
        operate::Way,
    },
};

use super::serve;
use crate::support::{Hosts, PROGRAM, call, can_mount, mark, run, runtime};

#[test]
fn who_asks_for_what_is_written_down_and_cannot_be_unwritten() {
    if !can_mount() {
        return;
    }
    let hosts = Hosts::new();
    hosts.issue("coord");
    hosts.issue("mallory");
    let image = hosts.image("disk.raw", 8);
    let beta = serve(&hosts, "operators = [\"coord\"]\n[peers.alpha]\n");
    let way = |who: &str| {
        let identity = Identity::load(&hosts.path(who)).unwrap();
        let address = format!("localhost:{}", hosts.port());
        Way::to(address, Some(Name::new("beta").unwrap()), identity)
    };
    let wait = runtime();
    wait.block_on(ask_status(&way("mallory"))).unwrap_err();
    let primary = hosts.primary(&[&image], &[]);
    primary.wait_replicating();
    mark(&hosts.disk("disk"), 3, 1);
    primary.cut();
    // One that fails, from the network; one that succeeds, from the socket.
    let vm = Name::new("vm").unwrap();
    let nothing = CancelRequest {
        rescue: true,
        ..CancelRequest::default()
    };
    wait.block_on(ask_cancel(&way("coord"), &vm, nothing))
        .unwrap_err();
    let (code, _, said) = call(&beta, &["failover", "vm", "--unplanned", "--force"]);
    assert_eq!(code, 0, "{said}");
    call(&beta, &["reload"]);
    let path = hosts.path("store/audit.log");
    let found = |event: &str, words: &[&str]| {
        let all = events(&path);
        let lines = all.iter().filter(|line| line["event"] == event);
        let mut lines = lines.map(ToString::to_string);
        let there = lines.any(|line| words.iter().all(|word| line.contains(word)));
        assert!(there, "{event} {words:?}: {all:#?}");
    };
    found("started", &["version"]);
    found(
        "refused",
        &["mallory at 127.0.0.1", "not on our allow list"],
    );
    found(
        "asked",
        &["\"who\":\"coord\"", "/v1/machines/vm/cancel", "rescue"],
    );
    found("answered", &["\"who\":\"coord\"", "409", "no rescue point"]);
    found("asked", &["\"who\":\"socket\"", "/failover", "unplanned"]);
    found("answered", &["\"who\":\"socket\"", "/failover", "200"]);
    found("role", &["\"machine\":\"vm\"", "for alpha"]);
    found("role", &["\"machine\":\"vm\"", "\"number\":2"]);
    found("reloaded", &["beta: valid until"]);
    // Looking changes nothing and is nobody's business.
    let mut all = events(&path).into_iter();
    assert!(all.all(|line| !line.to_string().contains("/v1/status")));
    drop(primary);
    beta.stop();
    a_change_is_found(&path);
}

/// By the verb, which names the line after the one that was changed.
fn a_change_is_found(path: &Path) {
    let file = path.to_str().unwrap();
    let done = run(PROGRAM, ["audit", "verify", file]);
    assert_eq!(done.status.code(), Some(0));
    let verified = audit::verify(&[path.to_owned()]).unwrap();
    let said = String::from_utf8(done.stdout).unwrap();
    assert!(said.contains(&verified.head.to_string()), "{said}");
    let text = fs::read_to_string(path).unwrap();
    fs::write(path, text.replacen("mallory", "trustee", 1)).unwrap();
    let done = run(PROGRAM, ["audit", "verify", file]);
    assert_eq!(done.status.code(), Some(1));
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(
        said.contains("it does not follow from the line before it"),
        "{said}"
    );
}

fn events(path: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    lines.collect()
}
