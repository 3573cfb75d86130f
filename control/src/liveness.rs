//! Which of the nodes that tunnels lead to are there: each is pinged several times a second, and one that does
//! not answer any more is as good as one without a way to it. Much sooner than the kernel, a cluster or a check
//! by several steps finds out.
//!
//! Done on a thread of its own, so that neither the daemon's work nor a worker's keeps it from listening.
//! `peers` is who is pinged when and what follows from answers, `socket` how.

mod peers;
mod socket;

use std::{collections::BTreeMap, io, net::IpAddr, sync::Arc, thread, time::Duration};

use tokio::{
    runtime,
    sync::watch,
    time::{self, Instant},
};
use tracing::{debug, info, warn};

use self::{peers::Peers, socket::Pings};
use crate::{
    config,
    next_hop::{HopState, Hops},
    watching,
};

/// Pings leave no more often than this, so many at once: many nodes are not to be a burst.
const PAUSE: Duration = Duration::from_millis(1);

/// What pings say of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It has never answered one: a firewall may be in the way, so nothing follows from it.
    Unknown,
    /// It answers.
    Alive,
    /// It did, and does not any more.
    Silent {
        /// For people.
        reason: String,
    },
}

impl Standing {
    /// In a word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Alive => "alive",
            Self::Silent { .. } => "silent",
        }
    }
}

/// All that are pinged.
pub type Standings = Arc<BTreeMap<IpAddr, Standing>>;

/// What is known of the ways, and nobody may be sent to who is silent. Why there is no way goes before that.
pub fn over(standings: &Standings, hops: &Hops, is_judged: impl Fn(IpAddr) -> bool) -> Hops {
    let silent = standings.iter().filter_map(|(vtep, standing)| match standing {
        Standing::Silent { reason } => Some((*vtep, reason)),
        Standing::Unknown | Standing::Alive => None,
    });
    let mut hops = hops.clone();
    for (vtep, reason) in silent.filter(|(vtep, _)| is_judged(*vtep)) {
        if let Some(HopState::Resolved(_)) = hops.get(&vtep) {
            let reason = reason.clone();
            Arc::make_mut(&mut hops).insert(vtep, HopState::Unresolved { reason });
        }
    }
    hops
}

/// A handle on the thread that pings; it ends with this.
#[derive(Debug)]
pub struct Liveness {
    settings: watch::Sender<config::Liveness>,
    standings: watch::Receiver<Standings>,
}

impl Liveness {
    /// Starts in the current network namespace. Pinged is whoever has a way or might get one: the keys of
    /// `hops`. `from` are the tunnels' own ends, as far as they are configured: pings come from there, too.
    ///
    /// # Errors
    /// If there can be no thread, or no runtime for it.
    pub fn start(
        settings: config::Liveness,
        from: &[IpAddr],
        hops: watch::Receiver<Hops>,
    ) -> io::Result<Self> {
        let peers = Peers::new(settings, Instant::now());
        let (settings, settings_there) = watch::channel(settings);
        let (standings_there, standings) = watch::channel(Standings::default());
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let from = from.to_vec();
        thread::Builder::new().name("liveness".to_owned()).spawn(move || {
            runtime.block_on(async {
                Pinging {
                    pings: [false, true].map(|v6| open(v6, &from)),
                    peers,
                    settings: settings_there,
                    hops,
                    standings: standings_there,
                }
                .run()
                .await;
            });
        })?;
        Ok(Self { settings, standings })
    }

    /// From now on by these settings.
    pub fn set(&self, settings: config::Liveness) {
        watching::tell(&self.settings, settings);
    }

    /// How the nodes are, and every change of that.
    pub fn subscribe(&self) -> watch::Receiver<Standings> {
        self.standings.clone()
    }
}

/// `None` if it can't be: nobody of that family is judged then.
fn open(v6: bool, from: &[IpAddr]) -> Option<Pings> {
    let from = from.iter().find(|address| address.is_ipv6() == v6).copied();
    let family = if v6 { "IPv6" } else { "IPv4" };
    let warn = |error: &io::Error| match error.raw_os_error() {
        // Nobody misses what the node has not.
        Some(libc::EAFNOSUPPORT) => debug!("this node has no {family}"),
        _ => warn!("nodes can't be pinged over {family}: {error}"),
    };
    Pings::open(v6, from).inspect_err(warn).ok()
}

/// The thread's state.
struct Pinging {
    /// Over IPv4 and IPv6.
    pings: [Option<Pings>; 2],
    peers: Peers,
    settings: watch::Receiver<config::Liveness>,
    hops: watch::Receiver<Hops>,
    standings: watch::Sender<Standings>,
}

