//! The whole FFN on the CPU, forward and backward, by the steps of [`FfnPlan`](crate::FfnPlan).

use super::product::{Product, View, cut};
use super::{CpuElement, CpuPlan, Threads, add, check_type, round, silu};
use crate::ffn::operands::{FfnBackward, FfnForward, FfnGradients, FfnWeights};
use crate::ffn::{FfnSpec, Gradients};
use crate::operands::{ArgumentError, Forward, Matrix, Preactivations, Weights};
use rayon::prelude::*;
use swiglu_kernels::families::CpuConfig;
use swiglu_kernels::{DType, Op, Problem, WeightMajor};

/// A prepared FFN on the CPU. `Send` and `Sync`. It takes what its GPU sibling takes, as host slices; a plan for `f32` takes
/// `f64` slices, too, and then computes in float64.
#[derive(Debug)]
pub struct CpuFfnPlan {
    spec: FfnSpec,
    /// With the pre-activations where they are kept.
    gated: CpuPlan,
    /// The same for a backward that computes them again.
    again: Option<CpuPlan>,
}

/// Columns of one task of a sum down the rows.
const SUMMED_COLUMNS: usize = 256;

impl CpuFfnPlan {
    pub(crate) fn new(spec: FfnSpec, gated: CpuPlan, again: Option<CpuPlan>) -> Self {
        Self { spec, gated, again }
    }

    /// What it was prepared for.
    pub fn spec(&self) -> &FfnSpec {
        &self.spec
    }

    /// The forward: the fused gate and up, then the down projection. The same bits in every run.
    ///
    /// # Errors
    /// [`ArgumentError`] names the operand that does not fit; nothing was computed then.
    pub fn forward<T: CpuElement>(&self, forward: FfnForward<&[T], &mut [T]>) -> Result<(), ArgumentError> {
        let spec = &self.spec;
        check_type::<T>("x", spec.dtype)?;
        let m = forward.check(spec, size_of::<T>() as u64, |slice| slice.len(), |slice| slice.len())?;
        let (rows, n, k) = (m as usize, spec.n as usize, spec.k as usize);
        let FfnForward { x, weights, y, saved, workspace } = forward;
        let z = &mut workspace[..rows * n];
        gated(&self.gated, x, &weights, z, saved.map(|saved| &mut saved[..2 * rows * n]))?;
        let step = self.step(Op::Down, m);
        let down = step.product(&[(packed(z, n), view(&weights.down))]);
        let bias = weights.down_bias;
        step.pool.install(|| {
            down.run(cut(lines(y), k, down.block), |col, cols, sums, out| {
                for (sums, out) in sums.chunks_mut(cols).zip(out) {
                    add(sums, bias.map(|bias| &bias[col..col + cols]));
                    round(out, sums);
                }
            });
        });
        Ok(())
    }

    /// The backward: the gate's backward behind the dz GEMM, then dx, then the gradients of weights and biases that are not
    /// frozen; these have the type of the spec's number format, `f32` where they are added to. The same bits in every run.
    ///
    /// # Errors
    /// As [`CpuFfnPlan::forward`].
    pub fn backward<T, G>(&self, backward: FfnBackward<&[T], &mut [T], &mut [G]>) -> Result<(), ArgumentError>
    where
        T: CpuElement,
        G: CpuElement<Sum = T::Sum>,
    {
        let spec = &self.spec;
        check_type::<T>("x", spec.dtype)?;
        check_type::<G>("gradients", if spec.gradients == Gradients::Added { DType::F32 } else { spec.dtype })?;
        let len = |slice: &&[T]| slice.len();
        let m = backward.check(spec, size_of::<T>() as u64, len, |slice| slice.len(), |slice| slice.len())?;
        let (rows, n) = (m as usize, spec.n as usize);
        let FfnBackward { x, weights, dy, dx, gradients, saved, workspace } = backward;
        let with_z = self.again.is_some() || gradients.is_some();
        let (z, rest) = workspace.unwrap_or_default().split_at_mut(if with_z { rows * n } else { 0 });
        let pair = &mut saved.unwrap_or(rest)[..2 * rows * n];
        if let Some(again) = &self.again {
            gated(again, x, &weights, z, Some(pair))?;
        }
        // What was computed again has left z already.
        self.dgated(m, &dy, &weights, pair, if self.again.is_none() { z } else { &mut [] });
        self.input_grad(m, pair, &weights, dx);
        if let Some(gradients) = gradients {
            self.weight_grads(m, &x, &dy, pair, z, gradients);
        }
        Ok(())
    }

