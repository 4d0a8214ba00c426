//! Candidates on a GPU: compiled side by side, verified on poisoned memory, timed over rotating buffers.
#![allow(unsafe_code, reason = "turns off the event tracking of a context of its own")]

use crate::arena::{Arena, Reference};
use crate::device_memory::driver;
use crate::race::{Failure, Subject, quantile};
use cudarc::driver::{CudaEvent, CudaGraph, CudaStream, sys};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use swiglu_kernels::render::{self, RenderError, SharedSource};
use swiglu_kernels::{Config, Family, Problem};
use swiglu_runtime::cubin_cache::CubinCache;
use swiglu_runtime::cublaslt::{CublasLt, CublasLtError};
use swiglu_runtime::gpu::{Gpu, Kernel};
use swiglu_runtime::nvrtc::{Nvrtc, Resources};
use swiglu_runtime::{PrepareError, runtime};

/// A candidate whose first launch takes this many times the shortest one's is not timed more closely.
const ABANDON_FACTOR: f64 = 1.4;
/// What events and the launch itself add to a single launch, in microseconds.
const EVENT_US: f64 = 20.0;
/// Length of one sample, in microseconds: long against the events' resolution and the launch gaps, and long enough
/// for the power limit to be felt.
const SAMPLE_US: f64 = 1000.0;

/// What tuning and benching on one GPU share.
pub(crate) struct GpuLab {
    pub(crate) gpu: Gpu,
    pub(crate) nvrtc: Nvrtc,
    pub(crate) cache: CubinCache,
    pub(crate) stream: Arc<CudaStream>,
    /// Looked for once.
    library: OnceLock<Result<Arc<CublasLt>, CublasLtError>>,
}

/// A candidate that compiled, or why it did not.
pub(crate) struct Compiled {
    pub(crate) resources: Resources,
    pub(crate) kernel: Result<Kernel, Failure>,
}

impl GpuLab {
    /// A lab on `gpu` with a stream of its own.
    pub(crate) fn new(gpu: Gpu, nvrtc: Nvrtc, cache: CubinCache) -> Result<Self, PrepareError> {
        // SAFETY: this process uses the one stream made below, which orders all work; without tracking, launches
        // record no events and can be captured.
        unsafe { gpu.context.disable_event_tracking() };
        let stream = gpu
            .context
            .new_stream()
            .map_err(|error| swiglu_runtime::gpu::GpuError::Driver { act: "make a stream", error })?;
        Ok(Self { gpu, nvrtc, cache, stream, library: OnceLock::new() })
    }

    /// cuBLASLt, where it is installed.
    pub(crate) fn library(&self) -> Result<Arc<CublasLt>, CublasLtError> {
        self.library.get_or_init(|| CublasLt::new(&self.gpu.context).map(Arc::new)).clone()
    }

    /// Whether an earlier fault has made the context useless, as an illegal address does.
    pub(crate) fn is_lost(&self) -> bool {
        self.stream.synchronize().is_err()
    }

    /// Compiles every source on all cores; configs that differ in launch parameters only share one image. Those of a library
    /// are made ready as they are.
    ///
    /// # Errors
    /// When a config is not legal for `problem`.
    pub(crate) fn compile(
        &self,
        problem: &Problem,
        configs: &[Config],
        done: impl Fn() + Sync,
    ) -> Result<BTreeMap<Config, Compiled>, RenderError> {
        let sources = render::shared_sources(problem, configs, self.gpu.arch)?;
        let compile = |shared: &SharedSource| {
            let compiled = self.compile_one(problem, shared);
            done();
            compiled
        };
        let mut compiled: BTreeMap<Config, Compiled> = sources.par_iter().flat_map_iter(compile).collect();
        for config in configs.iter().filter(|config| !config.family().has_source()) {
            let kernel = self.library_kernel(problem, config).map_err(|error| Failure::new("launch", error));
            compiled.insert(*config, Compiled { resources: Resources::default(), kernel });
        }
        Ok(compiled)
    }

    fn library_kernel(&self, problem: &Problem, config: &Config) -> Result<Kernel, PrepareError> {
        let compiler = (&self.nvrtc, &self.cache);
        let gate = |gate: &Problem, config| runtime::compile(&self.gpu, compiler, gate, config);
        self.gpu.library_kernel(&self.library()?, problem, config, gate)
    }

