//! The first seconds of a connection: who is it, and which replica may it feed?

use std::{sync::Arc, time::Duration};

use super::{driver::chain, replicas::Replicas, session};
use crate::{
    net::{Control, ControlReceiver, ControlSender, Link, Reason},
    protocol::message::{self, Hello, Refusal, ToPrimary, ToReplica},
};

/// How long a peer may take to say hello.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// How long a new connection waits for the one it replaces to end.
const REPLACE_WITHIN: Duration = Duration::from_secs(10);

/// The first minute of a connection: who is it, and may it?
pub(super) async fn greet(replicas: Arc<Replicas>, link: Link, control: Control) {
    let Control {
        sender,
        mut receiver,
    } = control;
    let hello = match hello(&mut receiver).await {
        Ok(hello) => hello,
        Err(detail) => return refuse(sender, link, Refusal::Malformed { detail }).await,
    };
    let peer = link.peer().name.clone();
    let generation = hello.generation;
    let machine = hello.name.clone();
    let admitted = tokio::task::spawn_blocking(move || replicas.admit(&hello)).await;
    let served = match admitted {
        Ok(Ok(served)) => served,
        Ok(Err(refusal)) => {
            tracing::warn!(%machine, primary = %peer, "refused: {refusal}");
            return refuse(sender, link, refusal).await;
        }
        Err(panic) => {
            return refuse(
                sender,
                link,
                Refusal::Failed {
                    detail: panic.to_string(),
                },
            )
            .await;
        }
    };
    // A primary that dials again has lost its link, whether or not this side has noticed: the new one takes over.
    if let Some(old) = served.link.lock().replace(link.clone()) {
        old.close(Reason::Busy, "replaced by a newer connection");
    }
    let Ok(_turn) = tokio::time::timeout(REPLACE_WITHIN, served.turn.lock()).await else {
        return refuse(sender, link, Refusal::Busy).await;
    };
    tracing::info!(%machine, primary = %peer, "receiving");
    served.progress.lock().connected = Some(peer.to_string());
    session::serve(Arc::clone(&served), generation, link, sender, receiver).await;
    served.progress.lock().connected = None;
    tracing::info!(%machine, primary = %peer, "no longer receiving");
}

async fn hello(receiver: &mut ControlReceiver) -> Result<Hello, String> {
    let first = tokio::time::timeout(HELLO_WITHIN, receiver.receive()).await;
    let bytes = first
        .map_err(|_| "no greeting in time")?
        .map_err(|error| chain(&error))?
        .ok_or("no greeting")?;
    match message::decode_to_replica(&bytes).map_err(|error| chain(&error))? {
        ToReplica::Hello(hello) => Ok(hello),
        ToReplica::Current { .. } => Err("the first message is not a greeting".into()),
    }
}

async fn refuse(mut sender: ControlSender, link: Link, refusal: Refusal) {
    let text = refusal.to_string();
    // The primary may be gone already; then it will ask again.
    let _ = sender
        .send(message::encode(&ToPrimary::Refused(refusal)).into())
        .await;
    sender.finish();
    // Closing at once would throw the refusal away; the primary closes when it has read it.
    let _ = tokio::time::timeout(HELLO_WITHIN, link.closed()).await;
    link.close(Reason::Done, &text);
}
