//! The daemon's file: typed, with a default for every key, and judged as a whole before anything is
//! done by it. A text becomes keys (`file`, `syntax`), keys become settings and desired state
//! (`settings`, `services`), and what is wrong becomes diagnostics (`finding`). Nothing here looks
//! at the machine but for the host's name: whether an interface exists is for others to find out.

mod file;
mod finding;
mod health;
mod overlays;
mod services;
mod settings;
mod sources;
mod spec;
mod syntax;

use std::{
    fs, io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use dataplane::{
    connections::{self, Timeouts},
    memory::AllocationError,
    nat,
    wire::ethernet::MacAddr,
};
use serde::Deserialize;

pub use self::{
    finding::{ConfigErrors, Finding, LoadError, Warning},
    health::{CheckKind, HealthSpec, written_range},
    services::MAX_WEIGHT,
    settings::MIN_HANG_TIMEOUT_MS,
    spec::{BackendSpec, Remark, Scheduler, ServiceSpec},
};
use crate::{
    desired::{Desired, Family, Vip},
    pem::PemFile,
};

/// All that an operator can say. `config/example.toml` documents the keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// This machine.
    pub node: Node,
    /// Where operators and programs ask and tell.
    pub api: Api,
    /// Sockets, rings and workers.
    pub dataplane: Dataplane,
    /// The table of remembered flows.
    pub connections: Connections,
    /// The table of translated connections.
    pub nat: Nat,
    /// The choice of backends for new connections.
    pub maglev: Maglev,
    /// What is refused beyond.
    pub limits: Limits,
    /// Whether the nodes that tunnels lead to are pinged, and how.
    pub liveness: Liveness,
    /// Who else says what is wanted.
    pub source: Sources,
    /// Next hops that the kernel need not be asked for.
    pub next_hops: Vec<NextHop>,
    /// Services and their backends.
    pub desired: Desired,
}

/// `[node]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// How it is called in what is printed.
    pub name: String,
    /// Interfaces to take packets from. Empty: that of the default route.
    pub interfaces: Vec<String>,
    /// Source of tunnels. `None`: an address of the interface.
    pub vtep: Option<IpAddr>,
    /// Source of tunnels to IPv6 VTEPs, where `vtep` is none. `None`: an address of the interface.
    pub vtep6: Option<Ipv6Addr>,
    /// How many threads forward packets.
    pub workers: Workers,
    /// Where they run.
    pub cores: Cores,
    /// Whether ARP and neighbour solicitations for VIPs are answered.
    pub answer_arp: bool,
    /// The kernel's routing table that has a route for each VIP to announce. `None`: nothing is announced.
    pub announce_table: Option<u32>,
    /// Whether there is a link for this node's own clients and tasks.
    pub local_link: LocalLink,
}

/// `[api]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Api {
    /// The Unix socket it is served on.
    pub socket: PathBuf,
    /// Who may use that, as `chmod` counts.
    pub socket_mode: u32,
    /// Addresses that it is served on by TCP, too.
    pub listen: Vec<SocketAddr>,
    /// How; `None`: plain, on loopback addresses only.
    pub tls: Option<Tls>,
    /// Where services that were given through it are kept.
    pub state_directory: PathBuf,
    /// Services, and backends, that have metrics of their own.
    pub metrics_limit: u32,
}

/// What TLS needs: files in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Our certificate, and those between it and a root.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Whose certificates clients must have.
    pub client_ca: PathBuf,
}

impl Tls {
    /// The file of [`Self::certificate`].
    pub fn certificate(&self) -> PemFile<'_> {
        PemFile { path: &self.certificate, setting: "api.certificate" }
    }

    /// The file of [`Self::key`].
    pub fn key(&self) -> PemFile<'_> {
        PemFile { path: &self.key, setting: "api.key" }
    }

    /// The file of [`Self::client_ca`].
    pub fn client_ca(&self) -> PemFile<'_> {
        PemFile { path: &self.client_ca, setting: "api.client_ca" }
    }
}

/// How many threads forward packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workers {
    /// One for each rx queue, as far as there are cores.
    Auto,
    /// At least one.
    Count(usize),
}

/// Where workers run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cores {
    /// Any that the process may use.
    Auto,
    /// These, all different; at least one.
    List(Vec<usize>),
}

