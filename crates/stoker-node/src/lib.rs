//! A server's agent: owns the store's orders, the workers and the instances.
//!
//! [`Node`] is a handle. Behind it: one task for each worker process (`worker`), which alone talks to the process,
//! holds what its instance holds, and notices its death; and the set of them (`fleet`), which keeps one ready for the
//! next model. A start brings the weights into the pool and takes a worker at the same time; then the worker maps the
//! chunks. Tokens don't pass here: they go from the worker's socket to the gateway.

mod config;
mod fleet;
mod lodging;
mod node;
mod spawn;
mod worker;

pub use config::{Catalog, CatalogEntry, NodeConfig, NodeError, Watchdog, WorkerConfig};
pub use node::Node;
