//! `weight_only_tma`: for few tokens and weights in 8 or 4 bits. A TMA ring feeds warps that widen the weights in registers and
//! multiply by `mma.sync`; compute capability 9.0 to 10.3, whose shared memory it fills.
//!
//! Design: `docs/kernels/weight_only_tma.md`. Template: `templates/weight_only_tma/kernel.cu.tera`.

use super::wgmma_tma::{check_room, smem_budget, stages_that_fit};
use super::{
    LaunchShape, Raster, Rejected, check_block, check_fast_silu, check_registers, check_sizes, ensure, narrowest_wave,
};
use crate::arch::ArchSpec;
use crate::problem::{DType, Format, INT4_GROUP, MAX_ACCESS_BYTES, Problem, WeightMajor};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A point of the `weight_only_tma` space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WeightOnlyTmaConfig {
    /// Tokens per block; the last ones may be missing.
    pub block_m: u32,
    /// Columns of z per block.
    pub block_n: u32,
    /// Warps side by side along N; one more warp feeds them all.
    pub warps_n: u32,
    /// Groups of such warps, which take the K tiles in turn.
    pub warps_k: u32,
    /// 1: a warp of its own puts x in the order of the weights; 0: each warp that multiplies does so for itself.
    #[serde(default)]
    pub order_warps: u32,
    /// K tiles in flight between global and shared memory.
    pub stages: u32,
    /// Blocks that fit on one multiprocessor.
    pub blocks_per_sm: u32,
    /// K tiles of the weights that a block asks into L2 before the launch ahead of it has ended.
    pub prefetch: u32,
    /// silu by one `tanh.approx` instead of `ex2` and `rcp`; accurate enough for bf16 only.
    pub fast_silu: bool,
}

/// Bytes of a number of x and of a scale of int4.
const TOKEN_BYTES: u32 = 2;

/// A stage's barriers: full, empty, and x that is to be put in order.
const BARRIER_BYTES: u32 = 3 * 8;

/// Columns of gate (and of up) that the four lanes of a row and the eight rows of a fragment read at a time.
const fn columns_at_a_time(weights: Format) -> u32 {
    match weights {
        Format::Int4 => 32,
        _ => 8,
    }
}

impl WeightOnlyTmaConfig {
    /// Numbers along K of a stage: 128 bytes of an e4m3 row, a group of int4.
    pub const BLOCK_K: u32 = INT4_GROUP;

    /// Threads per block.
    pub const fn threads(&self) -> u32 {
        32 * (self.warps_n * self.warps_k + 1 + self.order_warps)
    }

    /// Bytes of gate, or of up, in a stage.
    const fn half_bytes(&self, weights: Format) -> u32 {
        self.block_n * Self::BLOCK_K * weights.bytes() / weights.numbers()
    }

    /// Bytes of a stage: x, gate, up and the scales of int4. Swizzled boxes begin at 1024 bytes, scales at 128.
    const fn stage_bytes(&self, weights: Format) -> u32 {
        let scales = match weights {
            Format::Int4 => (self.block_n * TOKEN_BYTES).next_multiple_of(128),
            _ => 0,
        };
        let x = self.block_m * Self::BLOCK_K * TOKEN_BYTES;
        // Of each token what its sums begin with; of fp16, where that is nothing, the room is left.
        let surplus = if matches!(weights, Format::Int4) && self.order_warps > 0 { self.block_m * 4 } else { 0 };
        (x + 2 * self.half_bytes(weights) + 2 * scales + surplus).next_multiple_of(1024)
    }

    /// Shared memory: the ring, in whose place the sums meet at the end (their rows up to four numbers apart), and three barriers
    /// a stage.
    pub const fn smem_bytes(&self, weights: Format) -> u32 {
        let ring = self.stages * self.stage_bytes(weights);
        let sums = self.warps_k * 2 * self.block_m * (self.block_n + 4) * 4;
        (if ring > sums { ring } else { sums }) + BARRIER_BYTES * self.stages
    }

