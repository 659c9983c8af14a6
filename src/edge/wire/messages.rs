//! A conversation's messages.

use serde_json::Value;

use super::read::{Fields, unsupported, wrong_type};
use crate::{
    edge::error::{ApiError, shorten},
    prompt::{Message, Role, ToolCall},
};

const NAME_CHARACTERS_MAX: usize = 256;
const ID_CHARACTERS_MAX: usize = 256;
const CALLS_MAX: usize = 128;
/// Unknown names of message fields are collected only so far.
const IGNORED_MAX: usize = 32;
const ROLES: [&str; 6] = ["developer", "system", "user", "assistant", "tool", "function"];

/// At most `most` messages. Names of fields without effect go to `ignored`.
pub fn messages(fields: &Fields, most: usize, ignored: &mut Vec<String>) -> Result<Vec<Message>, ApiError> {
    let items = match fields.given("messages") {
        Some(value) if !value.is_array() => return Err(wrong_type("messages", "an array of objects", value)),
        _ => {
            let items = fields.array("messages", most)?;
            fields.required("messages", items)?
        }
    };
    if items.is_empty() {
        let why = "Invalid 'messages': empty array. Expected at least one message.";
        return Err(ApiError::field("empty_array", "messages", why));
    }
    let mut all = Vec::with_capacity(items.len());
    let mut open = OpenCalls::default();
    for (i, item) in items.iter().enumerate() {
        let fields = Fields::of(item, format!("messages[{i}]"))?;
        all.push(message(&fields, &mut open, ignored)?);
    }
    open.none_left()?;
    Ok(all)
}

/// Calls that no tool has answered yet.
#[derive(Default)]
struct OpenCalls {
    ids: Vec<String>,
    /// Where they were made.
    at: String,
    /// Calls of the older form so far: they have no ids of their own.
    functions: usize,
}

impl OpenCalls {
    /// No call may be open before anything but a tool's answer.
    fn none_left(&self) -> Result<(), ApiError> {
        let Some(id) = self.ids.first() else { return Ok(()) };
        let why = format!(
            "Invalid '{}': every call must be answered by a message of role `tool` right behind it, but `{}` is not.",
            self.at,
            shorten(id)
        );
        Err(ApiError::field("invalid_value", self.at.clone(), why))
    }
}

fn message(fields: &Fields, open: &mut OpenCalls, ignored: &mut Vec<String>) -> Result<Message, ApiError> {
    let (role, is_function) = role(fields)?;
    if role != Role::Tool {
        open.none_left()?;
    }
    let name = fields.text("name", NAME_CHARACTERS_MAX)?.map(str::to_owned);
    let mut tool_calls = Vec::new();
    let mut tool_call_id = None;
    let mut refusal = None;
    for (field, value) in fields.all() {
        match (field, role) {
            ("role" | "content" | "name", _) => {}
            ("refusal", Role::Assistant) => {
                let text = value.as_str().ok_or_else(|| wrong_type(&fields.param(field), "a string", value))?;
                refusal = Some(text.to_owned());
            }
            ("tool_calls", Role::Assistant) => {
                let calls = calls(fields)?;
                // An empty list says nothing, also beside a call of the older form.
                if !calls.is_empty() {
                    open.ids = calls.iter().map(|call| call.id.clone()).collect();
                    open.at = fields.param(field);
                    tool_calls = calls;
                }
            }
            ("function_call", Role::Assistant) => {
                let call = Fields::of(value, fields.param(field))?;
                let id = format!("function_{}", open.functions);
                open.functions += 1;
                let call = function(&call, id.clone())?;
                if tool_calls.is_empty() {
                    (open.ids, open.at) = (vec![id], fields.param(field));
                    tool_calls = vec![call];
                }
            }
            ("tool_call_id", Role::Tool) if !is_function => {
                tool_call_id = fields.text(field, ID_CHARACTERS_MAX)?.map(str::to_owned);
            }
            ("audio", Role::Assistant) => {
                return Err(unsupported(fields.param(field), "is not supported: this model reads text."));
            }
            _ => {
                let name = format!("messages[].{}", shorten(field));
                if !ignored.contains(&name) && ignored.len() < IGNORED_MAX {
                    ignored.push(name);
                }
            }
        }
    }
    if role == Role::Tool {
        tool_call_id = Some(answered(fields, is_function, tool_call_id, name.as_deref(), open)?);
    }
    let content = match fields.given("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => text_of_parts(&fields.param("content"), role, parts)?,
        Some(other) => return Err(wrong_type(&fields.param("content"), "a string or an array of parts", other)),
        None if !tool_calls.is_empty() => refusal.unwrap_or_default(),
        None => fields.required("content", refusal)?,
    };
    Ok(Message { role, content, name, tool_calls, tool_call_id })
}

