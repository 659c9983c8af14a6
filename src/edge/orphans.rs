//! Requests that have lost their worker, or their place in the queue: the store is told, so that they go on.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, stream};
use tokio::time::sleep;

use super::state::EdgeState;
use crate::{
    domain::Job,
    queue::{Disowned, Orphan, PublishError},
};

/// Requests that the store is asked about at a time.
const ASKED_AT_ONCE: usize = 32;
const STORE_AWAY_PAUSE: Duration = Duration::from_millis(100);

/// Does so for as long as somebody polls it.
pub async fn pass_on(state: Arc<EdgeState>) {
    loop {
        let orphans = state.hub.orphans().await;
        stream::iter(orphans).for_each_concurrent(ASKED_AT_ONCE, |orphan| disown(&state, orphan)).await;
    }
}

/// Until the store has answered, or somebody has taken it over by himself.
async fn disown(state: &EdgeState, orphan: Orphan) {
    while state.hub.is_orphan(&orphan) {
        match state.queue.disown(&orphan.model, &orphan.request, orphan.attempt).await {
            Ok(Disowned::Waits | Disowned::Elsewhere) => return,
            Ok(Disowned::Absent) => return state.hub.abandon(&orphan),
            Err(error) if error.is_transient() => sleep(STORE_AWAY_PAUSE).await,
            Err(error) => {
                tracing::error!(request = %orphan.request, %error, "a request that lost its worker cannot be passed on");
                return state.hub.abandon(&orphan);
            }
        }
    }
}

/// How often is looked whether the store was away.
const LOOK: Duration = Duration::from_millis(200);

/// Publishes again, whenever the store was away, what no worker has begun: it may have lost its last moments. Does so
/// for as long as somebody polls it.
pub async fn publish_again(state: Arc<EdgeState>) {
    let mut connected_for = state.queue.store_connected_for();
    loop {
        sleep(LOOK).await;
        let before = std::mem::replace(&mut connected_for, state.queue.store_connected_for());
        if connected_for < before {
            stream::iter(state.hub.waiting()).for_each_concurrent(ASKED_AT_ONCE, |job| publish(&state, job)).await;
        }
    }
}

/// Until it stands in the queue, or a worker has begun it. What is there already is not put there twice.
async fn publish(state: &EdgeState, job: Arc<Job>) {
    while state.hub.is_waiting(&job.request) {
        match state.queue.publish(&job).await {
            Ok(()) => return,
            Err(PublishError::Full { retry_after_ms }) => sleep(Duration::from_millis(retry_after_ms)).await,
            Err(PublishError::Store(error)) if error.is_transient() => sleep(STORE_AWAY_PAUSE).await,
            Err(error) => {
                return tracing::error!(request = %job.request, %error, "a request cannot be published again");
            }
        }
    }
}
