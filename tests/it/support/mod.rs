//! What the tests stand on: real servers, and a house furnished on one of them.

pub mod front;
pub mod house;
pub mod valkey;
