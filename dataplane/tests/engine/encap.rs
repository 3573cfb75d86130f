//! Encapsulation, undone by etherparse: the backend gets the client's packet, byte for byte. And done by
//! it, on any packet that parses.

use std::{cell::RefCell, collections::HashSet, panic::AssertUnwindSafe};

use dataplane::{
    counters::{DropReason, Event},
    encap::{self, Template, Tunnel},
    flow::{Flow, FlowKey, Kind},
    parse,
    port::Frame,
};
use etherparse::{SlicedPacket, TransportSlice};
use proptest::prelude::*;

use crate::{
    packets::{
        self, ACK, Inner, L4, Packet, any_packet, decapsulate, icmp_error, naive_sum, octets6,
        transport_checksum_is_right,
    },
    reference::{output, parse::Meaning},
    rig::{BackendSpec, Rig, SCTP, VIP4, VIP6, World, backend, hash_key, ip, vip},
    script::Script,
};

/// Any tunnel that a configuration can ask for.
fn any_tunnel() -> impl Strategy<Value = BackendSpec> {
    let vlans = prop::collection::vec(1_u16..4095, 0..3);
    (any::<bool>(), any::<bool>(), 0_u32..1 << 24, 1_u16.., vlans).prop_map(
        |(v6, udp_checksum, vni, udp_port, vlans)| {
            let spec = if v6 { backend(1).over_v6() } else { backend(1) };
            let tunnel = Tunnel { udp_checksum, vni, udp_port, vlans, ..spec.tunnel };
            BackendSpec { mtu: 9000, tunnel, ..spec }
        },
    )
}

/// Both VIPs with one backend each, alike but for the family inside.
fn world(spec: &BackendSpec) -> World {
    let other = BackendSpec { slot: 2, ..spec.clone() }.inner_v6();
    World::new()
        .web4(std::slice::from_ref(spec))
        .web6(&[other])
        .service(&[vip(VIP4, SCTP, 80)], &[BackendSpec { slot: 3, ..spec.clone() }])
        .service(&[vip(VIP6, SCTP, 80)], &[BackendSpec { slot: 4, ..spec.clone() }.inner_v6()])
}

/// A datagram that ends so many bytes before its IP packet does.
fn shorter_than_ip(packet: Packet, surplus: usize) -> (Vec<u8>, Flow) {
    let packet = Packet { l4: L4::Udp { checksum: true }, padding: surplus, ..packet };
    let mut bytes = packet.bytes();
    let flow = parse::flow(&bytes).unwrap();
    let at = usize::from(flow.ip_offset) + if flow.is_v6() { 4 } else { 2 };
    let len = u16::from_be_bytes([bytes[at], bytes[at + 1]]) + surplus as u16;
    bytes[at..at + 2].copy_from_slice(&len.to_be_bytes());
    let flow = parse::flow(&bytes).unwrap();
    (bytes, flow)
}

/// What the backend gets when this comes in.
fn through(rig: &mut Rig, spec: &BackendSpec, packet: &[u8]) -> Inner {
    decapsulate(&rig.send_for_one(packet), &spec.tunnel)
}

