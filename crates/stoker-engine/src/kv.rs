//! Who owns which block of the KV cache. No KV is in here: see [`KvStorage`](crate::KvStorage).
//!
//! A block holds the keys and values of [`BLOCK_TOKENS`] consecutive tokens of all layers. A sequence's blocks are in
//! its [`BlockTable`]; dropping the table gives them back. A full block whose KV is computed is *published* under the
//! tokens that it depends on (its own, and through the block before it all earlier ones and the salt) and stays usable
//! after its last owner is gone, until the room is needed: least recently used first. Keys are compared token by
//! token, so sharing never depends on a hash without a collision.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
};

use parking_lot::Mutex;

/// Tokens in a block.
pub const BLOCK_TOKENS: usize = 32;

/// A block's number: its place in the storage.
pub type BlockId = u32;

/// There are not enough blocks; nothing was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{missing} KV blocks are missing")]
pub struct OutOfBlocks {
    /// How many more would be needed.
    pub missing: usize,
}

/// The blocks of one model instance. A cheap handle.
#[derive(Clone)]
pub struct BlockPool {
    state: Arc<Mutex<State>>,
}

/// The blocks of one sequence, in order: block `i` holds tokens `i * BLOCK_TOKENS ..`. Gives them back when dropped.
pub struct BlockTable {
    pool: BlockPool,
    blocks: Vec<BlockId>,
    /// How many of `blocks`, from the first, are published, and under what the next one would be.
    published: usize,
    chain: Chain,
}

/// How the blocks are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockUsage {
    /// All there may be.
    pub capacity: usize,
    /// Held by tables.
    pub used: usize,
    /// Held by nobody, with KV that may be of use.
    pub cached: usize,
}

/// What a block's KV depends on besides its own tokens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Chain {
    /// Nothing but the salt: the first block.
    Salt(Arc<[u8]>),
    /// The block before it, by a number that is never used again.
    After(u64),
}

/// Under what a block is published.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    chain: Chain,
    tokens: [u32; BLOCK_TOKENS],
}

#[derive(Debug, Default)]
struct Block {
    /// Tables that hold it.
    owners: u32,
    published: Option<Published>,
    /// Its place in [`State::unowned`], while no table holds it.
    released: u64,
}

#[derive(Debug)]
struct Published {
    key: Key,
    serial: u64,
}

struct State {
    capacity: usize,
    /// Every block that was ever used; further ones are taken only when `free` is empty.
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    published: HashMap<Key, BlockId>,
    /// Published blocks that no table holds, by when they were released: the first is given up first.
    unowned: BTreeMap<u64, BlockId>,
    /// Counts releases and publications.
    clock: u64,
}

// === impl BlockPool ===

impl BlockPool {
    /// A pool of `capacity` blocks. Nothing is allocated for a block before its first use.
    ///
    /// # Panics
    /// When the capacity is above the largest [`BlockId`].
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        assert!(BlockId::try_from(capacity).is_ok(), "block ids are 32 bits wide");
        let state = State {
            capacity,
            blocks: Vec::new(),
            free: Vec::new(),
            published: HashMap::new(),
            unowned: BTreeMap::new(),
            clock: 0,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// A table for a sequence that begins with `tokens`, holding the published blocks of its longest known prefix: at
    /// most `tokens.len() - 1` tokens, because the last must be computed for its logits.
    #[must_use]
    pub fn table(&self, salt: &[u8], tokens: &[u32]) -> BlockTable {
        let mut table = BlockTable {
            pool: self.clone(),
            blocks: Vec::new(),
            published: 0,
            chain: Chain::Salt(Arc::from(salt)),
        };
        table.adopt(tokens, 0);
        table
    }

    /// How many blocks can be taken: free ones and unowned ones.
    #[must_use]
    pub fn available(&self) -> usize {
        self.state.lock().available()
    }

    /// How the blocks are used.
    #[must_use]
    pub fn usage(&self) -> BlockUsage {
        let state = self.state.lock();
        let cached = state.unowned.len();
        BlockUsage { capacity: state.capacity, used: state.capacity - state.available(), cached }
    }

    /// How many blocks were ever used: ids are below this.
    #[must_use]
    pub fn touched(&self) -> usize {
        self.state.lock().blocks.len()
    }

    /// Blocks for so many tokens.
    #[must_use]
    pub const fn blocks_for(tokens: usize) -> usize {
        tokens.div_ceil(BLOCK_TOKENS)
    }
}

impl fmt::Debug for BlockPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.usage().fmt(f)
    }
}

// === impl BlockTable ===

