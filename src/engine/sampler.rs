//! The next token from a row of logits.
//!
//! A pure function of (logits, parameters, position): random numbers come from a counter, not from a
//! state, so that a stream taken over by another worker goes on as it would have.

use super::simd::{exp, exp8, multiversion};
use crate::domain::SamplingParams;

/// Chooses the token at `position` (counted in tokens from the prompt's first).
pub fn sample(logits: &[f32], params: &SamplingParams, position: usize, scratch: &mut Scratch) -> u32 {
    if params.temperature < 1e-5 || params.top_k == 1 {
        return argmax(logits);
    }
    let weights = &mut scratch.weights;
    weights.resize(logits.len(), 0.0);
    soften(logits, largest(logits), 1.0 / params.temperature, weights);
    let draw = uniform(params.seed, position as u64);
    let is_truncated = params.top_k > 0 || params.top_p < 1.0 || params.min_p > 0.0;
    if !is_truncated {
        return draw_among_all(weights, draw, &mut scratch.stretches);
    }
    let kept = truncate(weights, &mut scratch.candidates, params);
    draw_in_order(kept.iter().copied(), draw * kept.iter().map(|(w, _)| f64::from(*w)).sum::<f64>())
}

/// Buffers that one engine reuses for every sample.
#[derive(Default)]
pub struct Scratch {
    /// The row that is sampled from, where a request changes it.
    pub shaped: Vec<f32>,
    pub weights: Vec<f32>,
    candidates: Vec<(f32, u32)>,
    stretches: Vec<f64>,
}

/// Weights of the vocabulary that are summed before one of them is looked for.
const STRETCH: usize = 512;

multiversion! {
    /// Weights relative to the largest, `e^((x - largest) * factor)`.
    pub fn soften(logits: &[f32], largest: f32, factor: f32, weights: &mut [f32]) {
        for (weight, x) in weights.iter_mut().zip(logits) {
            *weight = (x - largest) * factor;
        }
        let (eights, rest) = weights.as_chunks_mut::<8>();
        eights.iter_mut().for_each(exp8::<FMA>);
        rest.iter_mut().for_each(|x| *x = exp::<FMA>(*x));
    }
}

/// The first of the largest.
fn argmax(logits: &[f32]) -> u32 {
    // In two passes that the compiler turns into vector code; comparing and remembering in one does not.
    let largest = largest(logits);
    logits.iter().position(|x| *x == largest).unwrap_or(0) as u32
}

pub fn largest(logits: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = logits.as_chunks::<16>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Token and weight of those that top-k, top-p and min-p leave, largest first.
fn truncate<'a>(weights: &[f32], candidates: &'a mut Vec<(f32, u32)>, params: &SamplingParams) -> &'a [(f32, u32)] {
    let total = sum(weights);
    let wanted = total * f64::from(params.top_p);
    // The largest weight is 1. Few tokens weigh more than a millionth of it, and nearly always they carry
    // all the mass that top-p asks for; sorting the whole vocabulary is the rare case.
    for floor in [1e-6f32, 0.0] {
        candidates.clear();
        let heavy = weights.iter().zip(0u32..).filter(|(w, _)| **w >= floor);
        candidates.extend(heavy.map(|(w, token)| (*w, token)));
        let carried: f64 = candidates.iter().map(|(w, _)| f64::from(*w)).sum();
        let enough_tokens = params.top_k == 0 || candidates.len() >= params.top_k as usize;
        let enough_mass = params.top_p >= 1.0 || carried >= wanted;
        // Without top-k and top-p only min-p is left, which asks for no more than what is above it.
        let only_min_p = params.top_k == 0 && params.top_p >= 1.0;
        if if only_min_p { params.min_p >= floor } else { enough_tokens && enough_mass } {
            break;
        }
    }
    candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    if params.top_k > 0 {
        candidates.truncate(params.top_k as usize);
    }
    if params.top_p < 1.0 {
        // Top-p is of the mass that top-k left.
        let mass: f64 = if params.top_k > 0 { candidates.iter().map(|(w, _)| f64::from(*w)).sum() } else { total };
        let wanted = mass * f64::from(params.top_p);
        let mut reached = 0.0;
        let keep = candidates.iter().position(|(w, _)| {
            reached += f64::from(*w);
            reached >= wanted
        });
        candidates.truncate(keep.map_or(candidates.len(), |last| last + 1).max(1));
    }
    // Relative to the largest, which weighs 1 and so always stays.
    candidates.retain(|(w, _)| *w >= params.min_p);
    candidates
}

