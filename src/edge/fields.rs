//! Every field of a chat request that the wire contract names, and what becomes of it.
//!
//! One table, so that nothing is accepted in silence: a field works, is named as ignored, or is refused.
//! `null` always means the default and never comes here.

use serde_json::{Map, Value};

use super::{error::ApiError, json};

/// What becomes of a field that was given.
#[derive(Clone, Copy)]
pub enum Disposition {
    /// Read by the request parser.
    Works,
    /// Type-checked and named in `x-lightcone-ignored`.
    Ignored(Shape),
    /// Without effect on what we do, whatever its value: type-checked, and nothing to tell.
    Moot(Shape),
    /// Part of the contract and not built: only a value that asks for nothing is accepted.
    NotYet(Neutral),
    /// Not part of the contract.
    Refused(Neutral),
}

/// The coarse type of a field that is not used.
#[derive(Clone, Copy)]
pub enum Shape {
    Boolean,
    Number,
    String,
    Object,
    /// Up to 16 pairs of strings of at most 64 and 512 characters.
    Metadata,
}

/// The values that ask for nothing.
#[derive(Clone, Copy)]
pub enum Neutral {
    /// None but `null`.
    Never,
    Boolean(bool),
    Number(f64),
    /// An empty array or object.
    Empty,
    Words(&'static [&'static str]),
    /// An object whose `type` is this.
    Type(&'static str),
    /// An array of nothing but this.
    Only(&'static str),
}

use Disposition::{Ignored, Moot, NotYet, Refused, Works};

/// In the order of the wire contract.
const TABLE: &[(&str, Disposition)] = &[
    ("model", Works),
    ("messages", Works),
    ("function_call", NotYet(Neutral::Never)),
    ("functions", NotYet(Neutral::Empty)),
    ("max_completion_tokens", Works),
    ("max_tokens", Works),
    ("temperature", Works),
    ("top_p", Works),
    ("n", NotYet(Neutral::Number(1.0))),
    ("seed", Works),
    ("frequency_penalty", NotYet(Neutral::Number(0.0))),
    ("presence_penalty", NotYet(Neutral::Number(0.0))),
    ("stop", Works),
    ("logit_bias", NotYet(Neutral::Empty)),
    ("logprobs", NotYet(Neutral::Boolean(false))),
    ("top_logprobs", NotYet(Neutral::Number(0.0))),
    ("stream", Works),
    ("stream_options", Works),
    ("tools", NotYet(Neutral::Empty)),
    ("tool_choice", NotYet(Neutral::Never)),
    // Nobody can call a tool, so no two are called at once.
    ("parallel_tool_calls", Moot(Shape::Boolean)),
    ("response_format", NotYet(Neutral::Type("text"))),
    ("service_tier", NotYet(Neutral::Words(&["auto", "default"]))),
    ("store", Ignored(Shape::Boolean)),
    ("metadata", Ignored(Shape::Metadata)),
    ("user", Ignored(Shape::String)),
    ("safety_identifier", Ignored(Shape::String)),
    ("prompt_cache_key", Ignored(Shape::String)),
    ("prompt_cache_retention", Ignored(Shape::String)),
    ("prompt_cache_options", Ignored(Shape::Object)),
    ("reasoning_effort", Ignored(Shape::String)),
    ("verbosity", Ignored(Shape::String)),
    ("prediction", Ignored(Shape::Object)),
    ("include_reasoning", Ignored(Shape::Boolean)),
    ("modalities", Refused(Neutral::Only("text"))),
    ("audio", Refused(Neutral::Never)),
    ("web_search_options", Refused(Neutral::Never)),
    ("moderation", Refused(Neutral::Never)),
    ("top_k", Works),
    ("min_p", Works),
    ("repetition_penalty", NotYet(Neutral::Number(1.0))),
    ("min_tokens", NotYet(Neutral::Number(0.0))),
    ("ignore_eos", Works),
    ("stop_token_ids", NotYet(Neutral::Empty)),
    ("include_stop_str_in_output", NotYet(Neutral::Boolean(false))),
    ("allowed_token_ids", NotYet(Neutral::Never)),
    ("bad_words", NotYet(Neutral::Empty)),
    ("return_token_ids", NotYet(Neutral::Boolean(false))),
    ("return_tokens_as_token_ids", NotYet(Neutral::Boolean(false))),
    ("prompt_logprobs", NotYet(Neutral::Never)),
    ("truncate_prompt_tokens", NotYet(Neutral::Never)),
    ("echo", NotYet(Neutral::Boolean(false))),
    ("add_generation_prompt", NotYet(Neutral::Boolean(true))),
    ("continue_final_message", NotYet(Neutral::Boolean(false))),
    ("add_special_tokens", NotYet(Neutral::Boolean(false))),
    ("skip_special_tokens", NotYet(Neutral::Boolean(true))),
    ("documents", NotYet(Neutral::Empty)),
    ("chat_template_kwargs", NotYet(Neutral::Empty)),
    ("structured_outputs", NotYet(Neutral::Never)),
    ("priority", NotYet(Neutral::Number(0.0))),
    ("request_id", NotYet(Neutral::Never)),
    ("cache_salt", Works),
    ("spaces_between_special_tokens", Ignored(Shape::Boolean)),
    ("length_penalty", Ignored(Shape::Number)),
    ("vllm_xargs", Ignored(Shape::Object)),
    ("chat_template", Refused(Neutral::Never)),
    ("logits_processors", Refused(Neutral::Empty)),
    ("kv_transfer_params", Refused(Neutral::Never)),
    ("mm_processor_kwargs", Refused(Neutral::Empty)),
    ("use_beam_search", Refused(Neutral::Boolean(false))),
];

/// Checks every field that the parser does not read itself. Answers with the names of those ignored.
pub fn check(request: &Map<String, Value>) -> Result<Vec<String>, ApiError> {
    let mut ignored = Vec::new();
    for (name, value) in request.iter().filter(|(_, value)| !value.is_null()) {
        let disposition = TABLE.iter().find(|(field, _)| field == name).map(|(_, disposition)| *disposition);
        match disposition {
            None => ignored.push(name.clone()),
            Some(Works) => {}
            Some(Ignored(shape)) => {
                shape.check(name, value)?;
                ignored.push(name.clone());
            }
            Some(Moot(shape)) => shape.check(name, value)?,
            Some(NotYet(neutral) | Refused(neutral)) if neutral.holds(value) => {}
            Some(NotYet(neutral)) => return Err(unsupported(name, neutral, "is not supported yet")),
            Some(Refused(neutral)) => return Err(unsupported(name, neutral, "is not supported")),
        }
    }
    Ok(ignored)
}

fn unsupported(name: &str, neutral: Neutral, what: &str) -> ApiError {
    let accepted = match neutral {
        Neutral::Never => "Leave it out.".to_owned(),
        Neutral::Boolean(value) => format!("Leave it out or send {value}."),
        Neutral::Number(value) => format!("Leave it out or send {value}."),
        Neutral::Empty => "Leave it out or empty.".to_owned(),
        Neutral::Words(words) => format!("Leave it out or send `{}`.", words.join("` or `")),
        Neutral::Type(word) => format!("Leave it out or send the type `{word}`."),
        Neutral::Only(word) => format!("Leave it out or send [\"{word}\"]."),
    };
    ApiError::field("unsupported_value", name, format!("This value of `{name}` {what}. {accepted}"))
}

impl Shape {
    fn check(self, name: &str, value: &Value) -> Result<(), ApiError> {
        let (right, expected) = match self {
            Self::Boolean => (value.is_boolean(), "a boolean"),
            Self::Number => (value.is_number(), "a number"),
            Self::String => (value.is_string(), "a string"),
            Self::Object => (value.is_object(), "an object"),
            Self::Metadata => return metadata(name, value),
        };
        if right { Ok(()) } else { Err(wrong_type(name, expected, value)) }
    }
}

fn metadata(name: &str, value: &Value) -> Result<(), ApiError> {
    let pairs = value.as_object().ok_or_else(|| wrong_type(name, "an object", value))?;
    if pairs.len() > 16 {
        let why = format!("Invalid `{name}`: at most 16 pairs, but got {}.", pairs.len());
        return Err(ApiError::field("object_above_max_properties", name, why));
    }
    for (key, value) in pairs {
        let text = value.as_str().ok_or_else(|| wrong_type(name, "an object of strings", value))?;
        if key.chars().count() > 64 || text.chars().count() > 512 {
            let why = format!("Invalid `{name}`: keys have at most 64 characters and values at most 512.");
            return Err(ApiError::field("string_above_max_length", name, why));
        }
    }
    Ok(())
}

impl Neutral {
    fn holds(self, value: &Value) -> bool {
        match self {
            Self::Never => false,
            Self::Boolean(neutral) => value.as_bool() == Some(neutral),
            Self::Number(neutral) => value.as_f64() == Some(neutral),
            Self::Empty => value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty),
            Self::Words(words) => value.as_str().is_some_and(|word| words.contains(&word)),
            Self::Type(word) => value.get("type").and_then(Value::as_str) == Some(word),
            Self::Only(word) => {
                value.as_array().is_some_and(|items| !items.is_empty() && items.iter().all(|item| item == word))
            }
        }
    }
}

