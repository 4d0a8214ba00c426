//! The CPU backend: blocks of both GEMMs and the gate, one task per output tile, on a rayon pool.
//!
//! Design: `docs/kernels/cpu.md`. Config: `crates/swiglu-kernels/src/families/cpu.rs`.

mod element;
mod ffn;
mod product;
mod silu;

use crate::buckets::BucketTable;
use crate::operands::{ArgumentError, Forward, ForwardSpec, Matrix, Preactivations, WeightOffsets, Weights};
use faer::MatRef;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use swiglu_db::Device;
use swiglu_kernels::families::cpu::default_config;
use swiglu_kernels::families::{CpuConfig, Target};
use swiglu_kernels::{Config, DType, Rejected, WeightMajor};

pub use element::{CpuElement, Sum};
pub use ffn::CpuFfnPlan;
use product::{multiply, rows_as_sums};

/// Why there is no CPU plan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CpuError {
    /// The config cannot run this problem.
    #[error("the CPU cannot run this: {0}")]
    Rejected(#[from] Rejected),
    /// The worker threads could not be started.
    #[error("worker threads could not be started: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// A prepared forward problem on the CPU. `Send` and `Sync`.
#[derive(Debug)]
pub struct CpuPlan {
    spec: ForwardSpec,
    table: BucketTable,
    /// One per anchor, ascending.
    entries: Vec<(CpuConfig, Threads)>,
}

/// The threads of a plan, in whatever process it is: one that was forked has none of its parent's.
#[derive(Debug)]
struct Threads {
    process: u32,
    pool: Arc<ThreadPool>,
    /// Those of a child, once it asks.
    of_child: OnceLock<(u32, Arc<ThreadPool>)>,
}

impl Threads {
    fn new(threads: u32) -> Result<Self, CpuError> {
        Ok(Self { process: std::process::id(), pool: pool(threads)?, of_child: OnceLock::new() })
    }

    /// Runs `work` on them; on the caller's thread alone where a child cannot start its own.
    fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        let here = std::process::id();
        if here == self.process {
            return self.pool.install(work);
        }
        let threads = u32::try_from(self.pool.current_num_threads()).unwrap_or(1);
        let kept = self.of_child.get().filter(|(process, _)| *process == here).map(|(_, pool)| Arc::clone(pool));
        match kept.or_else(|| pool(threads).ok()) {
            Some(pool) => {
                // A child's child starts its own each time.
                let _ = self.of_child.set((here, Arc::clone(&pool)));
                pool.install(work)
            }
            None => match ThreadPoolBuilder::new().num_threads(1).use_current_thread().build() {
                Ok(alone) => alone.install(work),
                Err(_) => work(),
            },
        }
    }
}

/// Pools by their process and threads; one ends with the last plan that has it.
static POOLS: Mutex<BTreeMap<(u32, u32), Weak<ThreadPool>>> = Mutex::new(BTreeMap::new());

/// The process's pool of so many threads.
fn pool(threads: u32) -> Result<Arc<ThreadPool>, CpuError> {
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (std::process::id(), threads);
    if let Some(pool) = pools.get(&key).and_then(Weak::upgrade) {
        return Ok(pool);
    }
    let pool = Arc::new(ThreadPoolBuilder::new().num_threads(threads as usize).build()?);
    pools.insert(key, Arc::downgrade(&pool));
    Ok(pool)
}

/// Threads this machine can run at once.
pub fn threads() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1))
}

/// Identity of this CPU in the tuning database: `cpu-<model>-<threads>`.
pub fn device() -> Device {
    let name = model_name().unwrap_or_else(|| format!("{} CPU", std::env::consts::ARCH));
    let word: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    let word = word.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-");
    Device { class: format!("cpu-{word}-{}", threads()), name }
}

fn model_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

impl CpuPlan {
    /// A plan with a tuned config per anchor M, ascending; with the default one where there is none. Starts worker threads
    /// where no other plan has as many.
    ///
    /// # Errors
    /// When a config is not legal here, or threads cannot be started.
    pub fn new(spec: ForwardSpec, anchors: &[(u32, CpuConfig)]) -> Result<Self, CpuError> {
        let default = [(1, default_config(threads()))];
        let anchors = if anchors.is_empty() { &default[..] } else { anchors };
        let mut entries = Vec::with_capacity(anchors.len());
        for &(m, config) in anchors {
            Config::Cpu(config).check(&spec.problem(m), Target::Cpu { threads: threads() })?;
            entries.push((config, Threads::new(config.threads)?));
        }
        let table = BucketTable::new(&anchors.iter().map(|&(m, _)| m).collect::<Vec<_>>(), |_, _| None);
        Ok(Self { spec, table, entries })
    }

