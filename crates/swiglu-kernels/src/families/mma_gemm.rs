//! `mma_gemm`: the steps that are one GEMM, on the main loop of [`mma_sync`](super::mma_sync) with `cp.async`; compute
//! capability 8.0 and later.
//!
//! Design: `docs/kernels/mma_gemm.md`. Template: `templates/mma_gemm/kernel.cu.tera`.

use super::{
    LaunchShape, RASTERS, Raster, Rejected, check_access_bytes, check_block, check_registers, check_sizes, ensure,
};
use crate::arch::ArchSpec;
use crate::problem::{DType, OperandMajor, Problem};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A point of the `mma_gemm` space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MmaGemmConfig {
    /// Rows of the output per block.
    pub block_m: u32,
    /// Columns of the output per block.
    pub block_n: u32,
    /// Step along the sums.
    pub block_k: u32,
    /// Steps in flight between global and shared memory.
    pub stages: u32,
    /// Warps along the rows.
    pub warps_m: u32,
    /// Warps along the columns.
    pub warps_n: u32,
    /// Bytes of one access to global memory.
    pub access_bytes: u32,
    /// Walk over the tiles; a launch parameter, not a constant of the source.
    pub raster: Raster,
    /// Tiles walked in that direction before stepping in the other; a launch parameter.
    pub raster_group: u32,
}

/// block_m, block_n, warps_m, warps_n; the large ones first: two operands serve most products there.
const TILES: [(u32, u32, u32, u32); 8] = [
    (128, 256, 2, 4),
    (256, 128, 4, 2),
    (128, 128, 2, 2),
    (128, 64, 2, 2),
    (64, 128, 2, 2),
    (64, 64, 2, 2),
    (32, 64, 1, 4),
    (16, 64, 1, 4),
];

/// Bytes of one step's row, and how many steps are in flight.
const RINGS: [(u32, u32); 3] = [(64, 3), (64, 4), (128, 3)];

impl MmaGemmConfig {
    /// Threads per block.
    pub const fn threads(&self) -> u32 {
        32 * self.warps_m * self.warps_n
    }

    /// Shared memory: the ring of stages, whose place a 16-row strip of fp32 sums per warp takes.
    pub const fn smem_bytes(&self, dtype: DType) -> u32 {
        let ring = self.stages * self.block_k * (self.block_m + self.block_n) * dtype.bytes();
        // 16 bytes of padding a row spread the fragments' stores over the banks.
        let strips = self.warps_m * 16 * (4 * self.block_n + 16 * self.warps_n);
        if ring > strips { ring } else { strips }
    }

    pub(super) fn launch_shape(&self, dtype: DType) -> LaunchShape {
        LaunchShape {
            block_m: self.block_m,
            block_n: self.block_n,
            cluster: 1,
            per_sm: None,
            threads: self.threads(),
            smem_bytes: self.smem_bytes(dtype),
            raster: self.raster,
            raster_group: self.raster_group,
            access_bytes: self.access_bytes,
        }
    }

