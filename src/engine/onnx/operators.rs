//! Our operators, as ONNX Runtime sees them.
//!
//! A panic in a kernel would cross C++ frames and abort the process, so every kernel and every parallel
//! body runs under `catch_unwind` and becomes an error of this run.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
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
    attention::{Pages, attend},
    graph::DOMAIN,
    kv::KvCache,
    rows,
    step::{Step, TILE_ROWS_MAX},
};
use crate::model::LlamaParams;

type Result<T> = ort::Result<T>;

/// Numbers below which one thread is faster than waking another.
const PARALLEL_MIN: usize = 16 * 1024;

/// What the kernels share with the engine's thread, which changes it between runs.
pub struct Shared {
    pub step: RwLock<Step>,
    pub cache: KvCache,
    pub params: LlamaParams,
    /// Per position: cosines, then sines, `head_size / 2` of each.
    pub angles: Vec<f32>,
    pub hadamard_block: usize,
}

impl Shared {
    /// Angles of the rotary embedding for every position of the context.
    pub fn angles(params: &LlamaParams, context_tokens: usize) -> Vec<f32> {
        let pairs = params.head_size / 2;
        let mut angles = Vec::with_capacity(context_tokens * params.head_size);
        for position in 0..context_tokens {
            let angle = |pair: usize| {
                let exponent = -2.0 * pair as f64 / params.head_size as f64;
                position as f64 * f64::from(params.rope_base).powf(exponent)
            };
            angles.extend((0..pairs).map(|pair| angle(pair).cos() as f32));
            angles.extend((0..pairs).map(|pair| angle(pair).sin() as f32));
        }
        angles
    }
}

pub fn domain(shared: &Arc<Shared>) -> Result<OperatorDomain> {
    use TensorElementType::{Float32, Int32, Uint8};
    let op = |name, inputs: &[TensorElementType], outputs: &[TensorElementType], kernel| Op {
        name,
        inputs: inputs.to_vec(),
        outputs: outputs.to_vec(),
        shared: Arc::clone(shared),
        kernel,
    };
    OperatorDomain::new(DOMAIN)?
        .add(op("NormQuantize", &[Float32], &[Uint8, Float32], norm_quantize))?
        .add(op("Attention", &[Int32, Float32, Float32], &[Uint8, Float32], attention))?
        .add(op("AddNormQuantize", &[Float32, Int32, Float32, Float32], &[Float32, Uint8, Float32], add_norm_quantize))?
        .add(op("SampledNormQuantize", &[Float32, Int32, Float32, Float32], &[Uint8, Float32], sampled_norm_quantize))?
        .add(op("SiluMulQuantize", &[Int32, Float32, Float32], &[Uint8, Float32], silu_mul_quantize))?
        .add(op("Dequantize", &[Int32, Float32, Float32], &[Float32], dequantize))
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
    layer: usize,
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
        let layer = attributes.get::<i64>("layer").unwrap_or(0) as usize;
        Ok(Box::new(Guarded {
            name: self.name,
            shared: Arc::clone(&self.shared),
            layer,
            kernel: self.kernel,
            scratch: Scratch::default(),
        }))
    }
}

struct Guarded {
    name: &'static str,
    shared: Arc<Shared>,
    layer: usize,
    kernel: fn(&Call, &mut Scratch) -> Result<()>,
    scratch: Scratch,
}

