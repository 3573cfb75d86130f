//! Clients reach servers: through every node, both ways, over either underlay.

use std::collections::HashSet;

use crate::{
    client::{
        ECHO_PORT, Held, NO_ERRORS, VIP4, VIP6, VIPS, exchange_ten_megabytes, get, load, parse,
        send_datagrams, start_holding,
    },
    daemon::Daemon,
    lab::{Lab, PEER, assert_same_content, wait_until},
};

const BACKENDS: [&str; 2] = ["b1", "b2"];

#[test]
fn every_node_answers_and_the_server_sees_the_clients_address() {
    let lab = Lab::up(&[]);
    let nodes = ["n1", "n2", "n3"];
    let daemons = Daemon::start_all(&lab, nodes);
    for (node, daemon) in nodes.iter().zip(&daemons) {
        lab.route(node);
        let before = daemon.counter("tx_packets");
        for vip in VIPS {
            assert_eq!(get(&lab, vip).client, vip.client, "through {node}");
        }
        assert!(daemon.counter("tx_packets") > before, "it was {node} who forwarded");
    }
}

#[test]
fn connections_are_spread_over_all_backends() {
    let lab = Lab::up(&["--nodes", "1"]);
    let _daemon = Daemon::start(&lab, "n1");
    for vip in VIPS {
        let load = load(&lab, vip, 300);
        assert_eq!(load.errors, NO_ERRORS);
        // A fair draw gives each 100 ± 8; this is six times that.
        assert!(load.backends.len() == 3 && load.backends.values().all(|n| *n > 50), "{load:?}");
    }
}

#[test]
fn connections_survive_the_move_of_the_route_to_another_node() {
    let lab = Lab::up(&["--nodes", "2"]);
    let _daemons = Daemon::start_all(&lab, ["n1", "n2"]);
    let holding = start_holding(&lab, VIP4, 12, 4);
    lab.route("n2");
    let held: Vec<Held> = parse(&holding.finish());
    assert!(held.iter().all(|connection| connection.outcome == "kept"), "{held:?}");
}

#[test]
fn ten_megabytes_arrive_intact_both_ways_from_a_1500_byte_client() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "2"]);
    let _daemon = Daemon::start(&lab, "n1");
    for vip in VIPS {
        exchange_ten_megabytes(&lab, vip, &BACKENDS);
    }
}

#[test]
fn a_client_learns_the_narrower_mtu_of_the_tunnel_by_icmp() {
    for underlay in ["4", "6"] {
        let lab = Lab::up(&[
            "--nodes",
            "1",
            "--backends",
            "2",
            "--underlay-mtu",
            "1500",
            "--underlay",
            underlay,
        ]);
        let daemon = Daemon::start(&lab, "n1");
        for vip in VIPS {
            exchange_ten_megabytes(&lab, vip, &BACKENDS);
        }
        assert!(daemon.counter("too_big_sent") > 0, "IPv{underlay} underlay");
    }
}

#[test]
fn datagrams_are_answered_from_either_family() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "2"]);
    let _daemon = Daemon::start(&lab, "n1");
    for vip in VIPS {
        for size in [6, 1400] {
            let datagrams = send_datagrams(&lab, vip, 40, size);
            assert_eq!(datagrams.lost, 0, "{size} bytes to {}", vip.address);
            for answer in &datagrams.answers {
                assert!(answer.intact && answer.same_port, "{answer:?}");
                assert_eq!(answer.client, vip.client);
            }
            let backends: HashSet<_> = datagrams.answers.iter().map(|a| &a.backend).collect();
            assert_eq!(backends.len(), BACKENDS.len(), "each of 40 ports is its own flow");
        }
    }
}

#[test]
fn an_ipv6_underlay_carries_both_families() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "2", "--underlay", "6"]);
    let _daemon = Daemon::start(&lab, "n1");
    for vip in VIPS {
        assert_eq!(get(&lab, vip).client, vip.client);
        exchange_ten_megabytes(&lab, vip, &BACKENDS);
        assert_eq!(send_datagrams(&lab, vip, 20, 512).lost, 0);
    }
}

#[test]
fn a_packet_may_leave_by_another_interface_than_it_came_in_by() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "2", "--two-armed"]);
    let _daemon = Daemon::start(&lab, "n1");
    for vip in VIPS {
        assert_eq!(get(&lab, vip).client, vip.client);
        exchange_ten_megabytes(&lab, vip, &BACKENDS);
    }
}

#[test]
fn every_queue_of_an_interface_is_served() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "2", "--queues", "2"]);
    let daemon = Daemon::start(&lab, "n1");
    let status = daemon.status();
    let workers = status["workers"].as_array().unwrap();
    let ports = workers.iter().flat_map(|worker| worker["ports"].as_array().unwrap());
    let queues: HashSet<_> = ports.map(|port| port["queue"].as_u64().unwrap()).collect();
    assert_eq!(queues, HashSet::from([0, 1]));
    let load = load(&lab, VIP4, 300);
    assert_eq!(load.errors, NO_ERRORS);
}

