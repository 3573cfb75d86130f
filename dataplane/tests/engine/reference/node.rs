//! The whole turn: what may become of each packet, and whether it did.
//!
//! "May", because the connection table is a cache, rings run full and ICMP errors are rationed. What was
//! not forgotten, not full and not rationed has one fate only.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

use dataplane::{
    connections::{Reader, Verdict},
    counters::DropReason::{self, *},
    flow::{Address, FlowKey, Kind},
    forwarding::{Forwarding, Link, Slot, Vip},
    port::BURST,
    time::Tick,
};

use super::{
    output::{
        advertisement, arp_reply, completed, cut, echo_reply, encapsulated, is_host, too_big,
    },
    parse::{Meaning, behind_tags, parse},
};
use crate::rig::{BackendSpec, Equipment, World, hash_key};

/// The reference node.
pub struct Node {
    world: World,
    /// For Maglev's choice, which has tests of its own.
    forwarding: Arc<Forwarding>,
    equipment: Equipment,
    /// By port.
    arrived: Vec<VecDeque<Arrival>>,
    /// All backends that a flow can be remembered with.
    given: HashMap<FlowKey, BTreeSet<Slot>>,
    /// Of what was taken through a turn and not yet seen again.
    leaving: VecDeque<Leaving>,
    taken: u64,
    /// Which packet of its flow left last, by port: packets do not overtake each other.
    left: HashMap<(usize, FlowKey), u64>,
}

struct Arrival {
    /// Where in its frame it lies.
    start: usize,
    bytes: Vec<u8>,
}

/// What may become of a packet.
struct Fate {
    port: usize,
    /// What leaves by the port, in this order. Each has two right forms.
    frames: VecDeque<[Vec<u8>; 2]>,
    /// What may be counted, as often as it stands here: of what does not leave, and of what made it.
    drops: Vec<DropReason>,
}

struct Leaving {
    number: u64,
    key: Option<FlowKey>,
    fates: Vec<Fate>,
}

impl Fate {
    fn dropped(reason: DropReason) -> Self {
        Self { port: 0, frames: VecDeque::new(), drops: vec![reason] }
    }

    fn leaves(port: usize, bytes: [Vec<u8>; 2]) -> Self {
        Self { port, frames: [bytes].into(), drops: vec![TxRingFull] }
    }

    fn answer(port: usize, bytes: Vec<u8>) -> Self {
        Self::leaves(port, [bytes.clone(), bytes])
    }

    fn most(&self, reason: DropReason) -> u64 {
        self.drops.iter().filter(|&&drop| drop == reason).count() as u64
    }

    fn is_certain(&self, reason: DropReason) -> bool {
        self.frames.is_empty() && self.drops == [reason]
    }
}

impl Node {
    pub fn new(world: &World, forwarding: Arc<Forwarding>, equipment: Equipment) -> Self {
        Self {
            world: world.clone(),
            forwarding,
            arrived: equipment.links.iter().map(|_| VecDeque::new()).collect(),
            equipment,
            given: HashMap::new(),
            leaving: VecDeque::new(),
            taken: 0,
            left: HashMap::new(),
        }
    }

    pub fn publish(&mut self, world: &World, forwarding: Arc<Forwarding>) {
        (self.world, self.forwarding) = (world.clone(), forwarding);
    }

    /// A packet is received, at `start` in its frame.
    pub fn arrives(&mut self, port: usize, start: usize, bytes: &[u8]) {
        self.arrived[port].push_back(Arrival { start, bytes: bytes.to_vec() });
    }

    /// One turn. Returns how many packets it takes, and how often it drops some for each reason: at least
    /// and at most.
    pub fn turn(&mut self, now: Tick) -> (usize, Vec<(DropReason, [u64; 2])>) {
        let mut drops: Vec<_> = DropReason::ALL.iter().map(|&reason| (reason, [0, 0])).collect();
        let mut received = 0;
        for port in 0..self.arrived.len() {
            let burst = self.arrived[port].len().min(BURST);
            received += burst;
            for arrival in self.arrived[port].drain(..burst).collect::<Vec<_>>() {
                let packet = parse(&arrival.bytes);
                let key = packet.as_ref().ok().map(|packet| packet.key);
                let fates = match packet {
                    Ok(packet) => self.fates(port, &arrival, &packet, now),
                    Err(reason) => vec![Fate::dropped(reason)],
                };
                for (reason, [least, most]) in &mut drops {
                    *least += u64::from(fates.iter().all(|fate| fate.is_certain(*reason)));
                    *most += fates.iter().map(|fate| fate.most(*reason)).max().unwrap_or(0);
                }
                self.taken += 1;
                if fates.iter().any(|fate| !fate.frames.is_empty()) {
                    self.leaving.push_back(Leaving { number: self.taken, key, fates });
                }
            }
        }
        (received, drops)
    }

