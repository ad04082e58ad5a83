//! Jobs: the order of things, crashes at any moment, and what follows from a look at a host.

use std::collections::BTreeMap;

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::{
    base::{checksum::Digest, ids::Lineage, units::Epoch},
    coord::{
        job::deed::Look,
        role::Part,
        state::{Health, ReplicationState},
        view::{Seen, Sight, View},
    },
};

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn script(text: &str) -> Deed {
    Deed::Script(Script {
        run: vec![text.into()],
        within: std::time::Duration::from_secs(1),
        group: "g".into(),
        phase: Phase::Pre,
        machines: Vec::new(),
    })
}

fn stage(steps: Vec<Deed>, always: bool) -> Stage {
    Stage {
        name: "stage".into(),
        always,
        steps: steps.into_iter().map(Step::new).collect(),
    }
}

fn job(kind: Kind, stages: Vec<Stage>) -> Job {
    Job::new(JobId(1), None, kind, stages, Timestamp(0))
}

fn at(stage: usize, step: usize) -> At {
    At { stage, step }
}

/// After these events; each one is accepted.
fn after(mut job: Job, events: &[Event]) -> Job {
    for event in events {
        job = job
            .apply(event, Timestamp(5))
            .unwrap_or_else(|error| panic!("{event:?}: {error}"));
    }
    job
}

fn three(kind: Kind) -> Job {
    let manual = Deed::Manual {
        text: "look".into(),
    };
    job(
        kind,
        vec![
            stage(vec![script("a"), script("b")], false),
            stage(vec![manual], false),
            stage(vec![script("c")], true),
        ],
    )
}

fn begin_first() -> [Event; 2] {
    [Event::Begin(at(0, 0)), Event::Begin(at(0, 1))]
}

fn done(stage: usize, step: usize) -> Event {
    Event::Done(at(stage, step), Report::of("done"))
}

fn failed(stage: usize, step: usize) -> Event {
    Event::Failed(at(stage, step), Failure::of("no"))
}

#[test]
fn a_stage_begins_when_the_one_before_has_ended() {
    let job = three(Kind::Planned);
    assert_eq!(job.due(), [at(0, 0), at(0, 1)]);
    let job = after(after(job, &begin_first()), &[done(0, 1)]);
    assert_eq!(job.due(), []);
    assert_eq!(job.under_way(), [at(0, 0)]);
    assert_eq!(
        job.apply(&Event::Begin(at(1, 0)), Timestamp(1)),
        Err(Refused::NoSuchStep(JobId(1)))
    );
    assert_eq!(
        job.apply(&Event::Continue, Timestamp(1)),
        Err(Refused::NotManual(JobId(1)))
    );
    let job = after(job, &[done(0, 0), Event::Begin(at(1, 0))]);
    assert_eq!(job.due(), []);
    let job = after(job, &[Event::Continue]);
    assert_eq!(job.due(), [at(2, 0)]);
    let job = after(job, &[Event::Begin(at(2, 0)), done(2, 0)]);
    let ended = job.ended.unwrap();
    assert_eq!((ended.outcome, ended.at), (Outcome::Done, Timestamp(5)));
    assert_eq!(
        job.apply(&Event::Cancel, Timestamp(1)),
        Err(Refused::Ended(JobId(1)))
    );
}

#[test]
fn an_error_stops_a_planned_job_and_not_an_unplanned_one_and_cleaning_up_is_always_done() {
    let stops = after(after(three(Kind::Planned), &begin_first()), &[failed(0, 0)]);
    assert_eq!(stops.due(), [], "its neighbour is awaited");
    let stops = after(stops, &[done(0, 1)]);
    assert_eq!(stops.step(at(1, 0)).unwrap().state, StepState::Skipped);
    assert_eq!(stops.due(), [at(2, 0)]);
    let stops = after(stops, &[Event::Begin(at(2, 0)), done(2, 0)]);
    assert_eq!(stops.ended.unwrap().outcome, Outcome::Failed);

    let goes_on = after(
        after(three(Kind::Unplanned), &begin_first()),
        &[failed(0, 0), done(0, 1)],
    );
    assert_eq!(goes_on.due(), [at(1, 0)]);
    let goes_on = after(
        goes_on,
        &[
            Event::Begin(at(1, 0)),
            Event::Continue,
            Event::Begin(at(2, 0)),
            done(2, 0),
        ],
    );
    assert_eq!(goes_on.ended.unwrap().outcome, Outcome::Failed);
}

#[test]
fn a_cancel_waits_for_what_is_under_way_and_for_nobody_else() {
    let job = after(
        after(three(Kind::Planned), &begin_first()),
        &[done(0, 0), done(0, 1), Event::Begin(at(1, 0))],
    );
    let job = after(job, &[Event::Cancel]);
    assert_eq!(
        job.step(at(1, 0)).unwrap().state,
        StepState::Undone("cancelled".into())
    );
    assert_eq!(job.due(), [at(2, 0)], "cleaning up");
    let job = after(job, &[Event::Cancel, Event::Begin(at(2, 0)), done(2, 0)]);
    assert_eq!(job.ended.unwrap().outcome, Outcome::Cancelled);
    let at_once = after(three(Kind::Unplanned), &[Event::Cancel]);
    assert_eq!(at_once.due(), [at(2, 0)]);
    // Too late: all was done already.
    let only = job_of_one();
    let only = after(only, &[Event::Begin(at(0, 0)), Event::Cancel, done(0, 0)]);
    assert_eq!(only.ended.unwrap().outcome, Outcome::Done);
}

