//! The model as its file has it: dequantised fp32 weights, ONNX's own operators, nothing of ours.
//!
//! Slow and obviously right; the served graph's quality is measured against it. Takes nothing from the served
//! graph but the file. Never serves requests.

use std::sync::Arc;

use ort::{
    session::{Session, builder::GraphOptimizationLevel},
    value::{DynValue, Tensor},
};

use super::{
    EngineError, OnnxRuntime,
    graph::{Dim, Graph, int, ints},
    proto::DataType,
    weights::{dense, head_tensor, norm},
};
use crate::model::{Activation, ModelFile, ModelParams, RopePairs};

pub struct Reference {
    session: Session,
    file: Arc<ModelFile>,
    tokens_max: usize,
}

/// What keys and values are rounded to before attention reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    /// As they are computed.
    Single,
    /// Half precision: what the served graph keeps.
    Half,
    /// Eight bits, with one scale for each token and head.
    Byte,
}

impl Reference {
    pub fn load(runtime: &OnnxRuntime, file: &Arc<ModelFile>, tokens_max: usize) -> Result<Self, EngineError> {
        Self::load_with(runtime, file, tokens_max, KvFormat::Single)
    }

    /// With rounded keys and values, to tell what a format of theirs costs by itself.
    pub fn load_with(
        runtime: &OnnxRuntime,
        file: &Arc<ModelFile>,
        tokens_max: usize,
        kv: KvFormat,
    ) -> Result<Self, EngineError> {
        let mut build = Builder { graph: Graph::default(), weights: Vec::new(), file, kv };
        build.model()?;
        let mut builder = Session::builder(&runtime.environment)?
            .with_optimization_level(GraphOptimizationLevel::Level1)
            .map_err(ort::Error::from)?;
        for (name, value) in build.weights {
            builder = builder.with_external_initializer(name, value).map_err(ort::Error::from)?;
        }
        let session = builder.commit_from_memory(&build.graph.encode())?;
        Ok(Self { session, file: Arc::clone(file), tokens_max })
    }

    pub fn tokens_max(&self) -> usize {
        self.tokens_max
    }

    /// Logits after each of `tokens`, `[tokens, vocabulary]`, row-major.
    pub fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        self.logits_from(tokens, 0)
    }

    /// Logits after each of `tokens` from the token `first` on.
    pub fn logits_from(&mut self, tokens: &[u32], first: usize) -> Result<Vec<f32>, EngineError> {
        let (p, n) = (&self.file.params, tokens.len());
        if n > self.tokens_max || first >= n {
            return Err(EngineError::Limits(format!("{n} tokens, of which the first {first} are left out")));
        }
        let mut x = vec![0.0; n * p.width];
        for (token, row) in tokens.iter().zip(x.chunks_exact_mut(p.width)) {
            self.file.tensors.dequantize_rows("token_embd.weight", *token as usize, row)?;
            row.iter_mut().for_each(|x| *x *= p.embedding_factor);
        }
        let mut inputs = ort::inputs![
            "x" => Tensor::from_array(([n, p.width], x))?,
            "first" => Tensor::from_array(([1], vec![first as i64]))?
        ];
        for kind in Kind::all(p) {
            let pairs = p.head_size / 2;
            let angles: Vec<f64> = (0..n * pairs).map(|i| kind.angle(p, i / pairs, i % pairs)).collect();
            let turned = |f: fn(f64) -> f64| angles.iter().map(|angle| f(*angle) as f32).collect::<Vec<_>>();
            inputs.push((kind.name("cos").into(), Tensor::from_array(([n, 1, pairs], turned(f64::cos)))?.into()));
            inputs.push((kind.name("sin").into(), Tensor::from_array(([n, 1, pairs], turned(f64::sin)))?.into()));
            let sees = |i: usize| kind.sees(p, i / n, i % n);
            let mask = (0..n * n).map(|i| if sees(i) { 0.0 } else { f32::NEG_INFINITY }).collect::<Vec<_>>();
            inputs.push((kind.name("mask").into(), Tensor::from_array(([n, n], mask))?.into()));
        }
        let outputs = self.session.run(inputs)?;
        let (_, logits) = outputs["logits"].try_extract_tensor::<f32>()?;
        debug_assert_eq!(logits.len(), (n - first) * p.vocabulary);
        Ok(logits.to_vec())
    }
}

