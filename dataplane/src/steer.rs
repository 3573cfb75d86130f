//! Loads `xdp/steer.bpf.c` onto an interface and fills its maps.
//!
//! One [`Steer`] serves one interface, with maps of its own. Its program is attached by a BPF link,
//! which the kernel takes away with the process, however that dies: traffic then reaches the kernel
//! as before. It knows addresses, not services: which VIPs to steer is control's decision.

use std::{
    error::Error,
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError, XskMap},
    programs::{ProgramError, Xdp, XdpMode, links::FdLink},
};

use memmap2::MmapOptions;
use zerocopy::FromBytes;

use crate::{flow::Address, nat, sync::AtomicU64, wire::ethernet::MacAddr};

static PROGRAM: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/steer.o"));

/// Set in every entry's flags, so that none is zero.
pub const STEER: u32 = 1;
/// Flag of an address's entry: ARP requests and neighbour solicitations for it are steered too.
pub const ANSWER_ARP: u32 = 2;
/// Flag of a UDP port's entry: tunnels end there. Only what [`Key::mesh`] says of their inside is steered.
pub const TUNNEL: u32 = 4;
/// Flag of a [`Key::Mesh`]'s entry: only what is for a port that is taken is steered, see [`Steer::taken`].
const TAKEN: u32 = 8;
/// Last byte of a [`Key::Mesh`]: no other entry has it, whatever its port and protocol.
const MESH: u8 = 1;

/// Flags of an address in an overlay that has this bank of NAT's slots: only answers to live slots are steered.
pub fn taken(bank: u16) -> u32 {
    TAKEN | u32::from(bank) << 16
}

/// VIPs that one interface can steer, unless told otherwise.
pub const DEFAULT_CAPACITY: u32 = 65_536;

/// Queues of one interface that can have a socket, as `xsks` in the program.
pub const MAX_QUEUES: u32 = 256;

/// Where XDP programs run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// In the driver if it can, else in the kernel's network stack.
    #[default]
    Auto,
    /// In the driver, before the kernel allocates anything for the packet.
    Native,
    /// In the kernel's network stack: on every interface, but slow.
    Generic,
}

/// What one entry steers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Key {
    /// Packets to a port; 0 stands for all ports that have no entry.
    Port {
        /// Their destination.
        address: Address,
        /// Their IANA protocol number.
        protocol: u8,
        /// Their destination port.
        port: u16,
    },
    /// What concerns an address as such: its ICMP errors, echo requests, fragments and, if flagged, ARP.
    Address(Address),
    /// What comes out of a tunnel for an address in its network.
    Mesh {
        /// The network's VXLAN identifier, 24 bits.
        vni: u32,
        /// Where the inner packet goes.
        address: Address,
    },
}

impl Key {
    /// The bytes of `struct vip`.
    fn bytes(self) -> [u8; 20] {
        let (address, rest) = match self {
            Self::Port { address, protocol, port } => {
                let [high, low] = port.to_be_bytes();
                (address, [high, low, protocol, 0])
            }
            Self::Address(address) => (address, [0; 4]),
            Self::Mesh { vni, address } => {
                let [_, high, middle, low] = vni.to_be_bytes();
                (address, [high, middle, low, MESH])
            }
        };
        let mut bytes = [0; 20];
        bytes[..16].copy_from_slice(&address.0.to_be_bytes());
        bytes[16..].copy_from_slice(&rest);
        bytes
    }
}

