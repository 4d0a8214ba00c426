//! The GEMMs that an op is made of, as a library multiplies them: sizes, strides, addresses. Nothing is launched here.

use crate::launch::RawForward;
use crate::step::{RawMatrix, RawStep};
use swiglu_kernels::problem::{OperandMajor, Paired, Product};
use swiglu_kernels::{Problem, WeightMajor};

/// What decides which algorithm multiplies: `out[rows, cols] = left[rows, depth] · right[depth, cols]`, row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct GemmShape {
    /// Rows of the output.
    pub rows: u64,
    /// Columns of the output, contiguous.
    pub cols: u64,
    /// Length of the sums.
    pub depth: u64,
    /// How the left operand lies in memory.
    pub left: OperandMajor,
    /// How the right operand lies in memory.
    pub right: OperandMajor,
    /// Elements from row to row in memory of the left operand, the right one and the output.
    pub strides: [i64; 3],
    /// Whether `[cols]` numbers are added to every row.
    pub is_biased: bool,
}

/// One GEMM and the device addresses of its matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GemmAt {
    /// Sizes and strides.
    pub shape: GemmShape,
    /// The left operand.
    pub left: u64,
    /// The right operand.
    pub right: u64,
    /// The output.
    pub out: u64,
    /// The bias, or 0.
    pub bias: u64,
}

/// One GEMM, or two where the halves of a pair do not lie beside each other.
pub type Gemms = [Option<GemmAt>; 2];

/// Operands that no GEMM of a library takes, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NoGemm(pub(crate) &'static str);

/// Matrices of a product; those that are not paired come once.
#[derive(Debug, Clone, Copy)]
struct Operands {
    left: [RawMatrix; 2],
    right: [RawMatrix; 2],
    out: [RawMatrix; 2],
    bias: [u64; 2],
}

/// The GEMMs of a step, with `args.out[0]` for dz of `dgated`; M is that of `args`.
///
/// # Errors
/// [`NoGemm`] for what has no GEMM, for strides of less than a row, and for pairs of `input_grad` that do not lie beside each
/// other: their sums would be rounded between two GEMMs.
pub fn of_step(problem: &Problem, args: &RawStep) -> Result<Gemms, NoGemm> {
    let problem = problem.with_m(args.m);
    let product = problem.product().ok_or(NoGemm("the op has no GEMM"))?;
    let operands =
        Operands { left: args.left, right: args.right, out: [args.out[0], args.out[1]], bias: [args.bias; 2] };
    gemms(&product, &operands, [problem.dtype.bytes(), problem.op.output_bytes(problem.dtype)])
}

/// The GEMMs of the forward, from x to the pre-activations `sums` of gate and up; M is that of `args`.
///
/// # Errors
/// [`NoGemm`] for strides of less than a row.
pub fn of_forward(problem: &Problem, args: &RawForward, sums: [RawMatrix; 2]) -> Result<Gemms, NoGemm> {
    let right = match problem.weight_major {
        WeightMajor::K => OperandMajor::Depth,
        WeightMajor::N => OperandMajor::Outer,
    };
    let &Problem { n, k, dtype, .. } = problem;
    let product =
        Product { rows: args.m, cols: n, depth: k, left: OperandMajor::Depth, right, paired: Paired::Columns };
    let x = RawMatrix { address: args.x, stride: args.x_stride };
    let gate = RawMatrix { address: args.gate, stride: args.gate_stride };
    let up = RawMatrix { address: args.up, stride: args.up_stride };
    let operands = Operands { left: [x; 2], right: [gate, up], out: sums, bias: [args.gate_bias, args.up_bias] };
    gemms(&product, &operands, [dtype.bytes(); 2])
}

