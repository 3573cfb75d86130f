//! Further mesh addresses of this node, beside the one that Docker has given it, each with as many ports
//! again. Docker gives addresses from the bottom of a network's subnet upwards, so they are taken from the
//! top. It does not know of them: so each is asked for on all nodes before it is used, told to all as long as
//! it is (RFC 5227), and given up when Docker gives it away.
//!
//! What asks for them afterwards the workers answer, and tasks are taught by `mesh`.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::Ipv4Addr,
    sync::Arc,
    time::Duration,
};

use dataplane::wire::{ethernet::MacAddr, vxlan};
use etherparse::{
    ArpOperation, ArpPacketSlice, Icmpv4Type, LinkSlice, NetSlice, PacketBuilder, SlicedPacket,
    TransportSlice,
};
use ipnet::Ipv4Net;
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use tokio::{
    net::UdpSocket,
    sync::watch,
    task::AbortHandle,
    time::{self, Instant},
};
use tracing::{debug, info, warn};
use zerocopy::IntoBytes;

use super::table::Assigned;
use crate::{
    desired::container_mac,
    filter::{
        JUMP_IF_EQUAL, LOAD_BYTE, LOAD_BYTE_AFTER_X, LOAD_HALF_AFTER_X, RETURN,
        X_IS_IPV4_HEADER_LEN,
    },
    mesh::{self, Arp},
    watching,
};

/// How often an address is asked for before it is used, and how long an answer may take.
const PROBES: u32 = 3;
const PROBE_PAUSE: Duration = Duration::from_secs(1);
/// How often all is told which addresses are used. So long two nodes may use the same one at worst.
const ANNOUNCE: Duration = Duration::from_secs(30);
/// How soon it is told again if somebody else uses one of them.
const DEFEND: Duration = Duration::from_secs(1);
/// How long an address is left alone that somebody was found to have.
const AVOID: Duration = Duration::from_secs(300);
/// How often it is tried again to find one, or to hear of others at all.
const RETRY: Duration = Duration::from_secs(5);
/// Packets sent at once, and the pause after them: a large swarm is not to be a burst.
const AT_ONCE: usize = 64;
const PAUSE: Duration = Duration::from_millis(10);
/// Longest packet that is of interest, in bytes, padding included.
const MAX_PACKET: usize = 128;
/// Of pings: what a ping of anybody else's hardly has. And their TTL, which no router decreases.
const PING_ID: u16 = 0x776d;
const TTL: u8 = 64;

/// Where addresses are taken from, and who is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// How many are wanted.
    pub count: usize,
    /// The network's number.
    pub vni: u32,
    /// The UDP port of its tunnels.
    pub port: u16,
    /// Its addresses.
    pub subnet: Ipv4Net,
    /// The one that Docker has given this node. Frames come from its MAC address.
    pub own: Ipv4Addr,
    /// Where tunnels to other nodes end.
    pub peers: BTreeSet<Ipv4Addr>,
    /// What Docker has given away.
    pub assigned: Assigned,
}

impl Room {
    fn mac(&self) -> MacAddr {
        container_mac(self.own)
    }

    /// Whether it is the same network, and the same place in it.
    fn is_same_place(&self, other: &Self) -> bool {
        let place = |room: &Self| (room.vni, room.port, room.subnet, room.own);
        place(self) == place(other)
    }

    /// What may be taken, best first: from the top of the subnet downwards, and nothing of its lower half. Each
    /// node begins elsewhere, as far from the top as Docker's address for it is from the bottom, so that they
    /// seldom want the same.
    fn candidates(&self) -> impl Iterator<Item = Ipv4Addr> {
        let (network, broadcast) = (self.subnet.network(), self.subnet.broadcast());
        let (first, last) = (u64::from(network.to_bits()) + 1, u64::from(broadcast.to_bits()));
        let half = last.saturating_sub(first) / 2;
        let place = u64::from(self.own.to_bits()).saturating_sub(first) * self.count as u64;
        (0..half).map(move |step| Ipv4Addr::from_bits((last - 1 - (place + step) % half) as u32))
    }
}

/// What this node has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Further {
    /// Addresses that get new connections.
    pub used: Vec<Ipv4Addr>,
    /// Those that Docker has given to something that does not run yet: they keep the connections they have.
    pub leaving: Vec<Ipv4Addr>,
    /// Why there are not as many as are wanted, if that does not pass by itself.
    pub lack: Option<String>,
}

