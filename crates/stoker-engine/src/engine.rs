//! Continuous batching: every step computes one batch of rows for all running sequences.
//!
//! Sequences are computed in order of arrival. Those that only need their next token come first; what is left of the
//! prefill budget goes to prompts in chunks. Results don't depend on any of this: a row's result depends on that row
//! and its own KV alone, so a sequence that is batched, chunked, preempted and computed again, or resumed from its
//! ledger brings the same ids as when served alone.
//!
//! KV memory: a sequence is admitted when its blocks are there, all of them for what is known of it, and one more for
//! each running sequence to grow. When growth finds none, the youngest running sequence gives its KV up and waits at
//! the head of the queue; the oldest always advances, so everything ends.

use std::collections::{HashSet, VecDeque};

use parking_lot::Mutex;
use stoker_types::{FinishReason, Sampling, clock};

use crate::{
    Batch, Begun, End, EngineError, EngineLimits, EngineStats, Failure, Model, NewToken, SequenceRequest,
    Span, StepEngine, StepOutput, SubmitError,
    kv::{BlockPool, BlockTable},
    sampling::{self, Choice, Occurrences, Sampler, SamplingError},
};

/// Most sequences that wait in an engine. Admission control is the gateway's; this bounds what a broken one can do.
pub(crate) const WAITING_MAX: usize = 1024;

/// One model, its KV cache and the sequences that it computes. One owner; no thread of its own but the model's.
pub struct Engine {
    model: Box<dyn Model>,
    limits: EngineLimits,
    pool: BlockPool,
    /// One for each of the model's threads.
    samplers: Vec<Mutex<Sampler>>,
    /// In order of arrival.
    running: Vec<Sequence>,
    /// In order of arrival; a preempted sequence is older than all that were never admitted.
    waiting: VecDeque<Sequence>,
    aborted: HashSet<u64>,
    /// Sequences that had ended when they were submitted (a ledger whose last token is a stop id).
    ended: Vec<End>,
    stats: EngineStats,
    buffers: Buffers,
}

/// Kept between steps so that a step allocates little.
#[derive(Default)]
struct Buffers {
    tokens: Vec<u32>,
    logit_rows: Vec<usize>,
}

struct Sequence {
    key: u64,
    /// Prompt, then generated.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    /// Tokens whose KV is there; less than all of them.
    computed: usize,
    /// While running.
    table: Option<BlockTable>,
    /// Most tokens in all.
    tokens_end: usize,
    stop_ids: Vec<u32>,
    sampling: Sampling,
    salt: Vec<u8>,
    /// Counted only where a penalty needs them.
    occurrences: Occurrences,
    counts: bool,
    submitted: clock::Instant,
    /// When its first row was computed.
    began: Option<clock::Instant>,
    /// [`Begun`] has been reported.
    begun: bool,
    cached_tokens: usize,
}

/// Rows of one sequence in a step: `computed .. computed + rows`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Share {
    /// Index into [`Engine::running`].
    sequence: usize,
    rows: usize,
}

/// Checks a request against what a model can do.
pub(crate) fn check(request: &SequenceRequest, context: u32, vocab_size: u32) -> Result<(), SubmitError> {
    if request.prompt.is_empty() {
        return Err(SubmitError::EmptyPrompt);
    }
    if request.prompt.len() >= context as usize {
        return Err(SubmitError::TooLong { tokens: request.prompt.len(), context });
    }
    if let Some(&id) = request.prompt.iter().chain(&request.generated).find(|id| **id >= vocab_size) {
        return Err(SubmitError::UnknownToken { id, vocab_size });
    }
    sampling::validate(&request.sampling, vocab_size)
}

// === impl Engine ===

impl Engine {
    /// An engine around a model. Memory for KV is taken as sequences need it and given back when the engine is dropped.
    ///
    /// # Errors
    /// [`EngineError::KvTooSmall`] when not even one block fits into `kv_bytes`, and [`EngineError::Limits`] for a limit
    /// of zero.
    pub fn new(mut model: Box<dyn Model>, limits: EngineLimits) -> Result<Self, EngineError> {
        let EngineLimits { context, sequences_max, kv_bytes, prefill_tokens_per_step } = limits;
        for (limit, value) in [
            ("context", context),
            ("sequences_max", sequences_max),
            ("prefill_tokens_per_step", prefill_tokens_per_step),
        ] {
            if value == 0 {
                return Err(EngineError::Limits { limit });
            }
        }
        let block_bytes = model.kv_block_bytes();
        let blocks = usize::try_from(kv_bytes / block_bytes).unwrap_or(usize::MAX);
        if blocks == 0 {
            return Err(EngineError::KvTooSmall { kv_bytes, block_bytes });
        }
        // No more than all sequences at their full length, and the cache, can ever use; block ids are 32 bits wide.
        let blocks = blocks.min(u32::MAX as usize);
        model.open_kv(blocks)?;
        let samplers = (0..model.threads().count()).map(|_| Mutex::default()).collect();
        Ok(Self {
            model,
            limits,
            pool: BlockPool::new(blocks),
            samplers,
            running: Vec::new(),
            waiting: VecDeque::new(),
            aborted: HashSet::new(),
            ended: Vec::new(),
            stats: EngineStats::default(),
            buffers: Buffers::default(),
        })
    }

