//! The tables compiled into the crate, from `tuning-db/*.toml`.
//!
//! They are text that is read in reviews: one file per device class, sorted by key, numbers rounded to
//! what a measurement can tell, so that tuning again makes a small diff.

use crate::error::NewerSchema;
use crate::record::{Device, Environment, InvalidRecord, Measurement, Origin, Outcome, Record, winners};
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use swiglu_kernels::{Config, Problem};

/// The schema this version writes, and the newest it reads.
pub const SCHEMA: u32 = 1;

/// Every shipped table: `("name.toml", include_str!("../tuning-db/name.toml"))`. The link
/// `tuning-db` in this crate lets `cargo package` take the files along.
pub const TABLES: &[(&str, &str)] = &[("nvidia-h200.toml", include_str!("../tuning-db/nvidia-h200.toml"))];

/// Why a table could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShippedError {
    /// The table is from a later version.
    #[error(transparent)]
    NewerSchema(#[from] NewerSchema),
    /// The text is no table of records.
    #[error("`{}` is no tuning table: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What TOML reported, with the line.
        reason: String,
    },
    /// Records of the table that cannot be read.
    #[error("`{}`: {count} of {all} records cannot be read; the first is record {row}: {reason}", path.display())]
    Rows {
        /// The file.
        path: PathBuf,
        /// How many cannot be read.
        count: usize,
        /// How many there are.
        all: usize,
        /// Number of the first of them in the file, from 1.
        row: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A record has no place in a table.
    #[error(transparent)]
    Record(#[from] InvalidRecord),
    /// A value has no TOML form.
    #[error("cannot write the table: {0}")]
    Write(#[from] toml::ser::Error),
}

#[derive(Deserialize)]
struct AnyTable {
    schema: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table<R> {
    #[serde(rename = "schema")]
    _schema: u32,
    device: Device,
    #[serde(default = "Vec::new")]
    record: Vec<R>,
}

#[derive(Deserialize)]
struct Row {
    problem: Problem,
    config: Config,
    measurement: Measurement,
    environment: Environment,
    #[serde(default)]
    origin: Origin,
}

/// Reads one table, every record of it; `path` is named in errors.
///
/// # Errors
/// The text is no TOML of this form, has a newer schema, or a record that cannot be read.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Record>, ShippedError> {
    let (records, unreadable) = read(path, text)?;
    unreadable.map_or(Ok(records), Err)
}

/// Reads what can be read of a table: a record of a family that this version does not know, or that no tuner can have written
/// ([`Record::vet`]), costs no other one. The second part is [`ShippedError::Rows`] where there are such.
///
/// # Errors
/// The text is no TOML of this form, has a newer schema, or has records and none that can be read.
pub fn read(path: &Path, text: &str) -> Result<(Vec<Record>, Option<ShippedError>), ShippedError> {
    let no_table = |error: toml::de::Error| ShippedError::Parse { path: path.into(), reason: error.to_string() };
    let AnyTable { schema } = toml::from_str(text).map_err(no_table)?;
    NewerSchema::check(path, schema, SCHEMA)?;
    let rows = match toml::from_str::<Table<Row>>(text) {
        Ok(Table { device, record, .. }) => record.into_iter().map(|row| row.record(&device)).collect(),
        // One by one takes longer.
        Err(_) => each_row(toml::from_str(text).map_err(no_table)?),
    };
    let all = rows.len();
    let (mut records, mut wrong) = (Vec::with_capacity(all), Vec::new());
    for (at, row) in rows.into_iter().enumerate() {
        match row {
            Ok(record) => records.push(record),
            Err(reason) => wrong.push((at + 1, reason)),
        }
    }
    let count = wrong.len();
    let unreadable =
        wrong.into_iter().next().map(|(row, reason)| ShippedError::Rows { path: path.into(), count, all, row, reason });
    match unreadable {
        Some(none_readable) if records.is_empty() => Err(none_readable),
        unreadable => Ok((records, unreadable)),
    }
}

fn each_row(table: Table<toml::Table>) -> Vec<Result<Record, String>> {
    let row = |row: toml::Table| {
        let row: Row = row.try_into().map_err(|error: toml::de::Error| error.message().to_owned())?;
        row.record(&table.device)
    };
    table.record.into_iter().map(row).collect()
}

impl Row {
    fn record(self, device: &Device) -> Result<Record, String> {
        let Self { problem, config, measurement, environment, origin } = self;
        let outcome = Outcome::Measured(measurement);
        let record = Record { device: device.clone(), problem, config, outcome, environment, origin };
        record.vet().map_err(|why| why.to_string())?;
        Ok(record)
    }
}

/// Writes the table of one device class: of `records`, the fastest of each key measured on it.
///
/// # Errors
/// A record cannot be stored, or has no TOML form.
pub fn export(device: &Device, records: &[Record]) -> Result<String, ShippedError> {
    let mut text = format!(
        "# Written by `swiglu-tune db export`; change it by tuning again.\nschema = {SCHEMA}\ndevice = {}\n",
        inline(device)?
    );
    let of_class = records.iter().filter(|record| record.device.class == device.class).cloned();
    for record in winners(of_class) {
        record.check()?;
        let Some(measurement) = record.measurement() else { continue };
        let rows = [
            ("problem", inline(&record.problem)?),
            ("config", inline(&record.config)?),
            ("measurement", inline(&rounded(measurement))?),
            ("environment", inline(&record.environment)?),
        ];
        text += "\n[[record]]\n";
        for (name, value) in rows {
            // Writing to a `String` does not fail.
            let _ = writeln!(text, "{name} = {value}");
        }
        if record.origin != Origin::Local {
            let _ = writeln!(text, "origin = {}", inline(&record.origin)?);
        }
    }
    Ok(text)
}

fn inline(value: &impl Serialize) -> Result<String, toml::ser::Error> {
    let mut text = String::new();
    value.serialize(toml::ser::ValueSerializer::new(&mut text))?;
    Ok(text)
}

/// Nanoseconds, and three digits of the error.
fn rounded(measurement: &Measurement) -> Measurement {
    let nanoseconds = |us: f64| (us * 1e3).round() / 1e3;
    let &Measurement { median_us, p10_us, p90_us, samples, error, interval_us, repeated, chosen, stand_in } =
        measurement;
    Measurement {
        median_us: nanoseconds(median_us),
        p10_us: nanoseconds(p10_us),
        p90_us: nanoseconds(p90_us),
        samples,
        error: format!("{error:.2e}").parse().unwrap_or(error),
        interval_us: interval_us.map(|bounds| bounds.map(nanoseconds)),
        repeated,
        chosen,
        stand_in,
    }
}
