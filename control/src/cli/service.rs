//! `wiremesh service`: what is typed becomes a [`ServiceSpec`], and what the API answers becomes tables.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use clap::{Args, Subcommand};
use hyper::{Method, StatusCode};
use miette::{Report, miette};
use serde::Serialize;

use super::{
    Complaint, Daemon, complain,
    health::Health,
    print, say,
    show::{Listed, Processes},
};
use crate::{
    api::{
        client::{ClientError, segment},
        resource::{Changed, Service},
    },
    config::{BackendSpec, Remark, Scheduler, ServiceSpec},
    desired::{Drain, Mode},
};

/// How often a change is tried again when another writer was faster.
const TRIES: u32 = 5;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a service
    ///
    /// Example: wiremesh service create --name web --vip 203.0.113.10 --publish published=80,target=80
    /// --vni 100 --backend vtep=10.0.0.2,mac=02:42:0a:00:00:02
    Create(Box<Create>),
    /// List all services
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        daemon: Daemon,
    },
    /// Show a service as it would stand in the configuration file
    Inspect {
        /// The service
        name: String,
        #[command(flatten)]
        daemon: Daemon,
    },
    /// Show a service's backends, and what they were sent
    Ps {
        /// The service
        name: String,
        #[command(flatten)]
        daemon: Daemon,
    },
    /// Change a service
    ///
    /// Only what is said changes. If somebody else changes the service at the same time, what was said is
    /// done to what they made of it; with --if-version it is refused instead (exit code 4).
    ///
    /// Example, to drain a backend: wiremesh service update web --backend-drain web-2 --deadline 10m
    Update(Box<Update>),
    /// Remove services
    ///
    /// Their connections are dropped. To let them end, drain the backends first. If one can't be removed, the
    /// others are all the same; the exit code tells why the last one could not be.
    #[command(visible_alias = "remove")]
    Rm {
        /// The services
        #[arg(required = true)]
        names: Vec<String>,
        #[command(flatten)]
        daemon: Daemon,
    },
}

#[derive(Debug, Args)]
pub struct Create {
    /// Its name: letters, digits, dashes, underscores and dots
    #[arg(long)]
    name: String,
    /// Its address, IPv4 or IPv6; or, in mode nat, `node` for every IPv4 address of the node, and `node6` for
    /// every IPv6 one
    #[arg(long)]
    vip: String,
    /// A port to publish: published=80,target=8080,protocol=tcp, or 80:8080/tcp, or 8000-8010/udp
    ///
    /// Without a protocol it is tcp. In mode dsr packets arrive as the client sent them, so target, if
    /// given, has to be the same as published.
    #[arg(long, required = true, value_name = "PORT")]
    publish: Vec<Publish>,
    /// How packets get to the backends
    #[arg(long, value_enum, default_value_t)]
    mode: Mode,
    /// In mode nat, whose new connections are accepted: a network or an address. If not given, everybody's
    #[arg(long, value_name = "CIDR")]
    allow: Vec<String>,
    /// The VXLAN network identifier, of the backends that name none
    #[arg(long)]
    vni: Option<i64>,
    /// The UDP port of the backends' tunnels, if not 4789
    #[arg(long, value_name = "PORT")]
    vxlan_port: Option<i64>,
    /// The largest IP packet that the tunnels carry, in bytes
    #[arg(long, value_name = "BYTES")]
    mtu: Option<i64>,
    /// Whether the outer UDP checksum is computed
    #[arg(long, value_name = "BOOL")]
    udp_checksum: Option<bool>,
    /// How new connections are placed; IPVS's names mh, rr, wrr, lc, wlc and sh will do as well
    #[arg(long, value_enum, default_value_t, hide_default_value = true)]
    scheduler: Scheduler,
    /// Of the scheduler source: how long after its latest new connection a client keeps its backend while
    /// others come and go, in seconds, if not 300
    #[arg(long, value_name = "SECONDS")]
    affinity_timeout: Option<i64>,
    /// A backend: vtep=10.0.0.2,mac=02:42:0a:00:00:02 and, if wanted, name= weight= drain_until= vni= port=
    /// mtu= udp_checksum= address=
    ///
    /// Without a name it is called after the service: web-1, web-2 and so on.
    #[arg(long, value_name = "BACKEND")]
    backend: Vec<Backend>,
    #[command(flatten)]
    health: Health,
    #[command(flatten)]
    daemon: Daemon,
}

