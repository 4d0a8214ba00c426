//! `wgmma_gemm`: the steps that are one GEMM, on the main loop of [`wgmma_tma`](super::wgmma_tma); sm_90a.
//!
//! Design: `docs/kernels/wgmma_gemm.md`. Template: `templates/wgmma_gemm/kernel.cu.tera`.

use super::wgmma_tma::{
    STATIC_PREFETCH_KIB, box_cols, check_blocks_per_sm, is_split, one, smem_budget, stages_that_fit, stream_prefetch,
    stream_prefetches,
};
use super::{LaunchShape, MULTIPROCESSORS, Raster, Rejected, Schedule, check_block, check_sizes, ensure};
use crate::arch::ArchSpec;
use crate::problem::{DType, Op, OperandMajor, Problem, Product};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A point of the `wgmma_gemm` space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WgmmaGemmConfig {
    /// Rows of the output per CTA.
    pub block_m: u32,
    /// Columns of the output per CTA: one wgmma.
    pub block_n: u32,
    /// Step along the sums: 128 bytes.
    pub block_k: u32,
    /// Columns of the tiles that a last wave of few is cut into, so that more multiprocessors share it: 64, or 0 for none.
    #[serde(default)]
    pub tail_n: u32,
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
    /// CTAs that share out the sums of one tile: 2 or 4, for few tokens and where an output is few tiles.
    #[serde(default = "one")]
    pub cluster_k: u32,
    /// Columns of one asynchronous store.
    pub store_cols: u32,
    /// Stores in flight per warp; of `dgated` slots for its pre-activations, which two warps that take turns share.
    pub store_buffers: u32,
    /// CTAs that fit on one multiprocessor: 2 for few tokens.
    #[serde(default = "one")]
    pub blocks_per_sm: u32,
    /// CTAs launched per multiprocessor, a launch parameter: fewer than fit leave room for the next launch to begin.
    #[serde(default = "one")]
    pub fill: u32,
    /// Steps of the right operand that a CTA asks into L2 before the launch ahead of it has ended: for weights.
    #[serde(default)]
    pub prefetch: u32,
    /// Walk over the tiles; a launch parameter, not a constant of the source.
    pub raster: Raster,
    /// Clusters walked side by side; a launch parameter.
    pub raster_group: u32,
}

/// Columns of the tiles that a last wave is cut into: one box.
const TAIL_COLUMNS: u32 = 64;

/// Beside the usual orders narrow bands, which keep less of both operands in L2: long sums.
const ORDERS: [(Raster, u32); 4] = [(Raster::AlongM, 8), (Raster::AlongN, 8), (Raster::AlongM, 4), (Raster::AlongN, 4)];

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

/// The same for fp32 in parts, whose sums take twice the registers.
const SPLIT_TILES: [(Schedule, u32, u32, u32); 10] = [
    (Schedule::Pingpong, 64, 64, 2),
    (Schedule::Pingpong, 64, 128, 2),
    (Schedule::Pingpong, 64, 192, 2),
    (Schedule::Pingpong, 128, 64, 2),
    (Schedule::Pingpong, 128, 96, 2),
    (Schedule::Cooperative, 128, 128, 2),
    (Schedule::Cooperative, 128, 160, 2),
    (Schedule::Cooperative, 128, 176, 2),
    (Schedule::Cooperative, 128, 192, 2),
    (Schedule::Cooperative, 256, 96, 2),
];

impl WgmmaGemmConfig {
    /// Threads per CTA.
    pub const fn threads(&self) -> u32 {
        128 * (1 + self.consumers)
    }

