//! Products of matrices in blocks, one task per block of the output: what every step of the FFN is on the CPU.

use super::element::CpuElement;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;
use swiglu_kernels::problem::{self, OperandMajor};

/// Adds `left · right` to row-major `sums`.
pub(super) fn multiply<S: super::Sum>(left: MatRef<'_, S>, right: MatRef<'_, S>, sums: &mut [S]) {
    let sums = MatMut::from_row_major_slice_mut(sums, left.nrows(), right.ncols());
    matmul(sums, Accum::Add, left, right, S::ONE, Par::Seq);
}

/// `rows` x `columns` of a row-major matrix in the format of sums: in place where it is, else widened into `scratch`.
pub(super) fn rows_as_sums<'a, T: CpuElement>(
    data: &'a [T],
    rows: usize,
    columns: usize,
    stride: usize,
    scratch: &'a mut Vec<T::Sum>,
) -> MatRef<'a, T::Sum> {
    if let Some(data) = T::as_sums(data) {
        let needed = (rows - 1) * stride + columns;
        return MatRef::from_row_major_slice_with_stride(&data[..needed], rows, columns, stride);
    }
    scratch.clear();
    for row in 0..rows {
        scratch.extend(data[row * stride..row * stride + columns].iter().map(|value| value.widen()));
    }
    MatRef::from_row_major_slice(&scratch[..], rows, columns)
}

/// Rows of a matrix in memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct View<'a, T> {
    pub(super) data: &'a [T],
    pub(super) stride: usize,
}

impl<T: CpuElement> View<'_, T> {
    /// `count` rows (or columns) of an operand from `first` on, as `[count, depth]`.
    fn outer<'b>(
        &'b self,
        major: OperandMajor,
        first: usize,
        count: usize,
        depth: usize,
        scratch: &'b mut Vec<T::Sum>,
    ) -> MatRef<'b, T::Sum> {
        match major {
            OperandMajor::Depth => rows_as_sums(&self.data[first * self.stride..], count, depth, self.stride, scratch),
            OperandMajor::Outer => rows_as_sums(&self.data[first..], depth, count, self.stride, scratch).transpose(),
        }
    }
}

/// `out[rows, cols]`, a sum of products of operands in the orders `left_major` and `right_major`.
pub(super) struct Product<'a, T> {
    rows: usize,
    cols: usize,
    depth: usize,
    left_major: OperandMajor,
    right_major: OperandMajor,
    /// Two where they are paired along the sums.
    pairs: Vec<(View<'a, T>, View<'a, T>)>,
    /// Rows and columns of one task.
    pub(super) block: (usize, usize),
}

/// Buffers of one worker, kept from task to task.
#[derive(Default)]
struct Scratch<S> {
    left: Vec<S>,
    right: Vec<S>,
    sums: Vec<S>,
}

impl<'a, T: CpuElement> Product<'a, T> {
    /// One half of a step's GEMM; empty where the step has none.
    pub(super) fn new(
        shape: Option<&problem::Product>,
        pairs: Vec<(View<'a, T>, View<'a, T>)>,
        block: (usize, usize),
    ) -> Self {
        let size = |of: fn(&problem::Product) -> u32| shape.map_or(0, |shape| of(shape) as usize);
        let major = |of: fn(&problem::Product) -> OperandMajor| shape.map_or(OperandMajor::Depth, of);
        Self {
            rows: size(|shape| shape.rows),
            cols: size(|shape| shape.cols),
            depth: size(|shape| shape.depth),
            left_major: major(|shape| shape.left),
            right_major: major(|shape| shape.right),
            pairs,
            block,
        }
    }

