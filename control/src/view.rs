//! A running daemon as others see it, from any thread and without asking it: what never changes after the
//! start, the newest of what does, and how many connections are remembered. Nothing here is changed.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use dataplane::{counters::Counters, flow::HashKey, forwarding::Forwarding, nat, time::Tick};
use tokio::sync::Mutex;

use crate::{
    config::{Config, Maglev},
    desired::{Backend, Desired, Drain, Service, port_ranges},
    health::{Board, Report, Verdict},
    liveness::Standings,
    local::Refused,
    plan::{Placement, Placements},
    source::swarm,
    status::{
        BackendStatus, PortStatus, ServiceStatus, Status, WorkerStatus, drops, events, losses,
        own_drops,
    },
    workers::{Fleet, Handle, tick},
};

/// What the daemon does at one moment: shown anew with every change.
#[derive(Debug)]
pub struct View {
    /// Counts up with every change of what is forwarded.
    pub generation: u64,
    /// What is wanted, of all sources.
    pub desired: Desired,
    /// Where each backend is.
    pub placements: Placements,
    /// This node's own ends of tunnels, as far as they are configured.
    pub vteps: Vec<IpAddr>,
    /// This node's addresses: those of `vip = "node"`.
    pub addresses: Vec<IpAddr>,
    /// What the workers forward by.
    pub forwarding: Arc<Forwarding>,
    /// Why the last change of the configuration was refused, if it was.
    pub refused: Option<String>,
    /// Ports published on this node that clients on it can't reach, and why.
    pub local_refused: Refused,
    /// What pings say of the nodes that tunnels lead to.
    pub standings: Standings,
    /// Whether one of our interfaces is gone.
    pub link_missing: bool,
    /// What is known of the Docker Swarm, if one is read.
    pub swarm: Option<Arc<swarm::State>>,
}

impl View {
    /// All services, each with its backends' placements.
    pub fn services(&self) -> impl Iterator<Item = Placed<'_>> {
        placed(&self.desired, &self.placements)
    }

    /// The service of this name.
    pub fn service(&self, name: &str) -> Option<Placed<'_>> {
        self.services().find(|(service, _)| service.name == name)
    }
}

/// A service, and where its backends are.
pub type Placed<'a> = (&'a Arc<Service>, &'a [Placement]);

/// All services, each with its backends' placements.
pub fn placed<'a>(
    desired: &'a Desired,
    placements: &'a Placements,
) -> impl Iterator<Item = Placed<'a>> {
    desired.services.iter().zip(placements.iter().map(|own| &**own))
}

/// All backends, each with its service and placement.
pub fn placed_backends<'a>(
    desired: &'a Desired,
    placements: &'a Placements,
) -> impl Iterator<Item = (&'a Service, &'a Backend, &'a Placement)> {
    let each = |(service, own): Placed<'a>| {
        service
            .backends
            .iter()
            .zip(own)
            .map(|(backend, placement)| (&**service, backend, placement))
    };
    placed(desired, placements).flat_map(each)
}

/// What a backend does, in a word.
pub fn state(backend: &Backend, placement: &Placement) -> &'static str {
    match (&placement.unreachable, backend.weight) {
        _ if placement.drained => "drained",
        (Some(_), _) => "unreachable",
        (None, _) if placement.is_down() => "down",
        (None, 0) => "draining",
        (None, _) => "active",
    }
}

/// How long a drain lasts yet, in seconds; `None` if for ever, or no more.
fn drain_left_s(drain: Drain) -> Option<u64> {
    let left = drain.deadline()?.duration_since(SystemTime::now()).ok()?;
    Some(left.as_secs())
}

/// Why a backend is unreachable or down.
pub fn reason(placement: &Placement) -> Option<String> {
    let down = || match &placement.health {
        Some(Verdict::Down { reason }) => Some(reason.to_string()),
        _ => None,
    };
    placement.unreachable.clone().or_else(down)
}

