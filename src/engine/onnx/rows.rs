//! What happens to one row between two matrix products. Each result depends on its row alone, in a fixed
//! order of operations: that is what makes answers independent of the batch.

use super::rotation::hadamard;
use crate::engine::simd::{exp, mul_add, multiversion};

/// Quantised rows are unsigned around this.
pub const ZERO_POINT: u8 = 128;

multiversion! {
    /// Root mean square normalisation without weights (those are folded into the next matrix), then
    /// quantisation. Returns the row's scale.
    pub fn norm_quantize(x: &[f32], epsilon: f32, quants: &mut [u8]) -> f32 {
        let mut squares = [0f32; 16];
        let (chunks, rest) = x.as_chunks::<16>();
        for chunk in chunks {
            for (sum, x) in squares.iter_mut().zip(chunk) {
                *sum = mul_add::<FMA>(*x, *x, *sum);
            }
        }
        let sum = squares.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>();
        let inverse = 1.0 / (sum / x.len() as f32 + epsilon).sqrt();
        // Scaling a row changes its scale and not its quants, so the row itself needs no second pass.
        inverse * quantize_body(x, quants)
    }
}

multiversion! {
    /// Symmetric quantisation of a row to 8 bits. Returns its scale.
    pub fn quantize(x: &[f32], quants: &mut [u8]) -> f32 {
        let _ = FMA;
        quantize_body(x, quants)
    }
}

#[inline(always)]
fn quantize_body(x: &[f32], quants: &mut [u8]) -> f32 {
    let mut largest = [0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for chunk in chunks {
        for (most, x) in largest.iter_mut().zip(chunk) {
            *most = if x.abs() > *most { x.abs() } else { *most };
        }
    }
    let largest = largest.iter().copied().chain(rest.iter().map(|x| x.abs())).fold(1e-30, f32::max);
    let inverse = 127.0 / largest;
    for (q, x) in quants.iter_mut().zip(x) {
        // SAFETY: clamped to -127..=127. For a NaN any value would do: the scale carries it on, and logits
        // that are not finite are refused before anything is sampled from them.
        let n = (x * inverse).round_ties_even().clamp(-127.0, 127.0);
        let n = if n.is_nan() { 0 } else { unsafe { n.to_int_unchecked::<i32>() } };
        *q = (n + i32::from(ZERO_POINT)) as u8;
    }
    largest / 127.0
}

multiversion! {
    /// Integer products to numbers: `out[n] = products[n] * row_scale * scales[n]`.
    pub fn dequantize(products: &[i32], row_scale: f32, scales: &[f32], out: &mut [f32]) {
        let _ = FMA;
        for ((out, product), scale) in out.iter_mut().zip(products).zip(scales) {
            *out = *product as f32 * (row_scale * scale);
        }
    }
}

multiversion! {
    /// The same, added to `x` (the residual stream).
    pub fn dequantize_add(products: &[i32], row_scale: f32, scales: &[f32], x: &[f32], out: &mut [f32]) {
        for (((out, product), scale), x) in out.iter_mut().zip(products).zip(scales).zip(x) {
            *out = mul_add::<FMA>(*product as f32, row_scale * scale, *x);
        }
    }
}

multiversion! {
    /// `silu(gate) * up`, a Hadamard transform in blocks, then quantisation. `products` and `scales` have
    /// the gate first, then the up projection; `scratch` has the width of one. Returns the row's scale.
    pub fn silu_mul_quantize(products: &[i32], row_scale: f32, scales: &[f32], hadamard_block: usize, scratch: &mut [f32], quants: &mut [u8]) -> f32 {
        let width = scratch.len();
        let (gates, ups) = products.split_at(width);
        let (gate_scales, up_scales) = scales.split_at(width);
        for i in 0..width {
            let gate = gates[i] as f32 * (row_scale * gate_scales[i]);
            let up = ups[i] as f32 * (row_scale * up_scales[i]);
            scratch[i] = gate / (1.0 + exp::<FMA>(-gate)) * up;
        }
        if hadamard_block == 64 {
            // A constant length lets the compiler unroll the butterflies.
            let (blocks, _) = scratch.as_chunks_mut::<64>();
            blocks.iter_mut().for_each(|block| hadamard(block));
        } else {
            scratch.chunks_exact_mut(hadamard_block).for_each(hadamard);
        }
        quantize_body(scratch, quants)
    }
}

multiversion! {
    /// Rotary embedding of neighbouring pairs, in place, times `factor`. `angles` has the cosines of this
    /// position, then its sines, one of each per pair.
    pub fn rotate_pairs(x: &mut [f32], angles: &[f32], factor: f32) {
        let _ = FMA;
        let (cosines, sines) = angles.split_at(angles.len() / 2);
        let (pairs, _) = x.as_chunks_mut::<2>();
        for ((pair, cos), sin) in pairs.iter_mut().zip(cosines).zip(sines) {
            let [a, b] = *pair;
            *pair = [(a * cos - b * sin) * factor, (a * sin + b * cos) * factor];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantised_row_is_within_half_a_step_of_itself() {
        let x: Vec<f32> = (0..100).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.3).collect();
        let mut q = vec![0; 100];
        let scale = quantize(&x, &mut q);
        for (x, q) in x.iter().zip(&q) {
            assert!((x - (f32::from(*q) - 128.0) * scale).abs() <= scale * 0.501);
        }
    }

    #[test]
    fn silu_times_up_is_what_it_says() {
        let products: Vec<i32> = (0..128).map(|i| (i * 37 % 101) - 50).collect();
        let scales = vec![0.1f32; 128];
        let (mut scratch, mut quants) = (vec![0.0; 64], vec![0; 64]);
        let scale = silu_mul_quantize(&products, 0.5, &scales, 64, &mut scratch, &mut quants);
        let mut back: Vec<f32> = quants.iter().map(|q| (f32::from(*q) - 128.0) * scale).collect();
        hadamard(&mut back);
        for i in 0..64 {
            let (g, u) = (products[i] as f32 * 0.05, products[i + 64] as f32 * 0.05);
            assert!((back[i] - g / (1.0 + (-g).exp()) * u).abs() < 0.05, "{i}");
        }
    }
}
