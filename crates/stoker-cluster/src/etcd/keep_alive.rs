//! One stream to the current member over which all leases of this handle are kept alive.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Streaming};

use super::{
    api::{LeaseKeepAliveRequest, LeaseKeepAliveResponse, lease_client::LeaseClient},
    link::{Link, Links, authorise},
    signed,
    status::{self, Meaning, meaning},
    unsigned,
};
use crate::{Deadline, Error, LeaseId, retry::Backoff};

/// Requests that may wait for the stream.
const QUEUE: usize = 256;

type Answer = oneshot::Sender<Result<Duration, Error>>;

/// Handle on the task that has the stream. The task ends with the last handle.
#[derive(Debug, Clone)]
pub(super) struct KeepAlives {
    links: Arc<Links>,
    asks: mpsc::Sender<(LeaseId, Answer)>,
}

struct Task {
    links: Arc<Links>,
    asks: mpsc::Receiver<(LeaseId, Answer)>,
}

/// A stream, and who waits for what from it.
struct Open {
    link: Link,
    requests: mpsc::Sender<LeaseKeepAliveRequest>,
    responses: Streaming<LeaseKeepAliveResponse>,
    waiting: HashMap<LeaseId, VecDeque<Answer>>,
}

// === impl KeepAlives ===

impl KeepAlives {
    pub(super) fn spawn(links: Arc<Links>) -> Self {
        let (asks, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(Task { links: Arc::clone(&links), asks: receiver }.run());
        Self { links, asks }
    }

    pub(super) async fn keep_alive(&self, lease: LeaseId, deadline: Deadline) -> Result<Duration, Error> {
        let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(500));
        let mut last = Error::unavailable("the deadline had passed");
        while !deadline.passed() {
            let until = deadline.or_after(self.links.attempt_timeout());
            let (answer, answered) = oneshot::channel();
            let asked = until.bound(async {
                self.asks.send((lease, answer)).await.ok()?;
                answered.await.ok()
            });
            last = match asked.await {
                Some(Some(Err(error @ Error::Unavailable { .. }))) => error,
                Some(Some(result)) => return result,
                Some(None) => Error::unavailable("the store is closed"),
                None => {
                    // A link that brings no answer in time is no good, whatever its state.
                    if let Ok(link) = self.links.link(deadline).await {
                        self.links.failed(&link);
                    }
                    Error::unavailable("no answer to a keep-alive in time")
                }
            };
            deadline.bound(tokio::time::sleep(backoff.pause())).await;
        }
        Err(last)
    }
}

// === impl Task ===

impl Task {
    async fn run(mut self) {
        while let Some((lease, answer)) = self.asks.recv().await {
            if answer.is_closed() {
                continue;
            }
            match self.open(lease).await {
                Ok(mut open) => {
                    open.waiting.entry(lease).or_default().push_back(answer);
                    let error = self.serve(&mut open).await;
                    self.links.failed(&open.link);
                    let error =
                        error.unwrap_or_else(|| Error::unavailable("the stream of keep-alives ended"));
                    for answer in open.waiting.into_values().flatten() {
                        answer.send(Err(error.clone())).ok();
                    }
                }
                // Whoever asked may have given up.
                Err(error) => drop(answer.send(Err(error))),
            }
        }
    }

    /// Opens a stream and asks for a first lease: without one, etcd sends not even headers.
    async fn open(&self, first: LeaseId) -> Result<Open, Error> {
        let deadline = Deadline::after(self.links.attempt_timeout());
        let link = self.links.link(deadline).await?;
        let token = self.links.token(&link, deadline).await?;
        let (requests, receiver) = mpsc::channel(QUEUE);
        let full = |_| Error::unavailable("no room for a first keep-alive");
        requests.try_send(LeaseKeepAliveRequest { id: signed(first.0) }).map_err(full)?;
        let mut request = Request::new(ReceiverStream::new(receiver));
        let serial = authorise(&mut request, token.as_ref());
        let mut client = LeaseClient::new(link.channel.clone());
        match deadline.bound(client.lease_keep_alive(request)).await {
            Some(Ok(response)) => {
                let responses = response.into_inner();
                Ok(Open { link, requests, responses, waiting: HashMap::new() })
            }
            Some(Err(status)) => Err(self.error(&status, serial, &link)),
            None => {
                self.links.failed(&link);
                Err(Error::unavailable(format!("{} opened no stream for keep-alives", link.name)))
            }
        }
    }

    /// Until the stream ends or the connection has moved.
    async fn serve(&mut self, open: &mut Open) -> Option<Error> {
        let moved = self.links.moved(&open.link);
        tokio::pin!(moved);
        loop {
            tokio::select! {
                ask = self.asks.recv() => {
                    let (lease, answer) = ask?;
                    if !open.ask(lease, answer) {
                        return None;
                    }
                }
                response = open.responses.message() => match response {
                    Ok(Some(response)) => open.answer(&response),
                    Ok(None) => return None,
                    Err(status) => return Some(self.error(&status, None, &open.link)),
                },
                () = &mut moved => return None,
            }
        }
    }

    fn error(&self, status: &tonic::Status, serial: Option<u64>, link: &Link) -> Error {
        match meaning(status) {
            Meaning::StaleToken if self.links.renew_token(serial) => {
                Error::unavailable("the login had to be renewed")
            }
            Meaning::StaleToken => Error::Refused { reason: status.message().to_owned() },
            Meaning::Final(error @ Error::Refused { .. }) => error,
            Meaning::Final(_) | Meaning::NotDone | Meaning::Unknown => {
                self.links.failed(link);
                Error::unavailable(format!("{}: {}", link.name, status::text(status)))
            }
        }
    }
}

// === impl Open ===

impl Open {
    /// False when the stream takes no more. It never waits: a member that is silent has to be left, not waited for.
    fn ask(&mut self, lease: LeaseId, answer: Answer) -> bool {
        self.waiting.entry(lease).or_default().push_back(answer);
        self.requests.try_send(LeaseKeepAliveRequest { id: signed(lease.0) }).is_ok()
    }

    fn answer(&mut self, response: &LeaseKeepAliveResponse) {
        let lease = LeaseId(unsigned(response.id));
        let Some(waiting) = self.waiting.get_mut(&lease) else { return };
        let answer = waiting.pop_front();
        if waiting.is_empty() {
            self.waiting.remove(&lease);
        }
        let result = match unsigned(response.ttl) {
            0 => Err(Error::LeaseGone { lease }),
            seconds => Ok(Duration::from_secs(seconds)),
        };
        // Whoever asked may have given up.
        answer.map(|answer| answer.send(result).ok());
    }
}
