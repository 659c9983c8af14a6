//! For machines with AVX-512: one vector of sixteen, and twice the queries. Every number comes out of the same
//! operations in the same order as with AVX2.

use std::arch::x86_64::{
    _mm256_loadu_si256, _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_storeu_ps,
};

use super::{GROUP, LANES, Pages, Span, Weights, avx2::soften};

/// Queries that fit the registers.
pub const QUERIES_MAX: usize = 12;

super::attend_in_groups!("avx512f,avx2,fma,f16c");

/// Scores of `tokens` tokens, in passes of `LANES`; lanes beyond the last token hold what the page holds.
// Indices rather than iterators and closures: those are compiled for any machine and would not be inlined.
#[allow(clippy::needless_range_loop)]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
unsafe fn scores<const Q: usize>(pages: Pages, queries: &[f32], from: usize, tokens: usize, weights: &mut Weights<Q>) {
    let size = pages.cache.shape.head_size;
    let stride = pages.cache.shape.block_tokens;
    for lane in (0..tokens).step_by(LANES) {
        let keys = pages.keys(from + lane);
        let mut sums = [_mm512_setzero_ps(); Q];
        for d in 0..size {
            // SAFETY: `LANES` keys of channel `d` stand side by side, since blocks are multiples of it.
            unsafe {
                let key = _mm512_cvtph_ps(_mm256_loadu_si256(keys.add(d * stride).cast()));
                for q in 0..Q {
                    sums[q] = _mm512_fmadd_ps(_mm512_set1_ps(*queries.get_unchecked(q * size + d)), key, sums[q]);
                }
            }
        }
        for q in 0..Q {
            // SAFETY: `lane + LANES` is at most `GROUP`.
            unsafe { _mm512_storeu_ps(weights.0[q].as_mut_ptr().add(lane), sums[q]) };
        }
    }
}

/// `out = out * correction + weights · values`, sixteen channels at a time.
// Indices rather than iterators and closures: those are compiled for any machine and would not be inlined.
#[allow(clippy::needless_range_loop)]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
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
        let mut sums = [_mm512_setzero_ps(); Q];
        for q in 0..Q {
            // SAFETY: sixteen channels of row `q`.
            let row = unsafe { _mm512_loadu_ps(out.as_ptr().add(q * size + channel)) };
            sums[q] = _mm512_mul_ps(row, _mm512_set1_ps(correction[q]));
        }
        let mut t = 0;
        while t < tokens {
            // Values of one block stand one after the other.
            let run = (block_tokens - (from + t) % block_tokens).min(tokens - t);
            let mut value = pages.value(from + t);
            for _ in 0..run {
                // SAFETY: within the page, and `t` is below `GROUP`.
                unsafe {
                    let channels = _mm512_cvtph_ps(_mm256_loadu_si256(value.add(channel).cast()));
                    for q in 0..Q {
                        let weight = _mm512_set1_ps(*weights.0[q].get_unchecked(t));
                        sums[q] = _mm512_fmadd_ps(weight, channels, sums[q]);
                    }
                    value = value.add(size);
                }
                t += 1;
            }
        }
        for q in 0..Q {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(q * size + channel), sums[q]) };
        }
    }
}
