//! How tokens are chosen, when an answer ends, and what is told of its tokens.

use serde_json::{Map, Value};

use super::read::{Fields, item_text, no_token, unsupported, wrong_type};
use crate::{
    domain::{SamplingParams, Stops, Telling},
    edge::error::ApiError,
};

const STOPS_MAX: usize = 4;
/// The engine holds back as much text as the longest stop string has.
const STOP_CHARACTERS_MAX: usize = 1024;
const STOP_TOKENS_MAX: usize = 256;
const BAD_WORDS_MAX: usize = 256;
const BAD_WORD_CHARACTERS_MAX: usize = 256;
const TOP_LOGPROBS_MAX: i64 = 20;
const BIASES_MAX: usize = 4096;

/// The parameters, but for the bad words: these are text until the model's tokeniser has seen them.
pub fn sampling(fields: &Fields, vocabulary: usize) -> Result<(SamplingParams, Vec<String>), ApiError> {
    let params = SamplingParams {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
        top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0),
        // -1 is how some clients spell "off".
        top_k: u32::try_from(fields.integer("top_k", -1..=i64::from(i32::MAX))?.unwrap_or(0)).unwrap_or(0),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
        seed: match fields.integer("seed", i64::MIN..=i64::MAX)? {
            Some(seed) => seed.cast_unsigned(),
            None => rand::random(),
        },
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        repetition_penalty: repetition_penalty(fields)?,
        logit_bias: logit_bias(fields, vocabulary)?,
        allowed_tokens: match fields.tokens("allowed_token_ids", vocabulary, vocabulary)? {
            Some(tokens) if tokens.is_empty() => {
                let why = "Invalid 'allowed_token_ids': empty array. Expected at least one token.";
                return Err(ApiError::field("empty_array", "allowed_token_ids", why));
            }
            tokens => tokens,
        },
        bad_words: Vec::new(),
        min_tokens: fields.integer("min_tokens", 0..=i64::from(u32::MAX))?.unwrap_or(0) as u32,
    };
    let bad_words = fields.texts("bad_words", BAD_WORDS_MAX, BAD_WORD_CHARACTERS_MAX)?.unwrap_or_default();
    Ok((params, bad_words))
}

fn repetition_penalty(fields: &Fields) -> Result<f32, ApiError> {
    let penalty = fields.number("repetition_penalty", 0.0..=10.0)?.unwrap_or(1.0);
    if fields.given("repetition_penalty").and_then(Value::as_f64) != Some(0.0) {
        return Ok(penalty.max(f32::MIN_POSITIVE));
    }
    let why = "Invalid 'repetition_penalty': expected a value above 0 and up to 10, but got 0.";
    Err(ApiError::field("out_of_range", "repetition_penalty", why))
}

fn logit_bias(fields: &Fields, vocabulary: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(biases) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let mut all = Vec::new();
    for id in fields.map("logit_bias")?.into_iter().flat_map(Map::keys) {
        if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_digit()) {
            let why = format!("Invalid 'logit_bias': `{}` is not a token id.", crate::edge::error::shorten(id));
            return Err(ApiError::field("invalid_value", "logit_bias", why));
        }
        let token = id.parse::<u32>().ok().filter(|token| (*token as usize) < vocabulary);
        let token = token.ok_or_else(|| no_token("logit_bias", id, vocabulary))?;
        let Some(bias) = biases.number(id, -100.0..=100.0)? else { continue };
        if all.len() == BIASES_MAX {
            let why = format!("Invalid 'logit_bias': at most {BIASES_MAX} tokens.");
            return Err(ApiError::field("object_above_max_properties", "logit_bias", why));
        }
        all.push((token, bias));
    }
    Ok(all)
}

pub fn stops(fields: &Fields, vocabulary: usize) -> Result<Stops, ApiError> {
    let strings = match fields.given("stop") {
        Some(value) if value.is_string() => vec![item_text("stop", value, STOP_CHARACTERS_MAX)?],
        Some(value) if value.is_array() => match value.as_array().map_or(0, Vec::len) {
            count if count > STOPS_MAX => {
                let why = format!("Invalid 'stop': at most {STOPS_MAX} strings, but got {count}.");
                return Err(ApiError::field("array_above_max_length", "stop", why));
            }
            _ => fields.texts("stop", STOPS_MAX, STOP_CHARACTERS_MAX)?.unwrap_or_default(),
        },
        Some(other) => return Err(wrong_type("stop", "a string or an array of strings", other)),
        None => Vec::new(),
    };
    Ok(Stops {
        until: String::new(),
        strings,
        tokens: fields.tokens("stop_token_ids", STOP_TOKENS_MAX, vocabulary)?.unwrap_or_default(),
        are_shown: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
    })
}

/// Of a chat completion: logprobs are asked for by a boolean, alternatives by a count.
pub fn telling(fields: &Fields, stream: bool) -> Result<Telling, ApiError> {
    let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    if top.is_some_and(|top| top > 0) && !logprobs {
        let why = "The 'top_logprobs' parameter is only allowed when 'logprobs' is true.";
        return Err(ApiError::field("invalid_value", "top_logprobs", why));
    }
    let prompt_logprobs = fields.integer("prompt_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    if prompt_logprobs.is_some() && stream {
        return Err(unsupported("prompt_logprobs", "is not told in a stream. Ask without 'stream'."));
    }
    Ok(Telling {
        logprobs: logprobs.then_some(top.unwrap_or(0) as u32),
        prompt_logprobs: prompt_logprobs.map(|top| top as u32),
        token_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
        control_text: !fields.boolean("skip_special_tokens")?.unwrap_or(true),
    })
}
