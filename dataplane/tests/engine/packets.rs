//! Packets as clients send them, built by etherparse, and its judgement of those that leave.

use std::net::{IpAddr, SocketAddr};

use dataplane::{encap::Tunnel, wire::ethernet::MacAddr};
use etherparse::{
    ArpEthIpv4Packet, ArpOperation, ArpPacket, EtherType, Ethernet2Header, Icmpv4Type, Icmpv6Type,
    IpAuthHeader, IpFragOffset, IpHeaders, Ipv4Header, Ipv6Extensions, Ipv6FragmentHeader,
    Ipv6Header, Ipv6RawExtHeader, Ipv6RoutingExtensions, NetSlice, PacketBuilder, SingleVlanHeader,
    SlicedPacket, TcpHeader, TransportSlice, UdpHeader, VlanId, ip_number,
};
use proptest::prelude::*;

use crate::{
    reference::parse::pseudo_header,
    rig::{CLIENT_MAC, CLIENT4, CLIENT6, VIP4, VIP6, ip, node_mac},
};

/// A transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L4 {
    /// With these flags, as in the header's byte.
    Tcp {
        flags: u8,
    },
    /// With a checksum or with zero.
    Udp {
        checksum: bool,
    },
    Sctp,
}

pub const SYN: L4 = L4::Tcp { flags: 0x02 };
pub const ACK: L4 = L4::Tcp { flags: 0x10 };
pub const FIN: L4 = L4::Tcp { flags: 0x11 };
pub const DATAGRAM: L4 = L4::Udp { checksum: true };

/// IPv6 extension headers.
#[derive(Clone, Debug, Default)]
pub struct Extensions {
    pub hop_by_hop: bool,
    pub destination: bool,
    /// No segments left: the destination is the last.
    pub routing: bool,
    /// One that fragments nothing, RFC 6946.
    pub atomic_fragment: bool,
    pub authentication: bool,
}

/// A client's packet, described.
#[derive(Clone, Debug)]
pub struct Packet {
    pub vlans: Vec<u16>,
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub l4: L4,
    pub tos: u8,
    pub ttl: u8,
    pub id: u16,
    pub dont_fragment: bool,
    pub fragment: Option<(u16, bool)>,
    /// Words of no-operation options, IPv4 only.
    pub option_words: usize,
    pub extensions: Extensions,
    /// Words at the payload's start that TCP's header counts as its options.
    pub tcp_option_words: u8,
    pub payload: Vec<u8>,
    /// Bytes behind the IP packet.
    pub padding: usize,
    /// The checksum field holds the pseudo header's sum only, as for a network card to complete.
    pub partial: bool,
}

/// A packet from the client's port to the VIP's port 80, over IPv4.
pub fn v4(port: u16, l4: L4) -> Packet {
    from_to(CLIENT4, VIP4, port, l4)
}

/// The same over IPv6.
pub fn v6(port: u16, l4: L4) -> Packet {
    from_to(CLIENT6, VIP6, port, l4)
}

fn from_to(src: &str, dst: &str, port: u16, l4: L4) -> Packet {
    Packet {
        vlans: Vec::new(),
        src: SocketAddr::new(ip(src), port),
        dst: SocketAddr::new(ip(dst), 80),
        l4,
        tos: 0,
        ttl: 63,
        id: 0x1234,
        dont_fragment: true,
        fragment: None,
        option_words: 0,
        extensions: Extensions::default(),
        tcp_option_words: 0,
        payload: b"hello".to_vec(),
        padding: 0,
        partial: false,
    }
}

impl Packet {
    pub fn with_payload(mut self, len: usize) -> Self {
        self.payload = (0..len).map(|i| (i * 7 + i / 256) as u8).collect();
        self
    }

    pub fn fragmentable(mut self) -> Self {
        self.dont_fragment = false;
        self
    }

    pub fn tagged(mut self, vlans: &[u16]) -> Self {
        self.vlans = vlans.to_vec();
        self
    }

