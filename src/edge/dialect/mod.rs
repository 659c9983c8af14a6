//! The ways in which clients ask for text and want to be answered: chat completions, the older completions, and
//! responses. All of them become the same [`Request`], and are told of the same [`Piece`]s.
//!
//! [`Request`]: super::wire::Request

pub mod chat;
pub mod completions;
pub mod openai;
pub mod responses;
mod sse;

use std::sync::Arc;

use actix_web::web::BytesMut;

pub use openai::About;
pub use sse::KEEP_ALIVE;

use super::{
    answer::{Form, Piece, Whole},
    error::ApiError,
    state::EdgeState,
    wire::{Body, Bounds, Request},
};
use crate::{admission::Principal, domain::Usage};

/// One way of asking.
pub trait Dialect: Sized + Send + 'static {
    /// What must be looked up before the request can be read.
    type Before: Send;

    /// Looks it up.
    fn before(
        body: &Body,
        state: &Arc<EdgeState>,
        principal: &Principal,
    ) -> impl Future<Output = Result<Self::Before, ApiError>> + Send;

    /// What its answers are stored as, where the client wants them stored.
    const KEPT_AS: Option<&'static str>;

    /// Reads what is asked for.
    fn read(body: Body, bounds: Bounds, before: Self::Before) -> Result<(Request, Self), ApiError>;

    /// What every answer's id begins with.
    const ID_PREFIX: &'static str = "chatcmpl-";

    /// Of the answer.
    fn writer(self, about: About, form: Form, prompt: Vec<u32>) -> Box<dyn Writer>;
}

/// Writes one answer, as a whole or in events.
pub trait Writer: Send {
    /// The whole answer, as JSON.
    fn whole(&mut self, whole: &Whole) -> Vec<u8>;

    /// What a stream begins with.
    fn begin(&mut self, so_far: &Usage, out: &mut BytesMut);

    fn pieces(&mut self, pieces: Vec<Piece>, so_far: &Usage, out: &mut BytesMut);

    /// The end of a stream that went well.
    fn end(&mut self, usage: &Usage, out: &mut BytesMut);

    /// The end of one that did not.
    fn failed(&mut self, error: &ApiError, out: &mut BytesMut) {
        sse::error(error, out);
    }
}
