//! Which request is answered by what. The OpenAPI document is generated from the same functions.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderName, StatusCode, Uri, header, uri::Authority},
    middleware::{self, Next},
    response::{IntoResponse, Response, Sse, sse},
    routing::get,
};
use serde::{Deserialize, Serialize};
use tokio::time;
use utoipa::{IntoParams, OpenApi};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    ANSWER_TIMEOUT, Api, Change, Condition, Event, MAX_BODY, Problem, events, metrics,
    request::{self, Asked, Name},
    resource::{self, Changed, Flow, Node, Service},
};
use crate::{
    config::{Remark, ServiceSpec},
    desired,
    explain::{self, Explained},
    source::swarm::{NEWS_TIMEOUT, News},
    status::{self, BackendStatus, Drops, Status},
    view::{Placed, View},
};

/// Who we are, for the document.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Wiremesh",
        description = "What a node forwards, why, and how to change it.",
        license(name = "MIT", identifier = "MIT"),
    ),
    servers((url = "http://localhost", description = "over the Unix socket api.socket")),
)]
struct Described;

/// All of them.
fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::with_openapi(Described::openapi())
        .routes(routes!(status))
        .routes(routes!(services, create))
        .routes(routes!(service, replace, remove))
        .routes(routes!(backends))
        .routes(routes!(drops))
        .routes(routes!(nodes))
        .routes(routes!(swarm))
        .routes(routes!(flows))
        .routes(routes!(explain))
        .routes(routes!(events))
        .routes(routes!(metrics))
}

/// The OpenAPI document.
pub fn document() -> utoipa::openapi::OpenApi {
    routes().to_openapi()
}

pub fn router(api: Api) -> Router {
    let (router, document) = routes().split_for_parts();
    let document = Bytes::from(serde_json::to_vec(&document).expect("a document is plain data"));
    let json = [(header::CONTENT_TYPE, "application/json")];
    router
        .route("/openapi.json", get(move || async move { (json, document) }))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn(in_time))
        .with_state(api)
}

async fn no_such_path(request: Request) -> Problem {
    let detail = format!("there is no {}: see /openapi.json", request.uri().path());
    Problem::new(StatusCode::NOT_FOUND, detail)
}

async fn no_such_method(request: Request) -> Problem {
    let detail = format!("{} does nothing to {}", request.method(), request.uri().path());
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail)
}

/// A web page whose name its owner has pointed at this machine gets no answer: who means us says so by an
/// address, or as localhost.
pub async fn no_rebinding(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let authority = host.and_then(|host| host.parse::<Authority>().ok());
    let ours = authority.is_some_and(|authority| {
        let host = authority.host().trim_matches(['[', ']']);
        host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok()
    });
    if ours {
        return next.run(request).await;
    }
    let detail = "`Host` has to be this machine's address, or localhost";
    Problem::new(StatusCode::MISDIRECTED_REQUEST, detail).into_response()
}

async fn in_time(request: Request, next: Next) -> Response {
    time::timeout(ANSWER_TIMEOUT, next.run(request)).await.unwrap_or_else(|_| {
        let detail = format!("it took more than {ANSWER_TIMEOUT:?}, and may still be done");
        Problem::new(StatusCode::GATEWAY_TIMEOUT, detail).into_response()
    })
}

/// An answer that may be long.
async fn long<T: Serialize + Send + 'static>(
    api: &Api,
    make: impl FnOnce() -> T + Send + 'static,
) -> Response {
    let body = api.beside(|| serde_json::to_vec(&make()).expect("plain data")).await;
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

fn with_etag(service: Service) -> ([(HeaderName, String); 1], Json<Service>) {
    ([(header::ETAG, service.etag())], Json(service))
}

/// The whole node: workers, services, drops.
#[utoipa::path(
    get, path = "/v1/status", tag = "node",
    responses((status = 200, body = Status)),
)]
async fn status(State(api): State<Api>) -> Response {
    let (observed, view, census) =
        (api.observed().clone(), api.view(), api.observed().census().await);
    long(&api, move || observed.status(&view, &census)).await
}

