//! The watch stream: what is, and then what changes.
//!
//! Each watcher compares what it was told last with the newest view. So nobody keeps a queue for it: one
//! that reads slowly misses what came and went in between, and never the last state.

use std::{collections::HashMap, convert::Infallible, fmt, sync::Arc, time::Duration};

use axum::response::sse;
use futures_util::{Stream, StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::{sync::OwnedSemaphorePermit, time};
use utoipa::ToSchema;

use super::{Api, resource};
use crate::{
    config::ServiceSpec,
    desired::{self, Desired, ServicePort},
    local::Refused,
    plan::{Placement, Placements},
    source::swarm::SwarmStatus,
    view::{self, Placed, View},
};

/// How long after a change the next one is looked for, so that a storm of them costs little.
const PAUSE: Duration = Duration::from_millis(50);

/// Something that changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Event {
    /// There is a new service.
    Created {
        /// Its name.
        service: String,
        /// Who may change it.
        owner: String,
        /// Its version.
        version: String,
    },
    /// A service is wanted otherwise.
    Updated {
        /// Its name.
        service: String,
        /// Who may change it.
        owner: String,
        /// Its version.
        version: String,
    },
    /// A service is gone, and its backends with it.
    Removed {
        /// Its name.
        service: String,
    },
    /// A backend is new, or in another state.
    Backend {
        /// Its service.
        service: String,
        /// Its name.
        backend: String,
        /// `active`, `draining`, `drained`, `down` or `unreachable`.
        state: String,
        /// Its share of new connections.
        weight: u16,
        /// Why it is down or unreachable.
        reason: Option<String>,
        /// What its checks say, if it is checked: `up`, `down` or `unknown`.
        health: Option<String>,
    },
    /// A backend is gone.
    BackendRemoved {
        /// Its service.
        service: String,
        /// Its name.
        backend: String,
    },
    /// A change of the configuration file was refused, and the running state stays.
    Refused {
        /// Why.
        reason: String,
    },
    /// A port that is published on this node's addresses is kept from clients on the node, or no longer.
    LocalPort {
        /// The port, as in `80/tcp`.
        port: String,
        /// Why it is; `None` if it is no longer.
        reason: Option<String>,
    },
    /// Something that the Docker Swarm asks for is not done.
    Remark {
        /// What, and why.
        remark: String,
    },
    /// The Docker Swarm can't be read any more, and what was last known stays; or it can again.
    Swarm {
        /// Whether it can.
        fresh: bool,
        /// Why not.
        reason: Option<String>,
    },
    /// Workers forward by another snapshot, in which all that was told before is.
    Generation {
        /// Its number.
        generation: u64,
    },
}

impl Event {
    fn name(&self) -> &'static str {
        match self {
            Self::Created { .. } => "created",
            Self::Updated { .. } => "updated",
            Self::Removed { .. } => "removed",
            Self::Backend { .. } => "backend",
            Self::BackendRemoved { .. } => "backend-removed",
            Self::Refused { .. } => "refused",
            Self::LocalPort { .. } => "local-port",
            Self::Remark { .. } => "remark",
            Self::Swarm { .. } => "swarm",
            Self::Generation { .. } => "generation",
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Created { service, owner, .. } => write!(f, "{service}: there, of the {owner}"),
            Self::Updated { service, owner, .. } => write!(f, "{service}: changed by the {owner}"),
            Self::Removed { service } => write!(f, "{service}: removed"),
            Self::Backend { service, backend, state, weight, reason, health } => {
                write!(f, "{service}/{backend}: {state}, weight {weight}")?;
                health.iter().try_for_each(|health| write!(f, ", health {health}"))?;
                reason.iter().try_for_each(|reason| write!(f, ", {reason}"))
            }
            Self::BackendRemoved { service, backend } => write!(f, "{service}/{backend}: removed"),
            Self::Refused { reason } => write!(f, "the file's last change was refused: {reason}"),
            Self::LocalPort { reason: Some(reason), .. } => f.write_str(reason),
            Self::LocalPort { port, reason: None } => {
                write!(f, "{port} is no longer kept from clients on this node")
            }
            Self::Remark { remark } => write!(f, "swarm: {remark}"),
            Self::Swarm { reason: Some(reason), .. } => {
                write!(f, "the swarm can't be read: {reason}")
            }
            Self::Swarm { reason: None, .. } => f.write_str("the swarm is read"),
            Self::Generation { generation } => write!(f, "generation {generation}"),
        }
    }
}

/// What a watcher was told last: not the snapshot, which must not be kept for those who read slowly.
#[derive(Default)]
struct Told {
    desired: Desired,
    placements: Placements,
    refused: Option<String>,
    local_refused: Refused,
    swarm: SwarmStatus,
    generation: u64,
}

