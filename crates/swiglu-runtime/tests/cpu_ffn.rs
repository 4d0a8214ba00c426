//! The whole FFN on the CPU: its gradients against finite differences in float64, its number formats against float64.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use half::{bf16, f16};
use rand::{SeedableRng, rngs::SmallRng};
use rand_distr::{Distribution, StandardNormal};
use swiglu_kernels::{WeightMajor, oracle};
use swiglu_runtime::cpu::CpuElement;
use swiglu_runtime::ffn::{Gradients, Keep};
use swiglu_runtime::{CpuRuntime, DType, FfnBackward, FfnForward, FfnGradients, FfnSpec, FfnWeights, Matrix, Options};

/// x, Wg, Wu, Wd, bg, bu, bd, dy.
const NAMES: [&str; 7] = ["x", "Wg", "Wu", "Wd", "bg", "bu", "bd"];
const GAP: usize = 3;
const BEFORE: f64 = 0.25;

/// An FFN with numbers; the matrices' rows have gaps.
#[derive(Clone)]
struct Case<T> {
    spec: FfnSpec,
    m: usize,
    /// As [`NAMES`], then dy.
    operands: Vec<Vec<T>>,
}

fn shapes(spec: &FfnSpec, m: usize) -> [(usize, usize); 8] {
    let (n, k) = (spec.n as usize, spec.k as usize);
    let [gate, down] = spec.weight_shapes();
    [(m, k), gate, gate, down, (1, n), (1, n), (1, k), (m, k)]
}

fn is_vector(index: usize) -> bool {
    (4..7).contains(&index)
}

fn stride(index: usize, cols: usize) -> usize {
    if is_vector(index) { cols } else { cols + GAP }
}

/// Every type of one kind of sums, through float64.
trait Number: CpuElement {
    fn of(value: f64) -> Self;
    fn wide(self) -> f64;
}

impl Number for f64 {
    fn of(value: f64) -> Self {
        value
    }
    fn wide(self) -> f64 {
        self
    }
}

macro_rules! number {
    ($($type:ty),+) => {$(
        impl Number for $type {
            fn of(value: f64) -> Self {
                <$type as CpuElement>::round(value as f32)
            }
            fn wide(self) -> f64 {
                f64::from(self.widen())
            }
        }
    )+};
}
number!(f32, f16, bf16);

impl<T: Number> Case<T> {
    fn new(spec: FfnSpec, m: usize) -> Self {
        let mut rng = SmallRng::seed_from_u64(5);
        let mut operand = |(index, (rows, cols)): (usize, (usize, usize))| -> Vec<T> {
            let scale = if (1..4).contains(&index) { 1.0 / f64::from(spec.k).sqrt() } else { 1.0 };
            let mut number = || -> f64 { StandardNormal.sample(&mut rng) };
            (0..rows * stride(index, cols)).map(|_| T::of(scale * number())).collect()
        };
        let operands = shapes(&spec, m).into_iter().enumerate().map(&mut operand).collect();
        Self { spec, m, operands }
    }

    /// The same numbers in float64.
    fn wide(&self) -> Case<f64> {
        let operands = self.operands.iter().map(|of| of.iter().map(|value| value.wide()).collect()).collect();
        Case { spec: FfnSpec { dtype: DType::F32, ..self.spec }, m: self.m, operands }
    }

    fn matrix(&self, index: usize) -> Matrix<&[T]> {
        let (rows, cols) = shapes(&self.spec, self.m)[index];
        Matrix::strided(&self.operands[index][..], rows, cols, cols + GAP)
    }

    fn weights(&self) -> FfnWeights<&[T]> {
        FfnWeights {
            gate: self.matrix(1),
            up: self.matrix(2),
            down: self.matrix(3),
            gate_bias: Some(&self.operands[4][..]),
            up_bias: Some(&self.operands[5][..]),
            down_bias: Some(&self.operands[6][..]),
        }
    }

    fn elements(bytes: u64) -> Vec<T> {
        vec![T::of(f64::NAN); bytes as usize / 2]
    }

