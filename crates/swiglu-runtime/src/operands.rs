//! The operands of a launch, their shapes, and the one place where they are checked.

use half::{bf16, f16};
use swiglu_kernels::{DType, GateOrder, Op, Problem, WeightLayout};

/// What a plan is prepared for; M is given at launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ForwardSpec {
    /// Number formats of the operands.
    pub dtype: DType,
    /// How the weights lie in memory.
    pub layout: WeightLayout,
    /// Which half of packed weights is the gate; without meaning for separate ones.
    pub gate_order: GateOrder,
    /// Intermediate size: columns of z.
    pub n: u32,
    /// Hidden size: columns of x.
    pub k: u32,
    /// Whether launches also store the pre-activations, for a backward pass.
    pub save_preactivations: bool,
    /// Whether the weights are written by no launch that may still run when one of the plan's starts, as in inference. Where
    /// kernels may start before their predecessor ends (sm_90 on), those for few tokens then read weights before it has, and
    /// wait for x alone; what a launch reads whose weights are written meanwhile is not defined. Without effect where
    /// pre-activations are saved.
    pub static_weights: bool,
}

impl ForwardSpec {
    /// The problem for `m` tokens on contiguous operands.
    pub fn problem(&self, m: u32) -> Problem {
        let op = match self {
            Self { save_preactivations: true, .. } => Op::ForwardSave,
            Self { static_weights: true, .. } => Op::ForwardStatic,
            _ => Op::Forward,
        };
        Problem::forward(self.dtype, self.layout.major(), m, self.n, self.k).with_op(op)
    }
}

/// Rows of x at most: whole tiles of them are still counted in 32 bits.
pub const MAX_ROWS: usize = i32::MAX as usize - 1024;

/// An argument that does not fit the plan. Nothing was launched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("argument `{argument}`: {reason}")]
pub struct ArgumentError {
    /// Name of the argument.
    pub argument: &'static str,
    /// What is wrong with it, and what was expected.
    pub reason: String,
}

impl ArgumentError {
    pub(crate) fn new(argument: &'static str, reason: impl Into<String>) -> Self {
        Self { argument, reason: reason.into() }
    }
}

pub(crate) mod sealed {
    /// Keeps other types out: their sizes would not be those that slices are checked with.
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
    impl Sealed for u8 {}
    impl Sealed for u32 {}
}

/// A Rust type that a [`DType`] is stored as: `f32`, `f16` or `bf16`.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// Whether elements of this type are what `dtype` stores.
    fn stores(dtype: DType) -> bool;
    /// Exact widening.
    fn to_f32(self) -> f32;
    /// Round to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// The slice itself where this type is `f32`.
    fn as_f32(_slice: &[Self]) -> Option<&[f32]> {
        None
    }
}

impl Element for f32 {
    fn stores(dtype: DType) -> bool {
        matches!(dtype, DType::F32 | DType::Tf32)
    }
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
    fn as_f32(slice: &[Self]) -> Option<&[f32]> {
        Some(slice)
    }
}

impl Element for f16 {
    fn stores(dtype: DType) -> bool {
        dtype == DType::F16
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Element for bf16 {
    fn stores(dtype: DType) -> bool {
        dtype == DType::Bf16
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// A row-major matrix: `rows` rows of `cols` contiguous elements, `row_stride` elements apart.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<S> {
    /// Host slice or device slice.
    pub data: S,
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row that belong to the matrix.
    pub cols: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
}

impl<S> Matrix<S> {
    /// A matrix without gaps between its rows.
    pub const fn new(data: S, rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, row_stride: cols }
    }

    /// A matrix whose rows are `row_stride` elements apart.
    pub const fn strided(data: S, rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride }
    }

    /// Checks that the matrix is `rows`x`cols` and that its last element lies inside `len` elements.
    pub(crate) fn check(
        &self,
        argument: &'static str,
        rows: usize,
        cols: usize,
        len: usize,
    ) -> Result<(), ArgumentError> {
        if (self.rows, self.cols) != (rows, cols) {
            let reason = format!("is [{}, {}], expected [{rows}, {cols}]", self.rows, self.cols);
            return Err(ArgumentError::new(argument, reason));
        }
        if rows == 0 || cols == 0 {
            return Ok(());
        }
        if self.row_stride < cols && rows > 1 {
            let reason = format!("row stride {} is less than its {cols} columns", self.row_stride);
            return Err(ArgumentError::new(argument, reason));
        }
        let needed = (rows - 1).checked_mul(self.row_stride).and_then(|last_row| last_row.checked_add(cols));
        match needed {
            Some(needed) if needed <= len => Ok(()),
            _ => {
                let reason =
                    format!("[{rows}, {cols}] with row stride {} does not fit in {len} elements", self.row_stride);
                Err(ArgumentError::new(argument, reason))
            }
        }
    }
}

/// The weights as the caller holds them; the variant must agree with the plan's layout.
#[derive(Debug, Clone, Copy)]
pub enum Weights<S> {
    /// Gate and up in one matrix: `[K, 2N]` or `[2N, K]`.
    Packed(Matrix<S>),
    /// Gate and up apart: `[N, K]` each, or `[K, N]` each.
    Separate {
        /// Weights of the gate.
        gate: Matrix<S>,
        /// Weights of the other factor.
        up: Matrix<S>,
    },
}

/// Where the pre-activations go.
#[derive(Debug)]
pub enum Preactivations<O> {
    /// `[M, 2N]`: the gate's columns, then the up ones, whatever the weights' order.
    Packed(Matrix<O>),
    /// `[M, N]` each.
    Separate {
        /// `x·Wg + bg`.
        gate: Matrix<O>,
        /// `x·Wu + bu`.
        up: Matrix<O>,
    },
}

/// Operands of `z = silu(x·Wg + bg) ⊙ (x·Wu + bu)`.
#[derive(Debug)]
pub struct Forward<S, O> {
    /// `[M, K]`.
    pub x: Matrix<S>,
    /// Gate and up weights.
    pub weights: Weights<S>,
    /// `[N]`, if any.
    pub gate_bias: Option<S>,
    /// `[N]`, if any.
    pub up_bias: Option<S>,
    /// `[M, N]`: the output.
    pub z: Matrix<O>,
    /// Given where, and only where, the plan saves them.
    pub preactivations: Option<Preactivations<O>>,
}

/// Where gate and up start, in elements from the start of their storage, and the step between rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WeightOffsets {
    pub(crate) gate: usize,
    pub(crate) gate_stride: usize,
    pub(crate) up: usize,
    pub(crate) up_stride: usize,
}

