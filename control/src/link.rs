//! What the kernel knows about network interfaces, read once: by netlink, and nothing by shelling
//! out. It neither changes an interface nor follows one; `next_hop` does the following.

use std::{
    fs, io,
    net::{IpAddr, Ipv6Addr},
};

use dataplane::wire::ethernet::{self, MacAddr};
use ethtool::{EthtoolAttr, EthtoolChannelAttr};
use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::{
    Handle,
    packet_route::{
        address::{AddressAttribute, AddressMessage},
        link::{
            InfoBond, InfoData, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
            VlanProtocol,
        },
        route::{RouteAttribute, RouteMessage, RouteType},
    },
};
use thiserror::Error;

/// Drivers whose frames may carry only the pseudo-header's sum where the L4 checksum belongs: the
/// sender is a stack on this machine (or its host) that leaves the sum to a wire which never comes.
/// `vif` is what sysfs calls xen_netfront.
const PARTIAL_CHECKSUM_DRIVERS: &[&str] =
    &["veth", "virtio_net", "tun", "netkit", "bridge", "macvlan", "macvtap", "ipvlan", "vif"];

/// Why nothing could be said about an interface.
#[derive(Debug, Error)]
pub enum LinkError {
    /// No interface has this name.
    #[error(
        "there is no interface {name} here, only {existing}: set node.interfaces to one of them"
    )]
    Missing {
        /// The name asked for.
        name: String,
        /// The names that exist, as a list for people.
        existing: String,
    },
    /// The interface carries no Ethernet frames.
    #[error("interface {0} has no MAC address: set node.interfaces to an Ethernet interface")]
    NotEthernet(String),
    /// Neither IPv4 nor IPv6 has a default route in the main table.
    #[error("there is no default route to take the interface from: set node.interfaces")]
    NoDefaultRoute,
    /// The kernel refused a question.
    #[error("the kernel does not tell about interfaces, routes or addresses")]
    Netlink(#[from] rtnetlink::Error),
    /// No netlink socket could be had.
    #[error("cannot open a netlink socket: is RestrictAddressFamilies= missing AF_NETLINK?")]
    Socket(#[from] io::Error),
}

/// The kernel's number for an interface, valid in this network namespace for the interface's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkIndex(pub u32);

/// One VLAN tag, as it stands on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VlanTag {
    /// [`ethernet::VLAN`] or [`ethernet::QINQ`].
    pub protocol: u16,
    /// 1 to 4094.
    pub id: u16,
}

/// A VLAN device's place: its frames leave by the parent, tagged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vlan {
    /// The interface below.
    pub parent: LinkIndex,
    /// What it adds.
    pub tag: VlanTag,
}

/// What one link message says: cheap to read for all interfaces at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// As in `ip link`.
    pub name: String,
    /// Its number.
    pub index: LinkIndex,
    /// All zero if it has none.
    pub mac: MacAddr,
    /// Largest IP packet in bytes.
    pub mtu: u32,
    /// Administratively up, and with carrier.
    pub up: bool,
    /// A virtual device's kind, such as `veth` or `vlan`; `None` for hardware.
    pub kind: Option<String>,
    /// Set for a VLAN device.
    pub vlan: Option<Vlan>,
    /// The bond, bridge or VRF it is enslaved to.
    pub master: Option<LinkIndex>,
    /// For a bond in a mode that has one: the only member that sends.
    pub active_member: Option<LinkIndex>,
    /// Bus and name of the hardware, as in `/sys/bus/BUS/devices/NAME`.
    pub parent: Option<(String, String)>,
    /// Receive queues allocated, of which fewer may be in use.
    pub max_rx_queues: u32,
}

impl Device {
    /// A device of which nothing but the number is known yet.
    pub(crate) fn nameless(index: LinkIndex) -> Self {
        Self {
            name: String::new(),
            index,
            mac: MacAddr::default(),
            mtu: 0,
            up: false,
            kind: None,
            vlan: None,
            master: None,
            active_member: None,
            parent: None,
            max_rx_queues: 1,
        }
    }
}

/// All that is known about an interface at start.
#[derive(Clone, Debug)]
pub struct Link {
    /// What its link message says.
    pub device: Device,
    /// Receive queues in use: those that AF_XDP can bind.
    pub rx_queues: u32,
    /// The driver, such as `mlx5_core`, `virtio_net` or `veth`; `None` if unknown.
    pub driver: Option<String>,
    /// Its addresses: IPv4 before IPv6, link-local ones last.
    pub addresses: Vec<IpAddr>,
}

