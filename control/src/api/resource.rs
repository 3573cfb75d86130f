//! What the API's answers are made of, as far as `status` does not have it.

use std::{
    collections::{BTreeMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    net::IpAddr,
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Problem;
use crate::{
    config::{Remark, ServiceSpec},
    desired::Owner,
    view::{self, Census, Observed, Placed, View},
};

/// A service, and who may change it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Who may change it: `file`, `api` or `swarm`.
    pub owner: String,
    /// Names this state of what is wanted: an ETag without its quotes.
    pub version: String,
    /// What is wanted.
    pub spec: ServiceSpec,
    /// How its backends are.
    pub backends: Backends,
}

/// How many of a service's backends are in which state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Backends {
    /// They take new connections.
    pub active: usize,
    /// They keep those they have: their weight is 0.
    pub draining: usize,
    /// They did until their drain's end.
    pub drained: usize,
    /// Their checks say that they don't serve.
    pub down: usize,
    /// Their next hop is unknown.
    pub unreachable: usize,
}

/// A node, as far as this one knows: itself, or one that its tunnels lead to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// Its name, if it is this one.
    pub name: Option<String>,
    /// Where tunnels to it end.
    pub vtep: Option<String>,
    /// Of this one: `ready` or `not ready`. Of others: `active`, or `unreachable` if none of their backends
    /// can be reached.
    pub state: String,
    /// Why it is unreachable.
    pub reason: Option<String>,
    /// What pings say of others: `alive`, `silent`, or `unknown` if they have never answered one. Nothing of
    /// those that are not pinged.
    pub liveness: Option<String>,
    /// Services that it has backends of.
    pub services: usize,
    /// Its backends.
    pub backends: usize,
}

/// This node, and those that its tunnels lead to, by address.
pub fn nodes(observed: &Observed, view: &View) -> Vec<Node> {
    let mut others: BTreeMap<IpAddr, Node> = BTreeMap::new();
    for (service, placements) in view.services() {
        let mut seen = HashSet::new();
        for (backend, placement) in service.backends.iter().zip(placements) {
            let node = others.entry(backend.vtep).or_insert_with(|| Node {
                name: None,
                vtep: Some(backend.vtep.to_string()),
                state: "unreachable".to_owned(),
                reason: placement.unreachable.clone(),
                liveness: view.standings.get(&backend.vtep).map(|s| s.word().to_owned()),
                services: 0,
                backends: 0,
            });
            node.backends += 1;
            node.services += usize::from(seen.insert(backend.vtep));
            if placement.unreachable.is_none() {
                (node.state, node.reason) = ("active".to_owned(), None);
            }
        }
    }
    let ready = if observed.ready(view) { "ready" } else { "not ready" };
    // Where it has backends of its own, it is in the list by its own address too.
    let this = Node {
        name: Some(observed.node.clone()),
        vtep: view.vteps.first().map(ToString::to_string),
        state: ready.to_owned(),
        reason: None,
        liveness: None,
        services: 0,
        backends: 0,
    };
    std::iter::once(this).chain(others.into_values()).collect()
}

/// What goes to a backend. The tables remember which backend a flow has, by a hash: no addresses, so
/// there is no list of single flows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Flow {
    /// The service.
    pub service: String,
    /// The backend.
    pub backend: String,
    /// `active`, `draining`, `drained`, `down` or `unreachable`.
    pub state: String,
    /// Connections remembered, unless ended.
    pub connections: u64,
    /// Packets forwarded to it.
    pub packets: u64,
    /// Bytes forwarded to it, outer headers included.
    pub bytes: u64,
}

/// The backends with the most connections: of one service, or of all.
pub fn flows<'a>(
    observed: &Observed,
    services: impl Iterator<Item = Placed<'a>>,
    census: &Census,
    top: usize,
) -> Vec<Flow> {
    let mut flows: Vec<Flow> = services
        .flat_map(|(service, placements)| {
            observed.backends(service, placements, census).into_iter().map(|backend| Flow {
                service: service.name.clone(),
                backend: backend.name,
                state: backend.state,
                connections: backend.connections,
                packets: backend.packets,
                bytes: backend.bytes,
            })
        })
        .collect();
    flows.sort_by_key(|flow| std::cmp::Reverse((flow.connections, flow.packets)));
    flows.truncate(top);
    flows
}

/// A service as it is after a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Changed {
    /// It.
    #[serde(flatten)]
    pub service: Service,
    /// What is done as wanted, and may not have been meant.
    pub warnings: Vec<Remark>,
}

impl Changed {
    /// The service as it is seen now.
    ///
    /// # Errors
    /// If it has been removed already.
    pub fn new(view: &View, name: &str, warnings: Vec<Remark>) -> Result<Self, Problem> {
        let placed = view.service(name).ok_or_else(|| Problem::no_service(name))?;
        Ok(Self { service: Service::new(placed), warnings })
    }
}

impl Service {
    /// Puts it together.
    pub fn new((service, placements): Placed<'_>) -> Self {
        let mut backends = Backends::default();
        for (backend, placement) in service.backends.iter().zip(placements) {
            match view::state(backend, placement) {
                "active" => backends.active += 1,
                "draining" => backends.draining += 1,
                "drained" => backends.drained += 1,
                "down" => backends.down += 1,
                _ => backends.unreachable += 1,
            }
        }
        let spec = ServiceSpec::from(&**service);
        let (name, owner) = (service.name.clone(), service.owner.to_string());
        Self { name, owner, version: version(service.owner, &spec), spec, backends }
    }

    /// The HTTP header's value.
    pub fn etag(&self) -> String {
        format!("\"{}\"", self.version)
    }
}

/// Names a state of a service: the same for the same words of the same owner. 64 bits tell apart all that a
/// service can ever have been.
pub fn version(owner: Owner, spec: &ServiceSpec) -> String {
    let mut hasher = DefaultHasher::new();
    (owner == Owner::Api, spec).hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
