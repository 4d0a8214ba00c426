//! `regret`: what the search by the model would have lost, told from a database of an exhaustive run, without measuring.

use crate::log::emit;
use crate::race::quantile;
use crate::records;
use crate::report::{default_config, median_us, terminal_table};
use crate::search;
use anyhow::{Result, bail};
use clap::Args;
use serde::Serialize;
use std::collections::BTreeMap;
use std::process::ExitCode;
use swiglu_db::{Outcome, Record, TuningKey};
use swiglu_kernels::families::candidates;
use swiglu_kernels::model::Chip;
use swiglu_kernels::{Config, Problem};
use swiglu_runtime::Options;

#[derive(Debug, Clone, Args)]
pub(crate) struct RegretArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// One problem that was measured exhaustively.
#[derive(Debug, Serialize)]
struct Row {
    problem: Problem,
    /// Candidates that were tried.
    candidates: usize,
    /// Those of them that the search would have tried.
    picked: usize,
    best: Config,
    best_us: f64,
    found: Config,
    found_us: f64,
    /// Time of the best of those over the best of all, less one.
    regret: f64,
    /// The same where nobody else's winner seeds the search.
    regret_unseeded: f64,
    /// The same of the untuned default, if it was measured.
    regret_of_default: Option<f64>,
}

/// Prints a line a problem, and the figures over all.
pub(crate) fn run(args: &RegretArgs, options: &Options) -> Result<ExitCode> {
    let rows = rows(records::read(options)?);
    if rows.is_empty() {
        bail!(
            "no problem here was measured exhaustively; `swiglu-tune --gpu auto --exhaustive --shapes FILE.toml` does"
        );
    }
    if args.json {
        emit(serde_json::to_string_pretty(&rows)? + "\n")?;
    } else {
        emit(figures(&rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// In the order of tuning; each search is seeded by what the searches before it have found, as a run would be.
fn rows(records: Vec<Record>) -> Vec<Row> {
    let mut keys: BTreeMap<TuningKey, Vec<Record>> = BTreeMap::new();
    for record in records {
        keys.entry(record.key()).or_default().push(record);
    }
    let mut found: Vec<Record> = Vec::new();
    let mut rows = Vec::new();
    for records in keys.into_values() {
        if let Some((row, winner)) = row(&records, &found) {
            rows.push(row);
            found.push(winner);
        }
    }
    rows
}

/// `None` for a problem that was not measured exhaustively, or for which there is no model.
fn row(records: &[Record], found: &[Record]) -> Option<(Row, Record)> {
    let first = records.first()?;
    let (problem, device) = (first.problem, &first.device);
    let (chip, target) = (Chip::of_class(&device.class)?, device.target()?);
    let tried = |record: &&Record| !matches!(&record.outcome, Outcome::Failed { stage, .. } if stage == "pruned");
    let tried: Vec<&Record> = records.iter().filter(tried).collect();
    // What an earlier version tried and this one does not is no candidate.
    let legal = candidates(&problem, target);
    let tried: BTreeMap<Config, &Record> = tried
        .into_iter()
        .filter(|record| legal.contains(&record.config))
        .map(|record| (record.config, record))
        .collect();
    // Of steps and of small spaces the search tries all.
    if !problem.op.is_forward() || legal.len() < search::WORTH || tried.len() * 20 < legal.len() * 19 {
        return None;
    }
    let sources: BTreeMap<Config, String> =
        tried.iter().map(|(config, record)| (*config, record.environment.source_digest.clone())).collect();
    let default = default_config(problem, target);
    let wanted: Vec<Config> = default.into_iter().collect();
    let seeds: Vec<Record> = found.iter().filter(|record| record.device.class == device.class).cloned().collect();
    let best_of = |configs: &[Config]| -> Option<&Record> {
        let measured = configs.iter().filter_map(|config| tried.get(config).copied());
        measured.min_by(|a, b| median_us(a).total_cmp(&median_us(b))).filter(|record| record.measurement().is_some())
    };
    let all: Vec<Config> = tried.keys().copied().collect();
    let picked = search::pick(Some(&chip), &problem, &sources, &wanted, &seeds);
    let unseeded = search::pick(Some(&chip), &problem, &sources, &wanted, &[]);
    let (best, winner) = (best_of(&all)?, best_of(&picked)?);
    let regret = |record: &Record| median_us(record) / median_us(best) - 1.0;
    let row = Row {
        problem,
        candidates: tried.len(),
        picked: picked.len(),
        best: best.config,
        best_us: median_us(best),
        found: winner.config,
        found_us: median_us(winner),
        regret: regret(winner),
        regret_unseeded: best_of(&unseeded).map_or(f64::INFINITY, regret),
        regret_of_default: best_of(&wanted).map(regret),
    };
    Some((row, winner.clone()))
}

fn figures(rows: &[Row]) -> String {
    let mut table = terminal_table([
        "op",
        "dtype",
        "M",
        "N",
        "K",
        "tried",
        "picked",
        "best of all",
        "us",
        "best picked",
        "us",
        "regret %",
        "unseeded %",
        "default %",
    ]);
    let percent = |regret: f64| format!("{:.2}", 100.0 * regret);
    for row in rows {
        let Problem { op, dtype, m, n, k, .. } = row.problem;
        table.add_row([
            op.to_string(),
            dtype.to_string(),
            m.to_string(),
            n.to_string(),
            k.to_string(),
            row.candidates.to_string(),
            row.picked.to_string(),
            row.best.to_string(),
            format!("{:.1}", row.best_us),
            row.found.to_string(),
            format!("{:.1}", row.found_us),
            percent(row.regret),
            percent(row.regret_unseeded),
            row.regret_of_default.map_or_else(|| "-".into(), percent),
        ]);
    }
    let over = |name: &str, regrets: Vec<f64>| {
        let [median, worst] = [0.5, 1.0].map(|at| percent(quantile(&regrets, at)));
        format!("{name}: median {median} %, worst {worst} %\n")
    };
    let all = over("regret", rows.iter().map(|row| row.regret).collect());
    let unseeded = over("regret without seeds", rows.iter().map(|row| row.regret_unseeded).collect());
    let default = over("regret of the default", rows.iter().filter_map(|row| row.regret_of_default).collect());
    let total = |count: fn(&Row) -> usize| rows.iter().map(count).sum::<usize>();
    let (picked, tried) = (total(|row| row.picked), total(|row| row.candidates));
    let (problems, share) = (rows.len(), 100.0 * picked as f64 / tried as f64);
    format!("{table}\n{all}{unseeded}{default}{problems} problems, {picked} of {tried} candidates, {share:.1} %\n")
}
