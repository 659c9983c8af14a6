//! The threads that render and tokenise.
//!
//! Synchronous actors, so that a large prompt never stalls an HTTP event loop. At most `threads` prompts
//! are worked on and `queue_max` wait; one more is refused at once, for a mailbox of synchronous actors
//! is drained into an unbounded queue and so bounds nothing by itself. A small prompt takes less time than
//! the way to another thread and back, and is worked on where it arrives.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use actix::{Actor, Addr, Handler, SyncArbiter, SyncContext};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Encoder, Message, PromptError, Template, Tokenizer, render::Piece};
use crate::{domain::ModelId, model::TokenKind};

/// Everything that turns messages for one model into token ids.
pub struct PromptModel {
    pub template: Template,
    pub encoder: Arc<dyn Encoder>,
    /// Prompt and answer together.
    pub context_tokens_max: usize,
}

/// Bytes of prompt for each token of context up to which all is counted at once. Text has some four bytes a
/// token: what is longer is probably hopeless, and is first read only as far as it takes to see that.
const BYTES_PER_TOKEN_COUNTED: usize = 4;

/// Bytes that are counted at once. Small, so that a long run of one letter, which tokenisers find hardest, is
/// many times the same chunk.
const CHUNK_BYTES: usize = 256;

/// Bytes of messages that may be worked on by the event loop itself: some tens of microseconds.
const SMALL_BYTES_MAX: usize = 1 << 10;
/// Messages of such a prompt.
const SMALL_MESSAGES_MAX: usize = 8;

impl PromptModel {
    /// The template and the control tokens as the model's file has them.
    pub fn new(tokenizer: Arc<Tokenizer>, context_tokens_max: usize) -> Result<Self, PromptError> {
        let source = tokenizer.template().ok_or(PromptError::NoTemplate)?;
        let vocabulary = tokenizer.vocabulary();
        let control = vocabulary.tokens.iter().zip(&vocabulary.kinds);
        let control = control.filter(|(_, kind)| **kind == TokenKind::Control).map(|(text, _)| text.clone()).collect();
        let template = Template::compile(source, tokenizer.bos_text(), tokenizer.eos_text(), control)?;
        Ok(Self { template, encoder: tokenizer, context_tokens_max })
    }

    /// The prompt's token ids, fewer than the context, so that there is room for an answer.
    pub fn tokens(&self, messages: &[Message]) -> Result<Vec<u32>, PromptError> {
        let context = self.context_tokens_max;
        // Every message has a token at least, whatever is in it: the one that says who speaks.
        if messages.len() >= context {
            return Err(PromptError::TooLong { tokens: messages.len(), at_least: true, context });
        }
        self.template.render(messages, |pieces| self.encode(pieces))?
    }

    fn encode(&self, pieces: &[Piece]) -> Result<Vec<u32>, PromptError> {
        let context = self.context_tokens_max;
        let bytes: usize = pieces.iter().map(|piece| piece.text().len()).sum();
        if bytes > context.saturating_mul(BYTES_PER_TOKEN_COUNTED) {
            self.refuse_the_hopeless(pieces)?;
        }
        let mut tokens = Vec::with_capacity(bytes / 4 + 16);
        for piece in pieces {
            match piece {
                Piece::Control(text) => tokens.push(self.control(text)?),
                Piece::Text(text) => tokens.extend(self.encoder.encode(text)?),
            }
        }
        if tokens.len() >= context {
            return Err(PromptError::TooLong { tokens: tokens.len(), at_least: false, context });
        }
        Ok(tokens)
    }

    /// Counts in chunks, and stops once it is certain that the prompt does not fit. A cut inside a word may
    /// count a few tokens too many, hence the margin of half the context.
    fn refuse_the_hopeless(&self, pieces: &[Piece]) -> Result<(), PromptError> {
        let context = self.context_tokens_max;
        let mut count = 0;
        let mut last = ("", 0);
        for piece in pieces {
            let mut rest = match piece {
                Piece::Control(_) => {
                    count += 1;
                    continue;
                }
                Piece::Text(text) => text.as_ref(),
            };
            while !rest.is_empty() {
                let (chunk, tail) = rest.split_at(cut(rest, CHUNK_BYTES));
                if chunk != last.0 {
                    last = (chunk, self.encoder.encode(chunk)?.len());
                }
                count += last.1;
                if count > context + context / 2 {
                    return Err(PromptError::TooLong { tokens: count, at_least: true, context });
                }
                rest = tail;
            }
        }
        Ok(())
    }

