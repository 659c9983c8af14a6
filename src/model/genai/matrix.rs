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
            Stored::Rows { ty, data } => data.floats(*ty, from * self.columns, out),
            Stored::Columns { ty, data, outputs } => {
                for (tile, out) in out.chunks_mut(ROWS * self.columns).enumerate() {
                    let mut neighbours = [0.0; ROWS];
                    let neighbours = &mut neighbours[..out.len() / self.columns];
                    for column in 0..self.columns {
                        data.floats(*ty, column * outputs + from + tile * ROWS, neighbours);
                        for (row, number) in out.chunks_exact_mut(self.columns).zip(&*neighbours) {
                            row[column] = *number;
                        }
                    }
                }
            }
            Stored::Blocks(blocks) => {
                for (row, out) in out.chunks_exact_mut(self.columns).enumerate() {
                    for (at, out) in out.chunks_mut(BLOCK).enumerate() {
                        let (scale, zero) = blocks.scale_and_zero(from + row, at * BLOCK / blocks.block);
                        let codes = blocks.codes(from + row, at * BLOCK);
                        for (out, code) in out.iter_mut().zip(codes) {
                            *out = (f32::from(code) - zero) * scale;
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
                    codes: blocks.codes(row, at * BLOCK),
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

    /// Those from `from` on, of which an even number is before them; zeros, where the tensor ends before that.
    fn codes(&self, row: usize, from: usize) -> [u8; BLOCK] {
        let at = (row * self.row_codes + from) * self.bits / 8;
        let bytes = &self.codes.bytes()[at..];
        let bytes = &bytes[..bytes.len().min(BLOCK * self.bits / 8)];
        let mut codes = [0; BLOCK];
        if self.bits == 8 {
            codes[..bytes.len()].copy_from_slice(bytes);
        } else {
            for (pair, byte) in codes.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
                *pair = [byte & 15, byte >> 4];
            }
        }
        codes.map(|code| code ^ self.sign())
    }

    /// What makes a stored code an unsigned one.
    fn sign(&self) -> u8 {
        if self.is_signed { 1 << (self.bits - 1) } else { 0 }
    }

    fn scale_and_zero(&self, row: usize, block: usize) -> (f32, f32) {
        let scale = self.scales.float(self.scale_type, row * self.blocks + block);
        let stored = |zeros: &Span| {
            let (bytes, at) = (zeros.bytes(), row * self.zero_stride + block);
            // The low half of a byte comes first.
            let zero = if self.bits == 8 { bytes[at] } else { bytes[at / 2] >> (at % 2 * 4) & 15 };
            zero ^ self.sign()
        };
        let zero = self.zeros.as_ref().map_or(self.zero, stored);
        (scale, f32::from(zero))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    /// As `MatMulNBits` defines it, from unpacked codes and zeros.
    #[derive(Debug)]
    struct Plain {
        bits: usize,
        block: usize,
        columns: usize,
        rows: usize,
        codes: Vec<u8>,
        scales: Vec<f32>,
        zeros: Vec<u8>,
    }

    impl Plain {
        fn weight(&self, row: usize, column: usize) -> f32 {
            let blocks = self.columns.div_ceil(self.block);
            let block = row * blocks + column / self.block;
            let code = self.codes[row * blocks * self.block + column];
            self.scales[block] * (f32::from(code) - f32::from(self.zeros[block]))
        }

        fn packed(&self) -> Matrix {
            let blocks = self.columns.div_ceil(self.block);
            let pack = |row: &[u8]| match self.bits {
                8 => row.to_vec(),
                _ => row.chunks(2).map(|pair| pair[0] | pair.get(1).unwrap_or(&0) << 4).collect(),
            };
            let packed = |codes: &[u8], of_row: usize| {
                Span::Inline(Bytes::from(codes.chunks(of_row).flat_map(pack).collect::<Vec<_>>()))
            };
            let scales: Vec<u8> = self.scales.iter().flat_map(|x| x.to_le_bytes()).collect();
            let stored = Stored::Blocks(Blocks {
                bits: self.bits,
                block: self.block,
                blocks,
                row_codes: blocks * self.block,
                codes: packed(&self.codes, blocks * self.block),
                scale_type: Type::F32,
                scales: Span::Inline(Bytes::from(scales)),
                zeros: Some(packed(&self.zeros, blocks)),
                zero_stride: (blocks * self.bits).next_multiple_of(8) / self.bits,
                zero: 0,
                is_signed: false,
            });
            Matrix::new(self.columns, self.rows, stored)
        }
    }

    fn plain() -> impl Strategy<Value = Plain> {
        (prop::sample::select(vec![4usize, 8]), prop::sample::select(vec![32usize, 64, 128]), 1usize..9, 1usize..4)
            .prop_flat_map(|(bits, block, runs, rows)| {
                let (columns, blocks) = (runs * BLOCK, (runs * BLOCK).div_ceil(block));
                let code = 0..=u8::MAX >> (8 - bits);
                let codes = prop::collection::vec(code.clone(), rows * blocks * block);
                let scales = prop::collection::vec(-1f32..1.0, rows * blocks);
                let zeros = prop::collection::vec(code, rows * blocks);
                (codes, scales, zeros).prop_map(move |(codes, scales, zeros)| Plain {
                    bits,
                    block,
                    columns,
                    rows,
                    codes,
                    scales,
                    zeros,
                })
            })
    }

    proptest! {
        #[test]
        fn codes_are_what_the_operator_takes_them_for(plain in plain()) {
            let matrix = plain.packed();
            let mut numbers = vec![0.0; plain.rows * plain.columns];
            matrix.numbers(0, &mut numbers);
            let empty = AffineBlock { codes: [0; BLOCK], scale: f16::ZERO, offset: f16::ZERO };
            let mut blocks = vec![empty; plain.columns / BLOCK];
            for row in 0..plain.rows {
                matrix.slice(row, 1).affine(0, &mut blocks);
                for column in 0..plain.columns {
                    let wanted = plain.weight(row, column);
                    prop_assert_eq!(numbers[row * plain.columns + column], wanted);
                    let block = &blocks[column / BLOCK];
                    let code = f32::from(block.codes[column % BLOCK]);
                    // Scale and offset are rounded to half precision; no code and no zero is beyond 255.
                    let bound = 255.0 * block.scale.to_f32().abs() / 1000.0 + 255.0 * 6e-8;
                    let found = block.scale.to_f32() * code + block.offset.to_f32();
                    prop_assert!((found - wanted).abs() <= bound, "{found} {wanted}");
                }
            }
        }

        #[test]
        fn a_matrix_by_columns_is_the_one_by_rows(
            columns in 1usize..40, rows in 1usize..40, numbers in prop::collection::vec(-9f32..9.0, 1600),
        ) {
            let by = |at: &dyn Fn(usize) -> usize| {
                let bytes = (0..rows * columns).flat_map(|i| numbers[at(i)].to_le_bytes()).collect::<Vec<_>>();
                Span::Inline(Bytes::from(bytes))
            };
            let ty = Type::F32;
            let one = Matrix::new(columns, rows, Stored::Rows { ty, data: by(&|i| i) });
            let turned = by(&|i| i % rows * columns + i / rows);
            let other = Matrix::new(columns, rows, Stored::Columns { ty, data: turned, outputs: rows });
            let (first, count) = (rows / 3, rows - rows / 3);
            let [mut a, mut b] = [(); 2].map(|()| vec![0.0; count * columns]);
            one.numbers(first, &mut a);
            other.slice(first, count).numbers(0, &mut b);
            prop_assert_eq!(a, b);
        }
    }
}
