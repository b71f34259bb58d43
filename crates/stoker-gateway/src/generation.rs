//! One request on its way through the engine: seat, sequences, tokens to text, the end.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use stoker_checkpoint::{detokenize::Detokenizer, stop::StopMatcher, text::TextAssets};
use stoker_types::{Admit, ClientId, FinishReason, RequestId, Sampling, SeatInfo, clock};
use tokio::time::Instant;

use crate::{
    backend::{Backend, Inbox, Outlet, Running, SequenceOrder, StreamEvent, StreamFailure, TokenLogprobs},
    errors::ApiError,
    request::{Api, ValidGenerateRequest},
    seams::{Placement, SeatHold, ServedModel},
    telemetry::Access,
    timeline::{EngineBegun, RequestTimeline},
};

/// Seats that a request may use up before its client has seen anything. More than one more only helps when instances
/// keep making room for others, and then the queue is the place to wait.
const SEATS_MAX: u32 = 4;
/// Workers that may die under a request before it fails: a request that kills workers must not go round.
const WORKERS_LOST_MAX: u32 = 1;

/// Who runs generations.
pub(crate) struct Engine {
    pub(crate) placement: Arc<dyn Placement>,
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) stream_tokens_max: usize,
    pub(crate) unstreamed_tokens_max: u32,
    /// KV blocks are not shared between clients when clients are told apart.
    pub(crate) isolate_clients: bool,
}

/// A running request. Dropping it aborts what runs and gives the seat back.
pub(crate) struct Generation {
    engine: Arc<Engine>,
    pub(crate) request: RequestId,
    client: ClientId,
    pub(crate) model: Arc<ServedModel>,
    pub(crate) assets: Arc<TextAssets>,
    pub(crate) valid: ValidGenerateRequest,
    access: Access,
    received: Instant,
    wait_max: Duration,
    inbox: Arc<Inbox>,
    batch: VecDeque<(u16, StreamEvent)>,
    sequences: Vec<Sequence>,
    /// Sequences that haven't ended.
    live: usize,
    seated: Instant,
    begun: Option<EngineBegun>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    pub(crate) cached_tokens: u32,
    pub(crate) timeline: RequestTimeline,
}

/// Everything that continues a sequence elsewhere: kept as long as it lives.
#[derive(Debug)]
struct Ledger {
    prompt: Arc<[u32]>,
    output: Vec<u32>,
    sampling: Sampling,
}

struct Sequence {
    ledger: Ledger,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// Log probabilities of tokens whose text hasn't been passed on.
    logprobs: Vec<(u32, TokenLogprobs)>,
    running: Option<Running>,
    ended: bool,
}

/// News of one sequence for the client.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Delta {
    pub(crate) sequence: u16,
    /// Tokens of the sequence that this and the deltas before it account for.
    pub(crate) position: u32,
    pub(crate) text: String,
    pub(crate) logprobs: Vec<(u32, TokenLogprobs)>,
    pub(crate) finish: Option<FinishReason>,
}

/// What a request used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u32,
    pub(crate) output_tokens: u32,
    pub(crate) cached_tokens: u32,
}

// === impl Generation ===

impl Generation {
    pub(crate) fn new(
        engine: Arc<Engine>,
        access: Access,
        client: ClientId,
        model: Arc<ServedModel>,
        assets: Arc<TextAssets>,
        valid: ValidGenerateRequest,
        wait_max: Duration,
    ) -> Self {
        let received = access.received();
        access.set_sequences(valid.sequences().into());
        let sequences: Vec<Sequence> = (0..valid.sequences())
            .map(|number| Sequence::new(&valid, &assets, usize::from(number)))
            .collect();
        let timeline = RequestTimeline { prepared: received.elapsed(), ..RequestTimeline::default() };
        Self {
            inbox: Arc::new(Inbox::new(valid.sequences(), engine.stream_tokens_max)),
            engine,
            request: access.request(),
            client,
            model,
            assets,
            valid,
            access,
            received,
            wait_max,
            batch: VecDeque::new(),
            live: sequences.len(),
            sequences,
            seated: received,
            begun: None,
            first_token: None,
            last_token: None,
            cached_tokens: 0,
            timeline,
        }
    }

