//! A service as a program says it: the keys of `[[service]]`, in JSON. It is judged by the same rules as
//! the file's; what is wrong is pointed at by a JSON pointer (RFC 6901) instead of a line.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::json;
use toml::Spanned;

use utoipa::{
    ToSchema,
    openapi::schema::{
        ArrayBuilder, ObjectBuilder, OneOf, OneOfBuilder, Schema, SchemaFormat, Type,
    },
};

pub use super::file::Scheduler;
use super::{
    HealthSpec, Maglev,
    file::{self, Key},
    finding::{Finding, Report},
    services,
};
use crate::desired::{self, Mode, Service, port_ranges};

/// A service: what clients connect to, and who serves them. The keys are those of `[[service]]` in the
/// configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceSpec {
    /// Unique.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(
        required = true,
        nullable = false,
        example = "shop",
        pattern = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
    )]
    pub name: Option<String>,
    /// The virtual address, IPv4 or IPv6; or, in mode `nat`, `node` for every IPv4 address of the node, and
    /// `node6` for every IPv6 address.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = true, schema_with = vip)]
    pub vip: Option<String>,
    /// Ports over tcp, udp or sctp, and ranges of them, as in `8000-8010/udp`. In mode `nat` with the ports
    /// that the servers listen on, if these are others, as in `80:8080/tcp`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = true, schema_with = ports)]
    pub ports: Option<Vec<String>>,
    /// How packets get to the backends: `dsr` if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// Mode `nat`: whose new connections are accepted, networks and addresses. Everybody's if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = json!(null), min_items = 1)]
    pub allow: Option<Vec<String>>,
    /// The VXLAN network identifier of its backends. Required here or at each of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 16777215, example = 100)]
    pub vni: Option<i64>,
    /// The UDP port of its backends' tunnels: 4789 if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 65535)]
    pub vxlan_port: Option<i64>,
    /// The largest IP packet that its tunnels carry, in bytes: what the link leaves if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 576, maximum = 9216)]
    pub mtu: Option<i64>,
    /// Whether the outer UDP checksum is computed: over IPv6 only if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub udp_checksum: Option<bool>,
    /// How new connections are placed: `maglev` if left out. What a connection was given it keeps, also if
    /// this changes. IPVS's names are understood too: `mh`, `rr`, `wrr`, `lc`, `wlc` and `sh`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduler: Option<Scheduler>,
    /// Of the scheduler `source`: for so many seconds after its latest new connection a client keeps its
    /// backend while others come and go. 300 if left out; 0: as long as none does.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 14400, example = json!(null))]
    pub affinity_timeout_s: Option<i64>,
    /// How its backends are checked: not at all if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthSpec>,
    /// Who serves it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backends: Vec<BackendSpec>,
}

/// A backend: one task of a service, behind a tunnel. The keys are those of `[[service.backend]]` in the
/// configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BackendSpec {
    /// Unique within the service, and the same on all nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = true, nullable = false, example = "shop-1")]
    pub name: Option<String>,
    /// The node it runs on: where the tunnel ends. IPv4 or IPv6.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(required = true, schema_with = address)]
    pub vtep: Option<String>,
    /// The MAC address of the vxlan device there. Required in mode `dsr`; in mode `nat` that of what has its
    /// `address`: `02:42:` and the bytes of an IPv4 address, as Docker gives it, if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(
        example = "02:42:0a:00:00:02",
        pattern = "^[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}$"
    )]
    pub mac: Option<String>,
    /// Its share of new connections, compared with the others': 1 if left out; 0 drains it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 1000)]
    pub weight: Option<i64>,
    /// Drains it, whatever its weight: it takes no new connections, and keeps those it has until then. What
    /// is left goes to others. A time in UTC, RFC 3339, or `forever`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(
        example = "2026-11-21T15:00:00Z",
        pattern = "^(forever|[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\\.[0-9]{1,9})?Z)$"
    )]
    pub drain_until: Option<String>,
    /// Its VXLAN network identifier, if not the service's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 16777215)]
    pub vni: Option<i64>,
    /// The UDP port of its tunnel, if not the service's `vxlan_port`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 65535)]
    pub port: Option<i64>,
    /// The largest IP packet that its tunnel carries, if not the service's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 576, maximum = 9216)]
    pub mtu: Option<i64>,
    /// Whether its outer UDP checksum is computed, if not as the service says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub udp_checksum: Option<bool>,
    /// The port that the server listens on: has to be what the service's `ports` say.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 65535, example = json!(null))]
    pub target_port: Option<i64>,
    /// The server's own address: where it is checked, and required for all checks but `tunnel`. In mode `nat`
    /// always required: its address in the overlay, which packets are translated to, IPv6 if the VIP is.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(schema_with = address)]
    pub address: Option<String>,
}

