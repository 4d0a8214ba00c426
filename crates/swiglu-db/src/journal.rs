//! `journal.jsonl`: every measurement ever finished, append-only. The source of truth.
//!
//! A line is a JSON object, `{"crc32":"xxxxxxxx","record":{…}}`, whose checksum covers the inner object;
//! the first line holds a `header` with the schema instead. When a (key, config) occurs twice, the later
//! one holds. Readers skip a line that was torn by a crash or damaged on disk; the writer moves it to
//! `journal.damaged`. A line that is whole but of a later version stays where it is.

use crate::error::{Context, FileError, NewerSchema};
use crate::files::{replace_file, sync_dir};
use crate::record::{InvalidRecord, Record};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The schema this version writes, and the newest it reads.
pub const SCHEMA: u32 = 1;

/// Name of the file in a tuning directory.
pub const FILE_NAME: &str = "journal.jsonl";

/// Name of the file beside it that damaged lines are moved to.
pub const DAMAGED_NAME: &str = "journal.damaged";

/// Why a journal could not be read or extended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The file could not be opened, read, written or synced.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file is from a later version.
    #[error(transparent)]
    NewerSchema(#[from] NewerSchema),
    /// The file was removed or replaced while it was open: what is written to it is lost.
    #[error("`{}` is not the file that was opened, something has removed or replaced it; nothing was stored, end whatever else \
        works in this directory and run again", path.display())]
    Replaced {
        /// Where the file was.
        path: PathBuf,
    },
    /// A record cannot be written as JSON; nothing of its batch was written.
    #[error(transparent)]
    Record(#[from] InvalidRecord),
}

/// A line that gives no record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedLine {
    /// Its number, from 1.
    pub line: usize,
    /// Why.
    pub why: Unreadable,
}

/// Why a line gives no record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unreadable {
    /// It is not what was written.
    #[error("damaged: {0}")]
    Damaged(String),
    /// Its checksum holds, but this version does not understand it.
    #[error("whole, but of another version of swiglu-tune: {0}; it is kept")]
    Unknown(String),
}

impl fmt::Display for SkippedLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {} is {}", self.line, self.why)
    }
}

/// What a journal holds.
#[derive(Debug, Default)]
pub struct Contents {
    /// The readable records, oldest first.
    pub records: Vec<Record>,
    /// The lines that were skipped.
    pub skipped: Vec<SkippedLine>,
    /// Whether the line with the schema is there.
    pub has_header: bool,
    /// Every line but headers whose checksum holds, as it stands in the file.
    whole: Vec<WholeLine>,
    /// The others.
    damaged: Vec<Vec<u8>>,
    ends_in_newline: bool,
}

#[derive(Debug)]
struct WholeLine {
    text: Vec<u8>,
    /// Index in `records`, of a record.
    record: Option<usize>,
}

impl Contents {
    /// The record that holds for each (key, config), in the order of the journal.
    pub fn current(&self) -> impl Iterator<Item = &Record> {
        let holds = self.last_of_each();
        self.records.iter().enumerate().filter_map(move |(at, record)| holds[at].then_some(record))
    }

    /// For every record whether no later one has its key and config.
    fn last_of_each(&self) -> Vec<bool> {
        let last: BTreeMap<_, usize> =
            self.records.iter().enumerate().map(|(at, record)| ((record.key(), record.config), at)).collect();
        let mut holds = vec![false; self.records.len()];
        last.into_values().for_each(|at| holds[at] = true);
        holds
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Self, NewerSchema> {
        let ends_in_newline = bytes.last().is_none_or(|&last| last == b'\n');
        let mut contents = Self { ends_in_newline, ..Self::default() };
        for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty()) {
            match decode(line) {
                Ok(Line::Header(header)) => {
                    NewerSchema::check(path, header.schema, SCHEMA)?;
                    contents.has_header = true;
                }
                Ok(Line::Record(record)) => {
                    contents.whole.push(WholeLine { text: line.into(), record: Some(contents.records.len()) });
                    contents.records.push(*record);
                }
                Err(why) => {
                    match why {
                        Unreadable::Unknown(_) => contents.whole.push(WholeLine { text: line.into(), record: None }),
                        Unreadable::Damaged(_) => contents.damaged.push(line.into()),
                    }
                    contents.skipped.push(SkippedLine { line: index + 1, why });
                }
            }
        }
        Ok(contents)
    }
}

/// Reads a journal without changing it; a missing file is an empty one.
///
/// # Errors
/// The file cannot be read, or has a newer schema. Damaged lines are no error.
pub fn read(path: &Path) -> Result<Contents, JournalError> {
    let bytes = match fs::read(path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Vec::new(),
        read => read.context("read", path)?,
    };
    let contents = Contents::parse(path, &bytes)?;
    for skipped in &contents.skipped {
        tracing::warn!("`{}`: {skipped}; it is skipped", path.display());
    }
    Ok(contents)
}

/// A journal open for appending. The caller sees to it that there is one at a time.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    at_line_start: bool,
}

impl Journal {
    /// Reads the journal at `path`, or starts one. Damaged lines are moved to [`DAMAGED_NAME`].
    ///
    /// # Errors
    /// The file cannot be read or created, or has a newer schema; then it was not touched.
    pub fn open(path: &Path) -> Result<(Self, Contents), JournalError> {
        let contents = read(path)?;
        let mend = !contents.has_header || !contents.damaged.is_empty();
        if mend {
            set_aside(&path.with_file_name(DAMAGED_NAME), &contents.damaged)?;
            replace(path, contents.whole.iter())?;
        }
        let journal =
            Self { path: path.into(), file: append_to(path)?, at_line_start: mend || contents.ends_in_newline };
        Ok((journal, contents))
    }

