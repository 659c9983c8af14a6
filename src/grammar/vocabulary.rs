//! What is compiled once for a vocabulary, and the grammars compiled last.

use std::{
    num::NonZeroUsize,
    sync::{Arc, OnceLock},
};

use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    earley::SlicedBiasComputer,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};
use lru::LruCache;
use parking_lot::Mutex;

use super::Constraint;
use crate::{
    domain::GrammarSource,
    model::{TokenKind, Vocabulary},
};

/// Compiled grammars that are kept; each takes up to a few megabytes.
const KEPT: NonZeroUsize = NonZeroUsize::new(48).unwrap();
/// Of one lane: nobody's grammars are pushed out by one who has many.
const KEPT_OF_LANE: usize = 12;
/// States of a grammar's lexer, of one to two kilobytes each.
const LEXER_STATES_MAX: usize = 25_000;
/// Work that compiling one grammar may be, in units of which some 50,000 take a millisecond.
const COMPILE_FUEL: u64 = 5_000_000;
/// The same for one mask, 14,000 a millisecond.
const MASK_FUEL: u64 = 400_000;
/// Symbols of one grammar.
const SYMBOLS_MAX: usize = 250_000;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The grammar itself is at fault, in its own words.
    #[error("{0}")]
    Refused(String),
    /// The vocabulary cannot be used with grammars.
    #[error("no grammars for this vocabulary: {0}")]
    Vocabulary(String),
}

/// Compiles grammars for one vocabulary. Shared by all who do.
pub struct Grammars {
    vocabulary: Arc<Vocabulary>,
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
    /// Each lane has its own, so that none can time what another has compiled.
    compiled: Mutex<LruCache<(String, GrammarSource), Matcher>>,
}

impl Grammars {
    /// Costs nothing until the first grammar.
    pub fn new(vocabulary: Arc<Vocabulary>) -> Self {
        Self { vocabulary, factory: OnceLock::new(), compiled: Mutex::new(LruCache::new(KEPT)) }
    }

    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// Prepares what all grammars share; half a second the first time, and nothing later.
    pub fn prepare(&self) -> Result<(), GrammarError> {
        self.factory().map(drop)
    }

    /// Blocks for as long as it takes: milliseconds, or half a second the first time.
    /// `lane`: who asks, as far as what is kept goes.
    pub fn compile(&self, lane: &str, source: &GrammarSource) -> Result<Constraint, GrammarError> {
        let key = (lane.to_owned(), source.clone());
        let known = self.compiled.lock().get(&key).map(Matcher::deep_clone);
        let matcher = match known {
            Some(matcher) => matcher,
            None => {
                let matcher = self.build(source)?;
                self.keep(key, matcher.deep_clone());
                matcher
            }
        };
        Ok(Constraint::new(matcher, Arc::clone(&self.vocabulary)))
    }

    fn keep(&self, key: (String, GrammarSource), matcher: Matcher) {
        let mut compiled = self.compiled.lock();
        let of_lane = || compiled.iter().filter(|((lane, _), _)| *lane == key.0);
        if of_lane().count() >= KEPT_OF_LANE
            && let Some(oldest) = of_lane().next_back().map(|(key, _)| key.clone())
        {
            compiled.pop(&oldest);
        }
        compiled.put(key, matcher);
    }

    /// Whether it can be compiled. Keeps nothing.
    pub fn check(&self, source: &GrammarSource) -> Result<(), GrammarError> {
        self.build(source).map(drop)
    }

    fn build(&self, source: &GrammarSource) -> Result<Matcher, GrammarError> {
        let refused = |error: &dyn std::fmt::Display| GrammarError::Refused(error.to_string());
        let grammar: TopLevelGrammar = serde_json::from_str(&source.0).map_err(|e| refused(&e))?;
        let factory = self.factory()?;
        // Their panics are bugs of the library, on inputs that a client chose.
        let parser = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| factory.create_parser(grammar)));
        let parser = parser.map_err(|_| GrammarError::Refused("the grammar cannot be compiled".to_owned()))?;
        let mut matcher = Matcher::new(parser);
        // A grammar that no text matches is found out by its first mask.
        match matcher.get_error() {
            Some(error) => Err(GrammarError::Refused(error)),
            None => matcher.compute_mask().map_err(|error| refused(&error)).map(|_| matcher),
        }
    }

    fn factory(&self) -> Result<&ParserFactory, GrammarError> {
        let factory = self.factory.get_or_init(|| {
            let unusable = |error: &dyn std::fmt::Display| GrammarError::Vocabulary(error.to_string());
            let environment = environment(&self.vocabulary)?;
            let slices = SlicedBiasComputer::general_slices();
            let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
                .map_err(|error| unusable(&error))?;
            factory.quiet();
            let limits = factory.limits_mut();
            limits.initial_lexer_fuel = COMPILE_FUEL;
            limits.step_lexer_fuel = MASK_FUEL;
            limits.max_grammar_size = SYMBOLS_MAX;
            limits.max_lexer_states = LEXER_STATES_MAX;
            Ok(factory)
        });
        factory.as_ref().map_err(Clone::clone)
    }
}

fn environment(vocabulary: &Vocabulary) -> Result<TokEnv, GrammarError> {
    let end =
        *vocabulary.eos.last().ok_or_else(|| GrammarError::Vocabulary("no token of it ends an answer".to_owned()))?;
    let words: Vec<Vec<u8>> = (0..vocabulary.len() as u32)
        .map(|token| match vocabulary.kinds[token as usize] {
            TokenKind::Control => {
                let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
                word.extend_from_slice(vocabulary.tokens[token as usize].as_bytes());
                word
            }
            // A byte that no text has marks control tokens.
            TokenKind::Text | TokenKind::UserDefined => match vocabulary.bytes(token) {
                [TokTrie::SPECIAL_TOKEN_MARKER, ..] => Vec::new(),
                bytes => bytes.to_vec(),
            },
        })
        .collect();
    let trie = TokTrie::from(&TokRxInfo::new(vocabulary.len() as u32, end), &words);
    Ok(Arc::new(ApproximateTokEnv::new(trie)))
}
