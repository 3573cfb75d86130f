//! Teaches backends of mode `nat` where this node's mesh addresses live. A stock vxlan device floods no
//! questions to us, so its kernel would never find out: it learns only from what it hears. So each is asked
//! for its own address, in its tunnel, in the name of each mesh address: an ARP request (RFC 826), from which
//! the kernel learns the neighbour, and the device which tunnel it is behind. Answers are of no interest.
//!
//! One on this very node hears it from the local link, where its answers will have to go.
//!
//! What a backend asks later, its neighbour entry having aged, the workers answer.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    io, iter,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use dataplane::wire::{ethernet::MacAddr, vxlan};
use etherparse::{ArpEthIpv4Packet, ArpOperation, ArpPacket, Icmpv6Type, PacketBuilder};
use socket2::{Domain, Socket, Type};
use tokio::{
    net::UdpSocket,
    sync::watch,
    time::{self, Instant},
};
use tracing::debug;
use zerocopy::IntoBytes;

use crate::{
    desired::{Desired, Mode, Overlay, Owner},
    watching,
};

/// How often everything is taught again: well before a device's 300 s or a kernel's 60 s have passed.
const AGAIN: Duration = Duration::from_secs(30);
/// The same where nobody answers the kernel's questions: before it would have some, after 15 s at the earliest.
const ALONE_AGAIN: Duration = Duration::from_secs(10);
/// What is new is taught twice: the first may wait for the outer neighbour in vain.
const SOON: Duration = Duration::from_secs(1);
/// Lessons sent at once, and the pause after them: a large mesh is not to be a burst.
const AT_ONCE: usize = 64;
const PAUSE: Duration = Duration::from_millis(10);

/// What one backend is taught of one mesh address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Lesson {
    /// Where the tunnel ends.
    end: SocketAddr,
    /// Whether that is this very node.
    home: bool,
    vni: u32,
    inside: Inside,
    /// Whose kernel is to learn.
    task_mac: MacAddr,
    /// What it is to learn.
    mesh_mac: MacAddr,
    /// Whether nothing else will tell it: Docker's devices let no question out, and answer for what Docker
    /// knows only.
    alone: bool,
}

/// The task's address and the mesh address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Inside {
    V4 { task: Ipv4Addr, mesh: Ipv4Addr },
    V6 { task: Ipv6Addr, mesh: Ipv6Addr },
}

impl Inside {
    /// `None` if they are not of one family, and so never meet.
    fn of(task: IpAddr, mesh: IpAddr) -> Option<Self> {
        match (task, mesh) {
            (IpAddr::V4(task), IpAddr::V4(mesh)) => Some(Self::V4 { task, mesh }),
            (IpAddr::V6(task), IpAddr::V6(mesh)) => Some(Self::V6 { task, mesh }),
            _ => None,
        }
    }
}

impl Lesson {
    /// What goes into the tunnel: who has the task's address, tell the mesh address.
    fn packet(&self) -> Vec<u8> {
        match self.inside {
            Inside::V4 { task, mesh } => self.arp(task, mesh, false),
            Inside::V6 { task, mesh } => {
                solicitation((mesh, self.mesh_mac), (task, self.task_mac), self.vni)
            }
        }
    }

    /// After a question a kernel has a neighbour that it will soon ask whether it is still there; after an
    /// answer one that it believes in for at least 15 s.
    fn confirmation(&self) -> Option<Vec<u8>> {
        match self.inside {
            Inside::V4 { task, mesh } if self.alone => Some(self.arp(task, mesh, true)),
            // A swarm's mesh addresses are IPv4.
            _ => None,
        }
    }

    fn arp(&self, asked: Ipv4Addr, mesh: Ipv4Addr, is_answer: bool) -> Vec<u8> {
        let sender = (mesh, self.mesh_mac);
        Arp { sender, asked, to: self.task_mac, is_answer }.in_tunnel(self.vni)
    }
}

