//! What is on its way between the two hosts.
//!
//! A link has three streams that keep their order and know nothing of each other: what the primary says, its delta logs,
//! what the replica says. A link that is over takes nothing more; what is in it may still arrive, or not, and its two ends
//! notice at different times.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::{
    base::{
        clock::Timestamp,
        ids::{Generation, Lineage},
    },
    protocol::message::{Hello, ToPrimary, ToReplica},
};

/// A part of the stream of delta logs.
#[derive(Clone, Debug)]
pub(super) enum LogPart {
    Begin,
    Bytes(Bytes),
    End,
}

/// A connection from a primary to its replica.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) id: u64,
    /// The host that dialled.
    pub(super) from: usize,
    pub(super) said: VecDeque<ToReplica>,
    pub(super) log: VecDeque<LogPart>,
    pub(super) back: VecDeque<ToPrimary>,
    /// Nothing more is taken.
    pub(super) over: bool,
    left: [bool; 2],
}

impl Link {
    fn new(id: u64, from: usize) -> Self {
        Self {
            id,
            from,
            said: VecDeque::new(),
            log: VecDeque::new(),
            back: VecDeque::new(),
            over: false,
            left: [false; 2],
        }
    }

    pub(super) fn say(&mut self, message: ToReplica) {
        if !self.over {
            self.said.push_back(message);
        }
    }

    pub(super) fn send(&mut self, part: LogPart) {
        if !self.over {
            self.log.push_back(part);
        }
    }

    pub(super) fn answer(&mut self, message: ToPrimary) {
        if !self.over {
            self.back.push_back(message);
        }
    }

    /// A host hung up, noticed, or died: nothing arrives there any more.
    pub(super) fn leave(&mut self, host: usize) {
        self.over = true;
        self.left[host] = true;
        if host == self.from {
            self.back.clear();
        } else {
            self.said.clear();
            self.log.clear();
        }
    }

    /// Whether a host can only notice that the link is over.
    pub(super) fn is_drained(&self, host: usize) -> bool {
        self.over
            && if host == self.from {
                self.back.is_empty()
            } else {
                self.said.is_empty() && self.log.is_empty()
            }
    }
}

/// A short call about roles, on a link of its own.
#[derive(Clone, Debug)]
pub(super) enum Question {
    Claim(Hello),
    HandOver {
        from: Generation,
        head: Lineage,
    },
    Taken {
        by: Generation,
        point: Lineage,
        cut: Timestamp,
    },
}

/// All links.
#[derive(Debug, Default)]
pub(super) struct Network {
    pub(super) links: Vec<Link>,
    /// Calls whose callers have given up, and whom they will reach all the same.
    pub(super) late: Vec<(usize, Question)>,
    /// Nothing can be dialled.
    pub(super) parted: bool,
    dialled: u64,
}

impl Network {
    pub(super) fn dial(&mut self, from: usize) -> &mut Link {
        self.links.retain(|link| link.left != [true; 2]);
        self.dialled += 1;
        self.links.push(Link::new(self.dialled, from));
        self.links.last_mut().expect("one was just pushed")
    }

    pub(super) fn link(&mut self, id: u64) -> Option<&mut Link> {
        self.links.iter_mut().find(|link| link.id == id)
    }

    pub(super) fn leave(&mut self, id: u64, host: usize) {
        if let Some(link) = self.link(id) {
            link.leave(host);
        }
    }

    /// A host is dead: none of its links has that end any more.
    pub(super) fn lost_host(&mut self, host: usize) {
        for link in &mut self.links {
            link.leave(host);
        }
    }
}
