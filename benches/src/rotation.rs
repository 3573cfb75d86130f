//! What is timed, rotation by rotation, and the frames that it goes round in.
//!
//! A frame must be as cold as one that a network card has just written. So thousands of packets are in
//! their frames before the first of them is handled, and frames are used in turn: when one's turn comes,
//! thousands of others were touched since.

use std::time::Duration;

use crate::memory;

/// Packets of one rotation.
pub const ROTATION: usize = 8192;

/// Frames in use: a rotation, and what is on its way back meanwhile. A multiple of every burst, as the
/// rotation is.
pub const FRAMES: usize = ROTATION + 256;

/// As the daemon has them.
pub const CHUNK_BYTES: usize = 2048;

/// A worker with the network around it, or the floor of one.
pub trait Rotate {
    /// Brings the next [`ROTATION`] packets. Not timed.
    fn refill(&mut self);

    /// Handles them in bursts, and tells how long all bursts took. Each one's time includes one reading of
    /// the clock, as a polling loop's does.
    fn handle(&mut self, burst: usize) -> Duration;

    /// Both.
    fn rotation(&mut self, burst: usize) -> Duration {
        self.refill();
        self.handle(burst)
    }
}

/// All frames' chunks, on huge pages if there are some, as a real UMEM is. In no order, as in one that has
/// been in use for a while: no hardware can guess which comes next.
pub fn chunks() -> Vec<&'static mut [u8]> {
    let mut chunks: Vec<_> =
        memory::leak(FRAMES * CHUNK_BYTES).chunks_exact_mut(CHUNK_BYTES).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut chunks);
    chunks
}
