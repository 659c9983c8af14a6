//! Stored weights as small whole numbers in blocks of 32: what integer kernels multiply with.
//!
//! Types whose blocks have one scale and one offset for 32 numbers come out exactly as they stand in the
//! file, and so do the codes of `Q4_K` and `Q5_K`, whose scales are products that are rounded to half precision,
//! by a two-thousandth at most. All others are rounded to 8 bits a number, with a scale of their own for each
//! block.

use half::f16;

use super::{
    Gguf, GgufTensor, ModelError, TensorType,
    dequantize::{dequantize, fifth_bits, half_at, k_run},
};

/// Numbers of one block.
pub const BLOCK: usize = 32;

/// `weight = scale * code + offset` for each of the block's codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AffineBlock {
    pub codes: [u8; BLOCK],
    pub scale: f16,
    pub offset: f16,
}

impl AffineBlock {
    /// The same weights, as near as codes of `bits` bits come to them.
    pub fn rounded_to(&self, bits: u32) -> Self {
        let value = |code: u8| self.scale.to_f32() * f32::from(code) + self.offset.to_f32();
        let (least, most) = self.codes.iter().fold((u8::MAX, 0), |(a, b), code| (a.min(*code), b.max(*code)));
        let top = ((1u32 << bits) - 1) as f32;
        let offset = f16::from_f32(value(least));
        let scale = f16::from_f32((value(most) - value(least)) / top);
        let inverse = if scale.to_f32() == 0.0 { 0.0 } else { 1.0 / scale.to_f32() };
        let codes = self.codes.map(|code| ((value(code) - offset.to_f32()) * inverse).round().clamp(0.0, top) as u8);
        Self { codes, scale, offset }
    }
}

impl Gguf {
    /// The row `row` of a matrix in blocks, written to `out` (`columns / 32` of them).
    ///
    /// # Errors
    /// The row is no whole number of blocks, or has a value that is not a finite number of half precision.
    pub fn affine_row(&self, name: &str, row: usize, out: &mut [AffineBlock]) -> Result<(), ModelError> {
        let info = self.tensor(name)?;
        let columns = info.dims[0] as usize;
        if columns != out.len() * BLOCK {
            return Err(ModelError::WrongShape {
                name: name.to_owned(),
                found: info.dims.clone(),
                expected: vec![(out.len() * BLOCK) as u64],
            });
        }
        let (numbers, size) = info.ty.block();
        let row_bytes = columns / numbers as usize * size as usize;
        let bytes = &self.bytes(info)[row * row_bytes..][..row_bytes];
        if let TensorType::Q4K | TensorType::Q5K = info.ty {
            let (blocks, _) = out.as_chunks_mut::<8>();
            for (out, block) in blocks.iter_mut().zip(bytes.chunks_exact(size as usize)) {
                for (run, out) in out.iter_mut().enumerate() {
                    let (codes, scale, offset) = k_run(info.ty, block, run);
                    *out = AffineBlock { codes, scale: f16::from_f32(scale), offset: f16::from_f32(-offset) };
                }
            }
        } else if exact_bits(info.ty).is_some() {
            for (out, block) in out.iter_mut().zip(bytes.chunks_exact(size as usize)) {
                *out = exact(info.ty, block);
            }
        } else {
            let mut numbers = vec![0.0; columns];
            dequantize(info.ty, bytes, &mut numbers);
            for (out, numbers) in out.iter_mut().zip(numbers.as_chunks::<BLOCK>().0) {
                *out = rounded(numbers);
            }
        }
        let is_finite = |block: &AffineBlock| block.scale.is_finite() && block.offset.is_finite();
        if out.iter().all(is_finite) { Ok(()) } else { Err(ModelError::NotFinite(name.to_owned())) }
    }
}

impl GgufTensor {
    /// Bits of a code in this tensor's [`AffineBlock`]s.
    pub fn affine_bits(&self) -> u32 {
        exact_bits(self.ty).unwrap_or(8)
    }
}

/// Bits of a code, where the stored codes are taken as they are.
fn exact_bits(ty: TensorType) -> Option<u32> {
    match ty {
        TensorType::Q4_0 | TensorType::Q4_1 | TensorType::Q4K => Some(4),
        TensorType::Q5_0 | TensorType::Q5_1 | TensorType::Q5K => Some(5),
        TensorType::Q8_0 => Some(8),
        _ => None,
    }
}

fn exact(ty: TensorType, b: &[u8]) -> AffineBlock {
    let (d, second) = (half_at(b, 0), half_at(b, 2));
    let (offset, fifth, codes) = match ty {
        TensorType::Q4_0 => (-8.0 * d, 0, &b[2..]),
        TensorType::Q4_1 => (second, 0, &b[4..]),
        TensorType::Q5_0 => (-16.0 * d, fifth_bits(b, 2), &b[6..]),
        TensorType::Q5_1 => (second, fifth_bits(b, 4), &b[8..]),
        _ => {
            // Q8_0: signed codes, moved up to be unsigned.
            let codes = std::array::from_fn(|i| b[2 + i] ^ 0x80);
            return AffineBlock { codes, scale: f16::from_f32(d), offset: f16::from_f32(-128.0 * d) };
        }
    };
    let codes = std::array::from_fn(|i| {
        let nibble = if i < 16 { codes[i] & 15 } else { codes[i - 16] >> 4 };
        nibble | ((fifth >> i & 1) as u8) << 4
    });
    AffineBlock { codes, scale: f16::from_f32(d), offset: f16::from_f32(offset) }
}

