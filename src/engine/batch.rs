//! What one step computes, and the seam between scheduling and tensors.

use super::EngineError;

/// The rows of one step, packed: each sequence brings the tokens that it has not computed yet, or a chunk
/// of them.
#[derive(Default)]
pub struct Batch<'a> {
    pub sequences: Vec<BatchSequence<'a>>,
}

pub struct BatchSequence<'a> {
    /// Prompt and output so far; after them, where a step verifies drafts, the drafts.
    pub tokens: &'a [u32],
    pub prompt_tokens: usize,
    /// Tokens whose keys and values already stand in the KV blocks.
    pub computed: usize,
    /// Tokens to compute in this step, from `computed` on; at least 1.
    pub rows: usize,
    /// Of how many of the last of these rows logits are wanted: none where the step does not reach the end
    /// of the tokens, one where it does, and one more for each draft. At most `rows`.
    pub logits_rows: usize,
    /// KV blocks in order of position, enough for `computed + rows` tokens. Several sequences may bring the
    /// same block, but only such as lie wholly before `computed`: nobody writes what another reads.
    pub blocks: &'a [u32],
}

impl Batch<'_> {
    pub fn rows(&self) -> usize {
        self.sequences.iter().map(|s| s.rows).sum()
    }
}

/// The tensors of a model.
pub trait Forward {
    fn vocabulary(&self) -> usize;

    /// Computes the batch, writes its keys and values into the KV blocks and returns the logits
    /// (`[wanted rows, vocabulary]`, row-major) of the last [`logits_rows`](BatchSequence::logits_rows) rows
    /// of each sequence, in the batch's order. Valid until the next call.
    fn forward(&mut self, batch: &Batch) -> Result<&[f32], EngineError>;
}
