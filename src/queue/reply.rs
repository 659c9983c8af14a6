//! The edge's end of token streams.
//!
//! Promises that every opened stream ends with exactly one `Finished` or `Failed` event, whatever becomes
//! of its worker, that events arrive in order without a gap or a repeat, and that memory stays bounded: a
//! stream whose reader lags behind by more than its buffer is cut, and its worker told to stop. Delivery
//! never waits, so that one slow client cannot delay the others. Never touches the store and never bills.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

use crate::{
    domain::{EventBody, FailureCode, FinishReason, NodeId, ReplyTo, RequestId, TokenEvent, Usage},
    telemetry::Metrics,
};

/// All open streams of one edge. Cheap to clone.
#[derive(Clone)]
pub struct ReplyHub {
    inner: Arc<Hub>,
}

struct Hub {
    node: NodeId,
    relay_address: Option<String>,
    buffer_events: usize,
    streams: Mutex<HashMap<RequestId, Entry>>,
    /// Set when all streams were failed: from then on nobody is told to cancel and to bill.
    closed: AtomicBool,
    metrics: Arc<Metrics>,
}

struct Entry {
    events: mpsc::Sender<TokenEvent>,
    ending: Ending,
    worker: Option<WorkerLink>,
    seq_next: u32,
    /// Its client wants no more of it, but waits for the end.
    is_cancelled: bool,
}

/// The last event travels beside the bounded buffer, so that there is always room for it.
type Ending = Arc<Mutex<Option<TokenEvent>>>;

