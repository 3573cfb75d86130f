//! TCP and UDP to a backend's own address.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use tokio::net::{TcpStream, UdpSocket};

use super::{super::Exchange, Outcome, failure};

/// What of an answer is looked at, in bytes: as many buffers as checks are under way.
const MAX_ANSWER: usize = 2048;

/// Whether there can be a connection.
pub async fn tcp(to: SocketAddr) -> Outcome {
    match TcpStream::connect(to).await {
        Ok(stream) => {
            // By a RST: thousands of closed connections would hold on to their ports for a minute.
            let _ = stream.set_zero_linger();
            Outcome::Passed(format!("{to} accepts connections"))
        }
        Err(error) => failure(&format!("no connection to {to}"), &error),
    }
}

/// Whether a datagram is answered. Silence is for the timeout to end.
pub async fn udp(to: SocketAddr, exchange: &Exchange) -> Outcome {
    let asked = async {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0)).await?;
        // Connected, so that an ICMP error finds it, and nobody else's datagram.
        socket.connect(to).await?;
        socket.send(exchange.send.as_bytes()).await?;
        answer(&socket, exchange).await
    };
    match asked.await {
        Ok(len) => Outcome::Passed(format!("{to} answered with {len} bytes")),
        Err(error) => failure(&format!("no answer from {to}"), &error),
    }
}

/// The length of the first answer that is as expected.
pub async fn answer(socket: &UdpSocket, exchange: &Exchange) -> io::Result<usize> {
    let mut buffer = vec![0; MAX_ANSWER];
    loop {
        let len = socket.recv(&mut buffer).await?;
        let expected = exchange.expect.as_deref().unwrap_or_default();
        if contains(&buffer[..len], expected.as_bytes()) {
            return Ok(len);
        }
    }
}

/// Whether `what` stands anywhere in it.
pub fn contains(bytes: &[u8], what: &[u8]) -> bool {
    what.is_empty() || bytes.windows(what.len()).any(|window| window == what)
}
