//! `genai_config.json`: sizes, the graph's file, and which tokens end an answer.

use std::path::Path;

use serde::{Deserialize, de::IgnoredAny};

use super::{fault, json};
use crate::model::ModelError;

const NAME: &str = "genai_config.json";
const BYTES_MAX: u64 = 1 << 20;

/// As the file states it, within what any model has.
pub struct Config {
    pub architecture: String,
    /// Of the graph.
    pub file: String,
    pub layers: usize,
    pub width: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    pub context_tokens: usize,
    pub vocabulary: usize,
    pub eos: Vec<u32>,
}

#[derive(Deserialize)]
struct Kind {
    model: KindOfModel,
}

#[derive(Deserialize)]
struct KindOfModel {
    r#type: String,
}

#[derive(Deserialize)]
struct Root {
    model: Model,
}

/// A key that is not here may be a part of the model (`vision`, `pipeline`), so it is a fault.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Model {
    context_length: u64,
    vocab_size: u64,
    eos_token_id: Ids,
    decoder: Decoder,
    #[serde(rename = "type")]
    _type: IgnoredAny,
    #[serde(default, rename = "bos_token_id")]
    _bos: IgnoredAny,
    #[serde(default, rename = "pad_token_id")]
    _pad: IgnoredAny,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Decoder {
    filename: String,
    head_size: u64,
    hidden_size: u64,
    num_attention_heads: u64,
    num_key_value_heads: u64,
    num_hidden_layers: u64,
    #[serde(default, rename = "session_options")]
    _session: IgnoredAny,
    #[serde(default, rename = "run_options")]
    _run: IgnoredAny,
    #[serde(default, rename = "inputs")]
    _inputs: IgnoredAny,
    #[serde(default, rename = "outputs")]
    _outputs: IgnoredAny,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl Config {
    pub fn read(folder: &Path) -> Result<Self, ModelError> {
        // First what it is: another family's file may have keys that nobody knows.
        let architecture = json::<Kind>(folder, NAME, BYTES_MAX)?.model.r#type;
        if architecture != "llama" {
            let known = "in this layout, llama is the only architecture that is supported";
            return Err(fault(NAME, format!("model.type is `{}`; {known}", super::data::shortened(&architecture))));
        }
        let Root { model } = json::<Root>(folder, NAME, BYTES_MAX)?;
        let decoder = model.decoder;
        let size = |key: &str, value: u64, max: u64| match value {
            n if (1..=max).contains(&n) => Ok(n as usize),
            n => Err(fault(NAME, format!("{key} is {n}, outside 1..={max}"))),
        };
        Ok(Self {
            architecture,
            file: decoder.filename,
            layers: size("num_hidden_layers", decoder.num_hidden_layers, 1 << 10)?,
            width: size("hidden_size", decoder.hidden_size, 1 << 16)?,
            heads: size("num_attention_heads", decoder.num_attention_heads, 1 << 10)?,
            kv_heads: size("num_key_value_heads", decoder.num_key_value_heads, 1 << 10)?,
            head_size: size("head_size", decoder.head_size, 1 << 12)?,
            context_tokens: size("context_length", model.context_length, 1 << 24)?,
            vocabulary: size("vocab_size", model.vocab_size, 1 << 24)?,
            eos: match model.eos_token_id {
                Ids::One(id) => vec![id],
                Ids::Many(ids) => ids,
            },
        })
    }

    pub fn query_width(&self) -> usize {
        self.heads * self.head_size
    }

    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_size
    }
}
