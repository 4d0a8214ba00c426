//! Device buffers between guards, and the helper kernels that fill and compare them.
#![allow(unsafe_code, reason = "launches the helper kernels of templates/support on raw addresses")]

use crate::race::Failure;
use cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, LaunchConfig, PushKernelArg,
};
use std::ffi::c_void;
use std::sync::Arc;
use swiglu_kernels::families::Raster;
use swiglu_kernels::problem::{OperandMajor, Paired};
use swiglu_kernels::{Problem, render};
use swiglu_runtime::cubin_cache::CubinCache;
use swiglu_runtime::gpu::{Gpu, GpuError};
use swiglu_runtime::launch::{self, KernelParams};
use swiglu_runtime::nvrtc::Nvrtc;
use swiglu_runtime::step::StepParams;
use swiglu_runtime::{PrepareError, RawForward, RawStep};

/// Bytes before and after every buffer that no kernel may touch.
const GUARD_BYTES: usize = 4096;
const GUARD_PATTERN: u16 = 0xa5a5;
/// NaN in bf16, fp16 and, twice, in fp32: an element that was not written cannot pass.
const POISON_PATTERN: u16 = 0x7fff;

/// What fp32 outputs hold before they are added to, twice the pattern: about a quarter.
const SUMS_PATTERN: u16 = 0x3e80;

/// A device buffer between two guards.
pub(crate) struct GuardedBuffer {
    _memory: CudaSlice<u8>,
    bytes: usize,
    address: u64,
}

impl GuardedBuffer {
    /// Device address of the first byte between the guards.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }
}

/// The helper kernels, on one stream.
pub(crate) struct Support {
    stream: Arc<CudaStream>,
    fill_x: CudaFunction,
    fill_weights: CudaFunction,
    fill_row_scales: CudaFunction,
    fill_group_scales: CudaFunction,
    fill_pattern: CudaFunction,
    oracle_forward: CudaFunction,
    check_guard: CudaFunction,
    compare: CudaFunction,
    compare_f32: CudaFunction,
    oracle_step: CudaFunction,
    read_once: CudaFunction,
    sm_count: u32,
    dependent_launch: bool,
    /// Four sums of every block of `compare`.
    partial: CudaSlice<f64>,
}

/// What a buffer is filled with.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fill {
    /// Normal numbers in the format of x.
    X,
    /// Weights: normal numbers; of int4 any code.
    Weights,
    /// fp32 scales.
    RowScales,
    /// Scales of int4's groups.
    GroupScales,
}

/// `Finish` of `templates/support/kernels.cu.tera`: what becomes of the sums of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finish {
    Add,
    GateBackward,
    Gate,
}

/// An output matrix that a kernel wrote.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OutputMatrix {
    pub(crate) address: u64,
    /// Elements from row to row.
    pub(crate) row_stride: i64,
    /// fp32 whatever the problem's number format is.
    pub(crate) f32: bool,
}

/// What `compare` found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Comparison {
    /// `‖out − ref‖ / ‖ref‖`.
    pub(crate) error: f64,
    /// The same for the reference rounded to the number format: what no kernel can avoid.
    pub(crate) rounding: f64,
    /// Root mean square of the reference.
    pub(crate) rms: f64,
    /// Elements that are off by more than their own limit, or not finite where the reference is.
    pub(crate) wrong: f64,
}

const COMPARE_BLOCKS: u32 = 1024;

impl Support {
    /// Compiles and loads the helpers for the number format and weight order of `problem`.
    pub(crate) fn load(
        gpu: &Gpu,
        nvrtc: &Nvrtc,
        cache: &CubinCache,
        stream: &Arc<CudaStream>,
        problem: &Problem,
    ) -> Result<Self, PrepareError> {
        let source = render::render_support(problem)?;
        let cubin = cache.get_or_compile(nvrtc, &source, gpu.arch)?;
        let fills = ["fill_x", "fill_weights", "fill_row_scales", "fill_group_scales", "fill_pattern"];
        let [fill_x, fill_weights, fill_row_scales, fill_group_scales, fill_pattern] = gpu.load(fills, &cubin)?;
        let checks = ["oracle_forward", "oracle_step", "check_guard", "compare", "compare_f32", "read_once"];
        let [oracle_forward, oracle_step, check_guard, compare, compare_f32, read_once] = gpu.load(checks, &cubin)?;
        let partial = stream
            .alloc_zeros::<f64>(4 * COMPARE_BLOCKS as usize)
            .map_err(|error| GpuError::Driver { act: "allocate memory", error })?;
        let stream = Arc::clone(stream);
        Ok(Self {
            stream,
            fill_x,
            fill_weights,
            fill_row_scales,
            fill_group_scales,
            fill_pattern,
            oracle_forward,
            check_guard,
            compare,
            compare_f32,
            oracle_step,
            read_once,
            sm_count: gpu.sm_count,
            dependent_launch: gpu.dependent_launch(),
            partial,
        })
    }

