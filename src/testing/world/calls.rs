//! Calls between the hosts about roles, as in `node::call`: each on a link of its own, each lost on its way, lost on its
//! way back, or made twice by chance.

use super::{Checked, World, talk::hello};
use crate::{
    base::{clock::Clock, ids::Lineage},
    coord::role::{Answer, Part},
    protocol::message::Refusal,
    testing::{
        host::Unmount,
        network::Question,
        record::{No, told},
    },
    volume::ResyncReason,
};

/// What a host answers to a question about roles.
#[derive(Debug)]
enum Reply {
    Answer(Answer),
    TookOver,
    Returned,
    /// Nobody answers, or not to this.
    Nothing,
}

impl World {
    /// Whether a call of a host arrives.
    fn reaches(&mut self, from: usize) -> bool {
        let up = self.hosts[1 - from].is_up() && !self.hosts[1 - from].medium.is_dead();
        up && !self.network.parted && !self.random.percent(self.setup.loss)
    }

    /// Asks the other host, and hears what it answers.
    fn call(&mut self, from: usize, question: &Question) -> Result<Reply, String> {
        let to = 1 - from;
        if self.random.percent(self.setup.loss) {
            // The caller gives up, and calls again; this one arrives all the same.
            self.network.late.push((to, question.clone()));
        }
        if !self.reaches(from) {
            return Ok(Reply::Nothing);
        }
        let reply = self.heard(to, question)?;
        let lost = self.random.percent(self.setup.loss) || self.hosts[to].medium.is_dead();
        Ok(if lost { Reply::Nothing } else { reply })
    }

    /// A question arrives at a host.
    fn heard(&mut self, host: usize, question: &Question) -> Result<Reply, String> {
        self.note(&format!("host {host} is asked: {question:?}"));
        let reply = match *question {
            Question::Claim(ref hello) => {
                let claimed = self.hosts[host].claimed(&hello.claim);
                match self.allow_refusal(host, "a claim", claimed)? {
                    Ok(follows) => Reply::Answer(Answer::Follows(follows)),
                    Err(Refusal::Role { answer }) => Reply::Answer(answer),
                    Err(_) => Reply::Nothing,
                }
            }
            Question::HandOver { from, head } => {
                let took = self.hosts[host].take_over(from, head);
                let took = self.allow(host, "a hand-over", took)?;
                self.check_serving(host)?;
                took.map_or(Reply::Nothing, |_| Reply::TookOver)
            }
            Question::Taken { by, point, cut } => {
                self.taken = Some(point);
                let returned = self.hosts[host].returned(by, point, cut);
                let returned = self.allow(host, "a return", returned)?;
                if returned.is_some() {
                    self.look_at_rescue(host)?;
                    self.check_marks(1 - host)?;
                }
                returned.map_or(Reply::Nothing, |()| Reply::Returned)
            }
        };
        Ok(reply)
    }

    /// A call arrives whose caller has given up.
    pub(super) fn deliver_late(&mut self) -> Checked {
        if self.network.late.is_empty() {
            return Ok(());
        }
        let index = self.random.index(self.network.late.len());
        let (to, question) = self.network.late.remove(index);
        if self.hosts[to].is_up() {
            self.note("late:");
            self.heard(to, &question)?;
        }
        Ok(())
    }

    /// A refusal is no wonder, a failure is one where nothing is wrong.
    pub(super) fn allow_refusal<T>(
        &mut self,
        host: usize,
        what: &str,
        done: Result<T, Refusal>,
    ) -> Result<Result<T, Refusal>, String> {
        self.observe(host)?;
        if let Err(Refusal::Failed { detail }) = &done {
            self.allow(host, what, Err::<(), _>(No::Failed(detail.clone())))?;
        }
        Ok(done)
    }

    /// Asks the other host what it thinks of this one's claim, and obeys.
    pub(super) fn ask(&mut self, host: usize) -> Checked {
        let Some(claim) = self.hosts[host].role().and_then(|role| role.claim()) else {
            return Ok(());
        };
        let hello = hello(&self.setup, claim);
        let Reply::Answer(answer) = self.call(host, &Question::Claim(hello))? else {
            return Ok(());
        };
        let heard = self.hosts[host].hear(answer);
        self.allow(host, "an answer", heard).map(|_| ())
    }

