//! A running node's memory: the model's chunks are mapped from its pool, and stay for as long as the connection does.

use std::{
    collections::HashMap,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as Blocking},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use stoker_checkpoint::{FileIdentity, Manifest};
use stoker_device::{Device, Window};
use stoker_io::{
    Choice, Completion, FileStamp, Filled, LocalFiles, MappedFile, Open, ReadDone, ReadError, ReadMode,
    ReadOp, Reader, ReaderKind, Reason,
};
use stoker_proto::{
    DescriptorReader, FrameReader, FrameWriter, PROTOCOL_VERSION,
    share::{self, FileSlots, Held, Progress, Refusal, Refused, ToClient, to_client},
};
use stoker_store::SourceFile;
use stoker_types::{ByteSize, Summing, clock};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use crate::{error::Error, job::blocking, settings};

/// A model that a node keeps in memory for this process, until this is dropped.
pub(crate) struct Hold {
    pub(crate) pool: OwnedFd,
    pub(crate) chunk_bytes: u64,
    pub(crate) files: Vec<FileSlots>,
    /// Its end is the hold's.
    connection: UnixStream,
}

/// A node's copy on a device, mapped here. The node keeps it until this is dropped.
pub(crate) struct Copy {
    // Gone before the node is told that it is free.
    pub(crate) window: Window,
    /// First byte of each of the manifest's tensors.
    pub(crate) tensors: Vec<u64>,
    _connection: UnixStream,
}

/// What a node gave.
struct Given {
    held: Held,
    granules: Vec<OwnedFd>,
    pool: OwnedFd,
    stream: UnixStream,
}

/// Opens local files, and those that a node holds: both take the same way through the ring.
#[derive(Default)]
pub(crate) struct Opener {
    local: LocalFiles,
    lent: Mutex<HashMap<PathBuf, Arc<HeldFile>>>,
    lent_before: AtomicU64,
}

/// A held model's files while a store reads them.
pub(crate) struct Lent {
    opener: Arc<Opener>,
    number: u64,
    paths: Vec<PathBuf>,
}

/// A file in a node's memory.
struct HeldFile {
    map: MappedFile,
    stamp: FileStamp,
    choice: Choice,
    _hold: Arc<Hold>,
}

/// Bytes summed at a time.
const PIECE: usize = 256 << 10;

// === impl Hold ===

/// Has a node bring a model into memory and keep it. `report` is told how far that is.
pub(crate) async fn hold(
    socket: &Path,
    model: &str,
    cancel: &CancellationToken,
    report: impl Fn(u64, u64),
) -> Result<(Manifest, Arc<Hold>), Error> {
    let wish = share::Hold { protocol: PROTOCOL_VERSION, model: model.to_owned(), ..share::Hold::default() };
    let Given { held, pool, stream: connection, .. } = ask(socket, wish, cancel, report).await?;
    let Held { manifest_json, chunk_bytes, files, slab: _ } = held;
    let manifest = Manifest::parse(socket, &manifest_json)?;
    let same = manifest.files.len() == files.len()
        && manifest.files.iter().zip(&files).all(|(file, slots)| file.identity.len == slots.len);
    if !same {
        return Err(contradicts(socket));
    }
    Ok((manifest, Arc::new(Hold { pool, chunk_bytes, files, connection })))
}

