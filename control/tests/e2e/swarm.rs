//! A real Docker Swarm, laid out by `scripts/lab-swarm`: real engines, real tasks, the docker CLI as in
//! Docker's tutorials. Each test has a swarm of its own, which is up within seconds.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::Value;

use crate::{
    client::{Held, Load, NO_ERRORS, Vip, get, load, outage, parse, send_datagrams},
    daemon::Daemon,
    lab::{Background, Lab, PEER, bounded, wait_until},
    wire::{Translated, forge_reset},
};

/// How long a swarm may take to place a task and start its container.
const STARTED_S: u64 = 90;
/// How long engines may take to agree again on who leads: Docker's own business, and sometimes a minute.
const AGREED_S: u64 = 180;
/// How long Wiremesh may take to see what Docker has decided.
const SEEN: Duration = Duration::from_secs(1);

/// Writes a node's config: as little as an operator would.
fn configure(lab: &Lab, node: &str, api: &str, swarm: &str) {
    let path = |name: &str| lab.file(name).display().to_string();
    let text = format!(
        "[node]\nname = \"{node}\"\ninterfaces = [\"eth0\"]\n\n\
         [api]\nsocket = \"{}\"\nstate_directory = \"{}\"\n{api}\n\
         [dataplane]\nhang_timeout_ms = 10000\n\n\
         [source.swarm]\nsocket = \"{}\"\n{swarm}\n",
        path(&format!("{node}.sock")),
        path(&format!("{node}.state")),
        path(&format!("{node}/docker.sock")),
    );
    fs::write(lab.file(&format!("{node}.toml")), text).unwrap();
}

fn start(lab: &Lab, node: &str) -> Daemon {
    start_with(lab, node, "")
}

/// `swarm` are keys of `[source.swarm]`, and tables behind it.
fn start_with(lab: &Lab, node: &str, swarm: &str) -> Daemon {
    configure(lab, node, "", swarm);
    let daemon = Daemon::start(lab, node);
    wait_until("the swarm is read", 10, || status(&daemon)["fresh"] == true);
    daemon
}

/// `docker service create`, without waiting for its tasks.
fn create(lab: &Lab, words: &str) {
    lab.docker("n1", &format!("service create -q -d --no-resolve-image {words}"));
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// What a manager's daemon knows of the swarm.
fn table(daemon: &Daemon) -> Value {
    json(&daemon.get("/v1/swarm"))["table"].clone()
}

/// A service in it; null if it is not there.
fn service(daemon: &Daemon, name: &str) -> Value {
    let table = table(daemon);
    let services = table["services"].as_array().unwrap();
    services.iter().find(|s| s["spec"]["name"] == name).cloned().unwrap_or_default()
}

/// The weights of a service's tasks.
fn weights(daemon: &Daemon, name: &str) -> Vec<u64> {
    let service = service(daemon, name);
    let tasks = service["tasks"].as_array();
    tasks.into_iter().flatten().map(|task| task["weight"].as_u64().unwrap()).collect()
}

fn ports(daemon: &Daemon, name: &str) -> Vec<String> {
    let service = service(daemon, name);
    let ports = service["spec"]["ports"].as_array();
    ports.into_iter().flatten().map(|port| port.as_str().unwrap().to_owned()).collect()
}

fn status(daemon: &Daemon) -> Value {
    daemon.status()["swarm"].clone()
}

/// Must hold soon after what was done just now.
fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    wait_until(what, 5, &mut holds);
    let took = begun.elapsed();
    // The test's own question takes time, too, on a machine that starts containers.
    assert!(took < SEEN + Duration::from_millis(500), "{what}: {took:?}");
}

#[test]
fn what_docker_decides_is_seen_within_a_second() {
    let lab = Lab::swarm(&[]);
    let daemon = start(&lab, "n1");
    create(&lab, "--name web --replicas 3 --publish 8080:80 --stop-grace-period 3s server");
    wait_until("three tasks run", STARTED_S, || weights(&daemon, "web") == [1, 1, 1]);
    assert_eq!(ports(&daemon, "web"), ["8080:80/tcp"]);

    lab.docker("n1", "service scale -d web=1");
    soon("two tasks drain", || {
        let mut weights = weights(&daemon, "web");
        weights.sort_unstable();
        weights == [0, 0, 1]
    });
    wait_until("they are gone", 10, || weights(&daemon, "web") == [1]);

    // A port that Docker chooses, and one of host mode, which is none of ours.
    create(
        &lab,
        "--name more --publish target=80 --publish published=9000,target=81,mode=host server",
    );
    soon("a service is there", || ports(&daemon, "more").len() == 1);
    assert!(ports(&daemon, "more")[0].ends_with(":80/tcp"));
    lab.docker("n1", "service update -q -d --publish-add 5353:5353/udp more");
    soon("a port is published", || ports(&daemon, "more").contains(&"5353:5353/udp".to_owned()));
    lab.docker("n1", "service update -q -d --publish-rm 80 more");
    soon("a port is withdrawn", || ports(&daemon, "more") == ["5353:5353/udp"]);

    lab.docker("n1", "service update -q -d --label-add wiremesh.locality=nearby web");
    soon("a wrong label is remarked", || {
        let remarks = status(&daemon)["remarks"].to_string();
        remarks.contains("wiremesh.locality") && remarks.contains("prefer or require")
    });
    assert_eq!(weights(&daemon, "web"), [1], "and the rest goes on");
    assert_eq!(daemon.log().matches("wiremesh.locality").count(), 1, "said once");

    lab.docker("n1", "service rm web");
    soon("a service is gone", || service(&daemon, "web").is_null());
}

