//! Tokens between processes.
