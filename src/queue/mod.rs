//! Requests on their way to a worker, and tokens on their way back.
//!
//! Requests wait in the store, where any worker can claim them; tokens never touch the store: they go
//! straight from the worker to the edge that holds the client's connection ([`reply`], [`relay`]).
//! Promises that the shared [`Queue`] is bounded per model, serves tenants by fewest tokens received, and
//! hands each request to one worker at a time. Never decides about money.

mod line;
pub mod relay;
pub mod reply;

pub use line::{PublishError, Queue, QueueLimits};
pub use reply::{ReplyHub, ReplyStream, WorkerLink};
