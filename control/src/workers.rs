//! The threads that forward packets: opening their ports, starting them on their cores, and knowing how far
//! they are.

mod watchdog;

use std::{
    error::Error,
    fmt, io, mem,
    num::NonZeroU32,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use core_affinity::CoreId;
use dataplane::{
    connections::{Connections, Reader},
    counters::{Counters, Event},
    flow::HashKey,
    forwarding::Forwarding,
    memory::AllocationError,
    nat,
    port::{
        BURST,
        xsk::{self, Bell, BindReport, Ear, Rest, Statistics, XskError, XskPort},
    },
    publish::Publisher,
    steer::{self, Steer, SteerError},
    time::Tick,
    wire::ethernet::MacAddr,
    worker::{Parts, Worker},
};

use self::watchdog::{TICK_MS, Watchdog, Watched};
use crate::{
    config::{self, Config, Cores, Idle, MIN_HANG_TIMEOUT_MS, Workers},
    local::Namespace,
};

/// Room for this node's addresses as ends of tunnels, and for its mesh addresses.
const TUNNEL_ENDS: u32 = 1024;

/// A worker that only sleeps, and is looked at only so often, must not seem to hang.
const _: () = assert!(MIN_HANG_TIMEOUT_MS >= 2 * xsk::SLEEP_MS as u32 + TICK_MS);

/// Why workers can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No socket.
    #[error(transparent)]
    Xsk(#[from] XskError),
    /// No steering.
    #[error(transparent)]
    Steer(#[from] NotSteered),
    /// No memory.
    #[error(transparent)]
    Connections(#[from] AllocationError),
    /// A core that is not there.
    #[error("core {core} is not one this process may run on ({allowed}); see node.cores")]
    NoCore {
        /// The core.
        core: usize,
        /// Those that are.
        allowed: String,
    },
    /// Nothing to run on.
    #[error("cannot tell which cores this process may run on")]
    NoCores,
    /// More workers than queues.
    #[error(
        "{workers} workers, but {interface} has {queues} rx queues, and every worker needs one: lower \
         node.workers, or raise the queues with `ethtool -L {interface} combined {workers}`"
    )]
    TooManyWorkers {
        /// As configured.
        workers: usize,
        /// The interface with the fewest.
        interface: String,
        /// How many it has.
        queues: usize,
    },
    /// More interfaces than NAT's slots can be told of.
    #[error("{0} is one interface too many in node.interfaces")]
    TooManyInterfaces(String),
    /// No thread, or no memory shared with the XDP program.
    #[error("the kernel does not give a worker its thread or memory")]
    Kernel(#[from] io::Error),
}

/// The kernel's or the driver's refusal to steer, with the key that may help.
#[derive(Debug)]
pub struct NotSteered(pub SteerError);

impl From<SteerError> for NotSteered {
    fn from(error: SteerError) -> Self {
        Self(error)
    }
}

impl fmt::Display for NotSteered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = match self.0 {
            SteerError::Full => " (limits.vips, and restart)",
            SteerError::Refused { .. } => " (dataplane.xdp_mode)",
            _ => "",
        };
        write!(f, "{}{key}", self.0)
    }
}

impl Error for NotSteered {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

/// An interface and how many rx queues it has.
#[derive(Clone, Debug)]
pub struct Queues {
    /// The interface.
    pub interface: String,
    /// Its MAC address: what is for other stations stays with the kernel.
    pub mac: MacAddr,
    /// Its rx queues in use.
    pub count: usize,
    /// Where it is, if not in this process's network namespace.
    pub namespace: Option<Namespace>,
}

/// One worker, seen from outside.
#[derive(Debug)]
pub struct Handle {
    /// Where it runs.
    pub core: usize,
    /// What it got.
    pub ports: Vec<BindReport>,
    /// Its counters.
    pub counters: Arc<Counters>,
    /// Its connections.
    pub connections: Reader,
    sockets: Vec<Socket>,
    hung: Arc<AtomicBool>,
}

impl Handle {
    /// Whether it hangs.
    pub fn hung(&self) -> bool {
        self.hung.load(Ordering::Relaxed)
    }

    /// What the kernel had to throw away at each of its ports; `None` where it does not tell.
    pub fn losses(&self) -> impl Iterator<Item = Option<Statistics>> + '_ {
        self.sockets.iter().map(|socket| xsk::statistics(socket.fd).ok())
    }
}

