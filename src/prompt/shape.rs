//! What an answer must look like, as a grammar: JSON, a regex, a choice, calls of tools, or text in which a call may
//! come up.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::{
    Tool,
    tools::{CALL_CLOSE, CALL_OPEN},
};
use crate::domain::GrammarSource;

/// What the text of an answer must match.
#[derive(Clone, Debug, PartialEq)]
pub enum TextShape {
    Any,
    Json {
        schema: Value,
        whitespace: Whitespace,
    },
    Regex(String),
    Choice(Vec<String>),
    /// In the syntax of Lark, as `llguidance` extends it.
    Grammar(String),
}

/// Between the parts of a JSON text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Whitespace {
    /// Spaces and line breaks, but not for ever: small models like to.
    #[default]
    Some,
    None,
    /// What this regex matches.
    Pattern(String),
}

/// Which tools may, or must, be called.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Calls {
    /// Those that may be called.
    pub tools: Vec<Tool>,
    /// The answer is a call and nothing else.
    pub are_required: bool,
    /// At most one.
    pub is_single: bool,
}

/// What an answer may be.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    pub text: TextShape,
    pub calls: Calls,
}

/// A part of a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shaped {
    Text,
    /// The arguments of the tool at this place.
    Tool(usize),
}

impl Default for Shape {
    fn default() -> Self {
        Self { text: TextShape::Any, calls: Calls::default() }
    }
}

/// Longest run of blanks that an answer in JSON has between its parts.
const BLANKS: &str = r"[ \n]{1,24}";

impl Shape {
    pub fn is_free(&self) -> bool {
        self.text == TextShape::Any && self.calls.tools.is_empty()
    }

    /// Each part as a shape of its own: what cannot be compiled as a whole is looked for among these.
    pub fn parts(&self) -> impl Iterator<Item = (Shaped, Shape)> {
        let text = (Shaped::Text, Self { text: self.text.clone(), calls: Calls::default() });
        let tools = self.calls.tools.iter().enumerate().map(|(i, tool)| {
            let calls = Calls { tools: vec![tool.clone()], are_required: true, is_single: true };
            (Shaped::Tool(i), Self { text: TextShape::Any, calls })
        });
        tools.chain([text])
    }

    /// `None` where any text will do.
    pub fn grammar(&self) -> Option<GrammarSource> {
        if self.is_free() {
            return None;
        }
        let mut grammars = Vec::new();
        let mut lark = String::from("%llguidance {}\n");
        if self.calls.tools.is_empty() {
            lark.push_str("start: text\n");
        } else {
            self.write_calls(&mut lark, &mut grammars);
        }
        if !self.calls.are_required {
            write_text(&self.text, &mut lark, &mut grammars);
        }
        grammars.insert(0, json!({ "name": "start", "lark_grammar": lark }));
        Some(GrammarSource(json!({ "grammars": grammars, "max_tokens": null }).to_string()))
    }

    fn write_calls(&self, lark: &mut String, grammars: &mut Vec<Value>) {
        let Calls { tools, are_required, is_single } = &self.calls;
        let more = if *is_single { "" } else { " more*" };
        match (are_required, &self.text) {
            (true, _) => writeln!(lark, "start: \"{CALL_OPEN}\" body{more}"),
            (false, TextShape::Any) => {
                // Lazy: the first opening tag ends the text, whatever the model meant by it.
                writeln!(lark, "start: text | before body{more}\nbefore[lazy]: /(?s:.*){CALL_OPEN}/")
            }
            (false, _) => writeln!(lark, "start: text | \"{CALL_OPEN}\" body{more}"),
        }
        .expect("a string takes all");
        if !is_single {
            writeln!(lark, "more: \"\\n{CALL_OPEN}\" body").expect("a string takes all");
        }
        let bodies: Vec<String> = (0..tools.len()).map(|i| format!("body_{i}")).collect();
        writeln!(lark, "body: {}", bodies.join(" | ")).expect("a string takes all");
        for (i, tool) in tools.iter().enumerate() {
            let head = json!(format!("\n{{\"name\": {}, \"arguments\": ", json!(tool.name)));
            let tail = json!(format!("}}\n{CALL_CLOSE}"));
            writeln!(lark, "body_{i}: {head} @arguments_{i} {tail}").expect("a string takes all");
            let schema = match &tool.parameters {
                Some(schema) => Value::Object(schema.clone()),
                None => json!({ "type": "object", "properties": {}, "additionalProperties": false }),
            };
            grammars.push(json_grammar(&format!("arguments_{i}"), schema, &Whitespace::Some));
        }
    }
}

fn write_text(shape: &TextShape, lark: &mut String, grammars: &mut Vec<Value>) {
    match shape {
        TextShape::Any => lark.push_str("text: /(?s:.*)/\n"),
        TextShape::Json { schema, whitespace } => {
            lark.push_str("text: @json\n");
            grammars.push(json_grammar("json", schema.clone(), whitespace));
        }
        TextShape::Regex(regex) => {
            writeln!(lark, "text: /{}/", llguidance::regex_to_lark(regex, "")).expect("a string takes all");
        }
        TextShape::Choice(choices) => {
            let choices: Vec<String> = choices.iter().map(|choice| json!(choice).to_string()).collect();
            writeln!(lark, "text: {}", choices.join(" | ")).expect("a string takes all");
        }
        TextShape::Grammar(grammar) => {
            lark.push_str("text: @own\n");
            grammars.push(json!({ "name": "own", "lark_grammar": grammar }));
        }
    }
}

fn json_grammar(name: &str, schema: Value, whitespace: &Whitespace) -> Value {
    let mut options = Map::new();
    match whitespace {
        Whitespace::Some => options.insert("whitespace_pattern".into(), json!(BLANKS)),
        Whitespace::None => options.insert("whitespace_flexible".into(), json!(false)),
        Whitespace::Pattern(pattern) => options.insert("whitespace_pattern".into(), json!(pattern)),
    };
    let mut schema = match schema {
        Value::Object(schema) => schema,
        // `true` and `false` are schemas, too.
        other => Map::from_iter([("allOf".to_owned(), json!([other]))]),
    };
    // Ours to set, not the client's.
    schema.insert("x-guidance".into(), Value::Object(options));
    json!({ "name": name, "json_schema": schema })
}
