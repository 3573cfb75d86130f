//! What the workers know of the world: one immutable snapshot of VIPs, services and backends.
//!
//! Control builds a whole new [`Forwarding`] for every change and publishes it; nothing in it ever
//! changes. A backend lives in a *slot*, a dense number that counters and connections refer to. Control
//! gives a freed slot to nobody until the longest idle timeout has passed, so a stale connection finds
//! nothing rather than a stranger (I4).

use std::sync::Arc;

use crate::{
    encap::Template,
    flow::{Address, HashKey, Kind, protocol},
    maglev::Maglev,
    schedule::Schedule,
    wire::ethernet::MacAddr,
};

/// A backend's place, below [`MAX_BACKENDS`].
pub type Slot = u32;

/// Slots that a connection can name.
pub const MAX_BACKENDS: usize = 1 << 18;

/// An address, protocol and port that clients connect to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Vip {
    /// Its address.
    pub address: Address,
    /// IANA protocol number.
    pub protocol: u8,
    /// Its port; 0 stands for all ports that no other VIP names.
    pub port: u16,
}

impl Vip {
    /// Port and protocol in one number.
    #[inline(always)]
    fn ports(&self) -> u32 {
        u32::from(self.port) << 8 | u32::from(self.protocol)
    }
}

/// A set of VIPs and the choice of their backends.
#[derive(Clone, Debug)]
pub struct Service {
    /// What clients connect to.
    pub vips: Vec<Vip>,
    /// Who takes new connections: slots into [`Forwarding::backend`]. Empty if nobody.
    pub maglev: Arc<Maglev>,
    /// How new connections are placed, as long as they can be remembered.
    pub schedule: Schedule,
    /// Whether TCP connections whose backend is gone are reset, and not given another one.
    pub resets: bool,
    /// How its packets are translated. `None`: they are not, and answers go directly to the client.
    pub nat: Option<Arc<Nat>>,
}

/// What full NAT needs to know of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nat {
    /// The overlay its tasks are in, as an index into [`Common::overlays`].
    pub overlay: u32,
    /// The port that its tasks listen on, for each of [`Service::vips`].
    pub targets: Vec<u16>,
    /// Which clients may connect; nobody is refused if there is none.
    pub allow: Vec<Prefix>,
}

impl Nat {
    /// Whether this client may connect.
    pub fn allows(&self, client: Address) -> bool {
        self.allow.is_empty() || self.allow.iter().any(|prefix| prefix.contains(client))
    }
}

/// The addresses that begin with the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// Any of them.
    pub address: Address,
    /// How many bits count, of all 128: those of a mapped IPv4 address are the last 32.
    pub len: u8,
}

impl Prefix {
    /// Whether the address begins with these bits.
    pub fn contains(self, address: Address) -> bool {
        let differing = self.address.0 ^ address.0;
        differing.leading_zeros() >= u32::from(self.len)
    }
}

/// A network in tunnels that this node has addresses in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// Its VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// The UDP port that its tunnels end at.
    pub udp_port: u16,
    /// This node's MAC address in it.
    pub mac: MacAddr,
    /// This node's addresses in it.
    pub mesh: Vec<Mesh>,
}

/// An address of this node in an overlay: what tasks take for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// Which of the NAT table's banks is this address's.
    pub bank: u16,
    /// The address.
    pub address: Address,
}

/// Where packets go: one task behind a tunnel.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct Backend {
    /// Index of the service it serves: a connection counts only if this is the packet's service.
    pub service: u32,
    /// The largest inner IP packet that fits the way there, in bytes.
    pub mtu: u16,
    /// Index of the interface it is sent out by.
    pub link: u8,
    /// Whether the next hop's MAC address is known. If not, its packets are dropped.
    pub reachable: bool,
    /// The outer header, and all that encapsulation needs.
    pub template: Template,
}

/// A backend in its slot: two cache lines. Selection reads the first, encapsulation both.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
struct Placed {
    /// Its service's first VIP, or the only one: a connection's packets are most often for it, and need not
    /// ask the table of VIPs.
    address: Address,
    ports: u32,
    backend: Backend,
}
const _: () = assert!(size_of::<Option<Placed>>() == 128);

/// What a worker knows of one of its interfaces.
#[derive(Clone, Copy, Debug, Default)]
pub struct Link {
    /// Its MAC address.
    pub mac: MacAddr,
    /// Whether senders on it may leave transport checksums to be completed: veth, virtio, tap.
    pub partial_checksums: bool,
}

