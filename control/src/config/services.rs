//! Tables to desired state: services with their backends, and next hops; and what may not stand
//! side by side in one file.

use std::{collections::HashMap, net::IpAddr, ops::RangeInclusive, sync::Arc};

use dataplane::{
    connections::Timeouts,
    wire::{ethernet::MacAddr, vxlan},
};
use ipnet::IpNet;
use toml::Spanned;

use super::{
    Limits, Maglev, NextHop,
    file::{self, Key, Scheduler as Written},
    finding::{Report, Span},
    health::{self, CheckKind},
    settings::{self, MAX_TABLE_SIZE, number, prime_from},
};
use crate::desired::{
    Backend, Drain, Family, Mode, OutOfMesh, Overlay, Owner, PortMapping, Protocol, Scheduler,
    Service, ServicePort, Vip, Vni, container_mac, tunnel_port,
};

/// Largest share of new connections that one backend can have.
pub const MAX_WEIGHT: u16 = 1000;
/// What every IPv4 host has to be able to receive, RFC 791 section 3.1.
const MIN_MTU_IPV4: u16 = 576;
/// What every IPv6 link has to carry, RFC 8200 section 5.
const MIN_MTU_IPV6: u16 = 1280;
/// Largest jumbo frame in common use.
const MAX_MTU: u16 = 9216;
/// IPVS's persistence lasts as long by default.
const AFFINITY_TIMEOUT_S: u32 = 300;
/// Places in the Maglev table that each backend needs to get its share to within a percent.
const PLACES_PER_BACKEND: usize = 100;

/// What has been published so far, by all services.
#[derive(Default)]
struct Published {
    names: HashMap<String, Span>,
    owners: Vec<String>,
    /// By whom, as an index into `owners` (names may be wrongly the same), and where.
    ports: HashMap<(Vip, ServicePort), (usize, Span)>,
    /// Of what is not translated.
    vips: HashMap<IpAddr, String>,
    vteps: Vec<(IpAddr, Span)>,
    backends: usize,
}

impl Published {
    /// Backends, and VIPs.
    fn counts(&self) -> [usize; 2] {
        [self.backends, self.ports.len()]
    }
}

pub fn services(
    written: &[Spanned<file::Service>],
    overlays: &[Overlay],
    node_vteps: Vec<(IpAddr, Span)>,
    maglev: &Maglev,
    limits: &Limits,
    report: &mut Report,
) -> Vec<Arc<Service>> {
    let mut published = Published { vteps: node_vteps, ..Published::default() };
    let services = written
        .iter()
        .filter_map(|written| {
            let before = published.counts();
            let service = service(written, &mut published, report);
            within_limits(before, published.counts(), written.span(), limits, report);
            let service = service?;
            in_mesh(&service, written.get_ref(), overlays, report);
            warn(&service, written.span(), maglev, report);
            Some(Arc::new(service))
        })
        .collect();
    no_vtep_is_a_vip(&published, report);
    services
}

/// A service by itself. What it may not share with others is for others to find out.
pub fn one(
    written: &Spanned<file::Service>,
    maglev: &Maglev,
    report: &mut Report,
) -> Option<Service> {
    let mut published = Published::default();
    let service = service(written, &mut published, report);
    no_vtep_is_a_vip(&published, report);
    let service = service?;
    warn(&service, written.span(), maglev, report);
    Some(service)
}

