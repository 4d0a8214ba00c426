//! One GPU: what it is called, what decides its speed, how kernels are loaded on it.
#![allow(unsafe_code, reason = "asks the driver for its version; loads modules")]

use crate::cublaslt::CublasLt;
use crate::library::{self, MissingLibrary};
use crate::library_call::LibraryCall;
use crate::nvrtc::Cubin;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{CudaContext, CudaFunction, DriverError};
use cudarc::nvrtc::Ptx;
use std::sync::Arc;
use swiglu_db::Device;
use swiglu_kernels::arch::{self, UnknownArch};
use swiglu_kernels::families::cublaslt::behind;
use swiglu_kernels::families::{Family, LaunchShape, default_of};
use swiglu_kernels::render::{KernelSource, SharedSource};
use swiglu_kernels::{ArchSpec, Config, Problem, Rejected, Target};

/// Why a GPU cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// There is no driver.
    #[error(transparent)]
    Missing(#[from] MissingLibrary),
    /// A driver, but no GPU of that number.
    #[error("there is no GPU {ordinal}; the driver lists {count}")]
    NoDevice {
        /// The number asked for.
        ordinal: usize,
        /// How many there are.
        count: i32,
    },
    /// The driver refused.
    #[error("the CUDA driver failed to {act}: {error}")]
    Driver {
        /// What was being done.
        act: &'static str,
        /// Its report.
        error: DriverError,
    },
    /// A GPU older or newer than this project knows.
    #[error(transparent)]
    UnknownArch(#[from] UnknownArch),
}

pub(crate) fn failed(act: &'static str) -> impl FnOnce(DriverError) -> GpuError {
    move |error| GpuError::Driver { act, error }
}

/// A GPU, through a context that the caller may share.
#[derive(Debug, Clone)]
pub struct Gpu {
    /// The caller's context.
    pub context: Arc<CudaContext>,
    /// Architecture kernels are compiled for.
    pub arch: &'static ArchSpec,
    /// Identity in the tuning database.
    pub device: Device,
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Level-2 cache, bytes.
    pub l2_bytes: usize,
    /// Peak memory bandwidth by clock and bus width, bytes a second.
    pub peak_bandwidth: f64,
    /// Peak rate of the fp32 FMA units at the highest clock, operations a second.
    pub peak_fma_flops: f64,
    /// CUDA version of the driver, e.g. 13000.
    pub driver_version: i32,
}

/// Number of GPUs the driver lists.
///
/// # Errors
/// [`GpuError::Missing`] without a driver.
pub fn count() -> Result<usize, GpuError> {
    library::driver()?;
    match cudarc::driver::result::init() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        started => started.map_err(failed("start"))?,
    }
    let count = CudaContext::device_count().map_err(failed("count GPUs"))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

impl Gpu {
    /// GPU `ordinal` through its primary context, which other libraries of the process share.
    ///
    /// # Errors
    /// Without a driver, without that GPU, or for one this project does not know.
    pub fn open(ordinal: usize) -> Result<Self, GpuError> {
        let count = count()?;
        if ordinal >= count {
            return Err(GpuError::NoDevice { ordinal, count: i32::try_from(count).unwrap_or(i32::MAX) });
        }
        Self::from_context(CudaContext::new(ordinal).map_err(failed("open the GPU"))?)
    }

    /// The GPU behind the caller's context.
    ///
    /// # Errors
    /// When the driver does not answer, or for an architecture this project does not know.
    pub fn from_context(context: Arc<CudaContext>) -> Result<Self, GpuError> {
        let attribute = |which| -> Result<u64, GpuError> {
            let value = context.attribute(which).map_err(failed("read the GPU's properties"))?;
            Ok(u64::try_from(value).unwrap_or(0))
        };
        let (major, minor) = context.compute_capability().map_err(failed("read the GPU's properties"))?;
        let arch = arch::by_compute_capability(major.unsigned_abs(), minor.unsigned_abs())?;
        let sm_count = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let l2_bytes = attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?;
        let smem = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let bus_bits = attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
        let clock_khz = attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?;
        let memory_khz = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
        let name = context.name().map_err(failed("tell the GPU's name"))?;
        // What decides speed, and nothing that differs between two GPUs of one kind. A MIG slice differs in
        // multiprocessors and L2, so it is a class of its own.
        let class = format!(
            "{}-sm{sm_count}-l2_{}m-smem{}k-bus{bus_bits}-mem{}mhz",
            arch.name,
            l2_bytes >> 20,
            smem >> 10,
            memory_khz / 1000
        );
        let mut driver_version = 0;
        // SAFETY: the pointer is to a live integer; a context exists, so the driver is loaded.
        let status = unsafe { sys::cuDriverGetVersion(&raw mut driver_version) };
        status.result().map_err(failed("tell its version"))?;
        Ok(Self {
            arch,
            device: Device { class, name },
            sm_count: u32::try_from(sm_count).unwrap_or(1),
            l2_bytes: usize::try_from(l2_bytes).unwrap_or(0),
            // Double data rate: two transfers a clock.
            peak_bandwidth: 2.0 * memory_khz as f64 * 1e3 * bus_bits as f64 / 8.0,
            // 128 lanes a multiprocessor, 64 on the oldest: an upper bound.
            peak_fma_flops: 2.0 * 128.0 * sm_count as f64 * clock_khz as f64 * 1e3,
            driver_version,
            context,
        })
    }

    /// Whether a launch may begin before the one ahead of it in the stream has ended. Kernels wait for their predecessor
    /// from sm_90 on; graphs capture such launches since CUDA 12.3.
    pub fn dependent_launch(&self) -> bool {
        self.arch.has_tma && self.driver_version >= 12_030
    }

    /// Its address on the bus, by which NVML and other tools know it: `00000000:1b:00.0`.
    ///
    /// # Errors
    /// When the driver does not answer.
    pub fn pci_bus_id(&self) -> Result<String, GpuError> {
        let attribute = |which| self.context.attribute(which).map_err(failed("read the GPU's properties"));
        let domain = attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?;
        let bus = attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?;
        let device = attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?;
        Ok(format!("{domain:08x}:{bus:02x}:{device:02x}.0"))
    }

    /// Loads one image and finds several entries in it. Not during stream capture.
    ///
    /// # Errors
    /// When the driver refuses the image or an entry is not in it.
    pub fn load<const COUNT: usize>(
        &self,
        entries: [&str; COUNT],
        cubin: &Cubin,
    ) -> Result<[CudaFunction; COUNT], GpuError> {
        let module =
            self.context.load_module(Ptx::from_binary(cubin.image.clone())).map_err(failed("load a kernel"))?;
        let found: Result<Vec<_>, _> = entries.iter().map(|entry| module.load_function(entry)).collect();
        let found = found.map_err(failed("find a kernel's entry"))?;
        found.try_into().map_err(|_| GpuError::Driver {
            act: "find a kernel's entry",
            error: DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND),
        })
    }

    /// Loads the image of `source` and finds what is launched of it.
    ///
    /// # Errors
    /// As [`Gpu::load`].
    pub fn load_source(&self, source: &KernelSource, cubin: &Cubin) -> Result<Entries, GpuError> {
        match source.prologue {
            None => self.load([source.entry], cubin).map(|[function]| Entries { function, prologue: None }),
            Some(prologue) => self
                .load([source.entry, prologue], cubin)
                .map(|[function, prologue]| Entries { function, prologue: Some(prologue) }),
        }
    }

    /// Loads one image for all the configs that share its source.
    ///
    /// # Errors
    /// As [`Gpu::load`].
    pub fn load_configs(
        &self,
        shared: &SharedSource,
        cubin: &Cubin,
        problem: &Problem,
    ) -> Result<Vec<Kernel>, GpuError> {
        let entries = self.load_source(&shared.source, cubin)?;
        shared.configs.iter().map(|config| self.kernel(&entries, config, problem)).collect()
    }

    /// A loaded entry with the shared memory that `config` asks for.
    ///
    /// # Errors
    /// When the driver refuses it, or the config has no source.
    pub fn kernel(&self, entries: &Entries, config: &Config, problem: &Problem) -> Result<Kernel, GpuError> {
        let Entries { function, prologue } = entries;
        let shape = config.launch_shape(problem).ok_or(GpuError::Driver {
            act: "load a config without source",
            error: DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE),
        })?;
        let smem = i32::try_from(shape.smem_bytes).unwrap_or(i32::MAX);
        function
            .set_attribute(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, smem)
            .map_err(failed("reserve a kernel's shared memory"))?;
        let per_sm = function
            .occupancy_max_active_blocks_per_multiprocessor(shape.threads, shape.smem_bytes as usize, None)
            .map_err(failed("count a kernel's resident blocks"))?;
        let resident_blocks = self.sm_count * per_sm.min(shape.per_sm.unwrap_or(u32::MAX)).max(1);
        let dependent_launch = self.dependent_launch();
        let (function, prologue) = (function.clone(), prologue.clone());
        let code = Code::Function(Function { function, prologue, shape, resident_blocks, dependent_launch });
        Ok(Kernel { code, problem: *problem, config: *config })
    }

    /// The same for a config of the library; `load` compiles and loads our default gate where one is behind it.
    ///
    /// # Errors
    /// When the config is no legal one of the library, or `load` fails.
    pub fn library_kernel<E: From<Rejected>>(
        &self,
        library: &Arc<CublasLt>,
        problem: &Problem,
        config: &Config,
        load: impl FnOnce(&Problem, Config) -> Result<Kernel, E>,
    ) -> Result<Kernel, E> {
        config.check(problem, Target::Gpu(self.arch))?;
        let Config::Cublaslt(choice) = *config else {
            let reason = format!("`{}` is no library's", config.family());
            return Err(Rejected { rule: "the family is a library's", reason }.into());
        };
        let gate = behind(problem.op).map(|op| problem.with_op(op));
        let gate = gate.map(|gate| load(&gate, default_of(Family::Elementwise, &gate, self.arch)?)).transpose()?;
        let code = Code::Library(Arc::new(LibraryCall::new(library, choice, gate)));
        Ok(Kernel { code, problem: *problem, config: *config })
    }
}

