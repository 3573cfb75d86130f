//! A port over AF_XDP: one socket on one queue of one interface.
//!
//! The crate's only file with `unsafe` code. It rests on one invariant, I1 seen from memory: *a
//! chunk is either owned by exactly one [`Frame`], or its descriptor is in a ring*. A frame's
//! reference to its chunk dies before the descriptor enters a ring (`Frame::into_chunk`), and a new
//! one is made when the kernel hands the descriptor back.
//!
//! `open` holds the settings, binding, and what to say when the kernel refuses; `rest` says when to sleep, `wake`
//! ends that.
#![allow(unsafe_code)]

mod open;
mod rest;
mod wake;

use std::{
    io, iter, mem,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr, slice,
    sync::Arc,
    thread,
    time::Duration,
};

use arrayvec::ArrayVec;
use xsk_rs::{
    CompQueue, FillQueue, FrameDesc, RxQueue, Socket, TxQueue, Umem,
    config::{BindFlags, Interface, LibxdpFlags, SocketConfig},
};

pub use self::{
    open::{BindReport, BusyPoll, CopyMode, HugePages, Queue, Settings, XskError, open},
    rest::{Rest, SLEEP_MS},
    wake::{Bell, Ear, bell},
};
use super::{BURST, Frame, Frames, HEADROOM, OUTBOUND, Pool, Port};

/// Start offsets of transmitted packets that move no byte; any other costs a `memmove`.
///
/// A received packet starts at [`HEADROOM`]. VXLAN puts 50 to 78 bytes in front of it (IPv4 or
/// IPv6, up to two tags), less the 4 or 8 bytes of tags that it loses. 336 and 356 are ICMP errors
/// about it, then come replies and packets that lost their tags, and last a decapsulated one.
const STARTS: [usize; 16] = [
    306,
    310,
    314,
    318,
    322,
    326,
    330,
    334,
    336,
    338,
    342,
    356, //
    HEADROOM,
    HEADROOM + 4,
    HEADROOM + 8,
    HEADROOM + 50,
];
const FIRST_START: usize = STARTS[0];

/// Most descriptors that enter the fill ring in one step.
const REFILL: usize = 64;

/// Interfaces that one worker can wait for: a backend names its port in a byte.
const MAX_PORTS: usize = 256;

/// Descriptors of all chunks, for each start offset from [`FIRST_START`] on. Empty where none was
/// minted.
type Minted = Arc<[Box<[FrameDesc]>]>;

/// Mints the descriptors of all [`STARTS`].
///
/// xsk-rs lets nobody move a descriptor's address. But a UMEM of the same shape with another
/// headroom has descriptors with the same addresses as ours at another start, and they are plain
/// numbers.
fn mint(settings: &Settings) -> io::Result<Minted> {
    let mut minted = vec![Box::default(); STARTS[STARTS.len() - 1] - FIRST_START + 1];
    for start in STARTS {
        let (_short_lived, descs) =
            Umem::new(settings.umem(start), settings.frame_count, false).map_err(os_error)?;
        minted[start - FIRST_START] = descs.into();
    }
    Ok(minted.into())
}

/// A UMEM in use.
#[derive(Debug)]
struct Memory {
    umem: Umem,
    /// Where the first chunk is mapped. An address, so that threads may share the rest.
    base: usize,
    /// A chunk's length, as a power of two, lest every frame cost a division.
    chunk_shift: u32,
    minted: Minted,
}

impl Memory {
    /// Maps and registers a UMEM.
    fn new(settings: &Settings, huge_pages: bool, minted: Minted) -> io::Result<Self> {
        let config = settings.umem(HEADROOM);
        let (umem, descs) =
            Umem::new(config, settings.frame_count, huge_pages).map_err(os_error)?;
        // SAFETY: the descriptor is this UMEM's, and nothing of it is in use yet.
        let first = unsafe { umem.headroom(&descs[0]) };
        let base = first.contents().as_ptr().addr();
        Ok(Self { umem, base, chunk_shift: config.frame_size().get().ilog2(), minted })
    }

    /// Bytes of a chunk.
    #[inline]
    fn chunk_len(&self) -> usize {
        1 << self.chunk_shift
    }

