//! The whole FFN against float64, in every mode.

use super::{Host, gpu};
use half::bf16;
use rand::{SeedableRng, rngs::SmallRng};
use swiglu_kernels::oracle::{self, Entry, product};
use swiglu_kernels::problem::{Activation, WeightMajor};
use swiglu_runtime::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};
use swiglu_runtime::ffn::{FfnSpec, Gradients, Keep, RawFfn, RawFfnBackward, RawWeights};
use swiglu_runtime::{DType, Element, FfnBackward, FfnForward, FfnGradients, FfnPlan, FfnWeights, Matrix, RawMatrix};

/// Roundings of z, of the gradients and of their sums add up.
const ROUNDINGS: f64 = 4.0;

struct Case<T> {
    spec: FfnSpec,
    m: usize,
    x: Host<T>,
    dy: Host<T>,
    /// Gate, up, down, in the spec's order.
    weights: [Host<T>; 3],
    /// Of gate, up and down.
    biases: [Vec<T>; 3],
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
        let biases = [n, n, k].map(|count| Host::normal(1, count, 0, 1.0, &mut rng).data);
        Self { spec, m, x, dy, weights, biases }
    }

    /// y, dx, dWg, dWu and dWd in float64, the last three in the spec's order; then dbg, dbu and dbd.
    fn reference(&self) -> [Vec<f64>; 8] {
        let (m, n, k) = (self.m, self.spec.n as usize, self.spec.k as usize);
        let k_major = self.spec.weight_major == WeightMajor::K;
        // A weight as input by output.
        let weight = |index: usize, input: usize, output: usize| {
            let matrix = &self.weights[index];
            if k_major { matrix.at(output, input) } else { matrix.at(input, output) }
        };
        let x = |row, col| self.x.at(row, col);
        let dy = |row, col| self.dy.at(row, col);
        let with_bias = |mut sums: Vec<f64>, index: usize| {
            let bias = &self.biases[index];
            sums.iter_mut().enumerate().for_each(|(i, sum)| *sum += f64::from(bias[i % bias.len()].to_f32()));
            sums
        };
        let [gate, up] = [0, 1].map(|index| with_bias(product([m, n, k], x, |d, col| weight(index, d, col)), index));
        let dz = product([m, n, k], dy, |d, col| weight(2, col, d));
        let all: Vec<[f64; 3]> =
            (0..m * n).map(|i| oracle::gate_backward(Activation::Silu, gate[i], up[i], dz[i])).collect();
        let of = |which: usize| {
            let all = &all;
            move |row: usize, col: usize| all[row * n + col][which]
        };
        let (dgate, dup, z) = (of(0), of(1), of(2));
        let y = with_bias(product([m, k, n], z, |d, col| weight(2, d, col)), 2);
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
        let sums = |of: Entry<'_>, cols| product([1, cols, m], |_, _| 1.0, of);
        [
            y,
            dx,
            grad((&x, k), (&dgate, n)),
            grad((&x, k), (&dup, n)),
            grad((&z, n), (&dy, k)),
            sums(&dgate, n),
            sums(&dup, n),
            sums(&dy, k),
        ]
    }

    /// y, dx and, unless frozen, the gradients of the weights and the biases; on addresses, or on slices.
    fn run<O: Element + DeviceRepr>(&self, typed: bool) -> Vec<Vec<f64>> {
        let gpu = gpu();
        let (stream, spec) = (&gpu.stream, self.spec);
        let plan = gpu.runtime.prepare_ffn(&spec).unwrap();
        // One element more: of no tokens there are none, and the driver allocates no 0 bytes.
        let upload =
            |matrix: &Host<T>| stream.clone_htod(&[&matrix.data[..], &[T::from_f32(f32::NAN)]].concat()).unwrap();
        let (x, dy, weights) = (upload(&self.x), upload(&self.dy), self.weights.each_ref().map(upload));
        let raw = |data: u64, cols: usize| RawMatrix { address: data, stride: cols as i64 };
        let [gate, up, down] = [0, 1, 2].map(|i| raw(weights[i].device_ptr(stream).0, self.weights[i].cols));
        let k = spec.k as usize;
        let poison = |count: usize| stream.clone_htod(&vec![T::from_f32(f32::NAN); count.max(1)]).unwrap();
        let (y, dx) = (poison(self.m * k), poison(self.m * k));
        let before = if spec.gradients == Gradients::Added { 0.0 } else { f32::NAN };
        let biases = self.biases.each_ref().map(|bias| stream.clone_htod(bias).unwrap());
        let counts = self.weights.iter().map(|matrix| matrix.data.len()).chain(self.biases.iter().map(Vec::len));
        let grads: Vec<CudaSlice<O>> =
            counts.map(|count| stream.clone_htod(&vec![O::from_f32(before); count]).unwrap()).collect();
        let m = self.m as u32;
        if typed {
            return self.run_typed(&plan, &x, &dy, &weights, &biases, (y, dx), grads);
        }
        let bytes = |count: u64| stream.clone_htod(&vec![0xffu8; count.max(16) as usize]).unwrap();
        let saved = bytes(spec.saved_bytes(m));
        let forward_workspace = bytes(spec.forward_workspace_bytes(m));
        let backward_workspace = bytes(spec.backward_workspace_bytes(m));
        let [gate_bias, up_bias, down_bias] = biases.each_ref().map(|bias| bias.device_ptr(stream).0);
        let weights_raw = RawWeights { gate, up, down, gate_bias, up_bias, down_bias };
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
            bias_grads: [3, 4, 5].map(|i| grads[i].device_ptr(stream).0),
            saved: forward.saved,
            workspace: backward_workspace.device_ptr(stream).0,
        };
        // SAFETY: the slices above hold the operands and live until the results are read back below.
        unsafe { plan.forward_raw(stream.cu_stream(), &forward) }.unwrap();
        // SAFETY: as above.
        unsafe { plan.backward_raw(stream.cu_stream(), &backward) }.unwrap();
        self.read(&y, &dx, &grads)
    }

    fn read<O: Element + DeviceRepr>(
        &self,
        y: &CudaSlice<T>,
        dx: &CudaSlice<T>,
        grads: &[CudaSlice<O>],
    ) -> Vec<Vec<f64>> {
        let stream = &gpu().stream;
        let tokens = [y, dx].map(|of| stream.clone_dtoh(of).unwrap().iter().map(|v| f64::from(v.to_f32())).collect());
        let grads = grads.iter().filter(|_| self.spec.gradients != Gradients::Input);
        let grads = grads.map(|of| stream.clone_dtoh(of).unwrap().iter().map(|v| f64::from(v.to_f32())).collect());
        tokens.into_iter().chain(grads).collect()
    }

    #[allow(clippy::too_many_arguments, reason = "the operands of an FFN")]
    fn run_typed<O: Element + DeviceRepr>(
        &self,
        plan: &FfnPlan,
        x: &CudaSlice<T>,
        dy: &CudaSlice<T>,
        weights: &[CudaSlice<T>; 3],
        biases: &[CudaSlice<T>; 3],
        (mut y, mut dx): (CudaSlice<T>, CudaSlice<T>),
        mut grads: Vec<CudaSlice<O>>,
    ) -> Vec<Vec<f64>> {
        let (stream, spec, m, k) = (&gpu().stream, self.spec, self.m as u32, self.spec.k as usize);
        let elements =
            |bytes: u64| stream.clone_htod(&vec![T::from_f32(f32::NAN); bytes as usize / size_of::<T>() + 1]).unwrap();
        let mut saved = (spec.keep == Keep::Preactivations).then(|| elements(spec.saved_bytes(m)));
        let matrix = |index: usize| Matrix::new(&weights[index], self.weights[index].rows, self.weights[index].cols);
        let of = FfnWeights {
            gate: matrix(0),
            up: matrix(1),
            down: matrix(2),
            gate_bias: Some(&biases[0]),
            up_bias: Some(&biases[1]),
            down_bias: Some(&biases[2]),
        };
        let forward = FfnForward {
            x: Matrix::new(x, self.m, k),
            weights: of,
            y: Matrix::new(&mut y, self.m, k),
            saved: saved.as_mut(),
            workspace: &mut elements(spec.forward_workspace_bytes(m)),
        };
        plan.forward(stream, forward).unwrap();
        let [gate, up, down, gate_bias, up_bias, down_bias] = &mut grads[..] else { panic!("six gradients") };
        let shape = |of, index: usize| Matrix::new(of, self.weights[index].rows, self.weights[index].cols);
        let gradients = FfnGradients {
            gate: shape(gate, 0),
            up: shape(up, 1),
            down: shape(down, 2),
            biases: Some([gate_bias, up_bias, down_bias]),
        };
        let mut workspace = (spec.backward_workspace_bytes(1) > 0).then(|| elements(spec.backward_workspace_bytes(m)));
        let backward = FfnBackward {
            x: Matrix::new(x, self.m, k),
            weights: of,
            dy: Matrix::new(dy, self.m, k),
            dx: Matrix::new(&mut dx, self.m, k),
            gradients: (spec.gradients != Gradients::Input).then_some(gradients),
            saved: saved.as_mut(),
            workspace: workspace.as_mut(),
        };
        plan.backward(stream, backward).unwrap();
        self.read(&y, &dx, &grads)
    }
}

