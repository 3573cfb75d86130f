//! The configuration as it is written: every key optional, with its place in the text. What a value
//! may be is for `settings` and `services` to judge; here are only names and types.

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use toml::Spanned;
use utoipa::ToSchema;

use super::{CheckKind, CopyMode, HugePages, Idle, LocalLink, XdpMode};
use crate::{
    desired::Mode,
    health::{AllDown, OnDown},
};

/// A key that may be there, and where.
pub type Key<T> = Option<Spanned<T>>;

/// All of it.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct File {
    pub node: Node,
    pub api: Api,
    pub dataplane: Dataplane,
    pub connections: Connections,
    pub nat: Nat,
    pub maglev: Maglev,
    pub limits: Limits,
    pub liveness: Liveness,
    pub source: Sources,
    pub next_hop: Vec<Spanned<NextHop>>,
    pub overlay: Vec<Spanned<Overlay>>,
    pub service: Vec<Spanned<Service>>,
}

/// `[node]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [node]")]
pub struct Node {
    pub name: Key<String>,
    pub interfaces: Key<Vec<Spanned<String>>>,
    pub vtep: Key<String>,
    pub vtep6: Key<String>,
    pub workers: Key<AutoOr<i64>>,
    pub cores: Key<AutoOr<Vec<i64>>>,
    pub answer_arp: Option<bool>,
    pub announce_table: Key<i64>,
    pub local_link: Key<LocalLink>,
}

/// `[api]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [api]")]
pub struct Api {
    pub socket: Key<String>,
    pub socket_mode: Key<String>,
    pub listen: Key<Vec<Spanned<String>>>,
    pub certificate: Key<String>,
    pub key: Key<String>,
    pub client_ca: Key<String>,
    pub state_directory: Key<String>,
    pub metrics_limit: Key<i64>,
}

/// `[dataplane]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [dataplane]")]
pub struct Dataplane {
    pub xdp_mode: Option<XdpMode>,
    pub copy_mode: Option<CopyMode>,
    pub idle: Option<Idle>,
    pub idle_spin_us: Key<i64>,
    pub frame_size_bytes: Key<i64>,
    pub frames_per_queue: Key<i64>,
    pub ring_size: Key<i64>,
    pub rx_ring_size: Key<i64>,
    pub tx_ring_size: Key<i64>,
    pub fill_ring_size: Key<i64>,
    pub completion_ring_size: Key<i64>,
    pub fill_batch: Key<i64>,
    pub huge_pages: Option<HugePages>,
    pub need_wakeup: Option<bool>,
    pub tx_budget: Key<i64>,
    pub busy_poll_us: Key<i64>,
    pub busy_poll_budget: Key<i64>,
    pub prefer_busy_poll: Option<bool>,
    pub icmp_errors_per_s: Key<i64>,
    pub hang_timeout_ms: Key<i64>,
}

/// `[connections]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [connections]")]
pub struct Connections {
    pub capacity: Key<i64>,
    pub admissions_per_s: Key<i64>,
    pub unconfirmed_s: Key<i64>,
    pub tcp_idle_s: Key<i64>,
    pub tcp_closing_s: Key<i64>,
    pub udp_idle_s: Key<i64>,
}

/// `[nat]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [nat]")]
pub struct Nat {
    pub addresses: Key<i64>,
    pub first_port: Key<i64>,
    pub last_port: Key<i64>,
    pub opening_s: Key<i64>,
    pub tcp_idle_s: Key<i64>,
    pub half_closed_s: Key<i64>,
    pub time_wait_s: Key<i64>,
    pub udp_idle_s: Key<i64>,
}

/// `[maglev]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [maglev]")]
pub struct Maglev {
    pub table_size: Key<i64>,
    pub seed: Option<String>,
}

/// `[limits]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [limits]")]
pub struct Limits {
    pub backends: Key<i64>,
    pub vips: Key<i64>,
    pub health_checks: Key<i64>,
    pub local_clients: Key<i64>,
}

