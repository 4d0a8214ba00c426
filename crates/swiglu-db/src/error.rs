//! Errors that more than one file format shares.

use std::io;
use std::path::{Path, PathBuf};

/// A file operation that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[error("cannot {action} `{}`: {cause}{}", path.display(), remedy(cause.kind()))]
pub struct FileError {
    /// What was tried, e.g. `write`.
    pub action: &'static str,
    /// With which file or directory.
    pub path: PathBuf,
    /// What the system answered.
    pub cause: io::Error,
}

/// What the reader of the message can do about it.
fn remedy(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; check its owner and mode, or choose another directory"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some space and run again",
        io::ErrorKind::NotADirectory => "; part of this path is a file, choose another directory",
        _ => "",
    }
}

/// Adds to an [`io::Result`] what was tried and where.
pub(crate) trait Context<T> {
    /// `Err` becomes a [`FileError`].
    fn context(self, action: &'static str, path: &Path) -> Result<T, FileError>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, FileError> {
        self.map_err(|cause| FileError { action, path: path.into(), cause })
    }
}

/// A file written by a later version of this project.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[error("`{}` has schema {found}, this version reads up to {known}; update swiglu-tune (the file was not touched)",
    path.display())]
pub struct NewerSchema {
    /// The file.
    pub path: PathBuf,
    /// Its schema.
    pub found: u32,
    /// The newest schema this version reads.
    pub known: u32,
}

impl NewerSchema {
    /// Refuses a schema later than `known`.
    pub(crate) fn check(path: &Path, found: u32, known: u32) -> Result<(), Self> {
        if found <= known { Ok(()) } else { Err(Self { path: path.into(), found, known }) }
    }
}
