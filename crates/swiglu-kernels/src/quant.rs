//! Scaled number formats on the host: conversions, and the packing of weights that kernels read.
//!
//! Kernels and oracle read what is stored; how good a quantisation is, is the caller's affair. These functions take the
//! nearest code to `value / scale`, with the largest magnitude of a row (or group) at the end of the range.

use crate::problem::{Format, INT4_GROUP};
use half::{bf16, f16};

/// The largest e4m3 number.
pub const E4M3_MAX: f32 = 448.0;

/// The code of the e4m3 number nearest to `value`, ties to even; beyond ±448 the last one, NaN stays NaN.
pub fn e4m3_of_f32(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return sign | 0x7f;
    }
    if magnitude >= E4M3_MAX {
        return sign | 0x7e;
    }
    // Below the smallest normal number the codes count steps of 2^-9.
    if magnitude < 0.015_625 {
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    let bits = magnitude.to_bits();
    let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
    // From fp32's exponent bias to e4m3's: 127 - 7.
    sign | ((rounded >> 20) - (120 << 3)) as u8
}

/// The number of an e4m3 code.
pub fn f32_of_e4m3(code: u8) -> f32 {
    let magnitude = match code & 0x7f {
        0x7f => f32::NAN,
        // 2^120 makes up for the exponents' biases, of the numbers below the normal ones too.
        magnitude => f32::from_bits(u32::from(magnitude) << 20) * f32::from_bits(0x7b80_0000),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Number `index` (0 to 7, along K) of a word of int4.
pub const fn int4_of_word(word: u32, index: u32) -> i32 {
    (word >> (4 * index) & 15) as i32 - 8
}

impl Format {
    /// Number `index` of the stored element that starts at `bytes`; `None` where there are too few of either.
    pub fn read(self, bytes: &[u8], index: u32) -> Option<f32> {
        if index >= self.numbers() {
            return None;
        }
        Some(match self {
            Self::F32 => f32::from_le_bytes(*bytes.first_chunk()?),
            Self::F16 => f16::from_le_bytes(*bytes.first_chunk()?).to_f32(),
            Self::Bf16 => bf16::from_le_bytes(*bytes.first_chunk()?).to_f32(),
            Self::E4m3 => f32_of_e4m3(*bytes.first()?),
            Self::Int4 => int4_of_word(u32::from_le_bytes(*bytes.first_chunk()?), index) as f32,
        })
    }
}

/// A matrix in e4m3: `values[row][col] ≈ scales[row] * codes[row][col]`.
#[derive(Debug, Clone, PartialEq)]
pub struct E4m3Rows {
    /// Codes, in the order of the values.
    pub codes: Vec<u8>,
    /// One a row; 1 where all of a row is 0, or so small that no scale is as small.
    pub scales: Vec<f32>,
}

/// Quantises rows of `cols` values: `[M, K]` tokens, or `[N, K]` (`[2N, K]`) weights. An infinity or NaN makes its row's
/// scale so; a kernel's result is then NaN in that row (or column).
pub fn quantise_e4m3(values: &[f32], cols: usize) -> E4m3Rows {
    let mut rows = E4m3Rows { codes: Vec::with_capacity(values.len()), scales: Vec::new() };
    for row in values.chunks(cols.max(1)) {
        let scale = scale_of(row, E4M3_MAX);
        rows.codes.extend(row.iter().map(|value| e4m3_of_f32(value / scale)));
        rows.scales.push(scale);
    }
    rows
}

/// Int4 weights of `n` columns of z as GPTQ packs them, symmetric (zero point 8), without act-order:
/// `weight[k][n] ≈ scales[k / 128][n] * int4`.
#[derive(Debug, Clone, PartialEq)]
pub struct Int4Columns {
    /// `[ceil(K / 8), N]`, eight neighbours along K in a word (`qweight`); beyond K numbers are 0.
    pub words: Vec<u32>,
    /// `[ceil(K / 128), N]` (`scales`), already rounded by the caller's `round`.
    pub scales: Vec<f32>,
}

/// Quantises weights given as `[N, K]` rows, as `nn.Linear` stores them. `round` narrows a scale to the format in which
/// kernels will read it, so that codes are nearest to what is multiplied.
pub fn quantise_int4(weights: &[f32], k: usize, round: impl Fn(f32) -> f32) -> Int4Columns {
    let group = INT4_GROUP as usize;
    let n = weights.len() / k.max(1);
    let mut columns =
        Int4Columns { words: vec![0x8888_8888; k.div_ceil(8) * n], scales: vec![0.0; k.div_ceil(group) * n] };
    for (column, row) in weights.chunks_exact(k.max(1)).enumerate() {
        for (index, values) in row.chunks(group).enumerate() {
            let scale = round(scale_of(values, 7.0));
            columns.scales[index * n + column] = scale;
            for (at, value) in values.iter().enumerate() {
                let code = ((value / scale).round_ties_even().clamp(-8.0, 7.0) as i32 + 8) as u32;
                let (word, shift) = ((index * group + at) / 8 * n + column, 4 * (at % 8));
                columns.words[word] = columns.words[word] & !(15 << shift) | code << shift;
            }
        }
    }
    columns
}

/// What takes the largest magnitude of `values` to `end`; 1 where all are 0, or so small that no scale is as small.
fn scale_of(values: &[f32], end: f32) -> f32 {
    let largest =
        values.iter().fold(0.0f32, |largest, value| if value.is_nan() { *value } else { largest.max(value.abs()) });
    let scale = largest / end;
    if scale == 0.0 { 1.0 } else { scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_reads_as_ocp_says_and_comes_back() {
        let known = [
            (0x00, 0.0),
            (0x01, 0.001_953_125),
            (0x07, 0.013_671_875),
            (0x08, 0.015_625),
            (0x38, 1.0),
            (0xc4, -3.0),
            (0x7e, 448.0),
        ];
        for (code, value) in known {
            assert_eq!(f32_of_e4m3(code), value);
        }
        for code in 0..=255 {
            let value = f32_of_e4m3(code);
            assert_eq!(e4m3_of_f32(value), code, "{value}");
        }
        assert!(f32_of_e4m3(0x7f).is_nan() && f32_of_e4m3(0xff).is_nan());
    }

    #[test]
    fn rounding_is_to_the_nearest_code_and_ties_are_even() {
        let mut codes: Vec<f32> = (0..0x7f).map(f32_of_e4m3).collect();
        codes.dedup();
        for (pair, even) in codes.windows(2).zip([true, false].into_iter().cycle()) {
            let middle = (pair[0] + pair[1]) / 2.0;
            let tie = if even { pair[0] } else { pair[1] };
            assert_eq!(f32_of_e4m3(e4m3_of_f32(middle)), tie);
            assert_eq!(f32_of_e4m3(e4m3_of_f32(middle.next_down())), pair[0]);
            assert_eq!(f32_of_e4m3(e4m3_of_f32(-middle.next_up())), -pair[1]);
        }
        assert_eq!([449.0, 1e9, f32::INFINITY].map(e4m3_of_f32), [0x7e; 3]);
    }

    #[test]
    fn rows_of_e4m3_are_within_half_a_step() {
        let values: Vec<f32> =
            (0..96).map(|i| ((i * 37 % 96) as f32 - 48.0) * if i < 48 { 1.0 } else { 1e-3 }).collect();
        let rows = quantise_e4m3(&values, 48);
        for (at, (&code, value)) in rows.codes.iter().zip(&values).enumerate() {
            let back = rows.scales[at / 48] * f32_of_e4m3(code);
            assert!(
                (back - value).abs() <= value.abs() / 16.0 + rows.scales[at / 48] / 1024.0,
                "{value} came back as {back}"
            );
        }
        assert_eq!(quantise_e4m3(&[0.0; 4], 4).scales, [1.0]);
        let smallest = quantise_e4m3(&[1e-44, 0.0], 2);
        assert_eq!((smallest.scales, smallest.codes), (vec![1.0], vec![0, 0]), "no scale is as small");
        assert!(quantise_e4m3(&[0.0, f32::NAN], 2).scales[0].is_nan());
    }

    #[test]
    fn int4_words_hold_eight_neighbours_along_k_lowest_first() {
        // Two columns of 136 along K: a whole group and a part of one.
        let (n, k) = (2, 136);
        let value =
            |column: usize, at: usize| if at % 8 == 5 { 7.0 } else { ((at * 5 + column * 3) % 15) as f32 - 7.0 };
        let weights: Vec<f32> = (0..n * k).map(|i| value(i / k, i % k) * if i % k < 128 { 0.5 } else { 2.0 }).collect();
        let packed = quantise_int4(&weights, k, |scale| scale);
        assert_eq!((packed.words.len(), packed.scales.len()), (17 * n, 2 * n));
        for (i, weight) in weights.iter().enumerate() {
            let (column, at) = (i / k, i % k);
            let code = int4_of_word(packed.words[at / 8 * n + column], (at % 8) as u32);
            assert_eq!(code as f32 * packed.scales[at / 128 * n + column], *weight, "column {column}, k {at}");
        }
        let ragged = quantise_int4(&[7.0, -7.0, 1.0], 3, |scale| scale);
        assert_eq!(ragged.words, [0x8888_891f], "7, -7, 1, then zeros");
    }

    #[test]
    fn formats_read_what_they_store() {
        assert_eq!(Format::F32.read(&1.5f32.to_le_bytes(), 0), Some(1.5));
        assert_eq!(Format::F16.read(&f16::from_f32(-2.0).to_le_bytes(), 0), Some(-2.0));
        assert_eq!(Format::Bf16.read(&bf16::from_f32(3.0).to_le_bytes(), 0), Some(3.0));
        assert_eq!(Format::E4m3.read(&[0x38], 0), Some(1.0));
        assert_eq!(Format::Int4.read(&0x0000_00f0u32.to_le_bytes(), 1), Some(7.0));
        assert_eq!(Format::Int4.read(&[0; 4], 8), None);
        assert_eq!(Format::Bf16.read(&[0], 0), None);
    }
}