proptest! {
    #[test]
    fn the_backend_gets_the_ip_packet_byte_for_byte(spec in any_tunnel(), packet in any_packet()) {
        let mut rig = Rig::new(&world(&spec));
        let inner = through(&mut rig, &spec, &packet.bytes());
        prop_assert_eq!(inner.ip_packet, packet.ip_packet());
        prop_assert_eq!(inner.tos, packet.tos, "DSCP and ECN are copied");
    }

    #[test]
    fn an_icmp_error_goes_through_byte_for_byte(spec in any_tunnel(), packet in any_packet()) {
        let mut rig = Rig::new(&world(&spec));
        let error = icmp_error(&packets::answer_to(&packet).ip_packet());
        let inner = through(&mut rig, &spec, &error);
        prop_assert_eq!(inner.ip_packet, &error[14..]);
        prop_assert_eq!(rig.event(Event::IcmpErrorsForwarded), 1);
    }

    #[test]
    fn udp_that_is_shorter_than_its_ip_packet_has_a_right_outer_checksum(
        spec in any_tunnel(), packet in any_packet(), surplus in 1_usize..50,
    ) {
        // The checksum inside covers what the UDP length says (RFC 768), and no options behind it.
        let (bytes, flow) = shorter_than_ip(packet, surplus);
        let mut rig = Rig::new(&world(&spec));
        let inner = through(&mut rig, &spec, &bytes);
        prop_assert_eq!(inner.ip_packet, &bytes[flow.ip_offset.into()..]);
    }

    #[test]
    fn udp_that_is_shorter_than_its_ip_packet_never_passes_for_partial(
        spec in any_tunnel(), packet in any_packet(), surplus in 1_usize..50,
    ) {
        let (mut bytes, flow) = shorter_than_ip(packet, surplus);
        let ip = usize::from(flow.ip_offset);
        let (l4, end) = (usize::from(flow.l4_offset), ip + usize::from(flow.ip_len));
        let meaning = Meaning::from(flow);
        let like_partial = naive_sum(&output::pseudo_of(&meaning, &bytes[l4..end]));
        bytes[l4 + 6..l4 + 8].copy_from_slice(&like_partial.to_be_bytes());

        let mut world = world(&spec);
        world.links[0].partial_checksums = true;
        let mut rig = Rig::new(&world);
        let inner = through(&mut rig, &spec, &bytes);
        prop_assert_eq!(inner.ip_packet, &bytes[ip..]);
        prop_assert_eq!(rig.event(Event::ChecksumsCompleted), 0);
    }

    #[test]
    fn a_partial_checksum_is_completed(spec in any_tunnel(), packet in any_packet()) {
        let has_none = packet.l4 == L4::Sctp || packet.l4 == L4::Udp { checksum: false };
        let packet = Packet { l4: if has_none { ACK } else { packet.l4 }, ..packet };
        let mut world = world(&spec);
        world.links[0].partial_checksums = true;
        let mut rig = Rig::new(&world);
        let partial = Packet { partial: true, ..packet.clone() };
        let inner = through(&mut rig, &spec, &partial.bytes());
        prop_assert!(transport_checksum_is_right(&packet, &inner.ip_packet));
        prop_assert_eq!(inner.ip_packet, packet.ip_packet(), "and nothing else has changed");
        prop_assert_eq!(rig.event(Event::ChecksumsCompleted), 1);
    }

    #[test]
    fn a_whole_checksum_is_left_alone_where_some_are_partial(
        spec in any_tunnel(), packet in any_packet(),
    ) {
        let mut world = world(&spec);
        world.links[0].partial_checksums = true;
        let inner = through(&mut Rig::new(&world), &spec, &packet.bytes());
        prop_assert_eq!(inner.ip_packet, packet.ip_packet());
    }

    #[test]
    fn the_source_port_is_the_flows_alone(
        spec in any_tunnel(), one in any_packet(), other in any_packet(),
    ) {
        let mut rig = Rig::new(&world(&spec));
        let other = Packet { src: one.src, dst: one.dst, l4: one.l4, ..other };
        let first = through(&mut rig, &spec, &one.bytes());
        let second = through(&mut rig, &spec, &other.bytes());
        prop_assert_eq!(first.source_port, second.source_port);
    }
}

#[test]
fn any_packet_is_encapsulated_as_by_the_reference() {
    const CHUNK: usize = 4096;
    let frame = RefCell::new(Frame::new(0, vec![0; CHUNK].leak()));
    let frame = AssertUnwindSafe(frame);
    bolero::check!().for_each(move |input: &[u8]| {
        let frame = &mut *frame.borrow_mut();
        let mut script = Script(input);
        let (tunnel, hash, start) = (script.tunnel(), script.number(), script.byte().into());
        let mut packet = script.frame();
        packet.truncate(CHUNK - start);
        let Ok(flow) = parse::flow(&packet) else { return };
        if !matches!(flow.kind, Kind::Packet | Kind::IcmpError) {
            return;
        }
        frame.set(0, CHUNK);
        frame.packet_mut().fill(0xa5);
        let mut chunk = frame.packet().to_vec();
        frame.set(start, packet.len());
        frame.packet_mut().copy_from_slice(&packet);

        let meaning = Meaning::from(flow);
        let ip = &mut packet[meaning.ip.clone()];
        let completed = output::completed(&meaning, ip);
        assert_eq!(encap::complete_checksum(frame.packet_mut(), &flow), completed.is_some());
        if let Some(completed) = completed {
            ip.copy_from_slice(&completed);
        }
        let forms = output::encapsulated(&tunnel, &meaning, ip, hash);
        let header_len = forms[0].len() - ip.len();
        chunk[start..start + packet.len()].copy_from_slice(&packet);

        let result = encap::vxlan(frame, &flow, &Template::render(&tunnel).unwrap(), hash);
        let Some(at) = (start + meaning.ip.start).checked_sub(header_len) else {
            assert_eq!(result, Err(DropReason::NoHeadroom));
            return;
        };
        assert_eq!((result, frame.start(), frame.len()), (Ok(()), at, forms[0].len()));
        frame.set(0, CHUNK);
        let is_it = |form: &Vec<u8>| {
            chunk[at..at + form.len()].copy_from_slice(form);
            chunk == frame.packet() // and nothing else was written
        };
        assert!(forms.iter().any(is_it), "{:02x?}", &frame.packet()[at..]);
    });
}

