//! A server's agent: owns the store's orders, the workers and the instances.
//!
//! [`Node`] is a handle. Behind it: one task for each worker process (`worker`), which alone talks to the process,
//! holds what its instance holds, and notices its death; and the set of them (`fleet`), which keeps one ready for the
//! next model. A start brings the weights into the pool and takes a worker at the same time; then the worker maps the
//! chunks. Tokens don't pass here: they go from the worker's socket to the gateway.
//!
//! Before each start the budgets are reconciled with what the machine has (`memory`), and under memory pressure some of
//! the cache is given back.
//!
//! Metrics: `stoker_node_budget_bytes{budget,kind}`, `stoker_node_available_bytes`, `stoker_node_bytes{tier}`,
//! `stoker_node_bytes_read_total{tier}`, `stoker_node_{workers,instances}`, `stoker_node_loads_total{outcome}`,
//! `stoker_node_load_seconds{phase}`.

mod config;
mod fleet;
mod lodging;
mod memory;
mod node;
mod spawn;
mod worker;

pub use config::{Catalog, CatalogEntry, NodeConfig, NodeError, Watchdog, WorkerConfig};
pub use memory::{MemoryConfig, MemoryProbe, MemoryReading, PressureError, PressureTrigger, SystemMemory};
pub use node::Node;
