//! The edge's end of token streams.
//!
//! Promises that every opened stream ends with exactly one `Finished` or `Failed` event, that events arrive in order
//! without a gap or a repeat, whichever workers they come from one after the other, and that memory stays bounded: a
//! stream whose reader lags behind by more than its buffer is cut, and its worker told to stop. It remembers what each
//! client was told, so that another worker can go on with it, and hears nobody but the worker that has the request now.
//! Delivery never waits, so that one slow client cannot delay the others. Never touches the store and never bills.

use std::{
    collections::HashMap,
    num::NonZeroUsize,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

use crate::{
    domain::{EventBody, FailureCode, FinishReason, Job, ModelId, NodeId, ReplyTo, RequestId, TokenEvent, Told, Usage},
    telemetry::Metrics,
};

/// Requests whose clients went away, of which is remembered what these were told until their workers have ended them.
const LEFT_MAX: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// All open streams of one edge. Cheap to clone.
#[derive(Clone)]
pub struct ReplyHub {
    inner: Arc<Hub>,
}

struct Hub {
    node: NodeId,
    relay_address: Option<String>,
    buffer_events: usize,
    table: Mutex<Table>,
    /// Told whenever a request has lost its worker.
    orphaned: Notify,
    /// Set when all streams were failed: from then on nobody is told to cancel and to bill.
    closed: AtomicBool,
    metrics: Arc<Metrics>,
}

struct Table {
    streams: HashMap<RequestId, Entry>,
    left: LruCache<RequestId, Told>,
    orphans: Vec<Orphan>,
}

/// A request whose worker cannot be heard any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orphan {
    pub request: RequestId,
    pub model: ModelId,
    /// Of the claim that is to be given to somebody else.
    pub attempt: u32,
}

struct Entry {
    model: ModelId,
    /// Until a worker has it: what to publish again where the store has lost it.
    waiting: Option<Arc<Job>>,
    events: mpsc::Sender<TokenEvent>,
    ending: Ending,
    worker: Option<WorkerLink>,
    /// Of the worker that is heard; 0 before the first.
    attempt: u32,
    seq_next: u32,
    told: Told,
    /// Its client wants no more of it, but waits for the end.
    is_cancelled: bool,
}

/// The last event travels beside the bounded buffer, so that there is always room for it.
type Ending = Arc<Mutex<Option<TokenEvent>>>;

/// What an edge answers to a worker's events.
#[derive(Clone, Debug, PartialEq)]
pub enum Feedback {
    /// The client went away: stop, and bill what was decoded.
    Cancel(RequestId),
    /// Go on behind what the client was told.
    Resume { request: RequestId, attempt: u32, told: Told },
    /// Somebody else has the request: stop, and settle nothing.
    Superseded { request: RequestId, attempt: u32 },
    /// Its last event has arrived.
    Heard(RequestId),
}

impl ReplyHub {
    /// `relay_address` is where workers of other processes dial; `None` where there are none.
    /// `buffer_events` is how far one stream's reader may lag behind.
    pub fn new(node: NodeId, buffer_events: usize, relay_address: Option<String>, metrics: Arc<Metrics>) -> Self {
        let (closed, buffer_events) = (AtomicBool::new(false), buffer_events.max(1));
        let table = Table { streams: HashMap::new(), left: LruCache::new(LEFT_MAX), orphans: Vec::new() };
        let (table, orphaned) = (Mutex::new(table), Notify::new());
        Self { inner: Arc::new(Hub { node, relay_address, buffer_events, table, orphaned, closed, metrics }) }
    }

    /// What a job must carry so that its tokens find their way here.
    pub fn reply_to(&self) -> ReplyTo {
        ReplyTo { node: self.inner.node.clone(), relay: self.inner.relay_address.clone() }
    }

    pub fn node(&self) -> &NodeId {
        &self.inner.node
    }

    /// Opens the stream of a request that is about to be published. Dropping it before its last event
    /// cancels the request at its worker.
    pub fn open(&self, request: &RequestId, model: &ModelId) -> ReplyStream {
        let (sender, events) = mpsc::channel(self.inner.buffer_events);
        let ending = Ending::default();
        let entry = Entry {
            model: model.clone(),
            waiting: None,
            events: sender,
            ending: Arc::clone(&ending),
            worker: None,
            attempt: 0,
            seq_next: 0,
            told: Told::default(),
            is_cancelled: false,
        };
        self.inner.table.lock().streams.insert(request.clone(), entry);
        ReplyStream { request: request.clone(), events, ending, hub: Arc::downgrade(&self.inner), ended: false }
    }

