//! The whole turn under a hostile network: frames are conserved, every packet is accounted for and becomes
//! what the reference says, and nothing panics or allocates. The rig asserts it after every turn.

use std::{cell::RefCell, collections::BTreeSet, panic::AssertUnwindSafe, sync::Arc};

use dataplane::{
    connections::{Reader, Traffic},
    encap::Tunnel,
    forwarding::{Forwarding, Vip},
    parse,
};
use proptest::prelude::*;

use crate::{
    packets::{self, ACK, DATAGRAM, SYN, any_packet, icmp_error},
    rig::{
        BackendSpec, Equipment, Rig, SCTP, SHORT_TIMEOUTS, Scheduled, Sent, VIP4, VIP6, World,
        addressed, backend, hash_key, link, table,
    },
    script::Script,
};

/// What the network does to the node.
#[derive(Clone, Debug)]
enum Step {
    /// Brings a packet, if there is a frame to receive it into.
    Deliver {
        port: usize,
        packet: Vec<u8>,
    },
    /// The same, placed anywhere in its frame.
    DeliverAt {
        port: usize,
        start: usize,
        packet: Vec<u8>,
    },
    /// Takes some of what was sent.
    Take {
        port: usize,
        most: usize,
    },
    Turn,
    Wait {
        ms: u64,
    },
    /// Not the network but control: another of these worlds is published.
    Publish {
        world: usize,
    },
}

/// Packets that take every way through the engine.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let too_big = (any::<bool>(), any::<bool>(), 1400_usize..3900).prop_map(|(v6, cut, len)| {
        let packet = if v6 { packets::v6(9, ACK) } else { packets::v4(9, ACK) };
        let packet = if cut { packet.fragmentable() } else { packet };
        packet.with_payload(len).bytes()
    });
    prop_oneof![
        4 => any_packet().prop_map(|packet| packet.bytes()),
        2 => (1_u16..50).prop_map(|port| packets::v4(port, SYN).bytes()),
        2 => (1_u16..50).prop_map(|port| packets::v6(port, DATAGRAM).bytes()),
        2 => too_big,
        1 => prop::sample::select(questions()),
        1 => any_packet().prop_map(|p| icmp_error(&packets::answer_to(&p).ip_packet())),
        1 => prop::collection::vec(any::<u8>(), 0..200),
        1 => (any_packet(), any::<prop::sample::Index>()).prop_map(|(packet, cut)| {
            let mut bytes = packet.bytes();
            bytes.truncate(cut.index(bytes.len()));
            bytes
        }),
    ]
}

/// Packets that ask something of the node itself.
fn questions() -> Vec<Vec<u8>> {
    let ping = packets::ping(VIP4, 1, 2, 9, b"ping");
    let ping6 = packets::ping(VIP6, 1, 2, 9, b"ping");
    let arp = packets::arp_request([0; 4], VIP4);
    vec![ping, ping6, arp, packets::solicitation("::", VIP6, false, 255)]
}

fn any_step() -> impl Strategy<Value = Step> {
    let port = 0_usize..3;
    let deliver = (port.clone(), any_frame());
    let start = prop_oneof![0_usize..4096, Just(4096)];
    let deliver_at = (port.clone(), start, any_frame());
    prop_oneof![
        10 => deliver.prop_map(|(port, packet)| Step::Deliver { port, packet }),
        3 => deliver_at.prop_map(|(port, start, packet)| {
            let start = start.min(4096_usize.saturating_sub(packet.len())); // up to its very end
            Step::DeliverAt { port, start, packet }
        }),
        3 => (port, 0_usize..20).prop_map(|(port, most)| Step::Take { port, most }),
        6 => Just(Step::Turn),
        1 => (1_u64..2000).prop_map(|ms| Step::Wait { ms }),
        1 => (0_usize..8).prop_map(|world| Step::Publish { world }),
    ]
}

