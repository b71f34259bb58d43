//! What a node may use of its machine's memory, and who else uses it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{ByteSize, BytesPerSec, ModelName};

/// An upper bound that somebody set, and what is in force while the machine has less.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MemoryBudget {
    /// What was set, by the operator or by default. Never exceeded.
    pub configured: ByteSize,
    /// What may be used now.
    pub effective: ByteSize,
}

/// A process that holds memory and is not of this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryHolder {
    /// Its process id.
    pub pid: u32,
    /// Its name, as the operating system has it.
    pub name: String,
    /// Its resident memory.
    pub bytes: ByteSize,
}

/// A node's memory, as of its last look at the machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodeMemory {
    /// For weights, in whole chunks.
    pub dram: MemoryBudget,
    /// For KV caches.
    pub kv: MemoryBudget,
    /// What the machine has, or what the node's control group may have if that is less; zero before the first look.
    pub total: ByteSize,
    /// What was left of that for new memory.
    pub available: ByteSize,
    /// What of that is left to others in any case.
    pub reserve: ByteSize,
    /// Who holds the most of what is missing; only sought while something is.
    pub holder: Option<MemoryHolder>,
}

/// The memory of one of a node's devices, as of the last look at it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceMemoryState {
    /// Its name: `cuda:0`.
    pub name: String,
    /// For instances: their weights, KV caches and work memory together.
    pub budget: MemoryBudget,
    /// What one instance takes beside weights and KV cache.
    pub work: ByteSize,
    /// All that it has.
    pub total: ByteSize,
    /// What the driver says is free.
    pub free: ByteSize,
    /// Weights on it.
    pub weights: ByteSize,
    /// Of those, what no instance uses: it goes when its room is needed.
    pub cached: ByteSize,
    /// Models whose weights are on it, whole.
    pub resident: Vec<ModelName>,
    /// Measured rate of copies to it; `None` before the first.
    pub rate: Option<BytesPerSec>,
    /// What prewarmed workers, other programs and the reserve leave less of than there is; only sought while something is
    /// missing. Those that are not of this node, the largest first.
    pub holders: Vec<MemoryHolder>,
}

// === impl MemoryBudget ===

impl MemoryBudget {
    /// A budget that the machine can afford.
    #[must_use]
    pub const fn whole(configured: ByteSize) -> Self {
        Self { configured, effective: configured }
    }

    /// Whether the machine has less than what was configured.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.effective < self.configured
    }
}

impl fmt::Display for MemoryBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_short() {
            write!(f, "{} ({} configured)", self.effective, self.configured)
        } else {
            write!(f, "{}", self.effective)
        }
    }
}

// === impl MemoryHolder ===

impl fmt::Display for MemoryHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} held by pid {} {} (not Stoker)", self.bytes, self.pid, self.name)
    }
}

// === impl DeviceMemoryState ===

impl DeviceMemoryState {
    /// Why there is less than was configured, and who has it; `None` when there isn't.
    #[must_use]
    pub fn shortage(&self) -> Option<String> {
        self.budget.is_short().then(|| {
            let Self { name, budget, free, total, holders, .. } = self;
            let held = match &holders[..] {
                [] => "; who holds the rest can't be seen from here".to_owned(),
                holders => holders.iter().take(3).map(|holder| format!("; {holder}")).collect(),
            };
            format!("{name} has {free} free of {total}: instances may take {budget}{held}")
        })
    }
}

// === impl NodeMemory ===

impl NodeMemory {
    /// Budgets that the machine can afford.
    #[must_use]
    pub fn whole(dram: ByteSize, kv: ByteSize) -> Self {
        Self { dram: MemoryBudget::whole(dram), kv: MemoryBudget::whole(kv), ..Self::default() }
    }

    /// Whether the machine has less than what was configured.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.dram.is_short() || self.kv.is_short()
    }

    /// Why the budgets are below what was configured, and what would help; `None` when they are not.
    #[must_use]
    pub fn shortage(&self) -> Option<String> {
        self.is_short().then(|| {
            let Self { dram, kv, total: _, available, reserve, holder } = self;
            let held = holder.as_ref().map(|holder| format!("; {holder}")).unwrap_or_default();
            format!(
                "the machine has {available} available, of which {reserve} stay free: weights may take {dram}, KV caches \
                 {kv}{held}"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_is_told_with_its_numbers() {
        let mut memory = NodeMemory::whole(ByteSize::gib(8), ByteSize::gib(2));
        assert_eq!(memory.shortage(), None);
        memory.dram.effective = ByteSize::gib(1);
        memory.available = ByteSize::gib(5);
        memory.reserve = ByteSize::gib(4);
        memory.holder =
            Some(MemoryHolder { pid: 4312, name: "python".into(), bytes: ByteSize::mib(9 * 1024 + 820) });
        assert_eq!(
            memory.shortage().unwrap(),
            "the machine has 5.0 GiB available, of which 4.0 GiB stay free: weights may take 1.0 GiB (8.0 GiB configured), \
             KV caches 2.0 GiB; 9.8 GiB held by pid 4312 python (not Stoker)"
        );
    }
}
