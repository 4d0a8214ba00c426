//! What a report says of the records, without how it is shown.

use super::roofline::Roofline;
use anyhow::{Context, Result};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use swiglu_db::{Device, Outcome, Record, TuningKey, record};
use swiglu_kernels::families::{self, Target};
use swiglu_kernels::{Config, Problem, render};

/// Two times closer than this are one: a run repeats to within 1 to 2 %.
pub(crate) const TIE: f64 = 1.01;

/// One device and everything measured on it.
pub(crate) struct DeviceReport {
    pub(crate) device: Device,
    pub(crate) roofline: Roofline,
    /// In the order of the keys.
    pub(crate) rows: Vec<Row>,
    /// The records of problems for which no candidate works.
    pub(crate) without_winner: BTreeMap<TuningKey, Vec<Record>>,
    /// Candidates without a time, by the stage they failed at, with one reason.
    pub(crate) failures: BTreeMap<String, (usize, String)>,
    /// Tools and origins of the winners, with how many each has.
    pub(crate) provenance: BTreeMap<Provenance, usize>,
}

/// What winners were measured with.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Provenance {
    pub(crate) driver: String,
    pub(crate) nvrtc: String,
    pub(crate) version: String,
    pub(crate) origin: String,
}

/// One problem.
pub(crate) struct Row {
    pub(crate) winner: Record,
    pub(crate) median_us: f64,
    /// Every measured candidate, fastest first, the winner among them.
    pub(crate) candidates: Vec<Record>,
    /// The candidates that have no time.
    pub(crate) failed: Vec<Record>,
    /// The time of the config that would serve untuned, if it was measured.
    pub(crate) default_us: Option<f64>,
    pub(crate) peer: Option<Peer>,
    /// Why the record is not of the kernel that would run now.
    pub(crate) stale: Option<String>,
}

/// cuBLASLt beside ours in one race, from `bench --json`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Peer {
    /// Microseconds of the GEMM alone.
    pub(crate) gemm_us: f64,
    /// Its time over ours.
    pub(crate) over_gemm: f64,
    /// The time of GEMM and gate over ours.
    pub(crate) over_gemm_and_gate: f64,
}

impl Row {
    pub(crate) fn problem(&self) -> &Problem {
        &self.winner.problem
    }

    pub(crate) fn tflops(&self) -> f64 {
        self.problem().flops() / self.median_us * 1e-6
    }

    pub(crate) fn gigabytes_per_second(&self) -> f64 {
        self.problem().bytes() / self.median_us * 1e-3
    }

    /// How much faster than untuned.
    pub(crate) fn over_default(&self) -> Option<f64> {
        self.default_us.map(|default_us| default_us / self.median_us)
    }

    /// Other candidates that are as fast.
    pub(crate) fn ties(&self) -> usize {
        self.ratios().filter(|ratio| *ratio < TIE).count().saturating_sub(1)
    }

    /// Of every measured candidate the time over the winner's.
    pub(crate) fn ratios(&self) -> impl Iterator<Item = f64> {
        self.candidates.iter().filter_map(|record| Some(record.measurement()?.median_us / self.median_us))
    }
}

/// One report per device class, and per product where one class has several names.
pub(crate) fn devices(
    records: Vec<Record>,
    peers: &BTreeMap<TuningKey, Peer>,
    roofline: impl Fn(&Device) -> Roofline,
) -> Vec<DeviceReport> {
    let mut by_device: BTreeMap<Device, BTreeMap<TuningKey, Vec<Record>>> = BTreeMap::new();
    for record in records {
        by_device.entry(record.device.clone()).or_default().entry(record.key()).or_default().push(record);
    }
    by_device.into_iter().map(|(device, keys)| device_report(roofline(&device), device, keys, peers)).collect()
}

