//! Where tables come from: this node's own engine if that is a manager's, else the Wiremesh of a manager.
//! Both go on until something fails, and say what; to begin anew is for others.

use std::{convert::Infallible, pin::pin, sync::Arc, time::Duration};

use futures_util::future::{Either, select};
use http_body_util::BodyExt;
use hyper::body::Bytes;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, mpsc},
    task::AbortHandle,
    time::{self, Instant},
};
use utoipa::ToSchema;

use super::{
    connection::{AskError, Connection, Peer, TlsError},
    engine,
    table::{Said, Table, table},
};

/// How often what events tell of is read all the same: an event may get lost.
const REFRESH: Duration = Duration::from_secs(1);
/// How long after an event others may follow.
const BURST: Duration = Duration::from_millis(20);
/// How long a manager's Wiremesh keeps a question for news open.
pub const NEWS_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take to answer that: a bit longer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(12);

/// Why the swarm can't be read.
#[derive(Debug, thiserror::Error)]
pub enum SwarmError {
    /// No answer, or no good one.
    #[error("{whose} does not tell")]
    Ask {
        /// Who was asked.
        whose: String,
        /// Why.
        source: AskError,
    },
    /// Files of certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// `docker swarm leave`, or not joined yet.
    #[error("the engine is in no swarm (its state is `{0}`)")]
    NoSwarm(String),
    /// Nobody can be asked.
    #[error(
        "the engine is a worker's, which knows no services: name the API of managers' Wiremesh in \
         source.swarm.managers"
    )]
    NoManagers,
    /// Managers that don't read the swarm themselves now.
    #[error("the Wiremesh at {0} can't read the swarm at present")]
    Stale(String),
    /// Promoted or demoted.
    #[error("the engine has become {0}")]
    Role(&'static str),
}

/// A table as the API hands it on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct News {
    /// Names this answer: asked for what comes after it, the next one is given as soon as it is there.
    pub version: u64,
    /// Whether it is what the swarm's managers say now, and not what they last said.
    pub fresh: bool,
    /// What is published.
    pub table: Table,
}

/// Tables as they come, until an error; ended when dropped.
pub struct Tables {
    received: mpsc::Receiver<Result<Table, SwarmError>>,
    task: AbortHandle,
}

impl Tables {
    fn of<F>(read: impl FnOnce(mpsc::Sender<Result<Table, SwarmError>>) -> F) -> Self
    where
        F: Future<Output = SwarmError> + Send + 'static,
    {
        let (send, received) = mpsc::channel(1);
        let last = send.clone();
        let reading = read(send);
        let task = tokio::spawn(async move {
            let error = reading.await;
            let _ = last.send(Err(error)).await;
        });
        Self { received, task: task.abort_handle() }
    }

    /// Of a manager's engine. It is asked for its tasks every `poll`, and for the rest when it says that
    /// something has changed.
    pub fn of_engine(engine: Peer, poll: Duration) -> Self {
        Self::of(|send| async move {
            let events = Events::follow(engine.clone());
            let Err(error) = read_engine(engine, poll, &events, send).await;
            error
        })
    }

    /// Of the first of these daemons that has one, as long as it has.
    pub fn of_managers(managers: Vec<Peer>) -> Self {
        Self::of(|send| async move {
            let mut last = SwarmError::NoManagers;
            for manager in managers {
                let Err(error) = read_manager(manager, &send).await;
                last = error;
            }
            last
        })
    }

    /// The next one, or why there is none any more.
    ///
    /// # Errors
    /// Once, in the end.
    pub async fn next(&mut self) -> Result<Table, SwarmError> {
        self.received.recv().await.expect("not asked again after an error")
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What an engine's events come to: something has changed.
struct Events {
    news: Arc<Notify>,
    task: AbortHandle,
}

impl Events {
    /// Without them all is read a second later. So what goes wrong here is tried again, and not said.
    fn follow(engine: Peer) -> Self {
        let news = Arc::new(Notify::new());
        let notify = news.clone();
        let task = tokio::spawn(async move {
            loop {
                let mut engine = Connection::new(engine.clone());
                if let Ok(response) = engine::events(&mut engine).await {
                    let mut body = response.into_body();
                    while let Some(Ok(_)) = body.frame().await {
                        notify.notify_one();
                    }
                }
                time::sleep(REFRESH).await;
            }
        });
        Self { news, task: task.abort_handle() }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn read_engine(
    peer: Peer,
    poll: Duration,
    events: &Events,
    send: mpsc::Sender<Result<Table, SwarmError>>,
) -> Result<Infallible, SwarmError> {
    let whose = peer.to_string();
    let failed = |source| SwarmError::Ask { whose: whose.clone(), source };
    let mut engine = Connection::new(peer);
    let (mut rest, mut rest_read, mut last) = (Vec::new(), None::<Instant>, None);
    loop {
        if rest_read.is_none_or(|read| read.elapsed() >= REFRESH) {
            rest.clear();
            for path in ["/info", "/services", "/nodes", "/networks"] {
                rest.push(engine::ask(&mut engine, path).await.map_err(failed)?);
            }
            rest_read = Some(Instant::now());
        }
        let tasks = engine::ask(&mut engine, "/tasks").await.map_err(failed)?;
        // Nearly always all is as it was: then nothing of it is read.
        let said: Vec<Bytes> = rest[1..].iter().cloned().chain([tasks]).collect();
        if last.as_ref() != Some(&said) {
            let read = read_said(&rest[0], &said).map_err(|e| failed(AskError::from(e)))?;
            last = Some(said);
            if send.send(Ok(table(&read))).await.is_err() {
                // Nobody listens; we are about to be ended.
                std::future::pending::<()>().await;
            }
        }
        let news = pin!(events.news.notified());
        let pause = pin!(time::sleep(poll));
        if let Either::Left(_) = select(news, pause).await {
            // What belongs together comes together: it is read once.
            time::sleep(BURST).await;
            rest_read = None;
        }
    }
}

fn read_said(info: &[u8], said: &[Bytes]) -> Result<Said, serde_json::Error> {
    let [services, nodes, networks, tasks] = said else { unreachable!("four were asked for") };
    let info: engine::Info = serde_json::from_slice(info)?;
    Ok(Said {
        cluster: info.swarm.cluster,
        services: serde_json::from_slice(services)?,
        tasks: serde_json::from_slice(tasks)?,
        nodes: serde_json::from_slice(nodes)?,
        networks: serde_json::from_slice(networks)?,
    })
}

async fn read_manager(
    manager: Peer,
    send: &mpsc::Sender<Result<Table, SwarmError>>,
) -> Result<Infallible, SwarmError> {
    let whose = manager.to_string();
    let mut connection = Connection::new(manager);
    let mut after = None;
    loop {
        let path = match after {
            None => "/v1/swarm".to_owned(),
            Some(version) => format!("/v1/swarm?after={version}"),
        };
        let failed = |source| SwarmError::Ask { whose: whose.clone(), source };
        let answer = connection.get(&path, ANSWER_TIMEOUT).await.map_err(failed)?;
        let news: News = serde_json::from_slice(&answer).map_err(|e| failed(e.into()))?;
        if !news.fresh {
            return Err(SwarmError::Stale(whose));
        }
        if after.replace(news.version) != Some(news.version) {
            let _ = send.send(Ok(news.table)).await;
        }
    }
}
