//! The primary's side of the conversation: when to copy, cut, drain and seal.
//!
//! ```text
//!             connected            Welcome                    drained         Staged(0)
//!   Offline ------------> Greeting ---------> Copying ------------> Sealed -----------+
//!      ^                     |     (replica has nothing, or an unknown past)          |
//!      |                     |                                                        v
//!      |  disconnected       +--------------------------------------------------->  Open <----------+
//!      +--- (any phase)            (heads agree)                  interval over:      | cut         | Staged(N)
//!                                                                 something changed   v   drained   |
//!                                                                                  Closing ------> Sealed
//!                                                                       merge: back to Open
//! ```
//!
//! The sender owns no bytes and no clock. The driver performs what [`Sender::poll`] asks for, takes owed blocks from
//! the side that [`Sender::side`] names, and reports what happened. Whatever the order of events, two things hold: a
//! log is only opened when none is open, and an epoch is only acknowledged to the maps by a `Staged` that names the
//! lineage that was sealed.
//!
//! # Sifting
//! Blocks that may differ although nobody wrote them are *suspects*. As long as there are some the phase stays Open: the
//! driver asks the replica about them ([`Sender::may_ask`]), at most [`QUESTIONS_MAX`] questions at a time, and no epoch
//! is cut, because it would make a point that the machine was never in. Everything else goes on, above all sending ahead.

use std::{collections::VecDeque, time::Duration};

use super::{
    compare::{Differing, QUESTIONS_MAX},
    message::{Head, Refusal, ToPrimary, ToReplica, Version},
};
use crate::base::{clock::Timestamp, ids::Lineage, limits::FRAME_BYTES_MAX, units::Epoch};

/// Which epoch's blocks are taken next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The epoch that was cut: content as of its cut.
    Closing,
    /// The epoch that is still open: current content, sent ahead. What is rewritten later is owed again.
    Open,
}

/// What kind of log is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Log {
    /// Epoch 0, applied in place by the replica.
    InitialCopy,
    /// A later epoch, staged by the replica.
    Delta,
}

/// How the machine's own records fit the replica's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agreement {
    /// The replica holds what this machine knows it holds: changes are enough.
    InStep,
    /// It does not: everything allocated has to be sent.
    CopyNeeded,
}

/// What the driver has to do now, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Say this on the control stream.
    Say(ToReplica),
    /// Compare the replica's head with the machine's records and report [`Sender::agreed`].
    Compare(Head),
    /// Open a log.
    OpenLog(Log),
    /// Cut the machine and report [`Sender::was_cut`] or [`Sender::merged`].
    Cut,
    /// Everything owed was taken: send what is in flight, then the trailer, and report [`Sender::sealed`].
    Seal,
    /// The first frames of the initial copy's log are durable there.
    Copied(u64),
    /// The oldest question on the way is answered; with nothing if its point is gone.
    Answered(Option<Differing>),
    /// The epoch is durable there: clear the closing maps.
    Acknowledge(Lineage),
    /// The conversation is over for this reason; connecting again will not help by itself.
    Stop(StopReason),
}

/// Why a sender gave up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StopReason {
    /// The replica said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The replica broke the rules of the conversation.
    #[error("the replica broke the protocol: {0}")]
    Protocol(&'static str),
}

/// What the driver sees of the machine as time passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Whether any block is marked in the open epoch.
    pub changed: bool,
    /// Whether any of them is a suspect, or was asked about and not answered.
    pub suspects: bool,
}

/// When epochs end.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Time from one cut to the next, if something changed.
    pub interval: Duration,
    /// Owed bytes of the open epoch from which on they are sent ahead. Below, rewrites of a block before the cut cost
    /// nothing; above, waiting for the cut would only lengthen the time the epoch needs afterwards.
    pub ahead_bytes: u64,
    /// How often an idle machine tells the replica that its head is current.
    pub current_every: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Offline,
    Greeting,
    Comparing,
    Copying,
    Open { log: bool },
    Cutting,
    Closing,
    Sealing,
    Sealed(Lineage),
    Stopped,
}

