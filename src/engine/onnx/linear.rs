//! Matrix products on the weights as their file has them: small whole numbers in blocks of 32.
//!
//! `out[row][column] = Σ over blocks of scale · rowscale · (codes · quants) + offset · rowsum`, where the
//! inner product is of whole numbers and exact. Each output is one sum in the order of the blocks, so it is
//! the same to the bit whatever rows are computed with it, on any thread and by any of the kernels.
//!
//! Weights are packed in panels of [`PANEL`] columns: for each block of inputs the codes, four inputs by
//! sixteen columns to a vector, then the columns' scales and offsets. Codes of eight bits are in two planes, of
//! their low and of their high halves; codes of five to seven bits are bytes.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod plain;

use std::{ops::Range, sync::LazyLock};

use half::f16;

use crate::{
    engine::simd::HAS_AVX2,
    model::{AffineBlock, BLOCK, ModelError, Tensors},
};

/// Columns that are computed together.
pub const PANEL: usize = 16;
const PANELS_A_BLOCK: usize = BLOCK / PANEL;
/// Vectors load faster from whole ones.
pub const CACHE_LINE: usize = 64;
/// Bytes of four bits of each of a block's codes.
const PLANE_BYTES: usize = BLOCK * PANEL / 2;
/// Bytes of a block's scales and offsets, in half precision.
const TAIL_BYTES: usize = 2 * PANEL * size_of::<f16>();

/// How a matrix, or several with the same inputs side by side, stands in the bytes of all of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    pub inputs: usize,
    pub outputs: usize,
    /// A multiple of the cache line.
    pub bytes: usize,
    panels: Vec<Panel>,
}

/// How many bits the codes of a panel have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Codes {
    Four,
    Seven,
    Eight,
}

impl Codes {
    const ALL: [Self; 3] = [Self::Four, Self::Seven, Self::Eight];

    /// The fewest that hold codes of so many bits.
    fn of(bits: u32) -> Self {
        Self::ALL.into_iter().find(|codes| codes.bits() >= bits).unwrap_or(Self::Eight)
    }

    fn bits(self) -> u32 {
        match self {
            Self::Four => 4,
            Self::Seven => 7,
            Self::Eight => 8,
        }
    }

    /// Of one block of a panel.
    fn bytes(self) -> usize {
        code_bytes(self.bits())
    }
}

/// Of one block of a panel.
const fn code_bytes(bits: u32) -> usize {
    if bits > 4 { 2 * PLANE_BYTES } else { PLANE_BYTES }
}

/// Bytes of a packed matrix of `weights` numbers, whose codes have `bits` bits.
pub fn packed_bytes(weights: u64, bits: u32) -> u64 {
    let a_column = (Codes::of(bits).bytes() + TAIL_BYTES) / PANEL;
    weights / BLOCK as u64 * a_column as u64
}

/// What is packed side by side: tensors of one width, by name, and how many outputs each has.
pub type Parts<'a> = [(&'a str, usize)];

#[derive(Clone, Copy, Debug, PartialEq)]
struct Panel {
    /// From the matrix's first byte.
    offset: usize,
    codes: Codes,
    /// Its first column, and how many of its columns there are.
    column: usize,
    columns: usize,
}

impl Panel {
    fn block_bytes(self) -> usize {
        self.codes.bytes() + TAIL_BYTES
    }
}

impl Layout {
    /// For tensors of the same `inputs`, the outputs of one after those of the other. Codes of more than
    /// `bits_max` bits are rounded.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn new(tensors: &Tensors, parts: &Parts, inputs: usize, bits_max: u32) -> Result<Self, ModelError> {
        let mut panels = Vec::new();
        let (mut column, mut offset) = (0, 0);
        for (name, outputs) in parts {
            let info = tensors.tensor(name)?;
            let expected = [inputs as u64, *outputs as u64];
            if info.dims != expected || !inputs.is_multiple_of(BLOCK) {
                let (name, found) = ((*name).to_owned(), info.dims.clone());
                return Err(ModelError::WrongShape { name, found, expected: expected.into() });
            }
            let codes = Codes::of(info.affine_bits().min(bits_max));
            for from in (0..*outputs).step_by(PANEL) {
                let columns = PANEL.min(outputs - from);
                let panel = Panel { offset, codes, column: column + from, columns };
                offset += panel.block_bytes() * (inputs / BLOCK);
                panels.push(panel);
            }
            column += outputs;
        }
        Ok(Self { inputs, outputs: column, bytes: offset, panels })
    }

    /// Writes the weights into `bytes`, which are zeros.
    ///
    /// # Errors
    /// A weight is no finite number.
    ///
    /// # Panics
    /// If `bytes` or `parts` are not this layout's.
    pub fn pack(&self, tensors: &Tensors, parts: &Parts, bytes: &mut [u8]) -> Result<(), ModelError> {
        assert!(bytes.len() == self.bytes && parts.iter().map(|(_, outputs)| outputs).sum::<usize>() == self.outputs);
        let empty = AffineBlock { codes: [0; BLOCK], scale: f16::ZERO, offset: f16::ZERO };
        let mut blocks = vec![empty; self.inputs / BLOCK];
        let mut first = 0;
        for (name, outputs) in parts {
            let bits = tensors.tensor(name)?.affine_bits();
            let panels = self.panels.iter().filter(|p| (first..first + outputs).contains(&p.column));
            for panel in panels {
                for lane in 0..panel.columns {
                    tensors.affine_row(name, panel.column + lane - first, &mut blocks)?;
                    if bits > panel.codes.bits() {
                        blocks.iter_mut().for_each(|block| *block = block.rounded_to(panel.codes.bits()));
                    }
                    let bytes = &mut bytes[panel.offset..][..panel.block_bytes() * blocks.len()];
                    for (block, bytes) in blocks.iter().zip(bytes.chunks_exact_mut(panel.block_bytes())) {
                        put(block, lane, panel.codes, bytes);
                    }
                }
            }
            first += outputs;
        }
        Ok(())
    }
}