impl Kernel for Guarded {
    fn compute(&mut self, context: &ComputeContext) -> Result<()> {
        let Self { shared, layer, kernel, scratch, .. } = self;
        let call = Call { context, shared, layer: *layer };
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

    /// Runs `body` for each of `count` pieces of `cost` numbers each, on ONNX Runtime's threads if it pays.
    fn each(&self, count: usize, cost: usize, body: impl Fn(usize) + Sync + Send) -> Result<()> {
        if count * cost < PARALLEL_MIN || count == 1 {
            (0..count).for_each(body);
            return Ok(());
        }
        let panicked = AtomicBool::new(false);
        // As many batches as pieces: threads take them one by one, so unequal pieces still end together.
        self.context.par_for(count, count, |piece| {
            if catch_unwind(AssertUnwindSafe(|| body(piece))).is_err() {
                panicked.store(true, Relaxed);
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

    /// # Safety
    /// As for `row`.
    unsafe fn set(&self, row: usize, value: T) {
        // SAFETY: passed on.
        unsafe { self.row(row)[0] = value };
    }
}

fn norm_quantize(call: &Call, _: &mut Scratch) -> Result<()> {
    let (rows, width, x) = call.input::<f32>(0)?;
    let quants = call.output::<u8>(0, rows, width)?;
    let scales = call.output::<f32>(1, rows, 1)?;
    let epsilon = call.shared.params.norm_epsilon;
    call.each(rows, width, |r| {
        // SAFETY: each piece has its own row.
        unsafe { scales.set(r, rows::norm_quantize(&x[r * width..][..width], epsilon, quants.row(r))) }
    })
}

/// The residual stream plus a projection, and the next matrix's input.
fn add_norm_quantize(call: &Call, _: &mut Scratch) -> Result<()> {
    let (rows, width, x) = call.input::<f32>(0)?;
    let (_, _, products) = call.input::<i32>(1)?;
    let (_, _, row_scales) = call.input::<f32>(2)?;
    let (_, _, scales) = call.input::<f32>(3)?;
    let sum = call.output::<f32>(0, rows, width)?;
    let quants = call.output::<u8>(1, rows, width)?;
    let quant_scales = call.output::<f32>(2, rows, 1)?;
    let epsilon = call.shared.params.norm_epsilon;
    call.each(rows, 2 * width, |r| {
        let span = r * width..(r + 1) * width;
        // SAFETY: each piece has its own row.
        unsafe {
            let sum = sum.row(r);
            rows::dequantize_add(&products[span.clone()], row_scales[r], scales, &x[span], sum);
            quant_scales.set(r, rows::norm_quantize(sum, epsilon, quants.row(r)));
        }
    })
}

/// The same, for the rows whose logits are wanted and for nothing else.
fn sampled_norm_quantize(call: &Call, scratch: &mut Scratch) -> Result<()> {
    let (_, width, x) = call.input::<f32>(0)?;
    let (_, _, products) = call.input::<i32>(1)?;
    let (_, _, row_scales) = call.input::<f32>(2)?;
    let (_, _, scales) = call.input::<f32>(3)?;
    let step = call.shared.step.read();
    let quants = call.output::<u8>(0, step.sampled.len(), width)?;
    let quant_scales = call.output::<f32>(1, step.sampled.len(), 1)?;
    scratch.floats.resize(width, 0.0);
    for (out, row) in step.sampled.iter().enumerate() {
        let r = *row as usize;
        let span = r * width..(r + 1) * width;
        rows::dequantize_add(&products[span.clone()], row_scales[r], scales, &x[span], &mut scratch.floats);
        let epsilon = call.shared.params.norm_epsilon;
        // SAFETY: one thread.
        unsafe { quant_scales.set(out, rows::norm_quantize(&scratch.floats, epsilon, quants.row(out))) };
    }
    Ok(())
}

fn silu_mul_quantize(call: &Call, scratch: &mut Scratch) -> Result<()> {
    let (rows, both, products) = call.input::<i32>(0)?;
    let (_, _, row_scales) = call.input::<f32>(1)?;
    let (_, _, scales) = call.input::<f32>(2)?;
    let width = both / 2;
    let quants = call.output::<u8>(0, rows, width)?;
    let quant_scales = call.output::<f32>(1, rows, 1)?;
    scratch.floats.resize(rows * width, 0.0);
    let buffer = Out::over(&mut scratch.floats, width);
    let block = call.shared.hadamard_block;
    call.each(rows, 8 * width, |r| {
        let products = &products[r * both..][..both];
        // SAFETY: each piece has its own row.
        unsafe {
            let scale = rows::silu_mul_quantize(products, row_scales[r], scales, block, buffer.row(r), quants.row(r));
            quant_scales.set(r, scale);
        }
    })
}

fn dequantize(call: &Call, _: &mut Scratch) -> Result<()> {
    let (rows, width, products) = call.input::<i32>(0)?;
    let (_, _, row_scales) = call.input::<f32>(1)?;
    let (_, _, scales) = call.input::<f32>(2)?;
    let out = call.output::<f32>(0, rows, width)?;
    call.each(rows, width, |r| {
        // SAFETY: each piece has its own row.
        unsafe { rows::dequantize(&products[r * width..][..width], row_scales[r], scales, out.row(r)) }
    })
}

/// Rotary embedding, writing keys and values to their pages, attention over the pages, quantisation.
/// Input: the integer products of the fused QKV projection, `[rows, heads + 2 * kv_heads, head_size]`.
fn attention(call: &Call, scratch: &mut Scratch) -> Result<()> {
    let (rows, qkv_width, products) = call.input::<i32>(0)?;
    let (_, _, row_scales) = call.input::<f32>(1)?;
    let (_, _, scales) = call.input::<f32>(2)?;
    let layer = call.layer;
    let Shared { step, cache, params, angles, .. } = call.shared;
    let step = step.read();
    if step.rows.len() != rows {
        return Err(ort::Error::new("the step and its tensors have different numbers of rows"));
    }
    let (size, width, kv_width) = (params.head_size, params.width, params.kv_width());
    let shared_by = params.heads / params.kv_heads;
    let block_tokens = cache.shape.block_tokens;
    let quants = call.output::<u8>(0, rows, width)?;
    let quant_scales = call.output::<f32>(1, rows, 1)?;

    scratch.floats.resize(rows * qkv_width, 0.0);
    let qkv = Out::over(&mut scratch.floats, qkv_width);
    let query_factor = 1.0 / (size as f32).sqrt();
    call.each(rows, 3 * qkv_width, |r| {
        let place = step.rows[r];
        let position = place.position as usize;
        // SAFETY: each piece has its own row, and each row its own slot of the KV pages.
        unsafe {
            let row = qkv.row(r);
            rows::dequantize(&products[r * qkv_width..][..qkv_width], row_scales[r], scales, row);
            let angles = &angles[position * size..][..size];
            let (queries, rest) = row.split_at_mut(width);
            let (keys, values) = rest.split_at_mut(kv_width);
            queries.chunks_exact_mut(size).for_each(|head| rows::rotate_pairs(head, angles, query_factor));
            keys.chunks_exact_mut(size).for_each(|head| rows::rotate_pairs(head, angles, 1.0));
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
    let tokens: usize = step.tiles.iter().map(|t| step.rows[t.first_row].position as usize * t.rows).sum();
    let pieces = step.tiles.len() * params.kv_heads;
    call.each(pieces, tokens * width / pieces.max(1), |piece| {
        let (tile, kv_head) = (step.tiles[piece / params.kv_heads], piece % params.kv_heads);
        let blocks = step.blocks_of(step.rows[tile.first_row].sequence);
        let pages = Pages { cache, blocks, layer, kv_head };
        let count = tile.rows * shared_by;
        let mut queries = [0f32; TILE_FLOATS];
        let mut out = [0f32; TILE_FLOATS];
        let mut visible = [0usize; TILE_QUERIES];
        assert!(count <= TILE_QUERIES && count * size <= TILE_FLOATS);
        for i in 0..tile.rows {
            let row = tile.first_row + i;
            let from = row * qkv_width + kv_head * shared_by * size;
            let heads = shared_by * size;
            queries[i * heads..][..heads].copy_from_slice(&qkv[from..][..heads]);
            visible[i * shared_by..][..shared_by].fill(step.rows[row].position as usize + 1);
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
        unsafe { quant_scales.set(r, rows::quantize(&mixed[r * width..][..width], quants.row(r))) }
    })
}

/// Whether attention's tiles can hold the model's heads.
pub fn fits(params: &LlamaParams) -> bool {
    let queries = TILE_ROWS_MAX * (params.heads / params.kv_heads);
    queries <= TILE_QUERIES && queries * params.head_size <= TILE_FLOATS
}

/// Queries of one tile, and the numbers in them: on the stack of the thread that computes the tile.
const TILE_QUERIES: usize = 128;
const TILE_FLOATS: usize = 16 * 1024;
