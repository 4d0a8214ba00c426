//! `wgmma_gemm`: the steps that are one GEMM, on the main loop of [`wgmma_tma`](super::wgmma_tma); sm_90a.
//!
//! Design: `docs/kernels/wgmma_gemm.md`. Template: `templates/wgmma_gemm/kernel.cu.tera`.

use super::wgmma_tma::{ORDERS, SMEM_BYTES, stages_that_fit};
use super::{LaunchShape, Raster, Rejected, Schedule, check_block, check_sizes, ensure};
use crate::arch::ArchSpec;
use crate::problem::{DType, Op, OperandMajor, Problem};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A point of the `wgmma_gemm` space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WgmmaGemmConfig {
    /// Rows of the output per CTA.
    pub block_m: u32,
    /// Columns of the output per CTA: one wgmma.
    pub block_n: u32,
    /// Step along the sums: 64 elements, 128 bytes.
    pub block_k: u32,
    /// Steps in flight between global and shared memory.
    pub stages: u32,
    /// Warpgroups that multiply; one more feeds them.
    pub consumers: u32,
    /// How they share the tiles.
    pub schedule: Schedule,
    /// CTAs along the rows that share the right operand by multicast.
    pub cluster_m: u32,
    /// CTAs along the columns that share the left operand by multicast.
    pub cluster_n: u32,
    /// Columns of one asynchronous store.
    pub store_cols: u32,
    /// Stores in flight per warp; for `dgated` also loads of pre-activations.
    pub store_buffers: u32,
    /// Walk over the tiles; a launch parameter, not a constant of the source.
    pub raster: Raster,
    /// Clusters walked side by side; a launch parameter.
    pub raster_group: u32,
}

/// schedule, block_m, block_n, consumers: the shapes that lead for the forward (docs/kernels/wgmma_tma.md).
const TILES: [(Schedule, u32, u32, u32); 10] = [
    (Schedule::Pingpong, 64, 64, 2),
    (Schedule::Pingpong, 64, 128, 2),
    (Schedule::Pingpong, 128, 64, 2),
    (Schedule::Pingpong, 128, 128, 2),
    (Schedule::Pingpong, 128, 160, 2),
    (Schedule::Pingpong, 128, 192, 2),
    (Schedule::Pingpong, 128, 208, 2),
    (Schedule::Cooperative, 128, 256, 2),
    (Schedule::Cooperative, 256, 128, 2),
    (Schedule::Cooperative, 256, 192, 2),
];

/// Bytes of both 16-bit formats.
const ELEMENT_BYTES: u32 = 2;

impl WgmmaGemmConfig {
    /// Threads per CTA.
    pub const fn threads(&self) -> u32 {
        128 * (1 + self.consumers)
    }

    /// Shared memory: the ring, the staging of loads and stores, their barriers.
    pub const fn smem_bytes(&self, op: Op) -> u32 {
        let ring = self.stages * self.block_k * (self.block_m + self.block_n) * ELEMENT_BYTES;
        let buffers = 4 * self.consumers * self.store_buffers;
        let strip = 16 * self.store_cols * output_bytes(op);
        let staging = match op {
            // dgate, dup and z, the first two in the places of gate and up; a barrier for their arrival.
            Op::Dgated => buffers * (3 * strip + 8),
            _ => buffers * strip,
        };
        ring + staging + 16 * self.stages
    }

    pub(super) fn launch_shape(&self, problem: &Problem) -> LaunchShape {
        LaunchShape {
            block_m: self.block_m * self.cluster_m,
            block_n: self.block_n * self.cluster_n,
            cluster: self.cluster_m * self.cluster_n,
            per_sm: Some(1),
            threads: self.threads(),
            smem_bytes: self.smem_bytes(problem.op),
            raster: self.raster,
            raster_group: self.raster_group,
            access_bytes: 16,
        }
    }

