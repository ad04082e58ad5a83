//! Real hosts against those who mean harm: identities that were taken back, peers that ask for more than is theirs.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod audit;
mod confined;
mod floods;
mod hardening;
mod mount_helper;
mod peers;
mod reload;
mod supply;

use std::fs;

use crate::support::{Hosts, Node};

/// Starts host `beta` from a configuration: what every such host says, and `more`.
fn serve(hosts: &Hosts, more: &str) -> Node {
    serve_through(hosts, more, &[])
}

/// The same, started by another program.
fn serve_through(hosts: &Hosts, more: &str, starter: &[&str]) -> Node {
    let config = hosts.path("beta.toml");
    let text = format!(
        "store = \"store\"\nidentity = \"beta\"\nlisten = \"127.0.0.1:{}\"\n{more}",
        hosts.port()
    );
    fs::write(&config, text).unwrap();
    let command = hosts.command("beta", &["serve", "--config", config.to_str().unwrap()]);
    let node = Node::start(&command.through(starter), None);
    hosts.set_port(node.status().listening.unwrap().port());
    node
}