    /// dgate and dup in the places of gate and up, and z again where there is room for it.
    fn dgated<T: CpuElement>(
        &self,
        m: u32,
        dy: &Matrix<&[T]>,
        weights: &FfnWeights<&[T]>,
        pair: &mut [T],
        z: &mut [T],
    ) {
        let n = self.spec.n as usize;
        let step = self.step(Op::Dgated, m);
        let dz = step.product(&[(view(dy), view(&weights.down))]);
        let (gate, up): (Vec<_>, Vec<_>) = pair.chunks_mut(2 * n).map(|row| row.split_at_mut(n)).unzip();
        let (gate, up) = (cut(gate.into_iter(), n, dz.block), cut(up.into_iter(), n, dz.block));
        let mut z = cut(z.chunks_mut(n), n, dz.block);
        z.resize_with(gate.len(), Vec::new);
        let outs: Vec<_> = gate.into_iter().zip(up).zip(z).collect();
        step.pool.install(|| {
            dz.run(outs, |_, cols, sums, ((gate, up), z)| {
                let mut z = z.into_iter();
                for ((dz, gate), up) in sums.chunks(cols).zip(gate).zip(up) {
                    let mut z = z.next().into_iter().flatten();
                    for ((dz, gate), up) in dz.iter().zip(gate).zip(up) {
                        let [dgate, dup, value] = silu::gate_backward(gate.widen(), up.widen(), *dz);
                        (*gate, *up) = (T::round(dgate), T::round(dup));
                        if let Some(z) = z.next() {
                            *z = T::round(value);
                        }
                    }
                }
            });
        });
    }

    fn input_grad<T: CpuElement>(&self, m: u32, pair: &[T], weights: &FfnWeights<&[T]>, dx: Matrix<&mut [T]>) {
        let step = self.step(Op::InputGrad, m);
        let [gate, up] = halves(pair, self.spec.n as usize);
        let product = step.product(&[(gate, view(&weights.gate)), (up, view(&weights.up))]);
        let cols = dx.cols;
        let outs = cut(lines(dx), cols, product.block);
        step.pool.install(|| product.run(outs, |_, cols, sums, out| store(out, cols, sums, false)));
    }

    fn weight_grads<T: CpuElement, G: CpuElement<Sum = T::Sum>>(
        &self,
        m: u32,
        x: &Matrix<&[T]>,
        dy: &Matrix<&[T]>,
        pair: &[T],
        z: &[T],
        gradients: FfnGradients<&mut [G]>,
    ) {
        let spec = &self.spec;
        let n = spec.n as usize;
        let added = spec.gradients == Gradients::Added;
        let [dgate, dup] = halves(pair, n);
        let (x, dy, z) = (view(x), view(dy), packed(z, n));
        let gate_up = self.step(Op::WeightGrad, m);
        let down = self.step(Op::DownWeightGrad, m);
        let FfnGradients { gate, up, down: down_grad, biases } = gradients;
        for (step, tokens, grads, out) in
            [(&gate_up, x, dgate, gate), (&gate_up, x, dup, up), (&down, z, dy, down_grad)]
        {
            let k_major = spec.weight_major == WeightMajor::K;
            let product = step.product(&[if k_major { (grads, tokens) } else { (tokens, grads) }]);
            let cols = out.cols;
            let outs = cut(lines(out), cols, product.block);
            step.pool.install(|| product.run(outs, |_, cols, sums, out| store(out, cols, sums, added)));
        }
        let sums = [dgate, dup, dy].into_iter().zip(biases.into_iter().flatten()).zip([n, n, spec.k as usize]);
        gate_up
            .pool
            .install(|| sums.for_each(|((rows, out), cols)| sum_rows(rows, m as usize, &mut out[..cols], added)));
    }

