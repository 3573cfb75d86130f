//! What the lab's client does: ask, send, fetch, hold on.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, UNIX_EPOCH},
};

use serde::{Deserialize, de::DeserializeOwned};

use crate::lab::{Background, Lab, PEER, assert_same_content, wait_until};

/// An address that clients connect to, and the address they do it from.
#[derive(Clone, Copy)]
pub struct Vip {
    pub address: &'static str,
    pub url: &'static str,
    pub client: &'static str,
}

impl Vip {
    /// Whether its clients speak IPv6.
    pub fn is_v6(self) -> bool {
        self.address.contains(':')
    }
}

pub const VIP4: Vip =
    Vip { address: "203.0.113.10", url: "http://203.0.113.10", client: "198.51.100.7" };
pub const VIP6: Vip =
    Vip { address: "2001:db8:113::10", url: "http://[2001:db8:113::10]", client: "2001:db8:7::7" };
pub const VIPS: [Vip; 2] = [VIP4, VIP6];

/// The port that the backends echo datagrams on.
pub const ECHO_PORT: &str = "5353";

/// Who answered, and who asked as far as the server could see.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub backend: String,
    pub client: String,
}

/// The outcome of many requests, each on a connection of its own.
#[derive(Debug, Deserialize)]
pub struct Load {
    pub ok: u64,
    /// How long it took.
    pub seconds: f64,
    /// Of the slowest request, from the connection's beginning.
    pub slowest_s: f64,
    pub backends: BTreeMap<String, u64>,
    /// What went wrong, and how often.
    pub errors: BTreeMap<String, u64>,
}

/// What [`Load::errors`] should be.
pub const NO_ERRORS: BTreeMap<String, u64> = BTreeMap::new();

/// What became of a connection that was held open.
#[derive(Debug, Deserialize)]
pub struct Held {
    pub backend: Option<String>,
    pub outcome: String,
    /// When.
    pub after_s: f64,
}

/// The outcome of some datagrams.
#[derive(Debug, Deserialize)]
pub struct Datagrams {
    pub lost: u64,
    pub answers: Vec<Echo>,
}

/// A datagram's answer.
#[derive(Debug, Deserialize)]
pub struct Echo {
    pub backend: String,
    pub client: String,
    pub same_port: bool,
    pub intact: bool,
}

/// One request on a new connection.
pub fn get(lab: &Lab, vip: Vip) -> Answer {
    let said = lab.succeed("client", &["curl", "-sSf", "--max-time", "10", vip.url]);
    let field = |name: &str| {
        let found = said.split_whitespace().find_map(|word| word.strip_prefix(name));
        found.unwrap_or_else(|| panic!("no {name} in {said}")).to_owned()
    };
    Answer { backend: field("backend="), client: field("client=") }
}

/// 10 MB from a backend, and 10 MB to one; either must arrive as it left.
pub fn exchange_ten_megabytes(lab: &Lab, vip: Vip, backends: &[&str]) {
    let (big, copy) = (lab.file("big"), lab.file("copy"));
    let curl = ["curl", "-sSf", "--max-time", "60"];

    let url = format!("{}/big", vip.url);
    lab.succeed("client", &[&curl[..], &["-o", copy.to_str().unwrap(), &url]].concat());
    assert_same_content(&big, &copy);

    let url = format!("{}/upload/{}", vip.url, vip.address);
    lab.succeed("client", &[&curl[..], &["-T", big.to_str().unwrap(), &url]].concat());
    let uploads = backends.iter().map(|b| lab.file(&format!("{b}/upload/{}", vip.address)));
    let uploads: Vec<_> = uploads.filter(|upload| upload.exists()).collect();
    assert_eq!(uploads.len(), 1, "one backend has the upload");
    assert_same_content(&big, &uploads[0]);
}

/// Datagrams of `size` bytes, each from another port.
pub fn send_datagrams(lab: &Lab, vip: Vip, count: u32, size: u32) -> Datagrams {
    let (count, size) = (count.to_string(), size.to_string());
    let to = ["udp", "--to", vip.address, "--port", ECHO_PORT, "--count", &count, "--size", &size];
    parse(&lab.succeed("client", &[&[PEER], &to[..]].concat()))
}

/// A datagram of many that were sent at a steady pace, each from another port.
#[derive(Debug, Deserialize)]
pub struct Pulse {
    /// When it left, in seconds since 1970.
    pub at_s: f64,
    /// Who answered, if anybody did.
    pub backend: Option<String>,
}

/// A backend is lost, and later back, and all the while datagrams are sent that each begin a flow.
pub struct Outage {
    /// From the first to the last datagram that went there in vain, in seconds.
    pub avoided_s: f64,
    /// From its return to the first datagram that it answers.
    pub back_s: f64,
}

