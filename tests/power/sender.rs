//! The sender of a replica, which cuts, takes, merges, loses its link and loses answers while the guest writes.

use std::{sync::Arc, thread, time::Duration};

use understudy::{
    base::{
        ids::Lineage,
        units::{Epoch, MIB},
    },
    volume::{Machine, Piece, Reconcile, ReplicaHead, Side, Taken},
};

use super::{
    host::lineage,
    tape::{Entry, Tape},
};

/// How often it looks whether the guest wrote something.
const LOOKS_EVERY: Duration = Duration::from_millis(5);
/// Writes of the guest between two steps.
const WRITES: u64 = 6;

/// What becomes of an epoch that was cut.
#[derive(Clone, Copy, Debug)]
enum End {
    Acknowledged,
    AcknowledgementLost,
    Merged,
    LinkLost,
}

/// In this order, again and again.
const ENDS: [End; 6] = [
    End::Acknowledged,
    End::Merged,
    End::Acknowledged,
    End::AcknowledgementLost,
    End::Acknowledged,
    End::LinkLost,
];

/// See the [module](self).
pub(crate) struct Sender {
    machine: Arc<Machine>,
    tape: Arc<Tape>,
    /// Pieces of the log under way.
    log: Vec<Piece>,
    head: Lineage,
    turns: usize,
}

impl Sender {
    pub(crate) fn new(machine: &Arc<Machine>, tape: &Arc<Tape>, head: Lineage) -> Self {
        let mut sender = Self {
            machine: Arc::clone(machine),
            tape: Arc::clone(tape),
            log: Vec::new(),
            head,
            turns: 0,
        };
        sender.connect(Reconcile::InStep);
        sender
    }

    /// One epoch, to whatever end; between its steps the guest writes, unless it is `over`.
    pub(crate) fn turn(&mut self, over: &dyn Fn() -> bool) {
        let end = ENDS[self.turns % ENDS.len()];
        self.turns += 1;
        self.wait_for_writes(over);
        // The log of an epoch begins while it is open.
        self.take(Side::Open, self.machine.open_epoch(), 6);
        self.wait_for_writes(over);
        self.machine.maintain().unwrap();
        let epoch = self.cut();
        self.wait_for_writes(over);
        let merged = self.take(Side::Closing, epoch, 6);
        self.wait_for_writes(over);
        match end {
            // The guest had rewritten more than the side store takes: the log goes on as that of the next epoch.
            _ if merged => {}
            End::Merged => self.machine.merge(),
            End::LinkLost => self.connect(Reconcile::InStep),
            End::Acknowledged | End::AcknowledgementLost => self.send(epoch, end, over),
        }
    }

    /// The last epoch: the replica holds what the disk holds.
    pub(crate) fn finish(&mut self) {
        let epoch = self.cut();
        self.send(epoch, End::Acknowledged, &|| true);
    }

    fn cut(&self) -> Epoch {
        self.tape.note(Entry::Cutting);
        let cut = self.machine.cut().unwrap();
        self.tape.note(Entry::Cut);
        cut.epoch
    }

    /// Sends the rest of the epoch and its trailer, unless it was merged meanwhile.
    fn send(&mut self, epoch: Epoch, end: End, over: &dyn Fn() -> bool) {
        if self.take(Side::Closing, epoch, usize::MAX) {
            return;
        }
        let lineage = lineage(epoch);
        self.machine.pending(lineage).unwrap();
        let log = std::mem::take(&mut self.log);
        self.tape.note(Entry::Sent { lineage, log });
        self.wait_for_writes(over);
        self.tape.note(Entry::Held);
        self.head = lineage;
        match end {
            End::AcknowledgementLost => self.connect(Reconcile::AckLost),
            _ => self.machine.staged(lineage).unwrap(),
        }
    }

    /// A new connection.
    fn connect(&mut self, expected: Reconcile) {
        self.log.clear();
        self.machine.disconnected();
        let found = self.machine.reconcile(ReplicaHead::At(self.head)).unwrap();
        assert_eq!(found, expected);
    }

    /// Takes up to `count` pieces; whether the epoch is not there any more.
    fn take(&mut self, side: Side, epoch: Epoch, count: usize) -> bool {
        for _ in 0..count {
            match self.machine.take(side, epoch, MIB).unwrap() {
                Taken::Piece(piece) => self.log.push(piece),
                Taken::Drained => return false,
                Taken::Superseded => return true,
            }
        }
        false
    }

    fn wait_for_writes(&self, over: &dyn Fn() -> bool) {
        let writes = || self.machine.counters().guest_writes;
        let goal = writes() + WRITES;
        while writes() < goal && !over() {
            thread::sleep(LOOKS_EVERY);
        }
    }
}
