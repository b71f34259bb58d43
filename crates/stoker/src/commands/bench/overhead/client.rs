//! The client of the bench, as cheap as it can be made: a prepared request, one task a request, and an answer that is
//! looked at for two marks only.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, bail, ensure};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    task::JoinSet,
    time::Instant,
};

/// How the body of a streamed answer ends, the last chunk included.
const END: &[u8] = b"data: [DONE]\n\n\r\n0\r\n\r\n";
/// What a token's event has; the event before it, which says who speaks, has it too and comes with the first token.
const TOKEN: &[u8] = b"\"content\":\"";
/// The longest answer that is expected.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Requests that may be under way before the open loop counts as overrun.
const IN_FLIGHT_MAX: usize = 2048;

/// Connections that are not in use.
#[derive(Clone)]
pub(super) struct Connections {
    address: SocketAddr,
    request: Arc<[u8]>,
    idle: Arc<Mutex<Vec<Connection>>>,
}

/// One connection, and what came over it for the last request.
struct Connection {
    socket: TcpStream,
    answer: Vec<u8>,
}

/// One request's times, from the moment for which it was planned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub(super) first_token: Duration,
    pub(super) total: Duration,
}

/// What became of a number of requests.
#[derive(Debug, Default)]
pub(super) struct Samples {
    pub(super) served: Vec<Sample>,
    /// Answered with a 429: the machine stood still for so long that the queue was full.
    pub(super) refused: usize,
}

// === impl Connections ===

impl Connections {
    /// To the server at `address`; every request has this body.
    pub(super) fn new(address: SocketAddr, body: &serde_json::Value) -> Self {
        let body = body.to_string();
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        Self { address, request: request.into_bytes().into(), idle: Arc::default() }
    }

    /// One request; `None` when it was refused.
    pub(super) async fn request(&self, planned: Instant) -> anyhow::Result<Option<Sample>> {
        let (sample, connection) = self.exchange(planned).await?;
        if sample.is_some() {
            self.idle.lock().push(connection);
        }
        Ok(sample)
    }

    /// One request, and the body of its answer.
    pub(super) async fn body(&self) -> anyhow::Result<Vec<u8>> {
        let (sample, connection) = self.exchange(Instant::now()).await?;
        sample.context("the server is busy")?;
        let body = body(&connection.answer).context("the answer is not chunked as expected")?;
        self.idle.lock().push(connection);
        Ok(body)
    }

    /// Requests a second when `clients` ask without pause for `time`.
    pub(super) async fn saturate(&self, clients: usize, time: Duration) -> anyhow::Result<f64> {
        let end = Instant::now() + time;
        let mut asking = JoinSet::new();
        for _ in 0..clients {
            let connections = self.clone();
            asking.spawn(async move {
                let mut count = 0_u32;
                while Instant::now() < end {
                    count += u32::from(connections.request(Instant::now()).await?.is_some());
                }
                anyhow::Ok(count)
            });
        }
        let mut total = 0;
        while let Some(count) = asking.join_next().await {
            total += count??;
        }
        Ok(f64::from(total) / time.as_secs_f64())
    }

    /// Requests at `rate` a second with exponential gaps, whatever becomes of them.
    pub(super) async fn open_loop(&self, rate: f64, time: Duration) -> anyhow::Result<Samples> {
        let mut gap = exponential_gaps(rate);
        // A thread of its own keeps the time: the runtime's timers are a millisecond coarse.
        let (arrivals, mut arrived) = mpsc::channel(IN_FLIGHT_MAX);
        let clock = std::thread::spawn(move || {
            let begun = Instant::now();
            let mut at = begun + gap();
            while at < begun + time {
                std::thread::sleep(at.saturating_duration_since(Instant::now()));
                if arrivals.try_send(at).is_err() {
                    return false;
                }
                at += gap();
            }
            true
        });
        let mut requests = JoinSet::new();
        let mut samples = Samples::default();
        while let Some(planned) = arrived.recv().await {
            let connections = self.clone();
            requests.spawn(async move { connections.request(planned).await });
            while let Some(done) = requests.try_join_next() {
                samples.add(done??);
            }
            ensure!(requests.len() < IN_FLIGHT_MAX, "the server does not keep up at {rate:.0} requests/s");
        }
        while let Some(done) = requests.join_next().await {
            samples.add(done??);
        }
        ensure!(matches!(clock.join(), Ok(true)), "the client does not keep up at {rate:.0} requests/s");
        ensure!(!samples.served.is_empty(), "no request was made: --seconds is too short for this rate");
        Ok(samples)
    }

