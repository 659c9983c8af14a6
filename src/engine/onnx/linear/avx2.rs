//! For machines with AVX2, FMA and F16C.
//!
//! A code has four bits and a quant eight, so eight products of one lane and their neighbours add up to at
//! most 8 · 2 · 15 · 127 = 30,480 in sixteen bits, and a whole block is summed there before it is widened. Two
//! products of seven bits by eight just fit sixteen bits, and are widened at once.
//!
//! In assembly because compilers keep the sums of a tile on the stack, which costs a fifth of the speed: here
//! sixteen columns by six rows stay in registers for a block, and their totals in the caller's cache lines.

use std::{arch::asm, ops::Range};

use super::{Codes, Job, PANEL, TAIL_BYTES, code_bytes};

/// Rows whose sums fit the registers.
const ROWS_MAX: usize = 6;

/// What the kernels read beside codes and rows, and where they put aside what the registers do not hold.
#[repr(C, align(64))]
struct Work {
    /// Fifteen in each byte.
    low_halves: [u8; 32],
    /// One in each sixteen bits.
    ones: [u16; 16],
    /// A block's scales, then its offsets.
    scales: [[f32; PANEL]; 2],
    /// Sums of low halves of codes.
    low_sums: [[i32; PANEL]; ROWS_MAX],
}

/// As many rows at once as the registers hold, and rather two tiles of five than one of six and one of four.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn tile(job: &Job, rows: Range<usize>, sums: &mut [[f32; PANEL]]) {
    let scales = [[0.0; PANEL]; 2];
    let mut work = Work { low_halves: [15; 32], ones: [1; 16], scales, low_sums: [[0; PANEL]; ROWS_MAX] };
    let tiles = rows.len().div_ceil(ROWS_MAX);
    for tile in 0..tiles {
        let [from, to] = [rows.len() * tile / tiles, rows.len() * (tile + 1) / tiles];
        some_rows(job, rows.start + from, &mut sums[from..to], &mut work);
    }
}

/// As many rows as there are sums.
#[target_feature(enable = "avx2,fma,f16c")]
fn some_rows(job: &Job, row: usize, sums: &mut [[f32; PANEL]], work: &mut Work) {
    let blocks = job.blocks();
    let bytes = code_bytes(job.codes.bits()) + TAIL_BYTES;
    assert!(blocks > 0 && job.bytes.len() == blocks * bytes && (1..=ROWS_MAX).contains(&sums.len()));
    // All rows are there; the first three are addressed from the first, the others from the fourth.
    job.row(row + sums.len() - 1);
    let ((quants, scales), quants_step, scales_step) = (job.row(row), job.inputs, blocks * 8);
    let (quants_4, scales_4) = (quants.wrapping_add(3 * quants_step), scales.wrapping_byte_add(3 * scales_step));
    let count = sums.len();
    sums.fill([0.0; PANEL]);
    let (codes, totals, work) = (job.bytes.as_ptr(), sums.as_mut_ptr(), &raw mut *work);

    macro_rules! run {
        ($kind:ident $($row:tt)*) => {
            asm!(
                // Of the block after the next few, where these rows are the first that need it.
                "2:",
                "test {row}, {row}",
                "jnz 3f",
                "prefetcht0 byte ptr [{codes} + 2048]",
                "prefetcht0 byte ptr [{codes} + 2112]",
                "prefetcht0 byte ptr [{codes} + 2176]",
                "prefetcht0 byte ptr [{codes} + 2240]",
                "prefetcht0 byte ptr [{codes} + 2304]",
                concat!($kind!(@prefetch)),
                "3:",
                $kind!(@products $($row)*),
                // Scales and offsets of the block, in single precision.
                concat!("vcvtph2ps ymm12, xmmword ptr [{codes} + ", $kind!(@bytes), "]"),
                concat!("vcvtph2ps ymm13, xmmword ptr [{codes} + ", $kind!(@bytes), " + 16]"),
                concat!("vcvtph2ps ymm14, xmmword ptr [{codes} + ", $kind!(@bytes), " + 32]"),
                concat!("vcvtph2ps ymm15, xmmword ptr [{codes} + ", $kind!(@bytes), " + 48]"),
                "vmovaps ymmword ptr [{work} + 64], ymm12",
                "vmovaps ymmword ptr [{work} + 96], ymm13",
                "vmovaps ymmword ptr [{work} + 128], ymm14",
                "vmovaps ymmword ptr [{work} + 160], ymm15",
                $(scaled!($kind $row),)*
                concat!("add {codes}, ", $kind!(@bytes), " + 64"),
                "add {quants}, 32",
                "add {quants_4}, 32",
                "add {scales}, 8",
                "add {scales_4}, 8",
                "dec {blocks}",
                "jnz 2b",
                // One row has no use for these.
                "/* {quants_step} {scales_step} */",
                codes = inout(reg) codes => _,
                quants = inout(reg) quants => _,
                quants_4 = inout(reg) quants_4 => _,
                scales = inout(reg) scales => _,
                scales_4 = inout(reg) scales_4 => _,
                blocks = inout(reg) blocks => _,
                quants_step = in(reg) quants_step,
                scales_step = in(reg) scales_step,
                totals = in(reg) totals,
                work = in(reg) work,
                row = in(reg) row,
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
                out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                options(nostack)
            )
        };
    }
    // SAFETY: the panel has as many blocks, and so has every row; the rows' totals are the caller's.
    unsafe {
        match job.codes {
            Codes::Four => for_rows!(count, run, four),
            Codes::Seven => for_rows!(count, run, seven),
            Codes::Eight => for_rows!(count, run, eight),
        }
    }
}

