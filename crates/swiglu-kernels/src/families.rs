//! The kernel families: one frozen config type each, one predicate for legality, one candidate list.
//!
//! A family is named after its mechanism, not after a chip; the chip is data in [`ArchSpec`].

pub mod column_sum;
pub mod cpu;
pub mod cublaslt;
pub mod elementwise;
pub mod mma_direct;
pub mod mma_gemm;
pub mod mma_sync;
pub mod simt;
pub mod simt_gemm;
pub mod weight_only_tma;
pub mod wgmma_gemm;
pub mod wgmma_stream;
pub mod wgmma_tma;

use crate::arch::ArchSpec;
use crate::problem::{DType, Format, MAX_ACCESS_BYTES, Op, Problem, UnknownName, names};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

pub use column_sum::ColumnSumConfig;
pub use cpu::CpuConfig;
pub use cublaslt::CublasltConfig;
pub use elementwise::ElementwiseConfig;
pub use mma_direct::MmaDirectConfig;
pub use mma_gemm::MmaGemmConfig;
pub use mma_sync::{MmaSyncConfig, Staging};
pub use simt::SimtConfig;
pub use simt_gemm::SimtGemmConfig;
pub use weight_only_tma::WeightOnlyTmaConfig;
pub use wgmma_gemm::WgmmaGemmConfig;
pub use wgmma_stream::WgmmaStreamConfig;
pub use wgmma_tma::{Schedule, WgmmaTmaConfig};

/// Where a kernel is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A GPU of this architecture.
    Gpu(&'static ArchSpec),
    /// The CPU, with this many worker threads to spend.
    Cpu {
        /// Worker threads.
        threads: u32,
    },
}

/// The families, in the order reports use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// fp32 FMA on any GPU.
    Simt,
    /// `mma.sync` on weights that go straight from memory into registers, compute capability 8.0 and later.
    MmaDirect,
    /// TMA + `mma.sync` for weights in 8 or 4 bits, compute capability 9.0 to 10.3.
    WeightOnlyTma,
    /// `ldmatrix` + `mma.sync` tensor cores, compute capability 8.0 and later.
    MmaSync,
    /// TMA + `wgmma` with the weights on the rows of a product, for few tokens, compute capability 9.0.
    WgmmaStream,
    /// TMA + warp-specialised `wgmma`, compute capability 9.0.
    WgmmaTma,
    /// The gate and its backward in one pass over memory, any GPU.
    Elementwise,
    /// Sums down columns, any GPU.
    ColumnSum,
    /// A step that is one GEMM, fp32 FMA on any GPU.
    SimtGemm,
    /// A step that is one GEMM, on the main loop of [`Family::MmaSync`], compute capability 8.0 and later.
    MmaGemm,
    /// A step that is one GEMM, on the main loop of [`Family::WgmmaTma`].
    WgmmaGemm,
    /// NVIDIA's library for the GEMMs, where it is installed; with our gate behind them where the op has one.
    Cublaslt,
    /// Blocked GEMM and gate on CPU threads.
    Cpu,
}

names!(Family, "family", Family::Simt => "simt", Family::MmaDirect => "mma_direct",
    Family::WeightOnlyTma => "weight_only_tma", Family::MmaSync => "mma_sync",
    Family::WgmmaStream => "wgmma_stream", Family::WgmmaTma => "wgmma_tma", Family::Elementwise => "elementwise",
    Family::ColumnSum => "column_sum", Family::SimtGemm => "simt_gemm",
    Family::MmaGemm => "mma_gemm", Family::WgmmaGemm => "wgmma_gemm",
    Family::Cublaslt => "cublaslt", Family::Cpu => "cpu");

impl Family {
    /// Whether its kernels are a library's, which may not be installed.
    pub const fn is_library(self) -> bool {
        matches!(self, Self::Cublaslt)
    }

    /// Families that are CUDA source.
    pub const GPU: [Self; 11] = [
        Self::Simt,
        Self::MmaDirect,
        Self::WeightOnlyTma,
        Self::MmaSync,
        Self::WgmmaStream,
        Self::WgmmaTma,
        Self::Elementwise,
        Self::ColumnSum,
        Self::SimtGemm,
        Self::MmaGemm,
        Self::WgmmaGemm,
    ];

