//! The bytes of initializers, where they lie: in `model.onnx` itself, or in a file beside it, which is mapped.
//!
//! Promises that a span lies within its file, and that its length is that of its shape. A location is the name
//! of a file in the folder and nothing else: no path leads out of it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use half::{bf16, f16};
use memmap2::Mmap;
use prost::Message;

use super::{fault, proto};
use crate::model::ModelError;

/// Files of external data; the builder writes one.
const FILES_MAX: usize = 64;
const DIMENSIONS_MAX: usize = 4;
/// What is said of where a tensor's data is: location, offset, length, checksum.
const ENTRIES_MAX: usize = 8;

/// How numbers are stored; the codes are those of ONNX's `TensorProto.DataType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    F32 = 1,
    U8 = 2,
    I64 = 7,
    F16 = 10,
    Bf16 = 16,
    U4 = 21,
    I4 = 22,
}

impl Type {
    fn from_code(code: i32) -> Option<Self> {
        use Type::{Bf16, F16, F32, I4, I64, U4, U8};
        [F32, U8, I64, F16, Bf16, U4, I4].into_iter().find(|ty| *ty as i32 == code)
    }

    fn bytes(self, numbers: usize) -> Option<usize> {
        match self {
            Self::U4 | Self::I4 => Some(numbers.div_ceil(2)),
            Self::U8 => Some(numbers),
            Self::F16 | Self::Bf16 => numbers.checked_mul(2),
            Self::F32 => numbers.checked_mul(4),
            Self::I64 => numbers.checked_mul(8),
        }
    }

    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }
}

/// A tensor of the file, checked: `data` has exactly the bytes of `dims` numbers.
#[derive(Clone)]
pub struct Initializer {
    pub name: String,
    /// Outermost first, as ONNX has them.
    pub dims: Vec<usize>,
    pub ty: Type,
    pub data: Span,
}

impl Initializer {
    /// The number at `at` of one whose numbers are floats.
    pub fn float(&self, at: usize) -> f32 {
        self.data.float(self.ty, at)
    }

    pub fn integers(&self) -> Option<Vec<i64>> {
        let (numbers, _) = self.data.bytes().as_chunks::<8>();
        (self.ty == Type::I64).then(|| numbers.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect())
    }
}

/// Bytes of a file, kept alive.
#[derive(Clone)]
pub enum Span {
    Inline(Bytes),
    Mapped { map: Arc<Mmap>, from: usize, len: usize },
}

impl Span {
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Inline(bytes) => bytes,
            Self::Mapped { map, from, len } => &map[*from..from + len],
        }
    }

    /// Whether it is the same place.
    pub fn is(&self, other: &Self) -> bool {
        std::ptr::eq(self.bytes(), other.bytes())
    }

    /// Of numbers of type `ty`, those from `from` on.
    pub fn floats(&self, ty: Type, from: usize, out: &mut [f32]) {
        let bytes = self.bytes();
        match ty {
            Type::F16 | Type::Bf16 => {
                let halves = bytes[from * 2..][..out.len() * 2].as_chunks::<2>().0;
                let of = |half: [u8; 2]| match ty {
                    Type::F16 => f16::from_le_bytes(half).to_f32(),
                    _ => bf16::from_le_bytes(half).to_f32(),
                };
                out.iter_mut().zip(halves).for_each(|(out, half)| *out = of(*half));
            }
            _ => {
                let numbers = bytes[from * 4..][..out.len() * 4].as_chunks::<4>().0;
                out.iter_mut().zip(numbers).for_each(|(out, number)| *out = f32::from_le_bytes(*number));
            }
        }
    }

    /// The one at `at`.
    pub fn float(&self, ty: Type, at: usize) -> f32 {
        let mut number = [0.0];
        self.floats(ty, at, &mut number);
        number[0]
    }
}

/// The folder, and the files of it that are mapped so far.
pub struct Files {
    folder: PathBuf,
    maps: BTreeMap<String, Arc<Mmap>>,
}

