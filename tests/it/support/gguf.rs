//! Writes GGUF files, sound ones and such as no sound program would write: every count, length, type and
//! offset can be made to lie.

/// A file before it is bytes.
#[derive(Clone, Debug)]
pub struct Draft {
    pub magic: [u8; 4],
    pub version: u32,
    /// Where these are stated, the file says them whatever it holds.
    pub key_count: Option<u64>,
    pub tensor_count: Option<u64>,
    pub keys: Vec<(Text, Value)>,
    pub tensors: Vec<Tensor>,
    pub alignment: usize,
}

#[derive(Clone, Debug)]
pub struct Text {
    pub bytes: Vec<u8>,
    pub len: Option<u64>,
}

#[derive(Clone, Debug)]
pub enum Value {
    U8(u8),
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
    Bool(u8),
    Text(Text),
    Array {
        ty: u32,
        len: Option<u64>,
        items: Vec<Self>,
    },
    /// Of a type that says nothing of the bytes.
    Raw {
        ty: u32,
        bytes: Vec<u8>,
    },
}

#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: Text,
    pub dimensions: Option<u32>,
    pub dims: Vec<u64>,
    pub ty: u32,
    pub offset: Option<u64>,
    pub data: Vec<u8>,
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self { bytes: text.into(), len: None }
    }
}

impl Text {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.len.unwrap_or(self.bytes.len() as u64).to_le_bytes());
        out.extend(&self.bytes);
    }
}

impl Value {
    pub fn ty(&self) -> u32 {
        match self {
            Self::U8(_) => 0,
            Self::U32(_) => 4,
            Self::I32(_) => 5,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::Text(_) => 8,
            Self::Array { .. } => 9,
            Self::U64(_) => 10,
            Self::Raw { ty, .. } => *ty,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::U8(x) | Self::Bool(x) => out.push(*x),
            Self::U32(x) => out.extend(x.to_le_bytes()),
            Self::I32(x) => out.extend(x.to_le_bytes()),
            Self::U64(x) => out.extend(x.to_le_bytes()),
            Self::F32(x) => out.extend(x.to_le_bytes()),
            Self::Text(text) => text.write(out),
            Self::Array { ty, len, items } => {
                out.extend(ty.to_le_bytes());
                out.extend(len.unwrap_or(items.len() as u64).to_le_bytes());
                items.iter().for_each(|item| item.write(out));
            }
            Self::Raw { bytes, .. } => out.extend(bytes),
        }
    }
}

