//! What a service's operator says of its checks: plain data, judged by the configuration.

use std::{fmt, ops::RangeInclusive, time::Duration};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::desired::ServicePort;

/// `[service.health]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// What is done. Another one is another question, and begins without a verdict.
    pub check: Check,
    /// When, and how often it counts.
    pub pace: Pace,
    /// What becomes of a down backend's connections.
    pub on_down: OnDown,
    /// What happens while all of a service's backends are down.
    pub all_down: AllDown,
}

/// One check of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// How.
    pub probe: Probe,
    /// To which port. For a probe through the tunnel, one that the service publishes.
    pub port: ServicePort,
}

/// How a backend is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// A TCP connection to the backend's address.
    Tcp,
    /// A GET request there.
    Http(Http),
    /// A datagram there, and its answer.
    Udp(Exchange),
    /// A SYN, or a datagram, to the VIP, by the way that clients' packets go.
    Tunnel(Exchange),
}

/// A GET request, and the answer that is expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Http {
    /// Over TLS, and then whether the certificate is verified.
    pub tls: Option<Verify>,
    /// With the query, as it stands in the request.
    pub path: String,
    /// The Host header, and the name that the certificate must have. `None`: the backend's address.
    pub host: Option<String>,
    /// Any of these.
    pub status: Vec<RangeInclusive<u16>>,
    /// Somewhere in the first [`Http::BODY_BYTES`] of the body.
    pub body: Option<String>,
}

impl Http {
    /// How much of a body is searched: a page that goes on for ever must not occupy us for as long.
    pub const BODY_BYTES: usize = 64 << 10;
}

/// Whether a certificate is verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// By the system's trusted certificates.
    Trusted,
    /// Any will do, as nothing secret is sent.
    Anything,
}

/// A datagram, and the answer that is expected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exchange {
    /// What is sent.
    pub send: String,
    /// What the answer contains. `None`: any answer will do.
    pub expect: Option<String>,
}

/// When a backend is checked, and how results make a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// From one check's beginning to the next one's, at most.
    pub interval: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// Successes in a row that make a backend up.
    pub rise: u32,
    /// Failures in a row that make it down.
    pub fall: u32,
    /// By how many percent an interval may be shorter.
    pub jitter_percent: u32,
}

impl Pace {
    /// How long after a check's beginning the next one is due; `random` is from 0 to 1.
    ///
    /// A failure is looked into sooner, by the time it may have taken, so that also silence is noticed
    /// within interval × fall: the first check after the backend fell silent begins within an interval, the
    /// others follow each other by interval − timeout, and the last takes the timeout.
    pub fn wait(&self, suspicious: bool, random: f64) -> Duration {
        let jittered = self.interval.mul_f64(1.0 - random * f64::from(self.jitter_percent) / 100.0);
        match suspicious {
            true => jittered.min(self.interval - self.timeout),
            false => jittered,
        }
    }
}

/// What becomes of a down backend's connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnDown {
    /// They go to another backend, which resets what it does not know.
    #[default]
    Reselect,
    /// Their clients are told by a TCP reset when they next send; what has no connections is given another
    /// backend.
    Reset,
    /// They stay, and hang until the backend is back or they expire.
    Keep,
}

/// What happens while all of a service's backends are down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AllDown {
    /// It goes on as if all were up: the check may be what is wrong.
    #[default]
    KeepLast,
    /// Its packets are dropped, for the reason `no_backend`.
    Stop,
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Http(Http { tls: None, .. }) => "http",
            Self::Http(_) => "https",
            Self::Udp(_) => "udp",
            Self::Tunnel(_) => "tunnel",
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn silence_is_noticed_within_interval_times_fall(
            interval in 100_u64..100_000, fall in 2_u32..20, jitter_percent in 0_u32..=50,
            share in 0.0..0.5, random in 0.0..1.0,
        ) {
            let interval = Duration::from_millis(interval);
            let timeout = interval.mul_f64(share);
            let pace = Pace { interval, timeout, rise: 1, fall, jitter_percent };
            // At worst it falls silent right after a check began that it still answers.
            let noticed = pace.wait(false, 0.0) + pace.wait(true, random) * (fall - 1) + timeout;
            prop_assert!(noticed <= interval * fall, "{noticed:?} of {:?}", interval * fall);
            prop_assert!(pace.wait(false, random) >= interval.mul_f64(0.5));
            prop_assert!(pace.wait(true, random) >= timeout, "no two checks at once");
        }
    }
}
