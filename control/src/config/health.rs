//! `[service.health]` to what is done: which keys a check has, and what they may be.

use std::{ops::RangeInclusive, time::Duration};

use serde::{Deserialize, Serialize};
use toml::Spanned;
use utoipa::ToSchema;

use super::{
    file::{self, Key},
    finding::Report,
    settings::number,
};
use crate::{
    desired::{PortMapping, Protocol, ServicePort},
    health::{AllDown, Check, Exchange, Health, Http, OnDown, Pace, Probe, Verify},
};

/// What `status` is if nothing is said: what is no error to a browser.
const STATUS: &str = "200-399";
/// The status codes there are, RFC 9110 section 15, but for the interim ones.
const STATUSES: RangeInclusive<u16> = 200..=599;
/// The largest datagram that a check sends, in bytes: fits any tunnel.
const MAX_SEND: usize = 512;
/// An interval's default, in milliseconds, and what it may be: a busier check would be load, a lazier one
/// of no use.
const INTERVAL_MS: (u32, RangeInclusive<u32>) = (2000, 100..=3_600_000);
/// A timeout's default, in milliseconds, where half an interval is no less.
const TIMEOUT_MS: u32 = 1000;
const MIN_TIMEOUT_MS: u32 = 10;
/// Most results in a row that can be asked for.
const MAX_RUN: u32 = 100;

/// Kinds of checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CheckKind {
    /// Connects to the backend's address.
    Tcp,
    /// Sends a GET request there.
    Http,
    /// Sends a GET request there over TLS.
    Https,
    /// Sends a datagram there, and waits for an answer.
    Udp,
    /// Goes as clients' packets go: through the tunnel, to the VIP.
    Tunnel,
}

impl CheckKind {
    #[cfg(test)]
    pub(super) const ALL: &[Self] = &[Self::Tcp, Self::Http, Self::Https, Self::Udp, Self::Tunnel];

    /// As it is written.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http => "http",
            Self::Https => "https",
            Self::Udp => "udp",
            Self::Tunnel => "tunnel",
        }
    }

    /// The keys that it has besides those that all have.
    pub(super) fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Tcp => &[],
            Self::Http => &["path", "host", "status", "body"],
            Self::Https => &["path", "host", "status", "body", "tls_verify"],
            Self::Udp | Self::Tunnel => &["send", "expect"],
        }
    }

    /// What its port is over; a tunnel takes what there is.
    fn protocols(self) -> &'static [Protocol] {
        match self {
            Self::Tcp | Self::Http | Self::Https => &[Protocol::Tcp],
            Self::Udp => &[Protocol::Udp],
            Self::Tunnel => &[Protocol::Tcp, Protocol::Udp],
        }
    }
}

/// `None` if something is missing or wrong, which has then been reported.
pub fn health(
    written: &Spanned<file::Health>,
    published: &[PortMapping],
    report: &mut Report,
) -> Option<Health> {
    let keys = written.get_ref();
    let Some(kind) = &keys.check else {
        let remedy = "add one, as in `check = \"tcp\"`: tcp, http, https, udp or tunnel";
        report.error(written.span(), "the health check has no `check`", remedy);
        return None;
    };
    let kind = *kind.get_ref();
    only_its_keys(kind, written, report);
    let port = port(kind, written, published, report);
    let exchange = || Exchange {
        send: keys.send.as_ref().map(|key| key.get_ref().clone()).unwrap_or_default(),
        expect: keys.expect.as_ref().map(|key| key.get_ref().clone()),
    };
    if let Some(send) = keys.send.as_ref().filter(|send| send.get_ref().len() > MAX_SEND) {
        let message = format!("`send` has {} bytes", send.get_ref().len());
        report.error(send.span(), message, format!("at most {MAX_SEND}"));
    }
    let probe = match kind {
        CheckKind::Tcp => Probe::Tcp,
        CheckKind::Http => Probe::Http(http(keys, None, report)),
        CheckKind::Https => {
            let verified = keys.tls_verify.as_ref().is_none_or(|key| *key.get_ref());
            let verify = if verified { Verify::Trusted } else { Verify::Anything };
            Probe::Http(http(keys, Some(verify), report))
        }
        CheckKind::Udp => Probe::Udp(exchange()),
        CheckKind::Tunnel => Probe::Tunnel(exchange()),
    };
    Some(Health {
        check: Check { probe, port: port? },
        pace: pace(keys, report),
        on_down: keys.on_down.unwrap_or_default(),
        all_down: keys.all_down.unwrap_or_default(),
    })
}