impl ReplyHub {
    /// `relay_address` is where workers of other processes dial; `None` where there are none.
    /// `buffer_events` is how far one stream's reader may lag behind.
    pub fn new(node: NodeId, buffer_events: usize, relay_address: Option<String>, metrics: Arc<Metrics>) -> Self {
        let (streams, closed, buffer_events) = (Mutex::default(), AtomicBool::new(false), buffer_events.max(1));
        Self { inner: Arc::new(Hub { node, relay_address, buffer_events, streams, closed, metrics }) }
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
    pub fn open(&self, request: &RequestId) -> ReplyStream {
        let (sender, events) = mpsc::channel(self.inner.buffer_events);
        let ending = Ending::default();
        let entry =
            Entry { events: sender, ending: Arc::clone(&ending), worker: None, seq_next: 0, is_cancelled: false };
        self.inner.streams.lock().insert(request.clone(), entry);
        ReplyStream { request: request.clone(), events, ending, hub: Arc::downgrade(&self.inner), ended: false }
    }

    /// Hands a worker's events to their streams. Answers with the requests that nobody here wants (any
    /// more): the worker should cancel them.
    pub fn deliver(&self, events: Vec<TokenEvent>, from: &WorkerLink) -> Vec<RequestId> {
        let mut unwanted = Vec::new();
        let mut streams = self.inner.streams.lock();
        for event in events {
            let Some(entry) = streams.get_mut(&event.request) else {
                // Its stream was dropped, was cut or never was here. Last events need no answer.
                let open = !self.inner.closed.load(Ordering::Relaxed);
                if open && !is_last(&event.body) && unwanted.last() != Some(&event.request) {
                    unwanted.push(event.request);
                }
                continue;
            };
            if entry.is_cancelled && event.body == EventBody::Accepted {
                unwanted.push(event.request.clone());
            }
            match entry.take(event, from) {
                Taken::Kept => {}
                Taken::Last(event) => end(&mut streams, event),
                Taken::Broken(event) => {
                    tracing::warn!(request = %event.request, "events of a stream were lost; failing it");
                    unwanted.push(event.request.clone());
                    end(&mut streams, event);
                }
                Taken::Slow(event) => {
                    self.inner.metrics.slow_streams_cut.inc();
                    tracing::info!(request = %event.request, "client reads too slowly; stream cut");
                    unwanted.push(event.request.clone());
                    end(&mut streams, event);
                }
            }
        }
        unwanted
    }

    /// Has the worker of a request stop; the stream goes on to its end. `false`: there is no such stream.
    pub fn cancel(&self, request: &RequestId) -> bool {
        let mut streams = self.inner.streams.lock();
        let Some(entry) = streams.get_mut(request) else { return false };
        // A worker that is not known yet will be told when its `Accepted` arrives.
        entry.is_cancelled = true;
        if let Some(worker) = &entry.worker {
            worker.cancel(request);
        }
        true
    }

    /// Ends the stream of a request that was cancelled before any worker took it.
    pub fn withdrawn(&self, request: &RequestId) {
        let mut streams = self.inner.streams.lock();
        let seq = streams.get(request).map_or(0, |entry| entry.seq_next);
        let body = EventBody::Finished { reason: FinishReason::Cancelled, usage: Usage::default() };
        end(&mut streams, TokenEvent { request: request.clone(), seq, body });
    }

    /// The connection to a worker is gone: every stream that it served fails.
    pub fn link_lost(&self, link: &WorkerLink) {
        let mut streams = self.inner.streams.lock();
        let served = |entry: &Entry| entry.worker.as_ref().is_some_and(|worker| worker.is(link));
        let lost: Vec<_> = streams.iter().filter(|(_, entry)| served(entry)).map(|(id, _)| id.clone()).collect();
        for request in lost {
            let seq = streams[&request].seq_next;
            end(&mut streams, failed(request, seq, FailureCode::WorkerLost, "the connection to the worker was lost"));
        }
    }

    /// Fails every open stream: the last resort of a drain. Workers are not told to cancel, for what they
    /// cancel they bill; they end these requests free of charge when the connection closes.
    pub fn fail_all(&self, code: FailureCode, message: &str) {
        let mut open = self.inner.streams.lock();
        self.inner.closed.store(true, Ordering::Relaxed);
        let streams = std::mem::take(&mut *open);
        drop(open);
        for (request, entry) in streams {
            *entry.ending.lock() = Some(failed(request, entry.seq_next, code, message));
        }
    }

    /// The requests whose streams are open, for renewing their holds and for drain.
    pub fn open_requests(&self) -> Vec<RequestId> {
        self.inner.streams.lock().keys().cloned().collect()
    }

    pub fn open_count(&self) -> usize {
        self.inner.streams.lock().len()
    }
}

enum Taken {
    Kept,
    Last(TokenEvent),
    /// A sequence number was skipped.
    Broken(TokenEvent),
    /// The reader's buffer is full.
    Slow(TokenEvent),
}

impl Entry {
    fn take(&mut self, event: TokenEvent, from: &WorkerLink) -> Taken {
        if let EventBody::Failed { .. } = event.body {
            // Failures also come from whoever finds an expired claim, who does not know the sequence.
            if let Some(worker) = self.worker.as_ref().filter(|worker| !worker.is(from)) {
                worker.cancel(&event.request);
            }
            return Taken::Last(event);
        }
        if self.worker.as_ref().is_none_or(|worker| !worker.is(from)) {
            self.worker = Some(from.clone());
        }
        if event.seq < self.seq_next {
            return Taken::Kept; // a repeat; it was delivered already
        }
        if event.seq > self.seq_next {
            let why = "events of the stream were lost";
            return Taken::Broken(failed(event.request, self.seq_next, FailureCode::WorkerLost, why));
        }
        self.seq_next += 1;
        if is_last(&event.body) {
            return Taken::Last(event);
        }
        match self.events.try_send(event) {
            Ok(()) => Taken::Kept,
            Err(mpsc::error::TrySendError::Full(event) | mpsc::error::TrySendError::Closed(event)) => {
                let why = "the client read too slowly";
                Taken::Slow(failed(event.request, event.seq, FailureCode::SlowConsumer, why))
            }
        }
    }
}

/// Removing the entry drops its sender: the reader sees what is buffered, then the last event.
fn end(streams: &mut HashMap<RequestId, Entry>, event: TokenEvent) {
    if let Some(entry) = streams.remove(&event.request) {
        *entry.ending.lock() = Some(event);
    }
}

fn is_last(body: &EventBody) -> bool {
    matches!(body, EventBody::Finished { .. } | EventBody::Failed { .. })
}

fn failed(request: RequestId, seq: u32, code: FailureCode, message: &str) -> TokenEvent {
    TokenEvent { request, seq, body: EventBody::Failed { code, message: message.to_owned() } }
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
            failed(self.request.clone(), u32::MAX, FailureCode::WorkerLost, "the stream ended without an answer")
        }))
    }
}

