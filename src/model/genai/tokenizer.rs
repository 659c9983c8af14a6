//! `tokenizer.json` and its companions: tokens, merges, which texts are whole tokens, the chat template.
//!
//! Promises that the rules that come out are those of the file: whatever would cut a text in another way, and
//! that nobody here knows, is an error.

use std::{collections::HashMap, path::Path};

use serde::{Deserialize, de::IgnoredAny};

use super::{config::Config, data::shortened, fault, json, text};
use crate::model::{
    ModelError, TokenKind, Vocabulary,
    vocabulary::{ByteLevelFacts, LLAMA_BPE_PATTERN},
};

const NAME: &str = "tokenizer.json";
const BYTES_MAX: u64 = 32 << 20;
const CONFIG_BYTES_MAX: u64 = 8 << 20;
const TEMPLATE_BYTES_MAX: u64 = 1 << 20;

#[derive(Deserialize)]
struct Kind {
    model: KindOfModel,
}

#[derive(Deserialize)]
struct KindOfModel {
    r#type: Option<String>,
}

#[derive(Deserialize)]
struct File {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<IgnoredAny>,
    pre_tokenizer: Option<PreTokenizer>,
    post_processor: Option<PostProcessor>,
}

#[derive(Deserialize)]
struct Model {
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Text(String),
    Pair(String, String),
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PreTokenizer {
    ByteLevel {
        add_prefix_space: bool,
        #[serde(default = "yes")]
        use_regex: bool,
    },
    Digits {
        individual_digits: bool,
    },
    Split {
        pattern: Pattern,
        behavior: String,
        #[serde(default)]
        invert: bool,
    },
    Sequence {
        pretokenizers: Vec<PreTokenizer>,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
enum Pattern {
    Regex(String),
    String(IgnoredAny),
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PostProcessor {
    TemplateProcessing {
        single: Vec<Piece>,
    },
    Sequence {
        processors: Vec<PostProcessor>,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
enum Piece {
    SpecialToken { id: String },
    Sequence(IgnoredAny),
}

#[derive(Deserialize)]
struct TokenizerConfig {
    bos_token: Option<TokenText>,
    chat_template: Option<Template>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenText {
    Text(String),
    Token { content: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Template {
    One(String),
    Many(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

fn yes() -> bool {
    true
}

pub fn read(folder: &Path, config: &Config) -> Result<Vocabulary, ModelError> {
    match json::<Kind>(folder, NAME, BYTES_MAX)?.model.r#type.as_deref() {
        None | Some("BPE") => {}
        Some(other) => return Err(wrong(format!("a model of type `{}` is not supported (BPE is)", shortened(other)))),
    }
    let file: File = json(folder, NAME, BYTES_MAX)?;
    let pre_tokenizer = rule(&file)?;
    let (tokens, kinds) = tokens(&file.model.vocab, &file.added_tokens, config.vocabulary)?;
    let companion: TokenizerConfig = json(folder, "tokenizer_config.json", CONFIG_BYTES_MAX)?;
    let bos = match companion.bos_token {
        Some(TokenText::Text(text) | TokenText::Token { content: text }) => {
            let id = file.model.vocab.get(&text).copied();
            let added = file.added_tokens.iter().find(|token| token.content == text).map(|token| token.id);
            let unknown = || fault("tokenizer_config.json", format!("bos_token `{}` is no token", shortened(&text)));
            Some(added.or(id).ok_or_else(unknown)?)
        }
        None => None,
    };
    if let Some(id) = config.eos.iter().find(|id| **id as usize >= tokens.len()) {
        return Err(fault("genai_config.json", format!("eos_token_id {id} is outside the vocabulary")));
    }
    let begins_with_bos = bos.is_some_and(|id| leading(&file.post_processor) == Some(&tokens[id as usize]));
    let chat_template = match text(folder, "chat_template.jinja", TEMPLATE_BYTES_MAX)? {
        Some(template) => Some(template),
        None => companion.chat_template.and_then(|template| match template {
            Template::One(template) => Some(template),
            Template::Many(named) => named.into_iter().find(|one| one.name == "default").map(|one| one.template),
        }),
    };
    Ok(Vocabulary::byte_level(ByteLevelFacts {
        tokens,
        kinds,
        merges: merges(file.model.merges)?,
        pre_tokenizer: pre_tokenizer.to_owned(),
        chat_template,
        bos,
        begins_with_bos,
        eos: config.eos.clone(),
    }))
}

/// The rule by which our tokeniser splits text before the merges, by its name in GGUF files.
fn rule(file: &File) -> Result<&'static str, ModelError> {
    let model = &file.model;
    let is_set = |text: &Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
    if is_set(&model.continuing_subword_prefix) || is_set(&model.end_of_word_suffix) || model.dropout.is_some() {
        return Err(wrong("prefixes, suffixes and dropout are not supported".into()));
    }
    if model.byte_fallback || file.normalizer.is_some() {
        return Err(wrong("normalizers and byte fallback are not supported; byte-level BPE is".into()));
    }
    use PreTokenizer::{ByteLevel, Digits, Sequence, Split};
    let steps: &[PreTokenizer] = match &file.pre_tokenizer {
        Some(Sequence { pretokenizers }) => pretokenizers,
        Some(one) => std::slice::from_ref(one),
        None => &[],
    };
    match steps {
        [ByteLevel { add_prefix_space: false, use_regex: true }] if !model.ignore_merges => Ok("gpt-2"),
        [Digits { individual_digits: true }, ByteLevel { add_prefix_space: false, use_regex: true }]
            if !model.ignore_merges =>
        {
            Ok("smollm")
        }
        [
            Split { pattern: Pattern::Regex(pattern), behavior, invert: false },
            ByteLevel { add_prefix_space: false, use_regex: false },
        ] if model.ignore_merges && behavior == "Isolated" && pattern == LLAMA_BPE_PATTERN => Ok("llama-bpe"),
        _ => Err(wrong("its pre-tokenizer is not supported (those of GPT-2, SmolLM and Llama 3 are)".into())),
    }
}

/// Every id's text and kind.
fn tokens(
    vocab: &HashMap<String, u32>,
    added: &[AddedToken],
    count: usize,
) -> Result<(Vec<String>, Vec<TokenKind>), ModelError> {
    let mut texts: Vec<Option<String>> = vec![None; count];
    let mut kinds = vec![TokenKind::Text; count];
    let mut set = |id: u32, text: &str, kind: TokenKind| match texts.get_mut(id as usize) {
        None => Err(wrong(format!("token `{}` has the id {id}, but there are {count} embeddings", shortened(text)))),
        Some(Some(other)) if other != text => {
            Err(wrong(format!("`{}` and `{}` are both token {id}", shortened(other), shortened(text))))
        }
        Some(place) => {
            *place = Some(text.to_owned());
            kinds[id as usize] = kind;
            Ok(())
        }
    };
    for (text, id) in vocab {
        set(*id, text, TokenKind::Text)?;
    }
    for token in added {
        if token.single_word || token.lstrip || token.rstrip {
            let what = shortened(&token.content);
            return Err(wrong(format!("added token `{what}` looks at its neighbours, which is not supported")));
        }
        if token.content.is_empty() || vocab.get(&token.content).is_some_and(|id| *id != token.id) {
            return Err(wrong(format!("added token `{}` has another id, too", shortened(&token.content))));
        }
        set(token.id, &token.content, if token.special { TokenKind::Control } else { TokenKind::UserDefined })?;
    }
    // Rows of the embeddings that no text has: there to make their number round.
    for (id, place) in texts.iter_mut().enumerate().filter(|(_, place)| place.is_none()) {
        *place = Some(format!("[PAD{id}]"));
        kinds[id] = TokenKind::Control;
    }
    Ok((texts.into_iter().flatten().collect(), kinds))
}

fn merges(merges: Vec<Merge>) -> Result<Vec<String>, ModelError> {
    let joined = merges.into_iter().map(|merge| match merge {
        Merge::Text(text) => Ok(text),
        Merge::Pair(left, right) if left.contains(' ') || right.contains(' ') => {
            Err(wrong(format!("merge of `{}` and `{}` is not byte-level", shortened(&left), shortened(&right))))
        }
        Merge::Pair(left, right) => Ok(format!("{left} {right}")),
    });
    joined.collect()
}

/// The special token that is put before every text.
fn leading(processor: &Option<PostProcessor>) -> Option<&String> {
    fn first(processor: &PostProcessor) -> Option<&String> {
        match processor {
            PostProcessor::TemplateProcessing { single } => match single.first()? {
                Piece::SpecialToken { id } => Some(id),
                Piece::Sequence(_) => None,
            },
            PostProcessor::Sequence { processors } => processors.iter().find_map(first),
            PostProcessor::Other => None,
        }
    }
    processor.as_ref().and_then(first)
}

fn wrong(why: String) -> ModelError {
    fault(NAME, why)
}
