//! Orthogonal changes of basis that spread outliers over all channels before rows are quantised.
//!
//! A model computes the same function in any orthogonal basis of its residual stream, once the weights are
//! changed to match (QuaRot, Ashkboos et al. 2024). One scale a row then wastes no bits on single channels.

/// In-place Walsh-Hadamard transform, normalised, so that it is its own inverse. `x.len()` is a power of 2.
#[inline]
pub fn hadamard(x: &mut [f32]) {
    let n = x.len();
    let mut half = 1;
    while half < n {
        for pair in x.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let scale = 1.0 / (n as f32).sqrt();
    for x in x {
        *x *= scale;
    }
}

/// The same within each block of `block` numbers.
#[inline]
pub fn hadamard_blocks(x: &mut [f32], block: usize) {
    for block in x.chunks_exact_mut(block) {
        hadamard(block);
    }
}

/// The largest power of two that divides `n`, at most `max`.
pub fn power_of_two_divisor(n: usize, max: usize) -> usize {
    (1 << n.trailing_zeros()).min(max)
}

/// A fixed orthogonal matrix over the whole width: a Hadamard transform in each block, then an orthogonal
/// mix of the blocks (a Kronecker product). Fixed, because the same rotation must be applied to every
/// weight and to every embedding, today and after a restart.
pub struct Rotation {
    block: usize,
    blocks: usize,
    /// `[blocks, blocks]`, row-major, orthogonal.
    mix: Vec<f32>,
}

impl Rotation {
    pub fn new(width: usize) -> Self {
        let block = power_of_two_divisor(width, 64);
        let blocks = width / block;
        Self { block, blocks, mix: orthogonal(blocks) }
    }

    /// `x` becomes the rotated `x`; `x.len()` is the width.
    pub fn apply(&self, x: &mut [f32], scratch: &mut Vec<f32>) {
        hadamard_blocks(x, self.block);
        scratch.clear();
        scratch.extend_from_slice(x);
        x.fill(0.0);
        for (row, out) in self.mix.chunks_exact(self.blocks).zip(x.chunks_exact_mut(self.block)) {
            for (weight, from) in row.iter().zip(scratch.chunks_exact(self.block)) {
                for (out, from) in out.iter_mut().zip(from) {
                    *out += weight * from;
                }
            }
        }
    }
}

/// A dense orthogonal matrix without zeros, by Gram-Schmidt on fixed pseudo-random rows.
fn orthogonal(n: usize) -> Vec<f32> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5
    };
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(n);
    while rows.len() < n {
        let mut row: Vec<f64> = (0..n).map(|_| next()).collect();
        // Twice is enough for orthogonality to machine precision.
        for _ in 0..2 {
            for other in &rows {
                let dot: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
            }
        }
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        if norm > 1e-3 {
            row.iter_mut().for_each(|x| *x /= norm);
            rows.push(row);
        }
    }
    rows.into_iter().flatten().map(|x| x as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotation_keeps_every_dot_product() {
        for width in [576usize, 512, 96, 7] {
            let rotation = Rotation::new(width);
            let mut a: Vec<f32> = (0..width).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
            let mut b: Vec<f32> = (0..width).map(|i| ((i * 53 % 97) as f32 - 48.0) / 48.0).collect();
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            let before = (dot(&a, &b), dot(&a, &a));
            let mut scratch = Vec::new();
            rotation.apply(&mut a, &mut scratch);
            rotation.apply(&mut b, &mut scratch);
            assert!((before.0 - dot(&a, &b)).abs() < 1e-3 && (before.1 - dot(&a, &a)).abs() < 1e-2, "{width}");
        }
    }
}
