//! Recovery points are read as a whole and compared with the truth; at the end both hosts are.

use std::sync::Arc;

use super::{Checked, World};
use crate::{
    base::{ids::Lineage, units::to_usize},
    replica::{Head, PointView},
    testing::{content::Contents, host::told},
};

/// Points that somebody looks at, at most.
const VIEWS_MAX: usize = 3;

impl World {
    /// Reads a recovery point and compares it with the truth.
    pub(super) fn look(&mut self) -> Checked {
        self.check_replica()?;
        let Some(following) = &self.secondary.process else {
            return Ok(());
        };
        let store = Arc::clone(&following.store);
        let points = store.points();
        if points.is_empty() {
            return Ok(());
        }
        let point = points[self.random.index(points.len())].lineage;
        let view = store.view(point.epoch).map_err(told);
        match self.excuse(1, "P2: opening a point", view)? {
            Some(view) => self.compare(&view),
            None => Ok(()),
        }
    }

    fn compare(&mut self, view: &PointView) -> Checked {
        let found = Contents::read(&view.disks);
        let Some(found) = self.excuse(1, "P2: reading a point", found)? else {
            return Ok(());
        };
        self.report.views += 1;
        self.oracle.shows(view.point.lineage, &found)
    }

    /// Somebody begins to look at a point, looks again, or stops.
    pub(super) fn watch(&mut self) -> Checked {
        let choice = self.random.below(3);
        let index = self.random.below(1000);
        let Some(following) = &mut self.secondary.process else {
            return Ok(());
        };
        let views = &mut following.views;
        if choice == 0 && views.len() < VIEWS_MAX {
            let points = following.store.points();
            let Some(point) = points.get(to_usize(index) % points.len().max(1)) else {
                return Ok(());
            };
            let view = following.store.view(point.lineage.epoch).map_err(told);
            let view = self.excuse(1, "P2: opening a point", view)?;
            if let Some(following) = &mut self.secondary.process {
                following.views.extend(view);
            }
            return Ok(());
        }
        if views.is_empty() {
            return Ok(());
        }
        let index = to_usize(index) % views.len();
        if choice == 1 {
            views.remove(index);
            return Ok(());
        }
        let view = views[index].clone();
        self.compare(&view)
    }

    /// The point that both hosts are at, if that is proved.
    pub(super) fn in_step(&self) -> Option<Lineage> {
        let here = self.primary.process.as_ref()?.machine.at_rest()?;
        let there = self.secondary.process.as_ref()?.store.head();
        (there == Head::Complete(here)).then_some(here)
    }

    pub(super) fn compare_all(&mut self, head: Lineage) -> Checked {
        let Some(serving) = &self.primary.process else {
            return Ok(());
        };
        self.report.merged = serving.machine.counters().merged_epochs;
        let found = serving.read()?;
        self.oracle.truth.meets(&found)?;
        self.oracle
            .shows(head, &found)
            .map_err(|why| format!("P7: in step and not equal: {why}"))?;
        while let Some(following) = &self.secondary.process
            && following.store.upkeep().map_err(told)?.is_some()
        {}
        let Some(following) = &self.secondary.process else {
            return Ok(());
        };
        let store = Arc::clone(&following.store);
        for point in store.points() {
            let view = store.view(point.lineage.epoch).map_err(told)?;
            self.compare(&view)?;
        }
        self.check_replica()
    }
}
