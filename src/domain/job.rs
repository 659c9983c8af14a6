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
    /// Taken from a token's logit for each time that the answer has it.
    pub frequency_penalty: f32,
    /// Taken from a token's logit once the answer has it.
    pub presence_penalty: f32,
    /// Positive logits of tokens that prompt or answer have are divided by it, negative ones multiplied; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Only these tokens may come; `None` is all.
    pub allowed_tokens: Option<Vec<u32>>,
    /// Sequences of tokens, of which the last is never chosen after the others.
    pub bad_words: Vec<Vec<u32>>,
    /// Nothing that ends the answer is chosen before so many tokens.
    pub min_tokens: u32,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            allowed_tokens: None,
            bad_words: Vec::new(),
            min_tokens: 0,
        }
    }
}

/// What ends an answer, beside its length.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stops {
    /// Behind this text nothing stops the answer; empty where there is no such text.
    pub until: String,
    pub strings: Vec<String>,
    pub tokens: Vec<u32>,
    /// Whether the answer's text has what stopped it.
    pub are_shown: bool,
    /// The model's own end of an answer is a token like any other.
    pub ignore_eos: bool,
}

/// What is told of an answer's tokens beside their text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Telling {
    /// Each token's logprob, and those of so many of the likeliest.
    pub logprobs: Option<u32>,
    /// The same of the prompt's tokens.
    pub prompt_logprobs: Option<u32>,
    pub token_ids: bool,
    /// The text has the spelling of control tokens.
    pub control_text: bool,
}

impl Telling {
    /// Whether the answer's tokens are told of one by one.
    pub fn tells_tokens(&self) -> bool {
        self.logprobs.is_some() || self.token_ids
    }
}

/// What an answer's text must match, as `llguidance` reads it: a JSON of grammars of which the first is the start.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GrammarSource(pub String);

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
    /// Of each choice.
    pub output_tokens_max: u32,
    /// Answers to the one prompt; at least 1.
    pub choices: u32,
    pub sampling: SamplingParams,
    pub stops: Stops,
    pub telling: Telling,
    pub grammar: Option<GrammarSource>,
    /// Of the tenant's requests, only those of one salt share what has been computed of their prompts.
    pub cache_salt: String,
    pub priority: Priority,
    pub price: Price,
    pub price_version: String,
    /// Money set aside at admission, for the prompt and the first tokens of the answer; it grows as the answer does.
    pub hold: NanoUsd,
    /// Output tokens that it covers at first, of all choices together.
    pub allowed_tokens: u32,
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
    /// Workers that were lost with it before.
    pub losses: u32,
}
