//! Llama-family models on ONNX Runtime: the graph, its weights, and our operators in it.
//!
//! Matrices are rotated and quantised to int8 with one scale per output channel; activations are quantised
//! row by row, so a row's numbers never depend on its neighbours; integer sums are exact in any order.

mod attention;
mod graph;
mod kv;
mod operators;
mod proto;
mod providers;
pub mod reference;
mod rotation;
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
use crate::model::{GgufError, LlamaParams, ModelFile};
use graph::{Dim, Graph};
use kv::{KvCache, KvShape};
use operators::Shared;
use proto::DataType;
use rotation::Rotation;
use weights::{Linear, QuantType};

/// Bytes that one KV block of `block_tokens` tokens takes.
pub fn kv_block_bytes(params: &LlamaParams, block_tokens: usize) -> usize {
    KvShape::new(params, block_tokens, 1).block_bytes()
}

/// A loaded model with its KV cache. Lives on the engine's thread.
pub struct OnnxModel {
    session: Session,
    shared: Arc<Shared>,
    file: Arc<ModelFile>,
    rotation: Rotation,
    /// Embeddings of the step's rows, `[rows, width]`.
    embeddings: Vec<f32>,
    scratch: Vec<f32>,
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
        if !operators::fits(params) || params.width / rotation::power_of_two_divisor(params.width, 64) > 1024 {
            return Err(EngineError::Limits("heads of this size or grouping are not supported".into()));
        }
        check_embeddings(file)?;
        let rotation = Rotation::new(params.width);
        let shared = Arc::new(Shared {
            step: RwLock::default(),
            cache: KvCache::new(KvShape::new(params, kv_block_tokens, kv_blocks))?,
            params: params.clone(),
            angles: Shared::angles(params, context_tokens),
            hadamard_block: weights::ffn_hadamard(params),
        });
        // See `simd::HAS_INT8_DOT` for why the type of the weights depends on the machine.
        let ty = if *crate::engine::simd::HAS_INT8_DOT { QuantType::I8 } else { QuantType::U8 };
        let linears = weights::load(file, &rotation, ty)?;
        let (session, weights) = session(runtime, &shared, linears, ty)?;
        file.gguf.release_pages();
        let mut model = Self {
            session,
            shared,
            file: Arc::clone(file),
            rotation,
            embeddings: Vec::new(),
            scratch: Vec::new(),
            logits: None,
        };
        model.release(&weights)?;
        Ok(model)
    }

    /// Gives the pages of the unpacked weights back to the system: ONNX Runtime computes on packed copies.
    /// Where a kernel did not pack its weights it would now read zeros, so the same rows are computed before
    /// and after, one alone and several together, and must have the same bits.
    fn release(&mut self, weights: &[Pages]) -> Result<(), EngineError> {
        let before = self.probe()?;
        weights.iter().for_each(Pages::release);
        trim_heap();
        if before.iter().any(|x| !x.is_finite()) {
            return Err(EngineError::Limits("the model computes values that are not finite numbers".into()));
        }
        if self.probe()? != before {
            return Err(EngineError::Limits(
                "this build of ONNX Runtime does not pack int8 weights, which the engine relies on".into(),
            ));
        }
        Ok(())
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

    /// The rotated embedding of each row, straight from the file.
    fn embed(&mut self, batch: &Batch) -> Result<usize, GgufError> {
        let width = self.file.params.width;
        self.embeddings.resize(batch.rows() * width, 0.0);
        let tokens = batch.sequences.iter().flat_map(|s| &s.tokens[s.computed..s.computed + s.rows]);
        for (token, out) in tokens.zip(self.embeddings.chunks_exact_mut(width)) {
            self.file.gguf.dequantize_rows("token_embd.weight", *token as usize, out)?;
            self.rotation.apply(out, &mut self.scratch);
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
    linears: Vec<Linear>,
    ty: QuantType,
) -> Result<(Session, Vec<Pages>), EngineError> {
    let graph = int8_graph(&shared.params, &linears, ty);
    let mut pages = Vec::with_capacity(linears.len());
    let mut builder: SessionBuilder = Session::builder(&runtime.environment)?;
    builder = builder.with_operators(operators::domain(shared)?).map_err(plain)?;
    builder = builder.with_memory_pattern(false).map_err(plain)?;
    // Packed weights live as long as the session: outside the arena, which would round them up.
    builder = builder.with_device_allocated_initializers().map_err(plain)?;
    builder = builder.with_optimization_level(GraphOptimizationLevel::Level1).map_err(plain)?;
    builder = providers::register(builder, &runtime.options.providers)?;
    let add = |builder: SessionBuilder, name: &str, value: DynValue| {
        builder.with_external_initializer(name, value).map_err(plain)
    };
    builder = add(builder, "zero_point", Tensor::from_array(([1usize], vec![rows::ZERO_POINT]))?.into_dyn())?;
    for linear in linears {
        let shape = [linear.inputs, linear.outputs];
        pages.push(Pages { data: linear.quants.as_ptr(), len: linear.quants.len() });
        let weight = match ty {
            QuantType::U8 => Tensor::from_array((shape, linear.quants))?.into_dyn(),
            QuantType::I8 => Tensor::from_array((shape, into_signed(linear.quants)))?.into_dyn(),
        };
        builder = add(builder, &format!("{}.weight", linear.name), weight)?;
        let scales = Tensor::from_array(([linear.outputs], linear.scales))?.into_dyn();
        builder = add(builder, &format!("{}.scale", linear.name), scales)?;
    }
    Ok((builder.commit_from_memory(&graph)?, pages))
}

/// The error without the builder that it would give back.
fn plain(error: ort::Error<SessionBuilder>) -> EngineError {
    EngineError::Onnx(error.into())
}

/// The same bytes, read as two's complement.
fn into_signed(bytes: Vec<u8>) -> Vec<i8> {
    let mut bytes = std::mem::ManuallyDrop::new(bytes);
    // SAFETY: u8 and i8 have the same size and alignment, and the original is not dropped.
    unsafe { Vec::from_raw_parts(bytes.as_mut_ptr().cast(), bytes.len(), bytes.capacity()) }
}

/// Memory of one weight, owned by the session.
struct Pages {
    data: *const u8,
    len: usize,
}

impl Pages {
    /// Gives the whole pages within back to the system. They read as zeros from then on.
    fn release(&self) {
        const PAGE: usize = 4096;
        let from = (self.data as usize).next_multiple_of(PAGE);
        let to = (self.data as usize + self.len) / PAGE * PAGE;
        if from < to {
            // SAFETY: only pages wholly inside one live allocation, to which no Rust reference exists; their
            // bytes stay mapped. That nobody needs what stood there is for the caller to prove. A failure
            // costs memory and nothing else.
            unsafe { libc::madvise(from as *mut libc::c_void, to - from, libc::MADV_DONTNEED) };
        }
    }
}

/// Embeddings are read row by row when they are needed; a row that is no number would then end the engine
/// for everybody.
fn check_embeddings(file: &ModelFile) -> Result<(), GgufError> {
    const ROWS: usize = 1024;
    let (width, rows) = (file.params.width, file.params.vocabulary);
    let mut numbers = vec![0.0; ROWS * width];
    for from in (0..rows).step_by(ROWS) {
        let count = ROWS.min(rows - from);
        file.gguf.dequantize_rows("token_embd.weight", from, &mut numbers[..count * width])?;
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

/// The graph of one step: `x` `[rows, width]`, the rotated embeddings, to `logits` `[sampled, vocabulary]`.
fn int8_graph(params: &LlamaParams, linears: &[Linear], ty: QuantType) -> Vec<u8> {
    let weight_type = if ty == QuantType::U8 { DataType::U8 } else { DataType::I8 };
    let mut g = Graph::default();
    g.input("x", DataType::F32, &[Dim::Named("rows"), Dim::Fixed(params.width)]);
    g.output("logits", DataType::F32, &[Dim::Named("sampled"), Dim::Fixed(params.vocabulary)]);
    g.weight("zero_point", DataType::U8, &[1]);
    for linear in linears {
        g.weight(&format!("{}.weight", linear.name), weight_type, &[linear.inputs, linear.outputs]);
        g.weight(&format!("{}.scale", linear.name), DataType::F32, &[linear.outputs]);
    }
    let product = |g: &mut Graph, name: &str, input: &str| {
        let weight = format!("{name}.weight");
        let mut inputs = vec![input, &weight, "zero_point"];
        if ty == QuantType::U8 {
            inputs.push("zero_point");
        }
        g.node("MatMulInteger", &inputs, &[&format!("{name}.products")], vec![]);
    };
    let mut residual = "x".to_owned();
    g.own("NormQuantize", &["x"], &["l0.in", "l0.in_scale"], vec![]);
    for i in 0..params.layers {
        let n = |part: &str| format!("l{i}.{part}");
        product(&mut g, &n("qkv"), &n("in"));
        g.own(
            "Attention",
            &[&n("qkv.products"), &n("in_scale"), &n("qkv.scale")],
            &[&n("mixed"), &n("mixed_scale")],
            vec![graph::int("layer", i as i64)],
        );
        product(&mut g, &n("o"), &n("mixed"));
        g.own(
            "AddNormQuantize",
            &[&residual, &n("o.products"), &n("mixed_scale"), &n("o.scale")],
            &[&n("attended"), &n("ffn_in"), &n("ffn_in_scale")],
            vec![],
        );
        product(&mut g, &n("gate_up"), &n("ffn_in"));
        g.own(
            "SiluMulQuantize",
            &[&n("gate_up.products"), &n("ffn_in_scale"), &n("gate_up.scale")],
            &[&n("hidden"), &n("hidden_scale")],
            vec![],
        );
        product(&mut g, &n("down"), &n("hidden"));
        let inputs = [n("attended"), n("down.products"), n("hidden_scale"), n("down.scale")];
        let inputs = inputs.each_ref().map(String::as_str);
        if i + 1 < params.layers {
            let n = |part: &str| format!("l{}.{part}", i + 1);
            residual = n("x");
            g.own("AddNormQuantize", &inputs, &[&residual, &n("in"), &n("in_scale")], vec![]);
        } else {
            g.own("SampledNormQuantize", &inputs, &["head.in", "head.in_scale"], vec![]);
        }
    }
    product(&mut g, "head", "head.in");
    g.own("Dequantize", &["head.products", "head.in_scale", "head.scale"], &["logits"], vec![]);
    g.encode()
}
