//! `wgmma_tma`: TMA ring, warp-specialised producer and consumers, `wgmma`, persistent grid; sm_90a.
//!
//! Design: `docs/kernels/wgmma_tma.md`. Template: `templates/wgmma_tma/kernel.cu.tera`.

use super::{LaunchShape, Raster, Rejected, check_block, check_fast_silu, check_sizes, ensure};
use crate::arch::{ArchSpec, HOPPER};
use crate::problem::{DType, Format, Problem, UnknownName, WeightMajor, names};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How the consumer warpgroups share the tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// All consumers multiply one tile; its epilogue is exposed.
    Cooperative,
    /// Each of two consumers owns a tile; one's epilogue hides behind the other's products.
    Pingpong,
}

names!(Schedule, "schedule", Schedule::Cooperative => "cooperative", Schedule::Pingpong => "pingpong");

/// A point of the `wgmma_tma` space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WgmmaTmaConfig {
    /// Rows of z per CTA.
    pub block_m: u32,
    /// Columns of z per CTA; one wgmma covers twice as many (gate and up).
    pub block_n: u32,
    /// Step along K: one 128-byte swizzle row.
    pub block_k: u32,
    /// K tiles in flight between global and shared memory.
    pub stages: u32,
    /// Warpgroups that multiply; one more feeds them.
    pub consumers: u32,
    /// How they share the tiles.
    pub schedule: Schedule,
    /// CTAs along M that share the weights by multicast.
    pub cluster_m: u32,
    /// CTAs along N that share x by multicast.
    pub cluster_n: u32,
    /// CTAs that share out the K tiles of one tile of z.
    #[serde(default = "one")]
    pub cluster_k: u32,
    /// Columns of one asynchronous store.
    pub store_cols: u32,
    /// Stores in flight per warp.
    pub store_buffers: u32,
    /// CTAs that fit on one multiprocessor: 2 for few tokens.
    #[serde(default = "one")]
    pub blocks_per_sm: u32,
    /// CTAs launched per multiprocessor, a launch parameter: fewer than fit leave room for the next launch to begin.
    #[serde(default = "one")]
    pub fill: u32,
    /// K tiles of the weights that a CTA asks into L2 before the launch ahead of it has ended; of static weights beyond those
    /// that are in its stages by then.
    #[serde(default)]
    pub prefetch: u32,
    /// silu by one `tanh.approx` instead of `ex2` and `rcp`; accurate enough for bf16 only.
    pub fast_silu: bool,
    /// Walk over the tiles; a launch parameter, not a constant of the source.
    pub raster: Raster,
    /// Clusters across a band, of `resident` MiB of x; a launch parameter.
    pub raster_group: u32,
}

/// MiB of x that stay in L2: of 8, 16 and 33 MB none was better at all sizes (`docs/decisions/`, 20).
const RESIDENT_MIB: u32 = 16;

/// Tiles across a band, at most: a band's tiles are counted in 32 bits, and where rows are so short all of x stays anyhow.
const MOST_ACROSS: u64 = 256;

/// Bytes from which on gate's (or up's) matrix passes in a launch in [`Raster::Resident`]: with the other, beside x, it would not stay in an
/// L2 of 50 or 60 MB.
const LONG_WEIGHTS: u64 = 24 << 20;

/// Bytes of z from which on it passes: what comes next finds little of more in L2.
const LONG_Z: u64 = 48 << 20;

/// Whether the weights, and what is stored, pass through L2 in a launch of `m` rows: they are the first to leave it.
pub fn passing(problem: &Problem, raster: Raster, m: u32) -> (bool, bool) {
    let bytes =
        |rows: u32, columns: u32, format: Format| u64::from(rows) * u64::from(columns) * u64::from(format.bytes());
    let Problem { n, k, dtype, .. } = *problem;
    let is_resident = raster == Raster::Resident;
    (is_resident && bytes(n, k, dtype.weights()) > LONG_WEIGHTS, is_resident && bytes(m, n, dtype.output()) > LONG_Z)
}

pub(super) fn one() -> u32 {
    1
}

impl Schedule {
    /// How many warpgroups may share the tiles.
    pub(super) fn check_consumers(self, consumers: u32, most: u32) -> Result<(), Rejected> {
        ensure(
            (1..=most).contains(&consumers) && (self == Self::Cooperative || consumers == 2),
            "two consumers take turns",
            || format!("{consumers} consumers, {self}"),
        )
    }

