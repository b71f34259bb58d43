//! Tokens with which nodes may join: single-use, expiring, or both.

use std::{sync::Arc, time::Duration};

use stoker_types::{NodeId, hex};

use crate::{
    ClusterStore, ClusterStoreExt as _, Deadline, Error, Expect, Record, RecordError, Txn, Versioned,
    keys::{self, JOIN_TOKENS},
    records::{JoinTokenRecord, JoinTokenUse},
    retry::Backoff,
};

/// Most tokens that one look over all of them takes.
const TOKENS_MAX: usize = 100_000;

/// The tokens of a cluster. Wall-clock times are passed in, as time since 1970.
#[derive(Debug, Clone)]
pub struct JoinTokens {
    store: Arc<dyn ClusterStore>,
}

/// Why a token isn't good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinTokenError {
    /// There is no such token.
    #[error("this join token isn't known here: make a new one, and check that it is for this cluster")]
    Unknown,
    /// Its time is over.
    #[error("this join token has expired: make a new one")]
    Expired,
    /// Another node has used it.
    #[error("this join token was used by `{node}`: make one for each node")]
    Used {
        /// Who used it.
        node: NodeId,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] Error),
    /// The token's record can't be read.
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl JoinTokens {
    /// Over a store.
    #[must_use]
    pub fn new(store: Arc<dyn ClusterStore>) -> Self {
        Self { store }
    }

    /// A new token. Only its hash is stored, so this is the only time that it is seen.
    ///
    /// # Errors
    /// [`JoinTokenError::Store`].
    pub async fn create(
        &self,
        lifetime: Option<Duration>,
        single_use: bool,
        now: Duration,
        deadline: Deadline,
    ) -> Result<String, JoinTokenError> {
        let token = format!("stoker-join-{}", hex(&rand::random::<[u8; 32]>()));
        let expires_ms = lifetime.map(|lifetime| millis(now.saturating_add(lifetime)));
        let record = JoinTokenRecord { created_ms: millis(now), expires_ms, single_use, used: None };
        let value = Versioned::new(record).encode()?;
        let key = keys::join_token(&token);
        let mut backoff = Backoff::background();
        loop {
            // Only where there is nothing: a write of ours that comes late mustn't make a used token new again.
            match self.store.compare_and_swap(&key, Expect::Absent, value.clone(), deadline).await {
                // Nobody else has this key: it was an earlier try of ours.
                Ok(_) | Err(Error::Conflict { .. }) => return Ok(token),
                Err(error @ (Error::Unavailable { .. } | Error::UnknownOutcome { .. })) => {
                    pause(&mut backoff, deadline).await.ok_or(error)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Uses a token for `node`. Of all who try a single-use token at the same time, one succeeds.
    ///
    /// # Errors
    /// See [`JoinTokenError`]. After [`Error::UnknownOutcome`] a single-use token may be used up.
    pub async fn redeem(
        &self,
        token: &str,
        node: &NodeId,
        now: Duration,
        deadline: Deadline,
    ) -> Result<(), JoinTokenError> {
        let key = keys::join_token(token);
        let nonce = rand::random();
        let mut backoff = Backoff::background();
        loop {
            let error = match self.try_redeem(&key, node, nonce, now, deadline).await {
                // Reading again tells whose it is, or whether the late write was ours.
                Err(JoinTokenError::Store(
                    error @ (Error::Unavailable { .. }
                    | Error::UnknownOutcome { .. }
                    | Error::Conflict { .. }),
                )) => error,
                done => return done,
            };
            pause(&mut backoff, deadline).await.ok_or(error)?;
        }
    }

    async fn try_redeem(
        &self,
        key: &str,
        node: &NodeId,
        nonce: u64,
        now: Duration,
        deadline: Deadline,
    ) -> Result<(), JoinTokenError> {
        let entry = self.store.get(key, deadline).await?.ok_or(JoinTokenError::Unknown)?;
        let mut record = Versioned::<JoinTokenRecord>::decode(&entry.value)?;
        match &record.used {
            Some(used) if used.nonce == nonce => return Ok(()),
            Some(used) => return Err(JoinTokenError::Used { node: used.node.clone() }),
            None => {}
        }
        if expired(&record, now) {
            return Err(JoinTokenError::Expired);
        }
        if !record.single_use {
            return Ok(());
        }
        record.record.used = Some(JoinTokenUse { node: node.clone(), at_ms: millis(now), nonce });
        let txn = Txn::new().expect(key, Expect::Modified(entry.modified)).put(key, record.encode()?);
        self.store.commit(txn, deadline).await?;
        Ok(())
    }

    /// Makes a token useless. Says whether there was one.
    ///
    /// # Errors
    /// As [`ClusterStore::commit`].
    pub async fn remove(&self, token: &str, deadline: Deadline) -> Result<bool, Error> {
        self.store.delete(&keys::join_token(token), deadline).await
    }

    /// Removes tokens that have expired, and used ones after `keep`. How many.
    ///
    /// # Errors
    /// As [`ClusterStore::commit`].
    pub async fn prune(&self, keep: Duration, now: Duration, deadline: Deadline) -> Result<usize, Error> {
        let (_, entries) = self.store.list_all(JOIN_TOKENS, TOKENS_MAX, deadline).await?;
        let mut removed = 0;
        for entry in entries {
            let Ok(record) = Versioned::<JoinTokenRecord>::decode(&entry.value) else {
                tracing::warn!(
                    key = &*entry.key,
                    kind = JoinTokenRecord::KIND,
                    "a record that can't be read"
                );
                continue;
            };
            let old = |used: &JoinTokenUse| used.at_ms.saturating_add(millis(keep)) <= millis(now);
            if expired(&record, now) || record.used.as_ref().is_some_and(old) {
                let txn = Txn::new().expect(&entry.key, Expect::Modified(entry.modified)).delete(&entry.key);
                match self.store.commit(txn, deadline).await {
                    Ok(_) => removed += 1,
                    // Somebody was faster.
                    Err(Error::Conflict { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(removed)
    }
}

fn expired(record: &JoinTokenRecord, now: Duration) -> bool {
    record.expires_ms.is_some_and(|expires| expires <= millis(now))
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// `None` when the deadline came first.
async fn pause(backoff: &mut Backoff, deadline: Deadline) -> Option<()> {
    deadline.bound(tokio::time::sleep(backoff.pause())).await
}
