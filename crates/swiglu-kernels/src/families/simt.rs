//! `simt`: fp32 FMA on any GPU from compute capability 7.0 on. The fallback, and the simplest to read.
//!
//! Design: `docs/kernels/simt.md`. Template: `templates/simt/kernel.cu.tera`.

use super::{
    LaunchShape, RASTERS, Raster, Rejected, check_access_bytes, check_block, check_registers, check_sizes,
    check_unscaled, ensure,
};
use crate::arch::ArchSpec;
use crate::problem::{DType, MAX_ACCESS_BYTES, Problem};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A point of the `simt` space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SimtConfig {
    /// Rows of z per block.
    pub block_m: u32,
    /// Columns of z per block; the block multiplies twice as many (gate and up).
    pub block_n: u32,
    /// Step along K.
    pub block_k: u32,
    /// Rows of z per thread.
    pub thread_m: u32,
    /// Columns of z per thread.
    pub thread_n: u32,
    /// K tiles in shared memory: with 2 the next one is fetched while this one is multiplied.
    pub stages: u32,
    /// Bytes of one access to global memory.
    pub access_bytes: u32,
    /// Walk over the tiles; a launch parameter, not a constant of the source.
    pub raster: Raster,
    /// Tiles walked in that direction before stepping in the other; a launch parameter.
    pub raster_group: u32,
}

/// block_m, block_n, thread_m, thread_n.
const TILES: [(u32, u32, u32, u32); 8] = [
    (16, 32, 2, 2),
    (16, 64, 2, 4),
    (32, 32, 4, 2),
    (32, 64, 4, 4),
    (64, 32, 4, 4),
    (64, 64, 8, 4),
    (128, 32, 8, 4),
    (128, 64, 8, 4),
];

impl SimtConfig {
    /// Threads per block.
    pub const fn threads(&self) -> u32 {
        (self.block_m / self.thread_m) * (self.block_n / self.thread_n)
    }

    /// Shared memory: `stages` of x, gate and up tiles, all fp32.
    pub const fn smem_bytes(&self) -> u32 {
        // x is stored transposed; 4 floats of padding keep its rows 16-byte aligned and its stores apart.
        4 * self.stages * self.block_k * (self.block_m + 4 + 2 * self.block_n)
    }

    pub(super) fn launch_shape(&self) -> LaunchShape {
        LaunchShape {
            block_m: self.block_m,
            block_n: self.block_n,
            cluster: 1,
            per_sm: None,
            threads: self.threads(),
            smem_bytes: self.smem_bytes(),
            raster: self.raster,
            raster_group: self.raster_group,
            access_bytes: self.access_bytes,
        }
    }

    pub(super) fn check(&self, problem: &Problem, arch: &ArchSpec) -> Result<(), Rejected> {
        let &Self { block_m, block_n, block_k, thread_m, thread_n, stages, access_bytes, raster_group, .. } = self;
        let sizes = [block_m, block_n, block_k, thread_m, thread_n, stages, access_bytes, raster_group];
        check_sizes(&sizes, 4096)?;
        check_unscaled(problem)?;
        ensure(problem.dtype != DType::Tf32, "simt multiplies in fp32", || "tf32 asked for".into())?;
        ensure(
            block_m.is_multiple_of(thread_m) && block_n.is_multiple_of(thread_n) && matches!(stages, 1 | 2),
            "a block divides into threads",
            || format!("{block_m}x{block_n} by {thread_m}x{thread_n}, {stages} stages"),
        )?;
        check_thread_tile((block_m, block_n), (thread_m, thread_n))?;
        check_access_bytes(access_bytes)?;
        let access = (access_bytes / problem.dtype.bytes()).max(1);
        ensure(
            block_k.is_multiple_of(access) && block_n.is_multiple_of(access),
            "a tile row is whole accesses",
            || format!("block_k {block_k}, block_n {block_n}, {access} elements an access"),
        )?;
        check_block(&self.launch_shape(), problem, arch)?;
        // Beside the sums a thread holds its fragments and the tile that is on its way.
        let prefetch = registers_on_the_way((block_m + 2 * block_n) * block_k, access_bytes, problem, self.threads());
        check_registers(2 * thread_m * thread_n, thread_m + 2 * thread_n + prefetch + 40, self.threads(), arch)
    }
}

/// A thread's tile of a block's.
pub(super) fn check_thread_tile(block: (u32, u32), thread: (u32, u32)) -> Result<(), Rejected> {
    ensure(
        thread.0.is_power_of_two()
            && thread.1.is_power_of_two()
            && block.0.is_multiple_of(4)
            && block.1.is_multiple_of(4),
        "thread tiles are powers of two",
        || format!("{}x{} of {}x{}", thread.0, thread.1, block.0, block.1),
    )
}

/// Registers a thread that hold `elements` of a tile on its way. An access narrower than a register still takes a whole one;
/// narrow ones each keep an address and a predicate alive as well.
pub(super) fn registers_on_the_way(elements: u32, access_bytes: u32, problem: &Problem, threads: u32) -> u32 {
    let per_register = 4.min(access_bytes) / problem.dtype.bytes();
    let per_access = if access_bytes < MAX_ACCESS_BYTES { 3 } else { 1 };
    per_access * elements / per_register / threads
}

pub(super) fn space(problem: &Problem) -> impl Iterator<Item = SimtConfig> + use<> {
    let access_bytes = problem.alignment;
    TILES.into_iter().flat_map(move |(block_m, block_n, thread_m, thread_n)| {
        [8, 16, 32].into_iter().flat_map(move |block_k| {
            [1, 2].into_iter().flat_map(move |stages| {
                RASTERS.into_iter().map(move |(raster, raster_group)| SimtConfig {
                    block_m,
                    block_n,
                    block_k,
                    thread_m,
                    thread_n,
                    stages,
                    access_bytes,
                    raster,
                    raster_group,
                })
            })
        })
    })
}

/// Preferred configs when nothing was tuned, best first.
pub(super) fn defaults(problem: &Problem) -> [SimtConfig; 2] {
    let base = SimtConfig {
        block_m: 64,
        block_n: 64,
        block_k: 16,
        thread_m: 8,
        thread_n: 4,
        stages: 2,
        access_bytes: problem.alignment,
        raster: Raster::AlongN,
        raster_group: 8,
    };
    let small = SimtConfig { block_m: 16, block_n: 32, thread_m: 2, thread_n: 2, ..base };
    if problem.m <= 32 { [small, base] } else { [base, small] }
}

impl fmt::Display for SimtConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "simt {}x{}x{} thread {}x{} stages {} access {} {} {}",
            self.block_m,
            self.block_n,
            self.block_k,
            self.thread_m,
            self.thread_n,
            self.stages,
            self.access_bytes,
            self.raster,
            self.raster_group
        )
    }
}
