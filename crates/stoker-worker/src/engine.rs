//! The engine's thread: the one owner of the loaded model and of every sequence.
//!
//! Commands come by a bounded channel. Between two steps all commands that have come are obeyed; without sequences the
//! thread blocks on the channel. After a step each connection gets one frame with everything that the step brought
//! for its streams.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use stoker_engine::{SequenceRequest, StepEngine, StepOutput, SubmitError};
use stoker_proto::{
    control::{Loaded, Pong, Rename},
    stream::{Begun, End, Failure, FailureCode, Finish, FromWorker, Generate, Token, TopToken},
};
use stoker_types::{FinishReason, TokenLogprob, clock};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    connection::{Connection, ConnectionId},
    loader::{Landing, LoadError, LoadOrder, LoadedModel, Loader},
};

/// The engine's key of a sequence. Never reused.
type SequenceKey = u64;

/// What the engine's thread is asked to do.
pub(crate) enum Command {
    /// Take a model.
    Load { order: Box<LoadOrder>, reply: oneshot::Sender<Result<Loaded, LoadError>> },
    /// The delivery of a model has failed: look whether it is the one that is being served. Answered with the instance if
    /// it was, and is dropped.
    NotDelivered { reply: oneshot::Sender<Option<u64>> },
    /// An instance has other numbers from here on. Answered with whether it is there.
    Rename { order: Rename, reply: oneshot::Sender<bool> },
    /// Let the model go.
    Unload { instance: u64, force: bool, reply: oneshot::Sender<UnloadOutcome> },
    /// A new stream.
    Generate { connection: Arc<Connection>, message: Box<Generate>, arrived: clock::Instant },
    /// End a stream.
    Abort { connection: ConnectionId, stream: u64 },
    /// A connection is gone, and its streams with it.
    Closed { connection: ConnectionId },
    /// Take no new stream; the reply comes when none is running.
    Drain { reply: oneshot::Sender<Drained> },
    /// End what is still running.
    Finish,
}

/// What became of an unload.
pub(crate) enum UnloadOutcome {
    /// Nothing of it is mapped (any more).
    Unloaded,
    /// So many sequences are running.
    Refused { sequences: u32 },
}

/// No stream is running: the connections that may still have frames to write.
pub(crate) struct Drained {
    pub(crate) connections: Vec<Arc<Connection>>,
}

/// What others may read without asking the engine's thread.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    sequences: AtomicU32,
    steps: AtomicU64,
    kv_bytes_used: AtomicU64,
    tokens: AtomicU64,
    device_bytes: AtomicU64,
}

/// The engine's thread.
pub(crate) struct EngineThread {
    commands: mpsc::Receiver<Command>,
    loader: Box<dyn Loader>,
    counters: Arc<Counters>,
    model: Option<Model>,
    sequences: HashMap<SequenceKey, Owner>,
    connections: HashMap<ConnectionId, Streams>,
    next_sequence: SequenceKey,
    /// Connections with something in their pending frame.
    touched: Vec<ConnectionId>,
    draining: Option<Option<oneshot::Sender<Drained>>>,
}

struct Model {
    instance: u64,
    generation: u64,
    engine: Box<dyn StepEngine>,
    landing: watch::Receiver<Landing>,
}

/// Where a sequence's tokens go.
#[derive(Clone, Copy)]
struct Owner {
    connection: ConnectionId,
    stream: u64,
    /// From its arrival at the worker until the engine had it.
    queued: Duration,
}

/// Why a stream ends before it begins.
struct Refused {
    code: FailureCode,
    message: String,
}

/// A connection's streams.
struct Streams {
    connection: Arc<Connection>,
    running: HashMap<u64, SequenceKey>,
    pending: FromWorker,
}

// === impl EngineThread ===

