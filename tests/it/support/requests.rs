//! Requests that a person might send, and what becomes of them when most care is left out: shapes are right more
//! often than not, so that what is wrong is met deep inside. The same number always gives the same request.

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Map, Number, Value, json};

/// One request before it is sent.
#[derive(Clone, Debug)]
pub struct Case {
    pub method: &'static str,
    pub path: String,
    pub headers: Vec<(&'static str, String)>,
    pub has_key: bool,
    pub body: Vec<u8>,
}

/// What the generator knows of the service: fields of every body by its path.
pub struct Requests {
    seed: u64,
    bodies: Vec<(String, Vec<String>)>,
}

const WORDS: &[&str] = &[
    "",
    "a",
    "lighthouse",
    "Was ist los?",
    "🙂🙂",
    "e\u{301}",
    "\u{0}",
    "\u{7f}\u{1b}[2J",
    "<|im_start|>system",
    "<|a|>",
    "</tool_call>",
    "<tool_call>\n{\"name\": \"f\"",
    "{\"a\": [1, 2",
    "\u{feff}",
    "\u{202e}abc",
    "{{ 7 * 7 }}",
    "%s%n",
    "../../etc/passwd",
    "null",
    "ſ",
    "ﬃ",
    "\r\n\r\n",
    "data: [DONE]\n\n",
    "\u{fffd}",
    "𝕳𝖊𝖑𝖑𝖔",
];
const NUMBERS: &[&str] = &[
    "0",
    "1",
    "-1",
    "2",
    "5",
    "16",
    "0.5",
    "1.5",
    "-0.0",
    "1e-320",
    "1e308",
    "-1e308",
    "1e400",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "-9223372036854775808",
    "1E5",
    "0.1e1",
    "123456789012345678901234567890",
    "1.0",
];
const ROLES: &[&str] = &["system", "developer", "user", "assistant", "tool", "function", "pope", ""];
const KEYWORDS: &[&str] = &[
    "type",
    "properties",
    "required",
    "items",
    "enum",
    "const",
    "anyOf",
    "oneOf",
    "allOf",
    "not",
    "$ref",
    "$defs",
    "pattern",
    "format",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minimum",
    "maximum",
    "multipleOf",
    "additionalProperties",
    "patternProperties",
    "propertyNames",
    "if",
    "then",
    "uniqueItems",
    "prefixItems",
    "contains",
    "default",
    "x-own",
];
const PATTERNS: &[&str] = &[
    "^[a-z]+$",
    "(a+)+$",
    "[",
    "(?<=x)y",
    "\\d{1,1000000}",
    "(((((((((a{9}){9}){9}){9}){9}){9}){9}){9}){9})",
    "\\p{L}*",
    "a|b",
    "^$",
    ".*",
    "(?i)x",
    "\\b",
    "[^\\x00-\\x7f]{3}",
    "(",
];

impl Requests {
    /// `bodies`: the names of all fields by path.
    pub fn new(seed: u64, bodies: Vec<(String, Vec<String>)>) -> Self {
        Self { seed, bodies }
    }

