//! Our operators, as ONNX Runtime sees them.
//!
//! A panic in a kernel would cross C++ frames and abort the process, so every kernel and every parallel
//! body runs under `catch_unwind` and becomes an error of this run.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
};

use ort::{
    operator::{
        BoxedKernel, ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput,
    },
    value::{PrimitiveTensorElementType, TensorElementType},
};
use parking_lot::RwLock;

use super::{
    attention::{Pages, Span, attend},
    graph::DOMAIN,
    kv::KvCache,
    linear::{Layout, Rows, Target},
    rows,
    step::{Step, TILE_ROWS_MAX},
};
use crate::model::{BLOCK, ModelParams, RopePairs};

type Result<T> = ort::Result<T>;

/// Numbers below which one thread is faster than waking another.
const PARALLEL_MIN: usize = 16 * 1024;
/// Products of codes and quants that one piece of a matrix product has, about.
const PIECE_PRODUCTS: usize = 128 * 1024;
/// Pieces of one matrix product, at most.
const PIECES_MAX: usize = 64;

/// What the kernels share with the engine's thread, which changes it between runs.
pub struct Shared {
    pub step: RwLock<Step>,
    pub cache: KvCache,
    pub params: ModelParams,
    /// Per position: cosines, then sines, `head_size / 2` of each.
    pub angles: Vec<f32>,
    /// The same for layers with a sliding window; empty where there are none.
    pub window_angles: Vec<f32>,
    /// How the matrices are packed, in the order of the graph.
    pub layouts: Vec<Layout>,
    /// Threads of ONNX Runtime's pool, its caller among them.
    pub threads: usize,
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
    use TensorElementType::{Float32, Int8, Uint8};
    let op = |name, inputs: &[TensorElementType], outputs: &[TensorElementType], kernel| Op {
        name,
        inputs: inputs.to_vec(),
        outputs: outputs.to_vec(),
        shared: Arc::clone(shared),
        kernel,
    };
    let quantized = [Int8, Float32];
    OperatorDomain::new(DOMAIN)?
        .add(op("NormQuantize", &[Float32, Float32], &quantized, norm_quantize))?
        .add(op("SampledNormQuantize", &[Float32, Float32], &quantized, sampled_norm_quantize))?
        .add(op("Attention", &[Float32], &quantized, attention))?
        .add(op("AttentionHeadNorms", &[Float32; 3], &quantized, attention))?
        .add(op("NormAdd", &[Float32; 3], &[Float32], norm_add))?
        .add(op("SiluMulQuantize", &[Float32], &quantized, silu_mul_quantize))?
        .add(op("GeluMulQuantize", &[Float32], &quantized, gelu_mul_quantize))?
        .add(op("Linear", &[Int8, Float32, Uint8], &[Float32], linear))?
        .add(op("LinearAdd", &[Int8, Float32, Uint8, Float32], &[Float32], linear))
}

/// One operator: its signature, and the function that computes it.
struct Op {
    name: &'static str,
    inputs: Vec<TensorElementType>,
    outputs: Vec<TensorElementType>,
    shared: Arc<Shared>,
    kernel: fn(&Call, &mut Scratch) -> Result<()>,
}

/// One call of an operator.
struct Call<'a> {
    context: &'a ComputeContext,
    shared: &'a Shared,
    /// Of the layer, or of the matrix.
    index: usize,
    inputs: usize,
}

/// Buffers that a kernel keeps from call to call.
#[derive(Default)]
struct Scratch {
    floats: Vec<f32>,
    more_floats: Vec<f32>,
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
        self.outputs.clone().into_iter().map(OperatorOutput::required)
    }

    fn create_kernel<'a>(&self, attributes: &KernelContext<'a>) -> Result<BoxedKernel<'a>> {
        let index = attributes.get::<i64>("index").unwrap_or(0) as usize;
        Ok(Box::new(Guarded {
            name: self.name,
            shared: Arc::clone(&self.shared),
            index,
            inputs: self.inputs.len(),
            kernel: self.kernel,
            scratch: Scratch::default(),
        }))
    }
}

struct Guarded {
    name: &'static str,
    shared: Arc<Shared>,
    index: usize,
    inputs: usize,
    kernel: fn(&Call, &mut Scratch) -> Result<()>,
    scratch: Scratch,
}

impl Kernel for Guarded {
    fn compute(&mut self, context: &ComputeContext) -> Result<()> {
        let Self { shared, index, inputs, kernel, scratch, .. } = self;
        let call = Call { context, shared, index: *index, inputs: *inputs };
        catch_unwind(AssertUnwindSafe(|| kernel(&call, scratch)))
            .unwrap_or_else(|_| Err(ort::Error::new(format!("operator {} panicked", self.name))))
    }
}

