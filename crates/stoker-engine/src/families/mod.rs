//! Model families: one file each, and its line in [`FAMILIES`].

pub(crate) mod llama;
pub(crate) mod rope;
mod tensors;

use std::sync::Arc;

use stoker_checkpoint::{Architecture, Manifest, ModelConfig};

use crate::{EngineError, EngineLimits, Model, threads::Threads};
pub use tensors::Places;
use tensors::Tensors;

/// A family: an architecture and what builds a model of it.
struct Family {
    architecture: Architecture,
    load: Load,
}

type Load = fn(&ModelConfig, &Tensors<'_>, Arc<Threads>) -> Result<Box<dyn Model>, EngineError>;

/// Every family that the engine computes.
const FAMILIES: &[Family] = &[Family { architecture: Architecture::Llama, load: llama::load }];

/// Builds a model over its tensors in memory. Nothing is copied but norms and biases; the model keeps the regions alive.
///
/// # Errors
/// [`EngineError`]; [`EngineError::not_runnable`] tells whether another attempt could succeed.
pub fn load_model(
    manifest: &Manifest,
    places: Places<'_>,
    threads: Arc<Threads>,
    limits: &EngineLimits,
) -> Result<Box<dyn Model>, EngineError> {
    let config = config_of(manifest, limits)?;
    let family = FAMILIES
        .iter()
        .find(|family| family.architecture == config.architecture)
        .ok_or(EngineError::Architecture { architecture: config.architecture })?;
    (family.load)(config, &Tensors::new(manifest, places), threads)
}

/// What a manifest says of a model that can be computed within the limits.
pub(crate) fn config_of<'a>(
    manifest: &'a Manifest,
    limits: &EngineLimits,
) -> Result<&'a ModelConfig, EngineError> {
    let config = match (&manifest.refusal, &manifest.config) {
        (None, Some(config)) => config,
        (Some(reason), _) => return Err(EngineError::Refused { reason: reason.clone() }),
        (None, None) => return Err(EngineError::Refused { reason: "it has no configuration".to_owned() }),
    };
    if limits.context > config.context_trained {
        let what = format!(
            "a context of {} tokens is above the trained length of {}",
            limits.context, config.context_trained
        );
        return Err(EngineError::Config { what });
    }
    Ok(config)
}