/// `None` if a key is missing or wrong, which has then been reported.
fn service(
    written: &Spanned<file::Service>,
    published: &mut Published,
    report: &mut Report,
) -> Option<Service> {
    let keys = written.get_ref();
    let at = written.span();
    let name = required(&keys.name, "service", "name = \"web\"", &at, report)
        .and_then(|key| Some((settings::name("name", key, report)?, key.span())));
    let vip = required(&keys.vip, "service", "vip = \"192.0.2.10\"", &at, report)
        .and_then(|key| vip(key, report));
    let ports = required(&keys.ports, "service", "ports = [\"80/tcp\"]", &at, report)
        .map(|key| ports(key, report));
    let mode = keys.mode.as_ref().map(|key| *key.get_ref()).unwrap_or_default();
    match mode {
        Mode::Dsr => only_nat_can(keys, vip, ports.as_deref().unwrap_or(&[]), report),
        Mode::Nat => no_nat_can(keys, ports.as_deref().unwrap_or(&[]), report),
    }

    if let Some((name, span)) = &name
        && let Some(first) = published.names.insert(name.clone(), span.clone())
    {
        let message = format!("two services are named `{name}`");
        report.conflict(span.clone(), message, "choose another name", first);
    }
    if let (Some((name, _)), Some(vip), Some(ports)) = (&name, vip, &ports) {
        if let (Mode::Dsr, Some(address)) = (mode, vip.address()) {
            published.vips.entry(address).or_insert_with(|| name.clone());
        }
        claim(name, vip, ports, published, report);
    }
    let ports = ports.map(|ports| ports.into_iter().map(|(port, _)| port).collect::<Vec<_>>());
    let listed = ports.as_deref().unwrap_or(&[]);
    let scheduler = scheduler(keys, listed, report);
    let allow = keys.allow.as_ref().map_or_else(Vec::new, |key| allow(key, report));
    let backends = backends(keys, (mode, vip), listed, published, report);
    let health = keys.health.as_ref().and_then(|key| health::health(key, listed, report));
    Some(Service {
        owner: Owner::File,
        written: None,
        name: name?.0,
        vip: vip?,
        ports: ports?,
        mode,
        allow,
        scheduler,
        // One that is wrong has been reported.
        health,
        backends,
    })
}

/// One of the words `node` and `node6`, or an address.
fn vip(written: &Spanned<String>, report: &mut Report) -> Option<Vip> {
    match written.get_ref().as_str() {
        "node" => Some(Vip::Node(Family::V4)),
        "node6" => Some(Vip::Node(Family::V6)),
        _ => settings::address("vip", written, report).map(Vip::Address),
    }
}

/// In DSR the packet arrives as the client sent it, and the backend answers it by itself.
fn only_nat_can(
    service: &file::Service,
    vip: Option<Vip>,
    ports: &[(PortMapping, Span)],
    report: &mut Report,
) {
    if let (Some(key), Some(vip @ Vip::Node(_))) = (&service.vip, vip) {
        let message = format!("`vip` is `{vip}`, and the mode is `dsr`");
        report.error(key.span(), message, "an address, or `mode = \"nat\"`");
    }
    let translated = |(port, _): &&(PortMapping, Span)| port.target != port.published.port;
    if let Some((port, span)) = ports.iter().find(translated) {
        let (published, target) = (port.published.port, port.target);
        report.error(
            span.clone(),
            format!("{published} is published and {target} its target, and the mode is `dsr`"),
            "the same port, for `dsr` can't translate; or `mode = \"nat\"`",
        );
    }
    if let Some(key) = &service.allow {
        let message = "`allow` is set, and the mode is `dsr`";
        report.error(key.span(), message, "leave it out, or have `mode = \"nat\"`");
    }
}

/// What makes no sense where packets are translated.
fn no_nat_can(service: &file::Service, ports: &[(PortMapping, Span)], report: &mut Report) {
    let is_sctp = |(port, _): &&(PortMapping, Span)| port.published.protocol == Protocol::Sctp;
    if let Some((port, span)) = ports.iter().find(is_sctp) {
        let message = format!("{} is published, and the mode is `nat`", port.published);
        report.error(
            span.clone(),
            message,
            "tcp or udp: SCTP can't be translated, only sent by `dsr`",
        );
    }
    let check = service.health.as_ref().and_then(|key| key.get_ref().check.as_ref());
    if let Some(key) = check.filter(|key| *key.get_ref() == CheckKind::Tunnel) {
        report.error(
            key.span(),
            "`check` is `tunnel`, and the mode is `nat`",
            "tcp, http, https or udp: no backend has the VIP that a check through the tunnel goes to",
        );
    }
}

