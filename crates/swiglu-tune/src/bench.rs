//! `bench`: what the runtime would launch beside a peer, interleaved on the same operands in one process.

mod seeds;
mod sheet;

use crate::cli::open_gpu_lab;
use crate::gpu_subject::{Arena, GpuLab, Stopwatch, TimedGraph};
use crate::race::{Failure, interval, quantile};
use crate::report::geometric_mean;
use crate::{records, workload};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use rand::seq::SliceRandom;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use swiglu_db::TuningTable;
use swiglu_kernels::families::{self, Family, Target};
use swiglu_kernels::{Config, DType, Op, Problem, WeightLayout, render};
use swiglu_runtime::cublaslt::{CublasLt, Gemm};
use swiglu_runtime::gpu::Gpu;
use swiglu_runtime::runtime::UNTUNED_ANCHORS;
use swiglu_runtime::{Options, runtime, serving_anchor};

/// What to time against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// cuBLASLt's packed GEMM, alone and followed by a gate kernel.
    Cublaslt,
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
    /// forward, or forward_save; the peer's packed GEMM leaves the pre-activations in either case.
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
    /// The seed project's own table of the forward, B x D, with our times beside theirs.
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
    /// Time of the GEMM alone over ours.
    over_gemm: f64,
    /// Time of GEMM and gate over ours.
    over_gemm_and_gate: f64,
}

impl Row {
    fn tflops(&self) -> f64 {
        self.problem.flops() / self.ours_us * 1e-6
    }

    /// A row of these times of ours, of the GEMM and of GEMM + gate.
    #[cfg(test)]
    fn of_times(problem: Problem, [ours_us, gemm_us, gemm_and_gate_us]: [f64; 3]) -> Self {
        Self {
            problem,
            config: Config::Cpu(families::cpu::default_config(1)),
            source: "exact".into(),
            ours_us,
            ours_interval_us: None,
            gemm_us,
            gemm_and_gate_us,
            over_gemm: gemm_us / ours_us,
            over_gemm_and_gate: gemm_and_gate_us / ours_us,
        }
    }
}

/// What is to be timed.
fn problems(args: &BenchArgs) -> Result<Vec<Problem>> {
    if args.seeds {
        return Ok(seeds::FORWARD.iter().map(seeds::Printed::problem).collect());
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
        println!("{device}\n{}", seeds::table(&seeds::FORWARD, &rows));
        return Ok(ExitCode::SUCCESS);
    }
    if args.json {
        let date = jiff::Timestamp::now().to_string();
        let driver = crate::doctor::driver_version().unwrap_or_default();
        let head = serde_json::json!({ "device": lab.gpu.device, "driver": driver, "nvrtc": lab.nvrtc.version_string(), "date": date, "rows": rows });
        println!("{}", serde_json::to_string_pretty(&head)?);
    } else {
        print_table(&rows);
    }
    Ok(ExitCode::SUCCESS)
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
        let of_family = records::read(options)?.into_iter().filter(|record| {
            record.config.family() == family
                && record.problem == *problem
                && record.device.class == lab.gpu.device.class
        });
        let measured = of_family.filter_map(|record| Some((record.measurement()?.median_us, record.config)));
        return Ok(match measured.min_by(|a, b| a.0.total_cmp(&b.0)) {
            Some((_, config)) => (config, "tuned".into()),
            None => (families::default_of(family, problem, lab.gpu.arch)?, "default".into()),
        });
    }
    // What a prepared plan launches for this M.
    let found = records::serving(table, &lab.gpu.device.class, problem, target);
    Ok(match found {
        Some((m, record, matched)) => (record.config, format!("{matched}, M {m}")),
        None => {
            let m = serving_anchor(&UNTUNED_ANCHORS, problem.m).unwrap_or(problem.m);
            let (config, rung) = runtime::untuned_config(&lab.gpu.device.class, &problem.with_m(m), lab.gpu.arch)?;
            (config, rung.to_string())
        }
    })
}

fn bench(lab: &GpuLab, problem: Problem, config: Config, source: String, rounds: usize) -> Result<Row> {
    if !problem.n.is_multiple_of(8) {
        bail!("n is {}; the peer's gate kernel takes multiples of 8", problem.n);
    }
    if problem.m > u32::from(u16::MAX) {
        bail!("m is {}; the peer's gate kernel takes at most {}", problem.m, u16::MAX);
    }
    let sources = render::shared_sources(&problem, &[config], lab.gpu.arch)?;
    let compiled = lab.compile(&problem, &sources, || ());
    let kernel = compiled.get(&config).context("nothing was compiled")?.kernel.as_ref().map_err(as_error)?;
    let arena = Arena::new(lab, problem, rand::random()).map_err(|failure| as_error(&failure))?;
    let reference = arena.reference().map_err(|failure| as_error(&failure))?;
    let watch = Stopwatch::new(lab).map_err(|failure| as_error(&failure))?;
    arena.verify(lab, kernel, &reference, &watch).map_err(|failure| as_error(&failure))?;
    drop(reference);
    let peer = CublasLtPeer::new(lab, &arena)?;
    let samples =
        peer.race(&watch, |index| arena.launch(lab, kernel, index), rounds).map_err(|failure| as_error(&failure))?;
    let [ours_us, gemm_us, gemm_and_gate_us] = samples.each_ref().map(|samples| quantile(samples, 0.5));
    Ok(Row {
        problem,
        config,
        source,
        ours_us,
        ours_interval_us: interval(&samples[0]),
        gemm_us,
        gemm_and_gate_us,
        over_gemm: gemm_us / ours_us,
        over_gemm_and_gate: gemm_and_gate_us / ours_us,
    })
}

