//! Records as any process may read them: from the journal, without the writer's lock.

use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::path::PathBuf;
use swiglu_db::{Match, Record, TuningTable, journal};
use swiglu_kernels::{Problem, Target};
use swiglu_runtime::{Choice, Options, library, runtime, serving_choice};

/// The tuning database's folder.
pub(crate) fn db_dir(options: &Options) -> Result<PathBuf> {
    options.db_dir().context("there is no home folder for the tuning database; give --db DIR")
}

/// Every record, the latest of each config, in the order of the keys; none where nothing was tuned.
pub(crate) fn read(options: &Options) -> Result<Vec<Record>> {
    let path = db_dir(options)?.join(journal::FILE_NAME);
    let contents = journal::read(&path).context("reading the tuning database")?;
    let mut records: Vec<Record> = contents.current().cloned().collect();
    records.sort_by_cached_key(|record| (record.key(), record.config));
    Ok(records)
}

/// What a prepared plan launches for `problem`, by the M it was tuned for; `None` where nothing tuned serves.
pub(crate) fn serving(
    table: &TuningTable,
    class: &str,
    problem: &Problem,
    target: Target,
) -> Option<(u32, Record, Match)> {
    let anchors = table.anchors(class, problem, target);
    let mut choices: Vec<Choice> =
        anchors.iter().map(|(m, record, matched)| Choice::tuned(*m, record, *matched)).collect();
    let names_library = choices.iter().any(|choice| choice.config.family().is_library());
    if let (Target::Gpu(arch), true) = (target, names_library && library::cublaslt().is_err()) {
        choices = runtime::without_library(&choices, class, problem, arch).ok()?;
    }
    let serving = serving_choice(class, problem, &choices)?;
    let (anchor, mut record, matched) = anchors.into_iter().find(|(m, ..)| *m == serving.anchor)?;
    record.config = serving.config;
    Some((anchor, record, matched))
}

/// Says, where a database has records and none is of this device, whose they are.
pub(crate) fn foreign(records: &[Record], class: &str) -> Option<String> {
    let others: BTreeSet<&str> = records.iter().map(|record| record.device.name.as_str()).collect();
    let has_ours = records.iter().any(|record| record.device.class == class);
    (!has_ours && !others.is_empty()).then(|| {
        let others = others.into_iter().collect::<Vec<_>>().join(", ");
        format!("its records are of other devices ({others}), none is of this one ({class})")
    })
}
