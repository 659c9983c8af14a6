//! The tokens of a model: their bytes, and which of them are not text.

use super::{Gguf, GgufError};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    Text,
    /// `<|im_end|>` and its like: never part of the answer's text, never made from a user's text.
    Control,
    /// Text that is always one token of its own.
    UserDefined,
}

/// Byte-level BPE vocabulary of a GGUF file.
pub struct Vocabulary {
    pub tokens: Vec<String>,
    pub kinds: Vec<TokenKind>,
    /// Pairs as the file has them, `left right`, in order of rank.
    pub merges: Vec<String>,
    /// Name of the rule that splits text before the merges (`smollm`, `llama-bpe`, …).
    pub pre_tokenizer: String,
    pub chat_template: Option<String>,
    pub bos: Option<u32>,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    bytes: Vec<Box<[u8]>>,
}

impl Vocabulary {
    pub fn read(gguf: &Gguf) -> Result<Self, GgufError> {
        let kind = gguf.str("tokenizer.ggml.model")?;
        if kind != "gpt2" {
            return Err(GgufError::Corrupted(format!("tokenizer `{kind}` is not supported (byte-level BPE is)")));
        }
        let tokens: Vec<String> = gguf.strings("tokenizer.ggml.tokens")?.into_iter().map(str::to_owned).collect();
        let kinds = gguf
            .i64s("tokenizer.ggml.token_type")?
            .into_iter()
            .map(|code| match code {
                2 | 3 | 5 => TokenKind::Control,
                4 => TokenKind::UserDefined,
                _ => TokenKind::Text,
            })
            .collect::<Vec<_>>();
        if kinds.len() != tokens.len() || tokens.len() > u32::MAX as usize {
            return Err(GgufError::Corrupted("token list and token types differ in length".into()));
        }
        let id = |key: &str| match gguf.u64(key) {
            Ok(id) if (id as usize) < tokens.len() => Ok(Some(id as u32)),
            Ok(id) => Err(GgufError::Corrupted(format!("{key} is {id}, outside the vocabulary"))),
            Err(GgufError::MissingKey(_)) => Ok(None),
            Err(e) => Err(e),
        };
        let mut eos: Vec<u32> =
            id("tokenizer.ggml.eos_token_id")?.into_iter().chain(id("tokenizer.ggml.eot_token_id")?).collect();
        // Files often name only the end of text; these close a chat turn wherever they are control tokens.
        for name in ["<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>"] {
            if let Some(at) = tokens.iter().position(|t| t == name)
                && kinds[at] == TokenKind::Control
            {
                eos.push(at as u32);
            }
        }
        eos.sort_unstable();
        eos.dedup();
        let bytes = tokens
            .iter()
            .zip(&kinds)
            .map(|(token, kind)| match kind {
                TokenKind::Text => byte_level(token),
                TokenKind::UserDefined => token.as_bytes().into(),
                TokenKind::Control => Box::default(),
            })
            .collect();
        let chat_template = match gguf.str("tokenizer.chat_template") {
            Ok(text) => Some(text.to_owned()),
            Err(GgufError::MissingKey(_)) => None,
            Err(e) => return Err(e),
        };
        Ok(Self {
            merges: gguf.strings("tokenizer.ggml.merges")?.into_iter().map(str::to_owned).collect(),
            pre_tokenizer: gguf.or(gguf.str("tokenizer.ggml.pre"), "default")?.to_owned(),
            bos: id("tokenizer.ggml.bos_token_id")?,
            tokens,
            kinds,
            chat_template,
            eos,
            bytes,
        })
    }

    /// Tokens that are plain text, for tests that have no model file.
    #[cfg(test)]
    pub fn of_text(tokens: Vec<String>, eos: Vec<u32>) -> Self {
        Self {
            kinds: vec![TokenKind::Text; tokens.len()],
            merges: Vec::new(),
            pre_tokenizer: "test".to_owned(),
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

    pub fn is_eos(&self, token: u32) -> bool {
        self.eos.contains(&token)
    }
}

/// GPT-2's printable spelling of bytes, undone: each character of a token stands for one byte.
fn byte_level(token: &str) -> Box<[u8]> {
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
