//! `verify`, `rebuild` and dropping what was superseded.

use crate::fixture::{CLASS, default_of, failed, measured, problem, series, sorted};
use std::fs;
use std::path::Path;
use swiglu_db::journal::{self, Journal, JournalError};
use swiglu_db::{DbError, Record, TuningDb, snapshot, verify};
use tempfile::TempDir;

const COUNT: u32 = 20;

fn filled() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut db = TuningDb::open(dir.path()).unwrap();
    db.insert(&(0..COUNT).map(series).collect::<Vec<_>>()).unwrap();
    db.publish().unwrap();
    dir
}

fn findings(dir: &Path) -> Vec<String> {
    verify(dir).unwrap().iter().map(ToString::to_string).collect()
}

#[track_caller]
fn finds(dir: &Path, expected: &[&str]) {
    let findings = findings(dir);
    assert_eq!(findings.len(), expected.len(), "{findings:#?}");
    for (finding, expected) in findings.iter().zip(expected) {
        assert!(finding.contains(expected) && !finding.contains('\n'), "{finding}");
    }
}

#[test]
fn nothing_is_wrong_with_what_was_just_written() {
    finds(filled().path(), &[]);
}

#[test]
fn each_damage_is_one_line_and_verifying_changes_nothing() {
    let dir = filled();
    let path = dir.path().join(journal::FILE_NAME);
    let text = fs::read_to_string(&path).unwrap();
    let damaged = text.replacen("\"samples\":50", "\"samples\":51", 1);
    fs::write(&path, &damaged).unwrap();
    for _ in 0..2 {
        finds(dir.path(), &["journal.jsonl: line 2 is damaged: the checksum", "index.sled: ", "not in the journal"]);
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), damaged);

    let (_, records) = text.split_once('\n').unwrap();
    fs::write(&path, records).unwrap();
    finds(dir.path(), &["journal.jsonl: the line with the schema is missing"]);
    fs::write(&path, &text).unwrap();
    fs::write(dir.path().join(snapshot::FILE_NAME), "garbage").unwrap();
    finds(dir.path(), &["is damaged"]);
    fs::remove_file(dir.path().join(snapshot::FILE_NAME)).unwrap();
    fs::remove_dir_all(dir.path().join("index.sled")).unwrap();
    let findings = findings(dir.path());
    assert!(findings[0].contains("index.sled: it is missing"), "{findings:?}");
    assert!(findings[1..].iter().all(|finding| finding.contains("missing")) && findings.len() > 5, "{findings:?}");
}

#[test]
fn illegal_configs_and_devices_nobody_knows_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let mut db = TuningDb::open(dir.path()).unwrap();
    let asked = problem(64, 1024, 4096);
    let mut illegal = measured(CLASS, asked, 1.0);
    (illegal.config, illegal.problem.alignment) = (default_of(&asked), 2);
    db.insert(&[illegal, measured("sm_999-x", asked, 1.0), failed("sm_999-x", problem(1, 64, 64))]).unwrap();
    db.publish().unwrap();
    drop(db);
    finds(dir.path(), &["is not legal: operands are aligned", "`sm_999-x` of 2 records"]);
}

#[test]
fn a_line_of_a_later_version_is_named_and_kept() {
    let dir = filled();
    let path = dir.path().join(journal::FILE_NAME);
    let json = r#"{"device":{"class":"sm_90a-x","name":""},"family_of_tomorrow":1}"#;
    let line = format!("{{\"crc32\":\"{:08x}\",\"record\":{json}}}\n", crc32fast::hash(json.as_bytes()));
    fs::write(&path, fs::read_to_string(&path).unwrap() + &line + "torn").unwrap();
    finds(dir.path(), &["line 22 is whole, but of another version of swiglu-tune", "line 23 is damaged"]);
    let mut db = TuningDb::open(dir.path()).unwrap();
    db.insert(&[series(0)]).unwrap();
    assert_eq!(db.drop_superseded().unwrap(), 1);
    drop(db);
    assert!(fs::read_to_string(&path).unwrap().contains(&line));
    assert_eq!(fs::read_to_string(dir.path().join(journal::DAMAGED_NAME)).unwrap(), "torn\n");
    finds(dir.path(), &["whole, but of another version of swiglu-tune"]);
}

#[test]
fn rebuilding_sets_the_old_index_aside_and_mends_everything() {
    let dir = filled();
    fs::write(dir.path().join("index.sled/db"), "garbage").unwrap();
    fs::write(dir.path().join(snapshot::FILE_NAME), "garbage").unwrap();
    let (db, kept) = TuningDb::rebuild(dir.path()).unwrap();
    let kept = kept.unwrap();
    assert!(kept.join("db").exists() && kept.to_string_lossy().contains("index.sled.old-"), "{}", kept.display());
    assert_eq!(db.records().unwrap(), sorted((0..COUNT).map(series)));
    drop(db);
    finds(dir.path(), &[]);
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(TuningDb::rebuild(empty.path()).unwrap().1, None);
}

