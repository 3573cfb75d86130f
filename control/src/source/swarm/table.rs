//! From what a manager's engine says to a table of what the swarm publishes: pure. The table is the same on
//! every node, and what the Wiremesh of managers hands to that of workers.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use clap::ValueEnum;
use dataplane::wire::vxlan;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::engine;
use crate::{
    config::{MAX_WEIGHT, Maglev, Scheduler, ServiceSpec},
    desired::Mode,
};

/// What containers are given unless the network says otherwise: 1500 less the tunnel's 50.
const MTU: u16 = 1450;

/// All that a manager's engine says, at about one moment.
#[derive(Debug, Default)]
pub struct Said {
    pub cluster: engine::Cluster,
    pub services: Vec<engine::Service>,
    pub tasks: Vec<engine::Task>,
    pub nodes: Vec<engine::Node>,
    pub networks: Vec<engine::Network>,
}

/// What a swarm publishes, and who serves it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Table {
    /// The swarm's id.
    pub cluster: String,
    /// The network that published ports lead to. None: nothing can be published.
    pub ingress: Option<Ingress>,
    /// All nodes.
    pub nodes: Vec<Node>,
    /// What Docker has given away of the ingress network's addresses. A manager of an older version tells none.
    #[serde(default)]
    pub assigned: Assigned,
    /// What is published, by name.
    pub services: Vec<Published>,
    /// What is not done as asked for, and why.
    pub remarks: Vec<String>,
}

/// The ingress network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ingress {
    /// Its name.
    pub name: String,
    /// Its VXLAN network identifier.
    pub vni: u32,
    /// The UDP port of its tunnels: the swarm's data path port.
    pub port: u16,
    /// Its largest IP packet, in bytes.
    pub mtu: u16,
}

/// Addresses that Docker has given away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Assigned {
    /// To services, and to tasks that don't run yet: nothing answers there.
    #[schema(value_type = Vec<String>)]
    pub given: BTreeSet<Ipv4Addr>,
    /// To tasks that run, or are about to.
    #[schema(value_type = Vec<String>)]
    pub live: BTreeSet<Ipv4Addr>,
}

impl Assigned {
    /// Whether it is given away.
    pub fn has(&self, address: &Ipv4Addr) -> bool {
        self.given.contains(address) || self.live.contains(address)
    }
}

/// A node of the swarm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = SwarmNode)]
pub struct Node {
    /// Its id.
    pub id: String,
    /// Its host name.
    pub name: String,
    /// Where tunnels to it end.
    #[schema(value_type = String)]
    pub address: IpAddr,
    /// Whether its manager hears of it.
    pub ready: bool,
}

/// A service that publishes ports, and its tasks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Published {
    /// What is wanted, without its backends.
    pub spec: ServiceSpec,
    /// Whether a node's own tasks go first.
    pub locality: Locality,
    /// Those that run.
    pub tasks: Vec<Task>,
}

/// Whether a node's own tasks go first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Locality {
    /// All are alike.
    #[default]
    None,
    /// A node's own tasks as long as it has some, else all.
    Prefer,
    /// A node's own tasks only.
    Require,
}

/// A task that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Task {
    /// As its container is called.
    pub name: String,
    /// The id of the node it runs on.
    pub node: String,
    /// Its address in the ingress network.
    #[schema(value_type = String)]
    pub address: Ipv4Addr,
    /// Its share of new connections; 0 if it is about to leave.
    pub weight: u16,
}

/// Makes the table.
pub fn table(said: &Said) -> Table {
    let mut remarks = Vec::new();
    let network = said.networks.iter().find(|network| network.ingress);
    let ingress = network.and_then(|network| ingress(network, &said.cluster, &mut remarks));
    let mut nodes: Vec<Node> = said.nodes.iter().filter_map(node).collect();
    nodes.sort_by(|a, b| a.id.cmp(&b.id));
    let mut services: Vec<Published> = match (network, &ingress) {
        (Some(network), Some(ingress)) => published(said, network, ingress, &nodes, &mut remarks),
        _ => Vec::new(),
    };
    services.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
    remarks.sort();
    let assigned = network.map(|network| assigned(said, network)).unwrap_or_default();
    Table { cluster: said.cluster.id.clone(), ingress, nodes, assigned, services, remarks }
}

