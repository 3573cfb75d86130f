//! By which way frames reach a VTEP: port, tags and MAC addresses, as the kernel itself would
//! choose them, followed as they change. Routing daemons and `ip` stay the operator's tools.
//!
//! A task asks the kernel for each wanted VTEP's route, makes it resolve the neighbour, and judges
//! (`facts`) what that means. Notifications keep it current; every ten seconds, and after anything
//! odd, all is read anew. It knows kernel facts only: no backends and no templates.

mod facts;
mod kernel;

use std::{
    collections::{BTreeSet, HashMap},
    io,
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use dataplane::wire::ethernet::MacAddr;
use futures_util::{Stream, StreamExt};
use rtnetlink::Handle;
use thiserror::Error;
use tokio::{sync::watch, time, time::Instant};

use self::{
    facts::{Facts, Neighbour, NeighbourKey, NeighbourState},
    kernel::{Event, Nudge},
};
use crate::{
    causes,
    link::{self, LinkIndex, VlanTag},
    watching,
};

/// Everything is read anew this often, in case a notification said less than it meant: a nexthop
/// object or a path's MTU may change without one.
const READ_EVERY: Duration = Duration::from_secs(10);
/// A burst of route changes is awaited this long, and read once.
const SETTLE: Duration = Duration::from_millis(20);
/// At most five full reads a second, however much the routes churn.
const READ_APART: Duration = Duration::from_millis(200);
/// A full read takes milliseconds; one that takes this long has lost an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// After a failure of netlink itself.
const RECONNECT_AFTER: Duration = Duration::from_secs(1);

/// How often neighbours are looked over.
const TICK: Duration = Duration::from_secs(1);
/// A neighbour without an answer is asked for again this often.
const RESOLVE_EVERY: Duration = Duration::from_secs(1);
/// A known neighbour is asked this often whether it still is there. With the kernel's three probes
/// one second apart, a MAC address that moved in silence is found within nine seconds.
const CONFIRM_EVERY: Duration = Duration::from_secs(4);
/// A neighbour just lost gets this long to answer a broadcast before its loss is told: it may only
/// have changed its MAC address.
const GRACE: Duration = Duration::from_millis(100);

/// Why following next hops cannot start, or had to start again.
#[derive(Debug, Error)]
pub enum NextHopError {
    /// No netlink socket could be had.
    #[error("cannot open a netlink socket: is RestrictAddressFamilies= missing AF_NETLINK?")]
    Socket(#[from] io::Error),
    /// The kernel refused a question.
    #[error("the kernel does not tell about routes or neighbours")]
    Netlink(#[from] rtnetlink::Error),
    /// An answer never came.
    #[error("the kernel did not answer about routes or neighbours within {READ_TIMEOUT:?}")]
    Timeout(#[from] time::error::Elapsed),
    /// The notification socket failed.
    #[error("the kernel's notifications about routes and neighbours stopped")]
    Silent,
}

/// What is known about the way to one VTEP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HopState {
    /// Frames can be sent.
    Resolved(Resolved),
    /// They cannot, for the reason in this sentence.
    Unresolved {
        /// For people.
        reason: String,
    },
    /// The kernel is still asking for the neighbour. Nothing can be sent yet.
    Pending,
}

/// What a frame to a VTEP needs in its Ethernet header, and where it leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The one of our links it leaves by.
    pub link: LinkIndex,
    /// Outermost first; empty for most.
    pub tags: Vec<VlanTag>,
    /// Of the interface that the kernel routes by.
    pub src_mac: MacAddr,
    /// Of the VTEP, or of the gateway towards it.
    pub dst_mac: MacAddr,
    /// Largest outer IP packet in bytes: the smallest of the links' and the route's MTU.
    pub mtu: u32,
    /// What the kernel would send from.
    pub src_ip: IpAddr,
}

/// All wanted VTEPs with their ways.
pub type Hops = Arc<HashMap<IpAddr, HopState>>;

/// A handle on the task that follows next hops; the task ends with it.
#[derive(Debug)]
pub struct NextHops {
    wanted: watch::Sender<BTreeSet<IpAddr>>,
    hops: watch::Receiver<Hops>,
}

impl NextHops {
    /// Starts following on the current tokio runtime, in the thread's network namespace. `owned`
    /// are the links that have our ports.
    ///
    /// # Errors
    /// If there is no netlink. Later failures are logged and retried; the last table stays
    /// meanwhile.
    pub fn start(owned: BTreeSet<LinkIndex>) -> Result<Self, NextHopError> {
        let (wanted, wanted_by_task) = watch::channel(BTreeSet::new());
        let (hops_of_task, hops) = watch::channel(Hops::default());
        let follower = Follower {
            handle: link::connect()?,
            owned,
            wanted: wanted_by_task,
            hops: hops_of_task,
            facts: Facts::default(),
            neighbours: BTreeSet::new(),
            nudged: HashMap::new(),
        };
        // Subscribe before the first read, so that nothing is missed in between.
        tokio::spawn(follower.run(kernel::events()?));
        Ok(Self { wanted, hops })
    }

    /// Says which VTEPs are wanted, from now on and instead of those before.
    pub fn want(&self, vteps: &BTreeSet<IpAddr>) {
        watching::tell(&self.wanted, vteps.clone());
    }

    /// The table, and its every real change.
    pub fn subscribe(&self) -> watch::Receiver<Hops> {
        self.hops.clone()
    }

    /// Waits until every wanted VTEP is resolved or known to be unreachable. `false` if some are
    /// still pending after `timeout`; the kernel gives a silent neighbour up after three seconds.
    pub async fn settled(&self, timeout: Duration) -> bool {
        let mut hops = self.hops.clone();
        let settled = hops.wait_for(|hops| {
            let known = |vtep| hops.get(vtep).is_some_and(|hop| *hop != HopState::Pending);
            self.wanted.borrow().iter().all(known)
        });
        matches!(time::timeout(timeout, settled).await, Ok(Ok(_)))
    }
}

/// The task's state.
struct Follower {
    handle: Handle,
    owned: BTreeSet<LinkIndex>,
    wanted: watch::Receiver<BTreeSet<IpAddr>>,
    hops: watch::Sender<Hops>,
    facts: Facts,
    /// Those that the facts' routes lead to; the same gateway serves many VTEPs.
    neighbours: BTreeSet<NeighbourKey>,
    /// When each neighbour was last nudged, and in which state, `None` being unknown.
    nudged: HashMap<NeighbourKey, (Instant, Option<NeighbourState>)>,
}

/// What is to be done, and by when.
#[derive(Clone, Copy, Debug)]
struct Due {
    read: Instant,
    judge: Instant,
}

impl Follower {
    async fn run(mut self, events: impl Stream<Item = Event> + Unpin) {
        let mut outcome = self.follow(events).await;
        while let Err(error) = outcome {
            tracing::warn!("following next hops starts again: {}", causes::line(&error));
            time::sleep(RECONNECT_AFTER).await;
            outcome = self.reconnect().await;
        }
    }

    async fn reconnect(&mut self) -> Result<(), NextHopError> {
        self.handle = link::connect()?;
        self.follow(kernel::events()?).await
    }

    /// Follows until nobody wants it any more, or netlink fails.
    async fn follow(
        &mut self,
        mut events: impl Stream<Item = Event> + Unpin,
    ) -> Result<(), NextHopError> {
        let mut tick = time::interval(TICK);
        let mut last_read = Instant::now() - READ_APART;
        let mut due = Due { read: Instant::now(), judge: Instant::now() + READ_EVERY };
        loop {
            tokio::select! {
                changed = self.wanted.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    due.read = Instant::now();
                }
                event = events.next() => {
                    let event = event.ok_or(NextHopError::Silent)?;
                    let asked = self.notice(event).await;
                    due.judge = due.judge.min(asked.judge);
                    due.read = due.read.min(asked.read.max(last_read + READ_APART));
                }
                () = time::sleep_until(due.read.min(due.judge)) => {
                    if due.read <= Instant::now() {
                        time::timeout(READ_TIMEOUT, self.read()).await??;
                        last_read = Instant::now();
                        due.read = last_read + READ_EVERY;
                        // A way that moved gets the time to resolve before the old one is given up.
                        let patience = if self.is_losing() { GRACE } else { Duration::ZERO };
                        due.judge = due.judge.min(last_read + patience);
                    }
                    if due.judge <= Instant::now() {
                        self.judge();
                        due.judge = Instant::now() + READ_EVERY;
                    }
                }
                _ = tick.tick() => self.nudge_all().await,
            }
        }
    }

    /// Takes in one notification. Says by when to judge or read anew because of it.
    async fn notice(&mut self, event: Event) -> Due {
        let now = Instant::now();
        let never = Due { read: now + READ_EVERY, judge: now + READ_EVERY };
        match event {
            Event::Neighbour(key, newer) => {
                let Some(changed) = self.notice_neighbour(key, newer) else {
                    return never;
                };
                self.nudge(key).await;
                Due { judge: now + changed, ..never }
            }
            Event::Route(prefix, length) => {
                let concerned =
                    self.wanted.borrow().iter().any(|vtep| covers(prefix, length, *vtep));
                if concerned { Due { read: now + SETTLE, ..never } } else { never }
            }
            Event::Links => Due { read: now + SETTLE, ..never },
            Event::Lost => {
                tracing::warn!("notifications about routes and neighbours were lost, reading all");
                Due { read: now, ..never }
            }
            Event::Other => never,
        }
    }

    /// Notes what became of a neighbour. `None` if nothing that matters, else when to judge it.
    fn notice_neighbour(
        &mut self,
        key: NeighbourKey,
        newer: Option<Neighbour>,
    ) -> Option<Duration> {
        if !self.neighbours.contains(&key) {
            return None;
        }
        let older = self.facts.neighbours.remove(&key);
        let newer = Neighbour::followed_by(newer, older);
        self.facts.neighbours.extend(newer.map(|newer| (key, newer)));
        // A confirmation every few seconds is no news.
        let meaning = |neighbour: Option<Neighbour>| {
            neighbour
                .map(|neighbour| (neighbour.usable(), neighbour.state == NeighbourState::Failed))
        };
        let usable = newer.and_then(|neighbour| neighbour.usable());
        if let (Some(newer), Some((_, state))) = (newer, self.nudged.get_mut(&key))
            && usable.is_some()
        {
            // It answered, so its next loss is a new one.
            *state = Some(newer.state);
        }
        let changed = meaning(newer) != meaning(older);
        changed.then_some(if usable.is_some() { Duration::ZERO } else { GRACE })
    }

    /// Reads everything, and starts what neighbours need.
    async fn read(&mut self) -> Result<(), rtnetlink::Error> {
        let wanted = self.wanted.borrow_and_update().clone();
        let mut facts = Facts::default();
        for device in link::devices(&self.handle).await? {
            facts.devices.insert(device.index, device);
        }
        for vtep in wanted {
            facts.routes.insert(vtep, kernel::route(&self.handle, vtep).await?);
        }
        self.neighbours = facts.neighbours_to_know(&self.owned);
        let table: HashMap<_, _> = kernel::neighbours(&self.handle).await?.into_iter().collect();
        for key in &self.neighbours {
            let (newer, older) = (table.get(key), self.facts.neighbours.get(key));
            let known = Neighbour::followed_by(newer.copied(), older.copied());
            facts.neighbours.extend(known.map(|neighbour| (*key, neighbour)));
        }
        self.nudged.retain(|key, _| self.neighbours.contains(key));
        self.facts = facts;
        self.nudge_all().await;
        Ok(())
    }

    /// Publishes what the facts mean, if that is anything new.
    fn judge(&mut self) {
        let judged: HashMap<_, _> = self
            .facts
            .routes
            .keys()
            .map(|vtep| (*vtep, self.facts.judge(*vtep, &self.owned)))
            .collect();
        log_changes(&self.hops.borrow(), &judged);
        watching::tell(&self.hops, Arc::new(judged));
    }

    /// Whether judging now would tell of a resolved hop that it is pending.
    fn is_losing(&self) -> bool {
        self.hops.borrow().iter().any(|(vtep, hop)| {
            matches!(hop, HopState::Resolved(_))
                && self.facts.routes.contains_key(vtep)
                && self.facts.judge(*vtep, &self.owned) == HopState::Pending
        })
    }

    async fn nudge_all(&mut self) {
        for key in self.neighbours.clone() {
            self.nudge(key).await;
        }
    }

    /// Makes the kernel ask for a neighbour, if its state calls for that and it has not just been
    /// done.
    async fn nudge(&mut self, key: NeighbourKey) {
        let neighbour = self.facts.neighbours.get(&key);
        if neighbour.is_some_and(|neighbour| neighbour.kept) {
            // Others look after it, and a nudge would take it from them.
            return;
        }
        let state = neighbour.map(|neighbour| neighbour.state);
        let (nudge, every) = match state {
            None | Some(NeighbourState::Failed) => (Nudge::Resolve, RESOLVE_EVERY),
            Some(NeighbourState::Known) => (Nudge::Confirm, CONFIRM_EVERY),
            Some(NeighbourState::Probing | NeighbourState::Fixed | NeighbourState::Asking) => {
                return;
            }
        };
        let now = Instant::now();
        if let Some((last, last_state)) = self.nudged.get(&key) {
            // A flush says FAILED, and then that the entry is gone, and our new one with it.
            let lost_again = nudge == Nudge::Resolve && *last_state != state;
            if now < *last + every && !lost_again {
                return;
            }
        }
        self.nudged.insert(key, (now, state));
        if let Err(error) = kernel::nudge(&self.handle, key, nudge).await {
            // The entry or the link went away meanwhile: a notification says so.
            tracing::debug!(%error, ?key, ?nudge, "the kernel would not resolve a neighbour");
        }
    }
}

/// Whether the address is within the prefix.
fn covers(prefix: IpAddr, length: u8, address: IpAddr) -> bool {
    let (difference, bits) = match (prefix, address) {
        (IpAddr::V4(prefix), IpAddr::V4(address)) => {
            (u128::from(prefix.to_bits() ^ address.to_bits()), 32)
        }
        (IpAddr::V6(prefix), IpAddr::V6(address)) => (prefix.to_bits() ^ address.to_bits(), 128),
        _ => return false,
    };
    // A shift by all 128 bits, for a default route, leaves nothing: nothing differs.
    difference.checked_shr(bits - u32::from(length).min(bits)).unwrap_or(0) == 0
}

fn log_changes(before: &HashMap<IpAddr, HopState>, after: &HashMap<IpAddr, HopState>) {
    for (vtep, hop) in after.iter().filter(|(vtep, hop)| before.get(vtep) != Some(hop)) {
        match hop {
            HopState::Resolved(Resolved { dst_mac, link, .. }) => {
                tracing::debug!(%vtep, %dst_mac, link = link.0, "next hop resolved");
            }
            HopState::Unresolved { reason } => {
                tracing::warn!(%vtep, reason, "next hop unresolved");
            }
            HopState::Pending => tracing::debug!(%vtep, "next hop asked for"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_covers_its_own_addresses_only() {
        let covers = |prefix: &str, length, address: &str| {
            covers(prefix.parse().unwrap(), length, address.parse().unwrap())
        };
        assert!(covers("10.1.0.0", 16, "10.1.2.3"));
        assert!(!covers("10.1.0.0", 16, "10.2.2.3"));
        assert!(covers("10.1.2.3", 32, "10.1.2.3") && !covers("10.1.2.2", 32, "10.1.2.3"));
        assert!(covers("0.0.0.0", 0, "203.0.113.1") && covers("::", 0, "2001:db8::1"));
        assert!(
            covers("2001:db8::", 32, "2001:db8::1") && !covers("2001:db9::", 32, "2001:db8::1")
        );
        assert!(!covers("::", 0, "10.0.0.1"), "nor another family's");
    }
}
