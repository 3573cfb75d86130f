//! Bytes → [`Flow`], or the reason why not. The only place that reads what a stranger wrote.
//!
//! Nothing is verified that does not decide where a packet goes: checksums are the receiver's business,
//! which we are only of neighbour solicitations.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::{
    counters::DropReason::{self, *},
    flow::{Address, Flow, FlowKey, Kind, protocol},
    wire::{arp, checksum, ethernet, icmp, ipv4, ipv6, tcp, udp, vxlan},
};

/// Option of a neighbour solicitation, RFC 4861 section 4.6.1.
const SOURCE_LINK_LAYER_ADDRESS: u8 = 1;

/// The most IPv6 extension headers that are walked through. More is an attack, RFC 9098 section 5.
const MAX_EXTENSIONS: usize = 8;

/// Bits of an IPv6 fragment header's offset field: offset, and M. An atomic fragment has neither set and is
/// a whole packet, RFC 6946.
const ANY_FRAGMENT: u16 = 0xfff9;
/// The offset alone: what quotes a first fragment still quotes the ports.
const LATER_FRAGMENT: u16 = 0xfff8;

/// Parses a packet from its first Ethernet byte.
///
/// # Errors
/// The reason to drop it: it is malformed, or nothing that is ever forwarded.
pub fn flow(packet: &[u8]) -> Result<Flow, DropReason> {
    let mut flow = Flow::NONE;
    if !plain_ipv4(packet, &mut flow) {
        any(packet, &mut flow)?;
    }
    Ok(flow)
}

/// What nearly every IPv4 packet begins with.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct PlainIpv4 {
    ethernet: ethernet::Header,
    ip: ipv4::Header,
    /// Or UDP's header and the first bytes of a payload.
    tcp: tcp::Header,
}

/// What nearly every IPv6 packet begins with.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct PlainIpv6 {
    ethernet: ethernet::Header,
    ip: ipv6::Header,
    /// Or UDP's header and the first bytes of a payload.
    tcp: tcp::Header,
}

/// Parses a packet as [`flow`] does, if it is TCP or UDP in plain IPv4: no tag, no option, no fragment, and
/// no shorter than a whole TCP header. Says whether it is.
///
/// All offsets are constants, and there is one way through: 60 instructions, where there were 150.
#[inline(always)]
pub fn plain_ipv4(packet: &[u8], flow: &mut Flow) -> bool {
    const MIN_LEN: usize = ipv4::LEN + tcp::LEN;
    let Ok((PlainIpv4 { ethernet, ip, tcp }, _)) = PlainIpv4::ref_from_prefix(packet) else {
        return false;
    };
    let len = usize::from(ip.total_len.get());
    let plain = ethernet.ethertype.get() == ethernet::IPV4
        && ip.version_ihl == ipv4::VERSION_IHL
        && !ip.is_fragment()
        && len >= MIN_LEN
        && len <= packet.len() - ethernet::LEN;
    let ports = if plain { plain_ports(ip.protocol, tcp) } else { None };
    let Some(ports) = ports else { return false };
    let ip = Ip {
        src: Address::v4(ip.src),
        dst: Address::v4(ip.dst),
        protocol: ip.protocol,
        tos: ip.tos,
        dont_fragment: ip.dont_fragment(),
        hop_limit: ip.ttl,
        len,
        header_len: ipv4::LEN,
    };
    ip.write(ethernet::LEN, ports, flow);
    true
}