impl BlockTable {
    /// The blocks, in order.
    #[must_use]
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Tokens at the beginning whose KV is known to be computed because their blocks are published.
    #[must_use]
    pub fn published_tokens(&self) -> usize {
        self.published * BLOCK_TOKENS
    }

    /// Makes room for `tokens` tokens in all. Takes all that is missing or nothing.
    ///
    /// # Errors
    /// [`OutOfBlocks`].
    pub fn grow(&mut self, tokens: usize) -> Result<(), OutOfBlocks> {
        let missing = BlockPool::blocks_for(tokens).saturating_sub(self.blocks.len());
        if missing == 0 {
            return Ok(());
        }
        let mut state = self.pool.state.lock();
        let available = state.available();
        if missing > available {
            return Err(OutOfBlocks { missing: missing - available });
        }
        for _ in 0..missing {
            let block = state.take();
            self.blocks.push(block);
        }
        Ok(())
    }

    /// Publishes the full blocks among the first `computed` of `tokens`. Where another sequence has published the same
    /// block meanwhile, this table takes that one and gives its own back: their KV is equal to the bit, because a
    /// row's result doesn't depend on its batch.
    ///
    /// # Panics
    /// When `computed` tokens are not in `tokens` or not in the table.
    pub fn publish(&mut self, tokens: &[u32], computed: usize) {
        let full = computed / BLOCK_TOKENS;
        if full <= self.published {
            return;
        }
        assert!(full <= self.blocks.len(), "only blocks of the table can be computed");
        let (blocks, _) = tokens[..computed].as_chunks::<BLOCK_TOKENS>();
        let mut state = self.pool.state.lock();
        for (held, tokens) in self.blocks[..full].iter_mut().zip(blocks).skip(self.published) {
            let key = Key { chain: self.chain.clone(), tokens: *tokens };
            let (block, serial) = state.publish(*held, key);
            *held = block;
            self.chain = Chain::After(serial);
        }
        self.published = full;
    }

    /// Takes blocks that others have published meanwhile, for tokens from `computed` on, in place of this table's own.
    /// Returns how many tokens are computed then; at most `tokens.len() - 1`. Does nothing in the middle of a block.
    pub fn adopt(&mut self, tokens: &[u32], computed: usize) -> usize {
        if computed != self.published_tokens() {
            return computed;
        }
        let usable = &tokens[..tokens.len().saturating_sub(1)];
        let (blocks, _) = usable.as_chunks::<BLOCK_TOKENS>();
        let mut state = self.pool.state.lock();
        for tokens in blocks.iter().skip(self.published) {
            let key = Key { chain: self.chain.clone(), tokens: *tokens };
            let Some((block, serial)) = state.share(&key) else { break };
            match self.blocks.get_mut(self.published) {
                Some(held) => state.release(std::mem::replace(held, block)),
                None => self.blocks.push(block),
            }
            self.published += 1;
            self.chain = Chain::After(serial);
        }
        drop(state);
        self.published_tokens()
    }

    /// Whether this sequence and another one compute the same next block: `computed` tokens of each are done.
    #[must_use]
    pub fn computes_same(&self, tokens: &[u32], other: &Self, others_tokens: &[u32]) -> bool {
        let from = self.published_tokens();
        let block = from..from + BLOCK_TOKENS;
        self.chain == other.chain
            && tokens.len() > block.end
            && tokens.get(block.clone()) == others_tokens.get(block)
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock();
        // From the last: of a prefix, the end is given up first, so that what remains is still a prefix.
        for block in self.blocks.drain(..).rev() {
            state.release(block);
        }
    }
}

impl fmt::Debug for BlockTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockTable")
            .field("blocks", &self.blocks)
            .field("published", &self.published)
            .finish_non_exhaustive()
    }
}

// === impl State ===

