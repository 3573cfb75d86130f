//! What operators want: plain data that every source produces and `plan` reads. It knows no tables, no
//! kernel and no packets.

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc, time::SystemTime};

use dataplane::{flow::protocol, wire::ethernet::MacAddr};
use foldhash::{HashMap, HashMapExt};

use crate::{
    config::{self, ServiceSpec},
    health::Health,
};

/// Everything that is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// In the order of the source. Shared: most stay the same from one state to the next.
    pub services: Vec<Arc<Service>>,
}

impl Desired {
    /// All backends with their services, in the order of a plan's placements.
    pub fn backends<'a>(&'a self) -> impl Iterator<Item = (&'a Service, &'a Backend)> {
        let of = |service: &'a Arc<Service>| service.backends.iter().map(move |b| (&**service, b));
        self.services.iter().flat_map(of)
    }
}

/// A transport protocol a service can be published on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
    /// RFC 9260.
    Sctp,
}

impl Protocol {
    /// IANA's number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => protocol::TCP,
            Self::Udp => protocol::UDP,
            Self::Sctp => protocol::SCTP,
        }
    }
}

impl FromStr for Protocol {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "sctp" => Ok(Self::Sctp),
            _ => Err(()),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// One published port, as in `443/tcp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServicePort {
    /// 1 to 65535.
    pub port: u16,
    /// Over what.
    pub protocol: Protocol,
}

impl fmt::Display for ServicePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.port, self.protocol)
    }
}

/// Ports as an operator writes them: neighbours of one protocol as a range.
pub fn port_ranges(ports: &[ServicePort]) -> Vec<String> {
    let follows = |a: &ServicePort, b: &ServicePort| {
        a.protocol == b.protocol && a.port.checked_add(1) == Some(b.port)
    };
    let ranges = ports.chunk_by(follows).map(|range| match range {
        [first, .., last] => format!("{}-{last}", first.port),
        one => one.iter().map(ToString::to_string).collect(),
    });
    ranges.collect()
}

/// How packets get to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Direct server return: the client's packet goes into a tunnel untouched.
    Dsr,
}

/// How new connections are placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheduler {
    /// By a hash of addresses and ports.
    Maglev,
    /// In turns.
    RoundRobin,
    /// To the backend with the fewest connections.
    LeastConnections,
    /// By the client's address, which keeps its backend for so long after its latest new connection.
    Source {
        /// 0 for no longer than backends stay the same.
        timeout_s: u32,
    },
}

impl Scheduler {
    /// As it stands in the file: its name, and the timeout of `source`.
    pub fn written(self) -> (config::Scheduler, Option<i64>) {
        match self {
            Self::Maglev => (config::Scheduler::Maglev, None),
            Self::RoundRobin => (config::Scheduler::RoundRobin, None),
            Self::LeastConnections => (config::Scheduler::LeastConnections, None),
            Self::Source { timeout_s } => (config::Scheduler::Source, Some(timeout_s.into())),
        }
    }
}

/// A VXLAN network identifier: 24 bits, RFC 7348 section 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vni(u32);

impl Vni {
    /// `None` if it does not fit in 24 bits.
    pub fn new(vni: u32) -> Option<Self> {
        (vni < 1 << 24).then_some(Self(vni))
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

/// Who says that a service is wanted, and alone may change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The configuration file.
    File,
    /// The HTTP API.
    Api,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "file",
            Self::Api => "api",
        })
    }
}

/// What clients connect to, and who serves them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Where it comes from.
    pub owner: Owner,
    /// In whose words, if they are to be shown again as they are.
    pub written: Option<Arc<ServiceSpec>>,
    /// Unique.
    pub name: String,
    /// The address.
    pub vip: IpAddr,
    /// At least one.
    pub ports: Vec<ServicePort>,
    /// How packets get to its backends.
    pub mode: Mode,
    /// How its new connections are placed.
    pub scheduler: Scheduler,
    /// How its backends are checked, if they are.
    pub health: Option<Health>,
    /// May be empty.
    pub backends: Vec<Backend>,
}

/// One task of a service, behind a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Unique within the service; its stable identity, on every node.
    pub name: String,
    /// The tunnel's far end: the node that runs it.
    pub vtep: IpAddr,
    /// MAC address of its vxlan device.
    pub mac: MacAddr,
    /// Its share of new connections; 0 drains it.
    pub weight: u16,
    /// How long it keeps its connections; its weight is 0 then. `None`: nothing was said.
    pub drain: Option<Drain>,
    /// The tunnel's network.
    pub vni: Vni,
    /// The tunnel's UDP port, 4789 unless said otherwise.
    pub port: u16,
    /// Largest inner IP packet in bytes, where the path is narrower than the egress link says.
    pub mtu: Option<u16>,
    /// What the outer UDP checksum is. `None`: zero over IPv4, computed over IPv6.
    pub udp_checksum: Option<bool>,
    /// Where it is checked, but for checks through the tunnel.
    pub address: Option<IpAddr>,
}

/// How long a backend that drains keeps its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// As long as they live.
    Forever,
    /// Until then at most. What is left goes to others.
    Until(SystemTime),
}

impl Drain {
    /// When it ends.
    pub fn deadline(self) -> Option<SystemTime> {
        match self {
            Self::Forever => None,
            Self::Until(deadline) => Some(deadline),
        }
    }
}

impl FromStr for Drain {
    type Err = humantime::TimestampError;

    /// `forever`, or a time as in RFC 3339, in UTC.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "forever" => Ok(Self::Forever),
            _ => humantime::parse_rfc3339(text).map(Self::Until),
        }
    }
}