/// The call that a tool's message answers, which is then no longer open.
fn answered(
    fields: &Fields,
    is_function: bool,
    id: Option<String>,
    name: Option<&str>,
    open: &mut OpenCalls,
) -> Result<String, ApiError> {
    let (field, found) = if is_function {
        fields.required("name", name)?;
        ("name", (!open.ids.is_empty()).then_some(0))
    } else {
        let id = fields.required("tool_call_id", id)?;
        ("tool_call_id", open.ids.iter().position(|call| *call == id))
    };
    match found {
        Some(at) => Ok(open.ids.remove(at)),
        None => {
            let why = format!("Invalid '{}': no call before this message waits for its answer.", fields.param(field));
            Err(ApiError::field("invalid_value", fields.param(field), why))
        }
    }
}

fn role(fields: &Fields) -> Result<(Role, bool), ApiError> {
    let role = fields.text("role", usize::MAX)?;
    match fields.required("role", role)? {
        "developer" => Ok((Role::Developer, false)),
        "system" => Ok((Role::System, false)),
        "user" => Ok((Role::User, false)),
        "assistant" => Ok((Role::Assistant, false)),
        "tool" => Ok((Role::Tool, false)),
        "function" => Ok((Role::Tool, true)),
        other => Err(fields.none_of("role", other, &ROLES)),
    }
}

fn calls(fields: &Fields) -> Result<Vec<ToolCall>, ApiError> {
    let items = fields.array("tool_calls", CALLS_MAX)?.unwrap_or_default();
    let mut calls: Vec<ToolCall> = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let item = Fields::of(item, format!("{}[{i}]", fields.param("tool_calls")))?;
        match item.text("type", 256)?.unwrap_or("function") {
            "function" => {}
            "custom" => return Err(unsupported(item.param("type"), "`custom` is not supported: only functions are.")),
            other => return Err(item.none_of("type", other, &["function"])),
        }
        let id = item.text("id", ID_CHARACTERS_MAX)?;
        let id = item.required("id", id)?.to_owned();
        if calls.iter().any(|call| call.id == id) {
            let why = format!("Invalid '{}': there is a call `{}` already.", item.param("id"), shorten(&id));
            return Err(ApiError::field("invalid_value", item.param("id"), why));
        }
        let about = item.object("function")?;
        calls.push(function(&item.required("function", about)?, id)?);
    }
    Ok(calls)
}

fn function(fields: &Fields, id: String) -> Result<ToolCall, ApiError> {
    let name = fields.text("name", NAME_CHARACTERS_MAX)?;
    let name = fields.required("name", name)?.to_owned();
    let arguments = fields.text("arguments", usize::MAX)?;
    let arguments = fields.required("arguments", arguments)?.to_owned();
    Ok(ToolCall { id, name, arguments })
}

/// The text of the parts, one a line.
fn text_of_parts(content: &str, role: Role, parts: &[Value]) -> Result<String, ApiError> {
    if parts.is_empty() {
        let why = format!("Invalid '{content}': empty array. Expected at least one part.");
        return Err(ApiError::field("empty_array", content, why));
    }
    let mut text = String::new();
    for (j, part) in parts.iter().enumerate() {
        let part = Fields::of(part, format!("{content}[{j}]"))?;
        let kind = part.text("type", usize::MAX)?;
        let field = match (part.required("type", kind)?, role) {
            ("text", _) => "text",
            ("refusal", Role::Assistant) => "refusal",
            (kind @ ("image_url" | "input_audio" | "file" | "video_url" | "audio_url"), _) => {
                let why = format!("Invalid '{}': this model reads text only, not `{kind}`.", part.param("type"));
                return Err(ApiError::field("unsupported_value", part.param("type"), why));
            }
            (other, _) => {
                let why = format!("Invalid '{}': `{}` is not a type of content.", part.param("type"), shorten(other));
                return Err(ApiError::field("invalid_value", part.param("type"), why));
            }
        };
        if j > 0 {
            text.push('\n');
        }
        let piece = part.text(field, usize::MAX)?;
        text.push_str(part.required(field, piece)?);
    }
    Ok(text)
}
