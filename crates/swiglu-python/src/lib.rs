//! `swiglu._native`: what `python/swiglu` calls. No libtorch: tensors cross as addresses, strides and a stream handle, or are
//! read by DLPack.
//!
//! Nothing of CUDA is touched before the first GPU plan is prepared, so the import needs none of it.

mod call;
mod cpu;
mod dlpack;
mod error;
mod gpu;
mod lie;
mod plans;
mod steps;
mod straight;

use crate::call::Call;
use crate::error::{Failure, guarded};
use crate::plans::{Device, Key, Plan, Prepared};
use crate::straight::{Layer, Torch};
use pyo3::prelude::*;
use std::fmt::Display;
use std::path::PathBuf;
use swiglu_kernels::WeightMajor;
use swiglu_runtime::{DType, ForwardSpec, GateOrder, RawForward, WeightLayout};

/// Tells where NVRTC lies unless `SWIGLU_NVRTC` says so; without effect once a GPU plan was prepared.
#[pyfunction]
fn set_nvrtc_folder(folder: PathBuf) {
    plans::set_nvrtc_folder(folder);
}

/// The largest size that [`prepare`] takes in this format.
#[pyfunction]
fn largest_size(dtype: &str) -> PyResult<u32> {
    Ok(swiglu_runtime::runtime::largest_size(number_format(dtype)?))
}

/// A plan for GPU `device`, or for the CPU where it is negative; it stores the pre-activations if `save`, and takes the weights
/// for static if `static_weights`. Compiles and loads what is missing.
#[pyfunction]
#[pyo3(signature = (device, dtype, layout, n, k, save = false, static_weights = false))]
#[allow(clippy::too_many_arguments, reason = "each is another part of the key")]
fn prepare(
    py: Python<'_>,
    device: i32,
    dtype: &str,
    layout: &str,
    n: u64,
    k: u64,
    save: bool,
    static_weights: bool,
) -> PyResult<NativePlan> {
    let key = key(device, dtype, layout, n, k, save, static_weights)?;
    Ok(NativePlan(py.detach(|| guarded(|| plans::get_or_prepare(key)))?))
}

/// Launches through the cached plan, which is prepared on first use: not while a CUDA graph is captured. True if it was.
/// Saves the pre-activations where addresses for them are given.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "one flat call costs Python less than any structure")]
fn forward(
    py: Python<'_>,
    device: i32,
    dtype: &str,
    layout: &str,
    n: u64,
    k: u64,
    stream: u64,
    m: u64,
    x: u64,
    x_stride: i64,
    gate: u64,
    gate_stride: i64,
    up: u64,
    up_stride: i64,
    gate_bias: u64,
    up_bias: u64,
    z: u64,
    z_stride: i64,
    saved_gate: u64,
    saved_gate_stride: i64,
    saved_up: u64,
    saved_up_stride: i64,
) -> PyResult<bool> {
    let save_preactivations = saved_gate != 0 || saved_up != 0;
    let key = key(device, dtype, layout, n, k, save_preactivations, false)?;
    let operands = RawForward {
        x,
        x_stride,
        gate,
        gate_stride,
        up,
        up_stride,
        gate_bias,
        up_bias,
        z,
        z_stride,
        saved_gate,
        saved_gate_stride,
        saved_up,
        saved_up_stride,
        ..RawForward::default()
    };
    let call = Call { stream, m, operands };
    let (plan, is_new) = plan_of(py, key, stream)?;
    run(py, &plan, &call).map(|()| is_new)
}

/// The cached plan, prepared now if there is none, which is then told: not while a CUDA graph is captured on `stream`.
fn plan_of<K: Prepared>(py: Python<'_>, key: K, stream: u64) -> PyResult<(K::Plan, bool)> {
    if let Some(plan) = plans::get(&key) {
        return Ok((plan, false));
    }
    let prepare = || {
        if let Device::Gpu(ordinal) = key.device() {
            gpu::refuse_capture(ordinal, stream)?;
        }
        plans::get_or_prepare(key)
    };
    Ok((py.detach(|| guarded(prepare))?, true))
}

/// A prepared forward.
#[pyclass(frozen, name = "Plan", module = "swiglu._native")]
struct NativePlan(Plan);

