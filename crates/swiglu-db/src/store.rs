//! The tuner's database: one process at a time, no finished measurement lost.
//!
//! A batch is in the journal and synced before sled sees it, and readers see it when it is published.
//! Whatever is interrupted in between is made good from the journal at the next open.

use crate::error::{Context, FileError};
use crate::files::move_aside;
use crate::index::{Entries, Index, OpenError, Opened};
use crate::journal::{self, Journal, JournalError};
use crate::lock::{Lock, LockError};
use crate::record::{self, InvalidRecord, Origin, Record, TuningKey};
use crate::snapshot::{self, Snapshot, SnapshotError};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use swiglu_kernels::Config;

pub use crate::index::{IndexBusy, IndexError};

/// Name of the lock file in a tuning directory.
pub const LOCK_NAME: &str = "tune.lock";

/// Why the database could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DbError {
    /// Another tuner works in the directory, or the lock cannot be taken.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The directory cannot be created or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The journal cannot be read or extended.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Another process works in the directory, whose lock someone took away.
    #[error(transparent)]
    Busy(#[from] IndexBusy),
    /// sled failed; the journal has every record.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The snapshot cannot be published.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The record cannot be written as JSON.
    #[error(transparent)]
    Record(#[from] InvalidRecord),
}

impl From<OpenError> for DbError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Busy(busy) => Self::Busy(busy),
            OpenError::File(error) => Self::File(error),
            OpenError::Index(error) => Self::Index(error),
        }
    }
}

/// The tuning directory, open for its single writer.
#[derive(Debug)]
pub struct TuningDb {
    // Declared in the order of closing: the lock goes last.
    index: Index,
    journal: Journal,
    snapshot: PathBuf,
    _lock: Lock,
}

impl TuningDb {
    /// Opens the database in `dir`, or creates both. A snapshot that is missing, or is not what the journal would publish, is
    /// published.
    ///
    /// # Errors
    /// Another tuner holds the directory, it cannot be written, or its journal or snapshot has a newer schema.
    /// Damage is no error: it is reported through `tracing` and repaired as far as journal and snapshot reach.
    pub fn open(dir: &Path) -> Result<Self, DbError> {
        Ok(Self::open_with(dir, false)?.0)
    }

    /// As [`TuningDb::open`], with index and snapshot made anew from the journal. The old index is moved to
    /// the path returned.
    ///
    /// # Errors
    /// As [`TuningDb::open`].
    pub fn rebuild(dir: &Path) -> Result<(Self, Option<PathBuf>), DbError> {
        Self::open_with(dir, true)
    }

    fn open_with(dir: &Path, anew: bool) -> Result<(Self, Option<PathBuf>), DbError> {
        fs::create_dir_all(dir).context("create the directory", dir)?;
        let lock = Lock::take(&dir.join(LOCK_NAME))?;
        Index::must_be_free(dir)?;
        let snapshot = dir.join(snapshot::FILE_NAME);
        let path = dir.join(journal::FILE_NAME);
        let read = Snapshot::published(&snapshot);
        if let Err(SnapshotError::NewerSchema(newer)) = read {
            // Of two that are newer the journal is named: it is the truth.
            journal::read(&path)?;
            return Err(SnapshotError::from(newer).into());
        }
        let (mut journal, contents) = Journal::open(&path)?;
        let published = published(&snapshot, read)?;
        let mut records = contents.records;
        let Opened { index, kept, found } = Index::open(dir, &entries(&records)?, anew)?;
        // The index first: what has failed since the snapshot was published must not come back from it.
        let mut lost = indexed_and_lost(&records, &found);
        records.extend(lost.iter().cloned());
        lost.extend(published.iter().flat_map(|published| published_and_lost(&records, published)));
        if !lost.is_empty() {
            tracing::warn!(
                records = lost.len(),
                "the journal has lost records that index or snapshot has; they are restored"
            );
            journal.append(&lost)?;
            index.write(&entries(&lost)?)?;
        }
        let db = Self { index, journal, snapshot, _lock: lock };
        let winners = Snapshot::from_records(&db.winners()?)?;
        if published.is_none_or(|published| !published.equals(&winners)) {
            db.publish()?;
        }
        Ok((db, kept))
    }

