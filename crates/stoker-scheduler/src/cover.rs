//! Choosing the cheapest victims that together free enough.

/// Room in every dimension that is accounted. Signed: what is missing is negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Space {
    /// Bytes of mapped weights.
    pub dram: i64,
    /// Bytes of KV cache.
    pub kv: i64,
    /// Worker processes.
    pub slots: i64,
}

/// An instance that may have to go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    /// What its going costs; at least 1.
    pub cost: u64,
    /// What it frees by itself of the room that weights take, where KV caches take of it, too.
    pub dram: i64,
    /// KV cache that it frees.
    pub kv: i64,
    /// Its model, as an index into the groups.
    pub group: usize,
}

/// A model that candidates serve: its weights are mapped once, and freed with the last of its instances.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Group {
    /// Instances of it that stay unless they are chosen.
    pub staying: u32,
    /// What the last of them frees.
    pub dram: i64,
}

/// Subsets looked at before the best one found is taken: exact for up to twelve candidates, and in practice for
/// many more, since bounds cut most of the tree.
pub(crate) const NODES_MAX: u32 = 1 << 13;

struct Search<'a> {
    order: &'a [(usize, Candidate)],
    /// What `order[i..]` can free at most.
    rest: Vec<Space>,
    groups: Vec<Group>,
    /// Positions in `order`, here and in `best`.
    chosen: Vec<usize>,
    best: Option<(u64, Vec<usize>)>,
    nodes: u32,
}

// === impl Space ===

impl Space {
    pub(crate) const fn covers(&self, need: &Self) -> bool {
        self.dram >= need.dram && self.kv >= need.kv && self.slots >= need.slots
    }

    pub(crate) const fn plus(self, other: Self) -> Self {
        Self {
            dram: self.dram.saturating_add(other.dram),
            kv: self.kv.saturating_add(other.kv),
            slots: self.slots.saturating_add(other.slots),
        }
    }

    pub(crate) const fn minus(self, other: Self) -> Self {
        Self {
            dram: self.dram.saturating_sub(other.dram),
            kv: self.kv.saturating_sub(other.kv),
            slots: self.slots.saturating_sub(other.slots),
        }
    }

    /// The lesser in every dimension, never below zero.
    pub(crate) fn shared(self, other: Self) -> Self {
        Self {
            dram: self.dram.min(other.dram).max(0),
            kv: self.kv.min(other.kv).max(0),
            slots: self.slots.min(other.slots).max(0),
        }
    }
}

// === impl Candidate ===

impl Candidate {
    /// What it frees whoever else goes.
    const fn own(&self) -> Space {
        Space { dram: self.dram, kv: self.kv, slots: 1 }
    }
}

/// The cheapest set of candidates whose going covers `deficit`, as ascending indices; the first such set in
/// lexical order of cost-sorted candidates on a tie. `None` when not even all of them do.
pub(crate) fn cover(
    deficit: Space,
    candidates: &[Candidate],
    groups: &[Group],
    nodes_max: u32,
) -> Option<Vec<usize>> {
    let mut all = groups.to_vec();
    let everything = candidates.iter().fold(Space::default(), |sum, c| sum.plus(take(&mut all, c)));
    if !everything.covers(&deficit) {
        return None;
    }
    let mut order: Vec<(usize, Candidate)> = candidates.iter().copied().enumerate().collect();
    order.sort_unstable_by_key(|(at, candidate)| (candidate.cost, *at));
    let mut rest = vec![Space::default(); order.len() + 1];
    let mut seen = vec![false; groups.len()];
    for at in (0..order.len()).rev() {
        let candidate = order[at].1;
        // An upper bound: as if the first of a model's instances freed its weights already.
        let dram = if std::mem::replace(&mut seen[candidate.group], true) {
            0
        } else {
            groups[candidate.group].dram
        };
        rest[at] = rest[at + 1].plus(candidate.own()).plus(Space { dram, ..Space::default() });
    }
    let mut search = Search {
        order: &order,
        rest,
        groups: groups.to_vec(),
        chosen: Vec::new(),
        best: None,
        nodes: nodes_max,
    };
    search.best = search.greedy(deficit);
    search.best.as_ref()?;
    search.descend(0, 0, deficit);
    let found = search.best.take()?.1;
    let mut set: Vec<usize> =
        search.minimal(found, deficit).into_iter().map(|at| search.order[at].0).collect();
    set.sort_unstable();
    Some(set)
}

// === impl Search ===

impl Search<'_> {
    /// Takes candidates from the cheapest on until they cover, then gives back the dearest that aren't needed.
    fn greedy(&self, deficit: Space) -> Option<(u64, Vec<usize>)> {
        let mut set = Vec::new();
        let mut groups = self.groups.clone();
        let mut sum = Space::default();
        for (at, (_, candidate)) in self.order.iter().enumerate() {
            if sum.covers(&deficit) {
                break;
            }
            sum = sum.plus(take(&mut groups, candidate));
            set.push(at);
        }
        if !sum.covers(&deficit) {
            return None;
        }
        let set = self.minimal(set, deficit);
        Some((set.iter().map(|at| self.order[*at].1.cost).sum(), set))
    }

    /// Gives back what a covering set doesn't need, the dearest first. Positions in `order`, ascending.
    fn minimal(&self, mut set: Vec<usize>, deficit: Space) -> Vec<usize> {
        for at in (0..set.len()).rev() {
            let given_back = set.remove(at);
            let mut groups = self.groups.clone();
            let freed =
                set.iter().fold(Space::default(), |sum, at| sum.plus(take(&mut groups, &self.order[*at].1)));
            if !freed.covers(&deficit) {
                set.insert(at, given_back);
            }
        }
        set
    }

    fn descend(&mut self, at: usize, cost: u64, deficit: Space) {
        if Space::default().covers(&deficit) {
            if self.best.as_ref().is_none_or(|(best, _)| cost < *best) {
                self.best = Some((cost, self.chosen.clone()));
            }
            return;
        }
        if at == self.order.len() || self.nodes == 0 || !self.rest[at].covers(&deficit) {
            return;
        }
        let candidate = self.order[at].1;
        // Candidates are in ascending cost, so every way to go on costs at least this much more.
        let with = cost.saturating_add(candidate.cost);
        if self.best.as_ref().is_some_and(|(best, _)| with >= *best) {
            return;
        }
        self.nodes -= 1;
        let freed = take(&mut self.groups, &candidate);
        self.chosen.push(at);
        self.descend(at + 1, with, deficit.minus(freed));
        self.chosen.pop();
        self.groups[candidate.group].staying += 1;
        self.descend(at + 1, cost, deficit);
    }
}