impl Pinging {
    async fn run(mut self) {
        self.hops.mark_changed();
        let mut last = Instant::now();
        loop {
            let turn = self.peers.next_turn().map(|turn| turn.max(last + PAUSE));
            let [v4, v6] = &self.pings;
            tokio::select! {
                changed = self.settings.changed() => match changed {
                    Ok(()) => self.settings.mark_changed(),
                    Err(_) => return,
                },
                changed = self.hops.changed() => match changed {
                    Ok(()) => self.hops.mark_changed(),
                    Err(_) => return,
                },
                () = wait(v4.as_ref()) => {}
                () = wait(v6.as_ref()) => {}
                () = time::sleep_until(turn.unwrap_or(last)), if turn.is_some() => {}
            }
            last = Instant::now();
            self.work(turn.unwrap_or(last), last);
        }
    }

    /// Answers are heard and ways known before anybody is judged by their absence.
    fn work(&mut self, wanted: Instant, now: Instant) {
        self.peers.woke(wanted, now);
        if self.settings.has_changed().unwrap_or(false) {
            self.peers.set(*self.settings.borrow_and_update(), now);
            self.hops.mark_changed();
        }
        if self.hops.has_changed().unwrap_or(false) {
            self.peers.follow(&self.hops.borrow_and_update(), now);
        }
        for pings in self.pings.iter().flatten() {
            pings.answers().for_each(|from| self.peers.answered(from));
        }
        for (vtep, sequence) in self.peers.take_turns(now) {
            let pings = self.pings[usize::from(vtep.is_ipv6())].as_ref();
            let sent = pings.map(|pings| pings.send(vtep, sequence));
            if !matches!(sent, Some(Ok(()))) {
                debug!(%vtep, ?sent, "a ping could not be sent");
                self.peers.not_sent(vtep);
            }
        }
        if let Some(standings) = self.peers.news() {
            log_changes(&self.standings.borrow(), &standings);
            watching::tell(&self.standings, Arc::new(standings));
        }
    }
}

/// For ever, if there is nothing to wait for.
async fn wait(pings: Option<&Pings>) {
    match pings {
        Some(pings) => pings.wait().await,
        None => std::future::pending().await,
    }
}

fn log_changes(before: &BTreeMap<IpAddr, Standing>, after: &BTreeMap<IpAddr, Standing>) {
    for (vtep, standing) in after.iter().filter(|(vtep, now)| before.get(vtep) != Some(now)) {
        match (before.get(vtep), standing) {
            (_, Standing::Silent { reason }) => warn!("silent: {reason}"),
            (Some(Standing::Silent { .. }), _) => info!(%vtep, "answers pings again"),
            _ => debug!(%vtep, ?standing, "pinged"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{link::LinkIndex, next_hop::Resolved};

    #[test]
    fn silence_takes_a_way_away_and_never_covers_why_there_is_none() {
        let way = HopState::Resolved(Resolved {
            link: LinkIndex(2),
            tags: Vec::new(),
            src_mac: Default::default(),
            dst_mac: Default::default(),
            mtu: 1500,
            src_ip: IpAddr::from([10, 0, 0, 1]),
        });
        let none = |reason: &str| HopState::Unresolved { reason: reason.to_owned() };
        let silent = || Standing::Silent { reason: "silent".to_owned() };
        let node = |last| IpAddr::from([10, 0, 0, last]);
        let all = [
            (way.clone(), Some(silent()), none("silent")),
            (way.clone(), Some(Standing::Alive), way.clone()),
            (way.clone(), Some(Standing::Unknown), way.clone()),
            (way.clone(), None, way.clone()),
            (none("eth0 is down"), Some(silent()), none("eth0 is down")),
            (HopState::Pending, Some(silent()), HopState::Pending),
            // Whose way is the operator's word.
            (way.clone(), Some(silent()), way),
        ];
        let said = node(all.len() as u8);
        let (mut hops, mut standings) = (Hops::default(), Standings::default());
        for ((hop, standing, _), last) in all.iter().zip(1..) {
            Arc::make_mut(&mut hops).insert(node(last), hop.clone());
            Arc::make_mut(&mut standings).extend(standing.clone().map(|s| (node(last), s)));
        }
        let judged = over(&standings, &hops, |vtep| vtep != said);
        for ((_, _, expected), last) in all.iter().zip(1..) {
            assert_eq!(judged[&node(last)], *expected, "{last}");
        }
        let gone = [(node(99), silent())].into();
        assert_eq!(over(&Arc::new(gone), &hops, |_| true), hops, "nobody asks for it");
    }
}
