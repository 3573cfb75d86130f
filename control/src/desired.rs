//! What operators want: plain data that every source produces and `plan` reads. It knows no tables, no
//! kernel and no packets.

use std::{fmt, net::IpAddr, str::FromStr};

use dataplane::{flow::protocol, wire::ethernet::MacAddr};

/// Everything that is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// In the order of the source.
    pub services: Vec<Service>,
}

impl Desired {
    /// All backends with their services, in the order of a plan's placements.
    pub fn backends<'a>(&'a self) -> impl Iterator<Item = (&'a Service, &'a Backend)> {
        let of = |service: &'a Service| service.backends.iter().map(move |b| (service, b));
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

/// What clients connect to, and who serves them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Unique.
    pub name: String,
    /// The address.
    pub vip: IpAddr,
    /// At least one.
    pub ports: Vec<ServicePort>,
    /// How packets get to its backends.
    pub mode: Mode,
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
    /// The tunnel's network.
    pub vni: Vni,
    /// The tunnel's UDP port, 4789 unless said otherwise.
    pub port: u16,
    /// Largest inner IP packet in bytes, where the path is narrower than the egress link says.
    pub mtu: Option<u16>,
    /// What the outer UDP checksum is. `None`: zero over IPv4, computed over IPv6.
    pub udp_checksum: Option<bool>,
}
