//! What one step computes, and the seam between scheduling and tensors.

use super::EngineError;

/// The rows of one step, packed: each sequence brings the tokens that it has not computed yet, or a chunk
/// of them.
#[derive(Default)]
pub struct Batch<'a> {
    pub sequences: Vec<BatchSequence<'a>>,
}

pub struct BatchSequence<'a> {
    /// Prompt and output so far.
    pub tokens: &'a [u32],
    pub prompt_tokens: usize,
    /// Tokens whose keys and values already stand in the KV blocks.
    pub computed: usize,
    /// Tokens to compute in this step, from `computed` on; at least 1.
    pub rows: usize,
    /// KV blocks in order of position, enough for `computed + rows` tokens.
    pub blocks: &'a [u32],
}

impl BatchSequence<'_> {
    /// Whether the step reaches the sequence's last token, so that the next one can be sampled.
    pub fn is_sampled(&self) -> bool {
        self.computed + self.rows == self.tokens.len()
    }
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
    /// (`[sampled sequences, vocabulary]`, row-major) of the last row of each sequence that
    /// [is sampled](BatchSequence::is_sampled), in the batch's order. Valid until the next call.
    fn forward(&mut self, batch: &Batch) -> Result<&[f32], EngineError>;
}