    pub fn case(&self, number: u64) -> Case {
        let mut random = Random(StdRng::seed_from_u64(self.seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        let (path, names) = self.bodies.choose(&mut random.0).expect("bodies");
        let body = random.body(path, names);
        let mut case = Case {
            method: "POST",
            path: path.clone(),
            headers: vec![("content-type", "application/json".to_owned())],
            has_key: true,
            body: random.spelled(&body).into_bytes(),
        };
        random.spoil(&mut case);
        case
    }
}

struct Random(StdRng);

impl Random {
    fn one_in(&mut self, times: u32) -> bool {
        self.0.random_range(0..times) == 0
    }

    fn below(&mut self, count: usize) -> usize {
        self.0.random_range(0..count)
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        of.choose(&mut self.0).expect("something")
    }

    fn word(&mut self) -> String {
        match self.below(12) {
            0 => self.pick(WORDS).repeat(self.0.random_range(1..400)),
            1 => (0..self.below(30)).map(|_| self.0.random::<char>()).collect(),
            _ => (*self.pick(WORDS)).to_owned(),
        }
    }

    fn number(&mut self) -> Value {
        let text =
            if self.one_in(3) { self.0.random_range(-3..40).to_string() } else { (*self.pick(NUMBERS)).to_owned() };
        serde_json::from_str(&text).unwrap_or_else(|_| Value::Number(Number::from(7)))
    }

    /// Anything at all.
    fn wild(&mut self, depth: usize) -> Value {
        match self.below(if depth == 0 { 5 } else { 8 }) {
            0 => Value::Null,
            1 => json!(self.one_in(2)),
            2 | 3 => self.number(),
            4 => json!(self.word()),
            5 => (0..self.below(4)).map(|_| self.wild(depth - 1)).collect(),
            6 => Value::Object((0..self.below(4)).map(|_| (self.word(), self.wild(depth - 1))).collect()),
            _ => {
                let deep = self.below(200);
                (0..deep).fold(json!(1), |inner, _| json!([inner]))
            }
        }
    }

    fn body(&mut self, path: &str, names: &[String]) -> Value {
        let mut body = Map::new();
        let wanted: &[&str] = match path {
            path if path.ends_with("/chat/completions") => &["messages"],
            path if path.ends_with("/responses") => &["input"],
            path if path.ends_with("/detokenize") => &["tokens"],
            _ => &["prompt"],
        };
        for name in wanted {
            if !self.one_in(40) {
                body.insert((*name).to_owned(), self.field(path, name));
            }
        }
        for _ in 0..self.below(7) {
            let name = self.pick(names).clone();
            let value = if self.one_in(12) { self.wild(3) } else { self.field(path, &name) };
            body.insert(name, value);
        }
        // What often goes together.
        if path.ends_with("/chat/completions") && self.one_in(3) {
            body.insert("tools".into(), self.tools());
            if self.one_in(2) {
                body.insert("tool_choice".into(), self.field(path, "tool_choice"));
            }
        }
        if self.one_in(3) {
            body.insert("stream".into(), json!(true));
        }
        if self.one_in(30) {
            body.insert(self.word(), self.wild(2));
        }
        Value::Object(body)
    }

    /// A value that `name` may well have.
    fn field(&mut self, path: &str, name: &str) -> Value {
        match name {
            "model" => {
                self.pick(&[json!("tzafon.sm-1"), json!("tzafon.sm-1"), Value::Null, json!("gpt-4"), json!("")]).clone()
            }
            "messages" => self.messages(),
            "input" if self.one_in(3) => json!(self.word()),
            "input" => self.items(),
            "prompt" if self.one_in(3) => (0..self.below(6)).map(|_| self.token()).collect(),
            "prompt" | "suffix" | "instructions" | "user" | "cache_salt" => json!(self.word()),
            "tokens" | "stop_token_ids" | "allowed_token_ids" => (0..self.below(6)).map(|_| self.token()).collect(),
            "tools" => self.tools(),
            "functions" => (0..self.below(3)).map(|_| self.function()).collect(),
            "tool_choice" | "function_call" => match self.below(6) {
                0 => json!("none"),
                1 => json!("required"),
                2 => json!({ "type": "function", "function": { "name": "f" } }),
                3 => json!({ "type": "function", "name": "f" }),
                4 => {
                    json!({ "type": "allowed_tools", "allowed_tools": { "mode": "auto", "tools": [{ "type": "function", "function": { "name": "f" } }] } })
                }
                _ => json!("auto"),
            },
            "response_format" | "text" => {
                let schema = self.schema(3);
                let strict = self.one_in(2);
                let format = match (self.below(4), path.ends_with("/responses")) {
                    (0, _) => json!({ "type": "text" }),
                    (1, _) => json!({ "type": "json_object" }),
                    (_, false) => {
                        json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema, "strict": strict } })
                    }
                    (_, true) => json!({ "type": "json_schema", "name": "x", "schema": schema, "strict": strict }),
                };
                if name == "text" { json!({ "format": format }) } else { format }
            }
            "structured_outputs" => match self.below(5) {
                0 => json!({ "json": self.schema(3) }),
                1 => json!({ "regex": self.pick(PATTERNS) }),
                2 => json!({ "choice": (0..self.below(4)).map(|_| self.word()).collect::<Vec<_>>() }),
                3 => {
                    json!({ "grammar": self.pick(&["start: \"a\"+", "start: start", "x", "root ::= \"a\" root", "start: /[/", "start: A\nA: /a{99999999}/"]) })
                }
                _ => json!({ "json_object": true }),
            },
            "max_tokens" | "max_completion_tokens" | "max_output_tokens" => {
                self.pick(&[json!(1), json!(3), json!(9), json!(100_000), Value::Null]).clone()
            }
            "n" | "best_of" => json!(self.0.random_range(0..6)),
            "stop" => {
                if self.one_in(2) {
                    json!(self.word())
                } else {
                    (0..self.below(6)).map(|_| json!(self.word())).collect()
                }
            }
            "bad_words" => (0..self.below(4)).map(|_| json!(self.word())).collect(),
            "logit_bias" => Value::Object(
                (0..self.below(4)).map(|_| (self.token().to_string(), json!(self.0.random_range(-101..102)))).collect(),
            ),
            "top_logprobs" | "prompt_logprobs" | "top_k" | "min_tokens" | "truncate_prompt_tokens" | "priority" => {
                json!(self.0.random_range(-2..25))
            }
            "temperature" | "top_p" | "min_p" | "frequency_penalty" | "presence_penalty" | "repetition_penalty" => {
                json!(self.0.random_range(-0.2..2.2))
            }
            "seed" => self.number(),
            "logprobs" if path.ends_with("/v1/completions") => json!(self.0.random_range(0..7)),
            "stream"
            | "logprobs"
            | "echo"
            | "store"
            | "ignore_eos"
            | "parallel_tool_calls"
            | "include_stop_str_in_output"
            | "return_token_ids"
            | "return_tokens_as_token_ids"
            | "add_generation_prompt"
            | "continue_final_message"
            | "add_special_tokens"
            | "skip_special_tokens"
            | "return_token_strs" => json!(self.one_in(2)),
            "stream_options" => json!({ "include_usage": self.one_in(2), "continuous_usage_stats": self.one_in(2) }),
            "service_tier" => json!(self.pick(&["auto", "default", "flex", "priority", "gold"])),
            "metadata" => Value::Object((0..self.below(20)).map(|i| (format!("k{i}"), json!(self.word()))).collect()),
            "request_id" => json!(self.pick(&["mine", "a.b", "", "white space", "ü"])),
            "previous_response_id" => json!(self.pick(&["resp_x", "", "resp_01a2"])),
            "documents" => (0..self.below(3)).map(|_| json!({ "title": self.word(), "text": self.word() })).collect(),
            "chat_template_kwargs" => Value::Object((0..self.below(3)).map(|_| (self.word(), self.wild(2))).collect()),
            _ => self.wild(2),
        }
    }

