//! What a running daemon tells about itself: a JSON document, and its rendering for people.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    time::Duration,
};

use anstyle::{AnsiColor, Style};
use dataplane::{
    counters::{Counters, DropReason, Event},
    port::xsk::Statistics,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{health::Report, source::swarm::SwarmStatus};

/// Everything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// The node's name.
    pub node: String,
    /// The program's version.
    pub version: String,
    /// Counts up with every change of what is forwarded.
    pub generation: u64,
    /// Whether packets are being steered to the workers.
    pub ready: bool,
    /// Why the last change of the configuration was refused, if it was.
    pub refused: Option<String>,
    /// Ports published on this node's addresses that clients on the node itself don't reach, as in `80/tcp`,
    /// and why.
    #[serde(default)]
    pub local_refused: BTreeMap<String, String>,
    /// How the Docker Swarm is read, if it is.
    pub swarm: Option<SwarmStatus>,
    /// The workers.
    pub workers: Vec<WorkerStatus>,
    /// Drops of all workers, by reason.
    pub drops: BTreeMap<String, Drops>,
    /// The services.
    pub services: Vec<ServiceStatus>,
}

/// One worker.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WorkerStatus {
    /// Its number.
    pub id: usize,
    /// Where it runs.
    pub core: usize,
    /// Whether it has stopped turning, so that the kernel gets its packets.
    pub hung: bool,
    /// How often it has turned.
    pub turns: u64,
    /// Its queues.
    pub ports: Vec<PortStatus>,
    /// What it counted, drops excepted.
    pub counters: BTreeMap<String, u64>,
    /// Its drops by reason.
    pub drops: BTreeMap<String, u64>,
}

/// One queue of one interface.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PortStatus {
    /// The interface.
    pub interface: String,
    /// The queue.
    pub queue: u32,
    /// `native` or `generic`.
    pub xdp_mode: String,
    /// `zero-copy` or `copy`.
    pub copy_mode: String,
    /// Whether its frames are on huge pages.
    pub huge_pages: bool,
    /// Why it is not better, in sentences; empty if it is the best there is.
    pub why: Vec<String>,
    /// Packets that the kernel lost here, by the kernel's reasons. They never reached the worker and are in
    /// no counter of ours.
    pub lost_in_kernel: BTreeMap<String, u64>,
}

/// Packets dropped for one reason.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Drops {
    /// How many.
    pub count: u64,
    /// What it means.
    pub sentence: String,
}

/// One service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// Who may change it: `file`, `api` or `swarm`.
    pub owner: String,
    /// Its address.
    pub vip: String,
    /// Its ports, as in `80/tcp`.
    pub ports: Vec<String>,
    /// Its backends.
    pub backends: Vec<BackendStatus>,
}

/// One backend.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BackendStatus {
    /// Its name.
    pub name: String,
    /// The node that runs it.
    pub vtep: String,
    /// Its share of new connections.
    pub weight: u16,
    /// How long it keeps its connections, if it was said to drain: a time, RFC 3339, or `forever`.
    pub drain_until: Option<String>,
    /// How much of that is left, in seconds.
    pub drain_left_s: Option<u64>,
    /// `active`, `draining`, `drained`, `down` or `unreachable`.
    pub state: String,
    /// Why it is down or unreachable.
    pub reason: Option<String>,
    /// What its last check found, if it is checked.
    pub health: Option<Report>,
    /// Packets forwarded to it.
    pub packets: u64,
    /// Bytes forwarded to it, outer headers included.
    pub bytes: u64,
    /// Connections remembered.
    pub connections: u64,
}

/// One worker's events by label.
pub fn events(counters: &Counters) -> BTreeMap<String, u64> {
    Event::ALL.iter().map(|event| (event.label().to_owned(), counters.events(*event))).collect()
}

/// One worker's drops by label, all reasons included.
pub fn own_drops(counters: &Counters) -> BTreeMap<String, u64> {
    let count = |reason: &DropReason| (reason.label().to_owned(), counters.drops(*reason));
    DropReason::ALL.iter().map(count).collect()
}

/// What the kernel lost at a port, by label.
pub fn losses(statistics: &Statistics) -> BTreeMap<String, u64> {
    let Statistics { rx_dropped, rx_ring_full, fill_ring_empty, rx_invalid, tx_invalid, .. } =
        *statistics;
    let labelled = [
        ("rx_dropped", rx_dropped),
        ("rx_ring_full", rx_ring_full),
        ("fill_ring_empty", fill_ring_empty),
        ("rx_invalid", rx_invalid),
        ("tx_invalid", tx_invalid),
    ];
    labelled.map(|(label, count)| (label.to_owned(), count)).into()
}

