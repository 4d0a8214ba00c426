//! Workers that crash, hang and lose their device: a candidate's fault costs that candidate only.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use assert_cmd::Command;
use predicates::prelude::PredicateBooleanExt as _;
use predicates::str::contains;
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::time::{Duration, Instant};
use swiglu_kernels::families::default_config;
use swiglu_kernels::{DType, Problem, WeightMajor, arch};
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
fn a_candidate_that_breaks_in_a_sustained_race_fails_alone() {
    for (fault, stage) in [("crash", "crash"), ("hang", "hang"), ("poison", "launch")] {
        let home = TempDir::new().unwrap();
        run(&home, &[]).success();
        let served = |record: &&Value| record["problem"]["m"] == 1 && record["chosen"] == true;
        let text = |record: &Value| {
            let number = |name: &str| record["config"][name].as_u64().unwrap();
            format!("cpu {}x{} threads {}", number("block_m"), number("block_n"), number("threads"))
        };
        // The present winner stays in a race until its end.
        let winner = text(records(&home).iter().find(served).unwrap());
        let fault = format!("sustain:{fault}:{winner}");
        run(&home, &["--retune", "--sustained", "--watchdog", "2", "--fault", &fault]).success();
        let after = records(&home);
        let broken: Vec<&Value> = after.iter().filter(|record| record["outcome"] != "measured").collect();
        assert!(broken.iter().any(|record| record["problem"]["m"] == 1 && text(record) == winner), "{after:?}");
        assert!(broken.iter().all(|record| record["stage"] == stage && text(record).contains(&winner)), "{broken:?}");
    }
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
fn a_worker_that_is_lost_leaves_its_problems_untuned_and_the_run_says_so() {
    let home = TempDir::new().unwrap();
    let lost = run(&home, &["--fault", "sample:babble:cpu 32x64"]).code(1);
    lost.stderr(contains("cannot tune").and(contains("Settled")).and(contains(" 0 problems tuned")));
    assert!(records(&home).iter().all(|record| record["outcome"] != "measured"));
    // Who failed before the loss is known all the same.
    let before = ["--fault", "verify:crash:cpu 32x64", "--fault", "sample:babble:cpu"];
    run(&home, &before).code(1).stderr(contains("cannot tune"));
    let failed = records(&home);
    assert!(!failed.is_empty() && failed.iter().all(|record| record["stage"] == "crash" && blocks(record) == [32, 64]));
    // What is tuned already stays so, and the run fails all the same.
    run(&home, &["--retune"]).success().stderr(contains("2 problems tuned"));
    run(&home, &["--retune", "--fault", "sample:babble:cpu 32x64"]).code(1).stderr(contains("cannot tune"));
    assert!(records(&home).iter().all(|record| record["outcome"] == "measured"));
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
fn a_budget_is_kept_to_a_tenth() {
    let home = TempDir::new().unwrap();
    let shapes = home.path().join("many.toml");
    let m: Vec<String> = (1..200).map(|m| m.to_string()).collect();
    std::fs::write(&shapes, format!("[[shape]]\nn = 48\nk = 32\nm = [{}]\n", m.join(", "))).unwrap();
    let begun = Instant::now();
    let args = ["--gpu", "cpu", "--quiet", "--budget", "5", "--shapes"];
    tune(&home).args(args).arg(shapes).assert().success().stderr(contains("the budget is spent"));
    let took = begun.elapsed().as_secs_f64();
    // Half a second for the processes to start and to end.
    assert!((4.0..5.5 + 0.5).contains(&took), "{took:.2} s of 5");
}

#[test]
fn a_worker_that_compiles_answers_each_request() {
    let home = TempDir::new().unwrap();
    let mut worker = std::process::Command::new(env!("CARGO_BIN_EXE_swiglu-tune"))
        .args(["worker", "--compile-for", "sm_80"])
        .env("SWIGLU_CUBIN_CACHE", home.path())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let problem = Problem::forward(DType::Bf16, WeightMajor::K, 16, 64, 64);
    let config = default_config(&problem, arch::by_name("sm_80").unwrap()).unwrap();
    let mut requests = worker.stdin.take().unwrap();
    let mut replies = BufReader::new(worker.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&replies.next().unwrap().unwrap()).unwrap() };
    assert!(next()["ready"]["nvrtc"].as_str().unwrap().contains('.'));
    for configs in [&[config][..], &[]] {
        writeln!(requests, "{}", serde_json::json!({ "compile": { "problem": problem, "configs": configs } })).unwrap();
        let mut reply = next();
        while reply == "alive" {
            reply = next();
        }
        assert_eq!(reply, serde_json::json!({ "compiled": [] }));
    }
    let cached = std::fs::read_dir(home.path()).unwrap().count();
    assert_eq!(cached, 1, "what was compiled is in the cache");
    drop(requests);
    worker.wait().unwrap();
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