impl State {
    fn available(&self) -> usize {
        self.capacity - self.blocks.len() + self.free.len() + self.unowned.len()
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn block(&mut self, block: BlockId) -> &mut Block {
        &mut self.blocks[block as usize]
    }

    /// A block for one owner. There is one available.
    fn take(&mut self) -> BlockId {
        let block = if let Some(block) = self.free.pop() {
            block
        } else if self.blocks.len() < self.capacity {
            self.blocks.push(Block::default());
            #[expect(clippy::cast_possible_truncation, reason = "checked when the pool was made")]
            {
                (self.blocks.len() - 1) as BlockId
            }
        } else {
            let (_, block) = self.unowned.pop_first().expect("the caller has seen that a block is available");
            let published = self.block(block).published.take().expect("unowned blocks are published");
            self.published.remove(&published.key);
            block
        };
        let taken = self.block(block);
        assert!(taken.owners == 0 && taken.published.is_none(), "a free block has no owner and no key");
        taken.owners = 1;
        block
    }

    /// One owner fewer.
    fn release(&mut self, block: BlockId) {
        let now = self.tick();
        let released = self.block(block);
        released.owners = released.owners.checked_sub(1).expect("a block is released once by each owner");
        if released.owners > 0 {
            return;
        }
        if released.published.is_some() {
            released.released = now;
            self.unowned.insert(now, block);
        } else {
            self.free.push(block);
        }
    }

    /// One owner more of the block with this key, and its serial number.
    fn share(&mut self, key: &Key) -> Option<(BlockId, u64)> {
        let block = *self.published.get(key)?;
        let shared = self.block(block);
        shared.owners += 1;
        let (first, released) = (shared.owners == 1, shared.released);
        let serial = shared.published.as_ref().map(|p| p.serial).expect("it was found under its key");
        if first {
            self.unowned.remove(&released);
        }
        Some((block, serial))
    }

    /// Publishes a block that has one owner, or gives it up for the one that is there already.
    fn publish(&mut self, block: BlockId, key: Key) -> (BlockId, u64) {
        if let Some((shared, serial)) = self.share(&key) {
            self.release(block);
            return (shared, serial);
        }
        let serial = self.tick();
        let published = self.block(block);
        assert!(published.owners == 1 && published.published.is_none(), "an unpublished block has one owner");
        published.published = Some(Published { key: key.clone(), serial });
        self.published.insert(key, block);
        (block, serial)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;

    fn tokens(n: usize, seed: u32) -> Vec<u32> {
        (0..).map(|i| i * 7 + seed).take(n).collect()
    }

    #[test]
    fn blocks_come_back_when_a_table_is_dropped() {
        let pool = BlockPool::new(4);
        let mut table = pool.table(b"", &tokens(40, 0));
        table.grow(40).unwrap();
        assert_eq!(table.blocks().len(), 2);
        assert_eq!(table.grow(BLOCK_TOKENS * 5), Err(OutOfBlocks { missing: 1 }));
        assert_eq!(table.blocks().len(), 2, "nothing is taken in vain");
        table.grow(BLOCK_TOKENS * 4).unwrap();
        assert_eq!(pool.available(), 0);
        drop(table);
        assert_eq!(pool.usage(), BlockUsage { capacity: 4, used: 0, cached: 0 });
    }

    #[test]
    fn a_published_prefix_is_found_again_up_to_the_last_token() {
        let pool = BlockPool::new(8);
        let text = tokens(3 * BLOCK_TOKENS, 0);
        let mut first = pool.table(b"a", &text);
        first.grow(text.len()).unwrap();
        first.publish(&text, text.len());
        let blocks = first.blocks().to_vec();
        for owned in [true, false] {
            if !owned {
                drop(std::mem::replace(&mut first, pool.table(b"other", &[])));
                assert_eq!(pool.usage().cached, 3);
            }
            let again = pool.table(b"a", &text);
            assert_eq!(again.blocks(), &blocks[..2], "the last token is computed again");
            let mut longer = text.clone();
            longer.push(1);
            assert_eq!(pool.table(b"a", &longer).blocks(), blocks);
            assert!(pool.table(b"b", &longer).blocks().is_empty(), "another salt shares nothing");
            longer[0] += 1;
            assert!(pool.table(b"a", &longer).blocks().is_empty(), "the prefix begins at the first token");
        }
    }

    #[test]
    fn the_same_block_computed_twice_becomes_one() {
        let pool = BlockPool::new(8);
        let text = tokens(BLOCK_TOKENS + 5, 0);
        let (mut a, mut b) = (pool.table(b"", &text), pool.table(b"", &text));
        a.grow(text.len()).unwrap();
        b.grow(text.len()).unwrap();
        assert!(a.computes_same(&text, &b, &text));
        a.publish(&text, text.len());
        b.publish(&text, text.len());
        assert_eq!(a.blocks()[0], b.blocks()[0]);
        assert_ne!(a.blocks()[1], b.blocks()[1]);
        assert_eq!(pool.usage().used, 3);
        let mut c = pool.table(b"", &text[..BLOCK_TOKENS]);
        c.grow(text.len()).unwrap();
        assert_eq!(c.adopt(&text, 0), BLOCK_TOKENS);
        assert_eq!(c.blocks()[0], a.blocks()[0]);
        assert_eq!(pool.usage().used, 4);
    }

    #[test]
    fn the_least_recently_used_end_is_given_up_first() {
        let pool = BlockPool::new(4);
        let (old, new) = (tokens(2 * BLOCK_TOKENS, 0), tokens(2 * BLOCK_TOKENS, 1));
        for text in [&old, &new] {
            let mut table = pool.table(b"", text);
            table.grow(text.len()).unwrap();
            table.publish(text, text.len());
        }
        let extended = |text: &[u32]| [text, &[0]].concat();
        let mut other = pool.table(b"", &[9]);
        other.grow(1).unwrap();
        assert_eq!(pool.table(b"", &extended(&new)).blocks().len(), 2);
        assert_eq!(
            pool.table(b"", &extended(&old)).blocks().len(),
            1,
            "its end is gone, its beginning isn't"
        );
    }

    /// A small generator, so that a failure repeats.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as usize % n
        }
    }

