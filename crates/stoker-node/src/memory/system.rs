//! What Linux says: `/proc/meminfo`, and the limits of the control groups that this process runs in.

use std::{
    io,
    path::{Path, PathBuf},
};

use stoker_types::{ByteSize, MemoryHolder};

use super::{MemoryProbe, MemoryReading};

/// Version 1 writes "no limit" as the largest multiple of the page size.
const UNLIMITED: u64 = 1 << 62;

/// The machine that this process runs on, without state: every call reads anew.
#[derive(Debug, Clone)]
pub struct SystemMemory {
    root: PathBuf,
}

/// A control group, and what it may have.
#[derive(Debug)]
struct Group {
    /// Below the mount point, as `/proc/PID/cgroup` has it.
    path: String,
    dir: PathBuf,
    limit: ByteSize,
    /// The limit less what is used and can't be reclaimed.
    left: ByteSize,
}

/// Where the files of one version of control groups are.
struct Hierarchy {
    mount: PathBuf,
    /// Of this process.
    path: String,
    files: Files,
}

/// Names of the files of one version.
struct Files {
    limits: &'static [&'static str],
    usage: &'static str,
    /// Entries of `memory.stat` that are given up before anybody is killed. Shared memory isn't among them.
    reclaimable: &'static [&'static str],
}

const VERSION_2: Files = Files {
    limits: &["memory.max", "memory.high"],
    usage: "memory.current",
    reclaimable: &["inactive_file", "active_file", "slab_reclaimable"],
};

const VERSION_1: Files = Files {
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
    reclaimable: &["total_inactive_file", "total_active_file"],
};

// === impl SystemMemory ===

impl Default for SystemMemory {
    fn default() -> Self {
        Self::below("/")
    }
}

impl SystemMemory {
    /// A machine whose `/proc` and `/sys` are below `root`.
    #[must_use]
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory of the nearest control group (version 2) with a limit.
    pub(super) fn limited_group(&self) -> Option<PathBuf> {
        let (two, _) = self.hierarchies();
        self.groups(&two?).into_iter().next().map(|group| group.dir)
    }

    fn path(&self, absolute: &str) -> PathBuf {
        self.root.join(absolute.trim_start_matches('/'))
    }

    /// Of this process: version 2, and version 1's of memory. There may be both.
    fn hierarchies(&self) -> (Option<Hierarchy>, Option<Hierarchy>) {
        let text = |path| std::fs::read_to_string(self.path(path)).unwrap_or_default();
        let (mounts, own) = (text("proc/self/mounts"), text("proc/self/cgroup"));
        // proc(5): device, mount point, type, options.
        let mount = |is: &dyn Fn(&str, &str) -> bool| {
            mounts.lines().find_map(|line| {
                let mut fields = line.split(' ').skip(1);
                let (point, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
                is(kind, options).then(|| self.path(point))
            })
        };
        // cgroups(7): number, controllers, path.
        let path = |is: &dyn Fn(&str) -> bool| {
            own.lines().find_map(|line| {
                let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
                is(controllers).then(|| path.to_owned())
            })
        };
        let two = mount(&|kind, _| kind == "cgroup2").zip(path(&str::is_empty));
        let has_memory = |list: &str| list.split(',').any(|item| item == "memory");
        let one =
            mount(&|kind, options| kind == "cgroup" && has_memory(options)).zip(path(&|c| has_memory(c)));
        (
            two.map(|(mount, path)| Hierarchy { mount, path, files: VERSION_2 }),
            one.map(|(mount, path)| Hierarchy { mount, path, files: VERSION_1 }),
        )
    }

    /// Groups with a limit, the innermost first. One that isn't to be seen from here, in a container, is left out.
    fn groups(&self, hierarchy: &Hierarchy) -> Vec<Group> {
        let Hierarchy { mount, path, files } = hierarchy;
        let ancestors = Path::new(path).ancestors();
        ancestors
            .filter_map(|path| {
                let dir = mount.join(path.strip_prefix("/").unwrap_or(path));
                let (limit, left) = room(&dir, files)?;
                Some(Group { path: path.to_str()?.to_owned(), dir, limit, left })
            })
            .collect()
    }
}

impl MemoryProbe for SystemMemory {
    fn read(&self) -> io::Result<MemoryReading> {
        let path = self.path("proc/meminfo");
        let meminfo = std::fs::read_to_string(&path)?;
        let value = |key| {
            kib(&meminfo, key).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, format!("{} has no {key}", path.display()))
            })
        };
        let mut reading =
            MemoryReading { total: value("MemTotal:")?, available: value("MemAvailable:")?, group: None };
        let (two, one) = self.hierarchies();
        for group in two.iter().chain(&one).flat_map(|hierarchy| self.groups(hierarchy)) {
            reading.total = reading.total.min(group.limit);
            if group.left < reading.available {
                reading.available = group.left;
                reading.group = Some(group.path);
            }
        }
        Ok(reading)
    }

    fn holder(&self, ours: &[u32], group: Option<&str>) -> Option<MemoryHolder> {
        let page = rustix::param::page_size() as u64;
        let proc = self.path("proc");
        let mut most: Option<(u32, u64)> = None;
        for entry in std::fs::read_dir(&proc).ok()?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            // proc(5): size, resident, in pages. A process may end at any moment.
            let Ok(statm) = std::fs::read_to_string(entry.path().join("statm")) else { continue };
            let Some(pages) = statm.split(' ').nth(1).and_then(|field| field.parse::<u64>().ok()) else {
                continue;
            };
            let more = pages > most.map_or(0, |(_, pages)| pages);
            if more && !ours.contains(&pid) && group.is_none_or(|group| is_within(&entry.path(), group)) {
                most = Some((pid, pages));
            }
        }
        let (pid, pages) = most?;
        let name = std::fs::read_to_string(proc.join(pid.to_string()).join("comm")).unwrap_or_default();
        Some(MemoryHolder { pid, name: name.trim().to_owned(), bytes: ByteSize(pages * page) })
    }
}

