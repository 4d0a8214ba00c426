//! Tensor maps: what the copy engine is told about a matrix. Encoded at every launch, about a microsecond in all,
//! because addresses and M change; no allocation, no lock.
//!
//! Contract: a map only describes memory; whoever launches with it vouches for that memory.
#![allow(unsafe_code, reason = "cudarc has no safe layer for tensor maps")]

use crate::launch::RawForward;
use crate::step::{RawMatrix, RawStep};
use cudarc::driver::{DriverError, sys};
use std::mem::MaybeUninit;
use swiglu_kernels::families::{
    MmaSyncConfig, WeightOnlyTmaConfig, WgmmaGemmConfig, WgmmaStreamConfig, WgmmaTmaConfig,
};
use swiglu_kernels::problem::{INT4_GROUP, MAX_ACCESS_BYTES, OperandMajor, Product};
use swiglu_kernels::{Format, Problem, WeightMajor};

/// A row-major matrix and the box of it that one copy moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BoxedMatrix {
    pub(crate) format: Format,
    pub(crate) address: u64,
    pub(crate) rows: u32,
    pub(crate) cols: u32,
    pub(crate) row_stride: i64,
    pub(crate) box_rows: u32,
    pub(crate) box_cols: u32,
    pub(crate) swizzled: bool,
}

impl BoxedMatrix {
    /// Bytes of the swizzle: a swizzled box is as wide as that.
    pub(crate) fn swizzle_bytes(&self) -> u32 {
        match self.box_cols * self.format.bytes() {
            width @ (32 | 64 | 128) if self.swizzled => width,
            _ => 0,
        }
    }
}

/// The boxes of the last tile of `matrix` along its rows, `block` of them a tile, which `sharers` CTAs bring in as many parts:
/// only the rows that are there, rounded up to a swizzle atom of 8 for each; the same boxes where the tiles come out even.
/// Why: `docs/decisions/0018-the-last-tile-has-boxes-of-its-own.md`.
fn tail(matrix: BoxedMatrix, block: u32, sharers: u32) -> BoxedMatrix {
    match (matrix.rows % block).next_multiple_of(8 * sharers) {
        0 => matrix,
        rows => BoxedMatrix { box_rows: rows / sharers, ..matrix },
    }
}

/// x, gate and up, each with its [`tail`], and z for `templates/wgmma_tma/kernel.cu.tera`.
pub(crate) fn of_wgmma_tma(config: &WgmmaTmaConfig, problem: &Problem, args: &RawForward) -> [BoxedMatrix; 7] {
    let tile = InputBoxes {
        x_rows: config.block_m / config.cluster_n,
        block_n: config.block_n,
        block_k: config.block_k,
        weight_cols: config.weight_cols(),
    };
    let [x, gate, up] = tile.of(problem, args);
    let weights_tail = |weights| match problem.weight_major {
        WeightMajor::K => tail(weights, config.block_n, 1),
        WeightMajor::N => weights,
    };
    let z = output(config, problem, args.m, args.z, args.z_stride);
    [x, tail(x, config.block_m, config.cluster_n), gate, weights_tail(gate), up, weights_tail(up), z]
}

/// Both pre-activations for the same template.
pub(crate) fn of_preactivations(config: &WgmmaTmaConfig, problem: &Problem, args: &RawForward) -> [BoxedMatrix; 2] {
    [(args.saved_gate, args.saved_gate_stride), (args.saved_up, args.saved_up_stride)]
        .map(|(address, row_stride)| output(config, problem, args.m, address, row_stride))
}

/// An `[m, n]` output and its store box.
fn output(config: &WgmmaTmaConfig, problem: &Problem, m: u32, address: u64, row_stride: i64) -> BoxedMatrix {
    BoxedMatrix {
        format: problem.dtype.output(),
        address,
        rows: m,
        cols: problem.n,
        row_stride,
        box_rows: 16,
        box_cols: config.store_cols,
        swizzled: true,
    }
}

/// x, gate and up for `templates/wgmma_stream/kernel.cu.tera`.
pub(crate) fn of_wgmma_stream(config: &WgmmaStreamConfig, problem: &Problem, args: &RawForward) -> [BoxedMatrix; 3] {
    let block_k = WgmmaStreamConfig::BLOCK_K;
    let tile = InputBoxes { x_rows: config.block_m, block_n: config.block_n, block_k, weight_cols: block_k };
    tile.of(problem, args)
}

