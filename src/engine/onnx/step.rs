//! Where the rows of the step that is running stand: what our operators need beside tensors.

use super::Batch;
use crate::engine::EngineError;

/// Rows of one sequence that attention computes together.
pub const TILE_ROWS_MAX: usize = 8;

#[derive(Default)]
pub struct Step {
    /// For each packed row: its sequence and its position in it.
    pub rows: Vec<RowPlace>,
    /// KV blocks of all sequences, one after the other.
    pub blocks: Vec<u32>,
    pub sequences: Vec<SequencePlace>,
    /// Work items of attention: consecutive rows of one sequence.
    pub tiles: Vec<Tile>,
    /// Packed rows whose logits are wanted.
    pub sampled: Vec<u32>,
    /// The work items with only these rows.
    pub sampled_tiles: Vec<Tile>,
}

#[derive(Clone, Copy)]
pub struct RowPlace {
    pub sequence: u32,
    pub position: u32,
}

#[derive(Clone, Copy)]
pub struct SequencePlace {
    /// Its part of `Step::blocks`.
    pub blocks_from: usize,
    pub blocks_len: usize,
}

#[derive(Clone, Copy)]
pub struct Tile {
    pub first_row: usize,
    pub rows: usize,
    /// Where the result of the first row goes.
    pub to: usize,
}

impl Step {
    /// # Errors
    /// A sequence has too few blocks or tokens for its rows, or no rows: the scheduler broke its contract.
    pub fn set(&mut self, batch: &Batch, block_tokens: usize) -> Result<(), EngineError> {
        self.rows.clear();
        self.blocks.clear();
        self.sequences.clear();
        self.tiles.clear();
        self.sampled.clear();
        self.sampled_tiles.clear();
        for (index, sequence) in batch.sequences.iter().enumerate() {
            let end = sequence.computed + sequence.rows;
            if sequence.rows == 0 || end > sequence.tokens.len() || end > sequence.blocks.len() * block_tokens {
                return Err(EngineError::Limits("a sequence was scheduled without tokens or KV blocks".into()));
            }
            if sequence.logits_rows > sequence.rows {
                return Err(EngineError::Limits("logits are wanted of rows that are not computed".into()));
            }
            let first_row = self.rows.len();
            let place = |position| RowPlace { sequence: index as u32, position: position as u32 };
            self.rows.extend((sequence.computed..end).map(place));
            cut(sequence.rows, first_row, first_row, &mut self.tiles);
            let first_sampled = self.rows.len() - sequence.logits_rows;
            cut(sequence.logits_rows, first_sampled, self.sampled.len(), &mut self.sampled_tiles);
            self.sequences.push(SequencePlace { blocks_from: self.blocks.len(), blocks_len: sequence.blocks.len() });
            self.blocks.extend_from_slice(sequence.blocks);
            self.sampled.extend((first_sampled..self.rows.len()).map(|row| row as u32));
        }
        Ok(())
    }

    pub fn blocks_of(&self, sequence: u32) -> &[u32] {
        let place = &self.sequences[sequence as usize];
        &self.blocks[place.blocks_from..][..place.blocks_len]
    }
}

/// Cuts rows that follow each other into tiles.
fn cut(rows: usize, first_row: usize, to: usize, tiles: &mut Vec<Tile>) {
    for from in (0..rows).step_by(TILE_ROWS_MAX) {
        tiles.push(Tile { first_row: first_row + from, rows: TILE_ROWS_MAX.min(rows - from), to: to + from });
    }
}
