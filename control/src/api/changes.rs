//! Changes of services, one at a time: judged, made durable, handed to the daemon, and acknowledged once
//! the workers have them. Or refused, and then nothing has changed.
//!
//! A task of its own, for the disk may be slow, and the daemon follows next hops meanwhile.

use std::sync::Arc;

use axum::http::StatusCode;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::spawn_blocking,
};
use tracing::{error, info};

use super::{Problem, resource};
use crate::{
    causes,
    config::{Limits, Remark, ServiceSpec},
    desired::{Claim, Conflict, Desired, OutOfMesh, Owner, Service, TunnelEnds, Vip, join},
    source::api::{Services, Store, StoreError},
    view::View,
};

/// Changes that wait for their turn. More have to wait to be let in.
const QUEUE: usize = 64;

/// What is to become of a service.
#[derive(Debug)]
pub enum Change {
    /// It must not be there yet.
    Create(Service),
    /// It must be there.
    Replace(Service, Condition),
    /// It must be there.
    Remove(String, Condition),
}

/// What must be there for a change to be done: `If-Match`, RFC 9110 section 13.1.1.
#[derive(Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing was said.
    Missing,
    /// Whatever it is.
    Any,
    /// One of these versions.
    Versions(Vec<String>),
}

/// A change, and who waits for its outcome.
#[derive(Debug)]
struct Request {
    change: Change,
    outcome: oneshot::Sender<Result<Arc<View>, Problem>>,
}

/// Where changes are handed in.
#[derive(Clone, Debug)]
pub struct Changes(mpsc::Sender<Request>);

/// What the API wants, all of it, for the daemon.
#[derive(Debug)]
pub struct Wanted {
    /// All services of the API.
    pub services: Vec<Arc<Service>>,
    /// Beside those of the others, as they were when this was judged.
    pub joined: Desired,
    /// To be told when the workers have them, or why not.
    pub outcome: oneshot::Sender<Result<(), Refusal>>,
}

/// Why the daemon did not take something over.
#[derive(Debug)]
pub enum Refusal {
    /// It can't be; the running state stays.
    Impossible(String),
    /// The kernel would not.
    Failed(String),
}

/// Does the changes.
struct Writer {
    store: Option<Store>,
    services: Services,
    limits: Limits,
    tunnel_ends: TunnelEnds,
    views: watch::Receiver<Arc<View>>,
    daemon: mpsc::Sender<Wanted>,
}

impl Changes {
    /// Begins to take changes in, with these services from before. The daemon's end comes with it.
    pub fn start(
        store: Store,
        services: Services,
        limits: Limits,
        views: watch::Receiver<Arc<View>>,
    ) -> (Self, mpsc::Receiver<Wanted>) {
        let (changes, mut requests) = mpsc::channel::<Request>(QUEUE);
        let (daemon, wanted) = mpsc::channel(1);
        let (store, tunnel_ends) = (Some(store), TunnelEnds::default());
        let mut writer = Writer { store, services, limits, tunnel_ends, views, daemon };
        tokio::spawn(async move {
            while let Some(request) = requests.recv().await {
                let outcome = writer.change(request.change).await;
                let outcome = outcome.map(|()| writer.views.borrow().clone());
                // Whoever asked may have gone; it is done all the same.
                let _ = request.outcome.send(outcome);
            }
        });
        (Self(changes), wanted)
    }

