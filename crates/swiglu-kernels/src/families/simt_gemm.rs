//! `simt_gemm`: the steps that are one GEMM, with fp32 FMA on any GPU; the fallback for every number
//! format, order and alignment.
//!
//! Design: `docs/kernels/simt_gemm.md`. Template: `templates/simt_gemm/kernel.cu.tera`.

use super::simt::{check_thread_tile, registers_on_the_way};
use super::{
    LaunchShape, RASTERS, Raster, Rejected, check_access_bytes, check_block, check_registers, check_sizes, ensure,
};
use crate::arch::ArchSpec;
use crate::problem::Problem;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A point of the `simt_gemm` space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SimtGemmConfig {
    /// Rows of the output per block.
    pub block_m: u32,
    /// Columns of the output per block.
    pub block_n: u32,
    /// Step along the sums.
    pub block_k: u32,
    /// Rows of the output per thread.
    pub thread_m: u32,
    /// Columns of the output per thread.
    pub thread_n: u32,
    /// Bytes of one access to global memory.
    pub access_bytes: u32,
    /// Walk over the tiles; a launch parameter, not a constant of the source.
    pub raster: Raster,
    /// Tiles walked in that direction before stepping in the other; a launch parameter.
    pub raster_group: u32,
}

/// block_m, block_n, thread_m, thread_n.
const TILES: [(u32, u32, u32, u32); 4] = [(32, 32, 2, 2), (64, 64, 4, 4), (64, 128, 8, 4), (128, 128, 8, 8)];

impl SimtGemmConfig {
    /// Threads per block.
    pub const fn threads(&self) -> u32 {
        (self.block_m / self.thread_m) * (self.block_n / self.thread_n)
    }

    /// Shared memory: two steps of both operands, all fp32.
    pub const fn smem_bytes(&self) -> u32 {
        // 4 floats of padding keep the lines 16-byte aligned and transposed stores apart.
        4 * 2 * self.block_k * (self.block_m + 4 + self.block_n + 4)
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
        let &Self { block_m, block_n, block_k, thread_m, thread_n, access_bytes, raster_group, .. } = self;
        check_sizes(&[block_m, block_n, block_k, thread_m, thread_n, access_bytes, raster_group], 1024)?;
        ensure(
            block_m.is_multiple_of(thread_m) && block_n.is_multiple_of(thread_n),
            "a block is whole threads' tiles",
            || format!("{block_m}x{block_n} by {thread_m}x{thread_n}"),
        )?;
        check_thread_tile((block_m, block_n), (thread_m, thread_n))?;
        check_access_bytes(access_bytes)?;
        let access = (access_bytes / problem.dtype.bytes()).max(1);
        ensure(
            [block_m, block_n, block_k].iter().all(|size| size.is_multiple_of(access)),
            "a tile row is whole accesses",
            || format!("{block_m}x{block_n}x{block_k}, {access} elements an access"),
        )?;
        check_block(&self.launch_shape(), problem, arch)?;
        // Beside the sums a thread holds its fragments and the tile that is on its way.
        let prefetch = registers_on_the_way((block_m + block_n) * block_k, access_bytes, problem, self.threads());
        check_registers(thread_m * thread_n, thread_m + thread_n + prefetch + 40, self.threads(), arch)
    }
}

pub(super) fn space(problem: &Problem) -> impl Iterator<Item = SimtGemmConfig> + use<> {
    let access_bytes = problem.alignment;
    TILES.into_iter().flat_map(move |(block_m, block_n, thread_m, thread_n)| {
        [8, 16].into_iter().flat_map(move |block_k| {
            RASTERS.into_iter().map(move |(raster, raster_group)| SimtGemmConfig {
                block_m,
                block_n,
                block_k,
                thread_m,
                thread_n,
                access_bytes,
                raster,
                raster_group,
            })
        })
    })
}

/// Preferred configs when nothing was tuned, best first.
pub(super) fn defaults(problem: &Problem) -> [SimtGemmConfig; 3] {
    let of = |(block_m, block_n, thread_m, thread_n), block_k| SimtGemmConfig {
        block_m,
        block_n,
        block_k,
        thread_m,
        thread_n,
        access_bytes: problem.alignment,
        raster: Raster::AlongN,
        raster_group: 8,
    };
    [of(TILES[3], 8), of(TILES[1], 16), of(TILES[0], 16)]
}

impl fmt::Display for SimtGemmConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "simt_gemm {}x{}x{} thread {}x{} access {} {} {}",
            self.block_m,
            self.block_n,
            self.block_k,
            self.thread_m,
            self.thread_n,
            self.access_bytes,
            self.raster,
            self.raster_group
        )
    }
}
