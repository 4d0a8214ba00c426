//! The tables that the seed project printed, with our times beside theirs.

use super::Row;
use crate::report::terminal_table;
use swiglu_kernels::{DType, Problem, WeightLayout};

/// A line as the seed printed it, in milliseconds.
pub(super) struct Printed {
    /// Tokens, and both sizes of the square weights.
    b: u32,
    d: u32,
    liger_ms: f64,
    fused_ms: f64,
}

const fn printed(b: u32, d: u32, liger_ms: f64, fused_ms: f64) -> Printed {
    Printed { b, d, liger_ms, fused_ms }
}

/// "Forward-only (GEMM + gate)".
pub(super) const FORWARD: [Printed; 6] = [
    printed(64, 2048, 0.21, 0.07),
    printed(64, 4096, 0.99, 0.35),
    printed(256, 2048, 0.74, 0.27),
    printed(256, 4096, 2.34, 0.83),
    printed(1024, 2048, 3.10, 1.14),
    printed(1024, 4096, 8.71, 3.12),
];

impl Printed {
    /// The problem behind the line: fp32, as torch makes numbers, and one packed matrix with rows of 2D.
    pub(super) fn problem(&self) -> Problem {
        Problem::forward(DType::F32, WeightLayout::PackedKn.major(), self.b, self.d, self.d)
    }
}

/// `rows` are the lines of `printed`, measured here.
pub(super) fn table(printed: &[Printed], rows: &[Row]) -> String {
    let mut table = terminal_table([
        "B",
        "D",
        "Liger ms",
        "fused ms",
        "Liger/fused",
        "GEMM+gate ms",
        "ours ms",
        "GEMM+gate/ours",
        "GEMM+gate MiB",
        "ours MiB",
    ]);
    for (line, row) in printed.iter().zip(rows) {
        let mebibytes = |matrices: f64| matrices * f64::from(line.b) * f64::from(line.d) * 4.0 / f64::from(1 << 20);
        table.add_row([
            line.b.to_string(),
            line.d.to_string(),
            format!("{:.2}", line.liger_ms),
            format!("{:.2}", line.fused_ms),
            format!("{:.1}", line.liger_ms / line.fused_ms),
            format!("{:.4}", row.gemm_and_gate_us / 1e3),
            format!("{:.4}", row.ours_us / 1e3),
            format!("{:.2}", row.over_gemm_and_gate),
            // Gate, up and z, or z alone.
            format!("{:.1}", mebibytes(3.0)),
            format!("{:.1}", mebibytes(1.0)),
        ]);
    }
    format!(
        "Forward. The first three times are as the seed printed them, on its GPU; the others are of this one, fp32, x [B, D],\n\
         packed weights [D, 2D]; MiB are what the forward writes.\n{table}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_printed_line_has_ours_beside_it() {
        let rows: Vec<Row> =
            FORWARD.iter().map(|line| Row::of_times(line.problem(), [500.0, 700.0, 1000.0, 400.0])).collect();
        let text = table(&FORWARD, &rows);
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("| ") && !line.contains("Liger")).collect();
        assert_eq!(lines.len(), 6);
        let cells: Vec<&str> = lines[5].split('|').map(str::trim).collect();
        assert_eq!(cells[1..11], ["1024", "4096", "8.71", "3.12", "2.8", "1.0000", "0.5000", "2.00", "48.0", "16.0"]);
        assert_eq!(FORWARD[0].problem().flops(), 4.0 * 64.0 * 2048.0 * 2048.0);
    }
}
