//! A chat request.

use serde_json::Value;

use super::{
    Body, Bounds, OutputTokensMax, Request, StreamOptions, Tools, fields, format,
    messages::messages,
    read::{Fields, unsupported, whole, wrong_type},
    sampling,
    tools::{Toolbox, toolbox},
};
use crate::{
    domain::Priority,
    edge::error::ApiError,
    prompt::{Ask, Asked, Conversation, Role, Shape},
};

const SALT_CHARACTERS_MAX: usize = 256;
const ID_CHARACTERS_MAX: usize = 64;
const DOCUMENTS_MAX: usize = 128;

/// What comes out need not be checked again.
pub fn read(body: Body, bounds: Bounds) -> Result<(Request, StreamOptions), ApiError> {
    let Body { map } = body;
    let mut ignored = fields::check(&map, fields::CHAT)?;
    let Bounds { messages_max, choices_max, context_tokens_max, vocabulary } = bounds;
    let fields = Fields::root(&map);
    let (sampling, bad_words) = sampling::sampling(&fields, vocabulary)?;
    let newer = output_tokens(&fields, "max_completion_tokens", context_tokens_max)?;
    let older = output_tokens(&fields, "max_tokens", context_tokens_max)?;
    let output_tokens_max = newer.or(older);
    if let Some(max) = output_tokens_max
        && u64::from(sampling.min_tokens) > max.tokens
    {
        let why = format!("Invalid 'min_tokens': {} is more than '{}'.", sampling.min_tokens, max.field);
        return Err(ApiError::field("out_of_range", "min_tokens", why));
    }
    let stops = sampling::stops(&fields, vocabulary)?;
    let stream = stream(&fields, &mut ignored)?;
    let telling = sampling::telling(&fields, stream.is_some())?;
    let (text, shape_param) = format::text_shape(&fields)?;
    let Toolbox { told, calls, places, is_legacy } = toolbox(&fields)?;
    let choices = choices(&fields, choices_max)?;
    let mut conversation = Conversation::new(messages(&fields, messages_max, &mut ignored)?);
    conversation.tools = told;
    conversation.documents = documents(&fields)?;
    conversation.variables = fields.map("chat_template_kwargs")?.cloned().unwrap_or_default();
    conversation.has_bos = fields.boolean("add_special_tokens")?.unwrap_or(false);
    conversation.continues_last = fields.boolean("continue_final_message")?.unwrap_or(false);
    let begins_answer = fields.boolean("add_generation_prompt")?;
    if conversation.continues_last && begins_answer == Some(true) {
        let why = "'continue_final_message' and 'add_generation_prompt' cannot both be true.";
        return Err(ApiError::field("invalid_value", "continue_final_message", why));
    }
    conversation.begins_answer = begins_answer.unwrap_or(!conversation.continues_last);
    let echo = fields.boolean("echo")?.unwrap_or(false);
    let echo = match conversation.messages.last() {
        Some(last) if echo && last.role == Role::Assistant => last.content.clone(),
        _ => String::new(),
    };
    let tokens_max = tokens_max(&fields, context_tokens_max)?;
    let metadata = fields.map("metadata")?.cloned().unwrap_or_default();
    let store = fields.boolean("store")?.unwrap_or(false);
    let request = Request {
        ask: Ask {
            lane: String::new(),
            prompt: Asked::Conversation(Box::new(conversation)),
            shape: Shape { text, calls },
            tokens_max,
            bad_words,
        },
        output_tokens_max,
        choices,
        sampling,
        stops,
        telling,
        tokens_as_ids: fields.boolean("return_tokens_as_token_ids")?.unwrap_or(false),
        echo,
        shape_param,
        tools: Tools { places, is_legacy },
        cache_salt: cache_salt(&fields)?,
        priority: priority(&fields)?,
        own_id: own_id(&fields)?,
        stream: stream.is_some(),
        store,
        instructions: 0,
        metadata,
        ignored,
    };
    Ok((request, stream.unwrap_or_default()))
}

fn documents(fields: &Fields) -> Result<Vec<Value>, ApiError> {
    let documents = fields.array("documents", DOCUMENTS_MAX)?.unwrap_or_default();
    for (i, document) in documents.iter().enumerate() {
        Fields::of(document, format!("documents[{i}]"))?;
    }
    Ok(documents.to_vec())
}

