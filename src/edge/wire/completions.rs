//! A request of the older kind: text that is to be continued.

use serde_json::{Map, Value};

use super::{
    Body, Bounds, OutputTokensMax, Request, StreamOptions, Tools, chat, fields, format,
    read::{Fields, unsupported, wrong_type},
    sampling,
};
use crate::{
    domain::Telling,
    edge::error::ApiError,
    prompt::{Ask, Asked, Calls, Shape},
};

/// What an answer has at most when nobody says so.
const OUTPUT_TOKENS_DEFAULT: u64 = 16;
const TOP_LOGPROBS_MAX: i64 = 5;

pub fn read(body: Body, bounds: Bounds) -> Result<(Request, StreamOptions), ApiError> {
    let Body { map } = body;
    let mut ignored = fields::check(&map, fields::COMPLETIONS)?;
    let fields = Fields::root(&map);
    let Bounds { choices_max, context_tokens_max, vocabulary, .. } = bounds;
    let (sampling, bad_words) = sampling::sampling(&fields, vocabulary)?;
    let asked = chat::output_tokens(&fields, "max_tokens", context_tokens_max)?;
    let asked = asked.unwrap_or(OutputTokensMax { field: "max_tokens", tokens: OUTPUT_TOKENS_DEFAULT });
    let stream = chat::stream(&fields, &mut ignored)?;
    let choices = chat::choices(&fields, choices_max)?;
    if fields.integer("best_of", 1..=128)?.is_some_and(|best_of| best_of != i64::from(choices)) {
        return Err(unsupported("best_of", "is not supported. Leave it out."));
    }
    let logprobs = fields.integer("logprobs", 0..=TOP_LOGPROBS_MAX)?;
    let prompt = prompt(&fields, vocabulary)?;
    let echo = match (&prompt, fields.boolean("echo")?.unwrap_or(false)) {
        (_, false) => String::new(),
        (_, true) if logprobs.is_some() => {
            return Err(unsupported("echo", "is not supported together with 'logprobs'."));
        }
        (Asked::Text(text), true) => text.clone(),
        (_, true) => return Err(unsupported("echo", "is not supported for a prompt of token ids.")),
    };
    let (text, shape_param) = format::text_shape(&fields)?;
    let request = Request {
        ask: Ask {
            lane: String::new(),
            prompt,
            shape: Shape { text, calls: Calls::default() },
            tokens_max: chat::tokens_max(&fields, context_tokens_max)?,
            bad_words,
        },
        output_tokens_max: Some(asked),
        choices,
        sampling,
        stops: sampling::stops(&fields, vocabulary)?,
        telling: Telling {
            logprobs: logprobs.map(|top| top as u32),
            prompt_logprobs: None,
            token_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
            control_text: !fields.boolean("skip_special_tokens")?.unwrap_or(true),
        },
        tokens_as_ids: fields.boolean("return_tokens_as_token_ids")?.unwrap_or(false),
        echo,
        shape_param,
        tools: Tools::default(),
        cache_salt: chat::cache_salt(&fields)?,
        priority: chat::priority(&fields)?,
        own_id: chat::own_id(&fields)?,
        stream: stream.is_some(),
        store: false,
        instructions: 0,
        metadata: Map::new(),
        ignored,
    };
    Ok((request, stream.unwrap_or_default()))
}

/// One prompt, in any of its spellings.
fn prompt(fields: &Fields, vocabulary: usize) -> Result<Asked, ApiError> {
    let value = fields.required("prompt", fields.given("prompt"))?;
    let items = match value {
        Value::String(text) => return filled(Asked::Text(text.clone()), text.is_empty()),
        Value::Array(items) => items,
        other => return Err(wrong_type("prompt", "a string or an array", other)),
    };
    match &items[..] {
        [] => filled(Asked::Tokens(Vec::new()), true),
        [Value::String(text)] => filled(Asked::Text(text.clone()), text.is_empty()),
        [inner @ Value::Array(tokens)] => {
            let inner = Map::from_iter([("prompt[0]".to_owned(), inner.clone())]);
            let read = Fields::root(&inner).tokens("prompt[0]", usize::MAX, vocabulary)?.unwrap_or_default();
            filled(Asked::Tokens(read), tokens.is_empty())
        }
        [Value::Number(_), ..] => {
            let tokens = fields.tokens("prompt", usize::MAX, vocabulary)?.unwrap_or_default();
            Ok(Asked::Tokens(tokens))
        }
        [Value::String(_) | Value::Array(_), ..] => {
            Err(unsupported("prompt", "must be one prompt: send a request for each of several."))
        }
        [other, ..] => Err(wrong_type("prompt[0]", "a string, a token id or an array of these", other)),
    }
}

fn filled(prompt: Asked, is_empty: bool) -> Result<Asked, ApiError> {
    if is_empty {
        return Err(ApiError::field("invalid_value", "prompt", "Invalid 'prompt': it is empty."));
    }
    Ok(prompt)
}
