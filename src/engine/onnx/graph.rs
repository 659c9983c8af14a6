//! Builds ONNX graphs in memory. The encoded graph is tiny: weights are external initializers.

use prost::Message;

use super::proto::{
    AttributeProto, DataType, DimensionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto,
};

/// Domain of our own operators.
pub const DOMAIN: &str = "ai.lightcone";

/// Folder and file where the weights are said to be. It is never opened, but ONNX Runtime wants it to exist.
pub const WEIGHTS_PLACE: (&str, &str) = ("/dev", "null");

#[derive(Default)]
pub struct Graph {
    proto: GraphProto,
}

/// A dimension: known, or named and found out at run time.
#[derive(Clone, Copy)]
pub enum Dim {
    Fixed(usize),
    Named(&'static str),
}

pub fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { name: name.into(), i: value, r#type: 2, ..Default::default() }
}

pub fn ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto { name: name.into(), ints: values.into(), r#type: 7, ..Default::default() }
}

impl Graph {
    pub fn input(&mut self, name: &str, ty: DataType, dims: &[Dim]) {
        self.proto.input.push(value_info(name, ty, dims));
    }

    pub fn output(&mut self, name: &str, ty: DataType, dims: &[Dim]) {
        self.proto.output.push(value_info(name, ty, dims));
    }

    /// Declares a weight. The session is given the tensor itself, under the same name.
    pub fn weight(&mut self, name: &str, ty: DataType, dims: &[usize]) {
        let location = StringStringEntryProto { key: "location".into(), value: WEIGHTS_PLACE.1.into() };
        self.proto.initializer.push(TensorProto {
            dims: dims.iter().map(|d| *d as i64).collect(),
            data_type: ty as i32,
            name: name.into(),
            int64_data: Vec::new(),
            external_data: vec![location],
            data_location: 1,
        });
    }

    /// A small constant of whole numbers, which shape inference can read.
    pub fn constant(&mut self, name: &str, values: &[i64]) {
        self.proto.initializer.push(TensorProto {
            dims: vec![values.len() as i64],
            data_type: DataType::I64 as i32,
            name: name.into(),
            int64_data: values.into(),
            ..Default::default()
        });
    }

    /// An operator of ONNX itself.
    pub fn node(&mut self, op: &str, inputs: &[&str], outputs: &[&str], attributes: Vec<AttributeProto>) {
        self.push("", op, inputs, outputs, attributes);
    }

    /// One of ours.
    pub fn own(&mut self, op: &str, inputs: &[&str], outputs: &[&str], attributes: Vec<AttributeProto>) {
        self.push(DOMAIN, op, inputs, outputs, attributes);
    }

    fn push(&mut self, domain: &str, op: &str, inputs: &[&str], outputs: &[&str], attribute: Vec<AttributeProto>) {
        let strings = |names: &[&str]| names.iter().map(|s| (*s).to_owned()).collect();
        self.proto.node.push(NodeProto {
            input: strings(inputs),
            output: strings(outputs),
            name: format!("{op}:{}", outputs[0]),
            op_type: op.into(),
            attribute,
            domain: domain.into(),
        });
    }

    pub fn encode(mut self) -> Vec<u8> {
        self.proto.name = "lightcone".into();
        let opset = |domain: &str, version| OperatorSetIdProto { domain: domain.into(), version };
        ModelProto { ir_version: 10, graph: Some(self.proto), opset_import: vec![opset("", 21), opset(DOMAIN, 1)] }
            .encode_to_vec()
    }
}

fn value_info(name: &str, ty: DataType, dims: &[Dim]) -> ValueInfoProto {
    let dim = dims
        .iter()
        .map(|dim| match dim {
            Dim::Fixed(n) => DimensionProto { dim_value: Some(*n as i64), dim_param: None },
            Dim::Named(name) => DimensionProto { dim_value: None, dim_param: Some((*name).into()) },
        })
        .collect();
    let tensor_type = TensorTypeProto { elem_type: ty as i32, shape: Some(TensorShapeProto { dim }) };
    ValueInfoProto { name: name.into(), r#type: Some(TypeProto { tensor_type: Some(tensor_type) }) }
}
