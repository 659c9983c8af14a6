//! When one answer's text came: the arithmetic of latencies, without any network.
//!
//! A chunk of text may carry several tokens. Times between tokens are therefore a chunk's gap divided by the
//! tokens of the chunk: counted, where the server tells its running total with every chunk, and otherwise taken
//! as the answer's tokens over its chunks. A stall that a client sees is in the gaps between chunks, which are
//! reported as they are.

use std::time::{Duration, Instant};

/// One answer, or the part of it that had come when it was broken off.
pub struct Timeline {
    /// When the request was due.
    pub asked: Instant,
    pub arrivals: Vec<Arrival>,
    pub ended: Instant,
    pub usage: Tokens,
}

/// A chunk with text.
#[derive(Clone, Copy)]
pub struct Arrival {
    pub at: Instant,
    /// The answer's tokens up to and with this chunk, if the server said so.
    pub tokens_so_far: Option<u32>,
}

#[derive(Clone, Copy, Default)]
pub struct Tokens {
    pub prompt: u32,
    /// Of the prompt, those that a cache had.
    pub cached: u32,
    pub output: u32,
}

/// Between one chunk with text and the next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gap {
    pub from: Instant,
    pub to: Instant,
    /// Of the chunk that ends it.
    pub tokens: f64,
}

impl Gap {
    pub fn length(&self) -> Duration {
        self.to - self.from
    }

    /// One value for every token of the chunk: a chunk of four after 40 ms is four tokens of 10 ms.
    pub fn per_token(&self) -> impl Iterator<Item = Duration> + use<> {
        let times = (self.tokens.round() as usize).max(1);
        std::iter::repeat_n(self.length().div_f64(self.tokens.max(1.0)), times)
    }
}

impl Timeline {
    pub fn ttft(&self) -> Option<Duration> {
        Some(self.arrivals.first()?.at - self.asked)
    }

    pub fn whole(&self) -> Duration {
        self.ended - self.asked
    }

    /// From the first text to the last, over the tokens in between; the first chunk's are not among them.
    pub fn mean_per_token(&self) -> Option<Duration> {
        let (first, last) = (self.arrivals.first()?, self.arrivals.last()?);
        let in_first = f64::from(first.tokens_so_far.unwrap_or(0)).max(self.tokens_per_chunk_if_uncounted());
        let tokens = f64::from(self.usage.output) - in_first;
        (tokens >= 1.0 && self.arrivals.len() > 1).then(|| (last.at - first.at).div_f64(tokens))
    }

    pub fn is_counted(&self) -> bool {
        self.arrivals.iter().all(|arrival| arrival.tokens_so_far.is_some())
    }

    pub fn gaps(&self) -> impl Iterator<Item = Gap> {
        let mean = self.mean_tokens_per_chunk();
        self.arrivals.windows(2).map(move |pair| {
            let counted = match (pair[0].tokens_so_far, pair[1].tokens_so_far) {
                (Some(before), Some(after)) => Some(f64::from(after.saturating_sub(before))),
                _ => None,
            };
            Gap { from: pair[0].at, to: pair[1].at, tokens: counted.unwrap_or(mean).max(1.0) }
        })
    }

    /// At least 1: a token that is no text by itself comes with a later one, never in two chunks.
    fn mean_tokens_per_chunk(&self) -> f64 {
        match self.arrivals.len() {
            0 => 1.0,
            chunks => (f64::from(self.usage.output) / chunks as f64).max(1.0),
        }
    }

    fn tokens_per_chunk_if_uncounted(&self) -> f64 {
        if self.is_counted() { 0.0 } else { self.mean_tokens_per_chunk() }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Chunks at these milliseconds after the request, with running totals if given.
    pub fn timeline(start: Instant, chunks: &[(u64, Option<u32>)], output: u32) -> Timeline {
        let at = |ms: u64| start + Duration::from_millis(ms);
        Timeline {
            asked: start,
            arrivals: chunks.iter().map(|(ms, so_far)| Arrival { at: at(*ms), tokens_so_far: *so_far }).collect(),
            ended: at(chunks.last().map_or(0, |(ms, _)| *ms)),
            usage: Tokens { prompt: 10, cached: 0, output },
        }
    }

    fn per_token_ms(timeline: &Timeline) -> Vec<u128> {
        timeline.gaps().flat_map(|gap| gap.per_token()).map(|time| time.as_millis()).collect()
    }

    #[test]
    fn one_token_a_chunk_needs_no_count() {
        let answer = timeline(Instant::now(), &[(50, None), (60, None), (80, None)], 3);
        assert_eq!(answer.ttft(), Some(Duration::from_millis(50)));
        assert_eq!(per_token_ms(&answer), [10, 20]);
        assert_eq!(answer.mean_per_token(), Some(Duration::from_millis(15)));
    }

    #[test]
    fn a_counted_chunk_of_many_tokens_is_that_many_times() {
        let answer = timeline(Instant::now(), &[(50, Some(1)), (90, Some(5)), (100, Some(6))], 6);
        assert!(answer.is_counted());
        assert_eq!(per_token_ms(&answer), [10, 10, 10, 10, 10]);
        assert_eq!(answer.mean_per_token(), Some(Duration::from_millis(10)));
        let gaps: Vec<_> = answer.gaps().map(|gap| gap.length().as_millis()).collect();
        assert_eq!(gaps, [40, 10], "a client saw these pauses");
    }

    #[test]
    fn uncounted_chunks_of_many_tokens_share_the_answers_tokens() {
        // 3 chunks, 12 tokens: 4 in each, so 8 after the first one's.
        let answer = timeline(Instant::now(), &[(50, None), (90, None), (130, None)], 12);
        assert_eq!(per_token_ms(&answer), [10; 8]);
        assert_eq!(answer.mean_per_token(), Some(Duration::from_millis(10)));
    }

    #[test]
    fn an_answer_of_one_chunk_or_none_has_no_time_between_tokens() {
        for chunks in [&[][..], &[(50, None)][..]] {
            let answer = timeline(Instant::now(), chunks, 1);
            assert_eq!(per_token_ms(&answer), [0u128; 0]);
            assert_eq!(answer.mean_per_token(), None);
        }
    }
}