/// Whether it gets on with the overlays that this node is in, and its backends are in one of them.
fn in_mesh(service: &Service, written: &file::Service, overlays: &[Overlay], report: &mut Report) {
    if let (Some(port), Some(key)) = (tunnel_port(service, overlays), &written.ports) {
        let message = format!("{port}/udp is published, and tunnels of this node end at that port");
        report.error(key.span(), message, "another port");
    }
    for backend in service.backends.iter().filter(|_| service.mode == Mode::Nat) {
        let Err(why) = Overlay::of(backend, overlays) else { continue };
        let is_it = |written: &&Spanned<file::Backend>| {
            written.get_ref().name.as_ref().is_some_and(|name| *name.get_ref() == backend.name)
        };
        let at = written.backend.iter().find(is_it).map(Spanned::span).unwrap_or_default();
        let remedy = match why {
            OutOfMesh::NoOverlay { vni } => {
                format!(
                    "add [[overlay]] with `vni = {vni}` and an address of its own for this node"
                )
            }
            OutOfMesh::OtherPort { .. } => "the same `port` in both".to_owned(),
            OutOfMesh::OtherFamily { family, .. } => {
                format!(
                    "add an {family} address of its own for this node to the overlay's `addresses`"
                )
            }
            OutOfMesh::Ours { .. } => "the server's own address".to_owned(),
        };
        report.error(at, format!("`{}` can't be reached by nat: {why}", backend.name), remedy);
    }
}

/// Whose connections are accepted.
fn allow(written: &Spanned<Vec<Spanned<String>>>, report: &mut Report) -> Vec<IpNet> {
    if written.get_ref().is_empty() {
        let message = "`allow` is empty, so that nobody could connect";
        report.error(written.span(), message, "leave it out to let everybody in");
    }
    written.get_ref().iter().filter_map(|written| network(written, report)).collect()
}

/// `192.0.2.0/24`, or one address.
fn network(written: &Spanned<String>, report: &mut Report) -> Option<IpNet> {
    let text = written.get_ref();
    let one = || text.parse::<IpAddr>().ok().map(IpNet::from);
    let Some(network) = text.parse::<IpNet>().ok().or_else(one) else {
        let message = format!("`{text}` is not a network");
        report.error(written.span(), message, "as in \"192.0.2.0/24\" or \"2001:db8::/32\"");
        return None;
    };
    if network.trunc() != network {
        let message = format!("`{text}` has bits set behind its prefix");
        let (all, host) = (network.trunc(), network.addr());
        report.error(written.span(), message, format!("{all} for all of it, or {host}"));
        return None;
    }
    Some(network)
}

fn scheduler(service: &file::Service, ports: &[PortMapping], report: &mut Report) -> Scheduler {
    let written = service.scheduler.as_ref().map(|key| *key.get_ref()).unwrap_or_default();
    let timeout = (AFFINITY_TIMEOUT_S, 0..=Timeouts::MAX_AFFINITY_S);
    let timeout_s = number("affinity_timeout_s", &service.affinity_timeout_s, timeout, report);
    if let Some(key) = &service.affinity_timeout_s
        && written != Written::Source
    {
        let message = format!("`affinity_timeout_s` is set, but the scheduler is `{written}`");
        report.error(key.span(), message, "leave it out, or have `scheduler = \"source\"`");
    }
    // They place what begins, and SCTP's first packet is not told from its others.
    let mut published = ports.iter().map(|port| port.published);
    let sctp = published.find(|port| port.protocol == Protocol::Sctp);
    if let (Some(key), Some(port)) = (&service.scheduler, sctp)
        && let Written::RoundRobin | Written::LeastConnections = written
    {
        let message = format!("`scheduler` is `{written}`, but {port} is published");
        let remedy = "for SCTP it is `maglev` or `source`; other ports can be another service's";
        report.error(key.span(), message, remedy);
    }
    match written {
        Written::Maglev => Scheduler::Maglev,
        Written::RoundRobin => Scheduler::RoundRobin,
        Written::LeastConnections => Scheduler::LeastConnections,
        Written::Source => Scheduler::Source { timeout_s },
    }
}

