//! What this machine, and the control group that we run in, can spare.

use stoker_types::ByteSize;

/// Memory that is left in any case.
const LEFT_AT_LEAST: ByteSize = ByteSize::gib(4);

/// What the operating system says is available.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryTruth {
    /// The lesser of `MemAvailable` and the control group's headroom.
    pub(crate) available: ByteSize,
}

impl MemoryTruth {
    /// Reads `/proc/meminfo` and the control group's limit.
    pub(crate) fn read() -> Self {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let available = meminfo_bytes(&meminfo, "MemAvailable:").unwrap_or(ByteSize::gib(8));
        Self { available: cgroup_headroom().map_or(available, |h| h.min(available)) }
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
        let share = self.available.0 / 100 * percent;
        // Together the two shares are 60 %: each may use its part of what lies above the reserve.
        let above_reserve = self.available.saturating_sub(LEFT_AT_LEAST).0 / 60 * percent;
        ByteSize(share.min(above_reserve).max(ByteSize::mib(256).0))
    }
}

fn meminfo_bytes(text: &str, key: &str) -> Option<ByteSize> {
    let line = text.lines().find(|l| l.starts_with(key))?;
    let kib: u64 = line[key.len()..].trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(ByteSize::kib(kib))
}

/// Limit minus use of the control group (version 2) and of those above it; `None` without a limit.
fn cgroup_headroom() -> Option<ByteSize> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|l| l.strip_prefix("0::"))?;
    let mut least: Option<ByteSize> = None;
    let mut dir = std::path::PathBuf::from("/sys/fs/cgroup").join(path.trim_start_matches('/'));
    while dir.starts_with("/sys/fs/cgroup") {
        let number = |name: &str| std::fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
        if let (Some(max), Some(current)) = (number("memory.max"), number("memory.current")) {
            let headroom = ByteSize(max.saturating_sub(current));
            least = Some(least.map_or(headroom, |l| l.min(headroom)));
        }
        if !dir.pop() {
            break;
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:   20000000 kB\n";
        assert_eq!(meminfo_bytes(text, "MemAvailable:"), Some(ByteSize::kib(20_000_000)));
        assert_eq!(meminfo_bytes(text, "Missing:"), None);
        assert!(MemoryTruth::read().available > ByteSize::mib(64));
    }

    #[test]
    fn defaults_leave_room() {
        let of = |gib| MemoryTruth { available: ByteSize::gib(gib) };
        assert_eq!(of(100).dram_default(), ByteSize(ByteSize::gib(100).0 / 100 * 40));
        for gib in [5, 8, 10, 64, 2048] {
            let truth = of(gib);
            let left = truth.available.saturating_sub(truth.dram_default() + truth.kv_default());
            assert!(left >= LEFT_AT_LEAST || gib <= 5, "{gib} GiB leaves {left}");
        }
        assert_eq!(of(1).dram_default(), ByteSize::mib(256));
    }
}
