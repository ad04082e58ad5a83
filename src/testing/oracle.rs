//! The truth: what the machine really held at every cut, and what each host must and must not do.

use std::collections::BTreeMap;

use super::{content::Contents, truth::Truth};
use crate::{
    base::{
        ids::Lineage,
        units::{BLOCK_BYTES, DiskIndex, Extent, SECTOR_BYTES, to_u64},
    },
    coord::role::{Lease, Part, RoleState},
};

/// A promise that was broken, in words.
pub(super) type Broken = String;

/// What an observed change of roles was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    None,
    Promoted,
    Committed,
    Cancelled,
    SteppedDown,
    TookOver,
    Followed,
    Fenced,
    Split,
    Returned,
}

/// A cut that became a point of the history.
#[derive(Clone, Debug)]
struct Point {
    /// Nothing for an initial copy, which is no state the machine was ever in.
    contents: Option<Contents>,
    parent: Option<Lineage>,
}

/// What a former primary had when it became a replica.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub(super) truth: Truth,
    /// The point that its new primary continues.
    pub(super) lineage: Lineage,
}

/// What is true of one host.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The role that it was seen in last.
    pub(super) role: Option<RoleState>,
    /// What the disks hold that are served here, or were served here last.
    pub(super) truth: Option<Truth>,
    /// The last point that the replica here said to be durable.
    pub(super) said: Option<Lineage>,
    /// The rescue point, and what the images hold below everything that arrives.
    pub(super) kept: Option<Kept>,
    /// The point of the rescue point that was here last. As it was then nothing of the machine was ever shown here.
    never_shown: Option<Lineage>,
    /// It was replaced in the generation of this number, or handed over: it writes nothing more in it.
    stopped: Option<u64>,
}

/// What is true.
#[derive(Debug)]
pub(super) struct Oracle {
    pub(super) hosts: [Known; 2],
    disks: usize,
    history: BTreeMap<[u8; 32], Point>,
    numbers: u32,
}

impl Oracle {
    pub(super) fn new(disks: usize) -> Self {
        Self {
            hosts: <[Known; 2]>::default(),
            disks,
            history: BTreeMap::new(),
            numbers: 0,
        }
    }

    /// A host was seen in this role; `taken` is the point from which its new primary goes on, if it was told one.
    pub(super) fn sees(
        &mut self,
        host: usize,
        role: RoleState,
        taken: Option<Lineage>,
    ) -> Result<Turn, Broken> {
        let before = self.hosts[host].role.replace(role);
        if before == Some(role) {
            return Ok(Turn::None);
        }
        let was = before.map(|before| before.part);
        if before.is_some_and(|before| before.generation.number > role.generation.number) {
            return Err(format!(
                "P5: host {host} goes back from {before:?} to {role:?}"
            ));
        }
        let other = &self.hosts[1 - host];
        if role.serves(Lease::Unneeded)
            && let Some(theirs) = other.role
            && theirs.serves(Lease::Unneeded)
            && theirs.generation == role.generation
        {
            return Err(format!(
                "P5: both hosts are active: {role:?} and {theirs:?}"
            ));
        }
        let turn = match (was, role.part) {
            (None, Part::Primary) => {
                self.hosts[host].truth = Some(Truth::new(Contents::blank(self.disks)));
                Turn::None
            }
            (Some(Part::Replica { .. }), Part::Primary | Part::FailedOver { .. }) => {
                self.promoted(host, role)?
            }
            (Some(Part::FailedOver { .. }), Part::Replica { .. }) => {
                self.hosts[host].truth = None;
                Turn::Cancelled
            }
            (Some(Part::SteppedDown { head }), Part::Replica { .. }) => {
                let Some(truth) = self.hosts[host].truth.take() else {
                    return Err("a host follows that was no primary".into());
                };
                self.holds_all(head, &truth)?;
                Turn::Followed
            }
            (Some(_), Part::Replica { .. }) if self.hosts[host].truth.is_some() => {
                let mut truth = self.hosts[host].truth.take();
                truth.iter_mut().for_each(Truth::rests);
                let kept = truth.zip(taken);
                self.hosts[host].kept = kept.map(|(truth, lineage)| Kept { truth, lineage });
                Turn::Returned
            }
            (_, Part::SteppedDown { .. }) => {
                self.hosts[host].truth.iter_mut().for_each(Truth::rests);
                Turn::SteppedDown
            }
            (_, Part::Fenced { .. }) => Turn::Fenced,
            (_, Part::Split { .. }) => Turn::Split,
            (Some(Part::FailedOver { .. }), Part::Primary) => Turn::Committed,
            _ => Turn::None,
        };
        let known = &mut self.hosts[host];
        let number = role.generation.number;
        match role.part {
            Part::Fenced { .. } | Part::SteppedDown { .. } | Part::Returning { .. } => {
                known.stopped = known.stopped.max(Some(number));
            }
            _ if known.stopped < Some(number) => known.stopped = None,
            _ => {}
        }
        if !matches!(role.part, Part::Replica { .. } | Part::FailedOver { .. }) {
            known.said = None;
            let kept = known.kept.take().map(|kept| kept.lineage);
            known.never_shown = kept.or(known.never_shown);
        }
        Ok(turn)
    }

