//! How much KV cache an instance gets, and so how long its context is.

use stoker_types::{ByteSize, ModelFacts};

use crate::residency::{Budgets, Place};

/// Judgements about KV cache. See [`size`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SizingRules {
    /// Sequences of full context that an instance has room for, unless its concurrency is lower.
    pub sequences_full: u32,
    /// A model whose context nobody set takes at most one part in so many of the KV budget, or of a device's memory, so that a single model
    /// trained for 128 Ki tokens doesn't keep every other one out.
    pub share: u32,
    /// Yet it isn't cut below this context for the sake of others, in tokens.
    pub context_kept: u32,
    /// An instance with less context than this is of no use, in tokens.
    pub context_min: u32,
}

/// What one instance of a model takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizing {
    /// Context of one sequence, in tokens.
    pub context: u32,
    /// Most sequences at the same time.
    pub sequences: u32,
    /// KV cache of all of them together.
    pub kv_bytes: ByteSize,
    /// Weights: whole chunks of the pool, or a slab of a device.
    pub pool_bytes: ByteSize,
    /// Work memory on a device.
    pub work_bytes: ByteSize,
}

/// What there is for one instance's KV cache, and beside it.
struct Room {
    weights: ByteSize,
    work: ByteSize,
    kv: ByteSize,
    /// What the instance shares with others: the KV budget, or all of a device.
    shared: ByteSize,
    /// The device's memory; `None`: KV caches have a budget of their own.
    device: Option<ByteSize>,
}

/// The model would not fit into empty memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("needs {needed}, the budget is {budget}: {detail}")]
pub struct TooLarge {
    /// Of the budget that is exceeded.
    pub needed: ByteSize,
    /// That budget.
    pub budget: ByteSize,
    /// Which budget, the terms, and what would make it fit.
    pub detail: String,
}

/// Contexts that were lowered are whole multiples of this: KV blocks stay whole.
const CONTEXT_STEP: u32 = 64;

// === impl SizingRules ===

impl Default for SizingRules {
    fn default() -> Self {
        Self { sequences_full: 2, share: 4, context_kept: 8192, context_min: 256 }
    }
}

// === impl Sizing ===

/// Sizes an instance of a model for the largest of these places: the context is min(the model's, what fits with two
/// sequences) and never above the trained length. A context that the operator set is kept, with one sequence if need be.
///
/// # Errors
/// [`TooLarge`] when the weights or the least useful KV cache exceed the whole budget.
pub fn size(facts: &ModelFacts, places: &[Place], rules: &SizingRules) -> Result<Sizing, TooLarge> {
    let room = Room::of(facts, places)?;
    let sequences = facts.settings.concurrency.max(1);
    let full = u64::from(rules.sequences_full.clamp(1, sequences));
    let per_token = facts.kv_bytes_per_token.bytes().max(1);
    let trained = facts.context_trained.max(1);
    let wanted = facts.settings.context.unwrap_or(trained).clamp(1, trained);
    let fits = |sequences: u64, budget: u64| {
        u32::try_from(budget / per_token / sequences).unwrap_or(u32::MAX).min(wanted)
    };
    let budget = room.kv.bytes();
    let (mut context, mut held) = (fits(full, budget), full);
    if facts.settings.context.is_some() && context < wanted && fits(1, budget) == wanted {
        // At least one whole sequence, and what is left of the budget for others.
        (context, held) = (wanted, 1);
    } else if facts.settings.context.is_none() && full > 0 {
        let shared = fits(full, room.shared.bytes() / u64::from(rules.share.max(1)));
        context = context.min(shared.max(rules.context_kept));
    }
    if context < wanted && context > CONTEXT_STEP {
        context -= context % CONTEXT_STEP;
    }
    let explicit_unmet = facts.settings.context.is_some() && context < wanted;
    if context < rules.context_min.min(wanted) || explicit_unmet {
        let least = if explicit_unmet { wanted } else { rules.context_min.min(wanted) };
        let fits = (context >= rules.context_min.min(wanted)).then_some(context);
        return Err(room.too_small(facts, least, ByteSize(kv(per_token, least, 1)), fits));
    }
    let kv_bytes = kv(facts.kv_bytes_per_token.bytes(), context, held).min(budget);
    let Room { weights: pool_bytes, work: work_bytes, .. } = room;
    Ok(Sizing { context, sequences, kv_bytes: ByteSize(kv_bytes), pool_bytes, work_bytes })
}

