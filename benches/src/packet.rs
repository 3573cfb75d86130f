//! Packets as clients send them, of which any number of flows is made by changing the client.

use std::ops::Range;

use dataplane::wire::{
    ethernet::{self, MacAddr},
    ipv4, ipv6,
};
use etherparse::PacketBuilder;

/// Our end of the link that packets come by.
pub const GATEWAY: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
/// The VIP's port.
pub const VIP_PORT: u16 = 80;
/// The IPv4 VIP.
pub const VIP_V4: [u8; 4] = [203, 0, 113, 10];
/// The IPv6 VIP.
pub const VIP_V6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10];

const CLIENT_V4: [u8; 4] = [10, 0, 0, 0];
const CLIENT_V6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Source ports that one client address uses, as a power of two.
const PORT_BITS: u32 = 14;

/// A 64-byte frame as the engine sees it: network cards keep the four bytes of FCS to themselves.
pub const SMALL: usize = 60;
/// A frame that fills an Ethernet MTU of 1500.
pub const LARGE: usize = 1514;

/// The version of the packet's own IP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// IPv4 without options.
    V4,
    /// IPv6 without extension headers.
    V6,
}

/// What the packet carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// TCP's ACK: somewhere in a connection.
    Tcp,
    /// TCP's SYN: a connection's first.
    TcpSyn,
    /// UDP.
    Udp,
}

/// A packet from its first Ethernet byte, without FCS.
#[derive(Clone, Debug)]
pub struct Packet {
    bytes: Vec<u8>,
    /// Where the four changing bytes of the client's address are.
    address: Range<usize>,
    /// Where the client's port is.
    port: Range<usize>,
}

impl Packet {
    /// A packet that makes its frame `len` bytes long, or longer if its headers are.
    ///
    /// # Panics
    /// If it is longer than IP allows.
    pub fn new(family: Family, transport: Transport, len: usize) -> Self {
        let (builder, ip_len, ethertype) = match family {
            Family::V4 => (PacketBuilder::ipv4(CLIENT_V4, VIP_V4, 64), ipv4::LEN, ethernet::IPV4),
            Family::V6 => (PacketBuilder::ipv6(CLIENT_V6, VIP_V6, 64), ipv6::LEN, ethernet::IPV6),
        };
        let mut bytes = GATEWAY.0.to_vec();
        bytes.extend([2, 0, 0, 0, 0, 2]);
        bytes.extend(ethertype.to_be_bytes());
        let l4_len = if transport == Transport::Udp { 8 } else { 20 };
        let payload = vec![0x5a; len.saturating_sub(ethernet::LEN + ip_len + l4_len)];
        let written = match transport {
            Transport::Tcp => builder.tcp(0, VIP_PORT, 1, 1024).ack(1).write(&mut bytes, &payload),
            Transport::TcpSyn => {
                builder.tcp(0, VIP_PORT, 1, 1024).syn().write(&mut bytes, &payload)
            }
            Transport::Udp => builder.udp(0, VIP_PORT).write(&mut bytes, &payload),
        };
        written.expect("a benchmark's packet fits an IP packet");

        let l4 = ethernet::LEN + ip_len;
        let source_end = match family {
            Family::V4 => l4 - VIP_V4.len(),
            Family::V6 => l4 - VIP_V6.len(),
        };
        Self { bytes, address: source_end - 4..source_end, port: l4..l4 + 2 }
    }

    /// The same behind a VLAN tag.
    #[must_use]
    pub fn tagged(mut self) -> Self {
        let at = ethernet::LEN - 2; // the tag's protocol comes where the EtherType was
        let [high, low] = ethernet::VLAN.to_be_bytes();
        self.bytes.splice(at..at, [high, low, 0, 42]);
        let shift =
            |range: Range<usize>| range.start + ethernet::TAG_LEN..range.end + ethernet::TAG_LEN;
        Self { address: shift(self.address), port: shift(self.port), bytes: self.bytes }
    }

    /// Makes it a packet of another flow. Any two numbers below 2^38 make two flows.
    ///
    /// Checksums are left behind: nothing on the way to a backend reads what they cover.
    pub fn set_flow(&mut self, number: u64) {
        let [_, low @ ..] = ((number >> PORT_BITS) as u32).to_be_bytes();
        self.bytes[self.address.clone()][1..].copy_from_slice(&low);
        let port = 1 << PORT_BITS | number as u16 & ((1 << PORT_BITS) - 1);
        self.bytes[self.port.clone()].copy_from_slice(&port.to_be_bytes());
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}