    /// The frame whose packet is at `address` of the UMEM.
    ///
    /// # Safety
    /// The UMEM is never freed, no frame over this chunk exists, and its descriptor is in no ring.
    #[inline]
    unsafe fn frame(&self, address: usize, len: usize) -> Frame {
        let index = address >> self.chunk_shift;
        assert!(index < self.at(HEADROOM).len(), "the kernel names a chunk of ours");
        let chunk = ptr::with_exposed_provenance_mut(self.base + (index << self.chunk_shift));
        // SAFETY: the bytes lie within the UMEM's mapping, as just asserted; its provenance was
        // exposed when it was handed to libxdp. The caller promises that it stays, and that nobody
        // else refers to them.
        let chunk = unsafe { slice::from_raw_parts_mut(chunk, self.chunk_len()) };
        let mut frame = Frame::new(index as u32, chunk);
        frame.set(address & (self.chunk_len() - 1), len);
        frame
    }

    /// The descriptors of a start offset. Empty if none were minted.
    #[inline]
    fn at(&self, start: usize) -> &[FrameDesc] {
        self.minted.get(start.wrapping_sub(FIRST_START)).map_or(&[], |descs| descs)
    }

    /// Whether a packet can be sent from some start offset, as all can that were received and
    /// grown.
    #[inline]
    fn fits(&self, frame: &Frame) -> bool {
        FIRST_START + frame.len() <= self.chunk_len()
    }

    /// The number of a frame's chunk, whose only reference ends here.
    ///
    /// # Panics
    /// If the frame is another UMEM's: its owner does not own our chunk of that number.
    #[inline]
    fn chunk_of(&self, frame: Frame) -> usize {
        let (index, chunk) = frame.into_chunk();
        let ours = self.base + ((index as usize) << self.chunk_shift);
        assert_eq!(chunk.as_ptr().addr(), ours, "a port is given frames of its own UMEM");
        index as usize
    }

    /// The descriptor to send a frame with that [fits](Memory::fits).
    #[inline]
    fn give(&self, mut frame: Frame) -> FrameDesc {
        if self.at(frame.start()).is_empty() {
            self.shift(&mut frame);
        }
        let (start, len) = (frame.start(), frame.len());
        let mut desc = self.at(start)[self.chunk_of(frame)];
        // SAFETY: the only reference to the chunk died with the frame.
        unsafe { self.umem.data_mut(&mut desc) }.cursor().set_pos(len);
        desc
    }

    /// Moves a packet to the nearest start offset that has descriptors.
    #[cold]
    fn shift(&self, frame: &mut Frame) {
        let (from, len) = (frame.start(), frame.len());
        let room = STARTS.into_iter().filter(|start| start + len <= self.chunk_len());
        let start = room.min_by_key(|start| start.abs_diff(from)).expect("the packet fits");
        frame.chunk.copy_within(from..from + len, start);
        frame.set(start, len);
    }
}

/// What could not be done for a worker's ports.
enum Failed {
    Umem(io::Error),
    /// The position of the queue.
    Bind(usize, io::Error),
}

