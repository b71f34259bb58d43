//! What a file's chunks can be read from: the tiers below memory.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use stoker_io::{Choice, Reader};
use stoker_types::Tier;

use crate::{files::ChunkRef, ssd::SsdCopy};

/// Everything that has a file, or some of it.
#[derive(Clone)]
pub(crate) struct FileSource {
    /// The whole file, on this machine.
    pub(crate) local: Option<Arc<dyn Reader>>,
    /// A copy that isn't whole yet.
    pub(crate) copy: Option<PartSource>,
    /// Where it came from, or only is.
    pub(crate) remote: Option<Arc<dyn Reader>>,
}

/// A file of a copy.
#[derive(Clone)]
pub(crate) struct PartSource {
    pub(crate) copy: Arc<SsdCopy>,
    /// What is there of it.
    pub(crate) reader: Arc<dyn Reader>,
}

/// One of the reads from remote that may be under way at a time. Given back by drop.
pub(crate) struct Ticket(Arc<AtomicUsize>);

// === impl FileSource ===

impl FileSource {
    /// The fastest tier that has a chunk. `None`: no tier has it.
    pub(crate) fn fastest(&self, chunk: ChunkRef) -> Option<(Tier, &Arc<dyn Reader>)> {
        let there = |part: &&PartSource| part.copy.sum(chunk).is_some();
        let ssd = self.local.as_ref().or_else(|| self.copy.as_ref().filter(there).map(|part| &part.reader));
        let ssd = ssd.map(|reader| (Tier::Ssd, reader));
        ssd.or_else(|| self.remote.as_ref().map(|reader| (Tier::Remote, reader)))
    }

    /// What is below a tier.
    pub(crate) fn below(&self, tier: Tier) -> Option<&Arc<dyn Reader>> {
        self.remote.as_ref().filter(|_| tier == Tier::Ssd)
    }

    /// How it is read, as far as one answer says that.
    pub(crate) fn choice(&self) -> Option<&Choice> {
        self.local.as_ref().or(self.remote.as_ref()).map(|reader| reader.choice())
    }
}

// === impl Ticket ===

impl Ticket {
    /// A ticket, if fewer than `most` are out.
    pub(crate) fn take(out: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let taken = out.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < most).then_some(n + 1));
        taken.ok().map(|_| Self(Arc::clone(out)))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
