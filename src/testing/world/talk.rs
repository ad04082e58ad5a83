//! What a primary and its replica say to each other, and how much of it arrives.

use std::sync::Arc;

use super::{Checked, World};
use crate::{
    base::ids::Lineage,
    protocol::{
        claim::{Answer, Claim},
        message::{Hello, Refusal, ToPrimary, ToReplica, Version},
        sender::StopReason,
    },
    replica::MachineReplica,
    testing::{
        conversation::{Context, Conversation, End},
        host::{machine_id, machine_name},
        network::{Link, LogPart},
        record::{Done, told},
        session::Session,
        setup::Setup,
    },
};

pub(super) fn hello(setup: &Setup, claim: Claim) -> Hello {
    Hello {
        version: Version::CURRENT,
        machine: machine_id(),
        name: machine_name(),
        claim,
        disks: setup.announced(),
    }
}

impl World {
    pub(super) fn notice(&mut self, percent: u64) {
        for host in 0..2 {
            for id in [self.feeds(host), self.is_fed(host)].into_iter().flatten() {
                let link = self.network.link(id);
                let (over, drained) =
                    link.map_or((true, true), |link| (link.over, link.is_drained(host)));
                let percent = if drained { percent } else { percent / 6 };
                if over && self.random.percent(percent) {
                    self.hang_up(host, id, "the link is lost");
                }
            }
        }
    }

    /// The link over which a host feeds the other one, as far as it knows.
    pub(super) fn feeds(&self, host: usize) -> Option<u64> {
        let serving = self.hosts[host].serving()?;
        Some(serving.conversation.as_ref()?.link)
    }

    /// The link over which a host is fed, as far as it knows.
    fn is_fed(&self, host: usize) -> Option<u64> {
        let following = self.hosts[host].following()?;
        Some(following.session.as_ref()?.link)
    }

    fn hang_up(&mut self, host: usize, id: u64, why: &str) {
        self.note(&format!("host {host} hangs up link {id}: {why}"));
        self.network.leave(id, host);
        if self.feeds(host) == Some(id)
            && let Some(serving) = self.hosts[host].serving_mut()
        {
            serving.hang_up();
        }
        if self.is_fed(host) == Some(id)
            && let Some(following) = self.hosts[host].following_mut()
        {
            following.session = None;
        }
    }

