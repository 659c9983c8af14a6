//! Stored blocks to f32, the plain way. Runs once at load and once a token for the embedding row.
//!
//! Source: the block layouts of ggml (`ggml-common.h`), written from their description.

use half::{bf16, f16};

use super::{Gguf, GgufError, TensorType};

impl Gguf {
    /// Writes rows `first_row..` of a tensor into `out` (`rows * columns` numbers, row-major).
    ///
    /// # Errors
    /// The tensor is missing, `out` is not a whole number of its rows, or a value is not finite.
    pub fn dequantize_rows(&self, name: &str, first_row: usize, out: &mut [f32]) -> Result<(), GgufError> {
        let info = self.tensor(name)?;
        let columns = info.dims[0] as usize;
        let rows_all = info.dims[1..].iter().product::<u64>() as usize;
        let rows = out.len() / columns;
        if !out.len().is_multiple_of(columns) || first_row + rows > rows_all {
            return Err(GgufError::WrongShape {
                name: name.to_owned(),
                found: info.dims.clone(),
                expected: vec![columns as u64, (first_row + rows) as u64],
            });
        }
        let (block_numbers, block_bytes) = info.ty.block();
        let row_bytes = columns / block_numbers as usize * block_bytes as usize;
        let bytes = &self.bytes(info)[first_row * row_bytes..][..rows * row_bytes];
        dequantize(info.ty, bytes, out);
        if out.iter().all(|x| x.is_finite()) { Ok(()) } else { Err(GgufError::NotFinite(name.to_owned())) }
    }

    /// A whole tensor, row-major.
    pub fn dequantize(&self, name: &str) -> Result<Vec<f32>, GgufError> {
        let numbers = self.tensor(name)?.dims.iter().product::<u64>() as usize;
        let mut out = vec![0.0; numbers];
        self.dequantize_rows(name, 0, &mut out)?;
        Ok(out)
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
    use super::*;

    #[test]
    fn blocks_decode_to_the_numbers_that_they_describe() {
        let mut block = f16::from_f32(0.5).to_le_bytes().to_vec();
        block.extend(f16::from_f32(-1.0).to_le_bytes());
        block.extend((0..16u8).map(|i| i | (15 - i) << 4));
        let mut out = [0.0; 32];
        dequantize(TensorType::Q4_1, &block, &mut out);
        assert_eq!((out[0], out[15], out[16], out[31]), (-1.0, 6.5, 6.5, -1.0));

        let mut block = f16::from_f32(2.0).to_le_bytes().to_vec();
        block.extend((1u32 << 31).to_le_bytes());
        block.extend([0x10u8; 16]);
        dequantize(TensorType::Q5_0, &block, &mut out);
        assert_eq!((out[0], out[16], out[31]), (-32.0, -30.0, 2.0));
    }
}
