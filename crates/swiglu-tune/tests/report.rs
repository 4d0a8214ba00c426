//! `swiglu-tune report` in all its forms.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod home;

use home::{Home, SHIPPED, shipped_count};
use predicates::prelude::*;
use predicates::str::contains;
use roxmltree::{Document, Node, ParsingOptions};
use serde_json::Value;
use std::fs;

const BENCH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/results/2026-11-21-h200-forward-b.json");

fn records(home: &Home) -> Vec<Value> {
    let value: Value = serde_json::from_str(&home.stdout(&["report", "--json"])).unwrap();
    value["records"].as_array().unwrap().clone()
}

fn page(home: &Home, more: &[&str]) -> String {
    let path = home.path().join("report.html").display().to_string();
    home.tune(&[&["report", "--html", &path], more].concat()).success().stdout(contains("report.html"));
    fs::read_to_string(path).unwrap()
}

fn parse(page: &str) -> Document<'_> {
    let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
    Document::parse_with_options(page, options).unwrap_or_else(|error| panic!("{error}"))
}

/// The rows of all tables of one class, as the text of their cells.
fn rows(document: &Document<'_>, class: &str) -> Vec<Vec<String>> {
    let text = |node: Node<'_, '_>| -> String {
        node.descendants().filter(|node| node.is_text()).filter_map(|node| node.text()).collect()
    };
    let tables = document.descendants().filter(|node| node.attribute("class") == Some(class));
    tables
        .flat_map(|table| table.descendants().filter(|node| node.has_tag_name("tr")).collect::<Vec<_>>())
        .map(|row| row.children().filter(|node| node.has_tag_name("td")).map(text).collect::<Vec<_>>())
        .filter(|cells| !cells.is_empty())
        .collect()
}

#[test]
fn the_page_is_well_formed_loads_nothing_and_has_every_record() {
    let home = Home::new();
    home.tune_cpu("[1, 2, 5]").success();
    let page = page(&home, &[]);
    let document = parse(&page);
    for node in document.descendants() {
        assert!(!["link", "img", "iframe"].contains(&node.tag_name().name()), "{}", node.tag_name().name());
        assert!(node.attribute("src").is_none() && node.attribute("href").is_none());
    }
    assert!(!page.contains("@import") && !page.contains("url("), "a style sheet loads something");
    assert!(page.contains("prefers-color-scheme: dark") && page.contains("width=device-width"));
    assert_eq!(rows(&document, "winners").len(), 3);
    assert_eq!(rows(&document, "candidates").len(), records(&home).len());
    let plots: Vec<_> = document.descendants().filter(|node| node.has_tag_name("figcaption")).collect();
    let has_plot = |words: &str| plots.iter().any(|plot| plot.text().unwrap().contains(words));
    assert!(has_plot("Speed against M: K 32, N 48") && has_plot("Untuned default") && has_plot("Candidates by"));
    assert!(!has_plot("cuBLASLt"), "no peer was measured");
    for heading in ["Ties", "Where tuning did not help", "Stale", "Candidates without a time"] {
        assert!(page.contains(&format!("<h3>{heading}</h3>")), "{heading}");
    }
}

#[test]
fn a_gpu_is_reported_with_its_peer_and_roofline_where_there_is_no_gpu() {
    let home = Home::new();
    home.tune(&["db", "import", SHIPPED]).success();
    let page = page(&home, &["--bench", BENCH, "--peak-tflops", "989"]);
    let document = parse(&page);
    assert_eq!(rows(&document, "winners").len(), shipped_count());
    let with_peer = rows(&document, "winners").iter().filter(|row| row[13] != "-").count();
    assert_eq!(with_peer, 15, "the five shapes of the bench at three M");
    for words in ["Speedup over cuBLASLt", "GEMM alone", ">roofline<", "imported from nvidia-h200.toml"] {
        assert!(page.contains(words), "{words}");
    }
    home.tune(&["report"]).success().stdout(contains("% of bytes"));
    home.tune(&["report", "--markdown", "--bench", BENCH])
        .success()
        .stdout(contains("# What was tuned").and(contains("## NVIDIA H200")).and(contains("| 8192")));
    let not_a_bench = home.write("other.json", "[]");
    home.tune(&["report", "--html", "/dev/null", "--bench", &not_a_bench])
        .code(1)
        .stderr(contains("other.json is no result of `swiglu-tune bench --json`"));
}

