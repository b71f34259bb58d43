//! Ranges of an object into chunk buffers.

use std::{ops::Range, sync::Arc, time::Duration};

use futures::StreamExt;
use object_store::{GetOptions, GetRange, GetResult};
use stoker_io::{
    Choice, Completion, FileStamp, Filled, ReadDone, ReadError, ReadOp, Reader, ReaderKind, Reason,
};
use stoker_types::{RemoteObject, Summing, clock};
use tokio::time::Instant;

use crate::{
    client::{Answered, Noted},
    error::{RemoteError, Trouble},
    stores::{Inner, Located, entity_tag},
};

/// Bytes copied and summed at a time: what was just copied is still in the core's cache.
const PIECE_BYTES: usize = 64 << 10;

/// One version of an object.
pub(crate) struct RemoteReader {
    inner: Arc<Inner>,
    at: Located,
    object: RemoteObject,
    choice: Choice,
}

/// A read under way. Dropped before its end (the runtime is going away), it ends with an error.
struct Pending {
    read: Option<(ReadOp, Completion)>,
    url: String,
}

// === impl RemoteReader ===

impl RemoteReader {
    pub(crate) fn new(inner: Arc<Inner>, at: Located, object: RemoteObject) -> Self {
        let choice = Choice { kind: ReaderKind::Remote, reason: Reason::NotHere(at.host.kind) };
        Self { inner, at, object, choice }
    }
}

impl Reader for RemoteReader {
    fn choice(&self) -> &Choice {
        &self.choice
    }

    /// The version that every read is pinned to.
    fn stamp(&self) -> std::io::Result<FileStamp> {
        let mtime_ns = i128::from(self.object.modified_ms.unwrap_or_default()) * 1_000_000;
        Ok(FileStamp { len: self.object.len, mtime_ns, inode: 0 })
    }

    fn read(&self, op: ReadOp, done: Completion) {
        assert!(op.len <= op.buf.len(), "a read of {} bytes into a buffer of {}", op.len, op.buf.len());
        let mut pending = Pending { read: Some((op, done)), url: self.at.url.clone() };
        let (inner, at, object) = (Arc::clone(&self.inner), self.at.clone(), self.object.clone());
        self.inner.handle().spawn(async move {
            let Some((op, _)) = &mut pending.read else { return };
            let result = read(&inner, &at, &object, op).await;
            pending.end(result);
        });
    }
}

/// Fills the buffer: one copy, each piece summed right after.
async fn read(
    inner: &Inner,
    at: &Located,
    object: &RemoteObject,
    op: &mut ReadOp,
) -> Result<Filled, ReadError> {
    let begun = clock::now();
    let mut sums = op.sum.then(Summing::new);
    let mut sum_time = Duration::ZERO;
    let mut filled = 0;
    let range = op.offset..op.offset + op.len as u64;
    let buf = &mut op.buf;
    fill(inner, at, object, range, &mut |bytes: &[u8]| {
        for piece in bytes.chunks(PIECE_BYTES) {
            let copied = &mut buf[filled..filled + piece.len()];
            copied.copy_from_slice(piece);
            if let Some(sums) = &mut sums {
                let copied_at = clock::now();
                sums.update(copied);
                sum_time += copied_at.elapsed();
            }
            filled += piece.len();
        }
    })
    .await
    .map_err(|error| error.into_read(op.offset + filled as u64))?;
    let read_time = begun.elapsed().saturating_sub(sum_time);
    Ok(Filled { sum: sums.map(Summing::finish), read_time, sum_time })
}

/// Brings a range of one version of an object, piece by piece and in order, beginning again where it broke off.
pub(crate) async fn fill(
    inner: &Inner,
    at: &Located,
    object: &RemoteObject,
    range: Range<u64>,
    sink: &mut (dyn FnMut(&[u8]) + Send),
) -> Result<(), RemoteError> {
    let mut left = inner.patience.begin();
    let mut next = range.start;
    while next < range.end {
        at.host.quiet().await;
        let Err(trouble) = request(inner, at, object, &mut next, range.end, sink).await else { continue };
        let throttled = matches!(trouble, Trouble::Transient { throttled: true, .. });
        let pause = left.after(&at.url, trouble, next - range.start)?;
        if throttled {
            at.host.throttled(pause);
        } else {
            tokio::time::sleep(pause).await;
        }
    }
    Ok(())
}

