//! A complete delta log in a file: found again by its end, proved by its chain hash, read frame by frame.
//!
//! The newest logs of a machine are kept in memory as well, see [`LOG_RESIDENT_BYTES_MAX`]: what a merge or a fold needs
//! moments after it was written is not read back.
//!
//! [`LOG_RESIDENT_BYTES_MAX`]: crate::base::limits::LOG_RESIDENT_BYTES_MAX

use std::{fmt, io, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;

use super::error::ReplicaError;
use crate::{
    base::{
        ids::Lineage,
        units::{Epoch, Extent, to_u64, to_usize},
    },
    delta::{
        DecodeError, FrameHeader, Header, Trailer, chain_of,
        frame::unpack,
        layout::{FRAME_HEADER_BYTES, PREAMBLE_BYTES, header_len, is_trailer},
        trailer::{FOOT_BYTES, Foot, TrailerHead},
    },
    storage::Storage,
};

/// End of the file name of a complete log.
pub(super) const LOG_SUFFIX: &str = ".hrl";

/// The file name of the log that ends with `epoch`.
pub(super) fn log_name(epoch: Epoch) -> String {
    // Twenty digits hold every epoch, and sort.
    format!("{epoch:020}{LOG_SUFFIX}")
}

/// A log file whose header and end were read.
pub(super) struct LogFile {
    storage: Arc<dyn Storage>,
    header: Header,
    header_bytes: Vec<u8>,
    head: TrailerHead,
    foot: Foot,
    /// The point it leads to.
    point: Lineage,
    /// The whole file, as long as there is room for it.
    resident: Mutex<Option<Bytes>>,
}

/// A frame and the position of its payload in the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct FrameAt {
    pub(super) header: FrameHeader,
    pub(super) at: u64,
}

impl LogFile {
    /// Opens the log in `storage`. What lies between header and trailer is proved by [`frames`](Self::frames) only.
    pub(super) fn open(storage: Arc<dyn Storage>, name: &str) -> Result<Self, ReplicaError> {
        Self::open_resident(storage, None, name)
    }

    /// The same for a log that was written just now, and maybe is still in memory.
    pub(super) fn open_resident(
        storage: Arc<dyn Storage>,
        resident: Option<Vec<u8>>,
        name: &str,
    ) -> Result<Self, ReplicaError> {
        let len = storage.len().map_err(ReplicaError::io("open", name))?;
        let damaged = |source| ReplicaError::log(name, source);
        let short = || {
            damaged(DecodeError::Invalid {
                part: "log",
                offset: len,
                reason: "it ends too early",
            })
        };
        let least = to_u64(PREAMBLE_BYTES + FRAME_HEADER_BYTES + FOOT_BYTES);
        if len < least {
            return Err(short());
        }
        let foot_at = len - to_u64(FOOT_BYTES);
        let foot = Foot::parse(&read(&storage, foot_at, name)?, foot_at).map_err(damaged)?;
        let preamble: [u8; PREAMBLE_BYTES] = read(&storage, 0, name)?;
        let header_len = header_len(&preamble).map_err(damaged)?;
        if to_u64(header_len) > foot.trailer_at
            || foot.trailer_at > foot_at.saturating_sub(to_u64(FRAME_HEADER_BYTES))
        {
            return Err(short());
        }
        let mut header_bytes = vec![0; header_len];
        storage
            .read_at(0, &mut header_bytes)
            .map_err(ReplicaError::io("read", name))?;
        let header = Header::parse(&header_bytes).map_err(damaged)?;
        let head = read(&storage, foot.trailer_at, name)?;
        let head = TrailerHead::parse(&head, foot.trailer_at).map_err(damaged)?;
        let point = header.point(&foot).map_err(damaged)?;
        if header.parent.is_none() {
            return Err(damaged(DecodeError::Invalid {
                part: "header",
                offset: 0,
                reason: "an initial copy is not kept as a log",
            }));
        }
        let index_at = foot.trailer_at + to_u64(FRAME_HEADER_BYTES);
        if head.index_len() != Some(foot_at - index_at) {
            return Err(short());
        }
        Ok(Self {
            storage,
            header,
            header_bytes,
            head,
            foot,
            point,
            // Without the spare capacity of the vector.
            resident: Mutex::new(resident.map(|bytes| Bytes::from(bytes.into_boxed_slice()))),
        })
    }

    /// Bytes of it that are in memory.
    pub(super) fn resident_bytes(&self) -> u64 {
        let resident = self.resident.lock();
        resident.as_ref().map_or(0, |bytes| to_u64(bytes.len()))
    }

    /// Keeps it in the file only.
    pub(super) fn let_go(&self) {
        self.resident.lock().take();
    }

    /// `len` bytes from `offset`, and how many of them were read from the file.
    fn bytes_at(&self, offset: u64, len: usize) -> io::Result<(Bytes, u64)> {
        if let Some(bytes) = self.resident.lock().as_ref() {
            let start = to_usize(offset);
            if bytes.len() >= start + len {
                return Ok((bytes.slice(start..start + len), 0));
            }
        }
        let mut bytes = vec![0; len];
        self.storage.read_at(offset, &mut bytes)?;
        Ok((bytes.into(), to_u64(len)))
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    pub(super) fn trailer(&self) -> Trailer {
        self.foot.trailer(self.head, self.point)
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.foot.epoch
    }

    pub(super) fn lineage(&self) -> Lineage {
        self.point
    }

    /// Length of the file in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.foot.log_len
    }