    fn compile_one(&self, problem: &Problem, shared: &SharedSource) -> Vec<(Config, Compiled)> {
        let failed = |resources, failure: Failure| {
            let one = |&config: &Config| (config, Compiled { resources, kernel: Err(failure.clone()) });
            shared.configs.iter().map(one).collect()
        };
        let cubin = match self.cache.get_or_compile(&self.nvrtc, &shared.source, self.gpu.arch) {
            Ok(cubin) => cubin,
            Err(error) => return failed(Resources::default(), Failure::new("compile", error)),
        };
        let resources = cubin.resources;
        if let Some(objection) = resources.objection() {
            return failed(resources, Failure::new("spill", objection));
        }
        match self.gpu.load_configs(shared, &cubin, problem) {
            Ok(kernels) => {
                let one = |kernel: Kernel| (kernel.config, Compiled { resources, kernel: Ok(kernel) });
                kernels.into_iter().map(one).collect()
            }
            Err(error) => failed(resources, Failure::new("launch", error)),
        }
    }
}

/// Work before the last round and each sustained one, in microseconds.
const SETTLING_US: f64 = 200_000.0;
/// Length of a sustained sample, in microseconds. Clocks follow the power within some 30 ms: its first quarter does not count.
const SUSTAINED_US: f64 = 130_000.0;

/// Times work on the lab's stream.
pub(crate) struct Stopwatch<'a> {
    stream: &'a Arc<CudaStream>,
    start: CudaEvent,
    end: CudaEvent,
}

/// A graph of launches, long enough to time.
pub(crate) struct TimedGraph {
    graph: CudaGraph,
    launches: u32,
}

impl<'a> Stopwatch<'a> {
    pub(crate) fn new(lab: &'a GpuLab) -> Result<Self, Failure> {
        let event =
            || lab.gpu.context.new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).map_err(driver("make an event"));
        Ok(Self { stream: &lab.stream, start: event()?, end: event()? })
    }

    /// Time of `work`, in microseconds.
    pub(crate) fn time(&self, work: impl FnOnce() -> Result<(), Failure>) -> Result<f64, Failure> {
        self.start.record(self.stream).map_err(driver("record an event"))?;
        work()?;
        self.end.record(self.stream).map_err(driver("record an event"))?;
        self.end.synchronize().map_err(driver("wait for a launch"))?;
        let elapsed = self.start.elapsed_ms(&self.end).map_err(driver("read a time"))?;
        Ok(f64::from(elapsed) * 1e3)
    }

    /// Captures `launch(0), launch(1), ...`: as many as make a sample, by the time of one.
    pub(crate) fn capture(&self, launch: impl Fn(usize) -> Result<(), Failure>) -> Result<TimedGraph, Failure> {
        launch(1)?;
        let once = self.time(|| launch(2))?;
        self.capture_for(once, launch)
    }

    /// As [`Stopwatch::capture`], for launches that take about `once` microseconds and were launched before.
    fn capture_for(&self, once: f64, launch: impl Fn(usize) -> Result<(), Failure>) -> Result<TimedGraph, Failure> {
        let launches = (SAMPLE_US / once.max(1.0)).ceil().clamp(1.0, 128.0) as u32;
        self.stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(driver("begin a capture"))?;
        let launched = (0..launches as usize).try_for_each(&launch);
        let graph =
            self.stream.end_capture(sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
        launched?;
        let graph = graph
            .map_err(driver("end a capture"))?
            .ok_or_else(|| Failure::new("launch", "an empty graph was captured"))?;
        graph.upload().map_err(driver("upload a graph"))?;
        Ok(TimedGraph { graph, launches })
    }

    /// Times of one launch of each graph, in microseconds. All are queued before any is waited for: the GPU does not
    /// idle in between, so clocks and power are those of steady work.
    pub(crate) fn sample(&self, graphs: &[&TimedGraph]) -> Result<Vec<f64>, Failure> {
        let event = || {
            let event = self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
            event.map_err(driver("record an event"))
        };
        let mut marks = Vec::with_capacity(graphs.len());
        for timed in graphs {
            let start = event()?;
            timed.graph.launch().map_err(driver("launch a graph"))?;
            marks.push((start, event()?, timed.launches));
        }
        let time = |(start, end, launches): &(CudaEvent, CudaEvent, u32)| {
            end.synchronize().map_err(driver("wait for a launch"))?;
            let elapsed = start.elapsed_ms(end).map_err(driver("read a time"))?;
            Ok(f64::from(elapsed) * 1e3 / f64::from(*launches))
        };
        marks.iter().map(time).collect()
    }
}

/// The candidates of one problem, ready to race.
pub(crate) struct GpuSubject<'a> {
    lab: &'a GpuLab,
    compiled: &'a BTreeMap<Config, Compiled>,
    arena: Arena,
    reference: Reference,
    stopwatch: Stopwatch<'a>,
    /// Time of the verified launch of each candidate, in microseconds.
    once: BTreeMap<Config, f64>,
    graphs: BTreeMap<Config, TimedGraph>,
    /// Timed however slow they are.
    pinned: &'a [Config],
}

