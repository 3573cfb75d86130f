//! What a plan is made of, and what stays the same from one to the next.

use dataplane::{encap, parse, port::Pool, port::sim};
use etherparse::{NetHeaders, PacketBuilder, PacketHeaders, TransportHeader::Udp, VlanHeader};

use proptest::prelude::*;
use std::{sync::LazyLock, time::Duration};

use super::*;
use crate::{config::Config, link::VlanTag, next_hop::Resolved};

const REST_MS: u64 = 60_000;

const TWO: &str = r#"
    [[service]]
    name = "web"
    vip = "203.0.113.10"
    ports = ["80/tcp", "443/udp"]
    vni = 100
    backend = [
        { name = "web-1", vtep = "10.0.0.2", mac = "02:42:0a:00:00:02" },
        { name = "web-2", vtep = "10.0.0.3", mac = "02:42:0a:00:00:03" },
    ]
"#;

fn config(text: &str) -> Config {
    Config::parse("test", text).unwrap().0
}

/// A service of these backends.
fn service(name: &str, backends: &[&str]) -> String {
    let line = |backend: &&str| {
        format!("{{ name = \"{backend}\", vtep = \"10.0.0.2\", mac = \"02:42:0a:00:00:02\" }}")
    };
    let backends: Vec<_> = backends.iter().map(line).collect();
    let last = name.len();
    format!(
        "[[service]]\nname = \"{name}\"\nvip = \"203.0.113.{last}\"\nports = [\"80/tcp\"]\n\
         vni = 100\nbackend = [{}]\n",
        backends.join(",")
    )
}

fn planner(slots: usize) -> Planner {
    Planner::new(Settings {
        maglev_size: Size::new(251).unwrap(),
        maglev_key: HashKey::from_seed("test"),
        slots,
        rest_ms: REST_MS,
    })
}

impl Plan {
    /// In order of services and backends.
    fn backends(&self) -> Vec<&Placement> {
        self.placements.iter().flat_map(|own| &**own).collect()
    }
}

/// What a plan is made from, owned.
struct World {
    config: Config,
    hops: HashMap<IpAddr, HopState>,
    interfaces: Vec<Interface>,
    health: Verdicts,
    offline: bool,
    time: SystemTime,
    addresses: Vec<IpAddr>,
    nat: Option<&'static nat::Slots>,
}

impl World {
    /// Two interfaces, and a way to each of the VTEPs by the first.
    fn new(text: &str, vteps: &[&str]) -> Self {
        let interface = |number: u8, addresses: &[&str]| Interface {
            name: format!("eth{number}"),
            index: Some(LinkIndex(10 + u32::from(number))),
            mac: MacAddr([2, 0, 0, 0, 1, number]),
            mtu: 1500,
            partial_checksums: number == 0,
            addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
            home: None,
        };
        let interfaces =
            vec![interface(0, &["10.0.0.1", "fd00::1", "fe80::1"]), interface(1, &["10.1.0.1"])];
        let hops = vteps.iter().map(|vtep| (vtep.parse().unwrap(), resolved(vtep))).collect();
        Self {
            config: config(text),
            hops,
            addresses: interfaces.iter().flat_map(|i| i.addresses.clone()).collect(),
            nat: None,
            interfaces,
            health: Verdicts::default(),
            offline: false,
            time: SystemTime::UNIX_EPOCH,
        }
    }

    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            desired: &self.config.desired,
            hops: &self.hops,
            health: &self.health,
            next_hops: &self.config.next_hops,
            interfaces: &self.interfaces,
            addresses: &self.addresses,
            nat: self.nat,
            vtep: self.config.node.vtep,
            vtep6: self.config.node.vtep6,
            answer_arp: self.config.node.answer_arp,
            announce: self.config.node.announce_table.is_some(),
            offline: self.offline,
            time: self.time,
        }
    }

    fn plan(&self) -> Plan {
        self.plan_in(16)
    }

    /// From scratch.
    fn plan_in(&self, slots: usize) -> Plan {
        planner(slots).plan(&self.inputs(), Tick(0)).unwrap()
    }

    fn set(&mut self, vtep: &str, change: impl FnOnce(&mut Resolved)) {
        let hop = self.hops.get_mut(&vtep.parse::<IpAddr>().unwrap()).unwrap();
        let HopState::Resolved(resolved) = hop else { panic!("not resolved") };
        change(resolved);
    }

    fn lose(&mut self, vtep: &str) {
        let reason = format!("{vtep} does not answer");
        self.hops.insert(vtep.parse().unwrap(), HopState::Unresolved { reason });
    }
}

fn resolved(vtep: &str) -> HopState {
    let v6 = vtep.contains(':');
    HopState::Resolved(Resolved {
        link: LinkIndex(10),
        tags: Vec::new(),
        src_mac: MacAddr([2, 0, 0, 0, 1, 0]),
        dst_mac: MacAddr([2, 0, 0, 0, 2, 0]),
        mtu: 1500,
        src_ip: if v6 { "fd00::1" } else { "10.0.0.1" }.parse().unwrap(),
    })
}

/// The slots, in order of services and backends.
fn slots(planner: &mut Planner, text: &str, now: u64) -> Result<Vec<Slot>, PlanError> {
    let world = World::new(text, &["10.0.0.2", "10.0.0.3"]);
    let plan = planner.plan(&world.inputs(), Tick(now))?;
    Ok(plan.backends().iter().map(|placement| placement.slot).collect())
}

