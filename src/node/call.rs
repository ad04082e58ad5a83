//! Short calls to a peer about roles, each on a link of its own: a question, its answers, the end.
//!
//! What is said here changes who writes a machine's disks. So nothing is said before it is durable on this side, and
//! every question may be asked again: an answer that got lost changes nothing.

use std::time::Duration;

use crate::{
    base::{
        chain::chain,
        clock::Clock,
        ids::{Generation, Lineage, MachineId, Name},
        units::{DiskIndex, Extent},
    },
    net::{self, Control, DialError, Identity, Link, Reason},
    protocol::{
        claim::Answer,
        message::{self, Hello, Refusal, ToPrimary, ToReplica},
    },
    volume::{Machine, ResyncReason},
};

/// How long an answer may take: the peer may have to open images or to end a session first.
const ANSWER_WITHIN: Duration = Duration::from_mins(1);
/// Runs of blocks that are taken from a peer, at most: it cannot make this host hold more.
const RUNS_MAX: usize = 16 << 20;

/// Whom to call.
#[derive(Clone, Debug)]
pub(super) struct Callee {
    /// `HOST:PORT`.
    pub(super) address: String,
    /// The name in its certificate, if not HOST.
    pub(super) name: Option<Name>,
    /// Who calls.
    pub(super) identity: Identity,
}

impl Callee {
    /// Opens a link.
    pub(super) async fn dial(&self) -> Result<(Link, Control), DialError> {
        net::dial(&self.address, self.name.as_ref(), &self.identity).await
    }
}

/// A call that was not answered as hoped.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// Nobody answers there.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The peer said no.
    #[error(transparent)]
    Refused(Refusal),
    /// The link broke, or the answer was not one to this question.
    #[error("the call was cut short: {0}")]
    Broken(String),
}

struct Call {
    link: Link,
    control: Control,
}

impl Call {
    async fn open(callee: &Callee, question: &ToReplica) -> Result<Self, CallError> {
        let (link, control) = callee.dial().await?;
        let mut call = Self { link, control };
        call.say(question).await?;
        Ok(call)
    }

    async fn say(&mut self, message: &ToReplica) -> Result<(), CallError> {
        let sent = self.control.sender.send(message::encode(message).into());
        sent.await.map_err(broken)
    }

    async fn answer(&mut self) -> Result<ToPrimary, CallError> {
        let received = tokio::time::timeout(ANSWER_WITHIN, self.control.receiver.receive());
        let bytes = received.await.map_err(broken)?.map_err(broken)?;
        let bytes = bytes.ok_or_else(|| CallError::Broken("no answer".into()))?;
        match message::decode_to_primary(&bytes).map_err(broken)? {
            ToPrimary::Refused(refusal) => Err(CallError::Refused(refusal)),
            answer => Ok(answer),
        }
    }

    async fn end(self) {
        self.link.close(Reason::Done, "asked and answered");
        self.link.drained().await;
    }
}

fn broken(error: impl std::error::Error) -> CallError {
    CallError::Broken(chain(&error))
}

fn unexpected() -> CallError {
    CallError::Broken("the answer belongs to another question".into())
}

/// One question, its answer, and the end.
async fn ask(callee: &Callee, question: &ToReplica) -> Result<ToPrimary, CallError> {
    let mut call = Call::open(callee, question).await?;
    let answer = call.answer().await;
    call.end().await;
    answer
}

/// Claims a machine that nobody may feed yet; what the peer answers.
pub(super) async fn claim(callee: &Callee, hello: Hello) -> Result<Answer, CallError> {
    match ask(callee, &ToReplica::Hello(hello)).await {
        Ok(ToPrimary::Welcome { follows, .. }) => Ok(Answer::Follows(follows)),
        Err(CallError::Refused(Refusal::Role { answer })) => Ok(answer),
        Ok(_) => Err(unexpected()),
        Err(error) => Err(error),
    }
}

/// Asks the peer to take over at `head`; the generation in which it does.
pub(super) async fn hand_over(
    callee: &Callee,
    (machine, name): (MachineId, Name),
    from: Generation,
    head: Lineage,
) -> Result<Generation, CallError> {
    let question = ToReplica::HandOver {
        machine,
        name,
        from,
        head,
    };
    match ask(callee, &question).await? {
        ToPrimary::TookOver { generation } => Ok(generation),
        _ => Err(unexpected()),
    }
}

/// Takes the blocks in which the former primary may differ, and lets it follow.
pub(super) async fn bring_back(
    callee: &Callee,
    machine: &Machine,
    (by, born): (Generation, Option<Lineage>),
    clock: &dyn Clock,
) -> Result<(), String> {
    let question = ToReplica::Return {
        machine: machine.id(),
        name: machine.name().clone(),
        by,
    };
    let told = |error: CallError| chain(&error);
    let mut call = Call::open(callee, &question).await.map_err(told)?;
    let taken = take(&mut call, machine, (by, born), clock).await;
    call.end().await;
    taken
}

async fn take(
    call: &mut Call,
    machine: &Machine,
    (by, born): (Generation, Option<Lineage>),
    clock: &dyn Clock,
) -> Result<(), String> {
    let told = |error: CallError| chain(&error);
    let mut differing: Vec<(DiskIndex, Extent)> = Vec::new();
    loop {
        match call.answer().await.map_err(told)? {
            ToPrimary::Differs { disk, runs } => {
                let names = (0..).map(DiskIndex).zip(machine.volumes());
                let index = names
                    .clone()
                    .find(|(_, volume)| *volume.name() == disk)
                    .map(|(index, _)| index)
                    .ok_or_else(|| format!("it has a disk {disk} that is not here"))?;
                if differing.len() + runs.len() > RUNS_MAX {
                    return Err(format!("it differs in more than {RUNS_MAX} places"));
                }
                differing.extend(
                    runs.into_iter()
                        .map(|(offset, len)| (index, Extent::new(offset, len))),
                );
            }
            ToPrimary::DiffersEnd => break,
            _ => return Err(chain(&unexpected())),
        }
    }
    let point = machine
        .lineage()
        .ok_or("this host has no point yet that a replica could follow from")?;
    if born != Some(point) {
        // The maps tell what changed since another point than the one the peer was left at.
        machine.begin_resync(point).map_err(|error| chain(&error))?;
    }
    // Durable before the peer forgets them.
    machine
        .suspect(&differing, ResyncReason::Reversed)
        .map_err(|error| chain(&error))?;
    let bytes: u64 = differing.iter().map(|(_, run)| run.len).sum();
    tracing::info!(machine = %machine.name(), bytes, "the former primary may differ in these; they are compared");
    let taken = ToReplica::Taken {
        by,
        point,
        cut: clock.wall(),
    };
    call.say(&taken).await.map_err(told)?;
    match call.answer().await.map_err(told)? {
        ToPrimary::Returned => Ok(()),
        _ => Err(chain(&unexpected())),
    }
}