#[derive(Debug, Args)]
pub struct Update {
    /// The service
    name: String,
    /// Another address
    #[arg(long)]
    vip: Option<String>,
    /// Publish another port; see create
    #[arg(long, value_name = "PORT")]
    publish_add: Vec<Publish>,
    /// Publish a port no longer
    #[arg(long, value_name = "PORT")]
    publish_rm: Vec<Publish>,
    /// Accept new connections from here too: if it is the first, from nowhere else any more
    #[arg(long, value_name = "CIDR")]
    allow_add: Vec<String>,
    /// Accept new connections from here no longer: if it was the last, from everywhere
    #[arg(long, value_name = "CIDR")]
    allow_rm: Vec<String>,
    /// Add a backend; see create
    #[arg(long, value_name = "BACKEND")]
    backend_add: Vec<Backend>,
    /// Remove a backend. Its connections go elsewhere at once
    #[arg(long, value_name = "NAME")]
    backend_rm: Vec<String>,
    /// Drain a backend: it takes no new connections, and keeps those it has
    #[arg(long, value_name = "NAME")]
    backend_drain: Vec<String>,
    /// How long the backends named by --backend-drain keep their connections, as in 90s, 10m or 1h 30m
    ///
    /// What is left then goes to others. Without it they keep them as long as they live.
    #[arg(long, value_name = "DURATION", requires = "backend_drain", value_parser = humantime::parse_duration)]
    deadline: Option<Duration>,
    /// Let a backend that drains, or has, take new connections again, by its weight
    #[arg(long, value_name = "NAME")]
    backend_undrain: Vec<String>,
    /// Change a backend's share of new connections; 0 drains it
    #[arg(long, value_name = "NAME=WEIGHT")]
    weight: Vec<Weight>,
    /// Place new connections in another way; open ones stay
    #[arg(long, value_enum)]
    scheduler: Option<Scheduler>,
    /// Another timeout of the scheduler source, in seconds; see create
    #[arg(long, value_name = "SECONDS")]
    affinity_timeout: Option<i64>,
    /// Change where a backend is checked
    #[arg(long, value_name = "NAME=ADDRESS")]
    address: Vec<Address>,
    /// Check the backends no more
    #[arg(long, conflicts_with = "health_check")]
    no_healthcheck: bool,
    #[command(flatten)]
    health: Health,
    /// Only if the service is still of this version, as `inspect` shows it
    #[arg(long, value_parser = version)]
    if_version: Option<String>,
    #[command(flatten)]
    daemon: Daemon,
}

fn version(text: &str) -> Result<String, String> {
    let is_one = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_one
        .then(|| text.to_owned())
        .ok_or_else(|| "hexadecimal digits, as `inspect` shows".to_owned())
}

/// A published port, as the file writes it: `80/tcp`.
#[derive(Clone, Debug)]
struct Publish(String);

impl FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if !text.contains('=') {
            let protocol = if text.contains('/') { "" } else { "/tcp" };
            return Ok(Self(format!("{text}{protocol}")));
        }
        let (mut published, mut target, mut protocol) = (None, None, "tcp");
        for (key, value) in pairs(text)? {
            match key {
                "published" => published = Some(value),
                "target" => target = Some(value),
                "protocol" => protocol = value,
                _ => {
                    return Err(format!(
                        "unknown key `{key}`: it is published, target or protocol"
                    ));
                }
            }
        }
        let published = published.ok_or("there is no `published`, as in published=80,target=80")?;
        match target.filter(|target| *target != published) {
            Some(target) => Ok(Self(format!("{published}:{target}/{protocol}"))),
            None => Ok(Self(format!("{published}/{protocol}"))),
        }
    }
}

impl Publish {
    /// Whether these are the ports that are published there, wherever they go.
    fn is(&self, published: &str) -> bool {
        let clients = |port: &str| {
            let (ports, protocol) = port.split_once('/')?;
            Some((ports.split(':').next()?.to_owned(), protocol.to_owned()))
        };
        clients(&self.0) == clients(published)
    }
}

/// A backend, as far as it was typed.
#[derive(Clone, Debug)]
struct Backend(BackendSpec);

