//! Checkpoints from outside: files on disk in, manifests and errors out.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "what these functions unwrap and print is a test's"
)]

mod common;
mod convert;
mod index;
mod malformed;
mod refusals;
