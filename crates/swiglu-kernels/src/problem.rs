//! What is to be computed: operation, number format, sizes.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// An operation the generator has kernels for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// `z[M,N] = act(x[M,K]·Wg + bg) ⊙ (x·Wu + bu)`, one launch.
    Forward,
    /// [`Op::Forward`] that also stores the pre-activations `[x·Wg + bg | x·Wu + bu]`, `[M, 2N]`, for a backward pass.
    ForwardSave,
    /// [`Op::Forward`] of weights that no launch writes which may still run when this one starts, as in inference: they are read
    /// before the launch ahead has ended.
    ForwardStatic,
    /// `z = act(gate) ⊙ up` of stored pre-activations.
    Gate,
    /// `dgate = dz ⊙ up ⊙ act'(gate)` and `dup = dz ⊙ act(gate)`; z again where it is asked for.
    GateBackward,
    /// The down projection `y[M,K] = z[M,N]·Wd + bd`.
    Down,
    /// [`Op::Down`] of weights as those of [`Op::ForwardStatic`].
    DownStatic,
    /// Its input gradient `dz[M,N] = dy[M,K]·Wdᵀ`.
    DownInputGrad,
    /// [`Op::DownInputGrad`] and [`Op::GateBackward`] in one launch: dz never reaches memory.
    Dgated,
    /// The input gradient `dx[M,K] = dgate·Wgᵀ + dup·Wuᵀ`, one GEMM whose sums are 2N long.
    InputGrad,
    /// The weight gradients `dWg = xᵀ·dgate` and `dWu = xᵀ·dup`, in the weights' order.
    WeightGrad,
    /// [`Op::WeightGrad`] added to what the fp32 outputs hold.
    WeightGradAdd,
    /// The weight gradient `dWd = zᵀ·dy`, in the weights' order.
    DownWeightGrad,
    /// [`Op::DownWeightGrad`] added to what the fp32 output holds.
    DownWeightGradAdd,
    /// The bias gradients `dbg[N]` and `dbu[N]`, the sums of dgate and dup over the tokens.
    BiasGrad,
    /// [`Op::BiasGrad`] added to what the fp32 outputs hold.
    BiasGradAdd,
    /// The bias gradient `dbd[K]`, the sum of dy over the tokens.
    DownBiasGrad,
    /// [`Op::DownBiasGrad`] added to what the fp32 output holds.
    DownBiasGradAdd,
}

impl Op {
    /// Every operation.
    pub const ALL: [Self; 18] = [
        Self::Forward,
        Self::ForwardSave,
        Self::ForwardStatic,
        Self::Gate,
        Self::GateBackward,
        Self::Down,
        Self::DownStatic,
        Self::DownInputGrad,
        Self::Dgated,
        Self::InputGrad,
        Self::WeightGrad,
        Self::WeightGradAdd,
        Self::DownWeightGrad,
        Self::DownWeightGradAdd,
        Self::BiasGrad,
        Self::BiasGradAdd,
        Self::DownBiasGrad,
        Self::DownBiasGradAdd,
    ];

    /// The operations that are one GEMM, perhaps with the gate's backward behind it.
    pub const PRODUCTS: [Self; 9] = [
        Self::Down,
        Self::DownStatic,
        Self::DownInputGrad,
        Self::Dgated,
        Self::InputGrad,
        Self::WeightGrad,
        Self::WeightGradAdd,
        Self::DownWeightGrad,
        Self::DownWeightGradAdd,
    ];

    /// Whether it is x through both weights: one of the kernels that compute z from x.
    pub const fn is_forward(self) -> bool {
        matches!(self, Self::Forward | Self::ForwardSave | Self::ForwardStatic)
    }

    /// Whether it sums columns: a product whose left operand is all ones and is not read.
    pub const fn is_column_sum(self) -> bool {
        matches!(self, Self::BiasGrad | Self::BiasGradAdd | Self::DownBiasGrad | Self::DownBiasGradAdd)
    }

    /// Whether it has no GEMM and sums nothing.
    pub const fn is_elementwise(self) -> bool {
        matches!(self, Self::Gate | Self::GateBackward)
    }

    /// Whether it adds to fp32 outputs.
    pub const fn accumulates(self) -> bool {
        matches!(self, Self::WeightGradAdd | Self::DownWeightGradAdd | Self::BiasGradAdd | Self::DownBiasGradAdd)
    }