/// A neighbour solicitation, RFC 4861 section 4.3, in its frame and VXLAN: `sender` asks whether `asked` is still
/// there, which it hears with the sender's own MAC address. To it alone, for no device floods what it is sent.
fn solicitation(
    (sender, sender_mac): (Ipv6Addr, MacAddr),
    (asked, asked_mac): (Ipv6Addr, MacAddr),
    vni: u32,
) -> Vec<u8> {
    /// What has come by a router counts for nothing, RFC 4861 section 7.1.1.
    const HOP_LIMIT: u8 = 255;
    /// Source link-layer address, of one unit of 8 bytes.
    const OPTION: [u8; 2] = [1, 1];
    let said = [&asked.octets()[..], &OPTION, &sender_mac.0].concat();
    let mut packet = vxlan::Header::new(vni).as_bytes().to_vec();
    PacketBuilder::ethernet2(sender_mac.0, asked_mac.0)
        .ipv6(sender.octets(), asked.octets(), HOP_LIMIT)
        .icmpv6(Icmpv6Type::NeighborSolicitation)
        .write(&mut packet, &said)
        .expect("a vector takes everything");
    packet
}

/// What is said by ARP, RFC 826.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    sender: (Ipv4Addr, MacAddr),
    asked: Ipv4Addr,
    /// Who hears it.
    to: MacAddr,
    is_answer: bool,
}

impl Arp {
    /// Whether anybody has the address, RFC 5227 section 2.1.1.
    pub fn probe(mac: MacAddr, address: Ipv4Addr) -> Self {
        let sender = (Ipv4Addr::UNSPECIFIED, mac);
        Self { sender, asked: address, to: BROADCAST, is_answer: false }
    }

    /// That this one has it. An answer, where RFC 5227 section 2.3 has a question: one for an address of its
    /// own another node's workers would answer, and its control not hear.
    pub fn announcement(mac: MacAddr, address: Ipv4Addr) -> Self {
        Self { sender: (address, mac), asked: address, to: BROADCAST, is_answer: true }
    }

    /// In its frame and VXLAN: the payload of a tunnel's UDP.
    pub fn in_tunnel(&self, vni: u32) -> Vec<u8> {
        let Self { sender: (sender, sender_mac), asked, to, is_answer } = self;
        let said = ArpEthIpv4Packet {
            operation: if *is_answer { ArpOperation::REPLY } else { ArpOperation::REQUEST },
            sender_mac: sender_mac.0,
            sender_ipv4: sender.octets(),
            target_mac: if *is_answer { to.0 } else { [0; 6] },
            target_ipv4: asked.octets(),
        };
        let mut packet = vxlan::Header::new(vni).as_bytes().to_vec();
        PacketBuilder::ethernet2(sender_mac.0, to.0)
            .arp(ArpPacket::from(said))
            .write(&mut packet)
            .expect("a vector takes everything");
        packet
    }
}

/// Everybody's.
pub const BROADCAST: MacAddr = MacAddr([0xff; 6]);

/// All that is to be taught. `home` is whether there is a way to what runs on this very node. Who is `lost` hears
/// nothing, and may forget: when it is back, what it is to learn is new.
fn lessons(
    desired: &Desired,
    (own, lost): (&[IpAddr], &BTreeSet<IpAddr>),
    has_home: bool,
) -> BTreeSet<Lesson> {
    let mut all = BTreeSet::new();
    let translated = desired.services.iter().filter(|service| service.mode == Mode::Nat);
    for backend in translated.flat_map(|service| &service.backends) {
        let home = own.contains(&backend.vtep);
        if (home && !has_home) || lost.contains(&backend.vtep) {
            continue;
        }
        let Some(task) = backend.address else { continue };
        let its = desired.overlays.iter().filter(|overlay| overlay.vni == backend.vni);
        // One that is leaving still gets answers.
        let both = |o: &'_ Overlay| [&o.addresses[..], &o.leaving].concat().into_iter().enumerate();
        for (overlay, (index, mesh)) in its.flat_map(|o| both(o).map(move |mesh| (o, mesh))) {
            let Some(inside) = Inside::of(task, mesh) else { continue };
            all.insert(Lesson {
                end: SocketAddr::new(backend.vtep, backend.port),
                home,
                vni: backend.vni.get(),
                inside,
                task_mac: backend.mac,
                mesh_mac: overlay.mac,
                // Docker has given the first one.
                alone: overlay.owner == Owner::Swarm && index > 0,
            });
        }
    }
    all
}