    /// Computes every block on the current pool; `finish` gets a block's first column, its columns, its sums, and its part of
    /// `outs`, which is cut into blocks of the same size ([`cut`]).
    pub(super) fn run<O: Send>(&self, outs: Vec<O>, finish: impl Fn(usize, usize, &mut [T::Sum], O) + Sync) {
        let across = self.cols.div_ceil(self.block.1);
        outs.into_par_iter().enumerate().for_each_init(Scratch::default, |scratch, (index, out)| {
            let (row, col) = (index / across * self.block.0, index % across * self.block.1);
            let (rows, cols) = (self.block.0.min(self.rows - row), self.block.1.min(self.cols - col));
            let Scratch { left, right, sums } = scratch;
            sums.clear();
            sums.resize(rows * cols, T::Sum::default());
            for pair in self.pairs.iter().filter(|_| self.depth > 0) {
                let left = pair.0.outer(self.left_major, row, rows, self.depth, left);
                let right = pair.1.outer(self.right_major, col, cols, self.depth, right);
                multiply(left, right.transpose(), sums);
            }
            finish(col, cols, sums, out);
        });
    }
}

/// Cuts rows of `cols` elements into blocks that share nothing, so that tasks need no lock: the blocks of the first rows first.
pub(super) fn cut<'a, T>(
    rows: impl Iterator<Item = &'a mut [T]>,
    cols: usize,
    (block_m, block_n): (usize, usize),
) -> Vec<Vec<&'a mut [T]>> {
    let across = cols.div_ceil(block_n);
    let mut blocks: Vec<Vec<&'a mut [T]>> = Vec::new();
    for (row, line) in rows.enumerate() {
        for (index, piece) in line[..cols].chunks_mut(block_n).enumerate() {
            if row % block_m == 0 {
                blocks.push(Vec::with_capacity(block_m));
            }
            blocks[row / block_m * across + index].push(piece);
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiglu_kernels::problem::Paired;
    use swiglu_kernels::{DType, Op, Problem, WeightMajor, oracle};

    /// Numbers of a matrix of this shape, with a gap behind every row.
    fn operand((rows, cols): (u32, u32), seed: usize) -> (Vec<f64>, usize) {
        let stride = cols as usize + 3;
        ((0..rows as usize * stride).map(|i| ((i * 37 + seed * 11) % 23) as f64 - 11.0).collect(), stride)
    }

    fn view((data, stride): &(Vec<f64>, usize)) -> View<'_, f64> {
        View { data, stride: *stride }
    }

    #[test]
    fn every_step_in_small_blocks_is_the_oracles_product() {
        for op in [Op::Down, Op::InputGrad, Op::DownInputGrad, Op::WeightGrad, Op::DownWeightGrad] {
            for major in WeightMajor::ALL {
                let problem = Problem::forward(DType::F32, major, 21, 37, 18).with_op(op);
                let shape = problem.product().unwrap();
                let [left, right] = [(shape.left_shape(), 1), (shape.right_shape(), 5)]
                    .map(|(shape, seed)| [operand(shape, seed), operand(shape, seed + 1)]);
                let entry = |(data, stride): &(Vec<f64>, usize)| {
                    let (data, stride) = (data.clone(), *stride);
                    move |row: usize, col: usize| data[row * stride + col]
                };
                let (left_at, right_at) = (left.each_ref().map(entry), right.each_ref().map(entry));
                let zero: oracle::Entry<'_> = &|_, _| 0.0;
                let reference = oracle::step(
                    &problem,
                    &oracle::Step {
                        left: [&left_at[0], &left_at[1]],
                        right: [&right_at[0], &right_at[1]],
                        saved: [zero; 2],
                        bias: None,
                    },
                );
                // Of what is paired in rows or columns the first half.
                let count = if shape.paired == Paired::Depth { 2 } else { 1 };
                let pairs = left.iter().zip(&right).take(count).map(|(l, r)| (view(l), view(r))).collect();
                let block = (8, 16);
                let product = Product::<f64>::new(Some(&shape), pairs, block);
                let cols = shape.cols as usize;
                let mut out = vec![f64::NAN; shape.rows as usize * cols];
                product.run(cut(out.chunks_mut(cols), cols, block), |_, cols, sums, out| {
                    for (out, sums) in out.into_iter().zip(sums.chunks(cols)) {
                        out.copy_from_slice(sums);
                    }
                });
                // Of integers every sum is exact.
                assert_eq!(out, reference[0], "{op} {major}");
            }
        }
    }
}
