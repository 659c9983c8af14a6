//! Integration tests: real ONNX Runtime, real model, real store, one binary.

mod engine;
mod support;