    pub(super) fn dial(&mut self) {
        for host in 0..2 {
            if self.network.parted || !self.hosts[1 - host].is_up() {
                continue;
            }
            let Some(serving) = self.hosts[host].serving_mut() else {
                continue;
            };
            let Some(role) = serving
                .replicates
                .filter(|_| serving.conversation.is_none())
            else {
                continue;
            };
            let claim = Claim {
                generation: role.generation,
                active: true,
                born: role.born,
                wants: None,
            };
            let link = self.network.dial(host);
            let id = link.id;
            let hello = hello(&self.setup, claim);
            serving.conversation = Some(Conversation::new(id, &self.setup, hello));
            self.note(&format!("host {host} dials link {id}"));
        }
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

    pub(super) fn request_cut(&mut self) {
        for host in 0..2 {
            if let Some(serving) = self.hosts[host].serving_mut()
                && let Some(conversation) = &mut serving.conversation
            {
                conversation.request_cut();
                self.note("a cut is asked for");
            }
        }
    }

    /// Lets the conversation of a primary do something.
    fn converse(
        &mut self,
        host: usize,
        talk: impl FnOnce(&mut Conversation, &mut Context<'_>) -> Result<(), End>,
    ) -> Checked {
        let Some(serving) = self.hosts[host].serving_mut() else {
            return Ok(());
        };
        let machine = Arc::clone(&serving.machine);
        let Some(conversation) = &mut serving.conversation else {
            return Ok(());
        };
        let id = conversation.link;
        let Some(link) = self.network.link(id) else {
            return Ok(());
        };
        let mut context = Context {
            host,
            machine: &machine,
            setup: &self.setup,
            clock: &self.clock,
            link,
            oracle: &mut self.oracle,
            calm: self.calm,
        };
        let end = match talk(conversation, &mut context) {
            Ok(()) => return Ok(()),
            Err(end) => end,
        };
        match end {
            End::Broken(broken) => Err(broken),
            _ if self.hosts[host].medium.is_dead() => Ok(()),
            End::Lost(why) if !self.troubled[host] => Err(format!("P4: replication ends: {why}")),
            End::Lost(why) => {
                self.hang_up(host, id, &why);
                Ok(())
            }
            End::Refused(StopReason::Protocol(why)) => Err(why.into()),
            End::Refused(StopReason::Refused(refusal)) => {
                self.hang_up(host, id, &refusal.to_string());
                self.unwelcome(host, &refusal)
            }
        }
    }

    /// The other host does not follow.
    fn unwelcome(&mut self, host: usize, refusal: &Refusal) -> Checked {
        let Refusal::Role { answer } = refusal else {
            return Ok(());
        };
        let role = self.hosts[host].role();
        if role.is_some_and(|role| *answer == Answer::Diverged(role.generation)) {
            return self.bring_back(host);
        }
        self.hosts[host].process().answered = Some(*answer);
        Ok(())
    }

    pub(super) fn work(&mut self) -> Checked {
        for host in 0..2 {
            if self.feeds(host).is_none() {
                continue;
            }
            let (rounds, send) = (self.random.between(1, 6), self.random.index(4));
            for _ in 0..rounds {
                self.converse(host, |conversation, context| {
                    conversation.work(context, send)
                })?;
            }
        }
        Ok(())
    }

    /// What a primary said arrives: the greeting of a new link, or a question.
    pub(super) fn hear_primary(&mut self) -> Checked {
        let waiting = self.network.links.iter().filter(|link| {
            let heard = self.hosts[1 - link.from].is_up();
            heard && !link.said.is_empty()
        });
        let waiting: Vec<(u64, usize)> = waiting.map(|link| (link.id, 1 - link.from)).collect();
        if waiting.is_empty() {
            return Ok(());
        }
        let (id, host) = self.random.pick(&waiting);
        let said = self.network.link(id).and_then(|link| link.said.pop_front());
        match said {
            Some(ToReplica::Hello(hello)) => self.greeted(host, id, &hello.claim),
            Some(ToReplica::Compare(question)) => self.receive(host, |session, link, store| {
                if session.link == id {
                    Session::compare(&question, link, store)
                } else {
                    Ok(None)
                }
            }),
            _ => Ok(()),
        }
    }

    fn greeted(&mut self, host: usize, id: u64, claim: &Claim) -> Checked {
        self.note(&format!("host {host} is greeted on link {id}: {claim:?}"));
        let claimed = self.hosts[host].claimed(claim);
        let generation = self.allow_refusal(host, "a greeting", claimed)?;
        if self.hosts[host].medium.is_dead() {
            return Ok(());
        }
        let Some(link) = self.network.link(id) else {
            return Ok(());
        };
        let generation = match generation {
            Ok(generation) => generation,
            Err(refusal) => {
                link.answer(ToPrimary::Refused(refusal));
                self.network.leave(id, host);
                return Ok(());
            }
        };
        let Some(following) = self.hosts[host].following() else {
            return Ok(());
        };
        let head = following.store.settled_head().map_err(told);
        let Some(head) = self.excuse(host, "telling the head", head)? else {
            self.network.leave(id, host);
            return Ok(());
        };
        let Some(link) = self.network.link(id) else {
            return Ok(());
        };
        let session = Session::welcome(link, head, generation);
        if let Some(following) = self.hosts[host].following_mut() {
            following.session = Some(session);
        }
        Ok(())
    }

    /// Lets the session of a replica do something; what it said to be durable is remembered.
    fn receive(
        &mut self,
        host: usize,
        take: impl FnOnce(&mut Session, &mut Link, &MachineReplica) -> Done<Option<Lineage>>,
    ) -> Checked {
        let Some(following) = self.hosts[host].following_mut() else {
            return Ok(());
        };
        let Some(session) = &mut following.session else {
            return Ok(());
        };
        let id = session.link;
        let Some(link) = self.network.link(id) else {
            return Ok(());
        };
        let said = take(session, link, &following.store);
        let limited = self.hosts[host].setup.space_max.is_some();
        let said = match said {
            // Nothing is wrong with a replica that has no more space than it was given.
            Err(why) if limited && why.contains("would take more than") => {
                self.hang_up(host, id, &why);
                return Ok(());
            }
            said => said,
        };
        match self.excuse(host, "P2: receiving", said)? {
            Some(Some(lineage)) => {
                self.note(&format!("host {host}: {} is staged", lineage.epoch));
                self.oracle.hosts[host].said = Some(lineage);
                self.check_replica(host)
            }
            Some(None) => Ok(()),
            None => {
                self.hang_up(host, id, "an error");
                Ok(())
            }
        }
    }

    pub(super) fn deliver_log(&mut self) -> Checked {
        for host in 0..2 {
            let parts = self.random.pick(&[1, 16, 256]);
            for _ in 0..parts {
                let Some(id) = self.is_fed(host) else {
                    break;
                };
                let link = self.network.link(id);
                let Some((part, link)) = link.and_then(|link| Some((link.log.pop_front()?, link)))
                else {
                    break;
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
                self.receive(host, |session, link, store| session.take(part, link, store))?;
            }
        }
        Ok(())
    }

    pub(super) fn deliver_back(&mut self) -> Checked {
        for host in 0..2 {
            for _ in 0..self.random.between(1, 4) {
                let Some(id) = self.feeds(host) else {
                    break;
                };
                let link = self.network.link(id);
                let Some(message) = link.and_then(|link| link.back.pop_front()) else {
                    break;
                };
                self.note(&format!("to host {host}: {message:?}"));
                self.converse(host, |conversation, context| {
                    conversation.hear(message, context)
                })?;
                self.check_marks(host)?;
            }
        }
        Ok(())
    }

    pub(super) fn sync_replica(&mut self) -> Checked {
        for host in 0..2 {
            self.receive(host, Session::run_sync)?;
        }
        Ok(())
    }
}
