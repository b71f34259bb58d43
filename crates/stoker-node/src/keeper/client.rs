//! The node's side: starts the keeper, hands over what is to be kept, and sees to it that there is always one.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use rustix::net::{RecvFlags, SendFlags, sockopt::Timeout};
use stoker_io::PoolMemory;
use tokio::{net::UnixStream, process::Command, sync::Notify, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    ANSWER_TIME_MAX, KeeperError, LEDGER, POOL, RECORD, SLAB, holders,
    wire::{self, Listener, Operation, Packet, Refusal, VERSION},
};
use crate::RuntimeDir;

/// First pause between two attempts to have a keeper; doubles up to the longest.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// How a node has descriptors kept.
#[derive(Debug, Clone)]
pub struct KeeperConfig {
    /// The keeper's socket, in the node's runtime directory.
    pub socket: PathBuf,
    /// What starts a keeper: executable and arguments. Its standard input is the socket, which listens already.
    pub command: Vec<OsString>,
    /// What starts workers: those that a killed node left are known by it.
    pub workers: Vec<OsString>,
}

/// A node's keeper. A cheap handle. Dropped, the keeper goes on, and waits for the next node.
#[derive(Clone)]
pub struct Keeper {
    inner: Arc<Inner>,
    _watch: Arc<DropGuard>,
}

struct Inner {
    config: KeeperConfig,
    state: Mutex<State>,
    /// It doesn't answer any more.
    lost: Notify,
    stop: CancellationToken,
}

struct State {
    link: Option<Link>,
    /// What the next keeper gets.
    memory: Option<PoolMemory>,
    slabs: BTreeMap<u64, SlabFiles>,
    dismissed: bool,
}

/// Weights on a device, by descriptors.
#[derive(Debug)]
pub(crate) struct SlabFiles {
    /// A file that says what they are.
    pub(crate) record: OwnedFd,
    /// The memory, granule by granule.
    pub(crate) granules: Vec<OwnedFd>,
}

/// Weights that are kept. Dropped, they are no longer.
pub(crate) struct KeptSlab {
    inner: Arc<Inner>,
    number: u64,
}

/// A connection to a keeper of this version.
struct Link {
    socket: OwnedFd,
    pid: u32,
}

// === impl Keeper ===

impl Keeper {
    /// Connects to the directory's keeper, and starts one if there is none. From then on there is always one: when it
    /// ends, another one is started and gets what this one had. Whoever calls this has the directory to itself
    /// ([`crate::RuntimeDir`]). Blocks; needs a runtime's context.
    ///
    /// # Errors
    /// [`KeeperError`].
    pub fn open(config: KeeperConfig) -> Result<Self, KeeperError> {
        let link = Link::open(&config)?;
        let state = State { link: Some(link), memory: None, slabs: BTreeMap::new(), dismissed: false };
        let stop = CancellationToken::new();
        let inner =
            Arc::new(Inner { config, state: Mutex::new(state), lost: Notify::new(), stop: stop.clone() });
        tokio::spawn(watch(Arc::clone(&inner)));
        Ok(Self { inner, _watch: Arc::new(stop.drop_guard()) })
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.inner.state.lock().link.as_ref().map(|link| link.pid)
    }

    /// The memory that the node before left, once nobody has it mapped any more but the workers that have been met
    /// ([`RuntimeDir::meet`]). Other workers that don't end by themselves
    /// within `grace` are killed. `None` when there is none, or somebody who is no worker keeps it. Blocks.
    ///
    /// # Errors
    /// [`KeeperError`].
    pub fn recover(&self, runtime: &RuntimeDir, grace: Duration) -> Result<Option<PoolMemory>, KeeperError> {
        let state = &*self.inner.state.lock();
        let Some(link) = &state.link else {
            return Err(KeeperError::Gone(io::ErrorKind::NotConnected.into()));
        };
        let (Some(pool), Some(ledger)) = (link.get(POOL)?, link.get(LEDGER)?) else { return Ok(None) };
        let memory = PoolMemory { pool, ledger };
        let mut apart = runtime.left().lock().pids();
        apart.push(link.pid);
        let free = holders::wait(&memory, &self.inner.config.workers, &apart, grace);
        Ok(free.map_err(KeeperError::Gone)?.then_some(memory))
    }

