//! The schemas of answers. Most are made of the types that are written; those of answers that are written piece by
//! piece, or without types, stand here by hand, and tests hold them against what is sent.

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use crate::{
    edge::{
        account::{balance, generations, limits, organization},
        cancel,
        dialect::{completions, openai},
        error, models, status, stored, tokens,
    },
    ledger::{Receipt, Statement},
};

/// All of them, by name.
pub fn all() -> Map<String, Value> {
    let mut all: Map<String, Value> = [
        ("ChatCompletion", of::<openai::Completion>()),
        ("StoredChatCompletion", stored_chat()),
        ("ChatCompletionList", of::<stored::ChatList>()),
        ("ChatCompletionChunk", chat_chunk()),
        ("Completion", of::<completions::Completion>()),
        ("CompletionChunk", completion_chunk()),
        ("Response", response()),
        ("ResponseEvent", response_event()),
        ("Deleted", of::<stored::Deleted>()),
        ("Cancellation", of::<cancel::Cancellation>()),
        ("Tokens", of::<tokens::Tokens>()),
        ("Text", of::<tokens::Text>()),
        ("ModelList", of::<models::List>()),
        ("Model", of::<models::Model>()),
        ("Balance", of::<balance::Balance>()),
        ("Usage", of::<limits::Usage>()),
        ("Generation", of::<generations::Cost>()),
        ("Receipt", of::<Receipt>()),
        ("ReceiptKey", of::<generations::PublicKey>()),
        ("Statement", of::<Statement>()),
        ("CompletionsUsage", of::<organization::Page<organization::CompletionsResult>>()),
        ("Costs", of::<organization::Page<organization::CostsResult>>()),
        ("Health", of::<status::Health>()),
        ("Readiness", of::<status::Readiness>()),
        ("Error", of::<error::Envelope>()),
        ("Problem", of::<error::Problem>()),
        ("Document", json!({ "type": "object", "required": ["openapi", "info", "paths"] })),
    ]
    .into_iter()
    .map(|(name, schema)| (name.to_owned(), schema))
    .collect();
    for schema in all.values_mut() {
        schema.as_object_mut().map(|schema| schema.remove("title"));
    }
    all
}

/// The schema of an answer's type, with the types that it is made of in line.
fn of<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    settings.for_serialize().into_generator().into_root_schema_for::<T>().to_value()
}

