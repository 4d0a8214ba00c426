//! Whether a tuning directory is what it should be. Changes no record; it takes the lock, and opens the index.

use crate::index::{Index, IndexBusy, OpenError};
use crate::journal::{self, SkippedLine};
use crate::lock::Lock;
use crate::record::{InvalidRecord, TuningKey, winners};
use crate::snapshot::{self, Snapshot, SnapshotError};
use crate::store::{self, DbError};
use std::collections::BTreeMap;
use std::path::Path;
use swiglu_kernels::{Config, Rejected};

/// One thing that is wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Finding {
    /// Another process works here, whose lock someone took away; nothing else was looked at.
    #[error(transparent)]
    Busy(#[from] IndexBusy),
    /// A line of the journal gives no record.
    #[error("journal.jsonl: {0}")]
    Line(SkippedLine),
    /// The journal does not say its schema.
    #[error("journal.jsonl: the line with the schema is missing")]
    NoHeader,
    /// The index holds something else than the journal, or cannot be opened.
    #[error("index.sled: {0}; `swiglu-tune db rebuild` makes it anew")]
    Index(String),
    /// The snapshot cannot be read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The snapshot serves something else than the journal's winners.
    #[error("snapshot.tsv: {key} is {how}; `swiglu-tune db rebuild` publishes it again")]
    NotPublished {
        /// The key.
        key: String,
        /// In what way it differs.
        how: &'static str,
    },
    /// A config is not legal for its problem.
    #[error("journal.jsonl: {key} with {config} is not legal: {why}")]
    Illegal {
        /// The record's key.
        key: TuningKey,
        /// Its config.
        config: Config,
        /// The rule it breaks.
        why: Rejected,
    },
    /// No tuner can have written this.
    #[error("journal.jsonl: {0}")]
    Impossible(InvalidRecord),
    /// Records of a device of which legality is not known.
    #[error("journal.jsonl: no kernels are known here for the device class `{class}` of {count} records")]
    UnknownDevice {
        /// The class.
        class: String,
        /// How many records have it.
        count: usize,
    },
}

/// Everything that is wrong in `dir`. A directory without a journal has an empty one.
///
/// # Errors
/// A tuner holds the directory, which must be writable for its lock, a file cannot be read, or the journal has a newer schema.
pub fn verify(dir: &Path) -> Result<Vec<Finding>, DbError> {
    let _lock = Lock::take(&dir.join(store::LOCK_NAME))?;
    match Index::must_be_free(dir) {
        Ok(()) => {}
        Err(OpenError::Busy(busy)) => return Ok(vec![busy.into()]),
        Err(error) => return Err(error.into()),
    }
    let contents = journal::read(&dir.join(journal::FILE_NAME))?;
    let mut findings: Vec<Finding> = contents.skipped.iter().cloned().map(Finding::Line).collect();
    if !contents.has_header {
        findings.push(Finding::NoHeader);
    }
    match Index::difference(dir, &store::entries(&contents.records)?) {
        Ok(difference) => findings.extend(difference.map(Finding::Index)),
        Err(OpenError::Index(error)) => findings.push(Finding::Index(error.reason)),
        Err(error) => return Err(error.into()),
    }
    let current: Vec<_> = contents.current().cloned().collect();
    match Snapshot::load(&dir.join(snapshot::FILE_NAME)) {
        Ok(published) => findings.extend(unpublished(&published, &Snapshot::from_records(&winners(current.clone()))?)),
        Err(error) => findings.push(error.into()),
    }
    let mut unknown: BTreeMap<String, usize> = BTreeMap::new();
    for record in current {
        findings.extend(record.vet().err().map(Finding::Impossible));
        match record.device.target().map(|target| record.config.check(&record.problem, target)) {
            None => *unknown.entry(record.device.class).or_default() += 1,
            Some(Ok(())) => {}
            Some(Err(why)) => findings.push(Finding::Illegal { key: record.key(), config: record.config, why }),
        }
    }
    findings.extend(unknown.into_iter().map(|(class, count)| Finding::UnknownDevice { class, count }));
    Ok(findings)
}

/// Keys by which the two differ.
fn unpublished(published: &Snapshot, winners: &Snapshot) -> Vec<Finding> {
    let by_key = |snapshot: &'_ Snapshot| -> BTreeMap<String, Option<crate::Record>> {
        snapshot.get_range("").map(|entry| (entry.key.to_owned(), entry.record().ok())).collect()
    };
    let (published, winners) = (by_key(published), by_key(winners));
    let missing = winners.iter().filter_map(|(key, record)| match published.get(key) {
        None => Some((key, "missing")),
        Some(found) => (found != record).then_some((key, "not the journal's winner")),
    });
    let extra = published.keys().filter(|key| !winners.contains_key(*key)).map(|key| (key, "not in the journal"));
    missing.chain(extra).map(|(key, how)| Finding::NotPublished { key: key.clone(), how }).collect()
}
