//! The writer's database.

use crate::fixture::{CLASS, default_of, failed, measured, problem, series, sorted, target};
use std::fs;
use std::path::Path;
use swiglu_db::journal::{self, JournalError};
use swiglu_db::snapshot::{self, Snapshot, SnapshotError};
use swiglu_db::{DbError, Environment, FileError, LockError, Record, TuningDb};
use swiglu_kernels::families::candidates;

#[test]
fn records_are_there_at_once_and_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let records: Vec<_> = (0..30).map(series).collect();
    let mut db = TuningDb::open(dir.path()).unwrap();
    for batch in records.chunks(4) {
        db.insert(batch).unwrap();
    }
    assert_eq!(db.records().unwrap(), sorted(records.clone()));
    drop(db);
    let db = TuningDb::open(dir.path()).unwrap();
    assert_eq!(db.records().unwrap(), sorted(records.clone()));
    for record in records {
        assert_eq!(db.record(&record.key(), &record.config).unwrap(), Some(record));
    }
    assert_eq!(moved_aside(dir.path()), 0);
}

#[test]
fn the_best_of_a_key_ignores_failures_and_other_keys() {
    let dir = tempfile::tempdir().unwrap();
    let mut db = TuningDb::open(dir.path()).unwrap();
    let (asked, other) = (problem(16, 1024, 1024), problem(161, 1024, 1024));
    let configs = candidates(&asked, target());
    let at = |config: usize, us| Record { config: configs[config], ..measured(CLASS, asked, us) };
    db.insert(&[at(0, 7.0), at(1, 5.0), at(2, 6.0), measured(CLASS, other, 1.0)]).unwrap();
    let broken = Record { config: configs[3], ..failed(CLASS, asked) };
    db.insert(&[broken]).unwrap();
    assert_eq!(db.best(&at(0, 0.0).key()).unwrap(), Some(at(1, 5.0)));
    assert_eq!(db.winners().unwrap(), [at(1, 5.0), measured(CLASS, other, 1.0)]);
    assert_eq!(db.best(&measured(CLASS, problem(1, 64, 64), 0.0).key()).unwrap(), None);
}

#[test]
fn the_later_record_of_a_config_replaces_the_earlier() {
    let dir = tempfile::tempdir().unwrap();
    let mut db = TuningDb::open(dir.path()).unwrap();
    let [first, second, third] = [3.0, 2.0, 4.0].map(|us| measured(CLASS, problem(1, 64, 64), us));
    db.insert(&[first, second]).unwrap();
    db.insert(std::slice::from_ref(&third)).unwrap();
    assert_eq!(db.records().unwrap(), std::slice::from_ref(&third));
    drop(db);
    assert_eq!(TuningDb::open(dir.path()).unwrap().records().unwrap(), [third]);
    assert_eq!(moved_aside(dir.path()), 0);
}

#[test]
fn a_second_run_measures_only_what_is_missing_or_has_changed() {
    let dir = tempfile::tempdir().unwrap();
    let mut db = TuningDb::open(dir.path()).unwrap();
    for record in [measured(CLASS, problem(1, 64, 64), 1.0), failed(CLASS, problem(2, 64, 64))] {
        let (key, config) = (record.key(), record.config);
        assert!(!db.is_measured(&key, &config, "a1b2").unwrap());
        db.insert(&[record]).unwrap();
        assert!(db.is_measured(&key, &config, "a1b2").unwrap());
        assert!(!db.is_measured(&key, &config, "c3d4").unwrap());
    }
    // On the CPU there is no source.
    let environment = Environment::default();
    let cpu = Record { environment, ..measured("cpu-x-8", problem(1, 64, 64), 1.0) };
    let key = cpu.key();
    db.insert(&[cpu]).unwrap();
    assert!(db.is_measured(&key, &default_of(&problem(1, 64, 64)), "").unwrap());
}

#[test]
fn a_second_tuner_is_told_who_holds_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let _first = TuningDb::open(dir.path()).unwrap();
    let error = TuningDb::open(dir.path()).unwrap_err();
    let DbError::Lock(LockError::Held { holder: Some(holder), .. }) = &error else { panic!("{error}") };
    assert_eq!(holder.pid, std::process::id());
    assert!(holder.since.ends_with('Z') && !holder.host.is_empty(), "{holder}");
    assert!(error.to_string().contains(&format!("is held by pid {} on ", holder.pid)), "{error}");
}

#[test]
fn a_directory_that_cannot_be_made_is_named_with_the_remedy() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let dir = file.path().join("below");
    let error = TuningDb::open(&dir).unwrap_err();
    assert!(matches!(&error, DbError::File(FileError { path, .. }) if *path == dir), "{error}");
    let text = error.to_string();
    assert!(text.contains(dir.to_str().unwrap()) && text.contains("choose another directory"), "{text}");
}