    pub(super) fn launch_shape(&self, problem: &Problem) -> LaunchShape {
        LaunchShape {
            block_m: self.block_m,
            block_n: self.block_n,
            cluster: 1,
            per_sm: None,
            threads: self.threads(),
            smem_bytes: self.smem_bytes(problem.dtype.weights()),
            // Blocks run along N: nearly always there is one tile along M.
            raster: Raster::AlongN,
            raster_group: 1,
            access_bytes: MAX_ACCESS_BYTES,
        }
    }

    pub(super) fn check(&self, problem: &Problem, arch: &ArchSpec) -> Result<(), Rejected> {
        let &Self { block_m, block_n, warps_n, warps_k, order_warps, stages, blocks_per_sm, prefetch, .. } = self;
        let sizes = [block_m, block_n, warps_n, warps_k, order_warps.max(1), stages, blocks_per_sm, prefetch.max(1)];
        check_sizes(&sizes, 256)?;
        ensure(arch.has_tma, "weight_only_tma needs compute capability 9.0", || format!("{arch} is older"))?;
        let weights = problem.dtype.weights();
        let major = match (problem.dtype.x(), weights) {
            (Format::F16 | Format::Bf16, Format::E4m3) => Some(WeightMajor::K),
            (_, Format::Int4) => Some(WeightMajor::N),
            _ => None,
        };
        ensure(major.is_some(), "weight_only_tma multiplies e4m3 or int4 weights by fp16 or bf16 tokens", || {
            format!("{} asked for", problem.dtype)
        })?;
        ensure(
            major == Some(problem.weight_major),
            "e4m3 weights are k_major, int4 ones n_major (words of eight along K)",
            || format!("{} {}", problem.weight_major, problem.dtype),
        )?;
        ensure(problem.k > 0, "weight_only_tma needs K of at least 1", || "k is 0".into())?;
        let columns = columns_at_a_time(weights);
        ensure(
            block_m.is_multiple_of(8) && block_n.is_multiple_of(warps_n * columns),
            "a warp holds whole fragments of weights and tokens",
            || format!("{block_m}x{block_n} by {warps_n} warps of {columns} columns at a time"),
        )?;
        ensure(order_warps <= 1, "one warp puts x in order, or none", || format!("{order_warps} of them"))?;
        ensure(
            order_warps == 0 || block_m == 8 || block_m.is_multiple_of(16),
            "a warp that puts x in order takes half of 8 tokens, or 16, at a time",
            || format!("block_m {block_m}"),
        )?;
        ensure(stages >= 2 && stages.is_multiple_of(warps_k), "a stage belongs to one group of warps", || {
            format!("{stages} stages, {warps_k} groups")
        })?;
        check_room(blocks_per_sm, self.smem_bytes(weights), arch)?;
        check_fast_silu(self.fast_silu, problem)?;
        check_block(&self.launch_shape(problem), problem, arch)?;
        let sums = block_m * block_n / warps_n / 16;
        // Measured with NVRTC 13.0. Of int4 the sums of a group stand beside those of all.
        let (sums, other) = match weights {
            Format::Int4 => (2 * sums, 58 + 3 * block_m / 8),
            _ => (sums, 60 + 6 * block_m / 8),
        };
        // Each of a multiprocessor's four parts holds whole warps.
        check_registers(sums, other, (self.threads() * blocks_per_sm).next_multiple_of(128), arch)
    }
}

/// block_n, columns of a warp. Which width shares the columns out evenly depends on N; the wider a warp, the fewer times x is read
/// and put in order.
const TILES: [(u32, u32); 10] =
    [(32, 32), (64, 32), (96, 32), (128, 32), (160, 32), (192, 32), (224, 32), (256, 32), (56, 56), (112, 16)];

/// Warps of a multiprocessor that multiply: enough to hide what each waits for, and registers for all.
const WARPS_PER_SM: std::ops::RangeInclusive<u32> = 4..=16;