fn device_report(
    roofline: Roofline,
    device: Device,
    keys: BTreeMap<TuningKey, Vec<Record>>,
    peers: &BTreeMap<TuningKey, Peer>,
) -> DeviceReport {
    let mut report = DeviceReport {
        device,
        roofline,
        rows: Vec::new(),
        without_winner: BTreeMap::new(),
        failures: BTreeMap::new(),
        provenance: BTreeMap::new(),
    };
    for (key, records) in keys {
        for record in &records {
            if let Outcome::Failed { stage, reason } = &record.outcome {
                report.failures.entry(stage.clone()).or_insert_with(|| (0, reason.clone())).0 += 1;
            }
        }
        match row(records, peers.get(&key).copied()) {
            Ok(row) => {
                *report.provenance.entry(provenance(&row.winner)).or_default() += 1;
                report.rows.push(row);
            }
            Err(failed) => {
                report.without_winner.insert(key, failed);
            }
        }
    }
    report
}

/// The row of one problem; its records back where none has a time.
fn row(records: Vec<Record>, peer: Option<Peer>) -> Result<Row, Vec<Record>> {
    let Some(winner) = record::winners(records.iter().cloned()).pop() else { return Err(records) };
    let (mut candidates, failed): (Vec<Record>, Vec<Record>) =
        records.into_iter().partition(|record| record.measurement().is_some());
    candidates.sort_by(|a, b| median_us(a).total_cmp(&median_us(b)));
    let default = winner.device.target().and_then(|target| default_config(winner.problem, target));
    // Times of different origins do not compare.
    let default = candidates.iter().find(|record| Some(record.config) == default && record.origin == winner.origin);
    Ok(Row {
        median_us: median_us(&winner),
        default_us: default.map(median_us),
        failed,
        peer,
        stale: stale(&winner),
        candidates,
        winner,
    })
}

/// The time of a record, infinite where it has none.
pub(crate) fn median_us(record: &Record) -> f64 {
    record.measurement().map_or(f64::INFINITY, |measured| measured.median_us)
}

/// What would serve if nothing was tuned; `None` where nothing runs the problem.
pub(crate) fn default_config(problem: Problem, target: Target) -> Option<Config> {
    let default = match target {
        Target::Gpu(arch) => families::default_config(&problem, arch).ok(),
        Target::Cpu { threads } => Some(Config::Cpu(families::cpu::default_config(threads))),
    };
    default.filter(|config| config.check(&problem, target).is_ok())
}

/// Why a record is not of what would run now.
pub(crate) fn stale(record: &Record) -> Option<String> {
    let target = record.device.target()?;
    if let Err(why) = record.config.check(&record.problem, target) {
        return Some(format!("no longer legal: {why}"));
    }
    let (measured, now) = (&record.environment, env!("CARGO_PKG_VERSION"));
    match target {
        Target::Gpu(arch) => match render::digest(&record.problem, &record.config, arch) {
            Ok(digest) => (digest != measured.source_digest).then(|| "its source has changed since".into()),
            Err(error) => Some(error.to_string()),
        },
        Target::Cpu { .. } => (measured.version != now).then(|| format!("measured by version {}", measured.version)),
    }
}

fn provenance(record: &Record) -> Provenance {
    let environment = record.environment.clone();
    Provenance {
        driver: environment.driver,
        nvrtc: environment.nvrtc,
        version: environment.version,
        origin: record.origin.to_string(),
    }
}

#[derive(Deserialize)]
struct BenchFile {
    device: Device,
    rows: Vec<BenchRow>,
}

#[derive(Deserialize)]
struct BenchRow {
    problem: Problem,
    gemm_us: f64,
    over_gemm: f64,
    over_gemm_and_gate: f64,
}

/// The peers of results of `bench --json`; of several of one problem the last.
pub(crate) fn peers(paths: &[impl AsRef<Path>]) -> Result<BTreeMap<TuningKey, Peer>> {
    let mut peers = BTreeMap::new();
    for path in paths.iter().map(AsRef::as_ref) {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let file: BenchFile = serde_json::from_str(&text)
            .with_context(|| format!("{} is no result of `swiglu-tune bench --json`", path.display()))?;
        for BenchRow { problem, gemm_us, over_gemm, over_gemm_and_gate } in file.rows {
            let key = TuningKey { device_class: file.device.class.clone(), problem };
            peers.insert(key, Peer { gemm_us, over_gemm, over_gemm_and_gate });
        }
    }
    Ok(peers)
}

