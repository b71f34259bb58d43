//! Checkpoints from outside: files on disk in, manifests and errors out.

mod common;
mod convert;
mod index;
mod malformed;
mod refusals;
