//! The tokens of a model: their bytes, and which of them are not text.

use super::{Gguf, ModelError};

/// SentencePiece's spelling of a space.
pub const SPACE: char = '▁';
/// How Llama 3 splits text before the merges (`llama-bpe`).
pub const LLAMA_BPE_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// How files mark a token that stands for one byte.
const BYTE: i64 = 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    Text,
    /// `<|im_end|>` and its like: never part of the answer's text, never made from a user's text.
    Control,
    /// Text that is always one token of its own.
    UserDefined,
}

/// How text becomes tokens.
pub enum Scheme {
    /// GPT-2's: every byte has a printable spelling, and pairs are merged by rank.
    ByteLevel {
        /// Pairs as the file has them, `left right`, in order of rank.
        merges: Vec<String>,
        /// Name of the rule that splits text before the merges (`smollm`, `llama-bpe`, …).
        pre_tokenizer: String,
    },
    /// SentencePiece's: spaces are spelled `▁`, neighbours that make a token are merged by its score, and
    /// what is no token is spelled in bytes.
    SentencePiece {
        /// One for each token; the largest is merged first.
        scores: Vec<f32>,
        /// A text begins as if it had a space in front.
        has_space_prefix: bool,
    },
}

/// The vocabulary of a model file.
pub struct Vocabulary {
    pub tokens: Vec<String>,
    pub kinds: Vec<TokenKind>,
    pub scheme: Scheme,
    pub chat_template: Option<String>,
    pub bos: Option<u32>,
    /// The model was trained on texts that begin with `bos`.
    pub begins_with_bos: bool,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    bytes: Vec<Box<[u8]>>,
}

impl Vocabulary {
    pub fn read(gguf: &Gguf) -> Result<Self, ModelError> {
        let tokens: Vec<String> = gguf.strings("tokenizer.ggml.tokens")?.into_iter().map(str::to_owned).collect();
        let codes = gguf.i64s("tokenizer.ggml.token_type")?;
        if codes.len() != tokens.len() || tokens.len() > u32::MAX as usize {
            return Err(ModelError::Corrupted("token list and token types differ in length".into()));
        }
        let scheme = Scheme::read(gguf, tokens.len())?;
        let kinds: Vec<TokenKind> = codes
            .iter()
            .map(|code| match code {
                2 | 3 | 5 => TokenKind::Control,
                4 => TokenKind::UserDefined,
                _ => TokenKind::Text,
            })
            .collect();
        let id = |key: &str| match gguf.u64(key) {
            Ok(id) if (id as usize) < tokens.len() => Ok(Some(id as u32)),
            Ok(id) => Err(ModelError::Corrupted(format!("{key} is {id}, outside the vocabulary"))),
            Err(ModelError::MissingKey(_)) => Ok(None),
            Err(e) => Err(e),
        };
        let eos = id("tokenizer.ggml.eos_token_id")?.into_iter().chain(id("tokenizer.ggml.eot_token_id")?).collect();
        let eos = ends(eos, &tokens, &kinds);
        let bytes = tokens.iter().zip(&codes).zip(&kinds).map(|((token, code), kind)| match (kind, &scheme) {
            (TokenKind::Control, _) => Box::default(),
            (TokenKind::UserDefined, _) => token.as_bytes().into(),
            (TokenKind::Text, Scheme::ByteLevel { .. }) => byte_level(token),
            (TokenKind::Text, Scheme::SentencePiece { .. }) => match byte_token(token) {
                Some(byte) if *code == BYTE => Box::from([byte]),
                _ => token.replace(SPACE, " ").into_bytes().into(),
            },
        });
        let bytes = bytes.collect();
        let chat_template = match gguf.str("tokenizer.chat_template") {
            Ok(text) => Some(text.to_owned()),
            Err(ModelError::MissingKey(_)) => None,
            Err(e) => return Err(e),
        };
        Ok(Self {
            bos: id("tokenizer.ggml.bos_token_id")?,
            // Files of the older scheme say it only where it is not so.
            begins_with_bos: gguf
                .or(gguf.bool("tokenizer.ggml.add_bos_token"), matches!(scheme, Scheme::SentencePiece { .. }))?,
            tokens,
            scheme,
            kinds,
            chat_template,
            eos,
            bytes,
        })
    }

    /// Of byte-level BPE, whatever format states it.
    pub(super) fn byte_level(facts: ByteLevelFacts) -> Self {
        let ByteLevelFacts { tokens, kinds, merges, pre_tokenizer, chat_template, bos, begins_with_bos, eos } = facts;
        let bytes = tokens.iter().zip(&kinds).map(|(token, kind)| match kind {
            TokenKind::Control => Box::default(),
            TokenKind::UserDefined => token.as_bytes().into(),
            TokenKind::Text => byte_level(token),
        });
        Self {
            bytes: bytes.collect(),
            eos: ends(eos, &tokens, &kinds),
            scheme: Scheme::ByteLevel { merges, pre_tokenizer },
            tokens,
            kinds,
            chat_template,
            bos,
            begins_with_bos,
        }
    }

