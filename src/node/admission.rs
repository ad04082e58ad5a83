//! The first seconds of a connection: who is it, what does it want, and may it?

use std::{sync::Arc, time::Duration};

use super::{
    allowance::Quota,
    host::{Host, Member},
    operate,
    served::Served,
    session::{self, Allowance},
};
use crate::{
    base::chain::chain,
    base::ids::{Generation, Lineage, MachineId, Name},
    net::{Control, ControlReceiver, ControlSender, Link, Protocol, Reason},
    protocol::message::{self, Hello, RUNS_PER_MESSAGE_MAX, Refusal, ToPrimary, ToReplica},
};

/// How long a peer may take to say what it wants, and to answer a question.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// How long a peer may take to make durable where it differs from us.
const TAKEN_WITHIN: Duration = Duration::from_mins(1);
/// How long a new connection waits for the one it replaces to end.
const REPLACE_WITHIN: Duration = Duration::from_secs(10);

/// Hears what a link is for, and does what it asks for.
pub(super) async fn greet(host: Arc<Host>, link: Link, control: Control) {
    match link.protocol() {
        Protocol::Replicate => replicate(host, link, control).await,
        Protocol::Operate => operate::serve(host, &link, control).await,
    }
}

async fn replicate(host: Arc<Host>, link: Link, control: Control) {
    let Control {
        mut sender,
        mut receiver,
    } = control;
    let audit = Arc::clone(&host.shared().audit);
    let done = match first(&mut receiver).await {
        Err(refusal) => Err(refusal),
        Ok(ToReplica::Hello(hello)) => match claimed(&host, &link, hello).await {
            Ok(Admitted {
                member,
                served,
                generation,
            }) => {
                let peer = &link.peer().name;
                let allowance = Allowance {
                    pacing: host.shared().allowances.pacing(peer, &host.shared().clock),
                    quota: Quota::new(Arc::clone(&host), peer.clone()),
                };
                let replica = (member, served, generation);
                return feed(replica, allowance, link, sender, receiver).await;
            }
            Err(refusal) => Err(refusal),
        },
        Ok(ToReplica::HandOver {
            machine,
            name,
            from,
            head,
        }) => take_over(&host, &link, (machine, name), from, head, &mut sender).await,
        Ok(ToReplica::Return { machine, name, by }) => {
            come_back(
                &host,
                &link,
                (machine, name),
                by,
                &mut sender,
                &mut receiver,
            )
            .await
        }
        Ok(ToReplica::Current { .. } | ToReplica::Taken { .. } | ToReplica::Compare(_)) => {
            Err(Refusal::Malformed {
                detail: "the first message is neither a greeting nor a question".into(),
            })
        }
    };
    if let Err(refusal) = done {
        let peer = &link.peer().name;
        tracing::warn!(%peer, "refused: {refusal}");
        audit.refused(peer.to_string(), refusal.to_string());
        // The peer may be gone already; then it will ask again.
        let _ = say(&mut sender, &ToPrimary::Refused(refusal)).await;
    }
    sender.finish();
    // Closing at once would throw the answer away; the peer closes when it has read it.
    let _ = tokio::time::timeout(HELLO_WITHIN, link.closed()).await;
    link.close(Reason::Done, "asked and answered");
}

struct Admitted {
    member: Arc<Member>,
    served: Arc<Served>,
    generation: Generation,
}

async fn claimed(host: &Arc<Host>, link: &Link, hello: Hello) -> Result<Admitted, Refusal> {
    let (host, peer) = (Arc::clone(host), link.peer().name.clone());
    blocking(move || {
        let member = host.greeted(&hello, &peer)?;
        let (served, generation) = member.claimed(&hello)?;
        Ok(Admitted {
            member,
            served,
            generation,
        })
    })
    .await
}