fn as_error(failure: &Failure) -> anyhow::Error {
    anyhow::anyhow!("{}: {}", failure.stage, failure.reason)
}

/// The packed GEMM on the arena's operands, with its `[m, 2n]` output.
struct CublasLtPeer<'a> {
    library: CublasLt,
    gemm: Gemm,
    arena: &'a Arena,
    /// One per set, so that the output is as cold as ours.
    outputs: Vec<crate::device_memory::GuardedBuffer>,
}

impl<'a> CublasLtPeer<'a> {
    fn new(lab: &GpuLab, arena: &'a Arena) -> Result<Self> {
        let library = CublasLt::new(&lab.stream)?;
        let Problem { m, n, k, dtype, weight_major, .. } = arena.problem;
        let gemm = library.gemm(dtype, weight_major, m, 2 * n, k)?;
        let bytes = 2 * m as usize * n as usize * dtype.bytes() as usize;
        let outputs: Result<Vec<_>, Failure> = (0..arena.set_count()).map(|_| arena.support.allocate(bytes)).collect();
        Ok(Self { library, gemm, arena, outputs: outputs.map_err(|failure| as_error(&failure))? })
    }

    fn launch_gemm(&self, algorithm: usize, index: usize) -> Result<(), Failure> {
        let args = self.arena.args(index);
        let out = self.outputs[index % self.outputs.len()].address();
        self.launch_on(algorithm, args.x, args.gate, out)
    }

    #[allow(unsafe_code, reason = "hands the arena's addresses to cuBLASLt")]
    fn launch_on(&self, algorithm: usize, x: u64, w: u64, out: u64) -> Result<(), Failure> {
        // SAFETY: the arena's buffers hold x [m, k] and the packed weights, `outputs` hold [m, 2n]; all outlive the work.
        unsafe { self.library.launch(&self.gemm, algorithm, x, w, out) }.map_err(|error| Failure::new("launch", error))
    }

    fn launch_both(&self, algorithm: usize, index: usize) -> Result<(), Failure> {
        self.launch_gemm(algorithm, index)?;
        let packed = self.outputs[index % self.outputs.len()].address();
        self.arena.support.gate_packed(&self.arena.problem, packed, self.arena.args(index).z)
    }

    /// Times of ours, of the GEMM and of GEMM + gate; the GEMM with the fastest of its algorithms.
    fn race(
        &self,
        watch: &Stopwatch,
        ours: impl Fn(usize) -> Result<(), Failure>,
        rounds: usize,
    ) -> Result<[Vec<f64>; 3], Failure> {
        let mut best = (f64::INFINITY, 0);
        for algorithm in 0..self.gemm.algorithm_count() {
            let Ok(graph) = watch.capture(|index| self.launch_gemm(algorithm, index)) else { continue };
            let samples = watch.sample(&[&graph; 5])?;
            let time = quantile(&samples, 0.5);
            if time < best.0 {
                best = (time, algorithm);
            }
        }
        let algorithm = best.1;
        let graphs: [TimedGraph; 3] = [
            watch.capture(&ours)?,
            watch.capture(|index| self.launch_gemm(algorithm, index))?,
            watch.capture(|index| self.launch_both(algorithm, index))?,
        ];
        // Work first, so that the clocks are those of steady load.
        watch.sample(&vec![&graphs[1]; SETTLING_SAMPLES])?;
        // In random order: clocks lag behind power by milliseconds, so that a fixed order would favour whoever follows
        // the lightest load.
        let mut order: Vec<usize> = Vec::new();
        for _ in 0..rounds.max(1) {
            let mut round = [0, 1, 2];
            round.shuffle(&mut rand::rng());
            order.extend(round);
        }
        let shuffled: Vec<&TimedGraph> = order.iter().filter_map(|&which| graphs.get(which)).collect();
        let mut samples = [const { Vec::new() }; 3];
        for (which, time) in order.into_iter().zip(watch.sample(&shuffled)?) {
            samples[which].push(time);
        }
        Ok(samples)
    }
}

fn print_table(rows: &[Row]) {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header([
        "dtype",
        "M",
        "N",
        "K",
        "config",
        "from",
        "ours us",
        "GEMM us",
        "GEMM+gate us",
        "GEMM/ours",
        "GEMM+gate/ours",
        "TFLOP/s",
    ]);
    for row in rows {
        let Problem { dtype, m, n, k, .. } = row.problem;
        table.add_row([
            dtype.to_string(),
            m.to_string(),
            n.to_string(),
            k.to_string(),
            row.config.to_string(),
            row.source.clone(),
            format!("{:.1}", row.ours_us),
            format!("{:.1}", row.gemm_us),
            format!("{:.1}", row.gemm_and_gate_us),
            format!("{:.3}", row.over_gemm),
            format!("{:.3}", row.over_gemm_and_gate),
            format!("{:.1}", row.tflops()),
        ]);
    }
    println!("{table}");
    // Of no row it is that of no ratio.
    let geomean = |ratio: fn(&Row) -> f64| geometric_mean(rows.iter().map(ratio)).unwrap_or(1.0);
    println!(
        "geometric mean: {:.3} of the GEMM alone, {:.3} of GEMM + gate",
        geomean(|row| row.over_gemm),
        geomean(|row| row.over_gemm_and_gate)
    );
}
