//! Who is pinged when, and what follows from the answers: pure, so that tests can make time do anything.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    net::IpAddr,
    time::Duration,
};

use tokio::time::Instant;

use super::Standing;
use crate::{config, next_hop::HopState};

/// Pings that leave at once, at most: many nodes are not to be a burst.
pub const AT_ONCE: usize = 64;

/// One VTEP.
#[derive(Debug)]
struct Peer {
    /// When it is pinged next.
    due: Instant,
    /// The way that pings take.
    hop: HopState,
    /// When the last ping left, if it is not answered.
    waiting: Option<Instant>,
    /// Pings in a row without an answer.
    missed: u32,
    sequence: u16,
    standing: Standing,
}

impl Peer {
    /// Pings that are under way say nothing of it any more.
    fn forget(&mut self) {
        (self.waiting, self.missed) = (None, 0);
    }
}

/// All that are pinged.
#[derive(Debug)]
pub struct Peers {
    settings: config::Liveness,
    peers: HashMap<IpAddr, Peer>,
    /// Whose turn is when.
    queue: BTreeSet<(Instant, IpAddr)>,
    /// Since when we have woken in time.
    awake_since: Instant,
    /// Whether a standing is new.
    changed: bool,
}

impl Peers {
    /// Nobody yet.
    pub fn new(settings: config::Liveness, now: Instant) -> Self {
        Self {
            settings,
            peers: HashMap::new(),
            queue: BTreeSet::new(),
            awake_since: now,
            changed: false,
        }
    }

    /// Goes on at another pace. What is known stays, or who is silent would have to answer once before that
    /// is noticed again.
    pub fn set(&mut self, settings: config::Liveness, now: Instant) {
        self.settings = settings;
        self.queue.clear();
        for (vtep, peer) in &mut self.peers {
            peer.forget();
            peer.due = first_turn(now, settings.interval());
            self.queue.insert((peer.due, *vtep));
        }
    }

    /// Pings these, and no others. A way that has changed is judged by the pings that took it.
    pub fn follow(&mut self, hops: &HashMap<IpAddr, HopState>, now: Instant) {
        self.peers.retain(|vtep, peer| {
            let stays = self.settings.enabled && hops.contains_key(vtep);
            if !stays {
                self.queue.remove(&(peer.due, *vtep));
                self.changed = true;
            }
            stays
        });
        if !self.settings.enabled {
            return;
        }
        for (vtep, hop) in hops {
            match self.peers.entry(*vtep) {
                Entry::Occupied(mut known) if known.get().hop != *hop => {
                    known.get_mut().hop = hop.clone();
                    known.get_mut().forget();
                }
                Entry::Occupied(_) => {}
                Entry::Vacant(new) => {
                    let due = first_turn(now, self.settings.interval());
                    self.queue.insert((due, *vtep));
                    self.changed = true;
                    new.insert(Peer {
                        due,
                        hop: hop.clone(),
                        waiting: None,
                        missed: 0,
                        sequence: 0,
                        standing: Standing::Unknown,
                    });
                }
            }
        }
    }

    /// When the next one's turn is.
    pub fn next_turn(&self) -> Option<Instant> {
        self.queue.first().map(|(due, _)| *due)
    }

    /// We wanted to wake at a time, and have woken now. If that is late, whatever kept us may have kept answers
    /// from us as well.
    pub fn woke(&mut self, wanted: Instant, now: Instant) {
        if now > wanted + self.patience() {
            self.awake_since = now;
        }
    }

    /// It has answered.
    pub fn answered(&mut self, vtep: IpAddr) {
        let Some(peer) = self.peers.get_mut(&vtep) else { return };
        peer.forget();
        if peer.standing != Standing::Alive {
            peer.standing = Standing::Alive;
            self.changed = true;
        }
    }

    /// A ping did not even leave.
    pub fn not_sent(&mut self, vtep: IpAddr) {
        if let Some(peer) = self.peers.get_mut(&vtep) {
            peer.waiting = None;
        }
    }

