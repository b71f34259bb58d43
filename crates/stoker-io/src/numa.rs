//! Which memory of a machine with several nodes (sockets) a pool's slots get.
//!
//! A device reads the memory of its own node at full speed and another node's through the link between the processors. So
//! a pool that feeds devices of one node prefers that node's memory, and one that feeds devices of several takes turns, slot by
//! slot: every load then draws on all those nodes. (The kernel's own interleaving goes by pages of 4 KiB. The first one of
//! each huge page decides about all of it, and for two nodes that is always the same.)
//!
//! Preferred, not demanded: when a node is full, memory comes from another.

#![expect(unsafe_code, reason = "the policy of a range of memory is set by its address")]

use std::{fmt, fs, io, ops::Range, path::Path};

/// Node numbers that the kernel can be told of here.
const NODES_MAX: u32 = 1024;

/// Where a pool's memory shall come from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Placement {
    /// As the kernel likes: from the node of whoever touches it first.
    #[default]
    Anywhere,
    /// From one node.
    Node(u32),
    /// From these in turn, slot by slot. At least two, ascending.
    InTurn(Vec<u32>),
}

/// The NUMA nodes of this machine that are online, as the kernel lists them; empty when it doesn't say.
#[must_use]
pub fn numa_nodes() -> Vec<u32> {
    let listed = fs::read_to_string(Path::new("/sys/devices/system/node/online"));
    listed.map_or_else(|_| Vec::new(), |text| parse(&text))
}

/// A list as in cpuset(7): `0-1,4`. What can't be read ends it.
fn parse(list: &str) -> Vec<u32> {
    let mut nodes = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) else { break };
        nodes.extend(first..=last.min(NODES_MAX - 1));
    }
    nodes
}

// === impl Placement ===

impl Placement {
    /// For devices of these nodes (`None`: it isn't known), on a machine with these.
    #[must_use]
    pub fn near(devices: impl IntoIterator<Item = Option<u32>>, online: &[u32]) -> Self {
        if online.len() < 2 {
            return Self::Anywhere;
        }
        let is_here = |node: &u32| online.contains(node) && *node < NODES_MAX;
        let mut nodes: Vec<u32> = devices.into_iter().flatten().filter(is_here).collect();
        nodes.sort_unstable();
        nodes.dedup();
        match nodes[..] {
            [] => Self::Anywhere,
            [node] => Self::Node(node),
            _ => Self::InTurn(nodes),
        }
    }

    /// The runs of slots that get the memory of one node; together all `slots`, unless it's all the same.
    fn runs(&self, slots: u32) -> impl Iterator<Item = (Range<u32>, u32)> {
        let (nodes, len): (&[u32], u32) = match self {
            Self::Anywhere => (&[], 1),
            Self::Node(node) => (std::slice::from_ref(node), slots.max(1)),
            Self::InTurn(nodes) => (nodes, 1),
        };
        let starts = (0..slots).step_by(len as usize);
        starts.zip(nodes.iter().cycle()).map(move |(slot, node)| (slot..slot + len, *node))
    }

    /// Sets the policy of `slots` slots of `slot_bytes`, whose pages are made later. Those that are there stay.
    ///
    /// # Safety
    /// From `base` on so many slots are mapped.
    ///
    /// # Errors
    /// The operating system's: a sandbox often refuses it. Some slots may have their policy then; none is the worse for it.
    pub(crate) unsafe fn apply(&self, base: *mut u8, slots: u32, slot_bytes: usize) -> io::Result<()> {
        for (run, node) in self.runs(slots) {
            let at = base.wrapping_add(run.start as usize * slot_bytes);
            // SAFETY: the caller's: the run lies in the mapping.
            unsafe { prefer(at, run.len() * slot_bytes, node) }?;
        }
        Ok(())
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anywhere => f.write_str("any node"),
            Self::Node(node) => write!(f, "node {node}"),
            Self::InTurn(nodes) => {
                let nodes: Vec<String> = nodes.iter().map(u32::to_string).collect();
                write!(f, "nodes {} in turn", nodes.join(", "))
            }
        }
    }
}

