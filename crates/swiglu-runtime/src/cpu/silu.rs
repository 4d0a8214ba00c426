//! `silu(gate) ⊙ up` and its gradient, written so that the compiler can vectorise them.

use super::element::Sum;

/// `gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i]`.
pub(super) fn silu_mul<S: Sum>(gate: &mut [S], up: &[S]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (S::ONE + (-*gate).exp()) * *up;
    }
}

/// dgate, dup and z of one element.
pub(super) fn gate_backward<S: Sum>(gate: S, up: S, dz: S) -> [S; 3] {
    let sigmoid = S::ONE / (S::ONE + (-gate).exp());
    let value = gate * sigmoid;
    [dz * up * (sigmoid + value * (S::ONE - sigmoid)), dz * value, value * up]
}

/// `exp(x)` with a relative error below 2e-7, without a branch or a call. Overflows to infinity and underflows to
/// zero as exp does; NaN stays NaN.
///
/// Cody-Waite reduction to `|r| <= ln(2)/2`, then the polynomial of Cephes' `expf`.
#[inline]
pub(super) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, also without SSE4.1.
    const ROUND: f32 = 12_582_912.0;
    // From 2^-126 to 2^127 the scale below is a normal number.
    let clamped = x.clamp(-87.3, 88.0);
    let n = (clamped * LOG2_E + ROUND) - ROUND;
    let r = clamped - n * LN_2_HIGH - n * LN_2_LOW;
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // `n` is an integer here, so the low bits of `n + ROUND` hold it.
    let scale = f32::from_bits(((n + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127)) << 23);
    let value = p * scale;
    let value = if x > 88.0 { f32::INFINITY } else { value };
    let value = if x < -87.3 { 0.0 } else { value };
    if x.is_nan() { x } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_its_error_everywhere() {
        let mut worst = 0.0f64;
        for i in -870_000..=880_000 {
            let x = i as f32 * 1e-4;
            let reference = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / reference - 1.0).abs());
        }
        assert!(worst < 2e-7, "{worst:.2e}");
    }

    #[test]
    fn special_values_are_the_formulas() {
        let silu = |gate: f32| {
            let mut values = [gate];
            silu_mul(&mut values, &[1.0]);
            values[0]
        };
        assert!(silu(f32::NAN).is_nan());
        assert!(silu(f32::NEG_INFINITY).is_nan());
        assert_eq!(silu(f32::INFINITY), f32::INFINITY);
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(1e30), 1e30);
        assert_eq!(silu(-1e4), 0.0);
        assert_eq!(silu(100.0), 100.0);
        assert!((silu(-20.0) + 4.122_307e-8).abs() < 1e-13);
    }
}