/// A handle on the task that teaches; it ends with it.
#[derive(Debug)]
pub struct Teacher {
    wanted: watch::Sender<BTreeSet<Lesson>>,
    has_home: bool,
}

impl Teacher {
    /// Starts on the current tokio runtime. `vteps` are the tunnels' own ends, as far as they are configured,
    /// and `home` the one of those to this very node, if there are any.
    pub fn start(vteps: Vec<IpAddr>, home: Option<Ipv4Addr>) -> Self {
        let (wanted, told) = watch::channel(BTreeSet::new());
        tokio::spawn(Teaching { vteps, home, told, sockets: HashMap::new() }.run());
        Self { wanted, has_home: home.is_some() }
    }

    /// Says what is wanted, from now on. `own` are this node's addresses, `lost` the tunnels' ends that can't be
    /// reached.
    pub fn want(&self, desired: &Desired, own: &[IpAddr], lost: &BTreeSet<IpAddr>) {
        watching::tell(&self.wanted, lessons(desired, (own, lost), self.has_home));
    }
}

struct Teaching {
    vteps: Vec<IpAddr>,
    home: Option<Ipv4Addr>,
    told: watch::Receiver<BTreeSet<Lesson>>,
    /// By what they are bound to.
    sockets: HashMap<IpAddr, UdpSocket>,
}

impl Teaching {
    async fn run(mut self) {
        let mut taught = BTreeSet::new();
        let (mut all_at, mut alone_at) = (Instant::now() + AGAIN, Instant::now() + ALONE_AGAIN);
        loop {
            let next = all_at.min(alone_at);
            let new = match time::timeout_at(next, self.told.changed()).await {
                Ok(Err(_)) => return,
                Ok(Ok(())) => true,
                Err(_) => false,
            };
            let (wanted, now) = (self.told.borrow_and_update().clone(), Instant::now());
            let (all, alone) = (all_at <= now, alone_at <= now);
            let is_due =
                |lesson: &&Lesson| all || (alone && lesson.alone) || !taught.contains(*lesson);
            let due: Vec<Lesson> = wanted.iter().filter(is_due).copied().collect();
            for some in due.chunks(AT_ONCE) {
                for lesson in some {
                    if let Err(error) = self.teach(lesson).await {
                        // It is tried again, and a backend that can't be reached is shown elsewhere.
                        debug!(%error, ?lesson, "a backend could not be taught a mesh address");
                    }
                }
                time::sleep(PAUSE).await;
            }
            all_at = if all { now + AGAIN } else { all_at };
            alone_at = if alone { now + ALONE_AGAIN } else { alone_at };
            // Changes may go on for ever: they must not put anything off.
            all_at = if new { all_at.min(now + SOON) } else { all_at };
            taught = wanted;
        }
    }

    async fn teach(&mut self, lesson: &Lesson) -> io::Result<()> {
        let from = self.end(lesson);
        let socket = match self.sockets.entry(from) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(free) => free.insert(bound(from, lesson.home)?),
        };
        for packet in iter::once(lesson.packet()).chain(lesson.confirmation()) {
            socket.send_to(&packet, lesson.end).await?;
        }
        Ok(())
    }

    /// Where a lesson comes from, and answers are to go.
    fn end(&self, lesson: &Lesson) -> IpAddr {
        if let Some(home) = self.home.filter(|_| lesson.home) {
            return home.into();
        }
        let v6 = lesson.end.is_ipv6();
        let configured = self.vteps.iter().find(|vtep| vtep.is_ipv6() == v6).copied();
        configured.unwrap_or(if v6 { IpAddr::from([0; 16]) } else { IpAddr::from([0; 4]) })
    }
}

