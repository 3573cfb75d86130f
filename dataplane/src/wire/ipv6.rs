//! IPv6, RFC 8200 section 3.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    big_endian::{U16, U32},
};

/// Bytes of the fixed header.
pub const LEN: usize = 40;

/// Next header: hop-by-hop options, RFC 8200 section 4.3.
pub const HOP_BY_HOP: u8 = 0;
/// Next header: routing, RFC 8200 section 4.4.
pub const ROUTING: u8 = 43;
/// Next header: fragment, RFC 8200 section 4.5.
pub const FRAGMENT: u8 = 44;
/// Next header: authentication, RFC 4302 section 2. Its length counts other units than the others'.
pub const AUTHENTICATION: u8 = 51;
/// Next header: destination options, RFC 8200 section 4.6.
pub const DESTINATION_OPTIONS: u8 = 60;

/// Bytes of the fragment extension header.
pub const FRAGMENT_LEN: usize = 8;

/// The fixed header.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Version (4 bits), traffic class (8 bits), flow label (20 bits).
    pub version_class_label: U32,
    /// What follows the fixed header, in bytes.
    pub payload_len: U16,
    /// What follows: an IANA protocol number, or an extension header.
    pub next_header: u8,
    /// Hops left.
    pub hop_limit: u8,
    /// Source address.
    pub src: [u8; 16],
    /// Destination address.
    pub dst: [u8; 16],
}
const _: () = assert!(size_of::<Header>() == LEN);

impl Header {
    /// The version: 6, if this is IPv6.
    #[inline]
    pub fn version(&self) -> u8 {
        (self.version_class_label.get() >> 28) as u8
    }

    /// The traffic class: DSCP (6 bits, RFC 2474), ECN (2 bits, RFC 3168), as IPv4's TOS.
    #[inline]
    pub fn traffic_class(&self) -> u8 {
        (self.version_class_label.get() >> 20) as u8
    }
}

#[cfg(test)]
mod tests {
    use etherparse::Ipv6Header;

    use super::*;

    #[test]
    fn a_view_reads_what_etherparse_wrote() {
        let theirs = Ipv6Header {
            traffic_class: 0xb9,
            flow_label: 0xf_1234_u32.try_into().unwrap(),
            payload_length: 1000,
            next_header: 17.into(),
            hop_limit: 64,
            source: [1; 16],
            destination: [2; 16],
        };
        let bytes = theirs.to_bytes();

        let header = Header::ref_from_bytes(&bytes).unwrap();
        assert_eq!((header.version(), header.traffic_class()), (6, 0xb9));
        assert_eq!(header.version_class_label.get() & 0xf_ffff, 0xf_1234);
        assert_eq!(
            (header.payload_len.get(), header.next_header, header.hop_limit),
            (1000, 17, 64)
        );
        assert_eq!((header.src, header.dst), ([1; 16], [2; 16]));
    }
}
