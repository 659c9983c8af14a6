//! Attention of a few queries of one sequence over its KV pages.
//!
//! The keys are read in groups of [`GROUP`] positions, counted from the sequence's first token, and the
//! softmax is carried from group to group. So each query's result comes out of the same operations in the
//! same order, whichever queries share its tile and however the sequence was cut into chunks.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::sync::LazyLock;

use half::f16;

use super::kv::{KvCache, KvShape};
use crate::engine::simd::HAS_AVX2;

/// Tokens between two updates of the running softmax; a multiple of every KV block's size below it.
const GROUP: usize = 64;
/// Keys that one pass of the score kernel covers: two vectors of eight.
const LANES: usize = 16;

/// Where the keys and values stand.
#[derive(Clone, Copy)]
pub struct Pages<'a> {
    pub cache: &'a KvCache,
    pub blocks: &'a [u32],
    pub layer: usize,
    pub kv_head: usize,
}

impl Pages<'_> {
    /// Keys of the `LANES` tokens from `token` on: their first channel; the next is `block_tokens` further.
    fn keys(&self, token: usize) -> *const f16 {
        let shape = &self.cache.shape;
        let page = self.cache.page(self.layer, self.blocks[token / shape.block_tokens], self.kv_head);
        // SAFETY: a slot within the page's first key row.
        unsafe { page.add(token % shape.block_tokens) }
    }

    /// Value of one token.
    fn value(&self, token: usize) -> *const f16 {
        let shape = &self.cache.shape;
        let page = self.cache.page(self.layer, self.blocks[token / shape.block_tokens], self.kv_head);
        // SAFETY: a slot within the page's values.
        unsafe { page.add(shape.head_size * shape.block_tokens + token % shape.block_tokens * shape.head_size) }
    }
}

/// The tokens that a query sees: one at least.
#[derive(Clone, Copy, Debug, Default)]
pub struct Span {
    pub from: usize,
    pub to: usize,
}

