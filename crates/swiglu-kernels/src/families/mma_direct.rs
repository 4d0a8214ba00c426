//! `mma_direct`: for few tokens. Weights go from memory straight into `mma.sync` fragments; the warps of a block share out
//! K. Compute capability 8.0 and later.
//!
//! Design: `docs/kernels/mma_direct.md`. Template: `templates/mma_direct/kernel.cu.tera`.

use super::{LaunchShape, Raster, Rejected, check_block, check_fast_silu, check_registers, check_sizes, ensure};
use crate::arch::ArchSpec;
use crate::problem::{Format, MAX_ACCESS_BYTES, Problem, WeightMajor};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A point of the `mma_direct` space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MmaDirectConfig {
    /// Tokens per block; the last ones may be missing.
    pub block_m: u32,
    /// Columns of z per block.
    pub block_n: u32,
    /// Warps per block, which share out K.
    pub warps: u32,
    /// K slices that a warp has on their way at a time.
    pub loads: u32,
    /// silu by one `tanh.approx` instead of `ex2` and `rcp`; accurate enough for bf16 only.
    pub fast_silu: bool,
}

/// block_m, block_n. N-major weights come 64 columns at a time, those in int4 32.
const K_MAJOR_TILES: [(u32, u32); 7] = [(8, 8), (8, 16), (8, 32), (16, 16), (16, 32), (32, 16), (32, 32)];
const N_MAJOR_TILES: [(u32, u32); 3] = [(8, 64), (16, 64), (32, 64)];
const INT4_TILES: [(u32, u32); 5] = [(8, 32), (8, 64), (16, 32), (16, 64), (32, 32)];

/// What a lane's 16 bytes of weights hold, and what it needs of x beside them.
struct Piece {
    /// Columns of z.
    columns: u32,
    /// Numbers along K of each.
    k: u32,
    /// Pieces of gate (and of up) that are loaded together.
    rows: u32,
}

const fn piece(problem: &Problem) -> Piece {
    match (problem.dtype.weights(), problem.weight_major) {
        (Format::E4m3, _) => Piece { columns: 1, k: 16, rows: 1 },
        (Format::Int4, _) => Piece { columns: 4, k: 8, rows: 1 },
        (_, WeightMajor::K) => Piece { columns: 1, k: 8, rows: 1 },
        (_, WeightMajor::N) => Piece { columns: 8, k: 4, rows: 4 },
    }
}

impl MmaDirectConfig {
    /// Threads per block.
    pub const fn threads(&self) -> u32 {
        32 * self.warps
    }

    /// Shared memory: both sums of every element, of every warp.
    pub const fn smem_bytes(&self) -> u32 {
        self.warps * 2 * self.block_m * self.block_n * 4
    }

    pub(super) fn launch_shape(&self) -> LaunchShape {
        LaunchShape {
            block_m: self.block_m,
            block_n: self.block_n,
            cluster: 1,
            per_sm: None,
            threads: self.threads(),
            smem_bytes: self.smem_bytes(),
            // Blocks run along N: nearly always there is one tile along M.
            raster: Raster::AlongN,
            raster_group: 1,
            access_bytes: MAX_ACCESS_BYTES,
        }
    }

