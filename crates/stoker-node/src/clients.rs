//! Programs of this machine that use the node's memory: each connection holds one model, which the program maps out of the
//! pool or on a device, for as long as the connection lives. See [`stoker_proto::share`].

use std::{
    io,
    os::{fd::OwnedFd, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use stoker_proto::{
    FrameError, FrameReader, FrameWriter, PROTOCOL_VERSION, send_with_descriptors,
    share::{self, DeviceSlab, FileSlots, Held, Hold, Progress, Refusal, Refused, ToClient, to_client},
};
use stoker_store::Resident;
use stoker_types::{ModelName, StartFailure};
use tokio::{
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{Node, devices::Loan};

/// Most programs at the same time; more are closed at once.
const CONNECTIONS_MAX: usize = 64;

/// How long a program may take to say what it wants.
const ASK_TIME_MAX: Duration = Duration::from_secs(10);

/// How often a program is told how far its load is.
const REPORT_EVERY: Duration = Duration::from_millis(50);

/// The socket for programs. Dropped or stopped, it takes no new ones, and those that are there lose their hold.
#[derive(Debug)]
pub struct ClientSocket {
    path: PathBuf,
    stop: CancellationToken,
    connections: TaskTracker,
}

/// A model that a program wants, in memory.
pub(crate) struct Shared {
    pub(crate) manifest_json: bytes::Bytes,
    pub(crate) chunk_bytes: u64,
    /// Keeps the chunks.
    pub(crate) resident: Resident,
}

/// A model that a program wants, on a device.
pub(crate) struct SharedSlab {
    pub(crate) manifest_json: bytes::Bytes,
    pub(crate) slab: DeviceSlab,
    pub(crate) granules: Vec<OwnedFd>,
    /// Keeps it there.
    pub(crate) loan: Loan,
}

/// Why a program can't have a model.
#[derive(Debug)]
pub(crate) enum NotShared {
    /// It can't be brought where it is wanted.
    Start(StartFailure),
    /// Not like this, in words.
    Unsupported(String),
}

/// What is kept for a program until it is gone.
enum Holding {
    Memory { _resident: Resident },
    Device { _loan: Loan },
}

/// What a program gets.
enum Given {
    Memory(Shared),
    Device(SharedSlab),
}

/// Why a connection ended otherwise than by the program's own will.
#[derive(Debug, thiserror::Error)]
enum ClientError {
    #[error("a process of user {uid}, not of this one's")]
    Stranger { uid: u32 },
    #[error("it said nothing for {ASK_TIME_MAX:?}")]
    Silent,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

// === impl ClientSocket ===

impl ClientSocket {
    /// Serves programs on `path`, which only this user can reach. A stale socket there is replaced: the directory is the
    /// node's own. Needs a runtime's context.
    ///
    /// # Errors
    /// The operating system's.
    pub fn listen(path: &Path, node: Node) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        let (stop, connections) = (CancellationToken::new(), TaskTracker::new());
        let socket = Self { path: path.to_owned(), stop: stop.clone(), connections: connections.clone() };
        tokio::spawn(stop.clone().run_until_cancelled_owned(accept(listener, node, stop, connections)));
        Ok(socket)
    }

    /// Ends every connection, and with it every hold. The programs' mappings stay readable; what they show may change from
    /// now on, which they learn by the connection's end.
    pub async fn stop(self) {
        self.stop.cancel();
        self.connections.close();
        self.connections.wait().await;
    }
}

impl Drop for ClientSocket {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the clients' socket stays");
        }
    }
}

async fn accept(listener: UnixListener, node: Node, stop: CancellationToken, connections: TaskTracker) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) if connections.len() < CONNECTIONS_MAX => {
                let (node, stop) = (node.clone(), stop.clone());
                connections.spawn(async move {
                    match stop.run_until_cancelled(serve(stream, &node)).await {
                        Some(Ok(())) => tracing::debug!("a client has let go"),
                        Some(Err(error)) => tracing::info!(%error, "a client's connection ended"),
                        None => {}
                    }
                });
            }
            Ok(_) => tracing::warn!(CONNECTIONS_MAX, "too many clients"),
            Err(error) => {
                // Out of descriptors, most likely: give what is open time to close.
                tracing::warn!(%error, "accepting a client failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// One program, until it is gone. Whatever it held is let go then.
async fn serve(stream: UnixStream, node: &Node) -> Result<(), ClientError> {
    let uid = stream.peer_cred()?.uid();
    if uid != rustix::process::geteuid().as_raw() {
        return Err(ClientError::Stranger { uid });
    }
    stream.writable().await?;
    let pool = node.lend_pool()?;
    share::send_pool(&stream, pool.fd())?;
    let (read, write) = stream.into_split();
    let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
    let asked = timeout(ASK_TIME_MAX, reader.next::<Hold>()).await.map_err(|_| ClientError::Silent)??;
    let Some(wish) = asked else { return Ok(()) };
    let given = tokio::select! {
        given = bring(&wish, node, &mut writer) => given?,
        // A program that is killed while it waits wants nothing any more.
        ended = gone(&mut reader) => return ended,
    };
    let mut granules = Vec::new();
    let (kind, held) = match given {
        Ok(Given::Memory(Shared { manifest_json, chunk_bytes, resident })) => {
            // Whatever becomes of this process, the next one doesn't use these for anything else while the program has them.
            let slots: Vec<u32> =
                resident.files().iter().flat_map(|file| file.slots.iter().copied()).collect();
            pool.hold(slots)?;
            let slots =
                |file: &stoker_store::FileSlots| FileSlots { len: file.len, slots: file.slots.clone() };
            let files = resident.files().iter().map(slots).collect();
            let held = Held { manifest_json, chunk_bytes, files, slab: None };
            (to_client::Kind::Held(held), Some(Holding::Memory { _resident: resident }))
        }
        Ok(Given::Device(SharedSlab { manifest_json, slab, granules: fds, loan })) => {
            granules = fds;
            let held = Held { manifest_json, chunk_bytes: 0, files: Vec::new(), slab: Some(slab) };
            (to_client::Kind::Held(held), Some(Holding::Device { _loan: loan }))
        }
        Err(refused) => (to_client::Kind::Refused(refused), None),
    };
    let answer = ToClient { kind: Some(kind) };
    send_with_descriptors(writer.inner().as_ref(), &answer, &granules).await?;
    drop(granules);
    if held.is_some() {
        tracing::info!(model = wish.model, device = wish.device, "held for a client");
        gone(&mut reader).await?;
    }
    drop(held);
    Ok(())
}

/// Waits until the program has closed the connection. What it says meanwhile is for a later version.
async fn gone(reader: &mut FrameReader<OwnedReadHalf>) -> Result<(), ClientError> {
    while reader.next::<Hold>().await?.is_some() {}
    Ok(())
}

/// Brings the model into memory, telling the program how far that is.
async fn bring(
    wish: &Hold,
    node: &Node,
    writer: &mut FrameWriter<OwnedWriteHalf>,
) -> Result<Result<Given, Refused>, ClientError> {
    let Hold { protocol, model, device, may_write } = wish;
    let refused = |reason: Refusal, message: String| Ok(Err(Refused { reason: reason.into(), message }));
    if *protocol != PROTOCOL_VERSION {
        let words = format!("this node speaks version {PROTOCOL_VERSION}, the program version {protocol}");
        return refused(Refusal::Other, words);
    }
    let Ok(name) = ModelName::new(model) else {
        return refused(Refusal::UnknownModel, format!("`{model}` is no model's name"));
    };
    if !device.is_empty() {
        return match node.share_on_device(&name, device, *may_write).await {
            Ok(shared) => Ok(Ok(Given::Device(shared))),
            Err(NotShared::Start(failure)) => refused(reason(&failure), failure.to_string()),
            Err(NotShared::Unsupported(words)) => refused(Refusal::Unsupported, words),
        };
    }
    let (progress, mut watermark) = tokio::sync::watch::channel(None);
    let mut bringing = std::pin::pin!(node.share(&name, |mark| drop(progress.send_replace(Some(mark)))));
    loop {
        let brought = tokio::select! {
            biased;
            brought = &mut bringing => brought,
            () = tokio::time::sleep(REPORT_EVERY) => {
                let mark = watermark.borrow_and_update().as_ref().map(|mark: &stoker_store::Watermark| (mark.ready(), mark.total()));
                if let Some((ready, total)) = mark {
                    let progress = Progress { ready: ready.bytes(), total: total.bytes() };
                    writer.send(&ToClient { kind: Some(to_client::Kind::Progress(progress)) }).await?;
                }
                continue;
            }
        };
        return match brought {
            Ok(shared) => Ok(Ok(Given::Memory(shared))),
            Err(failure) => refused(reason(&failure), failure.to_string()),
        };
    }
}

fn reason(failure: &StartFailure) -> Refusal {
    match failure {
        StartFailure::UnknownModel { .. } => Refusal::UnknownModel,
        StartFailure::OutOfMemory { .. } => Refusal::OutOfMemory,
        StartFailure::Corrupt { .. } => Refusal::Corrupt,
        StartFailure::Changed { .. } => Refusal::Changed,
        _ => Refusal::Other,
    }
}