/// Nobody else may have published the ports.
fn claim(
    service: &str,
    vip: Vip,
    ports: &[(PortMapping, Span)],
    published: &mut Published,
    report: &mut Report,
) {
    published.owners.push(service.to_owned());
    let this = published.owners.len() - 1;
    let mut reported = None;
    for (PortMapping { published: port, .. }, span) in ports {
        let claim = (this, span.clone());
        let Some((owner, first)) = published.ports.insert((vip, *port), claim) else { continue };
        // Two ranges that overlap are one mistake, not a thousand.
        if reported.replace(span) == Some(span) {
            continue;
        }
        let (message, remedy) = if owner == this {
            (format!("{port} is published twice"), "leave it out here".to_owned())
        } else {
            let message = match vip {
                Vip::Address(vip) => format!("{port} of {vip} is published by two services"),
                Vip::Node(_) => format!("{port} of this node is published by two services"),
            };
            let owner = &published.owners[owner];
            (message, format!("another port or VIP, for `{owner}` has this one"))
        };
        report.conflict(span.clone(), message, remedy, first);
    }
}

fn backends(
    service: &file::Service,
    (mode, vip): (Mode, Option<Vip>),
    ports: &[PortMapping],
    published: &mut Published,
    report: &mut Report,
) -> Vec<Backend> {
    let defaults = Defaults {
        mode,
        vni: service.vni.as_ref().map(|key| vni(key, report)),
        port: port("vxlan_port", &service.vxlan_port, vxlan::PORT, report),
        mtu: mtu(&service.mtu, vip.map_or(Family::V4, Vip::family), report),
        udp_checksum: service.udp_checksum,
        vip,
    };
    let mut names = HashMap::new();
    let mut missing_vni = None;
    let mut backends: Vec<Backend> = Vec::with_capacity(service.backend.len());
    published.backends += service.backend.len();
    for written in &service.backend {
        if written.get_ref().vni.is_none() && defaults.vni.is_none() {
            missing_vni.get_or_insert_with(|| written.span());
        }
        if let Some(key) = &written.get_ref().name
            && let Some(first) = names.insert(key.get_ref(), key.span())
        {
            let message = format!("two backends of the service are named `{}`", key.get_ref());
            report.conflict(key.span(), message, "choose another name", first);
        }
        hits(written.get_ref(), mode, ports, report);
        if let (Mode::Dsr, Some(key)) = (mode, &service.health) {
            health::is_reached(&key.get_ref().check, written, report);
        }
        let backend = backend(written, &defaults, published, report);
        if let (Mode::Nat, Some(first), Some(backend)) = (mode, backends.first(), &backend) {
            one_overlay(first, backend, written.span(), report);
        }
        backends.extend(backend);
    }
    // Once for all of them, as one line heals them all.
    if let Some(span) = missing_vni {
        report.error(span, "the backend has no VNI", "add `vni = 100` to it, or to its service");
    }
    backends
}

/// A connection is given a mesh address before a backend of its own overlay could be preferred.
fn one_overlay(first: &Backend, other: &Backend, at: Span, report: &mut Report) {
    let [ours, theirs] = [other, first].map(|backend| backend.vni.get());
    if ours != theirs {
        let message =
            format!("the backend is in the overlay {ours}, and others of the service in {theirs}");
        report.error(at, message, "one overlay for all of them, or two services");
    }
}

/// What a service says for those of its backends that say nothing. `Some(None)` is a VNI that is
/// wrong.
struct Defaults {
    mode: Mode,
    vni: Option<Option<Vni>>,
    port: u16,
    mtu: Option<u16>,
    udp_checksum: Option<bool>,
    vip: Option<Vip>,
}

