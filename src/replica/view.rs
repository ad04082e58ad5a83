//! A recovery point as read-only disks: base images below, an index over the logs above.
//!
//! The content of packed frames is kept for a while, since a guest reads 4 KiB where a frame holds 1 MiB. Frames that
//! are not packed are read in place, and their CRC-32C, which covers all of them, is left to the merge.

use std::{collections::VecDeque, io, sync::Arc};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};

use super::{
    error::ReplicaError,
    index::LogIndex,
    log::LogFile,
    pins::Pin,
    state::{Shared, State},
    status::Point,
    store::MachineReplica,
};
use crate::{
    base::units::{DiskIndex, Epoch, Extent, to_usize},
    delta::{Codec, FrameKind},
    disk::{Content, Disk, DiskError, Fua, Geometry, Space, check_run},
};

/// Unpacked frames that a view keeps: 32 MiB at most.
const FRAMES_KEPT: usize = 32;

/// The disks of one recovery point, in the order of the machine's disk table. As long as one of them is in use, no
/// merge goes beyond the point.
#[derive(Clone, Debug)]
pub struct PointView {
    /// The point.
    pub point: Point,
    /// Its disks, read-only.
    pub disks: Vec<Arc<dyn Disk>>,
}

/// A claim on a recovery point: it stays as long as this lives, also when retention would let it go.
#[derive(Debug)]
pub struct Held {
    /// The point.
    pub point: Point,
    _pin: Pin,
}

impl MachineReplica {
    /// Claims recovery point `epoch` without looking at it.
    pub fn hold(&self, epoch: Epoch) -> Result<Held, ReplicaError> {
        let state = self.shared.state()?;
        let (point, pin) = self.shared.claim(&state, epoch)?;
        Ok(Held { point, _pin: pin })
    }

    /// The disks as they were at recovery point `epoch`.
    pub fn view(&self, epoch: Epoch) -> Result<PointView, ReplicaError> {
        let state = self.shared.state()?;
        let (point, _pin) = self.shared.claim(&state, epoch)?;
        let logs = state.logs.iter().filter(|log| log.epoch() <= epoch);
        let logs: Vec<_> = logs.cloned().collect();
        self.shared.show(state, point, logs)
    }
}

impl Shared {
    /// A point, and a claim on it. It is claimed before it is looked for: one that retention has passed over is a point
    /// as long as it is in use, and after a restart nobody else says that it is, although a failover goes on from it.
    fn claim(&self, state: &State, epoch: Epoch) -> Result<(Point, Pin), ReplicaError> {
        let pin = self.pins.pin(epoch);
        let mut points = self.points(state).into_iter();
        let point = points.find(|point| point.lineage.epoch == epoch);
        Ok((point.ok_or(ReplicaError::NoPoint(epoch))?, pin))
    }

    /// The base images with `logs` above them.
    pub(super) fn show(
        &self,
        mut state: MutexGuard<'_, State>,
        point: Point,
        logs: Vec<Arc<LogFile>>,
    ) -> Result<PointView, ReplicaError> {
        self.end_growth(&mut state)?;
        let record = state.record.as_ref().ok_or(ReplicaError::NotPrepared)?;
        let geometries: Vec<Geometry> = record.disks.iter().map(|disk| disk.geometry).collect();
        let bases = state.disks.clone();
        let pin = Arc::new(self.pins.pin(point.lineage.epoch));
        // The pin holds the merge back; the index may take its time.
        drop(state);

        let layers = Arc::new(Layers {
            index: LogIndex::build(logs, bases.len())?,
            frames: FrameCache::default(),
            _pin: pin,
        });
        let disks = bases.into_iter().zip(geometries).zip(0..);
        let disks = disks.map(|((base, geometry), number)| -> Arc<dyn Disk> {
            Arc::new(ViewDisk {
                disk: DiskIndex(number),
                geometry,
                base,
                layers: Arc::clone(&layers),
            })
        });
        Ok(PointView {
            point,
            disks: disks.collect(),
        })
    }
}

/// What the disks of a view share.
#[derive(Debug)]
struct Layers {
    index: LogIndex,
    frames: FrameCache,
    _pin: Arc<Pin>,
}

/// The content of a few frames, the latest used last.
#[derive(Debug, Default)]
pub(super) struct FrameCache(Mutex<VecDeque<(usize, Bytes)>>);

impl FrameCache {
    /// The content of data frame `number` of `index`, unpacked and checked, and how many bytes were read for it.
    pub(super) fn content(
        &self,
        index: &LogIndex,
        number: usize,
    ) -> Result<(Bytes, u64), ReplicaError> {
        {
            let mut kept = self.0.lock();
            if let Some(at) = kept.iter().position(|&(key, _)| key == number) {
                let entry = kept.remove(at).expect("it was just found");
                let content = entry.1.clone();
                kept.push_back(entry);
                return Ok((content, 0));
            }
        }
        let frame = index.frame(number);
        let (content, read) = index.log(frame).content(&frame.frame)?;
        let mut kept = self.0.lock();
        if kept.len() == FRAMES_KEPT {
            kept.pop_front();
        }
        kept.push_back((number, content.clone()));
        Ok((content, read))
    }
}

/// One disk of a recovery point.
#[derive(Debug)]
struct ViewDisk {
    disk: DiskIndex,
    geometry: Geometry,
    base: Arc<dyn Disk>,
    layers: Arc<Layers>,
}

impl ViewDisk {
    /// Fills `buf` from frame `number` for the bytes of the disk from `offset`.
    fn read_frame(&self, number: usize, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let index = &self.layers.index;
        let frame = index.frame(number);
        let header = &frame.frame.header;
        let within = offset - header.run.offset;
        let failed = |source| DiskError::Io {
            operation: "read",
            offset,
            source,
        };
        match (header.kind, header.codec) {
            (FrameKind::Zero, _) => buf.fill(0),
            (FrameKind::Data, Codec::None) => {
                let log = index.log(frame);
                log.content_part(&frame.frame, within, buf)
                    .map_err(failed)?;
            }
            (FrameKind::Data, _) => {
                let content = self.layers.frames.content(index, number);
                let (content, _) = content.map_err(|error| failed(io::Error::other(error)))?;
                buf.copy_from_slice(&content[to_usize(within)..][..buf.len()]);
            }
        }
        Ok(())
    }
}

impl Disk for ViewDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let end = check_run(offset, buf.len(), self.geometry.size)?.end();
        let mut at = offset;
        let mut rest = buf;
        while at < end {
            let (run, frame) = self.layers.index.segment(self.disk, at, end);
            let (part, behind) = rest.split_at_mut(to_usize(run.len));
            match frame {
                Some(number) => self.read_frame(number, at, part)?,
                None => self.base.read_at(at, part)?,
            }
            rest = behind;
            at = run.end();
        }
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8], _: Fua) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }

    fn zero(&self, _: Extent, _: Space, _: Fua) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn run_at(&self, offset: u64) -> Result<(Extent, Content), DiskError> {
        let size = self.geometry.size;
        check_run(offset, 1, size)?;
        let index = &self.layers.index;
        let (run, frame) = index.segment(self.disk, offset, size);
        if let Some(number) = frame {
            let content = match index.kind(number) {
                FrameKind::Data => Content::Data,
                FrameKind::Zero => Content::Zero,
            };
            return Ok((run, content));
        }
        let (below, content) = self.base.run_at(offset)?;
        Ok((Extent::new(offset, below.len.min(run.len)), content))
    }

    fn close(&self) -> Result<(), DiskError> {
        Ok(())
    }
}
