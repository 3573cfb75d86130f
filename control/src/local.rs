//! What makes this node's own clients and own tasks those of the mesh, too: a link of our own, by which
//! they reach the workers like anyone else (`pair`), and sockets on the published ports that hand on what
//! clients on this node say (`clients`).

mod clients;
mod datagrams;
mod namespace;
mod pair;
mod streams;

use std::{cell::Cell, time::Duration};

use tokio::time::{self, Instant};

pub use self::{
    clients::{Limits, LocalClients, PublishedHere, Refused},
    namespace::Namespace,
    pair::{
        FAR_ADDRESS, FAR_ADDRESS6, FAR_INTERFACE, LocalLink, LocalLinkError, NODE_ADDRESS,
        NODE_INTERFACE, NODE_MAC,
    },
};

/// Waits until nothing has moved for so long.
async fn idle_for(moved: &Cell<Instant>, limit: Duration) {
    while moved.get().elapsed() < limit {
        time::sleep_until(moved.get() + limit).await;
    }
}
