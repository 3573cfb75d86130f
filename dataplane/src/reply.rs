//! Packets that we answer ourselves, written over the ones they answer: ping, ARP, neighbour
//! solicitations, and ICMP's word that a packet is too big.
//!
//! An answer leaves by the port its question came in by, with the question's VLAN tags, to the station
//! that sent it: the way back is the way it came.

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::{
    counters::DropReason,
    flow::{Address, Flow, protocol},
    port::Frame,
    wire::{
        arp,
        checksum::{self, Sum},
        ethernet::MacAddr,
        icmp, ipv4, ipv6,
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
    write_ipv6(ip, LEN, flow.key.dst, to, 255);
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
        write_ipv6(ip, l4.len(), from, to, TTL);
        l4[0] = icmp::v6::PACKET_TOO_BIG;
        seal_icmpv6(l4, from, to);
    } else {
        write_ipv4(ip, l4.len(), from, to);
        l4[0] = icmp::v4::DESTINATION_UNREACHABLE;
        l4[1] = icmp::v4::FRAGMENTATION_NEEDED;
        let sum = Sum::default().add_bytes(l4).checksum();
        l4[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    Ok(())
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

fn write_ipv4(bytes: &mut [u8], payload_len: usize, src: Address, dst: Address) {
    let mut header = ipv4::Header::new_zeroed();
    header.version_ihl = ipv4::VERSION_IHL;
    header.tos = 0xc0; // internetwork control, as RFC 1812 section 4.3.2.5 asks of ICMP errors
    header.total_len = ((ipv4::LEN + payload_len) as u16).into();
    header.ttl = TTL;
    header.protocol = protocol::ICMP;
    header.src = src.as_v4().unwrap_or_default();
    header.dst = dst.as_v4().unwrap_or_default();
    bytes.copy_from_slice(header.as_bytes());
    ipv4::seal(bytes);
}

fn write_ipv6(bytes: &mut [u8], payload_len: usize, src: Address, dst: Address, hop_limit: u8) {
    let header = ipv6::Header {
        version_class_label: (6 << 28).into(),
        payload_len: (payload_len as u16).into(),
        next_header: protocol::ICMPV6,
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
