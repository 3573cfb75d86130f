//! VXLAN encapsulation, RFC 7348: copy the backend's template in front of the packet, patch what varies.
//!
//! Control renders a [`Template`] once per backend: everything from the outer Ethernet header to the inner
//! one. Per packet vary the lengths, the TOS, the UDP source port and the checksums. The inner IP packet
//! is never touched, its TTL included; only the frame's old Ethernet header, its tags and its padding go.

use std::net::IpAddr;

use zerocopy::IntoBytes;

use crate::{
    counters::DropReason,
    flow::{Address, Flow, protocol},
    port::Frame,
    prefetch::prefetch,
    wire::{
        checksum::{self, Sum},
        ethernet::{self, MacAddr},
        ipv4, ipv6, udp, vxlan,
    },
};

/// The longest outer header.
const MAX_LEN: usize = IPV6_LEN + 2 * ethernet::TAG_LEN;

/// What follows the outer IP header.
const REST_LEN: usize = udp::LEN + vxlan::LEN + ethernet::LEN;

/// The length without tags, over IPv4: one cache line.
const IPV4_LEN: usize = ethernet::LEN + ipv4::LEN + REST_LEN;
/// The length without tags, over IPv6.
const IPV6_LEN: usize = ethernet::LEN + ipv6::LEN + REST_LEN;

/// The outer TTL or hop limit.
const TTL: u8 = 64;

/// Lowest of the 16,384 source ports that carry the flow's entropy, RFC 7348 section 5.
const FIRST_SOURCE_PORT: u16 = 49_152;

/// What control knows of a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// The egress interface.
    pub src_mac: MacAddr,
    /// The next hop.
    pub dst_mac: MacAddr,
    /// VLAN ids to tag outer frames with, outermost first; at most two.
    pub vlans: Vec<u16>,
    /// This node's end.
    pub src: IpAddr,
    /// The backend's node; of the same family as `src`.
    pub dst: IpAddr,
    /// The far end's UDP port.
    pub udp_port: u16,
    /// The VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// The backend's vxlan device, or the task.
    pub inner_dst_mac: MacAddr,
    /// Who the inner frame says it is from.
    pub inner_src_mac: MacAddr,
    /// Whether packets inside are IPv6.
    pub inner_v6: bool,
    /// Whether the outer UDP checksum is computed or zero.
    pub udp_checksum: bool,
}

/// A tunnel that can't be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TunnelError {
    /// One end is IPv4, the other IPv6.
    #[error("a tunnel from {src} to {dst} mixes IPv4 and IPv6")]
    MixedFamilies {
        /// This node's end.
        src: IpAddr,
        /// The backend's node.
        dst: IpAddr,
    },
    /// More tags than a frame carries.
    #[error("{0} VLAN tags, where two are the most")]
    TooManyTags(usize),
}

/// A rendered outer header with what is known in advance of its checksums.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct Template {
    len: u8,
    ip_offset: u8,
    v6: bool,
    udp_checksum: bool,
    /// Ones'-complement sum of the IPv4 header, less TOS and length.
    ip_sum: u16,
    /// Ones'-complement sum of all that is under the UDP checksum, less lengths, source port and inner IP.
    udp_sum: u16,
    bytes: [u8; MAX_LEN],
}

