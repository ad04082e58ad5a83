//! Asking the replica what it holds: suspects of a resync, and the blocks of a verification.

use super::{Conversation, End, chain};
use crate::{
    base::{
        ids::Lineage,
        units::{DiskIndex, Extent},
    },
    node::verify::Verifying,
    protocol::{
        compare::{Differing, Question, Sample, runs_of},
        message::ToReplica,
        sender::StopReason,
    },
    volume::{ResyncReason, Verify},
};

type Runs = Vec<(DiskIndex, Extent)>;

/// What a question is about.
pub(super) enum About {
    Suspects(Runs),
    Verification(Runs),
}

impl Conversation<'_> {
    /// Asks about the next suspects; whether there were any.
    pub(super) fn ask(&mut self) -> Result<bool, End> {
        let machine = &self.driver.machine;
        let Some(at) = machine.lineage() else {
            return Ok(false);
        };
        let samples = machine.ask().map_err(|error| End::Lost(chain(&error)))?;
        if samples.is_empty() {
            return Ok(false);
        }
        self.asked.push_back(About::Suspects(runs_of(&samples)));
        let read = read_of(&samples);
        let bytes = self.say_question(at, samples)?;
        self.driver.progress.lock().asked(read, bytes);
        Ok(true)
    }

    /// Asks about the next blocks of a verification, or ends it; whether there was anything to do.
    pub(super) fn verify(&mut self) -> Result<bool, End> {
        let now = self.driver.host.clock.monotonic();
        let due = self.verifying(|verifying| verifying.take_due(now));
        let Some(mut blocks) = due.flatten() else {
            return Ok(false);
        };
        let next = self.driver.machine.verify(&mut blocks);
        let read = match &next {
            Ok(Verify::Ask(_, samples)) => read_of(samples),
            _ => 0,
        };
        self.verifying(|verifying| verifying.give_back(blocks, read, now));
        if let Ok(Verify::Ask(_, samples)) = &next {
            self.asked.push_back(About::Verification(runs_of(samples)));
        }
        self.save_verification();
        match next {
            Ok(Verify::Ask(at, samples)) => {
                self.say_question(at, samples)?;
                Ok(true)
            }
            Ok(Verify::Later) => Ok(false),
            Ok(Verify::Done) => self.end_verification(),
            Err(error) => {
                self.verification_ended(Some(chain(&error)));
                Ok(true)
            }
        }
    }

    /// Remembers what is left of a verification, if it is time for that.
    fn save_verification(&self) {
        let now = self.driver.host.clock.monotonic();
        let asked = self.asked.iter().filter_map(|about| match about {
            About::Verification(runs) => Some(runs),
            About::Suspects(_) => None,
        });
        let asked = asked.flatten().copied();
        let machine = &self.driver.machine;
        let saved = self.verifying(|verifying| verifying.due_record(machine, asked, now));
        if let Some(saved) = saved.flatten() {
            self.driver.save_verification(Some(&saved));
        }
    }

    /// It is over, for this reason if it was not done.
    fn verification_ended(&self, problem: Option<String>) {
        let now = self.driver.host.clock.monotonic();
        self.verifying(|verifying| verifying.end(now, problem));
        self.driver.save_verification(None);
    }

    /// Ends the verification if nothing of it is on the way; whether it ended. What differs is owed when no epoch is
    /// closing, so that none has to be merged.
    fn end_verification(&mut self) -> Result<bool, End> {
        let waits = |about: &About| matches!(about, About::Verification(_));
        let repair = self.verifying(|verifying| verifying.to_repair());
        let repair = repair.unwrap_or_default();
        if self.asked.iter().any(waits) || !repair.is_empty() && !self.sender.is_open() {
            return Ok(false);
        }
        let machine = &self.driver.machine;
        machine
            .suspect(&repair, ResyncReason::Repair)
            .map_err(|error| End::Lost(chain(&error)))?;
        let clock = &*self.driver.host.clock;
        if !repair.is_empty() {
            self.driver.progress.lock().resync(machine, clock);
            self.sender.want_cut();
        }
        self.verification_ended(None);
        Ok(true)
    }

    /// The oldest question is answered.
    pub(super) fn answered(&mut self, differing: Option<&Differing>) -> Result<(), End> {
        let about = self.asked.pop_front();
        let about = about.expect("the sender counts questions and answers");
        let broken = |why| End::Refused(StopReason::Protocol(why));
        match about {
            About::Suspects(runs) => {
                let differing =
                    differing.ok_or_else(|| broken("its head is not there any more"))?;
                let sifted = self.driver.machine.answered(&runs, differing);
                let sifted = sifted.ok_or_else(|| broken(OTHER_BLOCKS))?;
                let mut progress = self.driver.progress.lock();
                progress.compared(bytes_of(&runs), sifted);
            }
            About::Verification(runs) => {
                // A point that was merged away: the blocks are compared at the next one.
                let found = differing.map(|differing| differing.places(&runs));
                let Some(Some(found)) = found else {
                    self.verifying(|verifying| verifying.put_back(&runs));
                    return found.map_or(Ok(()), |_| Err(broken(OTHER_BLOCKS)));
                };
                let hopeless = self.verifying(|verifying| {
                    verifying.answered(bytes_of(&runs), found);
                    verifying.is_hopeless()
                });
                if hopeless == Some(true) {
                    let why = "it differs in too many places: compare and mend everything with `understudy resync`";
                    self.verification_ended(Some(why.to_owned()));
                }
            }
        }
        Ok(())
    }

    /// No question is answered any more.
    pub(super) fn unanswered(&mut self) {
        for about in std::mem::take(&mut self.asked) {
            if let About::Verification(runs) = about {
                self.verifying(|verifying| verifying.put_back(&runs));
            }
        }
        self.verifying(Verifying::save_soon);
        self.save_verification();
    }

    /// Begins the resync that was asked for. An epoch is cut at its end, also if nothing differs: it ends the resync.
    pub(super) fn begin_demanded(&mut self) {
        for answer in std::mem::take(&mut self.demanding) {
            let begun = self.driver.begin_demanded();
            if begun.is_ok() {
                self.sender.want_cut();
            }
            // Whoever asked may have gone away.
            let _ = answer.send(begun);
        }
    }

    fn say_question(&mut self, at: Lineage, samples: Vec<Sample>) -> Result<u64, End> {
        let number = self.sender.ask();
        self.say(&ToReplica::Compare(Question {
            number,
            at,
            samples,
        }))
    }

    /// Does something with the verification, if one runs.
    fn verifying<T>(&self, what: impl FnOnce(&mut Verifying) -> T) -> Option<T> {
        let mut progress = self.driver.progress.lock();
        let verifying = progress.verify.as_mut();
        verifying.filter(|v| v.is_running()).map(what)
    }
}

const OTHER_BLOCKS: &str = "an answer about other blocks than were asked about";

/// Bytes that were read for a question: what is known to be zeros was not.
fn read_of(samples: &[Sample]) -> u64 {
    let read = samples.iter().filter(|sample| sample.hashes.is_some());
    read.map(|sample| sample.len).sum()
}

fn bytes_of(runs: &[(DiskIndex, Extent)]) -> u64 {
    runs.iter().map(|(_, run)| run.len).sum()
}
