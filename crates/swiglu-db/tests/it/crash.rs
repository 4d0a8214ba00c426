//! `kill -9` of a tuner that writes.

use crate::fixture::{Noise, series};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;
use swiglu_db::TuningDb;
use swiglu_db::snapshot::{self, Snapshot};

const DIR: &str = "SWIGLU_DB_TEST_WRITER";
const START: &str = "SWIGLU_DB_TEST_START";

/// No test of its own: the process that `kill_writers` starts and kills.
#[test]
fn writer() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let start: u32 = std::env::var(START).unwrap().parse().unwrap();
    let mut db = TuningDb::open(Path::new(&dir)).unwrap();
    for i in start..start + 500 {
        db.insert(&[series(i)]).unwrap();
        writeln!(std::io::stdout(), "acknowledged {i}").unwrap();
        if i % 5 == 0 {
            db.publish().unwrap();
        }
    }
}

fn spawn_writer(dir: &Path, start: u32) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash::writer", "--nocapture"])
        .env(DIR, dir)
        .env(START, start.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Kills `rounds` writers of one directory, each at a random moment after its start, and looks for every record
/// they had acknowledged.
fn kill_writers(rounds: u32) {
    let dir = tempfile::tempdir().unwrap();
    let noise = &mut Noise(9);
    let mut acknowledged = Vec::new();
    for round in 0..rounds {
        let mut writer = spawn_writer(dir.path(), round * 1000);
        let lines = BufReader::new(writer.stdout.take().unwrap()).lines().map(Result::unwrap);
        // The harness may print in front of the first one.
        let mut seen = lines.filter_map(|line| line.split_once("acknowledged ")?.1.parse::<u32>().ok());
        // Every other one has begun to write; the rest may still be opening the directory.
        acknowledged.extend(seen.by_ref().take((round % 2) as usize));
        thread::sleep(Duration::from_millis(noise.below(40) as u64));
        writer.kill().unwrap();
        acknowledged.extend(seen);
        writer.wait().unwrap();

        let published = Snapshot::load(&dir.path().join(snapshot::FILE_NAME)).unwrap();
        let db = TuningDb::open(dir.path()).unwrap();
        let records: BTreeSet<String> = db.records().unwrap().iter().map(|record| format!("{record:?}")).collect();
        for record in acknowledged.iter().copied().map(series) {
            assert!(records.contains(&format!("{record:?}")), "round {round} lost {}", record.key());
        }
        assert!(published.len() <= db.winners().unwrap().len());
    }
    assert!(acknowledged.len() >= rounds as usize / 2, "the writers stopped by themselves");
}

#[test]
fn acknowledged_records_survive_two_hundred_kills() {
    kill_writers(200);
}
