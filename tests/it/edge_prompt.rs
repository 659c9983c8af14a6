//! The real template and the real tokeniser together.

use std::sync::{Arc, OnceLock};

use lightcone::{
    grammar::Grammars,
    model::TokenKind,
    prompt::{Ask, Asked, Conversation, Message, PromptError, PromptModel, Role, Tokenizer},
};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use crate::support::model::model;

const CONTEXT: usize = 8192;

fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    let new = || Arc::new(Tokenizer::new(Arc::clone(&model().vocabulary)).expect("a tokeniser"));
    Arc::clone(TOKENIZER.get_or_init(new))
}

fn prompt_model() -> PromptModel {
    let grammars = Arc::new(Grammars::new(Arc::clone(&model().vocabulary)));
    PromptModel::new(tokenizer(), grammars, CONTEXT).expect("a template")
}

fn tokens(prompt: &PromptModel, messages: &[Message]) -> Result<Vec<u32>, PromptError> {
    let conversation = Asked::Conversation(Box::new(Conversation::new(messages.to_vec())));
    prompt.prepare(&Ask::new(conversation)).map(|prepared| prepared.tokens)
}

fn message(role: Role, content: &str) -> Message {
    Message::new(role, content)
}

/// The slow, obviously right rendering of this one template.
fn chatml(messages: &[Message]) -> String {
    let mut text = String::new();
    if messages[0].role != Role::System {
        text += "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n";
    }
    for Message { role, content, .. } in messages {
        let role = format!("{role:?}").to_lowercase();
        text += &format!("<|im_start|>{role}\n{content}<|im_end|>\n");
    }
    text + "<|im_start|>assistant\n"
}

fn control_texts() -> Vec<String> {
    let vocabulary = tokenizer().vocabulary().clone();
    let control = vocabulary.tokens.iter().zip(&vocabulary.kinds).filter(|(_, kind)| **kind == TokenKind::Control);
    control.map(|(text, _)| text.clone()).collect()
}

#[test]
fn a_conversation_becomes_the_tokens_of_its_whole_rendering() {
    let (prompt, tokenizer) = (prompt_model(), tokenizer());
    let parts =
        [" ", "\n", "\n\n", "a", "Zeit", "'s", "1234", "é", "🙂", "<", "|", ">", "\t", "  ", "?!", "\u{301}", "_"];
    let mut random = StdRng::seed_from_u64(7);
    for _ in 0..300 {
        let messages: Vec<Message> = (0..random.random_range(1..5))
            .map(|i| {
                let pieces = (0..random.random_range(0..12)).map(|_| *parts.choose(&mut random).unwrap());
                let content: String = pieces.collect();
                let role = [Role::User, Role::Assistant, Role::System][i % 3];
                message(role, &content)
            })
            .collect();
        let whole = chatml(&messages);
        assert_eq!(tokens(&prompt, &messages).unwrap(), tokenizer.encode(&whole, true).unwrap(), "{whole:?}");
    }
}

#[test]
fn no_control_token_of_the_vocabulary_can_be_typed() {
    let (prompt, tokenizer) = (prompt_model(), tokenizer());
    let vocabulary = tokenizer.vocabulary();
    let controls =
        |tokens: &[u32]| tokens.iter().filter(|token| vocabulary.kinds[**token as usize] == TokenKind::Control).count();
    let innocent = controls(&tokens(&prompt, &[message(Role::System, "x"), message(Role::User, "x")]).unwrap());
    let texts = control_texts();
    assert!(texts.iter().any(|text| text == "<|im_end|>") && texts.len() > 10);
    for text in &texts {
        for typed in [text.clone(), format!("a{text}"), format!("{text}\n{text}"), format!(" {text} ")] {
            let tokens = tokens(&prompt, &[message(Role::System, &typed), message(Role::User, &typed)]).unwrap();
            assert_eq!(controls(&tokens), innocent, "{typed}");
            // The model still reads exactly what was typed.
            let plain = tokenizer.encode(&typed, false).unwrap();
            assert!(tokens.windows(plain.len()).any(|window| window == plain), "{typed}");
        }
    }
}

#[test]
fn a_prompt_too_long_is_counted_exactly_where_that_is_cheap() {
    let prompt = prompt_model();
    let fits = tokens(&prompt, &[message(Role::User, "word")]).unwrap().len() - 1;
    let long = |words: usize| tokens(&prompt, &[message(Role::User, &"word ".repeat(words))]);
    let exact = long(CONTEXT).unwrap_err();
    let PromptError::TooLong { tokens, at_least: false, context: CONTEXT } = exact else { panic!("{exact:?}") };
    assert!((CONTEXT + fits..=CONTEXT + fits + 1).contains(&tokens), "{tokens}");
    let hopeless = long(400_000).unwrap_err();
    let PromptError::TooLong { tokens, at_least: true, .. } = hopeless else { panic!("{hopeless:?}") };
    assert!((CONTEXT..400_000).contains(&tokens), "{tokens}");
}
