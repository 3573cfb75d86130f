//! What operators want: plain data that every source produces and `plan` reads. It knows no tables, no
//! kernel and no packets.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
    sync::Arc,
    time::SystemTime,
};

use clap::ValueEnum;
use dataplane::{flow::protocol, wire::ethernet::MacAddr};
use foldhash::HashMap;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    config::{self, ServiceSpec},
    health::Health,
};

/// Everything that is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// In the order of the source. Shared: most stay the same from one state to the next.
    pub services: Vec<Arc<Service>>,
    /// The overlays that this node has addresses in, for mode `nat`.
    pub overlays: Vec<Overlay>,
}

impl Desired {
    /// All backends with their services.
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

/// A published port, and the one that the servers listen on: `80:8081/tcp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortMapping {
    /// What clients connect to.
    pub published: ServicePort,
    /// What the backends listen on, 1 to 65535: another one in mode `nat` only.
    pub target: u16,
}

/// Ports as an operator writes them: neighbours of one protocol as a range.
pub fn port_ranges(ports: &[PortMapping]) -> Vec<String> {
    let next = |a: u16, b: u16| a.checked_add(1) == Some(b);
    let follows = |a: &PortMapping, b: &PortMapping| {
        a.published.protocol == b.published.protocol
            && next(a.published.port, b.published.port)
            && next(a.target, b.target)
    };
    let written = |first: u16, last: u16| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    let ranges = ports.chunk_by(follows).map(|range| {
        let (first, last) = (range[0], range[range.len() - 1]);
        let published = written(first.published.port, last.published.port);
        let protocol = first.published.protocol;
        match first.target == first.published.port {
            true => format!("{published}/{protocol}"),
            false => format!("{published}:{}/{protocol}", written(first.target, last.target)),
        }
    });
    ranges.collect()
}

/// How packets get to a backend.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema, ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Direct server return: the client's packet goes into a tunnel untouched.
    #[default]
    Dsr,
    /// Both addresses are translated, and the replies come back through this node.
    Nat,
}

/// What clients connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vip {
    /// An address of the service's own.
    Address(IpAddr),
    /// Every address of a family that this node has, whichever these are.
    Node(Family),
}

impl Vip {
    /// The address, if there is one.
    pub fn address(self) -> Option<IpAddr> {
        match self {
            Self::Address(address) => Some(address),
            Self::Node(_) => None,
        }
    }

    /// What its clients speak.
    pub fn family(self) -> Family {
        match self {
            Self::Address(address) => Family::of(address),
            Self::Node(family) => family,
        }
    }

    /// Whether that is IPv6.
    pub fn is_ipv6(self) -> bool {
        self.family() == Family::V6
    }
}

impl From<IpAddr> for Vip {
    fn from(address: IpAddr) -> Self {
        Self::Address(address)
    }
}

impl From<ServicePort> for PortMapping {
    /// To the same port.
    fn from(published: ServicePort) -> Self {
        Self { published, target: published.port }
    }
}

impl fmt::Display for Vip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Node(Family::V4) => f.write_str("node"),
            Self::Node(Family::V6) => f.write_str("node6"),
        }
    }
}

/// A VXLAN network in which this node has addresses: where the replies to translated packets come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// Who says so.
    pub owner: Owner,
    /// Its number. Unique.
    pub vni: Vni,
    /// This node's mesh addresses: used by nobody else. At least one.
    pub addresses: Vec<IpAddr>,
    /// Mesh addresses that it had: they get no new connections, and keep those that they have.
    pub leaving: Vec<IpAddr>,
    /// Where frames inside the tunnel come from.
    pub mac: MacAddr,
    /// Largest IP packet inside the tunnel, in bytes. `None`: what the way there leaves.
    pub mtu: Option<u16>,
    /// The tunnel's UDP port, also on this node.
    pub port: u16,
}