/// Writes one column's block.
fn put(block: &AffineBlock, lane: usize, codes: Codes, bytes: &mut [u8]) {
    for (k, code) in block.codes.iter().enumerate() {
        if codes == Codes::Seven {
            bytes[byte_place(lane, k)] = *code;
        } else {
            let (at, shift) = half_place(lane, k);
            bytes[at] |= (code & 15) << shift;
            if codes == Codes::Eight {
                bytes[PLANE_BYTES + at] |= code >> 4 << shift;
            }
        }
    }
    let tail = &mut bytes[codes.bytes()..];
    tail[lane * 2..][..2].copy_from_slice(&block.scale.to_le_bytes());
    tail[PANEL * 2 + lane * 2..][..2].copy_from_slice(&block.offset.to_le_bytes());
}

/// Which byte and bit of a plane the half of input `k`'s code begins at: four inputs of a column are neighbours,
/// and the second eight columns have the high halves of the first ones' bytes.
fn half_place(lane: usize, k: usize) -> (usize, usize) {
    (k / 4 * 32 + lane % 8 * 4 + k % 4, lane / 8 * 4)
}

/// Which byte input `k`'s code is.
fn byte_place(lane: usize, k: usize) -> usize {
    k / 4 * 4 * PANEL + lane * 4 + k % 4
}

/// Quantised rows: what a matrix is multiplied with.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub count: usize,
    /// `[count, inputs]`
    pub quants: &'a [i8],
    /// `[count, inputs / 32, 2]`: of each block its scale, and that times the sum of its quants.
    pub scales: &'a [f32],
}

/// Where products go: `[count, outputs]`, row-major.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    pub data: *mut f32,
    /// Added to the products, where there is one. Of the same shape.
    pub residual: Option<&'a [f32]>,
}

// SAFETY: threads write different columns; see `multiply`.
unsafe impl Send for Target<'_> {}
// SAFETY: as above.
unsafe impl Sync for Target<'_> {}

impl Layout {
    pub fn panels(&self) -> usize {
        self.panels.len()
    }

    /// Computes the columns of some panels for all rows.
    ///
    /// # Safety
    /// `target.data` is valid for all rows and columns, and nobody else uses the columns of these panels.
    ///
    /// # Panics
    /// If `weights`, `rows` or the residual are of another shape.
    pub unsafe fn multiply(&self, weights: &[u8], panels: Range<usize>, rows: Rows, target: Target) {
        self.check(weights, rows);
        assert!(target.residual.is_none_or(|r| r.len() == rows.count * self.outputs));
        let mut sums = Sums([[0.0; PANEL]; TILE_ROWS_MAX]);
        for panel in &self.panels[panels] {
            let job = self.job(weights, panel, rows);
            for tile in tiles(rows.count) {
                let sums = &mut sums.0[..tile.len()];
                job.tile(*KERNEL, tile.clone(), sums);
                for (row, sums) in tile.zip(sums) {
                    let at = row * self.outputs + panel.column;
                    // SAFETY: within the target, by the caller's promise, and nobody else's.
                    let out = unsafe { std::slice::from_raw_parts_mut(target.data.add(at), panel.columns) };
                    let residual = target.residual.map(|residual| &residual[at..][..panel.columns]);
                    match out.len() {
                        PANEL => write(&mut out[..PANEL], sums, residual),
                        _ => write(out, sums, residual),
                    }
                }
            }
        }
    }
}

