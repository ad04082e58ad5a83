//! What guests do, and what hosts do beside.

use std::sync::Arc;

use super::{Checked, World};
use crate::{
    base::units::{Extent, SECTOR_BYTES},
    disk::{Disk, Fua, Space},
    testing::{
        Bug,
        content::{SIZES, encode},
        record::told,
        serving::Serving,
    },
};

impl World {
    /// The disks hold what the guest was told, and what differs from the replica is marked.
    pub(super) fn check_serving(&mut self, host: usize) -> Checked {
        let Some(serving) = self.hosts[host].serving() else {
            return Ok(());
        };
        let machine = Arc::clone(&serving.machine);
        let found = serving.read();
        let Some(found) = self.excuse(host, "reading the disks", found)? else {
            // What they hold is to be known before the guest goes on.
            self.dies_now(host);
            return Ok(());
        };
        if let Some(truth) = &mut self.oracle.hosts[host].truth {
            truth.meets(&found)?;
        }
        self.check_marks(host)?;
        if self.calm
            && !self.rescanned
            && let Some(reason) = machine.state().resync
            && reason != crate::volume::ResyncReason::Reversed
        {
            return Err(format!("P3: a whole disk is owed: {reason:?}"));
        }
        Ok(())
    }

    pub(super) fn check_marks(&self, host: usize) -> Checked {
        let Some(serving) = self.hosts[host].serving() else {
            return Ok(());
        };
        let Some(lineage) = serving.machine.lineage() else {
            return Ok(());
        };
        let told = serving.machine.divergence();
        self.oracle.covers(host, lineage, &told)
    }

    /// A host whose guest may write, and the guest runs there now.
    fn writer(&mut self) -> Option<usize> {
        let first = self.random.index(2);
        let host = [first, 1 - first]
            .into_iter()
            .find(|&host| (self.hosts[host].serving()).is_some_and(Serving::takes_writes))?;
        self.hosts[host].process().guest = true;
        Some(host)
    }

    pub(super) fn guest(&mut self) -> Checked {
        let Some(host) = self.writer() else {
            return Ok(());
        };
        let Some(serving) = self.hosts[host].serving() else {
            return Ok(());
        };
        let machine = Arc::clone(&serving.machine);
        let disk = self.random.index(self.setup.disks);
        let volume = &machine.volumes()[disk];
        if self.random.percent(15) {
            self.note(&format!("flush of disk {disk}"));
            let flushed = if self.setup.has(Bug::FlushIgnored) {
                Ok(())
            } else {
                volume.flush().map_err(told)
            };
            let flushed = self.excuse(host, "P4: a guest's flush", flushed)?;
            if let (Some(()), Some(truth)) = (flushed, &mut self.oracle.hosts[host].truth) {
                truth.flushed(disk);
            }
            return Ok(());
        }
        let run = self.somewhere(disk);
        let fua = if self.random.percent(10) {
            Fua::Yes
        } else {
            Fua::No
        };
        let zeros = self.random.percent(15);
        let number = if zeros { 0 } else { self.oracle.number() };
        let done = if zeros {
            let space = self.random.pick(&[Space::Release, Space::Keep]);
            volume.zero(run, space, fua)
        } else {
            volume.write_at(run.offset, &encode(disk, run, number), fua)
        };
        self.note(&format!(
            "host {host}: write {number} to disk {disk} {run:?} {fua:?}"
        ));
        let told = self.excuse(host, "P4: a guest's write", done.map_err(told))?;
        let told = told.is_some();
        if told {
            self.oracle.written(host)?;
        }
        if let Some(truth) = &mut self.oracle.hosts[host].truth {
            truth.write(disk, run, number, told, fua);
        }
        if !told {
            // A guest whose write failed starts again, and looks at its disks.
            self.dies_now(host);
        }
        let preserved = machine.counters().preserve_bytes;
        if preserved > self.setup.preserve_bytes_max {
            return Err(format!("P8: {preserved} bytes are preserved"));
        }
        Ok(())
    }

    /// Where a guest writes next on a disk: often in the same places.
    pub(super) fn somewhere(&mut self, disk: usize) -> Extent {
        let sectors = SIZES[disk] / SECTOR_BYTES;
        let first = if self.random.percent(80) {
            self.random.below(self.setup.spread.min(sectors))
        } else {
            self.random.below(sectors)
        };
        let len = self.random.pick(&[1, 8, 32, 32, 600]);
        let len = self.random.between(1, len).min(sectors - first);
        Extent::new(first * SECTOR_BYTES, len * SECTOR_BYTES)
    }

    /// The guest of a host shuts down.
    pub(super) fn guest_leaves(&mut self, host: usize) {
        if self.hosts[host].is_up() {
            self.hosts[host].process().guest = false;
        }
    }

    pub(super) fn upkeep(&mut self) -> Checked {
        let host = self.random.index(2);
        let done = self.hosts[host].keep_up();
        if let Some(Some(done)) = self.excuse(host, "upkeep", done)? {
            self.note(&format!("host {host}: {done:?}"));
            if let Some(store) = self.hosts[host].store() {
                let status = store.status();
                if let Some(limit) = status.space_max
                    && status.log_bytes > limit
                {
                    let bytes = status.log_bytes;
                    return Err(format!("P8: {bytes} bytes of logs, not {limit}"));
                }
            }
            return self.look();
        }
        Ok(())
    }

    pub(super) fn maintain(&mut self) -> Checked {
        for host in 0..2 {
            if let Some(serving) = self.hosts[host].serving() {
                let maintained = serving.machine.maintain().map_err(told);
                self.note("regions cool");
                self.excuse(host, "maintenance", maintained)?;
            }
        }
        Ok(())
    }

    /// Moves on with folding a failover into the images.
    pub(super) fn fold(&mut self) -> Checked {
        for host in 0..2 {
            if !(self.hosts[host].serving()).is_some_and(|serving| serving.folds) {
                continue;
            }
            let folded = self.hosts[host].fold_on();
            if self.allow(host, "a fold", folded)? == Some(true) {
                self.note(&format!("host {host}: folded"));
                self.check_serving(host)?;
            }
        }
        Ok(())
    }
}
