//! Sync-on-flush: a guest's flush is answered when everything acknowledged before it is durable in the replica's stage.
//!
//! ```text
//!   guest flush ── SyncDisk ── Volume: flush ── Flushes: a ticket ── wait ─────────────────────────┐
//!                                                   | wake                                         |
//!   replication thread: wanted? ── covers all tickets so far ── cut ── ... ── Staged: done ── answer
//! ```
//! Flushes that wait together *join*: a cut serves every ticket given out before it was made and none given out after, so
//! however many wait, there is at most one cut for them once the epoch under way is durable. A forced (FUA) write takes the
//! same way after it was written.
//!
//! # What it promises
//! In sync: no flush that was answered is missing on the replica. While the standing is not that, the status says so:
//! - *alone*: no replica holds a point of this generation (initial copy, uncommitted failover). Flushes do not wait.
//! - *away*: there is such a replica and no link. [`SyncOnFlush::Strict`] waits, [`SyncOnFlush::Available`] does not.
//! - *catching up*: the link is back and what was missed is being sent. The same.
//! - *in step*: flushes wait. In sync again as soon as those that did not wait before are on the replica as well.
//!
//! With [`SyncOnFlush::Available`] a flush waits no longer than [`AVAILABLE_WAIT_MAX`], whatever the link does.
//!
//! # Crash contract
//! The local flush comes first: a flush that is never answered has lost nothing that a flush without a replica would keep.
//! Tickets are memory only. After a restart every guest of before has had its answer or none, and a strict machine
//! whose replica holds a point begins *away*: no flush passes unsynced between the mount and the first link.
//!
//! # No deadlock
//! A waiting flush holds no lock of the machine. The shim holds its own for it, so whoever takes the disks away or makes them
//! read-only closes this (`Flushes::close`) first, and those that wait fail.

use std::{
    fmt, io,
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::{Condvar, Mutex, MutexGuard};
use serde::{Deserialize, Serialize};

use super::status::{SyncState, SyncStatus};
use crate::{
    base::{
        ids::Lineage,
        units::{Epoch, Extent},
    },
    coord::state::Health,
    disk::{Content, Disk, DiskError, Fua, Geometry, Space},
    volume::{Machine, Volume},
};

/// How long a flush waits for a replica that does not answer, with [`SyncOnFlush::Available`]. Longer than what a loaded
/// replica needs for an epoch, shorter than the 30 seconds after which guests begin to report a hung disk.
pub const AVAILABLE_WAIT_MAX: Duration = Duration::from_secs(5);

/// What becomes of a guest's flush while the replica cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SyncOnFlush {
    /// It waits until the replica is back: nothing that was flushed is ever on one host only.
    Strict,
    /// It is answered, and the status says that the machine is not in sync.
    Available,
}

impl fmt::Display for SyncOnFlush {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Strict => "strict",
            Self::Available => "available",
        })
    }
}

impl FromStr for SyncOnFlush {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "strict" => Ok(Self::Strict),
            "available" => Ok(Self::Available),
            _ => Err(format!("{text:?} is neither strict nor available")),
        }
    }
}

/// How the replica stands to the flushes of the guest; see the [module](self).
#[derive(Clone, Debug, PartialEq, Eq)]
enum Standing {
    Alone(String),
    Away(String),
    CatchingUp,
    InStep,
}

/// Number of a flush, in the order in which they ask. 0 is before the first.
type Ticket = u64;

#[derive(Debug)]
struct State {
    standing: Standing,
    /// Whether the replica holds a point of this generation, so that there is something to be in sync with.
    established: bool,
    /// Why no flush can be served any more.
    closed: Option<String>,
    /// The last ticket given out.
    asked: Ticket,
    /// The last ticket that the closing epoch serves; `done` while there is none. Never below `done`.
    covered: Ticket,
    /// The last ticket whose epoch is durable on the replica.
    done: Ticket,
    /// The last ticket that was answered without waiting.
    passed: Ticket,
    waiting: usize,
}

/// The flushes of one machine's guest, between its disks and its replication thread.
#[derive(Debug)]
pub(super) struct Flushes {
    policy: SyncOnFlush,
    available_wait: Duration,
    state: Mutex<State>,
    changed: Condvar,
    /// Full while the replication thread was woken and has not looked.
    wake: (Sender<()>, Receiver<()>),
}

