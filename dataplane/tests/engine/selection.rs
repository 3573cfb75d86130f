//! Which backend a packet goes to, through the whole turn: drains, removals, SYNs and ICMP errors.

use dataplane::{
    connections::{Remembered, Traffic},
    counters::{DropReason, Event},
    flow::protocol,
    parse,
};

use crate::{
    packets::{self, ACK, DATAGRAM, FIN, L4, Packet, SYN, icmp_error},
    rig::{
        BackendSpec, Equipment, Rig, SCTP, TCP, VIP4, World, backend, counts, hash_key, link,
        node_mac, table, vip,
    },
};

/// Enough client ports that both of two backends get some.
const CLIENTS: std::ops::Range<u16> = 1000..1064;

fn two() -> World {
    World::new().web4(&[backend(1), backend(2)])
}

/// Backend 1 takes no new connections.
fn drained() -> World {
    World::new().web4(&[BackendSpec { weight: 0, ..backend(1) }, backend(2)])
}

fn ack(port: u16) -> Vec<u8> {
    packets::v4(port, ACK).bytes()
}

/// A client's port whose connection Maglev gives to this backend.
fn client_of(world: &World, slot: u32) -> u16 {
    let [port] = clients_of(world, slot);
    port
}

/// So many of them.
fn clients_of<const N: usize>(world: &World, slot: u32) -> [u16; N] {
    let mut rig = Rig::new(world);
    let mut ports = CLIENTS.filter(|&port| rig.backend_of(&ack(port)) == Some(slot));
    std::array::from_fn(|_| ports.next().expect("half of them"))
}

/// Opens a connection and keeps it open long enough to be confirmed.
fn connect(rig: &mut Rig, port: u16) -> u32 {
    let slot = rig.backend_of(&packets::v4(port, SYN).bytes()).unwrap();
    rig.wait(300);
    assert_eq!(rig.backend_of(&ack(port)), Some(slot));
    slot
}

#[test]
fn a_drain_breaks_no_idle_connection_that_opened_within_a_moment() {
    let mut rig = Rig::new(&two());
    let before: Vec<_> = CLIENTS
        .map(|port| {
            let slot = rig.backend_of(&packets::v4(port, SYN).bytes());
            assert_eq!(rig.backend_of(&ack(port)), slot);
            slot
        })
        .collect();
    for _ in 0..600 {
        rig.wait(100);
    }
    rig.publish(&drained());
    let after: Vec<_> = CLIENTS.map(|port| rig.backend_of(&ack(port))).collect();
    assert_eq!(after, before);
}

#[test]
fn both_backends_get_connections_and_every_node_chooses_alike() {
    let (mut one, mut other) = (Rig::new(&two()), Rig::new(&two()));
    let mut shares = [0, 0];
    for port in CLIENTS {
        let slot = one.backend_of(&ack(port)).unwrap();
        assert_eq!(other.backend_of(&packets::v4(port, SYN).bytes()), Some(slot));
        shares[slot as usize - 1] += 1;
    }
    assert!(shares.iter().all(|&share| share > 16), "{shares:?}");
}

#[test]
fn a_drain_moves_no_connection_and_a_new_one_goes_elsewhere() {
    let mut rig = Rig::new(&two());
    let slots: Vec<u32> = CLIENTS.map(|port| connect(&mut rig, port)).collect();
    assert!(slots.contains(&1));
    rig.publish(&drained());
    rig.counted();
    for (port, slot) in CLIENTS.zip(slots) {
        assert_eq!(rig.backend_of(&ack(port)), Some(slot), "the connection stays");
    }
    assert_eq!(rig.event(Event::ConnectionReselects), 0);
    for port in 2000..2064 {
        assert_eq!(rig.backend_of(&packets::v4(port, SYN).bytes()), Some(2));
    }
}

#[test]
fn the_last_backend_drained_keeps_its_connections_and_no_new_one_is_served() {
    let mut rig = Rig::new(&World::new().web4(&[backend(1)]));
    connect(&mut rig, 1000);
    rig.publish(&World::new().web4(&[BackendSpec { weight: 0, ..backend(1) }]));
    rig.counted();
    assert_eq!(rig.backend_of(&ack(1000)), Some(1));
    assert_eq!(rig.counted(), counts([("connection_hits", 1), ("backend 1", 1)]));
    assert_eq!(rig.send(&packets::v4(1001, SYN).bytes()), []);
    assert_eq!(rig.counted(), counts([("no_backend", 1)]));
}

