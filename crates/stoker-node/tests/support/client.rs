//! A gateway's side of a worker's socket.

use std::{collections::HashMap, path::Path, time::Duration};

use stoker_proto::{
    FrameReader, FrameWriter,
    stream::{Abort, Failure, FailureCode, Finish, FromWorker, Generate, Sampling, ToWorker, to_worker},
};
use tokio::{
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};

/// Longest that a test waits for anything. Not a measurement: it only turns a hang into a failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a worker.
pub(crate) struct Client {
    reader: FrameReader<OwnedReadHalf>,
    writer: FrameWriter<OwnedWriteHalf>,
    /// What has been read so far.
    pub(crate) outcomes: HashMap<u64, Outcome>,
    /// Ends that were read and not yet waited for.
    ended: usize,
}

/// What one stream brought.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) begun: u32,
    pub(crate) ids: Vec<u32>,
    pub(crate) ends: Vec<Finish>,
    pub(crate) failures: Vec<Failure>,
}

impl Client {
    pub(crate) async fn connect(socket: &Path) -> Self {
        let (read, write) = UnixStream::connect(socket).await.unwrap().into_split();
        Self {
            reader: FrameReader::new(read),
            writer: FrameWriter::new(write),
            outcomes: HashMap::new(),
            ended: 0,
        }
    }

    pub(crate) async fn say(&mut self, kind: to_worker::Kind) {
        self.writer.send(&ToWorker { kind: Some(kind) }).await.unwrap();
    }

    pub(crate) async fn generate(&mut self, stream: u64, generation: u64, prompt: &[u32], tokens_max: u32) {
        self.say(to_worker::Kind::Generate(generate(stream, generation, prompt, tokens_max))).await;
    }

    pub(crate) async fn abort(&mut self, stream: u64) {
        self.say(to_worker::Kind::Abort(Abort { stream })).await;
    }

    /// Reads one frame; `false` at the end of the connection.
    pub(crate) async fn next(&mut self) -> bool {
        let next =
            timeout(PATIENCE, self.reader.next::<FromWorker>()).await.expect("the worker said nothing");
        let Ok(Some(frame)) = next else { return false };
        self.ended += frame.ends.len() + frame.failures.len();
        merge(&mut self.outcomes, frame);
        true
    }

    /// Reads until so many more streams have ended, or the connection.
    pub(crate) async fn collect(&mut self, streams: usize) -> &HashMap<u64, Outcome> {
        while self.ended < streams && self.next().await {}
        self.ended = self.ended.saturating_sub(streams);
        &self.outcomes
    }
}

pub(crate) fn generate(stream: u64, generation: u64, prompt: &[u32], tokens_max: u32) -> Generate {
    Generate {
        stream,
        generation,
        request: format!("r{stream}"),
        prompt: prompt.to_vec(),
        generated: vec![],
        tokens_max,
        stop_ids: vec![],
        sampling: Some(Sampling::from(&stoker_types::Sampling { temperature: 0.0, ..Default::default() })),
        cache_salt: bytes::Bytes::new(),
    }
}

/// Adds a frame to what the streams brought, checking the order within each.
fn merge(outcomes: &mut HashMap<u64, Outcome>, frame: FromWorker) {
    for begun in frame.begun {
        let outcome = outcomes.entry(begun.stream).or_default();
        assert!(outcome.ids.is_empty(), "begun comes before the first token");
        outcome.begun += 1;
    }
    for token in frame.tokens {
        let outcome = outcomes.entry(token.stream).or_default();
        assert_eq!(token.position as usize, outcome.ids.len(), "positions without a gap");
        assert!(outcome.ends.is_empty() && outcome.failures.is_empty(), "nothing comes after the end");
        outcome.ids.push(token.id);
    }
    for end in frame.ends {
        outcomes.entry(end.stream).or_default().ends.push(end.finish());
    }
    for failure in frame.failures {
        outcomes.entry(failure.stream).or_default().failures.push(failure);
    }
}

impl Outcome {
    /// The stream ended as every stream must: exactly once.
    pub(crate) fn assert_ended_once(&self) {
        assert_eq!(self.ends.len() + self.failures.len(), 1, "{self:?}");
    }

    pub(crate) fn failure(&self) -> FailureCode {
        self.failures[0].code()
    }
}
