//! Disks that grow: the primary announces more bytes than the base images have.
//!
//! All recovery points grow with them. What is behind the old end reads as zeros in those from before, as on a primary
//! that grew the disk and wrote nothing there: nothing is sent for it. Logs from before keep the sizes they were written
//! with.
//!
//! # Crash contract
//! The record says that the images grow, durably, before the first of them is touched. Whatever ends that, each disk has the
//! size of its image from then on: the new one, or that of before. So a failover may come at any time: no view, and no
//! layer over one, differs in size from the image that it ends up in. The primary greets with its sizes again, which grows
//! the rest.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{
    error::ReplicaError,
    record::{DiskRecord, Record},
    state::{Shared, State},
    store::{MachineReplica, disk_failed},
};
use crate::{disk::image, storage::Open};

impl MachineReplica {
    /// Grows the images of those disks that are larger in `announced` than they are now.
    pub(super) fn grow(&self, announced: &[DiskRecord]) -> Result<(), ReplicaError> {
        let shared = &*self.shared;
        let _merging = shared.merging.lock();
        let mut state = shared.idle_state()?;
        let before = state.record.clone().ok_or(ReplicaError::NotPrepared)?;
        let growing = Record {
            growing: true,
            ..before.clone()
        };
        shared.record(&mut state, growing.clone())?;
        let closed = state
            .disks
            .iter()
            .zip(&before.disks)
            .try_for_each(|(disk, record)| {
                let closed = disk.close();
                closed.map_err(|source| disk_failed(&record.name, source))
            });
        state.disks.clear();
        let resized = closed.and_then(|()| shared.resize_images(&before.disks, announced));
        match shared.open_images(&growing) {
            Ok(images) => state.disks = images,
            Err(error) => {
                // Nobody can use it any more; the next start opens it again.
                state.closed = true;
                return Err(error);
            }
        }
        let ended = shared.end_growth(&mut state);
        resized?;
        ended?;
        tracing::info!(machine = %shared.id, "the replica's disks have grown");
        Ok(())
    }
}

impl Shared {
    /// If images were about to grow: each disk has the size of its image now.
    pub(super) fn end_growth(&self, state: &mut State) -> Result<(), ReplicaError> {
        let Some(mut record) = state.record.clone().filter(|record| record.growing) else {
            return Ok(());
        };
        for (disk, image) in record.disks.iter_mut().zip(&state.disks) {
            disk.geometry.size = image.geometry().size;
        }
        record.growing = false;
        self.record(state, record)
    }

    fn resize_images(&self, from: &[DiskRecord], to: &[DiskRecord]) -> Result<(), ReplicaError> {
        for (before, disk) in from.iter().zip(to) {
            if before.geometry == disk.geometry {
                continue;
            }
            let name = disk.file_name();
            let storage = self
                .folder
                .open(&name, Open::Write)
                .map_err(ReplicaError::io("open", &name))?;
            let resized: Result<(), image::ResizeError> = image::resize(
                storage,
                disk.format,
                disk.geometry.size,
                Arc::clone(&self.ids),
            );
            resized.map_err(|source| ReplicaError::Image {
                operation: "grow",
                name,
                source: Box::new(source),
            })?;
        }
        Ok(())
    }
}
