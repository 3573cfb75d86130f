//! The parser against the reference and etherparse, on valid packets, on damaged ones and on any bytes
//! at all.

use std::net::IpAddr;

use dataplane::{
    counters::DropReason,
    flow::{Address, Flow, Kind},
    parse,
};
use etherparse::{LaxNetSlice, LaxSlicedPacket};
use proptest::prelude::*;

use crate::{
    packets::{self, ACK, DATAGRAM, L4, Packet, any_packet, icmp_error},
    reference::parse::{self as reference, Meaning},
    rig::{CLIENT4, CLIENT6, VIP4, VIP6, ip},
};

/// What etherparse makes of a packet, in our words.
struct Theirs {
    src: IpAddr,
    dst: IpAddr,
    ip_offset: usize,
    ip_len: usize,
    l4_offset: usize,
    protocol: u8,
    tos: u8,
    dont_fragment: bool,
    fragmented: bool,
}

impl Theirs {
    /// `None` if there is no IP in it, or etherparse gives up before the transport.
    fn read(bytes: &[u8]) -> Option<Self> {
        let packet = LaxSlicedPacket::from_ethernet(bytes).ok()?;
        let offset = |slice: &[u8]| slice.as_ptr() as usize - bytes.as_ptr() as usize;
        match packet.net.as_ref()? {
            LaxNetSlice::Ipv4(ip) => {
                let header = ip.header().to_header();
                Some(Self {
                    src: header.source.into(),
                    dst: header.destination.into(),
                    ip_offset: offset(ip.header().slice()),
                    ip_len: header.total_len.into(),
                    l4_offset: offset(ip.payload().payload),
                    protocol: ip.payload().ip_number.0,
                    tos: header.dscp.value() << 2 | header.ecn.value(),
                    dont_fragment: header.dont_fragment,
                    fragmented: header.is_fragmenting_payload(),
                })
            }
            LaxNetSlice::Ipv6(ip) => {
                let header = ip.header().to_header();
                let number = ip.payload().ip_number;
                let gave_up = etherparse::Ipv6Header::is_skippable_header_extension(number);
                (!gave_up).then(|| Self {
                    src: header.source.into(),
                    dst: header.destination.into(),
                    ip_offset: offset(ip.header().slice()),
                    ip_len: 40 + usize::from(header.payload_length),
                    l4_offset: offset(ip.payload().payload),
                    protocol: number.0,
                    tos: header.traffic_class,
                    dont_fragment: true,
                    fragmented: ip.is_payload_fragmented(),
                })
            }
            LaxNetSlice::Arp(_) => None,
        }
    }
}

/// Holds our answer against the reference's, whatever the bytes, and against etherparse's where both find
/// something.
fn agrees(bytes: &[u8]) {
    let ours = parse::flow(bytes);
    assert_eq!(ours.map(Meaning::from), reference::parse(bytes));
    if let (Ok(flow), Some(theirs)) = (&ours, Theirs::read(bytes)) {
        agrees_where_we_accept(flow, &theirs, bytes);
    }
}

fn agrees_where_we_accept(flow: &Flow, theirs: &Theirs, bytes: &[u8]) {
    let fields = (flow.ip_offset, flow.ip_len, flow.l4_offset, flow.protocol, flow.tos);
    let theirs_fields = (
        theirs.ip_offset as u16,
        theirs.ip_len as u16,
        theirs.l4_offset as u16,
        theirs.protocol,
        theirs.tos,
    );
    assert_eq!(fields, theirs_fields);
    assert_eq!(flow.dont_fragment, theirs.dont_fragment);
    assert!(!theirs.fragmented, "a fragment has no ports");
    assert!(theirs.ip_offset + theirs.ip_len <= bytes.len(), "all of it is there");
    match flow.kind {
        Kind::Packet | Kind::Echo => {
            assert_eq!(flow.key.src, Address::from(theirs.src));
            assert_eq!(flow.key.dst, Address::from(theirs.dst));
        }
        // Told to the packet's sender, about a packet of its own.
        Kind::IcmpError => assert_eq!(flow.key.dst, Address::from(theirs.dst)),
        Kind::NeighbourSolicitation => assert_eq!(flow.key.src, Address::from(theirs.src)),
        Kind::Arp => panic!("{} is not ARP", theirs.dst),
    }
    assert_eq!(flow.is_v6(), theirs.dst.is_ipv6(), "the family is what the header says");
}

