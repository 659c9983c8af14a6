//! Reader of the GGUF container, versions 2 and 3 (little endian).
//!
//! Promises that no count, length or offset of the file is believed before it was held against the
//! file's size, so that a truncated or hostile file is an error and never an allocation of its choosing.
//! The data is mapped, not copied. Never interprets what the keys mean.
//!
//! Source: the format's specification, `docs/gguf.md` of the ggml project.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    path::Path,
};

use memmap2::Mmap;

use super::{ModelError, TensorInfo};

const MAGIC: &[u8; 4] = b"GGUF";
const ALIGNMENT_DEFAULT: u64 = 32;
const ENTRIES_MAX: u64 = 1 << 16;
const DIMENSIONS_MAX: u32 = 4;
const ARRAY_DEPTH_MAX: u32 = 2;
/// Of all lists together: the largest vocabularies, with their scores and merges, have not a million.
const LISTED_MAX: u64 = 1 << 22;

/// How the numbers of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

impl TensorType {
    fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::Bf16,
            _ => return None,
        })
    }

    /// (numbers, bytes) of one block.
    pub fn block(self) -> (u64, u64) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }
}

#[derive(Clone, Debug)]
pub struct GgufTensor {
    /// Innermost first, as the file has them: `[columns, rows]`.
    pub dims: Vec<u64>,
    pub ty: TensorType,
    offset: usize,
    bytes: usize,
}

impl GgufTensor {
    pub fn info(&self) -> TensorInfo {
        TensorInfo::new(self.dims.clone(), format!("{:?}", self.ty), self.bytes as u64, self.affine_bits())
    }
}

#[derive(Clone, Debug)]
enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Vec<Value>),
}

/// An open model file.
pub struct Gguf {
    map: Mmap,
    metadata: HashMap<String, Value>,
    tensors: BTreeMap<String, GgufTensor>,
}

