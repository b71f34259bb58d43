//! Who still has a pool mapped whose node was killed.
//!
//! Workers that are taken over say what they have mapped, and let go of their claim. Others should end by themselves. Whether anybody is left is the
//! kernel's word ([`PoolMemory::is_in_use`]); who it is, `/proc` says.

use std::{
    ffi::OsString,
    fs, io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt, unix::fs::MetadataExt},
    path::Path,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal},
};
use stoker_io::PoolMemory;
use stoker_types::clock;

/// What a killed process may take to be gone.
const KILLED_WITHIN: Duration = Duration::from_secs(5);

/// How often the kernel is asked while nobody is seen who could tell of its end.
const ASKED_EVERY: Duration = Duration::from_millis(20);

/// How the memory's descriptors look in `/proc`.
const LINK: &str = "/memfd:stoker-pool";

/// A process that has the memory.
struct Holder {
    pid: u32,
    name: String,
    is_worker: bool,
    /// Readable when the process has ended. Opened before the process was looked at, so it is that one and no other.
    pidfd: OwnedFd,
}

/// Waits until nobody has the memory mapped. Workers that take longer than `grace` are killed: nothing can adopt them,
/// and what they compute nobody reads. `apart`: who doesn't count. Returns whether it is free. Blocks.
pub(super) fn wait(
    memory: &PoolMemory,
    worker: &[OsString],
    apart: &[u32],
    grace: Duration,
) -> io::Result<bool> {
    let began = clock::now();
    let mut killed = false;
    while memory.is_in_use()? {
        let holders = find(&memory.pool, worker, apart)?;
        let waited = began.elapsed();
        if waited >= grace && !killed {
            for holder in holders.iter().filter(|holder| holder.is_worker) {
                let Holder { pid, name, .. } = holder;
                tracing::warn!(pid, name, "a worker of the node before did not end; killing it");
                // That it has ended already is what we wait for.
                let _ = rustix::process::pidfd_send_signal(&holder.pidfd, Signal::KILL);
            }
            killed = true;
        }
        if waited >= grace + KILLED_WITHIN {
            let who: Vec<_> = holders.iter().map(|h| format!("{} (pid {})", h.name, h.pid)).collect();
            tracing::warn!(?who, "the memory that the node before left is in use by others");
            return Ok(false);
        }
        let until = if waited < grace { grace - waited } else { grace + KILLED_WITHIN - waited };
        let timeout = until.min(ASKED_EVERY);
        let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(timeout.subsec_nanos()) };
        let mut polled: Vec<PollFd<'_>> =
            holders.iter().map(|holder| PollFd::new(&holder.pidfd, PollFlags::IN)).collect();
        match poll(&mut polled, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

/// Processes of this user that have the memory, open or mapped, apart from this one and those named.
fn find(pool: &OwnedFd, worker: &[OsString], apart: &[u32]) -> io::Result<Vec<Holder>> {
    let stat = rustix::fs::fstat(pool)?;
    let is_it = |meta: &fs::Metadata| (meta.dev(), meta.ino()) == (stat.st_dev, stat.st_ino);
    let pids = fs::read_dir("/proc")?.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let others = pids.filter(|pid| *pid != std::process::id() && !apart.contains(pid));
    Ok(others
        .filter_map(|pid| {
            let raw = Pid::from_raw(i32::try_from(pid).ok()?)?;
            let pidfd = rustix::process::pidfd_open(raw, PidfdFlags::empty()).ok()?;
            let dir = Path::new("/proc").join(pid.to_string());
            let open = fs::read_dir(dir.join("fd")).ok()?.flatten().any(|fd| {
                let named = fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with(LINK));
                named && fs::metadata(fd.path()).is_ok_and(|meta| is_it(&meta))
            });
            let has = open || maps(&dir.join("maps"), stat.st_ino);
            let command = fs::read(dir.join("cmdline")).unwrap_or_default();
            let name = fs::read_to_string(dir.join("comm")).unwrap_or_default().trim().to_owned();
            has.then(|| Holder { pid, name, is_worker: is_worker(&command, worker), pidfd })
        })
        .collect())
}

/// Whether a process has the pool with this inode mapped.
fn maps(path: &Path, inode: u64) -> bool {
    let Ok(text) = fs::read_to_string(path) else { return false };
    // proc(5): address, permissions, offset, device, inode, path.
    text.lines().any(|line| {
        let mut fields = line.split_ascii_whitespace().skip(4);
        fields.next().and_then(|field| field.parse().ok()) == Some(inode)
            && fields.next().is_some_and(|path| path.starts_with(LINK))
    })
}

/// Whether a command line is a worker's: the same program by name, told to do the same. Its path and its other arguments
/// may be those of another version or configuration.
fn is_worker(command: &[u8], worker: &[OsString]) -> bool {
    let mut found = command.split(|byte| *byte == 0);
    let [program, what, ..] = worker else { return false };
    let file_name = |path: &[u8]| path.rsplit(|byte| *byte == b'/').next().map(<[u8]>::to_vec);
    let same_program = found.next().map(file_name) == Some(file_name(program.as_bytes()));
    same_program && found.next() == Some(what.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use stoker_io::ChunkPool;
    use stoker_types::ByteSize;

    use super::*;

    /// `sleep`, with the pool as its input: told to sleep for ever, as a worker that hangs.
    fn holder(pool: &ChunkPool) -> std::process::Child {
        let fd = pool.read_only_fd().unwrap();
        Command::new("sleep").arg("600").stdin(Stdio::from(fd)).spawn().unwrap()
    }

    #[test]
    fn workers_that_hang_are_killed_and_others_are_not() {
        let pool = ChunkPool::new(ByteSize::mib(1), ByteSize::kib(64)).unwrap();
        let memory = pool.memory().unwrap().unwrap();
        let worker: Vec<OsString> = ["/usr/bin/sleep".into(), "600".into()].into();
        assert!(wait(&memory, &worker, &[], Duration::ZERO).unwrap(), "nobody has it");

        let mut child = holder(&pool);
        let found = find(&memory.pool, &worker, &[]).unwrap();
        assert_eq!(found.iter().map(|h| (h.pid, h.is_worker)).collect::<Vec<_>>(), [(child.id(), true)]);
        assert!(find(&memory.pool, &worker, &[child.id()]).unwrap().is_empty(), "who is named doesn't count");
        // It ends by itself.
        let pid = child.id();
        let ending = std::thread::spawn(move || {
            child.kill().unwrap();
            child.wait().unwrap()
        });
        assert!(wait(&memory, &worker, &[], Duration::from_secs(60)).unwrap());
        ending.join().unwrap();
        assert!(!Path::new(&format!("/proc/{pid}")).exists());

        // It doesn't.
        let mut child = holder(&pool);
        assert!(wait(&memory, &worker, &[], Duration::ZERO).unwrap());
        assert!(!child.wait().unwrap().success(), "killed");

        // Not a worker: nobody's to kill.
        let mut child = holder(&pool);
        let other: Vec<OsString> = ["/usr/bin/sleep".into(), "700".into()].into();
        assert!(!wait(&memory, &other, &[], Duration::ZERO).unwrap());
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn command_lines() {
        let worker: Vec<OsString> = ["/opt/stoker".into(), "worker".into(), "--threads".into()].into();
        assert!(is_worker(b"/opt/stoker\0worker\0--threads\x002\0", &worker));
        assert!(is_worker(b"stoker\0worker\0", &worker));
        assert!(!is_worker(b"/opt/stoker\0keeper\0", &worker));
        assert!(!is_worker(b"/opt/other\0worker\0", &worker));
        assert!(!is_worker(b"", &worker));
        assert!(!is_worker(b"x\0", &[]));
    }
}
