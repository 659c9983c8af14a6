//! `POST /v1/chat/completions`

use std::sync::Arc;

use actix_web::web::BytesMut;

use super::{
    About, Dialect, Writer,
    openai::Completion,
    sse::{self, Chunks, UsageIn},
};
use crate::{
    admission::Principal,
    domain::Usage,
    edge::{
        answer::{Form, Piece, Whole},
        error::ApiError,
        state::EdgeState,
        stored,
        wire::{self, Body, Bounds, Request, StreamOptions},
    },
};

pub struct Chat {
    stream: StreamOptions,
    tells_prompt: bool,
}

impl Dialect for Chat {
    type Before = ();

    const KEPT_AS: Option<&'static str> = Some(stored::CHAT);

    async fn before(_: &Body, _: &Arc<EdgeState>, _: &Principal) -> Result<(), ApiError> {
        Ok(())
    }

    fn read(body: Body, bounds: Bounds, (): ()) -> Result<(Request, Self), ApiError> {
        let (request, stream) = wire::chat::read(body, bounds)?;
        let tells_prompt = request.telling.prompt_logprobs.is_some();
        Ok((request, Self { stream, tells_prompt }))
    }

    fn writer(self, about: About, form: Form, prompt: Vec<u32>) -> Box<dyn Writer> {
        let Self { stream, tells_prompt } = self;
        let chunks = Chunks::new(&about, usage_in(stream));
        Box::new(ChatWriter { about, form, prompt, chunks, ends_with_usage: stream.include_usage, tells_prompt })
    }
}

pub fn usage_in(stream: StreamOptions) -> UsageIn {
    match (stream.continuous_usage, stream.include_usage) {
        (true, _) => UsageIn::Every,
        (false, true) => UsageIn::Last,
        (false, false) => UsageIn::None,
    }
}

struct ChatWriter {
    about: About,
    form: Form,
    /// Empty where nobody wants to know the prompt's tokens.
    prompt: Vec<u32>,
    chunks: Chunks,
    ends_with_usage: bool,
    tells_prompt: bool,
}

impl Writer for ChatWriter {
    fn whole(&mut self, whole: &Whole) -> Vec<u8> {
        let completion = Completion::new(&self.about, whole, &self.form, &self.prompt, self.tells_prompt);
        serde_json::to_vec(&completion).expect("an answer serialises")
    }

    fn begin(&mut self, so_far: &Usage, out: &mut BytesMut) {
        for choice in 0..self.form.choices {
            let ids = (choice == 0 && self.form.token_ids).then_some(&self.prompt[..]);
            self.chunks.role(choice, ids, so_far, out);
        }
    }

    fn pieces(&mut self, pieces: Vec<Piece>, so_far: &Usage, out: &mut BytesMut) {
        for piece in pieces {
            self.chunks.piece(&piece, &self.form, so_far, out);
        }
    }

    fn end(&mut self, usage: &Usage, out: &mut BytesMut) {
        if self.ends_with_usage {
            self.chunks.usage(usage, out);
        }
        sse::done(out);
    }
}
