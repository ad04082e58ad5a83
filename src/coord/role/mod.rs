//! The role of one machine on one node, as a pure function: what is remembered, what happened, what is true afterwards.
//!
//! The truth about roles lives with the disks. Contract for the node that drives this: it keeps one [`RoleState`] per
//! machine in its store, and makes the next one durable *before* any of its effects (before it serves, answers or sends);
//! a link is over, to its last message, before the next one is heard. Whoever asks for a failover only causes events. No
//! event is trusted because of who sent it: each one names the generation it is meant for.
//!
//! ```text
//!                    hand-over of a planned failover
//!   +---------+  step down   +-------------+   peer begins at our head   +---------+
//!   | Primary |------------->| SteppedDown |---------------------------->| Replica |<-----+
//!   +---------+<-------------+-------------+                             +---------+      |
//!     ^  ^  |   reclaim, with the peer's consent                     hand-over |  | promote |
//!     |  |  |                                                       from peer  |  |         |
//!     |  |  +--- peer has a higher generation ---> +--------+                  |  v         |
//!     |  |                                         | Fenced |  <--- or ---- +------------+ |
//!     |  +---------- commit -----------------------|--------|---------------| FailedOver | |
//!     |                                            +--------+               +------------+ |
//!     +------------- (the hand-over makes a primary)    | reverse              cancel |    |
//!                                                       v                             +--->|
//!                                                 +-----------+  divergence taken         |
//!                                                 | Returning |-------------------------->+
//!                                                 +-----------+
//!   equal numbers, different identities:  Primary, SteppedDown, FailedOver --> Split --> Fenced (the loser), or back
//! ```
//!
//! # Rules
//! - A generation never goes back, and nobody is active in one that somebody else chose.
//! - A promotion is a compare-and-swap on the replica's generation. So a primary that wants to be one again after it
//!   stepped down lets the replica move to a new generation first (*reclaim*): then no hand-over of the old one works any
//!   more, however late it arrives, and only then the primary goes on.
//! - An active host that meets a higher generation stops serving. It comes back as a replica by a person's or a plan's
//!   `reverse`, after the new primary has durably taken the list of blocks in which this host may differ.
//! - A cancelled failover leaves its generation *abandoned*: nobody is primary of it. The old primary reclaims the machine
//!   with a still higher one, although the lower generation alone would have fenced it: the cancel was a person's word.
//! - Equal numbers with different identities are a split brain: both stop replicating and say so; nothing is merged by
//!   itself. They go on serving their guests until the operator names the loser.
//!
//! `tests/roles.rs` explores this function with two nodes, lossy links, crashes and operators that do the wrong thing.

mod steps;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use crate::protocol::claim::{Answer, Claim};

use crate::base::ids::{Generation, Lineage};

/// What a node remembers of its role for one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RoleState {
    /// The highest generation this node obeys or is active in.
    pub generation: Generation,
    /// The point of the history at which `generation` began, if it began here.
    pub born: Option<Lineage>,
    /// What the node does.
    pub part: Part,
    /// The generation in which this node wants to be primary again, once the peer has consented.
    pub claim: Option<Generation>,
}

/// What a node does for a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// Serves the guest and feeds the replica.
    Primary,
    /// Served until `head`, which the replica holds too, and hands over to it. Nobody writes.
    SteppedDown {
        /// The last point.
        head: Lineage,
    },
    /// Follows a primary.
    Replica {
        /// The generation belongs to a failover that was cancelled here: nobody is primary of it.
        abandoned: bool,
    },
    /// Serves the guest on a writable layer after an unplanned failover that can still be cancelled.
    FailedOver {
        /// The generation it followed before.
        from: Generation,
        /// The recovery point below the layer.
        point: Lineage,
    },
    /// Was active, and somebody was promoted since. Its images hold writes that nobody else has.
    Fenced {
        /// The generation that is active elsewhere.
        by: Generation,
    },
    /// Fenced, and asked to become the replica of the new primary.
    Returning {
        /// The generation to follow.
        to: Generation,
    },
    /// Promoted apart from a peer with an equal generation number.
    Split {
        /// The peer's generation.
        other: Generation,
        /// What this node did before it knew.
        was: Active,
    },
}