/// An IPv4 or IPv6 address of a server, in the document.
fn address() -> Schema {
    families("10.0.0.2", "2001:db8::2").into()
}

/// An address, with an example of each family.
fn families(v4: &str, v6: &str) -> OneOf {
    let family = |format: &str, example: &str| {
        let text = ObjectBuilder::new().schema_type(Type::String);
        text.format(Some(SchemaFormat::Custom(format.to_owned()))).examples([example])
    };
    OneOfBuilder::new().item(family("ipv4", v4)).item(family("ipv6", v6)).build()
}

/// What a service can be published on, in the document.
fn vip() -> Schema {
    let node = ObjectBuilder::new().schema_type(Type::String).enum_values(Some(["node", "node6"]));
    OneOfBuilder::from(families("203.0.113.20", "2001:db8:113::20")).item(node).into()
}

/// Published ports, in the document.
fn ports() -> Schema {
    let number =
        "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])";
    let range = format!("{number}(-{number})?");
    let pattern = format!("^{range}(:{range})?/(tcp|udp|sctp)$");
    let port = ObjectBuilder::new().schema_type(Type::String).pattern(Some(pattern));
    ArrayBuilder::new().items(port).min_items(Some(1)).examples([json!(["80/tcp"])]).into()
}

/// Something to say about one value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Remark {
    /// Which one: a JSON pointer, RFC 6901; empty for the whole.
    #[schema(example = "/backends/0/vni")]
    pub pointer: String,
    /// What is wrong.
    pub detail: String,
    /// What would be right.
    pub remedy: String,
}

impl ServiceSpec {
    /// What it means, and what to warn of.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn understand(&self, maglev: &Maglev) -> Result<(Service, Vec<Remark>), Vec<Remark>> {
        let mut places = Places::default();
        let written = places.service(self);
        let mut report = Report::new("request", "");
        let service = services::one(&written, maglev, &mut report);
        if let Some(name) = written.get_ref().name.as_ref().filter(|name| !is_label(name.get_ref()))
        {
            let message = format!("`name` is `{}`", name.get_ref());
            report.error(name.span(), message, LABEL);
        }
        let remarks = |findings: &[Finding]| findings.iter().map(|f| places.remark(f)).collect();
        match report.finish() {
            Ok(warnings) => {
                let service = service.expect("what is missing or wrong has been reported");
                let written = Some(Arc::new(self.clone()));
                let service = Service { owner: desired::Owner::Api, written, ..service };
                Ok((service, remarks(&warnings)))
            }
            Err(errors) => Err(remarks(errors.findings())),
        }
    }
}

/// What a name has to be that becomes a file's and a part of a path.
const LABEL: &str =
    "1 to 63 letters, digits, dashes, underscores and dots, a letter or digit first";

fn is_label(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=63).contains(&name.len())
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && name.bytes().all(inner)
}

