//! Model files: what stands in a GGUF file or in a folder of onnxruntime-genai, read without trusting it.
//!
//! Never builds a graph and never tokenises; `engine` and `prompt` do that from what is read here.

mod affine;
mod dequantize;
mod error;
mod file;
mod genai;
mod gguf;
mod hparams;
mod tensors;
mod vocabulary;

pub use affine::{AffineBlock, BLOCK};
pub use error::ModelError;
pub use file::ModelFile;
pub use genai::{CONFIG_FILE, Genai};
pub use gguf::{Gguf, GgufTensor, TensorType};
pub use hparams::{Activation, ModelParams, RopePairs, SlidingWindow};
pub use tensors::{TensorInfo, Tensors};
pub use vocabulary::{LLAMA_BPE_PATTERN, SPACE, Scheme, TokenKind, Vocabulary, byte_level};
