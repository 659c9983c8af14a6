//! What the nodes of a Llama say: read from the logits back to the embeddings, layer by layer.

use std::collections::BTreeMap;

use super::{
    config::Config,
    data::Type,
    graph::{Graph, Node, wrong},
    matrix::{Blocks, Matrix, Stored},
    rotary,
};
use crate::model::{Activation, ModelError, ModelParams, RopePairs};

const NORM: &str = "SimplifiedLayerNormalization";
const SKIP_NORM: &str = "com.microsoft.SkipSimplifiedLayerNormalization";
const NBITS: &str = "com.microsoft.MatMulNBits";
const ATTENTION: &str = "com.microsoft.GroupQueryAttention";
const GATHER_NBITS: &str = "com.microsoft.GatherBlockQuantized";
/// The output of a norm with a skip that is the sum of its inputs.
const SUM: usize = 3;
const INT32: i64 = 6;
/// No side of a matrix is longer.
const SIDE_MAX: i64 = 1 << 26;
const BLOCK_MAX: i64 = 1 << 12;

/// Sizes and constants, and the tensors by their names in GGUF.
pub fn read(graph: &Graph, config: &Config) -> Result<(ModelParams, BTreeMap<String, Matrix>), ModelError> {
    let mut walk = Walk { graph, config, tensors: BTreeMap::new(), epsilon: None, ffn_width: None, tables: None };
    walk.model()?;
    let Walk { tensors, epsilon: Some(norm_epsilon), ffn_width: Some(ffn_width), tables: Some([cos, sin]), .. } = walk
    else {
        return Err(wrong("it has no layers".into()));
    };
    let (cos, sin) = (graph.initializer(cos)?, graph.initializer(sin)?);
    graph.refuse_unread()?;
    let params = ModelParams {
        layers: config.layers,
        width: config.width,
        ffn_width,
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_size: config.head_size,
        context_tokens: config.context_tokens,
        rope_base: rotary::base(cos, sin, config.head_size, config.context_tokens)?,
        rope_pairs: RopePairs::Halves,
        norm_epsilon,
        vocabulary: config.vocabulary,
        sliding: None,
        activation: Activation::Silu,
        has_head_norms: false,
        has_post_norms: false,
        embedding_factor: 1.0,
        query_factor: 1.0 / (config.head_size as f32).sqrt(),
    };
    params.check(true)?;
    Ok((params, tensors))
}

struct Walk<'a> {
    graph: &'a Graph,
    config: &'a Config,
    tensors: BTreeMap<String, Matrix>,
    /// What every layer says again, and has to say the same.
    epsilon: Option<f32>,
    ffn_width: Option<usize>,
    tables: Option<[&'a str; 2]>,
}

/// What a norm with a skip adds up: the stream before, and what the layer adds to it.
struct Sum<'a> {
    stream: &'a str,
    added: &'a str,
}

impl<'a> Walk<'a> {
    fn model(&mut self) -> Result<(), ModelError> {
        let Config { width, vocabulary, layers, .. } = *self.config;
        let normed = self.linear("logits", "output", width, vocabulary)?;
        let mut sum = self.skip_norm(self.graph.maker_of(normed, 0, &[SKIP_NORM])?, "output_norm")?;
        let mut embedded = None;
        for layer in (0..layers).rev() {
            let (normed, stream) = self.feed_forward(layer, &sum)?;
            sum = self.skip_norm(self.same(normed, stream)?, &format!("blk.{layer}.ffn_norm"))?;
            let normed = self.attention(layer, sum.added)?;
            let name = format!("blk.{layer}.attn_norm");
            if layer > 0 {
                sum = self.skip_norm(self.same(normed, sum.stream)?, &name)?;
            } else {
                embedded = Some(self.first_norm(normed, sum.stream, &name)?);
            }
        }
        self.embedding(embedded.ok_or_else(|| wrong("it has no layers".into()))?)
    }