impl Flushes {
    /// For a machine whose record has this head, in a generation that began at `born` if it began on this host.
    pub(super) fn new(policy: SyncOnFlush, head: Option<Lineage>, born: Option<Lineage>) -> Self {
        let established = head.is_some_and(|head| head.epoch > Epoch::INITIAL) && head != born;
        let standing = if established {
            Standing::Away("not connected yet".into())
        } else {
            Standing::Alone("no replica holds a point".into())
        };
        Self {
            policy,
            available_wait: AVAILABLE_WAIT_MAX,
            state: Mutex::new(State {
                standing,
                established,
                closed: None,
                asked: 0,
                covered: 0,
                done: 0,
                passed: 0,
                waiting: 0,
            }),
            changed: Condvar::new(),
            wake: bounded(1),
        }
    }

    /// Waits until what was acknowledged before this call is durable on the replica, as far as the policy asks for that.
    fn wait(&self) -> Result<(), DiskError> {
        let until = Instant::now() + self.available_wait;
        let mut state = self.state.lock();
        state.asked += 1;
        let ticket = state.asked;
        state.waiting += 1;
        let answer = loop {
            if let Some(why) = &state.closed {
                break Err(why.clone());
            }
            if state.done >= ticket {
                break Ok(());
            }
            if !self.holds(&state) {
                state.passed = state.passed.max(ticket);
                break Ok(());
            }
            // Full means that it was woken already.
            let _ = self.wake.0.try_send(());
            match self.policy {
                SyncOnFlush::Strict => self.changed.wait(&mut state),
                SyncOnFlush::Available => {
                    let late = self.changed.wait_until(&mut state, until).timed_out();
                    if late && state.done < ticket && state.standing == Standing::InStep {
                        let limit = self.available_wait;
                        let why = format!("the replica did not answer a flush within {limit:?}");
                        self.turn(&mut state, Standing::Away(why));
                    }
                }
            }
        };
        state.waiting -= 1;
        drop(state);
        answer.map_err(|why| DiskError::Io {
            operation: "flush",
            offset: 0,
            source: io::Error::other(format!("sync-on-flush: {why}")),
        })
    }

    /// Whether flushes wait.
    fn holds(&self, state: &State) -> bool {
        match state.standing {
            Standing::Alone(_) => false,
            Standing::Away(_) | Standing::CatchingUp => self.policy == SyncOnFlush::Strict,
            Standing::InStep => true,
        }
    }

    /// A flush asked for a cut.
    pub(super) fn asked(&self) -> &Receiver<()> {
        &self.wake.1
    }

    /// Whether a cut is needed now, for a flush or to prove that nothing is missing.
    pub(super) fn want_cut(&self) -> bool {
        let state = self.state.lock();
        state.asked > state.covered && !matches!(state.standing, Standing::Alone(_))
    }

    /// A cut is about to be made: it serves everybody who has asked.
    pub(super) fn cutting(&self) {
        let mut state = self.state.lock();
        state.covered = state.asked;
    }

    /// That cut was not made, or its epoch was merged: a later one serves them.
    pub(super) fn merged(&self) {
        let mut state = self.state.lock();
        state.covered = state.done;
    }

    /// The epoch of the last cut is durable on the replica.
    pub(super) fn durable(&self) {
        let mut state = self.state.lock();
        state.done = state.covered;
        state.established = true;
        self.turn(&mut state, Standing::InStep);
    }

    /// A link stands and the heads were compared. `complete`: the replica has a recovery point.
    pub(super) fn linked(&self, complete: bool) {
        let mut state = self.state.lock();
        state.covered = state.done;
        let standing = if complete {
            // The link asks as well: in sync is proved by a cut, be it of nothing.
            state.asked += 1;
            Standing::CatchingUp
        } else {
            state.established = false;
            Standing::Alone("the initial copy is not complete".into())
        };
        self.turn(&mut state, standing);
    }

    /// The link is gone.
    pub(super) fn unlinked(&self, why: &str) {
        let mut state = self.state.lock();
        state.covered = state.done;
        let standing = if state.established {
            Standing::Away(why.to_owned())
        } else {
            Standing::Alone("no replica holds a point".into())
        };
        self.turn(&mut state, standing);
    }

    /// The machine is not replicated any more.
    pub(super) fn alone(&self) {
        let mut state = self.state.lock();
        self.turn(
            &mut state,
            Standing::Alone("the machine is not replicated".into()),
        );
    }