    async fn exchange(&self, planned: Instant) -> anyhow::Result<(Option<Sample>, Connection)> {
        let idle = self.idle.lock().pop();
        let mut connection = match idle {
            Some(connection) => connection,
            None => Connection::open(self.address).await?,
        };
        let sample = connection.exchange(&self.request, planned).await?;
        Ok((sample, connection))
    }
}

// === impl Connection ===

impl Connection {
    async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        Ok(Self { socket, answer: Vec::with_capacity(16 << 10) })
    }

    async fn exchange(&mut self, request: &[u8], planned: Instant) -> anyhow::Result<Option<Sample>> {
        self.socket.write_all(request).await?;
        self.answer.clear();
        let mut first_token = None;
        while !self.answer.ends_with(END) {
            let seen = self.answer.len().saturating_sub(TOKEN.len());
            let read = self.socket.read_buf(&mut self.answer).await?;
            if first_token.is_none() && self.answer[seen..].windows(TOKEN.len()).any(|w| w == TOKEN) {
                first_token = Some(planned.elapsed());
            }
            if self.answer.starts_with(b"HTTP/1.1 429 ") {
                return Ok(None);
            }
            let is_error = self.answer.len() > 12 && !self.answer.starts_with(b"HTTP/1.1 200");
            if read == 0 || is_error || self.answer.len() > ANSWER_BYTES_MAX {
                bail!("the server answered {}", String::from_utf8_lossy(&self.answer));
            }
        }
        let first_token = first_token.context("a stream had no token")?;
        Ok(Some(Sample { first_token, total: planned.elapsed() }))
    }
}

// === impl Samples ===

impl Samples {
    fn add(&mut self, outcome: Option<Sample>) {
        match outcome {
            Some(sample) => self.served.push(sample),
            None => self.refused += 1,
        }
    }
}

/// Gaps of a Poisson process, the same in every run.
fn exponential_gaps(rate: f64) -> impl FnMut() -> Duration {
    let mut random = 0x5eed_u64;
    move || {
        // SplitMix64 (Steele, Lea, Flood 2014), then the inverse of the exponential distribution.
        random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
        let uniform = ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64;
        Duration::from_secs_f64(-(1.0 - uniform).ln() / rate)
    }
}

/// The body of a chunked answer (RFC 9112, section 7.1).
fn body(answer: &[u8]) -> Option<Vec<u8>> {
    let find = |text: &[u8], what: &[u8]| text.windows(what.len()).position(|w| w == what);
    let mut rest = answer.get(find(answer, b"\r\n\r\n")? + 4..)?;
    let mut body = Vec::new();
    loop {
        let line = find(rest, b"\r\n")?;
        let len = usize::from_str_radix(std::str::from_utf8(&rest[..line]).ok()?, 16).ok()?;
        if len == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(line + 2..line + 2 + len)?);
        rest = rest.get(line + 2 + len + 2..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_put_together() {
        let answer = b"HTTP/1.1 200 OK\r\na: b\r\n\r\n3\r\nabc\r\n00a\r\n0123456789\r\n0\r\n\r\n";
        assert_eq!(body(answer).unwrap(), b"abc0123456789");
        assert_eq!(body(&answer[..answer.len() - 6]), None);
    }
}