    /// y and what was saved.
    fn forward(&self, runtime: &CpuRuntime) -> (Vec<T>, Vec<T>) {
        let plan = runtime.prepare_ffn(&self.spec).unwrap();
        let (m, k) = (self.m, self.spec.k as usize);
        let mut y = vec![T::of(f64::NAN); m * k];
        let mut saved = Self::elements(self.spec.saved_bytes(m as u32));
        let mut workspace = Self::elements(self.spec.forward_workspace_bytes(m as u32));
        plan.forward(FfnForward {
            x: self.matrix(0),
            weights: self.weights(),
            y: Matrix::new(&mut y[..], m, k),
            saved: (self.spec.keep == Keep::Preactivations).then_some(&mut saved[..]),
            workspace: &mut workspace[..],
        })
        .unwrap();
        (y, saved)
    }

    /// The gradients of [`NAMES`], only x's where the weights are frozen, without the gaps.
    fn backward<G: Number + CpuElement<Sum = T::Sum>>(&self, runtime: &CpuRuntime) -> Vec<Vec<f64>> {
        let plan = runtime.prepare_ffn(&self.spec).unwrap();
        let (_, mut saved) = self.forward(runtime);
        let shapes = shapes(&self.spec, self.m);
        let before = if self.spec.gradients == Gradients::Added { BEFORE } else { f64::NAN };
        let mut dx = vec![T::of(f64::NAN); shapes[0].0 * (shapes[0].1 + GAP)];
        let mut grads: Vec<Vec<G>> =
            (1..7).map(|index| vec![G::of(before); shapes[index].0 * stride(index, shapes[index].1)]).collect();
        let mut workspace = Self::elements(self.spec.backward_workspace_bytes(self.m as u32));
        let [gate, up, down, gate_bias, up_bias, down_bias] = &mut grads[..] else { panic!("six") };
        let grad = |of, index: usize| {
            let (rows, cols) = shapes[index];
            Matrix::strided(of, rows, cols, cols + GAP)
        };
        let gradients = FfnGradients {
            gate: grad(&mut gate[..], 1),
            up: grad(&mut up[..], 2),
            down: grad(&mut down[..], 3),
            biases: self.spec.bias_gradients.then_some([&mut gate_bias[..], &mut up_bias[..], &mut down_bias[..]]),
        };
        plan.backward(FfnBackward {
            x: self.matrix(0),
            weights: self.weights(),
            dy: self.matrix(7),
            dx: Matrix::strided(&mut dx[..], shapes[0].0, shapes[0].1, shapes[0].1 + GAP),
            gradients: (self.spec.gradients != Gradients::Input).then_some(gradients),
            saved: (self.spec.keep == Keep::Preactivations).then_some(&mut saved[..]),
            workspace: (self.spec.backward_workspace_bytes(1) > 0).then_some(&mut workspace[..]),
        })
        .unwrap();
        let inside = |index: usize, values: Vec<f64>| -> Vec<f64> {
            let (_, cols) = shapes[index];
            let stride = stride(index, cols);
            let (kept, gaps): (Vec<_>, Vec<_>) = values.into_iter().enumerate().partition(|(i, _)| i % stride < cols);
            let poison = if index == 0 { f64::NAN } else { before };
            assert!(
                gaps.iter().all(|(_, value)| value.total_cmp(&poison).is_eq() || value.is_nan() && poison.is_nan())
            );
            kept.into_iter().map(|(_, value)| value).collect()
        };
        let mut all = vec![inside(0, dx.into_iter().map(Number::wide).collect())];
        if self.spec.gradients != Gradients::Input {
            let count = if self.spec.bias_gradients { 6 } else { 3 };
            let wide = grads.into_iter().take(count).enumerate();
            all.extend(wide.map(|(i, of)| inside(i + 1, of.into_iter().map(Number::wide).collect())));
        }
        all
    }
}

impl Case<f64> {
    /// `y · dy`, whose gradients the backward computes.
    fn loss(&self, runtime: &CpuRuntime) -> f64 {
        let k = self.spec.k as usize;
        let (y, _) = self.forward(runtime);
        (0..self.m * k).map(|i| y[i] * self.operands[7][i / k * (k + GAP) + i % k]).sum()
    }

    /// Central differences of the loss by every element of operand `index`.
    fn differences(&self, runtime: &CpuRuntime, index: usize) -> Vec<f64> {
        let (rows, cols) = shapes(&self.spec, self.m)[index];
        let at = |shift: f64, element: usize| {
            let mut case = self.clone();
            case.operands[index][element] += shift;
            case.loss(runtime)
        };
        let h = 1e-5;
        (0..rows * cols)
            .map(|i| i / cols * stride(index, cols) + i % cols)
            .map(|element| (at(h, element) - at(-h, element)) / (2.0 * h))
            .collect()
    }
}

