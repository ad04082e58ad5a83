//! When the initial copy of a machine begins, as its host remembers it.

use std::path::Path;

use super::{member::Member, record::CopyDue};
use crate::{
    base::clock::Timestamp,
    coord::role::Part,
    node::{
        control::{ImportReport, OperateError},
        initial_copy::{self, InitialCopy},
    },
    storage::ledger::LedgerError,
};

impl Member {
    /// When the initial copy begins, if it does by itself. Durable, so that a time that has come is not waited for
    /// again.
    pub(super) fn copy_due(&self) -> Result<Option<Timestamp>, LedgerError> {
        let setting = self.replication().initial_copy;
        let now = self.shared().clock.wall();
        match self.record().initial_copy {
            Some(known) if known.setting == setting => Ok(known.due),
            None if setting == InitialCopy::Now => Ok(setting.due(now)),
            _ => {
                let due = setting.due(now);
                self.change(|record| record.initial_copy = Some(CopyDue { setting, due }))?;
                Ok(due)
            }
        }
    }

    /// Remembers when the initial copy begins, whatever the configuration said. Called without a turn: whoever has it
    /// may wait for the replication thread, which calls this.
    pub(super) fn set_copy_due(&self, due: Option<Timestamp>) -> Result<(), LedgerError> {
        let setting = self.replication().initial_copy;
        self.change(|record| record.initial_copy = Some(CopyDue { setting, due }))
    }

    /// Takes in an initial copy that a portable disk brings. Other verbs do not wait for it.
    pub(super) fn import(&self, folder: &Path) -> Result<ImportReport, OperateError> {
        let (served, generation) = {
            let _turn = self.turn();
            let role = self.record().role;
            if role.part == Part::Primary {
                return Err(OperateError::NotNow(format!(
                    "machine {}: a portable copy is imported on the replica's host, and this host is {}",
                    self.name(),
                    role.describe()
                )));
            }
            (self.replica()?, role.generation)
        };
        served.import(folder, generation)
    }

    /// Begins an initial copy that waits.
    pub(super) fn copy_now(&self) -> Result<(), OperateError> {
        let _turn = self.turn();
        let (name, record) = (self.name(), self.record());
        let not_now = |why: String| Err(OperateError::NotNow(format!("machine {name}: {why}")));
        if record.role.part != Part::Primary {
            return not_now(format!(
                "the initial copy is begun on the primary, and this host is {}",
                record.role.describe()
            ));
        }
        if self.callee().is_none() {
            return not_now("it is not replicated".into());
        }
        if record.suspended.is_some() {
            return not_now(format!("it is suspended: `understudy resume {name}` first"));
        }
        let waits = initial_copy::waits(self.copy_due()?, self.shared().clock.wall());
        let serving = self.serving();
        if !waits || !serving.is_some_and(|serving| serving.primary.needs_copy()) {
            return not_now(
                "no initial copy waits: `understudy status` tells how the replica is".into(),
            );
        }
        self.set_copy_due(InitialCopy::Now.due(Timestamp::default()))?;
        self.arrange()?;
        tracing::info!(machine = %name, "the initial copy is due now, an operator says");
        Ok(())
    }
}
