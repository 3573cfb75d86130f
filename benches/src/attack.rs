//! The connection table under attack: established connections, a flood of other flows, and backends that
//! come and go meanwhile. Does a connection change its backend, and what does a packet cost?

use dataplane::{counters::Event, forwarding::Slot};

use crate::{
    node::{Node, SECOND_PACKET_MS, Sent, Stateless},
    report::Samples,
    rotation::ROTATION,
    snapshot::{BACKENDS, Backends},
};

/// What the attacker sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flood {
    /// A SYN of each tuple.
    Syns,
    /// An ACK of each tuple.
    Acks,
    /// A SYN of each tuple, and [`SECOND_PACKET_MS`] later an ACK, which confirms it if it is remembered.
    Pairs,
}

impl Flood {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Syns, Self::Acks, Self::Pairs];
}

/// How large it is.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Connections that are established before.
    pub connections: u64,
    /// Tuples of the flood, drawn at random.
    pub tuples: u64,
    /// Packets in a millisecond.
    pub per_ms: usize,
    /// Entries of the connection table.
    pub capacity: usize,
    /// New flows of each kind that are remembered in a second.
    pub admissions_per_s: u32,
    /// Connections that clients open in a second meanwhile.
    pub newcomers_per_s: u64,
}

impl Scale {
    /// A hundred million tuples against a million connections, which half fill the table, at eight million
    /// packets a second; or one part in so many of all that, in the same time.
    pub fn one_in(parts: u64) -> Self {
        let capacity = (2 << 20) / parts.next_power_of_two();
        Self {
            connections: 1_000_000 / parts,
            tuples: 100_000_000 / parts,
            per_ms: (ROTATION as u64 / parts).max(2) as usize,
            capacity: capacity as usize,
            // The default's proportion to the table.
            admissions_per_s: (capacity / 20) as u32,
            newcomers_per_s: 10_000 / parts,
        }
    }
}

/// How many of some connections changed their backend.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Changed {
    /// Of so many.
    pub of: u64,
    /// A packet of theirs went to another backend than the first.
    pub changed: u64,
    /// The same, if nothing were remembered.
    pub by_maglev: u64,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// Connections established before the flood.
    pub established: Changed,
    /// Those opened during the flood, before the backends changed for the last time.
    pub newcomers: Changed,
    /// Nanoseconds per packet of established connections, before the flood.
    pub before: Samples,
    /// The same between two milliseconds of the flood.
    pub between: Samples,
    /// Nanoseconds per packet of the flood; every sixteenth is an established connection's.
    pub flooded: Samples,
    /// Packets of flows remembered, by the flood and newcomers.
    pub inserted: u64,
    /// Packets of flows that were not, because there were too many.
    pub not_admitted: u64,
    /// Those that found confirmed connections only.
    pub no_place: u64,
    /// Entries in use in the end.
    pub live: u64,
}

/// Floods a node while one backend is added and another drained.
pub fn run(flood: Flood, scale: Scale) -> Outcome {
    let mut attack = Attack::new(scale);
    let [mut before, mut between, mut flooded] = <[Samples; 3]>::default();
    for _ in 0..1000 {
        attack.calm_ms(&mut before);
    }
    let events = |attack: &Attack| {
        use Event::{ConnectionInserts, ConnectionNotAdmitted, ConnectionTableFull};
        let events = [ConnectionInserts, ConnectionNotAdmitted, ConnectionTableFull];
        events.map(|event| attack.node.events(event))
    };
    let was = events(&attack);
    let mut tuples = Tuples::new(flood, scale);
    while !tuples.is_over() {
        let thirds = 3 * tuples.sent() / scale.tuples;
        if thirds > attack.stage as u64 && attack.stage < 2 {
            attack.change_backends();
        }
        attack.flood_ms(&mut tuples, &mut flooded);
        if tuples.ms.is_multiple_of(8) {
            attack.calm_ms(&mut between);
        }
    }
    let is = events(&attack);
    let [inserted, not_admitted, no_place] = std::array::from_fn(|event| is[event] - was[event]);
    attack.hear_all();
    let (established, newcomers) = attack.changed();
    let live = attack.node.live();
    Outcome {
        established,
        newcomers,
        before,
        between,
        flooded,
        inserted,
        not_admitted,
        no_place,
        live,
    }
}

/// A connection's backend, how often backends had changed when it opened, and whether it got another.
#[derive(Clone, Copy, Debug)]
struct Known {
    slot: u8,
    stage: usize,
    changed: bool,
}

struct Attack {
    scale: Scale,
    node: Node,
    /// The backends before, with one added, and with another drained.
    stages: [Backends; 3],
    stage: usize,
    /// By a flow's number: established connections, then newcomers in the order in which they open.
    known: Vec<Known>,
    random: fastrand::Rng,
}

impl Attack {
    fn new(scale: Scale) -> Self {
        let first = Backends::new(BACKENDS);
        let added = first.clone().and(BACKENDS);
        let drained = added.clone().drained(0);
        let mut node = Node::new(&first, scale.capacity, scale.admissions_per_s);
        let slots = node.establish(scale.connections, u64::from(scale.admissions_per_s) * 4 / 5);
        node.idle(20_000); // more than a round of the sweep
        Self {
            scale,
            node,
            stages: [first, added, drained],
            stage: 0,
            known: slots.into_iter().map(|slot| Known { slot, stage: 0, changed: false }).collect(),
            random: fastrand::Rng::with_seed(1),
        }
    }

    fn change_backends(&mut self) {
        self.stage += 1;
        self.node.publish(&self.stages[self.stage]);
    }

    fn established(&mut self) -> Sent {
        Sent::Ack(self.random.u64(..self.scale.connections))
    }