/// A key that means nothing to this kind of check was meant for another one.
fn only_its_keys(kind: CheckKind, written: &Spanned<file::Health>, report: &mut Report) {
    let keys = written.get_ref();
    let given = [
        ("path", keys.path.as_ref().map(Spanned::span)),
        ("host", keys.host.as_ref().map(Spanned::span)),
        ("status", keys.status.as_ref().map(Spanned::span)),
        ("body", keys.body.as_ref().map(Spanned::span)),
        ("tls_verify", keys.tls_verify.as_ref().map(Spanned::span)),
        ("send", keys.send.as_ref().map(Spanned::span)),
        ("expect", keys.expect.as_ref().map(Spanned::span)),
    ];
    for (key, span) in given {
        let Some(span) = span.filter(|_| !kind.keys().contains(&key)) else { continue };
        let kinds = [CheckKind::Http, CheckKind::Https, CheckKind::Udp, CheckKind::Tunnel];
        let those = kinds.into_iter().filter(|kind| kind.keys().contains(&key));
        let those: Vec<_> = those.map(CheckKind::name).collect();
        let message = format!("`{key}` means nothing to a check by {}", kind.name());
        report.error(span, message, format!("leave it out, or check by {}", those.join(" or ")));
    }
}

fn port(
    kind: CheckKind,
    written: &Spanned<file::Health>,
    published: &[PortMapping],
    report: &mut Report,
) -> Option<ServicePort> {
    // Only clients' packets are translated.
    let over = |protocol| {
        let of = published.iter().find(|port| port.published.protocol == protocol);
        of.map(|port| ServicePort { port: port.target, protocol })
    };
    let first = kind.protocols().iter().find_map(|protocol| over(*protocol));
    let Some(key) = &written.get_ref().port else {
        // Without any port the service itself is wrong, and that has been said.
        if first.is_none() && !published.is_empty() {
            let protocols: Vec<_> = kind.protocols().iter().map(ToString::to_string).collect();
            let protocols = protocols.join(" or ");
            let message = format!("the service publishes no port over {protocols}");
            let remedy = match kind {
                CheckKind::Tunnel => "check by tcp, http, https or udp, with a `port`",
                _ => "say which `port` is checked, or check in another way",
            };
            report.error(written.span(), message, remedy);
        }
        return first;
    };
    // 0 stands for a number that is out of range, and reported as such.
    let port = number("port", &written.get_ref().port, (0, 1..=u16::MAX), report);
    let with = |protocol: &Protocol| ServicePort { port, protocol: *protocol };
    if kind != CheckKind::Tunnel || port == 0 {
        return kind.protocols().first().map(with);
    }
    let publishes = |port: &ServicePort| published.iter().any(|mapping| mapping.published == *port);
    let found = kind.protocols().iter().map(with).find(publishes);
    if found.is_none() {
        let message =
            format!("`port` is {port}, which the service does not publish over tcp or udp");
        let remedy = "a published port, for the check goes to the VIP; or leave it out";
        report.error(key.span(), message, remedy);
    }
    found
}

fn pace(keys: &file::Health, report: &mut Report) -> Pace {
    let interval_ms = number("interval_ms", &keys.interval_ms, INTERVAL_MS, report);
    let timeout_default = TIMEOUT_MS.min(interval_ms / 2);
    let timeout = (timeout_default, MIN_TIMEOUT_MS..=interval_ms);
    let timeout_ms = number("timeout_ms", &keys.timeout_ms, timeout, report);
    let ms = |ms: u32| Duration::from_millis(ms.into());
    Pace {
        interval: ms(interval_ms),
        timeout: ms(timeout_ms),
        rise: number("rise", &keys.rise, (2, 1..=MAX_RUN), report),
        fall: number("fall", &keys.fall, (3, 1..=MAX_RUN), report),
        jitter_percent: number("jitter_percent", &keys.jitter_percent, (10, 0..=50), report),
    }
}

