//! Floor 1: the delta log (`.hrl`), one epoch serialised; the same bytes on the wire and on disk.
//!
//! A log is a header, frames in any order (the last one that touches a block wins), and a trailer. [`layout`] gives
//! every byte; [`frame`] packs and unpacks the content of one frame, on any thread; [`Encoder`] strings frames to a log
//! and computes its chain hash; [`Decoder`] takes a log apart as it arrives, in pieces of any size; [`policy`] decides
//! which codec pays on a link. Nothing here reads or writes anything.
//!
//! # The chain
//! The chain hash of a log is SHA-256 over the chain hash of its parent (32 zero bytes if it has none), the header, all
//! frame headers in order, the head of the trailer, and the foot of the trailer up to the hash itself. A frame header
//! holds the CRC-32C of the frame's raw bytes. Two hosts with the same chain hash hold the same history.
//!
//! # Folded logs
//! A host that keeps logs may fold neighbours into one: the last version of each block, from the parent of the first to the
//! point of the last. No hash over the folded bytes can be the chain hash of that point, which covers frames that are gone.
//! So the header of a folded log *names* its point, and the log after it, whose header names the same point as its
//! parent, continues it: the head stays the primary's. The hash in its foot is computed as ever, over the parent's
//! chain hash, the header with the named point, the frame headers and the trailer: it proves the bytes and binds both
//! ends. That the step between them is true history was proved before the fold, by the chain of the logs that went into
//! it, and is vouched for by the host that folded them. So a folded log is for the host that made it: no replica takes
//! one from a link.
//!
//! # Why the index repeats the frame headers
//! With them, the header and the foot a reader can recompute the chain hash of a log of many gibibytes from a few
//! megabytes, and knows that the index is the one the primary wrote. It costs 32 bytes for each frame, less than 1 %
//! of the smallest.
#![forbid(unsafe_code)]

mod decoder;
mod encoder;
mod error;
pub mod frame;
pub mod layout;
pub mod policy;
pub mod trailer;

pub use decoder::{Decoder, Event};
pub use encoder::{Encoder, chain_of};
pub use error::DecodeError;
pub use frame::{Codec, EncodedFrame, encode_data, encode_zero};
pub use layout::{DiskEntry, FrameHeader, FrameKind, Header, LogKind};
pub use trailer::{Consistency, Trailer};
