//! Server-sent events of one answer. Everything that all chunks share is written once, so that a token
//! costs a copy and no more.

use actix_web::web::BytesMut;
use serde::Serialize;
use serde_json::{Value, json};

use super::openai::{About, SYSTEM_FINGERPRINT, WireUsage, service_tier, stop_reason};
use crate::{
    domain::Usage,
    edge::{
        answer::{Form, Piece, PieceBody},
        error::ApiError,
    },
};

/// A comment line, which clients skip.
pub const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

pub struct Chunks {
    /// `data: {"id":…,"choices":`
    head: String,
    usage: UsageIn,
}

/// Which chunks have the usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageIn {
    None,
    /// The last, after all choices; the others have a null.
    Last,
    Every,
}

impl Chunks {
    pub fn new(about: &About, usage: UsageIn) -> Self {
        let shared = json!({
            "id": about.id,
            "object": "chat.completion.chunk",
            "created": about.created,
            "model": about.model,
            "service_tier": service_tier(about.priority),
            "system_fingerprint": SYSTEM_FINGERPRINT,
        })
        .to_string();
        let open = shared.trim_end_matches('}');
        Self { head: format!("data: {open},\"choices\":"), usage }
    }

    /// The first chunk of a choice. The very first of a stream tells of the prompt's tokens where they are wanted.
    pub fn role(&self, choice: u32, prompt: Option<&[u32]>, so_far: &Usage, out: &mut BytesMut) {
        let delta = |out: &mut BytesMut| out.extend_from_slice(br#"{"role":"assistant","content":"","refusal":null}"#);
        self.choice(choice, delta, b"null", &Value::Null, "", out);
        if let Some(prompt) = prompt {
            out.extend_from_slice(b",\"prompt_token_ids\":");
            write_json(prompt, out);
        }
        self.close(so_far, out);
    }

    pub fn piece(&self, piece: &Piece, form: &Form, so_far: &Usage, out: &mut BytesMut) {
        let mut reason = "";
        let mut stop = Value::Null;
        if let PieceBody::End { reason: ended, stopped_by } = &piece.body {
            reason = ended.as_str();
            stop = stopped_by.as_ref().map_or(Value::Null, stop_reason);
        }
        let delta = |out: &mut BytesMut| match &piece.body {
            PieceBody::Text(text) => {
                out.extend_from_slice(br#"{"content":"#);
                write_json(text, out);
                out.extend_from_slice(b"}");
            }
            PieceBody::Call { name, .. } if form.is_legacy => {
                write_json(&json!({ "function_call": { "name": name, "arguments": "" } }), out);
            }
            PieceBody::Arguments { text, .. } if form.is_legacy => {
                write_json(&json!({ "function_call": { "arguments": text } }), out);
            }
            PieceBody::Call { index, id, name } => {
                let function = json!({ "name": name, "arguments": "" });
                let call = json!({ "index": index, "id": id, "type": "function", "function": function });
                write_json(&json!({ "tool_calls": [call] }), out);
            }
            PieceBody::Arguments { index, text } => {
                let call = json!({ "index": index, "function": { "arguments": text } });
                write_json(&json!({ "tool_calls": [call] }), out);
            }
            PieceBody::End { .. } => out.extend_from_slice(b"{}"),
        };
        let logprobs = match form.logprobs(&piece.tokens) {
            Some(logprobs) if !logprobs.is_empty() => {
                let mut bytes = BytesMut::new();
                write_json(&logprobs, &mut bytes);
                bytes
            }
            _ => BytesMut::from(&b"null"[..]),
        };
        self.choice(piece.choice, delta, &logprobs, &stop, reason, out);
        // Within the choice, which was left open for it.
        if let Some(ids) = form.token_ids(&piece.tokens) {
            out.truncate(out.len() - 2);
            out.extend_from_slice(b",\"token_ids\":");
            write_json(&ids, out);
            out.extend_from_slice(b"}]");
        }
        self.close(so_far, out);
    }

    pub fn usage(&self, usage: &Usage, out: &mut BytesMut) {
        out.extend_from_slice(self.head.as_bytes());
        out.extend_from_slice(b"[],\"usage\":");
        write_json(&WireUsage::from(usage), out);
        out.extend_from_slice(b"}\n\n");
    }

    /// Up to the end of the choices.
    fn choice(
        &self,
        choice: u32,
        delta: impl FnOnce(&mut BytesMut),
        logprobs: &[u8],
        stop: &Value,
        finish_reason: &str,
        out: &mut BytesMut,
    ) {
        out.extend_from_slice(self.head.as_bytes());
        out.extend_from_slice(br#"[{"index":"#);
        write_json(&choice, out);
        out.extend_from_slice(br#","delta":"#);
        delta(out);
        out.extend_from_slice(br#","logprobs":"#);
        out.extend_from_slice(logprobs);
        out.extend_from_slice(br#","finish_reason":"#);
        if finish_reason.is_empty() {
            out.extend_from_slice(b"null");
        } else {
            write_json(finish_reason, out);
        }
        if !stop.is_null() {
            out.extend_from_slice(br#","stop_reason":"#);
            write_json(stop, out);
        }
        out.extend_from_slice(b"}]");
    }

    fn close(&self, so_far: &Usage, out: &mut BytesMut) {
        match self.usage {
            UsageIn::None => out.extend_from_slice(b"}\n\n"),
            UsageIn::Last => out.extend_from_slice(b",\"usage\":null}\n\n"),
            UsageIn::Every => {
                out.extend_from_slice(b",\"usage\":");
                write_json(&WireUsage::from(so_far), out);
                out.extend_from_slice(b"}\n\n");
            }
        }
    }
}

/// One event.
pub fn data<T: Serialize + ?Sized>(value: &T, out: &mut BytesMut) {
    out.extend_from_slice(b"data: ");
    write_json(value, out);
    out.extend_from_slice(b"\n\n");
}

/// The end of a stream that went well.
pub fn done(out: &mut BytesMut) {
    out.extend_from_slice(b"data: [DONE]\n\n");
}

/// The end of one that did not.
pub fn error(error: &ApiError, out: &mut BytesMut) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(&error.json());
    out.extend_from_slice(b"\n\n");
}

fn write_json<T: Serialize + ?Sized>(value: &T, out: &mut BytesMut) {
    struct Sink<'a>(&'a mut BytesMut);
    impl std::io::Write for Sink<'_> {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    serde_json::to_writer(Sink(out), value).expect("memory takes what is JSON");
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        domain::{Priority, StoppedBy, TokenDetail},
        edge::answer::WireReason,
        model::Vocabulary,
    };

    fn events(out: &BytesMut) -> Vec<Value> {
        let text = std::str::from_utf8(out).unwrap();
        assert!(text.ends_with("\n\n"));
        let read = |event: &str| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
        text.trim_end_matches("\n\n").split("\n\n").map(read).collect()
    }

    fn about() -> About {
        let (id, model) = ("chatcmpl-1".to_owned(), "m\"odel".into());
        About { id, created: 17, model, priority: Priority::Normal }
    }

    fn form(logprobs: bool) -> Form {
        let vocabulary = Vocabulary::of_text(["a", "b", "\u{fffd}"].map(str::to_owned).to_vec(), vec![]);
        Form {
            has_shape: false,
            choices: 1,
            vocabulary: Arc::new(vocabulary),
            has_tools: false,
            is_legacy: false,
            echo: String::new(),
            logprobs,
            token_ids: logprobs,
            tokens_as_ids: false,
        }
    }

    fn piece(body: PieceBody) -> Piece {
        Piece { choice: 0, body, tokens: Vec::new() }
    }

    #[test]
    fn a_whole_stream_looks_as_the_wire_contract_says() {
        let (chunks, mut out) = (Chunks::new(&about(), UsageIn::Last), BytesMut::new());
        let (form, usage) = (form(false), Usage { prompt_tokens: 5, completion_tokens: 2, cached_tokens: 1 });
        chunks.role(0, None, &usage, &mut out);
        chunks.piece(&piece(PieceBody::Text("Hi\n".into())), &form, &usage, &mut out);
        let end = PieceBody::End { reason: WireReason::Length, stopped_by: None };
        chunks.piece(&piece(end), &form, &usage, &mut out);
        chunks.usage(&usage, &mut out);
        let events = events(&out);
        for event in &events {
            assert_eq!(event["id"], "chatcmpl-1");
            assert_eq!(event["object"], "chat.completion.chunk");
            assert_eq!(event["created"], 17);
            assert_eq!(event["model"], "m\"odel");
        }
        assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
        assert_eq!(events[0]["choices"][0]["delta"]["content"], "");
        assert_eq!(events[1]["choices"][0]["delta"], json!({"content": "Hi\n"}));
        assert_eq!(events[2]["choices"][0]["delta"], json!({}));
        let reasons: Vec<_> = events[..3].iter().map(|event| &event["choices"][0]["finish_reason"]).collect();
        assert_eq!(reasons, [&Value::Null, &Value::Null, &json!("length")]);
        assert!(events[..3].iter().all(|event| event.as_object().unwrap().get("usage") == Some(&Value::Null)));
        assert_eq!(events[3]["choices"], json!([]));
        assert_eq!(events[3]["usage"]["total_tokens"], 7);
        assert_eq!(events[3]["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
    }

    #[test]
    fn calls_logprobs_ids_and_the_usage_so_far_are_told_where_they_are_wanted() {
        let (chunks, mut out) = (Chunks::new(&about(), UsageIn::Every), BytesMut::new());
        let (form, usage) = (form(true), Usage { prompt_tokens: 5, completion_tokens: 2, cached_tokens: 1 });
        let detail = TokenDetail { token: 1, logprob: -0.5, rank: 1, top: vec![(0, -1.5)], is_hidden: false };
        chunks.role(3, Some(&[7, 8]), &usage, &mut out);
        let call = PieceBody::Call { index: 1, id: "call_x".into(), name: "f".into() };
        chunks.piece(&Piece { tokens: vec![detail], ..piece(call) }, &form, &usage, &mut out);
        chunks.piece(&piece(PieceBody::Arguments { index: 1, text: "{\"".into() }), &form, &usage, &mut out);
        let stopped_by = Some(StoppedBy::Text("x".into()));
        let end = PieceBody::End { reason: WireReason::Stop, stopped_by };
        chunks.piece(&piece(end), &form, &usage, &mut out);
        let events = events(&out);
        assert_eq!((&events[0]["choices"][0]["index"], &events[0]["prompt_token_ids"]), (&json!(3), &json!([7, 8])));
        let choice = &events[1]["choices"][0];
        assert_eq!(
            choice["delta"]["tool_calls"][0],
            json!({
                "index": 1, "id": "call_x", "type": "function", "function": { "name": "f", "arguments": "" }
            })
        );
        assert_eq!(choice["token_ids"], json!([1]));
        let told = &choice["logprobs"]["content"][0];
        assert_eq!((&told["token"], &told["bytes"], &told["logprob"]), (&json!("b"), &json!([98]), &json!(-0.5)));
        assert_eq!(told["top_logprobs"][0]["token"], "a");
        assert_eq!(events[2]["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"], "{\"");
        assert_eq!(events[3]["choices"][0]["stop_reason"], "x");
        assert!(events.iter().all(|event| event["usage"]["completion_tokens"] == 2));
    }

    #[test]
    fn usage_is_not_mentioned_unless_it_was_asked_for() {
        let mut out = BytesMut::new();
        let text = piece(PieceBody::Text("x".into()));
        Chunks::new(&about(), UsageIn::None).piece(&text, &form(false), &Usage::default(), &mut out);
        assert!(events(&out)[0].get("usage").is_none());
    }

    #[test]
    fn the_end_is_done_or_an_error_event() {
        let mut out = BytesMut::new();
        error(&ApiError::internal(), &mut out);
        assert_eq!(events(&out)[0]["error"]["code"], "server_error");
        out.clear();
        done(&mut out);
        assert_eq!(&out[..], b"data: [DONE]\n\n");
    }

    proptest! {
        #[test]
        fn any_text_survives_the_wire_in_one_event(text in ".*") {
            let mut out = BytesMut::new();
            let piece = piece(PieceBody::Text(text.clone()));
            Chunks::new(&about(), UsageIn::None).piece(&piece, &form(false), &Usage::default(), &mut out);
            let events = events(&out);
            prop_assert_eq!(events.len(), 1);
            prop_assert_eq!(events[0]["choices"][0]["delta"]["content"].as_str(), Some(text.as_str()));
        }
    }
}