/// Binds sockets to all these queues over one new UMEM. Returns its frames, too.
fn bind_all(
    settings: &Settings,
    queues: &[Queue<'_>],
    (mode, huge_pages): (BindFlags, bool),
    minted: &Minted,
) -> Result<(Vec<XskPort>, Pool), Failed> {
    let memory = Memory::new(settings, huge_pages, Arc::clone(minted)).map_err(Failed::Umem)?;
    let memory = Arc::new(memory);
    let mut ports = Vec::with_capacity(queues.len());
    for (index, &queue) in queues.iter().enumerate() {
        let port = XskPort::bind_there(&memory, settings, queue, mode);
        ports.push(port.map_err(|error| Failed::Bind(index, error))?);
    }

    // Frames refer to the UMEM for `'static`. Hence it is never freed from here on.
    mem::forget(memory.umem.clone());
    // SAFETY: the UMEM stays, and no descriptor is in a ring yet. Each one names another chunk.
    let frame = |desc: &FrameDesc| unsafe { memory.frame(desc.addr(), 0) };
    let frames = memory.at(HEADROOM).iter().map(frame).collect();

    // libxdp makes the UMEM's own descriptor the first socket, and closes it only with the UMEM.
    // The ports close it instead, or else the first queue would stay bound until the process ends.
    if let Some(first) = ports.first() {
        // SAFETY: the UMEM, which alone would close the descriptor, is never dropped.
        let owner = Arc::new(unsafe { OwnedFd::from_raw_fd(first.fd()) });
        ports.iter_mut().for_each(|port| port.owner = Some(Arc::clone(&owner)));
    }
    Ok((ports, Pool::new(frames)))
}

/// One queue of one interface.
#[derive(Debug)]
pub struct XskPort {
    rx: RxQueue,
    tx: TxQueue,
    fill: FillQueue,
    comp: CompQueue,
    memory: Arc<Memory>,
    /// Descriptors on their way out of a ring.
    descs: [FrameDesc; BURST],
    /// Frames in the fill and rx rings.
    receiving: usize,
    /// Frames in the tx and completion rings.
    sending: usize,
    tx_len: u32,
    /// Refilling in batches keeps the kernel's and our cache lines of the fill ring apart.
    fill_batch: u32,
    need_wakeup: bool,
    busy_poll: bool,
    kick_errors: u64,
    /// The first socket's descriptor, closed when the last port's rings are unmapped: it comes last
    /// here.
    owner: Option<Arc<OwnedFd>>,
}

/// Each worker's ports move to its thread.
const _: fn() = || {
    fn moves_between_threads<T: Send>() {}
    moves_between_threads::<XskPort>();
};

impl XskPort {
    /// Binds a socket in the network namespace of its interface.
    fn bind_there(
        memory: &Arc<Memory>,
        settings: &Settings,
        queue: Queue<'_>,
        mode: BindFlags,
    ) -> io::Result<Self> {
        let bind = || Self::bind_patiently(memory, settings, queue, mode);
        match queue.namespace {
            Some(namespace) => in_namespace(namespace, bind)?,
            None => bind(),
        }
    }

    /// Binds a socket, while the kernel may still be busy taking down another one: that was seen to
    /// last 8 ms.
    fn bind_patiently(
        memory: &Arc<Memory>,
        settings: &Settings,
        queue: Queue<'_>,
        mode: BindFlags,
    ) -> io::Result<Self> {
        const ATTEMPTS: u32 = 20;
        let interface = Interface::try_from(queue.interface.as_bytes())?;
        for _ in 1..ATTEMPTS {
            match Self::bind(memory, settings, (&interface, queue.number), mode) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    thread::sleep(Duration::from_millis(5));
                }
                result => return result,
            }
        }
        Self::bind(memory, settings, (&interface, queue.number), mode)
    }

    /// Binds a socket.
    fn bind(
        memory: &Arc<Memory>,
        settings: &Settings,
        (interface, queue): (&Interface, u32),
        mode: BindFlags,
    ) -> io::Result<Self> {
        let mut flags = mode;
        flags.set(BindFlags::XDP_USE_NEED_WAKEUP, settings.need_wakeup);
        let config = SocketConfig::builder()
            .rx_queue_size(open::ring(settings.rx_ring))
            .tx_queue_size(open::ring(settings.tx_ring))
            .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
            .bind_flags(flags)
            .build();
        // SAFETY: libxdp loads no program, so it has none to free twice.
        let socket = unsafe { Socket::new(config, &memory.umem, interface, queue) };
        let (tx, rx, rings) = socket.map_err(os_error)?;
        // One pair of rings for each (interface, queue): a second socket there would have none.
        let (fill, comp) = rings.ok_or_else(|| io::Error::from_raw_os_error(libc::EBUSY))?;
        let port = Self {
            rx,
            tx,
            fill,
            comp,
            memory: Arc::clone(memory),
            descs: [FrameDesc::default(); BURST],
            receiving: 0,
            sending: 0,
            tx_len: settings.tx_ring,
            fill_batch: settings.fill_batch,
            need_wakeup: settings.need_wakeup,
            busy_poll: settings.busy_poll.is_some(),
            kick_errors: 0,
            owner: None,
        };
        port.tune(settings)?;
        Ok(port)
    }

    /// Sets the socket's options.
    fn tune(&self, settings: &Settings) -> io::Result<()> {
        const SOL_XDP: i32 = 283;
        const XDP_MAX_TX_SKB_BUDGET: i32 = 9;
        // Otherwise a kick sends at most 32 frames in copy mode. Kernels before 6.17 have no such
        // option, and send on when kicked again.
        let budget = settings.tx_budget.clamp(32, settings.tx_ring.max(32));
        let _optional = set_option(self.fd(), SOL_XDP, XDP_MAX_TX_SKB_BUDGET, budget);
        if let Some(busy_poll) = settings.busy_poll {
            let prefer = u32::from(busy_poll.prefer);
            set_option(self.fd(), libc::SOL_SOCKET, libc::SO_PREFER_BUSY_POLL, prefer)?;
            set_option(self.fd(), libc::SOL_SOCKET, libc::SO_BUSY_POLL, busy_poll.time_us)?;
            set_option(self.fd(), libc::SOL_SOCKET, libc::SO_BUSY_POLL_BUDGET, busy_poll.budget)?;
        }
        Ok(())
    }

    /// The socket's descriptor, for the XDP program's map and for polling. Open as long as the
    /// port.
    pub fn fd(&self) -> RawFd {
        self.rx.fd().as_raw_fd()
    }

    /// What the kernel and we had to throw away, since the port was opened.
    ///
    /// # Errors
    /// If the kernel is older than Linux 5.9.
    pub fn statistics(&self) -> io::Result<Statistics> {
        Ok(Statistics { kick_errors: self.kick_errors, ..statistics(self.fd())? })
    }

    /// Whether the kernel has yet to take packets from the tx ring.
    #[inline]
    fn unsent(&mut self) -> bool {
        self.sending > 0 && self.tx.nb_free_exact() < self.tx_len
    }

    /// Makes the kernel send, if it wants to be told. An interface that is gone is only counted.
    #[inline]
    fn kick_tx(&mut self) {
        if !self.need_wakeup || self.tx.needs_wakeup() {
            self.kick_errors += u64::from(self.tx.wakeup().is_err());
        }
    }

    /// Makes the driver look at the fill ring, if it wants to be told.
    #[inline]
    fn kick_fill(&mut self) {
        if self.fill.needs_wakeup() {
            self.kick_errors += u64::from(self.fill.wakeup(self.rx.fd_mut(), 0).is_err());
        }
    }
}

