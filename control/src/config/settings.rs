//! Keys to settings: which values the tables of the process may have, and what stands for those
//! left out.

use std::{
    fmt::Display,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
};

use dataplane::{
    connections::Timeouts,
    forwarding::MAX_BACKENDS,
    maglev::is_prime,
    nat::{self, MAX_BANKS},
    port::BURST,
};
use toml::Spanned;

use super::{
    Api, Connections, CopyMode, Cores, Dataplane, Limits, Liveness, LocalLink, Maglev, Nat, Node,
    Rings, Tls, Workers,
    file::{self, AutoOr, Key},
    finding::{Report, Span},
};

/// Most workers, and the highest core, that can be asked for.
const MAX_CORES: i64 = 1024;
/// Most interfaces. A port's number is one byte in the forwarding snapshot.
const MAX_INTERFACES: usize = 64;
/// The kernel's limit for an interface's name, IFNAMSIZ less its zero.
const MAX_INTERFACE_NAME: usize = 15;
/// The kernel's limit for a socket's path, `sun_path` less its zero.
const MAX_SOCKET_PATH: usize = 107;
/// Longest name of ours.
const MAX_NAME: usize = 128;
/// Most places of a Maglev table, a prime. A larger one takes seconds to build for each service.
pub const MAX_TABLE_SIZE: u32 = 655_373;
/// Longest that a silent translated connection may be kept: a week.
const MAX_NAT_S: u32 = 7 * 24 * 60 * 60;
/// Places of a ring: a burst fits in the smallest.
const MIN_RING: u32 = BURST as u32;
const MAX_RING: u32 = 1 << 16;
/// An idle worker turns every 100 ms, and is looked at as often: less would take it for hung.
pub const MIN_HANG_TIMEOUT_MS: u32 = 300;
/// What copy-mode transmission sends at once in any case; the kernel refuses a smaller budget.
const MIN_TX_BUDGET: u32 = 32;

/// What `judge` makes of a key, with its default and its range.
macro_rules! judged {
    ($judge:ident, $written:ident.$key:ident, $defaults:ident, $range:expr, $report:ident) => {
        $judge(stringify!($key), &$written.$key, ($defaults.$key, $range), $report)
    };
}

pub fn node(written: &file::Node, report: &mut Report) -> Node {
    let defaults = Node::default();
    let vtep = written.vtep.as_ref().and_then(|key| address("vtep", key, report));
    let vtep6 = written.vtep6.as_ref().and_then(|key| ipv6_address("vtep6", key, report));
    if let (Some(IpAddr::V6(_)), Some(first), Some(second)) = (vtep, &written.vtep, &written.vtep6)
    {
        report.conflict(
            second.span(),
            "there are two sources for tunnels over IPv6",
            "leave it out, for `vtep` is an IPv6 address already",
            first.span(),
        );
    }
    Node {
        name: written
            .name
            .as_ref()
            .and_then(|key| name("name", key, report))
            .unwrap_or(defaults.name),
        interfaces: written
            .interfaces
            .as_ref()
            .map_or(defaults.interfaces, |key| interfaces(key, report)),
        vtep,
        vtep6,
        workers: written.workers.as_ref().map_or(defaults.workers, |key| workers(key, report)),
        cores: written.cores.as_ref().map_or(defaults.cores, |key| cores(key, report)),
        answer_arp: written.answer_arp.unwrap_or(defaults.answer_arp),
        announce_table: written.announce_table.as_ref().and_then(|key| announce_table(key, report)),
        local_link: written.local_link.as_ref().map_or(defaults.local_link, |key| *key.get_ref()),
    }
}

pub fn api(written: &file::Api, report: &mut Report) -> Api {
    let defaults = Api::default();
    let (path, mode) = (&written.socket, &written.socket_mode);
    let state = &written.state_directory;
    Api {
        socket: path.as_ref().map_or(defaults.socket, |key| socket_path(key, report)),
        socket_mode: mode.as_ref().map_or(defaults.socket_mode, |key| socket_mode(key, report)),
        listen: listen(written, report),
        tls: tls(written, report),
        state_directory: state
            .as_ref()
            .map_or(defaults.state_directory, |key| absolute("state_directory", key, report)),
        metrics_limit: judged!(number, written.metrics_limit, defaults, 0..=1_000_000, report),
    }
}

