//! The tensors of a model file, as our graphs take them.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use parking_lot::Mutex;

use super::linear::Linear;
use crate::model::{GgufError, ModelFile, ModelParams};

/// Everything that the served graph is given beside the step's rows, by name.
pub struct Weights {
    pub linears: Vec<(String, Linear)>,
    pub norms: Vec<(String, Vec<f32>)>,
}

/// Packs all matrices of the model, in the order of the graph, on all processors.
pub fn load(file: &ModelFile) -> Result<Weights, GgufError> {
    let layers = file.params.layers;
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(layers + 1);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                // The head is the largest piece, so it is taken first.
                while let n = next.fetch_add(1, Relaxed)
                    && n <= layers
                {
                    let built = if n == 0 { head(file) } else { layer(file, n - 1) };
                    done.lock().push((if n == 0 { layers } else { n - 1 }, built));
                }
            });
        }
    });
    let mut done = done.into_inner();
    done.sort_by_key(|(at, _)| *at);
    let mut all = Weights { linears: Vec::new(), norms: Vec::new() };
    for (_, part) in done {
        let part = part?;
        all.linears.extend(part.linears);
        all.norms.extend(part.norms);
    }
    Ok(all)
}

fn layer(file: &ModelFile, layer: usize) -> Result<Weights, GgufError> {
    let p = &file.params;
    let tensor = |part: &str| format!("blk.{layer}.{part}.weight");
    let linear = |name: &str, inputs: usize, parts: &[(&str, usize)]| {
        let parts: Vec<_> = parts.iter().map(|(part, outputs)| (tensor(part), *outputs)).collect();
        let parts: Vec<_> = parts.iter().map(|(part, outputs)| (part.as_str(), *outputs)).collect();
        Ok::<_, GgufError>((format!("l{layer}.{name}"), Linear::pack(&file.tensors, &parts, inputs)?))
    };
    let mut norms = Vec::new();
    for (part, width) in norms_of(p) {
        norms.push((format!("l{layer}.{part}"), norm(file, &tensor(part), width)?));
    }
    let qkv = [("attn_q", p.query_width()), ("attn_k", p.kv_width()), ("attn_v", p.kv_width())];
    Ok(Weights {
        linears: vec![
            linear("qkv", p.width, &qkv)?,
            linear("o", p.query_width(), &[("attn_output", p.width)])?,
            linear("gate_up", p.width, &[("ffn_gate", p.ffn_width), ("ffn_up", p.ffn_width)])?,
            linear("down", p.ffn_width, &[("ffn_down", p.width)])?,
        ],
        norms,
    })
}

/// Norms of one layer, with their widths.
fn norms_of(p: &ModelParams) -> Vec<(&'static str, usize)> {
    let mut norms = vec![("attn_norm", p.width), ("ffn_norm", p.width)];
    if p.has_head_norms {
        norms.extend([("attn_q_norm", p.head_size), ("attn_k_norm", p.head_size)]);
    }
    if p.has_post_norms {
        norms.extend([("post_attention_norm", p.width), ("post_ffw_norm", p.width)]);
    }
    norms
}

fn head(file: &ModelFile) -> Result<Weights, GgufError> {
    let p = &file.params;
    let head = Linear::pack(&file.tensors, &[(head_tensor(file), p.vocabulary)], p.width)?;
    let norms = vec![("head.norm".to_owned(), norm(file, "output_norm.weight", p.width)?)];
    Ok(Weights { linears: vec![("head".to_owned(), head)], norms })
}

/// Name of the tensor with the output matrix: its own, or the embedding where the model ties them.
pub fn head_tensor(file: &ModelFile) -> &'static str {
    if file.tensors.has_tensor("output.weight") { "output.weight" } else { "token_embd.weight" }
}

/// A matrix as numbers, `[outputs, inputs]`, row-major.
pub fn dense(file: &ModelFile, name: &str, inputs: usize, outputs: usize) -> Result<Vec<f32>, GgufError> {
    let found = &file.tensors.tensor(name)?.dims;
    let expected = [inputs as u64, outputs as u64];
    if *found != expected {
        return Err(GgufError::WrongShape { name: name.into(), found: found.clone(), expected: expected.into() });
    }
    file.tensors.dequantize(name)
}

/// The weights of a norm over `width` numbers.
pub fn norm(file: &ModelFile, name: &str, width: usize) -> Result<Vec<f32>, GgufError> {
    let found = &file.tensors.tensor(name)?.dims;
    if *found != [width as u64] {
        return Err(GgufError::WrongShape { name: name.into(), found: found.clone(), expected: vec![width as u64] });
    }
    file.tensors.dequantize(name)
}
