//! The API over a real socket, asked by the command line's client, before a daemon that only plans.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Mutex, mpsc as std_mpsc},
    thread,
    time::Duration,
};

use dataplane::time::Tick;
use futures_util::FutureExt;
use hyper::{Method, StatusCode};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{runtime, sync::oneshot};

use super::{
    client::{Client, ClientError},
    *,
};
use crate::{
    config::Config,
    daemon,
    desired::{self, Desired, Protocol, ServicePort},
    liveness::Standing,
    offline::Offline,
    plan::{Inputs, Planner},
    source::{
        api::Store,
        swarm::{self, News, SwarmStatus},
    },
    status::Status,
};

const CONFIG: &str = r#"
    node.name = "n1"

    [[service]]
    name = "web"
    vip = "203.0.113.10"
    ports = ["80/tcp"]
    vni = 100
    backend = [
        { name = "web-1", vtep = "10.0.0.2", mac = "02:42:0a:00:00:02" },
        { name = "web-2", vtep = "10.0.0.3", mac = "02:42:0a:00:00:03", weight = 0 },
    ]
"#;

/// Serves the API for as long as it lives, before a daemon that plans, and sends no packet.
struct Rig {
    folder: Arc<TempDir>,
    addresses: Vec<std::net::SocketAddr>,
    views: watch::Sender<Arc<View>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// What a daemon with this configuration shows.
fn view(text: &str, generation: u64) -> Arc<View> {
    let (config, _) = Config::parse("test", text).unwrap();
    let Offline { forwarding, placements, .. } = Offline::new(&config, None).unwrap();
    Arc::new(View {
        generation,
        desired: config.desired,
        placements,
        vteps: Vec::new(),
        addresses: Vec::new(),
        forwarding,
        refused: None,
        local_refused: Default::default(),
        standings: Default::default(),
        link_missing: false,
        swarm: None,
    })
}

/// Takes over what the API wants, as the daemon does: joined with the file's, planned, shown.
struct PlanningDaemon {
    config: Config,
    planner: Planner,
    views: watch::Sender<Arc<View>>,
}

impl PlanningDaemon {
    fn want(&mut self, services: &[Arc<crate::desired::Service>]) -> Result<(), Refusal> {
        let Desired { services: file, overlays } = &self.config.desired;
        let desired = desired::join(&[file, services], overlays, &[], &mut Default::default())
            .map_err(|conflict| Refusal::Impossible(conflict.to_string()))?;
        let inputs = Inputs {
            desired: &desired,
            hops: &Default::default(),
            health: &Default::default(),
            next_hops: &[],
            interfaces: &[],
            addresses: &[],
            nat: None,
            vtep: None,
            vtep6: None,
            answer_arp: false,
            announce: false,
            offline: true,
            time: std::time::SystemTime::now(),
        };
        let plan = self.planner.plan(&inputs, Tick(0));
        let plan = plan.map_err(|error| Refusal::Impossible(error.to_string()))?;
        let generation = self.views.borrow().generation + 1;
        self.views.send_replace(Arc::new(View {
            generation,
            desired,
            placements: plan.placements,
            vteps: Vec::new(),
            addresses: Vec::new(),
            forwarding: Arc::new(plan.forwarding),
            refused: None,
            local_refused: Default::default(),
            standings: Default::default(),
            link_missing: false,
            swarm: None,
        }));
        Ok(())
    }
}

impl Rig {
    fn new(text: &str) -> Self {
        Self::start(text, Arc::new(tempfile::tempdir().unwrap()))
    }

    /// A process that dies without warning, and another one in its place.
    fn again(self, text: &str) -> Self {
        let folder = self.folder.clone();
        drop(self);
        Self::start(text, folder)
    }

