//! A number format beside bf16: what each gains, by our own kernels, of the same sizes in the same run.

use super::{BenchArgs, as_error, config_for, interleave, medians, print_json, verified};
use crate::gpu_subject::{GpuLab, Stopwatch};
use crate::race::Failure;
use crate::report::{geometric_mean, terminal_table};
use anyhow::Result;
use serde::Serialize;
use std::process::ExitCode;
use swiglu_db::TuningTable;
use swiglu_kernels::{Config, DType, Problem, WeightMajor};
use swiglu_runtime::Options;

/// Medians of one size, in microseconds.
#[derive(Debug, Serialize)]
struct Row {
    problem: Problem,
    config: Config,
    source: String,
    ours_us: f64,
    bf16_config: Config,
    bf16_source: String,
    bf16_us: f64,
    /// Time in bf16 over ours.
    over_bf16: f64,
}

/// Times every problem and prints the ratios.
pub(super) fn run(
    args: &BenchArgs,
    problems: &[Problem],
    given: &[Config],
    lab: &GpuLab,
    table: &TuningTable,
    options: &Options,
) -> Result<ExitCode> {
    let mut rows = Vec::new();
    for &problem in problems {
        let Problem { op, m, n, k, .. } = problem;
        let bf16 = Problem::forward(DType::Bf16, WeightMajor::K, m, n, k).with_op(op);
        let bf16_config = config_for(lab, table, None, &bf16, options)?;
        let configs = match given {
            [] => vec![config_for(lab, table, args.family, &problem, options)?],
            given => given.iter().map(|&config| (config, "given".into())).collect(),
        };
        for ours in configs {
            rows.push(bench(lab, (problem, ours), (bf16, bf16_config.clone()), args.rounds)?);
        }
    }
    if args.json {
        print_json(lab, &rows)?;
    } else {
        print_table(&rows);
    }
    Ok(ExitCode::SUCCESS)
}

type Entrant = (Problem, (Config, String));

fn bench(lab: &GpuLab, ours: Entrant, bf16: Entrant, rounds: usize) -> Result<Row> {
    let ((problem, (config, source)), (bf16_problem, (bf16_config, bf16_source))) = (ours, bf16);
    let watch = Stopwatch::new(lab).map_err(|failure| as_error(&failure))?;
    let (arena, kernel) = verified(lab, problem, config, &watch)?;
    let (bf16_arena, bf16_kernel) = verified(lab, bf16_problem, bf16_config, &watch)?;
    let race = || -> Result<[Vec<f64>; 2], Failure> {
        let ours = |index: usize| arena.launch(lab, &kernel, index);
        let bf16 = |index: usize| bf16_arena.launch(lab, &bf16_kernel, index);
        interleave(&watch, [&ours, &bf16], rounds)
    };
    let [ours_us, bf16_us] = medians(&race().map_err(|failure| as_error(&failure))?);
    let over_bf16 = bf16_us / ours_us;
    Ok(Row { problem, config, source, ours_us, bf16_config, bf16_source, bf16_us, over_bf16 })
}

fn print_table(rows: &[Row]) {
    let mut table = terminal_table([
        "dtype",
        "M",
        "N",
        "K",
        "config",
        "from",
        "bf16 config",
        "from",
        "ours us",
        "bf16 us",
        "bf16/ours",
        "TFLOP/s",
        "GB/s",
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
            row.bf16_config.to_string(),
            row.bf16_source.clone(),
            format!("{:.1}", row.ours_us),
            format!("{:.1}", row.bf16_us),
            format!("{:.3}", row.over_bf16),
            format!("{:.1}", row.problem.flops() / row.ours_us * 1e-6),
            format!("{:.0}", row.problem.bytes() / row.ours_us * 1e-3),
        ]);
    }
    println!("{table}");
    println!("geometric mean: {:.3} of bf16", geometric_mean(rows.iter().map(|row| row.over_bf16)).unwrap_or(1.0));
}
