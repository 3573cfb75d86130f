//! Through the data path: a packet to the VIP, encapsulated to the backend as clients' packets are. So a
//! backend is found out whose tunnel is broken or which lacks the VIP, though its port is open.
//!
//! Over TCP it is a SYN, answered by SYN-ACK or RST; over UDP a datagram. The backend answers directly, to
//! this node's own address, from the VIP. The kernel knows no such connection and would reset it by a way
//! that leads to any backend. So probes come from ports on which a socket listens whose filter drops
//! everything: the kernel keeps silent, and a packet socket sees the answers, before a firewall or
//! `rp_filter` could drop what belongs to no connection. The outer packet is an ordinary UDP datagram, so
//! that the kernel finds the way to the tunnel's end.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    time::Duration,
};

use dataplane::wire::vxlan;
use etherparse::{
    IpHeaders, LaxPacketHeaders, NetHeaders, PacketBuilder, PacketBuilderStep, TransportHeader,
};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use tokio::{net::UdpSocket, sync::oneshot, task, time};
use zerocopy::IntoBytes;

use super::{
    super::{Exchange, Home, Target},
    Outcome, direct, failure,
};
use crate::{
    desired::{self, Family},
    filter::{
        JUMP_IF_EQUAL, LOAD_BYTE, LOAD_HALF, LOAD_HALF_AFTER_X, RETURN, X_IS_IPV4_HEADER_LEN,
    },
};

/// Ports that SYNs come from, in turn: a backend that missed our RST takes a new SYN from the same port for
/// a part of the connection before.
const PORTS: usize = 16;
/// What answers are cut to, in bytes: headers with all their options.
const MAX_HEADERS: usize = 256;
/// The inner packets' TTL, which no router decreases.
const TTL: u8 = 64;
/// A SYN's window: never used.
const WINDOW: u16 = 64_240;
/// How long answers are left alone after the kernel refused to hand one out.
const PAUSE: Duration = Duration::from_millis(100);

/// Sockets, made when they are first needed.
#[derive(Default)]
pub struct Tunnels {
    home: RefCell<Home>,
    /// By the source address of probes.
    ends: RefCell<HashMap<IpAddr, Rc<End>>>,
    /// By the source address of tunnels.
    outer: RefCell<HashMap<IpAddr, Rc<UdpSocket>>>,
}

impl Tunnels {
    /// Where probes come from, from now on.
    pub fn live_at(&self, home: &Home) {
        if *self.home.borrow() != *home {
            *self.home.borrow_mut() = home.clone();
            self.ends.borrow_mut().clear();
            self.outer.borrow_mut().clear();
        }
    }

    /// Asks the VIP by way of one backend.
    pub async fn probe(&self, target: &Target, exchange: &Exchange) -> Outcome {
        let Some(vip) = target.service.vip.address() else {
            return Outcome::Impossible("no backend has the addresses of this node".to_owned());
        };
        let Some(source) = self.source(vip.is_ipv6()) else {
            let family = Family::of(vip);
            return Outcome::Impossible(format!("this node has no {family} address to probe from"));
        };
        let vip = SocketAddr::new(vip, target.health().check.port.port);
        let asked = match target.health().check.port.protocol {
            desired::Protocol::Udp => self.datagram(target, source, vip, exchange).await,
            _ => self.syn(target, source, vip).await,
        };
        asked
            .unwrap_or_else(|error| failure(&format!("no answer from {vip} by the tunnel"), &error))
    }

    /// An address of this node that a backend can answer to.
    fn source(&self, v6: bool) -> Option<IpAddr> {
        let home = self.home.borrow();
        let link_local =
            |address: &IpAddr| matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
        let mut all = home.vteps.iter().chain(&home.addresses);
        all.find(|address| address.is_ipv6() == v6 && !link_local(address)).copied()
    }