/// Why packets can't be steered.
#[derive(Debug, thiserror::Error)]
pub enum SteerError {
    /// The interface is missing.
    #[error("there is no interface {0}: `ip link` lists them")]
    NoInterface(String),
    /// The process may not load or attach XDP programs.
    #[error(
        "not permitted to load an XDP program: run as root or grant CAP_BPF and CAP_NET_ADMIN \
         (before Linux 5.11, raise the memlock limit too)"
    )]
    NotPermitted,
    /// The kernel has no BPF.
    #[error(
        "this kernel can't run XDP programs: it needs CONFIG_BPF_SYSCALL and CONFIG_XDP_SOCKETS"
    )]
    Unsupported,
    /// Somebody else's program is there.
    #[error(
        "another XDP program is attached to {0}: stop its owner, or remove it with \
         `ip link set dev {0} xdp off`"
    )]
    InUse(String),
    /// The program would outlive the process.
    #[error(
        "this kernel has no XDP links, which take the program away when the process dies: it \
         needs Linux 5.9"
    )]
    NoLink,
    /// The driver takes no such program.
    #[error("{interface} refuses an XDP program in {mode} mode: {reason}; try another `mode`")]
    Refused {
        /// The interface.
        interface: String,
        /// The mode asked for.
        mode: &'static str,
        /// The kernel's words.
        reason: String,
    },
    /// The map of VIPs is full.
    #[error("more VIPs than the steering map holds: raise its capacity")]
    Full,
    /// There is no such queue.
    #[error("queue {0} can't have a socket: only the first {MAX_QUEUES} can")]
    NoQueue(u32),
    /// Anything else the loader says.
    #[error("the XDP program can't be loaded")]
    Load(#[source] Box<EbpfError>),
    /// Anything else the kernel says about the program.
    #[error("the kernel refuses the XDP program")]
    Program(#[source] Box<ProgramError>),
    /// Anything else the kernel says about its maps.
    #[error("the XDP program's maps can't be changed")]
    Map(#[source] Box<MapError>),
}

/// The program on one interface. Dropped, it is gone from there.
pub struct Steer {
    // In this order: the program leaves the interface before its maps are closed.
    _link: FdLink,
    mode: Mode,
    why_not_native: Option<String>,
    vips: HashMap<MapData, [u8; 20], u32>,
    sockets: XskMap<MapData>,
    own: Array<MapData, u64>,
    taken: MapData,
}

impl Steer {
    /// Attaches the program to an interface of this thread's network namespace, steering nothing
    /// yet.
    ///
    /// # Errors
    /// If the kernel or the driver refuses, or another XDP program is there.
    pub fn attach(interface: &str, mode: Mode, capacity: u32) -> Result<Self, SteerError> {
        let mut ebpf = EbpfLoader::new()
            .btf(None)
            .map_max_entries("vips", capacity)
            .map_max_entries("xsks", MAX_QUEUES)
            .load(PROGRAM)
            .map_err(load_error)?;
        let vips = HashMap::try_from(map_of(&mut ebpf, "vips")).map_err(map_error)?;
        let sockets = XskMap::try_from(map_of(&mut ebpf, "xsks")).map_err(map_error)?;
        let own = Array::try_from(map_of(&mut ebpf, "own")).map_err(map_error)?;
        let Map::Array(taken) = map_of(&mut ebpf, "taken") else { unreachable!("it is an array") };

        let program = ebpf.program_mut("steer").expect("the object holds the program");
        let program: &mut Xdp = program.try_into().map_err(program_error)?;
        program.load().map_err(program_error)?;
        let (link, mode, why_not_native) = attach_as(program, interface, mode)?;
        Ok(Self { _link: link, mode, why_not_native, vips, sockets, own, taken })
    }

    /// Where the program runs: [`Mode::Native`] or [`Mode::Generic`].
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Why it runs in generic mode though native was to be tried first.
    pub fn why_not_native(&self) -> Option<&str> {
        self.why_not_native.as_deref()
    }

    /// Steers only frames to this MAC address, and leaves those to other stations to the kernel. Until this
    /// is called, or with a zero address, all are steered.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_mac(&mut self, mac: MacAddr) -> Result<(), SteerError> {
        let [a, b, c, d, e, f] = mac.0;
        self.own.set(0, u64::from_le_bytes([a, b, c, d, e, f, 0, 0]), 0).map_err(map_error)
    }

    /// The memory in which NAT's slots say which ports are taken, for [`crate::nat::Slots::mirror`]: a bit for
    /// each of their numbers. The program reads it for each packet that a tunnel brings.
    ///
    /// # Errors
    /// If the kernel does not give the memory.
    #[allow(unsafe_code)]
    pub fn taken(&self) -> io::Result<&'static [AtomicU64]> {
        const BYTES: usize = nat::MAX_BANKS * (1 << 16) / 8;
        // SAFETY: nobody makes a BPF map smaller, and its memory is only ever read and written as atomics.
        let map =
            unsafe { MmapOptions::new().len(BYTES).map_mut(self.taken.fd().as_fd().as_raw_fd())? };
        let bytes: &'static mut [u8] = &mut Box::leak(Box::new(map))[..];
        Ok(<[AtomicU64]>::mut_from_bytes(bytes).expect("pages are aligned"))
    }

    /// Hands a queue's steered packets to an AF_XDP socket bound to it.
    ///
    /// # Errors
    /// If the queue's number is too high, or the descriptor is no AF_XDP socket.
    pub fn set_socket(&mut self, queue: u32, socket: RawFd) -> Result<(), SteerError> {
        self.sockets.set(queue, socket, 0).map_err(map_error)
    }

    /// Hands a queue's packets to the kernel again, steered or not.
    ///
    /// # Errors
    /// If the queue's number is too high.
    pub fn clear_socket(&mut self, queue: u32) -> Result<(), SteerError> {
        absent_is_fine(self.sockets.unset(queue))
    }

    /// Steers what the key says, from now on. `flags` beside [`STEER`].
    ///
    /// # Errors
    /// If there are too many.
    pub fn add_vip(&mut self, key: Key, flags: u32) -> Result<(), SteerError> {
        self.vips.insert(key.bytes(), STEER | flags, 0).map_err(map_error)
    }

    /// Leaves what the key says to the kernel.
    ///
    /// # Errors
    /// If the kernel refuses. That the key was not there is no error.
    pub fn remove_vip(&mut self, key: Key) -> Result<(), SteerError> {
        absent_is_fine(self.vips.remove(&key.bytes()))
    }
}

