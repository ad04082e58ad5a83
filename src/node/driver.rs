//! The primary's replication thread: one for each machine that has a replica.
//!
//! ```text
//!   select: messages, commands, time  ->  Sender (decides)  ->  act: cut, take, pack, send, acknowledge
//! ```
//! The thread owns the conversation; only the link's tasks run beside it. It dials, talks until the link is lost, gives
//! what was under way back to the maps, waits and dials again. Guest writes never wait for any of this: they mark
//! their blocks and go on.

use std::{convert::Infallible, path::PathBuf, sync::Arc, thread, time::Duration};

use crossbeam_channel::{Receiver, Sender as ChannelSender, after, bounded, select, unbounded};
use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::watch};

use super::{
    call::{Callee, bring_back},
    control::{ExportReport, OperateError, VerifyRequest},
    conversation::{Conversation, End},
    initial_copy,
    pacing::Pacing,
    pipeline::Pipeline,
    portable::export::Export,
    progress::{Phase, Progress},
    sync_flush::Flushes,
    verify::Verifying,
};
use crate::{
    base::{
        chain::chain,
        clock::{Clock, Timestamp},
        ids::{Generation, Ids, Lineage, MachineId, Name},
        units::Epoch,
    },
    delta::{DiskEntry, Header, LogKind, policy::Setting},
    net::{self, Backoff, Control, Link},
    protocol::{
        claim::{Answer, Claim},
        message::{self, DiskSpec, Hello, Refusal, ToPrimary, Version},
        sender::{Pace, StopReason},
    },
    volume::{Machine, SavedVerification},
};

/// Owed bytes of the open epoch from which on they are sent ahead of the cut.
const AHEAD_BYTES: u64 = 16 << 20;
/// How often an idle machine says that its head is current.
const CURRENT_EVERY: Duration = Duration::from_secs(1);
/// First and longest pause between two dials.
const REDIAL: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// How long a suspension waits for what is under way to become durable.
const SUSPEND_WITHIN: Duration = Duration::from_secs(5);
/// Longest pause while only the peer's role is in the way: an operator waits for what comes of it.
const ROLES_AGAIN: Duration = Duration::from_secs(2);

/// Whom to replicate to, and how.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) callee: Callee,
    pub(super) interval: Duration,
    pub(super) compression: Setting,
    pub(super) pacing: Pacing,
    /// When the copy for a replica that has nothing begins, if it does by itself.
    pub(super) copy_due: Option<Timestamp>,
}

/// The machine as its replica should know it.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub(super) id: MachineId,
    pub(super) name: Name,
    pub(super) generation: Generation,
    /// Where the generation began, if it began on this host.
    pub(super) born: Option<Lineage>,
    pub(super) disks: Vec<DiskSpec>,
}

/// Waits for an answer to one command.
pub(super) type CutAnswer = ChannelSender<Result<Lineage, String>>;

/// Waits for a resync or a verification to begin.
pub(super) type BeginAnswer = ChannelSender<Result<(), String>>;

/// What the node asks of the thread.
pub(super) enum Command {
    Cut(CutAnswer),
    Resync(BeginAnswer),
    Verify(VerifyRequest, BeginAnswer),
    Export(Export),
    /// End as soon as nothing is under way.
    Suspend,
    Stop,
}

/// Why the thread has to end at once, whatever it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Halt {
    /// The machine is replicated in another way from now on, or not at all.
    Stop,
    /// An operator suspended it.
    Suspend,
}

/// How a pause ended.
enum Rested {
    Over,
    /// The thread has to end.
    Halted,
    Asked(Export),
}

/// What came over the link.
pub(super) enum Heard {
    Message(ToPrimary),
    Lost(String),
}

