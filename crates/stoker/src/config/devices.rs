//! Which devices models are served from.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer};
use stoker_types::{ByteSize, BytesPerSec};

/// `devices = "auto"`, `"cpu"`, or a list.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Devices {
    /// Every GPU that there is, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// These, at least one.
    These(Vec<DeviceSpec>),
}

/// One device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum DeviceSpec {
    /// A GPU, by its number after `CUDA_VISIBLE_DEVICES`: `cuda:0`.
    Cuda(u32),
    /// Memory of this machine that stands in for a GPU's, computed with by the processor: `simulated:4GiB`, or
    /// `simulated:4GiB@25GB/s` with a link of this speed. For tests.
    Simulated { memory: ByteSize, rate: Option<BytesPerSec> },
}

/// Why a text names no devices.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ParseDevicesError {
    #[error("`{text}` is no device: write `auto`, `cpu`, or GPUs by their numbers, such as `cuda:0,cuda:1`")]
    Unknown { text: String },
    #[error("`{text}` is named twice")]
    Twice { text: String },
}

// === impl Devices ===

impl Devices {
    fn of_list(texts: &[&str]) -> Result<Self, ParseDevicesError> {
        match texts {
            ["auto"] => return Ok(Self::Auto),
            ["cpu"] => return Ok(Self::Cpu),
            _ => {}
        }
        let mut devices: Vec<DeviceSpec> = Vec::new();
        for text in texts {
            let device: DeviceSpec = text.parse()?;
            if matches!(device, DeviceSpec::Cuda(_)) && devices.contains(&device) {
                return Err(ParseDevicesError::Twice { text: (*text).to_owned() });
            }
            devices.push(device);
        }
        if devices.is_empty() {
            return Err(ParseDevicesError::Unknown { text: String::new() });
        }
        Ok(Self::These(devices))
    }
}

impl FromStr for Devices {
    type Err = ParseDevicesError;

    fn from_str(text: &str) -> Result<Self, ParseDevicesError> {
        Self::of_list(&text.split(',').map(str::trim).collect::<Vec<_>>())
    }
}

impl fmt::Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.pad("auto"),
            Self::Cpu => f.pad("cpu"),
            Self::These(devices) => {
                let names: Vec<String> = devices.iter().map(ToString::to_string).collect();
                f.pad(&names.join(","))
            }
        }
    }
}

impl<'de> Deserialize<'de> for Devices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            One(String),
            Many(Vec<String>),
        }
        match Either::deserialize(deserializer)? {
            Either::One(text) => text.parse(),
            Either::Many(texts) => Self::of_list(&texts.iter().map(String::as_str).collect::<Vec<_>>()),
        }
        .map_err(serde::de::Error::custom)
    }
}

// === impl DeviceSpec ===

impl FromStr for DeviceSpec {
    type Err = ParseDevicesError;

    fn from_str(text: &str) -> Result<Self, ParseDevicesError> {
        let unknown = || ParseDevicesError::Unknown { text: text.chars().take(64).collect() };
        if let Some(ordinal) = text.strip_prefix("cuda:") {
            return ordinal.parse().map(Self::Cuda).map_err(|_| unknown());
        }
        let simulated = text.strip_prefix("simulated:").ok_or_else(unknown)?;
        let (memory, rate) = match simulated.split_once('@') {
            Some((memory, rate)) => (memory, Some(rate)),
            None => (simulated, None),
        };
        let bytes = |text: &str| text.parse::<ByteSize>().ok().filter(|bytes| *bytes > ByteSize::ZERO);
        let rate = match rate {
            None => None,
            Some(rate) => {
                let bytes = rate.strip_suffix("/s").and_then(bytes).ok_or_else(unknown)?;
                #[expect(clippy::cast_precision_loss, reason = "a rate")]
                Some(BytesPerSec(bytes.bytes() as f64))
            }
        };
        Ok(Self::Simulated { memory: bytes(memory).ok_or_else(unknown)?, rate })
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Simulated { memory, rate: None } => write!(f, "simulated:{}", memory.bytes()),
            Self::Simulated { memory, rate: Some(rate) } => {
                write!(f, "simulated:{}@{:.0}/s", memory.bytes(), rate.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_parse_as_they_print() {
        let simulated = |gib, rate: Option<f64>| DeviceSpec::Simulated {
            memory: ByteSize::gib(gib),
            rate: rate.map(BytesPerSec),
        };
        for (text, value) in [
            ("auto", Devices::Auto),
            ("cpu", Devices::Cpu),
            ("cuda:1", Devices::These(vec![DeviceSpec::Cuda(1)])),
            ("cuda:0, cuda:3", Devices::These(vec![DeviceSpec::Cuda(0), DeviceSpec::Cuda(3)])),
            (
                "simulated:4GiB@25GB/s,simulated:2GiB",
                Devices::These(vec![simulated(4, Some(25e9)), simulated(2, None)]),
            ),
        ] {
            assert_eq!(text.parse(), Ok(value.clone()), "{text}");
            assert_eq!(value.to_string().parse(), Ok(value), "{text} printed");
        }
        for text in [
            "",
            "gpu",
            "cuda",
            "cuda:x",
            "cuda:0,",
            "cpu,cuda:0",
            "simulated",
            "simulated:0",
            "simulated:1GiB@x",
        ] {
            let error = text.parse::<Devices>().unwrap_err();
            assert!(matches!(error, ParseDevicesError::Unknown { .. }), "{text}: {error}");
        }
        let twice = "cuda:0,cuda:0".parse::<Devices>().unwrap_err();
        assert_eq!(twice.to_string(), "`cuda:0` is named twice");
    }
}