    /// Does a change, and waits until it is durable and the workers have it. What is there then is returned,
    /// before the next change: its version is the one that this change has made.
    ///
    /// # Errors
    /// If it is refused. Nothing has changed then.
    pub async fn change(&self, change: Change) -> Result<Arc<View>, Problem> {
        let (outcome, told) = oneshot::channel();
        let ending = |_| Problem::new(StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping");
        self.0.send(Request { change, outcome }).await.map_err(|_| ending(()))?;
        told.await.map_err(|_| ending(()))?
    }
}

impl Writer {
    async fn change(&mut self, change: Change) -> Result<(), Problem> {
        let (name, new) = match change {
            Change::Create(service) => {
                self.is_free(&service)?;
                (service.name.clone(), Some(Arc::new(service)))
            }
            Change::Replace(service, condition) => {
                let old = self.is_ours(&service.name, &condition)?;
                if old.written == service.written {
                    return Ok(());
                }
                (service.name.clone(), Some(Arc::new(service)))
            }
            Change::Remove(name, condition) => {
                self.is_ours(&name, &condition)?;
                (name, None)
            }
        };
        let old = self.put(&name, new.clone());
        if let Err(refusal) = self.make_so(&name, new.as_ref(), old.as_ref()).await {
            self.put(&name, old);
            return Err(refusal);
        }
        let done = match (&old, &new) {
            (None, _) => "created",
            (Some(_), Some(_)) => "updated",
            (Some(_), None) => "removed",
        };
        info!(service = name, "{done} by the API");
        Ok(())
    }

    /// Puts a service in its place, or nobody. Returns who was there.
    fn put(&mut self, name: &str, service: Option<Arc<Service>>) -> Option<Arc<Service>> {
        match service {
            Some(service) => self.services.insert(name.to_owned(), service),
            None => self.services.remove(name),
        }
    }

    /// Makes what is wanted now durable, and has it taken over.
    async fn make_so(
        &mut self,
        name: &str,
        new: Option<&Arc<Service>>,
        old: Option<&Arc<Service>>,
    ) -> Result<(), Problem> {
        let joined = self.can_be(new.map(|new| &**new))?;
        let taken_over = match self.keep(name, new).await {
            Ok(()) => self.hand_over(joined).await,
            Err(refusal) => Err(refusal),
        };
        if taken_over.is_err()
            // It may be durable, and must not come to life after a restart.
            && let Err(stuck) = self.keep(name, old).await
        {
            let why = stuck.detail;
            error!(service = name, "refused, but a restart may bring it back: {why}");
        }
        taken_over
    }

    fn is_free(&self, service: &Service) -> Result<(), Problem> {
        let view = self.views.borrow();
        let Some((taken, _)) = view.service(&service.name) else { return Ok(()) };
        let detail = format!("there is a service `{}` already, of the {}", taken.name, taken.owner);
        let remark = Remark {
            pointer: "/name".to_owned(),
            detail: detail.clone(),
            remedy: "choose another name, or replace that one".to_owned(),
        };
        Err(Problem::about(StatusCode::CONFLICT, detail, vec![remark]))
    }

    /// The service that is to be changed, if we may and it is what the client thinks it is.
    fn is_ours(&self, name: &str, condition: &Condition) -> Result<Arc<Service>, Problem> {
        let own = self.services.get(name).cloned();
        let service = own.or_else(|| Some(self.views.borrow().service(name)?.0.clone()));
        let service = service.ok_or_else(|| Problem::no_service(name))?;
        if service.owner != Owner::Api {
            let detail = format!("`{name}` is the {}'s: change it there", service.owner);
            return Err(Problem::new(StatusCode::CONFLICT, detail));
        }
        let version = resource::version(service.owner, &ServiceSpec::from(&*service));
        match condition {
            Condition::Any => Ok(service),
            Condition::Versions(versions) if versions.contains(&version) => Ok(service),
            Condition::Versions(_) => {
                let detail = format!("`{name}` has changed meanwhile: read it again");
                Err(Problem::new(StatusCode::PRECONDITION_FAILED, detail))
            }
            Condition::Missing => {
                let detail =
                    "say which version is meant, by If-Match with the ETag it was read with";
                Err(Problem::new(StatusCode::PRECONDITION_REQUIRED, detail))
            }
        }
    }

