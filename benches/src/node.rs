//! A node in simulated time, that packets of any flows are sent through: which backend each goes to, and
//! how long that takes.
//!
//! The whole worker on the in-memory port, as in [`crate::rig`]. Backends are known by what leaves.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use dataplane::{
    connections::{Connections, Reader, Timeouts},
    counters::{Counters, Event},
    forwarding::{Forwarding, Slot},
    parse,
    port::sim::SimPort,
    publish::Publisher,
    time::Tick,
    worker::Worker,
};

use crate::{
    packet::{Family, Packet, SMALL, Transport},
    rig,
    rotation::ROTATION,
    snapshot::{self, Backends, Underlay},
};

/// A confirmed connection's second packet comes this long after its first.
pub const SECOND_PACKET_MS: u64 = 200;

/// A client's packet.
#[derive(Clone, Copy, Debug)]
pub enum Sent {
    /// Opens the connection.
    Syn(u64),
    /// Goes on with it.
    Ack(u64),
}

/// What Maglev alone would do: a table of no size.
#[derive(Debug)]
pub struct Stateless {
    forwarding: Forwarding,
    packet: Packet,
}

impl Stateless {
    /// With these backends.
    pub fn new(backends: &Backends) -> Self {
        Self { forwarding: forwarding(backends), packet: packet(Transport::Tcp) }
    }

    /// The backend that a connection's packet goes to.
    ///
    /// # Panics
    /// Never: packets are whole and there are backends.
    pub fn slot_of(&mut self, flow: u64) -> Slot {
        self.packet.set_flow(flow);
        let key = parse::flow(self.packet.bytes()).expect("the packet is whole").key;
        let service = self.forwarding.service(0).expect("there is a service");
        service.maglev.pick(key.hash(self.forwarding.maglev_key())).expect("there are backends")
    }
}

fn forwarding(backends: &Backends) -> Forwarding {
    snapshot::forwarding_to(backends, Family::V4, Underlay::V4)
}

fn packet(transport: Transport) -> Packet {
    Packet::new(Family::V4, transport, SMALL)
}

/// The node.
pub struct Node {
    worker: Worker<SimPort>,
    counters: Arc<Counters>,
    connections: Reader,
    publisher: Publisher<Forwarding>,
    syn: Packet,
    ack: Packet,
    /// Simulated time. Goes on only when told to.
    pub now: Tick,
}

impl Node {
    /// A node with a table of so many entries that admits so many new flows of each kind in a second.
    ///
    /// # Panics
    /// If there is no memory for it.
    pub fn new(backends: &Backends, capacity: usize, admissions_per_s: u32) -> Self {
        let mut publisher = Publisher::new(Arc::new(forwarding(backends)));
        let table = Connections::new(capacity, &Timeouts::default());
        let table = table.expect("there is memory for a table").admitting(admissions_per_s);
        let connections = table.reader();
        let (pool, _) = rig::pool();
        let (worker, counters) = rig::worker(table, Vec::new(), publisher.subscribe(), pool, None);
        let mut node = Self {
            worker,
            counters,
            connections,
            publisher,
            syn: packet(Transport::TcpSyn),
            ack: packet(Transport::Tcp),
            now: Tick::from_s(1),
        };
        node.worker.turn(node.now); // fills the fill ring
        node
    }

    /// Gives it other backends, from its next turn on.
    pub fn publish(&mut self, backends: &Backends) {
        self.publisher.publish(Arc::new(forwarding(backends)));
    }

    /// Nothing happens for so long; it sleeps as a worker does.
    pub fn idle(&mut self, ms: u64) {
        for _ in 0..ms / 100 {
            self.now = self.now + 100;
            self.worker.turn(self.now);
        }
    }

    /// Forwards packets that all come now, and tells which backend each went to. Returns how long the
    /// turns took, each with one reading of the clock.
    ///
    /// # Panics
    /// If one is not forwarded.
    pub fn forward(&mut self, packets: &[Sent], mut each: impl FnMut(Sent, Slot)) -> Duration {
        let mut spent = Duration::ZERO;
        for packets in packets.chunks(ROTATION) {
            for &sent in packets {
                let (packet, flow) = match sent {
                    Sent::Syn(flow) => (&mut self.syn, flow),
                    Sent::Ack(flow) => (&mut self.ack, flow),
                };
                packet.set_flow(flow);
                assert!(self.worker.ports_mut()[0].deliver(packet.bytes()), "there is room");
            }
            let mut packets = packets.iter();
            while !packets.as_slice().is_empty() {
                let start = Instant::now();
                let handled = self.worker.turn(self.now);
                spent += start.elapsed();
                for &sent in packets.by_ref().take(handled) {
                    let slot = self.worker.ports_mut()[0].take_sent(snapshot::slot_of);
                    each(sent, slot.expect("every packet was forwarded, in order"));
                }
            }
        }
        spent
    }

    /// Opens connections numbered from 0, so many a second, each confirmed by a second packet. Returns
    /// their backends.
    ///
    /// # Panics
    /// If a second packet goes elsewhere than the first, with the same backends.
    pub fn establish(&mut self, connections: u64, per_s: u64) -> Vec<u8> {
        let mut slots = vec![0; connections as usize];
        let opened = |ms: u64| (ms * per_s / 1000).min(connections);
        let mut packets = Vec::new();
        let mut ms = 0_u64;
        while opened(ms.saturating_sub(SECOND_PACKET_MS)) < connections {
            let second = ms.saturating_sub(SECOND_PACKET_MS);
            packets.clear();
            packets.extend((opened(ms)..opened(ms + 1)).map(Sent::Syn));
            if ms >= SECOND_PACKET_MS {
                packets.extend((opened(second)..opened(second + 1)).map(Sent::Ack));
            }
            self.forward(&packets, |sent, slot| match sent {
                Sent::Syn(flow) => slots[flow as usize] = slot as u8,
                Sent::Ack(flow) => assert_eq!(slots[flow as usize], slot as u8),
            });
            self.now = self.now + 1;
            ms += 1;
        }
        slots
    }

    /// Entries of its table that are in use.
    pub fn live(&self) -> u64 {
        let mut live = 0;
        self.connections.for_each(self.now, |_| live += 1);
        live
    }

    /// How often this happened.
    pub fn events(&self, event: Event) -> u64 {
        self.counters.events(event)
    }
}
