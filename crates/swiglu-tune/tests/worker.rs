//! Workers that crash, hang and lose their device: a candidate's fault costs that candidate only.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use assert_cmd::Command;
use predicates::str::contains;
use serde_json::Value;
use std::time::Duration;
use tempfile::TempDir;

/// `swiglu-tune` on the CPU, on two small problems, with every place it may write to inside `home`.
fn tune(home: &TempDir) -> Command {
    let mut command = Command::cargo_bin("swiglu-tune").unwrap();
    for (name, folder) in [("HOME", "."), ("XDG_DATA_HOME", "data"), ("XDG_CACHE_HOME", "cache"), ("SWIGLU_DB", "db")] {
        command.env(name, home.path().join(folder));
    }
    command.timeout(Duration::from_secs(120));
    command
}

fn run(home: &TempDir, args: &[&str]) -> assert_cmd::assert::Assert {
    let shapes = home.path().join("shapes.toml");
    std::fs::write(&shapes, "[[shape]]\nn = 48\nk = 32\nm = [1, 5]\n").unwrap();
    tune(home).args(["--gpu", "cpu", "--quiet", "--shapes"]).arg(shapes).args(args).assert()
}

fn records(home: &TempDir) -> Vec<Value> {
    let output = tune(home).args(["report", "--json"]).output().unwrap();
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    value["records"].as_array().unwrap().clone()
}

/// The block sizes of a record's config.
fn blocks(record: &Value) -> [u64; 2] {
    ["block_m", "block_n"].map(|name| record["config"][name].as_u64().unwrap())
}

/// Every candidate has a time but those of blocks 32x64, which failed at `stage` for a reason that holds `why`.
fn only_32x64_failed(home: &TempDir, stage: &str, why: &str) {
    let records = records(home);
    assert!(!records.is_empty());
    for record in &records {
        if blocks(record) == [32, 64] {
            assert_eq!(record["stage"], stage, "{record}");
            assert!(record["reason"].as_str().unwrap().contains(why), "{record}");
        } else {
            assert_eq!(record["outcome"], "measured", "{record}");
        }
    }
    assert!(records.iter().any(|record| blocks(record) == [32, 64]));
}

#[test]
fn a_candidate_that_crashes_its_worker_fails_alone_and_is_not_tried_again() {
    let home = TempDir::new().unwrap();
    run(&home, &["--fault", "verify:crash:cpu 32x64"]).success().stderr(contains("2 problems tuned"));
    only_32x64_failed(&home, "crash", "its process died");
    let before = records(&home);
    // Without the fault: it would be measured if it was tried.
    run(&home, &[]).success().stderr(contains("2 were tuned before"));
    assert_eq!(records(&home), before);
    run(&home, &["--retune"]).success().stderr(contains("2 problems tuned"));
    assert!(records(&home).iter().all(|record| record["outcome"] == "measured"));
}

#[test]
fn who_crashes_while_many_are_timed_is_found_out() {
    let home = TempDir::new().unwrap();
    run(&home, &["--fault", "sample:crash:cpu 32x64"]).success();
    only_32x64_failed(&home, "crash", "its process died");
}

#[test]
fn a_candidate_that_hangs_is_killed_by_the_watchdog() {
    let home = TempDir::new().unwrap();
    let threads = swiglu_runtime::cpu::threads();
    let fault = format!("verify:hang:cpu 32x64 threads {threads}");
    run(&home, &["--watchdog", "1", "--fault", &fault]).success();
    let hung = |record: &&Value| record["stage"] == "hang";
    let records = records(&home);
    assert_eq!(records.iter().filter(hung).count(), 2, "one for each problem");
    assert!(records.iter().filter(|record| !hung(record)).all(|record| record["outcome"] == "measured"));
}

#[test]
fn a_candidate_that_poisons_its_device_is_told_by_what_it_did() {
    let home = TempDir::new().unwrap();
    run(&home, &["--fault", "verify:poison:cpu 32x64", "--fault", "sample:poison:cpu 32x64"]).success();
    only_32x64_failed(&home, "launch", "illegal address, say; it took the device down");
}

#[test]
fn where_every_candidate_crashes_the_run_ends_and_says_so() {
    let home = TempDir::new().unwrap();
    run(&home, &["--fault", "verify:crash:cpu"]).code(1).stderr(contains("2 problems have no working candidate"));
    assert!(records(&home).iter().all(|record| record["stage"] == "crash"));
}

#[test]
fn a_run_tells_those_who_watch_it_what_is_finished() {
    let home = TempDir::new().unwrap();
    let (metrics, board) = (home.path().join("metrics.jsonl"), home.path().join("board"));
    let places = ["--metrics", metrics.to_str().unwrap(), "--tensorboard", board.to_str().unwrap()];
    run(&home, &places).success();
    let text = std::fs::read_to_string(&metrics).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |event: &str| lines.iter().filter(|line| line["event"] == event).collect::<Vec<_>>();
    assert_eq!((of("candidate").len(), of("problem").len()), (records(&home).len(), 2));
    assert!(of("problem").iter().all(|line| line["median_us"].as_f64().unwrap() > 0.0 && line["winner"].is_object()));
    let events = std::fs::read_dir(&board).unwrap().next().unwrap().unwrap();
    assert!(std::fs::read(events.path()).unwrap().windows(17).any(|window| window == b"problem/median_us"));
    run(&home, &["--metrics", "/nowhere/metrics.jsonl"]).code(1).stderr(contains("/nowhere/metrics.jsonl"));
}

#[test]
fn a_worker_ends_when_its_tuner_does() {
    let mut worker = std::process::Command::new(env!("CARGO_BIN_EXE_swiglu-tune"))
        .args(["worker", "--gpu", "cpu"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    drop(worker.stdin.take());
    for _ in 0..500 {
        if worker.try_wait().unwrap().is_some() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    worker.kill().unwrap();
    panic!("it outlives its tuner");
}
