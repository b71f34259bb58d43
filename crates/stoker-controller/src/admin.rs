//! What an operator may ask and say.

use std::time::Duration;

use stoker_scheduler::{
    residency::{InstanceState, ModelKey, StopReason},
    sizing::Sizing,
};
use stoker_types::{InstanceId, ModelName, Refusal, StartFailure, StopMode};
use tokio::{sync::watch, time::timeout_at};

use crate::{
    admit::{ControllerHandle, is_shortage},
    report::{Explanation, InstanceStatus, Status},
    state::{State, Wanted},
};

/// How long a request that was announced may take to ask for its seat.
const EXPECTED: Duration = Duration::from_secs(2);

/// Why a model was not unloaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnloadError {
    /// It has no instance.
    #[error("`{model}` is not loaded")]
    NotLoaded {
        /// Which.
        model: ModelName,
    },
    /// It has sequences running; forcing would end them.
    #[error("`{model}` is busy with {sequences} sequences; forcing ends them with an error")]
    Busy {
        /// Which.
        model: ModelName,
        /// How many.
        sequences: u32,
    },
    /// It is being loaded, which is never cut short.
    #[error("`{model}` is being loaded; try again when it is ready")]
    Loading {
        /// Which.
        model: ModelName,
    },
}

impl ControllerHandle {
    /// Every instance that holds memory.
    #[must_use]
    pub fn instances(&self) -> Vec<InstanceStatus> {
        let now = self.shared.now();
        let state = self.shared.state.lock();
        state.instances.iter().map(|(id, instance)| state.instance_status(*id, instance, now)).collect()
    }

    /// All in all.
    #[must_use]
    pub fn status(&self) -> Status {
        self.shared.state.lock().status()
    }

    /// What an instance of the model would take here, loaded or not.
    ///
    /// # Errors
    /// [`Refusal::Start`] for an unknown model, [`Refusal::TooLarge`].
    pub fn sizing(&self, model: &ModelName) -> Result<Sizing, Refusal> {
        let unknown = || StartFailure::UnknownModel { model: model.clone() };
        let facts = self.shared.facts.facts(model).ok_or_else(unknown)?;
        let state = self.shared.state.lock();
        state.sizing(&facts).map_err(|(server, error)| state.too_large_for(&facts, server, error))
    }

    /// What is known of a model, in words; `None` when there is no such model.
    #[must_use]
    pub fn explain(&self, model: &ModelName) -> Option<Explanation> {
        let facts = self.shared.facts.facts(model)?;
        let now = self.shared.now();
        let mut state = self.shared.state.lock();
        let key = state.know(facts);
        let known = state.model(key);
        let sizing = match state.sizing(&known.facts) {
            Ok(sizing) => format!(
                "context {} for {} sequences: weights {} + KV {}{}",
                sizing.context,
                sizing.sequences,
                sizing.pool_bytes,
                sizing.kv_bytes,
                match sizing.work_bytes {
                    stoker_types::ByteSize::ZERO => String::new(),
                    work => format!(" + work {work}"),
                },
            ),
            Err((_, error)) => error.to_string(),
        };
        let (estimate, eta) = match state.outlook(key, 0, now) {
            Ok(outlook) => (outlook.terms, outlook.eta),
            Err(refusal) => (refusal.to_string(), Duration::MAX),
        };
        let instances = known
            .instances
            .iter()
            .filter_map(|id| {
                state.instances.get(id).map(|instance| state.instance_status(*id, instance, now))
            })
            .collect();
        Some(Explanation {
            at: now,
            model: model.clone(),
            instances,
            waiting: known.waiting(),
            oldest: known.oldest_since().map(|since| now.saturating_sub(since)),
            sizing,
            estimate,
            eta,
            failure: known.failed.as_ref().map(|failed| failed.failure.to_string()),
            decisions: state.records_of(model),
        })
    }

    /// Holds the model's instances in memory, now and later, until [`ControllerHandle::unpin`]. Starts none.
    ///
    /// # Errors
    /// [`StartFailure::UnknownModel`].
    pub fn pin(&self, model: &ModelName) -> Result<(), StartFailure> {
        self.set_pin(model, true)
    }

    /// The model may make room again.
    ///
    /// # Errors
    /// [`StartFailure::UnknownModel`].
    pub fn unpin(&self, model: &ModelName) -> Result<(), StartFailure> {
        self.set_pin(model, false)
    }

    fn set_pin(&self, model: &ModelName, pin: bool) -> Result<(), StartFailure> {
        let unknown = || StartFailure::UnknownModel { model: model.clone() };
        let facts = self.shared.facts.facts(model).ok_or_else(unknown)?;
        let mut state = self.shared.state.lock();
        let key = state.know(facts);
        state.model_mut(key).pin = Some(pin);
        drop(state);
        self.shared.notify.notify_one();
        Ok(())
    }

