//! `POST /v1/responses`: items in, items out, and events that say which item they belong to.

use std::sync::Arc;

use actix_web::web::BytesMut;
use serde_json::{Map, Value, json};

use super::{About, Dialect, Writer, openai::service_tier, sse};
use crate::{
    admission::Principal,
    domain::{TokenDetail, Usage},
    edge::{
        answer::{Form, Piece, PieceBody, Whole, WholeCall, WireReason},
        error::ApiError,
        state::EdgeState,
        stored,
        wire::{self, Body, Bounds, Request, responses},
    },
};

pub struct Responses(responses::About);

impl Dialect for Responses {
    type Before = responses::Earlier;

    const KEPT_AS: Option<&'static str> = Some(stored::RESPONSE);

    async fn before(
        body: &Body,
        state: &Arc<EdgeState>,
        principal: &Principal,
    ) -> Result<responses::Earlier, ApiError> {
        match responses::previous(body)? {
            Some(id) => stored::earlier(state, &principal.tenant, &id).await,
            None => Ok(Vec::new()),
        }
    }

    const ID_PREFIX: &'static str = "resp_";

    fn read(body: Body, bounds: Bounds, earlier: responses::Earlier) -> Result<(Request, Self), ApiError> {
        let (request, about) = wire::responses::read(body, bounds, earlier)?;
        Ok((request, Self(about)))
    }

    fn writer(self, about: About, form: Form, _: Vec<u32>) -> Box<dyn Writer> {
        let Self(asked) = self;
        Box::new(ResponsesWriter { about, form, asked, sequence: 0, items: Vec::new(), status: "in_progress" })
    }
}

struct ResponsesWriter {
    about: About,
    form: Form,
    asked: responses::About,
    /// Events so far.
    sequence: u64,
    /// What a stream has told of so far.
    items: Vec<Item>,
    status: &'static str,
}

enum Item {
    Message { text: String, tokens: Vec<TokenDetail>, is_done: bool },
    Call { call: WholeCall, is_done: bool },
}

impl ResponsesWriter {
    /// What the ids of its parts end with.
    fn unique(&self) -> &str {
        self.about.id.strip_prefix(Responses::ID_PREFIX).unwrap_or(&self.about.id)
    }

    fn item_id(&self, index: usize) -> String {
        let prefix = match self.items.get(index) {
            Some(Item::Call { .. }) => "fc",
            _ => "msg",
        };
        format!("{prefix}_{}_{index}", self.unique())
    }

    fn logprobs(&self, tokens: &[TokenDetail]) -> Value {
        match self.form.logprobs(tokens) {
            Some(logprobs) => logprobs.content(),
            None => json!([]),
        }
    }

    fn text_part(&self, text: &str, tokens: &[TokenDetail]) -> Value {
        json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs(tokens) })
    }

    fn item(&self, index: usize) -> Value {
        let id = self.item_id(index);
        let status = |is_done: bool| match (is_done, self.status) {
            (true, _) => "completed",
            (false, "in_progress") => "in_progress",
            (false, _) => "incomplete",
        };
        match &self.items[index] {
            Item::Message { text, tokens, is_done } => json!({
                "id": id, "type": "message", "status": status(*is_done), "role": "assistant",
                "content": [self.text_part(text, tokens)],
            }),
            Item::Call { call, is_done } => json!({
                "id": id, "type": "function_call", "status": status(*is_done), "call_id": call.id,
                "name": call.name, "arguments": call.arguments,
            }),
        }
    }

    fn response(&self, reason: Option<WireReason>, usage: Option<&Usage>) -> Value {
        let output: Vec<Value> = match self.status {
            "in_progress" => Vec::new(),
            _ => (0..self.items.len()).map(|index| self.item(index)).collect(),
        };
        let mut response = Map::new();
        let mut put = |name: &str, value: Value| response.insert(name.to_owned(), value);
        put("id", json!(self.about.id));
        put("object", json!("response"));
        put("created_at", json!(self.about.created));
        put("status", json!(self.status));
        put("error", Value::Null);
        let is_cut = reason == Some(WireReason::Length);
        put("incomplete_details", if is_cut { json!({ "reason": "max_output_tokens" }) } else { Value::Null });
        put("model", json!(self.about.model));
        put("output", json!(output));
        put("service_tier", json!(service_tier(self.about.priority)));
        let usage = usage.map(|usage| {
            json!({
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": { "cached_tokens": usage.cached_tokens },
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": { "reasoning_tokens": 0 },
                "total_tokens": u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens),
            })
        });
        put("usage", json!(usage));
        for (name, value) in &self.asked.shown {
            put(name, value.clone());
        }
        Value::Object(response)
    }

    fn event(&mut self, kind: &str, mut fields: Value, out: &mut BytesMut) {
        fields["type"] = json!(kind);
        fields["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        out.extend_from_slice(format!("event: {kind}\n").as_bytes());
        sse::data(&fields, out);
    }

    /// Begins an item.
    fn add(&mut self, item: Item, out: &mut BytesMut) {
        let index = self.items.len();
        self.items.push(item);
        let mut shown = self.item(index);
        let is_message = matches!(self.items[index], Item::Message { .. });
        if is_message {
            shown["content"] = json!([]);
        }
        self.event("response.output_item.added", json!({ "output_index": index, "item": shown }), out);
        if is_message {
            let fields = json!({
                "item_id": self.item_id(index), "output_index": index, "content_index": 0,
                "part": self.text_part("", &[]),
            });
            self.event("response.content_part.added", fields, out);
        }
    }

    /// Ends the item that was begun last, if it has not ended.
    fn close(&mut self, out: &mut BytesMut) {
        let Some(index) = self.items.len().checked_sub(1) else { return };
        let id = self.item_id(index);
        match &mut self.items[index] {
            Item::Message { is_done: true, .. } | Item::Call { is_done: true, .. } => return,
            Item::Message { is_done, .. } => {
                *is_done = true;
                let Item::Message { text, tokens, .. } = &self.items[index] else { return };
                let part = self.text_part(text, tokens);
                let place = json!({ "item_id": id, "output_index": index, "content_index": 0 });
                let mut done = place.clone();
                done["text"] = part["text"].clone();
                done["logprobs"] = part["logprobs"].clone();
                self.event("response.output_text.done", done, out);
                let mut done = place;
                done["part"] = part;
                self.event("response.content_part.done", done, out);
            }
            Item::Call { is_done, call } => {
                *is_done = true;
                let fields = json!({
                    "item_id": id, "output_index": index, "arguments": call.arguments, "name": call.name,
                });
                self.event("response.function_call_arguments.done", fields, out);
            }
        }
        let item = self.item(index);
        self.event("response.output_item.done", json!({ "output_index": index, "item": item }), out);
    }

    fn text(&mut self, text: &str, tokens: Vec<TokenDetail>, out: &mut BytesMut) {
        if !matches!(self.items.last(), Some(Item::Message { is_done: false, .. })) {
            self.close(out);
            self.add(Item::Message { text: String::new(), tokens: Vec::new(), is_done: false }, out);
        }
        let index = self.items.len() - 1;
        let logprobs = self.logprobs(&tokens);
        if let Item::Message { text: all, tokens: told, .. } = &mut self.items[index] {
            all.push_str(text);
            told.extend(tokens);
        }
        if text.is_empty() {
            return;
        }
        let fields = json!({
            "item_id": self.item_id(index), "output_index": index, "content_index": 0, "delta": text,
            "logprobs": logprobs,
        });
        self.event("response.output_text.delta", fields, out);
    }

    fn arguments(&mut self, text: &str, out: &mut BytesMut) {
        let Some(index) = self.items.len().checked_sub(1) else { return };
        if let Item::Call { call, .. } = &mut self.items[index] {
            call.arguments.push_str(text);
        }
        let fields = json!({ "item_id": self.item_id(index), "output_index": index, "delta": text });
        self.event("response.function_call_arguments.delta", fields, out);
    }
}

