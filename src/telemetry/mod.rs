//! What the people on call see: metrics, logs.
//!
//! Every metric name stands in [`metrics`] and nowhere else.

pub mod metrics;

pub use metrics::Metrics;