#[test]
fn a_newer_journal_stops_the_tuner_before_it_changes_anything() {
    let dir = tempfile::tempdir().unwrap();
    TuningDb::open(dir.path()).unwrap().insert(&[series(0)]).unwrap();
    let path = dir.path().join(journal::FILE_NAME);
    let header = r#"{"schema":2}"#;
    let newer = format!("{{\"crc32\":\"{:08x}\",\"header\":{header}}}\n", crc32fast::hash(header.as_bytes()));
    let text = fs::read_to_string(&path).unwrap() + &newer;
    fs::write(&path, &text).unwrap();
    let error = TuningDb::open(dir.path()).unwrap_err();
    assert!(matches!(error, DbError::Journal(JournalError::NewerSchema(_))), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
}

#[test]
fn a_newer_snapshot_stops_the_tuner_before_it_changes_anything() {
    let dir = tempfile::tempdir().unwrap();
    TuningDb::open(dir.path()).unwrap().insert(&[series(0)]).unwrap();
    let [journal, path] = [journal::FILE_NAME, snapshot::FILE_NAME].map(|name| dir.path().join(name));
    let newer = "{\"schema\":7,\"more\":true}\n";
    fs::write(&path, newer).unwrap();
    // A line that opening would move away.
    let text = fs::read_to_string(&journal).unwrap() + "torn";
    fs::write(&journal, &text).unwrap();
    for error in [TuningDb::open(dir.path()).unwrap_err(), TuningDb::rebuild(dir.path()).unwrap_err()] {
        assert!(matches!(error, DbError::Snapshot(SnapshotError::NewerSchema(_))), "{error}");
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), newer);
    assert_eq!(fs::read_to_string(&journal).unwrap(), text);
}

#[test]
fn opening_publishes_what_is_missing_or_differs_and_leaves_alone_what_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(snapshot::FILE_NAME);
    // As `kill -9` before the first publish leaves it.
    TuningDb::open(dir.path()).unwrap().insert(&[series(0)]).unwrap();
    let published = || Snapshot::load(&path).unwrap().get_range("").map(|entry| entry.record().unwrap()).collect();
    for before in [None, Some(0), Some(40)] {
        match before {
            None => fs::remove_file(&path).unwrap(),
            Some(length) => fs::write(&path, &fs::read(&path).unwrap()[..length]).unwrap(),
        }
        TuningDb::open(dir.path()).unwrap();
        let records: Vec<Record> = published();
        assert_eq!(records, [series(0)], "{before:?}");
    }
    let written = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    let before = written(&path);
    TuningDb::open(dir.path()).unwrap();
    assert_eq!(written(&path), before);
    TuningDb::open(dir.path()).unwrap().insert(&[series(1)]).unwrap();
    TuningDb::open(dir.path()).unwrap();
    let records: Vec<Record> = published();
    assert_eq!(records, sorted([series(0), series(1)]));
}

#[test]
fn a_record_that_cannot_be_stored_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut db = TuningDb::open(dir.path()).unwrap();
    let bad = measured(CLASS, problem(1, 64, 64), f64::INFINITY);
    assert!(matches!(db.insert(&[series(0), bad]), Err(DbError::Record(_))));
    assert_eq!(db.records().unwrap(), []);
}

#[cfg(target_os = "linux")]
#[test]
fn a_directory_that_cannot_be_written_is_named_with_the_remedy() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o555)).unwrap();
    // Not even root creates files below /sys.
    for dir in [dir.path().join("db"), "/sys/swiglu-tune".into()] {
        match TuningDb::open(&dir) {
            Ok(_) => assert!(dir != std::path::Path::new("/sys/swiglu-tune")),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains(dir.to_str().unwrap()) && text.contains("check its owner and mode"), "{text}");
            }
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_keeps_the_published_snapshot_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut db = TuningDb::open(dir.path()).unwrap();
    db.insert(&[series(0)]).unwrap();
    db.publish().unwrap();
    std::os::unix::fs::symlink("/dev/full", dir.path().join("snapshot.tsv.tmp")).unwrap();
    db.insert(&[series(1)]).unwrap();
    let error = db.publish().unwrap_err().to_string();
    assert!(error.contains("snapshot.tsv.tmp") && error.contains("free some space"), "{error}");
    let published = swiglu_db::snapshot::Snapshot::load(&dir.path().join("snapshot.tsv")).unwrap();
    assert_eq!(published.len(), 1);
    std::os::unix::fs::symlink("/dev/full", dir.path().join("journal.jsonl.tmp")).unwrap();
    assert!(db.drop_superseded().unwrap_err().to_string().contains("free some space"));
    assert_eq!(db.records().unwrap(), sorted([series(0), series(1)]));
}

/// How many damaged indexes are kept.
pub(crate) fn moved_aside(dir: &std::path::Path) -> usize {
    let names = fs::read_dir(dir).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("index.sled.corrupt-")).count()
}