impl Further {
    /// What is left of it where Docker has given these away.
    pub fn beside(&self, assigned: &Assigned) -> Self {
        let mut left = self.clone();
        left.used.retain(|address| !assigned.has(address));
        left.leaving.extend(self.used.iter().filter(|address| assigned.has(address)));
        left.leaving.retain(|address| !assigned.live.contains(address));
        left
    }
}

/// Addresses as they are found, until it is dropped.
pub struct Keeper {
    room: watch::Sender<Option<Arc<Room>>>,
    found: watch::Receiver<Further>,
    task: AbortHandle,
}

impl Keeper {
    /// Starts on the current tokio runtime. `vtep` is this node's end of tunnels, if that is configured.
    pub fn start(vtep: Option<Ipv4Addr>) -> Self {
        let (room, told) = watch::channel(None);
        let (tell, found) = watch::channel(Further::default());
        let task = tokio::spawn(keep(vtep, told, tell)).abort_handle();
        Self { room, found, task }
    }

    /// Says what is wanted, from now on.
    pub fn want(&self, room: Option<Room>) {
        watching::tell(&self.room, room.map(Arc::new));
    }

    /// What there is.
    pub fn found(&self) -> Further {
        self.found.borrow().clone()
    }

    /// Waits for something else.
    pub async fn changed(&mut self) {
        if self.found.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep(
    vtep: Option<Ipv4Addr>,
    mut told: watch::Receiver<Option<Arc<Room>>>,
    tell: watch::Sender<Further>,
) {
    let (mut search, mut line) = (Search::default(), None::<Line>);
    loop {
        let room = told.borrow_and_update().clone();
        if room.is_none() {
            line = None;
        }
        let mut wake = Instant::now() + RETRY;
        if let Some(room) = room {
            search.follow(&room);
            if let Some(line) = search.connect(&room, &mut line, vtep) {
                let said;
                (said, wake) = search.turn(&room, Instant::now());
                line.send(&room, &said).await;
            }
        }
        watching::tell(&tell, search.further.clone());
        tokio::select! {
            changed = told.changed() => if changed.is_err() { return },
            heard = hear(line.as_ref()) => search.hear(heard, Instant::now()),
            () = time::sleep_until(wake) => {}
        }
    }
}

async fn hear(line: Option<&Line>) -> Heard {
    match line {
        Some(line) => line.hear().await,
        None => std::future::pending().await,
    }
}

/// Decides; neither sends nor hears.
#[derive(Default)]
struct Search {
    room: Option<Arc<Room>>,
    further: Further,
    probing: Option<Probing>,
    /// Found to be somebody's, and until when they are left alone.
    avoided: BTreeMap<Ipv4Addr, Instant>,
    /// When all are told next.
    announce: Option<Instant>,
}

/// What is said to all nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    /// Whether somebody has it.
    Question(Ipv4Addr),
    /// That this node has it.
    Announcement(Ipv4Addr),
}

impl Said {
    /// Payloads of a tunnel's UDP. Docker's devices let no container's answer by ARP out: so it is pinged, too, from
    /// the address that Docker has given us, and in a broadcast frame, for we don't know its MAC address.
    fn packets(self, room: &Room) -> Vec<Vec<u8>> {
        match self {
            Self::Question(address) => {
                let mut ping = vxlan::Header::new(room.vni).as_bytes().to_vec();
                PacketBuilder::ethernet2(room.mac().0, mesh::BROADCAST.0)
                    .ipv4(room.own.octets(), address.octets(), TTL)
                    .icmpv4_echo_request(PING_ID, 1)
                    .write(&mut ping, &[])
                    .expect("a vector takes everything");
                vec![Arp::probe(room.mac(), address).in_tunnel(room.vni), ping]
            }
            Self::Announcement(address) => {
                vec![Arp::announcement(room.mac(), address).in_tunnel(room.vni)]
            }
        }
    }
}

struct Probing {
    address: Ipv4Addr,
    sent: u32,
    next: Instant,
}

impl Search {
    /// There is another room, or others have moved in.
    fn follow(&mut self, room: &Arc<Room>) {
        if self.room.as_ref().is_some_and(|before| !before.is_same_place(room)) {
            *self = Self::default();
        }
        let left = self.further.beside(&room.assigned);
        for address in self.further.used.iter().filter(|a| !left.used.contains(a)) {
            info!("mesh address {address} is released: Docker has given it to another");
        }
        self.further = left;
        self.probing.take_if(|probing| room.assigned.has(&probing.address));
        self.room = Some(room.clone());
    }

