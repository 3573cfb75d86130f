//! Docker Swarm as a source: what its services publish, and the tasks that serve them, with nothing to say
//! about each. Managers read it from their engine, the others from a manager's Wiremesh
//! ([ADR 16](../../../docs/adr/0016-a-swarm-is-read-by-its-managers.md)).
//!
//! Whatever fails, the last table stays in force, and it is tried again.

mod connection;
mod engine;
mod further;
mod reading;
mod table;
mod wanted;

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    fmt,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use ipnet::Ipv4Net;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{self, Instant},
};
use tracing::{info, warn};
use utoipa::ToSchema;

pub use self::{
    connection::TlsError,
    further::Further,
    reading::{NEWS_TIMEOUT, News},
    table::{Assigned, Ingress, Locality, Node, Published, Table, Task},
    wanted::Wanted,
};
use self::{
    connection::{AskError, Connection, Peer},
    further::{Keeper, Room},
    reading::{SwarmError, Tables},
};
use crate::{
    causes,
    config::{self, Config, Maglev},
    pem::PemFile,
};

/// How often this node asks its engine for its own place in the swarm.
const LOCAL: Duration = Duration::from_secs(2);
/// How long after a failure it is tried again: twice as long each time, up to a bound.
const RETRY: Duration = Duration::from_millis(200);
const MAX_RETRY: Duration = Duration::from_secs(5);

/// What is known of the swarm at one moment.
#[derive(Debug, Default)]
pub struct State {
    /// What this node is to do.
    pub wanted: Wanted,
    /// What others are told; `None` if it is read from them.
    pub news: Option<Arc<News>>,
    /// How it is going.
    pub status: SwarmStatus,
}

/// How the Docker Swarm is read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SwarmStatus {
    /// Its id; empty until it is known.
    pub cluster: String,
    /// Who tells of it: this node's `engine`, or `managers`.
    pub from: String,
    /// Whether what is known is what the managers say now. If not, the last state stays in force.
    pub fresh: bool,
    /// Why it is not.
    pub reason: Option<String>,
    /// This node's address in the ingress network, once Docker has given it one.
    #[schema(value_type = Option<String>)]
    pub mesh_address: Option<Ipv4Addr>,
    /// Further ones, which it has found free: `source.swarm.mesh_addresses`.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub further_mesh_addresses: Vec<Ipv4Addr>,
    /// Those that Docker has given to another since: they only keep the connections they have.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub leaving_mesh_addresses: Vec<Ipv4Addr>,
    /// Its nodes.
    pub nodes: usize,
    /// Services that publish ports.
    pub services: usize,
    /// Their tasks that run.
    pub tasks: usize,
    /// What is not done as asked for, and why.
    pub remarks: Vec<String>,
}

impl fmt::Display for SwarmStatus {
    /// For people: a line, and one for each thing that is not as it should be.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cluster, from, nodes, services, tasks, .. } = self;
        let cluster = if cluster.is_empty() { "unknown" } else { cluster };
        write!(f, "swarm {cluster} by its {from}: ")?;
        write!(f, "{nodes} nodes, {services} services, {tasks} tasks, ")?;
        match self.mesh_address {
            Some(address) => write!(f, "mesh address {address}")?,
            None => f.write_str("no mesh address yet")?,
        }
        self.further_mesh_addresses.iter().try_for_each(|further| write!(f, ", {further}"))?;
        self.leaving_mesh_addresses.iter().try_for_each(|a| write!(f, ", {a} (leaving)"))?;
        writeln!(f)?;
        if let Some(reason) = &self.reason {
            writeln!(f, "  as last known: {reason}")?;
        }
        self.remarks.iter().try_for_each(|remark| writeln!(f, "  {remark}"))
    }
}

/// Reads the swarm for as long as it lives.
pub struct Swarm {
    state: watch::Receiver<Arc<State>>,
    task: AbortHandle,
}

