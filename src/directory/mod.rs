//! Who is in the cluster: a card for each node, under a lease, and on it what its actors say of themselves.
//!
//! Promises that a node that is gone shows as lost once its lease has run out, and not at all some time later, and that
//! the store's clock alone decides. Nothing is decided by what stands here: claims, leases and connections have their own
//! fences, and this is for people and dashboards to look at.

mod board;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use board::{Actor, ActorState, Board, Mailbox};

use crate::{
    domain::{ModelId, NodeId},
    store::{Function, Reply, Store, StoreError, keys},
};

/// How long a lost node is remembered.
const REMEMBERED: Duration = Duration::from_secs(600);
/// Nodes that one call reads at most.
const READ_AT_ONCE: usize = 256;

/// What a node says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeCard {
    pub node: NodeId,
    /// The machine's name.
    pub host: String,
    pub role: String,
    pub version: String,
    pub started_unix_ms: u64,
    pub state: NodeState,
    /// Where clients reach it, or those who look after it.
    pub http: Option<String>,
    /// Where workers bring an edge its tokens.
    pub relay: Option<String>,
    /// Requests of its clients; 0 for one that is no edge.
    pub open_streams: usize,
    /// Those that it runs.
    pub models: Vec<ModelCard>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub actors: Vec<ActorCard>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    Ready,
    /// Serves, but not all that it should.
    Degraded,
    /// Takes on nothing more.
    Draining,
    /// Has not renewed its lease.
    Lost,
}

/// One model on one node, and what it has to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelCard {
    pub model: ModelId,
    /// As its pool says it.
    pub state: ActorState,
    /// Execution providers, in order of preference.
    pub device: String,
    /// Sequences that run side by side at most.
    pub sequences_max: usize,
    /// Requests that it has claimed and not ended.
    pub claimed: usize,
    pub running: usize,
    pub waiting: usize,
    pub kv_blocks_used: usize,
    pub kv_blocks_total: usize,
}

/// One actor, by its place in the tree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ActorCard {
    /// The names from the root to it, with `/` between them.
    pub actor: String,
    pub state: ActorState,
    /// Since when it is in this state.
    pub since_unix_ms: u64,
    /// When it last made progress.
    pub beat_unix_ms: u64,
    pub restarts: u64,
    pub last_fault: Option<String>,
    /// What waits in its mailbox, how much may, and what was refused for want of room.
    pub mailbox: Option<MailboxCard>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MailboxCard {
    pub waiting: usize,
    pub max: usize,
    pub refused: u64,
}

/// A card, and how good it is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Listed {
    #[serde(flatten)]
    pub card: NodeCard,
    /// Of the lease; below 0 since it ran out.
    pub lease_left_ms: i64,
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Directory {
    store: Store,
    lease: Duration,
}

impl Directory {
    /// A node that has not announced itself for `lease` is lost.
    pub fn new(store: Store, lease: Duration) -> Self {
        Self { store, lease }
    }

    pub fn lease(&self) -> Duration {
        self.lease
    }

    /// Says, for the time of a lease, that a node is there.
    pub async fn announce(&self, card: &NodeCard) -> Result<(), StoreError> {
        let damaged = |error: serde_json::Error| StoreError::Damaged(format!("card of {}: {error}", card.node));
        let text = serde_json::to_vec(card).map_err(damaged)?;
        let (lease, kept) = (self.lease.as_millis().to_string(), REMEMBERED.as_millis().to_string());
        let arguments = [card.node.as_str().as_bytes(), lease.as_bytes(), &text, kept.as_bytes()];
        let reply: Reply = self.store.call(Function::NodeAnnounce, &keys::nodes(), &arguments).await?;
        done(&reply, "announced", "announce")
    }

    /// The node goes in order, and is not lost.
    pub async fn leave(&self, node: &NodeId) -> Result<(), StoreError> {
        let reply: Reply = self.store.call(Function::NodeLeave, &keys::nodes(), &[node.as_str().as_bytes()]).await?;
        done(&reply, "left", "leave")
    }

    /// All nodes, those that were lost lately among them, by their ids. One whose card this version cannot read is left
    /// out and logged.
    pub async fn list(&self) -> Result<Vec<Listed>, StoreError> {
        let mut listed = Vec::new();
        let mut behind = String::new();
        loop {
            let count = READ_AT_ONCE.to_string();
            let arguments = [behind.as_bytes(), count.as_bytes()];
            let page: Vec<(String, i64, Vec<u8>)> =
                self.store.call(Function::NodeList, &keys::nodes(), &arguments).await?;
            let is_last = page.len() < READ_AT_ONCE;
            for (node, lease_left_ms, text) in page {
                match serde_json::from_slice::<NodeCard>(&text) {
                    Ok(mut card) => {
                        if lease_left_ms < 0 {
                            card.state = NodeState::Lost;
                        }
                        listed.push(Listed { card, lease_left_ms });
                    }
                    Err(error) => tracing::warn!(node, %error, "the card of a node cannot be read"),
                }
                behind = node;
            }
            if is_last {
                return Ok(listed);
            }
        }
    }
}

fn done(reply: &Reply, word: &str, what: &'static str) -> Result<(), StoreError> {
    if reply.word() == word { Ok(()) } else { Err(reply.unexpected(what)) }
}
