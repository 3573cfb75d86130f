//! A lab of a test's own: built by `scripts/lab`, removed when dropped.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const LAB: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/lab");
const SWARM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/lab-swarm");

/// Servers on the backends, load on the client: see its `--help`.
pub const PEER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/lab-peer");

/// No command lives longer, so that no test waits for ever: all they wait for is a command, or bounded
/// by [`wait_until`].
const LONGEST_COMMAND_S: &str = "120";

/// One test at a time: several pinned workers on a few cores would only measure each other. What it
/// guards is the machine, which a test that panics leaves in order: poisoning is ignored.
static ALONE: Mutex<()> = Mutex::new(());
static LABS: AtomicU32 = AtomicU32::new(0);

/// Client, router, mesh nodes `n1`… and backends `b1`…, each in a network namespace.
pub struct Lab {
    script: &'static str,
    name: String,
    state: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl Lab {
    /// Lays it out; `options` are those of `scripts/lab up`.
    pub fn up(options: &[&str]) -> Self {
        Self::by(LAB, "wmt", options)
    }

    /// A Docker Swarm instead of backends; `options` are those of `scripts/lab-swarm up`.
    pub fn swarm(options: &[&str]) -> Self {
        Self::by(SWARM, "wms", options)
    }

    fn by(script: &'static str, prefix: &str, options: &[&str]) -> Self {
        // /proc/self belongs to the effective user.
        let user = fs::metadata("/proc/self").unwrap().uid();
        assert!(user == 0, "needs root: run scripts/test as root");
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let number = LABS.fetch_add(1, Ordering::Relaxed);
        let name = format!("{prefix}{}n{number}", std::process::id());
        succeed(bounded(script).arg("up").arg(&name).args(options));
        let state = succeed(bounded(script).args(["state", &name]));
        Self { script, name, state: state.trim_end().into(), _alone: alone }
    }

    /// A file in the lab's directory: configs, logs, what the backends serve and were sent.
    pub fn file(&self, name: &str) -> PathBuf {
        self.state.join(name)
    }

    /// A command on a host, to be started by the caller.
    pub fn command(&self, host: &str, command: &[&str]) -> Command {
        let mut run = bounded("ip");
        run.args(["netns", "exec", &self.namespace(host)]).args(command);
        run
    }

    /// Runs a command on a host to its end.
    pub fn run(&self, host: &str, command: &[&str]) -> Output {
        self.command(host, command).output().unwrap()
    }

    /// The same for a command that must succeed. Returns what it printed.
    pub fn succeed(&self, host: &str, command: &[&str]) -> String {
        succeed(&mut self.command(host, command))
    }

    /// Starts a command on a host, to be collected by [`Background::finish`].
    pub fn start(&self, host: &str, command: &[&str]) -> Background {
        let mut command = self.command(host, command);
        Background(Some(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()))
    }

    /// From now on the router sends the VIPs to this node; `all` spreads them.
    pub fn route(&self, node: &str) {
        self.script(&["route", &self.name, node]);
    }

    /// Writes another weight into every node's config.
    pub fn weight(&self, backend: &str, weight: u16) {
        self.script(&["weight", &self.name, backend, &weight.to_string()]);
    }

    /// Takes a backend out of every node's config.
    pub fn remove(&self, backend: &str) {
        self.script(&["remove", &self.name, backend]);
    }

    /// Ends one of a backend's servers: `b1-nginx`, `b1-echo`.
    pub fn stop(&self, server: &str) {
        self.script(&["stop", &self.name, server]);
    }

    /// Starts a backend's web server again.
    pub fn start_nginx(&self, backend: &str) {
        let (label, folder) = (format!("{backend}-nginx"), self.file(backend));
        let folder = folder.to_str().unwrap();
        let nginx = ["nginx", "-p", folder, "-c", "nginx.conf", "-e", "error.log"];
        self.script(&[&["start", &self.name, backend, &label], &nginx[..]].concat());
    }

    /// Cuts a host off, or connects it again: its cable stays in, and what goes over it is lost without a word.
    pub fn cut_off(&self, host: &str, cut: bool) {
        for (end, device) in [("router", host), (host, "eth0")] {
            let queue = ["tc", "qdisc", if cut { "add" } else { "del" }, "dev", device, "root"];
            let without_places: &[_] = if cut { &["pfifo", "limit", "0"] } else { &[] };
            self.succeed(end, &[&queue, without_places].concat());
        }
    }

    /// Gives a node's kernel a way of its own to a backend, for when the daemon is away.
    pub fn fallback(&self, node: &str, backend: &str) {
        self.script(&["fallback", &self.name, node, backend]);
    }

    /// The docker CLI at a node's engine, which must succeed. Returns what it printed.
    pub fn docker(&self, node: &str, words: &str) -> String {
        let script = [&["docker", &self.name, node], &words.split(' ').collect::<Vec<_>>()[..]];
        succeed(bounded(self.script).args(script.concat()))
    }

    /// Kills a node's engine and all that runs in it, or starts it again: `kill`, `start`.
    pub fn engine(&self, node: &str, what: &str) {
        self.script(&["engine", &self.name, node, what]);
    }

    /// A node's config with one thing changed, in another file or in place.
    pub fn write_config(&self, node: &str, file: &str, from: &str, to: &str) -> String {
        let good = fs::read_to_string(self.file(&format!("{node}.toml"))).unwrap();
        assert!(good.contains(from), "no {from:?} in {good}");
        fs::write(self.file(file), good.replace(from, to)).unwrap();
        self.file(file).to_str().unwrap().to_owned()
    }

    /// The MAC address of a host's `eth0`.
    pub fn mac(&self, host: &str) -> String {
        self.succeed(host, &["cat", "/sys/class/net/eth0/address"]).trim_end().to_owned()
    }

    /// Whether an XDP program is attached to a host's `eth0`.
    pub fn has_xdp(&self, host: &str) -> bool {
        let links = self.succeed(host, &["ip", "-json", "link", "show", "eth0"]);
        let links: serde_json::Value = serde_json::from_str(&links).unwrap();
        !links[0]["xdp"].is_null()
    }

    /// The network namespace of a host.
    pub fn namespace(&self, host: &str) -> String {
        format!("{}-{host}", self.name)
    }

    fn script(&self, arguments: &[&str]) {
        succeed(bounded(self.script).args(arguments));
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Must not panic: another panic may be why we are here.
        let _ = bounded(self.script).args(["down", &self.name]).status();
    }
}

/// A command that goes on while the test does something else; killed when dropped unfinished.
pub struct Background(Option<Child>);

impl Background {
    /// Waits for its end, which must be a success. Returns what it printed.
    pub fn finish(mut self) -> String {
        let output = self.0.take().unwrap().wait_with_output().unwrap();
        printed(&output, "a command in the background")
    }