/// Whom the plan's first service gives new connections to.
fn takers(plan: &Plan) -> HashSet<Slot> {
    let maglev = &plan.forwarding.service(0).unwrap().maglev;
    (0..10_000_u64).filter_map(|i| maglev.pick(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect()
}

fn backend(plan: &Plan, at: usize) -> &forwarding::Backend {
    plan.forwarding.backend(plan.backends()[at].slot).unwrap()
}

/// A packet as a backend's tunnel puts it on the wire.
fn encapsulated(plan: &Plan, at: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ethernet2([6; 6], [4; 6])
        .ipv4([198, 51, 100, 7], [203, 0, 113, 10], 64)
        .tcp(40000, 80, 1, 1024)
        .write(&mut packet, b"hello")
        .unwrap();
    let mut pool: Pool = sim::pool(1, 4096);
    let mut frame = pool.take().unwrap();
    frame.set_len(packet.len());
    frame.packet_mut().copy_from_slice(&packet);
    let flow = parse::flow(&packet).unwrap();
    encap::vxlan(&mut frame, &flow, &backend(plan, at).template, 7).unwrap();
    frame.packet().to_vec()
}

/// Source and destination of the outer IP header.
fn ends(plan: &Plan, at: usize) -> (IpAddr, IpAddr) {
    let packet = encapsulated(plan, at);
    match PacketHeaders::from_ethernet_slice(&packet).unwrap().net.unwrap() {
        NetHeaders::Ipv4(ip, _) => (ip.source.into(), ip.destination.into()),
        NetHeaders::Ipv6(ip, _) => (ip.source.into(), ip.destination.into()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_backend_on_this_very_node_is_reached_by_the_way_home() {
    let mut world = World::new(TWO, &["10.0.0.2", "10.0.0.3"]);
    let own = world.interfaces[0].addresses[0];
    Arc::make_mut(&mut world.config.desired.services[0]).backends[1].vtep = own;
    world.hops.remove(&"10.0.0.3".parse().unwrap());
    assert!(world.plan().backends()[1].unreachable.is_some(), "nobody sends to himself");

    let (ours, nodes) = (MacAddr([2, 0, 0, 0, 9, 2]), MacAddr([2, 0, 0, 0, 9, 1]));
    let mut far = world.interfaces[1].clone();
    (far.index, far.mac, far.home) = (None, ours, Some(nodes));
    far.addresses = vec!["169.254.77.2".parse().unwrap()];
    world.interfaces.push(far);
    // Not even a configured source would do.
    world.config.node.vtep = Some(own);
    let plan = world.plan();
    assert_eq!(plan.backends()[1].unreachable, None);
    assert_eq!(backend(&plan, 1).link, 2);
    assert_eq!(ends(&plan, 1), ("169.254.77.2".parse().unwrap(), own));
    let packet = encapsulated(&plan, 1);
    assert_eq!((&packet[..6], &packet[6..12]), (&nodes.0[..], &ours.0[..]));
    assert_eq!(backend(&plan, 0).link, 0, "others stay where they are");
    assert_eq!(ends(&plan, 0), (own, "10.0.0.2".parse().unwrap()));

    let own: IpAddr = "fd00::1".parse().unwrap();
    Arc::make_mut(&mut world.config.desired.services[0]).backends[1].vtep = own;
    let reason = world.plan().backends()[1].unreachable.clone().unwrap();
    assert!(reason.contains("IPv4 vtep"), "{reason}");
}

#[test]
fn a_backend_keeps_its_slot_while_others_come_and_go() {
    let mut planner = planner(16);
    assert_eq!(slots(&mut planner, &service("a", &["1", "2", "3"]), 0).unwrap(), [0, 1, 2]);
    assert_eq!(slots(&mut planner, &service("a", &["3", "4", "1"]), 1).unwrap(), [2, 3, 0]);
    let two = service("b", &["1"]) + &service("aa", &["3"]);
    assert!(slots(&mut planner, &two, 2).unwrap().iter().all(|slot| *slot > 3));
}

#[test]
fn a_removed_backends_slot_rests_before_another_gets_it() {
    let mut planner = planner(2);
    assert_eq!(slots(&mut planner, &service("a", &["1", "2"]), 0).unwrap(), [0, 1]);
    assert_eq!(slots(&mut planner, &service("a", &["1"]), 1000).unwrap(), [0]);
    let three = service("a", &["1", "3"]);
    slots(&mut planner, &three, 1000 + REST_MS - 1).unwrap_err();
    assert_eq!(slots(&mut planner, &three, 1000 + REST_MS).unwrap(), [0, 1]);
}

#[test]
fn a_backend_that_returns_gets_its_own_slot_back() {
    let mut planner = planner(16);
    slots(&mut planner, &service("a", &["1", "2"]), 0).unwrap();
    slots(&mut planner, &service("a", &["2"]), 1).unwrap();
    assert_eq!(slots(&mut planner, &service("a", &["3", "2", "1"]), 2).unwrap(), [2, 1, 0]);
}

#[test]
fn without_a_free_slot_the_error_says_what_to_raise_and_nothing_changes() {
    let mut planner = planner(2);
    slots(&mut planner, &service("a", &["1", "2"]), 0).unwrap();
    slots(&mut planner, &service("a", &["1"]), 1).unwrap();
    let error = slots(&mut planner, &service("a", &["1", "3"]), 2).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no slot for backend a/3: 1 in use and 1 resting until connections of removed backends \
         have expired; restart with limits.backends (2) raised"
    );
    assert_eq!(slots(&mut planner, &service("a", &["1", "2"]), 3).unwrap(), [0, 1]);
}

#[test]
fn an_unchanged_maglev_table_is_shared_between_plans() {
    let mut world = World::new(TWO, &["10.0.0.2", "10.0.0.3"]);
    let mut planner = planner(16);
    let mut table = |world: &World| {
        let plan = planner.plan(&world.inputs(), Tick(0)).unwrap();
        plan.forwarding.service(0).unwrap().maglev.clone()
    };
    let first = table(&world);
    world.set("10.0.0.2", |hop| hop.dst_mac = MacAddr([2, 9, 9, 9, 9, 9]));
    assert!(Arc::ptr_eq(&first, &table(&world)));
    Arc::make_mut(&mut world.config.desired.services[0]).backends[0].weight = 2;
    let second = table(&world);
    assert!(!Arc::ptr_eq(&first, &second));
    world.lose("10.0.0.3");
    assert!(!Arc::ptr_eq(&second, &table(&world)));
}

#[test]
fn a_schedule_is_among_those_that_take_new_connections_and_unchanged_it_is_shared() {
    let mut world = World::new(TWO, &["10.0.0.2", "10.0.0.3"]);
    let mut planner = planner(16);
    let mut schedule = |world: &World| {
        let plan = planner.plan(&world.inputs(), Tick(0)).unwrap();
        plan.forwarding.service(0).unwrap().schedule.clone()
    };
    let order = |schedule: &Schedule| match schedule {
        Schedule::RoundRobin(cycle) => (Arc::as_ptr(cycle), cycle.order().to_vec()),
        other => panic!("{other:?}"),
    };
    assert!(schedule(&world).is_plain());
    Arc::make_mut(&mut world.config.desired.services[0]).scheduler = Scheduler::RoundRobin;
    let first = schedule(&world);
    assert_eq!(order(&first).1, [0, 1]);
    world.set("10.0.0.2", |hop| hop.dst_mac = MacAddr([2, 9, 9, 9, 9, 9]));
    assert_eq!(order(&schedule(&world)), order(&first));
    Arc::make_mut(&mut world.config.desired.services[0]).backends[0].weight = 2;
    assert_eq!(order(&schedule(&world)).1, [0, 1, 0]);
    world.lose("10.0.0.3");
    assert_eq!(order(&schedule(&world)).1, [0]);
    let source = Scheduler::Source { timeout_s: 60 };
    Arc::make_mut(&mut world.config.desired.services[0]).scheduler = source;
    assert_eq!(schedule(&world).affinity_timeout_s(), Some(60));
}

#[test]
fn an_unreachable_backend_takes_no_new_connections_while_another_can() {
    let mut world = World::new(TWO, &["10.0.0.2", "10.0.0.3"]);
    assert_eq!(takers(&world.plan()), [0, 1].into());
    world.lose("10.0.0.3");
    let plan = world.plan();
    assert_eq!(takers(&plan), [0].into());
    assert_eq!(plan.backends()[1].unreachable.as_deref(), Some("10.0.0.3 does not answer"));
    assert!(!backend(&plan, 1).reachable && backend(&plan, 0).reachable);
    world.hops.clear();
    let plan = world.plan();
    assert_eq!(takers(&plan), [0, 1].into(), "with none reachable, all are kept");
    assert_eq!(plan.backends()[0].unreachable.as_deref(), Some("10.0.0.2 is still being resolved"));
}

#[test]
fn a_reachable_backend_that_drains_is_no_reason_to_leave_out_the_others() {
    let mut world = World::new(TWO, &["10.0.0.2", "10.0.0.3"]);
    Arc::make_mut(&mut world.config.desired.services[0]).backends[0].weight = 0;
    world.lose("10.0.0.3");
    assert_eq!(takers(&world.plan()), [1].into());
}

#[test]
fn a_vip_is_announced_while_a_backend_of_any_of_its_services_serves() {
    let two =
        TWO.replace("\"web\"", "\"dns\"").replace("[\"80/tcp\", \"443/udp\"]", "[\"53/udp\"]");
    let text = |health| format!("[node]\nannounce_table = 100\n{TWO}{health}{two}");
    let vip = || BTreeSet::from([IpAddr::from([203, 0, 113, 10])]);
    for all_down in ["keep-last", "stop"] {
        let health = format!("{HEALTH}all_down = \"{all_down}\"\n");
        let mut world = World::new(&text(health), &["10.0.0.2", "10.0.0.3"]);
        let mut planner = planner(16);
        let mut announced =
            |world: &World| planner.plan(&world.inputs(), Tick(0)).unwrap().announced;
        assert_eq!(announced(&world), vip());
        // The other service of this address has none.
        for backend in &mut Arc::make_mut(&mut world.config.desired.services[1]).backends {
            backend.weight = 0;
        }
        judge(&mut world, "web-1", down());
        assert_eq!(announced(&world), vip());
        judge(&mut world, "web-2", down());
        assert_eq!(announced(&world), BTreeSet::new(), "all are down");
        judge(&mut world, "web-1", Verdict::Up);
        assert_eq!(announced(&world), vip());
        world.lose("10.0.0.2");
        assert_eq!(announced(&world), BTreeSet::new(), "the one that is up can't be reached");
        Arc::make_mut(&mut world.config.desired.services[1]).backends[1].weight = 1;
        assert_eq!(announced(&world), vip());
        world.config.node.announce_table = None;
        assert_eq!(announced(&world), BTreeSet::new(), "nothing is to be announced");
    }
}

#[test]
fn arp_is_answered_for_what_is_announced_and_for_all_if_nothing_is_to_be() {
    let vip = steer::Key::Address(Address::v4([203, 0, 113, 10]));
    for (announce_table, expected) in [(Some(100), false), (None, true)] {
        let mut world = World::new(TWO, &["10.0.0.2", "10.0.0.3"]);
        world.config.node.answer_arp = true;
        world.config.node.announce_table = announce_table;
        let mut planner = planner(16);
        let mut answers =
            |world: &World| planner.plan(&world.inputs(), Tick(0)).unwrap().steer[&vip] != 0;
        assert!(answers(&world));
        world.lose("10.0.0.2");
        assert!(answers(&world), "another serves");
        world.lose("10.0.0.3");
        assert_eq!(answers(&world), expected);
    }
}

#[test]
fn what_is_steered_are_the_vips_and_their_addresses() {
    let mut world = World::new(TWO, &[]);
    let address = Address::v4([203, 0, 113, 10]);
    let port = |protocol, port| (steer::Key::Port { address, protocol, port }, 0);
    let keys =
        |arp| BTreeMap::from([(steer::Key::Address(address), arp), port(6, 80), port(17, 443)]);
    assert_eq!(*world.plan().steer, keys(0));
    world.config.node.answer_arp = true;
    assert_eq!(*world.plan().steer, keys(steer::ANSWER_ARP));
    assert!(world.plan().forwarding.answer_arp());
}

#[test]
fn what_fits_is_the_mtu_of_the_way_less_the_tunnel_and_the_backends_own() {
    for (vtep, path, own, fits) in [
        ("10.0.0.2", 1500, None, 1450),
        ("fd00::2", 1500, None, 1430),
        ("10.0.0.2", 9000, None, 8950),
        ("10.0.0.2", 1500, Some(1400), 1400),
        ("10.0.0.2", 1500, Some(9000), 1450),
        ("10.0.0.2", 40, None, 0),
        ("10.0.0.2", 1_000_000, None, u16::MAX),
    ] {
        let mut world = World::new(&TWO.replace("10.0.0.2", vtep), &[vtep]);
        world.set(vtep, |hop| hop.mtu = path);
        Arc::make_mut(&mut world.config.desired.services[0]).backends[0].mtu = own;
        assert_eq!(backend(&world.plan(), 0).mtu, fits, "{vtep} {path} {own:?}");
    }
}

#[test]
fn the_tunnel_starts_where_configured_else_where_the_kernel_says() {
    let text = TWO.replace("10.0.0.3", "fd00::3");
    let vteps = ["10.0.0.2", "fd00::3"];
    let mut world = World::new(&text, &vteps);
    world.set("10.0.0.2", |hop| hop.src_ip = [10, 0, 0, 77].into());
    let source = |world: &World, at| ends(&world.plan(), at).0.to_string();
    assert_eq!((source(&world, 0), source(&world, 1)), ("10.0.0.77".into(), "fd00::1".into()));
    world.config.node.vtep = Some([10, 0, 0, 88].into());
    assert_eq!((source(&world, 0), source(&world, 1)), ("10.0.0.88".into(), "fd00::1".into()));
    world.config.node.vtep6 = Some("fd00::88".parse().unwrap());
    assert_eq!((source(&world, 0), source(&world, 1)), ("10.0.0.88".into(), "fd00::88".into()));
}

#[test]
fn a_next_hop_of_the_configuration_overrules_the_kernels() {
    let said = "[[next_hop]]\nvtep = \"10.0.0.2\"\nmac = \"02:00:00:00:00:99\"\nmtu = 1400\n";
    let mut world = World::new(&format!("{TWO}{said}"), &["10.0.0.2"]);
    world.set("10.0.0.2", |hop| hop.src_ip = [10, 0, 0, 77].into());
    let plan = world.plan();
    assert_eq!(encapsulated(&plan, 0)[..12], [2, 0, 0, 0, 0, 0x99, 2, 0, 0, 0, 1, 0]);
    assert_eq!((backend(&plan, 0).mtu, backend(&plan, 0).link), (1350, 0));
    assert_eq!(ends(&plan, 0).0, IpAddr::from([10, 0, 0, 77]), "the kernel's choice stays");

    world.config.next_hops[0].interface = Some("eth1".to_owned());
    let plan = world.plan();
    assert_eq!(encapsulated(&plan, 0)[6..12], [2, 0, 0, 0, 1, 1]);
    assert_eq!(backend(&plan, 0).link, 1);
    assert_eq!(ends(&plan, 0).0, IpAddr::from([10, 1, 0, 1]), "the interface's own");

    world.config.next_hops[0].interface = Some("eth9".to_owned());
    assert_eq!(
        world.plan().backends()[0].unreachable.as_deref(),
        Some("next_hop of 10.0.0.2: eth9 is not one of node.interfaces")
    );
}

#[test]
fn without_an_address_to_send_from_a_backend_is_unreachable() {
    let said =
        "[[next_hop]]\nvtep = \"fd00::2\"\nmac = \"02:00:00:00:00:99\"\ninterface = \"eth1\"\n";
    let text = format!("{}{said}", TWO.replace("10.0.0.2", "fd00::2"));
    let mut world = World::new(&text, &["10.0.0.3"]);
    let reason = "eth1 has no IPv6 address to send tunnels from: give it one, or set node.vtep6";
    assert_eq!(world.plan().backends()[0].unreachable.as_deref(), Some(reason));
    assert_eq!(takers(&world.plan()), [1].into());
    world.config.node.vtep6 = Some("fd00::1".parse().unwrap());
    assert_eq!(world.plan().backends()[0].unreachable, None);
}

#[test]
fn a_packet_leaves_by_the_interface_that_the_kernel_routes_by() {
    let mut world = World::new(TWO, &["10.0.0.2", "10.0.0.3"]);
    world.set("10.0.0.2", |hop| {
        (hop.link, hop.tags) = (LinkIndex(11), vec![VlanTag { id: 7, protocol: 0x8100 }]);
    });
    world.set("10.0.0.3", |hop| hop.link = LinkIndex(99));
    let plan = world.plan();
    assert_eq!(backend(&plan, 0).link, 1);
    let packet = encapsulated(&plan, 0);
    let headers = PacketHeaders::from_ethernet_slice(&packet).unwrap();
    let Some(VlanHeader::Single(tag)) = headers.vlan() else { panic!("{headers:?}") };
    assert_eq!(tag.vlan_id.value(), 7);
    assert!(matches!(headers.transport, Some(Udp(udp)) if udp.destination_port == 4789));
    assert_eq!(
        plan.backends()[1].unreachable.as_deref(),
        Some("10.0.0.3 is routed by an interface that is not ours")
    );
}

#[test]
fn offline_a_backend_without_a_way_is_sent_to_zero_mac_addresses() {
    let mut world = World::new(TWO, &[]);
    world.offline = true;
    let plan = world.plan();
    assert!(plan.backends().iter().all(|placement| placement.unreachable.is_none()));
    assert_eq!(encapsulated(&plan, 0)[..12], [0; 12]);
    assert_eq!(backend(&plan, 0).mtu, 1450);
}

/// A plan in names: what slots there are depends on what was before.
fn meant(plan: &Plan, world: &World) -> Vec<String> {
    let Plan { forwarding, steer, announced, .. } = plan;
    let mut all = vec![format!("{steer:?} {announced:?} {:?}", forwarding.link(0))];
    let desired = &world.config.desired;
    let names: HashMap<Slot, &str> = desired
        .backends()
        .zip(plan.backends())
        .map(|((_, backend), placement)| (placement.slot, &*backend.name))
        .collect();
    for ((service, backend), placement) in desired.backends().zip(plan.backends()) {
        let rendered = plan.forwarding.backend(placement.slot);
        let (service, name) = (&service.name, &backend.name);
        let Placement { unreachable, health, .. } = placement;
        all.push(format!("{service}/{name}: {unreachable:?} {health:?} {rendered:?}"));
    }
    for service in &desired.services {
        let at = |vip: Vip| plan.forwarding.service_at(vip.address, vip.protocol, vip.port);
        let index = at(vips(&world.inputs(), &HashSet::new(), service)[0].0).unwrap();
        let maglev = &plan.forwarding.service(index).unwrap().maglev;
        let pick = |i: u64| maglev.pick(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let picks = (0..300).map(|i| pick(i).map(|slot| names[&slot]));
        all.push(format!("{}: {index} {:?}", service.name, picks.collect::<Vec<_>>()));
    }
    let slots: HashSet<Slot> = plan.backends().iter().map(|placement| placement.slot).collect();
    assert_eq!(slots.len(), plan.backends().len(), "one backend for each slot");
    let unused = (0..64).filter(|slot| !slots.contains(slot));
    assert!(unused.into_iter().all(|slot| plan.forwarding.backend(slot).is_none()));
    all
}

/// One of the things that happen.
#[derive(Clone, Debug)]
enum Happening {
    /// A service is wanted with these backends: their weights, if at all.
    Want(u8, [Option<u16>; 4]),
    /// A service is not.
    Remove(u8),
    /// The same in other memory, as a file is read again.
    Reread,
    Lose(u8),
    Find(u8, u8),
    /// Of a service, by the name of a backend.
    Judge(u8, u8, Verdict),
    Say(Option<u8>),
    AnswerArp(bool),
    Mtu(u16),
    Wait(u16),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => (0..5_u8, any::<[Option<u16>; 4]>()).prop_map(|(service, weights)| {
            Happening::Want(service, weights.map(|weight| weight.map(|weight| weight % 3)))
        }),
        2 => (0..5_u8).prop_map(Happening::Remove),
        1 => Just(Happening::Reread),
        1 => (2..6_u8).prop_map(Happening::Lose),
        2 => (2..6_u8, 0..3_u8).prop_map(|(vtep, mac)| Happening::Find(vtep, mac)),
        4 => (0..5_u8, 0..4_u8, prop_oneof![Just(Verdict::Unknown), Just(Verdict::Up), Just(down())])
            .prop_map(|(service, backend, verdict)| Happening::Judge(service, backend, verdict)),
        1 => proptest::option::of(0..3_u8).prop_map(Happening::Say),
        1 => any::<bool>().prop_map(Happening::AnswerArp),
        1 => (1400..1600_u16).prop_map(Happening::Mtu),
        2 => (0..40_000_u16).prop_map(Happening::Wait),
    ]
}

impl World {
    fn happen(&mut self, happening: &Happening, now: &mut u64) {
        let name = |number: &u8| "s".repeat(usize::from(*number) + 1);
        let services = &mut self.config.desired.services;
        match happening {
            Happening::Want(number, weights) => {
                let named = weights.iter().enumerate().filter(|(_, weight)| weight.is_some());
                let names: Vec<String> = named.map(|(at, _)| at.to_string()).collect();
                let names: Vec<_> = names.iter().map(|name| &**name).collect();
                let mut text = service(&name(number), &names);
                text += ["", HEALTH, &format!("{HEALTH}all_down = \"stop\"\n")]
                    [usize::from(number % 3)];
                let mut new = config(&text).desired.services.remove(0);
                let new_weights = weights.iter().flatten();
                for (backend, weight) in
                    Arc::make_mut(&mut new).backends.iter_mut().zip(new_weights)
                {
                    backend.weight = *weight;
                    let last = 2 + (backend.name.as_bytes()[0] + number) % 4;
                    backend.vtep = IpAddr::from([10, 0, 0, last]);
                }
                services.retain(|service| service.name != new.name);
                services.push(new);
                services.sort_by(|a, b| a.name.cmp(&b.name));
            }
            Happening::Remove(number) => services.retain(|service| service.name != name(number)),
            Happening::Reread => {
                services.iter_mut().for_each(|service| *service = Arc::new((**service).clone()));
            }
            Happening::Lose(last) => self.lose(&format!("10.0.0.{last}")),
            Happening::Find(last, mac) => {
                let vtep = format!("10.0.0.{last}");
                self.hops.insert(vtep.parse().unwrap(), resolved(&vtep));
                self.set(&vtep, |hop| hop.dst_mac = MacAddr([2, 0, 0, 0, 2, *mac]));
            }
            Happening::Judge(service, backend, verdict) => {
                let (service, backend) = (name(service), backend.to_string());
                self.health.set(&(*service).into(), &(*backend).into(), verdict.clone());
            }
            Happening::Say(mac) => {
                let said = |mac: u8| NextHop {
                    vtep: [10, 0, 0, 2].into(),
                    mac: MacAddr([2, 0, 0, 0, 3, mac]),
                    interface: None,
                    mtu: None,
                };
                self.config.next_hops = mac.map(said).into_iter().collect();
            }
            Happening::AnswerArp(answer) => self.config.node.answer_arp = *answer,
            Happening::Mtu(mtu) => self.interfaces[0].mtu = u32::from(*mtu),
            Happening::Wait(ms) => *now += u64::from(*ms),
        }
    }
}

proptest! {
    #[test]
    fn a_plan_after_many_changes_is_the_one_made_from_scratch(
        happenings in proptest::collection::vec(happening(), 1..60),
        limit in 6..24_usize,
    ) {
        let mut world = World::new("[node]\nannounce_table = 100\n", &[]);
        let (mut planner, mut now, mut last) = (planner(limit), 0, None);
        for happening in &happenings {
            let desired = world.config.desired.clone();
            world.happen(happening, &mut now);
            match planner.plan(&world.inputs(), Tick(now)) {
                Ok(plan) => {
                    let scratch = world.plan_in(64);
                    prop_assert_eq!(meant(&plan, &world), meant(&scratch, &world));
                    last = Some(plan.backends().iter().map(|placement| placement.slot).collect());
                }
                // What was before can be had again, in the same slots.
                Err(PlanError::NoSlot { used, resting, limit, .. }) => {
                    prop_assert_eq!(used + resting, limit);
                    world.config.desired = desired;
                    let plan = planner.plan(&world.inputs(), Tick(now)).unwrap();
                    let slots: Vec<Slot> = plan.backends().iter().map(|at| at.slot).collect();
                    prop_assert_eq!(Some(slots), last.clone());
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn a_service_that_is_as_it_was_is_not_made_again() {
    let mut world = World::new(&(service("a", &["1"]) + &service("bb", &["1"])), &["10.0.0.2"]);
    let mut planner = planner(16);
    let mut plan = |world: &World| {
        let steer = planner.plan(&world.inputs(), Tick(0)).unwrap().steer;
        (["a", "bb"].map(|name| planner.planned[name].clone()), steer)
    };
    let (before, steer) = plan(&world);
    Arc::make_mut(&mut world.config.desired.services[0]).backends[0].weight = 2;
    let (after, steer_after) = plan(&world);
    assert!(!Arc::ptr_eq(&before[0], &after[0]) && Arc::ptr_eq(&before[1], &after[1]));
    assert!(Arc::ptr_eq(&steer, &steer_after));
    world.lose("10.0.0.2");
    let (lost, _) = plan(&world);
    assert!(!Arc::ptr_eq(&after[1], &lost[1]), "its way has changed");
}

#[test]
fn a_drain_ends_at_its_deadline_and_gives_the_slot_to_nobody() {
    let mut world = World::new(TWO, &["10.0.0.2", "10.0.0.3"]);
    let deadline = world.time + Duration::from_secs(600);
    let drained = &mut Arc::make_mut(&mut world.config.desired.services[0]).backends[1];
    (drained.weight, drained.drain) = (0, Some(Drain::Until(deadline)));
    let mut planner = planner(2);
    let plan = planner.plan(&world.inputs(), Tick(0)).unwrap();
    assert_eq!((takers(&plan), plan.drained_at), ([0].into(), Some(deadline)));
    assert!(plan.forwarding.backend(1).is_some(), "its connections stay");
    world.time = deadline;
    let plan = planner.plan(&world.inputs(), Tick(0)).unwrap();
    assert!(plan.forwarding.backend(1).is_none() && plan.backends()[1].drained);
    assert_eq!((plan.backends()[1].slot, plan.drained_at), (1, None));
    // It is wanted again.
    let back = &mut Arc::make_mut(&mut world.config.desired.services[0]).backends[1];
    (back.weight, back.drain) = (1, None);
    let plan = planner.plan(&world.inputs(), Tick(0)).unwrap();
    assert_eq!((takers(&plan), plan.backends()[1].slot), ([0, 1].into(), 1));
}

const HEALTH: &str = "[service.health]\ncheck = \"tunnel\"\n";

/// `TWO`, checked, with these keys of its checks.
fn checked(keys: &str) -> World {
    World::new(&format!("{TWO}{HEALTH}{keys}\n"), &["10.0.0.2", "10.0.0.3"])
}

fn judge(world: &mut World, backend: &str, verdict: Verdict) {
    world.health.set(&"web".into(), &backend.into(), verdict);
}

fn down() -> Verdict {
    Verdict::Down { reason: "connection refused".into() }
}

#[test]
fn a_backend_counts_as_up_until_it_is_down_and_then_others_have_its_share_and_connections() {
    let mut world = checked("");
    let plan = world.plan();
    assert_eq!(takers(&plan), [0, 1].into());
    assert_eq!(plan.backends()[0].health, Some(Verdict::Unknown));
    judge(&mut world, "web-1", Verdict::Up);
    judge(&mut world, "web-2", down());
    let plan = world.plan();
    assert_eq!(takers(&plan), [0].into());
    assert!(plan.forwarding.backend(1).is_none(), "a remembered connection is an orphan");
    assert_eq!(plan.backends()[1].health, Some(down()));
    judge(&mut world, "web-2", Verdict::Up);
    assert_eq!(takers(&world.plan()), [0, 1].into());
}

#[test]
fn a_down_backend_keeps_its_connections_if_its_service_says_so() {
    let mut world = checked("on_down = \"keep\"");
    judge(&mut world, "web-2", down());
    let plan = world.plan();
    assert_eq!(takers(&plan), [0].into());
    assert!(backend(&plan, 1).reachable);
}

#[test]
fn while_all_are_down_the_service_goes_on_or_stops() {
    for (keys, expected) in [("", vec![0, 1]), ("all_down = \"stop\"", vec![])] {
        let mut world = checked(keys);
        judge(&mut world, "web-1", down());
        judge(&mut world, "web-2", down());
        let plan = world.plan();
        assert_eq!(takers(&plan), expected.iter().copied().collect(), "{keys}");
        let there = (0..2).filter(|slot| plan.forwarding.backend(*slot).is_some());
        assert_eq!(there.count(), expected.len(), "{keys}");
        // One that drains is not there to take what they leave.
        judge(&mut world, "web-1", Verdict::Up);
        Arc::make_mut(&mut world.config.desired.services[0]).backends[0].weight = 0;
        let some = !expected.is_empty();
        assert_eq!(takers(&world.plan()).len(), usize::from(some), "{keys}");
    }
}

#[test]
fn one_that_is_up_and_unreachable_is_no_reason_to_leave_out_one_that_is_down() {
    let mut world = checked("");
    judge(&mut world, "web-2", down());
    world.lose("10.0.0.2");
    assert_eq!(takers(&world.plan()), [1].into(), "it can be reached, and may serve");
}

#[test]
fn a_verdict_means_nothing_to_a_service_without_checks() {
    let mut world = World::new(TWO, &["10.0.0.2", "10.0.0.3"]);
    judge(&mut world, "web-2", down());
    let plan = world.plan();
    assert_eq!(takers(&plan), [0, 1].into());
    assert_eq!(plan.backends()[1].health, None);
}

/// On all addresses of this node, and a DSR service at one of them.
const NAT: &str = r#"
    [[overlay]]
    vni = 100
    addresses = ["10.99.1.250"]
    mtu = 1400
    [[service]]
    name = "shop"
    vip = "node"
    ports = ["80:8081/tcp", "53/udp"]
    mode = "nat"
    allow = ["198.51.100.0/24"]
    vni = 100
    backend = [{ name = "shop-1", vtep = "10.0.0.2", address = "10.99.1.2" }]
    [[service]]
    name = "web"
    vip = "10.1.0.1"
    ports = ["80/tcp"]
    vni = 100
    backend = [{ name = "web-1", vtep = "10.0.0.2", mac = "02:42:0a:00:00:02" }]
"#;

fn nat_world(text: &str) -> World {
    // One for all tests, of which none opens a connection: its memory stays for the process's life.
    static SLOTS: LazyLock<nat::Slots> = LazyLock::new(|| {
        nat::Slots::new(2, nat::Timeouts::default(), 1024..=u16::MAX).expect("there is memory")
    });
    World { nat: Some(&SLOTS), ..World::new(text, &["10.0.0.2"]) }
}

fn service_at(plan: &Plan, address: [u8; 4], protocol: u8, port: u16) -> Option<u32> {
    plan.forwarding.service_at(Address::v4(address), protocol, port)
}

#[test]
fn a_service_on_the_node_is_on_all_its_ipv4_addresses_but_where_another_names_one() {
    let mut world = nat_world(NAT);
    let mut planner = planner(16);
    let plan = planner.plan(&world.inputs(), Tick(0)).unwrap();
    assert_eq!(service_at(&plan, [10, 0, 0, 1], 6, 80), Some(0));
    assert_eq!(service_at(&plan, [10, 1, 0, 1], 6, 80), Some(1), "it says so by name");
    assert_eq!(service_at(&plan, [10, 1, 0, 1], 17, 53), Some(0));
    let service = plan.forwarding.service(0).unwrap();
    let nat = service.nat.as_ref().unwrap();
    let targets: Vec<_> =
        service.vips.iter().zip(&nat.targets).map(|(vip, target)| (vip.port, *target)).collect();
    assert_eq!(targets, [(80, 8081), (53, 53), (53, 53)]);
    assert!(nat.allows(Address::v4([198, 51, 100, 7])));
    assert!(!nat.allows(Address::v4([198, 51, 101, 7])));
    assert!(plan.forwarding.service(1).unwrap().nat.is_none());
    // Addresses come and go, and so do services.
    world.addresses = vec!["10.2.0.1".parse().unwrap()];
    let plan = planner.plan(&world.inputs(), Tick(1)).unwrap();
    assert_eq!(service_at(&plan, [10, 2, 0, 1], 6, 80), Some(0));
    assert_eq!(service_at(&plan, [10, 0, 0, 1], 6, 80), None);
    world.addresses.push("10.1.0.1".parse().unwrap());
    world.config.desired.services.truncate(1);
    let plan = planner.plan(&world.inputs(), Tick(2)).unwrap();
    assert_eq!(service_at(&plan, [10, 1, 0, 1], 6, 80), Some(0), "nobody else has it now");
}

#[test]
fn every_address_of_the_node_is_steered_as_an_end_of_tunnels_and_keeps_its_pings() {
    let world = nat_world(NAT);
    let steered = world.plan().steer;
    for address in ["10.0.0.1", "10.1.0.1", "fd00::1"] {
        let address: IpAddr = address.parse().unwrap();
        let end = steer::Key::Port { address: address.into(), protocol: 17, port: 4789 };
        assert_eq!(steered[&end], steer::TUNNEL, "{address}");
        assert!(!steered.contains_key(&steer::Key::Address(address.into())), "{address}");
    }
    let mesh = steer::Key::Mesh { vni: 100, address: Address::v4([10, 99, 1, 250]) };
    let flags = steer::ANSWER_ARP | steer::taken(0);
    assert_eq!(steered[&mesh], flags, "its questions, and what is for its live ports");
    let without = NAT.replace("10.1.0.1", "203.0.113.9");
    let only_dsr = &without[without.rfind("[[service]]").unwrap()..];
    assert_eq!(nat_world(only_dsr).plan().steer.len(), 2, "its port and its address");
}

#[test]
fn a_nat_backend_has_the_overlays_macs_and_the_smallest_mtu() {
    let world = nat_world(NAT);
    let plan = world.plan();
    let frame = encapsulated(&plan, 0);
    // Ethernet, IPv4, UDP and VXLAN come before the inner Ethernet header.
    let inner = &frame[14 + 20 + 8 + 8..];
    assert_eq!(inner[..6], [0x02, 0x42, 10, 99, 1, 2], "as Docker names it");
    assert_eq!(inner[6..12], [0x02, 0x42, 10, 99, 1, 250]);
    assert_eq!(backend(&plan, 0).mtu, 1400);
    let [shop, web] = [0, 1].map(|backend: usize| plan.backends()[backend].slot);
    assert_eq!(plan.forwarding.task(shop), Some(Address::v4([10, 99, 1, 2])));
    assert_eq!(plan.forwarding.task(web), Some(Address::default()));
    let wide = nat_world(&NAT.replace("mtu = 1400", "")).plan();
    assert_eq!(backend(&wide, 0).mtu, 1450, "what the link leaves");
}

#[test]
fn a_connection_is_given_a_mesh_address_of_its_own_family() {
    let ipv6 = r#"
        [[service]]
        name = "shop6"
        vip = "2001:db8::1"
        ports = ["80:8081/tcp"]
        mode = "nat"
        vni = 100
        backend = [{ name = "shop-1", vtep = "10.0.0.2", address = "fd00:99::2", mac = "02:00:00:00:00:02" }]
    "#;
    let both = NAT.replace("[\"10.99.1.250\"]", "[\"10.99.1.250\", \"fd00:99::250\"]") + ipv6;
    let plan = nat_world(&both).plan();
    let mesh_of = |service| {
        let nat = plan.forwarding.service(service).unwrap().nat.as_ref().unwrap();
        let overlay = &plan.forwarding.overlays()[nat.overlay as usize];
        overlay.mesh.iter().map(|mesh| mesh.address).collect::<Vec<_>>()
    };
    let wide = |address: &str| Address::from(address.parse::<IpAddr>().unwrap());
    let (narrow, wide_mesh) = (Address::v4([10, 99, 1, 250]), wide("fd00:99::250"));
    assert_eq!((mesh_of(0), mesh_of(2)), (vec![narrow], vec![wide_mesh]));
    assert_eq!(plan.forwarding.task(plan.backends()[2].slot), Some(wide("fd00:99::2")));
    assert_eq!(plan.forwarding.mesh_at(100, wide_mesh).map(|(_, bank)| bank), Some(1));
    let key = steer::Key::Mesh { vni: 100, address: wide_mesh };
    assert_eq!(plan.steer[&key], steer::ANSWER_ARP | steer::taken(1));
    let on_node = nat_world(&both.replace("2001:db8::1", "node6")).plan();
    let at = |address: &str| on_node.forwarding.service_at(wide(address), 6, 80);
    assert_eq!((at("fd00::1"), at("10.0.0.1")), (Some(2), Some(0)), "each on addresses of its own");
    // What goes in the tunnel says what it is.
    let frame = encapsulated(&plan, 2);
    assert_eq!(frame[14 + 20 + 8 + 8 + 12..][..2], [0x86, 0xdd]);
}

#[test]
fn a_mesh_address_keeps_its_bank_and_one_too_many_is_refused_and_changes_nothing() {
    let mut world = nat_world(NAT);
    let mut planner = planner(16);
    let mut banks = |world: &World| {
        let plan = planner.plan(&world.inputs(), Tick(0))?;
        let overlays = plan.forwarding.overlays().iter().flat_map(|overlay| &overlay.mesh);
        Ok::<_, PlanError>(overlays.map(|mesh| (mesh.address, mesh.bank)).collect::<Vec<_>>())
    };
    let [first, second] = [250, 251].map(|last| Address::v4([10, 99, 1, last]));
    assert_eq!(banks(&world).unwrap(), [(first, 0)]);
    let addresses = |text: &str| config(&NAT.replace("[\"10.99.1.250\"]", text)).desired;
    world.config.desired = addresses("[\"10.99.1.251\", \"10.99.1.250\"]");
    assert_eq!(banks(&world).unwrap(), [(second, 1), (first, 0)]);
    world.config.desired = addresses("[\"10.99.1.249\", \"10.99.1.251\", \"10.99.1.250\"]");
    let refused = banks(&world).unwrap_err().to_string();
    assert!(refused.contains("nat.addresses is 2") && refused.contains("restart"), "{refused}");
    world.config.desired = addresses("[\"10.99.1.251\"]");
    assert_eq!(banks(&world).unwrap(), [(second, 1)]);
}

/// The same overlay, of a swarm, with these addresses.
fn swarms(world: &mut World, addresses: &[&str], leaving: &[&str]) {
    let parsed = |all: &[&str]| all.iter().map(|address| address.parse().unwrap()).collect();
    let overlay = &mut world.config.desired.overlays[0];
    overlay.owner = Owner::Swarm;
    (overlay.addresses, overlay.leaving) = (parsed(addresses), parsed(leaving));
}

/// A node of a swarm with two mesh addresses, and room for no more, that is planned once.
fn swarm_of_two_addresses() -> (World, &'static nat::Slots, Planner) {
    let slots = nat::Slots::new(2, nat::Timeouts::default(), 1024..=u16::MAX).unwrap();
    let slots: &'static nat::Slots = Box::leak(Box::new(slots));
    let mut world = World { nat: Some(slots), ..nat_world(NAT) };
    let mut planner = planner(16);
    swarms(&mut world, &["10.99.1.250", "10.99.1.251"], &[]);
    planner.plan(&world.inputs(), Tick(0)).unwrap();
    (world, slots, planner)
}

fn mesh_key(last: u8) -> steer::Key {
    steer::Key::Mesh { vni: 100, address: Address::v4([10, 99, 1, last]) }
}

/// A connection by a bank's port.
fn connect(slots: &nat::Slots, bank: u16, last: u8) -> (nat::Id, nat::State) {
    let mesh = [Mesh { bank, address: Address::v4([10, 99, 1, last]) }];
    let key = dataplane::flow::FlowKey {
        src: Address::v4([198, 51, 100, 7]),
        dst: Address::v4([10, 0, 0, 1]),
        src_port: 40_000 + u16::from(last),
        dst_port: 80,
        protocol: 6,
    };
    let to = slots.open(&mesh, u64::from(last) << 40 | 1, Tick(0), |mesh| nat::Connection {
        key,
        task: Address::v4([10, 99, 1, 2]),
        task_port: 80,
        mesh,
        backend: 0,
        way: nat::Way::default(),
    });
    to.map(|to| (to.id, to.state)).unwrap()
}

#[test]
fn a_mesh_address_that_leaves_keeps_its_connections_until_its_next_owner_needs_it() {
    let (mut world, slots, mut planner) = swarm_of_two_addresses();
    connect(slots, 1, 251);

    swarms(&mut world, &["10.99.1.250"], &["10.99.1.251"]);
    let plan = planner.plan(&world.inputs(), Tick(1)).unwrap();
    let overlays = plan.forwarding.overlays();
    let left = Address::v4([10, 99, 1, 251]);
    assert_eq!(plan.forwarding.mesh_at(100, left), Some((1, 1)), "answers are translated");
    let service = plan.forwarding.service(0).unwrap().nat.as_ref().unwrap();
    let takes = &overlays[service.overlay as usize].mesh;
    assert!(takes.iter().all(|mesh| mesh.address != left), "nothing new comes: {takes:?}");
    assert_eq!(plan.steer[&mesh_key(251)], steer::taken(1), "nor are questions answered");
    assert!(plan.cut.is_empty());

    // Its next owner has come: a task.
    let mut desired = world.config.desired.clone();
    let mut shop = (*desired.services[0]).clone();
    shop.backends[0].address = Some("10.99.1.251".parse().unwrap());
    desired.services[0] = shop.into();
    let before = std::mem::replace(&mut world.config.desired, desired);
    let plan = planner.plan(&world.inputs(), Tick(2)).unwrap();
    assert_eq!((plan.forwarding.mesh_at(100, left), &plan.cut[..]), (None, &[1][..]));
    assert!(!plan.steer.contains_key(&mesh_key(251)));
    // Or another's, of whom only the source knows.
    world.config.desired = before;
    swarms(&mut world, &["10.99.1.250"], &[]);
    let plan = planner.plan(&world.inputs(), Tick(3)).unwrap();
    assert_eq!((plan.forwarding.mesh_at(100, left), &plan.cut[..]), (None, &[1][..]));
    // Docker starts again: that shall harm no connection.
    let before = std::mem::take(&mut world.config.desired);
    assert!(planner.plan(&world.inputs(), Tick(4)).unwrap().cut.is_empty());
    world.config.desired = before;
    swarms(&mut world, &["10.99.1.250", "10.99.1.251"], &[]);
    let plan = planner.plan(&world.inputs(), Tick(5)).unwrap();
    assert_eq!(plan.forwarding.mesh_at(100, left), Some((0, 1)), "it goes on");
}

#[test]
fn a_swarms_mesh_address_waits_until_there_are_ports_for_it() {
    let (mut world, slots, mut planner) = swarm_of_two_addresses();
    let (id, state) = connect(slots, 1, 251);
    swarms(&mut world, &["10.99.1.250", "10.99.1.249"], &["10.99.1.251"]);
    let plan = planner.plan(&world.inputs(), Tick(1)).unwrap();
    let waits = plan.waits.unwrap().to_string();
    assert!(waits.contains("10.99.1.249") && waits.contains("nat.addresses is 2"), "{waits}");
    assert!(!plan.steer.contains_key(&mesh_key(249)));
    assert!(!planner.has_ports_for_waiting(slots));

    slots.reset(id, state, Tick(1));
    nat::Sweep::new(0, 1).run(slots, Tick(5000), |_, _| {});
    assert!(planner.has_ports_for_waiting(slots), "the last connection has ended");
    let plan = planner.plan(&world.inputs(), Tick(5000)).unwrap();
    assert!(plan.waits.is_none() && !planner.has_ports_for_waiting(slots));
    assert_eq!(plan.steer[&mesh_key(249)], steer::ANSWER_ARP | steer::taken(1));
    assert!(!plan.steer.contains_key(&mesh_key(251)));
}