    /// Tokens that are plain text: for tests, which have no model file.
    pub fn of_text(tokens: Vec<String>, eos: Vec<u32>) -> Self {
        Self {
            kinds: vec![TokenKind::Text; tokens.len()],
            scheme: Scheme::ByteLevel { merges: Vec::new(), pre_tokenizer: "test".to_owned() },
            begins_with_bos: false,
            chat_template: None,
            bos: None,
            eos,
            bytes: tokens.iter().map(|token| token.as_bytes().into()).collect(),
            tokens,
        }
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The bytes that a token adds to the text; none for control tokens and ids outside the vocabulary.
    pub fn bytes(&self, token: u32) -> &[u8] {
        self.bytes.get(token as usize).map_or(&[], |b| b)
    }

    /// The same; of a control token, its name.
    pub fn spelled(&self, token: u32) -> &[u8] {
        match self.kinds.get(token as usize) {
            Some(TokenKind::Control) => self.tokens[token as usize].as_bytes(),
            _ => self.bytes(token),
        }
    }

    /// The byte that a token of the byte fallback stands for.
    pub fn fallback_byte(&self, token: u32) -> Option<u8> {
        let byte = byte_token(self.tokens.get(token as usize)?)?;
        (self.bytes(token) == [byte]).then_some(byte)
    }

    pub fn is_eos(&self, token: u32) -> bool {
        self.eos.contains(&token)
    }
}

/// What a file says of a vocabulary of byte-level BPE. Ids are within the tokens.
pub(super) struct ByteLevelFacts {
    pub tokens: Vec<String>,
    pub kinds: Vec<TokenKind>,
    pub merges: Vec<String>,
    pub pre_tokenizer: String,
    pub chat_template: Option<String>,
    pub bos: Option<u32>,
    pub begins_with_bos: bool,
    pub eos: Vec<u32>,
}

/// Files often name only the end of text; these close a chat turn wherever they are control tokens.
fn ends(mut eos: Vec<u32>, tokens: &[String], kinds: &[TokenKind]) -> Vec<u32> {
    for name in ["<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>"] {
        if let Some(at) = tokens.iter().position(|token| token == name)
            && kinds[at] == TokenKind::Control
        {
            eos.push(at as u32);
        }
    }
    eos.sort_unstable();
    eos.dedup();
    eos
}

impl Scheme {
    fn read(gguf: &Gguf, tokens: usize) -> Result<Self, ModelError> {
        match gguf.str("tokenizer.ggml.model")? {
            "gpt2" => Ok(Self::ByteLevel {
                merges: gguf.strings("tokenizer.ggml.merges")?.into_iter().map(str::to_owned).collect(),
                pre_tokenizer: gguf.or(gguf.str("tokenizer.ggml.pre"), "default")?.to_owned(),
            }),
            "llama" => {
                let scores = gguf.f32s("tokenizer.ggml.scores")?;
                if scores.len() != tokens || scores.iter().any(|score| score.is_nan()) {
                    return Err(ModelError::Corrupted("the tokens' scores do not fit the tokens".into()));
                }
                let has_space_prefix = gguf.or(gguf.bool("tokenizer.ggml.add_space_prefix"), true)?;
                Ok(Self::SentencePiece { scores, has_space_prefix })
            }
            other => Err(ModelError::Corrupted(format!(
                "tokenizer `{other}` is not supported (byte-level BPE and SentencePiece's BPE are)"
            ))),
        }
    }
}

/// The byte that a token of the form `<0x0A>` stands for.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_byte = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if is_byte { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// GPT-2's printable spelling of bytes, undone: each character of a token stands for one byte.
pub fn byte_level(token: &str) -> Box<[u8]> {
    let mut bytes = Vec::with_capacity(token.len());
    for c in token.chars() {
        match c as u32 {
            code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => bytes.push(code as u8),
            // The 68 bytes without a printable character follow from 256 on, in their own order.
            code @ 0x100..0x121 => bytes.push((code - 0x100) as u8),
            code @ 0x121..0x143 => bytes.push((code - 0x121 + 0x7f) as u8),
            0x143 => bytes.push(0xad),
            _ => bytes.extend(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bytes.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_printable_spelling() {
        let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let mut next = 0x100;
        for byte in 0..=255u8 {
            let code = if printable(byte) {
                u32::from(byte)
            } else {
                next += 1;
                next - 1
            };
            let spelled = char::from_u32(code).unwrap().to_string();
            assert_eq!(*byte_level(&spelled), [byte], "{byte:#x}");
        }
    }
}
