//! Records as any process may read them: from the journal, without the writer's lock.

use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use swiglu_db::{Device, Record, journal, record, shipped};
use swiglu_runtime::Options;

/// The tuning database's folder.
pub(crate) fn db_dir(options: &Options) -> Result<PathBuf> {
    options.db_dir().context("there is no home folder for the tuning database; give --db DIR")
}

/// Every record, the latest of each config, in the order of the keys; none where nothing was tuned.
pub(crate) fn read(options: &Options) -> Result<Vec<Record>> {
    let path = db_dir(options)?.join(journal::FILE_NAME);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let contents = journal::read(&path).context("reading the tuning database")?;
    let latest: BTreeMap<_, _> =
        contents.records.into_iter().map(|record| ((record.key(), record.config), record)).collect();
    Ok(latest.into_values().collect())
}

/// Prints the winners of one device in the format of `tuning-db/`.
pub(crate) fn export(class: Option<&str>, options: &Options) -> Result<ExitCode> {
    let mut devices: BTreeMap<Device, Vec<Record>> = BTreeMap::new();
    for record in record::winners(read(options)?) {
        devices.entry(record.device.clone()).or_default().push(record);
    }
    devices.retain(|device, _| class.is_none_or(|class| class == device.class));
    let mut devices = devices.into_iter();
    match (devices.next(), devices.next()) {
        (Some((device, records)), None) => print!("{}", shipped::export(&device, &records)?),
        (None, _) => bail!("nothing is tuned for {}", class.unwrap_or("any device")),
        (Some(_), Some(_)) => bail!("several devices are tuned; choose one with --device CLASS"),
    }
    Ok(ExitCode::SUCCESS)
}
