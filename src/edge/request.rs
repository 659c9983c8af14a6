//! A chat request, parsed. What comes out of [`parse`] need not be checked again.

use serde_json::{Map, Value};

use super::{
    error::{ApiError, shorten},
    fields::{self, wrong_type},
    json,
};
use crate::{
    domain::SamplingParams,
    prompt::{Message, Role},
};

/// What a client asks for, with every default filled in but the model's.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatRequest {
    /// `None`: the configured default.
    pub model: Option<String>,
    pub messages: Vec<Message>,
    /// `None`: as much as the model may.
    pub output_tokens_max: Option<OutputTokensMax>,
    pub sampling: SamplingParams,
    pub stop: Vec<String>,
    pub ignore_eos: bool,
    /// Empty: shares prefixes with whatever else of the tenant has none.
    pub cache_salt: String,
    pub stream: bool,
    pub include_usage: bool,
    /// Fields that had no effect, for the client to know.
    pub ignored: Vec<String>,
}

const STOPS_MAX: usize = 4;
/// The engine holds back as much text as the longest stop string has.
const STOP_BYTES_MAX: usize = 1024;
const NAME_BYTES_MAX: usize = 256;
const SALT_BYTES_MAX: usize = 256;

/// Reads a body. `messages_max` bounds the conversation.
pub fn parse(body: &[u8], messages_max: usize) -> Result<ChatRequest, ApiError> {
    let mut value = json::parse(body)?;
    let Some(request) = value.as_object_mut() else {
        let why = format!("The request body must be a JSON object, but is {}.", json::kind(&value));
        return Err(ApiError::malformed_json(why));
    };
    let mut ignored = fields::check(request)?;
    let model = match given(request, "model") {
        None => None,
        Some(Value::String(model)) if model.is_empty() => {
            return Err(ApiError::field("invalid_value", "model", "Invalid 'model': an empty string."));
        }
        Some(Value::String(model)) => Some(model.clone()),
        Some(other) => return Err(wrong_type("model", "a string", other)),
    };
    let sampling = sampling(request)?;
    let max_tokens = output_tokens(request, "max_tokens")?;
    let output_tokens_max = output_tokens(request, "max_completion_tokens")?.or(max_tokens);
    let stop = stops(request)?;
    let stream = boolean(request, "stream")?.unwrap_or(false);
    let include_usage = stream_options(request, stream, &mut ignored)?;
    let ignore_eos = boolean(request, "ignore_eos")?.unwrap_or(false);
    let cache_salt = cache_salt(request)?;
    let messages = messages(request.remove("messages"), messages_max, &mut ignored)?;
    Ok(ChatRequest {
        model,
        messages,
        output_tokens_max,
        sampling,
        stop,
        ignore_eos,
        cache_salt,
        stream,
        include_usage,
        ignored,
    })
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

/// A field that is there and not null.
fn given<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    object.get(name).filter(|value| !value.is_null())
}

fn boolean(request: &Map<String, Value>, name: &str) -> Result<Option<bool>, ApiError> {
    given(request, name).map(|value| value.as_bool().ok_or_else(|| wrong_type(name, "a boolean", value))).transpose()
}

fn sampling(request: &Map<String, Value>) -> Result<SamplingParams, ApiError> {
    Ok(SamplingParams {
        temperature: number(request, "temperature", 0.0, 2.0)?.unwrap_or(1.0),
        top_p: number(request, "top_p", 0.0, 1.0)?.unwrap_or(1.0),
        // -1 is how some clients spell "off".
        top_k: u32::try_from(integer(request, "top_k", -1, i64::from(i32::MAX))?.unwrap_or(0)).unwrap_or(0),
        min_p: number(request, "min_p", 0.0, 1.0)?.unwrap_or(0.0),
        seed: match integer(request, "seed", i64::MIN, i64::MAX)? {
            Some(seed) => seed.cast_unsigned(),
            None => rand::random(),
        },
    })
}

fn number(request: &Map<String, Value>, name: &str, min: f64, max: f64) -> Result<Option<f32>, ApiError> {
    let Some(value) = given(request, name) else { return Ok(None) };
    let number = value.as_f64().ok_or_else(|| wrong_type(name, "a number", value))?;
    if (min..=max).contains(&number) { Ok(Some(number as f32)) } else { Err(outside(name, min, max, value)) }
}

fn integer(request: &Map<String, Value>, name: &str, min: i64, max: i64) -> Result<Option<i64>, ApiError> {
    let Some(value) = given(request, name) else { return Ok(None) };
    if !(value.is_i64() || value.is_u64()) {
        return Err(wrong_type(name, "an integer", value));
    }
    match value.as_i64().filter(|integer| (min..=max).contains(integer)) {
        Some(integer) => Ok(Some(integer)),
        None => Err(outside(name, min, max, value)),
    }
}

fn outside(name: &str, min: impl std::fmt::Display, max: impl std::fmt::Display, value: &Value) -> ApiError {
    let why = format!("Invalid '{name}': expected a value from {min} to {max}, but got {value}.");
    ApiError::field("out_of_range", name, why)
}

