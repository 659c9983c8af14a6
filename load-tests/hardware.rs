//! What this machine can do at best: bytes read from memory a second, and multiplications of 8-bit integers a
//! second, by one thread and by all. A step of few rows cannot be faster than its weights can be read, a step of
//! many rows not faster than its products can be multiplied; `docs/PERFORMANCE.md` sets our steps beside both.
//!
//! Prints the best of several rounds: a limit, not an average. On a busy machine it is too low.
//!
//!     cargo run --release --example hardware

use std::{
    hint::black_box,
    sync::Barrier,
    time::{Duration, Instant},
};

/// Many times the last-level cache of the machines that we know.
const BUFFER_BYTES: usize = 256 << 20;
const ROUNDS: usize = 7;
/// Of a loop of arithmetic.
const ROUND: Duration = Duration::from_millis(150);

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
    let counts: Vec<usize> = if threads > 1 { vec![1, threads] } else { vec![1] };
    println!("{:<58}{}", "threads", counts.iter().map(|count| format!("{count:>10}")).collect::<String>());
    row("memory, GB/s read", &counts, read_gb_per_second);
    #[cfg(target_arch = "x86_64")]
    for (name, kernel) in arithmetic::kernels() {
        row(name, &counts, |threads| best(ROUNDS, |_| gop_per_second(threads, kernel)));
    }
    #[cfg(not(target_arch = "x86_64"))]
    println!("the arithmetic is written for x86_64 alone");
}

fn row(name: &str, counts: &[usize], measure: impl Fn(usize) -> f64) {
    let figures: String = counts.iter().map(|threads| format!("{:>10.1}", measure(*threads))).collect();
    println!("{name:<58}{figures}");
}

fn best(rounds: usize, measure: impl Fn(usize) -> f64) -> f64 {
    (0..rounds).map(measure).fold(0.0, f64::max)
}

/// Every thread reads a buffer of its own, pass after pass, from the same moment on; the best pass of all.
fn read_gb_per_second(threads: usize) -> f64 {
    let bytes = BUFFER_BYTES / threads;
    let barrier = Barrier::new(threads);
    let read = || {
        // Written first: pages that nobody wrote are all the same one.
        let words: Vec<u64> = (0..bytes as u64 / 8).collect();
        let pass = |_| {
            barrier.wait();
            let started = Instant::now();
            black_box(sum(&words));
            (started, Instant::now())
        };
        // The first pass still waits for what was written to leave the caches.
        (0..=ROUNDS).map(pass).skip(1).collect::<Vec<_>>()
    };
    let passes: Vec<Vec<(Instant, Instant)>> = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..threads).map(|_| scope.spawn(read)).collect();
        readers.into_iter().map(|reader| reader.join().expect("a reader does not panic")).collect()
    });
    let elapsed = |pass: usize| {
        let started = passes.iter().map(|of| of[pass].0).min().expect("there is a thread");
        let ended = passes.iter().map(|of| of[pass].1).max().expect("there is a thread");
        ended.duration_since(started).as_secs_f64()
    };
    best(ROUNDS, |pass| (bytes * threads) as f64 / elapsed(pass) / 1e9)
}

/// Several chains, so that the additions do not wait for each other.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 16];
    for words in words.chunks_exact(16) {
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(0, |sum, part| sum.wrapping_add(*part))
}

/// A multiplication and its addition are two operations.
#[cfg(target_arch = "x86_64")]
fn gop_per_second(threads: usize, kernel: arithmetic::Kernel) -> f64 {
    let barrier = Barrier::new(threads);
    let one = || {
        let data = arithmetic::Data::default();
        barrier.wait();
        let (started, mut operations) = (Instant::now(), 0u64);
        while started.elapsed() < ROUND {
            operations += kernel(&data);
        }
        operations as f64 / started.elapsed().as_secs_f64() / 1e9
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        running.into_iter().map(|thread| thread.join().expect("a loop does not panic")).sum()
    })
}

#[cfg(target_arch = "x86_64")]
mod arithmetic {
    use std::{arch::x86_64::*, hint::black_box};

