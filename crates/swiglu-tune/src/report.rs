//! `report`: what was tuned, as a table or as JSON.

use crate::records;
use anyhow::Result;
use std::process::ExitCode;
use swiglu_db::{Record, record};
use swiglu_runtime::Options;
use swiglu_runtime::gpu::Gpu;

/// Ceilings of the device that records were made on, when it is this one.
struct Roofline {
    class: String,
    bytes_per_second: f64,
}

/// Prints the winners (table) or every record (JSON).
pub(crate) fn run(json: bool, options: &Options) -> Result<ExitCode> {
    let records = records::read(options)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&serde_json::json!({ "records": records }))?);
        return Ok(ExitCode::SUCCESS);
    }
    let winners = record::winners(records);
    if winners.is_empty() {
        eprintln!("nothing is tuned in {}; run `swiglu-tune --gpu auto`", records::db_dir(options)?.display());
        return Ok(ExitCode::SUCCESS);
    }
    let roofline =
        Gpu::open(0).ok().map(|gpu| Roofline { class: gpu.device.class.clone(), bytes_per_second: gpu.peak_bandwidth });
    print_table(&winners, roofline.as_ref());
    Ok(ExitCode::SUCCESS)
}

fn print_table(winners: &[Record], roofline: Option<&Roofline>) {
    let mut devices: Vec<&str> = winners.iter().map(|record| record.device.name.as_str()).collect();
    devices.dedup();
    for device in devices {
        let of_device: Vec<&Record> = winners.iter().filter(|record| record.device.name == device).collect();
        if let Some(first) = of_device.first() {
            let environment = &first.environment;
            println!(
                "{device} ({}), driver {}, NVRTC {}, {}",
                first.device.class,
                or_dash(&environment.driver),
                or_dash(&environment.nvrtc),
                environment.date
            );
        }
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::ASCII_MARKDOWN);
        table.set_header([
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
            "error",
        ]);
        for record in of_device {
            table.add_row(row(record, roofline));
        }
        println!("{table}\n");
    }
}

fn row(record: &Record, roofline: Option<&Roofline>) -> Vec<String> {
    let problem = &record.problem;
    let Some(measured) = record.measurement() else { return Vec::new() };
    let seconds = measured.median_us * 1e-6;
    // Decode is bound by bytes, prefill by arithmetic; both rates are shown, the bytes' ceiling is known.
    let share = roofline
        .filter(|roofline| roofline.class == record.device.class)
        .map(|roofline| format!("{:.0} % of bytes", 100.0 * problem.bytes() / seconds / roofline.bytes_per_second));
    vec![
        problem.op.to_string(),
        problem.dtype.to_string(),
        problem.weight_major.to_string(),
        problem.m.to_string(),
        problem.n.to_string(),
        problem.k.to_string(),
        record.config.to_string(),
        format!("{:.1}", measured.median_us),
        format!("{:.1}-{:.1}", measured.p10_us, measured.p90_us),
        format!("{:.1}", problem.flops() / seconds * 1e-12),
        format!("{:.0}", problem.bytes() / seconds * 1e-9),
        share.unwrap_or_else(|| "-".into()),
        format!("{:.1e}", measured.error),
    ]
}

fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}
