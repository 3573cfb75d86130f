//! Where frames come from and go to.
//!
//! A [`Port`] is one queue of one interface: AF_XDP's four rings in `xsk`, the same rings in memory in
//! `sim`. A worker owns one [`Pool`] of frames, and every frame of it is in exactly one place: the pool,
//! a port (the kernel's side of the rings), the inbound burst or an outbound one (I1). [`Frame`] is
//! neither `Copy` nor `Clone`, so the compiler watches over that.

pub mod sim;
#[cfg(feature = "xdp")]
pub mod xsk;

use arrayvec::ArrayVec;

use crate::{fragment::MAX_FRAGMENTS, prefetch::prefetch};

/// Packets a worker takes from one port at once.
pub const BURST: usize = 64;

/// Bytes free in front of a received packet: room for every outer header we write, tags included.
///
/// The kernel puts a packet `XDP_PACKET_HEADROOM` (256) plus this many bytes into its chunk.
pub const HEADROOM: usize = 256 + 128;

/// Frames that can wait for one port's tx ring: a burst of which every packet is cut into fragments.
pub const OUTBOUND: usize = MAX_FRAGMENTS * BURST;

/// Frames in a worker's hands: just received from one port, or about to leave by one.
pub type Frames = ArrayVec<Frame, OUTBOUND>;

/// One chunk of the UMEM with the packet in it.
///
/// Whoever holds the frame owns its chunk's bytes: a port gives the chunk away with the descriptor and
/// gets it back with the completion.
#[derive(Debug)]
pub struct Frame {
    chunk: &'static mut [u8],
    index: u32,
    start: u16,
    len: u16,
}

impl Frame {
    /// A frame over a whole chunk, with an empty packet at [`HEADROOM`].
    ///
    /// # Panics
    /// If the chunk is no larger than [`HEADROOM`] or larger than 64 KiB.
    pub fn new(index: u32, chunk: &'static mut [u8]) -> Self {
        assert!(
            chunk.len() > HEADROOM && chunk.len() <= usize::from(u16::MAX),
            "a chunk holds the headroom and a packet"
        );
        Self { chunk, index, start: HEADROOM as u16, len: 0 }
    }

    /// The chunk's number within its UMEM.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Where in the chunk the packet starts, in bytes.
    #[inline]
    pub fn start(&self) -> usize {
        usize::from(self.start)
    }

    /// The packet's length in bytes, from its first Ethernet byte.
    #[inline]
    pub fn len(&self) -> usize {
        usize::from(self.len)
    }

    /// Whether the frame holds no packet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The packet, from its first Ethernet byte, without FCS.
    #[inline]
    pub fn packet(&self) -> &[u8] {
        &self.chunk[self.start()..self.start() + self.len()]
    }

    /// The packet, to be changed in place.
    #[inline]
    pub fn packet_mut(&mut self) -> &mut [u8] {
        let (start, end) = (self.start(), self.start() + self.len());
        &mut self.chunk[start..end]
    }

    /// The largest packet this frame can hold at its present start, in bytes.
    pub fn capacity(&self) -> usize {
        self.chunk.len() - self.start()
    }

    /// Says where in the chunk a packet lies.
    ///
    /// # Panics
    /// If that is not within the chunk: memory safety of the ports rests on it.
    #[inline]
    pub fn set(&mut self, start: usize, len: usize) {
        assert!(start + len <= self.chunk.len(), "a packet lies within its chunk");
        self.start = start as u16;
        self.len = len as u16;
    }

    /// Says where in the chunk the packet lies from now on, and gives its bytes to be written.
    ///
    /// # Panics
    /// As [`Frame::set`].
    #[inline]
    pub fn place(&mut self, start: usize, len: usize) -> &mut [u8] {
        self.set(start, len);
        &mut self.chunk[start..start + len]
    }

    /// Makes the packet `bytes` longer at its front, without touching them. `None` if there is no room.
    #[inline]
    pub fn grow_front(&mut self, bytes: usize) -> Option<()> {
        let start = self.start().checked_sub(bytes)?;
        self.set(start, self.len() + bytes);
        Some(())
    }

    /// Makes the packet `bytes` shorter at its front.
    ///
    /// # Panics
    /// If the packet is not that long.
    #[inline]
    pub fn shrink_front(&mut self, bytes: usize) {
        assert!(bytes <= self.len(), "only what is there can be cut off");
        self.set(self.start() + bytes, self.len() - bytes);
    }

    /// Makes the packet exactly `len` bytes long, at its end.
    ///
    /// # Panics
    /// If the chunk ends before.
    #[inline]
    pub fn set_len(&mut self, len: usize) {
        self.set(self.start(), len);
    }

    /// Begins to fetch the packet's first bytes.
    #[inline]
    pub fn prefetch(&self) {
        self.prefetch_at(0);
    }

    /// Begins to fetch the packet's bytes from here on, if it is that long.
    #[inline]
    pub fn prefetch_at(&self, at: usize) {
        if let Some(first) = self.chunk.get(self.start() + at)
            && at <= self.len()
        {
            prefetch(first);
        }
    }

    /// Gives the chunk back to a port, which needs only its number.
    #[cfg_attr(not(feature = "xdp"), allow(dead_code))]
    fn into_chunk(self) -> (u32, &'static mut [u8]) {
        (self.index, self.chunk)
    }
}

/// Frames that are nowhere else.
#[derive(Debug)]
pub struct Pool {
    frames: Vec<Frame>,
}

impl Pool {
    /// A pool of these frames, which is all it will ever hold.
    pub fn new(frames: Vec<Frame>) -> Self {
        Self { frames }
    }

    /// Takes a frame out, empty and with all its headroom. `None` if all are in use.
    #[inline]
    pub fn take(&mut self) -> Option<Frame> {
        // Its chunk holds the headroom: `Frame::new` has seen to it.
        let Frame { chunk, index, .. } = self.frames.pop()?;
        Some(Frame { chunk, index, start: HEADROOM as u16, len: 0 })
    }

    /// Puts a frame back.
    #[inline]
    pub fn put(&mut self, frame: Frame) {
        debug_assert!(self.frames.len() < self.frames.capacity(), "no frame is ever added");
        self.frames.push(frame);
    }

    /// Frames in the pool.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether all frames are in use.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }
}

/// One queue of one interface.
///
/// No method blocks, and none calls the kernel but to kick a ring that asked for it.
pub trait Port {
    /// Moves frames whose transmission is complete to the pool.
    fn reclaim(&mut self, pool: &mut Pool);

    /// Takes up to [`BURST`] received frames. `inbound` is empty before.
    fn receive(&mut self, inbound: &mut Frames);

    /// Gives the kernel frames to receive into, as far as its fill ring has room and the pool frames.
    fn refill(&mut self, pool: &mut Pool);

    /// Hands over frames from the front of `outbound`, in order, as far as the tx ring has room, and kicks
    /// it. What it could not take stays.
    fn transmit(&mut self, outbound: &mut Frames);

    /// Frames that this port holds, on either side.
    fn held(&self) -> usize;

    /// Frames handed over for transmission that have not come back: a worker must not sleep on them.
    fn in_flight(&self) -> usize;
}