    /// Shared memory: the ring, the staging of loads and stores, their barriers, what a split of the sums exchanges.
    pub fn smem_bytes(&self, op: Op, dtype: DType) -> u32 {
        let ring = self.stages * self.block_k * (self.block_m + self.block_n) * dtype.bytes();
        let strip = 16 * self.store_cols * op.output_bytes(dtype);
        let staging = match op {
            Op::Dgated => {
                // Slots for gate and up, whose places dgate and dup take, a barrier each, and two strips of z.
                let warps = match self.schedule {
                    Schedule::Pingpong => 4, // two that take turns share theirs
                    Schedule::Cooperative => 4 * self.consumers,
                };
                warps * (self.store_buffers * (2 * strip + 8) + 2 * strip)
            }
            _ => 4 * self.consumers * self.store_buffers * strip,
        };
        let exchange = match self.cluster_k {
            0 | 1 => 0,
            // Of a warpgroup's rows, a barrier for its sums and one for each warpgroup that hands over.
            parts => (parts - 1) * self.block_m.min(64) * self.block_n * 4 + 8 * (1 + self.consumers),
        };
        ring + staging + exchange + 16 * self.stages
    }

    /// Columns of one box of a right operand whose columns are contiguous: a 128-byte or a 64-byte swizzle row.
    pub const fn right_cols(&self) -> u32 {
        box_cols(self.block_n)
    }

    /// Whether the last wave of so many tiles on so many clusters is cut up: `Walk` of the template decides alike.
    pub fn cuts(&self, tiles: u64, clusters: u64) -> bool {
        let (rest, parts) = (tiles % clusters.max(1), self.block_n.checked_div(self.tail_n));
        parts.is_some_and(|parts| rest > 0 && rest < tiles && rest * u64::from(parts) <= clusters)
    }

    pub(super) fn launch_shape(&self, problem: &Problem) -> LaunchShape {
        LaunchShape {
            block_m: self.block_m * self.cluster_m,
            block_n: self.block_n * self.cluster_n,
            cluster: self.cluster_m * self.cluster_n * self.cluster_k,
            per_sm: Some(self.fill),
            threads: self.threads(),
            smem_bytes: self.smem_bytes(problem.op, problem.dtype),
            raster: self.raster,
            raster_group: self.raster_group,
            access_bytes: 16,
        }
    }

    /// The first rule that is broken, in this order.
    pub(super) fn check(&self, problem: &Problem, arch: &ArchSpec) -> Result<(), Rejected> {
        let Some(product) = problem.product() else {
            return ensure(false, "the op is one GEMM", || problem.op.to_string());
        };
        check_sizes(&self.sizes(), 1024)?;
        self.check_problem(problem, &product, arch)?;
        self.check_tile(problem.dtype, &product)?;
        self.check_registers(problem)?;
        self.check_cluster(problem)?;
        self.check_tail(problem.op, problem.dtype)?;
        self.check_buffers(problem)?;
        let smem_bytes = self.smem_bytes(problem.op, problem.dtype);
        check_blocks_per_sm((self.blocks_per_sm, self.fill), self.consumers, smem_bytes, arch)?;
        check_block(&self.launch_shape(problem), problem, arch)
    }

    /// What has to be positive and small, so that no rule overflows.
    fn sizes(&self) -> [u32; 14] {
        [
            self.block_m,
            self.block_n,
            self.block_k,
            self.stages,
            self.consumers,
            self.cluster_m,
            self.cluster_n,
            self.cluster_k,
            self.store_cols,
            self.store_buffers,
            self.blocks_per_sm,
            self.fill,
            self.prefetch.max(1), // 0: none
            self.raster_group,
        ]
    }

    /// What the family multiplies, and where.
    fn check_problem(&self, problem: &Problem, product: &Product, arch: &ArchSpec) -> Result<(), Rejected> {
        ensure(arch.has_wgmma, "wgmma_gemm needs compute capability 9.0", || format!("{arch} has none"))?;
        ensure(
            matches!(problem.dtype, DType::F32 | DType::F16 | DType::Bf16),
            "wgmma_gemm multiplies fp16, bf16, and fp32 in two parts",
            || format!("{} asked for", problem.dtype),
        )?;
        ensure(
            !is_split(problem.dtype) || (self.consumers > 1 && problem.op != Op::Dgated),
            "parts are for the plain products of many tokens",
            || format!("{} with {} consumers", problem.op, self.consumers),
        )?;
        ensure(product.depth > 0, "wgmma_gemm needs sums of at least 1", || "their length is 0".into())
    }