    async fn syn(&self, target: &Target, source: IpAddr, vip: SocketAddr) -> io::Result<Outcome> {
        let end = self.end(source)?;
        let (port, sequence) = (end.port(), fastrand::u32(..));
        let packet = |builder: PacketBuilderStep<IpHeaders>, sequence, syn| {
            let tcp = builder.tcp(port, vip.port(), sequence, WINDOW);
            let (tcp, mut bytes) = (if syn { tcp.syn() } else { tcp.rst() }, Vec::new());
            tcp.write(&mut bytes, &[]).expect("a vector takes everything");
            bytes
        };
        let acknowledged = sequence.wrapping_add(1);
        let waiting = Waiting::new(&end, acknowledged, vip);
        self.send(target, &packet(self.inner(target, source, vip.ip()), sequence, true)).await?;
        match waiting.answer().await {
            Answer::Accepted => {
                let reset = packet(self.inner(target, source, vip.ip()), acknowledged, false);
                // The result stands, whatever becomes of the courtesy.
                let _ = self.send(target, &reset).await;
                Ok(Outcome::Passed(format!("{vip} accepts connections by the tunnel")))
            }
            Answer::Refused => {
                Ok(Outcome::Failed(format!("{vip} refuses connections by the tunnel")))
            }
        }
    }

    async fn datagram(
        &self,
        target: &Target,
        source: IpAddr,
        vip: SocketAddr,
        exchange: &Exchange,
    ) -> io::Result<Outcome> {
        let socket = UdpSocket::bind((source, 0)).await?;
        // Sends nothing; lets in what comes from the VIP, and the ICMP errors about it.
        socket.connect(vip).await?;
        let udp = self.inner(target, source, vip.ip()).udp(socket.local_addr()?.port(), vip.port());
        let mut packet = Vec::new();
        udp.write(&mut packet, exchange.send.as_bytes())
            .map_err(|error| io::Error::other(error.to_string()))?;
        self.send(target, &packet).await?;
        let len = direct::answer(&socket, exchange).await?;
        Ok(Outcome::Passed(format!("{vip} answered by the tunnel with {len} bytes")))
    }

    /// The headers inside the tunnel, as far as they are the same for all probes.
    fn inner(&self, target: &Target, source: IpAddr, vip: IpAddr) -> PacketBuilderStep<IpHeaders> {
        let macs = (self.home.borrow().mac.0, target.backend().mac.0);
        let frame = PacketBuilder::ethernet2(macs.0, macs.1);
        match (source, vip) {
            (IpAddr::V4(source), IpAddr::V4(vip)) => frame.ipv4(source.octets(), vip.octets(), TTL),
            (IpAddr::V6(source), IpAddr::V6(vip)) => frame.ipv6(source.octets(), vip.octets(), TTL),
            _ => unreachable!("the source was chosen by the VIP's family"),
        }
    }

    /// Into the tunnel.
    async fn send(&self, target: &Target, frame: &[u8]) -> io::Result<()> {
        let backend = target.backend();
        let packet = [vxlan::Header::new(backend.vni.get()).as_bytes(), frame].concat();
        let socket = self.outer(backend.vtep.is_ipv6()).await?;
        socket.send_to(&packet, (backend.vtep, backend.port)).await?;
        Ok(())
    }

    /// The socket that tunnels of a family come from.
    async fn outer(&self, v6: bool) -> io::Result<Rc<UdpSocket>> {
        let configured = self.home.borrow().vteps.iter().find(|vtep| vtep.is_ipv6() == v6).copied();
        let any: IpAddr =
            if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let source = configured.unwrap_or(any);
        if let Some(socket) = self.outer.borrow().get(&source) {
            return Ok(socket.clone());
        }
        let socket = Rc::new(UdpSocket::bind((source, 0)).await?);
        self.outer.borrow_mut().insert(source, socket.clone());
        Ok(socket)
    }

    fn end(&self, source: IpAddr) -> io::Result<Rc<End>> {
        if let Some(end) = self.ends.borrow().get(&source) {
            return Ok(end.clone());
        }
        let end = Rc::new(End::new(source)?);
        self.ends.borrow_mut().insert(source, end.clone());
        Ok(end)
    }
}

