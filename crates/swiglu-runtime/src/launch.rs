//! The launch itself: no lock, no allocation, no string, but for what `split.rs` and `library_call.rs` put ahead of it.
//!
//! Contract: `KernelParams` mirrors `Params` in `templates/shared/params.cuh`; the caller vouches for pointers.
#![allow(unsafe_code, reason = "hands raw device pointers to the driver")]

use crate::cublaslt::CublasLtError;
use crate::gpu::{Code, Function, Kernel};
use crate::split::Split;
use crate::step::{Named, RawMatrix, RawStep, StepParams, alignment_of_all, missing};
use crate::tensor_map::{self, BoxedMatrix};
use cudarc::driver::{CudaFunction, DeviceRepr, DriverError, sys};
use std::ffi::c_void;
use swiglu_kernels::families::{Raster, Staging, WgmmaTmaConfig, wgmma_tma};
use swiglu_kernels::{Config, DType, Format, Problem};

/// Scales of the scaled formats, without types; all 0 for the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawScales {
    /// e4m3 x: device address of fp32 `[M]`, or of one for all rows.
    pub x: u64,
    /// e4m3 weights: device address of fp32 `[N]`, or of one for all columns. int4: of `[ceil(K / 128), N]` in z's format.
    pub gate: u64,
    /// Like `gate`.
    pub up: u64,
    /// int4: elements from group to group.
    pub stride: i64,
    /// Whether each row of x has its own.
    pub x_rows: bool,
    /// Whether each column of z has its own; for e4m3 weights.
    pub weight_rows: bool,
}

impl RawScales {
    /// The first scale that `dtype` has and that has no address.
    pub(crate) fn missing(&self, dtype: DType) -> Option<&'static str> {
        missing([
            ("scales.x", self.x, dtype.x() == Format::E4m3),
            ("scales.gate", self.gate, dtype.is_scaled()),
            ("scales.up", self.up, dtype.is_scaled()),
        ])
    }
}

/// Addresses and strides of one forward launch, without types. Strides are in stored elements ([`Format`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawForward {
    /// Tokens: rows of x and z.
    pub m: u32,
    /// Device address of x `[M, K]`.
    pub x: u64,
    /// Elements from row to row of x.
    pub x_stride: i64,
    /// Device address of the gate weights, in the plan's weight order.
    pub gate: u64,
    /// Elements from row to row of the gate weights.
    pub gate_stride: i64,
    /// Device address of the up weights.
    pub up: u64,
    /// Elements from row to row of the up weights.
    pub up_stride: i64,
    /// Device address of the gate bias `[N]`, or 0.
    pub gate_bias: u64,
    /// Device address of the up bias `[N]`, or 0.
    pub up_bias: u64,
    /// Device address of z `[M, N]`.
    pub z: u64,
    /// Elements from row to row of z.
    pub z_stride: i64,
    /// Device address of the gate's pre-activation `[M, N]`; 0 where the plan saves none.
    pub saved_gate: u64,
    /// Elements from row to row of it.
    pub saved_gate_stride: i64,
    /// Device address of the up pre-activation `[M, N]`; 0 where the plan saves none.
    pub saved_up: u64,
    /// Elements from row to row of it.
    pub saved_up_stride: i64,
    /// Scales of the scaled formats.
    pub scales: RawScales,
}

impl RawForward {
    /// What has to be aligned: scales are read one by one, but for those of int4.
    pub(crate) fn operands(&self, dtype: DType) -> [Named; 8] {
        let groups = dtype.weights() == Format::Int4;
        let operand =
            |argument, address, stride, format: Format| (argument, RawMatrix { address, stride }, format.bytes());
        let scales = |argument, address: u64| {
            operand(argument, if groups { address } else { 0 }, self.scales.stride, dtype.output())
        };
        [
            operand("x", self.x, self.x_stride, dtype.x()),
            operand("gate", self.gate, self.gate_stride, dtype.weights()),
            operand("up", self.up, self.up_stride, dtype.weights()),
            operand("z", self.z, self.z_stride, dtype.output()),
            operand("saved_gate", self.saved_gate, self.saved_gate_stride, dtype.output()),
            operand("saved_up", self.saved_up, self.saved_up_stride, dtype.output()),
            scales("scales.gate", self.scales.gate),
            scales("scales.up", self.scales.up),
        ]
    }

