//! `column_sum`: the gradients of biases, sums down the columns of one matrix or two; any GPU.
//!
//! Design: `docs/kernels/column_sum.md`. Template: `templates/column_sum/kernel.cu.tera`.

use super::{LaunchShape, Raster, Rejected, check_access_bytes, check_block, check_sizes, ensure};
use crate::arch::ArchSpec;
use crate::problem::{DType, Problem};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A point of the `column_sum` space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ColumnSumConfig {
    /// Threads per block.
    pub threads: u32,
    /// Of these so many side by side along the columns; the others share the rows.
    pub lanes: u32,
    /// Bytes of one access to global memory.
    pub access_bytes: u32,
}

impl ColumnSumConfig {
    /// Elements of one access.
    fn access(&self, dtype: DType) -> u32 {
        (self.access_bytes / dtype.bytes()).max(1)
    }

    /// Shared memory: an fp32 sum for every column of every thread.
    pub fn smem_bytes(&self, dtype: DType) -> u32 {
        4 * self.threads * self.access(dtype)
    }

    pub(super) fn launch_shape(&self, dtype: DType) -> LaunchShape {
        LaunchShape {
            block_m: 1,
            block_n: self.lanes * self.access(dtype),
            cluster: 1,
            per_sm: None,
            threads: self.threads,
            smem_bytes: self.smem_bytes(dtype),
            raster: Raster::AlongN,
            raster_group: 1,
            access_bytes: self.access_bytes,
        }
    }

    pub(super) fn check(&self, problem: &Problem, arch: &ArchSpec) -> Result<(), Rejected> {
        let &Self { threads, lanes, access_bytes } = self;
        check_sizes(&[threads, lanes, access_bytes], 1024)?;
        check_access_bytes(access_bytes)?;
        ensure(
            threads.is_power_of_two() && lanes.is_power_of_two() && lanes <= threads,
            "threads and lanes are powers of two",
            || format!("{threads} threads, {lanes} lanes"),
        )?;
        check_block(&self.launch_shape(problem.dtype), problem, arch)
    }
}

pub(super) fn space(problem: &Problem) -> impl Iterator<Item = ColumnSumConfig> + use<> {
    let access_bytes = problem.alignment;
    [256, 512, 1024].into_iter().flat_map(move |threads| {
        [4, 8, 16, 32].into_iter().map(move |lanes| ColumnSumConfig { threads, lanes, access_bytes })
    })
}

/// The preferred config when nothing was tuned: whole lines of 128 bytes where accesses are wide.
pub(super) fn default(problem: &Problem) -> ColumnSumConfig {
    ColumnSumConfig { threads: 512, lanes: 8, access_bytes: problem.alignment }
}

impl fmt::Display for ColumnSumConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "column_sum {} threads {} lanes access {}", self.threads, self.lanes, self.access_bytes)
    }
}