    /// Gets a seat, starts the sequences and waits for the first news. As nothing has been passed on before, a seat
    /// that turns out to be gone is replaced by another. Not cancel-safe: a dropped call loses its place in the queue.
    pub(crate) async fn first(&mut self) -> Result<Delta, ApiError> {
        let mut seats = 0;
        let mut workers_lost = 0;
        loop {
            seats += 1;
            let failure = match self.attempt().await {
                Ok(delta) => return Ok(delta),
                Err(Attempt::Refused(error)) => return Err(error),
                Err(Attempt::Failed(failure)) => failure,
            };
            workers_lost += u32::from(matches!(failure, StreamFailure::WorkerGone { .. }));
            if !failure.another_seat_may_do() || seats == SEATS_MAX || workers_lost > WORKERS_LOST_MAX {
                return Err(failure.into());
            }
            tracing::debug!(request_id = %self.request, %failure, "trying another seat");
            metrics::counter!("stoker_gateway_seat_retries_total").increment(1);
            self.reset();
        }
    }

    /// The next news; `None` when every sequence has ended. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Option<Delta>, ApiError> {
        self.next_or_failure().await.map_err(ApiError::from)
    }

    /// News that is there already.
    pub(crate) fn next_ready(&mut self) -> Result<Option<Delta>, ApiError> {
        while let Some((sequence, event)) = self.batch.pop_front() {
            if let Some(delta) = self.apply(sequence, event)? {
                return Ok(Some(delta));
            }
        }
        Ok(None)
    }

    pub(crate) fn is_over(&self) -> bool {
        self.live == 0
    }

    pub(crate) fn usage(&self) -> Usage {
        let output: usize = self.sequences.iter().map(|s| s.ledger.output.len()).sum();
        Usage {
            prompt_tokens: self.valid.prompt_tokens(),
            output_tokens: u32::try_from(output).unwrap_or(u32::MAX),
            cached_tokens: self.cached_tokens,
        }
    }

    async fn attempt(&mut self) -> Result<Delta, Attempt> {
        let waited = self.received.elapsed();
        let seat = self.engine.placement.admit(Admit {
            model: self.model.name.clone(),
            request: self.request.clone(),
            client: self.client.clone(),
            sequences: self.valid.sequences().into(),
            prompt_tokens: self.valid.prompt_tokens(),
            wait_max: self.wait_max.saturating_sub(waited),
            keep_alive: self.valid.keep_alive,
        });
        let seat = seat.await.map_err(|refusal| Attempt::Refused(refusal.into()))?;
        self.seated = Instant::now();
        self.timeline.seated(&seat.info);
        self.access.set_queued(self.timeline.queued);
        let hold = SeatHold::new(seat.permit);
        self.start(&seat.info, hold).await?;
        match self.next_or_failure().await {
            Ok(Some(delta)) => Ok(delta),
            Ok(None) => Err(Attempt::Refused(ApiError::internal("a request without sequences"))),
            Err(failure) => Err(Attempt::Failed(failure)),
        }
    }

    async fn start(&mut self, seat: &SeatInfo, hold: SeatHold) -> Result<(), Attempt> {
        // The instance may have less context than the model.
        let context = seat.context.min(self.model.context);
        let answers_max =
            self.valid.answer_max(context, self.engine.unstreamed_tokens_max).map_err(Attempt::Refused)?;
        let cache_salt = if self.engine.isolate_clients {
            bytes::Bytes::copy_from_slice(self.client.0.as_bytes())
        } else {
            bytes::Bytes::new()
        };
        for (number, sequence) in (0_u16..).zip(&mut self.sequences) {
            let order = SequenceOrder {
                request: self.request.to_string(),
                prompt: Arc::clone(&sequence.ledger.prompt),
                tokens_max: answers_max[usize::from(number) / self.valid.n as usize],
                stop_ids: Arc::clone(&self.valid.stop_ids),
                sampling: sequence.ledger.sampling.clone(),
                cache_salt: cache_salt.clone(),
            };
            let outlet = Outlet { inbox: Arc::clone(&self.inbox), sequence: number, seat: hold.clone() };
            let running = self.engine.backend.start(seat, order, outlet).await.map_err(Attempt::Failed)?;
            sequence.running = Some(running);
        }
        Ok(())
    }

    /// Forgets what an attempt brought.
    fn reset(&mut self) {
        // A new inbox: news of the old attempt may still be on its way.
        self.inbox = Arc::new(Inbox::new(self.valid.sequences(), self.engine.stream_tokens_max));
        self.batch.clear();
        let count = self.sequences.len();
        self.sequences = (0..count).map(|number| Sequence::new(&self.valid, &self.assets, number)).collect();
        self.live = count;
        self.begun = None;
        self.cached_tokens = 0;
    }

    async fn next_or_failure(&mut self) -> Result<Option<Delta>, StreamFailure> {
        loop {
            while let Some((sequence, event)) = self.batch.pop_front() {
                if let Some(delta) = self.apply(sequence, event)? {
                    return Ok(Some(delta));
                }
            }
            if self.live == 0 {
                return Ok(None);
            }
            self.inbox.take(&mut self.batch).await;
        }
    }

    fn apply(&mut self, number: u16, event: StreamEvent) -> Result<Option<Delta>, StreamFailure> {
        let sequence = &mut self.sequences[usize::from(number)];
        if sequence.ended {
            // A stop string ended it before the engine did.
            return Ok(None);
        }
        let mut text = String::new();
        let finish = match event {
            StreamEvent::Begun { waited, prefill, cached_tokens } => {
                self.begun.get_or_insert_with(|| EngineBegun { waited, prefill, told_at: clock::wall() });
                let prompt = u32::try_from(sequence.ledger.prompt.len()).unwrap_or(u32::MAX);
                let computed = prompt.saturating_sub(cached_tokens);
                self.engine.placement.observe_prefill(&self.model.name, computed, prefill);
                self.cached_tokens += cached_tokens;
                return Ok(None);
            }
            StreamEvent::Failed(failure) => return Err(failure),
            StreamEvent::Token { position, id, logprobs } => {
                let now = Instant::now();
                self.last_token = Some(now);
                if self.first_token.is_none() {
                    self.first_token = Some(now);
                    self.timeline.first_token(now - self.received, now - self.seated, self.begun);
                }
                sequence.token(position, id, logprobs, &self.valid.stop_ids, &mut text)?
            }
            StreamEvent::End(FinishReason::Cancelled) => {
                // Nobody here asked for it, or it would have been taken as ended.
                return Err(StreamFailure::Unloaded { detail: "the engine cancelled the request".into() });
            }
            StreamEvent::End(reason) => {
                sequence.flush(&mut text);
                Some(reason)
            }
        };
        if finish.is_none() && text.is_empty() {
            return Ok(None);
        }
        if finish.is_some() {
            sequence.ended = true;
            // Aborts it if the engine goes on; gives its share of the seat back.
            sequence.running = None;
            self.live -= 1;
        }
        Ok(Some(Delta {
            sequence: number,
            position: sequence.position(),
            text,
            logprobs: std::mem::take(&mut sequence.logprobs),
            finish,
        }))
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        let usage = self.usage();
        self.access.set_tokens(usage.prompt_tokens, usage.output_tokens, self.first_token, self.last_token);
        self.access.set_timeline(std::mem::take(&mut self.timeline));
    }
}