/// To the nearest of 255 values around zero. An infinity or a NaN makes the scale one, too.
pub(super) fn rounded(numbers: &[f32; BLOCK]) -> AffineBlock {
    let largest = numbers.iter().fold(0f32, |most, x| if x.abs() > most || x.is_nan() { x.abs() } else { most });
    let scale = f16::from_f32(largest / 127.0);
    let inverse = if scale.to_f32() > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
    let codes = numbers.map(|x| ((x * inverse).round().clamp(-127.0, 127.0) + 128.0) as u8);
    AffineBlock { codes, scale, offset: f16::from_f32(-128.0 * scale.to_f32()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value(block: &AffineBlock, i: usize) -> f32 {
        block.scale.to_f32() * f32::from(block.codes[i]) + block.offset.to_f32()
    }

    proptest! {
        #[test]
        fn fewer_bits_are_as_near_as_they_can_be(codes: [u8; 32], scale in -2.0f32..2.0, offset in -2.0f32..2.0) {
            let block = AffineBlock { codes, scale: f16::from_f32(scale), offset: f16::from_f32(offset) };
            for bits in [4, 7] {
                let rounded = block.rounded_to(bits);
                prop_assert!(rounded.codes.iter().all(|code| *code < 1 << bits));
                // Half a step, and what half precision takes from scale and offset.
                let allowed = rounded.scale.to_f32().abs() * (0.5 + 0.04) + 2e-3 * rounded.offset.to_f32().abs();
                for i in 0..BLOCK {
                    prop_assert!((value(&rounded, i) - value(&block, i)).abs() <= allowed + 1e-6);
                }
            }
        }

        #[test]
        fn exact_types_keep_every_number_of_the_file(
            scale in -2.0f32..2.0, offset in -2.0f32..2.0, codes: [u8; 32], fifth: u32,
        ) {
            let [d, m] = [scale, offset].map(|x| f16::from_f32(x).to_le_bytes());
            for (ty, head) in [
                (TensorType::Q4_0, d.to_vec()),
                (TensorType::Q4_1, [d, m].concat()),
                (TensorType::Q5_0, [&d[..], &fifth.to_le_bytes()].concat()),
                (TensorType::Q5_1, [&d[..], &m, &fifth.to_le_bytes()].concat()),
                (TensorType::Q8_0, d.to_vec()),
            ] {
                let mut bytes = head;
                let size = ty.block().1 as usize;
                let missing = size - bytes.len();
                bytes.extend(&codes[..missing]);
                let mut numbers = [0.0; 32];
                dequantize(ty, &bytes, &mut numbers);
                let block = exact(ty, &bytes);
                for (i, number) in numbers.iter().enumerate() {
                    prop_assert!((value(&block, i) - number).abs() <= 1e-3 * number.abs().max(1e-3), "{ty:?}");
                }
            }
        }

        #[test]
        fn k_quants_keep_their_codes_and_almost_their_scales(
            scale in 0.001f32..1.0, offset in 0.001f32..1.0, rest in prop::collection::vec(any::<u8>(), 172),
        ) {
            let [d, m] = [scale, offset].map(|x| f16::from_f32(x).to_le_bytes());
            for ty in [TensorType::Q4K, TensorType::Q5K] {
                let mut bytes = [d, m].concat();
                bytes.extend(&rest[..ty.block().1 as usize - 4]);
                let mut numbers = [0.0; 256];
                dequantize(ty, &bytes, &mut numbers);
                for run in 0..8 {
                    let (codes, scale, offset) = k_run(ty, &bytes, run);
                    let block =
                        AffineBlock { codes, scale: f16::from_f32(scale), offset: f16::from_f32(-offset) };
                    for i in 0..32 {
                        let bound = (f32::from(codes[i]) * scale + offset) / 2000.0 + 1e-6;
                        prop_assert!((value(&block, i) - numbers[run * 32 + i]).abs() <= bound, "{ty:?} {run} {i}");
                    }
                }
            }
        }

        #[test]
        fn rounding_errs_by_half_a_step_and_finds_stored_codes_again(
            numbers in prop::array::uniform32(-3.0f32..3.0), signed in prop::array::uniform32(-127i8..=127),
        ) {
            let block = rounded(&numbers);
            for (i, x) in numbers.iter().enumerate() {
                prop_assert!((value(&block, i) - x).abs() <= 0.52 * block.scale.to_f32());
            }
            let mut signed = signed;
            signed[7] = -127;
            let again = rounded(&signed.map(|q| f32::from(q) * 0.25));
            prop_assert_eq!(again.codes, signed.map(|q| (i16::from(q) + 128) as u8));
        }
    }

    #[test]
    fn what_is_no_number_is_seen_in_the_scale() {
        for bad in [f32::NAN, f32::INFINITY, 1e30] {
            let mut numbers = [1.0; 32];
            numbers[3] = bad;
            assert!(!rounded(&numbers).scale.is_finite());
        }
    }
}
