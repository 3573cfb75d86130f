//! A port in memory: the four rings of an AF_XDP socket, without kernel or privileges.
//!
//! The worker's side is [`Port`]; the other side, which the kernel plays for a real port, is a handful of
//! methods here for tests, replay and benchmarks. It goes through the same descriptors for each frame as
//! the real one, and can hold frames back as a kernel would.

use super::{BURST, Frame, Frames, HEADROOM, Pool, Port};

/// What stands in a ring: a chunk's number, and where in it the packet lies.
#[derive(Clone, Copy, Debug, Default)]
struct Descriptor {
    index: u32,
    start: u16,
    len: u16,
}

/// A ring of a power of two of descriptors.
#[derive(Debug)]
struct Ring {
    slots: Box<[Descriptor]>,
    produced: usize,
    consumed: usize,
}

impl Ring {
    fn new(size: usize) -> Self {
        assert!(size.is_power_of_two(), "a ring's size is a power of two");
        Self { slots: vec![Descriptor::default(); size].into(), produced: 0, consumed: 0 }
    }

    #[inline]
    fn len(&self) -> usize {
        self.produced - self.consumed
    }

    #[inline]
    fn free(&self) -> usize {
        self.slots.len() - self.len()
    }

    #[inline]
    fn push(&mut self, descriptor: Descriptor) {
        let mask = self.slots.len() - 1;
        self.slots[self.produced & mask] = descriptor;
        self.produced += 1;
    }

    #[inline]
    fn pop(&mut self) -> Option<Descriptor> {
        self.pop_up_to(1).next()
    }

    /// Takes out so many descriptors, or all there are.
    #[inline]
    fn pop_up_to(&mut self, count: usize) -> impl ExactSizeIterator<Item = Descriptor> {
        let first = self.consumed;
        self.consumed += count.min(self.len());
        let mask = self.slots.len() - 1;
        (first..self.consumed).map(move |at| self.slots[at & mask])
    }
}

/// Chunks of one UMEM in ordinary memory, as a pool of frames. It lives as long as the process, like the
/// real one.
///
/// # Panics
/// If a chunk can't hold the headroom and a packet.
pub fn pool(frames: usize, chunk_bytes: usize) -> Pool {
    let memory = vec![0; frames * chunk_bytes].leak();
    let chunks = memory.chunks_exact_mut(chunk_bytes).enumerate();
    // Highest first, so that the pool, a stack, gives them out in order.
    let mut frames: Vec<_> = chunks.map(|(index, chunk)| Frame::new(index as u32, chunk)).collect();
    frames.reverse();
    Pool::new(frames)
}

/// The port.
#[derive(Debug)]
pub struct SimPort {
    rx: Ring,
    fill: Ring,
    tx: Ring,
    completion: Ring,
    /// Chunks that are on the kernel's side, by number.
    chunks: Vec<Option<&'static mut [u8]>>,
    burst: usize,
    held: usize,
    in_flight: usize,
}

impl SimPort {
    /// A port with rings of `ring_size` descriptors, for frames with numbers below `frames`.
    ///
    /// # Panics
    /// If `ring_size` is not a power of two.
    pub fn new(frames: usize, ring_size: usize) -> Self {
        Self {
            rx: Ring::new(ring_size),
            fill: Ring::new(ring_size),
            tx: Ring::new(ring_size),
            completion: Ring::new(ring_size),
            chunks: (0..frames).map(|_| None).collect(),
            burst: BURST,
            held: 0,
            in_flight: 0,
        }
    }

    /// From now on gives the worker this many packets at once, at most; never more than [`BURST`].
    pub fn receive_at_most(&mut self, packets: usize) {
        self.burst = packets.min(BURST);
    }

    /// The network brings a packet. `false`: there was no frame to receive it into, or it was too long.
    pub fn deliver(&mut self, packet: &[u8]) -> bool {
        self.deliver_at(HEADROOM, packet)
    }

    /// The same, at an offset of the driver's choosing.
    pub fn deliver_at(&mut self, start: usize, packet: &[u8]) -> bool {
        if self.rx.free() == 0 || self.fill.len() == 0 {
            return false;
        }
        let Some(descriptor) = self.fill.pop() else { return false };
        let chunk = self.chunks[descriptor.index as usize].as_mut().expect("filled, so it is here");
        let Some(place) = chunk.get_mut(start..start + packet.len()) else {
            self.fill.push(descriptor);
            return false;
        };
        place.copy_from_slice(packet);
        self.rx.push(Descriptor { start: start as u16, len: packet.len() as u16, ..descriptor });
        true
    }

    /// The network takes the next packet to send. `read` sees its bytes. `None`: there is none.
    pub fn take_sent<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Option<T> {
        if self.completion.free() == 0 {
            return None;
        }
        let descriptor = self.tx.pop()?;
        let chunk = self.chunks[descriptor.index as usize].as_ref().expect("sent, so it is here");
        let start = usize::from(descriptor.start);
        let result = read(&chunk[start..start + usize::from(descriptor.len)]);
        self.completion.push(descriptor);
        Some(result)
    }
}

/// Takes a chunk back from the kernel.
#[inline]
fn take(chunks: &mut [Option<&'static mut [u8]>], Descriptor { index, .. }: Descriptor) -> Frame {
    let chunk = chunks[index as usize].take().expect("held, so it is here");
    Frame { chunk, index, start: 0, len: 0 }
}

/// Gives a chunk to the kernel.
#[inline]
fn give(chunks: &mut [Option<&'static mut [u8]>], frame: Frame) -> Descriptor {
    let Frame { chunk, index, start, len } = frame;
    chunks[index as usize] = Some(chunk);
    Descriptor { index, start, len }
}

impl Port for SimPort {
    #[inline]
    fn reclaim(&mut self, pool: &mut Pool) {
        let descriptors = self.completion.pop_up_to(usize::MAX);
        self.held -= descriptors.len();
        self.in_flight -= descriptors.len();
        for descriptor in descriptors {
            pool.put(take(&mut self.chunks, descriptor));
        }
    }

    #[inline]
    fn receive(&mut self, inbound: &mut Frames) {
        let descriptors = self.rx.pop_up_to(self.burst);
        self.held -= descriptors.len();
        inbound.extend(descriptors.map(|descriptor| {
            let mut frame = take(&mut self.chunks, descriptor);
            frame.set(descriptor.start.into(), descriptor.len.into());
            frame
        }));
    }

    #[inline]
    fn refill(&mut self, pool: &mut Pool) {
        let count = self.fill.free().min(pool.len());
        self.held += count;
        for _ in 0..count {
            let Some(frame) = pool.take() else { return };
            self.fill.push(give(&mut self.chunks, frame));
        }
    }

    #[inline]
    fn transmit(&mut self, outbound: &mut Frames) {
        let count = outbound.len().min(self.tx.free());
        self.held += count;
        self.in_flight += count;
        for frame in outbound.drain(..count) {
            self.tx.push(give(&mut self.chunks, frame));
        }
    }

    fn held(&self) -> usize {
        self.held
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}
