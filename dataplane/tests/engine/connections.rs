//! The connection table against a `HashMap`, and read while it is written.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use dataplane::{
    connections::{Connections, Found, Place, Remembered, Settled, Timeouts, Traffic, Verdict},
    flow::{Flow, protocol, tcp_flags},
    forwarding::{MAX_BACKENDS, Slot},
    time::Tick,
};
use proptest::prelude::*;

use crate::rig::table;

/// The table counts in units of this many milliseconds until a connection is confirmed; steps are
/// multiples, so that the oracle need not know how it rounds.
const STEP_MS: u64 = 64;

const CONFIRMED_AFTER_MS: u64 = 3 * STEP_MS;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// The flow's packet comes: what is not remembered is given this slot.
    Packet {
        flow: u64,
        traffic: Traffic,
        slot: Slot,
    },
    /// The flow begins (again), with this slot.
    Begin {
        flow: u64,
        slot: Slot,
    },
    Wait {
        ms: u64,
    },
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum State {
    /// Only a SYN.
    Opening,
    /// Not confirmed.
    NewStream,
    NewDatagrams,
    /// Ended before it was confirmed.
    Ended,
    Stream,
    Datagrams,
    Closing,
}

impl State {
    fn is_unconfirmed(self) -> bool {
        matches!(self, Self::Opening | Self::NewStream | Self::NewDatagrams | Self::Ended)
    }
}

/// What the oracle knows of a flow.
#[derive(Clone, Copy, Debug)]
struct Known {
    slot: Slot,
    state: State,
    /// When the state was last renewed.
    at: Tick,
    /// Whether an eviction since may have been this flow's.
    in_doubt: bool,
}

impl Known {
    /// How long it is certainly remembered, and when it is certainly forgotten, in milliseconds.
    fn lifetime_ms(&self) -> (u64, u64) {
        let Timeouts { unconfirmed_s, tcp_idle_s, tcp_closing_s, udp_idle_s, .. } =
            Timeouts::default();
        let (seconds, unit_ms) = match self.state {
            State::Opening | State::Ended => (unconfirmed_s, 64),
            State::NewStream | State::Stream => (tcp_idle_s, 65_536),
            State::NewDatagrams | State::Datagrams => (udp_idle_s, 8192),
            State::Closing => (tcp_closing_s, 1024),
        };
        let least = u64::from(seconds) * 1000;
        // Rounded up, one more for the unit begun, and up to one until the next begins. The time of a
        // new flow begins anew when the sweep comes round to it.
        (least, least + 3 * unit_ms + 20_000)
    }

    fn touched(self, traffic: Traffic, now: Tick) -> Self {
        use State::*;
        let at_once = now.ms_since(self.at) < CONFIRMED_AFTER_MS;
        let state = match (self.state, traffic) {
            (Opening | NewStream, Traffic::End) if at_once => return Self { state: Ended, ..self },
            (Opening, _) if at_once => return Self { state: NewStream, ..self },
            (state, _) if at_once && state.is_unconfirmed() => return self,
            (Closing | Ended, _) | (_, Traffic::End) => Closing,
            (_, Traffic::Datagram) => Datagrams,
            _ => Stream,
        };
        Self { state, at: now, ..self }
    }
}

/// Few buckets, and a tag of its own for each flow.
fn hash(flow: u64) -> u64 {
    ((flow + 1) * 0x0101_0101) << 32 | (flow % 5)
}

/// A packet that tells this.
fn packet(traffic: Traffic) -> Flow {
    let (protocol, tcp_flags) = match traffic {
        Traffic::Syn => (protocol::TCP, tcp_flags::SYN),
        Traffic::Stream => (protocol::TCP, tcp_flags::ACK),
        Traffic::End => (protocol::TCP, tcp_flags::FIN | tcp_flags::ACK),
        Traffic::Datagram => (protocol::UDP, 0),
    };
    Flow { protocol, tcp_flags, ..Flow::NONE }
}

struct Oracle {
    connections: Connections,
    known: HashMap<u64, Known>,
    now: Tick,
}