    /// The norm that makes `normed`, if the sum that it makes is `stream`.
    fn same(&self, normed: &str, stream: &str) -> Result<&'a Node, ModelError> {
        let node = self.graph.maker_of(normed, 0, &[SKIP_NORM])?;
        let is_same = std::ptr::eq(node, self.graph.maker_of(stream, SUM, &[SKIP_NORM])?);
        if is_same { Ok(node) } else { Err(node.fault("is not the one that makes the residual stream".into())) }
    }

    fn skip_norm(&mut self, node: &'a Node, name: &str) -> Result<Sum<'a>, ModelError> {
        node.only_attributes(&["epsilon"])?;
        node.only_inputs(&[0, 1, 2])?;
        self.norm(node, node.input(2)?, name)?;
        Ok(Sum { stream: node.input(0)?, added: node.input(1)? })
    }

    /// The first layer's: it has nothing to add yet. Its input, the embeddings.
    fn first_norm(&mut self, normed: &str, stream: &str, name: &str) -> Result<&'a str, ModelError> {
        let node = self.graph.maker(normed, 0)?;
        match node.op.as_str() {
            NORM => {}
            SKIP_NORM => return Err(wrong(format!("it has more than {} layers", self.config.layers))),
            _ => return Err(node.unsupported(&[NORM])),
        }
        node.only_attributes(&["epsilon", "axis", "stash_type"])?;
        node.expect("axis", -1, -1)?;
        node.expect("stash_type", 1, 1)?;
        node.only_inputs(&[0, 1])?;
        self.norm(node, node.input(1)?, name)?;
        match node.input(0)? {
            input if input == stream => Ok(input),
            _ => Err(node.fault("does not read the residual stream".into())),
        }
    }

    fn norm(&mut self, node: &Node, weights: &str, name: &str) -> Result<(), ModelError> {
        let epsilon = node.float("epsilon", 1e-5)?;
        if *self.epsilon.get_or_insert(epsilon) != epsilon {
            return Err(node.fault(format!("has the epsilon {epsilon}, unlike the others")));
        }
        let weights = self.graph.initializer(weights)?;
        if weights.dims != [self.config.width] || !weights.ty.is_float() {
            let (name, dims) = (&weights.name, &weights.dims);
            return Err(wrong(format!("`{name}` has the shape {dims:?}, expected {} floats", self.config.width)));
        }
        self.put(name, Matrix::vector(self.config.width, weights.ty, weights.data.clone()));
        Ok(())
    }

    /// From the layer's end to its normed input and the stream that the input was made of.
    fn feed_forward(&mut self, layer: usize, end: &Sum<'a>) -> Result<(&'a str, &'a str), ModelError> {
        let n = |part: &str| format!("blk.{layer}.{part}");
        let width = self.config.width;
        let (ffn_width, hidden) = {
            let (down, input) = self.matrix(end.added)?;
            self.expect(&n("ffn_down"), &down, down.columns, width)?;
            let ffn_width = down.columns;
            self.put(&n("ffn_down"), down);
            (ffn_width, input)
        };
        if *self.ffn_width.get_or_insert(ffn_width) != ffn_width {
            return Err(wrong(format!("layer {layer} has {ffn_width} hidden values, unlike the others")));
        }
        let product = self.plain(hidden, &["Mul"])?;
        let gated = self.plain(product.input(0)?, &["Mul"])?;
        let sigmoid = self.plain(gated.input(1)?, &["Sigmoid"])?;
        let gate = gated.input(0)?;
        if sigmoid.input(0)? != gate {
            return Err(gated.fault("is not the SiLU of one value".into()));
        }
        let normed = self.linear(gate, &n("ffn_gate"), width, ffn_width)?;
        if self.linear(product.input(1)?, &n("ffn_up"), width, ffn_width)? != normed {
            return Err(product.fault("mixes two inputs".into()));
        }
        Ok((normed, end.stream))
    }

    /// From what attention adds to the layer's normed input.
    fn attention(&mut self, layer: usize, added: &str) -> Result<&'a str, ModelError> {
        let n = |part: &str| format!("blk.{layer}.{part}");
        let Config { width, heads, kv_heads, head_size, .. } = *self.config;
        let (queries, keys) = (self.config.query_width(), self.config.kv_width());
        let mixed = self.linear(added, &n("attn_output"), queries, width)?;
        let node = self.graph.maker_of(mixed, 0, &[ATTENTION])?;
        self.attention_node(node, heads, kv_heads, head_size)?;
        if node.optional_input(1).is_none() && node.optional_input(2).is_none() {
            let (all, normed) = self.matrix(node.input(0)?)?;
            self.expect(&n("attn_qkv"), &all, width, queries + 2 * keys)?;
            self.put(&n("attn_q"), all.slice(0, queries));
            self.put(&n("attn_k"), all.slice(queries, keys));
            self.put(&n("attn_v"), all.slice(queries + keys, keys));
            return Ok(normed);
        }
        let normed = self.linear(node.input(0)?, &n("attn_q"), width, queries)?;
        for (input, part) in [(1, "attn_k"), (2, "attn_v")] {
            if self.linear(node.input(input)?, &n(part), width, keys)? != normed {
                return Err(node.fault("mixes two inputs".into()));
            }
        }
        Ok(normed)
    }

    fn attention_node(&mut self, node: &'a Node, heads: usize, kv_heads: usize, size: usize) -> Result<(), ModelError> {
        let known = ["num_heads", "kv_num_heads", "scale", "local_window_size", "softcap", "do_rotary"];
        node.only_attributes(&[&known[..], &["rotary_interleaved", "smooth_softmax"]].concat())?;
        for (name, expected) in [("num_heads", heads), ("kv_num_heads", kv_heads)] {
            let found = node.int(name, None)?;
            if usize::try_from(found) != Ok(expected) {
                return Err(node.fault(format!("has {name} {found}, but genai_config.json has {expected}")));
            }
        }
        node.expect("local_window_size", -1, -1)?;
        node.expect("do_rotary", 0, 1)?;
        node.expect("rotary_interleaved", 0, 0)?;
        node.expect("smooth_softmax", 0, 0)?;
        let scale = 1.0 / (size as f32).sqrt();
        let (found, softcap) = (node.float("scale", 0.0)?, node.float("softcap", 0.0)?);
        // Zero is the operator's word for the usual scale.
        if softcap != 0.0 || (found != 0.0 && (found / scale - 1.0).abs() > 1e-5) {
            return Err(node.fault(format!("has scale {found} and softcap {softcap}, which is not supported")));
        }
        node.only_inputs(&[0, 1, 2, 3, 4, 5, 6, 7, 8])?;
        self.lengths(node.input(5)?, node.input(6)?)?;
        let tables = [node.input(7)?, node.input(8)?];
        if *self.tables.get_or_insert(tables) != tables {
            return Err(node.fault("has tables of angles of its own".into()));
        }
        Ok(())
    }

    /// How long the sequences are: the sum of the attention mask less one, and the mask's length.
    fn lengths(&self, last: &str, total: &str) -> Result<(), ModelError> {
        let cast = |value| {
            let node = self.graph.maker_of(value, 0, &["Cast"])?;
            node.only_attributes(&["to", "saturate"])?;
            node.expect("to", 0, INT32)?;
            node.input(0)
        };
        let minus = self.plain(cast(last)?, &["Sub"])?;
        let sum = self.graph.maker_of(minus.input(0)?, 0, &["ReduceSum"])?;
        sum.only_attributes(&["keepdims", "noop_with_empty_axes"])?;
        sum.expect("keepdims", 1, 0)?;
        let taken = self.graph.maker_of(cast(total)?, 0, &["Gather"])?;
        taken.only_attributes(&["axis"])?;
        taken.expect("axis", 0, 0)?;
        let shape = self.plain(taken.input(0)?, &["Shape"])?;
        let is_mask = [sum.input(0)?, shape.input(0)?] == ["attention_mask"; 2];
        let mut ones = [minus.input(1)?, sum.input(1)?, taken.input(1)?].into_iter();
        if is_mask && ones.try_fold(true, |all, one| Ok::<_, ModelError>(all & (self.graph.integers(one)? == [1])))? {
            return Ok(());
        }
        Err(sum.fault("and its neighbours do not reckon lengths from the attention mask".into()))
    }

    fn embedding(&mut self, value: &str) -> Result<(), ModelError> {
        let Config { width, .. } = *self.config;
        let mut node = self.graph.maker_of(value, 0, &["Gather", GATHER_NBITS, "Slice"])?;
        let mut row_codes = width;
        if node.op == "Slice" {
            // Rows of whole blocks: what was added to the last one is cut off.
            self.first_columns(node, width)?;
            node = self.graph.maker_of(node.input(0)?, 0, &[GATHER_NBITS])?;
            row_codes = width.next_multiple_of(self.block_format(node)?.1);
        }
        if node.input(1)? != "input_ids" {
            return Err(node.fault("does not read the tokens".into()));
        }
        let table =
            if node.op == "Gather" { self.plain_embedding(node)? } else { self.coded_embedding(node, row_codes)? };
        // A head that is the table of embeddings is not kept twice, as in GGUF.
        if self.tensors.get("output.weight").is_some_and(|head| head.is(&table)) {
            self.tensors.remove("output.weight");
        }
        self.put("token_embd", table);
        Ok(())
    }

    fn first_columns(&self, node: &Node, columns: usize) -> Result<(), ModelError> {
        node.only_attributes(&[])?;
        node.only_inputs(&[0, 1, 2, 3])?;
        let wanted = [(1, 0), (2, columns as i64), (3, -1)];
        for (input, wanted) in wanted {
            if self.graph.integers(node.input(input)?)? != [wanted] {
                return Err(node.fault(format!("does not take the first {columns} of each row")));
            }
        }
        Ok(())
    }

    fn plain_embedding(&self, node: &Node) -> Result<Matrix, ModelError> {
        let Config { width, vocabulary, .. } = *self.config;
        node.only_attributes(&["axis"])?;
        node.expect("axis", 0, 0)?;
        node.only_inputs(&[0, 1])?;
        let table = node.input(0)?;
        if let Ok(table) = self.graph.initializer(table) {
            self.floats(table.ty, &table.dims, [vocabulary, width], &table.name)?;
            return Ok(Matrix::new(width, vocabulary, Stored::Rows { ty: table.ty, data: table.data.clone() }));
        }
        // Shared with the head, which has its rows as columns.
        let turned = self.graph.maker_of(table, 0, &["Transpose"])?;
        turned.only_attributes(&["perm"])?;
        if !matches!(turned.ints("perm"), [] | [1, 0]) {
            return Err(turned.fault("does not swap two dimensions".into()));
        }
        self.columns(turned.input(0)?, width, Some(vocabulary))
    }

    fn coded_embedding(&self, node: &Node, row_codes: usize) -> Result<Matrix, ModelError> {
        let Config { width, vocabulary, .. } = *self.config;
        node.only_attributes(&["bits", "block_size", "gather_axis", "quantize_axis"])?;
        node.expect("gather_axis", 0, 0)?;
        node.expect("quantize_axis", 1, 1)?;
        node.only_inputs(&[0, 1, 2, 3])?;
        let (bits, block) = self.block_format(node)?;
        let row = if let Ok(codes) = self.graph.initializer(node.input(0)?) {
            codes
        } else {
            let reshaped = self.plain(node.input(0)?, &["Reshape"])?;
            let shape = self.graph.integers(reshaped.input(1)?)?;
            if shape != [vocabulary as i64, (row_codes * bits / 8) as i64] {
                return Err(reshaped.fault(format!("makes the shape {shape:?}")));
            }
            self.graph.initializer(reshaped.input(0)?)?
        };
        let is_signed = match row.ty {
            Type::I4 if bits == 4 => true,
            Type::U8 | Type::U4 if row.ty == Type::U8 || bits == 4 => false,
            ty => return Err(node.fault(format!("has {bits}-bit codes stored as {ty:?}"))),
        };
        let is_packed = row.ty != Type::U8;
        let blocks = width.div_ceil(block);
        let format = Format {
            bits,
            block,
            blocks,
            row_codes,
            zero_stride: if is_packed { blocks } else { (blocks * bits).next_multiple_of(8) / bits },
            zero: if row.ty == Type::U4 { 0 } else { 1 << (bits - 1) },
            code_type: row.ty,
            is_signed,
        };
        self.blocks(node, [row.name.as_str(), node.input(2)?], node.optional_input(3), vocabulary, width, &format)
    }

    /// A product with a matrix: puts the matrix under `name`, and says what it is multiplied with.
    fn linear(&mut self, value: &str, name: &str, columns: usize, rows: usize) -> Result<&'a str, ModelError> {
        let (matrix, input) = self.matrix(value)?;
        self.expect(name, &matrix, columns, rows)?;
        self.put(name, matrix);
        Ok(input)
    }

    fn matrix(&self, value: &str) -> Result<(Matrix, &'a str), ModelError> {
        let node = self.graph.maker_of(value, 0, &["MatMul", NBITS])?;
        let input = node.input(0)?;
        if node.op == "MatMul" {
            node.only_attributes(&[])?;
            node.only_inputs(&[0, 1])?;
            let weights = node.input(1)?;
            let columns = self.graph.initializer(weights)?.dims[..].first().copied().unwrap_or(0);
            return Ok((self.columns(weights, columns, None)?, input));
        }
        node.only_attributes(&["K", "N", "bits", "block_size", "accuracy_level", "weight_prepacked"])?;
        node.only_inputs(&[0, 1, 2, 3])?;
        node.expect("weight_prepacked", 0, 0)?;
        let (bits, block) = self.block_format(node)?;
        let side = |name| match node.int(name, None)? {
            side if (1..=SIDE_MAX).contains(&side) => Ok(side as usize),
            side => Err(node.fault(format!("has {name} {side}, outside 1..={SIDE_MAX}"))),
        };
        let (columns, rows) = (side("K")?, side("N")?);
        let blocks = columns.div_ceil(block);
        let format = Format {
            bits,
            block,
            blocks,
            row_codes: blocks * block,
            zero_stride: (blocks * bits).next_multiple_of(8) / bits,
            zero: 1 << (bits - 1),
            code_type: Type::U8,
            is_signed: false,
        };
        let names = [node.input(1)?, node.input(2)?];
        Ok((self.blocks(node, names, node.optional_input(3), rows, columns, &format)?, input))
    }

    fn block_format(&self, node: &Node) -> Result<(usize, usize), ModelError> {
        match (node.int("bits", Some(4))?, node.int("block_size", None)?) {
            (bits @ (4 | 8), block @ 32..=BLOCK_MAX) if block % 32 == 0 => Ok((bits as usize, block as usize)),
            (bits, block) => {
                let known = "4 and 8 bits in blocks of 32 and their multiples are";
                Err(node.fault(format!("has {bits} bits in blocks of {block}, which is not supported ({known})")))
            }
        }
    }

    fn columns(&self, name: &str, columns: usize, rows: Option<usize>) -> Result<Matrix, ModelError> {
        let weights = self.graph.initializer(name)?;
        let rows = rows.or(weights.dims.get(1).copied()).unwrap_or(0);
        self.floats(weights.ty, &weights.dims, [columns, rows], name)?;
        let stored = Stored::Columns { ty: weights.ty, data: weights.data.clone(), outputs: rows };
        Ok(Matrix::new(columns, rows, stored))
    }

    fn floats(&self, ty: Type, found: &[usize], expected: [usize; 2], name: &str) -> Result<(), ModelError> {
        if ty.is_float() && found == expected {
            return Ok(());
        }
        Err(wrong(format!("`{name}` has the shape {found:?} of {ty:?}, expected {expected:?} of floats")))
    }

    /// Codes, scales and zeros, each as many as the format says.
    fn blocks(
        &self,
        node: &Node,
        [codes, scales]: [&str; 2],
        zeros: Option<&str>,
        rows: usize,
        columns: usize,
        format: &Format,
    ) -> Result<Matrix, ModelError> {
        let (codes, scales) = (self.graph.initializer(codes)?, self.graph.initializer(scales)?);
        let zeros = zeros.map(|zeros| self.graph.initializer(zeros)).transpose()?;
        let bytes = |codes: usize| (codes * format.bits).div_ceil(8);
        let scale_bytes = rows * format.blocks * if scales.ty == Type::F32 { 4 } else { 2 };
        for (part, wanted, sound) in [
            (codes, bytes(rows * format.row_codes), codes.ty == format.code_type),
            (scales, scale_bytes, scales.ty.is_float()),
        ]
        .into_iter()
        .chain(zeros.map(|zeros| (zeros, bytes(rows * format.zero_stride), zeros.ty == format.code_type)))
        {
            let found = part.data.bytes().len();
            if !sound || found != wanted {
                let (name, ty) = (&part.name, part.ty);
                return Err(node.fault(format!("wants {wanted} bytes of `{name}`, which has {found} of {ty:?}")));
            }
        }
        let blocks = Blocks {
            bits: format.bits,
            block: format.block,
            blocks: format.blocks,
            row_codes: format.row_codes,
            codes: codes.data.clone(),
            scale_type: scales.ty,
            scales: scales.data.clone(),
            zeros: zeros.map(|zeros| zeros.data.clone()),
            zero_stride: format.zero_stride,
            zero: format.zero,
            is_signed: format.is_signed,
        };
        Ok(Matrix::new(columns, rows, Stored::Blocks(blocks)))
    }

    fn expect(&self, name: &str, matrix: &Matrix, columns: usize, rows: usize) -> Result<(), ModelError> {
        if (matrix.columns, matrix.rows) == (columns, rows) {
            return Ok(());
        }
        Err(ModelError::WrongShape {
            name: format!("{name}.weight"),
            found: vec![matrix.columns as u64, matrix.rows as u64],
            expected: vec![columns as u64, rows as u64],
        })
    }

    fn put(&mut self, name: &str, matrix: Matrix) {
        self.tensors.insert(format!("{name}.weight"), matrix);
    }

    /// A node without attributes.
    fn plain(&self, value: &str, ops: &[&str]) -> Result<&'a Node, ModelError> {
        let node = self.graph.maker_of(value, 0, ops)?;
        node.only_attributes(&[])?;
        Ok(node)
    }
}

/// How codes lie.
struct Format {
    bits: usize,
    block: usize,
    blocks: usize,
    /// Codes from one row to the next.
    row_codes: usize,
    /// Zeros from one row to the next.
    zero_stride: usize,
    zero: u8,
    code_type: Type,
    is_signed: bool,
}
