//! A watch that goes on where it was when its connection fails.

use std::{collections::VecDeque, mem, sync::Arc, time::Duration};

use futures::{StreamExt as _, future::BoxFuture, stream};
use tonic::{Request, Status, Streaming};

use super::{
    api::{
        self, WatchCreateRequest, WatchRequest, WatchResponse, event::EventType, watch_client::WatchClient,
        watch_request::RequestUnion,
    },
    entry, key_text,
    link::{Link, Links, authorise},
    prefix_range, revision, signed,
    status::{self, Meaning, meaning},
    unsigned,
};
use crate::{Changes, Deadline, Error, Event, Revision, Watch, retry::Backoff};

/// How long a member may take to begin a watch before the next one is asked.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(2);

struct Watcher {
    links: Arc<Links>,
    namespace: Arc<str>,
    prefix: String,
    /// The first revision that the caller hasn't got.
    next: Revision,
    ready: VecDeque<Changes>,
    /// Changes of revisions whose answer isn't complete.
    partial: Vec<(Revision, Event)>,
    open: Option<Open>,
    backoff: Backoff,
    ended: bool,
}

struct Open {
    responses: Streaming<WatchResponse>,
    link: Link,
    moved: BoxFuture<'static, ()>,
    token: Option<u64>,
}

/// What came of something that may just have to be tried again.
enum Trouble {
    /// Over.
    End(Error),
    /// Again, after a pause.
    Again(Error),
}

/// Begins a watch.
pub(super) async fn watch(
    links: Arc<Links>,
    namespace: &Arc<str>,
    prefix: &str,
    from: Revision,
    deadline: Deadline,
) -> Result<Watch, Error> {
    let mut watcher = Watcher {
        links,
        namespace: Arc::clone(namespace),
        prefix: prefix.to_owned(),
        next: from,
        ready: VecDeque::new(),
        partial: Vec::new(),
        open: None,
        backoff: Backoff::new(Duration::from_millis(20), Duration::from_secs(1)),
        ended: false,
    };
    loop {
        match watcher.begin(deadline).await {
            Ok(()) => break,
            Err(Trouble::End(error)) => return Err(error),
            Err(Trouble::Again(error)) => {
                let pause = watcher.backoff.pause();
                deadline.bound(tokio::time::sleep(pause)).await;
                if deadline.passed() {
                    return Err(error);
                }
            }
        }
    }
    Ok(stream::unfold(watcher, |mut watcher| async move { Some((watcher.step().await?, watcher)) }).boxed())
}

impl Watcher {
    /// The next changes. Goes through as many connections as it takes.
    async fn step(&mut self) -> Option<Result<Changes, Error>> {
        loop {
            if let Some(changes) = self.ready.pop_front() {
                return Some(Ok(changes));
            }
            if self.ended {
                return None;
            }
            let went = match &mut self.open {
                None => self.begin(Deadline::after(BEGIN_TIMEOUT)).await,
                Some(open) => {
                    let response = tokio::select! {
                        response = open.responses.message() => Some(response),
                        () = &mut open.moved => None,
                    };
                    match response {
                        Some(response) => self.response(response),
                        None => Err(Trouble::Again(Error::unavailable("the connection has moved"))),
                    }
                }
            };
            match went {
                Ok(()) => {}
                Err(Trouble::End(error)) => {
                    self.ended = true;
                    self.open = None;
                    return Some(Err(error));
                }
                Err(Trouble::Again(error)) => {
                    tracing::debug!(prefix = self.prefix, next = self.next.0, %error, "watch interrupted");
                    self.open = None;
                    self.partial.clear();
                    tokio::time::sleep(self.backoff.pause()).await;
                }
            }
        }
    }

    /// Opens a stream and asks for everything from `next` on; returns when etcd has confirmed.
    async fn begin(&mut self, deadline: Deadline) -> Result<(), Trouble> {
        let again = |error: Error| match error {
            Error::Unavailable { .. } => Trouble::Again(error),
            error => Trouble::End(error),
        };
        let link = self.links.link(deadline).await.map_err(again)?;
        let token = self.links.token(&link, deadline).await.map_err(again)?;
        let (key, range_end) = prefix_range(&self.namespace, &self.prefix);
        let create = WatchCreateRequest {
            key,
            range_end,
            start_revision: signed(self.next.0.max(1)),
            progress_notify: true,
            fragment: true,
        };
        let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        // The stream of requests stays open: its end would be the watch's.
        let mut request = Request::new(stream::iter([create]).chain(stream::pending()));
        let token = authorise(&mut request, token.as_ref());
        let mut client = WatchClient::new(link.channel.clone()).max_decoding_message_size(super::MESSAGE_MAX);
        let opened = deadline.or_after(BEGIN_TIMEOUT).bound(async {
            let mut responses = client.watch(request).await?.into_inner();
            let first = responses.message().await?;
            Ok::<_, Status>((responses, first))
        });
        let (responses, first) = match opened.await {
            Some(Ok(opened)) => opened,
            Some(Err(status)) => return Err(self.failed(&link, &status, token)),
            None => {
                self.links.failed(&link);
                return Err(Trouble::Again(Error::unavailable(format!(
                    "{} began no watch in time",
                    link.name
                ))));
            }
        };
        let moved = Box::pin(self.links.moved(&link));
        self.open = Some(Open { responses, link, moved, token });
        self.partial.clear();
        let begun = self.response(Ok(first));
        if begun.is_err() {
            self.open = None;
        }
        begun
    }

