//! Answers held to a form, on the real model: what comes out matches, whatever the model would rather have said.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use lightcone::{
    domain::FinishReason,
    engine::EngineRequest,
    grammar::{Constraint, GrammarError, Grammars},
    prompt::{CallReader, Calls, Said, Shape, TextShape, Tool, Whitespace},
};
use regex::Regex;
use serde_json::{Value, json};

use crate::support::{
    engine::{Answers, Served, request, spec},
    model::model,
};

fn grammars() -> &'static Grammars {
    static GRAMMARS: OnceLock<Grammars> = OnceLock::new();
    GRAMMARS.get_or_init(|| Grammars::new(Arc::clone(&model().vocabulary)))
}

fn compile(shape: &Shape) -> Result<Constraint, GrammarError> {
    grammars().compile("tests", &shape.grammar().expect("a shape"))
}

fn of_text(text: TextShape) -> Shape {
    Shape { text, ..Shape::default() }
}

fn of_json(schema: &Value) -> Shape {
    of_text(TextShape::Json { schema: schema.clone(), whitespace: Whitespace::Some })
}

/// `text` asked with the answer held to `shape`.
fn held(id: &str, text: &str, shape: &Shape, output_tokens_max: u32) -> EngineRequest {
    let constraint = Some(compile(shape).unwrap_or_else(|error| panic!("{id}: {error}")));
    EngineRequest { constraint, ..request(id, text, output_tokens_max) }
}

fn served(requests: Vec<EngineRequest>) -> Answers {
    Served::spawn(spec(8, 64, 256)).answers(requests)
}