impl Overlay {
    /// The same where these were `before`: what it has no more is leaving.
    pub fn after(self, before: &[Self]) -> Self {
        let before = before.iter().filter(|before| before.vni == self.vni);
        let had = before.flat_map(|before| before.addresses.iter().chain(&before.leaving));
        let leaving = had.filter(|address| !self.addresses.contains(address)).copied().collect();
        Self { leaving, ..self }
    }

    /// That of a NAT backend, if packets can be translated to there and their replies come back.
    ///
    /// # Errors
    /// Why not.
    pub fn of<'a>(backend: &Backend, overlays: &'a [Self]) -> Result<&'a Self, OutOfMesh> {
        let vni = backend.vni.get();
        let overlay = overlays
            .iter()
            .find(|overlay| overlay.vni == backend.vni)
            .ok_or(OutOfMesh::NoOverlay { vni })?;
        if overlay.port != backend.port {
            return Err(OutOfMesh::OtherPort { vni, ours: overlay.port, theirs: backend.port });
        }
        let Some(address) = backend.address else { return Ok(overlay) };
        if overlay.addresses.contains(&address) {
            return Err(OutOfMesh::Ours { vni, address });
        }
        if !overlay.has(Family::of(address)) {
            return Err(OutOfMesh::OtherFamily { vni, family: Family::of(address), address });
        }
        Ok(overlay)
    }

    /// Whether this node has an address of this family in it.
    pub fn has(&self, family: Family) -> bool {
        self.addresses.iter().any(|address| Family::of(*address) == family)
    }
}

/// What an address is one of. A translated packet keeps its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// RFC 791.
    V4,
    /// RFC 8200.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// An address's.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv6() { Self::V6 } else { Self::V4 }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// The MAC address that Docker gives whatever has this address: `02:42:` and its bytes.
pub fn container_mac(address: Ipv4Addr) -> MacAddr {
    let [a, b, c, d] = address.octets();
    MacAddr([0x02, 0x42, a, b, c, d])
}

/// Why a backend can't be one of mode `nat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OutOfMesh {
    /// This node is not in its network.
    #[error("this node has no address in the overlay {vni}")]
    NoOverlay {
        /// Its network.
        vni: u32,
    },
    /// A stock vxlan device sends to the port that it listens on.
    #[error("its tunnel has port {theirs}, and this node's in the overlay {vni} has {ours}")]
    OtherPort {
        /// Its network.
        vni: u32,
        /// The overlay's.
        ours: u16,
        /// The backend's.
        theirs: u16,
    },
    /// A translated packet keeps its family.
    #[error("it has {address}, and this node has no {family} address in the overlay {vni}")]
    OtherFamily {
        /// Its network.
        vni: u32,
        /// What is missing.
        family: Family,
        /// The backend's.
        address: IpAddr,
    },
    /// It would be us.
    #[error("{address} is an address of this node in the overlay {vni}")]
    Ours {
        /// Its network.
        vni: u32,
        /// The address.
        address: IpAddr,
    },
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
    /// The Docker Swarm that this node is of.
    Swarm,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "file",
            Self::Api => "api",
            Self::Swarm => "swarm",
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
    pub vip: Vip,
    /// At least one.
    pub ports: Vec<PortMapping>,
    /// How packets get to its backends.
    pub mode: Mode,
    /// Whose new connections are accepted, in mode `nat`. Empty: everybody's.
    pub allow: Vec<IpNet>,
    /// How its new connections are placed.
    pub scheduler: Scheduler,
    /// How its backends are checked, if they are.
    pub health: Option<Health>,
    /// May be empty.
    pub backends: Vec<Backend>,
}

impl Service {
    /// Whether clients can connect there.
    pub fn publishes(&self, port: ServicePort) -> bool {
        self.ports.iter().any(|mapping| mapping.published == port)
    }
}

