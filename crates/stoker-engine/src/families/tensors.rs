//! Finding a family's weights by what they are for.

use std::{collections::HashMap, sync::Arc};

use stoker_checkpoint::{Manifest, Role, Tensor};

use crate::{
    EngineError,
    weight::{Region, Weight, WeightBytes, WeightError},
};

/// Where a checkpoint's tensors are in memory.
#[derive(Clone, Copy)]
pub enum Places<'a> {
    /// Region `i` holds the manifest's file `i` from its first byte.
    Files(&'a [Arc<dyn Region>]),
    /// One region holds all of them: tensor `i` of the manifest begins at byte `offsets[i]`.
    Slab {
        /// The region.
        region: &'a Arc<dyn Region>,
        /// First byte of each tensor, in the manifest's order.
        offsets: &'a [u64],
    },
}

/// A checkpoint's tensors by role.
pub(crate) struct Tensors<'a> {
    /// With its position in the manifest.
    by_role: HashMap<Role, (usize, &'a Tensor)>,
    places: Places<'a>,
}

// === impl Tensors ===

impl<'a> Tensors<'a> {
    pub(crate) fn new(manifest: &'a Manifest, places: Places<'a>) -> Self {
        let by_role =
            manifest.tensors.iter().enumerate().filter_map(|(i, t)| Some((t.role?, (i, t)))).collect();
        Self { by_role, places }
    }

    /// Whether the checkpoint has this tensor.
    pub(crate) fn has(&self, role: Role) -> bool {
        self.by_role.contains_key(&role)
    }

    /// A matrix `[rows, cols]`, in place.
    pub(crate) fn matrix(&self, role: Role, rows: usize, cols: usize) -> Result<Weight, EngineError> {
        self.weight(role, &[rows, cols])
    }

    /// A vector of `len` elements, converted: norms and biases are small and used in every step.
    pub(crate) fn vector(&self, role: Role, len: usize) -> Result<Vec<f32>, EngineError> {
        Ok(self.weight(role, &[len])?.to_f32())
    }

    /// As [`vector`](Self::vector), where the configuration says whether there is one. A tensor that is there although
    /// the configuration denies it would change the arithmetic if used and can't be ignored either: an error.
    pub(crate) fn vector_if(
        &self,
        there: bool,
        role: Role,
        len: usize,
    ) -> Result<Option<Vec<f32>>, EngineError> {
        match (there, self.has(role)) {
            (true, _) => self.vector(role, len).map(Some),
            (false, false) => Ok(None),
            (false, true) => Err(EngineError::Config {
                what: format!("it says that there is no {role:?}, but the checkpoint has one"),
            }),
        }
    }

    fn weight(&self, role: Role, shape: &[usize]) -> Result<Weight, EngineError> {
        let (index, tensor) = *self.by_role.get(&role).ok_or(EngineError::MissingTensor { role })?;
        let expected: Vec<u64> = shape.iter().map(|n| *n as u64).collect();
        if tensor.shape != expected {
            return Err(EngineError::Shape {
                tensor: tensor.name.clone(),
                dtype: tensor.dtype,
                expected,
                found: tensor.shape.clone(),
            });
        }
        let (region, offset) = match self.places {
            Places::Files(regions) => {
                let region = regions.get(tensor.file as usize).ok_or_else(|| EngineError::MissingRegion {
                    tensor: tensor.name.clone(),
                    file: tensor.file,
                    regions: regions.len(),
                })?;
                (region, tensor.offset)
            }
            Places::Slab { region, offsets } => {
                let offset = offsets.get(index).ok_or_else(|| EngineError::MissingOffset {
                    tensor: tensor.name.clone(),
                    offsets: offsets.len(),
                })?;
                (region, *offset)
            }
        };
        let (rows, cols) = match *shape {
            [len] => (1, len),
            [rows, cols] => (rows, cols),
            _ => unreachable!("families ask for vectors and matrices"),
        };
        let weight = || {
            let (offset, len) = (usize::try_from(offset), usize::try_from(tensor.len));
            let bytes = WeightBytes::new(
                Arc::clone(region),
                offset.unwrap_or(usize::MAX),
                len.unwrap_or(usize::MAX),
            )?;
            Weight::new(tensor.dtype, rows, cols, bytes)
        };
        weight().map_err(|source: WeightError| EngineError::Tensor {
            tensor: tensor.name.clone(),
            shape: tensor.shape.clone(),
            source,
        })
    }
}