/// Receives what the primary sends until the link ends.
async fn feed(
    (member, served, generation): (Arc<Member>, Arc<Served>, Generation),
    allowance: Allowance,
    link: Link,
    sender: ControlSender,
    receiver: ControlReceiver,
) {
    let (machine, peer) = (member.name().clone(), link.peer().name.clone());
    // A primary that dials again has lost its link, whether or not this side has noticed: the new one takes over.
    if let Some(old) = served.link.lock().replace(link.clone()) {
        old.close(Reason::Busy, "replaced by a newer connection");
    }
    let Ok(_turn) = tokio::time::timeout(REPLACE_WITHIN, served.turn.lock()).await else {
        link.close(Reason::Busy, "the connection before has not ended");
        return;
    };
    // Between the answer and the turn the machine may have gone on to another part.
    if !member.follows(generation) {
        link.close(Reason::Fenced, "the machine was failed over");
        return;
    }
    tracing::info!(%machine, primary = %peer, "receiving");
    served.progress.lock().connected = Some(peer.to_string());
    let replica = (Arc::clone(&served), generation);
    let ended = session::serve(replica, allowance, link, sender, receiver).await;
    let mut progress = served.progress.lock();
    progress.connected = None;
    match ended {
        Some(Reason::Suspended) => progress.suspended = Some(served.clock.wall()),
        // A question about roles says nothing of the replication.
        Some(Reason::Done) => {}
        _ => progress.suspended = None,
    }
    drop(progress);
    tracing::info!(%machine, primary = %peer, "no longer receiving");
}

async fn take_over(
    host: &Arc<Host>,
    link: &Link,
    (machine, name): (MachineId, Name),
    from: Generation,
    head: Lineage,
    sender: &mut ControlSender,
) -> Result<(), Refusal> {
    let (host, peer) = (Arc::clone(host), link.peer().name.clone());
    let generation =
        blocking(move || host.called(machine, &name, &peer)?.handed_over(from, head)).await?;
    say(sender, &ToPrimary::TookOver { generation }).await
}

async fn come_back(
    host: &Arc<Host>,
    link: &Link,
    (machine, name): (MachineId, Name),
    by: Generation,
    sender: &mut ControlSender,
    receiver: &mut ControlReceiver,
) -> Result<(), Refusal> {
    let (host, peer) = (Arc::clone(host), link.peer().name.clone());
    let (member, differing) = blocking(move || {
        let member = host.called(machine, &name, &peer)?;
        let differing = member.differing(by)?;
        Ok((member, differing))
    })
    .await?;
    for (disk, runs) in differing {
        for runs in runs.chunks(RUNS_PER_MESSAGE_MAX) {
            let runs = runs.iter().map(|run| (run.offset, run.len)).collect();
            let disk = disk.clone();
            say(sender, &ToPrimary::Differs { disk, runs }).await?;
        }
    }
    say(sender, &ToPrimary::DiffersEnd).await?;
    match next(receiver, TAKEN_WITHIN).await? {
        ToReplica::Taken {
            by: again,
            point,
            cut,
        } if again == by => {
            blocking(move || member.returned(by, point, cut)).await?;
            say(sender, &ToPrimary::Returned).await
        }
        _ => Err(Refusal::Malformed {
            detail: "this is not the answer to where the images differ".into(),
        }),
    }
}

async fn first(receiver: &mut ControlReceiver) -> Result<ToReplica, Refusal> {
    next(receiver, HELLO_WITHIN).await
}

async fn next(receiver: &mut ControlReceiver, within: Duration) -> Result<ToReplica, Refusal> {
    let malformed = |detail: String| Refusal::Malformed { detail };
    let received = tokio::time::timeout(within, receiver.receive()).await;
    let bytes = received
        .map_err(|_| malformed("nothing was said in time".into()))?
        .map_err(|error| malformed(chain(&error)))?
        .ok_or_else(|| malformed("nothing was said".into()))?;
    message::decode_to_replica(&bytes).map_err(|error| malformed(chain(&error)))
}

async fn say(sender: &mut ControlSender, message: &ToPrimary) -> Result<(), Refusal> {
    let sent = sender.send(message::encode(message).into()).await;
    sent.map_err(|error| Refusal::Failed {
        detail: chain(&error),
    })
}

/// Does work that opens files or waits for other links.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|panic| {
        Err(Refusal::Failed {
            detail: panic.to_string(),
        })
    })
}
