//! The HTTP API: what operators and programs ask of a running daemon, and tell it.
//!
//! A handler asks the daemon nothing: it reads the [`View`] shown last and the workers' counters. What may
//! take long, because there may be tens of thousands of services, is rendered on a thread beside, one
//! answer at a time, so that a flood of questions can't keep control from following next hops.

mod changes;
pub mod client;
mod events;
mod metrics;
mod problem;
mod request;
pub mod resource;
mod routes;
mod socket;
mod tcp;

use std::{sync::Arc, time::Duration};

use axum::{Router, middleware};
use futures_util::future::{join, join_all};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{self, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{Semaphore, watch},
    task::spawn_blocking,
    time,
};
use tokio_io_timeout::TimeoutWriter;
use tracing::debug;

use self::tcp::Admitted;
pub use self::{
    changes::{Change, Changes, Condition, Refusal, Wanted},
    events::Event,
    problem::Problem,
    routes::document,
    socket::{ApiSocket, SocketError},
    tcp::{TcpDoor, TcpError},
};
use crate::view::{Observed, View};

/// Clients at once. More wait to be accepted.
const MAX_CONNECTIONS: usize = 128;
/// Of these, how many may watch: the others have to get a turn.
const MAX_WATCHERS: usize = 64;
/// How long a client may take to send a request's head, or be silent before the next one.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long an answer may take. A change waits for the disk, for next hops and for workers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a client may read nothing of what it is sent: its place is another's then.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest body of a request, in bytes: a service of some ten thousand backends.
const MAX_BODY: usize = 4 << 20;
/// How much of what nobody wants to know a client may still send after its last answer, in bytes, and how long.
const MAX_LINGER: u64 = 16 * MAX_BODY as u64;
const LINGER_TIMEOUT: Duration = Duration::from_secs(5);

/// What handlers work with.
#[derive(Clone)]
pub struct Api(Arc<Parts>);

struct Parts {
    observed: Arc<Observed>,
    views: watch::Receiver<Arc<View>>,
    changes: Changes,
    watchers: Arc<Semaphore>,
    /// For what takes long.
    turn: Arc<Semaphore>,
}

impl Api {
    /// For a daemon that shows itself in `views`, and whose services `changes` changes.
    pub fn new(observed: Observed, views: watch::Receiver<Arc<View>>, changes: Changes) -> Self {
        Self(Arc::new(Parts {
            observed: Arc::new(observed),
            views,
            changes,
            watchers: Arc::new(Semaphore::new(MAX_WATCHERS)),
            turn: Arc::new(Semaphore::new(1)),
        }))
    }

    fn observed(&self) -> &Arc<Observed> {
        &self.0.observed
    }

    fn changes(&self) -> &Changes {
        &self.0.changes
    }

    fn view(&self) -> Arc<View> {
        self.0.views.borrow().clone()
    }

    /// Does what may take long on a thread beside, one such thing at a time.
    async fn beside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let turn = self.0.turn.clone().acquire_owned().await.expect("never closed");
        let work = move || {
            // Kept until it is done, for whoever asked may have gone by then.
            let _turn = turn;
            work()
        };
        spawn_blocking(work).await.expect("rendering does not panic")
    }

    /// Answers whoever comes in by the socket or by TCP, until dropped.
    pub async fn serve(self, socket: ApiSocket, doors: Vec<TcpDoor>) {
        let router = routes::router(self);
        // What comes by TCP fills no place of those who may use the socket.
        let others = doors.into_iter().map(|door| serve_tcp(door, router.clone()));
        let others = join_all(others);
        join(serve_socket(socket, router), others).await;
    }
}

async fn serve_socket(socket: ApiSocket, router: Router) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let place = room.clone().acquire_owned().await.expect("never closed");
        let client = socket.accept().await;
        let router = router.clone();
        tokio::spawn(async move {
            answer(router, client, READ_TIMEOUT).await;
            drop(place);
        });
    }
}

async fn serve_tcp(door: TcpDoor, router: Router) {
    let plain = router.clone().layer(middleware::from_fn(routes::no_rebinding));
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let place = room.clone().acquire_owned().await.expect("never closed");
        let guest = door.accept().await;
        let (plain, router) = (plain.clone(), router.clone());
        tokio::spawn(async move {
            match guest.admit().await {
                Some(Admitted::Plain(client)) => answer(plain, client, READ_TIMEOUT).await,
                Some(Admitted::Tls(client)) => answer(router, client, READ_TIMEOUT).await,
                None => debug!("a client of the API has no certificate that is accepted"),
            }
            drop(place);
        });
    }
}

/// Answers one client's requests, for as long as it reads the answers.
async fn answer(router: Router, client: impl AsyncRead + AsyncWrite, read_timeout: Duration) {
    let mut client = TimeoutWriter::new(client);
    client.set_timeout(Some(read_timeout));
    let client = Box::pin(client);
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(client), TowerToHyperService::new(router))
        .without_shutdown()
        .await;
    match served {
        Ok(parts) => linger(parts.io.into_inner()).await,
        Err(error) => debug!("a client of the API is gone: {error}"),
    }
}

/// Closes in stages, RFC 9112 section 9.6. Who is refused while still writing, its body being too large, would
/// else see a broken pipe or a reset, and never our answer.
async fn linger(mut client: impl AsyncRead + AsyncWrite + Unpin) {
    let closing = async {
        client.shutdown().await?;
        io::copy(&mut client.take(MAX_LINGER), &mut io::sink()).await
    };
    // However it ends: the answer was given.
    let _ = time::timeout(LINGER_TIMEOUT, closing).await;
}

#[cfg(test)]
mod tests;