#[test]
fn tasks_leave_a_node_that_is_drained() {
    let lab = Lab::swarm(&[]);
    let daemon = start(&lab, "n1");
    create(&lab, "--name web --mode global --publish 8080:80 --stop-grace-period 3s server");
    wait_until("each node has a task", STARTED_S, || weights(&daemon, "web") == [1, 1, 1]);
    lab.docker("n1", "node update --availability drain n2");
    soon("one drains", || weights(&daemon, "web").contains(&0));
    wait_until("it is gone", 10, || weights(&daemon, "web") == [1, 1]);
}

#[test]
fn a_swarm_that_can_no_longer_be_read_stays_as_it_was_last_known() {
    let lab = Lab::swarm(&["--managers", "3"]);
    let daemon = start(&lab, "n1");
    create(&lab, "--name web --replicas 2 --publish 8080:80 --constraint node.hostname==n1 server");
    wait_until("two tasks run", STARTED_S, || weights(&daemon, "web") == [1, 1]);

    // Without a quorum the engine answers, but not for the swarm.
    lab.engine("n2", "kill");
    lab.engine("n3", "kill");
    wait_until("that is said", AGREED_S, || status(&daemon)["fresh"] == false);
    assert!(!status(&daemon)["reason"].is_null());
    assert_eq!(weights(&daemon, "web"), [1, 1]);
    assert!(daemon.get("/metrics").contains("wiremesh_swarm_fresh 0"));
    lab.engine("n2", "start");
    wait_until("it is read again", AGREED_S, || status(&daemon)["fresh"] == true);

    lab.engine("n1", "kill");
    wait_until("that is said", 30, || status(&daemon)["fresh"] == false);
    assert_eq!(weights(&daemon, "web"), [1, 1]);
    lab.engine("n1", "start");
    wait_until("it is read again", AGREED_S, || status(&daemon)["fresh"] == true);
}

/// A certificate of `authority` for an address, and its key; files in PEM.
fn sign(lab: &Lab, authority: &Issuer<'_, KeyPair>, name: &str, address: &str) {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec![address.to_owned()]).unwrap();
    let certificate = params.signed_by(&key, authority).unwrap();
    fs::write(lab.file(&format!("{name}.crt")), certificate.pem()).unwrap();
    fs::write(lab.file(&format!("{name}.key")), key.serialize_pem()).unwrap();
}

/// An authority, and what `[api]` says to have a certificate of it.
fn certify<'a>(lab: &'a Lab, nodes: &[(&str, &str)]) -> impl Fn(&str) -> String + 'a {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let own = params.self_signed(&key).unwrap();
    fs::write(lab.file("ca.crt"), own.pem()).unwrap();
    let authority = Issuer::new(params, key);
    for (node, address) in nodes {
        sign(lab, &authority, node, address);
    }
    let path = |lab: &Lab, name: &str| lab.file(name).display().to_string();
    move |node| {
        format!(
            "certificate = \"{}\"\nkey = \"{}\"\nclient_ca = \"{}\"\n",
            path(lab, &format!("{node}.crt")),
            path(lab, &format!("{node}.key")),
            path(lab, "ca.crt")
        )
    }
}

#[test]
fn a_worker_is_told_by_a_manager_by_tls() {
    let lab = Lab::swarm(&[]);
    let tls = certify(&lab, &[("n1", "10.78.0.11"), ("n2", "10.78.0.12")]);
    configure(&lab, "n1", &format!("listen = [\"10.78.0.11:9443\"]\n{}", tls("n1")), "");
    // The first does not answer: the second is asked.
    let managers = "managers = [\"https://10.78.0.13:9443\", \"https://10.78.0.11:9443\"]";
    configure(&lab, "n2", &tls("n2"), managers);
    let manager = Daemon::start(&lab, "n1");
    let worker = Daemon::start(&lab, "n2");
    create(&lab, "--name web --replicas 2 --publish 8080:80 --stop-grace-period 3s server");
    wait_until("the worker knows of two tasks", STARTED_S, || status(&worker)["tasks"] == 2);
    let told = status(&worker);
    assert_eq!((&told["from"], &told["fresh"]), (&"managers".into(), &true.into()), "{told}");
    assert!(told["mesh_address"].is_string(), "from its own engine: {told}");

    lab.docker("n1", "service update -q -d --label-add wiremesh.weight=x web");
    soon("the worker hears of a label", || {
        status(&worker)["remarks"].to_string().contains("weight")
    });
    // Who shows no certificate is told nothing.
    let bare = ["curl", "-sk", "--max-time", "5", "https://10.78.0.11:9443/v1/swarm"];
    assert!(!lab.run("n2", &bare).status.success());

    manager.terminate();
    wait_until("the worker says so", 30, || status(&worker)["fresh"] == false);
    assert_eq!(status(&worker)["tasks"], 2);
    let _manager = Daemon::start(&lab, "n1");
    wait_until("the worker is told again", 30, || status(&worker)["fresh"] == true);
}

