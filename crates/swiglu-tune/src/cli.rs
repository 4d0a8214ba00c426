//! Arguments, and which module answers them. Results go to stdout, everything else to stderr.

use crate::gpu_subject::GpuLab;
use crate::log::{LogFormat, emit, notice};
use crate::metrics::Logbook;
use crate::remote::{Recipe, Worker};
use crate::search::Search;
use crate::stop::{Signal, Stop};
use crate::tune::{Crew, Order, Summary, tune};
use crate::workload::{self, Group, OpChoice};
use crate::{bench, compile, db, doctor, fault, inspect, records, regret, report, why, worker};
use anyhow::{Context, Result, bail};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;
use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use swiglu_db::TuningDb;
use swiglu_kernels::families::Family;
use swiglu_kernels::{DType, Op, WeightLayout};
use swiglu_runtime::Options;
use swiglu_runtime::cubin_cache::CubinCache;
use swiglu_runtime::gpu::{self, Gpu, GpuError};
use swiglu_runtime::nvrtc::Nvrtc;

/// Tunes SwiGLU kernels, z = silu(x·Wg) ⊙ (x·Wu), for the machine it runs on.
///
/// Run `swiglu-tune --gpu auto` once per machine. It generates CUDA kernels, compiles them with NVRTC, holds each
/// to a float64 oracle, times them, and stores the fastest for every shape. Programs that link `swiglu-runtime`
/// then launch those kernels. A later run goes on where the last one stopped.
#[derive(Debug, Parser)]
#[command(name = "swiglu-tune", version)]
#[command(
    after_help = "Examples:\n  swiglu-tune --gpu auto --model llama-3-8b --dtype bf16\n  swiglu-tune report\n  swiglu-tune doctor\n\n\
    Exit codes: 0 done, 1 failed, 2 wrong usage; of tuning 130 and 143 where Ctrl-C and SIGTERM ended it, what is finished is kept."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    tune: TuneArgs,
    /// Log what is done to stderr.
    #[arg(long, short, global = true)]
    pub(crate) verbose: bool,
    /// How the log is written.
    #[arg(long, global = true, value_enum, default_value = "text", value_name = "FORMAT")]
    pub(crate) log: LogFormat,
    #[command(flatten)]
    places: Places,
}

/// Where things are.
#[derive(Debug, Clone, Args)]
pub(crate) struct Places {
    /// Tuning database [default: $SWIGLU_DB, else $XDG_DATA_HOME/swiglu-tune].
    #[arg(long, value_name = "DIR", global = true)]
    db: Option<PathBuf>,
    /// Tuned records that go before all others, a database or an exported table [default: $SWIGLU_OVERRIDE].
    #[arg(long = "override", value_name = "DIR|FILE.toml", global = true)]
    overriding: Option<PathBuf>,
    /// Tuned records of the site, likewise [default: $SWIGLU_SITE_DB, else /etc/swiglu-tune].
    #[arg(long, value_name = "DIR|FILE.toml", global = true)]
    site: Option<PathBuf>,
    /// libnvrtc or its folder [default: $SWIGLU_NVRTC, else a toolkit, the pip wheel, the loader path].
    #[arg(long, value_name = "PATH", global = true)]
    nvrtc: Option<PathBuf>,
}

impl Places {
    fn options(&self) -> Options {
        let env = Options::from_env();
        Options {
            db: self.db.clone().or(env.db),
            overriding: self.overriding.clone().or(env.overriding),
            site: self.site.clone().or(env.site),
            nvrtc: self.nvrtc.clone().or(env.nvrtc),
            cubin_cache: env.cubin_cache,
        }
    }
}

/// Which GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GpuChoice {
    /// The first GPU, or the CPU where there is none.
    Auto,
    /// The CPU.
    Cpu,
    /// Every GPU, side by side.
    All,
    /// The GPU of this number.
    Ordinal(usize),
}