impl<'a> GpuSubject<'a> {
    /// Allocates and fills fresh operands and computes the reference.
    pub(crate) fn new(
        lab: &'a GpuLab,
        compiled: &'a BTreeMap<Config, Compiled>,
        problem: Problem,
        pinned: &'a [Config],
        seed: u64,
    ) -> Result<Self, Failure> {
        let arena = Arena::new(lab, problem, seed)?;
        let reference = arena.reference()?;
        Ok(Self {
            lab,
            compiled,
            arena,
            reference,
            stopwatch: Stopwatch::new(lab)?,
            once: BTreeMap::new(),
            graphs: BTreeMap::new(),
            pinned,
        })
    }

    fn kernel(&self, config: &Config) -> Result<&'a Kernel, Failure> {
        let compiled = self.compiled.get(config).ok_or_else(|| Failure::new("compile", "was not compiled"))?;
        compiled.kernel.as_ref().map_err(Failure::clone)
    }
}

impl Subject for GpuSubject<'_> {
    fn verify(&mut self, config: &Config) -> Result<f64, Failure> {
        let kernel = self.kernel(config)?;
        let bound = self.lower_bound_us(config);
        if bound > self.shortest() * ABANDON_FACTOR + EVENT_US && !self.pinned.contains(config) {
            return Err(Failure::new("pruned", format!("cannot take less than {bound:.0} us")));
        }
        let verified = self.arena.verify(self.lab, kernel, &self.reference, &self.stopwatch)?;
        self.once.insert(*config, verified.once_us);
        Ok(verified.error)
    }

    fn is_lost(&mut self) -> bool {
        self.lab.is_lost()
    }

    fn settle(&mut self, config: &Config) {
        // A failure shows again in the samples that follow.
        let _ = self.run_for(SETTLING_US, config);
    }

    fn sustain(&mut self, config: &Config) -> Result<f64, Failure> {
        self.prepare(config)?;
        let times = self.run_for(SUSTAINED_US, config)?;
        Ok(quantile(&times[times.len() / 4..], 0.5))
    }

    fn sample(&mut self, configs: &[Config]) -> Vec<Result<f64, Failure>> {
        let prepared: Vec<Result<Option<f64>, Failure>> = configs.iter().map(|config| self.prepare(config)).collect();
        let graphs: Vec<&TimedGraph> = configs.iter().filter_map(|config| self.graphs.get(config)).collect();
        let mut times = match self.stopwatch.sample(&graphs) {
            Ok(times) => times.into_iter(),
            Err(failure) => return vec![Err(failure); configs.len()],
        };
        let lost = || Failure::new("launch", "was not captured");
        let time = |prepared: Result<Option<f64>, Failure>| prepared?.or_else(|| times.next()).ok_or_else(lost);
        prepared.into_iter().map(time).collect()
    }
}

impl GpuSubject<'_> {
    /// Times of the samples of `config` that fill `length_us`; none where it was not captured.
    fn run_for(&self, length_us: f64, config: &Config) -> Result<Vec<f64>, Failure> {
        let Some(graph) = self.graphs.get(config) else { return Err(Failure::untimed()) };
        let once = self.once.get(config).copied().unwrap_or(SAMPLE_US);
        self.stopwatch.sample(&vec![graph; (length_us / SAMPLE_US.max(once)).ceil() as usize])
    }

    /// Time of the shortest verified launch so far.
    fn shortest(&self) -> f64 {
        self.once.values().copied().fold(f64::INFINITY, f64::min)
    }

    /// What no launch of `config` can beat: for `simt` the rate of the FMA units, for tensor cores nothing is known.
    fn lower_bound_us(&self, config: &Config) -> f64 {
        match config.family() {
            Family::Simt | Family::SimtGemm => self.arena.problem.flops() / self.lab.gpu.peak_fma_flops * 1e6,
            _ => 0.0,
        }
    }

    /// Captures the graph of `config` unless it has one; the time of a single launch where that is hopeless already.
    fn prepare(&mut self, config: &Config) -> Result<Option<f64>, Failure> {
        if self.graphs.contains_key(config) {
            return Ok(None);
        }
        let kernel = self.kernel(config)?;
        let launch = |index| self.arena.launch(self.lab, kernel, index);
        let shortest = self.shortest();
        let once = self.once.get(config).copied().unwrap_or(shortest);
        if once > shortest * ABANDON_FACTOR + EVENT_US && !self.pinned.contains(config) {
            return Ok(Some(once));
        }
        let graph = self.stopwatch.capture_for(once, launch)?;
        self.graphs.insert(*config, graph);
        Ok(None)
    }
}
