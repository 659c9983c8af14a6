//! The kernel for any machine, and the twin that the others are held against.

use std::ops::Range;

use half::f16;

use super::{Codes, Job, PANEL, PLANE_BYTES, byte_place, half_place};
use crate::model::BLOCK;

pub(super) fn tile(job: &Job, rows: Range<usize>, sums: &mut [[f32; PANEL]]) {
    for (row, sums) in rows.zip(sums) {
        one(job, row, sums);
    }
}

fn one(job: &Job, row: usize, sums: &mut [f32; PANEL]) {
    let quants = &job.rows.quants[row * job.inputs..][..job.inputs];
    let scales = &job.rows.scales[row * job.blocks() * 2..][..job.blocks() * 2];
    sums.fill(0.0);
    let blocks = job.bytes.chunks_exact(job.bytes.len() / job.blocks());
    for ((block, quants), scales) in blocks.zip(quants.as_chunks::<BLOCK>().0).zip(scales.as_chunks::<2>().0) {
        let (codes, tail) = block.split_at(job.codes.bytes());
        let half_at = |at: usize| f16::from_le_bytes([tail[2 * at], tail[2 * at + 1]]).to_f32();
        for (lane, sum) in sums.iter_mut().enumerate() {
            let products =
                quants.iter().enumerate().map(|(k, q)| i32::from(code(codes, lane, k, job.codes)) * i32::from(*q));
            let product: i32 = products.sum();
            *sum = half_at(PANEL + lane).mul_add(scales[1], *sum);
            *sum = (product as f32 * half_at(lane)).mul_add(scales[0], *sum);
        }
    }
}

fn code(bytes: &[u8], lane: usize, k: usize, codes: Codes) -> u8 {
    let (at, shift) = half_place(lane, k);
    match codes {
        Codes::Four => bytes[at] >> shift & 15,
        Codes::Seven => bytes[byte_place(lane, k)],
        Codes::Eight => bytes[at] >> shift & 15 | (bytes[PLANE_BYTES + at] >> shift & 15) << 4,
    }
}