    pub(super) fn check(&self, problem: &Problem, arch: &ArchSpec) -> Result<(), Rejected> {
        let Some(product) = problem.product() else {
            return ensure(false, "the op is one GEMM", || problem.op.to_string());
        };
        let &Self { block_m, block_n, block_k, stages, warps_m, warps_n, access_bytes, raster_group, .. } = self;
        check_sizes(&[block_m, block_n, block_k, stages, warps_m, warps_n, access_bytes, raster_group], 1024)?;
        ensure(arch.has_cp_async, "mma_gemm needs compute capability 8.0", || format!("{arch} has none"))?;
        ensure(
            matches!(problem.dtype, DType::F16 | DType::Bf16 | DType::Tf32),
            "mma_gemm multiplies fp16, bf16 or tf32",
            || format!("{} asked for", problem.dtype),
        )?;
        check_access_bytes(access_bytes)?;
        ensure(
            block_m.is_multiple_of(16 * warps_m) && block_n.is_multiple_of(16 * warps_n),
            "a warp holds whole 16x16 fragments",
            || format!("{block_m}x{block_n} by {warps_m}x{warps_n} warps"),
        )?;
        let bytes = problem.dtype.bytes();
        let depth_row = block_k * bytes;
        ensure(depth_row == 64 || depth_row == 128, "a step of a tile's row is 64 or 128 bytes", || {
            format!("block_k {block_k} of {bytes} bytes")
        })?;
        for (major, block, warps) in [(product.left, block_m, warps_m), (product.right, block_n, warps_n)] {
            let row = if major == OperandMajor::Depth { depth_row } else { block * bytes };
            ensure(row.is_power_of_two() && row >= 64, "a tile's row is a power of two of at least 64 bytes", || {
                format!("{row} bytes")
            })?;
            // Words are read by scalars, which are swizzled over all banks.
            ensure(
                major == OperandMajor::Depth || bytes == 2 || row >= 128,
                "a row of words that is read across is at least 128 bytes",
                || format!("{row} bytes"),
            )?;
            ensure(
                major == OperandMajor::Depth || (block / (16 * warps)).is_power_of_two(),
                "an operand that is read across has a power of two of fragments a warp",
                || format!("{} fragments", block / (16 * warps)),
            )?;
            ensure(
                self.threads().is_multiple_of((row / access_bytes).max(1)),
                "a pass over a tile is whole rows",
                || format!("{} threads, rows of {row} bytes, access_bytes {access_bytes}", self.threads()),
            )?;
            // Fragments flip address bits inside their tile.
            ensure((block * depth_row).is_multiple_of(1024), "a tile is whole kilobytes", || {
                format!("{} bytes", block * depth_row)
            })?;
        }
        ensure((2..=8).contains(&stages), "2 to 8 stages", || format!("{stages} stages"))?;
        check_block(&self.launch_shape(problem.dtype), problem, arch)?;
        let accumulators = (block_m / warps_m) * (block_n / warps_n) / 32;
        // Copies of 4 and 8 bytes are many, and unrolled: their addresses take registers.
        let overhead = if matches!(access_bytes, 4 | 8) { 136 } else { 100 };
        check_registers(accumulators, overhead, self.threads(), arch)
    }
}

pub(super) fn space(problem: &Problem) -> impl Iterator<Item = MmaGemmConfig> + use<> {
    let (access_bytes, bytes) = (problem.alignment, problem.dtype.bytes());
    TILES.into_iter().flat_map(move |tile| {
        RINGS.into_iter().flat_map(move |ring| {
            RASTERS.into_iter().map(move |(raster, raster_group)| MmaGemmConfig {
                raster,
                raster_group,
                ..config(tile, ring, bytes, access_bytes)
            })
        })
    })
}

/// Preferred configs when nothing was tuned, best first: by the output's rows, then ever less shared memory.
pub(super) fn defaults(problem: &Problem) -> Vec<MmaGemmConfig> {
    let of = |tile: usize, ring: usize| config(TILES[tile], RINGS[ring], problem.dtype.bytes(), problem.alignment);
    match problem.output().0 {
        0..=16 => vec![of(7, 2), of(5, 2), of(5, 0)],
        17..=256 => vec![of(5, 2), of(3, 0), of(5, 0)],
        // Three stages leave room for two blocks on a multiprocessor of 100 KB, too.
        _ => vec![of(2, 0), of(3, 0), of(5, 0)],
    }
}

fn config(
    (block_m, block_n, warps_m, warps_n): (u32, u32, u32, u32),
    (row_bytes, stages): (u32, u32),
    bytes: u32,
    access_bytes: u32,
) -> MmaGemmConfig {
    let block_k = row_bytes / bytes;
    let (raster, raster_group) = RASTERS[0];
    MmaGemmConfig { block_m, block_n, block_k, stages, warps_m, warps_n, access_bytes, raster, raster_group }
}

impl fmt::Display for MmaGemmConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "mma_gemm {}x{}x{} warps {}x{} stages {} access {} {} {}",
            self.block_m,
            self.block_n,
            self.block_k,
            self.warps_m,
            self.warps_n,
            self.stages,
            self.access_bytes,
            self.raster,
            self.raster_group
        )
    }
}