#[test]
fn a_removed_backends_connection_is_given_another_at_once_and_keeps_it() {
    let port = client_of(&two(), 1);
    let mut rig = Rig::new(&two());
    connect(&mut rig, port);
    rig.counted();
    rig.publish(&World::new().web4(&[backend(2)]));
    assert_eq!(rig.backend_of(&ack(port)), Some(2));
    assert_eq!(
        rig.counted(),
        counts([("connection_misses", 1), ("connection_reselects", 1), ("backend 2", 1)])
    );
    rig.publish(&two());
    assert_eq!(rig.backend_of(&ack(port)), Some(2), "what was given last is remembered");
    assert_eq!(rig.counted(), counts([("connection_hits", 1), ("backend 2", 1)]));
}

#[test]
fn a_service_may_have_connections_reset_whose_backend_is_gone() {
    let resetting = |world: World| World { resets: true, ..world };
    let one = || resetting(World::new().web4(&[backend(2)]));
    let mut rig = Rig::new(&resetting(two()));
    let streams = CLIENTS.filter(|port| connect(&mut rig, *port) == 1).collect::<Vec<_>>();
    let udp = |port| packets::v4(port, DATAGRAM).bytes();
    let datagrams = CLIENTS.filter(|port| rig.backend_of(&udp(*port)) == Some(1));
    let datagrams = datagrams.collect::<Vec<_>>();
    rig.publish(&one());
    rig.counted();
    let told = [("backend_gone", 1), ("resets_sent", 1)];
    for port in &streams {
        // What it says, the reference has judged.
        assert_eq!(rig.send(&ack(*port)).len(), 1);
        assert_eq!(rig.counted(), counts(told), "as often as the client speaks");
    }
    rig.send(&packets::v4(streams[0], L4::Tcp { flags: 0x04 }).bytes());
    assert_eq!(rig.counted(), counts([("backend_gone", 1)]), "a reset is not answered");
    assert_eq!(
        rig.backend_of(&packets::v4(streams[0], SYN).bytes()),
        Some(2),
        "a new one is served"
    );
    assert!(datagrams.iter().all(|port| rig.backend_of(&udp(*port)) == Some(2)));
    // Of what nobody remembers nothing is known.
    assert_eq!(rig.backend_of(&ack(999)), Some(2));
    rig.publish(&resetting(two()));
    assert_eq!(rig.backend_of(&ack(streams[1])), Some(1), "its backend is back");
}

#[test]
fn a_flows_packets_are_taken_in_order_also_within_a_burst() {
    // Confirmed and in its present unit of time: the ACKs would go a shorter way than the SYN.
    let port = client_of(&two(), 1);
    let mut rig = Rig::new(&two());
    connect(&mut rig, port);
    rig.publish(&drained());
    let burst = [ack(port), packets::v4(port, SYN).bytes(), ack(port)];
    for packet in &burst {
        assert!(rig.deliver(0, packet));
    }
    rig.counted();
    assert_eq!(rig.turn(), burst.len());
    let counted = rig.counted();
    let by = |slot| counted.get(&format!("backend {slot}")).copied();
    assert_eq!([by(1), by(2)], [Some(1), Some(2)], "all that follows the SYN goes its way");
}

#[test]
fn a_slot_that_now_serves_another_service_is_no_backend_of_this_one() {
    let port = client_of(&two(), 1);
    let mut rig = Rig::new(&two());
    connect(&mut rig, port);
    let other = [vip("203.0.113.99", TCP, 80)];
    rig.publish(&World::new().web4(&[backend(2)]).service(&other, &[backend(1)]));
    assert_eq!(rig.backend_of(&ack(port)), Some(2));
}

#[test]
fn a_syn_ignores_the_remembered_backend() {
    let port = client_of(&two(), 1);
    let mut rig = Rig::new(&two());
    connect(&mut rig, port);
    rig.publish(&drained());
    assert_eq!(rig.backend_of(&ack(port)), Some(1));
    rig.counted();
    assert_eq!(rig.backend_of(&packets::v4(port, SYN).bytes()), Some(2), "ports are used again");
    assert_eq!(rig.counted(), counts([("connection_misses", 1), ("backend 2", 1)]));
    assert_eq!(rig.backend_of(&ack(port)), Some(2), "and the new choice is remembered");
}

