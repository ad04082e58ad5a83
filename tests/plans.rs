//! Several machines on two hosts, driven from a third one: operators, jobs, recovery plans, with real nodes and mounts.

mod deaths;
mod groups;
mod hosts;
mod operators;
mod stage;
mod verbs;
