//! Launches on torch's stream, in torch's context.
//!
//! Contract: Python has checked every tensor (number format, shape, device) and keeps it alive over the call; torch's
//! allocator reuses freed memory in stream order, so that a tensor may go before its launch has finished.
#![allow(unsafe_code, reason = "stream handles and addresses come from Python as integers")]

use crate::call::Call;
use crate::error::Failure;
use cudarc::driver::{DriverError, result, sys};
use std::ptr;
use swiglu_runtime::gpu::Gpu;
use swiglu_runtime::{Options, Plan, PrepareError, RawStep, Runtime, StepPlan, library, runtime};

/// A runtime on the primary context of GPU `ordinal`, which is the one that torch uses.
pub(crate) fn runtime(ordinal: u32, options: &Options) -> Result<Runtime, Failure> {
    let gpu = Gpu::open(ordinal as usize).map_err(PrepareError::from)?;
    Ok(Runtime::on_gpu(gpu, options, runtime::load_table(options))?)
}

/// Launches `call` on its stream; the caller's current device stays current.
pub(crate) fn launch(plan: &Plan, call: &Call) -> Result<(), Failure> {
    let raw = call.raw()?;
    call.check_overlap(plan.spec())?;
    let _restore = make_current(plan.gpu())?;
    // SAFETY: by the module's contract; the plan's context is current.
    Ok(unsafe { plan.launch_raw(call.stream as sys::CUstream, &raw) }?)
}

/// The same for a step, whose outputs Python has made for it, so that they overlap nothing.
pub(crate) fn launch_step(plan: &StepPlan, stream: u64, args: &RawStep) -> Result<(), Failure> {
    let _restore = make_current(plan.gpu())?;
    // SAFETY: by the module's contract; the plan's context is current.
    Ok(unsafe { plan.launch_raw(stream as sys::CUstream, args) }?)
}

fn make_current(gpu: &Gpu) -> Result<Option<Current>, Failure> {
    Current::set(gpu.context.cu_ctx()).map_err(Failure::driver("make the tensors' GPU current"))
}

/// An error while `stream` of GPU `ordinal` is captured: compiling and loading are illegal then.
pub(crate) fn refuse_capture(ordinal: u32, stream: u64) -> Result<(), Failure> {
    keep_current(|| {
        // The driver asks for a current context, and a thread of autograd may have none yet: opening makes it current.
        let _gpu = Gpu::open(ordinal as usize).map_err(PrepareError::from)?;
        // SAFETY: torch's current stream is live; 0 is the default stream.
        let status = unsafe { result::stream::is_capturing(stream as sys::CUstream) };
        match status.map_err(Failure::driver("tell whether a graph is captured"))? {
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => Ok(()),
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE
            | sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED => Err(Failure::Capturing),
        }
    })
}

/// Whether GPU `ordinal` is the one on which torch allocates in this thread, as far as the driver can tell.
pub(crate) fn is_current(ordinal: u32) -> Result<bool, Failure> {
    library::driver().map_err(|missing| PrepareError::from(swiglu_runtime::gpu::GpuError::from(missing)))?;
    let current = result::ctx::get_current().map_err(Failure::driver("tell the current context"))?;
    if current.is_none() {
        return Ok(ordinal == 0); // CUDA's runtime takes the first GPU in a thread that has chosen none
    }
    let mut device = 0;
    // SAFETY: a context is current, and the number is written in place.
    let status = unsafe { sys::cuCtxGetDevice(&raw mut device) };
    Ok(status == sys::CUresult::CUDA_SUCCESS && u32::try_from(device) == Ok(ordinal))
}

/// Runs `work`, which may change the current context, and restores it: torch reads its current device from there.
pub(crate) fn keep_current<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    library::driver().map_err(|missing| PrepareError::from(swiglu_runtime::gpu::GpuError::from(missing)))?;
    result::init().map_err(Failure::driver("start"))?;
    let before = result::ctx::get_current().map_err(Failure::driver("tell the current context"))?;
    let _restore = Current { before };
    work()
}

/// Makes the context before it current again when dropped.
struct Current {
    before: Option<sys::CUcontext>,
}

impl Current {
    /// Makes `context` current; nothing to restore where it was already.
    fn set(context: sys::CUcontext) -> Result<Option<Self>, DriverError> {
        let before = result::ctx::get_current()?;
        if before == Some(context) {
            return Ok(None);
        }
        // SAFETY: a plan holds the context, so it is live.
        unsafe { result::ctx::set_current(context) }?;
        Ok(Some(Self { before }))
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        // None, too, is put back: torch takes the device of a context that is current for the one that was chosen.
        // SAFETY: it was current on this thread a moment ago. An error would leave the other context current, which
        // the next call of torch's runtime corrects or reports.
        let _ = unsafe { result::ctx::set_current(self.before.unwrap_or(ptr::null_mut())) };
    }
}