    fn start(text: &str, folder: Arc<TempDir>) -> Self {
        let (config, _) = Config::parse("test", text).unwrap();
        let (views, seen) = watch::channel(view(text, 0));
        let (stop, stopped) = oneshot::channel();
        let (socket, state) = (folder.path().join("api.sock"), folder.path().join("state"));
        let (bound, ready) = std_mpsc::channel();
        let shown = views.clone();
        let thread = thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let socket = ApiSocket::bind(&socket, 0o600).await.unwrap();
                let (store, services) = Store::open(&state, &config.maglev).unwrap();
                let observed = Observed::without_workers(&config);
                let mut daemon =
                    PlanningDaemon { planner: daemon::planner(&config), config, views: shown };
                let kept: Vec<_> = services.values().cloned().collect();
                daemon.want(&kept).unwrap();
                let limits = daemon.config.limits.clone();
                let (changes, mut wanted) = Changes::start(store, services, limits, seen.clone());
                let doors = TcpDoor::open_all(&daemon.config.api).await.unwrap();
                bound.send(doors.iter().map(TcpDoor::address).collect()).unwrap();
                let taking = async {
                    while let Some(Wanted { services, outcome, .. }) = wanted.recv().await {
                        let _ = outcome.send(daemon.want(&services));
                    }
                };
                tokio::select! {
                    () = Api::new(observed, seen, changes).serve(socket, doors) => {}
                    () = taking => {}
                    _ = stopped => {}
                }
            });
        });
        let addresses = ready.recv().unwrap();
        Self { folder, addresses, views, stop: Some(stop), thread: Some(thread) }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("api.sock")
    }

    fn client(&self) -> Client {
        Client::new(&self.socket()).unwrap()
    }

    fn get(&self, path: &str) -> Value {
        self.client().get(path).unwrap()
    }

    /// Changes something; the version, or why not.
    fn change(
        &self,
        method: Method,
        path: &str,
        body: Value,
        version: &str,
    ) -> Result<String, Problem> {
        let body = (!body.is_null()).then_some(&body);
        let version = (!version.is_empty()).then_some(version);
        match self.client().change::<Value>(method, path, body, version) {
            Ok(changed) => Ok(changed["version"].as_str().unwrap_or_default().to_owned()),
            Err(ClientError::Refused(problem)) => Err(problem),
            other => panic!("{other:?}"),
        }
    }

    /// Asks by hand: the status, and the body if it is JSON.
    fn ask(&self, line: &str, head: &str, body: &str) -> (u16, Value) {
        let client = std::os::unix::net::UnixStream::connect(self.socket()).unwrap();
        asked(client, line, head, body)
    }

    fn create(&self, service: &Value) -> Result<String, Problem> {
        self.change(Method::POST, "/v1/services", service.clone(), "")
    }

    fn replace(&self, name: &str, service: &Value, version: &str) -> Result<String, Problem> {
        self.change(Method::PUT, &format!("/v1/services/{name}"), service.clone(), version)
    }

    fn remove(&self, name: &str, version: &str) -> Result<String, Problem> {
        self.change(Method::DELETE, &format!("/v1/services/{name}"), Value::Null, version)
    }

    /// Where the workers would send packets for a VIP.
    fn forwards(&self, vip: &str, port: u16) -> bool {
        let address: std::net::IpAddr = vip.parse().unwrap();
        self.views.borrow().forwarding.service_at(address.into(), 6, port).is_some()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
        let _ = self.thread.take().unwrap().join();
    }
}

#[test]
fn a_service_is_shown_with_its_owner_its_version_and_what_is_wanted() {
    let rig = Rig::new(CONFIG);
    let service = rig.get("/v1/services/web");
    assert_eq!(service["owner"], "file");
    assert_eq!(service["spec"]["backends"][1]["weight"], 0);
    assert_eq!(service["spec"]["vni"], 100);
    assert_eq!(
        service["backends"],
        json!({ "active": 1, "draining": 1, "drained": 0, "down": 0, "unreachable": 0 })
    );
    assert_eq!(rig.get("/v1/services"), json!([service]));
    let backends = rig.get("/v1/services/web/backends");
    assert_eq!(backends[1]["state"], "draining");
}

#[test]
fn a_version_names_what_is_wanted_and_nothing_else() {
    let rig = Rig::new(CONFIG);
    let version = || rig.get("/v1/services/web")["version"].clone();
    let first = version();
    rig.views.send_replace(view(CONFIG, 2));
    assert_eq!(version(), first);
    rig.views.send_replace(view(&CONFIG.replace("weight = 0", "weight = 1"), 3));
    assert_ne!(version(), first);
    rig.views.send_replace(view(CONFIG, 4));
    assert_eq!(version(), first);
}

#[test]
fn the_status_is_that_of_the_whole_node() {
    let rig = Rig::new(CONFIG);
    let status: Status = rig.client().get("/v1/status").unwrap();
    assert_eq!((&*status.node, status.generation), ("n1", 1));
    assert_eq!(status.services[0].backends[0].vtep, "10.0.0.2");
}

#[test]
fn what_is_not_there_is_a_problem_with_a_sentence() {
    let rig = Rig::new(CONFIG);
    for (method, path, status, detail) in [
        (Method::GET, "/v1/services/nosuch", 404, "there is no service `nosuch`"),
        (Method::GET, "/v2", 404, "there is no /v2: see /openapi.json"),
        (
            Method::GET,
            "/v1/services/%ff",
            404,
            "there is no such service: Invalid URL: Invalid UTF-8 in `name`",
        ),
        (
            Method::GET,
            "/v1/flows?top=all",
            400,
            "Failed to deserialize query string: top: invalid digit found in string: see /openapi.json",
        ),
        (Method::PATCH, "/v1/status", 405, "PATCH does nothing to /v1/status"),
    ] {
        let problem = rig.change(method, path, Value::Null, "").unwrap_err();
        assert_eq!((problem.status, &*problem.detail), (status, detail));
        let status = StatusCode::from_u16(problem.status).unwrap();
        assert_eq!(Some(&*problem.title), status.canonical_reason());
    }
}

#[test]
fn over_tcp_it_answers_who_means_this_machine() {
    use std::io::{Read, Write};
    let rig = Rig::new(&format!(
        "[api]\nlisten = [\"127.0.0.1:0\"]\n{}",
        CONFIG.replace("node.name = \"n1\"", "")
    ));
    let asked = |host: &str| {
        let mut client = std::net::TcpStream::connect(rig.addresses[0]).unwrap();
        write!(client, "GET /v1/services HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer[9..12].to_owned()
    };
    for host in ["localhost", "127.0.0.1:9180", "[::1]:80"] {
        assert_eq!(asked(host), "200", "{host}");
    }
    assert_eq!(asked("rebound.example"), "421");
}

/// What `/metrics` says.
fn metrics(rig: &Rig) -> String {
    use std::io::{Read, Write};
    let mut client = std::os::unix::net::UnixStream::connect(rig.socket()).unwrap();
    client.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("content-type: text/plain; version=0.0.4"), "{answer}");
    answer
}

