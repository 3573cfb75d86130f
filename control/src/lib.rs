//! Wiremesh's control plane: what turns configuration and the kernel's knowledge into the snapshots that
//! workers forward by, and what operators talk to.

pub mod config;
pub mod desired;
pub mod link;
pub mod next_hop;
pub mod source;
