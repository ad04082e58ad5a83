//! Requests that change something, in the audit log: before they are carried out, and what became of them.

use std::sync::Arc;

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::Request,
    http::{Method, StatusCode},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};

use crate::node::audit::{Audit, Event, excerpt};

/// Longest body of a request or of an answer that is no success, in bytes: that of a plan, with room.
const BODY_BYTES_MAX: usize = 2 << 20;

/// The same requests, with an account of who asks for what. Nobody can add a request that is not in it.
pub(in crate::node) fn audited(requests: Router, who: &str, audit: &Arc<Audit>) -> Router {
    let (who, audit) = (who.to_owned(), Arc::clone(audit));
    requests.layer(middleware::from_fn(move |request: Request, next: Next| {
        let (who, audit) = (who.clone(), Arc::clone(&audit));
        async move {
            if request.method() == Method::GET {
                return next.run(request).await;
            }
            // What was heard is carried out, whether or not the caller is still there; and so is what is said of it.
            let passed = tokio::spawn(pass(request, next, who, audit));
            passed
                .await
                .unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
        }
    }))
}

async fn pass(request: Request, next: Next, who: String, audit: Arc<Audit>) -> Response {
    let what = format!("{} {}", request.method(), request.uri().path());
    let what = excerpt(&what);
    let (parts, body) = request.into_parts();
    let Ok(body) = to_bytes(body, BODY_BYTES_MAX).await else {
        return StatusCode::PAYLOAD_TOO_LARGE.into_response();
    };
    let asked = Event::Asked {
        who: who.clone(),
        what: what.clone(),
        with: excerpt(&String::from_utf8_lossy(&body)),
    };
    record(&audit, asked).await;
    let answer = next.run(Request::from_parts(parts, Body::from(body))).await;
    let status = answer.status();
    let (answer, error) = if status.is_success() {
        (answer, String::new())
    } else {
        let (parts, body) = answer.into_parts();
        let body = to_bytes(body, BODY_BYTES_MAX).await.unwrap_or_default();
        let error = excerpt(&String::from_utf8_lossy(&body));
        (Response::from_parts(parts, Body::from(body)), error)
    };
    let answered = Event::Answered {
        who,
        what,
        status: status.as_u16(),
        error,
    };
    record(&audit, answered).await;
    answer
}

/// Writes and syncs beside the links.
async fn record(audit: &Arc<Audit>, event: Event) {
    let audit = Arc::clone(audit);
    let written = tokio::task::spawn_blocking(move || audit.record(&event));
    if let Err(panic) = written.await {
        tracing::error!("the audit log was not written: {panic}");
    }
}
