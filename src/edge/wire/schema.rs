//! The JSON schema of every field that a request may have, by its name: what `/openapi.json` says of it.
//!
//! A test sends what these schemas allow and what they forbid, so that they stay true to the readers beside them.

use serde_json::{Map, Value, json};

use super::fields::{Disposition, Table};

/// Of a body with the fields of `table`, of which `required` must be there.
pub fn body(table: Table, required: &[&str], of_responses: bool) -> Value {
    let mut properties = Map::new();
    for (name, disposition) in table {
        let mut schema = if of_responses { responses_field(name) } else { None }.unwrap_or_else(|| field(name));
        let note = match disposition {
            Disposition::Works | Disposition::Checked(_) => None,
            Disposition::Ignored(_) => Some("Accepted without effect, and named in `x-lightcone-ignored`."),
            Disposition::Refused(_) => Some("Refused, unless it asks for nothing."),
        };
        if let (Some(note), Some(schema)) = (note, schema.as_object_mut()) {
            schema.insert("description".to_owned(), json!(note));
        }
        properties.insert((*name).to_owned(), if required.contains(name) { schema } else { or_null(schema) });
    }
    json!({ "type": "object", "properties": properties, "required": required })
}

/// `null` means the default in every field that need not be there.
fn or_null(schema: Value) -> Value {
    match schema.get("type") {
        Some(Value::String(kind)) if kind == "null" => schema,
        Some(Value::String(kind)) => {
            let kind = kind.clone();
            let mut schema = schema;
            schema["type"] = json!([kind, "null"]);
            if let Some(Value::Array(words)) = schema.get_mut("enum") {
                words.push(Value::Null);
            }
            schema
        }
        _ => json!({ "anyOf": [schema, { "type": "null" }] }),
    }
}

fn integer(min: i64, max: i64) -> Value {
    json!({ "type": "integer", "minimum": min, "maximum": max })
}

fn number(min: f64, max: f64) -> Value {
    json!({ "type": "number", "minimum": min, "maximum": max })
}

fn flag() -> Value {
    json!({ "type": "boolean" })
}

fn text(bytes_max: usize) -> Value {
    json!({ "type": "string", "maxLength": bytes_max })
}

fn tokens(items_max: Option<usize>) -> Value {
    let mut schema = json!({ "type": "array", "items": { "type": "integer", "minimum": 0 } });
    if let Some(most) = items_max {
        schema["maxItems"] = json!(most);
    }
    schema
}

fn one_of_texts(text: Value, items_max: usize) -> Value {
    json!({ "anyOf": [text, { "type": "array", "items": text, "maxItems": items_max }] })
}