    /// Those who wait fail, and so does everybody who comes, until [`Flushes::open`].
    pub(super) fn close(&self, why: &str) {
        self.state.lock().closed = Some(why.to_owned());
        self.changed.notify_all();
    }

    /// Flushes are served again.
    pub(super) fn open(&self) {
        self.state.lock().closed = None;
    }

    fn turn(&self, state: &mut MutexGuard<'_, State>, standing: Standing) {
        if state.standing != standing {
            tracing::info!(policy = %self.policy, ?standing, "sync-on-flush");
            state.standing = standing;
        }
        self.changed.notify_all();
    }

    /// What there is to tell, and what it means for the health where it is not as promised.
    pub(super) fn status(&self) -> (SyncStatus, Option<(Health, String)>) {
        let state = self.state.lock();
        let (sync, remark) = match &state.standing {
            Standing::InStep if state.passed <= state.done => (SyncState::InSync, None),
            Standing::InStep | Standing::CatchingUp => {
                let why = "what was missed is being sent".to_owned();
                (SyncState::CatchingUp, Some((Health::Warning, why)))
            }
            Standing::Away(why) if self.policy == SyncOnFlush::Strict => {
                let why = format!("the guest's flushes wait for the replica: {why}");
                (SyncState::Away, Some((Health::Critical, why)))
            }
            Standing::Away(why) => {
                let why = format!("the guest's flushes do not wait for the replica: {why}");
                (SyncState::Away, Some((Health::Warning, why)))
            }
            Standing::Alone(why) => {
                let why = format!("there is nothing to be in sync with: {why}");
                (SyncState::Alone, Some((Health::Warning, why)))
            }
        };
        let status = SyncStatus {
            policy: self.policy,
            state: sync,
            waiting: state.waiting,
        };
        let remark = remark.map(|(health, why)| (health, format!("sync-on-flush: {why}")));
        (status, remark)
    }
}

/// A volume whose flushes and forced writes wait for the replica.
#[derive(Debug)]
pub(super) struct SyncDisk {
    pub(super) volume: Arc<Volume>,
    pub(super) machine: Arc<Machine>,
    pub(super) flushes: Arc<Flushes>,
}

impl SyncDisk {
    /// Everything acknowledged on this host is durable here; now there as well.
    fn confirm(&self) -> Result<(), DiskError> {
        // An idle guest flushes too. The first look spares the second one's lock where something was written.
        let counters = self.machine.counters();
        let unchanged = counters.open_blocks == 0 && counters.closing_blocks == 0;
        if unchanged && self.machine.at_rest().is_some() {
            return Ok(());
        }
        self.flushes.wait()
    }

    fn confirm_if(&self, fua: Fua) -> Result<(), DiskError> {
        match fua {
            Fua::Yes => self.confirm(),
            Fua::No => Ok(()),
        }
    }
}

