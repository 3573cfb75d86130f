//! A snapshot with one service, reached by both VIPs, and a hundred backends.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use dataplane::{
    encap::{Template, Tunnel},
    flow::{Address, HashKey, protocol},
    forwarding::{Backend, Common, Forwarding, Link, Service, Vip},
    maglev::{Candidate, Maglev, Size},
    wire::ethernet::MacAddr,
};

use crate::packet::{Family, VIP_PORT, VIP_V4, VIP_V6};

/// Backends of the service.
pub const BACKENDS: u32 = 100;

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

/// The template of backend number `slot`.
///
/// # Panics
/// Never: the tunnel is a valid one.
pub fn template(slot: u32, inner: Family, underlay: Underlay) -> Template {
    let [_, _, high, low] = slot.to_be_bytes();
    let ends: [IpAddr; 2] = match underlay.family {
        Family::V4 => [[10, 77, 0, 1], [10, 77, 1 + high, low]].map(|ip| Ipv4Addr::from(ip).into()),
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
        inner_v6: inner == Family::V6,
        udp_checksum: underlay.udp_checksum,
    })
    .expect("both ends are of one family")
}

/// The service's Maglev table, of this size, for this many backends.
pub fn maglev(size: Size, backends: u32) -> Maglev {
    let names: Vec<_> = (0..backends).map(|slot| format!("web-{slot}")).collect();
    let candidates: Vec<_> = (0..)
        .zip(&names)
        .map(|(slot, name)| Candidate { name: name.as_str(), weight: 1, slot })
        .collect();
    Maglev::build(size, &candidates, &maglev_key())
}

/// What all nodes hash flows with.
pub fn maglev_key() -> HashKey {
    HashKey::from_seed("benchmark")
}

/// The snapshot.
///
/// # Panics
/// Never: its VIPs are distinct and its backends few.
pub fn forwarding(inner: Family, underlay: Underlay) -> Forwarding {
    let vip = |address| {
        [protocol::TCP, protocol::UDP].map(|protocol| Vip { address, protocol, port: VIP_PORT })
    };
    let vips = [vip(Address::v4(VIP_V4)), vip(Address::v6(VIP_V6))].concat();
    let service = Service { vips, maglev: Arc::new(maglev(Size::default(), BACKENDS)) };
    let backend = |slot| Backend {
        template: template(slot, inner, underlay),
        service: 0,
        mtu: 9000,
        link: 0,
        reachable: true,
    };
    let common =
        Common { links: vec![Link::default()], answer_arp: false, maglev_key: maglev_key() };
    Forwarding::new(common, vec![service], (0..BACKENDS).map(|slot| Some(backend(slot))).collect())
        .expect("the snapshot is sound")
}