/// The same for IPv6 without extension headers.
#[inline(always)]
fn plain_ipv6(packet: &[u8], flow: &mut Flow) -> bool {
    let Ok((PlainIpv6 { ethernet, ip, tcp }, _)) = PlainIpv6::ref_from_prefix(packet) else {
        return false;
    };
    let payload_len = usize::from(ip.payload_len.get());
    let (src, dst) = (Address::v6(ip.src), Address::v6(ip.dst));
    let plain = ethernet.ethertype.get() == ethernet::IPV6
        && ip.version() == 6
        && payload_len >= tcp::LEN
        && payload_len <= packet.len() - ethernet::LEN - ipv6::LEN
        && packet.len() <= usize::from(u16::MAX)
        && src.as_v4().is_none()
        && dst.as_v4().is_none();
    let ports = if plain { plain_ports(ip.next_header, tcp) } else { None };
    let Some(ports) = ports else { return false };
    let ip = Ip {
        src,
        dst,
        protocol: ip.next_header,
        tos: ip.traffic_class(),
        dont_fragment: true,
        hop_limit: ip.hop_limit,
        len: ipv6::LEN + payload_len,
        header_len: ipv6::LEN,
    };
    ip.write(ethernet::LEN, ports, flow);
    true
}

/// What nearly every packet in a tunnel begins with.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct PlainTunnel {
    ethernet: ethernet::Header,
    ip: ipv4::Header,
    udp: udp::Header,
    vxlan: vxlan::Header,
}

/// Bytes of the headers that [`plain_tunnel`] takes.
pub const TUNNEL_LEN: usize = size_of::<PlainTunnel>();

/// What the headers of a tunnel tell.
pub struct Tunnel {
    /// Where it begins.
    pub src: Address,
    /// The UDP port that it ends at.
    pub udp_port: u16,
    /// The VXLAN network identifier.
    pub vni: u32,
    /// The length of the frame in it, in bytes.
    pub inner_len: usize,
}

/// Parses the packet in a VXLAN tunnel as [`flow`] would if it came by itself, if both are what [`plain_ipv4`] takes.
///
/// No flow is made of the tunnel itself, nor hashed, and all offsets are constants: 194 instructions less.
#[inline(always)]
pub fn plain_tunnel(packet: &[u8], flow: &mut Flow) -> Option<Tunnel> {
    let (PlainTunnel { ethernet, ip, udp, vxlan }, _) =
        PlainTunnel::ref_from_prefix(packet).ok()?;
    let plain = ip.protocol == protocol::UDP
        && ethernet.ethertype.get() == ethernet::IPV4
        && ip.version_ihl == ipv4::VERSION_IHL
        && !ip.is_fragment()
        && vxlan.flags & vxlan::VALID_VNI != 0;
    if !plain {
        return None;
    }
    // What follows the outer IP packet is padding.
    let inner = packet.get(TUNNEL_LEN..ethernet::LEN + usize::from(ip.total_len.get()))?;
    plain_ipv4(inner, flow).then(|| Tunnel {
        src: Address::v4(ip.src),
        udp_port: udp.dst_port.get(),
        vni: vxlan.vni(),
        inner_len: inner.len(),
    })
}

/// What a header tells that is TCP's, or UDP's and more.
#[inline(always)]
fn plain_ports(protocol: u8, header: &tcp::Header) -> Option<Ports> {
    let tcp_flags = match protocol {
        protocol::TCP => header.flags(),
        protocol::UDP => 0,
        _ => return None,
    };
    Some(Ports { src: header.src_port.get(), dst: header.dst_port.get(), tcp_flags })
}

/// Parses any packet, as [`flow`] does. What is in `flow` after an error means nothing.
///
/// # Errors
/// As [`flow`].
pub fn any(packet: &[u8], flow: &mut Flow) -> Result<(), DropReason> {
    if plain_ipv6(packet, flow) {
        return Ok(());
    }
    let (header, _) = view::<ethernet::Header>(packet)?;
    let mut ethertype = header.ethertype.get();
    let mut offset = ethernet::LEN;
    for _ in 0..2 {
        if ethertype != ethernet::VLAN && ethertype != ethernet::QINQ {
            break;
        }
        let (tag, _) = view::<ethernet::Tag>(&packet[offset..])?;
        ethertype = tag.ethertype.get();
        offset += ethernet::TAG_LEN;
    }
    let bytes = &packet[offset..];
    let ip = match ethertype {
        ethernet::IPV4 => parse_ipv4(bytes)?,
        ethernet::IPV6 => parse_ipv6(bytes)?,
        ethernet::ARP => return parse_arp(bytes, offset, flow),
        _ => return Err(NotIp),
    };
    // Bytes behind the IP packet are Ethernet's padding.
    let l4 = bytes[..ip.len].get(ip.header_len..).ok_or(Truncated)?;
    let ports = match (ethertype, ip.protocol) {
        (ethernet::IPV4, protocol::ICMP) => {
            ip.write(offset, Ports::NONE, flow);
            return parse_icmpv4(flow, l4);
        }
        (ethernet::IPV6, protocol::ICMPV6) => {
            ip.write(offset, Ports::NONE, flow);
            return parse_icmpv6(flow, l4, ip.hop_limit);
        }
        _ => parse_ports(ip.protocol, l4)?,
    };
    ip.write(offset, ports, flow);
    Ok(())
}

