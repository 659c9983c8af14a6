//! What a request changes in a row of logits before a token is chosen from it.
//!
//! A pure function of the row and of the request's own tokens: nothing here depends on who else is served, nor on
//! how many rows of the request a step has.

use std::collections::{HashMap, HashSet};

use crate::domain::SamplingParams;

/// A set of tokens, a bit each.
#[derive(Clone, Debug, Default)]
pub struct TokenSet {
    words: Vec<u32>,
}

impl TokenSet {
    pub fn of(tokens: &[u32]) -> Self {
        let mut words = vec![0; tokens.iter().max().map_or(0, |most| *most as usize / 32 + 1)];
        for token in tokens {
            words[*token as usize / 32] |= 1 << (token % 32);
        }
        Self { words }
    }

    /// `words[i]` has tokens `32 * i` and on, the lowest bit first.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// Leaves only its tokens in the running.
    fn keep(&self, row: &mut [f32]) {
        let words = self.words.iter().copied().chain(std::iter::repeat(0));
        for (logits, word) in row.chunks_mut(32).zip(words) {
            if word == u32::MAX {
                continue;
            }
            for (i, logit) in logits.iter_mut().enumerate() {
                if word >> i & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// Penalties leave no logit beyond this.
const LOGIT_MAX: f32 = 1e30;

/// The changes that one answer asks for, and what they need to know of its tokens.
pub struct Shaper {
    bias: Vec<(u32, f32)>,
    frequency_penalty: f32,
    presence_penalty: f32,
    repetition_penalty: f32,
    allowed: Option<TokenSet>,
    bad_words: Vec<Vec<u32>>,
    min_tokens: u32,
    /// What would end the answer.
    ends: Vec<u32>,
    /// How often the answer has each of its tokens.
    counts: HashMap<u32, u32>,
    /// Tokens of the prompt, if they matter.
    prompt: HashSet<u32>,
    answered: u32,
}

impl Shaper {
    /// `None` where `params` change nothing. `ends` are the tokens that end the answer.
    pub fn new(params: &SamplingParams, prompt: &[u32], ends: Vec<u32>) -> Option<Self> {
        let penalises =
            params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 || params.repetition_penalty != 1.0;
        let excludes = params.allowed_tokens.is_some() || !params.bad_words.is_empty() || params.min_tokens > 0;
        if !penalises && !excludes && params.logit_bias.is_empty() {
            return None;
        }
        Some(Self {
            bias: params.logit_bias.clone(),
            frequency_penalty: params.frequency_penalty,
            presence_penalty: params.presence_penalty,
            repetition_penalty: params.repetition_penalty,
            allowed: params.allowed_tokens.as_deref().map(TokenSet::of),
            bad_words: params.bad_words.clone(),
            min_tokens: params.min_tokens,
            ends,
            counts: HashMap::new(),
            prompt: if params.repetition_penalty == 1.0 { HashSet::new() } else { prompt.iter().copied().collect() },
            answered: 0,
        })
    }

    /// Notes the answer's next token.
    pub fn accept(&mut self, token: u32) {
        self.answered += 1;
        *self.counts.entry(token).or_default() += 1;
    }

    fn penalise(&self, row: &mut [f32]) {
        if self.repetition_penalty != 1.0 {
            let answer = self.counts.keys().filter(|token| !self.prompt.contains(*token));
            for token in self.prompt.iter().chain(answer) {
                if let Some(logit) = row.get_mut(*token as usize) {
                    let factor = if *logit > 0.0 { 1.0 / self.repetition_penalty } else { self.repetition_penalty };
                    // Infinite ones would be left with no weight to draw by.
                    *logit = (*logit * factor).clamp(-LOGIT_MAX, LOGIT_MAX);
                }
            }
        }
        for (token, count) in &self.counts {
            if let Some(logit) = row.get_mut(*token as usize) {
                *logit -= self.frequency_penalty * *count as f32 + self.presence_penalty;
            }
        }
        for (token, bias) in &self.bias {
            if let Some(logit) = row.get_mut(*token as usize) {
                *logit += bias;
            }
        }
    }

    /// `tokens` are those of the answer so far.
    fn exclude(&self, tokens: &[u32], row: &mut [f32]) {
        let mut ban = |token: u32| {
            if let Some(logit) = row.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        };
        if self.answered < self.min_tokens {
            self.ends.iter().copied().for_each(&mut ban);
        }
        for word in &self.bad_words {
            if let Some((last, before)) = word.split_last()
                && tokens.ends_with(before)
            {
                ban(*last);
            }
        }
        if let Some(allowed) = &self.allowed {
            allowed.keep(row);
        }
    }
}

/// The row that a token is chosen from, in `shaped`: `row` as the request changes it, and of that what `mask` leaves.
/// Exclusions that leave nothing of the mask are not heeded. False if nothing is left all the same.
///
/// `answer` are the tokens of the answer so far.
pub fn shape(
    row: &[f32],
    shaper: Option<&Shaper>,
    mask: Option<&TokenSet>,
    answer: &[u32],
    shaped: &mut Vec<f32>,
) -> bool {
    let is_possible = |row: &[f32]| row.iter().any(|logit| *logit > f32::NEG_INFINITY);
    let fill = |shaped: &mut Vec<f32>| {
        shaped.clear();
        shaped.extend_from_slice(row);
        if let Some(shaper) = shaper {
            shaper.penalise(shaped);
        }
    };
    fill(shaped);
    if let Some(shaper) = shaper {
        shaper.exclude(answer, shaped);
    }
    if let Some(mask) = mask {
        mask.keep(shaped);
    }
    if is_possible(shaped) {
        return true;
    }
    fill(shaped);
    if let Some(mask) = mask {
        mask.keep(shaped);
    }
    is_possible(shaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shaped(params: &SamplingParams, prompt: &[u32], answer: &[u32], mask: Option<&[u32]>) -> Vec<f32> {
        let mut shaper = Shaper::new(params, prompt, vec![9]);
        if let Some(shaper) = &mut shaper {
            answer.iter().for_each(|token| shaper.accept(*token));
        }
        let row: Vec<f32> = (0..70).map(|i| if i % 2 == 0 { 4.0 } else { -4.0 }).collect();
        let mut out = Vec::new();
        assert!(shape(&row, shaper.as_ref(), mask.map(TokenSet::of).as_ref(), answer, &mut out));
        out
    }

    fn left(row: &[f32]) -> Vec<usize> {
        (0..row.len()).filter(|i| row[*i] > f32::NEG_INFINITY).collect()
    }

    #[test]
    fn no_penalty_makes_a_logit_infinite() {
        let params = SamplingParams { repetition_penalty: f32::MIN_POSITIVE, ..Default::default() };
        let row = shaped(&params, &[2, 3], &[4, 5], None);
        assert!(row.iter().all(|logit| logit.is_finite()), "{row:?}");
        assert!(row[2] > 1e20 && row[3] > -1.0);
    }

    #[test]
    fn who_asks_for_nothing_has_no_shaper() {
        assert!(Shaper::new(&SamplingParams { temperature: 0.3, ..Default::default() }, &[1], vec![]).is_none());
    }

    #[test]
    fn penalties_count_the_answer_and_repetition_the_prompt_as_well() {
        let params = SamplingParams { frequency_penalty: 0.5, presence_penalty: 1.0, ..Default::default() };
        let row = shaped(&params, &[2], &[4, 4, 5], None);
        assert_eq!((row[2], row[4], row[5], row[6]), (4.0, 2.0, -5.5, 4.0));
        let params = SamplingParams { repetition_penalty: 2.0, ..Default::default() };
        let row = shaped(&params, &[2, 3], &[4, 2], None);
        assert_eq!((row[2], row[3], row[4], row[6]), (2.0, -8.0, 2.0, 4.0));
    }

    #[test]
    fn a_bias_is_added_and_one_for_a_token_that_is_not_there_is_nothing() {
        let params = SamplingParams { logit_bias: vec![(3, 100.0), (4, -100.0), (9_999, 1.0)], ..Default::default() };
        let row = shaped(&params, &[], &[], None);
        assert_eq!((row[3], row[4], row[5]), (96.0, -96.0, -4.0));
    }

    #[test]
    fn an_answer_does_not_end_before_its_least_length() {
        let params = SamplingParams { min_tokens: 2, ..Default::default() };
        assert_eq!(shaped(&params, &[], &[1], None)[9], f32::NEG_INFINITY);
        assert_eq!(shaped(&params, &[], &[1, 2], None)[9], -4.0);
    }

    #[test]
    fn a_bad_word_is_not_completed() {
        let params = SamplingParams { bad_words: vec![vec![5, 6], vec![7]], ..Default::default() };
        let banned = |answer: &[u32]| {
            let row = shaped(&params, &[], answer, None);
            (0..70).filter(|i| row[*i] == f32::NEG_INFINITY).collect::<Vec<_>>()
        };
        assert_eq!(banned(&[1]), [7]);
        assert_eq!(banned(&[1, 5]), [6, 7]);
    }

    #[test]
    fn only_what_is_allowed_is_left_and_a_mask_is_stronger_than_any_wish() {
        let params = SamplingParams { allowed_tokens: Some(vec![1, 40, 69]), ..Default::default() };
        assert_eq!(left(&shaped(&params, &[], &[], None)), [1, 40, 69]);
        assert_eq!(left(&shaped(&params, &[], &[], Some(&[2, 40, 68]))), [40]);
        assert_eq!(left(&shaped(&params, &[], &[], Some(&[2, 68]))), [2, 68]);
    }

    #[test]
    fn a_mask_that_leaves_nothing_is_told() {
        assert!(!shape(&[1.0; 8], None, Some(&TokenSet::of(&[])), &[], &mut Vec::new()));
    }
}
