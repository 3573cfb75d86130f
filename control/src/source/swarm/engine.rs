//! What a Docker engine says, as far as we need it: Docker Engine API 1.41 and later. Requests name no
//! version, so that each engine answers in its own; keys we don't know are skipped, and what one engine
//! leaves out another may say as null.

use std::{collections::BTreeMap, time::Duration};

use hyper::{
    Response,
    body::{Bytes, Incoming},
};
use serde::{Deserialize, Deserializer, de::DeserializeOwned};

use super::connection::{AskError, Connection};

/// How long an engine may take to answer. Without a leader a manager takes some seconds to say so.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The changes that a swarm tells. It says nothing of tasks.
const EVENTS: &str =
    "/events?filters=%7B%22type%22%3A%5B%22service%22%2C%22node%22%2C%22network%22%5D%7D";

/// Asks for something.
///
/// # Errors
/// If there is no answer.
pub async fn ask(engine: &mut Connection, path: &str) -> Result<Bytes, AskError> {
    engine.get(path, TIMEOUT).await
}

/// Asks for something and reads it.
///
/// # Errors
/// If there is no answer, or not this.
pub async fn read<T: DeserializeOwned>(engine: &mut Connection, path: &str) -> Result<T, AskError> {
    Ok(serde_json::from_slice(&ask(engine, path).await?)?)
}

/// Opens the stream of events: what it brings means only that something has changed.
///
/// # Errors
/// If it does not open.
pub async fn events(engine: &mut Connection) -> Result<Response<Incoming>, AskError> {
    engine.open(EVENTS).await
}

/// `/info`
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Info {
    #[serde(deserialize_with = "or_default")]
    pub swarm: SwarmInfo,
}

/// This engine's place in a swarm.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct SwarmInfo {
    #[serde(rename = "NodeID")]
    pub node_id: String,
    /// `active` in a swarm; `inactive`, `pending`, `error` or `locked`.
    pub local_node_state: String,
    /// Whether it is a manager.
    pub control_available: bool,
    pub error: String,
    /// Only managers know it.
    #[serde(deserialize_with = "or_default")]
    pub cluster: Cluster,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Cluster {
    #[serde(rename = "ID")]
    pub id: String,
    /// The overlays' UDP port.
    pub data_path_port: u16,
}

/// `/services`
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Service {
    #[serde(rename = "ID")]
    pub id: String,
    pub spec: ServiceSpec,
    #[serde(deserialize_with = "or_default")]
    pub endpoint: Endpoint,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ServiceSpec {
    pub name: String,
    #[serde(deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
}

/// As it is, with the ports that Docker has chosen, and not as it was asked for.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Endpoint {
    #[serde(deserialize_with = "or_default")]
    pub ports: Vec<Port>,
    #[serde(rename = "VirtualIPs", deserialize_with = "or_default")]
    pub virtual_ips: Vec<VirtualIp>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct VirtualIp {
    #[serde(rename = "NetworkID")]
    pub network_id: String,
    /// With its prefix length.
    pub addr: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Port {
    pub protocol: String,
    pub target_port: u16,
    pub published_port: u16,
    /// `ingress` or `host`.
    pub publish_mode: String,
}

/// `/tasks`
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Task {
    #[serde(rename = "ID")]
    pub id: String,
    #[serde(rename = "ServiceID")]
    pub service_id: String,
    #[serde(rename = "NodeID")]
    pub node_id: String,
    /// None if there is one on each node.
    pub slot: Option<u64>,
    pub desired_state: String,
    pub status: TaskStatus,
    #[serde(deserialize_with = "or_default")]
    pub networks_attachments: Vec<Attachment>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TaskStatus {
    pub state: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Attachment {
    pub network: AttachedNetwork,
    /// With their prefix lengths, as in `10.0.0.6/24`.
    #[serde(deserialize_with = "or_default")]
    pub addresses: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct AttachedNetwork {
    #[serde(rename = "ID")]
    pub id: String,
}

/// `/nodes`
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Node {
    #[serde(rename = "ID")]
    pub id: String,
    pub spec: NodeSpec,
    #[serde(deserialize_with = "or_default")]
    pub description: Description,
    #[serde(deserialize_with = "or_default")]
    pub status: NodeStatus,
    #[serde(deserialize_with = "or_default")]
    pub manager_status: ManagerStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NodeSpec {
    #[serde(deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Description {
    pub hostname: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NodeStatus {
    /// `ready`, `down`, `unknown` or `disconnected`.
    pub state: String,
    /// As its manager saw it come: a manager may not see itself.
    pub addr: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ManagerStatus {
    /// With a port.
    pub addr: String,
}

/// `/networks`; and `/networks/NAME`, which has this node's containers too, and if asked with `verbose` what all
/// nodes have there.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Network {
    pub id: String,
    pub name: String,
    pub ingress: bool,
    #[serde(deserialize_with = "or_default")]
    pub options: BTreeMap<String, String>,
    #[serde(deserialize_with = "or_default")]
    pub containers: BTreeMap<String, Container>,
    #[serde(rename = "IPAM", deserialize_with = "or_default")]
    pub ipam: Ipam,
    #[serde(deserialize_with = "or_default")]
    pub services: BTreeMap<String, Gossip>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Ipam {
    #[serde(deserialize_with = "or_default")]
    pub config: Vec<Subnet>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Subnet {
    /// With its prefix length.
    pub subnet: String,
    pub gateway: String,
}

/// What nodes tell each other of a service's tasks, or of themselves: of a service without a name.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Gossip {
    #[serde(deserialize_with = "or_default")]
    pub tasks: Vec<GossipTask>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct GossipTask {
    #[serde(rename = "EndpointIP")]
    pub endpoint_ip: String,
    /// `Host IP` is where its node's tunnels end.
    #[serde(deserialize_with = "or_default")]
    pub info: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Container {
    #[serde(rename = "Name")]
    pub name: String,
    #[serde(rename = "IPv4Address")]
    pub ipv4_address: String,
}

/// Null is nothing.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}
