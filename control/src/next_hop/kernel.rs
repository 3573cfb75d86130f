//! The netlink side of next hops: questions to the kernel, its notifications, and nudges that make
//! it resolve a neighbour. Nothing is remembered here.
//!
//! All we create are plain neighbour entries. After our death they turn STALE and the kernel's
//! garbage collection takes them like any other; a `managed` entry would be probed forever.

use std::{io, net::IpAddr};

use dataplane::wire::ethernet::MacAddr;
use futures_util::{StreamExt, TryStreamExt, stream::Stream};
use rtnetlink::{
    Handle, MulticastGroup,
    packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags,
            NeighbourMessage, NeighbourState as Nud,
        },
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType, RouteVia},
    },
};

use super::facts::{Neighbour, NeighbourKey, NeighbourState, Route};
use crate::link::LinkIndex;

/// What happened, as far as it matters here.
#[derive(Debug)]
pub enum Event {
    /// A neighbour entry changed (`Some`) or went away.
    Neighbour(NeighbourKey, Option<Neighbour>),
    /// A route to this prefix came, changed or went.
    Route(IpAddr, u8),
    /// A link, an address or a policy rule changed: any route may have.
    Links,
    /// Notifications were lost: anything may have changed.
    Lost,
    /// Nothing of interest.
    Other,
}

/// What a neighbour is made to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nudge {
    /// NTF_USE: as if a packet were to be sent. Creates the entry, and broadcasts if it is unknown.
    Resolve,
    /// NUD_PROBE: ask the known MAC address at once, without the 5 s of NUD_DELAY that NTF_USE
    /// would spend hoping for a confirmation by TCP, which cannot come from traffic the kernel
    /// never sees.
    Confirm,
}

/// Opens a socket that hears all that can change a next hop. It has no requests of ours: if it
/// overflows, no answer is lost. The stream ends if the socket fails; once it is dropped, the next
/// notification closes the socket.
pub fn events() -> io::Result<impl Stream<Item = Event> + Unpin> {
    let groups = [
        MulticastGroup::Neigh,
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv4Rule,
        MulticastGroup::Ipv6Rule,
    ];
    let (connection, _, messages) = rtnetlink::new_multicast_connection(&groups)?;
    tokio::spawn(connection);
    Ok(messages.map(|(message, _)| event(message.payload)))
}

/// How the kernel would send to this address. That is one path: of several equal ones (ECMP) it
/// picks one by a hash of the addresses, always the same while the paths are.
pub async fn route(handle: &Handle, to: IpAddr) -> Result<Route, rtnetlink::Error> {
    let mut request = RouteMessage::default();
    request.header.address_family = to.into();
    request.header.destination_prefix_length = if to.is_ipv4() { 32 } else { 128 };
    request.attributes.push(RouteAttribute::Destination(to.into()));
    let answers: Result<Vec<_>, _> = handle.route().get(request).execute().try_collect().await;
    match answers {
        Ok(answers) => {
            Ok(answers.first().map_or_else(|| no_route(to), |answer| route_of(answer, to)))
        }
        Err(rtnetlink::Error::NetlinkError(error)) => match -error.raw_code() {
            libc::ENETUNREACH => Ok(no_route(to)),
            libc::EHOSTUNREACH => Ok(Route::Nowhere(format!("{to} has an `unreachable` route"))),
            libc::EACCES => Ok(Route::Nowhere(format!("{to} has a `prohibit` route"))),
            libc::EINVAL => Ok(Route::Nowhere(format!("{to} has a `blackhole` route"))),
            _ => Err(rtnetlink::Error::NetlinkError(error)),
        },
        Err(error) => Err(error),
    }
}

/// The whole neighbour table, IPv4 and IPv6.
pub async fn neighbours(
    handle: &Handle,
) -> Result<Vec<(NeighbourKey, Neighbour)>, rtnetlink::Error> {
    let messages: Vec<_> = handle.neighbours().get().execute().try_collect().await?;
    Ok(messages.into_iter().filter_map(|message| neighbour_of(&message)).collect())
}

