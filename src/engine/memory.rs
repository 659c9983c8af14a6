//! What a model takes of memory once it serves, reckoned from its file before anything is loaded.

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
        let numbers = tensor.dims.iter().product::<u64>();
        // Half a byte or a whole one a number, and for each 32 of them a scale and an offset in half precision.
        let packed = if tensor.affine_bits() > 4 { numbers } else { numbers / 2 } + numbers / 8;
        let stored = tensor.bytes;
        match name {
            "token_embd.weight" if head_is_tied => stored + packed,
            "token_embd.weight" => stored,
            _ => packed,
        }
    });
    bytes.sum()
}
