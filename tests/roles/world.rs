//! Two hosts and what is on its way between them: the smallest honest account of what a node does with data, around the
//! real [`RoleState`].

use std::collections::VecDeque;

use understudy::{
    base::{
        checksum::Sha256,
        ids::{Generation, Lineage},
    },
    coord::role::{Answer, Claim, Event, Lease, Part, RoleState, Step},
};
use uuid::Uuid;

/// Blocks of the machine's only disk.
pub(super) const BLOCKS: usize = 2;
/// What each block holds: the number of the write that put it there.
pub(super) type Image = [u8; BLOCKS];
/// Blocks that are marked.
type Map = [bool; BLOCKS];
pub(super) const NONE: Map = [false; BLOCKS];

/// A shortcut that must not go unnoticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bug {
    /// Maps are kept in memory only.
    MapsAreLost,
    /// Any acknowledgement clears everything.
    AnyAcknowledgementClears,
    /// The new primary does not take the blocks in which the returning host differs.
    DivergenceIsForgotten,
    /// Going back to an older point does not mark what is given up.
    RollbackIsForgotten,
    /// Whatever arrives is staged.
    GenerationIsIgnored,
    /// A primary steps down although the guest wrote since the last epoch.
    StepsDownTooEarly,
    /// Where the peer's generation began is not compared.
    BirthIsIgnored,
    /// A primary takes back a hand-over without asking.
    ReclaimsAlone,
    /// A role change is answered before it is durable.
    RoleIsLost,
    /// An epoch becomes visible piece by piece.
    EpochIsApplied1By1,
    /// A cancelled failover leaves what was written in it.
    CancelKeepsTheLayer,
    /// A new link is welcomed while something of the one before may still arrive.
    OldLinkLivesOn,
}

