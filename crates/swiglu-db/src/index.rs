//! `index.sled`: the journal's records by (key, config). Disposable: whatever sled makes of it, the
//! journal can build it again.
//!
//! sled 0.34.7 may panic, fail or lose records without a word when a bit on its disk has flipped, so
//! its contents are compared with the journal's at every open and its calls are fenced.

use crate::error::{Context, FileError};
use crate::files::move_aside;
use std::any::Any;
use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::mem::ManuallyDrop;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Name of the directory in a tuning directory.
const DIR_NAME: &str = "index.sled";

/// A few thousand records of less than 1 KiB.
const CACHE_BYTES: u64 = 16 << 20;

/// The system may release the lock of a killed process a moment after its death.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// What the index should hold, in its order.
pub(crate) type Entries = BTreeMap<Vec<u8>, Vec<u8>>;

/// sled failed in a way that opening again repairs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[error("the index `{}` failed: {reason}; run again to rebuild it from the journal, nothing is lost", path.display())]
pub struct IndexError {
    /// The sled directory.
    pub path: PathBuf,
    /// What sled reported.
    pub reason: String,
}

/// A process that the tuning lock should have kept out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[error("another process works in `{}` without holding the tuning lock; wait for it or end it, and leave tune.lock in place",
    path.display())]
pub struct IndexBusy {
    /// The sled directory.
    pub path: PathBuf,
}

/// Why there is no index.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error(transparent)]
    Busy(#[from] IndexBusy),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Index(#[from] IndexError),
}

/// An open index.
#[derive(Debug)]
pub(crate) struct Index {
    db: sled::Db,
    path: PathBuf,
}

/// What became of the index that was there.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) index: Index,
    /// Where it was moved to, unless it holds what it should.
    pub(crate) kept: Option<PathBuf>,
    /// What it held in place of that; nothing where it did not open whole.
    pub(crate) found: Entries,
}

/// Why an index is of no use, and what it holds all the same.
struct Useless {
    reason: String,
    found: Entries,
}

impl Index {
    /// Opens the index in `dir`, which then holds exactly `entries`. An index that cannot be opened or
    /// holds anything else is moved aside first; any index is, if it is wanted `anew`.
    pub(crate) fn open(dir: &Path, entries: &Entries, anew: bool) -> Result<Opened, OpenError> {
        let path = dir.join(DIR_NAME);
        let (mut kept, mut found) = (None, Entries::new());
        if fs::symlink_metadata(&path).is_ok() {
            let opened = remove_unfinished_snapshots(&path).map_err(OpenError::from);
            let opened = match opened.and_then(|()| open_equal(&path, entries)) {
                // What is wanted anew need not be ours to open.
                Err(OpenError::File(error)) if anew && error.cause.kind() == io::ErrorKind::PermissionDenied => {
                    Err(Useless { reason: error.to_string(), found: Entries::new() })
                }
                opened => opened?,
            };
            match opened {
                Ok(db) if !anew => return Ok(Opened { index: Self { db, path }, kept, found }),
                Ok(db) => {
                    drop(db);
                    kept = Some(move_aside(&path, "old")?);
                }
                Err(useless) => {
                    let aside = move_aside(&path, if anew { "old" } else { "corrupt" })?;
                    let reason = useless.reason;
                    tracing::warn!(%reason, kept = %aside.display(), "rebuilding the index from the journal");
                    (kept, found) = (Some(aside), useless.found);
                }
            }
        }
        let fresh = quietly(|| open_sled(&path)).and_then(|opened| opened.map_err(reason));
        let index = Self { db: fresh.map_err(|reason| IndexError { path: path.clone(), reason })?, path };
        index.write(entries)?;
        Ok(Opened { index, kept, found })
    }