#[test]
fn any_bytes_are_parsed_as_by_the_reference() {
    bolero::check!().for_each(|bytes: &[u8]| {
        agrees(bytes);
        // The same as an IP packet: few inputs begin with a MAC header by chance.
        let Some((shape, ip)) = bytes.split_first() else { return };
        let tags: &[u8] =
            [&[][..], &[0x81, 0, 0, 7], &[0x88, 0xa8, 0, 1, 0x81, 0, 0, 2]][usize::from(shape % 3)];
        let ethertype: &[u8] = if shape & 4 == 0 { &[0x08, 0] } else { &[0x86, 0xdd] };
        let mut frame = [&[0; 12], tags, ethertype, ip].concat();
        agrees(&frame);
        // And with a version, a length and a protocol that let it come further.
        let at = 14 + tags.len();
        if ip.len() < 40 {
            return;
        }
        let len = ip.len() as u16;
        if shape & 4 == 0 {
            frame[at] = 0x45 | ip[0] & 3;
            frame[at + 2..at + 4].copy_from_slice(&len.to_be_bytes());
            frame[at + 6] &= 0x40;
            frame[at + 7] = 0;
            frame[at + 9] = [1, 6, 17, 132][usize::from(shape >> 6)];
        } else {
            frame[at] = 0x60 | ip[0] & 0xf;
            frame[at + 4..at + 6].copy_from_slice(&(len - 40).to_be_bytes());
            frame[at + 6] = [0, 43, 44, 51, 60, 58, 6, 17][usize::from(shape >> 5)];
            if frame[at + 6] == 58 && ip.len() >= 48 {
                frame[at + 7] |= 0xf0; // 255, as often as not
                packets::seal_icmpv6(&mut frame, at);
            }
        }
        agrees(&frame);
    });
}

/// Packets of every kind that parses, ICMP errors included.
fn any_valid() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => any_packet().prop_map(|packet| packet.bytes()),
        1 => any_packet().prop_map(|packet| {
            icmp_error(&packets::answer_to(&packet).ip_packet())
        }),
    ]
}