    /// The whole frame.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.link_header();
        bytes.extend(self.ip_packet());
        bytes.extend(std::iter::repeat_n(0xee, self.padding));
        bytes
    }

    fn link_header(&self) -> Vec<u8> {
        let ethertype = if self.dst.is_ipv4() { EtherType::IPV4 } else { EtherType::IPV6 };
        let tag = |i: usize| match self.vlans.len() - i {
            0 => ethertype,
            1 => EtherType::VLAN_TAGGED_FRAME,
            _ => EtherType::PROVIDER_BRIDGING,
        };
        let (destination, source) = (node_mac(0), CLIENT_MAC);
        let mut bytes = Vec::new();
        Ethernet2Header { source, destination, ether_type: tag(0) }.write(&mut bytes).unwrap();
        for (i, &vlan) in self.vlans.iter().enumerate() {
            let mut header = SingleVlanHeader {
                vlan_id: VlanId::try_new(vlan).unwrap(),
                ether_type: tag(i + 1),
                ..Default::default()
            };
            header.drop_eligible_indicator = true;
            header.write(&mut bytes).unwrap();
        }
        bytes
    }

    /// The IP packet alone.
    pub fn ip_packet(&self) -> Vec<u8> {
        let l4 = self.transport();
        let mut bytes = Vec::new();
        let number = self.number().into();
        match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut header =
                    Ipv4Header::new(l4.len() as u16, self.ttl, number, src.octets(), dst.octets())
                        .unwrap();
                header.options = vec![1; 4 * self.option_words][..].try_into().unwrap();
                header.set_payload_len(l4.len()).unwrap();
                (header.dscp, header.ecn) =
                    ((self.tos >> 2).try_into().unwrap(), (self.tos & 3).try_into().unwrap());
                header.identification = self.id;
                header.dont_fragment = self.dont_fragment;
                if let Some((offset, more)) = self.fragment {
                    header.fragment_offset = IpFragOffset::try_new(offset).unwrap();
                    header.more_fragments = more;
                }
                header.header_checksum = header.calc_header_checksum();
                header.write_raw(&mut bytes).unwrap();
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let header = Ipv6Header {
                    traffic_class: self.tos,
                    flow_label: 0xabcde_u32.try_into().unwrap(),
                    hop_limit: self.ttl,
                    source: src.octets(),
                    destination: dst.octets(),
                    ..Default::default()
                };
                let mut headers = IpHeaders::Ipv6(header, self.extension_headers());
                headers.set_next_headers(number);
                headers.set_payload_len(l4.len()).unwrap();
                headers.write(&mut bytes).unwrap();
            }
            _ => panic!("one family"),
        }
        bytes.extend(l4);
        bytes
    }

    fn extension_headers(&self) -> Ipv6Extensions {
        let next = ip_number::TCP; // overwritten by set_next_headers
        let raw = |len: usize| Ipv6RawExtHeader::new_raw(next, &vec![0; len]).unwrap();
        let wanted = &self.extensions;
        Ipv6Extensions {
            hop_by_hop_options: wanted.hop_by_hop.then(|| raw(6)),
            destination_options: wanted.destination.then(|| raw(14)),
            routing: wanted.routing.then(|| Ipv6RoutingExtensions {
                routing: raw(22),
                final_destination_options: None,
            }),
            fragment: match self.fragment {
                Some((offset, more)) => Some((offset, more)),
                None => wanted.atomic_fragment.then_some((0, false)),
            }
            .map(|(offset, more)| {
                Ipv6FragmentHeader::new(next, IpFragOffset::try_new(offset).unwrap(), more, 7)
            }),
            auth: wanted.authentication.then(|| IpAuthHeader::new(next, 1, 2, &[9; 12]).unwrap()),
        }
    }

    fn number(&self) -> u8 {
        match self.l4 {
            L4::Tcp { .. } => 6,
            L4::Udp { .. } => 17,
            L4::Sctp => 132,
        }
    }

    fn transport(&self) -> Vec<u8> {
        let (src, dst) = (self.src.port(), self.dst.port());
        let mut bytes = match self.l4 {
            L4::Tcp { flags } => {
                let mut bytes = TcpHeader::new(src, dst, 0x0102_0304, 1024).to_bytes().to_vec();
                (bytes[12], bytes[13]) = ((5 + self.tcp_option_words) << 4, flags);
                bytes
            }
            L4::Udp { .. } => UdpHeader::without_ipv4_checksum(src, dst, self.payload.len())
                .unwrap()
                .to_bytes()
                .to_vec(),
            L4::Sctp => {
                let mut bytes = vec![7; 12];
                bytes[..2].copy_from_slice(&src.to_be_bytes());
                bytes[2..4].copy_from_slice(&dst.to_be_bytes());
                bytes
            }
        };
        bytes.extend(&self.payload);
        let field = match self.l4 {
            L4::Tcp { .. } => 16,
            L4::Udp { checksum: true } => 6,
            _ => return bytes,
        };
        let pseudo = self.pseudo_header(bytes.len());
        let partial = naive_sum(&pseudo);
        let whole = match !naive_sum(&[pseudo, bytes.clone()].concat()) {
            0 if field == 6 => 0xffff, // UDP's zero means "none", RFC 768; TCP's does not
            sum => sum,
        };
        let value = if self.partial { partial } else { whole };
        bytes[field..field + 2].copy_from_slice(&value.to_be_bytes());
        bytes
    }

    fn pseudo_header(&self, l4_len: usize) -> Vec<u8> {
        pseudo_header(self.src.ip(), self.dst.ip(), self.number(), l4_len)
    }
}

