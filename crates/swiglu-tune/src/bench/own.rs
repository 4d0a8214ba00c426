//! Our own kernels beside each other: a number format beside bf16, or what serves beside what was tuned for that very M.

use super::{BenchArgs, Peer, as_error, config_for, fastest_measured, interleave, medians, print_json, verified};
use crate::gpu_subject::{GpuLab, Stopwatch};
use crate::log::emit;
use crate::race::{Failure, quantile};
use crate::records;
use crate::report::{geometric_mean, terminal_table};
use anyhow::{Context, Result};
use serde::Serialize;
use std::process::ExitCode;
use swiglu_db::{Layer, TuningTable};
use swiglu_kernels::{Config, DType, Problem, WeightMajor};
use swiglu_runtime::Options;

/// Medians of one size, in microseconds.
#[derive(Debug, Serialize)]
struct Row {
    problem: Problem,
    config: Config,
    source: String,
    ours_us: f64,
    peer_config: Config,
    peer_source: String,
    peer_us: f64,
    /// Time of the peer over ours.
    over_peer: f64,
}

/// Times every problem and prints the ratios.
pub(super) fn run(
    args: &BenchArgs,
    problems: &[Problem],
    given: &[Config],
    lab: &GpuLab,
    options: &Options,
) -> Result<ExitCode> {
    let mut layers = options.layers();
    // What the database has is the peer then, and does not serve.
    layers.retain(|(layer, _)| args.against != Peer::Tuned || *layer != Layer::User);
    let (table, _) = TuningTable::load(&layers);
    let tuned = if args.against == Peer::Tuned { records::read(options)? } else { Vec::new() };
    let mut rows = Vec::new();
    for &problem in problems {
        let Problem { op, m, n, k, .. } = problem;
        let peer = match args.against {
            Peer::Tuned => {
                let best = fastest_measured(&tuned, &problem, lab, |_| true);
                let best = best.with_context(|| format!("M {m} of N {n} and K {k} is not tuned in the database"))?;
                (problem, (best, "tuned".into()))
            }
            Peer::Cublaslt | Peer::OursBf16 => {
                let bf16 = Problem::forward(DType::Bf16, WeightMajor::K, m, n, k).with_op(op);
                (bf16, config_for(lab, &table, None, &bf16, options)?)
            }
        };
        let configs = match given {
            [] => vec![config_for(lab, &table, args.family, &problem, options)?],
            given => given.iter().map(|&config| (config, "given".into())).collect(),
        };
        for ours in configs {
            rows.push(bench(lab, (problem, ours), peer.clone(), args.rounds)?);
        }
    }
    if args.json {
        print_json(lab, &rows)?;
    } else {
        emit(figures(&rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

type Entrant = (Problem, (Config, String));

fn bench(lab: &GpuLab, ours: Entrant, peer: Entrant, rounds: usize) -> Result<Row> {
    let ((problem, (config, source)), (peer_problem, (peer_config, peer_source))) = (ours, peer);
    let watch = Stopwatch::new(lab).map_err(|failure| as_error(&failure))?;
    let (arena, kernel) = verified(lab, problem, config, &watch)?;
    let (peer_arena, peer_kernel) = verified(lab, peer_problem, peer_config, &watch)?;
    let race = || -> Result<[Vec<f64>; 2], Failure> {
        let ours = |index: usize| arena.launch(lab, &kernel, index);
        let peer = |index: usize| peer_arena.launch(lab, &peer_kernel, index);
        interleave(&watch, [&ours, &peer], rounds)
    };
    let [ours_us, peer_us] = medians(&race().map_err(|failure| as_error(&failure))?);
    let over_peer = peer_us / ours_us;
    Ok(Row { problem, config, source, ours_us, peer_config, peer_source, peer_us, over_peer })
}

fn figures(rows: &[Row]) -> String {
    let mut table = terminal_table([
        "dtype",
        "M",
        "N",
        "K",
        "config",
        "from",
        "peer config",
        "from",
        "ours us",
        "peer us",
        "peer/ours",
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
            row.peer_config.to_string(),
            row.peer_source.clone(),
            format!("{:.1}", row.ours_us),
            format!("{:.1}", row.peer_us),
            format!("{:.3}", row.over_peer),
            format!("{:.1}", row.problem.flops() / row.ours_us * 1e-6),
            format!("{:.0}", row.problem.bytes() / row.ours_us * 1e-3),
        ]);
    }
    let ratios: Vec<f64> = rows.iter().map(|row| row.over_peer).collect();
    format!(
        "{table}\npeer/ours: geometric mean {:.3}, median {:.3}, least {:.3}\n",
        geometric_mean(ratios.iter().copied()).unwrap_or(1.0),
        quantile(&ratios, 0.5),
        quantile(&ratios, 0.0)
    )
}
