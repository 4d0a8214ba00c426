//! `render` and `list`: what the generator makes, without compiling it.

use anyhow::{Context, Result};
use clap::Args;
use std::collections::BTreeMap;
use std::process::ExitCode;
use swiglu_kernels::families::{self, Family, Target};
use swiglu_kernels::{Config, DType, Op, Problem, WeightLayout, arch, render as generator};

/// A problem and an architecture, as arguments.
#[derive(Debug, Clone, Args)]
pub(crate) struct ProblemArgs {
    /// forward, or forward_save, which also stores the pre-activations.
    #[arg(long, default_value = "forward")]
    pub(crate) op: Op,
    /// Number format.
    #[arg(long, default_value = "bf16")]
    pub(crate) dtype: DType,
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
    pub(crate) fn problem(&self) -> Problem {
        Problem::forward(self.dtype, self.layout.major(), self.m, self.n, self.k).with_op(self.op)
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
    let problem = args.problem.problem();
    let config = match (&args.config, args.family) {
        (Some(text), _) => serde_json::from_str::<Config>(text).context("--config is no config")?,
        (None, Some(family)) => families::default_of(family, &problem, arch)?,
        (None, None) => families::default_config(&problem, arch)?,
    };
    print!("{}", generator::render(&problem, &config, arch)?.text);
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
    let problem = args.problem.problem();
    let target = match args.arch.as_str() {
        "cpu" => Target::Cpu { threads: swiglu_runtime::cpu::threads() },
        name => Target::Gpu(arch::by_name(name)?),
    };
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
    println!("{table}");
    if args.configs {
        kept.values().flatten().for_each(|config| println!("{config}"));
    }
    Ok(ExitCode::SUCCESS)
}