impl Layout {
    /// For matrices of two parts with as many outputs each: computes blocks of 32 columns of the first part
    /// together with the same of the second, and hands each row's to `take(row, block, both)`; `both` has the
    /// first part's columns, then the second's.
    ///
    /// # Panics
    /// As [`Layout::multiply`], and if the parts are not whole blocks.
    pub fn multiply_pairs(
        &self,
        weights: &[u8],
        blocks: Range<usize>,
        rows: Rows,
        take: impl Fn(usize, usize, &[f32; 2 * BLOCK]),
    ) {
        self.check(weights, rows);
        let half = self.panels.len() / 2;
        assert!(self.panels.iter().all(|panel| panel.columns == PANEL) && half.is_multiple_of(PANELS_A_BLOCK));
        let mut sums = Sums([[0.0; PANEL]; TILE_ROWS_MAX]);
        let mut both = [[0.0; 2 * BLOCK]; TILE_ROWS_MAX];
        for block in blocks {
            for tile in tiles(rows.count) {
                let sums = &mut sums.0[..tile.len()];
                for part in 0..2 * PANELS_A_BLOCK {
                    let (second, panel) = (part / PANELS_A_BLOCK, part % PANELS_A_BLOCK);
                    let panel = &self.panels[second * half + block * PANELS_A_BLOCK + panel];
                    self.job(weights, panel, rows).tile(*KERNEL, tile.clone(), sums);
                    for (both, sums) in both.iter_mut().zip(&*sums) {
                        both[part * PANEL..][..PANEL].copy_from_slice(sums);
                    }
                }
                for (row, both) in tile.zip(&both) {
                    take(row, block, both);
                }
            }
        }
    }

    fn check(&self, weights: &[u8], rows: Rows) {
        assert!(weights.len() == self.bytes && rows.quants.len() == rows.count * self.inputs);
        assert!(rows.scales.len() == rows.count * self.inputs / BLOCK * 2);
    }

    fn job<'a>(&self, weights: &'a [u8], panel: &Panel, rows: Rows<'a>) -> Job<'a> {
        let bytes = &weights[panel.offset..][..panel.block_bytes() * (self.inputs / BLOCK)];
        Job { bytes, codes: panel.codes, inputs: self.inputs, rows }
    }
}

/// The sums, and plus the residual. Of a constant length where it is inlined for a whole panel.
#[inline(always)]
fn write(out: &mut [f32], sums: &[f32], residual: Option<&[f32]>) {
    match residual {
        None => out.iter_mut().zip(sums).for_each(|(out, sum)| *out = *sum),
        Some(residual) => {
            for ((out, sum), x) in out.iter_mut().zip(sums).zip(residual) {
                *out = sum + x;
            }
        }
    }
}

/// One panel and all rows.
struct Job<'a> {
    bytes: &'a [u8],
    codes: Codes,
    inputs: usize,
    rows: Rows<'a>,
}

/// Rows that a kernel is given at once, at most: two of the largest tiles that fit the registers with AVX2, three
/// of its smaller ones.
const TILE_ROWS_MAX: usize = 12;

/// Of a tile: a cache line a row.
#[repr(align(64))]
struct Sums([[f32; PANEL]; TILE_ROWS_MAX]);

fn tiles(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(TILE_ROWS_MAX).map(move |from| from..rows.min(from + TILE_ROWS_MAX))
}