impl Template {
    /// Renders a tunnel.
    ///
    /// # Errors
    /// If the tunnel's ends differ in family, or it has more than two tags.
    pub fn render(tunnel: &Tunnel) -> Result<Self, TunnelError> {
        if tunnel.vlans.len() > 2 {
            return Err(TunnelError::TooManyTags(tunnel.vlans.len()));
        }
        let mut header = Vec::with_capacity(MAX_LEN);
        header.extend_from_slice(&tunnel.dst_mac.0);
        header.extend_from_slice(&tunnel.src_mac.0);
        for (i, vlan) in tunnel.vlans.iter().enumerate() {
            let outer_of_two = i + 1 < tunnel.vlans.len();
            let tpid = if outer_of_two { ethernet::QINQ } else { ethernet::VLAN };
            header.extend_from_slice(&tpid.to_be_bytes());
            header.extend_from_slice(&(vlan & 0x0fff).to_be_bytes());
        }
        let v6 = tunnel.dst.is_ipv6();
        let ethertype = if v6 { ethernet::IPV6 } else { ethernet::IPV4 };
        header.extend_from_slice(&ethertype.to_be_bytes());

        let ip_offset = header.len();
        let pseudo = match (tunnel.src, tunnel.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let (src, dst) = (src.octets(), dst.octets());
                let ip = ipv4::Header {
                    version_ihl: 0x45,
                    tos: 0,
                    total_len: 0.into(),
                    id: 0.into(), // means nothing in what may not be fragmented, RFC 6864
                    flags_fragment: ipv4::DONT_FRAGMENT.into(),
                    ttl: TTL,
                    protocol: protocol::UDP,
                    checksum: 0.into(),
                    src,
                    dst,
                };
                header.extend_from_slice(ip.as_bytes());
                checksum::pseudo_header_v4(src, dst, protocol::UDP, 0)
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let (src, dst) = (src.octets(), dst.octets());
                let ip = ipv6::Header {
                    version_class_label: (6 << 28).into(),
                    payload_len: 0.into(),
                    next_header: protocol::UDP,
                    hop_limit: TTL,
                    src,
                    dst,
                };
                header.extend_from_slice(ip.as_bytes());
                checksum::pseudo_header_v6(src, dst, protocol::UDP, 0)
            }
            (src, dst) => return Err(TunnelError::MixedFamilies { src, dst }),
        };
        let ip_sum = Sum::default().add_bytes(&header[ip_offset..]).fold();

        let udp_offset = header.len();
        let udp = udp::Header {
            src_port: 0.into(),
            dst_port: tunnel.udp_port.into(),
            len: 0.into(),
            checksum: 0.into(),
        };
        header.extend_from_slice(udp.as_bytes());
        header.extend_from_slice(vxlan::Header::new(tunnel.vni).as_bytes());
        let inner = ethernet::Header {
            dst: tunnel.inner_dst_mac,
            src: tunnel.inner_src_mac,
            ethertype: if tunnel.inner_v6 { ethernet::IPV6 } else { ethernet::IPV4 }.into(),
        };
        header.extend_from_slice(inner.as_bytes());
        let udp_sum = pseudo.add_bytes(&header[udp_offset..]).fold();

        let mut bytes = [0; MAX_LEN];
        bytes[..header.len()].copy_from_slice(&header);
        Ok(Self {
            bytes,
            len: header.len() as u8,
            ip_offset: ip_offset as u8,
            v6,
            udp_checksum: tunnel.udp_checksum,
            ip_sum,
            udp_sum,
        })
    }

    /// Where the tunnel ends.
    #[inline]
    pub fn far_end(&self) -> Address {
        const PLAIN: usize = ethernet::LEN + 16;
        if usize::from(self.len) == IPV4_LEN
            && let Some(dst) = self.bytes[PLAIN..].first_chunk()
        {
            return Address::v4(*dst);
        }
        let dst = usize::from(self.ip_offset) + if self.v6 { 24 } else { 16 };
        let dst = &self.bytes[dst..];
        match self.v6 {
            true => dst.first_chunk().copied().map(Address::v6),
            false => dst.first_chunk().copied().map(Address::v4),
        }
        .unwrap_or_default()
    }

    /// Bytes that the tunnel adds to an inner IP packet, below the egress link's own header: what its MTU
    /// must make room for.
    pub fn overhead(v6: bool) -> u16 {
        let ip = if v6 { ipv6::LEN } else { ipv4::LEN };
        (ip + REST_LEN) as u16
    }

    /// Begins to fetch its end: what lies before comes with the rest of its backend.
    #[inline]
    pub fn prefetch(&self) {
        prefetch(&self.bytes[MAX_LEN - 1]);
    }
}