impl Link {
    /// Whether a frame is addressed to this station, or to a group that may ask for it. Others reach a
    /// station that shares a medium or is a bridge's port: if every node forwarded its copy, the backend
    /// would get several. A link without a known address takes everything.
    #[inline]
    pub fn accepts(&self, frame: &[u8], kind: Kind) -> bool {
        frame.starts_with(&self.mac.0) || self.accepts_foreign(frame, kind)
    }

    #[cold]
    fn accepts_foreign(&self, frame: &[u8], kind: Kind) -> bool {
        let asks = matches!(kind, Kind::Arp | Kind::NeighbourSolicitation);
        let group = frame.first().is_some_and(|first| first & 1 != 0);
        (group && asks) || self.mac == MacAddr::default()
    }
}

/// The snapshot.
#[derive(Debug)]
pub struct Forwarding {
    vips: VipTable,
    services: Vec<Service>,
    backends: Vec<Option<Placed>>,
    links: Vec<Link>,
    answer_arp: bool,
    maglev_key: HashKey,
    overlays: Vec<Overlay>,
    tasks: Vec<Address>,
}

/// A snapshot that contradicts itself.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForwardingError {
    /// Two services claim one VIP.
    #[error("{0:?} belongs to two services")]
    DuplicateVip(Vip),
    /// More backends than a connection can name.
    #[error("{0} backend slots, where {MAX_BACKENDS} is the most")]
    TooManyBackends(usize),
}

/// What is the same in all of a snapshot.
#[derive(Clone, Debug)]
pub struct Common {
    /// Our interfaces; backends and workers' ports refer to them by index.
    pub links: Vec<Link>,
    /// Whether ARP and neighbour solicitations for VIPs are answered.
    pub answer_arp: bool,
    /// What flows are hashed with for Maglev: the same on every node.
    pub maglev_key: HashKey,
    /// The networks in tunnels that this node has addresses in.
    pub overlays: Vec<Overlay>,
    /// What packets to the backend in each slot are translated to, for NAT.
    pub tasks: Vec<Address>,
}

impl Forwarding {
    /// Builds a snapshot. `backends` come in the order of their slots.
    ///
    /// # Errors
    /// If two services claim one VIP, or there are more than [`MAX_BACKENDS`] slots.
    pub fn new(
        common: Common,
        services: Vec<Service>,
        backends: impl IntoIterator<Item = Option<Backend>>,
    ) -> Result<Self, ForwardingError> {
        let vips = VipTable::new(&services, &common.overlays)?;
        let place = |backend: Backend| {
            let service = services.get(backend.service as usize);
            // No packet is for protocol 0.
            let none = Vip { address: Address::default(), protocol: 0, port: 0 };
            let vip = service.and_then(|service| service.vips.first()).unwrap_or(&none);
            Placed { address: vip.address, ports: vip.ports(), backend }
        };
        let backends: Vec<_> = backends.into_iter().map(|backend| backend.map(place)).collect();
        if backends.len() > MAX_BACKENDS {
            return Err(ForwardingError::TooManyBackends(backends.len()));
        }
        let Common { links, answer_arp, maglev_key, overlays, tasks } = common;
        Ok(Self { vips, services, backends, links, answer_arp, maglev_key, overlays, tasks })
    }

    /// The service that answers on this VIP, as an index; a VIP on port 0 answers on all other ports.
    #[inline(never)]
    pub fn service_at(&self, address: Address, protocol: u8, port: u16) -> Option<u32> {
        let service = |port| self.vips.get(&Vip { address, protocol, port });
        service(port).or_else(|| service(0))
    }

    /// Whether the address is any service's.
    #[inline]
    pub fn is_vip(&self, address: Address) -> bool {
        self.vips.get(&address_entry(address)).is_some()
    }

    /// The service with this index.
    #[inline]
    pub fn service(&self, index: u32) -> Option<&Service> {
        self.services.get(index as usize)
    }

    /// The backend in this slot.
    #[inline]
    pub fn backend(&self, slot: Slot) -> Option<&Backend> {
        self.backends.get(slot as usize)?.as_ref().map(|placed| &placed.backend)
    }

    /// The backend in this slot, and whether this is its service's first VIP: of any other it is to be asked
    /// whose it is.
    #[inline(always)]
    pub fn backend_for(&self, slot: Slot, vip: Vip) -> Option<(&Backend, bool)> {
        let placed = self.backends.get(slot as usize)?.as_ref()?;
        let is_first_vip = placed.address == vip.address && placed.ports == vip.ports();
        Some((&placed.backend, is_first_vip))
    }

    /// The interface with this index.
    #[inline]
    pub fn link(&self, index: usize) -> Link {
        self.links.get(index).copied().unwrap_or_default()
    }