/// The drops of some workers by label, all reasons included.
pub fn drops<'a>(workers: impl Iterator<Item = &'a Counters> + Clone) -> BTreeMap<String, Drops> {
    let sum = |reason: &DropReason| workers.clone().map(|counters| counters.drops(*reason)).sum();
    let entry = |reason: &DropReason| {
        let sentence = reason.sentence().to_owned();
        (reason.label().to_owned(), Drops { count: sum(reason), sentence })
    };
    DropReason::ALL.iter().map(entry).collect()
}

/// The drops that happened, most first.
pub fn write_drops(f: &mut impl fmt::Write, drops: &BTreeMap<String, Drops>) -> fmt::Result {
    let mut rows: Vec<_> =
        drops.iter().map(|(l, d)| (l.as_str(), d.count, d.sentence.as_str())).collect();
    rows.sort_by_key(|(_, count, _)| std::cmp::Reverse(*count));
    write_counts(f, "drops", rows.into_iter())
}

/// What was counted at least once, a line each: label, count and what it means.
pub fn write_counts<'a>(
    f: &mut impl fmt::Write,
    title: &str,
    counts: impl Iterator<Item = (&'a str, u64, &'a str)>,
) -> fmt::Result {
    let rows: Vec<_> = counts
        .filter(|(_, count, _)| *count > 0)
        .map(|(label, count, sentence)| [label.to_owned(), count.to_string(), sentence.to_owned()])
        .collect();
    if rows.is_empty() {
        return writeln!(f, "{title}: none");
    }
    writeln!(f, "{title}:")?;
    write_rows(f, &rows, false)
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ready = if self.ready { "ready" } else { "not ready" };
        let Self { node, version, generation, .. } = self;
        writeln!(f, "{node}: wiremesh {version}, {ready}, generation {generation}")?;
        if let Some(refused) = &self.refused {
            writeln!(f, "the last change was refused: {refused}")?;
        }
        self.local_refused.values().try_for_each(|sentence| writeln!(f, "{sentence}"))?;
        if let Some(swarm) = &self.swarm {
            write!(f, "{swarm}")?;
        }
        for worker in &self.workers {
            write_worker(f, worker)?;
        }
        writeln!(f)?;
        for service in &self.services {
            write_service(f, service)?;
        }
        let counted = Event::ALL.iter().map(|event| {
            let counts =
                self.workers.iter().filter_map(|worker| worker.counters.get(event.label()));
            (event.label(), counts.sum(), event.sentence())
        });
        write_counts(f, "counters", counted)?;
        writeln!(f)?;
        write_drops(f, &self.drops)
    }
}

fn write_worker(f: &mut fmt::Formatter<'_>, worker: &WorkerStatus) -> fmt::Result {
    let count = |event: Event| worker.counters.get(event.label()).copied().unwrap_or_default();
    let hung = if worker.hung { "  HUNG: the kernel gets its packets" } else { "" };
    writeln!(
        f,
        "worker {} on core {}: {} packets in, {} out{hung}",
        worker.id,
        worker.core,
        count(Event::RxPackets),
        count(Event::TxPackets),
    )?;
    for port in &worker.ports {
        let pages = if port.huge_pages { "huge pages" } else { "small pages" };
        writeln!(
            f,
            "  {} queue {}: {} XDP, {}, {pages}",
            port.interface, port.queue, port.xdp_mode, port.copy_mode
        )?;
        for why in &port.why {
            writeln!(f, "    {why}")?;
        }
        let lost = port.lost_in_kernel.iter().filter(|(_, count)| **count > 0);
        let lost: Vec<String> = lost.map(|(label, count)| format!("{label} {count}")).collect();
        if !lost.is_empty() {
            writeln!(f, "    lost in the kernel: {}", lost.join(", "))?;
        }
    }
    Ok(())
}

fn write_service(f: &mut fmt::Formatter<'_>, service: &ServiceStatus) -> fmt::Result {
    writeln!(f, "service {} on {} {}", service.name, service.vip, service.ports.join(" "))?;
    write_backends(f, &service.backends)?;
    writeln!(f)
}

