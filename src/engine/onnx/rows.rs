//! What happens to one row between two matrix products. Each result depends on its row alone, in a fixed
//! order of operations: that is what makes answers independent of the batch.

use half::f16;

use crate::{
    engine::simd::{HAS_AVX2, exp8, mul_add, multiversion},
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
            *scales = quantize_block::<FMA>(&block, quants);
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
        let out = quants.as_chunks_mut::<BLOCK>().0.iter_mut().zip(scales.as_chunks_mut::<2>().0);
        for (block, (quants, scales)) in x.as_chunks::<BLOCK>().0.iter().zip(out) {
            *scales = quantize_block::<FMA>(block, quants);
        }
    }
}

#[inline(always)]
fn quantize_block<const AVX2: bool>(x: &[f32; BLOCK], quants: &mut [i8; BLOCK]) -> [f32; 2] {
    #[cfg(target_arch = "x86_64")]
    if AVX2 {
        // SAFETY: `multiversion` sets it where the machine has AVX2.
        return unsafe { quantize_block_avx2(x, quants) };
    }
    quantize_block_plain(x, quants)
}

fn quantize_block_plain(x: &[f32; BLOCK], quants: &mut [i8; BLOCK]) -> [f32; 2] {
    let largest = x.iter().fold(LARGEST_MIN, |most: f32, x| if x.abs() > most { x.abs() } else { most });
    let inverse = 127.0 / largest;
    let mut sum = 0i32;
    for (q, x) in quants.iter_mut().zip(x) {
        *q = (x * inverse).round_ties_even() as i8;
        sum += i32::from(*q);
    }
    let scale = if x.iter().all(|x| x.is_finite()) { largest / 127.0 } else { f32::NAN };
    [scale, scale * sum as f32]
}

/// Keeps the scale of a block of zeros a number.
const LARGEST_MIN: f32 = 1e-30;

/// The same, by the same operations; the quants of a block that gets no scale may differ.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn quantize_block_avx2(x: &[f32; BLOCK], quants: &mut [i8; BLOCK]) -> [f32; 2] {
    use std::arch::x86_64::{
        _CMP_LT_OQ, _mm_add_epi32, _mm_cvtsi128_si32, _mm_cvtss_f32, _mm_max_ps, _mm_movehl_ps, _mm_shuffle_epi32,
        _mm_shuffle_ps, _mm256_add_epi32, _mm256_and_ps, _mm256_andnot_ps, _mm256_castps256_ps128,
        _mm256_castsi256_si128, _mm256_cmp_ps, _mm256_cvtps_epi32, _mm256_extractf128_ps, _mm256_extracti128_si256,
        _mm256_loadu_ps, _mm256_max_ps, _mm256_movemask_ps, _mm256_mul_ps, _mm256_packs_epi16, _mm256_packs_epi32,
        _mm256_permutevar8x32_epi32, _mm256_set_epi32, _mm256_set1_ps, _mm256_setzero_si256, _mm256_storeu_si256,
    };
    let (sign, infinity) = (_mm256_set1_ps(-0.0), _mm256_set1_ps(f32::INFINITY));
    let mut most = _mm256_set1_ps(LARGEST_MIN);
    let mut is_finite = _mm256_cmp_ps::<_CMP_LT_OQ>(sign, infinity);
    let mut part = [_mm256_set1_ps(0.0); 4];
    for (i, part) in part.iter_mut().enumerate() {
        // SAFETY: eight numbers of the thirty-two.
        *part = unsafe { _mm256_loadu_ps(x.as_ptr().add(8 * i)) };
        let magnitude = _mm256_andnot_ps(sign, *part);
        is_finite = _mm256_and_ps(is_finite, _mm256_cmp_ps::<_CMP_LT_OQ>(magnitude, infinity));
        // Of a NaN and a number, the second operand.
        most = _mm256_max_ps(magnitude, most);
    }
    let most = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps::<1>(most));
    let most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    let largest = _mm_cvtss_f32(_mm_max_ps(most, _mm_shuffle_ps::<1>(most, most)));
    let inverse = _mm256_set1_ps(127.0 / largest);
    let mut whole = [_mm256_setzero_si256(); 4];
    let mut sums = _mm256_setzero_si256();
    for i in 0..4 {
        // Rounds to even, as no other part of the program tells the processor otherwise.
        whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(part[i], inverse));
        sums = _mm256_add_epi32(sums, whole[i]);
    }
    // Packing works in each half of a vector by itself, which the permutation undoes.
    let low = _mm256_packs_epi32(whole[0], whole[1]);
    let high = _mm256_packs_epi32(whole[2], whole[3]);
    let order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    let bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    // SAFETY: thirty-two bytes.
    unsafe { _mm256_storeu_si256(quants.as_mut_ptr().cast(), bytes) };
    let sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
    let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b00_00_11_10>(sum));
    let sum = _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32::<1>(sum)));
    let scale = if _mm256_movemask_ps(is_finite) == 0xff { largest / 127.0 } else { f32::NAN };
    [scale, scale * sum as f32]
}

