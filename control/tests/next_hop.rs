//! Next hops against a real kernel: each test builds network namespaces, lets `NextHops` follow
//! from within one, changes the network with `ip` and looks at what is published. Needs root. VLANs
//! and bonds are tested with the pure part: not every kernel here has them. So are the pings of `Liveness`, which
//! go where these lead.

use std::{
    collections::BTreeSet,
    fs::File,
    io::Write,
    net::IpAddr,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use control::{
    config,
    link::{self, LinkError},
    liveness::{Liveness, Standings},
    next_hop::{HopState, Hops, NextHops, Resolved},
};
use nix::{
    sched::{CloneFlags, setns},
    unistd::geteuid,
};
use tokio::{sync::watch, time, time::Instant};

/// Longer than the kernel takes to give a neighbour up.
const PATIENCE: Duration = Duration::from_secs(12);

/// Namespace `node`, where the tests run, and two peers; removed at the end.
struct Lab {
    prefix: String,
}

impl Lab {
    const NAMESPACES: [&str; 3] = ["node", "left", "right"];

    /// node:eth0 (10.0.0.1, fd00::1) — left:eth0 (10.0.0.2, fd00::2);
    /// node:eth1 (10.1.0.1) — right:eth0 (10.1.0.2). The peers' MACs end in :02 and :12.
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let lab = Self { prefix: format!("nh-{}-{number}", std::process::id()) };
        for namespace in Self::NAMESPACES {
            run("ip", &format!("netns add {}-{namespace}", lab.prefix));
            lab.ip(namespace, "link set lo up");
        }
        lab.connect("eth0", "left", ["02:00:00:00:00:01", "02:00:00:00:00:02"], "10.0.0");
        lab.connect("eth1", "right", ["02:00:00:00:00:11", "02:00:00:00:00:12"], "10.1.0");
        lab.ip("node", "addr add fd00::1/64 dev eth0 nodad");
        lab.ip("left", "addr add fd00::2/64 dev eth0 nodad");
        lab
    }

    fn connect(&self, link: &str, peer: &str, [ours, theirs]: [&str; 2], net: &str) {
        let far = format!("peer name eth0 address {theirs} netns {}-{peer}", self.prefix);
        self.ip("node", &format!("link add {link} address {ours} type veth {far}"));
        self.ip("node", &format!("addr add {net}.1/24 dev {link}"));
        self.ip(peer, &format!("addr add {net}.2/24 dev eth0"));
        self.ip("node", &format!("link set {link} up"));
        self.ip(peer, "link set eth0 up");
    }

    /// Runs `ip` in a namespace.
    fn ip(&self, namespace: &str, words: &str) -> String {
        run("ip", &format!("-n {}-{namespace} {words}", self.prefix))
    }

    /// Makes the left peer announce every change of its MAC address by gratuitous ARP.
    fn left_announces(&self) {
        let sysctl = "sysctl -qw net.ipv4.conf.eth0.arp_notify=1";
        run("ip", &format!("netns exec {}-left {sysctl}", self.prefix));
    }

    /// Moves this thread into the node's namespace and runs the test on a runtime there.
    fn run(&self, test: impl AsyncFnOnce(&Self)) {
        let namespace = File::open(format!("/run/netns/{}-node", self.prefix)).unwrap();
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(self));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for namespace in Self::NAMESPACES {
            let name = format!("{}-{namespace}", self.prefix);
            // Not `run`: a panic here would hide the test's own.
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
    }
}

