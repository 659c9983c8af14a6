//! Writes folders as onnxruntime-genai's model builder does, from the very weights of a GGUF draft; and such as
//! no builder would write: every name, shape, offset and attribute can be made to lie.
//!
//! The protobuf is written by hand, so that the reader's messages are not held against themselves.

use std::{fs, path::Path};

use half::f16;
use serde_json::{Value as Json, json};

use super::gguf::{self, Value};

/// A folder before it is files.
#[derive(Clone)]
pub struct Folder {
    pub config: Json,
    pub tokenizer: Json,
    pub tokenizer_config: Json,
    pub template: Option<String>,
    pub nodes: Vec<Node>,
    pub initializers: Vec<Initializer>,
    /// Cut off, or put behind.
    pub data_bytes: Option<usize>,
    pub graph_bytes: Option<usize>,
    pub more_graph: Vec<u8>,
}

#[derive(Clone)]
pub struct Node {
    pub name: String,
    pub domain: &'static str,
    pub op: String,
    pub inputs: Vec<String>,
    pub outputs: Vec<String>,
    pub attributes: Vec<(String, Attribute)>,
}

#[derive(Clone)]
pub enum Attribute {
    Int(i64),
    Float(f32),
    Ints(Vec<i64>),
    /// Of 64-bit integers.
    Tensor(Vec<i64>, Vec<i64>),
}

#[derive(Clone)]
pub struct Initializer {
    pub name: String,
    pub dims: Vec<i64>,
    pub ty: i32,
    pub data: Vec<u8>,
    pub location: String,
    /// Where these are stated, the file says them whatever is so.
    pub offset: Option<String>,
    pub length: Option<String>,
}

/// How the builder was told to put it together.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// One matrix for Q, K and V.
    pub is_fused: bool,
    /// The head's matrix is the table of embeddings. Where it is not, zero points are stored.
    pub is_shared: bool,
    /// Codes that have a scale together.
    pub block: usize,
}

pub const LAYOUTS: [Layout; 3] = [
    Layout { is_fused: true, is_shared: true, block: 32 },
    Layout { is_fused: false, is_shared: false, block: 64 },
    // Longer than a row: the rest is padding.
    Layout { is_fused: true, is_shared: true, block: 128 },
];

const F32: i32 = 1;
const U8: i32 = 2;
const CONTEXT: usize = 128;
const BLOCK: usize = 32;

impl Folder {
    pub fn write(&self, folder: &Path) {
        fs::create_dir_all(folder).expect("a folder");
        let put = |name: &str, bytes: &[u8]| fs::write(folder.join(name), bytes).expect("a file");
        let (mut graph, data) = self.encode();
        graph.truncate(self.graph_bytes.unwrap_or(usize::MAX));
        put("model.onnx", &graph);
        put("model.onnx.data", &data[..self.data_bytes.unwrap_or(data.len())]);
        put("genai_config.json", self.config.to_string().as_bytes());
        put("tokenizer.json", self.tokenizer.to_string().as_bytes());
        put("tokenizer_config.json", self.tokenizer_config.to_string().as_bytes());
        if let Some(template) = &self.template {
            put("chat_template.jinja", template.as_bytes());
        }
    }

    pub fn node(&mut self, name: &str) -> &mut Node {
        self.nodes.iter_mut().find(|node| node.name.contains(name)).unwrap_or_else(|| panic!("no node {name}"))
    }

    pub fn initializer(&mut self, name: &str) -> &mut Initializer {
        let found = self.initializers.iter_mut().find(|initializer| initializer.name.contains(name));
        found.unwrap_or_else(|| panic!("no initializer {name}"))
    }

