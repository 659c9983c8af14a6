//! The part of ONNX's protobuf schema that is read, as `prost` messages.
//!
//! What stands in a file many times takes many times its bytes once it is decoded, so lists hold bytes (without
//! a copy), which are decoded one by one after they were counted.
//!
//! Source: `onnx.proto3` of ONNX 1.16 (IR version 10); field numbers are theirs.

use bytes::Bytes;
use prost::Message;

#[derive(Clone, PartialEq, Message)]
pub struct Model {
    #[prost(bytes = "bytes", optional, tag = 7)]
    pub graph: Option<Bytes>,
    /// Operators that the file defines itself.
    #[prost(bytes = "bytes", repeated, tag = 25)]
    pub functions: Vec<Bytes>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Graph {
    #[prost(bytes = "bytes", repeated, tag = 1)]
    pub nodes: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = 5)]
    pub initializers: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = 15)]
    pub sparse_initializers: Vec<Bytes>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Node {
    #[prost(string, repeated, tag = 1)]
    pub inputs: Vec<String>,
    #[prost(string, repeated, tag = 2)]
    pub outputs: Vec<String>,
    #[prost(string, tag = 3)]
    pub name: String,
    #[prost(string, tag = 4)]
    pub op_type: String,
    #[prost(bytes = "bytes", repeated, tag = 5)]
    pub attributes: Vec<Bytes>,
    #[prost(string, tag = 7)]
    pub domain: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct Attribute {
    #[prost(string, tag = 1)]
    pub name: String,
    #[prost(float, tag = 2)]
    pub f: f32,
    #[prost(int64, tag = 3)]
    pub i: i64,
    #[prost(message, optional, tag = 5)]
    pub t: Option<Tensor>,
    #[prost(int64, repeated, tag = 8)]
    pub ints: Vec<i64>,
    /// 1 is FLOAT, 2 is INT, 4 is TENSOR, 7 is INTS.
    #[prost(int32, tag = 20)]
    pub r#type: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct Tensor {
    #[prost(int64, repeated, tag = 1)]
    pub dims: Vec<i64>,
    #[prost(int32, tag = 2)]
    pub data_type: i32,
    #[prost(int64, repeated, tag = 7)]
    pub int64_data: Vec<i64>,
    #[prost(string, tag = 8)]
    pub name: String,
    #[prost(bytes = "bytes", optional, tag = 9)]
    pub raw_data: Option<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = 13)]
    pub external_data: Vec<Bytes>,
    /// 1 is EXTERNAL.
    #[prost(int32, tag = 14)]
    pub data_location: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct Entry {
    #[prost(string, tag = 1)]
    pub key: String,
    #[prost(string, tag = 2)]
    pub value: String,
}