    /// The request of a stream stands in the queue.
    pub fn published(&self, job: Job) {
        if let Some(entry) = self.inner.table.lock().streams.get_mut(&job.request).filter(|entry| entry.attempt == 0) {
            entry.waiting = Some(Arc::new(job));
        }
    }

    /// Requests that no worker has begun.
    pub fn waiting(&self) -> Vec<Arc<Job>> {
        self.inner.table.lock().streams.values().filter_map(|entry| entry.waiting.clone()).collect()
    }

    pub fn is_waiting(&self, request: &RequestId) -> bool {
        self.inner.table.lock().streams.get(request).is_some_and(|entry| entry.waiting.is_some())
    }

    /// Hands a worker's events to their streams. Answers with what the worker is to hear.
    pub fn deliver(&self, events: Vec<TokenEvent>, from: &WorkerLink) -> Vec<Feedback> {
        let mut feedback = Vec::new();
        let mut table = self.inner.table.lock();
        for event in events {
            let Some(entry) = table.streams.get_mut(&event.request) else {
                if is_last(&event.body) || !self.inner.closed.load(Ordering::Relaxed) {
                    table.answer_for_left(event, &mut feedback);
                }
                continue;
            };
            match entry.take(event, from, &mut feedback) {
                Taken::Kept => {}
                Taken::Last(event) => table.end(event),
                Taken::Broken(request) => {
                    tracing::warn!(%request, "events of a stream were lost; another worker goes on with it");
                    table.orphan(&request);
                    self.inner.orphaned.notify_one();
                }
                Taken::Slow(event) => {
                    self.inner.metrics.slow_streams_cut.inc();
                    tracing::info!(request = %event.request, "client reads too slowly; stream cut");
                    feedback.push(Feedback::Cancel(event.request.clone()));
                    table.leave(&event.request);
                    table.end(event);
                }
            }
        }
        feedback
    }

    /// Has the worker of a request stop; the stream goes on to its end. `false`: there is no such stream.
    pub fn cancel(&self, request: &RequestId) -> bool {
        let mut table = self.inner.table.lock();
        let Some(entry) = table.streams.get_mut(request) else { return false };
        // A worker that is not known yet will be told when its `Accepted` arrives.
        entry.is_cancelled = true;
        if let Some(worker) = &entry.worker {
            worker.tell(Feedback::Cancel(request.clone()));
        }
        true
    }

    /// Ends the stream of a request that was cancelled before any worker took it.
    pub fn withdrawn(&self, request: &RequestId) {
        let mut table = self.inner.table.lock();
        let (attempt, seq) = table.streams.get(request).map_or((0, 0), |entry| (entry.attempt, entry.seq_next));
        let body = EventBody::Finished { reason: FinishReason::Cancelled, usage: Usage::default() };
        table.end(TokenEvent { request: request.clone(), attempt, seq, body });
    }

    /// The connection to a worker is gone: others are to go on with what it served.
    pub fn link_lost(&self, link: &WorkerLink) {
        let mut table = self.inner.table.lock();
        let served = |entry: &Entry| entry.worker.as_ref().is_some_and(|worker| worker.is(link));
        let lost: Vec<_> = table.streams.iter().filter(|(_, entry)| served(entry)).map(|(id, _)| id.clone()).collect();
        for request in &lost {
            table.orphan(request);
        }
        drop(table);
        if !lost.is_empty() {
            tracing::warn!(requests = lost.len(), "lost the worker of some requests; others are to go on with them");
            self.inner.orphaned.notify_one();
        }
    }

    /// Requests that have lost their worker since the last call; waits until there are some. Cancel-safe.
    pub async fn orphans(&self) -> Vec<Orphan> {
        loop {
            let orphans = std::mem::take(&mut self.inner.table.lock().orphans);
            if !orphans.is_empty() {
                return orphans;
            }
            self.inner.orphaned.notified().await;
        }
    }

    /// Whether nobody has taken over what was lost in this attempt.
    pub fn is_orphan(&self, Orphan { request, attempt, .. }: &Orphan) -> bool {
        let table = self.inner.table.lock();
        table.streams.get(request).is_some_and(|entry| entry.worker.is_none() && entry.attempt == *attempt)
    }

    /// Nobody will go on with it.
    pub fn abandon(&self, orphan: &Orphan) {
        let mut table = self.inner.table.lock();
        let Some(entry) = table.streams.get(&orphan.request).filter(|entry| entry.attempt == orphan.attempt) else {
            return;
        };
        let event =
            failed(orphan.request.clone(), entry, FailureCode::WorkerLost, "its worker was lost with its claim");
        table.end(event);
    }

