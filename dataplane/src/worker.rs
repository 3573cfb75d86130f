//! One worker: its ports, its pool, its connections. [`Worker::turn`] is the only place that orders the
//! stages of a packet's way: receive → parse → select → encapsulate → transmit.
//!
//! Nothing here blocks, allocates, logs or fails (I7). Every frame leaves by exactly one door: an outbound
//! burst, or the pool with a counted reason (I1).

use arrayvec::ArrayVec;

use crate::{
    connections::{Connections, Reader},
    counters::{Counters, DropReason, Event},
    encap,
    flow::{Flow, HashKey, Kind},
    forwarding::{Backend, Forwarding, Link},
    fragment, parse,
    port::{BURST, Frame, Inbound, Outbound, Pool, Port},
    publish::Subscriber,
    reply::{self, RateLimit},
    select::{self, Context},
    sync::Arc,
    time::Tick,
};

/// What a worker is made of.
#[derive(Debug)]
pub struct Parts<P> {
    /// One queue of every interface, in the order of [`Forwarding::link`].
    pub ports: Vec<P>,
    /// Which interface each port belongs to, as an index into [`Forwarding::link`].
    pub links: Vec<usize>,
    /// All its frames.
    pub pool: Pool,
    /// Its own connection table.
    pub connections: Connections,
    /// The tables of the other workers.
    pub peers: Vec<Reader>,
    /// Where snapshots come from.
    pub published: Subscriber<Forwarding>,
    /// What it counts in.
    pub counters: Arc<Counters>,
    /// What all connection tables hash flows with.
    pub hash_key: HashKey,
    /// ICMP errors it may send in a second.
    pub icmp_errors_per_s: u32,
}

/// One polling thread's whole state.
#[derive(Debug)]
pub struct Worker<P> {
    ports: Vec<P>,
    links: Vec<usize>,
    /// Which port a packet for an interface leaves by, by link index.
    egress: Vec<Option<usize>>,
    pool: Pool,
    connections: Connections,
    peers: Vec<Reader>,
    published: Subscriber<Forwarding>,
    counters: Arc<Counters>,
    hash_key: HashKey,
    icmp_limit: RateLimit,
    inbound: Inbound,
    outbound: Vec<Outbound>,
}

impl<P: Port> Worker<P> {
    /// A worker that has done nothing yet.
    ///
    /// # Panics
    /// If a port belongs to no interface.
    pub fn new(parts: Parts<P>) -> Self {
        assert_eq!(parts.ports.len(), parts.links.len(), "every port belongs to an interface");
        let interfaces = parts.links.iter().max().map_or(0, |most| most + 1);
        let first_port = |link| parts.links.iter().position(|&l| l == link);
        Self {
            egress: (0..interfaces).map(first_port).collect(),
            outbound: parts.ports.iter().map(|_| Outbound::new()).collect(),
            icmp_limit: RateLimit::new(parts.icmp_errors_per_s),
            inbound: Inbound::new(),
            ports: parts.ports,
            links: parts.links,
            pool: parts.pool,
            connections: parts.connections,
            peers: parts.peers,
            published: parts.published,
            counters: parts.counters,
            hash_key: parts.hash_key,
        }
    }

    /// To be called once on the worker's own thread, before its first turn: what must be allocated.
    pub fn prepare(&self) {
        self.published.prepare();
    }

    /// One burst in from every port, and out. Returns how many packets came in.
    #[inline]
    pub fn turn(&mut self, now: Tick) -> usize {
        let mut received = 0;
        for port in 0..self.ports.len() {
            self.ports[port].reclaim(&mut self.pool); //     completion ring → pool
            self.ports[port].receive(&mut self.inbound); //  rx ring → inbound
            self.ports[port].refill(&mut self.pool); //      pool → fill ring
            if !self.inbound.is_empty() {
                received += self.inbound.len();
                self.forward(port, now);
                self.transmit();
            }
        }
        self.connections.sweep(now);
        // An idle worker, too, must let go of what is old.
        self.published.load();
        // Control may now free every older snapshot; a worker never frees one (I3).
        self.published.acknowledge();
        self.counters.turned();
        received
    }

