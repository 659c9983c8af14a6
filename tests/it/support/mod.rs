//! What the tests stand on: real servers, the real model, and a house furnished on them.

pub mod engine;
pub mod front;
pub mod genai;
pub mod gguf;
pub mod heap;
pub mod house;
pub mod hub;
pub mod model;
pub mod past;
pub mod process;
pub mod requests;
pub mod valkey;