/// Backends with what they were sent, and why some are unreachable.
pub fn write_backends(f: &mut fmt::Formatter<'_>, backends: &[BackendStatus]) -> fmt::Result {
    let row = |b: &BackendStatus| {
        [
            b.name.clone(),
            b.vtep.clone(),
            b.weight.to_string(),
            b.state.clone(),
            b.connections.to_string(),
            b.packets.to_string(),
            b.bytes.to_string(),
        ]
    };
    let rows: Vec<_> = backends.iter().map(row).collect();
    let header = ["BACKEND", "VTEP", "WEIGHT", "STATE", "CONNECTIONS", "PACKETS", "BYTES"];
    write_table(f, &header, &rows)?;
    for BackendStatus { name, state, reason, drain_left_s, drain_until, .. } in backends {
        if let Some(reason) = reason {
            writeln!(f, "  {name} is {state}: {reason}")?;
        }
        if let (Some(left), Some(until)) = (drain_left_s, drain_until) {
            let left = humantime::format_duration(Duration::from_secs(*left));
            writeln!(f, "  {name} keeps its connections for {left}, until {until}")?;
        }
    }
    write_health(f, backends)
}

/// What the last checks found, if there were any.
fn write_health(f: &mut fmt::Formatter<'_>, backends: &[BackendStatus]) -> fmt::Result {
    let row = |backend: &BackendStatus| {
        let health = backend.health.as_ref()?;
        let age = health.age().map(|age| format!("{:.1} s ago", age.as_secs_f64()));
        Some([
            backend.name.clone(),
            health.verdict.clone(),
            age.unwrap_or_else(|| "-".to_owned()),
            health.result.clone().unwrap_or_else(|| "-".to_owned()),
        ])
    };
    let rows: Vec<_> = backends.iter().filter_map(row).collect();
    if rows.is_empty() {
        return Ok(());
    }
    write_table(f, &["BACKEND", "HEALTH", "CHECKED", "RESULT"], &rows)
}

/// A header and columns. The alternate form, `{:#}`, has colours.
pub fn write_table<const N: usize>(
    f: &mut fmt::Formatter<'_>,
    header: &[&str; N],
    rows: &[[String; N]],
) -> fmt::Result {
    let header = header.map(str::to_owned);
    let all: Vec<_> = std::iter::once(&header).chain(rows).cloned().collect();
    let colours = f.alternate();
    write_rows(f, &all, colours)
}

/// How a word stands out.
fn style(cell: &str) -> Style {
    match cell {
        "active" | "ready" | "up" | "alive" => AnsiColor::Green.on_default(),
        "draining" | "drained" => AnsiColor::Yellow.on_default(),
        "unreachable" | "down" | "silent" | "not ready" => AnsiColor::Red.on_default(),
        _ => Style::new(),
    }
}