proptest! {
    #[test]
    fn a_valid_packet_is_read_as_it_was_built(packet in any_packet()) {
        let bytes = packet.bytes();
        agrees(&bytes);
        let flow = parse::flow(&bytes).unwrap();
        prop_assert_eq!(flow.kind, Kind::Packet);
        prop_assert_eq!(flow.key.src, Address::from(packet.src.ip()));
        prop_assert_eq!(flow.key.dst, Address::from(packet.dst.ip()));
        prop_assert_eq!(flow.key.src_port, packet.src.port());
        prop_assert_eq!(flow.key.dst_port, packet.dst.port());
        prop_assert_eq!(flow.key.protocol, flow.protocol);
        prop_assert_eq!(flow.tos, packet.tos);
        prop_assert_eq!(usize::from(flow.ip_offset), 14 + 4 * packet.vlans.len());
        prop_assert_eq!(usize::from(flow.ip_len), packet.ip_packet().len());
        if let L4::Tcp { flags } = packet.l4 {
            prop_assert_eq!(flow.tcp_flags, flags);
        }
    }

    #[test]
    fn an_icmp_error_belongs_to_the_flow_it_quotes(packet in any_packet(), quoted in 4_usize..300) {
        let answer = packets::answer_to(&packet).ip_packet();
        let flow = parse::flow(&packet.bytes()).unwrap();
        let headers = usize::from(flow.l4_offset - flow.ip_offset);
        let error = icmp_error(&answer[..answer.len().min(headers + quoted)]);
        agrees(&error);
        let about = parse::flow(&error).unwrap();
        prop_assert_eq!(about.kind, Kind::IcmpError);
        prop_assert_eq!(about.key, flow.key);
    }

    #[test]
    fn a_damaged_packet_is_read_as_etherparse_reads_it(
        bytes in any_valid(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        in_headers: bool,
    ) {
        let mut bytes = bytes;
        let reach = if in_headers { bytes.len().min(80) } else { bytes.len() };
        for (at, value) in damage {
            // Half of the damage is a flipped bit, the other half a byte of any value.
            let byte = &mut bytes[at.index(reach)];
            *byte = if value & 1 == 0 { value } else { *byte ^ 1 << (value >> 5) };
        }
        agrees(&bytes);
    }

    #[test]
    fn a_truncated_packet_never_parses(bytes in any_valid()) {
        let flow = parse::flow(&bytes).unwrap();
        for len in 0..usize::from(flow.ip_offset + flow.ip_len) {
            agrees(&bytes[..len]);
            prop_assert_eq!(parse::flow(&bytes[..len]).unwrap_err(), DropReason::Truncated);
        }
    }

    #[test]
    fn a_fragment_is_dropped_as_one_wherever_it_belongs(
        packet in any_packet(), offset in 0_u16..8192, more: bool,
    ) {
        prop_assume!(offset > 0 || more);
        let packet = Packet { fragment: Some((offset, more)), ..packet };
        prop_assert_eq!(parse::flow(&packet.bytes()).unwrap_err(), DropReason::Fragment);
    }
}

#[test]
fn an_ipv4_address_in_an_ipv6_header_is_a_bad_header() {
    // Else it would pass for an IPv4 packet to the VIP, with an IPv6 header in it.
    let mapped = |text: &str| ip(&format!("::ffff:{text}"));
    let packet = packets::v6(1, ACK);
    for (src, dst) in
        [(ip(CLIENT6), mapped(VIP4)), (mapped(CLIENT4), ip(VIP6)), (mapped(CLIENT4), mapped(VIP4))]
    {
        let mut packet = packet.clone();
        packet.src.set_ip(src);
        packet.dst.set_ip(dst);
        assert_eq!(
            parse::flow(&packet.bytes()).unwrap_err(),
            DropReason::BadIpHeader,
            "{src} {dst}"
        );
    }
}

#[test]
fn eight_extension_headers_are_walked_through_and_nine_are_not() {
    for (count, result) in [(7, Ok(6)), (8, Ok(6)), (9, Err(DropReason::BadIpHeader))] {
        let plain = packets::v6(1, ACK).bytes();
        let mut bytes = plain[..54].to_vec();
        bytes[14 + 6] = 60; // destination options, each empty
        for i in 1..=count {
            bytes.extend([if i < count { 60 } else { 6 }, 0, 1, 4, 0, 0, 0, 0]);
        }
        bytes.extend(&plain[54..]);
        let len = (bytes.len() - 54) as u16;
        bytes[18..20].copy_from_slice(&len.to_be_bytes());
        assert_eq!(parse::flow(&bytes).map(|flow| flow.protocol), result, "{count}");
    }
}

#[test]
fn a_third_tag_is_not_looked_behind() {
    let two = packets::v4(1, ACK).tagged(&[1, 2]).bytes();
    assert!(parse::flow(&two).is_ok());
    let three = [&two[..12], &[0x88, 0xa8, 0, 3], &two[12..]].concat();
    assert_eq!(parse::flow(&three).unwrap_err(), DropReason::NotIp);
}

#[test]
fn what_is_not_for_us_to_forward_has_its_own_reason() {
    let reason = |edit: fn(&mut Vec<u8>)| {
        let mut bytes = packets::v4(1, DATAGRAM).bytes();
        edit(&mut bytes);
        parse::flow(&bytes).unwrap_err()
    };
    assert_eq!(reason(|b| b[12] = 0x99), DropReason::NotIp);
    assert_eq!(reason(|b| b[14] = 0x44), DropReason::BadIpHeader); // 16 bytes of header
    assert_eq!(reason(|b| b[14] = 0x65), DropReason::BadIpHeader); // version 6 under EtherType IPv4
    assert_eq!(reason(|b| b[16..18].fill(0)), DropReason::BadIpHeader); // TSO, or nonsense
    assert_eq!(reason(|b| b[16] = 0xff), DropReason::Truncated);
    assert_eq!(reason(|b| b[23] = 47), DropReason::UnknownProtocol); // GRE
    assert_eq!(reason(|b| b[23] = 58), DropReason::UnknownProtocol); // ICMPv6 over IPv4
    assert_eq!(reason(|b| b.truncate(13)), DropReason::Truncated);
    assert_eq!(reason(Vec::clear), DropReason::Truncated);
}

#[test]
fn an_icmp_error_that_quotes_somebody_elses_packet_matches_nothing() {
    let answer = packets::answer_to(&packets::v4(1, ACK)).ip_packet();
    let mut error = icmp_error(&answer);
    error[14 + 20 + 8 + 15] ^= 1; // the quoted source is not who is told
    assert_eq!(parse::flow(&error).unwrap_err(), DropReason::IcmpUnmatched);
}
