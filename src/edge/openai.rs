//! What answers look like on the wire.

use serde::Serialize;

use crate::domain::{FinishReason, ModelId, RequestId, Usage};

/// Changes whenever the same request and seed might get another answer.
pub const SYSTEM_FINGERPRINT: &str = concat!("lightcone-", env!("CARGO_PKG_VERSION"));
pub const SERVICE_TIER: &str = "default";

#[derive(Serialize)]
pub struct Completion<'a> {
    pub id: &'a RequestId,
    pub object: &'static str,
    pub created: u64,
    pub model: &'a ModelId,
    pub choices: [Choice<'a>; 1],
    pub usage: WireUsage,
    pub service_tier: &'static str,
    pub system_fingerprint: &'static str,
}

#[derive(Serialize)]
pub struct Choice<'a> {
    pub index: u32,
    pub message: AssistantMessage<'a>,
    pub logprobs: Option<()>,
    pub finish_reason: &'static str,
}

#[derive(Serialize)]
pub struct AssistantMessage<'a> {
    pub role: &'static str,
    pub content: &'a str,
    pub refusal: Option<()>,
}

impl<'a> Completion<'a> {
    pub fn new(
        id: &'a RequestId,
        created: u64,
        model: &'a ModelId,
        content: &'a str,
        reason: FinishReason,
        usage: &Usage,
    ) -> Self {
        let message = AssistantMessage { role: "assistant", content, refusal: None };
        let choice = Choice { index: 0, message, logprobs: None, finish_reason: reason.as_str() };
        Self {
            id,
            object: "chat.completion",
            created,
            model,
            choices: [choice],
            usage: usage.into(),
            service_tier: SERVICE_TIER,
            system_fingerprint: SYSTEM_FINGERPRINT,
        }
    }
}

#[derive(Serialize)]
pub struct WireUsage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u64,
    prompt_tokens_details: PromptTokensDetails,
    completion_tokens_details: CompletionTokensDetails,
}

#[derive(Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
    audio_tokens: u32,
}

#[derive(Default, Serialize)]
struct CompletionTokensDetails {
    reasoning_tokens: u32,
    audio_tokens: u32,
    accepted_prediction_tokens: u32,
    rejected_prediction_tokens: u32,
}

impl From<&Usage> for WireUsage {
    fn from(usage: &Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens),
            prompt_tokens_details: PromptTokensDetails { cached_tokens: usage.cached_tokens, audio_tokens: 0 },
            completion_tokens_details: CompletionTokensDetails::default(),
        }
    }
}