    /// How many rows the warpgroups of a tile may have.
    pub(super) fn check_rows(self, block_m: u32, consumers: u32) -> Result<(), Rejected> {
        ensure(
            self.has_whole_blocks(block_m, consumers) && block_m <= 256,
            "a warpgroup holds whole 64-row blocks, a box at most 256 rows",
            || format!("block_m {block_m}"),
        )
    }

    /// Whether every warpgroup has whole 64-row blocks of `block_m` rows. One alone may have less: tiles of few tokens.
    const fn has_whole_blocks(self, block_m: u32, consumers: u32) -> bool {
        match self {
            Self::Cooperative if consumers == 1 => matches!(block_m, 16 | 32 | 64),
            Self::Cooperative => block_m.is_multiple_of(64 * consumers),
            Self::Pingpong => block_m.is_multiple_of(64),
        }
    }

    /// 64-row blocks that one warpgroup multiplies; of tiles with fewer rows the rest comes to nothing.
    pub(super) const fn row_blocks(self, block_m: u32, consumers: u32) -> u32 {
        match self {
            Self::Cooperative => block_m.div_ceil(64 * consumers),
            Self::Pingpong => block_m.div_ceil(64),
        }
    }
}

/// Stages of `stage` bytes that fit in `budget` beside `fixed` ones, up to `most`.
pub(super) fn stages_that_fit(budget: u32, fixed: u32, stage: u32, most: u32) -> u32 {
    (budget.saturating_sub(fixed) / stage).min(most)
}

/// schedule, block_m, block_n, consumers: what won somewhere on the H200 (docs/kernels/wgmma_tma.md).
const TILES: [(Schedule, u32, u32, u32); 16] = [
    (Schedule::Pingpong, 64, 64, 2),
    (Schedule::Pingpong, 64, 112, 2),
    (Schedule::Pingpong, 128, 32, 2),
    (Schedule::Pingpong, 128, 56, 2),
    (Schedule::Pingpong, 128, 64, 2),
    (Schedule::Pingpong, 128, 72, 2),
    (Schedule::Pingpong, 128, 80, 2),
    (Schedule::Pingpong, 128, 88, 2),
    (Schedule::Pingpong, 128, 96, 2),
    (Schedule::Pingpong, 128, 104, 2),
    (Schedule::Cooperative, 128, 112, 2),
    (Schedule::Cooperative, 128, 128, 2),
    (Schedule::Cooperative, 256, 64, 2),
    (Schedule::Cooperative, 256, 88, 2),
    (Schedule::Cooperative, 256, 96, 2),
    (Schedule::Cooperative, 256, 104, 2),
];

/// The same where fp32 takes sums over, which takes twice the registers: what won somewhere on the H200 for e4m3, and its
/// neighbours.
const PROMOTED_TILES: [(Schedule, u32, u32, u32); 11] = [
    (Schedule::Pingpong, 64, 64, 2),
    (Schedule::Pingpong, 64, 80, 2),
    (Schedule::Pingpong, 64, 96, 2),
    (Schedule::Pingpong, 128, 48, 2),
    (Schedule::Cooperative, 128, 56, 2),
    (Schedule::Cooperative, 128, 64, 2),
    (Schedule::Cooperative, 128, 80, 2),
    (Schedule::Cooperative, 128, 88, 2),
    (Schedule::Cooperative, 128, 96, 2),
    (Schedule::Cooperative, 192, 64, 3),
    (Schedule::Cooperative, 256, 48, 2),
];

/// Shared memory that the driver takes for every block.
pub(crate) const RESERVED_BYTES: u32 = 1024;

/// Whether fp32 takes over what the tensor cores have summed: e4m3, whose sums keep too few bits, and fp32 in parts of fp16.
const fn is_promoted(dtype: DType) -> bool {
    matches!(dtype.x(), Format::E4m3 | Format::F32)
}

/// Whether the kernel reads its operands cut in two, which a launch of its own does before. It turns N-major weights over.
pub const fn is_split(dtype: DType) -> bool {
    matches!(dtype, DType::F32)
}

/// Shared memory that each of the blocks of a multiprocessor may ask for on sm_90a.
pub(super) const fn smem_budget(blocks_per_sm: u32) -> u32 {
    (HOPPER.smem_per_block + RESERVED_BYTES) / blocks_per_sm - RESERVED_BYTES
}

