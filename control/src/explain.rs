//! `wiremesh explain`: which backend a connection would get, and why. It runs the packet path's own
//! `select` on a scratch table; of a running daemon it looks into the workers' tables too.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{Mutex, OnceLock, PoisonError},
};

use dataplane::{
    connections::{Connections, Timeouts, Verdict},
    counters::{Counters, DropReason},
    flow::{Address, Flow, FlowKey, HashKey, Kind, protocol, tcp_flags},
    forwarding::{Forwarding, Slot},
    memory::AllocationError,
    nat::{Slots, ToTask},
    schedule::{self, Scheduler},
    select::{self, Context},
    time::Tick,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    config::{self, Config},
    desired::{self, Backend, Desired, Mode, Protocol, Service, ServicePort, port_ranges},
    offline::Offline,
    plan::{Placement, Placements, PlanError},
    view::{self, Observed, View},
    workers::Handle,
};

/// Why there is no explanation.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum ExplainError {
    /// One end is IPv4, the other IPv6.
    #[error("{0} and {1} are of different families: no packet has both")]
    MixedFamilies(SocketAddr, SocketAddr),
    /// The configuration can't be.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// No memory.
    #[error(transparent)]
    Connections(#[from] AllocationError),
}

/// What would happen to a connection's first packet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Explanation {
    /// It goes to a backend.
    Forwarded {
        /// The service.
        service: String,
        /// How the service's new connections are placed.
        scheduler: config::Scheduler,
        /// Whether a new connection is sure to get this backend. `round-robin` and `least-connections` decide
        /// only when it comes; then it is the one that a connection gets which can't be remembered.
        certain: bool,
        /// The backend.
        backend: String,
        /// Its share of new connections.
        weight: u16,
        /// The shares of all backends together.
        weights: u32,
        /// The node that runs it.
        #[schema(value_type = String)]
        vtep: IpAddr,
        /// The tunnel's UDP port.
        port: u16,
        /// The tunnel's network.
        vni: u32,
        /// Its MAC address there.
        mac: String,
        /// In mode `nat`: the address and port that packets are translated to.
        #[serde(skip_serializing_if = "Option::is_none")]
        target: Option<String>,
        /// How many of the service's backends take new connections.
        candidates: usize,
        /// Those that drain.
        draining: Vec<String>,
        /// Those whose checks say that they don't serve.
        down: Vec<String>,
        /// Those that can't be reached.
        unreachable: Vec<String>,
        /// Why this one.
        why: String,
    },
    /// It does not.
    Dropped {
        /// The reason's label.
        reason: String,
        /// What it means.
        sentence: String,
        /// Why that is so here.
        why: String,
    },
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forwarded {
                service,
                certain,
                backend,
                weight,
                weights,
                candidates,
                vtep,
                port,
                vni,
                mac,
                target,
                why,
                ..
            } => {
                let tunnel = SocketAddr::new(*vtep, *port);
                writeln!(f, "service  {service}")?;
                let one = format!("{backend}, weight {weight} of {weights}");
                if *certain {
                    writeln!(f, "backend  {one}")?;
                } else {
                    writeln!(f, "backend  any of {candidates}; {one}, if it can't be remembered")?;
                }
                if let Some(target) = target {
                    writeln!(f, "nat      to {target}")?;
                }
                writeln!(f, "tunnel   VNI {vni} to {tunnel}, inner MAC {mac}")?;
                writeln!(f, "because  {why}")
            }
            Self::Dropped { reason, sentence, why } => {
                writeln!(f, "dropped  {reason}: {sentence}")?;
                writeln!(f, "because  {why}")
            }
        }
    }
}

/// What would happen to a connection's first packet, and what is remembered of the connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Explained {
    /// As if it were new.
    #[serde(flatten)]
    pub first_packet: Explanation,
    /// Who remembers it. A packet that is no SYN goes where the worker that gets it remembers.
    pub remembered: Vec<Remembered>,
    /// How it is translated, in mode `nat`, if it is open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub translated: Option<Translated>,
}

/// A connection of mode `nat`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Translated {
    /// Whom the backend takes for its client: a mesh address of this node, and a port.
    pub mesh: String,
    /// Whom it has connected to.
    pub target: String,
    /// The backend; empty if it was removed, or is down and its connections go elsewhere.
    pub backend: String,
    /// `opening`, `established`, `closing`, `closed`, `reset` or `datagrams`.
    pub state: String,
}