    fn response(&mut self, response: Result<Option<WatchResponse>, Status>) -> Result<(), Trouble> {
        let Some(open) = &self.open else { return Ok(()) };
        match response {
            Ok(Some(response)) if response.canceled => Err(self.cancelled(&response)),
            Ok(Some(response)) => self.take(response).map_err(Trouble::End),
            Ok(None) => {
                self.links.failed(&open.link);
                Err(Trouble::Again(Error::unavailable(format!("{} ended the watch", open.link.name))))
            }
            Err(status) => Err(self.failed(&open.link, &status, open.token)),
        }
    }

    fn failed(&self, link: &Link, status: &Status, token: Option<u64>) -> Trouble {
        let again = || Trouble::Again(Error::unavailable(format!("{}: {}", link.name, status::text(status))));
        match meaning(status) {
            Meaning::StaleToken if self.links.renew_token(token) => again(),
            Meaning::StaleToken => Trouble::End(Error::Refused { reason: status.message().to_owned() }),
            Meaning::Final(error) => Trouble::End(error),
            Meaning::NotDone | Meaning::Unknown => {
                self.links.failed(link);
                again()
            }
        }
    }

    /// etcd ended the watch and says why.
    fn cancelled(&mut self, response: &WatchResponse) -> Trouble {
        if response.compact_revision > 0 {
            let oldest = Revision(unsigned(response.compact_revision));
            return Trouble::End(Error::Compacted { wanted: self.next, oldest });
        }
        let reason = response.cancel_reason.as_str();
        let Some(open) = &self.open else { return Trouble::Again(Error::unavailable(reason)) };
        let about_token =
            ["auth token", "auth store is old", "user name is empty"].iter().any(|t| reason.contains(t));
        let denied = reason.contains("permission denied");
        if about_token || denied {
            // Some versions say "denied" of a token that they have forgotten, so a new one decides. A watch that has
            // worked before gets one more; one that was never begun has a fresh token at its second try.
            let fresh = !self.backoff.is_first();
            if self.links.renew_token(open.token) && (about_token || !fresh) {
                return Trouble::Again(Error::unavailable(reason));
            }
            return Trouble::End(Error::Refused { reason: reason.to_owned() });
        }
        self.links.failed(&open.link);
        Trouble::Again(Error::unavailable(format!("{} cancelled the watch: {reason}", open.link.name)))
    }

    fn take(&mut self, response: WatchResponse) -> Result<(), Error> {
        let at = revision(response.header.as_ref())?;
        self.backoff.reset();
        if response.created {
            return Ok(());
        }
        let progress = response.events.is_empty() && !response.fragment && self.partial.is_empty();
        for event in response.events {
            if let Some((revision, event)) = convert(&self.namespace, event)?
                && revision >= self.next
            {
                self.partial.push((revision, event));
            }
        }
        // An answer ends with the end of a revision, a fragment of one anywhere.
        if !response.fragment {
            for (revision, event) in mem::take(&mut self.partial) {
                match self.ready.back_mut() {
                    Some(last) if last.revision == revision => last.events.push(event),
                    _ => self.ready.push_back(Changes { revision, events: vec![event] }),
                }
                self.next = self.next.max(revision.next());
            }
        }
        // A member that is behind may speak of an older revision.
        if progress && at >= self.next {
            self.next = at.next();
            self.ready.push_back(Changes { revision: at, events: Vec::new() });
        }
        Ok(())
    }
}

fn convert(namespace: &str, event: api::Event) -> Result<Option<(Revision, Event)>, Error> {
    let kind = event.r#type();
    let kv = event.kv.ok_or_else(|| Error::Protocol { reason: "an event without a key".to_owned() })?;
    let revision = Revision(unsigned(kv.mod_revision));
    let event = match kind {
        EventType::Put => entry(namespace, kv).map(Event::Put),
        EventType::Delete => key_text(namespace, &kv.key).map(|key| Event::Delete { key }),
    };
    Ok(event.map(|event| (revision, event)))
}
