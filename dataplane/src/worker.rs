//! One worker: its ports, its pool, its connections. [`Worker::turn`] is the only place that orders the
//! stages of a packet's way: receive → parse → select → encapsulate → transmit.
//!
//! Nothing here blocks, allocates, logs or fails (I7). Every frame leaves by exactly one door: an outbound
//! burst, or the pool with a counted reason (I1).

mod nat;

use std::{array, mem, time::Duration};

use crate::{
    connections::{Connections, Reader},
    counters::{Counters, DropReason, Event},
    encap,
    flow::{Address, Flow, HashKey, Kind},
    forwarding::{Backend, Forwarding, Link, Slot},
    fragment,
    nat::{Id, Slots, Sweep},
    parse,
    port::{BURST, Frame, Frames, Pool, Port},
    prefetch,
    publish::Subscriber,
    rate_limit::RateLimit,
    reply,
    schedule::Scheduler,
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
    /// Its number among the workers.
    pub id: usize,
    /// The slots of NAT, which all workers share; `None` if no service is ever translated.
    pub nat: Option<Arc<Slots>>,
}

/// The number of no port.
const NO_PORT: u32 = u32::MAX;
/// The most interfaces that can be told apart.
const LINKS: usize = 1 << u8::BITS;

/// One polling thread's whole state.
#[derive(Debug)]
pub struct Worker<P> {
    ports: Vec<P>,
    links: Vec<usize>,
    /// Which port a packet for an interface leaves by, or [`NO_PORT`], by link index. One for each that there can be:
    /// no look needs a check.
    egress: Box<[u32; LINKS]>,
    pool: Pool,
    connections: Connections,
    scheduler: Scheduler,
    published: Subscriber<Forwarding>,
    counters: Arc<Counters>,
    hash_key: HashKey,
    icmp_limit: RateLimit,
    nat: Option<Arc<Slots>>,
    nat_sweep: Sweep,
    inbound: Box<Frames>,
    outbound: Vec<Box<Frames>>,
    /// What is known of the packets in `inbound`.
    packets: Box<[Packet; BURST]>,
}

