//! The limit that loads are compared with: what the store's own client reaches against the same server.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use object_store::ObjectStoreExt;
use stoker_types::{ByteSize, BytesPerSec, RemoteObject, clock};

use crate::{client::last_cause, error::RemoteError, stores::RemoteStores};

/// Of the objects, when settings are compared.
const SAMPLE: ByteSize = ByteSize::mib(512);

/// How to fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawFetch {
    /// Ranges under way at a time.
    pub concurrency: usize,
    /// Bytes of a range.
    pub range: ByteSize,
}

// === impl RawFetch ===

impl RawFetch {
    /// What is tried to find the best.
    pub const CANDIDATES: [Self; 6] = [
        Self { concurrency: 4, range: ByteSize::mib(16) },
        Self { concurrency: 8, range: ByteSize::mib(16) },
        Self { concurrency: 16, range: ByteSize::mib(16) },
        Self { concurrency: 8, range: ByteSize::mib(4) },
        Self { concurrency: 16, range: ByteSize::mib(4) },
        Self { concurrency: 32, range: ByteSize::mib(8) },
    ];

    /// The fastest of [`Self::CANDIDATES`], by fetching the beginning of some objects twice with each.
    ///
    /// # Errors
    /// As [`Self::fetch`].
    pub async fn fastest(stores: &RemoteStores, objects: &[RemoteObject]) -> Result<Self, RemoteError> {
        let mut best = (Duration::MAX, Self::CANDIDATES[0]);
        for _ in 0..2 {
            for candidate in Self::CANDIDATES {
                let time = candidate.fetch_first(stores, objects, SAMPLE).await?;
                best = if time < best.0 { (time, candidate) } else { best };
            }
        }
        Ok(best.1)
    }

    /// Fetches objects with the store's own client, into memory that is freed again: without checksums, retries or copies.
    ///
    /// # Errors
    /// [`RemoteError::Unusable`], at the first request that fails.
    pub async fn fetch(
        self,
        stores: &RemoteStores,
        objects: &[RemoteObject],
    ) -> Result<BytesPerSec, RemoteError> {
        let bytes = objects.iter().map(|object| ByteSize(object.len)).sum();
        Ok(BytesPerSec::of(bytes, self.fetch_first(stores, objects, ByteSize(u64::MAX)).await?))
    }

    async fn fetch_first(
        self,
        stores: &RemoteStores,
        objects: &[RemoteObject],
        most: ByteSize,
    ) -> Result<Duration, RemoteError> {
        let mut ranges = Vec::new();
        let mut left = most.bytes();
        for object in objects {
            let at = Arc::new(stores.locate(&object.url)?);
            let mut begin = 0;
            while begin < object.len && left > 0 {
                let end = object.len.min(begin + self.range.bytes().max(1));
                ranges.push((Arc::clone(&at), begin..end));
                left = left.saturating_sub(end - begin);
                begin = end;
            }
        }
        let begun = clock::now();
        let fetches = ranges.into_iter().map(|(at, range)| {
            let fetch = async move {
                let fetched = at.host.store.get_range(&at.path, range).await;
                let unusable = |e| RemoteError::Unusable { url: at.url.clone(), detail: last_cause(&e) };
                fetched.map(drop).map_err(unusable)
            };
            let task = stores.spawn(fetch);
            async move { task.await.unwrap_or(Err(RemoteError::Closed { url: String::new() })) }
        });
        let mut under_way = futures::stream::iter(fetches).buffer_unordered(self.concurrency);
        while let Some(fetched) = under_way.next().await {
            fetched?;
        }
        Ok(begun.elapsed())
    }
}