    /// Largest power of two, at most 16, that divides every address and row stride in bytes.
    pub(crate) fn alignment(&self, dtype: DType) -> u32 {
        alignment_of_all(self.operands(dtype))
    }
}

/// `Params` of `templates/shared/params.cuh`, as every forward kernel and the tuner's oracle take them.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct KernelParams {
    x: u64,
    gate: u64,
    up: u64,
    gate_bias: u64,
    up_bias: u64,
    z: u64,
    saved_gate: u64,
    saved_up: u64,
    x_stride: i64,
    gate_stride: i64,
    up_stride: i64,
    z_stride: i64,
    saved_gate_stride: i64,
    saved_up_stride: i64,
    m: i32,
    n: i32,
    k: i32,
    raster_along_n: i32,
    raster_group: i32,
    are_weights_passing: u16,
    is_z_passing: u16,
    x_scale: u64,
    gate_scale: u64,
    up_scale: u64,
    scale_stride: i64,
    x_row_scales: i32,
    weight_row_scales: i32,
}

impl KernelParams {
    /// `None` when a size does not fit in 32 bits with a sign.
    pub fn new(problem: &Problem, raster: Raster, raster_group: u32, args: &RawForward) -> Option<Self> {
        let int = |value: u32| i32::try_from(value).ok();
        let (weights_pass, z_passes) = wgmma_tma::passing(problem, raster, args.m);
        Some(Self {
            x: args.x,
            gate: args.gate,
            up: args.up,
            gate_bias: args.gate_bias,
            up_bias: args.up_bias,
            z: args.z,
            saved_gate: args.saved_gate,
            saved_up: args.saved_up,
            x_stride: args.x_stride,
            gate_stride: args.gate_stride,
            up_stride: args.up_stride,
            z_stride: args.z_stride,
            saved_gate_stride: args.saved_gate_stride,
            saved_up_stride: args.saved_up_stride,
            m: int(args.m)?,
            n: int(problem.n)?,
            k: int(problem.k)?,
            raster_along_n: i32::from(raster.is_along_n()),
            raster_group: int(raster_group)?,
            are_weights_passing: u16::from(weights_pass),
            is_z_passing: u16::from(z_passes),
            x_scale: args.scales.x,
            gate_scale: args.scales.gate,
            up_scale: args.scales.up,
            scale_stride: args.scales.stride,
            x_row_scales: i32::from(args.scales.x_rows),
            weight_row_scales: i32::from(args.scales.weight_rows),
        })
    }
}

// SAFETY: plain integers in C layout.
unsafe impl DeviceRepr for KernelParams {}

