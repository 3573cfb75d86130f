//! The packets that leave: encapsulated, cut, or answers.

use std::net::IpAddr;

use dataplane::{
    encap::Tunnel,
    flow::{Address, FlowKey},
    wire::ethernet::MacAddr,
};
use etherparse::{
    EtherType, Ethernet2Header, Icmpv4Type, IpFragOffset, IpHeaders, Ipv4Header, Ipv6Header,
    PacketBuilder, VlanId, icmpv4::DestUnreachableHeader, ip_number,
};

use super::parse::{Meaning, pseudo_header};
use crate::packets::naive_sum;

/// An IP packet in its tunnel. `hash` is the flow's.
///
/// There are two right answers if the packet's own transport checksum is wrong: an outer one over what is
/// there, and one that takes the inner one for right (Linux's local checksum offload).
pub fn encapsulated(tunnel: &Tunnel, packet: &Meaning, ip: &[u8], hash: u64) -> [Vec<u8>; 2] {
    let right = as_if_right(packet, ip);
    let mut trusting = encapsulate(tunnel, packet.tos, &right, hash);
    if right == ip {
        return [trusting.clone(), trusting];
    }
    let inner_at = trusting.len() - ip.len();
    trusting[inner_at..].copy_from_slice(ip);
    [encapsulate(tunnel, packet.tos, ip, hash), trusting]
}

/// RFC 7348 section 5.
fn encapsulate(tunnel: &Tunnel, tos: u8, ip: &[u8], hash: u64) -> Vec<u8> {
    let mut payload = (0x0800_0000_u64 << 32 | u64::from(tunnel.vni) << 8).to_be_bytes().to_vec();
    Ethernet2Header {
        source: tunnel.inner_src_mac.0,
        destination: tunnel.inner_dst_mac.0,
        ether_type: if tunnel.inner_v6 { EtherType::IPV6 } else { EtherType::IPV4 },
    }
    .write(&mut payload)
    .unwrap();
    payload.extend(ip);

    let entropy = (hash >> 50) as u32; // the upper 14 bits
    let outer = match (tunnel.src, tunnel.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let mut header =
                Ipv4Header::new(0, 64, ip_number::UDP, src.octets(), dst.octets()).unwrap();
            header.dont_fragment = true;
            header.dscp = (tos >> 2).try_into().unwrap();
            header.ecn = (tos & 3).try_into().unwrap();
            IpHeaders::Ipv4(header, Default::default())
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let header = Ipv6Header {
                traffic_class: tos,
                flow_label: (entropy.wrapping_mul(0x9e37_79b1) >> 12).try_into().unwrap(),
                hop_limit: 64,
                source: src.octets(),
                destination: dst.octets(),
                ..Default::default()
            };
            IpHeaders::Ipv6(header, Default::default())
        }
        _ => panic!("one family"),
    };
    let builder = PacketBuilder::ethernet2(tunnel.src_mac.0, tunnel.dst_mac.0);
    let vlan = |id: u16| VlanId::try_new(id).unwrap();
    let builder = match *tunnel.vlans {
        [] => builder.ip(outer),
        [one] => builder.single_vlan(vlan(one)).ip(outer),
        [outermost, inner] => builder.double_vlan(vlan(outermost), vlan(inner)).ip(outer),
        _ => panic!("two tags at most"),
    };
    let mut bytes = Vec::new();
    let source_port = 49_152 + entropy as u16;
    builder.udp(source_port, tunnel.udp_port).write(&mut bytes, &payload).unwrap();
    if !tunnel.udp_checksum {
        let at = bytes.len() - payload.len() - 2;
        bytes[at..at + 2].fill(0);
    }
    bytes
}

/// Where in the transport header the checksum is, if it has one that is an Internet checksum.
fn checksum_at(packet: &Meaning) -> Option<usize> {
    match packet.protocol {
        6 => Some(16),
        17 => Some(6),
        _ => None,
    }
}

/// The pseudo header of the packet's transport.
pub fn pseudo_of(packet: &Meaning, l4: &[u8]) -> Vec<u8> {
    let (src, dst) = addresses(packet);
    pseudo_header(src, dst, packet.protocol, l4.len())
}