#[test]
fn names_and_reasons_are_escaped_everywhere() {
    let home = Home::new();
    let name = r#"<script>alert("1")</script> & | x, y"#;
    let table = fs::read_to_string(SHIPPED).unwrap();
    let table = table.replacen(r#"name = "NVIDIA H200""#, &format!("name = '{name}'"), 1);
    let file = home.write("a <b> & c.toml", &table);
    home.tune(&["db", "import", &file]).success();
    let page = page(&home, &[]);
    assert!(!page.contains("<script>alert") && !page.contains("a <b>"));
    let document = parse(&page);
    assert!(document.descendants().any(|node| node.text() == Some(name)), "the name reads as it is");
    let csv = home.stdout(&["report", "--csv"]);
    let mut sheet = csv::Reader::from_reader(csv.as_bytes());
    let lines: Vec<csv::StringRecord> = sheet.records().map(Result::unwrap).collect();
    assert!(lines.len() == shipped_count() && lines.iter().all(|line| &line[1] == name && &line[11] == "true"));
    home.tune(&["report", "--markdown"]).success().stdout(contains("<script>").not());
}

#[test]
fn the_sheet_has_every_record_and_says_which_serve() {
    let home = Home::new();
    home.tune_cpu("[1, 4]").success();
    let csv = home.stdout(&["report", "--csv"]);
    let mut sheet = csv::Reader::from_reader(csv.as_bytes());
    let serves = sheet.headers().unwrap().iter().position(|name| name == "serves").unwrap();
    let lines: Vec<csv::StringRecord> = sheet.records().map(Result::unwrap).collect();
    assert_eq!(lines.len(), records(&home).len());
    assert_eq!(lines.iter().filter(|line| &line[serves] == "true").count(), 2);
}

#[test]
fn an_empty_database_and_a_bad_path_are_said() {
    let home = Home::new();
    let page = page(&home, &[]);
    parse(&page);
    assert!(page.contains("Nothing is tuned"));
    home.tune(&["report", "--html", "/nowhere/report.html"]).code(1).stderr(contains("/nowhere/report.html"));
    home.tune(&["report", "--csv", "--json"]).code(2);
}

#[test]
fn nothing_tuned_is_said_in_every_format() {
    let home = Home::new();
    for format in [&[][..], &["--json"], &["--csv"], &["--markdown"]] {
        home.tune(&[&["report"], format].concat()).success().stderr(contains("nothing is tuned in"));
    }
    assert!(records(&home).is_empty(), "what is printed stays JSON");
}

#[test]
fn a_peak_is_a_number_above_zero() {
    let home = Home::new();
    for peak in ["0", "-1", "nan", "inf", "many"] {
        home.tune(&["report", &format!("--peak-tflops={peak}")]).code(2).stderr(contains("give a number above 0"));
    }
    home.tune(&["report", "--peak-tflops", "989.5"]).success();
}

#[test]
fn a_report_is_of_the_sizes_that_are_named() {
    let home = Home::new();
    home.tune(&["db", "import", SHIPPED]).success();
    let sizes = |args: &[&str]| -> Vec<(u64, u64)> {
        let text = home.stdout(&[&["report", "--json"], args].concat());
        let value: Value = serde_json::from_str(&text).unwrap();
        let size = |record: &Value, name: &str| record["problem"][name].as_u64().unwrap();
        value["records"].as_array().unwrap().iter().map(|record| (size(record, "n"), size(record, "k"))).collect()
    };
    let llama = sizes(&["--n", "8192", "--k", "2048"]);
    assert!(!llama.is_empty() && llama.iter().all(|size| *size == (8192, 2048)));
    let two = sizes(&["--n", "8192,14336"]);
    assert!(two.len() > llama.len() && two.len() < shipped_count() && two.iter().any(|size| size.0 == 14336));
    let markdown = home.stdout(&["report", "--markdown", "--n", "8192", "--k", "2048"]);
    let rows = markdown.lines().filter(|line| line.starts_with("| ")).count() - 1;
    assert_eq!(rows, llama.len());
    home.tune(&["report", "--k", "7"]).success().stderr(contains("--n and --k")).stdout("");
}