    /// What it was prepared for.
    pub fn spec(&self) -> &ForwardSpec {
        &self.spec
    }

    /// The config that serves `m` tokens.
    pub fn config_for(&self, m: u32) -> &CpuConfig {
        &self.entries[self.table.anchor(m)].0
    }

    /// Computes `z[M,N] = silu(x·Wg + bg) ⊙ (x·Wu + bu)`; every shape is checked first. Empty M or N returns at
    /// once. The same bits in every run of one config.
    ///
    /// # Errors
    /// [`ArgumentError`] names the operand that does not fit.
    pub fn launch<T: CpuElement>(&self, forward: Forward<&[T], &mut [T]>) -> Result<(), ArgumentError> {
        check_type::<T>("x", self.spec.dtype)?;
        let offsets = forward.check(&self.spec, |slice| slice.len(), |slice| slice.len())?;
        let m = forward.x.rows;
        if m == 0 || self.spec.n == 0 {
            return Ok(());
        }
        let (config, pool) = &self.entries[self.table.anchor(u32::try_from(m).unwrap_or(u32::MAX))];
        let work = Work::new(&self.spec, config, &forward, offsets);
        let tiles = tiles(forward.z, forward.preactivations, work.block_m, work.block_n);
        pool.install(|| tiles.into_par_iter().for_each_init(Scratch::default, |scratch, tile| work.run(tile, scratch)));
        Ok(())
    }
}

/// One block of the outputs: its rows' pieces, and where it lies.
struct Tile<'a, T> {
    row: usize,
    column: usize,
    pieces: Vec<&'a mut [T]>,
    /// Of the pre-activations' two halves; empty where they are not saved.
    saved: Vec<(&'a mut [T], &'a mut [T])>,
}

/// Cuts the outputs into tiles that share nothing, so that tasks need no lock.
fn tiles<'a, T>(
    z: Matrix<&'a mut [T]>,
    preactivations: Option<Preactivations<&'a mut [T]>>,
    block_m: usize,
    block_n: usize,
) -> Vec<Tile<'a, T>> {
    let n = z.cols;
    let across = z.cols.div_ceil(block_n);
    let mut tiles: Vec<Tile<T>> = Vec::with_capacity(z.rows.div_ceil(block_m) * across);
    for (row, line) in z.data.chunks_mut(z.row_stride.max(z.cols)).take(z.rows).enumerate() {
        let (cells, _gap) = line.split_at_mut(z.cols);
        for (index, piece) in cells.chunks_mut(block_n).enumerate() {
            if row % block_m == 0 {
                let pieces = Vec::with_capacity(block_m);
                tiles.push(Tile { row, column: index * block_n, pieces, saved: Vec::new() });
            }
            tiles[row / block_m * across + index].pieces.push(piece);
        }
    }
    let mut save = |row: usize, gate: &'a mut [T], up: &'a mut [T]| {
        let halves = gate[..n].chunks_mut(block_n).zip(up[..n].chunks_mut(block_n));
        for (index, halves) in halves.enumerate() {
            tiles[row / block_m * across + index].saved.push(halves);
        }
    };
    let lines = |matrix: Matrix<&'a mut [T]>| {
        matrix.data.chunks_mut(matrix.row_stride.max(matrix.cols)).take(matrix.rows).enumerate()
    };
    match preactivations {
        Some(Preactivations::Packed(saved)) => {
            for (row, line) in lines(saved) {
                let (gate, up) = line.split_at_mut(n);
                save(row, gate, up);
            }
        }
        Some(Preactivations::Separate { gate, up }) => {
            for ((row, gate), (_, up)) in lines(gate).zip(lines(up)) {
                save(row, gate, up);
            }
        }
        None => {}
    }
    tiles
}

/// Buffers of one worker, kept from task to task.
#[derive(Default)]
struct Scratch<S> {
    x: Vec<S>,
    weights: Vec<S>,
    gate: Vec<S>,
    up: Vec<S>,
}

/// What every task reads.
struct Work<'a, T> {
    x: &'a [T],
    x_stride: usize,
    gate: &'a [T],
    up: &'a [T],
    offsets: WeightOffsets,
    major: WeightMajor,
    gate_bias: Option<&'a [T]>,
    up_bias: Option<&'a [T]>,
    k: usize,
    block_m: usize,
    block_n: usize,
}