    /// Whether it has kernels for `op`.
    pub const fn computes(self, op: Op) -> bool {
        match self {
            Self::Simt
            | Self::MmaDirect
            | Self::WeightOnlyTma
            | Self::MmaSync
            | Self::WgmmaStream
            | Self::WgmmaTma
            | Self::Cpu => op.is_forward(),
            Self::Elementwise => op.is_elementwise(),
            Self::ColumnSum => op.is_column_sum(),
            Self::SimtGemm | Self::MmaGemm | Self::WgmmaGemm => {
                !op.is_forward() && !op.is_elementwise() && !op.is_column_sum()
            }
            Self::Cublaslt => !op.is_elementwise() && !op.is_column_sum(),
        }
    }

    /// Whether its configs are CUDA source.
    pub const fn has_source(self) -> bool {
        !matches!(self, Self::Cublaslt | Self::Cpu)
    }
}

/// One point of a tuning space. Stored whole in records, never as an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "family", rename_all = "snake_case")]
pub enum Config {
    /// See [`simt`].
    Simt(SimtConfig),
    /// See [`mma_direct`].
    MmaDirect(MmaDirectConfig),
    /// See [`weight_only_tma`].
    WeightOnlyTma(WeightOnlyTmaConfig),
    /// See [`mma_sync`].
    MmaSync(MmaSyncConfig),
    /// See [`wgmma_stream`].
    WgmmaStream(WgmmaStreamConfig),
    /// See [`wgmma_tma`].
    WgmmaTma(WgmmaTmaConfig),
    /// See [`elementwise`].
    Elementwise(ElementwiseConfig),
    /// See [`column_sum`].
    ColumnSum(ColumnSumConfig),
    /// See [`simt_gemm`].
    SimtGemm(SimtGemmConfig),
    /// See [`mma_gemm`].
    MmaGemm(MmaGemmConfig),
    /// See [`wgmma_gemm`].
    WgmmaGemm(WgmmaGemmConfig),
    /// See [`cublaslt`].
    Cublaslt(CublasltConfig),
    /// See [`cpu`].
    Cpu(CpuConfig),
}

/// How consecutive blocks (or clusters of them) walk over the tiles of the output: in bands, across a band first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Raster {
    /// Bands of `raster_group` tiles of N, walked along M.
    AlongM,
    /// Bands of `raster_group` tiles of M, walked along N.
    AlongN,
    /// Of `wgmma_tma`: bands of as many tiles of M as have `raster_group` MiB of x, walked along N. These rows stay in L2; the
    /// weights and z pass, and are the first to leave it ([`wgmma_tma::passing`]).
    Resident,
}

names!(Raster, "raster order", Raster::AlongM => "along_m", Raster::AlongN => "along_n", Raster::Resident => "resident");

impl Raster {
    /// Whether bands are of tiles of M, walked along N.
    pub fn is_along_n(self) -> bool {
        match self {
            Self::AlongM => false,
            Self::AlongN | Self::Resident => true,
        }
    }
}

/// The raster orders candidates are drawn from: direction and group.
pub(crate) const RASTERS: [(Raster, u32); 2] = [(Raster::AlongN, 8), (Raster::AlongM, 8)];

/// Why a config cannot run a problem on a target. A rejection is data, not a failure.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{rule}: {reason}")]
pub struct Rejected {
    /// The rule, in words that do not depend on the config; `list` counts by it.
    pub rule: &'static str,
    /// The numbers that broke it.
    pub reason: String,
}

/// `Ok` when `holds`, else the rule with its numbers.
pub(crate) fn ensure(holds: bool, rule: &'static str, reason: impl FnOnce() -> String) -> Result<(), Rejected> {
    if holds { Ok(()) } else { Err(Rejected { rule, reason: reason() }) }
}

