//! Damage to any file of the store: what is whole comes back, and no answer is wrong.

use crate::fixture::{CLASS, Noise, measured, series, sorted};
use crate::store::moved_aside;
use std::fs;
use std::path::{Path, PathBuf};
use swiglu_db::record::winners;
use swiglu_db::snapshot::Snapshot;
use swiglu_db::{Record, TuningDb, journal, verify};
use tempfile::TempDir;

const COUNT: u32 = 40;

/// What was known of a config before its record of the series: a better time, on an earlier day.
fn superseded(i: u32) -> Record {
    let mut earlier = measured(CLASS, series(i).problem, 0.5);
    earlier.environment.date = "2026-11-20T00:00:00Z".into();
    earlier
}

/// The series in order. Of every third record, among them failures, there is an earlier line.
fn filled() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut db = TuningDb::open(dir.path()).unwrap();
    for i in 0..COUNT {
        if i % 3 == 0 {
            db.insert(&[superseded(i)]).unwrap();
        }
        db.insert(&[series(i)]).unwrap();
    }
    dir
}

fn expected() -> Vec<Record> {
    sorted((0..COUNT).map(series))
}

/// The files of the index with their contents.
fn files(index: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = fs::read_dir(index).unwrap().map(|file| file.unwrap().path()).filter(|path| path.is_file());
    let mut files: Vec<_> = paths.map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    files.sort();
    files
}

/// Damages the index `rounds` times, each time from its first state, and opens it. Returns how often it
/// had to be rebuilt.
fn rebuilt_after(rounds: u64, damage: impl Fn(&mut Noise, &mut Vec<u8>)) -> usize {
    let dir = filled();
    let index = dir.path().join("index.sled");
    let pristine = files(&index);
    for seed in 0..rounds {
        let noise = &mut Noise(seed);
        fs::remove_dir_all(&index).unwrap();
        fs::create_dir(&index).unwrap();
        let victim = noise.below(pristine.len());
        for (i, (path, bytes)) in pristine.iter().enumerate() {
            let mut bytes = bytes.clone();
            if i == victim {
                damage(noise, &mut bytes);
            }
            fs::write(path, bytes).unwrap();
        }
        let db = TuningDb::open(dir.path()).unwrap();
        assert_eq!(db.records().unwrap(), expected(), "seed {seed}");
    }
    moved_aside(dir.path())
}

#[test]
fn flipped_bits_in_the_index_cost_no_record() {
    let rebuilt = rebuilt_after(60, |noise, bytes| {
        // Most of the file is padding, where a flip says little.
        let used: Vec<_> = (0..bytes.len()).filter(|&at| bytes[at] != 0).collect();
        bytes[used[noise.below(used.len())]] ^= 1 << noise.below(8);
    });
    assert!(rebuilt >= 20, "only {rebuilt} of 60 flips did any harm");
}

#[test]
fn a_truncated_index_costs_no_record() {
    let rebuilt = rebuilt_after(20, |noise, bytes| bytes.truncate(noise.below(bytes.len())));
    assert!(rebuilt >= 5, "only {rebuilt} of 20 truncations did any harm");
}

/// Every file of the store but the lock, whose text means nothing.
fn store_files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = files(dir);
    all.retain(|(path, _)| !path.ends_with("tune.lock"));
    all.extend(files(&dir.join("index.sled")));
    all.retain(|(_, bytes)| !bytes.is_empty());
    all
}

/// Damages one file of a fresh store `rounds` times and holds readers and the writer to what is whole: of journal, index and
/// snapshot two are, and give back all of the third.
fn hold_the_store_to_its_word(rounds: u64, damage: impl Fn(&mut Noise, &mut Vec<u8>)) {
    let first = filled();
    TuningDb::open(first.path()).unwrap().publish().unwrap();
    let pristine = store_files(first.path());
    let published = sorted(winners(expected()));
    let mut found = 0;
    for seed in 0..rounds {
        let noise = &mut Noise(1000 + seed);
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("index.sled")).unwrap();
        let victim = noise.below(pristine.len());
        for (i, (path, bytes)) in pristine.iter().enumerate() {
            let name = path.strip_prefix(first.path()).unwrap();
            let mut bytes = bytes.clone();
            if i == victim {
                damage(noise, &mut bytes);
            }
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        // A reader takes the snapshot as it was published, or not at all.
        if let Ok(snapshot) = Snapshot::load(&dir.path().join("snapshot.tsv")) {
            let records: Vec<_> = snapshot.get_range("").map(|entry| entry.record().unwrap()).collect();
            assert_eq!(records, published, "seed {seed}");
        }
        // Where nothing is found, nothing is lost.
        if verify(dir.path()).unwrap().is_empty() {
            let written = journal::read(&dir.path().join("journal.jsonl")).unwrap();
            assert_eq!(sorted(written.current().cloned()), expected(), "seed {seed}");
            assert_eq!(Snapshot::load(&dir.path().join("snapshot.tsv")).unwrap().len(), published.len(), "seed {seed}");
        } else {
            found += 1;
        }
        let db = TuningDb::open(dir.path()).unwrap();
        assert_eq!(db.records().unwrap(), expected(), "seed {seed}");
        assert_eq!(db.winners().unwrap(), published, "seed {seed}");
        drop(db);
        assert_eq!(verify(dir.path()).unwrap().len(), 0, "seed {seed}");
    }
    assert!(found >= rounds / 4, "verify found {found} of {rounds}");
}

