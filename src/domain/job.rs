//! A chat request on its way from the edge through the queue to a worker.

use serde::{Deserialize, Serialize};

use super::{KeyId, ModelId, NanoUsd, NodeId, Price, RequestId, TenantId};

/// How the next token is chosen. Validated at the edge; ranges as in the wire contract.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    pub min_p: f32,
    /// Random numbers are a function of (seed, position), so the same seed repeats the same text.
    pub seed: u64,
}

/// Who goes first where requests wait for a place in a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Priority {
    Low,
    #[default]
    Normal,
    High,
}

impl Priority {
    /// The class above; the highest stays.
    pub fn next(self) -> Self {
        match self {
            Self::Low => Self::Normal,
            Self::Normal | Self::High => Self::High,
        }
    }
}

/// Where the tokens of a request go: the edge that holds the client's connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ReplyTo {
    pub node: NodeId,
    /// `host:port` of that edge's relay listener; `None` where only workers of its own process serve it.
    pub relay: Option<String>,
}

/// An admitted request as it stands in the queue: everything that a worker needs, and what it will cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    pub request: RequestId,
    pub tenant: TenantId,
    pub key: KeyId,
    pub model: ModelId,
    /// Rendered and tokenised at the edge.
    pub prompt: Vec<u32>,
    pub output_tokens_max: u32,
    pub sampling: SamplingParams,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    /// Of the tenant's requests, only those of one salt share what has been computed of their prompts.
    pub cache_salt: String,
    pub priority: Priority,
    pub price: Price,
    pub price_version: String,
    /// Money set aside at admission: the prompt plus `output_tokens_max` at `price`.
    pub hold: NanoUsd,
    pub reply_to: ReplyTo,
    pub enqueued_unix_ms: u64,
    /// A request that has not been claimed by then is refused, not served late.
    pub deadline_unix_ms: u64,
}

/// A job that a worker has taken, with the fence that its renewals and its acknowledgement must show.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Claim {
    pub job: Job,
    pub owner: NodeId,
    /// 1 for the first delivery.
    pub attempt: u32,
}
