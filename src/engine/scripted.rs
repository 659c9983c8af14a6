//! A model that follows a script, for fault tests only: real scheduling, real KV accounting, real text,
//! and faults on demand. It answers with the prompt's own tokens, over and over.
//!
//! Directives anywhere in the prompt: `<<panic:N>>` panics when the N-th output token of that sequence is
//! due, `<<fail:N>>` returns an error then, `<<slow:MS>>` makes every step with that sequence take MS
//! milliseconds, `<<freeze:N>>` stops moving for an hour before the N-th token.

use std::{sync::Arc, time::Duration};

use super::{Batch, BatchSequence, EngineError, Forward};
use crate::model::Vocabulary;

pub struct Scripted {
    vocabulary: Arc<Vocabulary>,
    logits: Vec<f32>,
}

impl Scripted {
    pub fn new(vocabulary: Arc<Vocabulary>) -> Self {
        Self { vocabulary, logits: Vec::new() }
    }

    fn prompt_text(&self, sequence: &BatchSequence) -> String {
        let prompt = &sequence.tokens[..sequence.prompt_tokens];
        let bytes: Vec<u8> = prompt.iter().flat_map(|t| self.vocabulary.bytes(*t)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Scripted {
    /// Appends the logits of the output token after `decoded` others.
    fn answer(&mut self, sequence: &BatchSequence, text: &str, decoded: usize) -> Result<(), EngineError> {
        let is_due = |name| directive(text, name).is_some_and(|n| n <= decoded as u64 + 1);
        if is_due("panic") {
            panic!("scripted panic");
        }
        if is_due("fail") {
            return Err(EngineError::Limits("scripted failure".into()));
        }
        if is_due("freeze") {
            std::thread::sleep(Duration::from_secs(3600));
        }
        let echoes = sequence.tokens[..sequence.prompt_tokens].iter().filter(|t| !self.vocabulary.is_eos(**t));
        let token = echoes.clone().nth(decoded % echoes.count().max(1)).copied().unwrap_or(0);
        let row = self.logits.len();
        self.logits.resize(row + self.vocabulary.len(), 0.0);
        self.logits[row + token as usize] = 100.0;
        Ok(())
    }
}

impl Forward for Scripted {
    fn vocabulary(&self) -> usize {
        self.vocabulary.len()
    }

    fn forward(&mut self, batch: &Batch) -> Result<&[f32], EngineError> {
        self.logits.clear();
        for sequence in &batch.sequences {
            let text = self.prompt_text(sequence);
            if let Some(ms) = directive(&text, "slow") {
                std::thread::sleep(Duration::from_millis(ms));
            }
            for last in 0..sequence.logits_rows {
                let seen = sequence.computed + sequence.rows - sequence.logits_rows + last + 1;
                self.answer(sequence, &text, seen.saturating_sub(sequence.prompt_tokens))?;
            }
        }
        Ok(&self.logits)
    }
}

/// `N` of `<<name:N>>`.
fn directive(text: &str, name: &str) -> Option<u64> {
    let (_, rest) = text.split_once(&format!("<<{name}:"))?;
    let (number, _) = rest.split_once(">>")?;
    number.parse().ok()
}