/// The same services in different times. At first with backends behind every link, of which one is behind
/// none of ours.
fn worlds() -> [(World, Arc<Forwarding>); 8] {
    let on = |slot: u32, link: u8| BackendSpec { link, ..backend(slot) };
    let world = |backends4: &[BackendSpec], backends6: &[BackendSpec]| {
        let mut world = World::new().web4(backends4).web6(backends6);
        world.links = (0..3).map(link).collect();
        world.links[1].partial_checksums = true;
        world.answer_arp = true;
        for (vips, _) in &mut world.services {
            vips.push(Vip { protocol: SCTP, ..vips[0] });
        }
        world
    };
    let small = BackendSpec { mtu: 700, ..on(3, 2) };
    let large = BackendSpec { mtu: 3800, ..on(8, 0) };
    let small6 = BackendSpec { mtu: 1280, ..on(7, 2) };
    let all4 = [on(1, 0), on(2, 1), small.clone(), on(4, 9), large.clone()];
    let all6 = [on(5, 0).over_v6(), on(6, 1), small6.clone()];

    // Some drain, some can't be reached, some are gone and others came.
    let drained = |backend: BackendSpec| BackendSpec { weight: 0, ..backend };
    let lost = |backend: BackendSpec| BackendSpec { reachable: false, ..backend };
    let changed4 = [drained(on(1, 0)), lost(on(2, 1)), small.clone(), on(9, 1).over_v6()];
    let changed6 = [drained(on(5, 0).over_v6()), lost(on(6, 1)), on(10, 0)];
    // Nobody takes new connections, and for the old ones everything is too big.
    let tiny = |backend: BackendSpec| drained(BackendSpec { mtu: 60, ..backend });
    let mut full = world(&[tiny(small), tiny(large)], &[tiny(small6)]);
    full.answer_arp = false;
    // Every port is served, through tags and without checksums.
    let tagged = |slot: u32| {
        let tunnel =
            Tunnel { vlans: vec![7, 8], udp_checksum: false, ..backend(slot).over_v6().tunnel };
        BackendSpec { tunnel, mtu: 9000, ..on(slot, 1) }
    };
    let mut every_port = world(&[tagged(11)], &[tagged(12)]);
    every_port.services.iter_mut().flat_map(|(vips, _)| vips).for_each(|vip| vip.port = 0);
    let [all, changed] = [world(&all4, &all6), world(&changed4, &changed6)];
    let scheduled = [
        all.clone().scheduled(Scheduled::RoundRobin),
        World { resets: true, ..changed.clone() }.scheduled(Scheduled::LeastConnections),
        all.clone().scheduled(Scheduled::Source(1)),
        World { resets: true, ..changed.clone() }.scheduled(Scheduled::Source(1)),
    ];
    let [turns, fewest, bound, bound_changed] = scheduled;
    [all, changed, full, every_port, turns, fewest, bound, bound_changed].map(|world| {
        let forwarding = world.forwarding();
        (world, forwarding)
    })
}

fn any_equipment() -> impl Strategy<Value = Equipment> {
    let ring_size = prop_oneof![Just(1_usize), Just(2), Just(4), Just(16), Just(128)];
    (ring_size, 1_usize..200, 1_usize..4, 0_u32..200).prop_map(
        |(ring_size, frames, ports, icmp_errors_per_s)| Equipment {
            ring_size,
            frames,
            links: (0..ports).collect(),
            icmp_errors_per_s,
            connections: 64,
            ..Default::default()
        },
    )
}

/// Takes the steps one by one.
fn play(rig: &mut Rig, worlds: &[(World, Arc<Forwarding>)], steps: Vec<Step>) {
    for step in steps {
        match step {
            Step::Deliver { port, packet } => {
                let port = port % rig.ports;
                rig.deliver(port, &addressed(port, packet));
            }
            Step::DeliverAt { port, start, packet } => {
                let port = port % rig.ports;
                rig.deliver_at(port, start, &addressed(port, packet));
            }
            Step::Take { port, most } => {
                rig.take(port % rig.ports, most);
            }
            Step::Turn => {
                rig.turn();
            }
            Step::Wait { ms } => rig.wait(ms),
            Step::Publish { world } => rig.publish_built(&worlds[world].0, &worlds[world].1),
        }
    }
}

proptest! {
    #[test]
    fn frames_are_conserved_and_packets_accounted_for_whatever_the_rings_do(
        equipment in any_equipment(), steps in prop::collection::vec(any_step(), 1..120),
    ) {
        let worlds = worlds();
        let mut rig = Rig::equipped(&worlds[0].0, equipment);
        play(&mut rig, &worlds, steps);
        rig.drain();
    }
}

/// Nodes that can do much, or little. What they forget, they forget soon.
fn nodes(peer: Reader) -> [Equipment; 4] {
    let node = |frames, ring_size, ports: usize, icmp_errors_per_s| Equipment {
        frames,
        ring_size,
        icmp_errors_per_s,
        connections: 16,
        links: (0..ports).collect(),
        timeouts: SHORT_TIMEOUTS,
        peers: vec![peer],
        ..Default::default()
    };
    [
        node(256, 64, 3, 1000),
        Equipment { connections: 1024, ..node(512, 128, 2, 0) },
        Equipment { admissions_per_s: 20, ..node(24, 4, 3, 10) },
        Equipment { chunk_bytes: 2048, ..node(6, 2, 1, 1000) },
    ]
}

fn steps(script: &mut Script<'_>) -> Vec<Step> {
    let mut steps = Vec::new();
    while !script.is_over() && steps.len() < 200 {
        let choice = script.byte();
        let port = usize::from(choice >> 3) % 4;
        steps.push(match choice % 8 {
            0..4 => Step::Deliver { port, packet: script.frame() },
            4 => Step::DeliverAt {
                port,
                start: usize::from(script.word()) % 4097,
                packet: script.frame(),
            },
            5 => Step::Turn,
            6 => Step::Take { port, most: script.byte().into() },
            _ if choice & 0x40 == 0 => Step::Wait { ms: 8 * u64::from(script.byte()) },
            _ => Step::Publish { world: usize::from(choice >> 3) % 8 },
        });
    }
    steps
}