/// False where a number of the row is infinite or none at all: nothing can be sampled from it.
pub fn is_finite(logits: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    logits.iter().fold(0, |most, x| (x.to_bits() & EXPONENT).max(most)) < EXPONENT
}

/// In lanes, which the processor adds up side by side.
pub fn sum(weights: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    let (eights, rest) = weights.as_chunks::<8>();
    for eight in eights {
        for (lane, weight) in lanes.iter_mut().zip(eight) {
            *lane += f64::from(*weight);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|w| f64::from(*w)).sum::<f64>()
}

/// The token under `draw` of the way through all weights, by the stretch that it is in.
fn draw_among_all(weights: &[f32], draw: f64, stretches: &mut Vec<f64>) -> u32 {
    stretches.clear();
    stretches.extend(weights.chunks(STRETCH).map(sum));
    let mut target = draw * stretches.iter().sum::<f64>();
    let mut found = (0, 0.0);
    for (stretch, sum) in stretches.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
        found = (stretch * STRETCH, target);
        if *sum > target {
            break;
        }
        target -= sum;
    }
    let (from, target) = found;
    let stretch = &weights[from..weights.len().min(from + STRETCH)];
    draw_in_order(stretch.iter().copied().zip(from as u32..), target)
}

/// The candidate at which the summed weights first exceed `target`, or else the last with any weight.
fn draw_in_order(candidates: impl Iterator<Item = (f32, u32)>, target: f64) -> u32 {
    let mut reached = 0.0;
    let mut last = 0;
    for (weight, token) in candidates {
        if weight > 0.0 {
            reached += f64::from(weight);
            last = token;
            if reached > target {
                break;
            }
        }
    }
    last
}