/// A worker remembers a connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Remembered {
    /// The worker.
    pub worker: usize,
    /// Whose it is.
    pub backend: String,
    /// `active`, `draining`, `down` or `unreachable`; `gone` if the backend was
    /// removed, or is down and its connections go elsewhere: then it is chosen anew.
    pub state: String,
}

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first_packet)?;
        if let Some(Translated { mesh, target, backend, state }) = &self.translated {
            let whose = match &**backend {
                "" => "a backend that is gone or down",
                name => name,
            };
            return writeln!(f, "now      {state}: {mesh} speaks to {target}, which is {whose}");
        }
        if self.remembered.is_empty() {
            return writeln!(f, "now      no worker remembers it: its next packet is treated so");
        }
        for Remembered { worker, backend, state } in &self.remembered {
            match &**state {
                "gone" => writeln!(
                    f,
                    "now      worker {worker} remembers a backend that is gone or down"
                )?,
                _ => writeln!(f, "now      worker {worker} remembers {backend}, which is {state}")?,
            }
        }
        Ok(())
    }
}

/// Explains what would happen to the first packet from `client` to `vip`.
///
/// # Errors
/// If there can be no such packet, or the configuration can't be forwarded by.
pub fn explain(
    config: &Config,
    protocol: Protocol,
    client: SocketAddr,
    vip: SocketAddr,
) -> Result<Explanation, ExplainError> {
    let flow = first_packet(protocol, client, vip)?;
    let Offline { forwarding, placements, .. } = Offline::new(config, None)?;
    explained(&flow, protocol, vip, (&config.desired, &placements, &forwarding), None)
}

/// The same of a running daemon, and what its workers remember.
///
/// # Errors
/// If there can be no such packet.
pub fn running(
    observed: &Observed,
    view: &View,
    protocol: Protocol,
    client: SocketAddr,
    vip: SocketAddr,
) -> Result<Explained, ExplainError> {
    let flow = first_packet(protocol, client, vip)?;
    let state = (&view.desired, &view.placements, &*view.forwarding);
    let bound = bound(observed, &flow, &view.forwarding);
    let first_packet = explained(&flow, protocol, vip, state, bound)?;
    let key = &flow.key;
    let Some(service) = view.forwarding.service_at(key.dst, key.protocol, key.dst_port) else {
        return Ok(Explained { first_packet, remembered: Vec::new(), translated: None });
    };
    // What is remembered counts, also if its backend can't be reached now, or is gone: then it has no slot.
    let judge = |slot| match view.forwarding.backend(slot) {
        Some(backend) if backend.service == service => Verdict::Serves(Some(slot)),
        Some(_) => Verdict::Stranger,
        None => Verdict::Serves(None),
    };
    let (hash, now) = (key.hash(&observed.hash_key), observed.now());
    if view.forwarding.service(service).is_some_and(|service| service.nat.is_some()) {
        let translated =
            observed.nat.as_deref().and_then(|slots| translated(slots, hash, key, view));
        return Ok(Explained { first_packet, remembered: Vec::new(), translated });
    }
    let remembered = observed.workers.iter().enumerate().filter_map(|(worker, handle)| {
        let (backend, state) = match handle.connections.find(hash, now, judge)? {
            None => (String::new(), "gone"),
            Some(slot) => {
                let (_, backend, placement) = in_slot(slot, &view.desired, &view.placements)?;
                (backend.name.clone(), view::state(backend, placement))
            }
        };
        Some(Remembered { worker, backend, state: state.to_owned() })
    });
    Ok(Explained { first_packet, remembered: remembered.collect(), translated: None })
}

/// What a connection's slot says, if it has one.
fn translated(slots: &Slots, hash: u64, key: &FlowKey, view: &View) -> Option<Translated> {
    let ToTask { id, state, backend, mesh, task, task_port, .. } = slots.find(hash, key)?;
    let known = view.forwarding.backend(backend);
    let its = known.and_then(|_| in_slot(backend, &view.desired, &view.placements));
    let socket = |address: Address, port| SocketAddr::new(address.into(), port).to_string();
    Some(Translated {
        mesh: socket(mesh, id.port()),
        target: socket(task, task_port),
        backend: its.map(|(_, backend, _)| backend.name.clone()).unwrap_or_default(),
        state: state.label().to_owned(),
    })
}