/// What an IP header tells, of either version.
struct Ip {
    src: Address,
    dst: Address,
    protocol: u8,
    tos: u8,
    dont_fragment: bool,
    hop_limit: u8,
    len: usize,
    /// Options or extension headers included.
    header_len: usize,
}

/// What a transport header tells.
struct Ports {
    src: u16,
    dst: u16,
    tcp_flags: u8,
}

impl Ports {
    const NONE: Self = Self { src: 0, dst: 0, tcp_flags: 0 };
}

impl Ip {
    #[inline(always)]
    fn write(&self, ip_offset: usize, ports: Ports, flow: &mut Flow) {
        *flow = Flow {
            key: FlowKey {
                src: self.src,
                dst: self.dst,
                src_port: ports.src,
                dst_port: ports.dst,
                protocol: self.protocol,
            },
            kind: Kind::Packet,
            tcp_flags: ports.tcp_flags,
            tos: self.tos,
            dont_fragment: self.dont_fragment,
            ip_offset: ip_offset as u16,
            ip_len: self.len as u16,
            l4_offset: (ip_offset + self.header_len) as u16,
            protocol: self.protocol,
        };
    }
}

/// A header at the start of `bytes`, and what follows it.
#[inline]
fn view<T>(bytes: &[u8]) -> Result<(&T, &[u8]), DropReason>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    T::ref_from_prefix(bytes).map_err(|_| Truncated)
}

#[inline]
fn parse_ipv4(packet: &[u8]) -> Result<Ip, DropReason> {
    let (header, _) = view::<ipv4::Header>(packet)?;
    let header_len = ipv4_header_len(header)?;
    let len = usize::from(header.total_len.get());
    if len < header_len {
        return Err(BadIpHeader);
    }
    if len > packet.len() {
        return Err(Truncated);
    }
    if header.is_fragment() {
        return Err(Fragment);
    }
    Ok(Ip {
        src: Address::v4(header.src),
        dst: Address::v4(header.dst),
        protocol: header.protocol,
        tos: header.tos,
        dont_fragment: header.dont_fragment(),
        hop_limit: header.ttl,
        len,
        header_len,
    })
}

/// The length of the header with its options, in bytes.
#[inline]
fn ipv4_header_len(header: &ipv4::Header) -> Result<usize, DropReason> {
    let len = header.header_len();
    if header.version() != 4 || len < ipv4::LEN {
        return Err(BadIpHeader);
    }
    Ok(len)
}

#[inline]
fn parse_ipv6(packet: &[u8]) -> Result<Ip, DropReason> {
    let (header, _) = view::<ipv6::Header>(packet)?;
    if header.version() != 6 {
        return Err(BadIpHeader);
    }
    let len = ipv6::LEN + usize::from(header.payload_len.get());
    let payload = packet.get(ipv6::LEN..len).ok_or(Truncated)?;
    if len > usize::from(u16::MAX) {
        return Err(BadIpHeader); // longer than any frame: it can't have come from one
    }
    let (protocol, extensions_len) = walk_extensions(header.next_header, payload, ANY_FRAGMENT)?;
    Ok(Ip {
        src: ipv6_address(header.src)?,
        dst: ipv6_address(header.dst)?,
        protocol,
        tos: header.traffic_class(),
        dont_fragment: true,
        hop_limit: header.hop_limit,
        len,
        header_len: ipv6::LEN + extensions_len,
    })
}

