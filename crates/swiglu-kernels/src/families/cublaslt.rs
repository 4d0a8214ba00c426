//! `cublaslt`: NVIDIA's library for the GEMMs, and our own elementwise kernel behind them where the op has a gate. No source of
//! its own; the library is found at run time, and without it these configs do not serve.
//!
//! Design: `docs/kernels/cublaslt.md`. Implementation: `crates/swiglu-runtime/src/library_call.rs`.

use super::{Rejected, check_unscaled, ensure};
use crate::arch::ArchSpec;
use crate::problem::{DType, MAX_ACCESS_BYTES, Op, Problem};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A point of the `cublaslt` space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CublasltConfig {
    /// Rank among the algorithms that the library's heuristic proposes for the sizes of a launch; the last of them where it
    /// proposes fewer.
    pub algorithm: u32,
}

/// Algorithms that the library is asked for.
pub const ALGORITHMS: u32 = 8;
/// Ranks worth a try: the heuristic is seldom far off.
const TRIED: u32 = 5;

/// The launch of ours behind the library's GEMMs, if the op has one.
pub const fn behind(op: Op) -> Option<Op> {
    match op {
        Op::Forward | Op::ForwardSave | Op::ForwardStatic => Some(Op::Gate),
        Op::Dgated => Some(Op::GateBackward),
        Op::Gate
        | Op::GateBackward
        | Op::Down
        | Op::DownStatic
        | Op::DownInputGrad
        | Op::InputGrad
        | Op::WeightGrad
        | Op::WeightGradAdd
        | Op::DownWeightGrad
        | Op::DownWeightGradAdd
        | Op::BiasGrad
        | Op::BiasGradAdd
        | Op::DownBiasGrad
        | Op::DownBiasGradAdd => None,
    }
}

impl CublasltConfig {
    pub(super) fn check(&self, problem: &Problem, arch: &ArchSpec) -> Result<(), Rejected> {
        let &Self { algorithm } = self;
        ensure(algorithm < ALGORITHMS, "the library proposes at most 8 algorithms", || {
            format!("algorithm {algorithm}")
        })?;
        check_unscaled(problem)?;
        let is_wide = matches!(problem.dtype, DType::F32 | DType::Tf32);
        ensure(is_wide || behind(problem.op).is_none(), "what lies between two launches is fp32", || {
            format!("{} in {} would be rounded once more than its bar allows", problem.op, problem.dtype)
        })?;
        let old = matches!(problem.dtype, DType::F32 | DType::F16);
        ensure(old || arch.has_cp_async, "tf32 and bf16 need compute capability 8.0", || {
            format!("{arch} has neither")
        })?;
        // The sums of weight gradients are M long; of no tokens nothing is multiplied.
        let depth =
            if problem.op.is_forward() { problem.k } else { problem.with_m(1).product().map_or(0, |it| it.depth) };
        ensure(depth > 0, "the library needs sums of at least 1", || "their length is 0".into())?;
        // Seen on an H200: of bf16 at multiples of 2 bytes the sums are rounded before the bias is added, 2.15e-3.
        let least = if is_wide { problem.dtype.bytes() } else { MAX_ACCESS_BYTES };
        ensure(problem.alignment >= least, "elements are aligned, rows of 16 bits to 16 bytes", || {
            format!("{} at multiples of {}", problem.dtype, problem.alignment)
        })
    }
}

pub(super) fn space() -> impl Iterator<Item = CublasltConfig> {
    (0..TRIED).map(|algorithm| CublasltConfig { algorithm })
}

impl fmt::Display for CublasltConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cublaslt algorithm {}", self.algorithm)
    }
}