impl FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut backend = BackendSpec::default();
        for (key, value) in pairs(text)? {
            let number = || {
                value.parse().map(Some).map_err(|_| format!("`{key}` is a number, not `{value}`"))
            };
            match key {
                "name" => backend.name = Some(value.to_owned()),
                "vtep" => backend.vtep = Some(value.to_owned()),
                "mac" => backend.mac = Some(value.to_owned()),
                "weight" => backend.weight = number()?,
                "drain_until" => backend.drain_until = Some(value.to_owned()),
                "vni" => backend.vni = number()?,
                "port" => backend.port = number()?,
                "mtu" => backend.mtu = number()?,
                "target" | "target_port" => backend.target_port = number()?,
                "address" => backend.address = Some(value.to_owned()),
                "udp_checksum" => {
                    let truth = value.parse().map_err(|_| format!("`{key}` is true or false"))?;
                    backend.udp_checksum = Some(truth);
                }
                _ => {
                    return Err(format!(
                        "unknown key `{key}`: it is vtep, mac, name, weight, drain_until, vni, port, \
                         mtu, target_port, udp_checksum or address"
                    ));
                }
            }
        }
        Ok(Self(backend))
    }
}

/// Where a backend is checked from now on.
#[derive(Clone, Debug)]
struct Address(String, String);

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, address) = text.rsplit_once('=').ok_or("as in web-2=10.1.0.2")?;
        Ok(Self(name.to_owned(), address.to_owned()))
    }
}

/// A backend's new weight.
#[derive(Clone, Debug)]
struct Weight(String, i64);

impl FromStr for Weight {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, weight) = text.rsplit_once('=').ok_or("as in web-2=0")?;
        let weight =
            weight.parse().map_err(|_| format!("`{weight}` is no number, as in web-2=0"))?;
        Ok(Self(name.to_owned(), weight))
    }
}

/// `key=value,key=value`.
fn pairs(text: &str) -> Result<Vec<(&str, &str)>, String> {
    let pair = |part| str::split_once(part, '=').ok_or_else(|| format!("`{part}` is no key=value"));
    text.split(',').map(pair).collect()
}

pub fn execute(command: Command) -> Result<(), Report> {
    match command {
        Command::Create(create) => {
            let (spec, daemon) = create.spec();
            let changed: Changed =
                daemon.client()?.change(Method::POST, "/v1/services", Some(&spec), None)?;
            done(&daemon, "created", &changed)
        }
        Command::Ls { daemon } => {
            let services: Vec<Service> = daemon.client()?.get("/v1/services")?;
            print(daemon.json, &Listed(services))
        }
        Command::Inspect { name, daemon } => {
            let service: Service = daemon.client()?.get(&path(&name))?;
            print(daemon.json, &Inspected(service))
        }
        Command::Ps { name, daemon } => {
            let backends = daemon.client()?.get(&format!("{}/backends", path(&name)))?;
            print(daemon.json, &Processes(backends))
        }
        Command::Update(update) => {
            let changed = update.run()?;
            done(&update.daemon, "updated", &changed)
        }
        Command::Rm { names, daemon } => {
            let client = daemon.client()?;
            let mut refused: Option<Report> = None;
            for name in names {
                match client.change::<()>(Method::DELETE, &path(&name), None::<&()>, Some("*")) {
                    Ok(()) if daemon.json => {}
                    Ok(()) => say(format_args!("{name} removed"))?,
                    Err(error) => {
                        let is_its_own = matches!(error, ClientError::Refused(_));
                        if let Some(earlier) = refused.replace(error.into()) {
                            complain(format_args!("{}", Complaint(&earlier)));
                        }
                        if !is_its_own {
                            break;
                        }
                    }
                }
            }
            refused.map_or(Ok(()), Err)
        }
    }
}

fn path(name: &str) -> String {
    format!("/v1/services/{}", segment(name))
}

/// What was done, and what may not have been meant.
fn done(daemon: &Daemon, what: &str, changed: &Changed) -> Result<(), Report> {
    for Remark { detail, remedy, .. } in &changed.warnings {
        complain(format_args!("warning: {detail}: {remedy}\n"));
    }
    if daemon.json {
        return super::print_json(changed);
    }
    let Service { name, version, .. } = &changed.service;
    say(format_args!("{name} {what}, version {version}"))
}

