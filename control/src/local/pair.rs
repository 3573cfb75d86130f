//! The local link: a veth pair whose one end is the node's and whose other end is the workers'. What comes
//! from the node itself, and what goes to it, then is to the workers like anything else from a wire.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd,
    thread,
    time::Duration,
};

use dataplane::{port::HEADROOM, wire::ethernet::MacAddr};
use futures_util::TryStreamExt;
use nix::errno::Errno;
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth,
    packet_route::{
        address::AddressHeaderFlags,
        link::{InfoData, InfoVeth, LinkAttribute, LinkMessage, LinkXdp, XdpAttached},
    },
};
use tokio::time::{self, Instant};
use tracing::{error, info, warn};

use super::Namespace;
use crate::{causes, link, plan::Interface, workers::Queues};

/// The node's end.
pub const NODE_INTERFACE: &str = "wiremesh0";
/// The workers' end.
pub const FAR_INTERFACE: &str = "wiremesh1";
/// The node's address on it: what workers and tasks on this node see as the other side.
pub const NODE_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 1);
/// The workers' address on it.
pub const FAR_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 2);
const PREFIX_LEN: u8 = 30;
/// The same in IPv6, link-local too.
const NODE_ADDRESS6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 0x4d01);
/// The workers'.
pub const FAR_ADDRESS6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 0x4d02);
/// Longer than that of the address which the kernel gives the interface by itself: who speaks to the far one
/// does it from ours (RFC 6724 section 5, rule 8).
const PREFIX_LEN6: u8 = 126;
/// Locally administered, and the same on every node: they never leave it.
pub const NODE_MAC: MacAddr = MacAddr([0x02, 0x77, 0x6d, 0x4d, 0, 1]);
/// The workers'.
const FAR_MAC: MacAddr = MacAddr([0x02, 0x77, 0x6d, 0x4d, 0, 2]);
/// Ethernet header and two VLAN tags, in bytes.
const LARGEST_HEADER: u32 = 14 + 8;
/// A larger MTU keeps XDP programs out of veth's driver, for a packet must fit into a page.
const LARGEST_MTU: u32 = 3_500;
/// How long the link of an earlier life gets to go away. The kernel was seen to take 100 ms.
const LEFTOVER_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the kernel gets for anything it is asked.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Why there is no local link.
#[derive(Debug, thiserror::Error)]
pub enum LocalLinkError {
    /// Somebody else's.
    #[error("there is an interface {NODE_INTERFACE} that is not ours: rename it")]
    Foreign,
    /// Another process's.
    #[error(
        "{NODE_INTERFACE} is another running Wiremesh's: stop that, or set node.local_link = \"never\""
    )]
    InUse,
    /// Somebody removed it.
    #[error("{NODE_INTERFACE} was removed while it was made")]
    Gone,
    /// No namespace.
    #[error("no network namespace can be made for {FAR_INTERFACE}")]
    Namespace(#[source] io::Error),
    /// The kernel refused to make or configure it.
    #[error("the kernel refuses the veth pair {NODE_INTERFACE}, {FAR_INTERFACE}")]
    Netlink(#[from] rtnetlink::Error),
    /// No netlink socket could be had.
    #[error("cannot open a netlink socket: is RestrictAddressFamilies= missing AF_NETLINK?")]
    Socket(#[from] io::Error),
    /// An answer never came.
    #[error("the kernel did not answer within {TIMEOUT:?}")]
    Timeout(#[from] time::error::Elapsed),
}

/// The pair, as long as this lives.
#[derive(Debug)]
pub struct LocalLink {
    /// Where the far end is. `None`: where the near end is, for want of a privilege.
    namespace: Option<Namespace>,
    queues: u32,
    mtu: u32,
    /// Whether it is not there any more.
    lost: bool,
}

impl LocalLink {
    /// Makes it, with so many queues each way, for frames of this size in bytes. Call it on a tokio
    /// runtime.
    ///
    /// # Errors
    /// If the kernel refuses, or its name is taken. Nothing is left then.
    pub async fn make(queues: u32, frame_size: u32) -> Result<Self, LocalLinkError> {
        let handle = link::connect()?;
        time::timeout(LEFTOVER_TIMEOUT + TIMEOUT, remove_leftover(&handle)).await??;
        let namespace = match Namespace::new() {
            Ok(namespace) => Some(namespace),
            Err(error) if error.raw_os_error() == Some(Errno::EPERM as i32) => {
                info!(
                    "no CAP_SYS_ADMIN: {FAR_INTERFACE} is made beside {NODE_INTERFACE}, and both stay \
                     if this process is killed"
                );
                None
            }
            Err(error) => return Err(LocalLinkError::Namespace(error)),
        };
        let mtu = (frame_size - HEADROOM as u32 - LARGEST_HEADER).min(LARGEST_MTU);
        // From here on dropped if anything fails.
        let made = Self { namespace, queues, mtu, lost: false };
        time::timeout(TIMEOUT, made.build(&handle)).await??;
        Ok(made)
    }

    async fn build(&self, handle: &Handle) -> Result<(), LocalLinkError> {
        let far = self.end(LinkMessageBuilder::<LinkUnspec>::new(), FAR_INTERFACE, FAR_MAC);
        let far = match &self.namespace {
            Some(namespace) => far.setns_by_fd(namespace.as_fd().as_raw_fd()),
            None => far,
        };
        let near = LinkMessageBuilder::<LinkVeth>::new(NODE_INTERFACE, FAR_INTERFACE)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(far.build())));
        // A worker takes packets one by one, none larger than its frame: the kernel is to cut them.
        let near = self.end(near, NODE_INTERFACE, NODE_MAC);
        let near = near.append_extra_attribute(LinkAttribute::GsoMaxSegs(1));
        handle.link().add(near.build()).execute().await?;
        // The kernel can't raise an end before it has the other.
        match &self.namespace {
            Some(namespace) => namespace
                .run(|| blocking(async { raise(&link::connect()?, FAR_INTERFACE).await }))??,
            None => raise(handle, FAR_INTERFACE).await?,
        };
        let index = raise(handle, NODE_INTERFACE).await?;
        handle.address().add(index, IpAddr::V4(NODE_ADDRESS), PREFIX_LEN).execute().await?;
        // Nobody answers ARP there.
        let far = handle.neighbours().add(index, IpAddr::V4(FAR_ADDRESS));
        far.link_layer_address(&FAR_MAC.0).execute().await?;
        if let Err(error) = address6(handle, index).await {
            info!("{NODE_INTERFACE} gets no IPv6 address, as where the kernel has none: {error}");
        }
        Ok(())
    }

    /// What both ends have.
    fn end<T>(
        &self,
        end: LinkMessageBuilder<T>,
        name: &str,
        mac: MacAddr,
    ) -> LinkMessageBuilder<T> {
        end.name(name)
            .address(mac.0.to_vec())
            .mtu(self.mtu)
            .append_extra_attribute(LinkAttribute::NumTxQueues(self.queues))
            .append_extra_attribute(LinkAttribute::NumRxQueues(self.queues))
    }

    /// Says so if somebody has removed it. It takes the workers' sockets with it, and what others send is
    /// worth more than to start anew for it.
    pub async fn look_after(&mut self) {
        let look = async { Ok(find(&link::connect()?, NODE_INTERFACE).await?.is_some()) };
        let there: Result<bool, LocalLinkError> =
            time::timeout(TIMEOUT, look).await.unwrap_or_else(|late| Err(late.into()));
        // What can't be known has not changed.
        let lost = !there.unwrap_or(!self.lost);
        if lost && !self.lost {
            error!(
                "{NODE_INTERFACE} was removed: clients and backends on this node itself are not served \
                 until a restart"
            );
        }
        self.lost = lost;
    }

    /// The workers' end, as plans see it. It has no number, which would mean another interface here.
    pub fn interface(&self) -> Interface {
        Interface {
            name: FAR_INTERFACE.to_owned(),
            index: None,
            mac: FAR_MAC,
            mtu: self.mtu,
            // What the node sends has its checksums left to the device.
            partial_checksums: true,
            addresses: vec![FAR_ADDRESS.into()],
            home: Some(NODE_MAC),
        }
    }

    /// The workers' end, as workers open it.
    pub fn queues(&self) -> Queues {
        Queues {
            interface: FAR_INTERFACE.to_owned(),
            mac: FAR_MAC,
            count: self.queues as usize,
            namespace: self.namespace.clone(),
        }
    }
}

impl Drop for LocalLink {
    fn drop(&mut self) {
        // The kernel would do it once the namespace is gone, but not at once.
        let removal = thread::spawn(|| blocking(async { Ok(remove(&link::connect()?).await?) }));
        if let Ok(Err(error)) = removal.join() {
            warn!("{NODE_INTERFACE} stays: {}", causes::line(&error));
        }
    }
}

/// Has the near end reach the far one over IPv6 at once: there is nobody to ask whether the address is free.
async fn address6(handle: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    let mut near = handle.address().add(index, IpAddr::V6(NODE_ADDRESS6), PREFIX_LEN6);
    near.message_mut().header.flags = AddressHeaderFlags::Nodad;
    near.execute().await?;
    let far = handle.neighbours().add(index, IpAddr::V6(FAR_ADDRESS6));
    far.link_layer_address(&FAR_MAC.0).execute().await
}

/// Does something on a runtime of its own: this thread may be in another namespace, or have none.
fn blocking<T>(body: impl Future<Output = Result<T, LocalLinkError>>) -> Result<T, LocalLinkError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { time::timeout(TIMEOUT, body).await? })
}

