//! What each scheduler promises, through the whole turn; and what it may not do: move a connection, or put one
//! where no table remembers it.

use std::collections::BTreeMap;

use dataplane::{
    connections::{Timeouts, Traffic},
    counters::{DropReason, Event},
    forwarding::Slot,
    parse,
    schedule::{self, Scheduler, Sight},
    time::Tick,
};
use proptest::prelude::*;

use crate::{
    packets::{self, ACK, DATAGRAM, FIN, L4, SYN},
    rig::{
        BackendSpec, Equipment, Rig,
        Scheduled::{self, LeastConnections, Maglev, RoundRobin, Source},
        TCP, VIP4, World, backend, hash_key, table, vip,
    },
};

const SCHEDULERS: [Scheduled; 4] = [Maglev, RoundRobin, LeastConnections, Source(300)];

/// Backends 1, 2 and so on, of these weights.
fn weighted(scheduled: Scheduled, weights: &[u16]) -> World {
    let spec = |(slot, &weight)| BackendSpec { weight, ..backend(slot) };
    let backends: Vec<_> = (1..).zip(weights).map(spec).collect();
    World::new().web4(&backends).scheduled(scheduled)
}

fn packet(port: u16, l4: L4) -> Vec<u8> {
    packets::v4(port, l4).bytes()
}

fn open(rig: &mut Rig, port: u16) -> Slot {
    rig.backend_of(&packet(port, SYN)).expect("it is forwarded")
}

/// The same from another client.
fn from(client: u8, port: u16, l4: L4) -> Vec<u8> {
    let mut packet = packets::v4(port, l4);
    packet.src.set_ip([198, 51, 100, client].into());
    packet.bytes()
}

/// Where Maglev alone sends these packets.
fn by_maglev(world: &World, packet: &[u8]) -> Option<Slot> {
    let nothing_admitted = Equipment { admissions_per_s: 0, ..Default::default() };
    Rig::equipped(world, nothing_admitted).backend_of(packet)
}

fn shares(slots: impl IntoIterator<Item = Slot>) -> BTreeMap<Slot, u64> {
    slots.into_iter().fold(BTreeMap::new(), |mut shares, slot| {
        *shares.entry(slot).or_default() += 1;
        shares
    })
}

#[test]
fn round_robin_takes_turns_by_weight_and_a_snapshot_in_between_changes_nothing() {
    let world = weighted(RoundRobin, &[3, 0, 1]);
    for l4 in [SYN, DATAGRAM] {
        let mut rig = Rig::new(&world);
        let mut slots = Vec::new();
        for port in 1000..1008 {
            slots.extend(rig.backend_of(&packet(port, l4)));
            rig.publish(&world);
        }
        assert_eq!(slots, [1, 1, 3, 1, 1, 1, 3, 1]);
    }
}

#[test]
fn workers_begin_their_rounds_at_different_backends() {
    let first = [0, 1, 2].map(|worker| {
        let scheduler = Scheduler::new(64, worker, Vec::new(), hash_key());
        let forwarding = weighted(RoundRobin, &[1, 1, 1]).forwarding();
        let key = parse::flow(&packet(1000, SYN)).unwrap().key;
        let sight = Sight {
            service: forwarding.service(0).unwrap(),
            key: &key,
            maglev_hash: 0,
            now: Tick(0),
            slots: None,
        };
        scheduler.choose(sight, &table(16))
    });
    assert_eq!(first, [Some(1), Some(2), Some(3)]);
}

#[test]
fn the_fewest_connections_are_those_that_have_not_ended() {
    let mut rig = Rig::new(&weighted(LeastConnections, &[1, 1, 1]));
    let slots: Vec<Slot> = (1000..1009).map(|port| open(&mut rig, port)).collect();
    assert_eq!(shares(slots.iter().copied()), BTreeMap::from([(1, 3), (2, 3), (3, 3)]));
    // Those of backend 2 end: it gets the next ones.
    for (port, slot) in (1000..1009).zip(&slots) {
        if *slot == 2 {
            rig.send(&packet(port, FIN));
        }
    }
    assert_eq!((2000..2003).map(|port| open(&mut rig, port)).collect::<Vec<_>>(), [2, 2, 2]);
}