/// x, gate and up for `templates/mma_sync/tma.cu.tera`.
pub(crate) fn of_mma_sync(config: &MmaSyncConfig, problem: &Problem, args: &RawForward) -> [BoxedMatrix; 3] {
    let tile = InputBoxes {
        x_rows: config.block_m,
        block_n: config.block_n,
        block_k: config.block_k,
        weight_cols: config.weight_cols(problem.dtype),
    };
    tile.of(problem, args)
}

/// x, gate and up for `templates/weight_only_tma/kernel.cu.tera`: every row of a box is a swizzle row of 128 bytes.
pub(crate) fn of_weight_only_tma(
    config: &WeightOnlyTmaConfig,
    problem: &Problem,
    args: &RawForward,
) -> [BoxedMatrix; 3] {
    const ROW_BYTES: u32 = 128;
    let format = problem.dtype.weights();
    let (rows, cols, box_rows) = match problem.weight_major {
        WeightMajor::K => (problem.n, problem.k, config.block_n),
        WeightMajor::N => {
            (problem.k.div_ceil(format.numbers()), problem.n, WeightOnlyTmaConfig::BLOCK_K / format.numbers())
        }
    };
    let swizzled = |format: Format, address, (rows, cols), row_stride, box_rows| BoxedMatrix {
        format,
        address,
        rows,
        cols,
        row_stride,
        box_rows,
        box_cols: ROW_BYTES / format.bytes(),
        swizzled: true,
    };
    let weights = |address, row_stride| swizzled(format, address, (rows, cols), row_stride, box_rows);
    let x = swizzled(problem.dtype.x(), args.x, (args.m, problem.k), args.x_stride, config.block_m);
    [x, weights(args.gate, args.gate_stride), weights(args.up, args.up_stride)]
}

/// The scales of int4 gate and up for the same template: those of one group for a block's columns.
pub(crate) fn of_int4_scales(config: &WeightOnlyTmaConfig, problem: &Problem, args: &RawForward) -> [BoxedMatrix; 2] {
    [args.scales.gate, args.scales.up].map(|address| BoxedMatrix {
        format: problem.dtype.output(),
        address,
        rows: problem.k.div_ceil(INT4_GROUP),
        cols: problem.n,
        row_stride: args.scales.stride,
        box_rows: 1,
        box_cols: config.block_n,
        swizzled: false,
    })
}

/// `StepMaps` of `templates/wgmma_gemm/kernel.cu.tera`: two left and two right, each with its [`tail`], three out, two saved. What
/// the step has not is its first of that kind again. Where a last wave is cut up, the right one's tail is a box of its parts.
pub(crate) fn of_wgmma_gemm(
    config: &WgmmaGemmConfig,
    problem: &Problem,
    product: &Product,
    args: &RawStep,
) -> [BoxedMatrix; 13] {
    let operand = |matrix: RawMatrix, (rows, cols): (u32, u32), major: OperandMajor, block: [u32; 3], sharers: u32| {
        let [extent, across, part] = block;
        let in_boxes = |box_rows, box_cols| BoxedMatrix {
            format: problem.dtype.output(),
            address: matrix.address,
            rows,
            cols,
            row_stride: matrix.stride,
            box_rows,
            box_cols,
            swizzled: true,
        };
        match major {
            OperandMajor::Depth => {
                let whole = in_boxes(extent / sharers, config.block_k);
                let last =
                    if part > 0 { in_boxes(part / sharers, config.block_k) } else { tail(whole, extent, sharers) };
                [whole, last]
            }
            OperandMajor::Outer => [in_boxes(config.block_k / sharers, across); 2],
        }
    };
    let (rows, cols) = ([config.block_m, 64, 0], [config.block_n, config.right_cols(), config.tail_n]);
    let left = |matrix| operand(matrix, product.left_shape(), product.left, rows, config.cluster_n);
    let right = |matrix| operand(matrix, product.right_shape(), product.right, cols, config.cluster_m);
    let strip = |format| {
        move |matrix: RawMatrix| BoxedMatrix {
            format,
            address: matrix.address,
            rows: product.rows,
            cols: product.cols,
            row_stride: matrix.stride,
            box_rows: 16,
            box_cols: config.store_cols,
            swizzled: true,
        }
    };
    let present = |matrix: RawMatrix, first: RawMatrix| if matrix.address == 0 { first } else { matrix };
    let [[left0, left1], [right0, right1]] =
        [args.left, args.right].map(|[first, second]| [first, present(second, first)]);
    let [out0, out1, out2] =
        args.out.map(|matrix| strip(args.output_dtype(problem).output())(present(matrix, args.out[0])));
    let [gate, up] = args.saved.map(|matrix| strip(problem.dtype.output())(present(matrix, args.out[0])));
    let [[left0, left0_tail], [left1, left1_tail]] = [left0, left1].map(left);
    let [[right0, right0_tail], [right1, right1_tail]] = [right0, right1].map(right);
    [left0, left0_tail, left1, left1_tail, right0, right0_tail, right1, right1_tail, out0, out1, out2, gate, up]
}

