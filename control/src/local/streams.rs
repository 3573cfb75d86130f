//! TCP connections of this node's own clients, handed on to the workers byte by byte.

use std::{cell::Cell, io, net::SocketAddr, rc::Rc, time::Duration};

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream, tcp::ReadHalf, tcp::WriteHalf},
    task,
    time::{self, Instant},
};

use super::clients::Relay;

/// How long a backend gets to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait when no socket can be had for a client.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Bytes that are moved at once.
const BUFFER: usize = 16 * 1024;

/// Takes connections, as long as there are places. Aborted, it leaves those that are there alone.
pub async fn accept(listener: TcpListener, workers: SocketAddr, relay: Rc<Relay>) {
    loop {
        let place = relay.places.clone().acquire_owned().await.expect("it is never closed");
        match listener.accept().await {
            Ok((client, _)) => {
                let idle = relay.limits.tcp_idle;
                drop(task::spawn_local(async move {
                    serve(client, workers, idle).await;
                    drop(place);
                }));
            }
            Err(_) => time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// A client's connection, from its first byte to its end.
async fn serve(client: TcpStream, workers: SocketAddr, idle: Duration) {
    match time::timeout(CONNECT_TIMEOUT, connect(workers)).await {
        Ok(Ok(backend)) => hand_on(client, backend, idle).await,
        _ => reset(&client),
    }
}

async fn connect(workers: SocketAddr) -> io::Result<TcpStream> {
    let socket = match workers {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.bind_device(Some(Relay::device()))?;
    socket.connect(workers).await
}

/// Copies both ways until both have said all, one of them breaks, or nobody says anything for so long. An
/// end becomes an end, and anything else a reset.
async fn hand_on(mut client: TcpStream, mut backend: TcpStream, idle: Duration) {
    let _ = client.set_nodelay(true);
    let _ = backend.set_nodelay(true);
    let moved = Cell::new(Instant::now());
    let ended = {
        let (mut from_client, mut to_client) = client.split();
        let (mut from_backend, mut to_backend) = backend.split();
        let there = one_way(&mut from_client, &mut to_backend, &moved);
        let back = one_way(&mut from_backend, &mut to_client, &moved);
        tokio::select! {
            ended = async { tokio::try_join!(there, back) } => ended.is_ok(),
            () = super::idle_for(&moved, idle) => false,
        }
    };
    if !ended {
        reset(&client);
        reset(&backend);
    }
}

async fn one_way(
    from: &mut ReadHalf<'_>,
    to: &mut WriteHalf<'_>,
    moved: &Cell<Instant>,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = from.read(&mut buffer).await?;
        moved.set(Instant::now());
        if read == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..read]).await?;
        moved.set(Instant::now());
    }
}

/// Has the other side see a reset once this is dropped.
fn reset(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// A connection, seen from both ends.
    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (near, listener.accept().await.unwrap().0)
    }

    /// A client and a backend whose connections are handed on to each other.
    async fn handed_on(idle: Duration) -> (TcpStream, TcpStream) {
        let (client, from_client) = pair().await;
        let (to_backend, backend) = pair().await;
        task::spawn_local(hand_on(from_client, to_backend, idle));
        (client, backend)
    }

    async fn rest(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        time::timeout(LONG / 6, stream.read_to_end(&mut bytes)).await.expect("in time")?;
        Ok(bytes)
    }

    #[tokio::test(flavor = "local")]
    async fn a_side_that_has_said_all_still_hears_the_other() {
        let (mut client, mut backend) = handed_on(LONG).await;
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(rest(&mut backend).await.unwrap(), b"question");
        let answer = vec![7; 1_000_000];
        let (sent, received) = tokio::join!(
            async {
                backend.write_all(&answer).await.unwrap();
                backend.shutdown().await
            },
            rest(&mut client)
        );
        sent.unwrap();
        assert!(received.unwrap() == answer);
    }

    #[tokio::test(flavor = "local")]
    async fn a_reset_of_one_side_is_a_reset_of_the_other() {
        for by_client in [true, false] {
            let (client, backend) = handed_on(LONG).await;
            let (one, mut other) = if by_client { (client, backend) } else { (backend, client) };
            reset(&one);
            drop(one);
            assert_eq!(rest(&mut other).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
    }

    #[tokio::test(flavor = "local")]
    async fn a_connection_is_reset_once_both_sides_are_idle_and_not_before() {
        let idle = Duration::from_millis(300);
        let (mut client, mut backend) = handed_on(idle).await;
        let begun = Instant::now();
        for _ in 0..4 {
            // One side that speaks is enough.
            time::sleep(idle / 2).await;
            backend.write_all(b"x").await.unwrap();
        }
        assert_eq!(rest(&mut client).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(begun.elapsed() >= idle * 3, "{:?}", begun.elapsed());
        assert_eq!(rest(&mut backend).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}
