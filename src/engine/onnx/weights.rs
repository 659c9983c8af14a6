//! The tensors of a model file, as our graphs take them.

use std::sync::{Arc, Weak};

use ort::value::{DynValue, Tensor};
use parking_lot::Mutex;

use super::{
    EngineError, huge_pages,
    linear::{CACHE_LINE, Layout},
    operators::layer_norms,
};
use crate::model::{ModelError, ModelFile};

/// Everything that the served graph is given beside the step's rows.
pub struct Weights {
    /// Where each matrix stands in the tensor [`MATRICES`], in the order of the graph.
    pub matrices: Vec<PackedMatrix>,
    /// Of that tensor.
    pub matrices_bytes: usize,
    pub tensors: Vec<(String, Arc<DynValue>)>,
}

pub struct PackedMatrix {
    pub layout: Layout,
    from: usize,
}

impl PackedMatrix {
    /// Its part of all matrices' bytes.
    pub fn of<'a>(&self, all: &'a [u8]) -> &'a [u8] {
        &all[self.from..][..self.layout.bytes]
    }
}

/// The tensor with the bytes of all matrices. One, because memory that lies together can be mapped in huge
/// pages; in small ones a step of few rows spends a tenth of its time on looking pages up.
pub const MATRICES: &str = "matrices";

/// What engines have packed and still use: two that serve the same file have one copy.
#[derive(Default)]
pub struct Pack {
    packed: Mutex<Vec<(Weak<ModelFile>, Weak<Weights>)>>,
}

impl Pack {
    /// The file's weights, packed now where no engine has them yet.
    pub fn weights(&self, file: &Arc<ModelFile>) -> Result<Arc<Weights>, EngineError> {
        // Kept locked, so that the second engine waits for the first one's copy.
        let mut packed = self.packed.lock();
        packed.retain(|(_, weights)| weights.strong_count() > 0);
        let found = packed.iter().find(|(of, _)| std::ptr::eq(of.as_ptr(), Arc::as_ptr(file)));
        if let Some(weights) = found.and_then(|(_, weights)| weights.upgrade()) {
            return Ok(weights);
        }
        let weights = Arc::new(Weights::of(file)?);
        packed.push((Arc::downgrade(file), Arc::downgrade(&weights)));
        Ok(weights)
    }
}

impl Weights {
    fn of(file: &ModelFile) -> Result<Self, EngineError> {
        let (matrices, bytes) = pack(file)?;
        let matrices_bytes = bytes.len();
        let mut tensors =
            vec![(MATRICES.to_owned(), Arc::new(Tensor::from_array(([matrices_bytes], bytes))?.into_dyn()))];
        for (name, norm) in norms(file)? {
            tensors.push((name, Arc::new(Tensor::from_array(([norm.len()], norm))?.into_dyn())));
        }
        Ok(Self { matrices, matrices_bytes, tensors })
    }
}

/// Bits of a code of the head. It is the largest matrix, and stands after everything that could make a rounding
/// error grow; `docs/PERFORMANCE.md` has what the last bit costs and gives.
pub const HEAD_BITS_MAX: u32 = 7;

/// Tensors that make one matrix together.
struct Source {
    inputs: usize,
    bits_max: u32,
    parts: Vec<(String, usize)>,
}

/// All matrices of the model, in the order of the graph.
fn sources(file: &ModelFile) -> Vec<Source> {
    let p = &file.params;
    let mut sources = Vec::new();
    for layer in 0..p.layers {
        let mut add = |inputs: usize, parts: &[(&str, usize)]| {
            let parts = parts.iter().map(|(part, outputs)| (format!("blk.{layer}.{part}.weight"), *outputs)).collect();
            sources.push(Source { inputs, bits_max: 8, parts });
        };
        add(p.width, &[("attn_q", p.query_width()), ("attn_k", p.kv_width()), ("attn_v", p.kv_width())]);
        add(p.query_width(), &[("attn_output", p.width)]);
        add(p.width, &[("ffn_gate", p.ffn_width), ("ffn_up", p.ffn_width)]);
        add(p.ffn_width, &[("ffn_down", p.width)]);
    }
    sources.push(Source {
        inputs: p.width,
        bits_max: HEAD_BITS_MAX,
        parts: vec![(head_tensor(file).to_owned(), p.vocabulary)],
    });
    sources
}

