//! A stream, joined, is the answer that is not streamed: text, arguments of calls, logprobs, ends and usage, over
//! many prompts on the real model, whatever runs beside them.

use futures::{StreamExt, stream};
use serde_json::{Map, Value, json};

use crate::support::{
    engine::TEXT,
    process::{Home, Node},
};

const PROMPTS: usize = 200;
const AT_ONCE: usize = 8;

/// Greedy requests of every kind.
fn body(number: usize, passage: &str) -> Value {
    let mut body = json!({
        "temperature": 0, "logprobs": true, "top_logprobs": 2, "max_tokens": 8 + number % 9,
        "messages": [{ "role": "user", "content": format!("{passage}\nWhat comes next?") }],
    });
    let parameters = json!({
        "type": "object", "additionalProperties": false, "required": ["who", "mood"],
        "properties": {
            "who": { "type": "string", "maxLength": 12 }, "mood": { "enum": ["curious", "cross", "sleepy"] },
            "age": { "type": "integer", "minimum": 0, "maximum": 120 },
        },
    });
    let tool = json!({ "type": "function", "function": { "name": "note", "strict": number.is_multiple_of(8), "parameters": parameters } });
    let more = match number % 5 {
        // Calls, one or several.
        0 => {
            json!({ "tools": [tool], "tool_choice": "required", "max_tokens": 96, "parallel_tool_calls": number.is_multiple_of(2) })
        }
        1 => json!({ "tools": [tool] }),
        2 => {
            json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": parameters } }, "max_tokens": 48 })
        }
        3 => json!({ "stop": ["the", "\n"], "n": 2, "frequency_penalty": 0.5, "logit_bias": { "28": -5 } }),
        _ => json!({}),
    };
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

async fn ask(http: &reqwest::Client, node: &Node, key: &str, body: &Value) -> String {
    let request = http.post(format!("{}/v1/chat/completions", node.url)).bearer_auth(key);
    let answer =
        request.header("content-type", "application/json").body(body.to_string()).send().await.expect("an answer");
    let status = answer.status();
    let text = answer.text().await.expect("a body");
    assert_eq!(status, 200, "{text}");
    text
}

/// What both ways must agree on.
fn essence(answer: &Value) -> Value {
    let choice = |choice: &Value| {
        let calls = choice["message"]["tool_calls"].as_array().cloned().unwrap_or_default();
        let functions: Vec<_> = calls.iter().map(|call| call["function"].clone()).collect();
        json!({
            "index": choice["index"], "content": choice["message"]["content"], "calls": functions,
            "logprobs": choice["logprobs"]["content"], "end": choice["finish_reason"],
        })
    };
    let mut usage = answer["usage"].clone();
    // How much was found in the cache is the second one's luck.
    usage["prompt_tokens_details"] = Value::Null;
    json!({ "choices": answer["choices"].as_array().expect("choices").iter().map(choice).collect::<Vec<_>>(), "usage": usage })
}

/// Puts an event stream together as a client would.
fn joined(text: &str) -> Value {
    let events: Vec<&str> = text.split_terminator("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
    let (done, events) = events.split_last().expect("events");
    assert_eq!(*done, "[DONE]");
    let mut choices: Vec<Map<String, Value>> = Vec::new();
    let mut usage = Value::Null;
    for event in events {
        let chunk: Value = serde_json::from_str(event).expect("JSON");
        assert!(usage.is_null(), "something behind the usage: {chunk}");
        usage = chunk["usage"].clone();
        for delta in chunk["choices"].as_array().expect("choices") {
            let index = usize::try_from(delta["index"].as_u64().expect("an index")).expect("small");
            while choices.len() <= index {
                let empty = json!({ "content": null, "calls": [], "logprobs": [], "end": null });
                choices.push(empty.as_object().expect("an object").clone());
            }
            let choice = &mut choices[index];
            assert!(choice["end"].is_null(), "something behind the end: {chunk}");
            choice["end"] = delta["finish_reason"].clone();
            if let Some(piece) = delta["delta"]["content"].as_str() {
                let before = choice["content"].as_str().unwrap_or_default();
                choice["content"] = json!(format!("{before}{piece}"));
            }
            for call in delta["delta"]["tool_calls"].as_array().unwrap_or(&Vec::new()) {
                let calls = choice["calls"].as_array_mut().expect("calls");
                let index = usize::try_from(call["index"].as_u64().expect("an index")).expect("small");
                if index == calls.len() {
                    assert!(call["id"].is_string() && call["type"] == "function", "{call}");
                    calls.push(json!({ "name": call["function"]["name"], "arguments": "" }));
                } else {
                    assert!(call.get("id").is_none() && call["function"].get("name").is_none(), "told twice: {call}");
                }
                let before = calls[index]["arguments"].as_str().expect("text").to_owned();
                calls[index]["arguments"] = json!(before + call["function"]["arguments"].as_str().unwrap_or_default());
            }
            let told = delta["logprobs"]["content"].as_array().cloned().unwrap_or_default();
            choice["logprobs"].as_array_mut().expect("a list").extend(told);
        }
    }
    usage["prompt_tokens_details"] = Value::Null;
    let choices = choices.into_iter().enumerate().map(|(index, mut choice)| {
        choice.insert("index".into(), json!(index));
        // A message of calls has no text; its stream begins with an empty one all the same.
        if choice["content"] == "" && choice["calls"] != json!([]) {
            choice["content"] = Value::Null;
        }
        choice
    });
    json!({ "choices": choices.collect::<Vec<_>>(), "usage": usage })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joined_stream_is_the_plain_answer_over_two_hundred_prompts() {
    let model = "engine = \"onnx\"\ncontext_tokens_max = 1024\noutput_tokens_max = 128\nsequences_max = 16\n\
                 kv_memory_mib = 512\n";
    let home = Home::of_model(model, "");
    let node = home.start(&[]);
    let (key, http) = (home.key(), reqwest::Client::new());
    let words: Vec<&str> = TEXT.split_whitespace().collect();
    let passages: Vec<String> = words.windows(11).step_by(4).take(PROMPTS).map(|words| words.join(" ")).collect();
    assert_eq!(passages.len(), PROMPTS);
    let both = |number: usize| {
        let (mut body, node, key, http) = (body(number, &passages[number]), &node, &key, &http);
        async move {
            let plain: Value = serde_json::from_str(&ask(http, node, key, &body).await).expect("JSON");
            body["stream"] = json!(true);
            body["stream_options"] = json!({ "include_usage": true });
            (number, essence(&plain), joined(&ask(http, node, key, &body).await))
        }
    };
    let told: Vec<_> = stream::iter(0..PROMPTS).map(both).buffer_unordered(AT_ONCE).collect().await;
    let (mut calls, mut texts, mut logprobs) = (0, 0, 0);
    for (number, plain, joined) in told {
        assert_eq!(plain, joined, "prompt {number}");
        for choice in plain["choices"].as_array().expect("choices") {
            calls += choice["calls"].as_array().expect("calls").len();
            texts += usize::from(choice["content"].as_str().is_some_and(|text| !text.is_empty()));
            logprobs += choice["logprobs"].as_array().expect("a list").len();
        }
    }
    println!("{calls} calls, {texts} texts, {logprobs} tokens with their logprobs");
    assert!(calls >= PROMPTS / 5 && texts >= PROMPTS / 2 && logprobs > 10 * PROMPTS);
    home.assert_settled(&[]);
}
