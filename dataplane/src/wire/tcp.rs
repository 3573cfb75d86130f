//! TCP, RFC 9293 section 3.1. The flags' names are in [`crate::flow::tcp_flags`].

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    big_endian::{U16, U32},
};

/// Bytes of a header without options.
pub const LEN: usize = 20;

/// The header, less its options.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Source port.
    pub src_port: U16,
    /// Destination port.
    pub dst_port: U16,
    /// Number of the first byte of the payload, or of the SYN.
    pub seq: U32,
    /// Number of the next byte expected.
    pub ack: U32,
    /// Header length in 32-bit words (4 bits), reserved (4 bits), flags (8 bits).
    pub offset_flags: U16,
    /// Bytes the sender is ready to receive.
    pub window: U16,
    /// Over the pseudo header, this header with its options, and the payload.
    pub checksum: U16,
    /// Where urgent data ends.
    pub urgent: U16,
}
const _: () = assert!(size_of::<Header>() == LEN);

impl Header {
    /// Bytes of the header with its options, as it claims: 0 to 60.
    #[inline]
    pub fn header_len(&self) -> usize {
        usize::from(self.offset_flags.get() >> 12) * 4
    }

    /// The flags, from CWR down to FIN.
    #[inline]
    pub fn flags(&self) -> u8 {
        self.offset_flags.get() as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::tcp_flags;

    #[test]
    fn a_view_reads_what_etherparse_wrote() {
        let mut theirs = etherparse::TcpHeader::new(40000, 443, 0x0102_0304, 1024);
        theirs.acknowledgment_number = 0x0506_0708;
        (theirs.syn, theirs.ack) = (true, true);
        (theirs.checksum, theirs.urgent_pointer) = (0xbeef, 7);
        theirs.set_options_raw(&[1; 4]).unwrap(); // four no-operations, RFC 9293 section 3.2
        let bytes = theirs.to_bytes();

        let (header, options) = Header::ref_from_prefix(&bytes).unwrap();
        assert_eq!((header.src_port.get(), header.dst_port.get()), (40000, 443));
        assert_eq!((header.seq.get(), header.ack.get()), (0x0102_0304, 0x0506_0708));
        assert_eq!((header.header_len(), options.len()), (24, 4));
        assert_eq!(header.flags(), tcp_flags::SYN | tcp_flags::ACK);
        assert_eq!(header.window.get(), 1024);
        assert_eq!((header.checksum.get(), header.urgent.get()), (0xbeef, 7));
    }
}
