//! One worker process: its start, or how it is gone on with; its sockets; its last words.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
};

use parking_lot::Mutex;
use rustix::{
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    pipe::PipeFlags,
};
use stoker_io::ForeignProcess;
use stoker_proto::{
    FrameReader,
    control::{HANDOVER_BYTE, Home, Resume, to_worker},
};
use stoker_types::WorkerId;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader},
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
    process::{Child, Command},
    task::JoinHandle,
};
use tracing::Level;

use crate::{
    WorkerConfig,
    survivors::{Sockets, Survivor},
};

/// Lines that are kept of what a worker prints.
const LINES_MAX: usize = 20;

/// Longest line that is kept or forwarded, bytes. The rest of it is dropped.
const LINE_BYTES_MAX: u64 = 8 << 10;

/// A worker process: started, or taken over.
pub(crate) struct Process {
    pub(crate) body: Body,
    pub(crate) reader: FrameReader<OwnedReadHalf>,
    pub(crate) writer: OwnedWriteHalf,
    pub(crate) sockets: Sockets,
    pub(crate) lines: LastLines,
    /// Ends when everything that the process printed has been read.
    pub(crate) forwarding: JoinHandle<()>,
    /// What it is to hear first.
    pub(crate) first: (to_worker::Kind, Vec<OwnedFd>),
}

/// How a process is waited for and ended.
pub(crate) enum Body {
    /// One that this process has started.
    Child(Child),
    /// One that a process started which is gone.
    Foreign(ForeignProcess),
}

/// A socket's file, removed on drop.
#[derive(Debug)]
pub(crate) struct SocketFile(PathBuf);

/// The last lines that a process printed. A cheap handle.
#[derive(Debug, Clone, Default)]
pub(crate) struct LastLines(Arc<Mutex<VecDeque<String>>>);

/// Starts a worker. Blocks for as long as the fork takes; needs a runtime's context.
pub(crate) fn spawn(
    worker: WorkerId,
    config: &WorkerConfig,
    sockets: &Path,
    pool: &OwnedFd,
    home: Home,
) -> io::Result<Process> {
    let WorkerConfig { command, env, .. } = config;
    let (program, args) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;

    let sockets = Sockets::of(sockets, worker);
    let listener = UnixListener::bind(sockets.streams.path())?;
    let successor = UnixListener::bind(sockets.successor.path())?;
    let (control, theirs) = UnixStream::pair()?;
    // It lies in the socket's buffer until the worker reads it.
    hand_over(&control, [pool.as_fd(), listener.as_fd(), successor.as_fd()])?;

    let mut child = Command::new(program)
        .args(args)
        .env_clear()
        .envs(env.iter().map(|(k, v)| (k, v)))
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // A terminal's Ctrl-C is for the node; it tells its workers.
        .process_group(0)
        .spawn()?;
    control.set_nonblocking(true)?;
    let lines = LastLines::default();
    let stderr = child.stderr.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let forwarding = tokio::spawn(forward(worker, stderr, lines.clone()));
    let (read, writer) = tokio::net::UnixStream::from_std(control)?.into_split();
    let first = (to_worker::Kind::Home(home), Vec::new());
    let (body, reader) = (Body::Child(child), FrameReader::new(read));
    Ok(Process { body, reader, writer, sockets, lines, forwarding, first })
}

/// Goes on with a worker that another node has started. Needs a runtime's context.
pub(crate) fn resume(survivor: Survivor) -> io::Result<Process> {
    let Survivor { worker, sockets, reader, writer, process, hello: _, serving: _ } = survivor;
    let (log, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&log, true)?;
    let log = tokio::net::unix::pipe::Receiver::from_owned_fd(log)?;
    let lines = LastLines::default();
    let forwarding = tokio::spawn(forward(worker, log, lines.clone()));
    let body = Body::Foreign(process);
    let first = (to_worker::Kind::Resume(Resume {}), vec![theirs]);
    Ok(Process { body, reader, writer, sockets, lines, forwarding, first })
}