/// The backend that has this slot.
fn in_slot<'a>(
    slot: Slot,
    desired: &'a Desired,
    placements: &'a Placements,
) -> Option<(&'a Service, &'a Backend, &'a Placement)> {
    view::placed_backends(desired, placements).find(|(_, _, placement)| placement.slot == slot)
}

/// A backend that a client is bound to, and the worker that remembers it.
type Bound = (usize, Slot);

/// What the workers remember of the client itself.
fn bound(observed: &Observed, flow: &Flow, forwarding: &Forwarding) -> Option<Bound> {
    let key = &flow.key;
    let service = forwarding.service_at(key.dst, key.protocol, key.dst_port)?;
    let service = forwarding.service(service)?;
    let timeout_s = service.schedule.affinity_timeout_s()?;
    let hash = schedule::client(service, key).hash(&observed.hash_key);
    let known = |(worker, handle): (usize, &Handle)| {
        Some((worker, handle.connections.affine(hash, observed.now(), timeout_s)?))
    };
    observed.workers.iter().enumerate().find_map(known)
}

/// A table lives as long as the process, so there is one for all explanations. It remembers nothing, so that
/// each finds nothing, and gets Maglev's answer.
static SCRATCH: OnceLock<Mutex<Connections>> = OnceLock::new();

fn explained(
    flow: &Flow,
    protocol: Protocol,
    vip: SocketAddr,
    (desired, placements, forwarding): (&Desired, &Placements, &Forwarding),
    bound: Option<Bound>,
) -> Result<Explanation, ExplainError> {
    if SCRATCH.get().is_none() {
        let _ = SCRATCH.set(Mutex::new(Connections::new(16, &Timeouts::default())?.admitting(0)));
    }
    let scratch = SCRATCH.get().expect("set above");
    let mut connections = scratch.lock().unwrap_or_else(PoisonError::into_inner);
    let counters = Counters::new(0);
    let key = HashKey::random();
    let mut scheduler = Scheduler::new(0, 0, Vec::new(), key);
    let mut context = Context::new(&mut connections, &mut scheduler, &counters, Tick(0));
    let hash = flow.key.hash(&key);
    let dropped = |reason: DropReason, why| {
        let (reason, sentence) = (reason.label().to_owned(), reason.sentence().to_owned());
        Ok(Explanation::Dropped { reason, sentence, why })
    };
    let selected = match select::select(flow, hash, forwarding, &mut context) {
        Ok(selected) => selected,
        Err(reason) => {
            let state = (desired, placements, forwarding);
            return dropped(reason, why_dropped(state, protocol, vip));
        }
    };
    let its = forwarding.service_at(flow.key.dst, flow.key.protocol, flow.key.dst_port);
    let nat = its.and_then(|its| forwarding.service(its)).and_then(|service| service.nat.as_ref());
    if nat.is_some_and(|nat| !nat.allows(flow.key.src)) {
        let (client, service) =
            (IpAddr::from(flow.key.src), its.and_then(|its| desired.services.get(its as usize)));
        let networks = service.iter().flat_map(|service| &service.allow);
        let networks: Vec<String> = networks.map(ToString::to_string).collect();
        let why = format!("{client} is in none of {}", networks.join(", "));
        return dropped(DropReason::NotAllowed, why);
    }
    let placed = |slot: Slot| in_slot(slot, desired, placements);
    let takes = |(_, backend, placement): &(&Service, &Backend, &Placement)| {
        view::state(backend, placement) == "active"
    };
    let bound = bound.and_then(|(worker, slot)| Some((worker, placed(slot).filter(takes)?)));
    let (worker, kept) = bound.unzip();
    let (service, backend, placement) =
        kept.or_else(|| placed(selected.slot)).expect("a selected slot was placed");
    if let Some(why) = &placement.unreachable {
        let why =
            format!("none of {}'s backends can be reached; {}: {why}", service.name, backend.name);
        return dropped(DropReason::NextHopUnresolved, why);
    }
    let own = view::placed(desired, placements).find(|(own, _)| own.name == service.name);
    let (_, own) = own.expect("it is one of them");
    Ok(forwarded(service, own, (backend, target(service, backend, protocol, vip)), worker))
}

