//! What the other host asks of a machine: to be fed, to take over, to tell where it may differ.

use std::sync::Arc;

use super::{member::Member, record::AdoptionRecord};
use crate::{
    base::{
        chain::chain,
        clock::Timestamp,
        ids::{Generation, Lineage, Name},
        units::{DiskIndex, Extent},
    },
    coord::role::{Answer, Event, Part},
    disk::Access,
    node::{
        control::OperateError,
        served::Served,
        sources::open_images,
        tracking::{self, Tracking},
    },
    protocol::message::{Hello, Refusal},
};

/// Runs of one disk in which its image may differ from what the primary holds.
pub(in crate::node) type Differing = (Name, Vec<Extent>);

impl Member {
    /// A host greets as the primary, or wants to be it: the replica it may feed, and the generation it is fed in.
    pub(in crate::node) fn claimed(
        &self,
        hello: &Hello,
    ) -> Result<(Arc<Served>, Generation), Refusal> {
        let _turn = self.turn();
        let served = self.following();
        if served
            .as_ref()
            .is_some_and(|served| served.importing.is_running())
        {
            let detail = format!("a portable copy of machine {} is being imported", self.name);
            return Err(Refusal::NotNow { detail });
        }
        // The link before is over, to its last message, before this one is heard.
        let over = served
            .as_ref()
            .map(|served| served.end_session("replaced by a newer connection"));
        let before = self.record().role;
        let step = self.turn_to(&Event::Claimed(hello.claim), |_| {});
        let step = step.map_err(refusal)?;
        drop(over);
        // A claim that changes nothing leaves what runs alone, but for a replica that is not open yet.
        let closed = matches!(step.next.part, Part::Replica { .. }) && self.following().is_none();
        let trouble = if step.next != before || closed {
            self.arrange().err()
        } else {
            None
        };
        let answer = step.answer.ok_or_else(|| Refusal::Failed {
            detail: "a claim was not answered".into(),
        })?;
        let Answer::Follows(generation) = answer else {
            return Err(Refusal::Role { answer });
        };
        if let Some(trouble) = trouble {
            return Err(Refusal::Failed {
                detail: chain(&trouble),
            });
        }
        let served = self.following().ok_or_else(|| Refusal::Failed {
            detail: "the replica is not open".into(),
        })?;
        if hello.claim.active {
            served.prepare(&hello.disks)?;
        }
        Ok((served, generation))
    }

    /// A primary that stepped down hands over.
    pub(in crate::node) fn handed_over(
        &self,
        from: Generation,
        head: Lineage,
    ) -> Result<Generation, Refusal> {
        self.take_over(from, head).map_err(refusal)
    }

    /// Where the images here may differ from what the primary of generation `by` holds.
    pub(in crate::node) fn differing(&self, by: Generation) -> Result<Vec<Differing>, Refusal> {
        let _turn = self.turn();
        let record = self.record();
        if record.role.part != (Part::Returning { to: by }) {
            return Err(Refusal::NotNow {
                detail: format!("this host is {}", record.role.describe()),
            });
        }
        let failed = |error: &dyn std::error::Error| Refusal::Failed {
            detail: chain(error),
        };
        let configured = self.images(&record);
        let disks = open_images(&configured, Access::ReadWrite, &self.shared().ids)
            .map_err(|error| failed(&error))?;
        let folder = self.places().tracking();
        let tracking = Tracking {
            id: record.id,
            folder: &folder,
            ledger: &self.shared().ledger,
        };
        let machine = tracking::open(self.name(), tracking, &disks, &self.shared().clock)
            .map_err(|error| failed(&error))?;
        let mut differing: Vec<Differing> = disks
            .iter()
            .map(|disk| (disk.name.clone(), Vec::new()))
            .collect();
        for (disk, run) in machine.divergence() {
            differing[disk.index()].1.push(run);
        }
        let mut stamps = |disk: DiskIndex| disks[disk.index()].stamped.0.take();
        machine.close(&mut stamps).map_err(|error| failed(&error))?;
        let bytes: u64 = differing
            .iter()
            .flat_map(|(_, runs)| runs)
            .map(|run| run.len)
            .sum();
        tracing::info!(machine = %self.name(), bytes, "tells the new primary where the images here may differ");
        Ok(differing)
    }

    /// The primary of generation `by` has durably taken what [`differing`](Self::differing) told, and goes on from
    /// `point`: this host follows it.
    pub(in crate::node) fn returned(
        &self,
        by: Generation,
        point: Lineage,
        cut: Timestamp,
    ) -> Result<(), Refusal> {
        let _turn = self.turn();
        self.turn_to(&Event::DivergenceTaken { by }, |record| {
            record.adoption = Some(AdoptionRecord {
                lineage: point,
                cut,
                exact: false,
            });
        })
        .map_err(refusal)?;
        self.arrange().map_err(|error| Refusal::Failed {
            detail: chain(&error),
        })
    }
}

fn refusal(error: OperateError) -> Refusal {
    match error {
        OperateError::Failed(detail) => Refusal::Failed { detail },
        other => Refusal::NotNow {
            detail: other.to_string(),
        },
    }
}
