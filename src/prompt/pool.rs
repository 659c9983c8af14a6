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

use super::{Conversation, Encoder, PromptError, Shape, Shaped, Template, Tokenizer, render::Piece};
use crate::{
    domain::{GrammarSource, ModelId},
    grammar::{GrammarError, Grammars},
    model::TokenKind,
};

/// Everything that turns messages for one model into token ids, and shapes of answers into grammars.
pub struct PromptModel {
    pub template: Template,
    pub encoder: Arc<dyn Encoder>,
    pub grammars: Arc<Grammars>,
    /// Prompt and answer together.
    pub context_tokens_max: usize,
}

/// What is asked of the model, in the client's words.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    pub prompt: Asked,
    pub shape: Shape,
    /// Only so many tokens of the prompt, the last ones, are read.
    pub tokens_max: Option<usize>,
    pub bad_words: Vec<String>,
    /// Whose request it is, as far as what is kept of it goes.
    pub lane: String,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Asked {
    Conversation(Box<Conversation>),
    /// As it is, without any template.
    Text(String),
    Tokens(Vec<u32>),
}

/// The same, as the engine needs it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prepared {
    pub tokens: Vec<u32>,
    /// Compiled once already, so that it is known to be good.
    pub grammar: Option<GrammarSource>,
    pub bad_words: Vec<Vec<u32>>,
}

impl Ask {
    /// Of an answer of any shape.
    pub fn new(prompt: Asked) -> Self {
        Self { prompt, shape: Shape::default(), tokens_max: None, bad_words: Vec::new(), lane: String::new() }
    }