fn take(groups: &mut [Group], candidate: &Candidate) -> Space {
    let group = &mut groups[candidate.group];
    group.staying -= 1;
    let weights = if group.staying == 0 { group.dram } else { 0 };
    candidate.own().plus(Space { dram: weights, ..Space::default() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn freed(set: u32, candidates: &[Candidate], groups: &[Group]) -> Space {
        let mut groups = groups.to_vec();
        let members = candidates.iter().enumerate().filter(|(at, _)| set & (1 << at) != 0);
        members.fold(Space::default(), |sum, (_, candidate)| sum.plus(take(&mut groups, candidate)))
    }

    fn cost(set: u32, candidates: &[Candidate]) -> u64 {
        candidates.iter().enumerate().filter(|(at, _)| set & (1 << at) != 0).map(|(_, c)| c.cost).sum()
    }

    #[test]
    fn one_large_victim_is_better_than_two_small_ones_that_cost_more() {
        let groups = [10, 10, 20].map(|dram| Group { staying: 1, dram });
        let candidates =
            [(0, 5), (1, 5), (2, 7)].map(|(group, cost)| Candidate { cost, dram: 0, kv: 0, group });
        let need = |dram| Space { dram, kv: 0, slots: 0 };
        assert_eq!(cover(need(8), &candidates, &groups, NODES_MAX).unwrap(), [0]);
        assert_eq!(cover(need(15), &candidates, &groups, NODES_MAX).unwrap(), [2]);
        assert_eq!(cover(need(40), &candidates, &groups, NODES_MAX).unwrap(), [0, 1, 2]);
        assert_eq!(cover(need(41), &candidates, &groups, NODES_MAX), None);
    }

    #[test]
    fn weights_are_freed_with_the_last_instance() {
        let groups = [Group { staying: 2, dram: 10 }];
        let candidates = [1, 2].map(|cost| Candidate { cost, dram: 0, kv: 3, group: 0 });
        let need = |dram, kv| Space { dram, kv, slots: 0 };
        assert_eq!(cover(need(0, 3), &candidates, &groups, NODES_MAX).unwrap(), [0]);
        assert_eq!(cover(need(1, 0), &candidates, &groups, NODES_MAX).unwrap(), [0, 1]);
        let pinned_beside = [Group { staying: 3, dram: 10 }];
        assert_eq!(cover(need(1, 0), &candidates, &pinned_beside, NODES_MAX), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn as_cheap_as_brute_force(
            raw in prop::collection::vec((1u64..20, 0i64..10, 0i64..5, 0usize..6), 0..10),
            pools in prop::array::uniform6(0i64..20), beside in prop::array::uniform6(0u32..2),
            dram in -5i64..40, kv in -5i64..30, slots in -1i64..4,
        ) {
            let candidates: Vec<Candidate> =
                raw.iter().map(|&(cost, kv, dram, group)| Candidate { cost, dram, kv, group }).collect();
            let mut groups: Vec<Group> = (0..6).map(|g| Group { staying: beside[g], dram: pools[g] }).collect();
            for candidate in &candidates {
                groups[candidate.group].staying += 1;
            }
            let deficit = Space { dram, kv, slots };
            let best = (0u32..1 << candidates.len())
                .filter(|set| freed(*set, &candidates, &groups).covers(&deficit))
                .map(|set| cost(set, &candidates))
                .min();
            let found = cover(deficit, &candidates, &groups, NODES_MAX).map(|set| {
                let mask = set.iter().fold(0u32, |mask, at| mask | 1 << at);
                assert!(freed(mask, &candidates, &groups).covers(&deficit));
                cost(mask, &candidates)
            });
            prop_assert_eq!(found, best);
        }

        /// With hardly any nodes to look at, the answer may be dearer, but it still covers and wastes nothing whole.
        #[test]
        fn out_of_nodes_it_still_covers(
            raw in prop::collection::vec((1u64..1000, 0i64..10), 1..40), kv in 0i64..100,
        ) {
            let candidates: Vec<Candidate> =
                raw.iter().enumerate().map(|(at, (cost, kv))| Candidate { cost: *cost, dram: 0, kv: *kv, group: at }).collect();
            let groups = vec![Group { staying: 1, dram: 0 }; candidates.len()];
            let deficit = Space { dram: 0, kv, slots: 0 };
            let possible = candidates.iter().map(|c| c.kv).sum::<i64>() >= kv;
            let found = cover(deficit, &candidates, &groups, 4);
            prop_assert_eq!(found.is_some(), possible);
            if let Some(set) = found {
                let sum: i64 = set.iter().map(|at| candidates[*at].kv).sum();
                prop_assert!(sum >= kv);
                for at in &set {
                    prop_assert!(sum - candidates[*at].kv < kv, "victim {} was not needed", at);
                }
            }
        }
    }
}