    /// Bytes of an element of its outputs, of operands in `dtype`: sums that are added to are fp32.
    pub const fn output_bytes(self, dtype: DType) -> u32 {
        if self.accumulates() { 4 } else { dtype.output().bytes() }
    }

    /// Whether the pre-activations are stored beside z.
    pub const fn saves_preactivations(self) -> bool {
        matches!(self, Self::ForwardSave)
    }

    /// The operation whose winners serve where this one was not tuned: it does the same, but for what is stored beside z or
    /// when weights are read.
    pub const fn stand_in(self) -> Option<Self> {
        match self {
            Self::ForwardSave | Self::ForwardStatic => Some(Self::Forward),
            Self::DownStatic => Some(Self::Down),
            _ => None,
        }
    }

    /// Whether weights are read before the launch ahead has ended.
    pub const fn has_static_weights(self) -> bool {
        matches!(self, Self::ForwardStatic | Self::DownStatic)
    }

    /// Whether it is the down projection.
    pub const fn is_down(self) -> bool {
        matches!(self, Self::Down | Self::DownStatic)
    }

    /// How many matrices of the size [`Problem::output`] a launch stores.
    pub const fn outputs(self) -> u32 {
        match self {
            // z, gate, up; or dgate, dup, z.
            Self::ForwardSave | Self::GateBackward | Self::Dgated => 3,
            Self::WeightGrad | Self::WeightGradAdd | Self::BiasGrad | Self::BiasGradAdd => 2,
            Self::Forward
            | Self::ForwardStatic
            | Self::Gate
            | Self::Down
            | Self::DownStatic
            | Self::DownInputGrad
            | Self::InputGrad
            | Self::DownWeightGrad
            | Self::DownWeightGradAdd
            | Self::DownBiasGrad
            | Self::DownBiasGradAdd => 1,
        }
    }
}

/// Which index of a GEMM's operand is contiguous in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperandMajor {
    /// The summed index.
    Depth,
    /// The output's row (of the left operand) or column (of the right one).
    Outer,
}

/// What a GEMM has twice, once for the gate and once for up, in memory of its own each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Paired {
    /// Nothing.
    Nothing,
    /// Both operands: the products of the two pairs are summed.
    Depth,
    /// The left operand and the output.
    Rows,
    /// The right operand and the output.
    Columns,
}

/// A step as a GEMM: `out[rows, cols] = left[rows, depth] · right[depth, cols]`, of one half where halves are paired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Product {
    /// Rows of the output.
    pub rows: u32,
    /// Columns of the output, contiguous.
    pub cols: u32,
    /// Length of the sums.
    pub depth: u32,
    /// How the left operand lies in memory.
    pub left: OperandMajor,
    /// How the right operand lies in memory.
    pub right: OperandMajor,
    /// What it has twice.
    pub paired: Paired,
}

impl Product {
    /// Output matrices.
    pub const fn outputs(&self) -> u32 {
        match self.paired {
            Paired::Nothing | Paired::Depth => 1,
            Paired::Rows | Paired::Columns => 2,
        }
    }

    /// Matrices of the left and of the right operand.
    pub const fn operands(&self) -> (usize, usize) {
        match self.paired {
            Paired::Nothing => (1, 1),
            Paired::Rows => (2, 1),
            Paired::Columns => (1, 2),
            Paired::Depth => (2, 2),
        }
    }

    /// Rows and columns in memory of one matrix of the left operand.
    pub const fn left_shape(&self) -> (u32, u32) {
        self.left.shape(self.rows, self.depth)
    }

    /// Rows and columns in memory of one matrix of the right operand.
    pub const fn right_shape(&self) -> (u32, u32) {
        self.right.shape(self.cols, self.depth)
    }
}

impl OperandMajor {
    /// Rows and columns in memory of `outer` sums' numbers, `depth` each.
    pub const fn shape<T: Copy>(self, outer: T, depth: T) -> (T, T) {
        match self {
            Self::Depth => (outer, depth),
            Self::Outer => (depth, outer),
        }
    }
}

/// The non-linearity on the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `silu(g) = g / (1 + exp(-g))`.
    Silu,
}

/// How one matrix stores its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Eight bits, 4 of exponent and 3 of mantissa, to ±448, no infinities: OCP's E4M3.
    E4m3,
    /// Four bits, -8 to 7, stored plus 8: eight neighbours along K in a 32-bit word, the first in its lowest bits. This is
    /// GPTQ's `qweight`.
    Int4,
}

