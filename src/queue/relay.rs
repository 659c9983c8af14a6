//! Tokens between processes: one connection for each pair of edge and worker, whatever streams they share.
//!
//! The worker dials the edge that a job names, both prove that they hold the cluster's secret, and from
//! then on one length-prefixed frame carries the events of all their streams that one engine step made; what the
//! edge answers comes back the same way. Promises that frames, queues and waits are bounded, and that a
//! lost connection is told to both ends: the edge has others go on with the requests that it served, the worker stops
//! them. Never encrypts (the network between nodes is the operator's), never retries an event.

mod dialer;
mod listener;
mod wire;

use std::time::Duration;

pub use dialer::{Dialer, FeedbackSink};
pub use listener::RelayListener;
pub use wire::Secret;

use crate::domain::NodeId;

/// Waits of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Connecting and proving the secret must be done by then.
    pub handshake_max: Duration,
    /// Each side says at least this often that it is alive.
    pub alive: Duration,
    /// A peer that was silent for this long, or did not read for this long, is gone.
    pub silence_max: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            handshake_max: Duration::from_secs(2),
            alive: Duration::from_millis(500),
            silence_max: Duration::from_secs(2),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    #[error("cannot listen for workers on {address}: {source}")]
    Bind { address: std::net::SocketAddr, source: std::io::Error },
    #[error("cannot reach the edge's relay at {address}: {source}")]
    Connect { address: String, source: std::io::Error },
    #[error("relay connection failed: {0}")]
    Io(#[from] std::io::Error),
    #[error("the peer does not hold the same relay secret")]
    WrongSecret,
    #[error("the peer speaks relay version {theirs}, this node {ours}")]
    Version { ours: u16, theirs: u16 },
    #[error("dialled {wanted} but {found} answered; the edge was restarted")]
    WrongNode { wanted: NodeId, found: NodeId },
    #[error("the peer sent a frame that cannot be read: {0}")]
    Malformed(#[from] postcard::Error),
    #[error("the peer closed the connection")]
    Closed,
    #[error("the peer was silent for too long")]
    Silent,
    #[error("an event of {0} bytes does not fit a frame")]
    TooLarge(usize),
    #[error("the peer sent pieces that do not belong together")]
    OutOfOrder,
}

#[cfg(test)]
mod tests;
