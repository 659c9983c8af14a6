//! Model folders as onnxruntime-genai's model builder writes them, the second format beside GGUF.
//!
//! The graph in `model.onnx` is never run. It is read: each of its nodes has to be what a decoder of the Llama
//! family has in that place, and what it holds becomes the sizes, constants and tensors of ours, under GGUF's
//! names. Promises that a node, an input, an attribute or an initializer that nobody reads is an error, that no
//! count, shape or offset is believed before it was held against the file's size, and that no name that stands in a
//! file leads out of the folder.
//!
//! Source: `src/python/py/models` of onnxruntime-genai, whose output this reads; `ContribOperators.md` of
//! ONNX Runtime for what its operators compute.

mod config;
mod data;
mod graph;
mod llama;
mod matrix;
mod proto;
mod rotary;
mod tokenizer;

use std::{collections::BTreeMap, fs::File, io::Read, path::Path, sync::Arc};

use memmap2::Mmap;
use serde::de::DeserializeOwned;

use super::{AffineBlock, BLOCK, ModelError, ModelParams, Vocabulary};
use config::Config;
use data::{Files, file_in};
use graph::Graph;
use matrix::Matrix;

/// The file that makes a folder one of these.
pub const CONFIG_FILE: &str = "genai_config.json";

/// The tensors of an open folder.
pub struct Genai {
    tensors: BTreeMap<String, Matrix>,
    maps: Vec<Arc<Mmap>>,
}

impl Genai {
    pub fn open(folder: &Path) -> Result<(Self, ModelParams, Vocabulary), ModelError> {
        let config = Config::read(folder)?;
        let mut files = Files::of(folder);
        let graph = Graph::open(folder, &config.file, &mut files)?;
        let (params, tensors) = llama::read(&graph, &config)?;
        let vocabulary = tokenizer::read(folder, &config)?;
        Ok((Self { tensors, maps: files.into_maps() }, params, vocabulary))
    }

    /// What the folder says it is, whether or not it can be served.
    pub fn architecture(folder: &Path) -> Result<String, ModelError> {
        Config::read(folder).map(|config| config.architecture)
    }

    pub fn tensor(&self, name: &str) -> Result<&Matrix, ModelError> {
        self.tensors.get(name).ok_or_else(|| ModelError::MissingTensor(name.to_owned()))
    }

    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn dequantize_rows(&self, name: &str, first_row: usize, out: &mut [f32]) -> Result<(), ModelError> {
        let matrix = self.tensor(name)?;
        let rows = out.len() / matrix.columns;
        if !out.len().is_multiple_of(matrix.columns) || first_row + rows > matrix.rows {
            return Err(ModelError::WrongShape {
                name: name.to_owned(),
                found: matrix.info().dims,
                expected: vec![matrix.columns as u64, (first_row + rows) as u64],
            });
        }
        matrix.numbers(first_row, out);
        if out.iter().all(|x| x.is_finite()) { Ok(()) } else { Err(ModelError::NotFinite(name.to_owned())) }
    }

    pub fn affine_row(&self, name: &str, row: usize, out: &mut [AffineBlock]) -> Result<(), ModelError> {
        let matrix = self.tensor(name)?;
        if matrix.columns != out.len() * BLOCK || row >= matrix.rows {
            return Err(ModelError::WrongShape {
                name: name.to_owned(),
                found: matrix.info().dims,
                expected: vec![(out.len() * BLOCK) as u64],
            });
        }
        matrix.affine(row, out);
        let is_finite = |block: &AffineBlock| block.scale.is_finite() && block.offset.is_finite();
        if out.iter().all(is_finite) { Ok(()) } else { Err(ModelError::NotFinite(name.to_owned())) }
    }

    pub fn release_pages(&self) {
        for map in &self.maps {
            // SAFETY: the mapping is read-only and backed by the file, so no data is lost. A failure costs
            // memory and nothing else.
            let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        }
    }
}

fn fault(file: &str, why: impl Into<String>) -> ModelError {
    ModelError::Folder { file: file.to_owned(), why: why.into() }
}

/// A file of the folder, parsed.
fn json<T: DeserializeOwned>(folder: &Path, name: &str, bytes_max: u64) -> Result<T, ModelError> {
    let bytes = bytes(folder, name, bytes_max)?;
    // What is said of it may quote it, at any length.
    serde_json::from_slice(&bytes).map_err(|error| {
        let said: String = error.to_string().chars().take(200).flat_map(char::escape_debug).collect();
        fault(name, format!("it was not understood: {said}"))
    })
}

/// A file that need not be there.
fn text(folder: &Path, name: &str, bytes_max: u64) -> Result<Option<String>, ModelError> {
    if !folder.join(name).exists() {
        return Ok(None);
    }
    let text = String::from_utf8(bytes(folder, name, bytes_max)?).map_err(|_| fault(name, "it is not UTF-8"))?;
    Ok(Some(text))
}

fn bytes(folder: &Path, name: &str, bytes_max: u64) -> Result<Vec<u8>, ModelError> {
    let path = file_in(folder, name)?;
    let mut bytes = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(bytes_max + 1).read_to_end(&mut bytes));
    read.map_err(|source| ModelError::Io { path, source })?;
    if bytes.len() as u64 > bytes_max {
        return Err(fault(name, format!("it has more than {bytes_max} bytes")));
    }
    Ok(bytes)
}