#[test]
fn metrics_are_numbers_with_words_and_their_series_are_bounded() {
    let text = metrics(&Rig::new(CONFIG));
    for line in [
        "wiremesh_services{owner=\"file\"} 1",
        "wiremesh_backends{state=\"draining\"} 1",
        "wiremesh_service_active_backends{service=\"web\"} 1",
        "wiremesh_backend_weight{service=\"web\",backend=\"web-2\"} 0",
        "wiremesh_series_left_out 0",
        "wiremesh_generation 1",
    ] {
        assert!(text.lines().any(|found| found == line), "no {line} in {text}");
    }
    // One service and one backend may have their own; the other backend is left out.
    let text = metrics(&Rig::new(&format!(
        "[api]\nmetrics_limit = 1\n{}",
        CONFIG.replace("node.name = \"n1\"", "")
    )));
    assert!(text.contains("wiremesh_series_left_out 1\n"), "{text}");
    assert!(text.contains("backend=\"web-1\"") && !text.contains("backend=\"web-2\""), "{text}");
    assert!(text.contains("wiremesh_backends{state=\"draining\"} 1"), "the sum has it");
}

#[test]
fn a_silent_node_is_shown_and_counted() {
    let text = "[api]\nmetrics_limit = 2\n[[service]]\nname = \"web\"\nvip = \"192.0.2.1\"\n\
         ports = [\"80/tcp\"]\nvni = 1\n[[service.backend]]\nname = \"b\"\nvtep = \"10.0.0.2\"\n\
         mac = \"02:00:00:00:00:02\"\n";
    let rig = Rig::new(text);
    let silent = Standing::Silent { reason: "silence".to_owned() };
    let standings =
        [(2, silent), (3, Standing::Alive), (4, Standing::Alive), (5, Standing::Unknown)];
    let address = |last| std::net::IpAddr::from([10, 0, 0, last]);
    let standings = standings.map(|(last, standing)| (address(last), standing));
    let shown = Arc::into_inner(view(text, 2)).unwrap();
    rig.views.send_replace(Arc::new(View { standings: Arc::new(standings.into()), ..shown }));
    let nodes = rig.client().get::<Value>("/v1/nodes").unwrap();
    assert_eq!(nodes[0]["liveness"], Value::Null, "this node pings others");
    assert_eq!((&nodes[1]["vtep"], &nodes[1]["liveness"]), (&"10.0.0.2".into(), &"silent".into()));
    let text = metrics(&rig);
    for line in [
        "wiremesh_vteps{liveness=\"alive\"} 2",
        "wiremesh_vteps{liveness=\"silent\"} 1",
        "wiremesh_vteps{liveness=\"unknown\"} 1",
        "wiremesh_vtep_alive{vtep=\"10.0.0.2\"} 0",
        "wiremesh_vtep_alive{vtep=\"10.0.0.3\"} 1",
        "wiremesh_series_left_out 1",
    ] {
        assert!(text.lines().any(|found| found == line), "no {line} in {text}");
    }
    assert!(!text.contains("vtep=\"10.0.0.4\"") && !text.contains("vtep=\"10.0.0.5\""), "{text}");
}