fn output_tokens(request: &Map<String, Value>, name: &'static str) -> Result<Option<OutputTokensMax>, ApiError> {
    let Some(value) = given(request, name) else { return Ok(None) };
    if let Some(tokens) = value.as_u64().filter(|tokens| *tokens > 0) {
        return Ok(Some(OutputTokensMax { field: name, tokens }));
    }
    if value.is_i64() || value.is_u64() {
        let why = format!("Invalid '{name}': expected a value of at least 1, but got {value}.");
        return Err(ApiError::field("integer_below_min_value", name, why));
    }
    Err(wrong_type(name, "an integer", value))
}

fn stops(request: &Map<String, Value>) -> Result<Vec<String>, ApiError> {
    let one = |param: &str, value: &Value| {
        let text = value.as_str().ok_or_else(|| wrong_type(param, "a string", value))?;
        if text.is_empty() || text.len() > STOP_BYTES_MAX {
            let why = format!("Invalid '{param}': expected 1 to {STOP_BYTES_MAX} bytes, but got {}.", text.len());
            return Err(ApiError::field("invalid_value", param, why));
        }
        Ok(text.to_owned())
    };
    match given(request, "stop") {
        None => Ok(Vec::new()),
        Some(value @ Value::String(_)) => Ok(vec![one("stop", value)?]),
        Some(Value::Array(items)) if items.len() > STOPS_MAX => {
            let why = format!("Invalid 'stop': at most {STOPS_MAX} strings, but got {}.", items.len());
            Err(ApiError::field("array_above_max_length", "stop", why))
        }
        Some(Value::Array(items)) => {
            items.iter().enumerate().map(|(i, value)| one(&format!("stop[{i}]"), value)).collect()
        }
        Some(other) => Err(wrong_type("stop", "a string or an array of strings", other)),
    }
}

fn cache_salt(request: &Map<String, Value>) -> Result<String, ApiError> {
    match given(request, "cache_salt") {
        None => Ok(String::new()),
        Some(Value::String(salt)) if salt.len() <= SALT_BYTES_MAX => Ok(salt.clone()),
        Some(Value::String(salt)) => {
            let why = format!("Invalid 'cache_salt': at most {SALT_BYTES_MAX} bytes, but got {}.", salt.len());
            Err(ApiError::field("string_above_max_length", "cache_salt", why))
        }
        Some(other) => Err(wrong_type("cache_salt", "a string", other)),
    }
}

/// Whether a stream shall end with its usage.
fn stream_options(request: &Map<String, Value>, stream: bool, ignored: &mut Vec<String>) -> Result<bool, ApiError> {
    let Some(value) = given(request, "stream_options") else { return Ok(false) };
    let options = value.as_object().ok_or_else(|| wrong_type("stream_options", "an object", value))?;
    if !stream {
        let why = "The 'stream_options' parameter is only allowed when 'stream' is true.";
        return Err(ApiError::field("invalid_value", "stream_options", why));
    }
    let mut include_usage = false;
    for (name, value) in options.iter().filter(|(_, value)| !value.is_null()) {
        let param = format!("stream_options.{name}");
        let flag = || value.as_bool().ok_or_else(|| wrong_type(&param, "a boolean", value));
        match name.as_str() {
            "include_usage" => include_usage = flag()?,
            "include_obfuscation" => {
                if flag()? {
                    ignored.push(param);
                }
            }
            "continuous_usage_stats" => {
                if flag()? {
                    let why = format!("`{param}` is not supported yet. Leave it out or send false.");
                    return Err(ApiError::field("unsupported_value", param, why));
                }
            }
            _ => ignored.push(param),
        }
    }
    Ok(include_usage)
}

fn messages(value: Option<Value>, most: usize, ignored: &mut Vec<String>) -> Result<Vec<Message>, ApiError> {
    let items = match value {
        None | Some(Value::Null) => {
            let why = "Missing required parameter: 'messages'.";
            return Err(ApiError::field("missing_required_parameter", "messages", why));
        }
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong_type("messages", "an array of objects", &other)),
    };
    if items.is_empty() {
        let why = "Invalid 'messages': empty array. Expected at least one message.";
        return Err(ApiError::field("empty_array", "messages", why));
    }
    if items.len() > most {
        let why = format!("Invalid 'messages': at most {most} messages, but got {}.", items.len());
        return Err(ApiError::field("array_above_max_length", "messages", why));
    }
    items.into_iter().enumerate().map(|(i, item)| message(i, item, ignored)).collect()
}