/// Groups of warps that take the K tiles in turn.
const WARPS_K: [u32; 5] = [1, 2, 3, 4, 8];

/// Tokens of a block: all of them, up to 32.
const fn block_m(problem: &Problem) -> u32 {
    match problem.m {
        0..=8 => 8,
        9..=16 => 16,
        _ => 32,
    }
}

/// A tile, and its warps along N, along K and for x, with the most stages that fit.
fn tile(
    dtype: DType,
    [block_m, block_n]: [u32; 2],
    [warps_n, warps_k, order_warps]: [u32; 3],
    blocks_per_sm: u32,
) -> WeightOnlyTmaConfig {
    let weights = dtype.weights();
    let none = WeightOnlyTmaConfig {
        block_m,
        block_n,
        warps_n,
        warps_k,
        order_warps,
        stages: 0,
        blocks_per_sm,
        prefetch: 0,
        fast_silu: dtype.output() == Format::Bf16,
    };
    let stages = stages_that_fit(smem_budget(blocks_per_sm), 0, none.stage_bytes(weights) + BARRIER_BYTES, 16);
    // What wgmma_tma found best: 100 KiB a multiprocessor; 140 where the launch ahead has to end first.
    let ahead = if blocks_per_sm == 2 { 50 << 10 } else { 140 << 10 };
    WeightOnlyTmaConfig {
        stages: stages / warps_k * warps_k,
        prefetch: (ahead / (2 * none.half_bytes(weights))).max(1),
        ..none
    }
}

pub(super) fn space(problem: &Problem) -> impl Iterator<Item = WeightOnlyTmaConfig> + use<> {
    let dtype = problem.dtype;
    let tiles = [8, 16, 32].into_iter().flat_map(|block_m| TILES.map(|(block_n, columns)| (block_m, block_n, columns)));
    tiles.flat_map(move |(block_m, block_n, columns)| {
        let warps = WARPS_K.into_iter().flat_map(|warps_k| [1, 2].map(|blocks_per_sm| (warps_k, blocks_per_sm)));
        let enough =
            warps.filter(move |(warps_k, blocks)| WARPS_PER_SM.contains(&(block_n / columns * warps_k * blocks)));
        let all = enough.flat_map(|(warps_k, blocks)| [0, 1].map(|order_warps| (warps_k, order_warps, blocks)));
        all.map(move |(warps_k, order_warps, blocks_per_sm)| {
            tile(dtype, [block_m, block_n], [block_n / columns, warps_k, order_warps], blocks_per_sm)
        })
    })
}

/// Preferred configs when nothing was tuned, best first: one wave of blocks as narrow as it goes.
pub(super) fn defaults(problem: &Problem) -> [WeightOnlyTmaConfig; 2] {
    let block_n = narrowest_wave(problem.n, &[64, 128, 192]).unwrap_or(224);
    // Columns that all warps hold: what registers and stages allow.
    let columns = match problem.dtype.weights() {
        Format::Int4 if block_m(problem) == 32 => 224,
        Format::Int4 => 448,
        _ => 256,
    };
    let block_m = block_m(problem);
    // Of 32 tokens int4's sums leave the widest tile no registers for one warp more.
    let order_warps = u32::from(block_m <= 16);
    [block_n, 64].map(|block_n| {
        let most = WARPS_K.into_iter().rev().find(|warps_k| warps_k * block_n <= columns);
        tile(problem.dtype, [block_m, block_n], [block_n / 32, most.unwrap_or(1), order_warps], 1)
    })
}

impl fmt::Display for WeightOnlyTmaConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { block_m, block_n, warps_n, warps_k, order_warps, stages, blocks_per_sm, prefetch, fast_silu } = self;
        let fast_silu = if *fast_silu { " fast_silu" } else { "" };
        write!(
            f,
            "weight_only_tma {block_m}x{block_n} warps {warps_n}x{warps_k}+{order_warps} stages {stages} blocks {blocks_per_sm} \
             prefetch {prefetch}{fast_silu}"
        )
    }
}
