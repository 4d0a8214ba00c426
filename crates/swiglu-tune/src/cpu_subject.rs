//! Candidates on the CPU: the same race, on host memory.

use crate::race::{Failure, Subject};
use half::{bf16, f16};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, StandardNormal};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;
use swiglu_kernels::{Config, DType, GateOrder, Problem, WeightLayout, WeightMajor, oracle};
use swiglu_runtime::cpu::CpuPlan;
use swiglu_runtime::{Element, Forward, ForwardSpec, Matrix, Preactivations, Weights};

/// Rows that are held to the float64 oracle; more would take longer than the race.
const CHECKED_ROWS: usize = 8;
/// Shortest sample, in microseconds: long against the clock's resolution.
const SAMPLE_US: f64 = 2000.0;

/// The candidates of one problem in one of the CPU's number formats.
pub(crate) struct CpuSubject(Box<dyn Subject>);

impl CpuSubject {
    /// Fresh random operands and their reference; refused where memory is too small for them.
    pub(crate) fn new(problem: Problem, seed: u64) -> Result<Self, Failure> {
        check_memory(&problem, available_memory().unwrap_or(isize::MAX as u128))?;
        Ok(Self(match problem.dtype {
            DType::F16 => Box::new(Typed::<f16>::new(problem, seed)),
            DType::Bf16 => Box::new(Typed::<bf16>::new(problem, seed)),
            // The CPU has no other format than fp32 beside these; its config refuses them.
            _ => Box::new(Typed::<f32>::new(problem, seed)),
        }))
    }
}

/// Whether what [`Typed::new`] allocates fits: an allocation that fails, or that the system takes back, ends the process.
fn check_memory(problem: &Problem, available: u128) -> Result<(), Failure> {
    let needed = bytes_needed(problem);
    if needed <= available {
        return Ok(());
    }
    let gb = |bytes: u128| bytes as f64 / 1e9;
    Err(Failure::new(
        "launch",
        format!(
            "operands and reference take {:.1} GB, and {:.1} GB of memory are available; take a smaller n, k or m",
            gb(needed),
            gb(available)
        ),
    ))
}

/// The operands, the outputs, and the weights once more in float64; beside these the reference is small.
fn bytes_needed(problem: &Problem) -> u128 {
    let [m, n, k, bytes] = [problem.m, problem.n, problem.k, problem.dtype.bytes()].map(u128::from);
    let outputs = if problem.op.saves_preactivations() { 3 * n } else { n };
    m * (k + outputs) * bytes + 2 * n * k * (bytes + size_of::<f64>() as u128)
}

/// What Linux can still give without taking from others, in bytes, at most what is left of a container's limit; elsewhere it is
/// not known.
fn available_memory() -> Option<u128> {
    // `0::/group`; in a container the group itself may be mounted as the root.
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let folders = Path::new(group).ancestors().map(|group| format!("/sys/fs/cgroup{}", group.display()));
    let left = folders.filter_map(|folder| memory_left_in(&folder)).min().unwrap_or(u128::MAX);
    memory_of_machine().map(|available| available.min(left))
}

/// Of the limit of the control group (version 2) at `folder`, if it has one; files that it could let go of are no use of it.
fn memory_left_in(folder: &str) -> Option<u128> {
    let text = |name| std::fs::read_to_string(format!("{folder}/{name}")).ok();
    let number = |name| text(name)?.trim().parse::<u128>().ok();
    let stat = text("memory.stat")?;
    let files =
        stat.lines().filter_map(|line| line.strip_prefix("inactive_file ").or(line.strip_prefix("active_file ")));
    let files: u128 = files.filter_map(|bytes| bytes.parse::<u128>().ok()).sum();
    Some((number("memory.max")? + files).saturating_sub(number("memory.current")?))
}

fn memory_of_machine() -> Option<u128> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u128 = line.split_whitespace().next()?.parse().ok()?;
    Some(1024 * kib)
}

impl Subject for CpuSubject {
    fn verify(&mut self, config: &Config) -> Result<f64, Failure> {
        self.0.verify(config)
    }
    fn sample(&mut self, configs: &[Config]) -> Vec<Result<f64, Failure>> {
        self.0.sample(configs)
    }
}