/// As it was written, or could have been: then what all backends share stands at the service.
impl From<&Service> for ServiceSpec {
    fn from(service: &Service) -> Self {
        if let Some(written) = &service.written {
            return (**written).clone();
        }
        let first = service.backends.first().map(|backend| backend.vni);
        let common = first.filter(|vni| service.backends.iter().all(|b| b.vni == *vni));
        let number = |vni: desired::Vni| i64::from(vni.get());
        let backend = |backend: &desired::Backend| BackendSpec {
            name: Some(backend.name.clone()),
            vtep: Some(backend.vtep.to_string()),
            mac: Some(backend.mac.to_string()),
            weight: Some(backend.weight.into()),
            drain_until: backend.drain.map(|drain| drain.to_string()),
            vni: common.is_none().then(|| number(backend.vni)),
            port: Some(backend.port.into()),
            mtu: backend.mtu.map(i64::from),
            udp_checksum: backend.udp_checksum,
            target_port: None,
            address: backend.address.map(|address| address.to_string()),
        };
        let (scheduler, affinity_timeout_s) = service.scheduler.written();
        Self {
            name: Some(service.name.clone()),
            vip: Some(service.vip.to_string()),
            ports: Some(port_ranges(&service.ports)),
            mode: Some(service.mode),
            allow: (!service.allow.is_empty())
                .then(|| service.allow.iter().map(ToString::to_string).collect()),
            vni: common.map(number),
            vxlan_port: None,
            mtu: None,
            udp_checksum: None,
            scheduler: Some(scheduler),
            affinity_timeout_s,
            health: service.health.as_ref().map(HealthSpec::from),
            backends: service.backends.iter().map(backend).collect(),
        }
    }
}

/// Gives values places, as a text's parser does: the numbers of their JSON pointers.
#[derive(Default)]
struct Places(Vec<String>);

impl Places {
    fn place<T>(&mut self, pointer: String, value: T) -> Spanned<T> {
        self.0.push(pointer);
        Spanned::new(self.0.len() - 1..self.0.len(), value)
    }

    fn key<T: Clone>(&mut self, base: &str, key: &str, value: &Option<T>) -> Key<T> {
        value.clone().map(|value| self.place(format!("{base}/{key}"), value))
    }

    fn service(&mut self, spec: &ServiceSpec) -> Spanned<file::Service> {
        let ports = spec.ports.as_ref().map(|ports| {
            let numbered = ports.iter().enumerate();
            let each = numbered.map(|(i, port)| self.place(format!("/ports/{i}"), port.clone()));
            let each = each.collect();
            self.place("/ports".to_owned(), each)
        });
        let numbered = spec.backends.iter().enumerate();
        let backends = numbered.map(|(i, backend)| self.backend(i, backend)).collect();
        let allow = spec.allow.as_ref().map(|allow| {
            let numbered = allow.iter().enumerate();
            let each = numbered.map(|(i, net)| self.place(format!("/allow/{i}"), net.clone()));
            let each = each.collect();
            self.place("/allow".to_owned(), each)
        });
        let service = file::Service {
            name: self.key("", "name", &spec.name),
            vip: self.key("", "vip", &spec.vip),
            ports,
            mode: self.key("", "mode", &spec.mode),
            allow,
            vni: self.key("", "vni", &spec.vni),
            vxlan_port: self.key("", "vxlan_port", &spec.vxlan_port),
            mtu: self.key("", "mtu", &spec.mtu),
            udp_checksum: spec.udp_checksum,
            scheduler: self.key("", "scheduler", &spec.scheduler),
            affinity_timeout_s: self.key("", "affinity_timeout_s", &spec.affinity_timeout_s),
            health: spec.health.as_ref().map(|health| self.health(health)),
            backend: backends,
        };
        self.place(String::new(), service)
    }

    fn health(&mut self, spec: &HealthSpec) -> Spanned<file::Health> {
        let base = "/health";
        let status = spec.status.as_ref().map(|status| {
            let numbered = status.iter().enumerate();
            let each = numbered
                .map(|(i, range)| self.place(format!("{base}/status/{i}"), range.clone()))
                .collect();
            self.place(format!("{base}/status"), each)
        });
        let health = file::Health {
            check: self.key(base, "check", &spec.check),
            port: self.key(base, "port", &spec.port),
            interval_ms: self.key(base, "interval_ms", &spec.interval_ms),
            timeout_ms: self.key(base, "timeout_ms", &spec.timeout_ms),
            rise: self.key(base, "rise", &spec.rise),
            fall: self.key(base, "fall", &spec.fall),
            jitter_percent: self.key(base, "jitter_percent", &spec.jitter_percent),
            on_down: spec.on_down,
            all_down: spec.all_down,
            path: self.key(base, "path", &spec.path),
            host: self.key(base, "host", &spec.host),
            status,
            body: self.key(base, "body", &spec.body),
            tls_verify: self.key(base, "tls_verify", &spec.tls_verify),
            send: self.key(base, "send", &spec.send),
            expect: self.key(base, "expect", &spec.expect),
        };
        self.place(base.to_owned(), health)
    }