/// How a config is launched; the kernels compute the same tiles from their constants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaunchShape {
    /// Output rows per cluster (per block where there are none).
    pub block_m: u32,
    /// Output columns per cluster.
    pub block_n: u32,
    /// Blocks per cluster.
    pub cluster: u32,
    /// Where blocks walk over the tiles themselves: how many are launched at most per multiprocessor, and no more than fit.
    pub per_sm: Option<u32>,
    /// Threads per block.
    pub threads: u32,
    /// Dynamic shared memory per block.
    pub smem_bytes: u32,
    /// Walk over the tiles.
    pub raster: Raster,
    /// Tiles (or clusters) across a band, of [`Raster::Resident`] too.
    pub raster_group: u32,
    /// Bytes of the widest access to global memory.
    pub access_bytes: u32,
}

impl LaunchShape {
    /// Clusters' tiles of the outputs of `problem`; halves that are paired have tiles of their own.
    pub fn tiles(&self, problem: &Problem) -> u64 {
        let (rows, cols) = problem.output();
        let halves = problem.product().map_or(1, |product| product.outputs());
        u64::from(halves) * u64::from(rows.div_ceil(self.block_m)) * u64::from(cols.div_ceil(self.block_n))
    }
}

impl Config {
    /// The family this is a point of.
    pub const fn family(&self) -> Family {
        match self {
            Self::Simt(_) => Family::Simt,
            Self::MmaDirect(_) => Family::MmaDirect,
            Self::WeightOnlyTma(_) => Family::WeightOnlyTma,
            Self::MmaSync(_) => Family::MmaSync,
            Self::WgmmaStream(_) => Family::WgmmaStream,
            Self::WgmmaTma(_) => Family::WgmmaTma,
            Self::Elementwise(_) => Family::Elementwise,
            Self::ColumnSum(_) => Family::ColumnSum,
            Self::SimtGemm(_) => Family::SimtGemm,
            Self::MmaGemm(_) => Family::MmaGemm,
            Self::WgmmaGemm(_) => Family::WgmmaGemm,
            Self::Cublaslt(_) => Family::Cublaslt,
            Self::Cpu(_) => Family::Cpu,
        }
    }

    /// THE statement of legality: enumerator, loader, dispatcher and tests all call it.
    ///
    /// # Errors
    /// [`Rejected`] names the rule and the numbers.
    pub fn check(&self, problem: &Problem, target: Target) -> Result<(), Rejected> {
        let family = self.family();
        ensure(family.computes(problem.op), "the family computes this op", || format!("{family}, {}", problem.op))?;
        ensure(problem.op.is_forward() || !problem.dtype.is_scaled(), "scaled formats are the forward's", || {
            format!("{} in {}", problem.op, problem.dtype)
        })?;
        let checked = match (self, target) {
            (Self::Simt(config), Target::Gpu(arch)) => config.check(problem, arch),
            (Self::MmaDirect(config), Target::Gpu(arch)) => config.check(problem, arch),
            (Self::WeightOnlyTma(config), Target::Gpu(arch)) => config.check(problem, arch),
            (Self::MmaSync(config), Target::Gpu(arch)) => config.check(problem, arch),
            (Self::WgmmaStream(config), Target::Gpu(arch)) => config.check(problem, arch),
            (Self::WgmmaTma(config), Target::Gpu(arch)) => config.check(problem, arch),
            (Self::Elementwise(config), Target::Gpu(arch)) => config.check(problem, arch),
            (Self::ColumnSum(config), Target::Gpu(arch)) => config.check(problem, arch),
            (Self::SimtGemm(config), Target::Gpu(arch)) => config.check(problem, arch),
            (Self::MmaGemm(config), Target::Gpu(arch)) => config.check(problem, arch),
            (Self::WgmmaGemm(config), Target::Gpu(arch)) => config.check(problem, arch),
            (Self::Cublaslt(config), Target::Gpu(arch)) => config.check(problem, arch),
            (Self::Cpu(config), Target::Cpu { threads }) => config.check(problem, threads),
            (_, Target::Cpu { .. }) => {
                ensure(false, "the family runs on this kind of device", || format!("`{family}` needs a GPU"))
            }
            (Self::Cpu(_), Target::Gpu(_)) => {
                ensure(false, "the family runs on this kind of device", || "`cpu` runs on the CPU".into())
            }
        };
        checked?;
        let raster = self.launch_shape(problem).map(|shape| shape.raster);
        ensure(
            raster != Some(Raster::Resident) || family == Family::WgmmaTma,
            "wgmma_tma alone walks `resident`",
            || format!("{family}"),
        )
    }

