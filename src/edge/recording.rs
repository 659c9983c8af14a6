//! Answers under an idempotency key: recorded as they come, so that whoever asks again hears the same, from the
//! beginning or from where the connection broke.
//!
//! A recorded answer is made to its end whoever listens, for it may be asked for again. It is in this edge's memory
//! while it is made, then in the store; an edge that is asked for another's waits for that.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use actix_web::web::{Bytes, BytesMut};
use futures::{Stream, stream};
use parking_lot::Mutex;
use tokio::{sync::watch, time::timeout};

use super::{
    dialect::KEEP_ALIVE,
    error::ApiError,
    state::EdgeState,
    telling::{Streaming, Telling, Told},
};
use crate::{
    domain::FundsEnd,
    records::{Answered, Key},
    store::StoreError,
};

/// Answers that one edge records at the same time.
const RECORDINGS_MAX: usize = 4096;
/// How often an edge looks whether another has answered.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How often, and after which pause, an answer is kept again that the store did not take.
const KEEP_ATTEMPTS: usize = 20;
const KEEP_PAUSE: Duration = Duration::from_millis(500);
/// Bytes of events that are told again at a time: whoever reads slowly has no more than that in memory.
const PIECE_BYTES_MAX: usize = 64 << 10;

/// The recordings of one edge.
#[derive(Default)]
pub struct Recordings {
    table: Mutex<HashMap<String, Arc<Recording>>>,
}

/// One answer on its way.
pub struct Recording {
    inner: Mutex<Inner>,
    /// Counts what there is to hear.
    heard: watch::Sender<usize>,
}

#[derive(Default)]
struct Inner {
    content_type: &'static str,
    ignored: Vec<String>,
    limited_by: Option<FundsEnd>,
    body: Vec<u8>,
    /// Where each event of a stream ends.
    events: Vec<usize>,
    outcome: Option<Result<(), ApiError>>,
}

/// What is told when it is kept, and no sooner: who has heard of the end may ask again.
enum Last {
    /// With all of a stream that was not told before.
    Events(Bytes),
    Body(Told),
}

impl Last {
    fn limited_by(&self) -> Option<FundsEnd> {
        match self {
            Self::Events(_) => None,
            Self::Body(told) => told.limited_by,
        }
    }
}

impl Inner {
    /// Adds whole events, each under its number.
    fn add_events(&mut self, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes);
        for event in text.split_inclusive("\n\n").filter(|event| !event.starts_with(':')) {
            let number = self.events.len() + 1;
            self.body.extend_from_slice(format!("id: {number}\n{event}").as_bytes());
            self.events.push(self.body.len());
        }
    }
}

pub const EVENT_STREAM: &str = "text/event-stream";
pub const JSON: &str = "application/json";

impl Recording {
    fn new(content_type: &'static str, ignored: Vec<String>) -> Arc<Self> {
        let inner = Inner { content_type, ignored, ..Inner::default() };
        Arc::new(Self { inner: Mutex::new(inner), heard: watch::Sender::new(0) })
    }

    fn add_events(&self, bytes: &[u8]) {
        self.inner.lock().add_events(bytes);
        self.heard.send_modify(|count| *count += 1);
    }

    /// The body as it is with `last`, which nobody hears yet.
    fn with_last(&self, last: &Last) -> Vec<u8> {
        let inner = self.inner.lock();
        match last {
            Last::Events(bytes) => {
                let mut whole = Inner { events: inner.events.clone(), body: inner.body.clone(), ..Inner::default() };
                whole.add_events(bytes);
                whole.body
            }
            Last::Body(told) => told.body.clone(),
        }
    }

    /// The last events and the end at once: nobody who has heard all waits for more.
    fn end(&self, outcome: Result<Last, ApiError>) {
        let mut inner = self.inner.lock();
        inner.outcome = Some(outcome.map(|last| match last {
            Last::Events(bytes) => inner.add_events(&bytes),
            Last::Body(told) => (inner.body, inner.limited_by) = (told.body, told.limited_by),
        }));
        drop(inner);
        self.heard.send_modify(|count| *count += 1);
    }

    fn replay(&self, answered: Answered) {
        let mut inner = self.inner.lock();
        inner.content_type = if answered.content_type == EVENT_STREAM { EVENT_STREAM } else { JSON };
        inner.events = ends_of_events(&answered.body);
        (inner.ignored, inner.body) = (answered.ignored, answered.body);
        inner.limited_by = answered.limited_by;
        inner.outcome = Some(Ok(()));
        drop(inner);
        self.heard.send_modify(|count| *count += 1);
    }

