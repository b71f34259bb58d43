//! The store against real files on a real disk.

#![expect(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod adopt;
mod cache;
mod common;
mod load;
mod pack;
mod soak;
mod stress;
mod tiers;
