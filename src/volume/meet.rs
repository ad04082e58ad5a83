//! Two hosts that meet: what the replica's head means for what comes next.
#![forbid(unsafe_code)]

use super::{
    answers::{CopyScope, MachineError, Reconcile, ReplicaHead},
    machine::Machine,
};
use crate::protocol::{message::Head, sender::Agreement};

impl Machine {
    /// [Reconciles](Machine::reconcile) with what the replica holds, and begins what is needed where the histories do not
    /// meet: a resync of what is complete, a copy of all else. Called on each new connection, before anything is taken.
    pub fn agree(&self, head: Head) -> Result<(Reconcile, Agreement), MachineError> {
        let reconciled = self.reconcile(ReplicaHead::from(head))?;
        let agreement = match (reconciled, head) {
            (Reconcile::InStep | Reconcile::AckLost, _) => Agreement::InStep,
            (Reconcile::CopyResumes, _) => Agreement::CopyNeeded,
            (Reconcile::CopyNeeded, Head::Copied(lineage) | Head::Complete(lineage)) => {
                // The replica keeps the points it has: what this host holds becomes one epoch on top of them.
                self.begin_resync(lineage)?;
                Agreement::InStep
            }
            (Reconcile::CopyNeeded, Head::Empty) => {
                self.begin_initial_copy(CopyScope::Allocated)?;
                Agreement::CopyNeeded
            }
            (Reconcile::CopyNeeded, Head::Copying) => {
                // Half a copy of an unknown past lies there: holes have to be told as well.
                self.begin_initial_copy(CopyScope::Everything)?;
                Agreement::CopyNeeded
            }
        };
        Ok((reconciled, agreement))
    }
}
