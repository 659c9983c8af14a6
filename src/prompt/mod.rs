//! What a model reads: chat template and tokeniser. CPU-bound, never does I/O.

mod tokenizer;

pub use tokenizer::{Tokenizer, TokenizerError};