    /// Ends aborted sequences and reports those that ended when they were submitted.
    fn end_early(&mut self, output: &mut StepOutput) {
        output.ends.append(&mut self.ended);
        if self.aborted.is_empty() {
            return;
        }
        let aborted = std::mem::take(&mut self.aborted);
        let mut keep = |sequence: &Sequence| {
            let aborted = aborted.contains(&sequence.key);
            if aborted {
                output.ends.push(End { key: sequence.key, finish: FinishReason::Cancelled });
            }
            !aborted
        };
        self.running.retain(&mut keep);
        self.waiting.retain(keep);
    }

    /// Admits waiting sequences in order, as long as there is a place and KV memory for the next.
    fn admit(&mut self) {
        while self.running.len() < self.limits.sequences_max as usize
            && let Some(mut sequence) = self.waiting.pop_front()
        {
            let mut table = self.pool.table(&sequence.salt, &sequence.tokens);
            let needed = BlockPool::blocks_for(sequence.tokens.len()) - table.blocks().len();
            let headroom = self.running.len();
            if needed + headroom > self.pool.available() || table.grow(sequence.tokens.len()).is_err() {
                self.waiting.push_front(sequence);
                return;
            }
            sequence.reuse(table.published_tokens(), &mut self.stats);
            sequence.table = Some(table);
            self.running.push(sequence);
        }
    }

    /// Decides which rows this step computes. Afterwards every chosen sequence has the blocks for its rows.
    fn schedule(&mut self) -> Vec<Share> {
        let mut shares = Vec::with_capacity(self.running.len());
        let mut prefilling = Vec::new();
        let mut at = 0;
        while at < self.running.len() {
            let sequence = &mut self.running[at];
            if sequence.pending() > 1 {
                prefilling.push(at);
                at += 1;
                continue;
            }
            let table = sequence.table.as_mut().expect("a running sequence has a table");
            if table.grow(sequence.tokens.len()).is_ok() {
                shares.push(Share { sequence: at, rows: 1 });
                at += 1;
            } else {
                // The youngest, which may be this one; never one before it, whose rows are chosen already.
                self.preempt_youngest();
            }
        }
        prefilling.retain(|at| *at < self.running.len());
        self.share_prefill(&prefilling, &mut shares);
        shares
    }

    /// The youngest running sequence gives up its KV and is computed again later.
    fn preempt_youngest(&mut self) {
        let mut sequence = self.running.pop().expect("somebody is running who asks for room");
        sequence.table = None;
        sequence.computed = 0;
        self.stats.preemptions += 1;
        self.waiting.push_front(sequence);
    }

    /// Divides the prefill budget: half of it is the oldest's, so that a long prompt always advances; of the rest the
    /// shortest are served first, so that a short prompt doesn't wait for a long one; what remains is the oldest's again.
    fn share_prefill(&mut self, prefilling: &[usize], shares: &mut Vec<Share>) {
        let mut chosen: Vec<Share> = Vec::with_capacity(prefilling.len());
        for &at in prefilling {
            let (before, [sequence, ..]) = self.running.split_at_mut(at) else { continue };
            let table = sequence.table.as_mut().expect("a running sequence has a table");
            let computed = table.adopt(&sequence.tokens, sequence.computed);
            // Another sequence with the same beginning (of `n` answers to one prompt, say) computes the next block:
            // this one takes it over when it is published.
            let waits = chosen.iter().any(|share| {
                let other = &before[share.sequence];
                let others_table = other.table.as_ref().expect("a running sequence has a table");
                computed == table.published_tokens()
                    && table.computes_same(&sequence.tokens, others_table, &other.tokens)
            });
            sequence.reuse(computed, &mut self.stats);
            if !waits {
                chosen.push(Share { sequence: at, rows: 0 });
            }
        }
        let mut budget = self.limits.prefill_tokens_per_step as usize;
        let Some(oldest) = chosen.first_mut() else { return };
        oldest.rows = self.running[oldest.sequence].pending().min(budget.div_ceil(2));
        budget -= oldest.rows;
        let mut order: Vec<usize> = (1..chosen.len()).collect();
        order.sort_by_key(|i| self.running[chosen[*i].sequence].pending());
        for at in order {
            let share = &mut chosen[at];
            share.rows = self.running[share.sequence].pending().min(budget);
            budget -= share.rows;
        }
        let oldest = &mut chosen[0];
        oldest.rows += (self.running[oldest.sequence].pending() - oldest.rows).min(budget);
        shares.extend(chosen.into_iter().filter(|share| share.rows > 0));
    }