    /// Runs some thousand instructions and returns how many operations they were.
    pub type Kernel = fn(&Data) -> u64;

    const VECTORS: usize = 64;
    const PASSES: usize = 512;
    /// Independent sums: latency times throughput of the slowest instruction, and some.
    const CHAINS: usize = 8;

    /// Operands in the first-level cache, so that no compiler can take the products out of the loop.
    #[repr(align(64))]
    pub struct Data([[i8; 32]; VECTORS]);

    impl Default for Data {
        fn default() -> Self {
            // Small, so that sums of two products fit into 16 bits.
            Self(std::array::from_fn(|i| std::array::from_fn(|j| ((i * 7 + j) % 15) as i8)))
        }
    }

    pub fn kernels() -> Vec<(&'static str, Kernel)> {
        let mut kernels: Vec<(&'static str, Kernel)> = Vec::new();
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            kernels.push(("8 bit, GOP/s: vpmaddubsw, vpaddw (16-bit sums)", narrow));
            kernels.push(("8 bit, GOP/s: 2 vpmaddubsw, vpaddw, vpmaddwd, vpaddd", paired));
            kernels.push(("8 bit, GOP/s: vpmaddubsw, vpmaddwd, vpaddd (32-bit sums)", wide));
            kernels.push(("16 bit, GOP/s: vpmaddwd, vpaddd", words));
            kernels.push(("f32, GFLOP/s: vfmadd", floats));
        }
        if is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vl") {
            kernels.push(("8 bit, GOP/s: vpdpbusd, 256 bits", dots));
        }
        kernels
    }

    /// `$sum` is what becomes of a sum and two operands; `$operations` of it make `$count` operations.
    macro_rules! kernel {
        ($name:ident, $features:literal, $count:literal, |$acc:ident, $a:ident, $b:ident, $ones:ident| $sum:expr) => {
            fn $name(data: &Data) -> u64 {
                #[target_feature(enable = $features)]
                fn run(data: &Data) -> u64 {
                    let load = |i: usize| -> __m256i {
                        // SAFETY: a row of `Data` is 32 bytes, and the load wants no alignment.
                        unsafe { _mm256_loadu_si256(data.0[i].as_ptr().cast()) }
                    };
                    let $ones = _mm256_set1_epi16(1);
                    let mut sums = [_mm256_setzero_si256(); CHAINS];
                    for pass in 0..PASSES {
                        let $b = load(black_box(pass) % VECTORS);
                        for start in (0..VECTORS).step_by(CHAINS) {
                            for (i, sum) in sums.iter_mut().enumerate() {
                                let ($acc, $a) = (*sum, load(start + i));
                                *sum = $sum;
                            }
                        }
                    }
                    black_box(sums);
                    (PASSES * VECTORS) as u64 * $count
                }
                // SAFETY: `kernels` gives out this function only where the processor has the features.
                unsafe { run(data) }
            }
        };
    }

    kernel!(narrow, "avx2,fma", 64, |acc, a, b, _ones| _mm256_add_epi16(acc, _mm256_maddubs_epi16(a, b)));
    kernel!(wide, "avx2,fma", 64, |acc, a, b, ones| _mm256_add_epi32(
        acc,
        _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones)
    ));
    kernel!(paired, "avx2,fma", 128, |acc, a, b, ones| {
        let products = _mm256_add_epi16(_mm256_maddubs_epi16(a, b), _mm256_maddubs_epi16(b, a));
        _mm256_add_epi32(acc, _mm256_madd_epi16(products, ones))
    });
    kernel!(words, "avx2,fma", 32, |acc, a, b, _ones| _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)));
    kernel!(floats, "avx2,fma", 16, |acc, a, b, _ones| _mm256_castps_si256(_mm256_fmadd_ps(
        _mm256_castsi256_ps(a),
        _mm256_castsi256_ps(b),
        _mm256_castsi256_ps(acc)
    )));
    kernel!(dots, "avx2,avx512vnni,avx512vl", 64, |acc, a, b, _ones| _mm256_dpbusd_epi32(acc, a, b));
}