    fn is_small(&self) -> bool {
        let Asked::Conversation(conversation) = &self.prompt else { return false };
        let Conversation { messages, tools, documents, variables, .. } = &**conversation;
        messages.len() <= SMALL_MESSAGES_MAX
            && conversation.bytes() <= SMALL_BYTES_MAX
            && tools.is_empty()
            && documents.is_empty()
            && variables.is_empty()
            && self.shape.is_free()
            && self.bad_words.is_empty()
    }
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
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        grammars: Arc<Grammars>,
        context_tokens_max: usize,
    ) -> Result<Self, PromptError> {
        let source = tokenizer.template().ok_or(PromptError::NoTemplate)?;
        let vocabulary = tokenizer.vocabulary();
        let control = vocabulary.tokens.iter().zip(&vocabulary.kinds);
        let control = control.filter(|(_, kind)| **kind == TokenKind::Control).map(|(text, _)| text.clone()).collect();
        let template = Template::compile(source, tokenizer.bos_text(), tokenizer.eos_text(), control)?;
        Ok(Self { template, encoder: tokenizer, grammars, context_tokens_max })
    }

    /// The prompt's token ids, fewer than the context, so that there is room for an answer; and whatever else the
    /// engine needs of the client's words.
    pub fn prepare(&self, ask: &Ask) -> Result<Prepared, PromptError> {
        let grammar = self.grammar(&ask.shape, &ask.lane)?;
        let tokens = self.tokens(ask)?;
        let bad_words = self.bad_words(&ask.bad_words)?;
        Ok(Prepared { tokens, grammar, bad_words })
    }

    fn grammar(&self, shape: &Shape, lane: &str) -> Result<Option<GrammarSource>, PromptError> {
        let Some(grammar) = shape.grammar() else { return Ok(None) };
        let compiled = |grammar: &GrammarSource| self.grammars.compile(lane, grammar).map(drop);
        let why = match compiled(&grammar) {
            Ok(()) => return Ok(Some(grammar)),
            Err(GrammarError::Vocabulary(why)) => return Err(PromptError::Encode(why)),
            Err(GrammarError::Refused(why)) => why,
        };
        let parts = shape.parts().filter_map(|(what, part)| part.grammar().map(|grammar| (what, grammar)));
        for (what, part) in parts {
            if let Err(GrammarError::Refused(why)) = self.grammars.check(&part) {
                return Err(PromptError::Grammar { what, why });
            }
        }
        // Each part by itself is fine: together they are too much.
        let what = if shape.calls.tools.is_empty() { Shaped::Text } else { Shaped::Tool(0) };
        Err(PromptError::Grammar { what, why })
    }

    fn tokens(&self, ask: &Ask) -> Result<Vec<u32>, PromptError> {
        let (context, tokens_max) = (self.context_tokens_max, ask.tokens_max);
        let mut tokens = match &ask.prompt {
            Asked::Conversation(conversation) => {
                // Every message has a token at least, whatever is in it: the one that says who speaks.
                let messages = conversation.messages.len();
                if messages >= context && tokens_max.is_none() {
                    return Err(PromptError::TooLong { tokens: messages, at_least: true, context });
                }
                self.template.render(conversation, |pieces| self.encode(pieces, tokens_max))??
            }
            Asked::Text(text) => self.encode(&[Piece::Text(text.into())], tokens_max)?,
            Asked::Tokens(tokens) => tokens.clone(),
        };
        if let Some(most) = tokens_max {
            tokens.drain(..tokens.len().saturating_sub(most));
        }
        if tokens.len() >= context {
            return Err(PromptError::TooLong { tokens: tokens.len(), at_least: false, context });
        }
        Ok(tokens)
    }

    fn encode(&self, pieces: &[Piece], tokens_max: Option<usize>) -> Result<Vec<u32>, PromptError> {
        let bytes: usize = pieces.iter().map(|piece| piece.text().len()).sum();
        let is_long = bytes > self.context_tokens_max.saturating_mul(BYTES_PER_TOKEN_COUNTED);
        match tokens_max {
            Some(most) if is_long => return self.encode_end(pieces, most),
            None if is_long => self.refuse_the_hopeless(pieces)?,
            _ => {}
        }
        let mut tokens = Vec::with_capacity(bytes / 4 + 16);
        for piece in pieces {
            tokens.extend(self.encode_piece(piece)?);
        }
        Ok(tokens)
    }

    /// The last tokens, at least `most` where there are so many, without reading all of a long text.
    fn encode_end(&self, pieces: &[Piece], most: usize) -> Result<Vec<u32>, PromptError> {
        let mut ends = Vec::new();
        let mut count = 0;
        for piece in pieces.iter().rev() {
            let mut rest = piece.text();
            while !rest.is_empty() && count < most {
                let (from, tokens) = match piece {
                    Piece::Control(text) => (0, vec![self.control(text)?]),
                    Piece::Text(_) => {
                        let from = cut(rest, rest.len().saturating_sub(CHUNK_BYTES * 64));
                        let from = if rest.len() <= CHUNK_BYTES * 64 { 0 } else { from };
                        (from, self.encoder.encode(&rest[from..])?)
                    }
                };
                count += tokens.len();
                ends.push(tokens);
                rest = &rest[..from];
            }
        }
        Ok(ends.into_iter().rev().flatten().collect())
    }

    fn encode_piece(&self, piece: &Piece) -> Result<Vec<u32>, PromptError> {
        match piece {
            Piece::Control(text) => Ok(vec![self.control(text)?]),
            Piece::Text(text) => self.encoder.encode(text),
        }
    }

    /// Each word as it stands at the beginning of a text and as it stands within one.
    fn bad_words(&self, words: &[String]) -> Result<Vec<Vec<u32>>, PromptError> {
        let mut all = Vec::new();
        for word in words {
            for spelling in [word.trim_start().to_owned(), format!(" {}", word.trim_start())] {
                let tokens = self.encoder.encode(&spelling)?;
                if !tokens.is_empty() && !all.contains(&tokens) {
                    all.push(tokens);
                }
            }
        }
        Ok(all)
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
    if limit == 0 {
        return text.chars().next().map_or(0, char::len_utf8);
    }
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

    /// Prepares, and drops what was asked where it was worked on.
    pub async fn prepare(&self, model: ModelId, ask: Ask) -> Result<Prepared, PromptError> {
        if ask.is_small() {
            return prepare(&self.models, &model, &ask);
        }
        let place = self.places.clone().try_acquire_owned().map_err(|_| PromptError::Full)?;
        let answer = self.address.send(Render { model, ask, _place: place }).await;
        answer.unwrap_or_else(|error| Err(PromptError::Pool(error.to_string())))
    }

    /// Whether anybody would answer.
    pub fn is_alive(&self) -> bool {
        self.address.connected()
    }
}

struct Render {
    model: ModelId,
    ask: Ask,
    /// Given back when the work is done, or dropped undone because nobody waits for it any more.
    _place: OwnedSemaphorePermit,
}

impl actix::Message for Render {
    type Result = Result<Prepared, PromptError>;
}

struct Renderer {
    models: Arc<BTreeMap<ModelId, PromptModel>>,
}

impl Actor for Renderer {
    type Context = SyncContext<Self>;
}

impl Handler<Render> for Renderer {
    type Result = Result<Prepared, PromptError>;

    fn handle(&mut self, task: Render, _: &mut Self::Context) -> Self::Result {
        prepare(&self.models, &task.model, &task.ask)
    }
}

