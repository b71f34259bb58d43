//! The native part of the Python package `stoker`.
//!
//! A `Load` is a task on the process's own threads: the interpreter's lock is held only to begin it, to ask how far it is,
//! and to take tensors. What comes out are `Tensor`s, which hand their memory over through DLPack capsules without a copy;
//! the package's Python part makes `torch.Tensor`s of them where PyTorch is installed.

mod dlpack;
mod element;
mod engine;
mod error;
mod job;
mod memory;
mod node;
mod settings;
mod source;

use std::{path::PathBuf, sync::Arc};

use pyo3::{
    exceptions::{PyBufferError, PyTypeError, PyValueError},
    prelude::*,
    types::PyTuple,
};
use tokio::sync::watch;

use dlpack::{DeviceKind, View};
use element::Element;
use engine::{Engine, Place};
use error::Error;
use job::{From, Order, Progress, Ready, Shared};
use memory::Memory;

/// A tensor's bytes, where they were loaded to. Without PyTorch this is what loads return.
#[pyclass(frozen, module = "stoker", weakref)]
struct Tensor {
    memory: Arc<Memory>,
    element: Element,
    shape: Vec<i64>,
}

/// A load under way. Dropped, it is cancelled.
#[pyclass(frozen, module = "stoker._native")]
struct Load {
    engine: Arc<Engine>,
    shared: Arc<Shared>,
    progress: watch::Receiver<Progress>,
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tensor>()?;
    module.add_class::<Load>()?;
    module.add_function(wrap_pyfunction!(before_fork, module)?)?;
    module.add_function(wrap_pyfunction!(device_memory, module)?)?;
    module.add_function(wrap_pyfunction!(close_devices, module)?)?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))
}

/// To be called before every fork.
#[pyfunction]
fn before_fork() {
    memory::before_fork();
}

/// Total, free and used by this package, bytes; `None` for host memory.
#[pyfunction]
fn device_memory(py: Python<'_>, device: &str) -> PyResult<Option<(u64, u64, u64)>> {
    let get = || {
        let (place, engine) = (Place::parse(device)?, Engine::get()?);
        py.detach(|| engine.memory(place))
    };
    let memory = get().map_err(|error: Error| error.into_py(py))?;
    Ok(memory.map(|m| (m.total.bytes(), m.free.bytes(), m.slabs.bytes())))
}

/// Gives back the host memory that loads to devices pass through. The next load makes it anew.
#[pyfunction]
fn close_devices(py: Python<'_>) -> PyResult<()> {
    let engine = Engine::get().map_err(|error| error.into_py(py))?;
    py.detach(|| engine.close_devices());
    Ok(())
}

// === impl Load ===

#[pymethods]
impl Load {
    /// Begins: of files, or of a node's model.
    #[expect(clippy::too_many_arguments, reason = "named in Python")]
    #[new]
    #[pyo3(signature = (paths, device, names=None, socket=None, model=None, shard=None, shared=false))]
    fn new(
        py: Python<'_>,
        paths: Vec<PathBuf>,
        device: &str,
        names: Option<Vec<String>>,
        socket: Option<PathBuf>,
        model: Option<String>,
        shard: Option<(u32, u32)>,
        shared: bool,
    ) -> PyResult<Self> {
        let place = Place::parse(device).map_err(|error| error.into_py(py))?;
        let from = match (socket, model) {
            (Some(socket), Some(model)) => From::Node { socket, model, shared },
            _ => From::Files(paths),
        };
        let engine = Engine::get().map_err(|error| error.into_py(py))?;
        let shared = Arc::new(Shared::new());
        let progress = shared.progress.subscribe();
        let order = Order { from, place, names, shard };
        engine.handle().spawn(Arc::clone(&shared).run(Arc::clone(&engine), order));
        Ok(Self { engine, shared, progress })
    }

    /// Waits until more than `beyond` bytes have arrived, or the load has ended. Returns bytes arrived, bytes in all, and
    /// whether it has ended. A signal's exception (Ctrl-C) cancels the load.
    fn wait(&self, py: Python<'_>, beyond: Option<u64>) -> PyResult<(u64, u64, bool)> {
        self.check_process(py)?;
        loop {
            let progress = py.detach(|| {
                let mut watched = self.progress.clone();
                let further =
                    |p: &Progress| p.end.is_some() || beyond.is_some_and(|beyond| p.arrived > beyond);
                self.engine.handle().block_on(async {
                    let reached = async { watched.wait_for(further).await.map(|progress| progress.clone()) };
                    tokio::time::timeout(settings::SIGNALS_EVERY, reached).await
                })
            });
            match progress {
                Ok(Ok(Progress { arrived, total, end })) => {
                    if let Some(Err(error)) = &end {
                        return Err(error.clone().into_py(py));
                    }
                    return Ok((arrived, total, end.is_some()));
                }
                // The sender lives as long as `self.shared`.
                Ok(Err(_)) => return Err(Error::Cancelled.into_py(py)),
                Err(_) => {
                    if let Err(signal) = py.check_signals() {
                        self.cancel(py);
                        return Err(signal);
                    }
                }
            }
        }
    }

