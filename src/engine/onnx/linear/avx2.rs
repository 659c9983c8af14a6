//! For machines with AVX2, FMA and F16C.
//!
//! A code has four bits and a quant eight, so eight products of one lane and their neighbours add up to at
//! most 8 · 2 · 15 · 127 = 30,480 in sixteen bits, and a whole block is summed there before it is widened.

use std::arch::{
    asm,
    x86_64::{
        __m256, __m256i, _mm_loadu_si128, _mm256_add_epi32, _mm256_broadcast_ss, _mm256_cvtepi32_ps, _mm256_cvtph_ps,
        _mm256_fmadd_ps, _mm256_madd_epi16, _mm256_mul_ps, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_setzero_ps,
        _mm256_setzero_si256, _mm256_slli_epi32, _mm256_storeu_ps,
    },
};

use super::{Job, PLANE_BYTES, Sums, TAIL_BYTES};
use crate::model::BLOCK;

/// Rows whose sums fit the registers.
const ROWS_MAX: usize = 4;

/// Four inputs a round: sixteen columns' codes are unpacked once and multiplied with four quants of each row.
///
/// In assembly because the compiler unrolls the loop over the block, unpacks it all ahead and then has no
/// registers left for the sums, which costs a sixth of the speed.
macro_rules! dot_rows {
    ($codes:ident, $quants:ident, $sums:ident, $(($r:literal $quant:ident $low:ident $high:ident))*) => {
        asm!(
            "2:",
            "vmovdqu {low}, ymmword ptr [{codes} + 8 * {at}]",
            "vpsrlw {high}, {low}, 4",
            "vpand {low}, {low}, {mask}",
            "vpand {high}, {high}, {mask}",
            $(
                concat!("vpbroadcastd {four}, dword ptr [{", stringify!($quant), "} + {at}]"),
                "vpmaddubsw {pairs}, {low}, {four}",
                "vpmaddubsw {four}, {high}, {four}",
                concat!("vpaddw {", stringify!($low), "}, {", stringify!($low), "}, {pairs}"),
                concat!("vpaddw {", stringify!($high), "}, {", stringify!($high), "}, {four}"),
            )*
            "add {at}, 4",
            "cmp {at}, 32",
            "jne 2b",
            codes = in(reg) $codes,
            at = inout(reg) 0usize => _,
            mask = in(ymm_reg) _mm256_set1_epi8(15),
            low = out(ymm_reg) _,
            high = out(ymm_reg) _,
            four = out(ymm_reg) _,
            pairs = out(ymm_reg) _,
            $(
                $quant = in(reg) $quants[$r],
                $low = inout(ymm_reg) $sums[$r][0],
                $high = inout(ymm_reg) $sums[$r][1],
            )*
            options(pure, readonly, nostack)
        )
    };
}

/// Up to [`ROWS_MAX`] rows.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn tile(job: &Job, row: usize, sums: &mut Sums) -> usize {
    match (job.planes, (job.rows.count - row).min(ROWS_MAX)) {
        (1, 1) => rows::<1, 1>(job, row, sums),
        (1, 2) => rows::<1, 2>(job, row, sums),
        (1, 3) => rows::<1, 3>(job, row, sums),
        (1, _) => rows::<1, 4>(job, row, sums),
        (_, 1) => rows::<2, 1>(job, row, sums),
        (_, 2) => rows::<2, 2>(job, row, sums),
        (_, 3) => rows::<2, 3>(job, row, sums),
        (_, _) => rows::<2, 4>(job, row, sums),
    }
}

// Indices rather than iterators and closures: those are compiled for any machine and would not be inlined.
#[allow(clippy::needless_range_loop)]
#[target_feature(enable = "avx2,fma,f16c")]
fn rows<const PLANES: usize, const R: usize>(job: &Job, row: usize, sums: &mut Sums) -> usize {
    let mut rows = [(std::ptr::null(), std::ptr::null()); R];
    for r in 0..R {
        rows[r] = job.row(row + r);
    }
    let (blocks, bytes) = (job.blocks(), PLANES * PLANE_BYTES + TAIL_BYTES);
    assert!(job.bytes.len() == blocks * bytes);
    let ones = _mm256_set1_epi16(1);
    let mut totals = [[_mm256_setzero_ps(); 2]; R];
    for block in 0..blocks {
        // SAFETY: the panel has as many blocks, and so has every row.
        unsafe {
            let at = job.bytes.as_ptr().add(block * bytes);
            let mut quants = [std::ptr::null(); R];
            for r in 0..R {
                quants[r] = rows[r].0.add(block * BLOCK);
            }
            let mut products = dot(at, quants);
            for r in 0..R {
                for half in 0..2 {
                    products[r][half] = _mm256_madd_epi16(products[r][half], ones);
                }
            }
            if PLANES == 2 {
                let high = dot(at.add(PLANE_BYTES), quants);
                for r in 0..R {
                    for half in 0..2 {
                        let sixteenth = _mm256_madd_epi16(high[r][half], ones);
                        products[r][half] = _mm256_add_epi32(products[r][half], _mm256_slli_epi32::<4>(sixteenth));
                    }
                }
            }
            let tail = at.add(PLANES * PLANE_BYTES);
            for half in 0..2 {
                let scale = _mm256_cvtph_ps(_mm_loadu_si128(tail.add(16 * half).cast()));
                let offset = _mm256_cvtph_ps(_mm_loadu_si128(tail.add(32 + 16 * half).cast()));
                for r in 0..R {
                    let row_scale = _mm256_broadcast_ss(&*rows[r].1.add(2 * block));
                    let row_sum = _mm256_broadcast_ss(&*rows[r].1.add(2 * block + 1));
                    let scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(products[r][half]), scale);
                    let total: __m256 = _mm256_fmadd_ps(offset, row_sum, totals[r][half]);
                    totals[r][half] = _mm256_fmadd_ps(scaled, row_scale, total);
                }
            }
        }
    }
    for r in 0..R {
        for half in 0..2 {
            // SAFETY: sixteen numbers, in two halves.
            unsafe { _mm256_storeu_ps(sums[r].as_mut_ptr().add(8 * half), totals[r][half]) };
        }
    }
    R
}

/// Products of one plane of one block with each row: sixteen-bit sums, two to a column.
///
/// # Safety
/// A plane's codes stand at `codes`, and a block's quants at each of `quants`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot<const R: usize>(codes: *const u8, quants: [*const i8; R]) -> [[__m256i; 2]; R] {
    let mut sums = [[_mm256_setzero_si256(); 2]; R];
    // SAFETY: by the caller's promise.
    unsafe {
        match R {
            1 => dot_rows!(codes, quants, sums, (0 q0 low0 high0)),
            2 => dot_rows!(codes, quants, sums, (0 q0 low0 high0) (1 q1 low1 high1)),
            3 => dot_rows!(codes, quants, sums, (0 q0 low0 high0) (1 q1 low1 high1) (2 q2 low2 high2)),
            _ => dot_rows!(
                codes, quants, sums,
                (0 q0 low0 high0) (1 q1 low1 high1) (2 q2 low2 high2) (3 q3 low3 high3)
            ),
        }
    }
    sums
}
