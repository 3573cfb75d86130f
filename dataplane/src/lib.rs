//! Wiremesh's packet engine: bytes in, bytes out.
//!
//! No async runtime, no clock, no logging: `now` is passed in, and what happened is counted. A packet's way
//! is [`worker::Worker::turn`]; what the workers know of the world is [`forwarding::Forwarding`].

pub mod connections;
pub mod counters;
pub mod encap;
pub mod flow;
pub mod forwarding;
pub mod fragment;
pub mod maglev;
pub mod memory;
pub mod nat;
pub mod parse;
pub mod port;
pub mod prefetch;
pub mod publish;
pub mod rate_limit;
pub mod reply;
pub mod schedule;
pub mod select;
#[cfg(feature = "xdp")]
pub mod steer;
pub mod sync;
pub mod time;
pub mod wire;
pub mod worker;