/// All services, of all owners.
#[utoipa::path(
    get, path = "/v1/services", tag = "services",
    responses((status = 200, body = Vec<Service>)),
)]
async fn services(State(api): State<Api>) -> Response {
    let view = api.view();
    long(&api, move || view.services().map(Service::new).collect::<Vec<_>>()).await
}

/// One service.
#[utoipa::path(
    get, path = "/v1/services/{name}", tag = "services",
    params(("name" = String, Path, description = "The service's name")),
    responses(
        (status = 200, body = Service, headers(("ETag" = String, description = "Its version"))),
        (status = 404, body = Problem, content_type = "application/problem+json"),
    ),
)]
async fn service(State(api): State<Api>, Name(name): Name) -> Result<impl IntoResponse, Problem> {
    let view = api.view();
    let placed = view.service(&name).ok_or_else(|| Problem::no_service(&name))?;
    Ok(with_etag(Service::new(placed)))
}

/// Creates a service.
///
/// Answered once it is durable and the workers forward by it.
#[utoipa::path(
    post, path = "/v1/services", tag = "services",
    request_body = ServiceSpec,
    responses(
        (status = 201, body = Changed, headers(
            ("ETag" = String, description = "Its version"),
            ("Location" = String, description = "Its path"),
        )),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json",
            description = "Another service has its name, a port of its VIP, or a tunnel to it; or there is no room"),
        (status = 413, body = Problem, content_type = "application/problem+json"),
        (status = 415, body = Problem, content_type = "application/problem+json"),
        (status = 422, body = Problem, content_type = "application/problem+json",
            description = "A value is wrong; `errors` says which, and what would be right"),
    ),
)]
async fn create(
    State(api): State<Api>,
    request::Json(spec): request::Json<ServiceSpec>,
) -> Result<impl IntoResponse, Problem> {
    let (service, warnings) = understand(&api, &spec)?;
    let path = Uri::try_from(format!("/v1/services/{}", service.name));
    let location = path.expect("a name is fit for a path").to_string();
    let name = service.name.clone();
    let view = api.changes().change(Change::Create(service)).await?;
    let changed = Changed::new(&view, &name, warnings)?;
    let headers = [(header::ETAG, changed.service.etag()), (header::LOCATION, location)];
    Ok((StatusCode::CREATED, headers, Json(changed)))
}

/// Replaces a service.
///
/// Only the version that `If-Match` names, or any by `*`. Answered once it is durable and the workers
/// forward by it.
#[utoipa::path(
    put, path = "/v1/services/{name}", tag = "services",
    params(
        ("name" = String, Path, description = "The service's name"),
        ("If-Match" = Option<String>, Header, description = "The ETag of the version that is meant"),
    ),
    request_body = ServiceSpec,
    responses(
        (status = 200, body = Changed, headers(("ETag" = String, description = "Its version"))),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json",
            description = "It is another owner's, or another service has what it wants"),
        (status = 412, body = Problem, content_type = "application/problem+json",
            description = "It has changed meanwhile"),
        (status = 413, body = Problem, content_type = "application/problem+json"),
        (status = 415, body = Problem, content_type = "application/problem+json"),
        (status = 422, body = Problem, content_type = "application/problem+json",
            description = "A value is wrong; `errors` says which, and what would be right"),
        (status = 428, body = Problem, content_type = "application/problem+json",
            description = "`If-Match` is missing"),
    ),
)]
async fn replace(
    State(api): State<Api>,
    Name(name): Name,
    condition: Condition,
    request::Json(spec): request::Json<ServiceSpec>,
) -> Result<impl IntoResponse, Problem> {
    let (service, warnings) = understand(&api, &spec)?;
    if service.name != name {
        let remark = Remark {
            pointer: "/name".to_owned(),
            detail: format!("`name` is `{}`, and the path says `{name}`", service.name),
            remedy: "the same name: a service can't be renamed".to_owned(),
        };
        let (status, detail) = (StatusCode::UNPROCESSABLE_ENTITY, remark.detail.clone());
        return Err(Problem::about(status, detail, vec![remark]));
    }
    let view = api.changes().change(Change::Replace(service, condition)).await?;
    let changed = Changed::new(&view, &name, warnings)?;
    Ok(([(header::ETAG, changed.service.etag())], Json(changed)))
}

