//! This node's own clients and tasks: the link of our own, and that nothing of it stays; the published
//! ports on this node's addresses.

use std::fs;

use serde_json::{Value, json};

use crate::{
    api::bare_lab,
    client::VIP4,
    daemon::{Daemon, WIREMESH},
    lab::{Lab, assert_same_content, wait_until},
};

/// Ends without it: what the systemd unit's daemon lacks.
const WITHOUT_SYS_ADMIN: [&str; 2] = ["setpriv", "--bounding-set=-sys_admin"];

/// One node whose daemon has a local link.
fn local_lab() -> Lab {
    let lab = bare_lab();
    lab.write_config("n1", "n1.toml", "[node]\n", "[node]\nlocal_link = \"always\"\n");
    lab
}

/// The names of the node's interfaces.
fn links(lab: &Lab) -> Vec<String> {
    let links = lab.succeed("n1", &["ip", "-json", "link", "show"]);
    let links: Value = serde_json::from_str(&links).unwrap();
    let names = links.as_array().unwrap().iter();
    names.map(|link| link["ifname"].as_str().unwrap().to_owned()).collect()
}

fn has_link(lab: &Lab) -> bool {
    links(lab).iter().any(|name| name.starts_with("wiremesh"))
}

/// Which of the workers' ports are on the local link.
fn local_ports(daemon: &Daemon) -> usize {
    let status = daemon.status();
    let workers = status["workers"].as_array().unwrap().iter();
    let ports = workers.flat_map(|worker| worker["ports"].as_array().unwrap());
    ports.filter(|port| port["interface"] == "wiremesh1").count()
}

#[test]
fn the_local_link_is_gone_when_the_daemon_is_even_by_kill_9() {
    let lab = local_lab();
    let daemon = Daemon::start(&lab, "n1");
    assert_eq!(local_ports(&daemon), 1);
    let shown = links(&lab);
    assert!(shown.iter().any(|name| name == "wiremesh0"), "{shown:?}");
    assert!(!shown.iter().any(|name| name == "wiremesh1"), "it is nobody else's: {shown:?}");
    let neighbour = lab.succeed("n1", &["ip", "neigh", "show", "dev", "wiremesh0"]);
    assert!(neighbour.contains("169.254.77.2") && neighbour.contains("PERMANENT"), "{neighbour}");
    daemon.terminate();
    assert!(!has_link(&lab));

    Daemon::start(&lab, "n1").kill_9();
    wait_until("the kernel has removed the link", 3, || !has_link(&lab));

    // The next life does not stumble over what the last one left.
    Daemon::start(&lab, "n1").kill_9();
    assert_eq!(local_ports(&Daemon::start(&lab, "n1")), 1);
}

#[test]
fn without_the_privilege_the_local_link_is_removed_by_the_next_life() {
    let lab = local_lab();
    let daemon = Daemon::start_by(&lab, "n1", &WITHOUT_SYS_ADMIN);
    assert_eq!(local_ports(&daemon), 1);
    assert!(daemon.log().contains("no CAP_SYS_ADMIN"), "{}", daemon.log());
    daemon.kill_9();
    assert!(has_link(&lab), "nobody else removes it");

    let daemon = Daemon::start_by(&lab, "n1", &WITHOUT_SYS_ADMIN);
    assert_eq!(local_ports(&daemon), 1);
    daemon.terminate();
    assert!(!has_link(&lab));
}

#[test]
fn a_local_link_of_somebody_else_is_named_and_left_alone() {
    let lab = local_lab();
    lab.succeed("n1", &["ip", "link", "add", "wiremesh0", "type", "veth", "peer", "name", "x"]);
    let config = lab.file("n1.toml");
    let output = lab.run("n1", &[WIREMESH, "run", "-c", config.to_str().unwrap()]);
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("an interface wiremesh0 that is not ours"), "{said}");
    assert!(has_link(&lab));
    lab.succeed("n1", &["ip", "link", "del", "wiremesh0"]);

    let owner = Daemon::start(&lab, "n1");
    let config = lab.write_config("n1", "second.toml", "/n1.sock", "/second.sock");
    let output = lab.run("n1", &[WIREMESH, "run", "-c", &config]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("another running Wiremesh"), "{said}");
    assert_eq!(local_ports(&owner), 1, "it goes on");
}

#[test]
fn a_backend_on_this_very_node_is_served_by_its_own_vxlan_device() {
    let lab = local_lab();
    let mac = "02:00:00:00:03:01";
    let device =
        format!("link add vx100 address {mac} type vxlan id 100 local 10.77.0.11 dstport 4789");
    for command in
        [&*device, "link set vx100 up", &format!("address add {}/32 dev lo", VIP4.address)]
    {
        let words: Vec<&str> = ["ip"].into_iter().chain(command.split(' ')).collect();
        lab.succeed("n1", &words);
    }
    let server = ["python3", "-m", "http.server", "80", "--bind", VIP4.address, "--directory"];
    let directory = lab.file("n1.served");
    fs::create_dir(&directory).unwrap();
    fs::copy(lab.file("big"), directory.join("big")).unwrap();
    let _server = lab.start("n1", &[&server[..], &[directory.to_str().unwrap()]].concat());
    let daemon = Daemon::start(&lab, "n1");
    let service = json!({
        "name": "web", "vip": VIP4.address, "ports": ["80/tcp"], "vni": 100,
        "backends": [{ "name": "here", "vtep": "10.77.0.11", "mac": mac }],
    });
    let (status, answer) = daemon.call("POST", "/v1/services", &service, "");
    assert_eq!(status, 201, "{answer}");

    let (big, copy) = (lab.file("big"), lab.file("copy"));
    let url = format!("{}/big", VIP4.url);
    let fetch = ["curl", "-sSf", "--max-time", "20", "--retry", "3", "--retry-connrefused", "-o"];
    lab.succeed("client", &[&fetch[..], &[copy.to_str().unwrap(), &url]].concat());
    assert_same_content(&big, &copy);
    let received = lab.succeed("n1", &["cat", "/sys/class/net/vx100/statistics/rx_packets"]);
    assert!(received.trim().parse::<u64>().unwrap() > 10, "all came by the tunnel: {received}");
}
