//! What several hosts say of one machine, and which of them has to do what is asked.

use std::{collections::BTreeMap, fmt};

use uuid::Uuid;

use super::{
    job::{Kind, Verb},
    role::Part,
    state::{Health, ReplicationState},
};
use crate::base::ids::{Generation, Name};

/// One machine, as each host sees it.
pub type View = BTreeMap<Name, Seen>;

/// What a host says of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The host cannot be asked, for this reason.
    Silent(String),
    /// It knows no such machine.
    Absent,
    /// It has a part in it.
    Present(Sight),
}

/// A machine on one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sight {
    /// The part the host plays.
    pub part: Part,
    /// The generation it obeys or is active in.
    pub generation: Generation,
    /// Where its replication stands.
    pub state: ReplicationState,
    /// How it fares.
    pub health: Health,
    /// Why not better.
    pub reasons: Vec<String>,
    /// Its test failovers: their numbers, and their keys if a coordinator started them.
    pub tests: Vec<(u32, Option<Uuid>)>,
}

impl Sight {
    /// The number of the test failover that was started with `key`.
    pub fn test(&self, key: Uuid) -> Option<u32> {
        let found = self.tests.iter().find(|(_, known)| *known == Some(key));
        found.map(|(number, _)| *number)
    }
}

/// Where something has to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// On this host, which is in this generation.
    On(Name, Generation),
    /// Nowhere: it is so already.
    Already(String),
}

/// Why nothing can be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Nowhere {
    machine: Name,
    wanted: &'static str,
    /// What each host is instead.
    view: View,
}

impl fmt::Display for Nowhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "machine {}: {}", self.machine, self.wanted)?;
        let told = self.view.iter().filter_map(|(host, seen)| match seen {
            Seen::Silent(why) => Some(format!("{host} cannot be asked ({why})")),
            Seen::Absent => None,
            Seen::Present(sight) => Some(format!("{host} is {}", sight.part.describe())),
        });
        let told: Vec<_> = told.collect();
        if told.is_empty() {
            return f.write_str("; no host knows it");
        }
        write!(f, "; {}", told.join(", "))
    }
}

/// The hosts that have a part in a machine.
fn present(view: &View) -> impl Iterator<Item = (&Name, &Sight)> {
    view.iter().filter_map(|(host, seen)| match seen {
        Seen::Present(sight) => Some((host, sight)),
        Seen::Silent(_) | Seen::Absent => None,
    })
}

/// Where `kind` has to be done for `machine`. `to`: the host on which it is wanted, for a failover. Where two hosts would
/// fit, a person has to decide.
pub fn place(kind: Kind, machine: &Name, view: &View, to: Option<&Name>) -> Result<Place, Nowhere> {
    let nowhere = |wanted| Nowhere {
        machine: machine.clone(),
        wanted,
        view: view.clone(),
    };
    let found = |fits: fn(&Part) -> bool| present(view).filter(move |(_, sight)| fits(&sight.part));
    let one = |wanted, fits: fn(&Part) -> bool| {
        let mut found = found(fits);
        match (found.next(), found.next()) {
            (Some((host, sight)), None) => Ok(Place::On(host.clone(), sight.generation)),
            _ => Err(nowhere(wanted)),
        }
    };
    let already = |what: &str, fits: fn(&Part) -> bool| {
        let place = |(host, _)| Place::Already(format!("{host} {what} already"));
        found(fits).next().map(place)
    };
    if let (Some(to), Kind::Planned | Kind::Unplanned) = (to, kind) {
        match view.get(to) {
            Some(Seen::Present(sight)) if sight.part == Part::Primary => {
                return Ok(Place::Already(format!("{to} is the primary already")));
            }
            Some(Seen::Present(sight)) if !matches!(sight.part, Part::Split { .. }) => {}
            _ => return Err(nowhere("the host it is to go to has no part in it")),
        }
    }
    let keeps = |part: &Part| matches!(part, Part::Replica { .. } | Part::FailedOver { .. });
    match kind {
        Kind::Planned => {
            let place = one("a planned failover needs one primary", |part| {
                matches!(part, Part::Primary | Part::SteppedDown { .. })
            })?;
            // Looked at before anything is done: the first thing that is done may be to shut the guest down.
            let begun = |part: &Part| matches!(part, Part::SteppedDown { .. });
            let follows = |part: &Part| *part == Part::Replica { abandoned: false };
            let wished = |(host, _): (&Name, _)| to.is_none_or(|to| to == host);
            if found(begun).next().is_some() || found(follows).any(wished) {
                return Ok(place);
            }
            Err(nowhere(
                "a planned failover needs a replica that takes over",
            ))
        }
        Kind::Unplanned => match one("an unplanned failover needs one replica", keeps)? {
            Place::On(host, _) if to.is_some_and(|to| *to != host) => {
                Err(nowhere("the host it is to go to keeps no replica"))
            }
            place => Ok(place),
        },
        Kind::Test => one("a test failover needs one replica", keeps),
        Kind::Commit => one("there is no failover to commit", |part| {
            matches!(part, Part::FailedOver { .. })
        })
        .or_else(|none| already("is the primary", |part| *part == Part::Primary).ok_or(none)),
        Kind::Cancel => one("there is no failover to cancel", |part| {
            matches!(part, Part::FailedOver { .. } | Part::SteppedDown { .. })
        }),
        Kind::Reverse => one("no host was fenced", |part| {
            matches!(part, Part::Fenced { .. })
        })
        .or_else(|none| {
            let follows = already("follows", |part| {
                matches!(
                    part,
                    Part::Returning { .. } | Part::Replica { abandoned: false }
                )
            });
            follows.ok_or(none)
        }),
    }
}

