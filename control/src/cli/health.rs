//! `--health-*`: what is typed of a service's checks becomes a [`HealthSpec`].

use std::str::FromStr;

use clap::Args;
use serde::{
    Deserialize,
    de::{IntoDeserializer, value},
};

use crate::{
    config::{CheckKind, HealthSpec},
    health::{AllDown, OnDown},
};

#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Health checks")]
pub struct Health {
    /// Check the backends by tcp, http, https or udp at their address, or by tunnel at the VIP
    #[arg(long, value_name = "KIND", value_parser = word::<CheckKind>)]
    health_check: Option<CheckKind>,
    /// The port that is checked: the first published one if left out
    #[arg(long, value_name = "PORT")]
    health_port: Option<i64>,
    /// Time from one check to the next, as in 500ms, 2s or 1m
    #[arg(long, value_name = "TIME")]
    health_interval: Option<Time>,
    /// Time that an answer may take
    #[arg(long, value_name = "TIME")]
    health_timeout: Option<Time>,
    /// Successes in a row that make a backend up
    #[arg(long, value_name = "COUNT")]
    health_rise: Option<i64>,
    /// Failures in a row that make a backend down
    #[arg(long, value_name = "COUNT")]
    health_fall: Option<i64>,
    /// By how many percent an interval may be shorter
    #[arg(long, value_name = "PERCENT")]
    health_jitter: Option<i64>,
    /// What becomes of a down backend's connections: reselect, reset or keep
    #[arg(long, value_name = "WHAT", value_parser = word::<OnDown>)]
    health_on_down: Option<OnDown>,
    /// What happens while all backends are down: keep-last or stop
    #[arg(long, value_name = "WHAT", value_parser = word::<AllDown>)]
    health_all_down: Option<AllDown>,
    /// http, https: the path that is asked for
    #[arg(long, value_name = "PATH")]
    health_path: Option<String>,
    /// http, https: the Host header, and the name in the certificate
    #[arg(long, value_name = "HOST")]
    health_host: Option<String>,
    /// http, https: status codes that are a success, as in 204 or 200-399
    #[arg(long, value_name = "CODES", value_delimiter = ',')]
    health_status: Vec<String>,
    /// http, https: what the body has to contain
    #[arg(long, value_name = "TEXT")]
    health_body: Option<String>,
    /// https: whether the certificate has to be good
    #[arg(long, value_name = "BOOL")]
    health_tls_verify: Option<bool>,
    /// udp, tunnel to a UDP port: what is sent
    #[arg(long, value_name = "TEXT")]
    health_send: Option<String>,
    /// udp, tunnel to a UDP port: what the answer has to contain
    #[arg(long, value_name = "TEXT")]
    health_expect: Option<String>,
}

impl Health {
    /// What was said, done to what there is.
    pub fn apply(&self, health: &mut Option<HealthSpec>) {
        let mut spec = health.take().unwrap_or_default();
        if let Some(kind) = self.health_check {
            spec.change_kind(kind);
        }
        let milliseconds = |time: &Option<Time>| time.as_ref().map(|time| time.0);
        set(&mut spec.port, self.health_port);
        set(&mut spec.interval_ms, milliseconds(&self.health_interval));
        set(&mut spec.timeout_ms, milliseconds(&self.health_timeout));
        set(&mut spec.rise, self.health_rise);
        set(&mut spec.fall, self.health_fall);
        set(&mut spec.jitter_percent, self.health_jitter);
        set(&mut spec.on_down, self.health_on_down);
        set(&mut spec.all_down, self.health_all_down);
        set(&mut spec.path, self.health_path.clone());
        set(&mut spec.host, self.health_host.clone());
        let status = Some(self.health_status.clone()).filter(|status| !status.is_empty());
        set(&mut spec.status, status);
        set(&mut spec.body, self.health_body.clone());
        set(&mut spec.tls_verify, self.health_tls_verify);
        set(&mut spec.send, self.health_send.clone());
        set(&mut spec.expect, self.health_expect.clone());
        *health = Some(spec).filter(|spec| *spec != HealthSpec::default());
    }
}

fn set<T>(key: &mut Option<T>, said: Option<T>) {
    if said.is_some() {
        *key = said;
    }
}

/// A word that the file knows too.
fn word<T: for<'a> Deserialize<'a>>(text: &str) -> Result<T, String> {
    let text: value::StrDeserializer<'_, value::Error> = text.into_deserializer();
    T::deserialize(text).map_err(|error| error.to_string())
}

/// A time in milliseconds, as docker writes it.
#[derive(Clone, Debug)]
struct Time(i64);

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(text.len() - digits);
        let factor = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err("a whole number with its unit, as in 500ms, 2s, 1m or 1h".to_owned()),
        };
        let number: Option<i64> = number.parse().ok();
        let time = number.and_then(|number| number.checked_mul(factor));
        time.map(Self).ok_or_else(|| format!("`{text}` is no time, as in 500ms or 2s"))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Typed {
        #[command(flatten)]
        health: Health,
    }

    fn typed(text: &str) -> Result<Health, String> {
        let words = std::iter::once("x").chain(text.split_whitespace());
        Typed::try_parse_from(words).map(|typed| typed.health).map_err(|error| error.to_string())
    }

    #[test]
    fn checks_are_typed_in_dockers_words_and_only_what_is_said_changes() {
        let mut health = None;
        typed("").unwrap().apply(&mut health);
        assert_eq!(health, None);
        typed("--health-check http --health-path /up --health-status 200-299,304 --health-interval 500ms")
            .unwrap()
            .apply(&mut health);
        let expected = HealthSpec {
            check: Some(CheckKind::Http),
            path: Some("/up".to_owned()),
            status: Some(vec!["200-299".to_owned(), "304".to_owned()]),
            interval_ms: Some(500),
            ..HealthSpec::default()
        };
        assert_eq!(health, Some(expected.clone()));
        typed("--health-fall 5 --health-all-down stop").unwrap().apply(&mut health);
        let more = HealthSpec { fall: Some(5), all_down: Some(AllDown::Stop), ..expected };
        assert_eq!(health, Some(more.clone()));
        typed("--health-check tunnel").unwrap().apply(&mut health);
        let tunnel =
            HealthSpec { check: Some(CheckKind::Tunnel), path: None, status: None, ..more };
        assert_eq!(health, Some(tunnel), "a path means nothing to a tunnel");
    }

    #[test]
    fn what_is_no_check_and_no_time_is_refused_with_what_would_be_right() {
        for (bad, right) in [
            ("--health-check ping", "`tunnel`"),
            ("--health-interval 5", "500ms"),
            ("--health-interval s", "500ms"),
            ("--health-interval 99999999999999999h", "500ms"),
            ("--health-on-down drop", "`keep`"),
        ] {
            let error = typed(bad).map(|_| ()).unwrap_err();
            assert!(error.contains(right), "{bad}: {error}");
        }
        assert_eq!("2m".parse::<Time>().unwrap().0, 120_000);
    }
}
