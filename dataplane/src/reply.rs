//! Packets that we answer ourselves, written over the ones they answer: ping, ARP, neighbour
//! solicitations, and the word that a packet is too big or its connection unknown.
//!
//! An answer leaves by the port its question came in by, with the question's VLAN tags, to the station
//! that sent it: the way back is the way it came.

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::{
    counters::DropReason,
    flow::{Address, Flow, FlowKey, protocol, tcp_flags},
    nat::{Way, translate},
    port::Frame,
    wire::{
        arp,
        checksum::{self, Sum},
        ethernet::MacAddr,
        icmp, ipv4, ipv6, tcp,
    },
};

/// TTL or hop limit of what we send.
const TTL: u8 = 64;

/// The longest ICMP error, headers included, in bytes: RFC 1812 section 4.3.2.3 and RFC 4443 section 2.4.
const MAX_ERROR_V4: usize = 576;
const MAX_ERROR_V6: usize = 1280;

/// Turns an echo request into its reply, RFC 792 and RFC 4443 section 4.2.
pub fn echo(frame: &mut Frame, flow: &Flow, own: MacAddr) {
    frame.set_len(usize::from(flow.ip_offset) + usize::from(flow.ip_len)); // less padding
    return_to_sender(frame.packet_mut(), own);
    let (ip, l4) = split_ip(frame.packet_mut(), flow);
    let (request, reply) = if flow.is_v6() {
        swap(&mut ip[8..40]);
        ip[7] = TTL;
        (icmp::v6::ECHO_REQUEST, icmp::v6::ECHO_REPLY)
    } else {
        swap(&mut ip[12..20]);
        ip[8] = TTL;
        ipv4::seal(ip);
        (icmp::v4::ECHO_REQUEST, icmp::v4::ECHO_REPLY)
    };
    l4[0] = reply;
    let old = u16::from_be_bytes([l4[2], l4[3]]);
    let word = |kind: u8| u16::from(kind) << 8;
    // Of a message that is all zero the sum is +0, which an update cannot tell from -0 (RFC 1624
    // section 3); as a checksum 0xffff stands for both.
    let new = match checksum::update(old, word(request), word(reply)) {
        0 => 0xffff,
        new => new,
    };
    l4[2..4].copy_from_slice(&new.to_be_bytes());
}

/// Turns an ARP request into the reply that `own` has the address, RFC 826.
///
/// # Errors
/// If the packet is no longer what the parser saw.
pub fn arp(frame: &mut Frame, flow: &Flow, own: MacAddr) -> Result<(), DropReason> {
    let packet = frame.packet_mut();
    return_to_sender(packet, own);
    let (arp, _) = arp::Packet::mut_from_prefix(&mut packet[usize::from(flow.ip_offset)..])
        .map_err(|_| DropReason::Truncated)?;
    arp.operation = arp::REPLY.into();
    (arp.target_mac, arp.sender_mac) = (arp.sender_mac, own);
    (arp.target_ip, arp.sender_ip) = (arp.sender_ip, arp.target_ip);
    Ok(())
}

