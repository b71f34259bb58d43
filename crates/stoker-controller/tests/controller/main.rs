//! The controller over a fake node, on paused time.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;
mod memory;
mod seats;
mod servers;
mod soak;