/// Has the pages of a range, which are made later, come from `node` as long as it has any.
///
/// # Safety
/// The range is mapped.
unsafe fn prefer(at: *mut u8, len: usize, node: u32) -> io::Result<()> {
    let mut mask = [0_u64; NODES_MAX as usize / 64];
    let Some(word) = mask.get_mut(node as usize / 64) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no such node"));
    };
    *word |= 1 << (node % 64);
    // The kernel takes one bit less than it is told.
    let bits = libc::c_ulong::from(NODES_MAX) + 1;
    // SAFETY: a mapped range and a mask of `NODES_MAX` bits; the call changes no contents.
    let failed = unsafe {
        libc::syscall(libc::SYS_mbind, at, len, libc::MPOL_PREFERRED, mask.as_ptr(), bits, 0_u64) != 0
    };
    if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use stoker_types::ByteSize;

    use super::*;
    use crate::ChunkPool;

    #[test]
    fn nodes_are_listed_as_the_kernel_writes_them() {
        assert_eq!(parse("0\n"), [0]);
        assert_eq!(parse("0-3,8,10-11\n"), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(parse(""), [0_u32; 0]);
        assert_eq!(parse("1,x,2"), [1]);
        assert_eq!(parse("0-4294967295").len(), NODES_MAX as usize, "an absurd list takes no memory");
        assert!(!numa_nodes().is_empty(), "every Linux with a /sys has one");
    }

    #[test]
    fn memory_lies_where_the_devices_are() {
        let near = |devices: &[Option<u32>], online: &[u32]| Placement::near(devices.iter().copied(), online);
        // One node, or a machine that doesn't say: nothing changes, whatever devices say.
        assert_eq!(near(&[Some(0)], &[0]), Placement::Anywhere);
        assert_eq!(near(&[Some(1), Some(0)], &[]), Placement::Anywhere);
        // No device, or none that says where it is.
        assert_eq!(near(&[], &[0, 1]), Placement::Anywhere);
        assert_eq!(near(&[None, None], &[0, 1]), Placement::Anywhere);
        assert_eq!(near(&[Some(1), Some(1), None], &[0, 1]), Placement::Node(1));
        // Four of eight GPUs on each socket.
        let eight: Vec<Option<u32>> = (0..8).map(|gpu| Some(gpu / 4)).collect();
        assert_eq!(near(&eight, &[0, 1]), Placement::InTurn(vec![0, 1]));
        assert_eq!(near(&[Some(3), Some(1)], &[0, 1, 2, 3]), Placement::InTurn(vec![1, 3]));
        // A node that isn't online, such as that of a device behind a memory-less one.
        assert_eq!(near(&[Some(7), Some(1)], &[0, 1]), Placement::Node(1));
    }

    #[test]
    fn every_slot_gets_one_node_and_nodes_the_same_share() {
        let runs = |placement: &Placement, slots| placement.runs(slots).collect::<Vec<_>>();
        assert_eq!(runs(&Placement::Anywhere, 10), []);
        assert_eq!(runs(&Placement::Node(1), 10), [(0..10, 1)]);
        let turns = Placement::InTurn(vec![0, 2, 3]);
        for slots in [1, 2, 3, 100] {
            let runs = runs(&turns, slots);
            assert_eq!(runs.iter().map(|(run, _)| run.len()).sum::<usize>(), slots as usize);
            assert!(runs.iter().zip(0..).all(|((run, _), slot)| *run == (slot..slot + 1)));
            let shares: Vec<usize> =
                [0, 2, 3].map(|node| runs.iter().filter(|(_, of)| *of == node).count()).into();
            assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1, "{shares:?}");
        }
    }

    #[test]
    fn the_kernel_is_told_and_a_refusal_is_an_error_and_nothing_else() {
        let node = numa_nodes()[0];
        for shared in [true, false] {
            let make = if shared { ChunkPool::new } else { ChunkPool::private };
            let pool = make(ByteSize::mib(4), ByteSize::mib(1)).unwrap();
            let told = pool.place(&Placement::InTurn(vec![node, node]));
            let mut bufs: Vec<_> = std::iter::from_fn(|| pool.try_take()).collect();
            for buf in &mut bufs {
                buf.fill(7);
                assert!(buf.iter().all(|byte| *byte == 7));
            }
            match told {
                Ok(()) => {
                    for buf in &bufs {
                        assert_eq!(policy(buf.as_ptr()), (libc::MPOL_PREFERRED, node));
                    }
                }
                // As in a container without CAP_SYS_NICE, or on a kernel without NUMA.
                Err(error) => {
                    let expected = [Some(libc::EPERM), Some(libc::ENOSYS)];
                    assert!(expected.contains(&error.raw_os_error()), "{error}");
                }
            }
            let nowhere = pool.place(&Placement::Node(NODES_MAX));
            assert_eq!(nowhere.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }

    /// The policy of the page at an address: its mode and its first node.
    fn policy(at: *const u8) -> (libc::c_int, u32) {
        /// Of an address, not of the thread (`linux/mempolicy.h`).
        const MPOL_F_ADDR: u64 = 2;
        let (mut mode, mut mask) = (-1, [0_u64; NODES_MAX as usize / 64]);
        let bits = libc::c_ulong::from(NODES_MAX) + 1;
        // SAFETY: writes an integer and a mask of so many bits; the address is mapped.
        let done = unsafe {
            libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, mask.as_mut_ptr(), bits, at, MPOL_F_ADDR)
        };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        (
            mode,
            (0..)
                .zip(mask)
                .find(|(_, word)| *word != 0)
                .map(|(i, word)| i * 64 + word.trailing_zeros())
                .unwrap(),
        )
    }
}