struct Typed<T> {
    problem: Problem,
    x: Vec<T>,
    gate: Vec<T>,
    up: Vec<T>,
    z: Vec<T>,
    /// Empty unless the op saves them.
    preactivations: Vec<T>,
    /// Of some rows of z, then of the same rows of the pre-activations.
    references: [Vec<f64>; 2],
    plans: BTreeMap<Config, (CpuPlan, u32)>,
}

impl<T: Element> Typed<T> {
    fn new(problem: Problem, seed: u64) -> Self {
        let (m, n, k) = (problem.m as usize, problem.n as usize, problem.k as usize);
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut normal = |count: usize, scale: f32| -> Vec<T> {
            (0..count).map(|_| T::from_f32(scale * Distribution::<f32>::sample(&StandardNormal, &mut rng))).collect()
        };
        let scale = 1.0 / (k as f32).sqrt();
        let (x, gate, up) = (normal(m * k, 1.0), normal(n * k, scale), normal(n * k, scale));
        let wide = |values: &[T]| values.iter().map(|value| f64::from(value.to_f32())).collect::<Vec<f64>>();
        let k_major = |values: &[T]| match problem.weight_major {
            WeightMajor::K => wide(values),
            WeightMajor::N => (0..n * k).map(|i| f64::from(values[i % k * n + i / k].to_f32())).collect(),
        };
        let rows = m.min(CHECKED_ROWS);
        // The first and the last rows: the edges of blocks are among them.
        let chosen = [wide(&x[..rows.div_ceil(2) * k]), wide(&x[(m - rows / 2) * k..])].concat();
        let (gate_wide, up_wide) = (k_major(&gate), k_major(&up));
        let operands =
            oracle::Forward { x: &chosen, gate: &gate_wide, up: &up_wide, gate_bias: None, up_bias: None, k };
        let saves = problem.op.saves_preactivations();
        let sums = oracle::preactivations(&operands);
        let z = oracle::gated(problem.activation, &sums);
        let saved = if saves { oracle::packed(&sums, n) } else { Vec::new() };
        let poison = T::from_f32(f32::NAN);
        Self {
            problem,
            x,
            gate,
            up,
            z: vec![poison; m * n],
            preactivations: if saves { vec![poison; m * 2 * n] } else { Vec::new() },
            references: [z, saved],
            plans: BTreeMap::new(),
        }
    }

    fn launch(&mut self, config: &Config) -> Result<(), Failure> {
        let Problem { m, n, k, dtype, weight_major, .. } = self.problem;
        if !self.plans.contains_key(config) {
            let Config::Cpu(cpu) = config else { return Err(Failure::new("launch", "is no CPU config")) };
            let layout = match weight_major {
                WeightMajor::K => WeightLayout::SeparateNk,
                WeightMajor::N => WeightLayout::SeparateKn,
            };
            let save_preactivations = self.problem.op.saves_preactivations();
            let spec = ForwardSpec {
                dtype,
                layout,
                gate_order: GateOrder::GateFirst,
                n,
                k,
                save_preactivations,
                static_weights: false,
            };
            let plan = CpuPlan::new(spec, &[(m, *cpu)]).map_err(|error| Failure::new("compile", error))?;
            self.plans.insert(*config, (plan, 1));
        }
        let Some((plan, _)) = self.plans.get(config) else { return Err(Failure::new("launch", "has no plan")) };
        let (m, n, k) = (m as usize, n as usize, k as usize);
        let (rows, cols) = plan.spec().layout.shape(n, k);
        let forward = Forward {
            x: Matrix::new(&self.x[..], m, k),
            weights: Weights::Separate {
                gate: Matrix::new(&self.gate[..], rows, cols),
                up: Matrix::new(&self.up[..], rows, cols),
            },
            gate_bias: None,
            up_bias: None,
            z: Matrix::new(&mut self.z[..], m, n),
            preactivations: (!self.preactivations.is_empty())
                .then(|| Preactivations::Packed(Matrix::new(&mut self.preactivations[..], m, 2 * n))),
        };
        plan.launch(forward).map_err(|error| Failure::new("launch", error))
    }
}