    /// Asks it to end, as tools that run until told otherwise want to be.
    pub fn stop(mut self) {
        let child = self.0.as_mut().unwrap();
        signal(child, "TERM");
        child.wait().unwrap();
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // `timeout` hands TERM on to what it runs; KILL it could not.
            signal(child, "TERM");
            let _ = child.wait();
        }
    }
}

/// A command that is ended if it takes too long.
pub fn bounded(program: &str) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", LONGEST_COMMAND_S, program]);
    command
}

/// Sends a signal; that the process is gone already is no error.
pub fn signal(child: &Child, signal: &str) {
    let _ = Command::new("kill")
        .args(["-s", signal, &child.id().to_string()])
        .stderr(Stdio::null())
        .status();
}

/// Polls until the condition holds; panics with `what` after `seconds`.
pub fn wait_until(what: &str, seconds: u64, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !holds() {
        assert!(Instant::now() < deadline, "waited {seconds} s in vain until {what}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Panics unless two files are equal, without printing megabytes.
pub fn assert_same_content(left: &Path, right: &Path) {
    let same = fs::read(left).unwrap() == fs::read(right).unwrap();
    assert!(same, "{} differs from {}", left.display(), right.display());
}

fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    printed(&output, &format!("{command:?}"))
}

fn printed(output: &Output, what: &str) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {}: {errors}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_lab_leaves_no_process_behind() {
    let lab = Lab::up(&["--nodes", "1", "--backends", "1"]);
    // Every server of the lab has the lab's directory in its arguments.
    let directory = lab.state.to_str().unwrap().to_owned();
    let servers = || {
        let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
        let arguments = processes.filter_map(|process| fs::read(process.join("cmdline")).ok());
        arguments.filter(|bytes| String::from_utf8_lossy(bytes).contains(&directory)).count()
    };
    assert!(servers() >= 2, "nginx and the echo server");
    drop(lab);
    assert_eq!(servers(), 0);
}
