//! Everything tested together, against a real store.

mod support;

mod edge_chat;
mod edge_refusals;

mod store_accounts;
mod store_money;
mod store_outage;
mod store_queue;
mod store_verify;
