//! Datagrams of this node's own clients, handed on to the workers one by one. Each client has a socket of
//! its own, so that the workers can tell them apart.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::SocketAddr,
    rc::Rc,
    time::Duration,
};

use socket2::{Domain, Socket, Type};
use tokio::{
    net::UdpSocket,
    sync::OwnedSemaphorePermit,
    task::JoinSet,
    time::{self, Instant},
};

use super::clients::Relay;

/// The largest datagram is smaller.
const LARGEST: usize = 1 << 16;
/// How long to wait when the kernel has no memory for another datagram.
const PAUSE: Duration = Duration::from_millis(10);

/// One client.
struct Client {
    workers: UdpSocket,
    moved: Cell<Instant>,
    _place: OwnedSemaphorePermit,
}

type Clients = Rc<RefCell<HashMap<SocketAddr, Rc<Client>>>>;

/// Hands datagrams on, for as many clients as there are places for; those of others are lost. Aborted, it
/// forgets all clients.
pub async fn relay(door: Rc<UdpSocket>, workers: SocketAddr, relay: Rc<Relay>) {
    let clients = Clients::default();
    let mut answers = JoinSet::new();
    let mut buffer = vec![0; LARGEST];
    loop {
        while answers.try_join_next().is_some() {}
        let Ok((length, from)) = door.recv_from(&mut buffer).await else {
            time::sleep(PAUSE).await;
            continue;
        };
        let known = clients.borrow().get(&from).cloned();
        let client = match known {
            Some(client) => client,
            None => {
                let Ok(place) = relay.places.clone().try_acquire_owned() else { continue };
                let Ok(socket) = connect(workers) else { continue };
                let moved = Cell::new(Instant::now());
                let client = Rc::new(Client { workers: socket, moved, _place: place });
                clients.borrow_mut().insert(from, client.clone());
                let idle = relay.limits.udp_idle;
                let (door, clients, client_there) = (door.clone(), clients.clone(), client.clone());
                answers.spawn_local(async move {
                    tokio::select! {
                        () = answer(&door, from, &client_there) => {}
                        () = super::idle_for(&client_there.moved, idle) => {}
                    }
                    clients.borrow_mut().remove(&from);
                });
                client
            }
        };
        client.moved.set(Instant::now());
        // As on any network, what finds no room is lost. So is what the workers' side has just refused.
        let _ = client.workers.send(&buffer[..length]).await;
    }
}

/// Hands answers back, until the socket breaks.
async fn answer(door: &UdpSocket, to: SocketAddr, client: &Client) {
    thread_local! {
        // One for all clients: nothing waits while it is in use.
        static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; LARGEST]);
    }
    loop {
        if client.workers.readable().await.is_err() {
            return;
        }
        let moved = BUFFER.with_borrow_mut(|buffer| {
            let length = client.workers.try_recv(buffer)?;
            // A client that does not listen any more loses them.
            let _ = door.try_send_to(&buffer[..length], to);
            io::Result::Ok(())
        });
        match moved {
            Ok(()) => client.moved.set(Instant::now()),
            // An ICMP error: a backend refused a datagram, and may take the next.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

fn connect(workers: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(workers), Type::DGRAM, None)?;
    socket.bind_device(Some(Relay::device()))?;
    socket.set_nonblocking(true)?;
    socket.connect(&workers.into())?;
    UdpSocket::from_std(socket.into())
}