impl Call<'_> {
    /// Input `index` as (rows, columns, numbers); one-dimensional inputs count as one row.
    fn input<T: PrimitiveTensorElementType>(&self, index: usize) -> Result<(usize, usize, &[T])> {
        let missing = || ort::Error::new("an input is missing");
        let value = self.context.input(index)?.ok_or_else(missing)?;
        let (shape, data) = value.try_extract_tensor::<T>()?;
        let columns = shape.last().copied().unwrap_or(1).max(1) as usize;
        // SAFETY: the value is a view of memory that ONNX Runtime keeps until this call returns, and the
        // call borrows the context for longer than the slice lives.
        let data = unsafe { std::slice::from_raw_parts(data.as_ptr(), data.len()) };
        Ok((data.len() / columns, columns, data))
    }

    fn output<T: PrimitiveTensorElementType>(&self, index: usize, rows: usize, columns: usize) -> Result<Out<T>> {
        let missing = || ort::Error::new("an output is missing");
        let mut value = self.context.output(index, [rows as i64, columns as i64])?.ok_or_else(missing)?;
        let (_, data) = value.try_extract_tensor_mut::<T>()?;
        Ok(Out { data: data.as_mut_ptr(), rows, columns })
    }

    /// Outputs 0 and 1: rows of quants and their blocks' scales.
    fn quantized(&self, rows: usize, columns: usize) -> Result<Quantized> {
        let quants = self.output::<i8>(0, rows, columns)?;
        Ok(Quantized { quants, scales: self.output::<f32>(1, rows, columns / BLOCK * 2)? })
    }

    /// Runs `body` for each of `count` pieces of `cost` numbers each, on ONNX Runtime's threads if it pays.
    fn each(&self, count: usize, cost: usize, body: impl Fn(usize) + Sync + Send) -> Result<()> {
        if count * cost < PARALLEL_MIN || count == 1 {
            (0..count).for_each(body);
            return Ok(());
        }
        let panicked = AtomicBool::new(false);
        // One task a thread, and threads take pieces one by one: unequal pieces still end together, and ONNX
        // Runtime has little to hand out.
        let next = AtomicUsize::new(0);
        let threads = self.shared.threads.min(count);
        self.context.par_for(threads, threads, |_| {
            while let piece = next.fetch_add(1, Relaxed)
                && piece < count
            {
                if catch_unwind(AssertUnwindSafe(|| body(piece))).is_err() {
                    panicked.store(true, Relaxed);
                }
            }
        })?;
        if panicked.into_inner() { Err(ort::Error::new("a parallel piece panicked")) } else { Ok(()) }
    }
}

/// An output, or a buffer, that parallel pieces write: each row by one piece.
struct Out<T> {
    data: *mut T,
    rows: usize,
    columns: usize,
}

// SAFETY: pieces write disjoint rows; see `row`.
unsafe impl<T: Send> Send for Out<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Out<T> {}

impl<T> Out<T> {
    fn over(buffer: &mut [T], columns: usize) -> Self {
        Self { data: buffer.as_mut_ptr(), rows: buffer.len() / columns, columns }
    }

    /// # Safety
    /// No two live slices of the same row.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row(&self, row: usize) -> &mut [T] {
        assert!(row < self.rows);
        // SAFETY: within the buffer, by the assertion; unique, by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.columns), self.columns) }
    }
}

struct Quantized {
    quants: Out<i8>,
    scales: Out<f32>,
}

impl Quantized {
    /// # Safety
    /// As for [`Out::row`].
    #[allow(clippy::mut_from_ref)]
    unsafe fn row(&self, row: usize) -> (&mut [i8], &mut [f32]) {
        // SAFETY: passed on.
        unsafe { (self.quants.row(row), self.scales.row(row)) }
    }
}

/// Normalises and quantises every row. Inputs: rows, the norm's weights.
fn norm_quantize(call: &Call, _: &mut Scratch) -> Result<()> {
    let (rows, width, x) = call.input::<f32>(0)?;
    let (_, _, weights) = call.input::<f32>(1)?;
    let out = call.quantized(rows, width)?;
    let epsilon = call.shared.params.norm_epsilon;
    call.each(rows, 2 * width, |r| {
        // SAFETY: each piece has its own row.
        let (quants, scales) = unsafe { out.row(r) };
        rows::norm_quantize(&x[r * width..][..width], weights, epsilon, quants, scales);
    })
}

