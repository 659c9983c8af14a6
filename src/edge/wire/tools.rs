//! Tools, and which of them may or must be called.

use std::collections::HashSet;

use serde_json::Value;

use super::{
    format::SHAPE_BYTES_MAX,
    read::{Fields, unsupported, wrong_type},
};
use crate::{
    edge::error::ApiError,
    prompt::{Calls, Tool},
};

const TOOLS_MAX: usize = 128;
const NAME_CHARACTERS_MAX: usize = 64;
const DESCRIPTION_CHARACTERS_MAX: usize = 16 << 10;

/// Tools of one request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Toolbox {
    /// Those that the model is told of.
    pub told: Vec<Tool>,
    pub calls: Calls,
    /// For each tool that may be called, where it stands in the request.
    pub places: Vec<String>,
    /// The client speaks of `functions`, and wants to hear of a `function_call`.
    pub is_legacy: bool,
}

/// What may be chosen.
enum Choice {
    None,
    Auto,
    Required,
    /// This one, and once: a forced function is called exactly one time.
    Named(String),
    /// Of these, and whether one must be called.
    Of(Vec<String>, bool),
}

/// Of a request of the newer kind, whose tools have no inner object.
pub fn of_responses(fields: &Fields) -> Result<Toolbox, ApiError> {
    let items = fields.array("tools", TOOLS_MAX)?.unwrap_or_default();
    let mut names = HashSet::new();
    let mut all = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let item = Fields::of(item, format!("tools[{i}]"))?;
        let kind = item.text("type", 256)?;
        match item.required("type", kind)? {
            "function" => all.push(tool(&item, &mut names)?),
            other => {
                let why = format!("`{}` is not supported: only functions are.", crate::edge::error::shorten(other));
                return Err(unsupported(item.param("type"), why));
            }
        }
    }
    let choice = tool_choice(fields, !all.is_empty())?;
    let is_single = !fields.boolean("parallel_tool_calls")?.unwrap_or(true);
    chosen(all, choice, "tool_choice", is_single)
}

pub fn toolbox(fields: &Fields) -> Result<Toolbox, ApiError> {
    let tools = tools(fields)?;
    let functions = functions(fields)?;
    if !tools.is_empty() && !functions.is_empty() {
        let why = "'functions' and 'tools' cannot both be given.";
        return Err(ApiError::field("invalid_value", "functions", why));
    }
    let is_legacy = !functions.is_empty();
    // Both are read, so that what has no effect has at least a right shape.
    let (older, newer) = (function_call(fields, is_legacy)?, tool_choice(fields, !tools.is_empty())?);
    let is_parallel = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
    let (all, field, choice) =
        if is_legacy { (functions, "function_call", older) } else { (tools, "tool_choice", newer) };
    let is_single = is_legacy || !is_parallel;
    let mut toolbox = chosen(all, choice, field, is_single)?;
    toolbox.is_legacy = is_legacy;
    Ok(toolbox)
}

fn chosen(all: Vec<(Tool, String)>, choice: Choice, field: &str, is_single: bool) -> Result<Toolbox, ApiError> {
    let wanted: &[String] = match &choice {
        Choice::Named(name) => std::slice::from_ref(name),
        Choice::Of(names, _) => names,
        _ => &[],
    };
    for name in wanted {
        if !all.iter().any(|(tool, _)| tool.name == *name) {
            let why = format!("Invalid '{field}': there is no tool `{}`.", crate::edge::error::shorten(name));
            return Err(ApiError::field("invalid_value", field, why));
        }
    }
    let is_single = is_single || matches!(choice, Choice::Named(_));
    let told = match choice {
        Choice::None => Vec::new(),
        _ => all.iter().map(|(tool, _)| tool.clone()).collect(),
    };
    let (chosen, are_required): (Vec<_>, bool) = match choice {
        Choice::None => (Vec::new(), false),
        Choice::Auto => (all, false),
        Choice::Required => (all, true),
        Choice::Named(name) => (all.into_iter().filter(|(tool, _)| tool.name == name).collect(), true),
        Choice::Of(names, required) => {
            (all.into_iter().filter(|(tool, _)| names.contains(&tool.name)).collect(), required)
        }
    };
    let (tools, places) = chosen.into_iter().unzip();
    Ok(Toolbox { told, calls: Calls { tools, are_required, is_single }, places, is_legacy: false })
}

fn tools(fields: &Fields) -> Result<Vec<(Tool, String)>, ApiError> {
    let items = fields.array("tools", TOOLS_MAX)?.unwrap_or_default();
    let mut all = Vec::with_capacity(items.len());
    let mut names = HashSet::new();
    for (i, item) in items.iter().enumerate() {
        let item = Fields::of(item, format!("tools[{i}]"))?;
        let kind = item.text("type", 256)?;
        match item.required("type", kind)? {
            "function" => {}
            "custom" => return Err(unsupported(item.param("type"), "`custom` is not supported: only functions are.")),
            other => return Err(item.none_of("type", other, &["function"])),
        }
        let function = item.object("function")?;
        let function = item.required("function", function)?;
        all.push(tool(&function, &mut names)?);
    }
    Ok(all)
}

fn functions(fields: &Fields) -> Result<Vec<(Tool, String)>, ApiError> {
    let items = fields.array("functions", TOOLS_MAX)?.unwrap_or_default();
    let mut names = HashSet::new();
    let function = |(i, item)| tool(&Fields::of(item, format!("functions[{i}]"))?, &mut names);
    items.iter().enumerate().map(function).collect()
}