    /// `model.onnx` and the data beside it.
    fn encode(&self) -> (Vec<u8>, Vec<u8>) {
        let (mut graph, mut data) = (Vec::new(), Vec::new());
        for node in &self.nodes {
            field(&mut graph, 1, &node.encode());
        }
        field(&mut graph, 2, b"main_graph");
        for initializer in &self.initializers {
            field(&mut graph, 5, &initializer.encode(data.len()));
            data.extend(&initializer.data);
        }
        for input in ["input_ids", "attention_mask"] {
            field(&mut graph, 11, &value_info(input, 7, &[None, None]));
        }
        let kv = [None, Some(1), None, Some(32)];
        for part in ["key", "value"] {
            field(&mut graph, 11, &value_info(&format!("past_key_values.0.{part}"), 1, &kv));
            field(&mut graph, 12, &value_info(&format!("present.0.{part}"), 1, &kv));
        }
        field(&mut graph, 12, &value_info("logits", 1, &[None, None, Some(gguf::VOCABULARY as i64)]));
        graph.extend(&self.more_graph);
        let mut model = Vec::new();
        number(&mut model, 1, 10);
        field(&mut model, 2, b"onnxruntime-genai");
        field(&mut model, 7, &graph);
        for (domain, version) in [("", 21), ("com.microsoft", 1)] {
            let mut opset = Vec::new();
            field(&mut opset, 1, domain.as_bytes());
            number(&mut opset, 2, version);
            field(&mut model, 8, &opset);
        }
        (model, data)
    }
}

impl Node {
    pub fn set(&mut self, name: &str, value: Attribute) {
        self.attributes.retain(|(known, _)| known != name);
        self.attributes.push((name.to_owned(), value));
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.inputs.iter().for_each(|input| field(&mut out, 1, input.as_bytes()));
        self.outputs.iter().for_each(|output| field(&mut out, 2, output.as_bytes()));
        field(&mut out, 3, self.name.as_bytes());
        field(&mut out, 4, self.op.as_bytes());
        for (name, value) in &self.attributes {
            let mut attribute = Vec::new();
            field(&mut attribute, 1, name.as_bytes());
            match value {
                Attribute::Float(x) => {
                    attribute.push(2 << 3 | 5);
                    attribute.extend(x.to_le_bytes());
                    number(&mut attribute, 20, 1);
                }
                Attribute::Int(n) => {
                    number(&mut attribute, 3, *n);
                    number(&mut attribute, 20, 2);
                }
                Attribute::Ints(list) => {
                    list.iter().for_each(|n| number(&mut attribute, 8, *n));
                    number(&mut attribute, 20, 7);
                }
                Attribute::Tensor(dims, numbers) => {
                    let mut tensor = Vec::new();
                    dims.iter().for_each(|dim| number(&mut tensor, 1, *dim));
                    number(&mut tensor, 2, 7);
                    field(&mut tensor, 9, &numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>());
                    field(&mut attribute, 5, &tensor);
                    number(&mut attribute, 20, 4);
                }
            }
            field(&mut out, 5, &attribute);
        }
        field(&mut out, 7, self.domain.as_bytes());
        out
    }
}

impl Initializer {
    fn encode(&self, offset: usize) -> Vec<u8> {
        let mut out = Vec::new();
        self.dims.iter().for_each(|dim| number(&mut out, 1, *dim));
        number(&mut out, 2, i64::from(self.ty));
        field(&mut out, 8, self.name.as_bytes());
        let or = |stated: &Option<String>, so: usize| stated.clone().unwrap_or_else(|| so.to_string());
        for (key, value) in [
            ("location", self.location.clone()),
            ("offset", or(&self.offset, offset)),
            ("length", or(&self.length, self.data.len())),
        ] {
            let mut entry = Vec::new();
            field(&mut entry, 1, key.as_bytes());
            field(&mut entry, 2, value.as_bytes());
            field(&mut out, 13, &entry);
        }
        number(&mut out, 14, 1);
        out
    }
}