/// Asks an engine what the CLI would only do after a question.
fn remove_ingress(lab: &Lab, name: &str) {
    let socket = lab.file("n1/docker.sock");
    let remove = |socket: &Path| {
        let mut curl = bounded("curl");
        curl.args(["-sf", "-X", "DELETE", "--unix-socket"]).arg(socket);
        curl.arg(format!("http://docker/networks/{name}")).status().unwrap().success()
    };
    wait_until("the ingress network is removed", 20, || remove(&socket));
    let gone = |node: &str| {
        !lab.docker(node, "network ls --format {{.Name}}").lines().any(|other| other == name)
    };
    wait_until("no node has it", 20, || ["n1", "n2"].iter().all(|node| gone(node)));
}

#[test]
fn another_ingress_network_and_data_path_port_are_followed_and_an_encrypted_one_is_refused() {
    let lab = Lab::swarm(&["--nodes", "2", "--data-path-port", "7789"]);
    let daemon = start(&lab, "n1");
    let ingress = |key: &str| table(&daemon)["ingress"][key].clone();
    wait_until("the network is known", 10, || ingress("port") == 7789);
    remove_ingress(&lab, "ingress");
    let network = "network create --driver overlay --ingress";
    lab.docker("n1", &format!("{network} --subnet 10.11.0.0/16 --opt encrypted secret"));
    wait_until("it is refused", 10, || {
        status(&daemon)["remarks"].to_string().contains("`secret` is encrypted")
    });
    remove_ingress(&lab, "secret");
    let mtu = "--opt com.docker.network.driver.mtu=1400";
    lab.docker("n1", &format!("{network} --subnet 10.12.0.0/16 {mtu} mine"));
    wait_until("the new one is known", 10, || ingress("name") == "mine");
    assert_eq!((ingress("mtu"), ingress("port")), (1400.into(), 7789.into()));
    // Docker brings the network to a node with the first task there.
    create(&lab, "--name web --mode global --publish 8080:80 server");
    wait_until("this node has an address there", STARTED_S, || {
        status(&daemon)["mesh_address"].as_str().is_some_and(|a| a.starts_with("10.12."))
    });
}

// --- with traffic ---------------------------------------------------------------------------------

/// What each node is asked by; the server sees an address of the overlay, never the same.
const fn on_node(address: &'static str, url: &'static str) -> Vip {
    Vip { address, url, client: "" }
}
const NODES: [Vip; 3] = [
    on_node("10.78.0.11", "http://10.78.0.11:8080"),
    on_node("10.78.0.12", "http://10.78.0.12:8080"),
    on_node("10.78.0.13", "http://10.78.0.13:8080"),
];

/// Wiremesh on each of three nodes, which are managers all.
fn mesh(options: &[&str]) -> (Lab, [Daemon; 3]) {
    let lab = Lab::swarm(&[&["--managers", "3"], options].concat());
    let daemons = ["n1", "n2", "n3"].map(|node| start(&lab, node));
    (lab, daemons)
}

/// How many backends of a service take new connections.
fn active(daemon: &Daemon, name: &str) -> usize {
    let (_, backends) =
        daemon.call("GET", &format!("/v1/services/{name}/backends"), &Value::Null, "");
    let backends = backends.as_array().into_iter().flatten();
    backends.filter(|backend| backend["state"] == "active").count()
}

fn wait_for_active(daemons: &[Daemon], name: &str, count: usize) {
    wait_until(&format!("{count} tasks of {name} serve"), STARTED_S, || {
        daemons.iter().all(|daemon| active(daemon, name) == count)
    });
}

/// Whether the client is answered.
fn answers(lab: &Lab, url: &str) -> bool {
    lab.run("client", &["curl", "-sf", "--max-time", "2", "-o", "/dev/null", url]).status.success()
}

/// Connections through a node that ask every second; [`parse`] what it prints to a list of [`Held`].
fn hold(lab: &Lab, vip: Vip, connections: &str, seconds: &str) -> Background {
    let ready = lab.file("holding");
    let _ = fs::remove_file(&ready);
    let ready_path = ready.to_str().unwrap();
    let url = format!("{}/", vip.url);
    let hold = [PEER, "hold", "--url", &url, "--connections", connections, "--seconds", seconds];
    let more = ["--pause", "1", "--ready", ready_path];
    let holding = lab.start("client", &[&hold[..], &more].concat());
    wait_until("all connections are open", 30, || ready.exists());
    holding
}

