//! The node's budgets, reconciled with what the machine has.
//!
//! What was configured is an upper bound. Before each start the machine is asked what it has left; together with what
//! Stoker holds already, less a reserve for others, that is the room. When it is less than the two budgets together,
//! both shrink in proportion: cached chunks that nobody holds go, and their memory goes back to the operating system.
//! What instances have mapped is never touched.

mod pressure;
mod system;

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use stoker_store::Store;
use stoker_types::{ByteSize, MemoryBudget, MemoryHolder, NodeMemory};
use tokio::time::Instant;

use crate::{lodging::Instances, spawn};

pub(crate) use pressure::watch;
pub use pressure::{PressureError, PressureTrigger};
pub use system::SystemMemory;

/// What is left to others, where the machine has four times as much.
const RESERVE_MAX: ByteSize = ByteSize::gib(4);

/// Whom the machine's memory is with is sought at most this often.
const BLAMED_EVERY: Duration = Duration::from_millis(100);

/// One relief evicts a quarter of what may go, within these bounds.
const RELIEF_MIN: ByteSize = ByteSize::mib(64);
const RELIEF_MAX: ByteSize = ByteSize::gib(1);

/// What a machine has, and who has the rest of it.
pub trait MemoryProbe: Send + Sync + 'static {
    /// What there is now. Reads a few files; called where that may block.
    ///
    /// # Errors
    /// The operating system's. The budgets stay as they are then.
    fn read(&self) -> std::io::Result<MemoryReading>;

    /// The process with the most resident memory, apart from `ours`; within a control group, if that is what limits.
    /// Reads a file for every process; called where that may block.
    fn holder(&self, ours: &[u32], group: Option<&str>) -> Option<MemoryHolder>;
}

/// A machine's memory at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryReading {
    /// The machine's, or what the control group may have if that is less.
    pub total: ByteSize,
    /// What may be taken without swapping; in a control group at most what it has left.
    pub available: ByteSize,
    /// The control group that leaves less than the machine has.
    pub group: Option<String>,
}

/// How a node's budgets follow the machine.
pub struct MemoryConfig {
    /// Most KV cache. The most for weights is the store's budget.
    pub kv: ByteSize,
    /// Who is asked what the machine has.
    pub probe: Arc<dyn MemoryProbe>,
    /// What tells of memory pressure; without it, only starts look.
    pub pressure: Option<PressureTrigger>,
}

/// The budgets and what they follow from.
pub(crate) struct Memory {
    store: Store,
    instances: Instances,
    probe: Arc<dyn MemoryProbe>,
    state: Mutex<State>,
    /// One look at a time: an older reading must not overwrite a newer one.
    turn: tokio::sync::Mutex<()>,
}

struct State {
    memory: NodeMemory,
    group: Option<String>,
    blamed: Option<Instant>,
}

// === impl MemoryConfig ===

impl MemoryConfig {
    /// The machine that this process runs on, without a watch for pressure.
    #[must_use]
    pub fn new(kv: ByteSize) -> Self {
        Self { kv, probe: Arc::new(SystemMemory::default()), pressure: None }
    }
}

// === impl MemoryReading ===

impl MemoryReading {
    /// What is left to others: 4 GiB, or a quarter of a smaller machine.
    #[must_use]
    pub fn reserve(&self) -> ByteSize {
        RESERVE_MAX.min(ByteSize(self.total.bytes() / 4))
    }

    /// The budgets that this machine affords somebody who holds `held` of it already.
    #[must_use]
    pub fn budgets(&self, dram: ByteSize, kv: ByteSize, held: ByteSize, chunk: ByteSize) -> NodeMemory {
        let reserve = self.reserve();
        let room = ByteSize(self.available.bytes().saturating_add(held.bytes())).saturating_sub(reserve);
        let both = ByteSize(dram.bytes().saturating_add(kv.bytes()));
        let share = |configured: ByteSize| {
            if room >= both {
                return MemoryBudget::whole(configured);
            }
            let share = u128::from(configured.bytes()) * u128::from(room.bytes()) / u128::from(both.bytes());
            MemoryBudget { configured, effective: ByteSize(u64::try_from(share).unwrap_or(u64::MAX)) }
        };
        let mut dram = share(dram);
        if dram.is_short() {
            dram.effective.0 -= dram.effective.0 % chunk.bytes();
        }
        NodeMemory {
            dram,
            kv: share(kv),
            total: self.total,
            available: self.available,
            reserve,
            holder: None,
        }
    }
}