impl Gguf {
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        // SAFETY: the file is mapped read-only. Another process that truncates it could raise SIGBUS;
        // model files are written once under a temporary name and renamed.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Self::parse(map)
    }

    fn parse(map: Mmap) -> Result<Self, ModelError> {
        let mut reader = Reader { data: &map, at: 0, listed: 0 };
        if reader.take(4, "magic").ok() != Some(MAGIC) {
            return Err(ModelError::NotGguf);
        }
        let version = reader.u32("version")?;
        if !(2..=3).contains(&version) {
            return Err(ModelError::Version(version));
        }
        let tensor_count = reader.count("tensor count")?;
        let key_count = reader.count("key count")?;
        let mut metadata = HashMap::new();
        for _ in 0..key_count {
            let key = reader.string("key")?;
            let ty = reader.u32("type of a key")?;
            let value = reader.value(ty, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(ModelError::Corrupted(format!("key `{key}` stands twice")));
            }
        }
        let mut tensors = BTreeMap::new();
        for _ in 0..tensor_count {
            let (name, info) = reader.tensor()?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(ModelError::Corrupted(format!("tensor `{name}` stands twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT_DEFAULT,
            Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
            Some(_) => return Err(ModelError::Corrupted("general.alignment is not a power of two".into())),
        };
        let base = (reader.at as u64).next_multiple_of(alignment) as usize;
        for info in tensors.values_mut() {
            let truncated =
                ModelError::Truncated { what: "tensor data", at: info.offset as u64, size: map.len() as u64 };
            let Some(offset) = base.checked_add(info.offset) else { return Err(truncated) };
            if offset.checked_add(info.bytes).is_none_or(|end| end > map.len()) {
                return Err(truncated);
            }
            info.offset = offset;
        }
        Ok(Self { map, metadata, tensors })
    }

    /// Drops the file's pages from this process's memory; a later access reads them from the file again.
    pub fn release_pages(&self) {
        // SAFETY: the mapping is read-only and backed by the file, so no data is lost. A failure costs memory
        // and nothing else.
        let _ = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }

    pub fn tensor(&self, name: &str) -> Result<&GgufTensor, ModelError> {
        self.tensors.get(name).ok_or_else(|| ModelError::MissingTensor(name.to_owned()))
    }

    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor's stored bytes.
    pub fn bytes(&self, info: &GgufTensor) -> &[u8] {
        &self.map[info.offset..info.offset + info.bytes]
    }

    pub fn u64(&self, key: &str) -> Result<u64, ModelError> {
        match self.value(key)? {
            Value::Unsigned(n) => Ok(*n),
            Value::Signed(n) if *n >= 0 => Ok(n.unsigned_abs()),
            _ => Err(ModelError::WrongType { key: key.into(), expected: "a whole number that is not negative" }),
        }
    }

    /// Finite, also in single precision.
    pub fn f64(&self, key: &str) -> Result<f64, ModelError> {
        match self.value(key)? {
            Value::Float(x) if (*x as f32).is_finite() => Ok(*x),
            _ => Err(ModelError::WrongType { key: key.into(), expected: "a finite decimal number" }),
        }
    }

    pub fn bool(&self, key: &str) -> Result<bool, ModelError> {
        match self.value(key)? {
            Value::Bool(b) => Ok(*b),
            _ => Err(ModelError::WrongType { key: key.into(), expected: "true or false" }),
        }
    }

    pub fn str(&self, key: &str) -> Result<&str, ModelError> {
        match self.value(key)? {
            Value::String(s) => Ok(s),
            _ => Err(ModelError::WrongType { key: key.into(), expected: "a string" }),
        }
    }

    pub fn strings(&self, key: &str) -> Result<Vec<&str>, ModelError> {
        let wrong = || ModelError::WrongType { key: key.into(), expected: "a list of strings" };
        let Value::Array(items) = self.value(key)? else { return Err(wrong()) };
        items.iter().map(|v| if let Value::String(s) = v { Ok(s.as_str()) } else { Err(wrong()) }).collect()
    }

    pub fn bools(&self, key: &str) -> Result<Vec<bool>, ModelError> {
        let wrong = || ModelError::WrongType { key: key.into(), expected: "a list of true and false" };
        let Value::Array(items) = self.value(key)? else { return Err(wrong()) };
        items.iter().map(|v| if let Value::Bool(b) = v { Ok(*b) } else { Err(wrong()) }).collect()
    }

    pub fn f32s(&self, key: &str) -> Result<Vec<f32>, ModelError> {
        let wrong = || ModelError::WrongType { key: key.into(), expected: "a list of decimal numbers" };
        let Value::Array(items) = self.value(key)? else { return Err(wrong()) };
        items.iter().map(|v| if let Value::Float(x) = v { Ok(*x as f32) } else { Err(wrong()) }).collect()
    }

    pub fn i64s(&self, key: &str) -> Result<Vec<i64>, ModelError> {
        let wrong = || ModelError::WrongType { key: key.into(), expected: "a list of whole numbers" };
        let Value::Array(items) = self.value(key)? else { return Err(wrong()) };
        items
            .iter()
            .map(|v| match v {
                Value::Signed(n) => Ok(*n),
                Value::Unsigned(n) => i64::try_from(*n).map_err(|_| wrong()),
                _ => Err(wrong()),
            })
            .collect()
    }

    /// `default` where the key is absent; still an error where it is there with another type.
    pub fn or<T>(&self, result: Result<T, ModelError>, default: T) -> Result<T, ModelError> {
        match result {
            Err(ModelError::MissingKey(_)) => Ok(default),
            other => other,
        }
    }

    fn value(&self, key: &str) -> Result<&Value, ModelError> {
        self.metadata.get(key).ok_or_else(|| ModelError::MissingKey(key.to_owned()))
    }
}

struct Reader<'a> {
    data: &'a [u8],
    at: usize,
    /// Values of the lists so far.
    listed: u64,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], ModelError> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.data.len());
        let Some(end) = end else {
            return Err(ModelError::Truncated { what, at: self.at as u64, size: self.data.len() as u64 });
        };
        let bytes = &self.data[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], ModelError> {
        Ok(self.take(N, what)?.try_into().expect("take returns N bytes"))
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn count(&mut self, what: &'static str) -> Result<u64, ModelError> {
        match self.u64(what)? {
            n if n <= ENTRIES_MAX => Ok(n),
            n => Err(ModelError::Corrupted(format!("{what} is {n}, more than {ENTRIES_MAX}"))),
        }
    }

    fn string(&mut self, what: &'static str) -> Result<String, ModelError> {
        let len = self.u64(what)?;
        let bytes = self.take(usize::try_from(len).unwrap_or(usize::MAX), what)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| ModelError::Corrupted(format!("{what} is not UTF-8")))
    }

    fn value(&mut self, ty: u32, depth: u32) -> Result<Value, ModelError> {
        let what = "value of a key";
        Ok(match ty {
            0 => Value::Unsigned(u64::from(self.array::<1>(what)?[0])),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array(what)?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array(what)?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array(what)?))),
            4 => Value::Unsigned(u64::from(self.u32(what)?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array(what)?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array(what)?))),
            7 => Value::Bool(self.array::<1>(what)?[0] != 0),
            8 => Value::String(self.string(what)?),
            9 if depth < ARRAY_DEPTH_MAX => {
                let ty = self.u32(what)?;
                let len = self.u64(what)?;
                // A value takes many times its bytes in the file, so the file's size is no bound that helps.
                self.listed = self.listed.saturating_add(len);
                if self.listed > LISTED_MAX {
                    return Err(ModelError::Corrupted(format!("its lists have more than {LISTED_MAX} values")));
                }
                // An element takes at least one byte, so a longer array than the file has bytes is a lie.
                if len > (self.data.len() - self.at) as u64 {
                    return Err(ModelError::Truncated { what, at: self.at as u64, size: self.data.len() as u64 });
                }
                let mut items = Vec::with_capacity(len as usize);
                for _ in 0..len {
                    items.push(self.value(ty, depth + 1)?);
                }
                Value::Array(items)
            }
            10 => Value::Unsigned(self.u64(what)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(what)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(what)?)),
            _ => return Err(ModelError::Corrupted(format!("unknown value type {ty} at byte {}", self.at))),
        })
    }

    fn tensor(&mut self) -> Result<(String, GgufTensor), ModelError> {
        let what = "description of a tensor";
        let name = self.string(what)?;
        let dimensions = self.u32(what)?;
        if !(1..=DIMENSIONS_MAX).contains(&dimensions) {
            return Err(ModelError::Corrupted(format!("tensor `{name}` has {dimensions} dimensions")));
        }
        let dims = (0..dimensions).map(|_| self.u64(what)).collect::<Result<Vec<_>, _>>()?;
        let code = self.u32(what)?;
        let ty = TensorType::from_code(code).ok_or_else(|| ModelError::UnsupportedType { name: name.clone(), code })?;
        let (block_numbers, block_bytes) = ty.block();
        let numbers = dims.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).filter(|n| *n > 0);
        let bytes = numbers
            .filter(|_| dims[0] % block_numbers == 0)
            .and_then(|n| (n / block_numbers).checked_mul(block_bytes))
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(|| ModelError::Corrupted(format!("tensor `{name}` has the impossible shape {dims:?}")))?;
        let offset = usize::try_from(self.u64(what)?).unwrap_or(usize::MAX);
        Ok((name, GgufTensor { dims, ty, offset, bytes }))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn open(bytes: &[u8]) -> Result<Gguf, ModelError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        Gguf::open(file.path())
    }

    fn small_file() -> Vec<u8> {
        let mut b = Vec::new();
        b.extend(MAGIC);
        b.extend(3u32.to_le_bytes());
        b.extend(1u64.to_le_bytes());
        b.extend(1u64.to_le_bytes());
        let text = |b: &mut Vec<u8>, s: &str| {
            b.extend((s.len() as u64).to_le_bytes());
            b.extend(s.as_bytes());
        };
        text(&mut b, "general.architecture");
        b.extend(8u32.to_le_bytes());
        text(&mut b, "llama");
        text(&mut b, "t");
        b.extend(1u32.to_le_bytes());
        b.extend(2u64.to_le_bytes());
        b.extend(0u32.to_le_bytes());
        b.extend(0u64.to_le_bytes());
        b.resize(b.len().next_multiple_of(32), 0);
        b.extend(1.5f32.to_le_bytes());
        b.extend((-2f32).to_le_bytes());
        b
    }

    #[test]
    fn a_whole_file_is_read_and_every_truncation_of_it_is_an_error() {
        let whole = small_file();
        let gguf = open(&whole).unwrap();
        assert_eq!(gguf.str("general.architecture").unwrap(), "llama");
        let mut out = [0.0; 2];
        gguf.dequantize_rows("t", 0, &mut out).unwrap();
        assert_eq!(out, [1.5, -2.0]);
        for len in 1..whole.len() {
            assert!(open(&whole[..len]).is_err(), "{len} bytes of {}", whole.len());
        }
    }

    #[test]
    fn absurd_counts_and_lengths_are_refused_before_anything_is_allocated() {
        for at in [8usize, 16, 24] {
            let mut bytes = small_file();
            bytes[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
            assert!(open(&bytes).is_err(), "count or length at byte {at}");
        }
    }

    #[test]
    fn a_tensor_that_is_not_finite_is_refused() {
        let mut bytes = small_file();
        let at = bytes.len() - 4;
        bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
        let mut out = [0.0; 2];
        assert!(matches!(open(&bytes).unwrap().dequantize_rows("t", 0, &mut out), Err(ModelError::NotFinite(_))));
    }
}
