//! Language models on ONNX Runtime: the graph, its weights, and our operators in it.
//!
//! Matrices stay in the small whole numbers of their file; activations are quantised in blocks of each row,
//! so a row's numbers never depend on its neighbours; integer sums are exact in any order.

mod attention;
mod graph;
mod kv;
mod linear;
mod operators;
mod proto;
mod providers;
pub mod reference;
mod rows;
mod runtime;
mod step;
mod weights;

use std::sync::Arc;

use ort::{
    session::{
        Session,
        builder::{GraphOptimizationLevel, SessionBuilder},
    },
    value::{DynValue, Tensor, TensorRef},
};
use parking_lot::RwLock;

pub use runtime::{OnnxRuntime, RuntimeOptions};

use super::{Batch, BatchSequence, EngineError, Forward};
use crate::model::{Activation, GgufError, ModelFile, ModelParams};
use graph::{Dim, Graph};
use kv::{KvCache, KvShape};
use linear::Layout;
use operators::Shared;
use proto::DataType;
use weights::Weights;

/// Bytes that one KV block of `block_tokens` tokens takes.
pub fn kv_block_bytes(params: &ModelParams, block_tokens: usize) -> usize {
    KvShape::new(params, block_tokens, 1).block_bytes()
}

/// A loaded model with its KV cache. Lives on the engine's thread.
pub struct OnnxModel {
    session: Session,
    shared: Arc<Shared>,
    file: Arc<ModelFile>,
    /// Embeddings of the step's rows, `[rows, width]`.
    embeddings: Vec<f32>,
    /// Kept, because the logits that were handed out live in it.
    logits: Option<DynValue>,
}

impl OnnxModel {
    pub fn load(
        runtime: &OnnxRuntime,
        file: &Arc<ModelFile>,
        kv_blocks: usize,
        kv_block_tokens: usize,
        context_tokens: usize,
    ) -> Result<Self, EngineError> {
        let params = &file.params;
        if !operators::fits(params) {
            return Err(EngineError::Limits("heads of this size or grouping are not supported".into()));
        }
        check_embeddings(file)?;
        let Weights { linears, norms } = weights::load(file)?;
        let mut layouts = Vec::with_capacity(linears.len());
        let mut tensors = Vec::with_capacity(linears.len() + norms.len());
        for (name, linear) in linears {
            let (layout, bytes) = linear.into_parts();
            tensors.push((name, Tensor::from_array(([bytes.len()], bytes))?.into_dyn()));
            layouts.push(layout);
        }
        for (name, norm) in norms {
            tensors.push((name, Tensor::from_array(([norm.len()], norm))?.into_dyn()));
        }
        let shared = Arc::new(Shared {
            step: RwLock::default(),
            cache: KvCache::new(KvShape::new(params, kv_block_tokens, kv_blocks))?,
            params: params.clone(),
            angles: Shared::angles(params, params.rope_base, context_tokens),
            window_angles: params
                .sliding
                .as_ref()
                .map_or(Vec::new(), |sliding| Shared::angles(params, sliding.rope_base, context_tokens)),
            layouts,
            threads: runtime.options.threads,
        });
        let session = session(runtime, &shared, tensors)?;
        file.tensors.release_pages();
        trim_heap();
        let file = Arc::clone(file);
        let mut model = Self { session, shared, file, embeddings: Vec::new(), logits: None };
        if model.probe()?.iter().any(|x| !x.is_finite()) {
            return Err(EngineError::Limits("the model computes values that are not finite numbers".into()));
        }
        Ok(model)
    }

