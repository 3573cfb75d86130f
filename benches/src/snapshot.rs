//! A snapshot with one service, on TCP and UDP, and a hundred backends, or others.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use dataplane::{
    encap::{Template, Tunnel},
    flow::{Address, HashKey, protocol},
    forwarding::{Backend, Common, Forwarding, Link, Mesh, Nat, Overlay, Service, Slot, Vip},
    maglev::{Candidate, Maglev, Size},
    nat::MAX_BANKS,
    schedule::{Schedule, Taker},
    wire::{ethernet::MacAddr, vxlan},
};

use crate::packet::{self, Family, VIP_PORT, VIP_V4, VIP_V6};

/// Backends of the service.
pub const BACKENDS: u32 = 100;

/// The network of translated connections.
pub const VNI: u32 = 100;
/// This node's end of its tunnels.
pub const VTEP: [u8; 4] = [10, 77, 0, 1];
/// The port that tasks listen on.
pub const TASK_PORT: u16 = 8080;
/// This node's addresses in it.
pub const MESH: [[u8; 4]; MAX_BANKS] = {
    let mut mesh = [[10, 0, 0, 1]; MAX_BANKS];
    let mut at = 0;
    while at < MAX_BANKS {
        mesh[at][3] += at as u8;
        at += 1;
    }
    mesh
};

/// Where a backend's tunnel ends.
pub fn vtep_v4(slot: Slot) -> [u8; 4] {
    let [_, _, high, low] = slot.to_be_bytes();
    [10, 77, 1 + high, low]
}

/// A task's address.
pub fn task_v4(slot: Slot) -> [u8; 4] {
    let [_, _, high, low] = slot.to_be_bytes();
    [10, 0, 1 + high, low]
}

/// What lies between us and the backends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Underlay {
    /// The version of the outer IP.
    pub family: Family,
    /// Whether the outer UDP checksum is computed.
    pub udp_checksum: bool,
}

impl Underlay {
    /// What is configured by default where the underlay is IPv4.
    pub const V4: Self = Self { family: Family::V4, udp_checksum: false };
    /// What is configured by default where the underlay is IPv6.
    pub const V6: Self = Self { family: Family::V6, udp_checksum: true };
}

/// Who there is to forward to, by slot.
#[derive(Clone, Debug)]
pub struct Backends {
    /// Those that exist: remembered connections go to them.
    pub existing: Vec<Slot>,
    /// Those that take new connections.
    pub takers: Vec<Slot>,
}

impl Backends {
    /// So many, all of which take new connections.
    pub fn new(count: Slot) -> Self {
        Self { existing: (0..count).collect(), takers: (0..count).collect() }
    }

    /// One more.
    #[must_use]
    pub fn and(mut self, slot: Slot) -> Self {
        self.existing.push(slot);
        self.takers.push(slot);
        self
    }

    /// This one takes no new connections any more.
    #[must_use]
    pub fn drained(mut self, slot: Slot) -> Self {
        self.takers.retain(|&other| other != slot);
        self
    }

    /// This one is gone.
    #[must_use]
    pub fn without(self, slot: Slot) -> Self {
        let mut left = self.drained(slot);
        left.existing.retain(|&other| other != slot);
        left
    }
}

/// The template of backend number `slot`.
///
/// # Panics
/// Never: the tunnel is a valid one.
pub fn template(slot: u32, inner: Family, underlay: Underlay) -> Template {
    let [_, _, high, low] = slot.to_be_bytes();
    let ends: [IpAddr; 2] = match underlay.family {
        Family::V4 => [VTEP, vtep_v4(slot)].map(|ip| Ipv4Addr::from(ip).into()),
        Family::V6 => [1, 0x100 + slot as u16]
            .map(|last| Ipv6Addr::new(0x2001, 0xdb8, 0x77, 0, 0, 0, 0, last).into()),
    };
    Template::render(&Tunnel {
        src_mac: MacAddr([2, 0, 0, 0, 0, 2]),
        dst_mac: MacAddr([2, 0, 0, 0, 0, 3]),
        vlans: Vec::new(),
        src: ends[0],
        dst: ends[1],
        udp_port: 4789,
        vni: 100,
        inner_dst_mac: MacAddr([2, 0x42, 10, 77, high, low]),
        inner_src_mac: MacAddr([2, 0, 0, 0, 0, 2]),
        inner_v6: inner == Family::V6,
        udp_checksum: underlay.udp_checksum,
    })
    .expect("both ends are of one family")
}

/// The slot of the backend that a packet is for, which left over IPv4.
///
/// # Panics
/// If it did not.
pub fn slot_of(sent: &[u8]) -> Slot {
    // The last bytes of the inner destination, behind Ethernet, IPv4, UDP and VXLAN.
    let mac = sent[14 + 20 + 8 + 8..].first_chunk::<6>().expect("the packet is encapsulated");
    u32::from(u16::from_be_bytes([mac[4], mac[5]]))
}

/// The service's Maglev table, of this size, for this many backends.
pub fn maglev(size: Size, backends: u32) -> Maglev {
    maglev_of(size, &Backends::new(backends).takers)
}