    /// The tile of one CTA, the boxes it is loaded in, and how warpgroups share it.
    fn check_tile(&self, dtype: DType, product: &Product) -> Result<(), Rejected> {
        let &Self { block_m, block_n, block_k, consumers, schedule, .. } = self;
        ensure(block_k * dtype.bytes() == 128, "a step is 128 bytes", || format!("block_k {block_k}"))?;
        ensure(
            block_n.is_multiple_of(16) && (32..=256).contains(&block_n),
            "the columns are one wgmma of at most 256",
            || format!("block_n {block_n}"),
        )?;
        ensure(
            product.right == OperandMajor::Depth || is_split(dtype) || block_n.is_multiple_of(32),
            "columns that are contiguous in the right operand load in boxes of 64 or 32",
            || format!("block_n {block_n}"),
        )?;
        schedule.check_consumers(consumers, 2)?;
        schedule.check_rows(block_m, consumers)
    }

    /// What would spill.
    fn check_registers(&self, problem: &Problem) -> Result<(), Rejected> {
        // Measured with NVRTC 13.0: more accumulators spill, and ptxas then serialises wgmma.
        let most = match problem.op {
            _ if self.blocks_per_sm == 2 || is_split(problem.dtype) => 96,
            Op::Dgated => 192,
            _ => 208,
        };
        let accumulators = self.schedule.row_blocks(self.block_m, self.consumers) * self.block_n / 2;
        ensure(accumulators <= most, "accumulators fit in registers", || {
            format!("{accumulators} accumulators a thread")
        })
    }

    /// CTAs that share an operand, or the sums of one tile, and the tiles of few tokens that ask for these.
    fn check_cluster(&self, problem: &Problem) -> Result<(), Rejected> {
        let &Self { block_m, consumers, schedule, cluster_m, cluster_n, cluster_k, .. } = self;
        // 132 multiprocessors are 66 pairs; larger clusters leave some idle.
        ensure(
            cluster_m * cluster_n <= 2 && block_m.is_multiple_of(16 * cluster_n),
            "a pair shares an operand, not more",
            || format!("{cluster_m}x{cluster_n} with block_m {block_m}"),
        )?;
        ensure(consumers > 1 || problem.op.is_down(), "tiles of few tokens are for the down projection", || {
            format!("1 consumer in {}", problem.op)
        })?;
        ensure(
            cluster_k == 1 || (matches!(cluster_k, 2 | 4) && cluster_m * cluster_n == 1 && consumers <= cluster_k),
            "two or four split the sums of a tile",
            || format!("cluster {cluster_m}x{cluster_n}x{cluster_k} with {consumers} consumers"),
        )?;
        ensure(
            cluster_k == 1
                || (schedule == Schedule::Cooperative && block_m <= 64 * consumers && is_plain_product(problem)),
            "sums that are split are of one 64-row block a warpgroup, of the plain products in 16 bits",
            || format!("{schedule} {block_m} rows of {consumers} consumers, {}", problem.op),
        )
    }

    /// Whether its tiles can have narrower ones for a last wave.
    fn check_tail(&self, op: Op, dtype: DType) -> Result<(), Rejected> {
        let &Self { block_n, tail_n, consumers, cluster_k, schedule, .. } = self;
        if tail_n == 0 {
            return Ok(());
        }
        ensure(
            tail_n == TAIL_COLUMNS && block_n > tail_n && block_n.is_multiple_of(tail_n),
            "a last wave is cut into boxes of 64 columns",
            || format!("tail_n {tail_n} of block_n {block_n}"),
        )?;
        ensure(
            consumers > 1 && cluster_k == 1 && !is_split(dtype),
            "a last wave is cut of tiles for many tokens, in 16 bits, whose sums are not split",
            || format!("{consumers} consumers, cluster_k {cluster_k}, {dtype}"),
        )?;
        // Some cooperative tiles spill 72 bytes for it (NVRTC 13.0).
        ensure(
            op != Op::Dgated || schedule == Schedule::Pingpong,
            "dgated has registers for a second epilogue where tiles are taken in turns",
            || format!("tail_n {tail_n}, {schedule}"),
        )
    }