    pub(super) fn check(&self, problem: &Problem, arch: &ArchSpec) -> Result<(), Rejected> {
        let Some(product) = problem.product() else {
            return ensure(false, "the op is one GEMM", || problem.op.to_string());
        };
        let &Self {
            block_m, block_n, block_k, stages, consumers, cluster_m, cluster_n, store_cols, store_buffers, ..
        } = self;
        let sizes = [
            block_m,
            block_n,
            block_k,
            stages,
            consumers,
            cluster_m,
            cluster_n,
            store_cols,
            store_buffers,
            self.raster_group,
        ];
        check_sizes(&sizes, 1024)?;
        ensure(arch.has_wgmma, "wgmma_gemm needs compute capability 9.0", || format!("{arch} has none"))?;
        ensure(matches!(problem.dtype, DType::F16 | DType::Bf16), "wgmma_gemm multiplies fp16 or bf16", || {
            format!("{} asked for", problem.dtype)
        })?;
        ensure(product.depth > 0, "wgmma_gemm needs sums of at least 1", || "their length is 0".into())?;
        ensure(block_k * ELEMENT_BYTES == 128, "a step is 128 bytes", || format!("block_k {block_k}"))?;
        ensure(
            block_n.is_multiple_of(16) && (32..=256).contains(&block_n),
            "the columns are one wgmma of at most 256",
            || format!("block_n {block_n}"),
        )?;
        ensure(
            product.right == OperandMajor::Depth || block_n.is_multiple_of(64),
            "columns that are contiguous in the right operand load in boxes of 64",
            || format!("block_n {block_n}"),
        )?;
        self.schedule.check_consumers(consumers, 2)?;
        let whole = self.schedule.has_whole_blocks(block_m, consumers);
        ensure(whole && block_m <= 256, "a warpgroup holds whole 64-row blocks, a box at most 256 rows", || {
            format!("block_m {block_m}")
        })?;
        // Measured with NVRTC 13.0: more accumulators spill, and ptxas then serialises wgmma.
        let most = if problem.op == Op::Dgated { 192 } else { 208 };
        let accumulators = self.schedule.row_blocks(block_m, consumers) * block_n / 2;
        ensure(accumulators <= most, "accumulators fit in registers", || {
            format!("{accumulators} accumulators a thread")
        })?;
        // 132 multiprocessors are 66 pairs; larger clusters leave some idle.
        ensure(cluster_m * cluster_n <= 2, "a cluster is at most a pair", || format!("{cluster_m}x{cluster_n}"))?;
        ensure(
            block_n.is_multiple_of(store_cols)
                && store_cols.is_multiple_of(8)
                && matches!(store_cols * output_bytes(problem.op), 32 | 64 | 128),
            "a store is whole boxes of 32, 64 or 128 bytes",
            || format!("store_cols {store_cols} of {block_n}"),
        )?;
        ensure(stages >= 2, "at least 2 stages", || format!("{stages} stages"))?;
        ensure(problem.op != Op::Dgated || store_buffers >= 2, "pre-activations arrive while others are used", || {
            format!("store_buffers {store_buffers}")
        })?;
        check_block(&self.launch_shape(problem), problem, arch)
    }
}

/// Bytes of an output's element: sums that are added to are fp32.
const fn output_bytes(op: Op) -> u32 {
    if op.accumulates() { 4 } else { ELEMENT_BYTES }
}

/// A tile with `store_buffers` and the most stages that fit beside them.
fn tile(op: Op, (schedule, block_m, block_n, consumers): (Schedule, u32, u32, u32), buffers: u32) -> WgmmaGemmConfig {
    // Narrower strips leave room for more of them.
    let widest = if op == Op::Dgated { 64 } else { 128 };
    let cols = [128, 64, 32].into_iter().filter(|&bytes| bytes <= widest).map(|bytes| bytes / output_bytes(op));
    let config = WgmmaGemmConfig {
        block_m,
        block_n,
        block_k: 64,
        stages: 0,
        consumers,
        schedule,
        cluster_m: 1,
        cluster_n: 1,
        store_cols: cols.into_iter().find(|&cols| block_n.is_multiple_of(cols)).unwrap_or(block_n),
        store_buffers: buffers,
        raster: Raster::AlongN,
        raster_group: 8,
    };
    let stage = WgmmaGemmConfig { stages: 1, ..config }.smem_bytes(op) - config.smem_bytes(op);
    WgmmaGemmConfig { stages: stages_that_fit(SMEM_BYTES, config.smem_bytes(op), stage, 8), ..config }
}

/// The numbers of store buffers worth a try: those that leave different numbers of stages, the larger of two equal ones.
fn tiles(op: Op, shape: (Schedule, u32, u32, u32)) -> impl Iterator<Item = WgmmaGemmConfig> {
    let counts: &[u32] = if op == Op::Dgated { &[4, 3, 2] } else { &[2, 1] };
    let mut last = 0;
    counts.iter().map(move |&buffers| tile(op, shape, buffers)).filter(move |config| {
        let new = config.stages > last;
        last = last.max(config.stages);
        new && config.stages >= 3
    })
}

pub(super) fn space(problem: &Problem) -> impl Iterator<Item = WgmmaGemmConfig> + use<> {
    let op = problem.op;
    TILES.into_iter().flat_map(move |shape| tiles(op, shape)).flat_map(|tile| {
        [(2, 1), (1, 2), (1, 1)].into_iter().flat_map(move |(cluster_m, cluster_n)| {
            ORDERS.into_iter().map(move |(raster, raster_group)| WgmmaGemmConfig {
                cluster_m,
                cluster_n,
                raster,
                raster_group,
                ..tile
            })
        })
    })
}

/// Preferred configs when nothing was tuned, best first.
pub(super) fn defaults(problem: &Problem) -> Vec<WgmmaGemmConfig> {
    let op = problem.op;
    let few = problem.output().0 <= 256;
    let shapes = if few { [(128, 64), (128, 128)] } else { [(128, 192), (128, 128)] };
    let pair = |(block_m, block_n)| {
        let last = tiles(op, (Schedule::Pingpong, block_m, block_n, 2)).last();
        last.map(|tile| WgmmaGemmConfig { cluster_m: 2, ..tile })
    };
    shapes.into_iter().filter_map(pair).collect()
}

impl fmt::Display for WgmmaGemmConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "wgmma_gemm {} {}x{}x{} stages {} consumers {} cluster {}x{} store {}x{} {} {}",
            self.schedule,
            self.block_m,
            self.block_n,
            self.block_k,
            self.stages,
            self.consumers,
            self.cluster_m,
            self.cluster_n,
            self.store_cols,
            self.store_buffers,
            self.raster,
            self.raster_group
        )
    }
}