impl EngineThread {
    pub(crate) fn new(
        commands: mpsc::Receiver<Command>,
        loader: Box<dyn Loader>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            commands,
            loader,
            counters,
            model: None,
            sequences: HashMap::new(),
            connections: HashMap::new(),
            next_sequence: 0,
            touched: Vec::new(),
            draining: None,
        }
    }

    /// Works until every sender of commands is gone.
    pub(crate) fn run(mut self) {
        loop {
            if self.is_idle() {
                match self.commands.blocking_recv() {
                    Some(command) => self.obey(command),
                    None => return,
                }
            }
            // As many as have come, not as they keep coming: streams that run are not starved by new ones.
            for _ in 0..self.commands.len() {
                match self.commands.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(_) => break,
                }
            }
            // Before the step, too: if it never ends, the node has to see that there were sequences.
            self.publish();
            if !self.is_idle() {
                self.step();
            }
            self.deliver();
            self.publish();
            self.report_drained();
        }
    }

    /// Nothing to compute. (A sequence that nobody wants any more still takes the engine a step to let go of.)
    fn is_idle(&self) -> bool {
        self.model.as_ref().is_none_or(|m| m.engine.is_idle())
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Load { order, reply } => {
                // Nobody waits for the reply when the node is gone; then the process ends soon.
                let _ = reply.send(self.load(*order));
            }
            Command::NotDelivered { reply } => {
                let _ = reply.send(self.not_delivered());
            }
            Command::Rename { order, reply } => {
                let _ = reply.send(self.rename(order));
            }
            Command::Unload { instance, force, reply } => {
                let _ = reply.send(self.unload(instance, force));
            }
            Command::Generate { connection, message, arrived } => {
                self.generate(connection, *message, arrived);
            }
            Command::Abort { connection, stream } => {
                let running = self.connections.get(&connection).and_then(|s| s.running.get(&stream));
                if let (Some(sequence), Some(model)) = (running, &mut self.model) {
                    model.engine.abort(*sequence);
                }
            }
            Command::Closed { connection } => self.drop_connection(connection),
            Command::Drain { reply } => self.draining = Some(Some(reply)),
            Command::Finish => self.fail_all("the worker is shutting down"),
        }
    }

    fn load(&mut self, order: LoadOrder) -> Result<Loaded, LoadError> {
        if let Some(model) = &self.model {
            return Err(LoadError::Failed(format!("the worker still serves instance {}", model.instance)));
        }
        let (instance, generation) = (order.load.instance, order.load.generation);
        let landing = order.landing.clone();
        landing.borrow().check()?;
        let LoadedModel { engine, map, init } = self.loader.load(order)?;
        // What is said of it from here on is obeyed as a command.
        landing.borrow().check()?;
        let device_bytes = engine.stats().device_bytes;
        self.model = Some(Model { instance, generation, engine, landing });
        tracing::info!(instance, ?map, ?init, "model loaded");
        Ok(Loaded { instance, map_us: micros(map), init_us: micros(init), device_bytes })
    }

    fn not_delivered(&mut self) -> Option<u64> {
        let model = self.model.as_ref()?;
        let Err(error) = model.landing.borrow().check() else { return None };
        let instance = model.instance;
        tracing::error!(instance, %error, "the model is dropped");
        self.fail_all(&error.to_string());
        self.drop_model();
        Some(instance)
    }

    fn rename(&mut self, order: Rename) -> bool {
        let Rename { from, to, generation } = order;
        let Some(model) = self.model.as_mut().filter(|model| model.instance == from) else { return false };
        (model.instance, model.generation) = (to, generation);
        true
    }

    fn unload(&mut self, instance: u64, force: bool) -> UnloadOutcome {
        if self.model.as_ref().is_none_or(|m| m.instance != instance) {
            // An order that crossed another: what it asks for is so.
            return UnloadOutcome::Unloaded;
        }
        if !self.sequences.is_empty() {
            if !force {
                let sequences = u32::try_from(self.sequences.len()).unwrap_or(u32::MAX);
                return UnloadOutcome::Refused { sequences };
            }
            self.fail_all("the model was taken away");
        }
        self.drop_model();
        tracing::info!(instance, "model unloaded");
        UnloadOutcome::Unloaded
    }

    fn drop_model(&mut self) {
        self.model = None;
        // What the next start may take depends on this model's KV cache being really gone.
        stoker_io::trim_heap();
        self.publish();
    }

    fn generate(&mut self, connection: Arc<Connection>, message: Generate, arrived: clock::Instant) {
        let (id, stream) = (connection.id, message.stream);
        if connection.is_closed() {
            return;
        }
        let streams = self.connections.entry(id).or_insert_with(|| Streams {
            connection,
            running: HashMap::new(),
            pending: FromWorker::default(),
        });
        if streams.running.contains_key(&stream) {
            // Ending one of the two would look like the end of the other.
            tracing::warn!(
                connection = id,
                stream,
                "gateway used a stream's number twice; closing its connection"
            );
            streams.connection.close();
            self.drop_connection(id);
            return;
        }
        match self.submit(message) {
            Ok(sequence) => {
                let queued = clock::now().saturating_duration_since(arrived);
                self.sequences.insert(sequence, Owner { connection: id, stream, queued });
                if let Some(streams) = self.connections.get_mut(&id) {
                    streams.running.insert(stream, sequence);
                }
            }
            Err(Refused { code, message }) => {
                self.frame(id).failures.push(Failure { stream, code: code.into(), message });
            }
        }
    }

    fn submit(&mut self, message: Generate) -> Result<SequenceKey, Refused> {
        let Generate {
            stream: _,
            generation,
            request: _,
            prompt,
            generated,
            tokens_max,
            stop_ids,
            sampling,
            cache_salt,
        } = message;
        let refused = |code, message: &str| Err(Refused { code, message: message.into() });
        if self.draining.is_some() {
            return refused(FailureCode::Unloaded, "the worker is shutting down");
        }
        let Some(model) = self.model.as_mut().filter(|m| m.generation == generation) else {
            return refused(FailureCode::WrongGeneration, "this generation is not served here");
        };
        let Some(sampling) = sampling else {
            return refused(FailureCode::Invalid, "no sampling parameters");
        };
        let key = self.next_sequence;
        self.next_sequence += 1;
        model.engine.submit(SequenceRequest {
            key,
            prompt,
            generated,
            tokens_max,
            stop_ids,
            sampling: sampling.into(),
            cache_salt: cache_salt.into(),
        })?;
        Ok(key)
    }

    fn step(&mut self) {
        let Some(model) = &mut self.model else { return };
        let StepOutput { begun, tokens, ends, failures, broken } = model.engine.step();
        self.counters.steps.fetch_add(1, Ordering::Relaxed);
        self.counters.tokens.fetch_add(tokens.len() as u64, Ordering::Relaxed);
        for b in begun {
            if let Some((owner, frame)) = self.frame_of(b.key) {
                frame.begun.push(Begun {
                    stream: owner.stream,
                    waited_us: micros(owner.queued + b.waited),
                    prefill_us: micros(b.prefill),
                    cached_tokens: b.cached_tokens,
                });
            }
        }
        for t in tokens {
            if let Some((owner, frame)) = self.frame_of(t.key) {
                let top = t.top.iter().map(|&TokenLogprob { token: id, logprob }| TopToken { id, logprob });
                frame.tokens.push(Token {
                    stream: owner.stream,
                    position: t.position,
                    id: t.id,
                    logprob: t.logprob,
                    top: top.collect(),
                });
            }
        }
        for e in ends {
            if let Some((owner, frame)) = self.frame_of(e.key) {
                let finish = match e.finish {
                    FinishReason::Stop => Finish::Stop,
                    FinishReason::Length => Finish::Length,
                    FinishReason::Cancelled => Finish::Cancelled,
                };
                frame.ends.push(End { stream: owner.stream, finish: finish.into() });
                self.ended(e.key);
            }
        }
        for f in failures {
            if let Some((owner, frame)) = self.frame_of(f.key) {
                let code = FailureCode::Internal.into();
                frame.failures.push(Failure { stream: owner.stream, code, message: f.message });
                self.ended(f.key);
            }
        }
        if broken {
            self.deliver();
            panic!("the device is lost: only a new process gets it back");
        }
    }

    /// Sends every connection its pending frame.
    fn deliver(&mut self) {
        while let Some(id) = self.touched.pop() {
            let Some(streams) = self.connections.get_mut(&id) else { continue };
            let sent = streams.connection.send(&streams.pending);
            let FromWorker { begun, tokens, ends, failures } = &mut streams.pending;
            begun.clear();
            tokens.clear();
            ends.clear();
            failures.clear();
            if !sent {
                self.drop_connection(id);
            }
        }
    }

    /// The pending frame of a connection, to add something to.
    ///
    /// # Panics
    /// When the connection is not known: whoever calls has just seen it.
    #[expect(clippy::expect_used, reason = "a stream's connection is dropped with its streams")]
    fn frame(&mut self, connection: ConnectionId) -> &mut FromWorker {
        let streams = self.connections.get_mut(&connection).expect("a running stream has its connection");
        if streams.pending == FromWorker::default() {
            self.touched.push(connection);
        }
        &mut streams.pending
    }

    /// A sequence's owner and the pending frame of its connection; `None` when nobody wants the sequence any more.
    fn frame_of(&mut self, sequence: SequenceKey) -> Option<(Owner, &mut FromWorker)> {
        let owner = self.sequences.get(&sequence).copied()?;
        Some((owner, self.frame(owner.connection)))
    }

    /// Ends every stream with [`FailureCode::Unloaded`].
    fn fail_all(&mut self, why: &str) {
        let sequences: Vec<(SequenceKey, Owner)> = self.sequences.drain().collect();
        for (sequence, Owner { connection, stream, queued: _ }) in sequences {
            if let Some(model) = &mut self.model {
                model.engine.abort(sequence);
            }
            if let Some(streams) = self.connections.get_mut(&connection) {
                streams.running.remove(&stream);
            }
            let code = FailureCode::Unloaded.into();
            self.frame(connection).failures.push(Failure { stream, code, message: why.into() });
        }
        self.deliver();
    }

    fn drop_connection(&mut self, connection: ConnectionId) {
        if let Some(streams) = self.connections.remove(&connection) {
            for sequence in streams.running.into_values() {
                self.forget(sequence);
            }
        }
    }

    /// A sequence that ended by itself.
    fn ended(&mut self, sequence: SequenceKey) {
        if let Some(owner) = self.sequences.remove(&sequence)
            && let Some(streams) = self.connections.get_mut(&owner.connection)
        {
            streams.running.remove(&owner.stream);
        }
    }

    /// A sequence that nobody wants any more.
    fn forget(&mut self, sequence: SequenceKey) {
        if self.sequences.remove(&sequence).is_some()
            && let Some(model) = &mut self.model
        {
            model.engine.abort(sequence);
        }
    }

    fn publish(&self) {
        let sequences = u32::try_from(self.sequences.len()).unwrap_or(u32::MAX);
        self.counters.sequences.store(sequences, Ordering::Relaxed);
        let stats = self.model.as_ref().map(|m| m.engine.stats()).unwrap_or_default();
        self.counters.kv_bytes_used.store(stats.kv_bytes_used, Ordering::Relaxed);
        self.counters.device_bytes.store(stats.device_bytes, Ordering::Relaxed);
    }

    fn report_drained(&mut self) {
        if !self.sequences.is_empty() {
            return;
        }
        if let Some(reply) = self.draining.as_mut().and_then(Option::take) {
            let connections = self.connections.values().map(|s| Arc::clone(&s.connection)).collect();
            let _ = reply.send(Drained { connections });
        }
    }
}