// === impl Room ===

impl Room {
    fn of(facts: &ModelFacts, places: &[Place]) -> Result<Self, TooLarge> {
        let most = |place: &&Place| match place {
            Place::Pool(Budgets { dram, .. }) => *dram,
            Place::Device { memory, .. } => *memory,
        };
        match places.iter().max_by_key(most) {
            None => Err(TooLarge {
                needed: facts.weight_bytes,
                budget: ByteSize::ZERO,
                detail: "there is nothing to compute on".into(),
            }),
            Some(Place::Pool(Budgets { dram, kv, .. })) => {
                if facts.pool_bytes > *dram {
                    return Err(TooLarge {
                        needed: facts.pool_bytes,
                        budget: *dram,
                        detail: format!(
                            "weights {} take {} of DRAM in whole chunks; a DRAM budget of {} would hold it",
                            facts.weight_bytes, facts.pool_bytes, facts.pool_bytes
                        ),
                    });
                }
                let (weights, work) = (facts.pool_bytes, ByteSize::ZERO);
                Ok(Self { weights, work, kv: *kv, shared: *kv, device: None })
            }
            Some(Place::Device { memory, work, .. }) => {
                let (weights, work) = (facts.device_bytes, *work);
                let taken = ByteSize(weights.bytes().saturating_add(work.bytes()));
                if taken > *memory {
                    return Err(TooLarge {
                        needed: taken,
                        budget: *memory,
                        detail: format!("weights {weights} + work {work}, without any KV cache"),
                    });
                }
                let kv = memory.saturating_sub(taken);
                Ok(Self { weights, work, kv, shared: *memory, device: Some(*memory) })
            }
        }
    }

    /// The least KV cache of use, for `tokens`, is more than there is. `fits`: a context that would do.
    fn too_small(&self, facts: &ModelFacts, tokens: u32, least: ByteSize, fits: Option<u32>) -> TooLarge {
        let Self { weights, work, kv, device, .. } = self;
        let each = facts.kv_bytes_per_token;
        match device {
            None => TooLarge {
                needed: least,
                budget: *kv,
                detail: match fits {
                    Some(fits) => {
                        format!("KV cache at {tokens} tokens, {each} each; would fit with `context = {fits}`")
                    }
                    None => format!(
                        "KV cache at {tokens} tokens, {each} each; a KV budget of {least} would hold {tokens} tokens"
                    ),
                },
            },
            Some(memory) => {
                let would =
                    fits.map(|fits| format!("; would fit with `context = {fits}`")).unwrap_or_default();
                TooLarge {
                    needed: ByteSize(
                        weights.bytes().saturating_add(work.bytes()).saturating_add(least.bytes()),
                    ),
                    budget: *memory,
                    detail: format!(
                        "weights {weights} + KV {least} at {tokens} tokens, {each} each + work {work}{would}"
                    ),
                }
            }
        }
    }
}

