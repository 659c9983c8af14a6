//! The model as its file has it: dequantised fp32 weights, ONNX's own operators, nothing of ours.
//!
//! Slow and obviously right; the served graph's quality is measured against it. Never serves requests.

use ort::{
    session::{Session, builder::GraphOptimizationLevel},
    value::{DynValue, Tensor},
};

use super::{
    EngineError, OnnxRuntime,
    graph::{Dim, Graph, ints},
    operators::Shared,
    proto::DataType,
    weights::{dense, head_tensor, norm},
};
use crate::model::ModelFile;

pub struct Reference {
    session: Session,
    width: usize,
    head_size: usize,
    vocabulary: usize,
    embeddings: Vec<f32>,
    angles: Vec<f32>,
}

impl Reference {
    pub fn load(runtime: &OnnxRuntime, file: &ModelFile, tokens_max: usize) -> Result<Self, EngineError> {
        let mut build = Builder { graph: Graph::default(), weights: Vec::new() };
        build.model(file)?;
        let mut builder = Session::builder(&runtime.environment)?
            .with_optimization_level(GraphOptimizationLevel::Level1)
            .map_err(ort::Error::from)?;
        for (name, value) in build.weights {
            builder = builder.with_external_initializer(name, value).map_err(ort::Error::from)?;
        }
        let p = &file.params;
        Ok(Self {
            session: builder.commit_from_memory(&build.graph.encode())?,
            width: p.width,
            head_size: p.head_size,
            vocabulary: p.vocabulary,
            embeddings: file.gguf.dequantize("token_embd.weight")?,
            angles: Shared::angles(p, tokens_max),
        })
    }

    /// Logits after each of `tokens`, `[tokens, vocabulary]`, row-major.
    pub fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        let (n, pairs) = (tokens.len(), self.head_size / 2);
        let x: Vec<f32> =
            tokens.iter().flat_map(|t| &self.embeddings[*t as usize * self.width..][..self.width]).copied().collect();
        let half = |offset: usize| -> Vec<f32> {
            (0..n).flat_map(|position| &self.angles[position * self.head_size + offset..][..pairs]).copied().collect()
        };
        let mask: Vec<f32> = (0..n * n).map(|i| if i % n <= i / n { 0.0 } else { f32::NEG_INFINITY }).collect();
        let outputs = self.session.run(ort::inputs![
            "x" => Tensor::from_array(([n, self.width], x))?,
            "cos" => Tensor::from_array(([n, 1, pairs], half(0)))?,
            "sin" => Tensor::from_array(([n, 1, pairs], half(pairs)))?,
            "mask" => Tensor::from_array(([n, n], mask))?
        ])?;
        let (_, logits) = outputs["logits"].try_extract_tensor::<f32>()?;
        debug_assert_eq!(logits.len(), n * self.vocabulary);
        Ok(logits.to_vec())
    }
}

struct Builder {
    graph: Graph,
    weights: Vec<(String, DynValue)>,
}

impl Builder {
    fn weight(&mut self, name: &str, dims: &[usize], data: Vec<f32>) -> Result<(), EngineError> {
        self.graph.weight(name, DataType::F32, dims);
        self.weights.push((name.to_owned(), Tensor::from_array((dims.to_vec(), data))?.into_dyn()));
        Ok(())
    }