/// All events from now on, while `place` is kept.
pub fn stream(
    api: Api,
    place: OwnedSemaphorePermit,
) -> impl Stream<Item = Result<sse::Event, Infallible>> {
    let mut views = api.0.views.clone();
    views.mark_changed();
    let state = (api, views, Told::default(), place);
    let batches = stream::unfold(state, |(api, mut views, told, place)| async move {
        views.changed().await.ok()?;
        time::sleep(PAUSE).await;
        let view = views.borrow_and_update().clone();
        let (events, told) = api.beside(move || tell(told, &view)).await;
        Some((stream::iter(events), (api, views, told, place)))
    });
    batches.flatten().map(|event| {
        let data = serde_json::to_string(&event).expect("an event is plain data");
        Ok(sse::Event::default().event(event.name()).data(data))
    })
}

/// The difference, and what has been told then.
fn tell(told: Told, view: &View) -> (Vec<Event>, Told) {
    let mut events = Vec::new();
    let mut before: HashMap<&str, _> =
        view::placed(&told.desired, &told.placements).map(|one| (&*one.0.name, one)).collect();
    for (service, placements) in view.services() {
        let was = before.remove(&*service.name);
        let same = was.is_some_and(|(was, _)| Arc::ptr_eq(was, service) || was == service);
        if !same {
            let (name, owner) = (service.name.clone(), service.owner.to_string());
            let version = resource::version(service.owner, &ServiceSpec::from(&**service));
            events.push(match was {
                None => Event::Created { service: name, owner, version },
                Some(_) => Event::Updated { service: name, owner, version },
            });
        }
        if !same || was.is_some_and(|(_, was)| was != placements) {
            backends(was, (service, placements), &mut events);
        }
    }
    let mut gone: Vec<&str> = before.into_keys().collect();
    gone.sort_unstable();
    events.extend(gone.into_iter().map(|name| Event::Removed { service: name.to_owned() }));
    if let Some(reason) = view.refused.clone().filter(|_| view.refused != told.refused) {
        events.push(Event::Refused { reason });
    }
    let reasons = |(port, why): (&ServicePort, &String)| (*port, Some(why.clone()));
    let refused =
        view.local_refused.iter().filter(|(p, why)| told.local_refused.get(p) != Some(why));
    let again = told.local_refused.keys().filter(|port| !view.local_refused.contains_key(port));
    let ports = refused.map(reasons).chain(again.map(|port| (*port, None)));
    events.extend(ports.map(|(port, reason)| Event::LocalPort { port: port.to_string(), reason }));
    let swarm = view.swarm.as_ref().map(|swarm| swarm.status.clone()).unwrap_or_default();
    if (swarm.fresh, &swarm.reason) != (told.swarm.fresh, &told.swarm.reason) {
        events.push(Event::Swarm { fresh: swarm.fresh, reason: swarm.reason.clone() });
    }
    let remarks = swarm.remarks.iter().filter(|remark| !told.swarm.remarks.contains(remark));
    events.extend(remarks.map(|remark| Event::Remark { remark: remark.clone() }));
    if view.generation != told.generation {
        events.push(Event::Generation { generation: view.generation });
    }
    let told = Told {
        desired: view.desired.clone(),
        placements: view.placements.clone(),
        refused: view.refused.clone(),
        local_refused: view.local_refused.clone(),
        swarm,
        generation: view.generation,
    };
    (events, told)
}

/// What differs in a service's backends.
fn backends(was: Option<Placed<'_>>, (service, placements): Placed<'_>, events: &mut Vec<Event>) {
    let mut before: HashMap<&str, _> = was
        .into_iter()
        .flat_map(|(was, placements)| was.backends.iter().zip(placements))
        .map(|(backend, placement)| (&*backend.name, (backend, placement)))
        .collect();
    for (backend, placement) in service.backends.iter().zip(placements) {
        let event = |(backend, placement): (&desired::Backend, &Placement)| Event::Backend {
            service: service.name.clone(),
            backend: backend.name.clone(),
            state: view::state(backend, placement).to_owned(),
            weight: backend.weight,
            reason: view::reason(placement),
            health: placement.health.as_ref().map(|verdict| verdict.word().to_owned()),
        };
        let (was, is) = (before.remove(&*backend.name).map(event), event((backend, placement)));
        if was.as_ref() != Some(&is) {
            events.push(is);
        }
    }
    let mut gone: Vec<&str> = before.into_keys().collect();
    gone.sort_unstable();
    events.extend(gone.into_iter().map(|backend| Event::BackendRemoved {
        service: service.name.clone(),
        backend: backend.to_owned(),
    }));
}
