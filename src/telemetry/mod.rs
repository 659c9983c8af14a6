//! What the people on call see: metrics, logs.
//!
//! Every metric name stands in [`metrics`] and nowhere else. Logs go to the standard error, so that the
//! standard output belongs to what a command was asked to print.

pub mod log;
pub mod metrics;

pub use log::{LogError, LogStyle};
pub use metrics::Metrics;

/// This machine's clock, for what people read. Leases and deadlines go by the store's.
pub fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