/// One of the sizes twice where the pair lies beside each other, in either order; `bytes` of an element of the operands and of
/// the output.
fn gemms(product: &Product, operands: &Operands, bytes: [u32; 2]) -> Result<Gemms, NoGemm> {
    let &Product { rows, cols, depth, left, right, paired } = product;
    let of_left = |size, major| Along { size, is_contiguous: left == major, bytes: bytes[0] };
    let of_right = |size, major| Along { size, is_contiguous: right == major, bytes: bytes[0] };
    let of_out = |size, is_contiguous| Along { size, is_contiguous, bytes: bytes[1] };
    let joins = |[first, second]: [usize; 2]| {
        let joins = |pair: &[RawMatrix; 2], along: Along| along.joins(pair[first], pair[second]);
        let Operands { left, right, out, bias } = operands;
        match paired {
            Paired::Nothing => true,
            Paired::Depth => {
                joins(left, of_left(depth, OperandMajor::Depth)) && joins(right, of_right(depth, OperandMajor::Depth))
            }
            Paired::Rows => joins(left, of_left(rows, OperandMajor::Outer)) && joins(out, of_out(rows, false)),
            Paired::Columns => {
                *bias == [0; 2] && joins(right, of_right(cols, OperandMajor::Outer)) && joins(out, of_out(cols, true))
            }
        }
    };
    let single = [rows, cols, depth].map(u64::from);
    if let Some([first, _]) = [[0, 1], [1, 0]].into_iter().find(|&order| joins(order)) {
        let [rows, cols, depth] = single;
        let size = match paired {
            Paired::Nothing => single,
            Paired::Depth => [rows, cols, 2 * depth],
            Paired::Rows => [2 * rows, cols, depth],
            Paired::Columns => [rows, 2 * cols, depth],
        };
        return Ok([Some(gemm(product, operands, size, first)?), None]);
    }
    if paired == Paired::Depth {
        return Err(NoGemm("gate and up lie apart, and the sums of one would be rounded before the other's are added"));
    }
    Ok([Some(gemm(product, operands, single, 0)?), Some(gemm(product, operands, single, 1)?)])
}

/// The GEMM of this size on half `half` of what is paired.
fn gemm(product: &Product, operands: &Operands, size: [u64; 3], half: usize) -> Result<GemmAt, NoGemm> {
    let [rows, cols, depth] = size;
    let &Product { left, right, paired, .. } = product;
    let matrix = |pair: [RawMatrix; 2], is_paired: bool| pair[if is_paired { half } else { 0 }];
    let in_left = matrix(operands.left, matches!(paired, Paired::Depth | Paired::Rows));
    let in_right = matrix(operands.right, matches!(paired, Paired::Depth | Paired::Columns));
    let out = matrix(operands.out, matches!(paired, Paired::Rows | Paired::Columns));
    let strides = [
        stride(left.shape(rows, depth), in_left.stride)?,
        stride(right.shape(cols, depth), in_right.stride)?,
        stride((rows, cols), out.stride)?,
    ];
    let bias = operands.bias[half];
    let shape = GemmShape { rows, cols, depth, left, right, strides, is_biased: bias != 0 };
    Ok(GemmAt { shape, left: in_left.address, right: in_right.address, out: out.address, bias })
}

/// The stride of a matrix in memory; that of a single row means nothing.
fn stride((rows, cols): (u64, u64), stride: i64) -> Result<i64, NoGemm> {
    let least = i64::try_from(cols).map_err(|_| NoGemm("a row is too long"))?;
    match stride {
        _ if rows <= 1 => Ok(stride.max(least)),
        _ if stride >= least => Ok(stride),
        _ => Err(NoGemm("a row stride is less than a row")),
    }
}

/// An index of a matrix along which another may go on.
#[derive(Debug, Clone, Copy)]
struct Along {
    size: u32,
    is_contiguous: bool,
    /// Of one element.
    bytes: u32,
}

