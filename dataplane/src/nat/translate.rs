//! Another source and destination for a packet, and for the packet that an ICMP error quotes: addresses, ports
//! and checksums, RFC 3022 section 4 and RFC 5508 section 4. No other byte of a packet changes, but for the
//! MSS that a SYN offers.

use zerocopy::FromBytes;

use super::{Plain, Sums, Way};
use crate::{
    counters::DropReason,
    flow::{Address, Flow, protocol, tcp_flags},
    port::Frame,
    wire::{
        checksum::{self, Sum},
        ethernet::{self, MacAddr},
        icmp, ipv4, ipv6, tcp,
    },
};

/// An address and a port.
pub type End = (Address, u16);

/// The headers of a plain packet.
pub type PlainHeaders = [u8; ethernet::LEN + ipv4::LEN + tcp::LEN];

/// Gives a plain packet of TCP or UDP the source and destination of its slot. All offsets are constants, and no store
/// needs a check.
#[inline(always)]
pub fn plain(headers: &mut PlainHeaders, transport: u8, to: &Plain) {
    let (ip, l4) = headers[ethernet::LEN..].split_at_mut(ipv4::LEN);
    ip[12..20].copy_from_slice(&to.addresses.to_be_bytes());
    add(ip, 10, to.sums.addresses);
    ports(l4, transport, to.ports, to.sums.all);
}

/// Gives a packet of TCP or UDP another source and destination. `sums` is what changes by that.
pub fn packet(packet: &mut [u8], flow: &Flow, src: End, dst: End, sums: Sums) {
    let (ip, l4) = packet.split_at_mut(usize::from(flow.l4_offset));
    let ip = &mut ip[usize::from(flow.ip_offset)..];
    addresses(ip, [src.0, dst.0], sums.addresses, flow.is_v6());
    ports(l4, flow.protocol, both(src.1, dst.1), sums.all);
}

/// A source port above a destination port.
fn both(src: u16, dst: u16) -> u32 {
    u32::from(src) << 16 | u32::from(dst)
}

/// Overwrites the addresses of an IP header, and mends the checksum that IPv4 has.
fn addresses(ip: &mut [u8], ends: [Address; 2], change: u16, v6: bool) {
    put_addresses(ip, ends, v6);
    if !v6 {
        add(&mut ip[..ipv4::LEN], 10, change);
    }
}

fn put_addresses(ip: &mut [u8], [src, dst]: [Address; 2], v6: bool) {
    if v6 {
        let ip = &mut ip[..ipv6::LEN];
        ip[8..24].copy_from_slice(&src.0.to_be_bytes());
        ip[24..40].copy_from_slice(&dst.0.to_be_bytes());
    } else {
        let ip = &mut ip[..ipv4::LEN];
        ip[12..16].copy_from_slice(&(src.0 as u32).to_be_bytes());
        ip[16..20].copy_from_slice(&(dst.0 as u32).to_be_bytes());
    }
}

/// Overwrites the ports of a transport header and mends its checksum, as far as they are there.
#[inline(always)]
fn ports(l4: &mut [u8], transport: u8, ports: u32, change: u16) {
    l4[..4].copy_from_slice(&ports.to_be_bytes());
    if transport == protocol::TCP {
        if l4.len() >= 18 {
            add(l4, 16, change);
        }
    } else if l4.len() >= 8 && l4[6..8] != [0, 0] {
        add(l4, 6, change);
        if l4[6..8] == [0, 0] {
            l4[6..8].fill(0xff); // zero would mean "none", RFC 768
        }
    }
}

/// Adds to what a checksum covers, RFC 1624 equation 3.
#[inline(always)]
fn add(bytes: &mut [u8], at: usize, change: u16) {
    let old = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    bytes[at..at + 2].copy_from_slice(&checksum::shift(old, change).to_be_bytes());
}

/// Gives an ICMP error another source and destination, and the packet it quotes another `quoted` source and
/// destination. `sums` is what changes in the quote by that.
///
/// # Errors
/// If the error's own checksum is wrong: nobody shall see it right.
pub fn icmp_error(
    frame: &mut Frame,
    flow: &Flow,
    (src, dst): (Address, Address),
    quoted: (End, End),
    sums: Sums,
) -> Result<(), DropReason> {
    let (ip_offset, l4_offset) = (usize::from(flow.ip_offset), usize::from(flow.l4_offset));
    let packet = &mut frame.packet_mut()[ip_offset..ip_offset + usize::from(flow.ip_len)];
    let (ip, message) = packet.split_at_mut(l4_offset - ip_offset);
    let pseudo = |src: Address, dst: Address, len: usize| match flow.is_v6() {
        true => {
            let (src, dst) = (src.0.to_be_bytes(), dst.0.to_be_bytes());
            checksum::pseudo_header_v6(src, dst, protocol::ICMPV6, len as u32)
        }
        false => Sum::default(),
    };
    let (was_src, was_dst) = ends_of(ip, flow.is_v6());
    if pseudo(was_src, was_dst, message.len()).add_bytes(message).fold() != 0xffff {
        return Err(DropReason::UnknownProtocol);
    }
    let (header, quote) = message.split_at_mut(icmp::LEN);
    let l4 = quoted_transport(quote, flow.is_v6()).ok_or(DropReason::Truncated)?;
    let (quoted_ip, quoted_l4) = quote.split_at_mut(l4);
    addresses(quoted_ip, [quoted.0.0, quoted.1.0], sums.addresses, flow.is_v6());
    ports(quoted_l4, flow.key.protocol, both(quoted.0.1, quoted.1.1), sums.all);
    header[2..4].fill(0);
    put_addresses(ip, [src, dst], flow.is_v6());
    if !flow.is_v6() {
        ipv4::seal(ip); // the source may be a router: its change is not known in advance
    }
    let checksum = pseudo(src, dst, message.len()).add_bytes(message).checksum();
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    Ok(())
}

