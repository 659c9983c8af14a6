//! What the people on call see: metrics, logs.
//!
//! Every metric name stands in [`metrics`] and nowhere else. Logs go to the standard error, so that the
//! standard output belongs to what a command was asked to print.

pub mod log;
pub mod metrics;

pub use log::{LogError, LogStyle};
pub use metrics::Metrics;
