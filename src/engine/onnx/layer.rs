//! What one layer computes, and the head: the arithmetic between the tensors of our operators.
//!
//! Promises that a row's results depend on that row and its sequence's keys and values alone: every sum has
//! its fixed order, whichever threads compute which pieces. The last layer computes, beside keys and values,
//! only the rows whose logits are wanted.

use std::{marker::PhantomData, ops::Range};

use super::{
    attention::{Pages, Span, attend},
    kv::KvCache,
    linear::{Layout, Rows, Target},
    rows,
    step::{Step, Tile},
    team::Member,
};
use crate::model::{Activation, BLOCK, ModelParams, RopePairs};

/// Products of codes and quants in one piece of a matrix product, about.
const PIECE_PRODUCTS: usize = 64 * 1024;
/// Pieces of one matrix product, at most.
const PIECES_MAX: usize = 64;
/// Rows that a thread takes at once where little is done to each.
const ROWS_A_PIECE: usize = 4;

/// What the time of a step goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Part {
    Norm,
    Qkv,
    Rotate,
    Attention,
    Output,
    GateUp,
    Down,
    Head,
}

impl Part {
    pub const ALL: [Self; 8] =
        [Self::Norm, Self::Qkv, Self::Rotate, Self::Attention, Self::Output, Self::GateUp, Self::Down, Self::Head];
}

#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub layout: &'a Layout,
    pub bytes: &'a [u8],
}

pub struct LayerWeights<'a> {
    pub index: usize,
    pub qkv: Matrix<'a>,
    pub output: Matrix<'a>,
    pub gate_up: Matrix<'a>,
    pub down: Matrix<'a>,
    pub attention_norm: &'a [f32],
    pub ffn_norm: &'a [f32],
    /// Of queries and of keys.
    pub head_norms: Option<[&'a [f32]; 2]>,
    /// Of what attention and what the feed-forward adds to the stream.
    pub post_norms: Option<[&'a [f32]; 2]>,
}

/// What a layer reads beside weights.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    pub params: &'a ModelParams,
    pub step: &'a Step,
    pub cache: &'a KvCache,
    /// Per position of the context: cosines, then sines, `head_size / 2` of each.
    pub angles: &'a [f32],
}

/// Whether what a piece computes are whole blocks, which it can quantise by itself.
pub fn fits(params: &ModelParams) -> bool {
    let group = params.heads / params.kv_heads;
    (group * params.head_size).is_multiple_of(BLOCK) && params.ffn_width.is_multiple_of(BLOCK)
}

/// Buffers between the phases of a layer; one set serves all layers.
#[derive(Default)]
pub struct Scratch {
    normed: Quants,
    qkv: Vec<f32>,
    residual: Vec<f32>,
    mixed: Quants,
    sums: Vec<f32>,
    attended: Vec<f32>,
    ffn_normed: Quants,
    hidden: Quants,
}

#[derive(Default)]
struct Quants {
    quants: Vec<i8>,
    scales: Vec<f32>,
}

/// Rows that the threads of a team write in one phase, each number by one of them, and read in later ones.
pub struct Table<'a, T> {
    data: *mut T,
    rows: usize,
    columns: usize,
    lives: PhantomData<&'a mut [T]>,
}

// SAFETY: what threads write is disjoint; see `part`.
unsafe impl<T: Send + Sync> Sync for Table<'_, T> {}

impl<'a, T: Clone + Default> Table<'a, T> {
    /// As much of a buffer as is needed.
    fn over(buffer: &'a mut Vec<T>, rows: usize, columns: usize) -> Self {
        buffer.resize(rows * columns, T::default());
        Self::of(buffer, columns)
    }
}

impl<'a, T> Table<'a, T> {
    pub fn of(data: &'a mut [T], columns: usize) -> Self {
        Self { rows: data.len() / columns, data: data.as_mut_ptr(), columns, lives: PhantomData }
    }

    /// # Safety
    /// Nobody else uses these numbers meanwhile.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, row: usize, columns: Range<usize>) -> &mut [T] {
        assert!(row < self.rows && columns.start <= columns.end && columns.end <= self.columns);
        // SAFETY: within the table, by the assertion; unique, by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.columns + columns.start), columns.len()) }
    }

    /// # Safety
    /// As for [`Table::part`].
    #[allow(clippy::mut_from_ref)]
    unsafe fn row(&self, row: usize) -> &mut [T] {
        // SAFETY: passed on.
        unsafe { self.part(row, 0..self.columns) }
    }

    /// # Safety
    /// The phase that wrote them is over.
    unsafe fn all(&self) -> &[T] {
        // SAFETY: the table's own numbers, which nobody writes any more.
        unsafe { std::slice::from_raw_parts(self.data, self.rows * self.columns) }
    }
}