fn component(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

fn stored_chat() -> Value {
    json!({ "allOf": [component("ChatCompletion")], "required": ["metadata"], "properties": {
        "metadata": { "type": "object", "additionalProperties": { "type": "string" } },
    } })
}

fn usage() -> Value {
    of::<Option<openai::WireUsage>>()
}

fn count() -> Value {
    json!({ "type": "integer", "minimum": 0 })
}

/// Written by pieces, so that a token costs a copy and no more.
fn chat_chunk() -> Value {
    let mut logprobs = of::<Option<crate::edge::answer::Logprobs>>();
    logprobs.as_object_mut().map(|schema| schema.remove("title"));
    let function = |required: Value| {
        json!({ "type": "object", "required": required, "properties": {
            "name": { "type": "string" }, "arguments": { "type": "string" },
        } })
    };
    let call = json!({ "type": "object", "required": ["index", "function"], "properties": {
        "index": count(), "id": { "type": "string" }, "type": { "const": "function" },
        "function": function(json!(["arguments"])),
    } });
    let delta = json!({ "type": "object", "properties": {
        "role": { "const": "assistant" }, "content": { "type": "string" }, "refusal": { "type": "null" },
        "tool_calls": { "type": "array", "items": call }, "function_call": function(json!(["arguments"])),
    } });
    let choice = json!({ "type": "object", "required": ["index", "delta", "logprobs", "finish_reason"],
        "properties": {
            "index": count(), "delta": delta, "logprobs": logprobs,
            "finish_reason": of::<Option<crate::edge::answer::WireReason>>(),
            "stop_reason": { "type": ["string", "integer"] },
            "token_ids": { "type": "array", "items": count() },
        },
    });
    json!({ "type": "object",
        "required": ["id", "object", "created", "model", "choices", "service_tier", "system_fingerprint"],
        "properties": {
            "id": { "type": "string" }, "object": { "const": "chat.completion.chunk" }, "created": count(),
            "model": { "type": "string" }, "choices": { "type": "array", "items": choice },
            "service_tier": { "enum": ["default", "flex", "priority"] },
            "system_fingerprint": { "type": "string" }, "usage": usage(),
            "prompt_token_ids": { "type": "array", "items": count() },
        },
    })
}

/// As the whole answer, with text that is more of the same.
fn completion_chunk() -> Value {
    component("Completion")
}

fn response() -> Value {
    let words = || json!({ "type": "string" });
    let logprobs = json!({ "type": "array", "items": { "type": "object", "required": ["token", "logprob", "bytes", "top_logprobs"] } });
    let part = json!({ "type": "object", "required": ["type", "text", "annotations", "logprobs"], "properties": {
        "type": { "const": "output_text" }, "text": words(), "annotations": { "type": "array" }, "logprobs": logprobs,
    } });
    let progress = json!({ "enum": ["completed", "in_progress", "incomplete"] });
    let message = json!({ "type": "object", "required": ["id", "type", "status", "role", "content"], "properties": {
        "id": words(), "type": { "const": "message" }, "status": progress, "role": { "const": "assistant" },
        "content": { "type": "array", "items": part },
    } });
    let call = json!({ "type": "object", "required": ["id", "type", "status", "call_id", "name", "arguments"],
        "properties": {
            "id": words(), "type": { "const": "function_call" }, "status": progress, "call_id": words(),
            "name": words(), "arguments": words(),
        },
    });
    let usage = json!({ "type": ["object", "null"], "properties": {
        "input_tokens": count(), "output_tokens": count(), "total_tokens": count(),
        "input_tokens_details": { "type": "object", "properties": { "cached_tokens": count() } },
        "output_tokens_details": { "type": "object", "properties": { "reasoning_tokens": count() } },
    }, "required": ["input_tokens", "output_tokens", "total_tokens", "input_tokens_details", "output_tokens_details"] });
    let nullable = || json!({ "type": ["string", "null"] });
    let properties = json!({
        "id": words(), "object": { "const": "response" }, "created_at": count(),
        "status": { "enum": ["completed", "incomplete", "in_progress", "failed"] },
        "error": { "type": ["object", "null"], "required": ["code", "message"] },
        "incomplete_details": { "type": ["object", "null"], "required": ["reason"] },
        "model": words(), "output": { "type": "array", "items": { "anyOf": [message, call] } },
        "service_tier": { "enum": ["default", "flex", "priority"] }, "usage": usage,
        "instructions": nullable(), "max_output_tokens": { "type": ["integer", "null"] },
        "metadata": { "type": "object", "additionalProperties": words() },
        "parallel_tool_calls": { "type": "boolean" }, "previous_response_id": nullable(),
        "reasoning": { "type": "object" }, "store": { "type": "boolean" }, "temperature": { "type": "number" },
        "text": { "type": "object", "required": ["format"] }, "tool_choice": component("ToolChoice"),
        "tools": { "type": "array", "items": component("ResponseTool") }, "top_logprobs": count(),
        "top_p": { "type": "number" }, "truncation": { "enum": ["auto", "disabled"] }, "user": nullable(),
        "background": { "const": false },
    });
    let required: Vec<&String> = properties.as_object().into_iter().flat_map(Map::keys).collect();
    json!({ "type": "object", "required": required, "properties": properties })
}

fn response_event() -> Value {
    let event = |kinds: Value, properties: Value| {
        let mut required = vec!["type", "sequence_number"];
        required.extend(properties.as_object().into_iter().flat_map(Map::keys).map(String::as_str));
        let mut all = properties.clone();
        all["type"] = json!({ "enum": kinds });
        all["sequence_number"] = count();
        json!({ "type": "object", "required": required, "properties": all })
    };
    let words = || json!({ "type": "string" });
    let item = || json!({ "type": "object", "required": ["id", "type", "status"] });
    let part = || json!({ "type": "object", "required": ["type", "text"] });
    let (index, logprobs) = (count(), json!({ "type": "array" }));
    json!({ "anyOf": [
        event(
            json!([
                "response.created", "response.in_progress", "response.completed", "response.incomplete",
                "response.failed",
            ]),
            json!({ "response": component("Response") }),
        ),
        event(
            json!(["response.output_item.added", "response.output_item.done"]),
            json!({ "output_index": index, "item": item() }),
        ),
        event(
            json!(["response.content_part.added", "response.content_part.done"]),
            json!({ "item_id": words(), "output_index": index, "content_index": index, "part": part() }),
        ),
        event(
            json!(["response.output_text.delta"]),
            json!({ "item_id": words(), "output_index": index, "content_index": index, "delta": words(),
                "logprobs": logprobs }),
        ),
        event(
            json!(["response.output_text.done"]),
            json!({ "item_id": words(), "output_index": index, "content_index": index, "text": words(),
                "logprobs": logprobs }),
        ),
        event(
            json!(["response.function_call_arguments.delta"]),
            json!({ "item_id": words(), "output_index": index, "delta": words() }),
        ),
        event(
            json!(["response.function_call_arguments.done"]),
            json!({ "item_id": words(), "output_index": index, "arguments": words(), "name": words() }),
        ),
    ] })
}
