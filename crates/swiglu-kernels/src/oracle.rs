//! The formulas in float64: what every kernel is held to.

use crate::problem::{Activation, Op, OperandMajor, Paired, Problem};

/// Operands of a forward problem, widened to float64. Rows are contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Forward<'a> {
    /// `[M, K]`.
    pub x: &'a [f64],
    /// `[N, K]`: one row per output column, whatever the layout in memory was.
    pub gate: &'a [f64],
    /// `[N, K]`.
    pub up: &'a [f64],
    /// `[N]`, if any.
    pub gate_bias: Option<&'a [f64]>,
    /// `[N]`, if any.
    pub up_bias: Option<&'a [f64]>,
    /// Length of every sum. Of 0 the number of rows cannot be told from x: one is meant.
    pub k: usize,
}

/// `act(value)`.
pub fn activate(activation: Activation, value: f64) -> f64 {
    match activation {
        Activation::Silu => value / (1.0 + (-value).exp()),
    }
}

/// `z[M,N] = act(x·Wgᵀ + bg) ⊙ (x·Wuᵀ + bu)`, row by row.
pub fn forward(activation: Activation, operands: &Forward<'_>) -> Vec<f64> {
    gated(activation, &preactivations(operands))
}

/// `act'(value)`.
pub fn slope(activation: Activation, value: f64) -> f64 {
    match activation {
        Activation::Silu => {
            let sigmoid = 1.0 / (1.0 + (-value).exp());
            sigmoid + value * sigmoid * (1.0 - sigmoid)
        }
    }
}

/// dgate, dup and z of one element.
pub fn gate_backward(activation: Activation, gate: f64, up: f64, dz: f64) -> [f64; 3] {
    let value = activate(activation, gate);
    [dz * up * slope(activation, gate), dz * value, value * up]
}

/// `left[rows, depth] · right[depth, cols]`, row by row, of operands given by row and column.
pub fn product(
    [rows, cols, depth]: [usize; 3],
    left: impl Fn(usize, usize) -> f64,
    right: impl Fn(usize, usize) -> f64,
) -> Vec<f64> {
    // One contiguous line of each operand per sum.
    let lines = |count: usize, at: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
        (0..count).flat_map(|line| (0..depth).map(move |d| (line, d))).map(|(line, d)| at(line, d)).collect()
    };
    let (left, right) = (lines(rows, &left), lines(cols, &|line, d| right(d, line)));
    let line = |index: usize| index * depth..(index + 1) * depth;
    let dot =
        |row: usize, col: usize| -> f64 { left[line(row)].iter().zip(&right[line(col)]).map(|(a, b)| a * b).sum() };
    (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))).map(|(row, col)| dot(row, col)).collect()
}

/// An element of a matrix by its row and column in memory.
pub type Entry<'a> = &'a dyn Fn(usize, usize) -> f64;