    /// A packet leaves: it must be what became of one that came, and no earlier one of its flow than those
    /// that have left by this port. (But if the flow was given several backends, its packets that look alike
    /// can't be told apart.)
    pub fn leaves(&mut self, port: usize, bytes: &[u8]) {
        let fits = |fate: &Fate| {
            let is_it = |forms: &[Vec<u8>; 2]| forms.iter().any(|form| form == bytes);
            if fate.port == port { fate.frames.iter().position(is_it) } else { None }
        };
        let last = |key: Option<FlowKey>| {
            let key = key.filter(|key| self.given.get(key).is_none_or(|slots| slots.len() == 1))?;
            self.left.get(&(port, key)).copied()
        };
        let found = self.leaving.iter().enumerate().find_map(|(i, leaving)| {
            let fate = leaving.fates.iter().position(|fate| fits(fate).is_some())?;
            (last(leaving.key) <= Some(leaving.number)).then_some((i, fate))
        });
        let Some((i, fate)) = found else {
            panic!("nothing that came can become this now, by port {port}: {bytes:02x?}")
        };
        let leaving = &mut self.leaving[i];
        let mut fate = leaving.fates.swap_remove(fate);
        // Those before it were dropped.
        fate.frames.drain(..=fits(&fate).expect("it fits"));
        if let Some(key) = leaving.key {
            self.left.insert((port, key), leaving.number);
        }
        leaving.fates = vec![fate];
        if leaving.fates[0].frames.is_empty() {
            self.leaving.remove(i);
        }
    }

    /// All that left has been seen: what is still expected was dropped.
    pub fn all_has_left(&mut self) {
        self.leaving.clear();
    }

    /// What is remembered of connections is gone.
    pub fn forget(&mut self) {
        self.given.clear();
        self.left.clear();
    }

    fn fates(&mut self, port: usize, arrival: &Arrival, packet: &Meaning, now: Tick) -> Vec<Fate> {
        let frame = &arrival.bytes;
        let link = self.world.links[self.equipment.links[port]];
        if !is_for_us(frame, packet.kind, link) {
            return vec![Fate::dropped(NotForUs)];
        }
        let address = packet.key.dst;
        let is_vip = self.vips().any(|vip| vip.address == address);
        let owner = is_vip && self.world.answer_arp;
        let fate = match packet.kind {
            Kind::Packet | Kind::IcmpError => return self.tunnel_fates(port, arrival, packet, now),
            Kind::Echo if is_vip && can_be_answered(packet) => {
                Fate::answer(port, echo_reply(frame, packet, link.mac))
            }
            Kind::Echo => Fate::dropped(NoService),
            Kind::Arp if owner => {
                let (_, at) = behind_tags(frame).expect("it was parsed");
                Fate::answer(port, arp_reply(frame, at, link.mac))
            }
            Kind::Arp => Fate::dropped(NotIp),
            Kind::NeighbourSolicitation if owner => {
                let bytes = advertisement(frame, packet, link.mac);
                if arrival.start + bytes.len() > self.equipment.chunk_bytes {
                    Fate::dropped(NoHeadroom)
                } else {
                    Fate::answer(port, bytes)
                }
            }
            Kind::NeighbourSolicitation => Fate::dropped(UnknownProtocol),
        };
        vec![fate]
    }

    fn vips(&self) -> impl Iterator<Item = &Vip> {
        self.world.services.iter().flat_map(|(vips, _)| vips)
    }

    /// The service that answers, by its index.
    fn service(&self, key: &FlowKey) -> Option<usize> {
        let claims = |port| {
            let vip = Vip { address: key.dst, protocol: key.protocol, port };
            self.world.services.iter().position(|(vips, _)| vips.contains(&vip))
        };
        claims(key.dst_port).or_else(|| claims(0))
    }

    fn tunnel_fates(
        &mut self,
        port: usize,
        arrival: &Arrival,
        packet: &Meaning,
        now: Tick,
    ) -> Vec<Fate> {
        let Some(service) = self.service(&packet.key) else {
            let error = packet.kind == Kind::IcmpError;
            return vec![Fate::dropped(if error { IcmpUnmatched } else { NoService })];
        };
        let slots = self.slots(service, packet, now);
        let backends = &self.world.services[service].1;
        let backend = |slot| backends.iter().find(|backend| backend.slot == slot);
        let fate = |slot: Option<Slot>| match slot.and_then(backend) {
            Some(backend) => self.fate(port, arrival, packet, backend),
            None => Fate::dropped(NoBackend),
        };
        slots.into_iter().map(fate).collect()
    }

