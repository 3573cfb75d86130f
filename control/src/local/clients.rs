//! Sockets on the ports that are published on this node's addresses. They serve the node's own clients,
//! whose packets never pass an interface that workers have, and keep the ports from being taken for the
//! node's own connections, whose answers would be steered to workers.
//!
//! Packets from elsewhere never get here: XDP takes them before the kernel sees them, and where it does
//! not, the sockets' filters drop them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
    thread,
    time::Duration,
};

use socket2::{Domain, SockFilter, Socket, Type};
use tokio::{
    net::{TcpListener, UdpSocket},
    sync::{Semaphore, watch},
    task::{self, AbortHandle, LocalSet},
    time,
};
use tracing::{info, warn};

use super::{FAR_ADDRESS, FAR_ADDRESS6, NODE_INTERFACE, datagrams, streams};
use crate::{
    desired::{Family, Protocol, ServicePort},
    filter::{JUMP_IF_EQUAL, LOAD_WORD, RETURN},
    watching,
};

/// How often a port that could not be had is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// What may not be exceeded.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections and UDP clients at once.
    pub clients: usize,
    /// How long a connection may be idle.
    pub tcp_idle: Duration,
    /// How long a UDP client is remembered.
    pub udp_idle: Duration,
}

/// The ports that are published on this node's addresses, and of which families these are.
pub type PublishedHere = BTreeMap<ServicePort, BTreeSet<Family>>;

/// Ports that this node's own clients can't use, and why.
pub type Refused = Arc<BTreeMap<ServicePort, String>>;

/// The thread that serves them. It ends with this, and so do all their connections.
#[derive(Debug)]
pub struct LocalClients {
    /// `None` while dropped.
    wanted: Option<watch::Sender<PublishedHere>>,
    refused: watch::Receiver<Refused>,
    thread: Option<thread::JoinHandle<()>>,
}

impl LocalClients {
    /// Serves nobody yet.
    ///
    /// # Errors
    /// If there is no thread, or no runtime for it.
    pub fn start(limits: Limits) -> io::Result<Self> {
        let (wanted, wanted_there) = watch::channel(PublishedHere::new());
        let (refused_there, refused) = watch::channel(Refused::default());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = thread::Builder::new().name("local-clients".to_owned()).spawn(move || {
            let relay = Rc::new(Relay { limits, places: Arc::new(Semaphore::new(limits.clients)) });
            LocalSet::new().block_on(&runtime, keep(wanted_there, refused_there, relay));
        })?;
        Ok(Self { wanted: Some(wanted), refused, thread: Some(thread) })
    }

    /// Serves these ports from now on, and no others. Connections that are there stay.
    pub fn want(&self, ports: PublishedHere) {
        let Some(wanted) = &self.wanted else { return };
        watching::tell(wanted, ports);
    }

    /// What can't be served, and every change of that.
    pub fn refused(&self) -> watch::Receiver<Refused> {
        self.refused.clone()
    }
}

impl Drop for LocalClients {
    fn drop(&mut self) {
        drop(self.wanted.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How clients get to the workers.
#[derive(Debug)]
pub struct Relay {
    /// What may not be exceeded.
    pub limits: Limits,
    /// One for each client that may be there yet.
    pub places: Arc<Semaphore>,
}

impl Relay {
    /// Where the workers take this port's packets.
    fn workers(port: u16, family: Family) -> SocketAddr {
        match family {
            Family::V4 => (FAR_ADDRESS, port).into(),
            Family::V6 => (FAR_ADDRESS6, port).into(),
        }
    }

    /// What they are reached by, whatever the routes say.
    pub fn device() -> &'static [u8] {
        NODE_INTERFACE.as_bytes()
    }
}

/// A port's sockets; closed when dropped.
struct Door(Vec<AbortHandle>);

impl Drop for Door {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

/// Opens and closes until nobody can want anything any more.
async fn keep(
    mut wanted: watch::Receiver<PublishedHere>,
    refused: watch::Sender<Refused>,
    relay: Rc<Relay>,
) {
    let mut open: BTreeMap<ServicePort, (BTreeSet<Family>, Door)> = BTreeMap::new();
    loop {
        let ports = wanted.borrow_and_update().clone();
        open.retain(|port, (families, _)| ports.get(port) == Some(&*families));
        // What was just closed is closed before anything is opened.
        task::yield_now().await;
        let mut failed = BTreeMap::new();
        for (port, families) in ports {
            if open.contains_key(&port) {
                continue;
            }
            match door(port, &families, &relay) {
                Ok(door) => drop(open.insert(port, (families, door))),
                Err(error) => drop(failed.insert(port, sentence(port, &error))),
            }
        }
        tell(&refused, failed);
        let some_failed = !refused.borrow().is_empty();
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() {
                return;
            },
            () = time::sleep(RETRY), if some_failed => {}
        }
    }
}

/// Shows and logs what is new.
fn tell(refused: &watch::Sender<Refused>, failed: BTreeMap<ServicePort, String>) {
    let before = refused.borrow().clone();
    let new = failed.iter().filter(|(port, why)| before.get(port) != Some(why));
    new.for_each(|(_, why)| warn!("{why}"));
    let had = before.keys().filter(|port| !failed.contains_key(port));
    had.for_each(|port| info!("{port} is no longer kept from clients on this node"));
    watching::tell(refused, Arc::new(failed));
}

fn sentence(port: ServicePort, error: &io::Error) -> String {
    let why = match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another program uses it: stop that, or publish another port".to_owned()
        }
        _ => error.to_string(),
    };
    format!("clients on this node don't reach {port}, others do: {why}")
}

