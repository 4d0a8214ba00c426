//! The command line as a user meets it, on a machine without a GPU.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tempfile::TempDir;

/// `swiglu-tune` with every place it may write to inside `home`.
fn tune(home: &TempDir) -> Command {
    let mut command = Command::cargo_bin("swiglu-tune").unwrap();
    isolate(home.path(), |name, value| {
        command.env(name, value);
    });
    command
}

fn isolate(home: &Path, mut set: impl FnMut(&str, &Path)) {
    set("HOME", home);
    set("XDG_DATA_HOME", &home.join("data"));
    set("XDG_CACHE_HOME", &home.join("cache"));
    set("SWIGLU_DB", &home.join("db"));
    set("SWIGLU_CUBIN_CACHE", &home.join("cubin"));
}

/// A shapes file small enough for a debug build.
fn shapes(home: &TempDir, m: &str) -> String {
    let path = home.path().join("shapes.toml");
    std::fs::write(&path, format!("[[shape]]\nn = 48\nk = 32\nm = {m}\n")).unwrap();
    path.display().to_string()
}

fn records(home: &TempDir) -> Vec<Value> {
    let output = tune(home).args(["report", "--json"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    value["records"].as_array().unwrap().clone()
}

#[test]
fn help_teaches_and_wrong_usage_exits_with_2() {
    let home = TempDir::new().unwrap();
    tune(&home).arg("--help").assert().success().stdout(contains("Examples").and(contains("--gpu auto")));
    tune(&home).arg("--version").assert().success();
    for wrong in [
        &[][..],
        &["--gpu", "banana"],
        &["--frobnicate"],
        &["--gpu", "cpu", "--dtype", "fp64"],
        &["--gpu", "cpu", "--model", "tiny", "--shapes", "x.toml"],
        &["--gpu", "cpu", "--exhaustive", "--search", "model"],
        &["--gpu", "cpu", "--exhaustive", "--sustained"],
        &["bench", "--seeds", "--m", "5"],
        &["render", "--family", "cpu"],
        &["--gpu", "cpu", "report"],
        &["--op", "gate", "report"],
        &["--watchdog", "60", "--db", "x", "doctor"],
    ] {
        tune(&home).args(wrong).assert().code(2);
    }
}

#[test]
fn failures_exit_with_1_and_say_what_to_do() {
    let home = TempDir::new().unwrap();
    tune(&home).args(["--gpu", "cpu", "--model", "gpt-9"]).assert().code(1).stderr(contains("llama-3-8b"));
    tune(&home)
        .args(["--gpu", "cpu", "--shapes", "/nowhere/shapes.toml"])
        .assert()
        .code(1)
        .stderr(contains("/nowhere/shapes.toml"));
    tune(&home).args(["--gpu", "cpu", "--dtype", "tf32"]).assert().code(1).stderr(contains("f32"));
    tune(&home).args(["render", "--arch", "sm_1"]).assert().code(1).stderr(contains("sm_90a"));
    tune(&home).args(["render", "--config", "{}"]).assert().code(1).stderr(contains("--config"));
    let illegal = r#"{"family":"mma_sync","staging":"cp_async","block_m":100,"block_n":64,"block_k":64,"stages":3,"warps_m":2,
        "warps_n":2,"access_bytes":16,"fast_silu":false,"raster":"along_m","raster_group":8}"#;
    tune(&home).args(["render", "--config", illegal]).assert().code(1).stderr(contains("fragments"));
    let file = home.path().join("a-file");
    std::fs::write(&file, "").unwrap();
    let db = file.join("db");
    tune(&home).args(["--gpu", "cpu", "--db"]).arg(&db).assert().code(1).stderr(contains("a-file"));
}

#[test]
fn the_cpu_is_tuned_reported_and_not_tuned_twice() {
    let home = TempDir::new().unwrap();
    let shapes = shapes(&home, "[1, 5]");
    tune(&home).arg("report").assert().success().stderr(contains("nothing is tuned"));
    tune(&home)
        .args(["--gpu", "cpu", "--shapes", &shapes, "--dtype", "f32,bf16"])
        .assert()
        .success()
        .stderr(contains("4 problems tuned"));
    let first = records(&home);
    assert!(
        first.iter().any(|record| record["config"]["family"] == "cpu" && record["median_us"].as_f64().unwrap() > 0.0)
    );
    assert!(first.iter().all(|record| record["outcome"] == "measured"), "every candidate is correct");
    tune(&home)
        .args(["--gpu", "cpu", "--shapes", &shapes, "--dtype", "f32,bf16"])
        .assert()
        .success()
        .stderr(contains("0 problems tuned").and(contains("4 were tuned before")));
    assert_eq!(records(&home), first, "nothing was measured again");
    tune(&home).arg("report").assert().success().stdout(contains("cpu").and(contains("TFLOP/s")));
    tune(&home).args(["db", "export"]).assert().success().stdout(contains("schema = 1").and(contains("[[record]]")));
    tune(&home).args(["db", "export", "--device", "gpu-9"]).assert().code(1).stderr(contains("gpu-9"));
}

#[test]
fn auto_without_a_driver_says_so_in_one_line_and_tunes_the_cpu() {
    if swiglu_runtime::library::driver().is_ok() {
        return; // this machine has a driver: `auto` would rightly take its GPU
    }
    let home = TempDir::new().unwrap();
    let shapes = shapes(&home, "[2]");
    tune(&home)
        .args(["--gpu", "auto", "--shapes", &shapes])
        .assert()
        .success()
        .stderr(contains("no GPU").and(contains("CPU")));
    tune(&home)
        .args(["--gpu", "all", "--retune", "--shapes", &shapes])
        .assert()
        .success()
        .stderr(contains("no GPU").and(contains("1 problems tuned")));
    tune(&home).args(["--gpu", "0"]).assert().code(1).stderr(contains("driver"));
    tune(&home).arg("doctor").assert().code(1).stdout(contains("MISS driver"));
}

#[test]
fn a_spent_budget_leaves_the_rest_for_later() {
    let home = TempDir::new().unwrap();
    let shapes = shapes(&home, "[1, 2, 3]");
    let args = ["--gpu", "cpu", "--shapes", &shapes];
    tune(&home).args(args).args(["--budget", "0"]).assert().success().stderr(contains("3 problems are left"));
    assert!(records(&home).is_empty());
    tune(&home).args(args).assert().success().stderr(contains("3 problems tuned"));
}

#[test]
fn render_list_and_doctor_answer_without_a_gpu() {
    let home = TempDir::new().unwrap();
    tune(&home)
        .arg("render")
        .assert()
        .success()
        .stdout(contains("constexpr int kBlockM").and(contains("#include").not()));
    tune(&home)
        .args(["render", "--family", "simt", "--dtype", "f32", "--layout", "packed_kn"])
        .assert()
        .success()
        .stdout(contains("WeightMajor::n_major"));
    tune(&home).arg("list").assert().success().stdout(contains("mma_sync").and(contains("kept")));
    tune(&home).args(["list", "--arch", "sm_75"]).assert().success().stdout(contains("compute capability 8.0"));
    tune(&home)
        .args(["list", "--arch", "cpu", "--dtype", "f32", "--configs"])
        .assert()
        .success()
        .stdout(contains("threads 1"));
    let output = tune(&home).args(["doctor", "--json"]).output().unwrap();
    let checks: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(checks.as_array().unwrap().iter().any(|check| check["what"] == "NVRTC"));
}

#[test]
fn one_architecture_is_compiled_and_counted() {
    let home = TempDir::new().unwrap();
    let args = ["compile", "--arch", "sm_80", "--dtype", "bf16", "--sample", "0"];
    tune(&home).args(args).assert().success().stdout(contains("sm_80").and(contains("0 failed or spilled")));
}

/// A tuner in the background with a long list of work.
fn start(home: &TempDir) -> std::process::Child {
    let shapes = shapes(home, "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_swiglu-tune"));
    isolate(home.path(), |name, value| {
        command.env(name, value);
    });
    command
        .args(["--gpu", "cpu", "--quiet", "--shapes", &shapes])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn wait_for_records(home: &TempDir) {
    let journal = home.path().join("db/journal.jsonl");
    for _ in 0..600 {
        if std::fs::read_to_string(&journal).is_ok_and(|text| text.lines().count() > 1) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("no measurement after 12 s");
}

#[test]
fn kill_9_loses_no_finished_measurement() {
    let home = TempDir::new().unwrap();
    let mut before = 0;
    for round in 0..3 {
        let mut child = start(&home);
        wait_for_records(&home);
        std::thread::sleep(Duration::from_millis(300 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let now = records(&home).len();
        assert!(now >= before, "round {round}: {now} of {before} records");
        before = now;
    }
    let shapes = shapes(&home, "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]");
    tune(&home).args(["--gpu", "cpu", "--shapes", &shapes]).assert().success();
    assert!(records(&home).len() >= before);
}

#[test]
fn ctrl_c_keeps_what_is_finished_and_a_second_tuner_is_told_who_holds_the_lock() {
    let home = TempDir::new().unwrap();
    let child = start(&home);
    wait_for_records(&home);
    let holder = contains(format!("is held by pid {} on ", child.id())).and(contains(" since 2"));
    tune(&home).args(["--gpu", "cpu", "--model", "tiny"]).assert().code(1).stderr(holder);
    let interrupted = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("interrupted") && said.contains("are left"), "{said}");
    assert!(!records(&home).is_empty());
}

#[test]
fn a_damaged_database_is_repaired_with_a_warning() {
    let home = TempDir::new().unwrap();
    let shapes = shapes(&home, "[1, 2]");
    tune(&home).args(["--gpu", "cpu", "--shapes", &shapes]).assert().success();
    let whole = records(&home).len();
    let sled = home.path().join("db/index.sled/db");
    let mut bytes = std::fs::read(&sled).unwrap();
    let middle = bytes.len() / 2;
    bytes.truncate(middle);
    std::fs::write(&sled, bytes).unwrap();
    tune(&home).args(["--gpu", "cpu", "--shapes", &shapes]).assert().success().stderr(contains("2 were tuned before"));
    assert_eq!(records(&home).len(), whole);
}
