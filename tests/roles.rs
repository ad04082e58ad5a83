//! The role machine under a model checker: two hosts, a link that loses what is in flight, hosts that die, guests that write
//! and operators who give any command at any time.
//!
//! What the checker drives is [`RoleState`] itself; around it stands the smallest honest account of what the node does with
//! data: maps, cuts, epochs applied as a whole, divergence handed over. Each property is a promise of the product; each
//! seeded bug is a shortcut somebody could take, and has to be found.

mod model;
mod world;

use std::collections::BTreeSet;

use stateright::{Checker, Expectation, HasDiscoveries, Model};

use model::{Bounds, Hosts};
use world::Bug;

/// What is explored, small spaces first: all events that this many writes, lost links, deaths, promotions and commands
/// allow, in every order.
const SPACES: [Bounds; 6] = [
    bounds(0, 1, 1, 2),
    bounds(0, 0, 2, 2),
    bounds(0, 0, 1, 3),
    bounds(1, 0, 1, 2),
    bounds(1, 1, 0, 3),
    bounds(2, 0, 1, 3),
];

const fn bounds(cuts: u8, crashes: u8, promotions: u8, commands: u8) -> Bounds {
    Bounds {
        writes: 2,
        epochs: 2,
        cuts,
        crashes,
        promotions,
        commands,
    }
}

#[test]
fn no_order_of_events_breaks_a_promise() {
    let mut reached = BTreeSet::new();
    let mut wanted = BTreeSet::new();
    for bounds in SPACES {
        let hosts = Hosts { bounds, bug: None };
        let checker = hosts.checker().spawn_bfs().join();
        for property in Model::properties(checker.model()) {
            let path = checker.discovery(property.name);
            match (property.expectation, path) {
                (Expectation::Always, Some(path)) => {
                    panic!(
                        "{}: {:?} within {bounds:?}",
                        property.name,
                        path.into_actions()
                    );
                }
                (Expectation::Sometimes, found) => {
                    wanted.insert(property.name);
                    reached.extend(found.map(|_| property.name));
                }
                _ => {}
            }
        }
        let (states, depth) = (checker.unique_state_count(), checker.max_depth());
        println!("{states} states, up to {depth} events, {bounds:?}");
    }
    assert_eq!(reached, wanted, "what is never reached proves nothing");
}

#[test]
fn every_seeded_bug_is_found() {
    for bug in Bug::ALL {
        let found = SPACES.iter().find_map(|&bounds| {
            let hosts = Hosts {
                bounds,
                bug: Some(bug),
            };
            let checker = hosts.checker().finish_when(HasDiscoveries::AnyFailures);
            let checker = checker.spawn_bfs().join();
            let mut properties = Model::properties(checker.model()).into_iter();
            properties.find_map(|property| match property.expectation {
                Expectation::Always => Some((property.name, checker.discovery(property.name)?)),
                _ => None,
            })
        });
        let (property, path) = found.unwrap_or_else(|| panic!("{bug:?} goes unnoticed"));
        println!(
            "{bug:?}: not true any more that {property}, after {} events",
            path.into_actions().len()
        );
    }
}
