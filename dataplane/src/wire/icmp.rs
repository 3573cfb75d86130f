//! ICMP, RFC 792, and ICMPv6, RFC 4443: they share one header and differ in its numbers.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, big_endian::U16};

/// Bytes of the header, with the four whose meaning depends on the type.
pub const LEN: usize = 8;

/// Types and codes of ICMP, RFC 792.
pub mod v4 {
    /// Type: the answer to an echo request.
    pub const ECHO_REPLY: u8 = 0;
    /// Type: an error; the code says what could not be reached.
    pub const DESTINATION_UNREACHABLE: u8 = 3;
    /// Code of [`DESTINATION_UNREACHABLE`]: the packet is too big and may not be fragmented. The
    /// last two bytes of the header hold the next hop's MTU, RFC 1191 section 4.
    pub const FRAGMENTATION_NEEDED: u8 = 4;
    /// Type: a ping.
    pub const ECHO_REQUEST: u8 = 8;
    /// Type: an error; the TTL ran out.
    pub const TIME_EXCEEDED: u8 = 11;
    /// Type: an error; a field of the IP header makes no sense.
    pub const PARAMETER_PROBLEM: u8 = 12;
}

/// Types of ICMPv6, RFC 4443, and of neighbour discovery, RFC 4861. Types below 128 are errors.
pub mod v6 {
    /// An error; the code says what could not be reached.
    pub const DESTINATION_UNREACHABLE: u8 = 1;
    /// An error; the four last bytes of the header hold the next hop's MTU.
    pub const PACKET_TOO_BIG: u8 = 2;
    /// An error; the hop limit ran out.
    pub const TIME_EXCEEDED: u8 = 3;
    /// An error; a field of the headers makes no sense.
    pub const PARAMETER_PROBLEM: u8 = 4;
    /// A ping.
    pub const ECHO_REQUEST: u8 = 128;
    /// The answer to a ping.
    pub const ECHO_REPLY: u8 = 129;
    /// Who has this address? RFC 4861 section 4.3.
    pub const NEIGHBOUR_SOLICITATION: u8 = 135;
    /// I have, RFC 4861 section 4.4.
    pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
}

/// The header.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// What it is, from [`v4`] or [`v6`]. Rust's own name for types is why it isn't called `type`.
    pub kind: u8,
    /// Which variety of it.
    pub code: u8,
    /// Over this header and what follows; for ICMPv6 over the pseudo header too.
    pub checksum: U16,
    /// Identifier and sequence number, or MTU, or flags, or unused: as the type says.
    pub rest: [u8; 4],
}
const _: () = assert!(size_of::<Header>() == LEN);

#[cfg(test)]
mod tests {
    use etherparse::{
        IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type,
        icmpv4::DestUnreachableHeader,
    };

    use super::*;

    #[test]
    fn a_view_reads_what_etherparse_wrote_for_icmp() {
        let theirs =
            Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
                next_hop_mtu: 1450,
            });
        let mut theirs = Icmpv4Header::new(theirs);
        theirs.checksum = 0xbeef;
        let bytes = theirs.to_bytes();

        let header = Header::ref_from_bytes(&bytes).unwrap();
        assert_eq!(header.kind, v4::DESTINATION_UNREACHABLE);
        assert_eq!(header.code, v4::FRAGMENTATION_NEEDED);
        assert_eq!(header.checksum.get(), 0xbeef);
        assert_eq!(header.rest, [0, 0, 5, 170]);
    }

    #[test]
    fn a_view_reads_what_etherparse_wrote_for_icmpv6() {
        let echo = IcmpEchoHeader { id: 0x0102, seq: 0x0304 };
        let bytes = Icmpv6Header::new(Icmpv6Type::EchoRequest(echo)).to_bytes();
        let header = Header::ref_from_bytes(&bytes).unwrap();
        assert_eq!((header.kind, header.code, header.rest), (v6::ECHO_REQUEST, 0, [1, 2, 3, 4]));

        let bytes = Icmpv6Header::new(Icmpv6Type::PacketTooBig { mtu: 1430 }).to_bytes();
        let header = Header::ref_from_bytes(&bytes).unwrap();
        assert_eq!((header.kind, header.rest), (v6::PACKET_TOO_BIG, 1430_u32.to_be_bytes()));
    }
}