fn run(program: &str, words: &str) -> String {
    let output = Command::new(program).args(words.split_whitespace()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {words}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a test in a new lab, as root.
fn in_lab(test: impl AsyncFnOnce(&Lab)) {
    assert!(geteuid().is_root(), "needs root: run scripts/test as root");
    Lab::new().run(test);
}

/// A started `NextHops`, and the table it publishes.
struct Following {
    next_hops: NextHops,
    hops: watch::Receiver<Hops>,
}

impl Following {
    async fn by(links: &[&str], vteps: &[&str]) -> Self {
        let links = link::links(links).await.unwrap();
        let owned: BTreeSet<_> = links.iter().map(|link| link.device.index).collect();
        let next_hops = NextHops::start(owned).unwrap();
        let mut hops = next_hops.subscribe();
        next_hops.want(&vteps.iter().map(|vtep| ip(vtep)).collect());
        assert!(next_hops.settled(PATIENCE).await, "settles: {:?}", hops.borrow());
        hops.mark_unchanged();
        Self { next_hops, hops }
    }

    fn state(&self, vtep: &str) -> HopState {
        self.hops.borrow()[&ip(vtep)].clone()
    }

    fn resolved(&self, vtep: &str) -> Resolved {
        match self.state(vtep) {
            HopState::Resolved(resolved) => resolved,
            other => panic!("{vtep} is not resolved: {other:?}"),
        }
    }

    fn reason(&self, vtep: &str) -> String {
        match self.state(vtep) {
            HopState::Unresolved { reason } => reason,
            other => panic!("{vtep} is not unresolved: {other:?}"),
        }
    }

    /// Waits until the VTEP's state is as wanted. Says how long it took and what was published
    /// meanwhile.
    async fn becomes(
        &mut self,
        vtep: &str,
        wanted: impl Fn(&HopState) -> bool,
    ) -> (Duration, Vec<HopState>) {
        let start = Instant::now();
        let mut seen = vec![self.state(vtep)];
        while !wanted(&self.state(vtep)) {
            let changed = time::timeout_at(start + PATIENCE, self.hops.changed()).await;
            changed.unwrap_or_else(|_| panic!("{vtep} stays {seen:?}")).unwrap();
            seen.push(self.state(vtep));
        }
        println!("{vtep} took {:?}: {seen:#?}", start.elapsed());
        (start.elapsed(), seen)
    }
}

/// Waits until pings say the same of all. Says how long that took.
async fn all_become(
    standings: &mut watch::Receiver<Standings>,
    count: usize,
    word: &str,
) -> Duration {
    let begun = Instant::now();
    let all = |standings: &Standings| {
        standings.len() == count && standings.values().all(|standing| standing.word() == word)
    };
    let waited = time::timeout(PATIENCE, standings.wait_for(all)).await;
    assert!(waited.is_ok(), "{count} are not {word}");
    println!("{count} {word} after {:?}", begun.elapsed());
    begun.elapsed()
}

/// What the kernel dropped on all netlink sockets of this thread's namespace.
fn notifications_lost() -> u64 {
    let sockets = std::fs::read_to_string("/proc/thread-self/net/netlink").unwrap();
    let drops = |line: &str| line.split_whitespace().nth(8)?.parse::<u64>().ok();
    sockets.lines().filter_map(drops).sum()
}

fn ip(address: &str) -> IpAddr {
    address.parse().unwrap()
}

fn goes_to(mac: &str) -> impl Fn(&HopState) -> bool {
    move |hop| matches!(hop, HopState::Resolved(hop) if hop.dst_mac.to_string() == mac)
}

fn is_unresolved(hop: &HopState) -> bool {
    matches!(hop, HopState::Unresolved { .. })
}

fn has_mtu(mtu: u32) -> impl Fn(&HopState) -> bool {
    move |hop| matches!(hop, HopState::Resolved(hop) if hop.mtu == mtu)
}

#[test]
fn a_neighbour_resolves_to_what_the_kernel_would_use() {
    in_lab(async |_| {
        let following = Following::by(&["eth0"], &["10.0.0.2", "fd00::2"]).await;
        let hop = following.resolved("10.0.0.2");
        assert_eq!(hop.link, link::links(&["eth0"]).await.unwrap()[0].device.index);
        assert_eq!(hop.src_mac.to_string(), "02:00:00:00:00:01");
        assert_eq!(hop.dst_mac.to_string(), "02:00:00:00:00:02");
        assert_eq!((hop.src_ip, hop.mtu, hop.tags.len()), (ip("10.0.0.1"), 1500, 0));
        let hop = following.resolved("fd00::2");
        assert_eq!(hop.dst_mac.to_string(), "02:00:00:00:00:02");
        assert_eq!(hop.src_ip, ip("fd00::1"));
    });
}

#[test]
fn a_vtep_behind_a_gateway_resolves_to_the_gateways_mac() {
    in_lab(async |lab| {
        lab.ip("node", "route add 10.8.0.0/16 via 10.1.0.2");
        lab.ip("node", "route add 10.9.0.0/16 via inet6 fd00::2 dev eth0");
        lab.ip("node", "route add 2001:db8::/32 via fd00::2");
        let vteps = ["10.8.0.1", "10.8.0.2", "10.9.0.1", "2001:db8::1"];
        let following = Following::by(&["eth0", "eth1"], &vteps).await;
        let macs = vteps.map(|vtep| following.resolved(vtep).dst_mac.0[5]);
        assert_eq!(macs, [0x12, 0x12, 0x02, 0x02]);
    });
}

#[test]
fn of_equal_paths_the_kernels_choice_is_taken() {
    in_lab(async |lab| {
        let paths = "nexthop via 10.0.0.2 nexthop via 10.1.0.2";
        lab.ip("node", &format!("route add 10.8.0.0/16 {paths}"));
        let vteps = ["10.8.0.1", "10.8.0.2", "10.8.0.3", "10.8.0.4"];
        let following = Following::by(&["eth0", "eth1"], &vteps).await;
        for vtep in vteps {
            let device = match following.resolved(vtep).dst_mac.0[5] {
                0x02 => "dev eth0",
                _ => "dev eth1",
            };
            let answer = lab.ip("node", &format!("route get {vtep}"));
            assert!(answer.contains(device), "{answer}");
        }
    });
}

#[test]
fn an_announced_change_of_mac_is_followed_within_100_ms() {
    in_lab(async |lab| {
        lab.left_announces();
        let mut following = Following::by(&["eth0"], &["10.0.0.2"]).await;
        lab.ip("left", "link set eth0 address 02:00:00:00:00:22");
        let (took, _) = following.becomes("10.0.0.2", goes_to("02:00:00:00:00:22")).await;
        assert!(took < Duration::from_millis(100), "took {took:?}");
    });
}

#[test]
fn a_silent_change_of_mac_is_found_by_asking_and_is_never_told_as_a_loss() {
    in_lab(async |lab| {
        let mut following = Following::by(&["eth0"], &["10.0.0.2"]).await;
        lab.ip("left", "link set eth0 address 02:00:00:00:00:22");
        let (took, seen) = following.becomes("10.0.0.2", goes_to("02:00:00:00:00:22")).await;
        assert!(took < Duration::from_secs(10), "took {took:?}");
        assert!(seen.iter().all(|hop| matches!(hop, HopState::Resolved(_))), "{seen:?}");
    });
}

#[test]
fn our_own_change_of_mac_is_followed() {
    in_lab(async |lab| {
        let mut following = Following::by(&["eth0"], &["10.0.0.2"]).await;
        lab.ip("node", "link set eth0 address 02:00:00:00:00:33");
        let from_33 =
            |hop: &HopState| matches!(hop, HopState::Resolved(hop) if hop.src_mac.0[5] == 0x33);
        let (took, seen) = following.becomes("10.0.0.2", from_33).await;
        assert!(took < Duration::from_secs(1), "took {took:?}");
        assert!(seen.iter().all(|hop| matches!(hop, HopState::Resolved(_))), "{seen:?}");
    });
}

#[test]
fn a_route_that_moves_to_another_interface_is_followed() {
    in_lab(async |lab| {
        lab.ip("node", "route add 10.8.0.0/16 via 10.0.0.2");
        let mut following = Following::by(&["eth0", "eth1"], &["10.8.0.1"]).await;
        assert_eq!(following.resolved("10.8.0.1").dst_mac.to_string(), "02:00:00:00:00:02");

        lab.ip("node", "route replace 10.8.0.0/16 via 10.1.0.2");
        let (took, seen) = following.becomes("10.8.0.1", goes_to("02:00:00:00:00:12")).await;
        assert!(took < Duration::from_secs(1), "took {took:?}");
        assert_eq!(seen.len(), 2, "from one straight to the other: {seen:?}");
        assert_eq!(following.resolved("10.8.0.1").src_ip, ip("10.1.0.1"));

        lab.ip("node", "route del 10.8.0.0/16");
        following.becomes("10.8.0.1", is_unresolved).await;
        assert_eq!(following.reason("10.8.0.1"), "no route to 10.8.0.1");

        lab.ip("node", "route add default via 10.0.0.2 table 77");
        lab.ip("node", "rule add to 10.8.0.0/16 lookup 77");
        let (took, _) = following.becomes("10.8.0.1", goes_to("02:00:00:00:00:02")).await;
        assert!(took < Duration::from_secs(1), "took {took:?}");
    });
}

#[test]
fn a_neighbour_that_dies_is_told_and_its_return_is_found() {
    in_lab(async |lab| {
        let mut following = Following::by(&["eth0"], &["10.0.0.2"]).await;
        lab.ip("left", "addr del 10.0.0.2/24 dev eth0");
        following.becomes("10.0.0.2", is_unresolved).await;
        let expected = "neighbour 10.0.0.2 on eth0 does not answer (FAILED)";
        assert_eq!(following.reason("10.0.0.2"), expected);

        // Through more than one round of asking in vain, it stays known as dead.
        let quiet = time::timeout(Duration::from_secs(5), following.hops.changed()).await;
        assert!(quiet.is_err(), "became {:?}", following.state("10.0.0.2"));

        lab.ip("left", "addr add 10.0.0.2/24 dev eth0");
        let (took, _) = following.becomes("10.0.0.2", goes_to("02:00:00:00:00:02")).await;
        assert!(took < Duration::from_secs(3), "took {took:?}");
    });
}

#[test]
fn a_flushed_neighbour_table_is_no_loss() {
    in_lab(async |lab| {
        let mut following = Following::by(&["eth0"], &["10.0.0.2"]).await;
        // At the same state, resolving is not repeated within a second.
        time::sleep(Duration::from_millis(1100)).await;
        lab.ip("node", "neigh flush all");
        let quiet = time::timeout(Duration::from_secs(3), following.hops.changed()).await;
        assert!(quiet.is_err(), "became {:?}", following.state("10.0.0.2"));
    });
}

#[test]
fn a_link_that_loses_its_carrier_is_told() {
    in_lab(async |lab| {
        let mut following = Following::by(&["eth0"], &["10.0.0.2"]).await;
        lab.ip("left", "link set eth0 down");
        let (took, _) = following.becomes("10.0.0.2", is_unresolved).await;
        // The kernel itself tells about carriers once a second at most.
        assert!(took < Duration::from_secs(2), "took {took:?}");
        assert_eq!(following.reason("10.0.0.2"), "10.0.0.2 is routed through eth0, which is down");
        lab.ip("left", "link set eth0 up");
        following.becomes("10.0.0.2", goes_to("02:00:00:00:00:02")).await;
    });
}

#[test]
fn each_way_of_having_no_next_hop_has_its_sentence() {
    in_lab(async |lab| {
        lab.ip("node", "route add blackhole 10.7.0.1/32");
        lab.ip("node", "route add unreachable 10.7.0.2/32");
        let expected = [
            ("10.9.9.9", "no route to 10.9.9.9"),
            ("10.0.0.1", "10.0.0.1 is this node's own address"),
            ("fd00::1", "fd00::1 is this node's own address"),
            ("10.0.0.255", "10.0.0.255 is a broadcast or multicast address"),
            ("10.1.0.2", "10.1.0.2 is routed through eth1, which is not one of node.interfaces"),
            ("10.0.0.99", "neighbour 10.0.0.99 on eth0 does not answer (FAILED)"),
            ("10.7.0.1", "10.7.0.1 has a `blackhole` route"),
            ("10.7.0.2", "10.7.0.2 has an `unreachable` route"),
        ];
        let following = Following::by(&["eth0"], &expected.map(|(vtep, _)| vtep)).await;
        for (vtep, reason) in expected {
            assert_eq!(following.reason(vtep), reason);
        }
    });
}

#[test]
fn the_mtu_is_the_smaller_of_the_links_and_the_routes() {
    in_lab(async |lab| {
        lab.ip("node", "route add 10.8.0.0/16 via 10.0.0.2 mtu 1400");
        let mut following = Following::by(&["eth0"], &["10.0.0.2", "10.8.0.1"]).await;
        assert_eq!(following.resolved("10.0.0.2").mtu, 1500);
        assert_eq!(following.resolved("10.8.0.1").mtu, 1400);
        lab.ip("left", "link set eth0 mtu 1600");
        lab.ip("node", "link set eth0 mtu 1600");
        following.becomes("10.0.0.2", has_mtu(1600)).await;
        assert_eq!(following.resolved("10.8.0.1").mtu, 1400);
        lab.ip("node", "link set eth0 mtu 1300");
        following.becomes("10.8.0.1", has_mtu(1300)).await;
    });
}

#[test]
fn what_is_no_longer_wanted_leaves_the_table() {
    in_lab(async |_| {
        let following = Following::by(&["eth0", "eth1"], &["10.0.0.2"]).await;
        following.next_hops.want(&[ip("10.1.0.2")].into());
        assert!(following.next_hops.settled(PATIENCE).await);
        let hops = following.hops.borrow();
        assert_eq!(hops.keys().collect::<Vec<_>>(), [&ip("10.1.0.2")]);
    });
}

#[test]
fn following_ends_with_its_handle() {
    in_lab(async |_| {
        let Following { next_hops, mut hops } = Following::by(&["eth0"], &["10.0.0.2"]).await;
        drop(next_hops);
        assert!(hops.changed().await.is_err(), "the task is gone");
    });
}

#[test]
fn an_operators_own_neighbour_entries_are_left_as_they_are() {
    in_lab(async |lab| {
        lab.ip("node", "neigh add 10.0.0.2 dev eth0 lladdr 02:00:00:00:00:77 nud permanent");
        lab.ip("node", "neigh add 10.1.0.2 dev eth1 managed");
        let following = Following::by(&["eth0", "eth1"], &["10.0.0.2", "10.1.0.2"]).await;
        assert_eq!(following.resolved("10.0.0.2").dst_mac.to_string(), "02:00:00:00:00:77");
        // Long enough for every neighbour to be looked over.
        time::sleep(Duration::from_millis(2500)).await;
        let entries = lab.ip("node", "neigh show");
        assert!(entries.contains("lladdr 02:00:00:00:00:77 PERMANENT"), "{entries}");
        assert!(entries.contains("managed"), "{entries}");
    });
}

#[test]
fn what_we_make_the_kernel_learn_is_an_ordinary_entry() {
    in_lab(async |lab| {
        let _following = Following::by(&["eth0"], &["10.0.0.2"]).await;
        let entries = lab.ip("node", "neigh show 10.0.0.2");
        assert!(!entries.contains("managed") && !entries.contains("PERMANENT"), "{entries}");
    });
}

#[test]
fn a_change_whose_notification_was_lost_is_found_all_the_same() {
    in_lab(async |lab| {
        lab.left_announces();
        let mut following = Following::by(&["eth0"], &["10.0.0.2"]).await;
        // This blocks the runtime, so nobody empties the socket: the flood overflows it.
        let mut batch = Command::new("ip")
            .args(["-n", &format!("{}-node", lab.prefix), "-batch", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = batch.stdin.take().unwrap();
        for route in 0..5000 {
            let (high, low) = (route / 250, route % 250);
            writeln!(input, "route add 172.16.{high}.{low}/32 via 10.0.0.2").unwrap();
        }
        drop(input);
        assert!(batch.wait().unwrap().success());
        lab.ip("left", "link set eth0 address 02:00:00:00:00:22");
        assert!(notifications_lost() > 0, "the flood was too small to lose anything");
        let (took, _) = following.becomes("10.0.0.2", goes_to("02:00:00:00:00:22")).await;
        assert!(took < Duration::from_secs(1), "took {took:?}");
    });
}

#[test]
fn thousands_of_nodes_are_pinged_and_all_are_missed_and_found_again_in_time() {
    in_lab(async |lab| {
        const COUNT: u32 = 4000;
        // One peer has all their addresses, behind a gateway that is there in any case.
        let theirs = "route add local 10.16.0.0/20 dev lo";
        lab.ip("left", theirs);
        lab.ip("node", "route add 10.16.0.0/20 via 10.0.0.2");
        let vteps: Vec<_> = (0..COUNT).map(|n| format!("10.16.{}.{}", n / 256, n % 256)).collect();
        let vteps: Vec<&str> = vteps.iter().map(String::as_str).collect();
        let following = Following::by(&["eth0"], &vteps).await;
        let settings = config::Liveness::default();
        let liveness =
            Liveness::start(settings, &[ip("10.0.0.1")], following.hops.clone()).unwrap();
        let mut standings = liveness.subscribe();
        all_become(&mut standings, vteps.len(), "alive").await;
        let quiet = time::timeout(Duration::from_secs(3), standings.changed()).await;
        assert!(quiet.is_err(), "nobody is missed who is there");
        lab.ip("left", "route del local 10.16.0.0/20 dev lo");
        let silent = all_become(&mut standings, vteps.len(), "silent").await;
        lab.ip("left", theirs);
        let alive = all_become(&mut standings, vteps.len(), "alive").await;
        assert!(silent < Duration::from_secs(1) && alive < Duration::from_secs(1));
        following.next_hops.want(&BTreeSet::new());
        all_become(&mut standings, 0, "alive").await;
    });
}

#[test]
fn a_links_facts_are_those_of_this_namespace() {
    in_lab(async |lab| {
        lab.ip("node", "addr add 10.0.0.7/24 dev eth0");
        let far = format!("peer name far netns {}-right", lab.prefix);
        let queues = "numrxqueues 4 numtxqueues 4";
        lab.ip("node", &format!("link add many mtu 1700 {queues} type veth {far}"));
        let links = link::links(&["eth0", "many"]).await.unwrap();
        let [eth0, many] = &links[..] else { panic!("two links: {links:?}") };
        assert_eq!((eth0.device.name.as_str(), eth0.device.mtu), ("eth0", 1500));
        assert_eq!(eth0.device.mac.to_string(), "02:00:00:00:00:01");
        assert_eq!(eth0.driver.as_deref(), Some("veth"));
        assert!(eth0.device.up && eth0.partial_checksums());
        assert_eq!(eth0.addresses[..3], [ip("10.0.0.1"), ip("10.0.0.7"), ip("fd00::1")]);
        assert_eq!(eth0.rx_queues, 1, "in use, however many are allocated");
        assert_eq!((many.rx_queues, many.device.mtu, many.device.up), (4, 1700, false));
    });
}

#[test]
fn a_missing_interface_is_answered_with_those_that_exist() {
    in_lab(async |_| {
        let error = link::links(&["eht0"]).await.unwrap_err();
        assert!(matches!(error, LinkError::Missing { .. }));
        let sentence = error.to_string();
        assert!(sentence.contains("no interface eht0") && sentence.contains("eth0"), "{sentence}");
        let error = link::links(&["lo"]).await.unwrap_err();
        assert!(matches!(error, LinkError::NotEthernet(_)));
    });
}

#[test]
fn the_default_route_with_the_smallest_metric_names_the_interface() {
    in_lab(async |lab| {
        let error = link::default_route_interface().await.unwrap_err();
        assert!(matches!(error, LinkError::NoDefaultRoute));
        lab.ip("node", "route add default via fd00::2");
        assert_eq!(link::default_route_interface().await.unwrap(), "eth0");
        lab.ip("node", "route add default via 10.0.0.2 metric 200");
        lab.ip("node", "route add default via 10.1.0.2 metric 100");
        assert_eq!(link::default_route_interface().await.unwrap(), "eth1");
    });
}
