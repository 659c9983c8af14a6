//! Everything tested together: a real store, a real model, real ONNX Runtime; one binary.

mod support;

mod cluster_node;
mod cluster_split;
mod edge_chat;
mod edge_refusals;

mod engine;

mod store_accounts;
mod store_money;
mod store_outage;
mod store_queue;
mod store_verify;