/// The primary's half of one machine's conversation.
#[derive(Debug)]
pub struct Sender {
    pace: Pace,
    phase: Phase,
    actions: VecDeque<Action>,
    granted: u64,
    sent: u64,
    /// Monotonic time of the last cut, or of the start.
    last_cut: Duration,
    last_current: Duration,
    cut_wanted: bool,
    /// Questions asked and answered on this connection.
    asked: u64,
    answered: u64,
}

impl Sender {
    /// A sender without a connection.
    pub fn new(pace: Pace) -> Self {
        Self {
            pace,
            phase: Phase::Offline,
            actions: VecDeque::new(),
            granted: 0,
            sent: 0,
            last_cut: Duration::ZERO,
            last_current: Duration::ZERO,
            cut_wanted: false,
            asked: 0,
            answered: 0,
        }
    }

    /// A connection stands; the driver has said or will say `hello` first.
    pub fn connected(&mut self, hello: super::message::Hello) {
        assert_eq!(self.phase, Phase::Offline, "one connection at a time");
        self.phase = Phase::Greeting;
        self.granted = 0;
        self.sent = 0;
        self.asked = 0;
        self.answered = 0;
        self.actions.push_back(Action::Say(ToReplica::Hello(hello)));
    }

    /// The connection is gone. The driver gives the blocks of an unfinished log back to the maps.
    pub fn disconnected(&mut self) {
        self.actions.clear();
        if self.phase != Phase::Stopped {
            self.phase = Phase::Offline;
        }
    }

    /// Cut as soon as possible, whatever the interval says.
    pub fn want_cut(&mut self) {
        self.cut_wanted = true;
    }

    /// The replica said something.
    pub fn message(&mut self, message: ToPrimary) {
        match (message, self.phase) {
            (ToPrimary::Refused(refusal), _) => self.stop(refusal.into()),
            (
                ToPrimary::Welcome {
                    version,
                    head,
                    granted,
                    ..
                },
                Phase::Greeting,
            ) => {
                if version == Version::CURRENT {
                    self.granted = granted;
                    // Only a cut, even of an epoch in which nothing changed, makes it a state the machine was ever in.
                    self.cut_wanted |= matches!(head, Head::Copied(_));
                    self.phase = Phase::Comparing;
                    self.actions.push_back(Action::Compare(head));
                } else {
                    self.stop(Refusal::Version { theirs: version }.into());
                }
            }
            (_, Phase::Greeting | Phase::Offline | Phase::Comparing) => {
                self.stop(StopReason::Protocol("a message before the welcome"));
            }
            (ToPrimary::Welcome { .. }, _) => self.stop(StopReason::Protocol("a second welcome")),
            (ToPrimary::Compared { number, differs }, _)
                if self.answered < self.asked && number == self.answered + 1 =>
            {
                self.answered = number;
                self.actions.push_back(Action::Answered(differs));
            }
            (
                ToPrimary::Compared { .. }
                | ToPrimary::TookOver { .. }
                | ToPrimary::Differs { .. }
                | ToPrimary::DiffersEnd
                | ToPrimary::Returned,
                _,
            ) => self.stop(StopReason::Protocol(
                "the answer to a question that was not asked",
            )),
            (ToPrimary::Granted { bytes }, _) => self.granted = self.granted.max(bytes),
            (ToPrimary::Copied { frames }, _) => self.actions.push_back(Action::Copied(frames)),
            (ToPrimary::Staged { lineage }, Phase::Sealed(sealed)) if lineage == sealed => {
                self.cut_wanted |= is_fuzzy(lineage);
                self.phase = Phase::Open { log: false };
                self.actions.push_back(Action::Acknowledge(lineage));
            }
            (ToPrimary::Staged { .. }, _) => {
                self.stop(StopReason::Protocol("an epoch staged that was not sealed"));
            }
        }
    }

    /// The answer to [`Action::Compare`].
    pub fn agreed(&mut self, agreement: Agreement) {
        assert_eq!(
            self.phase,
            Phase::Comparing,
            "agreement follows a comparison"
        );
        self.phase = match agreement {
            Agreement::InStep => Phase::Open { log: false },
            Agreement::CopyNeeded => {
                self.actions.push_back(Action::OpenLog(Log::InitialCopy));
                Phase::Copying
            }
        };
    }

