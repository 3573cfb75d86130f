//! Opens a worker's ports: settings, what to try in which order, and what to say when the kernel
//! refuses.
#![forbid(unsafe_code)]

use std::{fmt, io, num::NonZeroU32, os::fd::BorrowedFd};

use xsk_rs::config::{BindFlags, FrameSize, QueueSize, UmemConfig};

use super::{BURST, Failed, Minted, Pool, XskPort, bind_all, mint};

/// The kernel's part of the headroom: `XDP_PACKET_HEADROOM`.
const KERNEL_HEADROOM: usize = 256;
/// What huge pages come in, in bytes.
const HUGE_PAGE: usize = 2 << 20;

/// How a worker's ports are opened.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Frames of the UMEM that all ports of a worker share.
    pub frame_count: NonZeroU32,
    /// Bytes of a frame, headroom included: 2048 or 4096.
    pub frame_size: u32,
    /// Slots of each port's rx ring. All rings' sizes are powers of two.
    pub rx_ring: u32,
    /// Slots of each port's tx ring.
    pub tx_ring: u32,
    /// Slots of each port's fill ring.
    pub fill_ring: u32,
    /// Slots of each port's completion ring.
    pub completion_ring: u32,
    /// Whether the UMEM is to be on huge pages.
    pub huge_pages: HugePages,
    /// Whether the driver is to use the UMEM itself.
    pub copy: CopyMode,
    /// Whether the kernel may ask for kicks, instead of getting one for every burst.
    pub need_wakeup: bool,
    /// Places of a fill ring that have to be free before they are filled again: its low-water mark is its
    /// size less this. From 1 to the ring's size.
    pub fill_batch: u32,
    /// Packets that one kick sends in copy mode, at most.
    pub tx_budget: u32,
    /// Whether workers drive the driver's queues themselves.
    pub busy_poll: Option<BusyPoll>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            frame_count: NonZeroU32::new(4096).expect("is not zero"),
            frame_size: 2048,
            rx_ring: 1024,
            tx_ring: 1024,
            fill_ring: 1024,
            completion_ring: 1024,
            huge_pages: HugePages::Auto,
            copy: CopyMode::Auto,
            need_wakeup: true,
            fill_batch: 64,
            tx_budget: 256,
            busy_poll: None,
        }
    }
}

impl Settings {
    /// Refuses what the kernel would refuse without saying why, and what would starve some port.
    fn check(&self, queues: usize) -> Result<(), XskError> {
        if ![2048, 4096].contains(&self.frame_size) {
            return Err(XskError::FrameSize(self.frame_size));
        }
        let rings = [self.rx_ring, self.tx_ring, self.fill_ring, self.completion_ring];
        let odd = |size: &u32| !size.is_power_of_two() || *size < 64;
        if let Some(size) = rings.into_iter().find(odd) {
            return Err(XskError::RingSize(size));
        }
        if !(1..=self.fill_ring).contains(&self.fill_batch) {
            return Err(XskError::FillBatch { batch: self.fill_batch, ring: self.fill_ring });
        }
        // Fill rings take what the pool has. Full, they must leave a worker something to send.
        let needed = queues * self.fill_ring as usize + 2 * BURST;
        if (self.frame_count.get() as usize) < needed {
            return Err(XskError::TooFewFrames { count: self.frame_count, needed });
        }
        Ok(())
    }

    fn bytes(&self) -> usize {
        self.frame_count.get() as usize * self.frame_size as usize
    }

    /// A UMEM's shape, whose packets start at this offset of their chunks. Settings were checked.
    pub(super) fn umem(&self, start: usize) -> UmemConfig {
        UmemConfig::builder()
            .frame_size(FrameSize::new(self.frame_size).expect("2048 is the smallest"))
            .frame_headroom((start - KERNEL_HEADROOM) as u32)
            .fill_queue_size(ring(self.fill_ring))
            .comp_queue_size(ring(self.completion_ring))
            .build()
            .expect("the headroom leaves room for a packet")
    }
}