/// A service of one backend.
/// Asks by hand, and writes all of it whatever is answered: the status, and the body if it is JSON.
fn asked(
    mut client: impl std::io::Read + std::io::Write,
    line: &str,
    head: &str,
    body: &str,
) -> (u16, Value) {
    let length = body.len();
    write!(
        client,
        "{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Length: {length}\r\n{head}\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    (answer[9..12].parse().unwrap(), serde_json::from_str(body).unwrap_or_default())
}

fn shop(vip: &str, ports: &[&str], weight: u16) -> Value {
    json!({
        "name": "shop", "vip": vip, "ports": ports, "vni": 7,
        "backends": [
            { "name": "shop-1", "vtep": "10.0.0.9", "mac": "02:00:00:00:00:09", "weight": weight },
        ],
    })
}

#[test]
fn a_service_is_created_replaced_and_removed() {
    let rig = Rig::new(CONFIG);
    let (one, two) = (shop("203.0.113.20", &["80/tcp"], 1), shop("203.0.113.20", &["81/tcp"], 1));
    let first = rig.create(&one).unwrap();
    assert!(rig.forwards("203.0.113.20", 80));
    let shown = rig.get("/v1/services/shop");
    assert_eq!((&shown["owner"], &shown["spec"]), (&json!("api"), &one));
    assert_eq!(shown["version"], *first);

    let second = rig.replace("shop", &two, &first).unwrap();
    assert_ne!(first, second);
    assert!(!rig.forwards("203.0.113.20", 80) && rig.forwards("203.0.113.20", 81));
    assert_eq!(rig.get("/v1/services/shop")["spec"], two);

    rig.remove("shop", &second).unwrap();
    assert!(!rig.forwards("203.0.113.20", 81));
    assert_eq!(rig.get("/v1/services").as_array().unwrap().len(), 1);
}

#[test]
fn what_was_acknowledged_is_there_after_a_restart() {
    let rig = Rig::new(CONFIG);
    let one = shop("203.0.113.20", &["80/tcp"], 1);
    let version = rig.create(&one).unwrap();
    let rig = rig.again(CONFIG);
    assert_eq!(rig.get("/v1/services/shop")["version"], *version);
    assert!(rig.forwards("203.0.113.20", 80));
    rig.remove("shop", &version).unwrap();
    let rig = rig.again(CONFIG);
    assert_eq!(rig.get("/v1/services").as_array().unwrap().len(), 1);
}

#[test]
fn of_two_writers_who_read_the_same_the_second_is_told() {
    let rig = Rig::new(CONFIG);
    let read = rig.create(&shop("203.0.113.20", &["80/tcp"], 1)).unwrap();
    rig.replace("shop", &shop("203.0.113.20", &["80/tcp"], 5), &read).unwrap();
    let late = shop("203.0.113.20", &["80/tcp"], 0);
    let refused = rig.replace("shop", &late, &read).unwrap_err();
    assert_eq!(
        (refused.status, &*refused.detail),
        (412, "`shop` has changed meanwhile: read it again")
    );
    assert_eq!(rig.remove("shop", &read).unwrap_err().status, 412);
    assert_eq!(rig.get("/v1/services/shop")["spec"]["backends"][0]["weight"], 5);
    for refused in
        [rig.replace("shop", &late, "").unwrap_err(), rig.remove("shop", "").unwrap_err()]
    {
        assert_eq!(refused.status, 428);
        assert!(refused.detail.contains("If-Match"), "{}", refused.detail);
    }
}

#[test]
fn of_many_writers_at_once_one_wins_each_round() {
    let rig = Rig::new(CONFIG);
    let version = Mutex::new(rig.create(&shop("203.0.113.20", &["80/tcp"], 0)).unwrap());
    for round in 1..20 {
        let read = version.lock().unwrap().clone();
        let won: Vec<String> = thread::scope(|scope| {
            let writers: Vec<_> = (0..4)
                .map(|writer| {
                    let (rig, read) = (&rig, &read);
                    scope.spawn(move || {
                        let mine = shop("203.0.113.20", &["80/tcp"], round * 4 + writer);
                        rig.replace("shop", &mine, read).ok()
                    })
                })
                .collect();
            writers.into_iter().filter_map(|writer| writer.join().unwrap()).collect()
        });
        let [version_of_winner] = &won[..] else { panic!("{won:?}") };
        *version.lock().unwrap() = version_of_winner.clone();
    }
}

#[test]
fn a_writer_is_told_of_its_own_version_although_the_next_one_is_faster() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::default();
    let (shown, views) = watch::channel(view("", 0));
    let (store, services) = Store::open(folder.path(), &config.maglev).unwrap();
    let weighs = |weight| {
        let spec: crate::config::ServiceSpec =
            serde_json::from_value(shop("203.0.113.20", &["80/tcp"], weight)).unwrap();
        spec.understand(&config.maglev).unwrap().0
    };
    let (first, second) = (Change::Create(weighs(1)), Change::Replace(weighs(2), Condition::Any));
    let mut daemon =
        PlanningDaemon { planner: daemon::planner(&config), config: config.clone(), views: shown };
    runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let (changes, mut wanted) = Changes::start(store, services, config.limits.clone(), views);
        let taking = async {
            while let Some(Wanted { services, outcome, .. }) = wanted.recv().await {
                let _ = outcome.send(daemon.want(&services));
            }
        };
        let told = tokio::select! {
            told = join(changes.change(first), changes.change(second)) => told,
            () = taking => panic!("nobody wants anything"),
        };
        let weight = |view: &View| view.service("shop").unwrap().0.backends[0].weight;
        assert_eq!((weight(&told.0.unwrap()), weight(&told.1.unwrap())), (1, 2));
    });
}

#[test]
fn what_takes_long_is_done_one_at_a_time_also_for_those_who_have_gone() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::default();
    let (_shown, views) = watch::channel(view("", 0));
    let (store, services) = Store::open(folder.path(), &config.maglev).unwrap();
    runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let (changes, _wanted) =
            Changes::start(store, services, config.limits.clone(), views.clone());
        let api = Api::new(Observed::without_workers(&config), views, changes);
        let (end, ended) = std_mpsc::channel();
        // It has begun when nobody waits for it any more.
        let gone = api.beside(move || ended.recv().unwrap()).now_or_never();
        assert_eq!(gone, None);
        let next = tokio::time::timeout(Duration::from_millis(100), api.beside(|| ())).await;
        assert!(next.is_err(), "two at once");
        end.send(()).unwrap();
        api.beside(|| ()).await;
    });
}