impl Along {
    /// Whether `second` goes on where `first` ends.
    fn joins(self, first: RawMatrix, second: RawMatrix) -> bool {
        let step = if self.is_contiguous { 1 } else { first.stride.unsigned_abs() };
        let distance = u64::from(self.size).checked_mul(step).and_then(|all| all.checked_mul(self.bytes.into()));
        first.stride == second.stride
            && distance.is_some_and(|distance| first.address.checked_add(distance) == Some(second.address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiglu_kernels::{DType, Op};

    /// How the two matrices of a pair lie.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Lie {
        Beside,
        /// The second one first.
        Swapped,
        Apart,
    }

    /// fp32 numbers whose addresses count from the start.
    struct Memory(Vec<f32>);

    impl Memory {
        /// Two matrices of `rows` rows; those beside each other join along the contiguous index or from row to row.
        fn pair(&mut self, (rows, cols): (u32, u32), along_cols: bool, lie: Lie) -> [RawMatrix; 2] {
            let (start, rows, cols) = (self.0.len() as u64, u64::from(rows), u64::from(cols));
            self.0.extend((0..2 * rows * cols + 64).map(|i| ((i * 37 + start) % 19) as f32 - 9.0));
            let (stride, second) = match (lie, along_cols) {
                (Lie::Apart, _) => (cols, rows * cols + 5),
                (_, true) => (2 * cols, cols),
                (_, false) => (cols, rows * cols),
            };
            let at = |offset| RawMatrix { address: 4 * (start + offset), stride: stride as i64 };
            if lie == Lie::Swapped { [at(second), at(0)] } else { [at(0), at(second)] }
        }

        fn at(&self, address: u64, stride: i64, row: u64, col: u64) -> &f32 {
            &self.0[(address / 4 + row * stride as u64 + col) as usize]
        }

        fn of(&self, address: u64, stride: i64, major: OperandMajor, outer: u64, depth: u64) -> f32 {
            let (row, col) = if major == OperandMajor::Depth { (outer, depth) } else { (depth, outer) };
            *self.at(address, stride, row, col)
        }

        fn run(&mut self, GemmAt { shape, left, right, out, bias }: &GemmAt) {
            let &GemmShape { rows, cols, depth, strides, .. } = shape;
            for (row, col) in (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))) {
                let product = |d| {
                    self.of(*left, strides[0], shape.left, row, d) * self.of(*right, strides[1], shape.right, col, d)
                };
                let sum: f32 = (0..depth).map(product).sum();
                let bias = if shape.is_biased { *self.at(*bias, 0, 0, col) } else { 0.0 };
                self.0[(out / 4 + row * strides[2] as u64 + col) as usize] = sum + bias;
            }
        }
    }