/// A ring's size, which was checked.
pub(super) fn ring(size: u32) -> QueueSize {
    QueueSize::new(size).expect("is a power of two")
}

/// Where a UMEM's memory comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HugePages {
    /// Huge pages if there are enough.
    #[default]
    Auto,
    /// Ordinary pages.
    Never,
    /// Huge pages or nothing.
    Require,
}

/// How packets get into the UMEM.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum CopyMode {
    /// By the device if all interfaces can, else by the kernel.
    #[default]
    Auto,
    /// By the device.
    ZeroCopy,
    /// Copied by the kernel.
    Copy,
}

impl fmt::Display for CopyMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::ZeroCopy => "zero-copy",
            Self::Copy => "copy",
        })
    }
}

/// How long and how much the kernel polls a driver's queue when told to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BusyPoll {
    /// `SO_BUSY_POLL`.
    pub time_us: u32,
    /// `SO_BUSY_POLL_BUDGET`, in packets.
    pub budget: u32,
    /// `SO_PREFER_BUSY_POLL`: the driver's interrupts stay off while the worker polls in time.
    pub prefer: bool,
}

/// A queue of an interface.
#[derive(Clone, Copy, Debug)]
pub struct Queue<'a> {
    /// The interface.
    pub interface: &'a str,
    /// The queue's number.
    pub number: u32,
    /// The network namespace that the interface is in; `None`: this thread's.
    pub namespace: Option<BorrowedFd<'a>>,
}

impl<'a> Queue<'a> {
    /// A queue of an interface in this thread's network namespace.
    pub fn here(interface: &'a str, number: u32) -> Self {
        Self { interface, number, namespace: None }
    }
}

/// What was got for one queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BindReport {
    /// The interface.
    pub interface: String,
    /// Its queue.
    pub queue: u32,
    /// [`CopyMode::ZeroCopy`] or [`CopyMode::Copy`].
    pub copy: CopyMode,
    /// Why it is not zero-copy though that was to be tried.
    pub why_copy: Option<String>,
    /// Whether the UMEM is on huge pages.
    pub huge_pages: bool,
    /// Why it is not though that was to be tried.
    pub why_not_huge_pages: Option<String>,
}

/// Why ports can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum XskError {
    /// No such size exists.
    #[error("frames of {0} bytes don't exist: use 2048 or 4096")]
    FrameSize(u32),
    /// No such size exists.
    #[error("a ring can't have {0} slots: use a power of two from 64 on")]
    RingSize(u32),
    /// The ring would never be filled.
    #[error("a fill ring of {ring} slots can't be filled by {batch}: use 1 to {ring}")]
    FillBatch {
        /// Slots to be filled at once.
        batch: u32,
        /// The ring's slots.
        ring: u32,
    },
    /// The ports would starve each other.
    #[error(
        "{count} frames are too few for these fill rings: use at least {needed}, or smaller rings"
    )]
    TooFewFrames {
        /// Frames asked for.
        count: NonZeroU32,
        /// The least that works.
        needed: usize,
    },
    /// The process may not.
    #[error(
        "not permitted to open AF_XDP sockets: run as root or grant CAP_NET_RAW, CAP_NET_ADMIN and \
         CAP_BPF (CAP_IPC_LOCK spares the memlock limit)"
    )]
    NotPermitted,
    /// The kernel has none.
    #[error("this kernel has no AF_XDP sockets: it needs CONFIG_XDP_SOCKETS")]
    Unsupported,
    /// The kernel says anything else about a socket.
    #[error("no AF_XDP socket can be opened")]
    Socket(#[source] io::Error),
    /// Memory can't be locked.
    #[error(
        "{bytes} bytes of packet memory can't be locked: raise the memlock limit (`ulimit -l`, \
         LimitMEMLOCK=), grant CAP_IPC_LOCK, or use fewer frames"
    )]
    NoMemory {
        /// The UMEM's size.
        bytes: usize,
    },
    /// Huge pages were required.
    #[error("{0}: have it reserve more, or don't require them")]
    NoHugePages(String),
    /// The interface is missing.
    #[error("there is no interface {0}: `ip link` lists them")]
    NoInterface(String),
    /// The queue is missing, most likely.
    #[error(
        "{interface} has no queue {queue} that AF_XDP can use: `ethtool -l {interface}` lists them"
    )]
    NoQueue {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
    },
    /// Somebody else is there.
    #[error(
        "queue {queue} of {interface} is in use by another AF_XDP socket: stop its owner, or use \
         another queue"
    )]
    Busy {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
    },
    /// Zero-copy was required.
    #[error("{0}; allow copying")]
    NoZeroCopy(String),
    /// The kernel says anything else about the UMEM.
    #[error("the kernel refuses {bytes} bytes of packet memory")]
    Umem {
        /// The UMEM's size.
        bytes: usize,
        /// Its words.
        source: io::Error,
    },
    /// The kernel says anything else about a socket.
    #[error("no AF_XDP socket on queue {queue} of {interface}")]
    Bind {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
        /// Its words.
        source: io::Error,
    },
}

