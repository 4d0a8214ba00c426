//! `silu(gate) ⊙ up` and its gradient, written so that the compiler can vectorise them.

use super::element::Sum;

/// `gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i]`.
pub(super) fn silu_mul<S: Sum>(gate: &mut [S], up: &[S]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        let (numerator, denominator) = sigmoid(*gate);
        *gate = *gate * numerator / denominator * *up;
    }
}

/// dgate, dup and z of one element.
pub(super) fn gate_backward<S: Sum>(gate: S, up: S, dz: S) -> [S; 3] {
    let (numerator, denominator) = sigmoid(gate);
    let sigmoid = numerator / denominator;
    let value = gate * sigmoid;
    [dz * up * (sigmoid + value * (S::ONE - sigmoid)), dz * value, value * up]
}

/// `1 / (1 + exp(-gate))` as a fraction; for negative gates `exp(gate) / (1 + exp(gate))`, where nothing overflows.
fn sigmoid<S: Sum>(gate: S) -> (S, S) {
    let is_negative = gate < S::default();
    let small = (if is_negative { gate } else { -gate }).exp();
    (if is_negative { small } else { S::ONE }, S::ONE + small)
}

/// `exp(x)` with a relative error below 2e-7 where it is a normal number, without a branch or a call. Overflows to infinity
/// and underflows to zero as exp does; NaN stays NaN.
///
/// Cody-Waite reduction to `|r| <= ln(2)/2`, then the polynomial of Cephes' `expf`.
#[inline]
pub(super) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, also without SSE4.1.
    const ROUND: f32 = 12_582_912.0;
    // Beyond these the result is 0 or infinite.
    let clamped = x.clamp(-104.0, 89.0);
    let n = (clamped * LOG2_E + ROUND) - ROUND;
    let r = clamped - n * LN_2_HIGH - n * LN_2_LOW;
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // `n` is an integer here, so the low bits of `n + ROUND` hold it. 2^n need not be a normal number; its halves are.
    let n = (n + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
    let power = |n: i32| f32::from_bits(n.wrapping_add(127).cast_unsigned() << 23);
    p * power(n >> 1) * power(n.wrapping_sub(n >> 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_its_error_everywhere() {
        let least = f64::from(f32::from_bits(1));
        let mut worst = 0.0f64;
        for i in -1_050_000..=887_228 {
            let x = i as f32 * 1e-4;
            let reference = f64::from(x).exp();
            // Below the normal numbers what counts is a step of theirs.
            worst = worst.max((f64::from(exp(x)) - reference).abs() / reference.max(least / 2e-7));
        }
        assert!(worst < 2e-7, "{worst:.2e}");
    }

    #[test]
    fn exp_ends_where_fp32_does() {
        for above in [88.723, 88.8, 89.0, 100.0, 1e30, f32::INFINITY] {
            assert_eq!(exp(above), f32::INFINITY, "{above}");
        }
        for below in [-104.0, -110.0, -1e30, f32::NEG_INFINITY] {
            assert_eq!(exp(below).to_bits(), 0, "{below}");
        }
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn large_negative_gates_are_small_and_not_nothing() {
        // Before exp(-gate) overflows, where it does, and behind.
        for gate in [-87.2f32, -88.1, -88.71, -88.73, -91.0, -94.0] {
            let up = 1e37f32;
            let mut silu = [gate];
            silu_mul(&mut silu, &[up]);
            let [dgate, dup, z] = gate_backward(gate, up, 1.0);
            let wide = gate_backward(f64::from(gate), f64::from(up), 1.0);
            for (value, reference) in [(silu[0], wide[2]), (dgate, wide[0]), (dup, wide[1]), (z, wide[2])] {
                assert!((f64::from(value) / reference - 1.0).abs() < 2e-4, "{gate}: {value:e}, not {reference:e}");
            }
        }
        let mut silu = [-88.1f32];
        silu_mul(&mut silu, &[1e37]);
        assert!((silu[0] + 4.83).abs() < 0.01, "{}", silu[0]);
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