    /// Runs the GEMMs and holds them to the product half by half; how many they were.
    fn check(product: &Product, operands: &Operands, memory: &mut Memory, gemms: Gemms) -> usize {
        let paired = product.paired;
        let &Product { rows, cols, depth, .. } = product;
        let (rows, cols, depth) = (u64::from(rows), u64::from(cols), u64::from(depth));
        let term = |memory: &Memory, row, col, [l, r]: [usize; 2]| -> f32 {
            let (left, right) = (operands.left[l], operands.right[r]);
            let of_left = |d| memory.of(left.address, left.stride, product.left, row, d);
            let of_right = |d| memory.of(right.address, right.stride, product.right, col, d);
            (0..depth).map(|d| of_left(d) * of_right(d)).sum()
        };
        let mut expected = Vec::new();
        for half in 0..product.outputs() as usize {
            for (row, col) in (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))) {
                let sum = match paired {
                    Paired::Nothing => term(memory, row, col, [0, 0]),
                    Paired::Rows => term(memory, row, col, [half, 0]),
                    Paired::Columns => term(memory, row, col, [0, half]),
                    Paired::Depth => term(memory, row, col, [0, 0]) + term(memory, row, col, [1, 1]),
                };
                let bias = operands.bias[half];
                expected.push(sum + if bias == 0 { 0.0 } else { *memory.at(bias, 0, 0, col) });
            }
        }
        gemms.iter().flatten().for_each(|gemm| memory.run(gemm));
        let mut expected = expected.into_iter();
        for half in 0..product.outputs() as usize {
            let out = operands.out[half];
            for (row, col) in (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))) {
                assert_eq!(
                    Some(*memory.at(out.address, out.stride, row, col)),
                    expected.next(),
                    "{paired} {row} {col}"
                );
            }
        }
        gemms.iter().flatten().count()
    }

    #[test]
    fn every_step_is_one_gemm_where_pairs_lie_together_and_its_sums_are_right() {
        for op in Op::PRODUCTS {
            for (major, m) in WeightMajor::ALL.into_iter().flat_map(|major| [1, 3].map(|m| (major, m))) {
                for lie in [Lie::Beside, Lie::Swapped, Lie::Apart] {
                    let problem = Problem::forward(DType::F32, major, m, 5, 7).with_op(op);
                    let product = problem.product().unwrap();
                    let mut memory = Memory(vec![0.5; 64]);
                    // Along which index a pair goes on: the sums', or the one that is paired.
                    let along = |of: OperandMajor| match product.paired {
                        Paired::Depth => of == OperandMajor::Depth,
                        _ => of == OperandMajor::Outer,
                    };
                    let left = memory.pair(product.left_shape(), along(product.left), lie);
                    let right = memory.pair(product.right_shape(), along(product.right), lie);
                    let out = memory.pair((product.rows, product.cols), product.paired == Paired::Columns, lie);
                    let bias = if op.is_down() { 64 } else { 0 };
                    let args = RawStep {
                        m,
                        left,
                        right,
                        out: [out[0], out[1], RawMatrix::default()],
                        bias,
                        ..RawStep::default()
                    };
                    let gemms = of_step(&problem, &args);
                    if op == Op::InputGrad && lie == Lie::Apart {
                        assert!(gemms.is_err());
                        continue;
                    }
                    let operands = Operands { left, right, out, bias: [bias; 2] };
                    let count = check(&product, &operands, &mut memory, gemms.unwrap());
                    let two = lie == Lie::Apart && matches!(product.paired, Paired::Rows | Paired::Columns);
                    assert_eq!(count, if two { 2 } else { 1 }, "{op} {major} M {m} {lie:?}");
                }
            }
        }
    }

    #[test]
    fn the_forward_is_one_gemm_but_for_biases_and_orders_that_differ() {
        for (major, bias) in WeightMajor::ALL.into_iter().flat_map(|major| [0, 64].map(|bias| (major, bias))) {
            for (weights, sums) in
                [(Lie::Beside, Lie::Beside), (Lie::Swapped, Lie::Swapped), (Lie::Swapped, Lie::Beside)]
            {
                let problem = Problem::forward(DType::F32, major, 3, 5, 7);
                let mut memory = Memory(vec![0.5; 64]);
                let [x, _] = memory.pair((3, 7), false, Lie::Apart);
                let (shape, along) = if major == WeightMajor::K { ((5, 7), false) } else { ((7, 5), true) };
                let right = memory.pair(shape, along, weights);
                let out = memory.pair((3, 5), true, sums);
                let args = RawForward {
                    m: 3,
                    x: x.address,
                    x_stride: x.stride,
                    gate: right[0].address,
                    gate_stride: right[0].stride,
                    up: right[1].address,
                    up_stride: right[1].stride,
                    up_bias: bias,
                    ..RawForward::default()
                };
                let gemms = of_forward(&problem, &args, out).unwrap();
                let right_major = if major == WeightMajor::K { OperandMajor::Depth } else { OperandMajor::Outer };
                let left = OperandMajor::Depth;
                let product = Product { rows: 3, cols: 5, depth: 7, left, right: right_major, paired: Paired::Columns };
                let operands = Operands { left: [x; 2], right, out, bias: [0, bias] };
                let count = check(&product, &operands, &mut memory, gemms);
                assert_eq!(count, if weights == sums && bias == 0 { 1 } else { 2 }, "{major} {weights:?} {sums:?}");
            }
        }
    }

    #[test]
    fn strides_of_a_single_row_mean_nothing_and_others_hold_a_row() {
        let problem = Problem::forward(DType::Bf16, WeightMajor::K, 1, 16, 8).with_op(Op::Down);
        let at = |stride| [RawMatrix { address: 4096, stride }; 2];
        let args = |m, stride| {
            let [out, _] = at(8);
            RawStep { m, left: at(stride), right: at(16), out: [out; 3], ..RawStep::default() }
        };
        let gemm = of_step(&problem, &args(1, 0)).unwrap()[0].unwrap();
        assert_eq!(gemm.shape.strides, [16, 16, 8]);
        assert!(of_step(&problem, &args(2, 0)).is_err(), "a row of x is 16 long");
        assert!(of_step(&problem, &args(2, -16)).is_err());
        assert_eq!(of_step(&problem, &args(2, 24)).unwrap()[0].unwrap().shape.strides[0], 24);
        let gate = Problem::forward(DType::Bf16, WeightMajor::K, 1, 16, 8).with_op(Op::Gate);
        assert!(of_step(&gate, &args(1, 16)).is_err());
    }
}