/// Opens a worker's ports, in the order of `queues`, of which the first is in this thread's network
/// namespace. They share one UMEM, so a frame received by one can be sent by another.
///
/// The UMEM's memory is never freed, since frames may outlive the ports.
///
/// # Errors
/// If the kernel refuses; see [`XskError`].
pub fn open(
    settings: &Settings,
    queues: &[Queue<'_>],
) -> Result<(Vec<XskPort>, Pool, Vec<BindReport>), XskError> {
    settings.check(queues.len())?;
    let minted = mint(settings).map_err(|error| umem_error(settings, error))?;
    let attempt = |copy| open_as(settings, queues, copy, &minted);

    let (mut why_copy, mut copy) = (None, settings.copy);
    let opened = match settings.copy {
        CopyMode::Copy => attempt(CopyMode::Copy),
        CopyMode::ZeroCopy => attempt(CopyMode::ZeroCopy),
        // All or none: sockets that share a UMEM share this choice too.
        CopyMode::Auto => {
            copy = CopyMode::ZeroCopy;
            attempt(copy).or_else(|error| match error {
                XskError::NoZeroCopy(why) => {
                    (why_copy, copy) = (Some(why), CopyMode::Copy);
                    attempt(copy)
                }
                error => Err(error),
            })
        }
    };
    let (ports, pool, why_not_huge_pages) = opened?;
    let report = |queue: &Queue<'_>| BindReport {
        interface: queue.interface.into(),
        queue: queue.number,
        copy,
        why_copy: why_copy.clone(),
        huge_pages: why_not_huge_pages.is_none() && settings.huge_pages != HugePages::Never,
        why_not_huge_pages: why_not_huge_pages.clone(),
    };
    Ok((ports, pool, queues.iter().map(report).collect()))
}

