//! `POST /v1/completions`, the older endpoint: text in, text out.

use std::sync::Arc;

use actix_web::web::BytesMut;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    About, Dialect, Writer,
    openai::{SYSTEM_FINGERPRINT, WireUsage, stop_reason},
    sse,
};
use crate::{
    admission::Principal,
    domain::{TokenDetail, Usage},
    edge::{
        answer::{Form, Piece, PieceBody, Whole, WholeChoice, WireReason},
        error::ApiError,
        state::EdgeState,
        wire::{self, Body, Bounds, Request, StreamOptions},
    },
};

pub struct Completions(StreamOptions);

impl Dialect for Completions {
    type Before = ();

    const KEPT_AS: Option<&'static str> = None;

    async fn before(_: &Body, _: &Arc<EdgeState>, _: &Principal) -> Result<(), ApiError> {
        Ok(())
    }

    const ID_PREFIX: &'static str = "cmpl-";

    fn read(body: Body, bounds: Bounds, (): ()) -> Result<(Request, Self), ApiError> {
        let (request, stream) = wire::completions::read(body, bounds)?;
        Ok((request, Self(stream)))
    }

    fn writer(self, about: About, form: Form, prompt: Vec<u32>) -> Box<dyn Writer> {
        let offsets = vec![0; form.choices as usize];
        Box::new(CompletionsWriter { about, form, prompt, stream: self.0, offsets })
    }
}

struct CompletionsWriter {
    about: About,
    form: Form,
    prompt: Vec<u32>,
    stream: StreamOptions,
    /// Of each choice: how many characters of its text were told of with logprobs.
    offsets: Vec<usize>,
}

#[derive(JsonSchema, Serialize)]
pub struct Completion<'a> {
    id: &'a str,
    #[schemars(extend("const" = "text_completion"))]
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'static str,
    choices: Vec<Choice<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<WireUsage>>,
}

#[derive(JsonSchema, Serialize)]
struct Choice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<Logprobs>,
    finish_reason: Option<WireReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

#[derive(JsonSchema, Serialize)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Map<String, Value>>,
    text_offset: Vec<usize>,
}

impl CompletionsWriter {
    fn completion<'a>(&'a self, choices: Vec<Choice<'a>>, usage: Option<Option<WireUsage>>) -> Completion<'a> {
        Completion {
            id: &self.about.id,
            object: "text_completion",
            created: self.about.created,
            model: self.about.model.as_str(),
            system_fingerprint: SYSTEM_FINGERPRINT,
            choices,
            usage,
        }
    }

    /// `from` is where the first of the tokens stands in the text, in characters.
    fn logprobs(&self, tokens: &[TokenDetail], mut from: usize) -> (Option<Logprobs>, usize) {
        if !self.form.logprobs {
            return (None, from);
        }
        let shown: Vec<&TokenDetail> = tokens.iter().filter(|detail| !detail.is_hidden).collect();
        let top = |detail: &&TokenDetail| {
            detail.top.iter().map(|(token, logprob)| (self.form.shown(*token), json!(logprob))).collect()
        };
        let logprobs = Logprobs {
            tokens: shown.iter().map(|detail| self.form.shown(detail.token)).collect(),
            token_logprobs: shown.iter().map(|detail| detail.logprob).collect(),
            top_logprobs: shown.iter().map(top).collect(),
            text_offset: shown
                .iter()
                .map(|detail| {
                    let at = from;
                    from += String::from_utf8_lossy(self.form.bytes(detail.token)).chars().count();
                    at
                })
                .collect(),
        };
        (Some(logprobs), from)
    }

    fn choice<'a>(&'a self, index: usize, choice: &'a WholeChoice) -> Choice<'a> {
        Choice {
            index,
            text: &choice.text,
            logprobs: self.logprobs(&choice.tokens, 0).0,
            finish_reason: choice.reason,
            stop_reason: choice.stopped_by.as_ref().map(stop_reason),
            token_ids: self.form.token_ids(&choice.tokens),
            prompt_token_ids: self.form.token_ids.then_some(&self.prompt[..]),
        }
    }

    /// What every chunk says of the usage.
    fn usage(&self, so_far: &Usage) -> Option<Option<WireUsage>> {
        match (self.stream.continuous_usage, self.stream.include_usage) {
            (true, _) => Some(Some(so_far.into())),
            (false, true) => Some(None),
            (false, false) => None,
        }
    }
}

impl Writer for CompletionsWriter {
    fn whole(&mut self, whole: &Whole) -> Vec<u8> {
        let choices = whole.choices.iter().enumerate().map(|(index, choice)| self.choice(index, choice)).collect();
        let completion = self.completion(choices, Some(Some((&whole.usage).into())));
        serde_json::to_vec(&completion).expect("an answer serialises")
    }

    fn begin(&mut self, _: &Usage, _: &mut BytesMut) {}

    fn pieces(&mut self, pieces: Vec<Piece>, so_far: &Usage, out: &mut BytesMut) {
        for Piece { choice, body, tokens } in pieces {
            let (text, reason, stopped_by) = match body {
                PieceBody::Text(text) => (text, None, None),
                PieceBody::End { reason, stopped_by } => (String::new(), Some(reason), stopped_by),
                // There are no tools here.
                PieceBody::Call { .. } | PieceBody::Arguments { .. } => continue,
            };
            let (logprobs, offset) = self.logprobs(&tokens, self.offsets[choice as usize]);
            self.offsets[choice as usize] = offset;
            let choice = Choice {
                index: choice as usize,
                text: &text,
                logprobs: logprobs.filter(|logprobs| !logprobs.tokens.is_empty()),
                finish_reason: reason,
                stop_reason: stopped_by.as_ref().map(stop_reason),
                token_ids: self.form.token_ids(&tokens),
                prompt_token_ids: None,
            };
            sse::data(&self.completion(vec![choice], self.usage(so_far)), out);
        }
    }

    fn end(&mut self, usage: &Usage, out: &mut BytesMut) {
        if self.stream.include_usage {
            sse::data(&self.completion(Vec::new(), Some(Some(usage.into()))), out);
        }
        sse::done(out);
    }
}