    /// Fails while another process has the index in `dir` open, whatever became of the tuning lock. sled locks this file.
    pub(crate) fn must_be_free(dir: &Path) -> Result<(), OpenError> {
        let path = dir.join(DIR_NAME);
        // None, or a damaged one: opening it will tell.
        let Ok(file) = File::open(path.join("db")) else { return Ok(()) };
        let give_up = Instant::now() + LOCK_PATIENCE;
        while let Err(TryLockError::WouldBlock) = file.try_lock() {
            if Instant::now() >= give_up {
                return Err(IndexBusy { path }.into());
            }
            thread::sleep(LOCK_PAUSE);
        }
        // Where the lock was not taken there is none to give back.
        let _ = file.unlock();
        Ok(())
    }

    /// How the index in `dir` differs from `entries`, in words, without setting it aside.
    pub(crate) fn difference(dir: &Path, entries: &Entries) -> Result<Option<String>, OpenError> {
        let path = dir.join(DIR_NAME);
        if fs::symlink_metadata(&path).is_err() {
            return Ok(Some("it is missing".into()));
        }
        remove_unfinished_snapshots(&path)?;
        Ok(open_equal(&path, entries)?.err().map(|useless| useless.reason))
    }

    /// Inserts and flushes.
    pub(crate) fn write(&self, entries: &Entries) -> Result<(), IndexError> {
        self.fenced(|db| {
            for (key, value) in entries {
                db.insert(key, value.as_slice())?;
            }
            db.flush().map(drop)
        })
    }

    /// The value of one key.
    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        self.fenced(|db| Ok(db.get(key)?.map(|value| value.to_vec())))
    }

    /// The values of all keys that begin with `prefix`, in the order of the keys.
    pub(crate) fn scan(&self, prefix: &[u8]) -> Result<Vec<Vec<u8>>, IndexError> {
        self.fenced(|db| db.scan_prefix(prefix).values().map(|value| Ok(value?.to_vec())).collect())
    }

    /// A call of sled whose panic becomes an error.
    fn fenced<T>(&self, call: impl FnOnce(&sled::Db) -> sled::Result<T>) -> Result<T, IndexError> {
        // After a panic nothing of the index is used again but what the next open has compared.
        panic::catch_unwind(AssertUnwindSafe(|| call(&self.db)))
            .map_err(panic_message)
            .and_then(|result| result.map_err(reason))
            .map_err(|reason| IndexError { path: self.path.clone(), reason })
    }
}

/// Opens the sled directory at `path` and compares. The inner `Err` says why it is of no use; the outer
/// one is a failure that a rebuild would meet again.
fn open_equal(path: &Path, entries: &Entries) -> Result<Result<sled::Db, Useless>, OpenError> {
    let useless = |reason| Ok(Err(Useless { reason, found: Entries::new() }));
    let opened = quietly(|| {
        // Leaked when the comparison panics: a second panic, in its drop, would end the process.
        let db = ManuallyDrop::new(open_sled(path)?);
        let found = all(&db)?;
        Ok((ManuallyDrop::into_inner(db), found))
    });
    match opened {
        Ok(Ok((db, found))) if found == *entries => Ok(Ok(db)),
        Ok(Ok((_, found))) => Ok(Err(Useless { reason: "its records are not those of the journal".into(), found })),
        Ok(Err(error)) if is_locked(&error) => Err(IndexBusy { path: path.into() }.into()),
        Ok(Err(sled::Error::Io(cause))) if is_environment(cause.kind()) => {
            Err(FileError { action: "open the index", path: path.into(), cause }.into())
        }
        Ok(Err(error)) => useless(reason(error)),
        Err(panic) => useless(format!("sled panicked: {panic}")),
    }
}

fn open_sled(path: &Path) -> sled::Result<sled::Db> {
    let config = sled::Config::new().path(path).cache_capacity(CACHE_BYTES).flush_every_ms(None);
    let give_up = Instant::now() + LOCK_PATIENCE;
    loop {
        match config.open() {
            Err(error) if is_locked(&error) && Instant::now() < give_up => thread::sleep(LOCK_PAUSE),
            result => return result,
        }
    }
}