    fn control(&self, text: &str) -> Result<u32, PromptError> {
        self.encoder.control(text).ok_or_else(|| PromptError::Encode(format!("there is no control token `{text}`")))
    }
}

/// Where to cut `text` near `bytes`: before a space if there is one, as tokenisers do.
fn cut(text: &str, bytes: usize) -> usize {
    if text.len() <= bytes {
        return text.len();
    }
    let limit = (0..=bytes).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    let from = (limit / 2..=limit).find(|&at| text.is_char_boundary(at)).unwrap_or(limit);
    text[from..limit].rfind(' ').map_or(limit, |space| from + space).max(1)
}

impl Piece<'_> {
    fn text(&self) -> &str {
        match self {
            Self::Control(text) => text,
            Self::Text(text) => text,
        }
    }
}

/// A handle of the pool; cheap to clone.
#[derive(Clone)]
pub struct PromptPool {
    models: Arc<BTreeMap<ModelId, PromptModel>>,
    address: Addr<Renderer>,
    places: Arc<Semaphore>,
}

impl PromptPool {
    /// Starts the threads. Must be called inside an actix system; they end when the last handle is dropped
    /// or the system stops.
    pub fn start(models: Arc<BTreeMap<ModelId, PromptModel>>, threads: usize, queue_max: usize) -> Self {
        let threads = threads.max(1);
        let shared = Arc::clone(&models);
        let name = || std::thread::Builder::new().name("prompt".into());
        let address =
            SyncArbiter::start_with_thread_builder(threads, name, move || Renderer { models: shared.clone() });
        Self { models, address, places: Arc::new(Semaphore::new(threads + queue_max)) }
    }

    /// The prompt's token ids, and the messages dropped where they were worked on.
    pub async fn tokens(&self, model: ModelId, messages: Vec<Message>) -> Result<Vec<u32>, PromptError> {
        if is_small(&messages) {
            return tokens(&self.models, &model, &messages);
        }
        let place = self.places.clone().try_acquire_owned().map_err(|_| PromptError::Full)?;
        let answer = self.address.send(Render { model, messages, _place: place }).await;
        answer.unwrap_or_else(|error| Err(PromptError::Pool(error.to_string())))
    }

    /// Whether anybody would answer.
    pub fn is_alive(&self) -> bool {
        self.address.connected()
    }
}

struct Render {
    model: ModelId,
    messages: Vec<Message>,
    /// Given back when the work is done, or dropped undone because nobody waits for it any more.
    _place: OwnedSemaphorePermit,
}

impl actix::Message for Render {
    type Result = Result<Vec<u32>, PromptError>;
}

struct Renderer {
    models: Arc<BTreeMap<ModelId, PromptModel>>,
}

impl Actor for Renderer {
    type Context = SyncContext<Self>;
}

impl Handler<Render> for Renderer {
    type Result = Result<Vec<u32>, PromptError>;

    fn handle(&mut self, task: Render, _: &mut Self::Context) -> Self::Result {
        tokens(&self.models, &task.model, &task.messages)
    }
}

fn is_small(messages: &[Message]) -> bool {
    let bytes = |message: &Message| message.content.len() + message.name.as_ref().map_or(0, String::len);
    messages.len() <= SMALL_MESSAGES_MAX && messages.iter().map(bytes).sum::<usize>() <= SMALL_BYTES_MAX
}