fn http(keys: &file::Health, tls: Option<Verify>, report: &mut Report) -> Http {
    let path = keys.path.as_ref().map_or("/", |key| key.get_ref());
    let is_target = path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic());
    if let Some(key) = keys.path.as_ref().filter(|_| !is_target) {
        let message = format!("`path` is `{path}`, which is not a path");
        report.error(key.span(), message, "as in \"/health?full=1\": a slash first, no blanks");
    }
    let host = keys.host.as_ref();
    if let Some(key) = host
        && !is_host(key.get_ref())
    {
        let message = format!("`host` is `{}`, which is not a host", key.get_ref());
        report.error(key.span(), message, "a name or address, as in \"shop.example\"");
    }
    let mut status = Vec::new();
    match &keys.status {
        None => status.extend(status_range(STATUS)),
        Some(written) if written.get_ref().is_empty() => {
            report.error(written.span(), "no status is expected", "at least one, as in [\"200\"]");
        }
        Some(written) => {
            for written in written.get_ref() {
                let range = status_range(written.get_ref());
                if range.is_none() {
                    let message = format!("`{}` is not a status", written.get_ref());
                    let remedy = "200 to 599, as in \"204\" or \"200-399\"";
                    report.error(written.span(), message, remedy);
                }
                status.extend(range);
            }
        }
    }
    Http {
        tls,
        path: path.to_owned(),
        host: host.map(|key| key.get_ref().clone()),
        status,
        body: keys.body.as_ref().map(|key| key.get_ref().clone()),
    }
}

/// Whether it can stand in a Host header.
fn is_host(text: &str) -> bool {
    text.parse::<hyper::http::uri::Authority>()
        .is_ok_and(|authority| !authority.host().is_empty() && !text.contains('@'))
}

/// `204` or `200-399`.
fn status_range(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    let fits = STATUSES.contains(&first) && STATUSES.contains(&last) && first <= last;
    fits.then_some(first..=last)
}

/// All but tunnels lead to an address of the backend's own.
pub fn is_reached(kind: &Key<CheckKind>, written: &Spanned<file::Backend>, report: &mut Report) {
    let Some(kind) = kind.as_ref().map(|kind| *kind.get_ref()) else { return };
    if kind != CheckKind::Tunnel && written.get_ref().address.is_none() {
        let message = format!("the backend has no `address`, and is checked by {}", kind.name());
        report.error(written.span(), message, "add `address = \"10.1.0.2\"`, or check by tunnel");
    }
}

/// How a service's backends are checked. The keys are those of `[service.health]` in the configuration
/// file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({ "check": "tunnel" }))]
pub struct HealthSpec {
    /// How: `tcp`, `http`, `https` and `udp` go to each backend's `address`; `tunnel` goes through its
    /// tunnel to the VIP.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = true, nullable = false)]
    pub check: Option<CheckKind>,
    /// The port: the first one that is published over the check's protocol if left out; in mode `nat` the
    /// one that it is translated to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 65535)]
    pub port: Option<i64>,
    /// From one check to the next, in milliseconds: 2000 if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 100, maximum = 3600000)]
    pub interval_ms: Option<i64>,
    /// How long an answer may take, in milliseconds; at most an interval. 1000 if left out, or half an
    /// interval if that is less.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 10, maximum = 3600000)]
    pub timeout_ms: Option<i64>,
    /// Successes in a row that make a backend up: 2 if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 100)]
    pub rise: Option<i64>,
    /// Failures in a row that make it down: 3 if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 100)]
    pub fall: Option<i64>,
    /// By how many percent an interval may be shorter: 10 if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 50)]
    pub jitter_percent: Option<i64>,
    /// What becomes of a down backend's connections: `reselect` if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_down: Option<OnDown>,
    /// What happens while all backends are down: `keep-last` if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub all_down: Option<AllDown>,
    /// `http` and `https`: what is asked for; `/` if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// `http` and `https`: the Host header, and the name that the certificate must have. The backend's
    /// address if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// `http` and `https`: the status codes that are a success; `["200-399"]` if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<Vec<String>>,
    /// `http` and `https`: what the body has to contain, in its first 64 KiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// `https`: whether the certificate has to be good, by the system's trusted ones. If left out, it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_verify: Option<bool>,
    /// `udp`, and `tunnel` to a UDP port: what is sent; nothing if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub send: Option<String>,
    /// `udp`, and `tunnel` to a UDP port: what the answer has to contain, in its first 2048
    /// bytes; any answer will do if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expect: Option<String>,
}

