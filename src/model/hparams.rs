//! What a model's file says of its architecture: sizes, and the few places where families differ.
//!
//! Promises that what it returns is consistent in itself and complete: a key or a tensor that would change
//! what the model computes, and that nobody here reads, is an error. Never looks at a weight.

use super::{Gguf, GgufError};

/// How a model is put together, as its file states it and after it was checked.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelParams {
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    pub ffn_width: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    pub context_tokens: usize,
    /// Base of the rotary angles in layers that see the whole context.
    pub rope_base: f32,
    pub rope_pairs: RopePairs,
    pub norm_epsilon: f32,
    pub vocabulary: usize,
    /// Some layers see only the last tokens.
    pub sliding: Option<SlidingWindow>,
    pub activation: Activation,
    /// Each query and key head is normalised before it is rotated (`attn_q_norm`, `attn_k_norm`).
    pub has_head_norms: bool,
    /// What attention and feed-forward add to the residual stream is normalised first
    /// (`post_attention_norm`, `post_ffw_norm`).
    pub has_post_norms: bool,
    /// Factor of the embeddings on their way into the first layer.
    pub embedding_factor: f32,
    /// Factor of the scores, given to the queries.
    pub query_factor: f32,
}

/// The name from when there was one architecture.
pub type LlamaParams = ModelParams;

/// Which two numbers of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairs {
    /// `2i` and `2i + 1`.
    Neighbours,
    /// `i` and `i + head_size / 2`.
    Halves,
}

/// What the gate of the feed-forward goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// The approximation by tanh.
    Gelu,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SlidingWindow {
    /// How many tokens a query sees, its own among them.
    pub tokens: usize,
    /// Base of the rotary angles in these layers.
    pub rope_base: f32,
    /// For each layer, whether it is one of them.
    pub layers: Vec<bool>,
}

impl ModelParams {
    pub fn read(gguf: &Gguf) -> Result<Self, GgufError> {
        let architecture = gguf.str("general.architecture")?;
        let keys = Keys { gguf, architecture };
        let params = match architecture {
            "llama" => keys.common()?,
            "gemma3" => keys.gemma3()?,
            other => return Err(GgufError::Architecture(other.to_owned())),
        };
        params.check(gguf)?;
        keys.refuse_unread()?;
        // A tensor that nobody reads is a part of the model that would be left out in silence.
        if let Some(name) = gguf.tensor_names().find(|name| !params.is_known(name)) {
            return Err(GgufError::Corrupted(format!("tensor `{name}` is not supported")));
        }
        Ok(params)
    }

    /// Values that one token has for all query heads.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_size
    }

    /// Values that one token has for all KV heads.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_size
    }

    /// How many tokens a query of this layer sees, its own among them; `None` is all of them.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.sliding.as_ref().filter(|s| s.layers[layer]).map(|s| s.tokens)
    }

    /// Base of this layer's rotary angles.
    pub fn rope_base_of(&self, layer: usize) -> f32 {
        self.sliding.as_ref().filter(|s| s.layers[layer]).map_or(self.rope_base, |s| s.rope_base)
    }

    fn check(&self, gguf: &Gguf) -> Result<(), GgufError> {
        let is_base = |base: f32| base.is_finite() && base > 0.0;
        let consistent = self.heads.is_multiple_of(self.kv_heads)
            && self.head_size.is_multiple_of(2)
            && gguf.tensor("token_embd.weight")?.dims == [self.width as u64, self.vocabulary as u64]
            && (self.architecture_may_widen_queries() || self.query_width() == self.width)
            && is_base(self.rope_base)
            && self.sliding.as_ref().is_none_or(|s| is_base(s.rope_base) && s.layers.len() == self.layers)
            && (0.0..1.0).contains(&self.norm_epsilon);
        if consistent {
            Ok(())
        } else {
            Err(GgufError::Corrupted(format!("the model's sizes do not fit each other: {self:?}")))
        }
    }

    /// Llama's files give no head size, so a width that its heads do not make up is a fault there.
    fn architecture_may_widen_queries(&self) -> bool {
        self.has_head_norms
    }

    fn is_known(&self, tensor: &str) -> bool {
        if matches!(tensor, "token_embd.weight" | "output.weight" | "output_norm.weight") {
            return true;
        }
        let Some((layer, part)) = tensor.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
            return false;
        };
        let Some(part) = part.strip_suffix(".weight") else { return false };
        let known = match part {
            "attn_norm" | "attn_q" | "attn_k" | "attn_v" | "attn_output" => true,
            "ffn_norm" | "ffn_gate" | "ffn_up" | "ffn_down" => true,
            "attn_q_norm" | "attn_k_norm" => self.has_head_norms,
            "post_attention_norm" | "post_ffw_norm" => self.has_post_norms,
            _ => false,
        };
        known && layer.parse().is_ok_and(|layer: usize| layer < self.layers)
    }
}