    /// How the kernel is launched; `None` for the CPU, and for a library that decides itself.
    pub fn launch_shape(&self, problem: &Problem) -> Option<LaunchShape> {
        match self {
            Self::Simt(config) => Some(config.launch_shape()),
            Self::MmaDirect(config) => Some(config.launch_shape()),
            Self::WeightOnlyTma(config) => Some(config.launch_shape(problem)),
            Self::MmaSync(config) => Some(config.launch_shape(problem.dtype)),
            Self::WgmmaStream(config) => Some(config.launch_shape()),
            Self::WgmmaTma(config) => Some(config.launch_shape(problem)),
            Self::Elementwise(config) => Some(config.launch_shape(problem)),
            Self::ColumnSum(config) => Some(config.launch_shape(problem.dtype)),
            Self::SimtGemm(config) => Some(config.launch_shape()),
            Self::MmaGemm(config) => Some(config.launch_shape(problem.dtype)),
            Self::WgmmaGemm(config) => Some(config.launch_shape(problem)),
            Self::Cublaslt(_) | Self::Cpu(_) => None,
        }
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Simt(config) => config.fmt(f),
            Self::MmaDirect(config) => config.fmt(f),
            Self::WeightOnlyTma(config) => config.fmt(f),
            Self::MmaSync(config) => config.fmt(f),
            Self::WgmmaStream(config) => config.fmt(f),
            Self::WgmmaTma(config) => config.fmt(f),
            Self::Elementwise(config) => config.fmt(f),
            Self::ColumnSum(config) => config.fmt(f),
            Self::SimtGemm(config) => config.fmt(f),
            Self::MmaGemm(config) => config.fmt(f),
            Self::WgmmaGemm(config) => config.fmt(f),
            Self::Cublaslt(config) => config.fmt(f),
            Self::Cpu(config) => config.fmt(f),
        }
    }
}

/// Every point of the spaces that `target` could have, legal or not, in a fixed order.
pub fn space(problem: &Problem, target: Target) -> Vec<Config> {
    let cublaslt = || cublaslt::space().map(Config::Cublaslt);
    match target {
        Target::Gpu(_) if problem.op.is_elementwise() => elementwise::space(problem).map(Config::Elementwise).collect(),
        Target::Gpu(_) if problem.op.is_column_sum() => column_sum::space(problem).map(Config::ColumnSum).collect(),
        Target::Gpu(_) if !problem.op.is_forward() => {
            let simt_gemm = simt_gemm::space(problem).map(Config::SimtGemm);
            let mma_gemm = mma_gemm::space(problem).map(Config::MmaGemm);
            let wgmma_gemm = wgmma_gemm::space(problem).map(Config::WgmmaGemm);
            simt_gemm.chain(mma_gemm).chain(wgmma_gemm).chain(cublaslt()).collect()
        }
        Target::Gpu(_) => {
            let simt = simt::space(problem).map(Config::Simt);
            let mma_direct = mma_direct::space(problem).map(Config::MmaDirect);
            let weight_only_tma = weight_only_tma::space(problem).map(Config::WeightOnlyTma);
            let mma_sync = mma_sync::space(problem).map(Config::MmaSync);
            let wgmma_stream = wgmma_stream::space(problem).map(Config::WgmmaStream);
            let wgmma_tma = wgmma_tma::space(problem).map(Config::WgmmaTma);
            let before = simt.chain(mma_direct).chain(weight_only_tma).chain(mma_sync);
            before.chain(wgmma_stream).chain(wgmma_tma).chain(cublaslt()).collect()
        }
        Target::Cpu { threads } => cpu::space(threads).map(Config::Cpu).collect(),
    }
}