fn job_of_one() -> Job {
    job(Kind::Planned, vec![stage(vec![script("a")], false)])
}

/// What a driver does to the world, and what it keeps: nothing but the journal survives a crash.
struct World {
    journal: Job,
    /// How often each step had its effect.
    effects: BTreeMap<At, u32>,
    fails: Vec<bool>,
}

impl World {
    fn journal(&mut self, event: &Event) {
        self.journal = self.journal.apply(event, Timestamp(1)).unwrap();
    }

    /// Runs until the job has ended or `crash` says that this was the last durable thing or effect.
    fn run(&mut self, crash: &mut dyn FnMut() -> bool, cancel: bool) {
        if cancel && self.journal.ended.is_none() {
            self.journal(&Event::Cancel);
        }
        while self.journal.ended.is_none() {
            let ready = [self.journal.under_way(), self.journal.due()].concat();
            for &step in &ready {
                self.journal(&Event::Begin(step));
                if crash() {
                    return;
                }
            }
            for step in ready {
                for (other, is) in self.journal.steps() {
                    let before = other.stage < step.stage;
                    assert!(!before || is.state.is_final(), "{other:?} before {step:?}");
                }
                *self.effects.entry(step).or_default() += 1;
                if crash() {
                    return;
                }
                let index = self.journal.steps().take_while(|(other, _)| *other != step);
                let index = index.count();
                let deed = &self.journal.step(step).unwrap().deed;
                let event = match (deed, self.fails[index]) {
                    (Deed::Manual { .. }, _) => Event::Continue,
                    (_, true) => Event::Failed(step, Failure::of("no")),
                    (_, false) => Event::Done(step, Report::default()),
                };
                self.journal(&event);
                if crash() {
                    return;
                }
            }
        }
    }
}

proptest! {
    /// Crashes after any durable transition and any effect; whoever comes back reads the journal and goes on. It ends; what
    /// is done had its effect; what was skipped had none; cleaning up was done; no effect is repeated but by a crash.
    #[test]
    fn a_job_survives_crashes_at_any_moment(
        shape in prop::collection::vec((1usize..4, any::<bool>()), 1..6),
        fails in prop::collection::vec(prop::bool::weighted(0.15), 18),
        crashes in prop::collection::vec(1u32..8, 0..12),
        cancel in prop::option::of(0usize..6),
        planned in any::<bool>(),
    ) {
        let mut stages: Vec<_> = shape
            .iter()
            .map(|&(steps, manual)| {
                let deeds = if manual {
                    vec![Deed::Manual { text: "look".into() }]
                } else {
                    (0..steps).map(|_| script("s")).collect()
                };
                stage(deeds, false)
            })
            .collect();
        stages.push(stage(vec![script("clean up"), script("and this")], true));
        let kind = if planned { Kind::Planned } else { Kind::Unplanned };
        let mut world = World { journal: job(kind, stages), effects: BTreeMap::new(), fails };
        for (life, &crash_after) in crashes.iter().chain([&u32::MAX]).enumerate() {
            let mut left = crash_after;
            let mut crash = || { left -= 1; left == 0 };
            world.run(&mut crash, cancel == Some(life));
        }
        let job = &world.journal;
        prop_assert!(job.ended.is_some(), "{job:#?}");
        let repeated: u32 = world.effects.values().map(|times| times - 1).sum();
        // A crash repeats what was under way: at most one stage.
        prop_assert!(repeated as usize <= 3 * crashes.len());
        for (step, is) in job.steps() {
            let effects = world.effects.get(&step).copied().unwrap_or(0);
            match is.state {
                StepState::Done(_) | StepState::Failed(_) => prop_assert!(effects >= 1),
                StepState::Skipped => prop_assert_eq!(effects, 0),
                _ => {}
            }
            prop_assert!(is.attempts >= effects);
            if job.stages[step.stage].always {
                prop_assert!(effects >= 1, "cleaning up is always done");
            }
        }
        let left = job.steps().any(|(_, is)| matches!(is.state, StepState::Skipped | StepState::Undone(_)));
        let fails = job.steps().any(|(_, is)| matches!(is.state, StepState::Failed(_)));
        let outcome = job.ended.unwrap().outcome;
        prop_assert_eq!(outcome == Outcome::Done, !left && !fails);
        prop_assert_eq!(outcome == Outcome::Failed, fails);
    }

    #[test]
    fn a_job_is_the_same_in_the_journal(steps in 1usize..4) {
        let job = job(Kind::Test, vec![stage((0..steps).map(|_| script("s")).collect(), true)]);
        let text = serde_json::to_string(&job).unwrap();
        prop_assert_eq!(serde_json::from_str::<Job>(&text).unwrap(), job);
    }
}