/// Removes a service.
///
/// Only the version that `If-Match` names, or any by `*`. Its connections are dropped; to let them end,
/// drain its backends first.
#[utoipa::path(
    delete, path = "/v1/services/{name}", tag = "services",
    params(
        ("name" = String, Path, description = "The service's name"),
        ("If-Match" = Option<String>, Header, description = "The ETag of the version that is meant"),
    ),
    responses(
        (status = 204, description = "It is gone"),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json",
            description = "It is another owner's"),
        (status = 412, body = Problem, content_type = "application/problem+json",
            description = "It has changed meanwhile"),
        (status = 428, body = Problem, content_type = "application/problem+json",
            description = "`If-Match` is missing"),
    ),
)]
async fn remove(
    State(api): State<Api>,
    Name(name): Name,
    condition: Condition,
) -> Result<StatusCode, Problem> {
    api.changes().change(Change::Remove(name, condition)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What a body means, and what to warn of.
fn understand(api: &Api, spec: &ServiceSpec) -> Result<(desired::Service, Vec<Remark>), Problem> {
    spec.understand(&api.observed().maglev).map_err(|remarks| {
        let detail = remarks.iter().map(|remark| remark.detail.as_str()).collect::<Vec<_>>();
        let detail = detail.join("; ");
        Problem::about(StatusCode::UNPROCESSABLE_ENTITY, detail, remarks)
    })
}

/// A service's backends: their state, and what they were sent.
#[utoipa::path(
    get, path = "/v1/services/{name}/backends", tag = "services",
    params(("name" = String, Path, description = "The service's name")),
    responses(
        (status = 200, body = Vec<BackendStatus>),
        (status = 404, body = Problem, content_type = "application/problem+json"),
    ),
)]
async fn backends(
    State(api): State<Api>,
    Name(name): Name,
) -> Result<Json<Vec<BackendStatus>>, Problem> {
    let census = api.observed().census().await;
    let view = api.view();
    let (service, placements) = view.service(&name).ok_or_else(|| Problem::no_service(&name))?;
    Ok(Json(api.observed().backends(service, placements, &census)))
}

/// Packets dropped by all workers since the start, by reason.
#[utoipa::path(
    get, path = "/v1/drops", tag = "node",
    responses((status = 200, body = BTreeMap<String, Drops>)),
)]
async fn drops(State(api): State<Api>) -> Json<BTreeMap<String, Drops>> {
    Json(status::drops(api.observed().counters()))
}

/// This node, and those that its tunnels lead to.
#[utoipa::path(
    get, path = "/v1/nodes", tag = "node",
    responses((status = 200, body = Vec<Node>)),
)]
async fn nodes(State(api): State<Api>) -> Response {
    let (observed, view) = (api.observed().clone(), api.view());
    long(&api, move || resource::nodes(&observed, &view)).await
}

/// Which news.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct After {
    /// The version of the answer that is known already.
    after: Option<u64>,
}

/// What the Docker Swarm publishes, as this node's engine, a manager's, says.
///
/// For the nodes whose engines are workers'. With `after` it is answered as soon as there is another
/// version, and within ten seconds in any case.
#[utoipa::path(
    get, path = "/v1/swarm", tag = "node", params(After),
    responses(
        (status = 200, body = News),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json",
            description = "This node reads no swarm, or has it from others"),
    ),
)]
async fn swarm(
    State(api): State<Api>,
    Asked(After { after }): Asked<After>,
) -> Result<Response, Problem> {
    let mut views = api.0.views.clone();
    let is_new = |view: &Arc<View>| {
        let news = view.swarm.as_ref().and_then(|swarm| swarm.news.as_ref());
        news.is_none_or(|news| Some(news.version) != after)
    };
    // What is there is what is told, when the wait is over or the daemon ends.
    let _ = time::timeout(NEWS_TIMEOUT, views.wait_for(is_new)).await;
    let view = api.view();
    let news = view.swarm.as_ref().and_then(|swarm| swarm.news.clone());
    let news = news.ok_or_else(|| {
        let detail = "this node has no swarm to tell of: its engine is no manager's, or [source.swarm] \
            is not in its configuration";
        Problem::new(StatusCode::NOT_FOUND, detail)
    })?;
    Ok(long(&api, move || (*news).clone()).await)
}