    /// Logits of a few fixed tokens, together and then one by one. Leaves nothing that a sequence could see:
    /// blocks are written before they are read.
    fn probe(&mut self) -> Result<Vec<f32>, EngineError> {
        let vocabulary = self.vocabulary() as u32;
        let context = self.shared.angles.len() / self.shared.params.head_size;
        let tokens: Vec<u32> = (0..6.min(context as u32)).map(|i| (1000 + 77 * i) % vocabulary).collect();
        let blocks: Vec<u32> = (0..tokens.len().div_ceil(self.shared.cache.shape.block_tokens) as u32).collect();
        let last = tokens.len() - 1;
        let mut logits = Vec::new();
        for (computed, rows) in [(0, last), (last, 1)] {
            if rows == 0 {
                continue;
            }
            let tokens = &tokens[..computed + rows];
            let prompt_tokens = tokens.len();
            let sequence = BatchSequence { tokens, prompt_tokens, computed, rows, logits_rows: 1, blocks: &blocks };
            logits.extend_from_slice(self.forward(&Batch { sequences: vec![sequence] })?);
        }
        Ok(logits)
    }

    /// The embedding of each row, straight from the file.
    fn embed(&mut self, batch: &Batch) -> Result<usize, GgufError> {
        let width = self.file.params.width;
        self.embeddings.resize(batch.rows() * width, 0.0);
        let tokens = batch.sequences.iter().flat_map(|s| &s.tokens[s.computed..s.computed + s.rows]);
        for (token, out) in tokens.zip(self.embeddings.chunks_exact_mut(width)) {
            self.file.tensors.dequantize_rows("token_embd.weight", *token as usize, out)?;
            out.iter_mut().for_each(|x| *x *= self.file.params.embedding_factor);
        }
        Ok(batch.rows())
    }
}

impl Forward for OnnxModel {
    fn vocabulary(&self) -> usize {
        self.file.params.vocabulary
    }

    fn forward(&mut self, batch: &Batch) -> Result<&[f32], EngineError> {
        let rows = self.embed(batch)?;
        let is_sampled = {
            let mut step = self.shared.step.write();
            step.set(batch, self.shared.cache.shape.block_tokens)?;
            !step.sampled.is_empty()
        };
        let shape = [rows, self.file.params.width];
        let x = TensorRef::from_array_view((shape, &self.embeddings[..]))?;
        let mut outputs = self.session.run(ort::inputs!["x" => x])?;
        let logits = outputs.remove("logits").ok_or_else(|| EngineError::Limits("the graph gave no logits".into()))?;
        drop(outputs);
        let logits = self.logits.insert(logits);
        if !is_sampled {
            return Ok(&[]);
        }
        Ok(logits.try_extract_tensor::<f32>()?.1)
    }
}

fn session(
    runtime: &OnnxRuntime,
    shared: &Arc<Shared>,
    tensors: Vec<(String, DynValue)>,
) -> Result<Session, EngineError> {
    let graph = served_graph(&shared.params, &shared.layouts);
    let mut builder: SessionBuilder = Session::builder(&runtime.environment)?;
    builder = builder.with_operators(operators::domain(shared)?).map_err(plain)?;
    builder = builder.with_memory_pattern(false).map_err(plain)?;
    builder = builder.with_optimization_level(GraphOptimizationLevel::Level1).map_err(plain)?;
    builder = providers::register(builder, &runtime.options.providers)?;
    for (name, tensor) in tensors {
        builder = builder.with_external_initializer(name, tensor).map_err(plain)?;
    }
    Ok(builder.commit_from_memory(&graph)?)
}

/// The error without the builder that it would give back.
fn plain(error: ort::Error<SessionBuilder>) -> EngineError {
    EngineError::Onnx(error.into())
}

/// Embeddings are read row by row when they are needed; a row that is no number would then end the engine
/// for everybody.
fn check_embeddings(file: &ModelFile) -> Result<(), GgufError> {
    const ROWS: usize = 1024;
    let (width, rows) = (file.params.width, file.params.vocabulary);
    let mut numbers = vec![0.0; ROWS * width];
    for from in (0..rows).step_by(ROWS) {
        let count = ROWS.min(rows - from);
        file.tensors.dequantize_rows("token_embd.weight", from, &mut numbers[..count * width])?;
    }
    Ok(())
}