#[test]
fn what_is_not_the_apis_or_taken_is_refused_with_a_sentence_and_a_place() {
    let rig = Rig::new(CONFIG);
    rig.create(&shop("203.0.113.20", &["80/tcp"], 1)).unwrap();
    let named = |name: &str, mut service: Value| {
        service["name"] = name.into();
        service
    };
    for (service, pointer, detail) in [
        (
            named("web", shop("203.0.113.30", &["80/tcp"], 1)),
            "/name",
            "there is a service `web` already, of the file",
        ),
        (
            named("shop", shop("203.0.113.30", &["80/tcp"], 1)),
            "/name",
            "there is a service `shop` already, of the api",
        ),
        (
            named("other", shop("203.0.113.10", &["79-80/tcp"], 1)),
            "/ports",
            "the file's `web` and the api's `other` both publish 80/tcp of 203.0.113.10",
        ),
        (
            named("other", shop("203.0.113.20", &["80/tcp"], 1)),
            "/ports",
            "the api's `other` and the api's `shop` both publish 80/tcp of 203.0.113.20",
        ),
        (
            named("other", shop("10.0.0.2", &["80/tcp"], 1)),
            "/vip",
            "10.0.0.2 is the VIP of the api's `other`, and a tunnel of the file's `web` ends there",
        ),
    ] {
        let generation = rig.views.borrow().generation;
        let refused = rig.create(&service).unwrap_err();
        assert_eq!((refused.status, &*refused.detail), (409, detail));
        assert_eq!(refused.errors[0].pointer, pointer);
        assert_eq!(rig.views.borrow().generation, generation, "nothing has changed");
    }
    let web = named("web", shop("203.0.113.30", &["80/tcp"], 1));
    for refused in [rig.replace("web", &web, "*").unwrap_err(), rig.remove("web", "*").unwrap_err()]
    {
        assert_eq!(
            (refused.status, &*refused.detail),
            (409, "`web` is the file's: change it there")
        );
    }
    assert_eq!(rig.remove("nosuch", "*").unwrap_err().status, 404);
}

#[test]
fn a_body_that_is_wrong_is_refused_by_the_field() {
    let rig = Rig::new(CONFIG);
    let good = shop("203.0.113.20", &["80/tcp"], 1);
    let spoiled = |path: &str, value: Value| {
        let mut bad = good.clone();
        *bad.pointer_mut(path).unwrap() = value;
        bad
    };
    for (body, status, pointer, detail) in [
        (
            spoiled("/vip", json!("nowhere")),
            422,
            "/vip",
            "`vip` is `nowhere`, which is not an IP address",
        ),
        (
            spoiled("/backends/0/weight", json!(1001)),
            422,
            "/backends/0/weight",
            "`weight` is 1001, out of its range",
        ),
        (
            spoiled("/backends/0/weight", json!("x")),
            422,
            "/backends/0/weight",
            "invalid type: string \"x\"",
        ),
        (spoiled("/ports", json!("80/tcp")), 422, "/ports", "invalid type: string \"80/tcp\""),
        (json!({ "named": "shop" }), 422, "/named", "unknown field `named`"),
        (json!({ "name": "shop" }), 422, "", "the service has no `vip`"),
        (json!([1]), 422, "/0", "invalid type: integer `1`"),
    ] {
        let refused = rig.create(&body).unwrap_err();
        let about = &refused.errors[0];
        assert_eq!((refused.status, &*about.pointer, &*about.detail), (status, pointer, detail));
        assert!(!about.remedy.is_empty());
    }
    assert_eq!(rig.replace("other", &good, "*").unwrap_err().errors[0].pointer, "/name");
    let posted = |head: &str, body: &str| rig.ask("POST /v1/services", head, body);
    for (head, body, status, detail) in [
        ("Content-Type: text/plain", "{}", 415, "the body has to be JSON"),
        ("Content-Type: application/json", "{", 400, "the body is no JSON"),
        ("Content-Type: application/json; charset=utf-8", "{} {}", 400, "the body is no JSON"),
        (
            "Content-Type: application/json",
            &" ".repeat(MAX_BODY + 1),
            413,
            "the body is too large: 4194304 bytes at most",
        ),
    ] {
        let (was, problem) = posted(head, body);
        assert_eq!(was, status);
        assert!(problem["detail"].as_str().unwrap().starts_with(detail), "{problem}");
    }
}

#[test]
fn who_sends_too_much_is_told_so_however_far_it_writes() {
    let text = CONFIG.replace("node.name = \"n1\"", "");
    let rig = Rig::new(&format!("[api]\nlisten = [\"127.0.0.1:0\"]\n{text}"));
    let much = " ".repeat(4 * MAX_BODY);
    for (head, status) in
        [("Content-Type: application/json", 413), ("Content-Type: text/plain", 415)]
    {
        for _ in 0..10 {
            assert_eq!(rig.ask("POST /v1/services", head, &much).0, status);
            let client = std::net::TcpStream::connect(rig.addresses[0]).unwrap();
            assert_eq!(asked(client, "POST /v1/services", head, &much).0, status);
        }
    }
    let refused = rig.create(&json!({ "name": much })).unwrap_err();
    assert_eq!(refused.detail, "the body is too large: 4194304 bytes at most");
}

#[tokio::test]
async fn a_client_that_never_stops_writing_is_left_in_the_end() {
    let router = Router::new().fallback(|| async { "enough" });
    let (client, server) = tokio::io::duplex(1 << 16);
    let (mut answers, mut endless) = tokio::io::split(client);
    let writing = async {
        use tokio::io::AsyncWriteExt;
        let head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n";
        endless.write_all(head).await.unwrap();
        while endless.write_all(&[b' '; 1 << 16]).await.is_ok() {}
    };
    let mut answer_text = String::new();
    let reading = tokio::io::AsyncReadExt::read_to_string(&mut answers, &mut answer_text);
    let serving = answer(router, server, Duration::from_secs(10));
    let all = futures_util::future::join3(serving, writing, reading);
    tokio::time::timeout(Duration::from_secs(60), all).await.expect("it is let go").2.unwrap();
    assert!(answer_text.ends_with("enough"), "{answer_text}");
}

