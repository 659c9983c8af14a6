//! Everything tested together: a real store, real ONNX Runtime, the real model, one binary.

mod support;

mod engine;
mod store_accounts;
mod store_money;
mod store_outage;
mod store_queue;
mod store_verify;
mod tidy;
