//! understudy
pub mod base;
pub mod bench;
pub mod cli;
pub mod coord;
pub mod delta;
pub mod disk;
pub mod net;
pub mod node;
pub mod protocol;
pub mod replica;
pub mod shim;
pub mod storage;
pub mod track;
pub mod volume;