/// One request. What it brings is passed on even if it breaks off.
async fn request(
    inner: &Inner,
    at: &Located,
    object: &RemoteObject,
    next: &mut u64,
    end: u64,
    sink: &mut (dyn FnMut(&[u8]) + Send),
) -> Result<(), Trouble> {
    let patience = inner.patience;
    let noted = Noted::default();
    let mut options = GetOptions {
        range: Some(GetRange::Bounded(*next..end)),
        // A weak ETag never matches by the rules of `If-Match`; it is compared with the answer's.
        if_match: object.etag.clone().filter(|etag| !etag.starts_with("W/")),
        ..GetOptions::default()
    };
    options.extensions.insert(noted.clone());
    let answer = tokio::time::timeout(patience.idle, at.host.store.get_opts(&at.path, options))
        .await
        .map_err(|_| Trouble::silent(patience.idle))?
        .map_err(|error| Trouble::of(&at.url, &error, noted.answered()))?;
    same(&at.url, object, &answer)?;
    let mut body = answer.into_stream();
    // Time that the body was waited for, and what it brought, since it was last looked at.
    let (mut waited, mut brought) = (Duration::ZERO, 0);
    while *next < end {
        let begun = Instant::now();
        let bytes = match tokio::time::timeout(patience.idle.saturating_sub(waited), body.next()).await {
            Err(_) => return Err(Trouble::silent(patience.idle)),
            Ok(None) => return Err(Trouble::broken(*next, end)),
            Ok(Some(bytes)) => bytes.map_err(|error| Trouble::of(&at.url, &error, Answered::default()))?,
        };
        let wanted = usize::try_from(end - *next).map_or(bytes.len(), |wanted| wanted.min(bytes.len()));
        sink(&bytes[..wanted]);
        *next += wanted as u64;
        waited += begun.elapsed();
        brought += wanted as u64;
        if brought >= patience.progress_bytes {
            (waited, brought) = (Duration::ZERO, 0);
        }
        if let Some(bandwidth) = &inner.bandwidth {
            bandwidth.pass(wanted).await;
        }
    }
    Ok(())
}

/// Whether an answer is of the version that is wanted.
fn same(url: &str, object: &RemoteObject, answer: &GetResult) -> Result<(), Trouble> {
    let changed = |detail: String| Err(Trouble::Final(RemoteError::Changed { url: url.to_owned(), detail }));
    if answer.meta.size != object.len {
        return changed(format!("it had {} bytes and has {}", object.len, answer.meta.size));
    }
    match (&object.etag, &answer.meta.e_tag) {
        (Some(was), Some(is)) if was != is && *was != entity_tag(is.clone()) => {
            changed(format!("its ETag was {was} and is {is}"))
        }
        (Some(_), _) => Ok(()),
        (None, _) => match object.modified_ms {
            Some(was) if was != answer.meta.last_modified.timestamp_millis() => {
                changed("it was written to since".into())
            }
            _ => Ok(()),
        },
    }
}

// === impl Trouble ===

impl Trouble {
    pub(crate) fn silent(idle: Duration) -> Self {
        let why = format!("next to nothing arrived in {} s", idle.as_secs_f32());
        Self::Transient { why, after: None, throttled: false }
    }

    fn broken(next: u64, end: u64) -> Self {
        let why = format!("the answer ended {} bytes too early", end - next);
        Self::Transient { why, after: None, throttled: false }
    }
}

// === impl Pending ===

impl Pending {
    fn end(mut self, result: Result<Filled, ReadError>) {
        if let Some((op, done)) = self.read.take() {
            done(ReadDone { buf: op.buf, result });
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some((op, done)) = self.read.take() {
            let error = RemoteError::Closed { url: std::mem::take(&mut self.url) };
            done(ReadDone { buf: op.buf, result: Err(error.into_read(op.offset)) });
        }
    }
}
