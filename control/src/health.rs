//! Health checks: which backends serve. Done on a thread of their own, so that neither the daemon's loop
//! nor a worker waits for a backend; what is thought of each goes into the plan.
//!
//! `settings` says what operators want, `verdict` how results make a verdict, `scheduler` when which check
//! is done and `probe` how, `board` shows the last results.

mod board;
mod probe;
mod scheduler;
mod settings;
mod verdict;

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use dataplane::wire::ethernet::MacAddr;
use tokio::{runtime, sync::watch};
use tracing::warn;

pub use self::{
    board::{Board, Report},
    settings::{AllDown, Check, Exchange, Health, Http, OnDown, Pace, Probe, Verify},
    verdict::{Outcome, Streak, Verdict, Verdicts},
};
use crate::desired::{Backend, Desired, Service};

/// A backend that is to be checked.
#[derive(Clone, Debug)]
struct Target {
    service: Arc<Service>,
    index: usize,
}

impl Target {
    fn backend(&self) -> &Backend {
        &self.service.backends[self.index]
    }

    fn health(&self) -> &Health {
        self.service.health.as_ref().expect("only services with checks have targets")
    }

    /// Whether results for the one say something about the other.
    fn asks_the_same(&self, other: &Self) -> bool {
        let question = |target: &Self| {
            let backend = target.backend();
            let tunnel = (backend.vtep, backend.mac, backend.vni, backend.port);
            (target.service.vip, backend.address, tunnel)
        };
        self.health().check == other.health().check && question(self) == question(other)
    }
}

/// This node, as probes through tunnels have to know it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Home {
    /// What frames inside tunnels come from.
    pub mac: MacAddr,
    /// Where tunnels come from, as far as that is configured.
    pub vteps: Vec<IpAddr>,
    /// Its addresses, which backends can answer to.
    pub addresses: Vec<IpAddr>,
}

/// What is to be checked, and from where.
#[derive(Debug, Default)]
struct Wanted {
    targets: Vec<Target>,
    home: Home,
}

/// Names of a service and of one of its backends.
pub type Name = (Arc<str>, Arc<str>);

/// Verdicts that nobody has asked for yet, the newest of each backend.
#[derive(Debug, Default)]
struct News {
    verdicts: Mutex<HashMap<Name, Verdict>>,
    told: watch::Sender<()>,
}

impl News {
    fn tell(&self, service: &Arc<str>, backend: &Arc<str>, verdict: Verdict) {
        let mut verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        verdicts.insert((service.clone(), backend.clone()), verdict);
        self.told.send_replace(());
    }
}

/// The checks under way. They end when it is dropped.
#[derive(Debug)]
pub struct Checks {
    wanted: watch::Sender<Arc<Wanted>>,
    news: Arc<News>,
    board: Arc<Board>,
}

impl Checks {
    /// Starts the thread, with nothing to check yet. At most `limit` checks are under way at once.
    ///
    /// # Errors
    /// If there can be no thread, or no runtime in it.
    pub fn start(limit: usize) -> io::Result<Self> {
        let (wanted, told) = watch::channel(Arc::default());
        let (news, board) = (Arc::<News>::default(), Arc::<Board>::default());
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let (to, shown) = (news.clone(), board.clone());
        thread::Builder::new().name("health".to_owned()).spawn(move || {
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, scheduler::run(told, limit, &to, &shown));
        })?;
        raise_file_limit();
        Ok(Self { wanted, news, board })
    }

    /// From now on these are checked, and no others. What is thought of those that were checked alike
    /// before stays.
    pub fn want(&self, desired: &Desired, home: Home) {
        let checked = desired.services.iter().filter(|service| service.health.is_some());
        let targets = checked.flat_map(|service| {
            let targets = 0..service.backends.len();
            targets.map(|index| Target { service: service.clone(), index })
        });
        self.wanted.send_replace(Arc::new(Wanted { targets: targets.collect(), home }));
    }

    /// Wakes whenever there are new verdicts.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.news.told.subscribe()
    }

    /// Those that are new: service, backend and what is thought of it.
    pub fn news(&self) -> HashMap<Name, Verdict> {
        std::mem::take(&mut *self.news.verdicts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The last results.
    pub fn board(&self) -> &Arc<Board> {
        &self.board
    }
}

/// A check has a socket, and a shell's soft limit of 1024 may be fewer than the workers leave.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        warn!("the limit of open files can't be raised: {error}");
    }
}

#[cfg(test)]
mod tests;