    /// Takes records of another database. Of one key and config the better supported record stays, see
    /// [`Record::is_better_supported_than`], and of equals the one that is here; what is replaced stays in
    /// the journal. A record that names no origin yet is given `origin`. Readers see it after
    /// [`TuningDb::publish`].
    ///
    /// # Errors
    /// A record cannot be encoded (then none is stored), or the disk or sled failed.
    pub fn take(&mut self, records: impl IntoIterator<Item = Record>, origin: &Origin) -> Result<Taken, DbError> {
        let mut taken = Taken::default();
        let mut better: BTreeMap<(TuningKey, Config), Record> = BTreeMap::new();
        for mut record in records {
            if let Some(Err(why)) = record.device.target().map(|target| record.config.check(&record.problem, target)) {
                tracing::warn!(key = %record.key(), config = %record.config, %why, "refused an illegal record");
                taken.refused += 1;
                continue;
            }
            if record.origin == Origin::Local {
                record.origin = origin.clone();
            }
            if let Err(why) = record.vet() {
                tracing::warn!(%why, "refused a record that no tuner writes");
                taken.refused += 1;
                continue;
            }
            let id = (record.key(), record.config);
            let ours = match better.get(&id) {
                Some(earlier) => Some(earlier.clone()),
                None => self.record(&id.0, &id.1)?,
            };
            match ours {
                Some(ours) if !record.is_better_supported_than(&ours) => {
                    taken.kept += 1;
                    continue;
                }
                Some(_) => taken.replaced += 1,
                None => taken.added += 1,
            }
            better.insert(id, record);
        }
        self.insert(&better.into_values().collect::<Vec<_>>())?;
        Ok(taken)
    }

    /// Drops from the journal the records that a later one of their key and config has replaced: they never
    /// serve again. Returns how many those were.
    ///
    /// # Errors
    /// The journal cannot be replaced; then the old one stands.
    pub fn drop_superseded(&mut self) -> Result<usize, DbError> {
        Ok(self.journal.drop_superseded()?)
    }

    /// Stores records; one that has the key and config of an earlier one takes its place. When this
    /// returns `Ok` they survive a crash of the process or the machine.
    ///
    /// # Errors
    /// A record cannot be encoded (then none is stored), or the disk or sled failed.
    pub fn insert(&mut self, records: &[Record]) -> Result<(), DbError> {
        let entries = entries(records)?;
        self.journal.append(records)?;
        Ok(self.index.write(&entries)?)
    }

    /// Every record, in the order of the keys.
    ///
    /// # Errors
    /// sled failed.
    pub fn records(&self) -> Result<Vec<Record>, DbError> {
        self.scan("")
    }

    /// What came of one config.
    ///
    /// # Errors
    /// sled failed.
    pub fn record(&self, key: &TuningKey, config: &Config) -> Result<Option<Record>, DbError> {
        Ok(self.index.get(index_key(key, config).as_bytes())?.as_deref().and_then(parse))
    }

    /// Whether this config was tried with this very source, whatever came of it: a run that continues
    /// an earlier one skips it. A failure elsewhere may be that machine's: it is tried here too.
    ///
    /// # Errors
    /// sled failed.
    pub fn is_measured(&self, key: &TuningKey, config: &Config, source_digest: &str) -> Result<bool, DbError> {
        let told = |record: &Record| record.origin == Origin::Local || record.measurement().is_some();
        let record = self.record(key, config)?.filter(told);
        Ok(record.is_some_and(|record| record.environment.source_digest == source_digest))
    }

    /// The record that serves: the fastest, by the rules of a race where several are as fast (docs/measurement.md).
    ///
    /// # Errors
    /// sled failed.
    pub fn best(&self, key: &TuningKey) -> Result<Option<Record>, DbError> {
        Ok(record::winners(self.of_key(key)?).pop())
    }

