//! `report`: what was tuned, as a table, JSON, CSV, Markdown or a page.

mod data;
mod html;
mod roofline;
mod sheet;
pub(crate) mod svg;

use crate::log::{emit, notice};
use crate::records;
use anyhow::{Context, Result};
use clap::Args;
use data::{DeviceReport, Row, TIE};
use roofline::Roofline;
use std::path::PathBuf;
use std::process::ExitCode;
use swiglu_db::Record;
use swiglu_runtime::Options;
use swiglu_runtime::gpu::Gpu;

pub(crate) use data::{default_config, geometric_mean, median_us, stale};

#[derive(Debug, Clone, Args)]
pub(crate) struct ReportArgs {
    /// Print `{"records": [...]}`, every record.
    #[arg(long, group = "format")]
    json: bool,
    /// Print every record as CSV; `serves` says which ones programs are given.
    #[arg(long, group = "format")]
    csv: bool,
    /// Print Markdown: the winners and what is to be said of them.
    #[arg(long, group = "format")]
    markdown: bool,
    /// Write one self-contained page with plots.
    #[arg(long, group = "format", value_name = "FILE")]
    html: Option<PathBuf>,
    /// Results of `bench --json`, for the peer's times; may be given several times.
    #[arg(long, value_name = "FILE.json")]
    bench: Vec<PathBuf>,
    /// Arithmetic peak for the roofline, where the GPU is not in this machine.
    #[arg(long, value_name = "TFLOP/s", value_parser = positive)]
    peak_tflops: Option<f64>,
    /// Only problems of these intermediate sizes.
    #[arg(long, value_delimiter = ',', value_name = "N,...")]
    n: Vec<u32>,
    /// Only problems of these hidden sizes.
    #[arg(long, value_delimiter = ',', value_name = "K,...")]
    k: Vec<u32>,
}

impl ReportArgs {
    fn wants(&self, record: &Record) -> bool {
        let among = |sizes: &[u32], size: u32| sizes.is_empty() || sizes.contains(&size);
        among(&self.n, record.problem.n) && among(&self.k, record.problem.k)
    }
}

/// A finite number above 0.
fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| "give a number above 0".into())
}