/// The verb that a kind of failover means for one machine.
pub fn verb(kind: Kind, force: bool, key: Uuid) -> Verb {
    match kind {
        Kind::Planned => Verb::Planned,
        Kind::Unplanned => Verb::Unplanned { point: None, force },
        Kind::Test => Verb::Test { key },
        Kind::Commit => Verb::Commit,
        Kind::Cancel => Verb::Cancel,
        Kind::Reverse => Verb::Reverse { force },
    }
}

/// What keeps a machine from being failed over as it is now: nothing, or one sentence each.
pub fn complaints(machine: &Name, view: &View) -> Vec<String> {
    let mut wrong = Vec::new();
    let parts: Vec<_> = present(view).collect();
    let silent: Vec<_> = view
        .iter()
        .filter(|(_, seen)| matches!(seen, Seen::Silent(_)))
        .map(|(host, _)| host.as_str())
        .collect();
    let hint = if silent.is_empty() {
        String::new()
    } else {
        format!(" (not asked: {})", silent.join(", "))
    };
    let count =
        |fits: fn(&Part) -> bool| parts.iter().filter(|(_, sight)| fits(&sight.part)).count();
    if parts.is_empty() {
        return vec![format!("machine {machine}: no host knows it{hint}")];
    }
    match count(|part| *part == Part::Primary) {
        0 => wrong.push(format!("machine {machine}: no host is its primary{hint}")),
        1 => {}
        _ => wrong.push(format!("machine {machine}: several hosts are its primary")),
    }
    if count(|part| *part == Part::Replica { abandoned: false }) == 0 {
        wrong.push(format!(
            "machine {machine}: no host follows as its replica{hint}"
        ));
    }
    for (host, sight) in parts {
        let state = match sight.part {
            Part::Primary | Part::Replica { abandoned: false } => {
                let fine = sight.state == ReplicationState::Replicating;
                (!fine).then(|| sight.state.to_string())
            }
            part => Some(part.describe().to_owned()),
        };
        if state.is_none() && sight.health <= Health::Normal {
            continue;
        }
        let health = sight.health.to_string();
        let because = sight.reasons.first().cloned().unwrap_or_default();
        let because = if because.is_empty() {
            because
        } else {
            format!(": {because}")
        };
        let is = state.unwrap_or(health);
        wrong.push(format!("machine {machine}: on {host} it is {is}{because}"));
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{checksum::Digest, ids::Lineage, units::Epoch};

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn view(parts: &[(&str, Option<Part>)]) -> View {
        let seen = |part: &Option<Part>| match part {
            None => Seen::Silent("no answer".into()),
            Some(part) => Seen::Present(Sight {
                part: *part,
                generation: generation(3),
                state: ReplicationState::Replicating,
                health: Health::Normal,
                reasons: Vec::new(),
                tests: Vec::new(),
            }),
        };
        let parts = parts.iter();
        parts.map(|(host, part)| (name(host), seen(part))).collect()
    }

    fn generation(number: u64) -> Generation {
        let id = Uuid::from_u128(u128::from(number));
        Generation { number, id }
    }

    const REPLICA: Part = Part::Replica { abandoned: false };

    fn point() -> Lineage {
        Lineage {
            epoch: Epoch(4),
            chain: Digest::default(),
        }
    }

    #[test]
    fn each_kind_is_done_where_it_has_to_be() {
        let normal = view(&[("a", Some(Part::Primary)), ("b", Some(REPLICA))]);
        let over = Part::FailedOver {
            from: generation(2),
            point: point(),
        };
        let lost = view(&[("a", None), ("b", Some(over))]);
        let back = view(&[
            ("a", Some(Part::Fenced { by: generation(4) })),
            ("b", Some(Part::Primary)),
        ]);
        let alone = view(&[("a", Some(Part::Primary)), ("b", None)]);
        let begun = view(&[
            ("a", Some(Part::SteppedDown { head: point() })),
            ("b", None),
        ]);
        let on = |host: &str| Some(Place::On(name(host), generation(3)));
        for (kind, view, to, place_is) in [
            (Kind::Planned, &normal, None, on("a")),
            (Kind::Planned, &normal, Some("b"), on("a")),
            (Kind::Unplanned, &normal, None, on("b")),
            (Kind::Unplanned, &normal, Some("c"), None),
            (Kind::Test, &normal, None, on("b")),
            (Kind::Cancel, &normal, None, None),
            (Kind::Planned, &lost, None, None),
            (Kind::Planned, &alone, None, None),
            (Kind::Planned, &begun, None, on("a")),
            (Kind::Unplanned, &lost, None, on("b")),
            (Kind::Unplanned, &lost, Some("a"), None),
            (Kind::Commit, &lost, None, on("b")),
            (Kind::Cancel, &lost, None, on("b")),
            (Kind::Reverse, &back, None, on("a")),
            (Kind::Unplanned, &back, None, None),
        ] {
            let to = to.map(name);
            let found = place(kind, &name("web"), view, to.as_ref());
            assert_eq!(found.clone().ok(), place_is, "{kind} {to:?}: {found:?}");
        }
        let already = |kind, view: &View, to: Option<&str>| {
            matches!(
                place(kind, &name("web"), view, to.map(name).as_ref()),
                Ok(Place::Already(_))
            )
        };
        assert!(
            already(Kind::Planned, &normal, Some("a")),
            "where it is wanted"
        );
        assert!(already(Kind::Commit, &normal, None));
        assert!(already(Kind::Reverse, &normal, None));
    }

    #[test]
    fn what_two_hosts_claim_is_for_a_person() {
        let part = |other| Part::Split {
            other: generation(other),
            was: super::super::role::Active::Primary,
        };
        let split = view(&[("a", Some(part(4))), ("b", Some(part(5)))]);
        for kind in [
            Kind::Planned,
            Kind::Unplanned,
            Kind::Commit,
            Kind::Reverse,
            Kind::Cancel,
            Kind::Test,
        ] {
            let why = place(kind, &name("web"), &split, None)
                .unwrap_err()
                .to_string();
            assert!(
                why.contains("a is in a split brain, b is in a split brain"),
                "{why}"
            );
        }
        let twice = view(&[("a", Some(Part::Primary)), ("b", Some(Part::Primary))]);
        assert!(place(Kind::Planned, &name("web"), &twice, None).is_err());
    }

    #[test]
    fn a_machine_that_cannot_be_failed_over_is_complained_about() {
        let said = |view: &View| complaints(&name("web"), view).join("; ");
        assert_eq!(
            said(&view(&[("a", Some(Part::Primary)), ("b", Some(REPLICA))])),
            ""
        );
        let none = View::from([
            (name("a"), Seen::Absent),
            (name("b"), Seen::Silent("x".into())),
        ]);
        assert_eq!(said(&none), "machine web: no host knows it (not asked: b)");
        let alone = view(&[("a", Some(Part::Primary)), ("b", None)]);
        assert!(said(&alone).contains("no host follows as its replica (not asked: b)"));
        let mut late = view(&[("a", Some(Part::Primary)), ("b", Some(REPLICA))]);
        if let Some(Seen::Present(sight)) = late.get_mut(&name("a")) {
            sight.health = Health::Warning;
            sight.reasons = vec!["the last durable point is 40 s old".into()];
        }
        assert_eq!(
            said(&late),
            "machine web: on a it is Warning: the last durable point is 40 s old"
        );
        let fenced = view(&[
            ("a", Some(Part::Fenced { by: generation(4) })),
            ("b", Some(Part::Primary)),
        ]);
        assert!(
            said(&fenced).contains("on a it is fenced"),
            "{}",
            said(&fenced)
        );
    }
}