    /// Has memory kept from now on, in place of what was. If there is no keeper now, the next one gets it. Blocks for as
    /// long as an answer takes.
    pub fn keep(&self, memory: PoolMemory) {
        let state = &mut *self.inner.state.lock();
        if let Some(link) = &state.link
            && let Err(error) = link.hand_over(&memory)
        {
            self.inner.lose(state, &error);
        }
        state.memory = Some(memory);
    }

    /// Has weights on a device kept, until what is returned is dropped. If there is no keeper now, the next one gets them.
    /// Blocks for as long as an answer takes.
    pub(crate) fn keep_slab(&self, number: u64, files: SlabFiles) -> KeptSlab {
        let state = &mut *self.inner.state.lock();
        if let Some(link) = &state.link
            && let Err(error) = link.hand_over_slab(number, &files)
        {
            // Half of it would be in the way of nothing: without its record it is thrown away.
            self.inner.lose(state, &error);
        }
        state.slabs.insert(number, files);
        KeptSlab { inner: Arc::clone(&self.inner), number }
    }

    /// Weights on devices that the node before left, by number, for whoever can tell what they are. Those that come back
    /// nobody's, [`Self::forget_slab`] lets go. Blocks.
    pub(crate) fn left_slabs(&self) -> Result<BTreeMap<u64, SlabFiles>, KeeperError> {
        let state = &*self.inner.state.lock();
        let Some(link) = &state.link else {
            return Err(KeeperError::Gone(io::ErrorKind::NotConnected.into()));
        };
        let (mut records, mut granules) = (BTreeMap::new(), BTreeMap::<u64, BTreeMap<u32, OwnedFd>>::new());
        let mut last = String::new();
        while let Some(name) = link.next(&last)? {
            if let Some((number, what)) = name.strip_prefix(SLAB).and_then(|rest| rest.split_once('/'))
                && let Ok(number) = number.parse()
                && let Some(fd) = link.get(&name)?
            {
                match what.parse() {
                    Ok(granule) => drop(granules.entry(number).or_default().insert(granule, fd)),
                    Err(_) => drop(records.insert(number, fd)),
                }
            }
            last = name;
        }
        let slab = |(number, granules): (u64, BTreeMap<u32, OwnedFd>)| {
            let whole = records.remove(&number).filter(|_| granules.keys().copied().eq(0..count(&granules)));
            match whole {
                Some(record) => {
                    Some((number, SlabFiles { record, granules: granules.into_values().collect() }))
                }
                // Its node was killed while it handed it over.
                None => {
                    link.forget(number);
                    None
                }
            }
        };
        Ok(granules.into_iter().filter_map(slab).collect())
    }

    /// Goes on keeping what [`Self::left_slabs`] named.
    pub(crate) fn keeps(&self, number: u64) -> KeptSlab {
        KeptSlab { inner: Arc::clone(&self.inner), number }
    }

    /// Lets weights go that nobody can use.
    pub(crate) fn forget_slab(&self, number: u64) {
        self.inner.forget_slab(number);
    }

    /// The node stops for good: the keeper ends, and the memory with it. Blocks until it has.
    pub fn dismiss(&self) {
        let state = &mut *self.inner.state.lock();
        self.inner.stop.cancel();
        state.dismissed = true;
        state.memory = None;
        state.slabs.clear();
        if let Some(link) = state.link.take() {
            match link.exit() {
                // Its socket stays otherwise, for the next one to replace.
                Ok(()) => drop(std::fs::remove_file(&self.inner.config.socket)),
                Err(error) => tracing::warn!(%error, pid = link.pid, "the keeper may stay for a while"),
            }
        }
    }
}

fn count<K, V>(map: &BTreeMap<K, V>) -> u32 {
    u32::try_from(map.len()).unwrap_or(u32::MAX)
}

