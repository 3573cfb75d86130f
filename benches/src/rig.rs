//! A worker on the in-memory port, and the network around it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use dataplane::{
    connections::{Connections, Reader, Timeouts},
    counters::{Counters, Event},
    flow::HashKey,
    forwarding::Forwarding,
    nat::{self, Side, Slots},
    port::{Frame, Pool, sim::SimPort},
    publish::{Publisher, Subscriber},
    time::Tick,
    worker::{Parts, Worker},
};

use crate::{
    answer::{Answers, Arriving},
    case::{BURSTS, Case, Flows},
    floor::Floor,
    memory::Resident,
    packet::{Packet, Transport},
    rotation::{FRAMES, ROTATION, Rotate, chunks},
    snapshot::{self, Backends},
};

const RING: usize = 2 * ROTATION;

/// Bytes of an entry of the connection table: one word.
const ENTRY_BYTES: usize = size_of::<u64>();

/// How long a flow of which only a SYN was seen is remembered.
const UNCONFIRMED_S: u32 = 10;

/// New flows that are remembered in a second, where there is a limit: the daemon's default.
const ADMISSIONS_PER_S: u32 = 50_000;

/// A worker with all that it needs, and the next packets for it.
pub struct Rig {
    worker: Worker<SimPort>,
    counters: Arc<Counters>,
    arriving: Arriving,
    case: Case,
    random: fastrand::Rng,
    new_flows: u64,
    now: Tick,
    handled: u64,
    hits: u64,
    /// The connection table's size in bytes.
    pub table_bytes: usize,
    /// What memory the process came to have for the connection table.
    pub table: Resident,
    /// What memory it came to have for the frames.
    pub frames: Resident,
    // Holds the snapshot.
    publisher: Arc<Publisher<Forwarding>>,
}

impl Rig {
    /// A worker whose connection table knows the case's flows.
    ///
    /// # Panics
    /// If there is no memory for it.
    pub fn new(case: &Case) -> Self {
        let [rig] = Self::crew(case);
        rig
    }

    /// Several of them as one daemon has them: they share a snapshot, and each may read the others' tables.
    ///
    /// # Panics
    /// If there is no memory for them.
    pub fn crew<const WORKERS: usize>(case: &Case) -> [Self; WORKERS] {
        let slots = case.nat.map(|_| {
            // No other connection is in time: it stands still in many rotations.
            let timeouts = nat::Timeouts { opening_s: 14_400, ..nat::Timeouts::default() };
            let slots = Slots::new(nat::MAX_BANKS, timeouts, 1024..=65_535);
            Arc::new(slots.expect("there is memory for the slots"))
        });
        let snapshot = match slots {
            Some(_) => snapshot::translated(&Backends::new(snapshot::BACKENDS)),
            None => snapshot::forwarding(case.family, case.underlay),
        };
        let mut publisher = Publisher::new(Arc::new(snapshot));
        let timeouts = Timeouts { unconfirmed_s: UNCONFIRMED_S, ..Timeouts::default() };
        let tables: [_; WORKERS] = std::array::from_fn(|_| {
            let before = Resident::now();
            let table = Connections::new(case.capacity, &timeouts);
            let mut table = table.expect("there is memory for a table");
            if case.flows == Flows::Refused {
                table = table.admitting(ADMISSIONS_PER_S);
            }
            (table, Resident::now() - before, publisher.subscribe())
        });
        let readers: Vec<Reader> = tables.iter().map(|(table, ..)| table.reader()).collect();
        let publisher = Arc::new(publisher);
        let mut own = 0;
        let packet = |transport| Packet::new(case.family, transport, case.frame_bytes);
        let first = if case.nat.is_some() { Transport::TcpSyn } else { case.transport };
        tables.map(|(connections, resident, published)| {
            let mut peers = readers.clone();
            peers.remove(own);
            own += 1;
            let table_bytes = match &slots {
                Some(slots) => slots.bytes(),
                None => connections.capacity() * ENTRY_BYTES,
            };
            let (pool, frames) = pool();
            let (worker, counters) = worker(connections, peers, published, pool, slots.clone());
            let mut rig = Self {
                worker,
                counters,
                arriving: Arriving::Packet(packet(first)),
                case: case.clone(),
                random: fastrand::Rng::with_seed(1),
                new_flows: 0,
                now: Tick::from_s(1),
                handled: 0,
                hits: 0,
                table_bytes,
                table: resident,
                frames,
                publisher: Arc::clone(&publisher),
            };
            rig.worker.turn(rig.now); // fills the fill ring
            rig.establish();
            rig.arriving = match (case.nat, &slots) {
                (Some(Side::Task), Some(slots)) => {
                    Arriving::Answers(Answers::new(slots, case.frame_bytes))
                }
                _ => Arriving::Packet(packet(case.transport)),
            };
            rig.fill();
            rig
        })
    }

