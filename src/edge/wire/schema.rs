//! The JSON schemas of what a request may be, field by field: what `/openapi.json` says of it.
//!
//! Tests send what these schemas allow and what they forbid, so that they stay true to the readers beside them. What
//! no schema can say (that a call has its answer, that a text fits the context) is said by errors alone.

use serde_json::{Map, Value, json};

use super::fields::{self, Disposition, Neutral, Table};

/// What a schema has from the configuration and the models; of several models the greatest bound.
pub struct Limits {
    pub models: Vec<String>,
    /// By what persons call them.
    pub tiers: Vec<String>,
    pub messages_max: usize,
    pub choices_max: u32,
    pub context_tokens_max: u32,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
}

/// Which request it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Chat,
    Completions,
    Responses,
    Tokenize,
    Detokenize,
}

use Kind::{Chat, Completions, Detokenize, Responses, Tokenize};

impl Kind {
    pub const ALL: [Self; 5] = [Chat, Completions, Responses, Tokenize, Detokenize];

    pub fn name(self) -> &'static str {
        match self {
            Chat => "ChatRequest",
            Completions => "CompletionsRequest",
            Responses => "ResponsesRequest",
            Tokenize => "TokenizeRequest",
            Detokenize => "DetokenizeRequest",
        }
    }

    pub fn table(self) -> Table {
        match self {
            Chat => fields::CHAT,
            Completions => fields::COMPLETIONS,
            Responses => fields::RESPONSES,
            Tokenize => fields::TOKENIZE,
            Detokenize => fields::DETOKENIZE,
        }
    }

    fn required(self) -> &'static [&'static str] {
        match self {
            Chat => &["messages"],
            Completions => &["prompt"],
            Responses => &["input"],
            Tokenize => &[],
            Detokenize => &["tokens"],
        }
    }

    /// What one field demands of another. Said in few words, for generators of requests multiply such choices out; a
    /// rule that is not here (`continue_final_message` against `add_generation_prompt`, `best_of` as `n`) an error says.
    fn rules(self) -> Vec<Value> {
        let streams = || when(has("stream_options", json!({ "type": "object" })), has("stream", yes()));
        let (absent, off) = (json!({ "type": "null" }), json!({ "enum": [false, null] }));
        let (some, none) =
            (json!({ "type": "array", "minItems": 1 }), json!({ "type": ["array", "null"], "maxItems": 0 }));
        let (unchosen, uncalled) = (json!({ "enum": ["none", null] }), json!({ "enum": ["none", "auto", null] }));
        let choice = |choices: Vec<Value>| json!({ "anyOf": choices });
        match self {
            Chat => vec![
                choice(vec![
                    json!({ "properties": { "stream": yes(), "prompt_logprobs": absent }, "required": ["stream"] }),
                    json!({ "properties": { "stream": off, "stream_options": absent } }),
                ]),
                choice(vec![
                    json!({ "properties": { "tools": some, "functions": none, "function_call": uncalled },
                        "required": ["tools"] }),
                    json!({ "properties": { "tools": none, "tool_choice": unchosen, "functions": some },
                        "required": ["functions"] }),
                    json!({ "properties": { "tools": none, "tool_choice": unchosen, "functions": none,
                        "function_call": uncalled } }),
                ]),
                choice(vec![
                    has("logprobs", yes()),
                    json!({ "properties": { "top_logprobs": { "enum": [0, null] } } }),
                ]),
            ],
            Completions => vec![
                streams(),
                when(
                    has("echo", yes()),
                    json!({ "properties": {
                    "logprobs": absent,
                    "prompt": { "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }] },
                } }),
                ),
            ],
            Responses => vec![streams(), when(has("tool_choice", json!({ "not": unchosen })), has("tools", some))],
            Tokenize => vec![choice(vec![
                has("messages", json!({ "type": "array" })),
                has("prompt", json!({ "type": "string" })),
            ])],
            Detokenize => Vec::new(),
        }
    }
}