/// From enumerations to recursion.
#[rustfmt::skip]
fn schemas() -> Vec<Value> {
    let object = |properties: Value, required: &[&str]| json!({
        "type": "object", "properties": properties, "required": required, "additionalProperties": false,
    });
    vec![
        json!({ "enum": ["red", "green", "blue"] }),
        json!({ "enum": [1, "two", null, true, {"a": [3]}] }),
        json!({ "const": "exactly this" }),
        json!({ "type": "boolean" }),
        json!({ "type": "null" }),
        json!({ "type": "integer", "minimum": 17, "maximum": 42 }),
        json!({ "type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3 }),
        json!({ "type": "number", "minimum": 0.5, "maximum": 0.75 }),
        json!({ "type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 999 }),
        json!({ "type": "string", "minLength": 3, "maxLength": 8 }),
        json!({ "type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$" }),
        json!({ "type": "string", "pattern": "^(foo|bar)-[a-f0-9]{3,6}$" }),
        json!({ "type": "string", "format": "date" }),
        json!({ "type": "string", "format": "date-time" }),
        json!({ "type": "string", "format": "uuid" }),
        json!({ "type": "string", "format": "ipv4" }),
        json!({ "type": "string", "format": "email", "maxLength": 40 }),
        json!({ "type": ["integer", "null"], "minimum": 0, "maximum": 9 }),
        json!({ "type": "array", "items": { "type": "integer", "minimum": 0, "maximum": 99 }, "minItems": 2, "maxItems": 5 }),
        json!({ "type": "array", "prefixItems": [{ "type": "boolean" }, { "enum": ["x", "y"] }], "items": false, "minItems": 2 }),
        json!({ "type": "array", "items": { "enum": ["a", "b"] }, "maxItems": 3 }),
        object(json!({ "name": { "type": "string", "maxLength": 20 }, "age": { "type": "integer", "minimum": 0, "maximum": 130 } }), &["name", "age"]),
        object(json!({ "a": { "type": "boolean" }, "b": { "type": "boolean" }, "c": { "type": "boolean" } }), &["c"]),
        object(json!({ "in": object(json!({ "deep": object(json!({ "er": { "enum": [1, 2, 3] } }), &["er"]) }), &["deep"]) }), &["in"]),
        object(json!({ "tags": { "type": "array", "items": { "type": "string", "maxLength": 6 }, "maxItems": 3 } }), &["tags"]),
        object(json!({ "quoted \"key\"\n": { "const": "back\\slash" } }), &["quoted \"key\"\n"]),
        object(json!({ "ключ": { "enum": ["да", "нет"] }, "鍵": { "const": "🔑" } }), &["ключ", "鍵"]),
        json!({ "anyOf": [{ "type": "integer", "minimum": 1, "maximum": 3 }, { "enum": ["many", "few"] }] }),
        object(json!({ "v": { "anyOf": [{ "type": "null" }, object(json!({ "k": { "const": 1 } }), &["k"])] } }), &["v"]),
        json!({ "allOf": [{ "type": "integer", "minimum": 5 }, { "maximum": 9 }] }),
        json!({ "oneOf": [{ "type": "string", "enum": ["s"] }, { "type": "integer", "minimum": 0, "maximum": 5 }] }),
        json!({ "$defs": { "e": { "enum": ["n", "s", "e", "w"] } }, "type": "array", "items": { "$ref": "#/$defs/e" }, "minItems": 1, "maxItems": 4 }),
        json!({ "$defs": { "list": { "anyOf": [{ "type": "null" }, object(json!({ "head": { "type": "boolean" }, "tail": { "$ref": "#/$defs/list" } }), &["head", "tail"])] } }, "$ref": "#/$defs/list" }),
        json!({ "$defs": { "tree": object(json!({ "v": { "type": "integer", "minimum": 0, "maximum": 9 }, "kids": { "type": "array", "items": { "$ref": "#/$defs/tree" }, "maxItems": 2 } }), &["v", "kids"]) }, "$ref": "#/$defs/tree" }),
        json!({ "type": "object", "additionalProperties": { "type": "boolean" }, "properties": { "fixed": { "const": 1 } }, "required": ["fixed"], "maxProperties": 3 }),
        json!({ "type": "object", "patternProperties": { "^n_[a-z]{1,3}$": { "type": "integer", "minimum": 0, "maximum": 9 } }, "additionalProperties": false, "minProperties": 1, "maxProperties": 2 }),
        object(json!({ "id": { "type": "string", "pattern": "^[a-z]{3}-[0-9]{2}$" }, "when": { "type": "string", "format": "time" }, "n": { "type": ["number", "null"], "minimum": 0, "maximum": 1 } }), &["id", "when", "n"]),
        object(json!({ "items": { "type": "array", "minItems": 1, "maxItems": 2, "items": object(json!({ "sku": { "type": "string", "minLength": 2, "maxLength": 5 }, "qty": { "type": "integer", "minimum": 1, "maximum": 20 }, "gift": { "type": "boolean" } }), &["sku", "qty"]) }, "paid": { "type": "boolean" } }), &["items", "paid"]),
        object(json!({ "reasoning": { "type": "string", "maxLength": 60 }, "answer": { "enum": ["yes", "no", "unsure"] } }), &["reasoning", "answer"]),
        json!({ "type": "object", "properties": { "kind": { "const": "circle" }, "radius": { "type": "number", "minimum": 0, "maximum": 100 } }, "required": ["kind", "radius"], "additionalProperties": false }),
    ]
}

#[test]
fn forty_schemas_are_kept_to_by_every_answer_that_is_complete() {
    let schemas = schemas();
    assert_eq!(schemas.len(), 40);
    let mut requests = Vec::new();
    for (i, schema) in schemas.iter().enumerate() {
        let ask = format!("Answer with an example in JSON, nothing else. Number {i}.");
        for (temperature, name) in [(0.0, "greedy"), (1.3, "wild")] {
            let mut request = held(&format!("{i} {name}"), &ask, &of_json(schema), 120);
            (request.sampling.temperature, request.sampling.seed) = (temperature, i as u64);
            requests.push(request);
        }
    }
    let answers = served(requests);
    let mut complete = 0;
    for (id, (text, reason, _)) in &answers {
        let at: usize = id.split(' ').next().unwrap().parse().unwrap();
        if *reason != FinishReason::Stop {
            continue;
        }
        complete += 1;
        let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{id}: {error} in {text:?}"));
        let validator = jsonschema::options().should_validate_formats(true).build(&schemas[at]).unwrap();
        let faults: Vec<String> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
        assert!(faults.is_empty(), "{id}: {text:?}: {faults:?}");
    }
    assert!(complete >= 70, "only {complete} of {} answers were complete", answers.len());
}

#[test]
fn regexes_choices_and_grammars_are_kept_to_as_well() {
    let regex = "(mon|tues)day at [0-9]{1,2} o'clock";
    let choices = ["a \"quoted\" word", "plain", "zwölf\nLinien"].map(str::to_owned).to_vec();
    let sums = "start: term (\" + \" term)* \" = ?\"\nterm: NUMBER\nNUMBER: /[1-9][0-9]?/\n";
    let answers = served(vec![
        held("regex", "When do we meet?", &of_text(TextShape::Regex(regex.into())), 40),
        held("choice", "Choose!", &of_text(TextShape::Choice(choices.clone())), 40),
        held("grammar", "Give me a sum.", &of_text(TextShape::Grammar(sums.into())), 60),
        held("object", "Anything", &of_json(&json!({ "type": "object", "maxProperties": 0 })), 40),
    ]);
    let text = |id: &str| answers[id].0.as_str();
    assert!(Regex::new(&format!("^{regex}$")).unwrap().is_match(text("regex")), "{:?}", text("regex"));
    assert!(choices.iter().any(|choice| choice == text("choice")), "{:?}", text("choice"));
    let sum = Regex::new(r"^[1-9][0-9]?( \+ [1-9][0-9]?)*( = \?)?( \+?)?$").unwrap();
    assert!(sum.is_match(text("grammar")), "{:?}", text("grammar"));
    assert_eq!(serde_json::from_str::<Value>(text("object")).unwrap(), json!({}));
    assert_eq!(answers["regex"].1, FinishReason::Stop);
}

fn tool(name: &str, schema: &Value) -> Tool {
    Tool { name: name.into(), description: None, parameters: schema.as_object().cloned(), strict: true }
}

fn calls(are_required: bool, is_single: bool) -> Shape {
    let city = json!({ "type": "object", "properties": { "city": { "enum": ["Bern", "Oslo"] } }, "required": ["city"], "additionalProperties": false });
    let sum = json!({ "type": "object", "properties": { "a": { "type": "integer", "minimum": 0, "maximum": 99 }, "b": { "type": "integer", "minimum": 0, "maximum": 99 } }, "required": ["a", "b"], "additionalProperties": false });
    let tools = vec![tool("weather", &city), tool("add-up", &sum)];
    Shape { text: TextShape::Any, calls: Calls { tools, are_required, is_single } }
}

/// Text, and calls by name and arguments.
fn read(text: &str) -> (String, Vec<(String, String, bool)>) {
    let mut reader = CallReader::default();
    let mut said = reader.read(text);
    said.extend(reader.finish());
    let (mut plain, mut calls) = (String::new(), Vec::<(String, String, bool)>::new());
    for said in said {
        match said {
            Said::Text(text) => plain += &text,
            Said::Call { name, .. } => calls.push((name, String::new(), false)),
            Said::Arguments { text, .. } => calls.last_mut().unwrap().1 += &text,
            Said::Called { .. } => calls.last_mut().unwrap().2 = true,
        }
    }
    (plain, calls)
}

#[test]
fn a_required_call_is_made_with_arguments_of_its_schema_and_nothing_else_is_said() {
    let mut requests = Vec::new();
    for seed in 0..8 {
        for (name, is_single) in [("one", true), ("many", false)] {
            let mut request = held(&format!("{name} {seed}"), "What is 2 + 3?", &calls(true, is_single), 80);
            (request.sampling.temperature, request.sampling.seed) = (1.0, seed);
            requests.push(request);
        }
    }
    let schemas: HashMap<String, Value> = calls(true, true)
        .calls
        .tools
        .into_iter()
        .map(|tool| (tool.name, Value::Object(tool.parameters.unwrap())))
        .collect();
    for (id, (text, reason, _)) in served(requests) {
        let (plain, calls) = read(&text);
        assert!(plain.is_empty() && !calls.is_empty(), "{id}: {text:?}");
        assert!(id.starts_with("many") || reason == FinishReason::Stop && calls.len() == 1, "{id}: {text:?}");
        for (name, arguments, is_complete) in calls {
            if is_complete {
                let arguments: Value = serde_json::from_str(&arguments).unwrap();
                assert!(jsonschema::is_valid(&schemas[&name], &arguments), "{id}: {text:?}");
            } else {
                assert_eq!(reason, FinishReason::Length);
            }
        }
    }
}

#[test]
fn where_a_call_may_come_up_text_is_free_until_it_does_and_then_the_schema_rules() {
    let shape = calls(false, false);
    let free = served(vec![held("free", "Say hello.", &shape, 24), request("none", "Say hello.", 24)]);
    assert_eq!(free["free"].0, free["none"].0);
    // The model is brought to open a call: from then on, only what a tool takes may follow.
    let mut constraint = compile(&shape).unwrap();
    let tokens = crate::support::engine::tokens("Let me see. <tool_call>");
    for token in tokens {
        assert!(!constraint.accept(token).unwrap());
    }
    let opened = crate::support::engine::tokens(
        "<|im_start|>user\nWeather in Oslo?<|im_end|>\n<|im_start|>assistant\nLet me see. <tool_call>",
    );
    let answers =
        served(vec![EngineRequest { prompt: opened, constraint: Some(constraint), ..request("opened", "", 60) }]);
    let text = format!("Let me see. <tool_call>{}", answers["opened"].0);
    let (plain, calls) = read(&text);
    assert_eq!(plain, "Let me see.", "{:?}", answers["opened"]);
    assert!(["weather", "add-up"].contains(&calls[0].0.as_str()) && calls[0].2, "{text:?}");
}

#[test]
fn an_answer_is_the_same_whoever_is_held_beside_it() {
    let schemas = schemas();
    let of = |i: usize| held(&i.to_string(), "Give me an example in JSON.", &of_json(&schemas[i]), 40);
    let chosen = [9, 21, 25, 33, 37, 38];
    let together = served(chosen.iter().map(|i| of(*i)).collect());
    for i in chosen {
        let alone = Served::spawn(spec(1, 17, 64)).answers(vec![of(i)]);
        assert_eq!(alone[&i.to_string()], together[&i.to_string()], "{i}");
    }
}

#[test]
fn what_cannot_be_enforced_is_refused_and_says_what_it_is() {
    for (schema, word) in [
        (json!({ "not": { "type": "string" } }), "not"),
        (json!({ "type": "string", "format": "no-such-format" }), "no-such-format"),
        (json!({ "type": "array", "uniqueItems": true }), "uniqueItems"),
        (json!({ "if": {}, "then": {} }), "if"),
        (json!({ "type": "string", "pattern": "(?=x)" }), ""),
        (json!({ "type": "array", "items": { "type": "integer" }, "minItems": 5, "maxItems": 2 }), ""),
        (json!({ "type": "integer", "minimum": 3, "maximum": 2 }), ""),
        (json!({ "$ref": "#/nowhere" }), ""),
        (json!({ "$ref": "http://example.com/schema" }), ""),
        (json!({ "type": "noise" }), "noise"),
        (json!({ "allOf": [{ "type": "string" }, { "type": "integer" }] }), ""),
    ] {
        match compile(&of_json(&schema)) {
            Err(GrammarError::Refused(why)) => assert!(why.contains(word), "{schema}: {why}"),
            other => panic!("{schema}: {other:?}"),
        }
    }
}

#[test]
fn shapes_that_explode_are_refused_in_good_time() {
    let mut deep = json!({ "type": "integer" });
    for _ in 0..60 {
        deep = json!({ "type": "array", "items": deep });
    }
    let wide: serde_json::Map<String, Value> =
        (0..3000).map(|i| (format!("p{i}"), json!({ "type": "string", "pattern": "^(a|b|c){3,40}$" }))).collect();
    let started = std::time::Instant::now();
    let shapes = [
        of_text(TextShape::Regex("(a{1,1000}){1,1000}".into())),
        of_text(TextShape::Regex("((a|aa)+)+x{500,5000}(.*y){40}".into())),
        of_json(&json!({ "type": "string", "minLength": 1_000_000, "maxLength": 100_000_000 })),
        of_json(&json!({ "type": "object", "properties": wide })),
        of_json(
            &json!({ "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } }, "$ref": "#/$defs/a" }),
        ),
        of_json(&deep),
    ];
    for shape in shapes {
        // Taken or refused, but neither a crash nor a hang.
        let _ = compile(&shape).map(|mut constraint| constraint.mask());
    }
    assert!(started.elapsed() < std::time::Duration::from_secs(60), "{:?}", started.elapsed());
}