/// Why nothing, or not all, was launched.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The driver's report.
    #[error("the CUDA driver refused the launch: {0}")]
    Driver(#[from] DriverError),
    /// The library does not take these operands. Nothing was launched; a kernel of ours can be.
    #[error(transparent)]
    Declined(CublasLtError),
    /// There is no memory for what lies between its launches. Nothing was launched; a kernel that needs none can be.
    #[error("no device memory for what lies between two launches: {0}")]
    NoMemory(DriverError),
    /// The library failed.
    #[error(transparent)]
    Library(#[from] CublasLtError),
}

/// Launches `kernel` on `stream`; `m` and `n` are positive.
///
/// # Errors
/// The refusal of the driver or the library.
///
/// # Safety
/// Every address is of device memory of the kernel's GPU that holds its whole matrix in the kernel's number
/// format and stays allocated until the launch has finished; the outputs overlap no other operand; addresses and strides
/// are multiples of the config's `access_bytes`; `stream` is live and of the kernel's context, which
/// is current on this thread.
pub unsafe fn forward(kernel: &Kernel, stream: sys::CUstream, args: &RawForward) -> Result<(), Refusal> {
    match &kernel.code {
        // SAFETY: by this function's own contract.
        Code::Function(function) => match &function.prologue {
            // SAFETY: by this function's own contract.
            Some(prologue) => unsafe { forward_in_parts(kernel, function, prologue, stream, args) },
            // SAFETY: as above.
            None => Ok(unsafe { forward_function(kernel, function, stream, args) }?),
        },
        // SAFETY: as above.
        Code::Library(call) => unsafe { call.forward(&kernel.problem, stream, args) },
    }
}

/// # Safety
/// As [`forward`].
unsafe fn forward_function(
    kernel: &Kernel,
    function: &Function,
    stream: sys::CUstream,
    args: &RawForward,
) -> Result<(), DriverError> {
    let (problem, shape) = (&kernel.problem, &function.shape);
    let params = KernelParams::new(problem, shape.raster, shape.raster_group, args);
    let mut params = params.ok_or_else(invalid)?;
    let params = (&raw mut params).cast::<c_void>();
    let pointer = |map: &mut sys::CUtensorMap| std::ptr::from_mut(map).cast::<c_void>();
    match &kernel.config {
        Config::WgmmaTma(config) => {
            let maps = tensor_map::of_wgmma_tma(config, problem, args);
            // SAFETY: by this function's own contract.
            unsafe { wgmma_tma(config, problem, function, stream, args, &maps, params) }
        }
        Config::WgmmaStream(config) => {
            let mut maps = tensor_map::encode(&tensor_map::of_wgmma_stream(config, problem, args))?;
            let [x, gate, up] = maps.each_mut().map(pointer);
            // SAFETY: the kernel takes three tensor maps and a `Params` by value, all alive here; addresses by contract.
            unsafe { launch(problem, function, stream, args.m, &mut [x, gate, up, params]) }
        }
        Config::WeightOnlyTma(config) => {
            let mut maps = tensor_map::encode(&tensor_map::of_weight_only_tma(config, problem, args))?;
            let [x, gate, up] = maps.each_mut().map(pointer);
            if problem.dtype.weights() == Format::Int4 {
                let mut scales = tensor_map::encode(&tensor_map::of_int4_scales(config, problem, args))?;
                let scales = scales.as_mut_ptr().cast::<c_void>();
                // SAFETY: the kernel takes three tensor maps, an array of two and a `Params` by value, all alive here;
                // addresses by contract.
                unsafe { launch(problem, function, stream, args.m, &mut [x, gate, up, scales, params]) }
            } else {
                // SAFETY: the kernel takes three tensor maps and a `Params` by value, all alive here; addresses by contract.
                unsafe { launch(problem, function, stream, args.m, &mut [x, gate, up, params]) }
            }
        }
        Config::MmaSync(config) if config.staging == Staging::Tma => {
            let mut maps = tensor_map::encode(&tensor_map::of_mma_sync(config, problem, args))?;
            let [x, gate, up] = maps.each_mut().map(pointer);
            // SAFETY: the kernel takes three tensor maps and a `Params` by value, all alive here; addresses by contract.
            unsafe { launch(problem, function, stream, args.m, &mut [x, gate, up, params]) }
        }
        Config::Simt(_) | Config::MmaDirect(_) | Config::MmaSync(_) => {
            // SAFETY: the kernel takes one `Params` by value, alive here; addresses by contract.
            unsafe { launch(problem, function, stream, args.m, &mut [params]) }
        }
        Config::Elementwise(_)
        | Config::ColumnSum(_)
        | Config::SimtGemm(_)
        | Config::MmaGemm(_)
        | Config::WgmmaGemm(_)
        | Config::Cublaslt(_)
        | Config::Cpu(_) => Err(invalid()),
    }
}

/// Operands cut in two by `prologue`, in memory in the order of the stream, then the kernel on the parts.
///
/// # Safety
/// As [`forward`].
unsafe fn forward_in_parts(
    kernel: &Kernel,
    function: &Function,
    prologue: &CudaFunction,
    stream: sys::CUstream,
    args: &RawForward,
) -> Result<(), Refusal> {
    let (problem, shape) = (&kernel.problem, &function.shape);
    let Config::WgmmaTma(config) = &kernel.config else { return Err(invalid().into()) };
    // SAFETY: by this function's own contract.
    let split = unsafe { Split::of_forward(problem, args).launch(prologue, stream, function.dependent_launch) };
    let (split, _memory) = split?;
    let params = KernelParams::new(problem, shape.raster, shape.raster_group, &split.scaled(args));
    let mut params = params.ok_or_else(invalid)?;
    let (of_parts, parts) = split.forward(problem, args);
    let maps = tensor_map::of_wgmma_tma(config, &of_parts, &parts);
    let params = (&raw mut params).cast::<c_void>();
    // SAFETY: the parts hold the operands; the rest by this function's own contract.
    Ok(unsafe { wgmma_tma(config, problem, function, stream, args, &maps, params) }?)
}

/// # Safety
/// As [`forward`], for what `maps` describe; `params` points to a live [`KernelParams`].
unsafe fn wgmma_tma(
    config: &WgmmaTmaConfig,
    problem: &Problem,
    function: &Function,
    stream: sys::CUstream,
    args: &RawForward,
    maps: &[BoxedMatrix; 7],
    params: *mut c_void,
) -> Result<(), DriverError> {
    let mut maps = tensor_map::encode(maps)?;
    let first = maps.as_mut_ptr();
    // SAFETY: all four are among the seven maps; x, gate and up are each followed by their tails.
    let [x, gate, up, z] = [0, 2, 4, 6].map(|at| unsafe { first.add(at) }.cast::<c_void>());
    if problem.op.saves_preactivations() {
        let saved = tensor_map::of_preactivations(config, problem, args);
        let mut saved = tensor_map::encode(&saved)?;
        let saved = saved.as_mut_ptr().cast::<c_void>();
        // SAFETY: the kernel takes three pairs of tensor maps, one more, an array of two and a `Params` by value, all alive here;
        // addresses by contract.
        unsafe { launch(problem, function, stream, args.m, &mut [x, gate, up, z, saved, params]) }
    } else {
        // SAFETY: the kernel takes three pairs of tensor maps, one more and a `Params` by value, all alive here; addresses by contract.
        unsafe { launch(problem, function, stream, args.m, &mut [x, gate, up, z, params]) }
    }
}

/// Launches the kernel of a step on `stream`. Without tokens gradients of weights are zero, or nothing to add; all else is
/// empty.
///
/// # Errors
/// The refusal of the driver or the library.
///
/// # Safety
/// Every address is of device memory of the kernel's GPU that holds its whole matrix, in the number format that [`RawStep`]
/// says, and stays allocated until the launch has finished; the outputs overlap no other operand but where [`RawStep`] allows
/// it; addresses and strides are multiples of the config's `access_bytes`; `stream` is live and of the kernel's context, which
/// is current on this thread.
pub unsafe fn step(kernel: &Kernel, stream: sys::CUstream, args: &RawStep) -> Result<(), Refusal> {
    if args.m == 0 {
        // SAFETY: by this function's own contract.
        return Ok(unsafe { clear(&kernel.problem, stream, args) }?);
    }
    match &kernel.code {
        // SAFETY: by this function's own contract.
        Code::Function(function) => unsafe { step_function(kernel, function, stream, args) },
        // SAFETY: as above.
        Code::Library(call) => unsafe { call.step(&kernel.problem, stream, args) },
    }
}

/// # Safety
/// As [`step`].
unsafe fn step_function(
    kernel: &Kernel,
    function: &Function,
    stream: sys::CUstream,
    args: &RawStep,
) -> Result<(), Refusal> {
    let (problem, shape) = (&kernel.problem, &function.shape);
    let mut params = StepParams::new(problem, shape.raster, shape.raster_group, args).ok_or_else(invalid)?;
    let params = (&raw mut params).cast::<c_void>();
    match &kernel.config {
        Config::WgmmaGemm(config) => {
            let product = problem.with_m(args.m).product().ok_or_else(invalid)?;
            let Some(prologue) = &function.prologue else {
                let mut maps = tensor_map::encode(&tensor_map::of_wgmma_gemm(config, problem, &product, args))?;
                let maps = maps.as_mut_ptr().cast::<c_void>();
                // SAFETY: the kernel takes a struct of thirteen tensor maps and a `StepParams` by value, both alive here;
                // addresses by contract.
                return Ok(unsafe { launch(problem, function, stream, args.m, &mut [maps, params]) }?);
            };
            // SAFETY: by this function's own contract.
            let split = unsafe { Split::of_step(&product, args).launch(prologue, stream, function.dependent_launch) };
            let (split, _memory) = split?;
            let (product, parts) = split.step(&product, args);
            let mut maps = tensor_map::encode(&tensor_map::of_wgmma_gemm(config, problem, &product, &parts))?;
            let maps = maps.as_mut_ptr().cast::<c_void>();
            let mut scales = split.scales();
            let scales = (&raw mut scales).cast::<c_void>();
            // SAFETY: the kernel takes a struct of thirteen tensor maps, a `SplitScales` and a `StepParams` by value, all alive
            // here; the parts hold the operands; addresses by contract.
            Ok(unsafe { launch(problem, function, stream, args.m, &mut [maps, scales, params]) }?)
        }
        Config::Elementwise(_) | Config::ColumnSum(_) | Config::SimtGemm(_) | Config::MmaGemm(_) => {
            // SAFETY: the kernel takes one `StepParams` by value, alive here; addresses by contract.
            Ok(unsafe { launch(problem, function, stream, args.m, &mut [params]) }?)
        }
        Config::Simt(_)
        | Config::MmaDirect(_)
        | Config::WeightOnlyTma(_)
        | Config::MmaSync(_)
        | Config::WgmmaStream(_)
        | Config::WgmmaTma(_)
        | Config::Cublaslt(_)
        | Config::Cpu(_) => Err(invalid().into()),
    }
}

/// Writes the gradients of no tokens.
///
/// # Safety
/// As [`step`].
unsafe fn clear(problem: &Problem, stream: sys::CUstream, args: &RawStep) -> Result<(), DriverError> {
    let Some(product) = problem.with_m(0).product().filter(|product| product.depth == 0) else { return Ok(()) };
    if problem.op.accumulates() {
        return Ok(());
    }
    let bytes = u64::from(problem.dtype.bytes());
    let width = product.cols as usize * bytes as usize;
    for out in args.out.iter().take(product.outputs() as usize) {
        // One row may come without a stride, and the driver refuses a pitch of less than the width.
        let pitch = ((out.stride.unsigned_abs() * bytes) as usize).max(width);
        // SAFETY: the output holds `rows` rows of `cols` elements, `stride` apart, by contract.
        let status = unsafe { sys::cuMemsetD2D8Async(out.address, pitch, 0, width, product.rows as usize, stream) };
        status.result()?;
    }
    Ok(())
}

/// # Safety
/// `arguments` point to what the kernel takes, by value, in its order.
unsafe fn launch(
    problem: &Problem,
    function: &Function,
    stream: sys::CUstream,
    m: u32,
    arguments: &mut [*mut c_void],
) -> Result<(), DriverError> {
    let Function { function: entry_point, shape, dependent_launch, .. } = function;
    let geometry = Geometry {
        blocks: grid(problem, function, m).ok_or_else(invalid)?,
        threads: shape.threads,
        smem_bytes: shape.smem_bytes,
        cluster: shape.cluster,
        dependent: *dependent_launch,
    };
    // SAFETY: by this function's own contract.
    unsafe { entry(entry_point, &geometry, stream, arguments) }
}

/// Blocks of a launch, and how they stand to each other and to the launch before.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// Blocks.
    pub blocks: u32,
    /// Threads per block.
    pub threads: u32,
    /// Dynamic shared memory per block.
    pub smem_bytes: u32,
    /// Blocks per cluster; 1 needs no architecture that has them.
    pub cluster: u32,
    /// Whether blocks may start before the launch before has ended; where the driver can ([`Gpu::dependent_launch`]).
    ///
    /// [`Gpu::dependent_launch`]: crate::gpu::Gpu::dependent_launch
    pub dependent: bool,
}