    /// Waits until there is something to answer with, at most for `limit`; then tells what kind of answer it is.
    pub async fn opening(&self, limit: Duration) -> Result<(&'static str, Vec<String>), ApiError> {
        let mut heard = self.heard.subscribe();
        let ready = async {
            loop {
                {
                    let inner = self.inner.lock();
                    match &inner.outcome {
                        Some(Err(error)) => return Err(error.clone()),
                        Some(Ok(())) => return Ok(()),
                        None if inner.content_type == EVENT_STREAM && !inner.events.is_empty() => return Ok(()),
                        None => {}
                    }
                }
                if heard.changed().await.is_err() {
                    return Ok(());
                }
            }
        };
        if let Ok(outcome) = timeout(limit, ready).await {
            outcome?;
        }
        let inner = self.inner.lock();
        Ok((inner.content_type, inner.ignored.clone()))
    }

    /// The whole answer, when it is there.
    pub async fn told(&self) -> Result<Told, ApiError> {
        let mut heard = self.heard.subscribe();
        loop {
            {
                let inner = self.inner.lock();
                match &inner.outcome {
                    Some(Err(error)) => return Err(error.clone()),
                    Some(Ok(())) => {
                        return Ok(Told { body: inner.body.clone(), limited_by: inner.limited_by });
                    }
                    None => {}
                }
            }
            if heard.changed().await.is_err() {
                return Err(ApiError::internal());
            }
        }
    }

    /// Its events behind the `after`-th, as they come.
    pub fn listen(self: Arc<Self>, after: usize, keep_alive: Duration) -> impl Stream<Item = Result<Bytes, ApiError>> {
        let heard = self.heard.subscribe();
        stream::unfold((self, heard, after, false), move |(recording, mut heard, mut next, over)| async move {
            if over {
                return None;
            }
            loop {
                heard.mark_unchanged();
                let (bytes, count, is_over) = recording.since(next);
                if is_over && bytes.is_empty() {
                    return None;
                }
                if !bytes.is_empty() {
                    next = count;
                    return Some((Ok(bytes), (recording, heard, next, is_over)));
                }
                if timeout(keep_alive, heard.changed()).await.is_err() {
                    let alive = Ok(Bytes::from_static(KEEP_ALIVE));
                    return Some((alive, (recording, heard, next, false)));
                }
            }
        })
    }

    /// Events behind the `after`-th, as many as go into a piece, the number of the last of them, and whether these are
    /// all.
    fn since(&self, after: usize) -> (Bytes, usize, bool) {
        let inner = self.inner.lock();
        let (known, is_over) = (inner.events.len(), inner.outcome.is_some());
        if after >= known {
            // Nothing yet, or nothing more: the client may be ahead of what has been heard so far.
            let bytes = match &inner.outcome {
                // A stream that was cut off has said so itself.
                Some(Err(error)) if known == 0 => event_of(error),
                Some(_) if after > known => event_of(&ApiError::nothing_to_resume()),
                _ => Bytes::new(),
            };
            return (bytes, after, is_over);
        }
        let from = if after == 0 { 0 } else { inner.events[after - 1] };
        let rest = &inner.events[after..];
        let fits = rest.iter().take_while(|end| **end - from <= PIECE_BYTES_MAX).count().max(1);
        let bytes = Bytes::copy_from_slice(&inner.body[from..rest[fits - 1]]);
        (bytes, after + fits, is_over && after + fits == known)
    }
}

fn event_of(error: &ApiError) -> Bytes {
    [&b"data: "[..], &error.json(), b"\n\n"].concat().into()
}

fn ends_of_events(body: &[u8]) -> Vec<usize> {
    let ends = body.windows(2).enumerate().filter(|(_, pair)| *pair == b"\n\n");
    ends.map(|(at, _)| at + 2).collect()
}

impl Recordings {
    pub fn find(&self, key: &Key) -> Option<Arc<Recording>> {
        self.table.lock().get(&key.name()).cloned()
    }

    fn insert(&self, key: &Key, recording: &Arc<Recording>) -> Result<(), ApiError> {
        let mut table = self.table.lock();
        if table.len() >= RECORDINGS_MAX {
            return Err(ApiError::too_many_recordings());
        }
        table.insert(key.name(), Arc::clone(recording));
        Ok(())
    }

    fn remove(&self, key: &Key) {
        self.table.lock().remove(&key.name());
    }
}

