//! The nodes of `model.onnx`, and who makes which value.
//!
//! Promises that each value has one maker, that counts and lengths were checked before anything was decoded,
//! and that it is known which nodes and initializers nobody has read.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeSet, HashMap},
    fs,
    path::Path,
};

use bytes::Bytes;
use prost::Message;

use super::{
    data::{Files, Initializer, file_in, shortened},
    fault, proto,
};
use crate::model::ModelError;

/// The weights lie elsewhere; models of a hundred layers have a megabyte of nodes.
const FILE_BYTES_MAX: u64 = 32 << 20;
const ENTRIES_MAX: usize = 1 << 16;
const NODE_BYTES_MAX: usize = 64 << 10;
const INPUTS_MAX: usize = 32;
const ATTRIBUTES_MAX: usize = 32;

pub struct Graph {
    nodes: Vec<Node>,
    /// Node and output.
    makers: HashMap<String, (usize, usize)>,
    initializers: HashMap<String, Initializer>,
    read: RefCell<BTreeSet<String>>,
}

pub struct Node {
    /// With its domain in front: `com.microsoft.MatMulNBits`, `MatMul`.
    pub op: String,
    pub name: String,
    pub inputs: Vec<String>,
    attributes: Vec<(Box<str>, Value)>,
    is_read: Cell<bool>,
}

/// Of an attribute.
enum Value {
    Float(f32),
    Int(i64),
    Ints(Box<[i64]>),
    /// Of a kind that nothing here reads.
    Other,
}

impl Graph {
    pub fn open(folder: &Path, name: &str, files: &mut Files) -> Result<Self, ModelError> {
        let path = file_in(folder, name)?;
        let io = |source| ModelError::Io { path: path.clone(), source };
        let size = fs::metadata(&path).map_err(io)?.len();
        if size > FILE_BYTES_MAX {
            return Err(wrong(format!("it has {size} bytes, more than {FILE_BYTES_MAX}: weights belong beside it")));
        }
        let bytes = Bytes::from(fs::read(&path).map_err(io)?);
        let model = proto::Model::decode(bytes).map_err(undecoded)?;
        let graph = model.graph.ok_or_else(|| wrong("it is not an ONNX model: it has no graph".into()))?;
        let graph = proto::Graph::decode(graph).map_err(undecoded)?;
        if !model.functions.is_empty() || !graph.sparse_initializers.is_empty() {
            return Err(wrong("functions of its own and sparse initializers are not supported".into()));
        }
        if graph.nodes.len().max(graph.initializers.len()) > ENTRIES_MAX {
            return Err(wrong(format!("it has more than {ENTRIES_MAX} nodes or initializers")));
        }
        let mut read = Self {
            nodes: Vec::with_capacity(graph.nodes.len()),
            makers: HashMap::new(),
            initializers: HashMap::new(),
            read: RefCell::default(),
        };
        for bytes in graph.initializers {
            let initializer = files.initializer(proto::Tensor::decode(bytes).map_err(undecoded)?)?;
            let name = initializer.name.clone();
            if read.initializers.insert(name.clone(), initializer).is_some() {
                return Err(wrong(format!("initializer `{}` stands twice", shortened(&name))));
            }
        }
        for bytes in graph.nodes {
            read.add(bytes, files)?;
        }
        Ok(read)
    }

