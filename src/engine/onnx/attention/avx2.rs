//! For machines with AVX2, FMA and F16C: two vectors of eight.

use std::{arch::x86_64::*, ops::Range};

use super::{GROUP, LANES, Pages, Span, Weights};
use crate::engine::simd::{exp, exp_avx2};

/// Queries that fit the registers.
pub const QUERIES_MAX: usize = 6;

super::attend_in_groups!("avx2,fma,f16c");

/// Scores of `tokens` tokens, in passes of `LANES`; lanes beyond the last token hold what the page holds.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scores<const Q: usize>(pages: Pages, queries: &[f32], from: usize, tokens: usize, weights: &mut Weights<Q>) {
    let size = pages.cache.shape.head_size;
    let stride = pages.cache.shape.block_tokens;
    for lane in (0..tokens).step_by(LANES) {
        let keys = pages.keys(from + lane);
        let values = pages.value(from + lane);
        let next_group = pages.keys((from + lane + GROUP).min(pages.blocks.len() * stride - LANES));
        let mut low = [_mm256_setzero_ps(); Q];
        let mut high = [_mm256_setzero_ps(); Q];
        for d in 0..size {
            // SAFETY: `LANES` keys of channel `d` stand side by side, since blocks are multiples of it.
            unsafe {
                // Many queries find what they read in the cache, but for the first of them.
                if Q < QUERIES_MAX {
                    let ahead = if d % 2 == 0 { values } else { next_group };
                    _mm_prefetch::<_MM_HINT_T0>(ahead.add(d * stride).cast());
                }
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
// Indices rather than iterators and closures: those are compiled for any machine and would not be inlined.
#[allow(clippy::needless_range_loop)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn soften(weights: &mut [f32; GROUP], seen: Range<usize>, largest: &mut f32, total: &mut f32) -> f32 {
    weights[..seen.start].fill(f32::NEG_INFINITY);
    weights[seen.end..].fill(f32::NEG_INFINITY);
    let mut eights = [_mm256_setzero_ps(); GROUP / 8];
    let mut most = _mm256_set1_ps(*largest);
    for i in 0..GROUP / 8 {
        // SAFETY: eight of the group's weights.
        eights[i] = unsafe { _mm256_loadu_ps(weights.as_ptr().add(8 * i)) };
        most = _mm256_max_ps(most, eights[i]);
    }
    let most = lanes(most).into_iter().fold(f32::NEG_INFINITY, f32::max);
    let correction = exp::<true>(*largest - most);
    let mut sums = _mm256_setzero_ps();
    for i in 0..GROUP / 8 {
        let weight = exp_avx2(_mm256_sub_ps(eights[i], _mm256_set1_ps(most)));
        sums = _mm256_add_ps(sums, weight);
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(weights.as_mut_ptr().add(8 * i), weight) };
    }
    *total = total.mul_add(correction, lanes(sums).iter().sum());
    *largest = most;
    correction
}

#[target_feature(enable = "avx2")]
fn lanes(x: __m256) -> [f32; 8] {
    let mut lanes = [0.0; 8];
    // SAFETY: eight numbers.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), x) };
    lanes
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
