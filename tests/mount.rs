//! Disks behind a real mount: what programs, the loop device, the kernel and a guest see.
//!
//! These tests need root and `/dev/fuse`, and each program they drive; where something is missing they say SKIPPED.

mod attach;
mod calls;
mod guest;
mod parallel;
mod tools;