fn backend(
    written: &Spanned<file::Backend>,
    defaults: &Defaults,
    published: &mut Published,
    report: &mut Report,
) -> Option<Backend> {
    let keys = written.get_ref();
    let at = written.span();
    let name = required(&keys.name, "backend", "name = \"web-1\"", &at, report)
        .and_then(|key| settings::name("name", key, report));
    let vtep = required(&keys.vtep, "backend", "vtep = \"192.0.2.1\"", &at, report)
        .and_then(|key| Some((settings::address("vtep", key, report)?, key.span())));
    let address = match defaults.mode {
        Mode::Dsr => keys.address.as_ref(),
        Mode::Nat => required(&keys.address, "backend", "address = \"10.1.0.2\"", &at, report),
    };
    let address = address.and_then(|key| address_of_backend(key, defaults, report));
    let mac = match (&keys.mac, address.filter(|_| defaults.mode == Mode::Nat)) {
        (None, Some(IpAddr::V4(address))) => Some(container_mac(address)),
        (key, _) => required(key, "backend", "mac = \"02:42:0a:00:00:02\"", &at, report)
            .and_then(|key| mac(key, report)),
    };
    let drain = keys.drain_until.as_ref().and_then(|key| drain(key, report));
    let weight = number("weight", &keys.weight, (1, 0..=MAX_WEIGHT), report);
    let weight = if drain.is_some() { 0 } else { weight };
    let vni = keys.vni.as_ref().map(|key| vni(key, report)).or(defaults.vni).flatten();
    let port = port("port", &keys.port, defaults.port, report);
    let family = defaults.vip.map_or(Family::V4, Vip::family);
    let mtu = mtu(&keys.mtu, family, report).or(defaults.mtu);
    let udp_checksum = keys.udp_checksum.or(defaults.udp_checksum);
    published.vteps.extend(vtep.clone());
    if defaults.mode == Mode::Nat {
        address?;
    }
    let vtep = vtep?.0;
    Some(Backend {
        name: name?,
        vtep,
        mac: mac?,
        weight,
        drain,
        vni: vni?,
        port,
        mtu,
        udp_checksum,
        address,
    })
}

fn drain(written: &Spanned<String>, report: &mut Report) -> Option<Drain> {
    let text = written.get_ref();
    let drain = text.parse().ok();
    if drain.is_none() {
        let message = format!("`drain_until` is `{text}`, which is not a time in UTC");
        report.error(written.span(), message, "as in \"2026-11-21T15:00:00Z\", or \"forever\"");
    }
    drain
}

/// The address that is checked in any mode, and translated to in `nat`.
fn address_of_backend(
    key: &Spanned<String>,
    defaults: &Defaults,
    report: &mut Report,
) -> Option<IpAddr> {
    let address = settings::address("address", key, report)?;
    if defaults.vip == Some(Vip::Address(address)) {
        let message = format!("`address` is {address}, the VIP");
        report.error(key.span(), message, "the server's own address: the VIP leads to any backend");
    }
    if let (Mode::Nat, Some(vip)) = (defaults.mode, defaults.vip)
        && vip.family() != Family::of(address)
    {
        let (family, theirs) = (vip.family(), Family::of(address));
        let message = format!("`address` is {address}, and clients of `{vip}` speak {family}");
        let remedy = format!(
            "the server's {family} address, or another service for its {theirs} one: `nat` keeps the family"
        );
        report.error(key.span(), message, remedy);
    }
    Some(address)
}