/// A queue's socket, for steering.
#[derive(Clone, Copy, Debug)]
struct Socket {
    interface: usize,
    queue: u32,
    fd: i32,
}

/// How far a worker was when asked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    turns: u64,
    /// Packets it had received, read before the turns and after them: it goes on meanwhile.
    received: (u64, u64),
}

impl Progress {
    /// Whether its rx rings, of `ring` places, have been emptied of what was in them at `before`: it made
    /// enough turns for full ones, or one, begun since, that left no packet behind.
    fn emptied_since(self, before: Self, ring: u32) -> bool {
        let turns = self.turns.saturating_sub(before.turns);
        let received = self.received.1.saturating_sub(before.received.0);
        // One may have been under way.
        turns >= u64::from(ring) / BURST as u64 + 2 || (turns >= 2 && received < BURST as u64)
    }
}

/// All workers and what feeds them.
pub struct Fleet {
    /// The workers, for whoever wants to look at them.
    pub workers: Arc<[Handle]>,
    /// Their threads, each with the word that it hangs.
    threads: Vec<(Arc<AtomicBool>, thread::JoinHandle<()>)>,
    bells: Vec<Bell>,
    /// Connections of mode `nat`, of all of them.
    pub nat: Arc<nat::Slots>,
    /// What the connection tables are hashed with.
    pub hash_key: HashKey,
    /// The XDP program of each interface, shared with the watchdog.
    steers: Arc<Mutex<Vec<Steer>>>,
    watchdog: Option<Watchdog>,
    stop: Arc<AtomicBool>,
    start: Instant,
    ring: u32,
}

/// Which queues of each interface each worker owns: queue q belongs to worker q modulo their number, so
/// worker k owns queue k of every interface, and queues beyond the workers are shared out evenly.
///
/// # Errors
/// If an interface has fewer queues than there are workers: one could not send there.
fn share_out(queues: &[Queues], workers: Workers, cores: usize) -> Result<usize, StartError> {
    let Some(fewest) = queues.iter().min_by_key(|queues| queues.count) else { return Ok(1) };
    match workers {
        Workers::Auto => Ok(fewest.count.min(cores).max(1)),
        Workers::Count(workers) if workers > fewest.count => Err(StartError::TooManyWorkers {
            workers,
            interface: fewest.interface.clone(),
            queues: fewest.count,
        }),
        Workers::Count(workers) => Ok(workers),
    }
}

/// How many workers there will be.
///
/// # Errors
/// If an interface has too few queues for as many as configured, or a core is not there.
pub fn worker_count(config: &Config, queues: &[Queues]) -> Result<usize, StartError> {
    share_out(queues, config.node.workers, cores(&config.node.cores)?.len())
}