/// The legal points of [`space`], in its order.
pub fn candidates(problem: &Problem, target: Target) -> Vec<Config> {
    space(problem, target).into_iter().filter(|config| config.check(problem, target).is_ok()).collect()
}

/// Tokens from which fp32 on sm_90a is faster in parts than in plain fp32: the fewest that were measured.
const FEWEST_IN_PARTS: u32 = 64;

/// The config used when nothing was tuned: always legal where anything is.
///
/// # Errors
/// [`Rejected`] when the families cannot run the problem on `arch` at all.
pub fn default_config(problem: &Problem, arch: &'static ArchSpec) -> Result<Config, Rejected> {
    let families: &[Family] = match problem.dtype {
        _ if problem.op.is_elementwise() => &[Family::Elementwise],
        _ if problem.op.is_column_sum() => &[Family::ColumnSum],
        // Of few tokens cutting the operands costs more than products save, but where M is summed over: then the output is large.
        DType::F32 if !problem.op.is_forward() && !problem.sums_over_m() && problem.m < FEWEST_IN_PARTS => {
            &[Family::SimtGemm, Family::WgmmaGemm]
        }
        _ if !problem.op.is_forward() => &[Family::WgmmaGemm, Family::MmaGemm, Family::SimtGemm],
        DType::E4m3 => &[Family::WgmmaTma],
        DType::Bf16E4m3 | DType::F16E4m3 | DType::Bf16Int4 | DType::F16Int4 => {
            &[Family::WeightOnlyTma, Family::MmaDirect]
        }
        // Three products of tensor cores for one of fp32, and cutting the operands before, do not pay everywhere.
        DType::F32 if problem.m > 256 => &[Family::WgmmaTma, Family::Simt, Family::MmaSync],
        // Measured on sm_90a only.
        DType::F32 if arch.has_wgmma && problem.m >= FEWEST_IN_PARTS => {
            &[Family::MmaSync, Family::Simt, Family::WgmmaTma]
        }
        DType::F32 => &[Family::Simt, Family::MmaSync, Family::WgmmaTma],
        // Up to a tile's worth of tokens reading the weights decides, and small blocks read them better.
        DType::Tf32 | DType::F16 | DType::Bf16 if problem.m <= 64 => {
            &[Family::WgmmaStream, Family::MmaSync, Family::WgmmaTma, Family::Simt]
        }
        DType::Tf32 | DType::F16 | DType::Bf16 => &[Family::WgmmaTma, Family::MmaSync, Family::Simt],
    };
    let mut rejected = Rejected { rule: "the family runs on this kind of device", reason: arch.to_string() };
    for &family in families {
        match default_of(family, problem, arch) {
            Ok(config) => return Ok(config),
            Err(why) => rejected = why,
        }
    }
    Err(rejected)
}

/// The default config of one family on a GPU: the first legal one of its preferences, else of its space.
///
/// # Errors
/// [`Rejected`] when the family cannot run the problem on `arch`; for the CPU family always.
pub fn default_of(family: Family, problem: &Problem, arch: &'static ArchSpec) -> Result<Config, Rejected> {
    let target = Target::Gpu(arch);
    let preferred: Vec<Config> = match family {
        Family::Simt => simt::defaults(problem).map(Config::Simt).to_vec(),
        Family::MmaDirect => mma_direct::defaults(problem).map(Config::MmaDirect).to_vec(),
        Family::WeightOnlyTma => weight_only_tma::defaults(problem).map(Config::WeightOnlyTma).to_vec(),
        Family::MmaSync => mma_sync::defaults(problem).into_iter().map(Config::MmaSync).collect(),
        Family::WgmmaStream => wgmma_stream::defaults(problem).map(Config::WgmmaStream).to_vec(),
        Family::WgmmaTma => wgmma_tma::defaults(problem).map(Config::WgmmaTma).to_vec(),
        Family::Elementwise => vec![Config::Elementwise(elementwise::default(problem))],
        Family::ColumnSum => vec![Config::ColumnSum(column_sum::default(problem))],
        Family::SimtGemm => simt_gemm::defaults(problem).map(Config::SimtGemm).to_vec(),
        Family::MmaGemm => mma_gemm::defaults(problem).into_iter().map(Config::MmaGemm).collect(),
        Family::WgmmaGemm => wgmma_gemm::defaults(problem).into_iter().map(Config::WgmmaGemm).collect(),
        Family::Cublaslt | Family::Cpu => Vec::new(),
    };
    let mut rejected =
        Rejected { rule: "the family runs on this kind of device", reason: format!("{family} on {arch}") };
    let space = space(problem, target).into_iter().filter(|config| config.family() == family);
    for config in preferred.into_iter().chain(space) {
        match config.check(problem, target) {
            Ok(()) => return Ok(config),
            Err(why) => rejected = why,
        }
    }
    Err(rejected)
}