// === impl Memory ===

impl Memory {
    pub(crate) fn new(kv: ByteSize, probe: Arc<dyn MemoryProbe>, store: Store, instances: Instances) -> Self {
        let memory = NodeMemory::whole(store.stats().budget, kv);
        let state = Mutex::new(State { memory, group: None, blamed: None });
        Self { store, instances, probe, state, turn: tokio::sync::Mutex::default() }
    }

    /// The budgets, as of the last look.
    pub(crate) fn now(&self) -> NodeMemory {
        self.state.lock().memory.clone()
    }

    /// Looks at the machine and makes the budgets follow. Cancel-safe.
    pub(crate) async fn reconcile(&self) -> NodeMemory {
        let _turn = self.turn.lock().await;
        let (probe, instances) = (Arc::clone(&self.probe), self.instances.clone());
        let read = tokio::task::spawn_blocking(move || (probe.read(), touched(&instances))).await;
        let before = self.now();
        let (reading, touched, pool) = match (read, self.store.resident()) {
            (Ok((Ok(reading), touched)), Ok(pool)) => (reading, touched, pool),
            (Ok((Err(error), _)), _) | (_, Err(error)) => {
                tracing::debug!(%error, "what the machine has can't be read; the budgets stay");
                return before;
            }
            (Err(error), _) => {
                tracing::debug!(%error, "the look at the machine was cut short; the budgets stay");
                return before;
            }
        };
        let (dram, kv) = (before.dram.configured, before.kv.configured);
        let mut after = reading.budgets(dram, kv, pool + touched, ByteSize(self.store.chunk_bytes()));
        if after.is_short() {
            after.holder = before.holder.clone();
        }
        let effective = after.dram.effective;
        publish(&after);
        {
            let mut state = self.state.lock();
            state.memory = after.clone();
            state.group = reading.group;
            if !after.is_short() {
                state.blamed = None;
            }
        }
        if after.is_short() != before.is_short() {
            let (dram, kv) = (&after.dram, &after.kv);
            tracing::info!(%dram, %kv, available = %after.available, "the budgets follow the machine's memory");
        }
        // Also what was let go since the budget was lowered.
        if effective != before.dram.effective || (after.is_short() && pool > effective) {
            self.store.set_budget(effective).await;
        }
        after
    }

    /// Seeks who holds what is missing, if something is.
    pub(crate) async fn blame(&self, ours: Vec<u32>) {
        let group = {
            let state = self.state.lock();
            let fresh = state.blamed.is_some_and(|at| at.elapsed() < BLAMED_EVERY);
            if fresh || !state.memory.is_short() {
                return;
            }
            state.group.clone()
        };
        let probe = Arc::clone(&self.probe);
        let sought = tokio::task::spawn_blocking(move || probe.holder(&ours, group.as_deref())).await;
        let mut state = self.state.lock();
        state.memory.holder = sought.unwrap_or_default().filter(|_| state.memory.is_short());
        state.blamed = Some(Instant::now());
    }

    /// The machine is under memory pressure: gives some of the cache back. Returns whether the budgets have changed.
    pub(crate) async fn relieve(&self) -> bool {
        let before = self.now();
        let after = self.reconcile().await;
        let (available, total) = (after.available, after.total);
        let stats = self.store.stats();
        let evictable = stats.used.saturating_sub(stats.mapped);
        let relief = relief(&after, evictable);
        if relief > ByteSize::ZERO {
            let evicted = self.store.shed(relief).await;
            tracing::info!(%evicted, %evictable, %available, "memory pressure: cached weights were given back");
        } else {
            tracing::debug!(%evictable, %available, %total, "memory pressure, but nothing to give back");
        }
        (before.dram, before.kv) != (after.dram, after.kv)
    }
}

/// What to give back under pressure, of what may go. Nothing while half of the machine is free: then somebody meets a
/// limit of their own, and what we hold is of no use to them.
fn relief(memory: &NodeMemory, evictable: ByteSize) -> ByteSize {
    if memory.available.bytes() >= memory.total.bytes() / 2 {
        return ByteSize::ZERO;
    }
    ByteSize(evictable.bytes() / 4).clamp(RELIEF_MIN, RELIEF_MAX).min(evictable)
}