/// Packs all matrices, on all processors.
fn pack(file: &ModelFile) -> Result<(Vec<PackedMatrix>, Vec<u8>), ModelError> {
    let sources = sources(file);
    let parts: Vec<Vec<(&str, usize)>> =
        sources.iter().map(|s| s.parts.iter().map(|(name, outputs)| (name.as_str(), *outputs)).collect()).collect();
    let mut matrices = Vec::new();
    let mut end = 0;
    for (source, parts) in sources.iter().zip(&parts) {
        let layout = Layout::new(&file.tensors, parts, source.inputs, source.bits_max)?;
        matrices.push(PackedMatrix { from: end, layout });
        end += matrices[matrices.len() - 1].layout.bytes;
    }
    let mut bytes = vec![0u8; end + CACHE_LINE];
    huge_pages::prefer(&mut bytes);
    let start = bytes.as_ptr().align_offset(CACHE_LINE) % CACHE_LINE;
    matrices.iter_mut().for_each(|matrix| matrix.from += start);
    let mut jobs = Vec::new();
    let mut rest = &mut bytes[start..];
    for (matrix, parts) in matrices.iter().zip(&parts) {
        let (own, others) = rest.split_at_mut(matrix.layout.bytes);
        jobs.push((&matrix.layout, parts, own));
        rest = others;
    }
    // From the end: the head is the largest.
    let (jobs, failed) = (Mutex::new(jobs), Mutex::new(None));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let next = || jobs.lock().pop();
                while let Some((layout, parts, bytes)) = next() {
                    if let Err(error) = layout.pack(&file.tensors, parts, bytes) {
                        *failed.lock() = Some(error);
                    }
                }
            });
        }
    });
    match failed.into_inner() {
        Some(error) => Err(error),
        None => Ok((matrices, bytes)),
    }
}

/// All norms of the model, by the names that the graph has for them.
fn norms(file: &ModelFile) -> Result<Vec<(String, Vec<f32>)>, ModelError> {
    let p = &file.params;
    let mut norms = vec![("head.norm".to_owned(), norm(file, "output_norm.weight", p.width)?)];
    for layer in 0..p.layers {
        for (part, width) in layer_norms(p) {
            norms.push((format!("l{layer}.{part}"), norm(file, &format!("blk.{layer}.{part}.weight"), width)?));
        }
    }
    Ok(norms)
}

/// Name of the tensor with the output matrix: its own, or the embedding where the model ties them.
pub fn head_tensor(file: &ModelFile) -> &'static str {
    if file.tensors.has_tensor("output.weight") { "output.weight" } else { "token_embd.weight" }
}

/// A matrix as numbers, `[outputs, inputs]`, row-major.
pub fn dense(file: &ModelFile, name: &str, inputs: usize, outputs: usize) -> Result<Vec<f32>, ModelError> {
    let found = &file.tensors.tensor(name)?.dims;
    let expected = [inputs as u64, outputs as u64];
    if *found != expected {
        return Err(ModelError::WrongShape { name: name.into(), found: found.clone(), expected: expected.into() });
    }
    file.tensors.dequantize(name)
}

/// The weights of a norm over `width` numbers.
pub fn norm(file: &ModelFile, name: &str, width: usize) -> Result<Vec<f32>, ModelError> {
    let found = &file.tensors.tensor(name)?.dims;
    if *found != [width as u64] {
        return Err(ModelError::WrongShape { name: name.into(), found: found.clone(), expected: vec![width as u64] });
    }
    file.tensors.dequantize(name)
}
