//! fp32 operands cut in two: where the parts lie, and the launch that writes them. Design: `docs/decisions/0015-fp32-in-parts.md`.
//!
//! Contract: `SplitParams` and `SplitScales` mirror the templates'.
#![allow(unsafe_code, reason = "hands raw device pointers to the driver")]

use crate::launch::{self, Geometry, RawForward, RawScales, Refusal};
use crate::scratch::Scratch;
use crate::step::{RawMatrix, RawStep};
use cudarc::driver::{CudaFunction, DeviceRepr, sys};
use std::ffi::c_void;
use swiglu_kernels::problem::{OperandMajor, Paired, Product};
use swiglu_kernels::{Problem, WeightMajor};

/// Neighbours along the sums whose parts lie together: one 128-byte row.
const GROUP: u32 = 32;
/// Threads of a block of the launch.
pub(crate) const THREADS: u32 = 256;
/// Lines of one block where they are columns.
const COLUMNS: u32 = 32;
/// What matrices and scales start at a multiple of.
const ALIGNED: u64 = 256;

/// `SplitMatrix` of `templates/shared/split.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct SplitMatrix {
    matrix: RawMatrix,
    parts: u64,
}

/// `SplitOperand` of `templates/shared/split.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct SplitOperand {
    matrices: [SplitMatrix; 2],
    scales: u64,
    count: i32,
    lines: i32,
    along_k: i32,
}

/// `SplitParams` of `templates/shared/split.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct SplitParams {
    operands: [SplitOperand; 4],
    row_bytes: i64,
    k: i32,
}

/// `SplitScales` of `templates/wgmma_gemm/sum_anew.cuh`: of the left and of the right operands.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SplitScales {
    left: [u64; 2],
    right: [u64; 2],
}

// SAFETY: plain integers in C layout.
unsafe impl DeviceRepr for SplitParams {}
// SAFETY: as above.
unsafe impl DeviceRepr for SplitScales {}

/// Matrices that one operand has and whose products are summed; one, or two.
#[derive(Debug, Clone, Copy)]
struct Operand {
    matrices: [RawMatrix; 2],
    count: usize,
    lines: u32,
    major: OperandMajor,
}

/// The parts of one launch's operands in memory of its own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Split {
    pub(crate) params: SplitParams,
    /// Device memory that they take; as much as the operands, and a scale a line.
    pub(crate) bytes: u64,
    /// Blocks of the launch.
    pub(crate) blocks: u32,
}

impl Split {
    /// The forward's x, gate and up, laid out from address 0.
    pub(crate) fn of_forward(problem: &Problem, args: &RawForward) -> Self {
        let weights = match problem.weight_major {
            WeightMajor::K => OperandMajor::Depth,
            WeightMajor::N => OperandMajor::Outer,
        };
        let operand = |address, stride, lines, major| Operand {
            matrices: [RawMatrix { address, stride }, RawMatrix::default()],
            count: 1,
            lines,
            major,
        };
        let x = operand(args.x, args.x_stride, args.m, OperandMajor::Depth);
        let gate = operand(args.gate, args.gate_stride, problem.n, weights);
        let up = operand(args.up, args.up_stride, problem.n, weights);
        Self::new(&[x, gate, up], problem.k)
    }

    /// The left and the right operands of a step, laid out from address 0. Pairs whose products are summed share their scales.
    pub(crate) fn of_step(product: &Product, args: &RawStep) -> Self {
        let [left, right] = [
            (args.left, product.rows, product.left, product.paired == Paired::Rows),
            (args.right, product.cols, product.right, product.paired == Paired::Columns),
        ]
        .map(|(matrices, lines, major, is_paired)| {
            let count = if product.paired == Paired::Depth { 2 } else { 1 };
            let first = Operand { matrices, count, lines, major };
            // Of the second half there are no lines where nothing is paired.
            let second = [matrices[1], RawMatrix::default()];
            [first, Operand { matrices: second, lines: if is_paired { lines } else { 0 }, ..first }]
        });
        Self::new(&[left[0], left[1], right[0], right[1]], product.depth)
    }

    fn new(operands: &[Operand], k: u32) -> Self {
        let row_bytes = 4 * u64::from(k.next_multiple_of(GROUP));
        let int = |value: u32| i32::try_from(value).unwrap_or(i32::MAX);
        let mut params = SplitParams { row_bytes: row_bytes.cast_signed(), k: int(k), ..SplitParams::default() };
        let (mut bytes, mut blocks) = (0_u64, 0_u32);
        let mut place = |size: u64| {
            let start = bytes;
            bytes = bytes.saturating_add(size).checked_next_multiple_of(ALIGNED).unwrap_or(u64::MAX);
            start
        };
        for (slot, operand) in params.operands.iter_mut().zip(operands) {
            let &Operand { matrices, count, lines, major } = operand;
            let along_k = major == OperandMajor::Depth;
            blocks = blocks.saturating_add(if along_k { lines } else { lines.div_ceil(COLUMNS) });
            *slot = SplitOperand { count: count as i32, lines: int(lines), along_k: along_k.into(), ..*slot };
            for (slot, matrix) in slot.matrices.iter_mut().zip(matrices).take(count) {
                *slot = SplitMatrix { matrix, parts: place(row_bytes.saturating_mul(lines.into())) };
            }
            slot.scales = place(4 * u64::from(lines));
        }
        Self { params, bytes, blocks }
    }

    /// The same from address `base`.
    pub(crate) fn at(mut self, base: u64) -> Self {
        for operand in &mut self.params.operands {
            operand.scales += base;
            for matrix in operand.matrices.iter_mut().take(operand.count as usize) {
                matrix.parts += base;
            }
        }
        self
    }

