//! The bench's stand-in for an engine: no model, no arithmetic, the same interface.
//!
//! `stoker bench overhead` measures everything around the engine (sockets, frames, admission, streaming) by running a
//! worker with this in it. Its ids mean nothing; nothing but the bench uses it.

use std::collections::VecDeque;

use stoker_types::{FinishReason, clock};

use crate::{
    Begun, End, EngineLimits, EngineStats, NewToken, SequenceRequest, StepEngine, StepOutput, SubmitError,
    engine::{WAITING_MAX, check},
};

/// Answers every step with one token for every running sequence: `(prompt's last id + position) % vocab_size`.
#[derive(Debug)]
pub struct StandIn {
    limits: EngineLimits,
    vocab_size: u32,
    running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
    aborted: Vec<u64>,
    stats: EngineStats,
}

#[derive(Debug)]
struct Sequence {
    key: u64,
    prompt_tokens: usize,
    seed: u32,
    position: u32,
    tokens_max: u32,
    stop_ids: Vec<u32>,
    begun: bool,
    submitted: clock::Instant,
}

// === impl StandIn ===

impl StandIn {
    /// A stand-in that obeys the same limits as an engine would, apart from KV memory, which it doesn't use.
    #[must_use]
    pub fn new(limits: EngineLimits, vocab_size: u32) -> Self {
        Self {
            limits,
            vocab_size: vocab_size.max(1),
            running: Vec::new(),
            waiting: VecDeque::new(),
            aborted: Vec::new(),
            stats: EngineStats::default(),
        }
    }
}

impl StepEngine for StandIn {
    fn submit(&mut self, request: SequenceRequest) -> Result<(), SubmitError> {
        check(&request, self.limits.context, self.vocab_size)?;
        let SequenceRequest { key, prompt, generated, tokens_max, stop_ids, .. } = request;
        if self.running.iter().chain(&self.waiting).any(|s| s.key == key) {
            return Err(SubmitError::DuplicateKey { key });
        }
        if self.waiting.len() >= WAITING_MAX {
            return Err(SubmitError::QueueFull { waiting: self.waiting.len() });
        }
        self.waiting.push_back(Sequence {
            key,
            prompt_tokens: prompt.len(),
            seed: prompt.last().copied().unwrap_or(0),
            position: u32::try_from(generated.len()).unwrap_or(u32::MAX),
            tokens_max,
            stop_ids,
            begun: false,
            submitted: clock::now(),
        });
        Ok(())
    }

    fn abort(&mut self, key: u64) {
        self.aborted.push(key);
    }

    fn step(&mut self) -> StepOutput {
        let mut output = StepOutput::default();
        for key in self.aborted.drain(..) {
            let before = self.running.len() + self.waiting.len();
            self.running.retain(|s| s.key != key);
            self.waiting.retain(|s| s.key != key);
            if self.running.len() + self.waiting.len() < before {
                output.ends.push(End { key, finish: FinishReason::Cancelled });
            }
        }
        while self.running.len() < self.limits.sequences_max as usize
            && let Some(sequence) = self.waiting.pop_front()
        {
            self.running.push(sequence);
        }
        if self.running.is_empty() {
            return output;
        }
        self.stats.steps += 1;
        let (vocab_size, context) = (self.vocab_size, self.limits.context as usize);
        self.running.retain_mut(|s| {
            if !s.begun {
                s.begun = true;
                let waited = s.submitted.elapsed();
                let prefill = std::time::Duration::ZERO;
                output.begun.push(Begun { key: s.key, waited, prefill, cached_tokens: 0 });
            }
            let full = s.prompt_tokens + s.position as usize >= context;
            if full || s.position >= s.tokens_max {
                output.ends.push(End { key: s.key, finish: FinishReason::Length });
                return false;
            }
            let id = s.seed.wrapping_add(s.position) % vocab_size;
            output.tokens.push(NewToken {
                key: s.key,
                position: s.position,
                id,
                logprob: None,
                top: Vec::new(),
            });
            s.position += 1;
            self.stats.tokens += 1;
            let finish = if s.stop_ids.contains(&id) {
                FinishReason::Stop
            } else if s.position >= s.tokens_max || s.prompt_tokens + s.position as usize >= context {
                FinishReason::Length
            } else {
                return true;
            };
            output.ends.push(End { key: s.key, finish });
            false
        });
        output
    }

    fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    fn stats(&self) -> EngineStats {
        EngineStats { running: self.running.len(), waiting: self.waiting.len(), ..self.stats }
    }
}

#[cfg(test)]
mod tests {
    use stoker_types::Sampling;

    use super::*;

    #[test]
    fn it_obeys_the_interface() {
        let limits = EngineLimits { context: 64, sequences_max: 1, kv_bytes: 0, prefill_tokens_per_step: 64 };
        let mut engine = StandIn::new(limits, 10);
        let request = |key, tokens_max, stop_ids| SequenceRequest {
            key,
            prompt: vec![3],
            generated: Vec::new(),
            tokens_max,
            stop_ids,
            sampling: Sampling::default(),
            cache_salt: Vec::new(),
        };
        engine.submit(request(1, 3, vec![])).unwrap();
        engine.submit(request(2, 9, vec![4])).unwrap();
        engine.submit(request(3, 9, vec![])).unwrap();
        assert!(matches!(engine.submit(request(3, 9, vec![])), Err(SubmitError::DuplicateKey { key: 3 })));
        engine.abort(3);
        let (mut ids, mut ends) = (Vec::new(), Vec::new());
        while !engine.is_idle() {
            let output = engine.step();
            ids.extend(output.tokens.iter().map(|t| (t.key, t.id)));
            ends.extend(output.ends.iter().map(|e| (e.key, e.finish)));
        }
        assert_eq!(ids, [(1, 3), (1, 4), (1, 5), (2, 3), (2, 4)]);
        assert_eq!(ends, [(3, FinishReason::Cancelled), (1, FinishReason::Length), (2, FinishReason::Stop)]);
    }
}
