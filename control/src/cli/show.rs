//! Answers of the API as tables for people. As JSON they are the API's own.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::Serialize;

use crate::{
    api::resource::{Flow, Node, Service},
    status::{BackendStatus, Drops, write_backends, write_table},
};

/// `service ls`.
#[derive(Serialize)]
#[serde(transparent)]
pub struct Listed(pub Vec<Service>);

impl fmt::Display for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |service: &Service| {
            let all = service.spec.backends.len();
            [
                service.name.clone(),
                service.owner.clone(),
                service.spec.vip.clone().unwrap_or_default(),
                service.spec.ports.as_deref().unwrap_or_default().join(" "),
                service.spec.scheduler.unwrap_or_default().to_string(),
                format!("{}/{all} active", service.backends.active),
            ]
        };
        let rows: Vec<_> = self.0.iter().map(row).collect();
        write_table(f, &["NAME", "OWNER", "VIP", "PORTS", "SCHEDULER", "BACKENDS"], &rows)
    }
}

/// `service ps`.
#[derive(Serialize)]
#[serde(transparent)]
pub struct Processes(pub Vec<BackendStatus>);

impl fmt::Display for Processes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_backends(f, &self.0)
    }
}

/// `node ls`.
#[derive(Serialize)]
#[serde(transparent)]
pub struct Nodes(pub Vec<Node>);

impl fmt::Display for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |node: &Node| {
            [
                node.name.clone().unwrap_or_else(|| "-".to_owned()),
                node.vtep.clone().unwrap_or_else(|| "-".to_owned()),
                node.state.clone(),
                node.liveness.clone().unwrap_or_else(|| "-".to_owned()),
                node.services.to_string(),
                node.backends.to_string(),
            ]
        };
        let rows: Vec<_> = self.0.iter().map(row).collect();
        let header = ["NAME", "VTEP", "STATE", "LIVENESS", "SERVICES", "BACKENDS"];
        write_table(f, &header, &rows)?;
        for Node { vtep, reason, .. } in &self.0 {
            if let (Some(vtep), Some(reason)) = (vtep, reason) {
                writeln!(f, "  {vtep} is unreachable: {reason}")?;
            }
        }
        Ok(())
    }
}

/// `drops`: how many of each reason, and how many a second just now.
#[derive(Serialize)]
#[serde(transparent)]
pub struct Dropped(BTreeMap<String, Rated>);

#[derive(Serialize)]
struct Rated {
    count: u64,
    per_s: f64,
    sentence: String,
}

impl Dropped {
    /// Of two looks, so far apart.
    pub fn new(
        before: &BTreeMap<String, Drops>,
        now: BTreeMap<String, Drops>,
        apart: Duration,
    ) -> Self {
        let rated = |(reason, Drops { count, sentence }): (String, Drops)| {
            let earlier = before.get(&reason).map_or(0, |drops| drops.count);
            (reason, Rated { count, per_s: rate(earlier, count, apart), sentence })
        };
        Self(now.into_iter().map(rated).collect())
    }
}

fn rate(before: u64, now: u64, apart: Duration) -> f64 {
    // A daemon that was started anew counts from zero.
    now.saturating_sub(before) as f64 / apart.as_secs_f64().max(1e-3)
}

/// Whole numbers where tenths would say no more.
fn shown(rate: f64) -> String {
    if rate < 10.0 && rate > 0.0 { format!("{rate:.1}") } else { format!("{rate:.0}") }
}

impl fmt::Display for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows: Vec<_> = self.0.iter().collect();
        rows.sort_by_key(|(_, rated)| std::cmp::Reverse(rated.count));
        let row = |(reason, rated): (&String, &Rated)| {
            [reason.clone(), rated.count.to_string(), shown(rated.per_s), rated.sentence.clone()]
        };
        let rows: Vec<_> = rows.into_iter().map(row).collect();
        write_table(f, &["REASON", "COUNT", "PER S", "MEANING"], &rows)
    }
}

/// `flows`: connections and packets of backends.
#[derive(Serialize)]
#[serde(transparent)]
pub struct Flows(Vec<RatedFlow>);

#[derive(Serialize)]
struct RatedFlow {
    #[serde(flatten)]
    flow: Flow,
    packets_per_s: f64,
    bits_per_s: f64,
}

impl Flows {
    /// Of two looks, so far apart.
    pub fn new(before: &[Flow], now: Vec<Flow>, apart: Duration) -> Self {
        let rated = |flow: Flow| {
            let same = |was: &&Flow| was.service == flow.service && was.backend == flow.backend;
            let (packets, bytes) = before
                .iter()
                .find(same)
                .map_or((flow.packets, flow.bytes), |f| (f.packets, f.bytes));
            RatedFlow {
                packets_per_s: rate(packets, flow.packets, apart),
                bits_per_s: 8.0 * rate(bytes, flow.bytes, apart),
                flow,
            }
        };
        Self(now.into_iter().map(rated).collect())
    }
}

impl fmt::Display for Flows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |RatedFlow { flow, packets_per_s, bits_per_s }: &RatedFlow| {
            [
                flow.service.clone(),
                flow.backend.clone(),
                flow.state.clone(),
                flow.connections.to_string(),
                shown(*packets_per_s),
                shown(*bits_per_s),
            ]
        };
        let rows: Vec<_> = self.0.iter().map(row).collect();
        let header = ["SERVICE", "BACKEND", "STATE", "CONNECTIONS", "PACKETS/S", "BITS/S"];
        write_table(f, &header, &rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_listed_most_first_with_their_rate() {
        let drops = |count| {
            let drops = |count| Drops { count, sentence: "Why.".to_owned() };
            BTreeMap::from([
                ("few".to_owned(), drops(count / 10)),
                ("many".to_owned(), drops(count)),
            ])
        };
        let dropped = Dropped::new(&drops(1000), drops(2050), Duration::from_secs(2));
        let expected = "  \
  REASON  COUNT  PER S  MEANING
  many     2050    525  Why.
  few       205     52  Why.
";
        assert_eq!(dropped.to_string(), expected);
        assert_eq!([0.0, 0.04, 9.96, 12.3].map(shown), ["0", "0.0", "10.0", "12"]);
    }

    #[test]
    fn a_daemon_that_was_started_anew_has_no_negative_rates() {
        assert_eq!(rate(1000, 10, Duration::from_secs(1)), 0.0);
    }

    #[test]
    fn nodes_are_shown_with_why_they_are_not_reached() {
        let node = |name: Option<&str>, state: &str, liveness: Option<&str>| Node {
            name: name.map(str::to_owned),
            vtep: Some("10.0.0.2".to_owned()),
            state: state.to_owned(),
            reason: liveness.map(|_| "silence".to_owned()),
            liveness: liveness.map(str::to_owned),
            services: 1,
            backends: 2,
        };
        let nodes =
            Nodes(vec![node(Some("n1"), "ready", None), node(None, "unreachable", Some("silent"))]);
        let expected = "  \
  NAME  VTEP      STATE        LIVENESS  SERVICES  BACKENDS
  n1    10.0.0.2  ready        -                1         2
  -     10.0.0.2  unreachable  silent           1         2
  10.0.0.2 is unreachable: silence
";
        assert_eq!(nodes.to_string(), expected);
    }
}