impl Create {
    fn spec(self) -> (ServiceSpec, Daemon) {
        let mut spec = ServiceSpec {
            name: Some(self.name),
            vip: Some(self.vip),
            ports: Some(self.publish.into_iter().map(|publish| publish.0).collect()),
            mode: (self.mode != Mode::default()).then_some(self.mode),
            allow: Some(self.allow).filter(|allow| !allow.is_empty()),
            vni: self.vni,
            vxlan_port: self.vxlan_port,
            mtu: self.mtu,
            udp_checksum: self.udp_checksum,
            scheduler: (self.scheduler != Scheduler::default()).then_some(self.scheduler),
            affinity_timeout_s: self.affinity_timeout,
            health: None,
            backends: Vec::new(),
        };
        self.health.apply(&mut spec.health);
        add(&mut spec, self.backend);
        (spec, self.daemon)
    }
}

/// Adds backends. Those without a name get the first number that is free.
fn add(spec: &mut ServiceSpec, backends: Vec<Backend>) {
    for Backend(mut backend) in backends {
        if backend.name.is_none() {
            let taken = |name: &String| spec.backends.iter().any(|b| b.name.as_ref() == Some(name));
            let service = spec.name.as_deref().unwrap_or_default();
            let mut names = (1..).map(|number: u32| format!("{service}-{number}"));
            backend.name = names.find(|name| !taken(name));
        }
        spec.backends.push(backend);
    }
}

impl Update {
    fn run(&self) -> Result<Changed, Report> {
        let client = self.daemon.client()?;
        let path = path(&self.name);
        let mut tries = 1..=TRIES;
        loop {
            tries.next();
            let service: Service = client.get(&path)?;
            let mut spec = service.spec;
            self.apply(&mut spec)?;
            let version = self.if_version.as_ref().unwrap_or(&service.version);
            let outcome = client.change(Method::PUT, &path, Some(&spec), Some(version));
            match outcome {
                Err(ClientError::Refused(problem))
                    if problem.status == StatusCode::PRECONDITION_FAILED.as_u16()
                        && self.if_version.is_none()
                        && !tries.is_empty() => {}
                outcome => return Ok(outcome?),
            }
        }
    }

    fn apply(&self, spec: &mut ServiceSpec) -> Result<(), Report> {
        let name = &self.name;
        if let Some(vip) = &self.vip {
            spec.vip = Some(vip.clone());
        }
        if let Some(scheduler) = self.scheduler {
            spec.scheduler = Some(scheduler);
            // It was the former scheduler's.
            if scheduler != Scheduler::Source {
                spec.affinity_timeout_s = None;
            }
        }
        if self.affinity_timeout.is_some() {
            spec.affinity_timeout_s = self.affinity_timeout;
        }
        let ports = spec.ports.get_or_insert_default();
        for gone in &self.publish_rm {
            let at = ports.iter().position(|published| gone.is(published)).ok_or_else(|| {
                let published = ports.join(", ");
                miette!(
                    help = format!("it publishes {published}"),
                    "{name} does not publish {}",
                    gone.0
                )
            })?;
            ports.remove(at);
        }
        ports.extend(self.publish_add.iter().map(|publish| publish.0.clone()));
        let mut allow = spec.allow.take().unwrap_or_default();
        for gone in &self.allow_rm {
            let at = allow.iter().position(|network| network == gone).ok_or_else(|| {
                let help = match &allow[..] {
                    [] => "everybody may connect".to_owned(),
                    some => format!("it allows {}", some.join(", ")),
                };
                miette!(help = help, "{name} does not allow {gone}")
            })?;
            allow.remove(at);
        }
        allow.extend(self.allow_add.iter().cloned());
        spec.allow = Some(allow).filter(|allow| !allow.is_empty());
        for gone in &self.backend_rm {
            let at = position(spec, gone)?;
            spec.backends.remove(at);
        }
        for Weight(backend, weight) in &self.weight {
            let at = position(spec, backend)?;
            spec.backends[at].weight = Some(*weight);
        }
        let drain = match self.deadline {
            None => Drain::Forever,
            Some(deadline) => {
                let until = SystemTime::now().checked_add(deadline).filter(writable);
                Drain::Until(until.ok_or_else(|| miette!("the deadline is too far away"))?)
            }
        };
        for backend in &self.backend_drain {
            let at = position(spec, backend)?;
            spec.backends[at].drain_until = Some(drain.to_string());
        }
        for backend in &self.backend_undrain {
            let at = position(spec, backend)?;
            spec.backends[at].drain_until = None;
        }
        for Address(backend, address) in &self.address {
            let at = position(spec, backend)?;
            spec.backends[at].address = Some(address.clone());
        }
        add(spec, self.backend_add.clone());
        if self.no_healthcheck {
            spec.health = None;
        }
        self.health.apply(&mut spec.health);
        Ok(())
    }
}

