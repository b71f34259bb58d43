//! What an operator may say of a model, and what the scheduler needs to know of it.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{ByteSize, ModelName, Tier};

/// How long an idle model stays on the device. Written `10m`, `90s`, `0` (leaves at once) or `-1` (never leaves by
/// time; only a pin holds it against need).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepAlive {
    /// Leaves after being idle for so long.
    For(Duration),
    /// Doesn't leave by time.
    Forever,
}

/// Why a string is no [`KeepAlive`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a keep_alive: write a duration such as `10m`, `90s` or `1h`, `0` for at once, `-1` for not by time"
)]
pub struct ParseKeepAliveError {
    /// What was given.
    pub text: String,
}

/// Per-model settings, from `[models.NAME]` in the configuration. Absent values take the server's defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSettings {
    /// How long it stays on the device when idle.
    pub keep_alive: KeepAlive,
    /// Never leaves memory to make room for another.
    pub pin: bool,
    /// Brought to the device when the server starts.
    pub preload: bool,
    /// Most instances at the same time.
    pub instances_max: u32,
    /// Most sequences that one instance decodes at the same time.
    pub concurrency: u32,
    /// Context in tokens; `None`: the model's, or what fits.
    pub context: Option<u32>,
    /// Higher goes first when models compete for room. -100 to 100.
    pub priority: i32,
}

/// What the scheduler needs to know of a model that can run here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// Its name.
    pub model: ModelName,
    /// Its settings.
    pub settings: ModelSettings,
    /// Bytes of weight files, as they are stored.
    pub weight_bytes: ByteSize,
    /// Bytes that its chunks take in the pool: whole chunks, so at least `weight_bytes`.
    pub pool_bytes: ByteSize,
    /// Bytes that they take on a device.
    pub device_bytes: ByteSize,
    /// Bytes of KV cache for one token of one sequence.
    pub kv_bytes_per_token: ByteSize,
    /// The context that it was trained for, in tokens.
    pub context_trained: u32,
    /// The fastest tier below memory that has its weights.
    pub weights_on: Tier,
}

// === impl KeepAlive ===

impl Default for KeepAlive {
    fn default() -> Self {
        Self::For(Duration::from_mins(10))
    }
}

impl FromStr for KeepAlive {
    type Err = ParseKeepAliveError;

    fn from_str(text: &str) -> Result<Self, ParseKeepAliveError> {
        let error = || ParseKeepAliveError { text: text.chars().take(64).collect() };
        let t = text.trim();
        if t.starts_with('-') {
            return if t.len() > 1 { Ok(Self::Forever) } else { Err(error()) };
        }
        let split = t.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(t.len());
        let (number, unit) = t.split_at(split);
        let seconds_per_unit = match unit.trim() {
            "ms" => 0.001,
            "" | "s" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3600.0,
            "d" => 86400.0,
            _ => return Err(error()),
        };
        let number: f64 = number.parse().map_err(|_| error())?;
        Duration::try_from_secs_f64(number * seconds_per_unit).map(Self::For).map_err(|_| error())
    }
}

impl fmt::Display for KeepAlive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forever => f.pad("-1"),
            Self::For(d) if d.as_secs() >= 60 && d.as_secs().is_multiple_of(60) && d.subsec_nanos() == 0 => {
                f.pad(&format!("{}m", d.as_secs() / 60))
            }
            Self::For(d) => f.pad(&format!("{}s", d.as_secs_f64())),
        }
    }
}

impl Serialize for KeepAlive {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for KeepAlive {
    /// A string as in [`FromStr`], or a number of seconds (negative: [`KeepAlive::Forever`]).
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Seconds(f64),
            Text(String),
        }
        let text = match Either::deserialize(deserializer)? {
            Either::Seconds(s) => s.to_string(),
            Either::Text(t) => t,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

// === impl ModelSettings ===

impl Default for ModelSettings {
    fn default() -> Self {
        Self {
            keep_alive: KeepAlive::default(),
            pin: false,
            preload: false,
            instances_max: 1,
            concurrency: 8,
            context: None,
            priority: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keep_alive_parses() {
        for (text, value) in [
            ("10m", KeepAlive::For(Duration::from_mins(10))),
            ("90", KeepAlive::For(Duration::from_secs(90))),
            ("1.5h", KeepAlive::For(Duration::from_mins(90))),
            ("0", KeepAlive::For(Duration::ZERO)),
            ("-1", KeepAlive::Forever),
            ("250ms", KeepAlive::For(Duration::from_millis(250))),
        ] {
            assert_eq!(text.parse::<KeepAlive>().unwrap(), value, "{text}");
            assert_eq!(value.to_string().parse::<KeepAlive>().unwrap(), value, "{text} printed");
        }
        for text in ["", "-", "soon", "5 parsecs", "1e99h"] {
            assert!(text.parse::<KeepAlive>().is_err(), "{text}");
        }
    }
}
