//! The floor: what memory alone costs, however clever the program.
//!
//! The same bursts over the same footprint, with the same prefetches, and no work: each packet's first
//! bytes, which its line of the table is told by, are read, that line is read, and an outer header's length
//! is written in front. What a turn costs beyond that is ours.
//!
//! It reads only, where a turn with new connections also writes to the table; and of the frame it touches
//! what every turn has to touch. It has no rings.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use dataplane::{port::HEADROOM, prefetch::prefetch};

use crate::{
    memory,
    rotation::{FRAMES, ROTATION, Rotate, chunks},
};

const LINE: usize = 64;

/// An outer header's length.
const HEADER: usize = 50;

/// Memory as a worker would use it.
pub struct Floor {
    table: &'static [[u8; LINE]],
    frames: Vec<&'static mut [u8]>,
    /// The first frame of the next rotation.
    next: usize,
    frame_bytes: usize,
    random: fastrand::Rng,
}

impl Floor {
    /// The floor of a worker with a table of so many bytes, for packets of so many.
    pub fn new(table_bytes: usize, frame_bytes: usize) -> Self {
        Self {
            table: memory::leak(table_bytes).as_chunks().0,
            frames: chunks(),
            next: 0,
            frame_bytes,
            random: fastrand::Rng::with_seed(1),
        }
    }

    /// The frame after so many others of this rotation.
    fn frame(&self, after: usize) -> usize {
        (self.next + after) % FRAMES
    }

    #[inline(never)]
    fn touch(&mut self, first: usize, burst: usize) {
        let frames = &mut self.frames[first..][..burst];
        for frame in &*frames {
            prefetch(&frame[HEADROOM]);
        }
        let line_of = |frame: &[u8]| {
            let packet = frame[HEADROOM..].first_chunk().expect("the packet is longer");
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

impl Rotate for Floor {
    fn refill(&mut self) {
        for packet in 0..ROTATION {
            let line = self.random.usize(..self.table.len()) as u64;
            let at = self.frame(packet);
            let packet = &mut self.frames[at][HEADROOM..HEADROOM + self.frame_bytes];
            packet.fill(0x5a);
            packet[..8].copy_from_slice(&line.to_ne_bytes());
        }
    }

    fn handle(&mut self, burst: usize) -> Duration {
        let mut spent = Duration::ZERO;
        for packet in (0..ROTATION).step_by(burst) {
            let first = self.frame(packet);
            let start = Instant::now();
            self.touch(first, burst);
            spent += start.elapsed();
        }
        self.next = self.frame(ROTATION);
        spent
    }
}