    /// What a sequence is, to the model: its tokens and how many are computed.
    struct Sequence {
        salt: u8,
        tokens: Vec<u32>,
        computed: usize,
        table: BlockTable,
    }

    /// The plain model: which text each block's KV was computed from. A block that is shared must hold just that text.
    #[test]
    fn random_operations_never_leak_a_block_or_use_one_twice() {
        const CAPACITY: usize = 24;
        let pool = BlockPool::new(CAPACITY);
        let mut random = Random(7);
        let mut sequences: Vec<Sequence> = Vec::new();
        let mut content: HashMap<BlockId, (u8, Vec<u32>)> = HashMap::new();
        let (mut shared, mut refused, mut adopted) = (0, 0, 0);
        for _ in 0..100_000 {
            match random.below(10) {
                0 | 1 if sequences.len() < 8 => {
                    // Few texts, so that prefixes meet.
                    let salt = u8::from(random.below(2) == 1);
                    let mut tokens = vec![0; 1 + random.below(5 * BLOCK_TOKENS)];
                    let from = random.below(tokens.len() + BLOCK_TOKENS);
                    tokens.iter_mut().skip(from).for_each(|t| *t = 1);
                    let table = pool.table(&[salt], &tokens);
                    let computed = table.published_tokens();
                    assert!(computed < tokens.len());
                    shared += computed;
                    sequences.push(Sequence { salt, tokens, computed, table });
                }
                2 if !sequences.is_empty() => {
                    let at = random.below(sequences.len());
                    sequences.swap_remove(at);
                }
                3 if !sequences.is_empty() => {
                    let at = random.below(sequences.len());
                    let sequence = &mut sequences[at];
                    let before = sequence.computed;
                    sequence.computed = sequence.table.adopt(&sequence.tokens, before);
                    adopted += sequence.computed - before;
                }
                4 if !sequences.is_empty() => {
                    let at = random.below(sequences.len());
                    let sequence = &mut sequences[at];
                    if sequence.computed == sequence.tokens.len() {
                        sequence.tokens.push(u32::from(random.below(2) == 1));
                    }
                }
                _ if !sequences.is_empty() => {
                    let at = random.below(sequences.len());
                    let sequence = &mut sequences[at];
                    let left = sequence.tokens.len() - sequence.computed;
                    let until = sequence.computed + random.below(left + 1);
                    let before = pool.available();
                    if sequence.table.grow(until).is_err() {
                        assert_eq!(pool.available(), before);
                        refused += 1;
                        continue;
                    }
                    // "Computing" writes every block between: none of them may be another's.
                    for i in sequence.computed / BLOCK_TOKENS..BlockPool::blocks_for(until) {
                        let end = until.min((i + 1) * BLOCK_TOKENS);
                        let text = (sequence.salt, sequence.tokens[..end].to_vec());
                        content.insert(sequence.table.blocks()[i], text);
                    }
                    sequence.computed = until;
                    sequence.table.publish(&sequence.tokens, until);
                }
                _ => {}
            }
            let mut owned = HashSet::new();
            for sequence in &sequences {
                let table = &sequence.table;
                for (i, block) in table.blocks().iter().enumerate() {
                    owned.insert(*block);
                    if i * BLOCK_TOKENS < sequence.computed {
                        let end = sequence.computed.min((i + 1) * BLOCK_TOKENS);
                        let (salt, text) = &content[block];
                        assert_eq!((*salt, &text[..]), (sequence.salt, &sequence.tokens[..end]));
                    }
                }
            }
            let usage = pool.usage();
            assert_eq!(usage.used, owned.len(), "a block is used if and only if a table holds it");
            assert_eq!(pool.available(), CAPACITY - owned.len());
            let state = pool.state.lock();
            assert!(state.unowned.values().all(|b| !owned.contains(b)));
            assert!(state.free.iter().all(|b| !owned.contains(b)));
        }
        sequences.clear();
        assert_eq!(pool.usage().used, 0);
        assert_eq!(pool.available(), CAPACITY);
        assert!(shared > 0 && refused > 0 && adopted > 0, "{shared} {refused} {adopted}: all was met");
    }
}