impl HealthSpec {
    /// Another kind of check: what only the old one knew is gone.
    pub fn change_kind(&mut self, kind: CheckKind) {
        let old = std::mem::take(self);
        let has = |key: &str| kind.keys().contains(&key);
        *self = Self {
            check: Some(kind),
            port: old.port,
            interval_ms: old.interval_ms,
            timeout_ms: old.timeout_ms,
            rise: old.rise,
            fall: old.fall,
            jitter_percent: old.jitter_percent,
            on_down: old.on_down,
            all_down: old.all_down,
            path: old.path.filter(|_| has("path")),
            host: old.host.filter(|_| has("host")),
            status: old.status.filter(|_| has("status")),
            body: old.body.filter(|_| has("body")),
            tls_verify: old.tls_verify.filter(|_| has("tls_verify")),
            send: old.send.filter(|_| has("send")),
            expect: old.expect.filter(|_| has("expect")),
        };
    }
}

impl From<&Health> for HealthSpec {
    fn from(health: &Health) -> Self {
        let Health { check, pace, on_down, all_down } = health;
        let ms = |time: Duration| i64::try_from(time.as_millis()).ok();
        let spec = Self {
            port: Some(check.port.port.into()),
            interval_ms: ms(pace.interval),
            timeout_ms: ms(pace.timeout),
            rise: Some(pace.rise.into()),
            fall: Some(pace.fall.into()),
            jitter_percent: Some(pace.jitter_percent.into()),
            on_down: Some(*on_down),
            all_down: Some(*all_down),
            ..Self::default()
        };
        let exchange = |kind, exchange: &Exchange| Self {
            check: Some(kind),
            send: Some(exchange.send.clone()).filter(|send| !send.is_empty()),
            expect: exchange.expect.clone(),
            ..spec.clone()
        };
        match &check.probe {
            Probe::Tcp => Self { check: Some(CheckKind::Tcp), ..spec },
            Probe::Udp(udp) => exchange(CheckKind::Udp, udp),
            Probe::Tunnel(tunnel) => exchange(CheckKind::Tunnel, tunnel),
            Probe::Http(http) => Self {
                check: Some(if http.tls.is_some() { CheckKind::Https } else { CheckKind::Http }),
                path: Some(http.path.clone()),
                host: http.host.clone(),
                status: Some(http.status.iter().map(written_range).collect()),
                body: http.body.clone(),
                tls_verify: http.tls.map(|verify| verify == Verify::Trusted),
                ..spec
            },
        }
    }
}

