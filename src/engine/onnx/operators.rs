//! Our operators, as ONNX Runtime sees them.
//!
//! A panic in a kernel would cross C++ frames and abort the process, so every kernel and every parallel
//! body runs under `catch_unwind` and becomes an error of this run.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use ort::{
    operator::{
        BoxedKernel, ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput,
    },
    value::{PrimitiveTensorElementType, TensorElementType},
};
use parking_lot::{Mutex, RwLock};

use super::{
    graph::DOMAIN,
    kv::KvCache,
    layer::{Head, Layer, LayerWeights, Matrix, Scratch, Surroundings},
    step::Step,
    team::{Member, Team, Times},
    weights::Weights,
};
use crate::model::ModelParams;

type Result<T> = ort::Result<T>;

/// Products below which one thread is faster than waking another.
const PARALLEL_MIN: usize = 256 * 1024;

/// What the kernels share with the engine's thread, which changes it between runs.
pub struct Shared {
    pub step: RwLock<Step>,
    pub cache: KvCache,
    pub params: ModelParams,
    /// Per position: cosines, then sines, `head_size / 2` of each.
    pub angles: Vec<f32>,
    /// The same for layers with a sliding window; empty where there are none.
    pub window_angles: Vec<f32>,
    pub weights: Arc<Weights>,
    /// Threads of ONNX Runtime's pool, its caller among them.
    pub threads: usize,
    /// Of the kernel that runs: one at a time does.
    pub scratch: Mutex<Scratch>,
    pub times: Times,
}

impl Shared {
    /// Angles of a rotary embedding for every position of the context.
    pub fn angles(params: &ModelParams, base: f32, context_tokens: usize) -> Vec<f32> {
        let pairs = params.head_size / 2;
        let mut angles = Vec::with_capacity(context_tokens * params.head_size);
        for position in 0..context_tokens {
            let angle = |pair: usize| {
                let exponent = -2.0 * pair as f64 / params.head_size as f64;
                position as f64 * f64::from(base).powf(exponent)
            };
            angles.extend((0..pairs).map(|pair| angle(pair).cos() as f32));
            angles.extend((0..pairs).map(|pair| angle(pair).sin() as f32));
        }
        angles
    }
}

pub fn domain(shared: &Arc<Shared>) -> Result<OperatorDomain> {
    use TensorElementType::{Float32, Uint8};
    let op = |name, inputs: &[TensorElementType], kernel| Op {
        name,
        inputs: inputs.to_vec(),
        shared: Arc::clone(shared),
        kernel,
    };
    let mut of_layer = vec![Float32, Uint8];
    of_layer.extend(vec![Float32; layer_norms(&shared.params).len()]);
    OperatorDomain::new(DOMAIN)?.add(op("Layer", &of_layer, layer))?.add(op("Head", &[Float32, Uint8, Float32], head))
}

/// Matrices of one layer: QKV, output, gate and up, down.
const LAYER_MATRICES: usize = 4;
/// Which input of both operators the bytes of all matrices are.
const MATRICES_INPUT: usize = 1;

/// The norms of a layer, with their widths, in the order of its operator's inputs, after the matrices.
pub fn layer_norms(params: &ModelParams) -> Vec<(&'static str, usize)> {
    let mut norms = vec![("attn_norm", params.width), ("ffn_norm", params.width)];
    if params.has_head_norms {
        norms.extend([("attn_q_norm", params.head_size), ("attn_k_norm", params.head_size)]);
    }
    if params.has_post_norms {
        norms.extend([("post_attention_norm", params.width), ("post_ffw_norm", params.width)]);
    }
    norms
}

/// One operator: its signature, and the function that computes it.
struct Op {
    name: &'static str,
    inputs: Vec<TensorElementType>,
    shared: Arc<Shared>,
    kernel: fn(&Call) -> Result<()>,
}

/// One call of an operator.
struct Call<'a> {
    context: &'a ComputeContext,
    shared: &'a Shared,
    /// Of the layer.
    index: usize,
}

impl Operator for Op {
    type Kernel<'a> = BoxedKernel<'a>;

    fn name(&self) -> &str {
        self.name
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        self.inputs.clone().into_iter().map(OperatorInput::required)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'a>(&self, attributes: &KernelContext<'a>) -> Result<BoxedKernel<'a>> {
        let index = attributes.get::<i64>("index").unwrap_or(0) as usize;
        Ok(Box::new(Guarded { name: self.name, shared: Arc::clone(&self.shared), index, kernel: self.kernel }))
    }
}

struct Guarded {
    name: &'static str,
    shared: Arc<Shared>,
    index: usize,
    kernel: fn(&Call) -> Result<()>,
}

impl Kernel for Guarded {
    fn compute(&mut self, context: &ComputeContext) -> Result<()> {
        let call = Call { context, shared: &self.shared, index: self.index };
        catch_unwind(AssertUnwindSafe(|| (self.kernel)(&call)))
            .unwrap_or_else(|_| Err(ort::Error::new(format!("operator {} panicked", self.name))))
    }
}