/// Quantised rows: quants, and two numbers a block.
struct QuantTable<'a> {
    quants: Table<'a, i8>,
    scales: Table<'a, f32>,
}

impl<'a> QuantTable<'a> {
    fn over(buffer: &'a mut Quants, rows: usize, columns: usize) -> Self {
        let scales = Table::over(&mut buffer.scales, rows, columns / BLOCK * 2);
        Self { quants: Table::over(&mut buffer.quants, rows, columns), scales }
    }

    /// # Safety
    /// As for [`Table::part`]; `columns` are whole blocks.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, row: usize, columns: Range<usize>) -> (&mut [i8], &mut [f32]) {
        let scales = columns.start / BLOCK * 2..columns.end / BLOCK * 2;
        // SAFETY: passed on.
        unsafe { (self.quants.part(row, columns), self.scales.part(row, scales)) }
    }

    /// # Safety
    /// As for [`Table::all`].
    unsafe fn rows(&self) -> Rows<'_> {
        // SAFETY: passed on.
        unsafe { Rows { count: self.quants.rows, quants: self.quants.all(), scales: self.scales.all() } }
    }
}

/// One layer of one step, ready to be computed by a team.
pub struct Layer<'a> {
    weights: LayerWeights<'a>,
    around: Surroundings<'a>,
    /// `[rows, width]`
    x: &'a [f32],
    is_last: bool,
    tiles: &'a [Tile],
    normed: QuantTable<'a>,
    qkv: Table<'a, f32>,
    /// The stream's rows that go on, where these are not all.
    residual: Table<'a, f32>,
    mixed: QuantTable<'a>,
    /// Products before they are normalised, in models that do that.
    sums: Table<'a, f32>,
    attended: Table<'a, f32>,
    ffn_normed: QuantTable<'a>,
    hidden: QuantTable<'a>,
    out: Table<'a, f32>,
}

impl<'a> Layer<'a> {
    /// Rows that layer `index` gives for a step.
    pub fn rows_out(params: &ModelParams, step: &Step, index: usize) -> usize {
        if index + 1 == params.layers { step.sampled.len() } else { step.rows.len() }
    }

    /// `x` has the step's rows, `out` those of [`Layer::rows_out`].
    ///
    /// # Panics
    /// If they have others.
    pub fn new(
        weights: LayerWeights<'a>,
        around: Surroundings<'a>,
        x: &'a [f32],
        out: &'a mut [f32],
        scratch: &'a mut Scratch,
    ) -> Self {
        let Surroundings { params, step, .. } = around;
        let (rows, width) = (step.rows.len(), params.width);
        let kept = Self::rows_out(params, step, weights.index);
        let is_last = weights.index + 1 == params.layers;
        assert!(x.len() == rows * width && out.len() == kept * width);
        Self {
            x,
            is_last,
            tiles: if is_last { &step.sampled_tiles } else { &step.tiles },
            normed: QuantTable::over(&mut scratch.normed, rows, width),
            qkv: Table::over(&mut scratch.qkv, rows, weights.qkv.layout.outputs),
            residual: Table::over(&mut scratch.residual, if is_last { kept } else { 0 }, width),
            mixed: QuantTable::over(&mut scratch.mixed, kept, params.query_width()),
            sums: Table::over(&mut scratch.sums, if params.has_post_norms { kept } else { 0 }, width),
            attended: Table::over(&mut scratch.attended, kept, width),
            ffn_normed: QuantTable::over(&mut scratch.ffn_normed, kept, width),
            hidden: QuantTable::over(&mut scratch.hidden, kept, params.ffn_width),
            out: Table::of(out, width),
            weights,
            around,
        }
    }

