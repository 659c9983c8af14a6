//! The worker's end: one connection for each edge, made when the first event for it is sent.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{SinkExt, StreamExt};
use parking_lot::Mutex;
use tokio::{
    net::TcpStream,
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Pace, RelayError, Secret,
    wire::{Hearing, ToEdge, Wire, decode, encode, frame_length, introduce, within},
};
use crate::{
    domain::{NodeId, TokenEvent},
    queue::reply::Feedback,
};

/// Batches (one an engine step) that may wait for one edge. An edge that lets more pile up is cut off.
const QUEUE_BATCHES_MAX: usize = 1024;
const DIAL_ATTEMPTS: u32 = 3;
const DIAL_PAUSE: Duration = Duration::from_millis(100);

/// Takes what comes back from edges. Implementations must not wait.
pub trait FeedbackSink: Send + Sync + 'static {
    fn heard(&self, feedback: Vec<Feedback>);
    /// Nothing can be sent to that edge any more.
    fn edge_lost(&self, edge: &NodeId);
}

/// All connections of one worker process. Cheap to clone.
#[derive(Clone)]
pub struct Dialer {
    inner: Arc<Inner>,
}

struct Inner {
    node: NodeId,
    secret: Secret,
    pace: Pace,
    links: Mutex<HashMap<NodeId, Link>>,
    feedback: Arc<dyn FeedbackSink>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

struct Link {
    id: u64,
    batches: mpsc::Sender<Vec<TokenEvent>>,
    cut: CancellationToken,
}

impl Dialer {
    pub fn new(node: NodeId, secret: Secret, pace: Pace, feedback: Arc<dyn FeedbackSink>) -> Self {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        Self { inner: Arc::new(Inner { node, secret, pace, links: Mutex::default(), feedback, tasks, stop }) }
    }

    /// Queues events for an edge, dialling it if need be. Never waits: an edge whose queue is full is
    /// reported lost.
    pub fn send(&self, edge: &NodeId, address: &str, events: Vec<TokenEvent>) {
        let mut links = self.inner.links.lock();
        let link = links.entry(edge.clone()).or_insert_with(|| self.dial(edge, address));
        match link.batches.try_send(events) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                tracing::warn!(%edge, "the edge does not take its tokens; cutting the connection");
                link.cut.cancel(); // its task reports the loss
            }
            Err(mpsc::error::TrySendError::Closed(_)) => {
                // The connection has just ended. Hearing of the loss twice is harmless, never is not.
                links.remove(edge);
                drop(links);
                self.inner.feedback.edge_lost(edge);
            }
        }
    }

    /// Sends what is queued, then closes every connection.
    pub async fn close(&self, limit: Duration) {
        self.inner.links.lock().clear();
        self.inner.tasks.close();
        if tokio::time::timeout(limit, self.inner.tasks.wait()).await.is_err() {
            self.inner.stop.cancel();
            self.inner.tasks.wait().await;
        }
    }

    fn dial(&self, edge: &NodeId, address: &str) -> Link {
        static LINKS: AtomicU64 = AtomicU64::new(0);
        let id = LINKS.fetch_add(1, Ordering::Relaxed);
        let (sender, batches) = mpsc::channel(QUEUE_BATCHES_MAX);
        let cut = self.inner.stop.child_token();
        let (inner, edge, address, stop) = (Arc::clone(&self.inner), edge.clone(), address.to_owned(), cut.clone());
        self.inner.tasks.spawn(async move {
            let result = tokio::select! {
                result = inner.serve(&edge, &address, batches) => result,
                () = stop.cancelled() => Err(RelayError::Closed),
            };
            let mut links = inner.links.lock();
            if links.get(&edge).is_some_and(|link| link.id == id) {
                links.remove(&edge);
            }
            drop(links);
            if let Err(error) = result {
                tracing::warn!(%edge, %error, "the connection to an edge ended");
                inner.feedback.edge_lost(&edge);
            }
        });
        Link { id, batches: sender, cut }
    }
}

impl Inner {
    async fn serve(
        &self,
        edge: &NodeId,
        address: &str,
        batches: mpsc::Receiver<Vec<TokenEvent>>,
    ) -> Result<(), RelayError> {
        let wire = self.connect(edge, address).await?;
        tracing::info!(%edge, address, "connected to an edge");
        self.pump(wire, batches).await
    }

    async fn connect(&self, edge: &NodeId, address: &str) -> Result<Wire, RelayError> {
        for attempt in 1.. {
            let dialled = within(self.pace.handshake_max, async {
                let connect = |source| RelayError::Connect { address: address.to_owned(), source };
                let stream = TcpStream::connect(address).await.map_err(connect)?;
                introduce(stream, &self.node, edge, &self.secret).await
            });
            match dialled.await {
                // Only a connection that was not made is worth another attempt.
                Err(RelayError::Connect { .. }) if attempt < DIAL_ATTEMPTS => sleep(DIAL_PAUSE * attempt).await,
                done => return done,
            }
        }
        unreachable!("the loop ends by returning")
    }

    async fn pump(&self, wire: Wire, mut batches: mpsc::Receiver<Vec<TokenEvent>>) -> Result<(), RelayError> {
        let (mut sink, mut source) = wire.split();
        let pace = self.pace;
        let write = async {
            let mut alive = interval(pace.alive);
            alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                let mut events = tokio::select! {
                    batch = batches.recv() => match batch {
                        Some(batch) => batch,
                        None => break, // closed in order: everything was sent
                    },
                    _ = alive.tick() => {
                        let frame = encode(&ToEdge::Alive)?;
                        within(pace.silence_max, async { Ok(sink.send(frame).await?) }).await?;
                        continue;
                    }
                };
                while let Ok(batch) = batches.try_recv() {
                    events.extend(batch);
                }
                while !events.is_empty() {
                    let rest = events.split_off(frame_length(&events));
                    let frame = encode(&ToEdge::Events(events))?;
                    within(pace.silence_max, async { Ok(sink.send(frame).await?) }).await?;
                    events = rest;
                }
            }
            within(pace.silence_max, async { Ok(sink.close().await?) }).await
        };
        let read = async {
            let (mut heard, mut hearing) = (Instant::now(), Hearing::default());
            let mut check = interval(pace.alive);
            loop {
                tokio::select! {
                    frame = source.next() => {
                        heard = Instant::now();
                        self.feedback.heard(hearing.hear(decode(&frame.ok_or(RelayError::Closed)??)?)?);
                    }
                    _ = check.tick() => {
                        if heard.elapsed() > pace.silence_max {
                            return Err(RelayError::Silent);
                        }
                    }
                }
            }
        };
        tokio::select! {
            written = write => written,
            read = read => read,
        }
    }
}
