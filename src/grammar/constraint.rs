//! One answer on its way through a grammar.

use std::{fmt, sync::Arc};

use llguidance::Matcher;

use super::GrammarError;
use crate::model::Vocabulary;

/// Where an answer stands in its grammar.
pub struct Constraint {
    matcher: Matcher,
    vocabulary: Arc<Vocabulary>,
}

impl Constraint {
    pub(super) fn new(matcher: Matcher, vocabulary: Arc<Vocabulary>) -> Self {
        Self { matcher, vocabulary }
    }

    /// The tokens that may come next, a bit each, the lowest of each word first. Never none: where nothing else may
    /// come, the tokens that end an answer may.
    pub fn mask(&mut self) -> Result<Vec<u32>, GrammarError> {
        let failed = |error: &dyn fmt::Display| GrammarError::Refused(error.to_string());
        let mut mask = self.matcher.compute_mask_or_eos().map_err(|error| failed(&error))?;
        // The library knows one of them.
        if self.vocabulary.eos.last().is_some_and(|end| mask.is_allowed(*end)) {
            self.vocabulary.eos.iter().for_each(|end| mask.allow_token(*end));
        }
        Ok(mask.as_slice().to_vec())
    }

    /// Goes on with `token`. True when nothing may follow it.
    pub fn accept(&mut self, token: u32) -> Result<bool, GrammarError> {
        if self.vocabulary.is_eos(token) {
            return Ok(true);
        }
        self.matcher.consume_token(token).map_err(|error| GrammarError::Refused(error.to_string()))?;
        Ok(self.matcher.is_stopped())
    }
}

impl Clone for Constraint {
    /// With a state of its own.
    fn clone(&self) -> Self {
        Self { matcher: self.matcher.deep_clone(), vocabulary: Arc::clone(&self.vocabulary) }
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Constraint")
    }
}