/// KV cache that instances have not only reserved: it is no longer among what the machine has available.
fn touched(instances: &Instances) -> ByteSize {
    let of = |(pid, kv_bytes): (Option<u32>, ByteSize)| {
        pid.and_then(spawn::private_bytes).map_or(ByteSize::ZERO, |private| ByteSize(private).min(kv_bytes))
    };
    instances.kv_caches().into_iter().map(of).sum()
}

fn publish(memory: &NodeMemory) {
    let gauge = |budget: &'static str, kind: &'static str, bytes: ByteSize| {
        #[expect(clippy::cast_precision_loss, reason = "a metric")]
        metrics::gauge!("stoker_node_budget_bytes", "budget" => budget, "kind" => kind)
            .set(bytes.bytes() as f64);
    };
    for (name, budget) in [("dram", memory.dram), ("kv", memory.kv)] {
        gauge(name, "configured", budget.configured);
        gauge(name, "effective", budget.effective);
    }
    #[expect(clippy::cast_precision_loss, reason = "a metric")]
    metrics::gauge!("stoker_node_available_bytes").set(memory.available.bytes() as f64);
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: ByteSize = ByteSize::mib(16);

    fn budgets(total: u64, available: u64, held: u64) -> (ByteSize, ByteSize) {
        let reading =
            MemoryReading { total: ByteSize::mib(total), available: ByteSize::mib(available), group: None };
        let memory = reading.budgets(ByteSize::gib(8), ByteSize::gib(4), ByteSize::mib(held), CHUNK);
        (memory.dram.effective, memory.kv.effective)
    }

    #[test]
    fn budgets_shrink_in_proportion_and_leave_the_reserve() {
        let whole = (ByteSize::gib(8), ByteSize::gib(4));
        assert_eq!(budgets(65_536, 32_768, 0), whole, "never more than configured");
        assert_eq!(budgets(65_536, 16_384, 0), whole, "exactly enough");
        assert_eq!(budgets(65_536, 10_240, 0), (ByteSize::gib(4), ByteSize::gib(2)));
        assert_eq!(budgets(65_536, 4096, 12_288), whole, "what is held already is room too");
        assert_eq!(budgets(65_536, 4096, 0), (ByteSize::ZERO, ByteSize::ZERO));
        assert_eq!(budgets(65_536, 0, 1024), (ByteSize::ZERO, ByteSize::ZERO));
        assert_eq!(budgets(4096, 3072, 1024), (ByteSize::gib(2), ByteSize::gib(1)), "a quarter of 4 GiB");
    }

    #[test]
    fn relief_is_bounded_and_only_where_memory_is_short() {
        let of = |available, evictable| {
            let memory = NodeMemory {
                total: ByteSize::gib(16),
                available: ByteSize::gib(available),
                ..NodeMemory::default()
            };
            relief(&memory, ByteSize::mib(evictable))
        };
        assert_eq!(of(8, 4096), ByteSize::ZERO, "half is free");
        assert_eq!(of(7, 2048), ByteSize::mib(512));
        assert_eq!(of(7, 100), RELIEF_MIN);
        assert_eq!(of(7, 32), ByteSize::mib(32), "all that there is");
        assert_eq!(of(0, 1 << 20), RELIEF_MAX);
    }

    #[test]
    fn whatever_the_machine_has_the_reserve_stays() {
        proptest::proptest!(|(total in 0_u64..1 << 40, available in 0_u64..1 << 40, held in 0_u64..1 << 40,
                              dram in 0_u64..1 << 40, kv in 1_u64..1 << 40)| {
            let reading =
                MemoryReading { total: ByteSize(total), available: ByteSize(available.min(total)), group: None };
            let memory = reading.budgets(ByteSize(dram), ByteSize(kv), ByteSize(held), CHUNK);
            let both = memory.dram.effective + memory.kv.effective;
            let room = (reading.available + ByteSize(held)).saturating_sub(reading.reserve());
            assert!(both <= room, "{memory:?}");
            assert!(memory.dram.effective <= ByteSize(dram) && memory.kv.effective <= ByteSize(kv));
            if memory.is_short() {
                let slack = CHUNK.bytes() + 2;
                assert!(both.bytes() + slack >= room.bytes().min(dram + kv), "{memory:?} of {room}");
            }
        });
    }
}
