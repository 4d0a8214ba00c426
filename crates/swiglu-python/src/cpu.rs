//! CPU tensors, through the runtime's CPU backend.
//!
//! Contract: Python has checked every tensor (number format, shape, device) and keeps it alive over the call; z is new
//! or checked not to overlap, and nobody else writes to the inputs meanwhile, as with every operation of torch.
#![allow(unsafe_code, reason = "addresses come from Python as integers")]

use crate::call::Call;
use crate::error::Failure;
use half::{bf16, f16};
use std::slice;
use swiglu_runtime::cpu::CpuPlan;
use swiglu_runtime::{DType, Element, Forward, Matrix, Preactivations, Weights};

/// Computes `call` on this machine's threads.
pub(crate) fn launch(plan: &CpuPlan, call: &Call) -> Result<(), Failure> {
    call.check_overlap(plan.spec())?;
    match plan.spec().dtype {
        DType::F32 | DType::Tf32 => launch_as::<f32>(plan, call),
        DType::F16 => launch_as::<f16>(plan, call),
        DType::Bf16 => launch_as::<bf16>(plan, call),
        scaled => Err(Failure::argument("dtype", format!("{scaled} is a GPU format"))),
    }
}

fn launch_as<T: Element>(plan: &CpuPlan, call: &Call) -> Result<(), Failure> {
    let spec = plan.spec();
    let (m, n, k) = (size("x", call.m)?, spec.n as usize, spec.k as usize);
    let (rows, cols) = spec.layout.shape(n, k);
    let operands = &call.operands;
    let bias = |argument, address| match address {
        0 => Ok(None),
        address => matrix::<T>(argument, address, 1, n, 0).map(|matrix| Some(matrix.data)),
    };
    let forward = Forward {
        x: matrix("x", operands.x, m, k, operands.x_stride)?,
        weights: Weights::Separate {
            gate: matrix("gate", operands.gate, rows, cols, operands.gate_stride)?,
            up: matrix("up", operands.up, rows, cols, operands.up_stride)?,
        },
        gate_bias: bias("gate_bias", operands.gate_bias)?,
        up_bias: bias("up_bias", operands.up_bias)?,
        z: matrix_mut::<T>("z", operands.z, m, n, operands.z_stride)?,
        preactivations: if spec.save_preactivations {
            Some(Preactivations::Separate {
                gate: matrix_mut::<T>("saved_gate", operands.saved_gate, m, n, operands.saved_gate_stride)?,
                up: matrix_mut::<T>("saved_up", operands.saved_up, m, n, operands.saved_up_stride)?,
            })
        } else {
            None
        },
    };
    Ok(plan.launch(forward)?)
}

fn matrix<'a, T>(
    argument: &'static str,
    address: u64,
    rows: usize,
    cols: usize,
    stride: i64,
) -> Result<Matrix<&'a [T]>, Failure> {
    let (len, row_stride) = extent(argument, address, rows, cols, stride)?;
    let data = if len == 0 {
        &[]
    } else {
        // SAFETY: by the module's contract, `len` elements from `address` on are the tensor's.
        unsafe { slice::from_raw_parts(address as *const T, len) }
    };
    Ok(Matrix::strided(data, rows, cols, row_stride))
}

fn matrix_mut<'a, T>(
    argument: &'static str,
    address: u64,
    rows: usize,
    cols: usize,
    stride: i64,
) -> Result<Matrix<&'a mut [T]>, Failure> {
    let (len, row_stride) = extent(argument, address, rows, cols, stride)?;
    let data = if len == 0 {
        &mut []
    } else {
        // SAFETY: by the module's contract, `len` elements from `address` on are the tensor's and nobody else's.
        unsafe { slice::from_raw_parts_mut(address as *mut T, len) }
    };
    Ok(Matrix::strided(data, rows, cols, row_stride))
}

/// Elements from the first to the last, and the row stride.
fn extent(
    argument: &'static str,
    address: u64,
    rows: usize,
    cols: usize,
    stride: i64,
) -> Result<(usize, usize), Failure> {
    let row_stride =
        usize::try_from(stride).map_err(|_| Failure::argument(argument, format!("row stride {stride} is negative")))?;
    if rows == 0 || cols == 0 {
        return Ok((0, row_stride));
    }
    if address == 0 {
        return Err(Failure::argument(argument, "has no memory"));
    }
    let len = (rows - 1).checked_mul(row_stride).and_then(|last| last.checked_add(cols));
    let len = len.ok_or_else(|| Failure::argument(argument, "is larger than the address space"))?;
    Ok((len, row_stride))
}

fn size(argument: &'static str, value: u64) -> Result<usize, Failure> {
    usize::try_from(value).map_err(|_| Failure::argument(argument, format!("has {value} rows, which is too many")))
}