// === impl Counters ===

impl Counters {
    /// Engine steps so far.
    pub(crate) fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// The answer to ping `number`.
    pub(crate) fn pong(&self, number: u64) -> Pong {
        Pong {
            number,
            sequences: self.sequences.load(Ordering::Relaxed),
            steps: self.steps.load(Ordering::Relaxed),
            kv_bytes_used: self.kv_bytes_used.load(Ordering::Relaxed),
            tokens: self.tokens.load(Ordering::Relaxed),
            device_bytes: self.device_bytes.load(Ordering::Relaxed),
        }
    }
}

// === impl Refused ===

impl From<SubmitError> for Refused {
    fn from(error: SubmitError) -> Self {
        let code = match error {
            SubmitError::EmptyPrompt
            | SubmitError::TooLong { .. }
            | SubmitError::UnknownToken { .. }
            | SubmitError::Sampling { .. } => FailureCode::Invalid,
            SubmitError::OutOfMemory { .. } => FailureCode::OutOfMemory,
            SubmitError::DuplicateKey { .. } | SubmitError::QueueFull { .. } => FailureCode::Internal,
        };
        Self { code, message: error.to_string() }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::{
        process::{Command as Process, Stdio},
        sync::atomic::AtomicBool,
    };

    use stoker_engine::EngineStats;
    use stoker_proto::{
        FrameReader, FrameWriter,
        control::Load,
        stream::{Sampling, ToWorker, to_worker},
    };
    use tokio::net::UnixStream;

    use super::*;

    /// What a fake engine does with each sequence at its first step.
    #[derive(Clone, Copy, PartialEq)]
    enum Mood {
        Fails,
        Panics,
        /// Computes for ever.
        Works,
    }

    struct Fake {
        mood: Mood,
        running: Vec<u64>,
        dropped: Arc<AtomicBool>,
    }

    struct FakeLoader(Mood, Arc<AtomicBool>);

    impl Loader for FakeLoader {
        fn load(&mut self, _: LoadOrder) -> Result<LoadedModel, LoadError> {
            let engine = Box::new(Fake { mood: self.0, running: vec![], dropped: Arc::clone(&self.1) });
            Ok(LoadedModel { engine, map: Duration::ZERO, init: Duration::ZERO })
        }
    }

    impl StepEngine for Fake {
        fn submit(&mut self, request: SequenceRequest) -> Result<(), SubmitError> {
            self.running.push(request.key);
            Ok(())
        }

        fn abort(&mut self, key: u64) {
            self.running.retain(|k| *k != key);
        }

        fn step(&mut self) -> StepOutput {
            let mut output = StepOutput::default();
            match self.mood {
                Mood::Works => {}
                Mood::Panics => panic!("a fault in a kernel"),
                Mood::Fails => {
                    let failure = |key| stoker_engine::Failure { key, message: "not a number".into() };
                    output.failures.extend(self.running.drain(..).map(failure));
                    // A key that nobody knows is passed over.
                    output.failures.push(failure(u64::MAX));
                }
            }
            output
        }

        fn is_idle(&self) -> bool {
            self.running.is_empty()
        }

        fn stats(&self) -> EngineStats {
            EngineStats::default()
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            self.dropped.store(true, Ordering::SeqCst);
        }
    }

    struct Bench {
        commands: mpsc::Sender<Command>,
        gateway: UnixStream,
        dropped: Arc<AtomicBool>,
        counters: Arc<Counters>,
        landing: watch::Sender<Landing>,
    }

    /// An engine's thread with a loaded model of generation 1, and a connection to it.
    async fn bench(mood: Mood) -> Bench {
        let (commands, receiver) = mpsc::channel(8);
        let dropped = Arc::new(AtomicBool::new(false));
        let counters = Arc::<Counters>::default();
        let loader = Box::new(FakeLoader(mood, Arc::clone(&dropped)));
        let thread = EngineThread::new(receiver, loader, Arc::clone(&counters));
        std::thread::spawn(move || thread.run());
        let (reply, loaded) = oneshot::channel();
        let (landing, watched) = watch::channel(Landing::Coming);
        let load = Load { instance: 5, generation: 1, ..Load::default() };
        let order = Box::new(LoadOrder { load, granules: vec![], landing: watched });
        assert!(commands.send(Command::Load { order, reply }).await.is_ok());
        assert!(loaded.await.unwrap().is_ok());
        let (gateway, ours) = UnixStream::pair().unwrap();
        tokio::spawn(crate::connection::serve(1, ours, 1 << 20, commands.clone()));
        Bench { commands, gateway, dropped, counters, landing }
    }

    async fn generate(gateway: &mut UnixStream, stream: u64) {
        let sampling = Some(Sampling::from(&stoker_types::Sampling::default()));
        let message = Generate {
            stream,
            generation: 1,
            prompt: vec![1],
            tokens_max: 9,
            sampling,
            ..Generate::default()
        };
        let message = ToWorker { kind: Some(to_worker::Kind::Generate(message)) };
        FrameWriter::new(gateway).send(&message).await.unwrap();
    }

    async fn unload(bench: &Bench, force: bool) -> UnloadOutcome {
        let (reply, outcome) = oneshot::channel();
        assert!(bench.commands.send(Command::Unload { instance: 5, force, reply }).await.is_ok());
        outcome.await.unwrap()
    }

    async fn not_delivered(bench: &Bench) -> Option<u64> {
        let (reply, outcome) = oneshot::channel();
        assert!(bench.commands.send(Command::NotDelivered { reply }).await.is_ok());
        outcome.await.unwrap()
    }

    async fn rename(bench: &Bench, from: u64, to: u64) -> bool {
        let (reply, outcome) = oneshot::channel();
        let order = Rename { from, to, generation: 2 };
        assert!(bench.commands.send(Command::Rename { order, reply }).await.is_ok());
        outcome.await.unwrap()
    }

    #[tokio::test]
    async fn an_instance_with_other_numbers_goes_on() {
        let mut bench = bench(Mood::Works).await;
        generate(&mut bench.gateway, 1).await;
        while bench.counters.pong(0).sequences < 1 {
            tokio::task::yield_now().await;
        }
        assert!(!rename(&bench, 6, 7).await, "another instance");
        assert!(rename(&bench, 5, 7).await);
        // The old number is nobody's: what it asks for is so already.
        assert!(matches!(unload(&bench, false).await, UnloadOutcome::Unloaded));
        generate(&mut bench.gateway, 2).await;
        let frame: FromWorker = FrameReader::new(&mut bench.gateway).next().await.unwrap().unwrap();
        let refused: Vec<_> = frame.failures.iter().map(|f| (f.stream, f.code())).collect();
        assert_eq!(refused, [(2, FailureCode::WrongGeneration)], "new streams name the new generation");
        assert_eq!(bench.counters.pong(0).sequences, 1, "the one that ran goes on");
    }

    #[tokio::test]
    async fn a_sequence_that_fails_is_said_to_have_failed() {
        let mut bench = bench(Mood::Fails).await;
        generate(&mut bench.gateway, 3).await;
        let frame: FromWorker = FrameReader::new(&mut bench.gateway).next().await.unwrap().unwrap();
        assert_eq!((frame.failures.len(), frame.failures[0].stream), (1, 3));
        assert_eq!(frame.failures[0].code(), FailureCode::Internal);
        assert!(matches!(unload(&bench, false).await, UnloadOutcome::Unloaded));
    }

    #[tokio::test]
    async fn a_model_is_dropped_before_that_is_said() {
        let mut bench = bench(Mood::Works).await;
        generate(&mut bench.gateway, 1).await;
        generate(&mut bench.gateway, 2).await;
        while bench.counters.pong(0).sequences < 2 {
            tokio::task::yield_now().await;
        }
        assert!(matches!(unload(&bench, false).await, UnloadOutcome::Refused { sequences: 2 }));
        assert!(!bench.dropped.load(Ordering::SeqCst));
        assert!(matches!(unload(&bench, true).await, UnloadOutcome::Unloaded));
        assert!(bench.dropped.load(Ordering::SeqCst));
        let frame: FromWorker = FrameReader::new(&mut bench.gateway).next().await.unwrap().unwrap();
        let mut streams: Vec<u64> = frame.failures.iter().map(|f| f.stream).collect();
        streams.sort_unstable();
        assert_eq!(streams, [1, 2]);
        assert!(frame.failures.iter().all(|f| f.code() == FailureCode::Unloaded));
        assert_eq!(bench.counters.pong(0).sequences, 0);
        // What is not there is unloaded.
        assert!(matches!(unload(&bench, false).await, UnloadOutcome::Unloaded));
    }

    #[tokio::test]
    async fn a_model_whose_weights_do_not_arrive_is_dropped_and_its_streams_are_told() {
        let mut bench = bench(Mood::Works).await;
        generate(&mut bench.gateway, 3).await;
        while bench.counters.pong(0).sequences < 1 {
            tokio::task::yield_now().await;
        }
        // Somebody else's failure.
        assert_eq!(not_delivered(&bench).await, None);
        assert!(matches!(unload(&bench, false).await, UnloadOutcome::Refused { sequences: 1 }));
        bench.landing.send_replace(Landing::Failed("a bad chunk".into()));
        assert_eq!(not_delivered(&bench).await, Some(5));
        let frame: FromWorker = FrameReader::new(&mut bench.gateway).next().await.unwrap().unwrap();
        assert_eq!((frame.failures.len(), frame.failures[0].code()), (1, FailureCode::Unloaded));
        assert!(frame.failures[0].message.contains("a bad chunk"), "{frame:?}");
        assert!(matches!(unload(&bench, false).await, UnloadOutcome::Unloaded));
        assert!(bench.dropped.load(Ordering::SeqCst));
        // What comes too late isn't taken.
        let (reply, loaded) = oneshot::channel();
        let order = Box::new(LoadOrder {
            load: Load { instance: 6, generation: 2, ..Load::default() },
            granules: vec![],
            landing: bench.landing.subscribe(),
        });
        assert!(bench.commands.send(Command::Load { order, reply }).await.is_ok());
        assert_eq!(loaded.await.unwrap().unwrap_err(), LoadError::NotDelivered("a bad chunk".into()));
    }

    #[tokio::test]
    #[ignore = "a process that panics"]
    async fn panicking_process() {
        crate::exit_on_panic();
        let mut bench = bench(Mood::Panics).await;
        generate(&mut bench.gateway, 1).await;
        std::future::pending::<()>().await;
    }

    #[test]
    fn a_panic_of_the_engine_ends_the_process() {
        let child = Process::new(std::env::current_exe().unwrap())
            .args(["engine::tests::panicking_process", "--exact", "--ignored", "--nocapture"])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert_eq!(child.status.code(), Some(i32::from(crate::EXIT_PANIC)));
    }
}
