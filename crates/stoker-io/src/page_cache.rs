//! What the page cache holds of a file.

#![expect(unsafe_code, reason = "two system calls that no safe binding has: cachestat and mincore")]

use std::{fs::File, io, os::fd::AsRawFd};

use rustix::{
    fs::Advice,
    mm::{MapFlags, ProtFlags},
};

/// `cachestat`, Linux 6.5; the number is the same on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

/// Asked about in so many windows spread over the file, so that the answer costs the same for any file.
const WINDOWS: u64 = 64;
const WINDOW_BYTES: u64 = 1 << 20;

/// `struct cachestat_range` of the kernel's `mman.h`.
#[repr(C)]
struct CachestatRange {
    off: u64,
    len: u64,
}

/// `struct cachestat` of the kernel's `mman.h`: numbers of pages.
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// How much of a file the page cache holds, from samples, in percent. `None` when the system doesn't say: it tells
/// only those who may write the file.
pub(crate) fn percent_cached(file: &File, len: u64) -> Option<u8> {
    if len == 0 {
        return None;
    }
    let page = rustix::param::page_size() as u64;
    let step = (len / WINDOWS).max(WINDOW_BYTES);
    let windows: Vec<(u64, u64)> = (0..WINDOWS)
        .map(|i| i * step / page * page)
        .take_while(|at| *at < len)
        .map(|at| (at, (len - at).min(WINDOW_BYTES)))
        .collect();
    let asked: u64 = windows.iter().map(|(_, len)| len.div_ceil(page)).sum();
    let cached = cachestat(file, &windows).or_else(|| mincore(file, &windows))?;
    u8::try_from(cached.min(asked) * 100 / asked).ok()
}

/// Drops what the page cache holds of a file, as far as nobody maps it.
///
/// # Errors
/// The operating system's.
pub(crate) fn drop_file(file: &File) -> io::Result<()> {
    // What is dirty can't be dropped.
    rustix::fs::fdatasync(file)?;
    Ok(rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?)
}

/// Pages in the cache, of all windows.
fn cachestat(file: &File, windows: &[(u64, u64)]) -> Option<u64> {
    let mut pages = 0;
    for &(off, len) in windows {
        let range = CachestatRange { off, len };
        let mut stat = Cachestat::default();
        // SAFETY: the descriptor is open, and both structures have the kernel's layout and outlive the call.
        let result = unsafe {
            libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut stat, 0 as libc::c_uint)
        };
        if result != 0 {
            return None;
        }
        pages += stat.cached;
    }
    Some(pages)
}

/// The same for kernels without `cachestat`.
fn mincore(file: &File, windows: &[(u64, u64)]) -> Option<u64> {
    // mincore calls every page of somebody else's file present, so as to tell nothing.
    let meta = rustix::fs::fstat(file).ok()?;
    if meta.st_uid != rustix::process::geteuid().as_raw() {
        return None;
    }
    let page = rustix::param::page_size();
    let mut pages = 0;
    for &(off, len) in windows {
        let len = usize::try_from(len).ok()?;
        let mut present = vec![0_u8; len.div_ceil(page)];
        // SAFETY: a new mapping at an address that the kernel chooses, which is asked about, never read, and unmapped
        // again; `present` has a byte for every page of it.
        unsafe {
            let base =
                rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::PRIVATE, file, off)
                    .ok()?;
            let result = libc::mincore(base, len, present.as_mut_ptr());
            let _ = rustix::mm::munmap(base, len);
            if result != 0 {
                return None;
            }
        }
        pages += present.iter().filter(|p| **p & 1 == 1).count() as u64;
    }
    Some(pages)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;

    /// Beside the test's executable: on a real file system, where `/tmp` may be in memory.
    fn file(len: usize) -> File {
        let mut file = tempfile::tempfile_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        file.write_all(&vec![1; len]).unwrap();
        file
    }

    #[test]
    fn both_ways_agree() {
        let len = 3 << 20;
        let mut file = file(len);
        drop_file(&file).unwrap();
        assert_eq!(percent_cached(&file, len as u64), Some(0));
        file.rewind().unwrap();
        file.read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(percent_cached(&file, len as u64), Some(100));
        let windows = [(0, 1 << 20), (2 << 20, 1 << 20)];
        let pages = (2 << 20) / rustix::param::page_size() as u64;
        assert_eq!(mincore(&file, &windows), Some(pages));
        if let Some(found) = cachestat(&file, &windows) {
            assert_eq!(found, pages);
        }
    }

    #[test]
    fn an_empty_file_says_nothing() {
        assert_eq!(percent_cached(&file(0), 0), None);
    }
}