fn prepare(models: &BTreeMap<ModelId, PromptModel>, model: &ModelId, ask: &Ask) -> Result<Prepared, PromptError> {
    let model = models.get(model).ok_or_else(|| PromptError::UnknownModel(model.to_string()))?;
    // Nobody replaces a thread that has panicked.
    catch_unwind(AssertUnwindSafe(|| model.prepare(ask))).unwrap_or_else(|panic| {
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
    use crate::{
        model::Vocabulary,
        prompt::{Message, Role},
    };

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
        let vocabulary =
            Arc::new(Vocabulary::of_text((0..=255).map(|b: u8| char::from(b).to_string()).collect(), vec![0]));
        PromptModel {
            template,
            encoder: Arc::new(Bytes),
            grammars: Arc::new(Grammars::new(vocabulary)),
            context_tokens_max,
        }
    }

    fn user(content: &str) -> Ask {
        ask(vec![Message::new(Role::User, content)])
    }

    fn ask(messages: Vec<Message>) -> Ask {
        Ask::new(Asked::Conversation(Box::new(Conversation::new(messages))))
    }

    #[test]
    fn texts_are_cut_between_characters_and_never_before_the_first() {
        for text in ["🦀abc", "é", "a🦀", "🦀🦀 🦀"] {
            for bytes in 0..=text.len() {
                let at = cut(text, bytes);
                assert!(at > 0 && text.is_char_boundary(at), "{text} near {bytes}: {at}");
            }
        }
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
        let messages = ask(vec![Message::new(Role::User, ""); 1000]);
        let expected = PromptError::TooLong { tokens: 1000, at_least: true, context: 1000 };
        assert_eq!(model(1000).tokens(&messages), Err(expected));
    }

    #[test]
    fn of_a_prompt_that_is_cut_the_last_tokens_stay_however_long_it_was() {
        let model = model(100_000);
        for length in [10, 90_000, 900_000] {
            let text: String = (0..length).map(|i| char::from(b'a' + (i * 7 % 26) as u8)).collect();
            let cut = model.prepare(&Ask { tokens_max: Some(50_000), ..user(&text) }).unwrap().tokens;
            let all: Vec<u32> = [1000].into_iter().chain(text.bytes().map(u32::from)).collect();
            assert_eq!(cut, all[all.len().saturating_sub(50_000)..]);
        }
    }

    #[test]
    fn bad_words_are_spelled_with_and_without_a_space() {
        let words =
            model(100).prepare(&Ask { bad_words: vec!["no".into(), " ".into()], ..user("x") }).unwrap().bad_words;
        assert_eq!(words, [vec![110, 111], vec![32, 110, 111], vec![32]]);
    }

    #[test]
    fn a_shape_that_cannot_be_held_to_is_refused_and_another_comes_with_its_grammar() {
        use crate::prompt::{TextShape, Whitespace};
        let shaped = |text| {
            let shape = Shape { text, ..Shape::default() };
            model(100).prepare(&Ask { shape, ..user("x") }).map(|prepared| prepared.grammar.is_some())
        };
        let json = |schema| shaped(TextShape::Json { schema, whitespace: Whitespace::Some });
        assert_eq!(json(serde_json::json!({ "type": "object" })), Ok(true));
        assert!(
            matches!(json(serde_json::json!({ "not": {} })), Err(PromptError::Grammar { why, .. }) if why.contains("not"))
        );
        assert_eq!(shaped(TextShape::Regex("[a-c]+x".into())), Ok(true));
        assert!(matches!(shaped(TextShape::Regex("(".into())), Err(PromptError::Grammar { .. })));
        assert_eq!(shaped(TextShape::Choice(vec!["a\"".into(), "b".into()])), Ok(true));
        assert_eq!(shaped(TextShape::Any), Ok(false));
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
                let failed = pool.prepare(id.clone(), user(&text)).await;
                assert!(matches!(failed, Err(PromptError::Pool(_))), "{failed:?}");
            }
            let prepared = pool.prepare(id.clone(), user("a")).await;
            assert_eq!(prepared.map(|prepared| prepared.tokens), Ok(vec![1000, 97]));
            assert!(matches!(pool.prepare("other".into(), user("a")).await, Err(PromptError::UnknownModel(_))));
        });
    }

    #[test]
    fn a_full_pool_refuses_at_once_and_forgets_whoever_went_away() {
        actix::System::new().block_on(async {
            let id = ModelId::from("m");
            let pool = PromptPool::start(Arc::new(BTreeMap::from([(id.clone(), model(1_000_000))])), 1, 1);
            let ask = || Box::pin(pool.prepare(id.clone(), user(&"word ".repeat(50_000))));
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