/// The same, for the rows whose logits are wanted and for nothing else.
fn sampled_norm_quantize(call: &Call, _: &mut Scratch) -> Result<()> {
    let (_, width, x) = call.input::<f32>(0)?;
    let (_, _, weights) = call.input::<f32>(1)?;
    let step = call.shared.step.read();
    let out = call.quantized(step.sampled.len(), width)?;
    let epsilon = call.shared.params.norm_epsilon;
    for (to, row) in step.sampled.iter().enumerate() {
        // SAFETY: one thread.
        let (quants, scales) = unsafe { out.row(to) };
        rows::norm_quantize(&x[*row as usize * width..][..width], weights, epsilon, quants, scales);
    }
    Ok(())
}

/// Normalises every row and adds the residual stream. Inputs: rows, the norm's weights, the residual.
fn norm_add(call: &Call, _: &mut Scratch) -> Result<()> {
    let (rows, width, x) = call.input::<f32>(0)?;
    let (_, _, weights) = call.input::<f32>(1)?;
    let (_, _, residual) = call.input::<f32>(2)?;
    let out = call.output::<f32>(0, rows, width)?;
    let epsilon = call.shared.params.norm_epsilon;
    call.each(rows, 2 * width, |r| {
        let span = r * width..(r + 1) * width;
        // SAFETY: each piece has its own row.
        let out = unsafe { out.row(r) };
        rows::norm_add(&x[span.clone()], weights, epsilon, &residual[span], out);
    })
}

fn silu_mul_quantize(call: &Call, _: &mut Scratch) -> Result<()> {
    gated(call, rows::silu_mul_quantize)
}

fn gelu_mul_quantize(call: &Call, _: &mut Scratch) -> Result<()> {
    gated(call, rows::gelu_mul_quantize)
}

fn gated(call: &Call, activate: fn(&[f32], &mut [i8], &mut [f32])) -> Result<()> {
    let (rows, both, x) = call.input::<f32>(0)?;
    let out = call.quantized(rows, both / 2)?;
    call.each(rows, 4 * both, |r| {
        // SAFETY: each piece has its own row.
        let (quants, scales) = unsafe { out.row(r) };
        activate(&x[r * both..][..both], quants, scales);
    })
}

/// Rows times a matrix, and plus a residual where there is one. Inputs: quants, scales, the packed matrix,
/// the residual.
fn linear(call: &Call, _: &mut Scratch) -> Result<()> {
    let (count, _, quants) = call.input::<i8>(0)?;
    let (_, _, scales) = call.input::<f32>(1)?;
    let (_, _, weights) = call.input::<u8>(2)?;
    let residual = if call.inputs > 3 { Some(call.input::<f32>(3)?.2) } else { None };
    let layout = &call.shared.layouts[call.index];
    let out = call.output::<f32>(0, count, layout.outputs)?;
    let rows = Rows { count, quants, scales };
    let target = Target { data: out.data, residual };
    let panels = layout.panels();
    // Pieces of some microseconds: small enough to end together, large enough to be worth taking.
    let work = count * layout.inputs * layout.outputs;
    let pieces = (work / PIECE_PRODUCTS).clamp(1, panels.min(PIECES_MAX));
    call.each(pieces, work / pieces, |piece| {
        let (from, to) = (panels * piece / pieces, panels * (piece + 1) / pieces);
        // SAFETY: pieces have different panels, and the output was made for these rows and columns.
        unsafe { layout.multiply(weights, from..to, rows, target) };
    })
}