impl FromStr for GpuChoice {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "all" => Ok(Self::All),
            number => number.parse().map(Self::Ordinal).map_err(|_| "use auto, all, cpu or a GPU's number".into()),
        }
    }
}

#[derive(Debug, Clone, Args)]
struct TuneArgs {
    /// Device to tune: auto (the first GPU, else the CPU), all (every GPU, side by side), cpu, or a GPU's number.
    #[arg(long, value_name = "auto|all|cpu|N")]
    gpu: Option<GpuChoice>,
    /// Model preset to tune; without --model and --shapes all presets, most used first.
    #[arg(long, value_name = "NAME", conflicts_with = "shapes", value_parser = workload::model_name)]
    model: Option<String>,
    /// TOML file of shapes: `[[shape]]` tables with n, k and optionally m, dtype, layout.
    #[arg(long, value_name = "FILE.toml")]
    shapes: Option<PathBuf>,
    /// What to tune: forward; forward_save, which also stores the pre-activations for a backward pass; forward_static and
    /// down_static, for decoding: of weights that nothing still running writes; a step of the FFN, e.g. gate, down or dgated;
    /// backward, the steps of one, of biases too; ffn, all that training launches: those, forward_save, gate and down.
    #[arg(long, value_delimiter = ',', default_value = "forward", value_name = "forward,gate,backward,ffn,...")]
    op: Vec<OpChoice>,
    /// Number formats [default: bf16 on a GPU, f32 on the CPU].
    #[arg(long, value_delimiter = ',', value_name = "f32,tf32,f16,bf16,e4m3,bf16_e4m3,...")]
    dtype: Vec<DType>,
    /// Weight layouts; layouts with one contiguous index share their tuning.
    #[arg(long, value_delimiter = ',', default_value = "separate_nk", value_name = "LAYOUT,...")]
    layout: Vec<WeightLayout>,
    /// Stop after this long; a later run goes on from there [default: 600 without --model and --shapes].
    #[arg(long, value_name = "SECONDS")]
    budget: Option<u64>,
    /// Measure again what is measured, instead of going on where the last run stopped.
    #[arg(long)]
    retune: bool,
    /// Which candidates are measured.
    #[arg(long, value_enum, default_value = "model")]
    search: Search,
    /// Run the finalists for long, one at a time, each at the clock that its own power leaves it: for large problems on a GPU at
    /// its power cap, where short samples tie. Some 20 seconds a problem; with --retune what is measured is raced so again.
    #[arg(long, conflicts_with = "exhaustive")]
    sustained: bool,
    /// Time every legal candidate properly, with nothing pruned: slow, and the reference for `regret`.
    #[arg(long, conflicts_with = "search")]
    exhaustive: bool,
    /// Kill a worker that has not reported for this long; what it was running is recorded as failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    watchdog: u64,
    /// Append a JSON line to this file for every candidate and every problem that is finished.
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Write TensorBoard events into this folder.
    #[arg(long, value_name = "DIR")]
    tensorboard: Option<PathBuf>,
    /// No progress bar.
    #[arg(long)]
    quiet: bool,
    /// Breaks workers at some candidates, to see what becomes of the run.
    #[arg(long, hide = true, value_name = "STEP:KIND:CONFIG")]
    fault: Vec<fault::Fault>,
}

/// The command line, and what is wrong with an option of tuning that stands before a subcommand, where it has no effect.
pub(crate) fn parse() -> (Cli, Option<String>) {
    let matches = Cli::command().get_matches();
    let misplaced = misplaced(&matches);
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    (cli, misplaced)
}

fn misplaced(matches: &ArgMatches) -> Option<String> {
    let (subcommand, _) = matches.subcommand()?;
    let tuning = TuneArgs::augment_args(clap::Command::new("swiglu-tune"));
    let given = |arg: &&clap::Arg| matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
    let option = tuning.get_arguments().find(given)?.get_long()?;
    let is_taken = Cli::command().find_subcommand(subcommand).is_some_and(|command| takes(command, option));
    let mend = if is_taken { "give it after" } else { "leave it out" };
    Some(format!("--{option} tunes; before `{subcommand}` it has no effect, {mend}"))
}

