//! Requests on their way to a worker, and tokens on their way back.
//!
//! Promises that the shared [`Queue`] is bounded per model, serves tenants by fewest tokens received, and
//! hands each request to one worker at a time. Requests wait in the store; tokens never touch it, they go
//! straight from the worker ([`outlet`]) to the edge that holds the client's connection ([`reply`]), between
//! processes over [`relay`]. Never decides about money.

mod line;
pub mod outlet;
pub mod relay;
pub mod reply;

pub use line::{Disowned, GivenUp, PublishError, Queue, QueueLimits, Renewed, Room};
pub use outlet::{Order, Orders, Outgoing, Outlet};
pub use reply::{Feedback, Orphan, ReplyHub, ReplyStream, WorkerLink};