impl Swarm {
    /// Begins. What there is to know comes by [`subscribe`](Self::subscribe).
    ///
    /// # Errors
    /// If the files of certificates are not what they should be.
    pub fn start(config: &Config, swarm: &config::Swarm) -> Result<Self, TlsError> {
        let api = &config.api;
        let engine = match &swarm.engine {
            config::Engine::Unix(path) => Peer::Unix(path.clone()),
            config::Engine::Tcp { address, certificates } => {
                let tls = certificates.as_ref().map(|folder| {
                    // As Docker's own client calls them.
                    let files = ["ca.pem", "cert.pem", "key.pem"].map(|name| folder.join(name));
                    let setting = "source.swarm.cert_path";
                    let [ca, certificate, key] =
                        files.each_ref().map(|path| PemFile { path, setting });
                    connection::tls(ca, certificate, key)
                });
                Peer::Tcp(address.clone(), tls.transpose()?)
            }
        };
        let tls = api.tls.as_ref().map(|tls| {
            // One authority for all nodes: what lets others in lets us in elsewhere.
            connection::tls(tls.client_ca(), tls.certificate(), tls.key())
        });
        let tls = tls.transpose()?;
        let manager = |manager: &config::Manager| {
            Peer::Tcp(manager.address.clone(), tls.clone().filter(|_| manager.tls))
        };
        let managers = swarm.managers.iter().map(manager).collect();
        let vtep = config.node.vteps().into_iter().find_map(ipv4);
        let (shown, state) = watch::channel(Arc::default());
        let reader = Reader {
            engine,
            managers,
            poll: Duration::from_millis(swarm.poll_ms.into()),
            maglev: config.maglev.clone(),
            further: swarm.mesh_addresses as usize - 1,
            keeper: Keeper::start(vtep),
            shown,
            table: Arc::default(),
            local: Local::default(),
            wanted_of: None,
            reads_engine: false,
            trouble: None,
            version: first_version(),
        };
        let task = tokio::spawn(reader.run()).abort_handle();
        Ok(Self { state, task })
    }

    /// The newest, from now on.
    pub fn subscribe(&self) -> watch::Receiver<Arc<State>> {
        self.state.clone()
    }
}

impl Drop for Swarm {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn ipv4(address: IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    }
}

/// One that no earlier life of this daemon has given.
fn first_version() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_micros() as u64)
}

/// What only this node's own engine knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Local {
    /// This node's id.
    pub node: String,
    /// Its address in the ingress network.
    pub mesh_address: Option<Ipv4Addr>,
    /// All addresses of that network.
    subnet: Option<Ipv4Net>,
    /// Those of others there: its gateway, this node's containers, and what other nodes tell.
    others: BTreeSet<Ipv4Addr>,
    /// Where tunnels to those end that other nodes tell of.
    ends: BTreeMap<Ipv4Addr, Ipv4Addr>,
}

struct Reader {
    engine: Peer,
    managers: Vec<Peer>,
    poll: Duration,
    maglev: Maglev,
    shown: watch::Sender<Arc<State>>,
    table: Arc<Table>,
    local: Local,
    /// What the wanted state that is shown was made of.
    wanted_of: Option<(Arc<Table>, Local, Further)>,
    /// How many mesh addresses are wanted beside Docker's.
    further: usize,
    keeper: Keeper,
    reads_engine: bool,
    trouble: Option<String>,
    version: u64,
}

impl Reader {
    async fn run(mut self) {
        let mut pause = RETRY;
        loop {
            let begun = Instant::now();
            let Err(error) = self.follow().await;
            let sentence = causes::line(&error);
            if self.trouble.is_none() {
                let stays = if self.is_known() { "; what is known of it stays" } else { "" };
                warn!("the swarm can't be read: {sentence}{stays}");
            }
            self.trouble = Some(sentence);
            self.show();
            pause = if begun.elapsed() > MAX_RETRY { RETRY } else { (pause * 2).min(MAX_RETRY) };
            let again = Instant::now() + pause;
            // What others say of our addresses needs no engine.
            while time::timeout_at(again, self.keeper.changed()).await.is_ok() {
                self.show();
            }
        }
    }

    fn is_known(&self) -> bool {
        !self.table.cluster.is_empty()
    }

