//! What is on its way between the two hosts.
//!
//! A link has three streams that keep their order and know nothing of each other: what the primary says, its delta logs,
//! what the replica says. A link that is over takes nothing more; what is in it may still arrive, or not, and its two ends
//! notice at different times.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::protocol::message::{ToPrimary, ToReplica};

/// A part of the stream of delta logs.
#[derive(Clone, Debug)]
pub(super) enum LogPart {
    Begin,
    Bytes(Bytes),
    End,
}

/// An end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Primary,
    Replica,
}

/// A connection from the primary to its replica.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) id: u64,
    pub(super) said: VecDeque<ToReplica>,
    pub(super) log: VecDeque<LogPart>,
    pub(super) back: VecDeque<ToPrimary>,
    /// Nothing more is taken.
    pub(super) over: bool,
    left: [bool; 2],
}

impl Link {
    fn new(id: u64) -> Self {
        Self {
            id,
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

    /// An end hung up, noticed, or died: nothing arrives there any more.
    pub(super) fn leave(&mut self, side: Side) {
        self.over = true;
        match side {
            Side::Primary => {
                self.left[0] = true;
                self.back.clear();
            }
            Side::Replica => {
                self.left[1] = true;
                self.said.clear();
                self.log.clear();
            }
        }
    }

    /// Whether an end can only notice that the link is over.
    pub(super) fn is_drained(&self, side: Side) -> bool {
        self.over
            && match side {
                Side::Primary => self.back.is_empty(),
                Side::Replica => self.said.is_empty() && self.log.is_empty(),
            }
    }
}

/// All links.
#[derive(Debug, Default)]
pub(super) struct Network {
    pub(super) links: Vec<Link>,
    /// Nothing can be dialled.
    pub(super) parted: bool,
    dialled: u64,
}

impl Network {
    pub(super) fn dial(&mut self) -> &mut Link {
        self.links.retain(|link| link.left != [true; 2]);
        self.dialled += 1;
        self.links.push(Link::new(self.dialled));
        self.links.last_mut().expect("one was just pushed")
    }

    pub(super) fn link(&mut self, id: u64) -> Option<&mut Link> {
        self.links.iter_mut().find(|link| link.id == id)
    }

    pub(super) fn leave(&mut self, id: u64, side: Side) {
        if let Some(link) = self.link(id) {
            link.leave(side);
        }
    }

    /// A host is dead: none of its links has that end any more.
    pub(super) fn lost_host(&mut self, side: Side) {
        for link in &mut self.links {
            link.leave(side);
        }
    }
}