    /// What waits in shared memory: strips of the stores, stages, and pre-activations in slots.
    fn check_buffers(&self, problem: &Problem) -> Result<(), Rejected> {
        let &Self { block_n, stages, store_cols, store_buffers, .. } = self;
        ensure(
            block_n.is_multiple_of(store_cols)
                && store_cols.is_multiple_of(8)
                && matches!(store_cols * problem.op.output_bytes(problem.dtype), 32 | 64 | 128),
            "a store is whole boxes of 32, 64 or 128 bytes",
            || format!("store_cols {store_cols} of {block_n}"),
        )?;
        ensure(stages >= 2, "at least 2 stages", || format!("{stages} stages"))?;
        ensure(problem.op != Op::Dgated || store_buffers >= 2, "pre-activations arrive while others are used", || {
            format!("store_buffers {store_buffers}")
        })
    }
}

/// Whether nothing comes between the sums, in 16 bits, and what is stored.
fn is_plain_product(problem: &Problem) -> bool {
    problem.op != Op::Dgated && !is_split(problem.dtype)
}

/// A tile with `buffers` for its stores.
fn tile(
    op: Op,
    dtype: DType,
    (schedule, block_m, block_n, consumers): (Schedule, u32, u32, u32),
    buffers: u32,
) -> WgmmaGemmConfig {
    // Narrower strips leave room for more of them.
    let widest = if op == Op::Dgated { 64 } else { 128 };
    let cols = [128, 64, 32].into_iter().filter(|&bytes| bytes <= widest).map(|bytes| bytes / op.output_bytes(dtype));
    let config = WgmmaGemmConfig {
        block_m,
        block_n,
        block_k: 128 / dtype.bytes(),
        tail_n: 0,
        stages: 0,
        consumers,
        schedule,
        cluster_m: 1,
        cluster_n: 1,
        cluster_k: 1,
        store_cols: cols.into_iter().find(|&cols| block_n.is_multiple_of(cols)).unwrap_or(block_n),
        store_buffers: buffers,
        blocks_per_sm: 1,
        fill: 1,
        // Parts are written by the launch right before: there is nothing to ask for meanwhile.
        prefetch: if has_weight(op) && !is_split(dtype) { 4 } else { 0 },
        raster: Raster::AlongN,
        raster_group: 8,
    };
    let config = config.with_most_stages(op, dtype, 8);
    // Two parts of a tile gain nothing (docs/kernels/wgmma_gemm.md).
    let cut = WgmmaGemmConfig { tail_n: TAIL_COLUMNS, ..config };
    if block_n > 2 * TAIL_COLUMNS && cut.check_tail(op, dtype).is_ok() { cut } else { config }
}

/// Whether the right operand is a weight, which no launch ahead has written.
const fn has_weight(op: Op) -> bool {
    matches!(op, Op::Down | Op::DownStatic | Op::DownInputGrad | Op::Dgated | Op::InputGrad)
}

impl WgmmaGemmConfig {
    /// As many stages as fit, up to `most`.
    fn with_most_stages(self, op: Op, dtype: DType, most: u32) -> Self {
        let none = Self { stages: 0, ..self }.smem_bytes(op, dtype);
        let stage = Self { stages: 1, ..self }.smem_bytes(op, dtype) - none;
        Self { stages: stages_that_fit(smem_budget(self.blocks_per_sm), none, stage, most), ..self }
    }

    /// Bytes of a step of the right operand.
    const fn step_bytes(&self) -> u32 {
        self.block_n * 128
    }
}

/// Numbers of a weight's gradient beyond which tiles of 128 x 128 are more than two a multiprocessor.
const FEW_NUMBERS: u64 = 2 * MULTIPROCESSORS as u64 * 128 * 128;

