//! The KV cache of one model: pages of half-precision keys and values, one page a (layer, block, KV head).
//!
//! A page holds the keys transposed, `[head_size, block_tokens]`, so that one load brings the same channel
//! of many tokens and scores need no horizontal sums, then the values, `[block_tokens, head_size]`.

use half::f16;
use memmap2::MmapMut;

use super::{EngineError, huge_pages, rows};
use crate::model::ModelParams;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvShape {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    pub block_tokens: usize,
    pub blocks: usize,
}

impl KvShape {
    pub fn new(params: &ModelParams, block_tokens: usize, blocks: usize) -> Self {
        Self { layers: params.layers, kv_heads: params.kv_heads, head_size: params.head_size, block_tokens, blocks }
    }

    /// Numbers in one page.
    pub fn page(&self) -> usize {
        2 * self.head_size * self.block_tokens
    }

    /// Bytes of one block over all layers and heads.
    pub fn block_bytes(&self) -> usize {
        self.layers * self.kv_heads * self.page() * size_of::<f16>()
    }
}

pub struct KvCache {
    pub shape: KvShape,
    memory: MmapMut,
}

// SAFETY: the memory is plain numbers. Who writes what when is the contract of `page_mut`.
unsafe impl Sync for KvCache {}

impl KvCache {
    /// Reserves the memory; the system commits it as blocks are first used.
    pub fn new(shape: KvShape) -> Result<Self, EngineError> {
        let bytes = shape.block_bytes() * shape.blocks;
        let mut memory = MmapMut::map_anon(bytes)
            .map_err(|e| EngineError::Limits(format!("cannot reserve {bytes} bytes for KV blocks: {e}")))?;
        huge_pages::prefer(&mut memory);
        Ok(Self { shape, memory })
    }

    /// The page's first number.
    pub fn page(&self, layer: usize, block: u32, kv_head: usize) -> *const f16 {
        let s = &self.shape;
        let at = ((block as usize * s.layers + layer) * s.kv_heads + kv_head) * s.page();
        assert!((block as usize) < s.blocks && layer < s.layers && kv_head < s.kv_heads);
        // SAFETY: the three indices are within the shape, so `at` is within the mapping.
        unsafe { self.memory.as_ptr().cast::<f16>().add(at) }
    }

    /// Writes the key and the value of one token.
    ///
    /// # Safety
    /// Nobody else reads or writes the same (layer, block, head, slot) meanwhile. The scheduler gives each
    /// block that is written to one sequence, and a step writes each position once, before any row reads it.
    pub unsafe fn write(&self, layer: usize, block: u32, kv_head: usize, slot: usize, key: &[f32], value: &[f32]) {
        let s = &self.shape;
        assert!(slot < s.block_tokens && key.len() == s.head_size && value.len() == s.head_size);
        let page = self.page(layer, block, kv_head).cast_mut();
        // SAFETY: the page has `2 * head_size * block_tokens` numbers, and the caller owns these.
        unsafe {
            let mut halves = [f16::ZERO; 32];
            for (i, key) in key.chunks(halves.len()).enumerate() {
                rows::to_halves(key, &mut halves[..key.len()]);
                for (d, x) in halves[..key.len()].iter().enumerate() {
                    page.add((i * halves.len() + d) * s.block_tokens + slot).write(*x);
                }
            }
            let values = page.add(s.head_size * s.block_tokens + slot * s.head_size);
            rows::to_halves(value, std::slice::from_raw_parts_mut(values, s.head_size));
        }
    }
}
