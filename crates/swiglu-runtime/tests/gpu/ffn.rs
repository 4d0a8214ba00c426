//! The whole FFN against float64, in every mode.

use super::{Host, gpu};
use half::bf16;
use rand::{SeedableRng, rngs::SmallRng};
use swiglu_kernels::oracle::{self, Entry, product};
use swiglu_kernels::problem::{Activation, WeightMajor};
use swiglu_runtime::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};
use swiglu_runtime::ffn::{FfnSpec, Gradients, Keep, RawFfn, RawFfnBackward, RawWeights};
use swiglu_runtime::{DType, Element, RawMatrix};

/// Roundings of z, of the gradients and of their sums add up.
const ROUNDINGS: f64 = 4.0;

struct Case<T> {
    spec: FfnSpec,
    m: usize,
    x: Host<T>,
    dy: Host<T>,
    /// Gate, up, down, in the spec's order.
    weights: [Host<T>; 3],
}

impl<T: Element + DeviceRepr> Case<T> {
    fn new(spec: FfnSpec, m: usize) -> Self {
        let mut rng = SmallRng::seed_from_u64(23);
        let (n, k) = (spec.n as usize, spec.k as usize);
        let mut weight = |rows: usize, cols: usize| {
            let (rows, cols) = if spec.weight_major == WeightMajor::K { (cols, rows) } else { (rows, cols) };
            Host::normal(rows, cols, 0, 1.0 / (spec.k as f32).sqrt(), &mut rng)
        };
        let weights = [weight(k, n), weight(k, n), weight(n, k)];
        let (x, dy) = (Host::normal(m, k, 0, 1.0, &mut rng), Host::normal(m, k, 0, 1.0, &mut rng));
        Self { spec, m, x, dy, weights }
    }

    /// y, dx, dWg, dWu and dWd in float64, the last three in the spec's order.
    fn reference(&self) -> [Vec<f64>; 5] {
        let (m, n, k) = (self.m, self.spec.n as usize, self.spec.k as usize);
        let k_major = self.spec.weight_major == WeightMajor::K;
        // A weight as input by output.
        let weight = |index: usize, input: usize, output: usize| {
            let matrix = &self.weights[index];
            if k_major { matrix.at(output, input) } else { matrix.at(input, output) }
        };
        let x = |row, col| self.x.at(row, col);
        let dy = |row, col| self.dy.at(row, col);
        let [gate, up] = [0, 1].map(|index| product([m, n, k], x, |d, col| weight(index, d, col)));
        let dz = product([m, n, k], dy, |d, col| weight(2, col, d));
        let all: Vec<[f64; 3]> =
            (0..m * n).map(|i| oracle::gate_backward(Activation::Silu, gate[i], up[i], dz[i])).collect();
        let of = |which: usize| {
            let all = &all;
            move |row: usize, col: usize| all[row * n + col][which]
        };
        let (dgate, dup, z) = (of(0), of(1), of(2));
        let y = product([m, k, n], z, |d, col| weight(2, d, col));
        let mut dx = product([m, k, n], dgate, |d, col| weight(0, col, d));
        let second = product([m, k, n], dup, |d, col| weight(1, col, d));
        dx.iter_mut().zip(second).for_each(|(sum, term)| *sum += term);
        // tokens-major a^T b, in the weights' order.
        let grad = |(a, a_cols): (Entry<'_>, usize), (b, b_cols): (Entry<'_>, usize)| {
            if k_major {
                product([b_cols, a_cols, m], |row, d| b(d, row), a)
            } else {
                product([a_cols, b_cols, m], |row, d| a(d, row), b)
            }
        };
        [y, dx, grad((&x, k), (&dgate, n)), grad((&x, k), (&dup, n)), grad((&z, n), (&dy, k))]
    }