/// Opens all ports with or without copying. Also returns why there are no huge pages.
fn open_as(
    settings: &Settings,
    queues: &[Queue<'_>],
    copy: CopyMode,
    minted: &Minted,
) -> Result<(Vec<XskPort>, Pool, Option<String>), XskError> {
    let mode = if copy == CopyMode::Copy { BindFlags::XDP_COPY } else { BindFlags::XDP_ZEROCOPY };
    let error = |failed| match failed {
        Failed::Umem(error) => umem_error(settings, error),
        Failed::Bind(index, error) => bind_error(queues[index], copy, error),
    };

    let mut why_not_huge_pages = None;
    if settings.huge_pages != HugePages::Never {
        match with_huge_pages(settings, queues, mode, minted) {
            Ok((ports, pool)) => return Ok((ports, pool, None)),
            Err(Failed::Umem(why)) => {
                let (bytes, pages) = (settings.bytes(), settings.bytes().div_ceil(HUGE_PAGE));
                let why = format!(
                    "no {bytes} bytes of huge pages: {why} (the kernel needs {pages} free ones, \
                     see `sysctl vm.nr_hugepages`)"
                );
                if settings.huge_pages == HugePages::Require {
                    return Err(XskError::NoHugePages(why));
                }
                why_not_huge_pages = Some(why);
            }
            Err(failed) => return Err(error(failed)),
        }
    }
    let (ports, pool) = bind_all(settings, queues, (mode, false), minted).map_err(error)?;
    Ok((ports, pool, why_not_huge_pages))
}

fn with_huge_pages(
    settings: &Settings,
    queues: &[Queue<'_>],
    mode: BindFlags,
    minted: &Minted,
) -> Result<(Vec<XskPort>, Pool), Failed> {
    // The kernel would round up when mapping, and then refuse to unmap.
    if !settings.bytes().is_multiple_of(HUGE_PAGE) {
        return Err(Failed::Umem(io::Error::other("not a multiple of 2 MiB")));
    }
    bind_all(settings, queues, (mode, true), minted)
}

/// Why there is no socket.
pub fn socket_error(error: io::Error) -> XskError {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => XskError::NotPermitted,
        Some(libc::EAFNOSUPPORT) => XskError::Unsupported,
        _ => XskError::Socket(error),
    }
}

fn umem_error(settings: &Settings, error: io::Error) -> XskError {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => XskError::NotPermitted,
        Some(libc::EAFNOSUPPORT) => XskError::Unsupported,
        // ENOBUFS is what a UMEM beyond the memlock limit gets.
        Some(libc::ENOMEM | libc::ENOBUFS) => XskError::NoMemory { bytes: settings.bytes() },
        _ => XskError::Umem { bytes: settings.bytes(), source: error },
    }
}

fn bind_error(queue: Queue<'_>, copy: CopyMode, error: io::Error) -> XskError {
    let (interface, queue) = (queue.interface.to_owned(), queue.number);
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => XskError::NotPermitted,
        Some(libc::ENODEV | libc::ENXIO) => XskError::NoInterface(interface),
        Some(libc::EBUSY) => XskError::Busy { interface, queue },
        _ if copy == CopyMode::ZeroCopy => {
            XskError::NoZeroCopy(format!("queue {queue} of {interface} refuses zero-copy: {error}"))
        }
        Some(libc::EINVAL) => XskError::NoQueue { interface, queue },
        _ => XskError::Bind { interface, queue, source: error },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_size_that_is_no_power_of_two_is_named() {
        let settings = Settings { tx_ring: 1000, ..Settings::default() };
        let error = open(&settings, &[Queue::here("lo", 0)]).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("1000"), "{error}");
    }

    #[test]
    fn a_fill_ring_that_would_never_be_filled_is_refused() {
        for batch in [0, 1025] {
            let settings = Settings { fill_batch: batch, ..Settings::default() };
            let error = open(&settings, &[Queue::here("lo", 0)]).map(|_| ()).unwrap_err();
            assert!(error.to_string().contains("use 1 to 1024"), "{error}");
        }
    }

    #[test]
    fn frames_that_fill_rings_would_use_up_are_too_few() {
        let settings = Settings { fill_ring: 2048, ..Settings::default() };
        let error =
            open(&settings, &[Queue::here("lo", 0), Queue::here("lo", 1)]).map(|_| ()).unwrap_err();
        assert!(matches!(error, XskError::TooFewFrames { needed: 4224, .. }), "{error}");
    }

    #[test]
    fn every_refusal_that_an_operator_can_cure_says_how() {
        let bind = |errno| {
            let error = io::Error::from_raw_os_error(errno);
            bind_error(Queue::here("eth0", 3), CopyMode::Copy, error).to_string()
        };
        assert!(bind(libc::EPERM).contains("run as root"));
        assert!(bind(libc::ENODEV).contains("no interface eth0"));
        assert!(bind(libc::EBUSY).contains("queue 3 of eth0 is in use"));
        assert!(bind(libc::EINVAL).contains("ethtool -l eth0"));
        let umem = |errno| {
            umem_error(&Settings::default(), io::Error::from_raw_os_error(errno)).to_string()
        };
        assert!(umem(libc::ENOBUFS).contains("memlock"));
        assert!(umem(libc::EAFNOSUPPORT).contains("CONFIG_XDP_SOCKETS"));
    }
}
