//! What is wrong with a database or a table, as a user is told.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod home;

use home::{Home, SHIPPED, shipped_count};
use predicates::prelude::*;
use predicates::str::contains;
use std::fs;

const H200: &str = "sm_90a-sm132-l2_60m-smem227k-bus6016-mem3201mhz";
const WHY: [&str; 9] = ["why", "--m", "2048", "--n", "14336", "--k", "4096", "--device", H200];

/// The shipped table with one change in its first record.
fn table(home: &Home, from: &str, to: &str) -> String {
    let text = fs::read_to_string(SHIPPED).unwrap();
    assert!(text.contains(from), "{from}");
    home.write("table.toml", &text.replacen(from, to, 1))
}

#[test]
fn one_record_that_cannot_be_read_costs_an_import_no_other() {
    let first_time = "median_us = 8.908";
    for (from, to, reason) in [
        ("family = \"wgmma_gemm\"", "family = \"of_tomorrow\"", "unknown variant `of_tomorrow`"),
        (first_time, "median_us = nan", "measurement.median_us is NaN"),
        (first_time, "median_us = -8.908", "measurement.median_us is -8.908; a time must be above 0"),
    ] {
        let home = Home::new();
        let file = table(&home, from, to);
        let added = format!("{} added", shipped_count() - 1);
        let which = format!("{file}`: 1 of {} records cannot be read; the first is record 1: ", shipped_count());
        home.tune(&["db", "import", &file])
            .success()
            .stdout(contains(added))
            .stderr(contains(which).and(contains(reason)));
    }
}

#[test]
fn a_table_of_which_nothing_is_read_is_refused() {
    let home = Home::new();
    let text = fs::read_to_string(SHIPPED).unwrap();
    let misnamed = home.write("misnamed.toml", &text.replace("[[record]]", "[[records]]"));
    home.tune(&["db", "import", &misnamed]).code(1).stderr(contains("unknown field `records`"));
    let one = text.split("[[record]]").take(2).collect::<Vec<_>>().join("[[record]]");
    let absurd = home.write("absurd.toml", &one.replace("error = 0.00166", "error = 7.5"));
    home.tune(&["db", "import", &absurd])
        .code(1)
        .stderr(contains("absurd.toml`: 1 of 1 records").and(contains("measurement.error is 7.5")));
    assert!(!home.db().exists());
}

#[test]
fn the_journal_serves_where_the_snapshot_is_missing_and_a_rebuild_publishes_it() {
    let home = Home::new();
    home.tune(&["db", "import", SHIPPED]).success();
    let snapshot = home.db().join("snapshot.tsv");
    fs::remove_file(&snapshot).unwrap();
    let told = contains("snapshot.tsv` is missing; `swiglu-tune db rebuild`").and(contains("its journal answers"));
    home.tune(&WHY).success().stdout(contains("(user layer)")).stderr(told.and(contains("skipped").not()));
    home.tune(&["db", "rebuild"]).success();
    home.tune(&WHY).success().stdout(contains("(user layer)")).stderr("");
}

#[test]
fn a_newer_snapshot_is_not_overwritten() {
    let home = Home::new();
    home.tune(&["db", "import", SHIPPED]).success();
    let (snapshot, newer) = (home.db().join("snapshot.tsv"), "{\"schema\":7}\n");
    fs::write(&snapshot, newer).unwrap();
    for command in [&["db", "import", SHIPPED][..], &["db", "rebuild"], &["db", "gc"]] {
        home.tune(command).code(1).stderr(contains("has schema 7, this version reads up to 1; update swiglu-tune"));
        assert_eq!(fs::read_to_string(&snapshot).unwrap(), newer, "{command:?}");
    }
    home.tune(&WHY).success().stdout(contains("(user layer)")).stderr(contains("its journal answers"));
}

#[test]
fn a_database_that_cannot_be_read_is_not_one_in_which_nothing_is_tuned() {
    let home = Home::new();
    let file = home.write("file", "");
    let named = || contains(file.clone()).and(contains("Not a directory"));
    for command in [&["report"][..], &["db", "export"], &["db", "verify"], &["db", "rebuild"], &["db", "gc"]] {
        home.tune(&[command, &["--db", &file]].concat()).code(1).stderr(named());
    }
    home.tune(&["db", "merge", &file]).code(1).stderr(named());
    home.tune(&["report"]).success();
}

#[test]
fn a_record_says_where_it_was_measured() {
    let home = Home::new();
    for (layer, more) in [("shipped", &[][..]), ("override", &["--override", SHIPPED]), ("site", &["--site", SHIPPED])]
    {
        let told = contains(format!("({layer} layer); measured there, ")).and(contains("measured here").not());
        home.tune(&[&WHY, more].concat()).success().stdout(told);
    }
    home.tune_cpu("[1]").success();
    home.tune(&["why", "--m", "1", "--n", "48", "--k", "32", "--dtype", "f32"])
        .success()
        .stdout(contains("(user layer); measured here, "));
}