/// Has another keeper started whenever one is gone.
async fn watch(inner: Arc<Inner>) {
    let mut pause = Duration::ZERO;
    loop {
        let began = Instant::now();
        if let Ok(there) = watched(&inner.config) {
            tokio::select! {
                // Nothing is ever said on this connection but its end.
                _ = there.readable() => {}
                () = inner.lost.notified() => {}
                () = inner.stop.cancelled() => return,
            }
        }
        // One that ends again and again is not started faster and faster.
        pause =
            if began.elapsed() > PAUSE_MAX { Duration::ZERO } else { (2 * pause).clamp(PAUSE, PAUSE_MAX) };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = inner.stop.cancelled() => return,
        }
        let again = Arc::clone(&inner);
        match tokio::task::spawn_blocking(move || again.revive()).await {
            Ok(Ok(Some(pid))) => {
                metrics::counter!("stoker_node_keeper_restarts_total").increment(1);
                tracing::warn!(pid, "the keeper was gone; another one keeps the memory");
            }
            Ok(Ok(None)) => return,
            Ok(Err(error)) => {
                tracing::warn!(%error, "no keeper: what is in memory would be lost with this process");
            }
            Err(_) => return,
        }
    }
}

/// A connection that says when the keeper is gone.
fn watched(config: &KeeperConfig) -> io::Result<UnixStream> {
    let socket = wire::connect(&config.socket)?;
    rustix::io::ioctl_fionbio(&socket, true)?;
    // For its readiness only: it is a socket of packets.
    UnixStream::from_std(std::os::unix::net::UnixStream::from(socket))
}

// === impl KeptSlab ===

impl Drop for KeptSlab {
    fn drop(&mut self) {
        self.inner.forget_slab(self.number);
    }
}

// === impl Inner ===

impl Inner {
    /// Another keeper gets what the last one had. Returns its process id; `None` when none is wanted any more.
    fn revive(&self) -> Result<Option<u32>, KeeperError> {
        let state = &mut *self.state.lock();
        if state.dismissed {
            return Ok(None);
        }
        state.link = None;
        let link = Link::open(&self.config)?;
        if let Some(memory) = &state.memory {
            link.hand_over(memory)?;
        }
        for (number, files) in &state.slabs {
            link.hand_over_slab(*number, files)?;
        }
        let pid = link.pid;
        state.link = Some(link);
        Ok(Some(pid))
    }

    fn forget_slab(&self, number: u64) {
        let state = &mut *self.state.lock();
        // Its descriptors are memory: here as there.
        state.slabs.remove(&number);
        if let Some(link) = &state.link {
            link.forget(number);
        }
    }

    fn lose(&self, state: &mut State, error: &KeeperError) {
        tracing::warn!(%error, "the keeper can't be used");
        state.link = None;
        self.lost.notify_one();
    }
}

// === impl Link ===

impl Link {
    /// Connects, and starts a keeper if there is none, or one of another version.
    fn open(config: &KeeperConfig) -> Result<Self, KeeperError> {
        let failed = |source| KeeperError::Socket { path: config.socket.clone(), source };
        match wire::connect(&config.socket) {
            Ok(socket) => match Self::greet(socket) {
                Err(KeeperError::Version { theirs, ours }) => {
                    tracing::warn!(theirs, ours, "a keeper of another version; what it keeps is lost");
                    let old = wire::connect(&config.socket).map_err(failed)?;
                    Self { socket: old, pid: 0 }.exit()?;
                }
                // It was about to end.
                Err(KeeperError::Gone(_)) => {}
                greeted => return greeted,
            },
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
            Err(error) => return Err(failed(error)),
        }
        let listener = Listener::bind(&config.socket)?;
        let (program, args) = config.command.split_first().map_or((None, &[][..]), |(p, a)| (Some(p), a));
        let program = program.cloned().unwrap_or_default();
        // Connected before it runs: whether it comes to life is what its answer says.
        let socket = wire::connect(&config.socket).map_err(failed)?;
        let child = Command::new(&program)
            .args(args)
            .env_clear()
            // A directory that nobody wants to remove.
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        // The runtime waits for it when it ends before this process.
        drop(child.map_err(|source| KeeperError::Start {
            program: program.to_string_lossy().into_owned(),
            source,
        })?);
        Self::greet(socket)
    }