/// Why an attempt came to nothing.
enum Attempt {
    /// The request isn't to be run.
    Refused(ApiError),
    /// The sequences failed before the client saw anything of them.
    Failed(StreamFailure),
}

// === impl Sequence ===

impl Sequence {
    fn new(valid: &ValidGenerateRequest, assets: &TextAssets, number: usize) -> Self {
        let n = valid.n as usize;
        let mut sampling = valid.sampling.clone();
        sampling.seed = sampling.seed.wrapping_add((number % n) as u64);
        Self {
            ledger: Ledger { prompt: Arc::clone(&valid.prompts[number / n]), output: Vec::new(), sampling },
            detokenizer: match valid.api {
                Api::Chat => Detokenizer::new(&assets.tokenizer, true),
                Api::Completion => Detokenizer::continuing(&assets.tokenizer, true),
            },
            stops: valid.stops.clone(),
            logprobs: Vec::new(),
            running: None,
            ended: false,
        }
    }

    fn position(&self) -> u32 {
        u32::try_from(self.ledger.output.len()).unwrap_or(u32::MAX)
    }

    /// Takes a token in: appends the text that may be passed on and says whether a stop string ended the sequence.
    fn token(
        &mut self,
        position: u32,
        id: u32,
        logprobs: Option<Box<TokenLogprobs>>,
        stop_ids: &[u32],
        text: &mut String,
    ) -> Result<Option<FinishReason>, StreamFailure> {
        if position != self.position() {
            let detail = format!("token {position} where {} was due", self.position());
            return Err(StreamFailure::Protocol { detail });
        }
        self.ledger.output.push(id);
        // The token that ends the turn is no part of the text; the engine's end follows.
        if stop_ids.binary_search(&id).is_ok() {
            return Ok(None);
        }
        if let Some(logprobs) = logprobs {
            self.logprobs.push((id, *logprobs));
        }
        let mut piece = String::new();
        self.detokenizer.push(id, &mut piece);
        Ok(self.stops.push(&piece, text).map(|_| FinishReason::Stop))
    }

    /// The text that was held back in case it went on as a character or a stop string.
    fn flush(&mut self, text: &mut String) {
        let mut piece = String::new();
        self.detokenizer.finish(&mut piece);
        if self.stops.push(&piece, text).is_none() {
            self.stops.finish(text);
        }
    }
}
