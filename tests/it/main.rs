//! Everything tested together, against a real store.

mod support;

mod store_accounts;
mod store_money;
mod store_outage;
mod store_queue;
mod store_verify;
mod tidy;
