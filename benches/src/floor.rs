//! The floor: what memory alone costs, however clever the program.
//!
//! The same bursts over the same footprint, with the same prefetches, and no work: each packet's first
//! bytes are read, a random line of the table is read, and an outer header is written in front. What a turn
//! costs beyond that is ours.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use dataplane::{port::HEADROOM, prefetch::prefetch};

use crate::{
    case::Case,
    memory,
    rig::{CHUNK_BYTES, ROTATION},
};

const LINE: usize = 64;

/// An outer header's length.
const HEADER: usize = 50;

/// Memory as a worker would use it.
pub struct Floor {
    table: &'static mut [[u8; LINE]],
    frames: &'static mut [[u8; CHUNK_BYTES]],
    frame_bytes: usize,
    burst: usize,
    random: fastrand::Rng,
}

impl Floor {
    /// The floor of this case.
    pub fn new(case: &Case) -> Self {
        let (table, _) = memory::leak((case.capacity() * 8).max(LINE));
        let (frames, _) = memory::leak(ROTATION * CHUNK_BYTES);
        Self {
            table: table.as_chunks_mut().0,
            frames: frames.as_chunks_mut().0,
            frame_bytes: case.frame_bytes,
            burst: case.burst,
            random: fastrand::Rng::with_seed(1),
        }
    }

    /// Touches what [`ROTATION`] packets would, and tells how long that took. Writing the packets is not
    /// timed; each burst's time includes one reading of the clock.
    pub fn rotation(&mut self) -> Duration {
        for frame in self.frames.iter_mut() {
            let line = self.random.usize(..self.table.len()) as u64;
            let packet = &mut frame[HEADROOM..HEADROOM + self.frame_bytes];
            packet.fill(0x5a);
            packet[..8].copy_from_slice(&line.to_ne_bytes());
        }
        let mut spent = Duration::ZERO;
        for first in (0..ROTATION).step_by(self.burst) {
            let start = Instant::now();
            self.touch(first);
            spent += start.elapsed();
        }
        spent
    }

    #[inline(never)]
    fn touch(&mut self, first: usize) {
        let frames = &mut self.frames[first..][..self.burst];
        for frame in &*frames {
            prefetch(&frame[HEADROOM]);
        }
        let line_of = |frame: &[u8; CHUNK_BYTES]| {
            let packet =
                frame[HEADROOM..].first_chunk().expect("chunks are longer than the headroom");
            u64::from_ne_bytes(*packet) as usize
        };
        for frame in &*frames {
            prefetch(&self.table[line_of(frame)]);
        }
        for frame in frames {
            let line = &self.table[line_of(frame)];
            frame[HEADROOM - HEADER..HEADROOM].fill(line[0]);
            black_box(&frame);
        }
    }
}