/// Where packets to this VIP are translated to, if they are.
fn target(
    service: &Service,
    backend: &Backend,
    protocol: Protocol,
    vip: SocketAddr,
) -> Option<String> {
    let asked = ServicePort { port: vip.port(), protocol };
    let port = service.ports.iter().find(|port| port.published == asked)?;
    let address = backend.address.filter(|_| service.mode == Mode::Nat)?;
    Some(SocketAddr::new(address, port.target).to_string())
}

/// `worker` is who remembers that the client is bound to the backend, if it is.
fn forwarded(
    service: &Service,
    placements: &[Placement],
    (backend, target): (&Backend, Option<String>),
    worker: Option<usize>,
) -> Explanation {
    let (mut takers, mut draining) = (Vec::new(), Vec::new());
    let (mut down, mut unreachable) = (Vec::new(), Vec::new());
    for (backend, placement) in service.backends.iter().zip(placements) {
        match view::state(backend, placement) {
            "active" => takers.push(backend),
            "draining" | "drained" => draining.push(backend.name.clone()),
            "down" => down.push(backend),
            _ => unreachable.push(backend.name.clone()),
        }
    }
    // Where nobody else is left, a service may go on with those that are down.
    let all_down = takers.is_empty();
    if all_down {
        takers = std::mem::take(&mut down);
        takers.retain(|backend| backend.weight > 0);
    }
    let down: Vec<String> = down.into_iter().map(|backend| backend.name.clone()).collect();
    let choice = match takers.len() {
        _ if all_down => "all backends are down, and all_down is keep-last".to_owned(),
        1 => "it is the only backend that takes new connections".to_owned(),
        count => choice(service.scheduler, count, worker),
    };
    let decided_late = matches!(
        service.scheduler,
        desired::Scheduler::RoundRobin | desired::Scheduler::LeastConnections
    );
    let those = |names: &[String], one: &str, many: &str| match names {
        [] => String::new(),
        [name] => format!("; {name} {one}"),
        names => format!("; {} {many}", names.join(", ")),
    };
    let drain = those(&draining, "drains", "drain");
    let ill = those(&down, "is down", "are down");
    let away = those(&unreachable, "can't be reached", "can't be reached");
    Explanation::Forwarded {
        service: service.name.clone(),
        scheduler: service.scheduler.written().0,
        certain: takers.len() == 1 || !decided_late,
        backend: backend.name.clone(),
        weight: backend.weight,
        weights: takers.iter().map(|taker| u32::from(taker.weight)).sum(),
        vtep: backend.vtep,
        port: backend.port,
        vni: backend.vni.get(),
        mac: backend.mac.to_string(),
        target,
        candidates: takers.len(),
        draining,
        down,
        unreachable,
        why: format!("{choice}{drain}{ill}{away}; a remembered connection keeps its backend"),
    }
}

/// Why it is this one of several backends.
fn choice(scheduler: desired::Scheduler, count: usize, worker: Option<usize>) -> String {
    use desired::Scheduler::{LeastConnections, Maglev, RoundRobin, Source};
    let maglev = format!("Maglev chooses it among {count} backends");
    match (scheduler, worker) {
        (Source { timeout_s }, Some(worker)) => format!(
            "the client's latest connection went to it, as worker {worker} remembers, no longer ago than \
             {timeout_s} s"
        ),
        (Source { timeout_s: 0 }, None) => format!("{maglev} by the client's address"),
        (Source { timeout_s }, None) => format!(
            "{maglev} by the client's address, and for {timeout_s} s after a new connection the client keeps it"
        ),
        (Maglev, _) => maglev,
        (RoundRobin, _) => {
            format!("each worker gives its new connections to {count} backends in turn")
        }
        (LeastConnections, _) => format!(
            "each worker gives a new connection to the one of {count} backends with the fewest for its weight"
        ),
    }
}