/// Calls a macro with so many rows. Of each: where its quants stand, its scales, its totals, and the registers of
/// its sums, of eight columns each.
macro_rules! for_rows {
    ($count:ident, $run:ident, $kind:ident) => {
        match $count {
            1 => for_rows!(@$run $kind 1),
            2 => for_rows!(@$run $kind 2),
            3 => for_rows!(@$run $kind 3),
            4 => for_rows!(@$run $kind 4),
            5 => for_rows!(@$run $kind 5),
            _ => for_rows!(@$run $kind 6),
        }
    };
    (@$run:ident $kind:ident 1) => { for_rows!(@@$run $kind) };
    (@$run:ident $kind:ident 2) => {
        for_rows!(@@$run $kind ("{quants} + {quants_step}" "{scales} + {scales_step}" "64" "ymm2" "ymm3"))
    };
    (@$run:ident $kind:ident 3) => {
        for_rows!(@@$run $kind
            ("{quants} + {quants_step}" "{scales} + {scales_step}" "64" "ymm2" "ymm3")
            ("{quants} + 2 * {quants_step}" "{scales} + 2 * {scales_step}" "128" "ymm4" "ymm5"))
    };
    (@$run:ident $kind:ident 4) => {
        for_rows!(@@$run $kind
            ("{quants} + {quants_step}" "{scales} + {scales_step}" "64" "ymm2" "ymm3")
            ("{quants} + 2 * {quants_step}" "{scales} + 2 * {scales_step}" "128" "ymm4" "ymm5")
            ("{quants_4}" "{scales_4}" "192" "ymm6" "ymm7"))
    };
    (@$run:ident $kind:ident 5) => {
        for_rows!(@@$run $kind
            ("{quants} + {quants_step}" "{scales} + {scales_step}" "64" "ymm2" "ymm3")
            ("{quants} + 2 * {quants_step}" "{scales} + 2 * {scales_step}" "128" "ymm4" "ymm5")
            ("{quants_4}" "{scales_4}" "192" "ymm6" "ymm7")
            ("{quants_4} + {quants_step}" "{scales_4} + {scales_step}" "256" "ymm8" "ymm9"))
    };
    (@$run:ident $kind:ident 6) => {
        for_rows!(@@$run $kind
            ("{quants} + {quants_step}" "{scales} + {scales_step}" "64" "ymm2" "ymm3")
            ("{quants} + 2 * {quants_step}" "{scales} + 2 * {scales_step}" "128" "ymm4" "ymm5")
            ("{quants_4}" "{scales_4}" "192" "ymm6" "ymm7")
            ("{quants_4} + {quants_step}" "{scales_4} + {scales_step}" "256" "ymm8" "ymm9")
            ("{quants_4} + 2 * {quants_step}" "{scales_4} + 2 * {scales_step}" "320" "ymm10" "ymm11"))
    };
    (@@$run:ident $kind:ident $($row:tt)*) => { $run!($kind ("{quants}" "{scales}" "0" "ymm0" "ymm1") $($row)*) };
}
use for_rows;