    /// Fails every open stream: the last resort of a drain. Workers are not told to cancel, for what they
    /// cancel they bill; they end these requests free of charge when the connection closes.
    pub fn fail_all(&self, code: FailureCode, message: &str) {
        let mut table = self.inner.table.lock();
        self.inner.closed.store(true, Ordering::Relaxed);
        let streams = std::mem::take(&mut table.streams);
        drop(table);
        for (request, entry) in streams {
            *entry.ending.lock() = Some(failed(request, &entry, code, message));
        }
    }

    /// The requests whose streams are open, for renewing their holds and for drain.
    pub fn open_requests(&self) -> Vec<RequestId> {
        self.inner.table.lock().streams.keys().cloned().collect()
    }

    pub fn open_count(&self) -> usize {
        self.inner.table.lock().streams.len()
    }
}

impl Table {
    /// Removing the entry drops its sender: the reader sees what is buffered, then the last event.
    fn end(&mut self, event: TokenEvent) {
        if let Some(entry) = self.streams.remove(&event.request) {
            *entry.ending.lock() = Some(event);
        }
    }

    fn orphan(&mut self, request: &RequestId) {
        let Some(entry) = self.streams.get_mut(request) else { return };
        entry.worker = None;
        let orphan = Orphan { request: request.clone(), model: entry.model.clone(), attempt: entry.attempt };
        self.orphans.push(orphan);
    }

    /// The client of a request goes, and its worker may yet be lost before it has ended it.
    fn leave(&mut self, request: &RequestId) {
        if let Some(entry) = self.streams.get_mut(request).filter(|entry| entry.attempt > 0) {
            self.left.put(request.clone(), std::mem::take(&mut entry.told));
        }
    }

    /// An event whose stream was dropped, was cut or never was here.
    fn answer_for_left(&mut self, event: TokenEvent, feedback: &mut Vec<Feedback>) {
        let TokenEvent { request, attempt, body, .. } = event;
        if is_last(&body) {
            self.left.pop(&request);
            return feedback.push(Feedback::Heard(request));
        }
        if body == EventBody::Accepted && attempt > 1 {
            let told = self.left.get(&request).cloned().unwrap_or_default();
            feedback.push(Feedback::Resume { request: request.clone(), attempt, told });
        }
        let cancel = Feedback::Cancel(request);
        if feedback.last() != Some(&cancel) {
            feedback.push(cancel);
        }
    }
}

enum Taken {
    Kept,
    Last(TokenEvent),
    /// A sequence number was skipped.
    Broken(RequestId),
    /// The reader's buffer is full.
    Slow(TokenEvent),
}

impl Entry {
    fn take(&mut self, event: TokenEvent, from: &WorkerLink, feedback: &mut Vec<Feedback>) -> Taken {
        let is_other = self.worker.as_ref().is_some_and(|worker| !worker.is(from));
        if let EventBody::Failed { .. } = event.body {
            // Failures also come from whoever finds a request that nobody serves, who does not know the sequence.
            if event.attempt < self.attempt {
                return Taken::Kept;
            }
            if let Some(worker) = self.worker.as_ref().filter(|_| is_other) {
                worker.tell(Feedback::Superseded { request: event.request.clone(), attempt: self.attempt });
            }
            feedback.push(Feedback::Heard(event.request.clone()));
            return Taken::Last(event);
        }
        if event.attempt > self.attempt && event.body == EventBody::Accepted {
            if let Some(before) = self.worker.as_ref().filter(|_| is_other) {
                before.tell(Feedback::Superseded { request: event.request.clone(), attempt: self.attempt });
            }
            (self.attempt, self.seq_next, self.worker) = (event.attempt, 0, Some(from.clone()));
            self.waiting = None;
            if event.attempt > 1 {
                let (request, told) = (event.request.clone(), self.told.clone());
                feedback.push(Feedback::Resume { request, attempt: event.attempt, told });
            }
            if self.is_cancelled {
                feedback.push(Feedback::Cancel(event.request.clone()));
            }
        } else if event.attempt != self.attempt || self.worker.as_ref().is_none_or(|worker| !worker.is(from)) {
            // Not, or no longer, the one that is heard.
            let superseded = Feedback::Superseded { request: event.request, attempt: event.attempt };
            if feedback.last() != Some(&superseded) {
                feedback.push(superseded);
            }
            return Taken::Kept;
        }
        if event.seq < self.seq_next {
            return Taken::Kept; // a repeat; it was delivered already
        }
        if event.seq > self.seq_next {
            feedback.push(Feedback::Superseded { request: event.request.clone(), attempt: event.attempt });
            return Taken::Broken(event.request);
        }
        self.seq_next += 1;
        if is_last(&event.body) {
            feedback.push(Feedback::Heard(event.request.clone()));
            return Taken::Last(event);
        }
        self.told.add(&event.body);
        match self.events.try_send(event) {
            Ok(()) => Taken::Kept,
            Err(mpsc::error::TrySendError::Full(event) | mpsc::error::TrySendError::Closed(event)) => {
                let why = "the client read too slowly";
                Taken::Slow(failed(event.request, self, FailureCode::SlowConsumer, why))
            }
        }
    }
}