    /// Brings a model to the device and returns when it is ready. Idle models make room for it. Cancel-safe: the
    /// start goes on without the caller, at most for `wait_max`.
    ///
    /// # Errors
    /// As [`ControllerHandle::admit`].
    pub async fn preload(&self, model: &ModelName, wait_max: Duration) -> Result<(), Refusal> {
        let (key, since, mut changed) = match self.want(model, wait_max) {
            Err(refusal) if is_shortage(&refusal) => {
                self.shared.look().await;
                self.want(model, wait_max)?
            }
            wanted => wanted?,
        };
        let deadline = self.shared.instant(since.saturating_add(wait_max));
        loop {
            {
                let state = self.shared.state.lock();
                if state.is_ready(key) {
                    return Ok(());
                }
                if state.shutting_down {
                    return Err(Refusal::ShuttingDown);
                }
                if let Some(refusal) = state.too_large(key) {
                    return Err(refusal);
                }
                if let Some(failed) = state.model(key).failed.as_ref().filter(|failed| failed.at >= since) {
                    return Err(failed.failure.clone().into());
                }
            }
            if timeout_at(deadline, changed.changed()).await.is_err() {
                let now = self.shared.now();
                let outlook = self.shared.state.lock().outlook(key, 0, now)?;
                return Err(Refusal::NotInTime { wait_max, terms: outlook.terms, eta: outlook.eta });
            }
        }
    }

    /// A request for the model is being prepared: its start may begin, as for [`ControllerHandle::preload`]. What stands
    /// in the way is said when the request asks for its seat.
    pub fn expect(&self, model: &ModelName) {
        match self.want(model, EXPECTED) {
            Ok((key, since, _)) => {
                let mut state = self.shared.state.lock();
                let earliest = state.model(key).announced.filter(|at| since.saturating_sub(*at) < EXPECTED);
                state.model_mut(key).announced = earliest.or(Some(since));
            }
            Err(refusal) => tracing::debug!(%model, %refusal, "an expected model isn't started"),
        }
    }

    /// Makes a model wanted, at most for `wait_max`, unless it is ready.
    fn want(
        &self,
        model: &ModelName,
        wait_max: Duration,
    ) -> Result<(ModelKey, Duration, watch::Receiver<()>), Refusal> {
        let unknown = || StartFailure::UnknownModel { model: model.clone() };
        let facts = self.shared.facts.facts(model).ok_or_else(unknown)?;
        let since = self.shared.now();
        let mut state = self.shared.state.lock();
        if state.shutting_down {
            return Err(Refusal::ShuttingDown);
        }
        let key = state.know(facts);
        if let Some(refusal) = state.too_large(key) {
            return Err(refusal);
        }
        if !state.is_ready(key) {
            let until = Some(since.saturating_add(wait_max));
            state.model_mut(key).wanted = Some(Wanted { since, until, evicts: true });
            state.mark(key);
        }
        let changed = state.changed.subscribe();
        drop(state);
        self.shared.notify.notify_one();
        Ok((key, since, changed))
    }

    /// Stops the model's instances and returns when they are gone: how many there were. A pin doesn't hold against
    /// this. With `force`, running sequences end with an error. Requests that wait, and new ones, start it again.
    ///
    /// Cancel-safe: the stop goes on without the caller.
    ///
    /// # Errors
    /// [`UnloadError`].
    pub async fn unload(&self, model: &ModelName, force: bool) -> Result<usize, UnloadError> {
        let now = self.shared.now();
        let (stopping, mut changed) = {
            let mut state = self.shared.state.lock();
            (state.unload(model, force, now)?, state.changed.subscribe())
        };
        self.shared.notify.notify_one();
        loop {
            {
                let state = self.shared.state.lock();
                let left = stopping.iter().filter_map(|id| state.instances.get(id));
                let mut gone = true;
                for instance in left {
                    gone = false;
                    if instance.state != InstanceState::Stopping {
                        let sequences = instance.in_flight;
                        return Err(UnloadError::Busy { model: model.clone(), sequences });
                    }
                }
                if gone {
                    return Ok(stopping.len());
                }
            }
            // The sender lives in the state, which lives as long as this handle.
            let never = changed.changed().await.is_err();
            debug_assert!(!never, "the state is gone while a handle exists");
        }
    }
}

// === impl State ===

impl State {
    fn is_ready(&self, key: ModelKey) -> bool {
        let ready = |id: &InstanceId| self.instances.get(id).is_some_and(|i| i.state == InstanceState::Ready);
        self.model(key).instances.iter().any(ready)
    }

    fn unload(
        &mut self,
        model: &ModelName,
        force: bool,
        now: Duration,
    ) -> Result<Vec<InstanceId>, UnloadError> {
        let ids = self.key(model).map(|key| self.model(key).instances.clone()).unwrap_or_default();
        if ids.is_empty() {
            return Err(UnloadError::NotLoaded { model: model.clone() });
        }
        let of = |id: &InstanceId| self.instances.get(id);
        if ids.iter().filter_map(of).any(|i| i.state == InstanceState::Starting) {
            return Err(UnloadError::Loading { model: model.clone() });
        }
        let sequences: u32 = ids.iter().filter_map(of).map(|i| i.in_flight).sum();
        if sequences > 0 && !force {
            return Err(UnloadError::Busy { model: model.clone(), sequences });
        }
        let mode = if force { StopMode::Now } else { StopMode::IfIdle };
        for id in &ids {
            if self.instances.get(id).is_some_and(|i| i.state != InstanceState::Stopping) {
                self.stop(*id, StopReason::Unload, mode, now);
            }
        }
        Ok(ids)
    }

    pub(crate) fn shut_down(&mut self) {
        self.shutting_down = true;
        for at in 0..self.models.len() {
            let key = ModelKey(u32::try_from(at).unwrap_or(u32::MAX));
            self.refuse_all(key, &Refusal::ShuttingDown);
        }
        self.changed.send_replace(());
    }
}