/// A running replication; it stops when this is dropped.
#[derive(Debug)]
pub(super) struct Replication {
    commands: ChannelSender<Command>,
    stop: watch::Sender<Option<Halt>>,
    /// Disconnected once the thread has ended.
    ended: Receiver<Infallible>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Replication {
    /// Starts the thread.
    pub(super) fn start(
        machine: Arc<Machine>,
        subject: Subject,
        target: Target,
        (progress, flushes): (Arc<Mutex<Progress>>, Option<Arc<Flushes>>),
        host: Host,
    ) -> std::io::Result<Self> {
        let (commands, receiver) = unbounded();
        let (stop, stopping) = watch::channel(None);
        let (ending, ended) = bounded(0);
        let thread = thread::Builder::new()
            .name("replicate".into())
            .spawn(move || {
                let driver = Driver {
                    machine,
                    subject,
                    target,
                    progress,
                    flushes,
                    host,
                    commands: receiver,
                    stopping,
                };
                driver.run();
                drop::<ChannelSender<Infallible>>(ending);
            })?;
        Ok(Self {
            commands,
            stop,
            ended,
            thread: Some(thread),
        })
    }

    /// Ends it for an operator who suspends the machine, and tells the replica. An epoch that is under way may become
    /// durable first; one that takes too long is merged, as after a lost link.
    pub(super) fn suspend(mut self) {
        let _ = self.commands.send(Command::Suspend);
        let _ = self.ended.recv_timeout(SUSPEND_WITHIN);
        self.halt(Halt::Suspend);
    }

    fn halt(&mut self, why: Halt) {
        if let Some(thread) = self.thread.take() {
            // Both fail only if the thread has ended already, and then it has said why.
            let _ = self.stop.send(Some(why));
            let _ = self.commands.send(Command::Stop);
            let _ = thread.join();
        }
    }

    /// Asks for a cut now; the answer comes when the epoch is durable on the replica.
    pub(super) fn request_cut(&self) -> Pending<Lineage> {
        self.request(Command::Cut)
    }

    /// Asks for a resync; the answer comes when it is durably begun, be there a link or not.
    pub(super) fn request_resync(&self) -> Pending<()> {
        self.request(Command::Resync)
    }

    /// Asks for an export of the initial copy; the answer comes when the file is there.
    pub(super) fn request_export(&self, folder: PathBuf) -> Pending<ExportReport, OperateError> {
        let (answer, answered) = bounded(1);
        let _ = self
            .commands
            .send(Command::Export(Export { folder, answer }));
        Pending(answered)
    }

    /// Asks for a verification; the answer comes when it is begun, be there a link or not.
    pub(super) fn request_verify(&self, request: VerifyRequest) -> Pending<()> {
        self.request(|answer| Command::Verify(request, answer))
    }

    fn request<T>(
        &self,
        command: impl FnOnce(ChannelSender<Result<T, String>>) -> Command,
    ) -> Pending<T> {
        let (answer, answered) = bounded(1);
        // If the thread has ended the answer is dropped, which the caller sees when it waits.
        let _ = self.commands.send(command(answer));
        Pending(answered)
    }
}

/// Something that was asked for.
#[derive(Debug)]
pub(super) struct Pending<T, E = String>(Receiver<Result<T, E>>);

impl<T, E> Pending<T, E> {
    /// Waits until it is done; nothing if the replication has ended meanwhile.
    pub(super) fn wait(self) -> Option<Result<T, E>> {
        self.0.recv().ok()
    }
}

impl Drop for Replication {
    fn drop(&mut self) {
        self.halt(Halt::Stop);
    }
}

/// Hears what the peer says of the roles. Returns at once.
pub(super) type Answered = Arc<dyn Fn(Answer) + Send + Sync>;

/// Remembers when the initial copy begins; nothing if it does not by itself.
pub(super) type SetCopyDue = Arc<dyn Fn(Option<Timestamp>) -> Result<(), String> + Send + Sync>;

/// What the node lends to the thread.
#[derive(Clone)]
pub(super) struct Host {
    pub(super) clock: Arc<dyn Clock>,
    pub(super) ids: Arc<dyn Ids>,
    pub(super) runtime: Handle,
    pub(super) answered: Answered,
    /// Remembers durably when the initial copy begins. Waits for nobody.
    pub(super) set_copy_due: SetCopyDue,
}

/// The replication thread's own.
pub(super) struct Driver {
    pub(super) machine: Arc<Machine>,
    pub(super) subject: Subject,
    pub(super) target: Target,
    pub(super) progress: Arc<Mutex<Progress>>,
    /// The guest's flushes, if they wait for the replica.
    pub(super) flushes: Option<Arc<Flushes>>,
    pub(super) host: Host,
    pub(super) commands: Receiver<Command>,
    stopping: watch::Receiver<Option<Halt>>,
}

impl Driver {
    fn run(mut self) {
        self.resume_verification();
        let mut backoff = Backoff::new(REDIAL.0, REDIAL.1);
        loop {
            let dialled = self.until_stopped(self.target.callee.dial());
            let Some(dialled) = dialled else { return };
            let why = match dialled {
                Ok((link, control)) => {
                    let (end, was_replicating) = self.session(&link, control);
                    if was_replicating {
                        backoff.reset();
                    }
                    match end {
                        End::Stop | End::Suspended => return,
                        End::Export(export) => {
                            if self.export(&export) {
                                return;
                            }
                            continue;
                        }
                        End::Lost(why) => {
                            self.progress.lock().phase = Phase::Unreachable(why.clone());
                            why
                        }
                        End::Refused(StopReason::Refused(Refusal::Role { answer })) => {
                            match self.unwelcome(answer) {
                                Ok(()) => continue,
                                Err(why) => {
                                    self.progress.lock().phase = Phase::Refused(why.clone());
                                    backoff.limit(ROLES_AGAIN);
                                    why
                                }
                            }
                        }
                        End::Refused(reason) => {
                            self.progress.lock().phase = Phase::Refused(reason.to_string());
                            reason.to_string()
                        }
                    }
                }
                Err(error) => {
                    let why = chain(&error);
                    self.progress.lock().phase = match error {
                        net::DialError::Refused { .. } => Phase::Refused(why.clone()),
                        _ => Phase::Unreachable(why.clone()),
                    };
                    why
                }
            };
            let random = self.host.ids.fresh();
            let pause = backoff.next(u32::from_le_bytes([
                random[0], random[1], random[2], random[3],
            ]));
            tracing::warn!(machine = %self.subject.name, retry_in = ?pause, "not replicating: {why}");
            match self.rest(pause, &why) {
                Rested::Halted => return,
                Rested::Asked(export) => {
                    if self.export(&export) {
                        return;
                    }
                }
                Rested::Over => {}
            }
        }
    }

