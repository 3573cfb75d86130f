//! Pings: ICMP and ICMPv6 echo (RFC 792, RFC 4443 section 4), by one raw socket for each family. The kernel
//! finds their way and completes what it knows better. Of all the ICMP that a node gets, a filter lets in the
//! answers to our own pings only: a flood of anything else must not push them out of the buffer.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use etherparse::{IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use tokio::net::UdpSocket;

use crate::filter::{
    JUMP_IF_EQUAL, LOAD_BYTE, LOAD_BYTE_AFTER_X, LOAD_HALF, LOAD_HALF_AFTER_X, RETURN,
    X_IS_IPV4_HEADER_LEN,
};

/// What a ping carries: who captures it sees whose it is, and some firewalls distrust one without anything.
const PAYLOAD: &[u8] = b"wiremesh";
/// Bytes that answers may wait in, as the kernel counts: 768 for each. A few thousand nodes' fit, however long
/// we are kept from reading them.
const RECEIVE_BUFFER: usize = 4 << 20;
/// What is kept of an answer, in bytes: nothing but its sender is of interest.
const KEPT: u32 = 64;

/// A family's pings.
#[derive(Debug)]
pub struct Pings {
    socket: UdpSocket,
    v6: bool,
    /// Ours, as nobody guesses it from elsewhere.
    identifier: u16,
}

impl Pings {
    /// On the current tokio runtime. `from` is the address that they come from, if not what the kernel would
    /// take. The node need not have it yet.
    ///
    /// # Errors
    /// If there is no such socket: the family is switched off, or we lack CAP_NET_RAW or CAP_NET_ADMIN.
    pub fn open(v6: bool, from: Option<IpAddr>) -> io::Result<Self> {
        let (domain, protocol) = match v6 {
            true => (Domain::IPV6, Protocol::ICMPV6),
            false => (Domain::IPV4, Protocol::ICMPV4),
        };
        let identifier = fastrand::u16(..);
        let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
        socket.attach_filter(&answers_to(identifier, v6))?;
        socket.set_nonblocking(true)?;
        set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER)?;
        if let Some(from) = from {
            match v6 {
                true => socket.set_freebind_v6(true)?,
                false => socket.set_freebind_v4(true)?,
            }
            socket.bind(&SocketAddr::new(from, 0).into())?;
        }
        let socket = std::net::UdpSocket::from(socket);
        // What came before the filter was there.
        while socket.recv(&mut []).is_ok() {}
        // A datagram is a datagram: tokio needs to know no more of it.
        let socket = UdpSocket::from_std(socket)?;
        Ok(Self { socket, v6, identifier })
    }

    /// Sends one.
    ///
    /// # Errors
    /// If it does not leave: there is no way, or no room.
    pub fn send(&self, to: IpAddr, sequence: u16) -> io::Result<()> {
        let echo = IcmpEchoHeader { id: self.identifier, seq: sequence };
        let header = match self.v6 {
            // Its checksum is the kernel's to compute, RFC 3542 section 3.1.
            true => Icmpv6Header::new(Icmpv6Type::EchoRequest(echo)).to_bytes().to_vec(),
            false => Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), PAYLOAD)
                .to_bytes()
                .to_vec(),
        };
        let packet = [&header, PAYLOAD].concat();
        self.socket.try_send_to(&packet, SocketAddr::new(to, 0)).map(drop)
    }

    /// Waits until there are answers.
    pub async fn wait(&self) {
        // The runtime is there for as long as we are.
        let _ = self.socket.readable().await;
    }

    /// Who has answered: all that have come by the time that we last woke.
    pub fn answers(&self) -> impl Iterator<Item = IpAddr> {
        let mut buffer = [0; KEPT as usize];
        std::iter::from_fn(move || {
            let (_, from) = self.socket.try_recv_from(&mut buffer).ok()?;
            Some(from.ip())
        })
    }
}

/// Lets in echo replies with our identifier. Over IPv4 the packet begins with its IP header.
fn answers_to(identifier: u16, v6: bool) -> Vec<SockFilter> {
    const REPLY_V4: u32 = 0;
    const REPLY_V6: u32 = 129;
    let identifier = u32::from(identifier);
    let (mut program, [load_byte, load_half], reply) = match v6 {
        true => (Vec::new(), [LOAD_BYTE, LOAD_HALF], REPLY_V6),
        false => (
            vec![SockFilter::new(X_IS_IPV4_HEADER_LEN, 0, 0, 0)],
            [LOAD_BYTE_AFTER_X, LOAD_HALF_AFTER_X],
            REPLY_V4,
        ),
    };
    program.extend([
        SockFilter::new(load_byte, 0, 0, 0),
        SockFilter::new(JUMP_IF_EQUAL, 0, 3, reply),
        SockFilter::new(load_half, 0, 0, 4),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, identifier),
        SockFilter::new(RETURN, 0, 0, KEPT),
        SockFilter::new(RETURN, 0, 0, 0),
    ]);
    program
}