/// Puts `template` in front of the frame's IP packet. `hash` is the flow's.
///
/// # Errors
/// If the frame has no room in front.
#[inline(always)]
pub fn vxlan(
    frame: &mut Frame,
    flow: &Flow,
    template: &Template,
    hash: u64,
) -> Result<(), DropReason> {
    let len = usize::from(template.len);
    let inner_len = usize::from(flow.ip_len);
    let inner_start = frame.start() + usize::from(flow.ip_offset);
    let start = inner_start.checked_sub(len).ok_or(DropReason::NoHeadroom)?;
    let packet = frame.place(start, len + inner_len);
    // Without tags, all lengths and offsets are constants, and no store needs a check.
    match len {
        IPV4_LEN => write(packet, [IPV4_LEN, ethernet::LEN], false, flow, template, hash),
        IPV6_LEN => write(packet, [IPV6_LEN, ethernet::LEN], true, flow, template, hash),
        _ => write_tagged(packet, flow, template, hash),
    }
    Ok(())
}

#[inline(never)]
fn write_tagged(packet: &mut [u8], flow: &Flow, template: &Template, hash: u64) {
    let lens = [template.len.into(), template.ip_offset.into()];
    write(packet, lens, template.v6, flow, template, hash);
}

/// Writes the outer header, of `len` bytes of which the outer IP's start at `ip_offset`.
#[inline(always)]
fn write(
    packet: &mut [u8],
    [len, ip_offset]: [usize; 2],
    v6: bool,
    flow: &Flow,
    template: &Template,
    hash: u64,
) {
    let (header, inner) = packet.split_at_mut(len);
    header.copy_from_slice(&template.bytes[..len]);
    let ip = &mut header[ip_offset..];
    let udp_len = flow.ip_len + REST_LEN as u16;
    let ip_len = if v6 { ipv6::LEN } else { ipv4::LEN };
    // DSCP as inside (RFC 2983 section 3, uniform model), ECN too (RFC 6040 section 4.1, normal mode).
    if v6 {
        // The label is the flow's entropy again, for routers that hash nothing deeper, RFC 6438. It shows
        // no more of the hash than the source port does.
        let label = ((hash >> 50) as u32).wrapping_mul(0x9e37_79b1) >> 12;
        put(ip, 0, (6 << 28 | u32::from(flow.tos) << 20 | label).to_be_bytes());
        put(ip, 4, udp_len.to_be_bytes());
    } else {
        let total_len = udp_len + ipv4::LEN as u16;
        ip[1] = flow.tos;
        put(ip, 2, total_len.to_be_bytes());
        let sum = checksum::plus(checksum::plus(template.ip_sum, flow.tos.into()), total_len);
        put(ip, 10, (!sum).to_be_bytes());
    }

    let udp = &mut ip[ip_len..];
    let source_port = FIRST_SOURCE_PORT | (hash >> 50) as u16;
    put(udp, 0, source_port.to_be_bytes());
    put(udp, 4, udp_len.to_be_bytes());
    if template.udp_checksum {
        let sum = inner_sum(inner, flow)
            .add_u16(template.udp_sum)
            .add_u16(source_port)
            .add_u16(udp_len) // once in the header
            .add_u16(udp_len) // and once in the pseudo header
            .checksum();
        let sum = if sum == 0 { 0xffff } else { sum }; // zero would mean "none", RFC 768
        put(udp, 6, sum.to_be_bytes());
    }
}

/// Overwrites N bytes at an offset.
#[inline]
fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&value);
}

