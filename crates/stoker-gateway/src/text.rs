//! Models' tokenizers and chat templates: opened once, lazily, off the runtime's threads, and kept in a bounded cache.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use stoker_checkpoint::text::TextAssets;
use tokio::sync::{OnceCell, Semaphore};

use crate::seams::ServedModel;

/// Opens a model's text side.
pub trait TextSource: Send + Sync + 'static {
    /// Reads it. Blocking; called on a thread for that.
    ///
    /// # Errors
    /// What is wrong with the files, in words.
    fn open(&self) -> Result<TextAssets, String>;
}

impl<F: Fn() -> Result<TextAssets, String> + Send + Sync + 'static> TextSource for F {
    fn open(&self) -> Result<TextAssets, String> {
        self()
    }
}

/// Why a prompt has no token ids.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TextError {
    /// The model's tokenizer can't be read.
    #[error("the tokenizer of `{model}` can't be used: {detail}")]
    Open { model: String, detail: String },
    /// The template refuses the messages, or the text can't be tokenised.
    #[error("{detail}")]
    Prompt { param: &'static str, detail: String },
}

/// The text sides in use lately, and the threads that work with them.
#[derive(Debug)]
pub(crate) struct TextCache {
    entries: Mutex<VecDeque<Entry>>,
    models_max: usize,
    threads: Arc<Semaphore>,
}

#[derive(Clone)]
struct Entry {
    /// Which model in which version: the same `Arc` is the same version.
    model: Arc<ServedModel>,
    assets: Arc<OnceCell<Arc<TextAssets>>>,
}

// === impl TextCache ===

impl TextCache {
    pub(crate) fn new(models_max: usize, threads_max: usize) -> Self {
        Self {
            entries: Mutex::default(),
            models_max: models_max.max(1),
            threads: Arc::new(Semaphore::new(threads_max.max(1))),
        }
    }

    /// A model's text side. However many requests ask, it is opened once; a failure is tried again by the next.
    pub(crate) async fn get(&self, model: &Arc<ServedModel>) -> Result<Arc<TextAssets>, TextError> {
        let entry = self.entry(model);
        let open = || async {
            let source = Arc::clone(&model.text);
            let assets = self.blocking(move || source.open()).await;
            let error = |detail| TextError::Open { model: model.name.to_string(), detail };
            assets.and_then(|a| a).map(Arc::new).map_err(error)
        };
        entry.assets.get_or_try_init(open).await.cloned()
    }

    /// Runs `work` on a thread for blocking work, when one of the budget is free.
    ///
    /// # Errors
    /// When `work` panicked.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, String> {
        let Ok(permit) = Arc::clone(&self.threads).acquire_owned().await else {
            return Err("the server is shutting down".into());
        };
        let work = move || {
            // A caller that has gone away doesn't free the thread, so the permit stays with the work.
            let _permit = permit;
            work()
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| "an internal error; the log has details".into())
    }

    /// Whether a model's text side is in memory.
    pub(crate) fn is_open(&self, model: &Arc<ServedModel>) -> bool {
        self.entries.lock().iter().any(|e| Arc::ptr_eq(&e.model, model) && e.assets.initialized())
    }

    fn entry(&self, model: &Arc<ServedModel>) -> Entry {
        let mut entries = self.entries.lock();
        let found = entries.iter().position(|e| e.model.name == model.name);
        let entry = match found.and_then(|at| entries.remove(at)) {
            Some(entry) if Arc::ptr_eq(&entry.model, model) => entry,
            _ => Entry { model: Arc::clone(model), assets: Arc::default() },
        };
        entries.truncate(self.models_max - 1);
        entries.push_front(entry.clone());
        entry
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry").field("model", &self.model.name).finish_non_exhaustive()
    }
}