/// The tunnel sources, each with its place.
pub fn vteps(node: &Node, written: &file::Node) -> Vec<(IpAddr, Span)> {
    let vtep = node.vtep.zip(written.vtep.as_ref());
    let vtep6 = node.vtep6.map(IpAddr::V6).zip(written.vtep6.as_ref());
    vtep.into_iter().chain(vtep6).map(|(address, key)| (address, key.span())).collect()
}

pub fn dataplane(written: &file::Dataplane, report: &mut Report) -> Dataplane {
    let defaults = Dataplane::default();
    let rings = MIN_RING..=MAX_RING;
    let settings = Dataplane {
        xdp_mode: written.xdp_mode.unwrap_or(defaults.xdp_mode),
        copy_mode: written.copy_mode.unwrap_or(defaults.copy_mode),
        idle: written.idle.unwrap_or(defaults.idle),
        idle_spin_us: judged!(number, written.idle_spin_us, defaults, 0..=10_000, report),
        frame_size_bytes: judged!(
            power_of_two,
            written.frame_size_bytes,
            defaults,
            2048..=4096,
            report
        ),
        frames_per_queue: judged!(
            power_of_two,
            written.frames_per_queue,
            defaults,
            512..=1 << 16,
            report
        ),
        ring_size: judged!(power_of_two, written.ring_size, defaults, rings, report),
        rx_ring_size: own_ring_size("rx_ring_size", &written.rx_ring_size, report),
        tx_ring_size: own_ring_size("tx_ring_size", &written.tx_ring_size, report),
        fill_ring_size: own_ring_size("fill_ring_size", &written.fill_ring_size, report),
        completion_ring_size: own_ring_size(
            "completion_ring_size",
            &written.completion_ring_size,
            report,
        ),
        fill_batch: judged!(number, written.fill_batch, defaults, 1..=MAX_RING, report),
        huge_pages: written.huge_pages.unwrap_or(defaults.huge_pages),
        need_wakeup: written.need_wakeup.unwrap_or(defaults.need_wakeup),
        tx_budget: judged!(number, written.tx_budget, defaults, MIN_TX_BUDGET..=MAX_RING, report),
        busy_poll_us: judged!(number, written.busy_poll_us, defaults, 0..=10_000, report),
        busy_poll_budget: judged!(number, written.busy_poll_budget, defaults, 1..=1024, report),
        prefer_busy_poll: written.prefer_busy_poll.unwrap_or(defaults.prefer_busy_poll),
        icmp_errors_per_s: judged!(
            number,
            written.icmp_errors_per_s,
            defaults,
            1..=1_000_000,
            report
        ),
        hang_timeout_ms: judged!(
            number,
            written.hang_timeout_ms,
            defaults,
            MIN_HANG_TIMEOUT_MS..=60_000,
            report
        ),
    };
    rings_fit(&settings, written, report);
    settings
}

/// The local link is a veth, and all of a worker's sockets copy, or none.
pub fn local_link_copies(node: &file::Node, dataplane: &file::Dataplane, report: &mut Report) {
    let Some(key) = &node.local_link else { return };
    if *key.get_ref() == LocalLink::Always && dataplane.copy_mode == Some(CopyMode::ZeroCopy) {
        report.error(
            key.span(),
            "there is no `local_link` without copying, and `copy_mode` is \"zero-copy\"",
            "\"never\", or another `copy_mode`",
        );
    }
}

/// A ring's own size, if it has one.
fn own_ring_size(key: &str, written: &Key<i64>, report: &mut Report) -> Option<u32> {
    let rings = (Dataplane::default().ring_size, MIN_RING..=MAX_RING);
    written.is_some().then(|| power_of_two(key, written, rings, report))
}

