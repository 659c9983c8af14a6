//! The only room that speaks to Redis (or Valkey): connections, every key name, every function.
//!
//! Promises that a command either answers within its time limit or fails with a [`StoreError`], that the
//! functions in `functions/*.lua` are present on whichever server answers, and that [`Store::connected_for`]
//! tells how long the server has been reachable without a gap. Never repeats a command whose outcome is
//! unknown, never answers from memory, and never turns an unreadable value into a default.

mod clock;
mod connection;
pub mod embedded;
mod functions;
pub mod keys;
mod layout;
mod reply;
mod subscription;

pub(crate) use clock::ClockWatch;
pub use connection::Store;
pub(crate) use functions::Function;
pub(crate) use reply::Reply;
pub(crate) use subscription::Messages;
pub use subscription::Subscription;

/// Why the store gave no usable answer. Every one of them refuses the request at hand: nothing fails open.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    #[error("`{url}` is not a store address such as redis://host:6379/0 or unix:///path: {source}")]
    Address {
        url: String,
        #[source]
        source: redis::RedisError,
    },
    #[error("cannot connect to the store at {url}: {source}")]
    Connect {
        url: String,
        #[source]
        source: Box<StoreError>,
    },
    /// Not reachable, or no answer in time. Whether the command took effect is unknown.
    #[error("the store is not reachable: {0}")]
    Unreachable(#[source] redis::RedisError),
    #[error("the store did not answer within {0} ms")]
    TimedOut(u128),
    /// Reachable, but it would not run the command: out of memory, read-only, loading, no permission.
    #[error("the store refused the command: {0}")]
    Refused(#[source] redis::RedisError),
    /// Made by another version, which is to be asked for what is in it.
    #[error(
        "the store's data have layout {found}, and this version knows {known} only; take an empty store or data folder"
    )]
    Layout { found: String, known: &'static str },
    /// What is stored contradicts itself or cannot be read. Needs a person.
    #[error("stored data is damaged: {0}")]
    Damaged(String),
}

impl StoreError {
    /// Whether trying again later may help without anybody's doing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect { source, .. } => source.is_transient(),
            Self::Unreachable(_) | Self::TimedOut(_) | Self::Refused(_) => true,
            Self::Address { .. } | Self::Layout { .. } | Self::Damaged(_) => false,
        }
    }
}