    /// A primary that stepped down asks the other host to take over.
    pub(super) fn hand_over(&mut self, host: usize) -> Checked {
        let Some(role) = self.hosts[host].role() else {
            return Ok(());
        };
        let (Part::SteppedDown { head }, None) = (role.part, role.claim) else {
            return Ok(());
        };
        let from = role.generation;
        self.call(host, &Question::HandOver { from, head })
            .map(|_| ())
    }

    /// A primary takes the blocks in which the former one may differ, and lets it follow.
    pub(super) fn bring_back(&mut self, host: usize) -> Checked {
        let Some(role) = self.hosts[host].role() else {
            return Ok(());
        };
        if !self.reaches(host) {
            return Ok(());
        }
        self.note(&format!("host {host} brings the other one back"));
        let by = role.generation;
        let differing = self.hosts[1 - host].differing(by);
        let Some(differing) = self.allow(1 - host, "telling what differs", differing)? else {
            return Ok(());
        };
        let taken = self.take_differing(host, role.born, &differing);
        let Some(Some(point)) = self.excuse(host, "P3: taking what differs", taken)? else {
            return Ok(());
        };
        let cut = self.clock.wall();
        self.call(host, &Question::Taken { by, point, cut })?;
        Ok(())
    }

    fn take_differing(
        &mut self,
        host: usize,
        born: Option<Lineage>,
        differing: &[(crate::base::units::DiskIndex, crate::base::units::Extent)],
    ) -> Result<Option<Lineage>, String> {
        let Some(serving) = self.hosts[host].serving() else {
            return Ok(None);
        };
        let machine = &serving.machine;
        let Some(point) = machine.lineage() else {
            return Ok(None);
        };
        if born != Some(point) {
            self.rescanned = true;
            machine.begin_resync(point).map_err(told)?;
        }
        machine
            .suspect(differing, ResyncReason::Reversed)
            .map_err(told)?;
        Ok(Some(point))
    }

    /// Obeys what the other hosts said to the replication.
    pub(super) fn obey(&mut self) -> Checked {
        for host in 0..2 {
            if !self.hosts[host].is_up() {
                continue;
            }
            let Some(answer) = self.hosts[host].process().answered.take() else {
                continue;
            };
            let before = self.hosts[host].role();
            let heard = self.hosts[host].hear(answer);
            let heard = self.allow(host, "obeying", heard)?;
            if heard.is_some() && self.hosts[host].role() != before {
                self.arrange(host)?;
            }
        }
        Ok(())
    }

    pub(super) fn arrange(&mut self, host: usize) -> Checked {
        let arranged = self.hosts[host].arrange();
        if self.allow(host, "arranging", arranged)?.is_some() {
            self.check_serving(host)?;
        }
        Ok(())
    }

    /// Does what is due: lets go of disks that a fenced host's guest has left, calls the other host, tries again what
    /// failed.
    pub(super) fn look_after(&mut self) -> Checked {
        for host in 0..2 {
            self.look_after_one(host)?;
        }
        Ok(())
    }

    fn look_after_one(&mut self, host: usize) -> Checked {
        let Some(before) = self.hosts[host].role() else {
            return Ok(());
        };
        if matches!(before.part, Part::Fenced { .. }) {
            // Still in use is no news: the guest was told that it cannot write.
            let idle = self.hosts[host].idle(Unmount::IfUnused);
            self.allow(host, "leaving a fenced host", idle)?;
        }
        match before.part {
            Part::SteppedDown { .. } if before.claim.is_none() => self.hand_over(host)?,
            Part::SteppedDown { .. } | Part::Fenced { .. } => self.ask(host)?,
            _ if before.claim.is_some() => self.ask(host)?,
            _ => {}
        }
        let trouble = self.hosts[host].process.as_ref();
        let trouble = trouble.is_some_and(|process| process.trouble.is_some());
        if self.hosts[host].role() != Some(before) || trouble {
            self.arrange(host)?;
        }
        Ok(())
    }
}
