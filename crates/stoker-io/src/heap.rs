//! The heap's allocator, and giving freed memory back to the operating system.

#![expect(unsafe_code, reason = "calls the allocator")]

/// The allocator that a binary sets as its global one, so that [`trim_heap`] is about its heap.
pub use mimalloc::MiMalloc as Allocator;

/// Gives what the calling thread freed back to the operating system, as far as it can be: an allocator keeps freed blocks
/// for reuse, also large ones, for a while. Does nothing in a binary whose global allocator isn't [`Allocator`].
pub fn trim_heap() {
    // SAFETY: may be called at any time and from any thread; it touches free memory only.
    unsafe { libmimalloc_sys::mi_collect(true) }
}

#[cfg(test)]
mod tests {
    use std::alloc::{GlobalAlloc as _, Layout};

    use super::*;

    #[test]
    fn freed_memory_goes_back_to_the_system() {
        let resident = || -> usize {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * rustix::param::page_size()
        };
        let layout = Layout::from_size_align(64 << 10, 16).unwrap();
        let before = resident();
        // SAFETY: blocks of this layout, each written to within its bounds and freed once.
        let blocks: Vec<_> = (0..1024).map(|_| unsafe { Allocator.alloc(layout) }).collect();
        for block in &blocks {
            // SAFETY: as above.
            unsafe { block.write_bytes(1, layout.size()) };
        }
        assert!(resident() > before + (48 << 20));
        for block in blocks {
            // SAFETY: as above.
            unsafe { Allocator.dealloc(block, layout) };
        }
        trim_heap();
        assert!(resident() < before + (16 << 20), "{before} bytes, then {}", resident());
    }
}