/// `[dataplane]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataplane {
    /// Where the XDP program is attached.
    pub xdp_mode: XdpMode,
    /// Whether the NIC reads and writes the frames itself.
    pub copy_mode: CopyMode,
    /// What a worker does without packets.
    pub idle: Idle,
    /// How long it spins before it sleeps.
    pub idle_spin_us: u32,
    /// Size of a UMEM chunk: 2048 or 4096.
    pub frame_size_bytes: u32,
    /// UMEM chunks for each queue: a power of two.
    pub frames_per_queue: u32,
    /// Places in each of the four rings that the next keys don't name: a power of two.
    pub ring_size: u32,
    /// Those of the rx ring. `None`: `ring_size`; so with the others.
    pub rx_ring_size: Option<u32>,
    /// Those of the tx ring.
    pub tx_ring_size: Option<u32>,
    /// Those of the fill ring.
    pub fill_ring_size: Option<u32>,
    /// Those of the completion ring.
    pub completion_ring_size: Option<u32>,
    /// Places of a fill ring that have to be free before they are filled again.
    pub fill_batch: u32,
    /// What the UMEM lies on.
    pub huge_pages: HugePages,
    /// Whether the kernel says when it wants to be called.
    pub need_wakeup: bool,
    /// Frames that one system call may send in copy mode.
    pub tx_budget: u32,
    /// `SO_BUSY_POLL`; 0 is off.
    pub busy_poll_us: u32,
    /// `SO_BUSY_POLL_BUDGET`, in packets.
    pub busy_poll_budget: u32,
    /// `SO_PREFER_BUSY_POLL`, while `busy_poll_us` is on.
    pub prefer_busy_poll: bool,
    /// "Fragmentation needed" and "packet too big" messages of each worker.
    pub icmp_errors_per_s: u32,
    /// Without a turn of a worker for this long, packets go to the kernel.
    pub hang_timeout_ms: u32,
}

/// Places in the rings of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rings {
    /// Received packets, for us.
    pub rx: u32,
    /// Packets to be sent, for the kernel.
    pub tx: u32,
    /// Empty frames, for the kernel.
    pub fill: u32,
    /// Frames that were sent, for us.
    pub completion: u32,
}

/// Where the XDP program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum XdpMode {
    /// In the driver if it can, else behind it.
    Auto,
    /// In the driver.
    Native,
    /// Behind the driver, where packets have cost an allocation already.
    Generic,
}

/// Whether the NIC reads and writes the frames itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyMode {
    /// If it can.
    Auto,
    /// It must.
    ZeroCopy,
    /// The kernel copies.
    Copy,
}

/// What a worker does without packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Idle {
    /// Sleeps until one comes.
    Sleep,
    /// Looks for them for a while first.
    SpinThenSleep,
    /// Looks for them forever.
    BusyPoll,
}

/// Whether the UMEM lies on huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HugePages {
    /// If there are some.
    Auto,
    /// No.
    Never,
    /// It must.
    Require,
}

/// Whether there is a link of our own for this node's clients and tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LocalLink {
    /// If there is anything that needs it when the process starts.
    Auto,
    /// No.
    Never,
    /// Yes.
    Always,
}

/// `[connections]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connections {
    /// Entries of each worker: a power of two.
    pub capacity: u32,
    /// New flows that each worker remembers in a second: SYNs, and as many others.
    pub admissions_per_s: u32,
    /// Idle time of a flow that has had no second packet yet.
    pub unconfirmed_s: u32,
    /// Idle time of a TCP connection.
    pub tcp_idle_s: u32,
    /// Idle time of one that has seen a FIN or RST.
    pub tcp_closing_s: u32,
    /// Idle time of everything else.
    pub udp_idle_s: u32,
}

/// `[nat]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nat {
    /// Mesh addresses that there is room for, of all overlays.
    pub addresses: u32,
    /// The first port of each that stands for a connection.
    pub first_port: u16,
    /// The last one.
    pub last_port: u16,
    /// How long silent connections are known; keys of the same table.
    pub timeouts: nat::Timeouts,
}

/// `[maglev]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Maglev {
    /// Places of each service's table: a prime.
    pub table_size: u32,
    /// What backends and flows are hashed with.
    pub seed: String,
}

