//! VXLAN, RFC 7348 section 5.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of the header.
pub const LEN: usize = 8;
/// The UDP port that IANA assigned.
pub const PORT: u16 = 4789;
/// [`Header::flags`]: the I bit, which says that the VNI counts.
pub const VALID_VNI: u8 = 0x08;

/// The header.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// The I bit; the rest zero on transmit, ignored on receipt.
    pub flags: u8,
    /// Zero on transmit, ignored on receipt.
    pub reserved_1: [u8; 3],
    /// The network's identifier, 24 bits.
    pub vni: [u8; 3],
    /// Zero on transmit, ignored on receipt.
    pub reserved_2: u8,
}
const _: () = assert!(size_of::<Header>() == LEN);

impl Header {
    /// The header of a network. Of `vni`, 24 bits count.
    pub fn new(vni: u32) -> Self {
        let [_, vni @ ..] = vni.to_be_bytes();
        Self { flags: VALID_VNI, reserved_1: [0; 3], vni, reserved_2: 0 }
    }

    /// The network's identifier as a number.
    #[inline]
    pub fn vni(&self) -> u32 {
        let [high, middle, low] = self.vni;
        u32::from_be_bytes([0, high, middle, low])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_laid_out_as_in_the_rfc() {
        let header = Header::new(0x01_0203);
        assert_eq!(header.as_bytes(), [0x08, 0, 0, 0, 1, 2, 3, 0]);
        assert_eq!(header.vni(), 0x01_0203);
    }
}
