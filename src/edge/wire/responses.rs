//! A request of the newer kind: items in, items out.

use serde_json::{Map, Value, json};

use super::{
    Body, Bounds, OutputTokensMax, Request, Tools, chat, fields, format,
    read::{Fields, unsupported, wrong_type},
    sampling,
    tools::{self, Toolbox},
};
use crate::{
    domain::{SamplingParams, Stops, Telling},
    edge::error::{ApiError, shorten},
    prompt::{Ask, Asked, Conversation, Message, Role, Shape, ToolCall},
};

const ID_CHARACTERS_MAX: usize = 256;
const ITEMS_MAX: usize = 2048;
const INCLUDE_MAX: usize = 16;
const TOP_LOGPROBS_MAX: i64 = 20;
const LOGPROBS: &str = "message.output_text.logprobs";

/// What the answer repeats of its request.
#[derive(Clone, Debug)]
pub struct About {
    /// The fields as the answer shows them.
    pub shown: Map<String, Value>,
}

/// What was said in earlier requests.
pub type Earlier = Vec<Message>;

/// The response that this one follows.
pub fn previous(body: &Body) -> Result<Option<String>, ApiError> {
    Ok(Fields::root(&body.map).text("previous_response_id", ID_CHARACTERS_MAX)?.map(str::to_owned))
}

pub fn read(body: Body, bounds: Bounds, earlier: Earlier) -> Result<(Request, About), ApiError> {
    let Body { map } = body;
    let mut ignored = fields::check(&map, fields::RESPONSES)?;
    let fields = Fields::root(&map);
    let Bounds { messages_max, context_tokens_max, vocabulary, .. } = bounds;
    let (all, bad_words) = sampling::sampling(&fields, vocabulary)?;
    let asked = chat::output_tokens(&fields, "max_output_tokens", context_tokens_max)?;
    let stream = fields.boolean("stream")?.unwrap_or(false);
    stream_options(&fields, stream, &mut ignored)?;
    let text = fields.object("text")?;
    if let Some(text) = &text {
        text.text("verbosity", usize::MAX)?;
    }
    let (shape, shape_param) = match &text {
        Some(text) => (format::of_responses(text)?, "text.format.schema"),
        None => (crate::prompt::TextShape::Any, "text"),
    };
    let Toolbox { told, calls, places, .. } = tools::of_responses(&fields)?;
    let instructions = fields.text("instructions", usize::MAX)?.map(str::to_owned);
    let input = input(&fields, messages_max)?;
    let mut messages = Vec::with_capacity(earlier.len() + input.len() + 1);
    messages.extend(instructions.iter().map(|text| Message::new(Role::System, text.clone())));
    messages.extend(earlier);
    messages.extend(input);
    if messages.len() > messages_max {
        let why = format!("Invalid 'input': at most {messages_max} messages, with those of earlier responses.");
        return Err(ApiError::field("array_above_max_length", "input", why));
    }
    answered(&messages)?;
    let logprobs = logprobs(&fields)?;
    let tokens_max = match fields.word("truncation", &["auto", "disabled"])? {
        Some("auto") => Some(context_tokens_max.saturating_sub(1) as usize),
        _ => None,
    };
    let store = fields.boolean("store")?.unwrap_or(true);
    let shown = shown(&fields, &all, asked, store);
    let conversation = Conversation { tools: told, ..Conversation::new(messages) };
    let request = Request {
        ask: Ask {
            lane: String::new(),
            prompt: Asked::Conversation(Box::new(conversation)),
            shape: Shape { text: shape, calls },
            tokens_max,
            bad_words,
        },
        output_tokens_max: asked,
        choices: 1,
        sampling: all,
        stops: Stops::default(),
        telling: Telling { logprobs, ..Telling::default() },
        tokens_as_ids: false,
        echo: String::new(),
        shape_param,
        tools: Tools { places, is_legacy: false },
        cache_salt: chat::cache_salt(&fields)?,
        priority: chat::priority(&fields)?,
        own_id: None,
        stream,
        store,
        instructions: usize::from(instructions.is_some()),
        metadata: fields.map("metadata")?.cloned().unwrap_or_default(),
        ignored,
    };
    Ok((request, About { shown }))
}