fn generation(number: u64) -> Generation {
    let id = Uuid::from_u128(u128::from(number));
    Generation { number, id }
}

const KEY: Uuid = Uuid::from_u128(42);

fn sight(part: Part, number: u64) -> Seen {
    Seen::Present(Sight {
        part,
        generation: generation(number),
        state: ReplicationState::Replicating,
        health: Health::Normal,
        reasons: Vec::new(),
        tests: Vec::new(),
    })
}

/// A letter for what follows from a look: Done, Ask, Begun and asked again, take bacK, Undone, Silent, X refused.
fn letter(look: &Look) -> char {
    match look {
        Look::Done(_) => 'D',
        Look::Ask { begun: false } => 'A',
        Look::Ask { begun: true } => 'B',
        Look::TakeBack => 'K',
        Look::Undone(_) => 'U',
        Look::Silent(_) => 'S',
        Look::Refused(_) => 'X',
    }
}

/// A row for each verb, a column for each part the host may have by now, in the order of `parts`; two letters each: while
/// nobody wants it to stop, and when somebody does. The job was made in generation 5.
const LOOKS: &str = "\
planned   AU UU BK XX DD XX XX XX XX SS XX
unplanned XX DD XX AU XX DD XX XX XX SS XX
commit    DD DD XX XX XX AU XX XX XX SS XX
cancel    DD DD AU DD DD AU XX XX XX SS XX
reverse   XX XX XX DD DD XX AU DD XX SS XX
test      XX XX XX AU AU AU XX XX XX SS XX
end-test  DD DD DD DD DD DD DD DD DD SS DD
";

#[test]
fn what_follows_from_a_look_at_the_host() {
    use std::fmt::Write;
    let point = Lineage {
        epoch: Epoch(7),
        chain: Digest::default(),
    };
    let replica = Part::Replica { abandoned: false };
    let split = Part::Split {
        other: generation(5),
        was: crate::coord::role::Active::Primary,
    };
    let parts = [
        sight(Part::Primary, 5),
        sight(Part::Primary, 6),
        sight(Part::SteppedDown { head: point }, 5),
        sight(replica, 5),
        sight(replica, 6),
        sight(
            Part::FailedOver {
                from: generation(5),
                point,
            },
            6,
        ),
        sight(Part::Fenced { by: generation(6) }, 5),
        sight(Part::Returning { to: generation(6) }, 5),
        sight(split, 5),
        Seen::Silent("no answer".into()),
        Seen::Absent,
    ];
    let verbs = [
        ("planned", Verb::Planned),
        (
            "unplanned",
            Verb::Unplanned {
                point: None,
                force: false,
            },
        ),
        ("commit", Verb::Commit),
        ("cancel", Verb::Cancel),
        ("reverse", Verb::Reverse { force: false }),
        ("test", Verb::Test { key: KEY }),
        ("end-test", Verb::EndTest { key: KEY }),
    ];
    let mut looks = String::new();
    for (label, verb) in verbs {
        write!(looks, "{label:<9}").unwrap();
        let task = task(verb);
        for part in &parts {
            let view = View::from([(name("a"), part.clone()), (name("b"), sight(replica, 5))]);
            let both = [false, true].map(|cancel| letter(&task.look(&view, cancel)));
            write!(looks, " {}{}", both[0], both[1]).unwrap();
        }
        looks.push('\n');
    }
    println!("{looks}");
    assert_eq!(looks, LOOKS);
}

fn task(verb: Verb) -> Task {
    Task {
        machine: name("web"),
        verb,
        host: name("a"),
        generation: generation(5),
    }
}

#[test]
fn a_hand_over_is_done_when_the_other_host_says_so_whatever_the_first_one_does() {
    let replica = Part::Replica { abandoned: false };
    for first in [
        Seen::Silent("gone".into()),
        sight(replica, 6),
        sight(Part::Fenced { by: generation(6) }, 5),
    ] {
        let view = View::from([(name("a"), first), (name("b"), sight(Part::Primary, 6))]);
        for cancel in [false, true] {
            assert_eq!(letter(&task(Verb::Planned).look(&view, cancel)), 'D');
        }
    }
}

#[test]
fn a_test_is_known_again_by_its_key() {
    let mut seen = sight(Part::Replica { abandoned: false }, 5);
    if let Seen::Present(sight) = &mut seen {
        sight.tests = vec![(3, None), (4, Some(KEY))];
    }
    let view = View::from([(name("a"), seen)]);
    assert_eq!(
        letter(&task(Verb::Test { key: KEY }).look(&view, false)),
        'D'
    );
    assert_eq!(
        letter(&task(Verb::EndTest { key: KEY }).look(&view, true)),
        'B'
    );
    let other = Uuid::from_u128(9);
    assert_eq!(
        letter(&task(Verb::Test { key: other }).look(&view, false)),
        'A'
    );
}