/// One task of a service, behind a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Unique within the service; its stable identity, on every node.
    pub name: String,
    /// The tunnel's far end: the node that runs it.
    pub vtep: IpAddr,
    /// MAC address of its vxlan device; in mode `nat`, of what has its address in the overlay.
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
    /// Where it is checked, but for checks through the tunnel. In mode `nat` always there, and where its
    /// packets are translated to.
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
    Port(Vip, ServicePort),
    /// One's VIP is where the other's tunnel ends: its packets would come back to us.
    TunnelEnd(IpAddr),
    /// A UDP port that one publishes and an overlay's tunnels end at.
    TunnelPort(u16),
    /// One's backend is not in an overlay as it has to be for mode `nat`: its index, and why.
    Mesh(usize, OutOfMesh),
    /// Two sources describe one overlay.
    Overlay(Vni),
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
            Claim::TunnelPort(port) => {
                write!(
                    f,
                    "the {owner}'s `{name}` publishes {port}/udp, and tunnels of this node "
                )?;
                f.write_str("end at that port")
            }
            Claim::Mesh(_, why) => {
                write!(f, "a backend of the {owner}'s `{name}` can't be reached by nat: {why}")
            }
            Claim::Overlay(vni) => {
                let other = self.other.as_ref().map_or(owner, |(owner, _)| owner);
                write!(f, "the {owner} and the {other} both describe the overlay {}", vni.get())
            }
        }
    }
}

/// Where the tunnels of some services end. Of services that are nearly the same next time, only the others
/// are looked at: there may be a hundred thousand tunnels, and memory is slow.
#[derive(Clone, Debug, Default)]
pub struct TunnelEnds {
    services: Vec<Arc<Service>>,
    /// How many end at each.
    ends: HashMap<IpAddr, usize>,
}

impl TunnelEnds {
    /// Goes over to these services. All that differ are counted again, and those between them.
    pub fn follow(&mut self, services: &[Arc<Service>]) {
        let same = |(one, other): &(&Arc<Service>, &Arc<Service>)| Arc::ptr_eq(one, other);
        let front = self.services.iter().zip(services).take_while(same).count();
        let (gone, new) = (&self.services[front..], &services[front..]);
        let back = gone.iter().rev().zip(new.iter().rev()).take_while(same).count();
        let (gone, new) = (&gone[..gone.len() - back], &new[..new.len() - back]);
        for end in ends(new) {
            *self.ends.entry(end).or_default() += 1;
        }
        for end in ends(gone) {
            let count = self.ends.get_mut(&end).expect("it was counted");
            *count -= 1;
            if *count == 0 {
                self.ends.remove(&end);
            }
        }
        self.services = services.to_vec();
    }

    /// All of them, each once.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> {
        self.ends.keys().copied()
    }

    /// Whether one ends there.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.ends.contains_key(&address)
    }
}

fn ends(services: &[Arc<Service>]) -> impl Iterator<Item = IpAddr> {
    services.iter().flat_map(|service| service.backends.iter().map(|backend| backend.vtep))
}

