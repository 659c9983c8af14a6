//! What a model's file says of its architecture: sizes, and the few places where families differ.
//!
//! Promises that what it returns is consistent in itself and complete: a key or a tensor that would change
//! what the model computes, and that nobody here reads, is an error. Never looks at a weight.

use super::{Gguf, ModelError};

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
    pub fn read(gguf: &Gguf) -> Result<Self, ModelError> {
        let architecture = gguf.str("general.architecture")?;
        let keys = Keys { gguf, architecture };
        let params = match architecture {
            "llama" => keys.common()?,
            "gemma3" => keys.gemma3()?,
            other => return Err(ModelError::Architecture(other.to_owned())),
        };
        let embeddings = &gguf.tensor("token_embd.weight")?.dims;
        if *embeddings != [params.width as u64, params.vocabulary as u64] {
            return Err(ModelError::Corrupted(format!("embeddings of the shape {embeddings:?} do not fit {params:?}")));
        }
        params.check(params.has_head_norms)?;
        keys.refuse_unread()?;
        // A tensor that nobody reads is a part of the model that would be left out in silence.
        if let Some(name) = gguf.tensor_names().find(|name| !params.is_known(name)) {
            return Err(ModelError::Corrupted(format!("tensor `{name}` is not supported")));
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

    /// Where a format gives no head size, a width that the heads do not make up is a fault.
    pub(super) fn check(&self, may_widen_queries: bool) -> Result<(), ModelError> {
        let is_base = |base: f32| base.is_finite() && base > 0.0;
        let consistent = self.heads.is_multiple_of(self.kv_heads)
            && self.head_size.is_multiple_of(2)
            && (may_widen_queries || self.query_width() == self.width)
            && is_base(self.rope_base)
            && self.sliding.as_ref().is_none_or(|s| is_base(s.rope_base) && s.layers.len() == self.layers)
            && (0.0..1.0).contains(&self.norm_epsilon);
        if consistent {
            Ok(())
        } else {
            Err(ModelError::Corrupted(format!("the model's sizes do not fit each other: {self:?}")))
        }
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

    fn size(&self, name: &str, max: u64) -> Result<usize, ModelError> {
        let key = self.key(name);
        match self.gguf.u64(&key)? {
            n if (1..=max).contains(&n) => Ok(n as usize),
            n => Err(ModelError::Corrupted(format!("{key} is {n}, outside 1..={max}"))),
        }
    }

    fn float(&self, name: &str) -> Result<f32, ModelError> {
        Ok(self.gguf.f64(&self.key(name))? as f32)
    }

    /// What all families share, with Llama's answers where they differ.
    fn common(&self) -> Result<ModelParams, ModelError> {
        let gguf = self.gguf;
        let width = self.size("embedding_length", 1 << 16)?;
        let heads = self.size("attention.head_count", 1 << 10)?;
        let embedding = gguf.tensor("token_embd.weight")?;
        let head_size = gguf.or(self.size("attention.key_length", 1 << 12), width / heads)?;
        let value_size = gguf.or(self.size("attention.value_length", 1 << 12), head_size)?;
        let rotated = gguf.or(self.size("rope.dimension_count", 1 << 12), head_size)?;
        if value_size != head_size || rotated != head_size {
            return Err(ModelError::Corrupted(format!(
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

    fn gemma3(&self) -> Result<ModelParams, ModelError> {
        let common = self.common()?;
        let sliding = match self.size("attention.sliding_window", 1 << 24) {
            Ok(tokens) => Some(SlidingWindow {
                tokens,
                rope_base: self.gguf.or(self.float("rope.freq_base_swa"), 10_000.0)?,
                layers: self.sliding_layers(common.layers)?,
            }),
            Err(ModelError::MissingKey(_)) => None,
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
    fn sliding_layers(&self, layers: usize) -> Result<Vec<bool>, ModelError> {
        let key = self.key("attention.sliding_window_pattern");
        if let Ok(list) = self.gguf.bools(&key) {
            return Ok(list);
        }
        let every = self.gguf.or(self.size("attention.sliding_window_pattern", 1 << 10), 6)?;
        Ok((0..layers).map(|layer| layer % every < every - 1).collect())
    }

    /// Keys that change what a model computes, and that nothing above reads.
    fn refuse_unread(&self) -> Result<(), ModelError> {
        let scaling = self.gguf.or(self.gguf.str(&self.key("rope.scaling.type")), "none")?;
        let factor = self.gguf.or(self.float("rope.scale_linear"), 1.0)?;
        if scaling != "none" || factor != 1.0 {
            return Err(ModelError::Corrupted(format!("rotary embeddings scaled by `{scaling}` are not supported")));
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
                return Err(ModelError::Corrupted(format!("{} of {value} is not supported", self.key(name))));
            }
        }
        let experts = self.gguf.or(self.gguf.u64(&self.key("expert_count")), 0)?;
        if experts > 0 {
            return Err(ModelError::Corrupted(format!("a mixture of {experts} experts is not supported")));
        }
        if !self.gguf.or(self.gguf.bool(&self.key("attention.causal")), true)? {
            return Err(ModelError::Corrupted("attention that is not causal is not supported".into()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    enum Key {
        Number(u32),
        Decimal(f32),
        Text(&'static str),
        Bools(&'static [bool]),
    }
    use Key::{Bools, Decimal, Number, Text};

    /// What is read of a file with these keys and these tensors, all zero.
    fn read(keys: &[(&str, Key)], tensors: &[(&str, &[u64])]) -> Result<ModelParams, ModelError> {
        let text = |b: &mut Vec<u8>, s: &str| {
            b.extend((s.len() as u64).to_le_bytes());
            b.extend(s.as_bytes());
        };
        let mut b = b"GGUF\x03\0\0\0".to_vec();
        b.extend((tensors.len() as u64).to_le_bytes());
        b.extend((keys.len() as u64).to_le_bytes());
        for (name, key) in keys {
            text(&mut b, name);
            match key {
                Number(n) => b.extend([4u32, *n].map(u32::to_le_bytes).concat()),
                Decimal(x) => b.extend([6u32.to_le_bytes(), x.to_le_bytes()].concat()),
                Text(s) => {
                    b.extend(8u32.to_le_bytes());
                    text(&mut b, s);
                }
                Bools(list) => {
                    b.extend([9u32, 7, list.len() as u32, 0].map(u32::to_le_bytes).concat());
                    b.extend(list.iter().map(|x| u8::from(*x)));
                }
            }
        }
        for (name, dims) in tensors {
            text(&mut b, name);
            b.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| b.extend(dim.to_le_bytes()));
            b.extend([0; 12]);
        }
        b.resize(b.len() + 4096, 0);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&b).unwrap();
        ModelParams::read(&Gguf::open(file.path())?)
    }

    fn gemma(changes: impl IntoIterator<Item = (&'static str, Key)>) -> Result<ModelParams, ModelError> {
        let mut keys = vec![
            ("general.architecture", Text("gemma3")),
            ("gemma3.embedding_length", Number(8)),
            ("gemma3.feed_forward_length", Number(12)),
            ("gemma3.block_count", Number(7)),
            ("gemma3.attention.head_count", Number(2)),
            ("gemma3.attention.head_count_kv", Number(1)),
            ("gemma3.attention.key_length", Number(16)),
            ("gemma3.attention.sliding_window", Number(4)),
            ("gemma3.attention.layer_norm_rms_epsilon", Decimal(1e-6)),
            ("gemma3.context_length", Number(64)),
            ("gemma3.rope.freq_base", Decimal(1e6)),
        ];
        for (name, key) in changes {
            keys.retain(|(known, _)| *known != name);
            keys.push((name, key));
        }
        read(&keys, &[("token_embd.weight", &[8, 5]), ("blk.6.post_ffw_norm.weight", &[8])])
    }

    #[test]
    fn windows_follow_the_default_pattern_the_file_s_period_or_its_list() {
        let windows = |p: ModelParams| (0..p.layers).map(|layer| p.window(layer).is_some()).collect::<Vec<_>>();
        let p = gemma([]).unwrap();
        assert_eq!((p.window(0), p.rope_base_of(0), p.window(5), p.rope_base_of(5)), (Some(4), 1e4, None, 1e6));
        assert_eq!(windows(p), [true, true, true, true, true, false, true]);
        let every = gemma([("gemma3.attention.sliding_window_pattern", Number(2))]).unwrap();
        assert_eq!(windows(every), [true, false, true, false, true, false, true]);
        const LIST: &[bool] = &[false, true, true, false, false, false, true];
        let listed = gemma([("gemma3.attention.sliding_window_pattern", Bools(LIST))]).unwrap();
        assert_eq!(windows(listed), LIST);
        assert!(gemma([("gemma3.attention.sliding_window_pattern", Bools(&LIST[..3]))]).is_err());
    }

    #[test]
    fn what_a_file_asks_for_and_nobody_computes_is_an_error_that_names_it() {
        for (name, key) in [
            ("gemma3.final_logit_softcapping", Decimal(30.0)),
            ("gemma3.rope.scaling.type", Text("yarn")),
            ("gemma3.expert_count", Number(8)),
            ("gemma3.attention.value_length", Number(32)),
            ("gemma3.rope.dimension_count", Number(8)),
        ] {
            let error = gemma([(name, key)]).unwrap_err().to_string();
            assert!(error.contains("not supported"), "{name}: {error}");
        }
        let error = gemma([("general.architecture", Text("mamba"))]).unwrap_err();
        assert_eq!(error.to_string(), "architecture `mamba` is not supported (llama and gemma3 are)");
        let p = gemma([]).unwrap();
        assert!(p.is_known("blk.0.attn_q_norm.weight") && !p.is_known("blk.7.attn_q.weight"));
        assert!(!p.is_known("blk.0.attn_q.bias") && !p.is_known("blk.0.ffn_gate_exps.weight"));
    }

    #[test]
    fn absurd_sizes_are_refused() {
        for (name, number) in [
            ("gemma3.block_count", 0),
            ("gemma3.block_count", u32::MAX),
            ("gemma3.attention.head_count", 0),
            ("gemma3.attention.head_count_kv", 3),
            ("gemma3.attention.key_length", 15),
            ("gemma3.embedding_length", 16),
            ("gemma3.attention.sliding_window", 0),
            ("gemma3.context_length", u32::MAX),
        ] {
            assert!(gemma([(name, Number(number))]).is_err(), "{name} {number}");
        }
        assert!(gemma([("gemma3.rope.freq_base", Decimal(f32::NAN))]).is_err());
        assert!(gemma([("gemma3.attention.layer_norm_rms_epsilon", Decimal(f32::INFINITY))]).is_err());
    }
}
