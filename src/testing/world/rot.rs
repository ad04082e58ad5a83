//! A bit flips on a replica at rest: an error or a verification tells, and no damaged log becomes part of a point.
//!
//! Images carry no checksums, and a view reads frames that are not packed as they lie in their logs: there a flip can be
//! seen by whoever looks, until a verification finds it. A merge checks every frame.

use std::sync::Arc;

use super::{Checked, World};
use crate::{
    base::{
        ids::Lineage,
        units::{DiskIndex, Extent, SECTOR_BYTES, to_u64},
    },
    disk::Disk,
    protocol::compare::{Question, runs_of},
    replica::MachineReplica,
    storage::Folder,
    testing::{
        content::Contents,
        medium::Kind,
        record::{Done, told},
    },
    volume::{Machine, Verify},
};

/// Runs of which a bit flips at their end, in a hundred.
const ROTS: u64 = 25;

impl World {
    /// Both hosts are at `head`. A bit flips on the replica of the primary `host`.
    pub(super) fn rot(&mut self, host: usize, head: Lineage) -> Checked {
        if !self.random.percent(ROTS) {
            return Ok(());
        }
        let peer = 1 - host;
        let names = self.hosts[peer].folder.names().map_err(told)?;
        let images: Vec<_> = (0..self.setup.disks)
            .map(|index| self.hosts[peer].file_name(index))
            .collect();
        let is_log = |name: &String| Kind::of(None, name) == Kind::Log;
        let files: Vec<_> = (names.iter())
            .filter(|name| is_log(name) || images.contains(name))
            .collect();
        let name = files[self.random.index(files.len())].clone();
        let at = self.random.next();
        self.report.flips += 1;
        self.note(&format!("a bit of {name} flips on host {peer}"));
        self.hosts[peer].die();
        self.hosts[peer].folder.flip(&name, at).map_err(told)?;
        let woken = self.hosts[peer].wake().and_then(|()| {
            let arranged = self.hosts[peer].arrange();
            arranged.map_err(|why| why.to_string())
        });
        let (Ok(()), Some(store)) = (woken, self.hosts[peer].store()) else {
            self.report.flips_told += 1;
            return Ok(());
        };
        let Some(serving) = self.hosts[host].serving() else {
            return Ok(());
        };
        let found = look(&store, head);
        let verified = verify(&serving.machine, &store);
        let (Ok(found), Ok(verified)) = (found, verified) else {
            self.report.flips_told += 1;
            return Ok(());
        };
        self.report.flips_told += u64::from(!verified.is_empty());
        let truth = self.oracle.at(head).ok_or("the head was never cut")?;
        for (disk, sector) in found.all_differences(truth) {
            let offset = to_u64(sector) * SECTOR_BYTES;
            let covers = |run: &Extent| run.offset <= offset && offset < run.end();
            if !(verified.iter()).any(|(index, run)| index.index() == disk && covers(run)) {
                return Err(format!(
                    "P2: a flip in {name} changed sector {sector} of disk {disk}, and a verification does not find it"
                ));
            }
        }
        if found == *truth && !verified.is_empty() {
            return Err(format!("a verification finds {verified:?}, which is equal"));
        }
        // A damaged log must not be folded into the images.
        if is_log(&name) && store.settle(head.epoch).is_ok() && look(&store, head)? != *truth {
            return Err(format!("P2: {name} was damaged, and was merged"));
        }
        Ok(())
    }
}

/// What the head of a replica shows, right or wrong.
fn look(store: &MachineReplica, head: Lineage) -> Done<Contents> {
    let view = store.view(head.epoch).map_err(told)?;
    let disks = view.disks.into_iter();
    let disks: Vec<_> = disks.map(|disk| disk as Arc<dyn Disk>).collect();
    Contents::look(&disks)
}

/// Where a verification finds that the replica holds something else.
fn verify(machine: &Machine, store: &MachineReplica) -> Done<Vec<(DiskIndex, Extent)>> {
    let mut verification = machine.verification().map_err(told)?;
    let mut differing = Vec::new();
    for number in 1.. {
        let (at, samples) = match machine.verify(&mut verification).map_err(told)? {
            Verify::Ask(at, samples) => (at, samples),
            Verify::Later | Verify::Done => break,
        };
        let runs = runs_of(&samples);
        let question = Question {
            number,
            at,
            samples,
        };
        let view = store.view_at(at).map_err(told)?;
        let answer = view.compare(&question).map_err(told)?;
        let places = answer.places(&runs);
        differing.extend(places.ok_or("an answer to another question")?);
    }
    Ok(differing)
}
