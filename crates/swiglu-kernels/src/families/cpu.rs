//! `cpu`: blocks of the two GEMMs and the gate on worker threads; no template, no GPU.
//!
//! Design: `docs/kernels/cpu.md`. Implementation: `crates/swiglu-runtime/src/cpu.rs`.

use super::{Rejected, check_unscaled, ensure};
use crate::problem::{Activation, DType, Problem};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A point of the `cpu` space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CpuConfig {
    /// Rows of z per task.
    pub block_m: u32,
    /// Columns of z per task; the task multiplies twice as many (gate and up).
    pub block_n: u32,
    /// Worker threads.
    pub threads: u32,
}

impl CpuConfig {
    pub(super) fn check(&self, problem: &Problem, threads: u32) -> Result<(), Rejected> {
        let &Self { block_m, block_n, threads: wanted } = self;
        ensure(
            (1..=65536).contains(&block_m) && (1..=65536).contains(&block_n),
            "sizes are positive and small",
            || format!("{block_m}x{block_n}"),
        )?;
        // The one that `cpu/silu.rs` of swiglu-runtime computes.
        match problem.activation {
            Activation::Silu => {}
        }
        check_unscaled(problem)?;
        ensure(problem.dtype != DType::Tf32, "the CPU multiplies in fp32", || "tf32 asked for".into())?;
        ensure((1..=threads).contains(&wanted), "no more threads than the machine has", || {
            format!("{wanted} threads of {threads}")
        })
    }
}

pub(super) fn space(threads: u32) -> impl Iterator<Item = CpuConfig> {
    let mut counts = vec![threads, threads.div_ceil(2), 1];
    counts.dedup();
    counts.into_iter().flat_map(|threads| {
        [32, 128, 512].into_iter().flat_map(move |block_m| {
            [64, 128, 256, 512].into_iter().map(move |block_n| CpuConfig { block_m, block_n, threads })
        })
    })
}

/// The config used when nothing was tuned.
pub fn default_config(threads: u32) -> CpuConfig {
    CpuConfig { block_m: 512, block_n: 128, threads: threads.max(1) }
}

impl fmt::Display for CpuConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cpu {}x{} threads {}", self.block_m, self.block_n, self.threads)
    }
}
