//! Records that no tuner can have written.

use crate::fixture::{CLASS, failed, measured, problem};
use std::path::Path;
use swiglu_db::journal::{self, Journal};
use swiglu_db::{Measurement, Origin, Outcome, Record, Taken, TuningDb, shipped, verify};
use swiglu_kernels::problem::DType;

/// A record, changed.
fn changed(change: impl FnOnce(&mut Record, &mut Measurement)) -> Record {
    let mut record = measured(CLASS, problem(64, 1024, 4096), 10.0);
    let mut measurement = *record.measurement().unwrap();
    change(&mut record, &mut measurement);
    record.outcome = Outcome::Measured(measurement);
    record
}

/// Records with one field each that is impossible, and the name of it.
fn impossible() -> Vec<(&'static str, Record)> {
    let measured = |name, change: fn(&mut Measurement)| (name, changed(|_, measured| change(measured)));
    let of = |name, change: fn(&mut Record)| (name, changed(|record, _| change(record)));
    vec![
        measured("measurement.median_us", |it| it.median_us = 0.0),
        measured("measurement.median_us", |it| it.median_us = -1.0),
        measured("measurement.p10_us", |it| it.p10_us = -1.0),
        measured("measurement.median_us", |it| (it.p10_us, it.p90_us) = (11.0, 9.0)),
        measured("measurement.median_us", |it| it.p90_us = 9.95),
        measured("measurement.p90_us", |it| it.p90_us = f64::INFINITY),
        measured("measurement.error", |it| it.error = 7.5),
        measured("measurement.error", |it| it.error = -1e-3),
        measured("measurement.error", |it| it.error = f64::NAN),
        measured("measurement.samples", |it| it.samples = 0),
        measured("measurement.interval_us", |it| it.interval_us = Some([10.1, 9.9])),
        measured("measurement.interval_us", |it| it.interval_us = Some([0.0, 9.9])),
        of("problem.m", |it| it.problem.m = 0),
        of("problem.n", |it| it.problem.n = 0),
        of("problem.k", |it| it.problem.k = 0),
        of("problem.alignment", |it| it.problem.alignment = 3),
        of("problem.alignment", |it| it.problem.alignment = 32),
        of("environment.date", |it| it.environment.date = String::new()),
        of("environment.date", |it| it.environment.date = "yesterday".into()),
        of("environment.date", |it| it.environment.date = "2026-13-01T00:00:00Z".into()),
        of("environment.date", |it| it.environment.date = "2026-11-21T01:15:44+02:00".into()),
        of("environment.driver", |it| it.environment.driver = "\u{1b}[2J".into()),
        of("device.class", |it| it.device.class = "a\nb".into()),
        of("device.name", |it| it.device.name = "\u{1b}]0;title\u{7}".into()),
        of("origin", |it| it.origin = Origin::Merge("a\u{7}".into())),
    ]
}

#[test]
fn each_impossible_field_is_named_with_its_record() {
    for (field, record) in impossible() {
        let error = record.vet().unwrap_err();
        assert_eq!(error.field, field, "{error}");
        let text = error.to_string();
        assert!(
            text.contains(&record.key().to_string().escape_debug().to_string()) || field == "device.class",
            "{text}"
        );
        assert!(text.contains(field), "{text}");
    }
    changed(|_, _| {}).vet().unwrap();
}

#[test]
fn what_the_tuner_stores_passes() {
    for (name, text) in shipped::TABLES {
        shipped::parse(Path::new(name), text).unwrap();
    }
    failed(CLASS, problem(64, 1024, 4096)).vet().unwrap();
    let mut now = changed(|_, _| {});
    now.environment.date = "2026-11-22T23:30:22.660667304Z".into();
    now.vet().unwrap();
    // Half a unit in the last place is what rounding to a format may lose, and the tuner allows 1.1 times that.
    for (dtype, unit) in [(DType::Bf16, 2f64.powi(-8)), (DType::F16, 2f64.powi(-11)), (DType::F32, 2f64.powi(-24))] {
        let limit = dtype.tolerance().max(1.1 * unit);
        let at_the_limit = changed(|record, measured| {
            record.problem.dtype = dtype;
            measured.error = limit;
        });
        at_the_limit.vet().unwrap();
    }
}

#[test]
fn a_merge_refuses_them_and_takes_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let mut db = TuningDb::open(dir.path()).unwrap();
    for (field, record) in impossible() {
        let refused = Taken { refused: 1, ..Taken::default() };
        assert_eq!(db.take([record], &Origin::Merge("other".into())).unwrap(), refused, "{field}");
    }
    let sound = changed(|_, _| {});
    assert_eq!(db.take([sound], &Origin::Merge("other".into())).unwrap().added, 1);
}

#[test]
fn those_that_are_in_a_journal_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let stored = [changed(|_, measured| measured.error = 7.5), changed(|record, _| record.problem.m = 65)];
    Journal::open(&dir.path().join(journal::FILE_NAME)).unwrap().0.append(&stored).unwrap();
    TuningDb::open(dir.path()).unwrap();
    let findings: Vec<String> = verify(dir.path()).unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert!(
        findings[0].contains("|m0000000064 is invalid: measurement.error is 7.5; it must be from 0 to "),
        "{findings:?}"
    );
}