fn message(i: usize, item: Value, ignored: &mut Vec<String>) -> Result<Message, ApiError> {
    let at = |field: &str| format!("messages[{i}].{field}");
    let Value::Object(mut fields) = item else {
        return Err(wrong_type(&format!("messages[{i}]"), "an object", &item));
    };
    let role = role(i, given(&fields, "role"))?;
    let name = match given(&fields, "name") {
        None => None,
        Some(Value::String(name)) if name.len() <= NAME_BYTES_MAX => Some(name.clone()),
        Some(Value::String(_)) => {
            let why = format!("Invalid '{}': at most {NAME_BYTES_MAX} bytes.", at("name"));
            return Err(ApiError::field("string_above_max_length", at("name"), why));
        }
        Some(other) => return Err(wrong_type(&at("name"), "a string", other)),
    };
    let mut refusal = None;
    for (field, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        match (field.as_str(), role) {
            ("role" | "content" | "name", _) => {}
            ("refusal", Role::Assistant) => {
                let text = value.as_str().ok_or_else(|| wrong_type(&at("refusal"), "a string", value))?;
                refusal = Some(text.to_owned());
            }
            ("tool_calls", Role::Assistant) if value.as_array().is_some_and(Vec::is_empty) => {}
            ("tool_calls" | "function_call", Role::Assistant) => return Err(no_tools(at(field))),
            ("audio", Role::Assistant) => {
                let why = format!("`{}` is not supported: this model reads text.", at("audio"));
                return Err(ApiError::field("unsupported_value", at("audio"), why));
            }
            _ => {
                let name = format!("messages[].{}", shorten(field));
                if !ignored.contains(&name) && ignored.len() < IGNORED_MAX {
                    ignored.push(name);
                }
            }
        }
    }
    let content = match fields.remove("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => text_of_parts(&at("content"), role, parts)?,
        None | Some(Value::Null) => match refusal {
            Some(refusal) => refusal,
            None => {
                let why = format!("Missing required parameter: '{}'.", at("content"));
                return Err(ApiError::field("missing_required_parameter", at("content"), why));
            }
        },
        Some(other) => return Err(wrong_type(&at("content"), "a string or an array of parts", &other)),
    };
    Ok(Message { role, content, name })
}

/// Unknown names of message fields are collected only so far.
const IGNORED_MAX: usize = 32;

fn role(i: usize, value: Option<&Value>) -> Result<Role, ApiError> {
    let param = format!("messages[{i}].role");
    let Some(value) = value else {
        let why = format!("Missing required parameter: '{param}'.");
        return Err(ApiError::field("missing_required_parameter", param, why));
    };
    match value.as_str() {
        Some("developer") => Ok(Role::Developer),
        Some("system") => Ok(Role::System),
        Some("user") => Ok(Role::User),
        Some("assistant") => Ok(Role::Assistant),
        Some("tool" | "function") => Err(no_tools(param)),
        Some(other) => {
            let why = format!("Invalid '{param}': `{}` is none of developer, system, user, assistant.", shorten(other));
            Err(ApiError::field("invalid_value", param, why))
        }
        None => Err(wrong_type(&param, "a string", value)),
    }
}

fn no_tools(param: String) -> ApiError {
    let why = format!("`{param}`: tools are not supported yet.");
    ApiError::field("unsupported_value", param, why)
}

/// The text of the parts, one a line.
fn text_of_parts(content: &str, role: Role, parts: Vec<Value>) -> Result<String, ApiError> {
    if parts.is_empty() {
        let why = format!("Invalid '{content}': empty array. Expected at least one part.");
        return Err(ApiError::field("empty_array", content, why));
    }
    let mut text = String::new();
    for (j, part) in parts.into_iter().enumerate() {
        let at = |field: &str| format!("{content}[{j}].{field}");
        let Value::Object(mut part) = part else {
            return Err(wrong_type(&format!("{content}[{j}]"), "an object", &part));
        };
        let kind = match part.get("type") {
            None | Some(Value::Null) => {
                let why = format!("Missing required parameter: '{}'.", at("type"));
                return Err(ApiError::field("missing_required_parameter", at("type"), why));
            }
            Some(Value::String(kind)) => kind.as_str(),
            Some(other) => return Err(wrong_type(&at("type"), "a string", other)),
        };
        let field = match (kind, role) {
            ("text", _) => "text",
            ("refusal", Role::Assistant) => "refusal",
            ("image_url" | "input_audio" | "file" | "video_url" | "audio_url", _) => {
                let why = format!("Invalid '{}': this model reads text only, not `{kind}`.", at("type"));
                return Err(ApiError::field("unsupported_value", at("type"), why));
            }
            (other, _) => {
                let why = format!("Invalid '{}': `{}` is not a type of content.", at("type"), shorten(other));
                return Err(ApiError::field("invalid_value", at("type"), why));
            }
        };
        if j > 0 {
            text.push('\n');
        }
        match part.remove(field) {
            Some(Value::String(piece)) if text.is_empty() => text = piece,
            Some(Value::String(piece)) => text.push_str(&piece),
            None | Some(Value::Null) => {
                let why = format!("Missing required parameter: '{}'.", at(field));
                return Err(ApiError::field("missing_required_parameter", at(field), why));
            }
            Some(other) => return Err(wrong_type(&at(field), "a string", &other)),
        }
    }
    Ok(text)
}
