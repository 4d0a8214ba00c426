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
    /// `z = act(gate) ⊙ up` of stored pre-activations.
    Gate,
    /// `dgate = dz ⊙ up ⊙ act'(gate)` and `dup = dz ⊙ act(gate)`; z again where it is asked for.
    GateBackward,
    /// The down projection `y[M,K] = z[M,N]·Wd + bd`.
    Down,
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
}

impl Op {
    /// Every operation.
    pub const ALL: [Self; 12] = [
        Self::Forward,
        Self::ForwardSave,
        Self::Gate,
        Self::GateBackward,
        Self::Down,
        Self::DownInputGrad,
        Self::Dgated,
        Self::InputGrad,
        Self::WeightGrad,
        Self::WeightGradAdd,
        Self::DownWeightGrad,
        Self::DownWeightGradAdd,
    ];

    /// The operations that have no GEMM.
    pub const ELEMENTWISE: [Self; 2] = [Self::Gate, Self::GateBackward];

    /// The operations that are one GEMM, perhaps with the gate's backward behind it.
    pub const PRODUCTS: [Self; 8] = [
        Self::Down,
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
        matches!(self, Self::Forward | Self::ForwardSave)
    }

    /// Whether it has no GEMM.
    pub const fn is_elementwise(self) -> bool {
        matches!(self, Self::Gate | Self::GateBackward)
    }

    /// Whether it adds to fp32 outputs.
    pub const fn accumulates(self) -> bool {
        matches!(self, Self::WeightGradAdd | Self::DownWeightGradAdd)
    }

    /// Whether the pre-activations are stored beside z.
    pub const fn saves_preactivations(self) -> bool {
        matches!(self, Self::ForwardSave)
    }

    /// How many matrices of the size [`Problem::output`] a launch stores.
    pub const fn outputs(self) -> u32 {
        match self {
            // z, gate, up; or dgate, dup, z.
            Self::ForwardSave | Self::GateBackward | Self::Dgated => 3,
            Self::WeightGrad | Self::WeightGradAdd => 2,
            Self::Forward
            | Self::Gate
            | Self::Down
            | Self::DownInputGrad
            | Self::InputGrad
            | Self::DownWeightGrad
            | Self::DownWeightGradAdd => 1,
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
}

/// The non-linearity on the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `silu(g) = g / (1 + exp(-g))`.
    Silu,
}

/// Number format of the operands and of the multiplication; sums are always fp32.
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
}

impl DType {
    /// Every format, in the order that reports use.
    pub const ALL: [Self; 4] = [Self::F32, Self::Tf32, Self::F16, Self::Bf16];