fn map_of(ebpf: &mut Ebpf, map: &str) -> Map {
    ebpf.take_map(map).expect("the object holds the map")
}

/// Attaches in the best mode wanted. Also returns the mode got, and why it is not the better one.
fn attach_as(
    program: &mut Xdp,
    interface: &str,
    mode: Mode,
) -> Result<(FdLink, Mode, Option<String>), SteerError> {
    let why_not_native = match mode {
        Mode::Generic => None,
        Mode::Native | Mode::Auto => match attach_once(program, interface, Mode::Native) {
            Ok(link) => return Ok((link, Mode::Native, None)),
            Err(SteerError::Refused { reason, .. }) if mode == Mode::Auto => Some(reason),
            Err(error) => return Err(error),
        },
    };
    let link = attach_once(program, interface, Mode::Generic)?;
    Ok((link, Mode::Generic, why_not_native))
}

fn attach_once(program: &mut Xdp, interface: &str, mode: Mode) -> Result<FdLink, SteerError> {
    let (flags, name) = match mode {
        Mode::Generic => (XdpMode::Skb, "generic"),
        Mode::Native | Mode::Auto => (XdpMode::Driver, "native"),
    };
    let id = program.attach(interface, flags).map_err(|error| match errno(&error) {
        _ if matches!(error, ProgramError::UnknownInterface { .. }) => {
            SteerError::NoInterface(interface.into())
        }
        Some(libc::EPERM | libc::EACCES) => SteerError::NotPermitted,
        // EEXIST: one runs in the other mode.
        Some(libc::EBUSY | libc::EEXIST) => SteerError::InUse(interface.into()),
        Some(errno) => SteerError::Refused {
            interface: interface.into(),
            mode: name,
            reason: io::Error::from_raw_os_error(errno).to_string(),
        },
        None => program_error(error),
    })?;
    let link = program.take_link(id).map_err(program_error)?;
    // Where links are missing aya falls back to netlink, whose programs stay when the process dies.
    FdLink::try_from(link).map_err(|_| SteerError::NoLink)
}

/// The kernel's error number at the end of a chain of errors.
fn errno(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return error.raw_os_error();
        }
        cause = error.source();
    }
    None
}

fn load_error(error: EbpfError) -> SteerError {
    match errno(&error) {
        Some(libc::EPERM | libc::EACCES) => SteerError::NotPermitted,
        Some(libc::ENOSYS) => SteerError::Unsupported,
        _ => SteerError::Load(Box::new(error)),
    }
}

fn program_error(error: ProgramError) -> SteerError {
    match errno(&error) {
        Some(libc::EPERM) => SteerError::NotPermitted,
        Some(libc::ENOSYS) => SteerError::Unsupported,
        _ => SteerError::Program(Box::new(error)),
    }
}

fn map_error(error: MapError) -> SteerError {
    match error {
        MapError::OutOfBounds { index, .. } => SteerError::NoQueue(index),
        error if errno(&error) == Some(libc::E2BIG) => SteerError::Full,
        error => SteerError::Map(Box::new(error)),
    }
}

fn absent_is_fine(result: Result<(), MapError>) -> Result<(), SteerError> {
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(error) if errno(&error) == Some(libc::ENOENT) => Ok(()),
        result => result.map_err(map_error),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use crate::flow::protocol;

    #[test]
    fn a_key_is_laid_out_as_the_program_reads_it() {
        let address = IpAddr::from(Ipv4Addr::new(203, 0, 113, 10)).into();
        let key = Key::Port { address, protocol: protocol::TCP, port: 0x1234 };
        let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 203, 0, 113, 10];
        assert_eq!(key.bytes()[..16], mapped);
        assert_eq!(key.bytes()[16..], [0x12, 0x34, 6, 0]);
        assert_eq!(Key::Address(address).bytes()[16..], [0; 4]);
        assert_eq!(Key::Mesh { vni: 0x01_0203, address }.bytes()[16..], [1, 2, 3, 1]);
    }

    #[test]
    fn the_error_number_is_found_at_the_end_of_the_chain() {
        let error = MapError::CreateError {
            name: "vips".into(),
            io_error: io::Error::from_raw_os_error(libc::EPERM),
        };
        assert!(matches!(load_error(error.into()), SteerError::NotPermitted));
    }
}
