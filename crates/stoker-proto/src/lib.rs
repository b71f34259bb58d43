//! What gateway, node and worker say to each other, and how it is framed.
//!
//! Two conversations, both of frames (`u32` little-endian length, then one protobuf message):
//!
//! * [`control`]: the node and one worker, over a socket pair that the worker inherits.
//! * [`stream`]: a gateway and a worker, over the worker's Unix socket. One connection carries all streams between the
//!   two; a worker's step sends one frame whatever the number of streams, so the cost of a token is not a system call.
//!
//! Messages are protobuf so that fields can be added between versions; the types are written in Rust (`prost` derive)
//! and need no compiler.

pub mod control;
mod frame;
pub mod stream;

pub use frame::{FRAME_BYTES_MAX, FrameError, FrameReader, FrameWriter, encode_frame};

/// Version of both conversations, said in the first message. A peer with another major number is refused.
pub const PROTOCOL_VERSION: u32 = 1;