    fn token(&mut self) -> Value {
        if self.one_in(20) { self.number() } else { json!(self.0.random_range(0..262)) }
    }

    fn content(&mut self) -> Value {
        match self.below(8) {
            0 => Value::Null,
            1 => self.wild(2),
            2 => (0..self.below(4)).map(|_| self.part()).collect(),
            _ => json!(self.word()),
        }
    }

    fn part(&mut self) -> Value {
        match self.below(8) {
            0 => json!({ "type": "image_url", "image_url": { "url": "data:image/png;base64,AAAA" } }),
            1 => json!({ "type": "input_audio", "input_audio": { "data": "", "format": "wav" } }),
            2 => json!({ "type": "input_text", "text": self.word() }),
            3 => self.wild(2),
            _ => json!({ "type": "text", "text": self.word() }),
        }
    }

    fn messages(&mut self) -> Value {
        let mut messages = Vec::new();
        for number in 0..self.0.random_range(0..6) {
            if self.one_in(5) {
                let id = format!("call_{number}");
                let arguments = if self.one_in(3) { self.word() } else { json!({ "a": self.wild(2) }).to_string() };
                messages.push(json!({ "role": "assistant", "content": null, "tool_calls": [
                    { "id": id, "type": "function", "function": { "name": "f", "arguments": arguments } }] }));
                let id = if self.one_in(8) { self.word() } else { id };
                messages.push(json!({ "role": "tool", "tool_call_id": id, "content": self.content() }));
                continue;
            }
            let role = if self.one_in(3) { *self.pick(ROLES) } else { "user" };
            let mut message = json!({ "role": role, "content": self.content() });
            if self.one_in(8) {
                message["name"] = if self.one_in(3) { self.wild(1) } else { json!("ann") };
            }
            if self.one_in(20) {
                message = self.wild(2);
            }
            messages.push(message);
        }
        if self.one_in(2) {
            messages.push(json!({ "role": "user", "content": "Hello" }));
        }
        Value::Array(messages)
    }

    /// Of a response's input.
    fn items(&mut self) -> Value {
        let mut items = Vec::new();
        for number in 0..self.0.random_range(0..4) {
            items.push(match self.below(6) {
                0 => json!({ "type": "function_call", "call_id": format!("c{number}"), "name": "f", "arguments": self.word() }),
                1 => json!({ "type": "function_call_output", "call_id": format!("c{}", number - 1), "output": self.content() }),
                2 => json!({ "type": "reasoning", "summary": [] }),
                3 => self.wild(2),
                _ => json!({ "role": self.pick(ROLES), "content": self.content() }),
            });
        }
        Value::Array(items)
    }

    fn tools(&mut self) -> Value {
        let count = if self.one_in(30) { 130 } else { self.below(4) };
        (0..count)
            .map(|_| {
                if self.one_in(15) { self.wild(2) } else { json!({ "type": "function", "function": self.function() }) }
            })
            .collect()
    }

    fn function(&mut self) -> Value {
        let name = if self.one_in(10) { self.word() } else { (*self.pick(&["f", "g", "get_weather"])).to_owned() };
        let mut function = json!({ "name": name, "description": self.word() });
        if !self.one_in(5) {
            function["parameters"] = if self.one_in(3) {
                self.schema(3)
            } else {
                json!({ "type": "object", "properties": { "a": self.schema(2) }, "required": ["a"] })
            };
        }
        if self.one_in(3) {
            function["strict"] = json!(self.one_in(2));
        }
        function
    }

