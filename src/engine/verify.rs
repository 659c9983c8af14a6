//! From the logits of a step to tokens: of one sequence, for as far as it got.

use super::{
    EngineEventBody,
    logits::{self, TokenSet},
    logprobs, sampler,
    sequence::Sequence,
};
use crate::{domain::TokenDetail, grammar::GrammarError, model::Vocabulary};

/// What came of one sequence's step.
pub struct End {
    /// Drafts that were right.
    pub accepted: usize,
    /// Its last event, if it has ended.
    pub last: Option<EngineEventBody>,
}

pub type Mask = Result<TokenSet, GrammarError>;

/// The prompt's rows from the sequence's first row that is computed now.
pub fn tell_of_prompt<'a>(
    sequence: &mut Sequence,
    rows: impl Iterator<Item = &'a [f32]>,
    scratch: &mut sampler::Scratch,
) {
    let top = sequence.spec.telling.prompt_logprobs.unwrap_or(0) as usize;
    for (row, at) in rows.zip(sequence.computed..) {
        // A prompt that is computed again, after a preemption, has been told of as far as it got.
        if let Some(token) = sequence.untold(at) {
            sequence.tell_of_prompt(logprobs::detail(row, token, top, &mut scratch.weights));
        }
    }
}

/// A grammar that turns out to be too much, at a place that its author chose: what was told before is no failure of
/// ours, and is paid for.
fn cannot_follow(sequence: &mut Sequence, error: &GrammarError) -> EngineEventBody {
    if sequence.answer().is_empty() {
        return EngineEventBody::Failed { message: format!("the grammar cannot be followed: {error}") };
    }
    tracing::warn!(request = %sequence.spec.request, %error, "an answer was cut off: its grammar cannot be followed");
    let ending = sequence.cut();
    sequence.finished(ending)
}

/// Samples from row after row of `logits` for as long as what comes out is what the next row was computed
/// with. Random numbers belong to positions, so this is what would have come out row by row.
pub fn verify<'a>(
    sequence: &mut Sequence,
    logits: impl Iterator<Item = &'a [f32]>,
    drafts: &[u32],
    mask: Option<Mask>,
    vocabulary: &Vocabulary,
    scratch: &mut sampler::Scratch,
) -> End {
    let mut end = End { accepted: 0, last: None };
    let failed = |message: &str| Some(EngineEventBody::Failed { message: message.to_owned() });
    let mask = match mask.transpose() {
        Ok(mask) => mask,
        Err(error) => return End { accepted: 0, last: Some(cannot_follow(sequence, &error)) },
    };
    for (i, row) in logits.enumerate() {
        if !sampler::is_finite(row) {
            end.last = failed("the model computed something that is not a number");
            break;
        }
        let Some(token) = choose(sequence, row, mask.as_ref(), scratch) else {
            // As if there were no room for more.
            let ending = sequence.cut();
            end.last = Some(sequence.finished(ending));
            break;
        };
        let is_right = drafts.get(i) == Some(&token);
        end.accepted += usize::from(is_right);
        // All but the token that is new now.
        sequence.computed = sequence.tokens.len();
        let telling = sequence.spec.telling;
        let detail = telling.tells_tokens().then(|| match telling.logprobs {
            Some(top) => logprobs::detail(row, token, top as usize, &mut scratch.weights),
            None => TokenDetail { token, logprob: 0.0, rank: 0, top: Vec::new(), is_hidden: false },
        });
        let matched = sequence.constraint.as_mut().map(|constraint| constraint.accept(token)).transpose();
        let ending = sequence.accept(token, detail, vocabulary);
        let ending = match (ending, matched) {
            (_, Err(error)) => {
                end.last = Some(cannot_follow(sequence, &error));
                break;
            }
            (None, Ok(Some(true))) => Some(sequence.complete()),
            (None, Ok(_)) => sequence.run_out(),
            (ending, _) => ending,
        };
        if let Some(ending) = ending {
            end.last = Some(sequence.finished(ending));
            break;
        }
        if !is_right {
            break;
        }
    }
    sequence.drafter.learn(drafts.len(), end.accepted);
    end
}

/// The next token, from a row of logits. `None` if nothing may come.
fn choose(sequence: &Sequence, row: &[f32], mask: Option<&TokenSet>, scratch: &mut sampler::Scratch) -> Option<u32> {
    let (params, position) = (&sequence.spec.sampling, sequence.tokens.len());
    if sequence.shaper.is_none() && mask.is_none() {
        return Some(sampler::sample(row, params, position, scratch));
    }
    let mut shaped = std::mem::take(&mut scratch.shaped);
    let is_possible = logits::shape(row, sequence.shaper.as_ref(), mask, sequence.answer(), &mut shaped);
    let token = is_possible.then(|| sampler::sample(&shaped, params, position, scratch));
    scratch.shaped = shaped;
    token
}