/// A node with a connection to backend 1, and as many SYNs after it as may be remembered.
fn flooded(port: u16) -> Rig {
    let equipment = Equipment { admissions_per_s: 1000, ..Default::default() };
    let mut rig = Rig::equipped(&two(), equipment);
    assert_eq!(connect(&mut rig, port), 1);
    rig.counted();
    for port in 2000..2150 {
        assert_eq!(rig.send(&packets::v4(port, SYN).bytes()).len(), 1, "all are forwarded");
    }
    // A burst is a tenth of a second's.
    let counted = rig.counted();
    assert_eq!(counted["connection_inserts"], 100);
    assert_eq!(counted["connection_not_admitted"], 50);
    rig
}

#[test]
fn a_flood_beyond_the_admissions_goes_where_maglev_says_and_a_connection_stays() {
    let port = client_of(&two(), 1);
    let mut rig = flooded(port);
    for syn in 2150..2200 {
        let slot = rig.backend_of(&packets::v4(syn, SYN).bytes());
        assert_eq!(slot, Rig::new(&two()).backend_of(&ack(syn)));
    }
    rig.publish(&drained());
    assert_eq!(rig.backend_of(&ack(port)), Some(1));
    rig.wait(1000);
    rig.counted();
    rig.send(&packets::v4(3000, SYN).bytes());
    assert_eq!(rig.counted()["connection_inserts"], 1, "once it is over, all are remembered");
}

#[test]
fn a_flood_of_syns_keeps_no_remembered_backend_in_force_for_a_reused_port() {
    let port = client_of(&two(), 1);
    let mut rig = flooded(port);
    rig.publish(&drained());
    assert_eq!(rig.backend_of(&packets::v4(port, SYN).bytes()), Some(2));
    assert_eq!(rig.backend_of(&ack(port)), Some(2));
    rig.publish(&two());
    assert_eq!(rig.backend_of(&ack(port)), Some(2), "the new choice is remembered");
}

#[test]
fn a_flood_of_any_packets_does_not_hinder_a_reselection() {
    let port = client_of(&two(), 1);
    let mut rig = flooded(port);
    for port in 3000..3150 {
        rig.send(&ack(port));
    }
    assert_eq!(rig.counted()["connection_not_admitted"], 50);
    rig.publish(&World::new().web4(&[backend(2)]));
    assert_eq!(rig.backend_of(&ack(port)), Some(2));
    assert_eq!(rig.counted()["connection_reselects"], 1);
    rig.publish(&two());
    assert_eq!(rig.backend_of(&ack(port)), Some(2), "the new choice is remembered");
}

#[test]
fn a_connection_opened_in_a_flood_of_syns_is_remembered_by_its_second_packet() {
    let [port, opened] = clients_of(&two(), 1);
    let mut rig = flooded(port);
    assert_eq!(rig.backend_of(&packets::v4(opened, SYN).bytes()), Some(1));
    assert_eq!(rig.counted()["connection_not_admitted"], 1);
    assert_eq!(rig.backend_of(&ack(opened)), Some(1));
    assert_eq!(rig.counted()["connection_inserts"], 1);
    rig.publish(&drained());
    assert_eq!(rig.backend_of(&ack(opened)), Some(1));
}

#[test]
fn a_syn_with_ack_is_no_new_connection() {
    let port = client_of(&two(), 1);
    let mut rig = Rig::new(&two());
    connect(&mut rig, port);
    rig.publish(&drained());
    let odd = packets::v4(port, L4::Tcp { flags: 0x12 }).bytes();
    assert_eq!(rig.backend_of(&odd), Some(1));
}

#[test]
fn a_closed_connection_is_forgotten_after_a_minute_and_an_open_one_is_not() {
    let port = client_of(&two(), 1);
    for (last, slot) in [(FIN, 2), (ACK, 1)] {
        let mut rig = Rig::new(&two());
        connect(&mut rig, port);
        rig.send(&packets::v4(port, last).bytes());
        rig.publish(&drained());
        rig.wait(65_000);
        assert_eq!(rig.backend_of(&ack(port)), Some(slot));
    }
}

#[test]
fn udp_keeps_its_backend_through_a_drain_until_it_is_silent_for_long() {
    let datagram = |port| packets::v4(port, DATAGRAM).bytes();
    let mut rig = Rig::new(&two());
    let port = CLIENTS.into_iter().find(|&p| rig.backend_of(&datagram(p)) == Some(1)).unwrap();
    rig.wait(300);
    rig.send(&datagram(port));
    rig.publish(&drained());
    rig.wait(290_000);
    assert_eq!(rig.backend_of(&datagram(port)), Some(1));
    rig.wait(330_000);
    assert_eq!(rig.backend_of(&datagram(port)), Some(2));
}