impl Format {
    /// Numbers that one stored element holds.
    pub const fn numbers(self) -> u32 {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::E4m3 => 1,
            Self::Int4 => 8,
        }
    }

    /// Bytes of one stored element.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::F32 | Self::Int4 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::E4m3 => 1,
        }
    }
}

/// Neighbours along K that share a scale of int4 weights.
pub const INT4_GROUP: u32 = 128;

/// Number formats of the operands and of the multiplication; sums are always fp32.
///
/// The scaled formats stand for numbers times scales: `docs/decisions/0010-scaled-formats.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DType {
    /// fp32 in memory, multiplied in fp32.
    F32,
    /// fp32 in memory, rounded to tf32 (10 mantissa bits) for the tensor cores.
    Tf32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// x and weights in e4m3, each with one scale or one a row; z in bf16.
    E4m3,
    /// Weights in e4m3 with one scale or one a row; all else in bf16.
    Bf16E4m3,
    /// Weights in e4m3 with one scale or one a row; all else in fp16.
    F16E4m3,
    /// Weights in int4 with a scale in bf16 for each [`INT4_GROUP`] along K; all else in bf16.
    Bf16Int4,
    /// Weights in int4 with a scale in fp16 for each [`INT4_GROUP`] along K; all else in fp16.
    F16Int4,
}

impl DType {
    /// Every format, in the order that reports use.
    pub const ALL: [Self; 9] = [
        Self::F32,
        Self::Tf32,
        Self::F16,
        Self::Bf16,
        Self::E4m3,
        Self::Bf16E4m3,
        Self::F16E4m3,
        Self::Bf16Int4,
        Self::F16Int4,
    ];

    /// Format of x.
    pub const fn x(self) -> Format {
        match self {
            Self::E4m3 => Format::E4m3,
            _ => self.output(),
        }
    }

    /// Format of both weights.
    pub const fn weights(self) -> Format {
        match self {
            Self::E4m3 | Self::Bf16E4m3 | Self::F16E4m3 => Format::E4m3,
            Self::Bf16Int4 | Self::F16Int4 => Format::Int4,
            Self::F32 | Self::Tf32 | Self::F16 | Self::Bf16 => self.output(),
        }
    }

    /// Format of z, of the biases and of what is saved.
    pub const fn output(self) -> Format {
        match self {
            Self::F32 | Self::Tf32 => Format::F32,
            Self::F16 | Self::F16E4m3 | Self::F16Int4 => Format::F16,
            Self::Bf16 | Self::E4m3 | Self::Bf16E4m3 | Self::Bf16Int4 => Format::Bf16,
        }
    }

    /// Whether the weights, and x where it has their format, stand for numbers times scales.
    pub const fn is_scaled(self) -> bool {
        matches!(self.weights(), Format::E4m3 | Format::Int4)
    }

    /// Bytes of one element of x; of every operand where the format is not scaled.
    pub const fn bytes(self) -> u32 {
        self.x().bytes()
    }

    /// Largest `‖out − ref‖ / ‖ref‖` against float64 that a correct kernel may show at K ≤ 8192. The reference has the
    /// operands as they are stored, so that what quantisation loses does not count.
    pub const fn tolerance(self) -> f64 {
        match self {
            Self::F32 => 4.0e-6,
            Self::Tf32 => 1.0e-3,
            Self::F16 | Self::F16E4m3 | Self::F16Int4 => 3.0e-4,
            Self::Bf16 | Self::Bf16E4m3 | Self::Bf16Int4 => 2.0e-3,
            // bf16's 1.7e-3, and 6e-4 of two sums that keep 14 bits for 512 products (modelled).
            Self::E4m3 => 2.5e-3,
        }
    }
}

/// Which index of the weights is contiguous in memory; said of gate and up, and of the down projection as a GEMM of its own,
/// whose sums are N long and whose columns are K.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum WeightMajor {
    /// Rows of length K, one per output column: `[N,K]`, as `nn.Linear` stores them.
    #[serde(rename = "k_major")]
    K,
    /// Rows of length N, one per input feature: `[K,N]`.
    #[serde(rename = "n_major")]
    N,
}

impl WeightMajor {
    /// Both orders.
    pub const ALL: [Self; 2] = [Self::K, Self::N];
}