impl Link {
    /// Whether frames received here may carry partial L4 checksums.
    pub fn partial_checksums(&self) -> bool {
        self.driver.as_deref().is_some_and(|driver| PARTIAL_CHECKSUM_DRIVERS.contains(&driver))
    }
}

/// Reads all about these interfaces, in the order given.
///
/// # Errors
/// If one does not exist or is not Ethernet, or netlink fails.
pub async fn links(names: &[impl AsRef<str>]) -> Result<Vec<Link>, LinkError> {
    let handle = connect()?;
    let devices = devices(&handle).await?;
    let mut links = Vec::with_capacity(names.len());
    for name in names {
        let device = find(&devices, name.as_ref())?.clone();
        let addresses = addresses(&handle, device.index).await?;
        // A driver without channels (EOPNOTSUPP), or a kernel without ethtool's netlink family,
        // leaves the allocated maximum, which binding then finds to be right or not.
        let rx_queues = channels(&device.name).await.unwrap_or(device.max_rx_queues).max(1);
        links.push(Link { driver: driver(&device), device, rx_queues, addresses });
    }
    Ok(links)
}

/// The addresses of this network namespace that others can send to: of all interfaces, but for loopback and
/// link-local ones. In order, IPv4 before IPv6.
///
/// # Errors
/// If netlink fails.
pub async fn own_addresses() -> Result<Vec<IpAddr>, LinkError> {
    let messages: Vec<_> = connect()?.address().get().execute().try_collect().await?;
    let is_reachable = |address: &IpAddr| match address {
        IpAddr::V4(address) => !address.is_loopback() && !address.is_link_local(),
        IpAddr::V6(address) => !address.is_loopback() && !address.is_unicast_link_local(),
    };
    let mut addresses: Vec<IpAddr> = messages.iter().filter_map(own).filter(is_reachable).collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

/// The name of the interface that the default route leaves by: IPv4's, else IPv6's.
///
/// # Errors
/// If there is no default route, or netlink fails.
pub async fn default_route_interface() -> Result<String, LinkError> {
    let handle = connect()?;
    let index = match default_route(&handle, IpAddr::V4([0; 4].into())).await? {
        Some(index) => Some(index),
        None => default_route(&handle, IpAddr::V6(Ipv6Addr::UNSPECIFIED)).await?,
    };
    let devices = devices(&handle).await?;
    devices
        .into_iter()
        .find(|device| Some(device.index) == index)
        .map(|device| device.name)
        .ok_or(LinkError::NoDefaultRoute)
}

/// A connection for questions. It lives as long as its handle.
pub(crate) fn connect() -> io::Result<Handle> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Every interface of this network namespace.
pub(crate) async fn devices(handle: &Handle) -> Result<Vec<Device>, rtnetlink::Error> {
    handle.link().get().execute().map_ok(device).try_collect().await
}

fn find<'a>(devices: &'a [Device], name: &str) -> Result<&'a Device, LinkError> {
    let device = devices.iter().find(|device| device.name == name).ok_or_else(|| {
        let names: Vec<_> = devices.iter().map(|device| device.name.as_str()).collect();
        LinkError::Missing { name: name.to_owned(), existing: names.join(", ") }
    })?;
    if !device.mac.is_unicast() {
        return Err(LinkError::NotEthernet(name.to_owned()));
    }
    Ok(device)
}

fn device(message: LinkMessage) -> Device {
    let mut device = Device::nameless(LinkIndex(message.header.index));
    device.up = message.header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp);
    let (mut lower, mut foreign, mut tag) = (None, false, None);
    let (mut parent_name, mut parent_bus) = (None, None);
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name = name,
            LinkAttribute::Address(bytes) => {
                device.mac = bytes.try_into().map(MacAddr).unwrap_or_default();
            }
            LinkAttribute::Mtu(mtu) => device.mtu = mtu,
            LinkAttribute::Controller(index) => device.master = Some(LinkIndex(index)),
            LinkAttribute::NumRxQueues(queues) => device.max_rx_queues = queues,
            LinkAttribute::Link(index) => lower = Some(LinkIndex(index)),
            LinkAttribute::LinkNetNsId(_) => foreign = true,
            LinkAttribute::ParentDevName(name) => parent_name = Some(name),
            LinkAttribute::ParentDevBusName(bus) => parent_bus = Some(bus),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => device.kind = Some(kind.to_string()),
                        LinkInfo::Data(InfoData::Vlan(vlan)) => tag = vlan_tag(&vlan),
                        LinkInfo::Data(InfoData::Bond(bond)) => {
                            device.active_member = active_member(&bond);
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    // A parent in another namespace has an index that means something else in ours.
    let lower = lower.filter(|_| !foreign);
    device.vlan = lower.zip(tag).map(|(parent, tag)| Vlan { parent, tag });
    device.parent = parent_bus.zip(parent_name);
    device
}