impl Job<'_> {
    /// Writes the sums of some rows, at most [`TILE_ROWS_MAX`].
    fn tile(&self, kernel: KernelKind, rows: Range<usize>, sums: &mut [[f32; PANEL]]) {
        match kernel {
            KernelKind::Plain => plain::tile(self, rows, sums),
            // SAFETY: the kernel was chosen because the machine has its instructions.
            #[cfg(target_arch = "x86_64")]
            KernelKind::Avx2 => unsafe { avx2::tile(self, rows, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            KernelKind::Avx512Vnni => unsafe { avx512::tile(self, rows, sums) },
        }
    }

    /// Row `row`'s quants and scales.
    fn row(&self, row: usize) -> (*const i8, *const f32) {
        let quants = &self.rows.quants[row * self.inputs..][..self.inputs];
        let scales = &self.rows.scales[row * self.inputs / BLOCK * 2..][..self.inputs / BLOCK * 2];
        (quants.as_ptr(), scales.as_ptr())
    }

    fn blocks(&self) -> usize {
        self.inputs / BLOCK
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum KernelKind {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
}

/// The fastest kernel whose instructions the machine has and whose results are those of the plain one.
static KERNEL: LazyLock<KernelKind> = LazyLock::new(|| {
    let mut best = KernelKind::Plain;
    #[cfg(target_arch = "x86_64")]
    {
        if *HAS_AVX2 {
            best = KernelKind::Avx2;
        }
        let has_dot = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni");
        if *HAS_AVX2 && has_dot && is_x86_feature_detected!("avx512bw") {
            best = KernelKind::Avx512Vnni;
        }
    }
    if !agrees_with_plain(best) {
        tracing::error!(kernel = ?best, "a matrix kernel computes other numbers than it should here; using the slow one");
        best = KernelKind::Plain;
    }
    best
});

/// Whether a kernel has the plain one's results, to the bit, on a few pseudo-random blocks.
fn agrees_with_plain(kernel: KernelKind) -> bool {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u32
    };
    let inputs = 3 * BLOCK;
    Codes::ALL.into_iter().all(|kind| {
        let mut bytes = vec![0u8; 3 * (kind.bytes() + TAIL_BYTES)];
        for block in bytes.chunks_exact_mut(kind.bytes() + TAIL_BYTES) {
            let (codes, tail) = block.split_at_mut(kind.bytes());
            let most = if kind == Codes::Seven { 0x7f } else { 0xff };
            codes.iter_mut().for_each(|byte| *byte = next() as u8 & most);
            for number in tail.as_chunks_mut::<2>().0 {
                *number = f16::from_f32(next() as f32 / u32::MAX as f32 - 0.5).to_le_bytes();
            }
        }
        (1..=TILE_ROWS_MAX).all(|count| {
            let quants: Vec<i8> = (0..count * inputs).map(|_| (next() % 255) as i8).map(|q| q.max(-127)).collect();
            let scales: Vec<f32> = (0..count * 6).map(|_| next() as f32 / u32::MAX as f32).collect();
            let job =
                Job { bytes: &bytes, codes: kind, inputs, rows: Rows { count, quants: &quants, scales: &scales } };
            let [found, expected] = [kernel, KernelKind::Plain].map(|kernel| {
                let mut sums = [[0.0; PANEL]; TILE_ROWS_MAX];
                job.tile(kernel, 0..count, &mut sums[..count]);
                sums.map(|row| row.map(f32::to_bits))
            });
            found == expected
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_of_this_machine_has_the_plain_one_s_results() {
        let mut kernels = vec![KernelKind::Plain];
        #[cfg(target_arch = "x86_64")]
        {
            if *HAS_AVX2 {
                kernels.push(KernelKind::Avx2);
            }
            if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512bw") {
                kernels.push(KernelKind::Avx512Vnni);
            }
        }
        for kernel in kernels {
            assert!(agrees_with_plain(kernel), "{kernel:?}");
        }
    }

    #[test]
    fn products_are_those_of_the_weights_that_were_packed() {
        for codes in Codes::ALL {
            products_are_those_of(codes);
        }
    }

    fn products_are_those_of(kind: Codes) {
        let bytes = kind.bytes() + TAIL_BYTES;
        let mut panel = vec![0u8; 2 * bytes];
        let blocks: Vec<AffineBlock> = (0..PANEL * 2)
            .map(|i| AffineBlock {
                codes: std::array::from_fn(|k| ((i * 31 + k * 7) % (1 << kind.bits())) as u8),
                scale: f16::from_f32(0.5 + i as f32 / 64.0),
                offset: f16::from_f32(-3.0 + i as f32 / 16.0),
            })
            .collect();
        for lane in 0..PANEL {
            for (b, bytes) in panel.chunks_exact_mut(bytes).enumerate() {
                put(&blocks[lane * 2 + b], lane, kind, bytes);
            }
        }
        let quants: Vec<i8> = (0..64).map(|k| (k * 5 % 255) as i8).collect();
        let sum = |b: usize| quants[b * 32..][..32].iter().map(|q| f32::from(*q)).sum::<f32>();
        let scales = [0.25, 0.25 * sum(0), 2.0, 2.0 * sum(1)];
        let rows = Rows { count: 1, quants: &quants, scales: &scales };
        let mut sums = [[0.0; PANEL]];
        Job { bytes: &panel, codes: kind, inputs: 64, rows }.tile(*KERNEL, 0..1, &mut sums);
        for (lane, sum) in sums[0].iter().enumerate() {
            let mut expected = 0.0;
            for (b, scale) in [0.25f64, 2.0].into_iter().enumerate() {
                let block = &blocks[lane * 2 + b];
                for (k, code) in block.codes.iter().enumerate() {
                    let weight = f64::from(block.scale.to_f32()) * f64::from(*code) + f64::from(block.offset.to_f32());
                    expected += weight * scale * f64::from(quants[b * 32 + k]);
                }
            }
            assert!((f64::from(*sum) - expected).abs() < 1e-5 * expected.abs().max(1e3), "{lane}: {sum} {expected}");
        }
    }
}
