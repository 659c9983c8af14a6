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
    /// Decoded text. `tokens` counts the tokens behind it; a token that ends in the middle of a UTF-8
    /// character, or that may be the start of a stop string, is counted with the text that completes it.
    Delta { text: String, tokens: u32 },
    /// The last event of a request that ended well. It has been settled.
    Finished { reason: FinishReason, usage: Usage },
    /// The last event of a request that failed. Nothing was charged, but for [`FailureCode::SlowConsumer`].
    Failed { code: FailureCode, message: String },
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
    /// The worker died or its engine failed: the client may try again.
    WorkerFailed,
    /// The request waited longer than its deadline and was never started.
    DeadlineExceeded,
    /// The node is going away and could not finish in its grace period.
    Draining,
    /// The client read too slowly and its bounded buffer overflowed. What was decoded is charged, as for a
    /// client that goes away.
    SlowConsumer,
}
