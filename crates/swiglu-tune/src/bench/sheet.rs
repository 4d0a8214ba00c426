//! Results of `bench` as a sheet and as a plot.

use super::Row;
use crate::report::svg::{self, Scale, Series};
use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;

/// The columns, in their order.
#[derive(Serialize)]
struct Line<'a> {
    device: &'a str,
    op: &'static str,
    dtype: &'static str,
    weight_major: &'static str,
    m: u32,
    n: u32,
    k: u32,
    config: String,
    from: &'a str,
    ours_us: f64,
    ours_low_us: Option<f64>,
    ours_high_us: Option<f64>,
    gemm_us: f64,
    gemm_and_gate_us: f64,
    over_gemm: f64,
    over_gemm_and_gate: f64,
    tflops: f64,
}

/// A heading and a line per row.
pub(super) fn csv(device: &str, rows: &[Row]) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for row in rows {
        let problem = &row.problem;
        writer.serialize(Line {
            device,
            op: problem.op.name(),
            dtype: problem.dtype.name(),
            weight_major: problem.weight_major.name(),
            m: problem.m,
            n: problem.n,
            k: problem.k,
            config: row.config.to_string(),
            from: &row.source,
            ours_us: row.ours_us,
            ours_low_us: row.ours_interval_us.map(|[low, _]| low),
            ours_high_us: row.ours_interval_us.map(|[_, high]| high),
            gemm_us: row.gemm_us,
            gemm_and_gate_us: row.gemm_and_gate_us,
            over_gemm: row.over_gemm,
            over_gemm_and_gate: row.over_gemm_and_gate,
            tflops: row.tflops(),
        })?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

/// Time of the peers over ours, against M, a pair of lines for each (N, K).
pub(super) fn plot(device: &str, rows: &[Row]) -> String {
    let mut shapes: BTreeMap<(u32, u32), Vec<&Row>> = BTreeMap::new();
    for row in rows {
        shapes.entry((row.problem.n, row.problem.k)).or_default().push(row);
    }
    let mut series = Vec::new();
    for ((n, k), mut rows) in shapes {
        rows.sort_by_key(|row| row.problem.m);
        let line = |name: &str, of: fn(&Row) -> f64| Series {
            name: format!("{name}, N {n}, K {k}"),
            is_limit: false,
            points: rows.iter().map(|row| (f64::from(row.problem.m), of(row), format!("{:.3}", of(row)))).collect(),
        };
        series.push(line("GEMM and gate", |row| row.over_gemm_and_gate));
        series.push(line("GEMM alone", |row| row.over_gemm));
    }
    svg::file(&format!("cuBLASLt's time over ours, {device}"), "their time / ours", Scale::Ratio, &series)
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiglu_kernels::{DType, Problem, WeightMajor};

    #[test]
    fn a_sheet_has_a_line_a_row_and_a_plot_a_point_a_ratio() {
        let problem = |m| Problem::forward(DType::Bf16, WeightMajor::K, m, 14336, 4096);
        let rows = [512, 2048].map(|m| Row::of_times(problem(m), [100.0, 103.0, 110.0, 50.0]));
        let sheet = csv("a \"GPU\"", &rows).unwrap();
        assert_eq!(sheet.lines().count(), 3);
        let mut reader = csv::Reader::from_reader(sheet.as_bytes());
        let row = reader.records().next().unwrap().unwrap();
        assert_eq!((&row[0], &row[4], &row[9], &row[15]), ("a \"GPU\"", "512", "100.0", "1.1"));
        let plot = plot("a <GPU>", &rows);
        let document = roxmltree::Document::parse(&plot).unwrap();
        assert_eq!(document.descendants().filter(|node| node.has_tag_name("circle")).count(), 4);
        assert!(document.descendants().any(|node| node.text() == Some("GEMM alone, N 14336, K 4096")));
        roxmltree::Document::parse(&super::plot("nothing", &[])).unwrap();
    }
}
