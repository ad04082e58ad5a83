//! Disks that grow: the primary announces more bytes than the base images have.
//!
//! All recovery points grow with them. What is behind the old end reads as zeros in those from before, as on a primary
//! that grew the disk and wrote nothing there: nothing is sent for it. Logs from before keep the sizes they were written
//! with.
//!
//! # Crash contract
//! The record says that the images grow, durably, before the first of them is touched, and has the new sizes when the last
//! one is durable. In between an open takes images that are larger than their disks; the primary greets with its sizes
//! again, which grows the rest.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{
    error::ReplicaError,
    record::{DiskRecord, Record},
    state::Shared,
    store::{MachineReplica, disk_failed},
};
use crate::{disk::image, storage::Open};

impl MachineReplica {
    /// Grows the images of those disks that are larger in `announced` than they are now.
    pub(super) fn grow(&self, announced: Vec<DiskRecord>) -> Result<(), ReplicaError> {
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
        let resized = closed.and_then(|()| shared.resize_images(&before.disks, &announced));
        let record = match &resized {
            Ok(()) => Record {
                disks: announced,
                ..before
            },
            Err(_) => growing,
        };
        match shared.open_images(&record) {
            Ok(images) => state.disks = images,
            Err(error) => {
                // Nobody can use it any more; the next start opens it again.
                state.closed = true;
                return Err(error);
            }
        }
        resized?;
        tracing::info!(machine = %shared.id, "the replica's disks have grown");
        shared.record(&mut state, record)
    }
}

impl Shared {
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