    /// Computes the layer as one of a team; all members call this on the same layer.
    pub fn compute(&self, team: &Member) {
        let Self { weights, around, .. } = self;
        let width = around.params.width;
        let epsilon = around.params.norm_epsilon;
        let kept = self.attended.rows;
        // SAFETY, of all that follows: each piece of a phase has rows, columns, heads or panels of its own, and
        // what a phase reads was written in phases before it.
        each_row(team, Part::Norm, self.normed.quants.rows, |row| {
            let (quants, scales) = unsafe { self.normed.part(row, 0..width) };
            rows::norm_quantize(&self.x[row * width..][..width], weights.attention_norm, epsilon, quants, scales);
        });
        product(team, Part::Qkv, weights.qkv, &self.normed, &self.qkv, None);
        each_row(team, Part::Rotate, self.qkv.rows.max(kept), |row| self.place(row));
        team.each(Part::Attention as usize, self.tiles.len() * around.params.kv_heads, |piece| {
            self.attend(self.tiles[piece / around.params.kv_heads], piece % around.params.kv_heads);
        });
        let residual = if self.is_last { unsafe { self.residual.all() } } else { self.x };
        if let Some([norm, _]) = weights.post_norms {
            product(team, Part::Output, weights.output, &self.mixed, &self.sums, None);
            each_row(team, Part::Norm, kept, |row| {
                let span = row * width..(row + 1) * width;
                let out = unsafe { self.attended.row(row) };
                rows::norm_add(unsafe { &self.sums.all()[span.clone()] }, norm, epsilon, &residual[span], out);
                self.normalise_for_ffn(row, out);
            });
        } else {
            product(team, Part::Output, weights.output, &self.mixed, &self.attended, Some(residual));
            each_row(team, Part::Norm, kept, |row| {
                self.normalise_for_ffn(row, unsafe { &self.attended.all()[row * width..][..width] });
            });
        }
        self.gate_and_up(team);
        let attended = unsafe { self.attended.all() };
        if let Some([_, norm]) = weights.post_norms {
            product(team, Part::Down, weights.down, &self.hidden, &self.sums, None);
            each_row(team, Part::Norm, kept, |row| {
                let span = row * width..(row + 1) * width;
                let (sums, out) = unsafe { (&self.sums.all()[span.clone()], self.out.row(row)) };
                rows::norm_add(sums, norm, epsilon, &attended[span], out);
            });
        } else {
            product(team, Part::Down, weights.down, &self.hidden, &self.out, Some(attended));
        }
    }

    fn normalise_for_ffn(&self, row: usize, attended: &[f32]) {
        let params = self.around.params;
        // SAFETY: each row is one piece's.
        let (quants, scales) = unsafe { self.ffn_normed.part(row, 0..params.width) };
        rows::norm_quantize(attended, self.weights.ffn_norm, params.norm_epsilon, quants, scales);
    }

    /// Head norms where the model has them, rotary embedding, and the row's keys and values to their pages.
    /// Beside it, the stream's row `row` of those that go on.
    fn place(&self, row: usize) {
        let Surroundings { params, step, cache, angles } = self.around;
        if self.is_last && row < self.residual.rows {
            let from = step.sampled[row] as usize * params.width;
            // SAFETY: each row is one piece's.
            unsafe { self.residual.row(row) }.copy_from_slice(&self.x[from..][..params.width]);
        }
        if row >= self.qkv.rows {
            return;
        }
        let (size, layer) = (params.head_size, self.weights.index);
        let block_tokens = cache.shape.block_tokens;
        let rotate = match params.rope_pairs {
            RopePairs::Neighbours => rows::rotate_pairs,
            RopePairs::Halves => rows::rotate_halves,
        };
        let place = step.rows[row];
        let position = place.position as usize;
        let angles = &angles[position * size..][..size];
        // SAFETY: each row is one piece's.
        let (queries, rest) = unsafe { self.qkv.row(row) }.split_at_mut(params.query_width());
        let (keys, values) = rest.split_at_mut(params.kv_width());
        if let Some([query_norm, key_norm]) = self.weights.head_norms {
            queries.chunks_exact_mut(size).for_each(|head| rows::norm(head, query_norm, params.norm_epsilon));
            keys.chunks_exact_mut(size).for_each(|head| rows::norm(head, key_norm, params.norm_epsilon));
        }
        queries.chunks_exact_mut(size).for_each(|head| rotate(head, angles, params.query_factor));
        keys.chunks_exact_mut(size).for_each(|head| rotate(head, angles, 1.0));
        let block = step.blocks_of(place.sequence)[position / block_tokens];
        for (head, (key, value)) in keys.chunks_exact(size).zip(values.chunks_exact(size)).enumerate() {
            // SAFETY: each row has its own slot of the pages, which nobody reads before this phase is over.
            unsafe { cache.write(layer, block, head, position % block_tokens, key, value) };
        }
    }

    /// The heads of one KV head, for the rows of one tile, quantised.
    fn attend(&self, tile: Tile, kv_head: usize) {
        let Surroundings { params, step, cache, .. } = self.around;
        let (size, layer) = (params.head_size, self.weights.index);
        let group = params.heads / params.kv_heads;
        let columns = kv_head * group * size..(kv_head + 1) * group * size;
        let blocks = step.blocks_of(step.rows[tile.first_row].sequence);
        let window = params.window(layer);
        // SAFETY: the phase that wrote it is over.
        let qkv = unsafe { self.qkv.all() };
        let mut queries = Vec::with_capacity(tile.rows * columns.len());
        let mut visible = Vec::with_capacity(tile.rows * group);
        for row in tile.first_row..tile.first_row + tile.rows {
            let to = step.rows[row].position as usize + 1;
            visible.extend(std::iter::repeat_n(Span { from: to.saturating_sub(window.unwrap_or(to)), to }, group));
            queries.extend_from_slice(&qkv[row * self.qkv.columns..][columns.clone()]);
        }
        let mut out = vec![0.0; queries.len()];
        attend(Pages { cache, blocks, layer, kv_head }, &queries, &visible, &mut out);
        for (i, mixed) in out.chunks_exact(columns.len()).enumerate() {
            // SAFETY: this piece alone has these heads of these rows.
            let (quants, scales) = unsafe { self.mixed.part(tile.to + i, columns.clone()) };
            rows::quantize(mixed, quants, scales);
        }
    }