#[test]
fn any_node_answers_as_in_the_tutorials_with_or_without_a_replica() {
    let (lab, daemons) = mesh(&[]);
    // As in the tutorial of mongo-express: another port than it listens on; and one over UDP.
    let ports = "--publish published=8080,target=8081 --publish 5353:5353/udp";
    create(&lab, &format!("--name web --replicas 1 {ports} server http=8081 udp=5353"));
    wait_for_active(&daemons, "web", 1);
    for vip in NODES {
        wait_until("the node answers", 5, || answers(&lab, vip.url));
        assert!(get(&lab, vip).client.starts_with("10.0.0."));
        assert_eq!(send_datagrams(&lab, vip, 20, 512).lost, 0, "{}", vip.address);
    }

    // 10 MB both ways, from clients of two MTUs, through the overlay's 1450.
    lab.succeed("client", &["truncate", "-s", "10000000", lab.file("big").to_str().unwrap()]);
    for mtu in ["1500", "1400"] {
        lab.succeed("client", &["ip", "link", "set", "eth0", "mtu", mtu]);
        for vip in NODES {
            let curl = ["curl", "-sSf", "--max-time", "30"];
            let down = format!("{}/bytes/10000000", vip.url);
            let size = ["-o", "/dev/null", "-w", "%{size_download}", &down];
            assert_eq!(lab.succeed("client", &[&curl[..], &size].concat()), "10000000");
            let (big, up) = (lab.file("big"), format!("{}/upload/", vip.url));
            let sent = ["-T", big.to_str().unwrap(), &up];
            assert_eq!(lab.succeed("client", &[&curl[..], &sent].concat()), "10000000\n");
        }
    }

    // A label publishes without a restart of the task.
    let task = lab.docker("n1", "service ps -q web");
    lab.docker("n1", "service update -q -d --label-add wiremesh.publish=9090:8081/tcp web");
    wait_until("the label is followed", 5, || answers(&lab, "http://10.78.0.13:9090/"));
    assert_eq!(lab.docker("n1", "service ps -q web"), task);
    // And a list of clients shuts the others out.
    lab.docker("n1", "service update -q -d --label-add wiremesh.allow=192.0.2.0/24 web");
    wait_until("the client is refused", 5, || !answers(&lab, "http://10.78.0.13:9090/"));
    lab.docker("n1", "service update -q -d --label-add wiremesh.allow=198.51.100.0/24 web");
    wait_until("the client is let in", 5, || answers(&lab, "http://10.78.0.13:9090/"));

    lab.docker("n1", "service update -q -d --publish-add 9091:8081 web");
    wait_until("another port is published live", STARTED_S, || {
        NODES.iter().all(|vip| answers(&lab, &format!("http://{}:9091/", vip.address)))
    });
    lab.docker("n1", "service update -q -d --publish-rm 8081 web");
    wait_until("it is withdrawn live", 5, || !answers(&lab, "http://10.78.0.12:9091/"));
}

#[test]
fn haproxy_in_front_of_three_nodes_balances_over_three_replicas() {
    let (lab, daemons) = mesh(&[]);
    create(&lab, "--name web --replicas 3 --publish published=8080,target=80 server");
    wait_for_active(&daemons, "web", 3);
    let servers: String =
        NODES.iter().map(|vip| format!("server {0} {0}:8080\n", vip.address)).collect();
    let config = lab.file("haproxy.cfg");
    let text = format!(
        "defaults\nmode http\ntimeout connect 5s\ntimeout client 10s\ntimeout server 10s\n\
         option http-server-close\nlisten web\nbind 127.0.0.1:8000\nbalance roundrobin\n{servers}"
    );
    fs::write(&config, text).unwrap();
    let _haproxy = lab.start("client", &["haproxy", "-db", "-f", config.to_str().unwrap()]);
    let proxy = on_node("127.0.0.1", "http://127.0.0.1:8000");
    wait_until("HAProxy answers", 10, || answers(&lab, proxy.url));
    let load = load(&lab, proxy, 300);
    assert_eq!((load.ok, &load.errors), (300, &NO_ERRORS));
    assert_eq!(load.backends.len(), 3, "{load:?}");
    assert!(load.backends.values().all(|count| (90..=110).contains(count)), "{load:?}");
}

