//! An answer, as it comes and as it is told.

use std::{sync::Arc, time::Duration};

use actix_web::web::{Bytes, BytesMut};
use futures::{FutureExt, Stream, stream};
use tokio::time::timeout;

use super::{
    answer::{Piece, Teller, Whole},
    dialect::{KEEP_ALIVE, Writer},
    error::ApiError,
    generation::{Answering, News},
    state::EdgeState,
    stored::Keeping,
};
use crate::domain::{FundsEnd, Usage};

/// Bytes of several events that wait, written to the client together.
const WRITE_BYTES_MAX: usize = 16 << 10;

pub struct Telling {
    pub state: Arc<EdgeState>,
    pub answering: Answering,
    pub teller: Teller,
    pub writer: Box<dyn Writer>,
    pub prompt_tokens: u32,
    /// Where the answer is wanted later on.
    pub keeping: Option<Keeping>,
    /// Why a stream ended before its time.
    pub failure: Option<ApiError>,
}

/// A whole answer, as JSON.
#[derive(Clone, Default)]
pub struct Told {
    pub body: Vec<u8>,
    /// See [`Whole::limited_by`].
    pub limited_by: Option<FundsEnd>,
}

impl Telling {
    pub async fn whole(&mut self) -> Result<Told, ApiError> {
        let mut whole = Whole::of(self.teller.form().choices);
        whole.add(self.teller.begin());
        loop {
            match self.answering.next().await {
                News::Prompt(tokens) => whole.prompt.extend(tokens),
                News::Delta { choice, text, details } => whole.add(self.teller.delta(choice, text, details)),
                News::ChoiceEnded { choice, reason, stopped_by } => {
                    whole.add(self.teller.end(choice, reason, stopped_by));
                }
                News::Finished(usage) => {
                    whole.add(self.teller.end_all());
                    whole.usage = usage;
                    let body = self.writer.whole(&whole);
                    if let Some(keeping) = self.keeping.take() {
                        keeping.keep(&self.state, &whole, &body).await;
                    }
                    return Ok(Told { body, limited_by: whole.limited_by() });
                }
                News::Failed(error) => return Err(error),
            }
        }
    }

    /// What has been used up to now, as far as it is known.
    fn so_far(&self) -> Usage {
        Usage { prompt_tokens: self.prompt_tokens, completion_tokens: self.answering.tokens(), cached_tokens: 0 }
    }

    fn begin(&mut self, out: &mut BytesMut) {
        self.writer.begin(&self.so_far(), out);
        let pieces = self.teller.begin();
        self.pieces(pieces, out);
    }

    fn pieces(&mut self, pieces: Vec<Piece>, out: &mut BytesMut) {
        if pieces.is_empty() {
            return;
        }
        if let Some(keeping) = &mut self.keeping {
            keeping.whole.add(pieces.clone());
        }
        self.writer.pieces(pieces, &self.so_far(), out);
    }

    /// True after the last.
    async fn put(&mut self, news: News, out: &mut BytesMut) -> bool {
        match news {
            News::Prompt(_) => {}
            News::Delta { choice, text, details } => {
                let pieces = self.teller.delta(choice, text, details);
                self.pieces(pieces, out);
            }
            News::ChoiceEnded { choice, reason, stopped_by } => {
                let pieces = self.teller.end(choice, reason, stopped_by);
                self.pieces(pieces, out);
            }
            News::Finished(usage) => {
                let pieces = self.teller.end_all();
                self.pieces(pieces, out);
                // Who has heard of the end may ask for the answer.
                if let Some(mut keeping) = self.keeping.take() {
                    let mut whole = std::mem::take(&mut keeping.whole);
                    whole.usage = usage;
                    let body = self.writer.whole(&whole);
                    keeping.keep(&self.state, &whole, &body).await;
                }
                self.writer.end(&usage, out);
                return true;
            }
            News::Failed(error) => {
                self.writer.failed(&error, out);
                self.failure = Some(error);
                return true;
            }
        }
        false
    }
}

/// An answer on its way to the client as server-sent events.
pub struct Streaming {
    telling: Telling,
    keep_alive: Duration,
    /// What was known before the headers went out.
    first: Option<News>,
    begun: bool,
    over: bool,
}

impl Streaming {
    /// Waits as long as a client would not miss the headers, so that a failure before the first token is an ordinary
    /// error, which clients know how to retry.
    pub async fn begin(mut telling: Telling) -> Result<Self, ApiError> {
        let keep_alive = telling.state.keep_alive();
        let first = match timeout(keep_alive, telling.answering.next()).await {
            Ok(News::Failed(error)) => return Err(error),
            Ok(news) => Some(news),
            Err(_) => None,
        };
        Ok(Self { telling, keep_alive, first, begun: false, over: false })
    }

    pub fn bytes(self) -> impl Stream<Item = Result<Bytes, ApiError>> {
        let step = async |(mut streaming, mut buffer): (Self, BytesMut)| {
            if streaming.over {
                return None;
            }
            streaming.write(&mut buffer).await;
            let bytes = buffer.split().freeze();
            Some((Ok(bytes), (streaming, buffer)))
        };
        stream::unfold((self, BytesMut::with_capacity(4096)), step)
    }

    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Of a stream that is over: why it was cut off.
    pub fn failure(self) -> Option<ApiError> {
        self.telling.failure
    }

    /// Writes what there is, after waiting for at least something: whole events, or a comment that the stream lives.
    pub async fn write(&mut self, out: &mut BytesMut) {
        if !self.begun {
            self.begun = true;
            self.telling.begin(out);
            if self.first.is_none() && !out.is_empty() {
                return; // the headers are late already
            }
        }
        loop {
            let news = match self.first.take() {
                Some(news) => news,
                None => match timeout(self.keep_alive, self.telling.answering.next()).await {
                    Ok(news) => news,
                    Err(_) => return out.extend_from_slice(KEEP_ALIVE),
                },
            };
            self.over = self.telling.put(news, out).await;
            while !self.over && out.len() < WRITE_BYTES_MAX {
                let Some(news) = self.telling.answering.next().now_or_never() else { break };
                self.over = self.telling.put(news, out).await;
            }
            // Not all news are for the client to see, and nothing is what ends a body.
            if self.over || !out.is_empty() {
                return;
            }
        }
    }
}