    /// Begins the resync that an operator asked for. Not while an epoch is closing.
    pub(super) fn begin_demanded(&self) -> Result<(), String> {
        let begun = self.machine.demand_resync();
        begun.map_err(|error| chain(&error))?;
        self.progress
            .lock()
            .resync(&self.machine, &*self.host.clock);
        Ok(())
    }

    /// Begins a verification. It goes on whenever there is a link.
    pub(super) fn begin_verify(&self, request: VerifyRequest) -> Result<(), String> {
        let mut progress = self.progress.lock();
        if progress.verify.as_ref().is_some_and(Verifying::is_running) {
            return Err("a verification is under way already".into());
        }
        let blocks = self.machine.verification();
        let blocks = blocks.map_err(|error| chain(&error))?;
        let now = self.host.clock.monotonic();
        let mut verifying = Verifying::new(blocks, request, now);
        let saved = verifying.due_record(&self.machine, std::iter::empty(), now);
        progress.verify = Some(verifying);
        drop(progress);
        self.save_verification(saved.as_ref());
        Ok(())
    }

    /// Goes on with the verification that an earlier process began.
    fn resume_verification(&self) {
        let mut progress = self.progress.lock();
        if progress.verify.is_some() {
            return;
        }
        let now = self.host.clock.monotonic();
        match self.machine.saved_verification() {
            Ok(found) => {
                progress.verify =
                    found.map(|(saved, blocks)| Verifying::resumed(saved, blocks, now));
            }
            Err(error) => {
                tracing::warn!(machine = %self.subject.name, "the verification does not go on: {}", chain(&error));
            }
        }
    }

    /// Remembers the verification, or that there is none. Without it a restart compares more.
    pub(super) fn save_verification(&self, saved: Option<&SavedVerification>) {
        if let Err(error) = self.machine.save_verification(saved) {
            tracing::warn!(machine = %self.subject.name, "{}", chain(&error));
        }
    }

    /// The peer does not follow. Whether that is mended already: it was the primary before, and may follow now.
    fn unwelcome(&self, answer: Answer) -> Result<(), String> {
        let Subject {
            generation, born, ..
        } = self.subject;
        if answer != Answer::Diverged(generation) {
            (self.host.answered)(answer);
            return Err(answer.to_string());
        }
        let machine = &self.machine;
        let back = bring_back(
            &self.target.callee,
            machine,
            (generation, born),
            &*self.host.clock,
        );
        match self.until_stopped(back) {
            None => Err("the node is being stopped".into()),
            Some(Err(why)) => Err(format!("the former primary cannot follow yet: {why}")),
            Some(Ok(())) => Ok(()),
        }
    }

    /// Waits for `work`; nothing if the node is being stopped meanwhile.
    pub(super) fn until_stopped<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let mut stopping = self.stopping.clone();
        self.host.runtime.block_on(async {
            tokio::select! {
                _ = stopping.wait_for(Option::is_some) => None,
                done = work => Some(done),
            }
        })
    }