/// How a process ended, for people.
pub(crate) fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(9)) => {
            "killed by signal 9 (SIGKILL: by hand, or by the kernel for want of memory)".into()
        }
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// Resident anonymous memory of a process: what is its own. (Its mappings of the pool are shared memory, and would
/// count as private in `smaps` as long as nobody else has touched them.)
pub(crate) fn private_bytes(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

fn hand_over(control: &UnixStream, fds: [BorrowedFd<'_>; 3]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)), "the space is made for three descriptors");
    sendmsg(control, &[IoSlice::new(&[HANDOVER_BYTE])], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Passes a worker's lines on to this process's log until it closes its standard error.
async fn forward(worker: WorkerId, stderr: impl AsyncRead + Unpin, lines: LastLines) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if !text.is_empty() {
            match level(text) {
                Level::ERROR => tracing::error!(target: "stoker_worker", %worker, "{text}"),
                Level::WARN => tracing::warn!(target: "stoker_worker", %worker, "{text}"),
                _ => tracing::info!(target: "stoker_worker", %worker, "{text}"),
            }
            lines.push(text.to_owned());
        }
    }
}

/// The level of a worker's log line, text or JSON: both say it near the beginning.
fn level(line: &str) -> Level {
    let begin = line.split_at_checked(64).map_or(line, |(begin, _)| begin);
    let says = |level: &str| {
        begin.starts_with(&format!("{level} "))
            || begin.contains(&format!(" {level} "))
            || begin.contains(&format!("\"{level}\""))
    };
    [Level::ERROR, Level::WARN].into_iter().find(|l| says(l.as_str())).unwrap_or(Level::INFO)
}

// === impl Body ===

impl Body {
    pub(crate) fn pid(&self) -> u32 {
        match self {
            Self::Child(child) => child.id().unwrap_or_default(),
            Self::Foreign(process) => process.pid(),
        }
    }

    /// Waits until it has ended; how, for people. Cancel-safe.
    pub(crate) async fn wait(&mut self) -> String {
        match self {
            Self::Child(child) => match child.wait().await {
                Ok(status) => describe(status),
                Err(error) => format!("waiting for it failed: {error}"),
            },
            Self::Foreign(process) => match process.ended().await {
                Ok(()) => "ended (how, only the node could know that started it)".to_owned(),
                Err(error) => format!("waiting for it failed: {error}"),
            },
        }
    }

    pub(crate) fn kill(&mut self) {
        // That it has died already is what is waited for.
        match self {
            Self::Child(child) => drop(child.start_kill()),
            Self::Foreign(process) => drop(process.kill()),
        }
    }
}

// === impl SocketFile ===

impl SocketFile {
    pub(crate) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody may have cleaned the directory.
        let _ = std::fs::remove_file(&self.0);
    }
}

// === impl LastLines ===

impl LastLines {
    fn push(&self, line: String) {
        let mut lines = self.0.lock();
        if lines.len() == LINES_MAX {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    pub(crate) fn get(&self) -> Vec<String> {
        self.0.lock().iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_memory_is_known() {
        assert!(private_bytes(std::process::id()).unwrap() > 0);
        assert_eq!(private_bytes(u32::MAX), None);
    }

    #[test]
    fn a_lines_level_is_kept() {
        for (line, is) in [
            ("2026-11-22T13:00:00.123456Z ERROR engine: panicked", Level::ERROR),
            ("2026-11-22T13:00:00.123456Z  WARN worker: gateway", Level::WARN),
            ("2026-11-22T13:00:00.123456Z  INFO worker: model loaded", Level::INFO),
            (r#"{"timestamp":"2026-11-22T13:00:00.1Z","level":"WARN","message":"x"}"#, Level::WARN),
            ("ERROR engine: panicked", Level::ERROR),
            (" WARN worker: gateway", Level::WARN),
            ("an ERRORLESS line", Level::INFO),
            ("\u{e4}", Level::INFO),
        ] {
            assert_eq!(level(line), is, "{line}");
        }
    }

    #[tokio::test]
    async fn only_the_last_lines_are_kept_and_long_ones_are_cut() {
        let mut text: String = (0..30).map(|i| format!("line {i}\n")).collect();
        text.push_str(&"x".repeat(3 * 8192));
        let lines = LastLines::default();
        forward(WorkerId(1), text.as_bytes(), lines.clone()).await;
        let lines = lines.get();
        assert_eq!(lines.len(), LINES_MAX);
        assert_eq!(lines[0], "line 13");
        assert!(lines.iter().all(|l| l.len() <= 8192));
    }
}