    /// Gate and up side by side, so that what a piece computes is at once what the next product reads.
    fn gate_and_up(&self, team: &Member) {
        let Matrix { layout, bytes } = self.weights.gate_up;
        let activate = match self.around.params.activation {
            Activation::Silu => rows::silu_mul_quantize,
            Activation::Gelu => rows::gelu_mul_quantize,
        };
        // SAFETY: the phase that wrote them is over.
        let rows = unsafe { self.ffn_normed.rows() };
        let blocks = layout.outputs / 2 / BLOCK;
        let pieces = pieces(layout, rows.count, blocks);
        team.each(Part::GateUp as usize, pieces, |piece| {
            let blocks = blocks * piece / pieces..blocks * (piece + 1) / pieces;
            layout.multiply_pairs(bytes, blocks, rows, |row, block, both| {
                // SAFETY: each block of columns is one piece's.
                let (quants, scales) = unsafe { self.hidden.part(row, block * BLOCK..(block + 1) * BLOCK) };
                activate(both, quants, scales);
            });
        });
    }
}

/// Logits of normalised rows. `out` is `[rows, vocabulary]`, `scratch` nobody else's.
pub struct Head<'a> {
    x: &'a [f32],
    norm: &'a [f32],
    epsilon: f32,
    matrix: Matrix<'a>,
    normed: QuantTable<'a>,
    out: Table<'a, f32>,
}

impl<'a> Head<'a> {
    pub fn new(
        params: &ModelParams,
        matrix: Matrix<'a>,
        norm: &'a [f32],
        x: &'a [f32],
        out: &'a mut [f32],
        scratch: &'a mut Scratch,
    ) -> Self {
        let rows = x.len() / params.width;
        let normed = QuantTable::over(&mut scratch.ffn_normed, rows, params.width);
        assert!(out.len() == rows * matrix.layout.outputs);
        Self { x, norm, epsilon: params.norm_epsilon, normed, out: Table::of(out, matrix.layout.outputs), matrix }
    }

    pub fn compute(&self, team: &Member) {
        let width = self.normed.quants.columns;
        each_row(team, Part::Norm, self.normed.quants.rows, |row| {
            // SAFETY: each row is one piece's.
            let (quants, scales) = unsafe { self.normed.part(row, 0..width) };
            rows::norm_quantize(&self.x[row * width..][..width], self.norm, self.epsilon, quants, scales);
        });
        product(team, Part::Head, self.matrix, &self.normed, &self.out, None);
    }
}

fn each_row(team: &Member, part: Part, rows: usize, body: impl Fn(usize)) {
    team.each(part as usize, rows.div_ceil(ROWS_A_PIECE), |piece| {
        (piece * ROWS_A_PIECE..rows.min((piece + 1) * ROWS_A_PIECE)).for_each(&body);
    });
}

/// Pieces of a product of some rows that can be cut in `units`: small enough to end together, large enough to
/// be worth taking.
fn pieces(layout: &Layout, rows: usize, units: usize) -> usize {
    if rows == 0 {
        return 0;
    }
    (rows * layout.inputs * layout.outputs / PIECE_PRODUCTS).clamp(1, units.min(PIECES_MAX))
}

/// A phase: `out = from · matrix`, and plus a residual of the same shape. `from` is of a phase before.
fn product(team: &Member, part: Part, matrix: Matrix, from: &QuantTable, out: &Table<f32>, residual: Option<&[f32]>) {
    let Matrix { layout, bytes } = matrix;
    // SAFETY: the phase that wrote them is over.
    let rows = unsafe { from.rows() };
    assert!(out.rows == rows.count && out.columns == layout.outputs);
    let target = Target { data: out.data, residual };
    let panels = layout.panels();
    let pieces = pieces(layout, rows.count, panels);
    team.each(part as usize, pieces, |piece| {
        let panels = panels * piece / pieces..panels * (piece + 1) / pieces;
        // SAFETY: pieces have different panels, and the table is as large as the assertion says.
        unsafe { layout.multiply(bytes, panels, rows, target) };
    });
}
