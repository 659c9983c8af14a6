use super::{Gguf, GgufError};

/// Sizes of a Llama-family model, as its file states them and after they were checked against each other.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaParams {
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    pub ffn_width: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    pub context_tokens: usize,
    pub rope_base: f32,
    pub norm_epsilon: f32,
    pub vocabulary: usize,
}

impl LlamaParams {
    pub fn read(gguf: &Gguf) -> Result<Self, GgufError> {
        let architecture = gguf.str("general.architecture")?;
        if architecture != "llama" {
            return Err(GgufError::Corrupted(format!("architecture `{architecture}` is not supported (llama is)")));
        }
        let size = |key: &str, max: u64| {
            let key = format!("llama.{key}");
            match gguf.u64(&key)? {
                n if (1..=max).contains(&n) => Ok(n as usize),
                n => Err(GgufError::Corrupted(format!("{key} is {n}, outside 1..={max}"))),
            }
        };
        let width = size("embedding_length", 1 << 16)?;
        let heads = size("attention.head_count", 1 << 10)?;
        let embedding = gguf.tensor("token_embd.weight")?;
        let head_size = match size("attention.key_length", 1 << 12) {
            Err(GgufError::MissingKey(_)) => width / heads,
            other => other?,
        };
        let params = Self {
            layers: size("block_count", 1 << 10)?,
            width,
            ffn_width: size("feed_forward_length", 1 << 20)?,
            heads,
            kv_heads: gguf.or(size("attention.head_count_kv", 1 << 10), heads)?,
            head_size,
            context_tokens: size("context_length", 1 << 24)?,
            rope_base: gguf.or(gguf.f64("llama.rope.freq_base"), 10_000.0)? as f32,
            norm_epsilon: gguf.f64("llama.attention.layer_norm_rms_epsilon")? as f32,
            vocabulary: embedding.dims.get(1).copied().unwrap_or(0) as usize,
        };
        let consistent = params.heads * params.head_size == params.width
            && params.heads.is_multiple_of(params.kv_heads)
            && params.head_size.is_multiple_of(2)
            && embedding.dims == [params.width as u64, params.vocabulary as u64]
            && params.rope_base > 0.0
            && params.norm_epsilon >= 0.0;
        if !consistent {
            return Err(GgufError::Corrupted(format!("the model's sizes do not fit each other: {params:?}")));
        }
        let scaling = gguf.or(gguf.str("llama.rope.scaling.type"), "none")?;
        if scaling != "none" || gguf.or(gguf.f64("llama.rope.scale_linear"), 1.0)? != 1.0 {
            return Err(GgufError::Corrupted(format!("rotary embeddings scaled by `{scaling}` are not supported")));
        }
        // A tensor that nobody reads is a part of the model that would be left out in silence.
        if let Some(name) = gguf.tensor_names().find(|name| !is_known(name, params.layers)) {
            return Err(GgufError::Corrupted(format!("tensor `{name}` is not supported")));
        }
        let rotated = gguf.or(gguf.u64("llama.rope.dimension_count"), params.head_size as u64)?;
        if rotated != params.head_size as u64 || gguf.has_tensor("rope_freqs.weight") {
            return Err(GgufError::Corrupted("partial or scaled rotary embeddings are not supported".into()));
        }
        Ok(params)
    }

    /// Values that one token has for all KV heads.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_size
    }
}

fn is_known(tensor: &str, layers: usize) -> bool {
    if matches!(tensor, "token_embd.weight" | "output.weight" | "output_norm.weight") {
        return true;
    }
    let Some((layer, part)) = tensor.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else { return false };
    let Some(part) = part.strip_suffix(".weight") else { return false };
    layer.parse().is_ok_and(|layer: usize| layer < layers)
        && matches!(
            part,
            "attn_norm"
                | "attn_q"
                | "attn_k"
                | "attn_v"
                | "attn_output"
                | "ffn_norm"
                | "ffn_gate"
                | "ffn_up"
                | "ffn_down"
        )
}