impl<T: Element> Subject for Typed<T> {
    fn verify(&mut self, config: &Config) -> Result<f64, Failure> {
        self.z.fill(T::from_f32(f32::NAN));
        self.preactivations.fill(T::from_f32(f32::NAN));
        self.launch(config)?;
        let n = self.problem.n as usize;
        let [of_z, of_preactivations] = &self.references;
        let z_error = self.check(&self.z, n, of_z)?;
        Ok(z_error.max(self.check(&self.preactivations, 2 * n, of_preactivations)?))
    }

    fn sample(&mut self, configs: &[Config]) -> Vec<Result<f64, Failure>> {
        configs.iter().map(|config| self.time(config)).collect()
    }
}

impl<T: Element> Typed<T> {
    /// Holds the first and the last rows of an output to their reference; every element must have been written.
    fn check(&self, output: &[T], cols: usize, reference: &[f64]) -> Result<f64, Failure> {
        if let Some(index) = output.iter().position(|value| value.to_f32().is_nan()) {
            return Err(Failure::new("verify", format!("element {index} was not written")));
        }
        let rows = reference.len() / cols;
        let (head, tail) = (rows.div_ceil(2) * cols, output.len() - rows / 2 * cols);
        let checked = output[..head].iter().chain(&output[tail..]).map(|value| f64::from(value.to_f32()));
        let error = oracle::relative_error(checked, reference.iter().copied());
        let rounded = reference.iter().map(|&value| f64::from(T::from_f32(value as f32).to_f32()));
        let rounding = oracle::relative_error(rounded, reference.iter().copied());
        let tolerance = crate::race::tolerance(self.problem.dtype, rounding);
        if error.is_nan() || error > tolerance {
            return Err(Failure::new("verify", format!("relative error {error:.2e} (limit {tolerance:.1e})")));
        }
        Ok(error)
    }

    /// Time of one launch, over as many as make a sample.
    fn time(&mut self, config: &Config) -> Result<f64, Failure> {
        let launches = self.plans.get(config).map_or(1, |(_, launches)| *launches);
        let begun = Instant::now();
        for _ in 0..launches {
            self.launch(config)?;
        }
        let time = begun.elapsed().as_secs_f64() * 1e6 / f64::from(launches);
        if let Some((_, launches)) = self.plans.get_mut(config) {
            *launches = (SAMPLE_US / time.max(1.0)).ceil().clamp(1.0, 1000.0) as u32;
        }
        Ok(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiglu_kernels::Op;

    #[test]
    fn what_memory_cannot_hold_is_refused_before_it_is_allocated() {
        let large = Problem::forward(DType::F32, WeightMajor::K, u32::MAX, u32::MAX, u32::MAX).with_op(Op::ForwardSave);
        for problem in [large, Problem::forward(DType::F32, WeightMajor::K, 1, 1_000_000, 1_000_000)] {
            let refused = CpuSubject::new(problem, 1).map(|_| ()).unwrap_err();
            assert!(refused.reason.contains("smaller n, k or m"), "{}", refused.reason);
        }
        let small = Problem::forward(DType::Bf16, WeightMajor::N, 3, 5, 7);
        assert_eq!(bytes_needed(&small), (3 * 7 + 3 * 5 + 2 * 5 * 7) * 2 + 2 * 5 * 7 * 8);
        assert_eq!(check_memory(&small, bytes_needed(&small)), Ok(()));
        assert!(check_memory(&small, bytes_needed(&small) - 1).is_err());
        assert!(CpuSubject::new(small, 1).is_ok());
    }

    #[test]
    fn what_is_left_of_a_containers_limit_counts_files_that_it_can_let_go_of() {
        let folder = tempfile::tempdir().unwrap();
        let left = |max: &str| {
            for (name, text) in [
                ("memory.max", max),
                ("memory.current", "700\n"),
                ("memory.stat", "anon 200\ninactive_file 300\nactive_file 100\n"),
            ] {
                std::fs::write(folder.path().join(name), text).unwrap();
            }
            memory_left_in(folder.path().to_str().unwrap())
        };
        assert_eq!((left("1000\n"), left("max\n")), (Some(700), None));
        assert_eq!(memory_left_in("/no/such/group"), None);
    }
}