#[pymethods]
impl NativePlan {
    /// Launches for `m` tokens; every argument but the counts is an address or a stride in elements.
    #[allow(clippy::too_many_arguments, reason = "one flat call costs Python less than any structure")]
    fn launch(
        &self,
        py: Python<'_>,
        stream: u64,
        m: u64,
        x: u64,
        x_stride: i64,
        gate: u64,
        gate_stride: i64,
        up: u64,
        up_stride: i64,
        gate_bias: u64,
        up_bias: u64,
        z: u64,
        z_stride: i64,
    ) -> PyResult<()> {
        let operands = RawForward {
            x,
            x_stride,
            gate,
            gate_stride,
            up,
            up_stride,
            gate_bias,
            up_bias,
            z,
            z_stride,
            ..RawForward::default()
        };
        let call = Call { stream, m, operands };
        run(py, &self.0, &call)
    }

    /// How near to `m` tokens was tuned what serves them: "exact", "nearest M", ... The CPU needs no tuning.
    fn matched(&self, m: u64) -> String {
        match &self.0 {
            Plan::Gpu(plan) => plan.choice(u32::try_from(m).unwrap_or(u32::MAX)).matched.to_string(),
            Plan::Cpu(_) => "exact".to_owned(),
        }
    }

    /// The config that serves `m` well aligned tokens, in the tuner's words, and how it was found.
    fn config(&self, m: u64) -> String {
        let m = u32::try_from(m).unwrap_or(u32::MAX);
        match &self.0 {
            Plan::Gpu(plan) => {
                let choice = plan.choice(m);
                format!("{} ({:?})", choice.config, choice.matched)
            }
            Plan::Cpu(plan) => {
                let config = plan.config_for(m);
                format!("cpu: blocks of {}x{}, {} threads", config.block_m, config.block_n, config.threads)
            }
        }
    }
}

/// A GPU launch only enqueues, so it keeps the interpreter; the CPU's work lets other threads run.
fn run(py: Python<'_>, plan: &Plan, call: &Call) -> PyResult<()> {
    match plan {
        Plan::Gpu(plan) => guarded(|| gpu::launch(plan, call)),
        Plan::Cpu(plan) => py.detach(|| guarded(|| cpu::launch(plan, call))),
    }
}

fn key(
    device: i32,
    dtype: &str,
    layout: &str,
    n: u64,
    k: u64,
    save_preactivations: bool,
    static_weights: bool,
) -> Result<Key, Failure> {
    let layout: WeightLayout = layout.parse().map_err(unknown("layout"))?;
    let device = u32::try_from(device).map_or(Device::Cpu, Device::Gpu);
    let (n, k) = (size("n", n)?, size("k", k)?);
    Ok(forward_key(device, number_format(dtype)?, layout.major(), n, k, save_preactivations, static_weights))
}

fn forward_key(
    device: Device,
    dtype: DType,
    major: WeightMajor,
    n: u32,
    k: u32,
    save_preactivations: bool,
    static_weights: bool,
) -> Key {
    // The halves of a packed weight come as two matrices, of which Python says which is the gate.
    let layout = match major {
        WeightMajor::K => WeightLayout::SeparateNk,
        WeightMajor::N => WeightLayout::SeparateKn,
    };
    // The CPU reads weights when it computes.
    let static_weights = static_weights && device != Device::Cpu;
    let spec =
        ForwardSpec { dtype, layout, gate_order: GateOrder::GateFirst, n, k, save_preactivations, static_weights };
    Key { device, spec }
}

fn number_format(word: &str) -> Result<DType, Failure> {
    let dtype: DType = word.parse().map_err(unknown("dtype"))?;
    if dtype.is_scaled() {
        return Err(Failure::argument("dtype", format!("{dtype} has scales, which this operation does not take")));
    }
    Ok(dtype)
}

fn size(argument: &'static str, value: u64) -> Result<u32, Failure> {
    u32::try_from(value).map_err(|_| Failure::argument(argument, format!("is {value}, which is too large")))
}

fn unknown<E: Display>(argument: &'static str) -> impl FnOnce(E) -> Failure {
    move |error| Failure::argument(argument, error.to_string())
}

#[pymodule(name = "_native")]
fn native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<NativePlan>()?;
    module.add_class::<Torch>()?;
    module.add_class::<Layer>()?;
    module.add_function(wrap_pyfunction!(set_nvrtc_folder, module)?)?;
    module.add_function(wrap_pyfunction!(largest_size, module)?)?;
    module.add_function(wrap_pyfunction!(prepare, module)?)?;
    module.add_function(wrap_pyfunction!(forward, module)?)?;
    steps::add_to(module)
}