    /// Cancels the load, and waits until nothing of it is under way any more: at most a chunk's time.
    fn cancel(&self, py: Python<'_>) {
        if !self.engine.is_here() {
            return;
        }
        self.shared.cancel.cancel();
        py.detach(|| {
            let mut watched = self.progress.clone();
            let ended = async { watched.wait_for(|progress| progress.end.is_some()).await.map(drop) };
            // An error: there is nothing left to wait for.
            let _ = self.engine.handle().block_on(ended);
        });
    }

    /// How many tensors there are; `None` as long as that isn't known.
    fn count(&self) -> Option<usize> {
        self.shared.count()
    }

    /// Names and tensors of what has arrived and was not taken before, in the order of arrival.
    fn take(&self, py: Python<'_>) -> PyResult<Vec<(String, Tensor)>> {
        self.check_process(py)?;
        let arrived = {
            let progress = self.progress.borrow();
            if matches!(progress.end, Some(Ok(()))) { u64::MAX } else { progress.arrived }
        };
        let ready = py.detach(|| self.shared.take(arrived));
        let tensor = |Ready { name, shape, element, memory }| (name, Tensor { memory, element, shape });
        Ok(ready.into_iter().map(tensor).collect())
    }
}

impl Load {
    fn check_process(&self, py: Python<'_>) -> PyResult<()> {
        if self.engine.is_here() {
            return Ok(());
        }
        let words = "this load was begun by the process that this one was forked from; begin another";
        Err(Error::Forked(words.to_owned()).into_py(py))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if self.engine.is_here() {
            self.shared.cancel.cancel();
        } else {
            // The parent's task goes on there; here it has no threads that would end it.
            std::mem::forget((Arc::clone(&self.engine), Arc::clone(&self.shared), self.progress.clone()));
        }
    }
}

// === impl Tensor ===

#[pymethods]
impl Tensor {
    /// As PyTorch would say: `(2, 3)`. Of quantised and packed types, that of the bytes.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    /// As PyTorch calls it (`"bfloat16"`); of a quantised type, the file's name (`"Q4_1"`).
    #[getter]
    fn dtype(&self) -> &'static str {
        self.element.name
    }

    /// `"cpu"`, `"cuda:0"`.
    #[getter]
    fn device(&self) -> String {
        match self.memory.device {
            DeviceKind::Cpu => "cpu".to_owned(),
            DeviceKind::Cuda => format!("cuda:{}", self.memory.ordinal),
        }
    }

    /// Bytes.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.shape.iter().fold(self.element.bytes(), |n, dim| n.saturating_mul(dim.unsigned_abs()))
    }

    /// Whether a write to it fails: the memory is shared.
    #[getter]
    fn read_only(&self) -> bool {
        self.memory.read_only
    }

    /// Address of its first byte, on its device.
    #[getter]
    fn data_ptr(&self) -> u64 {
        self.memory.address
    }

    /// The same bytes as elements of another type of the same size.
    fn view(&self, dtype: &str) -> PyResult<Self> {
        let Some(element) = Element::named(dtype) else {
            return Err(PyValueError::new_err(format!("no element type `{dtype}`")));
        };
        if element.bytes() != self.element.bytes() {
            let words = format!(
                "{} has elements of {} bytes, {dtype} of {}: views keep the size",
                self.element.name,
                self.element.bytes(),
                element.bytes()
            );
            return Err(PyTypeError::new_err(words));
        }
        Ok(Self { memory: Arc::clone(&self.memory), element, shape: self.shape.clone() })
    }

    /// A NumPy array over the same memory. Of types that NumPy lacks, with `ml_dtypes` where that is installed.
    fn numpy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("stoker._arrays")?.call_method1("to_numpy", (slf,))
    }

    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        // Every byte had arrived before the tensor was made: there is no stream to wait for.
        drop(stream);
        if dl_device.is_some_and(|device| device != self.__dlpack_device__()) {
            return Err(PyBufferError::new_err(
                "the tensor is on another device; copy it there with the consumer's means",
            ));
        }
        if copy == Some(true) {
            return Err(PyBufferError::new_err(
                "the tensor's memory is handed over as it is; copy it with the consumer's means",
            ));
        }
        let view = View { memory: &self.memory, element: self.element, shape: &self.shape };
        view.capsule(py, max_version.is_some_and(|(major, _)| major >= 1))
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        (self.memory.device as i32, self.memory.ordinal)
    }

    fn __len__(&self) -> PyResult<usize> {
        match self.shape.first() {
            Some(n) => Ok(usize::try_from(*n).unwrap_or(0)),
            None => Err(PyTypeError::new_err("a scalar has no length")),
        }
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let shape = self.shape(py)?.repr()?;
        Ok(format!("stoker.Tensor(shape={shape}, dtype={}, device={})", self.element.name, self.device()))
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(PyTypeError::new_err("a tensor's memory can't be pickled; convert it first: t.numpy().copy()"))
    }
}
