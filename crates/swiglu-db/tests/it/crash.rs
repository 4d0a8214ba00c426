//! `kill -9` of a tuner that writes.

use crate::fixture::series;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use swiglu_db::TuningDb;

const DIR: &str = "SWIGLU_DB_TEST_WRITER";
const START: &str = "SWIGLU_DB_TEST_START";

/// No test of its own: the process that `acknowledged_records_survive_a_kill` starts and kills.
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

#[test]
fn acknowledged_records_survive_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = Vec::new();
    for (round, kill_after) in [1, 4, 17, 40, 9, 25].into_iter().enumerate() {
        let mut writer = spawn_writer(dir.path(), round as u32 * 1000);
        let lines = BufReader::new(writer.stdout.take().unwrap()).lines().map(Result::unwrap);
        // The harness may print in front of the first one.
        let mut seen = lines.filter_map(|line| line.split_once("acknowledged ")?.1.parse::<u32>().ok());
        let before = acknowledged.len();
        acknowledged.extend(seen.by_ref().take(kill_after));
        writer.kill().unwrap();
        acknowledged.extend(seen);
        writer.wait().unwrap();
        assert!(acknowledged.len() >= before + kill_after, "the writer stopped by itself");

        let db = TuningDb::open(dir.path()).unwrap();
        for i in acknowledged.iter().copied().map(series) {
            assert_eq!(db.record(&i.key(), &i.config).unwrap(), Some(i));
        }
    }
}
