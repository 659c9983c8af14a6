//! The form that an answer's text must have: `response_format`, and `structured_outputs` of the other family.

use serde_json::{Value, json};

use super::read::{Fields, unsupported, wrong_type};
use crate::{
    edge::error::{ApiError, shorten},
    prompt::{TextShape, Whitespace},
};

/// Bytes of a schema, a regex or a grammar.
pub const SHAPE_BYTES_MAX: usize = 64 << 10;
const CHOICES_MAX: usize = 1024;
const CHOICE_CHARACTERS_MAX: usize = 4096;

/// The wanted form, and the field that asked for it.
pub fn text_shape(fields: &Fields) -> Result<(TextShape, &'static str), ApiError> {
    let format = response_format(fields)?;
    let structured = structured_outputs(fields)?;
    match (format, structured) {
        (TextShape::Any, None) => Ok((TextShape::Any, "response_format")),
        (format, None) => Ok((format, "response_format.json_schema.schema")),
        (TextShape::Any, Some(structured)) => Ok(structured),
        (_, Some((_, param))) => {
            let why = format!("'{param}' and 'response_format' cannot both say what the answer must look like.");
            Err(ApiError::field("invalid_value", param, why))
        }
    }
}

fn response_format(fields: &Fields) -> Result<TextShape, ApiError> {
    let Some(format) = fields.object("response_format")? else { return Ok(TextShape::Any) };
    let kind = format.text("type", 256)?;
    match format.required("type", kind)? {
        "text" => Ok(TextShape::Any),
        "json_object" => Ok(object()),
        "json_schema" => {
            let about = format.object("json_schema")?;
            let about = format.required("json_schema", about)?;
            described(&about)
        }
        "structural_tag" => Err(unsupported("response_format.type", "`structural_tag` is not supported.")),
        other => Err(format.none_of("type", other, &["text", "json_object", "json_schema"])),
    }
}

/// Of a request of the newer kind, where the format has no inner object.
pub fn of_responses(text: &Fields) -> Result<TextShape, ApiError> {
    let Some(format) = text.object("format")? else { return Ok(TextShape::Any) };
    let kind = format.text("type", 256)?;
    match format.required("type", kind)? {
        "text" => Ok(TextShape::Any),
        "json_object" => Ok(object()),
        "json_schema" => described(&format),
        other => Err(format.none_of("type", other, &["text", "json_object", "json_schema"])),
    }
}

/// A schema with a name.
fn described(about: &Fields) -> Result<TextShape, ApiError> {
    let name = about.text("name", 64)?;
    let name = about.required("name", name)?;
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte)) {
        let why = format!("Invalid '{}': expected letters, digits, `_` and `-`.", about.param("name"));
        return Err(ApiError::field("invalid_value", about.param("name"), why));
    }
    about.text("description", SHAPE_BYTES_MAX)?;
    about.boolean("strict")?;
    match about.map("schema")? {
        Some(schema) => json_shape(Value::Object(schema.clone()), Whitespace::Some, about.param("schema")),
        None => Ok(object()),
    }
}

/// A JSON object of any kind.
fn object() -> TextShape {
    TextShape::Json { schema: json!({ "type": "object" }), whitespace: Whitespace::Some }
}

fn json_shape(schema: Value, whitespace: Whitespace, param: String) -> Result<TextShape, ApiError> {
    let bytes = schema.to_string().len();
    if bytes > SHAPE_BYTES_MAX {
        let why = format!("Invalid '{param}': a schema has at most {SHAPE_BYTES_MAX} bytes, but this has {bytes}.");
        return Err(ApiError::field("string_above_max_length", param, why));
    }
    Ok(TextShape::Json { schema, whitespace })
}

const KINDS: [&str; 6] = ["json", "regex", "choice", "grammar", "json_object", "structural_tag"];

fn structured_outputs(fields: &Fields) -> Result<Option<(TextShape, &'static str)>, ApiError> {
    let Some(outputs) = fields.object("structured_outputs")? else { return Ok(None) };
    let closed = outputs.boolean("disable_additional_properties")?.unwrap_or(false);
    let is_tight = outputs.boolean("disable_any_whitespace")?.unwrap_or(false);
    let whitespace = match outputs.text("whitespace_pattern", SHAPE_BYTES_MAX)? {
        Some(pattern) => Whitespace::Pattern(pattern.to_owned()),
        None if is_tight => Whitespace::None,
        None => Whitespace::Some,
    };
    outputs.boolean("json_object")?;
    let is_given = |kind: &&&str| match outputs.given(kind) {
        Some(Value::Bool(false)) if **kind == "json_object" => false,
        value => value.is_some(),
    };
    let kinds: Vec<&&str> = KINDS.iter().filter(is_given).collect();
    let kind = match kinds[..] {
        [] => return Ok(None),
        [kind] => *kind,
        _ => {
            let why = format!("Invalid 'structured_outputs': exactly one of {} may be given.", KINDS.join(", "));
            return Err(ApiError::field("invalid_value", "structured_outputs", why));
        }
    };
    let text = |name: &str| outputs.text(name, SHAPE_BYTES_MAX).map(|text| text.unwrap_or_default().to_owned());
    let shape = match kind {
        "json" => {
            let param = outputs.param("json");
            let mut schema = match outputs.given("json") {
                Some(Value::String(text)) => super::json::parse(text.as_bytes()).map_err(|error| {
                    let why = format!("Invalid '{param}': {}", shorten(error.message()));
                    ApiError::field("invalid_schema", &*param, why)
                })?,
                Some(schema @ Value::Object(_)) => schema.clone(),
                other => return Err(wrong_type(&param, "a JSON schema", other.unwrap_or(&Value::Null))),
            };
            if closed {
                close(&mut schema);
            }
            (json_shape(schema, whitespace, param)?, "structured_outputs.json")
        }
        "regex" => (TextShape::Regex(text("regex")?), "structured_outputs.regex"),
        "choice" => {
            let choices = outputs.texts("choice", CHOICES_MAX, CHOICE_CHARACTERS_MAX)?.unwrap_or_default();
            if choices.is_empty() {
                let why = "Invalid 'structured_outputs.choice': empty array. Expected at least one choice.";
                return Err(ApiError::field("empty_array", "structured_outputs.choice", why));
            }
            (TextShape::Choice(choices), "structured_outputs.choice")
        }
        "grammar" => {
            let grammar = text("grammar")?;
            if grammar.contains("::=") {
                let why = "is in a dialect that is not supported: write it in Lark's syntax.";
                return Err(unsupported("structured_outputs.grammar", why));
            }
            (TextShape::Grammar(grammar), "structured_outputs.grammar")
        }
        "json_object" => {
            (TextShape::Json { schema: json!({ "type": "object" }), whitespace }, "structured_outputs.json_object")
        }
        _ => return Err(unsupported("structured_outputs.structural_tag", "is not supported.")),
    };
    Ok(Some(shape))
}

/// Objects that do not say whether they have further properties have none.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.contains_key("properties") && !fields.contains_key("additionalProperties") {
                fields.insert("additionalProperties".to_owned(), json!(false));
            }
            fields.values_mut().for_each(close);
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}