    /// The machine was cut.
    pub fn was_cut(&mut self, now: Duration) {
        assert_eq!(
            self.phase,
            Phase::Cutting,
            "only a cut that was asked for is reported"
        );
        self.phase = Phase::Closing;
        self.last_cut = now;
        self.cut_wanted = false;
    }

    /// The closing epoch was merged into the open one (the side store was full): the log goes on, the cut comes later.
    pub fn merged(&mut self) {
        if matches!(self.phase, Phase::Closing | Phase::Cutting) {
            self.phase = Phase::Open { log: true };
        }
    }

    /// `take` found nothing more owed on `side`.
    pub fn drained(&mut self, side: Side) {
        if side == Side::Closing && matches!(self.phase, Phase::Copying | Phase::Closing) {
            self.phase = Phase::Sealing;
            self.actions.push_back(Action::Seal);
        }
    }

    /// The trailer of `lineage` was sent.
    pub fn sealed(&mut self, lineage: Lineage) {
        assert_eq!(
            self.phase,
            Phase::Sealing,
            "a trailer follows a drained epoch"
        );
        self.phase = Phase::Sealed(lineage);
    }

    /// Log bytes were handed to the connection.
    pub fn sent(&mut self, bytes: u64) {
        self.sent += bytes;
    }

    /// The side to take owed blocks from, if there is credit and a log for it. `owed_open` is the number of bytes owed
    /// of the open epoch.
    pub fn side(&self, owed_open: u64) -> Option<Side> {
        if self.granted.saturating_sub(self.sent) < FRAME_BYTES_MAX {
            return None;
        }
        match self.phase {
            Phase::Copying | Phase::Closing => Some(Side::Closing),
            Phase::Open { log: true } if owed_open >= self.pace.ahead_bytes => Some(Side::Open),
            _ => None,
        }
    }

    /// Whether a question may be asked now.
    pub fn may_ask(&self) -> bool {
        self.is_replicating() && !self.is_copying() && self.asked - self.answered < QUESTIONS_MAX
    }

    /// A question is asked; its number.
    pub fn ask(&mut self) -> u64 {
        self.asked += 1;
        self.asked
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Duration, wall: Timestamp, seen: Seen) {
        let Phase::Open { log } = self.phase else {
            return;
        };
        if !seen.changed && !self.cut_wanted {
            if now.saturating_sub(self.last_current) >= self.pace.current_every {
                self.last_current = now;
                self.actions
                    .push_back(Action::Say(ToReplica::Current { at: wall }));
            }
            return;
        }
        if !log {
            self.actions.push_back(Action::OpenLog(Log::Delta));
            self.phase = Phase::Open { log: true };
        }
        if seen.suspects {
            return;
        }
        if self.cut_wanted || now.saturating_sub(self.last_cut) >= self.pace.interval {
            self.actions.push_back(Action::Cut);
            self.phase = Phase::Cutting;
        }
    }

    /// What to do next.
    pub fn poll(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Whether no epoch is closing, and none is being copied.
    pub fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open { .. })
    }

    /// Whether an epoch was cut or its copy was sealed, and it is not durable on the replica yet.
    pub fn is_closing(&self) -> bool {
        matches!(
            self.phase,
            Phase::Cutting | Phase::Closing | Phase::Sealing | Phase::Sealed(_)
        )
    }

    /// Whether the initial copy is running.
    pub fn is_copying(&self) -> bool {
        self.phase == Phase::Copying
    }

    /// Whether a connection stands and the heads were compared.
    pub fn is_replicating(&self) -> bool {
        !matches!(
            self.phase,
            Phase::Offline | Phase::Greeting | Phase::Comparing | Phase::Stopped
        )
    }

    fn stop(&mut self, reason: StopReason) {
        self.phase = Phase::Stopped;
        self.actions.clear();
        self.actions.push_back(Action::Stop(reason));
    }
}