fn specs() -> impl Iterator<Item = FfnSpec> {
    WeightMajor::ALL.into_iter().flat_map(|weight_major| {
        [Keep::Preactivations, Keep::Nothing].into_iter().flat_map(move |keep| {
            [(Gradients::All, true), (Gradients::All, false), (Gradients::Added, true), (Gradients::Input, false)]
                .into_iter()
                .map(move |(gradients, bias_gradients)| FfnSpec {
                    dtype: DType::F32,
                    weight_major,
                    n: 7,
                    k: 6,
                    keep,
                    gradients,
                    bias_gradients,
                })
        })
    })
}

fn runtime() -> CpuRuntime {
    CpuRuntime::new(&Options::default())
}

#[test]
fn every_gradient_is_the_finite_difference_in_float64() {
    let runtime = runtime();
    for spec in specs().filter(|spec| spec.gradients != Gradients::Added) {
        let case = Case::<f64>::new(spec, 5);
        let gradients = case.backward::<f64>(&runtime);
        for (index, gradient) in gradients.into_iter().enumerate() {
            let error = oracle::relative_error(gradient, case.differences(&runtime, index));
            assert!(error < 1e-8, "{spec:?}: the gradient of {} is off by {error:.2e}", NAMES[index]);
        }
    }
}

/// In every mode the same as in float64, and larger than one block.
fn check_format<T, G>(dtype: DType, gradients: Gradients)
where
    T: Number<Sum = f32>,
    G: Number + CpuElement<Sum = f32>,
{
    let runtime = runtime();
    for spec in specs().filter(|spec| spec.gradients == gradients) {
        let case = Case::<T>::new(FfnSpec { dtype, n: 300, k: 130, ..spec }, 70);
        let outputs = case.backward::<G>(&runtime);
        let reference = case.wide().backward::<f64>(&runtime);
        assert_eq!(outputs.len(), reference.len());
        for (index, (output, reference)) in outputs.into_iter().zip(reference).enumerate() {
            let error = oracle::relative_error(output, reference);
            assert!(error < 4.0 * dtype.tolerance(), "{:?}: d{} has error {error:.2e}", case.spec, NAMES[index]);
        }
    }
}

#[test]
fn every_format_matches_float64_in_every_mode() {
    for gradients in [Gradients::All, Gradients::Input] {
        check_format::<f32, f32>(DType::F32, gradients);
        check_format::<f16, f16>(DType::F16, gradients);
        check_format::<bf16, bf16>(DType::Bf16, gradients);
    }
    check_format::<f32, f32>(DType::F32, Gradients::Added);
    check_format::<bf16, f32>(DType::Bf16, Gradients::Added);
}

#[test]
fn of_no_tokens_the_weights_gradients_are_zero() {
    let runtime = runtime();
    let spec = specs().next().unwrap();
    let gradients = Case::<f64>::new(spec, 0).backward::<f64>(&runtime);
    assert!(gradients.iter().flatten().all(|&value| value == 0.0));
}

#[test]
fn what_does_not_fit_is_named() {
    let runtime = runtime();
    let spec = FfnSpec { n: 4, k: 4, ..specs().next().unwrap() };
    let plan = runtime.prepare_ffn(&spec).unwrap();
    let zeros = [0f32; 16];
    let weight = Matrix::new(&zeros[..], 4, 4);
    let weights = FfnWeights {
        gate: weight,
        up: weight,
        down: weight,
        gate_bias: None,
        up_bias: None,
        down_bias: Some(&zeros[..2]),
    };
    let (mut y, mut workspace) = ([0f32; 16], [0f32; 64]);
    let result = plan.forward(FfnForward {
        x: weight,
        weights,
        y: Matrix::new(&mut y[..], 4, 4),
        saved: None,
        workspace: &mut workspace[..],
    });
    assert_eq!(result.unwrap_err().argument, "weights.down_bias");
    let result = plan.forward(FfnForward {
        x: weight,
        weights: FfnWeights { down_bias: None, ..weights },
        y: Matrix::new(&mut y[..], 4, 4),
        saved: None,
        workspace: &mut workspace[..],
    });
    assert_eq!(result.unwrap_err().argument, "saved");
}
