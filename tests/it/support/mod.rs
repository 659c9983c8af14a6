//! What the tests stand on: real servers, the real model, and a house furnished on them.

pub mod aging;
pub mod calendar;
pub mod changes;
pub mod engine;
pub mod front;
pub mod genai;
pub mod gguf;
pub mod heap;
pub mod house;
pub mod hub;
pub mod ledger_state;
pub mod model;
pub mod old;
pub mod past;
pub mod process;
pub mod receiver;
pub mod requests;
pub mod steps;
pub mod twin;
pub mod valkey;
