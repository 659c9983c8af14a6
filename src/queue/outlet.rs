//! The worker's way out: token events to the edge that each request came from.
//!
//! Promises that sending never waits, whichever edge is slow, and that whatever edges have to say of a request (its
//! client left, where to go on, somebody else has it, the edge itself is out of reach) comes back as an [`Order`]. Never
//! keeps an event for later.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{
    relay::{Dialer, FeedbackSink, Pace, Secret},
    reply::{Feedback, Feedbacks, ReplyHub, WorkerLink},
};
use crate::domain::{Claim, NodeId, TokenEvent};

/// One event and the claim that says where it goes.
pub struct Outgoing {
    pub claim: Arc<Claim>,
    pub event: TokenEvent,
}

/// What a worker hears of edges.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    Told(Feedback),
    /// Nothing reaches that edge any more.
    EdgeLost(NodeId),
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Outlet {
    inner: Arc<Inner>,
}

struct Inner {
    /// The edge of the same process.
    local: Option<(ReplyHub, WorkerLink)>,
    /// Edges of other processes.
    dialer: Option<Dialer>,
    orders: Arc<Inbox>,
}

impl Outlet {
    /// `hub` is the edge of this process, `relay` the way to those of others; either may be absent.
    pub fn new(node: NodeId, hub: Option<ReplyHub>, relay: Option<(Secret, Pace)>) -> (Self, Orders) {
        let inbox = Arc::new(Inbox::default());
        let (link, feedbacks) = WorkerLink::new();
        let dialer = relay.map(|(secret, pace)| Dialer::new(node, secret, pace, inbox.clone()));
        let local = hub.map(|hub| (hub, link));
        let inner = Arc::new(Inner { local, dialer, orders: Arc::clone(&inbox) });
        (Self { inner }, Orders { inbox, feedbacks })
    }

    /// Sends the events of one step. Never waits.
    pub fn send(&self, batch: Vec<Outgoing>) {
        // A step has few edges, so that a list beats a map.
        let mut edges: Vec<(Arc<Claim>, Vec<TokenEvent>)> = Vec::new();
        for Outgoing { claim, event } in batch {
            match edges.iter_mut().find(|(first, _)| first.job.reply_to.node == claim.job.reply_to.node) {
                Some((_, events)) => events.push(event),
                None => edges.push((claim, vec![event])),
            }
        }
        for (claim, events) in edges {
            let to = &claim.job.reply_to;
            match (&self.inner.local, &self.inner.dialer, &to.relay) {
                (Some((hub, link)), _, _) if *hub.node() == to.node => {
                    self.inner.orders.heard(hub.deliver(events, link));
                }
                (_, Some(dialer), Some(address)) => dialer.send(&to.node, address, events),
                _ => {
                    tracing::warn!(edge = %to.node, "there is no way to this edge");
                    self.inner.orders.edge_lost(&to.node);
                }
            }
        }
    }

    /// Sends what is queued and closes the connections.
    pub async fn close(&self, limit: Duration) {
        if let Some(dialer) = &self.inner.dialer {
            dialer.close(limit).await;
        }
    }
}

/// Bounded by the requests that this node has claimed and the edges that they came from.
#[derive(Default)]
struct Inbox {
    orders: Mutex<Vec<Order>>,
    wake: Notify,
}

impl Inbox {
    fn push(&self, orders: impl IntoIterator<Item = Order>) {
        self.orders.lock().extend(orders);
        self.wake.notify_one();
    }
}

impl FeedbackSink for Inbox {
    fn heard(&self, feedback: Vec<Feedback>) {
        if !feedback.is_empty() {
            self.push(feedback.into_iter().map(Order::Told));
        }
    }

    fn edge_lost(&self, edge: &NodeId) {
        self.push([Order::EdgeLost(edge.clone())]);
    }
}

/// The reading end of an outlet's orders; there is one.
pub struct Orders {
    inbox: Arc<Inbox>,
    feedbacks: Feedbacks,
}

impl Orders {
    /// Everything since the last call; waits until there is something. Cancel-safe.
    pub async fn next(&mut self) -> Vec<Order> {
        loop {
            let waiting = std::mem::take(&mut *self.inbox.orders.lock());
            if !waiting.is_empty() {
                return waiting;
            }
            tokio::select! {
                feedback = self.feedbacks.next() => return feedback.into_iter().map(Order::Told).collect(),
                () = self.inbox.wake.notified() => {}
            }
        }
    }
}