    /// y, dx and, unless frozen, the gradients of the weights.
    fn run<O: Element + DeviceRepr>(&self) -> Vec<Vec<f64>> {
        let gpu = gpu();
        let (stream, spec) = (&gpu.stream, self.spec);
        let plan = gpu.runtime.prepare_ffn(&spec).unwrap();
        let upload = |matrix: &Host<T>| stream.clone_htod(&matrix.data).unwrap();
        let (x, dy, weights) = (upload(&self.x), upload(&self.dy), self.weights.each_ref().map(upload));
        let raw = |data: u64, cols: usize| RawMatrix { address: data, stride: cols as i64 };
        let [gate, up, down] = [0, 1, 2].map(|i| raw(weights[i].device_ptr(stream).0, self.weights[i].cols));
        let k = spec.k as usize;
        let poison = |count: usize| stream.clone_htod(&vec![T::from_f32(f32::NAN); count]).unwrap();
        let (y, dx) = (poison(self.m * k), poison(self.m * k));
        let before = if spec.gradients == Gradients::Added { 0.0 } else { f32::NAN };
        let grads: Vec<CudaSlice<O>> = self
            .weights
            .iter()
            .map(|matrix| stream.clone_htod(&vec![O::from_f32(before); matrix.data.len()]).unwrap())
            .collect();
        let m = self.m as u32;
        let bytes = |count: u64| stream.clone_htod(&vec![0xffu8; count.max(16) as usize]).unwrap();
        let saved = bytes(spec.saved_bytes(m));
        let forward_workspace = bytes(spec.forward_workspace_bytes(m));
        let backward_workspace = bytes(spec.backward_workspace_bytes(m));
        let weights_raw = RawWeights { gate, up, down, ..RawWeights::default() };
        let forward = RawFfn {
            m,
            x: raw(x.device_ptr(stream).0, k),
            weights: weights_raw,
            y: raw(y.device_ptr(stream).0, k),
            saved: saved.device_ptr(stream).0,
            workspace: forward_workspace.device_ptr(stream).0,
        };
        let backward = RawFfnBackward {
            m,
            x: forward.x,
            weights: weights_raw,
            dy: raw(dy.device_ptr(stream).0, k),
            dx: raw(dx.device_ptr(stream).0, k),
            weight_grads: [0, 1, 2].map(|i| raw(grads[i].device_ptr(stream).0, self.weights[i].cols)),
            saved: forward.saved,
            workspace: backward_workspace.device_ptr(stream).0,
        };
        // SAFETY: the slices above hold the operands and live until the results are read back below.
        unsafe { plan.forward_raw(stream.cu_stream(), &forward) }.unwrap();
        // SAFETY: as above.
        unsafe { plan.backward_raw(stream.cu_stream(), &backward) }.unwrap();
        let tokens = [&y, &dx].map(|of| stream.clone_dtoh(of).unwrap().iter().map(|v| f64::from(v.to_f32())).collect());
        let weights = grads.iter().filter(|_| spec.gradients != Gradients::Input);
        let weights = weights.map(|of| stream.clone_dtoh(of).unwrap().iter().map(|v| f64::from(v.to_f32())).collect());
        tokens.into_iter().chain(weights).collect()
    }
}

fn check<T: Element + DeviceRepr>(dtype: DType) {
    for weight_major in WeightMajor::ALL {
        for keep in [Keep::Preactivations, Keep::Nothing] {
            for gradients in [Gradients::Input, Gradients::All, Gradients::Added] {
                for (m, n, k) in [(200, 264, 136), (33, 75, 41)] {
                    let spec = FfnSpec { dtype, weight_major, n, k, keep, gradients, bias_gradients: false };
                    let case = Case::<T>::new(spec, m);
                    let outputs = if gradients == Gradients::Added { case.run::<f32>() } else { case.run::<T>() };
                    let names = ["y", "dx", "dWg", "dWu", "dWd"];
                    for ((output, reference), name) in outputs.iter().zip(case.reference()).zip(names) {
                        let error = oracle::relative_error(output.iter().copied(), reference);
                        assert!(error <= ROUNDINGS * dtype.tolerance(), "{spec:?} M {m}: {name} has error {error:.2e}");
                    }
                }
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_whole_ffn_and_its_gradients_match_float64_in_every_mode() {
    check::<f32>(DType::F32);
    check::<bf16>(DType::Bf16);
}
