//! One worker process: its start, its socket, its last words.

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
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use stoker_proto::control::HANDOVER_BYTE;
use stoker_types::WorkerId;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader},
    process::{Child, Command},
    task::JoinHandle,
};
use tracing::Level;

use crate::WorkerConfig;

/// Lines that are kept of what a worker prints.
const LINES_MAX: usize = 20;

/// Longest line that is kept or forwarded, bytes. The rest of it is dropped.
const LINE_BYTES_MAX: u64 = 8 << 10;

/// A worker process that has been started.
pub(crate) struct Process {
    pub(crate) child: Child,
    pub(crate) control: UnixStream,
    pub(crate) socket: SocketFile,
    pub(crate) lines: LastLines,
    /// Ends when everything that the process printed has been read.
    pub(crate) forwarding: JoinHandle<()>,
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
) -> io::Result<Process> {
    let WorkerConfig { command, env, .. } = config;
    let (program, args) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;

    let socket = SocketFile(sockets.join(format!("{worker}.sock")));
    let listener = UnixListener::bind(&socket.0)?;
    let (control, theirs) = UnixStream::pair()?;
    // It lies in the socket's buffer until the worker reads it.
    hand_over(&control, pool.as_fd(), listener.as_fd())?;

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
    Ok(Process { child, control, socket, lines, forwarding })
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

fn hand_over(control: &UnixStream, pool: BorrowedFd<'_>, listener: BorrowedFd<'_>) -> io::Result<()> {
    let fds = [pool, listener];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)), "the space is made for two descriptors");
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

// === impl SocketFile ===

impl SocketFile {
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
