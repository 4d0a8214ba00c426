//! `wgmma_stream`: for few tokens. A TMA ring feeds one warpgroup that has the weights on the rows of `wgmma` and the tokens on its
//! columns, or 64 tokens on the rows; sm_90a, 16-bit weights along K.
//!
//! Design: `docs/kernels/wgmma_stream.md`. Template: `templates/wgmma_stream/kernel.cu.tera`.

use super::wgmma_tma::{check_blocks_per_sm, one, smem_budget, stages_that_fit, stream_prefetch, stream_prefetches};
use super::{
    LaunchShape, MULTIPROCESSORS, Raster, Rejected, check_block, check_fast_silu, check_sizes, ensure, narrowest_wave,
};
use crate::arch::ArchSpec;
use crate::problem::{DType, Format, MAX_ACCESS_BYTES, Problem, WeightMajor};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A point of the `wgmma_stream` space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WgmmaStreamConfig {
    /// Tokens per CTA: 8, 16 or 32, the columns of a product, or 64, its rows; the last ones may be missing.
    pub block_m: u32,
    /// Columns of z per CTA: as many rows of each weight.
    pub block_n: u32,
    /// K tiles in flight between global and shared memory.
    pub stages: u32,
    /// CTAs that share out the K tiles of one tile of z: each finishes half of it.
    pub cluster_k: u32,
    /// CTAs that fit on one multiprocessor.
    pub blocks_per_sm: u32,
    /// CTAs launched per multiprocessor, a launch parameter: fewer than fit leave room for the next launch to begin.
    #[serde(default = "one")]
    pub fill: u32,
    /// K tiles of the weights that a CTA asks into L2 before the launch ahead of it has ended; of static weights beyond those
    /// that are in its stages by then.
    pub prefetch: u32,
    /// Places along K at which CTAs begin in turn, so that not all ask for the same tokens at once; 1: all begin at the start.
    #[serde(default = "one")]
    pub stagger: u32,
    /// silu by one `tanh.approx` instead of `ex2` and `rcp`; accurate enough for bf16 only.
    pub fast_silu: bool,
}

/// Bytes of a row of a stage: one swizzle row.
const ROW_BYTES: u32 = 128;

/// Rows of weights of one product.
const PRODUCT_ROWS: u32 = 64;

impl WgmmaStreamConfig {
    /// Numbers along K of a stage.
    pub const BLOCK_K: u32 = ROW_BYTES / 2;

    /// Threads per CTA: a warpgroup that multiplies, a warp that loads weights and one that loads tokens.
    pub const THREADS: u32 = 128 + 64;

    /// Bytes of the weights of one K tile.
    const fn k_tile_bytes(&self) -> u32 {
        2 * self.block_n * ROW_BYTES
    }

    /// Whether the tokens fill the rows of a product: then they lie there, and the weights on its columns.
    pub const fn tokens_on_rows(&self) -> bool {
        self.block_m == PRODUCT_ROWS
    }

    /// Products side by side of each weight that has the rows.
    const fn row_blocks(&self) -> u32 {
        self.block_n.div_ceil(PRODUCT_ROWS)
    }

    /// Accumulators a thread.
    pub const fn accumulators(&self) -> u32 {
        if self.tokens_on_rows() { self.block_n } else { self.row_blocks() * self.block_m }
    }

    /// Shared memory: the ring, the rows that products read behind it, what a pair exchanges, two barriers a stage and two of the
    /// pair.
    pub const fn smem_bytes(&self) -> u32 {
        let ring = self.stages * (self.block_m + 2 * self.block_n) * ROW_BYTES;
        let rows = if self.tokens_on_rows() { 0 } else { PRODUCT_ROWS * self.row_blocks() };
        let spare = rows.saturating_sub(self.block_n + self.block_m) * ROW_BYTES;
        let parts = if self.cluster_k > 1 { 128 * self.accumulators() / 2 * 4 } else { 0 };
        ring + spare + parts + 16 * self.stages + 16
    }

    pub(super) fn launch_shape(&self) -> LaunchShape {
        LaunchShape {
            block_m: self.block_m,
            block_n: self.block_n,
            cluster: self.cluster_k,
            per_sm: Some(self.fill),
            threads: Self::THREADS,
            smem_bytes: self.smem_bytes(),
            // Tiles that share weights follow each other: nearly always there is one along M.
            raster: Raster::AlongN,
            raster_group: 8,
            access_bytes: MAX_ACCESS_BYTES,
        }
    }

