//! How near the served graph comes to the model's own weights, on a text.
//!
//! Both graphs read the same windows of the text, and at every position their distributions over the next
//! token are compared with each other and with the token that follows. Never serves requests, and never
//! decides what is good enough by itself: [`Quality::fault`] compares with bounds that the caller gives.

use std::sync::Arc;

use super::{
    Batch, BatchSequence, EngineError, Forward,
    onnx::{
        OnnxModel, OnnxRuntime,
        reference::{KvFormat, Reference},
    },
};
use crate::model::ModelFile;

/// Tokens that are read from an empty context; the next window begins anew.
pub const WINDOW_TOKENS: usize = 512;
const KV_BLOCK_TOKENS: usize = 16;
/// Rows of one step of the served graph; what a row computes does not depend on it.
const STEP_ROWS: usize = 32;

/// A text, as the model reads it.
pub struct Passage<'a> {
    pub tokens: &'a [u32],
    /// Put before every window where the model was trained to see one there.
    pub bos: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quality {
    /// Positions at which a next token was predicted.
    pub positions: usize,
    /// Of the served graph, on the text.
    pub perplexity: f64,
    /// Of the dequantised fp32 weights, on the same positions.
    pub perplexity_reference: f64,
    /// Mean Kullback-Leibler divergence of the served distribution from the reference's, in nats.
    pub kl_mean: f64,
    /// The part of the positions at which both hold the same token for the likeliest.
    pub top1_agreement: f64,
}

/// What a served graph may lose.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// How far the ratio of the perplexities may lie from 1.
    pub perplexity_off_max: f64,
    pub kl_mean_max: f64,
}

impl Quality {
    /// Perplexity of the served graph over that of the fp32 weights.
    pub fn perplexity_ratio(&self) -> f64 {
        self.perplexity / self.perplexity_reference
    }

    /// What lies outside the bounds, in words.
    pub fn fault(&self, bounds: Bounds) -> Option<String> {
        let mut faults = Vec::new();
        let off = (self.perplexity_ratio() - 1.0).abs();
        // Written so that a value that is no number is a fault.
        if !matches!(off.partial_cmp(&bounds.perplexity_off_max), Some(std::cmp::Ordering::Less)) {
            faults.push(format!(
                "perplexity is {:.4} of the fp32 weights' ({} off is allowed)",
                self.perplexity_ratio(),
                bounds.perplexity_off_max
            ));
        }
        if !matches!(self.kl_mean.partial_cmp(&bounds.kl_mean_max), Some(std::cmp::Ordering::Less)) {
            faults.push(format!("mean KL is {:.5} (at most {} is allowed)", self.kl_mean, bounds.kl_mean_max));
        }
        (!faults.is_empty()).then(|| faults.join("; "))
    }
}

/// Reads the passage with both graphs. `progress` hears after each step how many positions are done. Blocks: this is
/// minutes of work for a large model.
///
/// # Errors
/// The passage has fewer than two tokens, a graph cannot be loaded, or one computes what is not a number.
pub fn measure(
    runtime: &OnnxRuntime,
    file: &Arc<ModelFile>,
    passage: &Passage,
    mut progress: impl FnMut(usize),
) -> Result<Quality, EngineError> {
    let window = window_tokens(file);
    let blocks: Vec<u32> = (0..window.div_ceil(KV_BLOCK_TOKENS) as u32).collect();
    let mut served = OnnxModel::load(runtime, file, blocks.len(), KV_BLOCK_TOKENS, window)?;
    let mut reference = Reference::load(runtime, file, window)?;
    let mut sums = Sums::default();
    compare(passage, &mut reference, &mut sums, |input, window| {
        for computed in (0..input.len()).step_by(STEP_ROWS) {
            let rows = STEP_ROWS.min(input.len() - computed);
            let tokens = &input[..computed + rows];
            let sequence = BatchSequence {
                tokens,
                prompt_tokens: tokens.len(),
                computed,
                rows,
                logits_rows: rows,
                blocks: &blocks,
            };
            progress(window.add(computed, served.forward(&Batch { sequences: vec![sequence] })?)?);
        }
        Ok(())
    })?;
    Ok(sums.quality())
}

/// What a format of keys and values costs by itself: fp32 weights with it, held against those without.
///
/// # Errors
/// As [`measure`].
pub fn kv_cost(
    runtime: &OnnxRuntime,
    file: &Arc<ModelFile>,
    passage: &Passage,
    format: KvFormat,
    mut progress: impl FnMut(usize),
) -> Result<Quality, EngineError> {
    let tokens = window_tokens(file);
    let mut rounding = Reference::load_with(runtime, file, tokens, format)?;
    let mut reference = Reference::load(runtime, file, tokens)?;
    let mut sums = Sums::default();
    compare(passage, &mut reference, &mut sums, |input, window| {
        progress(window.add(0, &rounding.logits(input)?)?);
        Ok(())
    })?;
    Ok(sums.quality())
}

fn window_tokens(file: &ModelFile) -> usize {
    WINDOW_TOKENS.min(file.params.context_tokens)
}

/// Reads the passage window by window; `got` is given the tokens of each, and adds the other graph's logits.
fn compare(
    passage: &Passage,
    reference: &mut Reference,
    sums: &mut Sums,
    mut got: impl FnMut(&[u32], &mut Window) -> Result<(), EngineError>,
) -> Result<(), EngineError> {
    if passage.tokens.len() < 2 {
        return Err(EngineError::Limits("quality is measured over two tokens at least".into()));
    }
    let lead = usize::from(passage.bos.is_some());
    let tokens = reference.tokens_max() - lead;
    let mut input = Vec::with_capacity(tokens + lead);
    // The last token of the passage has no successor to be held against.
    for from in (0..passage.tokens.len() - 1).step_by(tokens) {
        let piece = &passage.tokens[from..passage.tokens.len().min(from + tokens + 1)];
        let (read, nexts) = (&piece[..piece.len() - 1], &piece[1..]);
        input.clear();
        input.extend(passage.bos);
        input.extend_from_slice(read);
        let expected = reference.logits(&input)?;
        got(&input, &mut Window { expected: &expected, rows: input.len(), nexts, lead, sums })?;
    }
    Ok(())
}

