//! What becomes of records that come from elsewhere.

use crate::fixture::{CLASS, default_of, measured, problem, target};
use swiglu_db::record::winners;
use swiglu_db::{Measurement, Origin, Outcome, Record, Taken, TuningDb, journal, shipped};
use swiglu_kernels::families::candidates;
use tempfile::TempDir;

/// A measurement of candidate `config` of one problem.
fn sampled(config: usize, median_us: f64, samples: u32, date: &str) -> Record {
    let problem = problem(64, 1024, 4096);
    let mut record = measured(CLASS, problem, median_us);
    record.config = candidates(&problem, target())[config];
    record.outcome = Outcome::Measured(Measurement { samples, ..*record.measurement().unwrap() });
    record.environment.date = date.into();
    record
}

fn failed(stage: &str) -> Record {
    let outcome = Outcome::Failed { stage: stage.into(), reason: "why".into() };
    Record { outcome, ..sampled(0, 1.0, 1, "2030-01-01T00:00:00Z") }
}

fn db(records: &[Record]) -> (TempDir, TuningDb) {
    let dir = tempfile::tempdir().unwrap();
    let mut db = TuningDb::open(dir.path()).unwrap();
    db.insert(records).unwrap();
    (dir, db)
}

fn merge() -> Origin {
    Origin::Merge("other".into())
}

#[test]
fn of_one_config_the_better_supported_record_stays_and_nothing_is_deleted() {
    let ours = sampled(0, 10.0, 20, "2026-01-02T00:00:00Z");
    let [more_samples, later, equal, fewer, earlier] = [
        sampled(0, 11.0, 40, "2026-01-01T00:00:00Z"),
        sampled(0, 11.0, 20, "2026-01-03T00:00:00Z"),
        sampled(0, 9.0, 20, "2026-01-02T00:00:00Z"),
        sampled(0, 9.0, 19, "2026-01-03T00:00:00Z"),
        sampled(0, 9.0, 20, "2026-01-01T00:00:00Z"),
    ];
    let replaces = [(more_samples, true), (later, true), (failed("verify"), true)];
    let stays = [(equal, false), (fewer, false), (earlier, false), (failed("compile"), false)];
    for (theirs, better) in replaces.into_iter().chain(stays) {
        let (dir, mut db) = db(std::slice::from_ref(&ours));
        let taken = db.take([theirs.clone()], &merge()).unwrap();
        let expected = if better { Record { origin: merge(), ..theirs.clone() } } else { ours.clone() };
        assert_eq!(db.records().unwrap(), [expected], "{theirs:?}");
        assert_eq!((taken.replaced, taken.kept), if better { (1, 0) } else { (0, 1) }, "{theirs:?}");
        let written = journal::read(&dir.path().join(journal::FILE_NAME)).unwrap().records;
        assert_eq!(written[0], ours, "the journal keeps what was measured here");
    }
}

#[test]
fn the_order_of_merging_does_not_matter() {
    let all = [
        sampled(0, 10.0, 20, "2026-01-01T00:00:00Z"),
        sampled(1, 8.0, 40, "2026-01-02T00:00:00Z"),
        sampled(0, 7.0, 30, "2026-01-03T00:00:00Z"),
        failed("verify"),
    ];
    let mut results = Vec::new();
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]] {
        let (_dir, mut db) = db(&[]);
        db.take(order.map(|at: usize| all[at].clone()), &merge()).unwrap();
        results.push(db.records().unwrap());
    }
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0], results[2]);
}