    /// What to send and hear by; opened anew after a time in which there was no room, since others may have
    /// asked for our addresses meanwhile: so all are told of them again.
    fn connect<'a>(
        &mut self,
        room: &Room,
        line: &'a mut Option<Line>,
        vtep: Option<Ipv4Addr>,
    ) -> Option<&'a Line> {
        if line.as_ref().is_none_or(|line| line.port != room.port) {
            self.announce = None;
            *line = match Line::open(room.port, vtep) {
                Ok(line) => Some(line),
                Err(error) => {
                    let lack = format!("no further mesh address can be asked for: {error}");
                    self.further = Further { lack: Some(lack), ..Further::default() };
                    None
                }
            };
        }
        line.as_ref()
    }

    /// What is to be sent now, and when there may be more.
    fn turn(&mut self, room: &Room, now: Instant) -> (Vec<Said>, Instant) {
        let mut said = Vec::new();
        if self.probing.is_none() && self.further.used.len() < room.count {
            self.begin(room, now);
        }
        if let Some(probing) = self.probing.as_mut().filter(|probing| probing.next <= now) {
            if probing.sent < PROBES {
                said.push(Said::Question(probing.address));
                probing.sent += 1;
                probing.next = now + PROBE_PAUSE;
            } else {
                let address = probing.address;
                info!("mesh address {address}: nobody has it, it is used");
                self.further.leaving.retain(|leaving| *leaving != address);
                self.further.used.push(address);
                (self.probing, self.announce) = (None, Some(now));
            }
        }
        if self.announce.is_none_or(|due| due <= now) {
            said.extend(self.further.used.iter().copied().map(Said::Announcement));
            self.announce = Some(now + ANNOUNCE);
        }
        let next = match &self.probing {
            Some(probing) => probing.next,
            // The next one's turn.
            None if self.further.lack.is_none() => now,
            None => now + RETRY,
        };
        let is_done = self.further.used.len() >= room.count;
        let next = Some(next).filter(|_| !is_done);
        (said, next.into_iter().chain(self.announce).min().unwrap_or(now + RETRY))
    }

    /// Begins to ask for the next address, if there is one.
    fn begin(&mut self, room: &Room, now: Instant) {
        self.avoided.retain(|_, until| *until > now);
        let is_free = |address: &Ipv4Addr| {
            *address != room.own
                && !room.assigned.has(address)
                && !self.further.used.contains(address)
                && !self.avoided.contains_key(address)
        };
        let address = room.candidates().find(is_free);
        self.probing = address.map(|address| Probing { address, sent: 0, next: now });
        self.further.lack = address.is_none().then(|| {
            let (have, count, subnet) = (self.further.used.len(), room.count, room.subnet);
            format!(
                "{have} of {count} further mesh addresses: none is free in the upper half of {subnet}"
            )
        });
    }

    /// Somebody else has an address, or wants one. Of two who use the same, or want it at once, the one with
    /// the lower MAC address looks for another; but who has it from Docker keeps it.
    fn hear(&mut self, heard: Heard, now: Instant) {
        let Some(room) = &self.room else { return };
        let Heard { from, vni, mac, address, has } = heard;
        if mac == room.mac() || vni != room.vni || !room.peers.contains(&from) {
            return;
        }
        let lower = room.mac().0 < mac.0;
        if self.probing.as_ref().is_some_and(|probing| probing.address == address) {
            if has || lower {
                debug!(%from, "mesh address {address} is another's");
                self.probing = None;
                self.avoided.insert(address, now + AVOID);
            }
        } else if has && self.further.used.contains(&address) {
            if lower || mac == container_mac(address) {
                warn!("mesh address {address} is given up: {from} has it too");
                self.further.used.retain(|used| *used != address);
                self.avoided.insert(address, now + AVOID);
            } else if self.announce > Some(now + DEFEND) {
                warn!("mesh address {address} is used by {from} too, who should give it up");
                self.announce = Some(now + DEFEND);
            }
        } else if has {
            self.further.leaving.retain(|leaving| *leaving != address);
        }
    }
}

/// What another node said of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Heard {
    /// Where its tunnel ends.
    from: Ipv4Addr,
    vni: u32,
    mac: MacAddr,
    address: Ipv4Addr,
    /// Whether it has it, or only wants it.
    has: bool,
}

