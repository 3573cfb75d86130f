//! Wiremesh's control plane: what turns configuration and the kernel's knowledge into the snapshots that
//! workers forward by, and what operators talk to.

pub mod api;
pub mod capture;
pub mod causes;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod desired;
pub mod explain;
pub mod filter;
pub mod health;
pub mod link;
pub mod liveness;
pub mod local;
pub mod mesh;
pub mod next_hop;
pub mod offline;
pub mod pem;
pub mod plan;
pub mod replay;
pub mod source;
pub mod status;
pub mod view;
pub mod watching;
pub mod workers;
