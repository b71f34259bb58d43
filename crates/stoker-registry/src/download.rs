//! One file, or one stretch of one, to disk: resumed, counted, summed.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use reqwest::{Response, StatusCode, Url};
use stoker_types::ByteSize;
use tokio::sync::mpsc;

use crate::{
    error::{RegistryError, SourceError, Stop},
    http::{Get, Remote, Trouble, content_range, host, shown, strong_etag},
    pull::{PullEvent, PullProgress},
    stage::{self, Finished, Part},
};

/// Blocks of a body between the network and the disk. Each has at most some 64 KiB.
const QUEUE_BLOCKS: usize = 64;
/// A transfer that moved this far has earned all its tries again, bytes.
const HEADWAY: u64 = 1 << 20;

/// What to fetch.
#[derive(Debug, Clone)]
pub(crate) struct Job<'a> {
    pub(crate) get: Get,
    /// First byte and length of a stretch; `None`: the whole file.
    pub(crate) span: Option<(u64, u64)>,
    /// Where to.
    pub(crate) part: PathBuf,
    /// For progress.
    pub(crate) label: &'a str,
    /// What it must be.
    pub(crate) sha256: Option<&'a str>,
    /// Whether the content is checked afterwards in another way. What is checked may be joined from several answers even
    /// if the server gives no ETag.
    pub(crate) checked_later: bool,
    /// Length in all, where it is known beforehand.
    pub(crate) total: Option<u64>,
}

/// How one answer's body ended.
enum Poured {
    Whole,
    Cut(Trouble),
    Failed(RegistryError),
}

/// Fetches a file. What arrived stays when the transfer is given up or cancelled, and the next call goes on there.
///
/// A wrong hash deletes the file.
pub(crate) async fn download(
    remote: &Remote,
    job: &Job<'_>,
    progress: &dyn PullProgress,
) -> Result<Finished, Stop> {
    let url = &job.get.url;
    let begin = job.span.map_or(0, |(begin, _)| begin);
    let mut part = {
        let (path, address) = (job.part.clone(), shown(url));
        blocking(&job.part, move || Part::open(&path, &address, begin)).await?
    };
    let mut total = job.span.map(|(_, len)| len).or(job.total).or(part.origin().total);
    let mut reached = false;
    let mut failures = 0;
    let mut headway_from = part.len();
    loop {
        if part.len() > 0 && part.origin().etag.is_none() && job.sha256.is_none() && !job.checked_later {
            part.restart()?;
        }
        if total.is_some_and(|total| part.len() > total) {
            part.restart()?;
        }
        progress.event(PullEvent::Bytes { file: job.label, done: part.len(), total });
        if total == Some(part.len()) {
            break;
        }
        let request = range_request(job, &part);
        let trouble = match remote.get(&request).await {
            Ok(response) => {
                reached = true;
                match accept(response, job, &mut part, &mut total)? {
                    None => {
                        failures += 1;
                        if failures >= remote.config().tries {
                            let problem = "answers ranges wrongly".to_owned();
                            return Err(SourceError::Malformed { what: shown(url), problem }.into());
                        }
                        continue;
                    }
                    Some(response) => {
                        stage::check_room(&job.part, total.map_or(0, |total| total - part.len()))?;
                        let (returned, poured) = pour(remote, response, part, job, total, progress).await?;
                        part = returned;
                        match poured {
                            Poured::Failed(error) => return Err(error.into()),
                            Poured::Cut(trouble) => trouble,
                            Poured::Whole if total.is_none_or(|total| total == part.len()) => break,
                            Poured::Whole => cut_short(url),
                        }
                    }
                }
            }
            Err(trouble) => trouble,
        };
        if part.len() >= headway_from + HEADWAY {
            (failures, headway_from) = (0, part.len());
        }
        failures += 1;
        let why = match &trouble {
            Trouble::Transient { error: SourceError::Unreachable { why, .. }, .. }
            | Trouble::Unreachable(why) => why.clone(),
            Trouble::Transient { error, .. } => error.to_string(),
            Trouble::Idle => format!("silent for {} s", remote.config().idle_timeout.as_secs_f32()),
            Trouble::Final(error) => error.to_string(),
        };
        let is_final = matches!(trouble, Trouble::Final(_));
        if let Err(error) = remote.pause(failures, trouble, url, reached).await {
            if is_final || part.len() == 0 {
                return Err(error.into());
            }
            let (done, total) = (ByteSize(part.len()), ByteSize(total.unwrap_or(0)));
            return Err(SourceError::BrokenOff { host: host(url), tries: failures, done, total, why }.into());
        }
    }
    let finished = blocking(&job.part, move || part.finish()).await?;
    check_hash(&finished, job.label, job.sha256)?;
    Ok(finished)
}

