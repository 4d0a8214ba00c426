//! `bench`: what the runtime would launch beside a peer, interleaved on the same operands in one process.

pub(crate) mod library;
mod own;
mod seeds;
mod sheet;

use crate::arena::Arena;
use crate::bench_steps;
use crate::cli::open_gpu_lab;
use crate::device_memory::GuardedBuffer;
use crate::gpu_subject::{GpuLab, Stopwatch, TimedGraph};
use crate::log::emit;
use crate::race::{Failure, interval, quantile};
use crate::report::{geometric_mean, terminal_table};
use crate::{records, workload};
use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use library::{LibraryGemm, only};
use rand::seq::SliceRandom;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use swiglu_db::{Record, TuningTable};
use swiglu_kernels::families::{self, Family, Target};
use swiglu_kernels::{Config, DType, Op, Problem, WeightLayout};
use swiglu_runtime::gpu::{Gpu, Kernel};
use swiglu_runtime::{Options, RawMatrix, RawStep, gemm, launch, runtime, serving_choice};

/// What to time against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// cuBLASLt's packed GEMM, alone and followed by a gate kernel.
    Cublaslt,
    /// What the runtime would launch for the same sizes in bf16 with k_major weights.
    OursBf16,
    /// What the database has tuned for that very M; ours is what serves without the database.
    Tuned,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct BenchArgs {
    /// The peer.
    #[arg(long, value_enum, default_value = "cublaslt")]
    against: Peer,
    /// A GPU's number.
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// Model preset for n and k.
    #[arg(long, default_value = "llama-3-8b", conflicts_with_all = ["n", "k"])]
    model: String,
    /// Tokens.
    #[arg(long, value_delimiter = ',', default_value = "512,2048,8192")]
    m: Vec<u32>,
    /// Intermediate size, with --k instead of --model.
    #[arg(long, requires = "k")]
    n: Option<u32>,
    /// Hidden size.
    #[arg(long, requires = "n")]
    k: Option<u32>,
    /// forward, forward_static or forward_save, whose peer's packed GEMM leaves the pre-activations in any case; or a step of the FFN: a
    /// GEMM's peer is the library's, for dgated followed by gate_backward; that of gate and gate_backward a copy of as many
    /// bytes.
    #[arg(long, default_value = "forward")]
    op: Op,
    /// Number format.
    #[arg(long, default_value = "bf16")]
    dtype: DType,
    /// Weight layout.
    #[arg(long, default_value = "packed_nk")]
    layout: WeightLayout,
    /// The best tuned config of this family instead of the best of all.
    #[arg(long, value_parser = crate::cli::gpu_family)]
    family: Option<Family>,
    /// A config as JSON, as `report --json` shows it, instead of the tuned one; may be given several times.
    #[arg(long, conflicts_with = "family")]
    config: Vec<String>,
    /// Interleaved rounds.
    #[arg(long, default_value_t = 30)]
    rounds: usize,
    /// The seed project's own tables, B x D, with our times beside theirs: forward, backward, and with the weights' gradients.
    #[arg(long, conflicts_with_all = ["m", "n", "k", "model", "op", "dtype", "layout", "family", "config"])]
    seeds: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Write the rows as CSV.
    #[arg(long, value_name = "FILE.csv")]
    csv: Option<PathBuf>,
    /// Write a plot of the ratios against M.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// Samples, about a millisecond each, that precede those that count.
const SETTLING_SAMPLES: usize = 300;

/// Medians of one problem, in microseconds.
#[derive(Debug, Serialize)]
struct Row {
    problem: Problem,
    config: Config,
    source: String,
    ours_us: f64,
    /// Confidence interval of our median, where there are samples enough.
    ours_interval_us: Option<[f64; 2]>,
    gemm_us: f64,
    gemm_and_gate_us: f64,
    /// A kernel that only reads the weights, the fastest of a few.
    read_us: f64,
    /// Time of the GEMM alone over ours.
    over_gemm: f64,
    /// Time of GEMM and gate over ours.
    over_gemm_and_gate: f64,
    /// Our time over that of reading the weights.
    of_read: f64,
}

impl Row {
    fn tflops(&self) -> f64 {
        self.problem.flops() / self.ours_us * 1e-6
    }

    /// A row of these times of ours, of the GEMM, of GEMM + gate and of reading the weights.
    #[cfg(test)]
    fn of_times(problem: Problem, [ours_us, gemm_us, gemm_and_gate_us, read_us]: [f64; 4]) -> Self {
        Self {
            problem,
            config: Config::Cpu(families::cpu::default_config(1)),
            source: "exact".into(),
            ours_us,
            ours_interval_us: None,
            gemm_us,
            gemm_and_gate_us,
            read_us,
            of_read: ours_us / read_us,
            over_gemm: gemm_us / ours_us,
            over_gemm_and_gate: gemm_and_gate_us / ours_us,
        }
    }
}

/// What is to be timed.
fn problems(args: &BenchArgs) -> Result<Vec<Problem>> {
    if args.seeds {
        return Ok(seeds::problems());
    }
    let (n, k) = match (args.n, args.k) {
        (Some(n), Some(k)) => (n, k),
        _ => {
            let group = workload::preset(Some(&args.model), &[args.dtype], &[args.layout])?;
            group.first().map(|group| (group.n, group.k)).context("the preset is empty")?
        }
    };
    let problem = |&m: &u32| Problem::forward(args.dtype, args.layout.major(), m, n, k).with_op(args.op);
    Ok(args.m.iter().map(problem).collect())
}

/// Times every problem and prints the ratios.
pub(crate) fn run(args: &BenchArgs, options: &Options) -> Result<ExitCode> {
    let problems = problems(args)?;
    let given: Result<Vec<Config>, _> = args.config.iter().map(|text| serde_json::from_str(text)).collect();
    let given = given.context("--config is no config")?;
    let lab = open_gpu_lab(Gpu::open(args.gpu)?, options)?;
    if args.against != Peer::Cublaslt {
        return own::run(args, &problems, &given, &lab, options);
    }
    let table = runtime::load_table(options);
    let mut rows = Vec::new();
    for problem in problems {
        for &config in &given {
            rows.push(bench(&lab, problem, config, "given".into(), args.rounds)?);
        }
        if given.is_empty() {
            let (config, source) = config_for(&lab, &table, args.family, &problem, options)?;
            rows.push(bench(&lab, problem, config, source, args.rounds)?);
        }
    }
    let device = &lab.gpu.device.name;
    let write =
        |path: &Path, text: String| std::fs::write(path, text).with_context(|| format!("writing {}", path.display()));
    if let Some(path) = &args.csv {
        write(path, sheet::csv(device, &rows)?)?;
    }
    if let Some(path) = &args.plot {
        write(path, sheet::plot(device, &rows))?;
    }
    if args.seeds && !args.json {
        emit(format_args!("{device}\n{}\n", seeds::tables(&rows)))?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.json {
        print_json(&lab, &rows)?;
    } else {
        emit(figures(&rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_json(lab: &GpuLab, rows: &impl Serialize) -> Result<()> {
    let date = jiff::Timestamp::now().to_string();
    let driver = crate::doctor::driver_version().unwrap_or_default();
    let head = serde_json::json!({ "device": lab.gpu.device, "driver": driver, "nvrtc": lab.nvrtc.version_string(), "date": date, "rows": rows });
    emit(serde_json::to_string_pretty(&head)? + "\n")
}

/// The fastest of what `records` have of `problem` on this device, among the configs that are `wanted`.
fn fastest_measured(
    records: &[Record],
    problem: &Problem,
    lab: &GpuLab,
    wanted: impl Fn(&Config) -> bool,
) -> Option<Config> {
    let of_problem = records.iter().filter(|record| {
        record.problem == *problem && record.device.class == lab.gpu.device.class && wanted(&record.config)
    });
    let measured = of_problem.filter_map(|record| Some((record.measurement()?.median_us, record.config)));
    measured.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, config)| config)
}

fn config_for(
    lab: &GpuLab,
    table: &TuningTable,
    family: Option<Family>,
    problem: &Problem,
    options: &Options,
) -> Result<(Config, String)> {
    let target = Target::Gpu(lab.gpu.arch);
    if let Some(family) = family {
        let records = records::read(options)?;
        return Ok(match fastest_measured(&records, problem, lab, |config| config.family() == family) {
            Some(config) => (config, "tuned".into()),
            None => (families::default_of(family, problem, lab.gpu.arch)?, "default".into()),
        });
    }
    // What a prepared plan launches for this M.
    let found = records::serving(table, &lab.gpu.device.class, problem, target);
    Ok(match found {
        Some((m, record, matched)) => (record.config, format!("{matched}, M {m}")),
        None => {
            let class = &lab.gpu.device.class;
            let choices = runtime::untuned_choices(class, problem, lab.gpu.arch)?;
            let serving = serving_choice(class, problem, &choices).context("nothing serves the problem")?;
            (serving.config, serving.matched.to_string())
        }
    })
}

fn bench(lab: &GpuLab, problem: Problem, config: Config, source: String, rounds: usize) -> Result<Row> {
    let watch = Stopwatch::new(lab).map_err(|failure| as_error(&failure))?;
    let (arena, kernel) = verified(lab, problem, config, &watch)?;
    let ours = |index: usize| arena.launch(lab, &kernel, index);
    let samples = if problem.op.is_forward() {
        CublasLtPeer::new(lab, &arena)?.race(&watch, ours, rounds).map_err(|failure| as_error(&failure))?
    } else {
        bench_steps::race(lab, &arena, &watch, ours, rounds)?
    };
    let [ours_us, gemm_us, gemm_and_gate_us, read_us] = medians(&samples);
    Ok(Row {
        problem,
        config,
        source,
        ours_us,
        ours_interval_us: interval(&samples[0]),
        gemm_us,
        gemm_and_gate_us,
        read_us,
        of_read: ours_us / read_us,
        over_gemm: gemm_us / ours_us,
        over_gemm_and_gate: gemm_and_gate_us / ours_us,
    })
}

/// Operands, and the kernel of `config`, which has matched the oracle on them.
fn verified(lab: &GpuLab, problem: Problem, config: Config, watch: &Stopwatch<'_>) -> Result<(Arena, Kernel)> {
    let kernel = kernel_of(lab, &problem, config)?;
    let arena = Arena::new(lab, problem, rand::random()).map_err(|failure| as_error(&failure))?;
    let reference = arena.reference().map_err(|failure| as_error(&failure))?;
    arena.verify(lab, &kernel, &reference, watch).map_err(|failure| as_error(&failure))?;
    Ok((arena, kernel))
}

/// `config`, compiled and loaded.
pub(crate) fn kernel_of(lab: &GpuLab, problem: &Problem, config: Config) -> Result<Kernel> {
    let mut compiled = lab.compile(problem, &[config], || ())?;
    compiled.remove(&config).context("nothing was compiled")?.kernel.map_err(|failure| as_error(&failure))
}

/// Every config that `problem` has, compiled and loaded.
pub(crate) fn kernels_of(lab: &GpuLab, problem: &Problem) -> Result<Vec<Kernel>> {
    let configs = families::candidates(problem, Target::Gpu(lab.gpu.arch));
    let compiled = lab.compile(problem, &configs, || ())?;
    Ok(compiled.into_values().filter_map(|compiled| compiled.kernel.ok()).collect())
}

/// A launch on the buffer set of that index.
pub(crate) type Launch<'a> = &'a dyn Fn(usize) -> Result<(), Failure>;

/// Times of launches that take turns, in microseconds; the second runs first, until clocks are those of steady load.
pub(crate) fn interleave<const COUNT: usize>(
    watch: &Stopwatch<'_>,
    launches: [Launch<'_>; COUNT],
    rounds: usize,
) -> Result<[Vec<f64>; COUNT], Failure> {
    let graphs = launches.map(|launch| watch.capture(launch));
    let graphs = graphs.into_iter().collect::<Result<Vec<TimedGraph>, Failure>>()?;
    watch.sample(&vec![&graphs[1]; SETTLING_SAMPLES])?;
    // In random order: clocks lag behind power by milliseconds, so that a fixed order would favour whoever follows
    // the lightest load.
    let mut order: Vec<usize> = Vec::new();
    for _ in 0..rounds.max(1) {
        let mut round: [usize; COUNT] = std::array::from_fn(|index| index);
        round.shuffle(&mut rand::rng());
        order.extend(round);
    }
    let shuffled: Vec<&TimedGraph> = order.iter().filter_map(|&which| graphs.get(which)).collect();
    let mut samples = [const { Vec::new() }; COUNT];
    for (which, time) in order.into_iter().zip(watch.sample(&shuffled)?) {
        samples[which].push(time);
    }
    Ok(samples)
}

/// The median of each.
pub(crate) fn medians<const COUNT: usize>(samples: &[Vec<f64>; COUNT]) -> [f64; COUNT] {
    samples.each_ref().map(|samples| quantile(samples, 0.5))
}

pub(crate) fn as_error(failure: &Failure) -> anyhow::Error {
    anyhow::anyhow!("{}: {}", failure.stage, failure.reason)
}

/// The packed GEMM on the arena's operands, with its `[m, 2n]` output.
struct CublasLtPeer<'a> {
    gemm: LibraryGemm,
    /// The second launch, act(gate) * up, in every way there is: the fastest takes part.
    gates: Vec<Kernel>,
    lab: &'a GpuLab,
    arena: &'a Arena,
    /// One per set, so that the output is as cold as ours.
    outputs: Vec<GuardedBuffer>,
}

/// Gate and up in the `[m, 2n]` output of set `index`.
fn sums(arena: &Arena, outputs: &[GuardedBuffer], index: usize) -> [RawMatrix; 2] {
    let Problem { n, dtype, .. } = arena.problem;
    let (packed, half) = (outputs[index % outputs.len()].address(), u64::from(n) * u64::from(dtype.bytes()));
    [0, half].map(|offset| RawMatrix { address: packed + offset, stride: 2 * i64::from(n) })
}

fn gemm_at(arena: &Arena, outputs: &[GuardedBuffer], index: usize) -> Result<gemm::GemmAt, Failure> {
    only(gemm::of_forward(&arena.problem, &arena.forward(index), sums(arena, outputs, index)))
}

impl<'a> CublasLtPeer<'a> {
    fn new(lab: &'a GpuLab, arena: &'a Arena) -> Result<Self> {
        let Problem { m, n, dtype, .. } = arena.problem;
        let bytes = 2 * m as usize * n as usize * dtype.bytes() as usize;
        let outputs: Result<Vec<_>, Failure> = (0..arena.set_count()).map(|_| arena.support.allocate(bytes)).collect();
        let outputs = outputs.map_err(|failure| as_error(&failure))?;
        let gates = kernels_of(lab, &arena.problem.with_op(Op::Gate))?;
        let first = gemm_at(arena, &outputs, 0).map_err(|failure| as_error(&failure))?;
        Ok(Self { gemm: LibraryGemm::new(lab, &arena.problem, &first)?, gates, lab, arena, outputs })
    }

    #[allow(unsafe_code, reason = "hands the arena's addresses to cuBLASLt")]
    fn launch_gemm(&self, algorithm: usize, index: usize) -> Result<(), Failure> {
        let at = gemm_at(self.arena, &self.outputs, index)?;
        // SAFETY: the arena's buffers hold x [m, k] and the packed weights, `outputs` hold [m, 2n]; all outlive the work.
        unsafe { self.gemm.launch(algorithm, &at) }
    }

    #[allow(unsafe_code, reason = "hands the arena's addresses to the gate")]
    fn launch_gate(&self, gate: &Kernel, index: usize) -> Result<(), Failure> {
        let Problem { m, n, .. } = self.arena.problem;
        let z = RawMatrix { address: self.arena.forward(index).z, stride: i64::from(n) };
        let saved = sums(self.arena, &self.outputs, index);
        let args = RawStep { m, saved, out: [z, RawMatrix::default(), RawMatrix::default()], ..RawStep::default() };
        // SAFETY: `outputs` hold [m, 2n], the arena's z [m, n]; both outlive the work and are as aligned as the problem says.
        unsafe { launch::step(gate, self.lab.stream.cu_stream(), &args) }
            .map_err(|refusal| Failure::new("launch", refusal))
    }

    /// Times of ours, of the GEMM, of GEMM + gate and of reading the weights; the GEMM with the fastest of its algorithms,
    /// the gate with the fastest of its configs, the reader with the better of two grids.
    fn race(
        &self,
        watch: &Stopwatch,
        ours: impl Fn(usize) -> Result<(), Failure>,
        rounds: usize,
    ) -> Result<[Vec<f64>; 4], Failure> {
        let algorithm = fastest(watch, self.gemm.algorithms(), |&algorithm, index| self.launch_gemm(algorithm, index))?;
        let per_sm = fastest(watch, [2, 4].into_iter(), |&per_sm, index| self.arena.read_weights(index, per_sm))?;
        let gemm = |index: usize| self.launch_gemm(algorithm, index);
        let gate = fastest(watch, self.gates.iter(), |gate, index| self.launch_gate(gate, index))?;
        let both = |index: usize| gemm(index).and_then(|()| self.launch_gate(gate, index));
        let read = |index: usize| self.arena.read_weights(index, per_sm);
        interleave(watch, [&ours, &gemm, &both, &read], rounds)
    }
}

/// The choice whose launches take least; one that fails is none.
pub(crate) fn fastest<T>(
    watch: &Stopwatch<'_>,
    choices: impl Iterator<Item = T>,
    launch: impl Fn(&T, usize) -> Result<(), Failure>,
) -> Result<T, Failure> {
    let mut best: Option<(f64, T)> = None;
    for choice in choices {
        let Ok(graph) = watch.capture(|index| launch(&choice, index)) else { continue };
        let time = quantile(&watch.sample(&[&graph; 5])?, 0.5);
        if best.as_ref().is_none_or(|(least, _)| time < *least) {
            best = Some((time, choice));
        }
    }
    best.map(|(_, choice)| choice).ok_or_else(|| Failure::new("launch", "no way to launch the peer works"))
}

fn figures(rows: &[Row]) -> String {
    let mut table = terminal_table([
        "op",
        "dtype",
        "M",
        "N",
        "K",
        "config",
        "from",
        "ours us",
        "GEMM us",
        "GEMM+gate us",
        "read us",
        "GEMM/ours",
        "GEMM+gate/ours",
        "ours/read",
        "TFLOP/s",
        "TB/s",
    ]);
    for row in rows {
        let Problem { op, dtype, m, n, k, .. } = row.problem;
        table.add_row([
            op.to_string(),
            dtype.to_string(),
            m.to_string(),
            n.to_string(),
            k.to_string(),
            row.config.to_string(),
            row.source.clone(),
            format!("{:.1}", row.ours_us),
            format!("{:.1}", row.gemm_us),
            format!("{:.1}", row.gemm_and_gate_us),
            format!("{:.1}", row.read_us),
            format!("{:.3}", row.over_gemm),
            format!("{:.3}", row.over_gemm_and_gate),
            format!("{:.3}", row.of_read),
            format!("{:.1}", row.tflops()),
            format!("{:.2}", row.problem.bytes() / row.ours_us * 1e-6),
        ]);
    }
    // Of no row it is that of no ratio.
    let geomean = |ratio: fn(&Row) -> f64| geometric_mean(rows.iter().map(ratio)).unwrap_or(1.0);
    format!(
        "{table}\ngeometric mean: {:.3} of the GEMM alone, {:.3} of GEMM + gate\n",
        geomean(|row| row.over_gemm),
        geomean(|row| row.over_gemm_and_gate)
    )
}