#[test]
fn scaling_breaks_no_connection_and_gives_none_to_a_task_that_leaves() {
    let (lab, daemons) = mesh(&[]);
    create(&lab, "--name web --replicas 2 --publish 8080:80 --stop-grace-period 30s server");
    wait_for_active(&daemons, "web", 2);
    let holding = hold(&lab, NODES[0], "1000", "25");
    lab.docker("n1", "service scale -d web=5");
    wait_until("five tasks run", STARTED_S, || weights(&daemons[0], "web").len() == 5);
    // Shown once workers have acknowledged it. How long requests take is the machine's business.
    soon("all five take new connections", || active(&daemons[0], "web") == 5);
    let used = load(&lab, NODES[0], 100);
    assert_eq!((&used.errors, used.backends.len()), (&NO_ERRORS, 5), "{used:?}");

    lab.docker("n1", "service scale -d web=2");
    // 500 ms after Docker has decided nothing more goes to those that leave.
    thread::sleep(Duration::from_millis(500));
    let after = load(&lab, NODES[0], 300);
    assert_eq!((&after.errors, after.backends.len()), (&NO_ERRORS, 2), "{after:?}");
    let held: Vec<Held> = parse(&holding.finish());
    let broken = held.iter().filter(|connection| connection.outcome != "kept").count();
    assert_eq!((held.len(), broken), (1000, 0));
}

#[test]
fn a_killed_task_is_avoided_within_a_second_and_its_connections_are_reset() {
    let (lab, daemons) = mesh(&[]);
    let once = "--restart-condition none --hostname {{.Node.Hostname}}";
    create(&lab, &format!("--name web --mode global {once} --publish 8080:80 server"));
    wait_for_active(&daemons, "web", 3);
    let holding = hold(&lab, NODES[0], "30", "12");
    let container = lab.docker("n2", "ps -q");
    lab.docker("n2", &format!("kill {}", container.trim()));
    soon("it is avoided", || active(&daemons[0], "web") == 2);
    let after = load(&lab, NODES[0], 100);
    assert_eq!(
        (&after.errors, after.backends.contains_key("n2")),
        (&NO_ERRORS, false),
        "{after:?}"
    );
    let held: Vec<Held> = parse(&holding.finish());
    assert_eq!(held.iter().filter(|c| c.backend.as_deref() == Some("n2")).count(), 10);
    for connection in held {
        let lost = connection.backend.as_deref() == Some("n2");
        assert_eq!(connection.outcome, if lost { "reset" } else { "kept" }, "{connection:?}");
    }

    // A node without tasks forwards all the same; and another node's connections outlive a restart here.
    lab.docker("n1", "node update --availability drain n3");
    wait_until("its task leaves", 30, || active(&daemons[2], "web") == 1);
    assert_eq!(load(&lab, NODES[2], 20).errors, NO_ERRORS);
    let holding = hold(&lab, NODES[2], "20", "5");
    let [first, _second, _third] = daemons;
    first.terminate();
    let _first = Daemon::start(&lab, "n1");
    let held: Vec<Held> = parse(&holding.finish());
    assert!(held.iter().all(|connection| connection.outcome == "kept"), "{held:?}");
}

#[test]
fn a_node_that_is_cut_off_is_avoided_within_a_second_and_back_within_three() {
    let (lab, daemons) = mesh(&[]);
    let ports = "--publish 8080:80 --publish 5353:5353/udp";
    let names = "--hostname {{.Node.Hostname}}";
    create(&lab, &format!("--name web --mode global {names} {ports} server http=80 udp=5353"));
    wait_for_active(&daemons, "web", 3);
    daemons[0].wait_for_liveness(&["10.78.0.12", "10.78.0.13"], "alive");
    let cut = |cut| {
        lab.cut_off("n2", cut);
        if cut {
            thread::sleep(SEEN);
            assert_eq!(load(&lab, NODES[0], 60).errors, NO_ERRORS);
        }
    };
    let outage = outage(&lab, NODES[0], "n2", Duration::from_secs(2), cut);
    assert!(outage.avoided_s <= 1.0 && outage.back_s <= 3.0);
    let after = load(&lab, NODES[0], 60);
    assert_eq!((&after.errors, after.backends.len()), (&NO_ERRORS, 3), "{after:?}");
}

#[test]
fn a_stranger_in_a_tunnel_and_a_client_that_is_not_allowed_are_dropped_and_counted() {
    let (lab, daemons) = mesh(&[]);
    create(&lab, "--name web --constraint node.hostname==n2 --publish 8080:80 server");
    wait_for_active(&daemons, "web", 1);
    let daemon = &daemons[0];
    let holding = hold(&lab, NODES[0], "1", "10");
    let connection = Translated::of(&lab, daemon, NODES[0].address, "8080");
    let vni = table(daemon)["ingress"]["vni"].as_u64().unwrap() as u32;
    // One is no node at all, the other has no part in this connection.
    for stranger in ["client", "n3"] {
        let before = daemon.drops("spoofed_tunnel");
        forge_reset(&lab, stranger, &connection, NODES[0].address, vni);
        wait_until("the drop is counted", 5, || daemon.drops("spoofed_tunnel") > before);
    }
    lab.docker("n1", "service update -q -d --label-add wiremesh.allow=192.0.2.0/24 web");
    wait_until("the client is refused", 5, || !answers(&lab, NODES[0].url));
    assert!(daemon.drops("not_allowed") >= 1);
    let held: Vec<Held> = parse(&holding.finish());
    assert!(held.iter().all(|connection| connection.outcome == "kept"), "{held:?}");
}

