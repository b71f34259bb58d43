//! The store of a cluster: etcd, version 3.4 or later.
//!
//! One connection at a time, to one of the members; when it fails, or stops answering, everything moves to the next
//! one: calls, watches, and the stream that keeps leases alive. Reads and repeatable calls are tried again until their
//! deadline; a write that was sent is never repeated.

#[allow(
    missing_docs,
    unreachable_pub,
    clippy::allow_attributes_without_reason,
    clippy::missing_errors_doc,
    clippy::large_futures,
    reason = "generated"
)]
/// etcd's messages and clients, as far as Stoker uses them; generated from `proto/etcd.proto`. For tools and tests that
/// look after an etcd; everything else uses [`Etcd`].
pub mod api {
    tonic::include_proto!("etcdserverpb");
}
mod keep_alive;
mod link;
mod status;
mod watch;

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use tonic::{Request, Response, Status};

use self::{
    api::{kv_client::KvClient, lease_client::LeaseClient},
    keep_alive::KeepAlives,
    link::{Link, Links},
    status::{Meaning, meaning},
};
use crate::{
    ClusterStore, Committed, Compare, Deadline, Entry, Error, Expect, Lease, LeaseId, Listing, Page,
    Revision, Txn, Watch, Write, limits,
    retry::Backoff,
    store::{check_key, check_prefix, check_ttl},
};

/// Largest message taken from a member: a page of the largest values is asked for again in smaller pages.
const MESSAGE_MAX: usize = 16 * 1024 * 1024;

/// How to reach an etcd.
#[derive(Debug, Clone)]
pub struct EtcdSettings {
    /// Its members, `http://host:2379` or `https://host:2379`. All `https` when there is `tls`.
    pub endpoints: Vec<String>,
    /// Put before every key, so that several clusters can share one etcd. Usually empty.
    pub namespace: String,
    /// Certificates; `None` for `http`.
    pub tls: Option<EtcdTls>,
    /// User and password, where the etcd has authentication on.
    pub login: Option<EtcdLogin>,
    /// How long one connection may take to come about.
    pub connect_timeout: Duration,
    /// How long one member may take for something that another could do as well, before that one is asked.
    pub attempt_timeout: Duration,
    /// A silent connection is asked for a sign of life after so long. etcd takes offence below five seconds.
    pub ping_interval: Duration,
    /// How long it may take to give one.
    pub ping_timeout: Duration,
}

/// Certificates, as PEM.
#[derive(Clone)]
pub struct EtcdTls {
    /// Who may vouch for the members; `None`: the system's roots.
    pub ca: Option<Vec<u8>>,
    /// Our own certificate and its key, where the members ask for one.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
    /// The name in the members' certificates, where it isn't the endpoint's host.
    pub domain: Option<String>,
}

/// Who we are.
#[derive(Clone)]
pub struct EtcdLogin {
    /// The user.
    pub user: String,
    /// Its password.
    pub password: String,
}

/// A handle on an etcd. Cheap to clone; connects when first used.
#[derive(Debug, Clone)]
pub struct Etcd {
    links: Arc<Links>,
    keep_alives: KeepAlives,
    namespace: Arc<str>,
}

/// Whether a call may be repeated when nobody knows what became of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Repeatable,
    Once,
}

// === impl EtcdSettings, EtcdTls, EtcdLogin ===

impl EtcdSettings {
    /// With the usual times, no certificates and no login.
    #[must_use]
    pub fn new(endpoints: Vec<String>) -> Self {
        Self {
            endpoints,
            namespace: String::new(),
            tls: None,
            login: None,
            connect_timeout: Duration::from_secs(1),
            attempt_timeout: Duration::from_secs(1),
            ping_interval: Duration::from_secs(6),
            ping_timeout: Duration::from_secs(2),
        }
    }
}

impl fmt::Debug for EtcdTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdTls").field("domain", &self.domain).finish_non_exhaustive()
    }
}

impl fmt::Debug for EtcdLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdLogin").field("user", &self.user).finish_non_exhaustive()
    }
}

// === impl Etcd ===

impl Etcd {
    /// A handle; nothing is connected yet. To be called in a Tokio runtime.
    ///
    /// # Errors
    /// [`Error::Invalid`] for settings that can't work: no endpoint, one that is no URL, certificates that are none.
    pub fn new(settings: EtcdSettings) -> Result<Self, Error> {
        if !settings.namespace.is_empty() {
            check_key(&settings.namespace)?;
        }
        let namespace = settings.namespace.as_str().into();
        let links = Arc::new(Links::new(settings)?);
        let keep_alives = KeepAlives::spawn(Arc::clone(&links));
        Ok(Self { links, keep_alives, namespace })
    }

