//! Policies to choose from and to compare with.

use super::cluster::{Cluster, NodeKey};

/// A random number that the caller drew: the scheduler draws none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw(pub u64);

/// How a server is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The server where the model starts soonest, its victims' streams taken elsewhere where that pays. The paper's, and
    /// the default.
    StartupTime,
    /// The same estimate, but whoever is in the way is broken off and begins anew later: Shepherd (NSDI 2023), as the
    /// paper compares with it.
    Shepherd,
    /// The server that holds the most of the model, however long the wait there.
    Locality,
    /// Any server that can take it at once: what the paper calls serverless.
    Random(Draw),
    /// One server after the other.
    RoundRobin {
        /// The server that was chosen the last time.
        after: Option<NodeKey>,
    },
    /// The server with the most free device memory.
    LeastLoaded,
}

/// Servers in an order that a draw decides, each order as likely as any other.
pub(super) fn shuffled(cluster: &Cluster, Draw(seed): Draw) -> Vec<usize> {
    let mut order = in_turn(cluster, None);
    let mut state = seed;
    for left in (2..=order.len()).rev() {
        state = splitmix(state);
        // The bias of the remainder is below 2^-50 for any number of servers.
        let drawn = usize::try_from(state % left as u64).unwrap_or(0);
        order.swap(left - 1, drawn);
    }
    order
}

/// Servers by key, beginning after the last one chosen.
pub(super) fn in_turn(cluster: &Cluster, after: Option<NodeKey>) -> Vec<usize> {
    let open = |(_, at): &(&NodeKey, &usize)| cluster.states[**at].open;
    let keys: Vec<(NodeKey, usize)> =
        cluster.nodes.iter().filter(open).map(|(key, at)| (*key, *at)).collect();
    let first = after.map_or(0, |after| keys.partition_point(|(key, _)| *key <= after));
    keys[first..].iter().chain(&keys[..first]).map(|(_, at)| *at).collect()
}

/// Servers by free device memory, the most first.
pub(super) fn by_load(cluster: &Cluster) -> Vec<usize> {
    let mut order = in_turn(cluster, None);
    let free = |at: &usize| {
        std::cmp::Reverse(cluster.states[*at].devices.iter().map(|device| device.free).sum::<u64>())
    };
    order.sort_by_cached_key(free);
    order
}

/// Steele, Lea and Flood's generator: one step.
const fn splitmix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