/// Multiprocessors of an H200, which spaces are cut for.
pub(crate) const MULTIPROCESSORS: u32 = 132;

/// The first of `widths` at which `columns` take no more blocks than an H200 has multiprocessors.
pub(crate) fn narrowest_wave(columns: u32, widths: &[u32]) -> Option<u32> {
    widths.iter().copied().find(|&width| columns.div_ceil(width) <= MULTIPROCESSORS)
}

/// Products of sizes up to `most` do not overflow, and none divides by zero.
pub(crate) fn check_sizes(sizes: &[u32], most: u32) -> Result<(), Rejected> {
    ensure(sizes.iter().all(|&size| (1..=most).contains(&size)), "sizes are positive and small", || {
        format!("{sizes:?}")
    })
}

/// Rules every GPU family shares: access width, threads, shared memory.
pub(crate) fn check_block(shape: &LaunchShape, problem: &Problem, arch: &ArchSpec) -> Result<(), Rejected> {
    ensure(problem.alignment.is_multiple_of(shape.access_bytes), "operands are aligned to access_bytes", || {
        format!("access_bytes {} with operands aligned to {}", shape.access_bytes, problem.alignment)
    })?;
    ensure(shape.access_bytes >= problem.dtype.bytes(), "an access holds at least one element", || {
        format!("access_bytes {} for {}", shape.access_bytes, problem.dtype)
    })?;
    ensure(shape.threads.is_multiple_of(32) && shape.threads <= 1024, "whole warps, at most 1024 threads", || {
        format!("{} threads", shape.threads)
    })?;
    ensure(shape.smem_bytes <= arch.smem_per_block, "the stages fit in shared memory", || {
        format!("{} bytes of {}", shape.smem_bytes, arch.smem_per_block)
    })
}

/// The families that know nothing of scales.
pub(crate) fn check_unscaled(problem: &Problem) -> Result<(), Rejected> {
    ensure(
        !problem.dtype.is_scaled(),
        "scaled formats run in wgmma_tma (e4m3), mma_direct and weight_only_tma (weights only)",
        || format!("{} asked for", problem.dtype),
    )
}

/// `tanh.approx` is off by up to |gate| * 2^-12, less than half a unit of bf16 where gate and result are alike in size.
pub(crate) fn check_fast_silu(fast_silu: bool, problem: &Problem) -> Result<(), Rejected> {
    ensure(!fast_silu || problem.dtype.output() == Format::Bf16, "fast_silu is accurate enough for bf16 only", || {
        format!("{} asked for", problem.dtype)
    })
}

/// What one access to global memory may be.
pub(crate) fn check_access_bytes(access_bytes: u32) -> Result<(), Rejected> {
    ensure(access_bytes.is_power_of_two() && access_bytes <= MAX_ACCESS_BYTES, "access_bytes is 2, 4, 8 or 16", || {
        format!("access_bytes {access_bytes}")
    })
}

/// Register rule of the GPU families: accumulators plus `overhead` fit in a thread's share.
pub(crate) fn check_registers(accumulators: u32, overhead: u32, threads: u32, arch: &ArchSpec) -> Result<(), Rejected> {
    let share = (arch.registers_per_sm / threads).min(255);
    ensure(accumulators + overhead <= share, "accumulators fit in registers", || {
        format!("{accumulators} accumulators + {overhead} of {share} registers a thread")
    })
}
