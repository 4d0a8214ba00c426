//! The journal file, whole and damaged.

use crate::fixture::{CLASS, measured, problem, series};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;
use swiglu_db::Record;
use swiglu_db::journal::{self, Journal, JournalError};
use tempfile::TempDir;

fn written(records: &[Record]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(journal::FILE_NAME);
    Journal::open(&path).unwrap().0.append(records).unwrap();
    (dir, path)
}

#[test]
fn records_come_back_in_order_and_every_line_is_json() {
    let records: Vec<_> = (0..20).map(series).collect();
    let (_dir, path) = written(&records);
    let contents = journal::read(&path).unwrap();
    assert_eq!((contents.records, contents.skipped), (records, vec![]));
    for line in fs::read_to_string(&path).unwrap().lines() {
        assert!(serde_json::from_str::<serde_json::Value>(line).unwrap().is_object(), "{line}");
    }
}

#[test]
fn a_missing_journal_is_empty() {
    let dir = tempfile::tempdir().unwrap();
    assert!(journal::read(&dir.path().join("none")).unwrap().records.is_empty());
}

#[test]
fn appending_after_a_torn_line_starts_a_new_one() {
    let (_dir, path) = written(&[series(0), series(1)]);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 30]).unwrap();
    Journal::open(&path).unwrap().0.append(&[series(2)]).unwrap();
    let contents = journal::read(&path).unwrap();
    assert_eq!((contents.records, contents.skipped), (vec![series(0), series(2)], vec![]));
    let damaged = fs::read(path.with_file_name(journal::DAMAGED_NAME)).unwrap();
    assert!(bytes.windows(damaged.len() - 1).any(|part| part == &damaged[..damaged.len() - 1]));
}

#[test]
fn a_whole_line_without_its_newline_is_kept() {
    let (_dir, path) = written(&[series(0)]);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    Journal::open(&path).unwrap().0.append(&[series(1)]).unwrap();
    let contents = journal::read(&path).unwrap();
    assert_eq!((contents.records, contents.skipped), (vec![series(0), series(1)], vec![]));
}

#[test]
fn a_newer_schema_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(journal::FILE_NAME);
    let header = r#"{"format":"swiglu-tune journal","schema":2,"more":true}"#;
    let text = format!("{{\"crc32\":\"{:08x}\",\"header\":{header}}}\n", crc32fast::hash(header.as_bytes()));
    fs::write(&path, &text).unwrap();
    let error = Journal::open(&path).unwrap_err();
    assert!(matches!(error, JournalError::NewerSchema(_)), "{error}");
    assert!(error.to_string().contains("has schema 2, this version reads up to 1; update swiglu-tune"), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
}

#[test]
fn a_record_that_json_cannot_hold_is_refused_with_its_batch() {
    let (_dir, path) = written(&[series(0)]);
    let bad = measured(CLASS, problem(1, 64, 64), f64::NAN);
    let error = Journal::open(&path).unwrap().0.append(&[series(1), bad]).unwrap_err();
    assert!(matches!(error, JournalError::Record(_)), "{error}");
    let odd_class = measured("a|b", problem(1, 64, 64), 1.0);
    assert!(Journal::open(&path).unwrap().0.append(&[odd_class]).is_err());
    assert_eq!(journal::read(&path).unwrap().records, [series(0)]);
}

const COUNT: u32 = 8;

static PRISTINE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let (_dir, path) = written(&(0..COUNT).map(series).collect::<Vec<_>>());
    fs::read(path).unwrap()
});

/// What is left of the series in a journal of these bytes.
fn survivors(bytes: &[u8]) -> Vec<Record> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(journal::FILE_NAME);
    fs::write(&path, bytes).unwrap();
    let before = journal::read(&path).unwrap().records;
    // The damage must not reach what is appended after it either.
    Journal::open(&path).unwrap().0.append(&[series(COUNT)]).unwrap();
    let mut after = journal::read(&path).unwrap().records;
    assert_eq!(after.pop(), Some(series(COUNT)));
    assert_eq!(before, after);
    before
}

/// Whether `records` are `all` with some left out.
fn is_subsequence(records: &[Record], mut all: impl Iterator<Item = Record>) -> bool {
    records.iter().all(|record| all.any(|original| original == *record))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, rng_seed: RngSeed::Fixed(2), failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_flipped_byte_costs_at_most_its_line(at in any::<prop::sample::Index>(), flip in 1..=255_u8) {
        let mut bytes = PRISTINE.clone();
        bytes[at.index(PRISTINE.len())] ^= flip;
        let records = survivors(&bytes);
        prop_assert!(is_subsequence(&records, (0..COUNT).map(series)));
        // A newline is shared by two lines.
        prop_assert!(records.len() as u32 >= COUNT - 2);
    }

    #[test]
    fn a_truncation_costs_what_was_cut(length in any::<prop::sample::Index>()) {
        let length = length.index(PRISTINE.len());
        let records = survivors(&PRISTINE[..length]);
        let whole_lines = PRISTINE[..=length].iter().filter(|&&byte| byte == b'\n').count();
        let expected: Vec<_> = (0..whole_lines.saturating_sub(1) as u32).map(series).collect();
        prop_assert_eq!(records, expected);
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in any::<Vec<u8>>()) {
        prop_assert!(survivors(&bytes).is_empty());
    }
}
