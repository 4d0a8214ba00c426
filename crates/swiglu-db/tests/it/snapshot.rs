//! The published file, whole and damaged.

use crate::fixture::{CLASS, measured, problem, series, sorted};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use swiglu_db::record::winners;
use swiglu_db::snapshot::{self, Snapshot, SnapshotError};
use swiglu_db::{Record, TuningDb, TuningKey};
use tempfile::TempDir;

fn published(records: &[Record]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let mut db = TuningDb::open(dir.path()).unwrap();
    db.insert(records).unwrap();
    db.publish().unwrap();
    let path = dir.path().join(snapshot::FILE_NAME);
    (dir, path)
}

fn all(snapshot: &Snapshot) -> Vec<Record> {
    snapshot.get_range("").map(|entry| entry.record().unwrap()).collect()
}

#[test]
fn winners_are_published_and_found_by_key() {
    let records: Vec<_> = (0..60).map(series).collect();
    let (_dir, path) = published(&records);
    let snapshot = Snapshot::load(&path).unwrap();
    assert_eq!(all(&snapshot), sorted(winners(records.clone())));
    assert_eq!(snapshot.len(), all(&snapshot).len());
    for record in winners(records) {
        assert_eq!(snapshot.get(&record.key()).unwrap().record().unwrap(), record);
    }
    assert_eq!(snapshot.get(&TuningKey { device_class: "cpu-x-8".into(), problem: problem(1, 2, 3) }), None);
}

#[test]
fn all_m_of_one_shape_are_a_range_in_order() {
    let shapes = [(1024, 512), (1024, 4096), (2048, 512)];
    let ms = [2048, 1, 33, 8];
    let records: Vec<_> =
        shapes.iter().flat_map(|&(n, k)| ms.map(|m| measured(CLASS, problem(m, n, k), f64::from(m)))).collect();
    let snapshot = Snapshot::from_records(&records).unwrap();
    let key = TuningKey { device_class: CLASS.into(), problem: problem(5, 1024, 4096) };
    let found: Vec<_> =
        snapshot.get_range(&key.shape_prefix()).map(|entry| entry.key.parse::<TuningKey>().unwrap().problem).collect();
    assert_eq!(found, [1, 8, 33, 2048].map(|m| problem(m, 1024, 4096)));
}

#[test]
fn a_missing_file_is_an_empty_snapshot_and_so_is_a_published_nothing() {
    assert!(Snapshot::load(Path::new("/nowhere/at/all")).unwrap().is_empty());
    let (_dir, path) = published(&[]);
    assert!(Snapshot::load(&path).unwrap().is_empty());
}

#[test]
fn a_reader_keeps_the_snapshot_it_loaded() {
    let (dir, path) = published(&[series(0)]);
    let old = Snapshot::load(&path).unwrap();
    let mut db = TuningDb::open(dir.path()).unwrap();
    db.insert(&[series(1), series(2)]).unwrap();
    db.publish().unwrap();
    assert_eq!(all(&old), [series(0)]);
    assert_eq!(Snapshot::load(&path).unwrap().len(), 3);
}

#[test]
fn every_byte_flip_and_truncation_is_noticed() {
    let (_dir, path) = published(&[series(0), series(1)]);
    let pristine = fs::read(&path).unwrap();
    for at in 0..pristine.len() {
        let mut flipped = pristine.clone();
        flipped[at] ^= 1 << (at % 8);
        fs::write(&path, flipped).unwrap();
        // In the header a flip may spell the same number, or name a field nobody knows.
        if let Ok(snapshot) = Snapshot::load(&path) {
            assert_eq!(all(&snapshot), sorted([series(0), series(1)]), "flip at {at}");
        }
        fs::write(&path, &pristine[..at]).unwrap();
        assert!(matches!(Snapshot::load(&path), Err(SnapshotError::Damaged { .. })), "cut at {at}");
    }
}

#[test]
fn a_newer_schema_is_refused() {
    let (_dir, path) = published(&[series(0)]);
    let text = fs::read_to_string(&path).unwrap().replacen("\"schema\":1", "\"schema\":7,\"count\":\"?\"", 1);
    fs::write(&path, text).unwrap();
    let error = Snapshot::load(&path).unwrap_err();
    assert!(matches!(&error, SnapshotError::NewerSchema(newer) if newer.found == 7), "{error}");
}

#[test]
fn eight_readers_never_meet_an_error_while_a_writer_publishes() {
    let (dir, path) = published(&[series(0)]);
    let done = AtomicBool::new(false);
    let loads: Vec<usize> = thread::scope(|scope| {
        let reader = || {
            let (mut loads, mut length) = (0, 0);
            while !done.load(Ordering::Relaxed) || loads == 0 {
                let snapshot = Snapshot::load(&path).unwrap();
                assert!(snapshot.len() >= length, "a snapshot went back in time");
                assert_eq!(all(&snapshot).len(), snapshot.len());
                (loads, length) = (loads + 1, snapshot.len());
            }
            loads
        };
        let readers: Vec<_> = (0..8).map(|_| scope.spawn(reader)).collect();
        let mut db = TuningDb::open(dir.path()).unwrap();
        for i in 1..60 {
            db.insert(&[series(i)]).unwrap();
            db.publish().unwrap();
        }
        done.store(true, Ordering::Relaxed);
        readers.into_iter().map(|reader| reader.join().unwrap()).collect()
    });
    assert_eq!(loads.len(), 8);
}
