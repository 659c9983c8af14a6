//! HTTP.
mod error;
mod fields;
mod json;
mod request;