/// The loop over groups of keys, compiled for one instruction set. Its module has `scores`, `soften` and `values`.
#[cfg(target_arch = "x86_64")]
macro_rules! attend_in_groups {
    ($features:literal) => {
        /// # Safety
        /// The features are there. Head and block sizes are multiples of `LANES`. `queries` and `out` have
        /// `Q` rows, `visible` has `Q` spans, and the blocks cover the last of them.
        #[target_feature(enable = $features)]
        pub unsafe fn attend<const Q: usize>(pages: Pages, queries: &[f32], visible: &[Span], out: &mut [f32]) {
            let size = pages.cache.shape.head_size;
            assert!(queries.len() == Q * size && out.len() == Q * size && visible.len() == Q);
            let first = visible.iter().map(|span| span.from).min().unwrap_or(0) / GROUP * GROUP;
            let last = visible.iter().map(|span| span.to).max().unwrap_or(0);
            let mut largest = [f32::NEG_INFINITY; Q];
            let mut total = [0f32; Q];
            let mut weights = Weights::<Q>([[0.0; GROUP]; Q]);
            out.fill(0.0);
            for from in (first..last).step_by(GROUP) {
                let tokens = GROUP.min(last - from);
                let mut correction = [1f32; Q];
                // SAFETY: the caller's promises, passed on; `from + tokens` is at most `last`.
                unsafe {
                    scores(pages, queries, from, tokens, &mut weights);
                    for q in 0..Q {
                        let seen = |end: usize| end.saturating_sub(from).min(GROUP);
                        let seen = seen(visible[q].from)..seen(visible[q].to);
                        // A group that a query does not see leaves it as it was, to the bit.
                        if seen.is_empty() {
                            weights.0[q].fill(0.0);
                        } else {
                            correction[q] = soften(&mut weights.0[q], seen, &mut largest[q], &mut total[q]);
                        }
                    }
                    values(pages, &weights, &correction, from, tokens, out);
                }
            }
            for (row, total) in out.chunks_exact_mut(size).zip(total) {
                let inverse = 1.0 / total;
                row.iter_mut().for_each(|x| *x *= inverse);
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
use attend_in_groups;

/// Scores of one group, then softmax weights.
#[cfg(target_arch = "x86_64")]
#[repr(align(64))]
struct Weights<const Q: usize>([[f32; GROUP]; Q]);

/// `out[q] = softmax(queries[q] · keys) · values` over the tokens of `visible[q]`. `queries` are already
/// scaled; both are `[queries, head_size]`, row-major.
pub fn attend(pages: Pages, queries: &[f32], visible: &[Span], out: &mut [f32]) {
    attend_with(*KERNEL, pages, queries, visible, out);
}

fn attend_with(kernel: KernelKind, pages: Pages, queries: &[f32], visible: &[Span], out: &mut [f32]) {
    let shape = &pages.cache.shape;
    let is_whole = shape.head_size.is_multiple_of(LANES) && shape.block_tokens.is_multiple_of(LANES);
    match kernel {
        // SAFETY, of both: the features were detected; sizes were checked; blocks cover `visible` (see `Step::set`).
        #[cfg(target_arch = "x86_64")]
        KernelKind::Avx512 if is_whole => tiles!(avx512, (pages, queries, visible, out), 1 2 3 4 5 6 7 8 9 10 11 12),
        #[cfg(target_arch = "x86_64")]
        KernelKind::Avx2 if is_whole => tiles!(avx2, (pages, queries, visible, out), 1 2 3 4 5 6),
        _ => plain(pages, queries, visible, out),
    }
}

/// Queries in tiles that fit a kernel's registers.
#[cfg(target_arch = "x86_64")]
macro_rules! tiles {
    ($kernel:ident, ($pages:expr, $queries:expr, $visible:expr, $out:expr), $($count:literal)*) => {{
        let numbers = $kernel::QUERIES_MAX * $pages.cache.shape.head_size;
        let tiles = $queries.chunks(numbers).zip($out.chunks_mut(numbers));
        for ((queries, out), visible) in tiles.zip($visible.chunks($kernel::QUERIES_MAX)) {
            match visible.len() {
                $($count => unsafe { $kernel::attend::<$count>($pages, queries, visible, out) },)*
                _ => unreachable!("tiles have at most {} queries", $kernel::QUERIES_MAX),
            }
        }
    }};
}
#[cfg(target_arch = "x86_64")]
use tiles;

#[derive(Clone, Copy, Debug, PartialEq)]
enum KernelKind {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The fastest kernel whose instructions the machine has. Both vector kernels have the same results, to the bit:
/// the wider one is taken only where that holds.
static KERNEL: LazyLock<KernelKind> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    if *HAS_AVX2 {
        if is_x86_feature_detected!("avx512f") {
            if agrees_with_avx2(KernelKind::Avx512) {
                return KernelKind::Avx512;
            }
            tracing::error!("attention by AVX-512 computes other numbers than it should here; AVX2 is used");
        }
        return KernelKind::Avx2;
    }
    KernelKind::Plain
});

/// On a few pseudo-random keys and queries.
#[cfg(target_arch = "x86_64")]
fn agrees_with_avx2(kernel: KernelKind) -> bool {
    let shape = KvShape { layers: 1, kv_heads: 1, head_size: 64, block_tokens: 16, blocks: 6 };
    let Ok(cache) = KvCache::new(shape) else { return false };
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let mut numbers = |count: usize| (0..count).map(|_| next()).collect::<Vec<f32>>();
    let blocks = [3, 0, 5, 1, 4, 2];
    for token in 0..90 {
        // SAFETY: one thread.
        unsafe { cache.write(0, blocks[token / 16], 0, token % 16, &numbers(64), &numbers(64)) };
    }
    let pages = Pages { cache: &cache, blocks: &blocks, layer: 0, kv_head: 0 };
    let queries = numbers(12 * 64);
    (1..=12).all(|count| {
        let visible: Vec<Span> = (0..count).map(|q| Span { from: q * 3, to: 90 - q * 4 }).collect();
        let [mut found, mut expected] = [0, 1].map(|_| vec![0f32; count * 64]);
        attend_with(kernel, pages, &queries[..count * 64], &visible, &mut found);
        attend_with(KernelKind::Avx2, pages, &queries[..count * 64], &visible, &mut expected);
        found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits())
    })
}

/// The same, one query and one number at a time: for other machines, and the twin in the tests.
fn plain(pages: Pages, queries: &[f32], visible: &[Span], out: &mut [f32]) {
    let shape = &pages.cache.shape;
    let size = shape.head_size;
    for ((query, out), visible) in queries.chunks_exact(size).zip(out.chunks_exact_mut(size)).zip(visible) {
        // SAFETY: `keys` and `value` point at numbers of the page; channel `d` is within it.
        let score = |token| unsafe {
            let keys = pages.keys(token);
            (0..size).map(|d| query[d] * (*keys.add(d * shape.block_tokens)).to_f32()).sum::<f32>()
        };
        let scores: Vec<f32> = (visible.from..visible.to).map(score).collect();
        let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = scores.iter().map(|s| (s - largest).exp()).collect();
        let total: f32 = weights.iter().sum();
        out.fill(0.0);
        for (token, weight) in (visible.from..).zip(&weights) {
            let value = pages.value(token);
            for (d, out) in out.iter_mut().enumerate() {
                // SAFETY: as above.
                *out += weight / total * unsafe { *value.add(d) }.to_f32();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::onnx::kv::KvShape;

    /// A cache with `tokens` pseudo-random tokens in shuffled blocks.
    fn filled(tokens: usize, head_size: usize, block_tokens: usize, seed: u64) -> (KvCache, Vec<u32>) {
        let blocks = tokens.div_ceil(block_tokens);
        let shape = KvShape { layers: 2, kv_heads: 2, head_size, block_tokens, blocks };
        let cache = KvCache::new(shape).unwrap();
        let table: Vec<u32> = (0..blocks as u32).rev().collect();
        let mut next = numbers(seed);
        for token in 0..tokens {
            let key: Vec<f32> = (0..head_size).map(|_| next()).collect();
            let value: Vec<f32> = (0..head_size).map(|_| next()).collect();
            // SAFETY: one thread.
            unsafe { cache.write(1, table[token / block_tokens], 1, token % block_tokens, &key, &value) };
        }
        (cache, table)
    }

    fn numbers(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed | 1;
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 24) as f32 * 2.0 - 1.0
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_vector_kernels_of_this_machine_agree_to_the_bit() {
        if *HAS_AVX2 {
            assert!(agrees_with_avx2(KernelKind::Avx2));
        }
        if *HAS_AVX2 && is_x86_feature_detected!("avx512f") {
            assert!(agrees_with_avx2(KernelKind::Avx512));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn attention_agrees_with_its_slow_twin_and_does_not_depend_on_the_tile(
            tokens in 1usize..300,
            queries in 1usize..15,
            head_size in prop::sample::select(vec![64usize, 256]),
            block_tokens in prop::sample::select(vec![16usize, 32, 64]),
            window in prop::sample::select(vec![1usize, 5, 64, 100, usize::MAX]),
            seed: u64,
        ) {
            let (cache, table) = filled(tokens, head_size, block_tokens, seed);
            let pages = Pages { cache: &cache, blocks: &table, layer: 1, kv_head: 1 };
            let mut next = numbers(seed ^ 99);
            let q: Vec<f32> = (0..queries * head_size).map(|_| next()).collect();
            let visible: Vec<Span> = (0..queries)
                .map(|i| tokens.saturating_sub(i * 20 / 3).max(1))
                .map(|to| Span { from: to.saturating_sub(window), to })
                .collect();
            let (mut fast, mut slow) = (vec![0.0; q.len()], vec![0.0; q.len()]);
            attend(pages, &q, &visible, &mut fast);
            plain(pages, &q, &visible, &mut slow);
            for (a, b) in fast.iter().zip(&slow) {
                prop_assert!((a - b).abs() < 2e-5, "{a} against {b}");
            }
            for i in 0..queries {
                let mut alone = vec![0.0; head_size];
                attend(pages, &q[i * head_size..][..head_size], &visible[i..=i], &mut alone);
                prop_assert_eq!(&alone[..], &fast[i * head_size..][..head_size]);
            }
        }
    }
}