/// Frames fill the fill ring and the tx ring of a queue at once, a fill ring can't be filled by more
/// than it has places, and one system call sends no more than a ring. Each may be broken by making
/// the larger one smaller, so that is pointed at, too.
fn rings_fit(settings: &Dataplane, written: &file::Dataplane, report: &mut Report) {
    let Dataplane { frames_per_queue, fill_batch, tx_budget, .. } = *settings;
    let Rings { fill, tx, .. } = settings.rings();
    let first_written =
        |keys: &[&Key<i64>]| keys.iter().find_map(|key| key.as_ref()).map(Spanned::span);
    let (fill_key, tx_key) = (&written.fill_ring_size, &written.tx_ring_size);
    let common_key = &written.ring_size;
    if fill + tx > frames_per_queue
        && let Some(span) =
            first_written(&[fill_key, tx_key, common_key, &written.frames_per_queue])
    {
        report.error(
            span,
            format!(
                "{frames_per_queue} frames do not fill a fill ring of {fill} and a tx ring of {tx}"
            ),
            format!(
                "make these {frames_per_queue} together at most, or set more `frames_per_queue`"
            ),
        );
    }
    if fill_batch > fill
        && let Some(span) = first_written(&[&written.fill_batch, fill_key, common_key])
    {
        report.error(
            span,
            format!("`fill_batch` is {fill_batch}, more than the {fill} places of a fill ring"),
            format!("set `fill_batch` to at most {fill}, or a larger `fill_ring_size`"),
        );
    }
    if tx_budget > tx
        && let Some(span) = first_written(&[&written.tx_budget, tx_key, common_key])
    {
        report.error(
            span,
            format!("`tx_budget` is {tx_budget}, more than the {tx} places of a tx ring"),
            format!("set `tx_budget` to at most {tx}, or a larger `tx_ring_size`"),
        );
    }
}

pub fn connections(written: &file::Connections, report: &mut Report) -> Connections {
    let defaults = Connections::default();
    let unconfirmed = 1..=Timeouts::MAX_UNCONFIRMED_S;
    Connections {
        capacity: judged!(power_of_two, written.capacity, defaults, 1 << 10..=1 << 27, report),
        admissions_per_s: judged!(
            number,
            written.admissions_per_s,
            defaults,
            1..=100_000_000,
            report
        ),
        unconfirmed_s: judged!(number, written.unconfirmed_s, defaults, unconfirmed, report),
        tcp_idle_s: judged!(
            number,
            written.tcp_idle_s,
            defaults,
            1..=Timeouts::MAX_TCP_IDLE_S,
            report
        ),
        tcp_closing_s: judged!(
            number,
            written.tcp_closing_s,
            defaults,
            1..=Timeouts::MAX_TCP_CLOSING_S,
            report
        ),
        udp_idle_s: judged!(
            number,
            written.udp_idle_s,
            defaults,
            1..=Timeouts::MAX_UDP_IDLE_S,
            report
        ),
    }
}

pub fn nat(written: &file::Nat, report: &mut Report) -> Nat {
    let defaults = Nat::default();
    let silent = defaults.timeouts;
    let first_port = judged!(number, written.first_port, defaults, 1..=u16::MAX, report);
    Nat {
        addresses: judged!(number, written.addresses, defaults, 1..=MAX_BANKS as u32, report),
        first_port,
        last_port: judged!(number, written.last_port, defaults, first_port..=u16::MAX, report),
        timeouts: nat::Timeouts {
            opening_s: judged!(number, written.opening_s, silent, 1..=600, report),
            tcp_idle_s: judged!(number, written.tcp_idle_s, silent, 1..=MAX_NAT_S, report),
            half_closed_s: judged!(number, written.half_closed_s, silent, 1..=MAX_NAT_S, report),
            time_wait_s: judged!(number, written.time_wait_s, silent, 1..=600, report),
            udp_idle_s: judged!(number, written.udp_idle_s, silent, 1..=MAX_NAT_S, report),
        },
    }
}

