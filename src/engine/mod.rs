//! The engine: continuous batching of many sequences on one model, on one OS thread of its own.
//!
//! Promises: what a request gets does not depend on who else is being served; memory is bounded by the
//! KV block pool and by `sequences_max`; a cancelled request costs at most one more step. Never speaks to
//! the network or to the store, and never knows what a tenant is.
//!
//! The scheduling ([`planner`], [`line`], [`pace`]), what is paid for ([`allowance`]), the KV blocks and what is
//! remembered in them ([`blocks`], [`prefix`]), guessing ([`draft`]), sampling and text assembly are pure. The tensors
//! are behind [`Forward`]: ONNX Runtime for real models, a script for fault tests.

mod allowance;
mod batch;
mod blocks;
mod draft;
mod handle;
mod line;
mod logits;
mod logprobs;
mod masks;
mod memory;
pub mod onnx;
mod pace;
mod planner;
mod prefix;
pub mod quality;
mod runner;
mod sampler;
mod scripted;
mod sequence;
mod simd;
mod text;
mod verify;

use std::sync::Arc;

use tokio::sync::mpsc;

pub use batch::{Batch, BatchSequence, Forward};
pub use handle::{EngineHandle, EngineLoad};
pub use memory::MemoryNeed;
pub use onnx::OnnxRuntime;

use crate::{
    domain::{
        FinishReason, ModelId, Priority, RequestId, SamplingParams, StoppedBy, Stops, Telling, TokenDetail, Usage,
    },
    grammar::Constraint,
    model::{ModelError, ModelFile},
    telemetry::Metrics,
};

/// One choice of a request, as the engine sees it. `prompt` is not empty, and `prompt.len() + output_tokens_max` is
/// at most the context.
#[derive(Clone, Debug)]
pub struct EngineRequest {
    pub request: RequestId,
    pub choice: u32,
    pub prompt: Vec<u32>,
    pub resumed: Resumed,
    pub output_tokens_max: u32,
    pub sampling: SamplingParams,
    pub stops: Stops,
    pub telling: Telling,
    pub constraint: Option<Constraint>,
    pub priority: Priority,
    /// Whose request it is, in whatever sense its owner gives to that: waiting lanes of one class take turns,
    /// and no lane sees, or profits from, what another has computed.
    pub lane: Arc<str>,
    /// Within a lane, only requests of the same salt share what they have computed.
    pub cache_salt: Vec<u8>,
    /// Tokens that all choices of the request may decode together, beside those that are resumed, until more are
    /// allowed; each of them says the same.
    /// See [`EngineHandle::allow`].
    pub allowed_tokens: u32,
    /// When half of so many are left, as many more are asked for. 0: no more will come.
    pub step_tokens: u32,
}

/// What of a choice was decoded, and told of, by another engine: this one goes on behind it, as that one would have.
#[derive(Clone, Debug, Default)]
pub struct Resumed {
    pub tokens: Vec<u32>,
    /// Length of the text that was told of.
    pub text_bytes: u32,
    /// Nothing may follow, by the grammar.
    pub is_complete: bool,
    /// Tokens of the prompt that were told of, where they are to be.
    pub prompt_tokens: u32,
}

/// What the engine tells its owner. One `Step` a step, with the events of all requests.
#[derive(Debug)]
pub enum EngineMessage {
    Step(Vec<EngineEvent>),
    /// Always the last message, whether the engine failed, panicked or was shut down.
    Died(String),
}

#[derive(Debug, PartialEq)]
pub struct EngineEvent {
    pub request: RequestId,
    pub choice: u32,
    pub body: EngineEventBody,
}

#[derive(Debug, PartialEq)]
pub enum EngineEventBody {
    /// The next of the prompt's tokens, from its second one on.
    Prompt { tokens: Vec<TokenDetail> },
    /// The tokens whose text it is the last of; at the end of the choice, all that had not been told of.
    Delta { text: String, ids: Vec<u32>, details: Vec<TokenDetail> },
    /// So many tokens more could be used by the choices of the request, whichever of them tells of it. Told once until
    /// some are allowed.
    NeedsTokens { wanted: u32 },
    Finished {
        reason: FinishReason,
        stopped_by: Option<StoppedBy>,
        usage: Usage,
        /// SHA-256 of the ids of the answer's tokens, each as four bytes, the lowest first.
        digest: [u8; 32],
    },
    /// This request alone cannot be served.
    Failed { message: String },
}

/// What to run and how much of it.
pub struct EngineSpec {
    pub model: ModelId,
    pub file: Arc<ModelFile>,
    pub backend: Backend,
    /// Prompt and output of one sequence together.
    pub context_tokens_max: usize,
    pub sequences_max: usize,
    pub step_tokens_max: usize,
    pub kv_block_tokens: usize,
    pub kv_memory_bytes: usize,
    /// Whether sequences share the KV blocks of a common prefix.
    pub prefix_cache: bool,
    pub speculation: Speculation,
}

/// Whether tokens are guessed ahead and verified together. Shows in speed alone, never in the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speculation {
    Off,
    /// Where guesses have proved right and rows are cheap.
    Auto,
    /// Whatever it costs: to see that it changes nothing.
    Always,
}

pub enum Backend {
    Onnx(OnnxRuntime),
    /// For fault tests only; see [`scripted`].
    Scripted,
}

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("onnx runtime: {0}")]
    Onnx(#[from] ort::Error),
    #[error("ONNX Runtime's library cannot be used ({path}): {reason}")]
    Library { path: String, reason: String },
    #[error("execution provider `{0}` is not available: {1}")]
    Provider(String, String),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("{0}")]
    Limits(String),
    #[error("the engine already has as many requests as it may hold")]
    Full,
    #[error("the engine has stopped")]
    Gone,
}

/// Loads the model and starts its thread. Blocks while loading (seconds): call it where that is allowed.
///
/// The engine waits when `sink` is full, so its reader must never wait for one slow stream.
pub fn spawn(
    spec: EngineSpec,
    sink: mpsc::Sender<EngineMessage>,
    metrics: Arc<Metrics>,
) -> Result<EngineHandle, EngineError> {
    runner::spawn(spec, sink, metrics)
}
