//! Vector arithmetic that kernels share, and which instruction set they may use.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::__m256;
use std::sync::LazyLock;

/// AVX2, FMA and F16C together: every x86-64 server since 2013 has all three.
pub static HAS_AVX2: LazyLock<bool> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
});

/// `a * b + c`, in one instruction where `FMA` promises that there is one.
#[inline(always)]
pub fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// e^x to about 1e-7, exactly 1 at 0, 0 from -87 down. Source: Cephes `expf` (Moshier). Many at once are
/// [`exp8`]'s: compilers make vector code of this one that is four times slower.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    let clamped = x.clamp(-87.0, 88.0);
    let n = (clamped * std::f32::consts::LOG2_E).round_ties_even();
    let r = mul_add::<FMA>(n, -0.693_359_4, clamped);
    let r = mul_add::<FMA>(n, 2.121_944_4e-4, r);
    let mut p = mul_add::<FMA>(1.987_569_1e-4, r, 1.398_199_9e-3);
    p = mul_add::<FMA>(p, r, 8.333_452e-3);
    p = mul_add::<FMA>(p, r, 4.166_579_6e-2);
    p = mul_add::<FMA>(p, r, 1.666_666_5e-1);
    p = mul_add::<FMA>(p, r, 5.000_000_3e-1);
    p = mul_add::<FMA>(p * r, r, r + 1.0);
    // SAFETY: `clamp` bounds n to -126..=127; a NaN stays NaN through `p`, and its n is not used as a number.
    let n = if n.is_nan() { 0 } else { unsafe { n.to_int_unchecked::<i32>() } };
    let power = f32::from_bits(((n + 127) as u32) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

/// [`exp`] of eight numbers, with the same results.
#[inline(always)]
pub fn exp8<const AVX2: bool>(x: &mut [f32; 8]) {
    #[cfg(target_arch = "x86_64")]
    if AVX2 {
        // SAFETY: `multiversion` sets it where the machine has AVX2; eight numbers.
        unsafe {
            use std::arch::x86_64::{_mm256_loadu_ps, _mm256_storeu_ps};
            _mm256_storeu_ps(x.as_mut_ptr(), exp_avx2(_mm256_loadu_ps(x.as_ptr())));
        }
        return;
    }
    x.iter_mut().for_each(|x| *x = exp::<false>(*x));
}

/// [`exp`] of eight numbers, by the same operations.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma")]
pub fn exp_avx2(x: __m256) -> __m256 {
    use std::arch::x86_64::{
        _CMP_LT_OQ, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _mm256_add_epi32, _mm256_add_ps, _mm256_andnot_ps,
        _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_cvtps_epi32, _mm256_fmadd_ps, _mm256_max_ps, _mm256_min_ps,
        _mm256_mul_ps, _mm256_round_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32,
    };
    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    let all = _mm256_set1_ps;
    // Of a NaN and a number these give the second operand.
    let clamped = _mm256_min_ps(all(88.0), _mm256_max_ps(all(-87.0), x));
    let n = _mm256_round_ps::<NEAREST>(_mm256_mul_ps(clamped, all(std::f32::consts::LOG2_E)));
    let r = _mm256_fmadd_ps(n, all(-0.693_359_4), clamped);
    let r = _mm256_fmadd_ps(n, all(2.121_944_4e-4), r);
    let mut p = _mm256_fmadd_ps(all(1.987_569_1e-4), r, all(1.398_199_9e-3));
    p = _mm256_fmadd_ps(p, r, all(8.333_452e-3));
    p = _mm256_fmadd_ps(p, r, all(4.166_579_6e-2));
    p = _mm256_fmadd_ps(p, r, all(1.666_666_5e-1));
    p = _mm256_fmadd_ps(p, r, all(5.000_000_3e-1));
    p = _mm256_fmadd_ps(_mm256_mul_ps(p, r), r, _mm256_add_ps(r, all(1.0)));
    let power = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)));
    let is_tiny = _mm256_cmp_ps::<_CMP_LT_OQ>(x, all(-87.0));
    _mm256_andnot_ps(is_tiny, _mm256_mul_ps(p, _mm256_castsi256_ps(power)))
}

/// Defines a function with a body compiled twice: for AVX2 with FMA, and for any machine.
macro_rules! multiversion {
    ($(#[$doc:meta])* pub fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<const FMA: bool>($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn vector($($arg: $ty),*) $(-> $ret)? {
                    body::<true>($($arg),*)
                }
                if *$crate::engine::simd::HAS_AVX2 {
                    // SAFETY: the features were detected.
                    return unsafe { vector($($arg),*) };
                }
            }
            body::<false>($($arg),*)
        }
    };
}
pub(crate) use multiversion;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_close_everywhere_and_exact_where_it_must_be() {
        for i in -8700..8700 {
            let x = i as f32 / 100.0;
            for y in [exp::<false>(x), exp::<true>(x)] {
                assert!((y / x.exp() - 1.0).abs() < 3e-7, "{x}: {y} against {}", x.exp());
            }
        }
        assert_eq!((exp::<true>(0.0), exp::<true>(-0.0), exp::<true>(f32::NEG_INFINITY)), (1.0, 1.0, 0.0));
        assert!(exp::<true>(f32::NAN).is_nan());
    }

    #[test]
    fn eight_at_once_are_as_one_by_one() {
        let special = [0.0, -0.0, f32::NEG_INFINITY, f32::INFINITY, f32::MAX, f32::MIN, f32::MIN_POSITIVE, -87.0];
        let range = (-9000..9000).map(|i| i as f32 / 100.0 + 0.003);
        let numbers: Vec<f32> = special.into_iter().chain(range).collect();
        for eight in numbers.as_chunks::<8>().0 {
            let (mut plain, mut vector) = (*eight, *eight);
            exp8::<false>(&mut plain);
            assert_eq!(plain.map(f32::to_bits), eight.map(|x| exp::<false>(x).to_bits()));
            if *HAS_AVX2 {
                exp8::<true>(&mut vector);
                assert_eq!(vector.map(f32::to_bits), eight.map(|x| exp::<true>(x).to_bits()), "{eight:?}");
            }
        }
        let mut nan = [f32::NAN; 8];
        exp8::<false>(&mut nan);
        assert!(nan.iter().all(|x| x.is_nan()));
        if *HAS_AVX2 {
            exp8::<true>(&mut nan);
            assert!(nan.iter().all(|x| x.is_nan()));
        }
    }
}