    /// A millisecond of established connections' packets.
    fn calm_ms(&mut self, samples: &mut Samples) {
        let packets: Vec<_> = (0..self.scale.per_ms).map(|_| self.established()).collect();
        self.forward(&packets, samples);
    }

    /// One of the flood, established connections, and newcomers.
    fn flood_ms(&mut self, tuples: &mut Tuples, samples: &mut Samples) {
        let mut packets = Vec::with_capacity(2 * self.scale.per_ms);
        self.newcomers(tuples.ms, &mut packets);
        for _ in 0..self.scale.per_ms {
            let established = self.random.u8(..16) == 0;
            packets.extend(if established { Some(self.established()) } else { tuples.next() });
        }
        self.random.shuffle(&mut packets);
        self.forward(&packets, samples);
        tuples.end_ms();
    }

    /// Packets of connections that open during the flood: at 0, 30 and 300 ms, and then every second.
    fn newcomers(&self, ms: u64, packets: &mut Vec<Sent>) {
        let opened = |ms| self.scale.connections + ms * self.scale.newcomers_per_s / 1000;
        packets.extend((opened(ms)..opened(ms + 1)).map(Sent::Syn));
        let delays = [30].into_iter().chain((300..).step_by(1000));
        for at in delays.map_while(|delay| ms.checked_sub(delay)) {
            packets.extend((opened(at)..opened(at + 1)).map(Sent::Ack));
        }
    }

    fn forward(&mut self, packets: &[Sent], samples: &mut Samples) {
        let (known, stage) = (&mut self.known, self.stage);
        let spent = self.node.forward(packets, |sent, slot| note(known, sent, slot, stage));
        samples.add_packets(spent, packets.len());
        self.node.now = self.node.now + 1;
    }

    /// A packet of each connection: some were silent since the backends changed.
    fn hear_all(&mut self) {
        let all: Vec<_> = (0..self.known.len() as u64).map(Sent::Ack).collect();
        for packets in all.chunks(self.scale.per_ms) {
            self.forward(packets, &mut Samples::default());
        }
    }

    /// Of established connections, and of newcomers.
    fn changed(&self) -> (Changed, Changed) {
        let mut stateless = self.stages.each_ref().map(Stateless::new);
        let (mut established, mut newcomers) = <(Changed, Changed)>::default();
        for (flow, known) in (0..).zip(&self.known) {
            let later = &mut stateless[known.stage + 1..];
            if later.is_empty() {
                continue;
            }
            let moves = later.iter_mut().any(|stage| stage.slot_of(flow) != known.slot.into());
            let is_newcomer = flow >= self.scale.connections;
            let counts = if is_newcomer { &mut newcomers } else { &mut established };
            counts.of += 1;
            counts.changed += u64::from(known.changed);
            counts.by_maglev += u64::from(moves);
        }
        (established, newcomers)
    }
}

fn note(known: &mut Vec<Known>, sent: Sent, slot: Slot, stage: usize) {
    let (Sent::Syn(flow) | Sent::Ack(flow)) = sent;
    if flow >= FIRST_TUPLE {
        return;
    }
    let flow = flow as usize;
    if flow >= known.len() {
        // Newcomers of a millisecond come in any order.
        known.resize(flow + 1, Known { slot: 0, stage, changed: false });
    }
    match sent {
        Sent::Syn(_) => known[flow].slot = slot as u8,
        Sent::Ack(_) => known[flow].changed |= u32::from(known[flow].slot) != slot,
    }
}

/// The numbers of the flood's tuples begin here: below are connections and newcomers.
const FIRST_TUPLE: u64 = 1 << 22;

/// The flood, as far as it has come.
struct Tuples {
    flood: Flood,
    all: u64,
    per_ms: u64,
    syns: u64,
    acks: u64,
    ms: u64,
    /// SYNs sent by the end of each millisecond.
    syns_by: Vec<u64>,
}

impl Tuples {
    fn new(flood: Flood, scale: Scale) -> Self {
        assert!(scale.connections < FIRST_TUPLE / 2, "there are numbers for newcomers");
        let (all, per_ms) = (scale.tuples, scale.per_ms as u64);
        Self { flood, all, per_ms, syns: 0, acks: 0, ms: 0, syns_by: Vec::new() }
    }

    fn sent(&self) -> u64 {
        self.syns.max(self.acks)
    }

    fn is_over(&self) -> bool {
        let last = if self.flood == Flood::Syns { self.syns } else { self.acks };
        last == self.all
    }

    fn end_ms(&mut self) {
        self.syns_by.push(self.syns);
        self.ms += 1;
    }

    /// The next packet. `None` while second packets are not due yet.
    fn next(&mut self) -> Option<Sent> {
        // How many of each kind are due by now.
        let then = self.ms.checked_sub(SECOND_PACKET_MS);
        let (syns, acks) = match self.flood {
            Flood::Syns => (self.all, 0),
            Flood::Acks => (0, self.all),
            Flood::Pairs => (
                self.all.min((self.ms + 1) * self.per_ms / 2),
                then.map_or(0, |then| self.syns_by[then as usize]),
            ),
        };
        if self.acks < acks {
            self.acks += 1;
            return Some(Sent::Ack(tuple(self.acks)));
        }
        if self.syns < syns {
            self.syns += 1;
            return Some(Sent::Syn(tuple(self.syns)));
        }
        None
    }
}

/// A number that [`crate::packet::Packet::set_flow`] takes, and no connection has.
fn tuple(index: u64) -> u64 {
    FIRST_TUPLE + fastrand::Rng::with_seed(index).u64(..(1 << 38) - FIRST_TUPLE)
}