pub(super) fn choices(fields: &Fields, most: u32) -> Result<u32, ApiError> {
    let choices = fields.integer("n", 1..=128)?.unwrap_or(1) as u32;
    if choices > most {
        let why = format!("Invalid 'n': at most {most} choices, but got {choices}.");
        return Err(ApiError::field("out_of_range", "n", why));
    }
    Ok(choices)
}

pub(super) fn cache_salt(fields: &Fields) -> Result<String, ApiError> {
    Ok(fields.text("cache_salt", SALT_CHARACTERS_MAX)?.unwrap_or_default().to_owned())
}

/// How many of the prompt's tokens, the last, are read at most.
pub(super) fn tokens_max(fields: &Fields, context_tokens_max: u32) -> Result<Option<usize>, ApiError> {
    match fields.integer("truncate_prompt_tokens", -1..=i64::from(u32::MAX))? {
        Some(0) => {
            let why = "Invalid 'truncate_prompt_tokens': expected -1 or a value of at least 1, but got 0.";
            Err(ApiError::field("out_of_range", "truncate_prompt_tokens", why))
        }
        // As many as there is room for.
        Some(-1) => Ok(Some(context_tokens_max.saturating_sub(1) as usize)),
        tokens => Ok(tokens.map(|tokens| tokens as usize)),
    }
}

/// How long an answer may be in a context of `context` tokens.
pub(super) fn output_tokens(
    fields: &Fields,
    name: &'static str,
    context: u32,
) -> Result<Option<OutputTokensMax>, ApiError> {
    let Some(value) = fields.given(name) else { return Ok(None) };
    let tokens = whole(value).ok_or_else(|| wrong_type(name, "an integer", value))?;
    if tokens < 1 {
        let why = format!("Invalid '{name}': expected a value of at least 1, but got {value}.");
        return Err(ApiError::field("integer_below_min_value", name, why));
    }
    let asked = OutputTokensMax { field: name, tokens: u64::try_from(tokens).unwrap_or(u64::MAX) };
    asked.fits(context)?;
    Ok(Some(asked))
}

pub(super) fn stream(fields: &Fields, ignored: &mut Vec<String>) -> Result<Option<StreamOptions>, ApiError> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let Some(given) = fields.object("stream_options")? else { return Ok(stream.then(StreamOptions::default)) };
    if !stream {
        let why = "The 'stream_options' parameter is only allowed when 'stream' is true.";
        return Err(ApiError::field("invalid_value", "stream_options", why));
    }
    let options = StreamOptions {
        include_usage: given.boolean("include_usage")?.unwrap_or(false),
        continuous_usage: given.boolean("continuous_usage_stats")?.unwrap_or(false),
    };
    let is_obscured = given.boolean("include_obfuscation")?.unwrap_or(false);
    for (name, _) in given.all() {
        match name {
            "include_usage" | "continuous_usage_stats" => {}
            "include_obfuscation" if !is_obscured => {}
            _ => ignored.push(given.param(name)),
        }
    }
    Ok(Some(options))
}

/// The class of two families of clients. What a tenant may ask for at most is for admission to say.
pub(super) fn priority(fields: &Fields) -> Result<Priority, ApiError> {
    let tier = fields.word("service_tier", &["auto", "default", "flex", "priority"])?;
    // Lower is earlier.
    let number = fields.integer("priority", i64::MIN..=i64::MAX)?.unwrap_or(0);
    Ok(match (tier, number.signum()) {
        (Some("flex"), _) | (_, 1) => Priority::Low,
        (Some("priority"), _) | (_, -1) => Priority::High,
        _ => Priority::Normal,
    })
}

pub(super) fn own_id(fields: &Fields) -> Result<Option<String>, ApiError> {
    let Some(id) = fields.text("request_id", ID_CHARACTERS_MAX)? else { return Ok(None) };
    if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte)) {
        let why = "Invalid 'request_id': expected letters, digits, `_`, `-` and `.`.";
        return Err(ApiError::field("invalid_value", "request_id", why));
    }
    if id.starts_with("chatcmpl-") {
        return Err(unsupported(
            "request_id",
            "must not begin with `chatcmpl-`, which the answer's id does by itself.",
        ));
    }
    Ok(Some(id.to_owned()))
}
