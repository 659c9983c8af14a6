//! Server-sent events of one answer. Everything that all chunks share is written once, so that a token
//! costs a copy and no more.

use actix_web::web::BytesMut;
use serde_json::json;

use super::{
    error::ApiError,
    openai::{SERVICE_TIER, SYSTEM_FINGERPRINT, WireUsage},
};
use crate::domain::{FinishReason, ModelId, RequestId, Usage};

/// A comment line, which clients skip.
pub const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

pub struct Chunks {
    /// `data: {"id":…,"choices":`
    head: String,
    /// What follows the choices.
    tail: &'static str,
}

impl Chunks {
    /// With `include_usage`, every chunk carries `usage: null`, for the last one to fill.
    pub fn new(id: &RequestId, created: u64, model: &ModelId, include_usage: bool) -> Self {
        let shared = json!({
            "id": id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "service_tier": SERVICE_TIER,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        })
        .to_string();
        let open = shared.trim_end_matches('}');
        Self {
            head: format!("data: {open},\"choices\":"),
            tail: if include_usage { ",\"usage\":null}\n\n" } else { "}\n\n" },
        }
    }

    /// The first chunk.
    pub fn role(&self, out: &mut BytesMut) {
        self.choice(out, |out| out.extend_from_slice(br#"{"role":"assistant","content":"","refusal":null}"#), "null");
    }

    pub fn text(&self, text: &str, out: &mut BytesMut) {
        let delta = |out: &mut BytesMut| {
            out.extend_from_slice(br#"{"content":"#);
            write_string(text, out);
            out.extend_from_slice(b"}");
        };
        self.choice(out, delta, "null");
    }

    /// The last chunk with a choice.
    pub fn finish(&self, reason: FinishReason, out: &mut BytesMut) {
        let reason = match reason {
            FinishReason::Stop => "\"stop\"",
            FinishReason::Length => "\"length\"",
            FinishReason::Cancelled => "\"cancelled\"",
        };
        self.choice(out, |out| out.extend_from_slice(b"{}"), reason);
    }

    pub fn usage(&self, usage: &Usage, out: &mut BytesMut) {
        let usage = serde_json::to_vec(&WireUsage::from(usage)).expect("numbers serialise");
        out.extend_from_slice(self.head.as_bytes());
        out.extend_from_slice(b"[],\"usage\":");
        out.extend_from_slice(&usage);
        out.extend_from_slice(b"}\n\n");
    }

    fn choice(&self, out: &mut BytesMut, delta: impl FnOnce(&mut BytesMut), finish_reason: &str) {
        out.extend_from_slice(self.head.as_bytes());
        out.extend_from_slice(br#"[{"index":0,"delta":"#);
        delta(out);
        out.extend_from_slice(br#","logprobs":null,"finish_reason":"#);
        out.extend_from_slice(finish_reason.as_bytes());
        out.extend_from_slice(b"}]");
        out.extend_from_slice(self.tail.as_bytes());
    }
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

fn write_string(text: &str, out: &mut BytesMut) {
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
    serde_json::to_writer(Sink(out), text).expect("memory takes a string");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn events(out: &BytesMut) -> Vec<Value> {
        let text = std::str::from_utf8(out).unwrap();
        assert!(text.ends_with("\n\n"));
        let read = |event: &str| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
        text.trim_end_matches("\n\n").split("\n\n").map(read).collect()
    }

    fn chunks(include_usage: bool) -> Chunks {
        Chunks::new(&"chatcmpl-1".into(), 17, &"m\"odel".into(), include_usage)
    }

    #[test]
    fn a_whole_stream_looks_as_the_wire_contract_says() {
        let (chunks, mut out) = (chunks(true), BytesMut::new());
        chunks.role(&mut out);
        chunks.text("Hi\n", &mut out);
        chunks.finish(FinishReason::Length, &mut out);
        chunks.usage(&Usage { prompt_tokens: 5, completion_tokens: 2, cached_tokens: 1 }, &mut out);
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
    fn usage_is_not_mentioned_unless_it_was_asked_for() {
        let mut out = BytesMut::new();
        chunks(false).text("x", &mut out);
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
            chunks(false).text(&text, &mut out);
            let events = events(&out);
            prop_assert_eq!(events.len(), 1);
            prop_assert_eq!(events[0]["choices"][0]["delta"]["content"].as_str(), Some(text.as_str()));
        }
    }
}
