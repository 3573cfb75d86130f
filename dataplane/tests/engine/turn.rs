//! The whole turn under a hostile network: frames are conserved, every packet is accounted for, and
//! nothing panics. The rig asserts the first two after every turn.

use proptest::prelude::*;

use crate::{
    packets::{self, ACK, DATAGRAM, SYN, any_packet, icmp_error},
    rig::{BackendSpec, Equipment, Rig, VIP4, VIP6, World, backend, link},
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
    ]
}

/// Backends behind every link, of which one is behind none of ours.
fn world() -> World {
    let on = |slot: u32, link: u8| BackendSpec { link, ..backend(slot) };
    let mut world = World::new()
        .web4(&[
            on(1, 0),
            on(2, 1),
            BackendSpec { mtu: 700, ..on(3, 2) },
            on(4, 9),
            BackendSpec { mtu: 3800, ..on(8, 0) },
        ])
        .web6(&[on(5, 0).over_v6(), on(6, 1), BackendSpec { mtu: 1280, ..on(7, 2) }]);
    world.links = (0..3).map(link).collect();
    world.links[1].partial_checksums = true;
    world.answer_arp = true;
    world
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

proptest! {
    #[test]
    fn frames_are_conserved_and_packets_accounted_for_whatever_the_rings_do(
        equipment in any_equipment(), steps in prop::collection::vec(any_step(), 1..120),
    ) {
        let ports = equipment.links.len();
        let frames = equipment.frames;
        let mut rig = Rig::equipped(&world(), equipment);
        for step in steps {
            match step {
                Step::Deliver { port, packet } => {
                    rig.deliver(port % ports, &packet);
                }
                Step::DeliverAt { port, start, packet } => {
                    rig.worker.ports_mut()[port % ports].deliver_at(start, &packet);
                }
                Step::Take { port, most } => {
                    rig.take(port % ports, most);
                }
                Step::Turn => rig.turn(),
                Step::Wait { ms } => rig.wait(ms),
            }
            prop_assert_eq!(rig.worker.frames(), frames);
        }
        // A patient network takes everything in the end, and all frames serve again.
        for _ in 0..1000 {
            rig.turn();
            for port in 0..ports {
                rig.take(port, usize::MAX);
            }
        }
        rig.turn();
        prop_assert_eq!(rig.worker.in_flight(), 0);
        rig.all_is_taken();
    }
}

#[test]
fn any_bytes_at_all_are_taken_through_a_turn() {
    // One node for all inputs: what one leaves behind, the next must bear.
    let equipment = Equipment { links: vec![0, 1, 2], ..Default::default() };
    let rig = std::cell::RefCell::new(Rig::equipped(&world(), equipment));
    let rig = std::panic::AssertUnwindSafe(rig);
    bolero::check!().for_each(move |input: &[u8]| {
        let mut rig = rig.borrow_mut();
        let (Some((&shape, bytes)), port) = (input.split_first(), input.len() % 3) else { return };
        // Begin with a header that leads somewhere, as often as not.
        let valid = match shape % 4 {
            0 => Vec::new(),
            1 => packets::v4(u16::from(shape), ACK).bytes(),
            2 => packets::v6(u16::from(shape), DATAGRAM).bytes(),
            _ => icmp_error(&packets::answer_to(&packets::v4(9, ACK)).ip_packet()),
        };
        let keep = valid.len() * usize::from(shape >> 2) / 64;
        let mut frame = [&valid[..keep], bytes].concat();
        frame.truncate(3000); // what fits a chunk behind the headroom
        rig.send_by(port, &frame);
    });
}

#[test]
fn a_full_tx_ring_drops_what_it_cannot_take_and_says_so() {
    let equipment = Equipment { ring_size: 4, frames: 32, ..Default::default() };
    let mut rig = Rig::equipped(&world(), Equipment { links: vec![0], ..equipment });
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
    assert_eq!(rig.worker.turn(rig.now), 64);
    assert_eq!(rig.worker.turn(rig.now), 36);
    let ids: Vec<u16> = std::iter::from_fn(|| {
        rig.worker.ports_mut()[0].take_sent(|sent| u16::from_be_bytes([sent[64 + 4], sent[64 + 5]]))
    })
    .collect();
    assert_eq!(ids, (0..100).collect::<Vec<_>>());
}
