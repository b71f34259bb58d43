//! What gateway, node and worker say to each other, and how it is framed.
//!
//! Three conversations, all of frames (`u32` little-endian length, then one protobuf message):
//!
//! * [`control`]: the node and one worker, over a socket pair that the worker inherits.
//! * [`stream`]: a gateway and a worker, over the worker's Unix socket. One connection carries all streams between the
//!   two; a worker's step sends one frame whatever the number of streams, so the cost of a token is not a system call.
//! * [`share`]: a program that wants a model's bytes and the node that has them in memory.
//!
//! Messages are protobuf so that fields can be added between versions; the types are written in Rust (`prost` derive)
//! and need no compiler.

pub mod control;
mod descriptors;
mod frame;
pub mod share;
pub mod stream;

pub use descriptors::{DESCRIPTORS_MAX, DescriptorReader, send_with_descriptors};
pub use frame::{FRAME_BYTES_MAX, FrameError, FrameReader, FrameWriter, encode_frame};

/// Version of the conversations, said in the first message. A peer with another major number is refused.
pub const PROTOCOL_VERSION: u32 = 1;
