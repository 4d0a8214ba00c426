//! `elementwise`: the gate and its backward on stored pre-activations, one pass over memory; any GPU.
//!
//! Design: `docs/kernels/elementwise.md`. Template: `templates/elementwise/kernel.cu.tera`.

use super::{LaunchShape, Raster, Rejected, check_access_bytes, check_block, check_sizes, ensure};
use crate::arch::ArchSpec;
use crate::problem::Problem;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A point of the `elementwise` space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ElementwiseConfig {
    /// Threads per block, side by side along a row.
    pub threads: u32,
    /// Rows per thread: so many accesses of each operand are in flight.
    pub rows: u32,
    /// Bytes of one access to global memory.
    pub access_bytes: u32,
}

impl ElementwiseConfig {
    pub(super) fn launch_shape(&self, problem: &Problem) -> LaunchShape {
        LaunchShape {
            block_m: self.rows,
            block_n: self.threads * (self.access_bytes / problem.dtype.bytes()).max(1),
            cluster: 1,
            per_sm: None,
            threads: self.threads,
            smem_bytes: 0,
            raster: Raster::AlongN,
            raster_group: 1,
            access_bytes: self.access_bytes,
        }
    }

    pub(super) fn check(&self, problem: &Problem, arch: &ArchSpec) -> Result<(), Rejected> {
        let &Self { threads, rows, access_bytes } = self;
        check_sizes(&[threads, rows, access_bytes], 1024)?;
        check_access_bytes(access_bytes)?;
        ensure(rows <= 8, "what is in flight fits in registers", || format!("{rows} rows a thread"))?;
        check_block(&self.launch_shape(problem), problem, arch)
    }
}

pub(super) fn space(problem: &Problem) -> impl Iterator<Item = ElementwiseConfig> + use<> {
    let access_bytes = problem.alignment;
    [64, 128, 256, 512].into_iter().flat_map(move |threads| {
        [1, 2, 4, 8].into_iter().map(move |rows| ElementwiseConfig { threads, rows, access_bytes })
    })
}

/// The preferred config when nothing was tuned.
pub(super) fn default(problem: &Problem) -> ElementwiseConfig {
    // Within 1.5 % of the best prototype on the H200 from M 2048 on, forward and backward (docs/kernels/elementwise.md).
    ElementwiseConfig { threads: 256, rows: 1, access_bytes: problem.alignment }
}

impl fmt::Display for ElementwiseConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "elementwise {} threads {} rows access {}", self.threads, self.rows, self.access_bytes)
    }
}