impl Drop for ReplyStream {
    fn drop(&mut self) {
        let Some(hub) = self.hub.upgrade() else { return };
        let mut streams = hub.streams.lock();
        let mine = streams.get(&self.request).is_some_and(|entry| Arc::ptr_eq(&entry.ending, &self.ending));
        if !mine {
            return; // it had ended
        }
        let entry = streams.remove(&self.request);
        drop(streams);
        // A worker that is not known yet will be told when its `Accepted` arrives.
        if let Some(worker) = entry.and_then(|entry| entry.worker) {
            worker.cancel(&self.request);
        }
    }
}

/// The way back to a worker: how an edge tells it to stop working on a request.
///
/// What waits here is bounded by the requests that the worker itself claimed: each is cancelled once.
#[derive(Clone)]
pub struct WorkerLink {
    inner: Arc<Link>,
}

struct Link {
    id: u64,
    cancels: Mutex<Vec<RequestId>>,
    wake: Notify,
}

impl WorkerLink {
    /// A link and the end that reads its cancellations.
    pub fn new() -> (Self, Cancellations) {
        static LINKS: AtomicU64 = AtomicU64::new(0);
        let id = LINKS.fetch_add(1, Ordering::Relaxed);
        let inner = Arc::new(Link { id, cancels: Mutex::default(), wake: Notify::new() });
        (Self { inner: Arc::clone(&inner) }, Cancellations { inner })
    }

    /// Never waits.
    pub fn cancel(&self, request: &RequestId) {
        self.inner.cancels.lock().push(request.clone());
        self.inner.wake.notify_one();
    }

    pub fn is(&self, other: &Self) -> bool {
        self.inner.id == other.inner.id
    }
}

/// The worker's end of a [`WorkerLink`].
pub struct Cancellations {
    inner: Arc<Link>,
}