impl Bug {
    pub(super) const ALL: [Self; 12] = [
        Self::MapsAreLost,
        Self::AnyAcknowledgementClears,
        Self::DivergenceIsForgotten,
        Self::RollbackIsForgotten,
        Self::GenerationIsIgnored,
        Self::StepsDownTooEarly,
        Self::BirthIsIgnored,
        Self::ReclaimsAlone,
        Self::RoleIsLost,
        Self::EpochIsApplied1By1,
        Self::CancelKeepsTheLayer,
        Self::OldLinkLivesOn,
    ];
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Message {
    Claim(Claim),
    Answer {
        answer: Answer,
        head: Lineage,
        diverged: Map,
    },
    Epoch {
        generation: Generation,
        parent: Lineage,
        lineage: Lineage,
        changes: [Option<u8>; BLOCKS],
    },
    Staged(Lineage),
    Taken {
        by: Generation,
        head: Lineage,
    },
    HandOver {
        from: Generation,
        head: Lineage,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Host {
    pub(super) up: bool,
    pub(super) role: RoleState,
    pub(super) data: Image,
    pub(super) open: Map,
    pub(super) closing: Map,
    /// The point that the peer holds as well, or, on a replica, its latest one.
    pub(super) head: Lineage,
    /// The epoch that may be on its way.
    pub(super) pending: Option<Lineage>,
    /// On a replica: whether `data` is exactly `head`.
    pub(super) exact: bool,
    /// The recovery point before the head.
    pub(super) older: Option<(Lineage, Image)>,
    /// The image at the head, while something else is served.
    pub(super) below: Option<Image>,
    /// The peer follows, and epochs may flow.
    pub(super) session: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) hosts: [Host; 2],
    /// Who called; nothing while there is no link.
    pub(super) link: Option<usize>,
    pub(super) wires: [VecDeque<Message>; 2],
    /// A message of a lost link, and who will get it.
    pub(super) late: Option<(usize, Message)>,
    pub(super) writes: u8,
    pub(super) cuts: u8,
    pub(super) crashes: u8,
    pub(super) promotions: u8,
    pub(super) commands: u8,
    pub(super) fresh: u8,
    /// What each point was at its cut.
    pub(super) truth: Vec<(Lineage, Image)>,
    pub(super) broken: Option<&'static str>,
}

pub(super) const STALE: &str = "only a replica of the same generation takes changes";
pub(super) const NOT_A_POINT: &str = "a replica's point is what the machine was at that cut";
pub(super) const LOSS: &str = "a planned failover loses nothing";
pub(super) const UNTRACKED: &str = "blocks that differ are marked on at least one side";
pub(super) const BACKWARDS: &str = "a generation never goes back";
pub(super) const SHARED: &str = "two active hosts never share a generation";
pub(super) const UNKNOWN: &str = "no disk has to be compared as a whole";
pub(super) const BOTH: &str = "two hosts serve only after somebody promoted one without the other";

/// The point after `head`: its chain is made of all that led to it, as the real one.
pub(super) fn follows(generation: &Generation, head: &Lineage, data: Image) -> Lineage {
    let mut digest = Sha256::default();
    digest.update(&head.chain.0);
    digest.update(generation.id.as_bytes());
    digest.update(&data);
    Lineage {
        epoch: head.epoch.next(),
        chain: digest.finish(),
    }
}

fn join(one: Map, other: Map) -> Map {
    std::array::from_fn(|block| one[block] || other[block])
}

fn differing(one: Image, other: Image) -> Map {
    std::array::from_fn(|block| one[block] != other[block])
}

impl Host {
    pub(super) fn new(role: RoleState, head: Lineage, session: bool) -> Self {
        Self {
            up: true,
            role,
            data: [0; BLOCKS],
            open: NONE,
            closing: NONE,
            head,
            pending: None,
            exact: true,
            older: None,
            below: None,
            session,
        }
    }

    pub(super) fn marked(&self) -> Map {
        join(self.open, self.closing)
    }

    pub(super) fn is_committed(&self) -> bool {
        self.role.part == Part::Primary
    }

    /// Forgets what only a replica or only a primary has.
    fn settle(&mut self) {
        self.below = None;
        self.older = None;
    }
}

impl World {
    /// An identity that nobody has yet. It counts as given when a role holds it.
    pub(super) fn new_id(&self) -> Uuid {
        Uuid::from_u128(u128::from(self.fresh) + 1)
    }

    fn breaks(&mut self, property: &'static str) {
        self.broken.get_or_insert(property);
    }

    pub(super) fn unlink(&mut self) {
        self.link = None;
        for wire in &mut self.wires {
            wire.clear();
        }
        for host in &mut self.hosts {
            host.session = false;
        }
    }

    /// Applies an event to the role of host `i`; whether it was taken.
    pub(super) fn apply(&mut self, i: usize, event: &Event) -> Option<Step> {
        let before = self.hosts[i].role;
        let step = before.apply(event).ok()?;
        if step.next.generation.number < before.generation.number {
            self.breaks(BACKWARDS);
        }
        let new = Some(self.new_id());
        let given = [Some(step.next.generation), step.next.claim];
        if given.iter().any(|given| given.map(|given| given.id) == new) {
            self.fresh += 1;
        }
        self.hosts[i].role = step.next;
        Some(step)
    }

    pub(super) fn send(&mut self, from: usize, message: Message) {
        self.wires[from].push_back(message);
    }

    fn say_answer(&mut self, i: usize, answer: Answer) {
        let host = &self.hosts[i];
        let message = Message::Answer {
            answer,
            head: host.head,
            diverged: host.marked(),
        };
        self.send(i, message);
    }

    /// A primary compares what it was told with what it knows.
    fn reconcile(&mut self, i: usize, head: Lineage) {
        if ![Some(self.hosts[i].head), self.hosts[i].pending].contains(&Some(head)) {
            self.breaks(UNKNOWN);
        }
        let host = &mut self.hosts[i];
        if host.pending != Some(head) {
            host.open = host.marked();
        }
        host.closing = NONE;
        host.head = head;
        host.pending = None;
        host.session = true;
    }

    pub(super) fn deliver(&mut self, bug: Option<Bug>, to: usize, message: Message) {
        // The link before has to be over, to its last message, before a new one is heard.
        let first = matches!(message, Message::Claim(_) | Message::HandOver { .. });
        if first && bug != Some(Bug::OldLinkLivesOn) {
            self.late = self.late.take().filter(|(late, _)| *late != to);
        }
        match message {
            Message::Claim(claim) => self.hear_claim(bug, to, claim),
            Message::Answer {
                answer,
                head,
                diverged,
            } => self.hear_answer(bug, to, answer, head, diverged),
            Message::Epoch {
                generation,
                parent,
                lineage,
                changes,
            } => self.hear_epoch(bug, to, generation, parent, lineage, changes),
            Message::Staged(lineage) => self.hear_staged(bug, to, lineage),
            Message::Taken { by, head } => self.hear_taken(to, by, head),
            Message::HandOver { from, head } => self.hear_handover(to, from, head),
        }
    }

    fn hear_claim(&mut self, bug: Option<Bug>, i: usize, mut claim: Claim) {
        let head = self.hosts[i].head;
        if bug == Some(Bug::BirthIsIgnored)
            && let Part::SteppedDown { head } = self.hosts[i].role.part
        {
            claim.born = Some(head);
        }
        let was = self.hosts[i].role;
        let Some(answer) = self
            .apply(i, &Event::Claimed(claim))
            .and_then(|step| step.answer)
        else {
            return;
        };
        let now = self.hosts[i].role;
        if matches!(was.part, Part::SteppedDown { .. }) && matches!(now.part, Part::Replica { .. })
        {
            let host = &mut self.hosts[i];
            host.settle();
            host.exact = true;
            host.pending = None;
        }
        if matches!(now.part, Part::Fenced { .. }) {
            self.hosts[i].head = head;
        }
        self.say_answer(i, answer);
    }

    fn hear_answer(
        &mut self,
        bug: Option<Bug>,
        i: usize,
        answer: Answer,
        head: Lineage,
        diverged: Map,
    ) {
        let fresh = self.new_id();
        if self.apply(i, &Event::Answered { answer, fresh }).is_none() {
            return self.unlink();
        }
        let host = &self.hosts[i];
        let generation = host.role.generation;
        match answer {
            Answer::Follows(theirs) if theirs == generation && host.is_committed() => {
                self.reconcile(i, head);
            }
            Answer::Diverged(theirs) if theirs == generation && host.is_committed() => {
                let host = &mut self.hosts[i];
                host.open = host.marked();
                host.closing = NONE;
                host.pending = None;
                if bug != Some(Bug::DivergenceIsForgotten) {
                    host.open = join(host.open, diverged);
                }
                let head = host.head;
                self.send(
                    i,
                    Message::Taken {
                        by: generation,
                        head,
                    },
                );
            }
            _ => self.unlink(),
        }
    }

    fn hear_epoch(
        &mut self,
        bug: Option<Bug>,
        i: usize,
        generation: Generation,
        parent: Lineage,
        lineage: Lineage,
        changes: [Option<u8>; BLOCKS],
    ) {
        let host = &self.hosts[i];
        let fits = host.role.follows(generation) && host.head == parent;
        if !fits && bug != Some(Bug::GenerationIsIgnored) {
            return self.unlink();
        }
        if !host.role.follows(generation) {
            self.breaks(STALE);
        }
        let host = &mut self.hosts[i];
        host.older = host.exact.then_some((host.head, host.data));
        for (block, change) in changes.into_iter().enumerate() {
            let kept = bug == Some(Bug::EpochIsApplied1By1) && block > 0;
            if let (Some(version), false) = (change, kept) {
                host.data[block] = version;
            }
        }
        host.head = lineage;
        host.exact = true;
        self.send(i, Message::Staged(lineage));
    }

    fn hear_staged(&mut self, bug: Option<Bug>, i: usize, lineage: Lineage) {
        let host = &mut self.hosts[i];
        if bug == Some(Bug::AnyAcknowledgementClears) {
            host.open = NONE;
        }
        if host.pending == Some(lineage) {
            host.closing = NONE;
            host.head = lineage;
            host.pending = None;
        }
    }

    fn hear_handover(&mut self, i: usize, from: Generation, head: Lineage) {
        let fresh = self.new_id();
        let ours = self.hosts[i].head;
        let event = Event::HandedOver {
            from,
            head,
            ours: Some(ours),
            fresh,
        };
        if self.apply(i, &event).is_some() {
            if self.hosts[i].data != self.hosts[1 - i].data {
                self.breaks(LOSS);
            }
            self.hosts[i].settle();
        }
        self.unlink();
    }

    fn hear_taken(&mut self, i: usize, by: Generation, head: Lineage) {
        let returning = matches!(self.hosts[i].role.part, Part::Returning { .. });
        if self.apply(i, &Event::DivergenceTaken { by }).is_some() && returning {
            let host = &mut self.hosts[i];
            host.open = NONE;
            host.closing = NONE;
            host.pending = None;
            host.head = head;
            host.exact = false;
            host.settle();
        }
        self.unlink();
    }

    pub(super) fn promote(&mut self, bug: Option<Bug>, i: usize, older: bool) -> Option<()> {
        let host = &self.hosts[i];
        if !host.exact {
            return None;
        }
        let (point, image) = if older {
            host.older?
        } else {
            (host.head, host.data)
        };
        let expected = host.role.generation;
        let fresh = self.new_id();
        let event = Event::Promote {
            expected,
            point,
            fresh,
        };
        self.apply(i, &event)?;
        self.promotions += 1;
        let host = &mut self.hosts[i];
        host.below = Some(host.data);
        if bug != Some(Bug::RollbackIsForgotten) {
            host.open = differing(host.data, image);
        }
        host.data = image;
        Some(())
    }

    pub(super) fn cancel(&mut self, bug: Option<Bug>, i: usize) -> Option<()> {
        self.apply(i, &Event::Cancel)?;
        let host = &mut self.hosts[i];
        let below = host.below.take()?;
        if bug != Some(Bug::CancelKeepsTheLayer) {
            host.data = below;
        }
        host.open = NONE;
        Some(())
    }

    /// The failover is kept: the points beyond the one that is served are gone.
    pub(super) fn commit(&mut self, i: usize) -> Option<()> {
        let Part::FailedOver { point, .. } = self.hosts[i].role.part else {
            return None;
        };
        self.apply(i, &Event::Commit)?;
        let host = &mut self.hosts[i];
        host.head = point;
        host.settle();
        Some(())
    }

    pub(super) fn check(&mut self) {
        let [one, other] = &self.hosts;
        let marked = join(one.marked(), other.marked());
        // Blocks of an epoch that arrived and was not acknowledged are in the closing map.
        let untracked =
            (0..BLOCKS).any(|block| one.data[block] != other.data[block] && !marked[block]);
        let active = |host: &Host| host.role.serves(Lease::Unneeded);
        let both = active(one) && active(other);
        let shared = both && one.role.generation == other.role.generation;
        let no_point = self.hosts.iter().any(|host| {
            matches!(host.role.part, Part::Replica { .. })
                && host.exact
                && self
                    .truth
                    .iter()
                    .any(|(point, image)| *point == host.head && *image != host.data)
        });
        let unasked = both && self.promotions == 0;
        for (broken, property) in [
            (untracked, UNTRACKED),
            (shared, SHARED),
            (no_point, NOT_A_POINT),
            (unasked, BOTH),
        ] {
            if broken {
                self.breaks(property);
            }
        }
    }
}