fn check<T: Element + DeviceRepr>(dtype: DType) {
    for weight_major in WeightMajor::ALL {
        for keep in [Keep::Preactivations, Keep::Nothing] {
            for gradients in [Gradients::Input, Gradients::All, Gradients::Added] {
                for (m, n, k) in [(200, 264, 136), (33, 75, 41)] {
                    let spec = FfnSpec { dtype, weight_major, n, k, keep, gradients, bias_gradients: true };
                    let case = Case::<T>::new(spec, m);
                    let run = |typed| {
                        if gradients == Gradients::Added { case.run::<f32>(typed) } else { case.run::<T>(typed) }
                    };
                    let outputs = run(false);
                    assert_eq!(outputs, run(true), "{spec:?} M {m}: other bits on slices");
                    let names = ["y", "dx", "dWg", "dWu", "dWd", "dbg", "dbu", "dbd"];
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

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn of_no_tokens_every_gradient_is_zero() {
    for (keep, weight_major) in [(Keep::Preactivations, WeightMajor::K), (Keep::Nothing, WeightMajor::N)] {
        let (dtype, gradients) = (DType::F32, Gradients::All);
        let spec = FfnSpec { dtype, weight_major, n: 24, k: 40, keep, gradients, bias_gradients: true };
        for typed in [false, true] {
            let outputs = Case::<f32>::new(spec, 0).run::<f32>(typed);
            assert!(outputs[2..].iter().flatten().all(|&value| value == 0.0), "{spec:?} on slices: {typed}");
        }
    }
}
