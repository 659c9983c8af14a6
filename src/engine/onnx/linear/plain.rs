//! The kernel for any machine, and the twin that the others are held against.

use half::f16;

use super::{Job, PANEL, PLANE_BYTES, Sums};
use crate::model::BLOCK;

/// One row.
pub(super) fn tile(job: &Job, row: usize, sums: &mut Sums) -> usize {
    let quants = &job.rows.quants[row * job.inputs..][..job.inputs];
    let scales = &job.rows.scales[row * job.blocks() * 2..][..job.blocks() * 2];
    sums[0].fill(0.0);
    let blocks = job.bytes.chunks_exact(job.bytes.len() / job.blocks());
    for ((block, quants), scales) in blocks.zip(quants.as_chunks::<BLOCK>().0).zip(scales.as_chunks::<2>().0) {
        let (codes, tail) = block.split_at(job.planes * PLANE_BYTES);
        let half_at = |at: usize| f16::from_le_bytes([tail[2 * at], tail[2 * at + 1]]).to_f32();
        for (lane, sum) in sums[0].iter_mut().enumerate() {
            let mut product = 0i32;
            for (k, quant) in quants.iter().enumerate() {
                let at = k / 4 * 32 + lane % 8 * 4 + k % 4;
                let code =
                    |plane: usize| i32::from(codes[plane * PLANE_BYTES + at] >> (lane / 8 * 4) & 15) << (4 * plane);
                product += (0..job.planes).map(code).sum::<i32>() * i32::from(*quant);
            }
            *sum = half_at(PANEL + lane).mul_add(scales[1], *sum);
            *sum = (product as f32 * half_at(lane)).mul_add(scales[0], *sum);
        }
    }
    1
}