#[test]
fn what_was_sent_may_have_any_words_in_it() {
    let rig = Rig::new(CONFIG);
    let about = |body: Value| rig.create(&body).unwrap_err().errors.remove(0);
    // RFC 6901 section 3.
    let remark = about(json!({ "a.b/c~d": 1 }));
    assert_eq!(remark.pointer, "/a.b~1c~0d");
    let remark = about(json!({ "vni": "1, expected 2" }));
    assert_eq!(
        (&*remark.detail, &*remark.remedy),
        ("invalid type: string \"1, expected 2\"", "expected i64")
    );
}

#[test]
fn a_version_without_its_quotes_is_said_to_be_wrong_and_not_old() {
    let rig = Rig::new(CONFIG);
    let version = rig.create(&shop("203.0.113.20", &["80/tcp"], 1)).unwrap();
    let removed = |said: &str| {
        let (status, problem) =
            rig.ask("DELETE /v1/services/shop", &format!("If-Match: {said}"), "");
        (status, problem["detail"].as_str().unwrap_or_default().to_owned())
    };
    let (status, detail) = removed(&version);
    assert_eq!(status, 400);
    assert!(detail.contains(&version) && detail.contains("quotes"), "{detail}");
    // RFC 9110 section 13.1.1: the comparison is the strong one.
    assert_eq!(removed(&format!("W/\"{version}\"")).0, 412);
    assert_eq!(removed(&format!("\"0\", \"{version}\"")).0, 204);
}

#[test]
fn a_plan_that_is_refused_leaves_no_trace() {
    let one_slot = "[limits]\nbackends = 1\n";
    let rig = Rig::new(one_slot);
    let first = rig.create(&shop("203.0.113.20", &["80/tcp"], 1)).unwrap();
    // Another backend needs a slot while the first one's rests.
    let mut other = shop("203.0.113.20", &["80/tcp"], 1);
    other["backends"][0]["name"] = "shop-2".into();
    let refused = rig.replace("shop", &other, &first).unwrap_err();
    assert_eq!(refused.status, 409);
    assert!(refused.detail.contains("limits.backends"), "{}", refused.detail);
    assert_eq!(rig.get("/v1/services/shop")["version"], *first);
    let rig = rig.again(one_slot);
    assert_eq!(rig.get("/v1/services/shop")["version"], *first);
}

#[test]
fn a_disk_that_refuses_leaves_no_trace() {
    let rig = Rig::new(CONFIG);
    rig.create(&shop("203.0.113.20", &["80/tcp"], 1)).unwrap();
    // Where the new file would be written is a directory.
    let folder = rig.folder.path().join("state/services");
    std::fs::create_dir(folder.join("other.new")).unwrap();
    let mut other = shop("203.0.113.21", &["80/tcp"], 1);
    other["name"] = "other".into();
    let refused = rig.create(&other).unwrap_err();
    assert_eq!(refused.status, 500);
    assert!(refused.detail.contains("api.state_directory"), "{}", refused.detail);
    assert!(!rig.forwards("203.0.113.21", 80));
    std::fs::remove_dir(folder.join("other.new")).unwrap();
    rig.create(&other).unwrap();
    assert!(rig.forwards("203.0.113.21", 80));
}

#[test]
fn what_may_not_have_been_meant_is_done_and_warned_of() {
    let rig = Rig::new(CONFIG);
    let body = shop("203.0.113.20", &["80/tcp"], 0);
    let changed: resource::Changed =
        rig.client().change(Method::POST, "/v1/services", Some(&body), None).unwrap();
    assert_eq!(changed.warnings[0].detail, "all backends of `shop` have weight 0");
    assert_eq!(changed.service.backends.draining, 1);
}

/// One call, of a small world, so that calls get in each other's way.
#[derive(Clone, Debug)]
enum Call {
    Create(Value),
    Replace(Value, Meant),
    Remove(String, Meant),
    Restart,
}

/// Which version a call names.
#[derive(Clone, Copy, Debug)]
enum Meant {
    Newest,
    Old,
    Any,
}

