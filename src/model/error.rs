//! Why a model file is refused: one error for all formats, because callers do the same with each.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("cannot read model file {path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("not a GGUF file (it does not begin with GGUF)")]
    NotGguf,
    #[error("GGUF version {0} is not supported (2 and 3 are)")]
    Version(u32),
    #[error("file is truncated or corrupted: {what} at byte {at} does not fit the file's {size} bytes")]
    Truncated { what: &'static str, at: u64, size: u64 },
    #[error("file is corrupted: {0}")]
    Corrupted(String),
    #[error("architecture `{0}` is not supported (llama and gemma3 are)")]
    Architecture(String),
    #[error("key `{0}` is missing")]
    MissingKey(String),
    #[error("key `{key}` is not {expected}")]
    WrongType { key: String, expected: &'static str },
    #[error("tensor `{0}` is missing")]
    MissingTensor(String),
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    WrongShape { name: String, found: Vec<u64>, expected: Vec<u64> },
    #[error("tensor `{name}` has type {code}, which is not supported")]
    UnsupportedType { name: String, code: u32 },
    #[error("tensor `{0}` holds a value that is not a finite number")]
    NotFinite(String),
    #[error("{file}: {why}")]
    Folder { file: String, why: String },
}
