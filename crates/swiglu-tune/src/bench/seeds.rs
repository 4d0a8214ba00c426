//! The tables that the seed project printed, with our times beside theirs.

use super::Row;
use crate::report::terminal_table;
use swiglu_kernels::{DType, Op, Problem, WeightLayout};

/// A table as the seed printed it.
struct Printed {
    title: &'static str,
    /// Ours, as launches one after the other.
    ops: &'static [Op],
    lines: [Line; 6],
    /// What a peer of separate launches and what ours writes.
    written: [fn(&Line) -> f64; 2],
}

/// A line: tokens, both sizes of the square weights, and its times in milliseconds.
struct Line {
    b: u32,
    d: u32,
    liger_ms: f64,
    fused_ms: f64,
}

const fn line(b: u32, d: u32, liger_ms: f64, fused_ms: f64) -> Line {
    Line { b, d, liger_ms, fused_ms }
}

const TABLES: [Printed; 3] = [
    Printed {
        title: "Forward",
        ops: &[Op::Forward],
        lines: [
            line(64, 2048, 0.21, 0.07),
            line(64, 4096, 0.99, 0.35),
            line(256, 2048, 0.74, 0.27),
            line(256, 4096, 2.34, 0.83),
            line(1024, 2048, 3.10, 1.14),
            line(1024, 4096, 8.71, 3.12),
        ],
        // Gate, up and z, or z alone.
        written: [|line| 3.0 * line.tokens(), Line::tokens],
    },
    Printed {
        title: "Backward of x, weights frozen",
        ops: &[Op::GateBackward, Op::InputGrad],
        lines: [
            line(64, 2048, 0.81, 0.60),
            line(64, 4096, 3.36, 1.01),
            line(256, 2048, 2.21, 0.62),
            line(256, 4096, 8.65, 2.61),
            line(1024, 2048, 8.84, 2.72),
            line(1024, 4096, 28.86, 9.22),
        ],
        // dgate, dup and dx; ours puts the first two where gate and up were.
        written: [|line| 3.0 * line.tokens(), Line::tokens],
    },
    Printed {
        title: "Backward of x and of the weights",
        ops: &[Op::GateBackward, Op::InputGrad, Op::WeightGrad],
        lines: [
            line(64, 2048, 0.83, 0.66),
            line(64, 4096, 3.38, 1.66),
            line(256, 2048, 2.21, 0.99),
            line(256, 4096, 8.61, 3.87),
            line(1024, 2048, 8.87, 3.91),
            line(1024, 4096, 28.76, 13.51),
        ],
        written: [|line| 3.0 * line.tokens() + line.weights(), |line| line.tokens() + line.weights()],
    },
];

impl Line {
    /// fp32, as torch makes numbers, and one packed matrix with rows of 2D.
    fn problem(&self, op: Op) -> Problem {
        Problem::forward(DType::F32, WeightLayout::PackedKn.major(), self.b, self.d, self.d).with_op(op)
    }

    /// MiB of one `[B, D]`.
    fn tokens(&self) -> f64 {
        f64::from(self.b) * f64::from(self.d) * 4.0 / f64::from(1 << 20)
    }

    /// MiB of one `[D, 2D]`.
    fn weights(&self) -> f64 {
        2.0 * f64::from(self.d) * f64::from(self.d) * 4.0 / f64::from(1 << 20)
    }
}

/// What the tables need timed, each once.
pub(super) fn problems() -> Vec<Problem> {
    let mut all: Vec<Problem> = Vec::new();
    for table in &TABLES {
        let of_table = table.lines.iter().flat_map(|line| table.ops.iter().map(|&op| line.problem(op)));
        let new: Vec<Problem> = of_table.filter(|problem| !all.contains(problem)).collect();
        all.extend(new);
    }
    all
}

/// `rows` are those of [`problems`], measured here.
pub(super) fn tables(rows: &[Row]) -> String {
    let head = "The first three times are as the seed printed them, on its GPU; the others are of this one, fp32, x [B, D], packed\n\
                weights [D, 2D], from saved pre-activations, as sums of launches that each find the L2 cache cold. GEMM+gate: the\n\
                library's GEMMs and our elementwise kernels. MiB are what is written.\n";
    TABLES.iter().fold(head.to_owned(), |text, table| format!("{text}\n{}\n{}\n", table.title, table.with(rows)))
}

impl Printed {
    fn with(&self, rows: &[Row]) -> String {
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
        for line in &self.lines {
            let of_line = |op: &Op| rows.iter().find(|row| row.problem == line.problem(*op));
            let of_ops: Vec<&Row> = self.ops.iter().filter_map(of_line).collect();
            let ours: f64 = of_ops.iter().map(|row| row.ours_us).sum();
            let peer: f64 = of_ops.iter().map(|row| Self::peer_us(row)).sum();
            let [peer_mebibytes, our_mebibytes] = self.written.map(|written| written(line));
            table.add_row([
                line.b.to_string(),
                line.d.to_string(),
                format!("{:.2}", line.liger_ms),
                format!("{:.2}", line.fused_ms),
                format!("{:.1}", line.liger_ms / line.fused_ms),
                format!("{:.4}", peer / 1e3),
                format!("{:.4}", ours / 1e3),
                format!("{:.2}", peer / ours),
                format!("{peer_mebibytes:.1}"),
                format!("{our_mebibytes:.1}"),
            ]);
        }
        table.to_string()
    }

    /// A kernel without a GEMM is timed beside a copy, which is no peer: both sides have ours.
    fn peer_us(row: &Row) -> f64 {
        if row.problem.op.is_elementwise() { row.ours_us } else { row.gemm_and_gate_us }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_printed_line_has_ours_beside_it() {
        let problems = problems();
        assert_eq!(problems.len(), 6 * 4, "both backward tables need the same two steps");
        let rows: Vec<Row> =
            problems.into_iter().map(|problem| Row::of_times(problem, [500.0, 700.0, 1000.0, 400.0])).collect();
        let text = tables(&rows);
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("| ") && !line.contains("Liger")).collect();
        assert_eq!(lines.len(), 18);
        let cells = |line: usize| lines[line].split('|').map(str::trim).skip(1).take(10).collect::<Vec<_>>();
        assert_eq!(cells(5), ["1024", "4096", "8.71", "3.12", "2.8", "1.0000", "0.5000", "2.00", "48.0", "16.0"]);
        assert_eq!(cells(11), ["1024", "4096", "28.86", "9.22", "3.1", "1.5000", "1.0000", "1.50", "48.0", "16.0"]);
        assert_eq!(cells(17), ["1024", "4096", "28.76", "13.51", "2.1", "2.5000", "1.5000", "1.67", "176.0", "144.0"]);
    }
}