impl Part {
    /// What it is, for people.
    pub fn describe(&self) -> &'static str {
        match self {
            Self::Primary => "the primary",
            Self::SteppedDown { .. } => "a primary that stepped down",
            Self::Replica { .. } => "a replica",
            Self::FailedOver { .. } => "in a failover that is not committed",
            Self::Fenced { .. } => "fenced",
            Self::Returning { .. } => "about to become a replica",
            Self::Split { .. } => "in a split brain",
        }
    }
}

/// The parts in which a node serves a guest, or just did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Active {
    /// [`Part::Primary`].
    Primary,
    /// [`Part::SteppedDown`].
    SteppedDown {
        /// The last point.
        head: Lineage,
    },
    /// [`Part::FailedOver`].
    FailedOver {
        /// The generation it followed before.
        from: Generation,
        /// The recovery point below the layer.
        point: Lineage,
    },
}

/// Whether a witness lets this node serve. Without a lease nobody is asked, and two hosts that cannot see each other may
/// both serve after an unplanned failover; the old one learns of it at the next contact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// None is configured.
    Unneeded,
    /// It is held, and ends later than now.
    Held,
    /// It could not be renewed: stop before it ends.
    Lost,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A planned failover: nobody can write any more, and the replica acknowledged `head`, which is the machine's last.
    StepDown {
        /// The common head.
        head: Lineage,
    },
    /// A planned failover is cancelled on the host that stepped down.
    Reclaim {
        /// Identity for the generation to come.
        fresh: Uuid,
    },
    /// The primary that stepped down hands over.
    HandedOver {
        /// Its generation.
        from: Generation,
        /// Its last point.
        head: Lineage,
        /// The last point held here.
        ours: Option<Lineage>,
        /// Identity for the generation to come.
        fresh: Uuid,
    },
    /// An operator promotes the replica without its primary.
    Promote {
        /// The generation the operator saw it follow.
        expected: Generation,
        /// The recovery point to serve.
        point: Lineage,
        /// Identity for the generation to come.
        fresh: Uuid,
    },
    /// An operator keeps the unplanned failover.
    Commit,
    /// An operator discards the unplanned failover.
    Cancel,
    /// An operator lets the fenced host follow.
    Reverse,
    /// After a split brain the operator names this node the loser.
    Lose,
    /// After a split brain the operator names the other node the loser.
    Win {
        /// Identity for the generation to come.
        fresh: Uuid,
    },
    /// A peer claims the machine.
    Claimed(Claim),
    /// The peer has durably taken the blocks in which the images here may differ.
    DivergenceTaken {
        /// The peer's generation.
        by: Generation,
    },
    /// The answer to this node's own claim.
    Answered {
        /// What the peer said.
        answer: Answer,
        /// Identity for a generation that may have to be claimed.
        fresh: Uuid,
    },
}

/// Why an event changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The event belongs to another part.
    #[error("this host is {part}: {wanted}")]
    Part {
        /// What it is.
        part: &'static str,
        /// What it would have to be, or what to do first.
        wanted: &'static str,
    },
    /// Somebody else was faster.
    #[error("generation {found} is active here, not {expected}: look at the status again")]
    Generation {
        /// What the caller took for granted.
        expected: Generation,
        /// What is.
        found: Generation,
    },
    /// The hand-over is for a point that is not held here.
    #[error("the primary handed over a point that is not this replica's latest one")]
    Head,
    /// The number cannot grow.
    #[error("generation {0} is the last possible one")]
    Exhausted(Generation),
}

/// What an event leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The state from now on. Durable before anything else.
    pub next: RoleState,
    /// What to answer, to a claim.
    pub answer: Option<Answer>,
}

impl RoleState {
    /// The host on which the machine was protected first.
    pub fn primary(generation: Generation) -> Self {
        Self::new(generation, Part::Primary)
    }

    /// A host that follows `generation`.
    pub fn replica(generation: Generation) -> Self {
        Self::new(generation, Part::Replica { abandoned: false })
    }

    fn new(generation: Generation, part: Part) -> Self {
        Self {
            generation,
            born: None,
            part,
            claim: None,
        }
    }

