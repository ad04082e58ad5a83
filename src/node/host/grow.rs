//! Growing a disk of a machine that runs here.

use super::member::{Member, Running};
use crate::{
    base::{
        chain::chain,
        limits::DISK_BYTES_MAX,
        units::{Bytes, SECTOR_BYTES},
    },
    coord::role::Part,
    disk::Access,
    node::{
        control::{OperateError, ResizeReport, ResizeRequest},
        primary::GrowError,
        tracking::Tracking,
    },
};

impl Member {
    /// Makes a disk larger while its guest goes on. Its replica grows when the replication has begun again.
    pub(super) fn resize(&self, request: &ResizeRequest) -> Result<ResizeReport, OperateError> {
        let _turn = self.turn();
        let (record, name) = (self.record(), self.name());
        let not_now = |why: String| OperateError::NotNow(format!("machine {name}: {why}"));
        if record.role.part != Part::Primary {
            return Err(not_now(format!(
                "a disk is resized on the primary, and this host is {}",
                record.role.describe()
            )));
        }
        let (size, disk) = (request.size, &request.disk);
        if size > DISK_BYTES_MAX || !size.is_multiple_of(SECTOR_BYTES) {
            return Err(not_now(format!(
                "a disk has a multiple of {SECTOR_BYTES} bytes, at most {}",
                Bytes(DISK_BYTES_MAX)
            )));
        }
        let serving = self.serving();
        let serving = serving.filter(|_| self.show().access == Access::ReadWrite);
        let serving = serving.ok_or_else(|| not_now("its disks are not writable here".into()))?;
        if record.layers.is_some() {
            return Err(not_now(format!(
                "its last failover is still being folded into the images ({} to go): try again later",
                Bytes(serving.unfolded())
            )));
        }
        let tracking = Tracking {
            id: record.id,
            folder: &self.places().tracking(),
            ledger: &self.shared().ledger,
        };
        let (images, ids) = (self.images(&record), &self.shared().ids);
        let grown = serving.primary.grow((disk, size), &images, tracking, ids);
        if let Err(GrowError::Lost(_)) = grown {
            // Disks that are closed and cannot be opened again: whoever uses them has lost them already.
            *self.running.lock() = Running::Idle;
        }
        drop(serving);
        let arranged = self.arrange();
        let before = grown.map_err(|error| {
            let why = format!("disk {disk}: {}", chain(&error));
            if error.is_refusal() {
                not_now(why)
            } else {
                OperateError::Failed(format!("machine {name}: {why}"))
            }
        })?;
        arranged?;
        tracing::info!(machine = %name, %disk, before, size, "grown");
        Ok(ResizeReport { before, size })
    }
}