/// An address of an IPv6 header. One that is an IPv4 address in disguise has no business on a wire (RFC 4942
/// section 2.2): it would pass for an IPv4 packet's, with an IPv6 header below.
#[inline]
fn ipv6_address(octets: [u8; 16]) -> Result<Address, DropReason> {
    let address = Address::v6(octets);
    if address.as_v4().is_some() { Err(BadIpHeader) } else { Ok(address) }
}

/// The transport protocol behind the extension headers, and their length in bytes, RFC 8200 section 4.
#[inline]
fn walk_extensions(first: u8, payload: &[u8], refused: u16) -> Result<(u8, usize), DropReason> {
    let mut next = first;
    let mut offset = 0;
    // Once more than there may be headers, to see that the last is followed by none.
    for _ in 0..=MAX_EXTENSIONS {
        let len_unit = match next {
            ipv6::HOP_BY_HOP | ipv6::ROUTING | ipv6::DESTINATION_OPTIONS => 8,
            ipv6::FRAGMENT => 0,
            ipv6::AUTHENTICATION => 4,
            _ => return Ok((next, offset)),
        };
        let extension = payload.get(offset..).ok_or(Truncated)?;
        let &[after, len, ..] = extension else { return Err(Truncated) };
        offset += match len_unit {
            0 => {
                let header = extension.first_chunk::<{ ipv6::FRAGMENT_LEN }>().ok_or(Truncated)?;
                if u16::from_be_bytes([header[2], header[3]]) & refused != 0 {
                    return Err(Fragment);
                }
                ipv6::FRAGMENT_LEN
            }
            4 => (usize::from(len) + 2) * 4, // RFC 4302 section 2.2
            _ => (usize::from(len) + 1) * 8,
        };
        if offset > payload.len() {
            return Err(Truncated);
        }
        next = after;
    }
    Err(BadIpHeader)
}

/// TCP, UDP and SCTP all begin with their two ports.
#[inline]
fn parse_ports(protocol: u8, l4: &[u8]) -> Result<Ports, DropReason> {
    let header_len = match protocol {
        protocol::TCP => tcp::LEN,
        protocol::UDP => 8,
        protocol::SCTP => 12,
        _ => return Err(UnknownProtocol),
    };
    let header = l4.get(..header_len).ok_or(Truncated)?;
    Ok(Ports {
        src: u16::from_be_bytes([header[0], header[1]]),
        dst: u16::from_be_bytes([header[2], header[3]]),
        tcp_flags: if protocol == protocol::TCP { header[13] } else { 0 },
    })
}

#[inline(never)]
fn parse_icmpv4(flow: &mut Flow, l4: &[u8]) -> Result<(), DropReason> {
    let (header, quoted) = view::<icmp::Header>(l4)?;
    match header.kind {
        icmp::v4::ECHO_REQUEST if header.code == 0 => flow.kind = Kind::Echo,
        icmp::v4::DESTINATION_UNREACHABLE
        | icmp::v4::TIME_EXCEEDED
        | icmp::v4::PARAMETER_PROBLEM => {
            let (inner, _) = view::<ipv4::Header>(quoted)?;
            let header_len = ipv4_header_len(inner).map_err(|_| IcmpUnmatched)?;
            if inner.flags_fragment.get() & ipv4::FRAGMENT_OFFSET != 0 {
                return Err(IcmpUnmatched); // a later fragment carries no ports
            }
            let ports = quoted.get(header_len..).ok_or(Truncated)?;
            let (src, dst) = (Address::v4(inner.src), Address::v4(inner.dst));
            return quoting(flow, src, dst, inner.protocol, ports);
        }
        _ => return Err(UnknownProtocol),
    }
    Ok(())
}