    fn step(&self, op: Op, m: u32) -> Step<'_> {
        let (config, pool) = &self.gated.entries[self.gated.table.anchor(m)];
        Step { problem: self.spec.step(op).with_m(m), config, pool }
    }
}

/// A step, with the blocks and threads of the forward.
struct Step<'a> {
    problem: Problem,
    config: &'a CpuConfig,
    pool: &'a Threads,
}

impl Step<'_> {
    /// One half of the step's GEMM, on these operands.
    fn product<'a, T: CpuElement>(&self, pairs: &[(View<'a, T>, View<'a, T>)]) -> Product<'a, T> {
        let block = (self.config.block_m as usize, self.config.block_n as usize);
        Product::new(self.problem.product().as_ref(), pairs.to_vec(), block)
    }
}

fn gated<T: CpuElement>(
    plan: &CpuPlan,
    x: Matrix<&[T]>,
    weights: &FfnWeights<&[T]>,
    z: &mut [T],
    saved: Option<&mut [T]>,
) -> Result<(), ArgumentError> {
    let (m, n) = (x.rows, plan.spec.n as usize);
    plan.launch(Forward {
        x,
        weights: Weights::Separate { gate: weights.gate, up: weights.up },
        gate_bias: weights.gate_bias,
        up_bias: weights.up_bias,
        z: Matrix::new(z, m, n),
        preactivations: saved.map(|saved| Preactivations::Packed(Matrix::new(saved, m, 2 * n))),
    })
}

fn view<'a, T>(matrix: &Matrix<&'a [T]>) -> View<'a, T> {
    View { data: matrix.data, stride: matrix.row_stride }
}

/// Rows without gaps.
fn packed<T>(data: &[T], cols: usize) -> View<'_, T> {
    View { data, stride: cols }
}

/// Gate and up, or their gradients, beside each other in one `[M, 2N]` buffer.
fn halves<T>(pair: &[T], n: usize) -> [View<'_, T>; 2] {
    [0, n].map(|first| View { data: pair.get(first..).unwrap_or_default(), stride: 2 * n })
}

/// The rows of a matrix, with the gaps behind them.
fn lines<'a, T>(matrix: Matrix<&'a mut [T]>) -> impl Iterator<Item = &'a mut [T]> + use<'a, T> {
    matrix.data.chunks_mut(matrix.row_stride.max(matrix.cols)).take(matrix.rows)
}

fn store<T: CpuElement>(out: Vec<&mut [T]>, cols: usize, sums: &mut [T::Sum], added: bool) {
    for (sums, out) in sums.chunks_mut(cols).zip(out) {
        if added {
            add(sums, Some(&*out));
        }
        round(out, sums);
    }
}

/// `out[c]` = the sum of column c, the rows in their order.
fn sum_rows<T, G>(matrix: View<'_, T>, rows: usize, out: &mut [G], added: bool)
where
    T: CpuElement,
    G: CpuElement<Sum = T::Sum>,
{
    // The stride of a single row may be anything.
    let cols = out.len();
    out.par_chunks_mut(SUMMED_COLUMNS).enumerate().for_each(|(index, out)| {
        let first = index * SUMMED_COLUMNS;
        let mut sums = vec![T::Sum::default(); out.len()];
        for row in matrix.data.get(first..).unwrap_or_default().chunks(matrix.stride.max(cols)).take(rows) {
            add(&mut sums, Some(&row[..out.len()]));
        }
        let summed = sums.len();
        store(vec![out], summed, &mut sums, added);
    });
}
