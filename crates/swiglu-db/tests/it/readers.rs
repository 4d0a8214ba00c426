//! Readers beside a writer: processes that look configs up while a tuner stores and publishes.

use crate::fixture::{CLASS, series, target};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use swiglu_db::{Layer, Match, TuningDb, TuningTable};

const DIR: &str = "SWIGLU_DB_TEST_READER";
const READERS: usize = 8;
/// What a reader would wait for a lock is longer; what a busy machine takes from it is shorter.
const PAUSE: Duration = Duration::from_secs(2);

/// No test of its own: the processes that read until their stdin ends.
#[test]
fn reader() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let (done, ended) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_line(&mut String::new());
        drop(done);
    });
    let (mut reads, mut slowest, mut newest) = (0, Duration::ZERO, 0);
    while ended.try_recv() != Err(std::sync::mpsc::TryRecvError::Disconnected) {
        let begun = Instant::now();
        let (table, skipped) = TuningTable::load(&[(Layer::User, Path::new(&dir).into())]);
        assert!(skipped.is_empty(), "{skipped:?}");
        let found = table.explain(CLASS, &series(0).problem, target()).serving.unwrap();
        assert_eq!((found.record, found.matched), (series(0), Match::Exact));
        let (_, published) = table.layers().next().unwrap();
        assert!(published >= newest, "{published} records after {newest}");
        slowest = slowest.max(begun.elapsed());
        (reads, newest) = (reads + 1, published);
        if reads == 1 {
            writeln!(std::io::stdout(), "reading").unwrap();
        }
    }
    writeln!(std::io::stdout(), "told {reads} {} {newest}", slowest.as_millis()).unwrap();
}

fn spawn_reader(dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "readers::reader", "--nocapture"])
        .env(DIR, dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn eight_readers_go_on_without_a_pause_or_an_error_while_a_tuner_publishes() {
    let dir = tempfile::tempdir().unwrap();
    let mut db = TuningDb::open(dir.path()).unwrap();
    db.insert(&[series(0)]).unwrap();
    db.publish().unwrap();
    let mut readers: Vec<Child> = (0..READERS).map(|_| spawn_reader(dir.path())).collect();
    let mut lines: Vec<_> = readers
        .iter_mut()
        .map(|reader| BufReader::new(reader.stdout.take().unwrap()).lines().map(Result::unwrap))
        .collect();
    for lines in &mut lines {
        assert!(lines.any(|line| line.ends_with("reading")));
    }
    for i in 1..150 {
        db.insert(&[series(i)]).unwrap();
        db.publish().unwrap();
    }
    let winners = db.winners().unwrap().len();
    for (reader, mut lines) in readers.iter_mut().zip(lines) {
        drop(reader.stdin.take());
        let told = lines.find_map(|line| Some(line.split_once("told ")?.1.to_owned())).expect("the reader failed");
        let told: Vec<u64> = told.split(' ').map(|number| number.parse().unwrap()).collect();
        let [reads, slowest_ms, newest] = told[..] else { panic!("{told:?}") };
        assert!(reads > 5, "{reads} reads");
        assert!(Duration::from_millis(slowest_ms) < PAUSE, "a pause of {slowest_ms} ms");
        assert!(newest as usize <= winners);
        assert!(reader.wait().unwrap().success());
    }
}