/// The keys of one architecture.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn size(&self, name: &str, max: u64) -> Result<usize, GgufError> {
        let key = self.key(name);
        match self.gguf.u64(&key)? {
            n if (1..=max).contains(&n) => Ok(n as usize),
            n => Err(GgufError::Corrupted(format!("{key} is {n}, outside 1..={max}"))),
        }
    }

    fn float(&self, name: &str) -> Result<f32, GgufError> {
        Ok(self.gguf.f64(&self.key(name))? as f32)
    }

    /// What all families share, with Llama's answers where they differ.
    fn common(&self) -> Result<ModelParams, GgufError> {
        let gguf = self.gguf;
        let width = self.size("embedding_length", 1 << 16)?;
        let heads = self.size("attention.head_count", 1 << 10)?;
        let embedding = gguf.tensor("token_embd.weight")?;
        let head_size = gguf.or(self.size("attention.key_length", 1 << 12), width / heads)?;
        let value_size = gguf.or(self.size("attention.value_length", 1 << 12), head_size)?;
        let rotated = gguf.or(self.size("rope.dimension_count", 1 << 12), head_size)?;
        if value_size != head_size || rotated != head_size {
            return Err(GgufError::Corrupted(format!(
                "heads of {head_size} numbers with values of {value_size} and {rotated} rotated ones are not supported"
            )));
        }
        Ok(ModelParams {
            layers: self.size("block_count", 1 << 10)?,
            width,
            ffn_width: self.size("feed_forward_length", 1 << 20)?,
            heads,
            kv_heads: gguf.or(self.size("attention.head_count_kv", 1 << 10), heads)?,
            head_size,
            context_tokens: self.size("context_length", 1 << 24)?,
            rope_base: gguf.or(self.float("rope.freq_base"), 10_000.0)?,
            rope_pairs: RopePairs::Neighbours,
            norm_epsilon: self.float("attention.layer_norm_rms_epsilon")?,
            vocabulary: embedding.dims.get(1).copied().unwrap_or(0) as usize,
            sliding: None,
            activation: Activation::Silu,
            has_head_norms: false,
            has_post_norms: false,
            embedding_factor: 1.0,
            query_factor: 1.0 / (head_size as f32).sqrt(),
        })
    }

    fn gemma3(&self) -> Result<ModelParams, GgufError> {
        let common = self.common()?;
        let sliding = match self.size("attention.sliding_window", 1 << 24) {
            Ok(tokens) => Some(SlidingWindow {
                tokens,
                rope_base: self.gguf.or(self.float("rope.freq_base_swa"), 10_000.0)?,
                layers: self.sliding_layers(common.layers)?,
            }),
            Err(GgufError::MissingKey(_)) => None,
            Err(e) => return Err(e),
        };
        // The file does not say it: the model of 62 layers alone divides by the width that its heads
        // have in the residual stream, not by their own.
        let scored_size = if common.layers == 62 { common.width / common.heads } else { common.head_size };
        Ok(ModelParams {
            sliding,
            rope_pairs: RopePairs::Halves,
            activation: Activation::Gelu,
            has_head_norms: true,
            has_post_norms: true,
            embedding_factor: (common.width as f32).sqrt(),
            query_factor: 1.0 / (scored_size as f32).sqrt(),
            ..common
        })
    }

    /// Every sixth layer sees everything, unless the file has another period or a list of its own.
    fn sliding_layers(&self, layers: usize) -> Result<Vec<bool>, GgufError> {
        let key = self.key("attention.sliding_window_pattern");
        if let Ok(list) = self.gguf.bools(&key) {
            return Ok(list);
        }
        let every = self.gguf.or(self.size("attention.sliding_window_pattern", 1 << 10), 6)?;
        Ok((0..layers).map(|layer| layer % every < every - 1).collect())
    }

    /// Keys that change what a model computes, and that nothing above reads.
    fn refuse_unread(&self) -> Result<(), GgufError> {
        let scaling = self.gguf.or(self.gguf.str(&self.key("rope.scaling.type")), "none")?;
        let factor = self.gguf.or(self.float("rope.scale_linear"), 1.0)?;
        if scaling != "none" || factor != 1.0 {
            return Err(GgufError::Corrupted(format!("rotary embeddings scaled by `{scaling}` are not supported")));
        }
        for (name, harmless) in [
            ("attn_logit_softcapping", 0.0),
            ("final_logit_softcapping", 0.0),
            ("attention.scale", 0.0),
            ("attention.clamp_kqv", 0.0),
            ("logit_scale", 1.0),
            ("embedding_scale", 1.0),
            ("residual_scale", 1.0),
        ] {
            let value = self.gguf.or(self.float(name), harmless)?;
            if value != harmless {
                return Err(GgufError::Corrupted(format!("{} of {value} is not supported", self.key(name))));
            }
        }
        let experts = self.gguf.or(self.gguf.u64(&self.key("expert_count")), 0)?;
        if experts > 0 {
            return Err(GgufError::Corrupted(format!("a mixture of {experts} experts is not supported")));
        }
        if !self.gguf.or(self.gguf.bool(&self.key("attention.causal")), true)? {
            return Err(GgufError::Corrupted("attention that is not causal is not supported".into()));
        }
        Ok(())
    }
}
