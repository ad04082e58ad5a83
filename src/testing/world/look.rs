//! Recovery points are read as a whole and compared with the truth; at the end both hosts are.

use std::sync::Arc;

use super::{Checked, World};
use crate::{
    base::ids::Lineage,
    coord::role::Part,
    disk::{Disk, Fua},
    replica::{Head, Point, PointView},
    testing::{
        content::{Contents, encode},
        oracle::Kept,
        record::told,
    },
};

/// Test failovers at the same time, at most.
const TESTS_MAX: usize = 3;

impl World {
    /// Nothing that was said is gone, and the points are in order.
    pub(super) fn check_replica(&mut self, host: usize) -> Checked {
        let Some(store) = self.hosts[host].store() else {
            return Ok(());
        };
        let part = self.hosts[host].role().map(|role| role.part);
        if !matches!(part, Some(Part::Replica { .. } | Part::FailedOver { .. })) {
            return Ok(());
        }
        let head = store.head();
        self.oracle.holds(host, head.lineage())?;
        let points = store.points();
        let ordered = |pair: &[Point]| {
            pair[0].lineage.epoch < pair[1].lineage.epoch && pair[0].cut <= pair[1].cut
        };
        if !points.windows(2).all(ordered) {
            return Err(format!("P2: the points are not in order: {points:?}"));
        }
        match head {
            Head::Complete(lineage)
                if points.last().map(|point| point.lineage) != Some(lineage) =>
            {
                Err(format!("P2: the head {lineage:?} is no point: {points:?}"))
            }
            _ => Ok(()),
        }
    }

    /// Reads a recovery point and compares it with the truth.
    pub(super) fn look(&mut self) -> Checked {
        for host in 0..2 {
            self.check_replica(host)?;
            let Some(store) = self.hosts[host].store() else {
                continue;
            };
            self.look_at_rescue(host)?;
            let points = store.points();
            if points.is_empty() {
                continue;
            }
            let point = points[self.random.index(points.len())].lineage;
            let view = store.view(point.epoch).map_err(told);
            if let Some(view) = self.excuse(host, "P2: opening a point", view)? {
                self.compare(host, &view)?;
            }
        }
        Ok(())
    }

    fn compare(&mut self, host: usize, view: &PointView) -> Checked {
        let Some(found) = self.read(host, view)? else {
            return Ok(());
        };
        self.oracle.shows(view.point.lineage, &found)
    }

    fn read(&mut self, host: usize, view: &PointView) -> Result<Option<Contents>, String> {
        let disks = view.disks.iter();
        let disks = disks.map(|disk| Arc::clone(disk) as Arc<dyn Disk>);
        let found = Contents::read(&disks.collect::<Vec<_>>());
        self.report.views += 1;
        self.excuse(host, "P2: reading a point", found)
    }

    /// The rescue point holds what the former primary had.
    pub(super) fn look_at_rescue(&mut self, host: usize) -> Checked {
        let Some(store) = self.hosts[host].store() else {
            return Ok(());
        };
        let (Some(rescue), Some(_)) = (store.rescue(), &self.oracle.hosts[host].kept) else {
            return Ok(());
        };
        let view = store.view_rescue().map_err(told);
        let Some(view) = self.excuse(host, "P2: opening the rescue point", view)? else {
            return Ok(());
        };
        let Some(found) = self.read(host, &view)? else {
            return Ok(());
        };
        let Some(Kept { truth, lineage }) = &mut self.oracle.hosts[host].kept else {
            return Ok(());
        };
        if rescue.lineage != *lineage {
            return Err(format!("P2: the rescue point follows {:?}", rescue.lineage));
        }
        self.report.rescues += 1;
        truth
            .meets(&found)
            .map_err(|why| format!("the rescue point is not what was there: {why}"))
    }