/// Turns a neighbour solicitation into the advertisement that `own` has the address, RFC 4861 section 4.4.
///
/// # Errors
/// If the frame ends too soon: an advertisement may be longer than its solicitation.
pub fn neighbour(frame: &mut Frame, flow: &Flow, own: MacAddr) -> Result<(), DropReason> {
    const LEN: usize = icmp::LEN + 16 + 8; // header, target, target link-layer address option
    const OVERRIDE: u8 = 0x20;
    const SOLICITED: u8 = 0x40;
    // Someone who has no address yet asks whether ours is free: everybody is told.
    let all_nodes = Address::v6([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    let probing = flow.key.src == Address(0);
    let to = if probing { all_nodes } else { flow.key.src };

    let len = usize::from(flow.ip_offset) + ipv6::LEN + LEN;
    if len > frame.capacity() {
        return Err(DropReason::NoHeadroom);
    }
    frame.set_len(len);
    let packet = frame.packet_mut();
    return_to_sender(packet, own);
    if probing {
        packet[..6].copy_from_slice(&[0x33, 0x33, 0, 0, 0, 1]);
    }
    let (ip, l4) = packet[usize::from(flow.ip_offset)..].split_at_mut(ipv6::LEN);
    write_ipv6(ip, protocol::ICMPV6, LEN, flow.key.dst, to, 255);
    l4.fill(0);
    l4[0] = icmp::v6::NEIGHBOUR_ADVERTISEMENT;
    l4[4] = if probing { OVERRIDE } else { OVERRIDE | SOLICITED };
    l4[8..24].copy_from_slice(&flow.key.dst.0.to_be_bytes());
    l4[24..26].copy_from_slice(&[2, 1]); // target link-layer address, 8 bytes
    l4[26..32].copy_from_slice(&own.0);
    seal_icmpv6(l4, flow.key.dst, to);
    Ok(())
}

/// Turns a packet that does not fit into the ICMP error that says what would, sourced from the VIP:
/// RFC 1191 section 4, RFC 4443 section 3.2. `mtu` is the largest inner IP packet, in bytes.
///
/// # Errors
/// If the frame has no room in front.
pub fn too_big(frame: &mut Frame, flow: &Flow, own: MacAddr, mtu: u16) -> Result<(), DropReason> {
    let ip_offset = usize::from(flow.ip_offset);
    let (ip_header, most) =
        if flow.is_v6() { (ipv6::LEN, MAX_ERROR_V6) } else { (ipv4::LEN, MAX_ERROR_V4) };
    let added = ip_header + icmp::LEN;
    let quoted = usize::from(flow.ip_len).min(most - added);
    frame.set_len(ip_offset + quoted);
    // The link header moves to the front, tags included; the packet it had becomes the quote.
    frame.grow_front(added).ok_or(DropReason::NoHeadroom)?;
    let packet = frame.packet_mut();
    packet.copy_within(added..added + ip_offset, 0);
    return_to_sender(packet, own);

    let (ip, l4) = packet[ip_offset..].split_at_mut(ip_header);
    let (from, to) = (flow.key.dst, flow.key.src);
    l4[..icmp::LEN].fill(0);
    l4[6..8].copy_from_slice(&mtu.to_be_bytes()); // the last two bytes in both versions
    if flow.is_v6() {
        write_ipv6(ip, protocol::ICMPV6, l4.len(), from, to, TTL);
        l4[0] = icmp::v6::PACKET_TOO_BIG;
        seal_icmpv6(l4, from, to);
    } else {
        write_ipv4(ip, protocol::ICMP, l4.len(), from, to);
        l4[0] = icmp::v4::DESTINATION_UNREACHABLE;
        l4[1] = icmp::v4::FRAGMENTATION_NEEDED;
        let sum = Sum::default().add_bytes(l4).checksum();
        l4[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    Ok(())
}

/// Turns a TCP segment that belongs to no connection into the reset that its sender believes, RFC 9293 section
/// 3.10.7.1.
///
/// # Errors
/// If the packet is no longer what the parser saw.
pub fn reset(frame: &mut Frame, flow: &Flow, own: MacAddr) -> Result<(), DropReason> {
    let (ip_offset, l4_offset) = (usize::from(flow.ip_offset), usize::from(flow.l4_offset));
    let segment = &frame.packet()[l4_offset..ip_offset + usize::from(flow.ip_len)];
    let (header, _) = tcp::Header::ref_from_prefix(segment).map_err(|_| DropReason::Truncated)?;
    let is_set = |flag: u8| u32::from(header.flags() & flag != 0);
    let data = segment.len().saturating_sub(header.header_len()) as u32;
    let next = header.seq.get().wrapping_add(data);
    let next = next.wrapping_add(is_set(tcp_flags::SYN)).wrapping_add(is_set(tcp_flags::FIN));
    let (seq, ack, flags) = match is_set(tcp_flags::ACK) {
        0 => (0, next, tcp_flags::RST | tcp_flags::ACK),
        _ => (header.ack.get(), 0, tcp_flags::RST),
    };
    let ip_header = if flow.is_v6() { ipv6::LEN } else { ipv4::LEN };
    // As long as it was or shorter: a TCP packet has both headers.
    frame.set_len(ip_offset + ip_header + tcp::LEN);
    let packet = frame.packet_mut();
    return_to_sender(packet, own);
    write_tcp(&mut packet[ip_offset..], &flow.key.reversed(), seq, ack, flags);
    Ok(())
}

/// Writes, into an empty frame, a segment from the VIP to the client of a connection that `key` runs along.
/// It acknowledges nothing and is hardly ever within the window, so the client says what would be.
///
/// # Errors
/// If the frame is too short.
pub fn keepalive(
    frame: &mut Frame,
    key: &FlowKey,
    way: &Way,
    own: MacAddr,
) -> Result<(), DropReason> {
    let len = if key.is_v6() { ipv6::LEN } else { ipv4::LEN } + tcp::LEN;
    if len > frame.capacity() {
        return Err(DropReason::NoHeadroom);
    }
    frame.set_len(len);
    let key = key.reversed();
    write_tcp(frame.packet_mut(), &key, 0, 0, tcp_flags::ACK);
    let flow = Flow { key, ip_offset: 0, ip_len: len as u16, ..Flow::NONE };
    translate::send_by(frame, &flow, way, own)
}

/// Writes IP and TCP headers without options or payload.
fn write_tcp(packet: &mut [u8], key: &FlowKey, seq: u32, ack: u32, flags: u8) {
    let v6 = key.is_v6();
    let (ip, l4) = packet.split_at_mut(if v6 { ipv6::LEN } else { ipv4::LEN });
    match v6 {
        true => write_ipv6(ip, protocol::TCP, l4.len(), key.src, key.dst, TTL),
        false => write_ipv4(ip, protocol::TCP, l4.len(), key.src, key.dst),
    }
    let mut header = tcp::Header {
        src_port: key.src_port.into(),
        dst_port: key.dst_port.into(),
        seq: seq.into(),
        ack: ack.into(),
        offset_flags: (5 << 12 | u16::from(flags)).into(),
        window: 0.into(),
        checksum: 0.into(),
        urgent: 0.into(),
    };
    // The 0xffff of a mapped IPv4 address is nothing in such a sum.
    let addresses = [key.src, key.dst].map(|address| address.0.to_be_bytes());
    let [src, dst] = addresses;
    let pseudo = checksum::pseudo_header_v6(src, dst, protocol::TCP, l4.len() as u32);
    header.checksum = pseudo.add_bytes(header.as_bytes()).checksum().into();
    l4.copy_from_slice(header.as_bytes());
}

/// Sends what came out of a tunnel back through it, to whoever it came from. The inner frame is written already.
pub fn tunnel(frame: &mut Frame, outer: &Flow, own: MacAddr) {
    return_to_sender(frame.packet_mut(), own);
    let (ip, l4) = split_ip(frame.packet_mut(), outer);
    let l4_len = l4.len() as u16;
    l4[4..6].copy_from_slice(&l4_len.to_be_bytes());
    let checksum = if outer.is_v6() {
        swap(&mut ip[8..40]);
        let payload_len = (ip.len() - ipv6::LEN) as u16 + l4_len;
        ip[4..6].copy_from_slice(&payload_len.to_be_bytes());
        ip[7] = TTL;
        l4[6..8].fill(0);
        let (src, dst) = (outer.key.dst.0.to_be_bytes(), outer.key.src.0.to_be_bytes());
        let pseudo = checksum::pseudo_header_v6(src, dst, protocol::UDP, l4.len() as u32);
        match pseudo.add_bytes(l4).checksum() {
            0 => 0xffff, // zero would mean "none", RFC 768
            checksum => checksum,
        }
    } else {
        swap(&mut ip[12..20]);
        let ip_len = ip.len() as u16 + l4_len;
        ip[2..4].copy_from_slice(&ip_len.to_be_bytes());
        ip[8] = TTL;
        ipv4::seal(ip);
        0 // as RFC 7348 section 4 has it over IPv4
    };
    l4[6..8].copy_from_slice(&checksum.to_be_bytes());
}

/// Sends the frame back to the station it came from.
fn return_to_sender(packet: &mut [u8], own: MacAddr) {
    packet.copy_within(6..12, 0);
    packet[6..12].copy_from_slice(&own.0);
}

/// The IP header with its options, and what follows it.
fn split_ip<'a>(packet: &'a mut [u8], flow: &Flow) -> (&'a mut [u8], &'a mut [u8]) {
    packet[usize::from(flow.ip_offset)..].split_at_mut(usize::from(flow.l4_offset - flow.ip_offset))
}

/// Exchanges the two halves: a source and a destination address.
fn swap(addresses: &mut [u8]) {
    let half = addresses.len() / 2;
    let (src, dst) = addresses.split_at_mut(half);
    src.swap_with_slice(dst);
}

fn write_ipv4(bytes: &mut [u8], protocol: u8, payload_len: usize, src: Address, dst: Address) {
    let mut header = ipv4::Header::new_zeroed();
    header.version_ihl = ipv4::VERSION_IHL;
    if protocol == protocol::ICMP {
        header.tos = 0xc0; // internetwork control, as RFC 1812 section 4.3.2.5 asks of ICMP errors
    }
    header.total_len = ((ipv4::LEN + payload_len) as u16).into();
    header.ttl = TTL;
    header.protocol = protocol;
    header.src = src.as_v4().unwrap_or_default();
    header.dst = dst.as_v4().unwrap_or_default();
    bytes.copy_from_slice(header.as_bytes());
    ipv4::seal(bytes);
}

fn write_ipv6(
    bytes: &mut [u8],
    next_header: u8,
    payload_len: usize,
    src: Address,
    dst: Address,
    hop_limit: u8,
) {
    let header = ipv6::Header {
        version_class_label: (6 << 28).into(),
        payload_len: (payload_len as u16).into(),
        next_header,
        hop_limit,
        src: src.0.to_be_bytes(),
        dst: dst.0.to_be_bytes(),
    };
    bytes.copy_from_slice(header.as_bytes());
}

/// Writes the checksum of an ICMPv6 message.
fn seal_icmpv6(message: &mut [u8], src: Address, dst: Address) {
    message[2..4].fill(0);
    let (src, dst) = (src.0.to_be_bytes(), dst.0.to_be_bytes());
    let pseudo = checksum::pseudo_header_v6(src, dst, protocol::ICMPV6, message.len() as u32);
    let checksum = pseudo.add_bytes(message).checksum();
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
}
