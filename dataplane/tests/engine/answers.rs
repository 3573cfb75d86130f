//! What the node answers itself: pings, ARP, neighbour solicitations and packets that are too big.

use std::net::{IpAddr, Ipv6Addr};

use dataplane::{
    counters::{DropReason, Event},
    flow::Address,
};
use etherparse::{
    ArpEthIpv4Packet, ArpOperation, Icmpv4Type, Icmpv6Type, NetSlice, SlicedPacket, TransportSlice,
    icmpv4::DestUnreachableHeader,
};
use proptest::prelude::*;

use crate::{
    packets::{
        self, ACK, L4, Packet, any_packet, arp_request, decapsulate, icmp_error, naive_sum,
        octets4, octets6, solicitation, tag,
    },
    rig::{
        BackendSpec, CLIENT_MAC, CLIENT4, CLIENT6, Equipment, Rig, VIP4, VIP6, World, backend,
        counts, ip, node_mac,
    },
};

/// An answer, judged by etherparse as far as all answers are alike: back the way the question came.
struct Answer<'a> {
    packet: SlicedPacket<'a>,
}

impl<'a> Answer<'a> {
    fn read(bytes: &'a [u8], vlans: &[u16]) -> Self {
        let packet = SlicedPacket::from_ethernet(bytes).unwrap();
        assert_eq!(bytes[6..12], node_mac(0), "from our interface");
        let tags: Vec<u16> = packet.vlan_ids().iter().map(|id| id.value()).collect();
        assert_eq!(tags, vlans, "with the tags of the question");
        if let Some(NetSlice::Ipv4(ip)) = &packet.net {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
        }
        match (&packet.transport, &packet.net) {
            (Some(TransportSlice::Icmpv4(icmp)), _) => {
                assert_eq!(naive_sum(icmp.slice()), 0xffff, "the ICMP checksum");
            }
            (Some(TransportSlice::Icmpv6(icmp)), Some(NetSlice::Ipv6(ip))) => {
                let (src, dst) = (ip.header().source(), ip.header().destination());
                assert!(icmp.is_checksum_valid(src, dst), "the ICMPv6 checksum");
            }
            _ => {}
        }
        Self { packet }
    }

    fn addresses(&self) -> (IpAddr, IpAddr) {
        match self.packet.net.as_ref().unwrap() {
            NetSlice::Ipv4(ip) => {
                (ip.header().source_addr().into(), ip.header().destination_addr().into())
            }
            NetSlice::Ipv6(ip) => {
                (ip.header().source_addr().into(), ip.header().destination_addr().into())
            }
            NetSlice::Arp(_) => panic!("an IP packet"),
        }
    }

    fn ttl(&self) -> u8 {
        match self.packet.net.as_ref().unwrap() {
            NetSlice::Ipv4(ip) => ip.header().ttl(),
            NetSlice::Ipv6(ip) => ip.header().hop_limit(),
            NetSlice::Arp(_) => panic!("an IP packet"),
        }
    }

    fn icmpv4(&self) -> (Icmpv4Type, &'a [u8]) {
        let Some(TransportSlice::Icmpv4(icmp)) = &self.packet.transport else { panic!("ICMP") };
        (icmp.icmp_type(), icmp.payload())
    }

    fn icmpv6(&self) -> (Icmpv6Type, &'a [u8]) {
        let Some(TransportSlice::Icmpv6(icmp)) = &self.packet.transport else { panic!("ICMPv6") };
        (icmp.icmp_type(), icmp.payload())
    }
}

fn web() -> World {
    World::new().web4(&[backend(1)]).web6(&[backend(2)])
}

fn web_that_answers_arp() -> World {
    World { answer_arp: true, ..web() }
}

fn any_vlans() -> impl Strategy<Value = Vec<u16>> {
    prop::collection::vec(1_u16..4095, 0..3)
}