    /// Computes the rows and has the model keep the logits of the sequences whose last token is among them, in order.
    fn compute(&mut self, shares: &[Share]) -> Result<(), EngineError> {
        let now = clock::now();
        let Buffers { tokens, logit_rows } = &mut self.buffers;
        tokens.clear();
        logit_rows.clear();
        for share in shares {
            let sequence = &mut self.running[share.sequence];
            sequence.began.get_or_insert(now);
            let rows = sequence.computed..sequence.computed + share.rows;
            tokens.extend_from_slice(&sequence.tokens[rows.clone()]);
            if rows.end == sequence.tokens.len() {
                logit_rows.push(tokens.len() - 1);
            }
        }
        self.model.grow_kv(self.pool.touched())?;
        let spans: Vec<Span<'_>> = shares
            .iter()
            .map(|share| {
                let sequence = &self.running[share.sequence];
                let table = sequence.table.as_ref().expect("a running sequence has a table");
                Span { rows: share.rows, start: sequence.computed, blocks: table.blocks() }
            })
            .collect();
        self.model.forward(&Batch { tokens, spans: &spans, logit_rows })
    }

    /// Ends the sequences of a step that could not be computed.
    fn fail(&mut self, shares: &[Share], error: &EngineError, output: &mut StepOutput) {
        tracing::error!(%error, sequences = shares.len(), "a step failed");
        let failed: HashSet<u64> = shares.iter().map(|share| self.running[share.sequence].key).collect();
        self.running.retain(|sequence| {
            let fails = failed.contains(&sequence.key);
            if fails {
                output.failures.push(Failure { key: sequence.key, message: error.to_string() });
            }
            !fails
        });
        output.broken = error.is_fatal();
    }

    /// Takes note of what was computed, and chooses tokens.
    fn advance(&mut self, shares: &[Share], output: &mut StepOutput) {
        let mut choosing = Vec::with_capacity(shares.len());
        let now = clock::now();
        for share in shares {
            let sequence = &mut self.running[share.sequence];
            if share.rows > 1 || !sequence.begun {
                self.stats.prefill_tokens += share.rows as u64;
            }
            sequence.computed += share.rows;
            let table = sequence.table.as_mut().expect("a running sequence has a table");
            table.publish(&sequence.tokens, sequence.computed);
            if sequence.pending() > 0 {
                continue;
            }
            choosing.push(share.sequence);
            if !sequence.begun {
                sequence.begun = true;
                let began = sequence.began.unwrap_or(now);
                output.begun.push(Begun {
                    key: sequence.key,
                    waited: began.saturating_duration_since(sequence.submitted),
                    prefill: now.saturating_duration_since(began),
                    cached_tokens: count(sequence.cached_tokens.min(sequence.prompt_tokens)),
                });
            }
        }
        let mut over = HashSet::new();
        for (at, choice) in choosing.iter().zip(self.choose(&choosing)) {
            let sequence = &mut self.running[*at];
            let position = sequence.position();
            match choice {
                Ok(Choice { token, logprob, top }) => {
                    self.stats.tokens += 1;
                    output.tokens.push(NewToken { key: sequence.key, position, id: token, logprob, top });
                    sequence.push(token);
                    if let Some(finish) = sequence.finish() {
                        output.ends.push(End { key: sequence.key, finish });
                        over.insert(sequence.key);
                    }
                }
                Err(error) => {
                    tracing::error!(position, %error, "the model computed no usable logits");
                    output.failures.push(Failure { key: sequence.key, message: error.to_string() });
                    over.insert(sequence.key);
                }
            }
        }
        if !over.is_empty() {
            self.running.retain(|sequence| !over.contains(&sequence.key));
        }
    }

