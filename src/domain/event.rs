//! What a worker tells the edge about one request.

use serde::{Deserialize, Serialize};

use super::{RequestId, Usage};

/// One event of one request. `seq` counts from 0 without gaps, so that a lost or repeated event is seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenEvent {
    pub request: RequestId,
    pub seq: u32,
    pub body: EventBody,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum EventBody {
    /// A worker has claimed the request. Always `seq` 0.
    Accepted,
    /// The next of the prompt's tokens, from its second one on, where the request wants to know of them.
    Prompt { tokens: Vec<TokenDetail> },
    /// Decoded text of one choice. `tokens` counts the tokens behind it; a token that ends in the middle of a UTF-8
    /// character, or that may be the start of a stop string, is counted with the text that completes it.
    Delta { choice: u32, text: String, tokens: u32, details: Vec<TokenDetail> },
    /// One choice is complete.
    ChoiceEnded { choice: u32, reason: FinishReason, stopped_by: Option<StoppedBy> },
    /// The last event of a request that ended well. It has been settled.
    Finished { reason: FinishReason, usage: Usage },
    /// The last event of a request that failed. Nothing was charged, but for [`FailureCode::SlowConsumer`] and
    /// [`FailureCode::WorkerLost`].
    Failed { code: FailureCode, message: String },
}

impl EventBody {
    /// Text of the first choice, of so many tokens.
    pub fn text(text: impl Into<String>, tokens: u32) -> Self {
        Self::Delta { choice: 0, text: text.into(), tokens, details: Vec::new() }
    }
}

/// A token, by its id.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenDetail {
    pub token: u32,
    /// Natural logarithm of the probability that the model gave it, before anything was done to its logits. 0 where
    /// nobody asked.
    pub logprob: f32,
    /// Its place among all tokens; 1 is the likeliest.
    pub rank: u32,
    /// The likeliest tokens and their logprobs, in that order.
    pub top: Vec<(u32, f32)>,
    /// It ended the answer, or came behind its end, and the text has nothing of it.
    pub is_hidden: bool,
}

/// What stopped a choice that did not stop by the model's own end of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StoppedBy {
    Text(String),
    Token(u32),
    /// Its last paid token: the choice might have gone on.
    Funds(FundsEnd),
}

/// Why no more tokens could be paid for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FundsEnd {
    Balance,
    SpendLimit,
}

impl FundsEnd {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Balance => "balance",
            Self::SpendLimit => "spend_limit",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    Stop,
    Length,
    /// The client went away; nobody is there to read it, but the ledger names it.
    Cancelled,
}

impl FinishReason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The engine failed, in a process that lives: free, and the client may try again.
    WorkerFailed,
    /// The process that had the request is gone. What it had decoded, as far as its journal says, is charged.
    WorkerLost,
    /// The request waited longer than its deadline and was never started.
    DeadlineExceeded,
    /// The node is going away and could not finish in its grace period.
    Draining,
    /// The client read too slowly and its bounded buffer overflowed. What was decoded is charged, as for a
    /// client that goes away.
    SlowConsumer,
}
