//! Capsules that hand memory over without copying it: <https://dmlc.github.io/dlpack/latest/python_spec.html>.
//!
//! A consumer renames the capsule and calls the tensor's deleter when it is done with the memory, on any thread, with or
//! without the interpreter's lock; a capsule that nobody consumed does it itself.

#![expect(unsafe_code, reason = "the interface is C")]

use std::{
    ffi::{CStr, c_void},
    sync::Arc,
};

use pyo3::{Bound, PyAny, PyErr, PyResult, Python, ffi};

use crate::{element::Element, memory::Memory};

const LEGACY: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";

/// `DLPACK_FLAG_BITMASK_READ_ONLY`. Consumers of the older kind can't be told.
const READ_ONLY: u64 = 1;

/// `DLDeviceType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum DeviceKind {
    Cpu = 1,
    Cuda = 2,
}

#[repr(C)]
struct DlDevice {
    kind: i32,
    ordinal: i32,
}

#[repr(C)]
struct DlDataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: DlDevice,
    dimensions: i32,
    dtype: DlDataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// `DLManagedTensor`.
#[repr(C)]
struct Legacy {
    tensor: DlTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
}

/// `DLManagedTensorVersioned`.
#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Self)>,
    flags: u64,
    tensor: DlTensor,
}

/// A managed tensor with what its pointers point to. The consumer has a pointer to the first field.
#[repr(C)]
struct Exported<M> {
    managed: M,
    shape: Box<[i64]>,
    strides: Box<[i64]>,
    _memory: Arc<Memory>,
}

/// What is handed over.
pub(crate) struct View<'a> {
    pub(crate) memory: &'a Arc<Memory>,
    pub(crate) element: Element,
    pub(crate) shape: &'a [i64],
}

// === impl View ===

impl View<'_> {
    /// A new capsule, of the kind that consumers since DLPack 1.0 ask for, or the older one.
    pub(crate) fn capsule<'py>(&self, py: Python<'py>, versioned: bool) -> PyResult<Bound<'py, PyAny>> {
        if versioned {
            let exported = self.export(|tensor| Versioned {
                major: 1,
                minor: 1,
                context: std::ptr::null_mut(),
                deleter: Some(delete::<Versioned>),
                flags: if self.memory.read_only { READ_ONLY } else { 0 },
                tensor,
            });
            new_capsule(py, exported, VERSIONED, destroy::<Versioned>)
        } else {
            let exported = self.export(|tensor| Legacy {
                tensor,
                context: std::ptr::null_mut(),
                deleter: Some(delete::<Legacy>),
            });
            new_capsule(py, exported, LEGACY, destroy::<Legacy>)
        }
    }

    fn export<M>(&self, managed: impl FnOnce(DlTensor) -> M) -> Box<Exported<M>> {
        let mut shape: Box<[i64]> = self.shape.into();
        let mut strides = vec![1_i64; shape.len()].into_boxed_slice();
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i].saturating_mul(shape[i].max(1));
        }
        let Memory { address, device, ordinal, .. } = **self.memory;
        let tensor = DlTensor {
            // The memory's own address; it is the device's, or exposed by whoever mapped it.
            data: std::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap_or(0)),
            device: DlDevice { kind: device as i32, ordinal },
            // A file's header has at most eight.
            dimensions: i32::try_from(shape.len()).unwrap_or(i32::MAX),
            dtype: DlDataType { code: self.element.code as u8, bits: self.element.bits, lanes: 1 },
            shape: shape.as_mut_ptr(),
            strides: strides.as_mut_ptr(),
            byte_offset: 0,
        };
        Box::new(Exported { managed: managed(tensor), shape, strides, _memory: Arc::clone(self.memory) })
    }
}

fn new_capsule<'py, M>(
    py: Python<'py>,
    exported: Box<Exported<M>>,
    name: &'static CStr,
    destructor: ffi::PyCapsule_Destructor,
) -> PyResult<Bound<'py, PyAny>> {
    let raw = Box::into_raw(exported);
    // SAFETY: the interpreter's lock is held; the pointer isn't null, and the name is static.
    let capsule = unsafe { ffi::PyCapsule_New(raw.cast(), name.as_ptr(), Some(destructor)) };
    if capsule.is_null() {
        // SAFETY: from `into_raw` above; there is no capsule that would free it.
        drop(unsafe { Box::from_raw(raw) });
        return Err(PyErr::fetch(py));
    }
    // SAFETY: a new reference, which is ours.
    Ok(unsafe { Bound::from_owned_ptr(py, capsule) })
}

/// What a managed tensor is called when it hasn't been consumed.
trait Managed {
    const NAME: &'static CStr;
}

impl Managed for Legacy {
    const NAME: &'static CStr = LEGACY;
}

impl Managed for Versioned {
    const NAME: &'static CStr = VERSIONED;
}

/// The consumer is done.
unsafe extern "C" fn delete<M>(managed: *mut M) {
    // SAFETY: called once, with the pointer that the capsule had: the first field of a boxed `Exported<M>`.
    drop(unsafe { Box::from_raw(managed.cast::<Exported<M>>()) });
}

/// The capsule goes.
unsafe extern "C" fn destroy<M: Managed>(capsule: *mut ffi::PyObject) {
    // SAFETY: called by the interpreter, with its lock held, for a capsule of `new_capsule`. One that was consumed has
    // another name.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, M::NAME.as_ptr()) == 1 {
            let managed = ffi::PyCapsule_GetPointer(capsule, M::NAME.as_ptr());
            delete(managed.cast::<M>());
        }
    }
}