impl Fleet {
    /// Opens all ports, attaches the XDP programs, which steer nothing yet, and starts the threads.
    ///
    /// # Errors
    /// If the kernel refuses something; nothing of ours is left then.
    pub fn start(
        config: &Config,
        queues: &[Queues],
        publisher: &mut Publisher<Forwarding>,
        nat: &Arc<nat::Slots>,
    ) -> Result<Self, StartError> {
        let count = worker_count(config, queues)?;
        let cores = cores(&config.node.cores)?;
        let mode = match config.dataplane.xdp_mode {
            config::XdpMode::Auto => steer::Mode::Auto,
            config::XdpMode::Native => steer::Mode::Native,
            config::XdpMode::Generic => steer::Mode::Generic,
        };
        // Twice the VIPs, for each may need an entry for its address.
        let capacity = config.limits.vips.saturating_mul(2).saturating_add(TUNNEL_ENDS);
        let mut steers = Vec::with_capacity(queues.len());
        for queues in queues {
            let attach = || Steer::attach(&queues.interface, mode, capacity);
            let attached = match &queues.namespace {
                Some(namespace) => namespace.run(attach)?,
                None => attach(),
            };
            let mut steer = attached.map_err(NotSteered)?;
            steer.set_mac(queues.mac).map_err(NotSteered)?;
            // So that the program leaves the kernel what is for no connection of ours.
            if !nat.mirror(steer.taken()?) {
                return Err(StartError::TooManyInterfaces(queues.interface.clone()));
            }
            steers.push(steer);
        }

        let mut opened = Vec::with_capacity(count);
        for worker in 0..count {
            opened.push(open(config, queues, worker, count)?);
        }
        let readers: Vec<Reader> = opened.iter().map(|o| o.connections.reader()).collect();
        let hash_key = HashKey::random();
        let (stop, start) = (Arc::new(AtomicBool::new(false)), Instant::now());
        let mut fleet = Self {
            workers: Arc::default(),
            threads: Vec::new(),
            bells: Vec::new(),
            nat: nat.clone(),
            hash_key,
            steers: Arc::new(Mutex::new(steers)),
            watchdog: None,
            stop,
            start,
            ring: config.dataplane.rings().rx,
        };
        let mut workers = Vec::with_capacity(count);
        for (id, opened) in opened.into_iter().enumerate() {
            let core = cores[id % cores.len()];
            let counters = Arc::new(Counters::new(config.limits.backends as usize));
            let connections = opened.connections.reader();
            let peers = others(&readers, id);
            let worker = Worker::new(Parts {
                links: opened.sockets.iter().map(|socket| socket.interface).collect(),
                ports: opened.ports,
                pool: opened.pool,
                connections: opened.connections,
                peers,
                published: publisher.subscribe(),
                counters: counters.clone(),
                hash_key,
                icmp_errors_per_s: config.dataplane.icmp_errors_per_s,
                id,
                nat: Some(nat.clone()),
            });
            let stop = fleet.stop.clone();
            let spin = match config.dataplane.idle {
                Idle::BusyPoll => Duration::MAX,
                Idle::SpinThenSleep => Duration::from_micros(config.dataplane.idle_spin_us.into()),
                Idle::Sleep => Duration::ZERO,
            };
            let (bell, ear) = xsk::bell()?;
            let body = move || {
                if !core_affinity::set_for_current(core) {
                    tracing::warn!(
                        worker = id,
                        core = core.id,
                        "cannot pin the worker to its core"
                    );
                }
                run(worker, &ear, spin, start, &stop);
            };
            let thread = thread::Builder::new().name(format!("worker-{id}")).spawn(body)?;
            let hung = Arc::<AtomicBool>::default();
            fleet.threads.push((hung.clone(), thread));
            fleet.bells.push(bell);
            workers.push(Handle {
                core: core.id,
                ports: opened.reports,
                counters,
                connections,
                sockets: opened.sockets,
                hung,
            });
        }
        fleet.workers = workers.into();
        fleet.feed().map_err(NotSteered)?;
        let timeout = Duration::from_millis(config.dataplane.hang_timeout_ms.into());
        fleet.watchdog = Some(Watchdog::start(fleet.watched(), fleet.steers.clone(), timeout)?);
        Ok(fleet)
    }

    /// Moves the calling thread, control's, to a core without a worker, if there is one.
    pub fn leave_cores_to_workers(&self) {
        let taken = |core: &CoreId| self.workers.iter().any(|worker| worker.core == core.id);
        let cores = core_affinity::get_core_ids().unwrap_or_default();
        if let Some(free) = cores.into_iter().rev().find(|core| !taken(core)) {
            core_affinity::set_for_current(free);
        }
    }

    /// What the workers count time from.
    pub fn start_time(&self) -> Instant {
        self.start
    }

    /// What time it is for the workers.
    pub fn now(&self) -> Tick {
        tick(self.start)
    }

    /// Hands all workers their queues' packets.
    fn feed(&self) -> Result<(), SteerError> {
        let mut steers = self.steers();
        for socket in self.workers.iter().flat_map(|worker| &worker.sockets) {
            steers[socket.interface].set_socket(socket.queue, socket.fd)?;
        }
        Ok(())
    }

    fn watched(&self) -> Vec<Watched> {
        let watched = |(worker, handle): (usize, &Handle)| Watched {
            worker,
            counters: handle.counters.clone(),
            sockets: handle.sockets.clone(),
            hung: handle.hung.clone(),
        };
        self.workers.iter().enumerate().map(watched).collect()
    }