    /// Gives the worker another snapshot from its next burst on, and frees those it has done with.
    ///
    /// # Panics
    /// If it is one of several workers.
    pub fn publish(&mut self, snapshot: Arc<Forwarding>) {
        let publisher = Arc::get_mut(&mut self.publisher).expect("it is the only worker");
        publisher.retire();
        publisher.publish(snapshot);
    }

    /// The floor of this worker, of the same footprint.
    pub fn floor(&self) -> Floor {
        Floor::new(self.table_bytes, self.arriving.bytes().len())
    }

    /// Two packets of each flow, far enough apart in time for the second to confirm it, if it is to.
    fn establish(&mut self) {
        let burst = BURSTS[0] as u64;
        let flows = self.case.established();
        let (packets, apart_ms) = match self.case.flows {
            _ if self.case.nat.is_some() => (1, 0),
            Flows::Young(_) => (1, 0),
            _ => (2, 1000),
        };
        for _ in 0..packets {
            for first in (0..flows).step_by(BURSTS[0]) {
                for number in first..first + burst {
                    self.deliver(number % flows);
                }
                assert_eq!(self.turn(), BURSTS[0]);
                self.complete(BURSTS[0]);
            }
            self.now = self.now + apart_ms;
        }
    }

    /// Twice as many new flows as there are entries, so that the table is as full as it will be.
    fn fill(&mut self) {
        if self.case.established() == 0 {
            for _ in 0..2 * self.case.capacity / ROTATION {
                self.refill();
                self.forward(BURSTS[0]);
            }
        }
    }

    /// [`Rotate::handle`], whatever becomes of the packets.
    fn forward(&mut self, burst: usize) -> Duration {
        self.worker.ports_mut()[0].receive_at_most(burst);
        let mut spent = Duration::ZERO;
        for _ in 0..ROTATION / burst {
            let start = Instant::now();
            let handled = self.turn();
            spent += start.elapsed();
            assert_eq!(handled, burst);
            self.complete(burst);
        }
        self.now = self.now + self.rotation_ms();
        spent
    }

    /// How long a rotation is for the connection table: as with eight million packets a second; or so long
    /// that new flows, until they are forgotten, fill two fifths of the table. Young ones stay young: time
    /// stands still, and so does the sweep.
    fn rotation_ms(&self) -> u64 {
        match self.case.flows {
            Flows::New => {
                ROTATION as u64 * u64::from(UNCONFIRMED_S) * 2500 / self.case.capacity as u64
            }
            Flows::Young(_) => 0,
            Flows::Established(_) | Flows::Flood | Flows::Refused => 1,
        }
    }

    /// The network brings a packet of this flow.
    fn deliver(&mut self, flow: u64) {
        self.arriving.set_flow(flow);
        assert!(self.worker.ports_mut()[0].deliver(self.arriving.bytes()), "there is room");
    }

    /// What is timed, under a name that profilers find.
    #[inline(never)]
    fn turn(&mut self) -> usize {
        self.worker.turn(self.now)
    }

