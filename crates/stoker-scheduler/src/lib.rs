//! Pure policies: start estimates, placement, eviction, residency; state and time are arguments.
//!
//! Nothing here does I/O, reads a clock or draws a random number: the same arguments give the same answer, in the
//! server, in a test and in a simulation alike.
//!
//! - [`estimate`]: how long a start takes, fitted by every start that was measured.
//! - [`eviction`]: which chunk of the memory tier goes first.
//! - [`placement`]: on which server of a cluster a model starts soonest, and who makes room for it there.
//! - [`residency`]: which models are on the device, who starts, who makes room.
//! - [`sizing`]: how much KV cache an instance gets.

mod cover;
pub mod estimate;
pub mod eviction;
mod ewma;
pub mod placement;
pub mod residency;
pub mod sizing;

pub use ewma::Robust;