/// As where someone took `tune.lock` away while a tuner works.
#[test]
fn beside_a_tuner_without_its_lock_nothing_is_advised_moved_or_mended() {
    let dir = filled();
    let mut working = TuningDb::open(dir.path()).unwrap();
    fs::remove_file(dir.path().join("tune.lock")).unwrap();
    // What the tuner is writing just now looks torn.
    let path = dir.path().join(journal::FILE_NAME);
    let text = fs::read_to_string(&path).unwrap() + "{\"crc32\":";
    fs::write(&path, &text).unwrap();
    finds(dir.path(), &["another process works in `"]);
    for error in [TuningDb::open(dir.path()).unwrap_err(), TuningDb::rebuild(dir.path()).unwrap_err()] {
        assert!(matches!(error, DbError::Busy(_)), "{error}");
        assert!(error.to_string().contains("wait for it or end it"), "{error}");
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
    let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["index.sled", "journal.jsonl", "snapshot.tsv", "tune.lock"]);
    fs::write(&path, text.trim_end_matches("{\"crc32\":")).unwrap();
    working.insert(&[series(COUNT)]).unwrap();
    drop(working);
    assert_eq!(TuningDb::open(dir.path()).unwrap().records().unwrap(), sorted((0..=COUNT).map(series)));
}

#[cfg(unix)]
#[test]
fn a_journal_that_was_replaced_or_removed_is_not_written_to() {
    let dir = filled();
    let path = dir.path().join(journal::FILE_NAME);
    let text = fs::read_to_string(&path).unwrap();
    for remove in [true, false] {
        let mut db = TuningDb::open(dir.path()).unwrap();
        fs::remove_file(&path).unwrap();
        if !remove {
            fs::write(&path, &text).unwrap();
        }
        let error = db.insert(&[series(COUNT)]).unwrap_err();
        assert!(matches!(error, DbError::Journal(JournalError::Replaced { .. })), "{error}");
        assert!(error.to_string().contains("journal.jsonl") && error.to_string().contains("run again"), "{error}");
        assert_eq!(path.exists(), !remove);
        drop(db);
        fs::write(&path, &text).unwrap();
    }
    assert_eq!(TuningDb::open(dir.path()).unwrap().records().unwrap(), sorted((0..COUNT).map(series)));
}

#[test]
fn dropping_superseded_records_keeps_every_current_one() {
    let dir = filled();
    let again = |us| Record { ..measured(CLASS, problem(1, 1024, 4096), us) };
    let mut db = TuningDb::open(dir.path()).unwrap();
    db.insert(&[again(3.0), again(2.0)]).unwrap();
    let (records, winners) = (db.records().unwrap(), db.winners().unwrap());
    let path = dir.path().join(journal::FILE_NAME);
    let length = fs::metadata(&path).unwrap().len();
    assert_eq!(db.drop_superseded().unwrap(), 2);
    assert!(fs::metadata(&path).unwrap().len() < length);
    assert_eq!(db.drop_superseded().unwrap(), 0);
    // What comes after it goes into the new file.
    db.insert(&[series(COUNT)]).unwrap();
    db.publish().unwrap();
    drop(db);
    finds(dir.path(), &[]);
    let db = TuningDb::open(dir.path()).unwrap();
    assert_eq!(db.records().unwrap(), sorted(records.into_iter().chain([series(COUNT)])));
    assert!(winners.iter().all(|winner| db.best(&winner.key()).unwrap().as_ref() == Some(winner)));
}

#[test]
fn published_records_that_the_journal_lost_come_back() {
    let dir = filled();
    let path = dir.path().join(journal::FILE_NAME);
    let text = fs::read_to_string(&path).unwrap();
    // Cut between two lines, which no checksum notices.
    let half: String = text.split_inclusive('\n').take(11).collect();
    fs::write(&path, half).unwrap();
    fs::remove_dir_all(dir.path().join("index.sled")).unwrap();
    let records = TuningDb::open(dir.path()).unwrap().records().unwrap();
    let expected = (0..COUNT).map(series).enumerate().filter(|(i, record)| *i < 10 || record.measurement().is_some());
    assert_eq!(records, sorted(expected.map(|(_, record)| record)));
}

#[test]
fn records_from_before_origins_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(journal::FILE_NAME);
    Journal::open(&path).unwrap().0.append(&[series(0)]).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    assert!(!text.contains("origin"), "{text}");
    let header = r#"{"schema":0}"#;
    let older = format!("{{\"crc32\":\"{:08x}\",\"header\":{header}}}", crc32fast::hash(header.as_bytes()));
    let (_, records) = text.split_once('\n').unwrap();
    fs::write(&path, format!("{older}\n{records}")).unwrap();
    assert_eq!(TuningDb::open(dir.path()).unwrap().records().unwrap(), [series(0)]);
}