/// Of a whole body.
pub fn body(kind: Kind, limits: &Limits) -> Value {
    let mut properties = Map::new();
    for (name, disposition) in kind.table() {
        let mut schema = match disposition {
            Disposition::Refused(neutral) => neutral.schema(),
            _ => field(kind, name, limits),
        };
        let note = match disposition {
            Disposition::Works | Disposition::Checked(_) => None,
            Disposition::Ignored(_) => Some("Accepted without effect, and named in `x-lightcone-ignored`."),
            Disposition::Refused(_) => Some("Refused, unless it asks for nothing."),
        };
        if !kind.required().contains(name) {
            schema = or_null(schema);
        }
        if let (Some(note), Some(schema)) = (note, schema.as_object_mut()) {
            schema.insert("description".to_owned(), json!(note));
        }
        properties.insert((*name).to_owned(), schema);
    }
    let mut body = json!({ "type": "object", "properties": properties });
    let (required, rules) = (kind.required(), kind.rules());
    if !required.is_empty() {
        body["required"] = json!(required);
    }
    if !rules.is_empty() {
        body["allOf"] = json!(rules);
    }
    body
}

// --- rules ------------------------------------------------------------------------------------------

fn when(condition: Value, consequence: Value) -> Value {
    json!({ "if": condition, "then": consequence })
}

/// The field is there, and like this.
fn has(name: &str, schema: Value) -> Value {
    json!({ "properties": { name: schema }, "required": [name] })
}

fn yes() -> Value {
    json!({ "const": true })
}

// --- fields -----------------------------------------------------------------------------------------

impl Neutral {
    fn schema(self) -> Value {
        match self {
            Self::Never => json!({ "type": "null" }),
            Self::Boolean(value) => json!({ "const": value }),
            Self::Empty => {
                json!({ "anyOf": [{ "type": "array", "maxItems": 0 }, { "type": "object", "maxProperties": 0 }] })
            }
            Self::Only(word) => json!({ "type": "array", "items": { "const": word }, "minItems": 1 }),
        }
    }
}