#[test]
fn whatever_the_network_does_the_node_does_as_the_reference() {
    let worlds = worlds();
    let one_turn = World::new().web4(&[backend(1)]).web6(&[backend(5)]);
    let one_turn = World { links: (0..3).map(link).collect(), ..one_turn };
    let one_turn = one_turn.scheduled(Scheduled::RoundRobin);
    let one_turn = (one_turn.clone(), one_turn.forwarding());
    let peer = table(64);
    let nodes = nodes(peer.reader());
    // Memory of a node is never given back, so each serves many lives. One that failed serves no more.
    let state = AssertUnwindSafe(RefCell::new(([const { None }; 4], peer)));
    bolero::check!().for_each(move |input: &[u8]| {
        let (rigs, peer) = &mut *state.borrow_mut();
        let mut script = Script(input);
        let which = usize::from(script.byte()) % 4;
        let rig = rigs[which].take();
        let mut rig = rig.unwrap_or_else(|| Rig::equipped(&worlds[0].0, nodes[which].clone()));
        rig.forget(&one_turn);
        rig.publish_built(&worlds[0].0, &worlds[0].1);
        for port in 1..4 {
            // Another worker has some flows, too.
            let key = parse::flow(&packets::v4(port, ACK).bytes()).unwrap().key;
            peer.remember(key.hash(&hash_key()), 3, Traffic::Stream, rig.now);
        }
        play(&mut rig, &worlds, steps(&mut script));
        rig.drain();
        rigs[which] = Some(rig);
    });
}

#[test]
fn a_full_tx_ring_drops_what_it_cannot_take_and_says_so() {
    let equipment = Equipment { ring_size: 4, frames: 32, ..Default::default() };
    let mut rig = Rig::equipped(&worlds()[0].0, Equipment { links: vec![0], ..equipment });
    let mut delivered = 0;
    for _ in 0..3 {
        while rig.deliver(0, &packets::v4(1, ACK).bytes()) {
            delivered += 1;
        }
        rig.turn();
    }
    assert_eq!(delivered, 12, "as many as the fill ring had room for, each time");
    let counted = rig.counted();
    assert_eq!(rig.take(0, usize::MAX).len(), 4);
    assert_eq!(counted.get("tx_ring_full"), Some(&8), "{counted:?}");
}

#[test]
fn a_burst_larger_than_one_turn_is_forwarded_in_several_and_in_order() {
    let equipment = Equipment { ring_size: 128, frames: 512, ..Default::default() };
    let mut rig = Rig::equipped(&World::new().web4(&[backend(1)]), equipment);
    for id in 0..100 {
        let packet = packets::Packet { id, ..packets::v4(1, ACK) };
        assert!(rig.deliver(0, &packet.bytes()));
    }
    assert_eq!(rig.turn(), 64);
    assert_eq!(rig.turn(), 36);
    let id = |sent: &Sent| u16::from_be_bytes([sent.bytes[64 + 4], sent.bytes[64 + 5]]);
    let ids: Vec<u16> = rig.take(0, usize::MAX).iter().map(id).collect();
    assert_eq!(ids, (0..100).collect::<Vec<_>>());
}

/// What leaves by the first port is seen first, whichever came first.
#[test]
fn packets_that_look_alike_may_be_seen_in_another_order_than_they_came() {
    let worlds = worlds();
    let [maglev, turns] = [&worlds[0], &worlds[4]];
    let mut seen = BTreeSet::new();
    for others in 0..5 {
        let equipment = Equipment { links: vec![0, 1, 2], ..Default::default() };
        let mut rig = Rig::equipped(&turns.0, equipment);
        for other in 0..others {
            rig.send(&packets::v4(100 + other, SYN).bytes());
        }
        // The first goes to whose turn it is, the other to Maglev's backend.
        for (world, forwarding) in [turns, maglev] {
            rig.publish_built(world, forwarding);
            assert!(rig.deliver(0, &packets::v4(17, SYN).bytes()));
            rig.turn();
        }
        let ports = (0..3).flat_map(|port| rig.take(port, usize::MAX)).map(|sent| sent.port);
        seen.insert(ports.collect::<Vec<_>>());
        rig.all_is_taken();
    }
    assert!(seen.len() > 1, "{seen:?}");
}

#[test]
fn a_syn_is_repeated_to_where_maglev_put_it_while_it_was_asked() {
    let maglev = World::new().web4(&[backend(1), backend(2)]);
    let by_client = maglev.clone().scheduled(Scheduled::Source(60));
    let mut moved = 0;
    for port in 1..20 {
        let mut rig = Rig::new(&by_client);
        let syn = packets::v4(port, SYN).bytes();
        for world in [&by_client, &maglev] {
            rig.publish(world);
            assert!(rig.deliver(0, &syn));
            rig.turn();
        }
        let sent = rig.take(0, usize::MAX);
        rig.all_is_taken();
        moved += usize::from(sent[0] != sent[1]);
        rig.publish(&by_client);
        assert_eq!(rig.send(&syn), [sent[1].clone()]);
    }
    assert!(moved > 0);
}