/// RFC 1071 section 4.1, as written there; not complemented.
pub fn naive_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// An ICMP or ICMPv6 error that a router sends the VIP about a packet *from* the VIP.
pub fn icmp_error(about: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let builder = PacketBuilder::ethernet2(CLIENT_MAC, node_mac(0));
    if about[0] >> 4 == 4 {
        let builder = builder.ipv4([192, 0, 2, 99], about[12..16].try_into().unwrap(), 60);
        let kind = Icmpv4Type::DestinationUnreachable(
            etherparse::icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1400 },
        );
        builder.icmpv4(kind).write(&mut bytes, about).unwrap();
    } else {
        let builder = builder.ipv6([0x20; 16], about[8..24].try_into().unwrap(), 60);
        builder.icmpv6(Icmpv6Type::PacketTooBig { mtu: 1400 }).write(&mut bytes, about).unwrap();
    }
    bytes
}

/// An echo request from the client, of the address's family.
pub fn ping(vip: &str, id: u16, seq: u16, ttl: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let builder = PacketBuilder::ethernet2(CLIENT_MAC, node_mac(0));
    match ip(vip) {
        IpAddr::V4(vip) => builder
            .ipv4(octets4(CLIENT4), vip.octets(), ttl)
            .icmpv4_echo_request(id, seq)
            .write(&mut bytes, payload),
        IpAddr::V6(vip) => builder
            .ipv6(octets6(CLIENT6), vip.octets(), ttl)
            .icmpv6_echo_request(id, seq)
            .write(&mut bytes, payload),
    }
    .unwrap();
    bytes
}

/// Who has this address?
pub fn arp_request(sender: [u8; 4], target: &str) -> Vec<u8> {
    let request = ArpEthIpv4Packet {
        operation: ArpOperation::REQUEST,
        sender_mac: CLIENT_MAC,
        sender_ipv4: sender,
        target_mac: [0; 6],
        target_ipv4: octets4(target),
    };
    let mut bytes = Vec::new();
    let builder = PacketBuilder::ethernet2(CLIENT_MAC, [0xff; 6]).arp(ArpPacket::from(request));
    builder.write(&mut bytes).unwrap();
    bytes.resize(60, 0); // as Ethernet pads it
    bytes
}

/// Who has this address? RFC 4861 section 4.3, with or without a source link-layer address.
pub fn solicitation(src: &str, target: &str, with_option: bool, hop_limit: u8) -> Vec<u8> {
    let mut body = octets6(target).to_vec();
    if with_option {
        body.extend([1, 1]);
        body.extend(CLIENT_MAC);
    }
    let t = octets6(target);
    let mut group = octets6("ff02::1:ff00:0");
    group[13..].copy_from_slice(&t[13..]);
    let mut bytes = Vec::new();
    PacketBuilder::ethernet2(CLIENT_MAC, [0x33, 0x33, 0xff, t[13], t[14], t[15]])
        .ipv6(octets6(src), group, hop_limit)
        .icmpv6_raw(135, 0, [0; 4])
        .write(&mut bytes, &body)
        .unwrap();
    bytes
}