#[test]
fn a_rolling_update_fails_no_request() {
    let (lab, daemons) = mesh(&[]);
    let web = "--name web --replicas 2 --publish 8080:80 --stop-grace-period 1s";
    create(&lab, &format!("{web} --update-delay 500ms --update-monitor 500ms server"));
    wait_for_active(&daemons, "web", 2);
    for (number, order) in ["start-first", "stop-first"].into_iter().enumerate() {
        let (url, done) = (format!("{}/", NODES[0].url), lab.file(&format!("{order}-done")));
        let steadily = ["load", "--url", &url, "--seconds", "90", "--rate", "210", "--until"];
        let steadily = [&[PEER], &steadily[..], &[done.to_str().unwrap()]].concat();
        let loading = lab.start("client", &steadily);
        let update =
            format!("service update -q -d --update-order {order} --env-add N={number} web");
        lab.docker("n1", &update);
        wait_until("the update is done", 60, || {
            let state = lab.docker("n1", "service inspect --format {{.UpdateStatus.State}} web");
            state.trim() == "completed"
        });
        thread::sleep(SEEN);
        fs::write(done, "").unwrap();
        let load: Load = parse(&loading.finish());
        println!("{order}: {} requests in {} s", load.ok, load.seconds);
        let wanted = 200.0 * load.seconds;
        assert!(load.ok as f64 >= wanted && load.backends.len() >= 3, "{order}: {load:?}");
        assert_eq!(load.errors, NO_ERRORS, "{order}");
    }
}

#[test]
fn without_a_quorum_traffic_goes_on() {
    let (lab, daemons) = mesh(&["--nodes", "4"]);
    let worker = "--constraint node.role==worker";
    create(&lab, &format!("--name web --replicas 2 {worker} --publish 8080:80 server"));
    wait_for_active(&daemons, "web", 2);
    let holding = hold(&lab, NODES[0], "20", "8");
    lab.engine("n2", "kill");
    lab.engine("n3", "kill");
    wait_until("the quorum is lost", AGREED_S, || status(&daemons[0])["fresh"] == false);
    // Wiremesh is there even where Docker is not.
    for vip in NODES {
        assert_eq!(load(&lab, vip, 20).errors, NO_ERRORS, "{}", vip.address);
    }
    let held: Vec<Held> = parse(&holding.finish());
    assert!(held.iter().all(|connection| connection.outcome == "kept"), "{held:?}");
}

/// This node's mesh addresses beside Docker's, as far as they are found.
fn further(daemon: &Daemon, key: &str) -> Vec<String> {
    let status = status(daemon);
    let all = status[key].as_array().into_iter().flatten();
    all.map(|address| address.as_str().unwrap().to_owned()).collect()
}

const FURTHER: &str = "further_mesh_addresses";
const LEAVING: &str = "leaving_mesh_addresses";

fn wait_for_further(daemon: &Daemon, count: usize) -> Vec<String> {
    wait_until("further mesh addresses are found", 30, || further(daemon, FURTHER).len() == count);
    further(daemon, FURTHER)
}

/// Ports of a mesh address that stand for connections.
fn ports_used(daemon: &Daemon, address: &str) -> u64 {
    let metrics = daemon.get("/metrics");
    let of = format!("address=\"{address}\"}} ");
    let used = metrics.lines().filter(|line| line.starts_with("wiremesh_nat_slots_used"));
    let used = used.filter_map(|line| line.split_once(&of));
    used.map(|(_, count)| count.parse::<u64>().unwrap()).sum()
}