    /// Judges those whose turn it is. Returns whom to ping, and by which number. Answers that have come must
    /// have been told before.
    pub fn take_turns(&mut self, now: Instant) -> Vec<(IpAddr, u16)> {
        let (interval, patience) = (self.settings.interval(), self.patience());
        let mut pinged = Vec::new();
        for _ in 0..AT_ONCE {
            let Some((due, vtep)) = self.queue.first().copied().filter(|(due, _)| *due <= now)
            else {
                break;
            };
            self.queue.pop_first();
            let peer = self.peers.get_mut(&vtep).expect("who has a turn is there");
            // By whole intervals: who is late together must not be in time together.
            let behind = (now - due).as_millis() / interval.as_millis();
            peer.due = due + interval * (behind as u32 + 1);
            self.queue.insert((peer.due, vtep));
            if let Some(sent) = peer.waiting {
                // An answer needs time, and that we were there to hear it.
                if now < sent.max(self.awake_since) + patience {
                    continue;
                }
                // Without a way there is none, and that is told as what it is.
                peer.missed += u32::from(matches!(peer.hop, HopState::Resolved(_)));
            }
            if peer.missed >= self.settings.fall && peer.standing == Standing::Alive {
                let config::Liveness { interval_ms, fall, .. } = self.settings;
                let within = u64::from(interval_ms) * u64::from(fall);
                let pings = if fall == 1 { "a ping".to_owned() } else { format!("{fall} pings") };
                let reason = format!("{vtep} has not answered {pings} in {within} ms");
                peer.standing = Standing::Silent { reason };
                self.changed = true;
            }
            peer.waiting = Some(now);
            peer.sequence = peer.sequence.wrapping_add(1);
            pinged.push((vtep, peer.sequence));
        }
        pinged
    }

    /// All standings, if there is anything new.
    pub fn news(&mut self) -> Option<BTreeMap<IpAddr, Standing>> {
        let standings = || self.peers.iter().map(|(vtep, peer)| (*vtep, peer.standing.clone()));
        std::mem::take(&mut self.changed).then(|| standings().collect())
    }

    /// How long an answer may be under way, and we asleep.
    fn patience(&self) -> Duration {
        self.settings.interval() / 2
    }
}

