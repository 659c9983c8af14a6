//! Attention of a few queries of one sequence over its KV pages.
//!
//! The keys are read in groups of [`GROUP`] positions, counted from the sequence's first token, and the
//! softmax is carried from group to group. So each query's result comes out of the same operations in the
//! same order, whichever queries share its tile and however the sequence was cut into chunks.

use half::f16;

use super::kv::KvCache;
use crate::engine::simd::HAS_AVX2;

/// Tokens between two updates of the running softmax; a multiple of every KV block's size below it.
const GROUP: usize = 64;
/// Keys that one pass of the score kernel covers: two vectors of eight.
const LANES: usize = 16;
/// Queries that fit the registers.
const QUERIES_MAX: usize = 6;

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

/// `out[q] = softmax(queries[q] · keys) · values` over the tokens of `visible[q]`. `queries` are already
/// scaled; both are `[queries, head_size]`, row-major.
pub fn attend(pages: Pages, queries: &[f32], visible: &[Span], out: &mut [f32]) {
    let head_size = pages.cache.shape.head_size;
    let tiles = queries.chunks(QUERIES_MAX * head_size).zip(out.chunks_mut(QUERIES_MAX * head_size));
    for ((queries, out), visible) in tiles.zip(visible.chunks(QUERIES_MAX)) {
        #[cfg(target_arch = "x86_64")]
        if *HAS_AVX2 && head_size.is_multiple_of(LANES) && pages.cache.shape.block_tokens.is_multiple_of(LANES) {
            // SAFETY: the features were detected; sizes were checked; blocks cover `visible` (see `Step::set`).
            unsafe {
                match visible.len() {
                    1 => avx2::attend::<1>(pages, queries, visible, out),
                    2 => avx2::attend::<2>(pages, queries, visible, out),
                    3 => avx2::attend::<3>(pages, queries, visible, out),
                    4 => avx2::attend::<4>(pages, queries, visible, out),
                    5 => avx2::attend::<5>(pages, queries, visible, out),
                    _ => avx2::attend::<6>(pages, queries, visible, out),
                }
            }
            continue;
        }
        plain(pages, queries, visible, out);
    }
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

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::{arch::x86_64::*, ops::Range};

    use super::{GROUP, LANES, Pages, Span};
    use crate::engine::simd::exp;

    #[repr(align(32))]
    struct Weights<const Q: usize>([[f32; GROUP]; Q]);

    /// # Safety
    /// AVX2, FMA and F16C are there. Head and block sizes are multiples of `LANES`. `queries` and `out` have
    /// `Q` rows, `visible` has `Q` spans, and the blocks cover the last of them.
    #[target_feature(enable = "avx2,fma,f16c")]
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

    /// Scores of `tokens` tokens, in passes of `LANES`; lanes beyond the last token hold what the page holds.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scores<const Q: usize>(
        pages: Pages,
        queries: &[f32],
        from: usize,
        tokens: usize,
        weights: &mut Weights<Q>,
    ) {
        let size = pages.cache.shape.head_size;
        let stride = pages.cache.shape.block_tokens;
        for lane in (0..tokens).step_by(LANES) {
            let keys = pages.keys(from + lane);
            let mut low = [_mm256_setzero_ps(); Q];
            let mut high = [_mm256_setzero_ps(); Q];
            for d in 0..size {
                // SAFETY: `LANES` keys of channel `d` stand side by side, since blocks are multiples of it.
                unsafe {
                    let key = keys.add(d * stride).cast::<__m128i>();
                    let key_low = _mm256_cvtph_ps(_mm_loadu_si128(key));
                    let key_high = _mm256_cvtph_ps(_mm_loadu_si128(key.add(1)));
                    for q in 0..Q {
                        let query = _mm256_broadcast_ss(queries.get_unchecked(q * size + d));
                        low[q] = _mm256_fmadd_ps(query, key_low, low[q]);
                        high[q] = _mm256_fmadd_ps(query, key_high, high[q]);
                    }
                }
            }
            for q in 0..Q {
                // SAFETY: `lane + LANES` is at most `GROUP`.
                unsafe {
                    let at = weights.0[q].as_mut_ptr().add(lane);
                    _mm256_storeu_ps(at, low[q]);
                    _mm256_storeu_ps(at.add(8), high[q]);
                }
            }
        }
    }

    /// Turns the scores of one group into softmax weights relative to the largest score so far, and returns
    /// what the earlier groups' sums must be multiplied with. Tokens that are not `seen` weigh exactly 0.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn soften(weights: &mut [f32; GROUP], seen: Range<usize>, largest: &mut f32, total: &mut f32) -> f32 {
        weights[..seen.start].fill(f32::NEG_INFINITY);
        weights[seen.end..].fill(f32::NEG_INFINITY);
        let mut lanes = [f32::NEG_INFINITY; 8];
        for chunk in weights.as_chunks::<8>().0 {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane = if *x > *lane { *x } else { *lane };
            }
        }
        let most = lanes.iter().copied().fold(*largest, f32::max);
        let correction = exp::<true>(*largest - most);
        let mut sums = [0f32; 8];
        for chunk in weights.as_chunks_mut::<8>().0 {
            for (sum, x) in sums.iter_mut().zip(chunk) {
                *x = exp::<true>(*x - most);
                *sum += *x;
            }
        }
        *total = total.mul_add(correction, sums.iter().sum());
        *largest = most;
        correction
    }

    /// `out = out * correction + weights · values`, sixteen channels at a time.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn values<const Q: usize>(
        pages: Pages,
        weights: &Weights<Q>,
        correction: &[f32; Q],
        from: usize,
        tokens: usize,
        out: &mut [f32],
    ) {
        let size = pages.cache.shape.head_size;
        let block_tokens = pages.cache.shape.block_tokens;
        for channel in (0..size).step_by(LANES) {
            let mut low = [_mm256_setzero_ps(); Q];
            let mut high = [_mm256_setzero_ps(); Q];
            for q in 0..Q {
                // SAFETY: sixteen channels of row `q`.
                unsafe {
                    let row = out.as_ptr().add(q * size + channel);
                    let factor = _mm256_set1_ps(correction[q]);
                    low[q] = _mm256_mul_ps(_mm256_loadu_ps(row), factor);
                    high[q] = _mm256_mul_ps(_mm256_loadu_ps(row.add(8)), factor);
                }
            }
            let mut t = 0;
            while t < tokens {
                // Values of one block stand one after the other.
                let run = (block_tokens - (from + t) % block_tokens).min(tokens - t);
                let mut value = pages.value(from + t);
                for _ in 0..run {
                    // SAFETY: within the page, and `t` is below `GROUP`.
                    unsafe {
                        let at = value.add(channel).cast::<__m128i>();
                        let value_low = _mm256_cvtph_ps(_mm_loadu_si128(at));
                        let value_high = _mm256_cvtph_ps(_mm_loadu_si128(at.add(1)));
                        for q in 0..Q {
                            let weight = _mm256_broadcast_ss(weights.0[q].get_unchecked(t));
                            low[q] = _mm256_fmadd_ps(weight, value_low, low[q]);
                            high[q] = _mm256_fmadd_ps(weight, value_high, high[q]);
                        }
                        value = value.add(size);
                    }
                    t += 1;
                }
            }
            for q in 0..Q {
                // SAFETY: as above.
                unsafe {
                    let row = out.as_mut_ptr().add(q * size + channel);
                    _mm256_storeu_ps(row, low[q]);
                    _mm256_storeu_ps(row.add(8), high[q]);
                }
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