const NAMES: [&str; 3] = ["web", "shop", "mail"];
const WORLD: [(&str, u16); 4] =
    [("203.0.113.10", 80), ("203.0.113.10", 81), ("203.0.113.20", 80), ("203.0.113.20", 81)];

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let service = (0..NAMES.len(), prop::bool::ANY, 0..4_u8, 0..3_u16).prop_map(
        |(name, vip, ports, weight)| {
            // No port at all is one of the mistakes.
            let ports: Vec<String> = (0..2)
                .filter(|bit| ports & 1 << bit != 0)
                .map(|bit| format!("{}/tcp", 80 + bit))
                .collect();
            let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
            let mut service =
                shop(if vip { "203.0.113.10" } else { "203.0.113.20" }, &ports, weight);
            service["name"] = NAMES[name].into();
            service
        },
    );
    let meant = prop::sample::select(vec![Meant::Newest, Meant::Newest, Meant::Old, Meant::Any]);
    let name = prop::sample::select(NAMES.to_vec()).prop_map(str::to_owned);
    let call = prop_oneof![
        4 => service.clone().prop_map(Call::Create),
        4 => (service, meant.clone()).prop_map(|(service, meant)| Call::Replace(service, meant)),
        2 => (name, meant).prop_map(|(name, meant)| Call::Remove(name, meant)),
        1 => Just(Call::Restart),
    ];
    prop::collection::vec(call, 1..25)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_calls_make_api_disk_and_data_plane_disagree(calls in calls()) {
        let mut rig = Rig::new(CONFIG);
        // What was acknowledged, and with which version.
        let mut model: BTreeMap<String, (Value, String)> = BTreeMap::new();
        for call in calls {
            let version = |name: &str, meant| match (model.get(name), meant) {
                (Some((_, version)), Meant::Newest) => version.clone(),
                (_, Meant::Any) => "*".to_owned(),
                _ => "0000000000000000".to_owned(),
            };
            match call {
                Call::Create(service) => {
                    let name = service["name"].as_str().unwrap().to_owned();
                    if let Ok(version) = rig.create(&service) {
                        prop_assert!(model.insert(name, (service, version)).is_none());
                    }
                }
                Call::Replace(service, meant) => {
                    let name = service["name"].as_str().unwrap().to_owned();
                    if let Ok(version) = rig.replace(&name, &service, &version(&name, meant)) {
                        prop_assert!(!matches!(meant, Meant::Old));
                        prop_assert!(model.insert(name, (service, version)).is_some());
                    }
                }
                Call::Remove(name, meant) => {
                    if rig.remove(&name, &version(&name, meant)).is_ok() {
                        prop_assert!(model.remove(&name).is_some());
                    }
                }
                Call::Restart => rig = rig.again(CONFIG),
            }
            let shown = rig.get("/v1/services");
            let shown: BTreeMap<String, (Value, String)> = shown
                .as_array()
                .unwrap()
                .iter()
                .filter(|service| service["owner"] == "api")
                .map(|service| {
                    let text = |key: &str| service[key].as_str().unwrap().to_owned();
                    (text("name"), (service["spec"].clone(), text("version")))
                })
                .collect();
            prop_assert_eq!(&shown, &model);
            for (vip, port) in WORLD {
                let wanted = (vip, port) == ("203.0.113.10", 80)
                    || model.values().any(|(service, _)| {
                        let ports = service["ports"].as_array().unwrap();
                        service["vip"] == vip && ports.contains(&json!(format!("{port}/tcp")))
                    });
                prop_assert_eq!(rig.forwards(vip, port), wanted, "{} {}", vip, port);
            }
        }
    }
}

#[test]
fn the_document_describes_every_path_with_a_sentence() {
    let rig = Rig::new(CONFIG);
    let document = rig.get("/openapi.json");
    assert!(document["openapi"].as_str().unwrap().starts_with("3."));
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.contains_key("/v1/services/{name}"), "{paths:?}");
    for (path, methods) in paths {
        for (method, operation) in methods.as_object().unwrap() {
            let summary = operation["summary"].as_str().unwrap_or_default();
            assert!(summary.ends_with('.'), "{method} {path}: {summary:?}");
        }
    }
}

#[test]
fn a_node_of_the_swarm_is_another_schema_than_a_node_of_the_api() {
    let document = Rig::new(CONFIG).get("/openapi.json");
    let schemas = &document["components"]["schemas"];
    assert!(schemas["Node"]["properties"]["vtep"].is_object(), "{schemas}");
    assert!(schemas["SwarmNode"]["properties"]["ready"].is_object(), "{schemas}");
}

#[test]
fn a_watcher_is_told_what_is_and_then_what_changes() {
    let rig = Rig::new(CONFIG);
    let mut seen = Vec::new();
    let mut views = [
        CONFIG.replace("weight = 0", "weight = 5"),
        CONFIG.replace("web-2", "web-3"),
        String::from("# nothing"),
    ]
    .into_iter();
    rig.client()
        .watch("/v1/events", |event: Event| {
            let generation = match &event {
                Event::Generation { generation } => Some(*generation),
                _ => None,
            };
            seen.push(event);
            let Some(generation) = generation else { return true };
            let Some(next) = views.next() else { return false };
            rig.views.send_replace(view(&next, generation + 1));
            true
        })
        .unwrap();
    let told: Vec<String> = seen
        .iter()
        .map(|event| match event {
            Event::Created { service, owner, .. } => format!("+{service} of {owner}"),
            Event::Updated { service, .. } => format!("~{service}"),
            Event::Removed { service } => format!("-{service}"),
            Event::Backend { backend, state, weight, .. } => format!("{backend} {state} {weight}"),
            Event::BackendRemoved { backend, .. } => format!("-{backend}"),
            Event::Refused { reason } => reason.clone(),
            Event::LocalPort { port, reason } => format!("{port} {reason:?}"),
            Event::Remark { remark } => remark.clone(),
            Event::Swarm { fresh, .. } => fresh.to_string(),
            Event::Generation { generation } => generation.to_string(),
        })
        .collect();
    let expected = [
        "+web of file",
        "web-1 active 1",
        "web-2 draining 0",
        "1", //
        "~web",
        "web-2 active 5",
        "2", //
        "~web",
        "web-3 draining 0",
        "-web-2",
        "3", //
        "-web",
        "4",
    ];
    assert_eq!(told, expected);
}

