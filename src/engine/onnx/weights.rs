//! GGUF tensors to the weights that our graph multiplies with: norms folded in, rotated, one int8 scale per
//! output channel, `[inputs, outputs]` as ONNX wants them.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use parking_lot::Mutex;

use super::rotation::{Rotation, hadamard_blocks, power_of_two_divisor};
use crate::model::{GgufError, LlamaParams, ModelFile};

/// Length of the Hadamard blocks in front of `down`.
pub fn ffn_hadamard(params: &LlamaParams) -> usize {
    power_of_two_divisor(params.ffn_width, 64)
}

/// Length of the Hadamard blocks within a value head.
fn head_hadamard(params: &LlamaParams) -> usize {
    power_of_two_divisor(params.head_size, 64)
}

/// One matrix, quantised per output channel: `weight[k][n] = quants[k * outputs + n] * scales[n]`.
pub struct Linear {
    pub name: String,
    pub inputs: usize,
    pub outputs: usize,
    /// Two's complement for `QuantType::I8`, around 128 for `QuantType::U8`.
    pub quants: Vec<u8>,
    pub scales: Vec<f32>,
}

/// How the bytes of a matrix are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantType {
    U8,
    I8,
}

/// All matrices of the model, in the order of the graph.
pub fn load(file: &ModelFile, rotation: &Rotation, ty: QuantType) -> Result<Vec<Linear>, GgufError> {
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
                    let built = if n == 0 {
                        head(file, rotation, ty).map(|head| (layers, vec![head]))
                    } else {
                        layer(file, rotation, ty, n - 1).map(|linears| (n - 1, linears))
                    };
                    let (at, result) = match built {
                        Ok((at, linears)) => (at, Ok(linears)),
                        Err(e) => (n, Err(e)),
                    };
                    done.lock().push((at, result));
                }
            });
        }
    });
    let mut done = done.into_inner();
    done.sort_by_key(|(at, _)| *at);
    let mut all = Vec::with_capacity(layers * 4 + 1);
    for (_, linears) in done {
        all.extend(linears?);
    }
    Ok(all)
}

/// Name of the tensor with the output matrix: its own, or the embedding where the model ties them.
pub fn head_tensor(file: &ModelFile) -> &'static str {
    if file.gguf.has_tensor("output.weight") { "output.weight" } else { "token_embd.weight" }
}

/// A matrix as the file has it, `[outputs, inputs]`.
pub struct Dense {
    pub inputs: usize,
    pub outputs: usize,
    pub rows: Vec<f32>,
}

pub fn dense(file: &ModelFile, name: &str, inputs: usize, outputs: usize) -> Result<Dense, GgufError> {
    let found = &file.gguf.tensor(name)?.dims;
    let expected = [inputs as u64, outputs as u64];
    if *found != expected {
        return Err(GgufError::WrongShape { name: name.into(), found: found.clone(), expected: expected.into() });
    }
    Ok(Dense { inputs, outputs, rows: file.gguf.dequantize(name)? })
}

pub fn norm(file: &ModelFile, name: &str) -> Result<Vec<f32>, GgufError> {
    let width = file.params.width as u64;
    let found = &file.gguf.tensor(name)?.dims;
    if *found != [width] {
        return Err(GgufError::WrongShape { name: name.into(), found: found.clone(), expected: vec![width] });
    }
    file.gguf.dequantize(name)
}

impl Dense {
    /// Matrices with the same inputs, one below the other.
    fn stack(parts: Vec<Self>) -> Self {
        let inputs = parts[0].inputs;
        let outputs = parts.iter().map(|p| p.outputs).sum();
        Self { inputs, outputs, rows: parts.into_iter().flat_map(|p| p.rows).collect() }
    }

    /// For inputs that were normalised with weights `norm` and now come without, and rotated.
    fn read_from_residual(&mut self, norm: &[f32], rotation: &Rotation) {
        let mut scratch = Vec::new();
        for row in self.rows.chunks_exact_mut(self.inputs) {
            row.iter_mut().zip(norm).for_each(|(w, n)| *w *= n);
            rotation.apply(row, &mut scratch);
        }
    }

