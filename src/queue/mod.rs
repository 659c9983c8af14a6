//! Requests on their way to a worker, and tokens on their way back.
//!
//! Requests wait in the store, where any worker can claim them; tokens never touch the store: they go
//! straight from the worker to the edge that holds the client's connection ([`reply`], [`relay`]).

pub mod outlet;
pub mod relay;
pub mod reply;

pub use outlet::{Order, Orders, Outgoing, Outlet};
pub use reply::{ReplyHub, ReplyStream, WorkerLink};
