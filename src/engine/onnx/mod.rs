//! Language models on ONNX Runtime: the graph, its weights, and our operators in it.
//!
//! Matrices stay in the small whole numbers of their file; activations are quantised in blocks of each row,
//! so a row's numbers never depend on its neighbours; integer sums are exact in any order.

mod attention;
mod graph;
mod huge_pages;
mod kv;
mod layer;
mod linear;
mod operators;
mod proto;
mod providers;
pub mod reference;
mod rows;
mod runtime;
mod step;
mod team;
mod weights;

use std::{sync::Arc, time::Duration};

use ort::{
    session::{
        Session,
        builder::{GraphOptimizationLevel, SessionBuilder},
    },
    value::{DynValue, TensorRef},
};
use parking_lot::{Mutex, RwLock};

pub use layer::Part;
pub(super) use linear::packed_bytes;
pub use runtime::{OnnxRuntime, RuntimeOptions};
pub(super) use weights::HEAD_BITS_MAX;

use super::{Batch, BatchSequence, EngineError, Forward};
use crate::model::{ModelError, ModelFile, ModelParams};
use graph::{Dim, Graph};
use kv::{KvCache, KvShape};
use operators::Shared;
use proto::DataType;
use team::Times;
use weights::MATRICES;

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
        if !layer::fits(params) {
            return Err(EngineError::Limits("heads of this size or grouping are not supported".into()));
        }
        check_embeddings(file)?;
        let weights = runtime.pack.weights(file)?;
        let shared = Arc::new(Shared {
            step: RwLock::default(),
            cache: KvCache::new(KvShape::new(params, kv_block_tokens, kv_blocks))?,
            params: params.clone(),
            angles: Shared::angles(params, params.rope_base, context_tokens),
            window_angles: params
                .sliding
                .as_ref()
                .map_or(Vec::new(), |sliding| Shared::angles(params, sliding.rope_base, context_tokens)),
            weights,
            threads: runtime.options.threads,
            scratch: Mutex::default(),
            times: Times::default(),
        });
        let session = session(runtime, &shared)?;
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

    /// What the steps since the last call spent on one part of their work, as one of the threads saw it.
    pub fn take_time(&self, part: Part) -> Duration {
        self.shared.times.take(part as usize)
    }

    /// The embedding of each row, straight from the file.
    fn embed(&mut self, batch: &Batch) -> Result<usize, ModelError> {
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

/// ONNX Runtime notes each custom domain in a register of the process when a session is made, without a lock: two that
/// are made at once may both find it missing, and the second one fails.
static MAKING: Mutex<()> = Mutex::new(());

fn session(runtime: &OnnxRuntime, shared: &Arc<Shared>) -> Result<Session, EngineError> {
    let _alone = MAKING.lock();
    let graph = served_graph(&shared.params, shared.weights.matrices_bytes);
    let mut builder: SessionBuilder = Session::builder(&runtime.environment)?;
    builder = builder.with_operators(operators::domain(shared)?).map_err(plain)?;
    builder = builder.with_memory_pattern(false).map_err(plain)?;
    builder = builder.with_optimization_level(GraphOptimizationLevel::Level1).map_err(plain)?;
    builder = providers::register(builder, &runtime.options.providers)?;
    let (key, folder) = ("session.model_external_initializers_file_folder_path", graph::WEIGHTS_PLACE.0);
    builder = builder.with_config_entry(key, folder).map_err(plain)?;
    for (name, tensor) in &shared.weights.tensors {
        // Not `with_external_initializer`, which copies every weight.
        builder = builder.with_initializer(name, Arc::clone(tensor)).map_err(plain)?;
    }
    Ok(builder.commit_from_memory(&graph)?)
}

/// The error without the builder that it would give back.
fn plain(error: ort::Error<SessionBuilder>) -> EngineError {
    EngineError::Onnx(error.into())
}

/// Embeddings are read row by row when they are needed; a row that is no number would then end the engine
/// for everybody.
fn check_embeddings(file: &ModelFile) -> Result<(), ModelError> {
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
fn served_graph(params: &ModelParams, matrices_bytes: usize) -> Vec<u8> {
    let mut graph = Graph::default();
    graph.input("x", DataType::F32, &[Dim::Named("rows"), Dim::Fixed(params.width)]);
    graph.output("logits", DataType::F32, &[Dim::Named("sampled"), Dim::Fixed(params.vocabulary)]);
    graph.weight(MATRICES, DataType::U8, &[matrices_bytes]);
    let mut x = "x".to_owned();
    for i in 0..params.layers {
        let mut inputs = vec![x, MATRICES.to_owned()];
        for (part, width) in operators::layer_norms(params) {
            inputs.push(format!("l{i}.{part}"));
            graph.weight(&inputs[inputs.len() - 1], DataType::F32, &[width]);
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        x = format!("l{i}.out");
        graph.own("Layer", &inputs, &[&x], vec![graph::int("index", i as i64)]);
    }
    graph.weight("head.norm", DataType::F32, &[params.width]);
    graph.own("Head", &[&x, MATRICES, "head.norm"], &["logits"], vec![]);
    graph.encode()
}