/// Operands of a step of the FFN, as its launch takes them; what the op has none of is not read.
#[derive(Clone, Copy)]
pub struct Step<'a> {
    /// The left operand, the second of which is read where it is paired.
    pub left: [Entry<'a>; 2],
    /// The right operand.
    pub right: [Entry<'a>; 2],
    /// The pre-activations of gate and up.
    pub saved: [Entry<'a>; 2],
    /// The bias of each output column, if any.
    pub bias: Option<&'a [f64]>,
}

/// Every output of a step, row by row; of an op that adds to its outputs, what is added.
pub fn step(problem: &Problem, operands: &Step<'_>) -> Vec<Vec<f64>> {
    let (rows, cols) = problem.output();
    let (rows, cols) = (rows as usize, cols as usize);
    let gated = |dz: Entry<'_>| -> [Vec<f64>; 3] {
        let mut outs = [const { Vec::new() }; 3];
        for (row, col) in (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))) {
            let [gate, up] = operands.saved.map(|saved| saved(row, col));
            let values = gate_backward(problem.activation, gate, up, dz(row, col));
            outs.iter_mut().zip(values).for_each(|(out, value)| out.push(value));
        }
        outs
    };
    let Some(shape) = problem.product() else {
        let has_dz = problem.op != Op::Gate;
        let [dgate, dup, z] = gated(if has_dz { operands.left[0] } else { &|_, _| 0.0 });
        return if has_dz { vec![dgate, dup, z] } else { vec![z] };
    };
    let of = |left: Entry<'_>, right: Entry<'_>| {
        let left = |row, d| if shape.left == OperandMajor::Depth { left(row, d) } else { left(d, row) };
        let right = |d, col| if shape.right == OperandMajor::Depth { right(col, d) } else { right(d, col) };
        product([rows, cols, shape.depth as usize], left, right)
    };
    let ones: Entry<'_> = &|_, _| 1.0;
    let [left, right] = [if problem.op.is_column_sum() { [ones; 2] } else { operands.left }, operands.right];
    let mut outs = match shape.paired {
        Paired::Nothing => vec![of(left[0], right[0])],
        Paired::Rows => vec![of(left[0], right[0]), of(left[1], right[0])],
        Paired::Columns => vec![of(left[0], right[0]), of(left[0], right[1])],
        Paired::Depth => {
            let (mut first, second) = (of(left[0], right[0]), of(left[1], right[1]));
            first.iter_mut().zip(second).for_each(|(sum, term)| *sum += term);
            vec![first]
        }
    };
    if let Some(bias) = operands.bias {
        let all = outs.iter_mut().flat_map(|out| out.iter_mut().enumerate());
        all.for_each(|(i, value)| *value += bias.get(i % cols.max(1)).copied().unwrap_or(0.0));
    }
    if problem.op == Op::Dgated { gated(&|row, col| outs[0][row * cols + col]).into() } else { outs }
}

/// `act(gate) ⊙ up` of [`preactivations`].
pub fn gated(activation: Activation, sums: &[(f64, f64)]) -> Vec<f64> {
    sums.iter().map(|&(gate, up)| activate(activation, gate) * up).collect()
}

/// [`preactivations`] of rows of `n` as one matrix `[M, 2N]`: the gate's columns, then the up ones.
pub fn packed(sums: &[(f64, f64)], n: usize) -> Vec<f64> {
    let row = |row: &[(f64, f64)]| {
        let (gate, up): (Vec<f64>, Vec<f64>) = row.iter().copied().unzip();
        [gate, up].concat()
    };
    sums.chunks(n.max(1)).flat_map(row).collect()
}

/// `x·Wgᵀ + bg` and `x·Wuᵀ + bu` of every element of z, row by row.
pub fn preactivations(operands: &Forward<'_>) -> Vec<(f64, f64)> {
    let Forward { x, gate, up, gate_bias, up_bias, k } = *operands;
    let n = gate_bias.map_or(gate.len().checked_div(k).unwrap_or(0), <[f64]>::len);
    let rows: Vec<&[f64]> = if k == 0 { vec![&[]] } else { x.chunks_exact(k).collect() };
    let dot = |a: &[f64], w: &[f64], column: usize| -> f64 {
        a.iter().zip(w.get(column * k..(column + 1) * k).unwrap_or(&[])).map(|(a, b)| a * b).sum()
    };
    let bias = |b: Option<&[f64]>, column: usize| b.and_then(|b| b.get(column)).copied().unwrap_or(0.0);
    let mut sums = Vec::with_capacity(rows.len() * n);
    for row in rows {
        for column in 0..n {
            let g = dot(row, gate, column) + bias(gate_bias, column);
            let u = dot(row, up, column) + bias(up_bias, column);
            sums.push((g, u));
        }
    }
    sums
}

