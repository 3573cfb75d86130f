//! Atomics: the processor's, or loom's when it explores every interleaving.

#[cfg(loom)]
pub use loom::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
#[cfg(not(loom))]
pub use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
