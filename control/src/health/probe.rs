//! How a backend is asked: over its own address, or through its tunnel.

mod direct;
mod http;
mod tunnel;

use std::{io, net::SocketAddr};

use super::{Home, Outcome, Probe, Target};

/// What probes share.
#[derive(Default)]
pub struct Probes {
    clients: http::Clients,
    tunnels: tunnel::Tunnels,
}

impl Probes {
    /// Where this node is.
    pub fn live_at(&self, home: &Home) {
        self.tunnels.live_at(home);
    }

    /// Asks once. How long that may take is the caller's to say.
    pub(super) async fn probe(&self, target: &Target) -> Outcome {
        let check = &target.health().check;
        let port = check.port.port;
        let at = |address| SocketAddr::new(address, port);
        match (&check.probe, target.backend().address) {
            (Probe::Tunnel(exchange), _) => self.tunnels.probe(target, exchange).await,
            (Probe::Tcp, Some(address)) => direct::tcp(at(address)).await,
            (Probe::Udp(exchange), Some(address)) => direct::udp(at(address), exchange).await,
            (Probe::Http(http), Some(address)) => self.clients.probe(at(address), http).await,
            (probe, None) => {
                Outcome::Impossible(format!("a check by {probe} needs the backend's `address`"))
            }
        }
    }
}

/// What went wrong: here, or at the backend's end.
fn failure(what: &str, error: &io::Error) -> Outcome {
    use io::ErrorKind::{AddrInUse, AddrNotAvailable, OutOfMemory, PermissionDenied};
    let here = [AddrInUse, AddrNotAvailable, OutOfMemory, PermissionDenied].contains(&error.kind())
        || matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS));
    let sentence = format!("{what}: {error}");
    if here { Outcome::Impossible(sentence) } else { Outcome::Failed(sentence) }
}