/// `‖out − reference‖ / ‖reference‖` over the finite part.
///
/// Infinite where the two disagree on which elements are NaN, `+inf` or `-inf`, or on how many there are; 0 for two zero
/// vectors.
pub fn relative_error(out: impl IntoIterator<Item = f64>, reference: impl IntoIterator<Item = f64>) -> f64 {
    let (mut difference, mut norm) = (0.0, 0.0);
    let (mut out, mut reference) = (out.into_iter(), reference.into_iter());
    loop {
        let (out, reference) = match (out.next(), reference.next()) {
            (Some(out), Some(reference)) => (out, reference),
            (None, None) => break,
            _ => return f64::INFINITY,
        };
        if reference.is_finite() && out.is_finite() {
            difference += (out - reference) * (out - reference);
            norm += reference * reference;
        } else if !(out.is_nan() && reference.is_nan() || out == reference) {
            return f64::INFINITY;
        }
    }
    if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silu_has_its_known_values() {
        // silu(1) = 1 / (1 + 1/e), silu(-1) = silu(1) - 1.
        assert!((activate(Activation::Silu, 1.0) - 0.731_058_578_630_004_9).abs() < 1e-15);
        assert!((activate(Activation::Silu, -1.0) + 0.268_941_421_369_995_1).abs() < 1e-15);
        assert_eq!(activate(Activation::Silu, 0.0), 0.0);
        assert_eq!(activate(Activation::Silu, 1e3), 1e3);
        assert_eq!(activate(Activation::Silu, -1e3), 0.0);
        assert!(activate(Activation::Silu, f64::NEG_INFINITY).is_nan());
        assert_eq!(activate(Activation::Silu, f64::INFINITY), f64::INFINITY);
    }

    #[test]
    fn the_gates_backward_is_its_finite_difference() {
        let z = |gate: f64, up: f64| activate(Activation::Silu, gate) * up;
        for (gate, up) in [(0.3, 1.7), (-1.278, -0.4), (8.0, 2.0), (-20.0, 5.0), (0.0, 1.0)] {
            let h = 1e-6;
            let [dgate, dup, again] = gate_backward(Activation::Silu, gate, up, 3.0);
            assert!((dgate - 3.0 * (z(gate + h, up) - z(gate - h, up)) / (2.0 * h)).abs() < 1e-8, "{gate} {up}");
            assert!((dup - 3.0 * (z(gate, up + h) - z(gate, up - h)) / (2.0 * h)).abs() < 1e-8, "{gate} {up}");
            assert_eq!(again, z(gate, up));
        }
    }

    #[test]
    fn a_product_by_hand() {
        let (left, right) = ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0, 9.0, 10.0]);
        let out = product([2, 3, 2], |row, d| left[row * 2 + d], |d, col| right[d * 3 + col]);
        assert_eq!(out, [21.0, 24.0, 27.0, 47.0, 54.0, 61.0]);
        assert_eq!(product([1, 2, 0], |_, _| 1.0, |_, _| 1.0), [0.0, 0.0]);
    }

    #[test]
    fn forward_by_hand() {
        let operands = Forward {
            x: &[1.0, 2.0],
            gate: &[1.0, 0.0, 0.0, 1.0],
            up: &[0.5, 0.5, 1.0, -1.0],
            gate_bias: None,
            up_bias: Some(&[0.0, 1.0]),
            k: 2,
        };
        let operands = Forward { gate_bias: Some(&[0.0, -2.0]), ..operands };
        let z = forward(Activation::Silu, &operands);
        assert_eq!(z, [activate(Activation::Silu, 1.0) * 1.5, 0.0]);
    }

    #[test]
    fn without_k_only_the_biases_remain() {
        let operands = Forward { x: &[], gate: &[], up: &[], gate_bias: Some(&[1.0]), up_bias: Some(&[2.0]), k: 0 };
        assert_eq!(forward(Activation::Silu, &operands), [2.0 * activate(Activation::Silu, 1.0)]);
    }

    #[test]
    fn packed_rows_hold_the_gate_first() {
        assert_eq!(
            packed(&[(1.0, 2.0), (3.0, 4.0), (5.0, 6.0), (7.0, 8.0)], 2),
            [1.0, 3.0, 2.0, 4.0, 5.0, 7.0, 6.0, 8.0]
        );
        assert!(packed(&[], 0).is_empty());
    }

    #[test]
    fn relative_error_sees_every_kind_of_difference() {
        assert_eq!(relative_error([1.0, 2.0], [1.0, 2.0]), 0.0);
        assert!((relative_error([3.0, 4.5], [3.0, 4.0]) - 0.1).abs() < 1e-15);
        assert_eq!(relative_error([f64::NAN], [f64::NAN]), 0.0);
        assert_eq!(relative_error([f64::NAN], [1.0]), f64::INFINITY);
        assert_eq!(relative_error([f64::INFINITY], [f64::NEG_INFINITY]), f64::INFINITY);
        assert_eq!(relative_error([1.0], [0.0]), f64::INFINITY);
        assert_eq!(relative_error([1.0], [1.0, 2.0]), f64::INFINITY);
        assert_eq!(relative_error([1.0], []), f64::INFINITY);
    }
}