    /// Calls until an answer, the deadline, or the end of what may be repeated.
    async fn call<M, T, F>(
        &self,
        kind: Kind,
        deadline: Deadline,
        message: &M,
        call: impl Fn(Link, Request<M>) -> F + Send + Sync,
    ) -> Result<T, Error>
    where
        M: Clone + Send + Sync,
        F: Future<Output = Result<Response<T>, Status>> + Send,
    {
        let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(500));
        let mut last = String::from("no member could be reached");
        let mut stale_tokens = 0;
        loop {
            if deadline.passed() {
                return Err(Error::unavailable(last));
            }
            let link = self.links.link(deadline).await?;
            let token = self.links.token(&link, deadline).await?;
            let until = match kind {
                Kind::Repeatable => deadline.or_after(self.links.attempt_timeout()),
                Kind::Once => deadline,
            };
            let mut request = Request::new(message.clone());
            request.set_timeout(until.remaining());
            let serial = link::authorise(&mut request, token.as_ref());
            let unknown = match until.bound(call(link.clone(), request)).await {
                Some(Ok(response)) => return Ok(response.into_inner()),
                Some(Err(status)) => match meaning(&status) {
                    Meaning::Final(error) => return Err(error),
                    Meaning::StaleToken if stale_tokens < 3 && self.links.renew_token(serial) => {
                        stale_tokens += 1;
                        continue;
                    }
                    Meaning::StaleToken => {
                        return Err(Error::Refused { reason: status.message().to_owned() });
                    }
                    Meaning::NotDone => {
                        self.links.failed(&link);
                        last = format!("{}: {}", link.name, status::text(&status));
                        false
                    }
                    Meaning::Unknown => {
                        self.links.failed(&link);
                        last = format!("{}: {}", link.name, status::text(&status));
                        true
                    }
                },
                None => {
                    self.links.failed(&link);
                    last = format!("{} didn't answer in time", link.name);
                    true
                }
            };
            if unknown && kind == Kind::Once {
                return Err(Error::unknown(last));
            }
            deadline.bound(tokio::time::sleep(backoff.pause())).await;
        }
    }

    fn key(&self, key: &str) -> Bytes {
        full_key(&self.namespace, key)
    }

    async fn range(
        &self,
        request: &api::RangeRequest,
        deadline: Deadline,
    ) -> Result<api::RangeResponse, Error> {
        self.call(Kind::Repeatable, deadline, request, |link, request| async move {
            KvClient::new(link.channel).max_decoding_message_size(MESSAGE_MAX).range(request).await
        })
        .await
    }

    /// The page after the key `after` (as etcd has it) at `revision` (0: now). Says whether there is more.
    async fn page(
        &self,
        prefix: &str,
        after: Option<&Bytes>,
        revision: u64,
        page_max: &mut usize,
        deadline: Deadline,
    ) -> Result<(api::RangeResponse, bool), Error> {
        let (first, range_end) = prefix_range(&self.namespace, prefix);
        let key = match after {
            // The next key in order: a zero byte more.
            Some(after) => [after, &[0][..]].concat().into(),
            None => first,
        };
        loop {
            let request = api::RangeRequest {
                key: key.clone(),
                range_end: range_end.clone(),
                limit: i64::try_from(*page_max).unwrap_or(i64::MAX),
                revision: signed(revision),
                ..Default::default()
            };
            match self.range(&request, deadline).await {
                Ok(response) => {
                    let more = response.more;
                    return Ok((response, more));
                }
                Err(Error::TooLarge { .. }) if *page_max > 1 => *page_max /= 2,
                // It took longer than the server keeps its history.
                Err(Error::Compacted { .. }) => {
                    let wanted = Revision(revision);
                    return Err(Error::Compacted { wanted, oldest: wanted.next() });
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn entries(&self, kvs: Vec<api::KeyValue>) -> Page {
        kvs.into_iter().filter_map(|kv| entry(&self.namespace, kv)).collect()
    }
}

#[async_trait]
impl ClusterStore for Etcd {
    async fn get(&self, key: &str, deadline: Deadline) -> Result<Option<Entry>, Error> {
        check_key(key)?;
        let request = api::RangeRequest { key: self.key(key), ..Default::default() };
        let response = self.range(&request, deadline).await?;
        Ok(self.entries(response.kvs).pop())
    }

    async fn commit(&self, txn: Txn, deadline: Deadline) -> Result<Committed, Error> {
        txn.check()?;
        let request = txn_request(&self.namespace, &txn);
        let call = self.call(Kind::Once, deadline, &request, |link, request| async move {
            KvClient::new(link.channel).max_decoding_message_size(MESSAGE_MAX).txn(request).await
        });
        let response = match call.await {
            Ok(response) => response,
            // The server doesn't say which; one lease a transaction is the rule.
            Err(Error::LeaseGone { lease }) => {
                let named = txn.writes.iter().find_map(|write| match write {
                    Write::Put { lease, .. } => *lease,
                    Write::Delete { .. } => None,
                });
                return Err(Error::LeaseGone { lease: named.unwrap_or(lease) });
            }
            Err(error) => return Err(error),
        };
        committed(&txn, response)
    }

    async fn list(&self, prefix: &str, page_max: usize, deadline: Deadline) -> Result<Listing, Error> {
        check_prefix(prefix)?;
        let mut page_max = page_max.clamp(1, limits::PAGE_MAX);
        let (first, more) = self.page(prefix, None, 0, &mut page_max, deadline).await?;
        let revision = revision(first.header.as_ref())?;
        let after = first.kvs.last().map(|kv| kv.key.clone()).filter(|_| more);
        let (store, prefix) = (self.clone(), prefix.to_owned());
        let rest = stream::try_unfold((after, page_max), move |(after, mut page_max)| {
            let (store, prefix) = (store.clone(), prefix.clone());
            async move {
                let Some(after) = after else { return Ok(None) };
                let (response, more) =
                    store.page(&prefix, Some(&after), revision.0, &mut page_max, deadline).await?;
                let after = response.kvs.last().map(|kv| kv.key.clone()).filter(|_| more);
                Ok(Some((store.entries(response.kvs), (after, page_max))))
            }
        });
        let first = self.entries(first.kvs);
        let first = (!first.is_empty()).then_some(Ok(first));
        Ok(Listing { revision, pages: stream::iter(first).chain(rest).boxed() })
    }

    async fn watch(&self, prefix: &str, from: Revision, deadline: Deadline) -> Result<Watch, Error> {
        check_prefix(prefix)?;
        watch::watch(Arc::clone(&self.links), &self.namespace, prefix, from, deadline).await
    }

    async fn grant(&self, ttl: Duration, deadline: Deadline) -> Result<Lease, Error> {
        check_ttl(ttl)?;
        // The name is ours, so a repeated grant is the same lease.
        let id = LeaseId::random();
        let seconds = ttl.as_millis().div_ceil(1_000);
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        let request = api::LeaseGrantRequest { ttl: seconds, id: signed(id.0) };
        let call = self.call(Kind::Repeatable, deadline, &request, |link, request| async move {
            LeaseClient::new(link.channel).lease_grant(request).await
        });
        match call.await {
            Ok(response) => {
                let ttl = u64::try_from(response.ttl)
                    .ok()
                    .filter(|ttl| *ttl > 0)
                    .ok_or_else(|| Error::Protocol { reason: format!("a lease of {} s", response.ttl) })?;
                Ok(Lease { id, ttl: Duration::from_secs(ttl) })
            }
            // It was there at the second try: the first one's answer was lost. It lives at least what was asked for.
            Err(Error::Conflict { .. }) => Ok(Lease { id, ttl: Duration::from_secs(seconds.unsigned_abs()) }),
            Err(error) => Err(error),
        }
    }

    async fn keep_alive(&self, lease: LeaseId, deadline: Deadline) -> Result<Duration, Error> {
        self.keep_alives.keep_alive(lease, deadline).await
    }

    async fn revoke(&self, lease: LeaseId, deadline: Deadline) -> Result<(), Error> {
        let request = api::LeaseRevokeRequest { id: signed(lease.0) };
        let call = self.call(Kind::Repeatable, deadline, &request, |link, request| async move {
            LeaseClient::new(link.channel).lease_revoke(request).await
        });
        match call.await {
            Ok(_) | Err(Error::LeaseGone { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn compact(&self, before: Revision, deadline: Deadline) -> Result<(), Error> {
        let request = api::CompactionRequest { revision: signed(before.0) };
        let call = self.call(Kind::Repeatable, deadline, &request, |link, request| async move {
            KvClient::new(link.channel).compact(request).await
        });
        match call.await {
            Ok(_) | Err(Error::Compacted { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

// === requests and answers ===

fn full_key(namespace: &str, key: &str) -> Bytes {
    [namespace, key].concat().into()
}

/// First key and end (exclusive) of everything under a prefix.
fn prefix_range(namespace: &str, prefix: &str) -> (Bytes, Bytes) {
    let first = [namespace, prefix].concat().into_bytes();
    if first.is_empty() {
        // etcd's way to say everything.
        return (Bytes::from_static(&[0]), Bytes::from_static(&[0]));
    }
    // Keys are UTF-8, whose bytes are below 255: there is a next byte.
    let mut end = first.clone();
    if let Some(last) = end.last_mut() {
        *last = last.saturating_add(1);
    }
    (first.into(), end.into())
}

/// etcd's numbers are signed and never negative.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn revision(header: Option<&api::ResponseHeader>) -> Result<Revision, Error> {
    let header = header.ok_or_else(|| Error::Protocol { reason: "an answer without a header".to_owned() })?;
    Ok(Revision(unsigned(header.revision)))
}

/// An entry without the namespace; `None` for a key that isn't text, which nobody here wrote.
fn entry(namespace: &str, kv: api::KeyValue) -> Option<Entry> {
    Some(Entry {
        key: key_text(namespace, &kv.key)?,
        value: kv.value,
        created: Revision(unsigned(kv.create_revision)),
        modified: Revision(unsigned(kv.mod_revision)),
        lease: (kv.lease != 0).then(|| LeaseId(unsigned(kv.lease))),
    })
}

fn key_text(namespace: &str, key: &[u8]) -> Option<Arc<str>> {
    let text = std::str::from_utf8(key).ok().and_then(|key| key.strip_prefix(namespace));
    if text.is_none() {
        tracing::warn!(key = %key.escape_ascii(), "a key in the cluster store that isn't ours; ignored");
    }
    text.map(Into::into)
}

fn txn_request(namespace: &str, txn: &Txn) -> api::TxnRequest {
    use api::{
        compare::{CompareResult, CompareTarget, TargetUnion},
        request_op::Request,
    };
    let Txn { compares, writes } = txn;
    let op = |request| api::RequestOp { request: Some(request) };
    let compare = |Compare { key, expect }: &Compare| {
        let (target, union) = match *expect {
            Expect::Absent => (CompareTarget::Create, TargetUnion::CreateRevision(0)),
            Expect::Created(at) => (CompareTarget::Create, TargetUnion::CreateRevision(signed(at.0))),
            Expect::Modified(at) => (CompareTarget::Mod, TargetUnion::ModRevision(signed(at.0))),
        };
        api::Compare {
            result: CompareResult::Equal.into(),
            target: target.into(),
            key: full_key(namespace, key),
            target_union: Some(union),
        }
    };
    let write = |write: &Write| match write {
        Write::Put { key, value, lease } => op(Request::RequestPut(api::PutRequest {
            key: full_key(namespace, key),
            value: value.clone(),
            lease: lease.map_or(0, |lease| signed(lease.0)),
        })),
        Write::Delete { key } => op(Request::RequestDeleteRange(api::DeleteRangeRequest {
            key: full_key(namespace, key),
            ..Default::default()
        })),
    };
    // When it fails: what the compared keys are, to say which one it was.
    let look = |Compare { key, .. }: &Compare| {
        let range =
            api::RangeRequest { key: full_key(namespace, key), keys_only: true, ..Default::default() };
        op(Request::RequestRange(range))
    };
    api::TxnRequest {
        compare: compares.iter().map(compare).collect(),
        success: writes.iter().map(write).collect(),
        failure: compares.iter().map(look).collect(),
    }
}

fn committed(txn: &Txn, response: api::TxnResponse) -> Result<Committed, Error> {
    use api::response_op::Response;
    let at = revision(response.header.as_ref())?;
    let parts = response.responses.into_iter().map(|part| part.response);
    if response.succeeded {
        let deleted = parts.map(|part| match part {
            Some(Response::ResponseDeleteRange(deleted)) => unsigned(deleted.deleted),
            _ => 0,
        });
        let deleted = usize::try_from(deleted.sum::<u64>()).unwrap_or(usize::MAX);
        return Ok(Committed { revision: at, deleted });
    }
    for (compare, part) in txn.compares.iter().zip(parts) {
        let Some(Response::ResponseRange(range)) = part else {
            return Err(Error::Protocol { reason: "a failed transaction without its reads".to_owned() });
        };
        let found = range
            .kvs
            .first()
            .map(|kv| (Revision(unsigned(kv.create_revision)), Revision(unsigned(kv.mod_revision))));
        if !compare.expect.holds(found) {
            return Err(Error::Conflict { key: compare.key.clone(), expected: compare.expect, found });
        }
    }
    Err(Error::Protocol { reason: "a transaction failed though all comparisons hold".to_owned() })
}
