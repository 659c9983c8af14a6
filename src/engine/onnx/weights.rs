//! The tensors of a model file, as our graphs take them.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use ort::value::{DynValue, Tensor};
use parking_lot::Mutex;

use super::{
    EngineError,
    linear::{Layout, Linear},
    operators::layer_norms,
};
use crate::model::{ModelError, ModelFile};

/// Everything that the served graph is given beside the step's rows.
pub struct Weights {
    /// How the matrices are packed, in the order of the graph.
    pub layouts: Vec<Layout>,
    pub tensors: Vec<(String, Arc<DynValue>)>,
}

/// What engines have packed and still use: two that serve the same file have one copy.
#[derive(Default)]
pub struct Pack {
    packed: Mutex<Vec<(Weak<ModelFile>, Weak<Weights>)>>,
}

impl Pack {
    /// The file's weights, packed now where no engine has them yet.
    pub fn weights(&self, file: &Arc<ModelFile>) -> Result<Arc<Weights>, EngineError> {
        // Kept locked, so that the second engine waits for the first one's copy.
        let mut packed = self.packed.lock();
        packed.retain(|(_, weights)| weights.strong_count() > 0);
        let found = packed.iter().find(|(of, _)| std::ptr::eq(of.as_ptr(), Arc::as_ptr(file)));
        if let Some(weights) = found.and_then(|(_, weights)| weights.upgrade()) {
            return Ok(weights);
        }
        let weights = Arc::new(Weights::of(load(file)?)?);
        packed.push((Arc::downgrade(file), Arc::downgrade(&weights)));
        Ok(weights)
    }
}

impl Weights {
    fn of(parts: Parts) -> Result<Self, EngineError> {
        let Parts { linears, norms } = parts;
        let mut weights = Self { layouts: Vec::new(), tensors: Vec::new() };
        for (name, linear) in linears {
            let (layout, bytes) = linear.into_parts();
            weights.tensors.push((name, Arc::new(Tensor::from_array(([bytes.len()], bytes))?.into_dyn())));
            weights.layouts.push(layout);
        }
        for (name, norm) in norms {
            weights.tensors.push((name, Arc::new(Tensor::from_array(([norm.len()], norm))?.into_dyn())));
        }
        Ok(weights)
    }
}

/// By name.
struct Parts {
    linears: Vec<(String, Linear)>,
    norms: Vec<(String, Vec<f32>)>,
}

/// Packs all matrices of the model, in the order of the graph, on all processors.
fn load(file: &ModelFile) -> Result<Parts, ModelError> {
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
    let mut all = Parts { linears: Vec::new(), norms: Vec::new() };
    for (_, part) in done {
        let part = part?;
        all.linears.extend(part.linears);
        all.norms.extend(part.norms);
    }
    Ok(all)
}

fn layer(file: &ModelFile, layer: usize) -> Result<Parts, ModelError> {
    let p = &file.params;
    let tensor = |part: &str| format!("blk.{layer}.{part}.weight");
    let linear = |name: &str, inputs: usize, parts: &[(&str, usize)]| {
        let parts: Vec<_> = parts.iter().map(|(part, outputs)| (tensor(part), *outputs)).collect();
        let parts: Vec<_> = parts.iter().map(|(part, outputs)| (part.as_str(), *outputs)).collect();
        Ok::<_, ModelError>((format!("l{layer}.{name}"), Linear::pack(&file.tensors, &parts, inputs)?))
    };
    let mut norms = Vec::new();
    for (part, width) in layer_norms(p) {
        norms.push((format!("l{layer}.{part}"), norm(file, &tensor(part), width)?));
    }
    let qkv = [("attn_q", p.query_width()), ("attn_k", p.kv_width()), ("attn_v", p.kv_width())];
    Ok(Parts {
        linears: vec![
            linear("qkv", p.width, &qkv)?,
            linear("o", p.query_width(), &[("attn_output", p.width)])?,
            linear("gate_up", p.width, &[("ffn_gate", p.ffn_width), ("ffn_up", p.ffn_width)])?,
            linear("down", p.ffn_width, &[("ffn_down", p.width)])?,
        ],
        norms,
    })
}

fn head(file: &ModelFile) -> Result<Parts, ModelError> {
    let p = &file.params;
    let head = Linear::pack(&file.tensors, &[(head_tensor(file), p.vocabulary)], p.width)?;
    let norms = vec![("head.norm".to_owned(), norm(file, "output_norm.weight", p.width)?)];
    Ok(Parts { linears: vec![("head".to_owned(), head)], norms })
}

/// Name of the tensor with the output matrix: its own, or the embedding where the model ties them.
pub fn head_tensor(file: &ModelFile) -> &'static str {
    if file.tensors.has_tensor("output.weight") { "output.weight" } else { "token_embd.weight" }
}

/// A matrix as numbers, `[outputs, inputs]`, row-major.
pub fn dense(file: &ModelFile, name: &str, inputs: usize, outputs: usize) -> Result<Vec<f32>, ModelError> {
    let found = &file.tensors.tensor(name)?.dims;
    let expected = [inputs as u64, outputs as u64];
    if *found != expected {
        return Err(ModelError::WrongShape { name: name.into(), found: found.clone(), expected: expected.into() });
    }
    file.tensors.dequantize(name)
}

/// The weights of a norm over `width` numbers.
pub fn norm(file: &ModelFile, name: &str, width: usize) -> Result<Vec<f32>, ModelError> {
    let found = &file.tensors.tensor(name)?.dims;
    if *found != [width as u64] {
        return Err(ModelError::WrongShape { name: name.into(), found: found.clone(), expected: vec![width as u64] });
    }
    file.tensors.dequantize(name)
}