/// Turns are spread over an interval.
fn first_turn(now: Instant, interval: Duration) -> Instant {
    now + interval.mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;
    use crate::{link::LinkIndex, next_hop::Resolved};

    const NODE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
    /// There and back, in milliseconds.
    const RTT: u32 = 5;

    fn hop(last: u8) -> HopState {
        HopState::Resolved(Resolved {
            link: LinkIndex(2),
            tags: Vec::new(),
            src_mac: Default::default(),
            dst_mac: dataplane::wire::ethernet::MacAddr([2, 0, 0, 0, 0, last]),
            mtu: 1500,
            src_ip: IpAddr::from([10, 0, 0, 1]),
        })
    }

    fn to(nodes: impl IntoIterator<Item = (IpAddr, HopState)>) -> HashMap<IpAddr, HopState> {
        nodes.into_iter().collect()
    }

    /// Us, the nodes, and what is between. Time goes by milliseconds.
    struct World {
        peers: Peers,
        start: Instant,
        now_ms: u32,
        /// Answers under way, each with the time that it needs yet.
        flying: Vec<(u32, IpAddr)>,
        /// Those that the kernel has for us.
        arrived: Vec<IpAddr>,
        /// When pings left.
        sent_ms: Vec<u32>,
        answers: bool,
    }

    impl World {
        fn new(hops: &HashMap<IpAddr, HopState>) -> Self {
            let start = Instant::now();
            let mut peers = Peers::new(config::Liveness::default(), start);
            peers.follow(hops, start);
            let (flying, arrived, sent_ms) = (Vec::new(), Vec::new(), Vec::new());
            Self { peers, start, now_ms: 0, flying, arrived, sent_ms, answers: true }
        }

        fn now(&self) -> Instant {
            self.start + Duration::from_millis(self.now_ms.into())
        }

        /// A millisecond, in which answers fly; we may be kept from working.
        fn pass(&mut self, awake: bool) {
            self.now_ms += 1;
            for (left, from) in &mut self.flying {
                *left -= 1;
                self.arrived.extend((*left == 0).then_some(*from));
            }
            self.flying.retain(|(left, _)| *left > 0);
            let wanted = self.peers.next_turn().expect("somebody is pinged");
            let now = self.now();
            if !awake || (self.arrived.is_empty() && now < wanted) {
                return;
            }
            self.peers.woke(wanted, now);
            self.arrived.drain(..).for_each(|from| self.peers.answered(from));
            for (vtep, _) in self.peers.take_turns(now) {
                self.sent_ms.push(self.now_ms);
                self.flying.extend(self.answers.then_some((RTT, vtep)));
            }
        }

        fn run(&mut self, ms: u32) {
            (0..ms).for_each(|_| self.pass(true));
        }

        /// Nothing here gets anything done, and nothing arrives.
        fn freeze(&mut self, ms: u32) {
            self.now_ms += ms;
        }

        /// Only we don't.
        fn starve(&mut self, ms: u32) {
            (0..ms).for_each(|_| self.pass(false));
        }

        fn standing(&self) -> &Standing {
            &self.peers.peers[&NODE].standing
        }

        fn is_silent(&self) -> bool {
            matches!(self.standing(), Standing::Silent { .. })
        }

        /// How long until it is silent.
        fn falls_silent_after(&mut self) -> u32 {
            let begun = self.now_ms;
            while !self.is_silent() {
                assert!(self.now_ms < begun + 10_000, "it is never noticed");
                self.run(1);
            }
            self.now_ms - begun
        }
    }

    #[test]
    fn three_unanswered_pings_are_silence_and_the_first_answer_ends_it() {
        for alive in 300..500 {
            let mut world = World::new(&to([(NODE, hop(1))]));
            world.run(alive);
            assert_eq!(*world.standing(), Standing::Alive);
            world.answers = false;
            let took = world.falls_silent_after();
            assert!((590..=810).contains(&took), "{took} ms");
            let Standing::Silent { reason } = world.standing() else { unreachable!() };
            assert_eq!(reason, "10.0.0.2 has not answered 3 pings in 600 ms");
            world.run(5_000);
            assert!(world.is_silent(), "for as long as it is");
            world.answers = true;
            world.run(200 + RTT + 1);
            assert_eq!(*world.standing(), Standing::Alive);
        }
    }

    #[test]
    fn a_node_that_has_never_answered_is_not_judged() {
        let mut world = World::new(&to([(NODE, hop(1))]));
        world.answers = false;
        world.run(10_000);
        assert_eq!(*world.standing(), Standing::Unknown);
        assert!(world.sent_ms.len() > 45, "and asked all the same");
    }

    #[test]
    fn lost_pings_between_answered_ones_are_no_silence() {
        let mut world = World::new(&to([(NODE, hop(1))]));
        world.run(300);
        for _ in 0..20 {
            world.answers = false;
            world.run(400);
            assert!(!world.is_silent());
            world.answers = true;
            world.run(200);
        }
    }

    #[test]
    fn a_late_wake_up_gives_a_ping_its_time() {
        let mut world = World::new(&to([(NODE, hop(1))]));
        let at_once = config::Liveness { fall: 1, ..config::Liveness::default() };
        world.peers.set(at_once, world.now());
        world.run(300);
        for _ in 0..20 {
            let pings = world.sent_ms.len();
            while world.sent_ms.len() == pings {
                world.run(1);
            }
            // Its answer is under way.
            world.freeze(1_000);
            for _ in 0..300 {
                world.run(1);
                assert!(!world.is_silent());
            }
        }
        world.answers = false;
        assert!(world.falls_silent_after() <= 410, "but no more than that");
    }

    #[test]
    fn another_way_begins_without_misses_and_without_a_way_nothing_is_missed() {
        let mut world = World::new(&to([(NODE, hop(1))]));
        world.run(300);
        world.answers = false;
        for last in 0..20 {
            world.run(550);
            let now = world.now();
            world.peers.follow(&to([(NODE, hop(last))]), now);
        }
        assert!(!world.is_silent());
        for none in [HopState::Pending, HopState::Unresolved { reason: "down".to_owned() }] {
            let now = world.now();
            world.peers.follow(&to([(NODE, none)]), now);
            world.run(5_000);
            assert!(!world.is_silent());
        }
        let now = world.now();
        world.peers.follow(&to([(NODE, hop(1))]), now);
        assert!(world.falls_silent_after() >= 590, "each way gets its three pings");
        let now = world.now();
        world.peers.follow(&to([(NODE, hop(2))]), now);
        assert!(world.is_silent(), "until an answer proves the new way");
    }

    #[test]
    fn another_pace_keeps_what_is_known_and_off_forgets_it() {
        let mut world = World::new(&to([(NODE, hop(1))]));
        world.run(300);
        world.answers = false;
        world.falls_silent_after();
        let now = world.now();
        let slower = config::Liveness { interval_ms: 1000, ..config::Liveness::default() };
        world.peers.set(slower, now);
        world.run(2_000);
        assert!(world.is_silent());
        world.peers.set(config::Liveness { enabled: false, ..slower }, now);
        world.peers.follow(&to([(NODE, hop(1))]), now);
        assert_eq!(world.peers.next_turn(), None);
        assert_eq!(world.peers.news(), Some(BTreeMap::new()));
        assert_eq!(world.peers.news(), None);
    }

    #[test]
    fn who_is_wanted_no_more_is_forgotten() {
        let mut world = World::new(&to([(NODE, hop(1))]));
        world.run(300);
        let other = IpAddr::from([10, 0, 0, 3]);
        let now = world.now();
        world.peers.follow(&to([(other, hop(1))]), now);
        assert_eq!(world.peers.news(), Some([(other, Standing::Unknown)].into()));
        world.run(1_000);
        assert_eq!(world.peers.queue.len(), 1);
    }

    #[test]
    fn thousands_are_pinged_one_after_another_also_after_a_pause() {
        let all = (0..4000_u32).map(|n| (IpAddr::from((0x0a00_0000 + n).to_be_bytes()), hop(1)));
        let mut world = World::new(&to(all));
        let most_at_once = |world: &mut World, ms| {
            let from = world.now_ms;
            world.run(ms);
            let mut by_ms = HashMap::<u32, usize>::new();
            let sent = world.sent_ms.iter().filter(|at| **at > from);
            sent.for_each(|at| *by_ms.entry(*at).or_default() += 1);
            by_ms.into_values().max().unwrap()
        };
        // 20 in a millisecond, if chance were just.
        assert!(most_at_once(&mut world, 1_000) < 50);
        world.freeze(3_000);
        assert!(most_at_once(&mut world, 100) <= AT_ONCE);
        world.run(300);
        assert!(most_at_once(&mut world, 1_000) < 50, "spread as before");
        assert!(world.peers.peers.values().all(|peer| peer.standing == Standing::Alive));
    }

    /// What may happen to a node that answers every ping, for so many milliseconds.
    #[derive(Clone, Debug)]
    enum Trouble {
        Freeze(u32),
        Starve(u32),
    }

    proptest! {
        #[test]
        fn a_node_that_answers_is_never_silent_whatever_keeps_us_from_working(
            troubles in prop::collection::vec(
                (20..500_u32, prop_oneof![
                    (1..3_000_u32).prop_map(Trouble::Freeze),
                    (1..3_000_u32).prop_map(Trouble::Starve),
                ]),
                1..30,
            )
        ) {
            let mut world = World::new(&to([(NODE, hop(1))]));
            world.run(300);
            for (peace, trouble) in troubles {
                match trouble {
                    Trouble::Freeze(ms) => world.freeze(ms),
                    Trouble::Starve(ms) => world.starve(ms),
                }
                for _ in 0..peace {
                    world.run(1);
                    prop_assert!(!world.is_silent());
                }
            }
        }
    }
}