/// Has a node bring a model to a device and keep it there, and maps it.
pub(crate) async fn copy(
    socket: &Path,
    model: &str,
    device: &Arc<dyn Device>,
    cancel: &CancellationToken,
) -> Result<(Manifest, Copy), Error> {
    let asked = Arc::clone(device);
    let may_write = !blocking(move || Ok(asked.maps_read_only()?)).await?;
    let wish = share::Hold {
        protocol: PROTOCOL_VERSION,
        model: model.to_owned(),
        device: device.info().uuid.clone(),
        may_write,
    };
    let Given { held, granules, stream, .. } = ask(socket, wish, cancel, |_, _| {}).await?;
    let manifest = Manifest::parse(socket, &held.manifest_json)?;
    let Some(slab) = held.slab.filter(|slab| slab.tensors.len() == manifest.tensors.len()) else {
        return Err(contradicts(socket));
    };
    let lies_within = |(tensor, at): (&stoker_checkpoint::Tensor, &u64)| {
        at.checked_add(tensor.len).is_some_and(|end| end <= slab.bytes)
    };
    if !manifest.tensors.iter().zip(&slab.tensors).all(lies_within) {
        return Err(contradicts(socket));
    }
    let (device, bytes, granule) = (Arc::clone(device), ByteSize(slab.bytes), ByteSize(slab.granule));
    let window = blocking(move || Ok(device.window(&granules, bytes, granule)?)).await?;
    Ok((manifest, Copy { window, tensors: slab.tensors, _connection: stream }))
}

fn contradicts(socket: &Path) -> Error {
    let message = format!(
        "the node at {}: answer: its manifest and its memory contradict each other, or it is of another version",
        socket.display()
    );
    Error::Node { message }
}

/// Asks a node for a model, and waits until it is there.
async fn ask(
    socket: &Path,
    order: share::Hold,
    cancel: &CancellationToken,
    report: impl Fn(u64, u64),
) -> Result<Given, Error> {
    let path = socket.to_owned();
    let failed = |what: &str, error: &dyn std::fmt::Display| Error::Node {
        message: format!("the node at {}: {what}: {error}", socket.display()),
    };
    let connect = blocking(move || {
        let connected = Blocking::connect(&path).and_then(|stream| {
            // A node that hangs holds no thread of ours for ever.
            stream.set_read_timeout(Some(settings::NODE_ANSWERS))?;
            let pool = share::receive_pool(&stream)?;
            stream.set_nonblocking(true)?;
            Ok((stream, pool))
        });
        connected.map_err(|error| Error::Node {
            message: format!("no node serves at {}: {error}; is `stoker serve` running?", path.display()),
        })
    });
    let (stream, pool) = tokio::select! {
        biased;
        () = cancel.cancelled() => return Err(Error::Cancelled),
        connected = connect => connected?,
    };
    let mut stream = UnixStream::from_std(stream).map_err(|e| failed("connection", &e))?;
    let (held, granules) = {
        let (read, write) = stream.split();
        FrameWriter::new(write).send(&order).await.map_err(|e| failed("connection", &e))?;
        let mut reader = FrameReader::new(DescriptorReader::new(read));
        let held = loop {
            let message = tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(Error::Cancelled),
                message = reader.next::<ToClient>() => message.map_err(|e| failed("connection", &e))?,
            };
            let Some(message) = message else { return Err(failed("connection", &"it ended")) };
            match message.kind {
                Some(to_client::Kind::Progress(Progress { ready, total })) => report(ready, total),
                Some(to_client::Kind::Held(held)) => break held,
                Some(to_client::Kind::Refused(refused)) => return Err(refusal(&order.model, refused)),
                None => return Err(failed("answer", &"it is of another version")),
            }
        };
        let count = held.slab.as_ref().map_or(0, |slab| slab.granules);
        let granules = reader.inner_mut().take(usize::try_from(count).unwrap_or(usize::MAX));
        (held, granules.ok_or_else(|| failed("answer", &"descriptors are missing"))?)
    };
    Ok(Given { held, granules, pool, stream })
}

impl Hold {
    /// Whether the node has kept its promise until now: without the connection, it may have put other bytes there.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
        match rustix::net::recv(&self.connection, &mut [0_u8; 1], flags) {
            Err(rustix::io::Errno::AGAIN) => Ok(()),
            Ok(_) | Err(_) => Err(Error::Node {
                message: "the node went away before its memory was copied; load it again".to_owned(),
            }),
        }
    }

    /// The files, contiguous and read-only.
    pub(crate) fn map(&self) -> Result<Vec<MappedFile>, Error> {
        let map = |file: &FileSlots| MappedFile::map(&self.pool, file.len, self.chunk_bytes, &file.slots);
        Ok(self.files.iter().map(map).collect::<Result<_, _>>()?)
    }
}