    /// Somebody starts a test failover, writes in one, looks at it, or ends it.
    pub(super) fn watch(&mut self) -> Checked {
        let (host, choice) = (self.random.index(2), self.random.below(5));
        let pick = self.random.index(1000);
        if !self.hosts[host].is_up() {
            return Ok(());
        }
        let count = self.hosts[host].process().tests.len();
        if choice == 0 && count < TESTS_MAX {
            self.tests += 1;
            let number = self.tests;
            let started = self.hosts[host].start_test(pick, number);
            if self.allow(host, "a test failover", started)?.is_some() {
                self.report.tests += 1;
            }
            return Ok(());
        }
        if count == 0 {
            return Ok(());
        }
        match choice {
            1 => {
                self.hosts[host].process().tests.remove(pick % count);
                Ok(())
            }
            2 => self.write_in_test(host, pick % count),
            _ => self.look_at_test(host, pick % count),
        }
    }

    fn write_in_test(&mut self, host: usize, index: usize) -> Checked {
        let disk = self.random.index(self.setup.disks);
        let run = self.somewhere(disk);
        let number = self.oracle.number();
        let test = &mut self.hosts[host].process().tests[index];
        let layer = Arc::clone(&test.layers[disk]);
        let written = layer.write_at(run.offset, &encode(disk, run, number), Fua::No);
        let written = self.excuse(host, "a write in a test", written.map_err(told))?;
        let test = &mut self.hosts[host].process().tests[index];
        match (written, &mut test.contents) {
            (Some(()), Some(contents)) => contents.write(disk, run, number),
            // What is there now is to be read first.
            _ => test.contents = None,
        }
        Ok(())
    }

    /// A test shows its point and what was written in it; the point below is as it was.
    fn look_at_test(&mut self, host: usize, index: usize) -> Checked {
        let test = &self.hosts[host].process().tests[index];
        let (view, rescue) = (test.view.clone(), test.rescue);
        let layers = test.layers.iter();
        let layers = layers.map(|layer| Arc::clone(layer) as Arc<dyn Disk>);
        let found = Contents::read(&layers.collect::<Vec<_>>());
        if let Some(found) = self.excuse(host, "reading a test", found)? {
            let test = &mut self.hosts[host].process().tests[index];
            match &test.contents {
                Some(expected) if *expected != found => {
                    return Err("a test failover does not show what was written in it".into());
                }
                _ => test.contents = Some(found),
            }
        }
        if rescue {
            return self.look_at_rescue(host);
        }
        self.compare(host, &view)
    }

    /// The primary, and the point that both hosts are at, if that is proved.
    pub(super) fn in_step(&self) -> Option<(usize, Lineage)> {
        let host = self.primary()?;
        let here = self.hosts[host].serving()?.machine.at_rest()?;
        let role = self.hosts[host].role()?;
        let peer = &self.hosts[1 - host];
        let follows = peer.role()?.follows(role.generation);
        let there = peer.following()?.store.head();
        let folded = self.hosts[host].record()?.layers.is_none();
        (follows && folded && there == Head::Complete(here)).then_some((host, here))
    }

    pub(super) fn compare_all(&mut self, host: usize, head: Lineage) -> Checked {
        let Some(serving) = self.hosts[host].serving() else {
            return Ok(());
        };
        self.report.merged = serving.machine.counters().merged_epochs;
        let found = serving.read()?;
        if let Some(truth) = &mut self.oracle.hosts[host].truth {
            truth.meets(&found)?;
        }
        self.oracle
            .shows(head, &found)
            .map_err(|why| format!("P7: in step and not equal: {why}"))?;
        let peer = 1 - host;
        let Some(store) = self.hosts[peer].store() else {
            return Ok(());
        };
        self.look_at_rescue(peer)?;
        store.drop_rescue().map_err(told)?;
        self.oracle.hosts[peer].kept = None;
        while store.upkeep().map_err(told)?.is_some() {}
        for point in store.points() {
            let view = store.view(point.lineage.epoch).map_err(told)?;
            self.compare(peer, &view)?;
        }
        self.check_replica(peer)
    }
}
