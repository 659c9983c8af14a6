//! The tensors of a model by one set of names, whatever file they lie in.
//!
//! The names are those of GGUF (`blk.0.attn_q.weight`, …), and so is the order of dimensions: innermost first.

use super::{AffineBlock, Gguf, ModelError, genai::Genai};

pub enum Tensors {
    Gguf(Gguf),
    Genai(Genai),
}

/// What is known of a tensor before its numbers are read.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Innermost first: `[columns, rows]`.
    pub dims: Vec<u64>,
    /// How its numbers are stored, in the words of its format.
    pub format: String,
    /// What it takes in the file.
    pub bytes: u64,
    affine_bits: u32,
}

impl TensorInfo {
    pub(super) fn new(dims: Vec<u64>, format: String, bytes: u64, affine_bits: u32) -> Self {
        Self { dims, format, bytes, affine_bits }
    }

    /// Bits of a code in this tensor's [`AffineBlock`]s.
    pub fn affine_bits(&self) -> u32 {
        self.affine_bits
    }
}

impl Tensors {
    pub fn tensor(&self, name: &str) -> Result<TensorInfo, ModelError> {
        match self {
            Self::Gguf(gguf) => gguf.tensor(name).map(|tensor| tensor.info()),
            Self::Genai(genai) => genai.tensor(name).map(|tensor| tensor.info()),
        }
    }

    pub fn tensor_names(&self) -> Vec<&str> {
        match self {
            Self::Gguf(gguf) => gguf.tensor_names().collect(),
            Self::Genai(genai) => genai.tensor_names().collect(),
        }
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        self.tensor(name).is_ok()
    }

    /// Writes rows `first_row..` of a tensor into `out` (`rows * columns` numbers, row-major).
    ///
    /// # Errors
    /// The tensor is missing, `out` is not a whole number of its rows, or a value is not finite.
    pub fn dequantize_rows(&self, name: &str, first_row: usize, out: &mut [f32]) -> Result<(), ModelError> {
        match self {
            Self::Gguf(gguf) => gguf.dequantize_rows(name, first_row, out),
            Self::Genai(genai) => genai.dequantize_rows(name, first_row, out),
        }
    }

    /// A whole tensor, row-major.
    pub fn dequantize(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let numbers = self.tensor(name)?.dims.iter().product::<u64>() as usize;
        let mut out = vec![0.0; numbers];
        self.dequantize_rows(name, 0, &mut out)?;
        Ok(out)
    }

    /// The row `row` of a matrix in blocks, written to `out` (`columns / 32` of them).
    ///
    /// # Errors
    /// The row is no whole number of blocks, or has a value that is not a finite number of half precision.
    pub fn affine_row(&self, name: &str, row: usize, out: &mut [AffineBlock]) -> Result<(), ModelError> {
        match self {
            Self::Gguf(gguf) => gguf.affine_row(name, row, out),
            Self::Genai(genai) => genai.affine_row(name, row, out),
        }
    }

    /// Drops the file's pages from this process's memory; a later access reads them from the file again.
    pub fn release_pages(&self) {
        match self {
            Self::Gguf(gguf) => gguf.release_pages(),
            Self::Genai(genai) => genai.release_pages(),
        }
    }
}