    /// inbound → outbound, or the pool.
    #[inline]
    fn forward(&mut self, port: usize, now: Tick) {
        // One snapshot per burst: all its packets see the same VIPs and backends (I2).
        let forwarding: &Forwarding = self.published.load();
        let link = forwarding.link(self.links[port]);
        for frame in &self.inbound {
            frame.prefetch();
        }

        // Parse all before deciding any, so that the connection table's cache misses overlap.
        let mut flows: ArrayVec<Result<Flow, DropReason>, BURST> = ArrayVec::new();
        let mut rx_bytes = 0;
        for frame in &self.inbound {
            rx_bytes += frame.len() as u64;
            flows.push(parse::flow(frame.packet()));
        }
        // A loop of its own: in one with parsing, flows are copied while still being written, 2 ns a packet.
        let mut hashes = [0; BURST];
        for (hash, flow) in hashes.iter_mut().zip(&flows) {
            if let Ok(flow) = flow {
                *hash = flow.key.hash(&self.hash_key);
                self.connections.prefetch(*hash);
            }
        }
        self.counters.count(Event::RxPackets, flows.len() as u64);
        self.counters.count(Event::RxBytes, rx_bytes);

        let mut burst = Burst {
            forwarding,
            link,
            ingress: port,
            egress: &self.egress,
            context: Context {
                connections: &mut self.connections,
                peers: &self.peers,
                counters: &self.counters,
                now,
            },
            pool: &mut self.pool,
            outbound: &mut self.outbound,
            icmp_limit: &mut self.icmp_limit,
        };
        for ((mut frame, flow), hash) in self.inbound.drain(..).zip(&flows).zip(&hashes) {
            let egress = match flow {
                Ok(flow) => burst.handle(&mut frame, flow, *hash),
                Err(reason) => Err(*reason),
            };
            match egress {
                Ok(egress) => burst.send(frame, egress),
                Err(reason) => burst.discard(frame, reason),
            }
        }
    }

    /// outbound → tx rings; what they have no room for is dropped.
    #[inline]
    fn transmit(&mut self) {
        for (port, outbound) in self.ports.iter_mut().zip(&mut self.outbound) {
            if outbound.is_empty() {
                continue;
            }
            let mut packets = outbound.len() as u64;
            let mut bytes: u64 = outbound.iter().map(|frame| frame.len() as u64).sum();
            port.transmit(outbound);
            for frame in outbound.drain(..) {
                packets -= 1;
                bytes -= frame.len() as u64;
                self.counters.dropped(DropReason::TxRingFull);
                self.pool.put(frame);
            }
            self.counters.count(Event::TxPackets, packets);
            self.counters.count(Event::TxBytes, bytes);
        }
    }

    /// Frames handed over for transmission that have not come back: no reason to sleep while there are.
    pub fn in_flight(&self) -> usize {
        self.ports.iter().map(Port::in_flight).sum()
    }

    /// All frames, wherever they are. Never changes (I1).
    pub fn frames(&self) -> usize {
        let outbound: usize = self.outbound.iter().map(|outbound| outbound.len()).sum();
        let held: usize = self.ports.iter().map(Port::held).sum();
        self.pool.len() + held + self.inbound.len() + outbound
    }

    /// Its ports, to sleep on.
    pub fn ports(&self) -> &[P] {
        &self.ports
    }

    /// Its ports, for those who play the network on an in-memory one.
    pub fn ports_mut(&mut self) -> &mut [P] {
        &mut self.ports
    }
}

/// What one burst is handled with.
struct Burst<'a> {
    forwarding: &'a Forwarding,
    link: Link,
    ingress: usize,
    egress: &'a [Option<usize>],
    context: Context<'a>,
    pool: &'a mut Pool,
    outbound: &'a mut [Outbound],
    icmp_limit: &'a mut RateLimit,
}