    /// These beside the others' services, if they can stand there and there is room for them.
    fn can_be(&mut self, new: Option<&Service>) -> Result<Desired, Problem> {
        let view = self.views.borrow().clone();
        let others: Vec<_> = view.desired.others(Owner::Api).cloned().collect();
        let own: Vec<_> = self.services.values().cloned().collect();
        let (overlays, ends) = (&view.desired.overlays, &mut self.tunnel_ends);
        let joined = join(&[&others, &own], overlays, &view.vteps, ends);
        let joined = joined.map_err(|conflict| conflict_problem(&conflict, new))?;
        let exceeded = |error| Problem::new(StatusCode::CONFLICT, format!("{error}"));
        self.limits.admit(&joined, &view.addresses).map_err(exceeded)?;
        Ok(joined)
    }

    /// Makes a service durable, or its absence.
    async fn keep(&mut self, name: &str, service: Option<&Arc<Service>>) -> Result<(), Problem> {
        let mut store = self.store.take().expect("given back below");
        let (name, spec) = (name.to_owned(), service.map(|service| ServiceSpec::from(&**service)));
        let (store, kept) = spawn_blocking(move || {
            let kept = match spec {
                Some(spec) => store.put(&name, &spec),
                None => store.remove(&name),
            };
            (store, kept)
        })
        .await
        .expect("the store does not panic");
        self.store = Some(store);
        kept.map_err(|error: StoreError| {
            let sentence = causes::line(&error);
            error!("a change by the API is refused: {sentence}");
            Problem::new(StatusCode::INTERNAL_SERVER_ERROR, sentence)
        })
    }

    async fn hand_over(&self, joined: Desired) -> Result<(), Problem> {
        let (outcome, told) = oneshot::channel();
        let services = self.services.values().cloned().collect();
        let wanted = Wanted { services, joined, outcome };
        let _ = self.daemon.send(wanted).await;
        match told.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(Refusal::Impossible(why))) => Err(Problem::new(StatusCode::CONFLICT, why)),
            Ok(Err(Refusal::Failed(why))) => {
                Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, why))
            }
            Err(_) => Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping")),
        }
    }
}

/// Points at the value of `new` that can't be because of what is there.
fn conflict_problem(conflict: &Conflict, new: Option<&Service>) -> Problem {
    let (pointer, remedy) = match conflict.claim {
        Claim::Name => ("/name".to_owned(), "choose another name"),
        Claim::Port(..) => ("/ports".to_owned(), "another port or VIP"),
        Claim::TunnelEnd(address) => {
            let to_it = |new: &Service| new.backends.iter().position(|b| b.vtep == address);
            let is_other = |new: &&Service| new.vip != Vip::Address(address);
            match new.filter(is_other).and_then(to_it) {
                Some(index) => (format!("/backends/{index}/vtep"), "the node's own address"),
                None => ("/vip".to_owned(), "an address that no tunnel ends at"),
            }
        }
        Claim::TunnelPort(_) => ("/ports".to_owned(), "another port"),
        Claim::Mesh(index, OutOfMesh::NoOverlay { .. }) => {
            let remedy = "add [[overlay]] for it to the configuration file";
            (format!("/backends/{index}/vni"), remedy)
        }
        Claim::Mesh(index, OutOfMesh::OtherPort { .. }) => {
            (format!("/backends/{index}/port"), "the overlay's")
        }
        Claim::Mesh(index, OutOfMesh::OtherFamily { .. }) => {
            let remedy = "add an address of its family to the overlay in the configuration file";
            (format!("/backends/{index}/address"), remedy)
        }
        Claim::Mesh(index, OutOfMesh::Ours { .. }) => {
            (format!("/backends/{index}/address"), "the server's own address")
        }
        // No service is to blame.
        Claim::Overlay(_) => (String::new(), "one description of it"),
    };
    let detail = conflict.to_string();
    let remark = Remark { pointer, detail: detail.clone(), remedy: remedy.to_owned() };
    Problem::about(StatusCode::CONFLICT, detail, vec![remark])
}

impl Desired {
    /// The services that this owner may not change.
    fn others(&self, owner: Owner) -> impl Iterator<Item = &Arc<Service>> {
        self.services.iter().filter(move |service| service.owner != owner)
    }
}
