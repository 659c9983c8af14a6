//! Stored blocks to f32, the plain way. Runs once at load and once a token for the embedding row.
//!
//! Source: the block layouts of ggml (`ggml-common.h`), written from their description.

use half::{bf16, f16};

use super::{Gguf, ModelError, TensorType};

impl Gguf {
    /// Writes rows `first_row..` of a tensor into `out` (`rows * columns` numbers, row-major).
    ///
    /// # Errors
    /// The tensor is missing, `out` is not a whole number of its rows, or a value is not finite.
    pub fn dequantize_rows(&self, name: &str, first_row: usize, out: &mut [f32]) -> Result<(), ModelError> {
        let info = self.tensor(name)?;
        let columns = info.dims[0] as usize;
        let rows_all = info.dims[1..].iter().product::<u64>() as usize;
        let rows = out.len() / columns;
        if !out.len().is_multiple_of(columns) || first_row + rows > rows_all {
            return Err(ModelError::WrongShape {
                name: name.to_owned(),
                found: info.dims.clone(),
                expected: vec![columns as u64, (first_row + rows) as u64],
            });
        }
        let (block_numbers, block_bytes) = info.ty.block();
        let row_bytes = columns / block_numbers as usize * block_bytes as usize;
        let bytes = &self.bytes(info)[first_row * row_bytes..][..rows * row_bytes];
        dequantize(info.ty, bytes, out);
        if out.iter().all(|x| x.is_finite()) { Ok(()) } else { Err(ModelError::NotFinite(name.to_owned())) }
    }

    /// A whole tensor, row-major.
    pub fn dequantize(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let numbers = self.tensor(name)?.dims.iter().product::<u64>() as usize;
        let mut out = vec![0.0; numbers];
        self.dequantize_rows(name, 0, &mut out)?;
        Ok(out)
    }
}

impl Gguf {
    /// The same promise as `dequantize` makes, without the numbers: reads the scales of the blocks only.
    ///
    /// # Errors
    /// The tensor is missing, or a value of it is not finite.
    pub fn check_finite(&self, name: &str) -> Result<(), ModelError> {
        let info = self.tensor(name)?;
        if is_finite(info.ty, self.bytes(info)) { Ok(()) } else { Err(ModelError::NotFinite(name.to_owned())) }
    }
}

/// Whether all numbers of these blocks are finite. Finite scales are enough: halves times integers of
/// fourteen bits are far within f32.
fn is_finite(ty: TensorType, bytes: &[u8]) -> bool {
    let half = |b: &[u8], at: usize| u16::from_le_bytes([b[at], b[at + 1]]) & 0x7c00 != 0x7c00;
    let mut blocks = bytes.chunks_exact(ty.block().1 as usize);
    match ty {
        TensorType::F32 => blocks.all(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite()),
        TensorType::Bf16 => blocks.all(|b| u16::from_le_bytes([b[0], b[1]]) & 0x7f80 != 0x7f80),
        TensorType::F16 | TensorType::Q4_0 | TensorType::Q5_0 | TensorType::Q8_0 => blocks.all(|b| half(b, 0)),
        TensorType::Q4_1 | TensorType::Q5_1 | TensorType::Q4K | TensorType::Q5K => {
            blocks.all(|b| half(b, 0) && half(b, 2))
        }
        TensorType::Q6K => blocks.all(|b| half(b, 208)),
    }
}