impl Burst<'_> {
    /// Makes of the frame what is to leave, and says by which port.
    #[inline]
    fn handle(&mut self, frame: &mut Frame, flow: &Flow, hash: u64) -> Result<usize, DropReason> {
        if !self.link.accepts(frame.packet(), flow.kind) {
            return Err(DropReason::NotForUs);
        }
        match flow.kind {
            Kind::Packet | Kind::IcmpError => self.tunnel(frame, flow, hash),
            Kind::Echo | Kind::Arp | Kind::NeighbourSolicitation => self.answer(frame, flow),
        }
    }

    /// Sends the packet to its backend.
    #[inline]
    fn tunnel(&mut self, frame: &mut Frame, flow: &Flow, hash: u64) -> Result<usize, DropReason> {
        let selected = select::select(flow, hash, self.forwarding, &mut self.context)?;
        let backend = selected.backend;
        if !backend.reachable {
            return Err(DropReason::NextHopUnresolved);
        }
        let egress = self.egress.get(usize::from(backend.link)).copied().flatten();
        let egress = egress.ok_or(DropReason::NextHopUnresolved)?;
        if self.link.partial_checksums && encap::complete_checksum(frame.packet_mut(), flow) {
            self.context.counters.count(Event::ChecksumsCompleted, 1);
        }
        if flow.kind == Kind::IcmpError {
            self.context.counters.count(Event::IcmpErrorsForwarded, 1);
        }
        if flow.ip_len > backend.mtu {
            return self.too_big(frame, flow, hash, selected.slot, backend, egress);
        }
        encap::vxlan(frame, flow, &backend.template, hash)?;
        self.context.counters.forwarded(selected.slot as usize, frame.len());
        Ok(egress)
    }

    /// The packet does not fit the way to its backend: it is cut if it may be, else its sender is told.
    /// Silence would be a black hole.
    #[cold]
    fn too_big(
        &mut self,
        frame: &mut Frame,
        flow: &Flow,
        hash: u64,
        slot: u32,
        backend: &Backend,
        egress: usize,
    ) -> Result<usize, DropReason> {
        let Self { context, pool, outbound, .. } = self;
        if fragment::can_cut(flow, backend.mtu) {
            let outbound = &mut outbound[egress];
            let each = |mut piece: Frame, flow: Flow, pool: &mut Pool| match encap::vxlan(
                &mut piece,
                &flow,
                &backend.template,
                hash,
            ) {
                Ok(()) => {
                    context.counters.forwarded(slot as usize, piece.len());
                    push(outbound, piece, pool, context.counters);
                }
                Err(reason) => drop_frame(piece, reason, pool, context.counters),
            };
            let last = fragment::cut(frame, flow, backend.mtu, pool, each);
            let last = last.ok_or(DropReason::NoFrame)?;
            context.counters.count(Event::Fragmented, 1);
            encap::vxlan(frame, &last, &backend.template, hash)?;
            context.counters.forwarded(slot as usize, frame.len());
            return Ok(egress);
        }
        // Never an error about an error, RFC 1122 section 3.2.2.
        let tell = flow.kind != Kind::IcmpError && can_be_answered(flow);
        if !tell || !self.icmp_limit.take(self.context.now) {
            return Err(DropReason::TooBigSilent);
        }
        reply::too_big(frame, flow, self.link.mac, backend.mtu)?;
        self.context.counters.dropped(DropReason::TooBig);
        self.context.counters.count(Event::TooBigSent, 1);
        Ok(self.ingress)
    }

    /// Answers for the VIP.
    #[cold]
    fn answer(&mut self, frame: &mut Frame, flow: &Flow) -> Result<usize, DropReason> {
        let own = self.link.mac;
        let is_vip = self.forwarding.is_vip(flow.key.dst);
        let owner = is_vip && self.forwarding.answer_arp();
        let event = match flow.kind {
            Kind::Echo if is_vip && can_be_answered(flow) => {
                reply::echo(frame, flow, own);
                Event::EchoReplies
            }
            Kind::Arp if owner => {
                reply::arp(frame, flow, own)?;
                Event::NeighbourReplies
            }
            Kind::NeighbourSolicitation if owner => {
                reply::neighbour(frame, flow, own)?;
                Event::NeighbourReplies
            }
            Kind::Arp => return Err(DropReason::NotIp),
            Kind::NeighbourSolicitation => return Err(DropReason::UnknownProtocol),
            _ => return Err(DropReason::NoService),
        };
        self.context.counters.count(event, 1);
        Ok(self.ingress)
    }

    #[inline]
    fn send(&mut self, frame: Frame, egress: usize) {
        push(&mut self.outbound[egress], frame, self.pool, self.context.counters);
    }

    #[inline]
    fn discard(&mut self, frame: Frame, reason: DropReason) {
        drop_frame(frame, reason, self.pool, self.context.counters);
    }
}

/// Whether the packet's source is a host that an answer can be sent to.
fn can_be_answered(flow: &Flow) -> bool {
    flow.key.src.is_host() && flow.key.src != flow.key.dst
}

#[inline]
fn push(outbound: &mut Outbound, frame: Frame, pool: &mut Pool, counters: &Counters) {
    if let Err(full) = outbound.try_push(frame) {
        drop_frame(full.element(), DropReason::TxRingFull, pool, counters);
    }
}

#[inline]
fn drop_frame(frame: Frame, reason: DropReason, pool: &mut Pool, counters: &Counters) {
    counters.dropped(reason);
    pool.put(frame);
}