    /// For outputs that are added to the rotated residual stream.
    fn write_to_residual(&mut self, rotation: &Rotation) {
        let mut scratch = Vec::new();
        self.each_column(|column| rotation.apply(column, &mut scratch));
    }

    fn each_column(&mut self, mut change: impl FnMut(&mut [f32])) {
        let mut column = vec![0.0; self.outputs];
        for k in 0..self.inputs {
            for (n, x) in column.iter_mut().enumerate() {
                *x = self.rows[n * self.inputs + k];
            }
            change(&mut column);
            for (n, x) in column.iter().enumerate() {
                self.rows[n * self.inputs + k] = *x;
            }
        }
    }

    fn quantize(self, name: String, ty: QuantType) -> Linear {
        let Self { inputs, outputs, rows } = self;
        let mut quants = vec![0; inputs * outputs];
        let zero_point = if ty == QuantType::U8 { 128 } else { 0 };
        let mut scales = Vec::with_capacity(outputs);
        // A tile of channels at a time, so that the transposed writes stay in the cache.
        for (tile, rows) in rows.chunks(inputs * 64).enumerate() {
            let mut tile_quants = Vec::with_capacity(rows.len());
            for row in rows.chunks_exact(inputs) {
                let largest = row.iter().fold(0f32, |a, w| a.max(w.abs()));
                let scale = largest.max(f32::MIN_POSITIVE * 127.0) / 127.0;
                tile_quants.extend(row.iter().map(|w| ((w / scale).round() as i32 + zero_point) as u8));
                scales.push(scale);
            }
            let channels = rows.len() / inputs;
            for k in 0..inputs {
                let out = &mut quants[k * outputs + tile * 64..][..channels];
                for (n, q) in out.iter_mut().enumerate() {
                    *q = tile_quants[n * inputs + k];
                }
            }
        }
        Linear { name, inputs, outputs, quants, scales }
    }
}

fn layer(file: &ModelFile, rotation: &Rotation, ty: QuantType, layer: usize) -> Result<Vec<Linear>, GgufError> {
    let p = &file.params;
    let tensor = |name: &str, inputs, outputs| dense(file, &format!("blk.{layer}.{name}.weight"), inputs, outputs);
    let attention_norm = norm(file, &format!("blk.{layer}.attn_norm.weight"))?;
    let ffn_norm = norm(file, &format!("blk.{layer}.ffn_norm.weight"))?;

    // Values are rotated within each head, and the output projection undoes it: the rotation passes
    // through attention, which only mixes values of the same channel.
    let mut v = tensor("attn_v", p.width, p.kv_width())?;
    v.each_column(|column| hadamard_blocks(column, head_hadamard(p)));
    let mut qkv = Dense::stack(vec![tensor("attn_q", p.width, p.width)?, tensor("attn_k", p.width, p.kv_width())?, v]);
    qkv.read_from_residual(&attention_norm, rotation);

    let mut output = tensor("attn_output", p.width, p.width)?;
    hadamard_blocks(&mut output.rows, head_hadamard(p));
    output.write_to_residual(rotation);

    let mut gate_up =
        Dense::stack(vec![tensor("ffn_gate", p.width, p.ffn_width)?, tensor("ffn_up", p.width, p.ffn_width)?]);
    gate_up.read_from_residual(&ffn_norm, rotation);

    let mut down = tensor("ffn_down", p.ffn_width, p.width)?;
    hadamard_blocks(&mut down.rows, ffn_hadamard(p));
    down.write_to_residual(rotation);

    let name = |part: &str| format!("l{layer}.{part}");
    Ok(vec![
        qkv.quantize(name("qkv"), ty),
        output.quantize(name("o"), ty),
        gate_up.quantize(name("gate_up"), ty),
        down.quantize(name("down"), ty),
    ])
}

fn head(file: &ModelFile, rotation: &Rotation, ty: QuantType) -> Result<Linear, GgufError> {
    let p = &file.params;
    let mut head = dense(file, head_tensor(file), p.width, p.vocabulary)?;
    head.read_from_residual(&norm(file, "output_norm.weight")?, rotation);
    Ok(head.quantize("head".into(), ty))
}
