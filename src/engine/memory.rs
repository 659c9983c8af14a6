//! What a model takes of memory once it serves, reckoned from its file before anything is loaded.

use super::onnx::{HEAD_BITS_MAX, packed_bytes};
use crate::model::ModelFile;

/// A session and its thread, beside what grows with the model; measured, and rounded up.
const ENGINE_BYTES: u64 = 96 << 20;

/// In bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryNeed {
    pub weights: u64,
    /// All KV blocks; the system commits them as they are first used.
    pub kv: u64,
    /// Activations of the largest step, its logits, and tables of the context's length.
    pub work: u64,
}

impl MemoryNeed {
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.kv).saturating_add(self.work)
    }

    pub fn of(file: &ModelFile, context_tokens: usize, sequences: usize, step_tokens: usize, kv_bytes: usize) -> Self {
        let p = &file.params;
        // Of each row: the stream, Q, K and V with their products, gate and up with theirs, and what a node keeps
        // while the next one writes.
        let row = 4 * (6 * p.width + 3 * (p.heads * p.head_size + 2 * p.kv_width()) + 6 * p.ffn_width);
        // In the tensor, and as the sampler sorts them.
        let logits = 2 * 4 * sequences * p.vocabulary;
        let angles = 4 * context_tokens * p.head_size;
        let work = (row * step_tokens + logits + angles) as u64 + ENGINE_BYTES;
        Self { weights: weight_bytes(file), kv: kv_bytes as u64, work }
    }
}

/// What the matrices take when they are packed, and the embeddings, which are read where they lie in the file.
fn weight_bytes(file: &ModelFile) -> u64 {
    let head_is_tied = !file.tensors.has_tensor("output.weight");
    let tensors = file.tensors.tensor_names().into_iter();
    let bytes = tensors.filter_map(|name| Some((name, file.tensors.tensor(name).ok()?))).map(|(name, tensor)| {
        let packed = |bits_max| packed_bytes(tensor.dims.iter().product(), tensor.affine_bits().min(bits_max));
        match name {
            "token_embd.weight" if head_is_tied => tensor.bytes + packed(HEAD_BITS_MAX),
            "token_embd.weight" => tensor.bytes,
            "output.weight" => packed(HEAD_BITS_MAX),
            _ => packed(8),
        }
    });
    bytes.sum()
}
