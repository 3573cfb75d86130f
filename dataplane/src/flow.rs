//! What a packet means, once parsed: who speaks to whom, and what is to be done with it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::wire::{ethernet, ipv4};

/// An IPv6 address, or an IPv4 address mapped into IPv6 (`::ffff:0:0/96`): IPv6 is never a second program.
///
/// Held as the big-endian number it is written as.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Address(pub u128);

impl Address {
    const MAPPED: u128 = 0xffff_0000_0000;

    /// The mapped form of an IPv4 address in network byte order.
    #[inline]
    pub fn v4(octets: [u8; 4]) -> Self {
        Self(Self::MAPPED | u128::from(u32::from_be_bytes(octets)))
    }

    /// An IPv6 address in network byte order.
    #[inline]
    pub fn v6(octets: [u8; 16]) -> Self {
        Self(u128::from_be_bytes(octets))
    }

    /// Whether it can be one host's address: no group, broadcast, loopback or "this network". Nobody else is
    /// sent an answer, RFC 1122 section 3.2.2 and RFC 4443 section 2.4 (e).
    pub fn is_host(self) -> bool {
        match IpAddr::from(self) {
            IpAddr::V4(ip) => ip.octets()[0] != 0 && !ip.is_loopback() && ip.octets()[0] < 224,
            IpAddr::V6(ip) => !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast(),
        }
    }

    /// The IPv4 address within, if it is one.
    #[inline]
    pub fn as_v4(self) -> Option<[u8; 4]> {
        (self.0 >> 32 == Self::MAPPED >> 32).then_some((self.0 as u32).to_be_bytes())
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Self::v4(ip.octets()),
            IpAddr::V6(ip) => Self::v6(ip.octets()),
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        match address.as_v4() {
            Some(octets) => Self::V4(Ipv4Addr::from(octets)),
            None => Self::V6(Ipv6Addr::from(address.0)),
        }
    }
}

/// IANA protocol numbers that we know by name.
pub mod protocol {
    /// ICMP, RFC 792.
    pub const ICMP: u8 = 1;
    /// TCP, RFC 9293.
    pub const TCP: u8 = 6;
    /// UDP, RFC 768.
    pub const UDP: u8 = 17;
    /// ICMPv6, RFC 4443.
    pub const ICMPV6: u8 = 58;
    /// SCTP, RFC 9260.
    pub const SCTP: u8 = 132;
}

/// A connection's name, from the client's point of view.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FlowKey {
    /// The client.
    pub src: Address,
    /// The VIP.
    pub dst: Address,
    /// The client's port.
    pub src_port: u16,
    /// The VIP's port.
    pub dst_port: u16,
    /// IANA protocol number; see [`protocol`].
    pub protocol: u8,
}

/// The secret of a hash. Two processes with the same key give the same hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashKey(pub [u64; 6]);

impl HashKey {
    /// A key from text, the same everywhere: for what all nodes must agree on (Maglev).
    pub fn from_seed(seed: &str) -> Self {
        // SplitMix64 (Steele et al., OOPSLA 2014) over a running FNV-1a of the text.
        let mut state = seed.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        Self(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }))
    }

    /// A key that nobody can know: for what an attacker must not aim at (the connection table).
    pub fn random() -> Self {
        use std::hash::{BuildHasher, RandomState};
        // `RandomState` is the standard library's only source of system entropy.
        Self(std::array::from_fn(|i| RandomState::new().hash_one(i)))
    }
}

/// The 128-bit product's halves, folded: the mixing step of wyhash.
#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}

impl FlowKey {
    /// Whether its addresses are IPv6: both are, or neither.
    #[inline(always)]
    pub fn is_v6(&self) -> bool {
        self.dst.as_v4().is_none()
    }

    /// The same the other way.
    #[must_use]
    pub fn reversed(self) -> Self {
        let Self { src, dst, src_port, dst_port, protocol } = self;
        Self { src: dst, dst: src, src_port: dst_port, dst_port: src_port, protocol }
    }

    /// A keyed 64-bit hash: four folded multiplications, three of them in parallel, and one of those a
    /// constant for IPv4, whose upper halves are zero.
    ///
    /// Without the key nobody can aim at a bucket; it is no message authentication code, and whoever sees
    /// many hashes might recover the key, so hashes stay inside (the VXLAN source port shows 14 bits).
    #[inline(always)]
    pub fn hash(&self, key: &HashKey) -> u64 {
        let [k0, k1, k2, k3, k4, k5] = key.0;
        let Self { src: Address(src), dst: Address(dst), .. } = *self;
        let ports = u64::from(self.src_port) << 24
            | u64::from(self.dst_port) << 8
            | u64::from(self.protocol);
        let low = fold(src as u64 ^ k0, dst as u64 ^ k1);
        let high = fold((src >> 64) as u64 ^ k2, (dst >> 64) as u64 ^ k3);
        fold(low ^ fold(ports ^ k4, k5 | 1).rotate_left(23), high ^ k5)
    }
}

