//! Every record as a line of a sheet.

use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeSet;
use swiglu_db::{Outcome, Record, record};

/// The columns, in their order.
#[derive(Serialize)]
struct Line<'a> {
    device_class: &'a str,
    device: &'a str,
    op: &'static str,
    activation: &'static str,
    dtype: &'static str,
    weight_major: &'static str,
    alignment: u32,
    m: u32,
    n: u32,
    k: u32,
    config: String,
    /// Whether programs are given this config.
    serves: bool,
    median_us: Option<f64>,
    p10_us: Option<f64>,
    p90_us: Option<f64>,
    low_us: Option<f64>,
    high_us: Option<f64>,
    samples: Option<u32>,
    repeated: Option<u32>,
    chosen: Option<bool>,
    error: Option<f64>,
    tflops: Option<f64>,
    failed_stage: Option<&'a str>,
    failed_reason: Option<&'a str>,
    nvrtc: &'a str,
    driver: &'a str,
    version: &'a str,
    source_digest: &'a str,
    registers: u32,
    sm_mhz: u32,
    power_w: u32,
    date: &'a str,
    origin: String,
}

/// A heading and a line per record.
pub(crate) fn csv(records: &[Record]) -> Result<String> {
    let winners = record::winners(records.iter().cloned());
    let serving: BTreeSet<_> = winners.iter().map(|winner| (winner.key(), winner.config)).collect();
    let mut writer = csv::Writer::from_writer(Vec::new());
    for record in records {
        writer.serialize(line(record, serving.contains(&(record.key(), record.config))))?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

fn line(record: &Record, serves: bool) -> Line<'_> {
    let (problem, environment) = (&record.problem, &record.environment);
    let (failed_stage, failed_reason) = match &record.outcome {
        Outcome::Measured(_) => (None, None),
        Outcome::Failed { stage, reason } => (Some(stage.as_str()), Some(reason.as_str())),
    };
    let measured = record.measurement();
    Line {
        device_class: &record.device.class,
        device: &record.device.name,
        op: problem.op.name(),
        activation: problem.activation.name(),
        dtype: problem.dtype.name(),
        weight_major: problem.weight_major.name(),
        alignment: problem.alignment,
        m: problem.m,
        n: problem.n,
        k: problem.k,
        config: record.config.to_string(),
        serves,
        median_us: measured.map(|measured| measured.median_us),
        p10_us: measured.map(|measured| measured.p10_us),
        p90_us: measured.map(|measured| measured.p90_us),
        low_us: measured.and_then(|measured| measured.interval_us).map(|[low, _]| low),
        high_us: measured.and_then(|measured| measured.interval_us).map(|[_, high]| high),
        samples: measured.map(|measured| measured.samples),
        repeated: measured.map(|measured| measured.repeated),
        chosen: measured.map(|measured| measured.chosen),
        error: measured.map(|measured| measured.error),
        tflops: measured.map(|measured| problem.flops() / measured.median_us * 1e-6),
        failed_stage,
        failed_reason,
        nvrtc: &environment.nvrtc,
        driver: &environment.driver,
        version: &environment.version,
        source_digest: &environment.source_digest,
        registers: environment.registers,
        sm_mhz: environment.sm_mhz,
        power_w: environment.power_w,
        date: &environment.date,
        origin: record.origin.to_string(),
    }
}