/// As the readers of this folder take it.
pub fn field(name: &str) -> Value {
    match name {
        "model" => json!({ "type": "string", "minLength": 1, "examples": ["tzafon.sm-1"] }),
        "messages" => json!({ "type": "array", "minItems": 1, "items": { "$ref": "#/components/schemas/Message" } }),
        "prompt" => json!({ "anyOf": [
            { "type": "string", "minLength": 1 },
            { "type": "array", "items": { "type": "integer", "minimum": 0 }, "minItems": 1 },
            { "type": "array", "items": { "type": "string", "minLength": 1 }, "minItems": 1, "maxItems": 1 },
        ] }),
        "max_completion_tokens" | "max_tokens" | "max_output_tokens" => json!({ "type": "integer", "minimum": 1 }),
        "temperature" => number(0.0, 2.0),
        "top_p" | "min_p" => number(0.0, 1.0),
        "top_k" => integer(-1, i64::from(i32::MAX)),
        "n" | "best_of" => integer(1, 128),
        "seed" | "priority" => json!({ "type": "integer", "format": "int64" }),
        "frequency_penalty" | "presence_penalty" => number(-2.0, 2.0),
        "repetition_penalty" => json!({ "type": "number", "exclusiveMinimum": 0, "maximum": 10 }),
        "stop" => one_of_texts(json!({ "type": "string", "minLength": 1, "maxLength": 1024 }), 4),
        "stop_token_ids" => tokens(Some(256)),
        "allowed_token_ids" => json!({ "type": "array", "items": { "type": "integer", "minimum": 0 }, "minItems": 1 }),
        "tokens" => tokens(None),
        "bad_words" => {
            let word = json!({ "type": "string", "minLength": 1, "maxLength": 256 });
            json!({ "type": "array", "items": word, "maxItems": 256 })
        }
        "logit_bias" => json!({
            "type": "object", "additionalProperties": number(-100.0, 100.0),
            "propertyNames": { "pattern": "^[0-9]+$" },
        }),
        "logprobs" => flag(),
        "top_logprobs" | "prompt_logprobs" => integer(0, 20),
        "min_tokens" => integer(0, i64::from(u32::MAX)),
        "truncate_prompt_tokens" => json!({ "type": "integer", "minimum": -1, "not": { "const": 0 } }),
        "stream_options" => json!({ "type": "object", "properties": {
            "include_usage": or_null(flag()), "include_obfuscation": or_null(flag()),
            "continuous_usage_stats": or_null(flag()),
        } }),
        "tools" => json!({ "type": "array", "maxItems": 128, "items": { "$ref": "#/components/schemas/Tool" } }),
        "functions" => {
            json!({ "type": "array", "maxItems": 128, "items": { "$ref": "#/components/schemas/Function" } })
        }
        "tool_choice" => json!({ "anyOf": [
            { "enum": ["none", "auto", "required"] },
            { "type": "object", "properties": { "type": { "const": "function" }, "function": named() },
              "required": ["type", "function"] },
        ] }),
        "function_call" => json!({ "anyOf": [{ "enum": ["none", "auto"] }, named()] }),
        "response_format" => json!({ "anyOf": [
            { "type": "object", "properties": { "type": { "enum": ["text", "json_object"] } }, "required": ["type"] },
            { "type": "object", "required": ["type", "json_schema"], "properties": {
                "type": { "const": "json_schema" },
                "json_schema": described(),
            } },
        ] }),
        "structured_outputs" => json!({ "type": "object", "properties": {
            "json": { "anyOf": [{ "type": "object" }, { "type": "string" }] },
            "regex": { "type": "string" },
            "choice": { "type": "array", "items": { "type": "string", "minLength": 1 }, "minItems": 1 },
            "grammar": { "type": "string", "description": "In Lark's syntax." },
            "json_object": flag(),
            "whitespace_pattern": { "type": "string" },
            "disable_any_whitespace": flag(),
            "disable_additional_properties": flag(),
        } }),
        "service_tier" => json!({ "type": "string", "enum": ["auto", "default", "flex", "priority"] }),
        "metadata" => json!({ "type": "object", "maxProperties": 16, "additionalProperties": text(512) }),
        "cache_salt" => text(256),
        "request_id" => json!({ "type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$" }),
        "documents" => json!({ "type": "array", "maxItems": 128, "items": { "type": "object" } }),
        "chat_template_kwargs" | "prompt_cache_options" | "prediction" | "vllm_xargs" | "reasoning" => {
            json!({ "type": "object" })
        }
        "length_penalty" | "max_tool_calls" => json!({ "type": "number" }),
        "user"
        | "safety_identifier"
        | "prompt_cache_key"
        | "prompt_cache_retention"
        | "reasoning_effort"
        | "verbosity"
        | "instructions"
        | "previous_response_id" => json!({ "type": "string" }),
        "input" => json!({ "anyOf": [
            { "type": "string" },
            { "type": "array", "minItems": 1, "items": { "$ref": "#/components/schemas/InputItem" } },
        ] }),
        "text" => json!({ "type": "object", "properties": {
            "format": { "type": "object", "required": ["type"], "properties": {
                "type": { "enum": ["text", "json_object", "json_schema"] }, "name": { "type": "string" },
                "schema": { "type": "object" }, "strict": or_null(flag()),
            } },
            "verbosity": { "type": ["string", "null"] },
        } }),
        "include" => json!({ "type": "array", "items": { "enum": [
            "message.output_text.logprobs", "reasoning.encrypted_content",
        ] } }),
        "truncation" => json!({ "type": "string", "enum": ["auto", "disabled"] }),
        "modalities" => json!({ "type": "array", "items": { "const": "text" }, "minItems": 1 }),
        "logits_processors" => json!({ "type": "array", "maxItems": 0 }),
        "mm_processor_kwargs" => json!({ "type": "object", "maxProperties": 0 }),
        "use_beam_search" | "background" => json!({ "const": false }),
        "audio" | "web_search_options" | "moderation" | "chat_template" | "kv_transfer_params" | "suffix"
        | "conversation" => json!({ "type": "null" }),
        // All that is left says yes or no.
        _ => flag(),
    }
}

/// Where a field of the newer kind of request has another form.
fn responses_field(name: &str) -> Option<Value> {
    Some(match name {
        "tools" => json!({ "type": "array", "maxItems": 128, "items": {
            "allOf": [{ "$ref": "#/components/schemas/Function" }],
            "properties": { "type": { "const": "function" } }, "required": ["type", "name"],
        } }),
        "tool_choice" => json!({ "anyOf": [
            { "enum": ["none", "auto", "required"] },
            { "allOf": [named()], "properties": { "type": { "const": "function" } }, "required": ["type", "name"] },
        ] }),
        "prompt" => json!({ "type": "null" }),
        _ => return None,
    })
}