/// What is given away in a network.
fn assigned(said: &Said, network: &engine::Network) -> Assigned {
    let mut all = Assigned::default();
    let vips = said.services.iter().flat_map(|service| &service.endpoint.virtual_ips);
    let vips = vips.filter(|vip| vip.network_id == network.id);
    all.given.extend(vips.filter_map(|vip| address(&vip.addr)));
    for task in &said.tasks {
        let addresses = addresses(task, network);
        match &*task.status.state {
            // A container is there from `starting` on, and engines don't say so at once.
            "ready" | "starting" | "running" => all.live.extend(addresses),
            "complete" | "shutdown" | "failed" | "rejected" | "orphaned" => {}
            _ => all.given.extend(addresses),
        }
    }
    all
}

/// A task's addresses in a network.
fn addresses(task: &engine::Task, network: &engine::Network) -> impl Iterator<Item = Ipv4Addr> {
    let its = task.networks_attachments.iter().filter(|a| a.network.id == network.id);
    its.flat_map(|attachment| &attachment.addresses).filter_map(|text| address(text))
}

/// The address of one with a prefix length, as in `10.0.0.6/24`.
pub fn address(text: &str) -> Option<Ipv4Addr> {
    text.split('/').next()?.parse().ok()
}

/// `None` if we can't take part in it, which has then been remarked.
fn ingress(
    network: &engine::Network,
    cluster: &engine::Cluster,
    remarks: &mut Vec<String>,
) -> Option<Ingress> {
    let name = network.name.clone();
    let option = |key: &str| network.options.get(key).map(String::as_str);
    // Docker takes it for encrypted by an empty value, too.
    if option("encrypted").is_some_and(|value| value != "false") {
        remarks.push(format!(
            "the network `{name}` is encrypted, which Wiremesh can't take part in: nothing is \
             published until there is an ingress network without `--opt encrypted`"
        ));
        return None;
    }
    // A network has one for each subnet, and an ingress network one subnet.
    let vni = option("com.docker.network.driver.overlay.vxlanid_list")?.split(',').next()?;
    Some(Ingress {
        name,
        vni: vni.parse().ok()?,
        port: if cluster.data_path_port == 0 { vxlan::PORT } else { cluster.data_path_port },
        mtu: option("com.docker.network.driver.mtu")
            .and_then(|mtu| mtu.parse().ok())
            .unwrap_or(MTU),
    })
}

/// `None` while it has no address yet.
fn node(node: &engine::Node) -> Option<Node> {
    let own = node.status.addr.parse().ok().filter(|address: &IpAddr| !address.is_unspecified());
    let as_manager = || Some(node.manager_status.addr.parse::<SocketAddr>().ok()?.ip());
    Some(Node {
        id: node.id.clone(),
        name: node.description.hostname.clone(),
        address: own.or_else(as_manager)?,
        // A new leader knows of nobody at first, and calls all nodes "unknown" until they report: nothing has
        // happened to them.
        ready: matches!(node.status.state.as_str(), "ready" | "unknown"),
    })
}

fn published(
    said: &Said,
    network: &engine::Network,
    ingress: &Ingress,
    nodes: &[Node],
    remarks: &mut Vec<String>,
) -> Vec<Published> {
    let weights: HashMap<&str, u16> =
        said.nodes.iter().map(|node| (&*node.id, node_weight(node, remarks))).collect();
    let ready: BTreeSet<&str> =
        nodes.iter().filter(|node| node.ready).map(|node| &*node.id).collect();
    let mut tasks: HashMap<&str, Vec<&engine::Task>> = HashMap::new();
    for task in said.tasks.iter().filter(|task| ready.contains(&*task.node_id)) {
        tasks.entry(&task.service_id).or_default().push(task);
    }
    // Docker gives each published port to one service; labels come after all of them.
    let mut taken: BTreeSet<(u16, String)> = said
        .services
        .iter()
        .flat_map(ingress_ports)
        .map(|p| (p.published_port, p.protocol.clone()))
        .collect();
    said.services
        .iter()
        .filter_map(|service| {
            if !is_published(service, remarks) {
                return None;
            }
            let (spec, Extras { locality, weight }) = spec(service, ingress, &mut taken, remarks)?;
            let own = tasks.get(&*service.id).into_iter().flatten();
            let mut tasks: Vec<Task> = own
                .filter_map(|task| {
                    let share = weight.saturating_mul(*weights.get(&*task.node_id)?);
                    running(service, task, network, share.min(MAX_WEIGHT))
                })
                .collect();
            tasks.sort_by(|a, b| a.name.cmp(&b.name));
            Some(Published { spec, locality, tasks })
        })
        .collect()
}

