//! `compile`: kernels through NVRTC for any architecture, without a GPU.

use crate::log::{emit, notice};
use anyhow::{Result, ensure};
use clap::Args;
use rand::rngs::SmallRng;
use rand::{SeedableRng, seq::IndexedRandom};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::process::ExitCode;
use swiglu_kernels::arch::ARCHES;
use swiglu_kernels::families::{self, Family, Target};
use swiglu_kernels::problem::WeightMajor;
use swiglu_kernels::{ArchSpec, Config, DType, KernelSource, Op, Problem, arch, render};
use swiglu_runtime::Options;
use swiglu_runtime::nvrtc::Nvrtc;

#[derive(Debug, Clone, Args)]
pub(crate) struct CompileArgs {
    /// Architectures to compile for; without it all that this NVRTC compiles for.
    #[arg(long, value_delimiter = ',', value_name = "sm_80,...")]
    arch: Vec<String>,
    /// Operations.
    #[arg(long, value_delimiter = ',', default_value = "forward", value_name = "forward,dgated,...")]
    op: Vec<Op>,
    /// Number formats.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "f32,tf32,f16,bf16,e4m3,bf16_e4m3,f16_e4m3,bf16_int4,f16_int4",
        value_name = "f32,..."
    )]
    dtype: Vec<DType>,
    /// Every legal config instead of the default, the extreme and a sample.
    #[arg(long)]
    all: bool,
    /// Configs drawn at random from every space, beside the default and the extreme.
    #[arg(long, default_value_t = 2, conflicts_with = "all")]
    sample: usize,
    /// Seed of the sample.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// One source for one architecture.
struct Job {
    arch: &'static ArchSpec,
    problem: Problem,
    config: Config,
    source: KernelSource,
}

/// Counts of one family on one architecture.
#[derive(Default, Clone, Copy)]
struct Counts {
    compiled: usize,
    spilled: usize,
    failed: usize,
    most_registers: u32,
}

/// Compiles and prints the counts; exit code 1 on any failure or spill.
pub(crate) fn run(args: &CompileArgs, options: &Options) -> Result<ExitCode> {
    let nvrtc = Nvrtc::load(options.nvrtc.as_deref())?;
    let mut jobs = Vec::new();
    let mut arches: Vec<&'static ArchSpec> =
        args.arch.iter().map(|name| arch::by_name(name)).collect::<Result<_, _>>()?;
    if arches.is_empty() {
        arches = ARCHES.iter().filter(|arch| nvrtc.check_arch(arch).is_ok()).collect();
    }
    ensure!(
        !arches.is_empty(),
        "this NVRTC knows no architecture that has kernels here; `swiglu-tune doctor` tells which it is"
    );
    for arch in arches {
        nvrtc.check_arch(arch)?;
        for &dtype in &args.dtype {
            for weight_major in WeightMajor::ALL {
                for &op in &args.op {
                    let problem = Problem::forward(dtype, weight_major, 2048, 14336, 4096).with_op(op);
                    jobs.extend(jobs_of(args, arch, problem)?);
                }
            }
        }
    }
    let results: Vec<_> = jobs.par_iter().map(|job| (job, nvrtc.compile(&job.source, job.arch))).collect();
    let mut counts: BTreeMap<(&str, Family), Counts> = BTreeMap::new();
    for (job, result) in &results {
        let entry = counts.entry((job.arch.name, job.config.family())).or_default();
        match result {
            Ok(cubin) => {
                entry.compiled += 1;
                entry.spilled += usize::from(cubin.resources.objection().is_some());
                entry.most_registers = entry.most_registers.max(cubin.resources.registers);
                if let Some(objection) = cubin.resources.objection() {
                    notice(format!(
                        "{} {} {} {}: {}: {objection}",
                        job.arch, job.problem.op, job.problem.dtype, job.problem.weight_major, job.config
                    ));
                }
            }
            Err(error) => {
                entry.failed += 1;
                notice(format!(
                    "{} {} {} {}: {}: {error}",
                    job.arch, job.problem.op, job.problem.dtype, job.problem.weight_major, job.config
                ));
            }
        }
    }
    let mut table =
        crate::report::terminal_table(["arch", "family", "compiled", "spilled", "failed", "most registers"]);
    for ((arch, family), counts) in &counts {
        let Counts { compiled, spilled, failed, most_registers } = counts;
        table.add_row([
            *arch,
            family.name(),
            &compiled.to_string(),
            &spilled.to_string(),
            &failed.to_string(),
            &most_registers.to_string(),
        ]);
    }
    let broken: usize = counts.values().map(|counts| counts.failed + counts.spilled).sum();
    let (compiled, nvrtc) = (results.len(), nvrtc.version_string());
    emit(format_args!("{table}\n{compiled} compiled, {broken} failed or spilled, NVRTC {nvrtc}\n"))?;
    Ok(if broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Sources of one space, each once: the default, the last (largest) and a sample, or all; for aligned and for
/// misaligned operands.
fn jobs_of(args: &CompileArgs, arch: &'static ArchSpec, aligned: Problem) -> Result<Vec<Job>> {
    let mut sources: BTreeMap<String, Job> = BTreeMap::new();
    let mut rng = SmallRng::seed_from_u64(args.seed);
    for problem in [aligned, Problem { alignment: aligned.dtype.bytes(), ..aligned }] {
        let candidates = families::candidates(&problem, Target::Gpu(arch));
        for family in Family::GPU {
            let of_family: Vec<Config> =
                candidates.iter().filter(|config| config.family() == family).copied().collect();
            let chosen: Vec<Config> = if args.all {
                of_family
            } else {
                let default = families::default_of(family, &problem, arch).ok();
                let sampled = of_family.sample(&mut rng, args.sample).copied();
                default.into_iter().chain(of_family.last().copied()).chain(sampled).collect()
            };
            for config in chosen {
                let source = render::render(&problem, &config, arch)?;
                sources.entry(source.digest.clone()).or_insert(Job { arch, problem, config, source });
            }
        }
    }
    Ok(sources.into_values().collect())
}