/// Makes the kernel work on a neighbour.
///
/// Never for an entry in a state of [`NeighbourState::Fixed`], nor one that others keep: NTF_USE
/// turns a PERMANENT entry into an ordinary one, and both clear the flags `managed` and
/// `extern_learn`.
pub async fn nudge(
    handle: &Handle,
    key: NeighbourKey,
    nudge: Nudge,
) -> Result<(), rtnetlink::Error> {
    let mut message = NeighbourMessage::default();
    message.header.family = key.address.into();
    message.header.ifindex = key.link.0;
    message.attributes.push(NeighbourAttribute::Destination(key.address.into()));
    let create = match nudge {
        Nudge::Resolve => {
            message.header.flags = NeighbourFlags::Use;
            NLM_F_CREATE
        }
        Nudge::Confirm => {
            message.header.state = Nud::Probe;
            0
        }
    };
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewNeighbour(message));
    // Without NLM_F_REPLACE, which would also overwrite what is known about an IPv6 router.
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | create;
    let mut answers = handle.clone().request(request)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload {
            return Err(rtnetlink::Error::NetlinkError(error));
        }
    }
    Ok(())
}

fn event(payload: NetlinkPayload<RouteNetlinkMessage>) -> Event {
    use RouteNetlinkMessage as Message;
    let message = match payload {
        NetlinkPayload::InnerMessage(message) => message,
        NetlinkPayload::Overrun(_) => return Event::Lost,
        _ => return Event::Other,
    };
    match message {
        Message::NewNeighbour(message) => neighbour_of(&message)
            .map_or(Event::Other, |(key, neighbour)| Event::Neighbour(key, Some(neighbour))),
        Message::DelNeighbour(message) => {
            neighbour_of(&message).map_or(Event::Other, |(key, _)| Event::Neighbour(key, None))
        }
        Message::NewRoute(message) | Message::DelRoute(message) => prefix_of(&message)
            .map_or(Event::Links, |(address, length)| Event::Route(address, length)),
        Message::NewLink(_)
        | Message::DelLink(_)
        | Message::NewAddress(_)
        | Message::DelAddress(_)
        | Message::NewRule(_)
        | Message::DelRule(_) => Event::Links,
        _ => Event::Other,
    }
}

/// The prefix a route message is about; a default route has no destination attribute. `None` if it
/// is neither IPv4's nor IPv6's.
fn prefix_of(message: &RouteMessage) -> Option<(IpAddr, u8)> {
    let unspecified = match message.header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let destination = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => ip(address),
        _ => None,
    });
    Some((destination.unwrap_or(unspecified), message.header.destination_prefix_length))
}

fn route_of(message: &RouteMessage, to: IpAddr) -> Route {
    let (mut link, mut gateway, mut source, mut mtu) = (None, None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => link = Some(LinkIndex(*index)),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            // An IPv4 route with an IPv6 gateway, RFC 5549.
            RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some((*address).into()),
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some((*address).into()),
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    match (message.header.kind, link) {
        (RouteType::Unicast, Some(link)) => {
            let neighbour = NeighbourKey { link, address: gateway.unwrap_or(to) };
            Route::Via { neighbour, source, mtu }
        }
        (RouteType::Local, _) => Route::Nowhere(format!("{to} is this node's own address")),
        (RouteType::Broadcast | RouteType::Multicast, _) => {
            Route::Nowhere(format!("{to} is a broadcast or multicast address"))
        }
        _ => no_route(to),
    }
}

fn no_route(to: IpAddr) -> Route {
    Route::Nowhere(format!("no route to {to}"))
}

/// `None` for what is no neighbour: proxy entries and other address families.
fn neighbour_of(message: &NeighbourMessage) -> Option<(NeighbourKey, Neighbour)> {
    if message.header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let mut address = None;
    let mut mac = None;
    let mut kept = message.header.flags.contains(NeighbourFlags::ExtLearned);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                address = Some(IpAddr::from(*v4));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                address = Some(IpAddr::from(*v6));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddr);
            }
            NeighbourAttribute::ExtFlags(flags) => {
                kept |= flags.contains(NeighbourExtFlags::Managed);
            }
            _ => {}
        }
    }
    let state = match message.header.state {
        Nud::Reachable | Nud::Stale => NeighbourState::Known,
        Nud::Delay | Nud::Probe => NeighbourState::Probing,
        Nud::Permanent | Nud::Noarp => NeighbourState::Fixed,
        Nud::Failed => NeighbourState::Failed,
        _ => NeighbourState::Asking,
    };
    let key = NeighbourKey { link: LinkIndex(message.header.ifindex), address: address? };
    Some((key, Neighbour { state, mac, kept }))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}