impl Port for XskPort {
    #[inline]
    fn reclaim(&mut self, pool: &mut Pool) {
        while self.sending > 0 {
            // SAFETY: the descriptors come from a socket over this UMEM.
            let done = unsafe { self.comp.consume(&mut self.descs) };
            self.sending -= done;
            for desc in &self.descs[..done] {
                // SAFETY: the kernel is done with the chunk, and its frame died in `transmit`.
                pool.put(unsafe { self.memory.frame(desc.addr(), 0) });
            }
            if done < BURST {
                break;
            }
        }
        // A kick may leave packets behind: its budget was spent, or the interface's queue full.
        // They must not wait for the next packet to be sent.
        if self.unsent() {
            self.kick_tx();
        }
    }

    #[inline]
    fn receive(&mut self, inbound: &mut Frames) {
        // SAFETY: the descriptors come from a socket over this UMEM.
        let received = unsafe { self.rx.consume(&mut self.descs) };
        self.receiving -= received;
        for desc in &self.descs[..received] {
            // SAFETY: the kernel is done with the chunk, and its frame died in `refill`.
            inbound.push(unsafe { self.memory.frame(desc.addr(), desc.lengths().data()) });
        }
        if received == 0 && self.busy_poll {
            busy_poll(self.fd());
        }
    }

    #[inline]
    fn refill(&mut self, pool: &mut Pool) {
        let step = self.fill_batch.min(REFILL as u32);
        let due = self.fill.nb_free(self.fill_batch) >= self.fill_batch;
        while due && self.fill.nb_free(step) >= step && !pool.is_empty() {
            let frames = iter::from_fn(|| pool.take()).take(step as usize);
            let give = |frame| self.memory.at(HEADROOM)[self.memory.chunk_of(frame)];
            let descs: ArrayVec<FrameDesc, REFILL> = frames.map(give).collect();
            // SAFETY: the descriptors are this UMEM's, and their frames have just died.
            let taken = unsafe { self.fill.produce(&descs) };
            debug_assert_eq!(taken, descs.len(), "there was room");
            self.receiving += taken;
        }
        self.kick_fill();
    }

    #[inline]
    fn transmit(&mut self, outbound: &mut Frames) {
        let room = self.tx.nb_free(outbound.len() as u32) as usize;
        let memory = &self.memory;
        let count = outbound.iter().take(room).take_while(|frame| memory.fits(frame)).count();
        if count == 0 {
            return;
        }
        let give = |frame| memory.give(frame);
        let descs: ArrayVec<FrameDesc, OUTBOUND> = outbound.drain(..count).map(give).collect();
        // SAFETY: the descriptors are this UMEM's, and their frames have just died.
        let taken = unsafe { self.tx.produce(&descs) };
        debug_assert_eq!(taken, descs.len(), "there was room");
        self.sending += taken;
        self.kick_tx();
    }

    fn held(&self) -> usize {
        self.receiving + self.sending
    }

    fn in_flight(&self) -> usize {
        self.sending
    }
}

