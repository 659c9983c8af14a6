//! Matrix products on the weights as their file has them: small whole numbers in blocks of 32.
//!
//! `out[row][column] = Σ over blocks of scale · rowscale · (codes · quants) + offset · rowsum`, where the
//! inner product is of whole numbers and exact. Each output is one sum in the order of the blocks, so it is
//! the same to the bit whatever rows are computed with it, on any thread and by any of the kernels.
//!
//! Weights are packed in panels of [`PANEL`] columns: for each block of inputs the codes, four inputs by
//! sixteen columns to a vector, then the columns' scales and offsets. A code of more than four bits lies in
//! two planes, its low and its high half.

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
/// Bytes of one plane of a block of codes: half a byte each.
const PLANE_BYTES: usize = BLOCK * PANEL / 2;
/// Bytes of a block's scales and offsets, in half precision.
const TAIL_BYTES: usize = 2 * PANEL * size_of::<f16>();
/// Vectors load faster from whole cache lines.
const ALIGNMENT: usize = 64;

/// One matrix, or several with the same inputs side by side.
pub struct Linear {
    pub inputs: usize,
    pub outputs: usize,
    panels: Vec<Panel>,
    bytes: Vec<u8>,
}

/// Where the panels of a matrix stand in its bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    pub inputs: usize,
    pub outputs: usize,
    pub bytes: usize,
    panels: Vec<Panel>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Panel {
    offset: usize,
    planes: usize,
    /// Its first column, and how many of its columns there are.
    column: usize,
    columns: usize,
}

impl Panel {
    fn block_bytes(self) -> usize {
        self.planes * PLANE_BYTES + TAIL_BYTES
    }
}

impl Linear {
    /// Packs tensors of the same `inputs`, the outputs of one after those of the other.
    ///
    /// # Errors
    /// A tensor is missing, has another shape, or a weight that is no finite number.
    pub fn pack(tensors: &Tensors, parts: &[(&str, usize)], inputs: usize) -> Result<Self, ModelError> {
        let mut panels = Vec::new();
        let (mut column, mut offset) = (0, 0);
        for (name, outputs) in parts {
            let info = tensors.tensor(name)?;
            let expected = [inputs as u64, *outputs as u64];
            if info.dims != expected || !inputs.is_multiple_of(BLOCK) {
                let (name, found) = ((*name).to_owned(), info.dims.clone());
                return Err(ModelError::WrongShape { name, found, expected: expected.into() });
            }
            let planes = if info.affine_bits() > 4 { 2 } else { 1 };
            for from in (0..*outputs).step_by(PANEL) {
                let columns = PANEL.min(outputs - from);
                let panel = Panel { offset, planes, column: column + from, columns };
                offset += panel.block_bytes() * (inputs / BLOCK);
                panels.push(panel);
            }
            column += outputs;
        }
        let bytes = vec![0u8; offset + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT) % ALIGNMENT;
        panels.iter_mut().for_each(|panel| panel.offset += start);
        let linear = Self { inputs, outputs: column, panels, bytes };
        linear.filled(tensors, parts)
    }

    fn filled(mut self, tensors: &Tensors, parts: &[(&str, usize)]) -> Result<Self, ModelError> {
        let empty = AffineBlock { codes: [0; BLOCK], scale: f16::ZERO, offset: f16::ZERO };
        let mut blocks = vec![empty; self.inputs / BLOCK];
        let mut first = 0;
        for (name, outputs) in parts {
            let panels = self.panels.iter().filter(|p| (first..first + outputs).contains(&p.column));
            for panel in panels {
                for lane in 0..panel.columns {
                    tensors.affine_row(name, panel.column + lane - first, &mut blocks)?;
                    let bytes = &mut self.bytes[panel.offset..][..panel.block_bytes() * blocks.len()];
                    for (block, bytes) in blocks.iter().zip(bytes.chunks_exact_mut(panel.block_bytes())) {
                        put(block, lane, panel.planes, bytes);
                    }
                }
            }
            first += outputs;
        }
        Ok(self)
    }

    /// The bytes, and how they are to be read.
    pub fn into_parts(self) -> (Layout, Vec<u8>) {
        let Self { inputs, outputs, panels, bytes } = self;
        (Layout { inputs, outputs, bytes: bytes.len(), panels }, bytes)
    }
}

