//! `mma_sync`: a ring of K tiles, `ldmatrix`, `mma.sync` tensor cores; compute capability 8.0 and later.
//!
//! Design: `docs/kernels/mma_sync.md`. Templates: `templates/mma_sync/`, one for each [`Staging`].

use super::{
    LaunchShape, RASTERS, Raster, Rejected, check_access_bytes, check_block, check_fast_silu, check_registers,
    check_sizes, check_unscaled, ensure,
};
use crate::arch::ArchSpec;
use crate::problem::{DType, MAX_ACCESS_BYTES, Problem, UnknownName, WeightMajor, names};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How K tiles reach shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Staging {
    /// Every thread copies its share; one output tile per block.
    CpAsync,
    /// One thread asks the copy engine for whole tiles; blocks are persistent. Compute capability 9.0 and later.
    Tma,
}

names!(Staging, "staging", Staging::CpAsync => "cp_async", Staging::Tma => "tma");

/// A point of the `mma_sync` space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MmaSyncConfig {
    /// How K tiles reach shared memory.
    pub staging: Staging,
    /// Rows of z per block.
    pub block_m: u32,
    /// Columns of z per block; the block multiplies twice as many (gate and up).
    pub block_n: u32,
    /// Step along K.
    pub block_k: u32,
    /// K tiles in flight between global and shared memory.
    pub stages: u32,
    /// Warps along M.
    pub warps_m: u32,
    /// Warps along N.
    pub warps_n: u32,
    /// Bytes of one access to global memory.
    pub access_bytes: u32,
    /// silu by one `tanh.approx` instead of `ex2` and `rcp`; accurate enough for bf16 only.
    pub fast_silu: bool,
    /// Walk over the tiles; a launch parameter, not a constant of the source.
    pub raster: Raster,
    /// Tiles walked in that direction before stepping in the other; a launch parameter.
    pub raster_group: u32,
}

/// block_m, block_n, warps_m, warps_n of tiles that every thread helps to copy.
const CP_ASYNC_TILES: [(u32, u32, u32, u32); 15] = [
    (16, 32, 1, 4),
    (16, 64, 1, 4),
    (32, 32, 1, 4),
    (32, 64, 1, 4),
    (64, 32, 2, 2),
    (64, 64, 2, 2),
    (64, 64, 2, 4),
    (64, 128, 2, 4),
    (128, 32, 4, 1),
    (128, 64, 2, 2),
    (128, 64, 4, 2),
    (128, 128, 2, 4),
    (128, 160, 2, 4),
    (256, 64, 4, 2),
    (256, 32, 4, 2),
];

/// The same for tiles that the copy engine brings: large ones, one block per multiprocessor.
const TMA_TILES: [(u32, u32, u32, u32); 6] =
    [(128, 64, 4, 2), (128, 96, 2, 4), (128, 128, 2, 4), (128, 160, 2, 4), (256, 64, 4, 2), (256, 80, 4, 2)];

impl MmaSyncConfig {
    /// Threads per block.
    pub const fn threads(&self) -> u32 {
        32 * self.warps_m * self.warps_n
    }

    /// Shared memory: the ring of stages and a 16-row strip of z per warp, which takes the ring's place or, where the
    /// copies of the next tile are on their way already, lies behind it with two barriers a stage.
    pub const fn smem_bytes(&self, dtype: DType) -> u32 {
        let ring = self.stages * self.block_k * (self.block_m + 2 * self.block_n) * dtype.bytes();
        // 16 bytes of padding a row spread the fragment stores over the banks.
        let strips = self.warps_m * 16 * (self.block_n * dtype.bytes() + 16 * self.warps_n);
        match self.staging {
            Staging::CpAsync if ring > strips => ring,
            Staging::CpAsync => strips,
            Staging::Tma => ring + strips + 16 * self.stages,
        }
    }

    /// Columns of one box of N-major weights: a swizzle row of 128 bytes, or the whole tile where that is less.
    pub fn weight_cols(&self, dtype: DType) -> u32 {
        self.block_n.min(128 / dtype.bytes())
    }