impl<P: Port> Worker<P> {
    /// A worker that has done nothing yet.
    ///
    /// # Panics
    /// If a port belongs to no interface.
    pub fn new(parts: Parts<P>) -> Self {
        assert_eq!(parts.ports.len(), parts.links.len(), "every port belongs to an interface");
        let first_port =
            |link| parts.links.iter().position(|&of| of == link).map_or(NO_PORT, |at| at as u32);
        let slots = parts.counters.backends();
        Self {
            egress: Box::new(array::from_fn(first_port)),
            outbound: parts.ports.iter().map(|_| Box::new(Frames::new())).collect(),
            icmp_limit: RateLimit::new(parts.icmp_errors_per_s),
            nat_sweep: Sweep::new(parts.id, parts.peers.len() + 1),
            nat: parts.nat,
            inbound: Box::new(Frames::new()),
            packets: Box::new([const { Packet::NONE }; BURST]),
            ports: parts.ports,
            links: parts.links,
            pool: parts.pool,
            connections: parts.connections.counting(slots),
            scheduler: Scheduler::new(slots, parts.id, parts.peers, parts.hash_key),
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
        self.sweep_nat(now);
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
        let mut burst = Burst {
            forwarding,
            link: forwarding.link(self.links[port]),
            link_index: self.links[port] as u8,
            nat: self.nat.as_deref().filter(|_| !forwarding.overlays().is_empty()),
            ingress: port as u32,
            egress: &self.egress,
            hash_key: self.hash_key,
            context: Context::new(&mut self.connections, &mut self.scheduler, &self.counters, now),
            pool: &mut self.pool,
            outbound: &mut self.outbound,
            icmp_limit: &mut self.icmp_limit,
            seen: nat::Seen::default(),
        };
        // Each stage goes over the whole burst and asks for the memory that the next one reads, so that
        // cache misses overlap.
        for frame in &*self.inbound {
            frame.prefetch();
        }
        let packets = &mut self.packets[..self.inbound.len()];
        let some_to_select = match burst.nat {
            None => {
                burst.parse(&self.inbound, packets);
                true
            }
            Some(slots) => burst.translate(slots, &mut self.inbound, packets),
        };
        if some_to_select {
            burst.select(packets);
            burst.encapsulate(&mut self.inbound, packets);
        }
        burst.dispatch(&mut self.inbound, packets);
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

    /// Frees what has run out of NAT's slots, and asks clients to speak whose task is gone.
    #[inline]
    fn sweep_nat(&mut self, now: Tick) {
        let Some(slots) = &self.nat else { return };
        let forwarding: &Forwarding = self.published.load();
        let mut asked = false;
        self.nat_sweep.run(slots, now, |id, state| {
            let slot = (id, state);
            if let Some((frame, link)) =
                nat::ask_client(slots, slot, (forwarding, now), &mut self.pool)
            {
                let Some(port) = port_of(&self.egress, link) else {
                    return self.pool.put(frame);
                };
                push(&mut self.outbound, port, frame, &mut self.pool, &self.counters);
                self.counters.count(Event::ClientsAsked, 1);
                asked = true;
            }
        });
        if asked {
            self.transmit();
        }
    }

    /// Notes how long a turn took that had packets.
    #[inline]
    pub fn took(&self, time: Duration) {
        self.counters.took(time);
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

/// What is known of a packet on its way through the stages.
#[derive(Debug)]
struct Packet {
    flow: Flow,
    /// The flow's, by the connection tables' key.
    hash: u64,
    next: Next,
    /// Who sent the tunnel's packet that it came in.
    outer: Address,
}

/// What is to be done with a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Next {
    /// Select a backend.
    Select,
    /// Wrap it for the backend in this slot.
    Tunnel(Slot),
    /// Translate it for a task of this service; it most probably has this slot.
    Translate(u32, Id),
    /// Translate it for the client that has this slot.
    Return(Id),
    /// It is ready: send it by this port.
    Send(u32),
    /// It is too big for the backend in this slot.
    Shrink(Slot),
    /// Answer it.
    Answer,
    /// Tell its sender that there is no such connection.
    Refuse(DropReason),
    /// Drop it.
    Drop(DropReason),
}

impl Packet {
    const NONE: Self = Self { flow: Flow::NONE, hash: 0, next: Next::Answer, outer: Address(0) };
}

/// What one burst is handled with. Its stages are functions of their own, so that each has the registers
/// to itself.
struct Burst<'a> {
    forwarding: &'a Forwarding,
    link: Link,
    link_index: u8,
    nat: Option<&'a Slots>,
    ingress: u32,
    egress: &'a [u32; LINKS],
    hash_key: HashKey,
    context: Context<'a>,
    pool: &'a mut Pool,
    outbound: &'a mut [Box<Frames>],
    icmp_limit: &'a mut RateLimit,
    seen: nat::Seen,
}

impl<'a> Burst<'a> {
    /// Bytes → meaning.
    #[inline(never)]
    fn parse(&self, inbound: &Frames, packets: &mut [Packet]) {
        let mut total = 0;
        for (frame, packet) in inbound.iter().zip(packets) {
            let bytes = frame.packet();
            total += bytes.len() as u64;
            // For the outer header. One by one, and not at once for the whole burst: where caches are contested, a
            // seventh of a turn's time.
            prefetch::prefetch_front(bytes);
            if parse::plain_ipv4(bytes, &mut packet.flow) {
                self.classify(bytes, packet);
            } else {
                self.parse_any(bytes, packet);
            }
        }
        self.received(inbound, total);
    }

    /// Counts a burst.
    fn received(&self, inbound: &Frames, bytes: u64) {
        self.context.counters.count(Event::RxPackets, inbound.len() as u64);
        self.context.counters.count(Event::RxBytes, bytes);
    }

    /// Apart, so that the plain packets' way has the registers to itself.
    #[inline(never)]
    fn parse_any(&self, bytes: &[u8], packet: &mut Packet) {
        match parse::any(bytes, &mut packet.flow) {
            Ok(()) => self.classify(bytes, packet),
            Err(reason) => packet.next = Next::Drop(reason),
        }
    }

    /// Says what is next for a parsed packet.
    #[inline(always)]
    fn classify(&self, bytes: &[u8], packet: &mut Packet) {
        if self.is_to_be_forwarded(bytes, packet) {
            packet.hash = packet.flow.key.hash(&self.hash_key);
            self.context.connections.prefetch(packet.hash);
            packet.next = Next::Select;
        }
    }

    /// Whether a parsed packet is for a backend. If not, says what is next for it.
    #[inline(always)]
    fn is_to_be_forwarded(&self, bytes: &[u8], packet: &mut Packet) -> bool {
        let kind = packet.flow.kind;
        if !self.link.accepts(bytes, kind) {
            packet.next = Next::Drop(DropReason::NotForUs);
            return false;
        }
        if !matches!(kind, Kind::Packet | Kind::IcmpError) {
            packet.next = Next::Answer;
            return false;
        }
        true
    }

    /// Meaning → backend.
    ///
    /// What takes the long way waits until the others are through: by then the second bucket that it may have
    /// to read has come. In a flood that is most packets.
    #[inline(never)]
    fn select(&mut self, packets: &mut [Packet]) {
        // A flow's packets stay in order: once one waits, so do all of its sixty-fourth.
        let mut waiting = 0_u64;
        for packet in &mut *packets {
            let Packet { flow, hash, next, .. } = packet;
            if *next == Next::Select {
                let sixty_fourth = 1 << (*hash % 64);
                if waiting & sixty_fourth == 0
                    && let Some(selected) =
                        select::settled(flow, *hash, self.forwarding, &mut self.context)
                {
                    selected.backend.template.prefetch();
                    *next = Next::Tunnel(selected.slot);
                } else {
                    waiting |= sixty_fourth;
                    self.context.connections.prefetch_second(*hash);
                }
            }
        }
        if waiting != 0 {
            self.select_unsettled(packets);
        }
    }

    /// The rest of [`Self::select`].
    #[inline(never)]
    fn select_unsettled(&mut self, packets: &mut [Packet]) {
        for Packet { flow, hash, next, .. } in packets {
            if *next == Next::Select {
                match select::unsettled(flow, *hash, self.forwarding, &mut self.context) {
                    Ok(selected) => {
                        selected.backend.template.prefetch();
                        *next = Next::Tunnel(selected.slot);
                    }
                    Err(reason @ DropReason::BackendGone) => *next = Next::Refuse(reason),
                    Err(reason) => *next = Next::Drop(reason),
                }
            }
        }
    }

    /// Wraps what goes to a backend, in its place: a frame that is patched and then moved waits for its own
    /// stores.
    #[inline(never)]
    fn encapsulate(&mut self, inbound: &mut Frames, packets: &mut [Packet]) {
        for (frame, packet) in inbound.iter_mut().zip(packets) {
            if let Next::Tunnel(slot) = packet.next {
                self.tunnel(frame, packet, slot);
            }
        }
    }

    /// Sends the packet to its backend, if it fits.
    #[inline(always)]
    fn tunnel(&self, frame: &mut Frame, packet: &mut Packet, slot: Slot) {
        let Packet { flow, next, .. } = packet;
        let Some((backend, port)) = self.reach(slot) else {
            *next = Next::Drop(DropReason::NextHopUnresolved);
            return;
        };
        self.complete(frame, flow);
        if flow.kind == Kind::IcmpError {
            self.context.counters.count(Event::IcmpErrorsForwarded, 1);
        }
        if flow.ip_len > backend.mtu {
            *next = Next::Shrink(slot);
            return;
        }
        self.wrap(frame, packet, slot, (backend, port));
    }

    /// Completes a checksum that the sender left to its network card.
    #[inline(always)]
    fn complete(&self, frame: &mut Frame, flow: &Flow) {
        if self.link.partial_checksums {
            self.complete_checksum(frame, flow);
        }
    }

    #[inline(never)]
    fn complete_checksum(&self, frame: &mut Frame, flow: &Flow) {
        if encap::complete_checksum(frame.packet_mut(), flow) {
            self.context.counters.count(Event::ChecksumsCompleted, 1);
        }
    }

    /// Wraps what fits the way to its backend.
    #[inline(always)]
    fn wrap(
        &self,
        frame: &mut Frame,
        packet: &mut Packet,
        slot: Slot,
        (backend, port): (&Backend, u32),
    ) {
        packet.next = match encap::vxlan(frame, &packet.flow, &backend.template, packet.hash) {
            Ok(()) => {
                self.context.counters.forwarded(slot as usize, frame.len());
                Next::Send(port)
            }
            Err(reason) => Next::Drop(reason),
        };
    }

    /// The backend in this slot and the port that it is reached by, if it is.
    #[inline(always)]
    fn reach(&self, slot: Slot) -> Option<(&'a Backend, u32)> {
        let backend = self.forwarding.backend(slot).filter(|backend| backend.reachable)?;
        Some((backend, port_of(self.egress, backend.link)?))
    }

    /// Hands each frame on.
    #[inline(never)]
    fn dispatch(&mut self, inbound: &mut Box<Frames>, packets: &[Packet]) {
        // Most bursts leave whole: no frame needs to be moved.
        if let [Packet { next: next @ Next::Send(port), .. }, ..] = packets
            && packets.iter().all(|packet| packet.next == *next)
            && let Some(outbound) = self.outbound.get_mut(*port as usize)
            && outbound.is_empty()
        {
            mem::swap(outbound, inbound);
            return;
        }
        for (frame, packet) in inbound.drain(..).zip(packets) {
            match packet.next {
                Next::Send(port) => self.send(frame, port),
                Next::Drop(reason) => self.discard(frame, reason),
                Next::Answer => self.answer(frame, &packet.flow),
                Next::Shrink(slot) => self.too_big(frame, packet, slot),
                Next::Refuse(reason) => self.refuse(frame, packet, reason),
                Next::Select | Next::Tunnel(_) | Next::Translate(..) | Next::Return(_) => {
                    self.discard(frame, DropReason::NoBackend)
                }
            }
        }
    }

    /// The packet does not fit the way to its backend: it is cut if it may be, else its sender is told.
    /// Silence would be a black hole.
    #[cold]
    fn too_big(&mut self, mut frame: Frame, packet: &Packet, slot: Slot) {
        let flow = &packet.flow;
        let Some((backend, port)) = self.reach(slot) else {
            return self.discard(frame, DropReason::NextHopUnresolved);
        };
        if fragment::can_cut(flow, backend.mtu) {
            return self.fragment(frame, packet, slot, backend, port);
        }
        // Never an error about an error, RFC 1122 section 3.2.2.
        let tell = flow.kind != Kind::IcmpError && can_be_answered(flow);
        if !tell || !self.icmp_limit.take(self.context.now()) {
            return self.discard(frame, DropReason::TooBigSilent);
        }
        if let Err(reason) = reply::too_big(&mut frame, flow, self.link.mac, backend.mtu) {
            return self.discard(frame, reason);
        }
        self.context.counters.dropped(DropReason::TooBig);
        self.context.counters.count(Event::TooBigSent, 1);
        self.send(frame, self.ingress);
    }

    /// Sends the packet to its backend in pieces.
    fn fragment(
        &mut self,
        mut frame: Frame,
        packet: &Packet,
        slot: Slot,
        backend: &Backend,
        port: u32,
    ) {
        let Self { context, pool, outbound, .. } = self;
        let mut each = |mut piece: Frame, flow: Flow, pool: &mut Pool| match encap::vxlan(
            &mut piece,
            &flow,
            &backend.template,
            packet.hash,
        ) {
            Ok(()) => {
                context.counters.forwarded(slot as usize, piece.len());
                push(outbound, port, piece, pool, context.counters);
            }
            Err(reason) => drop_frame(piece, reason, pool, context.counters),
        };
        match fragment::cut(&mut frame, &packet.flow, backend.mtu, pool, &mut each) {
            Some(last) => {
                each(frame, last, pool);
                context.counters.count(Event::Fragmented, 1);
            }
            None => self.discard(frame, DropReason::NoFrame),
        }
    }

    /// Answers for the VIP.
    #[cold]
    fn answer(&mut self, mut frame: Frame, flow: &Flow) {
        match self.write_answer(&mut frame, flow) {
            Ok(event) => {
                self.context.counters.count(event, 1);
                self.send(frame, self.ingress);
            }
            Err(reason) => self.discard(frame, reason),
        }
    }

    /// Makes the question the answer.
    fn write_answer(&self, frame: &mut Frame, flow: &Flow) -> Result<Event, DropReason> {
        let own = self.link.mac;
        let is_vip = self.forwarding.is_vip(flow.key.dst);
        let owner = is_vip && self.forwarding.answer_arp();
        match flow.kind {
            Kind::Echo if is_vip && can_be_answered(flow) => {
                reply::echo(frame, flow, own);
                Ok(Event::EchoReplies)
            }
            Kind::Arp if owner => {
                reply::arp(frame, flow, own)?;
                Ok(Event::NeighbourReplies)
            }
            Kind::NeighbourSolicitation if owner => {
                reply::neighbour(frame, flow, own)?;
                Ok(Event::NeighbourReplies)
            }
            Kind::Arp => Err(DropReason::NotIp),
            Kind::NeighbourSolicitation => Err(DropReason::UnknownProtocol),
            _ => Err(DropReason::NoService),
        }
    }

    #[inline(always)]
    fn send(&mut self, frame: Frame, port: u32) {
        push(self.outbound, port, frame, self.pool, self.context.counters);
    }

    #[inline(always)]
    fn discard(&mut self, frame: Frame, reason: DropReason) {
        drop_frame(frame, reason, self.pool, self.context.counters);
    }
}

/// The port that packets for this interface leave by.
#[inline(always)]
fn port_of(egress: &[u32; LINKS], link: u8) -> Option<u32> {
    let port = egress[usize::from(link)];
    (port != NO_PORT).then_some(port)
}

/// Whether the packet's source is a host that an answer can be sent to.
fn can_be_answered(flow: &Flow) -> bool {
    flow.key.src.is_host() && flow.key.src != flow.key.dst
}

/// Appends to what leaves by this port.
#[inline(always)]
fn push(
    outbound: &mut [Box<Frames>],
    port: u32,
    frame: Frame,
    pool: &mut Pool,
    counters: &Counters,
) {
    if let Err(full) = outbound[port as usize].try_push(frame) {
        drop_frame(full.element(), DropReason::TxRingFull, pool, counters);
    }
}

#[inline(never)]
fn drop_frame(frame: Frame, reason: DropReason, pool: &mut Pool, counters: &Counters) {
    counters.dropped(reason);
    pool.put(frame);
}