#[test]
fn a_connection_that_fell_silent_counts_no_longer_than_its_timeout() {
    let timeouts = Timeouts { unconfirmed_s: 5, ..Timeouts::default() };
    let equipment = Equipment { timeouts, ..Default::default() };
    let mut rig = Rig::equipped(&weighted(LeastConnections, &[1, 1]), equipment);
    let first = open(&mut rig, 1000);
    assert_ne!(open(&mut rig, 1001), first);
    rig.send(&packet(1001, FIN));
    assert_ne!(open(&mut rig, 1002), first);
    rig.send(&packet(1002, FIN));
    // 5 s, and a round of the sweep.
    rig.wait(5_000 + 17_000);
    let slots = (2000..2002).map(|port| open(&mut rig, port));
    assert_eq!(shares(slots), BTreeMap::from([(1, 1), (2, 1)]));
}

#[test]
fn of_many_backends_the_fewest_connections_are_sought_among_two() {
    let equipment = Equipment { connections: 4096, ..Default::default() };
    let mut rig = Rig::equipped(&weighted(LeastConnections, &[1; 40]), equipment);
    let slots: Vec<_> = (1000..2000).map(|port| open(&mut rig, port)).collect();
    let shares = shares(slots);
    // 25 on average; Maglev's shares spread from 13 to 36.
    assert!(
        shares.len() == 40 && shares.values().all(|share| (18..=29).contains(share)),
        "{shares:?}"
    );
}

#[test]
fn a_client_has_one_backend_whatever_its_ports_and_protocols() {
    for timeout_s in [0, 300] {
        let world = weighted(Source(timeout_s), &[1, 1, 1]);
        let mut rig = Rig::new(&world);
        let mut used = Vec::new();
        for client in 1..30 {
            let slot = rig.backend_of(&from(client, 1000, SYN)).unwrap();
            used.push(slot);
            for port in [1000, 1001, 1002] {
                for l4 in [SYN, ACK, DATAGRAM] {
                    assert_eq!(rig.backend_of(&from(client, port, l4)), Some(slot));
                }
            }
            // And on every node.
            assert_eq!(by_maglev(&world, &from(client, 7, ACK)), Some(slot));
        }
        assert_eq!(shares(used).len(), 3);
    }
}

/// A client's backend, and a node that it has a connection on, from which then more backends take a share;
/// Maglev would have the client's next connections go to one of these.
fn bound(timeout_s: u32, equipment: Equipment) -> (Rig, u8, Slot) {
    let (few, more) = (weighted(Source(timeout_s), &[1, 1]), weighted(Source(timeout_s), &[1; 20]));
    let moved = |client: &u8| {
        let packet = from(*client, 1000, SYN);
        by_maglev(&few, &packet) != by_maglev(&more, &packet)
    };
    let client = (1..200).find(moved).expect("nearly all would be moved");
    let mut rig = Rig::equipped(&few, equipment);
    let slot = rig.backend_of(&from(client, 1000, SYN)).unwrap();
    rig.publish(&more);
    (rig, client, slot)
}

#[test]
fn a_client_keeps_its_backend_through_a_change_until_its_timeout_has_passed() {
    let (mut rig, client, slot) = bound(60, Equipment::default());
    rig.wait(59_000);
    assert_eq!(rig.backend_of(&from(client, 2000, SYN)), Some(slot));
    assert_eq!(rig.backend_of(&from(client, 2000, ACK)), Some(slot));
    rig.wait(59_000);
    assert_eq!(rig.backend_of(&from(client, 2001, DATAGRAM)), Some(slot), "the latest counts");
    rig.wait(60_000 + 33_000);
    let moved = rig.backend_of(&from(client, 2002, SYN));
    assert_ne!(moved, Some(slot), "now Maglev decides");
    assert_eq!(rig.backend_of(&from(client, 2001, DATAGRAM)), Some(slot), "what is open stays");
    let (mut rig, client, slot) = bound(0, Equipment::default());
    assert_ne!(rig.backend_of(&from(client, 2000, SYN)), Some(slot), "without a timeout it moves");
}

#[test]
fn a_client_that_another_worker_knows_keeps_its_backend() {
    let (_, client, slot) = bound(60, Equipment::default());
    let mut peer = table(1024);
    let peers = vec![peer.reader()];
    let world = weighted(Source(60), &[1; 20]);
    let mut rig = Rig::equipped(&world, Equipment { peers, ..Default::default() });
    let key = parse::flow(&from(client, 0, ACK)).unwrap().key;
    let forwarding = world.forwarding();
    let hash = schedule::client(forwarding.service(0).unwrap(), &key).hash(&hash_key());
    peer.remember_affinity(hash, slot, Traffic::Syn, rig.now);
    rig.allow(&from(client, 1, ACK), slot);
    assert_eq!(rig.backend_of(&from(client, 2000, SYN)), Some(slot));
}

