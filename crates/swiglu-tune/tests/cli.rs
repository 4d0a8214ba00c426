//! The command line as a user meets it, on a machine without a GPU.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;
use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt as _;
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
        &["--gpu", "cpu", "--model", "gpt-9"],
        &["--gpu", "cpu", "report"],
        &["--op", "gate", "report"],
        &["--watchdog", "60", "--db", "x", "doctor"],
    ] {
        tune(&home).args(wrong).assert().code(2);
    }
    tune(&home).args(["--gpu", "cpu", "--model", "gpt-9"]).assert().stderr(contains("llama-3-8b"));
    let leave_out = contains("before `report` it has no effect, leave it out");
    tune(&home).args(["--gpu", "cpu", "report"]).assert().stderr(leave_out);
    let give_after = contains("before `render` it has no effect, give it after");
    tune(&home).args(["--op", "gate", "render"]).assert().stderr(give_after);
}

#[test]
fn failures_exit_with_1_and_say_what_to_do() {
    let home = TempDir::new().unwrap();
    tune(&home)
        .args(["--gpu", "cpu", "--shapes", "/nowhere/shapes.toml"])
        .assert()
        .code(1)
        .stderr(contains("/nowhere/shapes.toml"));
    tune(&home).args(["--gpu", "cpu", "--dtype", "tf32"]).assert().code(1).stderr(contains("tf32, asked for"));
    let shapes = home.path().join("formats.toml");
    std::fs::write(&shapes, "[[shape]]\nn = 8\nk = 8\n[[shape]]\nn = 48\nk = 32\ndtype = [\"tf32\"]\n").unwrap();
    let named = contains("tf32, asked for with n 48, k 32").and(contains("use f32"));
    tune(&home).args(["--gpu", "cpu", "--shapes"]).arg(shapes).assert().code(1).stderr(named);
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
    let auto = ["--gpu", "auto", "--retune", "--shapes", &shapes, "--op"];
    let rest = contains("down, gate").and(contains("1 problems tuned"));
    tune(&home).args(auto).arg("down,forward,gate").assert().success().stderr(rest);
    tune(&home).args(auto).arg("down").assert().code(1).stderr(contains("`down` runs on a GPU"));
    tune(&home)
        .args(["--gpu", "cpu", "--op", "forward,down"])
        .assert()
        .code(1)
        .stderr(contains("`down` runs on a GPU"));
    tune(&home).args(["--gpu", "0"]).assert().code(1).stderr(contains("driver"));
    tune(&home).arg("doctor").assert().code(1).stdout(contains("MISS driver"));
}

#[test]
fn a_spent_budget_leaves_the_rest_for_later() {
    let home = TempDir::new().unwrap();
    let shapes = shapes(&home, "[1, 2, 3]");
    let args = ["--gpu", "cpu", "--shapes", &shapes];
    tune(&home).args(args).args(["--budget", "0"]).assert().code(1).stderr(contains("3 problems are left"));
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

/// What a record is of.
fn key(record: &Value) -> String {
    format!("{} {}", record["problem"], record["config"])
}

/// What whole lines of the journal are of.
fn journal(home: &TempDir) -> BTreeSet<String> {
    let text = std::fs::read_to_string(home.path().join("db/journal.jsonl")).unwrap();
    let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let lines = whole.map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["record"].is_object()).map(|line| key(&line["record"])).collect()
}

#[test]
fn kill_9_loses_no_finished_measurement() {
    let home = TempDir::new().unwrap();
    let mut finished = BTreeSet::new();
    for round in 0..3 {
        let mut child = start(&home);
        wait_for_records(&home);
        std::thread::sleep(Duration::from_millis(300 * round));
        finished.extend(journal(&home));
        child.kill().unwrap();
        child.wait().unwrap();
        let now: BTreeSet<String> = records(&home).iter().map(key).collect();
        let lost: Vec<&String> = finished.difference(&now).collect();
        assert!(!finished.is_empty() && lost.is_empty(), "round {round}: {lost:?}");
    }
    let shapes = shapes(&home, "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]");
    tune(&home).args(["--gpu", "cpu", "--shapes", &shapes]).assert().success();
    let now: BTreeSet<String> = records(&home).iter().map(key).collect();
    assert!(finished.is_subset(&now));
}

/// The processes that `parent` has started and that have not ended.
fn children(parent: u32) -> Vec<String> {
    let is_child = |pid: &String| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let mut fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
        fields.next() != Some("Z") && fields.next() == Some(&parent.to_string())
    };
    let names = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())).filter(is_child).collect()
}

fn send(signal: &str, pid: &str) -> bool {
    std::process::Command::new("kill").args([signal, pid]).stderr(Stdio::null()).status().unwrap().success()
}