    /// The disks of the new primary begin with what the machine held at the point.
    fn promoted(&mut self, host: usize, role: RoleState) -> Result<Turn, Broken> {
        let point = role.born.ok_or("a promotion without a point")?;
        let contents = self.at(point).cloned();
        let contents = contents.ok_or_else(|| format!("P2: {point:?} was never cut"))?;
        let other = &self.hosts[1 - host];
        if role.part == Part::Primary {
            let Some(truth) = &other.truth else {
                return Err("a planned failover without a primary".into());
            };
            self.holds_all(point, truth)?;
        }
        self.hosts[host].truth = Some(Truth::new(contents));
        Ok(match role.part {
            Part::Primary => Turn::TookOver,
            _ => Turn::Promoted,
        })
    }

    /// A planned failover loses nothing.
    fn holds_all(&self, point: Lineage, truth: &Truth) -> Result<(), Broken> {
        match self.at(point) {
            Some(contents) if *contents == truth.now => Ok(()),
            _ => Err(format!(
                "P1: the machine was handed over at {}, and that is not what the guest was told",
                point.epoch
            )),
        }
    }

    /// A guest was told that its write to a host is done.
    pub(super) fn written(&self, host: usize) -> Result<(), Broken> {
        match self.hosts[host].stopped {
            None => Ok(()),
            Some(number) => Err(format!(
                "P5: host {host} was replaced in generation {number} and takes writes all the same"
            )),
        }
    }

    /// What the disks that are served on a host hold.
    pub(super) fn held(&self, host: usize) -> Option<Contents> {
        Some(self.hosts[host].truth.as_ref()?.now.clone())
    }

    /// The number of the next write.
    pub(super) fn number(&mut self) -> u32 {
        self.numbers += 1;
        self.numbers
    }

    /// A log was sealed: its point may become durable on the replica.
    pub(super) fn sealed(
        &mut self,
        lineage: Lineage,
        parent: Option<Lineage>,
        contents: Option<Contents>,
    ) -> Result<(), Broken> {
        if parent.is_some_and(|parent| parent.epoch >= lineage.epoch) {
            return Err(format!("{} follows {parent:?}", lineage.epoch));
        }
        let known = Point { contents, parent };
        match self.history.insert(lineage.chain.0, known.clone()) {
            // A log that was lost may be sent again word for word.
            Some(before) if before.contents != known.contents || before.parent != parent => Err(
                format!("two histories lead to the point of {}", lineage.epoch),
            ),
            _ => Ok(()),
        }
    }

    /// What the machine held at a point, if it was ever in it.
    pub(super) fn at(&self, point: Lineage) -> Option<&Contents> {
        self.history.get(&point.chain.0)?.contents.as_ref()
    }

    /// A replica shows a point.
    pub(super) fn shows(&self, point: Lineage, found: &Contents) -> Result<(), Broken> {
        let Some(truth) = self.at(point) else {
            return Err(format!("P2: {point:?} is a point that was never cut"));
        };
        if truth == found {
            return Ok(());
        }
        Err(format!(
            "P2: the view of {} is not what the machine held: (disk, sector, found, true) {:?}",
            point.epoch,
            found.differences(truth)
        ))
    }

    /// The replica on a host has `head`: nothing that it had said to be durable is gone.
    pub(super) fn holds(&self, host: usize, head: Option<Lineage>) -> Result<(), Broken> {
        let Some(said) = self.hosts[host].said else {
            return Ok(());
        };
        let mut at = head;
        while let Some(lineage) = at {
            if lineage == said {
                return Ok(());
            }
            let known = self.history.get(&lineage.chain.0);
            at = known.and_then(|known| known.parent);
        }
        Err(format!(
            "P2: the replica said that {} is durable, and its head is {head:?}",
            said.epoch
        ))
    }

    /// Every block in which the disks of a primary differ from what its peer holds at `lineage` is in `told`.
    pub(super) fn covers(
        &self,
        host: usize,
        lineage: Lineage,
        told: &[(DiskIndex, Extent)],
    ) -> Result<(), Broken> {
        let (known, peer) = (&self.hosts[host], &self.hosts[1 - host]);
        let follows = |role: RoleState| known.role.is_some_and(|own| role.follows(own.generation));
        // At that point a former primary holds what it held, not what the machine did.
        let kept = (peer.kept.as_ref()).filter(|kept| kept.lineage == lineage);
        let point = match kept {
            // Promoted since at a later point: nobody is asked what differs from this one.
            Some(_) if !peer.role.is_some_and(follows) => return Ok(()),
            None if peer.never_shown == Some(lineage) => return Ok(()),
            Some(kept) if !kept.truth.is_sure() => return Ok(()),
            Some(kept) => Some(&kept.truth.now),
            None => self.at(lineage),
        };
        let (Some(point), Some(truth)) = (point, &known.truth) else {
            return Ok(());
        };
        for (disk, (now, then)) in truth.now.0.iter().zip(&point.0).enumerate() {
            let runs = told.iter().filter(|(index, _)| index.index() == disk);
            let mut runs = runs.map(|(_, run)| *run).peekable();
            let pairs = now.iter().zip(then).enumerate();
            for (sector, _) in pairs.filter(|(_, (now, then))| now != then) {
                let offset = to_u64(sector) * SECTOR_BYTES;
                while runs.next_if(|run| run.end() <= offset).is_some() {}
                if runs.peek().is_none_or(|run| run.offset > offset) {
                    return Err(format!(
                        "P3: block {} of disk {disk} differs from {} and is not marked",
                        offset / BLOCK_BYTES,
                        lineage.epoch
                    ));
                }
            }
        }
        Ok(())
    }

    /// Points of the history so far.
    pub(super) fn points(&self) -> usize {
        self.history.len()
    }
}
