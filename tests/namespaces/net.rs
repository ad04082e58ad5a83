//! A network of namespaces: each host has one, with a link to a bridge in one more.
//!
//! ```text
//!   <name>-0  eth0 ──── port0  \
//!   <name>-1  eth0 ──── port1   bridge, in <name>-hub
//!   <name>-2  eth0 ──── port2  /
//! ```

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::{find_program, have, must, run, skip};

/// Networks that this process has made.
static MADE: AtomicUsize = AtomicUsize::new(0);

/// The network. Dropping it removes the namespaces, and with them all that is in them.
pub(super) struct Net {
    name: String,
    hosts: usize,
}

impl Net {
    /// For so many hosts; nothing, said loudly, where that cannot be done.
    pub(super) fn new(hosts: usize) -> Option<Self> {
        if !have(&["ip", "tc", "nft", "nsenter"]) {
            return None;
        }
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("understudy-{}-{number}", std::process::id());
        // From here on it is cleaned up, however far it came.
        let net = Self { name, hosts };
        let hub = net.hub();
        let able = |args: &[&str]| run("ip", args).status.success();
        let bridge = ["-n", &hub, "link", "add", "bridge", "type", "bridge"];
        if !able(&["netns", "add", &hub]) || !able(&bridge) {
            skip("no network namespaces, or no bridges in them");
            return None;
        }
        ip(&hub, &["link", "set", "bridge", "up"]);
        for host in 0..hosts {
            let (own, port) = (net.host(host), port(host));
            must("ip", ["netns", "add", &own]);
            let pair = [
                "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &own,
            ];
            ip(&hub, &pair);
            ip(&hub, &["link", "set", &port, "master", "bridge", "up"]);
            let address = format!("{}/24", address(host));
            ip(&own, &["address", "add", &address, "dev", "eth0"]);
            for link in ["lo", "eth0"] {
                ip(&own, &["link", "set", link, "up"]);
            }
        }
        Some(net)
    }

    fn hub(&self) -> String {
        format!("{}-hub", self.name)
    }

    fn host(&self, host: usize) -> String {
        format!("{}-{host}", self.name)
    }

    /// Runs nft in a host's namespace; what it printed.
    fn nft(&self, host: usize, args: &[&str]) -> String {
        let nft = find_program("nft").expect("looked for before");
        let nft = nft.to_str().unwrap().to_owned();
        must(
            "nsenter",
            [&[self.enter(host).as_str(), &nft], args].concat(),
        )
    }

    /// What makes `nsenter` go into a host's namespace. `ip netns exec` would take the mounts along.
    pub(super) fn enter(&self, host: usize) -> String {
        format!("--net=/run/netns/{}", self.host(host))
    }

    /// A host's cable is pulled.
    pub(super) fn down(&self, host: usize) {
        ip(&self.hub(), &["link", "set", &port(host), "down"]);
    }

    /// And plugged in again.
    pub(super) fn up(&self, host: usize) {
        ip(&self.hub(), &["link", "set", &port(host), "up"]);
    }

    /// What a host sends goes at this rate, in the words of tc.
    pub(super) fn slow(&self, host: usize, rate: &str) {
        let bucket = [
            "root", "tbf", "rate", rate, "burst", "64kb", "latency", "300ms",
        ];
        let to = ["-n", &self.host(host), "qdisc", "replace", "dev", "eth0"];
        must("tc", [&to[..], &bucket].concat());
    }

    pub(super) fn fast(&self, host: usize) {
        must(
            "tc",
            [
                "-n",
                &self.host(host),
                "qdisc",
                "delete",
                "dev",
                "eth0",
                "root",
            ],
        );
    }

    /// So many of a hundred packets that come to a host are lost.
    pub(super) fn lossy(&self, host: usize, percent: u32) {
        self.nft(host, &["add", "table", "inet", "lab"]);
        let hook = "{ type filter hook input priority 0; }";
        self.nft(host, &["add", "chain", "inet", "lab", "input", hook]);
        let chance = format!("meta l4proto udp numgen random mod 100 < {percent} counter drop");
        self.nft(host, &["add", "rule", "inet", "lab", "input", &chance]);
    }

    /// How many packets [`Net::lossy`] has lost.
    pub(super) fn lost(&self, host: usize) -> u64 {
        let rules = self.nft(host, &["list", "chain", "inet", "lab", "input"]);
        let mut words = rules
            .split_whitespace()
            .skip_while(|word| *word != "packets");
        words.nth(1).expect("a counter").parse().unwrap()
    }

    pub(super) fn lossless(&self, host: usize) {
        self.nft(host, &["delete", "table", "inet", "lab"]);
    }
}

/// The address of a host.
pub(super) fn address(host: usize) -> String {
    format!("10.77.0.{}", host + 1)
}

/// Runs ip in a namespace.
fn ip(within: &str, args: &[&str]) {
    must("ip", [&["-n", within], args].concat());
}

fn port(host: usize) -> String {
    format!("port{host}")
}

impl Drop for Net {
    fn drop(&mut self) {
        let hosts = (0..self.hosts).map(|host| self.host(host));
        for name in hosts.chain([self.hub()]) {
            // Of one that was never made there is nothing to remove.
            run("ip", ["netns", "delete", &name]);
        }
    }
}
