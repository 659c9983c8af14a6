//! What clients send, read into what they ask for: every fault has a name and a place.

pub mod chat;
pub mod completions;
pub mod fields;
mod format;
pub mod json;
mod messages;
pub mod read;
pub mod responses;
mod sampling;
pub mod schema;
pub mod tokens;
mod tools;

use serde_json::{Map, Value};

use self::read::Fields;
use super::error::{ApiError, shorten_to};
use crate::{
    domain::{Priority, SamplingParams, Stops, Telling},
    prompt::{Ask, PromptError, Shaped},
};

/// What a client asks for, with every default filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub ask: Ask,
    /// `None`: as much as the model may.
    pub output_tokens_max: Option<OutputTokensMax>,
    pub choices: u32,
    pub sampling: SamplingParams,
    pub stops: Stops,
    pub telling: Telling,
    /// In logprobs, tokens are shown as their ids.
    pub tokens_as_ids: bool,
    /// What the answer's text begins with: the last message, which it continues.
    pub echo: String,
    /// Where the form of the answer was asked for.
    pub shape_param: &'static str,
    pub tools: Tools,
    /// Empty: shares prefixes with whatever else of the tenant has none.
    pub cache_salt: String,
    pub priority: Priority,
    /// The client's own name for the request.
    pub own_id: Option<String>,
    pub stream: bool,
    pub store: bool,
    /// Messages in front that hold for this request only.
    pub instructions: usize,
    pub metadata: Map<String, Value>,
    /// Fields that had no effect, for the client to know.
    pub ignored: Vec<String>,
}

/// What the answer may say of tools.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tools {
    /// For each tool that may be called, where its schema stands in the request.
    pub places: Vec<String>,
    /// The client wants to hear of a `function_call`.
    pub is_legacy: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    pub include_usage: bool,
    /// Every chunk has the usage so far.
    pub continuous_usage: bool,
}

/// A body that is an object, before it is known which model is meant.
pub struct Body {
    map: Map<String, Value>,
}

const MODEL_CHARACTERS_MAX: usize = 64 << 10;

impl Body {
    pub fn read(bytes: &[u8]) -> Result<Self, ApiError> {
        match json::parse(bytes)? {
            Value::Object(map) => Ok(Self { map }),
            other => {
                let why = format!("The request body must be a JSON object, but is {}.", json::kind(&other));
                Err(ApiError::malformed_json(why))
            }
        }
    }

    pub fn fields(&self) -> Fields<'_> {
        Fields::root(&self.map)
    }

    /// The model's name; `None` is the configured default.
    pub fn model(&self) -> Result<Option<&str>, ApiError> {
        match Fields::root(&self.map).text("model", MODEL_CHARACTERS_MAX)? {
            Some("") => Err(ApiError::field("invalid_value", "model", "Invalid 'model': an empty string.")),
            model => Ok(model),
        }
    }
}

/// Bounds of one edge and one model.
#[derive(Clone, Copy)]
pub struct Bounds {
    pub messages_max: usize,
    pub choices_max: u32,
    pub context_tokens_max: u32,
    /// Tokens that the model knows.
    pub vocabulary: usize,
}

impl Request {
    /// What to tell a client whose request could not be prepared.
    pub fn refused(&self, error: PromptError) -> ApiError {
        let PromptError::Grammar { what, why } = error else { return error.into() };
        let param = match what {
            Shaped::Text => self.shape_param,
            Shaped::Tool(at) => self.tools.places.get(at).map_or("tools", String::as_str),
        };
        ApiError::field("invalid_schema", param, format!("Invalid '{param}': {}", shorten_to(&why, 400)))
    }
}

/// How long the client wants the answer to be at most, and in which of the two fields it said so.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OutputTokensMax {
    field: &'static str,
    tokens: u64,
}

impl OutputTokensMax {
    /// The asked count, where no answer is longer than `cap` tokens.
    pub fn capped(self, cap: u32) -> u32 {
        u32::try_from(self.tokens).map_or(cap, |tokens| tokens.min(cap))
    }

    /// More than the model answers at once is cut to that; more than it could ever hold is a mistake.
    ///
    /// # Errors
    /// 400 when the count is beyond a context of `context` tokens.
    pub fn fits(self, context: u32) -> Result<(), ApiError> {
        if self.tokens <= u64::from(context) {
            return Ok(());
        }
        let Self { field, tokens } = self;
        let why = format!(
            "Invalid '{field}': {tokens} is too large. This model's maximum context length is {context} tokens, \
             for messages and answer together."
        );
        Err(ApiError::field("context_length_exceeded", field, why))
    }
}