    fn model(&mut self, file: &ModelFile) -> Result<(), EngineError> {
        let p = &file.params;
        let (heads, kv_heads, size) = (p.heads, p.kv_heads, p.head_size);
        let tokens = Dim::Named("tokens");
        for (name, dims) in [
            ("x", vec![tokens, Dim::Fixed(p.width)]),
            ("cos", vec![tokens, Dim::Fixed(1), Dim::Fixed(size / 2)]),
            ("sin", vec![tokens, Dim::Fixed(1), Dim::Fixed(size / 2)]),
            ("mask", vec![tokens, Dim::Named("context")]),
        ] {
            self.graph.input(name, DataType::F32, &dims);
        }
        self.graph.output("logits", DataType::F32, &[tokens, Dim::Fixed(p.vocabulary)]);
        self.weight("epsilon", &[1], vec![p.norm_epsilon])?;
        self.weight("query_factor", &[1], vec![1.0 / (size as f32).sqrt()])?;
        self.graph.constant("last", &[-1]);
        self.graph.constant("flat", &[0, p.width as i64]);
        self.graph.constant("q_pairs", &[0, heads as i64, size as i64 / 2, 2]);
        self.graph.constant("k_pairs", &[0, kv_heads as i64, size as i64 / 2, 2]);
        self.graph.constant("q_heads", &[0, heads as i64, size as i64]);
        self.graph.constant("k_heads", &[0, kv_heads as i64, size as i64]);
        self.graph.constant("k_grouped", &[kv_heads as i64, 1, -1, size as i64]);
        self.graph.constant("q_grouped", &[kv_heads as i64, (heads / kv_heads) as i64, -1, size as i64]);
        self.graph.constant("ungrouped", &[heads as i64, -1, size as i64]);
        self.graph.constant("zero", &[0]);
        self.graph.constant("one", &[1]);
        self.graph.constant("two", &[2]);

        let mut x = "x".to_owned();
        for layer in 0..p.layers {
            let tensor = |part: &str| format!("blk.{layer}.{part}.weight");
            let n = |part: &str| format!("l{layer}.{part}");
            self.norm(file, &tensor("attn_norm"), &x, &n("normed"))?;
            for (part, outputs) in [("attn_q", p.width), ("attn_k", p.kv_width()), ("attn_v", p.kv_width())] {
                self.linear(file, &tensor(part), p.width, outputs, &n("normed"), &n(part))?;
            }
            self.rotary(&n("attn_q"), "q_pairs", "q_heads", &n("q"));
            self.rotary(&n("attn_k"), "k_pairs", "k_heads", &n("k"));
            let g = &mut self.graph;
            g.node("Reshape", &[&n("attn_v"), "k_heads"], &[&n("v")], vec![]);
            for (part, shape) in [("q", "q_grouped"), ("k", "k_grouped"), ("v", "k_grouped")] {
                let (turned, grouped) = (n(&format!("{part}.turned")), n(&format!("{part}.grouped")));
                g.node("Transpose", &[&n(part)], &[&turned], vec![ints("perm", &[1, 0, 2])]);
                g.node("Reshape", &[&turned, shape], &[&grouped], vec![]);
            }
            g.node("Transpose", &[&n("k.grouped")], &[&n("k.t")], vec![ints("perm", &[0, 1, 3, 2])]);
            g.node("MatMul", &[&n("q.grouped"), &n("k.t")], &[&n("scores")], vec![]);
            g.node("Mul", &[&n("scores"), "query_factor"], &[&n("scaled")], vec![]);
            g.node("Add", &[&n("scaled"), "mask"], &[&n("masked")], vec![]);
            g.node("Softmax", &[&n("masked")], &[&n("weights")], vec![]);
            g.node("MatMul", &[&n("weights"), &n("v.grouped")], &[&n("mixed")], vec![]);
            g.node("Reshape", &[&n("mixed"), "ungrouped"], &[&n("mixed.heads")], vec![]);
            g.node("Transpose", &[&n("mixed.heads")], &[&n("mixed.rows")], vec![ints("perm", &[1, 0, 2])]);
            g.node("Reshape", &[&n("mixed.rows"), "flat"], &[&n("mixed.flat")], vec![]);
            self.linear(file, &tensor("attn_output"), p.width, p.width, &n("mixed.flat"), &n("o"))?;
            self.graph.node("Add", &[&x, &n("o")], &[&n("attended")], vec![]);

            self.norm(file, &tensor("ffn_norm"), &n("attended"), &n("ffn_in"))?;
            self.linear(file, &tensor("ffn_gate"), p.width, p.ffn_width, &n("ffn_in"), &n("gate"))?;
            self.linear(file, &tensor("ffn_up"), p.width, p.ffn_width, &n("ffn_in"), &n("up"))?;
            let g = &mut self.graph;
            g.node("Sigmoid", &[&n("gate")], &[&n("sigmoid")], vec![]);
            g.node("Mul", &[&n("gate"), &n("sigmoid")], &[&n("silu")], vec![]);
            g.node("Mul", &[&n("silu"), &n("up")], &[&n("hidden")], vec![]);
            self.linear(file, &tensor("ffn_down"), p.ffn_width, p.width, &n("hidden"), &n("down"))?;
            self.graph.node("Add", &[&n("attended"), &n("down")], &[&n("x")], vec![]);
            x = n("x");
        }
        self.norm(file, "output_norm.weight", &x, "final")?;
        self.linear(file, head_tensor(file), p.width, p.vocabulary, "final", "logits")
    }

    fn linear(
        &mut self,
        file: &ModelFile,
        tensor: &str,
        inputs: usize,
        outputs: usize,
        from: &str,
        to: &str,
    ) -> Result<(), EngineError> {
        let rows = dense(file, tensor, inputs, outputs)?;
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

    fn norm(&mut self, file: &ModelFile, tensor: &str, from: &str, to: &str) -> Result<(), EngineError> {
        let n = |part: &str| format!("{to}.{part}");
        self.weight(&n("weight"), &[file.params.width], norm(file, tensor)?)?;
        let g = &mut self.graph;
        g.node("Mul", &[from, from], &[&n("squares")], vec![]);
        g.node("ReduceMean", &[&n("squares"), "last"], &[&n("mean")], vec![]);
        g.node("Add", &[&n("mean"), "epsilon"], &[&n("safe")], vec![]);
        g.node("Sqrt", &[&n("safe")], &[&n("root")], vec![]);
        g.node("Div", &[from, &n("root")], &[&n("unit")], vec![]);
        g.node("Mul", &[&n("unit"), &n("weight")], &[to], vec![]);
        Ok(())
    }

    /// Rotates neighbouring pairs: `(a, b)` to `(a cos - b sin, a sin + b cos)`.
    fn rotary(&mut self, from: &str, pairs: &str, heads: &str, to: &str) {
        let n = |part: &str| format!("{to}.{part}");
        let g = &mut self.graph;
        g.node("Reshape", &[from, pairs], &[&n("pairs")], vec![]);
        for (name, start, end) in [("a", "zero", "one"), ("b", "one", "two")] {
            let wide = n(&format!("{name}.wide"));
            g.node("Slice", &[&n("pairs"), start, end, "last"], &[&wide], vec![]);
            g.node("Squeeze", &[&wide, "last"], &[&n(name)], vec![]);
            g.node("Mul", &[&n(name), "cos"], &[&n(&format!("{name}.cos"))], vec![]);
            g.node("Mul", &[&n(name), "sin"], &[&n(&format!("{name}.sin"))], vec![]);
        }
        g.node("Sub", &[&n("a.cos"), &n("b.sin")], &[&n("first")], vec![]);
        g.node("Add", &[&n("a.sin"), &n("b.cos")], &[&n("second")], vec![]);
        for name in ["first", "second"] {
            g.node("Unsqueeze", &[&n(name), "last"], &[&n(&format!("{name}.wide"))], vec![]);
        }
        g.node("Concat", &[&n("first.wide"), &n("second.wide")], &[&n("joined")], vec![super::graph::int("axis", -1)]);
        g.node("Reshape", &[&n("joined"), heads], &[to], vec![]);
    }
}
