//! Vector arithmetic that kernels share, and which instruction set they may use.

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

/// e^x to about 1e-7, exactly 1 at 0, 0 from -87 down. Straight-line code, so that loops over it become
/// vector code. Source: Cephes `expf` (Moshier).
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
}
