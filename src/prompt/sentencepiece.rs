//! SentencePiece's BPE: of all neighbours that together are a token, those with the best score are merged
//! first, the leftmost of equals; what is no token in the end is spelled in bytes.
//!
//! Promises exactly the tokens of that rule, in time that grows with `n log n`, and that no text becomes a
//! control token unless it is asked for. A list of merges, as other tokenisers want it, cannot say the same:
//! ways to make one token have one score, and there the place in the text decides. Also, making such a list
//! of 262,144 scores would take longer than anything else at start.

use std::{cmp::Ordering, collections::BinaryHeap, collections::HashMap};

use aho_corasick::{AhoCorasick, MatchKind};

use super::TokenizerError;
use crate::model::{SPACE, TokenKind, Vocabulary};

pub struct SentencePiece {
    /// The tokens that merges can make, with their scores.
    pieces: HashMap<Box<str>, (u32, f32)>,
    /// The token of each byte.
    bytes: [u32; 256],
    /// Texts that are one token of their own, found before anything else is.
    whole: Whole,
    /// The same and the control tokens.
    whole_or_control: Whole,
    has_space_prefix: bool,
}

impl SentencePiece {
    pub fn new(vocabulary: &Vocabulary, scores: &[f32], has_space_prefix: bool) -> Result<Self, TokenizerError> {
        let mut pieces = HashMap::with_capacity(vocabulary.len());
        let mut bytes = [None; 256];
        let all = vocabulary.tokens.iter().zip(&vocabulary.kinds).zip(scores).zip(0u32..);
        for (((token, kind), score), id) in all {
            match (vocabulary.fallback_byte(id), kind) {
                (Some(byte), _) => bytes[usize::from(byte)] = Some(id),
                (None, TokenKind::Control) => {}
                (None, _) => _ = pieces.entry(token.as_str().into()).or_insert((id, *score)),
            }
        }
        let mut all_bytes = [0; 256];
        for (byte, id) in bytes.iter().enumerate() {
            all_bytes[byte] =
                id.ok_or_else(|| TokenizerError::Vocabulary(format!("there is no token for byte {byte:#04x}")))?;
        }
        Ok(Self {
            pieces,
            bytes: all_bytes,
            whole: Whole::new(vocabulary, |kind| kind == TokenKind::UserDefined)?,
            whole_or_control: Whole::new(vocabulary, |kind| kind != TokenKind::Text)?,
            has_space_prefix,
        })
    }

    pub fn encode(&self, text: &str, specials: bool) -> Vec<u32> {
        let whole = if specials { &self.whole_or_control } else { &self.whole };
        let mut tokens = Vec::with_capacity(text.len() / 4 + 4);
        let mut from = 0;
        for (at, to, id) in whole.find(text) {
            self.merge(&text[from..at], &mut tokens);
            tokens.push(id);
            from = to;
        }
        self.merge(&text[from..], &mut tokens);
        tokens
    }

    /// Tokens of a stretch that holds no whole token.
    fn merge(&self, text: &str, tokens: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        let mut spelled = String::with_capacity(text.len() + text.len() / 2);
        if self.has_space_prefix {
            spelled.push(SPACE);
        }
        spelled.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
        let mut chain = Chain::new(&spelled);
        let mut candidates = BinaryHeap::new();
        for left in 0..chain.symbols.len() {
            candidates.extend(self.candidate(&chain, left));
        }
        while let Some(best) = candidates.pop() {
            // Either of the two may have been merged with another since.
            if chain.pair(best.left).is_none_or(|pair| pair.len() != best.bytes) {
                continue;
            }
            chain.join(best.left);
            candidates.extend(self.candidate(&chain, best.left));
            if let Some(previous) = chain.symbols[best.left].previous {
                candidates.extend(self.candidate(&chain, previous));
            }
        }
        let mut at = Some(0);
        while let Some(symbol) = at {
            let piece = chain.text(symbol);
            match self.pieces.get(piece) {
                Some((id, _)) => tokens.push(*id),
                None => tokens.extend(piece.bytes().map(|byte| self.bytes[usize::from(byte)])),
            }
            at = chain.symbols[symbol].next;
        }
    }

