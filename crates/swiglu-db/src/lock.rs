//! `tune.lock`: one tuner at a time, and a message that says who it is.

use crate::error::{Context, FileError};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The process that holds a lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Process id.
    pub pid: u32,
    /// Name of its machine.
    pub host: String,
    /// UTC date and time it took the lock, RFC 3339.
    pub since: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} on {} since {}", self.pid, self.host, self.since)
    }
}

/// Why the lock could not be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another tuner works in this directory.
    #[error("`{}` is held by {}; wait for that tuner, stop it, or choose another directory",
        path.display(), holder.as_ref().map_or_else(|| "another process".into(), Holder::to_string))]
    Held {
        /// The lock file.
        path: PathBuf,
        /// Who holds it, if it has said so yet.
        holder: Option<Holder>,
    },
    /// The lock file could not be opened, locked or written.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Held as long as it lives; the system releases it however the process ends.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing alone would leave it to a child that was forked and has not reached its `exec`.
        let _ = self.file.unlock();
    }
}

impl Lock {
    /// Takes the lock without waiting.
    pub(crate) fn take(path: &Path) -> Result<Self, LockError> {
        // Not truncated: until the lock is ours the text is the holder's.
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(false).open(path).context("open the lock", path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let holder = fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok());
                return Err(LockError::Held { path: path.into(), holder });
            }
            Err(TryLockError::Error(cause)) => Err(cause).context("lock", path)?,
        }
        let holder = Holder { pid: std::process::id(), host: host(), since: now() };
        let text = serde_json::to_string(&holder).unwrap_or_default();
        file.set_len(0).and_then(|()| file.write_all(text.as_bytes())).context("write", path)?;
        Ok(Self { file })
    }
}

fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").or_else(|_| fs::read_to_string("/etc/hostname"));
    name.map_or_else(|_| "this machine".into(), |name| name.trim().into())
}

fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}