/// The largest access, in bytes, that a kernel makes to global memory.
pub const MAX_ACCESS_BYTES: u32 = 16;

/// One problem: what a kernel is chosen for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// The operation.
    pub op: Op,
    /// The non-linearity.
    pub activation: Activation,
    /// Number format.
    pub dtype: DType,
    /// Memory order of the weights.
    pub weight_major: WeightMajor,
    /// Largest power of two, at most 16, that divides every base address and row stride in bytes.
    pub alignment: u32,
    /// Intermediate size: columns of z.
    pub n: u32,
    /// Hidden size: columns of x, the length of every sum.
    pub k: u32,
    /// Tokens: rows of x and z.
    pub m: u32,
}

impl Problem {
    /// A forward problem on contiguous, well aligned operands.
    pub fn forward(dtype: DType, weight_major: WeightMajor, m: u32, n: u32, k: u32) -> Self {
        let weight_row = match weight_major {
            WeightMajor::K => k / dtype.weights().numbers(),
            WeightMajor::N => n,
        };
        let alignment = [(k, dtype.x()), (n, dtype.output()), (weight_row, dtype.weights())]
            .into_iter()
            .map(|(elements, format)| alignment_of(u64::from(elements) * u64::from(format.bytes())))
            .fold(MAX_ACCESS_BYTES, u32::min);
        Self { op: Op::Forward, activation: Activation::Silu, dtype, weight_major, alignment, n, k, m }
    }

    /// The same sizes for another operation.
    #[must_use]
    pub fn with_op(self, op: Op) -> Self {
        Self { op, ..self }
    }

    /// The same problem for another number of tokens.
    #[must_use]
    pub fn with_m(self, m: u32) -> Self {
        Self { m, ..self }
    }

    /// The step as a GEMM, sums of columns as one with a row of ones; `None` for the forward, whose output has half the columns, and for what has no GEMM.
    pub fn product(&self) -> Option<Product> {
        use OperandMajor::{Depth, Outer};
        let &Self { m, n, k, .. } = self;
        let k_major = matches!(self.weight_major, WeightMajor::K);
        // The weights of a forward GEMM: k_major is contiguous along its sums, n_major along its columns.
        let (forwards, backwards) = if k_major { (Depth, Outer) } else { (Outer, Depth) };
        let of = |rows, cols, depth, left, right, paired| Some(Product { rows, cols, depth, left, right, paired });
        match self.op {
            Op::Forward | Op::ForwardSave | Op::ForwardStatic | Op::Gate | Op::GateBackward => None,
            Op::Down | Op::DownStatic => of(m, k, n, Depth, forwards, Paired::Nothing),
            Op::DownInputGrad | Op::Dgated => of(m, n, k, Depth, backwards, Paired::Nothing),
            Op::InputGrad => of(m, k, n, Depth, backwards, Paired::Depth),
            Op::WeightGrad | Op::WeightGradAdd if k_major => of(n, k, m, Outer, Outer, Paired::Rows),
            Op::WeightGrad | Op::WeightGradAdd => of(k, n, m, Outer, Outer, Paired::Columns),
            Op::DownWeightGrad | Op::DownWeightGradAdd if k_major => of(k, n, m, Outer, Outer, Paired::Nothing),
            Op::DownWeightGrad | Op::DownWeightGradAdd => of(n, k, m, Outer, Outer, Paired::Nothing),
            Op::BiasGrad | Op::BiasGradAdd => of(1, n, m, Outer, Outer, Paired::Columns),
            Op::DownBiasGrad | Op::DownBiasGradAdd => of(1, k, m, Outer, Outer, Paired::Nothing),
        }
    }

    /// Matrices of a step's left and of its right operand.
    pub fn operands(&self) -> (usize, usize) {
        let (left, right) = self.product().map_or((0, 0), |product| product.operands());
        match self.op {
            Op::GateBackward => (1, 0),
            op if op.is_column_sum() => (0, right),
            _ => (left, right),
        }
    }

    /// Whether M is the length of the sums: of the gradients of weights and biases.
    pub const fn sums_over_m(&self) -> bool {
        use Op::{DownWeightGrad, DownWeightGradAdd, WeightGrad, WeightGradAdd};
        self.op.is_column_sum() || matches!(self.op, WeightGrad | WeightGradAdd | DownWeightGrad | DownWeightGradAdd)
    }

