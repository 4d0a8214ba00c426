//! The tables in `tuning-db/`, and their format.

use crate::fixture::{CLASS, failed, measured, problem, series, sorted};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use swiglu_db::record::winners;
use swiglu_db::shipped::{self, ShippedError, TABLES};
use swiglu_db::snapshot::Snapshot;
use swiglu_db::{Device, Match, Record, TuningTable};
use swiglu_kernels::families::{Family, Target, default_config};
use swiglu_kernels::{DType, arch};

fn h200() -> Device {
    Device { class: CLASS.into(), name: "NVIDIA H200".into() }
}

fn parse(text: &str) -> Result<Vec<Record>, ShippedError> {
    shipped::parse(Path::new("test.toml"), text)
}

/// A class begins with the architecture, or is `cpu-<model>-<threads>`.
fn target_of(class: &str) -> Target {
    match class.split('-').next() {
        Some("cpu") => Target::Cpu { threads: class.rsplit('-').next().unwrap().parse().unwrap() },
        arch => Target::Gpu(arch::by_name(arch.unwrap()).unwrap()),
    }
}

fn check(name: &str, text: &str) {
    let records = parse(text).unwrap_or_else(|error| panic!("{name}: {error}"));
    let device = records.first().unwrap_or_else(|| panic!("{name} has no record")).device.clone();
    for record in &records {
        let legal = record.config.check(&record.problem, target_of(&device.class));
        legal.unwrap_or_else(|why| panic!("{name}: {} with {}: {why}", record.key(), record.config));
    }
    assert!(shipped::export(&device, &records).unwrap() == text, "{name} is not as `swiglu-tune db export` writes it");
}

#[test]
fn every_shipped_table_is_compiled_in_readable_and_legal() {
    for (name, text) in TABLES {
        check(name, text);
    }
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tuning-db");
    let names = fs::read_dir(dir).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let in_dir: BTreeSet<_> = names.filter(|name| name.ends_with(".toml")).collect();
    let compiled: BTreeSet<_> = TABLES.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(in_dir, compiled, "left: files in tuning-db/, right: TABLES in shipped.rs");
}

/// Also where another op stands in at the M that were not tuned.
#[test]
fn what_a_plan_of_a_shipped_problem_takes_is_legal_and_its_own_wherever_it_was_tuned() {
    for (name, text) in TABLES {
        let records = parse(text).unwrap_or_else(|error| panic!("{name}: {error}"));
        let table = TuningTable::from_layers(vec![Snapshot::from_records(&records).unwrap()]);
        for record in &records {
            let (class, problem) = (&record.device.class, &record.problem);
            let target = target_of(class);
            let anchors = table.anchors(class, problem, target);
            let own = anchors.iter().find(|(m, _, _)| *m == problem.m);
            assert_eq!(
                own.map(|(_, of_m, matched)| (of_m.config, *matched)),
                Some((record.config, Match::Exact)),
                "{}",
                record.key()
            );
            for (m, of_m, _) in anchors {
                let legal = of_m.config.check(&problem.with_m(m), target);
                legal.unwrap_or_else(|why| panic!("{} at M {m}, {}: {why}", record.key(), of_m.config));
            }
        }
    }
}

/// Which kernel of fp32 is the fastest of ours depends on the op and on M: operands may be multiplied in parts.
#[test]
fn an_untuned_fp32_problem_takes_the_family_that_won_wherever_it_was_tuned() {
    let mut compared = 0;
    for (name, text) in TABLES {
        for record in parse(text).unwrap_or_else(|error| panic!("{name}: {error}")) {
            let Target::Gpu(arch) = target_of(&record.device.class) else { continue };
            let library = record.config.family() == Family::Cublaslt;
            let ours = if library { record.measurement().unwrap().stand_in } else { Some(record.config) };
            if record.problem.dtype != DType::F32
                || record.problem.product().is_none() && !record.problem.op.is_forward()
            {
                continue;
            }
            let default = default_config(&record.problem, arch).unwrap();
            assert_eq!(Some(default.family()), ours.map(|config| config.family()), "{name}: {}", record.key());
            compared += 1;
        }
    }
    assert!(compared >= 20, "{compared}");
}