#[test]
fn between_origins_the_better_supported_winner_serves_not_the_faster() {
    let ours = sampled(0, 10.0, 40, "2026-01-02T00:00:00Z");
    let weak = sampled(1, 5.0, 8, "2026-01-03T00:00:00Z");
    let strong = sampled(1, 12.0, 41, "2026-01-01T00:00:00Z");
    for (theirs, serves) in [(weak, 0), (strong, 1)] {
        let (_dir, mut db) = db(std::slice::from_ref(&ours));
        db.take([theirs.clone()], &merge()).unwrap();
        let expected = [ours.clone(), Record { origin: merge(), ..theirs }];
        assert_eq!(db.winners().unwrap(), [expected[serves].clone()]);
        assert_eq!(db.best(&ours.key()).unwrap(), Some(expected[serves].clone()));
        assert_eq!(db.records().unwrap().len(), 2);
    }
    let equal = Record { origin: merge(), ..sampled(1, 5.0, 40, "2026-01-02T00:00:00Z") };
    assert_eq!(winners([equal, ours.clone()]), [ours]);
}

#[test]
fn merging_twice_or_with_oneself_takes_nothing() {
    let records = [
        sampled(0, 10.0, 40, "2026-01-01T00:00:00Z"),
        sampled(1, 12.0, 8, "2026-01-02T00:00:00Z"),
        Record { config: sampled(2, 1.0, 1, "").config, ..failed("launch") },
    ];
    let (_ours, mut with_oneself) = db(&records);
    let (_theirs, mut twice) = db(&[]);
    assert_eq!(twice.take(records.clone(), &merge()).unwrap(), Taken { added: 3, ..Taken::default() });
    for db in [&mut with_oneself, &mut twice] {
        let before = db.records().unwrap();
        assert_eq!(before.len(), 3);
        // A failure of what was measured here says nothing new either.
        let refuted = failed("launch");
        let again = records.iter().cloned().chain([refuted]);
        assert_eq!(db.take(again, &merge()).unwrap(), Taken { kept: 4, ..Taken::default() });
        assert_eq!(db.records().unwrap(), before);
    }
}

#[test]
fn a_failure_elsewhere_is_tried_here_and_a_measurement_is_not() {
    let (failed, timed) = (failed("compile"), sampled(1, 5.0, 40, "2026-01-01T00:00:00Z"));
    let (_dir, mut db) = db(&[]);
    db.take([failed.clone(), timed.clone()], &merge()).unwrap();
    let is_measured = |db: &TuningDb, record: &Record| db.is_measured(&record.key(), &record.config, "a1b2").unwrap();
    assert!(!is_measured(&db, &failed) && is_measured(&db, &timed));
    db.insert(std::slice::from_ref(&failed)).unwrap();
    assert!(is_measured(&db, &failed));
}

#[test]
fn an_imported_table_says_where_it_is_from_and_exports_again() {
    let text = shipped::TABLES[0].1;
    let records = shipped::parse(std::path::Path::new("h200.toml"), text).unwrap();
    let (count, device) = (records.len(), records[0].device.clone());
    let (_dir, mut db) = db(&[]);
    let origin = Origin::Import("h200.toml".into());
    assert_eq!(db.take(records.clone(), &origin).unwrap(), Taken { added: count, ..Taken::default() });
    let winners = db.winners().unwrap();
    assert!(winners.iter().all(|record| record.origin == origin));
    let exported = shipped::export(&device, &winners).unwrap();
    assert!(exported.contains(r#"origin = { import = "h200.toml" }"#), "{exported}");
    let again = shipped::parse(std::path::Path::new("again.toml"), &exported).unwrap();
    assert_eq!(again, winners);
    // Where a record was measured is not forgotten on its next journey.
    assert_eq!(db.take(again, &merge()).unwrap().kept, count);
    assert_eq!(origin.to_string(), "imported from h200.toml");
}

#[test]
fn an_illegal_config_is_refused_and_an_unknown_device_is_not() {
    let (_dir, mut db) = db(&[]);
    let mut illegal = measured(CLASS, problem(64, 1024, 4096), 1.0);
    illegal.config = default_of(&problem(64, 1024, 4096));
    illegal.problem.alignment = 2;
    let unknown = measured("sm_999-sm1", problem(64, 1024, 4096), 1.0);
    let taken = db.take([illegal, unknown], &merge()).unwrap();
    assert_eq!(taken, Taken { added: 1, refused: 1, ..Taken::default() });
}
