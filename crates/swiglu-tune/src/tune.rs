//! The main job: for every problem, race what is missing and store what came out.

use crate::cpu_subject::CpuSubject;
use crate::gpu_subject::{Compiled, GpuLab, GpuSubject};
use crate::race::{Failure, race};
use crate::workload::Group;
use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use swiglu_db::{Device, Environment, Origin, Outcome, Record, TuningDb, TuningKey};
use swiglu_kernels::families::{Target, candidates};
use swiglu_kernels::render::{self, SharedSource};
use swiglu_kernels::{Config, Problem};
use swiglu_runtime::cpu;

/// What is tuned on.
pub(crate) enum Lab {
    /// A GPU.
    Gpu(Box<GpuLab>),
    /// The CPU.
    Cpu,
}

impl Lab {
    pub(crate) fn device(&self) -> Device {
        match self {
            Self::Gpu(lab) => lab.gpu.device.clone(),
            Self::Cpu => cpu::device(),
        }
    }

    pub(crate) fn target(&self) -> Target {
        match self {
            Self::Gpu(lab) => Target::Gpu(lab.gpu.arch),
            Self::Cpu => Target::Cpu { threads: cpu::threads() },
        }
    }
}

/// What a run did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Summary {
    /// Problems raced now.
    pub(crate) tuned: usize,
    /// Problems that had nothing missing.
    pub(crate) already: usize,
    /// Problems left for a later run: the budget or Ctrl-C ended this one.
    pub(crate) left: usize,
    /// Problems for which no candidate worked.
    pub(crate) without_winner: usize,
}

/// A candidate slower than the best by the factor at one M is not tried at the next larger one: from the M on which the
/// ranking no longer turns over by as much.
const HOPELESS: [(u32, f64); 3] = [(2048, 1.25), (512, 1.5), (256, 3.0)];

/// Tunes `groups` in their order, until done, `stop` or the budget's end.
pub(crate) fn tune(
    lab: &Lab,
    groups: &[Group],
    db: &mut TuningDb,
    budget: Duration,
    quiet: bool,
    stop: &AtomicBool,
) -> Result<Summary> {
    let begun = Instant::now();
    let total = groups.iter().map(|group| group.m.len()).sum::<usize>();
    let progress = progress_bar(total, quiet);
    let mut summary = Summary::default();
    for group in groups {
        let mut slow: BTreeMap<Config, f64> = BTreeMap::new();
        let space = Space::new(lab, &group.problem(1))?;
        let mut compiled = None;
        for &m in &group.m {
            let problem = group.problem(m);
            progress.set_message(format!(
                "{} {} m={m} n={} k={}",
                problem.dtype, problem.weight_major, problem.n, problem.k
            ));
            if stop.load(Ordering::Relaxed) || begun.elapsed() >= budget {
                summary.left += 1;
                continue;
            }
            let key = TuningKey { device_class: lab.device().class, problem };
            let best = db.best(&key)?;
            if let Some(best) = &best {
                // Whatever it was at smaller M, here it has won.
                slow.remove(&best.config);
            }
            let missing = space.missing(db, &key, best.as_ref())?;
            if missing.is_empty() {
                summary.already += 1;
            } else {
                let records = match lab {
                    Lab::Gpu(gpu) => {
                        let compiled =
                            compiled.get_or_insert_with(|| compile(gpu, &problem, &space.sources, &progress));
                        match tune_on_gpu(gpu, compiled, problem, &missing, &slow, stop) {
                            Ok(records) => records,
                            // Memory that others hold, say: nothing a candidate has done.
                            Err(failure) => {
                                tracing::error!(%problem.m, %problem.n, %problem.k, reason = failure.reason, "cannot tune");
                                Vec::new()
                            }
                        }
                    }
                    Lab::Cpu => tune_on_cpu(problem, &missing, stop),
                };
                db.insert(&records).context("storing measurements")?;
                if let Lab::Gpu(gpu) = lab
                    && gpu.is_lost()
                {
                    db.publish().context("publishing the snapshot")?;
                    bail!("a kernel took the GPU's context down; run the same command again to go on without it");
                }
                if stop.load(Ordering::Relaxed) {
                    summary.left += 1;
                } else {
                    summary.tuned += 1;
                }
            }
            match db.best(&key)? {
                Some(best) => note_slow(&mut slow, db, &key, &best, &space)?,
                None => summary.without_winner += usize::from(!stop.load(Ordering::Relaxed)),
            }
            progress.inc(1);
        }
        db.publish().context("publishing the snapshot")?;
    }
    progress.finish_and_clear();
    Ok(summary)
}

