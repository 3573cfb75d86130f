//! ARP for IPv4 over Ethernet, RFC 826.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, big_endian::U16};

use super::ethernet::MacAddr;

/// Bytes of the packet.
pub const LEN: usize = 28;

/// [`Packet::hardware_type`] of Ethernet.
pub const ETHERNET: u16 = 1;
/// [`Packet::operation`]: who has this address?
pub const REQUEST: u16 = 1;
/// [`Packet::operation`]: I have.
pub const REPLY: u16 = 2;

/// The packet, its addresses sized for Ethernet and IPv4.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Packet {
    /// 1 for Ethernet.
    pub hardware_type: U16,
    /// An EtherType: `0x0800` for IPv4.
    pub protocol_type: U16,
    /// Bytes of a hardware address: 6.
    pub hardware_len: u8,
    /// Bytes of a protocol address: 4.
    pub protocol_len: u8,
    /// Request or reply.
    pub operation: U16,
    /// Who sends this.
    pub sender_mac: MacAddr,
    /// Zero in a probe, RFC 5227 section 2.1.1.
    pub sender_ip: [u8; 4],
    /// Ignored in a request.
    pub target_mac: MacAddr,
    /// Whom the request asks for.
    pub target_ip: [u8; 4],
}
const _: () = assert!(size_of::<Packet>() == LEN);

#[cfg(test)]
mod tests {
    use etherparse::{ArpEthIpv4Packet, ArpOperation, ArpPacket};

    use super::{super::ethernet, *};

    #[test]
    fn a_view_reads_what_etherparse_wrote() {
        let theirs = ArpEthIpv4Packet {
            operation: ArpOperation::REPLY,
            sender_mac: [1; 6],
            sender_ipv4: [2; 4],
            target_mac: [3; 6],
            target_ipv4: [4; 4],
        };
        let bytes = ArpPacket::from(theirs).to_bytes();

        let packet = Packet::ref_from_bytes(&bytes).unwrap();
        assert_eq!((packet.hardware_type.get(), packet.hardware_len), (ETHERNET, 6));
        assert_eq!((packet.protocol_type.get(), packet.protocol_len), (ethernet::IPV4, 4));
        assert_eq!(packet.operation.get(), REPLY);
        assert_eq!((packet.sender_mac, packet.sender_ip), (MacAddr([1; 6]), [2; 4]));
        assert_eq!((packet.target_mac, packet.target_ip), (MacAddr([3; 6]), [4; 4]));
    }
}