    pub(super) fn launch_shape(&self, dtype: DType) -> LaunchShape {
        LaunchShape {
            block_m: self.block_m,
            block_n: self.block_n,
            cluster: 1,
            per_sm: (self.staging == Staging::Tma).then_some(u32::MAX),
            threads: self.threads(),
            smem_bytes: self.smem_bytes(dtype),
            raster: self.raster,
            raster_group: self.raster_group,
            access_bytes: self.access_bytes,
        }
    }

    pub(super) fn check(&self, problem: &Problem, arch: &ArchSpec) -> Result<(), Rejected> {
        let &Self { staging, block_m, block_n, block_k, stages, warps_m, warps_n, access_bytes, raster_group, .. } =
            self;
        let sizes = [block_m, block_n, block_k, stages, warps_m, warps_n, access_bytes, raster_group];
        check_sizes(&sizes, 4096)?;
        ensure(arch.has_cp_async, "mma_sync needs compute capability 8.0", || format!("{arch} has none"))?;
        check_unscaled(problem)?;
        let bytes = problem.dtype.bytes();
        let row_bytes = [block_k * bytes, block_n * bytes];
        ensure(row_bytes[0] == 64 || row_bytes[0] == 128, "a K row of a tile is 64 or 128 bytes", || {
            format!("block_k {block_k} of {bytes} bytes")
        })?;
        ensure(
            problem.weight_major == WeightMajor::K || row_bytes[1].is_power_of_two() && row_bytes[1] >= 64,
            "an N row of a tile is at least 64 bytes",
            || format!("block_n {block_n} of {bytes} bytes"),
        )?;
        ensure(
            problem.weight_major == WeightMajor::K || bytes == 2 || row_bytes[1] >= 128,
            "an N row of words is at least 128 bytes",
            || format!("block_n {block_n} of {bytes} bytes"),
        )?;
        ensure(
            staging == Staging::Tma || {
                let weight_row = if problem.weight_major == WeightMajor::K { row_bytes[0] } else { row_bytes[1] };
                [row_bytes[0], weight_row].iter().all(|row| self.threads().is_multiple_of(row / access_bytes.max(1)))
            },
            "a pass over a tile is whole rows",
            || format!("{} threads, rows of {row_bytes:?} bytes, access_bytes {access_bytes}", self.threads()),
        )?;
        ensure(
            block_m.is_multiple_of(16 * warps_m) && block_n.is_multiple_of(8 * warps_n),
            "a warp holds whole 16x8 fragments",
            || format!("{block_m}x{block_n} by {warps_m}x{warps_n} warps"),
        )?;
        ensure(
            problem.weight_major == WeightMajor::K || (block_n / (8 * warps_n)).is_power_of_two(),
            "n_major needs a power of two of fragments a warp",
            || format!("{} fragments", block_n / (8 * warps_n)),
        )?;
        ensure((2..=8).contains(&stages), "2 to 8 stages", || format!("{stages} stages"))?;
        check_access_bytes(access_bytes)?;
        // The addresses of narrow copies and both parts of the fragments do not fit in registers together.
        ensure(
            problem.dtype != DType::F32 || access_bytes == MAX_ACCESS_BYTES,
            "f32 in two parts copies 16 bytes",
            || format!("access_bytes {access_bytes}"),
        )?;
        check_fast_silu(self.fast_silu, problem)?;
        if staging == Staging::Tma {
            self.check_tma(problem, arch)?;
        }
        check_block(&self.launch_shape(problem.dtype), problem, arch)?;
        let accumulators = 2 * (block_m / warps_m) * (block_n / warps_n) / 32;
        let overhead = match problem.dtype {
            // Rounding keeps both the loaded and the rounded fragments alive.
            DType::Tf32 => 136,
            // Both parts of the fragments, and the sums of a step.
            DType::F32 => 150,
            _ => 64,
        };
        check_registers(accumulators, overhead, self.threads(), arch)
    }