    /// All frames in order, proved by the chain hash.
    pub(super) fn frames(&self) -> Result<Vec<FrameAt>, ReplicaError> {
        let name = log_name(self.epoch());
        let headers = if self.head.index_entries == self.head.frames {
            self.read_index(&name)?
        } else {
            self.scan(&name)?
        };
        let computed = chain_of(
            &self.header,
            &self.header_bytes,
            &headers,
            self.head,
            self.foot,
        );
        if computed != self.foot.chain {
            let stated = self.foot.chain;
            let source = DecodeError::Chain { computed, stated };
            return Err(ReplicaError::log(&name, source));
        }
        let mut position = to_u64(self.header_bytes.len());
        let mut frames = Vec::with_capacity(headers.len() / FRAME_HEADER_BYTES);
        let (chunks, _) = headers.as_chunks::<FRAME_HEADER_BYTES>();
        for bytes in chunks {
            let header = FrameHeader::parse(bytes, &self.header.disks, position)
                .map_err(|source| ReplicaError::log(&name, source))?;
            let at = position + to_u64(FRAME_HEADER_BYTES);
            frames.push(FrameAt { header, at });
            position += header.frame_len();
        }
        if position != self.foot.trailer_at {
            let source = DecodeError::Invalid {
                part: "index",
                offset: self.foot.trailer_at,
                reason: "its frames do not fill the log",
            };
            return Err(ReplicaError::log(&name, source));
        }
        Ok(frames)
    }

    /// Says that the [frames](Self::frames) will be asked for soon.
    pub(super) fn announce_frames(&self) {
        if self.resident.lock().is_none() {
            self.storage.announce(self.index());
        }
    }

    /// Where the index lies. The file holds as many bytes: that was checked when it was opened.
    fn index(&self) -> Extent {
        let at = self.foot.trailer_at + to_u64(FRAME_HEADER_BYTES);
        let entry = to_u64(FRAME_HEADER_BYTES);
        Extent::new(at, self.head.index_entries * entry)
    }

    fn read_index(&self, name: &str) -> Result<Bytes, ReplicaError> {
        let Extent { offset, len } = self.index();
        let index = self.bytes_at(offset, to_usize(len));
        Ok(index.map_err(ReplicaError::io("read", name))?.0)
    }

    /// The frame headers of a log without an index, one by one.
    fn scan(&self, name: &str) -> Result<Bytes, ReplicaError> {
        let mut headers = Vec::new();
        let mut position = to_u64(self.header_bytes.len());
        while position < self.foot.trailer_at {
            let bytes: [u8; FRAME_HEADER_BYTES] = read(&self.storage, position, name)?;
            if is_trailer(&bytes) {
                break;
            }
            let header = FrameHeader::parse(&bytes, &self.header.disks, position)
                .map_err(|source| ReplicaError::log(name, source))?;
            headers.extend_from_slice(&bytes);
            position += header.frame_len();
        }
        Ok(headers.into())
    }

    /// The content of a data frame, unpacked and checked, and how many bytes were read from the file.
    pub(super) fn content(&self, frame: &FrameAt) -> Result<(Bytes, u64), ReplicaError> {
        let (payload, read) = self.payload(frame)?;
        Ok((self.unpack(frame, &payload)?, read))
    }

    /// The payload of a frame as it stands in the log, unchecked, and how many bytes were read from the file.
    pub(super) fn payload(&self, frame: &FrameAt) -> Result<(Bytes, u64), ReplicaError> {
        let len = to_usize(u64::from(frame.header.payload_len));
        self.bytes_at(frame.at, len)
            .map_err(|source| ReplicaError::io("read", &log_name(self.epoch()))(source))
    }

    /// The content of a data frame whose payload was read, checked.
    pub(super) fn unpack(&self, frame: &FrameAt, payload: &Bytes) -> Result<Bytes, ReplicaError> {
        unpack(&frame.header, payload, frame.at)
            .map_err(|source| ReplicaError::log(&log_name(self.epoch()), source))
    }

    /// Part of the content of a frame that is not packed, unchecked.
    pub(super) fn content_part(
        &self,
        frame: &FrameAt,
        within: u64,
        buf: &mut [u8],
    ) -> io::Result<()> {
        debug_assert!(
            Extent::new(within, to_u64(buf.len())).end() <= u64::from(frame.header.payload_len)
        );
        self.storage.read_at(frame.at + within, buf)
    }
}

impl fmt::Debug for LogFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogFile")
            .field("trailer", &self.trailer())
            .finish_non_exhaustive()
    }
}

fn read<const N: usize>(
    storage: &Arc<dyn Storage>,
    offset: u64,
    name: &str,
) -> Result<[u8; N], ReplicaError> {
    let mut bytes = [0; N];
    storage
        .read_at(offset, &mut bytes)
        .map_err(ReplicaError::io("read", name))?;
    Ok(bytes)
}