/// What the configuration has instead of what was asked for.
fn why_dropped(
    (desired, placements, forwarding): (&Desired, &Placements, &Forwarding),
    protocol: Protocol,
    vip: SocketAddr,
) -> String {
    let asked = ServicePort { port: vip.port(), protocol };
    let at = Address::from(vip.ip());
    let mut placed = view::placed(desired, placements);
    // In the same order. A service on the node is where its addresses are.
    let its = forwarding.service_at(at, protocol.number(), vip.port());
    if let Some((service, own)) = its.and_then(|its| placed.nth(its as usize)) {
        let weighted = service.backends.iter().zip(own).filter(|(backend, _)| backend.weight > 0);
        if weighted.clone().count() > 0 && weighted.clone().all(|(_, at)| at.is_down()) {
            return format!("all backends of {} are down, and all_down is stop", service.name);
        }
        return match service.backends.len() {
            0 => format!("the service {} has no backends", service.name),
            1 => format!("the only backend of {} has weight 0", service.name),
            count => format!("all {count} backends of {} have weight 0", service.name),
        };
    }
    let is_there = |index: u32| {
        let service = forwarding.service(index);
        service.is_some_and(|service| service.vips.iter().any(|vip| vip.address == at))
    };
    let at_vip = (0..).zip(&desired.services).filter(|(index, _)| is_there(*index));
    let served: Vec<String> = at_vip
        .map(|(_, service)| {
            format!("{} on {}", service.name, port_ranges(&service.ports).join(" "))
        })
        .collect();
    match &served[..] {
        [] => format!("{} is no VIP: no service has it", vip.ip()),
        served => format!("{} serves {}, not {asked}", vip.ip(), served.join("; ")),
    }
}