/// What a service publishes by the mesh. SCTP can't be translated.
fn ingress_ports(service: &engine::Service) -> impl Iterator<Item = &engine::Port> {
    all_ingress_ports(service).filter(|port| port.protocol != "sctp")
}

fn all_ingress_ports(service: &engine::Service) -> impl Iterator<Item = &engine::Port> {
    service
        .endpoint
        .ports
        .iter()
        .filter(|port| port.publish_mode == "ingress" && port.published_port != 0)
}

/// Whether there is something to publish. A label can't by itself: only a service with a port in ingress
/// mode has its tasks in the ingress network.
fn is_published(service: &engine::Service, remarks: &mut Vec<String>) -> bool {
    let name = &service.spec.name;
    for port in all_ingress_ports(service).filter(|port| port.protocol == "sctp") {
        let port = port.published_port;
        remarks.push(format!(
            "service `{name}`: {port}/sctp is left out: only TCP and UDP can be translated"
        ));
    }
    let published = ingress_ports(service).next().is_some();
    if !published && service.spec.labels.contains_key(PUBLISH) {
        remarks.push(format!(
            "service `{name}`: label `{PUBLISH}` is ignored: its tasks are not in the ingress network \
             until it publishes a port by `docker service update --publish-add`"
        ));
    }
    published
}

/// What we make of a task; `None` if it does not run, or has no address.
fn running(
    service: &engine::Service,
    task: &engine::Task,
    network: &engine::Network,
    weight: u16,
) -> Option<Task> {
    // Docker has it `starting` for as long as its health check has not succeeded.
    if task.status.state != "running" {
        return None;
    }
    let place = task.slot.map_or_else(|| task.node_id.clone(), |slot| slot.to_string());
    Some(Task {
        name: format!("{}.{place}.{}", service.spec.name, task.id),
        node: task.node_id.clone(),
        address: addresses(task, network).next()?,
        // Seconds before its SIGTERM: the only early sign that a task is to leave.
        weight: if task.desired_state == "running" { weight } else { 0 },
    })
}

const PREFIX: &str = "wiremesh.";
const SCHEDULER: &str = "wiremesh.scheduler";
const AFFINITY: &str = "wiremesh.affinity";
const WEIGHT: &str = "wiremesh.weight";
const LOCALITY: &str = "wiremesh.locality";
const ALLOW: &str = "wiremesh.allow";
const PUBLISH: &str = "wiremesh.publish";
const KNOWN: [&str; 6] = [SCHEDULER, AFFINITY, WEIGHT, LOCALITY, ALLOW, PUBLISH];

/// What labels say that is not of the service's words.
struct Extras {
    locality: Locality,
    weight: u16,
}

/// A service in our words. `None` if not even Docker's part of it is understood, which has then been
/// remarked.
fn spec(
    service: &engine::Service,
    ingress: &Ingress,
    taken: &mut BTreeSet<(u16, String)>,
    remarks: &mut Vec<String>,
) -> Option<(ServiceSpec, Extras)> {
    let name = &service.spec.name;
    let ports = ingress_ports(service)
        .map(|p| format!("{}:{}/{}", p.published_port, p.target_port, p.protocol));
    let mut spec = ServiceSpec {
        name: Some(name.clone()),
        vip: Some("node".to_owned()),
        ports: Some(ports.collect()),
        mode: Some(Mode::Nat),
        vni: Some(ingress.vni.into()),
        vxlan_port: Some(ingress.port.into()),
        mtu: Some(ingress.mtu.into()),
        // As Docker's own mesh places them. That other nodes would place them alike, which Maglev is for, is
        // of no use here: only this one could answer.
        scheduler: Some(Scheduler::RoundRobin),
        ..ServiceSpec::default()
    };
    if let Err(why) = understood(&spec) {
        remarks.push(format!("service `{name}` is left out: {why}"));
        return None;
    }
    let mut extras = Extras { locality: Locality::None, weight: 1 };
    for (label, value) in service.spec.labels.iter().filter(|(l, _)| l.starts_with(PREFIX)) {
        let mut next = spec.clone();
        let wrong = apply(label, value.trim(), service, taken, &mut next, &mut extras)
            .and_then(|()| understood(&next))
            .err();
        match wrong {
            None => spec = next,
            Some(right) => remarks.push(format!(
                "service `{name}`: label `{label}` is `{value}` and is ignored: {right}"
            )),
        }
    }
    Some((spec, extras))
}