/// Rules of blocks that share a multiprocessor: one consumer each, and room for all of them.
pub(super) fn check_blocks_per_sm(
    (blocks_per_sm, fill): (u32, u32),
    consumers: u32,
    smem_bytes: u32,
    arch: &ArchSpec,
) -> Result<(), Rejected> {
    ensure(
        blocks_per_sm == 1 || (blocks_per_sm == 2 && consumers == 1),
        "two small blocks share a multiprocessor",
        || format!("{blocks_per_sm} blocks of {consumers} consumers"),
    )?;
    ensure(fill <= blocks_per_sm, "no more blocks are launched than fit", || format!("{fill} of {blocks_per_sm}"))?;
    check_room(blocks_per_sm, smem_bytes, arch)
}

/// Rule of the shared memory of blocks that share a multiprocessor.
pub(super) fn check_room(blocks_per_sm: u32, smem_bytes: u32, arch: &ArchSpec) -> Result<(), Rejected> {
    let needed = u64::from(blocks_per_sm) * u64::from(smem_bytes + RESERVED_BYTES);
    ensure(
        needed <= u64::from(arch.smem_per_block + RESERVED_BYTES),
        "the stages of all blocks of a multiprocessor fit in its shared memory",
        || format!("{blocks_per_sm} blocks of {smem_bytes} bytes"),
    )
}

/// Columns of one box of a tile's contiguous columns in 16 bits: a 128-byte or a 64-byte swizzle row.
pub(super) const fn box_cols(block_n: u32) -> u32 {
    if block_n.is_multiple_of(64) { 64 } else { 32 }
}

impl WgmmaTmaConfig {
    /// Threads per CTA.
    pub const fn threads(&self) -> u32 {
        128 * (1 + self.consumers)
    }

    /// Shared memory: the ring, the staging of the stores, two barriers a stage, what a split along K exchanges, and every
    /// warp's scales of its columns where numbers have scales.
    pub const fn smem_bytes(&self, dtype: DType) -> u32 {
        let ring = self.stages * self.block_k * (self.block_m + 2 * self.block_n) * dtype.bytes();
        let staging = 4 * self.consumers * self.store_buffers * 16 * self.store_cols * dtype.output().bytes();
        let sums = if self.cluster_k > 1 { 2 * self.block_m * self.block_n * 4 + 16 } else { 0 };
        let scales = if is_promoted(dtype) { 4 * self.consumers * 2 * self.block_n * 4 } else { 0 };
        ring + staging + sums + scales + 16 * self.stages
    }

    /// Bytes of the weights of one K tile.
    const fn k_tile_bytes(&self, dtype: DType) -> u32 {
        2 * self.block_n * self.block_k * dtype.bytes()
    }

    /// Registers a thread of the sums; twice where tensor cores sum few K tiles and fp32 the rest.
    const fn accumulators(&self, dtype: DType) -> u32 {
        let copies = if is_promoted(dtype) { 2 } else { 1 };
        copies * self.schedule.row_blocks(self.block_m, self.consumers) * self.block_n
    }

    /// Columns of one box of N-major weights: a 128-byte or a 64-byte swizzle row.
    pub const fn weight_cols(&self) -> u32 {
        box_cols(self.block_n)
    }

    pub(super) fn launch_shape(&self, problem: &Problem) -> LaunchShape {
        LaunchShape {
            block_m: self.block_m * self.cluster_m,
            block_n: self.block_n * self.cluster_n,
            cluster: self.cluster_m * self.cluster_n * self.cluster_k,
            per_sm: Some(self.fill),
            threads: self.threads(),
            smem_bytes: self.smem_bytes(problem.dtype),
            raster: self.raster,
            raster_group: match self.raster {
                Raster::Resident => self.resident_tiles(problem),
                Raster::AlongM | Raster::AlongN => self.raster_group,
            },
            access_bytes: 16,
        }
    }

    /// Clusters of M whose rows of x have `raster_group` MiB.
    fn resident_tiles(&self, problem: &Problem) -> u32 {
        let [rows, k, bytes] = [self.block_m * self.cluster_m, problem.k, problem.dtype.x().bytes()].map(u64::from);
        let tiles = (u64::from(self.raster_group) << 20) / (rows * k * bytes).max(1);
        tiles.clamp(1, MOST_ACROSS) as u32
    }

