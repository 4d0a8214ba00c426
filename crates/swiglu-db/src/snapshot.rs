//! `snapshot.tsv`: the winners, published for readers. Immutable: a new one replaces it by rename, and
//! a reader that loaded the old one keeps it.
//!
//! The first line is a JSON header with schema, number of lines and CRC32 of all that follows; then one
//! line per winner, `key<tab>record as JSON`, sorted by key. Loading checks and indexes the lines;
//! a record is parsed when it is asked for.

use crate::error::{Context, FileError, NewerSchema};
use crate::files::replace_file;
use crate::record::{InvalidRecord, Record, TuningKey};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The schema this version writes, and the newest it reads.
pub const SCHEMA: u32 = 1;

/// Name of the file in a tuning directory.
pub const FILE_NAME: &str = "snapshot.tsv";

/// Why a snapshot could not be loaded or published.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The file could not be read, written or renamed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file is from a later version.
    #[error(transparent)]
    NewerSchema(#[from] NewerSchema),
    /// The file is not what was published.
    #[error("`{}` is damaged: {reason}; `swiglu-tune db rebuild` publishes it again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// There is none beside a journal that has winners.
    #[error("`{}` is missing; `swiglu-tune db rebuild` publishes it again", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A record cannot be written as JSON.
    #[error(transparent)]
    Record(#[from] InvalidRecord),
}

/// Records by key, in the order of the keys.
#[derive(Debug, Default)]
pub struct Snapshot {
    text: String,
    lines: Vec<Line>,
}

/// Where a line lies in the text.
#[derive(Debug)]
struct Line {
    key: Range<usize>,
    json: Range<usize>,
}

/// One line of a [`Snapshot`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The [`TuningKey`], as text.
    pub key: &'a str,
    json: &'a str,
}

impl Entry<'_> {
    /// Parses the record.
    ///
    /// # Errors
    /// The record names something this version does not know, e.g. a family.
    pub fn record(&self) -> Result<Record, serde_json::Error> {
        serde_json::from_str(self.json)
    }
}

#[derive(Serialize, Deserialize)]
struct Header {
    schema: u32,
    count: usize,
    crc32: String,
}

/// The part of the header that every schema has.
#[derive(Deserialize)]
struct AnyHeader {
    schema: u32,
}

impl Snapshot {
    /// Reads the file at `path`; a missing file is an empty snapshot.
    ///
    /// # Errors
    /// The file cannot be read, is damaged, or has a newer schema.
    pub fn load(path: &Path) -> Result<Self, SnapshotError> {
        Ok(Self::published(path)?.unwrap_or_default())
    }

    /// Reads the file at `path`, if it is there.
    pub(crate) fn published(path: &Path) -> Result<Option<Self>, SnapshotError> {
        let damaged = |reason: &str| SnapshotError::Damaged { path: path.into(), reason: reason.into() };
        let bytes = match fs::read(path) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.context("read", path)?,
        };
        let text = String::from_utf8(bytes).map_err(|_| damaged("it is not UTF-8"))?;
        let (header, body) = text.split_once('\n').ok_or_else(|| damaged("it has no header line"))?;
        let AnyHeader { schema } = serde_json::from_str(header).map_err(|_| damaged("its header is no JSON"))?;
        NewerSchema::check(path, schema, SCHEMA)?;
        let header: Header = serde_json::from_str(header).map_err(|_| damaged("its header lacks a field"))?;
        if header.crc32 != checksum(body) {
            return Err(damaged("the checksum does not match"));
        }
        let start = text.len() - body.len();
        let snapshot = Self::index(text, start).ok_or_else(|| damaged("a line has no key, or keys are unsorted"))?;
        if snapshot.len() == header.count { Ok(Some(snapshot)) } else { Err(damaged("lines are missing")) }
    }

    /// A snapshot in memory. Of records with one key the last one stays.
    ///
    /// # Errors
    /// A record cannot be encoded.
    pub fn from_records(records: &[Record]) -> Result<Self, InvalidRecord> {
        // What `body` writes is sorted and tabbed, so that there always is an index.
        Ok(Self::index(body(records)?, 0).unwrap_or_default())
    }

    /// Whether both have the same lines.
    pub(crate) fn equals(&self, other: &Self) -> bool {
        self.get_range("").eq(other.get_range(""))
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.lines.len()
    }

    /// Whether there are no records.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// The entry of exactly this key.
    pub fn get(&self, key: &TuningKey) -> Option<Entry<'_>> {
        let key = key.to_string();
        self.get_range(&key).next().filter(|entry| entry.key == key)
    }

    /// The entries whose key begins with `prefix`, in order. With [`TuningKey::shape_prefix`]: all M of
    /// one (N, K), ascending.
    pub fn get_range(&self, prefix: &str) -> impl Iterator<Item = Entry<'_>> {
        let start = self.lines.partition_point(|line| self.entry(line).key < prefix);
        let count = self.lines[start..].partition_point(|line| self.entry(line).key.starts_with(prefix));
        self.lines[start..start + count].iter().map(|line| self.entry(line))
    }

    fn entry(&self, line: &Line) -> Entry<'_> {
        Entry { key: &self.text[line.key.clone()], json: &self.text[line.json.clone()] }
    }

    /// Indexes the lines from `start` on. `None` when one has no tab or the keys do not ascend.
    fn index(text: String, mut start: usize) -> Option<Self> {
        let mut lines = Vec::with_capacity(text.len() / 512);
        for line in text[start..].split_inclusive('\n') {
            let (tab, end) = (start + line.find('\t')?, start + line.len());
            lines.push(Line { key: start..tab, json: tab + 1..end });
            start = end;
        }
        let sorted = lines.is_sorted_by(|a, b| text[a.key.clone()] < text[b.key.clone()]);
        sorted.then_some(Self { text, lines })
    }
}

/// Replaces the snapshot at `path`.
pub(crate) fn publish(path: &Path, winners: &[Record]) -> Result<(), SnapshotError> {
    let body = body(winners)?;
    let header = Header { schema: SCHEMA, count: body.lines().count(), crc32: checksum(&body) };
    let header = serde_json::to_string(&header).map_err(io::Error::from).context("encode the header of", path)?;
    Ok(replace_file(path, format!("{header}\n{body}").as_bytes())?)
}

fn body(records: &[Record]) -> Result<String, InvalidRecord> {
    let mut lines = BTreeMap::new();
    for record in records {
        lines.insert(record.key().to_string(), record.to_json()?);
    }
    Ok(lines.into_iter().map(|(key, json)| format!("{key}\t{json}\n")).collect())
}

fn checksum(body: &str) -> String {
    format!("{:08x}", crc32fast::hash(body.as_bytes()))
}