    /// Whether the guest's writes are accepted here.
    pub fn serves(&self, lease: Lease) -> bool {
        let active = match self.part {
            Part::Primary | Part::FailedOver { .. } => true,
            Part::Split { was, .. } => !matches!(was, Active::SteppedDown { .. }),
            Part::SteppedDown { .. }
            | Part::Replica { .. }
            | Part::Fenced { .. }
            | Part::Returning { .. } => false,
        };
        active && lease != Lease::Lost
    }

    /// Whether delta logs of `generation` may be staged here.
    pub fn follows(&self, generation: Generation) -> bool {
        self.part == Part::Replica { abandoned: false } && self.generation == generation
    }

    /// What this node says first to its peer, if it is one that calls: a committed primary, one that wants to be, or one
    /// that was fenced, since the failover that fenced it may be cancelled.
    pub fn claim(&self) -> Option<Claim> {
        let active = self.part == Part::Primary;
        let calls = active || self.claim.is_some() || matches!(self.part, Part::Fenced { .. });
        calls.then_some(Claim {
            generation: self.generation,
            active,
            born: self.born,
            wants: self.claim,
        })
    }

    /// What the node is, for people.
    pub fn describe(&self) -> &'static str {
        self.part.describe()
    }

    /// What is true after `event`.
    pub fn apply(&self, event: &Event) -> Result<Step, Refused> {
        match *event {
            Event::StepDown { head } => self.step_down(head),
            Event::Reclaim { fresh } => self.reclaim(fresh),
            Event::HandedOver {
                from,
                head,
                ours,
                fresh,
            } => self.handed_over(from, head, ours, fresh),
            Event::Promote {
                expected,
                point,
                fresh,
            } => self.promote(expected, point, fresh),
            Event::Commit => self.commit(),
            Event::Cancel => self.cancel(),
            Event::Reverse => self.reverse(),
            Event::Lose => self.lose(),
            Event::Win { fresh } => self.win(fresh),
            Event::Claimed(claim) => Ok(self.claimed(&claim)),
            Event::DivergenceTaken { by } => self.divergence_taken(by),
            Event::Answered { answer, fresh } => self.answered(answer, fresh),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{checksum::Digest, units::Epoch};

    fn generation(number: u64, id: u128) -> Generation {
        Generation {
            number,
            id: Uuid::from_u128(id),
        }
    }

    fn point(epoch: u64) -> Lineage {
        Lineage {
            epoch: Epoch(epoch),
            chain: Digest::default(),
        }
    }

    const MINE: u128 = 5;
    const FRESH: Uuid = Uuid::from_u128(9);

    /// Every part a node can be in, at generation 5.
    fn parts() -> Vec<(&'static str, RoleState)> {
        let from = generation(4, 4);
        let state = |part| RoleState::new(generation(5, MINE), part);
        let head = point(7);
        let stepped_down = state(Part::SteppedDown { head });
        vec![
            ("primary", state(Part::Primary)),
            ("stepped-down", stepped_down),
            (
                "reclaiming",
                RoleState {
                    claim: Some(generation(6, 8)),
                    ..stepped_down
                },
            ),
            ("replica", state(Part::Replica { abandoned: false })),
            ("abandoned", state(Part::Replica { abandoned: true })),
            ("failed-over", state(Part::FailedOver { from, point: head })),
            (
                "fenced",
                state(Part::Fenced {
                    by: generation(6, 6),
                }),
            ),
            (
                "returning",
                state(Part::Returning {
                    to: generation(6, 6),
                }),
            ),
            (
                "split",
                state(Part::Split {
                    other: generation(5, 6),
                    was: Active::Primary,
                }),
            ),
        ]
    }

    fn events() -> Vec<(&'static str, Event)> {
        let fresh = FRESH;
        let (head, ours) = (point(7), Some(point(7)));
        let expected = generation(5, MINE);
        let claimed = |number, id, wants| {
            Event::Claimed(Claim {
                generation: generation(number, id),
                active: true,
                born: Some(head),
                wants,
            })
        };
        let higher = |abandoned| Event::Answered {
            answer: Answer::Higher {
                theirs: generation(6, 6),
                abandoned,
            },
            fresh,
        };
        let handed_over = |from, head| Event::HandedOver {
            from,
            head,
            ours,
            fresh,
        };
        let promote = |expected| Event::Promote {
            expected,
            point: head,
            fresh,
        };
        let old = generation(4, 4);
        let by = generation(6, 6);
        let consented = Event::Answered {
            answer: Answer::Follows(generation(6, 8)),
            fresh,
        };
        let consent_lost = Event::Answered {
            answer: Answer::Higher {
                theirs: generation(6, 8),
                abandoned: false,
            },
            fresh,
        };
        vec![
            ("step-down", Event::StepDown { head }),
            ("reclaim", Event::Reclaim { fresh }),
            ("handed-over", handed_over(expected, head)),
            ("promote", promote(expected)),
            ("handed-stale", handed_over(old, head)),
            ("handed-ahead", handed_over(expected, point(8))),
            ("promote-stale", promote(old)),
            ("commit", Event::Commit),
            ("cancel", Event::Cancel),
            ("reverse", Event::Reverse),
            ("lose", Event::Lose),
            ("win", Event::Win { fresh }),
            ("claim-lower", claimed(4, 4, None)),
            ("claim-own", claimed(5, MINE, None)),
            ("claim-equal", claimed(5, 6, None)),
            ("claim-higher", claimed(6, 6, None)),
            ("claim-wants", claimed(4, 4, Some(generation(6, 4)))),
            ("taken", Event::DivergenceTaken { by }),
            ("higher", higher(false)),
            ("higher-gone", higher(true)),
            ("consented", consented),
            ("consent-lost", consent_lost),
        ]
    }

    /// The part and the generation after an event; a dot where nothing changes, a cross where it is refused.
    fn cell(before: &RoleState, event: &Event) -> String {
        let Ok(step) = before.apply(event) else {
            return "x".into();
        };
        if step.next == *before {
            return ".".into();
        }
        let letter = match step.next.part {
            Part::Primary => "P",
            Part::SteppedDown { .. } => "D",
            Part::Replica { abandoned: false } => "R",
            Part::Replica { abandoned: true } => "A",
            Part::FailedOver { .. } => "O",
            Part::Fenced { .. } => "F",
            Part::Returning { .. } => "T",
            Part::Split { .. } => "S",
        };
        let claim = step.next.claim.map(|claim| format!("+{}", claim.number));
        format!(
            "{letter}{}{}",
            step.next.generation.number,
            claim.unwrap_or_default()
        )
    }

    /// The whole table: a row for each event, a column for each part at generation 5, in the order of `parts`. A letter
    /// is the part and a number the generation that follow, `+` a claim; a dot is no change, a cross a refusal.
    const TABLE: &str = "\
step-down    D5     .      .      x      x      x      x      x      x
reclaim      x      D5+6   .      x      x      x      x      x      x
handed-over  x      x      x      P6     x      x      x      x      x
promote      x      x      x      O6     O6     x      x      x      x
handed-stale x      x      x      x      x      x      x      x      x
handed-ahead x      x      x      x      x      x      x      x      x
promote-stalex      x      x      x      x      x      x      x      x
commit       .      x      x      x      x      P5     x      x      x
cancel       x      x      x      x      .      A5     x      x      x
reverse      x      x      x      x      x      x      T5     .      x
lose         x      x      x      x      x      x      x      x      F5
win          x      x      x      x      x      x      x      x      P6
claim-lower  .      .      .      .      .      .      .      .      .
claim-own    .      .      .      .      .      .      .      .      .
claim-equal  S5     S5     S5     .      .      S5     .      .      .
claim-higher F5     R6     R6     R6     R6     F5     .      .      F5
claim-wants  .      .      .      .      R6     .      .      .      .
taken        x      x      x      x      x      x      x      R6     x
higher       F5     .      D5     .      .      F5     .      .      F5
higher-gone  P5+7   D5+7   D5+7   .      .      F5     F5+7   .      F5
consented    .      .      P6     .      .      .      .      .      .
consent-lost F5     .      P6     .      .      F5     .      .      F5
";

    #[test]
    fn the_transition_table() {
        use std::fmt::Write;
        let mut table = String::new();
        for (name, event) in events() {
            write!(table, "{name:<13}").unwrap();
            for (_, before) in parts() {
                write!(table, "{:<7}", cell(&before, &event)).unwrap();
            }
            table.truncate(table.trim_end().len());
            table.push('\n');
        }
        println!("{table}");
        assert_eq!(table, TABLE);
    }

    /// Whether each part serves (with a lease held, and with one lost) and follows its own generation, whether it calls,
    /// and what it calls itself.
    #[test]
    fn what_each_part_does() {
        let told: Vec<String> = parts()
            .iter()
            .map(|(name, state)| {
                let sign = |is: bool| if is { 'y' } else { 'n' };
                let serves =
                    [Lease::Unneeded, Lease::Held, Lease::Lost].map(|l| sign(state.serves(l)));
                let follows = [generation(5, MINE), generation(5, 6), generation(4, MINE)]
                    .map(|other| sign(state.follows(other)));
                let claim = state.claim().map_or_else(
                    || "-".into(),
                    |claim| {
                        assert_eq!(
                            (claim.generation, claim.born),
                            (state.generation, state.born)
                        );
                        let wants = claim.wants.map_or(0, |wanted| wanted.number);
                        format!("{} wants {wants}", sign(claim.active))
                    },
                );
                let (serves, follows) = (String::from_iter(serves), String::from_iter(follows));
                format!("{name}: {serves} {follows} {claim} {}", state.describe())
            })
            .collect();
        let want = [
            "primary: yyn nnn y wants 0 the primary",
            "stepped-down: nnn nnn - a primary that stepped down",
            "reclaiming: nnn nnn n wants 6 a primary that stepped down",
            "replica: nnn ynn - a replica",
            "abandoned: nnn nnn - a replica",
            "failed-over: yyn nnn - in a failover that is not committed",
            "fenced: nnn nnn n wants 0 fenced",
            "returning: nnn nnn - about to become a replica",
            "split: yyn nnn - in a split brain",
        ];
        assert_eq!(told, want);
    }

    /// What a peer that claims the machine is told: a row for each claim, a column for each part.
    const ANSWERS: &str = "\
claim-lower  higher higher higher higher gone   higher higher higher higher
claim-own    split  split  split  follow split  split  split  split  split
claim-equal  split  split  split  split  split  split  split  split  split
claim-higher fenced follow follow follow follow fenced fenced diverg fenced
claim-wants  higher higher higher higher follow higher higher higher higher
";

    #[test]
    fn the_answers_to_claims() {
        use std::fmt::Write;
        let mut table = String::new();
        for (name, event) in events() {
            let Event::Claimed(claim) = event else {
                continue;
            };
            write!(table, "{name:<13}").unwrap();
            for (_, before) in parts() {
                let step = before.apply(&event).unwrap();
                let told = match step.answer.expect("a claim is answered in any case") {
                    Answer::Follows(agreed) => {
                        assert_eq!(agreed, claim.wants.unwrap_or(claim.generation));
                        "follow"
                    }
                    Answer::Higher { theirs, abandoned } => {
                        assert_eq!(theirs, before.generation);
                        if abandoned { "gone" } else { "higher" }
                    }
                    Answer::Split { theirs } => {
                        assert_eq!(theirs, before.generation);
                        "split"
                    }
                    Answer::Lower(_) => "lower",
                    Answer::NotReversed => "fenced",
                    Answer::Diverged(_) => "diverg",
                };
                write!(table, "{told:<7}").unwrap();
            }
            table.truncate(table.trim_end().len());
            table.push('\n');
        }
        println!("{table}");
        assert_eq!(table, ANSWERS);
    }

    #[test]
    fn a_step_down_is_repeated_for_its_own_point_only() {
        let primary = RoleState::primary(generation(5, MINE));
        let down = primary.apply(&Event::StepDown { head: point(7) }).unwrap();
        assert_eq!(down.next.part, Part::SteppedDown { head: point(7) });
        let again = down.next.apply(&Event::StepDown { head: point(7) });
        assert_eq!(again.unwrap().next, down.next);
        let other = down.next.apply(&Event::StepDown { head: point(8) });
        assert!(matches!(other, Err(Refused::Part { .. })));
    }

    #[test]
    fn a_fenced_host_remembers_the_highest_generation_it_met() {
        let fenced_by = |number| {
            let by = generation(number, number.into());
            RoleState::new(generation(5, MINE), Part::Fenced { by })
        };
        let learns = |state: RoleState, number: u64| {
            let theirs = generation(number, number.into());
            let claim = Claim {
                generation: theirs,
                active: true,
                born: None,
                wants: None,
            };
            let called = state.apply(&Event::Claimed(claim)).unwrap().next;
            let answer = Answer::Higher {
                theirs,
                abandoned: false,
            };
            let fresh = FRESH;
            let told = state
                .apply(&Event::Answered { answer, fresh })
                .unwrap()
                .next;
            assert_eq!(called, told, "however it learns of it");
            told
        };
        assert_eq!(learns(fenced_by(6), 8), fenced_by(8));
        assert_eq!(learns(fenced_by(8), 6), fenced_by(8));
    }

    #[test]
    fn a_returning_host_follows_the_generation_that_took_its_divergence() {
        let to = generation(6, 6);
        let returning = RoleState::new(generation(5, MINE), Part::Returning { to });
        let taken = |state: RoleState, by| state.apply(&Event::DivergenceTaken { by });
        assert!(taken(returning, generation(6, 7)).is_err());
        let replica = taken(returning, to).unwrap().next;
        assert_eq!(replica, RoleState::replica(to));
        assert_eq!(taken(replica, to).unwrap().next, replica, "told twice");
        assert!(taken(replica, generation(5, MINE)).is_err());
    }

    #[test]
    fn promotions_remember_where_they_began_and_a_cancel_forgets_it() {
        let replica = RoleState::replica(generation(5, MINE));
        let promote = Event::Promote {
            expected: generation(5, MINE),
            point: point(7),
            fresh: FRESH,
        };
        let promoted = replica.apply(&promote).unwrap().next;
        let from = generation(5, MINE);
        let point = point(7);
        assert_eq!(promoted.part, Part::FailedOver { from, point });
        assert_eq!(
            (promoted.generation.id, promoted.born),
            (FRESH, Some(point))
        );
        assert_eq!(
            promoted.apply(&Event::Commit).unwrap().next.born,
            Some(point)
        );
        let cancelled = promoted.apply(&Event::Cancel).unwrap().next;
        assert_eq!(cancelled.born, None);
        let handed_over = Event::HandedOver {
            from: cancelled.generation,
            head: point,
            ours: Some(point),
            fresh: FRESH,
        };
        let refused = cancelled.apply(&handed_over).unwrap_err().to_string();
        assert!(refused.contains("`understudy cancel`"), "{refused}");
        let last = RoleState::replica(generation(u64::MAX, MINE));
        let expected = last.generation;
        let promote = Event::Promote {
            expected,
            point,
            fresh: FRESH,
        };
        assert_eq!(last.apply(&promote), Err(Refused::Exhausted(expected)));
    }

    fn claimed(state: RoleState, generation: Generation, active: bool) -> Step {
        let claim = Claim {
            generation,
            active,
            born: Some(point(8)),
            wants: None,
        };
        state.apply(&Event::Claimed(claim)).unwrap()
    }

    fn answered(state: RoleState, answer: Answer) -> RoleState {
        let fresh = FRESH;
        state
            .apply(&Event::Answered { answer, fresh })
            .unwrap()
            .next
    }

    /// A host that is not the primary of its generation makes nobody follow it.
    #[test]
    fn a_claim_that_is_not_active_is_followed_by_nobody() {
        let (mine, higher) = (generation(5, MINE), generation(6, 6));
        let replica = RoleState::replica(mine);
        let step = claimed(replica, higher, false);
        assert_eq!(
            (step.next, step.answer),
            (replica, Some(Answer::Lower(mine)))
        );
        let returning = RoleState::new(mine, Part::Returning { to: higher });
        let step = claimed(returning, generation(7, 7), false);
        assert_eq!(
            (step.next, step.answer),
            (returning, Some(Answer::NotReversed))
        );
        let follows = claimed(returning, generation(7, 7), true).next;
        let to = generation(7, 7);
        assert_eq!(follows.part, Part::Returning { to });
    }

    #[test]
    fn a_host_that_is_fenced_or_reversed_claims_nothing_any_more() {
        let (down, claim) = (
            Part::SteppedDown { head: point(7) },
            Some(generation(6, MINE)),
        );
        let reclaiming = RoleState {
            claim,
            ..RoleState::new(generation(5, MINE), down)
        };
        let fenced = claimed(reclaiming, generation(7, 7), true).next;
        let by = generation(7, 7);
        assert_eq!(
            fenced,
            RoleState::new(reclaiming.generation, Part::Fenced { by })
        );
        let claiming = RoleState {
            claim: Some(generation(8, MINE)),
            ..fenced
        };
        let returning = claiming.apply(&Event::Reverse).unwrap().next;
        assert_eq!(
            (returning.part, returning.claim),
            (Part::Returning { to: by }, None)
        );
        // Of two that have one number, the one that called last is the one to go back to.
        let other = generation(7, 8);
        let by = claimed(fenced, other, true).next.part;
        assert_eq!(by, Part::Fenced { by: other });
    }

    /// A replica moves on to a generation that is higher than its own, or is that one.
    #[test]
    fn consent_goes_upwards() {
        let mine = generation(5, MINE);
        let replica = abandoned(mine);
        for (wants, follows) in [
            (generation(6, 4), true),
            (mine, true),
            (generation(5, 4), false),
            (generation(4, 9), false),
        ] {
            let claim = Claim {
                generation: generation(4, 4),
                active: false,
                born: None,
                wants: Some(wants),
            };
            let Step { next, answer, .. } = replica.apply(&Event::Claimed(claim)).unwrap();
            if follows {
                assert_eq!(next, RoleState::replica(wants));
                assert_eq!(answer, Some(Answer::Follows(wants)));
            } else {
                assert_eq!(next, replica);
                let (theirs, abandoned) = (mine, true);
                assert_eq!(answer, Some(Answer::Higher { theirs, abandoned }));
            }
        }
    }

    fn abandoned(generation: Generation) -> RoleState {
        RoleState::new(generation, Part::Replica { abandoned: true })
    }

    /// Answers to calls of long ago, which arrive late.
    #[test]
    fn an_answer_about_a_generation_of_before_changes_nothing() {
        let primary = RoleState::primary(generation(5, MINE));
        for theirs in [generation(4, 9), generation(5, 9), generation(5, MINE)] {
            for abandoned in [false, true] {
                let answer = Answer::Higher { theirs, abandoned };
                assert_eq!(answered(primary, answer), primary, "{answer:?}");
            }
        }
        for theirs in [generation(4, 9), generation(6, 9), generation(5, MINE)] {
            let answer = Answer::Split { theirs };
            assert_eq!(answered(primary, answer), primary, "{answer:?}");
        }
        let other = generation(5, 9);
        let split = answered(primary, Answer::Split { theirs: other });
        let was = Active::Primary;
        assert_eq!(split.part, Part::Split { other, was });
    }

    #[test]
    fn a_claim_that_is_high_enough_is_kept() {
        let down = Part::SteppedDown { head: point(7) };
        let wanting = |number| RoleState {
            claim: Some(generation(number, 1)),
            ..RoleState::new(generation(5, MINE), down)
        };
        let learns = |state| {
            let theirs = generation(6, 9);
            let abandoned = true;
            answered(state, Answer::Higher { theirs, abandoned })
        };
        assert_eq!(learns(wanting(8)), wanting(8));
        let higher = learns(wanting(6)).claim.unwrap();
        assert_eq!((higher.number, higher.id), (7, FRESH));
    }

    /// A split brain is ended as what the host was before.
    #[test]
    fn a_winner_goes_on_as_what_it_was() {
        let other = generation(5, 6);
        let (from, point) = (generation(4, 4), point(7));
        for (was, part, serves) in [
            (Active::Primary, Part::Primary, true),
            (Active::SteppedDown { head: point }, Part::Primary, false),
            (
                Active::FailedOver { from, point },
                Part::FailedOver { from, point },
                true,
            ),
        ] {
            let split = RoleState::new(generation(5, MINE), Part::Split { other, was });
            assert_eq!(split.serves(Lease::Unneeded), serves);
            let won = split.apply(&Event::Win { fresh: FRESH }).unwrap().next;
            assert_eq!((won.part, won.generation.number), (part, 6));
        }
    }
}