#[test]
fn a_watcher_is_told_which_ports_are_kept_from_clients_on_this_node() {
    let rig = Rig::new(CONFIG);
    let kept = |ports: &[u16], generation| {
        let port = |port: &u16| ServicePort { port: *port, protocol: Protocol::Tcp };
        let refused = ports.iter().map(|number| (port(number), "taken".to_owned())).collect();
        let view = Arc::into_inner(view(CONFIG, generation)).unwrap();
        Arc::new(View { local_refused: Arc::new(refused), ..view })
    };
    let mut views = [kept(&[80, 81], 2), kept(&[81], 3)].into_iter();
    let mut told = Vec::new();
    rig.client()
        .watch("/v1/events", |event: Event| {
            match event {
                Event::LocalPort { port, reason } => told.push((port, reason)),
                Event::Generation { .. } => match views.next() {
                    Some(next) => drop(rig.views.send_replace(next)),
                    None => return false,
                },
                _ => {}
            }
            true
        })
        .unwrap();
    let taken = |port: &str| (port.to_owned(), Some("taken".to_owned()));
    assert_eq!(told, [taken("80/tcp"), taken("81/tcp"), ("80/tcp".to_owned(), None)]);
}

/// What a daemon shows that reads a swarm, or `None` if it is told by others.
fn view_of_swarm(version: Option<u64>) -> Arc<View> {
    let news = |version| Arc::new(News { version, fresh: true, table: Default::default() });
    let remarks = vec!["a label is wrong".to_owned()];
    let status = SwarmStatus { fresh: true, remarks, ..SwarmStatus::default() };
    let state = swarm::State { news: version.map(news), status, ..Default::default() };
    let view = view(CONFIG, 1);
    Arc::new(View { swarm: Some(Arc::new(state)), ..Arc::into_inner(view).unwrap() })
}

#[test]
fn who_is_told_of_the_swarm_waits_for_what_is_new() {
    let rig = Rig::new(CONFIG);
    for view in [view(CONFIG, 1), view_of_swarm(None)] {
        rig.views.send_replace(view);
        let answer = rig.client().get::<Value>("/v1/swarm");
        let Err(ClientError::Refused(problem)) = answer else { panic!("{answer:?}") };
        assert_eq!(problem.status, 404);
    }
    rig.views.send_replace(view_of_swarm(Some(7)));
    assert_eq!(rig.get("/v1/swarm")["version"], 7);
    assert_eq!(rig.get("/v1/swarm?after=6")["version"], 7);
    let views = rig.views.clone();
    let later = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        views.send_replace(view_of_swarm(Some(8)));
    });
    let asked = std::time::Instant::now();
    assert_eq!(rig.get("/v1/swarm?after=7")["version"], 8);
    assert!((200..2000).contains(&asked.elapsed().as_millis()), "{:?}", asked.elapsed());
    later.join().unwrap();
}

#[test]
fn a_watcher_is_told_how_the_swarm_is_read_and_what_of_it_is_not_done() {
    let rig = Rig::new(CONFIG);
    rig.views.send_replace(view_of_swarm(Some(7)));
    let mut told = Vec::new();
    rig.client()
        .watch("/v1/events", |event: Event| {
            let is_last = matches!(event, Event::Generation { .. });
            told.push(event.to_string());
            !is_last
        })
        .unwrap();
    assert_eq!(told[3..5], ["the swarm is read", "swarm: a label is wrong"]);
}

#[test]
fn watchers_leave_room_for_those_who_ask() {
    let rig = Rig::new(CONFIG);
    let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let socket = rig.socket();
    // More than may watch, each on a connection of its own, held open.
    let ask = b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let answers = runtime.block_on(async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut watching = Vec::new();
        for _ in 0..=MAX_WATCHERS {
            let mut client = tokio::net::UnixStream::connect(&socket).await.unwrap();
            client.write_all(ask).await.unwrap();
            let mut head = [0; 12];
            client.read_exact(&mut head).await.unwrap();
            watching.push((String::from_utf8(head.to_vec()).unwrap(), client));
        }
        watching
    });
    let (last, others) = answers.split_last().unwrap();
    assert!(others.iter().all(|(head, _)| head == "HTTP/1.1 200"));
    assert_eq!(last.0, "HTTP/1.1 503");
    assert_eq!(rig.get("/v1/services")[0]["name"], "web");
}

#[test]
fn a_client_that_does_not_read_delays_no_other() {
    let rig = Rig::new(CONFIG);
    let mut silent = std::os::unix::net::UnixStream::connect(rig.socket()).unwrap();
    // Many answers more than any socket buffers.
    let ask = "GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(1000);
    silent.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let _ = std::io::Write::write_all(&mut silent, ask.as_bytes());
    assert_eq!(rig.get("/v1/services")[0]["name"], "web");
}

#[test]
fn a_client_that_does_not_read_loses_its_place() {
    runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        use tokio::io::AsyncWriteExt;
        let router = Router::new().fallback(|| async { "more than fits in between".repeat(1000) });
        let (mut client, server) = tokio::io::duplex(1000);
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let answered = answer(router, server, Duration::from_millis(50));
        tokio::time::timeout(Duration::from_secs(10), answered).await.expect("it is let go");
    });
}
