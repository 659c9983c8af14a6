//! The KV block pool: a fixed number of blocks, lent to sequences and given back by `Drop`.

use std::{cell::RefCell, rc::Rc};

/// Blocks of `block_tokens` tokens each. Lives on the engine's thread.
pub struct BlockPool {
    free: Rc<RefCell<Vec<u32>>>,
    total: usize,
    block_tokens: usize,
}

impl BlockPool {
    pub fn new(total: usize, block_tokens: usize) -> Self {
        // Lowest first, so that a quiet node touches little of the cache's memory.
        Self { free: Rc::new(RefCell::new((0..total as u32).rev().collect())), total, block_tokens }
    }

    pub fn free(&self) -> usize {
        self.free.borrow().len()
    }

    pub fn total(&self) -> usize {
        self.total
    }

    pub fn table(&self) -> BlockTable {
        BlockTable { free: Rc::clone(&self.free), ids: Vec::new(), block_tokens: self.block_tokens }
    }
}

/// The blocks of one sequence, in order of position.
pub struct BlockTable {
    free: Rc<RefCell<Vec<u32>>>,
    ids: Vec<u32>,
    block_tokens: usize,
}

impl BlockTable {
    /// Makes room for `tokens` tokens. Takes nothing when the pool has too few blocks.
    #[must_use]
    pub fn grow_to(&mut self, tokens: usize) -> bool {
        let missing = tokens.div_ceil(self.block_tokens).saturating_sub(self.ids.len());
        let mut free = self.free.borrow_mut();
        if free.len() < missing {
            return false;
        }
        for _ in 0..missing {
            self.ids.extend(free.pop());
        }
        true
    }

    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Gives all blocks back.
    pub fn clear(&mut self) {
        self.free.borrow_mut().extend(self.ids.drain(..).rev());
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_back_when_their_sequence_is_dropped_and_a_growth_that_fails_takes_none() {
        let pool = BlockPool::new(4, 16);
        let mut a = pool.table();
        assert!(a.grow_to(33));
        assert_eq!(pool.free(), 1);
        let mut b = pool.table();
        assert!(!b.grow_to(17));
        assert_eq!(pool.free(), 1);
        drop(a);
        assert!(b.grow_to(64));
        assert_eq!((pool.free(), b.ids().len()), (0, 4));
    }
}