#[test]
fn source_ports_of_many_flows_are_spread_over_the_whole_range() {
    let spec = backend(1);
    let mut rig = Rig::new(&World::new().web4(std::slice::from_ref(&spec)));
    let ports: HashSet<u16> = (1..4000)
        .map(|port| through(&mut rig, &spec, &packets::v4(port, ACK).bytes()).source_port)
        .collect();
    // 4,000 balls in 16,384 bins leave about 3,550 of them occupied.
    assert!((3400..3700).contains(&ports.len()), "{}", ports.len());
    let quarters: HashSet<u16> = ports.iter().map(|port| port >> 12).collect();
    assert_eq!(quarters.len(), 4);
}

#[test]
fn a_ttl_of_one_is_forwarded_as_it_is() {
    let spec = backend(1);
    let mut rig = Rig::new(&World::new().web4(std::slice::from_ref(&spec)));
    let packet = Packet { ttl: 1, ..packets::v4(1, ACK) };
    assert_eq!(through(&mut rig, &spec, &packet.bytes()).ip_packet[8], 1);
}

#[test]
fn a_frame_without_room_in_front_is_dropped() {
    // 14 bytes go, 64 come: 50 are needed in front.
    for (start, drops) in [(49, 1), (50, 0)] {
        let mut rig = Rig::new(&World::new().web4(&[backend(1)]));
        assert!(rig.deliver_at(0, start, &packets::v4(1, ACK).bytes()));
        rig.turn();
        assert_eq!(rig.drops(DropReason::NoHeadroom), drops);
        assert_eq!(rig.encapsulated(), 1 - drops);
    }
}

#[test]
fn a_udp_checksum_of_zero_is_never_sent_for_one_that_was_computed() {
    // Among enough payloads some sum up to zero, which would mean "no checksum" (RFC 768).
    let spec = backend(1);
    let mut rig = Rig::new(&World::new().web4(std::slice::from_ref(&spec)));
    let mut all_ones = 0;
    for value in 0..=u16::MAX {
        let mut packet = packets::v4(1, L4::Udp { checksum: false });
        packet.payload = value.to_be_bytes().to_vec();
        let sent = rig.send_for_one(&packet.bytes());
        let packet = SlicedPacket::from_ethernet(&sent).unwrap();
        let Some(TransportSlice::Udp(udp)) = packet.transport else { panic!("UDP outside") };
        assert_ne!(udp.checksum(), 0);
        all_ones += u32::from(udp.checksum() == 0xffff);
    }
    assert!((1..=2).contains(&all_ones), "{all_ones}");
}

#[test]
fn the_flows_key_is_what_the_parser_says() {
    // The source port shows 14 bits of the table's hash, so both ends of a test can know it.
    let spec = backend(1);
    let mut rig = Rig::new(&World::new().web4(std::slice::from_ref(&spec)));
    let bytes = packets::v4(4321, ACK).bytes();
    let key: FlowKey = parse::flow(&bytes).unwrap().key;
    let source_port = through(&mut rig, &spec, &bytes).source_port;
    assert_eq!(u64::from(source_port - 49_152), key.hash(&hash_key()) >> 50);
}

#[test]
fn a_source_routed_packet_has_a_right_outer_checksum() {
    // With segments left, the checksum inside is over the last destination, not over the present
    // one (RFC 8200 section 8.1), so it tells nothing that the headers alone would complete.
    let spec = backend(1);
    let mut rig = Rig::new(&World::new().web6(std::slice::from_ref(&spec)));
    let mut packet = packets::v6(1, ACK);
    packet.extensions.routing = true;
    packet.dst.set_ip(ip("2001:db8:113::99"));
    let mut bytes = packet.bytes();
    bytes[14 + 24..14 + 40].copy_from_slice(&octets6(VIP6));
    bytes[14 + 40 + 3] = 1; // segments left
    assert_eq!(through(&mut rig, &spec, &bytes).ip_packet, &bytes[14..]);
}
