//! The worker's own record of what it owes the ledger: one file per process, locked while the process lives.
//!
//! Promises that what a call has written survives the death of the process (`kill -9` included) once the call has
//! returned, and the loss of power once [`Journal::ended`] has; that a file that is torn or damaged never yields a
//! record that was not written; and that two processes never hold the same file. Fails closed: a journal that could
//! not write once writes nothing more and says so by [`Journal::fault`]. Never talks to the ledger, and never decides
//! who pays: whoever takes over the file of a dead process ([`Journal::take_over`]) does.
//!
//! A file is a header and frames; it grows at its end only, until what is unfinished is copied to a new one that takes
//! its place. A request is in it from [`Journal::begin`] to [`Journal::closed`].

mod book;
mod file;
mod frame;
mod keeper;
mod orphan;
mod writer;

#[cfg(test)]
mod tests;

use std::{io, path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};

pub use frame::Damage;
pub use orphan::Orphan;
pub use writer::Journal;

use crate::domain::{KeyId, ModelId, NodeId, Price, RequestId, TenantId, Usage};

/// A request as it was when the worker took it in, with the terms that it is settled by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    pub request: RequestId,
    pub tenant: TenantId,
    pub key: KeyId,
    pub model: ModelId,
    pub price: Price,
    pub price_version: String,
    pub prompt_tokens: u32,
    /// Of the claim; with `owner` the fence that an acknowledgement must show.
    pub attempt: u32,
    pub owner: NodeId,
}

/// A settlement that the ledger is about to be told of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    pub request: RequestId,
    pub usage: Usage,
    pub reason: String,
    /// Of the answer, where one is kept.
    pub digest: Option<[u8; 32]>,
    pub unix_ms: u64,
}

/// A request that a dead process began and did not close.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsettled {
    pub begun: Begun,
    /// Decoded, in all choices together, as far as the journal knows.
    pub completion_tokens: u32,
    /// The settlement that the ledger may or may not have heard of.
    pub ended: Option<Ended>,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum JournalError {
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: Arc<io::Error> },
    #[error("another process holds {}", .0.display())]
    Held(PathBuf),
    #[error("{} was left by a process that is gone and must be taken over first", .0.display())]
    LeftOver(PathBuf),
    #[error("{} is damaged at byte {offset}: {damage}", path.display())]
    Damaged { path: PathBuf, offset: u64, damage: Damage },
    #[error("{} is of version {version} of the journal, which this program does not know", path.display())]
    UnknownVersion { path: PathBuf, version: u32 },
    /// Of this one record; the journal is as good as before.
    #[error("a record of {bytes} bytes is too long for the journal")]
    TooLong { bytes: usize },
    #[error("{} still has {requests} unfinished requests", path.display())]
    Unfinished { path: PathBuf, requests: usize },
    #[error("the thread that writes {} to the disk has ended", .0.display())]
    Stopped(PathBuf),
}

/// How an operation on a file failed.
fn failed(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.into();
    move |source| JournalError::Io { doing, path, source: Arc::new(source) }
}