impl Oracle {
    fn find(&self, flow: u64) -> Option<(Slot, Place)> {
        match self.connections.find(hash(flow), self.now, Verdict::Serves) {
            Found::Live(slot, place) => Some((slot, place)),
            Found::Orphan => panic!("nobody said a backend was gone"),
            Found::Nothing => None,
        }
    }

    /// Looks a flow up and holds the answer against what is known.
    fn expect(&self, flow: u64) -> Option<(Slot, Place)> {
        let found = self.find(flow);
        match (found, self.known.get(&flow)) {
            (None, None) => {}
            (Some((slot, _)), None) => panic!("{slot} was never remembered for {flow}"),
            (found, Some(known)) => {
                let (least, most) = known.lifetime_ms();
                let idle = self.now.ms_since(known.at);
                if let Some((slot, _)) = found {
                    assert_eq!(slot, known.slot, "what was remembered last");
                    assert!(idle <= most, "{known:?} should be forgotten after {idle} ms");
                } else {
                    let evictable = known.state.is_unconfirmed() && known.in_doubt;
                    assert!(idle > least || evictable, "{known:?} is lost after {idle} ms");
                }
            }
        }
        found
    }

    /// The short way, if it finds anything, finds what the long one does, and leaves nothing out: there
    /// the packet would have changed nothing.
    fn settled_agrees(&mut self, flow: u64, traffic: Traffic) {
        let settled = Settled::at(self.now);
        let settled = self.connections.settled(hash(flow), &packet(traffic), &settled);
        let Some(slot) = settled else { return };
        let (found, place) = self.find(flow).expect("what is settled is remembered");
        assert_eq!(slot, found);
        self.connections.touch(place, traffic, self.now);
        let (_, touched) = self.find(flow).expect("it was found just now");
        assert_eq!(format!("{place:?}"), format!("{touched:?}"), "{traffic:?} changes something");
    }

    fn remember(&mut self, flow: u64, slot: Slot, traffic: Traffic) {
        match self.connections.remember(hash(flow), slot, traffic, self.now) {
            Remembered::Full => {
                self.known.remove(&flow);
                return;
            }
            Remembered::NotAdmitted => {
                assert!(self.find(flow).is_none(), "what is remembered is renewed in any case");
                self.known.remove(&flow);
                return;
            }
            Remembered::Evicted => {
                // Somebody's place was taken; whose is the table's business, if only unconfirmed.
                for known in self.known.values_mut() {
                    known.in_doubt = true;
                }
            }
            Remembered::Renewed => assert!(self.known.contains_key(&flow)),
            Remembered::Inserted => {}
        }
        let state = match traffic {
            Traffic::Syn => State::Opening,
            Traffic::Stream => State::NewStream,
            Traffic::End => State::Ended,
            Traffic::Datagram => State::NewDatagrams,
        };
        self.known.insert(flow, Known { slot, state, at: self.now, in_doubt: false });
        assert_eq!(self.find(flow).map(|(slot, _)| slot), Some(slot));
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Packet { flow, traffic, slot } => {
                self.settled_agrees(flow, traffic);
                if let Some((_, place)) = self.expect(flow) {
                    self.connections.touch(place, traffic, self.now);
                    let known = self.known.get_mut(&flow).expect("found, so it is known");
                    *known = known.touched(traffic, self.now);
                } else {
                    self.remember(flow, slot, traffic);
                }
            }
            Step::Begin { flow, slot } => {
                // Odd flows are UDP.
                let traffic = if flow % 2 == 1 { Traffic::Datagram } else { Traffic::Syn };
                self.remember(flow, slot, traffic);
            }
            Step::Wait { ms } => {
                // A worker turns at least every 100 ms or so; hours in larger steps, to save time.
                let stride = if ms > 100_000 { 15 * STEP_MS } else { STEP_MS };
                let until = self.now + ms;
                while self.now < until {
                    self.now = self.now + stride;
                    self.connections.sweep(self.now);
                }
            }
        }
    }
}