    /// Bytes of one element in memory.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::F32 | Self::Tf32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Largest `‖out − ref‖ / ‖ref‖` against float64 that a correct kernel may show at K ≤ 8192.
    pub const fn tolerance(self) -> f64 {
        match self {
            Self::F32 => 4.0e-6,
            Self::Tf32 => 1.0e-3,
            Self::F16 => 3.0e-4,
            Self::Bf16 => 2.0e-3,
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
            WeightMajor::K => k,
            WeightMajor::N => n,
        };
        let alignment = [k, n, weight_row]
            .into_iter()
            .map(|elements| alignment_of(u64::from(elements) * u64::from(dtype.bytes())))
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

    /// The step as a GEMM; `None` for the forward, whose output has half the columns, and for what has no GEMM.
    pub fn product(&self) -> Option<Product> {
        use OperandMajor::{Depth, Outer};
        let &Self { m, n, k, .. } = self;
        let k_major = matches!(self.weight_major, WeightMajor::K);
        // The weights of a forward GEMM: k_major is contiguous along its sums, n_major along its columns.
        let (forwards, backwards) = if k_major { (Depth, Outer) } else { (Outer, Depth) };
        let of = |rows, cols, depth, left, right, paired| Some(Product { rows, cols, depth, left, right, paired });
        match self.op {
            Op::Forward | Op::ForwardSave | Op::Gate | Op::GateBackward => None,
            Op::Down => of(m, k, n, Depth, forwards, Paired::Nothing),
            Op::DownInputGrad | Op::Dgated => of(m, n, k, Depth, backwards, Paired::Nothing),
            Op::InputGrad => of(m, k, n, Depth, backwards, Paired::Depth),
            Op::WeightGrad | Op::WeightGradAdd if k_major => of(n, k, m, Outer, Outer, Paired::Rows),
            Op::WeightGrad | Op::WeightGradAdd => of(k, n, m, Outer, Outer, Paired::Columns),
            Op::DownWeightGrad | Op::DownWeightGradAdd if k_major => of(k, n, m, Outer, Outer, Paired::Nothing),
            Op::DownWeightGrad | Op::DownWeightGradAdd => of(n, k, m, Outer, Outer, Paired::Nothing),
        }
    }

    /// Rows and columns of one output matrix.
    pub fn output(&self) -> (u32, u32) {
        self.product().map_or((self.m, self.n), |product| (product.rows, product.cols))
    }

    /// Multiplications and additions of the GEMMs: `4·M·N·K`, half as many where one weight takes part, none without.
    pub fn flops(&self) -> f64 {
        let weights = match self.op {
            Op::Gate | Op::GateBackward => 0.0,
            Op::Forward | Op::ForwardSave | Op::InputGrad | Op::WeightGrad | Op::WeightGradAdd => 2.0,
            Op::Down | Op::DownInputGrad | Op::Dgated | Op::DownWeightGrad | Op::DownWeightGradAdd => 1.0,
        };
        2.0 * weights * f64::from(self.m) * f64::from(self.n) * f64::from(self.k)
    }

    /// Bytes that must move at least once: every operand, every output, and fp32 outputs twice where they are added to.
    pub fn bytes(&self) -> f64 {
        let (m, n, k) = (f64::from(self.m), f64::from(self.n), f64::from(self.k));
        let (mk, mn, nk) = (m * k, m * n, n * k);
        let outputs = f64::from(self.op.outputs());
        let elements = match self.op {
            Op::Forward | Op::ForwardSave => mk + 2.0 * nk + outputs * mn,
            Op::Gate => 2.0 * mn + outputs * mn,
            Op::GateBackward => 3.0 * mn + outputs * mn,
            Op::Down | Op::DownInputGrad => mk + mn + nk,
            Op::Dgated => mk + nk + 2.0 * mn + outputs * mn,
            Op::InputGrad => mk + 2.0 * (mn + nk),
            Op::WeightGrad => mk + 2.0 * (mn + nk),
            Op::WeightGradAdd => mk + 2.0 * mn,
            Op::DownWeightGrad => mk + mn + nk,
            Op::DownWeightGradAdd => mk + mn,
        };
        let added = if self.op.accumulates() { 8.0 * outputs * nk } else { 0.0 };
        elements * f64::from(self.dtype.bytes()) + added
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

names!(Op, "op", Op::Forward => "forward", Op::ForwardSave => "forward_save",
    Op::Gate => "gate", Op::GateBackward => "gate_backward",
    Op::Down => "down", Op::DownInputGrad => "down_input_grad", Op::Dgated => "dgated",
    Op::InputGrad => "input_grad", Op::WeightGrad => "weight_grad", Op::WeightGradAdd => "weight_grad_add",
    Op::DownWeightGrad => "down_weight_grad", Op::DownWeightGradAdd => "down_weight_grad_add");
names!(OperandMajor, "operand order", OperandMajor::Depth => "depth", OperandMajor::Outer => "outer");
names!(Paired, "pairing", Paired::Nothing => "nothing", Paired::Depth => "depth", Paired::Rows => "rows",
    Paired::Columns => "columns");
names!(Activation, "activation", Activation::Silu => "silu");
names!(DType, "dtype", DType::F32 => "f32", DType::Tf32 => "tf32", DType::F16 => "f16", DType::Bf16 => "bf16");
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
        assert_eq!(error, "`fp64` is no dtype; use one of f32, tf32, f16, bf16");
    }
}