    fn parts(&self, operand: usize, matrix: usize) -> RawMatrix {
        let address = self.params.operands[operand].matrices[matrix].parts;
        RawMatrix { address, stride: self.params.row_bytes / 4 }
    }

    /// What the forward's product reads through its tensor maps: the parts, K-major, as matrices of fp32.
    pub(crate) fn forward(&self, problem: &Problem, args: &RawForward) -> (Problem, RawForward) {
        let [x, gate, up] = [0, 1, 2].map(|operand| self.parts(operand, 0));
        let parts = RawForward {
            x: x.address,
            x_stride: x.stride,
            gate: gate.address,
            gate_stride: gate.stride,
            up: up.address,
            up_stride: up.stride,
            ..*args
        };
        (Problem { weight_major: WeightMajor::K, k: problem.k.next_multiple_of(GROUP), ..*problem }, parts)
    }

    /// The forward's operands with the scales of the parts: the product sums anew from them what has none.
    pub(crate) fn scaled(&self, args: &RawForward) -> RawForward {
        let [x, gate, up] = [0, 1, 2].map(|operand| self.params.operands[operand].scales);
        RawForward { scales: RawScales { x, gate, up, stride: 0, x_rows: true, weight_rows: true }, ..*args }
    }

    /// What a step's product reads through its tensor maps, as [`Split::forward`].
    pub(crate) fn step(&self, product: &Product, args: &RawStep) -> (Product, RawStep) {
        // Two of a sum lie in one operand, two of a pair in two.
        let second = |operand, is_paired| if is_paired { self.parts(operand + 1, 0) } else { self.parts(operand, 1) };
        let parts = RawStep {
            left: [self.parts(0, 0), second(0, product.paired == Paired::Rows)],
            right: [self.parts(2, 0), second(2, product.paired == Paired::Columns)],
            ..*args
        };
        let depth = product.depth.next_multiple_of(GROUP);
        (Product { left: OperandMajor::Depth, right: OperandMajor::Depth, depth, ..*product }, parts)
    }

    /// The scales of a step's parts.
    pub(crate) fn scales(&self) -> SplitScales {
        let [left0, left1, right0, right1] = self.params.operands.map(|operand| operand.scales);
        SplitScales { left: [left0, left1], right: [right0, right1] }
    }

    /// Launches `function`, the template's `swiglu_split`, on memory in the order of the stream, and gives where the parts are.
    ///
    /// # Errors
    /// [`Refusal::NoMemory`], or the driver's refusal.
    ///
    /// # Safety
    /// The operands are as [`launch::forward`] or [`launch::step`] want them; `stream` is live and of the function's context.
    pub(crate) unsafe fn launch(
        self,
        function: &CudaFunction,
        stream: sys::CUstream,
        dependent: bool,
    ) -> Result<(Self, Scratch), Refusal> {
        let scratch = Scratch::new(stream, self.bytes).map_err(Refusal::NoMemory)?;
        let mut split = self.at(scratch.address);
        let geometry = Geometry { blocks: split.blocks, threads: THREADS, smem_bytes: 0, cluster: 1, dependent };
        let params = (&raw mut split.params).cast::<c_void>();
        // SAFETY: the kernel takes a `SplitParams` by value, alive here; the parts have their memory; the rest by contract.
        unsafe { launch::entry(function, &geometry, stream, &mut [params]) }?;
        Ok((split, scratch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiglu_kernels::{DType, Op};

    #[test]
    fn parts_take_as_much_as_the_operands_and_nothing_overlaps() {
        let problem = Problem::forward(DType::F32, WeightMajor::N, 3, 40, 33);
        let args = RawForward { m: 3, z: 7, ..RawForward::default() };
        let split = Split::of_forward(&problem, &args).at(1 << 20);
        let (row_bytes, lines) = (256, [3, 40, 40]);
        let mut end = 1 << 20;
        for (operand, lines) in split.params.operands.iter().zip(lines) {
            for (start, bytes) in [(operand.matrices[0].parts, lines * row_bytes), (operand.scales, 4 * lines)] {
                assert!(start >= end && start.is_multiple_of(ALIGNED) && start < end + ALIGNED);
                end = start + bytes;
            }
        }
        assert!(end <= (1 << 20) + split.bytes);
        assert_eq!(split.blocks, 3 + 2 * 2);
        let along = Split::of_forward(&Problem { weight_major: WeightMajor::K, ..problem }, &args);
        assert_eq!(along.blocks, 83);
        let (of_maps, parts) = split.forward(&problem, &args);
        assert_eq!((of_maps.k, of_maps.weight_major, parts.gate_stride, parts.z), (64, WeightMajor::K, 64, 7));
    }

    #[test]
    fn pairs_of_one_sum_share_their_scales_and_other_pairs_do_not() {
        let problem = Problem::forward(DType::F32, WeightMajor::K, 5, 64, 96);
        let scales = |op| {
            let product = problem.with_op(op).product().unwrap();
            let split = Split::of_step(&product, &RawStep { m: 5, ..RawStep::default() }).at(1 << 20);
            let lines = split.params.operands.map(|operand| (operand.count, operand.lines));
            (lines, split.step(&product, &RawStep::default()).1)
        };
        let (lines, parts) = scales(Op::InputGrad);
        assert_eq!(lines, [(2, 5), (2, 0), (2, 96), (2, 0)]);
        assert_eq!(parts.left[1].address, (1 << 20) + 5 * 256);
        let (lines, parts) = scales(Op::WeightGrad);
        assert_eq!(lines.map(|(count, _)| count), [1; 4]);
        assert!(lines[1].1 + lines[3].1 > 0 && parts.left != parts.right);
        let (_, parts) = scales(Op::Down);
        assert!(parts.left[0].address > 0 && [parts.left[1].address, parts.right[1].address] == [0; 2]);
    }
}
