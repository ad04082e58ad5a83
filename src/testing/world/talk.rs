//! What the two hosts say to each other, and how much of it arrives.

use std::sync::Arc;

use super::{Checked, World};
use crate::{
    base::ids::Lineage,
    protocol::{
        claim::Claim,
        message::{Hello, ToReplica, Version},
    },
    replica::MachineReplica,
    testing::{
        conversation::{Context, Conversation, End},
        host::{Done, machine_id, machine_name, told},
        network::{Link, LogPart, Side},
        session::Session,
    },
};

impl World {
    pub(super) fn notice(&mut self, percent: u64) {
        for side in [Side::Primary, Side::Replica] {
            let Some(id) = self.talks_over(side) else {
                continue;
            };
            let link = self.network.link(id);
            let (over, drained) =
                link.map_or((true, true), |link| (link.over, link.is_drained(side)));
            let percent = if drained { percent } else { percent / 6 };
            if over && self.random.percent(percent) {
                self.hang_up(side, "the link is lost");
            }
        }
    }

    /// The link that a host believes in.
    pub(super) fn talks_over(&self, side: Side) -> Option<u64> {
        match side {
            Side::Primary => {
                let conversation = self.primary.process.as_ref()?.conversation.as_ref()?;
                Some(conversation.link)
            }
            Side::Replica => {
                let session = self.secondary.process.as_ref()?.session.as_ref()?;
                Some(session.link)
            }
        }
    }

    fn hang_up(&mut self, side: Side, why: &str) {
        let Some(id) = self.talks_over(side) else {
            return;
        };
        self.note(&format!("{side:?} hangs up: {why}"));
        self.network.leave(id, side);
        match side {
            Side::Primary => {
                if let Some(serving) = &mut self.primary.process
                    && let Some(conversation) = serving.conversation.take()
                {
                    conversation.leave(&serving.machine);
                }
            }
            Side::Replica => {
                if let Some(following) = &mut self.secondary.process {
                    following.session = None;
                }
            }
        }
    }

    pub(super) fn dial(&mut self) {
        if self.network.parted || self.secondary.process.is_none() {
            return;
        }
        let Some(serving) = &mut self.primary.process else {
            return;
        };
        if serving.conversation.is_some() {
            return;
        }
        let claim = Claim {
            generation: self.generation,
            active: true,
            born: None,
            wants: None,
        };
        let hello = Hello {
            version: Version::CURRENT,
            machine: machine_id(),
            name: machine_name(),
            claim,
            disks: self.setup.announced(),
        };
        let link = self.network.dial();
        let id = link.id;
        serving.conversation = Some(Conversation::new(id, &self.setup, hello));
        self.note(&format!("dials link {id}"));
    }

    pub(super) fn cut_link(&mut self) {
        let mut lost = 0;
        for link in &mut self.network.links {
            if link.over {
                continue;
            }
            link.over = true;
            lost += 1;
            // Of what is on its way some arrives: the first parts of each stream.
            let random = &mut self.random;
            link.said.truncate(random.index(link.said.len() + 1));
            link.log.truncate(random.index(link.log.len() + 1));
            link.back.truncate(random.index(link.back.len() + 1));
        }
        if lost > 0 {
            self.report.links_lost += lost;
            self.note("the link is cut");
        }
    }