#[inline(never)]
fn parse_icmpv6(flow: &mut Flow, l4: &[u8], hop_limit: u8) -> Result<(), DropReason> {
    let (header, rest) = view::<icmp::Header>(l4)?;
    match header.kind {
        icmp::v6::ECHO_REQUEST if header.code == 0 => flow.kind = Kind::Echo,
        icmp::v6::DESTINATION_UNREACHABLE..=icmp::v6::PARAMETER_PROBLEM => {
            let (inner, payload) = view::<ipv6::Header>(rest)?;
            let (protocol, extensions_len) =
                walk_extensions(inner.next_header, payload, LATER_FRAGMENT)
                    .map_err(|_| IcmpUnmatched)?;
            let ports = payload.get(extensions_len..).ok_or(Truncated)?;
            return quoting(flow, Address::v6(inner.src), Address::v6(inner.dst), protocol, ports);
        }
        // A solicitation that crossed a router is forged.
        icmp::v6::NEIGHBOUR_SOLICITATION if hop_limit == 255 && header.code == 0 => {
            let (target, options) = rest.split_first_chunk::<16>().ok_or(Truncated)?;
            if !solicitation_is_valid(&flow.key, l4, options) {
                return Err(UnknownProtocol);
            }
            flow.key.dst = ipv6_address(*target)?;
            flow.kind = Kind::NeighbourSolicitation;
        }
        _ => return Err(UnknownProtocol),
    }
    Ok(())
}

/// What RFC 4861 section 7.1.1 has a receiver check, which we are here.
fn solicitation_is_valid(key: &FlowKey, message: &[u8], mut options: &[u8]) -> bool {
    let (src, dst) = (key.src.0.to_be_bytes(), key.dst.0.to_be_bytes());
    let len = message.len() as u32;
    let pseudo = checksum::pseudo_header_v6(src, dst, protocol::ICMPV6, len);
    if pseudo.add_bytes(message).fold() != 0xffff {
        return false;
    }
    let mut has_source = false;
    while let [kind, units, ..] = *options {
        let Some(rest) = options.get(usize::from(units) * 8..).filter(|_| units > 0) else {
            return false;
        };
        has_source |= kind == SOURCE_LINK_LAYER_ADDRESS;
        options = rest;
    }
    // Who has no address yet asks a group, and gives no way to answer.
    let solicited_node = dst.starts_with(&[0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff]);
    key.src != Address::default() || (solicited_node && !has_source)
}

/// An ICMP error that quotes a packet from `src` to `dst`: the VIP's answer, so the flow runs the other way.
/// The quote may end 8 bytes into the transport header (RFC 792); we need four.
fn quoting(
    flow: &mut Flow,
    src: Address,
    dst: Address,
    protocol: u8,
    ports: &[u8],
) -> Result<(), DropReason> {
    let ports = ports.first_chunk::<4>().ok_or(Truncated)?;
    let known = matches!(protocol, protocol::TCP | protocol::UDP | protocol::SCTP);
    // An error goes to whom it quotes as the sender; another one is forged or mangled.
    if !known || src != flow.key.dst {
        return Err(IcmpUnmatched);
    }
    flow.key = FlowKey {
        src: dst,
        dst: src,
        src_port: u16::from_be_bytes([ports[2], ports[3]]),
        dst_port: u16::from_be_bytes([ports[0], ports[1]]),
        protocol,
    };
    flow.kind = Kind::IcmpError;
    Ok(())
}

#[inline(never)]
fn parse_arp(packet: &[u8], offset: usize, flow: &mut Flow) -> Result<(), DropReason> {
    let (arp, _) = view::<arp::Packet>(packet)?;
    let ipv4_request = arp.hardware_type.get() == arp::ETHERNET
        && arp.protocol_type.get() == ethernet::IPV4
        && (arp.hardware_len, arp.protocol_len) == (6, 4)
        && arp.operation.get() == arp::REQUEST;
    if !ipv4_request {
        return Err(NotIp);
    }
    *flow = Flow {
        key: FlowKey {
            src: Address::v4(arp.sender_ip),
            dst: Address::v4(arp.target_ip),
            ..Flow::NONE.key
        },
        kind: Kind::Arp,
        ip_offset: offset as u16,
        l4_offset: offset as u16,
        ..Flow::NONE
    };
    Ok(())
}
