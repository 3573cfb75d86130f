//! Translation of addresses and ports, RFC 3022 and RFC 5508, by whole packets: new values are written, and then
//! each checksum is what makes the sum of *all* that it covers what it was before. That is the right checksum
//! if it was right, and as wrong as it was if not. No difference of old and new words is ever taken.

use std::net::IpAddr;

use dataplane::{
    counters::DropReason::{self, *},
    flow::{Address, FlowKey},
};

use super::parse::{Meaning, pseudo_header};
use crate::packets::naive_sum;

/// An address and a port.
pub type End = (Address, u16);

/// The IP packet with another source and destination. If there is an `mtu`, a SYN's MSS is lowered to what that
/// carries. Several forms are right if a checksum was wrong before.
pub fn translated(
    packet: &Meaning,
    ip: &[u8],
    (src, dst): (End, End),
    mtu: Option<u16>,
) -> Vec<Vec<u8>> {
    let l4 = packet.l4_offset - packet.ip.start;
    let mut new = ip.to_vec();
    if let Some(mtu) = mtu.filter(|_| packet.protocol == 6 && packet.tcp_flags & 0x02 != 0) {
        let headers = if ip[0] >> 4 == 4 { 40 } else { 60 };
        lower_mss(&mut new[l4..], mtu.saturating_sub(headers));
    }
    readdressed((ip, &new), l4, packet.protocol, (src, dst))
}

/// The bytes of `new` with other addresses and ports, and checksums as good as those of `old`.
fn readdressed(
    (old, new): (&[u8], &[u8]),
    l4: usize,
    protocol: u8,
    (src, dst): (End, End),
) -> Vec<Vec<u8>> {
    let mut new = new.to_vec();
    let v4 = new[0] >> 4 == 4;
    write_addresses(&mut new, src.0, dst.0);
    new[l4..l4 + 2].copy_from_slice(&src.1.to_be_bytes());
    new[l4 + 2..l4 + 4].copy_from_slice(&dst.1.to_be_bytes());
    let mut forms = vec![new];
    if v4 {
        forms = with_checksums(forms, |form| (&old[..l4], form[..l4].to_vec()), 10, 10, false);
    }
    let at = l4 + if protocol == 6 { 16 } else { 6 };
    let is_none = protocol == 17 && old.get(at..at + 2) == Some(&[0, 0]);
    if at + 2 > old.len() || is_none {
        return forms;
    }
    let ends = addresses(old);
    let covered =
        |(src, dst), l4: &[u8]| [pseudo_header(src, dst, protocol, l4.len()), l4.to_vec()].concat();
    let before = covered(ends, &old[l4..]);
    let pseudo_len = before.len() - (old.len() - l4);
    let after = |form: &[u8]| (&before[..], covered((src.0.into(), dst.0.into()), &form[l4..]));
    with_checksums(forms, after, pseudo_len + at - l4, at, protocol == 17)
}

/// Each packet with the checksum at `at` that keeps the sum of all that is covered, in which it is at `within`.
/// `covered` gives that, as it was and as it is now.
fn with_checksums<'a>(
    packets: Vec<Vec<u8>>,
    covered: impl Fn(&[u8]) -> (&'a [u8], Vec<u8>),
    within: usize,
    at: usize,
    zero_is_none: bool,
) -> Vec<Vec<u8>> {
    let sealed = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes[within..within + 2].fill(0);
        let sum = naive_sum(&bytes);
        (sum, if !sum == 0 && zero_is_none { 0xffff } else { !sum })
    };
    let forms = |packet: Vec<u8>| {
        let (before, after) = covered(&packet);
        let was = u16::from_be_bytes([before[within], before[within + 1]]);
        let (_, right) = sealed(before);
        let (sum, now_right) = sealed(&after);
        let values = if was == right {
            vec![now_right]
        } else {
            let total = i32::from(naive_sum(before));
            match (total - i32::from(sum)).rem_euclid(0xffff) {
                0 if zero_is_none => vec![0xffff],
                0 => vec![0, 0xffff],
                value => vec![value as u16],
            }
        };
        values.into_iter().map(move |value| {
            let mut packet = packet.clone();
            packet[at..at + 2].copy_from_slice(&value.to_be_bytes());
            packet
        })
    };
    packets.into_iter().flat_map(forms).collect()
}

fn addresses(ip: &[u8]) -> (IpAddr, IpAddr) {
    let v4 = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&ip[at..at + 4]).unwrap());
    let v6 = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&ip[at..at + 16]).unwrap());
    if ip[0] >> 4 == 4 { (v4(12), v4(16)) } else { (v6(8), v6(24)) }
}

fn write_addresses(ip: &mut [u8], src: Address, dst: Address) {
    match (IpAddr::from(src), IpAddr::from(dst)) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            ip[12..20].copy_from_slice(&[src.octets(), dst.octets()].concat());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            ip[8..40].copy_from_slice(&[src.octets(), dst.octets()].concat());
        }
        _ => panic!("one family"),
    }
}

/// RFC 9293 section 3.2: the options end where the header says, or at the first that makes no sense.
fn lower_mss(segment: &mut [u8], most: u16) {
    let end = segment.len().min(4 * usize::from(segment[12] >> 4));
    let mut at = 20;
    while at + 2 <= end {
        let len = match segment[at] {
            0 => return,
            1 => 1,
            _ => usize::from(segment[at + 1]),
        };
        if segment[at] == 2 && len == 4 && at + 4 <= end {
            let mss = u16::from_be_bytes([segment[at + 2], segment[at + 3]]).min(most);
            segment[at + 2..at + 4].copy_from_slice(&mss.to_be_bytes());
            return;
        }
        if segment[at] != 1 && len < 2 {
            return;
        }
        at += len;
    }
}

/// The IP packet of an ICMP error with another source and destination, that quotes a packet with another `quoted`
/// source and destination. `key` is of the flow that it is about.
///
/// # Errors
/// If its checksum is wrong, or what it quotes is not plain enough.
pub fn translated_error(
    packet: &Meaning,
    ip: &[u8],
    key: &FlowKey,
    (src, dst): (Address, Address),
    quoted: (End, End),
) -> Result<Vec<Vec<u8>>, DropReason> {
    let l4 = packet.l4_offset - packet.ip.start;
    let v4 = ip[0] >> 4 == 4;
    // ICMPv6 alone covers a pseudo header.
    let covered = |ends: (IpAddr, IpAddr), message: &[u8]| match v4 {
        true => message.to_vec(),
        false => [pseudo_header(ends.0, ends.1, 58, message.len()), message.to_vec()].concat(),
    };
    if naive_sum(&covered(addresses(ip), &ip[l4..])) != 0xffff {
        return Err(UnknownProtocol);
    }
    let quote = &ip[l4 + 8..];
    let ports_at = match v4 {
        true => 4 * usize::from(quote[0] & 15),
        false if [6, 17].contains(&quote[6]) => 40,
        false => return Err(Truncated),
    };
    let forms = readdressed((quote, quote), ports_at, key.protocol, quoted);
    let whole = |quote: Vec<u8>| {
        let mut new = [&ip[..l4 + 8], &quote].concat();
        write_addresses(&mut new, src, dst);
        new[l4 + 2..l4 + 4].fill(0);
        let checksum = !naive_sum(&covered((src.into(), dst.into()), &new[l4..]));
        new[l4 + 2..l4 + 4].copy_from_slice(&checksum.to_be_bytes());
        if v4 {
            new[10..12].fill(0);
            let checksum = !naive_sum(&new[..l4]);
            new[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        new
    };
    Ok(forms.into_iter().map(whole).collect())
}