    fn backend(&mut self, index: usize, spec: &BackendSpec) -> Spanned<file::Backend> {
        let base = format!("/backends/{index}");
        let backend = file::Backend {
            name: self.key(&base, "name", &spec.name),
            vtep: self.key(&base, "vtep", &spec.vtep),
            mac: self.key(&base, "mac", &spec.mac),
            weight: self.key(&base, "weight", &spec.weight),
            drain_until: self.key(&base, "drain_until", &spec.drain_until),
            vni: self.key(&base, "vni", &spec.vni),
            port: self.key(&base, "port", &spec.port),
            mtu: self.key(&base, "mtu", &spec.mtu),
            udp_checksum: spec.udp_checksum,
            target_port: self.key(&base, "target_port", &spec.target_port),
            address: self.key(&base, "address", &spec.address),
        };
        self.place(base, backend)
    }

    fn remark(&self, finding: &Finding) -> Remark {
        Remark {
            pointer: self.0.get(finding.place()).cloned().unwrap_or_default(),
            detail: finding.to_string(),
            remedy: finding.remedy().to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use utoipa::PartialSchema;

    use super::*;
    use crate::config::Config;

    fn spec(json: serde_json::Value) -> ServiceSpec {
        serde_json::from_value(json).unwrap()
    }

    fn web() -> serde_json::Value {
        serde_json::json!({
            "name": "web", "vip": "203.0.113.10", "ports": ["80/tcp", "8000-8002/udp"], "vni": 100,
            "backends": [
                { "name": "web-1", "vtep": "10.0.0.2", "mac": "02:42:0a:00:00:02" },
                { "name": "web-2", "vtep": "10.0.0.3", "mac": "02:42:0a:00:00:03", "drain_until": "2026-11-21T15:00:00Z", "mtu": 1400 },
            ],
        })
    }

    fn understood(spec: &ServiceSpec) -> Service {
        spec.understand(&Maglev::default()).unwrap().0
    }

    #[test]
    fn the_documents_examples_make_a_service() {
        let document = |schema| serde_json::to_value(schema).unwrap()["properties"].take();
        let service = document(ServiceSpec::schema());
        let backend = document(BackendSpec::schema());
        for family in [0, 1] {
            let address = |of: &serde_json::Value| of["oneOf"][family]["examples"][0].clone();
            let made = spec(serde_json::json!({
                "name": service["name"]["example"],
                "vip": address(&service["vip"]),
                "ports": service["ports"]["examples"][0],
                "vni": service["vni"]["example"],
                "backends": [{
                    "name": backend["name"]["example"],
                    "vtep": address(&backend["vtep"]),
                    "mac": backend["mac"]["example"],
                    "address": address(&backend["address"]),
                    "drain_until": backend["drain_until"]["example"],
                }],
            }));
            assert_eq!(understood(&made).backends.len(), 1);
        }
    }

    #[test]
    fn json_and_toml_mean_the_same() {
        let text = r#"
            [[service]]
            name = "web"
            vip = "203.0.113.10"
            ports = ["80/tcp", "8000-8002/udp"]
            vni = 100
            backend = [
                { name = "web-1", vtep = "10.0.0.2", mac = "02:42:0a:00:00:02" },
                { name = "web-2", vtep = "10.0.0.3", mac = "02:42:0a:00:00:03", drain_until = "2026-11-21T15:00:00Z", mtu = 1400 },
            ]
        "#;
        let (config, _) = Config::parse("w.toml", text).unwrap();
        let file = &*config.desired.services[0];
        let api = understood(&spec(web()));
        assert_eq!(ServiceSpec::from(&api), spec(web()), "shown as it was written");
        let meant = |service: Service| Service { written: None, ..service };
        let api = meant(api);
        assert_eq!(api, Service { owner: desired::Owner::Api, ..file.clone() });
        // And what is shown of the file's means the same again.
        assert_eq!(meant(understood(&ServiceSpec::from(file))), api);
    }

    #[test]
    fn every_kind_of_check_means_the_same_in_json_and_is_shown_as_it_is_meant() {
        for health in [
            serde_json::json!({ "check": "tcp", "port": 8080, "rise": 5, "on_down": "keep" }),
            serde_json::json!({ "check": "http", "path": "/up", "status": ["200", "300-399"], "body": "ok" }),
            serde_json::json!({ "check": "https", "host": "a.example", "tls_verify": false, "all_down": "stop" }),
            serde_json::json!({ "check": "udp", "send": "ping", "interval_ms": 300 }),
            serde_json::json!({ "check": "tunnel", "port": 8001, "expect": "pong", "jitter_percent": 0 }),
        ] {
            let mut written = web();
            written["health"] = health;
            for backend in written["backends"].as_array_mut().unwrap() {
                backend["address"] = "10.1.0.2".into();
            }
            let meant = understood(&spec(written.clone()));
            assert!(meant.health.is_some());
            // As the file's are shown, in all their keys.
            let shown = ServiceSpec::from(&Service { written: None, ..meant.clone() });
            let again = understood(&shown);
            assert_eq!(again.health, meant.health, "{written}");
            assert_eq!(again.backends, meant.backends);
        }
        let mut bad = web();
        bad["health"] = serde_json::json!({ "check": "http", "status": ["ok"], "fall": 0 });
        let remarks = spec(bad).understand(&Maglev::default()).unwrap_err();
        let mut pointers: Vec<&str> = remarks.iter().map(|r| r.pointer.as_str()).collect();
        pointers.sort_unstable();
        assert_eq!(pointers, ["/backends/0", "/backends/1", "/health/fall", "/health/status/0"]);
    }

    #[test]
    fn all_that_is_wrong_is_pointed_at_with_what_would_be_right() {
        let mut bad = web();
        bad["ports"][1] = "80".into();
        bad["backends"][0]["weight"] = 70_000.into();
        bad["backends"][1]["name"] = "web-1".into();
        bad["backends"][1]["target_port"] = 8080.into();
        bad["backends"][1].as_object_mut().unwrap().remove("mac");
        let remarks = spec(bad).understand(&Maglev::default()).unwrap_err();
        let pointers: Vec<&str> = remarks.iter().map(|r| r.pointer.as_str()).collect();
        for pointer in [
            "/ports/1",
            "/backends/0/weight",
            "/backends/1/name",
            "/backends/1/target_port",
            "/backends/1",
        ] {
            assert!(pointers.contains(&pointer), "no {pointer} in {remarks:#?}");
        }
        let weight = remarks.iter().find(|r| r.pointer == "/backends/0/weight").unwrap();
        assert_eq!(weight.detail, "`weight` is 70000, out of its range");
        assert_eq!(weight.remedy, "0 to 1000");
    }

    #[test]
    fn a_name_is_fit_for_a_path() {
        let remarks = |name: &str| {
            let mut spec = spec(web());
            spec.name = Some(name.to_owned());
            spec.understand(&Maglev::default()).err().unwrap_or_default()
        };
        for good in ["web", "Web-1.example_2", &"x".repeat(63)] {
            assert_eq!(remarks(good), [], "{good}");
        }
        for bad in ["../x", "a/b", ".web", "-web", "", "a b", &"x".repeat(64)] {
            assert!(remarks(bad).iter().all(|remark| remark.pointer == "/name"), "{bad}");
            assert!(!remarks(bad).is_empty(), "{bad}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let remarks = ServiceSpec::default().understand(&Maglev::default()).unwrap_err();
        for key in ["name", "vip", "ports"] {
            let missing = format!("the service has no `{key}`");
            assert!(remarks.iter().any(|remark| remark.detail == missing), "{remarks:?}");
        }
    }
}