    /// Appends records; when this returns `Ok`, they survive a crash of the process or the machine.
    ///
    /// # Errors
    /// A record cannot be encoded, or the file is not at its path any more (nothing is written); or it cannot be written or
    /// synced.
    pub fn append(&mut self, records: &[Record]) -> Result<(), JournalError> {
        let mut lines = String::new();
        for record in records {
            lines += &encode("record", &record.to_json()?);
        }
        if !is_still_at(&self.file, &self.path).context("read", &self.path)? {
            return Err(JournalError::Replaced { path: self.path.clone() });
        }
        // A torn line, from a crash or from a write that failed half way, keeps its own line.
        let text = if self.at_line_start { lines } else { format!("\n{lines}") };
        self.at_line_start = false;
        self.file.write_all(text.as_bytes()).context("append to", &self.path)?;
        self.at_line_start = true;
        Ok(self.file.sync_data().context("sync", &self.path)?)
    }

    /// Writes the journal anew without the records that a later one with their key and config has replaced.
    /// Returns how many those were.
    ///
    /// # Errors
    /// The file cannot be read or replaced; then the old one stands.
    pub fn drop_superseded(&mut self) -> Result<usize, JournalError> {
        let contents = read(&self.path)?;
        let holds = contents.last_of_each();
        replace(&self.path, contents.whole.iter().filter(|line| line.record.is_none_or(|at| holds[at])))?;
        // The open file is the one that was replaced.
        self.file = append_to(&self.path)?;
        self.at_line_start = true;
        Ok(holds.iter().filter(|holds| !**holds).count())
    }
}

fn append_to(path: &Path) -> Result<File, FileError> {
    OpenOptions::new().append(true).create(true).open(path).context("open", path)
}

/// Whether `path` still leads to the open `file`.
#[cfg(unix)]
fn is_still_at(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let identity = |found: fs::Metadata| (found.dev(), found.ino());
    match fs::metadata(path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(false),
        there => Ok(identity(there?) == identity(file.metadata()?)),
    }
}

/// Elsewhere an open file can be neither removed nor replaced.
#[cfg(not(unix))]
fn is_still_at(_: &File, _: &Path) -> io::Result<bool> {
    Ok(true)
}

/// Keeps damaged lines before the journal loses them.
fn set_aside(path: &Path, lines: &[Vec<u8>]) -> Result<(), FileError> {
    if lines.is_empty() {
        return Ok(());
    }
    let mut text = lines.join(&b'\n');
    text.push(b'\n');
    let mut file = append_to(path)?;
    file.write_all(&text).and_then(|()| file.sync_data()).context("keep damaged lines in", path)?;
    path.parent().map_or(Ok(()), sync_dir)?;
    tracing::warn!(lines = lines.len(), kept = %path.display(), "damaged journal lines were moved out of the journal");
    Ok(())
}

/// Replaces the journal by one of these lines.
fn replace<'a>(path: &Path, lines: impl Iterator<Item = &'a WholeLine>) -> Result<(), FileError> {
    let header = format!(r#"{{"format":"swiglu-tune journal","schema":{SCHEMA}}}"#);
    let mut text = encode("header", &header).into_bytes();
    for line in lines {
        text.extend_from_slice(&line.text);
        text.push(b'\n');
    }
    replace_file(path, &text)
}

enum Line {
    Header(Header),
    Record(Box<Record>),
}

#[derive(Serialize, Deserialize)]
struct Header {
    schema: u32,
}

fn encode(kind: &str, json: &str) -> String {
    format!("{{\"crc32\":\"{:08x}\",\"{kind}\":{json}}}\n", crc32fast::hash(json.as_bytes()))
}

fn decode(line: &[u8]) -> Result<Line, Unreadable> {
    let damaged = |reason: &str| Unreadable::Damaged(reason.into());
    let unknown = |error: serde_json::Error| Unreadable::Unknown(error.to_string());
    let (crc, kind, json) = split(line).ok_or_else(|| damaged("not of the form of a journal line"))?;
    if crc != format!("{:08x}", crc32fast::hash(json.as_bytes())) {
        return Err(damaged("the checksum does not match"));
    }
    match kind {
        "header" => serde_json::from_str(json).map(Line::Header).map_err(unknown),
        "record" => {
            let record: Record = serde_json::from_str(json).map_err(unknown)?;
            record.check().map_err(|why| Unreadable::Unknown(why.to_string()))?;
            Ok(Line::Record(Box::new(record)))
        }
        // A new kind of line would be a new schema.
        _ => Err(damaged("neither header nor record")),
    }
}

fn split(line: &[u8]) -> Option<(&str, &str, &str)> {
    let rest = str::from_utf8(line).ok()?.strip_prefix("{\"crc32\":\"")?;
    let (crc, rest) = rest.split_once("\",\"")?;
    let (kind, rest) = rest.split_once("\":")?;
    Some((crc, kind, rest.strip_suffix('}')?))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_an_error_and_the_torn_line_keeps_to_itself() {
        let file = OpenOptions::new().append(true).open("/dev/full").unwrap();
        let mut journal = Journal { path: "/dev/full".into(), file, at_line_start: true };
        let text = include_str!("../tuning-db/nvidia-h200.toml");
        let records = crate::shipped::parse(Path::new("h200.toml"), text).unwrap();
        let error = journal.append(&records).unwrap_err().to_string();
        assert!(error.contains("/dev/full") && error.contains("free some space"), "{error}");
        assert!(!journal.at_line_start);
    }
}
