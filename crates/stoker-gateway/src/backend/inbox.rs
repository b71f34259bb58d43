//! A request's inbox: bounded in tokens, so that a slow reader costs bounded memory and never delays others.

use std::{collections::VecDeque, task::Poll};

use futures::task::AtomicWaker;
use parking_lot::Mutex;

use super::{StreamEvent, StreamFailure};

/// Events of a request's sequences, in order of arrival. Filled by a connection, emptied by the request.
#[derive(Debug)]
pub struct Inbox {
    state: Mutex<State>,
    reader: AtomicWaker,
    tokens_max: usize,
}

#[derive(Debug)]
struct State {
    events: VecDeque<(u16, StreamEvent)>,
    /// Tokens in `events`, by sequence.
    waiting: Vec<usize>,
}

/// A token came that the bound has no room for. The sequence is over: its failure is in the inbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overrun;

// === impl Inbox ===

impl Inbox {
    /// For `sequences` sequences with at most `tokens_max` waiting tokens each.
    #[must_use]
    pub fn new(sequences: u16, tokens_max: usize) -> Self {
        let state = State { events: VecDeque::new(), waiting: vec![0; usize::from(sequences)] };
        Self { state: Mutex::new(state), reader: AtomicWaker::new(), tokens_max }
    }

    /// Adds an event of a sequence. Events that aren't tokens always fit: there is one of each kind.
    ///
    /// # Errors
    /// [`Overrun`]: the caller must abort the sequence and send nothing more for it.
    pub fn push(&self, sequence: u16, event: StreamEvent) -> Result<(), Overrun> {
        let mut state = self.state.lock();
        let mut result = Ok(());
        let mut event = event;
        if matches!(event, StreamEvent::Token { .. }) {
            let waiting = &mut state.waiting[usize::from(sequence)];
            if *waiting == self.tokens_max {
                event = StreamEvent::Failed(StreamFailure::SlowReader { tokens_max: self.tokens_max });
                result = Err(Overrun);
            } else {
                *waiting += 1;
            }
        }
        state.events.push_back((sequence, event));
        drop(state);
        self.reader.wake();
        result
    }

    /// Waits until there are events and swaps them all into `batch`, which must be empty. One reader at a time.
    /// Cancel-safe.
    pub async fn take(&self, batch: &mut VecDeque<(u16, StreamEvent)>) {
        std::future::poll_fn(|cx| {
            if self.try_take(batch) {
                return Poll::Ready(());
            }
            self.reader.register(cx.waker());
            // An event may have come between the look and the registration.
            if self.try_take(batch) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    fn try_take(&self, batch: &mut VecDeque<(u16, StreamEvent)>) -> bool {
        let mut state = self.state.lock();
        if state.events.is_empty() {
            return false;
        }
        std::mem::swap(&mut state.events, batch);
        state.waiting.fill(0);
        true
    }
}

#[cfg(test)]
mod tests {
    use stoker_types::FinishReason;

    use super::*;

    fn token(position: u32) -> StreamEvent {
        StreamEvent::Token { position, id: 1, logprobs: None }
    }

    #[tokio::test]
    async fn the_bound_is_by_sequence_and_the_failure_gets_in() {
        let inbox = Inbox::new(2, 2);
        assert_eq!(inbox.push(0, token(0)), Ok(()));
        assert_eq!(inbox.push(0, token(1)), Ok(()));
        assert_eq!(inbox.push(1, token(0)), Ok(()));
        assert_eq!(inbox.push(0, token(2)), Err(Overrun));
        assert_eq!(inbox.push(1, StreamEvent::End(FinishReason::Stop)), Ok(()));
        let mut batch = VecDeque::new();
        inbox.take(&mut batch).await;
        let kinds: Vec<_> = batch.iter().map(|(s, e)| (*s, matches!(e, StreamEvent::Token { .. }))).collect();
        assert_eq!(kinds, [(0, true), (0, true), (1, true), (0, false), (1, false)]);
        assert_eq!(inbox.push(0, token(3)), Ok(()), "taking makes room");
    }

    #[tokio::test]
    async fn a_waiting_reader_is_woken() {
        let inbox = std::sync::Arc::new(Inbox::new(1, 4));
        let reader = tokio::spawn({
            let inbox = inbox.clone();
            async move {
                let mut batch = VecDeque::new();
                inbox.take(&mut batch).await;
                batch.len()
            }
        });
        tokio::task::yield_now().await;
        inbox.push(0, token(0)).unwrap();
        assert_eq!(reader.await.unwrap(), 1);
    }
}