fn ends_of(ip: &[u8], v6: bool) -> (Address, Address) {
    let v4 = |at: usize| ip[at..].first_chunk().copied().map(Address::v4).unwrap_or_default();
    let wide = |at: usize| ip[at..].first_chunk().copied().map(Address::v6).unwrap_or_default();
    if v6 { (wide(8), wide(24)) } else { (v4(12), v4(16)) }
}

/// Where the transport header starts in a quoted packet, if its ports are there. The parser has found them.
fn quoted_transport(quote: &[u8], v6: bool) -> Option<usize> {
    let at = match v6 {
        false => ipv4::Header::ref_from_prefix(quote).ok()?.0.header_len(),
        // Behind extension headers the ports would not be those that the parser saw.
        true if [protocol::TCP, protocol::UDP].contains(quote.get(6)?) => ipv6::LEN,
        true => return None,
    };
    (at >= ipv4::LEN && quote.len() >= at + 4).then_some(at)
}

/// Lowers the MSS that a SYN offers to what packets of `mtu` bytes carry, RFC 9293 section 3.7.1: who sends by
/// way of a tunnel can't know its size.
#[cold]
pub fn clamp_mss(frame: &mut Frame, flow: &Flow, mtu: u16) {
    const END: u8 = 0;
    const NOTHING: u8 = 1;
    const MSS: u8 = 2;
    if flow.protocol != protocol::TCP || flow.tcp_flags & tcp_flags::SYN == 0 {
        return;
    }
    let headers = if flow.is_v6() { ipv6::LEN } else { ipv4::LEN } + tcp::LEN;
    let most = mtu.saturating_sub(headers as u16);
    let end = usize::from(flow.ip_offset) + usize::from(flow.ip_len);
    let l4 = &mut frame.packet_mut()[usize::from(flow.l4_offset)..end];
    let Ok((header, _)) = tcp::Header::ref_from_prefix(l4) else { return };
    let len = header.header_len().min(l4.len());
    let mut at = tcp::LEN;
    while at + 1 < len {
        let (kind, size) = (l4[at], usize::from(l4[at + 1]));
        match kind {
            END => return,
            NOTHING => at += 1,
            MSS if size == 4 && at + 4 <= len => {
                let old = u16::from_be_bytes([l4[at + 2], l4[at + 3]]);
                if old > most {
                    l4[at + 2..at + 4].copy_from_slice(&most.to_be_bytes());
                    // At an odd place it lies across two words: swapped, RFC 1071 section 2 (B).
                    let swap =
                        |word: u16| if at.is_multiple_of(2) { word } else { word.swap_bytes() };
                    let change = Sum::default().add_u16(!swap(old)).add_u16(swap(most));
                    add(l4, 16, change.fold());
                }
                return;
            }
            _ if size < 2 => return,
            _ => at += size,
        }
    }
}

/// The way that a client's packet came.
pub fn way_of(packet: &[u8], ip_offset: u16, link: u8) -> Way {
    let mac = packet.get(6..).and_then(|rest| rest.first_chunk()).copied().unwrap_or_default();
    let tags = (usize::from(ip_offset) - ethernet::LEN) / ethernet::TAG_LEN;
    let tag = |number: usize| {
        let at = 12 + number * ethernet::TAG_LEN;
        let bytes = packet.get(at..).and_then(|rest| rest.first_chunk());
        bytes.filter(|_| number < tags).map_or(0, |bytes| u32::from_be_bytes(*bytes))
    };
    Way { mac: MacAddr(mac), link, tags: [tag(0), tag(1)] }
}

/// Puts an Ethernet header in front of the frame's IP packet, instead of what is there.
///
/// # Errors
/// If there is no room.
pub fn send_by(frame: &mut Frame, flow: &Flow, way: &Way, own: MacAddr) -> Result<(), DropReason> {
    let tags = way.tags.iter().take_while(|tag| **tag != 0).count();
    let len = ethernet::LEN + tags * ethernet::TAG_LEN;
    let ip_start = frame.start() + usize::from(flow.ip_offset);
    let start = ip_start.checked_sub(len).ok_or(DropReason::NoHeadroom)?;
    let (header, _) = frame.place(start, len + usize::from(flow.ip_len)).split_at_mut(len);
    header[..6].copy_from_slice(&way.mac.0);
    header[6..12].copy_from_slice(&own.0);
    for (place, tag) in header[12..].chunks_exact_mut(ethernet::TAG_LEN).zip(way.tags).take(tags) {
        place.copy_from_slice(&tag.to_be_bytes());
    }
    let ethertype = if flow.is_v6() { ethernet::IPV6 } else { ethernet::IPV4 };
    header[len - 2..].copy_from_slice(&ethertype.to_be_bytes());
    Ok(())
}

/// The same for a plain packet that goes to a station without tags: only the stations change.
#[inline(always)]
pub fn send_plain_to(headers: &mut PlainHeaders, station: MacAddr, own: MacAddr) {
    headers[..6].copy_from_slice(&station.0);
    headers[6..12].copy_from_slice(&own.0);
}

/// Whether a packet can be translated, or what an ICMP error quotes: TCP's or UDP's.
pub fn is_translatable(flow: &Flow) -> bool {
    [protocol::TCP, protocol::UDP].contains(&flow.key.protocol)
}