impl Writer for ResponsesWriter {
    fn whole(&mut self, whole: &Whole) -> Vec<u8> {
        let Some(choice) = whole.choices.first() else { return Vec::new() };
        let is_whole = choice.reason != Some(WireReason::Length);
        // A stream has told of them already.
        self.items.clear();
        self.status = if is_whole { "completed" } else { "incomplete" };
        if !choice.text.is_empty() || choice.calls.is_empty() {
            let (text, tokens) = (choice.text.clone(), choice.tokens.clone());
            self.items.push(Item::Message { text, tokens, is_done: is_whole || !choice.calls.is_empty() });
        }
        for (i, call) in choice.calls.iter().enumerate() {
            self.items.push(Item::Call { call: call.clone(), is_done: is_whole || i + 1 < choice.calls.len() });
        }
        self.response(choice.reason, Some(&whole.usage)).to_string().into_bytes()
    }

    fn begin(&mut self, _: &Usage, out: &mut BytesMut) {
        let response = self.response(None, None);
        self.event("response.created", json!({ "response": response }), out);
        self.event("response.in_progress", json!({ "response": response }), out);
    }

    fn pieces(&mut self, pieces: Vec<Piece>, _: &Usage, out: &mut BytesMut) {
        for Piece { body, tokens, .. } in pieces {
            match body {
                PieceBody::Text(text) => self.text(&text, tokens, out),
                PieceBody::Call { id, name, .. } => {
                    self.close(out);
                    let call = WholeCall { id, name, arguments: String::new() };
                    self.add(Item::Call { call, is_done: false }, out);
                }
                PieceBody::Arguments { text, .. } => self.arguments(&text, out),
                PieceBody::End { reason, .. } => {
                    // Tokens that end a call have no text to stand beside.
                    if matches!(self.items.last(), None | Some(Item::Message { is_done: false, .. })) {
                        self.text("", tokens, out);
                    }
                    let is_cut = reason == WireReason::Length;
                    if !is_cut {
                        self.close(out);
                    }
                    self.status = if is_cut { "incomplete" } else { "completed" };
                }
            }
        }
    }

    fn end(&mut self, usage: &Usage, out: &mut BytesMut) {
        let is_cut = self.status == "incomplete";
        let reason = if is_cut { WireReason::Length } else { WireReason::Stop };
        let response = self.response(Some(reason), Some(usage));
        let kind = if is_cut { "response.incomplete" } else { "response.completed" };
        self.event(kind, json!({ "response": response }), out);
    }

    fn failed(&mut self, error: &ApiError, out: &mut BytesMut) {
        self.status = "failed";
        let mut response = self.response(None, None);
        response["error"] = json!({ "code": "server_error", "message": error.message() });
        self.event("response.failed", json!({ "response": response }), out);
        // Clients that know the older streams alone look for this one.
        sse::error(error, out);
    }
}
