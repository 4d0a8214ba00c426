//! The formulas in float64: what every kernel is held to.

use crate::problem::Activation;

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
    /// Length of every sum.
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
