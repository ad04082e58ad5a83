//! The whole program: two nodes as processes, real certificates, QUIC on the loopback, FUSE mounts, other people's
//! tools. What is promised to a guest and to an operator, under load, through deaths and outages.

mod deaths;
mod flow;
mod flushes;
mod guest;
mod policies;
mod portable;
mod resync;
mod schedule;
mod seed;
mod suspend;
mod troubles;
mod verify;