/// Whether RFC 3339 has room for the year.
fn writable(time: &SystemTime) -> bool {
    let year_10000 = SystemTime::UNIX_EPOCH + Duration::from_secs(253_402_300_800);
    *time < year_10000
}

/// Where a backend stands in its service.
fn position(spec: &ServiceSpec, backend: &str) -> Result<usize, Report> {
    let names = || spec.backends.iter().map(|backend| backend.name.as_deref().unwrap_or_default());
    names().position(|name| name == backend).ok_or_else(|| {
        let has = names().collect::<Vec<_>>().join(", ");
        let service = spec.name.as_deref().unwrap_or_default();
        miette!(help = format!("it has {has}"), "{service} has no backend `{backend}`")
    })
}

/// A service, in the file's words for people.
#[derive(Serialize)]
#[serde(transparent)]
struct Inspected(Service);

impl fmt::Display for Inspected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Service { owner, version, spec, .. } = &self.0;
        writeln!(f, "# owner {owner}, version {version}")?;
        let mut table = toml::Table::try_from(spec).map_err(|_| fmt::Error)?;
        // The file names one backend at a time.
        if let Some(backends) = table.remove("backends") {
            table.insert("backend".to_owned(), backends);
        }
        let file: toml::Table = [("service".to_owned(), vec![table].into())].into_iter().collect();
        write!(f, "{file}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn publish(text: &str) -> Result<String, String> {
        text.parse::<Publish>().map(|publish| publish.0)
    }

    #[test]
    fn a_port_is_published_in_the_words_of_docker_or_of_the_file() {
        assert_eq!(publish("published=80,target=80").unwrap(), "80/tcp");
        assert_eq!(publish("target=53,protocol=udp,published=53").unwrap(), "53/udp");
        assert_eq!(publish("80").unwrap(), "80/tcp");
        assert_eq!(publish("8000-8010/udp").unwrap(), "8000-8010/udp");
        assert_eq!(publish("published=80,target=8081").unwrap(), "80:8081/tcp");
        assert_eq!(publish("80:8081").unwrap(), "80:8081/tcp");
        let ranges = publish("published=8000-8010,target=9000-9010,protocol=udp").unwrap();
        assert_eq!(ranges, "8000-8010:9000-9010/udp");
        for bad in ["target=80", "published=80,mode=host", "published=80,tcp"] {
            publish(bad).unwrap_err();
        }
    }

    #[test]
    fn a_version_is_what_inspect_shows() {
        assert_eq!(version("00ff00ff00ff00ff").unwrap(), "00ff00ff00ff00ff");
        // The first could not even be sent.
        for bad in ["00\n", "\"00\"", "*", ""] {
            version(bad).unwrap_err();
        }
    }

    #[test]
    fn backends_without_a_name_are_numbered_where_there_is_room() {
        let backend = |text: &str| text.parse::<Backend>().unwrap();
        let mut spec = ServiceSpec { name: Some("web".to_owned()), ..ServiceSpec::default() };
        let named =
            backend("vtep=10.0.0.2,mac=02:00:00:00:00:02,name=web-2,weight=0,udp_checksum=true");
        add(&mut spec, vec![backend("vtep=10.0.0.3"), named, backend("vtep=10.0.0.4,vni=7")]);
        let names: Vec<_> = spec.backends.iter().map(|b| b.name.clone().unwrap()).collect();
        assert_eq!(names, ["web-1", "web-2", "web-3"]);
        assert_eq!(spec.backends[1].weight, Some(0));
        assert_eq!(spec.backends[1].udp_checksum, Some(true));
        assert_eq!(spec.backends[2].vni, Some(7));
        for bad in ["vtep", "colour=red", "vtep=10.0.0.2,weight=much"] {
            bad.parse::<Backend>().unwrap_err();
        }
    }

    #[test]
    fn what_is_inspected_can_be_put_into_the_file() {
        let text = "[[service]]\nname = \"web\"\nvip = \"203.0.113.1\"\nports = [\"80/tcp\"]\nvni = 1\n\
                    backend = [{ name = \"b\", vtep = \"10.0.0.2\", mac = \"02:00:00:00:00:02\" }]\n";
        let (config, _) = Config::parse("test", text).unwrap();
        let service = &config.desired.services[0];
        let placement =
            crate::plan::Placement { slot: 0, unreachable: None, drained: false, health: None };
        let shown = Inspected(Service::new((service, &[placement]))).to_string();
        assert!(shown.starts_with("# owner file, version "), "{shown}");
        let (again, _) = Config::parse("shown", &shown).unwrap();
        assert_eq!(again.desired, config.desired);
    }

    #[test]
    fn an_update_changes_what_it_says_and_nothing_else() {
        let update = |backend_rm: &[&str], weight: &[&str]| Update {
            name: "web".to_owned(),
            vip: None,
            publish_add: vec!["443/udp".parse().unwrap()],
            publish_rm: vec!["80".parse().unwrap()],
            allow_add: vec!["192.0.2.0/24".to_owned()],
            allow_rm: vec!["198.51.100.0/24".to_owned()],
            backend_drain: Vec::new(),
            deadline: None,
            backend_undrain: Vec::new(),
            backend_add: vec!["vtep=10.0.0.9,mac=02:00:00:00:00:09".parse().unwrap()],
            backend_rm: backend_rm.iter().map(|name| (*name).to_owned()).collect(),
            weight: weight.iter().map(|weight| weight.parse().unwrap()).collect(),
            scheduler: Some(Scheduler::LeastConnections),
            affinity_timeout: None,
            address: vec!["web-2=10.1.0.2".parse().unwrap()],
            no_healthcheck: false,
            health: Health::default(),
            if_version: None,
            daemon: Daemon::default(),
        };
        let backend =
            |name: &str| BackendSpec { name: Some(name.to_owned()), ..BackendSpec::default() };
        let before = ServiceSpec {
            name: Some("web".to_owned()),
            vip: Some("203.0.113.1".to_owned()),
            ports: Some(vec!["80:8080/tcp".to_owned(), "81/tcp".to_owned()]),
            allow: Some(vec!["198.51.100.0/24".to_owned()]),
            vni: Some(7),
            scheduler: Some(Scheduler::Source),
            affinity_timeout_s: Some(60),
            backends: vec![backend("web-1"), backend("web-2")],
            ..ServiceSpec::default()
        };
        let mut spec = before.clone();
        update(&["web-1"], &["web-2=0"]).apply(&mut spec).unwrap();
        assert_eq!(spec.ports.unwrap(), ["81/tcp", "443/udp"], "whatever 80 went to");
        assert_eq!(spec.allow.unwrap(), ["192.0.2.0/24"]);
        assert_eq!((spec.vip, spec.vni), (before.vip.clone(), before.vni));
        assert_eq!(spec.scheduler, Some(Scheduler::LeastConnections));
        assert_eq!(spec.affinity_timeout_s, None, "it was of no use to another scheduler");
        assert_eq!(spec.backends[0].weight, Some(0));
        assert_eq!(spec.backends[0].address.as_deref(), Some("10.1.0.2"));
        assert_eq!(spec.backends[1].name.as_deref(), Some("web-1"), "the name is free again");
        let error = update(&["web-3"], &[]).apply(&mut before.clone()).unwrap_err();
        assert_eq!(error.to_string(), "web has no backend `web-3`");
        assert_eq!(error.help().unwrap().to_string(), "it has web-1, web-2");
    }

    #[test]
    fn what_is_printed_as_json_is_the_apis_own() {
        let service = Service {
            name: "web".to_owned(),
            owner: "api".to_owned(),
            version: "1".to_owned(),
            spec: ServiceSpec::default(),
            backends: Default::default(),
        };
        let json: serde_json::Value = serde_json::to_value(Inspected(service)).unwrap();
        assert_eq!(json["owner"], "api");
    }
}