impl<'a, T: CpuElement> Work<'a, T> {
    fn new(
        spec: &ForwardSpec,
        config: &CpuConfig,
        forward: &Forward<&'a [T], &mut [T]>,
        offsets: WeightOffsets,
    ) -> Self {
        let (gate, up) = match forward.weights {
            Weights::Packed(packed) => (packed.data, packed.data),
            Weights::Separate { gate, up } => (gate.data, up.data),
        };
        Self {
            x: forward.x.data,
            x_stride: forward.x.row_stride,
            gate,
            up,
            offsets,
            major: spec.layout.major(),
            gate_bias: forward.gate_bias,
            up_bias: forward.up_bias,
            k: spec.k as usize,
            block_m: config.block_m as usize,
            block_n: config.block_n as usize,
        }
    }

    /// Both GEMMs of one tile, then the gate.
    fn run(&self, tile: Tile<'_, T>, scratch: &mut Scratch<T::Sum>) {
        let rows = tile.pieces.len();
        let columns = tile.pieces.first().map_or(0, |piece| piece.len());
        let Scratch { x, weights, gate, up } = scratch;
        for sums in [&mut *gate, &mut *up] {
            sums.clear();
            sums.resize(rows * columns, T::Sum::default());
        }
        if self.k > 0 {
            let x = rows_as_sums(&self.x[tile.row * self.x_stride..], rows, self.k, self.x_stride, x);
            let WeightOffsets { gate: gate_at, gate_stride, up: up_at, up_stride } = self.offsets;
            multiply(x, self.columns(&self.gate[gate_at..], gate_stride, tile.column, columns, weights), gate);
            multiply(x, self.columns(&self.up[up_at..], up_stride, tile.column, columns, weights), up);
        }
        let here = tile.column..tile.column + columns;
        let gate_bias = self.gate_bias.map(|bias| &bias[here.clone()]);
        let up_bias = self.up_bias.map(|bias| &bias[here]);
        let mut saved = tile.saved.into_iter();
        for ((piece, gate), up) in tile.pieces.into_iter().zip(gate.chunks_mut(columns)).zip(up.chunks_mut(columns)) {
            add(gate, gate_bias);
            add(up, up_bias);
            if let Some((saved_gate, saved_up)) = saved.next() {
                round(saved_gate, gate);
                round(saved_up, up);
            }
            silu::silu_mul(gate, up);
            round(piece, gate);
        }
    }

    /// The weights of the columns of z from `column` on, `[K, columns]`.
    fn columns<'b>(
        &self,
        w: &'b [T],
        stride: usize,
        column: usize,
        columns: usize,
        scratch: &'b mut Vec<T::Sum>,
    ) -> MatRef<'b, T::Sum> {
        match self.major {
            WeightMajor::K => rows_as_sums(&w[column * stride..], columns, self.k, stride, scratch).transpose(),
            WeightMajor::N => rows_as_sums(&w[column..], self.k, columns, stride, scratch),
        }
    }
}

fn check_type<T: CpuElement>(argument: &'static str, dtype: DType) -> Result<(), ArgumentError> {
    if T::stores(dtype) && dtype != DType::Tf32 {
        return Ok(());
    }
    Err(ArgumentError::new(argument, format!("its element type does not store `{dtype}`")))
}

fn round<T: CpuElement>(out: &mut [T], values: &[T::Sum]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = T::round(*value);
    }
}

fn add<T: CpuElement>(sums: &mut [T::Sum], bias: Option<&[T]>) {
    for (sum, bias) in sums.iter_mut().zip(bias.unwrap_or(&[])) {
        *sum += bias.widen();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiglu_kernels::{GateOrder, WeightLayout};

    #[test]
    fn a_hundred_plans_have_the_threads_of_one_and_the_last_one_ends_them() {
        let (dtype, layout, gate_order) = (DType::F32, WeightLayout::SeparateNk, GateOrder::GateFirst);
        let plan = |n| {
            let spec =
                ForwardSpec { dtype, layout, gate_order, n, k: 8, save_preactivations: false, static_weights: false };
            CpuPlan::new(spec, &[(1, CpuConfig { block_m: 8, block_n: 16, threads: 1 })]).unwrap()
        };
        let plans: Vec<CpuPlan> = (1..=100).map(plan).collect();
        let pools: Vec<_> = plans.iter().map(|plan| Arc::clone(&plan.entries[0].1.pool)).collect();
        assert!(pools.iter().all(|pool| Arc::ptr_eq(pool, &pools[0])));
        assert_eq!(pools[0].current_num_threads(), 1);
        let last = Arc::downgrade(&pools[0]);
        assert_eq!(last.strong_count(), 200);
        drop((plans, pools));
        assert!(last.upgrade().is_none());
    }
}