pub fn maglev(written: &file::Maglev, report: &mut Report) -> Maglev {
    let defaults = Maglev::default();
    let range = 7..=MAX_TABLE_SIZE;
    let table_size = judged!(number, written.table_size, defaults, range.clone(), report);
    if let Some(key) = &written.table_size
        && range.contains(&table_size)
        && !is_prime(table_size)
    {
        let below = (1..table_size).rev().find(|&n| is_prime(n)).unwrap_or(table_size);
        report.error(
            key.span(),
            format!("`table_size` is {table_size}, which is not prime"),
            format!("{below} and {} are", prime_from(table_size)),
        );
    }
    Maglev { table_size, seed: written.seed.clone().unwrap_or(defaults.seed) }
}

pub fn limits(written: &file::Limits, report: &mut Report) -> Limits {
    let defaults = Limits::default();
    Limits {
        backends: judged!(number, written.backends, defaults, 1..=MAX_BACKENDS as u32, report),
        vips: judged!(number, written.vips, defaults, 1..=1 << 20, report),
        health_checks: judged!(number, written.health_checks, defaults, 1..=1 << 16, report),
        local_clients: judged!(number, written.local_clients, defaults, 1..=1 << 20, report),
    }
}

pub fn liveness(written: &file::Liveness, report: &mut Report) -> Liveness {
    let defaults = Liveness::default();
    Liveness {
        enabled: written.enabled.unwrap_or(defaults.enabled),
        interval_ms: judged!(number, written.interval_ms, defaults, 50..=10_000, report),
        fall: judged!(number, written.fall, defaults, 1..=100, report),
    }
}

/// The smallest prime that is no less than `n`.
pub fn prime_from(n: u32) -> u32 {
    (n..=u32::MAX).find(|&n| is_prime(n)).unwrap_or(n)
}

/// A number, or its default; `(default, range)` go together, for one lies in the other.
pub fn number<T>(
    key: &str,
    written: &Key<i64>,
    (default, range): (T, RangeInclusive<T>),
    report: &mut Report,
) -> T
where
    T: TryFrom<i64> + PartialOrd + Display + Copy,
{
    let Some(written) = written else { return default };
    match T::try_from(*written.get_ref()) {
        Ok(number) if range.contains(&number) => number,
        _ => {
            let message = format!("`{key}` is {}, out of its range", written.get_ref());
            report.error(written.span(), message, format!("{} to {}", range.start(), range.end()));
            default
        }
    }
}

fn power_of_two(
    key: &str,
    written: &Key<i64>,
    (default, range): (u32, RangeInclusive<u32>),
    report: &mut Report,
) -> u32 {
    let Some(written) = written else { return default };
    match u32::try_from(*written.get_ref()) {
        Ok(number) if number.is_power_of_two() && range.contains(&number) => number,
        _ => {
            let message = format!("`{key}` is {}, out of its range", written.get_ref());
            let remedy = format!("a power of two from {} to {}", range.start(), range.end());
            report.error(written.span(), message, remedy);
            default
        }
    }
}

/// A name of ours: it becomes a metric's label and a word on the command line.
pub fn name(key: &str, written: &Spanned<String>, report: &mut Report) -> Option<String> {
    let name = written.get_ref();
    let fits = (1..=MAX_NAME).contains(&name.len());
    if fits && !name.contains(char::is_control) && name.trim() == name {
        return Some(name.clone());
    }
    report.error(
        written.span(),
        format!("`{key}` is no usable name"),
        format!("1 to {MAX_NAME} bytes, without blanks around it and without control characters"),
    );
    None
}

/// An address that one host can have on a network.
pub fn address(key: &str, written: &Spanned<String>, report: &mut Report) -> Option<IpAddr> {
    let text = written.get_ref();
    let Ok(address) = text.parse() else {
        let message = format!("`{key}` is `{text}`, which is not an IP address");
        report.error(written.span(), message, "as in 192.0.2.1 or 2001:db8::1");
        return None;
    };
    if let Some((kind, remedy)) = unusable(address) {
        report.error(written.span(), format!("`{key}` is {address}, {kind}"), remedy);
        return None;
    }
    Some(address)
}

