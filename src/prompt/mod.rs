//! From messages to token ids: the model's own chat template, then its tokeniser, on threads of their own.
//!
//! Promises that text which a client wrote never becomes a control token, however it is spelled and
//! whatever the template does with it, that a prompt too long is refused after a bounded amount of work, and that
//! a shape which no answer could be held to is refused here. CPU-bound and pure: never does I/O, never speaks HTTP, never keeps a message.

mod calls;
mod conversation;
mod pool;
mod render;
mod sentencepiece;
mod shape;
mod template;
mod tokenizer;
mod tools;

pub use calls::{CallReader, Said};
pub use conversation::{Conversation, Message, Role, Tool, ToolCall};
pub use pool::{Ask, Asked, Prepared, PromptModel, PromptPool};
pub use render::Encoder;
pub use shape::{Calls, Shape, Shaped, TextShape, Whitespace};
pub use template::Template;
pub use tokenizer::{Tokenizer, TokenizerError};
pub use tools::CALL_OPEN;

/// Why there is no prompt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PromptError {
    /// The template itself does not compile: the model's file is at fault.
    #[error("chat template does not compile: {0}")]
    Template(String),
    #[error("the model's file has no chat template")]
    NoTemplate,
    /// A control token of one character could not be kept out of what clients write.
    #[error("control token `{0}` is a single character")]
    ControlToken(String),
    /// The template called `raise_exception`: the conversation has a shape that the model was not made for.
    #[error("{0}")]
    Refused(String),
    /// The template failed otherwise.
    #[error("chat template failed: {0}")]
    Render(String),
    /// The template cannot use the client's own variables or documents.
    #[error("the chat template cannot use its variables: {0}")]
    Variables(String),
    #[error("tokeniser failed: {0}")]
    Encode(String),
    /// `tokens` is exact, or a lower bound where counting all would have been work for nothing.
    #[error("prompt has {}{tokens} tokens, more than {context}", if *.at_least { "at least " } else { "" })]
    TooLong { tokens: usize, at_least: bool, context: usize },
    /// No answer could be held to the wanted shape.
    #[error("{why}")]
    Grammar { what: Shaped, why: String },
    /// Too many requests wait for a prompt thread.
    #[error("prompt pool is full")]
    Full,
    #[error("no prompt thread serves model {0}")]
    UnknownModel(String),
    /// The pool is gone, or the request's handler panicked.
    #[error("prompt pool failed: {0}")]
    Pool(String),
}
