//! What of this machine's memory Stoker takes unless it is told.

use stoker_node::{MemoryProbe as _, SystemMemory};
use stoker_types::ByteSize;

/// Memory that is left in any case.
const LEFT_AT_LEAST: ByteSize = ByteSize::gib(4);

/// Assumed where the operating system doesn't say.
const UNKNOWN: ByteSize = ByteSize::gib(8);

/// What the operating system says is available: the lesser of `MemAvailable` and the control groups' headroom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Available(ByteSize);

impl Available {
    /// Asks the operating system.
    pub(crate) fn read() -> Self {
        Self(SystemMemory::default().read().map_or(UNKNOWN, |reading| reading.available))
    }

    /// With memory that counts as used and is this server's.
    pub(crate) fn plus(self, own: ByteSize) -> Self {
        Self(self.0 + own)
    }

    /// 40 % of what is available, if that leaves 4 GiB; never below 256 MiB.
    pub(crate) fn dram_default(self) -> ByteSize {
        self.share(40)
    }

    /// 20 % likewise.
    pub(crate) fn kv_default(self) -> ByteSize {
        self.share(20)
    }

    fn share(self, percent: u64) -> ByteSize {
        let share = self.0.bytes() / 100 * percent;
        // Together the two shares are 60 %: each may use its part of what lies above the reserve.
        let above_reserve = self.0.saturating_sub(LEFT_AT_LEAST).bytes() / 60 * percent;
        ByteSize(share.min(above_reserve).max(ByteSize::mib(256).bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_leave_room() {
        let of = |gib| Available(ByteSize::gib(gib));
        assert_eq!(of(100).dram_default(), ByteSize(ByteSize::gib(100).0 / 100 * 40));
        for gib in [5, 8, 10, 64, 2048] {
            let available = of(gib);
            let left = available.0.saturating_sub(available.dram_default() + available.kv_default());
            assert!(left >= LEFT_AT_LEAST || gib <= 5, "{gib} GiB leaves {left}");
        }
        assert_eq!(of(1).dram_default(), ByteSize::mib(256));
    }
}