/// In [0, 1), from the seed and a counter. Source: SplitMix64 (Steele, Lea, Flood 2014), twice.
fn uniform(seed: u64, counter: u64) -> f64 {
    let mixed = split_mix(split_mix(seed) ^ counter.wrapping_mul(0xd1b5_4a32_d192_ed03));
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

fn split_mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> SamplingParams {
        SamplingParams { seed: 7, ..Default::default() }
    }

    /// How often each token is drawn over many positions.
    fn counts(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for position in 0..20_000 {
            counts[sample(logits, params, position, &mut Scratch::default()) as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let logits: Vec<f32> = (0..100).map(|i| if i == 37 || i == 61 { 5.0 } else { 0.0 }).collect();
        let greedy = SamplingParams { temperature: 0.0, ..params() };
        assert_eq!(sample(&logits, &greedy, 0, &mut Scratch::default()), 37);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [1f32.ln(), 2f32.ln(), 7f32.ln()];
        let counts = counts(&logits, &params());
        for (count, expected) in counts.iter().zip([0.1, 0.2, 0.7]) {
            assert!((count - expected).abs() < 0.015, "{counts:?}");
        }
    }

    #[test]
    fn a_draw_by_stretches_is_the_one_from_first_to_last() {
        let mut weights: Vec<f32> = (0..3 * STRETCH + 77).map(|i| (i * 7919 % 1009) as f32).collect();
        weights[STRETCH..2 * STRETCH].fill(0.0);
        weights[3 * STRETCH + 50..].fill(0.0);
        let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        for i in 0..=1000 {
            // Weights are whole numbers, and no sum of them is this.
            let target = (f64::from(i) / 1000.0 * (total - 1.0)).floor() + 0.5;
            let expected = draw_in_order(weights.iter().copied().zip(0..), target);
            let found = draw_among_all(&weights, target / total, &mut Vec::new());
            assert_eq!(found, expected, "{i}");
            assert!(weights[found as usize] > 0.0);
        }
    }

    /// Of draws at `position` 0, 1, 2, … the counts differ from what the weights say by no more than chance.
    #[test]
    fn draws_pass_a_chi_square_test() {
        let weights: Vec<f32> = (0..40).map(|i| 1.0 + (i * 7 % 11) as f32).collect();
        let logits: Vec<f32> = weights.iter().map(|w| w.ln()).collect();
        let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        for (temperature, seed) in [(1.0f32, 1), (1.0, 2), (0.7, 3), (1.6, 4)] {
            let tempered: Vec<f64> =
                weights.iter().map(|w| (f64::from(*w) / total).powf(1.0 / f64::from(temperature))).collect();
            let mass: f64 = tempered.iter().sum();
            let params = SamplingParams { temperature, seed, ..params() };
            let (mut counts, mut scratch) = (vec![0u32; weights.len()], Scratch::default());
            const DRAWS: usize = 50_000;
            for position in 0..DRAWS {
                counts[sample(&logits, &params, position, &mut scratch) as usize] += 1;
            }
            let expected = tempered.iter().map(|w| w / mass * DRAWS as f64);
            let distance: f64 = counts.iter().zip(expected).map(|(count, e)| (f64::from(*count) - e).powi(2) / e).sum();
            // 39 degrees of freedom: above 72.1 in one of a thousand honest runs, and these are always the same.
            assert!(distance < 72.1, "chi-square {distance} at temperature {temperature}");
        }
    }

    #[test]
    fn truncations_leave_out_what_they_should_and_renormalise_the_rest() {
        let logits = [1f32.ln(), 2f32.ln(), 3f32.ln(), 4f32.ln()];
        let cases = [
            (SamplingParams { top_k: 2, ..params() }, [0.0, 0.0, 3.0 / 7.0, 4.0 / 7.0]),
            (SamplingParams { top_p: 0.65, ..params() }, [0.0, 0.0, 3.0 / 7.0, 4.0 / 7.0]),
            (SamplingParams { top_p: 0.75, ..params() }, [0.0, 2.0 / 9.0, 3.0 / 9.0, 4.0 / 9.0]),
            (SamplingParams { min_p: 0.7, ..params() }, [0.0, 0.0, 3.0 / 7.0, 4.0 / 7.0]),
            (SamplingParams { top_p: 0.0, ..params() }, [0.0, 0.0, 0.0, 1.0]),
        ];
        for (params, expected) in cases {
            let counts = counts(&logits, &params);
            for (count, expected) in counts.iter().zip(expected) {
                assert!((count - expected).abs() < 0.015, "{params:?}: {counts:?}");
            }
        }
    }

    #[test]
    fn min_p_comes_last_and_does_not_change_what_top_p_is_a_share_of() {
        let mut weights = vec![1f32, 0.5];
        weights.extend([0.1; 20]);
        let logits: Vec<f32> = weights.iter().map(|w| w.ln()).collect();
        for top_k in [0, 100] {
            let counts = counts(&logits, &SamplingParams { top_k, top_p: 0.5, min_p: 0.3, ..params() });
            assert!((counts[0] - 2.0 / 3.0).abs() < 0.015 && counts[0] + counts[1] > 0.999, "{top_k}: {counts:?}");
        }
    }

    #[test]
    fn rows_with_anything_but_numbers_are_told_apart() {
        assert!(is_finite(&[0.0, -1.0, f32::MAX, f32::MIN_POSITIVE]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(!is_finite(&[0.0, bad, 1.0]));
        }
    }

    #[test]
    fn the_same_seed_and_position_repeat_and_others_do_not() {
        let logits = vec![0.0; 1000];
        let draw =
            |seed, position| sample(&logits, &SamplingParams { seed, ..params() }, position, &mut Scratch::default());
        assert_eq!(draw(1, 5), draw(1, 5));
        let differs = (0..100).filter(|i| draw(1, *i) != draw(2, *i) && draw(1, *i) != draw(1, i + 1)).count();
        assert!(differs > 90);
    }
}
