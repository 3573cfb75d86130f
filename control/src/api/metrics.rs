//! `/metrics`, in Prometheus' text format: what `status` tells, as numbers over time.
//!
//! How many series there are depends on the machine and on the configuration, never on traffic; and
//! beyond a limit, services, backends and nodes have none of their own.

use std::{collections::BTreeMap, net::IpAddr};

use dataplane::counters::{DropReason, Event, TURN_TIMES};
use prometheus::{
    TextEncoder,
    proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType},
};

use crate::{
    liveness::Standing,
    status::{BackendStatus, losses},
    view::{Census, Observed, View},
    workers::Handle,
};

/// The media type.
pub const MEDIA_TYPE: &str = prometheus::TEXT_FORMAT;

/// All of them. At most `limit` services, as many backends and as many nodes have series of their own.
pub fn render(observed: &Observed, view: &View, census: &Census, limit: usize) -> String {
    let mut all = Families(Vec::new());
    node(observed, view, &mut all);
    let left_out = services(observed, view, census, limit, &mut all) + nodes(view, limit, &mut all);
    let help =
        "Services, backends and nodes without series of their own: api.metrics_limit is reached.";
    all.gauge("series_left_out", help, vec![sample(&[], left_out)]);
    mesh(observed, view, &mut all);
    workers(observed, census, &mut all);
    queues(observed, &mut all);
    TextEncoder::new().encode_to_string(&all.0).expect("families are consistent")
}

/// A label's name and value.
type Label<'a> = (&'static str, &'a str);

/// What is counted, or stands at some number now.
#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

struct Families(Vec<MetricFamily>);

impl Families {
    /// Adds a family. One without samples does not exist, in this format.
    fn add(&mut self, (kind, name, help): (Kind, &str, &str), samples: Vec<Metric>) {
        if samples.is_empty() {
            return;
        }
        let mut family = MetricFamily::default();
        family.set_name(format!("wiremesh_{name}"));
        family.set_help(help.to_owned());
        family.set_field_type(match kind {
            Kind::Counter => MetricType::COUNTER,
            Kind::Gauge => MetricType::GAUGE,
            Kind::Histogram => MetricType::HISTOGRAM,
        });
        family.set_metric(samples);
        self.0.push(family);
    }

    fn gauge(&mut self, name: &str, help: &str, samples: Vec<Metric>) {
        self.add((Kind::Gauge, name, help), samples);
    }

    fn counter(&mut self, name: &str, help: &str, samples: Vec<Metric>) {
        self.add((Kind::Counter, name, help), samples);
    }
}