    fn add(&mut self, bytes: Bytes, files: &mut Files) -> Result<(), ModelError> {
        if bytes.len() > NODE_BYTES_MAX {
            return Err(wrong(format!("a node has more than {NODE_BYTES_MAX} bytes")));
        }
        let node = proto::Node::decode(bytes).map_err(undecoded)?;
        if node.inputs.len().max(node.outputs.len()) > INPUTS_MAX || node.attributes.len() > ATTRIBUTES_MAX {
            return Err(wrong(format!("node `{}` has more inputs or attributes than any", shortened(&node.name))));
        }
        if let Some(value) = node.outputs.iter().find(|name| self.makes(name)) {
            return Err(wrong(format!("`{}` is made twice", shortened(value))));
        }
        let mut attributes = Vec::with_capacity(node.attributes.len());
        for bytes in node.attributes {
            let attribute = proto::Attribute::decode(bytes).map_err(undecoded)?;
            // A constant is an initializer by another name.
            if node.op_type == "Constant"
                && node.domain.is_empty()
                && let (Some(tensor), [value]) = (attribute.t, &node.outputs[..])
            {
                let initializer = files.initializer(proto::Tensor { name: value.clone(), ..tensor })?;
                self.initializers.insert(value.clone(), initializer);
                return Ok(());
            }
            let value = match attribute.r#type {
                1 => Value::Float(attribute.f),
                2 => Value::Int(attribute.i),
                7 => Value::Ints(attribute.ints.into()),
                _ => Value::Other,
            };
            attributes.push((attribute.name.into(), value));
        }
        let at = self.nodes.len();
        let outputs = node.outputs.into_iter().enumerate().filter(|(_, name)| !name.is_empty());
        self.makers.extend(outputs.map(|(output, value)| (value, (at, output))));
        let op = match node.domain.as_str() {
            "" | "ai.onnx" => node.op_type,
            domain => format!("{domain}.{}", node.op_type),
        };
        let is_read = Cell::new(false);
        self.nodes.push(Node { op, name: node.name, inputs: node.inputs, attributes, is_read });
        Ok(())
    }

    fn makes(&self, value: &str) -> bool {
        self.initializers.contains_key(value) || self.makers.contains_key(value)
    }

    /// The node that makes `value` as its output number `output`; it is read with that.
    pub fn maker(&self, value: &str, output: usize) -> Result<&Node, ModelError> {
        match self.makers.get(value) {
            Some((node, found)) if *found == output => {
                let node = &self.nodes[*node];
                node.is_read.set(true);
                Ok(node)
            }
            Some((node, found)) => Err(self.nodes[*node].fault(format!("is not expected to use its output {found}"))),
            None => Err(wrong(format!("no node makes `{}`", shortened(value)))),
        }
    }

    /// The same, of one of these kinds.
    pub fn maker_of(&self, value: &str, output: usize, ops: &[&str]) -> Result<&Node, ModelError> {
        let node = self.maker(value, output)?;
        if ops.contains(&node.op.as_str()) { Ok(node) } else { Err(node.unsupported(ops)) }
    }

    pub fn initializer(&self, name: &str) -> Result<&Initializer, ModelError> {
        let found = self.initializers.get(name);
        let found = found.ok_or_else(|| wrong(format!("`{}` is not an initializer", shortened(name))))?;
        self.read.borrow_mut().insert(name.to_owned());
        Ok(found)
    }

    /// Whole numbers that are in the file.
    pub fn integers(&self, name: &str) -> Result<Vec<i64>, ModelError> {
        let integers = self.initializer(name)?.integers();
        integers.ok_or_else(|| wrong(format!("`{}` is not of whole numbers", shortened(name))))
    }

    /// What nobody has read is a part of the model that would be left out in silence.
    pub fn refuse_unread(&self) -> Result<(), ModelError> {
        if let Some(node) = self.nodes.iter().find(|node| !node.is_read.get()) {
            return Err(node.fault("is not supported".into()));
        }
        let read = self.read.borrow();
        let mut names: Vec<_> = self.initializers.keys().filter(|name| !read.contains(*name)).collect();
        names.sort();
        match names.first() {
            Some(name) => Err(wrong(format!("initializer `{}` is not supported", shortened(name)))),
            None => Ok(()),
        }
    }
}

impl Node {
    /// An input that has to be there.
    pub fn input(&self, at: usize) -> Result<&str, ModelError> {
        self.optional_input(at).ok_or_else(|| self.fault(format!("has no input {at}")))
    }

    pub fn optional_input(&self, at: usize) -> Option<&str> {
        self.inputs.get(at).map(String::as_str).filter(|name| !name.is_empty())
    }

    /// Inputs other than these are a fault, where they are there at all.
    pub fn only_inputs(&self, known: &[usize]) -> Result<(), ModelError> {
        match (0..self.inputs.len()).find(|at| self.optional_input(*at).is_some() && !known.contains(at)) {
            Some(at) => Err(self.fault(format!("has an input {at}, which is not supported"))),
            None => Ok(()),
        }
    }

    /// Attributes other than these are a fault.
    pub fn only_attributes(&self, known: &[&str]) -> Result<(), ModelError> {
        match self.attributes.iter().find(|(name, _)| !known.contains(&&**name)) {
            Some((name, _)) => {
                Err(self.fault(format!("has an attribute `{}`, which is not supported", shortened(name))))
            }
            None => Ok(()),
        }
    }

    fn attribute(&self, name: &str) -> Option<&Value> {
        self.attributes.iter().find(|(known, _)| **known == *name).map(|(_, value)| value)
    }

    pub fn int(&self, name: &str, default: Option<i64>) -> Result<i64, ModelError> {
        match (self.attribute(name), default) {
            (Some(Value::Int(value)), _) => Ok(*value),
            (Some(_), _) => Err(self.fault(format!("has an attribute `{name}` that is no whole number"))),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.fault(format!("has no attribute `{name}`"))),
        }
    }

    pub fn float(&self, name: &str, default: f32) -> Result<f32, ModelError> {
        match self.attribute(name) {
            Some(Value::Float(value)) if value.is_finite() => Ok(*value),
            Some(_) => Err(self.fault(format!("has an attribute `{name}` that is no finite number"))),
            None => Ok(default),
        }
    }

    pub fn ints(&self, name: &str) -> &[i64] {
        if let Some(Value::Ints(values)) = self.attribute(name) { values } else { &[] }
    }

    /// A value that would change what is computed.
    pub fn expect(&self, name: &str, default: i64, expected: i64) -> Result<(), ModelError> {
        match self.int(name, Some(default))? {
            found if found == expected => Ok(()),
            found => Err(self.fault(format!("has {name} {found}, but only {expected} is supported"))),
        }
    }

    pub fn unsupported(&self, ops: &[&str]) -> ModelError {
        self.fault(format!("stands where only {} is supported", ops.join(" or ")))
    }

    pub fn fault(&self, why: String) -> ModelError {
        wrong(format!("node `{}` ({}) {why}", shortened(&self.name), shortened(&self.op)))
    }
}

pub fn wrong(why: String) -> ModelError {
    fault("model.onnx", why)
}

fn undecoded(error: prost::DecodeError) -> ModelError {
    wrong(format!("it is truncated or corrupted: {error}"))
}
