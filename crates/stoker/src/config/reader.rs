//! How weight files are read.

use serde::{Deserialize, Serialize};
use stoker_io::{DirectIo, LocalFiles, ReadMode};

/// How weight files are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ReaderSetting {
    /// As the store chooses for each file
    #[default]
    Auto,
    /// Past the page cache, through `io_uring` where that can be had
    Direct,
    /// Past the page cache, one call after the other
    Pread,
    /// Through the page cache
    Buffered,
}

// === impl ReaderSetting ===

impl ReaderSetting {
    /// Past or through the page cache.
    pub(crate) const fn mode(self) -> ReadMode {
        match self {
            Self::Auto => ReadMode::Auto,
            Self::Direct | Self::Pread => ReadMode::Direct,
            Self::Buffered => ReadMode::Buffered,
        }
    }

    /// What opens files.
    pub(crate) fn files(self) -> LocalFiles {
        let direct = if self == Self::Pread { DirectIo::Pread } else { DirectIo::Auto };
        LocalFiles { direct, ..LocalFiles::default() }
    }

    /// Its name in the file and on the command line.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Direct => "direct",
            Self::Pread => "pread",
            Self::Buffered => "buffered",
        }
    }
}