/// Gives what loading freed back to the system.
fn trim_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The graph of one step: `x` `[rows, width]`, the embeddings, to `logits` `[sampled, vocabulary]`.
fn served_graph(params: &ModelParams, layouts: &[Layout]) -> Vec<u8> {
    let mut build = Builder { graph: Graph::default(), layouts, next: 0 };
    build.graph.input("x", DataType::F32, &[Dim::Named("rows"), Dim::Fixed(params.width)]);
    build.graph.output("logits", DataType::F32, &[Dim::Named("sampled"), Dim::Fixed(params.vocabulary)]);
    let mut x = "x".to_owned();
    for i in 0..params.layers {
        let n = |part: &str| format!("l{i}.{part}");
        build.norm("NormQuantize", &x, &n("attn_norm"), params.width, &n("in"));
        build.linear(&n("in"), &n("qkv"), None);
        build.attention(params, i);
        let attended = build.add(params, &n("mixed"), &n("o"), &n("post_attention_norm"), &x);
        build.norm("NormQuantize", &attended, &n("ffn_norm"), params.width, &n("ffn_in"));
        build.linear(&n("ffn_in"), &n("gate_up"), None);
        let gated = match params.activation {
            Activation::Silu => "SiluMulQuantize",
            Activation::Gelu => "GeluMulQuantize",
        };
        build.graph.own(gated, &[&n("gate_up.out")], &[&n("hidden"), &n("hidden.scales")], vec![]);
        x = build.add(params, &n("hidden"), &n("down"), &n("post_ffw_norm"), &attended);
    }
    build.norm("SampledNormQuantize", &x, "head.norm", params.width, "head.in");
    build.product("head.in", "head", None, "logits");
    build.graph.encode()
}

/// Writes the served graph; a quantised tensor `name` has its scales in `name.scales`.
struct Builder<'a> {
    graph: Graph,
    layouts: &'a [Layout],
    /// The matrices come in the order in which they were packed.
    next: usize,
}

impl Builder<'_> {
    fn norm(&mut self, op: &str, from: &str, weights: &str, width: usize, to: &str) {
        self.graph.weight(weights, DataType::F32, &[width]);
        self.graph.own(op, &[from, weights], &[to, &format!("{to}.scales")], vec![]);
    }

    /// The layer's `mixed`, from its `qkv.out`.
    fn attention(&mut self, params: &ModelParams, layer: usize) {
        let n = |part: &str| format!("l{layer}.{part}");
        let (from, norms) = (n("qkv.out"), [n("attn_q_norm"), n("attn_k_norm")]);
        let mut inputs = vec![from.as_str()];
        if params.has_head_norms {
            for norm in &norms {
                self.graph.weight(norm, DataType::F32, &[params.head_size]);
                inputs.push(norm);
            }
        }
        let op = if params.has_head_norms { "AttentionHeadNorms" } else { "Attention" };
        let index = vec![graph::int("index", layer as i64)];
        self.graph.own(op, &inputs, &[&n("mixed"), &n("mixed.scales")], index);
    }

    /// The residual stream plus the product of `from` and the matrix `name`, normalised before that where the
    /// model does so. Its name.
    fn add(&mut self, params: &ModelParams, from: &str, name: &str, norm: &str, residual: &str) -> String {
        if !params.has_post_norms {
            self.linear(from, name, Some(residual));
            return format!("{name}.out");
        }
        let sum = format!("{name}.sum");
        self.linear(from, name, None);
        self.graph.weight(norm, DataType::F32, &[params.width]);
        self.graph.own("NormAdd", &[&format!("{name}.out"), norm, residual], &[&sum], vec![]);
        sum
    }

    /// `name.out` becomes the product of `from` and the matrix `name`, and plus the residual.
    fn linear(&mut self, from: &str, name: &str, residual: Option<&str>) {
        self.product(from, name, residual, &format!("{name}.out"));
    }

    fn product(&mut self, from: &str, name: &str, residual: Option<&str>, to: &str) {
        self.graph.weight(name, DataType::U8, &[self.layouts[self.next].bytes]);
        let scales = format!("{from}.scales");
        let mut inputs = vec![from, &scales, name];
        inputs.extend(residual);
        let op = if residual.is_some() { "LinearAdd" } else { "Linear" };
        self.graph.own(op, &inputs, &[to], vec![graph::int("index", self.next as i64)]);
        self.next += 1;
    }
}