impl Files {
    pub fn of(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), maps: BTreeMap::new() }
    }

    pub fn into_maps(self) -> Vec<Arc<Mmap>> {
        self.maps.into_values().collect()
    }

    pub fn initializer(&mut self, tensor: proto::Tensor) -> Result<Initializer, ModelError> {
        let name = tensor.name.clone();
        let wrong = |why: String| fault("model.onnx", format!("initializer `{name}` {why}"));
        let ty = Type::from_code(tensor.data_type)
            .ok_or_else(|| wrong(format!("has data type {}, which is not supported", tensor.data_type)))?;
        let shape = || wrong(format!("has the impossible shape {:?}", tensor.dims));
        if tensor.dims.len() > DIMENSIONS_MAX {
            return Err(shape());
        }
        let dims = tensor.dims.iter().map(|dim| usize::try_from(*dim).ok().filter(|dim| *dim > 0));
        let dims = dims.collect::<Option<Vec<_>>>().ok_or_else(shape)?;
        let numbers = dims.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
        let bytes = numbers.and_then(|n| ty.bytes(n)).filter(|n| *n < isize::MAX as usize).ok_or_else(shape)?;
        let data = match (tensor.data_location, tensor.raw_data) {
            (0, Some(raw)) => Span::Inline(raw),
            (0, None) => Span::Inline(tensor.int64_data.iter().flat_map(|n| n.to_le_bytes()).collect()),
            _ => self.external(&name, &tensor.external_data, bytes)?,
        };
        match data.bytes().len() {
            found if found == bytes => Ok(Initializer { name, dims, ty, data }),
            found => Err(wrong(format!("has {found} bytes of data, but its shape {dims:?} wants {bytes}"))),
        }
    }

    fn external(&mut self, name: &str, entries: &[Bytes], bytes: usize) -> Result<Span, ModelError> {
        let wrong = |why: String| fault("model.onnx", format!("initializer `{name}` {why}"));
        let entries = entries.iter().take(ENTRIES_MAX).map(|entry| proto::Entry::decode(entry.clone()));
        let entries = entries.collect::<Result<Vec<_>, _>>().map_err(|_| wrong("cannot be decoded".into()))?;
        let value = |key: &str| entries.iter().find(|entry| entry.key == key).map(|entry| entry.value.as_str());
        let number = |key: &str, default: usize| match value(key) {
            Some(text) => text.parse().map_err(|_| wrong(format!("has the {key} `{}`", shortened(text)))),
            None => Ok(default),
        };
        let location = value("location").ok_or_else(|| wrong("does not say where its data is".into()))?;
        let (from, len) = (number("offset", 0)?, number("length", bytes)?);
        let map = self.map(location)?;
        match from.checked_add(len) {
            Some(end) if end <= map.len() => Ok(Span::Mapped { map, from, len }),
            _ => Err(wrong(format!(
                "has {len} bytes from byte {from} on of {location}, which has {} bytes: it is truncated or corrupted",
                map.len()
            ))),
        }
    }

    fn map(&mut self, location: &str) -> Result<Arc<Mmap>, ModelError> {
        if let Some(map) = self.maps.get(location) {
            return Ok(Arc::clone(map));
        }
        let path = file_in(&self.folder, location)?;
        if self.maps.len() == FILES_MAX {
            return Err(fault("model.onnx", format!("its data lies in more than {FILES_MAX} files")));
        }
        let io = |source| ModelError::Io { path: path.clone(), source };
        let file = File::open(&path).map_err(io)?;
        // SAFETY: the file is mapped read-only. Another process that truncates it could raise SIGBUS; models of
        // the catalogue are written elsewhere and renamed into it.
        let map = Arc::new(unsafe { Mmap::map(&file) }.map_err(io)?);
        self.maps.insert(location.to_owned(), Arc::clone(&map));
        Ok(map)
    }
}

/// The path of a file of the folder that a file names: an ordinary file, directly in it.
pub fn file_in(folder: &Path, name: &str) -> Result<PathBuf, ModelError> {
    let is_plain = !name.is_empty() && name.len() <= 255 && name != "." && name != "..";
    if !is_plain || name.contains(['/', '\\', '\0']) {
        return Err(fault("model.onnx", format!("`{}` is not the name of a file in its folder", shortened(name))));
    }
    let path = folder.join(name);
    // Opening a pipe would wait for its other end.
    match fs::metadata(&path) {
        Ok(found) if found.is_file() => Ok(path),
        Ok(_) => Err(ModelError::Io { path, source: std::io::Error::other("not a file") }),
        Err(source) => Err(ModelError::Io { path, source }),
    }
}

/// What a file says, fit for a message of one line.
pub fn shortened(text: &str) -> String {
    const CHARACTERS_MAX: usize = 80;
    text.chars().take(CHARACTERS_MAX).flat_map(char::escape_debug).collect()
}