    /// The XDP program of each interface. Not to be held for long: the watchdog waits for it.
    pub fn steers(&self) -> MutexGuard<'_, Vec<Steer>> {
        lock(&self.steers)
    }

    /// Has workers that sleep make a turn at once.
    pub fn wake(&self) {
        self.bells.iter().for_each(Bell::ring);
    }

    /// How far each worker is.
    pub fn progress(&self) -> Vec<Progress> {
        let progress = |worker: &Handle| {
            let received = || worker.counters.events(Event::RxPackets);
            let before = received();
            let turns = worker.counters.turns();
            Progress { turns, received: (before, received()) }
        };
        self.workers.iter().map(progress).collect()
    }

    /// Whether all workers that do not hang have begun and ended a turn since `before`.
    pub fn turned_since(&self, before: &[Progress]) -> bool {
        let mut both = self.progress().into_iter().zip(before).enumerate();
        both.all(|(id, (now, before))| self.workers[id].hung() || now.turns >= before.turns + 2)
    }

    /// Notes in `emptied` which workers have taken what was in their rx rings at `before`, which moves on
    /// with them. Says whether all have that do not hang.
    pub fn emptied_since(
        &self,
        first: &[Progress],
        last: &mut [Progress],
        emptied: &mut [bool],
    ) -> bool {
        for (id, now) in self.progress().into_iter().enumerate() {
            let since = |before| now.emptied_since(before, self.ring);
            emptied[id] |= since(first[id]) || since(last[id]);
            if now.turns >= last[id].turns + 2 {
                last[id] = now;
            }
        }
        emptied.iter().enumerate().all(|(id, emptied)| *emptied || self.workers[id].hung())
    }
}

/// Also one that a panicking thread had: what it guards is changed by single map updates.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // The kernel gets the packets first; then the workers end.
        drop(self.watchdog.take());
        self.steers().clear();
        self.stop.store(true, Ordering::Relaxed);
        self.wake();
        for (hung, thread) in self.threads.drain(..) {
            if !hung.load(Ordering::Relaxed) {
                let _ = thread.join();
            }
        }
    }
}

/// What a worker is given, before it runs.
struct Opened {
    ports: Vec<XskPort>,
    sockets: Vec<Socket>,
    reports: Vec<BindReport>,
    pool: dataplane::port::Pool,
    connections: Connections,
}

