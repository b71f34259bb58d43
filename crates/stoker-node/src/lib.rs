//! A server's agent: owns the store's orders, the workers and the instances.
//!
//! [`Node`] is a handle. Behind it: one task for each worker process (`worker`), which alone talks to the process,
//! holds what its instance holds, and notices its death; and the set of them (`fleet`), which keeps one ready for the
//! next model. A start brings the weights into the pool and takes a worker at the same time; then the worker maps the
//! chunks. Tokens don't pass here: they go from the worker's socket to the gateway.
//!
//! On a machine with devices an instance's weights go on to one of them (`devices`), and its worker maps that memory
//! instead. It belongs to the node: a worker that dies leaves the weights on the device.
//!
//! Programs of the same user may map models out of the pool, too ([`ClientSocket`]): their holds are like an instance's.
//!
//! Before each start the budgets are reconciled with what the machine has (`memory`), and under memory pressure some of
//! the cache is given back.
//!
//! The [`keeper`] is a process that outlives the node and has the pool's descriptors and those of devices' memory, so that the
//! next node finds in memory what this one had. Workers outlive it, too, and the next node goes on with them (`survivors`).
//!
//! Metrics: `stoker_node_budget_bytes{budget,kind}`, `stoker_node_available_bytes`, `stoker_node_bytes{tier}`,
//! `stoker_node_bytes_read_total{tier}`, `stoker_node_{workers,instances}`, `stoker_node_loads_total{outcome}`,
//! `stoker_node_load_seconds{phase}`, `stoker_node_keeper_restarts_total`, `stoker_node_workers_left_total{outcome}`, `stoker_node_device_bytes{device,kind}`,
//! `stoker_node_device_copied_bytes_total{device}`.

mod adopt;
mod clients;
mod config;
mod devices;
mod fleet;
pub mod keeper;
mod lodging;
mod memory;
mod node;
mod runtime;
mod spawn;
mod survivors;
mod worker;

pub use adopt::open_store;
pub use clients::ClientSocket;
pub use config::{Catalog, CatalogEntry, NodeConfig, NodeDevice, NodeError, Watchdog, WorkerConfig};
pub use devices::device_bytes_at_most;
pub use keeper::{Keeper, KeeperConfig, KeeperError};
pub use memory::{MemoryConfig, MemoryProbe, MemoryReading, PressureError, PressureTrigger, SystemMemory};
pub use node::Node;
pub use runtime::RuntimeDir;