#[test]
fn workers_that_others_kill_cost_no_candidate_and_no_problem() {
    let home = TempDir::new().unwrap();
    let child = start(&home);
    wait_for_records(&home);
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    const SIGPIPE: u64 = 1 << 12;
    assert_ne!(
        u64::from_str_radix(ignored.trim(), 16).unwrap() & SIGPIPE,
        0,
        "a request to a dead worker ends the tuner"
    );
    let mut killed = 0;
    for _ in 0..8 {
        killed += children(child.id()).iter().filter(|worker| send("-KILL", worker)).count();
        std::thread::sleep(Duration::from_millis(500));
    }
    assert!(send("-TERM", &child.id().to_string()));
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(killed >= 6, "{killed}: {said}");
    assert_eq!(output.status.code(), Some(143), "{said}");
    assert!(!said.contains("cannot tune") && !said.contains("broke its worker"), "{said}");
    let records = records(&home);
    assert!(!records.is_empty() && records.iter().all(|record| record["outcome"] == "measured"), "{records:?}");
}

#[test]
fn a_candidate_is_tried_again_before_it_is_blamed_for_a_worker_that_died() {
    let home = TempDir::new().unwrap();
    let shapes = shapes(&home, "[1]");
    let threads = swiglu_runtime::cpu::threads();
    let fault = format!("verify:hang:cpu 32x64 threads {threads}");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_swiglu-tune"));
    isolate(home.path(), |name, value| {
        command.env(name, value);
    });
    command.args(["--gpu", "cpu", "--quiet", "--watchdog", "4", "--shapes", &shapes, "--fault", &fault]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // It hangs at the first or a later candidate until the watchdog comes.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(children(child.id()).iter().filter(|worker| send("-KILL", worker)).count(), 1);
    assert!(child.wait().unwrap().success());
    let failed: Vec<Value> = records(&home).into_iter().filter(|record| record["outcome"] != "measured").collect();
    assert!(failed.len() == 1 && failed[0]["stage"] == "hang", "{failed:?}");
}

#[test]
fn a_shape_that_memory_cannot_hold_leaves_the_others_to_be_tuned() {
    let home = TempDir::new().unwrap();
    let path = home.path().join("shapes.toml");
    let large = "[[shape]]\nn = 1000000\nk = 1000000\nm = [1, 2, 3, 4]\n";
    std::fs::write(&path, format!("{large}[[shape]]\nn = 8\nk = 8\nm = [1]\n")).unwrap();
    let said =
        contains("take a smaller n, k or m").and(contains("1 problems tuned")).and(contains("4 problems could not"));
    tune(&home).args(["--gpu", "cpu", "--quiet", "--shapes"]).arg(&path).assert().code(1).stderr(said);
    assert!(!records(&home).is_empty());
}

#[test]
fn whoever_stops_reading_takes_nothing_from_the_run() {
    let home = TempDir::new().unwrap();
    let shapes = shapes(&home, "[1]");
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_swiglu-tune"));
        isolate(home.path(), |name, value| {
            command.env(name, value);
        });
        let mut child = command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (status, said) = run(&["--gpu", "cpu", "--quiet", "--shapes", &shapes]);
    assert!(status.success() && said.contains("1 problems tuned"), "{status} {said}");
    const SIGPIPE: i32 = 13;
    let (status, said) = run(&["report"]);
    assert_eq!((status.signal(), said.as_str()), (Some(SIGPIPE), ""));
}

#[test]
fn a_worker_that_cannot_be_started_is_named_with_the_cause() {
    let home = TempDir::new().unwrap();
    let mut command = Command::new("sh");
    isolate(home.path(), |name, value| {
        command.env(name, value);
    });
    let limited = format!("ulimit -n 8; exec {} --gpu cpu --model tiny", env!("CARGO_BIN_EXE_swiglu-tune"));
    let said = contains("the worker on the CPU").and(contains("os error 24"));
    command.args(["-c", &limited]).assert().code(1).stderr(said);
}

#[test]
fn ctrl_c_keeps_what_is_finished_and_a_second_tuner_is_told_who_holds_the_lock() {
    let home = TempDir::new().unwrap();
    let child = start(&home);
    wait_for_records(&home);
    let holder = contains(format!("is held by pid {} on ", child.id())).and(contains(" since 2"));
    tune(&home).args(["--gpu", "cpu", "--model", "tiny"]).assert().code(1).stderr(holder);
    assert!(send("-INT", &child.id().to_string()));
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(130), "{said}");
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
    // What was measured is asked of the index.
    let repaired = contains("rebuilding the index from the journal").and(contains("2 were tuned before"));
    tune(&home).args(["--gpu", "cpu", "--shapes", &shapes]).assert().success().stderr(repaired);
    let names = std::fs::read_dir(home.path().join("db")).unwrap().map(|entry| entry.unwrap().file_name());
    let kept = names.filter(|name| name.to_string_lossy().starts_with("index.sled.corrupt-")).count();
    assert_eq!((records(&home).len(), kept), (whole, 1), "what was damaged is kept");
    let again = contains("2 were tuned before").and(contains("rebuilding").not());
    tune(&home).args(["--gpu", "cpu", "--shapes", &shapes]).assert().success().stderr(again);
}