impl Heard {
    /// What a VXLAN packet, from its IP header on, says by ARP, or by its answer to a ping.
    fn of(packet: &[u8]) -> Option<Self> {
        let outer = SlicedPacket::from_ip(packet).ok()?;
        let Some(NetSlice::Ipv4(ip)) = &outer.net else { return None };
        let Some(TransportSlice::Udp(udp)) = &outer.transport else { return None };
        let (header, frame) = udp.payload().split_first_chunk::<8>()?;
        let vni = u32::from_be_bytes([0, header[4], header[5], header[6]]);
        let inner = SlicedPacket::from_ethernet(frame).ok()?;
        let (mac, address, has) = match (&inner.link, &inner.net, &inner.transport) {
            (_, Some(NetSlice::Arp(arp)), _) => by_arp(arp)?,
            (
                Some(LinkSlice::Ethernet2(ethernet)),
                Some(NetSlice::Ipv4(ip)),
                Some(TransportSlice::Icmpv4(icmp)),
            ) if matches!(icmp.icmp_type(), Icmpv4Type::EchoReply(echo) if echo.id == PING_ID) => {
                (MacAddr(ethernet.source()), ip.header().source_addr(), true)
            }
            _ => return None,
        };
        Some(Self { from: ip.header().source_addr(), vni, mac, address, has })
    }
}

/// Who says what of which address.
fn by_arp(arp: &ArpPacketSlice<'_>) -> Option<(MacAddr, Ipv4Addr, bool)> {
    let address = |bytes: &[u8]| Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?));
    let mac = MacAddr(arp.sender_hw_addr().try_into().ok()?);
    let sender = address(arp.sender_protocol_addr())?;
    match sender.is_unspecified() {
        false => Some((mac, sender, true)),
        true if arp.operation() == ArpOperation::REQUEST => {
            Some((mac, address(arp.target_protocol_addr())?, false))
        }
        true => None,
    }
}

/// Tunnels to all nodes, and what they bring of ARP. XDP leaves that to the kernel, but for questions that the
/// workers answer; whichever device the kernel gives it to, a packet socket sees it before.
struct Line {
    port: u16,
    out: UdpSocket,
    packets: UdpSocket,
}

impl Line {
    fn open(port: u16, vtep: Option<Ipv4Addr>) -> io::Result<Self> {
        let out = std::net::UdpSocket::bind((vtep.unwrap_or(Ipv4Addr::UNSPECIFIED), 0))?;
        out.set_nonblocking(true)?;
        let ip = Protocol::from(i32::from((libc::ETH_P_IP as u16).to_be()));
        // Without the outer Ethernet header, so that all links look alike.
        let packets = Socket::new(Domain::PACKET, Type::DGRAM, Some(ip))?;
        packets.attach_filter(&answers_in_tunnels(port))?;
        packets.set_nonblocking(true)?;
        // A datagram is a datagram: tokio needs to know no more of it.
        let packets = UdpSocket::from_std(packets.into())?;
        Ok(Self { port, out: UdpSocket::from_std(out)?, packets })
    }

    /// To all nodes.
    async fn send(&self, room: &Room, said: &[Said]) {
        let mut sent = 0;
        for packet in said.iter().flat_map(|said| said.packets(room)) {
            for peer in &room.peers {
                if let Err(error) = self.out.send_to(&packet, (*peer, self.port)).await {
                    // One that can't be reached has no tasks that we could disturb.
                    debug!(%error, %peer, "a node could not be asked for a mesh address");
                }
                sent += 1;
                if sent % AT_ONCE == 0 {
                    time::sleep(PAUSE).await;
                }
            }
        }
    }

    async fn hear(&self) -> Heard {
        let mut packet = [0; MAX_PACKET];
        loop {
            match self.packets.recv(&mut packet).await {
                Ok(len) => {
                    if let Some(heard) = Heard::of(&packet[..len]) {
                        return heard;
                    }
                }
                Err(_) => time::sleep(PAUSE).await,
            }
        }
    }
}