multiversion! {
    /// `silu(gate) * up`, then quantisation in blocks; see [`quantize`]. `both` has the gate first, then the
    /// up projection.
    pub fn silu_mul_quantize(both: &[f32], quants: &mut [i8], scales: &mut [f32]) {
        // It is x / (1 + e^-x).
        gated::<FMA>(both, quants, scales, |x| -x);
    }
}

multiversion! {
    /// The same with GELU, as approximated by tanh.
    pub fn gelu_mul_quantize(both: &[f32], quants: &mut [i8], scales: &mut [f32]) {
        gated::<FMA>(both, quants, scales, gelu_exponent::<FMA>);
    }
}

/// `x / 2 * (1 + tanh(a))` with `a` the root of 2 / pi times `x + 0.044715 x^3`; `(1 + tanh(a)) / 2` is
/// `1 / (1 + e^-2a)`, of which this is the exponent.
#[inline(always)]
fn gelu_exponent<const FMA: bool>(x: f32) -> f32 {
    const MINUS_TWICE_THE_ROOT: f32 = -1.595_769;
    MINUS_TWICE_THE_ROOT * mul_add::<FMA>(x * x * 0.044_715, x, x)
}

/// Both activations are `x / (1 + e^f(x))`.
#[inline(always)]
fn gated<const FMA: bool>(both: &[f32], quants: &mut [i8], scales: &mut [f32], exponent: impl Fn(f32) -> f32) {
    let (gates, ups) = both.split_at(both.len() / 2);
    let both = gates.as_chunks::<BLOCK>().0.iter().zip(ups.as_chunks::<BLOCK>().0);
    let out = quants.as_chunks_mut::<BLOCK>().0.iter_mut().zip(scales.as_chunks_mut::<2>().0);
    for ((gates, ups), (quants, scales)) in both.zip(out) {
        let mut block = [0f32; BLOCK];
        for i in 0..BLOCK {
            block[i] = exponent(gates[i]);
        }
        block.as_chunks_mut::<8>().0.iter_mut().for_each(exp8::<FMA>);
        for i in 0..BLOCK {
            block[i] = gates[i] / (1.0 + block[i]) * ups[i];
        }
        *scales = quantize_block::<FMA>(&block, quants);
    }
}

/// To half precision, saturating: an infinity times a masked weight of 0 would be no number.
///
/// # Panics
/// If the lengths differ.
pub fn to_halves(x: &[f32], out: &mut [f16]) {
    assert_eq!(x.len(), out.len());
    #[cfg(target_arch = "x86_64")]
    let done = if *HAS_AVX2 {
        // SAFETY: the features were detected; the lengths are equal.
        unsafe { to_halves_avx2(x, out) }
    } else {
        0
    };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    for (out, x) in out[done..].iter_mut().zip(&x[done..]) {
        *out = f16::from_f32(x.clamp(-HALF_MAX, HALF_MAX));
    }
}

const HALF_MAX: f32 = 65504.0;

/// Whole vectors; how many numbers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn to_halves_avx2(x: &[f32], out: &mut [f16]) -> usize {
    use std::arch::x86_64::{
        _MM_FROUND_TO_NEAREST_INT, _mm_storeu_si128, _mm256_cvtps_ph, _mm256_loadu_ps, _mm256_max_ps, _mm256_min_ps,
        _mm256_set1_ps,
    };
    let (most, least) = (_mm256_set1_ps(HALF_MAX), _mm256_set1_ps(-HALF_MAX));
    for (x, out) in x.as_chunks::<8>().0.iter().zip(out.as_chunks_mut::<8>().0) {
        // SAFETY: eight numbers of each.
        unsafe {
            // A NaN stays one, since it is the second operand.
            let x = _mm256_max_ps(least, _mm256_min_ps(most, _mm256_loadu_ps(x.as_ptr())));
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
        }
    }
    x.len() / 8 * 8
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
    use proptest::prelude::*;

    use super::*;

    fn back(quants: &[i8], scales: &[f32]) -> Vec<f32> {
        quants.iter().enumerate().map(|(i, q)| f32::from(*q) * scales[i / BLOCK * 2]).collect()
    }

    proptest! {
        #[test]
        fn halves_are_rounded_and_saturate(x in prop::collection::vec(any::<f32>(), 0..40)) {
            let mut out = vec![f16::ZERO; x.len()];
            to_halves(&x, &mut out);
            for (x, out) in x.iter().zip(out) {
                let expected = f16::from_f32(x.clamp(-HALF_MAX, HALF_MAX));
                prop_assert!(out.to_bits() == expected.to_bits() || x.is_nan() && out.is_nan());
            }
        }
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

    proptest! {
        #[test]
        fn quantisation_has_the_same_bits_on_any_machine(
            x in prop::array::uniform32(prop_oneof![-9.0f32..9.0, Just(0.0), prop::num::f32::ANY]),
        ) {
            let (mut fast, mut plain) = ([0; BLOCK], [0; BLOCK]);
            let mut scales = [0.0; 2];
            quantize(&x, &mut fast, &mut scales);
            let expected = quantize_block_plain(&x, &mut plain);
            prop_assert_eq!(scales.map(f32::is_nan), expected.map(f32::is_nan));
            if !expected[0].is_nan() {
                prop_assert_eq!((fast, scales), (plain, expected));
            }
        }
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