    /// The next tokens of some running sequences, whose logits the model has in the same order. On all of the
    /// model's threads: with many cores or a large vocabulary one thread would be what a step waits for.
    fn choose(&self, sequences: &[usize]) -> Vec<Result<Choice, SamplingError>> {
        let Self { model, running, samplers, .. } = self;
        let rows = model.logits().chunks_exact(model.vocab_size() as usize);
        assert_eq!(rows.len(), sequences.len(), "the model computed the logits that were asked for");
        let choices: Vec<Mutex<Result<Choice, SamplingError>>> =
            sequences.iter().map(|_| Mutex::new(Err(SamplingError::Empty))).collect();
        model.threads().parallel(sequences.len(), 1, |range, thread| {
            let mut sampler = samplers[thread].lock();
            for at in range {
                let sequence = &running[sequences[at]];
                let Sequence { sampling, occurrences, .. } = sequence;
                let Some(row) = rows.clone().nth(at) else { continue };
                *choices[at].lock() = sampler.choose(row, sampling, occurrences, sequence.position());
            }
        });
        choices.into_iter().map(Mutex::into_inner).collect()
    }
}

impl StepEngine for Engine {
    fn submit(&mut self, request: SequenceRequest) -> Result<(), SubmitError> {
        check(&request, self.limits.context, self.model.vocab_size())?;
        let SequenceRequest { key, prompt, generated, tokens_max, stop_ids, sampling, cache_salt } = request;
        let in_use = self.running.iter().chain(&self.waiting).any(|s| s.key == key)
            || self.ended.iter().any(|end| end.key == key);
        if in_use {
            return Err(SubmitError::DuplicateKey { key });
        }
        if self.waiting.len() + self.ended.len() >= WAITING_MAX {
            return Err(SubmitError::QueueFull { waiting: self.waiting.len() });
        }
        let prompt_tokens = prompt.len();
        let tokens_end = prompt_tokens.saturating_add(tokens_max as usize).min(self.limits.context as usize);
        // The last token's KV is never computed.
        let blocks = BlockPool::blocks_for(tokens_end - 1);
        let capacity = self.pool.usage().capacity;
        if blocks > capacity {
            let block_bytes = self.model.kv_block_bytes();
            return Err(SubmitError::OutOfMemory {
                tokens: tokens_end as u64,
                needed_bytes: blocks as u64 * block_bytes,
                kv_bytes: capacity as u64 * block_bytes,
            });
        }
        let counts = sampling::counts_occurrences(&sampling);
        let occurrences = if counts { Occurrences::of(&prompt, &generated) } else { Occurrences::default() };
        let mut tokens = prompt;
        tokens.extend_from_slice(&generated);
        let sequence = Sequence {
            key,
            tokens,
            prompt_tokens,
            computed: 0,
            table: None,
            tokens_end,
            stop_ids,
            sampling,
            salt: cache_salt,
            occurrences,
            counts,
            submitted: clock::now(),
            began: None,
            begun: false,
            cached_tokens: 0,
        };
        match sequence.finish() {
            Some(finish) => self.ended.push(End { key, finish }),
            None => self.waiting.push_back(sequence),
        }
        Ok(())
    }

    fn abort(&mut self, key: u64) {
        if self.running.iter().chain(&self.waiting).any(|s| s.key == key) {
            self.aborted.insert(key);
        }
    }

    fn step(&mut self) -> StepOutput {
        let mut output = StepOutput::default();
        self.end_early(&mut output);
        self.admit();
        let shares = self.schedule();
        if !shares.is_empty() {
            self.stats.steps += 1;
            match self.compute(&shares) {
                Ok(()) => self.advance(&shares, &mut output),
                Err(error) => self.fail(&shares, &error, &mut output),
            }
        }
        output
    }

    fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty() && self.ended.is_empty()
    }

    fn stats(&self) -> EngineStats {
        let usage = self.pool.usage();
        let bytes = |blocks: usize| blocks as u64 * self.model.kv_block_bytes();
        EngineStats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            kv_bytes_used: bytes(usage.used),
            kv_bytes_cached: bytes(usage.cached),
            kv_bytes_max: bytes(usage.capacity),
            device_bytes: self.model.device_bytes(),
            ..self.stats
        }
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("limits", &self.limits)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

// === impl Sequence ===

impl Sequence {
    /// Tokens whose KV is missing.
    fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Of the next token, among the generated ones.
    fn position(&self) -> u32 {
        count(self.tokens.len() - self.prompt_tokens)
    }