fn ipv6_address(key: &str, written: &Spanned<String>, report: &mut Report) -> Option<Ipv6Addr> {
    match address(key, written, report)? {
        IpAddr::V6(address) => Some(address),
        IpAddr::V4(address) => {
            let message = format!("`{key}` is {address}, an IPv4 address");
            report.error(written.span(), message, "an IPv6 address; IPv4 goes into `vtep`");
            None
        }
    }
}

/// Why no single host on a network can have the address, and what would do.
fn unusable(address: IpAddr) -> Option<(&'static str, String)> {
    let mapped = match address {
        IpAddr::V6(address) => address.to_ipv4_mapped(),
        IpAddr::V4(_) => None,
    };
    if let Some(ipv4) = mapped {
        return Some(("an IPv4-mapped address", format!("write {ipv4}")));
    }
    let kind = match address {
        _ if address.is_unspecified() => "the unspecified address",
        _ if address.is_loopback() => "a loopback address",
        _ if address.is_multicast() => "a multicast address",
        IpAddr::V4(address) if address.is_broadcast() => "the broadcast address",
        _ => return None,
    };
    Some((kind, "an address that one host on the network can have".to_owned()))
}

pub fn interface(written: &Spanned<String>, report: &mut Report) -> Option<String> {
    let name = written.get_ref();
    let fits = (1..=MAX_INTERFACE_NAME).contains(&name.len());
    if fits && !name.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control()) {
        return Some(name.clone());
    }
    report.error(
        written.span(),
        format!("no interface can be named `{name}`"),
        format!("a name as `ip link` shows it, of at most {MAX_INTERFACE_NAME} bytes"),
    );
    None
}

/// A table of our own: what stands in the kernel's would be forwarded by.
fn announce_table(written: &Spanned<i64>, report: &mut Report) -> Option<u32> {
    let kind = match u32::try_from(*written.get_ref()) {
        Ok(0) | Err(_) => "no routing table's number",
        Ok(253) => "the kernel's table `default`",
        Ok(254) => "the kernel's table `main`",
        Ok(255) => "the kernel's table `local`",
        Ok(table) => return Some(table),
    };
    report.error(
        written.span(),
        format!("`announce_table` is {}, {kind}", written.get_ref()),
        format!("a table that no `ip rule` names: 1 to {}, but 253 to 255", u32::MAX),
    );
    None
}

fn interfaces(written: &Spanned<Vec<Spanned<String>>>, report: &mut Report) -> Vec<String> {
    let list = written.get_ref();
    if list.len() > MAX_INTERFACES {
        let message = format!("there are {} interfaces", list.len());
        report.error(written.span(), message, format!("at most {MAX_INTERFACES}"));
    }
    for (index, name) in list.iter().enumerate() {
        let first = list[..index].iter().find(|first| first.get_ref() == name.get_ref());
        if let Some(first) = first {
            let message = format!("the interface `{}` is given twice", name.get_ref());
            report.conflict(name.span(), message, "leave it out here", first.span());
        }
    }
    list.iter().filter_map(|name| interface(name, report)).collect()
}

fn workers(written: &Spanned<AutoOr<i64>>, report: &mut Report) -> Workers {
    match written.get_ref() {
        AutoOr::Word(word) if word == "auto" => Workers::Auto,
        AutoOr::Value(count @ 1..=MAX_CORES) => Workers::Count(*count as usize),
        AutoOr::Value(count) => {
            let message = format!("`workers` is {count}, out of its range");
            report.error(written.span(), message, format!("1 to {MAX_CORES}, or \"auto\""));
            Workers::Auto
        }
        AutoOr::Word(word) => {
            not_auto("workers", word, "a whole number", written.span(), report);
            Workers::Auto
        }
    }
}