fn all(db: &sled::Db) -> sled::Result<Entries> {
    db.iter().map(|found| found.map(|(key, value)| (key.to_vec(), value.to_vec()))).collect()
}

/// sled prints the innards of an I/O error.
fn reason(error: sled::Error) -> String {
    match error {
        sled::Error::Io(cause) => cause.to_string(),
        other => other.to_string(),
    }
}

/// sled reports a held lock as an error of no particular kind.
fn is_locked(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(cause) if cause.to_string().contains("could not acquire lock"))
}

/// Failures of the disk or its permissions, not of the index.
fn is_environment(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(kind, PermissionDenied | QuotaExceeded | ReadOnlyFilesystem | StorageFull)
}

/// A crash while sled wrote its own snapshot leaves a file that it takes for the newest one and rejects.
fn remove_unfinished_snapshots(path: &Path) -> Result<(), FileError> {
    // Not a directory: sled will say so, and it is moved aside.
    let Ok(files) = fs::read_dir(path) else { return Ok(()) };
    for file in files.flatten() {
        let name = file.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            fs::remove_file(file.path()).context("remove", &file.path())?;
        }
    }
    Ok(())
}

/// Runs `call`; a panic becomes its message and is not printed. Panics of other threads still are.
fn quietly<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Mutex<()> = Mutex::new(());
    let _one_at_a_time = HOOK.lock().unwrap_or_else(PoisonError::into_inner);
    // The hook cannot be changed while this thread unwinds.
    if thread::panicking() {
        return panic::catch_unwind(AssertUnwindSafe(call)).map_err(panic_message);
    }
    let previous = Arc::new(panic::take_hook());
    let (others, this) = (Arc::clone(&previous), thread::current().id());
    panic::set_hook(Box::new(move |info| {
        let current = thread::current();
        let is_sled = current.name().is_some_and(|name| name.starts_with("sled"));
        if current.id() != this && !is_sled {
            others(info);
        }
    }));
    let result = panic::catch_unwind(AssertUnwindSafe(call)).map_err(panic_message);
    drop(panic::take_hook());
    if let Some(previous) = Arc::into_inner(previous) {
        panic::set_hook(previous);
    }
    result
}

fn panic_message(payload: Box<dyn Any + Send>) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message").into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// The panic hook is the whole process's.
    static ONE_TEST_AT_A_TIME: Mutex<()> = Mutex::new(());

    #[test]
    fn only_panics_of_the_call_are_silenced_and_the_hook_comes_back() {
        static PRINTED: AtomicUsize = AtomicUsize::new(0);
        let _alone = ONE_TEST_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let printed = || PRINTED.load(Ordering::SeqCst);
        let original = panic::take_hook();
        panic::set_hook(Box::new(|_| {
            PRINTED.fetch_add(1, Ordering::SeqCst);
        }));
        let from_four_threads = thread::scope(|scope| {
            let threads = [(); 4].map(|()| scope.spawn(|| quietly(|| -> u32 { panic!("bit {}", 7) })));
            threads.map(|thread| thread.join().unwrap())
        });
        let after_quiet = printed();
        let beside = quietly(|| thread::spawn(|| panic!("elsewhere")).join().is_err());
        let after_other_thread = printed();
        let outside = panic::catch_unwind(|| panic!("outside")).is_err();
        let after_outside = printed();
        panic::set_hook(original);

        assert_eq!(from_four_threads, [(); 4].map(|()| Err("bit 7".to_owned())));
        assert_eq!((beside, outside), (Ok(true), true));
        assert_eq!([after_quiet, after_other_thread, after_outside], [0, 1, 2]);
    }

    #[test]
    fn a_panic_inside_a_call_of_sled_is_an_error_that_names_the_index() {
        let _alone = ONE_TEST_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().unwrap();
        let index = Index::open(dir.path(), &Entries::new(), false).unwrap().index;
        let error = index.fenced(|_| -> sled::Result<()> { std::panic::resume_unwind(Box::new("Uninitialized")) });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("index.sled` failed: Uninitialized; run again"), "{error}");
    }
}
