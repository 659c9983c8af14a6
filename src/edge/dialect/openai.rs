//! What answers look like on the wire.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::{
    domain::{FundsEnd, ModelId, Priority, StoppedBy, TokenDetail, Usage},
    edge::answer::{Form, Logprobs, Whole, WholeCall, WholeChoice, WireReason},
};

/// Changes whenever the same request and seed might get another answer.
pub const SYSTEM_FINGERPRINT: &str = concat!("lightcone-", env!("CARGO_PKG_VERSION"));

/// The class that a request was served in, in the contract's words.
pub fn service_tier(priority: Priority) -> &'static str {
    match priority {
        Priority::Low => "flex",
        Priority::Normal => "default",
        Priority::High => "priority",
    }
}

/// What every part of one answer says alike.
#[derive(Clone, Debug)]
pub struct About {
    /// As the client knows it.
    pub id: String,
    pub created: u64,
    pub model: ModelId,
    pub priority: Priority,
}

#[derive(JsonSchema, Serialize)]
pub struct Completion<'a> {
    id: &'a str,
    #[schemars(extend("const" = "chat.completion"))]
    object: &'static str,
    created: u64,
    #[schemars(with = "String")]
    model: &'a ModelId,
    choices: Vec<Choice<'a>>,
    usage: WireUsage,
    #[schemars(extend("enum" = ["default", "flex", "priority"]))]
    service_tier: &'static str,
    system_fingerprint: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

#[derive(JsonSchema, Serialize)]
struct Choice<'a> {
    index: usize,
    message: AssistantMessage<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: WireReason,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(JsonSchema, Serialize)]
struct AssistantMessage<'a> {
    #[schemars(extend("const" = "assistant"))]
    role: &'static str,
    content: Option<&'a str>,
    refusal: Option<()>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    function_call: Option<Function<'a>>,
}

#[derive(JsonSchema, Serialize)]
struct ToolCall<'a> {
    id: &'a str,
    #[serde(rename = "type")]
    #[schemars(extend("const" = "function"))]
    kind: &'static str,
    function: Function<'a>,
}

#[derive(JsonSchema, Serialize)]
struct Function<'a> {
    name: &'a str,
    arguments: &'a str,
}

impl<'a> From<&'a WholeCall> for Function<'a> {
    fn from(call: &'a WholeCall) -> Self {
        Self { name: &call.name, arguments: &call.arguments }
    }
}

impl<'a> Completion<'a> {
    /// `prompt` are the prompt's tokens, for those who want to see them.
    pub fn new(about: &'a About, whole: &'a Whole, form: &Form, prompt: &'a [u32], prompt_logprobs: bool) -> Self {
        Self {
            id: &about.id,
            object: "chat.completion",
            created: about.created,
            model: &about.model,
            choices: whole.choices.iter().enumerate().map(|(index, choice)| Choice::new(index, choice, form)).collect(),
            usage: (&whole.usage).into(),
            service_tier: service_tier(about.priority),
            system_fingerprint: SYSTEM_FINGERPRINT,
            prompt_logprobs: prompt_logprobs.then(|| told_prompt(&whole.prompt, form)),
            prompt_token_ids: form.token_ids.then_some(prompt),
        }
    }
}

impl<'a> Choice<'a> {
    fn new(index: usize, choice: &'a WholeChoice, form: &Form) -> Self {
        let calls = &choice.calls;
        let tool_call = |call: &'a WholeCall| ToolCall { id: &call.id, kind: "function", function: call.into() };
        let message = AssistantMessage {
            role: "assistant",
            content: (calls.is_empty() || !choice.text.is_empty()).then_some(&choice.text),
            refusal: None,
            tool_calls: if form.is_legacy { Vec::new() } else { calls.iter().map(tool_call).collect() },
            function_call: calls.first().filter(|_| form.is_legacy).map(Function::from),
        };
        Self {
            index,
            message,
            logprobs: form.logprobs(&choice.tokens),
            finish_reason: choice.reason.unwrap_or(WireReason::Stop),
            stop_reason: choice.stopped_by.as_ref().map(stop_reason),
            token_ids: form.token_ids(&choice.tokens),
        }
    }
}

pub fn stop_reason(stopped_by: &StoppedBy) -> Value {
    match stopped_by {
        StoppedBy::Text(text) => json!(text),
        StoppedBy::Token(token) => json!(token),
        StoppedBy::Funds(FundsEnd::Balance) => json!("balance_exhausted"),
        StoppedBy::Funds(FundsEnd::SpendLimit) => json!("spend_limit_reached"),
    }
}

/// For each of the prompt's tokens but the first: its own logprob and those of the likeliest, by their ids.
fn told_prompt(tokens: &[TokenDetail], form: &Form) -> Value {
    let shown = |token: u32, logprob: f32, rank: u32| json!({ "logprob": logprob, "rank": rank, "decoded_token": form.shown(token) });
    let place = |detail: &TokenDetail| {
        let mut all = Map::new();
        for ((token, logprob), rank) in detail.top.iter().zip(1..) {
            all.insert(token.to_string(), shown(*token, *logprob, rank));
        }
        all.entry(detail.token.to_string()).or_insert_with(|| shown(detail.token, detail.logprob, detail.rank));
        Value::Object(all)
    };
    std::iter::once(Value::Null).chain(tokens.iter().map(place)).collect()
}

#[derive(JsonSchema, Serialize)]
pub struct WireUsage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u64,
    prompt_tokens_details: PromptTokensDetails,
    completion_tokens_details: CompletionTokensDetails,
}

#[derive(JsonSchema, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
    audio_tokens: u32,
}

#[derive(Default, JsonSchema, Serialize)]
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