/// Codes of four bits.
macro_rules! four {
    (@bytes) => { "256" };
    (@prefetch) => { "" };
    (@products $($row:tt)*) => { halves!("0" $($row)*) };
    (@widen $at:literal $low:literal $high:literal) => {
        concat!(
            "vpmaddwd ", $low, ", ", $low, ", ymmword ptr [{work} + 32]\n",
            "vpmaddwd ", $high, ", ", $high, ", ymmword ptr [{work} + 32]\n",
        )
    };
}
use four;

/// Codes of eight bits, in two planes: the low halves' sums are put aside.
macro_rules! eight {
    (@bytes) => { "512" };
    (@prefetch) => { more_ahead!() };
    (@products $($row:tt)*) => {
        concat!(halves!("0" $($row)*), $(eight!(@aside $row),)* halves!("256" $($row)*))
    };
    (@aside ($quants:literal $scales:literal $at:literal $low:literal $high:literal)) => {
        concat!(
            four!(@widen $at $low $high),
            "vmovdqa ymmword ptr [{work} + 192 + ", $at, "], ", $low, "\n",
            "vmovdqa ymmword ptr [{work} + 224 + ", $at, "], ", $high, "\n",
        )
    };
    (@widen $at:literal $low:literal $high:literal) => {
        concat!(
            four!(@widen $at $low $high),
            "vpslld ", $low, ", ", $low, ", 4\n",
            "vpslld ", $high, ", ", $high, ", 4\n",
            "vpaddd ", $low, ", ", $low, ", ymmword ptr [{work} + 192 + ", $at, "]\n",
            "vpaddd ", $high, ", ", $high, ", ymmword ptr [{work} + 224 + ", $at, "]\n",
        )
    };
}
use eight;

/// Codes of seven bits, in bytes.
macro_rules! seven {
    (@bytes) => { "512" };
    (@prefetch) => { more_ahead!() };
    (@products $($row:tt)*) => {
        concat!(
            seven!(@four "0" first $($row)*), seven!(@four "4" next $($row)*), seven!(@four "8" next $($row)*),
            seven!(@four "12" next $($row)*), seven!(@four "16" next $($row)*), seven!(@four "20" next $($row)*),
            seven!(@four "24" next $($row)*), seven!(@four "28" next $($row)*),
        )
    };
    (@four $k:literal $which:ident $(($quants:literal $scales:literal $at:literal $low:literal $high:literal))*) => {
        concat!(
            "vmovdqu ymm12, ymmword ptr [{codes} + 16 * ", $k, "]\n",
            "vmovdqu ymm13, ymmword ptr [{codes} + 16 * ", $k, " + 32]\n",
            $(
                "vpbroadcastd ymm14, dword ptr [", $quants, " + ", $k, "]\n",
                "vpmaddubsw ymm15, ymm12, ymm14\n",
                "vpmaddubsw ymm14, ymm13, ymm14\n",
                seven!(@$which $low $high),
            )*
        )
    };
    (@first $low:literal $high:literal) => {
        concat!(
            "vpmaddwd ", $low, ", ymm15, ymmword ptr [{work} + 32]\n",
            "vpmaddwd ", $high, ", ymm14, ymmword ptr [{work} + 32]\n",
        )
    };
    (@next $low:literal $high:literal) => {
        concat!(
            "vpmaddwd ymm15, ymm15, ymmword ptr [{work} + 32]\n",
            "vpmaddwd ymm14, ymm14, ymmword ptr [{work} + 32]\n",
            "vpaddd ", $low, ", ", $low, ", ymm15\n",
            "vpaddd ", $high, ", ", $high, ", ymm14\n",
        )
    };
    (@widen $at:literal $low:literal $high:literal) => { "" };
}
use seven;

