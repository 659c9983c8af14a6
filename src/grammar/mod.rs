//! Grammars that an answer's text must match: JSON schemas, regexes, choices, tool calls.
//!
//! Compiles them for a model's vocabulary, within limits of size and work, and tells token by token what may come
//! next. CPU-bound: compiling takes milliseconds (and the first time on a vocabulary half a second), a mask some
//! microseconds, now and then milliseconds. Never on an event loop, never in the middle of an engine's step. The
//! automata are `llguidance`'s.

mod constraint;
mod vocabulary;

pub use constraint::Constraint;
pub use vocabulary::{GrammarError, Grammars};