fn maglev_of(size: Size, takers: &[Slot]) -> Maglev {
    let names: Vec<_> = takers.iter().map(|slot| format!("web-{slot}")).collect();
    let candidates: Vec<_> = takers
        .iter()
        .zip(&names)
        .map(|(&slot, name)| Candidate { name: name.as_str(), weight: 1, slot })
        .collect();
    Maglev::build(size, &candidates, &maglev_key())
}

/// What all nodes hash flows with.
pub fn maglev_key() -> HashKey {
    HashKey::from_seed("benchmark")
}

/// The snapshot.
pub fn forwarding(inner: Family, underlay: Underlay) -> Forwarding {
    forwarding_to(&Backends::new(BACKENDS), inner, underlay)
}

/// The same service among many others, which nobody talks to, of ten backends each.
///
/// # Panics
/// Never: its VIPs are distinct.
pub fn among(others: u32, inner: Family, underlay: Underlay) -> Forwarding {
    let plain = |_: &[Taker]| Schedule::Maglev;
    let (common, mut services, mut slots) = parts(&Backends::new(BACKENDS), plain, inner, underlay);
    let maglev = services[0].maglev.clone();
    let one = slots[0].clone().expect("the first backend exists");
    for index in 1..=others {
        let address = Address::v4((0xc612_0000 + index).to_be_bytes());
        let vips = vec![Vip { address, protocol: protocol::TCP, port: VIP_PORT }];
        services.push(Service {
            vips,
            maglev: maglev.clone(),
            schedule: Schedule::Maglev,
            resets: false,
            nat: None,
        });
        slots.extend((0..10).map(|_| Some(Backend { service: index, ..one.clone() })));
    }
    Forwarding::new(common, services, slots).expect("the snapshot is sound")
}

/// The same with other backends.
///
/// # Panics
/// Never: its VIPs are distinct and its backends few.
pub fn forwarding_to(backends: &Backends, inner: Family, underlay: Underlay) -> Forwarding {
    scheduled(backends, |_| Schedule::Maglev, inner, underlay)
}

/// The same, translated.
///
/// # Panics
/// Never, likewise.
pub fn translated(backends: &Backends) -> Forwarding {
    let plain = |_: &[Taker]| Schedule::Maglev;
    let (mut common, mut services, slots) = parts(backends, plain, Family::V4, Underlay::V4);
    let mesh = |(bank, address): (u16, &[u8; 4])| Mesh { bank, address: Address::v4(*address) };
    common.overlays = vec![Overlay {
        vni: VNI,
        udp_port: vxlan::PORT,
        mac: MacAddr([2, 0, 0, 0, 0, 2]),
        mesh: (0..).zip(&MESH).map(mesh).collect(),
    }];
    common.tasks = (0..slots.len() as Slot).map(|slot| Address::v4(task_v4(slot))).collect();
    for service in &mut services {
        let targets = vec![TASK_PORT; service.vips.len()];
        service.nat = Some(Arc::new(Nat { overlay: 0, targets, allow: Vec::new() }));
    }
    Forwarding::new(common, services, slots).expect("the snapshot is sound")
}

/// The same with another way to place new flows.
///
/// # Panics
/// Never, likewise.
pub fn scheduled(
    backends: &Backends,
    schedule: impl Fn(&[Taker]) -> Schedule,
    inner: Family,
    underlay: Underlay,
) -> Forwarding {
    let (common, services, slots) = parts(backends, schedule, inner, underlay);
    Forwarding::new(common, services, slots).expect("the snapshot is sound")
}

/// What it is made of.
fn parts(
    backends: &Backends,
    schedule: impl Fn(&[Taker]) -> Schedule,
    inner: Family,
    underlay: Underlay,
) -> (Common, Vec<Service>, Vec<Option<Backend>>) {
    let vip = |address| {
        [protocol::TCP, protocol::UDP].map(|protocol| Vip { address, protocol, port: VIP_PORT })
    };
    let vips = match inner {
        Family::V4 => vip(Address::v4(VIP_V4)),
        Family::V6 => vip(Address::v6(VIP_V6)),
    };
    let maglev = Arc::new(maglev_of(Size::default(), &backends.takers));
    let takers: Vec<_> = backends.takers.iter().map(|&slot| Taker { slot, weight: 1 }).collect();
    let service = Service {
        vips: vips.into(),
        maglev,
        schedule: schedule(&takers),
        resets: false,
        nat: None,
    };
    let backend = |slot| Backend {
        template: template(slot, inner, underlay),
        service: 0,
        mtu: 9000,
        link: 0,
        reachable: true,
    };
    let link = Link { mac: packet::GATEWAY, partial_checksums: false };
    let common = Common {
        links: vec![link],
        answer_arp: false,
        maglev_key: maglev_key(),
        overlays: Vec::new(),
        tasks: Vec::new(),
    };
    let slots = backends.existing.iter().max().map_or(0, |last| last + 1);
    let exists = |slot| backends.existing.contains(&slot);
    let slots = (0..slots).map(|slot| exists(slot).then(|| backend(slot))).collect();
    (common, vec![service], slots)
}
