//! `render` and `list`: what the generator makes, without compiling it.

use crate::log::emit;
use anyhow::{Context, Result};
use clap::Args;
use std::collections::BTreeMap;
use std::process::ExitCode;
use swiglu_kernels::families::{self, Family, Target};
use swiglu_kernels::{Config, DType, Op, Problem, WeightLayout, arch, render as generator};

/// A problem and an architecture, as arguments.
#[derive(Debug, Clone, Args)]
pub(crate) struct ProblemArgs {
    /// Operation.
    #[arg(long, default_value = "forward")]
    pub(crate) op: Op,
    /// Number format [default: bf16 on a GPU, f32 on the CPU].
    #[arg(long)]
    pub(crate) dtype: Option<DType>,
    /// Weight layout.
    #[arg(long, default_value = "separate_nk")]
    pub(crate) layout: WeightLayout,
    /// Tokens.
    #[arg(long, default_value_t = 2048)]
    pub(crate) m: u32,
    /// Intermediate size.
    #[arg(long, default_value_t = 14336)]
    pub(crate) n: u32,
    /// Hidden size.
    #[arg(long, default_value_t = 4096)]
    pub(crate) k: u32,
}

impl ProblemArgs {
    /// The problem on a GPU.
    pub(crate) fn problem(&self) -> Problem {
        self.problem_in(DType::Bf16)
    }

    /// The problem on a device, whose default number format is the one that is tuned there.
    pub(crate) fn problem_on(&self, target: Target) -> Problem {
        match target {
            Target::Gpu(_) => self.problem(),
            Target::Cpu { .. } => self.problem_in(DType::F32),
        }
    }

    fn problem_in(&self, default: DType) -> Problem {
        let dtype = self.dtype.unwrap_or(default);
        Problem::forward(dtype, self.layout.major(), self.m, self.n, self.k).with_op(self.op)
    }
}

#[derive(Debug, Clone, Args)]
pub(crate) struct RenderArgs {
    #[command(flatten)]
    problem: ProblemArgs,
    /// Architecture.
    #[arg(long, default_value = "sm_90a")]
    arch: String,
    /// Family; its default config is rendered [default: that of the best default].
    #[arg(long, value_parser = crate::cli::gpu_family)]
    family: Option<Family>,
    /// A whole config as JSON, as `report --json` shows it.
    #[arg(long, conflicts_with = "family")]
    config: Option<String>,
}

/// Prints the source.
pub(crate) fn render(args: &RenderArgs) -> Result<ExitCode> {
    let arch = arch::by_name(&args.arch)?;
    let problem = args.problem.problem_on(Target::Gpu(arch));
    let config = match (&args.config, args.family) {
        (Some(text), _) => serde_json::from_str::<Config>(text).context("--config is no config")?,
        (None, Some(family)) => families::default_of(family, &problem, arch)?,
        (None, None) => families::default_config(&problem, arch)?,
    };
    emit(generator::render(&problem, &config, arch)?.text)?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    problem: ProblemArgs,
    /// Architecture, or `cpu`.
    #[arg(long, default_value = "sm_90a")]
    arch: String,
    /// Print every kept config too.
    #[arg(long)]
    configs: bool,
}

/// Prints counts per family and rule.
pub(crate) fn list(args: &ListArgs) -> Result<ExitCode> {
    let target = match args.arch.as_str() {
        "cpu" => Target::Cpu { threads: swiglu_runtime::cpu::threads() },
        name => Target::Gpu(arch::by_name(name)?),
    };
    let problem = args.problem.problem_on(target);
    let mut kept: BTreeMap<Family, Vec<Config>> = BTreeMap::new();
    let mut refused: BTreeMap<(Family, &'static str), (usize, String)> = BTreeMap::new();
    for config in families::space(&problem, target) {
        match config.check(&problem, target) {
            Ok(()) => kept.entry(config.family()).or_default().push(config),
            Err(why) => refused.entry((config.family(), why.rule)).or_insert((0, why.reason)).0 += 1,
        }
    }
    let mut table = comfy_table::Table::new();
    table.set_header(["family", "configs", "rule", "example"]);
    for (family, configs) in &kept {
        table.add_row([family.name(), &configs.len().to_string(), "kept", ""]);
    }
    for ((family, rule), (count, example)) in &refused {
        table.add_row([family.name(), &count.to_string(), &format!("refused: {rule}"), example]);
    }
    let listed = kept.values().flatten().filter(|_| args.configs).map(|config| format!("{config}\n"));
    emit(format_args!("{table}\n{}", listed.collect::<String>()))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_format_is_by_default_what_is_tuned_on_the_device() {
        let args = |dtype| ProblemArgs { op: Op::Forward, dtype, layout: WeightLayout::SeparateNk, m: 4, n: 48, k: 32 };
        let (gpu, cpu) = (Target::Gpu(arch::by_name("sm_80").unwrap()), Target::Cpu { threads: 4 });
        assert_eq!(args(None).problem_on(gpu).dtype, DType::Bf16);
        assert_eq!(args(None).problem_on(cpu).dtype, DType::F32);
        assert_eq!(args(Some(DType::F16)).problem_on(cpu).dtype, DType::F16);
    }
}