    /// The network takes what was sent.
    fn complete(&mut self, burst: usize) {
        let port = &mut self.worker.ports_mut()[0];
        for _ in 0..burst {
            assert!(port.take_sent(|_| ()).is_some(), "every packet was forwarded");
        }
    }

    fn next_flow(&mut self) -> u64 {
        match self.case.flows {
            Flows::Established(flows) | Flows::Young(flows) => self.random.u64(..flows),
            Flows::New | Flows::Flood | Flows::Refused => {
                self.new_flows += 1;
                self.new_flows
            }
        }
    }

    /// A figure is worth nothing if the packets were others than the case says.
    fn check(&mut self, before: [u64; 4]) {
        let after = events(&self.counters);
        let [hits, inserts, evictions, refused] =
            std::array::from_fn(|event| after[event] - before[event]);
        let all = ROTATION as u64;
        // 0.02 % of ten million flows find no place. A new one evicts another from its own bucket rather than
        // go to its second, and a few buckets have room even in a flood.
        let (nearly, few) = (all - all / 200, all / 20);
        let right = match self.case.flows {
            Flows::Established(_) | Flows::Young(_) => hits >= nearly,
            Flows::New => inserts >= nearly && evictions <= few,
            Flows::Flood => inserts >= nearly && evictions >= all - few,
            Flows::Refused => refused >= all - few,
        };
        let name = self.case.name;
        assert!(
            right,
            "{name}: {hits} hits, {inserts} inserts, {evictions} evictions, {refused} refused"
        );
        self.handled += all;
        self.hits += hits;
    }

    /// The share of packets whose connection was remembered, of all that were timed.
    pub fn hit_share(&self) -> f64 {
        self.hits as f64 / self.handled as f64
    }
}

/// Packets of remembered connections, connections remembered, those forgotten for them, and those that were
/// not remembered because they were too many.
fn events(counters: &Counters) -> [u64; 4] {
    let [hits, replies, others @ ..] = [
        Event::ConnectionHits,
        Event::NatReplies,
        Event::ConnectionInserts,
        Event::ConnectionEvictions,
        Event::ConnectionNotAdmitted,
    ]
    .map(|event| counters.events(event));
    let [inserts, evictions, refused] = others;
    [hits + replies, inserts, evictions, refused]
}

impl Rotate for Rig {
    /// # Panics
    /// If there was no frame for a packet.
    fn refill(&mut self) {
        for _ in 0..ROTATION {
            let flow = self.next_flow();
            self.deliver(flow);
        }
    }

    /// Delivering packets and taking them off the tx ring is the network's business and not timed.
    ///
    /// # Panics
    /// If a packet was not forwarded, or not in the way that the case is about.
    fn handle(&mut self, burst: usize) -> Duration {
        let before = events(&self.counters);
        let spent = self.forward(burst);
        self.check(before);
        spent
    }
}

/// A worker, and what it counts in.
pub(crate) fn worker(
    connections: Connections,
    peers: Vec<Reader>,
    published: Subscriber<Forwarding>,
    pool: Pool,
    nat: Option<Arc<Slots>>,
) -> (Worker<SimPort>, Arc<Counters>) {
    let counters = Arc::new(Counters::new(snapshot::BACKENDS as usize));
    let worker = Worker::new(Parts {
        ports: vec![SimPort::new(FRAMES, RING)],
        links: vec![0],
        pool,
        connections,
        peers,
        published,
        counters: Arc::clone(&counters),
        // The same in every run, so that instructions can be counted.
        hash_key: HashKey::from_seed("connections"),
        icmp_errors_per_s: 100,
        id: 0,
        nat,
    });
    worker.prepare();
    (worker, counters)
}

/// All frames, and what memory the process came to have for them.
pub(crate) fn pool() -> (Pool, Resident) {
    let before = Resident::now();
    let frames = (0..).zip(chunks()).map(|(index, chunk)| Frame::new(index, chunk));
    let pool = Pool::new(frames.collect());
    (pool, Resident::now() - before)
}