    /// A JSON schema, or something that looks like one.
    fn schema(&mut self, depth: usize) -> Value {
        if depth == 0 || self.one_in(4) {
            return match self.below(8) {
                0 => json!({ "enum": [self.wild(1), self.word()] }),
                1 => json!({ "type": "integer", "minimum": self.number(), "maximum": self.number() }),
                2 => json!({ "type": "string", "pattern": self.pick(PATTERNS) }),
                3 => {
                    json!({ "type": "string", "format": self.pick(&["date", "date-time", "uuid", "email", "ipv4", "regex", "own"]) })
                }
                4 => json!({ "$ref": self.pick(&["#", "#/$defs/a", "#/$defs/missing", "http://x/y"]) }),
                5 => json!(self.one_in(2)),
                6 => json!({ "type": "string", "minLength": self.number(), "maxLength": self.number() }),
                _ => json!({ "type": self.pick(&["string", "number", "boolean", "null", "array", "object", "any"]) }),
            };
        }
        match self.below(7) {
            0 => json!({ "anyOf": [self.schema(depth - 1), self.schema(depth - 1)] }),
            1 => {
                json!({ "type": "array", "items": self.schema(depth - 1), "minItems": self.number(), "maxItems": self.number() })
            }
            2 => json!({ "$defs": { "a": self.schema(depth - 1) }, "$ref": "#/$defs/a" }),
            3 => {
                let keyword = (*self.pick(KEYWORDS)).to_owned();
                let value = if self.one_in(2) { self.schema(depth - 1) } else { self.wild(2) };
                Value::Object(Map::from_iter([(keyword, value)]))
            }
            4 => json!({ "type": "object", "additionalProperties": self.schema(depth - 1) }),
            _ => {
                let properties: Map<String, Value> =
                    (0..self.below(4)).map(|i| (format!("p{i}"), self.schema(depth - 1))).collect();
                let required: Vec<_> = properties.keys().filter(|_| self.0.random()).cloned().collect();
                json!({ "type": "object", "properties": properties, "required": required, "additionalProperties": self.one_in(3) })
            }
        }
    }

    /// As JSON; now and then a field stands there twice.
    fn spelled(&mut self, body: &Value) -> String {
        let mut text = body.to_string();
        if self.one_in(40)
            && let Some((name, _)) = body.as_object().and_then(|body| body.iter().next())
        {
            let again = format!("{{{}: {}, ", json!(name), self.wild(1));
            text.replace_range(..1, &again);
        }
        if self.one_in(40) {
            text = text.replacen("\"a\"", "\"\\ud800\"", 1);
        }
        text
    }

    /// Hurts what is sent, but seldom.
    fn spoil(&mut self, case: &mut Case) {
        if self.one_in(12) && !case.body.is_empty() {
            let at = self.below(case.body.len());
            match self.below(5) {
                0 => case.body.truncate(at),
                1 => case.body[at] = self.0.random(),
                2 => case.body.insert(at, 0xff),
                3 => drop(case.body.remove(at)),
                _ => {
                    let piece = case.body[at..].to_vec();
                    case.body.extend(piece);
                }
            }
        }
        if self.one_in(60) {
            case.headers[0].1 = (*self.pick(&[
                "text/plain",
                "application/json; charset=latin1",
                "",
                "application/xml",
                "multipart/form-data",
            ]))
            .to_owned();
        }
        if self.one_in(60) {
            case.method = *self.pick(&["GET", "DELETE", "PUT", "PATCH", "OPTIONS", "HEAD"]);
        }
        if self.one_in(60) {
            let more: &&str = self.pick(&["/", "/x", "/x/cancel", "?limit=0", "//", "/%00", "/..%2f"]);
            case.path.push_str(more);
        }
        if self.one_in(40) {
            let key = self.pick(&["k1", "k2", "", "\u{7f}", "kkkkkkkkkkkk"]).to_string();
            case.headers.push(("idempotency-key", key));
            if self.one_in(3) {
                case.headers.push(("last-event-id", self.pick(&["0", "1", "99999999999999999999", "x"]).to_string()));
            }
        }
        if self.one_in(30) {
            case.headers.push((
                "accept",
                (*self.pick(&["application/problem+json", "text/event-stream", "*/*", ";;;"])).to_owned(),
            ));
        }
        if self.one_in(50) {
            case.headers.push(("accept-encoding", (*self.pick(&["gzip", "zstd;q=0.1", "br", ",,"])).to_owned()));
        }
        case.has_key = !self.one_in(100);
    }
}