/// `[limits]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Slots for the backends of all services.
    pub backends: u32,
    /// Addresses, protocols and ports of all services.
    pub vips: u32,
    /// Health checks under way at once.
    pub health_checks: u32,
    /// Connections and UDP clients of this node itself at once.
    pub local_clients: u32,
}

/// `[liveness]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Liveness {
    /// Whether nodes are pinged at all.
    pub enabled: bool,
    /// From one ping to a node to the next.
    pub interval_ms: u32,
    /// Unanswered pings in a row that make a node silent.
    pub fall: u32,
}

/// `[source]`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// A Docker Swarm, if there is one.
    pub swarm: Option<Swarm>,
}

/// `[source.swarm]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swarm {
    /// This node's Docker engine.
    pub engine: Engine,
    /// Who tells of the swarm if that is a worker's.
    pub managers: Vec<Manager>,
    /// How often a manager's engine is asked for its tasks.
    pub poll_ms: u32,
    /// Mesh addresses to have: the one that Docker has given this node, and further ones.
    pub mesh_addresses: u32,
}

/// Where a Docker engine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    /// On a Unix socket.
    Unix(PathBuf),
    /// At a host and port.
    Tcp {
        /// Both, as in `10.0.0.1:2376`.
        address: String,
        /// The directory with `ca.pem`, `cert.pem` and `key.pem`. `None`: plain, on this machine only.
        certificates: Option<PathBuf>,
    },
}

/// The API of a manager's Wiremesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manager {
    /// Host and port.
    pub address: String,
    /// Whether it is asked by TLS, with the API's own certificate.
    pub tls: bool,
}

/// `[[next_hop]]`: how to reach a VTEP, whatever the kernel says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// The tunnel's far end.
    pub vtep: IpAddr,
    /// The station to send to.
    pub mac: MacAddr,
    /// The interface to send by. `None`: as routed.
    pub interface: Option<String>,
    /// Largest outer IP packet, in bytes. `None`: as the link says.
    pub mtu: Option<u16>,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            name: host_name(),
            interfaces: Vec::new(),
            vtep: None,
            vtep6: None,
            workers: Workers::Auto,
            cores: Cores::Auto,
            answer_arp: false,
            announce_table: None,
            local_link: LocalLink::Auto,
        }
    }
}

impl Default for Api {
    fn default() -> Self {
        Self {
            socket: PathBuf::from("/run/wiremesh/api.sock"),
            socket_mode: 0o660,
            listen: Vec::new(),
            tls: None,
            state_directory: PathBuf::from("/var/lib/wiremesh"),
            metrics_limit: 10_000,
        }
    }
}

impl Node {
    /// Its own ends of tunnels, as far as they are said.
    pub fn vteps(&self) -> Vec<IpAddr> {
        self.vtep.into_iter().chain(self.vtep6.map(IpAddr::V6)).collect()
    }
}

impl Default for Swarm {
    fn default() -> Self {
        Self {
            engine: Engine::Unix(PathBuf::from("/var/run/docker.sock")),
            managers: Vec::new(),
            poll_ms: 200,
            mesh_addresses: 1,
        }
    }
}

impl Default for Dataplane {
    fn default() -> Self {
        Self {
            xdp_mode: XdpMode::Auto,
            copy_mode: CopyMode::Auto,
            idle: Idle::SpinThenSleep,
            idle_spin_us: 50,
            frame_size_bytes: 2048,
            frames_per_queue: 4096,
            ring_size: 2048,
            rx_ring_size: None,
            tx_ring_size: None,
            fill_ring_size: None,
            completion_ring_size: None,
            fill_batch: 64,
            huge_pages: HugePages::Auto,
            need_wakeup: true,
            tx_budget: 128,
            busy_poll_us: 0,
            busy_poll_budget: 64,
            prefer_busy_poll: true,
            icmp_errors_per_s: 1000,
            hang_timeout_ms: 1000,
        }
    }
}

impl Dataplane {
    /// The rings' sizes, each its own or the common one.
    pub fn rings(&self) -> Rings {
        let or_common = |own: Option<u32>| own.unwrap_or(self.ring_size);
        Rings {
            rx: or_common(self.rx_ring_size),
            tx: or_common(self.tx_ring_size),
            fill: or_common(self.fill_ring_size),
            completion: or_common(self.completion_ring_size),
        }
    }
}