/// `[liveness]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [liveness]")]
pub struct Liveness {
    pub enabled: Option<bool>,
    pub interval_ms: Key<i64>,
    pub fall: Key<i64>,
}

/// `[source]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [source]")]
pub struct Sources {
    pub swarm: Key<Swarm>,
}

/// `[source.swarm]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [source.swarm]")]
pub struct Swarm {
    pub socket: Key<String>,
    pub cert_path: Key<String>,
    pub managers: Key<Vec<Spanned<String>>>,
    pub poll_ms: Key<i64>,
    pub mesh_addresses: Key<i64>,
}

/// `[[next_hop]]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [[next_hop]]")]
pub struct NextHop {
    pub vtep: Key<String>,
    pub mac: Key<String>,
    pub interface: Key<String>,
    pub mtu: Key<i64>,
}

/// `[[overlay]]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [[overlay]]")]
pub struct Overlay {
    pub vni: Key<i64>,
    pub addresses: Key<Vec<Spanned<String>>>,
    pub mac: Key<String>,
    pub mtu: Key<i64>,
    pub port: Key<i64>,
}

/// `[[service]]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [[service]]")]
pub struct Service {
    pub name: Key<String>,
    pub vip: Key<String>,
    pub ports: Key<Vec<Spanned<String>>>,
    pub mode: Key<Mode>,
    pub allow: Key<Vec<Spanned<String>>>,
    pub vni: Key<i64>,
    pub vxlan_port: Key<i64>,
    pub mtu: Key<i64>,
    pub udp_checksum: Option<bool>,
    pub scheduler: Key<Scheduler>,
    pub affinity_timeout_s: Key<i64>,
    pub health: Key<Health>,
    pub backend: Vec<Spanned<Backend>>,
}

/// `[service.health]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [service.health]")]
pub struct Health {
    pub check: Key<CheckKind>,
    pub port: Key<i64>,
    pub interval_ms: Key<i64>,
    pub timeout_ms: Key<i64>,
    pub rise: Key<i64>,
    pub fall: Key<i64>,
    pub jitter_percent: Key<i64>,
    pub on_down: Option<OnDown>,
    pub all_down: Option<AllDown>,
    pub path: Key<String>,
    pub host: Key<String>,
    pub status: Key<Vec<Spanned<String>>>,
    pub body: Key<String>,
    pub tls_verify: Key<bool>,
    pub send: Key<String>,
    pub expect: Key<String>,
}

/// `[[service.backend]]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, [[service.backend]]")]
pub struct Backend {
    pub name: Key<String>,
    pub vtep: Key<String>,
    pub mac: Key<String>,
    pub weight: Key<i64>,
    pub drain_until: Key<String>,
    pub vni: Key<i64>,
    pub port: Key<i64>,
    pub mtu: Key<i64>,
    pub udp_checksum: Option<bool>,
    pub target_port: Key<i64>,
    pub address: Key<String>,
}

/// How new connections are placed. Each has the names that IPVS has for it, too.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema, ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Scheduler {
    /// By a hash of addresses and ports, alike on all nodes (IPVS: mh).
    #[default]
    #[serde(alias = "mh")]
    #[value(alias = "mh")]
    Maglev,
    /// In turns, by weight (IPVS: rr, wrr).
    #[serde(alias = "rr", alias = "wrr")]
    #[value(aliases = ["rr", "wrr"])]
    RoundRobin,
    /// To the backend with the fewest connections for its weight (IPVS: lc, wlc).
    #[serde(alias = "lc", alias = "wlc")]
    #[value(aliases = ["lc", "wlc"])]
    LeastConnections,
    /// All of a client's connections to one backend (IPVS: sh, with persistence).
    #[serde(alias = "sh")]
    #[value(alias = "sh")]
    Source,
}

impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value().expect("none is hidden");
        f.write_str(value.get_name())
    }
}

/// A value, or the word `auto`.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "wrong type, expected \"auto\", a whole number or a list of them")]
pub enum AutoOr<T> {
    Value(T),
    Word(String),
}