/// Why packets were lost at a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Statistics {
    /// Received packets dropped by the kernel: too large for a chunk, mostly.
    pub rx_dropped: u64,
    /// Received packets that found the rx ring full.
    pub rx_ring_full: u64,
    /// Received packets that found the fill ring empty.
    pub fill_ring_empty: u64,
    /// Descriptors in the fill ring that the kernel refused.
    pub rx_invalid: u64,
    /// Descriptors in the tx ring that the kernel refused.
    pub tx_invalid: u64,
    /// Kicks that failed because the interface is down or gone.
    pub kick_errors: u64,
}

/// What the kernel had to throw away at a port that another thread has, by its socket's descriptor. What
/// only the port knows, its failed kicks, is zero.
///
/// # Errors
/// If the descriptor is no AF_XDP socket, or the kernel is older than Linux 5.9.
pub fn statistics(fd: RawFd) -> io::Result<Statistics> {
    // SAFETY: it consists of integers, which may be zero.
    let mut kernel: libc::xdp_statistics = unsafe { mem::zeroed() };
    let mut len = size_of_val(&kernel) as libc::socklen_t;
    let (level, option) = (libc::SOL_XDP, libc::XDP_STATISTICS);
    // SAFETY: the pointers are to live values, and the length is the first's.
    let result = unsafe {
        libc::getsockopt(fd, level, option, ptr::from_mut(&mut kernel).cast(), &raw mut len)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if (len as usize) < size_of_val(&kernel) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(Statistics {
        rx_dropped: kernel.rx_dropped,
        rx_ring_full: kernel.rx_ring_full,
        fill_ring_empty: kernel.rx_fill_ring_empty_descs,
        rx_invalid: kernel.rx_invalid_descs,
        tx_invalid: kernel.tx_invalid_descs,
        kick_errors: 0,
    })
}

/// Whether this process may open AF_XDP sockets at all: what to find out before anything else.
///
/// # Errors
/// If it may not, or the kernel has none.
pub fn permitted() -> Result<(), XskError> {
    // SAFETY: it takes numbers only.
    let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(open::socket_error(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is new, and nobody else's.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}

/// Sleeps until a port has received something or the bell is rung, at most this long. Says whether a port
/// has.
///
/// Polling also kicks what wants to be kicked, and in copy mode it sends what is in the tx rings.
///
/// # Errors
/// If the kernel refuses to poll. A signal only ends the sleep.
///
/// # Panics
/// If there are more than 256 ports.
pub fn wait(ports: &[XskPort], ear: Option<&Ear>, timeout_ms: i32) -> io::Result<bool> {
    let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let fds = ports.iter().map(XskPort::fd).chain(ear.map(Ear::fd));
    let mut polled: ArrayVec<libc::pollfd, { MAX_PORTS + 1 }> = fds.map(poll).collect();
    // SAFETY: the pointer and length are those of a live array.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as u64, timeout_ms) };
    if ready >= 0 {
        let has = |polled: &libc::pollfd| polled.revents & libc::POLLIN != 0;
        if let Some(ear) = ear.filter(|_| polled.last().is_some_and(has)) {
            ear.clear();
        }
        return Ok(polled[..ports.len()].iter().any(has));
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted { Ok(false) } else { Err(error) }
}

/// Lets the driver poll its queue on this core, for as long as the socket's options say.
fn busy_poll(fd: RawFd) {
    // SAFETY: no bytes are to be written to the null buffer. The result says only whether there was
    // something, which the rx ring will tell.
    unsafe {
        libc::recvfrom(fd, ptr::null_mut(), 0, libc::MSG_DONTWAIT, ptr::null_mut(), ptr::null_mut())
    };
}

/// Does something in a network namespace. Sockets that are made there stay there.
///
/// # Errors
/// If the process may not go there.
pub fn in_namespace<T: Send>(
    namespace: BorrowedFd<'_>,
    body: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    let there = || {
        // SAFETY: it takes numbers only, and the descriptor is open.
        match unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } {
            0 => Ok(body()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // On a thread of its own, whose namespace nobody shares: nobody has to find the way back.
    thread::scope(|scope| scope.spawn(there).join().expect("a body does not panic"))
}

fn set_option(fd: RawFd, level: i32, option: i32, value: u32) -> io::Result<()> {
    let len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the pointer and length are those of a live integer.
    match unsafe { libc::setsockopt(fd, level, option, ptr::from_ref(&value).cast(), len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The kernel's error behind one of xsk-rs.
fn os_error(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    let os = error.source().and_then(|source| source.downcast_ref::<io::Error>()?.raw_os_error());
    os.map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error)
}