    /// What came of every config that was tried for `key`.
    ///
    /// # Errors
    /// sled failed.
    pub fn of_key(&self, key: &TuningKey) -> Result<Vec<Record>, DbError> {
        self.scan(&format!("{key}{SEPARATOR}"))
    }

    /// The best record of every key, in the order of the keys.
    ///
    /// # Errors
    /// sled failed.
    pub fn winners(&self) -> Result<Vec<Record>, DbError> {
        Ok(record::winners(self.records()?))
    }

    /// Replaces the snapshot that readers load by the present winners.
    ///
    /// # Errors
    /// sled failed, or the file cannot be written; then readers keep the old one.
    pub fn publish(&self) -> Result<(), DbError> {
        Ok(snapshot::publish(&self.snapshot, &self.winners()?)?)
    }

    fn scan(&self, prefix: &str) -> Result<Vec<Record>, DbError> {
        Ok(self.index.scan(prefix.as_bytes())?.iter().filter_map(|json| parse(json)).collect())
    }
}

/// What became of records of another database.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taken {
    /// Records of keys and configs that had none.
    pub added: usize,
    /// Records that took the place of a weaker one.
    pub replaced: usize,
    /// Records that were no better supported than the one that is here.
    pub kept: usize,
    /// Records whose config is not legal for their problem, or that no tuner can have written.
    pub refused: usize,
}

/// What was `read` of the snapshot at `path`; `None` where it is missing, or cannot be used and is set aside. It is published again.
fn published(path: &Path, read: Result<Option<Snapshot>, SnapshotError>) -> Result<Option<Snapshot>, FileError> {
    read.or_else(|reason| {
        let kept = move_aside(path, "corrupt")?;
        tracing::warn!(%reason, kept = %kept.display(), "publishing the snapshot anew from the journal");
        Ok(None)
    })
}

/// Records of an index that no line of the journal has: it was cut off or lost the line. What a tuner indexes is in the journal
/// by then, so that such a record is the last of its key and config, unless a later line has what a crash kept from the index.
fn indexed_and_lost(records: &[Record], found: &Entries) -> Vec<Record> {
    let mut written: BTreeMap<_, Vec<&Record>> = BTreeMap::new();
    for record in records {
        written.entry(index_key(&record.key(), &record.config)).or_default().push(record);
    }
    let is_lost = |key: &str, record: &Record| {
        let Some(lines) = written.get(key) else { return true };
        let later = |line: &Record| record.environment.date > line.environment.date;
        !lines.contains(&record) && lines.last().is_none_or(|line| later(line))
    };
    let whole = found.iter().filter_map(|(key, json)| {
        let record: Record = serde_json::from_slice(json).ok()?;
        let name = index_key(&record.key(), &record.config);
        (name.as_bytes() == key && record.check().is_ok() && is_lost(&name, &record)).then_some(record)
    });
    whole.collect()
}

/// Published records that no line of the journal has.
fn published_and_lost(records: &[Record], published: &Snapshot) -> Vec<Record> {
    let known: BTreeSet<_> = records.iter().map(|record| (record.key(), record.config)).collect();
    let published = published.get_range("").filter_map(|entry| entry.record().ok());
    published.filter(|record| !known.contains(&(record.key(), record.config)) && record.check().is_ok()).collect()
}

/// Sorts before every character of a key, so that one key's configs are neighbours.
const SEPARATOR: char = '\0';

fn index_key(key: &TuningKey, config: &Config) -> String {
    format!("{key}{SEPARATOR}{config}")
}

pub(crate) fn entries(records: &[Record]) -> Result<Entries, InvalidRecord> {
    records
        .iter()
        .map(|record| Ok((index_key(&record.key(), &record.config).into_bytes(), record.to_json()?.into_bytes())))
        .collect()
}

/// Only what [`Record::to_json`] wrote is in the index.
fn parse(json: &[u8]) -> Option<Record> {
    serde_json::from_slice(json).inspect_err(|error| tracing::warn!(%error, "skipped an unreadable record")).ok()
}