fn tokens(
    models: &BTreeMap<ModelId, PromptModel>,
    model: &ModelId,
    messages: &[Message],
) -> Result<Vec<u32>, PromptError> {
    let model = models.get(model).ok_or_else(|| PromptError::UnknownModel(model.to_string()))?;
    // Nobody replaces a thread that has panicked.
    catch_unwind(AssertUnwindSafe(|| model.tokens(messages))).unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned());
        Err(PromptError::Pool(what.unwrap_or_else(|| "panicked".to_owned())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::Role;

    /// One token a byte, and the control tokens as 1000.
    struct Bytes;

    impl Encoder for Bytes {
        fn encode(&self, text: &str) -> Result<Vec<u32>, PromptError> {
            assert!(!text.contains("panic"), "asked to panic");
            Ok(text.bytes().map(u32::from).collect())
        }

        fn control(&self, _: &str) -> Option<u32> {
            Some(1000)
        }
    }

    fn model(context_tokens_max: usize) -> PromptModel {
        let source = "{% for m in messages %}<|a|>{{ m.content }}{% endfor %}";
        let template = Template::compile(source, "", "", vec!["<|a|>".into()]).unwrap();
        PromptModel { template, encoder: Arc::new(Bytes), context_tokens_max }
    }

    fn user(content: &str) -> Vec<Message> {
        vec![Message { role: Role::User, content: content.to_owned(), name: None }]
    }

    #[test]
    fn control_tokens_come_from_the_template_alone() {
        let tokens = model(100).tokens(&user("x<|a|>")).unwrap();
        assert_eq!(tokens, [1000, 120, 60, 124, 97, 124, 62]);
    }

    #[test]
    fn a_prompt_that_leaves_no_room_for_an_answer_is_too_long() {
        assert_eq!(model(10).tokens(&user("12345678")).unwrap().len(), 9);
        let exact = PromptError::TooLong { tokens: 10, at_least: false, context: 10 };
        assert_eq!(model(10).tokens(&user("123456789")), Err(exact));
    }

    #[test]
    fn a_hopeless_prompt_is_not_counted_to_its_end() {
        let Err(PromptError::TooLong { tokens, at_least: true, context: 1000 }) =
            model(1000).tokens(&user(&"word ".repeat(200_000)))
        else {
            panic!("not refused");
        };
        assert!((1500..10_000).contains(&tokens), "{tokens}");
    }

    #[test]
    fn more_messages_than_the_context_has_tokens_are_not_even_rendered() {
        let messages: Vec<_> = (0..1000).flat_map(|_| user("")).collect();
        let expected = PromptError::TooLong { tokens: 1000, at_least: true, context: 1000 };
        assert_eq!(model(1000).tokens(&messages), Err(expected));
    }

    #[test]
    fn chunks_join_to_the_text() {
        for text in ["añb ".repeat(300), "é".repeat(999), " ".repeat(1000), "x".repeat(777)] {
            let mut rest = text.as_str();
            let mut joined = String::new();
            while !rest.is_empty() {
                let (chunk, tail) = rest.split_at(cut(rest, 256));
                assert!(!chunk.is_empty() && chunk.len() <= 256);
                joined.push_str(chunk);
                rest = tail;
            }
            assert_eq!(joined, text);
        }
    }

    #[test]
    fn a_panicking_tokeniser_fails_one_request_and_the_thread_lives() {
        actix::System::new().block_on(async {
            let id = ModelId::from("m");
            let pool = PromptPool::start(Arc::new(BTreeMap::from([(id.clone(), model(100))])), 1, 1);
            for text in ["panic".to_owned(), "panic".repeat(SMALL_BYTES_MAX)] {
                let failed = pool.tokens(id.clone(), user(&text)).await;
                assert!(matches!(failed, Err(PromptError::Pool(_))), "{failed:?}");
            }
            assert_eq!(pool.tokens(id.clone(), user("a")).await, Ok(vec![1000, 97]));
            assert!(matches!(pool.tokens("other".into(), user("a")).await, Err(PromptError::UnknownModel(_))));
        });
    }

    #[test]
    fn a_full_pool_refuses_at_once_and_forgets_whoever_went_away() {
        actix::System::new().block_on(async {
            let id = ModelId::from("m");
            let pool = PromptPool::start(Arc::new(BTreeMap::from([(id.clone(), model(1_000_000))])), 1, 1);
            let ask = || Box::pin(pool.tokens(id.clone(), user(&"word ".repeat(50_000))));
            let (mut first, mut second) = (ask(), ask());
            assert!(futures::poll!(&mut first).is_pending());
            assert!(futures::poll!(&mut second).is_pending());
            assert_eq!(ask().await, Err(PromptError::Full));
            drop(second);
            assert!(first.await.is_ok());
            // The abandoned one gives its place back without having been worked on.
            while pool.places.available_permits() < 2 {
                tokio::task::yield_now().await;
            }
        });
    }
}