impl Default for Connections {
    fn default() -> Self {
        Self {
            capacity: 1 << 20,
            admissions_per_s: 50_000,
            unconfirmed_s: 30,
            tcp_idle_s: 4 * 60 * 60,
            tcp_closing_s: 60,
            udp_idle_s: 300,
        }
    }
}

impl Connections {
    /// The timeouts, as the table takes them.
    pub fn timeouts(&self) -> Timeouts {
        let Self { unconfirmed_s, tcp_idle_s, tcp_closing_s, udp_idle_s, .. } = *self;
        Timeouts {
            unconfirmed_s,
            tcp_idle_s,
            tcp_closing_s,
            udp_idle_s,
            affinity_s: Timeouts::MAX_AFFINITY_S,
        }
    }

    /// A worker's table.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn table(&self) -> Result<connections::Connections, AllocationError> {
        let table = connections::Connections::new(self.capacity as usize, &self.timeouts())?;
        Ok(table.admitting(self.admissions_per_s))
    }
}

impl Default for Nat {
    fn default() -> Self {
        let timeouts = nat::Timeouts::default();
        Self { addresses: 4, first_port: 1024, last_port: u16::MAX, timeouts }
    }
}

impl Nat {
    /// The longest that a silent connection may be known, in milliseconds: while it is, its backend's slot is
    /// nobody else's (I4).
    pub fn longest_ms(&self) -> u64 {
        let nat::Timeouts { opening_s, tcp_idle_s, half_closed_s, time_wait_s, udp_idle_s } =
            self.timeouts;
        let all = [opening_s, tcp_idle_s, half_closed_s, time_wait_s, udp_idle_s];
        let longest = all.into_iter().max().unwrap_or_default();
        // A packet is noted by the second, and what has run out is swept as often.
        (u64::from(longest) + 2) * 1000
    }

    /// The table for all workers.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn slots(&self) -> Result<nat::Slots, AllocationError> {
        nat::Slots::new(self.addresses as usize, self.timeouts, self.first_port..=self.last_port)
    }
}

impl Default for Maglev {
    fn default() -> Self {
        Self { table_size: 5003, seed: "wiremesh".to_owned() }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { backends: 1 << 14, vips: 1 << 16, health_checks: 1024, local_clients: 10_000 }
    }
}

impl Limits {
    /// Whether a process that was started with these limits can take over what is wanted, on a node with these
    /// addresses: its tables and maps have the size they have.
    ///
    /// # Errors
    /// The first limit exceeded.
    pub fn admit(&self, desired: &Desired, addresses: &[IpAddr]) -> Result<(), Exceeded> {
        let services = desired.services.iter();
        let own = |family| addresses.iter().filter(|own| Family::of(**own) == family).count();
        let vips = services.clone().map(|service| match service.vip {
            Vip::Address(_) => service.ports.len(),
            Vip::Node(family) => service.ports.len() * own(family),
        });
        let vips = vips.sum();
        let backends = services.map(|service| service.backends.len()).sum();
        let checks =
            [(vips, self.vips, "ports", "vips"), (backends, self.backends, "backends", "backends")];
        for (wanted, limit, what, key) in checks {
            if wanted > limit as usize {
                return Err(Exceeded { wanted, limit, what, key });
            }
        }
        Ok(())
    }
}

impl Default for Liveness {
    fn default() -> Self {
        // The last of three pings gets its interval too: within 800 ms, whenever a node goes silent.
        Self { enabled: true, interval_ms: 200, fall: 3 }
    }
}

impl Liveness {
    /// From one ping to a node to the next.
    pub fn interval(&self) -> Duration {
        Duration::from_millis(self.interval_ms.into())
    }
}

/// More than the running process has room for.
#[derive(Debug, thiserror::Error)]
#[error(
    "there are {wanted} {what}, and the process was started for {limit}: restart with limits.{key} raised"
)]
pub struct Exceeded {
    wanted: usize,
    limit: u32,
    what: &'static str,
    key: &'static str,
}

impl Config {
    /// Understands a text; `file` is what it is called in messages.
    ///
    /// # Errors
    /// All that is wrong with it, each with its line.
    pub fn parse(file: &str, text: &str) -> Result<(Self, Vec<Warning>), ConfigErrors> {
        let mut report = finding::Report::new(file, text);
        let written = syntax::parse(text, &mut report).unwrap_or_default();
        let config = Self::from_keys(&written, &mut report);
        Ok((config, report.finish()?))
    }