/// Whether `command`, or one below it, has an option of this name.
fn takes(command: &clap::Command, option: &str) -> bool {
    let mut arguments = command.get_arguments();
    arguments.any(|arg| arg.get_long() == Some(option)) || command.get_subcommands().any(|below| takes(below, option))
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print what was tuned: problem, config, time, rate, share of the roofline.
    Report(report::ReportArgs),
    /// Print the CUDA source of one config, headers included.
    Render(inspect::RenderArgs),
    /// Compile kernels with NVRTC; needs no GPU. Exit code 1 if any fails.
    Compile(compile::CompileArgs),
    /// Print the config space of a problem: kept and refused configs per rule.
    List(inspect::ListArgs),
    /// Explain which config serves a problem, rung by rung, and what came second.
    Why(why::WhyArgs),
    /// What `--search model` would have lost against an exhaustive run that is in the database.
    Regret(regret::RegretArgs),
    /// Time what the runtime would launch against a peer, interleaved.
    Bench(bench::BenchArgs),
    /// Work with the tuning database.
    Db {
        #[command(subcommand)]
        command: db::DbCommand,
    },
    /// Print the completions of a shell, to be put where it looks for them.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Print the manual page, or write one of every subcommand.
    Man {
        /// Folder to write `swiglu-tune*.1` into.
        #[arg(long)]
        dir: Option<PathBuf>,
    },
    /// Measure for a tuner that has started this process.
    #[command(hide = true)]
    Worker(worker::WorkerArgs),
    /// Say what is found, what is missing and how to mend it.
    Doctor {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

impl Cli {
    /// Whether all there is to do is to print: neither to tune nor to work for who does.
    pub(crate) fn prints_answers(&self) -> bool {
        !matches!(self.command, None | Some(Command::Worker(_)))
    }

    /// What a worker is to be told of this command line.
    fn for_workers(&self) -> Vec<String> {
        let log = match self.log {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        };
        let mut args = vec!["--log".into(), log.into()];
        args.extend(self.verbose.then(|| "--verbose".into()));
        if let Some(nvrtc) = &self.places.nvrtc {
            args.extend(["--nvrtc".into(), nvrtc.display().to_string()]);
        }
        args
    }
}

pub(crate) fn run(cli: &Cli, misplaced: Option<&str>) -> Result<ExitCode> {
    let options = cli.places.options();
    if let Some(why) = misplaced {
        bail_usage(why);
    }
    match &cli.command {
        None => run_tune(cli, &options),
        Some(Command::Report(args)) => report::run(args, &options),
        Some(Command::Render(args)) => inspect::render(args),
        Some(Command::List(args)) => inspect::list(args),
        Some(Command::Compile(args)) => compile::run(args, &options),
        Some(Command::Why(args)) => why::run(args, &options),
        Some(Command::Regret(args)) => regret::run(args, &options),
        Some(Command::Bench(args)) => bench::run(args, &options),
        Some(Command::Db { command }) => db::run(command, &options),
        Some(Command::Worker(args)) => worker::run(args, &options),
        Some(Command::Doctor { json }) => doctor::run(*json, &options),
        Some(Command::Completions { shell }) => {
            // Into memory first: a closed pipe is an error to tell, and clap_complete would panic.
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "swiglu-tune", &mut text);
            emit(String::from_utf8_lossy(&text))?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Man { dir: None }) => {
            let mut text = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut text).context("making the manual page")?;
            emit(String::from_utf8_lossy(&text))?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Man { dir: Some(dir) }) => {
            let named = || format!("writing manual pages to {}", dir.display());
            std::fs::create_dir_all(dir)
                .and_then(|()| clap_mangen::generate_to(Cli::command(), dir))
                .with_context(named)?;
            emit(format_args!("{}\n", dir.display()))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn run_tune(cli: &Cli, options: &Options) -> Result<ExitCode> {
    let args = &cli.tune;
    let Some(choice) = args.gpu else {
        bail_usage("nothing to do: give --gpu auto to tune, or a subcommand");
    };
    // Seen on an H200: after some sixty problems in one run the usual 1,024 open files were used up.
    if let Err(error) = rlimit::increase_nofile_limit(u64::MAX) {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
    let begun = Instant::now();
    let devices = devices(choice)?;
    let logbook = Logbook::open(args.metrics.as_deref(), args.tensorboard.as_deref())?;
    let groups = groups(args, choice, devices.contains(&GpuChoice::Cpu))?;
    let dir = records::db_dir(options)?;
    // Before anything is started: a second tuner is told who holds the lock.
    let mut db = TuningDb::open(&dir).context("opening the tuning database")?;
    let whole_default = args.model.is_none() && args.shapes.is_none();
    let budget = args.budget.or(whole_default.then_some(600)).map(Duration::from_secs);
    let told = Arc::new(AtomicBool::new(false));
    let signal = Signal::heard_by(&told).context("installing the Ctrl-C handler")?;
    let stop = Stop::new(told, budget);
    let crew = match (crew(cli, &devices, &stop), signal.exit_code()) {
        (Err(why), Some(code)) => {
            notice(format!("{why:#}"));
            return Ok(code.into());
        }
        (crew, _) => crew?,
    };
    let records = db.records()?;
    let classes: BTreeSet<&str> = crew.measuring.iter().map(|worker| worker.facts.device.class.as_str()).collect();
    for class in classes {
        if let Some(whose) = records::foreign(&records, class) {
            notice(format!("{}: {whose}; they stay, and this device is tuned from the start", dir.display()));
        }
    }
    let name = crew.measuring.first().map_or_else(String::new, |worker| worker.facts.device.name.clone());
    let name = if devices.len() > 1 { format!("{} devices, the first {name}", devices.len()) } else { name };
    let search = if args.exhaustive { Search::Exhaustive } else { args.search };
    let order = Order {
        groups: &groups,
        search,
        retune: args.retune,
        sustained: args.sustained,
        quiet: args.quiet,
        stop: stop.clone(),
    };
    let summary = tune(&order, crew, &mut db, logbook)?;
    tell(&summary, &name, begun.elapsed(), &stop);
    print_place(&dir)?;
    Ok(exit_code(&summary, signal.exit_code()).into())
}

/// Of a run that has come to its end, or was stopped by what `of_signal` stands for. A budget that is spent is no failure, unless
/// nothing came of it.
fn exit_code(summary: &Summary, of_signal: Option<u8>) -> u8 {
    let Summary { tuned, left, without_winner, unraced, illegal, .. } = *summary;
    if let Some(code) = of_signal.filter(|_| left > 0) {
        return code;
    }
    let in_vain = left > 0 && tuned == 0;
    u8::from(in_vain || without_winner + unraced + illegal > 0)
}

/// Prints where the results are. That nobody reads it any more takes nothing from them.
fn print_place(dir: &Path) -> Result<()> {
    emit(format_args!("{}\n", dir.display())).or_else(|error| match error.downcast_ref::<io::Error>() {
        Some(cause) if cause.kind() == ErrorKind::BrokenPipe => Ok(()),
        _ => Err(error),
    })
}

fn tell(summary: &Summary, device: &str, elapsed: Duration, stop: &Stop) {
    let Summary { tuned, already, left, without_winner, unraced, illegal } = *summary;
    notice(format!("{device}: {tuned} problems tuned in {:.1} s, {already} were tuned before", elapsed.as_secs_f64()));
    if left > 0 {
        let why = if stop.by_signal() { "interrupted" } else { "the budget is spent" };
        notice(format!("{why}: {left} problems are left; run the same command again to go on"));
    }
    if unraced > 0 {
        notice(format!("{unraced} problems could not be raced, for the reasons above; run the same command again"));
    }
    if illegal > 0 {
        notice(format!("{illegal} problems have no kernel that runs on this device, for the reasons above"));
    }
    if without_winner > 0 {
        notice(format!(
            "{without_winner} problems have no working candidate; `swiglu-tune report --json` has the reasons"
        ));
    }
}

/// The devices to tune on, each by its number. `auto` falls to the CPU where there is no driver or GPU, and says so.
fn devices(choice: GpuChoice) -> Result<Vec<GpuChoice>> {
    let none = |why: &str| {
        notice(format!("no GPU: {why}. Tuning the CPU backend"));
        Ok(vec![GpuChoice::Cpu])
    };
    match choice {
        GpuChoice::Cpu => Ok(vec![choice]),
        GpuChoice::Ordinal(ordinal) => match gpu::count()? {
            count if ordinal < count => Ok(vec![choice]),
            count => Err(GpuError::NoDevice { ordinal, count: i32::try_from(count).unwrap_or(i32::MAX) }.into()),
        },
        GpuChoice::Auto | GpuChoice::All => match gpu::count() {
            Ok(0) => none("the driver lists none"),
            Ok(_) if choice == GpuChoice::Auto => Ok(vec![GpuChoice::Ordinal(0)]),
            Ok(count) => Ok((0..count).map(GpuChoice::Ordinal).collect()),
            Err(why @ GpuError::Missing(_)) => none(&why.to_string()),
            Err(why) => Err(why.into()),
        },
    }
}

/// A worker for each device.
fn crew(cli: &Cli, devices: &[GpuChoice], stop: &Stop) -> Result<Crew> {
    let common = cli.for_workers();
    let patience = Duration::from_secs(cli.tune.watchdog.max(1));
    let recipe = move |role: &[String], patience, stop: &Stop| {
        let args = [&["worker".to_owned()], role, &common].concat();
        Recipe { args, patience, stop: stop.clone() }
    };
    let start = |device: &GpuChoice| {
        let (number, name) = match device {
            GpuChoice::Ordinal(ordinal) => (ordinal.to_string(), format!("GPU {ordinal}")),
            GpuChoice::Auto | GpuChoice::All | GpuChoice::Cpu => ("cpu".into(), "the CPU".into()),
        };
        let faults = cli.tune.fault.iter().flat_map(|fault| ["--fault".into(), fault.to_string()]);
        let role: Vec<String> = ["--gpu".into(), number].into_iter().chain(faults).collect();
        Worker::start(recipe(&role, patience, stop)).with_context(|| format!("the worker on {name}"))
    };
    let measuring = devices.iter().map(start).collect::<Result<Vec<_>>>()?;
    let stop = stop.clone();
    // A large source alone may take a compiler longer than any candidate runs.
    let compiling = move |arch: &str| {
        Worker::start(recipe(&["--compile-for".into(), arch.into()], patience.saturating_mul(5), &stop))
            .with_context(|| format!("the worker that compiles for {arch}"))
    };
    Ok(Crew { measuring, compiling: Box::new(compiling) })
}

/// Compiler, cache and stream on `gpu`.
pub(crate) fn open_gpu_lab(gpu: Gpu, options: &Options) -> Result<GpuLab> {
    let nvrtc = Nvrtc::load(options.nvrtc.as_deref())?;
    nvrtc.check_arch(gpu.arch)?;
    Ok(GpuLab::new(gpu, nvrtc, CubinCache::new(options.cubin_dir()))?)
}

fn groups(args: &TuneArgs, choice: GpuChoice, on_cpu: bool) -> Result<Vec<Group>> {
    let default = if on_cpu { DType::F32 } else { DType::Bf16 };
    let dtypes = if args.dtype.is_empty() { vec![default] } else { args.dtype.clone() };
    // The whole default set would take a CPU hours.
    let model = args.model.as_deref().or(on_cpu.then_some("tiny"));
    let groups = match &args.shapes {
        Some(path) => workload::from_file(path, &dtypes, &args.layout),
        None => workload::preset(model, &dtypes, &args.layout),
    }?;
    let mut ops = workload::ops(&args.op);
    if on_cpu {
        check_cpu_formats(&groups)?;
        ops = cpu_ops(ops, choice)?;
    }
    Ok(workload::for_ops(&groups, &ops))
}

fn check_cpu_formats(groups: &[Group]) -> Result<()> {
    let gpu_only = |group: &&Group| group.dtype == DType::Tf32 || group.dtype.is_scaled();
    if let Some(Group { dtype, n, k, .. }) = groups.iter().find(gpu_only) {
        bail!("{dtype}, asked for with n {n}, k {k}, is a GPU format; use f32 on the CPU");
    }
    Ok(())
}

/// Those of `ops` that the CPU has. Others are left out where it stands in for a GPU, unless nothing remains.
fn cpu_ops(ops: Vec<Op>, choice: GpuChoice) -> Result<Vec<Op>> {
    let has = |op: &Op| op.is_forward() && !op.has_static_weights();
    let (kept, left_out): (Vec<Op>, Vec<Op>) = ops.into_iter().partition(has);
    let Some(step) = left_out.first() else { return Ok(kept) };
    if choice == GpuChoice::Cpu || kept.is_empty() {
        bail!("`{step}` runs on a GPU; on the CPU only forward and forward_save are tuned");
    }
    let names: Vec<String> = left_out.iter().map(Op::to_string).collect();
    notice(format!("left out, for a GPU: {}; on the CPU only forward and forward_save are tuned", names.join(", ")));
    Ok(kept)
}

/// Ends the process as clap does for wrong usage.
fn bail_usage(message: &str) -> ! {
    Cli::command().error(clap::error::ErrorKind::MissingRequiredArgument, message).exit()
}

/// Families that run on a GPU, for arguments.
pub(crate) fn gpu_family(text: &str) -> Result<Family, String> {
    let family: Family = text.parse().map_err(|error| format!("{error}"))?;
    if family == Family::Cpu { Err("the CPU family has no CUDA source".into()) } else { Ok(family) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_was_stopped_tells_by_what_and_one_that_achieved_nothing_failed() {
        let done = Summary { tuned: 1, ..Summary::default() };
        for (summary, of_signal, expected) in [
            (Summary::default(), None, 0),
            (done, None, 0),
            (done, Some(130), 0),
            (Summary { left: 1, ..done }, None, 0),
            (Summary { left: 1, ..done }, Some(143), 143),
            (Summary { left: 1, unraced: 1, ..done }, Some(130), 130),
            (Summary { left: 1, already: 1, ..Summary::default() }, None, 1),
            (Summary { without_winner: 1, ..done }, None, 1),
            (Summary { unraced: 1, ..done }, None, 1),
            (Summary { illegal: 1, ..done }, None, 1),
        ] {
            assert_eq!(exit_code(&summary, of_signal), expected, "{summary:?} {of_signal:?}");
        }
    }

    #[test]
    fn ops_that_the_cpu_has_not_are_left_out_where_it_stands_in_for_a_gpu() {
        let ops = |ops: &[Op], choice| cpu_ops(ops.to_vec(), choice).map_err(|error| error.to_string());
        let [both, none] = [[Op::ForwardSave, Op::Down], [Op::Down, Op::ForwardStatic]];
        for choice in [GpuChoice::Auto, GpuChoice::All] {
            assert_eq!(ops(&both, choice), Ok(vec![Op::ForwardSave]));
            assert!(ops(&none, choice).unwrap_err().contains("`down`"));
        }
        assert!(ops(&both, GpuChoice::Cpu).unwrap_err().contains("`down`"));
        assert_eq!(ops(&both[..1], GpuChoice::Cpu), Ok(vec![Op::ForwardSave]));
    }
}
