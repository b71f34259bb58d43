//! Locks of byte ranges that belong to an open file (`F_OFD_SETLK`, fcntl(2)): the kernel drops them with the file's last
//! descriptor and last mapping, in whatever process.

#![expect(unsafe_code, reason = "an fcntl that rustix doesn't have")]

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd},
};

/// Puts a lock on a range that others may have, too.
pub(crate) fn share(file: impl AsFd, bytes: Range<u64>) -> io::Result<()> {
    let mut lock = lock(libc::F_RDLCK, bytes)?;
    call(file, libc::F_OFD_SETLK, &mut lock)
}

/// Calls `found` with every range of the first `len` bytes that another open file has a lock on. Ranges may come in any
/// order.
pub(crate) fn each(file: impl AsFd, len: u64, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
    let file = file.as_fd();
    let mut left = Vec::new();
    left.push(0..len);
    while let Some(range) = left.pop() {
        if range.is_empty() {
            continue;
        }
        // What would be in an exclusive lock's way?
        let mut asked = lock(libc::F_WRLCK, range.clone())?;
        call(file, libc::F_OFD_GETLK, &mut asked)?;
        if i32::from(asked.l_type) == libc::F_UNLCK {
            continue;
        }
        let start = u64::try_from(asked.l_start).unwrap_or(0).clamp(range.start, range.end);
        let end = match u64::try_from(asked.l_len).unwrap_or(0) {
            // To the end of the file, wherever that is.
            0 => range.end,
            len => start_of(&asked).saturating_add(len).clamp(start, range.end),
        };
        if start == end {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a lock outside of what was asked for"));
        }
        found(start..end);
        left.push(range.start..start);
        left.push(end..range.end);
    }
    Ok(())
}

fn start_of(lock: &libc::flock) -> u64 {
    u64::try_from(lock.l_start).unwrap_or(0)
}

fn lock(kind: libc::c_int, bytes: Range<u64>) -> io::Result<libc::flock> {
    let number = |n: u64| libc::off_t::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let short =
        |n: libc::c_int| libc::c_short::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    Ok(libc::flock {
        l_type: short(kind)?,
        l_whence: short(libc::SEEK_SET)?,
        l_start: number(bytes.start)?,
        l_len: number(bytes.end - bytes.start)?,
        // It must be zero for these locks.
        l_pid: 0,
    })
}

fn call(file: impl AsFd, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open; the command reads and writes one `flock`, which lives.
    let done = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