/// Judged by the rules of the file and the API.
fn understood(spec: &ServiceSpec) -> Result<(), String> {
    let judged = spec.understand(&Maglev::default());
    judged.map(drop).map_err(|remarks| {
        let each =
            remarks.into_iter().map(|remark| format!("{}: {}", remark.detail, remark.remedy));
        each.collect::<Vec<_>>().join("; ")
    })
}

/// Does as a label says. What else would be right, if it can't be done.
fn apply(
    label: &str,
    value: &str,
    service: &engine::Service,
    taken: &mut BTreeSet<(u16, String)>,
    spec: &mut ServiceSpec,
    extras: &mut Extras,
) -> Result<(), String> {
    match label {
        SCHEDULER => {
            let names = || Scheduler::value_variants().iter().map(ToString::to_string);
            let scheduler = Scheduler::from_str(value, false);
            spec.scheduler = Some(scheduler.map_err(|_| names().collect::<Vec<_>>().join(", "))?);
        }
        AFFINITY => {
            spec.affinity_timeout_s = Some(value.parse().map_err(|_| "seconds, as in 300")?);
            if !service.spec.labels.contains_key(SCHEDULER) {
                spec.scheduler = Some(Scheduler::Source);
            }
        }
        WEIGHT => extras.weight = weight(value)?,
        LOCALITY => {
            extras.locality = match value {
                "prefer" => Locality::Prefer,
                "require" => Locality::Require,
                _ => return Err("prefer or require".to_owned()),
            }
        }
        ALLOW => spec.allow = Some(value.split(',').map(|p| p.trim().to_owned()).collect()),
        PUBLISH => {
            let more = published_by_label(value, service, taken)?;
            spec.ports.get_or_insert_default().extend(more);
        }
        _ => return Err(format!("the labels are {}", KNOWN.join(", "))),
    }
    Ok(())
}

fn weight(value: &str) -> Result<u16, String> {
    let right = || format!("a number from 0 to {MAX_WEIGHT}");
    value.parse().ok().filter(|weight| *weight <= MAX_WEIGHT).ok_or_else(right)
}

/// What a node's tasks count for, beside others.
fn node_weight(node: &engine::Node, remarks: &mut Vec<String>) -> u16 {
    let Some(value) = node.spec.labels.get(WEIGHT) else { return 1 };
    weight(value.trim()).unwrap_or_else(|right| {
        let name = &node.description.hostname;
        remarks
            .push(format!("node `{name}`: label `{WEIGHT}` is `{value}` and is ignored: {right}"));
        1
    })
}

