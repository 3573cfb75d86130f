//! Ethernet II and VLAN tags, IEEE 802.3 and 802.1Q.

use std::{fmt, str::FromStr};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, big_endian::U16};

/// Bytes of an untagged header.
pub const LEN: usize = 14;
/// Bytes of one VLAN tag.
pub const TAG_LEN: usize = 4;

/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd;
/// Tag protocol of a C-tag, IEEE 802.1Q.
pub const VLAN: u16 = 0x8100;
/// Tag protocol of an S-tag, IEEE 802.1ad.
pub const QINQ: u16 = 0x88a8;

/// A MAC address, printed and read as `02:42:0a:00:00:02`.
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Whether a station can have this address: neither zero nor a group address.
    pub fn is_unicast(self) -> bool {
        self.0 != [0; 6] && self.0[0] & 1 == 0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is no MAC address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a MAC address: six pairs of hex digits, as in 02:42:0a:00:00:02")]
pub struct NotAMacAddr(String);

impl FromStr for MacAddr {
    type Err = NotAMacAddr;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || NotAMacAddr(text.to_owned());
        let mut mac = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut mac {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() {
            return Err(error());
        }
        Ok(Self(mac))
    }
}

/// The untagged header.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Destination station.
    pub dst: MacAddr,
    /// Source station.
    pub src: MacAddr,
    /// What follows: an EtherType, or a tag protocol.
    pub ethertype: U16,
}
const _: () = assert!(size_of::<Header>() == LEN);

/// A VLAN tag as it follows the source address, less its own protocol field, which is the preceding
/// EtherType.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Tag {
    /// Priority (3 bits), drop eligible (1 bit), VLAN id (12 bits).
    pub control: U16,
    /// The EtherType of what follows.
    pub ethertype: U16,
}
const _: () = assert!(size_of::<Tag>() == TAG_LEN);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_address_reads_back_as_it_prints() {
        let mac: MacAddr = "02:42:0a:00:00:fe".parse().unwrap();
        assert_eq!(mac, MacAddr([2, 0x42, 10, 0, 0, 0xfe]));
        assert_eq!(mac.to_string(), "02:42:0a:00:00:fe");
    }

    #[test]
    fn text_that_is_no_mac_address_is_refused() {
        for text in
            ["", "02:42:0a:00:00", "02:42:0a:00:00:02:01", "02:42:0a:00:00:0g", "2:42:a:0:0:2"]
        {
            assert!(text.parse::<MacAddr>().is_err(), "{text}");
        }
    }
}