/// Writes one column's block.
fn put(block: &AffineBlock, lane: usize, planes: usize, bytes: &mut [u8]) {
    let (half, column) = (lane / 8, lane % 8);
    for (k, code) in block.codes.iter().enumerate() {
        let at = k / 4 * 32 + column * 4 + k % 4;
        for plane in 0..planes {
            bytes[plane * PLANE_BYTES + at] |= (code >> (4 * plane) & 15) << (4 * half);
        }
    }
    let tail = &mut bytes[planes * PLANE_BYTES..];
    tail[lane * 2..][..2].copy_from_slice(&block.scale.to_le_bytes());
    tail[PANEL * 2 + lane * 2..][..2].copy_from_slice(&block.offset.to_le_bytes());
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
        let kernel = *KERNEL;
        let mut sums = [[0.0; PANEL]; TILE_ROWS_MAX];
        for panel in &self.panels[panels] {
            let job = self.job(weights, panel, rows);
            let mut row = 0;
            while row < rows.count {
                let done = job.tile(kernel, row, &mut sums);
                for (i, sums) in sums[..done].iter().enumerate() {
                    let at = (row + i) * self.outputs + panel.column;
                    // SAFETY: within the target, by the caller's promise, and nobody else's.
                    let out = unsafe { std::slice::from_raw_parts_mut(target.data.add(at), panel.columns) };
                    let residual = target.residual.map(|residual| &residual[at..][..panel.columns]);
                    match out.len() {
                        PANEL => write(&mut out[..PANEL], sums, residual),
                        _ => write(out, sums, residual),
                    }
                }
                row += done;
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
        let kernel = *KERNEL;
        let mut sums = [[0.0; PANEL]; TILE_ROWS_MAX];
        let mut both = [[0.0; 2 * BLOCK]; TILE_ROWS_MAX];
        for block in blocks {
            let mut row = 0;
            while row < rows.count {
                let mut done = 0;
                for part in 0..2 * PANELS_A_BLOCK {
                    let (second, panel) = (part / PANELS_A_BLOCK, part % PANELS_A_BLOCK);
                    let panel = &self.panels[second * half + block * PANELS_A_BLOCK + panel];
                    // As many rows for every panel: a kernel decides by what is left.
                    done = self.job(weights, panel, rows).tile(kernel, row, &mut sums);
                    for (both, sums) in both.iter_mut().zip(&sums[..done]) {
                        both[part * PANEL..][..PANEL].copy_from_slice(sums);
                    }
                }
                for (i, both) in both[..done].iter().enumerate() {
                    take(row + i, block, both);
                }
                row += done;
            }
        }
    }

    fn check(&self, weights: &[u8], rows: Rows) {
        assert!(weights.len() == self.bytes && rows.quants.len() == rows.count * self.inputs);
        assert!(rows.scales.len() == rows.count * self.inputs / BLOCK * 2);
    }

    fn job<'a>(&self, weights: &'a [u8], panel: &Panel, rows: Rows<'a>) -> Job<'a> {
        let bytes = &weights[panel.offset..][..panel.block_bytes() * (self.inputs / BLOCK)];
        Job { bytes, planes: panel.planes, inputs: self.inputs, rows }
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
    planes: usize,
    inputs: usize,
    rows: Rows<'a>,
}

/// Rows that a kernel computes at once, at most.
const TILE_ROWS_MAX: usize = 8;
type Sums = [[f32; PANEL]; TILE_ROWS_MAX];

impl Job<'_> {
    /// Writes the sums of some rows from `row` on; how many.
    fn tile(&self, kernel: KernelKind, row: usize, sums: &mut Sums) -> usize {
        match kernel {
            KernelKind::Plain => plain::tile(self, row, sums),
            // SAFETY: the kernel was chosen because the machine has its instructions.
            #[cfg(target_arch = "x86_64")]
            KernelKind::Avx2 => unsafe { avx2::tile(self, row, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            KernelKind::Avx512Vnni => unsafe { avx512::tile(self, row, sums) },
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
    (1..=2).all(|planes| {
        let mut bytes = vec![0u8; 3 * (planes * PLANE_BYTES + TAIL_BYTES)];
        for block in bytes.chunks_exact_mut(planes * PLANE_BYTES + TAIL_BYTES) {
            let (codes, tail) = block.split_at_mut(planes * PLANE_BYTES);
            codes.iter_mut().for_each(|byte| *byte = next() as u8);
            for number in tail.as_chunks_mut::<2>().0 {
                *number = f16::from_f32(next() as f32 / u32::MAX as f32 - 0.5).to_le_bytes();
            }
        }
        (1..=TILE_ROWS_MAX).all(|count| {
            let quants: Vec<i8> = (0..count * inputs).map(|_| (next() % 255) as i8).map(|q| q.max(-127)).collect();
            let scales: Vec<f32> = (0..count * 6).map(|_| next() as f32 / u32::MAX as f32).collect();
            let rows = Rows { count, quants: &quants, scales: &scales };
            let job = Job { bytes: &bytes, planes, inputs, rows };
            let mut row = 0;
            let (mut sums, mut expected) = ([[0.0; PANEL]; TILE_ROWS_MAX], [[0.0; PANEL]; TILE_ROWS_MAX]);
            while row < count {
                let done = job.tile(kernel, row, &mut sums);
                for (i, sums) in sums[..done].iter().enumerate() {
                    plain::tile(&job, row + i, &mut expected);
                    if sums.map(f32::to_bits) != expected[0].map(f32::to_bits) {
                        return false;
                    }
                }
                row += done;
            }
            true
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
        let mut panel = vec![0u8; 2 * (2 * PLANE_BYTES + TAIL_BYTES)];
        let blocks: Vec<AffineBlock> = (0..PANEL * 2)
            .map(|i| AffineBlock {
                codes: std::array::from_fn(|k| (i * 31 + k * 7) as u8),
                scale: f16::from_f32(0.5 + i as f32 / 64.0),
                offset: f16::from_f32(-3.0 + i as f32 / 16.0),
            })
            .collect();
        for lane in 0..PANEL {
            for (b, bytes) in panel.chunks_exact_mut(2 * PLANE_BYTES + TAIL_BYTES).enumerate() {
                put(&blocks[lane * 2 + b], lane, 2, bytes);
            }
        }
        let quants: Vec<i8> = (0..64).map(|k| (k * 5 % 255) as i8).collect();
        let sum = |b: usize| quants[b * 32..][..32].iter().map(|q| f32::from(*q)).sum::<f32>();
        let scales = [0.25, 0.25 * sum(0), 2.0, 2.0 * sum(1)];
        let rows = Rows { count: 1, quants: &quants, scales: &scales };
        let mut sums = [[0.0; PANEL]; TILE_ROWS_MAX];
        Job { bytes: &panel, planes: 2, inputs: 64, rows }.tile(*KERNEL, 0, &mut sums);
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
