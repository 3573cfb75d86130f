//! IPv4, RFC 791 section 3.1.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, big_endian::U16};

use super::checksum::Sum;

/// Bytes of a header without options.
pub const LEN: usize = 20;
/// [`Header::version_ihl`] of a header without options.
pub const VERSION_IHL: u8 = 0x45;

/// In [`Header::flags_fragment`]: routers may not fragment it.
pub const DONT_FRAGMENT: u16 = 0x4000;
/// In [`Header::flags_fragment`]: not the last fragment.
pub const MORE_FRAGMENTS: u16 = 0x2000;
/// In [`Header::flags_fragment`]: where the fragment belongs, in units of 8 bytes.
pub const FRAGMENT_OFFSET: u16 = 0x1fff;

/// The header, less its options.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Version (4 bits), header length in 32-bit words (4 bits).
    pub version_ihl: u8,
    /// DSCP (6 bits, RFC 2474), ECN (2 bits, RFC 3168).
    pub tos: u8,
    /// Header and payload in bytes.
    pub total_len: U16,
    /// Tells the fragments of different packets apart.
    pub id: U16,
    /// Flags (3 bits), fragment offset (13 bits).
    pub flags_fragment: U16,
    /// Hops left.
    pub ttl: u8,
    /// What follows: an IANA protocol number.
    pub protocol: u8,
    /// Over the header and its options.
    pub checksum: U16,
    /// Source address.
    pub src: [u8; 4],
    /// Destination address.
    pub dst: [u8; 4],
}
const _: () = assert!(size_of::<Header>() == LEN);

impl Header {
    /// The version: 4, if this is IPv4.
    #[inline]
    pub fn version(&self) -> u8 {
        self.version_ihl >> 4
    }

    /// Bytes of the header with its options, as it claims: 0 to 60.
    #[inline]
    pub fn header_len(&self) -> usize {
        usize::from(self.version_ihl & 0x0f) * 4
    }

    /// Whether routers may not fragment it.
    #[inline]
    pub fn dont_fragment(&self) -> bool {
        self.flags_fragment.get() & DONT_FRAGMENT != 0
    }

    /// Whether it is one fragment of several, first and last included.
    #[inline]
    pub fn is_fragment(&self) -> bool {
        self.flags_fragment.get() & (MORE_FRAGMENTS | FRAGMENT_OFFSET) != 0
    }
}

/// Writes the checksum of a header, options included, RFC 791 section 3.1.
///
/// # Panics
/// If `header` is shorter than [`LEN`].
pub fn seal(header: &mut [u8]) {
    header[10..12].fill(0);
    let checksum = Sum::default().add_bytes(header).checksum();
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use etherparse::{IpFragOffset, Ipv4Header};

    use super::*;

    #[test]
    fn a_view_reads_what_etherparse_wrote() {
        let mut theirs =
            Ipv4Header::new(100, 64, 17.into(), [192, 0, 2, 1], [198, 51, 100, 2]).unwrap();
        theirs.identification = 0x1234;
        theirs.options = [1; 4].into(); // four no-operations, RFC 791 section 3.1
        theirs.total_len += 4;
        theirs.header_checksum = theirs.calc_header_checksum();
        let bytes = theirs.to_bytes();

        let (header, options) = Header::ref_from_prefix(&bytes).unwrap();
        assert_eq!((header.version(), header.header_len(), options.len()), (4, 24, 4));
        assert_eq!((header.tos, header.total_len.get()), (0, 124));
        assert_eq!((header.id.get(), header.flags_fragment.get()), (0x1234, DONT_FRAGMENT));
        assert_eq!((header.ttl, header.protocol), (64, 17));
        assert_eq!(header.checksum.get(), theirs.header_checksum);
        assert_eq!((header.src, header.dst), ([192, 0, 2, 1], [198, 51, 100, 2]));
    }

    #[test]
    fn the_first_and_the_last_fragment_are_fragments() {
        let mut theirs = Ipv4Header::new(0, 64, 17.into(), [0; 4], [0; 4]).unwrap();
        for (more_fragments, offset, is_fragment) in
            [(false, 0, false), (true, 0, true), (true, 185, true), (false, 370, true)]
        {
            theirs.more_fragments = more_fragments;
            theirs.fragment_offset = IpFragOffset::try_new(offset).unwrap();
            let bytes = theirs.to_bytes();
            assert_eq!(Header::ref_from_bytes(&bytes).unwrap().is_fragment(), is_fragment);
        }
    }
}