/// The services of all sources together, in these overlays. `vteps` are this node's own ends of tunnels.
/// `tunnel_ends` are best those of a similar state, and become those of this one.
///
/// # Errors
/// A conflict, if there is any.
pub fn join(
    sources: &[&[Arc<Service>]],
    overlays: &[Overlay],
    vteps: &[IpAddr],
    tunnel_ends: &mut TunnelEnds,
) -> Result<Desired, Conflict> {
    let services: Vec<Arc<Service>> = sources.concat();
    tunnel_ends.follow(&services);
    let claimant = |service: &Service| (service.owner, service.name.clone());
    let conflict = |claim, one: &Service, other: &Service| {
        Err(Conflict { claim, one: claimant(one), other: Some(claimant(other)) })
    };
    let mut names = HashMap::with_capacity_and_hasher(services.len(), Default::default());
    let mut ports = HashMap::with_capacity_and_hasher(services.len(), Default::default());
    for service in &services {
        if let Some(first) = names.insert(service.name.as_str(), service) {
            return conflict(Claim::Name, first, service);
        }
        for port in &service.ports {
            if let Some(first) = ports.insert((service.vip, port.published), service) {
                return conflict(Claim::Port(service.vip, port.published), first, service);
            }
        }
        // What is translated may well be at this node's own address.
        if let (Mode::Dsr, Some(vip)) = (service.mode, service.vip.address())
            && (vteps.contains(&vip) || tunnel_ends.contains(vip))
        {
            let ends_there = |other: &&Arc<Service>| other.backends.iter().any(|b| b.vtep == vip);
            let other = services.iter().find(ends_there).filter(|_| !vteps.contains(&vip));
            let other = other.map(|other| claimant(other));
            return Err(Conflict { claim: Claim::TunnelEnd(vip), one: claimant(service), other });
        }
        in_mesh(service, overlays)?;
    }
    for (index, overlay) in overlays.iter().enumerate() {
        if let Some(first) = overlays[..index].iter().find(|first| first.vni == overlay.vni) {
            let whose = |overlay: &Overlay| (overlay.owner, String::new());
            let claim = Claim::Overlay(overlay.vni);
            return Err(Conflict { claim, one: whose(first), other: Some(whose(overlay)) });
        }
    }
    Ok(Desired { services, overlays: overlays.to_vec() })
}

/// Whether a service gets on with the overlays, and finds there what mode `nat` needs.
fn in_mesh(service: &Service, overlays: &[Overlay]) -> Result<(), Conflict> {
    let conflict =
        |claim| Err(Conflict { claim, one: (service.owner, service.name.clone()), other: None });
    if let Some(port) = tunnel_port(service, overlays) {
        return conflict(Claim::TunnelPort(port));
    }
    let translated = service.backends.iter().filter(|_| service.mode == Mode::Nat);
    for (index, backend) in translated.enumerate() {
        if let Err(why) = Overlay::of(backend, overlays) {
            return conflict(Claim::Mesh(index, why));
        }
    }
    Ok(())
}