/// Columns as wide as what is in them; numbers, and what heads them, to the right.
fn write_rows<const N: usize>(
    f: &mut impl fmt::Write,
    rows: &[[String; N]],
    colours: bool,
) -> fmt::Result {
    let is_number = |cell: &String| {
        cell.starts_with(|first: char| first.is_ascii_digit()) && cell.parse::<f64>().is_ok()
    };
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or_default());
    let numeric: [bool; N] =
        std::array::from_fn(|column| rows.last().is_some_and(|row| is_number(&row[column])));
    for row in rows {
        let mut line = String::from(" ");
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            let style = if colours { style(cell) } else { Style::new() };
            if numeric[column] {
                write!(line, " {style}{cell:>width$}{style:#} ")?;
            } else {
                write!(line, " {style}{cell:<width$}{style:#} ")?;
            }
        }
        writeln!(f, "{}", line.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Status {
        let count = |event: Event, count| (event.label().to_owned(), count);
        let port = PortStatus {
            interface: "eth0".to_owned(),
            queue: 0,
            xdp_mode: "native".to_owned(),
            copy_mode: "copy".to_owned(),
            huge_pages: true,
            why: vec!["not zero-copy: the driver cannot".to_owned()],
            lost_in_kernel: losses(&Statistics { rx_ring_full: 7, ..Statistics::default() }),
        };
        let worker = WorkerStatus {
            id: 0,
            core: 2,
            hung: false,
            turns: 9,
            ports: vec![port],
            counters: [count(Event::RxPackets, 1203), count(Event::TxPackets, 1200)].into(),
            drops: [("no_service".to_owned(), 12)].into(),
        };
        let idle = WorkerStatus { id: 1, core: 3, hung: true, ..WorkerStatus::default() };
        let backend = |name: &str, state: &str, weight, packets| BackendStatus {
            name: name.to_owned(),
            vtep: "10.0.0.2".to_owned(),
            state: state.to_owned(),
            weight,
            packets,
            bytes: packets * 100,
            ..BackendStatus::default()
        };
        let lost = BackendStatus {
            reason: Some("10.0.0.9 does not answer ARP on eth0".to_owned()),
            ..backend("web-10", "unreachable", 1, 0)
        };
        let service = ServiceStatus {
            name: "web".to_owned(),
            owner: "file".to_owned(),
            vip: "203.0.113.10".to_owned(),
            ports: vec!["80/tcp".to_owned(), "443/udp".to_owned()],
            backends: vec![backend("web-1", "active", 10, 1200), lost],
        };
        let drops = |count, reason: DropReason| {
            let sentence = reason.sentence().to_owned();
            (reason.label().to_owned(), Drops { count, sentence })
        };
        Status {
            node: "n1".to_owned(),
            version: "0.1.0".to_owned(),
            generation: 4,
            ready: true,
            refused: Some("wiremesh.toml:3:1: unknown key".to_owned()),
            local_refused: [("80/tcp".to_owned(), "80/tcp is taken".to_owned())].into(),
            swarm: Some(SwarmStatus {
                cluster: "6f13ps22m3ch".to_owned(),
                from: "engine".to_owned(),
                fresh: false,
                reason: Some("/var/run/docker.sock does not tell".to_owned()),
                mesh_address: Some([10, 0, 0, 2].into()),
                further_mesh_addresses: vec![[10, 0, 0, 254].into()],
                leaving_mesh_addresses: vec![[10, 0, 0, 253].into()],
                nodes: 3,
                services: 1,
                tasks: 2,
                remarks: vec!["the network `ingress` is encrypted".to_owned()],
            }),
            workers: vec![worker, idle],
            drops: [
                drops(1, DropReason::Fragment),
                drops(0, DropReason::NoBackend),
                drops(12, DropReason::NoService),
            ]
            .into(),
            services: vec![service],
        }
    }

    #[test]
    fn a_status_is_read_at_a_glance() {
        let expected = "\
n1: wiremesh 0.1.0, ready, generation 4
the last change was refused: wiremesh.toml:3:1: unknown key
80/tcp is taken
swarm 6f13ps22m3ch by its engine: 3 nodes, 1 services, 2 tasks, mesh address 10.0.0.2, 10.0.0.254, 10.0.0.253 (leaving)
  as last known: /var/run/docker.sock does not tell
  the network `ingress` is encrypted
worker 0 on core 2: 1203 packets in, 1200 out
  eth0 queue 0: native XDP, copy, huge pages
    not zero-copy: the driver cannot
    lost in the kernel: rx_ring_full 7
worker 1 on core 3: 0 packets in, 0 out  HUNG: the kernel gets its packets

service web on 203.0.113.10 80/tcp 443/udp
  BACKEND  VTEP      WEIGHT  STATE        CONNECTIONS  PACKETS   BYTES
  web-1    10.0.0.2      10  active                 0     1200  120000
  web-10   10.0.0.2       1  unreachable            0        0       0
  web-10 is unreachable: 10.0.0.9 does not answer ARP on eth0

counters:
  rx_packets  1203  Packets received.
  tx_packets  1200  Packets handed to a tx ring.

drops:
  no_service  12  No service is configured for the destination address, protocol and port.
  fragment     1  An IP fragment addressed to a VIP: fragments carry no ports and are not supported.
";
        assert_eq!(example().to_string(), expected);
    }

    #[test]
    fn checked_backends_are_shown_with_their_last_result() {
        let mut status = example();
        let backends = &mut status.services[0].backends;
        let health = |verdict: &str, result: Option<&str>| {
            let (verdict, result) = (verdict.to_owned(), result.map(str::to_owned));
            Some(Report { verdict, result, ..Report::default() })
        };
        backends[0].health = health("up", Some("200 OK"));
        backends[1].health = health("unknown", None);
        let expected = "
  BACKEND  HEALTH   CHECKED  RESULT
  web-1    up       -        200 OK
  web-10   unknown  -        -
";
        let shown = status.to_string();
        assert!(shown.contains(expected), "{shown}");
    }

    #[test]
    fn colours_stand_only_where_they_were_asked_for() {
        assert!(!example().to_string().contains('\x1b'));
        let coloured = format!("{:#}", example());
        assert!(coloured.contains("\x1b[31munreachable\x1b[0m"), "{coloured}");
        assert_eq!(coloured.lines().count(), example().to_string().lines().count());
    }

    #[test]
    fn a_status_survives_the_socket() {
        let json = serde_json::to_string(&example()).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&json).unwrap(), example());
    }

    #[test]
    fn all_reasons_are_told_to_machines_and_those_that_happened_to_people() {
        let counters = Counters::new(0);
        counters.dropped(DropReason::Fragment);
        let drops = drops([&counters, &counters].into_iter());
        assert_eq!(drops.len(), DropReason::ALL.len());
        assert_eq!(drops["fragment"].count, 2);
        assert_eq!(own_drops(&counters)["fragment"], 1);
        let mut text = String::new();
        write_drops(&mut text, &drops).unwrap();
        assert_eq!(text.lines().count(), 2, "{text}");
    }
}