/// Launches an entry on `stream`.
///
/// # Errors
/// The driver's refusal.
///
/// # Safety
/// `arguments` point to what the entry takes, by value, in its order, and what they hold is what it may work on until it has
/// finished; `stream` is live and of the entry's context, which is current on this thread.
pub unsafe fn entry(
    function: &CudaFunction,
    geometry: &Geometry,
    stream: sys::CUstream,
    arguments: &mut [*mut c_void],
) -> Result<(), DriverError> {
    let cluster = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: geometry.cluster, y: 1, z: 1 },
        },
    };
    let dependent = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    // A driver knows both attributes or has neither: they are of compute capability 9.0.
    let mut attributes = [dependent, cluster];
    let attributes = if geometry.dependent { &mut attributes[..] } else { &mut attributes[1..] };
    let count = attributes.len() - usize::from(geometry.cluster == 1);
    let config = sys::CUlaunchConfig {
        gridDimX: geometry.blocks,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: geometry.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: geometry.smem_bytes,
        hStream: stream,
        attrs: attributes.as_mut_ptr(),
        numAttrs: count as u32,
    };
    // SAFETY: config and attributes are alive; arguments by contract.
    let status = unsafe {
        sys::cuLaunchKernelEx(&raw const config, function.cu_function(), arguments.as_mut_ptr(), std::ptr::null_mut())
    };
    status.result()
}