pub(super) fn dequantize(ty: TensorType, bytes: &[u8], out: &mut [f32]) {
    let (numbers, size) = ty.block();
    let blocks = bytes.chunks_exact(size as usize).zip(out.chunks_exact_mut(numbers as usize));
    match ty {
        TensorType::F32 => blocks.for_each(|(b, o)| o[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        TensorType::F16 => blocks.for_each(|(b, o)| o[0] = half_at(b, 0)),
        TensorType::Bf16 => blocks.for_each(|(b, o)| o[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
        TensorType::Q8_0 => blocks.for_each(|(b, o)| {
            let scale = half_at(b, 0);
            for (o, q) in o.iter_mut().zip(&b[2..]) {
                *o = scale * f32::from(q.cast_signed());
            }
        }),
        TensorType::Q4_0 => blocks.for_each(|(b, o)| nibbles(half_at(b, 0), -8.0 * half_at(b, 0), 0, &b[2..], o)),
        TensorType::Q4_1 => blocks.for_each(|(b, o)| nibbles(half_at(b, 0), half_at(b, 2), 0, &b[4..], o)),
        TensorType::Q5_0 => {
            blocks.for_each(|(b, o)| nibbles(half_at(b, 0), -16.0 * half_at(b, 0), fifth_bits(b, 2), &b[6..], o));
        }
        TensorType::Q5_1 => {
            blocks.for_each(|(b, o)| nibbles(half_at(b, 0), half_at(b, 2), fifth_bits(b, 4), &b[8..], o));
        }
        TensorType::Q4K | TensorType::Q5K => blocks.for_each(|(b, o)| {
            for (run, o) in o.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                let (codes, scale, offset) = k_run(ty, b, run);
                for (o, code) in o.iter_mut().zip(codes) {
                    *o = scale * f32::from(code) - offset;
                }
            }
        }),
        TensorType::Q6K => blocks.for_each(|(b, o)| six_bits(b, o)),
    }
}

/// One of the eight runs of 32 numbers in a block of `Q4_K` or `Q5_K`: its codes, its scale, and what is taken
/// off. Two runs share 32 bytes, the low nibbles and the high ones; in `Q5_K`, bit `run` of 32 more bytes is
/// the fifth.
pub(super) fn k_run(ty: TensorType, block: &[u8], run: usize) -> ([u8; 32], f32, f32) {
    let (fifth, nibbles) =
        if ty == TensorType::Q5K { (Some(&block[16..48]), &block[48..]) } else { (None, &block[16..]) };
    let nibbles = &nibbles[run / 2 * 32..][..32];
    let codes = std::array::from_fn(|i| {
        let low = if run.is_multiple_of(2) { nibbles[i] & 15 } else { nibbles[i] >> 4 };
        low | fifth.map_or(0, |bits| bits[i] >> run & 1) << 4
    });
    let (scale, offset) = six_bit_pair(&block[4..16], run);
    (codes, half_at(block, 0) * scale, half_at(block, 2) * offset)
}

/// Scale and offset of one run: the first four runs have theirs in the low six bits of bytes 0 to 7, the
/// others in bytes 8 to 11 and in the two bits that were left over above.
fn six_bit_pair(bytes: &[u8], run: usize) -> (f32, f32) {
    let (scale, offset) = if run < 4 {
        (bytes[run] & 63, bytes[run + 4] & 63)
    } else {
        (bytes[run + 4] & 15 | bytes[run - 4] >> 6 << 4, bytes[run + 4] >> 4 | bytes[run] >> 6 << 4)
    };
    (f32::from(scale), f32::from(offset))
}

/// 256 numbers of `Q6_K`: two halves of 128, each with 64 bytes of nibbles and 32 bytes with two more bits
/// for each of four runs of 32; a signed scale for every 16 numbers.
fn six_bits(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 208);
    for (half, out) in out.chunks_exact_mut(128).enumerate() {
        let (nibbles, pairs) = (&block[half * 64..][..64], &block[128 + half * 32..][..32]);
        let scales = &block[192 + half * 8..][..8];
        for (run, out) in out.chunks_exact_mut(32).enumerate() {
            for (i, out) in out.iter_mut().enumerate() {
                let byte = nibbles[run % 2 * 32 + i];
                let low = if run < 2 { byte & 15 } else { byte >> 4 };
                let q = i32::from(low | (pairs[i] >> (2 * run) & 3) << 4) - 32;
                let scale = scale * f32::from(scales[run * 2 + i / 16].cast_signed());
                *out = scale * q as f32;
            }
        }
    }
}

/// 32 numbers from 16 bytes: the low nibbles are the first half, the high ones the second; `fifth` has
/// one more bit for each.
fn nibbles(scale: f32, offset: f32, fifth: u32, bytes: &[u8], out: &mut [f32]) {
    for (i, byte) in bytes.iter().enumerate() {
        let low = u32::from(byte & 15) | (fifth >> i & 1) << 4;
        let high = u32::from(byte >> 4) | (fifth >> (i + 16) & 1) << 4;
        out[i] = scale * low as f32 + offset;
        out[i + 16] = scale * high as f32 + offset;
    }
}

pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

pub(super) fn fifth_bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TYPES: [TensorType; 11] = [
        TensorType::Q4_0,
        TensorType::Q4_1,
        TensorType::Q5_0,
        TensorType::Q5_1,
        TensorType::Q8_0,
        TensorType::Q4K,
        TensorType::Q5K,
        TensorType::Q6K,
        TensorType::F32,
        TensorType::F16,
        TensorType::Bf16,
    ];

    #[test]
    fn every_quantised_type_has_the_numbers_of_an_independent_dequantiser() {
        let mut fixture: &[u8] = include_bytes!("../../tests/data/blocks.bin");
        for ty in &TYPES[..8] {
            let (numbers, size) = ty.block();
            let (blocks, rest) = fixture.split_at(2 * size as usize);
            let (expected, rest) = rest.split_at(2 * numbers as usize * 4);
            let mut out = vec![0.0; 2 * numbers as usize];
            dequantize(*ty, blocks, &mut out);
            for (i, (found, expected)) in out.iter().zip(expected.as_chunks::<4>().0).enumerate() {
                assert_eq!(*found, f32::from_le_bytes(*expected), "number {i} of {ty:?}");
            }
            fixture = rest;
        }
        assert!(fixture.is_empty());
    }

    proptest! {
        #[test]
        fn any_bytes_are_numbers_or_are_said_not_to_be(
            ty in prop::sample::select(TYPES.to_vec()),
            bytes in prop::collection::vec(any::<u8>(), 420),
        ) {
            let (numbers, size) = ty.block();
            let blocks = bytes.len() / size as usize;
            let mut out = vec![0.0; blocks * numbers as usize];
            let bytes = &bytes[..blocks * size as usize];
            dequantize(ty, bytes, &mut out);
            prop_assert_eq!(is_finite(ty, bytes), out.iter().all(|x| x.is_finite()));
        }
    }
}