fn open(
    config: &Config,
    queues: &[Queues],
    worker: usize,
    workers: usize,
) -> Result<Opened, StartError> {
    let owned: Vec<(usize, xsk::Queue<'_>)> = queues
        .iter()
        .enumerate()
        .flat_map(|(at, Queues { interface, count, namespace, .. })| {
            let own = (worker..*count).step_by(workers);
            let namespace = namespace.as_ref().map(Namespace::as_fd);
            own.map(move |queue| (at, xsk::Queue { interface, number: queue as u32, namespace }))
        })
        .collect();
    let dataplane = &config.dataplane;
    let frames = dataplane.frames_per_queue.saturating_mul(owned.len() as u32);
    let rings = dataplane.rings();
    let settings = xsk::Settings {
        frame_count: NonZeroU32::new(frames).unwrap_or(NonZeroU32::MIN),
        frame_size: dataplane.frame_size_bytes,
        rx_ring: rings.rx,
        tx_ring: rings.tx,
        fill_ring: rings.fill,
        completion_ring: rings.completion,
        huge_pages: match dataplane.huge_pages {
            config::HugePages::Auto => xsk::HugePages::Auto,
            config::HugePages::Never => xsk::HugePages::Never,
            config::HugePages::Require => xsk::HugePages::Require,
        },
        copy: match dataplane.copy_mode {
            config::CopyMode::Auto => xsk::CopyMode::Auto,
            config::CopyMode::ZeroCopy => xsk::CopyMode::ZeroCopy,
            config::CopyMode::Copy => xsk::CopyMode::Copy,
        },
        need_wakeup: dataplane.need_wakeup,
        fill_batch: dataplane.fill_batch,
        tx_budget: dataplane.tx_budget,
        busy_poll: (dataplane.busy_poll_us > 0).then_some(xsk::BusyPoll {
            time_us: dataplane.busy_poll_us,
            budget: dataplane.busy_poll_budget,
            prefer: dataplane.prefer_busy_poll,
        }),
    };
    let queues: Vec<xsk::Queue<'_>> = owned.iter().map(|(_, queue)| *queue).collect();
    let (ports, pool, reports) = xsk::open(&settings, &queues)?;
    let sockets = owned
        .iter()
        .zip(&ports)
        .map(|((interface, queue), port)| Socket {
            interface: *interface,
            queue: queue.number,
            fd: port.fd(),
        })
        .collect();
    Ok(Opened { ports, sockets, reports, pool, connections: config.connections.table()? })
}

/// Where workers may run, in order.
fn cores(wanted: &Cores) -> Result<Vec<CoreId>, StartError> {
    let allowed = core_affinity::get_core_ids().filter(|ids| !ids.is_empty());
    let allowed = allowed.ok_or(StartError::NoCores)?;
    let Cores::List(list) = wanted else { return Ok(allowed) };
    list.iter()
        .map(|core| {
            allowed.iter().find(|id| id.id == *core).copied().ok_or_else(|| StartError::NoCore {
                core: *core,
                allowed: allowed.iter().map(|id| id.id.to_string()).collect::<Vec<_>>().join(", "),
            })
        })
        .collect()
}

fn others(readers: &[Reader], own: usize) -> Vec<Reader> {
    readers.iter().enumerate().filter(|(id, _)| *id != own).map(|(_, reader)| *reader).collect()
}

/// What time it is for workers that were started then.
pub fn tick(start: Instant) -> Tick {
    tick_at(start, Instant::now())
}

fn tick_at(start: Instant, now: Instant) -> Tick {
    Tick((now - start).as_millis() as u64)
}

/// A worker's life: turn, and when there is nothing to do for `spin`, sleep. The clock is read once a turn.
fn run(mut worker: Worker<XskPort>, ear: &Ear, spin: Duration, start: Instant, stop: &AtomicBool) {
    worker.prepare();
    let mut now = Instant::now();
    let mut rest = Rest::new(spin, now);
    while !stop.load(Ordering::Relaxed) {
        let received = worker.turn(tick_at(start, now));
        let before = mem::replace(&mut now, Instant::now());
        if received > 0 {
            worker.took(now - before);
        }
        if let Some(timeout_ms) = rest.after(received, || worker.in_flight(), now) {
            // A poll that fails (no memory) makes the worker spin, which is right.
            let _ = xsk::wait(worker.ports(), Some(ear), timeout_ms);
            now = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queues(counts: &[usize]) -> Vec<Queues> {
        let queues = |(i, count): (usize, &usize)| Queues {
            interface: format!("eth{i}"),
            mac: MacAddr::default(),
            count: *count,
            namespace: None,
        };
        counts.iter().enumerate().map(queues).collect()
    }

    #[test]
    fn there_are_as_many_workers_as_queues_but_never_more_than_cores() {
        for (counts, cores, workers) in
            [(&[8][..], 4, 4), (&[2], 4, 2), (&[8, 2], 4, 2), (&[1], 1, 1)]
        {
            assert_eq!(share_out(&queues(counts), Workers::Auto, cores).unwrap(), workers);
        }
    }

    #[test]
    fn a_ring_is_empty_after_a_turn_that_left_nothing_or_as_many_as_a_full_one_takes() {
        let at = |turns, received| Progress { turns, received: (received, received) };
        let emptied = |turns, received| at(turns, received).emptied_since(at(10, 1000), 2048);
        assert!(!emptied(11, 1000), "it may have begun before");
        assert!(emptied(12, 1063));
        assert!(!emptied(12, 1128) && !emptied(43, 3000), "full bursts: there may be more");
        assert!(emptied(44, 3176));
    }

    #[test]
    fn a_refusal_to_steer_names_the_key() {
        assert!(NotSteered(SteerError::Full).to_string().contains("limits.vips"));
        let refused = SteerError::Refused {
            interface: "eth0".into(),
            mode: "native",
            reason: "Operation not supported".into(),
        };
        assert!(NotSteered(refused).to_string().contains("dataplane.xdp_mode"));
    }

    #[test]
    fn more_workers_than_queues_are_refused_with_the_remedy() {
        let error = share_out(&queues(&[8, 2]), Workers::Count(4), 8).unwrap_err();
        assert!(error.to_string().contains("ethtool -L eth1 combined 4"), "{error}");
    }
}