/// Has a backend lost for some time.
pub fn outage(lab: &Lab, vip: Vip, backend: &str, time: Duration, lose: impl Fn(bool)) -> Outage {
    let seconds = format!("{}", time.as_secs() + 7);
    let pulse = ["pulse", "--to", vip.address, "--port", ECHO_PORT, "--seconds", &seconds];
    let pulsing = lab.start("client", &[&[PEER], &pulse[..]].concat());
    thread::sleep(Duration::from_millis(1500));
    let now_s = || UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    let lost_at_s = now_s();
    lose(true);
    thread::sleep(time);
    lose(false);
    let back_at_s = now_s();
    let pulses: Vec<Pulse> = parse(&pulsing.finish());
    let is_its = |pulse: &&Pulse| pulse.backend.as_deref() == Some(backend);
    assert!(pulses.iter().any(|pulse| pulse.at_s < lost_at_s && is_its(&pulse)));
    let first = pulses.iter().find(|pulse| pulse.at_s >= back_at_s && is_its(pulse));
    let back_s = first.expect("it is back").at_s - back_at_s;
    // Every other one or so, from the loss until it is avoided. One that a busy machine loses later is none of
    // these.
    let mut vain = pulses.iter().filter(|p| p.at_s >= lost_at_s && p.backend.is_none());
    let first_at_s = vain.next().expect("nobody knows it at once").at_s;
    let mut avoided_s = 0.0;
    for after_s in vain.map(|pulse| pulse.at_s - first_at_s) {
        if after_s > avoided_s + 0.5 {
            break;
        }
        avoided_s = after_s;
    }
    println!("{backend} was avoided after {avoided_s:.2} s, and was back after {back_s:.2} s");
    Outage { avoided_s, back_s }
}

/// Requests on new connections, four at a time, until all are done.
pub fn load(lab: &Lab, vip: Vip, requests: u32) -> Load {
    let requests = requests.to_string();
    parse(&lab.succeed("client", &[PEER, "load", "--url", &root(vip), "--requests", &requests]))
}

/// The same in the background and for some time; [`parse`] what it prints.
pub fn start_load(lab: &Lab, vip: Vip, seconds: u32) -> Background {
    let seconds = seconds.to_string();
    lab.start("client", &[PEER, "load", "--url", &root(vip), "--seconds", &seconds])
}

/// Opens connections and asks on each every 200 ms. Returns as soon as all are open; [`parse`] what it
/// prints to a list of [`Held`].
pub fn start_holding(lab: &Lab, vip: Vip, connections: u32, seconds: u32) -> Background {
    let (connections, seconds) = (connections.to_string(), seconds.to_string());
    let ready = lab.file("holding");
    let mut command = vec![PEER, "hold", "--url"];
    let url = root(vip);
    command.extend([&url, "--connections", &connections, "--seconds", &seconds]);
    command.extend(["--ready", ready.to_str().unwrap()]);
    let holding = lab.start("client", &command);
    wait_until("all connections are open", 20, || ready.exists());
    holding
}

/// One flow of datagrams in the background, ten a second for six seconds. It begins at `backend`; printed is
/// who answered each, or `-` if nobody did.
pub fn start_talking(lab: &Lab, vip: Vip, backend: &str) -> Background {
    let program = format!(
        "import socket, time\n\
         def ask(s):\n\
         \x20   s.send(b'x')\n\
         \x20   try: return s.recv(99).split()[0].decode()\n\
         \x20   except TimeoutError: return '-'\n\
         name = None\n\
         while name != '{backend}':\n\
         \x20   s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         \x20   s.settimeout(0.3)\n\
         \x20   s.connect(('{}', {ECHO_PORT}))\n\
         \x20   name = ask(s)\n\
         said = []\n\
         for _ in range(60):\n\
         \x20   said.append(ask(s))\n\
         \x20   time.sleep(0.1)\n\
         print(' '.join(said))\n",
        vip.address
    );
    lab.start("client", &["python3", "-c", &program])
}

/// A backend that drains gets no new connection, and no request fails. Of those held, it has some, and keeps them.
pub fn assert_drains(lab: &Lab, backend: &str, loading: Background, holding: Background) {
    let after = load(lab, VIP4, 200);
    assert!(after.errors.is_empty() && !after.backends.contains_key(backend), "{after:?}");
    let load: Load = parse(&loading.finish());
    assert!(load.errors.is_empty() && load.ok > 100, "{load:?}");
    let held: Vec<Held> = parse(&holding.finish());
    assert!(held.iter().all(|connection| connection.outcome == "kept"), "{held:?}");
    assert!(held.iter().any(|connection| connection.backend.as_deref() == Some(backend)));
}

/// A 10 s download in the background, into the file `slow` of the lab.
pub fn start_slow_download(lab: &Lab, vip: Vip) -> Background {
    let (url, file) = (format!("{}/slow", vip.url), lab.file("slow"));
    let file = file.to_str().unwrap();
    let download = lab.start("client", &["curl", "-sSf", "--max-time", "60", "-o", file, &url]);
    wait_until("the download has begun", 20, || lab.file("slow").exists());
    download
}

/// What [`PEER`] printed.
pub fn parse<T: DeserializeOwned>(printed: &str) -> T {
    serde_json::from_str(printed).unwrap_or_else(|error| panic!("{error}: {printed}"))
}

fn root(vip: Vip) -> String {
    format!("{}/", vip.url)
}
