//! A config that is no kernel of ours: the library's GEMMs, and our gate behind them where the op has one.
//!
//! Contract: memory of its own is allocated and freed in the order of the caller's stream. Design: `docs/kernels/cublaslt.md`.
#![allow(unsafe_code, reason = "hands the caller's addresses to the library")]

use crate::cublaslt::{CublasLt, CublasLtError, Gemm, Reductions};
use crate::gemm::{self, GemmAt, GemmShape, Gemms};
use crate::gpu::Kernel;
use crate::launch::{self, RawForward, Refusal};
use crate::scratch::Scratch;
use crate::step::{RawMatrix, RawStep};
use cudarc::driver::sys;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use swiglu_kernels::families::CublasltConfig;
use swiglu_kernels::problem::MAX_ACCESS_BYTES;
use swiglu_kernels::{Op, Problem};

/// Sizes whose algorithms are remembered; more than a program serves at a time.
const KNOWN: usize = 256;

/// The library prepared for one problem and every M. Kept by a [`Kernel`].
#[derive(Debug)]
pub(crate) struct LibraryCall {
    library: Arc<CublasLt>,
    /// Rank among the heuristic's algorithms.
    algorithm: usize,
    /// Our gate, or its backward.
    behind: Option<Kernel>,
    /// What the heuristic said, refusals too.
    known: RwLock<BTreeMap<GemmShape, Result<Arc<Gemm>, CublasLtError>>>,
}

impl LibraryCall {
    /// `behind` is the kernel of the op that [`behind`](swiglu_kernels::families::cublaslt::behind) names.
    pub(crate) fn new(library: &Arc<CublasLt>, config: CublasltConfig, behind: Option<Kernel>) -> Self {
        let algorithm = config.algorithm as usize;
        Self { library: Arc::clone(library), algorithm, behind, known: RwLock::default() }
    }

    /// Launches the forward on `stream`.
    ///
    /// # Safety
    /// As [`launch::forward`].
    pub(crate) unsafe fn forward(
        &self,
        problem: &Problem,
        stream: sys::CUstream,
        args: &RawForward,
    ) -> Result<(), Refusal> {
        let (sums, between) = if problem.op.saves_preactivations() {
            let gate = RawMatrix { address: args.saved_gate, stride: args.saved_gate_stride };
            ([gate, RawMatrix { address: args.saved_up, stride: args.saved_up_stride }], 0)
        } else {
            // In the order of the weights, so that one GEMM makes both.
            let (beside, bytes) = between(problem, args.m, 2);
            (if args.gate <= args.up { beside } else { [beside[1], beside[0]] }, bytes)
        };
        let gemms = gemm::of_forward(problem, args, sums).map_err(declined)?;
        let z = RawMatrix { address: args.z, stride: args.z_stride };
        let gate = |base: u64| RawStep {
            m: args.m,
            saved: sums.map(|half| RawMatrix { address: half.address + base, ..half }),
            out: [z, RawMatrix::default(), RawMatrix::default()],
            ..RawStep::default()
        };
        // SAFETY: by this function's own contract; what lies between has room for both halves.
        unsafe { self.launch(problem, stream, &gemms, between, gate) }
    }

    /// Launches a step of at least one token on `stream`.
    ///
    /// # Safety
    /// As [`launch::step`].
    pub(crate) unsafe fn step(&self, problem: &Problem, stream: sys::CUstream, args: &RawStep) -> Result<(), Refusal> {
        let ([dz, _], bytes) = if problem.op == Op::Dgated { between(problem, args.m, 1) } else { Default::default() };
        let first = if bytes > 0 { dz } else { args.out[0] };
        let gemm_args = RawStep { out: [first, args.out[1], args.out[2]], ..*args };
        let gemms = gemm::of_step(problem, &gemm_args).map_err(declined)?;
        let backward = |base: u64| RawStep {
            left: [RawMatrix { address: dz.address + base, ..dz }, RawMatrix::default()],
            ..*args
        };
        // SAFETY: by this function's own contract; what lies between has room for dz.
        unsafe { self.launch(problem, stream, &gemms, bytes, backward) }
    }

