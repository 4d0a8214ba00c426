//! `swiglu-tune why`, the completions, the manual pages and the log.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod home;

use home::{Home, SHIPPED, shipped_count};
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;

const H200: &str = "sm_90a-sm132-l2_60m-smem227k-bus6016-mem3201mhz";

fn why(home: &Home, sizes: [&str; 3], more: &[&str]) -> String {
    let [m, n, k] = sizes;
    home.stdout(&[&["why", "--m", m, "--n", n, "--k", k], more].concat())
}

/// The line of the ladder that serves.
fn serving(text: &str) -> &str {
    let marked: Vec<&str> = text.lines().filter(|line| line.contains("=>")).collect();
    assert_eq!(marked.len(), 1, "{text}");
    marked[0]
}

#[test]
fn every_rung_of_the_ladder_is_explained() {
    let home = Home::new();
    let on_h200 = ["--device", H200];
    let exact = why(&home, ["2048", "14336", "4096"], &on_h200);
    assert!(serving(&exact).contains("exact") && serving(&exact).contains("shipped"), "{exact}");
    assert!(exact.contains("next on the ladder: ") && exact.contains("in a prepared plan: "), "{exact}");
    let near = why(&home, ["300", "14336", "4096"], &on_h200);
    assert!(serving(&near).contains("nearest M") && near.contains("the kernel of its anchor M "), "{near}");
    let shape = why(&home, ["2048", "14000", "4096"], &on_h200);
    assert!(serving(&shape).contains("nearest shape"), "{shape}");
    let class = why(&home, ["2048", "14336", "4096"], &["--device", "sm_90a-sm114"]);
    assert!(serving(&class).contains("same architecture"), "{class}");
    let none = why(&home, ["2048", "14336", "4096"], &["--device", "sm_80-sm108"]);
    assert!(serving(&none).contains("default") && none.contains("untuned: "), "{none}");
    let narrow = why(&home, ["2048", "14335", "4096"], &on_h200);
    assert!(narrow.contains("passed over, not legal here"), "{narrow}");
    home.tune(&["db", "import", SHIPPED]).success();
    let user = why(&home, ["2048", "14336", "4096"], &on_h200);
    assert!(serving(&user).contains("user") && user.contains("imported from nvidia-h200.toml"), "{user}");
    home.tune(&["why", "--device", "abacus"]).code(1).stderr(contains("`abacus` names no device known here"));
}

#[test]
fn an_op_that_was_not_tuned_and_the_layers_above_the_shipped_one_are_explained() {
    let home = Home::new();
    let on_h200 = ["--device", H200];
    let saving = why(&home, ["1024", "14336", "4096"], &["--op", "forward_save", "--device", H200]);
    assert!(serving(&saving).contains("nearest M") && serving(&saving).contains("shipped"), "{saving}");
    let plain = saving.lines().find(|line| line.contains("other op") && line.contains("shipped")).unwrap();
    assert!(plain.contains("forward, M 1024"), "{saving}");
    assert!(saving.contains("its anchor M 1024 (other op)"), "{saving}");
    for layer in ["override", "site"] {
        let text = why(&home, ["2048", "14336", "4096"], &[&on_h200[..], &[&format!("--{layer}"), SHIPPED]].concat());
        assert!(serving(&text).contains(layer), "{text}");
    }
    // Its status tells whether this machine has a GPU.
    let doctor = |table: &str| {
        let output = home.command().args(["doctor", "--override", table]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let text = doctor(SHIPPED);
    let count = shipped_count();
    let (over, shipped) = (format!("override {count} at "), format!("shipped {count}; then the model"));
    assert!(text.contains(&over) && text.contains(&shipped), "{text}");
    let text = doctor("/nowhere.toml");
    assert!(text.contains("the override layer `/nowhere.toml` is not there"), "{text}");
}

#[test]
fn what_came_second_is_told_with_its_distance() {
    let home = Home::new();
    home.tune_cpu("[1, 4]").success();
    let text = why(&home, ["4", "48", "32"], &["--dtype", "f32", "--device", &cpu_class(&home)]);
    assert!(serving(&text).contains("exact") && serving(&text).contains("user"), "{text}");
    let second = text.lines().find(|line| line.starts_with("second in time: cpu ")).unwrap();
    assert!(second.contains(" us in ") && second.ends_with(" %"), "{second}");
    assert!(text.contains("untuned default: ") && text.contains("0.25 times the M"), "{text}");
}

fn cpu_class(home: &Home) -> String {
    let value: Value = serde_json::from_str(&home.stdout(&["report", "--json"])).unwrap();
    value["records"][0]["device"]["class"].as_str().unwrap().to_owned()
}

#[test]
fn completions_and_manual_pages_name_every_command() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        home.tune(&["completions", shell]).success().stdout(contains("swiglu-tune").and(contains("verify")));
    }
    home.tune(&["completions", "cmd"]).code(2);
    home.tune(&["man"]).success().stdout(contains(".TH").and(contains("SUBCOMMANDS")));
    let dir = home.path().join("man").display().to_string();
    home.tune(&["man", "--dir", &dir]).success();
    for page in ["swiglu-tune.1", "swiglu-tune-report.1", "swiglu-tune-db-merge.1"] {
        assert!(home.path().join("man").join(page).exists(), "{page}");
    }
    home.tune(&["man", "--dir", "/dev/null/man"]).code(1).stderr(contains("/dev/null/man"));
}

#[test]
fn the_log_is_json_when_asked_for() {
    let home = Home::new();
    home.tune_cpu("[1]").success();
    std::fs::write(home.db().join("snapshot.tsv"), "garbage").unwrap();
    let output = home.command().args(["--log", "json", "why", "--device", "abacus"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let levels: Vec<&str> = lines.iter().map(|line| line["level"].as_str().unwrap()).collect();
    assert_eq!(levels, ["WARN", "ERROR"], "{text}");
    assert!(lines[1]["fields"]["message"].as_str().unwrap().contains("abacus") && lines[1]["timestamp"].is_string());
    let shapes = home.shapes("[1]");
    let output = home.command().args(["--log", "json", "--gpu", "cpu", "--shapes", &shapes]).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert!(last["fields"]["message"].as_str().unwrap().contains("1 were tuned before"), "{text}");
    home.tune(&["--log", "xml", "report"]).code(2);
}