    pub(super) fn check(&self, problem: &Problem, arch: &ArchSpec) -> Result<(), Rejected> {
        let &Self { block_m, block_n, stages, cluster_k, blocks_per_sm, fill, prefetch, stagger, fast_silu } = self;
        check_sizes(&[block_m, block_n, stages, cluster_k, blocks_per_sm, fill, prefetch.max(1), stagger], 1024)?;
        ensure(arch.has_wgmma, "wgmma_stream needs compute capability 9.0", || format!("{arch} has none"))?;
        ensure(matches!(problem.dtype, DType::F16 | DType::Bf16), "wgmma_stream multiplies fp16 and bf16", || {
            format!("{} asked for", problem.dtype)
        })?;
        ensure(problem.weight_major == WeightMajor::K, "wgmma_stream reads weights along K", || {
            format!("{} asked for", problem.weight_major)
        })?;
        ensure(problem.k > 0, "wgmma_stream needs K of at least 1", || "k is 0".into())?;
        ensure(
            matches!(block_m, 8 | 16 | 32 | 64),
            "tokens are 8, 16 or 32 columns of a product, or its 64 rows",
            || format!("block_m {block_m}"),
        )?;
        ensure(
            block_n.is_multiple_of(8) && (16..=2 * PRODUCT_ROWS).contains(&block_n),
            "rows of weights are whole swizzle atoms, 16 to 128 of them",
            || format!("block_n {block_n}"),
        )?;
        ensure(cluster_k <= 2, "a cluster is at most a pair", || format!("cluster_k {cluster_k}"))?;
        ensure(stages >= 3, "at least 3 stages", || format!("{stages} stages"))?;
        // Measured with NVRTC 13.0; what is saved beside z takes registers too.
        let most = if blocks_per_sm == 2 || problem.op.saves_preactivations() { 64 } else { 128 };
        ensure(self.accumulators() <= most, "accumulators fit in registers", || {
            format!("{} accumulators a thread", self.accumulators())
        })?;
        check_blocks_per_sm((blocks_per_sm, fill), 1, self.smem_bytes(), arch)?;
        check_fast_silu(fast_silu, problem)?;
        check_block(&self.launch_shape(), problem, arch)
    }
}

/// block_n. Reading the weights once is all there is to do, and which width shares the columns out evenly depends on N, hence so
/// many.
const COLUMNS: [u32; 11] = [32, 40, 48, 56, 64, 72, 80, 88, 96, 112, 128];

/// A tile with the most stages that fit.
fn tile(dtype: DType, [block_m, block_n]: [u32; 2], cluster_k: u32, blocks_per_sm: u32) -> WgmmaStreamConfig {
    let none = WgmmaStreamConfig {
        block_m,
        block_n,
        stages: 0,
        cluster_k,
        blocks_per_sm,
        fill: 1,
        prefetch: 0,
        stagger: 2,
        fast_silu: dtype.output() == Format::Bf16,
    };
    let stage = WgmmaStreamConfig { stages: 1, ..none }.smem_bytes() - none.smem_bytes();
    let stages = stages_that_fit(smem_budget(blocks_per_sm), none.smem_bytes(), stage, 16);
    WgmmaStreamConfig { stages, prefetch: stream_prefetch(blocks_per_sm, none.k_tile_bytes()), ..none }
}

/// KiB of static weights asked into L2 beyond the stages.
const STATIC_PREFETCH_KIB: [u32; 4] = [0, 32, 64, 112];

/// stagger: measured on an H200, two places are up to 2.8 % ahead of one, and never more than 0.2 % behind, where a CTA has one tile
/// (of all tokens); where it has several, ahead or behind by as much as 3.6 %.
fn staggers(n: u32, tile: &WgmmaStreamConfig) -> &'static [u32] {
    let ctas = n.div_ceil(tile.block_n).saturating_mul(tile.cluster_k);
    if ctas <= MULTIPROCESSORS * tile.fill { &[2] } else { &[1, 2] }
}

pub(super) fn space(problem: &Problem) -> impl Iterator<Item = WgmmaStreamConfig> + use<> {
    let is_static = problem.op.has_static_weights();
    // Of static weights the whole multiprocessor's stages are full when the launch ahead ends.
    let blocks: &[(u32, u32)] = if is_static { &[(1, 1)] } else { &[(1, 1), (2, 1), (2, 2)] };
    let &Problem { dtype, n, .. } = problem;
    let sizes = [8, 16, 32, 64].into_iter().flat_map(|block_m| COLUMNS.map(|block_n| [block_m, block_n]));
    let tiles = sizes.flat_map(move |size| {
        let shares = [1, 2].into_iter().flat_map(move |cluster_k| blocks.iter().map(move |&of_sm| (cluster_k, of_sm)));
        shares.map(move |(cluster_k, (blocks_per_sm, fill))| WgmmaStreamConfig {
            fill,
            ..tile(dtype, size, cluster_k, blocks_per_sm)
        })
    });
    tiles.filter(|tile| tile.stages >= 4).flat_map(move |tile| {
        let prefetches = stream_prefetches(is_static, &STATIC_PREFETCH_KIB, tile.prefetch, tile.k_tile_bytes());
        let points = prefetches
            .into_iter()
            .flat_map(move |prefetch| staggers(n, &tile).iter().map(move |&stagger| (prefetch, stagger)));
        points.map(move |(prefetch, stagger)| WgmmaStreamConfig { prefetch, stagger, ..tile })
    })
}

/// Preferred configs when nothing was tuned, best first: all tokens, up to 64, and one wave of CTAs as narrow as it goes.
pub(super) fn defaults(problem: &Problem) -> [WgmmaStreamConfig; 2] {
    let block_m = problem.m.clamp(8, 64).next_power_of_two();
    [narrowest_wave(problem.n, &COLUMNS).unwrap_or(56), 56].map(|block_n| tile(problem.dtype, [block_m, block_n], 1, 1))
}

impl fmt::Display for WgmmaStreamConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { block_m, block_n, stages, cluster_k, blocks_per_sm, fill, prefetch, stagger, fast_silu } = self;
        let fast_silu = if *fast_silu { " fast_silu" } else { "" };
        write!(
            f,
            "wgmma_stream {block_m}x{block_n} stages {stages} cluster {cluster_k} blocks {fill}/{blocks_per_sm} \
             prefetch {prefetch} stagger {stagger}{fast_silu}"
        )
    }
}
