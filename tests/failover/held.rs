//! The point below the layers of a failover is there as long as they are, whatever fails meanwhile.

use std::fs;

use understudy::coord::role::Part;

use super::{
    roles::{Pair, check, epoch, part, verb},
    tests::{call, mark, marked, start},
};
use crate::support::{MACHINE, can_mount};

/// A host fails over to the first of these points, and commits; a test of a later point holds its fold up. Then it dies.
fn killed_in_a_fold() -> Option<Pair> {
    if !can_mount() {
        return None;
    }
    let (pair, alpha, beta) = Pair::replicating();
    let (here, there) = (pair.on_alpha(), pair.on_beta());
    let chosen = epoch(&alpha, &here, 1).to_string();
    for number in 2..=6 {
        epoch(&alpha, &here, number);
    }
    alpha.stop();
    let failover = ["failover", MACHINE, "--unplanned", "--force", "--point"];
    verb(&beta, &[&failover[..], &[&chosen]].concat());
    mark(&there[0], 2000, 99);
    start(&beta, None);
    verb(&beta, &["commit", MACHINE]);
    beta.kill();
    Some(pair)
}

/// The layers cannot be opened for a while. What lies below them is not merged away meanwhile, although retention has
/// passed over it.
#[test]
fn a_start_that_fails_lets_the_point_of_a_failover_not_go() {
    let Some(pair) = killed_in_a_fold() else {
        return;
    };
    let layers = pair.hosts.path("beta-store").join(MACHINE).join("layers");
    let aside = pair.hosts.path("aside");
    fs::rename(&layers, &aside).unwrap();
    fs::write(&layers, "").unwrap();
    pair.keep.set(0);
    for _ in 0..3 {
        let beta = pair.beta();
        assert_eq!(part(&beta), Part::Primary);
        // What there is to merge is merged before it ends.
        beta.stop();
    }
    fs::remove_file(&layers).unwrap();
    fs::rename(&aside, &layers).unwrap();
    let (beta, there) = (pair.beta(), pair.on_beta());
    check(&there, 1);
    assert_eq!(marked(&there[0], 2000), 99);
    // The test can be ended on a primary, too.
    assert_eq!(call(&beta, &["cancel", MACHINE]).0, 0);
    beta.wait("the failover folded", |m| {
        !m.reasons.iter().any(|why| why.contains("folded"))
    });
    let (code, _, said) = call(&beta, &["cancel", MACHINE]);
    assert!(code != 0 && said.contains("nothing to cancel"), "{said}");
    assert_eq!(marked(&there[0], 2000), 99);
    beta.stop();
}

/// A host is failed over and committed, and its disks cannot be mounted. A second failover is refused, and the first one's
/// point stays, although retention has passed over it.
#[test]
fn a_failover_that_is_refused_lets_no_other_failovers_point_go() {
    if !can_mount() {
        return;
    }
    let (pair, alpha, beta) = Pair::replicating();
    beta.stop();
    pair.keep.set(0);
    let beta = pair.beta();
    let here = pair.on_alpha();
    let chosen = epoch(&alpha, &here, 1);
    start(&beta, Some(chosen));
    for number in 2..=6 {
        epoch(&alpha, &here, number);
    }
    alpha.stop();
    let disks = pair.hosts.path("beta-store").join(MACHINE).join("disks");
    fs::write(&disks, "").unwrap();
    let failover = ["failover", MACHINE, "--unplanned", "--force"];
    let point = chosen.to_string();
    assert_ne!(
        call(&beta, &[&failover[..], &["--point", &point]].concat()).0,
        0,
        "its disks are not mounted"
    );
    assert!(matches!(part(&beta), Part::FailedOver { .. }));
    call(&beta, &["commit", MACHINE]);
    assert_eq!(part(&beta), Part::Primary);
    let (code, _, said) = call(&beta, &failover);
    assert!(code != 0 && said.contains("primary"), "{said}");
    // Now nothing holds the point but the failover.
    assert_eq!(call(&beta, &["cancel", MACHINE]).0, 0);
    beta.stop();
    fs::remove_file(&disks).unwrap();
    let beta = pair.beta();
    check(&pair.on_beta(), 1);
    beta.stop();
}