    /// The KV of the first `computed` tokens turned out to be there.
    fn reuse(&mut self, computed: usize, stats: &mut EngineStats) {
        let reused = computed - self.computed;
        self.computed = computed;
        if !self.begun {
            self.cached_tokens += reused;
            stats.cached_tokens += reused as u64;
        }
    }

    fn push(&mut self, token: u32) {
        self.tokens.push(token);
        if self.counts {
            self.occurrences.generated(token);
        }
    }

    /// Why it is over, if it is.
    fn finish(&self) -> Option<FinishReason> {
        let generated = &self.tokens[self.prompt_tokens..];
        if generated.last().is_some_and(|last| self.stop_ids.contains(last)) {
            Some(FinishReason::Stop)
        } else if self.tokens.len() >= self.tokens_end {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}

fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        Threads,
        kv::BLOCK_TOKENS,
        storage::{KvShape, KvStorage},
    };

    const VOCAB: u32 = 19;

    /// A model without arithmetic whose logits depend on every KV entry of the sequence, so that a block that is
    /// overwritten, stale, or another sequence's changes what is generated. Each entry is a hash of the entries before.
    struct Hashes(Threads, KvStorage, Vec<f32>);

    /// Of both models here.
    const SHAPE: KvShape = KvShape { layers: 1, kv_heads: 1, head_dim: 1 };

    fn hashes() -> Box<dyn Model> {
        Box::new(Hashes(Threads::new(1).unwrap(), KvStorage::new(SHAPE, 0).unwrap(), Vec::new()))
    }

