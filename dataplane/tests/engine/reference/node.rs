//! The whole turn: what may become of each packet, and whether it did.
//!
//! "May", because the connection table is a cache, rings run full and ICMP errors are rationed. What was
//! not forgotten, not full and not rationed has one fate only.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    mem,
    sync::Arc,
};

use dataplane::{
    connections::{Reader, Verdict},
    counters::DropReason::{self, *},
    flow::{Address, FlowKey, Kind},
    forwarding::{Forwarding, Link, Slot, Vip},
    port::BURST,
    time::Tick,
    wire::ethernet::MacAddr,
};

use super::{
    output::{
        advertisement, arp_reply, completed, cut, echo_reply, encapsulated, is_host, reset, too_big,
    },
    parse::{Meaning, behind_tags, parse},
};
use crate::rig::{BackendSpec, Equipment, Scheduled, World, hash_key, takers};

/// The reference node.
pub struct Node {
    pub(super) world: World,
    /// For Maglev's choice, which has tests of its own.
    pub(super) forwarding: Arc<Forwarding>,
    pub(super) equipment: Equipment,
    /// By port.
    arrived: Vec<VecDeque<Arrival>>,
    /// All backends that a flow can be remembered with.
    given: HashMap<FlowKey, BTreeSet<Slot>>,
    /// All that a client can be bound to, by its address and the VIP's.
    bound: HashMap<(Address, Address), BTreeSet<Slot>>,
    /// The number of each flow's last packet.
    latest: HashMap<FlowKey, u64>,
    /// Of what was taken through a turn and not yet seen again.
    leaving: Vec<Leaving>,
    taken: u64,
    /// Which packet of its flow left last, by port: packets do not overtake each other.
    left: HashMap<(usize, FlowKey), u64>,
}

#[derive(Clone, Debug)]
pub(super) struct Arrival {
    /// Where in its frame it lies.
    pub(super) start: usize,
    pub(super) bytes: Vec<u8>,
}

/// What may become of a packet.
#[derive(Clone, Default, Debug)]
pub(super) struct Fate {
    /// The backend it goes to.
    pub(super) slot: Option<Slot>,
    pub(super) port: usize,
    /// What leaves by the port, in this order: each in one of these forms, which are all right.
    pub(super) frames: Vec<Vec<Vec<u8>>>,
    /// What may be counted, as often as it stands here: of what does not leave, and of what made it.
    pub(super) drops: Vec<DropReason>,
}

struct Leaving {
    number: u64,
    key: FlowKey,
    fates: Vec<Fate>,
    /// If a scheduler may have chosen: what the flow was given before, or has from Maglev.
    otherwise: Option<BTreeSet<Slot>>,
    /// What is taken to have been made of it: of what has left, by which port.
    became: Vec<(usize, Vec<u8>)>,
}

impl Leaving {
    /// The fate in which just this leaves, and what else there is of it is dropped.
    fn fate<'a>(&self, left: impl Iterator<Item = &'a (usize, Vec<u8>)> + Clone) -> Option<&Fate> {
        self.fates.iter().find(|fate| {
            let mut made = fate.frames.iter();
            let mut is_made = |bytes: &Vec<u8>| made.any(|forms| forms.contains(bytes));
            left.clone().all(|(port, bytes)| *port == fate.port && is_made(bytes))
        })
    }

    /// Whether nothing more can be made of it.
    fn is_done(&self) -> bool {
        let Some((_, last)) = self.became.last() else { return false };
        let fate = self.fate(self.became.iter()).expect("it became what it may");
        fate.frames.last().is_some_and(|forms| forms.contains(last))
    }
}

impl Fate {
    pub(super) fn dropped(reason: DropReason) -> Self {
        Self { drops: vec![reason], ..Self::default() }
    }

    pub(super) fn leaves(port: usize, forms: Vec<Vec<u8>>) -> Self {
        Self { port, frames: vec![forms], drops: vec![TxRingFull], slot: None }
    }

    pub(super) fn answer(port: usize, bytes: Vec<u8>) -> Self {
        Self::leaves(port, vec![bytes])
    }

