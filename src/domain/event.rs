//! What a worker tells the edge about one request.

use serde::{Deserialize, Serialize};

use super::{RequestId, Usage};

/// One event of one request. `seq` counts from 0 without gaps, so that a lost or repeated event is seen; anew in each
/// attempt, of which only the latest is heard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenEvent {
    pub request: RequestId,
    /// Of the claim that it comes from.
    pub attempt: u32,
    pub seq: u32,
    pub body: EventBody,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum EventBody {
    /// A worker has claimed the request. Always `seq` 0.
    Accepted,
    /// The next of the prompt's tokens, from its second one on, where the request wants to know of them.
    Prompt { tokens: Vec<TokenDetail> },
    /// Decoded text of one choice, and the ids of the tokens behind it. A token that ends in the middle of a UTF-8
    /// character, or that may be the start of a stop string, comes with the text that completes it; all are told of by
    /// the end of the choice.
    Delta { choice: u32, text: String, ids: Vec<u32>, details: Vec<TokenDetail> },
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
        Self::Delta { choice: 0, text: text.into(), ids: (0..tokens).collect(), details: Vec::new() }
    }
}

/// What the client of a request has been told of its answer: where another worker goes on with it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Told {
    /// Tokens of the prompt that were told of.
    pub prompt_tokens: u32,
    /// Those choices of which something was told, each at its own place.
    pub choices: Vec<ToldChoice>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ToldChoice {
    pub ids: Vec<u32>,
    /// Length of its text. It may be longer than that of the tokens alone, for what comes behind a text can decide that
    /// it is no beginning of a stop string.
    pub text_bytes: u32,
    pub ended: Option<(FinishReason, Option<StoppedBy>)>,
}

impl Told {
    /// Adds what an event tells.
    pub fn add(&mut self, body: &EventBody) {
        match body {
            EventBody::Prompt { tokens } => self.prompt_tokens += tokens.len() as u32,
            EventBody::Delta { choice, text, ids, .. } => {
                let choice = self.choice(*choice);
                choice.ids.extend_from_slice(ids);
                choice.text_bytes += text.len() as u32;
            }
            EventBody::ChoiceEnded { choice, reason, stopped_by } => {
                self.choice(*choice).ended = Some((*reason, stopped_by.clone()));
            }
            EventBody::Accepted | EventBody::Finished { .. } | EventBody::Failed { .. } => {}
        }
    }

    /// Tokens of all choices together.
    pub fn tokens(&self) -> u32 {
        self.choices.iter().map(|choice| choice.ids.len() as u32).sum()
    }

    fn choice(&mut self, choice: u32) -> &mut ToldChoice {
        let at = choice as usize;
        if self.choices.len() <= at {
            self.choices.resize_with(at + 1, ToldChoice::default);
        }
        &mut self.choices[at]
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
    /// Every worker that had the request was lost while it had it: free, and it is not tried again.
    AttemptsExhausted,
    /// The node is going away and could not finish in its grace period.
    Draining,
    /// The client read too slowly and its bounded buffer overflowed. What was decoded is charged, as for a
    /// client that goes away.
    SlowConsumer,
}
