//! Aligned and shared buffers, chunk pool memory and file readers; owns I/O unsafe
