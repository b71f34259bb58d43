//! A slice that several threads write, each its own part.

use std::marker::PhantomData;

/// A mutable slice whose parts are handed out without the compiler's check that they don't overlap.
pub(super) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: a `&mut [T]` could be split and its parts sent to threads; `part`'s contract is that the parts are disjoint.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The `len` elements at `at`.
    ///
    /// # Safety
    /// No two parts that are alive at the same time may overlap.
    ///
    /// # Panics
    /// When they lie outside of the slice.
    #[expect(clippy::mut_from_ref, reason = "that is its purpose; the contract forbids overlap")]
    pub(super) unsafe fn part(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at <= self.len && len <= self.len - at, "a part outside of the slice");
        // SAFETY: in bounds (checked above), of a slice borrowed mutably for 'a; the caller keeps parts disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}
