//! Direct reads through `io_uring`: several blocks under way at once from one thread.
//!
//! Each reading thread has a ring of its own, so that nothing is handed from thread to thread, and several threads are
//! several rings. Buffers aren't registered with the rings: with huge pages behind them a read pins a page or two, which
//! costs nothing that could be measured, while a registration would keep memory that the pool gives back.

#![expect(unsafe_code, reason = "the kernel fills buffers while their addresses are in a queue")]

use std::{
    cell::RefCell,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    slice,
    sync::OnceLock,
};

use io_uring::{IoUring, Probe, opcode, types};

/// Blocks under way from one thread at most.
const DEPTH: u32 = 8;

thread_local! {
    static RING: RefCell<Option<IoUring>> = const { RefCell::new(None) };
}

/// A range of a file to be read into memory, in blocks.
pub(crate) struct BlockRead<'a> {
    pub(crate) file: BorrowedFd<'a>,
    pub(crate) offset: u64,
    /// Bytes of one request.
    pub(crate) block: usize,
    /// A read that ends at no multiple of it has come to the file's end.
    pub(crate) align: usize,
}

/// A block on its way.
struct Block {
    start: usize,
    len: usize,
    got: usize,
    ended: bool,
}

/// Requests whose buffers the kernel may still write to. None is left when this is dropped.
struct UnderWay<'a> {
    ring: &'a mut IoUring,
    requests: u32,
}

/// Why rings can't be used here, if they can't: tried once, by making one and asking it what it knows.
pub(crate) fn refusal() -> Option<&'static str> {
    static REFUSAL: OnceLock<Option<String>> = OnceLock::new();
    let probe = || -> io::Result<()> {
        let ring = IoUring::new(DEPTH)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if probe.is_supported(opcode::Read::CODE) {
            Ok(())
        } else {
            Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel's io_uring can't read"))
        }
    };
    REFUSAL.get_or_init(|| probe().err().map(|error| error.to_string())).as_deref()
}

impl BlockRead<'_> {
    /// Fills `buf`, and shows its bytes to `landed`, in order, while later ones are on their way. Returns how many there
    /// are; fewer than `buf` has only at the end of the file.
    ///
    /// # Errors
    /// The operating system's, with the place of the block that it is about. Nothing is under way afterwards.
    pub(crate) fn fill(
        &self,
        buf: &mut [u8],
        mut landed: impl FnMut(&[u8]),
    ) -> Result<usize, (usize, io::Error)> {
        RING.with_borrow_mut(|ring| {
            let ring = match ring {
                Some(ring) => ring,
                none => none.insert(IoUring::new(DEPTH).map_err(|error| (0, error))?),
            };
            self.fill_by(&mut UnderWay { ring, requests: 0 }, buf, &mut landed)
        })
    }

    fn fill_by(
        &self,
        under_way: &mut UnderWay<'_>,
        buf: &mut [u8],
        landed: &mut dyn FnMut(&[u8]),
    ) -> Result<usize, (usize, io::Error)> {
        let base = buf.as_mut_ptr();
        let step = self.block.max(1);
        let block = |start| Block { start, len: step.min(buf.len() - start), got: 0, ended: false };
        let mut blocks: Vec<Block> = (0..buf.len()).step_by(step).map(block).collect();
        let (mut next, mut shown) = (0, 0);
        while shown < blocks.len() {
            while next < blocks.len() && under_way.requests < DEPTH {
                self.request(under_way, base, &blocks[next], next)
                    .map_err(|error| (blocks[next].start, error))?;
                next += 1;
            }
            let (index, result) = under_way.wait().map_err(|error| (blocks[shown].start, error))?;
            let Some(block) = blocks.get_mut(index) else { continue };
            match result {
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(error) => return Err((block.start + block.got, error)),
                Ok(got) => {
                    block.got += got.min(block.len - block.got);
                    // The end of the file, or all of the block.
                    block.ended = got == 0 || block.got == block.len || !got.is_multiple_of(self.align);
                }
            }
            if !block.ended {
                self.request(under_way, base, block, index).map_err(|error| (block.start, error))?;
            }
            while let Some(block) = blocks.get(shown).filter(|block| block.ended) {
                // SAFETY: the block lies within `buf`, and nothing writes to it any more: its last request has ended.
                landed(unsafe { slice::from_raw_parts(base.add(block.start), block.got) });
                shown += 1;
                if block.got < block.len {
                    // Those behind it have nothing, and end when this value's requests are waited for.
                    return Ok(block.start + block.got);
                }
            }
        }
        Ok(buf.len())
    }

    fn request(
        &self,
        under_way: &mut UnderWay<'_>,
        base: *mut u8,
        block: &Block,
        index: usize,
    ) -> io::Result<()> {
        let len = u32::try_from(block.len - block.got).map_err(io::Error::other)?;
        let start = block.start + block.got;
        // SAFETY: within the buffer that `base` begins.
        let to = unsafe { base.add(start) };
        let read = opcode::Read::new(types::Fd(self.file.as_raw_fd()), to, len)
            .offset(self.offset + start as u64)
            .build()
            .user_data(index as u64);
        // SAFETY: the buffer and the descriptor live until the request has ended: `UnderWay` waits for it, whatever
        // happens, before whoever holds them goes on.
        unsafe { under_way.ring.submission().push(&read) }.map_err(io::Error::other)?;
        under_way.requests += 1;
        Ok(())
    }
}

// === impl UnderWay ===

impl UnderWay<'_> {
    /// Waits for the end of a request. Returns its number and the bytes that it read.
    fn wait(&mut self) -> io::Result<(usize, io::Result<usize>)> {
        loop {
            // What has ended already, before asking the kernel for more; but it must have been told of new ones.
            if self.ring.submission().is_empty()
                && let Some(ended) = self.ring.completion().next()
            {
                self.requests -= 1;
                let result = usize::try_from(ended.result())
                    .map_err(|_| io::Error::from_raw_os_error(ended.result().saturating_neg()));
                return Ok((usize::try_from(ended.user_data()).unwrap_or(usize::MAX), result));
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The completion queue is full: it is emptied above.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        while self.requests > 0 {
            if let Err(error) = self.wait() {
                // The kernel may still write to memory that is about to be somebody else's.
                tracing::error!(%error, "io_uring no longer answers while reads are under way");
                std::process::abort();
            }
        }
    }
}