#[test]
fn a_ping_to_the_vip_is_answered_by_the_node() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let daemon = Daemon::start(&lab, "n1");
    for (number, vip) in (1..).zip(VIPS) {
        lab.succeed("client", &["ping", "-c", "3", "-i", "0.2", "-W", "5", vip.address]);
        // The backend would answer as well, were it asked: it has the VIP.
        assert_eq!(daemon.counter("echo_replies"), 3 * number, "{}", vip.address);
    }
}

#[test]
fn what_is_not_for_a_vip_reaches_the_kernel() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    let (ready, ssh_like) = (lab.file("n1-echo.ready"), "2222");
    let mut server = vec![PEER, "echo", "--name", "n1", "--port", ssh_like];
    server.extend(["--ready", ready.to_str().unwrap()]);
    server.extend(["--bind", "10.77.0.11", "--bind", "2001:db8:77::11"]);
    let _server = lab.start("n1", &server);
    wait_until("the node's own server listens", 10, || ready.exists());
    let daemon = Daemon::start(&lab, "n1");

    for (address, client) in [("10.77.0.11", VIP4.client), ("2001:db8:77::11", VIP6.client)] {
        lab.succeed("client", &["ping", "-c", "2", "-i", "0.2", "-W", "5", address]);
        let talk = format!("exec 3<>/dev/tcp/{address}/{ssh_like}; echo hello >&3; head -n 1 <&3");
        let said = lab.succeed("client", &["timeout", "10", "bash", "-c", &talk]);
        assert!(said.starts_with(&format!("n1 {client} ")) && said.ends_with("hello\n"), "{said}");
    }
    // A VIP's unpublished port is none of ours either: the kernel, not a worker, saw that packet.
    let connect = format!("exec 3<>/dev/tcp/{}/81", VIP4.address);
    assert!(!lab.run("client", &["timeout", "2", "bash", "-c", &connect]).status.success());
    assert_eq!(daemon.counter("rx_packets"), 0, "a worker was given what is not for a VIP");
    assert_eq!(send_datagrams(&lab, VIP4, 1, 32).lost, 0, "while port {ECHO_PORT} works");
}

#[test]
fn a_vip_is_resolved_on_its_own_network_if_its_node_is_to_answer_and_only_then() {
    for answers in [true, false] {
        let lab = Lab::up(&["--nodes", "2", "--backends", "1"]);
        let with_key = format!("[node]\nanswer_arp = {answers}\n");
        lab.write_config("n1", "n1.toml", "[node]\n", &with_key);
        let daemon = Daemon::start(&lab, "n1");
        // No daemon runs on n2: it is a client that has the VIPs on its own network.
        for (vip, family) in [(VIP4, "-4"), (VIP6, "-6")] {
            lab.succeed("n2", &["ip", family, "route", "add", vip.address, "dev", "eth0"]);
            let asked = lab.run("n2", &["curl", "-sSf", "--max-time", "5", vip.url]);
            assert_eq!(asked.status.success(), answers, "{}: {asked:?}", vip.address);
            let found = lab.succeed("n2", &["ip", "neigh", "show", vip.address, "dev", "eth0"]);
            assert_eq!(found.contains(&lab.mac("n1")), answers, "{found}");
        }
        assert_eq!(daemon.counter("neighbour_replies") >= 2, answers, "one ARP, one ND");
    }
}

#[test]
fn an_icmp_error_about_a_flow_reaches_the_backend_that_owns_it() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "2"]);
    let daemon = Daemon::start(&lab, "n1");
    // The last link narrows without the client's knowledge, whose segments may still be 1,460 bytes.
    // The router tells the sender, by the address that it sees: the VIP.
    lab.succeed("router", &["ip", "link", "set", "client", "mtu", "1400"]);
    for vip in VIPS {
        let (url, copy) = (format!("{}/big", vip.url), lab.file("copy"));
        let fetch = ["curl", "-sSf", "--max-time", "60", "-w", "%header{x-backend}", "-o"];
        let fetch = [&fetch[..], &[copy.to_str().unwrap(), &url]].concat();
        let owner = lab.succeed("client", &fetch);
        assert_same_content(&lab.file("big"), &copy);
        for backend in BACKENDS {
            let route = ["ip", "route", "get", vip.client, "from", vip.address];
            let route = lab.succeed(backend, &route);
            assert_eq!(route.contains("mtu 1400"), backend == owner, "{backend}: {route}");
        }
    }
    assert!(daemon.counter("icmp_errors_forwarded") >= 2);
}
