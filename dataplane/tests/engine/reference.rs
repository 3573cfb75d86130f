//! The engine once more, written to be obvious and not to be fast: what the real one must agree with,
//! whatever the bytes.
//!
//! It shares nothing with the engine but the names of its types and Maglev's choice. Headers are read by
//! hand, since no library tells the same faults apart, and written by etherparse.

pub mod nat;
pub mod node;
pub mod output;
pub mod parse;
pub mod translation;