fn progress_bar(total: usize, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} problems, {elapsed} gone, {eta} left  {msg}");
    ProgressBar::new(total as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// The candidates of one group of problems, which differ in M only: legality and sources do not depend on it.
struct Space {
    /// With the digest of its source, empty on the CPU.
    candidates: Vec<(Config, String)>,
    /// Empty on the CPU.
    sources: Vec<SharedSource>,
}

impl Space {
    fn new(lab: &Lab, problem: &Problem) -> Result<Self> {
        let configs = candidates(problem, lab.target());
        match lab.target() {
            Target::Cpu { .. } => {
                let candidates = configs.into_iter().map(|config| (config, String::new())).collect();
                Ok(Self { candidates, sources: Vec::new() })
            }
            Target::Gpu(arch) => {
                let sources = render::shared_sources(problem, &configs, arch)?;
                let with_digest = |shared: &SharedSource| {
                    shared.configs.iter().map(|&config| (config, shared.source.digest.clone())).collect::<Vec<_>>()
                };
                Ok(Self { candidates: sources.iter().flat_map(with_digest).collect(), sources })
            }
        }
    }

    /// Candidates without a record, or whose source has changed since; with the present best beside them, so that
    /// both are timed in one race.
    fn missing(&self, db: &TuningDb, key: &TuningKey, best: Option<&Record>) -> Result<Vec<Config>> {
        let mut missing = Vec::new();
        for (config, digest) in &self.candidates {
            if !db.is_measured(key, config, digest)? {
                missing.push(*config);
            }
        }
        let is_candidate = |config: &Config| self.candidates.iter().any(|(candidate, _)| candidate == config);
        let best = best.map(|best| best.config).filter(|best| !missing.contains(best) && is_candidate(best));
        if !missing.is_empty() {
            missing.extend(best);
        }
        Ok(missing)
    }
}

fn compile(
    lab: &GpuLab,
    problem: &Problem,
    sources: &[SharedSource],
    progress: &ProgressBar,
) -> BTreeMap<Config, Compiled> {
    let count = std::sync::atomic::AtomicUsize::new(0);
    let compiled = lab.compile(problem, sources, || {
        let done = count.fetch_add(1, Ordering::Relaxed) + 1;
        progress.set_message(format!("compiling {done}/{}", sources.len()));
        progress.tick();
    });
    let failed = compiled.values().filter(|compiled| compiled.kernel.is_err()).count();
    tracing::info!(dtype = %problem.dtype, sources = sources.len(), candidates = compiled.len(), failed, "compiled");
    compiled
}

fn tune_on_gpu(
    lab: &GpuLab,
    compiled: &BTreeMap<Config, Compiled>,
    problem: Problem,
    missing: &[Config],
    slow: &BTreeMap<Config, f64>,
    stop: &AtomicBool,
) -> Result<Vec<Record>, Failure> {
    let (hopeless, hopeful): (Vec<Config>, Vec<Config>) = missing.iter().partition(|config| slow.contains_key(config));
    // The families with the highest rates first: what they reach prunes the others.
    let mut hopeful = hopeful;
    hopeful.sort_by_key(|config| std::cmp::Reverse(config.family()));
    let begun = Instant::now();
    let mut subject = GpuSubject::new(lab, compiled, problem, rand::random())?;
    let outcomes = race(&mut subject, &hopeful, stop);
    tracing::info!(m = problem.m, n = problem.n, k = problem.k, raced = hopeful.len(), elapsed = ?begun.elapsed(), "raced");
    let pruned = hopeless.into_iter().map(|config| {
        let reason = format!("{:.1}x the best at a smaller m", slow.get(&config).copied().unwrap_or(f64::NAN));
        (config, Failure::new("pruned", reason).into())
    });
    let (driver, date) = (crate::doctor::driver_version().unwrap_or_default(), jiff::Timestamp::now().to_string());
    let environment = |config: &Config| {
        let compiled = compiled.get(config);
        Environment {
            nvrtc: lab.nvrtc.version_string(),
            driver: driver.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            source_digest: compiled.map(|compiled| compiled.digest.clone()).unwrap_or_default(),
            registers: compiled.map_or(0, |compiled| compiled.resources.registers),
            date: date.clone(),
        }
    };
    let records = finished(outcomes.into_iter().chain(pruned)).map(|(config, outcome)| Record {
        device: lab.gpu.device.clone(),
        problem,
        config,
        outcome,
        environment: environment(&config),
        origin: Origin::Local,
    });
    Ok(records.collect())
}

fn tune_on_cpu(problem: Problem, missing: &[Config], stop: &AtomicBool) -> Vec<Record> {
    let mut subject = CpuSubject::new(problem, rand::random());
    let outcomes = race(&mut subject, missing, stop);
    let environment = Environment {
        version: env!("CARGO_PKG_VERSION").into(),
        date: jiff::Timestamp::now().to_string(),
        ..Environment::default()
    };
    finished(outcomes.into_iter())
        .map(|(config, outcome)| Record {
            device: cpu::device(),
            problem,
            config,
            outcome,
            environment: environment.clone(),
            origin: Origin::Local,
        })
        .collect()
}

/// Without the candidates that an interrupt left unfinished: they are still missing.
fn finished(outcomes: impl Iterator<Item = (Config, Outcome)>) -> impl Iterator<Item = (Config, Outcome)> {
    outcomes.filter(|(_, outcome)| !matches!(outcome, Outcome::Failed { stage, .. } if stage == "interrupted"))
}

/// Notes the candidates that are hopeless from here on.
fn note_slow(
    slow: &mut BTreeMap<Config, f64>,
    db: &TuningDb,
    key: &TuningKey,
    best: &Record,
    space: &Space,
) -> Result<()> {
    let Some((_, factor)) = HOPELESS.into_iter().find(|(from_m, _)| key.problem.m >= *from_m) else {
        return Ok(());
    };
    let Some(best) = best.measurement() else { return Ok(()) };
    for (config, _) in &space.candidates {
        let record = db.record(key, config)?;
        if let Some(time) = record.as_ref().and_then(Record::measurement) {
            let ratio = time.median_us / best.median_us;
            if ratio > factor {
                slow.insert(*config, ratio);
            }
        }
    }
    Ok(())
}
