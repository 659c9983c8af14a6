//! Guessing tokens by looking them up: what followed the last few tokens when they stood there before.
//!
//! Guesses are verified in the same step as the next token and cost rows. So each sequence keeps count of how
//! its guesses fared, guesses only as far as that and the price of a row make it worth while, and after a
//! failure rests for twice as many steps as the last time. Pure.

/// Tokens guessed at once.
pub const DRAFTS_MAX: usize = 7;
/// Tokens that must have stood there before, in this order.
const MATCH_MIN: usize = 3;
/// The same, for who has just guessed right: a changed word in a copy is soon forgotten.
const MATCH_MIN_TRUSTED: usize = 2;
/// Longer matches are all alike.
const MATCH_MAX: usize = 8;
/// Steps of rest after many failures.
const REST_MAX: u32 = 64;
/// A guess is worth so many times its price.
const MARGIN: f64 = 1.2;
/// A row that costs more tokens than this is never tried.
const PRICE_MAX: f64 = 0.7;
/// What the last guess weighs in the count.
const LEARNING: f64 = 0.2;

/// How guessing fares in one sequence.
pub struct Drafter {
    /// The chance that a guess is right if those before it are.
    hits: f64,
    rest: u32,
    failures: u32,
}

impl Drafter {
    pub fn new() -> Self {
        Self { hits: 0.5, rest: 0, failures: 0 }
    }

    /// How many tokens to guess in this step, where verifying one costs as much as `price` tokens would.
    pub fn wanted(&mut self, price: f64) -> usize {
        if price > PRICE_MAX {
            return 0;
        }
        if self.rest > 0 {
            self.rest -= 1;
            return 0;
        }
        // The j-th guess helps if all up to it are right. Where not even the first pays, one is tried all the
        // same: rests keep that cheap, and the text may have changed its ways.
        let worth = (MARGIN * price).max(1e-6).ln() / self.hits.ln();
        (worth as usize).clamp(1, DRAFTS_MAX)
    }

    /// What followed the last tokens where most of them stood before; at most `most` tokens.
    pub fn guess<'a>(&self, tokens: &'a [u32], most: usize) -> &'a [u32] {
        let min = if self.failures == 0 && self.hits > 0.6 { MATCH_MIN_TRUSTED } else { MATCH_MIN };
        look_up(tokens, min, most)
    }

    /// How the guesses of one step fared.
    pub fn learn(&mut self, drafted: usize, accepted: usize) {
        for right in (0..drafted.min(accepted + 1)).map(|i| i < accepted) {
            self.hits += LEARNING * (f64::from(u8::from(right)) - self.hits);
        }
        self.hits = self.hits.clamp(0.01, 0.99);
        if accepted > 0 {
            self.failures = 0;
        } else if drafted > 0 {
            self.rest = REST_MAX.min(1 << self.failures.min(6));
            self.failures += 1;
        }
    }
}

fn look_up(tokens: &[u32], match_min: usize, most: usize) -> &[u32] {
    let Some((last, before)) = tokens.split_last() else { return &[] };
    let mut best = (match_min - 1, 0);
    let mut found: &[u32] = &[];
    // The latest first: of equals it stays.
    for end in (1..=before.len()).rev() {
        if before[end - 1] != *last {
            continue;
        }
        let earlier = tokens[..end].iter().rev();
        let same = earlier.zip(tokens.iter().rev()).take(MATCH_MAX).take_while(|(a, b)| a == b).count();
        let follows = &tokens[end..tokens.len().min(end + most)];
        if (same, follows.len()) > best && same >= match_min {
            (best, found) = ((same, follows.len()), follows);
        }
        if best == (MATCH_MAX, most) {
            break;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_match_is_followed_and_of_equals_the_latest() {
        let tokens = [9, 1, 2, 3, 50, 1, 2, 3, 60, 7, 1, 2, 3];
        assert_eq!(look_up(&tokens, 3, 2), [60, 7]);
        let tokens = [9, 1, 2, 3, 50, 8, 1, 2, 3, 60, 7, 9, 1, 2, 3];
        assert_eq!(look_up(&tokens, 3, 3), [50, 8, 1]);
        assert!(look_up(&tokens[..3], 3, 3).is_empty());
        assert!(look_up(&[], 3, 3).is_empty());
    }

    #[test]
    fn a_repetition_is_followed_as_far_as_wanted() {
        assert_eq!(look_up(&[5; 40], 3, 7), [5; 7]);
        assert_eq!(look_up(&[5; 12], 3, 7), [5; 4]);
    }

    #[test]
    fn who_guesses_right_guesses_further_and_who_fails_rests_longer_each_time() {
        let mut drafter = Drafter::new();
        assert!(drafter.wanted(0.1) < DRAFTS_MAX);
        (0..5).for_each(|_| drafter.learn(3, 3));
        assert_eq!(drafter.wanted(0.1), DRAFTS_MAX);
        let mut tries = Vec::new();
        for step in 0..200 {
            if drafter.wanted(0.1) > 0 {
                tries.push(step);
                drafter.learn(1, 0);
            }
        }
        let rests: Vec<_> = tries.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(rests.windows(2).all(|pair| pair[1] >= pair[0]) && rests[4] >= 16, "{rests:?}");
    }

    #[test]
    fn failing_costs_less_than_three_percent_however_long_it_goes_on() {
        for price in [0.05, 0.1, 0.3, 0.7] {
            let mut drafter = Drafter::new();
            let mut rows = 0;
            for _ in 0..1000 {
                let drafted = drafter.wanted(price);
                rows += drafted;
                if drafted > 0 {
                    drafter.learn(drafted, 0);
                }
            }
            assert!(rows as f64 * price < 30.0, "{rows} rows at {price}");
        }
    }

    #[test]
    fn rows_that_are_not_free_are_not_spent() {
        let mut drafter = Drafter::new();
        (0..20).for_each(|_| drafter.learn(7, 7));
        assert_eq!(drafter.wanted(0.9), 0);
        assert!(drafter.wanted(0.5) > 0);
    }
}