/// Lets in ARP and answers to pings that come in VXLAN, so that all else costs us nothing.
fn answers_in_tunnels(port: u16) -> [SockFilter; 14] {
    // UDP's destination; and behind UDP, VXLAN and two MAC addresses what is inside: its type, the protocol of
    // IPv4, and the type of ICMP.
    const TO: u32 = 2;
    const TYPE: u32 = 8 + 8 + 12;
    const PROTOCOL: u32 = TYPE + 2 + 9;
    const ICMP_TYPE: u32 = TYPE + 2 + 20;
    const ECHO_REPLY: u32 = 0;
    let is =
        |value: u32, jump_if, jump_else| SockFilter::new(JUMP_IF_EQUAL, jump_if, jump_else, value);
    [
        SockFilter::new(LOAD_BYTE, 0, 0, 9),
        is(libc::IPPROTO_UDP as u32, 0, 11),
        SockFilter::new(X_IS_IPV4_HEADER_LEN, 0, 0, 0),
        SockFilter::new(LOAD_HALF_AFTER_X, 0, 0, TO),
        is(port.into(), 0, 8),
        SockFilter::new(LOAD_HALF_AFTER_X, 0, 0, TYPE),
        is(libc::ETH_P_ARP as u32, 5, 0),
        is(libc::ETH_P_IP as u32, 0, 5),
        SockFilter::new(LOAD_BYTE_AFTER_X, 0, 0, PROTOCOL),
        is(libc::IPPROTO_ICMP as u32, 0, 3),
        SockFilter::new(LOAD_BYTE_AFTER_X, 0, 0, ICMP_TYPE),
        is(ECHO_REPLY, 0, 1),
        SockFilter::new(RETURN, 0, 0, MAX_PACKET as u32),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OTHER: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 12);

    fn at(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 0, last)
    }

    /// That of a node which Docker has given 10.0.0.`own`.
    fn room(own: u8, count: usize) -> Room {
        Room {
            count,
            vni: 4096,
            port: 4789,
            subnet: "10.0.0.0/24".parse().unwrap(),
            own: at(own),
            peers: [OTHER].into(),
            assigned: Assigned::default(),
        }
    }

    /// A search, its clock, and what it has sent.
    struct World {
        search: Search,
        now: Instant,
        sent: Vec<Said>,
    }

    impl World {
        fn new(room: Room) -> Self {
            let mut search = Search::default();
            search.follow(&Arc::new(room));
            Self { search, now: Instant::now(), sent: Vec::new() }
        }

        fn pass(&mut self, time: Duration) {
            let until = self.now + time;
            let room = self.search.room.clone().unwrap();
            // Bounded, lest it spin.
            for _ in 0..100 {
                let (said, next) = self.search.turn(&room, self.now);
                self.sent.extend(said);
                if next > until {
                    break;
                }
                self.now = next.max(self.now);
            }
            self.now = until;
        }

        fn hear(&mut self, mac: MacAddr, address: Ipv4Addr, has: bool) {
            self.search.hear(Heard { from: OTHER, vni: 4096, mac, address, has }, self.now);
        }

        fn change(&mut self, change: impl FnOnce(&mut Room)) {
            let mut room = Room::clone(self.search.room.as_ref().unwrap());
            change(&mut room);
            self.search.follow(&Arc::new(room));
        }

        fn used(&self) -> &[Ipv4Addr] {
            &self.search.further.used
        }
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn addresses_are_used_once_nobody_has_answered_for_three_seconds_and_all_are_told() {
        let mut world = World::new(room(2, 2));
        world.pass(Duration::from_millis(2900));
        assert_eq!(world.sent, [Said::Question(at(252)); 3]);
        assert!(world.used().is_empty());
        world.pass(Duration::from_millis(200));
        assert_eq!(world.used(), [at(252)]);
        let told = |last| Said::Announcement(at(last));
        assert_eq!(world.sent[3], told(252));
        world.pass(LONG);
        assert_eq!(world.used(), [at(252), at(251)]);
        world.sent.clear();
        world.pass(ANNOUNCE);
        assert_eq!(world.sent, [told(252), told(251)], "again and again");
    }

    #[test]
    fn nodes_begin_at_different_addresses_and_take_nothing_of_the_lower_half() {
        let best = |own, count| room(own, count).candidates().take(count).collect::<Vec<_>>();
        let nodes = [2, 3, 4, 5].map(|own| best(own, 3)).concat();
        assert_eq!(nodes.iter().collect::<BTreeSet<_>>().len(), 12, "{nodes:?}");
        for (subnet, top, len) in [
            ("10.0.0.0/24", at(254), 127),
            ("10.0.0.0/28", at(14), 7),
            ("10.0.0.0/30", at(2), 1),
            ("10.0.0.0/31", at(0), 0),
        ] {
            let room = Room { subnet: subnet.parse().unwrap(), ..room(2, 1) };
            let all: BTreeSet<_> = room.candidates().collect();
            assert_eq!(all.len(), len, "{subnet}: each once");
            assert!(len == 0 || all.last() == Some(&top), "{subnet}: {all:?}");
            assert!(all.iter().all(|address| room.subnet.contains(address)));
        }
        let wide = Room { subnet: "10.0.0.0/8".parse().unwrap(), ..room(2, 1) };
        assert_eq!(wide.candidates().next(), Some(Ipv4Addr::new(10, 255, 255, 253)));
    }

    #[test]
    fn what_docker_gives_away_is_neither_taken_nor_kept() {
        let mut world = World::new(room(2, 1));
        world.change(|room| room.assigned.given.extend([at(253)]));
        world.pass(Duration::from_secs(1));
        world.change(|room| room.assigned.live.extend([at(252)]));
        world.pass(LONG);
        assert_eq!(world.used(), [at(251)], "nor what is given away while it is asked for");

        world.change(|room| room.assigned.given.extend([at(251)]));
        assert_eq!((world.used(), &world.search.further.leaving[..]), (&[][..], &[at(251)][..]));
        world.pass(LONG);
        assert_eq!(world.used(), [at(250)], "another instead");
        world.change(|room| room.assigned.live.extend([at(251)]));
        assert!(world.search.further.leaving.is_empty(), "its owner needs it now");
        world.change(|room| room.assigned.live.extend([at(250)]));
        assert_eq!((world.used(), &world.search.further.leaving[..]), (&[][..], &[][..]));
    }

    #[test]
    fn one_that_is_leaving_may_come_back() {
        let mut world = World::new(room(2, 1));
        world.pass(LONG);
        world.change(|room| room.assigned.given.extend(room.subnet.hosts()));
        assert_eq!(world.search.further.leaving, [at(253)]);
        world.pass(LONG);
        let lack = world.search.further.lack.clone().unwrap();
        assert_eq!(
            lack,
            "0 of 1 further mesh addresses: none is free in the upper half of 10.0.0.0/24"
        );
        world.change(|room| room.assigned.given.clear());
        world.pass(LONG);
        let further = Further { used: vec![at(253)], ..Further::default() };
        assert_eq!(world.search.further, further);
    }

    #[test]
    fn who_has_an_address_already_keeps_it_and_of_two_who_want_it_the_higher_gets_it() {
        let (low, high) = (container_mac(at(1)), container_mac(at(9)));
        for (mac, has, taken) in [
            (low, true, at(252)),
            (high, true, at(252)),
            (low, false, at(253)),
            (high, false, at(252)),
        ] {
            let mut world = World::new(room(2, 1));
            world.pass(Duration::from_secs(1));
            world.hear(mac, at(253), has);
            world.pass(LONG);
            assert_eq!(world.used(), [taken], "{mac} {has}");
        }
        let mut world = World::new(room(2, 1));
        world.pass(Duration::from_secs(1));
        // Not of another network, not of a stranger, not of itself.
        let heard = Heard { from: OTHER, vni: 4096, mac: high, address: at(253), has: true };
        world.search.hear(Heard { vni: 4097, ..heard }, world.now);
        world.search.hear(Heard { from: at(77), ..heard }, world.now);
        world.hear(container_mac(at(2)), at(253), true);
        world.pass(LONG);
        assert_eq!(world.used(), [at(253)]);
    }

    #[test]
    fn of_two_who_use_the_same_address_the_lower_yields_and_both_do_to_dockers() {
        let (low, high) = (container_mac(at(1)), container_mac(at(9)));
        for (mac, kept) in [(low, true), (high, false), (container_mac(at(253)), false)] {
            let mut world = World::new(room(2, 1));
            world.pass(LONG);
            world.sent.clear();
            world.hear(mac, at(253), true);
            assert_eq!(world.used() == [at(253)], kept, "{mac}");
            world.pass(DEFEND);
            let told = world.sent.contains(&Said::Announcement(at(253)));
            assert_eq!(told, kept, "the other hears of it");
            world.hear(mac, at(253), false);
            world.pass(LONG);
            assert_eq!(world.used(), [at(if kept { 253 } else { 252 })], "not the same again soon");
        }
    }

    #[test]
    fn another_place_in_the_network_is_another_beginning() {
        let mut world = World::new(room(2, 1));
        world.pass(LONG);
        world.change(|room| room.own = at(3));
        assert_eq!(world.search.further, Further::default());
    }

    /// What may happen to a search.
    #[derive(Clone, Debug)]
    enum Event {
        Give(u8),
        Start(u8),
        TakeBack(u8),
        Hear(u8, u8, bool),
        Pass(u64),
    }

    fn event() -> impl Strategy<Value = Event> {
        let last = || 120..=255_u8;
        prop_oneof![
            last().prop_map(Event::Give),
            last().prop_map(Event::Start),
            last().prop_map(Event::TakeBack),
            (0..20_u8, last(), any::<bool>())
                .prop_map(|(mac, last, has)| Event::Hear(mac, last, has)),
            (0..5000_u64).prop_map(Event::Pass),
        ]
    }

    proptest! {
        #[test]
        fn whatever_happens_nothing_is_used_that_is_anothers_and_what_is_missing_is_found_again(
            events in prop::collection::vec(event(), 0..60),
        ) {
            let mut world = World::new(room(9, 3));
            world.pass(LONG);
            for event in events {
                match event {
                    Event::Give(last) => world.change(|room| {
                        room.assigned.given.insert(at(last));
                    }),
                    Event::Start(last) => world.change(|room| {
                        room.assigned.given.remove(&at(last));
                        room.assigned.live.insert(at(last));
                    }),
                    Event::TakeBack(last) => world.change(|room| {
                        room.assigned.given.remove(&at(last));
                        room.assigned.live.remove(&at(last));
                    }),
                    Event::Hear(mac, last, has) => world.hear(container_mac(at(mac)), at(last), has),
                    Event::Pass(ms) => world.pass(Duration::from_millis(ms)),
                }
                let room = world.search.room.clone().unwrap();
                let Further { used, leaving, .. } = &world.search.further;
                let all: BTreeSet<_> = used.iter().chain(leaving).collect();
                prop_assert_eq!(all.len(), used.len() + leaving.len(), "each once");
                prop_assert!(used.len() <= 3);
                for address in used {
                    prop_assert!(!room.assigned.has(address) && *address != room.own);
                    prop_assert!((128..=254).contains(&address.octets()[3]));
                }
                prop_assert!(leaving.iter().all(|address| !room.assigned.live.contains(address)));
            }
            world.pass(LONG);
            prop_assert_eq!(world.used().len(), 3);
        }
    }

    /// Of a tunnel from `OTHER`, from its IP header on.
    fn tunnel(payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        PacketBuilder::ipv4(OTHER.octets(), [10, 78, 0, 11], TTL)
            .udp(50_000, 4789)
            .write(&mut packet, payload)
            .unwrap();
        packet
    }

    #[test]
    fn what_one_node_says_another_hears() {
        let room = room(9, 1);
        let heard = |has| Heard { from: OTHER, vni: 4096, mac: room.mac(), address: at(253), has };
        let [arp, ping] = &Said::Question(at(253)).packets(&room)[..] else { panic!() };
        assert_eq!(Heard::of(&tunnel(arp)), Some(heard(false)));
        assert_eq!(Heard::of(&tunnel(ping)), None, "the same by other means");
        let packet = tunnel(&Said::Announcement(at(253)).packets(&room)[0]);
        assert_eq!(Heard::of(&packet), Some(heard(true)));
        for len in 0..packet.len() {
            assert_eq!(Heard::of(&packet[..len]), None, "{len}");
        }
    }

    #[test]
    fn a_container_is_heard_by_its_answer_to_our_ping_and_to_nobody_elses() {
        for (id, is_heard) in [(PING_ID, true), (PING_ID + 1, false)] {
            let mut answer = vxlan::Header::new(4096).as_bytes().to_vec();
            PacketBuilder::ethernet2(container_mac(at(253)).0, container_mac(at(2)).0)
                .ipv4(at(253).octets(), at(2).octets(), TTL)
                .icmpv4_echo_reply(id, 1)
                .write(&mut answer, &[])
                .unwrap();
            let mac = container_mac(at(253));
            let heard = Heard { from: OTHER, vni: 4096, mac, address: at(253), has: true };
            assert_eq!(Heard::of(&tunnel(&answer)), is_heard.then_some(heard));
        }
    }
}