    fn check_tma(&self, problem: &Problem, arch: &ArchSpec) -> Result<(), Rejected> {
        ensure(arch.has_tma, "tma staging needs compute capability 9.0", || format!("{arch} has none"))?;
        ensure(problem.k > 0, "tma staging needs K of at least 1", || "k is 0".into())?;
        ensure(self.access_bytes == MAX_ACCESS_BYTES, "tensor maps take 16-byte strides", || {
            format!("access_bytes {}", self.access_bytes)
        })?;
        ensure(self.block_m <= 256 && self.block_n <= 256, "a box has at most 256 rows", || {
            format!("{}x{}", self.block_m, self.block_n)
        })?;
        let n_major = problem.weight_major == WeightMajor::N;
        ensure(!n_major || problem.dtype.bytes() == 2, "no swizzle of the copy engine suits n_major words", || {
            format!("{} asked for", problem.dtype)
        })?;
        let warp_bytes = self.block_n / self.warps_n * problem.dtype.bytes();
        ensure(!n_major || warp_bytes <= 128, "a warp's columns lie in one swizzle row", || {
            format!("{warp_bytes} bytes")
        })
    }
}

pub(super) fn space(problem: &Problem) -> impl Iterator<Item = MmaSyncConfig> + use<> {
    let (access_bytes, bytes) = (problem.alignment, problem.dtype.bytes());
    let fast_silu = problem.dtype == DType::Bf16;
    let cp_async = CP_ASYNC_TILES.map(|tile| (Staging::CpAsync, tile));
    let tma = TMA_TILES.map(|tile| (Staging::Tma, tile));
    cp_async.into_iter().chain(tma).flat_map(move |(staging, (block_m, block_n, warps_m, warps_n))| {
        [64, 128].into_iter().flat_map(move |row_bytes| {
            [2, 3, 4, 6].into_iter().flat_map(move |stages| {
                RASTERS.into_iter().map(move |(raster, raster_group)| MmaSyncConfig {
                    staging,
                    block_m,
                    block_n,
                    block_k: row_bytes / bytes,
                    stages,
                    warps_m,
                    warps_n,
                    access_bytes,
                    fast_silu,
                    raster,
                    raster_group,
                })
            })
        })
    })
}

/// Preferred configs when nothing was tuned, best first: by M, then ever less shared memory.
pub(super) fn defaults(problem: &Problem) -> Vec<MmaSyncConfig> {
    let base = MmaSyncConfig {
        staging: Staging::CpAsync,
        block_m: 128,
        block_n: 64,
        block_k: 128 / problem.dtype.bytes(),
        stages: 3,
        warps_m: 2,
        warps_n: 2,
        access_bytes: problem.alignment,
        fast_silu: problem.dtype == DType::Bf16,
        raster: Raster::AlongN,
        raster_group: 8,
    };
    let base = if problem.dtype == DType::Tf32 { MmaSyncConfig { warps_m: 4, ..base } } else { base };
    let wide = |block_n| MmaSyncConfig { staging: Staging::Tma, block_n, warps_m: 2, warps_n: 4, ..base };
    let medium = MmaSyncConfig { block_m: 64, block_n: 64, block_k: 64 / problem.dtype.bytes(), warps_m: 2, ..base };
    let small = MmaSyncConfig { block_m: 16, block_n: 32, warps_m: 1, warps_n: 4, ..base };
    // What won on an H200 at 64 and 256 tokens.
    let in_parts = match problem.m {
        _ if problem.dtype != DType::F32 => None,
        17..=64 => Some(MmaSyncConfig { block_m: 32, stages: 6, warps_m: 1, warps_n: 4, ..base }),
        65..=256 => Some(MmaSyncConfig { stages: 2, warps_m: 4, ..base }),
        _ => None,
    };
    let others = match problem.m {
        0..=16 => vec![small, medium, base],
        17..=512 => vec![medium, base, small],
        _ => vec![wide(160), wide(128), base, medium, small],
    };
    in_parts.into_iter().chain(others).collect()
}

impl fmt::Display for MmaSyncConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "mma_sync {} {}x{}x{} warps {}x{} stages {} access {}{} {} {}",
            self.staging,
            self.block_m,
            self.block_n,
            self.block_k,
            self.warps_m,
            self.warps_n,
            self.stages,
            self.access_bytes,
            if self.fast_silu { " fast_silu" } else { "" },
            self.raster,
            self.raster_group
        )
    }
}