#[test]
fn services_at_one_address_each_keep_a_client() {
    let world = |backends: u32| {
        let all = |first: Slot| (first..first + backends).map(backend).collect::<Vec<_>>();
        World::new()
            .service(&[vip(VIP4, TCP, 80)], &all(1))
            .service(&[vip(VIP4, TCP, 81)], &all(30))
            .scheduled(Source(300))
    };
    let to = |client: u8, port: u16, vip_port: u16| {
        let mut packet = packets::v4(port, SYN);
        packet.src.set_ip([198, 51, 100, client].into());
        packet.dst.set_port(vip_port);
        packet.bytes()
    };
    let mut rig = Rig::new(&world(2));
    let both = |rig: &mut Rig, client, port| {
        [80, 81].map(|vip_port| rig.backend_of(&to(client, port, vip_port)).unwrap())
    };
    let before: Vec<_> = (1..20).map(|client| both(&mut rig, client, 1000)).collect();
    rig.publish(&world(20));
    let after: Vec<_> = (1..20).map(|client| both(&mut rig, client, 1001)).collect();
    assert_eq!(after, before);
}

#[test]
fn a_drain_ends_a_clients_affinity_but_not_its_connections() {
    let world = weighted(Source(300), &[1, 1]);
    let mut rig = Rig::new(&world);
    let slot = open(&mut rig, 1000);
    let drained = if slot == 1 { [0, 1] } else { [1, 0] };
    rig.publish(&weighted(Source(300), &drained));
    assert_eq!(rig.backend_of(&packet(1000, ACK)), Some(slot));
    assert_eq!(open(&mut rig, 1001), 3 - slot);
    rig.publish(&world);
    assert_eq!(open(&mut rig, 1002), 3 - slot, "it is bound to another by now");
}

#[test]
fn what_no_table_remembers_goes_where_maglev_says() {
    for scheduled in SCHEDULERS {
        let world = weighted(scheduled, &[1, 1, 1]);
        let nothing_admitted = Equipment { admissions_per_s: 0, ..Default::default() };
        let mut rig = Rig::equipped(&world, nothing_admitted);
        for port in 1000..1030 {
            // The same for its SYN and all that follows, on this node or another.
            let slot = open(&mut rig, port);
            assert_eq!(rig.backend_of(&packet(port, ACK)), Some(slot));
            assert_eq!(Rig::new(&world).backend_of(&packet(port, ACK)), Some(slot));
            let slot = rig.backend_of(&packet(port, DATAGRAM));
            assert_eq!(rig.backend_of(&packet(port, DATAGRAM)), slot);
        }
    }
}

#[test]
fn a_full_table_places_no_connection_where_it_is_not_remembered() {
    for scheduled in [RoundRobin, LeastConnections] {
        let world = weighted(scheduled, &[1, 1, 1]);
        let equipment = Equipment { connections: 16, ..Default::default() };
        let mut rig = Rig::equipped(&world, equipment);
        let mut slots = BTreeMap::new();
        for port in 1000..1100 {
            slots.insert(port, open(&mut rig, port));
            rig.wait(200);
            // Its next packet finds it or, if it was never remembered, Maglev.
            assert_eq!(rig.backend_of(&packet(port, ACK)), Some(slots[&port]));
        }
        assert!(rig.event(Event::ConnectionTableFull) > 0);
        for (port, slot) in slots {
            assert_eq!(rig.backend_of(&packet(port, ACK)), Some(slot));
        }
    }
}

#[test]
fn a_syn_said_again_has_no_other_turn_and_a_forged_one_moves_nothing() {
    for scheduled in [RoundRobin, LeastConnections] {
        let mut rig = Rig::new(&weighted(scheduled, &[1, 1, 1]));
        let slot = open(&mut rig, 1000);
        open(&mut rig, 1001);
        for _ in 0..4 {
            rig.wait(1000);
            assert_eq!(open(&mut rig, 1000), slot, "said again");
        }
        assert_eq!(rig.backend_of(&packet(1000, ACK)), Some(slot));
        rig.wait(200);
        assert_eq!(rig.backend_of(&packet(1000, ACK)), Some(slot));
        assert_eq!(open(&mut rig, 1000), slot, "forged");
        assert_eq!(rig.backend_of(&packet(1000, ACK)), Some(slot));
    }
}

#[test]
fn a_port_that_is_used_again_has_a_turn_of_its_own() {
    let mut rig = Rig::new(&weighted(RoundRobin, &[1, 1]));
    for slot in [1, 2, 1, 2] {
        assert_eq!(open(&mut rig, 1000), slot);
        rig.send(&packet(1000, FIN));
    }
}