    /// The backends that the packet may go to: Maglev's, or one that the flow was given before.
    fn slots(&mut self, service: usize, packet: &Meaning, now: Tick) -> BTreeSet<Option<Slot>> {
        let key = &packet.key;
        let maglev = &self.forwarding.service(service as u32).expect("it is there").maglev;
        let picked = maglev.pick(key.hash(self.forwarding.maglev_key()));
        let mut slots = BTreeSet::from([picked]);
        let is_syn = packet.tcp_flags & 0x12 == 0x02;
        if is_syn {
            self.given.entry(*key).or_default().extend(picked);
            return slots;
        }
        let is_datagram = packet.protocol == 17;
        let serves = |slot: Slot| {
            let mut backends = self.world.services[service].1.iter();
            backends.any(|backend| backend.slot == slot && (backend.reachable || !is_datagram))
        };
        let judge = |slot| if serves(slot) { Verdict::Serves(slot) } else { Verdict::Stranger };
        let find = |peer: &Reader| peer.find(key.hash(&hash_key()), now, judge);
        if packet.kind == Kind::IcmpError {
            slots.extend(self.equipment.peers.iter().filter_map(find).map(Some));
        }
        let given = self.given.get(key).into_iter().flatten();
        slots.extend(given.filter(|&&slot| serves(slot)).map(|&slot| Some(slot)));
        if packet.kind == Kind::Packet {
            self.given.entry(*key).or_default().extend(picked);
        }
        slots
    }

    fn fate(
        &self,
        ingress: usize,
        arrival: &Arrival,
        packet: &Meaning,
        backend: &BackendSpec,
    ) -> Fate {
        let links = &self.equipment.links;
        let egress = links.iter().position(|&link| link == usize::from(backend.link));
        let Some(port) = egress.filter(|_| backend.reachable) else {
            return Fate::dropped(NextHopUnresolved);
        };
        let hash = packet.key.hash(&hash_key());
        let link = self.world.links[links[ingress]];
        let ip = &arrival.bytes[packet.ip.clone()];
        let partial = if link.partial_checksums { completed(packet, ip) } else { None };
        let ip = partial.as_deref().unwrap_or(ip);
        let forms = |packet: &Meaning, ip: &[u8]| encapsulated(&backend.tunnel, packet, ip, hash);
        let header_len = forms(packet, ip)[0].len() - ip.len();
        let has_room = arrival.start + packet.ip.start >= header_len;
        if ip.len() <= backend.mtu.into() {
            let fits = || Fate::leaves(port, forms(packet, ip));
            return if has_room { fits() } else { Fate::dropped(NoHeadroom) };
        }
        if let Some(pieces) = cut(packet, ip, backend.mtu) {
            // No transport checksum covers a piece alone.
            let piece = Meaning { protocol: 0, ..packet.clone() };
            let frames: VecDeque<_> = pieces.iter().map(|ip| forms(&piece, ip)).collect();
            let drops = frames.iter().map(|_| if has_room { TxRingFull } else { NoHeadroom });
            let drops = drops.chain([NoFrame, TxRingFull]).collect();
            return Fate { port, frames, drops };
        }
        if packet.kind == Kind::IcmpError || !can_be_answered(packet) {
            return Fate::dropped(TooBigSilent);
        }
        let bytes = too_big(&arrival.bytes, packet, ip, link.mac, backend.mtu);
        let added = if packet.key.dst.as_v4().is_some() { 28 } else { 48 };
        if arrival.start < added {
            return Fate { drops: vec![TooBigSilent, NoHeadroom], ..Fate::dropped(NoHeadroom) };
        }
        Fate { drops: vec![TooBig, TooBigSilent, TxRingFull], ..Fate::answer(ingress, bytes) }
    }
}

/// Whether the frame is addressed to this station, or asks a group who has an address.
fn is_for_us(frame: &[u8], kind: Kind, link: Link) -> bool {
    let asks_a_group = frame[0] & 1 == 1 && matches!(kind, Kind::Arp | Kind::NeighbourSolicitation);
    frame[..6] == link.mac.0 || link.mac.0 == [0; 6] || asks_a_group
}

fn can_be_answered(packet: &Meaning) -> bool {
    let (src, dst): (Address, Address) = (packet.key.src, packet.key.dst);
    is_host(src) && src != dst
}
