//! A worker on the in-memory port, and the network around it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use dataplane::{
    connections::{Connections, Timeouts},
    counters::Counters,
    flow::HashKey,
    port::{Frame, Pool, sim::SimPort},
    publish::Publisher,
    time::Tick,
    worker::{Parts, Worker},
};

use crate::{
    case::{Case, Flows},
    memory::{self, Pages},
    packet::{Packet, Transport},
    snapshot,
};

/// Packets of one rotation: all are in their frames before the first of them is handled, so that each
/// frame has gone cold.
pub const ROTATION: usize = 8192;

/// Frames of the worker: a rotation, and what is on its way back meanwhile.
const FRAMES: usize = ROTATION + 256;

/// As the daemon has them.
pub const CHUNK_BYTES: usize = 2048;

const RING: usize = 2 * ROTATION;

/// A worker with all that it needs, and the next packets for it.
pub struct Rig {
    worker: Worker<SimPort>,
    packet: Packet,
    case: Case,
    random: fastrand::Rng,
    new_flows: u64,
    now: Tick,
    /// What the table and the frames came to lie on.
    pub pages: [Pages; 2],
    // Holds the snapshot.
    _publisher: Publisher<dataplane::forwarding::Forwarding>,
}

impl Rig {
    /// A worker whose connection table knows the case's flows.
    ///
    /// # Panics
    /// If there is no memory for it.
    pub fn new(case: &Case) -> Self {
        let timeouts = Timeouts { unconfirmed_s: 10, ..Timeouts::default() };
        let connections =
            Connections::new(case.capacity(), &timeouts).expect("there is memory for a table");
        let table_pages = if connections.huge_pages() { Pages::Huge } else { Pages::Advised };
        let (pool, frame_pages) = pool();
        let mut publisher =
            Publisher::new(Arc::new(snapshot::forwarding(case.family, case.underlay)));
        let worker = Worker::new(Parts {
            ports: vec![SimPort::new(FRAMES, RING)],
            links: vec![0],
            pool,
            connections,
            peers: Vec::new(),
            published: publisher.subscribe(),
            counters: Arc::new(Counters::new(snapshot::BACKENDS as usize)),
            hash_key: HashKey::random(),
            icmp_errors_per_s: 100,
        });
        worker.prepare();
        let transport = match case.flows {
            Flows::Established(_) => Transport::Tcp,
            Flows::New | Flows::Flood => Transport::TcpSyn,
        };
        let mut rig = Self {
            worker,
            packet: Packet::new(case.family, transport, case.frame_bytes),
            case: case.clone(),
            random: fastrand::Rng::with_seed(1),
            new_flows: 0,
            now: Tick::from_s(1),
            pages: [table_pages, frame_pages],
            _publisher: publisher,
        };
        rig.establish();
        rig
    }

    /// Two packets of each flow, far enough apart in time for the second to confirm it.
    fn establish(&mut self) {
        self.worker.turn(self.now); // fills the fill ring
        let burst = self.case.burst as u64;
        let flows = self.case.established().next_multiple_of(burst);
        for _ in 0..2 {
            for first in (0..flows).step_by(self.case.burst) {
                for number in first..first + burst {
                    self.packet.set_flow(number % self.case.established());
                    assert!(self.worker.ports_mut()[0].deliver(self.packet.bytes()));
                }
                assert_eq!(self.turn(), self.case.burst);
                self.complete();
            }
            self.now = self.now + 1000;
        }
    }

    /// Handles [`ROTATION`] packets, and tells how long all its turns took. Each turn's time includes one
    /// reading of the clock, as a polling loop's does; delivering packets and taking them off the
    /// tx ring is the network's business and not timed.
    ///
    /// # Panics
    /// If a packet was not forwarded.
    pub fn rotation(&mut self) -> Duration {
        for _ in 0..ROTATION {
            let number = self.next_flow();
            self.packet.set_flow(number);
            assert!(self.worker.ports_mut()[0].deliver(self.packet.bytes()), "there is room");
        }
        self.worker.ports_mut()[0].receive_at_most(self.case.burst);
        let mut spent = Duration::ZERO;
        for _ in 0..ROTATION / self.case.burst {
            let start = Instant::now();
            let handled = self.turn();
            spent += start.elapsed();
            assert_eq!(handled, self.case.burst);
            self.complete();
        }
        // Eight million packets a second; or as few as the table has room for.
        let passed_ms = if self.case.flows == Flows::New { 100 } else { 1 };
        self.now = self.now + passed_ms;
        spent
    }

    /// What is timed, under a name that profilers find.
    #[inline(never)]
    fn turn(&mut self) -> usize {
        self.worker.turn(self.now)
    }

    /// The network takes what was sent.
    fn complete(&mut self) {
        let port = &mut self.worker.ports_mut()[0];
        for _ in 0..self.case.burst {
            assert!(port.take_sent(|_| ()).is_some(), "every packet was forwarded");
        }
    }

    fn next_flow(&mut self) -> u64 {
        match self.case.flows {
            Flows::Established(flows) => self.random.u64(..flows),
            Flows::New | Flows::Flood => {
                self.new_flows += 1;
                self.new_flows
            }
        }
    }
}

/// Frames as `sim::pool` makes them, but on huge pages, as the UMEM of a real port is.
fn pool() -> (Pool, Pages) {
    let (memory, pages) = memory::leak(FRAMES * CHUNK_BYTES);
    let chunks = memory.chunks_exact_mut(CHUNK_BYTES);
    let frames = (0..).zip(chunks).map(|(index, chunk)| Frame::new(index, chunk));
    (Pool::new(frames.collect()), pages)
}
