//! `db`: the tuning database from outside. Text goes in and out in the format of `tuning-db/`.

use crate::log::{emit, notice};
use crate::records::{self, db_dir};
use anyhow::{Context, Result, bail};
use clap::Subcommand;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use swiglu_db::{Device, Origin, Record, Taken, TuningDb, journal, record, shipped, snapshot};
use swiglu_runtime::Options;

#[derive(Debug, Subcommand)]
pub(crate) enum DbCommand {
    /// Print the winners of one device as a table that `tuning-db/` can ship.
    Export {
        /// Class of the device, as `report` prints it [default: the only one there is].
        #[arg(long)]
        device: Option<String>,
    },
    /// Take the records of an exported table.
    ///
    /// Of one key and config the better supported record holds: a mismatch with the oracle before a measurement before
    /// another failure, then more samples, then the later date, then the one that is here. Nothing is deleted, and
    /// what comes in says where it is from. Between origins the better supported winner serves.
    Import {
        /// A table as `db export` prints it.
        file: PathBuf,
    },
    /// Take the records of another database, by the rule of `import`.
    Merge {
        /// Its folder.
        dir: PathBuf,
    },
    /// Say what is wrong, a line each: checksums, index and snapshot against the journal, legality. Exit code 1 if
    /// anything is.
    Verify,
    /// Make index and snapshot anew from the journal; the old index is set aside.
    Rebuild,
    /// Drop from the journal what a later measurement of the same config has replaced.
    Gc,
}

pub(crate) fn run(command: &DbCommand, options: &Options) -> Result<ExitCode> {
    let dir = db_dir(options)?;
    match command {
        DbCommand::Export { device } => export(device.as_deref(), options),
        DbCommand::Import { file } => import(file, &dir),
        DbCommand::Merge { dir: other } => merge(other, &dir),
        DbCommand::Verify => verify(&dir),
        DbCommand::Rebuild => rebuild(&dir),
        DbCommand::Gc => gc(&dir),
    }
}

fn export(class: Option<&str>, options: &Options) -> Result<ExitCode> {
    // By class: a name is a label, and one class may have had two.
    let mut devices: BTreeMap<String, (Device, Vec<Record>)> = BTreeMap::new();
    for record in record::winners(records::read(options)?) {
        let of_class = devices.entry(record.device.class.clone());
        of_class.or_insert_with(|| (record.device.clone(), Vec::new())).1.push(record);
    }
    devices.retain(|device, _| class.is_none_or(|class| class == device));
    let mut devices = devices.into_values();
    match (devices.next(), devices.next()) {
        (Some((device, records)), None) => emit(shipped::export(&device, &records)?)?,
        (None, _) => bail!("nothing is tuned for {}", class.unwrap_or("any device")),
        (Some(_), Some(_)) => bail!("several devices are tuned; choose one with --device CLASS"),
    }
    Ok(ExitCode::SUCCESS)
}

fn import(file: &Path, dir: &Path) -> Result<ExitCode> {
    let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let (records, unreadable) = shipped::read(file, &text)?;
    if let Some(error) = unreadable {
        tracing::warn!("{error}; those are left out");
    }
    take(dir, records, &Origin::Import(name_of(file)))
}

fn merge(other: &Path, dir: &Path) -> Result<ExitCode> {
    let path = other.join(journal::FILE_NAME);
    if !is_there(&path)? {
        bail!("there is no {}; name the folder of a tuning database", path.display());
    }
    let contents = journal::read(&path)?;
    // What an older measurement said there is told by the one that replaced it.
    let records: Vec<Record> = contents.current().cloned().collect();
    take(dir, records, &Origin::Merge(name_of(other)))
}

/// The last part of a path, which is all that other machines should learn of it.
fn name_of(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.into());
    path.file_name().map_or_else(|| "/".into(), |name| name.to_string_lossy().into_owned())
}

fn take(dir: &Path, records: Vec<Record>, origin: &Origin) -> Result<ExitCode> {
    let mut db = TuningDb::open(dir).context("opening the tuning database")?;
    let Taken { added, replaced, kept, refused } = db.take(records, origin)?;
    db.publish().context("publishing the snapshot")?;
    emit(format_args!(
        "{added} added, {replaced} replaced, {kept} were no better than what is here, {refused} refused as illegal or impossible\n"
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn verify(dir: &Path) -> Result<ExitCode> {
    must_exist(dir)?;
    let findings = swiglu_db::verify(dir)?;
    findings.iter().try_for_each(|finding| emit(format_args!("{finding}\n")))?;
    notice(format!(
        "{}: {}",
        dir.display(),
        if findings.is_empty() { "nothing is wrong" } else { "not as it should be" }
    ));
    Ok(if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn rebuild(dir: &Path) -> Result<ExitCode> {
    must_exist(dir)?;
    let (db, kept) = TuningDb::rebuild(dir)?;
    emit(format_args!(
        "index and snapshot are made anew: {} records, {} winners\n",
        db.records()?.len(),
        db.winners()?.len()
    ))?;
    if let Some(kept) = kept {
        emit(format_args!("the old index is {}\n", kept.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn gc(dir: &Path) -> Result<ExitCode> {
    must_exist(dir)?;
    let mut db = TuningDb::open(dir)?;
    let dropped = db.drop_superseded()?;
    emit(format_args!("{dropped} superseded records dropped, {} are left\n", db.records()?.len()))?;
    Ok(ExitCode::SUCCESS)
}

/// A mistyped folder must not become a database.
fn must_exist(dir: &Path) -> Result<()> {
    for name in [journal::FILE_NAME, snapshot::FILE_NAME] {
        if is_there(&dir.join(name))? {
            return Ok(());
        }
    }
    bail!("there is no tuning database in {}; run `swiglu-tune --gpu auto` or name it with --db DIR", dir.display())
}

/// A folder that may not be entered is not an empty one.
fn is_there(path: &Path) -> Result<bool> {
    path.try_exists()
        .with_context(|| format!("cannot look for {}; name a folder of your own with --db DIR", path.display()))
}
