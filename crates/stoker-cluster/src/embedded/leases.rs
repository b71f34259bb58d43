//! Which leases live, until when, and whose keys are whose.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use crate::{Error, Lease, LeaseId};

/// The leases of an embedded store. Few: its holders are one process.
#[derive(Debug, Default)]
pub(super) struct Leases(HashMap<LeaseId, Held>);

#[derive(Debug)]
struct Held {
    ttl: Duration,
    expires: Instant,
    keys: BTreeSet<Arc<str>>,
}

impl Leases {
    pub(super) fn grant(&mut self, ttl: Duration, now: Instant) -> Lease {
        let id = LeaseId::random();
        self.0.insert(id, Held { ttl, expires: now + ttl, keys: BTreeSet::new() });
        Lease { id, ttl }
    }

    pub(super) fn keep_alive(&mut self, id: LeaseId, now: Instant) -> Result<Duration, Error> {
        let held = self.0.get_mut(&id).ok_or(Error::LeaseGone { lease: id })?;
        held.expires = now + held.ttl;
        Ok(held.ttl)
    }

    pub(super) fn contains(&self, id: LeaseId) -> bool {
        self.0.contains_key(&id)
    }

    /// A key was written under `to`, having been under `from`.
    pub(super) fn attach(&mut self, key: &Arc<str>, from: Option<LeaseId>, to: Option<LeaseId>) {
        if let Some(held) = from.and_then(|id| self.0.get_mut(&id)) {
            held.keys.remove(key);
        }
        if let Some(held) = to.and_then(|id| self.0.get_mut(&id)) {
            held.keys.insert(Arc::clone(key));
        }
    }

    /// When the next one expires.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.0.values().map(|held| held.expires).min()
    }

    /// Those that have expired, the first first.
    pub(super) fn expired(&self, now: Instant) -> Vec<LeaseId> {
        let mut due: Vec<_> =
            self.0.iter().filter(|(_, h)| h.expires <= now).map(|(id, h)| (h.expires, *id)).collect();
        due.sort_unstable();
        due.into_iter().map(|(_, id)| id).collect()
    }

    /// Ends one; its keys.
    pub(super) fn end(&mut self, id: LeaseId) -> BTreeSet<Arc<str>> {
        self.0.remove(&id).map(|held| held.keys).unwrap_or_default()
    }
}