/// A 400 for a value of the wrong type.
pub fn wrong_type(param: &str, expected: &str, value: &Value) -> ApiError {
    let why = format!("Invalid type for '{param}': expected {expected}, but got {} instead.", json::kind(value));
    ApiError::field("invalid_type", param, why)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn checked(value: Value) -> Result<Vec<String>, ApiError> {
        check(value.as_object().unwrap())
    }

    #[test]
    fn no_field_stands_twice_in_the_table() {
        let mut names: Vec<_> = TABLE.iter().map(|(name, _)| name).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn null_is_the_default_of_every_field() {
        let all: Map<String, Value> = TABLE.iter().map(|(name, _)| ((*name).to_owned(), Value::Null)).collect();
        assert_eq!(check(&all), Ok(Vec::new()));
    }

    #[test]
    fn values_that_ask_for_nothing_are_accepted_without_a_word() {
        let neutral = json!({
            "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": false, "tools": [],
            "functions": [], "logit_bias": {}, "response_format": {"type": "text"}, "service_tier": "auto",
            "repetition_penalty": 1, "min_tokens": 0, "modalities": ["text"], "use_beam_search": false,
            "skip_special_tokens": true, "parallel_tool_calls": true, "cache_salt": "x",
        });
        assert_eq!(checked(neutral), Ok(Vec::new()));
    }

    #[test]
    fn what_is_not_built_or_not_wanted_is_refused_by_name() {
        for (name, value) in [
            ("n", json!(2)),
            ("frequency_penalty", json!(0.5)),
            ("logprobs", json!(true)),
            ("top_logprobs", json!(5)),
            ("tools", json!([{"type": "function"}])),
            ("tool_choice", json!("auto")),
            ("response_format", json!({"type": "json_object"})),
            ("logit_bias", json!({"5": 1})),
            ("service_tier", json!("priority")),
            ("structured_outputs", json!({})),
            ("audio", json!({})),
            ("modalities", json!(["text", "audio"])),
            ("modalities", json!([])),
            ("chat_template", json!("{{ x }}")),
            ("use_beam_search", json!(true)),
        ] {
            let error = checked(json!({ name: value })).unwrap_err();
            assert_eq!((error.code(), error.param()), (Some("unsupported_value"), Some(name)));
        }
    }

    #[test]
    fn ignored_fields_are_named_and_still_have_a_type() {
        let ignored = checked(json!({"user": "u", "metadata": {"a": "b"}, "model": "m", "surprise": [1]}));
        assert_eq!(ignored, Ok(vec!["user".into(), "metadata".into(), "surprise".into()]));
        for (name, value) in [
            ("user", json!(1)),
            ("store", json!("yes")),
            ("prediction", json!([])),
            ("length_penalty", json!("1")),
            ("metadata", json!({"a": 1})),
            ("metadata", json!([])),
        ] {
            let error = checked(json!({ name: value })).unwrap_err();
            assert_eq!((error.code(), error.param()), (Some("invalid_type"), Some(name)));
        }
        let pairs: Map<String, Value> = (0..17).map(|i| (i.to_string(), json!(""))).collect();
        assert!(checked(json!({ "metadata": pairs })).is_err());
        assert!(checked(json!({"metadata": {"a": "x".repeat(513)}})).is_err());
    }
}