    fn mix(a: u32, b: u32) -> u32 {
        let x = (a ^ b.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
        // Whole numbers below 2^24 are exact in f32.
        (x ^ x >> 13) & 0x00ff_ffff
    }

    #[expect(clippy::cast_possible_truncation, reason = "a whole number that was written as one")]
    fn read(entry: f32) -> u32 {
        entry as u32
    }

    impl Model for Hashes {
        fn vocab_size(&self) -> u32 {
            VOCAB
        }

        fn kv_block_bytes(&self) -> u64 {
            SHAPE.block_bytes()
        }

        fn open_kv(&mut self, capacity: usize) -> Result<(), EngineError> {
            self.1 = KvStorage::new(SHAPE, capacity)?;
            Ok(())
        }

        fn grow_kv(&mut self, blocks: usize) -> Result<(), EngineError> {
            self.1.ensure(blocks);
            Ok(())
        }

        fn threads(&self) -> &Threads {
            &self.0
        }

        fn logits(&self) -> &[f32] {
            &self.2
        }

        fn forward(&mut self, batch: &Batch<'_>) -> Result<(), EngineError> {
            let Self(_, kv, logits) = self;
            logits.clear();
            let layer = kv.layer_mut(0);
            let mut row = 0;
            for span in batch.spans {
                let at = |position: usize| {
                    span.blocks[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS
                };
                for position in span.start..span.start + span.rows {
                    let before = (0..position).fold(1, |hash, p| mix(hash, read(layer.keys[at(p)])));
                    let entry = mix(before, batch.tokens[row]);
                    layer.keys[at(position)] = entry as f32;
                    layer.values[at(position)] = position as f32;
                    if batch.logit_rows.contains(&row) {
                        logits.extend((0..VOCAB).map(|token| mix(entry, token) as f32 / 1e6));
                    }
                    row += 1;
                }
            }
            assert_eq!(row, batch.tokens.len());
            Ok(())
        }
    }

    /// Logits that are no numbers.
    struct Broken(Threads, Vec<f32>);

    impl Model for Broken {
        fn vocab_size(&self) -> u32 {
            VOCAB
        }

        fn kv_block_bytes(&self) -> u64 {
            SHAPE.block_bytes()
        }

        fn open_kv(&mut self, _: usize) -> Result<(), EngineError> {
            Ok(())
        }

        fn grow_kv(&mut self, _: usize) -> Result<(), EngineError> {
            Ok(())
        }

        fn threads(&self) -> &Threads {
            &self.0
        }

        fn logits(&self) -> &[f32] {
            &self.1
        }

        fn forward(&mut self, batch: &Batch<'_>) -> Result<(), EngineError> {
            self.1 = vec![f32::NAN; batch.logit_rows.len() * VOCAB as usize];
            Ok(())
        }
    }

    fn limits(blocks: u64) -> EngineLimits {
        EngineLimits {
            context: 400,
            sequences_max: 6,
            kv_bytes: blocks * SHAPE.block_bytes(),
            prefill_tokens_per_step: 48,
        }
    }

    fn request(key: u64, prompt: Vec<u32>, tokens_max: u32) -> SequenceRequest {
        SequenceRequest {
            key,
            prompt,
            generated: Vec::new(),
            tokens_max,
            stop_ids: Vec::new(),
            sampling: Sampling { seed: key, temperature: 0.8, ..Sampling::default() },
            cache_salt: Vec::new(),
        }
    }

    /// Everything that a set of sequences brought.
    #[derive(Default, PartialEq, Debug)]
    struct Outcome {
        ids: BTreeMap<u64, Vec<u32>>,
        ends: BTreeMap<u64, FinishReason>,
        begun: BTreeMap<u64, u32>,
    }

    impl Outcome {
        fn take(&mut self, output: StepOutput) {
            for begun in output.begun {
                assert!(!self.ids.contains_key(&begun.key), "begun comes before the first token");
                assert!(self.begun.insert(begun.key, begun.cached_tokens).is_none());
            }
            for token in output.tokens {
                let ids = self.ids.entry(token.key).or_default();
                ids.push(token.id);
                assert!(!self.ends.contains_key(&token.key), "nothing comes after the end");
            }
            for end in output.ends {
                assert!(self.ends.insert(end.key, end.finish).is_none(), "a sequence ends once");
            }
            assert!(output.failures.is_empty(), "{:?}", output.failures);
        }
    }

    fn run(engine: &mut Engine) -> Outcome {
        let mut outcome = Outcome::default();
        let mut steps = 0;
        while !engine.is_idle() {
            outcome.take(engine.step());
            steps += 1;
            assert!(steps < 20_000, "every sequence ends: {:?}", engine.stats());
        }
        assert_eq!(engine.stats().kv_bytes_used, 0, "no block is held by an idle engine");
        outcome
    }

    fn alone(request: &SequenceRequest) -> Vec<u32> {
        let mut engine = Engine::new(hashes(), limits(16)).unwrap();
        engine.submit(request.clone()).unwrap();
        run(&mut engine).ids.remove(&request.key).unwrap_or_default()
    }

    fn prompt(length: usize, seed: u32) -> Vec<u32> {
        (0..length).map(|i| mix(seed, u32::try_from(i).unwrap()) % VOCAB).collect()
    }

    #[test]
    fn a_sequence_ends_at_a_stop_id_at_its_length_or_at_the_context() {
        let mut engine = Engine::new(hashes(), limits(64)).unwrap();
        let full = alone(&request(1, prompt(5, 1), 20));
        assert_eq!(full.len(), 20);
        let stop_ids = vec![full[7]];
        let first = full.iter().position(|id| *id == full[7]).unwrap();
        engine.submit(SequenceRequest { stop_ids, ..request(1, prompt(5, 1), 20) }).unwrap();
        engine.submit(request(2, prompt(390, 2), 1000)).unwrap();
        engine.submit(request(3, prompt(5, 3), 0)).unwrap();
        let outcome = run(&mut engine);
        assert_eq!(outcome.ids[&1], full[..=first]);
        assert_eq!(outcome.ids[&2].len(), 10, "prompt and generated fill the context");
        assert_eq!(
            outcome.ends,
            BTreeMap::from([(1, FinishReason::Stop), (2, FinishReason::Length), (3, FinishReason::Length)])
        );
        assert!(!outcome.ids.contains_key(&3));
    }

    #[test]
    fn what_can_not_be_computed_is_refused() {
        let mut engine = Engine::new(hashes(), limits(4)).unwrap();
        engine.submit(request(1, prompt(3, 0), 5)).unwrap();
        let cases = [
            (request(2, vec![], 5), SubmitError::EmptyPrompt),
            (request(2, prompt(400, 0), 5), SubmitError::TooLong { tokens: 400, context: 400 }),
            (request(2, vec![19], 5), SubmitError::UnknownToken { id: 19, vocab_size: VOCAB }),
            (request(1, prompt(3, 0), 5), SubmitError::DuplicateKey { key: 1 }),
            (
                request(2, prompt(3, 0), 127),
                SubmitError::OutOfMemory { tokens: 130, needed_bytes: 5 * 256, kv_bytes: 4 * 256 },
            ),
            (
                SequenceRequest {
                    sampling: Sampling { top_p: 2.0, ..Sampling::default() },
                    ..request(2, prompt(3, 0), 5)
                },
                SubmitError::Sampling {
                    parameter: "top_p",
                    value: 2.0,
                    expected: "it must be above 0, at most 1",
                },
            ),
        ];
        for (request, expected) in cases {
            assert_eq!(engine.submit(request), Err(expected));
        }
        // A token whose KV is never needed takes no room.
        engine.submit(request(2, prompt(3, 0), 126)).unwrap();
        assert_eq!(run(&mut engine).ids[&2].len(), 126);
    }

    #[test]
    fn limits_of_zero_are_refused() {
        for (zero, error) in [
            (EngineLimits { context: 0, ..limits(4) }, "context"),
            (EngineLimits { sequences_max: 0, ..limits(4) }, "sequences_max"),
            (EngineLimits { prefill_tokens_per_step: 0, ..limits(4) }, "prefill_tokens_per_step"),
        ] {
            let found = Engine::new(hashes(), zero).unwrap_err();
            assert!(matches!(found, EngineError::Limits { limit } if limit == error));
        }
        let small = Engine::new(hashes(), EngineLimits { kv_bytes: 255, ..limits(4) }).unwrap_err();
        assert!(matches!(small, EngineError::KvTooSmall { kv_bytes: 255, block_bytes: 256 }));
    }

    #[test]
    fn the_queue_is_bounded() {
        let mut engine = Engine::new(hashes(), limits(4)).unwrap();
        for key in 0..WAITING_MAX as u64 {
            engine.submit(request(key, vec![1], 1)).unwrap();
        }
        let full = engine.submit(request(5000, vec![1], 1));
        assert_eq!(full, Err(SubmitError::QueueFull { waiting: WAITING_MAX }));
        assert_eq!(run(&mut engine).ends.len(), WAITING_MAX);
    }

    #[test]
    fn an_aborted_sequence_ends_at_the_next_step_and_gives_its_blocks_back() {
        let mut engine = Engine::new(hashes(), limits(64)).unwrap();
        for key in 0..8 {
            engine.submit(request(key, prompt(40, 1), 100)).unwrap();
        }
        for _ in 0..4 {
            engine.step();
        }
        assert_eq!((engine.stats().running, engine.stats().waiting), (6, 2));
        engine.abort(0);
        engine.abort(7);
        engine.abort(99);
        let output = engine.step();
        let mut cancelled: Vec<_> = output.ends.iter().map(|end| (end.key, end.finish)).collect();
        cancelled.sort_by_key(|(key, _)| *key);
        assert_eq!(cancelled, [(0, FinishReason::Cancelled), (7, FinishReason::Cancelled)]);
        assert!(output.tokens.iter().all(|token| token.key != 0));
        (1..7).for_each(|key| engine.abort(key));
        assert_eq!(engine.step().ends.len(), 6);
        assert!(engine.is_idle());
        assert_eq!(engine.stats().kv_bytes_used, 0);
        assert!(engine.step().is_empty());
    }

    #[test]
    fn logits_that_are_no_numbers_fail_their_sequence_only_once() {
        let mut engine =
            Engine::new(Box::new(Broken(Threads::new(2).unwrap(), Vec::new())), limits(8)).unwrap();
        engine.submit(request(3, prompt(4, 0), 9)).unwrap();
        let output = engine.step();
        assert_eq!(output.failures.len(), 1);
        assert!(output.failures[0].message.contains("not a finite number"), "{:?}", output.failures);
        assert!(output.tokens.is_empty() && output.ends.is_empty());
        assert!(engine.is_idle());
    }

    #[test]
    fn a_short_prompt_does_not_wait_for_a_long_one_and_the_long_one_advances() {
        let mut engine = Engine::new(hashes(), limits(64)).unwrap();
        engine.submit(request(1, prompt(390, 1), 2)).unwrap();
        engine.step();
        for key in 2..30 {
            engine.submit(request(key, prompt(20, u32::try_from(key).unwrap()), 3)).unwrap();
        }
        let mut first = BTreeMap::new();
        for step in 0.. {
            if engine.is_idle() {
                break;
            }
            for begun in engine.step().begun {
                first.insert(begun.key, step);
            }
        }
        assert_eq!(first[&2], 0, "its 20 tokens fit beside the long prompt's half");
        // The long one gets at least 24 of 48 tokens a step.
        assert!(first[&1] <= 390 / 24, "{first:?}");
    }

    #[test]
    fn answers_to_one_prompt_compute_it_once() {
        let mut engine = Engine::new(hashes(), limits(64)).unwrap();
        let text = prompt(200, 5);
        for key in 0..4 {
            engine.submit(request(key, text.clone(), 8)).unwrap();
        }
        let outcome = run(&mut engine);
        // All full blocks but the last tokens, once; then each its own rest.
        let shared = 200 / BLOCK_TOKENS * BLOCK_TOKENS;
        assert_eq!(engine.stats().prefill_tokens, (200 + 3 * (200 - shared)) as u64);
        assert_eq!(outcome.begun[&3], u32::try_from(shared).unwrap());
        for key in 0..4 {
            assert_eq!(outcome.ids[&key], alone(&request(key, text.clone(), 8)));
        }
        engine.submit(SequenceRequest { cache_salt: vec![1], ..request(9, text, 1) }).unwrap();
        assert_eq!(run(&mut engine).begun[&9], 0, "another salt shares nothing");
    }

    #[test]
    fn a_resumed_sequence_goes_on_as_it_would_have() {
        let penalised = SequenceRequest {
            sampling: Sampling {
                seed: 4,
                frequency_penalty: 0.4,
                repetition_penalty: 1.3,
                top_p: 0.9,
                ..Sampling::default()
            },
            ..request(1, prompt(50, 3), 40)
        };
        let full = alone(&penalised);
        for from in 0..=40 {
            let resumed = SequenceRequest { generated: full[..from].to_vec(), ..penalised.clone() };
            let mut engine = Engine::new(hashes(), limits(16)).unwrap();
            engine.submit(resumed).unwrap();
            let mut positions = Vec::new();
            let mut ids = Vec::new();
            while !engine.is_idle() {
                for token in engine.step().tokens {
                    positions.push(token.position as usize);
                    ids.push(token.id);
                }
            }
            assert_eq!(ids, full[from..]);
            assert_eq!(positions, (from..40).collect::<Vec<_>>());
        }
        let over = SequenceRequest { stop_ids: vec![7], generated: vec![3, 7], ..penalised };
        let mut engine = Engine::new(hashes(), limits(16)).unwrap();
        engine.submit(over).unwrap();
        assert_eq!(engine.step().ends, [End { key: 1, finish: FinishReason::Stop }]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

        /// Whatever the memory, the chunks, the arrivals and the aborts: each sequence brings what it brings alone.
        #[test]
        fn every_schedule_brings_the_same_ids(
            blocks in 14_u64..40,
            prefill_tokens_per_step in 1_u32..100,
            sequences_max in 1_u32..8,
            shapes in prop::collection::vec((1_usize..150, 0_u32..3, 0_u32..60, 0_usize..30, 0_u8..10), 1..14),
        ) {
            let limits = EngineLimits { prefill_tokens_per_step, sequences_max, ..limits(blocks) };
            let mut engine = Engine::new(hashes(), limits).unwrap();
            let mut outcome = Outcome::default();
            let mut requests = Vec::new();
            for (key, (length, seed, tokens_max, pause, abort)) in (0..).zip(shapes) {
                // Few beginnings, so that prefixes are shared.
                let request = request(key, prompt(length, seed), tokens_max);
                engine.submit(request.clone()).unwrap();
                requests.push(request);
                for _ in 0..pause {
                    outcome.take(engine.step());
                }
                if abort == 0 {
                    engine.abort(key / 2);
                }
            }
            let mut steps = 0;
            while !engine.is_idle() {
                outcome.take(engine.step());
                steps += 1;
                prop_assert!(steps < 20_000, "every sequence ends: {:?}", engine.stats());
            }
            prop_assert_eq!(engine.stats().kv_bytes_used, 0);
            for request in requests {
                let expected = alone(&request);
                let ids = outcome.ids.remove(&request.key).unwrap_or_default();
                if outcome.ends[&request.key] == FinishReason::Cancelled {
                    prop_assert!(expected.starts_with(&ids));
                } else {
                    prop_assert_eq!(ids, expected);
                }
            }
        }
    }

    #[test]
    fn sequences_that_do_not_fit_together_are_preempted_and_all_end() {
        let mut engine = Engine::new(hashes(), limits(14)).unwrap();
        let requests: Vec<_> =
            (0..6).map(|key| request(key, prompt(40, u32::try_from(key).unwrap()), 300)).collect();
        for request in &requests {
            engine.submit(request.clone()).unwrap();
        }
        let outcome = run(&mut engine);
        assert!(engine.stats().preemptions > 0, "{:?}", engine.stats());
        for request in &requests {
            assert_eq!(outcome.ids[&request.key], alone(request));
        }
    }
}