/// Which flows.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Which {
    /// Of this service only.
    service: Option<String>,
    /// At most so many.
    #[serde(default = "Which::top")]
    #[param(default = 20, minimum = 1, maximum = 1000)]
    top: usize,
}

impl Which {
    fn top() -> usize {
        20
    }
}

/// The backends with the most connections.
///
/// The connection tables remember which backend a flow has by a hash of its addresses and ports, not by
/// these: single flows can't be listed. `/v1/explain` tells of a single one.
#[utoipa::path(
    get, path = "/v1/flows", tag = "flows", params(Which),
    responses(
        (status = 200, body = Vec<Flow>),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 404, body = Problem, content_type = "application/problem+json"),
    ),
)]
async fn flows(State(api): State<Api>, Asked(which): Asked<Which>) -> Result<Response, Problem> {
    if !(1..=1000).contains(&which.top) {
        let detail = format!("`top` is {}, out of its range: 1 to 1000", which.top);
        return Err(Problem::new(StatusCode::BAD_REQUEST, detail));
    }
    let (observed, view, census) =
        (api.observed().clone(), api.view(), api.observed().census().await);
    if let Some(name) = which.service.as_deref().filter(|name| view.service(name).is_none()) {
        return Err(Problem::no_service(name));
    }
    let make = move || {
        let wanted = |(service, _): &Placed<'_>| {
            which.service.as_ref().is_none_or(|name| service.name == *name)
        };
        resource::flows(&observed, view.services().filter(wanted), &census, which.top)
    };
    Ok(long(&api, make).await)
}

/// A flow.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Tuple {
    /// `tcp`, `udp` or `sctp`.
    #[param(example = "tcp")]
    protocol: String,
    /// The client's address and port.
    #[param(value_type = String, example = "198.51.100.7:40000")]
    client: SocketAddr,
    /// The VIP's address and port.
    #[param(value_type = String, example = "203.0.113.10:80")]
    vip: SocketAddr,
}

/// Which backend a flow gets, and why; and which workers remember it.
#[utoipa::path(
    get, path = "/v1/explain", tag = "flows", params(Tuple),
    responses(
        (status = 200, body = Explained),
        (status = 400, body = Problem, content_type = "application/problem+json"),
    ),
)]
async fn explain(
    State(api): State<Api>,
    Asked(tuple): Asked<Tuple>,
) -> Result<Json<Explained>, Problem> {
    let bad = |detail: String| Problem::new(StatusCode::BAD_REQUEST, detail);
    let protocol = tuple.protocol.parse();
    let protocol = protocol
        .map_err(|()| bad(format!("`protocol` is {}: tcp, udp or sctp", tuple.protocol)))?;
    let explained =
        explain::running(api.observed(), &api.view(), protocol, tuple.client, tuple.vip);
    explained.map(Json).map_err(|error| bad(error.to_string()))
}

/// What is, and then what changes, as server-sent events.
///
/// The event's name is that of the kind, its data the JSON below. It begins with a `created` for each
/// service and a `backend` for each backend, then `generation`: from there on changes are told.
/// Changes that follow each other closely may be told as one.
#[utoipa::path(
    get, path = "/v1/events", tag = "node",
    responses(
        (status = 200, body = Event, content_type = "text/event-stream"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
    ),
)]
async fn events(State(api): State<Api>) -> Result<impl IntoResponse, Problem> {
    let place = api.0.watchers.clone().try_acquire_owned().map_err(|_| {
        let detail = "too many are watching: the answers of others have to get through";
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail)
    })?;
    let stream = events::stream(api.clone(), place);
    Ok(Sse::new(stream).keep_alive(sse::KeepAlive::default()))
}

/// All counters, for Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "node",
    responses((status = 200, body = String, content_type = "text/plain; version=0.0.4")),
)]
async fn metrics(State(api): State<Api>) -> impl IntoResponse {
    let (observed, view, census) =
        (api.observed().clone(), api.view(), api.observed().census().await);
    let limit = observed.metrics_limit;
    let text = api.beside(move || metrics::render(&observed, &view, &census, limit)).await;
    ([(header::CONTENT_TYPE, metrics::MEDIA_TYPE)], text)
}
