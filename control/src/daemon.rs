//! `wiremesh run`: config → plan → publish, for as long as the process lives.
//!
//! One current-thread runtime, off the workers' cores as far as the kernel's scheduler can. Whatever goes
//! wrong after the start leaves the last good snapshot in force, unless an interface of ours is gone: our
//! sockets and the XDP program are gone with it, and only a new start brings them back.

mod announcing;
mod cutting;
mod report;
mod steering;
mod swarming;

use std::{
    collections::{BTreeSet, HashMap},
    io,
    net::IpAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use dataplane::{
    flow::HashKey,
    forwarding::Forwarding,
    maglev::Size,
    memory::AllocationError,
    nat,
    port::xsk::{self, XskError},
    publish::{Generation, Publisher},
    time::Tick,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{self, Instant},
};
use tracing::{error, info, warn};

use self::{
    announcing::Announcing,
    report::warn_too_large,
    steering::Steered,
    swarming::{Swarming, fit, newest},
};
use crate::{
    api::{Api, ApiSocket, Changes, Refusal, SocketError, TcpDoor, TcpError},
    causes,
    config::{self, Config, Exceeded, LoadError, Warning},
    desired::{Conflict, Desired, Overlay, Service, TunnelEnds, Vip, join},
    health::{Checks, Home, Verdict, Verdicts},
    link::{self, LinkError},
    liveness::{self, Liveness, Standings},
    local::{
        FAR_ADDRESS, FAR_ADDRESS6, Limits, LocalClients, LocalLink, LocalLinkError, NODE_ADDRESS,
        PublishedHere, Refused,
    },
    mesh::Teacher,
    next_hop::{HopState, Hops, NextHopError, NextHops},
    plan::{
        Inputs, Interface, Placement, Placements, Plan, PlanError, Planner, Settings, Steering,
        health_of,
    },
    source::{
        api::{Store, StoreError},
        file::{Cause, FileSource, FileSourceError},
        swarm::{self, Swarm, TlsError},
    },
    workers::{Fleet, NotSteered, Queues, StartError, worker_count},
};

/// How long the first snapshot waits for next hops: the kernel gives a silent neighbour up after 3 s.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a new configuration waits for them, so that those that answer take connections from its first
/// packet on. The others join when they are resolved.
const SETTLE_TIMEOUT: Duration = Duration::from_millis(200);
/// How long workers get to acknowledge a snapshot; a sleeping one is woken.
const ACKNOWLEDGE_TIMEOUT: Duration = Duration::from_millis(500);
/// How often old snapshots are freed.
const TICK: Duration = Duration::from_millis(100);
/// How often our interfaces are looked at: their MAC address or MTU may change.
const RELINK: Duration = Duration::from_secs(2);
/// How long the kernel gets to tell about them.
const LINK_TIMEOUT: Duration = Duration::from_secs(1);
/// How long one may be gone: it may only be on its way back under its name.
const MISSING_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the daemon can't start, or had to stop.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum RunError {
    /// The configuration.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Config(#[from] LoadError),
    /// Watching it.
    #[error(transparent)]
    FileSource(#[from] FileSourceError),
    /// What was given through the API.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Store(#[from] StoreError),
    /// The file and the API want what excludes each other.
    #[error(transparent)]
    #[diagnostic(help(
        "change the configuration file; what is the API's is kept in api.state_directory, a file each"
    ))]
    Conflict(#[from] Conflict),
    /// The interfaces.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The next hops.
    #[error(transparent)]
    NextHop(#[from] NextHopError),
    /// The link of our own.
    #[error(transparent)]
    LocalLink(#[from] LocalLinkError),
    /// Memory for translated connections.
    #[error("no memory for nat.addresses")]
    Nat(#[from] AllocationError),
    /// Sockets, steering, threads.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The first plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Steering VIPs.
    #[error(transparent)]
    Steer(#[from] NotSteered),
    /// What the process was not started for.
    #[error(transparent)]
    Exceeded(#[from] Exceeded),
    /// The privileges, or the kernel.
    #[error(transparent)]
    Xsk(#[from] XskError),
    /// The API's socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The API's addresses.
    #[error(transparent)]
    Tcp(#[from] TcpError),
    /// What is needed to ask for the Docker Swarm.
    #[error("the Docker Swarm can't be read; see source.swarm")]
    Swarm(#[from] TlsError),
    /// The thread that checks backends.
    #[error("health checks can't be started")]
    Health(#[source] io::Error),
    /// The thread that pings nodes.
    #[error("nodes can't be pinged")]
    Liveness(#[source] io::Error),
    /// The thread for clients on this node.
    #[error("clients on this node can't be served")]
    LocalClients(#[source] io::Error),
    /// Signals.
    #[error("cannot listen for signals")]
    Signal(#[source] io::Error),
    /// An interface of ours is gone.
    #[error(
        "interface {0} is gone, and our sockets and XDP program with it: start again once it is back"
    )]
    LinkGone(String),
    /// Another interface has its name.
    #[error(
        "interface {0} was deleted and made anew, and our sockets and XDP program went with the old \
         one: start again"
    )]
    LinkReplaced(String),
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// If it can't start, or loses an interface. Other failures are logged and change nothing.
pub async fn run(path: &Path) -> Result<(), RunError> {
    let mut source = FileSource::new(path)?;
    let (mut config, warnings) = source.load()?;
    log_warnings(&warnings);
    // First, for whoever lacks this privilege may well not listen either.
    xsk::permitted()?;
    let socket = ApiSocket::bind(&config.api.socket, config.api.socket_mode).await?;
    let doors = TcpDoor::open_all(&config.api).await?;
    // Read once nobody else can be using it.
    let (store, services) = Store::open(&config.api.state_directory, &config.maglev)?;
    let wanted = Wanted {
        file: std::mem::take(&mut config.desired.services),
        api: services.values().cloned().collect(),
        overlays: std::mem::take(&mut config.desired.overlays),
        swarm: swarm::Wanted::default(),
    };
    let swarm = config.source.swarm.as_ref();
    let swarm = swarm.map(|swarm| Swarm::start(&config, swarm));
    let swarm = swarm.transpose()?;
    let mut daemon = Daemon::start(config, wanted).await?;
    let (shown, views) = watch::channel(daemon.view());
    let limits = daemon.config.limits.clone();
    let (changes, mut wanted) = Changes::start(store, services, limits, views.clone());
    let api = tokio::spawn(Api::new(daemon.observed(), views, changes).serve(socket, doors));
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signal)?;
    let mut hops = daemon.next_hops.subscribe();
    let mut standings = daemon.standings.clone();
    let mut verdicts = daemon.checks.subscribe();
    let mut local_refused = daemon.local_refused.clone();
    let mut swarm_states = swarm.as_ref().map(Swarm::subscribe);
    let mut tick = time::interval(TICK);
    tick.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    let mut relink = time::interval(RELINK);
    relink.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    let ended = loop {
        tokio::select! {
            _ = terminate.recv() => break Ok(()),
            _ = interrupt.recv() => break Ok(()),
            change = source.next() => {
                daemon.reload(change.cause, change.loaded).await;
                daemon.refit_swarm().await;
            }
            Some(wanted) = wanted.recv() => {
                let outcome = daemon.want(wanted.services, wanted.joined).await;
                daemon.refit_swarm().await;
                // Who is told that it is done shall see it.
                daemon.show(&shown);
                let _ = wanted.outcome.send(outcome);
            }
            Ok(()) = hops.changed() => daemon.rehop().await,
            Ok(()) = standings.changed() => daemon.rehop().await,
            Some(state) = newest(&mut swarm_states) => daemon.follow_swarm(state).await,
            Ok(()) = verdicts.changed() => daemon.rejudge().await,
            // To be shown.
            Ok(()) = local_refused.changed() => {}
            _ = tick.tick() => {
                daemon.publisher.retire();
                daemon.end_drains().await;
                daemon.end_waits().await;
            }
            _ = relink.tick() => {
                // At once after the start: what an earlier life has left may be too much.
                if let Some(announcing) = &mut daemon.announcing {
                    announcing.renew().await;
                }
                if let Err(lost) = daemon.relink().await {
                    break Err(lost);
                }
            }
        }
        daemon.show(&shown);
    };
    api.abort();
    // First, so that routers send packets elsewhere while we still forward them.
    daemon.announce_less(&BTreeSet::new()).await;
    info!("stopping: the kernel gets all packets again");
    drop(daemon);
    ended
}

/// What each source wants.
#[derive(Clone, Debug, Default)]
struct Wanted {
    file: Vec<Arc<Service>>,
    api: Vec<Arc<Service>>,
    /// Those of the file.
    overlays: Vec<Overlay>,
    swarm: swarm::Wanted,
}

impl Wanted {
    fn join(&self, vteps: &[IpAddr], ends: &mut TunnelEnds) -> Result<Desired, Conflict> {
        let overlays = [&self.overlays[..], &self.swarm.overlays].concat();
        join(&[&self.file, &self.swarm.services, &self.api], &overlays, vteps, ends)
    }

    /// Whether these are the very same services, in the same overlays.
    fn is(&self, joined: &Desired) -> bool {
        let all = self.file.iter().chain(&self.swarm.services).chain(&self.api);
        let overlays = self.overlays.iter().chain(&self.swarm.overlays);
        all.clone().count() == joined.services.len()
            && all.zip(&joined.services).all(|(own, joined)| Arc::ptr_eq(own, joined))
            && overlays.eq(&joined.overlays)
    }
}

/// The daemon's state.
struct Daemon {
    /// As it runs: with the services of all sources.
    config: Config,
    wanted: Wanted,
    interfaces: Vec<Interface>,
    /// This node's, on all its interfaces.
    addresses: Vec<IpAddr>,
    /// Connections of mode `nat`.
    nat: Arc<nat::Slots>,
    next_hops: NextHops,
    /// Of what was wanted last, even if it was refused.
    tunnel_ends: TunnelEnds,
    /// Whose ways are followed.
    vteps: BTreeSet<IpAddr>,
    liveness: Liveness,
    /// What that says of them.
    standings: watch::Receiver<Standings>,
    /// What is planned by.
    hops: Hops,
    checks: Checks,
    teacher: Teacher,
    verdicts: Verdicts,
    planner: Planner,
    /// Must outlive the workers, so that they free no snapshot.
    fleet: Fleet,
    /// `None` if this node's own clients and tasks have none. Must outlive the workers, who have sockets there.
    local_link: Option<LocalLink>,
    /// Of those who use that.
    local_clients: Option<LocalClients>,
    /// What these can't reach.
    local_refused: watch::Receiver<Refused>,
    publisher: Publisher<Forwarding>,
    generation: Generation,
    placements: Placements,
    /// Whose these are: also where the configuration before could not be restored.
    placed: Desired,
    /// When the next drain ends.
    drained_at: Option<SystemTime>,
    /// Why a mesh address has no ports yet, if one has to wait.
    waits: Option<String>,
    steered: Steered,
    /// What was last wanted to be steered, if it is in full.
    in_step: Option<Arc<Steering>>,
    /// `None` if nothing is to be announced.
    announcing: Option<Announcing>,
    swarming: Swarming,
    refused: Option<String>,
    /// Rx queues of each interface.
    rx_queues: Vec<u32>,
    /// Since when an interface is gone.
    missing: Option<Instant>,
}

impl Daemon {
    async fn start(mut config: Config, wanted: Wanted) -> Result<Self, RunError> {
        let mut tunnel_ends = TunnelEnds::default();
        config.desired = wanted.join(&config.node.vteps(), &mut tunnel_ends)?;
        let names = match &config.node.interfaces[..] {
            [] => vec![link::default_route_interface().await?],
            names => names.to_vec(),
        };
        let links = link::links(&names).await?;
        let mut queues: Vec<Queues> = links.iter().map(queues).collect();
        let local_link = local_link(&config, &queues).await?;
        queues.extend(local_link.as_ref().map(LocalLink::queues));
        let addresses = own_addresses(local_link.as_ref()).await?;
        config.limits.admit(&config.desired, &addresses)?;
        let interfaces = interfaces(&links, local_link.as_ref());
        let next_hops = NextHops::start(links.iter().map(|link| link.device.index).collect())?;
        let home: &[_] = if local_link.is_some() { &addresses } else { &[] };
        let vteps = vteps(&config, &tunnel_ends, home);
        next_hops.want(&vteps);
        if !next_hops.settled(RESOLVE_TIMEOUT).await {
            warn!("some next hops are still being resolved; starting without them");
        }
        let hops = next_hops.subscribe().borrow().clone();
        let mut planner = planner(&config);
        let verdicts = Verdicts::default();
        let nat = Arc::new(config.nat.slots()?);
        let inputs = inputs(&config, (&hops, &verdicts), (&interfaces, &addresses), &nat);
        let plan = planner.plan(&inputs, Tick(0))?;
        let announcing = config.node.announce_table.map(Announcing::new).transpose();
        let announcing = announcing.map_err(LinkError::Socket)?;
        let mut publisher = Publisher::new(Arc::new(plan.forwarding));
        let fleet = Fleet::start(&config, &queues, &mut publisher, &nat)?;
        fleet.leave_cores_to_workers();
        // Where we are now, off the workers' cores.
        let limit = config.limits.health_checks as usize;
        let checks = Checks::start(limit).map_err(RunError::Health)?;
        let from = config.node.vteps();
        let liveness = Liveness::start(config.liveness, &from, next_hops.subscribe());
        let liveness = liveness.map_err(RunError::Liveness)?;
        let local_clients =
            local_link.as_ref().map(|_| LocalClients::start(client_limits(&config)));
        let local_clients = local_clients.transpose().map_err(RunError::LocalClients)?;
        let nothing = || watch::channel(Refused::default()).1;
        let local_refused = local_clients.as_ref().map_or_else(nothing, LocalClients::refused);
        let home = local_link.as_ref().map(|_| FAR_ADDRESS);
        let teacher = Teacher::start(from, home);
        let generation = publisher.generation();
        let mut daemon = Self {
            placed: config.desired.clone(),
            config,
            wanted,
            interfaces,
            addresses,
            nat,
            next_hops,
            tunnel_ends,
            vteps,
            standings: liveness.subscribe(),
            liveness,
            hops,
            checks,
            teacher,
            verdicts,
            planner,
            fleet,
            local_link,
            local_clients,
            local_refused,
            publisher,
            generation,
            placements: plan.placements,
            drained_at: plan.drained_at,
            waits: None,
            steered: Steered::default(),
            in_step: None,
            announcing,
            swarming: Swarming::default(),
            refused: None,
            rx_queues: links.iter().map(|link| link.rx_queues).collect(),
            missing: None,
        };
        daemon.log_start();
        warn_too_large(&daemon.interfaces, daemon.config.dataplane.frame_size_bytes);
        daemon.log_unreachable(&Placements::default());
        daemon.serve_local();
        // Published before steered: XDP never hands over what no worker knows.
        daemon.steer_more(&plan.steer)?;
        daemon.check();
        daemon.teach();
        daemon.announce(plan.announced).await;
        info!(node = daemon.config.node.name, vips = daemon.steered.len(), "ready");
        Ok(daemon)
    }

    /// A new configuration, or none.
    async fn reload(&mut self, cause: Cause, loaded: Result<(Config, Vec<Warning>), LoadError>) {
        let (config, warnings) = match loaded {
            Ok(loaded) => loaded,
            Err(refused) => {
                let sentences = refused.sentences().join("; ");
                error!("configuration refused, the running state stays: {sentences}");
                self.refused = Some(sentences);
                return;
            }
        };
        log_warnings(&warnings);
        let restart = self.config.restart_needed(&config);
        if !restart.is_empty() {
            warn!("restart to change {}; everything else is taken over", restart.join(", "));
        }
        // Only what can change while running is taken over, so that the rest goes on saying what is true.
        let mut next = self.config.clone();
        next.next_hops = config.next_hops;
        next.node.answer_arp = config.node.answer_arp;
        next.liveness = config.liveness;
        let Desired { services: file, overlays } = config.desired;
        let overlays =
            overlays.into_iter().map(|overlay| overlay.after(&self.wanted.overlays)).collect();
        let wanted = Wanted { file, overlays, ..self.wanted.clone() };
        // The file goes first: what it wants now may be in the way of the swarm's.
        let (wanted, _) = fit(wanted, &next.node.vteps());
        match self.take_over(next, wanted, None).await {
            Ok(()) => {
                self.refused = None;
                info!(?cause, generation = self.generation.get(), "configuration taken over");
            }
            Err(refused) => self.refused = Some(causes::line(&refused)),
        }
    }

    /// What the API wants, all of it, and joined with what the file wanted when it was judged.
    async fn want(&mut self, services: Vec<Arc<Service>>, joined: Desired) -> Result<(), Refusal> {
        let wanted = Wanted { api: services, ..self.wanted.clone() };
        self.take_over(self.config.clone(), wanted, Some(joined)).await.map_err(|refused| {
            let sentence = causes::line(&refused);
            match changed_something(&refused) {
                true => Refusal::Failed(sentence),
                false => Refusal::Impossible(sentence),
            }
        })
    }

    /// Goes over to another configuration, or back to this one. `joined` is what is wanted, if it has been
    /// joined already.
    async fn take_over(
        &mut self,
        mut next: Config,
        wanted: Wanted,
        joined: Option<Desired>,
    ) -> Result<(), RunError> {
        // The file may have changed since.
        let joined = match joined.filter(|joined| wanted.is(joined)) {
            Some(joined) => Ok(joined),
            None => wanted.join(&next.node.vteps(), &mut self.tunnel_ends),
        };
        let admitted = joined.map_err(RunError::from).and_then(|desired| {
            self.config.limits.admit(&desired, &self.addresses)?;
            next.desired = desired;
            Ok(())
        });
        if let Err(refused) = admitted {
            error!("change refused, the running state stays: {refused}");
            return Err(refused);
        }
        self.tunnel_ends.follow(&next.desired.services);
        let home: &[_] = if self.local_link.is_some() { &self.addresses } else { &[] };
        let vteps = vteps(&next, &self.tunnel_ends, home);
        let outcome = self.go_over(next, &vteps).await;
        if outcome.is_ok() {
            let first_overlay = self.wanted.overlays.is_empty() && !wanted.overlays.is_empty();
            let automatic = self.config.node.local_link == config::LocalLink::Auto;
            if first_overlay && automatic && self.local_link.is_none() {
                warn!(
                    "clients and backends on this node itself are not served: there was no overlay when \
                     the process started, restart (node.local_link)"
                );
            }
            (self.wanted, self.vteps) = (wanted, vteps);
            self.liveness.set(self.config.liveness);
            self.check();
            self.teach();
        }
        // Nobody else's ways are followed any more, or still.
        self.next_hops.want(&self.vteps);
        outcome
    }

    async fn go_over(&mut self, next: Config, vteps: &BTreeSet<IpAddr>) -> Result<(), RunError> {
        // Nobody waits for others that are still being resolved.
        if !vteps.is_subset(&self.vteps) {
            // Those of the running state too, which may have to stay.
            self.next_hops.want(&(&self.vteps | vteps));
            self.next_hops.settled(SETTLE_TIMEOUT).await;
        }
        let before = std::mem::replace(&mut self.config, next);
        let hops = self.known_hops();
        let Err(refused) = self.replan(hops.clone()).await else { return Ok(()) };
        self.config = before;
        let sentence = causes::line(&refused);
        if !changed_something(&refused) {
            error!("change refused, the running state stays: {sentence}");
            return Err(refused);
        }
        match self.replan(hops).await {
            Ok(()) => {
                error!("change not taken over, the state before is restored: {sentence}")
            }
            Err(again) => error!(
                "change taken over in part, and the state before can't be restored, restart: \
                 {sentence}; {}",
                causes::line(&again)
            ),
        }
        Err(refused)
    }

    /// Checks the services' backends, and no others.
    fn check(&mut self) {
        let services = self.config.desired.services.iter();
        let checked: HashMap<&str, &Service> = services
            .filter(|service| service.health.is_some())
            .map(|service| (&*service.name, &**service))
            .collect();
        self.verdicts.retain(|service, backend| {
            let service = checked.get(service);
            service.is_some_and(|service| service.backends.iter().any(|b| b.name == backend))
        });
        let links = self.interfaces.iter().filter(|interface| interface.home.is_none());
        let home = Home {
            mac: self.interfaces.first().map(|interface| interface.mac).unwrap_or_default(),
            vteps: self.config.node.vteps(),
            addresses: links.flat_map(|link| link.addresses.iter().copied()).collect(),
        };
        self.checks.want(&self.config.desired, home);
    }

    /// Teaches backends where this node's mesh addresses live. Once XDP steers what they send there.
    fn teach(&self) {
        let is_lost = |hop: &HopState| matches!(hop, HopState::Unresolved { .. });
        let lost = self.hops.iter().filter(|(_, hop)| is_lost(hop)).map(|(vtep, _)| *vtep);
        self.teacher.want(&self.config.desired, &self.addresses, &lost.collect());
    }

    /// What is thought of backends has changed.
    async fn rejudge(&mut self) {
        let mut moved = false;
        for ((service, backend), verdict) in self.checks.news() {
            let before = self.verdicts.set(&service, &backend, verdict.clone());
            moved |= before.is_down() != verdict.is_down();
            match &verdict {
                Verdict::Down { reason } => warn!(%service, %backend, "down: {reason}"),
                Verdict::Up => info!(%service, %backend, "up"),
                Verdict::Unknown => {}
            }
        }
        if moved {
            if let Err(refused) = self.replan(self.hops.clone()).await {
                log_refused("health", &refused);
            }
            return;
        }
        // Nothing that workers have to know.
        let rejudge = |(service, placements): (&Arc<Service>, &Arc<[Placement]>)| {
            if service.health.is_none() {
                return placements.clone();
            }
            let both = service.backends.iter().zip(&**placements);
            let rejudge = |(backend, placement): (_, &Placement)| Placement {
                health: health_of(&self.verdicts, service, backend),
                ..placement.clone()
            };
            both.map(rejudge).collect()
        };
        let placed = self.placed.services.iter().zip(&*self.placements);
        self.placements = placed.map(rejudge).collect();
    }

    /// The ways to VTEPs: the kernel's, but to those that are silent. Those that the operator has told are not
    /// judged by pings, which go by the kernel's.
    fn known_hops(&self) -> Hops {
        let told = |vtep| self.config.next_hops.iter().any(|hop| hop.vtep == vtep);
        let (hops, standings) = (self.next_hops.subscribe(), self.standings.borrow());
        liveness::over(&standings, &hops.borrow(), |vtep| !told(vtep))
    }

    /// Next hops, or who is silent, have changed.
    async fn rehop(&mut self) {
        let hops = self.known_hops();
        // One made before all were wanted would take those out of service that it lacks.
        let complete = self.vteps.iter().all(|vtep| hops.contains_key(vtep));
        if !complete || self.vteps.iter().all(|vtep| hops.get(vtep) == self.hops.get(vtep)) {
            return;
        }
        match self.replan(hops).await {
            Ok(()) => self.teach(),
            Err(refused) => log_refused("next hops", &refused),
        }
    }

    /// Gives the connections to others that are left when a drain ends.
    async fn end_drains(&mut self) {
        if self.drained_at.is_none_or(|deadline| SystemTime::now() < deadline) {
            return;
        }
        if let Err(refused) = self.replan(self.hops.clone()).await {
            log_refused("the end of a drain", &refused);
        }
    }

    /// Gives a mesh address its ports that had to wait until another one's last connection ended.
    async fn end_waits(&mut self) {
        if !self.planner.has_ports_for_waiting(&self.nat) {
            return;
        }
        if let Err(refused) = self.replan(self.hops.clone()).await {
            log_refused("a mesh address", &refused);
        }
    }

    /// Follows changes of our own interfaces.
    ///
    /// # Errors
    /// If one is gone for good.
    async fn relink(&mut self) -> Result<(), RunError> {
        let followed = self.interfaces.iter().filter(|i| i.home.is_none());
        let names: Vec<&str> = followed.map(|i| i.name.as_str()).collect();
        let looked = async {
            let links = link::links(&names).await?;
            Ok((links, own_addresses(self.local_link.as_ref()).await?))
        };
        let (links, addresses) = match time::timeout(LINK_TIMEOUT, looked).await {
            Ok(Ok(looked)) => looked,
            Ok(Err(LinkError::Missing { name, .. })) => {
                let since = *self.missing.get_or_insert_with(Instant::now);
                return match since.elapsed() {
                    gone if gone < MISSING_TIMEOUT => Ok(()),
                    _ => Err(RunError::LinkGone(name)),
                };
            }
            Ok(Err(error)) => {
                warn!("our interfaces can't be looked at: {}", causes::line(&error));
                return Ok(());
            }
            Err(_) => {
                warn!("the kernel does not tell about our interfaces within {LINK_TIMEOUT:?}");
                return Ok(());
            }
        };
        self.missing = None;
        if let Some(link) = &mut self.local_link {
            link.look_after().await;
        }
        let interfaces = interfaces(&links, self.local_link.as_ref());
        if let Some(name) = replaced(&self.interfaces, &interfaces) {
            return Err(RunError::LinkReplaced(name.to_owned()));
        }
        self.requeue(links.iter().map(|link| link.rx_queues).collect());
        if (&interfaces, &addresses) == (&self.interfaces, &self.addresses) {
            return Ok(());
        }
        info!("an interface's address or MTU has changed");
        let before = std::mem::replace(&mut self.interfaces, interfaces);
        let addresses_before = std::mem::replace(&mut self.addresses, addresses);
        if before.iter().map(|i| i.mtu).ne(self.interfaces.iter().map(|i| i.mtu)) {
            warn_too_large(&self.interfaces, self.config.dataplane.frame_size_bytes);
        }
        let hops = self.hops.clone();
        self.check();
        self.teach();
        let followed = match self.follow_macs() {
            Ok(()) => self.replan(hops).await,
            Err(refused) => Err(refused),
        };
        if let Err(refused) = followed {
            log_refused("the change", &refused);
            if !changed_something(&refused) {
                (self.interfaces, self.addresses) = (before, addresses_before);
            }
        }
        Ok(())
    }

    /// Tells XDP our interfaces' MAC addresses.
    fn follow_macs(&self) -> Result<(), RunError> {
        for (steer, interface) in self.fleet.steers().iter_mut().zip(&self.interfaces) {
            steer.set_mac(interface.mac).map_err(NotSteered)?;
        }
        Ok(())
    }

    /// Notes how many rx queues our interfaces have, and warns of a change.
    fn requeue(&mut self, rx_queues: Vec<u32>) {
        let before = std::mem::replace(&mut self.rx_queues, rx_queues);
        for ((interface, now), before) in self.interfaces.iter().zip(&self.rx_queues).zip(before) {
            if *now != before {
                warn!(
                    interface = interface.name,
                    before,
                    now,
                    "the number of rx queues has changed, and workers have the old ones: restart"
                );
            }
        }
    }

    /// Plans anew and brings workers, XDP and routers in step: what is announced is always a part of what
    /// is steered, and that of what workers know.
    async fn replan(&mut self, hops: Hops) -> Result<(), RunError> {
        let now = self.fleet.now();
        // Not by a method: the planner is borrowed mutably beside.
        let (told, own) = ((&hops, &self.verdicts), (&self.interfaces[..], &self.addresses[..]));
        let inputs = inputs(&self.config, told, own, &self.nat);
        let Plan { forwarding, steer, announced, placements, drained_at, cut, waits } =
            self.planner.plan(&inputs, now)?;
        let waits = waits.map(|waits| waits.to_string());
        if let Some(sentence) = waits.as_ref().filter(|_| waits != self.waits) {
            warn!("a mesh address waits: {sentence}");
        }
        self.waits = waits;
        self.announce_less(&announced).await;
        let before = self.in_step.take();
        let in_step = before.is_some_and(|before| Arc::ptr_eq(&before, &steer));
        if !in_step {
            self.steer_less(&steer).await?;
        }
        self.generation = self.publisher.publish(Arc::new(forwarding));
        self.hops = hops;
        self.drained_at = drained_at;
        let before = std::mem::replace(&mut self.placements, placements);
        self.placed = self.config.desired.clone();
        self.log_unreachable(&before);
        self.acknowledged().await;
        cutting::cut(&self.nat, &cut, self.fleet.now());
        self.serve_local();
        if !in_step {
            self.steer_more(&steer)?;
        }
        self.in_step = Some(steer);
        self.announce(announced).await;
        Ok(())
    }

    /// Serves clients on this node, on the ports that are published on its addresses.
    fn serve_local(&self) {
        let Some(clients) = &self.local_clients else { return };
        let mut here = PublishedHere::new();
        for service in &self.placed.services {
            let Vip::Node(family) = service.vip else { continue };
            for port in &service.ports {
                here.entry(port.published).or_default().insert(family);
            }
        }
        clients.want(here);
    }

    /// Before anything is taken away, what depends on it is announced no more.
    async fn announce_less(&mut self, wanted: &BTreeSet<IpAddr>) {
        if let Some(announcing) = &mut self.announcing {
            announcing.less(wanted).await;
        }
    }

    /// Once all is there, it is announced.
    async fn announce(&mut self, wanted: BTreeSet<IpAddr>) {
        if let Some(announcing) = &mut self.announcing {
            announcing.exactly(wanted).await;
        }
    }

    /// Steers no more what is not in `wanted`, and lets the workers finish what they have of it.
    async fn steer_less(&mut self, wanted: &Steering) -> Result<(), NotSteered> {
        let gone = {
            let mut steers = self.fleet.steers();
            self.steered
                .less(wanted, |key| steers.iter_mut().try_for_each(|steer| steer.remove_vip(key)))?
        };
        if !gone {
            return Ok(());
        }
        let first = self.fleet.progress();
        let (mut last, mut emptied) = (first.clone(), vec![false; first.len()]);
        let deadline = Instant::now() + ACKNOWLEDGE_TIMEOUT;
        while !self.fleet.emptied_since(&first, &mut last, &mut emptied) {
            if Instant::now() >= deadline {
                warn!(
                    "a worker has not emptied its rx rings in time; what is withdrawn is dropped"
                );
                break;
            }
            self.fleet.wake();
            time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// Steers all of `wanted`.
    fn steer_more(&mut self, wanted: &Steering) -> Result<(), NotSteered> {
        let mut steers = self.fleet.steers();
        let add = |key, flags| steers.iter_mut().try_for_each(|steer| steer.add_vip(key, flags));
        Ok(self.steered.more(wanted, add)?)
    }

    /// Waits until all workers that turn forward by the newest snapshot.
    async fn acknowledged(&mut self) {
        let before = self.fleet.progress();
        let deadline = Instant::now() + ACKNOWLEDGE_TIMEOUT;
        while !self.publisher.acknowledged(self.generation) && !self.fleet.turned_since(&before) {
            if Instant::now() >= deadline {
                warn!("a worker has not taken the new snapshot over in time");
                break;
            }
            self.fleet.wake();
            time::sleep(Duration::from_millis(1)).await;
        }
        self.publisher.retire();
    }
}

/// Whether this refusal came when workers or XDP had been told already. All others come before.
fn changed_something(refused: &RunError) -> bool {
    matches!(refused, RunError::Steer(_))
}

fn log_refused(what: &str, refused: &RunError) {
    let sentence = causes::line(refused);
    if changed_something(refused) {
        error!("{what} taken over in part, the next change will be tried in full: {sentence}");
    } else {
        error!("{what} not taken over, the running state stays: {sentence}");
    }
}

/// An interface that is another one than before.
fn replaced<'a>(before: &'a [Interface], now: &[Interface]) -> Option<&'a str> {
    let mut both = before.iter().zip(now);
    both.find(|(before, now)| before.index != now.index).map(|(before, _)| before.name.as_str())
}

/// Whether workers may have sockets on a veth.
fn may_copy(config: &Config) -> bool {
    let may = config.dataplane.copy_mode != config::CopyMode::ZeroCopy;
    if !may {
        warn!(
            "copy_mode is \"zero-copy\": clients and backends on this node itself are not served"
        );
    }
    may
}

/// The local link, if there is to be one.
async fn local_link(config: &Config, queues: &[Queues]) -> Result<Option<LocalLink>, RunError> {
    let wanted = match config.node.local_link {
        config::LocalLink::Never => false,
        config::LocalLink::Always => true,
        config::LocalLink::Auto => {
            // A swarm's ingress network is known only later.
            let has_overlay = !config.desired.overlays.is_empty() || config.source.swarm.is_some();
            has_overlay && may_copy(config)
        }
    };
    if !wanted {
        return Ok(None);
    }
    let workers = worker_count(config, queues)?;
    let link = LocalLink::make(workers as u32, config.dataplane.frame_size_bytes).await?;
    Ok(Some(link))
}

fn client_limits(config: &Config) -> Limits {
    Limits {
        clients: config.limits.local_clients as usize,
        tcp_idle: Duration::from_secs(config.connections.tcp_idle_s.into()),
        udp_idle: Duration::from_secs(config.connections.udp_idle_s.into()),
    }
}

/// This node's addresses: also those of the local link, at whose far end workers are the node.
async fn own_addresses(local_link: Option<&LocalLink>) -> Result<Vec<IpAddr>, LinkError> {
    let ends = [FAR_ADDRESS.into(), FAR_ADDRESS6.into(), NODE_ADDRESS.into()];
    let ends = ends.into_iter().filter(|_| local_link.is_some());
    Ok(link::own_addresses().await?.into_iter().chain(ends).collect())
}

/// What the workers have ports on, in their order.
fn interfaces(links: &[link::Link], local_link: Option<&LocalLink>) -> Vec<Interface> {
    links.iter().map(interface).chain(local_link.map(LocalLink::interface)).collect()
}

fn queues(link: &link::Link) -> Queues {
    Queues {
        interface: link.device.name.clone(),
        mac: link.device.mac,
        count: link.rx_queues as usize,
        namespace: None,
    }
}

fn interface(link: &link::Link) -> Interface {
    Interface {
        name: link.device.name.clone(),
        index: Some(link.device.index),
        mac: link.device.mac,
        mtu: link.device.mtu,
        partial_checksums: link.partial_checksums(),
        addresses: link.addresses.clone(),
        home: None,
    }
}

fn inputs<'a>(
    config: &'a Config,
    (hops, health): (&'a Hops, &'a Verdicts),
    (interfaces, addresses): (&'a [Interface], &'a [IpAddr]),
    nat: &'a nat::Slots,
) -> Inputs<'a> {
    Inputs {
        desired: &config.desired,
        hops,
        health,
        next_hops: &config.next_hops,
        interfaces,
        addresses,
        nat: Some(nat),
        vtep: config.node.vtep,
        vtep6: config.node.vtep6,
        answer_arp: config.node.answer_arp,
        announce: config.node.announce_table.is_some(),
        offline: false,
        time: SystemTime::now(),
    }
}

/// A planner by the process settings of a configuration.
pub fn planner(config: &Config) -> Planner {
    Planner::new(Settings {
        maglev_size: Size::new(config.maglev.table_size).expect("the configuration checks it"),
        maglev_key: HashKey::from_seed(&config.maglev.seed),
        slots: config.limits.backends as usize,
        rest_ms: config.connections.timeouts().longest_ms().max(config.nat.longest_ms()),
    })
}

/// The VTEPs that the kernel has to be asked for: not those that the operator has told all about, nor those
/// that are at `home`, this node's own if there is a way to them.
fn vteps(config: &Config, all: &TunnelEnds, home: &[IpAddr]) -> BTreeSet<IpAddr> {
    let said = config.next_hops.iter().filter(|hop| hop.interface.is_some());
    let said: BTreeSet<IpAddr> = said.map(|hop| hop.vtep).chain(home.iter().copied()).collect();
    all.iter().filter(|vtep| !said.contains(vtep)).collect()
}

fn log_warnings(warnings: &[Warning]) {
    for warning in warnings {
        warn!("{}", warning.sentence());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_not_asked_for_what_the_operator_has_told() {
        let hop = |vtep: &str, interface: &str| {
            format!("[[next_hop]]\nvtep = \"{vtep}\"\nmac = \"02:00:00:00:00:02\"\n{interface}\n")
        };
        let backend = |name: &str, vtep: &str| {
            format!("{{ name = \"{name}\", vtep = \"{vtep}\", mac = \"02:00:00:00:00:02\" }}")
        };
        let backends =
            [backend("a", "10.0.0.2"), backend("b", "10.0.0.3"), backend("c", "10.0.0.4")];
        let text = format!(
            "{}{}[[service]]\nname = \"web\"\nvip = \"203.0.113.1\"\nports = [\"80/tcp\"]\nvni = 1\n\
             backend = [{}]\n",
            hop("10.0.0.2", "interface = \"eth0\""),
            hop("10.0.0.3", ""),
            backends.join(", ")
        );
        let (config, _) = Config::parse("test", &text).unwrap();
        let asked = ["10.0.0.3", "10.0.0.4"].map(|vtep| vtep.parse().unwrap());
        let mut ends = TunnelEnds::default();
        ends.follow(&config.desired.services);
        assert_eq!(vteps(&config, &ends, &[]), BTreeSet::from(asked));
    }

    #[test]
    fn an_interface_that_was_made_anew_is_another_one() {
        let interface = |name: &str, index| Interface {
            name: name.to_owned(),
            index: Some(link::LinkIndex(index)),
            mac: Default::default(),
            mtu: 1500,
            partial_checksums: false,
            addresses: Vec::new(),
            home: None,
        };
        let before = [interface("eth0", 2), interface("eth1", 3)];
        assert_eq!(replaced(&before, &before), None);
        assert_eq!(replaced(&before, &[interface("eth0", 2), interface("eth1", 9)]), Some("eth1"));
    }
}