fn is_last(body: &EventBody) -> bool {
    matches!(body, EventBody::Finished { .. } | EventBody::Failed { .. })
}

fn failed(request: RequestId, entry: &Entry, code: FailureCode, message: &str) -> TokenEvent {
    let body = EventBody::Failed { code, message: message.to_owned() };
    TokenEvent { request, attempt: entry.attempt, seq: entry.seq_next, body }
}

/// One client's events, in order, ending with `Finished` or `Failed`.
#[must_use = "dropping a stream cancels its request"]
pub struct ReplyStream {
    request: RequestId,
    events: mpsc::Receiver<TokenEvent>,
    ending: Ending,
    hub: Weak<Hub>,
    ended: bool,
}

impl ReplyStream {
    pub fn request(&self) -> &RequestId {
        &self.request
    }

    /// The next event; `None` after the last one. Cancel-safe.
    pub async fn next(&mut self) -> Option<TokenEvent> {
        if self.ended {
            return None;
        }
        if let Some(event) = self.events.recv().await {
            return Some(event);
        }
        self.ended = true;
        let ending = self.ending.lock().take();
        // The hub always leaves an ending; a stream replaced by one of the same name must still end properly.
        Some(ending.unwrap_or_else(|| {
            let message = "the stream ended without an answer".to_owned();
            let body = EventBody::Failed { code: FailureCode::WorkerLost, message };
            TokenEvent { request: self.request.clone(), attempt: u32::MAX, seq: u32::MAX, body }
        }))
    }
}

impl Drop for ReplyStream {
    fn drop(&mut self) {
        let Some(hub) = self.hub.upgrade() else { return };
        let mut table = hub.table.lock();
        let mine = table.streams.get(&self.request).is_some_and(|entry| Arc::ptr_eq(&entry.ending, &self.ending));
        if !mine {
            return; // it had ended
        }
        table.leave(&self.request);
        let entry = table.streams.remove(&self.request);
        drop(table);
        // A worker that is not known yet will be told when its `Accepted` arrives.
        if let Some(worker) = entry.and_then(|entry| entry.worker) {
            worker.tell(Feedback::Cancel(self.request.clone()));
        }
    }
}

/// The way back to a worker: how an edge tells it what becomes of a request.
///
/// What waits here is bounded by the requests that the worker itself claimed, of each of which it hears few times.
#[derive(Clone)]
pub struct WorkerLink {
    inner: Arc<Link>,
}

struct Link {
    id: u64,
    waiting: Mutex<Vec<Feedback>>,
    wake: Notify,
}

impl WorkerLink {
    /// A link and the end that reads it.
    pub fn new() -> (Self, Feedbacks) {
        static LINKS: AtomicU64 = AtomicU64::new(0);
        let id = LINKS.fetch_add(1, Ordering::Relaxed);
        let inner = Arc::new(Link { id, waiting: Mutex::default(), wake: Notify::new() });
        (Self { inner: Arc::clone(&inner) }, Feedbacks { inner })
    }

    /// Never waits.
    pub fn tell(&self, feedback: Feedback) {
        self.inner.waiting.lock().push(feedback);
        self.inner.wake.notify_one();
    }

    pub fn is(&self, other: &Self) -> bool {
        self.inner.id == other.inner.id
    }
}

/// The worker's end of a [`WorkerLink`].
pub struct Feedbacks {
    inner: Arc<Link>,
}

impl Feedbacks {
    /// Everything said since the last call; waits until there is something. Cancel-safe.
    pub async fn next(&mut self) -> Vec<Feedback> {
        loop {
            let waiting = std::mem::take(&mut *self.inner.waiting.lock());
            if !waiting.is_empty() {
                return waiting;
            }
            self.inner.wake.notified().await;
        }
    }
}

#[cfg(test)]
mod tests;