proptest! {
    #[test]
    fn a_ping_to_a_vip_is_answered_with_what_it_carried(
        vlans in any_vlans(), id: u16, seq: u16, ttl: u8, padding in 0_usize..20,
        payload in prop::collection::vec(any::<u8>(), 0..600), is_v6: bool,
    ) {
        let vip = if is_v6 { VIP6 } else { VIP4 };
        let mut ping = packets::ping(vip, id, seq, ttl, &payload);
        ping.extend(vec![0; padding]);

        let mut rig = Rig::new(&web());
        let bytes = rig.send_for_one(&tag(&ping, &vlans));
        prop_assert_eq!(rig.counted(), counts([("echo_replies", 1)]));
        prop_assert_eq!(bytes.len(), ping.len() - padding + 4 * vlans.len());
        prop_assert_eq!(&bytes[..6], CLIENT_MAC);
        let answer = Answer::read(&bytes, &vlans);
        prop_assert_eq!(answer.ttl(), 64);
        if is_v6 {
            prop_assert_eq!(answer.addresses(), (ip(VIP6), ip(CLIENT6)));
            let (kind, carried) = answer.icmpv6();
            let reply = Icmpv6Type::EchoReply(etherparse::IcmpEchoHeader { id, seq });
            prop_assert_eq!((kind, carried), (reply, &payload[..]));
        } else {
            prop_assert_eq!(answer.addresses(), (ip(VIP4), ip(CLIENT4)));
            let (kind, carried) = answer.icmpv4();
            let reply = Icmpv4Type::EchoReply(etherparse::IcmpEchoHeader { id, seq });
            prop_assert_eq!((kind, carried), (reply, &payload[..]));
        }
    }
}

#[test]
fn a_ping_to_another_address_is_no_business_of_ours() {
    let ping = packets::ping("203.0.113.11", 1, 2, 9, &[]);
    let mut rig = Rig::new(&web());
    assert_eq!(rig.send(&ping), []);
    assert_eq!(rig.counted(), counts([("no_service", 1)]));
}

#[test]
fn an_arp_request_for_a_vip_is_answered_by_its_owner() {
    for (sender, vlans) in
        [(octets4(CLIENT4), vec![]), ([0; 4], vec![7]), (octets4(CLIENT4), vec![7, 8])]
    {
        let mut rig = Rig::new(&web_that_answers_arp());
        let bytes = rig.send_for_one(&tag(&arp_request(sender, VIP4), &vlans));
        assert_eq!(rig.counted(), counts([("neighbour_replies", 1)]));
        assert_eq!(bytes[..6], CLIENT_MAC);
        let answer = Answer::read(&bytes, &vlans);
        let Some(NetSlice::Arp(arp)) = answer.packet.net else { panic!("ARP") };
        let reply = arp.to_packet().try_eth_ipv4().unwrap();
        assert_eq!(
            reply,
            ArpEthIpv4Packet {
                operation: ArpOperation::REPLY,
                sender_mac: node_mac(0),
                sender_ipv4: octets4(VIP4),
                target_mac: CLIENT_MAC,
                target_ipv4: sender,
            }
        );
    }
}

#[test]
fn arp_is_answered_neither_for_others_nor_by_those_who_should_not() {
    for (world, target) in [(web_that_answers_arp(), "203.0.113.11"), (web(), VIP4)] {
        let mut rig = Rig::new(&world);
        assert_eq!(rig.send(&arp_request(octets4(CLIENT4), target)), []);
        assert_eq!(rig.counted(), counts([("not_ip", 1)]));
    }
}

#[test]
fn an_arp_reply_is_not_answered() {
    let mut reply = arp_request(octets4(CLIENT4), VIP4);
    reply[14 + 7] = 2;
    let mut rig = Rig::new(&web_that_answers_arp());
    assert_eq!(rig.send(&reply), []);
    assert_eq!(rig.counted(), counts([("not_ip", 1)]));
}

