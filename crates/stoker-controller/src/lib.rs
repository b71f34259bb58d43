//! Decides which models are resident where: demand, residency policy loop, instances.
//!
//! One owner task carries out what [`stoker_scheduler::residency::decide`] says, through a [`NodeApi`]. Everybody
//! else has a cheap [`ControllerHandle`]: [`ControllerHandle::admit`] waits for a [`Seat`], whose drop gives the seat
//! back. A request that finds a seat takes it under one short lock, without waking anybody; a request that finds no
//! instance wakes the owner, which orders the start at once. Nothing polls: the owner sleeps until something happens
//! or until the time that the policy named.
//!
//! Invariants, asserted where they are relied on:
//! - a seat is given back exactly once, by its drop, wherever that happens;
//! - an instance with a seat taken, or one that is starting, is never told to stop by the policy;
//! - every [`ControllerHandle::admit`] ends exactly once: with a seat, a refusal, or by being dropped.

mod admin;
mod admit;
mod config;
mod owner;
mod report;
mod seams;
mod state;
mod telemetry;

pub use admin::UnloadError;
pub use admit::{ControllerHandle, Permit, Seat};
pub use config::{Config, DeviceConfig, ServerConfig};
pub use owner::{ServerKey, spawn};
pub use report::{DecisionRecord, DeviceUse, Event, Explanation, InstanceStatus, Status};
pub use seams::{Facts, NodeApi};
pub use stoker_scheduler::{
    estimate::Priors,
    residency::{Budgets, InstanceState, Rules},
    sizing::{Sizing, SizingRules},
};