#[test]
fn a_further_mesh_address_has_ports_of_its_own_until_docker_gives_it_away() {
    // Another data path port, and a network so small that Docker soon comes to its top.
    let lab = Lab::swarm(&["--nodes", "2", "--data-path-port", "7789"]);
    remove_ingress(&lab, "ingress");
    let tiny = "--subnet 10.13.0.0/28 --opt com.docker.network.driver.mtu=1400 tiny";
    lab.docker("n1", &format!("network create --driver overlay --ingress {tiny}"));
    create(&lab, "--name web --mode global --publish 8080:80 server");
    let nat = "mesh_addresses = 2\n[nat]\nfirst_port = 2000\nlast_port = 2019";
    let daemon = start_with(&lab, "n1", nat);
    wait_for_active(std::slice::from_ref(&daemon), "web", 2);
    let address = wait_for_further(&daemon, 1).remove(0);
    let own = status(&daemon)["mesh_address"].as_str().unwrap().to_owned();

    // More than one address has ports. Half of them are answered by a node with stock Docker only. Some clients
    // say nothing.
    let ready = lab.file("silent");
    let program = format!(
        "import select, socket, time\n\
         all = [socket.create_connection(('10.78.0.11', 8080)) for _ in range(8)]\n\
         open('{}', 'w')\n\
         poll, resets = select.poll(), 0\n\
         for one in all: poll.register(one, select.POLLIN)\n\
         ends = time.monotonic() + 60\n\
         while time.monotonic() < ends:\n\
         \x20   for fd, event in poll.poll(1000):\n\
         \x20       resets += bool(event & select.POLLERR)\n\
         \x20       poll.unregister(fd)\n\
         print(resets)\n",
        ready.display()
    );
    let silent = lab.start("client", &["python3", "-c", &program]);
    wait_until("the silent clients are connected", 10, || ready.exists());
    let holding = hold(&lab, NODES[0], "22", "60");
    let (by_own, by_further) = (ports_used(&daemon, &own), ports_used(&daemon, &address));
    assert!(by_own >= 10 && by_further >= 10, "{by_own} and {by_further}");

    // Docker gives it to a task that does not run yet.
    let late = "--replicas 1 --publish 8081:80 --constraint node.labels.late==yes";
    create(&lab, &format!("--name late {late} server"));
    let is_leaving = || further(&daemon, LEAVING) == [address.clone()];
    let mut tasks = 1;
    while !is_leaving() {
        tasks += 1;
        assert!(tasks < 12, "Docker never came to {address}");
        lab.docker("n1", &format!("service scale -d late={tasks}"));
        thread::sleep(Duration::from_millis(700));
    }
    let before = ports_used(&daemon, &address);
    thread::sleep(Duration::from_secs(3));
    assert_eq!(
        ports_used(&daemon, &address),
        before,
        "its connections go on, and no new ones come"
    );
    assert!(before >= 10, "{before}");
    assert!(answers(&lab, NODES[0].url));

    // Now it needs it.
    lab.docker("n1", "node update --label-add late=yes n2");
    wait_until("it is the task's", STARTED_S, || further(&daemon, LEAVING).is_empty());
    wait_until("it serves there", STARTED_S, || {
        service(&daemon, "late")["tasks"].to_string().contains(&address)
    });
    // Docker leaves others of its tasks pending, which has nothing to do with us.
    let serving = active(&daemon, "late");
    let answered = load(&lab, Vip { url: "http://10.78.0.11:8081", ..NODES[0] }, 12);
    assert_eq!((&answered.errors, answered.backends.len()), (&NO_ERRORS, serving), "{answered:?}");
    let held: Vec<Held> = parse(&holding.finish());
    let count = |outcome| held.iter().filter(|connection| connection.outcome == outcome).count();
    let (reset, silent) = (count("reset"), silent.finish().trim().parse::<usize>().unwrap());
    assert_eq!(reset + count("kept"), held.len(), "none hangs: {held:?}");
    assert_eq!((reset + silent) as u64, by_further, "{reset} and {silent}");
}

