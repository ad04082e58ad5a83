//! What may happen to two hosts, and what must hold whatever happens.

use std::collections::VecDeque;

use stateright::{Model, Property};
use understudy::{
    base::{
        checksum::Digest,
        ids::{Generation, Lineage},
        units::Epoch,
    },
    coord::role::{Event, Lease, Part, RoleState},
};
use uuid::Uuid;

use super::world::{
    BACKWARDS, BLOCKS, BOTH, Bug, Host, LOSS, Message, NONE, NOT_A_POINT, SHARED, STALE, UNKNOWN,
    UNTRACKED, World, follows,
};

/// How far to explore.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) writes: u8,
    /// Points there may be beyond the first.
    pub(super) epochs: u8,
    pub(super) cuts: u8,
    pub(super) crashes: u8,
    /// Promotions without the primary.
    pub(super) promotions: u8,
    /// Other commands of operators.
    pub(super) commands: u8,
}

/// Two hosts, sound or with one bug.
#[derive(Clone, Debug)]
pub(super) struct Hosts {
    pub(super) bounds: Bounds,
    pub(super) bug: Option<Bug>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Write(usize, usize),
    Cut(usize),
    Call(usize),
    Deliver(usize),
    LinkLost,
    /// The link is lost, and what host `.0` sent first is still on its way.
    LinkDelays(usize),
    DeliverLate,
    Crash(usize),
    Restart(usize),
    StepDown(usize),
    Reclaim(usize),
    Promote(usize),
    PromoteOlder(usize),
    Commit(usize),
    Cancel(usize),
    Reverse(usize),
    Lose(usize),
    Win(usize),
}

/// What host `i` starts as.
fn first(i: usize) -> RoleState {
    let first = Generation {
        number: 1,
        id: Uuid::from_u128(200),
    };
    if i == 0 {
        RoleState::primary(first)
    } else {
        RoleState::replica(first)
    }
}

impl Hosts {
    fn act(&self, world: &mut World, action: Action) -> Option<()> {
        match action {
            Action::Write(i, block) => {
                world.writes += 1;
                let version = world.writes;
                let host = &mut world.hosts[i];
                host.open[block] = true;
                host.data[block] = version;
            }
            Action::Cut(i) => Self::cut(world, i),
            Action::Call(i) => Self::call(world, i)?,
            Action::Deliver(from) => {
                let message = world.wires[from].pop_front()?;
                world.deliver(self.bug, 1 - from, message);
            }
            Action::LinkLost => {
                world.cuts += 1;
                world.unlink();
            }
            Action::LinkDelays(from) => {
                world.cuts += 1;
                let message = world.wires[from].pop_front()?;
                world.late = Some((1 - from, message));
                world.unlink();
            }
            Action::DeliverLate => self.deliver_late(world)?,
            Action::Crash(i) => {
                world.crashes += 1;
                world.unlink();
                let host = &mut world.hosts[i];
                host.up = false;
                if self.bug == Some(Bug::MapsAreLost) {
                    host.open = NONE;
                    host.closing = NONE;
                }
                if self.bug == Some(Bug::RoleIsLost) {
                    host.role = first(i);
                }
            }
            Action::Restart(i) => world.hosts[i].up = true,
            _ => self.command(world, action)?,
        }
        world.check();
        Some(())
    }

    fn cut(world: &mut World, i: usize) {
        let host = &mut world.hosts[i];
        let lineage = follows(&host.role.generation, &host.head, host.data);
        let (parent, data) = (host.head, host.data);
        host.closing = host.open;
        host.open = NONE;
        host.pending = Some(lineage);
        let closing = host.closing;
        let changes = std::array::from_fn(|block| closing[block].then_some(data[block]));
        let generation = host.role.generation;
        world.truth.retain(|(point, _)| *point != lineage);
        world.truth.push((lineage, data));
        world.send(
            i,
            Message::Epoch {
                generation,
                parent,
                lineage,
                changes,
            },
        );
    }

    fn call(world: &mut World, i: usize) -> Option<()> {
        let host = &world.hosts[i];
        let message = match (host.role.part, host.role.claim()) {
            (_, Some(claim)) => Message::Claim(claim),
            (Part::SteppedDown { head }, None) => Message::HandOver {
                from: host.role.generation,
                head,
            },
            _ => return None,
        };
        world.link = Some(i);
        world.send(i, message);
        Some(())
    }

    fn deliver_late(&self, world: &mut World) -> Option<()> {
        let (to, message) = world.late.take()?;
        let before = (
            world.link,
            world.wires.clone(),
            world.hosts.each_ref().map(|host| host.session),
        );
        world.deliver(self.bug, to, message);
        // Whatever it leads to belongs to a link that is gone.
        (world.link, world.wires) = (before.0, before.1);
        for (host, session) in world.hosts.iter_mut().zip(before.2) {
            host.session = session;
        }
        Some(())
    }

    /// What operators do.
    fn command(&self, world: &mut World, action: Action) -> Option<()> {
        match action {
            Action::Promote(i) => return world.promote(self.bug, i, false),
            Action::PromoteOlder(i) => return world.promote(self.bug, i, true),
            _ => {}
        }
        world.commands += 1;
        match action {
            Action::StepDown(i) => {
                let host = &world.hosts[i];
                let proved = host.session && host.marked() == NONE && host.pending.is_none();
                if !proved && self.bug != Some(Bug::StepsDownTooEarly) {
                    return None;
                }
                let head = host.head;
                world.apply(i, &Event::StepDown { head })?;
            }
            Action::Reclaim(i) => {
                let fresh = world.new_id();
                world.apply(i, &Event::Reclaim { fresh })?;
                let role = &mut world.hosts[i].role;
                if self.bug == Some(Bug::ReclaimsAlone)
                    && let Some(generation) = role.claim.take()
                {
                    role.generation = generation;
                    role.part = Part::Primary;
                }
            }
            Action::Commit(i) => world.commit(i)?,
            Action::Cancel(i) => world.cancel(self.bug, i)?,
            Action::Reverse(i) => {
                world.apply(i, &Event::Reverse)?;
            }
            Action::Lose(i) => {
                world.apply(i, &Event::Lose)?;
            }
            Action::Win(i) => {
                let fresh = world.new_id();
                world.apply(i, &Event::Win { fresh })?;
            }
            _ => {}
        }
        Some(())
    }
}

