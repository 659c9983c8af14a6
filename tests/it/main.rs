//! Everything tested together: real ONNX Runtime, real model, real store, one binary.

mod support;

mod billing;
mod cluster_node;
mod cluster_split;
mod edge_chat;
mod edge_headers;
mod edge_keeping;
mod edge_prompt;
mod edge_refusals;
mod engine;
mod engine_schedule;
mod fuzz;
mod gemma;
mod genai;
mod genai_hostile;
mod gguf_hostile;
mod grammar;
mod joined;
mod models;
mod money_crowd;
mod money_kill;
mod openapi;
mod store_accounts;
mod store_model;
mod store_money;
mod store_outage;
mod store_queue;
mod store_rates;
mod store_records;
mod store_verify;
mod tidy;