#[test]
fn a_neighbour_solicitation_for_a_vip_is_answered_by_its_owner() {
    // The second asks whether the address is free, having none of its own yet.
    for (src, with_option, to, to_mac, solicited) in [
        ("fe80::1", true, "fe80::1", CLIENT_MAC, true),
        ("::", false, "ff02::1", [0x33, 0x33, 0, 0, 0, 1], false),
    ] {
        for vlans in [vec![], vec![5], vec![5, 6]] {
            let mut rig = Rig::new(&web_that_answers_arp());
            let bytes = rig.send_for_one(&tag(&solicitation(src, VIP6, with_option, 255), &vlans));
            assert_eq!(rig.counted(), counts([("neighbour_replies", 1)]));
            assert_eq!(bytes[..6], to_mac);
            let answer = Answer::read(&bytes, &vlans);
            assert_eq!((answer.addresses(), answer.ttl()), ((ip(VIP6), ip(to)), 255));
            let Some(TransportSlice::Icmpv6(icmp)) = &answer.packet.transport else { panic!() };
            let Icmpv6Type::NeighborAdvertisement(flags) = icmp.icmp_type() else {
                panic!("{:?}", icmp.icmp_type())
            };
            assert_eq!((flags.router, flags.solicited, flags.r#override), (false, solicited, true));
            assert_eq!(icmp.payload()[..16], octets6(VIP6), "the target");
            assert_eq!(
                icmp.payload()[16..],
                [&[2, 1][..], &node_mac(0)].concat(),
                "its MAC address"
            );
        }
    }
}

#[test]
fn neighbour_solicitations_are_answered_neither_for_others_nor_by_those_who_should_not() {
    for (world, packet) in [
        (web(), solicitation("fe80::1", VIP6, true, 255)),
        (web_that_answers_arp(), solicitation("fe80::1", "2001:db8:113::11", true, 255)),
        // One that came through a router is forged, RFC 4861 section 7.1.1.
        (web_that_answers_arp(), solicitation("fe80::1", VIP6, true, 254)),
    ] {
        let mut rig = Rig::new(&world);
        assert_eq!(rig.send(&packet), []);
        assert_eq!(rig.counted(), counts([("unknown_protocol", 1)]));
    }
}

/// The web behind links of this MTU.
fn narrow(mtu: u16) -> World {
    let narrow = |slot| BackendSpec { mtu, ..backend(slot) };
    World::new().web4(&[narrow(1)]).web6(&[narrow(2)])
}

#[test]
fn a_packet_of_exactly_the_mtu_goes_through_and_one_byte_more_does_not() {
    for make in [packets::v4, packets::v6] {
        let headers = make(1, ACK).with_payload(0).ip_packet().len();
        let mut rig = Rig::new(&narrow(1400));
        rig.send(&make(1, ACK).with_payload(1400 - headers).bytes());
        assert_eq!((rig.encapsulated(), rig.event(Event::TooBigSent)), (1, 0));
        rig.send(&make(1, ACK).with_payload(1401 - headers).bytes());
        assert_eq!((rig.encapsulated(), rig.event(Event::TooBigSent)), (1, 1));
    }
}

#[test]
fn a_solicitation_that_rfc_4861_calls_invalid_is_not_answered() {
    let valid = solicitation("fe80::1", VIP6, true, 255);
    let mut wrong_checksum = valid.clone();
    wrong_checksum[56] ^= 1;
    let mut empty_option = valid.clone();
    // The option's length, and the checksum that makes up for it.
    empty_option[79] = 0;
    let checksum = u16::from_be_bytes([empty_option[56], empty_option[57]]);
    empty_option[56..58].copy_from_slice(&checksum.wrapping_add(1).to_be_bytes());
    let answered_to_nobody = solicitation("::", VIP6, true, 255);
    for invalid in [wrong_checksum, empty_option, answered_to_nobody] {
        let mut rig = Rig::new(&web_that_answers_arp());
        assert_eq!(rig.send(&invalid), []);
        assert_eq!(rig.counted().get("unknown_protocol"), Some(&1));
    }
    assert_eq!(Rig::new(&web_that_answers_arp()).send(&valid).len(), 1);
}

#[test]
fn nobody_is_answered_who_is_no_single_host() {
    let mut rig = Rig::new(&narrow(1000));
    let nobody = ["224.0.0.1", "255.255.255.255", "0.0.0.0", "127.0.0.1", VIP4];
    let nobody6 = ["ff02::1", "::", "::1", VIP6];
    for (src, packet) in nobody
        .map(|src| (src, packets::v4(1000, ACK)))
        .into_iter()
        .chain(nobody6.map(|src| (src, packets::v6(1000, ACK))))
    {
        let mut packet = Packet { dont_fragment: true, ..packet }.with_payload(1200);
        packet.src.set_ip(ip(src));
        assert_eq!(rig.send(&packet.bytes()), [], "{src}");
        assert_eq!(rig.counted().get("too_big_silent"), Some(&1), "{src}");
    }
}

proptest! {
    #[test]
    fn the_sender_of_a_packet_that_is_too_big_is_told_the_mtu(
        packet in any_packet(), mtu in 200_u16..1400, surplus in 1_usize..1000,
    ) {
        prop_assume!(Address::from(packet.src.ip()).is_host());
        let l4 = if packet.l4 == L4::Sctp { ACK } else { packet.l4 };
        let packet = Packet { dont_fragment: true, l4, ..packet }.with_payload(0);
        let headers = packet.ip_packet().len();
        let packet = packet.with_payload(usize::from(mtu) + surplus - headers);

        let mut rig = Rig::new(&narrow(mtu));
        let bytes = rig.send_for_one(&packet.bytes());
        let counted = rig.counted();
        prop_assert_eq!((counted["too_big"], counted["too_big_sent"]), (1, 1));
        prop_assert_eq!(&bytes[..6], CLIENT_MAC);
        let answer = Answer::read(&bytes, &packet.vlans);
        prop_assert_eq!(answer.addresses(), (packet.dst.ip(), packet.src.ip()), "from the VIP");
        prop_assert_eq!(answer.ttl(), 64);
        let original = packet.ip_packet();
        let ip_len = bytes.len() - 14 - 4 * packet.vlans.len();
        if packet.dst.is_ipv4() {
            let (kind, quote) = answer.icmpv4();
            prop_assert_eq!(kind, Icmpv4Type::DestinationUnreachable(
                DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: mtu }));
            prop_assert_eq!(quote, &original[..original.len().min(576 - 28)]);
            prop_assert!(ip_len <= 576, "RFC 1812 section 4.3.2.3");
        } else {
            let (kind, quote) = answer.icmpv6();
            prop_assert_eq!(kind, Icmpv6Type::PacketTooBig { mtu: mtu.into() });
            prop_assert_eq!(quote, &original[..original.len().min(1280 - 48)]);
            prop_assert!(ip_len <= 1280, "RFC 4443 section 3.2");
        }
    }

    #[test]
    fn what_may_be_cut_arrives_in_pieces_that_make_the_whole_again(
        packet in any_packet(), mtu in 576_u16..1400, surplus in 1_usize..2000,
    ) {
        let mut packet = Packet { dont_fragment: false, option_words: 0, ..packet };
        packet.src.set_ip(ip(CLIENT4));
        packet.dst.set_ip(ip(VIP4));
        packet.l4 = if packet.l4 == L4::Sctp { ACK } else { packet.l4 };
        let packet = packet.with_payload(usize::from(mtu) + surplus);

        let mut rig = Rig::new(&narrow(mtu));
        let sent = rig.send(&packet.bytes());
        let counted = rig.counted();
        prop_assert_eq!((counted["fragmented"], counted["backend 1"]), (1, sent.len() as u64));
        prop_assert!(!counted.contains_key("too_big"));
        let tunnel = backend(1).tunnel;
        let pieces: Vec<_> =
            sent.iter().map(|sent| decapsulate(&sent.bytes, &tunnel).ip_packet).collect();
        prop_assert!(pieces.iter().all(|piece| piece.len() <= usize::from(mtu)));
        prop_assert_eq!(reassemble(&pieces), packet.ip_packet());
    }
}

/// Puts fragments together, as the backend's kernel would.
fn reassemble(pieces: &[Vec<u8>]) -> Vec<u8> {
    let mut whole: Option<(Vec<u8>, usize)> = None;
    let mut parts = Vec::new();
    for piece in pieces {
        let slice = etherparse::Ipv4Slice::from_slice(piece).unwrap();
        let header = slice.header().to_header();
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        assert!(!header.dont_fragment);
        let offset = usize::from(header.fragment_offset.byte_offset());
        parts.push((offset, header.more_fragments, slice.payload().payload.to_vec()));
        if offset == 0 {
            let mut header = header;
            header.more_fragments = false;
            whole = Some((header.to_bytes().to_vec(), header.header_len()));
        }
    }
    parts.sort();
    let (mut bytes, header_len) = whole.expect("the first fragment");
    for (i, (offset, more, part)) in parts.iter().enumerate() {
        assert_eq!(*offset, bytes.len() - header_len, "no gap, no overlap");
        assert_eq!(*more, i + 1 < parts.len(), "only the last says that it is");
        bytes.extend(part);
    }
    let mut header = etherparse::Ipv4Header::from_slice(&bytes).unwrap().0;
    header.total_len = bytes.len() as u16;
    header.header_checksum = header.calc_header_checksum();
    bytes[..header_len].copy_from_slice(&header.to_bytes());
    bytes
}

#[test]
fn the_first_piece_of_a_cut_packet_leaves_first() {
    // Filters on the way know a datagram by its first fragment, and drop others that come before.
    let mut rig = Rig::new(&narrow(600));
    let packet = packets::v4(1, ACK).fragmentable().with_payload(1800);
    let offsets: Vec<u16> = rig
        .send(&packet.bytes())
        .iter()
        .map(|sent| decapsulate(&sent.bytes, &backend(1).tunnel).ip_packet)
        .map(|ip| u16::from_be_bytes([ip[6], ip[7]]) & 0x1fff)
        .collect();
    assert!(offsets.is_sorted() && offsets.len() > 2, "{offsets:?}");
}

#[test]
fn what_would_fall_into_too_many_pieces_is_not_cut() {
    let mut rig = Rig::new(&narrow(100));
    let answer = rig.send_for_one(&packets::v4(1, ACK).fragmentable().with_payload(1400).bytes());
    assert!(matches!(Answer::read(&answer, &[]).icmpv4().0, Icmpv4Type::DestinationUnreachable(_)));
    assert_eq!(rig.event(Event::Fragmented), 0);
}

#[test]
fn without_frames_for_the_pieces_the_packet_is_dropped() {
    let equipment = Equipment { frames: 8, ring_size: 8, ..Default::default() };
    let mut rig = Rig::equipped(&narrow(576), equipment);
    // All frames but the one that comes in are in the fill ring.
    assert_eq!(rig.send(&packets::v4(1, ACK).fragmentable().with_payload(1500).bytes()), []);
    let counted = rig.counted();
    assert_eq!(counted.get("no_frame"), Some(&1), "{counted:?}");
}

#[test]
fn no_icmp_error_is_sent_about_an_icmp_error() {
    let mut rig = Rig::new(&narrow(100));
    for make in [packets::v4, packets::v6] {
        let answer = packets::answer_to(&make(1, ACK).with_payload(200)).ip_packet();
        let mut error = icmp_error(&answer);
        error[20] = 0x40; // of an IPv4 packet: may not be cut
        if make(1, ACK).dst.is_ipv6() {
            error = icmp_error(&answer);
        }
        assert_eq!(rig.send(&error), []);
        assert_eq!(rig.counted(), counts([("icmp_errors_forwarded", 1), ("too_big_silent", 1)]));
    }
}

#[test]
fn icmp_errors_are_sent_only_so_often() {
    let equipment = Equipment { icmp_errors_per_s: 100, ..Default::default() };
    let mut rig = Rig::equipped(&narrow(600), equipment);
    let too_big = packets::v4(1, ACK).with_payload(1400).bytes();
    for _ in 0..50 {
        rig.send(&too_big);
    }
    assert_eq!(rig.event(Event::TooBigSent), 10, "a tenth of a second's worth");
    rig.wait(50);
    for _ in 0..50 {
        rig.send(&too_big);
    }
    assert_eq!(rig.event(Event::TooBigSent), 15);
    let counted = rig.counted();
    assert_eq!((counted["too_big"], counted["too_big_silent"]), (15, 85));
}

#[test]
fn an_answer_about_an_ipv6_target_names_the_address_asked_for() {
    let target: Ipv6Addr = VIP6.parse().unwrap();
    let bytes =
        Rig::new(&web_that_answers_arp()).send_for_one(&solicitation("fe80::1", VIP6, true, 255));
    assert_eq!(bytes[14 + 8..14 + 24], target.octets(), "it comes from the address");
}

#[test]
fn a_solicitation_too_close_to_the_end_of_its_frame_for_the_answer_is_dropped() {
    // Without an option it is 8 bytes shorter than the advertisement.
    let packet = solicitation("::", VIP6, false, 255);
    for (room, replies) in [(8, 1), (7, 0)] {
        let mut rig = Rig::new(&web_that_answers_arp());
        assert!(rig.deliver_at(0, 4096 - packet.len() - room, &packet));
        rig.turn();
        assert_eq!(rig.event(Event::NeighbourReplies), replies);
        assert_eq!(rig.drops(DropReason::NoHeadroom), 1 - replies);
    }
}