    /// Rows and columns of one output matrix.
    pub fn output(&self) -> (u32, u32) {
        self.product().map_or((self.m, self.n), |product| (product.rows, product.cols))
    }

    /// Multiplications and additions of the GEMMs: `4·M·N·K`, half as many where one weight takes part, none without.
    pub fn flops(&self) -> f64 {
        let weights = match self.op {
            Op::Gate | Op::GateBackward => 0.0,
            Op::BiasGrad | Op::BiasGradAdd | Op::DownBiasGrad | Op::DownBiasGradAdd => 0.0,
            Op::Forward | Op::ForwardSave | Op::ForwardStatic => 2.0,
            Op::InputGrad | Op::WeightGrad | Op::WeightGradAdd => 2.0,
            Op::Down | Op::DownStatic | Op::DownInputGrad | Op::Dgated => 1.0,
            Op::DownWeightGrad | Op::DownWeightGradAdd => 1.0,
        };
        2.0 * weights * f64::from(self.m) * f64::from(self.n) * f64::from(self.k)
    }

    /// Bytes that must move at least once: every operand, every output, and fp32 outputs twice where they are added to. Of
    /// scales only those of groups count.
    pub fn bytes(&self) -> f64 {
        let (m, n, k) = (f64::from(self.m), f64::from(self.n), f64::from(self.k));
        let (mk, mn, nk) = (m * k, m * n, n * k);
        let bytes = |format: Format| f64::from(format.bytes()) / f64::from(format.numbers());
        let Self { op, dtype, .. } = self;
        let outputs = f64::from(op.outputs());
        let elements = match op {
            Op::Forward | Op::ForwardSave | Op::ForwardStatic => {
                let groups = if dtype.weights() == Format::Int4 { 2.0 * n * self.int4_groups() } else { 0.0 };
                let inputs = mk * bytes(dtype.x()) + 2.0 * nk * bytes(dtype.weights());
                return inputs + (outputs * mn + groups) * bytes(dtype.output());
            }
            Op::Gate => 2.0 * mn + outputs * mn,
            Op::GateBackward => 3.0 * mn + outputs * mn,
            Op::Down | Op::DownStatic | Op::DownInputGrad => mk + mn + nk,
            Op::Dgated => mk + nk + 2.0 * mn + outputs * mn,
            Op::InputGrad => mk + 2.0 * (mn + nk),
            Op::WeightGrad => mk + 2.0 * (mn + nk),
            Op::WeightGradAdd => mk + 2.0 * mn,
            Op::DownWeightGrad => mk + mn + nk,
            Op::DownWeightGradAdd => mk + mn,
            Op::BiasGrad => 2.0 * (mn + n),
            Op::BiasGradAdd => 2.0 * mn,
            Op::DownBiasGrad => mk + k,
            Op::DownBiasGradAdd => mk,
        };
        let (rows, cols) = self.output();
        let added = if op.accumulates() { 8.0 * outputs * f64::from(rows) * f64::from(cols) } else { 0.0 };
        elements * bytes(dtype.output()) + added
    }

    /// Scales of one column of int4 weights.
    fn int4_groups(&self) -> f64 {
        f64::from(self.k.div_ceil(INT4_GROUP))
    }
}

/// Largest power of two, at most 16, that divides `bytes` (16 for 0).
pub fn alignment_of(bytes: u64) -> u32 {
    1 << bytes.trailing_zeros().min(MAX_ACCESS_BYTES.trailing_zeros())
}

/// Gives an enum the same word on the command line, in TOML and in messages.
macro_rules! names {
    ($type:ty, $what:literal, $($variant:path => $name:literal),+ $(,)?) => {
        impl $type {
            /// The word for it on the command line, in TOML and in reports.
            pub const fn name(self) -> &'static str {
                match self { $($variant => $name),+ }
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }
        impl FromStr for $type {
            type Err = UnknownName;
            fn from_str(name: &str) -> Result<Self, UnknownName> {
                match name {
                    $($name => Ok($variant),)+
                    _ => Err(UnknownName { what: $what, name: name.into(), known: &[$($name),+] }),
                }
            }
        }
    };
}
pub(crate) use names;

