//! Every field of a chat request that the wire contract names, and what becomes of it.
//!
//! One table, so that nothing is accepted in silence: a field works, is named as ignored, or is refused.
//! `null` always means the default and never comes here.

use serde_json::{Map, Value};

use super::read::wrong_type;
use crate::edge::error::ApiError;

/// What becomes of a field that was given.
#[derive(Clone, Copy)]
pub enum Disposition {
    /// Read by the request parser.
    Works,
    /// The same, when its shape is right.
    Checked(Shape),
    /// Type-checked and named in `x-lightcone-ignored`.
    Ignored(Shape),
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
    /// An empty array or object.
    Empty,
    /// An array of nothing but this.
    Only(&'static str),
}

use Disposition::{Checked, Ignored, Refused, Works};

/// Names of fields, and what becomes of them.
pub type Table = &'static [(&'static str, Disposition)];

/// Of a chat completion, in the order of the wire contract.
pub const CHAT: Table = &[
    ("model", Works),
    ("messages", Works),
    ("function_call", Works),
    ("functions", Works),
    ("max_completion_tokens", Works),
    ("max_tokens", Works),
    ("temperature", Works),
    ("top_p", Works),
    ("n", Works),
    ("seed", Works),
    ("frequency_penalty", Works),
    ("presence_penalty", Works),
    ("stop", Works),
    ("logit_bias", Works),
    ("logprobs", Works),
    ("top_logprobs", Works),
    ("stream", Works),
    ("stream_options", Works),
    ("tools", Works),
    ("tool_choice", Works),
    ("parallel_tool_calls", Works),
    ("response_format", Works),
    ("service_tier", Works),
    ("store", Works),
    ("metadata", Checked(Shape::Metadata)),
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
    ("repetition_penalty", Works),
    ("min_tokens", Works),
    ("ignore_eos", Works),
    ("stop_token_ids", Works),
    ("include_stop_str_in_output", Works),
    ("allowed_token_ids", Works),
    ("bad_words", Works),
    ("return_token_ids", Works),
    ("return_tokens_as_token_ids", Works),
    ("prompt_logprobs", Works),
    ("truncate_prompt_tokens", Works),
    ("echo", Works),
    ("add_generation_prompt", Works),
    ("continue_final_message", Works),
    ("add_special_tokens", Works),
    ("skip_special_tokens", Works),
    ("documents", Works),
    ("chat_template_kwargs", Works),
    ("structured_outputs", Works),
    ("priority", Works),
    ("request_id", Works),
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

/// Of a completion of the older kind.
pub const COMPLETIONS: Table = &[
    ("model", Works),
    ("prompt", Works),
    ("best_of", Works),
    ("echo", Works),
    ("frequency_penalty", Works),
    ("logit_bias", Works),
    ("logprobs", Works),
    ("max_tokens", Works),
    ("n", Works),
    ("presence_penalty", Works),
    ("seed", Works),
    ("stop", Works),
    ("stream", Works),
    ("stream_options", Works),
    ("suffix", Refused(Neutral::Never)),
    ("temperature", Works),
    ("top_p", Works),
    ("user", Ignored(Shape::String)),
    ("service_tier", Works),
    ("top_k", Works),
    ("min_p", Works),
    ("repetition_penalty", Works),
    ("min_tokens", Works),
    ("ignore_eos", Works),
    ("stop_token_ids", Works),
    ("include_stop_str_in_output", Works),
    ("allowed_token_ids", Works),
    ("bad_words", Works),
    ("return_token_ids", Works),
    ("return_tokens_as_token_ids", Works),
    ("truncate_prompt_tokens", Works),
    ("skip_special_tokens", Works),
    ("response_format", Works),
    ("structured_outputs", Works),
    ("priority", Works),
    ("request_id", Works),
    ("cache_salt", Works),
    ("spaces_between_special_tokens", Ignored(Shape::Boolean)),
    ("length_penalty", Ignored(Shape::Number)),
    ("logits_processors", Refused(Neutral::Empty)),
    ("use_beam_search", Refused(Neutral::Boolean(false))),
];

/// Of a response.
pub const RESPONSES: Table = &[
    ("model", Works),
    ("input", Works),
    ("instructions", Works),
    ("previous_response_id", Works),
    ("max_output_tokens", Works),
    ("temperature", Works),
    ("top_p", Works),
    ("tools", Works),
    ("tool_choice", Works),
    ("parallel_tool_calls", Works),
    ("text", Works),
    ("stream", Works),
    ("stream_options", Works),
    ("store", Works),
    ("metadata", Checked(Shape::Metadata)),
    ("top_logprobs", Works),
    ("include", Works),
    ("truncation", Works),
    ("service_tier", Works),
    ("max_tool_calls", Ignored(Shape::Number)),
    ("reasoning", Ignored(Shape::Object)),
    ("user", Ignored(Shape::String)),
    ("safety_identifier", Ignored(Shape::String)),
    ("prompt_cache_key", Ignored(Shape::String)),
    ("prompt_cache_retention", Ignored(Shape::String)),
    ("background", Refused(Neutral::Boolean(false))),
    ("conversation", Refused(Neutral::Never)),
    ("prompt", Refused(Neutral::Never)),
    // Beyond OpenAI's, as for chat completions.
    ("top_k", Works),
    ("min_p", Works),
    ("seed", Works),
    ("frequency_penalty", Works),
    ("presence_penalty", Works),
    ("repetition_penalty", Works),
    ("logit_bias", Works),
    ("min_tokens", Works),
    ("allowed_token_ids", Works),
    ("bad_words", Works),
    ("priority", Works),
    ("cache_salt", Works),
];

/// Of a text that is to be tokenised.
pub const TOKENIZE: Table = &[
    ("model", Works),
    ("prompt", Works),
    ("messages", Works),
    ("add_generation_prompt", Works),
    ("continue_final_message", Works),
    ("add_special_tokens", Works),
    ("chat_template_kwargs", Works),
    ("return_token_strs", Works),
    ("chat_template", Refused(Neutral::Never)),
];

/// Of tokens that are to become text.
pub const DETOKENIZE: Table = &[("model", Works), ("tokens", Works)];

/// Checks every field that the parser does not read itself. Answers with the names of those ignored.
pub fn check(request: &Map<String, Value>, table: Table) -> Result<Vec<String>, ApiError> {
    let mut ignored = Vec::new();
    for (name, value) in request.iter().filter(|(_, value)| !value.is_null()) {
        let disposition = table.iter().find(|(field, _)| field == name).map(|(_, disposition)| *disposition);
        match disposition {
            None => ignored.push(name.clone()),
            Some(Works) => {}
            Some(Checked(shape)) => shape.check(name, value)?,
            Some(Ignored(shape)) => {
                shape.check(name, value)?;
                ignored.push(name.clone());
            }
            Some(Refused(neutral)) if neutral.holds(value) => {}
            Some(Refused(neutral)) => return Err(unsupported(name, neutral)),
        }
    }
    Ok(ignored)
}

fn unsupported(name: &str, neutral: Neutral) -> ApiError {
    let accepted = match neutral {
        Neutral::Never => "Leave it out.".to_owned(),
        Neutral::Boolean(value) => format!("Leave it out or send {value}."),
        Neutral::Empty => "Leave it out or empty.".to_owned(),
        Neutral::Only(word) => format!("Leave it out or send [\"{word}\"]."),
    };
    ApiError::field("unsupported_value", name, format!("This value of `{name}` is not supported. {accepted}"))
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
            Self::Empty => value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty),
            Self::Only(word) => {
                value.as_array().is_some_and(|items| !items.is_empty() && items.iter().all(|item| item == word))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn checked(value: Value) -> Result<Vec<String>, ApiError> {
        check(value.as_object().unwrap(), CHAT)
    }

    #[test]
    fn no_field_stands_twice_in_the_table() {
        for table in [CHAT, COMPLETIONS, RESPONSES, TOKENIZE, DETOKENIZE] {
            let mut names: Vec<_> = table.iter().map(|(name, _)| name).collect();
            names.sort_unstable();
            assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
        }
    }

    #[test]
    fn null_is_the_default_of_every_field() {
        let all: Map<String, Value> = CHAT.iter().map(|(name, _)| ((*name).to_owned(), Value::Null)).collect();
        assert_eq!(check(&all, CHAT), Ok(Vec::new()));
    }

    #[test]
    fn values_that_ask_for_nothing_are_accepted_without_a_word() {
        let neutral = json!({ "modalities": ["text"], "use_beam_search": false, "logits_processors": [] });
        assert_eq!(checked(neutral), Ok(Vec::new()));
    }

    #[test]
    fn what_is_not_wanted_is_refused_by_name() {
        for (name, value) in [
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
        assert_eq!(ignored, Ok(vec!["user".into(), "surprise".into()]));
        for (name, value) in [
            ("user", json!(1)),
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
