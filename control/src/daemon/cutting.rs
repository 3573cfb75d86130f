//! Ends the connections of mesh addresses that are others' now: their answers will not come any more.
//!
//! A client that says something is reset by the workers, who find no connection of it. So each is made to say
//! something: it acknowledges a segment that is none of its connection's (RFC 9293 section 3.10.7.4).

use std::{io, net::IpAddr, time::Duration};

use dataplane::{
    flow::{FlowKey, protocol},
    nat::Slots,
    time::Tick,
};
use etherparse::PacketBuilder;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::{task, time};
use tracing::debug;

/// Segments sent at once, and the pause after them.
const AT_ONCE: usize = 64;
const PAUSE: Duration = Duration::from_millis(10);
const TTL: u8 = 64;

/// Ends all connections by ports of these banks. Datagrams go by another address from then on.
pub fn cut(slots: &Slots, banks: &[u16], now: Tick) {
    if banks.is_empty() {
        return;
    }
    let mut open = Vec::new();
    for (id, state, connection) in slots.connections().filter(|c| banks.contains(&c.0.bank())) {
        if !state.is_closed() {
            // No answer can come late, so that the port need not rest for longer than after a reset.
            slots.reset(id, state, now);
            open.push(connection.key);
        }
        slots.detach(id, state);
    }
    open.retain(|key| key.protocol == protocol::TCP);
    if !open.is_empty() {
        task::spawn(async move {
            if let Err(error) = make_speak(&open).await {
                debug!(%error, "clients of connections that were cut learn it only when they speak");
            }
        });
    }
}

async fn make_speak(clients: &[FlowKey]) -> io::Result<()> {
    // Headers and all: the VIP need not be an address of the node.
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    socket.set_nonblocking(true)?;
    for some in clients.chunks(AT_ONCE) {
        for key in some {
            let (IpAddr::V4(vip), IpAddr::V4(client)) = (key.dst.into(), key.src.into()) else {
                continue;
            };
            let mut segment = Vec::new();
            PacketBuilder::ipv4(vip.octets(), client.octets(), TTL)
                .tcp(key.dst_port, key.src_port, fastrand::u32(..), 0)
                .ack(0)
                .write(&mut segment, &[])
                .expect("a vector takes everything");
            let to = SockAddr::from(std::net::SocketAddr::from((client, 0)));
            // One that is lost is not repeated: the client's own keepalive does the same later.
            let _ = socket.send_to(&segment, &to);
        }
        time::sleep(PAUSE).await;
    }
    Ok(())
}