    /// What a TCP segment gets that belongs to nothing known: a reset, if that is believed.
    pub(super) fn refused(
        port: usize,
        frame: &[u8],
        packet: &Meaning,
        own: MacAddr,
        reason: DropReason,
    ) -> Self {
        if packet.protocol != 6 || packet.tcp_flags & 0x04 != 0 || !can_be_answered(packet) {
            return Self::dropped(reason);
        }
        let answer = Self::answer(port, reset(frame, packet, own));
        Self { drops: vec![reason, TxRingFull], ..answer }
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
            bound: HashMap::new(),
            latest: HashMap::new(),
            leaving: Vec::new(),
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
                self.taken += 1;
                let mut otherwise = None;
                let (key, fates) = match parse(&arrival.bytes) {
                    Ok(packet) => {
                        let fates = self.fates(port, &arrival, &packet, now, &mut otherwise);
                        (Some(packet.key), fates)
                    }
                    Err(reason) => (None, vec![Fate::dropped(reason)]),
                };
                for (reason, [least, most]) in &mut drops {
                    *least += u64::from(fates.iter().all(|fate| fate.is_certain(*reason)));
                    *most += fates.iter().map(|fate| fate.most(*reason)).max().unwrap_or(0);
                }
                if let Some(key) = key
                    && fates.iter().any(|fate| !fate.frames.is_empty())
                {
                    let number = self.taken;
                    let became = Vec::new();
                    self.leaving.push(Leaving { number, key, fates, otherwise, became });
                }
            }
        }
        (received, drops)
    }

    /// A packet leaves: it must be what became of one that came, and no earlier one of its flow than those
    /// that have left by this port. (But if the flow was given several backends, its packets that look alike
    /// can't be told apart.)
    pub fn leaves(&mut self, port: usize, bytes: &[u8]) {
        let Some(i) = self.place(&[(port, bytes.to_vec())], &mut BTreeSet::new()) else {
            panic!("nothing that came can become this now, by port {port}: {bytes:02x?}")
        };
        let Leaving { number, key, .. } = self.leaving[i];
        self.left.insert((port, key), number);
        if self.leaving.iter().filter(|leaving| leaving.key == key).all(Leaving::is_done) {
            self.settle(key);
        }
    }

    /// Finds the packet that this was made of. If all that it can be are taken for others', packets that look
    /// alike but may go to different backends were mixed up: then others are found for those.
    fn place(&mut self, left: &[(usize, Vec<u8>)], tried: &mut BTreeSet<usize>) -> Option<usize> {
        let last = |key| {
            let one_backend = self.given.get(&key).is_none_or(|slots| slots.len() == 1);
            if one_backend { self.left.get(&(left[0].0, key)).copied() } else { None }
        };
        let has_room = |(i, leaving): (usize, &Leaving)| {
            let fits = leaving.fate(leaving.became.iter().chain(left)).is_some();
            fits && last(leaving.key) <= Some(leaving.number) && !tried.contains(&i)
        };
        if let Some(i) = self.leaving.iter().enumerate().position(has_room) {
            self.leaving[i].became.extend_from_slice(left);
            return Some(i);
        }
        (0..self.leaving.len()).find(|&i| {
            let leaving = &mut self.leaving[i];
            if leaving.fate(left.iter()).is_none() || !tried.insert(i) {
                return false;
            }
            let others = mem::replace(&mut leaving.became, left.to_vec());
            let is_placed = self.place(&others, tried).is_some();
            if !is_placed {
                self.leaving[i].became = others;
            }
            is_placed
        })
    }

    /// No packet of the flow will leave any more. Now it is known what the scheduler chose for the latest,
    /// and the flow has to stay there.
    fn settle(&mut self, key: FlowKey) {
        let latest = self.latest.get(&key).copied();
        let of_flow = self.leaving.extract_if(.., |leaving| leaving.key == key);
        for leaving in of_flow.filter(|leaving| Some(leaving.number) == latest) {
            let fate = leaving.fate(leaving.became.iter()).filter(|_| !leaving.became.is_empty());
            let slot = fate.and_then(|fate| fate.slot);
            if let (Some(otherwise), Some(slot)) = (&leaving.otherwise, slot) {
                self.given.insert(key, otherwise.iter().copied().chain([slot]).collect());
            }
        }
    }

    /// All that left has been seen: what is still expected was dropped.
    pub fn all_has_left(&mut self) {
        while let Some(leaving) = self.leaving.first() {
            self.settle(leaving.key);
        }
    }

    /// A client is bound to a backend, as another worker knows.
    pub fn bind(&mut self, packet: &[u8], slot: Slot) {
        let key = parse(packet).expect("it is a packet").key;
        self.bound.entry((key.src, key.dst)).or_default().insert(slot);
    }

    /// What is remembered of connections is gone.
    pub fn forget(&mut self) {
        self.given.clear();
        self.bound.clear();
        self.left.clear();
    }

    pub(super) fn fates(
        &mut self,
        port: usize,
        arrival: &Arrival,
        packet: &Meaning,
        now: Tick,
        otherwise: &mut Option<BTreeSet<Slot>>,
    ) -> Vec<Fate> {
        let frame = &arrival.bytes;
        let link = self.world.links[self.equipment.links[port]];
        if !is_for_us(frame, packet.kind, link) {
            return vec![Fate::dropped(NotForUs)];
        }
        let address = packet.key.dst;
        let is_vip = self.vips().any(|vip| vip.address == address);
        let owner = is_vip && self.world.answer_arp;
        let fate = match packet.kind {
            Kind::Packet | Kind::IcmpError => {
                return self.tunnel_fates(port, arrival, packet, now, otherwise);
            }
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
    pub(super) fn service(&self, key: &FlowKey) -> Option<usize> {
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
        otherwise: &mut Option<BTreeSet<Slot>>,
    ) -> Vec<Fate> {
        let Some(service) = self.service(&packet.key) else {
            let error = packet.kind == Kind::IcmpError;
            return vec![Fate::dropped(if error { IcmpUnmatched } else { NoService })];
        };
        let given = self.given.get(&packet.key).cloned().unwrap_or_default();
        let slots = self.slots(service, packet, now, otherwise);
        let backends = &self.world.services[service].1;
        let backend = |slot| backends.iter().find(|backend| backend.slot == slot);
        let is_orphan = given.iter().any(|slot| backend(*slot).is_none());
        let may_be_reset = self.world.resets && packet.protocol == 6 && !is_syn(packet);
        let link = self.world.links[self.equipment.links[port]];
        let told = (is_orphan && may_be_reset && packet.kind == Kind::Packet)
            .then(|| Fate::refused(port, &arrival.bytes, packet, link.mac, BackendGone));
        let fate = |slot: Option<Slot>| match slot.and_then(backend) {
            Some(backend) => Fate { slot, ..self.fate(port, arrival, packet, backend) },
            None => Fate::dropped(NoBackend),
        };
        slots.into_iter().map(fate).chain(told).collect()
    }

    /// The backends that the packet may go to: Maglev's, one that the flow was given before, or, if it begins
    /// with this packet, one that the scheduler may choose.
    fn slots(
        &mut self,
        service: usize,
        packet: &Meaning,
        now: Tick,
        otherwise: &mut Option<BTreeSet<Slot>>,
    ) -> BTreeSet<Option<Slot>> {
        let key = &packet.key;
        let maglev = &self.forwarding.service(service as u32).expect("it is there").maglev;
        let scheduled = self.world.scheduled;
        let asked = match scheduled {
            Scheduled::Source(_) => FlowKey { src_port: 0, dst_port: 0, protocol: 0, ..*key },
            _ => *key,
        };
        let picked = maglev.pick(asked.hash(self.forwarding.maglev_key()));
        let mut slots = BTreeSet::from([picked]);
        if packet.kind == Kind::Packet {
            self.latest.insert(*key, self.taken);
        }
        let is_syn = is_syn(packet);
        if is_syn && scheduled == Scheduled::Maglev {
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
            let given = self.given.entry(*key).or_default();
            given.extend(picked);
            if is_syn || is_datagram {
                *otherwise = Some(given.clone());
                let bound = self.bound.entry((key.src, key.dst)).or_default();
                let chosen: BTreeSet<Slot> = takers(&self.world.services[service].1)
                    .map(|taker| taker.slot)
                    .filter(|slot| match scheduled {
                        Scheduled::Maglev => false,
                        Scheduled::RoundRobin | Scheduled::LeastConnections => true,
                        Scheduled::Source(timeout_s) => timeout_s > 0 && bound.contains(slot),
                    })
                    .collect();
                given.extend(&chosen);
                slots.extend(chosen.into_iter().map(Some));
                if let Scheduled::Source(_) = scheduled {
                    bound.extend(slots.iter().flatten());
                }
            }
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
        let hash = packet.key.hash(&hash_key());
        let ip = self.meant(ingress, arrival, packet);
        self.wrapped(ingress, arrival, (packet, &ip), backend, hash)
    }

    /// The IP packet as its sender meant it.
    pub(super) fn meant(&self, port: usize, arrival: &Arrival, packet: &Meaning) -> Vec<u8> {
        let link = self.world.links[self.equipment.links[port]];
        let ip = &arrival.bytes[packet.ip.clone()];
        let partial = if link.partial_checksums { completed(packet, ip) } else { None };
        partial.unwrap_or_else(|| ip.to_vec())
    }

    /// What becomes of a packet on its way to this backend. `ip` is the IP packet as it is by now, and `hash` is
    /// the flow's.
    pub(super) fn wrapped(
        &self,
        ingress: usize,
        arrival: &Arrival,
        (packet, ip): (&Meaning, &[u8]),
        backend: &BackendSpec,
        hash: u64,
    ) -> Fate {
        let Some(port) = self.port_of(backend.link.into()).filter(|_| backend.reachable) else {
            return Fate::dropped(NextHopUnresolved);
        };
        let forms =
            |packet: &Meaning, ip: &[u8]| encapsulated(&backend.tunnel, packet, ip, hash).to_vec();
        let header_len = forms(packet, ip)[0].len() - ip.len();
        let in_front = arrival.start + packet.ip.start;
        let has_room = in_front >= header_len;
        if ip.len() <= backend.mtu.into() {
            let fits = || Fate::leaves(port, forms(packet, ip));
            return if has_room { fits() } else { Fate::dropped(NoHeadroom) };
        }
        if let Some(pieces) = cut(packet, ip, backend.mtu) {
            // No transport checksum covers a piece alone.
            let piece = Meaning { protocol: 0, ..packet.clone() };
            // The last stays where it is in the frame, and has the room of the others in front.
            let ahead: usize = pieces
                .split_last()
                .map_or(0, |(_, ahead)| ahead.iter().map(|piece| piece.len() - 20).sum());
            let rooms = |i| has_room || i + 1 == pieces.len() && in_front + ahead >= header_len;
            let (fit, lack): (Vec<_>, Vec<_>) =
                pieces.iter().enumerate().partition(|(i, _)| rooms(*i));
            let frames: Vec<_> = fit.iter().map(|(_, ip)| forms(&piece, ip)).collect();
            let drops = lack.iter().map(|_| NoHeadroom).chain(fit.iter().map(|_| TxRingFull));
            let drops = drops.chain([NoFrame, TxRingFull]).collect();
            return Fate { port, frames, drops, slot: None };
        }
        if packet.kind == Kind::IcmpError || !can_be_answered(packet) {
            return Fate::dropped(TooBigSilent);
        }
        let own = self.world.links[self.equipment.links[ingress]].mac;
        let bytes = too_big(&arrival.bytes, packet, ip, own, backend.mtu);
        let added = if packet.key.dst.as_v4().is_some() { 28 } else { 48 };
        if arrival.start < added {
            return Fate { drops: vec![TooBigSilent, NoHeadroom], ..Fate::dropped(NoHeadroom) };
        }
        Fate { drops: vec![TooBig, TooBigSilent, TxRingFull], ..Fate::answer(ingress, bytes) }
    }

    /// The port by which packets leave for this link.
    pub(super) fn port_of(&self, link: usize) -> Option<usize> {
        self.equipment.links.iter().position(|&of| of == link)
    }
}

/// Whether a connection begins.
pub(super) fn is_syn(packet: &Meaning) -> bool {
    packet.tcp_flags & 0x12 == 0x02
}

/// Whether the frame is addressed to this station, or asks a group who has an address.
pub(super) fn is_for_us(frame: &[u8], kind: Kind, link: Link) -> bool {
    let asks_a_group = frame[0] & 1 == 1 && matches!(kind, Kind::Arp | Kind::NeighbourSolicitation);
    frame[..6] == link.mac.0 || link.mac.0 == [0; 6] || asks_a_group
}

fn can_be_answered(packet: &Meaning) -> bool {
    let (src, dst): (Address, Address) = (packet.key.src, packet.key.dst);
    is_host(src) && src != dst
}
