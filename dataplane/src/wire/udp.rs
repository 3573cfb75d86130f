//! UDP, RFC 768.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, big_endian::U16};

/// Bytes of the header.
pub const LEN: usize = 8;

/// The header.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Source port.
    pub src_port: U16,
    /// Destination port.
    pub dst_port: U16,
    /// Header and payload in bytes.
    pub len: U16,
    /// Over the pseudo header, this header and the payload; 0 means none, a computed 0 is `0xffff`.
    pub checksum: U16,
}
const _: () = assert!(size_of::<Header>() == LEN);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_reads_what_etherparse_wrote() {
        let theirs = etherparse::UdpHeader {
            source_port: 40000,
            destination_port: 4789,
            length: 58,
            checksum: 0xbeef,
        };
        let bytes = theirs.to_bytes();

        let header = Header::ref_from_bytes(&bytes).unwrap();
        assert_eq!((header.src_port.get(), header.dst_port.get()), (40000, 4789));
        assert_eq!((header.len.get(), header.checksum.get()), (58, 0xbeef));
    }
}