/// The figures that stand above the tables, unflattering ones included.
pub(crate) struct Summary {
    pub(crate) problems: usize,
    pub(crate) candidates: usize,
    pub(crate) failed: usize,
    pub(crate) over_default: Option<f64>,
    /// Problems whose default was not measured.
    pub(crate) without_default: usize,
    /// Problems that tuning made faster by less than what a run repeats to.
    pub(crate) not_helped: usize,
    pub(crate) over_gemm: Option<f64>,
    pub(crate) over_gemm_and_gate: Option<f64>,
    /// Problems that the peer's GEMM and gate do faster.
    pub(crate) lost_to_peer: usize,
    pub(crate) tied: usize,
    pub(crate) stale: usize,
}

impl DeviceReport {
    pub(crate) fn summary(&self) -> Summary {
        let rows = &self.rows;
        let over_default = || rows.iter().filter_map(Row::over_default);
        let peers = || rows.iter().filter_map(|row| row.peer);
        Summary {
            problems: rows.len(),
            candidates: rows.iter().map(|row| row.candidates.len()).sum(),
            failed: self.failures.values().map(|(count, _)| count).sum(),
            over_default: geometric_mean(over_default()),
            without_default: rows.len() - over_default().count(),
            not_helped: over_default().filter(|ratio| *ratio < TIE).count(),
            over_gemm: geometric_mean(peers().map(|peer| peer.over_gemm)),
            over_gemm_and_gate: geometric_mean(peers().map(|peer| peer.over_gemm_and_gate)),
            lost_to_peer: peers().filter(|peer| peer.over_gemm_and_gate < 1.0).count(),
            tied: rows.iter().filter(|row| row.ties() > 0).count(),
            stale: rows.iter().filter(|row| row.stale.is_some()).count(),
        }
    }

    /// Rows that differ in M only, in the order of M.
    pub(crate) fn shapes(&self) -> Vec<(String, Vec<&Row>)> {
        let mut shapes: BTreeMap<Problem, Vec<&Row>> = BTreeMap::new();
        for row in &self.rows {
            shapes.entry(row.problem().with_m(0)).or_default().push(row);
        }
        // Words that are the same for all shapes tell nothing.
        let kinds: BTreeSet<String> = shapes.keys().map(kind).collect();
        let name = |shape: &Problem| match kinds.len() {
            1 => format!("K {}, N {}", shape.k, shape.n),
            _ => format!("{} K {}, N {}", kind(shape), shape.k, shape.n),
        };
        shapes.into_iter().map(|(shape, rows)| (name(&shape), rows)).collect()
    }
}

fn kind(problem: &Problem) -> String {
    let &Problem { op, activation, dtype, weight_major, alignment, n: _, k: _, m: _ } = problem;
    format!("{op} {activation} {dtype} {weight_major} a{alignment}")
}

/// `None` of nothing.
pub(crate) fn geometric_mean(ratios: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = ratios.fold((0.0, 0_u32), |(sum, count), ratio| (sum + ratio.ln(), count + 1));
    (count > 0).then(|| (sum / f64::from(count)).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiglu_kernels::{DType, Op, WeightMajor};

    #[test]
    fn there_is_no_default_where_nothing_runs_the_problem() {
        let cpu = Target::Cpu { threads: 4 };
        let forward = |dtype| Problem::forward(dtype, WeightMajor::K, 4, 48, 32);
        let default = default_config(forward(DType::F32), cpu).unwrap();
        assert!(default.check(&forward(DType::F32), cpu).is_ok());
        for problem in [forward(DType::E4m3), forward(DType::Tf32), forward(DType::F32).with_op(Op::Dgated)] {
            assert_eq!(default_config(problem, cpu), None, "{problem:?}");
        }
    }
}