fn varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// A field of bytes: a text, or a message.
pub fn field(out: &mut Vec<u8>, tag: u64, bytes: &[u8]) {
    varint(out, tag << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn number(out: &mut Vec<u8>, tag: u64, n: i64) {
    varint(out, tag << 3);
    varint(out, n.cast_unsigned());
}

fn value_info(name: &str, ty: i64, dims: &[Option<i64>]) -> Vec<u8> {
    let mut shape = Vec::new();
    for (at, dim) in dims.iter().enumerate() {
        let mut one = Vec::new();
        match dim {
            Some(dim) => number(&mut one, 1, *dim),
            None => field(&mut one, 2, format!("{name}.{at}").as_bytes()),
        }
        field(&mut shape, 1, &one);
    }
    let (mut tensor, mut of, mut out) = (Vec::new(), Vec::new(), Vec::new());
    number(&mut tensor, 1, ty);
    field(&mut tensor, 2, &shape);
    field(&mut of, 1, &tensor);
    field(&mut out, 1, name.as_bytes());
    field(&mut out, 2, &of);
    out
}

/// The rows of a matrix.
#[derive(Clone)]
struct Rows {
    columns: usize,
    rows: Vec<Row>,
}

#[derive(Clone)]
struct Row {
    /// Where the type has codes: those, and a scale for each block.
    codes: Vec<u8>,
    scales: Vec<f32>,
    numbers: Vec<f32>,
}

/// `small_model` of the same type (0 F32, 2 Q4_0, 8 Q8_0), as the builder would have written it.
pub fn small_folder(matrix_type: u32, layout: Layout) -> Folder {
    let source = gguf::small_model(matrix_type);
    let rows = |name: &str| {
        let name = format!("{name}.weight");
        let tensor = source.tensors.iter().find(|tensor| tensor.name.bytes == name.as_bytes()).expect("a tensor");
        read(tensor)
    };
    let bits = if matrix_type == 8 { 8 } else { 4 };
    let mut build = Builder { bits, layout, nodes: Vec::new(), initializers: Vec::new() };
    build.lengths();
    let embedded = build.embedding(&rows("token_embd"));
    build.layer(&rows, &embedded);
    build.linear("/lm_head/MatMul", &rows("token_embd"), "/model/layers.1/final_norm_layernorm/output_0", "logits");
    let Builder { nodes, initializers, .. } = build;
    let (tokenizer, tokenizer_config) = tokenizer(&source);
    Folder {
        config: config(),
        tokenizer,
        tokenizer_config,
        template: Some("{% for m in messages %}<|a|>{{ m.content }}<|b|>{% endfor %}".to_owned()),
        nodes,
        initializers,
        data_bytes: None,
        graph_bytes: None,
        more_graph: Vec::new(),
    }
}

fn config() -> Json {
    json!({
        "model": {
            "bos_token_id": 258,
            "context_length": CONTEXT,
            "decoder": {
                "session_options": { "log_id": "onnxruntime-genai", "provider_options": [] },
                "filename": "model.onnx",
                "head_size": 32,
                "hidden_size": 64,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "num_key_value_heads": 1,
            },
            "eos_token_id": [259],
            "pad_token_id": 259,
            "type": "llama",
            "vocab_size": gguf::VOCABULARY,
        },
        "search": { "do_sample": false, "max_length": CONTEXT },
    })
}

/// The tokens of a GGUF draft, as the `tokenizers` library writes them.
fn tokenizer(source: &gguf::Draft) -> (Json, Json) {
    let texts = |key: &str| {
        let (_, value) = source.keys.iter().find(|(name, _)| name.bytes == key.as_bytes()).expect("a key");
        let Value::Array { items, .. } = value else { panic!("{key} is a list") };
        let text = |item: &Value| match item {
            Value::Text(text) => String::from_utf8(text.bytes.clone()).expect("a text"),
            _ => panic!("{key} is of texts"),
        };
        items.iter().map(text).collect::<Vec<_>>()
    };
    let tokens = texts("tokenizer.ggml.tokens");
    let control = [258, 259].map(|id: usize| (id, tokens[id].clone()));
    let facts = json!({ "bos_token": tokens[258], "eos_token": tokens[259], "model_max_length": CONTEXT });
    (tokenizer_json(&tokens, &texts("tokenizer.ggml.merges"), &control), facts)
}

/// `tokenizer.json` of byte-level BPE that takes digits one by one, as SmolLM's does.
pub fn tokenizer_json(tokens: &[String], merges: &[String], control: &[(usize, String)]) -> Json {
    let vocab: serde_json::Map<_, _> = tokens.iter().zip(0..).map(|(token, id)| (token.clone(), json!(id))).collect();
    let added = control.iter().map(|(id, text)| {
        json!({
            "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    });
    let merges = merges.iter().map(|merge| merge.split(' ').collect::<Vec<_>>()).collect::<Vec<_>>();
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{ "type": "Digits", "individual_digits": true }, byte_level],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": {},
        },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        },
    })
}

/// Rows of a GGUF tensor: of its codes, in the order of the inputs, and of its numbers.
fn read(tensor: &gguf::Tensor) -> Rows {
    let (columns, count) = (tensor.dims[0] as usize, tensor.dims[1..].iter().product::<u64>() as usize);
    let bytes = tensor.data.len() / count;
    let row = |bytes: &[u8]| {
        let mut row = Row { codes: Vec::new(), scales: Vec::new(), numbers: Vec::new() };
        let (numbers, size) = gguf::block(tensor.ty).expect("a known type");
        if numbers == 1 {
            row.numbers = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            return row;
        }
        for block in bytes.chunks_exact(size as usize) {
            let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
            row.scales.push(scale);
            for i in 0..BLOCK {
                let (code, zero) = match tensor.ty {
                    2 if i < 16 => (block[2 + i] & 15, 8),
                    2 => (block[2 + i - 16] >> 4, 8),
                    _ => (block[2 + i] ^ 0x80, 128),
                };
                row.codes.push(code);
                row.numbers.push(scale * (f32::from(code) - zero as f32));
            }
        }
        row
    };
    Rows { columns, rows: tensor.data.chunks_exact(bytes).map(row).collect() }
}

/// Rows of Q or K from GGUF's order, where neighbours are a pair, to halves of a head.
fn in_halves(matrix: Rows, head: usize) -> Rows {
    let from = |at: usize| at / head * head + at % head % (head / 2) * 2 + at % head / (head / 2);
    let rows = (0..matrix.rows.len()).map(|at| matrix.rows[from(at)].clone()).collect();
    Rows { rows, ..matrix }
}

struct Builder {
    bits: usize,
    layout: Layout,
    nodes: Vec<Node>,
    initializers: Vec<Initializer>,
}

impl Builder {
    fn put(&mut self, name: &str, dims: &[usize], ty: i32, data: Vec<u8>) {
        let dims = dims.iter().map(|dim| *dim as i64).collect();
        let location = "model.onnx.data".to_owned();
        self.initializers.push(Initializer {
            name: name.to_owned(),
            dims,
            ty,
            data,
            location,
            offset: None,
            length: None,
        });
    }

    fn add(&mut self, op: &str, name: &str, inputs: &[&str], outputs: &[&str], attributes: Vec<(&str, Attribute)>) {
        let contributed = ["MatMulNBits", "GroupQueryAttention", "SkipSimplifiedLayerNormalization"];
        let is_contributed = contributed.contains(&op) || op == "GatherBlockQuantized";
        self.nodes.push(Node {
            name: name.to_owned(),
            domain: if is_contributed { "com.microsoft" } else { "" },
            op: op.to_owned(),
            inputs: inputs.iter().map(|&input| input.to_owned()).collect(),
            outputs: outputs.iter().map(|&output| output.to_owned()).collect(),
            attributes: attributes.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        });
    }

    fn plain(&mut self, op: &str, name: &str, inputs: &[&str], attributes: Vec<(&str, Attribute)>) -> String {
        let output = format!("{name}/output_0");
        self.add(op, name, inputs, &[&output], attributes);
        output
    }

    fn constant(&mut self, dims: &[i64], numbers: &[i64]) -> String {
        let what = if dims.is_empty() { numbers[0].to_string() } else { format!("{numbers:?}") };
        let output = format!("/model/constants/INT64/{what}");
        let value = Attribute::Tensor(dims.to_vec(), numbers.to_vec());
        self.add("Constant", &format!("/model/constant_nodes/INT64/{what}"), &[], &[&output], vec![("value", value)]);
        output
    }

    fn lengths(&mut self) {
        let n = |part: &str| format!("/model/attn_mask_reformat/attn_mask_subgraph/{part}");
        let (list, scalar) = (self.constant(&[1], &[1]), self.constant(&[], &[1]));
        let keep = vec![("keepdims", Attribute::Int(0))];
        let sum = self.plain("ReduceSum", &n("ReduceSum"), &["attention_mask", &list], keep);
        let less = self.plain("Sub", &n("Sub"), &[&sum, &list], vec![]);
        self.plain("Cast", &n("Sub/Cast"), &[&less], vec![("to", Attribute::Int(6))]);
        let shape = self.plain("Shape", &n("Shape"), &["attention_mask"], vec![]);
        let taken = self.plain("Gather", &n("Gather"), &[&shape, &scalar], vec![("axis", Attribute::Int(0))]);
        self.plain("Cast", &n("Gather/Cast"), &[&taken], vec![("to", Attribute::Int(6))]);
    }

    /// What the embeddings are called.
    fn embedding(&mut self, table: &Rows) -> String {
        let (rows, columns, block) = (table.rows.len(), table.columns, self.layout.block);
        if !self.layout.is_shared {
            let bytes = table.rows.iter().flat_map(|row| &row.numbers).flat_map(|x| x.to_le_bytes()).collect();
            self.put("model.embed_tokens.weight", &[rows, columns], F32, bytes);
            let inputs = ["model.embed_tokens.weight", "input_ids"];
            self.plain("Gather", "/model/embed_tokens/Gather", &inputs, vec![])
        } else if table.rows[0].codes.is_empty() {
            let perm = vec![("perm", Attribute::Ints(vec![1, 0]))];
            let turned = self.plain("Transpose", "/model/embed_tokens/Transpose", &["lm_head.MatMul.weight"], perm);
            self.plain("Gather", "/model/embed_tokens/Gather", &[&turned, "input_ids"], vec![])
        } else {
            let codes = format!("lm_head.MatMul.weight_Q{}", self.bits);
            let padded = columns.next_multiple_of(block);
            let shape = self.constant(&[2], &[rows as i64, (padded * self.bits / 8) as i64]);
            let flat = self.plain("Reshape", "/model/embed_tokens/Reshape", &[&codes, &shape], vec![]);
            let attributes = vec![
                ("bits", Attribute::Int(self.bits as i64)),
                ("block_size", Attribute::Int(block as i64)),
                ("gather_axis", Attribute::Int(0)),
                ("quantize_axis", Attribute::Int(1)),
            ];
            let inputs = [&flat, "input_ids", "lm_head.MatMul.weight_scales"];
            let name = "/model/embed_tokens/GatherBlockQuantized";
            let gathered = self.plain("GatherBlockQuantized", name, &inputs, attributes);
            if padded == columns {
                return gathered;
            }
            let [from, to, axis] = [0, columns as i64, -1].map(|n| self.constant(&[1], &[n]));
            self.plain("Slice", "/model/embed_tokens/Slice", &[&gathered, &from, &to, &axis], vec![])
        }
    }

    fn layer(&mut self, rows: &dyn Fn(&str) -> Rows, embedded: &str) {
        let n = |part: &str| format!("/model/layers.0/{part}");
        let epsilon = || ("epsilon", Attribute::Float(1e-5));
        self.norm("model.layers.0.input_layernorm.weight", &rows("blk.0.attn_norm"));
        let attributes = vec![epsilon(), ("axis", Attribute::Int(-1)), ("stash_type", Attribute::Int(1))];
        let inputs = [embedded, "model.layers.0.input_layernorm.weight"];
        let normed = n("input_layernorm/output_0");
        self.add("SimplifiedLayerNormalization", &n("input_layernorm/LayerNorm"), &inputs, &[&normed], attributes);

        let q = in_halves(rows("blk.0.attn_q"), 32);
        let k = in_halves(rows("blk.0.attn_k"), 32);
        let v = rows("blk.0.attn_v");
        let mut taken = [const { String::new() }; 3];
        if self.layout.is_fused {
            let all = Rows { columns: q.columns, rows: [q.rows, k.rows, v.rows].concat() };
            taken[0] = self.product(&n("attn/qkv_proj/MatMul"), &all, &normed);
        } else {
            for ((part, matrix), taken) in [("q", q), ("k", k), ("v", v)].into_iter().zip(&mut taken) {
                *taken = self.product(&n(&format!("attn/{part}_proj/MatMul")), &matrix, &normed);
            }
        }
        self.attention([&taken[0], &taken[1], &taken[2]]);
        let output = rows("blk.0.attn_output");
        let added = self.product(&n("attn/o_proj/MatMul"), &output, &n("attn/GroupQueryAttention/output_0"));

        self.norm("model.layers.0.post_attention_layernorm.weight", &rows("blk.0.ffn_norm"));
        let inputs = [embedded, &added, "model.layers.0.post_attention_layernorm.weight"];
        let (normed, sum) = (n("post_attention_layernorm/output_0"), n("post_attention_layernorm/output_3"));
        let (op, name) = ("SkipSimplifiedLayerNormalization", n("post_attention_layernorm/SkipLayerNorm"));
        self.add(op, &name, &inputs, &[&normed, "", "", &sum], vec![epsilon()]);

        let gate = self.product(&n("mlp/gate_proj/MatMul"), &rows("blk.0.ffn_gate"), &normed);
        let up = self.product(&n("mlp/up_proj/MatMul"), &rows("blk.0.ffn_up"), &normed);
        let sigmoid = self.plain("Sigmoid", &n("mlp/act_fn/Sigmoid"), &[&gate], vec![]);
        let active = self.plain("Mul", &n("mlp/act_fn/Mul"), &[&gate, &sigmoid], vec![]);
        let hidden = self.plain("Mul", &n("mlp/Mul"), &[&active, &up], vec![]);
        let down = self.product(&n("mlp/down_proj/MatMul"), &rows("blk.0.ffn_down"), &hidden);

        self.norm("model.layers.1.final_norm_layernorm.weight", &rows("output_norm"));
        let inputs = [&sum, &down, "model.layers.1.final_norm_layernorm.weight"];
        let output = "/model/layers.1/final_norm_layernorm/output_0";
        self.add(op, "/model/layers.1/final_norm_layernorm/SkipLayerNorm", &inputs, &[output], vec![epsilon()]);
    }

    fn attention(&mut self, [q, k, v]: [&str; 3]) {
        for (name, turn) in [("cos_cache", f32::cos as fn(f32) -> f32), ("sin_cache", f32::sin)] {
            let angle = |at: usize| (at / 16) as f32 / 10_000f32.powf((at % 16) as f32 / 16.0);
            let bytes = (0..CONTEXT * 16).flat_map(|at| turn(angle(at)).to_le_bytes()).collect();
            self.put(name, &[CONTEXT, 16], F32, bytes);
        }
        let mask = "/model/attn_mask_reformat/attn_mask_subgraph";
        let (last, total) = (format!("{mask}/Sub/Cast/output_0"), format!("{mask}/Gather/Cast/output_0"));
        let inputs = [
            q,
            k,
            v,
            "past_key_values.0.key",
            "past_key_values.0.value",
            &last,
            &total,
            "cos_cache",
            "sin_cache",
            "",
            "",
            "",
        ];
        let name = "/model/layers.0/attn/GroupQueryAttention";
        let outputs = [&format!("{name}/output_0"), "present.0.key", "present.0.value"];
        let attributes = vec![
            ("num_heads", Attribute::Int(2)),
            ("kv_num_heads", Attribute::Int(1)),
            ("scale", Attribute::Float(1.0 / 32f32.sqrt())),
            ("local_window_size", Attribute::Int(-1)),
            ("softcap", Attribute::Float(0.0)),
            ("do_rotary", Attribute::Int(1)),
            ("rotary_interleaved", Attribute::Int(0)),
        ];
        self.add("GroupQueryAttention", name, &inputs, &outputs, attributes);
    }

    fn norm(&mut self, name: &str, weights: &Rows) {
        let bytes = weights.rows.iter().flat_map(|row| &row.numbers).flat_map(|x| x.to_le_bytes()).collect();
        self.put(name, &[64], F32, bytes);
    }

    /// What the product is called, whatever becomes of the node.
    fn product(&mut self, name: &str, matrix: &Rows, from: &str) -> String {
        let output = format!("{name}/output_0");
        self.linear(name, matrix, from, &output);
        output
    }

    fn linear(&mut self, name: &str, matrix: &Rows, from: &str, to: &str) {
        let weight = format!("{}.weight", name[1..].replace('/', "."));
        let (rows, columns) = (matrix.rows.len(), matrix.columns);
        if matrix.rows[0].codes.is_empty() {
            let at = |column: usize| matrix.rows.iter().map(move |row| row.numbers[column]);
            let bytes = (0..columns).flat_map(at).flat_map(f32::to_le_bytes).collect();
            self.put(&weight, &[columns, rows], F32, bytes);
            self.add("MatMul", name, &[from, &weight], &[to], vec![]);
            return;
        }
        let (block, zero) = (self.layout.block, 1u8 << (self.bits - 1));
        let blocks = columns.div_ceil(block);
        let (codes, scales) = (format!("{weight}_Q{}", self.bits), format!("{weight}_scales"));
        let pack = |mut row: Vec<u8>, to: usize| {
            row.resize(to, zero);
            match self.bits {
                8 => row,
                _ => row.chunks(2).map(|pair| pair[0] | pair.get(1).unwrap_or(&0) << 4).collect(),
            }
        };
        let packed = matrix.rows.iter().flat_map(|row| pack(row.codes.clone(), blocks * block)).collect();
        let zeros: Vec<u8> = (0..rows).flat_map(|_| pack(vec![zero; blocks], blocks)).collect();
        self.put(&codes, &[rows, blocks, block * self.bits / 8], U8, packed);
        let scale = |scales: &[f32]| {
            assert!(scales.iter().all(|scale| *scale == scales[0]), "a block has one scale");
            scales[0].to_le_bytes()
        };
        let bytes = matrix.rows.iter().flat_map(|row| row.scales.chunks(block / BLOCK).flat_map(scale)).collect();
        self.put(&scales, &[rows, blocks], F32, bytes);
        let mut inputs = vec![from, &codes, &scales];
        let zero_points = format!("{weight}_zero_points");
        if !self.layout.is_shared {
            self.put(&zero_points, &[rows, zeros.len() / rows], U8, zeros);
            inputs.push(&zero_points);
        }
        let attributes = vec![
            ("K", Attribute::Int(columns as i64)),
            ("N", Attribute::Int(rows as i64)),
            ("accuracy_level", Attribute::Int(4)),
            ("bits", Attribute::Int(self.bits as i64)),
            ("block_size", Attribute::Int(block as i64)),
        ];
        let name = format!("{name}_Q{}", self.bits);
        self.add("MatMulNBits", &name, &inputs, &[to], attributes);
    }
}
