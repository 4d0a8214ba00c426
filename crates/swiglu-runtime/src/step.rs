//! Arguments of one step of the FFN beside the fused forward: the gate, its backward, and what is one GEMM.
//!
//! Contract: `StepParams` mirrors its namesake in `templates/shared/step_params.cuh`.

use cudarc::driver::DeviceRepr;
use swiglu_kernels::families::Raster;
use swiglu_kernels::problem::{MAX_ACCESS_BYTES, alignment_of};
use swiglu_kernels::{DType, Op, Problem};

/// A row-major matrix in device memory, without its sizes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawMatrix {
    /// Device address; 0 where the step has no such operand.
    pub address: u64,
    /// Elements from row to row.
    pub stride: i64,
}

impl RawMatrix {
    /// Largest power of two, at most 16, that divides the address and the row stride in bytes, of elements of `bytes`.
    pub(crate) fn alignment(self, bytes: u32) -> u32 {
        // Its low bits are right whatever is lost above.
        let step = self.stride.unsigned_abs().wrapping_mul(bytes.into());
        alignment_of(self.address | step).min(MAX_ACCESS_BYTES)
    }
}

/// An operand by its name, with the bytes of an element.
pub(crate) type Named = (&'static str, RawMatrix, u32);

/// The alignment that all operands have.
pub(crate) fn alignment_of_all<const COUNT: usize>(operands: [Named; COUNT]) -> u32 {
    operands.into_iter().fold(MAX_ACCESS_BYTES, |all, (_, matrix, bytes)| all.min(matrix.alignment(bytes)))
}

/// The first operand that is aligned to less than 16 bytes, and to how many.
pub(crate) fn misaligned<const COUNT: usize>(operands: [Named; COUNT]) -> Option<(&'static str, u32)> {
    let aligned = operands.into_iter().map(|(argument, matrix, bytes)| (argument, matrix.alignment(bytes)));
    aligned.into_iter().find(|&(_, alignment)| alignment < MAX_ACCESS_BYTES)
}

/// The first of these arguments, of name and address, that is needed and has no address.
pub(crate) fn missing<const COUNT: usize>(arguments: [(&'static str, u64, bool); COUNT]) -> Option<&'static str> {
    arguments.into_iter().find(|&(_, address, needed)| needed && address == 0).map(|(argument, ..)| argument)
}

/// Addresses and strides of one launch of a step, without types. What an op has none of stays 0.
///
/// | op | left | right | saved | out |
/// |---|---|---|---|---|
/// | `gate` | | | gate, up `[M,N]` | z `[M,N]` |
/// | `gate_backward` | dz `[M,N]` | | gate, up | dgate, dup, z or 0; may be dz, gate or up themselves |
/// | `down`, `down_static` | z `[M,N]` | Wd | | y `[M,K]` |
/// | `down_input_grad` | dy `[M,K]` | Wd | | dz `[M,N]` |
/// | `dgated` | dy | Wd | gate, up | dgate, dup, z or 0; may be gate or up themselves |
/// | `input_grad` | dgate, dup | Wg, Wu | | dx `[M,K]` |
/// | `weight_grad`, k_major | dgate, dup | x, | | dWg, dWu `[N,K]` |
/// | `weight_grad`, n_major | x | dgate, dup | | dWg, dWu `[K,N]` |
/// | `down_weight_grad`, k_major | dy | z | | dWd `[K,N]` |
/// | `down_weight_grad`, n_major | z | dy | | dWd `[N,K]` |
/// | `bias_grad` | | dgate, dup | | dbg, dbu `[N]` |
/// | `down_bias_grad` | | dy | | dbd `[K]` |
///
/// Outputs have the problem's number format; those of ops in `_add` are fp32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawStep {
    /// Tokens.
    pub m: u32,
    /// The left operand, twice where it is paired.
    pub left: [RawMatrix; 2],
    /// The right operand, twice where it is paired.
    pub right: [RawMatrix; 2],
    /// The pre-activations of gate and up.
    pub saved: [RawMatrix; 2],
    /// The outputs.
    pub out: [RawMatrix; 3],
    /// Device address of bd `[K]`, or 0.
    pub bias: u64,
}

impl RawStep {
    /// An operand that the op needs and that has no address.
    pub(crate) fn missing(&self, problem: &Problem) -> Option<&'static str> {
        let needs = |wanted: usize, of: &[RawMatrix]| of.iter().take(wanted).any(|matrix| matrix.address == 0);
        let (left, right) = problem.operands();
        let gated = matches!(problem.op, Op::Gate | Op::GateBackward | Op::Dgated);
        // z of the last two is left out at will.
        let out = if matches!(problem.op, Op::GateBackward | Op::Dgated) { 2 } else { problem.op.outputs() as usize };
        // Without tokens no input is read, and gradients of weights and biases alone are written, where they are not added.
        let read = |wanted: usize| if self.m == 0 { 0 } else { wanted };
        let writes = self.m > 0 || problem.sums_over_m() && !problem.op.accumulates();
        let operands = [
            ("left", needs(read(left), &self.left)),
            ("right", needs(read(right), &self.right)),
            ("saved", needs(read(if gated { 2 } else { 0 }), &self.saved)),
            ("out", needs(if writes { out } else { 0 }, &self.out)),
        ];
        operands.into_iter().find_map(|(name, missing)| missing.then_some(name))
    }

    /// Number format of the outputs.
    pub(crate) fn output_dtype(&self, problem: &Problem) -> DType {
        if problem.op.accumulates() { DType::F32 } else { problem.dtype }
    }

    pub(crate) fn operands(&self, problem: &Problem) -> [Named; 9] {
        let ([left0, left1], [right0, right1], [gate, up]) = (self.left, self.right, self.saved);
        let [out0, out1, out2] = self.out;
        let (bytes, out_bytes) = (problem.dtype.bytes(), self.output_dtype(problem).bytes());
        [
            ("left", left0, bytes),
            ("left", left1, bytes),
            ("right", right0, bytes),
            ("right", right1, bytes),
            ("saved", gate, bytes),
            ("saved", up, bytes),
            ("out", out0, out_bytes),
            ("out", out1, out_bytes),
            ("out", out2, out_bytes),
        ]
    }

    /// Largest power of two, at most 16, that divides every address and row stride in bytes.
    pub fn alignment(&self, problem: &Problem) -> u32 {
        alignment_of_all(self.operands(problem))
    }
}

/// `StepParams` of `templates/shared/step_params.cuh`, as every kernel of a step takes them.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct StepParams {
    left: [RawMatrix; 2],
    right: [RawMatrix; 2],
    saved: [RawMatrix; 2],
    out: [RawMatrix; 3],
    bias: u64,
    rows: i32,
    cols: i32,
    depth: i32,
    raster_along_n: i32,
    raster_group: i32,
}

impl StepParams {
    /// `None` when a size does not fit in 32 bits with a sign.
    pub fn new(problem: &Problem, raster: Raster, raster_group: u32, args: &RawStep) -> Option<Self> {
        let problem = problem.with_m(args.m);
        let (rows, cols) = problem.output();
        let int = |value: u32| i32::try_from(value).ok();
        Some(Self {
            left: args.left,
            right: args.right,
            saved: args.saved,
            out: args.out,
            bias: args.bias,
            rows: int(rows)?,
            cols: int(cols)?,
            depth: int(problem.product().map_or(0, |product| product.depth))?,
            raster_along_n: i32::from(raster.is_along_n()),
            raster_group: int(raster_group)?,
        })
    }
}

#[allow(unsafe_code, reason = "says that the struct is plain data")]
// SAFETY: `repr(C)`, integers only, mirrors the kernel's parameter.
unsafe impl DeviceRepr for StepParams {}

#[cfg(test)]
mod tests {
    use super::*;
    use swiglu_kernels::WeightMajor;

    #[test]
    fn what_an_op_needs_is_missed() {
        let problem = Problem::forward(DType::Bf16, WeightMajor::K, 8, 16, 16);
        let here = RawMatrix { address: 256, stride: 16 };
        let all = RawStep { m: 8, left: [here; 2], right: [here; 2], saved: [here; 2], out: [here; 3], bias: 0 };
        for op in Op::ALL.into_iter().filter(|op| !op.is_forward()) {
            assert_eq!(all.missing(&problem.with_op(op)), None, "{op}");
            let none = RawStep { m: 8, ..RawStep::default() };
            assert!(none.missing(&problem.with_op(op)).is_some(), "{op}");
            let zeroed = problem.with_op(op).sums_over_m() && !op.accumulates();
            let of_no_tokens = RawStep::default().missing(&problem.with_op(op));
            assert_eq!(of_no_tokens, zeroed.then_some("out"), "{op}");
        }
        let without = |op, step: RawStep| step.missing(&problem.with_op(op));
        let one = [here, RawMatrix::default()];
        assert_eq!(without(Op::InputGrad, RawStep { right: one, ..all }), Some("right"));
        assert_eq!(without(Op::Down, RawStep { right: one, ..all }), None);
        assert_eq!(without(Op::WeightGrad, RawStep { m: 0, out: [here; 3], ..RawStep::default() }), None);
        assert_eq!(without(Op::Dgated, RawStep { saved: one, ..all }), Some("saved"));
        assert_eq!(without(Op::Dgated, RawStep { out: [here, here, RawMatrix::default()], ..all }), None);
        assert_eq!(without(Op::WeightGrad, RawStep { out: [here, RawMatrix::default(), here], ..all }), Some("out"));
    }

    #[test]
    fn alignment_counts_fp32_outputs_by_their_own_size() {
        let problem = Problem::forward(DType::Bf16, WeightMajor::K, 8, 16, 16).with_op(Op::DownWeightGradAdd);
        let at = |stride| RawMatrix { address: 256, stride };
        let step = RawStep { left: [at(8), at(8)], out: [at(4), at(4), at(4)], ..RawStep::default() };
        assert_eq!(step.alignment(&problem), 16);
        assert_eq!(step.alignment(&problem.with_op(Op::DownWeightGrad)), 8);
    }

    #[test]
    fn the_first_odd_operand_is_named_and_no_stride_is_too_long() {
        let problem = Problem::forward(DType::Bf16, WeightMajor::K, 8, 16, 40).with_op(Op::Down);
        let at = |stride| RawMatrix { address: 256, stride };
        let step = |stride| RawStep {
            m: 2,
            left: [at(stride), RawMatrix::default()],
            right: [at(16), RawMatrix::default()],
            out: [at(stride), RawMatrix::default(), RawMatrix::default()],
            ..RawStep::default()
        };
        assert_eq!((step(41).alignment(&problem), step(i64::MAX).alignment(&problem)), (2, 2));
        assert_eq!(misaligned(step(40).operands(&problem)), None);
        let odd = RawStep { right: [at(17), RawMatrix::default()], ..step(40) };
        assert_eq!(misaligned(odd.operands(&problem)), Some(("right", 2)));
    }
}
