//! Quantities with their unit in the type.

use std::{fmt, iter::Sum, ops, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

/// A number of bytes. Parses `18GiB`, `1.5 GB`, `4096`; prints in binary units (`18.2 GiB`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

/// A rate, in bytes a second.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BytesPerSec(pub f64);

/// Why a string is no [`ByteSize`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a size: write a number and a unit, such as `18GiB`, `1.5GB` or `4096`")]
pub struct ParseByteSizeError {
    /// What was given.
    pub text: String,
}

// === impl ByteSize ===

impl ByteSize {
    /// No bytes.
    pub const ZERO: Self = Self(0);

    /// `n` x 2^10 bytes.
    #[must_use]
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }

    /// `n` x 2^20 bytes.
    #[must_use]
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// `n` x 2^30 bytes.
    #[must_use]
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }

    /// The number itself.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// `self - other`, or zero.
    #[must_use]
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// How long this takes at `rate`; `Duration::MAX` when the rate is zero or not a number.
    #[must_use]
    pub fn at(self, rate: BytesPerSec) -> Duration {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let seconds = self.0 as f64 / rate.0;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

impl ops::Add for ByteSize {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl ops::AddAssign for ByteSize {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl Sum for ByteSize {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, ops::Add::add)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let text = if unit == 0 { format!("{} B", self.0) } else { format!("{value:.1} {}", UNITS[unit]) };
        f.pad(&text)
    }
}

impl FromStr for ByteSize {
    type Err = ParseByteSizeError;

    fn from_str(text: &str) -> Result<Self, ParseByteSizeError> {
        let error = || ParseByteSizeError { text: text.chars().take(64).collect() };
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let scale: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(error()),
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(scale).map(Self).ok_or_else(error);
        }
        let value: f64 = number.parse().map_err(|_| error())?;
        #[expect(clippy::cast_precision_loss, reason = "a fraction of a unit was asked for")]
        let bytes = value * scale as f64;
        if bytes.is_finite() && (0.0..9.0e18).contains(&bytes) {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "range checked above"
            )]
            Ok(Self(bytes as u64))
        } else {
            Err(error())
        }
    }
}

// === impl BytesPerSec ===

impl BytesPerSec {
    /// The rate of `bytes` in `time`; zero for no time.
    #[must_use]
    pub fn of(bytes: ByteSize, time: Duration) -> Self {
        let seconds = time.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        if seconds > 0.0 { Self(bytes.0 as f64 / seconds) } else { Self(0.0) }
    }
}

impl fmt::Display for BytesPerSec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = if self.0 >= 1e9 {
            format!("{:.2} GB/s", self.0 / 1e9)
        } else {
            format!("{:.0} MB/s", self.0 / 1e6)
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse() {
        for (text, bytes) in [
            ("4096", 4096),
            ("18GiB", 18 << 30),
            (" 1.5 gb ", 1_500_000_000),
            ("0.5k", 512),
            ("16 MiB", 16 << 20),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap(), ByteSize(bytes), "{text}");
        }
        for text in ["", "x", "-1", "1.2.3", "1 parsec", "99999999999TiB", "nan", "GiB"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_print() {
        assert_eq!(ByteSize(0).to_string(), "0 B");
        assert_eq!(ByteSize(98_362_432).to_string(), "93.8 MiB");
        assert_eq!(ByteSize(u64::MAX).to_string(), "16384.0 PiB");
    }

    #[test]
    fn time_at_a_rate() {
        assert_eq!(ByteSize(2_000_000_000).at(BytesPerSec(1e9)), Duration::from_secs(2));
        assert_eq!(ByteSize(1).at(BytesPerSec(0.0)), Duration::MAX);
        assert_eq!(ByteSize(0).at(BytesPerSec(0.0)), Duration::MAX);
    }
}