    /// A buffer of `bytes` (an even number) with its guards written.
    pub(crate) fn allocate(&self, bytes: usize) -> Result<GuardedBuffer, Failure> {
        // SAFETY: every byte is written before it is read: guards here, contents by `fill` or by a kernel.
        let memory = unsafe { self.stream.alloc::<u8>(bytes + 2 * GUARD_BYTES) };
        let memory =
            memory.map_err(|error| Failure::new("launch", format!("no device memory for {bytes} bytes: {error}")))?;
        let address = memory.device_ptr(&self.stream).0 + GUARD_BYTES as u64;
        let buffer = GuardedBuffer { _memory: memory, bytes, address };
        for start in [address - GUARD_BYTES as u64, address + bytes as u64] {
            self.pattern(start, GUARD_BYTES, GUARD_PATTERN)?;
        }
        Ok(buffer)
    }

    /// Random elements of `bytes` each, of the size that `scale` says.
    pub(crate) fn fill(
        &self,
        buffer: &GuardedBuffer,
        what: Fill,
        bytes: u32,
        seed: u64,
        scale: f32,
    ) -> Result<(), Failure> {
        let count = (buffer.bytes / bytes as usize) as u64;
        let fill = match what {
            Fill::X => &self.fill_x,
            Fill::Weights => &self.fill_weights,
            Fill::RowScales => &self.fill_row_scales,
            Fill::GroupScales => &self.fill_group_scales,
        };
        let mut launch = self.stream.launch_builder(fill);
        launch.arg(&buffer.address).arg(&count).arg(&seed).arg(&scale);
        // SAFETY: all four are `fill(Stored*, u64, u64, float)`; the buffer holds `count` elements of `bytes` each.
        unsafe { launch.launch(grid(4096)) }.map(drop).map_err(driver("fill a buffer"))
    }

    /// Poison everywhere between the guards.
    pub(crate) fn poison(&self, buffer: &GuardedBuffer) -> Result<(), Failure> {
        self.pattern(buffer.address, buffer.bytes, POISON_PATTERN)
    }

    /// What [`Support::oracle_step`] takes outputs that are added to for.
    pub(crate) fn prepare_sums(&self, buffer: &GuardedBuffer) -> Result<(), Failure> {
        self.pattern(buffer.address, buffer.bytes, SUMS_PATTERN)
    }

    fn pattern(&self, address: u64, bytes: usize, pattern: u16) -> Result<(), Failure> {
        let count = bytes as u64 / 2;
        let mut launch = self.stream.launch_builder(&self.fill_pattern);
        launch.arg(&address).arg(&count).arg(&pattern);
        // SAFETY: `fill_pattern(u16*, u64, u16)`; the range lies in one allocation.
        unsafe { launch.launch(grid(1024)) }.map(drop).map_err(driver("fill a buffer"))
    }

    /// Whether the guards of all `buffers` are as they were written.
    pub(crate) fn guards_intact(&self, buffers: &[&GuardedBuffer]) -> Result<bool, Failure> {
        let broken = self.stream.alloc_zeros::<i32>(1).map_err(driver("allocate a counter"))?;
        let count = (GUARD_BYTES / 2) as i32;
        for buffer in buffers {
            for guard in [buffer.address - GUARD_BYTES as u64, buffer.address + buffer.bytes as u64] {
                let mut launch = self.stream.launch_builder(&self.check_guard);
                launch.arg(&guard).arg(&count).arg(&GUARD_PATTERN).arg(&broken);
                // SAFETY: `check_guard(const u16*, int, u16, int*)`; the guard lies in the buffer's allocation.
                unsafe { launch.launch(grid(1)) }.map_err(driver("check a guard"))?;
            }
        }
        let broken = self.stream.clone_dtoh(&broken).map_err(driver("read the guards' state"))?;
        Ok(broken == [0])
    }

    /// The float64 oracle's outputs `[m, n]`, one after the other: z and, where the op saves them, gate and up.
    pub(crate) fn oracle(&self, problem: &Problem, args: &RawForward) -> Result<CudaSlice<f64>, Failure> {
        let elements = problem.op.outputs() as usize * problem.m as usize * problem.n as usize;
        // SAFETY: the oracle writes every element.
        let reference = unsafe { self.stream.alloc::<f64>(elements) }.map_err(driver("allocate the reference"))?;
        let too_large = || Failure::new("launch", "a size is beyond 32 bits");
        let params = KernelParams::new(problem, Raster::AlongM, 1, args).ok_or_else(too_large)?;
        let config = LaunchConfig {
            grid_dim: (problem.m.div_ceil(64) * problem.n.div_ceil(64), 1, 1),
            block_dim: (256, 1, 1),
            shared_mem_bytes: 0,
        };
        let mut launch = self.stream.launch_builder(&self.oracle_forward);
        launch.arg(&params).arg(&reference);
        // SAFETY: `oracle_forward(Params, double*)`; the operands hold the problem, the reference its outputs.
        unsafe { launch.launch(config) }.map_err(driver("run the oracle"))?;
        Ok(reference)
    }

    /// Room for `elements` of a reference.
    pub(crate) fn reference(&self, elements: usize) -> Result<CudaSlice<f64>, Failure> {
        // SAFETY: the oracle writes every element.
        unsafe { self.stream.alloc::<f64>(elements) }.map_err(driver("allocate the reference"))
    }