/// A word that names no value of an enum.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is no {what}; use one of {}", known.join(", "))]
pub struct UnknownName {
    /// What was looked for, e.g. "dtype".
    pub what: &'static str,
    /// The word given.
    pub name: String,
    /// The words that exist.
    pub known: &'static [&'static str],
}

names!(Op, "op", Op::Forward => "forward", Op::ForwardSave => "forward_save", Op::ForwardStatic => "forward_static",
    Op::Gate => "gate", Op::GateBackward => "gate_backward",
    Op::Down => "down", Op::DownStatic => "down_static", Op::DownInputGrad => "down_input_grad", Op::Dgated => "dgated",
    Op::InputGrad => "input_grad", Op::WeightGrad => "weight_grad", Op::WeightGradAdd => "weight_grad_add",
    Op::DownWeightGrad => "down_weight_grad", Op::DownWeightGradAdd => "down_weight_grad_add",
    Op::BiasGrad => "bias_grad", Op::BiasGradAdd => "bias_grad_add",
    Op::DownBiasGrad => "down_bias_grad", Op::DownBiasGradAdd => "down_bias_grad_add");
names!(OperandMajor, "operand order", OperandMajor::Depth => "depth", OperandMajor::Outer => "outer");
names!(Paired, "pairing", Paired::Nothing => "nothing", Paired::Depth => "depth", Paired::Rows => "rows",
    Paired::Columns => "columns");
names!(Activation, "activation", Activation::Silu => "silu");
names!(DType, "dtype", DType::F32 => "f32", DType::Tf32 => "tf32", DType::F16 => "f16", DType::Bf16 => "bf16",
    DType::E4m3 => "e4m3", DType::Bf16E4m3 => "bf16_e4m3", DType::F16E4m3 => "f16_e4m3",
    DType::Bf16Int4 => "bf16_int4", DType::F16Int4 => "f16_int4");
names!(Format, "format", Format::F32 => "f32", Format::F16 => "f16", Format::Bf16 => "bf16", Format::E4m3 => "e4m3",
    Format::Int4 => "int4");
names!(WeightMajor, "weight order", WeightMajor::K => "k_major", WeightMajor::N => "n_major");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_is_the_largest_power_of_two_up_to_16() {
        assert_eq!([0, 2, 6, 8, 24, 48, 4096].map(alignment_of), [16, 2, 2, 8, 8, 16, 16]);
    }

    #[test]
    fn odd_sizes_lower_the_alignment_of_a_problem() {
        assert_eq!(Problem::forward(DType::Bf16, WeightMajor::K, 1, 64, 4096).alignment, 16);
        assert_eq!(Problem::forward(DType::Bf16, WeightMajor::K, 1, 63, 4096).alignment, 2);
        assert_eq!(Problem::forward(DType::F32, WeightMajor::N, 1, 64, 34).alignment, 8);
        assert_eq!(Problem::forward(DType::E4m3, WeightMajor::K, 1, 64, 4100).alignment, 4);
        assert_eq!(Problem::forward(DType::Bf16Int4, WeightMajor::N, 1, 24, 64).alignment, 16);
    }

    #[test]
    fn bytes_count_every_operand_in_its_own_format() {
        let bytes = |dtype, major| Problem::forward(dtype, major, 16, 1024, 256).bytes();
        let (x, weights, z) = (16.0 * 256.0, 2.0 * 1024.0 * 256.0, 16.0 * 1024.0);
        assert_eq!(bytes(DType::Bf16, WeightMajor::K), 2.0 * (x + weights + z));
        assert_eq!(bytes(DType::E4m3, WeightMajor::K), x + weights + 2.0 * z);
        assert_eq!(bytes(DType::Bf16E4m3, WeightMajor::K), 2.0 * x + weights + 2.0 * z);
        // Two groups of 128.
        assert_eq!(bytes(DType::Bf16Int4, WeightMajor::N), 2.0 * x + weights / 2.0 + 2.0 * z + 2.0 * 2048.0 * 2.0);
    }

    #[test]
    fn names_round_trip_and_unknown_ones_list_the_choices() {
        for dtype in DType::ALL {
            assert_eq!(dtype.name().parse(), Ok(dtype));
        }
        for op in Op::ALL {
            assert_eq!(op.name().parse(), Ok(op));
        }
        let error = "fp64".parse::<DType>().unwrap_err().to_string();
        assert!(error.starts_with("`fp64` is no dtype; use one of f32, tf32, f16, bf16"), "{error}");
    }
}
