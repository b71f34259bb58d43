//! Errors, and the Python exceptions that they become (`stoker/errors.py`).

use std::path::PathBuf;

use pyo3::{PyErr, PyResult, Python, prelude::*, types::PyDict};
use stoker_checkpoint::CheckpointError;
use stoker_device::DeviceError;
use stoker_io::MapError;
use stoker_store::{FilesError, LoadError, OpenError};

/// Why a load failed.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Error {
    #[error("{message}")]
    Checkpoint { message: String, file: Option<PathBuf>, tensor: Option<String> },
    #[error("{message}")]
    Corrupt { message: String, file: PathBuf },
    #[error("{message}")]
    Changed { message: String, file: PathBuf },
    #[error("{message}")]
    Read { message: String, file: Option<PathBuf> },
    #[error("{message}")]
    NotFound { message: String, file: Option<PathBuf> },
    #[error("{message}")]
    OutOfMemory { message: String },
    #[error("{message}")]
    Device { message: String },
    #[error("{message}")]
    Node { message: String },
    #[error(
        "{}: a pickle file, which can run any program when it is opened; convert it once, in an environment that you trust it with: \
         `from safetensors.torch import save_file; import torch; save_file(torch.load({:?}, weights_only=True), {:?})`",
        file.display(), file.display().to_string(), file.with_extension("safetensors").display().to_string()
    )]
    Pickle { file: PathBuf },
    #[error("{0}")]
    NotSupported(String),
    #[error("{0}")]
    Forked(String),
    #[error("the load was cancelled")]
    Cancelled,
    #[error("{0}")]
    Internal(String),
}

// === impl Error ===

impl Error {
    pub(crate) fn not_found(message: String) -> Self {
        Self::NotFound { message, file: None }
    }

    /// Name of the exception's class, with what it has besides words.
    fn class(&self) -> (&'static str, Option<&PathBuf>, Option<&str>) {
        match self {
            Self::Checkpoint { file, tensor, .. } => ("CheckpointError", file.as_ref(), tensor.as_deref()),
            Self::Corrupt { file, .. } => ("CorruptError", Some(file), None),
            Self::Changed { file, .. } => ("ChangedError", Some(file), None),
            Self::Read { file, .. } => ("ReadError", file.as_ref(), None),
            Self::NotFound { file, .. } => ("NotFoundError", file.as_ref(), None),
            Self::OutOfMemory { .. } => ("OutOfMemoryError", None, None),
            Self::Device { .. } => ("DeviceError", None, None),
            Self::Node { .. } => ("NodeError", None, None),
            Self::Pickle { file } => ("PickleRefused", Some(file), None),
            Self::NotSupported(_) => ("NotSupportedError", None, None),
            Self::Forked(_) => ("ForkError", None, None),
            Self::Cancelled => ("Cancelled", None, None),
            Self::Internal(_) => ("StokerError", None, None),
        }
    }

    pub(crate) fn into_py(self, py: Python<'_>) -> PyErr {
        let make = || -> PyResult<PyErr> {
            let (class, file, tensor) = self.class();
            let kwargs = PyDict::new(py);
            if let Some(file) = file {
                kwargs.set_item("file", file.display().to_string())?;
            }
            if let Some(tensor) = tensor {
                kwargs.set_item("tensor", tensor)?;
            }
            let class = py.import("stoker.errors")?.getattr(class)?;
            Ok(PyErr::from_value(class.call((self.to_string(),), Some(&kwargs))?))
        };
        make().unwrap_or_else(|error| error)
    }
}

impl From<CheckpointError> for Error {
    fn from(error: CheckpointError) -> Self {
        let message = error.to_string();
        match &error {
            CheckpointError::Io { file, source } => {
                let file = Some(file.clone());
                match source.kind() {
                    std::io::ErrorKind::NotFound => Self::NotFound { message, file },
                    _ => Self::Read { message, file },
                }
            }
            CheckpointError::NotAModel { path, .. } => Self::NotFound { message, file: Some(path.clone()) },
            other => Self::Checkpoint {
                message,
                file: Some(other.file().to_owned()),
                tensor: other.tensor().map(str::to_owned),
            },
        }
    }
}

impl From<LoadError> for Error {
    fn from(error: LoadError) -> Self {
        let message = error.to_string();
        match error {
            LoadError::Corrupt { path, .. } | LoadError::WrongHash { path, .. } => {
                Self::Corrupt { message, file: path }
            }
            LoadError::Changed { path, .. } => Self::Changed { message, file: path },
            LoadError::Open { path, source } if source.kind() == std::io::ErrorKind::NotFound => {
                Self::NotFound { message, file: Some(path) }
            }
            LoadError::Open { path, .. } | LoadError::Read { path, .. } => {
                Self::Read { message, file: Some(path) }
            }
            LoadError::Device { source, .. } => Self::from(source),
            LoadError::OutOfBudget { .. } => Self::OutOfMemory { message },
            LoadError::Cancelled => Self::Cancelled,
            _ => Self::Internal(message),
        }
    }
}

impl From<DeviceError> for Error {
    fn from(error: DeviceError) -> Self {
        let message = error.to_string();
        match error {
            DeviceError::OutOfMemory { .. } => Self::OutOfMemory { message },
            _ => Self::Device { message },
        }
    }
}

impl From<MapError> for Error {
    fn from(error: MapError) -> Self {
        let message = error.to_string();
        match error {
            MapError::Os { .. } => Self::OutOfMemory { message },
            _ => Self::Internal(message),
        }
    }
}

impl From<OpenError> for Error {
    fn from(error: OpenError) -> Self {
        Self::OutOfMemory { message: error.to_string() }
    }
}

impl From<FilesError> for Error {
    fn from(error: FilesError) -> Self {
        Self::Checkpoint { message: error.to_string(), file: None, tensor: None }
    }
}