impl Model for Hosts {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let head = Lineage {
            epoch: Epoch(1),
            chain: Digest([0; 32]),
        };
        vec![World {
            hosts: [
                Host::new(first(0), head, false),
                Host::new(first(1), head, false),
            ],
            link: None,
            wires: [VecDeque::new(), VecDeque::new()],
            late: None,
            writes: 0,
            cuts: 0,
            crashes: 0,
            promotions: 0,
            commands: 0,
            fresh: 0,
            truth: vec![(head, [0; BLOCKS])],
            broken: None,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        if world.broken.is_some() {
            return;
        }
        for i in 0..2 {
            let host = &world.hosts[i];
            if !world.wires[i].is_empty() && world.hosts[1 - i].up {
                actions.push(Action::Deliver(i));
            }
            if !host.up {
                actions.push(Action::Restart(i));
                continue;
            }
            if world.crashes < self.bounds.crashes {
                actions.push(Action::Crash(i));
            }
            if host.role.serves(Lease::Unneeded) && world.writes < self.bounds.writes {
                actions.extend((0..BLOCKS).map(|block| Action::Write(i, block)));
            }
            let owes = host.open != NONE || !world.hosts[1 - i].exact;
            let may_cut = host.is_committed() && host.session && host.pending.is_none();
            if may_cut && owes && world.truth.len() <= usize::from(self.bounds.epochs) {
                actions.push(Action::Cut(i));
            }
            // A claim is made once on a link, but a host that steps down has more to say.
            let quiet = world.wires.iter().all(VecDeque::is_empty);
            let more = !(host.session && host.is_committed());
            let may_call = world.link.is_none() || world.link == Some(i) && quiet && more;
            if may_call && world.hosts[1 - i].up {
                actions.push(Action::Call(i));
            }
            if world.promotions < self.bounds.promotions {
                actions.extend([Action::Promote(i), Action::PromoteOlder(i)]);
            }
            if world.commands < self.bounds.commands {
                actions.extend([
                    Action::StepDown(i),
                    Action::Reclaim(i),
                    Action::Commit(i),
                    Action::Cancel(i),
                    Action::Reverse(i),
                    Action::Lose(i),
                    Action::Win(i),
                ]);
            }
        }
        if let Some(caller) = world.link
            && world.cuts < self.bounds.cuts
        {
            // Answers are read by whoever called, on that link and no other.
            actions.extend([Action::LinkLost, Action::LinkDelays(caller)]);
        }
        if let Some((to, _)) = &world.late
            && world.hosts[*to].up
        {
            actions.push(Action::DeliverLate);
        }
    }

    fn next_state(&self, before: &World, action: Action) -> Option<World> {
        let mut world = before.clone();
        self.act(&mut world, action)?;
        (world != *before).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let holds = |name: &'static str, condition: fn(&Self, &World) -> bool| {
            Property::<Self>::always(name, condition)
        };
        let reached = |name: &'static str, condition: fn(&Self, &World) -> bool| {
            Property::<Self>::sometimes(name, condition)
        };
        vec![
            holds(STALE, |_, world| world.broken != Some(STALE)),
            holds(NOT_A_POINT, |_, world| world.broken != Some(NOT_A_POINT)),
            holds(LOSS, |_, world| world.broken != Some(LOSS)),
            holds(UNTRACKED, |_, world| world.broken != Some(UNTRACKED)),
            holds(BACKWARDS, |_, world| world.broken != Some(BACKWARDS)),
            holds(SHARED, |_, world| world.broken != Some(SHARED)),
            holds(UNKNOWN, |_, world| world.broken != Some(UNKNOWN)),
            holds(BOTH, |_, world| world.broken != Some(BOTH)),
            reached(
                "planned failover: roles are exchanged and replication runs back",
                |_, world| {
                    let [old, new] = &world.hosts;
                    world.promotions == 0
                        && new.is_committed()
                        && new.session
                        && old.exact
                        && world.writes > 0
                        && old.data == new.data
                },
            ),
            reached(
                "a planned failover that was cancelled goes on where it was",
                |_, world| {
                    let [primary, _] = &world.hosts;
                    primary.is_committed() && primary.role.generation.number > 1 && primary.session
                },
            ),
            reached(
                "an unplanned failover that was cancelled goes on where it was",
                |_, world| {
                    let [primary, _] = &world.hosts;
                    world.promotions > 0 && primary.is_committed() && primary.session
                },
            ),
            reached("a fenced primary has blocks of its own", |_, world| {
                let [old, _] = &world.hosts;
                matches!(old.role.part, Part::Fenced { .. }) && old.marked() != NONE
            }),
            reached("it returns and has the same bytes again", |_, world| {
                let [old, new] = &world.hosts;
                world.promotions > 0
                    && matches!(old.role.part, Part::Replica { .. })
                    && old.exact
                    && new.is_committed()
                    && world.writes > 1
                    && old.data == new.data
            }),
            reached(
                "without a lease both may serve after an unplanned failover",
                |_, world| {
                    world
                        .hosts
                        .iter()
                        .all(|host| host.role.serves(Lease::Unneeded))
                },
            ),
        ]
    }
}