/// What is only known by its labels so far.
fn labelled(labels: &[Label<'_>]) -> Metric {
    let pair = |(name, value): &Label<'_>| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    };
    Metric::from_label(labels.iter().map(pair).collect())
}

/// One number. It is a counter's and a gauge's; the family says which.
fn sample(labels: &[Label<'_>], value: u64) -> Metric {
    let mut metric = labelled(labels);
    let (mut counter, mut gauge) = (Counter::default(), Gauge::default());
    counter.set_value(value as f64);
    gauge.set_value(value as f64);
    metric.set_counter(counter);
    metric.set_gauge(gauge);
    metric
}

fn node(observed: &Observed, view: &View, all: &mut Families) {
    let labels = [("node", &*observed.node), ("version", env!("CARGO_PKG_VERSION"))];
    all.gauge("info", "The node and its program.", vec![sample(&labels, 1)]);
    let ready = u64::from(observed.ready(view));
    all.gauge("ready", "Whether packets are steered to workers.", vec![sample(&[], ready)]);
    let help = "Counts up with every change of what is forwarded.";
    all.gauge("generation", help, vec![sample(&[], view.generation)]);
    let help = "Whether the last change of the configuration file was refused.";
    let refused = u64::from(view.refused.is_some());
    all.gauge("config_refused", help, vec![sample(&[], refused)]);
    if let Some(swarm) = &view.swarm {
        let help = "Whether what is known of the Docker Swarm is what its managers say now.";
        all.gauge("swarm_fresh", help, vec![sample(&[], swarm.status.fresh.into())]);
        let help = "What the Docker Swarm asks for and is not done; `wiremesh status` says why.";
        all.gauge("swarm_remarks", help, vec![sample(&[], swarm.status.remarks.len() as u64)]);
    }
}

/// Returns how many series are left out.
fn services(
    observed: &Observed,
    view: &View,
    census: &Census,
    limit: usize,
    all: &mut Families,
) -> u64 {
    let mut owners: BTreeMap<String, u64> = BTreeMap::new();
    let states = ["active", "draining", "drained", "down", "unreachable"];
    let states = states.map(|state| (state.to_owned(), 0));
    let mut states: BTreeMap<String, u64> = states.into();
    let (mut by_service, mut by_backend) = (PerService::default(), PerBackend::default());
    let mut left_out = 0;
    for (service, placements) in view.services() {
        *owners.entry(service.owner.to_string()).or_default() += 1;
        let backends = observed.backends(service, placements, census);
        for backend in &backends {
            *states.entry(backend.state.clone()).or_default() += 1;
            if by_backend.packets.len() < limit {
                by_backend.add(&service.name, backend);
            } else {
                left_out += 1;
            }
        }
        if by_service.connections.len() < limit {
            by_service.add(&service.name, &backends);
        } else {
            left_out += 1;
        }
    }
    let owners = owners.iter().map(|(owner, count)| sample(&[("owner", owner)], *count));
    all.gauge("services", "Services, by who may change them.", owners.collect());
    let states = states.iter().map(|(state, count)| sample(&[("state", state)], *count));
    all.gauge("backends", "Backends of all services, by state.", states.collect());
    let checks =
        observed.board.counts().map(|(result, count)| sample(&[("result", result)], count));
    let help = "Health checks, by what they found; an impossible one says nothing of the backend.";
    all.counter("health_checks_total", help, checks.into());
    by_service.finish(all);
    by_backend.finish(all);
    left_out
}

/// What pings say of the nodes that tunnels lead to. Returns how many series are left out.
fn nodes(view: &View, limit: usize, all: &mut Families) -> u64 {
    let words = ["alive", "silent", "unknown"];
    let mut counts: BTreeMap<&str, u64> = words.map(|word| (word, 0)).into();
    view.standings.values().for_each(|standing| *counts.entry(standing.word()).or_default() += 1);
    let counts = counts.iter().map(|(word, count)| sample(&[("liveness", word)], *count));
    let help = "Nodes that are pinged, by whether they answer; unknown are those that never have.";
    all.gauge("vteps", help, counts.collect());
    // One that is not judged is neither.
    let judged = view.standings.iter().filter(|(_, standing)| **standing != Standing::Unknown);
    let alive = |(vtep, standing): (&IpAddr, &Standing)| {
        sample(&[("vtep", &vtep.to_string())], u64::from(*standing == Standing::Alive))
    };
    let help = "Whether a node that has answered pings still does.";
    all.gauge("vtep_alive", help, judged.clone().take(limit).map(alive).collect());
    judged.skip(limit).count() as u64
}

/// What connections of mode `nat` are made of.
fn mesh(observed: &Observed, view: &View, all: &mut Families) {
    let Some(nat) = &observed.nat else { return };
    let (mut slots, mut used) = (Vec::new(), Vec::new());
    for overlay in view.forwarding.overlays() {
        for mesh in &overlay.mesh {
            let address = IpAddr::from(mesh.address).to_string();
            let vni = overlay.vni.to_string();
            let labels = [("vni", &*vni), ("address", &*address)];
            slots.push(sample(&labels, nat.capacity() as u64));
            used.push(sample(&labels, nat.used(mesh.bank) as u64));
        }
    }
    let help = "Connections that a mesh address can have at once.";
    all.gauge("nat_slots", help, slots);
    let help = "Connections that a mesh address has, and ports of ended ones that still rest.";
    all.gauge("nat_slots_used", help, used);
}

/// What each service has of its own.
#[derive(Default)]
struct PerService {
    active: Vec<Metric>,
    connections: Vec<Metric>,
}

impl PerService {
    fn add(&mut self, service: &str, backends: &[BackendStatus]) {
        let label = [("service", service)];
        let active = backends.iter().filter(|backend| backend.state == "active").count();
        self.active.push(sample(&label, active as u64));
        let connections = backends.iter().map(|backend| backend.connections).sum();
        self.connections.push(sample(&label, connections));
    }

    fn finish(self, all: &mut Families) {
        let help = "Backends that take new connections.";
        all.gauge("service_active_backends", help, self.active);
        let help = "Connections remembered of a service, unless ended.";
        all.gauge("service_connections", help, self.connections);
    }
}

/// What each backend has of its own.
#[derive(Default)]
struct PerBackend {
    packets: Vec<Metric>,
    bytes: Vec<Metric>,
    connections: Vec<Metric>,
    weight: Vec<Metric>,
    reachable: Vec<Metric>,
    up: Vec<Metric>,
}

impl PerBackend {
    fn add(&mut self, service: &str, backend: &BackendStatus) {
        let label = [("service", service), ("backend", &*backend.name)];
        self.packets.push(sample(&label, backend.packets));
        self.bytes.push(sample(&label, backend.bytes));
        self.connections.push(sample(&label, backend.connections));
        self.weight.push(sample(&label, backend.weight.into()));
        let reachable = backend.state != "unreachable";
        self.reachable.push(sample(&label, reachable.into()));
        if let Some(health) = &backend.health {
            self.up.push(sample(&label, (health.verdict != "down").into()));
        }
    }

    fn finish(self, all: &mut Families) {
        all.counter("backend_packets_total", "Packets forwarded to a backend.", self.packets);
        let help = "Bytes forwarded to a backend, outer headers included.";
        all.counter("backend_bytes_total", help, self.bytes);
        let help = "Connections remembered of a backend, unless ended.";
        all.gauge("backend_connections", help, self.connections);
        let help = "A backend's share of new connections; 0 drains it.";
        all.gauge("backend_weight", help, self.weight);
        let help = "Whether its next hop is known, and its node not silent.";
        all.gauge("backend_reachable", help, self.reachable);
        let help = "Whether a checked backend is up, or has no verdict yet; 0 if it is down.";
        all.gauge("backend_up", help, self.up);
    }
}

fn workers(observed: &Observed, census: &Census, all: &mut Families) {
    let workers = || observed.workers.iter().enumerate().map(|(id, w)| (id.to_string(), w));
    let each = |value: &dyn Fn(&Handle) -> u64| -> Vec<Metric> {
        workers().map(|(id, worker)| sample(&[("worker", &id)], value(worker))).collect()
    };
    for event in Event::ALL {
        let count = each(&|worker| worker.counters.events(*event));
        all.counter(&format!("{}_total", event.label()), event.sentence(), count);
    }
    let drops = workers().flat_map(|(id, worker)| {
        DropReason::ALL.iter().map(move |reason| {
            let labels = [("worker", &*id), ("reason", reason.label())];
            sample(&labels, worker.counters.drops(*reason))
        })
    });
    let help = "Packets dropped, by reason: `wiremesh drops` says what each means.";
    all.counter("dropped_packets_total", help, drops.collect());
    let turns = each(&|worker| worker.counters.turns());
    all.counter("worker_turns_total", "Turns of a worker: bursts, empty ones included.", turns);
    let times = workers().map(|(id, worker)| {
        let mut metric = labelled(&[("worker", &id)]);
        metric.set_histogram(histogram(worker.counters.turn_times()));
        metric
    });
    let help =
        "Time of a worker's turns that had packets: from its look at the rings until all are sent.";
    all.add((Kind::Histogram, "worker_burst_seconds", help), times.collect());
    let hung = each(&|worker| worker.hung().into());
    all.gauge("worker_hung", "Whether a worker hangs: the kernel gets its packets.", hung);
    let counts = workers().zip(&census.by_worker);
    let remembered = counts.map(|((id, _), count)| sample(&[("worker", &id)], *count));
    let help = "Connections in a worker's table, unless ended.";
    all.gauge("connection_table_entries", help, remembered.collect());
    let room = each(&|_| observed.capacity.into());
    all.gauge("connection_table_capacity", "Places in a worker's connection table.", room);
}

/// Of counts by class, and the sum in nanoseconds. The last class has no bound.
fn histogram((classes, ns): ([u64; TURN_TIMES], u64)) -> Histogram {
    let mut histogram = Histogram::default();
    let mut so_far = 0;
    let bounded = classes[..TURN_TIMES - 1].iter().enumerate().map(|(class, count)| {
        so_far += count;
        let mut bucket = Bucket::default();
        bucket.set_upper_bound((1_u64 << class) as f64 / 1e6);
        bucket.set_cumulative_count(so_far);
        bucket
    });
    histogram.set_bucket(bounded.collect());
    histogram.set_sample_count(classes.iter().sum());
    histogram.set_sample_sum(ns as f64 / 1e9);
    histogram
}

fn queues(observed: &Observed, all: &mut Families) {
    let (mut modes, mut lost) = (Vec::new(), Vec::new());
    for (id, (worker, ports)) in observed.workers.iter().zip(&observed.ports).enumerate() {
        let id = id.to_string();
        for (port, statistics) in ports.iter().zip(worker.losses()) {
            let queue = port.queue.to_string();
            let place = [("interface", &*port.interface), ("queue", &*queue), ("worker", &*id)];
            let pages = if port.huge_pages { "huge" } else { "small" };
            let how = [("xdp", &*port.xdp_mode), ("copy", &*port.copy_mode), ("pages", pages)];
            modes.push(sample(&[&place[..], &how].concat(), 1));
            let counted = statistics.as_ref().map(losses).into_iter().flatten();
            lost.extend(counted.map(|(reason, count)| {
                sample(&[&place[..], &[("reason", &*reason)]].concat(), count)
            }));
        }
    }
    all.gauge("queue_info", "How an AF_XDP socket was bound.", modes);
    let help = "Packets that the kernel lost at an AF_XDP socket: no worker saw them.";
    all.counter("queue_lost_packets_total", help, lost);
}
