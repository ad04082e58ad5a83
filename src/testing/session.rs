//! One primary's connection on the replica's side, driven step by step: `node::session` without its threads.

use super::{
    network::{Link, LogPart},
    record::{Done, told},
};
use crate::{
    base::{
        ids::{Generation, Lineage},
        units::to_u64,
    },
    protocol::{
        compare::Question,
        message::{Refusal, ToPrimary},
        receiver::Receiver,
    },
    replica::{Head, Ingest, IngestError, IngestEvent, MachineReplica, ReplicaError, SyncTask},
};

/// What a session said to be durable.
pub(super) type Said = Option<Lineage>;

/// A primary that is being heard.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) link: u64,
    generation: Generation,
    receiver: Receiver,
    ingest: Option<Ingest>,
    /// Counts the logs of this connection.
    log: u64,
    /// A sync that was asked for and has not been made.
    pub(super) sync: Option<(u64, SyncTask)>,
}

impl Session {
    /// Begins a session on a link whose greeting was accepted.
    pub(super) fn welcome(link: &mut Link, head: Head, generation: Generation) -> Self {
        let mut receiver = Receiver::default();
        link.answer(receiver.welcome(generation, head.into()));
        Self {
            link: link.id,
            generation,
            receiver,
            ingest: None,
            log: 0,
            sync: None,
        }
    }

    /// Takes the next part of the stream of logs; what was said to be durable for it. An error ends the session.
    pub(super) fn take(
        &mut self,
        part: LogPart,
        link: &mut Link,
        store: &MachineReplica,
    ) -> Done<Said> {
        let taken = match part {
            LogPart::Begin => {
                self.ingest = None;
                self.log += 1;
                store.begin(self.generation).map(|ingest| {
                    self.ingest = Some(ingest);
                    None
                })
            }
            LogPart::Bytes(bytes) => self.feed(&bytes, link, store),
            LogPart::End => self.ingest.take().map_or(Ok(None), |ingest| {
                ingest.finish()?;
                Ok(None)
            }),
        };
        taken.map_err(|error| refuse(error, link))
    }

    fn feed(
        &mut self,
        bytes: &[u8],
        link: &mut Link,
        store: &MachineReplica,
    ) -> Result<Said, IngestError> {
        let Some(ingest) = &mut self.ingest else {
            return Ok(None);
        };
        let staged = ingest.feed(bytes)?;
        while let Some(task) = ingest.write_due() {
            task.run();
        }
        if self.sync.is_none()
            && let Some(task) = ingest.sync_due()?
        {
            self.sync = Some((self.log, task));
        }
        if let Ok(Some(grant)) = self.receiver.received(to_u64(bytes.len())) {
            link.answer(grant);
        }
        Ok(staged.and_then(|event| report(event, link, store)))
    }

    /// Says where the point that is asked about holds something else.
    pub(super) fn compare(
        question: &Question,
        link: &mut Link,
        store: &MachineReplica,
    ) -> Done<Said> {
        let differs = match store.view_at(question.at) {
            Ok(view) => Some(view.compare(question).map_err(told)?),
            Err(ReplicaError::NoPoint(_)) => None,
            Err(error) => return Err(told(error)),
        };
        link.answer(ToPrimary::Compared {
            number: question.number,
            differs,
        });
        Ok(None)
    }

    /// Makes the sync that was asked for.
    pub(super) fn run_sync(&mut self, link: &mut Link, store: &MachineReplica) -> Done<Said> {
        let Some((log, task)) = self.sync.take() else {
            return Ok(None);
        };
        let event = task.run().map_err(|error| refuse(error, link))?;
        if log == self.log {
            return Ok(report(event, link, store));
        }
        Ok(None)
    }
}

fn report(event: IngestEvent, link: &mut Link, store: &MachineReplica) -> Said {
    match event {
        IngestEvent::Durable { frames, .. } => {
            if matches!(store.head(), Head::Empty | Head::Copying) {
                link.answer(ToPrimary::Copied { frames });
            }
            None
        }
        IngestEvent::Staged { lineage, .. } => {
            link.answer(ToPrimary::Staged { lineage });
            Some(lineage)
        }
    }
}

fn refuse(error: IngestError, link: &mut Link) -> String {
    let detail = told(error);
    link.answer(ToPrimary::Refused(Refusal::Failed {
        detail: detail.clone(),
    }));
    detail
}