    fn from_keys(written: &file::File, report: &mut finding::Report) -> Self {
        let node = settings::node(&written.node, report);
        let api = settings::api(&written.api, report);
        let dataplane = settings::dataplane(&written.dataplane, report);
        settings::local_link_copies(&written.node, &written.dataplane, report);
        let connections = settings::connections(&written.connections, report);
        let nat = settings::nat(&written.nat, report);
        let maglev = settings::maglev(&written.maglev, report);
        let limits = settings::limits(&written.limits, report);
        let liveness = settings::liveness(&written.liveness, report);
        let next_hops = services::next_hops(&written.next_hop, report);
        let vteps = settings::vteps(&node, &written.node);
        let overlays = overlays::overlays(&written.overlay, report);
        let of_overlays = overlays.iter().map(|overlay| overlay.addresses.len()).sum();
        let source = sources::sources(&written.source, &api, (&nat, of_overlays), report);
        let services =
            services::services(&written.service, &overlays, vteps, &maglev, &limits, report);
        let desired = Desired { services, overlays };
        Self {
            node,
            api,
            dataplane,
            connections,
            nat,
            maglev,
            limits,
            liveness,
            source,
            next_hops,
            desired,
        }
    }

    /// The keys that differ in `new` and that a running process cannot change. The rest (services,
    /// overlays, next hops, pings, and whether ARP is answered) is part of every snapshot and changes with it.
    pub fn restart_needed(&self, new: &Self) -> Vec<&'static str> {
        let mut keys = Vec::new();
        // Takes each table apart without `..`, so that a new key does not compile until it is
        // listed.
        macro_rules! differing {
            ($($table:ident $(. $part:ident)?: $type:path {
                $($key:ident),+ $(; $other:ident)*
            })+) => {$(
                let $type { $($key,)+ $($other: _,)* } = &self.$table$(.$part)?;
                let next = &new.$table$(.$part)?;
                $(if *$key != next.$key {
                    keys.push(concat!(stringify!($table), ".", stringify!($key)));
                })+
            )+};
        }
        differing! {
            node: Node {
                name, interfaces, vtep, vtep6, workers, cores, announce_table, local_link; answer_arp
            }
            api: Api { socket, socket_mode, listen, tls, state_directory, metrics_limit }
            dataplane: Dataplane {
                xdp_mode, copy_mode, idle, idle_spin_us, frame_size_bytes, frames_per_queue,
                ring_size, rx_ring_size, tx_ring_size, fill_ring_size, completion_ring_size,
                fill_batch, huge_pages, need_wakeup, tx_budget, busy_poll_us, busy_poll_budget,
                prefer_busy_poll, icmp_errors_per_s, hang_timeout_ms
            }
            connections: Connections {
                capacity, admissions_per_s, unconfirmed_s, tcp_idle_s, tcp_closing_s, udp_idle_s
            }
            nat: Nat { addresses, first_port, last_port; timeouts }
            nat.timeouts: nat::Timeouts {
                opening_s, tcp_idle_s, half_closed_s, time_wait_s, udp_idle_s
            }
            maglev: Maglev { table_size, seed }
            limits: Limits { backends, vips, health_checks, local_clients }
            source: Sources { swarm }
        }
        keys
    }
}

/// Reads and understands a file.
///
/// # Errors
/// If it cannot be read, or all that is wrong with it.
pub fn load(path: &Path) -> Result<(Config, Vec<Warning>), LoadError> {
    understand(path, fs::read_to_string(path))
}

/// What [`load`] makes of what reading the file gave.
pub(crate) fn understand(
    path: &Path,
    text: io::Result<String>,
) -> Result<(Config, Vec<Warning>), LoadError> {
    let path_buf = || path.to_owned();
    match text {
        Ok(text) if text.trim().is_empty() => Err(LoadError::Empty { path: path_buf() }),
        Ok(text) => Ok(Config::parse(&path.to_string_lossy(), &text)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(LoadError::Missing { path: path_buf() })
        }
        Err(source) => Err(LoadError::Unreadable { path: path_buf(), source }),
    }
}

/// As the kernel knows it, which is that of the UTS namespace.
fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "localhost".to_owned(),
        name => name.to_owned(),
    }
}

#[cfg(test)]
mod tests;
