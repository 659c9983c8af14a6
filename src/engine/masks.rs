//! The thread that works out what grammars allow, while the engine's threads compute the logits.
//!
//! A mask takes microseconds, but now and then milliseconds; beside the step they cost nothing that shows. What a
//! mask allows depends on the answer's own tokens alone.

use std::sync::mpsc::{Receiver, Sender, channel};

use super::{EngineError, logits::TokenSet};
use crate::grammar::{Constraint, GrammarError};

type Asked = (usize, Box<Constraint>);
type Answered = (usize, Box<Constraint>, Result<TokenSet, GrammarError>);

/// The way to the thread, which ends when this is dropped.
pub struct Masks {
    asked: Sender<Asked>,
    answered: Receiver<Answered>,
    waiting: usize,
}

impl Masks {
    pub fn start() -> Result<Self, EngineError> {
        let (asked, questions) = channel::<Asked>();
        let (answers, answered) = channel::<Answered>();
        std::thread::Builder::new()
            .name("masks".to_owned())
            .spawn(move || {
                for (at, mut constraint) in questions {
                    let mask = constraint.mask().map(TokenSet::from_words);
                    if answers.send((at, constraint, mask)).is_err() {
                        return;
                    }
                }
            })
            .map_err(|e| EngineError::Limits(format!("cannot start the thread for grammars: {e}")))?;
        Ok(Self { asked, answered, waiting: 0 })
    }

    /// Has a mask worked out. At most one for each place is asked for before they are all collected.
    pub fn ask(&mut self, at: usize, constraint: Box<Constraint>) -> Result<(), EngineError> {
        self.asked
            .send((at, constraint))
            .map_err(|_| EngineError::Limits("the thread for grammars has ended".into()))?;
        self.waiting += 1;
        Ok(())
    }

    /// All that were asked for, as they come. Blocks.
    pub fn collect(&mut self) -> impl Iterator<Item = Answered> {
        (0..std::mem::take(&mut self.waiting)).map_while(|_| self.answered.recv().ok())
    }
}
