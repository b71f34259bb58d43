//! A running node's memory: the model's chunks are mapped from its pool, and stay for as long as the connection does.

use std::{
    collections::VecDeque,
    os::{fd::OwnedFd, unix::net::UnixStream as Blocking},
    path::Path,
    sync::Arc,
};

use stoker_checkpoint::Manifest;
use stoker_device::{Cut, DeviceError, Slab, Transfer};
use stoker_io::MappedFile;
use stoker_proto::{
    FrameReader, FrameWriter, PROTOCOL_VERSION,
    share::{self, FileSlots, Held, Progress, Refusal, Refused, ToClient, to_client},
};
use stoker_store::Layout;
use tokio::{net::UnixStream, sync::oneshot};
use tokio_util::sync::CancellationToken;

use crate::{engine::Target, error::Error, job::blocking, settings, source::Checkpoint};

/// A model that a node keeps in memory for this process, until this is dropped.
pub(crate) struct Hold {
    pub(crate) pool: OwnedFd,
    pub(crate) chunk_bytes: u64,
    pub(crate) files: Vec<FileSlots>,
    /// Its end is the hold's.
    connection: UnixStream,
}

/// Bytes of a held model on their way to a device.
struct Piece {
    maps: Arc<Vec<MappedFile>>,
    _hold: Arc<Hold>,
    file: usize,
    at: usize,
    len: usize,
}

// === impl Hold ===

/// Has a node bring a model into memory and keep it. `report` is told how far that is.
pub(crate) async fn hold(
    socket: &Path,
    model: &str,
    cancel: &CancellationToken,
    report: impl Fn(u64, u64),
) -> Result<(Checkpoint, Arc<Hold>), Error> {
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
    let held = {
        let (read, write) = stream.split();
        let order = share::Hold { protocol: PROTOCOL_VERSION, model: model.to_owned() };
        FrameWriter::new(write).send(&order).await.map_err(|e| failed("connection", &e))?;
        let mut reader = FrameReader::new(read);
        loop {
            let message = tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(Error::Cancelled),
                message = reader.next::<ToClient>() => message.map_err(|e| failed("connection", &e))?,
            };
            let Some(message) = message else { return Err(failed("connection", &"it ended")) };
            match message.kind {
                Some(to_client::Kind::Progress(Progress { ready, total })) => report(ready, total),
                Some(to_client::Kind::Held(held)) => break held,
                Some(to_client::Kind::Refused(refused)) => return Err(refusal(model, refused)),
                None => return Err(failed("answer", &"it is of another version")),
            }
        }
    };
    let Held { manifest_json, chunk_bytes, files } = held;
    let manifest = Manifest::parse(socket, &manifest_json)?;
    let checkpoint = Checkpoint::of_manifest(Path::new("/"), &manifest);
    let same = checkpoint.files.len() == files.len()
        && checkpoint.files.iter().zip(&files).all(|(file, slots)| file.identity.len == slots.len);
    if !same {
        return Err(failed("answer", &"its manifest and its memory contradict each other"));
    }
    Ok((checkpoint, Arc::new(Hold { pool, chunk_bytes, files, connection: stream })))
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
        Refusal::Other => Error::Node { message },
    }
}

/// Copies a model's tensors to where the layout has them, in order. `report` is told how many bytes have arrived.
#[expect(clippy::too_many_arguments, reason = "all of them are the copy")]
pub(crate) async fn copy_to_device(
    checkpoint: &Checkpoint,
    hold: &Arc<Hold>,
    maps: &Arc<Vec<MappedFile>>,
    target: &Arc<Target>,
    slab: &Slab,
    layout: &Layout,
    cancel: &CancellationToken,
    report: impl Fn(u64),
) -> Result<(), Error> {
    let mut flying: VecDeque<(u64, oneshot::Receiver<Result<(), DeviceError>>)> = VecDeque::new();
    let mut arrived = 0;
    let mut land = async |flying: &mut VecDeque<(u64, oneshot::Receiver<_>)>| -> Result<(), Error> {
        if let Some((len, end)) = flying.pop_front() {
            // A device that is gone drops what it had.
            end.await.unwrap_or(Err(DeviceError::Closed))?;
            arrived += len;
            report(arrived);
        }
        Ok(())
    };
    for (tensor, to) in checkpoint.tensors.iter().zip(layout.tensors()) {
        let mut done = 0;
        while done < tensor.range.len {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            if flying.len() >= settings::NODE_COPIES {
                land(&mut flying).await?;
            }
            let len = (tensor.range.len - done).min(settings::NODE_PIECE);
            let outside = || Error::Internal("a tensor lies outside of its file".to_owned());
            let piece = Piece {
                maps: Arc::clone(maps),
                _hold: Arc::clone(hold),
                file: tensor.range.file as usize,
                at: usize::try_from(tensor.range.offset + done).map_err(|_| outside())?,
                len: usize::try_from(len).map_err(|_| outside())?,
            };
            let cut = Cut::range(0, piece.len, to + done);
            let (sender, end) = oneshot::channel();
            target.device.copy(Transfer {
                from: Box::new(piece),
                to: slab.clone(),
                cuts: vec![cut],
                // Nobody waits any more when the load was cancelled.
                done: Box::new(move |result| drop(sender.send(result))),
            });
            flying.push_back((len, end));
            done += len;
        }
    }
    while !flying.is_empty() {
        land(&mut flying).await?;
    }
    Ok(())
}

// === impl Piece ===

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        // The manifest's ranges lie within its files (`Manifest::parse`), whose maps are as long.
        &self.maps[self.file][self.at..self.at + self.len]
    }
}