/// The IP packet with the right transport checksum.
fn with_checksum(packet: &Meaning, ip: &[u8], field: usize) -> Vec<u8> {
    let (header, l4) = ip.split_at(packet.l4_offset - packet.ip.start);
    let mut l4 = l4.to_vec();
    l4[field..field + 2].fill(0);
    let pseudo = pseudo_of(packet, &l4);
    let checksum = match !naive_sum(&[&pseudo, &*l4].concat()) {
        0 if packet.protocol == 17 => 0xffff, // zero means "none", RFC 768
        checksum => checksum,
    };
    l4[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    [header, &l4].concat()
}

/// The IP packet as a sender meant it who left the transport checksum to its network card: the field holds
/// the pseudo header's sum. `None` if it does not.
pub fn completed(packet: &Meaning, ip: &[u8]) -> Option<Vec<u8>> {
    let field = checksum_at(packet)?;
    let l4 = &ip[packet.l4_offset - packet.ip.start..];
    let pseudo = pseudo_of(packet, l4);
    let is_partial = l4[field..field + 2] == naive_sum(&pseudo).to_be_bytes();
    // Nobody leaves a datagram to the card that is shorter than its IP packet: the sums cover less.
    let is_whole = packet.protocol != 17 || l4[4..6] == (l4.len() as u16).to_be_bytes();
    (is_partial && is_whole).then(|| with_checksum(packet, ip, field))
}

/// The IP packet as it would be if its transport checksum were right, where the headers alone tell what
/// that covers: no options, no extensions, and UDP only with a checksum, and as long as the packet.
fn as_if_right(packet: &Meaning, ip: &[u8]) -> Vec<u8> {
    let header_len = packet.l4_offset - packet.ip.start;
    let l4 = &ip[header_len..];
    let covered = match packet.protocol {
        6 => true,
        17 => l4[6..8] != [0, 0] && l4[4..6] == (l4.len() as u16).to_be_bytes(),
        _ => false,
    };
    let plain = header_len == if ip[0] >> 4 == 4 { 20 } else { 40 };
    match checksum_at(packet) {
        Some(field) if covered && plain => with_checksum(packet, ip, field),
        _ => ip.to_vec(),
    }
}

/// The fragments of an IPv4 packet without options that may be cut, RFC 791 section 3.2: eight at most.
pub fn cut(packet: &Meaning, ip: &[u8], mtu: u16) -> Option<Vec<Vec<u8>>> {
    let piece_len = usize::from(mtu).saturating_sub(20) / 8 * 8;
    let plain = ip[0] == 0x45;
    if !plain || packet.dont_fragment || piece_len == 0 {
        return None;
    }
    let (header, _) = Ipv4Header::from_slice(ip).unwrap();
    let pieces: Vec<_> = ip[20..].chunks(piece_len).collect();
    let fragment = |(i, piece): (usize, &&[u8])| {
        let mut header = header.clone();
        header.more_fragments = i + 1 < pieces.len();
        header.fragment_offset = IpFragOffset::try_new((i * piece_len / 8) as u16).unwrap();
        header.set_payload_len(piece.len()).unwrap();
        header.header_checksum = header.calc_header_checksum();
        [&header.to_bytes()[..], piece].concat()
    };
    (pieces.len() <= 8).then(|| pieces.iter().enumerate().map(fragment).collect())
}

/// The frame, from `own` to where it came from.
fn returned(frame: &[u8], own: MacAddr) -> Vec<u8> {
    [&frame[6..12], &own.0, &frame[12..]].concat()
}

fn addresses(packet: &Meaning) -> (IpAddr, IpAddr) {
    (packet.key.src.into(), packet.key.dst.into())
}

/// RFC 792 and RFC 4443 section 4.2. A wrong checksum stays as wrong as it is.
pub fn echo_reply(frame: &[u8], packet: &Meaning, own: MacAddr) -> Vec<u8> {
    let mut bytes = returned(&frame[..packet.ip.end], own);
    let (headers, l4) = bytes.split_at_mut(packet.l4_offset);
    let ip = &mut headers[packet.ip.start..];
    let (request, reply) = match addresses(packet) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            ip[8] = 64;
            ip[12..20].copy_from_slice(&[dst.octets(), src.octets()].concat());
            ip[10..12].fill(0);
            let checksum = !naive_sum(ip);
            ip[10..12].copy_from_slice(&checksum.to_be_bytes());
            (8, 0)
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            ip[7] = 64;
            ip[8..40].copy_from_slice(&[dst.octets(), src.octets()].concat());
            (128, 129)
        }
        _ => panic!("one family"),
    };
    l4[0] = reply;
    // What the type loses the checksum gains, in arithmetic modulo 65,535.
    let old = i32::from(u16::from_be_bytes([l4[2], l4[3]]));
    let new = match (old + (request - i32::from(reply)) * 256).rem_euclid(0xffff) {
        0 => 0xffff,
        new => new as u16,
    };
    l4[2..4].copy_from_slice(&new.to_be_bytes());
    bytes
}