fn named() -> Value {
    json!({ "type": "object", "properties": { "name": function_name() }, "required": ["name"] })
}

fn function_name() -> Value {
    json!({ "type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$" })
}

fn described() -> Value {
    json!({ "type": "object", "required": ["name"], "properties": {
        "name": function_name(), "description": { "type": ["string", "null"] },
        "schema": { "type": ["object", "null"] }, "strict": { "type": ["boolean", "null"] },
    } })
}

/// Schemas that others refer to.
pub fn shared() -> Vec<(&'static str, Value)> {
    let part = json!({ "type": "object", "required": ["type", "text"], "properties": {
        "type": { "const": "text" }, "text": { "type": "string" },
    } });
    let content = json!({ "anyOf": [{ "type": "string" }, { "type": "array", "items": part, "minItems": 1 }] });
    let name = json!({ "type": ["string", "null"], "maxLength": 256 });
    let spoken = |roles: Value| {
        json!({ "type": "object", "required": ["role", "content"], "properties": {
            "role": { "enum": roles }, "content": content, "name": name,
        } })
    };
    let call = json!({ "type": "object", "required": ["id", "function"], "properties": {
        "id": { "type": "string", "maxLength": 256 }, "type": { "const": "function" },
        "function": { "type": "object", "required": ["name", "arguments"], "properties": {
            "name": { "type": "string", "maxLength": 256 }, "arguments": { "type": "string" },
        } },
    } });
    let assistant = json!({ "type": "object", "required": ["role"], "properties": {
        "role": { "const": "assistant" }, "name": name, "refusal": { "type": ["string", "null"] },
        "content": { "anyOf": [content, { "type": "null" }] },
        "tool_calls": { "type": ["array", "null"], "items": call, "maxItems": 128 },
    } });
    let tool = json!({ "type": "object", "required": ["role", "content", "tool_call_id"], "properties": {
        "role": { "const": "tool" }, "content": content, "tool_call_id": { "type": "string", "maxLength": 256 },
    } });
    let function = json!({ "type": "object", "required": ["name"], "properties": {
        "name": function_name(), "description": { "type": ["string", "null"] },
        "parameters": { "type": ["object", "null"] }, "strict": { "type": ["boolean", "null"] },
    } });
    let item = json!({ "anyOf": [
        { "type": "object", "required": ["role", "content"], "properties": {
            "type": { "const": "message" }, "role": { "enum": ["user", "assistant", "system", "developer"] },
            "content": { "anyOf": [{ "type": "string" }, { "type": "array", "items": {
                "type": "object", "required": ["type", "text"], "properties": {
                    "type": { "const": "input_text" }, "text": { "type": "string" },
                } } }] },
        } },
        { "type": "object", "required": ["type", "call_id", "name", "arguments"], "properties": {
            "type": { "const": "function_call" }, "call_id": { "type": "string" }, "name": { "type": "string" },
            "arguments": { "type": "string" },
        } },
        { "type": "object", "required": ["type", "call_id", "output"], "properties": {
            "type": { "const": "function_call_output" }, "call_id": { "type": "string", "maxLength": 256 },
            "output": { "type": "string" },
        } },
    ] });
    vec![
        ("Message", json!({ "anyOf": [spoken(json!(["developer", "system", "user"])), assistant, tool] })),
        ("Function", function),
        (
            "Tool",
            json!({ "type": "object", "required": ["type", "function"], "properties": {
            "type": { "const": "function" }, "function": { "$ref": "#/components/schemas/Function" },
        } }),
        ),
        ("InputItem", item),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::wire::fields;

    #[test]
    fn schemas_compile_and_take_null_wherever_a_field_may_be_left_out() {
        let tables = [fields::CHAT, fields::COMPLETIONS, fields::RESPONSES, fields::TOKENIZE, fields::DETOKENIZE];
        for table in tables {
            let schema = body(table, &[], std::ptr::eq(table, fields::RESPONSES));
            let components: Map<String, Value> = shared().into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
            let mut whole = schema.clone();
            whole["components"] = json!({ "schemas": components });
            let validator = jsonschema::validator_for(&whole).unwrap();
            let nulls: Map<String, Value> = table.iter().map(|(name, _)| ((*name).to_owned(), Value::Null)).collect();
            let faults: Vec<String> =
                validator.iter_errors(&Value::Object(nulls.clone())).map(|error| error.to_string()).collect();
            assert!(faults.is_empty(), "{faults:?}");
        }
    }
}