/// Errs, and deletes the file, when it isn't the one that was expected.
pub(crate) fn check_hash(finished: &Finished, label: &str, sha256: Option<&str>) -> Result<(), SourceError> {
    match sha256 {
        Some(expected) if expected != finished.sha256 => {
            finished.discard();
            let (file, expected, found) = (label.to_owned(), expected.to_owned(), finished.sha256.clone());
            Err(SourceError::WrongHash { file, expected, found })
        }
        _ => Ok(()),
    }
}

/// Runs blocking work off the runtime's threads; `path` is for the message if it panics.
pub(crate) async fn blocking<T: Send + 'static, E: Send + 'static + From<RegistryError>>(
    path: &Path,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panic) => Err(RegistryError::io(path)(std::io::Error::other(panic)).into()),
    }
}

fn range_request(job: &Job<'_>, part: &Part) -> Get {
    let mut get = job.get.clone();
    match job.span {
        Some((begin, len)) => get.range = Some(format!("bytes={}-{}", begin + part.len(), begin + len - 1)),
        None if part.len() > 0 => get.range = Some(format!("bytes={}-", part.len())),
        None => return get,
    }
    // Without a hash or an ETag to hold on to, nothing is joined.
    get.if_range = part.origin().etag.clone().filter(|_| part.len() > 0);
    get
}

/// Looks at an answer's headers and makes the part ready for its body; `None`: ask again.
fn accept(
    response: Response,
    job: &Job<'_>,
    part: &mut Part,
    total: &mut Option<u64>,
) -> Result<Option<Response>, Stop> {
    let malformed =
        |problem: &str| SourceError::Malformed { what: shown(response.url()), problem: problem.to_owned() };
    let etag = strong_etag(&response);
    match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            let range =
                content_range(&response).ok_or_else(|| malformed("a partial answer without its range"))?;
            let begin = job.span.map_or(0, |(begin, _)| begin);
            let changed = part.len() > 0 && part.origin().etag.is_some() && part.origin().etag != etag;
            if range.begin != begin + part.len() || changed {
                part.restart()?;
                return Ok(None);
            }
            if job.span.is_none() {
                *total = range.total.or(*total);
            }
        }
        StatusCode::OK if job.span.is_some() => {
            return Err(malformed("ignores ranges").into());
        }
        StatusCode::OK => {
            // The server begins anew: the content changed, or it knows no ranges.
            if part.len() > 0 {
                part.restart()?;
            }
            *total = response.content_length().or(job.total);
        }
        // What is here is longer than what is there.
        _ => {
            part.restart()?;
            return Ok(None);
        }
    }
    if let (Some(expected), Some(found)) = (job.total, *total)
        && expected != found
    {
        return Err(malformed(&format!("has {found} bytes instead of {expected}")).into());
    }
    part.set_origin(etag, *total)?;
    Ok(Some(response))
}

/// Writes a body to the part, on a thread of its own, so that neither network nor disk waits for the other.
async fn pour(
    remote: &Remote,
    mut response: Response,
    part: Part,
    job: &Job<'_>,
    total: Option<u64>,
    progress: &dyn PullProgress,
) -> Result<(Part, Poured), RegistryError> {
    let mut done = part.len();
    let (sender, mut receiver) = mpsc::channel::<Bytes>(QUEUE_BLOCKS);
    let writer = tokio::task::spawn_blocking(move || {
        let mut part = part;
        while let Some(bytes) = receiver.blocking_recv() {
            if let Err(error) = part.write(&bytes) {
                return (part, Some(error));
            }
        }
        (part, None)
    });
    let mut poured = loop {
        match remote.next(&mut response).await {
            Ok(None) => break Poured::Whole,
            Err(trouble) => break Poured::Cut(trouble),
            Ok(Some(bytes)) => {
                done += bytes.len() as u64;
                if total.is_some_and(|total| done > total) {
                    let problem = "sends more than it said".to_owned();
                    break Poured::Cut(Trouble::Final(SourceError::Malformed {
                        what: shown(response.url()),
                        problem,
                    }));
                }
                // The writer is gone when it failed: its error comes out below.
                if sender.send(bytes).await.is_err() {
                    break Poured::Whole;
                }
                progress.event(PullEvent::Bytes { file: job.label, done, total });
            }
        }
    };
    drop(sender);
    let (part, failed) = writer.await.map_err(|e| RegistryError::io(&job.part)(std::io::Error::other(e)))?;
    if let Some(error) = failed {
        poured = Poured::Failed(error);
    }
    Ok((part, poured))
}

fn cut_short(url: &Url) -> Trouble {
    let why = "the answer ended early".to_owned();
    Trouble::Transient { after: None, error: SourceError::Unreachable { host: host(url), why } }
}