const fn kv(per_token: u64, context: u32, sequences: u64) -> u64 {
    per_token.saturating_mul(context as u64).saturating_mul(sequences)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use stoker_types::{ModelName, ModelSettings};

    use super::*;

    fn facts(per_token: u64, trained: u32, context: Option<u32>) -> ModelFacts {
        ModelFacts {
            model: ModelName::new("m").unwrap(),
            settings: ModelSettings { context, ..ModelSettings::default() },
            weight_bytes: ByteSize::mib(90),
            pool_bytes: ByteSize::mib(96),
            device_bytes: ByteSize::mib(92),
            kv_bytes_per_token: ByteSize(per_token),
            context_trained: trained,
            weights_on: stoker_types::Tier::Ssd,
        }
    }

    fn budgets(kv: ByteSize) -> [Place; 1] {
        [Place::Pool(Budgets { dram: ByteSize::mib(128), kv, slots: 4 })]
    }

    fn device(memory: ByteSize) -> Place {
        Place::Device { memory, work: ByteSize::mib(4), slots: 2 }
    }

    #[test]
    fn on_a_device_everything_is_of_one_memory_and_the_largest_counts() {
        let rules = SizingRules::default();
        let facts = |context| facts(1024, 131_072, context);
        // A quarter of the device at most for what nobody asked for.
        let places = [device(ByteSize::mib(64)), device(ByteSize::mib(256))];
        let sizing = size(&facts(None), &places, &rules).unwrap();
        assert_eq!((sizing.context, sizing.kv_bytes), (32_768, ByteSize::mib(64)));
        assert_eq!((sizing.pool_bytes, sizing.work_bytes), (ByteSize::mib(92), ByteSize::mib(4)));
        let sizing = size(&facts(Some(65_536)), &[device(ByteSize::mib(224))], &rules).unwrap();
        assert_eq!(sizing.kv_bytes, ByteSize::mib(128), "exactly");
        let error = size(&facts(Some(131_072)), &[device(ByteSize::mib(160))], &rules).unwrap_err();
        assert_eq!((error.needed, error.budget), (ByteSize::mib(224), ByteSize::mib(160)));
        assert!(
            error.detail.contains("weights 92.0 MiB + KV 128.0 MiB at 131072 tokens")
                && error.detail.contains("would fit with `context = 32768`"),
            "{error}"
        );
        let error = size(&facts(None), &[device(ByteSize::mib(95))], &rules).unwrap_err();
        assert_eq!((error.needed, error.budget), (ByteSize::mib(96), ByteSize::mib(95)));
        assert!(size(&facts(None), &[], &rules).is_err());
    }

    #[test]
    fn two_sequences_of_the_models_context_when_they_fit() {
        let sizing =
            size(&facts(46_080, 8192, None), &budgets(ByteSize::gib(4)), &SizingRules::default()).unwrap();
        assert_eq!((sizing.context, sizing.kv_bytes), (8192, ByteSize(46_080 * 8192 * 2)));
    }

    #[test]
    fn else_the_context_is_lowered() {
        let sizing =
            size(&facts(1024, 8192, None), &budgets(ByteSize::mib(8)), &SizingRules::default()).unwrap();
        assert_eq!((sizing.context, sizing.kv_bytes), (4096, ByteSize::mib(8)));
        // A very long context gives way to other models, down to `context_kept`.
        let sizing =
            size(&facts(1024, 131_072, None), &budgets(ByteSize::mib(64)), &SizingRules::default()).unwrap();
        assert_eq!(sizing.context, 8192);
        let sizing =
            size(&facts(1024, 131_072, None), &budgets(ByteSize::mib(256)), &SizingRules::default()).unwrap();
        assert_eq!(sizing.context, 32_768, "a quarter of the budget");
    }

    #[test]
    fn a_context_that_was_asked_for_is_kept_or_refused() {
        let rules = SizingRules::default();
        let sizing = size(&facts(1024, 131_072, Some(65_536)), &budgets(ByteSize::mib(64)), &rules).unwrap();
        assert_eq!((sizing.context, sizing.kv_bytes), (65_536, ByteSize::mib(64)), "one sequence then");
        let error =
            size(&facts(1024, 131_072, Some(131_072)), &budgets(ByteSize::mib(64)), &rules).unwrap_err();
        assert!(error.detail.contains("would fit with `context = 32768`"), "{error}");
        let sizing = size(&facts(1024, 2048, Some(65_536)), &budgets(ByteSize::mib(64)), &rules).unwrap();
        assert_eq!(sizing.context, 2048, "never above what it was trained for");
    }

    #[test]
    fn what_fits_nowhere_is_refused_with_its_terms() {
        let rules = SizingRules::default();
        let mut large = facts(1024, 8192, None);
        large.pool_bytes = ByteSize::gib(1);
        let error = size(&large, &budgets(ByteSize::mib(64)), &rules).unwrap_err();
        assert_eq!((error.needed, error.budget), (ByteSize::gib(1), ByteSize::mib(128)));
        let error = size(&facts(1 << 20, 8192, None), &budgets(ByteSize::mib(64)), &rules).unwrap_err();
        assert!(error.detail.contains("256 tokens"), "{error}");
    }

    proptest! {
        #[test]
        fn never_more_than_there_is(
            per_token in 0u64..1 << 30, trained in 0u32..1 << 24, context in proptest::option::of(0u32..1 << 24),
            kv in 0u64..1 << 44,
        ) {
            let budgets = budgets(ByteSize(kv));
            if let Ok(sizing) = size(&facts(per_token, trained, context), &budgets, &SizingRules::default()) {
                prop_assert!(sizing.kv_bytes.bytes() <= kv);
                prop_assert!(sizing.context <= trained.max(1));
                prop_assert!(u128::from(sizing.context) * u128::from(per_token) <= u128::from(sizing.kv_bytes.bytes()));
            }
        }
    }
}