/// `null` means the default in every field that need not be there.
fn or_null(mut schema: Value) -> Value {
    if let Some(Value::String(kind)) = schema.get("type") {
        if kind != "null" {
            schema["type"] = json!([kind, "null"]);
            if let Some(Value::Array(words)) = schema.get_mut("enum") {
                words.push(Value::Null);
            }
        }
        return schema;
    }
    if let Some(Value::Array(choices)) = schema.get_mut("anyOf") {
        choices.push(json!({ "type": "null" }));
        return schema;
    }
    json!({ "anyOf": [schema, { "type": "null" }] })
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

fn text(characters_max: usize) -> Value {
    json!({ "type": "string", "maxLength": characters_max })
}

fn filled(characters_max: usize) -> Value {
    json!({ "type": "string", "minLength": 1, "maxLength": characters_max })
}

fn list(item: Value, items_max: usize) -> Value {
    json!({ "type": "array", "items": item, "maxItems": items_max })
}

fn component(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

/// As the readers of this folder take it.
fn field(kind: Kind, name: &str, limits: &Limits) -> Value {
    let token = || integer(0, limits.vocabulary as i64 - 1);
    match (kind, name) {
        (_, "model") => json!({ "type": "string", "enum": limits.models }),
        (_, "messages") => {
            json!({ "type": "array", "minItems": 1, "maxItems": limits.messages_max, "items": component("Message") })
        }
        (Tokenize, "prompt") => json!({ "type": "string" }),
        (_, "prompt") => json!({ "anyOf": [
            { "type": "string", "minLength": 1 },
            { "type": "array", "items": token(), "minItems": 1 },
            { "type": "array", "items": { "type": "string", "minLength": 1 }, "minItems": 1, "maxItems": 1 },
            { "type": "array", "items": { "type": "array", "items": token(), "minItems": 1 }, "minItems": 1, "maxItems": 1 },
        ] }),
        (_, "max_completion_tokens" | "max_tokens" | "max_output_tokens") => {
            integer(1, i64::from(limits.context_tokens_max))
        }
        (_, "temperature") => number(0.0, 2.0),
        (_, "top_p" | "min_p") => number(0.0, 1.0),
        (_, "top_k") => integer(-1, i64::from(i32::MAX)),
        (_, "n" | "best_of") => integer(1, i64::from(limits.choices_max.min(128))),
        (_, "seed" | "priority") => integer(i64::MIN, i64::MAX),
        (_, "frequency_penalty" | "presence_penalty") => number(-2.0, 2.0),
        (_, "repetition_penalty") => json!({ "type": "number", "exclusiveMinimum": 0, "maximum": 10 }),
        (_, "stop") => json!({ "anyOf": [filled(1024), list(filled(1024), 4)] }),
        (_, "stop_token_ids") => list(token(), 256),
        (_, "allowed_token_ids") => {
            json!({ "type": "array", "items": token(), "minItems": 1, "maxItems": limits.vocabulary })
        }
        (_, "tokens") => json!({ "type": "array", "items": token() }),
        (_, "bad_words") => list(filled(256), 256),
        (_, "logit_bias") => json!({
            "type": "object", "maxProperties": 4096, "additionalProperties": or_null(number(-100.0, 100.0)),
            "propertyNames": { "pattern": "^[0-9]+$" },
        }),
        (Completions, "logprobs") => integer(0, 5),
        (_, "logprobs") => flag(),
        (_, "top_logprobs" | "prompt_logprobs") => integer(0, 20),
        (_, "min_tokens") => integer(0, i64::from(u32::MAX)),
        (_, "truncate_prompt_tokens") => {
            json!({ "type": "integer", "minimum": -1, "maximum": u32::MAX, "not": { "const": 0 } })
        }
        (Responses, "stream_options") => {
            json!({ "type": "object", "properties": { "include_obfuscation": or_null(flag()) } })
        }
        (_, "stream_options") => json!({ "type": "object", "properties": {
            "include_usage": or_null(flag()), "include_obfuscation": or_null(flag()),
            "continuous_usage_stats": or_null(flag()),
        } }),
        (Responses, "tools") => list(component("ResponseTool"), 128),
        (_, "tools") => list(component("Tool"), 128),
        (_, "functions") => list(component("Function"), 128),
        (_, "tool_choice") => component("ToolChoice"),
        (_, "function_call") => json!({ "anyOf": [{ "enum": ["none", "auto"] }, named()] }),
        (_, "response_format") => component("ResponseFormat"),
        (_, "structured_outputs") => component("StructuredOutputs"),
        (_, "service_tier") => json!({ "type": "string", "enum": ["auto", "default", "flex", "priority"] }),
        (_, "metadata") => json!({
            "type": "object", "maxProperties": 16, "additionalProperties": text(512),
            "propertyNames": { "maxLength": 64 },
        }),
        (_, "cache_salt") => text(256),
        (_, "request_id") => json!({
            "type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$", "not": { "type": "string", "pattern": "^chatcmpl-" },
        }),
        (_, "documents") => list(json!({ "type": "object" }), 128),
        (_, "chat_template_kwargs" | "prompt_cache_options" | "prediction" | "vllm_xargs" | "reasoning") => {
            json!({ "type": "object" })
        }
        (_, "length_penalty" | "max_tool_calls") => json!({ "type": "number" }),
        (_, "previous_response_id") => text(256),
        (
            _,
            "user"
            | "safety_identifier"
            | "prompt_cache_key"
            | "prompt_cache_retention"
            | "reasoning_effort"
            | "verbosity"
            | "instructions",
        ) => json!({ "type": "string" }),
        (_, "input") => json!({ "anyOf": [
            { "type": "string" },
            { "type": "array", "minItems": 1, "maxItems": limits.messages_max.min(2048),
              "items": component("InputItem") },
        ] }),
        (_, "text") => json!({ "type": "object", "properties": {
            "format": or_null(component("TextFormat")), "verbosity": { "type": ["string", "null"] },
        } }),
        (_, "include") => list(json!({ "enum": ["message.output_text.logprobs", "reasoning.encrypted_content"] }), 16),
        (_, "truncation") => json!({ "type": "string", "enum": ["auto", "disabled"] }),
        // All that is left says yes or no.
        _ => flag(),
    }
}

fn function_name() -> Value {
    json!({ "type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$" })
}

fn named() -> Value {
    json!({ "type": "object", "properties": { "name": function_name() }, "required": ["name"] })
}

/// A function by its name, within an object of its own or not.
fn chosen() -> Vec<Value> {
    let function = || json!({ "enum": ["function", null] });
    vec![
        json!({ "type": "object", "properties": { "type": function(), "name": function_name() }, "required": ["name"] }),
        json!({ "type": "object", "required": ["function"], "properties": {
            "type": function(), "function": named(), "name": { "type": "null" },
        } }),
    ]
}

/// Schemas that others refer to.
pub fn shared() -> Vec<(&'static str, Value)> {
    let mut all = messages();
    all.push(("InputItem", input_item()));
    all.extend(tools());
    all.extend(forms());
    all
}

fn messages() -> Vec<(&'static str, Value)> {
    let part = |kinds: Value, field: &str| {
        json!({ "type": "object", "required": ["type", field], "properties": {
            "type": kinds, field: { "type": "string" },
        } })
    };
    let written = || part(json!({ "const": "text" }), "text");
    let content =
        |part: Value| json!({ "anyOf": [{ "type": "string" }, { "type": "array", "items": part, "minItems": 1 }] });
    let name = || or_null(text(256));
    let spoken = json!({ "type": "object", "required": ["role", "content"], "properties": {
        "role": { "enum": ["developer", "system", "user"] }, "content": content(written()), "name": name(),
    } });
    let function = |bound: usize| {
        json!({ "type": "object", "required": ["name", "arguments"], "properties": {
            "name": text(bound), "arguments": { "type": "string" },
        } })
    };
    let call = json!({ "type": "object", "required": ["id", "function"], "properties": {
        "id": text(256), "type": { "enum": ["function", null] }, "function": function(256),
    } });
    let said = content(json!({ "anyOf": [written(), part(json!({ "const": "refusal" }), "refusal")] }));
    // One of these must say something.
    let says = [
        has("content", json!({ "not": { "type": "null" } })),
        has("refusal", json!({ "type": "string" })),
        has("tool_calls", json!({ "type": "array", "minItems": 1 })),
        has("function_call", json!({ "type": "object" })),
    ];
    let assistant = json!({ "type": "object", "required": ["role"], "anyOf": says, "properties": {
        "role": { "const": "assistant" }, "name": name(), "refusal": { "type": ["string", "null"] },
        "content": or_null(said), "audio": { "type": "null" },
        "tool_calls": or_null(list(call, 128)), "function_call": or_null(function(256)),
    } });
    let tool = json!({ "type": "object", "required": ["role", "content", "tool_call_id"], "properties": {
        "role": { "const": "tool" }, "content": content(written()), "tool_call_id": text(256), "name": name(),
    } });
    let older = json!({ "type": "object", "required": ["role", "content", "name"], "properties": {
        "role": { "const": "function" }, "content": content(written()), "name": text(256),
    } });
    vec![("Message", json!({ "anyOf": [spoken, assistant, tool, older] }))]
}

fn input_item() -> Value {
    let part = |kinds: Value, field: &str| {
        json!({ "type": "object", "required": ["type", field], "properties": {
            "type": { "enum": kinds }, field: { "type": "string" },
        } })
    };
    let content = |parts: Vec<Value>| {
        json!({ "anyOf": [
        { "type": "string" }, { "type": "array", "items": { "anyOf": parts } },
    ] })
    };
    let read = || part(json!(["input_text", "text"]), "text");
    let message = |roles: Value, content: Value| {
        json!({ "type": "object", "required": ["role", "content"], "properties": {
            "type": { "enum": ["message", null] }, "role": { "enum": roles }, "content": content,
        } })
    };
    let words = json!({ "type": "string" });
    json!({ "anyOf": [
        message(json!(["user", "system", "developer"]), content(vec![read()])),
        message(
            json!(["assistant"]),
            content(vec![
                part(json!(["input_text", "output_text", "text"]), "text"), part(json!(["refusal"]), "refusal"),
            ]),
        ),
        { "type": "object", "required": ["type", "call_id", "name", "arguments"], "properties": {
            "type": { "const": "function_call" }, "call_id": words, "name": words, "arguments": words,
        } },
        { "type": "object", "required": ["type", "call_id", "output"], "properties": {
            "type": { "const": "function_call_output" }, "call_id": text(256), "output": content(vec![read()]),
        } },
        { "type": "object", "required": ["type"], "properties": { "type": { "const": "reasoning" } } },
    ] })
}

fn tools() -> Vec<(&'static str, Value)> {
    let function = json!({
        "name": function_name(), "description": or_null(text(16 << 10)), "strict": or_null(flag()),
        "parameters": { "type": ["object", "null"], "properties": { "type": { "const": "object" } },
            "description": "A JSON schema." },
    });
    let mut flat = function.clone();
    flat["type"] = json!({ "const": "function" });
    let mode = json!({ "enum": ["auto", "required"] });
    let mut allowed = json!({ "type": "object", "required": ["mode", "tools"], "properties": {
        "mode": mode, "tools": list(json!({ "anyOf": chosen() }), 128),
    }, "if": has("mode", json!({ "const": "required" })), "then": { "properties": { "tools": { "minItems": 1 } } } });
    let inner = json!({ "type": "object", "required": ["type", "allowed_tools"], "properties": {
        "type": { "const": "allowed_tools" }, "mode": { "type": "null" }, "allowed_tools": allowed,
    } });
    allowed["properties"]["type"] = json!({ "const": "allowed_tools" });
    allowed["required"] = json!(["type", "mode", "tools"]);
    let mut choices = vec![json!({ "enum": ["none", "auto", "required"] })];
    choices.extend(chosen());
    choices.extend([inner, allowed]);
    vec![
        ("Function", json!({ "type": "object", "required": ["name"], "properties": function })),
        (
            "Tool",
            json!({ "type": "object", "required": ["type", "function"], "properties": {
                "type": { "const": "function" }, "function": component("Function"),
            } }),
        ),
        ("ResponseTool", json!({ "type": "object", "required": ["type", "name"], "properties": flat })),
        ("ToolChoice", json!({ "anyOf": choices })),
    ]
}

/// Forms that an answer's text can have.
fn forms() -> Vec<(&'static str, Value)> {
    let described = json!({
        "name": function_name(), "description": or_null(text(64 << 10)), "strict": or_null(flag()),
        "schema": { "type": ["object", "null"], "description": "A JSON schema." },
    });
    let mut flat = described.clone();
    flat["type"] = json!({ "const": "json_schema" });
    let plain = || json!({ "type": "object", "properties": { "type": { "enum": ["text", "json_object"] } }, "required": ["type"] });
    let nested = json!({ "type": "object", "required": ["type", "json_schema"], "properties": {
        "type": { "const": "json_schema" },
        "json_schema": { "type": "object", "required": ["name"], "properties": described },
    } });
    let flat = json!({ "type": "object", "required": ["type", "name"], "properties": flat });
    let mut grammar = or_null(text(64 << 10));
    grammar["not"] = json!({ "type": "string", "pattern": "::=" });
    grammar["description"] = json!("In Lark's syntax.");
    let structured = json!({ "type": "object", "description": "One of json, regex, choice, grammar, json_object.",
        "properties": {
            "json": { "type": ["object", "string", "null"], "description": "A JSON schema, or one as text." },
            "regex": or_null(text(64 << 10)),
            "choice": { "type": ["array", "null"], "items": filled(4096), "minItems": 1, "maxItems": 1024 },
            "grammar": grammar,
            "json_object": or_null(flag()),
            "structural_tag": { "type": "null" },
            "whitespace_pattern": or_null(text(64 << 10)),
            "disable_any_whitespace": or_null(flag()),
            "disable_additional_properties": or_null(flag()),
        },
    });
    vec![
        ("ResponseFormat", json!({ "anyOf": [plain(), nested] })),
        ("TextFormat", json!({ "anyOf": [plain(), flat] })),
        ("StructuredOutputs", structured),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemas_compile_and_take_null_wherever_a_field_may_be_left_out() {
        let models = vec!["m".to_owned()];
        let limits = Limits {
            models,
            tiers: Vec::new(),
            messages_max: 8,
            choices_max: 4,
            context_tokens_max: 512,
            vocabulary: 100,
        };
        for kind in Kind::ALL {
            let mut whole = body(kind, &limits);
            if let Some(whole) = whole.as_object_mut() {
                whole.remove("required");
                whole.remove("allOf");
            }
            let mut properties = whole["properties"].take();
            for name in kind.required() {
                properties[*name] = or_null(properties[*name].take());
            }
            whole["properties"] = properties;
            let components: Map<String, Value> = shared().into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
            whole["components"] = json!({ "schemas": components });
            let validator = jsonschema::validator_for(&whole).unwrap();
            let nulls = kind.table().iter().map(|(name, _)| ((*name).to_owned(), Value::Null)).collect();
            let nulls = Value::Object(nulls);
            let faults: Vec<String> = validator.iter_errors(&nulls).map(|error| error.to_string()).collect();
            assert!(faults.is_empty(), "{faults:?}");
        }
    }
}