impl Draft {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.magic);
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.key_count.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (name, value) in &self.keys {
            name.write(&mut out);
            out.extend(value.ty().to_le_bytes());
            value.write(&mut out);
        }
        let mut data = Vec::<u8>::new();
        for tensor in &self.tensors {
            data.resize(data.len().next_multiple_of(self.alignment), 0);
            tensor.name.write(&mut out);
            out.extend(tensor.dimensions.unwrap_or(tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor.ty.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }
}

const WIDTH: u64 = 64;
const KV_WIDTH: u64 = 32;
const FFN_WIDTH: u64 = 96;
/// All bytes, two merges, two control tokens.
pub const VOCABULARY: usize = 260;

/// A whole model of one small layer, of matrices of the given type (0 F32, 2 Q4_0, 3 Q4_1, 8 Q8_0).
pub fn small_model(matrix_type: u32) -> Draft {
    let text = |name: &str, text: &str| (name.into(), Value::Text(text.into()));
    let number = |name: &str, number: u32| (name.into(), Value::U32(number));
    let mut keys: Vec<(Text, Value)> = vec![
        text("general.architecture", "llama"),
        number("llama.block_count", 1),
        number("llama.embedding_length", WIDTH as u32),
        number("llama.feed_forward_length", FFN_WIDTH as u32),
        number("llama.attention.head_count", 2),
        number("llama.attention.head_count_kv", 1),
        number("llama.context_length", 128),
        ("llama.rope.freq_base".into(), Value::F32(10_000.0)),
        ("llama.attention.layer_norm_rms_epsilon".into(), Value::F32(1e-5)),
        text("tokenizer.ggml.model", "gpt2"),
        text("tokenizer.ggml.pre", "smollm"),
        number("tokenizer.ggml.bos_token_id", 258),
        number("tokenizer.ggml.eos_token_id", 259),
        ("tokenizer.ggml.add_bos_token".into(), Value::Bool(0)),
        text("tokenizer.chat_template", "{% for m in messages %}<|a|>{{ m.content }}<|b|>{% endfor %}"),
    ];
    let list = |ty, items| Value::Array { ty, len: None, items };
    let mut tokens: Vec<String> = (0..=255u8).map(spelled).collect();
    tokens.extend(["he", "ll", "<|a|>", "<|b|>"].map(str::to_owned));
    let kinds = (0..VOCABULARY).map(|id| Value::I32(if id < 258 { 1 } else { 3 })).collect();
    let tokens = tokens.iter().map(|token| Value::Text(token.as_str().into())).collect();
    keys.push(("tokenizer.ggml.tokens".into(), list(8, tokens)));
    keys.push(("tokenizer.ggml.token_type".into(), list(5, kinds)));
    let merges = ["h e", "l l"].map(|merge| Value::Text(merge.into())).into();
    keys.push(("tokenizer.ggml.merges".into(), list(8, merges)));

    let matrix = |name: &str, inputs: u64, outputs: u64| tensor(name, &[inputs, outputs], matrix_type);
    let tensors = vec![
        matrix("token_embd.weight", WIDTH, VOCABULARY as u64),
        tensor("output_norm.weight", &[WIDTH], 0),
        tensor("blk.0.attn_norm.weight", &[WIDTH], 0),
        matrix("blk.0.attn_q.weight", WIDTH, WIDTH),
        matrix("blk.0.attn_k.weight", WIDTH, KV_WIDTH),
        matrix("blk.0.attn_v.weight", WIDTH, KV_WIDTH),
        matrix("blk.0.attn_output.weight", WIDTH, WIDTH),
        tensor("blk.0.ffn_norm.weight", &[WIDTH], 0),
        matrix("blk.0.ffn_gate.weight", WIDTH, FFN_WIDTH),
        matrix("blk.0.ffn_up.weight", WIDTH, FFN_WIDTH),
        matrix("blk.0.ffn_down.weight", FFN_WIDTH, WIDTH),
    ];
    Draft { magic: *b"GGUF", version: 3, key_count: None, tensor_count: None, keys, tensors, alignment: 32 }
}

/// Numbers and bytes of one block.
pub fn block(ty: u32) -> Option<(u64, u64)> {
    Some(match ty {
        0 => (1, 4),
        1 | 30 => (1, 2),
        2 => (32, 18),
        3 => (32, 20),
        8 => (32, 34),
        _ => return None,
    })
}

fn tensor(name: &str, dims: &[u64], ty: u32) -> Tensor {
    let (numbers, bytes) = block(ty).expect("a known type");
    let blocks = dims.iter().product::<u64>() / numbers;
    let mut data = Vec::new();
    for at in 0..blocks {
        let mut one: Vec<u8> = (0..bytes).map(|i| (at * 31 + i * 7) as u8).collect();
        match ty {
            0 => one = (0.01 + (at % 17) as f32 / 100.0).to_le_bytes().into(),
            // A scale of 1/64 in half precision, and an offset of zero where there is one.
            _ => one[..2].copy_from_slice(&0x2400u16.to_le_bytes()),
        }
        if ty == 3 {
            one[2..4].fill(0);
        }
        data.extend(one);
    }
    Tensor { name: name.into(), dimensions: None, dims: dims.into(), ty, offset: None, data }
}

/// GPT-2's printable spelling of a byte.
fn spelled(byte: u8) -> String {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code =
        if printable(byte) { u32::from(byte) } else { 0x100 + (0..byte).filter(|b| !printable(*b)).count() as u32 };
    char::from_u32(code).expect("a character").to_string()
}