/// What does not change after the start.
#[derive(Debug)]
pub struct Observed {
    /// The node's name.
    pub node: String,
    /// The workers.
    pub workers: Arc<[Handle]>,
    /// Their queues, as they were bound.
    pub ports: Vec<Vec<PortStatus>>,
    /// Connections of mode `nat`, of all workers.
    pub nat: Option<Arc<nat::Slots>>,
    /// What the connection tables are hashed with.
    pub hash_key: HashKey,
    /// Entries of each connection table.
    pub capacity: u32,
    /// Slots for backends.
    pub slots: usize,
    /// How backends are chosen.
    pub maglev: Maglev,
    /// Services, and backends, that have metrics of their own.
    pub metrics_limit: usize,
    /// What the workers count time from.
    pub start: Instant,
    /// The last results of health checks.
    pub board: Arc<Board>,
    census: Arc<Mutex<Option<Taken>>>,
}

/// A census, and when it was taken and how long that took.
#[derive(Debug)]
struct Taken {
    census: Arc<Census>,
    at: Instant,
    took: Duration,
}

/// How many connections are remembered.
#[derive(Debug, Default)]
pub struct Census {
    /// By their backend's slot.
    pub by_slot: Vec<u64>,
    /// By worker.
    pub by_worker: Vec<u64>,
}

/// A census may be so old.
const CENSUS_AGE: Duration = Duration::from_secs(1);
/// And this many times as old as it took: walking large tables takes memory bandwidth from the workers,
/// whose caches it empties too.
const CENSUS_SHARE: u32 = 10;

impl Observed {
    /// Of a fleet that was started by this configuration. `ports` are those of each worker.
    pub fn new(
        config: &Config,
        fleet: &Fleet,
        ports: Vec<Vec<PortStatus>>,
        board: Arc<Board>,
    ) -> Self {
        Self {
            node: config.node.name.clone(),
            workers: fleet.workers.clone(),
            nat: Some(fleet.nat.clone()),
            ports,
            hash_key: fleet.hash_key,
            capacity: config.connections.capacity,
            slots: config.limits.backends as usize,
            maglev: config.maglev.clone(),
            metrics_limit: config.api.metrics_limit as usize,
            start: fleet.start_time(),
            board,
            census: Arc::default(),
        }
    }

    /// Of one that has no workers, for tests.
    #[cfg(test)]
    pub fn without_workers(config: &Config) -> Self {
        Self {
            node: config.node.name.clone(),
            workers: Arc::default(),
            nat: None,
            ports: Vec::new(),
            hash_key: HashKey::from_seed(""),
            capacity: config.connections.capacity,
            slots: config.limits.backends as usize,
            maglev: config.maglev.clone(),
            metrics_limit: config.api.metrics_limit as usize,
            start: Instant::now(),
            board: Arc::default(),
            census: Arc::default(),
        }
    }

    /// What time it is for the workers.
    pub fn now(&self) -> Tick {
        tick(self.start)
    }