/// What the reference says about one window.
struct Window<'a> {
    /// `[rows, vocabulary]`
    expected: &'a [f32],
    rows: usize,
    /// The tokens that do follow, after the lead.
    nexts: &'a [u32],
    lead: usize,
    sums: &'a mut Sums,
}

impl Window<'_> {
    /// The other graph's logits of some rows from `first` on. How many positions are compared by now.
    fn add(&mut self, first: usize, got: &[f32]) -> Result<usize, EngineError> {
        let vocabulary = self.expected.len() / self.rows;
        let expected = &self.expected[first * vocabulary..];
        for (at, (expected, got)) in (first..).zip(expected.chunks_exact(vocabulary).zip(got.chunks_exact(vocabulary)))
        {
            if let Some(at) = at.checked_sub(self.lead) {
                self.sums.add(expected, got, self.nexts[at] as usize)?;
            }
        }
        Ok(self.sums.positions)
    }
}

#[derive(Default)]
struct Sums {
    positions: usize,
    surprise: f64,
    surprise_reference: f64,
    divergence: f64,
    agreed: usize,
}

impl Sums {
    fn add(&mut self, expected: &[f32], got: &[f32], next: usize) -> Result<(), EngineError> {
        let (p, q) = (Distribution::new(expected), Distribution::new(got));
        let terms = expected.iter().zip(got).map(|(e, g)| {
            let p_log = p.log(*e);
            p_log.exp() * (p_log - q.log(*g))
        });
        let divergence: f64 = terms.sum();
        if !divergence.is_finite() {
            return Err(EngineError::Limits("the model computes values that are not finite numbers".into()));
        }
        self.positions += 1;
        self.divergence += divergence;
        self.surprise -= q.log(got[next]);
        self.surprise_reference -= p.log(expected[next]);
        self.agreed += usize::from(p.likeliest == q.likeliest);
        Ok(())
    }

    fn quality(&self) -> Quality {
        let n = self.positions as f64;
        Quality {
            positions: self.positions,
            perplexity: (self.surprise / n).exp(),
            perplexity_reference: (self.surprise_reference / n).exp(),
            kl_mean: self.divergence / n,
            top1_agreement: self.agreed as f64 / n,
        }
    }
}

/// The softmax of a row of logits.
struct Distribution {
    likeliest: usize,
    /// What is taken from a logit to make it the logarithm of a probability.
    total_log: f64,
}

impl Distribution {
    fn new(logits: &[f32]) -> Self {
        let (likeliest, largest) =
            logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |a, (i, x)| if *x > a.1 { (i, *x) } else { a });
        let total: f64 = logits.iter().map(|x| f64::from(x - largest).exp()).sum();
        Self { likeliest, total_log: f64::from(largest) + total.ln() }
    }

    fn log(&self, logit: f32) -> f64 {
        f64::from(logit) - self.total_log
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { perplexity_off_max: 0.01, kl_mean_max: 0.01 };

    #[test]
    fn the_same_distribution_has_no_divergence_and_a_known_perplexity() {
        let mut sums = Sums::default();
        // Four equally likely tokens, whatever is added to all logits.
        sums.add(&[1.0; 4], &[7.0; 4], 2).unwrap();
        let quality = sums.quality();
        assert!(quality.kl_mean.abs() < 1e-12, "{quality:?}");
        assert!((quality.perplexity - 4.0).abs() < 1e-9 && (quality.perplexity_ratio() - 1.0).abs() < 1e-9);
        assert_eq!((quality.positions, quality.top1_agreement, quality.fault(BOUNDS)), (1, 1.0, None));
    }

    #[test]
    fn divergence_is_that_of_the_textbook() {
        let mut sums = Sums::default();
        // p = (3/4, 1/4), q = (1/2, 1/2): sum of p ln(p / q).
        sums.add(&[3f32.ln(), 0.0], &[0.0, 0.0], 1).unwrap();
        let expected = 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln();
        assert!((sums.quality().kl_mean - expected).abs() < 1e-6, "{:?}", sums.quality());
        assert!((sums.quality().perplexity_reference - 4.0).abs() < 1e-5, "{:?}", sums.quality());
        assert_eq!(sums.quality().top1_agreement, 1.0);
    }

    #[test]
    fn bounds_are_kept_and_no_number_is_a_fault() {
        let good = Quality {
            positions: 1,
            perplexity: 10.05,
            perplexity_reference: 10.0,
            kl_mean: 0.009,
            top1_agreement: 1.0,
        };
        assert_eq!(good.fault(BOUNDS), None);
        for bad in [
            Quality { perplexity: 10.2, ..good },
            Quality { perplexity: 9.8, ..good },
            Quality { perplexity: f64::NAN, ..good },
            Quality { kl_mean: 0.011, ..good },
            Quality { kl_mean: f64::NAN, ..good },
        ] {
            assert!(bad.fault(BOUNDS).is_some(), "{bad:?}");
        }
        let nothing = Sums::default().add(&[f32::NAN, 0.0], &[0.0, 0.0], 0);
        assert!(nothing.is_err());
    }
}
