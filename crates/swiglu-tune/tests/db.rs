//! `swiglu-tune db` as a user meets it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod home;

use home::{Home, SHIPPED, shipped_count};
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;
use std::fs;

#[test]
fn a_table_is_imported_served_exported_and_verified() {
    let (home, count) = (Home::new(), shipped_count());
    home.tune(&["db", "verify"]).code(1).stderr(contains("there is no tuning database").and(contains("--gpu auto")));
    assert!(!home.db().exists(), "a mistyped folder became a database");
    home.tune(&["db", "import", SHIPPED]).success().stdout(contains(format!("{count} added, 0 replaced")));
    home.tune(&["db", "import", SHIPPED])
        .success()
        .stdout(contains(format!("0 added, 0 replaced, {count} were no better")));
    home.tune(&["db", "verify"]).success().stdout("").stderr(contains("nothing is wrong"));
    let origin = r#"origin = { import = "nvidia-h200.toml" }"#;
    let exported = home.tune(&["db", "export"]).success().stdout(contains(origin));
    let text = String::from_utf8(exported.get_output().stdout.clone()).unwrap();
    let shipped = fs::read_to_string(SHIPPED).unwrap();
    assert!(text.replace(&format!("{origin}\n"), "") == shipped, "text in is not text out");
}

#[test]
fn a_class_that_had_two_names_is_exported_under_one() {
    let home = Home::new();
    let table = fs::read_to_string(SHIPPED).unwrap();
    let parts: Vec<&str> = table.split("[[record]]").collect();
    let name = r#"name = "NVIDIA H200""#;
    assert!(parts[0].contains(name));
    for (part, label) in [(1, name), (2, r#"name = "NVIDIA H200 as drivers call it today""#)] {
        let text = [&parts[0].replace(name, label), parts[part]].join("[[record]]");
        let file = home.write(&format!("{part}.toml"), &text);
        home.tune(&["db", "import", &file]).success().stdout(contains("1 added"));
    }
    let exported = home.tune(&["db", "export"]).success();
    let text = String::from_utf8(exported.get_output().stdout.clone()).unwrap();
    assert_eq!(text.matches("[[record]]").count(), 2, "{text}");
}

#[test]
fn what_cannot_be_imported_or_merged_is_named() {
    let home = Home::new();
    home.tune(&["db", "import", "/nowhere/a.toml"]).code(1).stderr(contains("/nowhere/a.toml"));
    home.tune(&["db", "merge", "/nowhere"]).code(1).stderr(contains("name the folder of a tuning database"));
    let newer = home.write("newer.toml", "schema = 9\n");
    home.tune(&["db", "import", &newer]).code(1).stderr(contains("has schema 9").and(contains("update swiglu-tune")));
    let garbage = home.write("garbage.toml", "\u{0}\u{1}");
    home.tune(&["db", "import", &garbage]).code(1).stderr(contains("is no tuning table"));
    let table = fs::read_to_string(SHIPPED).unwrap().replacen("stages = 6", "stages = 600", 1);
    let illegal = home.write("illegal.toml", &table);
    let added = format!("{} added", shipped_count() - 1);
    home.tune(&["db", "import", &illegal]).success().stdout(contains(added).and(contains("1 refused as illegal")));
}

#[test]
fn another_database_is_merged_and_says_so() {
    let (ours, theirs) = (Home::new(), Home::new());
    ours.tune_cpu("[1, 2]");
    theirs.tune_cpu("[2, 3]");
    let other = theirs.db().display().to_string();
    let before = fs::read_to_string(theirs.db().join("journal.jsonl")).unwrap();
    ours.tune(&["db", "merge", &other]).success().stdout(contains("added"));
    assert_eq!(fs::read_to_string(theirs.db().join("journal.jsonl")).unwrap(), before, "the other one is only read");
    ours.tune(&["report", "--json"]).success().stdout(contains(r#""merge": "db""#));
    ours.tune(&["db", "verify"]).success();
    // What another machine of this kind has measured is not measured again.
    let again = ours.tune_cpu("[1, 2, 3]");
    again.success().stderr(contains("0 problems tuned").and(contains("3 were tuned before")));
}

#[test]
fn damage_is_told_line_by_line_and_mended() {
    let home = Home::new();
    home.tune_cpu("[1, 2]");
    let journal = home.db().join("journal.jsonl");
    let text = fs::read_to_string(&journal).unwrap();
    fs::write(&journal, text.replacen("measured", "neasured", 1)).unwrap();
    home.tune(&["db", "verify"])
        .code(1)
        .stdout(contains("journal.jsonl: line 2 is damaged").and(contains("index.sled: ")));
    home.tune(&["db", "rebuild"]).success().stdout(contains("the old index is ")).stderr(contains("moved out"));
    home.tune(&["db", "verify"]).success();
    assert!(fs::read_to_string(home.db().join("journal.damaged")).unwrap().contains("neasured"));
    home.tune(&["db", "gc"]).success().stdout(contains("0 superseded records dropped"));
}

#[test]
fn a_newer_journal_is_left_alone_by_every_command() {
    let home = Home::new();
    home.tune_cpu("[1]");
    let header = r#"{"schema":2}"#;
    let newer = format!("{{\"crc32\":\"{:08x}\",\"header\":{header}}}\n", crc32fast::hash(header.as_bytes()));
    let journal = home.db().join("journal.jsonl");
    fs::write(&journal, &newer).unwrap();
    let other = home.db().display().to_string();
    for command in [&["db", "verify"][..], &["db", "rebuild"], &["db", "gc"], &["db", "import", SHIPPED], &["report"]] {
        home.tune(command).code(1).stderr(contains("has schema 2, this version reads up to 1; update swiglu-tune"));
    }
    Home::new().tune(&["db", "merge", &other]).code(1).stderr(contains("has schema 2"));
    assert_eq!(fs::read_to_string(&journal).unwrap(), newer);
}

fn journal_line(kind: &str, json: &str) -> String {
    format!("{{\"crc32\":\"{:08x}\",\"{kind}\":{json}}}\n", crc32fast::hash(json.as_bytes()))
}

#[test]
fn a_journal_of_an_older_schema_is_read_and_tuned_on() {
    let home = Home::new();
    home.tune_cpu("[1]").success();
    let all: Value = serde_json::from_str(&home.stdout(&["report", "--json"])).unwrap();
    let mut old = journal_line("header", r#"{"format":"swiglu-tune journal","schema":0}"#);
    for record in all["records"].as_array().unwrap() {
        let mut record = record.clone();
        for name in ["interval_us", "repeated", "chosen", "origin"] {
            record.as_object_mut().unwrap().remove(name);
        }
        old += &journal_line("record", &record.to_string());
    }
    let other = Home::new();
    fs::create_dir_all(other.db()).unwrap();
    fs::write(other.db().join("journal.jsonl"), &old).unwrap();
    other.tune_cpu("[1, 2]").success().stderr(contains("1 problems tuned").and(contains("1 were tuned before")));
    let now: Value = serde_json::from_str(&other.stdout(&["report", "--json"])).unwrap();
    assert_eq!(now["records"].as_array().unwrap().len(), 2 * all["records"].as_array().unwrap().len());
    other.tune(&["db", "verify"]).success();
}

#[test]
fn tuners_refuse_a_newer_schema_and_readers_do_without_that_layer() {
    let home = Home::new();
    let newer = journal_line("header", r#"{"schema":2}"#);
    fs::create_dir_all(home.db()).unwrap();
    fs::write(home.db().join("journal.jsonl"), &newer).unwrap();
    let snapshot = "{\"schema\":7,\"more\":true}\n";
    fs::write(home.db().join("snapshot.tsv"), snapshot).unwrap();
    home.tune_cpu("[1]").code(1).stderr(contains("has schema 2, this version reads up to 1; update swiglu-tune"));
    assert_eq!(fs::read_to_string(home.db().join("journal.jsonl")).unwrap(), newer);
    assert_eq!(fs::read_to_string(home.db().join("snapshot.tsv")).unwrap(), snapshot);
    let site = Home::new();
    fs::create_dir_all(site.db()).unwrap();
    fs::write(site.db().join("snapshot.tsv"), snapshot).unwrap();
    let h200 = "sm_90a-sm132-l2_60m-smem227k-bus6016-mem3201mhz";
    let why = ["why", "--device", h200, "--site", &site.db().display().to_string()];
    Home::new()
        .tune(&why)
        .success()
        .stderr(contains("has schema 7, this version reads up to 1"))
        .stdout(contains("shipped layer"));
}

/// A database that may be read and not written, as on a mounted image: what needs no writing works.
#[cfg(target_os = "linux")]
#[test]
fn a_database_on_a_read_only_disk_serves_and_is_not_tuned() {
    let home = Home::new();
    home.tune_cpu("[1]").success();
    let tuner = assert_cmd::cargo::cargo_bin("swiglu-tune");
    let on_read_only = |args: &str| {
        let script = format!(
            "mount --bind {db} {db} && mount -o remount,ro,bind {db} && exec {tuner} {args}",
            db = home.db().display(),
            tuner = tuner.display()
        );
        let mut command = assert_cmd::Command::new("unshare");
        command.args(["-rm", "sh", "-c", &script]).env("HOME", home.path()).env("SWIGLU_DB", home.db());
        command.assert()
    };
    if !std::process::Command::new("unshare").args(["-rm", "true"]).status().is_ok_and(|status| status.success()) {
        return; // this system lets nobody mount anything
    }
    on_read_only("report").success().stdout(contains("cpu "));
    let shapes = home.shapes("[1, 2]");
    on_read_only(&format!("--gpu cpu --shapes {shapes}"))
        .code(1)
        .stderr(contains("Read-only file system").and(contains("choose another directory")));
}

#[test]
fn a_database_of_another_gpu_is_kept_and_named() {
    let home = Home::new();
    home.tune(&["db", "import", SHIPPED]).success();
    let whose = contains("its records are of other devices (NVIDIA H200), none is of this one (cpu-");
    home.tune_cpu("[1]").success().stderr(whose);
    home.tune(&["db", "export"]).code(1).stderr(contains("several devices are tuned; choose one with --device CLASS"));
    home.tune(&["report"]).success().stdout(contains("NVIDIA H200").and(contains("cpu ")));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_and_a_read_only_home_are_said_in_one_sentence() {
    let home = Home::new();
    fs::create_dir_all(home.db()).unwrap();
    std::os::unix::fs::symlink("/dev/full", home.db().join("journal.jsonl.tmp")).unwrap();
    let shapes = home.shapes("[1]");
    home.tune(&["--gpu", "cpu", "--shapes", &shapes])
        .code(1)
        .stderr(contains("No space left on device").and(contains("free some space and run again")));
    // Not even root creates files below /sys.
    home.tune(&["--gpu", "cpu", "--shapes", &shapes, "--db", "/sys/swiglu-tune"])
        .code(1)
        .stderr(contains("cannot create the directory `/sys/swiglu-tune`").and(contains("check its owner and mode")));
}