fn first_packet(
    protocol: Protocol,
    client: SocketAddr,
    vip: SocketAddr,
) -> Result<Flow, ExplainError> {
    if client.is_ipv4() != vip.is_ipv4() {
        return Err(ExplainError::MixedFamilies(client, vip));
    }
    let protocol = protocol.number();
    let key = FlowKey {
        src: client.ip().into(),
        dst: vip.ip().into(),
        src_port: client.port(),
        dst_port: vip.port(),
        protocol,
    };
    Ok(Flow {
        key,
        kind: Kind::Packet,
        tcp_flags: if protocol == protocol::TCP { tcp_flags::SYN } else { 0 },
        tos: 0,
        dont_fragment: true,
        ip_offset: 14,
        ip_len: 40,
        l4_offset: 34,
        protocol,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"
        node.interfaces = ["absent0"]

        [[service]]
        name = "web"
        vip = "203.0.113.10"
        ports = ["80/tcp", "8000-8010/tcp", "443/udp"]
        vni = 100
        backend = [
            { name = "web-1", vtep = "10.0.0.2", mac = "02:42:0a:00:00:02", weight = 3 },
            { name = "web-2", vtep = "10.0.0.3", mac = "02:42:0a:00:00:03", weight = 0 },
        ]

        [[service]]
        name = "six"
        vip = "2001:db8::10"
        ports = ["80/tcp"]
        vni = 100
        backend = [
            { name = "six-1", vtep = "fd00::2", mac = "02:42:0a:00:00:02", port = 8472 },
            { name = "six-2", vtep = "fd00::3", mac = "02:42:0a:00:00:03" },
        ]

        [[service]]
        name = "draining"
        vip = "203.0.113.11"
        ports = ["80/tcp"]
        vni = 100
        backend = [{ name = "web-1", vtep = "10.0.0.2", mac = "02:42:0a:00:00:02", weight = 0 }]

        [[service]]
        name = "empty"
        vip = "203.0.113.11"
        ports = ["81/tcp"]
    "#;

    /// What is printed about the first TCP packet from there to there.
    fn explained(client: &str, vip: &str) -> String {
        let config = Config::parse("test", CONFIG).unwrap().0;
        let (client, vip) = (client.parse().unwrap(), vip.parse().unwrap());
        explain(&config, Protocol::Tcp, client, vip).unwrap().to_string()
    }

    #[test]
    fn the_backend_is_named_with_its_share_its_tunnel_and_who_is_not_asked() {
        let expected = "\
service  web
backend  web-1, weight 3 of 3
tunnel   VNI 100 to 10.0.0.2:4789, inner MAC 02:42:0a:00:00:02
because  it is the only backend that takes new connections; web-2 drains; a remembered connection \
keeps its backend
";
        assert_eq!(explained("198.51.100.7:40000", "203.0.113.10:80"), expected);
    }

    #[test]
    fn a_tunnel_over_ipv6_is_written_as_a_socket_address() {
        let text = explained("[2001:db8::7]:40000", "[2001:db8::10]:80");
        assert!(
            text.contains("to [fd00::2]:8472,") || text.contains("to [fd00::3]:4789,"),
            "{text}"
        );
        assert!(text.contains("because  Maglev chooses it among 2 backends; a"), "{text}");
    }

    #[test]
    fn a_scheduler_that_decides_when_a_connection_comes_is_not_foretold() {
        let config = |scheduler: &str| {
            let text = CONFIG.replace("name = \"six\"", &format!("name = \"six\"\n{scheduler}"));
            Config::parse("test", &text).unwrap().0
        };
        let text = |scheduler: &str| {
            let (client, vip) =
                ("[2001:db8::7]:1".parse().unwrap(), "[2001:db8::10]:80".parse().unwrap());
            explain(&config(scheduler), Protocol::Tcp, client, vip).unwrap().to_string()
        };
        for (scheduler, why) in [
            ("scheduler = \"wrr\"", "each worker gives its new connections to 2 backends in turn;"),
            (
                "scheduler = \"least-connections\"",
                "each worker gives a new connection to the one of 2 backends with the fewest for its weight;",
            ),
        ] {
            let text = text(scheduler);
            assert!(text.contains("backend  any of 2; six-"), "{text}");
            assert!(text.contains(", weight 1 of 2, if it can't be remembered\n"), "{text}");
            assert!(text.contains(why), "{text}");
        }
        for (scheduler, why) in [
            (
                "scheduler = \"source\"",
                "by the client's address, and for 300 s after a new connection the client keeps it;",
            ),
            (
                "scheduler = \"sh\"\naffinity_timeout_s = 0",
                "Maglev chooses it among 2 backends by the client's address;",
            ),
        ] {
            let text = text(scheduler);
            assert!(text.contains("backend  six-"), "{text}");
            assert!(text.contains(why), "{text}");
        }
    }

    #[test]
    fn a_translated_connection_is_explained_with_its_target_and_whom_it_is_refused_to() {
        const NAT: &str = r#"
            node.interfaces = ["absent0"]
            overlay = [{ vni = 100, addresses = ["10.99.1.250"] }]
            [[service]]
            name = "shop"
            vip = "203.0.113.20"
            ports = ["80:8081/tcp"]
            mode = "nat"
            allow = ["198.51.100.0/24"]
            vni = 100
            backend = [{ name = "shop-1", vtep = "10.0.0.2", address = "10.99.1.2" }]
        "#;
        let config = Config::parse("test", NAT).unwrap().0;
        let text = |client: &str| {
            let (client, vip) = (client.parse().unwrap(), "203.0.113.20:80".parse().unwrap());
            explain(&config, Protocol::Tcp, client, vip).unwrap().to_string()
        };
        let expected =
            "backend  shop-1, weight 1 of 1\nnat      to 10.99.1.2:8081\ntunnel   VNI 100";
        let allowed = text("198.51.100.7:1");
        assert!(allowed.contains(expected), "{allowed}");
        let refused = text("198.51.101.7:1");
        assert!(refused.starts_with("dropped  not_allowed: "), "{refused}");
        assert!(refused.contains("198.51.101.7 is in none of 198.51.100.0/24"), "{refused}");
    }

    #[test]
    fn a_drop_is_explained_by_what_the_configuration_has_instead() {
        for (vip, why) in [
            ("203.0.113.99:80", "203.0.113.99 is no VIP: no service has it"),
            (
                "203.0.113.10:81",
                "203.0.113.10 serves web on 80/tcp 8000-8010/tcp 443/udp, not 81/tcp",
            ),
            (
                "203.0.113.10:443",
                "203.0.113.10 serves web on 80/tcp 8000-8010/tcp 443/udp, not 443/tcp",
            ),
            (
                "203.0.113.11:82",
                "203.0.113.11 serves draining on 80/tcp; empty on 81/tcp, not 82/tcp",
            ),
            ("203.0.113.11:80", "the only backend of draining has weight 0"),
            ("203.0.113.11:81", "the service empty has no backends"),
        ] {
            let text = explained("198.51.100.7:40000", vip);
            assert!(text.starts_with("dropped  no_"), "{text}");
            assert!(text.ends_with(&format!("because  {why}\n")), "{text}");
        }
    }

    #[test]
    fn no_packet_has_two_families() {
        let config = Config::parse("test", CONFIG).unwrap().0;
        let (client, vip) =
            ("198.51.100.7:1".parse().unwrap(), "[2001:db8::10]:80".parse().unwrap());
        let error = explain(&config, Protocol::Tcp, client, vip).unwrap_err();
        assert!(error.to_string().contains("are of different families"), "{error}");
    }
}