    /// Whether ARP and neighbour solicitations for VIPs are answered.
    pub fn answer_arp(&self) -> bool {
        self.answer_arp
    }

    /// What flows are hashed with for Maglev.
    #[inline]
    pub fn maglev_key(&self) -> &HashKey {
        &self.maglev_key
    }

    /// The networks in tunnels that this node has addresses in.
    #[inline]
    pub fn overlays(&self) -> &[Overlay] {
        &self.overlays
    }

    /// The overlay and the bank that an address of ours in a network of tunnels has.
    #[inline]
    pub fn mesh_at(&self, vni: u32, address: Address) -> Option<(u32, u16)> {
        let found = self.vips.find(address, VipEntry::MESH | vni)?;
        Some((found >> 16, found as u16))
    }

    /// Whether tunnels of ours end at this UDP port.
    #[inline]
    pub fn is_tunnel_port(&self, port: u16) -> bool {
        self.overlays.iter().any(|overlay| overlay.udp_port == port)
    }

    /// What packets to the backend in this slot are translated to.
    #[inline]
    pub fn task(&self, slot: Slot) -> Option<Address> {
        self.tasks.get(slot as usize).copied()
    }
}

/// The entry that says "this address is a VIP's": a protocol and port that no packet has.
fn address_entry(address: Address) -> Vip {
    const ANY: u8 = 0;
    const _: () = assert!(ANY != protocol::TCP && ANY != protocol::UDP && ANY != protocol::SCTP);
    Vip { address, protocol: ANY, port: 0 }
}

/// VIP → service: open addressing at half load, built once, read only.
#[derive(Debug)]
struct VipTable {
    entries: Vec<VipEntry>,
    shift: u32,
}

/// Half a cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
struct VipEntry {
    address: Address,
    /// Port and protocol, or [`VipEntry::EMPTY`].
    ports: u32,
    service: u32,
}

impl VipEntry {
    /// No port and protocol are so large.
    const EMPTY: u32 = u32::MAX;
    /// Nor with this bit, which an entry has that is an address of ours in an overlay: the network's
    /// identifier takes the place of port and protocol, and overlay and bank that of the service.
    const MESH: u32 = 1 << 31;
}

impl VipTable {
    fn new(services: &[Service], overlays: &[Overlay]) -> Result<Self, ForwardingError> {
        let count: usize = services.iter().map(|service| 2 * service.vips.len()).sum();
        let count = count + overlays.iter().map(|overlay| overlay.mesh.len()).sum::<usize>();
        let capacity = (2 * count).next_power_of_two().max(2);
        let shift = 64 - capacity.trailing_zeros();
        let empty = VipEntry { address: Address(0), ports: VipEntry::EMPTY, service: 0 };
        let mut table = Self { entries: vec![empty; capacity], shift };
        for (index, service) in services.iter().enumerate() {
            for vip in &service.vips {
                if table.get(vip).is_some() {
                    return Err(ForwardingError::DuplicateVip(*vip));
                }
                table.insert(vip.address, vip.ports(), index as u32);
                let address = address_entry(vip.address);
                if table.get(&address).is_none() {
                    table.insert(address.address, address.ports(), index as u32);
                }
            }
        }
        for (index, overlay) in (0_u32..).zip(overlays) {
            for mesh in &overlay.mesh {
                let place = index << 16 | u32::from(mesh.bank);
                table.insert(mesh.address, VipEntry::MESH | overlay.vni, place);
            }
        }
        Ok(table)
    }

    /// Only operators choose VIPs, so the hash needs no key; it only has to be quick.
    #[inline(always)]
    fn home(&self, Address(address): Address, ports: u32) -> usize {
        let folded = (address >> 64) as u64 ^ address as u64 ^ u64::from(ports) << 40;
        (folded.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> self.shift) as usize
    }

    fn insert(&mut self, address: Address, ports: u32, service: u32) {
        let mask = self.entries.len() - 1;
        let mut at = self.home(address, ports);
        while self.entries[at].ports != VipEntry::EMPTY {
            at = (at + 1) & mask;
        }
        self.entries[at] = VipEntry { address, ports, service };
    }

    #[inline]
    fn get(&self, vip: &Vip) -> Option<u32> {
        self.find(vip.address, vip.ports())
    }

    #[inline(always)]
    fn find(&self, address: Address, ports: u32) -> Option<u32> {
        let mask = self.entries.len() - 1;
        let mut at = self.home(address, ports);
        // Ends: the table is at most half full.
        loop {
            let entry = &self.entries[at & mask];
            if entry.ports == ports && entry.address == address {
                return Some(entry.service);
            }
            if entry.ports == VipEntry::EMPTY {
                return None;
            }
            at += 1;
        }
    }
}