    /// Lets the primary's conversation do something.
    fn converse(
        &mut self,
        talk: impl FnOnce(&mut Conversation, &mut Context<'_>) -> Result<(), End>,
    ) -> Checked {
        let Some(serving) = &mut self.primary.process else {
            return Ok(());
        };
        let Some(conversation) = &mut serving.conversation else {
            return Ok(());
        };
        let Some(link) = self.network.link(conversation.link) else {
            return Ok(());
        };
        let mut context = Context {
            machine: &serving.machine,
            setup: &self.setup,
            clock: &self.clock,
            link,
            oracle: &mut self.oracle,
            calm: self.calm,
        };
        match talk(conversation, &mut context) {
            Ok(()) => Ok(()),
            Err(End::Broken(broken)) => Err(broken),
            Err(_) if self.primary.medium.is_dead() => Ok(()),
            Err(End::Lost(why)) if !self.troubled[0] => Err(format!("P4: replication ends: {why}")),
            Err(End::Refused(why)) if why.contains("broke the protocol") => Err(why),
            Err(End::Lost(why) | End::Refused(why)) => {
                self.hang_up(Side::Primary, &why);
                Ok(())
            }
        }
    }

    pub(super) fn work(&mut self) -> Checked {
        let (rounds, send) = (self.random.between(1, 6), self.random.index(4));
        for _ in 0..rounds {
            self.converse(|conversation, context| conversation.work(context, send))?;
        }
        Ok(())
    }

    /// What the primary said arrives: the greeting of a new link, or a question.
    pub(super) fn hear_primary(&mut self) -> Checked {
        let Some(following) = &mut self.secondary.process else {
            return Ok(());
        };
        let Some(link) = (self.network.links.iter_mut()).find(|link| !link.said.is_empty()) else {
            return Ok(());
        };
        let id = link.id;
        let hello = match link.said.pop_front() {
            Some(ToReplica::Hello(hello)) => hello,
            Some(ToReplica::Compare(question)) => {
                return self.receive(|session, link, store| {
                    if session.link == id {
                        Session::compare(&question, link, store)
                    } else {
                        Ok(None)
                    }
                });
            }
            _ => return Ok(()),
        };
        // The primary of before talks again: what it said earlier is over.
        let before = following.session.take();
        let store = Arc::clone(&following.store);
        let prepared = store.prepare(&self.setup.specs());
        let prepared = prepared.and_then(|()| store.settled_head()).map_err(told);
        if let Some(before) = before.filter(|before| before.link != id) {
            self.network.leave(before.link, Side::Replica);
        }
        self.note(&format!("link {id} is greeted"));
        let Some(head) = self.excuse(1, "preparing the images", prepared)? else {
            self.network.leave(id, Side::Replica);
            return Ok(());
        };
        let Some(link) = self.network.link(id) else {
            return Ok(());
        };
        let session = Session::welcome(link, head, hello.claim.generation);
        if let Some(following) = &mut self.secondary.process {
            following.session = Some(session);
        }
        Ok(())
    }

    /// Lets the replica's session do something; what it said to be durable is remembered.
    fn receive(
        &mut self,
        take: impl FnOnce(&mut Session, &mut Link, &MachineReplica) -> Done<Option<Lineage>>,
    ) -> Checked {
        let Some(following) = &mut self.secondary.process else {
            return Ok(());
        };
        let Some(session) = &mut following.session else {
            return Ok(());
        };
        let Some(link) = self.network.link(session.link) else {
            return Ok(());
        };
        let said = take(session, link, &following.store);
        let limited = self.secondary.setup.space_max.is_some();
        let said = match said {
            // Nothing is wrong with a replica that has no more space than it was given.
            Err(why) if limited && why.contains("would take more than") => {
                self.hang_up(Side::Replica, &why);
                return Ok(());
            }
            said => said,
        };
        match self.excuse(1, "P2: receiving", said)? {
            Some(Some(lineage)) => {
                self.note(&format!("{} is staged", lineage.epoch));
                self.oracle.said = Some(lineage);
                self.check_replica()
            }
            Some(None) => Ok(()),
            None => {
                self.hang_up(Side::Replica, "an error");
                Ok(())
            }
        }
    }

    pub(super) fn deliver_log(&mut self) -> Checked {
        let parts = self.random.pick(&[1, 16, 256]);
        for _ in 0..parts {
            let Some(link) = self.talks_over(Side::Replica) else {
                return Ok(());
            };
            let Some(link) = self.network.link(link) else {
                return Ok(());
            };
            let Some(part) = link.log.pop_front() else {
                return Ok(());
            };
            let part = match part {
                // Bytes arrive cut anywhere.
                LogPart::Bytes(mut bytes) if self.random.percent(20) && bytes.len() > 1 => {
                    let rest = bytes.split_off(1 + self.random.index(bytes.len() - 1));
                    link.log.push_front(LogPart::Bytes(rest));
                    LogPart::Bytes(bytes)
                }
                part => part,
            };
            self.receive(|session, link, store| session.take(part, link, store))?;
        }
        Ok(())
    }

    pub(super) fn deliver_back(&mut self) -> Checked {
        for _ in 0..self.random.between(1, 4) {
            let Some(id) = self.talks_over(Side::Primary) else {
                return Ok(());
            };
            let Some(message) = self.network.link(id).and_then(|link| link.back.pop_front()) else {
                return Ok(());
            };
            self.note(&format!("{message:?}"));
            self.converse(|conversation, context| conversation.hear(message, context))?;
            self.check_marks()?;
        }
        Ok(())
    }

    pub(super) fn sync_replica(&mut self) -> Checked {
        self.receive(Session::run_sync)
    }
}