/// A socket to teach by. At home it speaks for the local link's far end, whose address the kernel has not.
fn bound(from: IpAddr, home: bool) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(SocketAddr::new(from, 0)), Type::DGRAM, None)?;
    if home {
        socket.set_ip_transparent_v4(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    UdpSocket::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    use etherparse::{LinkSlice, NetSlice, SlicedPacket, TransportSlice};

    use super::*;
    use crate::config::Config;

    const TEXT: &str = r#"
        [[overlay]]
        vni = 100
        addresses = ["10.99.1.250", "10.99.1.251"]
        [[service]]
        name = "shop"
        vip = "node"
        ports = ["80/tcp"]
        mode = "nat"
        vni = 100
        backend = [
            { name = "a", vtep = "127.0.0.1", address = "10.99.1.2" },
            { name = "b", vtep = "10.0.0.3", address = "10.99.1.3" },
        ]
        [[service]]
        name = "web"
        vip = "203.0.113.1"
        ports = ["80/tcp"]
        vni = 100
        backend = [{ name = "a", vtep = "10.0.0.3", mac = "02:00:00:00:00:01" }]
    "#;

    fn desired(port: u16) -> Desired {
        // A loopback address is no VTEP to the file; it is to a socket.
        let text = TEXT.replace("127.0.0.1", "10.0.0.2");
        let mut desired = Config::parse("test", &text).unwrap().0.desired;
        let mut shop = (*desired.services[0]).clone();
        shop.backends[0].vtep = IpAddr::from([127, 0, 0, 1]);
        shop.backends[0].port = port;
        desired.services[0] = shop.into();
        desired
    }

    /// What is in a tunnel's packet, which is for this station only.
    fn inside(packet: &[u8], to: [u8; 6]) -> SlicedPacket<'_> {
        assert_eq!(packet[..8], [8, 0, 0, 0, 0, 0, 100, 0]);
        let inner = SlicedPacket::from_ethernet(&packet[8..]).unwrap();
        let Some(LinkSlice::Ethernet2(ethernet)) = &inner.link else { panic!("{inner:?}") };
        assert_eq!(ethernet.destination(), to, "to nobody else");
        assert_eq!(ethernet.source(), [2, 0x42, 10, 99, 1, 250]);
        inner
    }

    #[test]
    fn nat_backends_elsewhere_are_asked_in_the_name_of_each_mesh_address() {
        let own = [IpAddr::from([10, 0, 0, 3])];
        let nobody = BTreeSet::new();
        assert_eq!(lessons(&desired(4789), (&own, &nobody), true).len(), 4, "DSR needs none");
        let all = lessons(&desired(4789), (&own, &nobody), false);
        assert_eq!(all.len(), 2, "one runs here, and there is no way: {all:?}");
        let packet = all.first().unwrap().packet();
        let inner = inside(&packet, [2, 0x42, 10, 99, 1, 2]);
        let Some(NetSlice::Arp(arp)) = &inner.net else { panic!("{inner:?}") };
        assert_eq!(arp.operation(), ArpOperation::REQUEST);
        assert_eq!(arp.sender_protocol_addr(), [10, 99, 1, 250]);
        assert_eq!(arp.sender_hw_addr(), [2, 0x42, 10, 99, 1, 250]);
        assert_eq!(arp.target_protocol_addr(), [10, 99, 1, 2]);
    }

    #[test]
    fn an_ipv6_backend_is_asked_by_a_solicitation_that_names_the_mesh_address_of_its_family() {
        let text = TEXT
            .replace("\"10.99.1.251\"", "\"fd00:99::250\"")
            .replace("vip = \"node\"", "vip = \"2001:db8::1\"")
            .replace(
                "address = \"10.99.1.2\"",
                "address = \"fd00:99::2\", mac = \"02:00:00:00:00:02\"",
            )
            .replace(
                "address = \"10.99.1.3\"",
                "address = \"fd00:99::3\", mac = \"02:00:00:00:00:03\"",
            )
            .replace("127.0.0.1", "10.0.0.2");
        let desired = Config::parse("test", &text).unwrap().0.desired;
        let all = lessons(&desired, (&[], &BTreeSet::new()), false);
        assert_eq!(all.len(), 2, "nothing of the IPv4 address: {all:?}");
        let packet = all.first().unwrap().packet();
        let inner = inside(&packet, [2, 0, 0, 0, 0, 2]);
        let Some(NetSlice::Ipv6(ip)) = &inner.net else { panic!("{inner:?}") };
        let ip = ip.header();
        let [mesh, task] = ["fd00:99::250", "fd00:99::2"].map(|a| a.parse::<Ipv6Addr>().unwrap());
        assert_eq!((ip.source_addr(), ip.destination_addr()), (mesh, task));
        assert_eq!(ip.hop_limit(), 255);
        let Some(TransportSlice::Icmpv6(icmp)) = &inner.transport else { panic!("{inner:?}") };
        assert!(icmp.is_checksum_valid(mesh.octets(), task.octets()));
        assert_eq!(icmp.icmp_type(), Icmpv6Type::NeighborSolicitation);
        let option = [1, 1, 2, 0x42, 10, 99, 1, 250];
        assert_eq!(icmp.payload(), [&task.octets()[..], &option].concat());
        assert_eq!(all.first().unwrap().confirmation(), None);
    }

    #[test]
    fn what_docker_knows_nothing_of_is_confirmed_for_no_device_answers_for_it() {
        let mut desired = desired(4789);
        let confirmed = |desired: &Desired| {
            let all = lessons(desired, (&[], &BTreeSet::new()), false);
            let all = all.iter().filter_map(|l| Some((l.inside, l.confirmation()?)));
            all.collect::<Vec<_>>()
        };
        assert!(confirmed(&desired).is_empty(), "workers answer what stock devices ask");
        desired.overlays[0].owner = Owner::Swarm;
        let all = confirmed(&desired);
        let is_further = |inside: &Inside| match inside {
            Inside::V4 { mesh, .. } => mesh.octets()[3] == 251,
            Inside::V6 { .. } => false,
        };
        assert!(all.len() == 2 && all.iter().all(|(inside, _)| is_further(inside)), "{all:?}");
        let inner = SlicedPacket::from_ethernet(&all[0].1[8..]).unwrap();
        let Some(NetSlice::Arp(arp)) = &inner.net else { panic!("{inner:?}") };
        assert_eq!(arp.operation(), ArpOperation::REPLY);
        assert_eq!(arp.sender_protocol_addr(), [10, 99, 1, 251]);
        let Some(LinkSlice::Ethernet2(ethernet)) = &inner.link else { panic!("{inner:?}") };
        assert_eq!(ethernet.destination()[..2], [2, 0x42], "by unicast: else it would not count");
    }

    #[tokio::test]
    async fn a_backend_is_taught_at_once_and_again_and_only_what_is_new_or_may_be_forgotten() {
        let backend = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let mut desired = desired(backend.local_addr().unwrap().port());
        let teacher = Teacher::start(Vec::new(), None);
        let own = [IpAddr::from([10, 0, 0, 3])];
        let heard = async |count| {
            let (mut buffer, mut last) = ([0; 128], Vec::new());
            for _ in 0..count {
                let received = backend.recv_from(&mut buffer);
                time::timeout(Duration::from_secs(10), received).await.unwrap().unwrap();
                // Of the ARP packet, the last byte of its sender.
                last.push(buffer[8 + 14 + 17]);
            }
            last
        };
        let (all, lost) = (BTreeSet::new(), [IpAddr::from([127, 0, 0, 1])].into());
        teacher.want(&desired, &own, &all);
        assert_eq!(heard(4).await, [250, 251, 250, 251], "at once, and soon after");
        teacher.want(&desired, &own, &all);
        desired.overlays[0].addresses.push(IpAddr::from([10, 99, 1, 252]));
        teacher.want(&desired, &own, &all);
        assert_eq!(heard(1).await, [252]);
        teacher.want(&desired, &own, &lost);
        // It takes what is told last when it comes to it.
        time::sleep(Duration::from_millis(100)).await;
        teacher.want(&desired, &own, &all);
        let begun = time::Instant::now();
        assert_eq!(heard(3).await, [250, 251, 252]);
        assert!(begun.elapsed() < SOON * 4 / 5, "at once when it is back, and not by the way");
        // Who leaves still gets answers.
        desired.overlays[0].leaving.push(IpAddr::from([10, 99, 1, 253]));
        teacher.want(&desired, &own, &all);
        assert_eq!(heard(1).await, [253]);
    }
}
