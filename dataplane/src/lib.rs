//! Wiremesh's packet engine: bytes in, bytes out.
//!
//! No async runtime, no clock, no logging: `now` is passed in, and what happened is counted. A packet's way
//! is [`worker::Worker::turn`]; what the workers know of the world is [`forwarding::Forwarding`].

pub mod flow;
pub mod maglev;
pub mod publish;
pub mod sync;
pub mod wire;
