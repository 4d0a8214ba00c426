//! The peers of the steps: the library's GEMM, followed by the gate's backward for `dgated`; a copy where there is no GEMM.
#![allow(unsafe_code, reason = "hands the arena's addresses to the library and to kernels")]

use crate::arena::Arena;
use crate::bench::library::{LibraryGemm, only};
use crate::bench::{as_error, fastest, interleave, kernels_of};
use crate::device_memory::GuardedBuffer;
use crate::gpu_subject::{GpuLab, Stopwatch};
use crate::race::Failure;
use anyhow::Result;
use cudarc::driver::sys;
use swiglu_kernels::Op;
use swiglu_runtime::gemm::{self, GemmAt};
use swiglu_runtime::gpu::Kernel;
use swiglu_runtime::{RawMatrix, RawStep, launch};

/// Times of ours, of the peer's first launch, of all of its launches and of a copy of as many bytes, in microseconds.
pub(crate) fn race(
    lab: &GpuLab,
    arena: &Arena,
    watch: &Stopwatch<'_>,
    ours: impl Fn(usize) -> Result<(), Failure>,
    rounds: usize,
) -> Result<[Vec<f64>; 4]> {
    let problem = arena.problem;
    let sets = copied(arena).map_err(|failure| as_error(&failure))?;
    let copy = |index: usize| copy(lab, &sets[index % sets.len()]);
    if problem.op.is_column_sum() || problem.product().is_none() {
        let timed = interleave(watch, [&ours, &copy], rounds).map_err(|failure| as_error(&failure))?;
        let [ours, copied] = timed;
        return Ok([ours, copied.clone(), copied.clone(), copied]);
    }
    // dz of the peer of dgated, one per set.
    let dz: Vec<GuardedBuffer> = if problem.op == Op::Dgated {
        let bytes = problem.m as usize * problem.n as usize * problem.dtype.bytes() as usize;
        let all: Result<_, Failure> = (0..arena.set_count()).map(|_| arena.support.allocate(bytes)).collect();
        all.map_err(|failure| as_error(&failure))?
    } else {
        Vec::new()
    };
    let at = |index: usize| -> Result<GemmAt, Failure> {
        let mut args = arena.step(index);
        if let Some(dz) = dz.get(index % dz.len().max(1)) {
            args.out[0] = RawMatrix { address: dz.address(), stride: problem.n.into() };
        }
        only(gemm::of_step(&problem, &args))
    };
    let gemm = LibraryGemm::new(lab, &problem, &at(0).map_err(|failure| as_error(&failure))?)?;
    let launch_gemm = |algorithm: usize, index: usize| {
        // SAFETY: the arena's buffers hold the operands, pairs packed in one; `dz` holds [m, n]; all outlive the work.
        unsafe { gemm.launch(algorithm, &at(index)?) }
    };
    let backward = problem.with_op(Op::GateBackward);
    let backwards = if problem.op == Op::Dgated { kernels_of(lab, &backward)? } else { Vec::new() };
    let timed = || {
        let algorithm = fastest(watch, gemm.algorithms(), |&algorithm, index| launch_gemm(algorithm, index))?;
        let alone = |index: usize| launch_gemm(algorithm, index);
        let launch_backward = |kernel: &Kernel, index: usize| {
            let Some(dz) = dz.get(index % dz.len().max(1)) else { return Ok(()) };
            let dz = RawMatrix { address: dz.address(), stride: problem.n.into() };
            let args = RawStep { left: [dz, RawMatrix::default()], ..arena.step(index) };
            // SAFETY: the arena's buffers hold the pre-activations and the outputs, `dz` its matrix; all outlive the work.
            let launched = unsafe { launch::step(kernel, lab.stream.cu_stream(), &args) };
            launched.map_err(|error| Failure::new("launch", error))
        };
        let fastest_backward = match backwards.as_slice() {
            [] => None,
            all => Some(fastest(watch, all.iter(), |kernel, index| launch_backward(kernel, index))?),
        };
        let both = |index: usize| {
            launch_gemm(algorithm, index)?;
            fastest_backward.map_or(Ok(()), |kernel| launch_backward(kernel, index))
        };
        interleave(watch, [&ours, &alone, &both, &copy], rounds)
    };
    timed().map_err(|failure| as_error(&failure))
}

/// From where to where a copy of half the bytes reads and writes as many as the step.
type Copied = (GuardedBuffer, GuardedBuffer, usize);

fn copied(arena: &Arena) -> Result<Vec<Copied>, Failure> {
    let bytes = (arena.problem.bytes() / 4.0) as usize * 2;
    let set = |_| Ok((arena.support.allocate(bytes)?, arena.support.allocate(bytes)?, bytes));
    (0..arena.set_count()).map(set).collect()
}

fn copy(lab: &GpuLab, (from, to, bytes): &Copied) -> Result<(), Failure> {
    // SAFETY: both buffers hold the bytes and outlive the work.
    let status = unsafe { sys::cuMemcpyDtoDAsync_v2(to.address(), from.address(), *bytes, lab.stream.cu_stream()) };
    status.result().map_err(|error| Failure::new("launch", error))
}