/// Head norms where the model has them, rotary embedding, writing keys and values to their pages, attention
/// over the pages, quantisation. Inputs: the fused QKV projection, `[rows, heads + 2 * kv_heads, head_size]`,
/// then perhaps the norms' weights for queries and for keys.
fn attention(call: &Call, scratch: &mut Scratch) -> Result<()> {
    let (rows, qkv_width, projected) = call.input::<f32>(0)?;
    let layer = call.index;
    let head_norms = if call.inputs > 1 { Some((call.input::<f32>(1)?.2, call.input::<f32>(2)?.2)) } else { None };
    let Shared { step, cache, params, .. } = call.shared;
    let step = step.read();
    let window = params.window(layer);
    let angles = if window.is_some() { &call.shared.window_angles } else { &call.shared.angles };
    let rotate = match params.rope_pairs {
        RopePairs::Neighbours => rows::rotate_pairs,
        RopePairs::Halves => rows::rotate_halves,
    };
    if step.rows.len() != rows {
        return Err(ort::Error::new("the step and its tensors have different numbers of rows"));
    }
    let (size, width, kv_width) = (params.head_size, params.query_width(), params.kv_width());
    let shared_by = params.heads / params.kv_heads;
    let block_tokens = cache.shape.block_tokens;
    let quantized = call.quantized(rows, width)?;

    scratch.floats.resize(rows * qkv_width, 0.0);
    let qkv = Out::over(&mut scratch.floats, qkv_width);
    let epsilon = params.norm_epsilon;
    call.each(rows, 3 * qkv_width, |r| {
        let place = step.rows[r];
        let position = place.position as usize;
        // SAFETY: each piece has its own row, and each row its own slot of the KV pages.
        unsafe {
            let row = qkv.row(r);
            row.copy_from_slice(&projected[r * qkv_width..][..qkv_width]);
            let angles = &angles[position * size..][..size];
            let (queries, rest) = row.split_at_mut(width);
            let (keys, values) = rest.split_at_mut(kv_width);
            if let Some((query_norm, key_norm)) = head_norms {
                queries.chunks_exact_mut(size).for_each(|head| rows::norm(head, query_norm, epsilon));
                keys.chunks_exact_mut(size).for_each(|head| rows::norm(head, key_norm, epsilon));
            }
            queries.chunks_exact_mut(size).for_each(|head| rotate(head, angles, params.query_factor));
            keys.chunks_exact_mut(size).for_each(|head| rotate(head, angles, 1.0));
            let block = step.blocks_of(place.sequence)[position / block_tokens];
            let heads = keys.chunks_exact(size).zip(values.chunks_exact(size));
            for (head, (key, value)) in heads.enumerate() {
                cache.write(layer, block, head, position % block_tokens, key, value);
            }
        }
    })?;

    scratch.more_floats.resize(rows * width, 0.0);
    let mixed = Out::over(&mut scratch.more_floats, size);
    let qkv = &scratch.floats[..rows * qkv_width];
    let seen = |row: usize| {
        let to = step.rows[row].position as usize + 1;
        Span { from: to.saturating_sub(window.unwrap_or(to)), to }
    };
    let tokens = step.tiles.iter().map(|t| (seen(t.first_row), t.rows));
    let tokens: usize = tokens.map(|(span, rows)| (span.to - span.from) * rows).sum();
    let pieces = step.tiles.len() * params.kv_heads;
    call.each(pieces, tokens * width / pieces.max(1), |piece| {
        let (tile, kv_head) = (step.tiles[piece / params.kv_heads], piece % params.kv_heads);
        let blocks = step.blocks_of(step.rows[tile.first_row].sequence);
        let pages = Pages { cache, blocks, layer, kv_head };
        let count = tile.rows * shared_by;
        let mut queries = [0f32; TILE_FLOATS];
        let mut out = [0f32; TILE_FLOATS];
        let mut visible = [Span::default(); TILE_QUERIES];
        assert!(count <= TILE_QUERIES && count * size <= TILE_FLOATS);
        for i in 0..tile.rows {
            let row = tile.first_row + i;
            let from = row * qkv_width + kv_head * shared_by * size;
            let heads = shared_by * size;
            queries[i * heads..][..heads].copy_from_slice(&qkv[from..][..heads]);
            visible[i * shared_by..][..shared_by].fill(seen(row));
        }
        attend(pages, &queries[..count * size], &visible[..count], &mut out[..count * size]);
        for i in 0..count {
            let row = tile.first_row + i / shared_by;
            let head = kv_head * shared_by + i % shared_by;
            // SAFETY: this piece alone has these heads of these rows.
            unsafe { mixed.row(row * params.heads + head).copy_from_slice(&out[i * size..][..size]) };
        }
    })?;

    let mixed = &scratch.more_floats[..rows * width];
    call.each(rows, width, |r| {
        // SAFETY: each piece has its own row.
        let (quants, scales) = unsafe { quantized.row(r) };
        rows::quantize(&mixed[r * width..][..width], quants, scales);
    })
}

/// Whether attention's tiles can hold the model's heads.
pub fn fits(params: &ModelParams) -> bool {
    let queries = TILE_ROWS_MAX * (params.heads / params.kv_heads);
    queries <= TILE_QUERIES && queries * params.head_size <= TILE_FLOATS
}

/// Queries of one tile, and the numbers in them: on the stack of the thread that computes the tile.
const TILE_QUERIES: usize = 128;
const TILE_FLOATS: usize = 16 * 1024;