#[test]
fn another_scheduler_moves_no_connection() {
    for before in SCHEDULERS {
        for after in SCHEDULERS {
            let mut rig = Rig::new(&weighted(before, &[1, 1, 1]));
            let slots: Vec<_> = (1000..1020).map(|port| open(&mut rig, port)).collect();
            rig.publish(&weighted(after, &[1, 1, 1]));
            for (port, slot) in (1000..1020).zip(slots) {
                assert_eq!(rig.backend_of(&packet(port, ACK)), Some(slot));
            }
        }
    }
}

#[test]
fn connections_that_began_under_another_scheduler_count() {
    let mut rig = Rig::new(&weighted(Maglev, &[1, 1]));
    let before: Vec<_> = (1000..1020).map(|port| open(&mut rig, port)).collect();
    rig.publish(&weighted(LeastConnections, &[1, 1]));
    let after: Vec<_> = (2000..2040).map(|port| open(&mut rig, port)).collect();
    assert_eq!(shares(before.into_iter().chain(after)), BTreeMap::from([(1, 30), (2, 30)]));
}

#[test]
fn a_service_without_takers_drops_whatever_its_scheduler() {
    for scheduled in SCHEDULERS {
        let mut rig = Rig::new(&weighted(scheduled, &[0, 0]));
        assert_eq!(rig.backend_of(&packet(1000, SYN)), None);
        assert_eq!(rig.drops(DropReason::NoBackend), 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn round_robins_shares_are_exact_over_a_cycle_and_never_two_flows_off(
        weights in prop::collection::vec(1_u16..6, 1..6), begun in 0_u16..10,
    ) {
        let mut rig = Rig::new(&weighted(RoundRobin, &weights));
        for port in 0..begun {
            open(&mut rig, 500 + port);
        }
        let total: u16 = weights.iter().sum();
        let slots: Vec<Slot> = (0..total).map(|port| open(&mut rig, 1000 + port)).collect();
        for turns in 1..=slots.len() {
            let had = shares(slots[..turns].iter().copied());
            for (slot, &weight) in (1..).zip(&weights) {
                let had = had.get(&slot).copied().unwrap_or(0) as f64;
                let share = turns as f64 * f64::from(weight) / f64::from(total);
                prop_assert!((had - share).abs() < 2.0, "{slot} had {had}, not {share}");
            }
        }
        for (slot, &weight) in (1..).zip(&weights) {
            prop_assert_eq!(shares(slots.iter().copied())[&slot], u64::from(weight));
        }
    }

    #[test]
    fn nobody_has_more_connections_for_its_weight_than_another_would_with_one_more(
        weights in prop::collection::vec(1_u16..6, 1..6),
        steps in prop::collection::vec((any::<prop::sample::Index>(), 0..4_u8), 1..80),
    ) {
        let mut rig = Rig::new(&weighted(LeastConnections, &weights));
        let mut open_now: Vec<(u16, Slot)> = Vec::new();
        for ((which, kind), port) in steps.into_iter().zip(1000..) {
            if kind == 0 && !open_now.is_empty() {
                let (port, _) = open_now.swap_remove(which.index(open_now.len()));
                rig.send(&packet(port, FIN));
                continue;
            }
            let had = shares(open_now.iter().map(|&(_, slot)| slot));
            let load = |slot: Slot| {
                let had = had.get(&slot).copied().unwrap_or(0) as f64;
                (had + 1.0) / f64::from(weights[slot as usize - 1])
            };
            let slot = open(&mut rig, port);
            open_now.push((port, slot));
            let least = (1..).take(weights.len()).map(load).fold(f64::INFINITY, f64::min);
            prop_assert!(load(slot) <= least + 1e-9, "{slot} of {had:?}, weights {weights:?}");
        }
    }

    #[test]
    fn a_clients_flows_stay_together_while_backends_come_and_go(
        steps in prop::collection::vec((1_u8..8, 0_u64..20_000, 0..3_u8), 1..40),
    ) {
        let worlds = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 5, 0]];
        let worlds = worlds.map(|weights| weighted(Source(60), &weights));
        let mut rig = Rig::new(&worlds[0]);
        let mut at: BTreeMap<u8, (Slot, u64)> = BTreeMap::new();
        let mut elapsed = 0;
        for ((client, ms, world), port) in steps.into_iter().zip(1000..) {
            rig.wait(ms);
            elapsed += ms;
            rig.publish(&worlds[usize::from(world)]);
            let slot = rig.backend_of(&from(client, port, SYN)).unwrap();
            // The first three backends are always there; only they must keep a client.
            if let Some((before, then)) = at.insert(client, (slot, elapsed))
                && before <= 3 && elapsed - then <= 60_000
            {
                prop_assert_eq!(slot, before);
            }
        }
    }
}
