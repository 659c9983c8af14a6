//! Requests on their way to a worker, and tokens on their way back.
//!
//! Promises that the shared [`Queue`] is bounded per model, serves tenants by fewest tokens received, and
//! hands each request to one worker at a time. Never decides about money.

mod line;

pub use line::{PublishError, Queue, QueueLimits};