/// Puts VLAN tags into a frame that has none.
pub fn tag(frame: &[u8], vlans: &[u16]) -> Vec<u8> {
    let mut bytes = frame[..12].to_vec();
    for (i, vlan) in vlans.iter().enumerate() {
        let outer_of_two = i + 1 < vlans.len();
        bytes.extend(if outer_of_two { [0x88, 0xa8] } else { [0x81, 0x00] });
        bytes.extend(VlanId::try_new(*vlan).unwrap().value().to_be_bytes());
    }
    bytes.extend(&frame[12..]);
    bytes
}

/// One more option for a solicitation without tags: a nonce, RFC 3971 section 5.3.2.
pub fn add_nonce(solicitation: &mut Vec<u8>) {
    solicitation.extend([14, 1, 1, 2, 3, 4, 5, 6]);
    solicitation[19] += 8;
    seal_icmpv6(solicitation, 14);
}

/// Rights the checksum of the ICMPv6 message in the IPv6 packet at `at`, without extension headers.
pub fn seal_icmpv6(frame: &mut [u8], at: usize) {
    let (header, message) = frame[at..].split_at_mut(40);
    let address = |at: usize| {
        let octets: [u8; 16] = header[at..at + 16].try_into().unwrap();
        IpAddr::from(octets)
    };
    message[2..4].fill(0);
    let pseudo = pseudo_header(address(8), address(24), 58, message.len());
    let checksum = !naive_sum(&[&pseudo, &*message].concat());
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
}

/// An IPv4 address in network byte order.
pub fn octets4(text: &str) -> [u8; 4] {
    let IpAddr::V4(ip) = ip(text) else { panic!("{text} is IPv4") };
    ip.octets()
}

/// An IPv6 address in network byte order.
pub fn octets6(text: &str) -> [u8; 16] {
    let IpAddr::V6(ip) = ip(text) else { panic!("{text} is IPv6") };
    ip.octets()
}

/// The answer of the VIP to this packet: what an ICMP error would quote.
pub fn answer_to(packet: &Packet) -> Packet {
    Packet { src: packet.dst, dst: packet.src, ..packet.clone() }
}

/// What a backend gets out of a tunnel.
#[derive(Debug, PartialEq, Eq)]
pub struct Inner {
    pub source_port: u16,
    pub tos: u8,
    pub ip_packet: Vec<u8>,
}

