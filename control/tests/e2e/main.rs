//! End to end: the daemon on real AF_XDP sockets between real clients and servers, in network
//! namespaces laid out by `scripts/lab`. The kernel's own vxlan device decapsulates, so Linux judges
//! what we encapsulate. Needs root, and what `scripts/deps --lab` installs.
//!
//! `lab`, `daemon` and `client` are the tools; the other modules are the tests.

mod client;
mod daemon;
mod lab;

mod announce;
mod api;
mod changes;
mod cli;
mod failures;
mod health;
mod liveness;
mod local;
mod nat;
mod scale;
mod swarm;
mod traffic;
mod wire;