impl Cancellations {
    /// Everything cancelled since the last call; waits until there is something. Cancel-safe.
    pub async fn next(&mut self) -> Vec<RequestId> {
        loop {
            let waiting = std::mem::take(&mut *self.inner.cancels.lock());
            if !waiting.is_empty() {
                return waiting;
            }
            self.inner.wake.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{FinishReason, Usage};

    fn hub(buffer_events: usize) -> ReplyHub {
        ReplyHub::new(NodeId::from("node_edge"), buffer_events, None, Arc::new(Metrics::new()))
    }

    fn event(request: &RequestId, seq: u32, body: EventBody) -> TokenEvent {
        TokenEvent { request: request.clone(), seq, body }
    }

    fn delta(request: &RequestId, seq: u32) -> TokenEvent {
        event(request, seq, EventBody::text(seq.to_string(), 1))
    }

    fn finished(request: &RequestId, seq: u32) -> TokenEvent {
        event(request, seq, EventBody::Finished { reason: FinishReason::Stop, usage: Usage::default() })
    }

    async fn rest(mut stream: ReplyStream) -> Vec<TokenEvent> {
        let mut events = Vec::new();
        while let Some(event) = stream.next().await {
            events.push(event);
        }
        events
    }

    #[tokio::test]
    async fn a_stream_yields_its_events_in_order_and_ends() {
        let (hub, request, (link, _cancels)) = (hub(8), RequestId::from("r"), WorkerLink::new());
        let stream = hub.open(&request);
        let events = vec![event(&request, 0, EventBody::Accepted), delta(&request, 1), finished(&request, 2)];
        assert!(hub.deliver(events.clone(), &link).is_empty());
        assert_eq!(hub.open_count(), 0);
        assert_eq!(rest(stream).await, events);
    }

    #[tokio::test]
    async fn a_repeated_event_is_delivered_once_and_a_gap_fails_the_stream() {
        let (hub, request, (link, _cancels)) = (hub(8), RequestId::from("r"), WorkerLink::new());
        let stream = hub.open(&request);
        let _ =
            hub.deliver(vec![event(&request, 0, EventBody::Accepted), delta(&request, 1), delta(&request, 1)], &link);
        assert_eq!(hub.deliver(vec![delta(&request, 3)], &link), std::slice::from_ref(&request));
        let events = rest(stream).await;
        assert_eq!(events.len(), 3);
        assert!(matches!(events[2].body, EventBody::Failed { code: FailureCode::WorkerLost, .. }));
    }

    #[tokio::test]
    async fn a_reader_that_lags_behind_is_cut_and_its_worker_told_to_stop() {
        let (hub, slow, brisk) = (hub(2), RequestId::from("slow"), RequestId::from("brisk"));
        let (link, _cancels) = WorkerLink::new();
        let (slow_stream, mut brisk_stream) = (hub.open(&slow), hub.open(&brisk));
        for seq in 0..4 {
            let unwanted = hub.deliver(vec![delta(&slow, seq), delta(&brisk, seq)], &link);
            let expected = if seq >= 2 { vec![slow.clone()] } else { vec![] };
            assert_eq!(unwanted, expected);
            assert_eq!(brisk_stream.next().await.unwrap().seq, seq);
        }
        let events = rest(slow_stream).await;
        assert_eq!(events.len(), 3);
        assert!(matches!(events[2].body, EventBody::Failed { code: FailureCode::SlowConsumer, .. }));
        assert_eq!(hub.inner.metrics.slow_streams_cut.get(), 1);
    }

    #[tokio::test]
    async fn dropping_a_stream_cancels_at_its_worker_or_at_whoever_accepts_later() {
        let (hub, known, queued) = (hub(8), RequestId::from("known"), RequestId::from("queued"));
        let (link, mut cancels) = WorkerLink::new();
        let (known_stream, queued_stream) = (hub.open(&known), hub.open(&queued));
        let _ = hub.deliver(vec![event(&known, 0, EventBody::Accepted)], &link);
        drop(known_stream);
        drop(queued_stream);
        assert_eq!(cancels.next().await, [known]);
        assert_eq!(hub.deliver(vec![event(&queued, 0, EventBody::Accepted)], &link), [queued]);
    }

    #[tokio::test]
    async fn a_stream_that_ended_is_not_cancelled() {
        let (hub, request, (link, cancels)) = (hub(8), RequestId::from("r"), WorkerLink::new());
        let stream = hub.open(&request);
        let _ = hub.deliver(vec![event(&request, 0, EventBody::Accepted), finished(&request, 1)], &link);
        drop(stream);
        assert!(cancels.inner.cancels.lock().is_empty());
    }

    #[tokio::test]
    async fn a_lost_link_fails_its_own_streams_only() {
        let (hub, mine, other) = (hub(8), RequestId::from("mine"), RequestId::from("other"));
        let ((link, _c1), (link_other, _c2)) = (WorkerLink::new(), WorkerLink::new());
        let (stream, _other_stream) = (hub.open(&mine), hub.open(&other));
        let _ = hub.deliver(vec![event(&mine, 0, EventBody::Accepted)], &link);
        let _ = hub.deliver(vec![event(&other, 0, EventBody::Accepted)], &link_other);
        hub.link_lost(&link);
        assert!(matches!(
            rest(stream).await.last().unwrap().body,
            EventBody::Failed { code: FailureCode::WorkerLost, .. }
        ));
        assert_eq!(hub.open_requests(), [other]);
    }

    #[tokio::test]
    async fn a_failure_found_by_another_node_ends_the_stream_and_cancels_the_worker_that_had_it() {
        let (hub, request) = (hub(8), RequestId::from("r"));
        let ((worker, mut cancels), (reaper, _none)) = (WorkerLink::new(), WorkerLink::new());
        let stream = hub.open(&request);
        let _ = hub.deliver(vec![event(&request, 0, EventBody::Accepted)], &worker);
        let _ = hub.deliver(vec![failed(request.clone(), u32::MAX, FailureCode::WorkerFailed, "lease")], &reaper);
        assert_eq!(cancels.next().await, [request]);
        assert_eq!(rest(stream).await.len(), 2);
    }
}