/// Removes what an earlier life has left, or waits until the kernel has.
async fn remove_leftover(handle: &Handle) -> Result<(), LocalLinkError> {
    let deadline = Instant::now() + LEFTOVER_TIMEOUT;
    while let Some(near) = find(handle, NODE_INTERFACE).await? {
        if !has_mac(&near, NODE_MAC) {
            return Err(LocalLinkError::Foreign);
        }
        match find(handle, FAR_INTERFACE).await? {
            // Its program goes with its process.
            Some(far) if has_mac(&far, FAR_MAC) && !has_program(&far) => remove(handle).await?,
            _ if Instant::now() >= deadline => return Err(LocalLinkError::InUse),
            _ => time::sleep(Duration::from_millis(20)).await,
        }
    }
    Ok(())
}

async fn remove(handle: &Handle) -> Result<(), rtnetlink::Error> {
    match find(handle, NODE_INTERFACE).await? {
        Some(near) => handle.link().del(near.header.index).execute().await,
        None => Ok(()),
    }
}

/// Sets an interface up. Returns its number.
async fn raise(handle: &Handle, name: &str) -> Result<u32, LocalLinkError> {
    let end = find(handle, name).await?.ok_or(LocalLinkError::Gone)?;
    let up = LinkMessageBuilder::<LinkUnspec>::new().index(end.header.index).up();
    handle.link().set(up.build()).execute().await?;
    Ok(end.header.index)
}

async fn find(handle: &Handle, name: &str) -> Result<Option<LinkMessage>, rtnetlink::Error> {
    let answer = handle.link().get().match_name(name.to_owned()).execute().try_next().await;
    match answer {
        Err(rtnetlink::Error::NetlinkError(none)) if -none.raw_code() == libc::ENODEV => Ok(None),
        answer => answer,
    }
}

fn has_mac(link: &LinkMessage, mac: MacAddr) -> bool {
    link.attributes.iter().any(|a| matches!(a, LinkAttribute::Address(own) if *own == mac.0))
}

fn has_program(link: &LinkMessage) -> bool {
    let attached = |xdp: &LinkXdp| matches!(xdp, LinkXdp::Attached(attached) if *attached != XdpAttached::None);
    link.attributes.iter().any(|a| matches!(a, LinkAttribute::Xdp(all) if all.iter().any(attached)))
}