/// block_n, cluster_k of the tiles for an output of few: both warpgroups on one, and two CTAs on its sums. No four: clusters of four
/// leave multiprocessors idle.
const LONE_TILES: [(u32, u32); 5] = [(128, 1), (192, 1), (64, 2), (128, 2), (192, 2)];

fn lone_tile(problem: &Problem, (block_n, cluster_k): (u32, u32)) -> WgmmaGemmConfig {
    let (op, dtype) = (problem.op, problem.dtype);
    let lone = tile(op, dtype, (Schedule::Cooperative, 128, block_n, 2), 1);
    // For outputs of few tiles, where there is no last wave.
    WgmmaGemmConfig { cluster_k, tail_n: 0, ..lone }.with_most_stages(op, dtype, 8)
}

/// Whether a problem of these sizes can have few; at some M, where M is a size of the output.
fn may_be_few(problem: &Problem) -> bool {
    let numbers = |it: Product| (u64::from(it.rows) * u64::from(it.cols)).saturating_mul(it.outputs().into());
    (problem.product().map_or(0, numbers) <= FEW_NUMBERS || !problem.sums_over_m()) && is_plain_product(problem)
}

/// What fills the multiprocessors best, of as many tiles of 128 x 128 (docs/kernels/wgmma_gemm.md).
fn default_of_few(problem: &Problem) -> Option<WgmmaGemmConfig> {
    const PAIRS: u64 = MULTIPROCESSORS as u64 / 2;
    let product = problem.product().filter(|_| may_be_few(problem))?;
    let tiles = u64::from(product.rows.div_ceil(128)) * u64::from(product.cols.div_ceil(128));
    let shape = match tiles * u64::from(product.outputs()) {
        0..=32 => (64, 2),
        it if it <= PAIRS => (128, 2),
        it if it <= 2 * PAIRS => (128, 1),
        _ => return None,
    };
    Some(lone_tile(problem, shape))
}

/// Columns of the tiles for few tokens. Which share the output out evenly depends on K, hence so many.
const STREAM_COLUMNS: [u32; 7] = [32, 48, 64, 80, 96, 112, 128];

/// cluster_n, cluster_k of tiles of 16 rows, and of 64.
const STREAM_CLUSTERS: [(u32, &[(u32, u32)]); 2] =
    [(16, &[(1, 1), (1, 2), (1, 4)]), (64, &[(1, 1), (2, 1), (1, 2), (1, 4)])];

/// A tile for few tokens: all there is to do is to read the weights once.
fn stream_tile(block_m: u32, block_n: u32, (cluster_n, cluster_k): (u32, u32), blocks_per_sm: u32) -> WgmmaGemmConfig {
    // Of both 16-bit formats.
    let (op, dtype) = (Op::Down, DType::Bf16);
    let config = WgmmaGemmConfig {
        cluster_n,
        cluster_k,
        blocks_per_sm,
        ..tile(op, dtype, (Schedule::Cooperative, block_m, block_n, 1), 1)
    };
    let prefetch = stream_prefetch(blocks_per_sm, config.step_bytes());
    WgmmaGemmConfig { prefetch, ..config }.with_most_stages(op, dtype, 24)
}

/// Bytes on their way in a multiprocessor that memory's rate takes (docs/kernels/wgmma_tma.md).
const IN_FLIGHT_BYTES: u32 = 64 << 10;