    /// The first rule that is broken, in this order.
    pub(super) fn check(&self, problem: &Problem, arch: &ArchSpec) -> Result<(), Rejected> {
        check_sizes(&self.sizes(), 1024)?;
        check_problem(problem, arch)?;
        self.check_tile(problem.dtype)?;
        self.check_registers(problem.dtype)?;
        self.check_cluster()?;
        self.check_boxes(problem)?;
        self.check_occupancy(problem.dtype, arch)?;
        check_fast_silu(self.fast_silu, problem)?;
        ensure(self.stages >= 2, "at least 2 stages", || format!("{} stages", self.stages))?;
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

    /// The tile of one CTA, and how warpgroups share it.
    fn check_tile(&self, dtype: DType) -> Result<(), Rejected> {
        let &Self { block_m, block_n, block_k, consumers, schedule, .. } = self;
        ensure(block_k * dtype.bytes() == 128, "a K row of a tile is 128 bytes", || format!("block_k {block_k}"))?;
        ensure(
            block_n.is_multiple_of(8) && (16..=128).contains(&block_n),
            "gate and up share one wgmma of at most 256 columns",
            || format!("block_n {block_n}"),
        )?;
        schedule.check_consumers(consumers, 3)?;
        schedule.check_rows(block_m, consumers)
    }

    /// What would spill.
    fn check_registers(&self, dtype: DType) -> Result<(), Rejected> {
        let &Self { block_n, consumers, schedule, store_cols, blocks_per_sm, .. } = self;
        // Measured with NVRTC 13.0: more accumulators spill, and ptxas then serialises wgmma.
        let most = match consumers {
            3 if is_promoted(dtype) => 128,
            3 => 96,
            _ if blocks_per_sm == 2 => 96,
            _ if is_promoted(dtype) => 192,
            _ => 208,
        };
        ensure(self.accumulators(dtype) <= most, "accumulators fit in registers", || {
            format!("{} accumulators a thread", self.accumulators(dtype))
        })?;
        let widest = dtype == DType::E4m3 && schedule == Schedule::Pingpong && block_n > 88;
        ensure(!widest || store_cols >= 32, "the widest e4m3 tiles in turns spill with narrow stores", || {
            format!("store_cols {store_cols} of {block_n}")
        })
    }

    /// CTAs that share operands, or the K tiles of one tile.
    fn check_cluster(&self) -> Result<(), Rejected> {
        let &Self { block_m, consumers, cluster_m, cluster_n, cluster_k, .. } = self;
        // 132 multiprocessors are 66 pairs; larger clusters leave some idle.
        ensure(
            cluster_m * cluster_n * cluster_k <= 2 && block_m.is_multiple_of(16 * cluster_n),
            "a cluster is at most a pair",
            || format!("{cluster_m}x{cluster_n}x{cluster_k}"),
        )?;
        ensure(cluster_k == 1 || consumers == 1, "a split along K is for tiles of few tokens", || {
            format!("cluster_k {cluster_k} with {consumers} consumers")
        })
    }

    /// The boxes in which weights are loaded and z is stored.
    fn check_boxes(&self, problem: &Problem) -> Result<(), Rejected> {
        let &Self { block_n, store_cols, .. } = self;
        let dtype = problem.dtype;
        ensure(
            problem.weight_major == WeightMajor::K || is_split(dtype) || block_n.is_multiple_of(32),
            "n_major weights load in whole boxes",
            || format!("block_n {block_n}"),
        )?;
        let swizzled = matches!(store_cols * dtype.output().bytes(), 32 | 64 | 128);
        let is_wide = swizzled || (store_cols == block_n && !is_split(dtype));
        ensure(block_n.is_multiple_of(store_cols) && is_wide, "stores are whole boxes", || {
            format!("store_cols {store_cols} of {block_n}")
        })
    }

    /// Tiles of few tokens, and how many CTAs share a multiprocessor, which only those do.
    fn check_occupancy(&self, dtype: DType, arch: &ArchSpec) -> Result<(), Rejected> {
        let &Self { consumers, blocks_per_sm, fill, .. } = self;
        ensure(consumers > 1 || !is_promoted(dtype), "tiles of few tokens sum once", || {
            format!("1 consumer of {dtype}")
        })?;
        check_blocks_per_sm((blocks_per_sm, fill), consumers, self.smem_bytes(dtype), arch)
    }
}

/// What the family multiplies, and where.
fn check_problem(problem: &Problem, arch: &ArchSpec) -> Result<(), Rejected> {
    ensure(arch.has_wgmma, "wgmma_tma needs compute capability 9.0", || format!("{arch} has none"))?;
    ensure(
        matches!(problem.dtype, DType::F32 | DType::F16 | DType::Bf16 | DType::E4m3),
        "wgmma_tma multiplies fp16, bf16, e4m3, and fp32 in two parts",
        || format!("{} asked for", problem.dtype),
    )?;
    ensure(
        problem.dtype != DType::E4m3 || problem.weight_major == WeightMajor::K,
        "wgmma transposes no 8-bit weights",
        || "n_major e4m3".into(),
    )?;
    ensure(problem.k > 0, "wgmma_tma needs K of at least 1", || "k is 0".into())
}

/// A tile with the most stages that fit, and a second store buffer where it costs none of them.
fn tile(schedule: Schedule, block_m: u32, block_n: u32, consumers: u32, dtype: DType) -> WgmmaTmaConfig {
    let widths = [128, 64, 32].map(|bytes| bytes / dtype.output().bytes());
    let store_cols = widths.into_iter().find(|&cols| block_n.is_multiple_of(cols)).unwrap_or(block_n);
    let with = |store_buffers| {
        let config = WgmmaTmaConfig {
            block_m,
            block_n,
            block_k: 128 / dtype.bytes(),
            stages: 0,
            consumers,
            schedule,
            cluster_m: 1,
            cluster_n: 1,
            cluster_k: 1,
            store_cols,
            store_buffers,
            blocks_per_sm: 1,
            fill: 1,
            // Parts are written by the launch right before: there is nothing to ask for meanwhile.
            prefetch: if is_split(dtype) { 0 } else { 4 },
            fast_silu: dtype.output() == Format::Bf16,
            raster: Raster::Resident,
            raster_group: RESIDENT_MIB,
        };
        config.with_most_stages(8, dtype)
    };
    let (two, one) = (with(2), with(1));
    if one.stages > two.stages { one } else { two }
}

impl WgmmaTmaConfig {
    /// As many stages as fit, up to `most`.
    fn with_most_stages(self, most: u32, dtype: DType) -> Self {
        let none = Self { stages: 0, ..self }.smem_bytes(dtype);
        let stage = Self { stages: 1, ..self }.smem_bytes(dtype) - none;
        Self { stages: stages_that_fit(smem_budget(self.blocks_per_sm), none, stage, most), ..self }
    }
}

/// block_m, block_n, cluster_n, cluster_k of the tiles for few tokens that are half a multiprocessor each, so that the next
/// launch begins while this one ends. Reading the weights once is all there is to do, and which width shares the columns out
/// evenly depends on N, hence so many.
const HALF_STREAM_TILES: [(u32, u32, u32, u32); 25] = [
    (16, 32, 1, 1),
    (16, 40, 1, 1),
    (16, 48, 1, 1),
    (16, 56, 1, 1),
    (16, 64, 1, 1),
    (16, 88, 1, 1),
    (16, 32, 1, 2),
    (16, 56, 1, 2),
    (16, 64, 1, 2),
    (16, 88, 1, 2),
    (32, 32, 1, 1),
    (32, 56, 1, 1),
    (32, 64, 1, 1),
    (32, 56, 2, 1),
    (32, 64, 2, 1),
    (32, 56, 1, 2),
    (32, 64, 1, 2),
    (64, 32, 1, 1),
    (64, 32, 2, 1),
    (64, 48, 2, 1),
    (64, 56, 1, 1),
    (64, 64, 1, 1),
    (64, 56, 2, 1),
    (64, 64, 2, 1),
    (64, 88, 2, 1),
];

/// block_n of the tiles for few tokens that fill a multiprocessor: twice the stages.
const WHOLE_STREAM_COLUMNS: [u32; 9] = [32, 48, 56, 64, 72, 80, 88, 96, 112];

fn stream_tile(
    (block_m, block_n, cluster_n, cluster_k): (u32, u32, u32, u32),
    blocks_per_sm: u32,
    dtype: DType,
) -> WgmmaTmaConfig {
    let store_cols = if block_n.is_multiple_of(16) { 16 } else { block_n };
    let config = WgmmaTmaConfig {
        cluster_n,
        cluster_k,
        store_cols,
        store_buffers: 1,
        blocks_per_sm,
        raster: Raster::AlongN,
        raster_group: 8,
        ..tile(Schedule::Cooperative, block_m, block_n, 1, dtype)
    };
    let prefetch = stream_prefetch(blocks_per_sm, config.k_tile_bytes(dtype));
    WgmmaTmaConfig { prefetch, ..config }.with_most_stages(12, dtype)
}

fn stream_tiles(dtype: DType) -> impl Iterator<Item = WgmmaTmaConfig> {
    let halves = HALF_STREAM_TILES
        .into_iter()
        .flat_map(move |tile| [1, 2].map(|fill| WgmmaTmaConfig { fill, ..stream_tile(tile, 2, dtype) }));
    let wholes = [16, 32, 64].into_iter().flat_map(move |block_m| {
        WHOLE_STREAM_COLUMNS
            .into_iter()
            .flat_map(move |block_n| [1, 2].map(|cluster_k| stream_tile((block_m, block_n, 1, cluster_k), 1, dtype)))
    });
    // Four bytes a sum: the widest split tiles have too little left for stages.
    halves.chain(wholes).filter(|config| config.stages >= 4)
}

/// KiB that a tile of static weights asks into L2 beyond its stages.
pub(super) const STATIC_PREFETCH_KIB: [u32; 3] = [0, 48, 96];

/// K tiles of that many bytes that a tile for few tokens asks into L2: some 100 KiB where it has half a multiprocessor, 140 where
/// it has a whole one, so that the launch ahead has to end first.
pub(super) const fn stream_prefetch(blocks_per_sm: u32, k_tile_bytes: u32) -> u32 {
    let ahead = if blocks_per_sm == 2 { 100 << 10 } else { 140 << 10 };
    ahead / k_tile_bytes
}

/// What such a tile may ask: `usual`, of static weights as many KiB as each of `static_kib`.
pub(super) fn stream_prefetches(is_static: bool, static_kib: &[u32], usual: u32, k_tile_bytes: u32) -> Vec<u32> {
    let beyond = static_kib.iter().map(|kib| kib * 1024 / k_tile_bytes);
    if is_static { beyond.collect() } else { vec![usual] }
}

pub(super) fn space(problem: &Problem) -> impl Iterator<Item = WgmmaTmaConfig> + use<> {
    let dtype = problem.dtype;
    let tiles: &'static [(Schedule, u32, u32, u32)] = if is_promoted(dtype) { &PROMOTED_TILES } else { &TILES };
    let tiles = tiles.iter().flat_map(move |&(schedule, block_m, block_n, consumers)| {
        [(2, 1), (1, 2), (1, 1)].into_iter().map(move |(cluster_m, cluster_n)| WgmmaTmaConfig {
            cluster_m,
            cluster_n,
            ..tile(schedule, block_m, block_n, consumers, dtype)
        })
    });
    let is_static = problem.op.has_static_weights();
    let streams = stream_tiles(dtype).filter(move |_| !is_promoted(dtype)).flat_map(move |tile| {
        let k_tile_bytes = tile.k_tile_bytes(dtype);
        let prefetches = stream_prefetches(is_static, &STATIC_PREFETCH_KIB, tile.prefetch, k_tile_bytes);
        prefetches.into_iter().map(move |prefetch| WgmmaTmaConfig { prefetch, ..tile })
    });
    tiles.chain(streams)
}

/// Preferred configs when nothing was tuned, best first.
pub(super) fn defaults(problem: &Problem) -> [WgmmaTmaConfig; 2] {
    if is_promoted(problem.dtype) {
        let pair = |(schedule, block_m, block_n)| WgmmaTmaConfig {
            cluster_m: 2,
            ..tile(schedule, block_m, block_n, 2, problem.dtype)
        };
        let narrow = (Schedule::Cooperative, 128, 64);
        let best = match problem.m {
            0..=512 => narrow,
            // Of short sums the epilogue is much: another tile's products hide it.
            _ if problem.dtype == DType::E4m3 && problem.k <= 2048 => (Schedule::Pingpong, 64, 96),
            _ => (Schedule::Cooperative, 128, 96),
        };
        return [pair(best), pair(narrow)];
    }
    let block_n = match problem.m {
        0..=256 => 56,
        257..=512 => 88,
        _ => 96,
    };
    let pair = |block_n| WgmmaTmaConfig { cluster_m: 2, ..tile(Schedule::Pingpong, 128, block_n, 2, problem.dtype) };
    [pair(block_n), pair(if problem.m <= 256 { 64 } else { 96 })]
}

impl fmt::Display for WgmmaTmaConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "wgmma_tma {} {}x{}x{} stages {} consumers {} cluster {}x{}x{} store {}x{} blocks {}/{} prefetch {}{} {} {}",
            self.schedule,
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
            self.fill,
            self.blocks_per_sm,
            self.prefetch,
            if self.fast_silu { " fast_silu" } else { "" },
            self.raster,
            self.raster_group
        )
    }
}