/// A process of a container, as seen from outside.
fn process_of(container: &str) -> String {
    let is_of = |process: &Path| {
        fs::read_to_string(process.join("cgroup")).is_ok_and(|groups| groups.contains(container))
    };
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let process = { processes }.find(|process| is_of(process)).expect("it runs");
    process.file_name().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn an_address_that_a_container_has_is_not_taken_though_docker_does_not_know() {
    let lab = Lab::swarm(&["--nodes", "2"]);
    create(&lab, "--name web --publish 8080:80 --constraint node.hostname==n2 server");
    let daemon = start(&lab, "n1");
    wait_for_active(std::slice::from_ref(&daemon), "web", 1);
    let own = status(&daemon)["mesh_address"].as_str().unwrap().to_owned();
    daemon.terminate();
    // The best one for this node.
    let last = 255 - own.rsplit('.').next().unwrap().parse::<u8>().unwrap();
    let container = lab.docker("n2", "ps -q");
    let add = format!("ip address add 10.0.0.{last}/24 dev eth0");
    let enter = ["-n", "-t", &process_of(container.trim())];
    let added = bounded("nsenter").args(enter).args(add.split(' ')).status().unwrap();
    assert!(added.success());
    let daemon = start_with(&lab, "n1", "mesh_addresses = 2");
    assert_eq!(wait_for_further(&daemon, 1), [format!("10.0.0.{}", last - 1)]);
}

#[test]
fn nodes_that_want_the_same_address_find_that_out() {
    let lab = Lab::swarm(&["--nodes", "2", "--managers", "2"]);
    create(&lab, "--name web --mode global --publish 8080:80 server");
    let look = |node| {
        let networks = json(&lab.docker(node, "network inspect ingress"));
        let address = networks[0]["Containers"]["ingress-sbox"]["IPv4Address"].as_str()?;
        address.trim_start_matches("10.0.0.").trim_end_matches("/24").parse::<u8>().ok()
    };
    let endpoint = |node| {
        wait_until("the node is in the ingress network", 10, || look(node).is_some());
        look(node).unwrap()
    };
    // Where each begins, Docker has decided: so the first is given more than it would leave to the second.
    let mut nodes = ["n1", "n2"].map(|node| (endpoint(node), node));
    nodes.sort_unstable();
    let [(low, first), (high, second)] = nodes;
    let address = |last| format!("10.0.0.{last}");
    let of_first = (0..3).map(|index| address(254 - (low - 1) * 3 - index)).collect::<Vec<_>>();
    let best = (0..).map(|index| address(254 - (high - 1) * 2 - index));
    let of_second = best.clone().filter(|address| !of_first.contains(address)).take(2);
    let of_second = of_second.collect::<Vec<_>>();
    assert!(of_second != best.take(2).collect::<Vec<_>>(), "they want the same");

    let first = start_with(&lab, first, "mesh_addresses = 4");
    assert_eq!(wait_for_further(&first, 3), of_first);
    let second = start_with(&lab, second, "mesh_addresses = 3");
    assert_eq!(wait_for_further(&second, 2), of_second);
    let daemons = [first, second];
    wait_for_active(&daemons, "web", 2);
    for ((_, node), daemon) in nodes.iter().zip(&daemons) {
        let vip = if *node == "n1" { NODES[0] } else { NODES[1] };
        let clients: BTreeSet<String> = (0..40).map(|_| get(&lab, vip).client).collect();
        let used = further(daemon, FURTHER);
        assert!(used.iter().all(|address| clients.contains(address)), "{clients:?}, {used:?}");
    }
}

#[test]
fn tunnels_end_where_the_data_path_has_an_address_of_its_own() {
    let lab = Lab::swarm(&["--nodes", "2", "--data-network"]);
    configure(&lab, "n1", "", "mesh_addresses = 2");
    lab.write_config("n1", "n1.toml", "[\"eth0\"]", "[\"eth0\", \"eth1\"]");
    let daemon = Daemon::start(&lab, "n1");
    let ports = "--publish 8080:80 --publish 5353:5353/udp";
    create(&lab, &format!("--name web --mode global {ports} server http=80 udp=5353"));
    wait_for_active(std::slice::from_ref(&daemon), "web", 2);
    wait_for_further(&daemon, 1);
    let load = load(&lab, NODES[0], 40);
    assert_eq!((&load.errors, load.backends.len()), (&NO_ERRORS, 2), "{load:?}");
    assert_eq!(send_datagrams(&lab, NODES[0], 20, 512).lost, 0);
    let far = daemon.get("/v1/services/web/backends");
    assert!(far.contains("10.79.0.12") && !far.contains("10.78.0.12"), "{far}");
}

#[test]
fn datagrams_are_answered_for_longer_than_a_kernel_believes_in_a_neighbour() {
    let lab = Lab::swarm(&["--nodes", "2"]);
    let daemon = start_with(&lab, "n1", "mesh_addresses = 2");
    // On the node with stock Docker, whose devices answer for no address that Docker has not given.
    let far = "--constraint node.hostname==n2 --publish 5353:5353/udp";
    create(&lab, &format!("--name dns {far} server udp=5353"));
    wait_for_active(std::slice::from_ref(&daemon), "dns", 1);
    wait_for_further(&daemon, 1);
    for _ in 0..8 {
        let datagrams = send_datagrams(&lab, NODES[0], 20, 512);
        assert_eq!(datagrams.lost, 0);
        let clients: BTreeSet<&str> = datagrams.answers.iter().map(|a| &*a.client).collect();
        assert_eq!(clients.len(), 2, "{clients:?}");
        thread::sleep(Duration::from_secs(4));
    }
}

#[test]
fn uninstalled_it_leaves_the_node_as_it_was() {
    let lab = Lab::swarm(&["--nodes", "2"]);
    create(&lab, "--name web --mode global --publish 8080:80 server");
    let running = || lab.docker("n1", "service ps web --format {{.CurrentState}}");
    wait_until("both tasks run", STARTED_S, || running().matches("Running").count() == 2);
    let look = || {
        let one = |words: &str| lab.succeed("n1", &words.split(' ').collect::<Vec<_>>());
        // Indices and counters of links that come later differ, and neighbours come and go.
        [
            "ip -br link",
            "ip -br address",
            "ip rule",
            "ip route show table all",
            "ip -6 route",
            "iptables-save -t nat",
            "iptables-save -t filter",
            "iptables-save -t mangle",
        ]
        .map(|words| without_comments(&one(words)))
    };
    let before = look();
    let daemon = start(&lab, "n1");
    wait_for_active(std::slice::from_ref(&daemon), "web", 2);
    assert!(lab.has_xdp("n1") && answers(&lab, NODES[0].url));
    daemon.terminate();
    assert!(!lab.has_xdp("n1"));
    assert_eq!(look(), before);
}

/// What `iptables-save` says of the time and of packets is not what it is asked for.
fn without_comments(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.split(" [").next().unwrap()).collect::<Vec<_>>().join("\n")
}
