//! The OpenAI API: validation, admission, token ledger, streaming.
//!
//! A request is read and checked ([`config`] has the limits), its prompt rendered and tokenised, a seat taken from the
//! [`Placement`], and its sequences started at the [`Backend`], which is the [`WorkerPool`]: one connection to each
//! worker, shared by all streams. Token ids come back, become text here, and go to the client from the task that owns
//! its connection. When anything is dropped on the way, sequences are aborted and the seat is given back.
//!
//! | header | direction | meaning |
//! |---|---|---|
//! | [`REQUEST_ID`] | response | the request's id, also in the answer and in a stream's `id:` lines |
//! | [`SEED`] | response | the seed in use |
//! | [`QUEUED_MS`] | response | time spent waiting for a seat |
//! | [`TIMELINE`] | both | phases of the start and of the first token, as JSON; asked for by streams |
//! | [`DEADLINE_MS`] | request | lowers the longest wait for a start |
//! | [`ETA_MS`] | response | beside `Retry-After`, the estimate itself |
//!
//! A request is a `tracing` span (`request`, at `debug`) whose phases are events in it; [`Traces`] collects whole requests.
//! `traceparent` and `tracestate` of the client go there too.
//!
//! Invariants: prompts and answers are never logged · every wait has a bound · a stream that failed ends with an error
//! event, never silently · [`errors`] is the only place where failures become HTTP.

mod backend;
pub mod config;
pub mod errors;
mod generation;
mod guard;
mod openai;
mod request;
mod routes;
mod seams;
mod server;
mod stream;
mod telemetry;
mod text;
mod timeline;
mod trace;

pub use backend::{
    Backend, Inbox, Outlet, Overrun, Running, SequenceOrder, StreamEvent, StreamFailure, TokenLogprobs,
    WorkerPool,
};
pub use config::{ApiKey, GatewayConfig};
pub use errors::{ApiError, ETA_MS};
pub use routes::{DEADLINE_MS, REQUEST_ID, SEED};
pub use seams::{ModelCard, ModelLookupError, Models, Placement, Seat, SeatHold, ServedModel, Status};
pub use server::{GatewayDeps, Shutdown, serve};
pub use text::TextSource;
pub use timeline::{QUEUED_MS, TIMELINE};
pub use trace::{NoTraces, ParentSpan, RequestTrace, Traces};