/// Prints the winners (table, Markdown, page) or every record (JSON, CSV).
pub(crate) fn run(args: &ReportArgs, options: &Options) -> Result<ExitCode> {
    let records = wanted(args, options)?;
    if args.json {
        let records = serde_json::json!({ "records": records });
        emit(serde_json::to_string_pretty(&records)? + "\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.csv {
        emit(sheet::csv(&records)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let here = Gpu::open(0).ok();
    let devices = data::devices(records, &data::peers(&args.bench)?, |device| {
        Roofline::of(device, here.as_ref(), args.peak_tflops)
    });
    if let Some(path) = &args.html {
        std::fs::write(path, html::page(&devices)?).with_context(|| format!("writing {}", path.display()))?;
        emit(format_args!("{}\n", path.display()))?;
    } else if args.markdown {
        emit(markdown(&devices))?;
    } else {
        for device in devices.iter().filter(|device| !device.rows.is_empty()) {
            emit(format_args!("{}\n{}\n\n", one_line(&heading(device)), table(device)))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The records to report; says so on stderr where there are none.
fn wanted(args: &ReportArgs, options: &Options) -> Result<Vec<Record>> {
    let (mut records, dir) = (records::read(options)?, records::db_dir(options)?);
    if records.is_empty() {
        notice(format!("nothing is tuned in {}; run `swiglu-tune --gpu auto`", dir.display()));
        return Ok(records);
    }
    records.retain(|record| args.wants(record));
    if records.is_empty() {
        notice(format!("nothing in {} is of the sizes that --n and --k name", dir.display()));
    }
    Ok(records)
}

fn heading(device: &DeviceReport) -> String {
    let environment = device.rows.first().map(|row| row.winner.environment.clone()).unwrap_or_default();
    format!(
        "{} ({}), driver {}, NVRTC {}, {}",
        device.device.name,
        device.device.class,
        or_dash(&environment.driver),
        or_dash(&environment.nvrtc),
        or_dash(&environment.date)
    )
}

const COLUMNS: [&str; 17] = [
    "op",
    "dtype",
    "weights",
    "M",
    "N",
    "K",
    "config",
    "median us",
    "p10-p90",
    "TFLOP/s",
    "GB/s",
    "of roofline",
    "default/ours",
    "peer/ours",
    "ties",
    "stale",
    "error",
];

/// An empty table for a terminal, which Markdown takes too.
pub(crate) fn terminal_table<const COUNT: usize>(header: [&str; COUNT]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(header);
    table
}

fn table(device: &DeviceReport) -> comfy_table::Table {
    let mut table = terminal_table(COLUMNS);
    for row in &device.rows {
        table.add_row(cells(row, &device.roofline));
    }
    table
}

/// What a row shows, in the order of [`COLUMNS`].
fn cells(row: &Row, roofline: &Roofline) -> [String; 17] {
    let problem = row.problem();
    let (p10_us, p90_us, error) =
        row.winner.measurement().map_or((0.0, 0.0, 0.0), |measured| (measured.p10_us, measured.p90_us, measured.error));
    let share = roofline.bound(problem).map(|(us, by)| format!("{:.0} % of {by}", 100.0 * us / row.median_us));
    [
        problem.op.to_string(),
        problem.dtype.to_string(),
        problem.weight_major.to_string(),
        problem.m.to_string(),
        problem.n.to_string(),
        problem.k.to_string(),
        row.winner.config.to_string(),
        format!("{:.1}", row.median_us),
        format!("{p10_us:.1}-{p90_us:.1}"),
        format!("{:.1}", row.tflops()),
        format!("{:.0}", row.gigabytes_per_second()),
        share.unwrap_or_else(|| "-".into()),
        ratio(row.over_default()),
        ratio(row.peer.map(|peer| peer.over_gemm_and_gate)),
        row.ties().to_string(),
        if row.stale.is_some() { "yes" } else { "no" }.into(),
        format!("{error:.1e}"),
    ]
}

fn ratio(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.3}"))
}

/// The figures of one device in words, those that flatter nobody included.
fn facts(device: &DeviceReport) -> Vec<(&'static str, String)> {
    let summary = device.summary();
    let of = |count: usize| format!("{count} of {}", summary.problems);
    vec![
        ("Problems tuned", summary.problems.to_string()),
        ("Problems without a working candidate", device.without_winner.len().to_string()),
        ("Candidates with a time", summary.candidates.to_string()),
        ("Candidates without", summary.failed.to_string()),
        ("Untuned default over ours, geometric mean", ratio(summary.over_default)),
        ("Default not measured", of(summary.without_default)),
        (
            "Tuning gained less than 1 %",
            format!("{} of {}", summary.not_helped, summary.problems - summary.without_default),
        ),
        ("cuBLASLt's GEMM alone over ours", ratio(summary.over_gemm)),
        ("cuBLASLt's GEMM and gate over ours", ratio(summary.over_gemm_and_gate)),
        ("cuBLASLt's GEMM and gate are faster", of(summary.lost_to_peer)),
        ("Another config within 1 % of the winner", of(summary.tied)),
        ("Stale", of(summary.stale)),
    ]
}

fn markdown(devices: &[DeviceReport]) -> String {
    let mut text = String::from("# What was tuned\n");
    for device in devices {
        text += &format!("\n## {}\n\n{}\n\n", plain(&device.device.name), plain(&heading(device)));
        for (what, value) in facts(device) {
            text += &format!("- {what}: {value}\n");
        }
        text += &format!("\n{}\n", table(device));
    }
    text
}

/// The character, or a mark in place of one that a terminal would obey or that no page may hold.
fn visible(c: char) -> char {
    if c.is_control() || matches!(c, '\u{FFFE}' | '\u{FFFF}') { char::REPLACEMENT_CHARACTER } else { c }
}

/// Text from elsewhere as a terminal may have it: on one line, with nothing that it would obey.
pub(crate) fn one_line(text: &str) -> String {
    text.chars().map(visible).collect()
}

/// On one line, without what Markdown or HTML would read.
fn plain(text: &str) -> String {
    one_line(text)
        .replace('\\', "\\\\")
        .replace('|', "\\|")
        .replace('`', "\\`")
        .replace('<', "&lt;")
        .replace('#', "\\#")
}

fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}