    /// The merge of a symbol with the one after it, if that is a token.
    fn candidate(&self, chain: &Chain, left: usize) -> Option<Candidate> {
        let pair = chain.pair(left)?;
        let (_, score) = self.pieces.get(pair)?;
        Some(Candidate { score: *score, left, bytes: pair.len() })
    }
}

/// A text cut into symbols: characters at first, longer as they are merged into the one on their left.
struct Chain<'a> {
    text: &'a str,
    symbols: Vec<Symbol>,
}

struct Symbol {
    from: usize,
    /// 0 once it was merged.
    bytes: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

impl<'a> Chain<'a> {
    fn new(text: &'a str) -> Self {
        let count = text.chars().count();
        let symbol = |(i, (from, c)): (usize, (usize, char))| Symbol {
            from,
            bytes: c.len_utf8(),
            previous: i.checked_sub(1),
            next: Some(i + 1).filter(|next| *next < count),
        };
        Self { text, symbols: text.char_indices().enumerate().map(symbol).collect() }
    }

    fn text(&self, symbol: usize) -> &'a str {
        let symbol = &self.symbols[symbol];
        &self.text[symbol.from..][..symbol.bytes]
    }

    /// A live symbol's text and its right neighbour's, which follows it.
    fn pair(&self, left: usize) -> Option<&'a str> {
        let symbol = &self.symbols[left];
        let next = &self.symbols[symbol.next?];
        (symbol.bytes > 0).then(|| &self.text[symbol.from..next.from + next.bytes])
    }

    /// Merges the right neighbour into `left`.
    fn join(&mut self, left: usize) {
        let Some(right) = self.symbols[left].next else { return };
        let (bytes, next) = (self.symbols[right].bytes, self.symbols[right].next);
        self.symbols[right].bytes = 0;
        self.symbols[left].bytes += bytes;
        self.symbols[left].next = next;
        if let Some(next) = next {
            self.symbols[next].previous = Some(left);
        }
    }
}

/// A merge that may be done. The greatest is the next one.
struct Candidate {
    score: f32,
    left: usize,
    bytes: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_score = self.score.partial_cmp(&other.score).unwrap_or(Ordering::Equal);
        by_score.then_with(|| other.left.cmp(&self.left)).then_with(|| self.bytes.cmp(&other.bytes))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

/// Texts that are found as they stand, the leftmost first and of those the longest.
struct Whole {
    /// None where there are no such texts.
    finder: Option<AhoCorasick>,
    ids: Vec<u32>,
}

impl Whole {
    fn new(vocabulary: &Vocabulary, wanted: impl Fn(TokenKind) -> bool) -> Result<Self, TokenizerError> {
        let all = vocabulary.tokens.iter().zip(&vocabulary.kinds).zip(0u32..);
        let found = all.filter(|((token, kind), _)| wanted(**kind) && !token.is_empty());
        let (texts, ids): (Vec<&str>, Vec<u32>) = found.map(|((token, _), id)| (token.as_str(), id)).unzip();
        let build = || AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&texts);
        let finder = if texts.is_empty() { None } else { Some(build()) };
        let finder = finder.transpose().map_err(|error| TokenizerError::Vocabulary(error.to_string()))?;
        Ok(Self { finder, ids })
    }

    /// (from, to, token) of each one found.
    fn find<'a>(&'a self, text: &'a str) -> impl Iterator<Item = (usize, usize, u32)> {
        let found = self.finder.iter().flat_map(move |finder| finder.find_iter(text));
        found.map(|m| (m.start(), m.end(), self.ids[m.pattern().as_usize()]))
    }
}
