//! `journal.jsonl`: every measurement ever finished, append-only. The source of truth.
//!
//! A line is a JSON object, `{"crc32":"xxxxxxxx","record":{…}}`, whose checksum covers the inner object;
//! the first line holds a `header` with the schema instead. A line that was torn by a crash or damaged
//! on disk is reported and skipped, never removed. When a (key, config) occurs twice, the later one holds.

use crate::error::{Context, FileError, NewerSchema, sync_dir};
use crate::record::{InvalidRecord, Record};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The schema this version writes, and the newest it reads.
pub const SCHEMA: u32 = 1;

/// Name of the file in a tuning directory.
pub const FILE_NAME: &str = "journal.jsonl";

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
    /// A record cannot be written as JSON; nothing of its batch was written.
    #[error(transparent)]
    Record(#[from] InvalidRecord),
}

/// What a journal holds.
#[derive(Debug, Default)]
pub struct Contents {
    /// The readable records, oldest first.
    pub records: Vec<Record>,
    /// Numbers of the lines that were skipped, from 1.
    pub damaged_lines: Vec<usize>,
    has_header: bool,
    ends_in_newline: bool,
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
    let mut contents =
        Contents { ends_in_newline: bytes.last().is_none_or(|&last| last == b'\n'), ..Default::default() };
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty()) {
        match decode(line) {
            Ok(Line::Record(record)) => contents.records.push(*record),
            Ok(Line::Header(header)) => {
                NewerSchema::check(path, header.schema, SCHEMA)?;
                contents.has_header = true;
            }
            Err(reason) => {
                let line = index + 1;
                tracing::warn!(path = %path.display(), line, reason, "skipped a damaged journal line");
                contents.damaged_lines.push(line);
            }
        }
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
    /// Reads the journal at `path`, or starts one.
    ///
    /// # Errors
    /// The file cannot be read or created, or has a newer schema; then it was not touched.
    pub fn open(path: &Path) -> Result<(Self, Contents), JournalError> {
        let contents = read(path)?;
        let file = OpenOptions::new().append(true).create(true).open(path).context("open", path)?;
        let mut journal = Self { path: path.into(), file, at_line_start: contents.ends_in_newline };
        if !contents.has_header {
            let header = format!(r#"{{"format":"swiglu-tune journal","schema":{SCHEMA}}}"#);
            journal.write_synced(&encode("header", &header))?;
            path.parent().map_or(Ok(()), sync_dir)?;
        }
        Ok((journal, contents))
    }

    /// Appends records; when this returns `Ok`, they survive a crash of the process or the machine.
    ///
    /// # Errors
    /// A record cannot be encoded (nothing is written), or the file cannot be written or synced.
    pub fn append(&mut self, records: &[Record]) -> Result<(), JournalError> {
        let mut lines = String::new();
        for record in records {
            lines += &encode("record", &record.to_json()?);
        }
        Ok(self.write_synced(&lines)?)
    }

    fn write_synced(&mut self, lines: &str) -> Result<(), FileError> {
        // A torn line, from a crash or from a write that failed half way, keeps its own line.
        let text = if self.at_line_start { lines.to_owned() } else { format!("\n{lines}") };
        self.at_line_start = false;
        self.file.write_all(text.as_bytes()).context("append to", &self.path)?;
        self.at_line_start = true;
        self.file.sync_data().context("sync", &self.path)
    }
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

fn decode(line: &[u8]) -> Result<Line, String> {
    let (crc, kind, json) = split(line).ok_or("not of the form of a journal line")?;
    if crc32fast::hash(json.as_bytes()) != crc {
        return Err("the checksum does not match".into());
    }
    match kind {
        "header" => serde_json::from_str(json).map(Line::Header),
        "record" => serde_json::from_str(json).map(Line::Record),
        _ => return Err(format!("unknown kind of line `{kind}`")),
    }
    .map_err(|error| error.to_string())
}

fn split(line: &[u8]) -> Option<(u32, &str, &str)> {
    let rest = str::from_utf8(line).ok()?.strip_prefix("{\"crc32\":\"")?;
    let (crc, rest) = rest.split_once("\",\"")?;
    let (kind, rest) = rest.split_once("\":")?;
    Some((u32::from_str_radix(crc, 16).ok()?, kind, rest.strip_suffix('}')?))
}