fn refusal(model: &str, refused: Refused) -> Error {
    let reason = refused.reason();
    let Refused { message, .. } = refused;
    match reason {
        Refusal::UnknownModel => Error::NotFound { message, file: None },
        Refusal::OutOfMemory => Error::OutOfMemory { message },
        Refusal::Corrupt => Error::Corrupt { message, file: model.into() },
        Refusal::Changed => Error::Changed { message, file: model.into() },
        Refusal::Unsupported => Error::NotSupported(message),
        Refusal::Other => Error::Node { message },
    }
}

// === impl Opener ===

impl Opener {
    /// Has a held model's files read by these names until the guard is dropped: as files, but from memory.
    pub(crate) fn lend(self: &Arc<Self>, hold: &Arc<Hold>) -> Result<Lent, Error> {
        let number = self.lent_before.fetch_add(1, Ordering::Relaxed);
        let mut paths = Vec::with_capacity(hold.files.len());
        let mut lent = self.lent.lock();
        for (index, map) in hold.map()?.into_iter().enumerate() {
            let path = PathBuf::from(format!("node:{number}/{index}"));
            let stamp = FileStamp { len: map.len() as u64, mtime_ns: 0, inode: number };
            let choice = Choice { kind: ReaderKind::Buffered, reason: Reason::MemoryFileSystem };
            lent.insert(path.clone(), Arc::new(HeldFile { map, stamp, choice, _hold: Arc::clone(hold) }));
            paths.push(path);
        }
        Ok(Lent { opener: Arc::clone(self), number, paths })
    }
}

impl Open for Opener {
    fn open(&self, path: &Path, mode: ReadMode) -> io::Result<Arc<dyn Reader>> {
        let held = self.lent.lock().get(path).cloned();
        match held {
            Some(held) => Ok(held),
            None => self.local.open(path, mode),
        }
    }
}

// === impl Lent ===

impl Lent {
    /// The files, as a store loads them.
    pub(crate) fn source_files(&self) -> Vec<SourceFile> {
        let lent = self.opener.lent.lock();
        let source = |path: &PathBuf| {
            let len = lent.get(path).map_or(0, |held| held.stamp.len);
            let identity = FileIdentity { len, mtime_ns: 0, inode: self.number };
            // The node has checked every byte.
            SourceFile { path: path.clone(), identity, chunk_sums: Vec::new(), sha256: None, origin: None }
        };
        self.paths.iter().map(source).collect()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut lent = self.opener.lent.lock();
        self.paths.iter().for_each(|path| drop(lent.remove(path)));
    }
}

// === impl HeldFile ===

impl Reader for HeldFile {
    fn choice(&self) -> &Choice {
        &self.choice
    }

    fn stamp(&self) -> io::Result<FileStamp> {
        Ok(self.stamp)
    }

    fn part_bytes(&self) -> Option<usize> {
        // From memory to memory, as files in the page cache are read.
        Some(LocalFiles::default().buffered_part_bytes)
    }

    fn read(&self, op: ReadOp, done: Completion) {
        let ReadOp { mut buf, offset, len, sum } = op;
        let begun = clock::now();
        let bytes = usize::try_from(offset).ok().and_then(|at| self.map.get(at..at.checked_add(len)?));
        let result = match bytes {
            None => Err(ReadError::Truncated { at: self.stamp.len }),
            Some(bytes) => {
                let mut summing = sum.then(Summing::new);
                for (to, from) in buf.chunks_mut(PIECE).zip(bytes.chunks(PIECE)) {
                    let to = &mut to[..from.len()];
                    to.copy_from_slice(from);
                    // While the piece is still in the cache of the core that wrote it.
                    if let Some(summing) = &mut summing {
                        summing.update(to);
                    }
                }
                let sum = summing.map(Summing::finish);
                Ok(Filled { sum, read_time: begun.elapsed(), sum_time: Duration::ZERO })
            }
        };
        done(ReadDone { buf, result });
    }
}