#[test]
fn an_icmp_error_goes_to_the_backend_that_owns_the_connection() {
    for v6 in [false, true] {
        let web = |backends: &[BackendSpec]| {
            if v6 { World::new().web6(backends) } else { World::new().web4(backends) }
        };
        let packet = |port| if v6 { packets::v6(port, ACK) } else { packets::v4(port, ACK) };
        let mut rig = Rig::new(&web(&[backend(1), backend(2)]));
        let port =
            CLIENTS.into_iter().find(|&port| rig.backend_of(&packet(port).bytes()) == Some(1));
        rig.publish(&web(&[BackendSpec { weight: 0, ..backend(1) }, backend(2)]));
        let answer = packets::answer_to(&packet(port.unwrap())).ip_packet();
        // Eight bytes of the quoted transport header are all that RFC 792 promises.
        let error = icmp_error(&answer[..if v6 { 48 } else { 28 }]);
        rig.counted();
        assert_eq!(rig.backend_of(&error), Some(1));
        assert_eq!(rig.counted(), counts([("icmp_errors_forwarded", 1), ("backend 1", 1)]));
    }
}

#[test]
fn an_icmp_error_about_a_connection_of_another_worker_goes_to_its_backend() {
    let port = client_of(&drained(), 2);
    // The other worker remembers backend 1, which Maglev no longer gives to anybody.
    let mut peer = table(1024);
    let key = parse::flow(&ack(port)).unwrap().key;
    let mut rig =
        Rig::equipped(&drained(), Equipment { peers: vec![peer.reader()], ..Default::default() });
    let hash = key.hash(&hash_key());
    assert_eq!(peer.remember(hash, 1, Traffic::Syn, rig.now), Remembered::Inserted);

    let error = icmp_error(&packets::answer_to(&packets::v4(port, ACK)).ip_packet());
    assert_eq!(rig.backend_of(&error), Some(1));
    // Packets of the flow itself are this worker's own business: RSS has moved it.
    assert_eq!(rig.backend_of(&ack(port)), Some(2));
    assert_eq!(rig.backend_of(&error), Some(2), "the own table goes first");
}

#[test]
fn an_icmp_error_about_an_unknown_connection_goes_where_maglev_says_and_is_not_remembered() {
    let mut rig = Rig::new(&two());
    for port in CLIENTS {
        let error = icmp_error(&packets::answer_to(&packets::v4(port, ACK)).ip_packet());
        let slot = rig.backend_of(&error);
        let (hits, misses) = (Event::ConnectionHits, Event::ConnectionMisses);
        assert_eq!((rig.event(hits), rig.event(misses)), (0, 0));
        assert_eq!(Rig::new(&two()).backend_of(&ack(port)), slot);
    }
    let mut live = 0;
    rig.connections.for_each(rig.now, |_| live += 1);
    assert_eq!(live, 0);
}

#[test]
fn an_icmp_error_about_nobodys_flow_is_dropped_as_unmatched() {
    let mut rig = Rig::new(&two());
    let mut elsewhere = packets::v4(1000, ACK);
    elsewhere.dst.set_port(81);
    let error = icmp_error(&packets::answer_to(&elsewhere).ip_packet());
    assert_eq!(rig.send(&error), []);
    assert_eq!(rig.counted(), counts([("icmp_unmatched", 1)]));
}

#[test]
fn a_vip_on_port_zero_serves_the_ports_that_no_other_names() {
    let world = World::new()
        .service(&[vip(VIP4, TCP, 0)], &[backend(1)])
        .service(&[vip(VIP4, TCP, 443)], &[backend(2)]);
    let mut rig = Rig::new(&world);
    for (port, slot) in [(80, 1), (443, 2), (65_535, 1)] {
        let mut packet = packets::v4(1000, ACK);
        packet.dst.set_port(port);
        assert_eq!(rig.backend_of(&packet.bytes()), Some(slot), "{port}");
    }
    assert_eq!(rig.backend_of(&packets::v4(1000, DATAGRAM).bytes()), None, "other protocols not");
    assert_eq!(rig.drops(DropReason::NoService), 1);
}

#[test]
fn sctp_is_forwarded_by_its_ports() {
    let mut rig = Rig::new(&World::new().service(&[vip(VIP4, SCTP, 80)], &[backend(1)]));
    assert_eq!(rig.backend_of(&packets::v4(1000, L4::Sctp).bytes()), Some(1));
}

