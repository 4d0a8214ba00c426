//! What the search would have lost, from a database as an exhaustive run leaves it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use assert_cmd::Command;
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use serde_json::Value;
use swiglu_db::{Device, Environment, Measurement, Origin, Outcome, Record, TuningDb};
use swiglu_kernels::families::{Family, candidates};
use swiglu_kernels::{Config, DType, Problem, Target, WeightMajor, arch};
use tempfile::TempDir;

fn regret(home: &TempDir) -> Command {
    let mut command = Command::cargo_bin("swiglu-tune").unwrap();
    command.env("HOME", home.path()).env("SWIGLU_DB", home.path().join("db")).arg("regret");
    command
}

/// Every candidate of `problem` with the time that `us` tells.
fn tried(problem: Problem, us: impl Fn(&Config) -> f64) -> Vec<Record> {
    let device = Device { class: "sm_90a-sm132-l2_60m-smem227k-bus6016-mem3201mhz".into(), name: "a GPU".into() };
    let record = |config: Config| {
        let measurement = Measurement { median_us: us(&config), samples: 40, ..Measurement::default() };
        let environment = Environment { source_digest: config.to_string(), ..Environment::default() };
        let (device, outcome) = (device.clone(), Outcome::Measured(measurement));
        Record { device, problem, config, outcome, environment, origin: Origin::Local }
    };
    candidates(&problem, Target::Gpu(arch::by_name("sm_90a").unwrap())).into_iter().map(record).collect()
}

#[test]
fn the_search_is_held_to_the_best_of_all_candidates() {
    let home = TempDir::new().unwrap();
    let shape = |m| Problem::forward(DType::Bf16, WeightMajor::K, m, 14336, 4096);
    // Where the family that the model puts last wins, the search must lose, and by what is said.
    let perverse = |config: &Config| if config.family() == Family::Simt { 10.0 } else { 12.5 };
    let sensible = |config: &Config| if config.family() == Family::WgmmaTma { 10.0 } else { 20.0 };
    let mut pruned = tried(shape(64), sensible);
    for record in pruned.iter_mut().take(300) {
        record.outcome = Outcome::Failed { stage: "pruned".into(), reason: String::new() };
    }
    {
        let mut db = TuningDb::open(&home.path().join("db")).unwrap();
        db.insert(&pruned).unwrap();
    }
    regret(&home).assert().code(1).stderr(contains("--exhaustive"));
    {
        let mut db = TuningDb::open(&home.path().join("db")).unwrap();
        db.insert(&tried(shape(2048), sensible)).unwrap();
        db.insert(&tried(shape(4096), perverse)).unwrap();
    }
    let output = regret(&home).arg("--json").output().unwrap();
    let rows: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 2, "one problem was not tried exhaustively");
    for (row, regret) in rows.iter().zip([0.0, 0.25]) {
        assert!((row["regret"].as_f64().unwrap() - regret).abs() < 1e-9, "{row}");
        assert!(row["picked"].as_u64().unwrap() * 10 < row["candidates"].as_u64().unwrap(), "{row}");
    }
    regret(&home).assert().success().stdout(contains("regret: median").and(contains("worst 25.00 %")));
}