impl Call<'_> {
    /// The numbers of input `index`.
    fn input<T: PrimitiveTensorElementType>(&self, index: usize) -> Result<&[T]> {
        let missing = || ort::Error::new("an input is missing");
        let value = self.context.input(index)?.ok_or_else(missing)?;
        let (_, data) = value.try_extract_tensor::<T>()?;
        // SAFETY: the value is a view of memory that ONNX Runtime keeps until this call returns, and the
        // call borrows the context for longer than the slice lives.
        Ok(unsafe { std::slice::from_raw_parts(data.as_ptr(), data.len()) })
    }

    /// The output, which is made here.
    ///
    /// # Safety
    /// A kernel asks for it once.
    #[allow(clippy::mut_from_ref)]
    unsafe fn output(&self, rows: usize, columns: usize) -> Result<&mut [f32]> {
        let missing = || ort::Error::new("an output is missing");
        let mut value = self.context.output(0, [rows as i64, columns as i64])?.ok_or_else(missing)?;
        let (_, data) = value.try_extract_tensor_mut::<f32>()?;
        // SAFETY: as above; unique, by the caller's promise.
        Ok(unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr(), data.len()) })
    }

    fn matrix(&self, index: usize) -> Result<Matrix<'_>> {
        let matrix = &self.shared.weights.matrices[index];
        Ok(Matrix { layout: &matrix.layout, bytes: matrix.of(self.input(MATRICES_INPUT)?) })
    }

    /// Runs `work` on every thread of ONNX Runtime's pool, as a team, or here alone if it is so little.
    fn together(&self, products: usize, work: impl Fn(&Member) + Sync + Send) -> Result<()> {
        let threads = if products < PARALLEL_MIN { 1 } else { self.shared.threads };
        let (team, times) = (Team::of(threads), &self.shared.times);
        if threads == 1 {
            team.join(0, Some(times), work);
        } else {
            // One of them tells the time.
            self.context
                .par_for(threads, threads, |member| team.join(member, (member == 0).then_some(times), &work))?;
        }
        if team.is_broken() { Err(ort::Error::new("a part of an operator panicked")) } else { Ok(()) }
    }
}

/// Inputs: the stream, `[rows, width]`, the bytes of all matrices, the layer's norms. Output: the stream after it, of the
/// sampled rows alone after the last layer.
fn layer(call: &Call) -> Result<()> {
    let Shared { step, cache, params, .. } = call.shared;
    let (x, step) = (call.input::<f32>(0)?, step.read());
    if x.len() != step.rows.len() * params.width {
        return Err(ort::Error::new("the step and its tensors have different numbers of rows"));
    }
    let first = call.index * LAYER_MATRICES;
    let mut norms = (MATRICES_INPUT + 1..).map(|at| call.input::<f32>(at));
    let mut norm = || norms.next().unwrap_or_else(|| Err(ort::Error::new("a norm is missing")));
    let weights = LayerWeights {
        index: call.index,
        qkv: call.matrix(first)?,
        output: call.matrix(first + 1)?,
        gate_up: call.matrix(first + 2)?,
        down: call.matrix(first + 3)?,
        attention_norm: norm()?,
        ffn_norm: norm()?,
        head_norms: if params.has_head_norms { Some([norm()?, norm()?]) } else { None },
        post_norms: if params.has_post_norms { Some([norm()?, norm()?]) } else { None },
    };
    let angles = if params.window(call.index).is_some() { &call.shared.window_angles } else { &call.shared.angles };
    let around = Surroundings { params, step: &step, cache, angles };
    // SAFETY: once.
    let out = unsafe { call.output(Layer::rows_out(params, &step, call.index), params.width)? };
    let mut scratch = call.shared.scratch.lock();
    let layer = Layer::new(weights, around, x, out, &mut scratch);
    let matrices = &call.shared.weights.matrices[first..][..LAYER_MATRICES];
    let products: usize = matrices.iter().map(|m| m.layout.inputs * m.layout.outputs).sum();
    call.together(products * step.rows.len(), |team| layer.compute(team))
}

/// Inputs: rows, `[rows, width]`, the bytes of all matrices, the norm's weights. Output: logits.
fn head(call: &Call) -> Result<()> {
    let params = &call.shared.params;
    let (x, norm) = (call.input::<f32>(0)?, call.input::<f32>(MATRICES_INPUT + 1)?);
    let matrix = call.matrix(call.shared.weights.matrices.len() - 1)?;
    let rows = x.len() / params.width;
    // SAFETY: once.
    let out = unsafe { call.output(rows, matrix.layout.outputs)? };
    let mut scratch = call.shared.scratch.lock();
    let head = Head::new(params, matrix, norm, x, out, &mut scratch);
    call.together(rows * params.width * params.vocabulary, |team| head.compute(team))
}