#[test]
fn a_flipped_bit_anywhere_costs_no_record_and_makes_no_wrong_answer() {
    hold_the_store_to_its_word(150, |noise, bytes| {
        let at = noise.below(bytes.len());
        bytes[at] ^= 1 << noise.below(8);
    });
}

#[test]
fn a_truncation_anywhere_costs_no_record_and_makes_no_wrong_answer() {
    hold_the_store_to_its_word(50, |noise, bytes| bytes.truncate(noise.below(bytes.len())));
}

#[test]
fn a_deleted_index_is_built_again() {
    let dir = filled();
    fs::remove_dir_all(dir.path().join("index.sled")).unwrap();
    assert_eq!(TuningDb::open(dir.path()).unwrap().records().unwrap(), expected());
}

#[test]
fn a_file_in_place_of_the_index_is_moved_aside() {
    let dir = filled();
    let index = dir.path().join("index.sled");
    fs::remove_dir_all(&index).unwrap();
    fs::write(&index, "not a directory").unwrap();
    assert_eq!(TuningDb::open(dir.path()).unwrap().records().unwrap(), expected());
    assert_eq!(moved_aside(dir.path()), 1);
}

#[test]
fn an_unfinished_snapshot_of_sled_is_removed() {
    let dir = filled();
    let left_over = dir.path().join("index.sled/snap.00000000FFFFFFFF.generating");
    fs::write(&left_over, "cut off").unwrap();
    assert_eq!(TuningDb::open(dir.path()).unwrap().records().unwrap(), expected());
    assert!(!left_over.exists());
    assert_eq!(moved_aside(dir.path()), 0);
}

/// The lines of the journal in `dir`, the first of them its header.
fn lines(dir: &Path) -> Vec<String> {
    let text = fs::read_to_string(dir.join("journal.jsonl")).unwrap();
    text.split_inclusive('\n').map(str::to_owned).collect()
}

fn write_lines(dir: &Path, lines: &[String]) {
    fs::write(dir.join("journal.jsonl"), lines.concat()).unwrap();
}

#[test]
fn what_the_journal_has_lost_comes_back_from_the_index() {
    for gone in 0..4 {
        let dir = filled();
        let mut lines = lines(dir.path());
        match gone {
            0 => lines.clear(),
            1 => drop(lines.remove(1)),
            2 => lines.truncate(20),
            _ => lines[9] = lines[9].replacen("\"samples\":5", "\"samples\":7", 1).replacen("compile", "compi1e", 1),
        }
        write_lines(dir.path(), &lines);
        assert_eq!(TuningDb::open(dir.path()).unwrap().records().unwrap(), expected(), "{gone}");
        // It is in the journal again.
        fs::remove_dir_all(dir.path().join("index.sled")).unwrap();
        assert_eq!(TuningDb::open(dir.path()).unwrap().records().unwrap(), expected(), "{gone}");
    }
}

/// The index has a failure whose line is lost: what was measured before it must not serve again. And where it was the index that
/// missed the failure, by a crash, the journal's word holds.
#[test]
fn what_was_refuted_later_is_not_revived() {
    let (measured, refuted) = (superseded(3), series(3));
    assert!(refuted.measurement().is_none() && (measured.key(), measured.config) == (refuted.key(), refuted.config));
    let [ahead, behind] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    for record in [&measured, &refuted] {
        TuningDb::open(ahead.path()).unwrap().insert(std::slice::from_ref(record)).unwrap();
    }
    write_lines(ahead.path(), &lines(ahead.path())[..2]);
    assert_eq!(TuningDb::open(ahead.path()).unwrap().records().unwrap(), std::slice::from_ref(&refuted));

    TuningDb::open(behind.path()).unwrap().insert(&[measured]).unwrap();
    let path = behind.path().join("journal.jsonl");
    journal::Journal::open(&path).unwrap().0.append(std::slice::from_ref(&refuted)).unwrap();
    let mut without_measured = lines(behind.path());
    without_measured.remove(1);
    write_lines(behind.path(), &without_measured);
    assert_eq!(TuningDb::open(behind.path()).unwrap().records().unwrap(), [refuted]);
}
