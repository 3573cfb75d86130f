//! Routes to the VIPs that routers are to be told of, in a routing table of the kernel that nothing is
//! forwarded by. BIRD, FRR or keepalived read it; nothing here speaks to a router.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use futures_util::TryStreamExt;
use rtnetlink::{
    Handle,
    packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType},
};
use tokio::time;
use tracing::{error, info};

use crate::causes;

/// Marks routes as ours, as `ip route` shows after `proto`. No routing daemon has this number.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(87);
/// How long the kernel gets for all changes at once: packets are forwarded meanwhile, but nothing else is
/// done.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Why the table is not as it should be. It is tried again.
#[derive(Debug, thiserror::Error)]
enum AnnounceError {
    #[error("the kernel does not tell routing table {table}, is it there?")]
    Read { table: u32, source: rtnetlink::Error },
    #[error("the kernel does not take a route to {vip} in table {table}, is another's there?")]
    Write { vip: IpAddr, table: u32, source: rtnetlink::Error },
    #[error("the kernel does not answer about routing table {table} within {TIMEOUT:?}")]
    Timeout { table: u32 },
}

/// The routes of one table that are ours.
#[derive(Debug)]
pub struct Announcing {
    handle: Handle,
    table: u32,
    wanted: BTreeSet<IpAddr>,
    /// What was last logged, if the table is not as it should be.
    failure: Option<String>,
}

impl Announcing {
    /// Changes nothing yet.
    ///
    /// # Errors
    /// If there is no netlink.
    pub fn new(table: u32) -> io::Result<Self> {
        // Strictly checked questions are the ones that the kernel limits its answers by.
        let (connection, handle, _) = rtnetlink::new_connection_with_strict_check()?;
        tokio::spawn(connection);
        Ok(Self { handle, table, wanted: BTreeSet::new(), failure: None })
    }

    /// Announces no more what is not in `wanted`.
    pub async fn less(&mut self, wanted: &BTreeSet<IpAddr>) {
        if !self.wanted.is_subset(wanted) {
            self.wanted.retain(|vip| wanted.contains(vip));
            self.renew().await;
        }
    }

    /// Announces all of `wanted`, and nothing else.
    pub async fn exactly(&mut self, wanted: BTreeSet<IpAddr>) {
        if self.wanted != wanted {
            self.wanted = wanted;
            self.renew().await;
        }
    }

    /// Writes what the table lacks, and removes what of ours is too much there: of an earlier life, or of
    /// others who changed it. A failure is logged, and gone the next time.
    pub async fn renew(&mut self) {
        let made = time::timeout(TIMEOUT, self.write()).await;
        let made = made.unwrap_or(Err(AnnounceError::Timeout { table: self.table }));
        let failure = made.err().map(|failure| causes::line(&failure));
        match &failure {
            Some(sentence) if failure != self.failure => error!("VIPs not announced: {sentence}"),
            None if self.failure.is_some() => info!("VIPs are announced again"),
            _ => {}
        }
        self.failure = failure;
    }

    /// As far as it goes: one route that is refused keeps no other from its place.
    async fn write(&self) -> Result<(), AnnounceError> {
        let there = self.read().await?;
        let mut refused = Ok(());
        let mut note = |vip: IpAddr, outcome: Result<(), rtnetlink::Error>| {
            if let Err(source) = outcome {
                refused = Err(AnnounceError::Write { vip, table: self.table, source });
            }
        };
        for vip in there.difference(&self.wanted) {
            note(*vip, self.handle.route().del(route(self.table, *vip)).execute().await);
        }
        for vip in self.wanted.difference(&there) {
            note(*vip, self.handle.route().add(route(self.table, *vip)).execute().await);
        }
        refused
    }

    /// What of ours is in the table.
    async fn read(&self) -> Result<BTreeSet<IpAddr>, AnnounceError> {
        let mut there = BTreeSet::new();
        for family in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
            let mut question = ours(self.table);
            question.header.address_family = family.into();
            let answers: Result<Vec<_>, _> =
                self.handle.route().get(question).execute().try_collect().await;
            let answers = match answers {
                Err(rtnetlink::Error::NetlinkError(none)) if -none.raw_code() == libc::ENOENT => {
                    // There is no table before its first route.
                    continue;
                }
                answers => answers,
            };
            let answers =
                answers.map_err(|source| AnnounceError::Read { table: self.table, source })?;
            there.extend(answers.iter().filter_map(|route| vip_of(route, self.table)));
        }
        Ok(there)
    }
}

/// What all routes of ours have. The kernel's dump is limited to them: another table may have a million.
fn ours(table: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.protocol = PROTOCOL;
    message.attributes.push(RouteAttribute::Table(table));
    message
}

/// It leads nowhere, so that it does no harm if something is forwarded by it after all.
fn route(table: u32, vip: IpAddr) -> RouteMessage {
    let mut message = ours(table);
    message.header.address_family = vip.into();
    message.header.kind = RouteType::BlackHole;
    message.header.destination_prefix_length = if vip.is_ipv4() { 32 } else { 128 };
    message.attributes.push(RouteAttribute::Destination(vip.into()));
    message
}

/// Whose route this is, if it is ours. Old kernels don't limit what they tell.
fn vip_of(route: &RouteMessage, table: u32) -> Option<IpAddr> {
    let ours = route.header.protocol == PROTOCOL
        && route.attributes.contains(&RouteAttribute::Table(table));
    let destination = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(vip)) => Some(IpAddr::V4(*vip)),
        RouteAttribute::Destination(RouteAddress::Inet6(vip)) => Some(IpAddr::V6(*vip)),
        _ => None,
    });
    destination.filter(|_| ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_routes_of_ours_in_our_table_are_taken_for_ours() {
        for vip in ["203.0.113.10", "2001:db8:113::10"] {
            let vip: IpAddr = vip.parse().unwrap();
            let own = route(300, vip);
            assert_eq!(vip_of(&own, 300), Some(vip));
            assert_eq!(vip_of(&own, 100), None, "another table");
            let mut anothers = own;
            anothers.header.protocol = RouteProtocol::Static;
            assert_eq!(vip_of(&anothers, 300), None);
        }
    }
}
