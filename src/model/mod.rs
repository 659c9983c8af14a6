//! Model files: what stands in a GGUF file, read without trusting it.
//!
//! Never builds a graph and never tokenises; `engine` and `prompt` do that from what is read here.

mod affine;
mod dequantize;
mod file;
mod gguf;
mod hparams;
mod vocabulary;

pub use affine::{AffineBlock, BLOCK};
pub use file::ModelFile;
pub use gguf::{Gguf, GgufError, TensorInfo, TensorType};
pub use hparams::{Activation, LlamaParams, ModelParams, RopePairs, SlidingWindow};
pub use vocabulary::{SPACE, Scheme, TokenKind, Vocabulary};