/// RFC 826. `at` is where the ARP packet begins.
pub fn arp_reply(frame: &[u8], at: usize, own: MacAddr) -> Vec<u8> {
    let mut bytes = returned(frame, own);
    let arp = &mut bytes[at..];
    let (sender, target_ip) = (arp[8..18].to_vec(), arp[24..28].to_vec());
    arp[7] = 2;
    arp[8..28].copy_from_slice(&[&own.0, &target_ip[..], &sender].concat());
    bytes
}

/// RFC 4861 section 4.4. Who has no address yet is told with everybody else.
pub fn advertisement(frame: &[u8], packet: &Meaning, own: MacAddr) -> Vec<u8> {
    let (IpAddr::V6(src), IpAddr::V6(target)) = addresses(packet) else { panic!("IPv6") };
    let (to, to_mac, solicited) = if src.is_unspecified() {
        ("ff02::1".parse().unwrap(), [0x33, 0x33, 0, 0, 0, 1], 0)
    } else {
        (src, frame[6..12].try_into().unwrap(), 0x40)
    };
    let body = [&target.octets()[..], &[2, 1], &own.0].concat();
    let mut bytes = Vec::new();
    PacketBuilder::ethernet2(own.0, to_mac)
        .ipv6(target.octets(), to.octets(), 255)
        .icmpv6_raw(136, 0, [solicited | 0x20, 0, 0, 0])
        .write(&mut bytes, &body)
        .unwrap();
    with_tags_of(frame, packet, &bytes)
}

/// ICMP's word that the packet does not fit, RFC 1191 section 4 and RFC 4443 section 3.2.
pub fn too_big(frame: &[u8], packet: &Meaning, ip: &[u8], own: MacAddr, mtu: u16) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(own.0, frame[6..12].try_into().unwrap());
    let mut bytes = Vec::new();
    match addresses(packet) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let mut header =
                Ipv4Header::new(0, 64, ip_number::ICMP, dst.octets(), src.octets()).unwrap();
            header.dont_fragment = false;
            header.dscp = (0xc0 >> 2).try_into().unwrap(); // RFC 1812 section 4.3.2.5
            let kind = DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: mtu };
            builder
                .ip(IpHeaders::Ipv4(header, Default::default()))
                .icmpv4(Icmpv4Type::DestinationUnreachable(kind))
                .write(&mut bytes, &ip[..ip.len().min(576 - 28)])
                .unwrap();
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => builder
            .ipv6(dst.octets(), src.octets(), 64)
            .icmpv6_raw(2, 0, u32::from(mtu).to_be_bytes())
            .write(&mut bytes, &ip[..ip.len().min(1280 - 48)])
            .unwrap(),
        _ => panic!("one family"),
    }
    with_tags_of(frame, packet, &bytes)
}

