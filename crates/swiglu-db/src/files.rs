//! How files of the tuning directory are made durable and set aside.

use crate::error::{Context, FileError};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Makes names created, renamed or removed in `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), FileError> {
    // Only Unix opens directories as files; elsewhere the rename itself has to do.
    if cfg!(unix) {
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        std::fs::File::open(dir).and_then(|dir| dir.sync_all()).context("sync", dir)?;
    }
    Ok(())
}

/// Replaces the file at `path` so that a reader or a crash meets the old text or the new one, never a part.
/// Only the holder of the tuning lock calls this, so that one temporary name is enough; what a crash
/// leaves there is overwritten next time.
pub(crate) fn replace_file(path: &Path, text: &[u8]) -> Result<(), FileError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(text)?;
        file.sync_all()
    });
    written.context("write", &temporary)?;
    fs::rename(&temporary, path).context("replace", path)?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// Renames `path` to `<name>.<why>-<time>`, a name that is free.
pub(crate) fn move_aside(path: &Path, why: &str) -> Result<PathBuf, FileError> {
    let mut stem = path.as_os_str().to_owned();
    stem.push(format!(".{why}-{}", jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ")));
    let mut kept = PathBuf::from(&stem);
    for attempt in 2.. {
        if fs::symlink_metadata(&kept).is_err() {
            break;
        }
        let mut numbered = stem.clone();
        numbered.push(format!("-{attempt}"));
        kept = PathBuf::from(numbered);
    }
    fs::rename(path, &kept).context("move aside", path)?;
    Ok(kept)
}