    fn greet(socket: OwnedFd) -> Result<Self, KeeperError> {
        let (theirs, ours) =
            (wire::peer_uid(&socket).map_err(KeeperError::Gone)?, rustix::process::getuid().as_raw());
        if theirs != ours {
            return Err(KeeperError::Peer { theirs, ours });
        }
        for timeout in [Timeout::Recv, Timeout::Send] {
            rustix::net::sockopt::set_socket_timeout(&socket, timeout, Some(ANSWER_TIME_MAX))
                .map_err(|error| KeeperError::Gone(error.into()))?;
        }
        let mut link = Self { socket, pid: 0 };
        let hello = link.ask(Operation::Hello, "", None)?;
        match *hello.bytes {
            [_, VERSION, a, b, c, d] => link.pid = u32::from_le_bytes([a, b, c, d]),
            [_, theirs, ..] => return Err(KeeperError::Version { theirs, ours: VERSION }),
            _ => return Err(Refusal::Request.into()),
        }
        Ok(link)
    }

    fn get(&self, name: &str) -> Result<Option<OwnedFd>, KeeperError> {
        match self.ask(Operation::Get, name, None) {
            Ok(mut packet) => Ok(packet.fds.pop()),
            Err(KeeperError::Refused(Refusal::Unknown)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn hand_over(&self, memory: &PoolMemory) -> Result<(), KeeperError> {
        // At no moment is there a pool with another pool's ledger. (Were there one, it would be known by its header.)
        match self.ask(Operation::Remove, POOL, None) {
            Ok(_) | Err(KeeperError::Refused(Refusal::Unknown)) => {}
            Err(error) => return Err(error),
        }
        self.ask(Operation::Put, LEDGER, Some(&memory.ledger))?;
        self.ask(Operation::Put, POOL, Some(&memory.pool))?;
        Ok(())
    }

    fn hand_over_slab(&self, number: u64, files: &SlabFiles) -> Result<(), KeeperError> {
        for (granule, fd) in (0_u32..).zip(&files.granules) {
            self.ask(Operation::Put, &format!("{SLAB}{number}/{granule}"), Some(fd))?;
        }
        // Last: with it, the slab counts.
        self.ask(Operation::Put, &format!("{SLAB}{number}/{RECORD}"), Some(&files.record))?;
        Ok(())
    }

    /// Has it close what it has of a slab.
    fn forget(&self, number: u64) {
        let mut what = RECORD.to_owned();
        for granule in 0_u32.. {
            // Nothing under the name, or nobody to ask: then that is all.
            let removed = self.ask(Operation::Remove, &format!("{SLAB}{number}/{what}"), None);
            if removed.is_err() && granule > 0 {
                return;
            }
            what = granule.to_string();
        }
    }

    /// The first name behind the given one.
    fn next(&self, behind: &str) -> Result<Option<String>, KeeperError> {
        match self.ask(Operation::Next, behind, None) {
            Ok(packet) => Ok(String::from_utf8(packet.bytes[1..].to_vec()).ok()),
            // One of before it could list knows no slabs either.
            Err(KeeperError::Refused(Refusal::Unknown | Refusal::Request)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Has it end, and waits until it has.
    fn exit(&self) -> Result<(), KeeperError> {
        self.ask(Operation::Exit, "", None)?;
        while wire::receive(&self.socket, RecvFlags::empty()).map_err(KeeperError::Gone)?.is_some() {}
        Ok(())
    }

    fn ask(&self, operation: Operation, name: &str, fd: Option<&OwnedFd>) -> Result<Packet, KeeperError> {
        let fd = fd.map(AsFd::as_fd);
        wire::send(&self.socket, operation as u8, name.as_bytes(), fd, SendFlags::empty())
            .map_err(KeeperError::Gone)?;
        let packet = wire::receive(&self.socket, RecvFlags::empty()).map_err(KeeperError::Gone)?;
        let packet = packet.ok_or_else(|| KeeperError::Gone(io::ErrorKind::UnexpectedEof.into()))?;
        match packet.bytes.first() {
            Some(0) => Ok(packet),
            first => Err(Refusal::of(first.copied().unwrap_or(u8::MAX)).into()),
        }
    }
}