    /// The float64 oracle's output `half` of a step (of paired rows or columns), or all that `finish` makes of it.
    pub(crate) fn oracle_step(
        &self,
        problem: &Problem,
        args: &RawStep,
        half: usize,
        finish: Finish,
        reference: &mut CudaViewMut<'_, f64>,
    ) -> Result<(), Failure> {
        let too_large = || Failure::new("launch", "a size is beyond 32 bits");
        let params = StepParams::new(problem, Raster::AlongM, 1, args).ok_or_else(too_large)?;
        let (rows, cols) = problem.output();
        let product = problem.product();
        let outer = |major: Option<OperandMajor>| i32::from(major == Some(OperandMajor::Outer));
        let (left_outer, right_outer) = (outer(product.map(|it| it.left)), outer(product.map(|it| it.right)));
        let half = half as i32;
        let (pairs, left, right) = match product.map(|it| it.paired) {
            None => (0, 0, 0),
            Some(Paired::Nothing) => (1, 0, 0),
            Some(Paired::Depth) => (2, 0, 0),
            Some(Paired::Rows) => (1, half, 0),
            Some(Paired::Columns) => (1, 0, half),
        };
        let finish = finish as i32;
        let sums = u32::from(SUMS_PATTERN) << 16 | u32::from(SUMS_PATTERN);
        let before = if problem.op.accumulates() { f64::from(f32::from_bits(sums)) } else { 0.0 };
        let config = LaunchConfig {
            grid_dim: (rows.div_ceil(64) * cols.div_ceil(64), 1, 1),
            block_dim: (256, 1, 1),
            shared_mem_bytes: 0,
        };
        let mut launch = self.stream.launch_builder(&self.oracle_step);
        launch.arg(&params).arg(&left_outer).arg(&right_outer).arg(&pairs).arg(&left).arg(&right).arg(&finish);
        launch.arg(&before).arg(reference);
        // SAFETY: `oracle_step(StepParams, int x 6, double, double*)`; the operands hold the problem, the reference what
        // `finish` makes of one output.
        unsafe { launch.launch(config) }.map(drop).map_err(driver("run the oracle"))
    }

    /// Reads `buffer` once, with `per_sm` blocks a multiprocessor.
    pub(crate) fn read_once(&self, buffer: &GuardedBuffer, per_sm: u32) -> Result<(), Failure> {
        let (mut count, mut address, mut sink) = (buffer.bytes as u64 / 16, buffer.address, 0u64);
        let geometry = launch::Geometry {
            blocks: per_sm * self.sm_count,
            threads: 512,
            smem_bytes: 0,
            cluster: 1,
            dependent: self.dependent_launch,
        };
        let mut arguments =
            [(&raw mut address).cast::<c_void>(), (&raw mut count).cast(), (&raw mut sink).cast::<c_void>()];
        // SAFETY: `read_once(const Vector*, u64, u32*)`; the buffer holds `count` pieces; there is no sink.
        let launched = unsafe { launch::entry(&self.read_once, &geometry, self.stream.cu_stream(), &mut arguments) };
        launched.map_err(driver("launch the reader"))
    }

    /// Holds an output to its reference; `rms` of the reference is 0 when it is not known yet.
    pub(crate) fn compare(
        &self,
        problem: &Problem,
        output: &OutputMatrix,
        reference: &CudaView<'_, f64>,
        rms: f64,
    ) -> Result<Comparison, Failure> {
        let int = |size: u32| i32::try_from(size).unwrap_or(i32::MAX);
        let (rows, cols) = problem.output();
        let (m, n) = (int(rows), int(cols));
        // One element may be off by 16 times what all may be in the mean: rounding never is, a wrong tile always.
        let limit = 16.0 * problem.dtype.tolerance();
        let mut launch = self.stream.launch_builder(if output.f32 { &self.compare_f32 } else { &self.compare });
        launch
            .arg(&output.address)
            .arg(&output.row_stride)
            .arg(reference)
            .arg(&m)
            .arg(&n)
            .arg(&limit)
            .arg(&rms)
            .arg(&self.partial);
        // SAFETY: `compare(const Element*, i64, const double*, int, int, double, double, double*)`.
        unsafe { launch.launch(grid(COMPARE_BLOCKS)) }.map_err(driver("compare"))?;
        let partial = self.stream.clone_dtoh(&self.partial).map_err(driver("read the comparison"))?;
        let sum = |which: usize| partial.iter().skip(which).step_by(4).sum::<f64>();
        let norm = sum(1);
        let relative = |difference: f64| if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() };
        let rms = (norm / (f64::from(m) * f64::from(n))).sqrt();
        Ok(Comparison { error: relative(sum(0)), rounding: relative(sum(2)), rms, wrong: sum(3) })
    }
}

fn grid(blocks: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 }
}

/// A driver error while doing `act`.
pub(crate) fn driver(act: &'static str) -> impl FnOnce(cudarc::driver::DriverError) -> Failure {
    move |error| Failure::new("launch", format!("the driver failed to {act}: {error}"))
}
