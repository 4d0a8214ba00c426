//! How a tensor lies in memory, and which row strides say so: as `_operands.py` has it, without copies.

use swiglu_runtime::{DType, WeightLayout};

/// More dimensions than anybody has.
pub(crate) const MAX_DIMS: usize = 8;

/// A tensor but for its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lie {
    /// CUDA's number of the GPU; -1: the CPU.
    pub(crate) device: i32,
    /// None: a format that no plan takes.
    pub(crate) dtype: Option<DType>,
    pub(crate) dims: usize,
    pub(crate) shape: [i64; MAX_DIMS],
    pub(crate) strides: [i64; MAX_DIMS],
}

impl Lie {
    pub(crate) fn shape(&self) -> &[i64] {
        self.shape.get(..self.dims).unwrap_or_default()
    }

    pub(crate) fn strides(&self) -> &[i64] {
        self.strides.get(..self.dims).unwrap_or_default()
    }
}

/// Of one format and device.
pub(crate) fn is_alike(one: &Lie, other: &Lie) -> bool {
    one.dtype == other.dtype && one.device == other.device
}

/// Whether it is `len` adjacent elements such as those of `like`.
pub(crate) fn is_vector(lie: &Lie, len: i64, like: &Lie) -> bool {
    is_alike(lie, like) && lie.shape() == [len] && is_row_major(lie)
}

/// The shape with another last size.
pub(crate) fn with_last(lie: &Lie, last: i64) -> Vec<i64> {
    let leading = lie.shape().split_last().map_or(&[][..], |(_, leading)| leading);
    [leading, &[last]].concat()
}

/// What torch calls contiguous.
fn is_row_major(lie: &Lie) -> bool {
    let mut expected = 1_i64;
    lie.shape().iter().zip(lie.strides()).rev().all(|(&size, &stride)| {
        let fits = size == 1 || stride == expected;
        expected = expected.saturating_mul(size);
        fits
    })
}

/// As `row_stride` in Python.
fn row_stride(rows: i64, cols: i64, row_stride: i64, col_stride: i64) -> Option<i64> {
    let fits = (col_stride == 1 || cols <= 1) && (row_stride >= cols || rows <= 1);
    fits.then_some(if rows > 1 { row_stride } else { cols })
}

/// Tokens, columns and row stride of what is not empty, without a copy.
pub(crate) fn rows(lie: &Lie) -> Option<(i64, i64, i64)> {
    let (&cols, leading) = lie.shape().split_last()?;
    let m = leading.iter().try_fold(1_i64, |product, &size| product.checked_mul(size))?;
    if m == 0 || cols == 0 || i32::try_from(m).is_err() {
        return None;
    }
    if is_row_major(lie) {
        return Some((m, cols, cols));
    }
    let &[down, across] = lie.strides() else { return None };
    Some((m, cols, row_stride(m, cols, down, across)?))
}

/// The layout of both weights, of one shape, and their row strides, without a copy.
pub(crate) fn weights(gate: &Lie, up: &Lie) -> Option<(WeightLayout, i64, i64)> {
    let &[n, k] = gate.shape() else { return None };
    if is_row_major(gate) && is_row_major(up) {
        return Some((WeightLayout::SeparateNk, k, k));
    }
    let (&[gate_down, gate_across], &[up_down, up_across]) = (gate.strides(), up.strides()) else { return None };
    if let (Some(gate), Some(up)) = (row_stride(n, k, gate_down, gate_across), row_stride(n, k, up_down, up_across)) {
        return Some((WeightLayout::SeparateNk, gate, up));
    }
    let gate = row_stride(k, n, gate_across, gate_down)?;
    Some((WeightLayout::SeparateKn, gate, row_stride(k, n, up_across, up_down)?))
}

/// Rows, layout and row stride of a down projection `[out, n]` beside `like`.
pub(crate) fn down_matrix(down: &Lie, n: i64, like: &Lie) -> Option<(i64, WeightLayout, i64)> {
    let &[out, cols] = down.shape() else { return None };
    let (layout, stride, _) = weights(down, down)?;
    (cols == n && out > 0 && is_alike(down, like)).then_some((out, layout, stride))
}
