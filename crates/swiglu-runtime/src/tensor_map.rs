//! Tensor maps: what the copy engine is told about a matrix. Encoded at every launch, about a microsecond in all,
//! because addresses and M change; no allocation, no lock.
//!
//! Contract: a map only describes memory; whoever launches with it vouches for that memory.
#![allow(unsafe_code, reason = "cudarc has no safe layer for tensor maps")]

use crate::launch::RawForward;
use cudarc::driver::{DriverError, sys};
use std::mem::MaybeUninit;
use swiglu_kernels::families::WgmmaTmaConfig;
use swiglu_kernels::{DType, Problem, WeightMajor};

/// x, gate, up and z, in the order of the kernel's parameters.
pub(crate) type TensorMaps = [sys::CUtensorMap; 4];

/// A row-major matrix and the box of it that one copy moves.
struct Matrix {
    address: u64,
    rows: u32,
    cols: u32,
    row_stride: i64,
    box_rows: u32,
    box_cols: u32,
    swizzled: bool,
}

/// The maps of one launch. Boxes and swizzles as `templates/wgmma_tma/kernel.cu.tera` reads them.
pub(crate) fn encode(config: &WgmmaTmaConfig, problem: &Problem, args: &RawForward) -> Result<TensorMaps, DriverError> {
    let &Problem { dtype, weight_major, n, k, .. } = problem;
    let weights = |address, row_stride| match weight_major {
        WeightMajor::K => Matrix {
            address,
            rows: n,
            cols: k,
            row_stride,
            box_rows: config.block_n,
            box_cols: config.block_k,
            swizzled: true,
        },
        WeightMajor::N => Matrix {
            address,
            rows: k,
            cols: n,
            row_stride,
            box_rows: config.block_k,
            box_cols: config.weight_cols(),
            swizzled: true,
        },
    };
    let x = Matrix {
        address: args.x,
        rows: args.m,
        cols: k,
        row_stride: args.x_stride,
        box_rows: config.block_m / config.cluster_n,
        box_cols: config.block_k,
        swizzled: true,
    };
    let z = Matrix {
        address: args.z,
        rows: args.m,
        cols: n,
        row_stride: args.z_stride,
        box_rows: 16,
        box_cols: config.store_cols,
        swizzled: matches!(config.store_cols, 16 | 32 | 64),
    };
    Ok([
        encode_one(&x, dtype)?,
        encode_one(&weights(args.gate, args.gate_stride), dtype)?,
        encode_one(&weights(args.up, args.up_stride), dtype)?,
        encode_one(&z, dtype)?,
    ])
}

fn encode_one(matrix: &Matrix, dtype: DType) -> Result<sys::CUtensorMap, DriverError> {
    let kind = match dtype {
        DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        DType::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        DType::F32 | DType::Tf32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    };
    // A swizzled box is as wide as its swizzle.
    let swizzle = match (matrix.swizzled, matrix.box_cols * dtype.bytes()) {
        (true, 128) => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        (true, 64) => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        (true, 32) => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        _ => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
    };
    let sizes = [u64::from(matrix.cols), u64::from(matrix.rows)];
    let strides = [matrix.row_stride.unsigned_abs() * u64::from(dtype.bytes())];
    let box_sizes = [matrix.box_cols, matrix.box_rows];
    let element_strides = [1u32, 1];
    let mut map = MaybeUninit::<sys::CUtensorMap>::uninit();
    // SAFETY: the arrays hold as many numbers as a map of rank 2 reads, `map` has room for one; the address is
    // recorded, not read.
    let status = unsafe {
        sys::cuTensorMapEncodeTiled(
            map.as_mut_ptr(),
            kind,
            2,
            matrix.address as *mut std::ffi::c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            box_sizes.as_ptr(),
            element_strides.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    status.result()?;
    // SAFETY: the call has succeeded, so the map is written.
    Ok(unsafe { map.assume_init() })
}