fn any_step(flows: u64) -> impl Strategy<Value = Step> {
    let slot = 0_u32..1 << 18;
    let packet = (0..flows, slot.clone(), 0..10_u8).prop_map(|(flow, slot, kind)| {
        // Odd flows are UDP.
        let traffic = match kind {
            _ if flow % 2 == 1 => Traffic::Datagram,
            0 => Traffic::End,
            _ => Traffic::Stream,
        };
        Step::Packet { flow, traffic, slot }
    });
    let wait_ms = prop_oneof![
        20 => (1_u64..6).prop_map(|steps| steps * STEP_MS),
        3 => (400_u64..600).prop_map(|steps| steps * STEP_MS), // around the unconfirmed timeout
        2 => (4000_u64..6000).prop_map(|steps| steps * STEP_MS), // around UDP's
        1 => (200_000_u64..240_000).prop_map(|steps| steps * STEP_MS), // around TCP's
    ];
    prop_oneof![
        20 => packet,
        4 => (0..flows, slot).prop_map(|(flow, slot)| Step::Begin { flow, slot }),
        4 => wait_ms.prop_map(|ms| Step::Wait { ms }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_table_remembers_what_a_hash_map_does_and_forgets_only_what_it_may(
        capacity in prop_oneof![Just(16_usize), Just(32), Just(64)],
        admissions_per_s in prop_oneof![Just(u32::MAX), 1_u32..100],
        start_ms in 0_u64..10_000_000,
        steps in any_flows().prop_flat_map(|flows| prop::collection::vec(any_step(flows), 1..300)),
    ) {
        let now = Tick(start_ms / STEP_MS * STEP_MS);
        let mut connections = table(capacity).admitting(admissions_per_s);
        connections.sweep(now);
        let mut oracle = Oracle { connections, known: HashMap::new(), now };
        for step in steps {
            oracle.step(step);
        }
        let flows: Vec<u64> = oracle.known.keys().copied().collect();
        for flow in flows {
            oracle.expect(flow);
        }
        // What control counts is what can be found and has not ended.
        let mut live = 0;
        oracle.connections.reader().for_each(oracle.now, |_| live += 1);
        let ended = |state| matches!(state, State::Closing | State::Ended);
        let counts = |(flow, known): &(&u64, &Known)| {
            oracle.find(**flow).is_some() && !ended(known.state)
        };
        let found = oracle.known.iter().filter(counts).count();
        prop_assert_eq!(live, found);
    }
}

/// From far too few flows for the table to far too many.
fn any_flows() -> impl Strategy<Value = u64> {
    prop_oneof![Just(4_u64), Just(20), Just(100)]
}

#[test]
fn a_reader_on_another_thread_never_sees_half_an_entry() {
    // Every flow's slot follows from its tag, so any other pairing was torn.
    let slot_of =
        |flow: u64| (flow.wrapping_mul(0x9e37_79b9) >> 7) as Slot & (MAX_BACKENDS as Slot - 1);
    const FLOWS: u64 = 200;
    let mut connections = table(64);
    let reader = connections.reader();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = || {
            let mut seen = 0_u32;
            while !done.load(Ordering::Relaxed) {
                for flow in 0..FLOWS {
                    if let Some(slot) = reader.find(hash(flow), Tick(1000), Verdict::Serves) {
                        assert_eq!(slot, slot_of(flow));
                        seen += 1;
                    }
                }
            }
            seen
        };
        let readers = [scope.spawn(watch), scope.spawn(watch)];
        for round in 0..3000 {
            for flow in 0..FLOWS {
                let now = Tick(500 + round % 7 * 64);
                match connections.find(hash(flow), now, Verdict::Serves) {
                    Found::Live(_, place) => connections.touch(place, Traffic::Stream, now),
                    _ => {
                        connections.remember(hash(flow), slot_of(flow), Traffic::Stream, now);
                    }
                }
                if round % 100 == 99 {
                    connections.remember(hash(flow), slot_of(flow), Traffic::Stream, now);
                }
            }
        }
        done.store(true, Ordering::Relaxed);
        for reader in readers {
            assert!(reader.join().unwrap() > 0, "the reader saw something");
        }
    });
}