fn vlan_tag(infos: &[InfoVlan]) -> Option<VlanTag> {
    let id = infos.iter().find_map(|info| match info {
        InfoVlan::Id(id) => Some(*id),
        _ => None,
    })?;
    let service = infos.contains(&InfoVlan::Protocol(VlanProtocol::Ieee8021Ad));
    Some(VlanTag { protocol: if service { ethernet::QINQ } else { ethernet::VLAN }, id })
}

fn active_member(infos: &[InfoBond]) -> Option<LinkIndex> {
    infos.iter().find_map(|info| match info {
        InfoBond::ActivePort(index) if *index != 0 => Some(LinkIndex(*index)),
        _ => None,
    })
}

/// The driver of the hardware, or the kind of a virtual device.
///
/// Not by `/sys/class/net`: that shows the interfaces of the namespace in which sysfs was mounted,
/// so a process moved by nsenter would read about a stranger of the same name. `/sys/bus` is the
/// same for all.
fn driver(device: &Device) -> Option<String> {
    let Some((bus, name)) = &device.parent else {
        return device.kind.clone();
    };
    let target = fs::read_link(format!("/sys/bus/{bus}/devices/{name}/driver")).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

/// Receive queues in use, as `ethtool -l` counts them.
///
/// The link message only has the number allocated, which is larger whenever channels were reduced,
/// and always on a veth made without `numrxqueues` (one in use, one per CPU allocated).
/// `/sys/class/net/X/queues` has the right number, of the wrong interface: see [`driver`].
async fn channels(name: &str) -> Option<u32> {
    let (connection, mut handle, _) = ethtool::new_connection().ok()?;
    tokio::spawn(connection);
    let answers = handle.channel().get(Some(name)).execute().await.ok()?;
    let answer = Box::pin(answers).next().await?.ok()?;
    let counts = answer.payload.nlas.iter().map(|attribute| match attribute {
        EthtoolAttr::Channel(
            EthtoolChannelAttr::RxCount(count) | EthtoolChannelAttr::CombinedCount(count),
        ) => *count,
        _ => 0,
    });
    Some(counts.sum()).filter(|queues| *queues > 0)
}

async fn addresses(handle: &Handle, index: LinkIndex) -> Result<Vec<IpAddr>, rtnetlink::Error> {
    let request = handle.address().get().set_link_index_filter(index.0).execute();
    let messages: Vec<_> = request.try_collect().await?;
    let mut addresses: Vec<IpAddr> =
        messages.iter().filter(|message| message.header.index == index.0).filter_map(own).collect();
    // Stable, so that an interface's primary address stays before its secondary ones.
    addresses.sort_by_key(|address| match address {
        IpAddr::V4(address) => (address.is_link_local(), false),
        IpAddr::V6(address) => (address.is_unicast_link_local(), true),
    });
    Ok(addresses)
}

/// On a point-to-point link `Address` is the peer's and `Local` ours; IPv6 often has `Address` only.
fn own(message: &AddressMessage) -> Option<IpAddr> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    local.or(address)
}

/// Where the default route with the smallest metric leaves, `unspecified` naming the family.
async fn default_route(
    handle: &Handle,
    unspecified: IpAddr,
) -> Result<Option<LinkIndex>, rtnetlink::Error> {
    const MAIN_TABLE: u8 = 254;
    let mut request = RouteMessage::default();
    request.header.address_family = unspecified.into();
    let routes: Vec<_> = handle.route().get(request).execute().try_collect().await?;
    Ok(routes
        .iter()
        .filter(|route| {
            route.header.destination_prefix_length == 0
                && route.header.table == MAIN_TABLE
                && route.header.kind == RouteType::Unicast
        })
        .min_by_key(|route| {
            route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Priority(metric) => Some(*metric),
                _ => None,
            })
        })
        .and_then(|route| {
            route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(LinkIndex(*index)),
                RouteAttribute::MultiPath(hops) => {
                    hops.first().map(|hop| LinkIndex(hop.interface_index))
                }
                _ => None,
            })
        }))
}