fn stream_options(fields: &Fields, stream: bool, ignored: &mut Vec<String>) -> Result<(), ApiError> {
    let Some(options) = fields.object("stream_options")? else { return Ok(()) };
    if !stream {
        let why = "The 'stream_options' parameter is only allowed when 'stream' is true.";
        return Err(ApiError::field("invalid_value", "stream_options", why));
    }
    if options.boolean("include_obfuscation")?.unwrap_or(false) {
        ignored.push(options.param("include_obfuscation"));
    }
    ignored.extend(
        options
            .all()
            .map(|(name, _)| name)
            .filter(|name| *name != "include_obfuscation")
            .map(|name| options.param(name)),
    );
    Ok(())
}

/// `top_logprobs`, or that logprobs are to be included.
fn logprobs(fields: &Fields) -> Result<Option<u32>, ApiError> {
    let top = fields.integer("top_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    let include = fields.texts("include", INCLUDE_MAX, 256)?.unwrap_or_default();
    if let Some(other) = include.iter().find(|word| *word != LOGPROBS && *word != "reasoning.encrypted_content") {
        let why = format!("of `{}` is not supported.", shorten(other));
        return Err(unsupported("include", why));
    }
    let is_included = include.iter().any(|word| word == LOGPROBS);
    Ok((is_included || top.is_some_and(|top| top > 0)).then_some(top.unwrap_or(0) as u32))
}

/// The answer's own account of what was asked for.
fn shown(
    fields: &Fields,
    sampling: &SamplingParams,
    asked: Option<OutputTokensMax>,
    store: bool,
) -> Map<String, Value> {
    let given = |name: &str, default: Value| fields.given(name).cloned().unwrap_or(default);
    let text = match fields.given("text").and_then(|text| text.get("format")) {
        Some(format) if !format.is_null() => json!({ "format": format }),
        _ => json!({ "format": { "type": "text" } }),
    };
    let pairs = [
        ("instructions", given("instructions", Value::Null)),
        ("max_output_tokens", asked.map_or(Value::Null, |asked| json!(asked.tokens))),
        ("metadata", given("metadata", json!({}))),
        ("parallel_tool_calls", given("parallel_tool_calls", json!(true))),
        ("previous_response_id", given("previous_response_id", Value::Null)),
        ("reasoning", json!({ "effort": null, "summary": null })),
        ("store", json!(store)),
        ("temperature", json!(sampling.temperature)),
        ("text", text),
        ("tool_choice", given("tool_choice", json!("auto"))),
        ("tools", given("tools", json!([]))),
        ("top_logprobs", given("top_logprobs", json!(0))),
        ("top_p", json!(sampling.top_p)),
        ("truncation", given("truncation", json!("disabled"))),
        ("user", given("user", Value::Null)),
        ("background", json!(false)),
    ];
    pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn input(fields: &Fields, most: usize) -> Result<Vec<Message>, ApiError> {
    let value = fields.required("input", fields.given("input"))?;
    let items = match value {
        Value::String(text) => return Ok(vec![Message::new(Role::User, text.clone())]),
        Value::Array(_) => fields.array("input", ITEMS_MAX.min(most.max(1)))?.unwrap_or_default(),
        other => return Err(wrong_type("input", "a string or an array of items", other)),
    };
    if items.is_empty() {
        let why = "Invalid 'input': empty array. Expected at least one item.";
        return Err(ApiError::field("empty_array", "input", why));
    }
    let mut messages: Vec<Message> = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let item = Fields::of(item, format!("input[{i}]"))?;
        match item.text("type", 256)?.unwrap_or("message") {
            "message" => messages.push(message(&item)?),
            "function_call" => {
                let text = |name: &str| item.text(name, usize::MAX).and_then(|text| item.required(name, text));
                let (id, name, arguments) = (text("call_id")?, text("name")?, text("arguments")?);
                let call = ToolCall { id: id.to_owned(), name: name.to_owned(), arguments: arguments.to_owned() };
                // Calls that were made at once are one message, and may follow words of the same turn.
                match messages.last_mut() {
                    Some(last) if last.role == Role::Assistant => last.tool_calls.push(call),
                    _ => messages.push(Message { tool_calls: vec![call], ..Message::new(Role::Assistant, "") }),
                }
            }
            "function_call_output" => {
                let id = item.text("call_id", ID_CHARACTERS_MAX)?;
                let id = item.required("call_id", id)?.to_owned();
                let output = item.required("output", item.given("output"))?;
                let content = content(&item, "output", output, Role::Tool)?;
                messages.push(Message { tool_call_id: Some(id), ..Message::new(Role::Tool, content) });
            }
            // What other models thought is not for this one to read.
            "reasoning" => {}
            other => return Err(item.none_of("type", other, &["message", "function_call", "function_call_output"])),
        }
    }
    if messages.is_empty() {
        return Err(ApiError::field("empty_array", "input", "Invalid 'input': there is no message in it."));
    }
    Ok(messages)
}

fn message(item: &Fields) -> Result<Message, ApiError> {
    let role = item.text("role", 256)?;
    let role = match item.required("role", role)? {
        "user" => Role::User,
        "assistant" => Role::Assistant,
        "system" => Role::System,
        "developer" => Role::Developer,
        other => return Err(item.none_of("role", other, &["user", "assistant", "system", "developer"])),
    };
    let value = item.required("content", item.given("content"))?;
    Ok(Message::new(role, content(item, "content", value, role)?))
}

fn content(item: &Fields, name: &str, value: &Value, role: Role) -> Result<String, ApiError> {
    let param = item.param(name);
    let parts = match value {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        other => return Err(wrong_type(&param, "a string or an array of parts", other)),
    };
    let mut text = String::new();
    for (j, part) in parts.iter().enumerate() {
        let part = Fields::of(part, format!("{param}[{j}]"))?;
        let kind = part.text("type", 256)?;
        let field = match (part.required("type", kind)?, role) {
            ("input_text" | "text", _) | ("output_text", Role::Assistant) => "text",
            ("refusal", Role::Assistant) => "refusal",
            (kind @ ("input_image" | "input_file" | "input_audio"), _) => {
                let why = format!("Invalid '{}': this model reads text only, not `{kind}`.", part.param("type"));
                return Err(ApiError::field("unsupported_value", part.param("type"), why));
            }
            (other, _) => return Err(part.none_of("type", other, &["input_text", "output_text"])),
        };
        if j > 0 {
            text.push('\n');
        }
        let piece = part.text(field, usize::MAX)?;
        text.push_str(part.required(field, piece)?);
    }
    Ok(text)
}

/// Every call has its answer and every answer its call.
fn answered(messages: &[Message]) -> Result<(), ApiError> {
    let mut open: Vec<&str> = Vec::new();
    for message in messages {
        match (&message.tool_call_id, message.role) {
            (Some(id), Role::Tool) => match open.iter().position(|call| call == id) {
                Some(at) => drop(open.remove(at)),
                None => {
                    let why = format!("Invalid 'input': no function call has the id `{}`.", shorten(id));
                    return Err(ApiError::field("invalid_value", "input", why));
                }
            },
            _ if open.is_empty() => open = message.tool_calls.iter().map(|call| call.id.as_str()).collect(),
            _ => break,
        }
    }
    match open.first() {
        None => Ok(()),
        Some(id) => {
            let why = format!("Invalid 'input': the function call `{}` has no output.", shorten(id));
            Err(ApiError::field("invalid_value", "input", why))
        }
    }
}
