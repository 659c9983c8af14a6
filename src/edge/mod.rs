//! HTTP: where a request becomes a job, and tokens become an answer.
//!
//! The life of a request here: authenticate, read and [parse](wire), render and tokenise on the prompt
//! pool, put the money on hold, publish, stream what comes back. Promises that a refusal costs nothing, that
//! every answer names its request, that a stream ends with `[DONE]` or with an error event, and that a
//! client's going away gives the request up at once. Never touches an engine, never settles: what was used
//! is known where it was computed.

mod account;
mod address;
mod admin;
mod answer;
mod auth;
mod body;
mod cancel;
mod dialect;
mod endpoint;
mod error;
mod generation;
mod models;
mod openapi;
mod operations;
mod orphans;
mod rates;
mod recording;
mod server;
mod state;
mod status;
mod stored;
mod telling;
mod tokens;
mod watch;
mod wire;

pub use error::ApiError;
pub use server::{EdgeError, EdgeHandle, spawn};
pub use state::{EdgeSpec, Readiness, ServedModel};
pub use watch::{WatchHandle, watch};
