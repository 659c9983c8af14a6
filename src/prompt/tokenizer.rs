//! Text to tokens, by the rules that stand in the model file.
//!
//! Never turns a user's text into control tokens: that is what [`Tokenizer::encode`] with `specials`
//! false promises, whatever the text spells.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use tokenizers::{
    AddedToken, PreTokenizerWrapper,
    models::bpe::{BPE, Vocab},
    normalizers::NormalizerWrapper,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
    processors::PostProcessorWrapper,
};

use super::sentencepiece::SentencePiece;
use crate::model::{LLAMA_BPE_PATTERN, Scheme, TokenKind, Vocabulary, byte_level};

type Bpe = tokenizers::TokenizerImpl<
    BPE,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    tokenizers::DecoderWrapper,
>;

#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("the model's vocabulary cannot be used: {0}")]
    Vocabulary(String),
    #[error("text could not be tokenised: {0}")]
    Encode(String),
}

/// Shared and immutable; encoding takes `&self` from any thread.
pub struct Tokenizer {
    rules: Rules,
    control: HashMap<String, u32>,
    vocabulary: Arc<Vocabulary>,
}

enum Rules {
    ByteLevel {
        /// Knows the control tokens: for template text.
        with_specials: Box<Bpe>,
        /// Does not: for what users write.
        plain: Box<Bpe>,
    },
    SentencePiece(Box<SentencePiece>),
}

impl Tokenizer {
    pub fn new(vocabulary: Arc<Vocabulary>) -> Result<Self, TokenizerError> {
        let rules = match &vocabulary.scheme {
            Scheme::ByteLevel { merges, pre_tokenizer } => {
                let mut plain = bpe(&vocabulary, merges, pre_tokenizer)?;
                plain.add_tokens(&added(&vocabulary, TokenKind::UserDefined));
                refuse_spelled_controls(&plain, &vocabulary, merges)?;
                let mut with_specials = plain.clone();
                with_specials.add_special_tokens(&added(&vocabulary, TokenKind::Control));
                Rules::ByteLevel { with_specials: Box::new(with_specials), plain: Box::new(plain) }
            }
            Scheme::SentencePiece { scores, has_space_prefix } => {
                Rules::SentencePiece(Box::new(SentencePiece::new(&vocabulary, scores, *has_space_prefix)?))
            }
        };
        let kinds = vocabulary.kinds.iter().zip(&vocabulary.tokens).zip(0u32..);
        let control = kinds.filter(|((kind, _), _)| **kind == TokenKind::Control);
        let control = control.map(|((_, text), id)| (text.clone(), id)).collect();
        Ok(Self { rules, control, vocabulary })
    }

    /// The control token of exactly this text.
    pub fn control(&self, text: &str) -> Option<u32> {
        self.control.get(text).copied()
    }

    /// Token ids of `text`. With `specials`, control tokens spelled in the text become those tokens.
    pub fn encode(&self, text: &str, specials: bool) -> Result<Vec<u32>, TokenizerError> {
        let tokenizer = match &self.rules {
            Rules::ByteLevel { with_specials, .. } if specials => with_specials,
            Rules::ByteLevel { plain, .. } => plain,
            Rules::SentencePiece(rules) => return Ok(rules.encode(text, specials)),
        };
        let encoding = tokenizer.encode_fast(text, false).map_err(|e| TokenizerError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The chat template's source, where the model has one.
    pub fn template(&self) -> Option<&str> {
        self.vocabulary.chat_template.as_deref()
    }

    pub fn bos_text(&self) -> &str {
        self.vocabulary.bos.map_or("", |id| &self.vocabulary.tokens[id as usize])
    }

    pub fn eos_text(&self) -> &str {
        self.vocabulary.eos.first().map_or("", |id| &self.vocabulary.tokens[*id as usize])
    }

    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }
}

/// The tokens of one kind, to be found in a text before anything else is.
fn added(vocabulary: &Vocabulary, kind: TokenKind) -> Vec<AddedToken> {
    let tokens = vocabulary.tokens.iter().zip(&vocabulary.kinds).filter(|(_, of)| **of == kind);
    tokens.map(|(token, _)| AddedToken::from(token.clone(), kind == TokenKind::Control).normalized(false)).collect()
}

/// A control token that letters merge into, or that is a word of its own to the rules, would come out of what users
/// write.
fn refuse_spelled_controls(plain: &Bpe, vocabulary: &Vocabulary, merges: &[String]) -> Result<(), TokenizerError> {
    let control = vocabulary.tokens.iter().zip(&vocabulary.kinds).filter(|(_, kind)| **kind == TokenKind::Control);
    let control: HashSet<&str> = control.map(|(token, _)| token.as_str()).collect();
    let fault = |token: &str| TokenizerError::Vocabulary(format!("a text can spell the control token `{token}`"));
    if let Some(token) = merges.iter().find_map(|pair| control.get(pair.replace(' ', "").as_str())) {
        return Err(fault(token));
    }
    for token in &control {
        // As it stands, and as the text that its characters spell where they stand for bytes.
        let spelled = String::from_utf8_lossy(&byte_level(token)).into_owned();
        for text in [*token, &spelled] {
            let encoding = plain.encode_fast(text, false).map_err(|e| TokenizerError::Encode(e.to_string()))?;
            if encoding.get_ids().iter().any(|id| vocabulary.kinds.get(*id as usize) == Some(&TokenKind::Control)) {
                return Err(fault(token));
            }
        }
    }
    Ok(())
}

fn bpe(vocabulary: &Vocabulary, merges: &[String], pre_tokenizer: &str) -> Result<Bpe, TokenizerError> {
    let wrong = |e: &dyn std::fmt::Display| TokenizerError::Vocabulary(e.to_string());
    let ids: Vocab = vocabulary.tokens.iter().cloned().zip(0u32..).collect();
    let merges = merges
        .iter()
        .map(|pair| {
            let (left, right) = pair.split_once(' ').ok_or_else(|| wrong(&format!("merge `{pair}`")))?;
            Ok((left.to_owned(), right.to_owned()))
        })
        .collect::<Result<Vec<_>, TokenizerError>>()?;
    let model = BPE::builder()
        .vocab_and_merges(ids, merges)
        // Llama 3 takes a word that stands in the vocabulary whole, whatever its merges would make of it.
        .ignore_merges(pre_tokenizer == "llama-bpe")
        .build()
        .map_err(|e| wrong(&e))?;
    let pre: PreTokenizerWrapper = match pre_tokenizer {
        "smollm" => Sequence::new(vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()]).into(),
        "gpt-2" | "default" => ByteLevel::new(false, true, true).into(),
        "llama-bpe" => {
            let split = Split::new(
                SplitPattern::Regex(LLAMA_BPE_PATTERN.into()),
                tokenizers::SplitDelimiterBehavior::Isolated,
                false,
            )
            .map_err(|e| wrong(&e))?;
            Sequence::new(vec![split.into(), ByteLevel::new(false, true, false).into()]).into()
        }
        other => return Err(wrong(&format!("pre-tokenizer `{other}` is not supported"))),
    };
    let mut tokenizer = Bpe::new(model);
    tokenizer.with_pre_tokenizer(Some(pre));
    Ok(tokenizer)
}