/// Further ports, as in `9090:80/tcp,9091:80/tcp`. Docker drops in a task's own namespace what goes to any
/// other port than those that the service publishes, so only these can be meant.
fn published_by_label(
    value: &str,
    service: &engine::Service,
    taken: &mut BTreeSet<(u16, String)>,
) -> Result<Vec<String>, String> {
    let mut more = BTreeMap::new();
    for written in value.split(',').map(str::trim) {
        let (ports, protocol) = written.split_once('/').unwrap_or((written, "tcp"));
        let number = |text: &str| text.parse::<u16>();
        let numbers = ports.split_once(':').map(|(port, target)| (number(port), number(target)));
        let Some((Ok(port @ 1..), Ok(target))) = numbers else {
            return Err("published:target/protocol, as in 9090:80/tcp".to_owned());
        };
        let mut targets = ingress_ports(service).filter(|p| p.protocol == protocol);
        if !targets.any(|p| p.target_port == target) {
            return Err(format!(
                "a target port that the service publishes already, for Docker closes {target}/{protocol} \
                 of its tasks"
            ));
        }
        if taken.contains(&(port, protocol.to_owned())) || more.contains_key(&(port, protocol)) {
            return Err(format!("another port, for {port}/{protocol} is published already"));
        }
        more.insert((port, protocol), format!("{port}:{target}/{protocol}"));
    }
    taken.extend(more.keys().map(|(port, protocol)| (*port, (*protocol).to_owned())));
    Ok(more.into_values().collect())
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// As a real swarm of three nodes said it (`scripts/lab-swarm`, Docker 20.10): `web` scales from two to
    /// one just then, `dns` is global, `host` publishes in host mode, `sick` has labels, `idle` publishes
    /// nothing.
    pub fn recorded() -> Said {
        let info: engine::Info = serde_json::from_str(include_str!("fixtures/info.json")).unwrap();
        Said {
            cluster: info.swarm.cluster,
            services: serde_json::from_str(include_str!("fixtures/services.json")).unwrap(),
            tasks: serde_json::from_str(include_str!("fixtures/tasks.json")).unwrap(),
            nodes: serde_json::from_str(include_str!("fixtures/nodes.json")).unwrap(),
            networks: serde_json::from_str(include_str!("fixtures/networks.json")).unwrap(),
        }
    }

    fn service<'a>(said: &'a mut Said, name: &str) -> &'a mut engine::Service {
        said.services.iter_mut().find(|service| service.spec.name == name).unwrap()
    }

    fn published<'a>(table: &'a Table, name: &str) -> &'a Published {
        table.services.iter().find(|service| service.spec.name.as_deref() == Some(name)).unwrap()
    }

    fn ports(table: &Table, name: &str) -> Vec<String> {
        published(table, name).spec.ports.clone().unwrap()
    }

    /// The end of each task's address, and its weight.
    fn shares(table: &Table, name: &str) -> Vec<(u8, u16)> {
        let tasks = published(table, name).tasks.iter();
        tasks.map(|task| (task.address.octets()[3], task.weight)).collect()
    }

    /// What is remarked about one label of `web`.
    fn remark(label: &str, value: &str) -> String {
        let mut said = recorded();
        service(&mut said, "web").spec.labels.insert(label.to_owned(), value.to_owned());
        let table = table(&said);
        assert_eq!(table.remarks.len(), 1, "{:?}", table.remarks);
        // The rest of the service goes on.
        assert_eq!(ports(&table, "web"), ["8080:80/tcp"]);
        table.remarks[0].clone()
    }

    #[test]
    fn what_a_real_swarm_publishes_becomes_a_table() {
        let table = table(&recorded());
        let ingress = Ingress { name: "ingress".to_owned(), vni: 4096, port: 4789, mtu: 1450 };
        assert_eq!((&table.ingress, &table.remarks[..]), (&Some(ingress), &[][..]));
        let nodes: Vec<_> =
            table.nodes.iter().map(|n| (&*n.name, n.address.to_string(), n.ready)).collect();
        assert_eq!(
            nodes,
            [
                ("n1", "10.78.0.11".to_owned(), true),
                ("n2", "10.78.0.12".to_owned(), true),
                ("n3", "10.78.0.13".to_owned(), true),
            ]
        );
        let names: Vec<_> =
            table.services.iter().map(|s| s.spec.name.as_deref().unwrap()).collect();
        assert_eq!(names, ["dns", "sick", "web"], "not those of host mode, nor without ports");
        // Several protocols, and a port that Docker has chosen.
        assert_eq!(ports(&table, "dns"), ["5353:5353/udp", "30000:80/tcp"]);
        assert_eq!(shares(&table, "dns"), [(9, 1), (10, 1), (11, 1)], "one on each node");
        // The second is about to leave, but runs yet.
        assert_eq!(shares(&table, "web"), [(6, 1), (7, 0)]);
        let first = &published(&table, "web").tasks[0];
        assert!(first.name.starts_with("web.1.") && first.node == table.nodes[1].id, "{first:?}");
    }

    #[test]
    fn all_that_docker_has_given_away_is_told_and_what_of_that_is_needed_by_now() {
        let set = |all: &[u8]| all.iter().map(|last| [10, 0, 0, *last].into()).collect();
        let all = Assigned { given: set(&[5, 8, 12]), live: set(&[6, 7, 9, 10, 11, 13]) };
        assert_eq!(table(&recorded()).assigned, all, "services, and tasks");
        for (state, given, live) in [
            ("pending", true, false),
            ("preparing", true, false),
            ("ready", false, true),
            ("starting", false, true),
            ("running", false, true),
            ("shutdown", false, false),
            ("failed", false, false),
        ] {
            let mut said = recorded();
            said.tasks.iter_mut().for_each(|task| task.status.state = state.to_owned());
            let (all, sixth) = (table(&said).assigned, Ipv4Addr::from([10, 0, 0, 6]));
            assert_eq!((all.given.contains(&sixth), all.live.contains(&sixth)), (given, live));
            assert_eq!(all.has(&sixth), given || live, "{state}");
        }
    }

    #[test]
    fn labels_say_what_docker_has_no_words_for() {
        let table = table(&recorded());
        let sick = published(&table, "sick");
        assert_eq!(sick.locality, Locality::Prefer);
        let web = &published(&table, "web").spec;
        assert_eq!(web.scheduler, Some(Scheduler::RoundRobin), "as Docker itself");
        assert_eq!(ports(&table, "sick"), ["8081:80/tcp", "9090:80/tcp"]);
        let spec = &sick.spec;
        assert_eq!((spec.scheduler, spec.affinity_timeout_s), (Some(Scheduler::Source), Some(60)));
        let dns = &published(&table, "dns").spec;
        let allow = ["198.51.100.0/24", "10.0.0.0/8"].map(str::to_owned);
        assert_eq!((dns.scheduler, &dns.allow), (Some(Scheduler::Maglev), &Some(allow.into())));
    }

    #[test]
    fn a_wrong_label_is_remarked_with_what_would_be_right_and_the_rest_goes_on() {
        for (label, value, right) in [
            ("wiremesh.scheduler", "fastest", "maglev, round-robin, least-connections, source"),
            ("wiremesh.affinity", "an hour", "seconds, as in 300"),
            ("wiremesh.affinity", "99999", "out of its range: 0 to 14400"),
            ("wiremesh.weight", "-1", "a number from 0 to 1000"),
            ("wiremesh.weight", "1001", "a number from 0 to 1000"),
            ("wiremesh.locality", "local", "prefer or require"),
            ("wiremesh.allow", "10.0.0.0/33", "10.0.0.0/33"),
            ("wiremesh.publish", "9091", "as in 9090:80/tcp"),
            ("wiremesh.publish", "0:80", "as in 9090:80/tcp"),
            ("wiremesh.publish", "9091:81/tcp", "Docker closes 81/tcp"),
            ("wiremesh.publish", "9091:80/udp", "Docker closes 80/udp"),
            ("wiremesh.publish", "8081:80/tcp", "8081/tcp is published already"),
            ("wiremesh.publish", "9091:80,9091:80", "9091/tcp is published already"),
            ("wiremesh.weigth", "2", "the labels are wiremesh.scheduler, "),
        ] {
            let remark = remark(label, value);
            let begin = format!("service `web`: label `{label}` is `{value}` and is ignored: ");
            assert!(remark.starts_with(&begin) && remark.contains(right), "{remark}");
        }
    }

    #[test]
    fn a_label_publishes_nothing_of_a_service_that_is_not_in_the_ingress_network() {
        let mut said = recorded();
        let labels = &mut service(&mut said, "idle").spec.labels;
        labels.insert(PUBLISH.to_owned(), "9091:80/tcp".to_owned());
        let table = table(&said);
        assert!(table.remarks[0].contains("--publish-add"), "{:?}", table.remarks);
        assert_eq!(table.services.len(), 3);
    }

    #[test]
    fn sctp_is_left_out_and_the_other_ports_stay() {
        let mut said = recorded();
        service(&mut said, "dns").endpoint.ports[0].protocol = "sctp".to_owned();
        let table = table(&said);
        assert_eq!(ports(&table, "dns"), ["30000:80/tcp"]);
        assert!(table.remarks[0].contains("5353/sctp is left out"), "{:?}", table.remarks);
    }

    #[test]
    fn a_weight_is_that_of_the_service_times_that_of_the_node() {
        let mut said = recorded();
        let label = |weight: &str| (WEIGHT.to_owned(), weight.to_owned());
        service(&mut said, "dns").spec.labels.extend([label("3")]);
        said.nodes[0].spec.labels.extend([label("500")]);
        said.nodes[1].spec.labels.extend([label("0")]);
        said.nodes[2].spec.labels.extend([label("much")]);
        let table = table(&said);
        assert_eq!(shares(&table, "dns"), [(9, 1000), (10, 0), (11, 3)]);
        assert!(table.remarks[0].starts_with("node `n3`: label"), "{:?}", table.remarks);
    }

    #[test]
    fn what_runs_serves_on_while_a_new_leader_has_not_heard_of_its_node() {
        let mut said = recorded();
        let before = shares(&table(&said), "dns");
        assert!(!before.is_empty());
        said.nodes.iter_mut().for_each(|node| node.status.state = "unknown".to_owned());
        assert_eq!(shares(&table(&said), "dns"), before);
    }

    #[test]
    fn only_what_runs_on_a_node_that_is_heard_of_serves() {
        let states = ["new", "pending", "assigned", "accepted", "preparing", "ready", "starting"];
        for state in
            [&states[..], &["complete", "shutdown", "failed", "rejected", "orphaned"]].concat()
        {
            let mut said = recorded();
            said.tasks.iter_mut().for_each(|task| task.status.state = state.to_owned());
            assert_eq!(shares(&table(&said), "dns"), [], "{state}");
        }
        let mut said = recorded();
        said.nodes[0].status.state = "down".to_owned();
        assert_eq!(shares(&table(&said), "dns"), [(10, 1), (11, 1)]);
    }

    #[test]
    fn a_manager_that_does_not_know_its_own_address_has_another() {
        let mut said = recorded();
        said.nodes[0].status.addr = "0.0.0.0".to_owned();
        assert_eq!(table(&said), table(&recorded()));
    }

    #[test]
    fn a_custom_ingress_network_has_its_own_number_and_mtu() {
        let mut said = recorded();
        said.cluster.data_path_port = 7789;
        let network = said.networks.iter_mut().find(|network| network.ingress).unwrap();
        network.name = "mine".to_owned();
        let option =
            |key: &str, value: &str| (format!("com.docker.network.driver.{key}"), value.to_owned());
        network.options.extend([option("mtu", "1400"), option("overlay.vxlanid_list", "4100")]);
        let ingress = Ingress { name: "mine".to_owned(), vni: 4100, port: 7789, mtu: 1400 };
        assert_eq!(table(&said).ingress, Some(ingress));
    }

    #[test]
    fn an_encrypted_network_is_refused_with_a_sentence() {
        let mut said = recorded();
        let network = said.networks.iter_mut().find(|network| network.ingress).unwrap();
        network.options.insert("encrypted".to_owned(), String::new());
        let table = table(&said);
        assert!(table.ingress.is_none() && table.services.is_empty());
        assert!(table.remarks[0].contains("`ingress` is encrypted"), "{:?}", table.remarks);
    }

    #[test]
    fn nothing_that_an_engine_leaves_out_or_says_as_null_is_an_error() {
        let service = r#"[{"ID":"s","Spec":{"Name":"a","Labels":null},"Endpoint":{"Ports":null}},
            {"ID":"t","Spec":{"Name":"b"},"Endpoint":null}]"#;
        let task = r#"[{"ID":"t","Status":{},"NetworksAttachments":null}]"#;
        let node = r#"[{"ID":"n","Spec":{"Labels":null},"Status":null,"ManagerStatus":null}]"#;
        let network = r#"[{"Name":"x","Id":"i","Options":null,"Containers":null}]"#;
        let said = Said {
            cluster: Default::default(),
            services: serde_json::from_str(service).unwrap(),
            tasks: serde_json::from_str(task).unwrap(),
            nodes: serde_json::from_str(node).unwrap(),
            networks: serde_json::from_str(network).unwrap(),
        };
        assert_eq!(table(&said), Table::default());
    }

    #[test]
    fn a_table_survives_the_way_to_a_worker() {
        let table = table(&recorded());
        let json = serde_json::to_string(&table).unwrap();
        assert_eq!(serde_json::from_str::<Table>(&json).unwrap(), table);
    }
}