/// The boxes in which a tile of the operands comes.
struct InputBoxes {
    x_rows: u32,
    block_n: u32,
    block_k: u32,
    /// Columns of a box of N-major weights.
    weight_cols: u32,
}

impl InputBoxes {
    fn of(&self, problem: &Problem, args: &RawForward) -> [BoxedMatrix; 3] {
        let &Problem { dtype, weight_major, n, k, .. } = problem;
        let (rows, cols, box_rows, box_cols) = match weight_major {
            WeightMajor::K => (n, k, self.block_n, self.block_k),
            WeightMajor::N => (k, n, self.block_k, self.weight_cols),
        };
        let weights = |address, row_stride| BoxedMatrix {
            format: dtype.weights(),
            address,
            rows,
            cols,
            row_stride,
            box_rows,
            box_cols,
            swizzled: true,
        };
        let x = BoxedMatrix {
            format: dtype.x(),
            address: args.x,
            rows: args.m,
            cols: k,
            row_stride: args.x_stride,
            box_rows: self.x_rows,
            box_cols: self.block_k,
            swizzled: true,
        };
        [x, weights(args.gate, args.gate_stride), weights(args.up, args.up_stride)]
    }
}

/// The maps of `matrices`, as the driver makes them; what stands for a missing operand is another's map again.
pub(crate) fn encode<const COUNT: usize>(
    matrices: &[BoxedMatrix; COUNT],
) -> Result<[sys::CUtensorMap; COUNT], DriverError> {
    let mut maps = [MaybeUninit::<sys::CUtensorMap>::uninit(); COUNT];
    for (index, matrix) in matrices.iter().enumerate() {
        // A call of the driver costs more than these comparisons.
        match matrices[..index].iter().position(|known| known == matrix) {
            Some(known) => maps[index] = maps[known],
            None => encode_one(matrix, &mut maps[index])?,
        }
    }
    // SAFETY: every map is written: by a call that has succeeded, or from one before it that is.
    Ok(maps.map(|map| unsafe { map.assume_init() }))
}

fn encode_one(matrix: &BoxedMatrix, map: &mut MaybeUninit<sys::CUtensorMap>) -> Result<(), DriverError> {
    let kind = match matrix.format {
        Format::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        Format::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        Format::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        Format::E4m3 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        Format::Int4 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT32,
    };
    let element_bytes = u64::from(matrix.format.bytes());
    let swizzle = match matrix.swizzle_bytes() {
        128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        _ => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
    };
    let sizes = [u64::from(matrix.cols), u64::from(matrix.rows)];
    // The step from a single row to the next is the caller's to leave open, but a map takes no step within the row.
    let row_bytes = match matrix.rows {
        0 | 1 => (u64::from(matrix.cols) * element_bytes).next_multiple_of(u64::from(MAX_ACCESS_BYTES)),
        _ => matrix.row_stride.unsigned_abs() * element_bytes,
    };
    let strides = [row_bytes];
    let box_sizes = [matrix.box_cols, matrix.box_rows];
    let element_strides = [1u32, 1];
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
            // A promotion to 256 bytes costs what is read once some 8 % of the memory's rate, and nothing gains by it.
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    status.result()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernels round alike (`extent_at` of `templates/wgmma_tma/pipeline.cuh`).
    #[test]
    fn tails_have_the_rows_that_are_there_in_whole_atoms() {
        let of = |rows, block, sharers| {
            let whole = BoxedMatrix {
                format: Format::Bf16,
                address: 0x1000,
                rows,
                cols: 64,
                row_stride: 64,
                box_rows: block / sharers,
                box_cols: 64,
                swizzled: true,
            };
            let tail = tail(whole, block, sharers);
            assert_eq!(BoxedMatrix { box_rows: whole.box_rows, ..tail }, whole);
            tail.box_rows
        };
        assert_eq!([256, 128, 1, 8, 9, 100, 197].map(|rows| of(rows, 128, 1)), [128, 128, 8, 8, 16, 104, 72]);
        assert_eq!([1, 16, 17, 130].map(|rows| of(rows, 128, 2)), [8, 8, 16, 8]);
        // As good as whole.
        assert_eq!([121, 127].map(|rows| of(rows, 128, 1)), [128, 128]);
        assert_eq!(of(113, 128, 2), 64);
    }
}
