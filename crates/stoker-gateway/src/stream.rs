//! A streamed answer: server-sent events, polled by the client's own connection, so that a token passes through one
//! task only and a client that goes away drops everything at once.

use std::{convert::Infallible, panic::AssertUnwindSafe, pin::Pin, time::Duration};

use axum::body::Body;
use bytes::Bytes;
use futures::FutureExt as _;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::{
    errors::ApiError,
    generation::{Delta, Generation},
    openai::EventWriter,
    telemetry::Access,
};

/// Events that are there already go into one frame up to about this many bytes.
const FRAME_BYTES: usize = 16 << 10;

/// A generation that has not brought anything yet.
pub(crate) type Starting = Pin<Box<dyn Future<Output = (Generation, Result<Delta, ApiError>)> + Send>>;

/// Where a stream is.
enum Phase {
    /// Waiting for a seat and the first news; the client has the response's head.
    Starting(Starting),
    /// The first news is there; nothing is written yet.
    First(Box<Generation>, Box<Delta>),
    /// Events flow.
    Flowing(Box<Generation>),
    /// The last event was given out.
    Over,
}

/// What a stream is to do besides.
#[derive(Debug, Clone)]
pub(crate) struct StreamSettings {
    pub(crate) comment_every: Duration,
    pub(crate) include_usage: bool,
    pub(crate) show_timeline: bool,
    /// Cancelled when the server can't wait for running streams any longer.
    pub(crate) ending: CancellationToken,
}

/// The body of a streamed answer.
pub(crate) struct EventStream {
    phase: Phase,
    writer: EventWriter,
    access: Access,
    settings: StreamSettings,
    ending: Pin<Box<WaitForCancellationFutureOwned>>,
    silence: Pin<Box<Sleep>>,
    written: Instant,
}

// === impl EventStream ===

impl EventStream {
    /// A stream whose first news is still awaited.
    pub(crate) fn starting(
        starting: Starting,
        writer: EventWriter,
        access: Access,
        settings: StreamSettings,
    ) -> Self {
        let mut stream = Self::new(Phase::Starting(starting), writer, access, settings);
        // Something for proxies that wait for a first byte.
        stream.writer.comment("queued");
        stream
    }

    /// A stream whose first news is there.
    pub(crate) fn flowing(
        generation: Generation,
        first: Delta,
        writer: EventWriter,
        access: Access,
        settings: StreamSettings,
    ) -> Self {
        Self::new(Phase::First(Box::new(generation), Box::new(first)), writer, access, settings)
    }

    fn new(phase: Phase, writer: EventWriter, access: Access, settings: StreamSettings) -> Self {
        Self {
            phase,
            writer,
            access,
            ending: Box::pin(settings.ending.clone().cancelled_owned()),
            silence: Box::pin(tokio::time::sleep(settings.comment_every)),
            written: Instant::now(),
            settings,
        }
    }

    pub(crate) fn into_body(self) -> Body {
        Body::from_stream(futures::stream::unfold(self, |mut stream| async move {
            // A panic must not end a stream silently.
            let frame = AssertUnwindSafe(stream.frame()).catch_unwind().await.unwrap_or_else(|_| {
                stream.phase = Phase::Over;
                Some(stream.fail(&ApiError::internal("an internal error; the log has details")))
            });
            frame.map(|frame| (Ok::<Bytes, Infallible>(frame), stream))
        }))
    }

    /// The next frame, `None` at the end.
    async fn frame(&mut self) -> Option<Bytes> {
        if self.writer.len() > 0 {
            return Some(self.writer.take());
        }
        loop {
            if let Phase::First(..) = self.phase {
                let Phase::First(mut generation, delta) = std::mem::replace(&mut self.phase, Phase::Over)
                else {
                    return None;
                };
                self.writer.begin();
                return Some(match self.write(&mut generation, *delta) {
                    Ok(over) => self.flush(generation, over),
                    Err(error) => self.fail(&error),
                });
            }
            let next = tokio::select! {
                biased;
                next = self.phase.next() => next?,
                () = &mut self.ending => {
                    // Dropping what runs aborts it.
                    self.phase = Phase::Over;
                    return Some(self.fail(&ApiError::shutting_down()));
                }
                () = &mut self.silence => {
                    let due = self.written + self.settings.comment_every;
                    if due > Instant::now() {
                        self.silence.as_mut().reset(due);
                        continue;
                    }
                    self.writer.comment(if matches!(self.phase, Phase::Starting(_)) { "queued" } else { "working" });
                    self.written = Instant::now();
                    self.silence.as_mut().reset(self.written + self.settings.comment_every);
                    return Some(self.writer.take());
                }
            };
            match (next, std::mem::replace(&mut self.phase, Phase::Over)) {
                (Next::Began(generation, Ok(delta)), _) => {
                    self.phase = Phase::First(generation, Box::new(delta))
                }
                (Next::Began(_, Err(error)) | Next::News(Err(error)), _) => return Some(self.fail(&error)),
                (Next::News(Ok(Some(delta))), Phase::Flowing(mut generation)) => {
                    return Some(match self.write(&mut generation, delta) {
                        Ok(over) => self.flush(generation, over),
                        Err(error) => self.fail(&error),
                    });
                }
                (Next::News(Ok(_)), _) => {
                    return Some(self.fail(&ApiError::internal("a stream went on after its end")));
                }
            }
        }
    }

    /// Writes a delta and those that are there already. Whether the generation is over.
    fn write(&mut self, generation: &mut Generation, first: Delta) -> Result<bool, ApiError> {
        let mut delta = Some(first);
        while let Some(news) = delta {
            self.writer.delta(&news, &generation.assets.tokenizer);
            delta = if self.writer.len() < FRAME_BYTES { generation.next_ready()? } else { None };
        }
        Ok(generation.is_over())
    }

    fn flush(&mut self, generation: Box<Generation>, over: bool) -> Bytes {
        if over {
            if self.settings.include_usage {
                self.writer.usage(generation.usage());
            }
            if self.settings.show_timeline {
                self.writer.comment(&format!("{} {}", crate::timeline::TIMELINE, generation.timeline.json()));
            }
            self.writer.done();
            self.access.set_finished(None);
        } else {
            self.phase = Phase::Flowing(generation);
        }
        self.written = Instant::now();
        self.writer.take()
    }

    /// The last event of a stream that failed; what was written before it goes with it.
    fn fail(&mut self, error: &ApiError) -> Bytes {
        let request = self.access.request();
        self.access.set_finished(Some(error.code));
        self.writer.error(&error.body(Some(&request.0)));
        self.writer.take()
    }
}

/// What a phase waited for.
enum Next {
    Began(Box<Generation>, Result<Delta, ApiError>),
    News(Result<Option<Delta>, ApiError>),
}

// === impl Phase ===

impl Phase {
    /// Cancel-safe: a start goes on where it was. `None` when there is nothing to wait for.
    async fn next(&mut self) -> Option<Next> {
        match self {
            Self::Starting(starting) => {
                let (generation, first) = starting.await;
                Some(Next::Began(Box::new(generation), first))
            }
            Self::Flowing(generation) => Some(Next::News(generation.next().await)),
            Self::First(..) | Self::Over => None,
        }
    }
}