/// `target_port` has to say what the ports say anyway: one number can't stand for several.
fn hits(backend: &file::Backend, mode: Mode, ports: &[PortMapping], report: &mut Report) {
    let Some(key) = &backend.target_port else { return };
    // 0 stands for a number that is out of range, and reported as such.
    let target = number("target_port", &backend.target_port, (0, 1..=u16::MAX), report);
    let Some(other) = ports.iter().find(|port| target != 0 && port.target != target) else {
        return;
    };
    let published = other.published.port;
    let (message, remedy) = match mode {
        Mode::Dsr => (
            format!("`target_port` is {target}, but {published} is published"),
            format!("listen on {published}: mode `dsr` keeps ports, another needs `nat`"),
        ),
        Mode::Nat => (
            format!("`target_port` is {target}, but {published} goes to {}", other.target),
            format!(
                "leave it out, and publish \"{published}:{target}/{}\"",
                other.published.protocol
            ),
        ),
    };
    report.error(key.span(), message, remedy);
}

pub fn next_hops(written: &[Spanned<file::NextHop>], report: &mut Report) -> Vec<NextHop> {
    let mut vteps = HashMap::new();
    written.iter().filter_map(|written| next_hop(written, &mut vteps, report)).collect()
}

fn next_hop(
    written: &Spanned<file::NextHop>,
    vteps: &mut HashMap<IpAddr, Span>,
    report: &mut Report,
) -> Option<NextHop> {
    let keys = written.get_ref();
    let at = written.span();
    let vtep = required(&keys.vtep, "next hop", "vtep = \"192.0.2.1\"", &at, report)
        .and_then(|key| Some((settings::address("vtep", key, report)?, key.span())));
    let mac = required(&keys.mac, "next hop", "mac = \"02:42:0a:00:00:02\"", &at, report)
        .and_then(|key| mac(key, report));
    let interface = keys.interface.as_ref().and_then(|key| settings::interface(key, report));
    let mtu = mtu(&keys.mtu, Family::V4, report);
    let (vtep, span) = vtep?;
    if let Some(first) = vteps.insert(vtep, span.clone()) {
        report.conflict(span, format!("{vtep} has two next hops"), "keep one of them", first);
    }
    Some(NextHop { vtep, mac: mac?, interface, mtu })
}

/// A tunnel to a VIP would end at a balancer, not at a backend.
fn no_vtep_is_a_vip(published: &Published, report: &mut Report) {
    for (vtep, span) in &published.vteps {
        if let Some(service) = published.vips.get(vtep) {
            report.error(
                span.clone(),
                format!("`vtep` is {vtep}, the VIP of `{service}`"),
                "the node's own address, at which its tunnel ends",
            );
        }
    }
}

/// Reported where a limit is passed, and not again: what comes after is as good or bad.
fn within_limits(
    before: [usize; 2],
    after: [usize; 2],
    at: Span,
    limits: &Limits,
    report: &mut Report,
) {
    let limits = [("backends", limits.backends), ("vips", limits.vips)];
    for ((key, limit), (before, after)) in limits.into_iter().zip(before.into_iter().zip(after)) {
        if before <= limit as usize && after > limit as usize {
            report.error(
                at.clone(),
                format!("the limit of {limit} {key} is passed here"),
                format!("raise `{key}` in [limits]; up to here there are {after}"),
            );
        }
    }
}

fn warn(service: &Service, at: Span, maglev: &Maglev, report: &mut Report) {
    let Service { name, backends, .. } = service;
    if backends.is_empty() {
        let message = format!("the service `{name}` has no backends");
        report.warning(at, message, "its packets are dropped; add a backend");
        return;
    }
    if backends.iter().all(|backend| backend.weight == 0) {
        let message = format!("all backends of `{name}` have weight 0");
        report.warning(at.clone(), message, "new connections are dropped; give one a weight");
    }
    let places = PLACES_PER_BACKEND * backends.len();
    if backends.len() > 1 && (maglev.table_size as usize) < places {
        let places = u32::try_from(places).unwrap_or(MAX_TABLE_SIZE);
        let enough = prime_from(places.min(MAX_TABLE_SIZE));
        report.warning(
            at,
            format!("the {} backends of `{name}` will not share evenly", backends.len()),
            format!("set `table_size` in [maglev] to {enough}; it is {}", maglev.table_size),
        );
    }
}