#[test]
fn an_export_passes_the_check_of_shipped_tables() {
    let records: Vec<_> = (0..30).map(series).collect();
    check("export", &shipped::export(&h200(), &records).unwrap());
}

#[test]
fn a_table_without_one_readable_record_is_an_error() {
    let text = shipped::export(&h200(), &[series(0), series(1)]).unwrap().replace("samples = 50", "samples = 0");
    let error = shipped::read(Path::new("test.toml"), &text).unwrap_err();
    assert!(matches!(error, ShippedError::Rows { count: 2, all: 2, row: 1, .. }), "{error}");
    let one = text.replacen("samples = 0", "samples = 50", 1);
    let (records, unreadable) = shipped::read(Path::new("test.toml"), &one).unwrap();
    assert!(matches!(unreadable, Some(ShippedError::Rows { count: 1, row: 2, .. })), "{unreadable:?}");
    assert_eq!((records.len(), parse(&one).is_err()), (1, true));
}

#[test]
fn a_table_gives_back_the_winners_rounded() {
    let records: Vec<_> = (0..30).map(series).collect();
    let parsed = parse(&shipped::export(&h200(), &records).unwrap()).unwrap();
    let expected = sorted(winners(records));
    assert_eq!(parsed.len(), expected.len());
    for (parsed, expected) in parsed.iter().zip(&expected) {
        assert_eq!(
            (parsed.key(), parsed.config, &parsed.environment),
            (expected.key(), expected.config, &expected.environment)
        );
        let (parsed, expected) = (parsed.measurement().unwrap(), expected.measurement().unwrap());
        assert!((parsed.median_us - expected.median_us).abs() <= 0.0005, "{parsed:?} {expected:?}");
        assert_eq!(parsed.error, 1.23e-4);
    }
}

#[test]
fn a_table_reads_as_documented() {
    let other_class = measured("sm_80-x", problem(2, 64, 64), 1.0);
    let records = [measured(CLASS, problem(1, 1024, 4096), 12.345_678), failed(CLASS, problem(2, 64, 64)), other_class];
    let text = shipped::export(&h200(), &records).unwrap();
    let expected = r#"# Written by `swiglu-tune db export`; change it by tuning again.
schema = 1
device = { class = "sm_90a-sm132-l2_60m-smem227k-bus6144", name = "NVIDIA H200" }

[[record]]
problem = { op = "forward", activation = "silu", dtype = "bf16", weight_major = "k_major", alignment = 16, n = 1024, k = 4096, m = 1 }
config = { family = "wgmma_stream", "#;
    assert!(text.starts_with(expected), "{text}");
    let measurement =
        "measurement = { median_us = 12.346, p10_us = 12.222, p90_us = 12.469, samples = 50, error = 0.000123 }";
    assert!(text.contains(measurement), "{text}");
    assert_eq!(text.matches("[[record]]").count(), 1);
}

#[test]
fn what_is_no_table_is_an_error_that_names_the_file() {
    for text in ["", "schema = 1", "schema = \"1\"", "\u{0}", "schema = 1\ndevice = { class = \"a\" }"] {
        let error = parse(text).unwrap_err();
        assert!(error.to_string().starts_with("`test.toml` is no tuning table: "), "{error}");
    }
    let bad_class = "schema = 1\ndevice = { class = \"a\", name = \"\" }\nrecord = 3";
    assert!(matches!(parse(bad_class), Err(ShippedError::Parse { .. })));
    assert!(matches!(parse("schema = 2\nfuture = true"), Err(ShippedError::NewerSchema(_))));
    let text = shipped::export(&h200(), &[series(0)]).unwrap().replace("[[record]]", "[[records]]");
    let error = parse(&text).unwrap_err().to_string();
    assert!(error.starts_with("`test.toml` is no tuning table: ") && error.contains("`records`"), "{error}");
}