/// Whether a head is the initial copy alone, whose blocks were read at different times.
fn is_fuzzy(lineage: Lineage) -> bool {
    lineage.epoch == Epoch::INITIAL
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{base::checksum::Digest, protocol::message::tests::hello};

    const SECOND: Duration = Duration::from_secs(1);
    const UNCHANGED: Seen = Seen {
        changed: false,
        suspects: false,
    };
    const CHANGED: Seen = Seen {
        changed: true,
        ..UNCHANGED
    };

    fn lineage(epoch: u64) -> Lineage {
        Lineage {
            epoch: Epoch(epoch),
            chain: Digest([1; 32]),
        }
    }

    fn actions(sender: &mut Sender) -> Vec<Action> {
        std::iter::from_fn(|| sender.poll()).collect()
    }

    fn open() -> Sender {
        let mut sender = Sender::new(Pace {
            interval: SECOND,
            ahead_bytes: 4 << 20,
            current_every: 5 * SECOND,
        });
        sender.connected(hello());
        let head = Head::Complete(lineage(7));
        sender.message(ToPrimary::Welcome {
            version: Version::CURRENT,
            follows: hello().claim.generation,
            head,
            granted: 64 << 20,
        });
        assert_eq!(actions(&mut sender).last(), Some(&Action::Compare(head)));
        sender.agreed(Agreement::InStep);
        sender
    }

    #[test]
    fn an_epoch_goes_round() {
        let mut sender = open();
        sender.tick(SECOND / 2, Timestamp(0), CHANGED);
        assert_eq!(actions(&mut sender), [Action::OpenLog(Log::Delta)]);
        assert_eq!(
            sender.side(1 << 20),
            None,
            "small changes wait for the cut and fold"
        );
        assert_eq!(
            sender.side(8 << 20),
            Some(Side::Open),
            "large ones are sent ahead"
        );
        sender.tick(SECOND, Timestamp(0), CHANGED);
        assert_eq!(actions(&mut sender), [Action::Cut]);
        sender.was_cut(SECOND);
        assert_eq!(sender.side(0), Some(Side::Closing));
        sender.drained(Side::Closing);
        assert_eq!(actions(&mut sender), [Action::Seal]);
        sender.sealed(lineage(8));
        assert_eq!(
            sender.side(1 << 30),
            None,
            "no log is open while the replica makes the epoch durable"
        );
        sender.message(ToPrimary::Staged {
            lineage: lineage(8),
        });
        assert_eq!(actions(&mut sender), [Action::Acknowledge(lineage(8))]);
        sender.tick(SECOND * 3 / 2, Timestamp(0), CHANGED);
        assert_eq!(actions(&mut sender), [Action::OpenLog(Log::Delta)]);
    }

    #[test]
    fn a_merge_goes_on_in_the_same_log() {
        let mut sender = open();
        sender.tick(SECOND, Timestamp(0), CHANGED);
        assert_eq!(
            actions(&mut sender),
            [Action::OpenLog(Log::Delta), Action::Cut]
        );
        sender.was_cut(SECOND);
        sender.merged();
        sender.tick(2 * SECOND, Timestamp(0), CHANGED);
        assert_eq!(actions(&mut sender), [Action::Cut], "the log is still open");
    }

    #[test]
    fn an_idle_machine_says_so_and_cuts_only_when_asked() {
        let mut sender = open();
        sender.tick(9 * SECOND, Timestamp(9), UNCHANGED);
        assert_eq!(
            actions(&mut sender),
            [Action::Say(ToReplica::Current { at: Timestamp(9) })]
        );
        sender.tick(10 * SECOND, Timestamp(10), UNCHANGED);
        assert_eq!(actions(&mut sender), []);
        sender.want_cut();
        sender.tick(10 * SECOND, Timestamp(10), UNCHANGED);
        assert_eq!(
            actions(&mut sender),
            [Action::OpenLog(Log::Delta), Action::Cut]
        );
    }

    #[test]
    fn the_initial_copy_is_followed_by_a_cut_although_nothing_changed() {
        let mut sender = Sender::new(Pace {
            interval: SECOND,
            ahead_bytes: 0,
            current_every: SECOND,
        });
        sender.connected(hello());
        sender.message(ToPrimary::Welcome {
            version: Version::CURRENT,
            follows: hello().claim.generation,
            head: Head::Empty,
            granted: 64 << 20,
        });
        sender.agreed(Agreement::CopyNeeded);
        assert_eq!(sender.side(0), Some(Side::Closing));
        sender.drained(Side::Closing);
        sender.sealed(lineage(0));
        actions(&mut sender);
        sender.message(ToPrimary::Staged {
            lineage: lineage(0),
        });
        sender.tick(SECOND / 10, Timestamp(0), UNCHANGED);
        let cut = [
            Action::Acknowledge(lineage(0)),
            Action::OpenLog(Log::Delta),
            Action::Cut,
        ];
        assert_eq!(actions(&mut sender), cut);
    }

    #[test]
    fn no_epoch_is_cut_while_there_are_suspects() {
        let mut sender = open();
        let suspects = Seen {
            suspects: true,
            ..CHANGED
        };
        sender.want_cut();
        sender.tick(9 * SECOND, Timestamp(0), suspects);
        assert_eq!(actions(&mut sender), [Action::OpenLog(Log::Delta)]);
        assert_eq!(
            sender.side(8 << 20),
            Some(Side::Open),
            "what differs is sent meanwhile"
        );
        for number in 1..=QUESTIONS_MAX {
            assert!(sender.may_ask());
            assert_eq!(sender.ask(), number);
        }
        assert!(!sender.may_ask(), "a bounded number is on the way");
        let answer = |number| ToPrimary::Compared {
            number,
            differs: Some(Differing::default()),
        };
        sender.message(answer(1));
        assert_eq!(
            actions(&mut sender),
            [Action::Answered(Some(Differing::default()))]
        );
        assert!(sender.may_ask());
        sender.tick(10 * SECOND, Timestamp(0), CHANGED);
        assert_eq!(actions(&mut sender), [Action::Cut], "all are sifted");
        sender.was_cut(10 * SECOND);
        assert!(sender.may_ask(), "a verification goes on beside epochs");
        // Out of turn.
        sender.message(answer(3));
        assert!(matches!(actions(&mut sender)[..], [Action::Stop(_)]));
    }

    #[test]
    fn nothing_is_taken_beyond_the_grant() {
        let mut sender = open();
        sender.tick(SECOND, Timestamp(0), CHANGED);
        sender.was_cut(SECOND);
        sender.sent(63 << 20);
        assert_eq!(sender.side(0), Some(Side::Closing));
        sender.sent(1);
        assert_eq!(sender.side(0), None);
        sender.message(ToPrimary::Granted { bytes: 65 << 20 });
        assert_eq!(sender.side(0), Some(Side::Closing));
        sender.message(ToPrimary::Granted { bytes: 1 });
        assert_eq!(
            sender.side(0),
            Some(Side::Closing),
            "a grant is never taken back"
        );
    }

    #[test]
    fn a_replica_that_breaks_the_rules_is_left() {
        for (message, why) in [
            (
                ToPrimary::Staged {
                    lineage: lineage(8),
                },
                "an epoch staged that was not sealed",
            ),
            (
                ToPrimary::Welcome {
                    version: Version::CURRENT,
                    follows: hello().claim.generation,
                    head: Head::Empty,
                    granted: 0,
                },
                "a second welcome",
            ),
            (
                ToPrimary::Compared {
                    number: 1,
                    differs: None,
                },
                "the answer to a question that was not asked",
            ),
        ] {
            let mut sender = open();
            sender.message(message);
            assert_eq!(
                actions(&mut sender),
                [Action::Stop(StopReason::Protocol(why))]
            );
            assert_eq!(sender.side(1 << 30), None);
        }
        let mut sender = open();
        sender.tick(SECOND, Timestamp(0), CHANGED);
        sender.was_cut(SECOND);
        sender.drained(Side::Closing);
        sender.sealed(lineage(8));
        let other = Lineage {
            epoch: Epoch(8),
            chain: Digest([2; 32]),
        };
        actions(&mut sender);
        sender.message(ToPrimary::Staged { lineage: other });
        assert!(
            matches!(actions(&mut sender)[..], [Action::Stop(_)]),
            "another chain is another history"
        );
    }
}