/// The key, or an error that shows how to write it.
pub fn required<'a, T>(
    key: &'a Key<T>,
    table: &str,
    example: &str,
    at: &Span,
    report: &mut Report,
) -> Option<&'a Spanned<T>> {
    if key.is_none() {
        let name = example.split(' ').next().unwrap_or(example);
        let message = format!("the {table} has no `{name}`");
        report.error(at.clone(), message, format!("add one, as in `{example}`"));
    }
    key.as_ref()
}

/// The ports, each with the place of the string that names it.
fn ports(written: &Spanned<Vec<Spanned<String>>>, report: &mut Report) -> Vec<(PortMapping, Span)> {
    if written.get_ref().is_empty() {
        report.error(written.span(), "no port is published", "at least one, as in [\"80/tcp\"]");
    }
    let mut all = Vec::new();
    for written in written.get_ref() {
        let Some((published, targets, protocol)) = port_mapping(written.get_ref()) else {
            report.error(
                written.span(),
                format!("`{}` is not a port", written.get_ref()),
                "1 to 65535 over tcp, udp or sctp, as in \"80/tcp\", \"8000-8010/udp\" or \"80:8080/tcp\"",
            );
            continue;
        };
        if published.len() != targets.len() {
            let message = format!(
                "`{}` publishes {} ports, and has {} targets",
                written.get_ref(),
                published.len(),
                targets.len()
            );
            report.error(written.span(), message, "as many, as in \"8000-8010:9000-9010/tcp\"");
            continue;
        }
        all.extend(published.zip(targets).map(|(port, target)| {
            (PortMapping { published: ServicePort { port, protocol }, target }, written.span())
        }));
    }
    all
}

type Ports = RangeInclusive<u16>;

/// `80/tcp`, `8000-8010/tcp`, `80:8080/tcp` or `8000-8010:9000-9010/tcp`: published, and targets.
fn port_mapping(text: &str) -> Option<(Ports, Ports, Protocol)> {
    let (ports, protocol) = text.split_once('/')?;
    let (published, targets) = ports.split_once(':').unwrap_or((ports, ports));
    Some((port_range(published)?, port_range(targets)?, protocol.parse().ok()?))
}

/// `80` or `8000-8010`.
fn port_range(text: &str) -> Option<Ports> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (0 < first && first <= last).then_some(first..=last)
}

pub fn mac(written: &Spanned<String>, report: &mut Report) -> Option<MacAddr> {
    let text = written.get_ref();
    let Ok(mac) = text.parse::<MacAddr>() else {
        let message = format!("`mac` is `{text}`, which is not a MAC address");
        report.error(written.span(), message, "six pairs of hex digits, as in 02:42:0a:00:00:02");
        return None;
    };
    if !mac.is_unicast() {
        let message = format!("`mac` is {mac}, which no device can have");
        report.error(written.span(), message, "not zero, and its first byte an even number");
        return None;
    }
    Some(mac)
}

pub fn vni(written: &Spanned<i64>, report: &mut Report) -> Option<Vni> {
    let vni = u32::try_from(*written.get_ref()).ok().and_then(Vni::new);
    if vni.is_none() {
        let message = format!("`vni` is {}, which does not fit in 24 bits", written.get_ref());
        report.error(written.span(), message, "0 to 16777215");
    }
    vni
}

pub fn port(key: &str, written: &Key<i64>, default: u16, report: &mut Report) -> u16 {
    number(key, written, (default, 1..=u16::MAX), report)
}

pub fn mtu(written: &Key<i64>, family: Family, report: &mut Report) -> Option<u16> {
    let least = match family {
        Family::V4 => MIN_MTU_IPV4,
        Family::V6 => MIN_MTU_IPV6,
    };
    written.as_ref()?;
    Some(number("mtu", written, (least, least..=MAX_MTU), report))
}
