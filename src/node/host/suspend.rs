//! Suspending a machine's replication, and resuming it.
//!
//! # Crash contract
//! The wish is durable before anything follows from it, and every start arranges what the record says: a machine that is
//! suspended stays so over any death, and one that was resumed is replicated. What was under way when the link was closed
//! is staged on the replica, or merged as after a lost link; [`Primary::suspend`](crate::node::primary::Primary::suspend)
//! takes care of that. `tests/replicate/suspend.rs` kills the process in between.

use super::member::Member;
use crate::{
    coord::role::Part,
    node::{
        control::{OperateError, SuspendReport, SuspendRequest},
        sync_flush::SyncOnFlush,
    },
};

impl Member {
    /// Stops replicating until [`resume`](Self::resume), or until the machine plays another part.
    pub(super) fn suspend(&self, request: SuspendRequest) -> Result<SuspendReport, OperateError> {
        let _turn = self.turn();
        let (name, record) = (self.name(), self.record());
        let not_now = |why: String| Err(OperateError::NotNow(format!("machine {name}: {why}")));
        if record.role.part != Part::Primary {
            return not_now(format!(
                "replication is suspended on the primary, and this host is {}",
                record.role.describe()
            ));
        }
        if self.callee().is_none() {
            return not_now("it is not replicated".into());
        }
        let strict = self.replication().sync_on_flush == Some(SyncOnFlush::Strict);
        if record.suspended.is_none() && strict && !request.force {
            return not_now(
                "its guest's flushes wait for the replica (sync-on-flush strict), and would wait until it is resumed: \
                 --force if that is wanted"
                    .into(),
            );
        }
        let since = record
            .suspended
            .unwrap_or_else(|| self.shared().clock.wall());
        self.change(|record| record.suspended = Some(since))?;
        self.arrange()?;
        tracing::info!(machine = %name, %since, "suspended");
        Ok(SuspendReport { since: Some(since) })
    }

    /// Replicates again.
    pub(super) fn resume(&self) -> Result<SuspendReport, OperateError> {
        let _turn = self.turn();
        let (name, record) = (self.name(), self.record());
        if record.role.part != Part::Primary {
            return Err(OperateError::NotNow(format!(
                "machine {name}: replication is resumed on the primary, and this host is {}",
                record.role.describe()
            )));
        }
        if record.suspended.is_some() {
            self.change(|record| record.suspended = None)?;
            self.arrange()?;
            tracing::info!(machine = %name, "resumed");
        }
        Ok(SuspendReport {
            since: record.suspended,
        })
    }
}
