//! Lightcone: an OpenAI-compatible, multi-tenant, metered chat-completions service.

pub mod admission;
pub mod catalog;
mod child;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod directory;
pub mod domain;
pub mod edge;
pub mod engine;
pub mod fault;
pub mod grammar;
pub mod journal;
pub mod ledger;
pub mod model;
pub mod node;
pub mod operator;
pub mod prompt;
pub mod queue;
pub mod records;
pub mod store;
pub mod telemetry;
pub mod webhooks;
