//! The parser: bytes → [`Meaning`], or the reason why not.

use std::{
    net::{IpAddr, Ipv6Addr},
    ops::Range,
};

use dataplane::{
    counters::DropReason::{self, *},
    flow::{Address, Flow, FlowKey, Kind},
};

use crate::packets::naive_sum;

/// A parsed packet: [`Flow`], to be compared.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Meaning {
    pub key: FlowKey,
    pub kind: Kind,
    pub tcp_flags: u8,
    pub tos: u8,
    pub dont_fragment: bool,
    /// Where in the frame the IP packet is. Nowhere for ARP, as the next.
    pub ip: Range<usize>,
    pub l4_offset: usize,
    pub protocol: u8,
}

impl From<Flow> for Meaning {
    fn from(flow: Flow) -> Self {
        let Flow { key, kind, tcp_flags, tos, dont_fragment, protocol, .. } = flow;
        let start = usize::from(flow.ip_offset);
        let (ip, l4_offset) = match kind {
            Kind::Arp => (0..0, 0),
            _ => (start..start + usize::from(flow.ip_len), flow.l4_offset.into()),
        };
        Self { key, kind, tcp_flags, tos, dont_fragment, ip, l4_offset, protocol }
    }
}

/// What an IP header says.
struct Ip {
    src: Address,
    dst: Address,
    tos: u8,
    dont_fragment: bool,
    hop_limit: u8,
    protocol: u8,
    header_len: usize,
    len: usize,
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, DropReason> {
    Ok(u16::from_be_bytes(array_at(bytes, at)?))
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], DropReason> {
    let field = bytes.get(at..at + N).ok_or(Truncated)?;
    Ok(field.try_into().expect("as long as asked for"))
}

/// The EtherType behind at most two tags, and where what it names begins.
pub fn behind_tags(frame: &[u8]) -> Result<(u16, usize), DropReason> {
    let mut at = 12;
    while at < 20 && matches!(u16_at(frame, at)?, 0x8100 | 0x88a8) {
        at += 4;
    }
    Ok((u16_at(frame, at)?, at + 2))
}

/// What [`dataplane::parse::flow`] must say.
pub fn parse(frame: &[u8]) -> Result<Meaning, DropReason> {
    let (ethertype, offset) = behind_tags(frame)?;
    let packet = &frame[offset..];
    let ip = match ethertype {
        0x0800 => ipv4(packet)?,
        0x86dd => ipv6(packet)?,
        0x0806 => return arp(packet),
        _ => return Err(NotIp),
    };
    // Behind the IP packet there is padding.
    let l4 = &packet[ip.header_len..ip.len];
    let icmp = match (ethertype, ip.protocol) {
        (0x0800, 1) => Some(icmpv4(&ip, l4)?),
        (0x86dd, 58) => Some(icmpv6(&ip, l4)?),
        _ => None,
    };
    let (kind, key) = match icmp {
        Some(meaning) => meaning,
        None => (Kind::Packet, ports(ip.src, ip.dst, ip.protocol, l4)?),
    };
    Ok(Meaning {
        key,
        kind,
        tcp_flags: if ip.protocol == 6 { l4[13] } else { 0 },
        tos: ip.tos,
        dont_fragment: ip.dont_fragment,
        ip: offset..offset + ip.len,
        l4_offset: offset + ip.header_len,
        protocol: ip.protocol,
    })
}

/// RFC 791 section 3.1.
fn ipv4(packet: &[u8]) -> Result<Ip, DropReason> {
    let header: [u8; 20] = array_at(packet, 0)?;
    let (header_len, len) = (4 * usize::from(header[0] & 15), u16_at(packet, 2)?.into());
    if header[0] >> 4 != 4 || header_len < 20 || len < header_len {
        return Err(BadIpHeader);
    }
    if len > packet.len() {
        return Err(Truncated);
    }
    if u16_at(packet, 6)? & 0x3fff != 0 {
        return Err(Fragment);
    }
    Ok(Ip {
        src: address4(packet, 12)?,
        dst: address4(packet, 16)?,
        tos: header[1],
        dont_fragment: header[6] & 0x40 != 0,
        hop_limit: header[8],
        protocol: header[9],
        header_len,
        len,
    })
}

fn address4(bytes: &[u8], at: usize) -> Result<Address, DropReason> {
    Ok(IpAddr::from(array_at::<4>(bytes, at)?).into())
}

/// RFC 8200 section 3.
fn ipv6(packet: &[u8]) -> Result<Ip, DropReason> {
    let header: [u8; 40] = array_at(packet, 0)?;
    if header[0] >> 4 != 6 {
        return Err(BadIpHeader);
    }
    let len = 40 + usize::from(u16_at(packet, 4)?);
    let payload = packet.get(40..len).ok_or(Truncated)?;
    let (protocol, extensions_len) = extensions(header[6], payload, false)?;
    Ok(Ip {
        src: address6(packet, 8)?,
        dst: address6(packet, 24)?,
        tos: header[0] << 4 | header[1] >> 4,
        dont_fragment: true,
        hop_limit: header[7],
        protocol,
        header_len: 40 + extensions_len,
        len,
    })
}

/// An IPv4 address in disguise is none.
fn address6(bytes: &[u8], at: usize) -> Result<Address, DropReason> {
    let address = Ipv6Addr::from(array_at::<16>(bytes, at)?);
    if address.to_ipv4_mapped().is_some() {
        Err(BadIpHeader)
    } else {
        Ok(IpAddr::from(address).into())
    }
}

/// What the extension headers end with, and their length: eight of them at most, RFC 8200 section 4. A
/// *quoted* first fragment is as good as a whole packet.
fn extensions(first: u8, payload: &[u8], quoted: bool) -> Result<(u8, usize), DropReason> {
    let (mut next, mut at, mut count) = (first, 0, 0);
    while matches!(next, 0 | 43 | 44 | 51 | 60) {
        let len = extension_len(next, payload, at, quoted)?;
        if count == 8 {
            return Err(BadIpHeader);
        }
        (next, at, count) = (payload[at], at + len, count + 1);
    }
    Ok((next, at))
}

fn extension_len(number: u8, payload: &[u8], at: usize, quoted: bool) -> Result<usize, DropReason> {
    let units: [u8; 2] = array_at(payload, at)?;
    let len = match number {
        44 => {
            let offset_and_more = u16_at(array_at::<8>(payload, at)?.as_slice(), 2)?;
            if offset_and_more & if quoted { 0xfff8 } else { 0xfff9 } != 0 {
                return Err(Fragment);
            }
            8
        }
        51 => 4 * (usize::from(units[1]) + 2), // RFC 4302 section 2.2
        _ => 8 * (usize::from(units[1]) + 1),
    };
    payload.get(at..at + len).ok_or(Truncated)?;
    Ok(len)
}

/// Of TCP, UDP and SCTP, whose whole header must be there, but for options.
fn ports(src: Address, dst: Address, protocol: u8, l4: &[u8]) -> Result<FlowKey, DropReason> {
    let header_len = match protocol {
        6 => 20,
        17 => 8,
        132 => 12,
        _ => return Err(UnknownProtocol),
    };
    if l4.len() < header_len {
        return Err(Truncated);
    }
    Ok(FlowKey { src, dst, src_port: u16_at(l4, 0)?, dst_port: u16_at(l4, 2)?, protocol })
}

/// A packet without ports.
fn no_ports(src: Address, dst: Address, protocol: u8) -> FlowKey {
    FlowKey { src, dst, src_port: 0, dst_port: 0, protocol }
}

/// RFC 792.
fn icmpv4(ip: &Ip, l4: &[u8]) -> Result<(Kind, FlowKey), DropReason> {
    let [kind, code, ..] = array_at::<8>(l4, 0)?;
    match (kind, code) {
        (8, 0) => Ok((Kind::Echo, no_ports(ip.src, ip.dst, 1))),
        (3 | 11 | 12, _) => {
            let quoted = &l4[8..];
            let header: [u8; 20] = array_at(quoted, 0)?;
            let header_len = 4 * usize::from(header[0] & 15);
            let later_fragment = u16_at(quoted, 6)? & 0x1fff != 0;
            if header[0] >> 4 != 4 || header_len < 20 || later_fragment {
                return Err(IcmpUnmatched);
            }
            let (src, dst) = (address4(quoted, 12)?, address4(quoted, 16)?);
            error_about(ip, src, dst, header[9], quoted, header_len)
        }
        _ => Err(UnknownProtocol),
    }
}

/// RFC 4443 and RFC 4861.
fn icmpv6(ip: &Ip, l4: &[u8]) -> Result<(Kind, FlowKey), DropReason> {
    let [kind, code, ..] = array_at::<8>(l4, 0)?;
    match (kind, code) {
        (128, 0) => Ok((Kind::Echo, no_ports(ip.src, ip.dst, 58))),
        (1..=4, _) => {
            let quoted = &l4[8..];
            let header: [u8; 40] = array_at(quoted, 0)?;
            let (protocol, extensions_len) =
                extensions(header[6], &quoted[40..], true).map_err(|_| IcmpUnmatched)?;
            // Quoted addresses may be anything: they have to match.
            let address = |at| array_at::<16>(quoted, at).map(Address::v6);
            error_about(ip, address(8)?, address(24)?, protocol, quoted, 40 + extensions_len)
        }
        (135, 0) if ip.hop_limit == 255 => {
            let target = array_at::<16>(l4, 8)?;
            if !is_valid_solicitation(ip, l4) {
                return Err(UnknownProtocol);
            }
            let target = address6(&target, 0)?;
            Ok((Kind::NeighbourSolicitation, no_ports(ip.src, target, 58)))
        }
        _ => Err(UnknownProtocol),
    }
}

/// RFC 4861 section 7.1.1, less what the caller has looked at.
fn is_valid_solicitation(ip: &Ip, l4: &[u8]) -> bool {
    let mut options = &l4[24..];
    let mut names_its_station = false;
    while options.len() >= 2 {
        let len = 8 * usize::from(options[1]);
        if len == 0 || len > options.len() {
            return false;
        }
        names_its_station |= options[0] == 1;
        options = &options[len..];
    }
    let IpAddr::V6(dst) = IpAddr::from(ip.dst) else { return false };
    let to_the_group = dst.octets()[..13] == [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff];
    let from_nobody = ip.src == Address::from(IpAddr::from(Ipv6Addr::UNSPECIFIED));
    let sum = naive_sum(&[&pseudo_header(ip.src.into(), ip.dst.into(), 58, l4.len()), l4].concat());
    sum == 0xffff && (!from_nobody || (to_the_group && !names_its_station))
}

/// An error about a packet from `src` to `dst` belongs to the flow the other way. Four bytes of the quoted
/// transport header are enough.
fn error_about(
    ip: &Ip,
    src: Address,
    dst: Address,
    protocol: u8,
    quoted: &[u8],
    ports_at: usize,
) -> Result<(Kind, FlowKey), DropReason> {
    let [from, to] = [u16_at(quoted, ports_at)?, u16_at(quoted, ports_at + 2)?];
    if !matches!(protocol, 6 | 17 | 132) || src != ip.dst {
        return Err(IcmpUnmatched);
    }
    Ok((Kind::IcmpError, FlowKey { src: dst, dst: src, src_port: to, dst_port: from, protocol }))
}

/// RFC 826, for IPv4 over Ethernet.
fn arp(packet: &[u8]) -> Result<Meaning, DropReason> {
    let packet: [u8; 28] = array_at(packet, 0)?;
    if packet[..8] != [0, 1, 0x08, 0x00, 6, 4, 0, 1] {
        return Err(NotIp);
    }
    Ok(Meaning {
        key: no_ports(address4(&packet, 14)?, address4(&packet, 24)?, 0),
        kind: Kind::Arp,
        tcp_flags: 0,
        tos: 0,
        dont_fragment: false,
        ip: 0..0,
        l4_offset: 0,
        protocol: 0,
    })
}

/// RFC 9293 section 3.1 and RFC 8200 section 8.1: their sums are the same.
pub fn pseudo_header(src: IpAddr, dst: IpAddr, protocol: u8, l4_len: usize) -> Vec<u8> {
    let mut bytes = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => [src.octets(), dst.octets()].concat(),
        (IpAddr::V6(src), IpAddr::V6(dst)) => [src.octets(), dst.octets()].concat(),
        _ => panic!("one family"),
    };
    bytes.extend((l4_len as u32).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes
}