impl<S, O> Forward<S, O> {
    /// Checks every operand against `spec`; `len` and `len_out` tell the elements behind a slice.
    pub(crate) fn check(
        &self,
        spec: &ForwardSpec,
        len: impl Fn(&S) -> usize,
        len_out: impl Fn(&O) -> usize,
    ) -> Result<WeightOffsets, ArgumentError> {
        let (n, k) = (spec.n as usize, spec.k as usize);
        let m = self.x.rows;
        if m > MAX_ROWS {
            return Err(ArgumentError::new("x", format!("has {m} rows, at most {MAX_ROWS} are supported")));
        }
        self.x.check("x", m, k, len(&self.x.data))?;
        self.z.check("z", m, n, len_out(&self.z.data))?;
        match (&self.preactivations, spec.save_preactivations) {
            (Some(Preactivations::Packed(saved)), true) => {
                saved.check("preactivations", m, 2 * n, len_out(&saved.data))?;
            }
            (Some(Preactivations::Separate { gate, up }), true) => {
                gate.check("preactivations.gate", m, n, len_out(&gate.data))?;
                up.check("preactivations.up", m, n, len_out(&up.data))?;
            }
            (None, false) => {}
            (Some(_), false) => {
                return Err(ArgumentError::new("preactivations", "is given, but the plan was prepared to save none"));
            }
            (None, true) => return Err(ArgumentError::new("preactivations", "is missing: the plan saves them")),
        }
        for (argument, bias) in [("gate_bias", &self.gate_bias), ("up_bias", &self.up_bias)] {
            if let Some(elements) = bias.as_ref().map(&len).filter(|&elements| elements < n) {
                return Err(ArgumentError::new(argument, format!("has {elements} elements, expected {n}")));
            }
        }
        let (rows, cols) = spec.layout.shape(n, k.div_ceil(spec.dtype.weights().numbers() as usize));
        match (&self.weights, spec.layout.is_packed()) {
            (Weights::Packed(packed), true) => {
                packed.check("weights", rows, cols, len(&packed.data))?;
                let half = spec.layout.second_half(n, packed.row_stride).unwrap_or(0);
                let (gate, up) = match spec.gate_order {
                    GateOrder::GateFirst => (0, half),
                    GateOrder::UpFirst => (half, 0),
                };
                Ok(WeightOffsets { gate, gate_stride: packed.row_stride, up, up_stride: packed.row_stride })
            }
            (Weights::Separate { gate, up }, false) => {
                gate.check("gate", rows, cols, len(&gate.data))?;
                up.check("up", rows, cols, len(&up.data))?;
                Ok(WeightOffsets { gate: 0, gate_stride: gate.row_stride, up: 0, up_stride: up.row_stride })
            }
            (Weights::Packed(_), false) => Err(ArgumentError::new(
                "weights",
                format!("is one packed matrix, the plan's layout `{}` has two", spec.layout),
            )),
            (Weights::Separate { .. }, true) => Err(ArgumentError::new(
                "weights",
                format!("is two matrices, the plan's layout `{}` is packed in one", spec.layout),
            )),
        }
    }
}