    /// Whether the copy for a replica that has nothing is not due yet.
    pub(super) fn waits_to_copy(&self) -> bool {
        initial_copy::waits(self.target.copy_due, self.host.clock.wall())
    }

    /// Why nothing is sent while the initial copy waits.
    pub(super) fn told_to_wait(&self) -> String {
        let (name, phase) = (&self.subject.name, Phase::CopyWaits(self.target.copy_due));
        let (_, why) = phase.state(false);
        format!("machine {name}: {}", why.unwrap_or_default())
    }

    /// Whether the thread has to end at once.
    pub(super) fn is_halted(&self) -> bool {
        self.stopping.borrow().is_some()
    }

    /// Whether the thread has to end at once because the machine is suspended.
    pub(super) fn is_suspended(&self) -> bool {
        *self.stopping.borrow() == Some(Halt::Suspend)
    }

    /// Waits for `pause`.
    fn rest(&self, pause: Duration, why: &str) -> Rested {
        let until = after(pause);
        loop {
            select! {
                recv(self.commands) -> command => match command {
                    Ok(Command::Cut(answer)) => {
                        let _ = answer.send(Err(format!("the replica cannot be reached: {why}")));
                    }
                    Ok(Command::Resync(answer)) => {
                        let _ = answer.send(self.begin_demanded());
                    }
                    Ok(Command::Verify(request, answer)) => {
                        let _ = answer.send(self.begin_verify(request));
                    }
                    Ok(Command::Export(export)) => match self.machine.lineage() {
                        Some(head) if head.epoch > Epoch::INITIAL => export.refuse(format!(
                            "machine {}: its replica held epoch {} when it was last seen; whether it needs a copy is known when it is back",
                            self.subject.name, head.epoch
                        )),
                        _ => return Rested::Asked(export),
                    },
                    Ok(Command::Suspend | Command::Stop) | Err(_) => return Rested::Halted,
                },
                recv(until) -> _ => return Rested::Over,
            }
        }
    }

    /// One link, from greeting to loss; and whether it came to replicating.
    fn session(&self, link: &Link, control: Control) -> (End, bool) {
        let (heard, ears) = unbounded();
        let Control {
            sender: mouth,
            receiver,
        } = control;
        let listener = self
            .host
            .runtime
            .spawn(listen(receiver, link.clone(), heard));
        let pipeline = match Pipeline::start(self.target.compression, workers(), &self.host.clock) {
            Ok(pipeline) => pipeline,
            Err(error) => {
                return (
                    End::Lost(format!("cannot start packing threads: {error}")),
                    false,
                );
            }
        };
        let pace = Pace {
            interval: self.target.interval,
            ahead_bytes: AHEAD_BYTES,
            current_every: CURRENT_EVERY,
        };
        let ended = Conversation::new(self, pace, link.clone(), mouth, ears, pipeline).run();
        listener.abort();
        ended
    }

    /// The header of a log that continues `parent`.
    pub(super) fn header(&self, kind: LogKind, parent: Option<Lineage>) -> Header {
        let disks = self.subject.disks.iter().map(|disk| DiskEntry {
            name: disk.name.clone(),
            size: disk.size,
            logical_sector: disk.logical_sector,
            physical_sector: disk.physical_sector,
        });
        Header {
            machine: self.subject.id,
            generation: self.subject.generation,
            kind,
            parent,
            disks: disks.collect(),
        }
    }

    pub(super) fn hello(&self) -> Hello {
        let Subject {
            id,
            name,
            generation,
            born,
            disks,
        } = self.subject.clone();
        Hello {
            version: Version::CURRENT,
            machine: id,
            name,
            claim: Claim {
                generation,
                active: true,
                born,
                wants: None,
            },
            disks,
        }
    }
}

/// Threads that pack.
pub(super) fn workers() -> u16 {
    let workers = thread::available_parallelism().map_or(1, |n| n.get().min(4));
    u16::try_from(workers).expect("at most four")
}

async fn listen(mut receiver: net::ControlReceiver, link: Link, heard: ChannelSender<Heard>) {
    loop {
        let next = match receiver.receive().await {
            Ok(Some(bytes)) => match message::decode_to_primary(&bytes) {
                Ok(message) => Heard::Message(message),
                Err(error) => Heard::Lost(chain(&error)),
            },
            Ok(None) => Heard::Lost(chain(&link.closed().await)),
            Err(error) => Heard::Lost(chain(&error)),
        };
        let last = matches!(next, Heard::Lost(_));
        if heard.send(next).is_err() || last {
            return;
        }
    }
}