/// Status codes as they are written.
pub fn written_range(range: &RangeInclusive<u16>) -> String {
    match (range.start(), range.end()) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;

    /// What is wrong with these keys of a service's health check, as `KEY: what: remedy`.
    fn errors(ports: &str, health: &str, backend: &str) -> Vec<String> {
        let text = format!(
            "[[service]]\nname = \"web\"\nvip = \"203.0.113.10\"\nports = {ports}\nvni = 1\n\
             [service.health]\n{health}\n[[service.backend]]\nname = \"b\"\nvtep = \"10.0.0.2\"\n\
             mac = \"02:00:00:00:00:02\"\n{backend}\n"
        );
        match Config::parse("w", &text) {
            Ok(_) => Vec::new(),
            Err(errors) => errors.findings().iter().map(|finding| finding.sentence()).collect(),
        }
    }

    #[test]
    fn a_check_that_cannot_be_is_refused_with_what_would_be_right() {
        let (tcp, address) = ("[\"80/tcp\"]", "address = \"10.1.0.2\"");
        for (ports, health, backend, wrong) in [
            (
                tcp,
                "",
                address,
                "w:6:1: the health check has no `check`: add one, as in `check = \"tcp\"`",
            ),
            (tcp, "check = \"ping\"", address, "unknown value `ping`: expected one of"),
            (
                tcp,
                "check = \"tcp\"",
                "",
                "w:8:1: the backend has no `address`, and is checked by tcp: add",
            ),
            (
                tcp,
                "check = \"http\"",
                "address = \"203.0.113.10\"",
                "`address` is 203.0.113.10, the VIP",
            ),
            (
                tcp,
                "check = \"tcp\"\npath = \"/\"",
                address,
                "w:8:8: `path` means nothing to a check by tcp: leave it out, or check by http or https",
            ),
            (tcp, "check = \"http\"\nsend = \"x\"", address, "check by udp or tunnel"),
            (tcp, "check = \"http\"\ntls_verify = false", address, "check by https"),
            (tcp, "check = \"udp\"", address, "publishes no port over udp: say which `port`"),
            (
                tcp,
                "check = \"tunnel\"\nport = 81",
                "",
                "`port` is 81, which the service does not publish",
            ),
            ("[\"80/sctp\"]", "check = \"tunnel\"", "", "publishes no port over tcp or udp"),
            (
                tcp,
                "check = \"tcp\"\ninterval_ms = 99",
                address,
                "`interval_ms` is 99, out of its range: 100 to 3600000",
            ),
            (
                tcp,
                "check = \"tcp\"\ntimeout_ms = 2001",
                address,
                "`timeout_ms` is 2001, out of its range: 10 to 2000",
            ),
            (tcp, "check = \"tcp\"\nrise = 0", address, "`rise` is 0, out of its range: 1 to 100"),
            (
                tcp,
                "check = \"tcp\"\nfall = 101",
                address,
                "`fall` is 101, out of its range: 1 to 100",
            ),
            (
                tcp,
                "check = \"tcp\"\njitter_percent = 51",
                address,
                "`jitter_percent` is 51, out of its range: 0 to 50",
            ),
            (
                tcp,
                "check = \"http\"\npath = \"up\"",
                address,
                "`path` is `up`, which is not a path: as in",
            ),
            (
                tcp,
                "check = \"http\"\nhost = \"a b\"",
                address,
                "`host` is `a b`, which is not a host: a name",
            ),
            (tcp, "check = \"http\"\nstatus = []", address, "no status is expected: at least one"),
            (
                tcp,
                "check = \"http\"\nstatus = [\"100\"]",
                address,
                "`100` is not a status: 200 to 599",
            ),
            (tcp, "check = \"http\"\nstatus = [\"300-200\"]", address, "`300-200` is not a status"),
            (tcp, "check = \"tcp\"\non_down = \"drop\"", address, "unknown value `drop`"),
        ] {
            let errors = errors(ports, health, backend);
            assert!(errors.len() == 1 && errors[0].contains(wrong), "{health}: {errors:#?}");
        }
        let long = format!("check = \"udp\"\nport = 53\nsend = \"{}\"", "x".repeat(513));
        assert!(errors(tcp, &long, address)[0].contains("`send` has 513 bytes: at most 512"));
        assert_eq!(errors(tcp, "check = \"tunnel\"", ""), <[String; 0]>::default());
    }

    #[test]
    fn what_is_left_out_has_a_default_that_fits_the_rest() {
        let health = |ports: &str, keys: &str| {
            let text = format!(
                "[[service]]\nname = \"web\"\nvip = \"203.0.113.10\"\nports = {ports}\n\
                 [service.health]\n{keys}\n"
            );
            let (config, _) = Config::parse("w", &text).unwrap();
            config.desired.services[0].health.clone().unwrap()
        };
        let both = "[\"53/udp\", \"80/tcp\"]";
        let port = |keys: &str| health(both, keys).check.port.to_string();
        assert_eq!(port("check = \"http\""), "80/tcp");
        assert_eq!(port("check = \"udp\""), "53/udp");
        assert_eq!(port("check = \"tunnel\""), "80/tcp");
        assert_eq!(port("check = \"tunnel\"\nport = 53"), "53/udp");
        assert_eq!(port("check = \"tcp\"\nport = 9000"), "9000/tcp");
        let quick = health(both, "check = \"tcp\"\ninterval_ms = 500").pace;
        assert_eq!(quick.timeout.as_millis(), 250);
    }
}