fn cores(written: &Spanned<AutoOr<Vec<i64>>>, report: &mut Report) -> Cores {
    let list = match written.get_ref() {
        AutoOr::Word(word) if word == "auto" => return Cores::Auto,
        AutoOr::Word(word) => {
            not_auto("cores", word, "a list of numbers", written.span(), report);
            return Cores::Auto;
        }
        AutoOr::Value(list) => list,
    };
    let mut distinct = list.clone();
    distinct.sort_unstable();
    distinct.dedup();
    let in_range = list.iter().all(|core| (0..MAX_CORES).contains(core));
    if !in_range || list.is_empty() || distinct.len() < list.len() {
        let highest = MAX_CORES - 1;
        report.error(
            written.span(),
            "`cores` is no list of cores",
            format!("different core numbers from 0 to {highest}, at least one, or \"auto\""),
        );
        return Cores::Auto;
    }
    Cores::List(list.iter().map(|&core| core as usize).collect())
}

fn not_auto(key: &str, word: &str, otherwise: &str, span: Span, report: &mut Report) {
    report.error(span, format!("`{key}` is \"{word}\""), format!("\"auto\" or {otherwise}"));
}

/// A path that a Unix socket can have.
pub fn socket_path(written: &Spanned<String>, report: &mut Report) -> PathBuf {
    let path = written.get_ref();
    if !path.starts_with('/') || path.len() > MAX_SOCKET_PATH || path.contains('\0') {
        report.error(
            written.span(),
            "`socket` is no path that a socket can have",
            format!("an absolute path of at most {MAX_SOCKET_PATH} bytes"),
        );
    }
    PathBuf::from(path)
}

pub fn absolute(key: &str, written: &Spanned<String>, report: &mut Report) -> PathBuf {
    let path = written.get_ref();
    if !path.starts_with('/') || path.contains('\0') {
        let message = format!("`{key}` is `{path}`");
        report.error(written.span(), message, "an absolute path, as in /var/lib/wiremesh");
    }
    PathBuf::from(path)
}

/// Addresses to listen on. Without TLS everybody who reaches one may do everything.
fn listen(written: &file::Api, report: &mut Report) -> Vec<SocketAddr> {
    let each = written.listen.iter().flat_map(|key| key.get_ref());
    each.filter_map(|key| {
        let Ok(address) = key.get_ref().parse::<SocketAddr>() else {
            let message = format!("`{}` is no address to listen on", key.get_ref());
            report.error(key.span(), message, "an address and a port, as in 127.0.0.1:9180");
            return None;
        };
        if !address.ip().is_loopback() && written.certificate.is_none() {
            report.error(
                key.span(),
                format!("{address} can be reached from elsewhere"),
                "a loopback address, or `certificate`, `key` and `client_ca` for TLS",
            );
        }
        Some(address)
    })
    .collect()
}

/// What TLS needs: all of it, or nothing.
fn tls(written: &file::Api, report: &mut Report) -> Option<Tls> {
    let file::Api { certificate, key, client_ca, .. } = written;
    let keys = [("certificate", certificate), ("key", key), ("client_ca", client_ca)];
    let first = keys.iter().find_map(|(_, key)| key.as_ref())?;
    let missing: Vec<_> = keys.iter().filter(|(_, key)| key.is_none()).collect();
    for (name, _) in &missing {
        let message = format!("TLS needs `{name}`, too");
        report.error(first.span(), message, format!("add `{name}`, a file in PEM"));
    }
    let mut file = |name: &str, key: &Key<String>| Some(absolute(name, key.as_ref()?, report));
    let certificate = file("certificate", certificate);
    let (key, client_ca) = (file("key", key), file("client_ca", client_ca));
    Some(Tls { certificate: certificate?, key: key?, client_ca: client_ca? })
}

/// Octal, as in "0660". Its owner has to be able to use it: the daemon itself asks who answers there.
fn socket_mode(written: &Spanned<String>, report: &mut Report) -> u32 {
    match u32::from_str_radix(written.get_ref(), 8) {
        Ok(mode) if mode & 0o600 == 0o600 && mode <= 0o777 => mode,
        _ => {
            let message = format!("`socket_mode` is `{}`", written.get_ref());
            let remedy = "an octal mode that its owner can read and write by, as in \"0660\"";
            report.error(written.span(), message, remedy);
            Api::default().socket_mode
        }
    }
}