/// Records `telling` to its end, in the background.
pub fn record(
    state: &Arc<EdgeState>,
    key: Key,
    telling: Telling,
    is_stream: bool,
    ignored: Vec<String>,
) -> Result<Arc<Recording>, ApiError> {
    let content_type = if is_stream { EVENT_STREAM } else { JSON };
    let recording = Recording::new(content_type, ignored.clone());
    state.recordings.insert(&key, &recording)?;
    let (state_, into) = (Arc::clone(state), Arc::clone(&recording));
    state.tasks.spawn_on(
        async move {
            let state = state_;
            let making =
                async { if is_stream { stream_into(telling, &into).await } else { whole(telling, &state).await } };
            let outcome = renewing(&state, &key, making).await;
            let kept = match &outcome {
                Ok(last) => {
                    let body = into.with_last(last);
                    let (content_type, limited_by) = (content_type.to_owned(), last.limited_by());
                    let answered = Answered { content_type, ignored, limited_by, body };
                    renewing(&state, &key, keep(&state, &key, &answered)).await
                }
                // Nothing was charged, or nothing can be told again: the next one is the first.
                Err(_) => state.records.forget(&key).await.map(|()| true),
            };
            match kept {
                Ok(true) => {}
                Ok(false) => tracing::warn!("an idempotency key was somebody else's before its answer was there"),
                Err(error) => tracing::error!(%error, "what was asked under an idempotency key was not kept"),
            }
            into.end(outcome);
            state.recordings.remove(&key);
        },
        &state.runtime,
    );
    Ok(recording)
}

async fn stream_into(telling: Telling, into: &Recording) -> Result<Last, ApiError> {
    let mut streaming = Streaming::begin(telling).await?;
    let mut buffer = BytesMut::new();
    loop {
        streaming.write(&mut buffer).await;
        let bytes = buffer.split();
        if !streaming.is_over() {
            into.add_events(&bytes);
            continue;
        }
        return match streaming.failure() {
            Some(error) => {
                into.add_events(&bytes);
                Err(error)
            }
            None => Ok(Last::Events(bytes.freeze())),
        };
    }
}

async fn whole(mut telling: Telling, state: &EdgeState) -> Result<Last, ApiError> {
    let limit = Duration::from_millis(state.settings.request_ms_max);
    let told = timeout(limit, telling.whole()).await.map_err(|_| ApiError::too_slow())??;
    Ok(Last::Body(told))
}

/// It was charged: whoever asks again must not pay for it again, so a short absence of the store is waited out.
async fn keep(state: &EdgeState, key: &Key, answered: &Answered) -> Result<bool, StoreError> {
    for _ in 0..KEEP_ATTEMPTS {
        match state.records.answered(key, answered).await {
            Err(error) if error.is_transient() => {
                tracing::warn!(%error, "an answer under an idempotency key waits for the store");
                tokio::time::sleep(KEEP_PAUSE).await;
            }
            kept => return kept,
        }
    }
    state.records.answered(key, answered).await
}

/// Says now and then that the key is in use, while `work` goes on.
pub async fn renewing<T>(state: &EdgeState, key: &Key, work: impl Future<Output = T>) -> T {
    let renewal = async {
        loop {
            tokio::time::sleep(state.records.lease() / 3).await;
            if let Err(error) = state.records.renew(key).await {
                tracing::warn!(%error, "an idempotency key was not renewed");
            }
        }
    };
    tokio::select! {
        done = work => done,
        () = renewal => unreachable!("it goes on for ever"),
    }
}

/// What another edge, or this one at another time, answers to the same question.
pub fn follow(state: &Arc<EdgeState>, key: Key, is_stream: bool) -> Arc<Recording> {
    let recording = Recording::new(if is_stream { EVENT_STREAM } else { JSON }, Vec::new());
    let (state_, into) = (Arc::clone(state), Arc::clone(&recording));
    let until = Instant::now() + Duration::from_millis(state.settings.request_ms_max);
    state.tasks.spawn_on(
        async move {
            loop {
                match state_.records.answer(&key).await {
                    Ok(Some(answered)) => return into.replay(answered),
                    Ok(None) => {}
                    Err(error) => tracing::warn!(%error, "an answer could not be looked up"),
                }
                if state_.is_draining() {
                    return into.end(Err(ApiError::draining()));
                }
                // Nobody is waiting any more.
                if Arc::strong_count(&into) == 1 {
                    return;
                }
                match state_.records.is_asked(&key).await {
                    Ok(false) => return into.end(Err(ApiError::silent())),
                    _ if Instant::now() > until => return into.end(Err(ApiError::silent())),
                    _ => tokio::time::sleep(LOOK_EVERY).await,
                }
            }
        },
        &state.runtime,
    );
    recording
}