/// Blocks: one per tile, or as many as fit where blocks walk over the tiles.
fn grid(problem: &Problem, function: &Function, m: u32) -> Option<u32> {
    let shape = &function.shape;
    let tiles = shape.tiles(&problem.with_m(m));
    let fit = u64::from((function.resident_blocks / shape.cluster).max(1));
    let clusters = if shape.per_sm.is_some() { tiles.min(fit) } else { tiles };
    i32::try_from(clusters * u64::from(shape.cluster)).ok().and_then(|blocks| u32::try_from(blocks).ok())
}

fn invalid() -> DriverError {
    DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::misaligned;
    use swiglu_kernels::WeightMajor;

    #[test]
    fn what_passes_through_l2_is_told_to_the_kernel_by_its_own_name() {
        let problem = |n, k| Problem::forward(DType::Bf16, WeightMajor::K, 1, n, k);
        let passing = |m, n, k| {
            let args = RawForward { m, ..RawForward::default() };
            let params = KernelParams::new(&problem(n, k), Raster::Resident, 16, &args).unwrap();
            (params.raster_along_n, params.are_weights_passing, params.is_z_passing)
        };
        assert_eq!(passing(64, 14336, 4096), (1, 1, 0));
        assert_eq!(passing(65536, 4096, 64), (1, 0, 1));
        let plain = KernelParams::new(&problem(14336, 4096), Raster::AlongM, 8, &RawForward::default()).unwrap();
        assert_eq!((plain.raster_along_n, plain.are_weights_passing, plain.is_z_passing), (0, 0, 0));
    }

    #[test]
    fn one_odd_address_or_stride_decides_the_alignment() {
        let aligned = RawForward {
            x: 256,
            gate: 512,
            up: 1024,
            z: 4096,
            x_stride: 64,
            gate_stride: 64,
            up_stride: 64,
            z_stride: 64,
            ..RawForward::default()
        };
        assert_eq!(aligned.alignment(DType::Bf16), 16);
        assert_eq!(RawForward { up: 1032, ..aligned }.alignment(DType::Bf16), 8);
        assert_eq!(RawForward { z_stride: 63, ..aligned }.alignment(DType::Bf16), 2);
        assert_eq!(RawForward { z_stride: 63, ..aligned }.alignment(DType::F32), 4);
        assert_eq!(RawForward { x_stride: 68, ..aligned }.alignment(DType::E4m3), 4);
        let scales = RawScales { gate: 36, ..RawScales::default() };
        assert_eq!(RawForward { scales, ..aligned }.alignment(DType::E4m3), 16);
        assert_eq!(RawForward { scales, ..aligned }.alignment(DType::Bf16Int4), 4);
    }

    #[test]
    fn the_first_odd_operand_is_named_and_no_stride_is_too_long() {
        let args = |x_stride| RawForward {
            m: 2,
            x: 256,
            gate: 512,
            up: 1024,
            z: 4096,
            x_stride,
            gate_stride: 64,
            up_stride: 64,
            z_stride: 40,
            ..RawForward::default()
        };
        assert_eq!(args(i64::MAX).alignment(DType::Bf16), 2);
        assert_eq!(misaligned(args(64).operands(DType::Bf16)), None);
        let odd = RawForward { gate_stride: 7, up: 1032, ..args(64) };
        assert_eq!(misaligned(odd.operands(DType::Bf16)), Some(("gate", 2)));
        let scales = RawScales { up: 36, ..RawScales::default() };
        let odd = RawForward { scales, ..args(64) };
        assert_eq!(misaligned(odd.operands(DType::Bf16Int4)), Some(("scales.up", 4)));
    }
}
