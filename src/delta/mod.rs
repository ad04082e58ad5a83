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