/// Takes a packet out of its tunnel, as the backend's kernel would, and checks all on the way.
pub fn decapsulate(bytes: &[u8], tunnel: &Tunnel) -> Inner {
    let packet = SlicedPacket::from_ethernet(bytes).unwrap();
    let ethernet = Ethernet2Header::from_slice(bytes).unwrap().0;
    assert_eq!(MacAddr(ethernet.source), tunnel.src_mac);
    assert_eq!(MacAddr(ethernet.destination), tunnel.dst_mac);
    let vlans: Vec<u16> = packet.vlan_ids().iter().map(|id| id.value()).collect();
    assert_eq!(vlans, tunnel.vlans);
    let Some(TransportSlice::Udp(udp)) = &packet.transport else { panic!("UDP outside") };
    assert_eq!(udp.destination_port(), tunnel.udp_port);
    assert!(udp.source_port() >= 49_152, "RFC 7348 section 5");

    let (tos, expected_checksum) = match packet.net.as_ref().unwrap() {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            assert_eq!(
                (IpAddr::from(header.source), IpAddr::from(header.destination)),
                (tunnel.src, tunnel.dst)
            );
            assert_eq!((header.time_to_live, header.dont_fragment), (64, true));
            assert!(!header.is_fragmenting_payload());
            let end = ip.header().slice().as_ptr() as usize + usize::from(header.total_len);
            assert_eq!(end, bytes.as_ptr() as usize + bytes.len(), "nothing behind the packet");
            let tos = header.dscp.value() << 2 | header.ecn.value();
            (tos, udp.to_header().calc_checksum_ipv4(&header, udp.payload()).unwrap())
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header().to_header();
            assert_eq!(
                (IpAddr::from(header.source), IpAddr::from(header.destination)),
                (tunnel.src, tunnel.dst)
            );
            assert_eq!(header.hop_limit, 64);
            let end =
                ip.header().slice().as_ptr() as usize + 40 + usize::from(header.payload_length);
            assert_eq!(end, bytes.as_ptr() as usize + bytes.len(), "nothing behind the packet");
            (
                header.traffic_class,
                udp.to_header().calc_checksum_ipv6(&header, udp.payload()).unwrap(),
            )
        }
        NetSlice::Arp(_) => panic!("IP outside"),
    };
    let checksum = if tunnel.udp_checksum { expected_checksum } else { 0 };
    assert_eq!(udp.checksum(), checksum, "the outer UDP checksum");

    let (vxlan, inner) = udp.payload().split_at(8);
    let [_, vni @ ..] = tunnel.vni.to_be_bytes();
    assert_eq!(vxlan, [[8, 0, 0, 0], [vni[0], vni[1], vni[2], 0]].concat(), "RFC 7348 section 5");
    let (ethernet, ip_packet) = Ethernet2Header::from_slice(inner).unwrap();
    assert_eq!(MacAddr(ethernet.destination), tunnel.inner_dst_mac);
    assert!(MacAddr(ethernet.source).is_unicast());
    let family = if ip_packet[0] >> 4 == 6 { EtherType::IPV6 } else { EtherType::IPV4 };
    assert_eq!(ethernet.ether_type, family);
    Inner { source_port: udp.source_port(), tos, ip_packet: ip_packet.to_vec() }
}

/// Whether the transport checksum of an IP packet is right, by the naive sum.
pub fn transport_checksum_is_right(packet: &Packet, ip_packet: &[u8]) -> bool {
    let l4_len = packet.transport().len();
    let l4 = &ip_packet[ip_packet.len() - l4_len..];
    naive_sum(&[packet.pseudo_header(l4_len), l4.to_vec()].concat()) == 0xffff
}

/// Any packet to one of the VIPs' port 80.
pub fn any_packet() -> impl Strategy<Value = Packet> {
    let l4 = prop_oneof![
        any::<u8>().prop_map(|flags| L4::Tcp { flags }),
        any::<bool>().prop_map(|checksum| L4::Udp { checksum }),
        Just(L4::Sctp),
    ];
    let extensions =
        any::<(bool, bool, bool, bool, bool)>().prop_map(|(h, d, r, f, a)| Extensions {
            hop_by_hop: h,
            destination: d,
            routing: r,
            atomic_fragment: f,
            authentication: a,
        });
    let plain = prop_oneof![Just(Extensions::default()), extensions];
    let link = (prop::collection::vec(0_u16..4096, 0..3), 0_usize..30);
    let header = (any::<bool>(), any::<u8>(), any::<u8>(), any::<u16>(), any::<bool>());
    let options = prop_oneof![Just(0), 0_usize..=10];
    let payload = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..64),
        prop::collection::vec(any::<u8>(), 64..1200),
    ];
    (link, header, l4, plain, options, (1_u16.., any::<[u8; 16]>()), payload).prop_map(
        |(link, header, l4, extensions, option_words, (port, client), payload)| {
            let (is_v6, tos, ttl, id, dont_fragment) = header;
            let mut packet = if is_v6 { v6(port, l4) } else { v4(port, l4) };
            // Unicast and not an IPv4 address in disguise.
            packet.src.set_ip(match client {
                [a, b, c, d, ..] if !is_v6 => IpAddr::from([a, b, c, d]),
                mut octets => {
                    octets[0] = 0x20;
                    IpAddr::from(octets)
                }
            });
            let (vlans, padding) = link;
            let option_words = if is_v6 { 0 } else { option_words };
            Packet {
                vlans,
                padding,
                tos,
                ttl,
                id,
                dont_fragment,
                option_words,
                extensions,
                payload,
                ..packet
            }
        },
    )
}
