//! Weights as the builder stores them: rows or columns of floats, or codes in blocks.

use half::f16;

use super::data::{Span, Type};
use crate::model::{AffineBlock, BLOCK, TensorInfo, affine::rounded};

/// A matrix of `rows` outputs with `columns` inputs each, or some rows of a larger one.
#[derive(Clone)]
pub struct Matrix {
    pub columns: usize,
    pub rows: usize,
    /// Its first row, of those that are stored.
    first: usize,
    stored: Stored,
    is_vector: bool,
}

#[derive(Clone)]
pub enum Stored {
    /// Row after row.
    Rows {
        ty: Type,
        data: Span,
    },
    /// Column after column, `outputs` long each.
    Columns {
        ty: Type,
        data: Span,
        outputs: usize,
    },
    Blocks(Blocks),
}

/// `weight = (code - zero) * scale`, both of one block; a row's last block may be shorter.
#[derive(Clone)]
pub struct Blocks {
    /// 4 or 8.
    pub bits: usize,
    /// Codes of a block, a multiple of 32.
    pub block: usize,
    /// Blocks of a row.
    pub blocks: usize,
    /// Codes from one row to the next.
    pub row_codes: usize,
    pub codes: Span,
    pub scale_type: Type,
    pub scales: Span,
    /// As many bits as a code.
    pub zeros: Option<Span>,
    /// Zeros from one row to the next.
    pub zero_stride: usize,
    /// Where none is stored.
    pub zero: u8,
    /// Stored codes and zeros are two's complement.
    pub is_signed: bool,
}

impl Matrix {
    pub fn new(columns: usize, rows: usize, stored: Stored) -> Self {
        Self { columns, rows, first: 0, stored, is_vector: false }
    }

    pub fn vector(numbers: usize, ty: Type, data: Span) -> Self {
        Self { is_vector: true, ..Self::new(numbers, 1, Stored::Rows { ty, data }) }
    }

    /// Some of its rows, which it has.
    pub fn slice(&self, first: usize, rows: usize) -> Self {
        assert!(first + rows <= self.rows, "rows that a matrix has");
        Self { first: self.first + first, rows, ..self.clone() }
    }

    /// Whether it is the same numbers, because it is the same bytes in the same order.
    pub fn is(&self, other: &Self) -> bool {
        let is_stored = match (&self.stored, &other.stored) {
            (Stored::Rows { ty, data }, Stored::Rows { ty: other, data: bytes }) => ty == other && data.is(bytes),
            (Stored::Columns { data, .. }, Stored::Columns { data: bytes, .. }) => data.is(bytes),
            (Stored::Blocks(one), Stored::Blocks(other)) => one.is(other),
            _ => false,
        };
        is_stored && (self.columns, self.first, self.rows) == (other.columns, other.first, other.rows)
    }

    pub fn info(&self) -> TensorInfo {
        let (columns, rows) = (self.columns as u64, self.rows as u64);
        let dims = if self.is_vector { vec![columns] } else { vec![columns, rows] };
        let (format, bytes, affine_bits) = match &self.stored {
            Stored::Rows { ty, .. } | Stored::Columns { ty, .. } => {
                (format!("{ty:?}"), columns * rows * if *ty == Type::F32 { 4 } else { 2 }, 8)
            }
            Stored::Blocks(b) => {
                let bytes = rows * (b.blocks * (b.block * b.bits / 8 + 4)) as u64;
                (format!("INT{}", b.bits), bytes, b.bits as u32)
            }
        };
        TensorInfo::new(dims, format, bytes, affine_bits)
    }

    /// Rows from `from` on, as many as `out` has room for.
    pub fn numbers(&self, from: usize, out: &mut [f32]) {
        // Neighbours in a column share a cache line.
        const ROWS: usize = 16;
        let from = self.first + from;
        match &self.stored {
            Stored::Rows { ty, data } => {
                for (i, out) in out.iter_mut().enumerate() {
                    *out = data.float(*ty, from * self.columns + i);
                }
            }
            Stored::Columns { ty, data, outputs } => {
                for (tile, out) in out.chunks_mut(ROWS * self.columns).enumerate() {
                    for column in 0..self.columns {
                        let at = column * outputs + from + tile * ROWS;
                        for (i, row) in out.chunks_exact_mut(self.columns).enumerate() {
                            row[column] = data.float(*ty, at + i);
                        }
                    }
                }
            }
            Stored::Blocks(blocks) => {
                for (row, out) in out.chunks_exact_mut(self.columns).enumerate() {
                    for (at, out) in out.chunks_mut(blocks.block).enumerate() {
                        let (scale, zero) = blocks.scale_and_zero(from + row, at);
                        for (i, out) in out.iter_mut().enumerate() {
                            *out = (f32::from(blocks.code(from + row, at * blocks.block + i)) - zero) * scale;
                        }
                    }
                }
            }
        }
    }

    /// A row in blocks of 32. Codes stay as they are; scales are rounded to half precision.
    pub fn affine(&self, row: usize, out: &mut [AffineBlock]) {
        if let Stored::Blocks(blocks) = &self.stored {
            let row = self.first + row;
            for (at, out) in out.iter_mut().enumerate() {
                let (scale, zero) = blocks.scale_and_zero(row, at * BLOCK / blocks.block);
                let scale = f16::from_f32(scale);
                *out = AffineBlock {
                    codes: std::array::from_fn(|i| blocks.code(row, at * BLOCK + i)),
                    scale,
                    // Of the rounded scale, so that what was zero is zero wherever the product fits.
                    offset: f16::from_f32(-zero * scale.to_f32()),
                };
            }
        } else {
            let mut numbers = vec![0.0; self.columns];
            self.numbers(row, &mut numbers);
            for (out, numbers) in out.iter_mut().zip(numbers.as_chunks::<BLOCK>().0) {
                *out = rounded(numbers);
            }
        }
    }
}

impl Blocks {
    fn is(&self, other: &Self) -> bool {
        let layout = |b: &Self| (b.bits, b.block, b.row_codes, b.zero_stride, b.zero, b.is_signed);
        let is_zeros = match (&self.zeros, &other.zeros) {
            (Some(one), Some(other)) => one.is(other),
            (one, other) => one.is_none() && other.is_none(),
        };
        is_zeros && self.codes.is(&other.codes) && self.scales.is(&other.scales) && layout(self) == layout(other)
    }

    fn code(&self, row: usize, at: usize) -> u8 {
        self.unpacked(self.codes.bytes(), row * self.row_codes + at)
    }

    fn scale_and_zero(&self, row: usize, block: usize) -> (f32, f32) {
        let scale = self.scales.float(self.scale_type, row * self.blocks + block);
        let stored = |zeros: &Span| self.unpacked(zeros.bytes(), row * self.zero_stride + block);
        let zero = self.zeros.as_ref().map_or(self.zero, stored);
        (scale, f32::from(zero))
    }

    /// The low half of a byte comes first.
    fn unpacked(&self, bytes: &[u8], at: usize) -> u8 {
        let sign = if self.is_signed { 1 << (self.bits - 1) } else { 0 };
        let code = if self.bits == 8 { bytes[at] } else { bytes[at / 2] >> (at % 2 * 4) & 15 };
        code ^ sign
    }
}
