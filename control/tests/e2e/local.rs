//! This node's own clients and tasks: the link of our own, and that nothing of it stays; the published
//! ports on this node's addresses.

use std::fs;

use serde_json::{Value, json};

use crate::{
    api::{bare_lab, bare_lab_of},
    client::{Datagrams, VIP4, parse},
    daemon::{Daemon, WIREMESH},
    lab::{Background, Lab, PEER, assert_same_content, wait_until},
    nat::join,
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

/// A web server on the node, with the lab's large file.
fn serve_big(lab: &Lab, address: &str) -> Background {
    let directory = lab.file("n1.served");
    fs::create_dir_all(&directory).unwrap();
    fs::copy(lab.file("big"), directory.join("big")).unwrap();
    let server = ["python3", "-m", "http.server", "80", "--bind", address, "--directory"];
    let server = lab.start("n1", &[&server[..], &[directory.to_str().unwrap()]].concat());
    let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
    let url = format!("http://{host}");
    wait_until("the web server listens", 10, || {
        lab.run("n1", &["curl", "-sf", "-o", "/dev/null", &url]).status.success()
    });
    server
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
    let (lab, _echo) = publishing_lab();
    let daemon = Daemon::start_by(&lab, "n1", &WITHOUT_SYS_ADMIN);
    assert!(daemon.log().contains("no CAP_SYS_ADMIN"), "{}", daemon.log());
    assert!(links(&lab).iter().any(|name| name == "wiremesh1"));
    wait_until("localhost answers", 10, || answers(&lab, "n1", "http://localhost:8080"));
    download(&lab, "n1", "http://localhost:8080");
    daemon.kill_9();
    assert!(has_link(&lab), "nobody else removes it");

    let daemon = Daemon::start_by(&lab, "n1", &WITHOUT_SYS_ADMIN);
    wait_until("localhost answers", 10, || answers(&lab, "n1", "http://localhost:8080"));
    daemon.terminate();
    assert!(!has_link(&lab));
}

#[test]
fn a_local_link_that_somebody_removes_is_told_and_clients_elsewhere_are_served() {
    let (lab, _echo) = publishing_lab();
    let daemon = Daemon::start(&lab, "n1");
    wait_until("others are served", 10, || answers(&lab, "client", "http://10.77.0.11:8080"));
    lab.succeed("n1", &["ip", "link", "del", "wiremesh0"]);
    wait_until("it is told", 5, || daemon.log().contains("wiremesh0 was removed"));
    assert!(!answers(&lab, "n1", "http://localhost:8080"));
    download(&lab, "client", "http://10.77.0.11:8080");
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
    let _server = serve_big(&lab, VIP4.address);
    let daemon = Daemon::start(&lab, "n1");
    let service = json!({
        "name": "web", "vip": VIP4.address, "ports": ["80/tcp"], "vni": 100,
        "backends": [{ "name": "here", "vtep": "10.77.0.11", "mac": mac }],
    });
    let (status, answer) = daemon.call("POST", "/v1/services", &service, "");
    assert_eq!(status, 201, "{answer}");

    download(&lab, "client", VIP4.url);
    let received = lab.succeed("n1", &["cat", "/sys/class/net/vx100/statistics/rx_packets"]);
    assert!(received.trim().parse::<u64>().unwrap() > 10, "all came by the tunnel: {received}");
}

/// What tasks take for their client.
const MESH: &str = "10.99.1.250";
const MESH6: &str = "fd00:99::250";
const ON_B1: &str = "name = \"b1\"\nvtep = \"10.77.0.101\"\naddress = \"10.99.1.1\"\n";
const ON_N1: &str = "name = \"here\"\nvtep = \"10.77.0.11\"\naddress = \"10.99.1.9\"\n";

/// Has the node publish a web server and an echo server, and a port that nobody listens on.
fn publish(lab: &Lab, backend: &str) {
    let config = lab.file("n1.toml");
    let settings = fs::read_to_string(&config).unwrap();
    let text = format!(
        "{settings}\n[[overlay]]\nvni = 200\naddresses = [\"{MESH}\"]\n\
         [[service]]\nname = \"shop\"\nvip = \"node\"\nmode = \"nat\"\nvni = 200\n\
         ports = [\"8080:80/tcp\", \"5353/udp\", \"8009:9/tcp\"]\n[[service.backend]]\n{backend}"
    );
    fs::write(config, text).unwrap();
}

/// The same over IPv6, beside it.
fn publish_ipv6(lab: &Lab, backend: &str) {
    let both = format!("\"{MESH}\", \"{MESH6}\"");
    let config = lab.write_config("n1", "n1.toml", &format!("\"{MESH}\""), &both);
    let settings = fs::read_to_string(&config).unwrap();
    let text = format!(
        "{settings}\n[[service]]\nname = \"shop6\"\nvip = \"node6\"\nmode = \"nat\"\nvni = 200\n\
         ports = [\"8086:80/tcp\", \"5353/udp\"]\n[[service.backend]]\n{backend}"
    );
    fs::write(config, text).unwrap();
}

/// One that publishes what is on another node.
fn publishing_lab() -> (Lab, Background) {
    let lab = bare_lab_of(&["--nodes", "1", "--backends", "1", "--queues", "2"]);
    let echo = join(&lab, "b1", "10.77.0.10");
    publish(&lab, ON_B1);
    (lab, echo)
}

/// Whether there is an answer on a host.
fn answers(lab: &Lab, host: &str, url: &str) -> bool {
    let ask = ["curl", "-sSf", "--max-time", "2", "-o", "/dev/null", url];
    lab.run(host, &ask).status.success()
}

/// Downloads 10 MB on a host, which have to arrive as they left.
fn download(lab: &Lab, host: &str, url: &str) {
    let (big, copy) = (lab.file("big"), lab.file("copy"));
    let url = format!("{url}/big");
    let fetch = ["curl", "-sSf", "--max-time", "20", "-o", copy.to_str().unwrap(), &url];
    lab.succeed(host, &fetch);
    assert_same_content(&big, &copy);
    fs::remove_file(copy).unwrap();
}

#[test]
fn clients_on_the_node_itself_reach_its_ports_by_localhost_and_by_its_address() {
    let (lab, _echo) = publishing_lab();
    let daemon = Daemon::start(&lab, "n1");
    let workers = daemon.status()["workers"].as_array().unwrap().len();
    assert_eq!(local_ports(&daemon), workers, "there is an overlay, so there is a link");
    let get = |url: &str| lab.run("n1", &["curl", "-sSf", "--max-time", "5", url]);
    for address in ["localhost", "127.0.0.1", "[::1]", "10.77.0.11"] {
        let url = format!("http://{address}:8080");
        wait_until(&format!("{url} answers"), 10, || {
            let answer = String::from_utf8(get(&url).stdout).unwrap();
            answer.contains("backend=b1") && answer.contains(&format!("client={MESH}"))
        });
        download(&lab, "n1", &url);
    }
    let upload = lab.file("big");
    let upload = ["curl", "-sSf", "--max-time", "20", "-T", upload.to_str().unwrap()];
    lab.succeed("n1", &[&upload[..], &["http://localhost:8080/upload/local"]].concat());
    assert_same_content(&lab.file("big"), &lab.file("b1/upload/local"));

    for address in ["127.0.0.1", "::1", "10.77.0.11"] {
        let to = ["udp", "--to", address, "--port", "5353", "--count", "20", "--size", "512"];
        let datagrams: Datagrams = parse(&lab.succeed("n1", &[&[PEER], &to[..]].concat()));
        assert_eq!(datagrams.lost, 0, "{address}");
        assert!(datagrams.answers.iter().all(|answer| answer.intact && answer.client == MESH));
    }
    // curl: 56 is a reset while receiving.
    assert_eq!(get("http://localhost:8009").status.code(), Some(56), "nobody listens there");
    // Others get there as ever.
    download(&lab, "client", "http://10.77.0.11:8080");

    daemon.terminate();
    assert_eq!(get("http://localhost:8080").status.code(), Some(7), "connection refused");
    assert!(!has_link(&lab));
}

#[test]
fn clients_on_the_node_itself_reach_what_is_published_on_its_ipv6_addresses() {
    let (lab, _echo) = publishing_lab();
    publish_ipv6(
        &lab,
        "name = \"b1\"\nvtep = \"10.77.0.101\"\naddress = \"fd00:99::1\"\nmac = \"02:42:0a:63:01:01\"\n",
    );
    // What workers take them for.
    let allowed = "mode = \"nat\"\nallow = [\"169.254.77.1\", \"fe80::a9fe:4d01\"]\n";
    lab.write_config("n1", "n1.toml", "mode = \"nat\"\n", allowed);
    let _daemon = Daemon::start(&lab, "n1");
    let get = |url: &str| lab.run("n1", &["curl", "-sSf", "--max-time", "5", url]);
    for address in ["localhost", "[::1]", "[2001:db8:77::11]"] {
        let url = format!("http://{address}:8086");
        wait_until(&format!("{url} answers"), 10, || {
            let answer = String::from_utf8(get(&url).stdout).unwrap();
            answer.contains("backend=b1") && answer.contains(&format!("client={MESH6}"))
        });
        download(&lab, "n1", &url);
    }
    assert_eq!(get("http://127.0.0.1:8086").status.code(), Some(7), "it is not published there");
    for (address, mesh) in [("127.0.0.1", MESH), ("::1", MESH6), ("2001:db8:77::11", MESH6)] {
        let to = ["udp", "--to", address, "--port", "5353", "--count", "20", "--size", "512"];
        let datagrams: Datagrams = parse(&lab.succeed("n1", &[&[PEER], &to[..]].concat()));
        assert_eq!(datagrams.lost, 0, "{address}");
        assert!(datagrams.answers.iter().all(|answer| answer.intact && answer.client == mesh));
    }
}

#[test]
fn clients_elsewhere_are_not_served_by_what_is_there_for_the_node_itself() {
    let (lab, _echo) = publishing_lab();
    let _daemon = Daemon::start(&lab, "n1");
    let url = "http://192.0.2.5:8080";
    // What no worker takes comes to the kernel: by an interface that is not ours.
    for command in [
        "link add other type veth peer name outside netns ROUTER",
        "address add 192.0.2.5/24 dev other",
        "link set other up",
    ] {
        let command = command.replace("ROUTER", &lab.namespace("router"));
        let words: Vec<&str> = ["ip"].into_iter().chain(command.split(' ')).collect();
        lab.succeed("n1", &words);
    }
    lab.succeed("router", &["ip", "address", "add", "192.0.2.1/24", "dev", "outside"]);
    lab.succeed("router", &["ip", "link", "set", "outside", "up"]);
    lab.succeed("n1", &["curl", "-sSf", "--max-time", "5", url]);
    let refused = lab.run("router", &["curl", "-sS", "--max-time", "2", url]);
    assert_eq!(refused.status.code(), Some(28), "it is as if nobody were there");
}

#[test]
fn the_nodes_own_connections_take_no_published_port_for_theirs() {
    let (lab, _echo) = publishing_lab();
    let _daemon = Daemon::start(&lab, "n1");
    let program = "import socket\n\
        open('/proc/sys/net/ipv4/ip_local_port_range', 'w').write('8080 8081')\n\
        connection = socket.create_connection(('10.77.0.101', 80), 5)\n\
        assert connection.getsockname()[1] == 8081, connection.getsockname()\n\
        datagrams = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]\n\
        open('/proc/sys/net/ipv4/ip_local_port_range', 'w').write('5352 5353')\n\
        datagrams[0].connect(('10.77.0.101', 9))\n\
        assert datagrams[0].getsockname()[1] == 5352, datagrams[0].getsockname()\n\
        try: datagrams[1].connect(('10.77.0.101', 9))\n\
        except OSError: pass\n\
        else: raise AssertionError(datagrams[1].getsockname())\n";
    lab.succeed("n1", &["python3", "-c", program]);
}

#[test]
fn tasks_on_this_very_node_serve_its_own_clients_and_others() {
    let lab = bare_lab_of(&["--nodes", "1", "--backends", "1"]);
    let device =
        "link add vx200 address 02:42:0a:63:01:09 type vxlan id 200 local 10.77.0.11 dstport 4789";
    let [v4, v6] =
        ["address add 10.99.1.9/24 dev vx200", "address add fd00:99::9/64 dev vx200 nodad"];
    for command in [device, v4, v6, "link set vx200 up"] {
        let words: Vec<&str> = ["ip"].into_iter().chain(command.split(' ')).collect();
        lab.succeed("n1", &words);
    }
    let _servers = ["10.99.1.9", "fd00:99::9"].map(|address| serve_big(&lab, address));
    publish(&lab, ON_N1);
    publish_ipv6(
        &lab,
        "name = \"here\"\nvtep = \"10.77.0.11\"\naddress = \"fd00:99::9\"\n\
         mac = \"02:42:0a:63:01:09\"\n",
    );
    let daemon = Daemon::start(&lab, "n1");
    for (host, url) in [
        ("client", "http://10.77.0.11:8080"),
        ("n1", "http://localhost:8080"),
        ("client", "http://[2001:db8:77::11]:8086"),
        ("n1", "http://localhost:8086"),
    ] {
        wait_until(&format!("{url} answers on {host}"), 10, || answers(&lab, host, url));
        download(&lab, host, url);
    }
    assert_eq!(daemon.status()["services"][0]["backends"][0]["state"], "active");
    let none = json!({});
    assert_eq!(daemon.status()["local_refused"], none);
}

#[test]
fn a_port_of_another_program_on_the_node_is_told_and_others_are_served() {
    let (lab, _echo) = publishing_lab();
    let _other = lab.start("n1", &["python3", "-m", "http.server", "8080", "--bind", "0.0.0.0"]);
    wait_until("the other program listens", 10, || {
        lab.run("n1", &["curl", "-sf", "http://127.0.0.1:8080"]).status.success()
    });
    let daemon = Daemon::start(&lab, "n1");
    wait_until("the port is told", 5, || !daemon.status()["local_refused"]["8080/tcp"].is_null());
    assert!(daemon.log().contains("clients on this node don't reach 8080/tcp"), "{}", daemon.log());
    wait_until("others are served", 10, || answers(&lab, "client", "http://10.77.0.11:8080"));
    assert_eq!(daemon.status()["local_refused"].as_object().unwrap().len(), 1);
}