/// What a backend says to a SYN.
#[derive(Debug)]
enum Answer {
    Accepted,
    Refused,
}

/// SYNs that wait for their answer, by the number that it acknowledges: ours are random, so no two wait
/// for the same, and nobody guesses one.
type Waiters = RefCell<HashMap<u32, (SocketAddr, oneshot::Sender<Answer>)>>;

/// One of this node's addresses, with ports on which the kernel keeps silent.
struct End {
    ports: Vec<(Socket, u16)>,
    next: Cell<usize>,
    waiters: Rc<Waiters>,
    reader: task::AbortHandle,
}

impl End {
    fn new(source: IpAddr) -> io::Result<Self> {
        let domain = if source.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
        let any_port = SocketAddr::new(source, 0).into();
        let silent = || {
            let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
            socket.bind(&any_port)?;
            socket.attach_filter(&[SockFilter::new(RETURN, 0, 0, 0)])?;
            socket.listen(1)?;
            let port = socket.local_addr()?.as_socket().map_or(0, |address| address.port());
            Ok((socket, port))
        };
        let ports = (0..PORTS).map(|_| silent()).collect::<io::Result<Vec<_>>>()?;
        let numbers: Vec<u16> = ports.iter().map(|(_, port)| *port).collect();
        let ethertype = if source.is_ipv6() { libc::ETH_P_IPV6 } else { libc::ETH_P_IP };
        let ethertype = Protocol::from(i32::from((ethertype as u16).to_be()));
        // Without the Ethernet header, so that all links look alike.
        let packets = Socket::new(Domain::PACKET, Type::DGRAM, Some(ethertype))?;
        packets.attach_filter(&to_ports(&numbers, source.is_ipv6()))?;
        packets.set_nonblocking(true)?;
        // A datagram is a datagram: tokio needs to know no more of it.
        let packets = UdpSocket::from_std(packets.into())?;
        let waiters = Rc::<Waiters>::default();
        let reader = task::spawn_local(read(packets, waiters.clone())).abort_handle();
        Ok(Self { ports, next: Cell::new(0), waiters, reader })
    }

    /// The next one's turn.
    fn port(&self) -> u16 {
        let next = self.next.get();
        self.next.set((next + 1) % self.ports.len());
        self.ports[next].1
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// A SYN's place among the waiters, given up when it is dropped.
struct Waiting<'a> {
    end: &'a End,
    acknowledged: u32,
    told: oneshot::Receiver<Answer>,
}

impl<'a> Waiting<'a> {
    fn new(end: &'a End, acknowledged: u32, vip: SocketAddr) -> Self {
        let (tell, told) = oneshot::channel();
        end.waiters.borrow_mut().insert(acknowledged, (vip, tell));
        Self { end, acknowledged, told }
    }