/// A port that it publishes, and that tunnels of this node end at: workers tell these by the port alone.
pub fn tunnel_port(service: &Service, overlays: &[Overlay]) -> Option<u16> {
    let is_tunnels = |port: &PortMapping| {
        port.published.protocol == Protocol::Udp
            && overlays.iter().any(|overlay| overlay.port == port.published.port)
    };
    service.ports.iter().find(|port| is_tunnels(port)).map(|port| port.published.port)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

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

    /// A NAT service of the API's, which has not seen the file.
    fn nat(vni: i64, ports: &str, address: &str) -> Arc<Service> {
        let backend = crate::config::BackendSpec {
            name: Some("one".to_owned()),
            vtep: Some("10.0.0.2".to_owned()),
            address: Some(address.to_owned()),
            ..Default::default()
        };
        let spec = ServiceSpec {
            name: Some("shop".to_owned()),
            vip: Some("node".to_owned()),
            ports: Some(vec![ports.to_owned()]),
            mode: Some(Mode::Nat),
            vni: Some(vni),
            backends: vec![backend],
            ..ServiceSpec::default()
        };
        Arc::new(spec.understand(&Default::default()).unwrap().0)
    }

    /// The same for clients over IPv6.
    fn nat6(vni: i64, address: &str) -> Arc<Service> {
        let mut service = (*nat(vni, "80/tcp", "10.99.1.2")).clone();
        service.vip = Vip::Address("2001:db8::1".parse().unwrap());
        service.backends[0].address = Some(address.parse().unwrap());
        Arc::new(service)
    }

    #[test]
    fn a_nat_service_needs_an_overlay_that_this_node_is_in() {
        let overlay = Overlay {
            owner: Owner::File,
            vni: Vni::new(100).unwrap(),
            addresses: vec!["10.99.1.250".parse().unwrap()],
            leaving: Vec::new(),
            mac: container_mac([10, 99, 1, 250].into()),
            mtu: None,
            port: 4789,
        };
        let joined = |service: Arc<Service>, overlays: &[Overlay]| {
            join(&[&[service]], overlays, &[], &mut Default::default())
                .map(|desired| desired.overlays.len())
        };
        let one = [overlay.clone()];
        assert_eq!(joined(nat(100, "80:8080/tcp", "10.99.1.2"), &one), Ok(1));
        for (service, overlays, sentence) in [
            (
                nat(101, "80/tcp", "10.99.1.2"),
                &one[..],
                "a backend of the api's `shop` can't be reached by nat: this node has no address in the \
                 overlay 101",
            ),
            (
                nat(100, "80/tcp", "10.99.1.250"),
                &one,
                "a backend of the api's `shop` can't be reached by nat: 10.99.1.250 is an address of this \
                 node in the overlay 100",
            ),
            (
                nat6(100, "fd00:99::2"),
                &one,
                "a backend of the api's `shop` can't be reached by nat: it has fd00:99::2, and this node has \
                 no IPv6 address in the overlay 100",
            ),
            (
                nat(100, "4780-4790/udp", "10.99.1.2"),
                &one,
                "the api's `shop` publishes 4789/udp, and tunnels of this node end at that port",
            ),
            (
                nat(100, "80/tcp", "10.99.1.2"),
                &[overlay.clone(), overlay.clone()],
                "the file and the file both describe the overlay 100",
            ),
        ] {
            assert_eq!(joined(service, overlays).unwrap_err().to_string(), sentence);
        }
    }

    #[test]
    fn what_is_taken_out_of_an_overlay_leaves_it_unless_it_comes_back() {
        let addresses = |all: &[u8]| -> Vec<IpAddr> {
            all.iter().map(|last| IpAddr::from([10, 99, 1, *last])).collect()
        };
        let overlay = |vni, all| Overlay {
            owner: Owner::File,
            vni: Vni::new(vni).unwrap(),
            addresses: addresses(all),
            leaving: Vec::new(),
            mac: container_mac([10, 99, 1, 250].into()),
            mtu: None,
            port: 4789,
        };
        let one = overlay(100, &[250]).after(&[overlay(101, &[7]), overlay(100, &[250, 251])]);
        assert_eq!((&one.addresses, &one.leaving), (&addresses(&[250]), &addresses(&[251])));
        let two = overlay(100, &[252]).after(&[one]);
        assert_eq!(two.leaving, addresses(&[250, 251]));
        assert_eq!(overlay(100, &[250, 251, 252]).after(&[two]).leaving, addresses(&[]));
    }

    #[test]
    fn what_two_sources_want_stands_side_by_side_or_is_refused_with_a_sentence() {
        let file = [service(Owner::File, "web", "192.0.2.1", 80, "10.0.0.2")];
        let own = ["10.0.0.1".parse().unwrap()];
        let mut ends = TunnelEnds::default();
        let mut joined = |name: &str, vip: &str, port, vtep: &str| {
            let api = [service(Owner::Api, name, vip, port, vtep)];
            join(&[&file, &api], &[], &own, &mut ends).map(|desired| desired.services.len())
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

    proptest! {
        #[test]
        fn what_is_followed_from_state_to_state_is_what_is_there(
            states in prop::collection::vec(prop::collection::vec(0..12_usize, 0..8), 1..12),
        ) {
            // Several tunnels of several services end at one node.
            let all: Vec<_> = (0..12)
                .map(|i| service(Owner::Api, "web", "192.0.2.1", 80, &format!("10.0.0.{}", i / 3)))
                .collect();
            let mut followed = TunnelEnds::default();
            for state in states {
                let state: Vec<_> = state.into_iter().map(|i| all[i].clone()).collect();
                followed.follow(&state);
                let there: BTreeSet<IpAddr> = ends(&state).collect();
                prop_assert_eq!(followed.iter().collect::<BTreeSet<_>>(), there);
            }
        }
    }
}