/// Products of a plane of halves of codes with each row, summed over the block in sixteen bits.
macro_rules! halves {
    ($plane:literal $($row:tt)*) => {
        concat!(
            halves!(@four $plane "0" first $($row)*), halves!(@four $plane "4" next $($row)*),
            halves!(@four $plane "8" next $($row)*), halves!(@four $plane "12" next $($row)*),
            halves!(@four $plane "16" next $($row)*), halves!(@four $plane "20" next $($row)*),
            halves!(@four $plane "24" next $($row)*), halves!(@four $plane "28" next $($row)*),
        )
    };
    (@four $plane:literal $k:literal $which:ident
        $(($quants:literal $scales:literal $at:literal $low:literal $high:literal))*) => {
        concat!(
            "vmovdqu ymm12, ymmword ptr [{codes} + ", $plane, " + 8 * ", $k, "]\n",
            "vpsrlw ymm13, ymm12, 4\n",
            "vpand ymm12, ymm12, ymmword ptr [{work}]\n",
            "vpand ymm13, ymm13, ymmword ptr [{work}]\n",
            $(
                "vpbroadcastd ymm14, dword ptr [", $quants, " + ", $k, "]\n",
                halves!(@$which $low $high),
            )*
        )
    };
    (@first $low:literal $high:literal) => {
        concat!("vpmaddubsw ", $low, ", ymm12, ymm14\n", "vpmaddubsw ", $high, ", ymm13, ymm14\n")
    };
    (@next $low:literal $high:literal) => {
        concat!(
            "vpmaddubsw ymm15, ymm12, ymm14\n",
            "vpmaddubsw ymm14, ymm13, ymm14\n",
            "vpaddw ", $low, ", ", $low, ", ymm15\n",
            "vpaddw ", $high, ", ", $high, ", ymm14\n",
        )
    };
}
use halves;

/// A block of more than four bits a code has four more cache lines.
macro_rules! more_ahead {
    () => {
        concat!(
            "prefetcht0 byte ptr [{codes} + 2368]\n",
            "prefetcht0 byte ptr [{codes} + 2432]\n",
            "prefetcht0 byte ptr [{codes} + 2496]\n",
            "prefetcht0 byte ptr [{codes} + 2560]\n",
        )
    };
}
use more_ahead;

/// Adds a block's sums to a row's totals: offset times the row's sum, then sums times both scales.
macro_rules! scaled {
    ($kind:ident ($quants:literal $scales:literal $at:literal $low:literal $high:literal)) => {
        concat!(
            $kind!(@widen $at $low $high),
            "vbroadcastss ymm15, dword ptr [", $scales, " + 4]\n",
            "vmovups ymm12, ymmword ptr [{totals} + ", $at, "]\n",
            "vmovups ymm13, ymmword ptr [{totals} + ", $at, " + 32]\n",
            "vfmadd231ps ymm12, ymm15, ymmword ptr [{work} + 128]\n",
            "vfmadd231ps ymm13, ymm15, ymmword ptr [{work} + 160]\n",
            "vbroadcastss ymm14, dword ptr [", $scales, "]\n",
            "vcvtdq2ps ", $low, ", ", $low, "\n",
            "vcvtdq2ps ", $high, ", ", $high, "\n",
            "vmulps ", $low, ", ", $low, ", ymmword ptr [{work} + 64]\n",
            "vmulps ", $high, ", ", $high, ", ymmword ptr [{work} + 96]\n",
            "vfmadd231ps ymm12, ymm14, ", $low, "\n",
            "vfmadd231ps ymm13, ymm14, ", $high, "\n",
            "vmovups ymmword ptr [{totals} + ", $at, "], ymm12\n",
            "vmovups ymmword ptr [{totals} + ", $at, " + 32], ymm13\n",
        )
    };
}
use scaled;