    /// For ever, if there is none.
    async fn answer(mut self) -> Answer {
        match (&mut self.told).await {
            Ok(answer) => answer,
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.end.waiters.borrow_mut().remove(&self.acknowledged);
    }
}

/// Hands answers to those who wait for them.
async fn read(packets: UdpSocket, waiters: Rc<Waiters>) {
    let mut buffer = [0; MAX_HEADERS];
    loop {
        let Ok(len) = packets.recv(&mut buffer).await else {
            time::sleep(PAUSE).await;
            continue;
        };
        let Some((vip, acknowledged, answer)) = parse(&buffer[..len]) else { continue };
        let mut waiters = waiters.borrow_mut();
        if waiters.get(&acknowledged).is_some_and(|(asked, _)| *asked == vip)
            && let Some((_, tell)) = waiters.remove(&acknowledged)
        {
            let _ = tell.send(answer);
        }
    }
}

/// Who answers, to which number, and how.
fn parse(packet: &[u8]) -> Option<(SocketAddr, u32, Answer)> {
    let headers = LaxPacketHeaders::from_ip(packet).ok()?;
    let source: IpAddr = match headers.net? {
        NetHeaders::Ipv4(ip, _) => ip.source.into(),
        NetHeaders::Ipv6(ip, _) => ip.source.into(),
        NetHeaders::Arp(_) => return None,
    };
    let Some(TransportHeader::Tcp(tcp)) = headers.transport else { return None };
    let answer = match (tcp.ack, tcp.syn, tcp.rst) {
        (true, true, false) => Answer::Accepted,
        (true, false, true) => Answer::Refused,
        _ => return None,
    };
    Some((SocketAddr::new(source, tcp.source_port), tcp.acknowledgment_number, answer))
}

/// Lets in what is for one of these ports, so that the kernel's other traffic costs us nothing.
fn to_ports(ports: &[u16], v6: bool) -> Vec<SockFilter> {
    // Where the protocol's number is, and the destination port.
    let (protocol, port) = if v6 { (6, 40 + 2) } else { (9, 2) };
    let load_port = match v6 {
        true => vec![SockFilter::new(LOAD_HALF, 0, 0, port)],
        false => vec![
            SockFilter::new(X_IS_IPV4_HEADER_LEN, 0, 0, 0),
            SockFilter::new(LOAD_HALF_AFTER_X, 0, 0, port),
        ],
    };
    // Over the ports, to the refusal that follows them.
    let to_refusal = (load_port.len() + ports.len()) as u8;
    let is_tcp = SockFilter::new(JUMP_IF_EQUAL, 0, to_refusal, libc::IPPROTO_TCP as u32);
    let mut program = vec![SockFilter::new(LOAD_BYTE, 0, 0, protocol), is_tcp];
    program.extend(load_port);
    for (index, port) in ports.iter().enumerate() {
        // Over those that follow, and the refusal.
        let to_acceptance = (ports.len() - index) as u8;
        program.push(SockFilter::new(JUMP_IF_EQUAL, to_acceptance, 0, u32::from(*port)));
    }
    program.push(SockFilter::new(RETURN, 0, 0, 0));
    program.push(SockFilter::new(RETURN, 0, 0, MAX_HEADERS as u32));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a backend's TCP packet with these flags (ACK, SYN, RST) says, cut after so many bytes.
    fn answer(v6: bool, [ack, syn, rst]: [bool; 3], len: usize) -> Option<String> {
        let builder = PacketBuilder::ethernet2([0; 6], [0; 6]);
        let builder = match v6 {
            true => builder.ipv6([0xfd; 16], [2; 16], 64),
            false => builder.ipv4([1; 4], [2; 4], 64),
        };
        let mut tcp = builder.tcp(80, 50_000, 9, 100);
        tcp = if ack { tcp.ack(77) } else { tcp };
        tcp = if syn { tcp.syn() } else { tcp };
        tcp = if rst { tcp.rst() } else { tcp };
        let mut bytes = Vec::new();
        tcp.write(&mut bytes, &[]).unwrap();
        let packet = &bytes[14..];
        parse(&packet[..len.min(packet.len())])
            .map(|(from, to, how)| format!("{from} {to} {how:?}"))
    }

    #[test]
    fn a_syn_is_answered_by_syn_ack_or_rst_and_by_nothing_else() {
        let fd = format!("[{}]:80", Ipv6Addr::from([0xfd; 16]));
        for (v6, from, len) in [(false, "1.1.1.1:80", 40), (true, &*fd, 60)] {
            let whole = |flags| answer(v6, flags, len);
            assert_eq!(whole([true, true, false]), Some(format!("{from} 77 Accepted")));
            assert_eq!(whole([true, false, true]), Some(format!("{from} 77 Refused")));
            for other in [[true, false, false], [false, true, false], [false, false, true]] {
                assert_eq!(whole(other), None, "{other:?}");
            }
            for cut in 0..len {
                assert_eq!(answer(v6, [true, true, false], cut), None, "{cut} of {len} bytes");
            }
        }
    }
}