/// The pseudo header of the frame's own transport. The 0xffff of a mapped IPv4 address is nothing in such a
/// sum, so there is no question of versions.
#[inline(always)]
fn pseudo_header(flow: &Flow) -> Sum {
    let halves = |address: u128| {
        let (upper, lower) = ((address >> 64) as u64, address as u64);
        (upper >> 32) + (upper & 0xffff_ffff) + (lower >> 32) + (lower & 0xffff_ffff)
    };
    let addresses = halves(flow.key.src.0) + halves(flow.key.dst.0);
    let l4_len = flow.ip_len - (flow.l4_offset - flow.ip_offset);
    Sum::default()
        .add_u32((addresses >> 32) as u32)
        .add_u32(addresses as u32)
        .add_u16(flow.protocol.into())
        .add_u16(l4_len)
}

/// The ones'-complement sum of the inner IP packet. A valid transport checksum makes the sum of all it
/// covers known (Linux calls it local checksum offload), so the payload is read only where there is none.
/// If the inner checksum is wrong, so is ours, and the receiver drops the packet one header earlier.
#[inline]
fn inner_sum(ip: &[u8], flow: &Flow) -> Sum {
    let l4 = usize::from(flow.l4_offset - flow.ip_offset);
    // Options and extension headers may change whose addresses the pseudo header has.
    let plain = l4 == if flow.is_v6() { ipv6::LEN } else { ipv4::LEN };
    let covered = match flow.protocol {
        protocol::TCP => true,
        // A UDP length short of the IP packet's leaves bytes behind that its checksum does not cover.
        protocol::UDP => {
            let l4_len = flow.ip_len - l4 as u16;
            ip[l4 + 6..l4 + 8] != [0, 0] && ip[l4 + 4..l4 + 6] == l4_len.to_be_bytes()
        }
        _ => false,
    };
    if plain && covered {
        // The addresses are in the header's sum and, negated, in the transport's, and cancel out. Slices of
        // constant length make each sum a few additions, without a call: 9 ns a packet.
        let header = match flow.is_v6() {
            true => Sum::default().add_bytes(&ip[..8]),
            false => Sum::default().add_bytes(&ip[..12]),
        };
        let l4_len = flow.ip_len - l4 as u16;
        let pseudo_rest = Sum::default().add_u16(flow.protocol.into()).add_u16(l4_len);
        return header.add_u16(!pseudo_rest.fold());
    }
    Sum::default().add_bytes(ip)
}

/// Completes the transport checksum, if its field holds just the pseudo header's sum: a sender on this
/// machine left the rest to a network card that is not there. Returns whether it was so.
///
/// One in 65,536 whole checksums looks alike; completing it gives the same value again. A datagram shorter
/// than its IP packet was never left to a card, and its own checksum covers less: it is left alone.
#[inline]
pub fn complete_checksum(packet: &mut [u8], flow: &Flow) -> bool {
    let field = match flow.protocol {
        protocol::TCP => 16,
        protocol::UDP => 6,
        _ => return false,
    };
    let pseudo = pseudo_header(flow);
    let l4 = usize::from(flow.l4_offset);
    let present = packet.get(l4 + field..).and_then(|rest| rest.first_chunk());
    if present != Some(&pseudo.fold().to_be_bytes()) {
        return false;
    }
    let end = usize::from(flow.ip_offset) + usize::from(flow.ip_len);
    complete(&mut packet[l4..end], field, pseudo, flow.protocol)
}

#[inline(never)]
fn complete(l4: &mut [u8], field: usize, pseudo: Sum, protocol: u8) -> bool {
    if protocol == protocol::UDP && l4[4..6] != (l4.len() as u16).to_be_bytes() {
        return false;
    }
    put(l4, field, [0, 0]);
    let checksum = pseudo.add_bytes(l4).checksum();
    // Only UDP's zero means "none" (RFC 768); TCP sends it as it is.
    let checksum = if checksum == 0 && protocol == protocol::UDP { 0xffff } else { checksum };
    put(l4, field, checksum.to_be_bytes());
    true
}