    pub(super) fn check(&self, problem: &Problem, arch: &ArchSpec) -> Result<(), Rejected> {
        let &Self { block_m, block_n, warps, loads, .. } = self;
        let sizes = [block_m, block_n, warps, loads];
        check_sizes(&sizes, 256)?;
        ensure(arch.has_cp_async, "mma_direct needs compute capability 8.0", || format!("{arch} is older"))?;
        let x = problem.dtype.x();
        ensure(matches!(x, Format::F16 | Format::Bf16), "mma_direct multiplies fp16 or bf16", || {
            format!("{} asked for", problem.dtype)
        })?;
        let major = match problem.dtype.weights() {
            Format::E4m3 => Some(WeightMajor::K),
            Format::Int4 => Some(WeightMajor::N),
            Format::F32 | Format::F16 | Format::Bf16 => None,
        };
        ensure(
            major.is_none_or(|major| major == problem.weight_major),
            "e4m3 weights are k_major, int4 ones n_major (words of eight along K)",
            || format!("{} {}", problem.weight_major, problem.dtype),
        )?;
        let piece = piece(problem);
        ensure(
            block_m.is_multiple_of(8) && block_n.is_multiple_of(8 * piece.columns),
            "a block holds whole fragments of weights and tokens",
            || format!("{block_m}x{block_n} with {} columns at a time", 8 * piece.columns),
        )?;
        // Rows may be longer than the matrix is wide: what lies beyond must not be read.
        ensure(
            problem.k.is_multiple_of(piece.k.max(8)) && problem.n.is_multiple_of(8),
            "accesses end with the rows",
            || format!("k {}, n {}", problem.k, problem.n),
        )?;
        let scaled = problem.dtype.is_scaled();
        ensure(!scaled || loads.is_power_of_two(), "a step lies in one group of scales, or is whole groups", || {
            format!("{loads} loads")
        })?;
        check_fast_silu(self.fast_silu, problem)?;
        check_block(&self.launch_shape(), problem, arch)?;
        // Two steps are held: one is multiplied, the next is on its way.
        let weights = 2 * 4 * piece.rows * (block_n / (8 * piece.columns));
        let x = piece.k / 2 * (block_m / 8);
        let sums = block_m * block_n / 16;
        let (sums, other) = match problem.dtype.weights() {
            // The sums of a group, both kinds of scales, the widened fragments.
            Format::Int4 => (2 * sums, 2 * 4 * (block_n / 32) * loads.div_ceil(4) + 50),
            Format::E4m3 => (sums, 50),
            Format::F32 | Format::F16 | Format::Bf16 => (sums, 34),
        };
        check_registers(sums, 2 * loads * (weights + x) + other, self.threads(), arch)
    }
}

pub(super) fn space(problem: &Problem) -> impl Iterator<Item = MmaDirectConfig> + use<> {
    let tiles: &'static [(u32, u32)] = match (problem.dtype.weights(), problem.weight_major) {
        (Format::Int4, _) => &INT4_TILES,
        (_, WeightMajor::K) => &K_MAJOR_TILES,
        (_, WeightMajor::N) => &N_MAJOR_TILES,
    };
    let fast_silu = problem.dtype.output() == Format::Bf16;
    tiles.iter().flat_map(move |&(block_m, block_n)| {
        [4, 8, 16].into_iter().flat_map(move |warps| {
            [1, 2, 4, 8].map(|loads| MmaDirectConfig { block_m, block_n, warps, loads, fast_silu })
        })
    })
}

/// Preferred configs when nothing was tuned, best first.
pub(super) fn defaults(problem: &Problem) -> [MmaDirectConfig; 2] {
    let block_m = match problem.m {
        0..=8 => 8,
        9..=16 => 16,
        _ => 32,
    };
    let fast_silu = problem.dtype.output() == Format::Bf16;
    let narrow = MmaDirectConfig { block_m, block_n: 16, warps: 8, loads: 2, fast_silu };
    match problem.dtype.weights() {
        Format::Int4 if block_m < 32 => [4, 2].map(|loads| MmaDirectConfig { block_n: 32, loads, ..narrow }),
        Format::Int4 => [2, 1].map(|loads| MmaDirectConfig { block_n: 32, loads, ..narrow }),
        Format::E4m3 => [2, 1].map(|loads| MmaDirectConfig { loads, ..narrow }),
        Format::F32 | Format::F16 | Format::Bf16 => [narrow, MmaDirectConfig { block_n: 64, loads: 1, ..narrow }],
    }
}

impl fmt::Display for MmaDirectConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { block_m, block_n, warps, loads, fast_silu } = self;
        let fast_silu = if *fast_silu { " fast_silu" } else { "" };
        write!(f, "mma_direct {block_m}x{block_n} warps {warps} loads {loads}{fast_silu}")
    }
}