impl Disk for SyncDisk {
    fn geometry(&self) -> Geometry {
        self.volume.geometry()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.volume.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> Result<(), DiskError> {
        self.volume.write_at(offset, buf, fua)?;
        self.confirm_if(fua)
    }

    fn zero(&self, run: Extent, space: Space, fua: Fua) -> Result<(), DiskError> {
        self.volume.zero(run, space, fua)?;
        self.confirm_if(fua)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.volume.flush()?;
        self.confirm()
    }

    fn run_at(&self, offset: u64) -> Result<(Extent, Content), DiskError> {
        self.volume.run_at(offset)
    }

    fn close(&self) -> Result<(), DiskError> {
        self.volume.close()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::base::checksum::Digest;

    fn head(epoch: u64) -> Lineage {
        Lineage {
            epoch: Epoch(epoch),
            chain: Digest::default(),
        }
    }

    /// Linked, and in step.
    fn in_step(policy: SyncOnFlush) -> Flushes {
        let flushes = Flushes::new(policy, Some(head(7)), None);
        flushes.linked(true);
        assert!(flushes.want_cut(), "in sync is proved");
        epoch(&flushes);
        assert_eq!(flushes.status().0.state, SyncState::InSync);
        flushes
    }

    fn epoch(flushes: &Flushes) {
        flushes.cutting();
        flushes.durable();
    }

    fn until_waiting(flushes: &Flushes, count: usize) {
        while flushes.status().0.waiting != count {
            thread::yield_now();
        }
    }

    fn state(flushes: &Flushes) -> (SyncState, Option<Health>) {
        let (status, remark) = flushes.status();
        (status.state, remark.map(|(health, _)| health))
    }

    #[test]
    fn a_cut_serves_all_who_asked_before_it_and_none_who_asked_after() {
        let flushes = in_step(SyncOnFlush::Strict);
        assert!(!flushes.want_cut());
        thread::scope(|scope| {
            let early = [(); 3].map(|()| scope.spawn(|| flushes.wait()));
            until_waiting(&flushes, 3);
            assert!(flushes.want_cut());
            flushes.cutting();
            assert!(!flushes.want_cut(), "one cut for all of them");
            let late = scope.spawn(|| flushes.wait());
            until_waiting(&flushes, 4);
            assert!(flushes.want_cut());
            flushes.durable();
            for flush in early {
                flush.join().unwrap().unwrap();
            }
            until_waiting(&flushes, 1);
            assert!(!late.is_finished());
            flushes.cutting();
            flushes.merged();
            assert!(flushes.want_cut(), "a merged epoch serves nobody");
            epoch(&flushes);
            late.join().unwrap().unwrap();
        });
    }

    #[test]
    fn strict_flushes_outwait_the_link_and_fail_when_the_disks_go() {
        let flushes = in_step(SyncOnFlush::Strict);
        thread::scope(|scope| {
            let flush = scope.spawn(|| flushes.wait());
            until_waiting(&flushes, 1);
            flushes.cutting();
            flushes.unlinked("gone");
            assert_eq!(state(&flushes), (SyncState::Away, Some(Health::Critical)));
            flushes.linked(true);
            assert!(flushes.want_cut(), "the cut went with the link");
            epoch(&flushes);
            flush.join().unwrap().unwrap();

            flushes.unlinked("gone again");
            let flush = scope.spawn(|| flushes.wait());
            until_waiting(&flushes, 1);
            flushes.close("fenced");
            flush.join().unwrap().unwrap_err();
            flushes.wait().unwrap_err();
        });
        flushes.open();
        flushes.alone();
        flushes.wait().unwrap();
    }

    #[test]
    fn available_is_in_sync_again_when_what_passed_is_durable() {
        let flushes = in_step(SyncOnFlush::Available);
        thread::scope(|scope| {
            let flush = scope.spawn(|| flushes.wait());
            until_waiting(&flushes, 1);
            flushes.unlinked("gone");
            flush.join().unwrap().unwrap();
        });
        assert_eq!(state(&flushes), (SyncState::Away, Some(Health::Warning)));
        flushes.wait().unwrap();
        flushes.linked(true);
        flushes.cutting();
        flushes.wait().unwrap();
        flushes.durable();
        let behind = (SyncState::CatchingUp, Some(Health::Warning));
        assert_eq!(state(&flushes), behind, "one passed after the cut");
        assert!(flushes.want_cut());
        epoch(&flushes);
        assert_eq!(state(&flushes), (SyncState::InSync, None));
    }

    #[test]
    fn available_waits_for_a_silent_replica_so_long_and_no_longer() {
        let mut flushes = in_step(SyncOnFlush::Available);
        flushes.available_wait = Duration::ZERO;
        flushes.wait().unwrap();
        assert_eq!(state(&flushes), (SyncState::Away, Some(Health::Warning)));
        assert!(flushes.want_cut(), "the link may stand all the same");
        epoch(&flushes);
        assert_eq!(state(&flushes), (SyncState::InSync, None));
    }

    #[test]
    fn without_a_point_of_this_generation_nothing_waits() {
        for (head, born) in [
            (None, None),
            (Some(head(0)), None),
            (Some(head(9)), Some(head(9))),
        ] {
            let flushes = Flushes::new(SyncOnFlush::Strict, head, born);
            flushes.wait().unwrap();
            assert_eq!(state(&flushes), (SyncState::Alone, Some(Health::Warning)));
            flushes.unlinked("gone");
            flushes.wait().unwrap();
            flushes.linked(false);
            assert!(!flushes.want_cut());
            flushes.wait().unwrap();
            epoch(&flushes);
            assert_eq!(state(&flushes), (SyncState::InSync, None));
        }
        let restarted = Flushes::new(SyncOnFlush::Strict, Some(head(9)), Some(head(5)));
        assert_eq!(state(&restarted), (SyncState::Away, Some(Health::Critical)));
    }
}