/// Whether a process runs in a control group or in one below it.
fn is_within(process: &Path, group: &str) -> bool {
    let Ok(own) = std::fs::read_to_string(process.join("cgroup")) else { return false };
    own.lines().filter_map(|line| line.splitn(3, ':').nth(2)).any(|path| Path::new(path).starts_with(group))
}

/// A group's limit, and what of it is left; `None` without a limit.
fn room(dir: &Path, files: &Files) -> Option<(ByteSize, ByteSize)> {
    let number = |name: &&str| std::fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
    let limit = files.limits.iter().filter_map(number).filter(|limit| *limit < UNLIMITED).min()?;
    let usage = number(&files.usage)?;
    let stat = std::fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let reclaimable: u64 = stat
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(key, _)| files.reclaimable.contains(key))
        .filter_map(|(_, value)| value.parse::<u64>().ok())
        .fold(0, u64::saturating_add);
    Some((ByteSize(limit), ByteSize(limit.saturating_sub(usage.saturating_sub(reclaimable)))))
}

fn kib(meminfo: &str, key: &str) -> Option<ByteSize> {
    let line = meminfo.lines().find(|line| line.starts_with(key))?;
    let kib: u64 = line[key.len()..].trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(ByteSize(kib.saturating_mul(1 << 10)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str =
        "MemTotal:       24000000 kB\nMemFree:        1000 kB\nMemAvailable:   20000000 kB\n";

    fn machine(files: &[(&str, &str)]) -> (tempfile::TempDir, SystemMemory) {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in [("proc/meminfo", MEMINFO)].iter().chain(files) {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let memory = SystemMemory::below(root.path());
        (root, memory)
    }

    #[test]
    fn without_a_limit_the_machine_counts() {
        let reading = MemoryReading {
            total: ByteSize::kib(24_000_000),
            available: ByteSize::kib(20_000_000),
            group: None,
        };
        assert_eq!(machine(&[]).1.read().unwrap(), reading);
        let (_root, unlimited) = machine(&[
            (
                "proc/self/mounts",
                "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n",
            ),
            ("proc/self/cgroup", "4:cpu,memory:/a\n0::/a\n"),
            ("sys/fs/cgroup/a/memory.max", "max\n"),
            ("sys/fs/cgroup/a/memory.current", "4096\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "4096\n"),
        ]);
        assert_eq!(unlimited.read().unwrap(), reading);
        assert_eq!(unlimited.limited_group(), None);
    }

    #[test]
    fn the_tightest_group_limits_and_its_page_cache_is_no_loss() {
        let (root, memory) = machine(&[
            ("proc/self/mounts", "tmpfs / tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"),
            ("proc/self/cgroup", "0::/outer/inner\n"),
            ("sys/fs/cgroup/outer/memory.max", "1000000000\n"),
            ("sys/fs/cgroup/outer/memory.current", "900000000\n"),
            (
                "sys/fs/cgroup/outer/memory.stat",
                "anon 5\nfile 9\nshmem 7\ninactive_file 60000000\nactive_file 20000000\n",
            ),
            ("sys/fs/cgroup/outer/inner/memory.max", "max\n"),
            ("sys/fs/cgroup/outer/inner/memory.high", "800000000\n"),
            ("sys/fs/cgroup/outer/inner/memory.current", "100000000\n"),
        ]);
        let reading = memory.read().unwrap();
        assert_eq!((reading.total, reading.available), (ByteSize(800_000_000), ByteSize(180_000_000)));
        assert_eq!(reading.group.as_deref(), Some("/outer"));
        assert_eq!(memory.limited_group(), Some(root.path().join("sys/fs/cgroup/outer/inner")));
    }

    #[test]
    fn version_1_limits_too_and_a_container_sees_its_own_root() {
        let (_root, memory) = machine(&[
            (
                "proc/self/mounts",
                "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n",
            ),
            // The host's path; in the container the group is the mount's root.
            ("proc/self/cgroup", "5:cpu:/docker/abc\n4:memory:/docker/abc\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "536870912\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "536870000\n"),
            (
                "sys/fs/cgroup/memory/memory.stat",
                "inactive_file 1\ntotal_inactive_file 400000000\ntotal_active_file 1000\n",
            ),
        ]);
        let reading = memory.read().unwrap();
        let left = ByteSize(536_870_912 - (536_870_000 - 400_001_000));
        assert_eq!((reading.total, reading.available), (ByteSize::mib(512), left));
        assert_eq!(reading.group.as_deref(), Some("/"));
    }

    #[test]
    fn foreign_texts_are_no_readings() {
        let (root, memory) = machine(&[]);
        for text in ["", "MemTotal: x kB\nMemAvailable: 1 kB\n", "MemTotal: 1 kB\n", "MemAvailable:"] {
            std::fs::write(root.path().join("proc/meminfo"), text).unwrap();
            assert!(memory.read().is_err(), "{text:?}");
        }
        std::fs::write(
            root.path().join("proc/meminfo"),
            format!("MemTotal: {} kB\nMemAvailable: 1 kB", u64::MAX),
        )
        .unwrap();
        assert_eq!(memory.read().unwrap().total, ByteSize(u64::MAX));
    }

    #[test]
    fn the_largest_process_is_named_unless_it_is_ours_or_elsewhere() {
        let (_root, memory) = machine(&[
            ("proc/10/statm", "900 500 3 1 0 7 0\n"),
            ("proc/10/comm", "stoker\n"),
            ("proc/11/statm", "900 400 3 1 0 7 0\n"),
            ("proc/11/comm", "python\n"),
            ("proc/11/cgroup", "0::/elsewhere\n"),
            ("proc/12/statm", "900 300 3 1 0 7 0\n"),
            ("proc/12/comm", "hog in here\n"),
            ("proc/12/cgroup", "4:memory:/box/inner\n"),
            ("proc/13/statm", "900 200 3 1 0 7 0\n"),
            ("proc/13/cgroup", "4:memory:/boxes\n"),
            ("proc/14/statm", "not a number\n"),
        ]);
        let page = rustix::param::page_size() as u64;
        let found = memory.holder(&[10], None).unwrap();
        assert_eq!((found.pid, &*found.name, found.bytes), (11, "python", ByteSize(400 * page)));
        let found = memory.holder(&[10], Some("/box")).unwrap();
        assert_eq!((found.pid, &*found.name), (12, "hog in here"));
        assert_eq!(memory.holder(&[10, 11, 12, 13], None), None);
    }

    #[test]
    fn this_machine_can_be_read() {
        let memory = SystemMemory::default();
        let reading = memory.read().unwrap();
        assert!(reading.available > ByteSize::mib(64) && reading.total >= reading.available, "{reading:?}");
        assert!(memory.holder(&[], None).is_some());
    }
}