    /// How many connections there are, or were a moment ago. Asked however often by however many, it walks
    /// the tables once in a while, on a thread beside.
    pub async fn census(self: &Arc<Self>) -> Arc<Census> {
        let mut taken = self.census.clone().lock_owned().await;
        if let Some(Taken { census, at, took }) = &*taken
            && at.elapsed() < CENSUS_AGE.max(*took * CENSUS_SHARE)
        {
            return census.clone();
        }
        let observed = self.clone();
        // It is noted there, so that one whose asker has gone meanwhile counts too.
        let counted = tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            let census = Arc::new(observed.count());
            let (at, took) = (Instant::now(), begun.elapsed());
            *taken = Some(Taken { census: census.clone(), at, took });
            census
        });
        counted.await.expect("counting does not panic")
    }

    fn count(&self) -> Census {
        let now = self.now();
        let mut by_slot = vec![0; self.slots];
        let count = |worker: &Handle| {
            let mut all = 0;
            worker.connections.for_each(now, |slot| {
                all += 1;
                if let Some(count) = by_slot.get_mut(slot as usize) {
                    *count += 1;
                }
            });
            all
        };
        let by_worker = self.workers.iter().map(count).collect();
        for (_, state, connection) in self.nat.iter().flat_map(|nat| nat.connections()) {
            // One that has ended only keeps its port from being used again too soon.
            if let Some(count) = by_slot.get_mut(connection.backend as usize)
                && !state.is_closed()
            {
                *count += 1;
            }
        }
        Census { by_slot, by_worker }
    }

    /// All workers' counters.
    pub fn counters(&self) -> impl Iterator<Item = &Counters> + Clone {
        self.workers.iter().map(|worker| &*worker.counters)
    }

    /// Whether packets are being steered to workers that forward them.
    pub fn ready(&self, view: &View) -> bool {
        !view.link_missing && !self.workers.iter().all(Handle::hung)
    }

    /// Everything.
    pub fn status(&self, view: &View, census: &Census) -> Status {
        let services = view.services().map(|(service, placements)| ServiceStatus {
            name: service.name.clone(),
            owner: service.owner.to_string(),
            vip: service.vip.to_string(),
            ports: port_ranges(&service.ports),
            backends: self.backends(service, placements, census),
        });
        Status {
            node: self.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            generation: view.generation,
            ready: self.ready(view),
            refused: view.refused.clone(),
            local_refused: view
                .local_refused
                .iter()
                .map(|(port, why)| (port.to_string(), why.clone()))
                .collect(),
            swarm: view.swarm.as_ref().map(|swarm| swarm.status.clone()),
            services: services.collect(),
            drops: drops(self.counters()),
            workers: self.workers.iter().enumerate().map(|(id, w)| self.worker(id, w)).collect(),
        }
    }

    /// A service's backends with what they were sent.
    pub fn backends(
        &self,
        service: &Service,
        placements: &[Placement],
        census: &Census,
    ) -> Vec<BackendStatus> {
        let reports = self.board.of(&service.name);
        let backend = |(backend, placement): (&Backend, &Placement)| {
            let slot = placement.slot as usize;
            let (packets, bytes) = self
                .counters()
                .map(|counters| counters.backend(slot))
                .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
            BackendStatus {
                name: backend.name.clone(),
                vtep: backend.vtep.to_string(),
                weight: backend.weight,
                drain_until: backend.drain.map(|drain| drain.to_string()),
                drain_left_s: backend.drain.and_then(drain_left_s),
                state: state(backend, placement).to_owned(),
                reason: reason(placement),
                health: placement.health.as_ref().map(|verdict| Report {
                    // That of the snapshot; the board may be a moment ahead.
                    verdict: verdict.word().to_owned(),
                    ..reports.get(&*backend.name).cloned().unwrap_or_default()
                }),
                packets,
                bytes,
                connections: census.by_slot.get(slot).copied().unwrap_or_default(),
            }
        };
        service.backends.iter().zip(placements).map(backend).collect()
    }

    fn worker(&self, id: usize, worker: &Handle) -> WorkerStatus {
        let ports = self.ports[id].iter().zip(worker.losses()).map(|(port, lost)| PortStatus {
            lost_in_kernel: lost.as_ref().map_or_else(BTreeMap::new, losses),
            ..port.clone()
        });
        WorkerStatus {
            id,
            core: worker.core,
            hung: worker.hung(),
            turns: worker.counters.turns(),
            ports: ports.collect(),
            counters: events(&worker.counters),
            drops: own_drops(&worker.counters),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_walk_whose_asker_has_gone_is_not_done_again() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let observed = Arc::new(Observed::without_workers(&Config::default()));
            // Asked once, and never again.
            let _ = observed.census().now_or_never();
            // Let in when the walk is over.
            assert!(observed.census.lock().await.is_some());
        });
    }
}
