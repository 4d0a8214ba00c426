//! One page for all devices: everything in one file, nothing loaded from elsewhere.

use super::data::{DeviceReport, Provenance, Row};
use super::svg::{self, Scale, Series};
use super::{COLUMNS, cells, facts, visible};
use anyhow::Result;
use serde::Serialize;
use swiglu_db::{Outcome, Record};
use tera::{Context, Tera};

/// Candidates listed per problem; a GPU has hundreds, and all are in `report --csv`.
const LISTED: usize = 50;

#[derive(Serialize)]
struct Page {
    version: &'static str,
    date: String,
    columns: [&'static str; 17],
    devices: Vec<Section>,
}

#[derive(Serialize)]
struct Section {
    name: String,
    class: String,
    facts: Vec<(&'static str, String)>,
    provenance: Vec<[String; 5]>,
    plots: Vec<Plot>,
    rows: Vec<[String; 17]>,
    ties: Vec<Note>,
    unhelped: Vec<Note>,
    stale: Vec<Note>,
    failures: Vec<(String, usize, String)>,
    problems: Vec<Problem>,
}

#[derive(Serialize)]
struct Plot {
    heading: String,
    /// Markup.
    svg: String,
}

/// Something to be said of a problem.
#[derive(Serialize)]
struct Note {
    problem: String,
    text: String,
}

/// A problem with its candidates.
#[derive(Serialize)]
struct Problem {
    name: String,
    candidates: Vec<[String; 4]>,
    left_out: usize,
}

/// The page as HTML that is also well-formed XML.
pub(crate) fn page(devices: &[DeviceReport]) -> Result<String> {
    let page = Page {
        version: env!("CARGO_PKG_VERSION"),
        date: jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string(),
        columns: COLUMNS,
        devices: devices.iter().map(section).collect(),
    };
    let mut tera = Tera::default();
    // The ending switches escaping on.
    tera.add_raw_template("page.html", include_str!("page.html.tera"))?;
    let page = tera.render("page.html", &Context::from_serialize(&page)?)?;
    // Names and reasons from elsewhere may hold what no page may.
    Ok(page.chars().map(|c| if c == '\n' { c } else { visible(c) }).collect())
}

fn section(device: &DeviceReport) -> Section {
    let noted = |note: &dyn Fn(&Row) -> Option<String>| -> Vec<Note> {
        let notes = device.rows.iter().map(|row| (row, note(row)));
        notes.filter_map(|(row, text)| Some(Note { problem: name(&row.winner), text: text? })).collect()
    };
    let provenance = device.provenance.iter().map(|(provenance, count)| {
        let Provenance { driver, nvrtc, version, origin } = provenance.clone();
        [driver, nvrtc, version, origin, count.to_string()]
    });
    let plots = plots(device).into_iter().filter(|plot| !plot.svg.is_empty());
    Section {
        name: device.device.name.clone(),
        class: device.device.class.clone(),
        facts: facts(device),
        provenance: provenance.collect(),
        plots: plots.collect(),
        rows: device.rows.iter().map(|row| cells(row, &device.roofline)).collect(),
        ties: noted(&tie),
        unhelped: noted(&unhelped),
        stale: noted(&|row| row.stale.clone()),
        failures: device.failures.iter().map(|(stage, (count, why))| (stage.clone(), *count, why.clone())).collect(),
        problems: problems(device),
    }
}

fn name(record: &Record) -> String {
    let problem = &record.problem;
    format!(
        "{} {} {} M {}, N {}, K {}, aligned to {}",
        problem.op, problem.dtype, problem.weight_major, problem.m, problem.n, problem.k, problem.alignment
    )
}

fn tie(row: &Row) -> Option<String> {
    let second = row.candidates.iter().find(|candidate| candidate.config != row.winner.config)?;
    let behind = 100.0 * (second.measurement()?.median_us / row.median_us - 1.0);
    let ties = row.ties();
    (ties > 0).then(|| format!("{ties} within 1 %; next is {} ({behind:+.2} %)", second.config))
}

fn unhelped(row: &Row) -> Option<String> {
    let untuned = row.over_default().filter(|ratio| *ratio < super::TIE);
    let untuned = untuned.map(|ratio| format!("the untuned default takes {ratio:.3} of our time"));
    let peer = row.peer.filter(|peer| peer.over_gemm_and_gate < 1.0);
    let peer = peer.map(|peer| format!("cuBLASLt's GEMM and gate take {:.3} of our time", peer.over_gemm_and_gate));
    let both: Vec<String> = untuned.into_iter().chain(peer).collect();
    (!both.is_empty()).then(|| both.join("; "))
}

fn problems(device: &DeviceReport) -> Vec<Problem> {
    let served = device.rows.iter().map(|row| (row.candidates.as_slice(), row.failed.as_slice()));
    let unserved = device.without_winner.values().map(|failed| (&[][..], failed.as_slice()));
    let problem = |(measured, failed): (&[Record], &[Record])| {
        let listed = measured.iter().take(LISTED).chain(failed.iter().take(LISTED));
        Problem {
            name: measured.first().or(failed.first()).map(name).unwrap_or_default(),
            candidates: listed.map(candidate).collect(),
            left_out: measured.len().saturating_sub(LISTED) + failed.len().saturating_sub(LISTED),
        }
    };
    served.chain(unserved).map(problem).collect()
}

fn candidate(record: &Record) -> [String; 4] {
    let [time, note] = match &record.outcome {
        Outcome::Measured(measured) => [format!("{:.2}", measured.median_us), format!("{} samples", measured.samples)],
        Outcome::Failed { stage, reason } => [String::new(), format!("{stage}: {reason}")],
    };
    [record.config.to_string(), time, note, record.origin.to_string()]
}

fn plots(device: &DeviceReport) -> Vec<Plot> {
    let shapes = device.shapes();
    let mut plots: Vec<Plot> = shapes.iter().map(|(name, rows)| speed(device, name, rows)).collect();
    let mut ratio = |heading: &str, y_label: &str, of: &dyn Fn(&Row) -> Option<f64>| {
        let series = shapes.iter().map(|(name, rows)| points(name, rows, of));
        let series: Vec<Series> = series.filter(|series| !series.points.is_empty()).collect();
        plots.push(Plot { heading: heading.into(), svg: svg::lines(heading, y_label, Scale::Ratio, &series) });
    };
    ratio("Speedup over cuBLASLt's GEMM and gate", "their time / ours", &|row| Some(row.peer?.over_gemm_and_gate));
    ratio("Speedup over cuBLASLt's GEMM alone", "their time / ours", &|row| Some(row.peer?.over_gemm));
    ratio("Untuned default against tuned", "default's time / ours", &Row::over_default);
    let heading = "Candidates by their time over the winner's";
    let bars = svg::bars(heading, "time / winner's time", "candidates", &distribution(device));
    plots.push(Plot { heading: heading.into(), svg: bars });
    plots
}

fn speed(device: &DeviceReport, shape: &str, rows: &[&Row]) -> Plot {
    let tflops = |us: f64, row: &Row| row.problem().flops() / us * 1e-6;
    let mut roofline = points("roofline", rows, &|row| Some(tflops(device.roofline.bound(row.problem())?.0, row)));
    if !rows.first().is_some_and(|row| device.roofline.is_whole(row.problem().dtype)) {
        roofline.name = "memory's part of the roofline (give --peak-tflops for the rest)".into();
    }
    roofline.is_limit = true;
    let series = [
        points("tuned", rows, &|row| Some(row.tflops())),
        points("untuned default", rows, &|row| Some(tflops(row.default_us?, row))),
        points("cuBLASLt, GEMM alone", rows, &|row| Some(row.tflops() / row.peer?.over_gemm)),
        points("cuBLASLt, GEMM and gate", rows, &|row| Some(row.tflops() / row.peer?.over_gemm_and_gate)),
        roofline,
    ];
    let series: Vec<Series> = series.into_iter().filter(|series| !series.points.is_empty()).collect();
    let heading = format!("Speed against M: {shape}");
    Plot { svg: svg::lines(&heading, "TFLOP/s", Scale::Logarithmic, &series), heading }
}

fn points(name: &str, rows: &[&Row], of: &dyn Fn(&Row) -> Option<f64>) -> Series {
    let point = |row: &&Row| {
        let (m, value) = (row.problem().m, of(row)?);
        Some((f64::from(m), value, format!("{name}, M {m}: {value:.3}")))
    };
    Series { name: name.into(), is_limit: false, points: rows.iter().filter_map(point).collect() }
}

/// How many candidates take how many times the winner's time.
fn distribution(device: &DeviceReport) -> Vec<(String, usize)> {
    let edges = [1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, f64::INFINITY];
    let mut counts = [0; 9];
    for ratio in device.rows.iter().flat_map(Row::ratios) {
        let bin = edges.iter().position(|edge| ratio < *edge).unwrap_or(edges.len() - 1);
        counts[bin] += 1;
    }
    let name = |edge: f64| if edge.is_finite() { format!("< {edge}") } else { "more".into() };
    edges.into_iter().map(name).zip(counts).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{data, heading, markdown, one_line, roofline::Roofline};
    use super::*;
    use roxmltree::{Document, ParsingOptions};
    use std::collections::BTreeMap;
    use swiglu_db::{Device, Environment, Measurement, Origin};
    use swiglu_kernels::families::cpu::default_config;
    use swiglu_kernels::{Config, DType, Problem, WeightMajor};

    /// A report of one record whose texts are all this one.
    fn report(text: &str) -> Vec<DeviceReport> {
        let environment = Environment {
            driver: text.into(),
            nvrtc: text.into(),
            version: text.into(),
            date: text.into(),
            ..Environment::default()
        };
        let record = |outcome, threads| Record {
            device: Device { class: "cpu-x-4".into(), name: text.into() },
            problem: Problem::forward(DType::F32, WeightMajor::K, 1, 48, 32),
            config: Config::Cpu(default_config(threads)),
            outcome,
            environment: environment.clone(),
            origin: Origin::Import(text.into()),
        };
        let measured = Outcome::Measured(Measurement { median_us: 2.0, samples: 40, ..Measurement::default() });
        let failed = Outcome::Failed { stage: text.into(), reason: text.into() };
        data::devices(vec![record(measured, 1), record(failed, 2)], &BTreeMap::new(), |_| Roofline::default())
    }

    #[test]
    fn control_characters_are_replaced_in_the_page_in_tables_and_in_markdown() {
        let devices = report("a\u{1b}[2J\u{0}\u{7}\r\u{9b}\u{fffe}z");
        let replaced = "a\u{fffd}[2J\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}z";
        let page = page(&devices).unwrap();
        let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
        Document::parse_with_options(&page, options).unwrap();
        let obeyed = |text: &str| text.chars().any(|c| (c.is_control() && c != '\n') || c == '\u{fffe}');
        for text in [page, one_line(&heading(&devices[0])), markdown(&devices)] {
            assert!(text.contains(replaced) && !obeyed(&text), "{text:?}");
        }
    }
}
