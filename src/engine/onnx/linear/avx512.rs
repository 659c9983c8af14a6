//! For machines with AVX-512 and its byte dot product (VNNI): sixteen columns in one vector, four products
//! and their sum in one instruction.

use std::{
    arch::x86_64::{
        __m512, __m512i, _mm256_loadu_si256, _mm512_and_si512, _mm512_broadcast_i64x4, _mm512_cvtepi32_ps,
        _mm512_cvtph_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_mul_ps, _mm512_or_si512,
        _mm512_set_epi64, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
        _mm512_slli_epi16, _mm512_srlv_epi64, _mm512_storeu_ps,
    },
    ops::Range,
};

use super::{Codes, Job, PANEL, PLANE_BYTES, TAIL_BYTES, code_bytes};
use crate::model::BLOCK;

/// Rows whose sums fit the registers.
const ROWS_MAX: usize = 8;

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn tile(job: &Job, rows: Range<usize>, sums: &mut [[f32; PANEL]]) {
    match job.codes {
        Codes::Four => tile_of::<4>(job, rows, sums),
        Codes::Seven => tile_of::<7>(job, rows, sums),
        Codes::Eight => tile_of::<8>(job, rows, sums),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile_of<const BITS: u32>(job: &Job, rows: Range<usize>, sums: &mut [[f32; PANEL]]) {
    let mut done = 0;
    while done < rows.len() {
        let (row, sums) = (rows.start + done, &mut sums[done..]);
        done += match (rows.len() - done).min(ROWS_MAX) {
            1 => some_rows::<BITS, 1>(job, row, sums),
            2 | 3 => some_rows::<BITS, 2>(job, row, sums),
            4..8 => some_rows::<BITS, 4>(job, row, sums),
            _ => some_rows::<BITS, 8>(job, row, sums),
        };
    }
}

// Indices rather than iterators and closures: those are compiled for any machine and would not be inlined.
#[allow(clippy::needless_range_loop)]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn some_rows<const BITS: u32, const R: usize>(job: &Job, row: usize, sums: &mut [[f32; PANEL]]) -> usize {
    let mut rows = [(std::ptr::null(), std::ptr::null()); R];
    for r in 0..R {
        rows[r] = job.row(row + r);
    }
    let (blocks, bytes) = (job.blocks(), code_bytes(BITS) + TAIL_BYTES);
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
            let products = dot::<BITS, R>(at, quants);
            let tail = at.add(code_bytes(BITS));
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

/// Products of one block with each row, summed over the block.
///
/// # Safety
/// A block's codes stand at `codes`, and a block's quants at each of `quants`.
#[inline]
#[allow(clippy::needless_range_loop)]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn dot<const BITS: u32, const R: usize>(codes: *const u8, quants: [*const i8; R]) -> [__m512i; R] {
    let mask = _mm512_set1_epi8(15);
    // The columns of the second half stand in the high halves of the bytes.
    let shifts = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
    let mut sums = [_mm512_setzero_si512(); R];
    for k in 0..BLOCK / 4 {
        // SAFETY: by the caller's promise.
        unsafe {
            let halves = |at: *const u8| {
                let packed = _mm512_broadcast_i64x4(_mm256_loadu_si256(at.cast()));
                _mm512_and_si512(_mm512_srlv_epi64(packed, shifts), mask)
            };
            let fours = match BITS {
                4 => halves(codes.add(32 * k)),
                7 => _mm512_loadu_si512(codes.add(64 * k).cast()),
                _ => {
                    let high = halves(codes.add(PLANE_BYTES + 32 * k));
                    _mm512_or_si512(halves(codes.add(32 * k)), _mm512_slli_epi16::<4>(high))
                }
            };
            for r in 0..R {
                let four = _mm512_set1_epi32(quants[r].add(4 * k).cast::<i32>().read_unaligned());
                sums[r] = _mm512_dpbusd_epi32(sums[r], fours, four);
            }
        }
    }
    sums
}
