//! The runtime: looks up, compiles, loads. It never searches and never times.

use crate::buckets::BucketTable;
use crate::cpu::{self, CpuFfnPlan, CpuPlan};
use crate::cubin_cache::CubinCache;
use crate::cublaslt::{CublasLt, CublasLtError};
use crate::ffn::{FfnSpec, Keep};
use crate::gpu::{self, Gpu, GpuError, Kernel};
use crate::nvrtc::{CompileError, Nvrtc};
use crate::operands::ForwardSpec;
use crate::options::Options;
use crate::plan::{Choice, Plan, Selection, Serving, StepPlan};
use crate::scratch;
use cudarc::driver::CudaContext;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use swiglu_db::{Match, TuningTable};
use swiglu_kernels::families::{Target, default_config};
use swiglu_kernels::model::Chip;
use swiglu_kernels::problem::{DType, Problem};
use swiglu_kernels::render::{self, RenderError, SharedSource};
use swiglu_kernels::{ArchSpec, Config, Op, Rejected};

/// The values of M that have a default config of their own where nothing was tuned.
pub const UNTUNED_ANCHORS: [u32; 5] = [1, 16, 64, 512, 4096];

/// Why a plan could not be prepared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// The GPU cannot be used.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// A kernel did not compile.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// A library cannot be used.
    #[error(transparent)]
    Library(#[from] CublasLtError),
    /// A kernel was not generated.
    #[error(transparent)]
    Render(#[from] RenderError),
    /// No family runs the problem here.
    #[error("no kernel runs this problem: {0}")]
    Unsupported(#[from] Rejected),
    /// A size is out of range.
    #[error("argument `{argument}` is {value}, at most {most} is supported")]
    TooLarge {
        /// `n` or `k`.
        argument: &'static str,
        /// Its value.
        value: u32,
        /// The largest that is supported.
        most: u32,
    },
    /// A step has no such size.
    #[error("argument `{argument}` is 0; a step needs at least 1")]
    Empty {
        /// `n` or `k`.
        argument: &'static str,
    },
    /// The forward is prepared from a [`ForwardSpec`].
    #[error("`{0}` is no step; prepare it with `Runtime::prepare`")]
    NotAStep(Op),
    /// The CPU plan was refused.
    #[error(transparent)]
    Cpu(#[from] cpu::CpuError),
}

/// Compiles and loads tuned kernels for one GPU. Make one per context and keep it.
#[derive(Debug)]
pub struct Runtime {
    gpu: Gpu,
    nvrtc: Nvrtc,
    cache: CubinCache,
    table: TuningTable,
    /// Looked for when a config first names it, and again after a failure that may pass.
    library: OnceLock<Result<Arc<CublasLt>, CublasLtError>>,
}

impl Runtime {
    /// A runtime on the caller's context. Reads the tuning table once.
    ///
    /// # Errors
    /// Without NVRTC, or on a GPU this project or that NVRTC does not know.
    pub fn new(context: &Arc<CudaContext>, options: &Options) -> Result<Self, PrepareError> {
        let gpu = Gpu::from_context(Arc::clone(context))?;
        Self::on_gpu(gpu, options, load_table(options))
    }

    /// A runtime that looks configs up in `table`.
    ///
    /// # Errors
    /// As [`Runtime::new`].
    pub fn on_gpu(gpu: Gpu, options: &Options, table: TuningTable) -> Result<Self, PrepareError> {
        let nvrtc = Nvrtc::load(options.nvrtc.as_deref())?;
        nvrtc.check_arch(gpu.arch)?;
        scratch::make_pool(&gpu);
        Ok(Self { gpu, nvrtc, cache: CubinCache::new(options.cubin_dir()), table, library: OnceLock::new() })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The compiler.
    pub fn nvrtc(&self) -> &Nvrtc {
        &self.nvrtc
    }

    /// Compiles and loads every kernel that a launch of `spec` may pick, for any M. Not during stream capture.
    ///
    /// # Errors
    /// When a size is out of range, or nothing compiles. A tuned config that no longer compiles is skipped with
    /// a warning; what was tuned for the nearest M serves in its place, the default where nothing else was. In place of
    /// a library that is not installed what came next in its race does.
    pub fn prepare(&self, spec: &ForwardSpec) -> Result<Plan, PrepareError> {
        check_sizes(&spec.problem(1))?;
        Ok(Plan { gpu: self.gpu.clone(), spec: *spec, selection: self.selection(&spec.problem(1))? })
    }

    /// The same for a step of the FFN; the problem's M does not matter.
    ///
    /// # Errors
    /// As [`Runtime::prepare`], and for the forward, which has a plan of its own.
    pub fn prepare_step(&self, problem: &Problem) -> Result<StepPlan, PrepareError> {
        let problem = problem.with_m(1);
        check_step(&problem)?;
        Ok(StepPlan { gpu: self.gpu.clone(), problem, selection: self.selection(&problem)? })
    }

    fn selection(&self, problem: &Problem) -> Result<Selection, PrepareError> {
        let tuned = self.table.anchors(&self.gpu.device.class, problem, Target::Gpu(self.gpu.arch));
        let mut tuned: Vec<Choice> =
            tuned.iter().map(|(anchor, record, matched)| Choice::tuned(*anchor, record, *matched)).collect();
        if tuned.iter().any(of_library)
            && let Err(why) = self.library()
        {
            tracing::warn!(%why, op = %problem.op, dtype = %problem.dtype, "tuned for a library that cannot be used");
            tuned = self.of_ours(problem, &tuned)?;
        }
        if !tuned.is_empty() {
            match self.kernels_of(problem, &tuned) {
                Ok(kernels) => {
                    let stand_ins = self.of_ours(problem, &tuned)?;
                    let mut selection = self.assemble(problem, tuned, &kernels)?;
                    self.stand_in(problem, &mut selection, &stand_ins);
                    return Ok(selection);
                }
                Err(error) => tracing::warn!(%error, "no tuned config can be used"),
            }
        }
        let untuned = untuned_choices(&self.gpu.device.class, problem, self.gpu.arch)?;
        let kernels = self.kernels_of(problem, &untuned)?;
        self.assemble(problem, untuned, &kernels)
    }

    fn library(&self) -> Result<Arc<CublasLt>, CublasLtError> {
        lasting(&self.library, || CublasLt::new(&self.gpu.context).map(Arc::new))
    }

    fn of_ours(&self, problem: &Problem, choices: &[Choice]) -> Result<Vec<Choice>, Rejected> {
        without_library(choices, &self.gpu.device.class, problem, self.gpu.arch)
    }

    /// A kernel of ours beside every library, for what it declines.
    fn stand_in(&self, problem: &Problem, selection: &mut Selection, stand_ins: &[Choice]) {
        let of_libraries: Vec<u32> = selection
            .anchors
            .iter()
            .map(|serving| &serving.choice)
            .filter(|it| of_library(it))
            .map(|it| it.anchor)
            .collect();
        let wanted: Vec<Choice> =
            stand_ins.iter().filter(|choice| of_libraries.contains(&choice.anchor)).copied().collect();
        // Each loaded once, however many anchors it stands in at.
        let kernels = self.kernels_of(problem, &wanted).unwrap_or_else(|error| {
            tracing::warn!(%error, "what stands in for the library cannot be used");
            BTreeMap::new()
        });
        for serving in selection.anchors.iter_mut().filter(|serving| of_library(&serving.choice)) {
            let stand_in = wanted.iter().find(|choice| choice.anchor == serving.choice.anchor);
            serving.instead = stand_in.and_then(|choice| kernels.get(&choice.config)).cloned();
        }
    }

    fn kernels_of(&self, problem: &Problem, choices: &[Choice]) -> Result<BTreeMap<Config, Kernel>, PrepareError> {
        let mut configs: Vec<Config> = choices.iter().map(|choice| choice.config).collect();
        configs.sort_unstable();
        configs.dedup();
        self.kernels(problem, &configs)
    }

    /// As [`Runtime::prepare`], with one config for every M: for tests and for measuring.
    ///
    /// # Errors
    /// As [`Runtime::prepare`], and when the config is not legal for `spec` or does not compile.
    pub fn prepare_config(&self, spec: &ForwardSpec, config: Config) -> Result<Plan, PrepareError> {
        check_sizes(&spec.problem(1))?;
        Ok(Plan { gpu: self.gpu.clone(), spec: *spec, selection: self.only(&spec.problem(1), config)? })
    }

    /// As [`Runtime::prepare_step`], with one config for every M.
    ///
    /// # Errors
    /// As [`Runtime::prepare_step`], and when the config is not legal for `problem` or does not compile.
    pub fn prepare_step_config(&self, problem: &Problem, config: Config) -> Result<StepPlan, PrepareError> {
        let problem = problem.with_m(1);
        check_step(&problem)?;
        Ok(StepPlan { gpu: self.gpu.clone(), problem, selection: self.only(&problem, config)? })
    }

    fn only(&self, problem: &Problem, config: Config) -> Result<Selection, PrepareError> {
        config.check(problem, Target::Gpu(self.gpu.arch))?;
        let kernels = self.kernels(problem, &[config])?;
        self.assemble(problem, vec![Choice::untuned(1, config, Match::Untuned)], &kernels)
    }

    /// Compiles every source once, side by side; a config that is illegal, or whose source fails, is left out with a warning.
    fn kernels(&self, problem: &Problem, configs: &[Config]) -> Result<BTreeMap<Config, Kernel>, PrepareError> {
        let mut failure = None;
        let mut leave_out = |config: &Config, error: PrepareError| {
            tracing::warn!(%config, %error, "a config cannot be used");
            failure = Some(error);
        };
        let mut legal = Vec::new();
        for config in configs {
            match config.check(problem, Target::Gpu(self.gpu.arch)) {
                Ok(()) => legal.push(*config),
                Err(why) => leave_out(config, why.into()),
            }
        }
        let shared = render::shared_sources(problem, &legal, self.gpu.arch)?;
        let loaded: Vec<Result<Vec<Kernel>, PrepareError>> =
            shared.par_iter().map(|shared| self.load(shared, problem)).collect();
        let mut kernels = BTreeMap::new();
        for config in legal.iter().filter(|config| config.family().is_library()) {
            match self.library_kernel(problem, config) {
                Ok(kernel) => {
                    kernels.insert(*config, kernel);
                }
                Err(error) => leave_out(config, error),
            }
        }
        for (shared, loaded) in shared.iter().zip(loaded) {
            match loaded {
                Ok(loaded) => kernels.extend(loaded.into_iter().map(|kernel| (kernel.config, kernel))),
                Err(error) => leave_out(&shared.configs[0], error),
            }
        }
        match failure {
            Some(error) if kernels.is_empty() => Err(error),
            _ => Ok(kernels),
        }
    }

    /// The choices that have a kernel; the fallback serves where none has.
    fn assemble(
        &self,
        problem: &Problem,
        choices: Vec<Choice>,
        kernels: &BTreeMap<Config, Kernel>,
    ) -> Result<Selection, PrepareError> {
        let unaligned = Problem { alignment: problem.dtype.output().bytes(), ..*problem };
        let fallback = match default_config(&unaligned.with_m(256), self.gpu.arch) {
            Ok(config) => match compile(&self.gpu, (&self.nvrtc, &self.cache), &unaligned, config) {
                Ok(kernel) => Some(kernel),
                Err(error) if kernels.is_empty() => return Err(error),
                Err(error) => {
                    tracing::warn!(%config, %error, "operands that are not aligned cannot be served");
                    None
                }
            },
            // The scaled formats ask for alignment.
            Err(why) if kernels.is_empty() => return Err(why.into()),
            Err(_) => None,
        };
        let usable = |choice: Choice| kernels.get(&choice.config).map(|kernel| (choice, kernel.clone()));
        let serving = |(choice, kernel)| Serving { choice, kernel, instead: None };
        let mut anchors: Vec<Serving> = choices.into_iter().filter_map(usable).map(serving).collect();
        if let (true, Some(kernel)) = (anchors.is_empty(), &fallback) {
            anchors.push(serving((Choice::untuned(1, kernel.config, Match::Untuned), kernel.clone())));
        }
        let served: Vec<Choice> = anchors.iter().map(|serving| serving.choice).collect();
        let table = BucketTable::of_choices(&self.gpu.device.class, problem, &served);
        Ok(Selection { table, anchors, fallback })
    }

    fn library_kernel(&self, problem: &Problem, config: &Config) -> Result<Kernel, PrepareError> {
        let compiler = (&self.nvrtc, &self.cache);
        self.gpu.library_kernel(&self.library()?, problem, config, |gate, config| {
            compile(&self.gpu, compiler, gate, config)
        })
    }

    fn load(&self, shared: &SharedSource, problem: &Problem) -> Result<Vec<Kernel>, PrepareError> {
        let cubin = self.cache.get_or_compile(&self.nvrtc, &shared.source, self.gpu.arch)?;
        Ok(self.gpu.load_configs(shared, &cubin, problem)?)
    }
}

/// What `known` holds, else what `find` finds; kept unless it is a failure that may pass.
fn lasting<T: Clone>(
    known: &OnceLock<Result<T, CublasLtError>>,
    find: impl FnOnce() -> Result<T, CublasLtError>,
) -> Result<T, CublasLtError> {
    if let Some(known) = known.get() {
        return known.clone();
    }
    let found = find();
    if found.as_ref().is_err_and(|why| !why.is_lasting()) {
        return found;
    }
    known.get_or_init(|| found).clone()
}

/// The kernel of `config`, from the cache or compiled.
///
/// # Errors
/// When the config is not legal for `problem`, does not compile, or the driver refuses it.
pub fn compile(
    gpu: &Gpu,
    (nvrtc, cache): (&Nvrtc, &CubinCache),
    problem: &Problem,
    config: Config,
) -> Result<Kernel, PrepareError> {
    let source = render::render(problem, &config, gpu.arch)?;
    let cubin = cache.get_or_compile(nvrtc, &source, gpu.arch)?;
    Ok(gpu.kernel(&gpu.load_source(&source, &cubin)?, &config, problem)?)
}

fn of_library(choice: &Choice) -> bool {
    choice.config.family().is_library()
}

/// The same choices with kernels of ours only: what a plan has where the library is missing.
///
/// # Errors
/// When no family runs the problem on `arch`.
pub fn without_library(
    choices: &[Choice],
    device_class: &str,
    problem: &Problem,
    arch: &'static ArchSpec,
) -> Result<Vec<Choice>, Rejected> {
    choices.iter().map(|choice| ours(choice, choices, device_class, problem, arch)).collect()
}

/// `choice`, or a kernel of ours in place of a library: the one that came next, else that of the nearest of `choices`, or what
/// serves untuned where none of them is near.
fn ours(
    choice: &Choice,
    choices: &[Choice],
    device_class: &str,
    problem: &Problem,
    arch: &'static ArchSpec,
) -> Result<Choice, Rejected> {
    if !of_library(choice) {
        return Ok(*choice);
    }
    let problem = problem.with_m(choice.anchor);
    let is_legal = |config: &Config| config.check(&problem, Target::Gpu(arch)).is_ok();
    if let Some(config) = choice.stand_in.filter(is_legal) {
        return Ok(Choice { config, median_us: None, stand_in: None, ..*choice });
    }
    let log2 = |anchor: u32| f64::from(anchor.max(1)).log2();
    let far = |other: &Choice| (log2(other.anchor) - log2(choice.anchor)).abs();
    let near = choices.iter().filter(|other| !of_library(other) && far(other) <= NEAR);
    let (config, matched) = match near.min_by(|a, b| far(a).total_cmp(&far(b))) {
        Some(nearest) => (nearest.config, Match::NearestM),
        None => untuned_config(device_class, &problem, arch)?,
    };
    // What was measured is the library's time.
    Ok(Choice { config, matched, median_us: None, stand_in: None, ..*choice })
}

/// How far apart two M are, by the logarithm to base 2, whose best kernels are alike.
const NEAR: f64 = 2.0;

/// What serves `problem` where nothing was tuned: the default, or the model's choice where that is better by more than the
/// model errs.
///
/// # Errors
/// When no family runs the problem on `arch`.
pub fn untuned_config(
    device_class: &str,
    problem: &Problem,
    arch: &'static ArchSpec,
) -> Result<(Config, Match), Rejected> {
    let default = default_config(problem, arch)?;
    let better = Chip::of_class(device_class).and_then(|chip| chip.better_than(&default, problem));
    Ok(better.map_or((default, Match::Untuned), |config| (config, Match::Model)))
}

/// What serves `problem` where nothing was tuned, for a few sizes of M.
///
/// # Errors
/// As [`untuned_config`].
pub fn untuned_choices(
    device_class: &str,
    problem: &Problem,
    arch: &'static ArchSpec,
) -> Result<Vec<Choice>, Rejected> {
    let choice = |anchor| {
        let (config, matched) = untuned_config(device_class, &problem.with_m(anchor), arch)?;
        Ok(Choice::untuned(anchor, config, matched))
    };
    UNTUNED_ANCHORS.into_iter().map(choice).collect()
}

/// The layers of tuned records that `options` point at; each warning says what is left out, or what answers in its place.
pub fn load_table(options: &Options) -> TuningTable {
    let (table, warnings) = TuningTable::load(&options.layers());
    for warning in warnings {
        tracing::warn!(%warning, "a layer of the tuning table is not whole");
    }
    table
}

/// The largest N and K that a plan takes in this format: a packed weight has 2N columns, and kernels count the bytes of a row in
/// 32 bits.
pub fn largest_size(dtype: DType) -> u32 {
    i32::MAX as u32 / 2 / dtype.output().bytes().max(dtype.weights().bytes())
}

fn check_sizes(problem: &Problem) -> Result<(), PrepareError> {
    let most = largest_size(problem.dtype);
    for (argument, value) in [("n", problem.n), ("k", problem.k)] {
        if value > most {
            return Err(PrepareError::TooLarge { argument, value, most });
        }
    }
    Ok(())
}

fn check_step(problem: &Problem) -> Result<(), PrepareError> {
    if problem.op.is_forward() {
        return Err(PrepareError::NotAStep(problem.op));
    }
    for (argument, value) in [("n", problem.n), ("k", problem.k)] {
        if value == 0 {
            return Err(PrepareError::Empty { argument });
        }
    }
    check_sizes(problem)
}

/// The CPU side of the same path.
#[derive(Debug)]
pub struct CpuRuntime {
    table: TuningTable,
}

impl CpuRuntime {
    /// Reads the tuning table once.
    pub fn new(options: &Options) -> Self {
        Self { table: load_table(options) }
    }

    /// A plan with the tuned blocks and threads, or the default ones.
    ///
    /// # Errors
    /// When the CPU does not support the number format.
    pub fn prepare(&self, spec: &ForwardSpec) -> Result<CpuPlan, PrepareError> {
        check_sizes(&spec.problem(1))?;
        let target = Target::Cpu { threads: cpu::threads() };
        let tuned = self.table.anchors(&cpu::device().class, &spec.problem(1), target);
        let entries: Vec<_> = tuned
            .into_iter()
            .filter_map(|(anchor, record, _)| match record.config {
                Config::Cpu(config) => Some((anchor, config)),
                Config::Simt(_)
                | Config::MmaDirect(_)
                | Config::WeightOnlyTma(_)
                | Config::MmaSync(_)
                | Config::WgmmaStream(_)
                | Config::WgmmaTma(_)
                | Config::Elementwise(_)
                | Config::ColumnSum(_)
                | Config::SimtGemm(_)
                | Config::MmaGemm(_)
                | Config::WgmmaGemm(_)
                | Config::Cublaslt(_) => None,
            })
            .collect();
        Ok(CpuPlan::new(*spec, &entries)?)
    }

    /// The whole FFN, forward and backward, with the blocks and threads of its forward.
    ///
    /// # Errors
    /// As [`CpuRuntime::prepare`], and when N or K is 0.
    pub fn prepare_ffn(&self, spec: &FfnSpec) -> Result<CpuFfnPlan, PrepareError> {
        check_step(&spec.step(Op::Down))?;
        let gated = self.prepare(&spec.gated(spec.keep == Keep::Preactivations))?;
        let again = if spec.keep == Keep::Nothing { Some(self.prepare(&spec.gated(true))?) } else { None };
        Ok(CpuFfnPlan::new(*spec, gated, again))
    }
}

/// What this machine offers.
#[derive(Debug)]
pub enum Backend {
    /// A GPU that can be used.
    Gpu(Box<Runtime>),
    /// The CPU, and why no GPU.
    Cpu(CpuRuntime, PrepareError),
}

impl Backend {
    /// The first GPU when it can be used, else the CPU: never an error.
    pub fn detect(options: &Options) -> Self {
        let gpu = gpu::Gpu::open(0).map_err(PrepareError::from);
        match gpu.and_then(|gpu| Runtime::on_gpu(gpu, options, load_table(options))) {
            Ok(runtime) => Self::Gpu(Box::new(runtime)),
            Err(why) => Self::Cpu(CpuRuntime::new(options), why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cudarc::cublaslt::{result::CublasError, sys::cublasStatus_t};
    use swiglu_kernels::families::CublasltConfig;
    use swiglu_kernels::{WeightMajor, arch};

    #[test]
    fn in_place_of_the_library_serves_what_came_next_else_what_won_nearby_else_what_serves_untuned() {
        let arch = arch::by_name("sm_90a").unwrap();
        let problem = Problem::forward(DType::Bf16, WeightMajor::K, 1, 14336, 4096).with_op(Op::Down);
        let library = Config::Cublaslt(CublasltConfig { algorithm: 1 });
        let tuned = swiglu_kernels::families::candidates(&problem, Target::Gpu(arch))[0];
        let choice = |anchor, config| Choice::untuned(anchor, config, Match::Exact);
        let next = Choice { stand_in: Some(tuned), median_us: Some(5.0), ..choice(2048, library) };
        let choices = [choice(16, tuned), choice(64, library), next, choice(4096, library)];
        let ours = |at: usize| ours(&choices[at], &choices, "sm_90a-sm132", &problem, arch).unwrap();
        let untuned = default_config(&problem.with_m(4096), arch).unwrap();
        assert_eq!(ours(0), choices[0]);
        assert_eq!(ours(1), Choice { matched: Match::NearestM, ..choice(64, tuned) });
        assert_eq!(ours(2), choice(2048, tuned));
        assert_eq!(ours(3), Choice { matched: Match::Untuned, ..choice(4096, untuned) });
    }

    #[test]
    fn a_library_is_looked_for_again_after_a_failure_that_may_pass() {
        let status = |status| CublasLtError::Library { act: "start", error: CublasError(status) };
        let passing = || status(cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED);
        let staying = || status(cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);
        let known = OnceLock::new();
        assert!(lasting(&known, || Err(passing())).is_err());
        assert_eq!(lasting(&known, || Ok(1)).ok(), Some(1), "memory is there again");
        assert_eq!(lasting(&known, || Err(passing())).ok(), Some(1));
        let known: OnceLock<Result<i32, _>> = OnceLock::new();
        assert!(lasting(&known, || Err(staying())).is_err());
        assert!(lasting(&known, || Ok(1)).is_err(), "not looked for again");
    }
}