    /// The GEMMs, then what is behind them on the arguments that `behind` makes of where the `between` bytes lie. Outputs of the
    /// GEMMs count from there if there are any.
    ///
    /// # Safety
    /// As [`launch::step`], for the GEMMs and for what is behind them.
    unsafe fn launch(
        &self,
        problem: &Problem,
        stream: sys::CUstream,
        gemms: &Gemms,
        between: u64,
        behind: impl FnOnce(u64) -> RawStep,
    ) -> Result<(), Refusal> {
        let mut prepared: [Option<(GemmAt, Arc<Gemm>)>; 2] = [None, None];
        for (prepared, at) in prepared.iter_mut().zip(gemms).filter_map(|(slot, at)| Some((slot, at.as_ref()?))) {
            *prepared = Some((*at, self.gemm(problem, at).map_err(Refusal::Declined)?));
        }
        let rank = serving_rank(self.algorithm, gemms);
        let wanted = |(_, gemm): &(GemmAt, Arc<Gemm>)| gemm.workspace_bytes(rank) as u64;
        let workspace = prepared.iter().flatten().map(wanted).max().unwrap_or(0);
        let scratch = Scratch::new(stream, between.saturating_add(workspace)).map_err(Refusal::NoMemory)?;
        let base = if between > 0 { scratch.address } else { 0 };
        for (at, gemm) in prepared.iter().flatten() {
            let at = GemmAt { out: at.out + base, ..*at };
            // SAFETY: `gemm` was made for `at`; addresses by contract; the workspace follows what lies between.
            unsafe { self.library.run(gemm, rank, &at, scratch.address + between, stream) }?;
        }
        match &self.behind {
            // SAFETY: by this function's own contract.
            Some(kernel) => unsafe { launch::step(kernel, stream, &behind(base)) },
            None => Ok(()),
        }
    }

    /// The algorithms for the sizes of `at`: a lookup, but for the first time.
    fn gemm(&self, problem: &Problem, at: &GemmAt) -> Result<Arc<Gemm>, CublasLtError> {
        if !at.bias.is_multiple_of(problem.alignment.into()) {
            return Err(CublasLtError::Operands("the bias is aligned to less than its elements' neighbours"));
        }
        if let Some(known) = self.known.read().unwrap_or_else(PoisonError::into_inner).get(&at.shape) {
            return known.clone();
        }
        let found = self.library.gemm(problem, at, Reductions::Repeatable).map(Arc::new);
        // Memory may be there again at the next launch; what is not supported stays so.
        if found.as_ref().is_err_and(|why| !why.is_lasting()) {
            return found;
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= KNOWN {
            known.clear();
        }
        known.insert(at.shape, found.clone());
        found
    }
}

/// Rank of the algorithms that run. What was raced is one GEMM, of a pair that lies beside each other. Of two smaller ones its rank is
/// another algorithm, which nobody has timed: there the heuristic's own first choice serves.
fn serving_rank(raced: usize, gemms: &Gemms) -> usize {
    if gemms.iter().flatten().count() > 1 { 0 } else { raced }
}

fn declined(why: gemm::NoGemm) -> Refusal {
    Refusal::Declined(CublasLtError::Operands(why.0))
}

/// `count` matrices `[M, N]` beside each other, every row of every one well aligned, and their bytes: a multiple of 256.
fn between(problem: &Problem, m: u32, count: u64) -> ([RawMatrix; 2], u64) {
    let bytes = u64::from(problem.dtype.bytes());
    let row = (u64::from(problem.n) * bytes).next_multiple_of(MAX_ACCESS_BYTES.into());
    let stride = (count * row / bytes).cast_signed();
    let all = u64::from(m).saturating_mul(count * row);
    ([0, row].map(|address| RawMatrix { address, stride }), all.checked_next_multiple_of(256).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiglu_kernels::{DType, WeightMajor};

    #[test]
    fn what_lies_between_is_aligned_and_has_room() {
        let problem = Problem::forward(DType::F32, WeightMajor::K, 3, 5, 8);
        let (halves, bytes) = between(&problem, 3, 2);
        assert_eq!(halves, [0, 32].map(|address| RawMatrix { address, stride: 16 }));
        assert_eq!(bytes, 256);
        let even = Problem { n: 64, ..problem };
        let (halves, bytes) = between(&even, 100, 2);
        assert_eq!((halves[1].address, halves[1].stride, bytes), (256, 128, 2 * 64 * 4 * 100));
        let (dz, bytes) = between(&even, 100, 1);
        assert_eq!((dz[0].stride, bytes), (64, 64 * 4 * 100));
    }

    #[test]
    fn the_raced_rank_serves_the_gemm_that_was_raced() {
        let problem = Problem::forward(DType::Bf16, WeightMajor::K, 16, 64, 32).with_op(Op::WeightGrad);
        let matrix = |address, stride| RawMatrix { address, stride };
        let of = |second: u64| {
            let pair = [matrix(0x1000, 128), matrix(0x1000 + 64 * 2, 128)];
            let out = [matrix(0x9000, 32), matrix(second, 32), RawMatrix::default()];
            let args = RawStep {
                m: 16,
                left: pair,
                right: [matrix(0x5000, 32), RawMatrix::default()],
                out,
                ..RawStep::default()
            };
            serving_rank(4, &gemm::of_step(&problem, &args).unwrap())
        };
        assert_eq!(of(0x9000 + 64 * 32 * 2), 4, "packed weights: one GEMM");
        assert_eq!(of(0x2_0000), 0, "weights apart: two, which nobody has raced");
    }
}