fn tool(function: &Fields, names: &mut HashSet<String>) -> Result<(Tool, String), ApiError> {
    let name = name(function)?;
    if !names.insert(name.clone()) {
        let why = format!("Invalid '{}': there is a tool `{name}` already.", function.param("name"));
        return Err(ApiError::field("invalid_value", function.param("name"), why));
    }
    let parameters = function.map("parameters")?.cloned();
    let param = function.param("parameters");
    if let Some(schema) = &parameters {
        let bytes = Value::Object(schema.clone()).to_string().len();
        if bytes > SHAPE_BYTES_MAX {
            let why = format!("Invalid '{param}': a schema has at most {SHAPE_BYTES_MAX} bytes, but this has {bytes}.");
            return Err(ApiError::field("string_above_max_length", param, why));
        }
        if schema.get("type").is_some_and(|kind| kind != "object") {
            let why = format!("Invalid '{param}': arguments are an object, so the schema's type must be `object`.");
            return Err(ApiError::field("invalid_schema", param, why));
        }
    }
    // Arguments are an object whatever else the schema says.
    let parameters = parameters.map(|mut schema| {
        schema.entry("type").or_insert_with(|| Value::from("object"));
        schema
    });
    let description = function.text("description", DESCRIPTION_CHARACTERS_MAX)?.map(str::to_owned);
    let strict = function.boolean("strict")?.unwrap_or(false);
    Ok((Tool { name, description, parameters, strict }, param))
}

fn name(function: &Fields) -> Result<String, ApiError> {
    let name = function.text("name", NAME_CHARACTERS_MAX)?;
    let name = function.required("name", name)?;
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte)) {
        let param = function.param("name");
        let why = format!("Invalid '{param}': expected 1 to {NAME_CHARACTERS_MAX} letters, digits, `_` and `-`.");
        return Err(ApiError::field("invalid_value", param, why));
    }
    Ok(name.to_owned())
}

fn tool_choice(fields: &Fields, has_tools: bool) -> Result<Choice, ApiError> {
    const WORDS: [&str; 3] = ["none", "auto", "required"];
    let Some(value) = fields.given("tool_choice") else { return Ok(Choice::Auto) };
    if !has_tools && value != "none" {
        let why = "The 'tool_choice' parameter is only allowed when 'tools' are given.";
        return Err(ApiError::field("invalid_value", "tool_choice", why));
    }
    if let Some(word) = value.as_str() {
        return match word {
            "none" => Ok(Choice::None),
            "auto" => Ok(Choice::Auto),
            "required" => Ok(Choice::Required),
            other => Err(fields.none_of("tool_choice", other, &WORDS)),
        };
    }
    if !value.is_object() {
        return Err(wrong_type("tool_choice", "a string or an object", value));
    }
    let choice = Fields::of(value, "tool_choice".to_owned())?;
    let kind = choice.text("type", 256)?.unwrap_or("function");
    match kind {
        "function" => {
            // The newer kind of request has the name right here.
            let function = match choice.given("name") {
                Some(_) => choice.clone(),
                None => {
                    let function = choice.object("function")?;
                    choice.required("function", function)?
                }
            };
            Ok(Choice::Named(name(&function)?))
        }
        "allowed_tools" => {
            let allowed = match choice.given("mode") {
                Some(_) => choice.clone(),
                None => {
                    let allowed = choice.object("allowed_tools")?;
                    choice.required("allowed_tools", allowed)?
                }
            };
            let mode = allowed.word("mode", &["auto", "required"])?;
            let mode = allowed.required("mode", mode)?;
            let items = allowed.array("tools", TOOLS_MAX)?;
            let items = allowed.required("tools", items)?;
            let mut names = Vec::new();
            for (i, item) in items.iter().enumerate() {
                let item = Fields::of(item, format!("{}[{i}]", allowed.param("tools")))?;
                let function = match item.given("name") {
                    Some(_) => item,
                    None => {
                        let function = item.object("function")?;
                        item.required("function", function)?
                    }
                };
                names.push(name(&function)?);
            }
            if names.is_empty() && mode == "required" {
                let why = "Invalid 'tool_choice.allowed_tools.tools': empty array. Expected at least one tool.";
                return Err(ApiError::field("empty_array", allowed.param("tools"), why));
            }
            Ok(Choice::Of(names, mode == "required"))
        }
        "custom" => Err(unsupported("tool_choice.type", "`custom` is not supported: only functions are.")),
        other => Err(choice.none_of("type", other, &["function", "allowed_tools"])),
    }
}

fn function_call(fields: &Fields, has_functions: bool) -> Result<Choice, ApiError> {
    match fields.given("function_call") {
        None => Ok(Choice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "none" => Ok(Choice::None),
            "auto" => Ok(Choice::Auto),
            other => Err(fields.none_of("function_call", other, &["none", "auto"])),
        },
        Some(Value::Object(_)) if !has_functions => {
            let why = "The 'function_call' parameter is only allowed when 'functions' are given.";
            Err(ApiError::field("invalid_value", "function_call", why))
        }
        Some(value @ Value::Object(_)) => Ok(Choice::Named(name(&Fields::of(value, "function_call".to_owned())?)?)),
        Some(other) => Err(wrong_type("function_call", "a string or an object", other)),
    }
}