fn stream_tiles(is_static: bool) -> impl Iterator<Item = WgmmaGemmConfig> {
    let shapes = STREAM_CLUSTERS.into_iter().flat_map(|(block_m, clusters)| {
        STREAM_COLUMNS
            .into_iter()
            .flat_map(move |block_n| clusters.iter().map(move |&cluster| (block_m, block_n, cluster)))
    });
    let tiles = shapes.flat_map(|(block_m, block_n, cluster)| {
        [(1, 1), (2, 1), (2, 2)].map(|(blocks_per_sm, fill)| WgmmaGemmConfig {
            fill,
            ..stream_tile(block_m, block_n, cluster, blocks_per_sm)
        })
    });
    let tiles = tiles.filter(|tile| tile.fill * tile.stages * tile.step_bytes() >= IN_FLIGHT_BYTES);
    tiles.flat_map(move |tile| {
        let prefetches =
            stream_prefetches(is_static, &STATIC_PREFETCH_KIB, tile.prefetch, tile.step_bytes()).into_iter();
        prefetches.map(move |prefetch| WgmmaGemmConfig { prefetch, ..tile })
    })
}

/// The numbers of store buffers worth a try: those that leave different numbers of stages, the larger of two equal ones.
fn tiles(op: Op, dtype: DType, shape: (Schedule, u32, u32, u32)) -> impl Iterator<Item = WgmmaGemmConfig> {
    let counts: &[u32] = if op == Op::Dgated { &[4, 3, 2] } else { &[2, 1] };
    let mut last = 0;
    counts.iter().map(move |&buffers| tile(op, dtype, shape, buffers)).filter(move |config| {
        let new = config.stages > last;
        last = last.max(config.stages);
        new && config.stages >= 3
    })
}

pub(super) fn space(problem: &Problem) -> impl Iterator<Item = WgmmaGemmConfig> + use<> {
    let (op, dtype) = (problem.op, problem.dtype);
    let shapes = if is_split(dtype) { SPLIT_TILES } else { TILES };
    let tiles = shapes.into_iter().flat_map(move |shape| tiles(op, dtype, shape)).flat_map(|tile| {
        [(2, 1), (1, 2), (1, 1)].map(|(cluster_m, cluster_n)| WgmmaGemmConfig { cluster_m, cluster_n, ..tile })
    });
    let problem = *problem;
    let lone =
        LONE_TILES.into_iter().filter(move |_| may_be_few(&problem)).map(move |shape| lone_tile(&problem, shape));
    let tiles = tiles
        .chain(lone)
        .flat_map(|tile| ORDERS.map(|(raster, raster_group)| WgmmaGemmConfig { raster, raster_group, ..tile }));
    let streams = stream_tiles(op.has_static_weights());
    tiles.chain(streams.filter(move |_| op.is_down() && !is_split(dtype)))
}

/// Preferred configs when nothing was tuned, best first.
pub(super) fn defaults(problem: &Problem) -> Vec<WgmmaGemmConfig> {
    let (op, dtype) = (problem.op, problem.dtype);
    let shapes = match problem.output().0 {
        0..=256 => [(128, 64), (128, 128)],
        _ if is_split(dtype) => [(128, 96), (128, 64)],
        _ => [(128, 192), (128, 128)],
    };
    let pair = |(block_m, block_n)| {
        let last = tiles(op, dtype, (Schedule::Pingpong, block_m, block_n, 2)).last();
        last.map(|tile| WgmmaGemmConfig { cluster_m: 2, ..tile })
    };
    let few = match problem.m {
        0..=16 => Some(16),
        17..=64 => Some(64),
        _ => None,
    };
    let stream = few.filter(|_| op.is_down() && !is_split(dtype)).map(|block_m| stream_tile(block_m, 64, (1, 2), 1));
    stream.into_iter().chain(default_of_few(problem)).chain(shapes.into_iter().filter_map(pair)).collect()
}

impl fmt::Display for WgmmaGemmConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "wgmma_gemm {} {}x{}x{} tail {} stages {} consumers {} cluster {}x{}x{} store {}x{} blocks {}/{} prefetch {} {} {}",
            self.schedule,
            self.block_m,
            self.block_n,
            self.block_k,
            self.tail_n,
            self.stages,
            self.consumers,
            self.cluster_m,
            self.cluster_n,
            self.cluster_k,
            self.store_cols,
            self.store_buffers,
            self.fill,
            self.blocks_per_sm,
            self.prefetch,
            self.raster,
            self.raster_group
        )
    }
}
