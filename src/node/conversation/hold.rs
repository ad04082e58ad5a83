//! A replica that has nothing, while its initial copy waits: what is refused meanwhile, and what is not.

use super::Conversation;
use crate::{
    node::{portable::export::Export, progress::Phase},
    protocol::message,
};

impl Conversation<'_> {
    /// Leaves the replica, which has nothing, as it is until the initial copy is due. Whoever waits for more is told.
    pub(super) fn hold(&mut self, head: message::Head) {
        let driver = self.driver;
        tracing::info!(machine = %driver.subject.name, ?head, "connected to the replica, the initial copy waits");
        driver.progress.lock().phase = Phase::CopyWaits(driver.target.copy_due);
        self.flushes(|flushes| flushes.linked(false));
        self.held = Some(head);
        for answer in self.waiting.drain(..) {
            let _ = answer.send(Err(driver.told_to_wait()));
        }
        for answer in self.demanding.drain(..) {
            let _ = answer.send(Err(driver.told_to_wait()));
        }
    }

    /// The export that was asked for, if the replica waits for a copy. It is refused if the replica does not.
    pub(super) fn may_export(&mut self) -> Option<Export> {
        if self.held.is_some() {
            return self.export.take();
        }
        if self.sender.is_replicating()
            && let Some(export) = self.export.take()
        {
            let name = &self.driver.subject.name;
            export.refuse(if self.sender.is_copying() {
                format!("machine {name}: its initial copy goes over the network already; with initial-copy = \"portable\" it would wait")
            } else {
                format!("machine {name}: its replica needs no initial copy, it gets what changes over the network")
            });
        }
        None
    }
}