impl fmt::Display for Drain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forever => f.write_str("forever"),
            Self::Until(deadline) => write!(f, "{}", humantime::format_rfc3339(*deadline)),
        }
    }
}

/// What two services can't both have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Their name.
    Name,
    /// A port of a VIP.
    Port(IpAddr, ServicePort),
    /// One's VIP is where the other's tunnel ends: its packets would come back to us.
    TunnelEnd(IpAddr),
}

/// Two services that can't stand side by side.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Conflict {
    /// What they both claim.
    pub claim: Claim,
    /// One, and whose it is; for a tunnel's end, the one whose VIP it is.
    pub one: (Owner, String),
    /// The other; for a tunnel's end, the one with the tunnel, or `None` if it is this node's own end.
    pub other: Option<(Owner, String)>,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (owner, name) = &self.one;
        let whose = |f: &mut fmt::Formatter<'_>| match &self.other {
            Some((owner, name)) => write!(f, "the {owner}'s `{name}`"),
            None => f.write_str("this node"),
        };
        match self.claim {
            Claim::Name => {
                write!(f, "the {owner}'s `{name}` and ")?;
                whose(f)?;
                f.write_str(" have the same name")
            }
            Claim::Port(vip, port) => {
                write!(f, "the {owner}'s `{name}` and ")?;
                whose(f)?;
                write!(f, " both publish {port} of {vip}")
            }
            Claim::TunnelEnd(vip) => {
                write!(f, "{vip} is the VIP of the {owner}'s `{name}`, and a tunnel of ")?;
                whose(f)?;
                f.write_str(" ends there")
            }
        }
    }
}

/// The services of all sources together. `vteps` are this node's own ends of tunnels.
///
/// # Errors
/// The first conflict.
pub fn join(sources: &[&[Arc<Service>]], vteps: &[IpAddr]) -> Result<Desired, Conflict> {
    let services: Vec<Arc<Service>> = sources.concat();
    let claimant = |service: &Service| (service.owner, service.name.clone());
    let conflict = |claim, one: &Service, other: &Service| {
        Err(Conflict { claim, one: claimant(one), other: Some(claimant(other)) })
    };
    let (mut names, mut ports, mut vips) = (HashMap::new(), HashMap::new(), HashMap::new());
    for service in &services {
        if let Some(first) = names.insert(service.name.as_str(), service) {
            return conflict(Claim::Name, first, service);
        }
        for port in &service.ports {
            if let Some(first) = ports.insert((service.vip, *port), service) {
                return conflict(Claim::Port(service.vip, *port), first, service);
            }
        }
        vips.insert(service.vip, service);
    }
    let own = vteps.iter().map(|vtep| (*vtep, None));
    let tunnels = services.iter().flat_map(|service| {
        service.backends.iter().map(move |backend| (backend.vtep, Some(service)))
    });
    for (vtep, service) in own.chain(tunnels) {
        if let Some(at) = vips.get(&vtep) {
            let other = service.map(|service| claimant(service));
            return Err(Conflict { claim: Claim::TunnelEnd(vtep), one: claimant(at), other });
        }
    }
    Ok(Desired { services })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(owner: Owner, name: &str, vip: &str, port: u16, vtep: &str) -> Arc<Service> {
        let spec = ServiceSpec {
            name: Some(name.to_owned()),
            vip: Some(vip.to_owned()),
            ports: Some(vec![format!("{port}/tcp")]),
            vni: Some(1),
            backends: vec![crate::config::BackendSpec {
                name: Some("one".to_owned()),
                vtep: Some(vtep.to_owned()),
                mac: Some("02:00:00:00:00:01".to_owned()),
                ..Default::default()
            }],
            ..ServiceSpec::default()
        };
        let (service, _) = spec.understand(&Default::default()).unwrap();
        Arc::new(Service { owner, ..service })
    }

    #[test]
    fn what_two_sources_want_stands_side_by_side_or_is_refused_with_a_sentence() {
        let file = [service(Owner::File, "web", "192.0.2.1", 80, "10.0.0.2")];
        let own = ["10.0.0.1".parse().unwrap()];
        let joined = |name: &str, vip: &str, port, vtep: &str| {
            let api = [service(Owner::Api, name, vip, port, vtep)];
            join(&[&file, &api], &own).map(|desired| desired.services.len())
        };
        assert_eq!(joined("shop", "192.0.2.1", 81, "10.0.0.2"), Ok(2));
        for (name, vip, port, vtep, sentence) in [
            (
                "web",
                "192.0.2.9",
                80,
                "10.0.0.2",
                "the file's `web` and the api's `web` have the same name",
            ),
            (
                "shop",
                "192.0.2.1",
                80,
                "10.0.0.2",
                "the file's `web` and the api's `shop` both publish 80/tcp of 192.0.2.1",
            ),
            (
                "shop",
                "10.0.0.2",
                81,
                "10.0.0.3",
                "10.0.0.2 is the VIP of the api's `shop`, and a tunnel of the file's `web` ends there",
            ),
            (
                "shop",
                "192.0.2.9",
                81,
                "192.0.2.1",
                "192.0.2.1 is the VIP of the file's `web`, and a tunnel of the api's `shop` ends there",
            ),
            (
                "shop",
                "10.0.0.1",
                81,
                "10.0.0.3",
                "10.0.0.1 is the VIP of the api's `shop`, and a tunnel of this node ends there",
            ),
        ] {
            assert_eq!(joined(name, vip, port, vtep).unwrap_err().to_string(), sentence);
        }
    }
}
