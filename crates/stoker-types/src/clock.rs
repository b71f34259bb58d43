//! The one place that reads the machine's clocks, so that everything else can be given a time.

/// A monotonic instant for synchronous code. Async code uses `tokio::time::Instant`, which tests can pause.
#[expect(clippy::disallowed_types, reason = "this module is where the standard clock is wrapped")]
pub type Instant = std::time::Instant;

/// The monotonic clock, now.
#[must_use]
pub fn now() -> Instant {
    Instant::now()
}

/// Wall-clock time since the Unix epoch. Zero if the machine's clock is set before 1970.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this module is where the standard clock is wrapped")]
pub fn wall() -> std::time::Duration {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default()
}
