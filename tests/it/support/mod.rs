//! What the tests stand on: real servers, a house furnished on one of them, the real model.

pub mod house;
pub mod model;
pub mod valkey;