/// TCP's word that there is no such connection, RFC 9293 section 3.10.7.1.
pub fn reset(frame: &[u8], packet: &Meaning, own: MacAddr) -> Vec<u8> {
    let segment = &frame[packet.l4_offset..packet.ip.end];
    let word = |at: usize| u32::from_be_bytes(segment[at..at + 4].try_into().unwrap());
    // Whatever it says about the length of its header, which nobody has judged.
    let data = segment.len().saturating_sub(4 * usize::from(segment[12] >> 4)) as u32;
    let [fin, syn, ack] = [0x01, 0x02, 0x10].map(|flag| packet.tcp_flags & flag != 0);
    let following = word(4).wrapping_add(data + u32::from(syn) + u32::from(fin));
    let numbers = if ack { (word(8), None) } else { (0, Some(following)) };
    let bytes = segment_of_ours(packet.key.reversed(), own, &frame[6..12], true, numbers);
    with_tags_of(frame, packet, &bytes)
}

/// A TCP segment without data that `own` sends to this station, with a sequence number and an acknowledgement.
pub fn segment_of_ours(
    key: FlowKey,
    own: MacAddr,
    to: &[u8],
    rst: bool,
    (seq, ack): (u32, Option<u32>),
) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(own.0, to.try_into().unwrap());
    let builder = match (IpAddr::from(key.src), IpAddr::from(key.dst)) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let mut header =
                Ipv4Header::new(0, 64, ip_number::TCP, src.octets(), dst.octets()).unwrap();
            header.dont_fragment = false;
            builder.ip(IpHeaders::Ipv4(header, Default::default()))
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => builder.ipv6(src.octets(), dst.octets(), 64),
        _ => panic!("one family"),
    };
    let mut builder = builder.tcp(key.src_port, key.dst_port, seq, 0);
    if rst {
        builder = builder.rst();
    }
    if let Some(ack) = ack {
        builder = builder.ack(ack);
    }
    let mut bytes = Vec::new();
    builder.write(&mut bytes, &[]).unwrap();
    bytes
}

/// What came in a tunnel goes back in it: these are the bytes in front of the inner frame as they came, and the
/// inner answer.
pub fn sent_back(headers: &[u8], outer: &Meaning, inner: &[u8], own: MacAddr) -> Vec<u8> {
    let mut bytes = [&returned(headers, own), inner].concat();
    let (front, l4) = bytes.split_at_mut(outer.l4_offset);
    let ip = &mut front[outer.ip.start..];
    let len = l4.len() as u16;
    l4[4..6].copy_from_slice(&len.to_be_bytes());
    l4[6..8].fill(0); // RFC 7348 section 4.1
    match addresses(outer) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            ip[8] = 64;
            ip[12..20].copy_from_slice(&[dst.octets(), src.octets()].concat());
            let total = ip.len() as u16 + len;
            ip[2..4].copy_from_slice(&total.to_be_bytes());
            ip[10..12].fill(0);
            let checksum = !naive_sum(ip);
            ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            ip[7] = 64;
            ip[8..40].copy_from_slice(&[dst.octets(), src.octets()].concat());
            let payload = ip.len() as u16 - 40 + len;
            ip[4..6].copy_from_slice(&payload.to_be_bytes());
            let pseudo = pseudo_header(dst.into(), src.into(), 17, l4.len());
            let checksum = match !naive_sum(&[&pseudo, &*l4].concat()) {
                0 => 0xffff,
                checksum => checksum,
            };
            l4[6..8].copy_from_slice(&checksum.to_be_bytes());
        }
        _ => panic!("one family"),
    }
    bytes
}

/// An answer with the tags of its question.
fn with_tags_of(question: &[u8], packet: &Meaning, answer: &[u8]) -> Vec<u8> {
    [&answer[..12], &question[12..packet.ip.start], &answer[14..]].concat()
}

/// Whether it can be one host's address: to others nothing is answered, RFC 1122 section 3.2.2.
pub fn is_host(address: Address) -> bool {
    match IpAddr::from(address) {
        IpAddr::V4(ip) => !ip.is_loopback() && (1..224).contains(&ip.octets()[0]),
        IpAddr::V6(ip) => !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast(),
    }
}