/// Layers that see the whole context, and layers with a window.
#[derive(Clone, Copy)]
enum Kind {
    Whole,
    Window,
}

impl Kind {
    fn all(p: &ModelParams) -> &'static [Self] {
        if p.sliding.is_some() { &[Self::Whole, Self::Window] } else { &[Self::Whole] }
    }

    fn of(p: &ModelParams, layer: usize) -> Self {
        if p.window(layer).is_some() { Self::Window } else { Self::Whole }
    }

    fn name(self, part: &str) -> String {
        match self {
            Self::Whole => part.to_owned(),
            Self::Window => format!("{part}.window"),
        }
    }

    fn angle(self, p: &ModelParams, position: usize, pair: usize) -> f64 {
        let base = match (self, &p.sliding) {
            (Self::Window, Some(sliding)) => sliding.rope_base,
            _ => p.rope_base,
        };
        position as f64 * f64::from(base).powf(-2.0 * pair as f64 / p.head_size as f64)
    }

    /// Whether the token at `position` sees the one at `other`.
    fn sees(self, p: &ModelParams, position: usize, other: usize) -> bool {
        let window = match (self, &p.sliding) {
            (Self::Window, Some(sliding)) => sliding.tokens,
            _ => usize::MAX,
        };
        other <= position && position - other < window
    }
}

struct Builder<'a> {
    graph: Graph,
    weights: Vec<(String, DynValue)>,
    file: &'a ModelFile,
    kv: KvFormat,
}