#[test]
fn what_cannot_be_forwarded_is_counted_by_its_reason() {
    let unreachable = BackendSpec { reachable: false, ..backend(1) };
    let port = |port| {
        let mut packet = packets::v4(1000, ACK);
        packet.dst.set_port(port);
        packet
    };
    let mut gre = port(80).bytes();
    gre[14 + 9] = 47;
    let fragment = |offset, more| Packet { fragment: Some((offset, more)), ..port(80) }.bytes();
    let world = World::new()
        .web4(&[unreachable])
        .service(&[vip(VIP4, protocol::TCP, 82)], &[])
        .service(&[vip(VIP4, protocol::TCP, 83)], &[BackendSpec { link: 7, ..backend(3) }]);
    let mut rig = Rig::new(&world);
    for (packet, reason) in [
        (port(80).bytes(), "next_hop_unresolved"),
        (port(81).bytes(), "no_service"),
        (port(82).bytes(), "no_backend"),
        (fragment(0, true), "fragment"),
        (fragment(100, false), "fragment"),
        (gre, "unknown_protocol"),
        (port(80).bytes()[..50].to_vec(), "truncated"),
    ] {
        assert_eq!(rig.send(&packet), [], "{reason}");
        let counted = rig.counted();
        assert_eq!(counted.get(reason), Some(&1), "{counted:?}");
    }
    assert_eq!(rig.send(&port(83).bytes()), [], "there is no such link");
    assert_eq!(rig.counted().get("next_hop_unresolved"), Some(&1));
}

#[test]
fn a_packet_leaves_by_the_link_of_its_backend() {
    let mut world = World::new().web4(&[BackendSpec { link: 1, ..backend(1) }]);
    world.links.push(link(1));
    let links = vec![0, 1];
    let mut rig = Rig::equipped(&world, Equipment { links, frames: 256, ..Default::default() });
    for ingress in [0, 1] {
        let mut packet = ack(1000);
        packet[..6].copy_from_slice(&node_mac(ingress));
        let sent = rig.send_by(ingress, &packet);
        assert_eq!(sent.iter().map(|sent| sent.port).collect::<Vec<_>>(), [1]);
    }
}

#[test]
fn datagrams_leave_an_unreachable_backend_and_streams_wait_for_it() {
    let mut rig = Rig::new(&two());
    let udp = |port| packets::v4(port, DATAGRAM).bytes();
    let moved = CLIENTS.filter(|port| rig.backend_of(&udp(*port)) == Some(1)).collect::<Vec<_>>();
    let waiting = CLIENTS.filter(|port| connect(&mut rig, *port) == 1).collect::<Vec<_>>();
    assert!(!moved.is_empty() && !waiting.is_empty());
    let gone = BackendSpec { reachable: false, weight: 0, ..backend(1) };
    rig.publish(&World::new().web4(&[gone, backend(2)]));
    assert!(moved.iter().all(|port| rig.backend_of(&udp(*port)) == Some(2)));
    for port in &waiting {
        assert_eq!(rig.send(&ack(*port)), []);
        assert_eq!(rig.counted().get("next_hop_unresolved"), Some(&1));
    }
    rig.publish(&two());
    assert!(waiting.iter().all(|port| rig.backend_of(&ack(*port)) == Some(1)));
}

#[test]
fn a_frame_for_another_station_is_left_alone() {
    let mut rig = Rig::new(&World::new().web4(&[backend(1)]));
    for other in [node_mac(1), [0xff; 6], [0x01, 0, 0x5e, 0, 0, 1]] {
        let mut packet = ack(1000);
        packet[..6].copy_from_slice(&other);
        assert_eq!(rig.send(&packet), []);
        assert_eq!(rig.counted().get("not_for_us"), Some(&1), "{other:02x?}");
    }
    assert_eq!(rig.send(&ack(1000)).len(), 1);
}

#[test]
fn a_backend_behind_a_link_that_the_worker_has_no_port_on_is_unresolved() {
    // This worker has a queue of the first and of the third interface only.
    let mut world = World::new().web4(&[BackendSpec { link: 1, ..backend(1) }]);
    world.links.extend([link(1), link(2)]);
    let mut rig = Rig::equipped(&world, Equipment { links: vec![0, 2], ..Default::default() });
    assert_eq!(rig.send(&ack(1000)), []);
    assert_eq!(rig.drops(DropReason::NextHopUnresolved), 1);
}
