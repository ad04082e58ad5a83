//! What the other host asks of a machine, as in `node::host::peers`: to be fed, to take over, to tell where it may differ.

use std::sync::Arc;

use super::{
    host::Host,
    record::{AdoptionRecord, Asked, Done, Record, not_now, told},
    setup::Bug,
};
use crate::{
    base::{
        clock::Timestamp,
        ids::{Generation, Lineage},
        units::{DiskIndex, Extent},
    },
    coord::role::{Answer, Claim, Event, Part, RoleState},
    protocol::message::Refusal,
    replica::Head,
};

impl Host {
    /// The other host greets as the primary, or wants to be it: the generation in which it may feed the replica here.
    pub(super) fn claimed(&mut self, claim: &Claim) -> Result<Generation, Refusal> {
        if self.record().is_none() {
            self.greeted(claim)?;
        }
        // The link before is over, to its last message, before this one is heard.
        self.end_session();
        let before = self.role();
        let step = self.turn_to(&Event::Claimed(*claim), |_| {})?;
        let closed = matches!(step.next.part, Part::Replica { .. }) && self.following().is_none();
        let arranged = if Some(step.next) != before || closed {
            self.arrange()
        } else {
            Ok(())
        };
        let generation = match step.answer {
            Some(Answer::Follows(generation)) => generation,
            Some(_) if self.setup.has(Bug::GenerationIgnored) && self.following().is_some() => {
                claim.generation
            }
            Some(answer) => return Err(Refusal::Role { answer }),
            None => return Err(failed("a claim was not answered")),
        };
        arranged?;
        let Some(following) = self.following() else {
            return Err(failed("the replica is not open"));
        };
        if claim.active {
            let prepared = following.store.prepare(&self.setup.specs());
            prepared.map_err(|error| failed(&told(error)))?;
        }
        Ok(generation)
    }

    /// The machine is not known here yet.
    fn greeted(&mut self, claim: &Claim) -> Result<(), Refusal> {
        if !claim.active {
            let detail = "no such machine is known here".into();
            return Err(Refusal::NotNow { detail });
        }
        self.remember(Record::new(RoleState::replica(claim.generation)))
            .map_err(|why| failed(&why))?;
        Ok(self.arrange()?)
    }

    /// A primary that stepped down hands over to this host.
    pub(super) fn take_over(&mut self, from: Generation, head: Lineage) -> Asked<Generation> {
        let Some(role) = self.role() else {
            return not_now("no such machine");
        };
        let asked_again = role.born == Some(head)
            && from.number.checked_add(1) == Some(role.generation.number)
            && role.part == Part::Primary;
        if asked_again {
            return Ok(role.generation);
        }
        let Some(store) = self.store() else {
            return not_now("there is no replica here");
        };
        self.end_session();
        self.clear_for_promotion(role)?;
        let ours = match store.head() {
            Head::Complete(lineage) => Some(lineage),
            _ => None,
        };
        let event = Event::HandedOver {
            from,
            head,
            ours,
            fresh: self.fresh(),
        };
        let step = self.turn_to(&event, |record| record.layer_over(head))?;
        // The machine is this host's from here on, whatever comes.
        let _ = self.arrange();
        Ok(step.next.generation)
    }

    /// Where the images here may differ from what the primary of generation `by` holds.
    pub(super) fn differing(&mut self, by: Generation) -> Asked<Vec<(DiskIndex, Extent)>> {
        let role = self.role();
        if role.map(|role| role.part) != Some(Part::Returning { to: by }) {
            return not_now("this host is not returning to that generation");
        }
        let disks = self.open_images()?;
        let machine = self.open_machine(disks)?;
        let differing = machine.divergence();
        let closed =
            machine.close(&mut |disk: DiskIndex| self.folder.stamp(&self.file_name(disk.index())));
        closed.map_err(told)?;
        if self.setup.has(Bug::DivergenceIgnored) {
            return Ok(Vec::new());
        }
        Ok(differing)
    }

    /// The primary of generation `by` has durably taken what differs, and goes on from `point`: this host follows it.
    pub(super) fn returned(&mut self, by: Generation, point: Lineage, cut: Timestamp) -> Asked {
        self.turn_to(&Event::DivergenceTaken { by }, |record| {
            record.adoption = Some(AdoptionRecord {
                lineage: point,
                cut,
                exact: false,
            });
        })?;
        self.arrange()
    }

    /// Obeys what the other host answered to a claim.
    pub(super) fn hear(&mut self, answer: Answer) -> Asked {
        let fresh = self.fresh();
        self.turn_to(&Event::Answered { answer, fresh }, |record| {
            if record.role.part == Part::Primary {
                record.adoption = None;
            }
        })?;
        Ok(())
    }

    /// Makes one step of the replica's upkeep.
    pub(super) fn keep_up(&self) -> Done<Option<crate::replica::Upkeep>> {
        let store = self.store().map(|store| Arc::clone(&store));
        store.map_or(Ok(None), |store| store.upkeep().map_err(told))
    }
}

fn failed(detail: &str) -> Refusal {
    Refusal::Failed {
        detail: detail.to_owned(),
    }
}