impl Builder<'_> {
    fn weight(&mut self, name: &str, dims: &[usize], data: Vec<f32>) -> Result<(), EngineError> {
        self.graph.weight(name, DataType::F32, dims);
        self.weights.push((name.to_owned(), Tensor::from_array((dims.to_vec(), data))?.into_dyn()));
        Ok(())
    }

    fn model(&mut self) -> Result<(), EngineError> {
        let file = self.file;
        let p = &file.params;
        self.inputs(p)?;
        if self.kv == KvFormat::Byte {
            self.weight("kv.step", &[1], vec![1.0 / 127.0])?;
        }
        let mut x = "x".to_owned();
        for layer in 0..p.layers {
            let tensor = |part: &str| format!("blk.{layer}.{part}.weight");
            let n = |part: &str| format!("l{layer}.{part}");
            self.norm(&tensor("attn_norm"), p.width, &x, &n("normed"))?;
            self.attention(p, layer)?;
            let added = self.post_norm(&tensor("post_attention_norm"), &n("o"))?;
            self.graph.node("Add", &[&x, &added], &[&n("attended")], vec![]);

            self.norm(&tensor("ffn_norm"), p.width, &n("attended"), &n("ffn_in"))?;
            self.linear(&tensor("ffn_gate"), p.width, p.ffn_width, &n("ffn_in"), &n("gate"))?;
            self.linear(&tensor("ffn_up"), p.width, p.ffn_width, &n("ffn_in"), &n("up"))?;
            match p.activation {
                Activation::Silu => self.silu(&n("gate"), &n("active")),
                Activation::Gelu => self.gelu(&n("gate"), &n("active")),
            }
            self.graph.node("Mul", &[&n("active"), &n("up")], &[&n("hidden")], vec![]);
            self.linear(&tensor("ffn_down"), p.ffn_width, p.width, &n("hidden"), &n("down"))?;
            let added = self.post_norm(&tensor("post_ffw_norm"), &n("down"))?;
            self.graph.node("Add", &[&n("attended"), &added], &[&n("x")], vec![]);
            x = n("x");
        }
        self.graph.node("Slice", &[&x, "first", "end", "zero"], &["wanted"], vec![]);
        self.norm("output_norm.weight", p.width, "wanted", "final")?;
        self.linear(head_tensor(file), p.width, p.vocabulary, "final", "logits")
    }

    /// What the session is given, and the constants of all layers.
    fn inputs(&mut self, p: &ModelParams) -> Result<(), EngineError> {
        let (heads, kv_heads, size) = (p.heads as i64, p.kv_heads as i64, p.head_size as i64);
        let tokens = Dim::Named("tokens");
        let turned = [tokens, Dim::Fixed(1), Dim::Fixed(p.head_size / 2)];
        self.graph.input("x", DataType::F32, &[tokens, Dim::Fixed(p.width)]);
        self.graph.input("first", DataType::I64, &[Dim::Fixed(1)]);
        for kind in Kind::all(p) {
            self.graph.input(&kind.name("cos"), DataType::F32, &turned);
            self.graph.input(&kind.name("sin"), DataType::F32, &turned);
            self.graph.input(&kind.name("mask"), DataType::F32, &[tokens, Dim::Named("context")]);
        }
        self.graph.output("logits", DataType::F32, &[Dim::Named("wanted"), Dim::Fixed(p.vocabulary)]);
        self.weight("epsilon", &[1], vec![p.norm_epsilon])?;
        self.weight("query_factor", &[1], vec![p.query_factor])?;
        if p.activation == Activation::Gelu {
            let factor = std::f32::consts::FRAC_2_PI.sqrt();
            for (name, value) in [("half", 0.5), ("unit", 1.0), ("gelu.cubic", 0.044_715), ("gelu.factor", factor)] {
                self.weight(name, &[1], vec![value])?;
            }
        }
        // The two numbers of a pair stand along the axis that is 2 long.
        let pairs = |heads: i64| match p.rope_pairs {
            RopePairs::Neighbours => [0, heads, size / 2, 2],
            RopePairs::Halves => [0, heads, 2, size / 2],
        };
        let axis = if p.rope_pairs == RopePairs::Neighbours { 3 } else { 2 };
        let constants: [(&str, &[i64]); 14] = [
            ("last", &[-1]),
            ("flat", &[0, p.query_width() as i64]),
            ("q_pairs", &pairs(heads)),
            ("k_pairs", &pairs(kv_heads)),
            ("pair_axis", &[axis]),
            ("q_heads", &[0, heads, size]),
            ("k_heads", &[0, kv_heads, size]),
            ("k_grouped", &[kv_heads, 1, -1, size]),
            ("q_grouped", &[kv_heads, heads / kv_heads, -1, size]),
            ("ungrouped", &[heads, -1, size]),
            ("zero", &[0]),
            ("one", &[1]),
            ("two", &[2]),
            ("end", &[i64::MAX]),
        ];
        for (name, values) in constants {
            self.graph.constant(name, values);
        }
        Ok(())
    }

    /// `normed` of the layer to `o`, the projected attention.
    fn attention(&mut self, p: &ModelParams, layer: usize) -> Result<(), EngineError> {
        let tensor = |part: &str| format!("blk.{layer}.{part}.weight");
        let n = |part: &str| format!("l{layer}.{part}");
        let kind = Kind::of(p, layer);
        for (part, outputs) in [("q", p.query_width()), ("k", p.kv_width()), ("v", p.kv_width())] {
            self.linear(&tensor(&format!("attn_{part}")), p.width, outputs, &n("normed"), &n(&format!("{part}.flat")))?;
        }
        for (part, heads) in [("q", "q_heads"), ("k", "k_heads"), ("v", "k_heads")] {
            self.graph.node("Reshape", &[&n(&format!("{part}.flat")), heads], &[&n(&format!("{part}.plain"))], vec![]);
        }
        for (part, pairs, heads) in [("q", "q_pairs", "q_heads"), ("k", "k_pairs", "k_heads")] {
            let mut from = n(&format!("{part}.plain"));
            if p.has_head_norms {
                let normed = n(&format!("{part}.normed"));
                self.norm(&tensor(&format!("attn_{part}_norm")), p.head_size, &from, &normed)?;
                from = normed;
            }
            self.rotary(p, kind, [&from, pairs, heads], &n(&format!("{part}.rotated")));
        }
        let (keys, values) = (self.rounded(&n("k.rotated")), self.rounded(&n("v.plain")));
        let g = &mut self.graph;
        for (part, from, shape) in
            [("q", n("q.rotated"), "q_grouped"), ("k", keys, "k_grouped"), ("v", values, "k_grouped")]
        {
            let (turned, grouped) = (n(&format!("{part}.turned")), n(&format!("{part}.grouped")));
            g.node("Transpose", &[&from], &[&turned], vec![ints("perm", &[1, 0, 2])]);
            g.node("Reshape", &[&turned, shape], &[&grouped], vec![]);
        }
        g.node("Transpose", &[&n("k.grouped")], &[&n("k.t")], vec![ints("perm", &[0, 1, 3, 2])]);
        g.node("MatMul", &[&n("q.grouped"), &n("k.t")], &[&n("scores")], vec![]);
        g.node("Mul", &[&n("scores"), "query_factor"], &[&n("scaled")], vec![]);
        g.node("Add", &[&n("scaled"), &kind.name("mask")], &[&n("masked")], vec![]);
        g.node("Softmax", &[&n("masked")], &[&n("weights")], vec![]);
        g.node("MatMul", &[&n("weights"), &n("v.grouped")], &[&n("mixed")], vec![]);
        g.node("Reshape", &[&n("mixed"), "ungrouped"], &[&n("mixed.heads")], vec![]);
        g.node("Transpose", &[&n("mixed.heads")], &[&n("mixed.rows")], vec![ints("perm", &[1, 0, 2])]);
        g.node("Reshape", &[&n("mixed.rows"), "flat"], &[&n("mixed.flat")], vec![]);
        self.linear(&tensor("attn_output"), p.query_width(), p.width, &n("mixed.flat"), &n("o"))
    }

    /// Keys or values, `[tokens, heads, head_size]`, as they come out of their format. Their name.
    fn rounded(&mut self, from: &str) -> String {
        const FLOAT: i64 = 1;
        const FLOAT16: i64 = 10;
        let n = |part: &str| format!("{from}.{part}");
        let g = &mut self.graph;
        match self.kv {
            KvFormat::Single => return from.to_owned(),
            KvFormat::Half => {
                g.node("Cast", &[from], &[&n("half")], vec![int("to", FLOAT16)]);
                g.node("Cast", &[&n("half")], &[&n("kept")], vec![int("to", FLOAT)]);
            }
            KvFormat::Byte => {
                g.node("Abs", &[from], &[&n("sizes")], vec![]);
                g.node("ReduceMax", &[&n("sizes"), "last"], &[&n("largest")], vec![]);
                g.node("Mul", &[&n("largest"), "kv.step"], &[&n("scale")], vec![]);
                g.node("Div", &[from, &n("scale")], &[&n("codes")], vec![]);
                g.node("Round", &[&n("codes")], &[&n("rounded")], vec![]);
                g.node("Mul", &[&n("rounded"), &n("scale")], &[&n("kept")], vec![]);
            }
        }
        n("kept")
    }

    fn linear(&mut self, tensor: &str, inputs: usize, outputs: usize, from: &str, to: &str) -> Result<(), EngineError> {
        let rows = dense(self.file, tensor, inputs, outputs)?;
        let mut transposed = vec![0.0; rows.len()];
        for (n, row) in rows.chunks_exact(inputs).enumerate() {
            for (k, w) in row.iter().enumerate() {
                transposed[k * outputs + n] = *w;
            }
        }
        let weight = format!("{to}.weight");
        self.weight(&weight, &[inputs, outputs], transposed)?;
        self.graph.node("MatMul", &[from, &weight], &[to], vec![]);
        Ok(())
    }

    /// Root mean square over the last axis, `width` numbers long.
    fn norm(&mut self, tensor: &str, width: usize, from: &str, to: &str) -> Result<(), EngineError> {
        let n = |part: &str| format!("{to}.{part}");
        self.weight(&n("weight"), &[width], norm(self.file, tensor, width)?)?;
        let g = &mut self.graph;
        g.node("Mul", &[from, from], &[&n("squares")], vec![]);
        g.node("ReduceMean", &[&n("squares"), "last"], &[&n("mean")], vec![]);
        g.node("Add", &[&n("mean"), "epsilon"], &[&n("safe")], vec![]);
        g.node("Sqrt", &[&n("safe")], &[&n("root")], vec![]);
        g.node("Div", &[from, &n("root")], &[&n("unit")], vec![]);
        g.node("Mul", &[&n("unit"), &n("weight")], &[to], vec![]);
        Ok(())
    }

    /// What is added to the residual stream: normalised first, where the model does that. Its name.
    fn post_norm(&mut self, tensor: &str, from: &str) -> Result<String, EngineError> {
        if !self.file.params.has_post_norms {
            return Ok(from.to_owned());
        }
        let to = format!("{from}.post");
        self.norm(tensor, self.file.params.width, from, &to)?;
        Ok(to)
    }

    fn silu(&mut self, from: &str, to: &str) {
        let sigmoid = format!("{to}.sigmoid");
        self.graph.node("Sigmoid", &[from], &[&sigmoid], vec![]);
        self.graph.node("Mul", &[from, &sigmoid], &[to], vec![]);
    }

    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))`
    fn gelu(&mut self, from: &str, to: &str) {
        let n = |part: &str| format!("{to}.{part}");
        let g = &mut self.graph;
        g.node("Mul", &[from, from], &[&n("square")], vec![]);
        g.node("Mul", &[&n("square"), from], &[&n("cube")], vec![]);
        g.node("Mul", &[&n("cube"), "gelu.cubic"], &[&n("bent")], vec![]);
        g.node("Add", &[from, &n("bent")], &[&n("sum")], vec![]);
        g.node("Mul", &[&n("sum"), "gelu.factor"], &[&n("angle")], vec![]);
        g.node("Tanh", &[&n("angle")], &[&n("tanh")], vec![]);
        g.node("Add", &[&n("tanh"), "unit"], &[&n("moved")], vec![]);
        g.node("Mul", &[from, "half"], &[&n("halved")], vec![]);
        g.node("Mul", &[&n("halved"), &n("moved")], &[to], vec![]);
    }

    /// Rotates pairs: `(a, b)` to `(a cos - b sin, a sin + b cos)`.
    fn rotary(&mut self, p: &ModelParams, kind: Kind, [from, pairs, heads]: [&str; 3], to: &str) {
        let n = |part: &str| format!("{to}.{part}");
        let (cos, sin) = (kind.name("cos"), kind.name("sin"));
        let axis = if p.rope_pairs == RopePairs::Neighbours { 3 } else { 2 };
        let g = &mut self.graph;
        g.node("Reshape", &[from, pairs], &[&n("pairs")], vec![]);
        for (name, start, end) in [("a", "zero", "one"), ("b", "one", "two")] {
            let wide = n(&format!("{name}.wide"));
            g.node("Slice", &[&n("pairs"), start, end, "pair_axis"], &[&wide], vec![]);
            g.node("Squeeze", &[&wide, "pair_axis"], &[&n(name)], vec![]);
            g.node("Mul", &[&n(name), &cos], &[&n(&format!("{name}.cos"))], vec![]);
            g.node("Mul", &[&n(name), &sin], &[&n(&format!("{name}.sin"))], vec![]);
        }
        g.node("Sub", &[&n("a.cos"), &n("b.sin")], &[&n("first")], vec![]);
        g.node("Add", &[&n("a.sin"), &n("b.cos")], &[&n("second")], vec![]);
        for name in ["first", "second"] {
            g.node("Unsqueeze", &[&n(name), "pair_axis"], &[&n(&format!("{name}.wide"))], vec![]);
        }
        g.node("Concat", &[&n("first.wide"), &n("second.wide")], &[&n("joined")], vec![int("axis", axis)]);
        g.node("Reshape", &[&n("joined"), heads], &[to], vec![]);
    }
}