/// A config that is ready to launch. What it loaded lives as long as this does, so keep it while a captured graph uses it.
#[derive(Debug, Clone)]
pub struct Kernel {
    pub(crate) code: Code,
    /// N, K, number format, weight order and alignment it is launched for; M comes with each launch.
    pub(crate) problem: Problem,
    /// The config it was made from.
    pub config: Config,
}

impl Kernel {
    /// What addresses and strides have to be multiples of.
    pub(crate) fn access_bytes(&self) -> u32 {
        match &self.code {
            Code::Function(function) => function.shape.access_bytes,
            Code::Library(_) => self.problem.alignment,
        }
    }
}

/// What a launch runs.
#[derive(Debug, Clone)]
pub(crate) enum Code {
    /// A function of ours.
    Function(Function),
    /// GEMMs of a library, with a function of ours behind them where the op has a gate.
    Library(Arc<LibraryCall>),
}

/// What is launched of one loaded image.
#[derive(Debug, Clone)]
pub struct Entries {
    /// The kernel.
    pub function: CudaFunction,
    /// What prepares its operands, where they need it.
    pub prologue: Option<CudaFunction>,
}

/// A loaded function and how it is launched.
#[derive(Debug, Clone)]
pub(crate) struct Function {
    pub(crate) function: CudaFunction,
    /// Launched before it.
    pub(crate) prologue: Option<CudaFunction>,
    pub(crate) shape: LaunchShape,
    /// Blocks that run at a time on the whole GPU, or fewer where its shape asks for fewer.
    pub(crate) resident_blocks: u32,
    /// Whether it may start before its predecessor in the stream ends.
    pub(crate) dependent_launch: bool,
}