/// What kind of packet it is, as far as we treat kinds differently.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A packet of the flow itself.
    Packet,
    /// An ICMP or ICMPv6 error; the key is that of the flow it quotes.
    IcmpError,
    /// An ICMP or ICMPv6 echo request to the VIP. The key's ports are zero.
    Echo,
    /// An ARP request for `key.dst`. No IP packet: offsets mean nothing.
    Arp,
    /// An IPv6 neighbour solicitation (RFC 4861) for `key.dst`, the *target*, not the IP destination.
    NeighbourSolicitation,
}

/// TCP's flags as they stand in the header, RFC 9293 section 3.1.
pub mod tcp_flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgement field counts.
    pub const ACK: u8 = 0x10;
}

/// A parsed packet: only what is valid, and all that later stages need.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// Whose packet it is.
    pub key: FlowKey,
    /// What it is.
    pub kind: Kind,
    /// TCP's flags; 0 for anything else.
    pub tcp_flags: u8,
    /// The IPv4 TOS or IPv6 traffic class: DSCP and ECN.
    pub tos: u8,
    /// Whether routers may not fragment it: IPv4's DF bit, and always for IPv6.
    pub dont_fragment: bool,
    /// Where the IP header starts, in bytes from the packet's start: 14, or 18 or 22 behind tags.
    pub ip_offset: u16,
    /// The IP packet's length, header included, in bytes. What follows it in the frame is padding.
    pub ip_len: u16,
    /// Where the transport header starts, in bytes from the packet's start.
    pub l4_offset: u16,
    /// The transport protocol's IANA number; differs from `key.protocol` for ICMP errors.
    pub protocol: u8,
}

impl Flow {
    /// No packet at all: what a place for flows holds before the first.
    pub const NONE: Self = Self {
        key: FlowKey { src: Address(0), dst: Address(0), src_port: 0, dst_port: 0, protocol: 0 },
        kind: Kind::Packet,
        tcp_flags: 0,
        tos: 0,
        dont_fragment: false,
        ip_offset: 0,
        ip_len: 0,
        l4_offset: 0,
        protocol: 0,
    };

    /// Whether the packet itself is IPv6 (the quoted one of an ICMP error always is of the same family).
    #[inline]
    pub fn is_v6(&self) -> bool {
        self.key.is_v6()
    }

    /// Whether it is a packet in plain IPv4, without tags or options. No other's headers have these lengths.
    #[inline(always)]
    pub fn is_plain(&self) -> bool {
        const L4_OFFSET: u16 = (ethernet::LEN + ipv4::LEN) as u16;
        self.kind == Kind::Packet
            && (self.ip_offset, self.l4_offset) == (ethernet::LEN as u16, L4_OFFSET)
    }

    /// Whether a TCP connection begins here: SYN without ACK.
    #[inline]
    pub fn is_syn(&self) -> bool {
        self.tcp_flags & (tcp_flags::SYN | tcp_flags::ACK) == tcp_flags::SYN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_address_survives_the_mapping() {
        let ip: IpAddr = "203.0.113.10".parse().unwrap();
        assert_eq!(IpAddr::from(Address::from(ip)), ip);
        assert_eq!(Address::from(ip).as_v4(), Some([203, 0, 113, 10]));
        let ip: IpAddr = "2001:db8::1".parse().unwrap();
        assert_eq!(IpAddr::from(Address::from(ip)), ip);
        assert_eq!(Address::from(ip).as_v4(), None);
    }

    #[test]
    fn each_field_of_the_key_and_the_secret_change_the_hash() {
        let secret = HashKey::from_seed("a");
        let key =
            FlowKey { src: Address(1), dst: Address(2), src_port: 3, dst_port: 4, protocol: 6 };
        let hashes = [
            key.hash(&secret),
            key.hash(&HashKey::from_seed("b")),
            FlowKey { src: Address(9), ..key }.hash(&secret),
            FlowKey { dst: Address(9), ..key }.hash(&secret),
            FlowKey { src_port: 9, ..key }.hash(&secret),
            FlowKey { dst_port: 9, ..key }.hash(&secret),
            FlowKey { protocol: 9, ..key }.hash(&secret),
        ];
        let distinct: std::collections::HashSet<_> = hashes.iter().collect();
        assert_eq!(distinct.len(), hashes.len());
    }
}
