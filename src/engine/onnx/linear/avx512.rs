//! For machines with AVX-512 and its byte dot product (VNNI): sixteen columns in one vector, four products
//! and their sum in one instruction.

use std::arch::x86_64::{
    __m512, __m512i, _mm256_loadu_si256, _mm512_add_epi32, _mm512_and_si512, _mm512_broadcast_i64x4,
    _mm512_cvtepi32_ps, _mm512_cvtph_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_mul_ps, _mm512_set_epi64,
    _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_slli_epi32,
    _mm512_srlv_epi64, _mm512_storeu_ps,
};

use super::{Job, PLANE_BYTES, Sums, TAIL_BYTES, TILE_ROWS_MAX};
use crate::model::BLOCK;

/// Up to [`TILE_ROWS_MAX`] rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn tile(job: &Job, row: usize, sums: &mut Sums) -> usize {
    match (job.planes, (job.rows.count - row).min(TILE_ROWS_MAX)) {
        (1, 1) => rows::<1, 1>(job, row, sums),
        (1, 2 | 3) => rows::<1, 2>(job, row, sums),
        (1, 4..8) => rows::<1, 4>(job, row, sums),
        (1, _) => rows::<1, 8>(job, row, sums),
        (_, 1) => rows::<2, 1>(job, row, sums),
        (_, 2 | 3) => rows::<2, 2>(job, row, sums),
        (_, 4..8) => rows::<2, 4>(job, row, sums),
        (_, _) => rows::<2, 8>(job, row, sums),
    }
}

// Indices rather than iterators and closures: those are compiled for any machine and would not be inlined.
#[allow(clippy::needless_range_loop)]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn rows<const PLANES: usize, const R: usize>(job: &Job, row: usize, sums: &mut Sums) -> usize {
    let mut rows = [(std::ptr::null(), std::ptr::null()); R];
    for r in 0..R {
        rows[r] = job.row(row + r);
    }
    let (blocks, bytes) = (job.blocks(), PLANES * PLANE_BYTES + TAIL_BYTES);
    assert!(job.bytes.len() == blocks * bytes);
    let mut totals: [__m512; R] = [_mm512_setzero_ps(); R];
    for block in 0..blocks {
        // SAFETY: the panel has as many blocks, and so has every row.
        unsafe {
            let at = job.bytes.as_ptr().add(block * bytes);
            let mut quants = [std::ptr::null(); R];
            for r in 0..R {
                quants[r] = rows[r].0.add(block * BLOCK);
            }
            let mut products = dot(at, quants);
            if PLANES == 2 {
                let high = dot(at.add(PLANE_BYTES), quants);
                for r in 0..R {
                    products[r] = _mm512_add_epi32(products[r], _mm512_slli_epi32::<4>(high[r]));
                }
            }
            let tail = at.add(PLANES * PLANE_BYTES);
            let scale = _mm512_cvtph_ps(_mm256_loadu_si256(tail.cast()));
            let offset = _mm512_cvtph_ps(_mm256_loadu_si256(tail.add(32).cast()));
            for r in 0..R {
                let row_scale = _mm512_set1_ps(*rows[r].1.add(2 * block));
                let row_sum = _mm512_set1_ps(*rows[r].1.add(2 * block + 1));
                let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(products[r]), scale);
                totals[r] = _mm512_fmadd_ps(scaled, row_scale, _mm512_fmadd_ps(offset, row_sum, totals[r]));
            }
        }
    }
    for r in 0..R {
        // SAFETY: sixteen numbers.
        unsafe { _mm512_storeu_ps(sums[r].as_mut_ptr(), totals[r]) };
    }
    R
}

/// Products of one plane of one block with each row, summed over the block.
///
/// # Safety
/// A plane's codes stand at `codes`, and a block's quants at each of `quants`.
#[inline]
#[allow(clippy::needless_range_loop)]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn dot<const R: usize>(codes: *const u8, quants: [*const i8; R]) -> [__m512i; R] {
    let mask = _mm512_set1_epi8(15);
    // The columns of the second half stand in the high halves of the bytes.
    let shifts = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
    let mut sums = [_mm512_setzero_si512(); R];
    for k in 0..BLOCK / 4 {
        // SAFETY: by the caller's promise.
        unsafe {
            let packed = _mm512_broadcast_i64x4(_mm256_loadu_si256(codes.add(32 * k).cast()));
            let codes = _mm512_and_si512(_mm512_srlv_epi64(packed, shifts), mask);
            for r in 0..R {
                let four = _mm512_set1_epi32(quants[r].add(4 * k).cast::<i32>().read_unaligned());
                sums[r] = _mm512_dpbusd_epi32(sums[r], codes, four);
            }
        }
    }
    sums
}