/// Opens a port on this node's addresses: of the families that it is published on, and with IPv4 of IPv6 too, for
/// that is where `localhost` leads first.
fn door(
    ServicePort { port, protocol }: ServicePort,
    families: &BTreeSet<Family>,
    relay: &Rc<Relay>,
) -> io::Result<Door> {
    let mut door = Door(Vec::new());
    for from in Family::ALL {
        let (any, to): (IpAddr, _) = match from {
            Family::V4 => (Ipv4Addr::UNSPECIFIED.into(), Family::V4),
            Family::V6 => (Ipv6Addr::UNSPECIFIED.into(), *families.last().unwrap_or(&from)),
        };
        if !families.contains(&to) {
            continue;
        }
        let (address, workers) = (SocketAddr::from((any, port)), Relay::workers(port, to));
        let tasks = match protocol {
            Protocol::Tcp => bound(address, Type::STREAM).and_then(|socket| {
                socket.listen(BACKLOG)?;
                let listener = TcpListener::from_std(socket.into())?;
                Ok(task::spawn_local(streams::accept(listener, workers, relay.clone())))
            }),
            Protocol::Udp => bound(address, Type::DGRAM).and_then(|socket| {
                let socket = Rc::new(UdpSocket::from_std(socket.into())?);
                Ok(task::spawn_local(datagrams::relay(socket, workers, relay.clone())))
            }),
            // Workers translate none.
            Protocol::Sctp => return Ok(door),
        };
        match tasks {
            Ok(task) => door.0.push(task.abort_handle()),
            // A node without IPv6 has no clients who would use it.
            Err(error) if address.is_ipv6() && has_no_ipv6(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(door)
}

fn has_no_ipv6(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    code == Some(libc::EAFNOSUPPORT) || code == Some(libc::EADDRNOTAVAIL)
}

/// A socket that only clients on this node reach, whichever of its addresses they use.
fn bound(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if kind == Type::STREAM {
        // Connections of an earlier life that are still closing don't matter.
        socket.set_reuse_address(true)?;
    }
    socket.attach_filter(&only_from_this_node())?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// A packet of this node to itself comes by the loopback device, whichever of its addresses it is for. To
/// bind the sockets to that device would not do: the kernel looks for those of the address's.
fn only_from_this_node() -> [SockFilter; 4] {
    const INTERFACE: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_IFINDEX) as u32;
    // In every network namespace.
    const LOOPBACK: u32 = 1;
    [
        SockFilter::new(LOAD_WORD, 0, 0, INTERFACE),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, LOOPBACK),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{TcpStream, UdpSocket},
    };

    use super::*;

    const LIMITS: Limits = Limits {
        clients: 16,
        tcp_idle: Duration::from_secs(60),
        udp_idle: Duration::from_secs(60),
    };

    /// A port that nobody uses, taken until it is dropped.
    fn taken() -> (std::net::TcpListener, UdpSocket, u16) {
        loop {
            let tcp = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
            let port = tcp.local_addr().unwrap().port();
            if let Ok(udp) = UdpSocket::bind(("0.0.0.0", port)) {
                return (tcp, udp, port);
            }
        }
    }

    async fn until(refused: &mut watch::Receiver<Refused>, number: usize) -> Refused {
        let wait = refused.wait_for(|refused| refused.len() == number);
        time::timeout(3 * RETRY, wait).await.expect("in time").unwrap().clone()
    }

    #[tokio::test]
    async fn a_port_of_another_program_is_told_and_taken_once_it_is_free() {
        let (tcp, udp, port) = taken();
        let ports = [Protocol::Tcp, Protocol::Udp].map(|protocol| ServicePort { port, protocol });
        let clients = LocalClients::start(LIMITS).unwrap();
        let mut refused = clients.refused();
        clients.want(ports.map(|port| (port, [Family::V4].into())).into());
        let why = until(&mut refused, 2).await;
        let sentence = format!(
            "clients on this node don't reach {port}/tcp, others do: another program uses it: stop \
             that, or publish another port"
        );
        assert_eq!(why[&ports[0]], sentence);

        drop((tcp, udp));
        until(&mut refused, 0).await;
        let bind = std::net::TcpListener::bind(("0.0.0.0", port));
        assert_eq!(bind.unwrap_err().kind(), io::ErrorKind::AddrInUse, "it is reserved");
        let bind = UdpSocket::bind(("0.0.0.0", port));
        assert_eq!(bind.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        // There is no link here: no backend is reached.
        let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let read = client.read(&mut [0]);
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);

        clients.want(PublishedHere::new());
        let free = || UdpSocket::bind(("0.0.0.0", port)).is_ok();
        time::timeout(RETRY, async {
            while !free() {
                time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .expect("it is given back");
        drop(clients);
        std::net::TcpListener::bind(("0.0.0.0", port)).unwrap();
    }
}
