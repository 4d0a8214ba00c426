//! Torch's tensors by DLPack's C exchange API: where they lie, without a call of Python; no libtorch.
//!
//! Contract: whoever makes an [`Exchange`] passes the capsule of a producer whose functions follow DLPack 1, and the type it
//! belongs to. It is only asked of objects of exactly that type, or of the one subclass named with it.
#![allow(unsafe_code, reason = "DLPack is a C interface")]

use crate::error::Failure;
use crate::lie::{Lie, MAX_DIMS};
use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyType;
use std::ffi::{c_int, c_void};
use std::{ptr, slice};
use swiglu_runtime::DType;

const NAME: &std::ffi::CStr = c"dlpack_exchange_api";
const MAJOR: u32 = 1;
const CPU: i32 = 1;
const CUDA: i32 = 2;
const FLOAT: u8 = 2;
const BFLOAT: u8 = 4;

/// `DLTensor`.
#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// `DLPackExchangeAPI`; what is not called has no type.
#[repr(C)]
struct Api {
    major: u32,
    minor: u32,
    older: *const c_void,
    allocate: *const c_void,
    to_managed: *const c_void,
    from_managed: *const c_void,
    read: Option<Read>,
    stream: Option<Stream>,
}

type Read = unsafe extern "C" fn(*mut ffi::PyObject, *mut DlTensor) -> c_int;
type Stream = unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int;

/// Where a tensor's elements lie.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    /// Of the first element.
    pub(crate) address: u64,
    /// How they lie from there.
    pub(crate) lie: Lie,
}

/// The exchange API of one producer.
pub(crate) struct Exchange {
    read: Read,
    stream: Stream,
    tensor: Py<PyType>,
    parameter: Py<PyType>,
    is_negated: Py<PyAny>,
}

impl Exchange {
    /// `is_negated` says of a tensor whether its memory holds the negative of its elements.
    ///
    /// # Errors
    /// `ValueError`: the capsule is none of DLPack 1, or cannot read tensors.
    pub(crate) fn new(
        capsule: &Bound<'_, PyAny>,
        tensor: Py<PyType>,
        parameter: Py<PyType>,
        is_negated: Py<PyAny>,
    ) -> PyResult<Self> {
        // SAFETY: the interpreter is held; whatever is no capsule of that name gives null and an exception.
        let api = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), NAME.as_ptr()) };
        if api.is_null() {
            return Err(PyErr::fetch(capsule.py()));
        }
        // SAFETY: by its name the capsule holds a table that lives as long as the process; its version comes first.
        let major = unsafe { *api.cast::<u32>() };
        if major != MAJOR {
            let reason = format!("is DLPack {major}, expected DLPack {MAJOR}");
            return Err(Failure::argument("capsule", reason).into());
        }
        // SAFETY: DLPack 1 has these members.
        let api = unsafe { &*api.cast::<Api>() };
        match (api.read, api.stream) {
            (Some(read), Some(stream)) => Ok(Self { read, stream, tensor, parameter, is_negated }),
            _ => Err(PyValueError::new_err("argument `capsule`: does not read tensors")),
        }
    }

    /// Whether torch's dispatcher sees in `object` no more than its elements: no subclass, no lazy negation.
    pub(crate) fn is_plain(&self, object: &Bound<'_, PyAny>) -> bool {
        let (py, kind) = (object.py(), object.get_type_ptr());
        if kind != self.tensor.bind(py).as_type_ptr() && kind != self.parameter.bind(py).as_type_ptr() {
            return false;
        }
        let end: *mut ffi::PyObject = ptr::null_mut();
        // SAFETY: the interpreter is held, all are live objects, and null ends them.
        let answer = unsafe { ffi::PyObject_CallFunctionObjArgs(self.is_negated.as_ptr(), object.as_ptr(), end) };
        // SAFETY: what a call returns is an owned reference, or null with an exception.
        let answer = unsafe { Bound::from_owned_ptr_or_opt(py, answer) };
        let Some(answer) = answer else {
            drop(PyErr::take(py));
            return false;
        };
        answer.is_truthy().is_ok_and(|is_negated| !is_negated)
    }

    /// Where a plain tensor lies; None without memory of its own, and elsewhere than on a CPU or GPU.
    pub(crate) fn read(&self, object: &Bound<'_, PyAny>) -> Option<View> {
        let mut read = DlTensor {
            data: ptr::null_mut(),
            device_type: 0,
            device_id: 0,
            ndim: 0,
            code: 0,
            bits: 0,
            lanes: 0,
            shape: ptr::null(),
            strides: ptr::null(),
            byte_offset: 0,
        };
        // SAFETY: by the module's contract the object is a tensor of the producer's, and the interpreter is held.
        if unsafe { (self.read)(object.as_ptr(), &raw mut read) } != 0 {
            drop(PyErr::take(object.py()));
            return None;
        }
        let device = match read.device_type {
            CPU => -1,
            CUDA => read.device_id,
            _ => return None,
        };
        let dims = usize::try_from(read.ndim).ok().filter(|&dims| dims <= MAX_DIMS)?;
        let (mut shape, mut strides) = ([0; MAX_DIMS], [0; MAX_DIMS]);
        if dims != 0 {
            if read.shape.is_null() || read.strides.is_null() {
                return None;
            }
            // SAFETY: the producer has as many sizes as dimensions, and nothing of Python runs before they are copied.
            shape.get_mut(..dims)?.copy_from_slice(unsafe { slice::from_raw_parts(read.shape, dims) });
            // SAFETY: likewise.
            strides.get_mut(..dims)?.copy_from_slice(unsafe { slice::from_raw_parts(read.strides, dims) });
        }
        let dtype = match (read.code, read.bits, read.lanes) {
            (BFLOAT, 16, 1) => Some(DType::Bf16),
            (FLOAT, 16, 1) => Some(DType::F16),
            (FLOAT, 32, 1) => Some(DType::F32),
            _ => None,
        };
        let address = (read.data as u64).checked_add(read.byte_offset)?;
        if address == 0 && !shape.get(..dims)?.contains(&0) {
            return None; // its memory was given back
        }
        Some(View { address, lie: Lie { device, dtype, dims, shape, strides } })
    }

    /// The handle of the producer's current stream on GPU `device`; 0 for the CPU, which is -1.
    pub(crate) fn stream(&self, py: Python<'_>, device: i32) -> Option<u64> {
        if device < 0 {
            return Some(0);
        }
        let mut stream = ptr::null_mut();
        // SAFETY: the device is one that a tensor lies on, and the interpreter is held.
        if unsafe { (self.stream)(CUDA, device, &raw mut stream) } != 0 {
            drop(PyErr::take(py));
            return None;
        }
        Some(stream as u64)
    }
}