    /// Follows the swarm, until something fails.
    async fn follow(&mut self) -> Result<Infallible, SwarmError> {
        let mut engine = Connection::new(self.engine.clone());
        let info = own_info(&mut engine).await?;
        self.reads_engine = info.control_available;
        let mut tables = match info.control_available {
            true => Tables::of_engine(self.engine.clone(), self.poll),
            false if self.managers.is_empty() => return Err(SwarmError::NoManagers),
            false => Tables::of_managers(self.managers.clone()),
        };
        let mut look = time::interval(LOCAL);
        look.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                table = tables.next() => {
                    let before = std::mem::replace(&mut self.table, Arc::new(table?));
                    if let Some(trouble) = self.trouble.take() {
                        info!("the swarm is read again, after: {trouble}");
                    }
                    if before.ingress != self.table.ingress || self.waits_for_an_end() {
                        look.reset_immediately();
                    }
                }
                () = self.keeper.changed() => {}
                _ = look.tick() => self.look(&mut engine).await?,
            }
            self.show();
        }
    }

    /// Where this node is. Its engine may be away for a while when others tell of the swarm.
    ///
    /// # Errors
    /// If it has another role now, or is needed for the rest, too.
    async fn look(&mut self, engine: &mut Connection) -> Result<(), SwarmError> {
        match self.local(engine).await {
            Ok(local) => {
                self.local = local;
                Ok(())
            }
            Err(SwarmError::Ask { .. }) if !self.reads_engine => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn local(&self, engine: &mut Connection) -> Result<Local, SwarmError> {
        let info = own_info(engine).await?;
        match (self.reads_engine, info.control_available) {
            (true, false) => return Err(SwarmError::Role("a worker's")),
            (false, true) => return Err(SwarmError::Role("a manager's")),
            _ => {}
        }
        let mut local = Local { node: info.node_id, ..Local::default() };
        if let Some(Ingress { name, .. }) = &self.table.ingress {
            let name = utf8_percent_encode(name, NON_ALPHANUMERIC);
            let path = format!("/networks/{name}?verbose=true");
            let network = match asked(engine, &path).await {
                // Removed, or not here yet.
                Err(SwarmError::Ask { source: AskError::Refused { status: 404, .. }, .. }) => {
                    engine::Network::default()
                }
                network => network?,
            };
            local.read(&network);
        }
        Ok(local)
    }

    /// Whether a task can't be reached before its node has told where its tunnels end, as is so where that is
    /// not where nodes are known to be. To look more often in other swarms, too, would only keep an engine busy
    /// that is starting containers.
    fn waits_for_an_end(&self) -> bool {
        let Table { nodes, services, .. } = &*self.table;
        let is_nodes = |end: &Ipv4Addr| nodes.iter().any(|node| node.address == IpAddr::V4(*end));
        let mut tasks = services.iter().flat_map(|service| &service.tasks);
        !self.local.ends.values().all(is_nodes)
            && tasks.any(|task| !self.local.ends.contains_key(&task.address))
    }

    /// Has further mesh addresses looked for, if there are to be some.
    fn look_for_further(&self) {
        let Table { ingress, nodes, assigned, .. } = &*self.table;
        let Local { node, mesh_address, subnet, others, ends } = &self.local;
        let room = || {
            let (ingress, own) = (ingress.as_ref()?, (*mesh_address)?);
            let mut assigned = assigned.clone();
            assigned.live.extend(others);
            let known = nodes.iter().filter(|other| other.id != *node);
            let known = known.filter_map(|other| ipv4(other.address));
            let mut peers: BTreeSet<Ipv4Addr> = ends.values().copied().chain(known).collect();
            ends.get(&own).map(|end| peers.remove(end));
            Some(Room {
                count: Some(self.further).filter(|further| *further > 0)?,
                vni: ingress.vni,
                port: ingress.port,
                subnet: (*subnet)?,
                own,
                peers,
                assigned,
            })
        };
        self.keeper.want(room());
    }

    /// Shows what has changed, if anything has.
    fn show(&mut self) {
        self.look_for_further();
        let shown = self.shown.borrow().clone();
        let Table { cluster, nodes, services, remarks, assigned, .. } = &*self.table;
        // What is released is so at once, not only when the keeper has heard of it.
        let further = self.keeper.found().beside(assigned);
        let status = SwarmStatus {
            cluster: cluster.clone(),
            from: if self.reads_engine { "engine" } else { "managers" }.to_owned(),
            fresh: self.trouble.is_none() && self.is_known(),
            reason: self.trouble.clone(),
            mesh_address: self.local.mesh_address,
            nodes: nodes.len(),
            services: services.len(),
            tasks: services.iter().map(|service| service.tasks.len()).sum(),
            further_mesh_addresses: further.used.clone(),
            leaving_mesh_addresses: further.leaving.clone(),
            remarks: remarks.iter().chain(&further.lack).cloned().collect(),
        };
        // Each is said once.
        let new = status.remarks.iter().filter(|remark| !shown.status.remarks.contains(remark));
        new.for_each(|remark| warn!("swarm: {remark}"));
        let is_of = |(table, local, had): &(Arc<Table>, Local, Further)| {
            Arc::ptr_eq(table, &self.table) && *local == self.local && *had == further
        };
        let wanted = match &self.wanted_of {
            Some(made_of) if is_of(made_of) => shown.wanted.clone(),
            _ => {
                let place = (&self.local, &further);
                wanted::wanted(&self.table, place, &shown.wanted, &self.maglev)
            }
        };
        self.wanted_of = Some((self.table.clone(), self.local.clone(), further));
        let told = shown.news.as_ref().map(|news| (&news.table, news.fresh));
        let tell = (&*self.table, status.fresh);
        let news = match &shown.news {
            _ if !self.reads_engine => None,
            Some(news) if told == Some(tell) => Some(news.clone()),
            _ => {
                self.version += 1;
                let (version, table) = (self.version, (*self.table).clone());
                Some(Arc::new(News { version, fresh: status.fresh, table }))
            }
        };
        if status != shown.status || wanted != shown.wanted || news != shown.news {
            self.shown.send_replace(Arc::new(State { wanted, news, status }));
        }
    }
}

impl Local {
    /// Takes from a network what it says of this node and of others there.
    fn read(&mut self, network: &engine::Network) {
        self.mesh_address = own_address(network);
        let told = network.services.values().flat_map(|service| &service.tasks);
        for task in told {
            let end = task.info.get("Host IP").and_then(|end| end.parse().ok());
            if let (Some(address), Some(end)) = (table::address(&task.endpoint_ip), end) {
                self.ends.insert(address, end);
            }
        }
        let subnet = network.ipam.config.first();
        self.subnet = subnet.and_then(|subnet| subnet.subnet.parse().ok());
        let here = network.containers.values().map(|container| &container.ipv4_address);
        let here = here.chain(subnet.map(|subnet| &subnet.gateway));
        self.others = here.filter_map(|text| table::address(text)).collect();
        self.others.extend(self.ends.keys());
        self.others.retain(|address| Some(*address) != self.mesh_address);
    }
}

/// The address of what stands for the node itself, from which Docker's own mesh would send.
fn own_address(network: &engine::Network) -> Option<Ipv4Addr> {
    let endpoint = format!("{}-endpoint", network.name);
    let own = network.containers.values().find(|container| container.name == endpoint)?;
    table::address(&own.ipv4_address)
}

/// This engine's place in the swarm.
async fn own_info(engine: &mut Connection) -> Result<engine::SwarmInfo, SwarmError> {
    let info: engine::Info = asked(engine, "/info").await?;
    match &*info.swarm.local_node_state {
        "active" => Ok(info.swarm),
        other => Err(SwarmError::NoSwarm(other.to_owned())),
    }
}

async fn asked<T: serde::de::DeserializeOwned>(
    engine: &mut Connection,
    path: &str,
) -> Result<T, SwarmError> {
    let whose = engine.peer().to_string();
    engine::read(engine, path).await.map_err(|source| SwarmError::Ask { whose, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_own_address_is_that_of_its_endpoint_in_the_ingress_network() {
        let network = include_str!("swarm/fixtures/ingress.json");
        let network: engine::Network = serde_json::from_str(network).unwrap();
        assert_eq!(own_address(&network), Some([10, 0, 0, 2].into()));
        assert_eq!(own_address(&engine::Network::default()), None);
    }

    #[test]
    fn a_node_tells_who_else_is_in_the_ingress_network_and_where_their_tunnels_end() {
        // The second of two nodes, each with a task.
        let network = include_str!("swarm/fixtures/ingress-verbose.json");
        let mut local = Local::default();
        local.read(&serde_json::from_str(network).unwrap());
        let address = |last| Ipv4Addr::from([10, 0, 0, last]);
        assert_eq!(local.mesh_address, Some(address(3)));
        assert_eq!(local.subnet, Some("10.0.0.0/24".parse().unwrap()));
        assert_eq!(local.others, [1, 2, 5, 6].map(address).into(), "the gateway among them");
        let end = |last| Ipv4Addr::from([10, 78, 0, last]);
        let ends = [(2, 11), (3, 12), (5, 11), (6, 12)];
        assert_eq!(local.ends, ends.map(|(there, at)| (address(there), end(at))).into());
    }
}
