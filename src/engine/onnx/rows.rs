//! What happens to one row between two matrix products. Each result depends on its row alone, in a fixed
//! order of operations: that is what makes answers independent of the batch.

use crate::{
    engine::simd::{exp, mul_add, multiversion},
    model::BLOCK,
};

multiversion! {
    /// Root mean square normalisation, then quantisation in blocks; see [`quantize`].
    pub fn norm_quantize(x: &[f32], weights: &[f32], epsilon: f32, quants: &mut [i8], scales: &mut [f32]) {
        let inverse = inverse_root::<FMA>(x, epsilon);
        let x = x.as_chunks::<BLOCK>().0.iter().zip(weights.as_chunks::<BLOCK>().0);
        let out = quants.as_chunks_mut::<BLOCK>().0.iter_mut().zip(scales.as_chunks_mut::<2>().0);
        for ((x, weights), (quants, scales)) in x.zip(out) {
            let mut block = [0f32; BLOCK];
            for i in 0..BLOCK {
                block[i] = x[i] * inverse * weights[i];
            }
            *scales = quantize_block(&block, quants);
        }
    }
}

/// `1 / sqrt(mean of squares + epsilon)`
#[inline(always)]
fn inverse_root<const FMA: bool>(x: &[f32], epsilon: f32) -> f32 {
    let mut squares = [0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for chunk in chunks {
        for (sum, x) in squares.iter_mut().zip(chunk) {
            *sum = mul_add::<FMA>(*x, *x, *sum);
        }
    }
    let sum = squares.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>();
    1.0 / (sum / x.len() as f32 + epsilon).sqrt()
}

multiversion! {
    /// Root mean square normalisation in place.
    pub fn norm(x: &mut [f32], weights: &[f32], epsilon: f32) {
        let inverse = inverse_root::<FMA>(x, epsilon);
        for (x, weight) in x.iter_mut().zip(weights) {
            *x = *x * inverse * weight;
        }
    }
}

multiversion! {
    /// The residual stream plus what was normalised on its way there: `out = norm(x) + residual`.
    pub fn norm_add(x: &[f32], weights: &[f32], epsilon: f32, residual: &[f32], out: &mut [f32]) {
        let inverse = inverse_root::<FMA>(x, epsilon);
        for (((out, x), weight), residual) in out.iter_mut().zip(x).zip(weights).zip(residual) {
            *out = x * inverse * weight + residual;
        }
    }
}

multiversion! {
    /// Symmetric quantisation to 8 bits in blocks of 32. `scales` gets two numbers a block: its scale, and
    /// that times the sum of its quants. A block with an infinity or a NaN gets a NaN for its scale.
    pub fn quantize(x: &[f32], quants: &mut [i8], scales: &mut [f32]) {
        let _ = FMA;
        let out = quants.as_chunks_mut::<BLOCK>().0.iter_mut().zip(scales.as_chunks_mut::<2>().0);
        for (block, (quants, scales)) in x.as_chunks::<BLOCK>().0.iter().zip(out) {
            *scales = quantize_block(block, quants);
        }
    }
}

#[inline(always)]
fn quantize_block(x: &[f32; BLOCK], quants: &mut [i8; BLOCK]) -> [f32; 2] {
    let mut largest = [0f32; 8];
    let mut poison = [0f32; 8];
    for chunk in x.as_chunks::<8>().0 {
        for i in 0..8 {
            largest[i] = if chunk[i].abs() > largest[i] { chunk[i].abs() } else { largest[i] };
            // 0 for every number, NaN for all else, which no comparison would find.
            poison[i] += chunk[i] * 0.0;
        }
    }
    let largest = largest.into_iter().fold(1e-30, |a: f32, b| if b > a { b } else { a });
    let inverse = 127.0 / largest;
    let mut sum = 0i32;
    for (q, x) in quants.iter_mut().zip(x) {
        let n = (x * inverse).round_ties_even().clamp(-127.0, 127.0);
        // SAFETY: clamped to -127..=127, and a NaN is replaced; the scale tells of it.
        let n = if n.is_nan() { 0 } else { unsafe { n.to_int_unchecked::<i32>() } };
        sum += n;
        *q = n as i8;
    }
    let scale = largest / 127.0 + poison.into_iter().sum::<f32>();
    [scale, scale * sum as f32]
}

multiversion! {
    /// `silu(gate) * up`, then quantisation in blocks; see [`quantize`]. `both` has the gate first, then the
    /// up projection.
    pub fn silu_mul_quantize(both: &[f32], quants: &mut [i8], scales: &mut [f32]) {
        gated(both, quants, scales, |gate| gate / (1.0 + exp::<FMA>(-gate)));
    }
}

multiversion! {
    /// The same with GELU, as approximated by tanh.
    pub fn gelu_mul_quantize(both: &[f32], quants: &mut [i8], scales: &mut [f32]) {
        // `(1 + tanh(a)) / 2` is `1 / (1 + e^-2a)`; the factor is -2 times the root of 2 / pi.
        const FACTOR: f32 = -1.595_769_1;
        gated(both, quants, scales, |gate| {
            let cubic = mul_add::<FMA>(gate * gate * 0.044_715, gate, gate);
            gate / (1.0 + exp::<FMA>(FACTOR * cubic))
        });
    }
}

#[inline(always)]
fn gated(both: &[f32], quants: &mut [i8], scales: &mut [f32], activation: impl Fn(f32) -> f32) {
    let (gates, ups) = both.split_at(both.len() / 2);
    let both = gates.as_chunks::<BLOCK>().0.iter().zip(ups.as_chunks::<BLOCK>().0);
    let out = quants.as_chunks_mut::<BLOCK>().0.iter_mut().zip(scales.as_chunks_mut::<2>().0);
    for ((gates, ups), (quants, scales)) in both.zip(out) {
        let mut block = [0f32; BLOCK];
        for i in 0..BLOCK {
            block[i] = activation(gates[i]) * ups[i];
        }
        *scales = quantize_block(&block, quants);
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

multiversion! {
    /// The same for pairs that stand half a head apart.
    pub fn rotate_halves(x: &mut [f32], angles: &[f32], factor: f32) {
        let _ = FMA;
        let (cosines, sines) = angles.split_at(angles.len() / 2);
        let (low, high) = x.split_at_mut(x.len() / 2);
        for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
            (*a, *b) = ((*a * cos - *b * sin) * factor, (*a * sin + *b * cos) * factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn back(quants: &[i8], scales: &[f32]) -> Vec<f32> {
        quants.iter().enumerate().map(|(i, q)| f32::from(*q) * scales[i / BLOCK * 2]).collect()
    }

    #[test]
    fn a_quantised_block_is_within_half_a_step_of_itself_and_knows_its_sum() {
        let x: Vec<f32> = (0..96).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.3 * (1 + i / 32) as f32).collect();
        let (mut q, mut s) = (vec![0; 96], vec![0.0; 6]);
        quantize(&x, &mut q, &mut s);
        for (i, y) in back(&q, &s).iter().enumerate() {
            assert!((x[i] - y).abs() <= s[i / 32 * 2] * 0.501);
        }
        let sum: i32 = q[32..64].iter().map(|q| i32::from(*q)).sum();
        assert_eq!(s[3], s[2] * sum as f32);
    }

    #[test]
    fn what_is_no_number_is_seen_in_its_block_s_scale_and_in_no_other() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.0; 96];
            x[40] = bad;
            let (mut q, mut s) = (vec![0; 96], vec![0.0; 6]);
            quantize(&x, &mut q, &mut s);
            assert!(s[2].is_nan() && s[0].is_finite() && s[4].is_finite());
        }
    }

    #[test]
    fn gelu_times_up_is_what_it_says_and_does_not_overflow() {
        let mut both: Vec<f32> = (0..128).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.05).collect();
        let (mut q, mut s) = (vec![0; 64], vec![0.0; 4]);
        gelu_mul_quantize(&both, &mut q, &mut s);
        for (i, y) in back(&q, &s).iter().enumerate() {
            let (g, u) = (f64::from(both[i]), both[i + 64]);
            let gelu = 0.5 * g * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g * g * g)).tanh());
            assert!((y - gelu as f32 * u).abs() < 0.03, "{i}");
        }
        both[..32].fill(1e30);
        both[32..64].fill(-1e30);
        both[64..].fill(1.0);
        gelu_mul_quantize(&both, &mut q, &mut s);
        assert!(back(&q, &s)[..32].iter().all(|y| (y / 1e30 - 1.0).abs() < 0.01));
        assert!(back(&q, &s)[32..].iter().all(|y| y.abs() < 1e-6));
    }

    #[test]
    fn a_norm_on_its_way_to_the_residual_is_the_norm_and_the_sum() {
        let x: Vec<f32> = (0..40).map(|i| (i * 7 % 11) as f32 - 5.0).collect();
        let weights: Vec<f32> = (0..40).map(|i| 0.5 + i as f32 / 20.0).collect();
        let residual: Vec<f32> = (0..40).map(|i| (i * 5 % 13) as f32).collect();
        let root = (x.iter().map(|x| x * x).sum::<f32>() / 40.0 + 1e-6).sqrt();
        let (mut alone, mut sum) = (x.clone(), vec![0.0; 40]);
        norm(&mut alone, &weights, 1e-6);
        norm_add(&x, &weights, 1e-6, &residual, &mut sum);
        for i in 0..40 {
            assert!((alone[i] - x[i] / root * weights[i]).abs() < 1e-5);
            assert_eq!(sum[i], alone[i] + residual[i]);
        }
    }

    #[test]
    fn a_rotation_turns_pairs_of_halves_by_their_angles() {
        let mut x = [1.0, 2.0, 3.0, 4.0];
        let (sin, cos) = 0.3f32.sin_cos();
        rotate_halves(&mut x, &[cos, 1.0, sin, 0.0], 2.0);
        assert_eq!(x, [2.0 * (cos - 3.0 * sin), 4.0, 2.0 * (sin + 3.0 * cos), 8.0]);
    }

    #[test]
    fn silu_times_up_is_what_it_says() {
        let both: Vec<f32> = (0..128).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.05).collect();
        let (mut q, mut s) = (vec![0; 64], vec![0.0; 4]);
        silu_mul_quantize(&both, &mut q, &mut s);
        for (i, y) in back(&q, &s).iter().enumerate() {
            let (g, u) = (both[i], both[i + 64]);
            assert!((y - g / (1.0 + (-g).exp()) * u).abs() < 0.03, "{i}");
        }
    }
}
