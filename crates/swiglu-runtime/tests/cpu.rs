//! The CPU backend against the float64 oracle: every layout, order, format and edge.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use half::{bf16, f16};
use rand::{SeedableRng, rngs::SmallRng};
use rand_distr::{Distribution, StandardNormal};
use swiglu_kernels::families::CpuConfig;
use swiglu_kernels::{Activation, oracle};
use swiglu_runtime::cpu::{self, CpuPlan};
use swiglu_runtime::{
    ArgumentError, DType, Element, Forward, ForwardSpec, GateOrder, Matrix, Preactivations, WeightLayout, Weights,
};

fn normal<T: Element>(count: usize, scale: f32, rng: &mut SmallRng) -> Vec<T> {
    let mut number = || -> f32 { StandardNormal.sample(rng) };
    (0..count).map(|_| T::from_f32(scale * number())).collect()
}

/// What `‖out − ref‖ / ‖ref‖` may be for `count` elements: over a few, single roundings do not average out.
fn limit(dtype: DType, count: usize) -> f64 {
    if count >= 256 { dtype.tolerance() } else { 2.5 * dtype.tolerance() }
}

/// Operands with `gap` elements between rows.
struct Case<T> {
    spec: ForwardSpec,
    m: usize,
    gap: usize,
    x: Vec<T>,
    weights: Vec<Vec<T>>,
    biases: Option<[Vec<T>; 2]>,
}

impl<T: Element> Case<T> {
    fn new(spec: ForwardSpec, m: usize, gap: usize, bias: bool) -> Self {
        let mut rng = SmallRng::seed_from_u64(u64::from(spec.n) + m as u64);
        let (n, k) = (spec.n as usize, spec.k as usize);
        let (rows, cols) = spec.layout.shape(n, k);
        let scale = 1.0 / (k.max(1) as f32).sqrt();
        let count = if spec.layout.is_packed() { 1 } else { 2 };
        Self {
            spec,
            m,
            gap,
            x: normal(m * (k + gap), 1.0, &mut rng),
            weights: (0..count).map(|_| normal(rows * (cols + gap), scale, &mut rng)).collect(),
            biases: bias.then(|| [normal(n, 1.0, &mut rng), normal(n, 1.0, &mut rng)]),
        }
    }

    fn run(&self, plan: &CpuPlan) -> Result<Vec<T>, ArgumentError> {
        self.run_both(plan).map(|(z, _)| z)
    }

    /// z and, where the plan saves them, the pre-activations, from poisoned memory.
    fn run_both(&self, plan: &CpuPlan) -> Result<(Vec<T>, Vec<T>), ArgumentError> {
        let (n, k) = (self.spec.n as usize, self.spec.k as usize);
        let (rows, cols) = self.spec.layout.shape(n, k);
        let mut z = vec![T::from_f32(f32::NAN); self.m * (n + self.gap)];
        let mut saved = vec![T::from_f32(f32::NAN); self.m * (2 * n + self.gap)];
        let weight = |index: usize| Matrix::strided(&self.weights[index][..], rows, cols, cols + self.gap);
        plan.launch(Forward {
            x: Matrix::strided(&self.x[..], self.m, k, k + self.gap),
            weights: match &self.weights[..] {
                [_] => Weights::Packed(weight(0)),
                _ => Weights::Separate { gate: weight(0), up: weight(1) },
            },
            gate_bias: self.biases.as_ref().map(|biases| &biases[0][..]),
            up_bias: self.biases.as_ref().map(|biases| &biases[1][..]),
            z: Matrix::strided(&mut z[..], self.m, n, n + self.gap),
            preactivations: (self.spec.save_preactivations)
                .then(|| Preactivations::Packed(Matrix::strided(&mut saved[..], self.m, 2 * n, 2 * n + self.gap))),
        })?;
        Ok((z, saved))
    }

    fn reference(&self) -> Vec<f64> {
        oracle::gated(Activation::Silu, &self.sums())
    }

    fn sums(&self) -> Vec<(f64, f64)> {
        let (n, k) = (self.spec.n as usize, self.spec.k as usize);
        let layout = self.spec.layout;
        let (_, cols) = layout.shape(n, k);
        let value = |values: &[T], row: usize, col: usize, cols: usize| {
            f64::from(values[row * (cols + self.gap) + col].to_f32())
        };
        let half = |second: bool| -> Vec<f64> {
            let matrix = if layout.is_packed() { &self.weights[0] } else { &self.weights[usize::from(second)] };
            let shift = if layout.is_packed() && second { n } else { 0 };
            let element = |row: usize, col: usize| match layout {
                WeightLayout::PackedKn | WeightLayout::SeparateKn => value(matrix, col, row + shift, cols),
                WeightLayout::PackedNk | WeightLayout::SeparateNk => value(matrix, row + shift, col, cols),
            };
            (0..n * k).map(|i| element(i / k, i % k)).collect()
        };
        let swap = layout.is_packed() && self.spec.gate_order == GateOrder::UpFirst;
        let (gate, up) = (half(swap), half(!swap));
        let x: Vec<f64> = (0..self.m * k).map(|i| value(&self.x, i / k, i % k, k)).collect();
        let wide = |values: &[T]| values.iter().map(|value| f64::from(value.to_f32())).collect::<Vec<_>>();
        let biases = self.biases.as_ref().map(|[gate, up]| (wide(gate), wide(up)));
        let sums = oracle::preactivations(&oracle::Forward {
            x: &x,
            gate: &gate,
            up: &up,
            gate_bias: biases.as_ref().map(|(gate, _)| &gate[..]),
            up_bias: biases.as_ref().map(|(_, up)| &up[..]),
            k,
        });
        if k == 0 { sums.repeat(self.m) } else { sums }
    }

    fn check(&self, plan: &CpuPlan) {
        let (z, saved) = self.run_both(plan).unwrap();
        let n = self.spec.n as usize;
        self.check_output(&z, n, &self.reference());
        if self.spec.save_preactivations {
            self.check_output(&saved, 2 * n, &oracle::packed(&self.sums(), n));
        } else {
            assert!(saved.iter().all(|value| value.to_f32().is_nan()));
        }
    }

    fn check_output(&self, output: &[T], cols: usize, reference: &[f64]) {
        let stride = cols + self.gap;
        let inside = (0..output.len()).filter(|i| i % stride < cols).map(|i| f64::from(output[i].to_f32()));
        let error = oracle::relative_error(inside, reference.iter().copied());
        let limit = limit(self.spec.dtype, reference.len());
        assert!(error <= limit, "{:?} m {} gap {}: error {error:.2e}", self.spec, self.m, self.gap);
        let between = (0..output.len()).filter(|i| i % stride >= cols);
        assert!(between.map(|i| output[i].to_f32()).all(f32::is_nan), "wrote between rows");
    }
}

fn spec(dtype: DType, layout: WeightLayout, n: u32, k: u32) -> ForwardSpec {
    ForwardSpec {
        dtype,
        layout,
        gate_order: GateOrder::GateFirst,
        n,
        k,
        save_preactivations: false,
        static_weights: false,
    }
}

fn small_blocks(threads: u32) -> [(u32, CpuConfig); 1] {
    [(1, CpuConfig { block_m: 8, block_n: 16, threads })]
}

#[test]
fn every_layout_order_format_and_edge_matches_the_oracle() {
    for layout in WeightLayout::ALL {
        for gate_order in [GateOrder::GateFirst, GateOrder::UpFirst] {
            for (index, (m, n, k)) in [(1, 1, 1), (3, 7, 5), (17, 40, 33), (33, 65, 128)].into_iter().enumerate() {
                let bias = index % 2 == 0;
                for (gap, save_preactivations) in [(0, false), (3, false), (0, true), (3, true)] {
                    let of = |dtype| ForwardSpec { gate_order, save_preactivations, ..spec(dtype, layout, n, k) };
                    let plan = |dtype| CpuPlan::new(of(dtype), &small_blocks(1)).unwrap();
                    Case::<f32>::new(of(DType::F32), m, gap, bias).check(&plan(DType::F32));
                    Case::<f16>::new(of(DType::F16), m, gap, bias).check(&plan(DType::F16));
                    Case::<bf16>::new(of(DType::Bf16), m, gap, bias).check(&plan(DType::Bf16));
                }
            }
        }
    }
}

#[test]
fn every_config_gives_the_oracles_values_and_the_same_bits_twice() {
    use swiglu_kernels::families::{Config, Target, candidates};
    let spec = spec(DType::F32, WeightLayout::SeparateNk, 300, 200);
    let case = Case::<f32>::new(spec, 140, 0, true);
    for config in candidates(&spec.problem(140), Target::Cpu { threads: cpu::threads() }) {
        let Config::Cpu(config) = config else { panic!("the CPU's space has CPU configs only") };
        let plan = CpuPlan::new(spec, &[(140, config)]).unwrap();
        case.check(&plan);
        assert_eq!(case.run(&plan).unwrap(), case.run(&plan).unwrap());
    }
}

#[test]
fn long_sums_stay_within_the_bars() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let spec = spec(dtype, WeightLayout::PackedKn, 64, 8192);
        let plan = CpuPlan::new(spec, &[]).unwrap();
        match dtype {
            DType::F32 => Case::<f32>::new(spec, 16, 0, false).check(&plan),
            DType::F16 => Case::<f16>::new(spec, 16, 0, false).check(&plan),
            _ => Case::<bf16>::new(spec, 16, 0, false).check(&plan),
        }
    }
}

#[test]
fn special_values_behave_as_the_formula_says() {
    let spec = spec(DType::F32, WeightLayout::SeparateNk, 24, 16);
    let plan = CpuPlan::new(spec, &small_blocks(1)).unwrap();
    let specials = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, 1e30, -1e30, 200.0, -200.0];
    let mut case = Case::<f32>::new(spec, specials.len(), 0, false);
    for (row, value) in specials.into_iter().enumerate() {
        case.x[row * 16..(row + 1) * 16].fill(0.0);
        case.x[row * 16 + 3] = value;
    }
    let narrow = |value: f64| f64::from(value as f32);
    let (z, reference) = (case.run(&plan).unwrap(), case.reference());
    for (row, special) in specials.into_iter().enumerate() {
        let range = row * 24..(row + 1) * 24;
        let out = z[range.clone()].iter().copied().map(f64::from);
        let error = oracle::relative_error(out, reference[range].iter().copied().map(narrow));
        assert!(error <= DType::F32.tolerance(), "row of {special}: {error:.2e}");
    }
}

#[test]
fn empty_problems_return_and_k_of_zero_leaves_the_biases() {
    for (m, n, k) in [(0, 8, 8), (3, 0, 8), (0, 0, 0)] {
        let spec = spec(DType::F32, WeightLayout::SeparateNk, n, k);
        Case::<f32>::new(spec, m, 0, false).run(&CpuPlan::new(spec, &[]).unwrap()).unwrap();
    }
    for layout in WeightLayout::ALL {
        let spec = spec(DType::F32, layout, 24, 0);
        Case::<f32>::new(spec, 5, 0, true).check(&CpuPlan::new(spec, &small_blocks(1)).unwrap());
    }
}

#[test]
fn wrong_arguments_are_named() {
    let spec = spec(DType::F32, WeightLayout::PackedNk, 8, 4);
    let plan = CpuPlan::new(spec, &[]).unwrap();
    let (x, w) = (vec![0.0f32; 64], vec![0.0f32; 64]);
    let mut z = vec![0.0f32; 64];
    let mut launch = |x, weights, rows| {
        plan.launch(Forward {
            x,
            weights,
            gate_bias: None,
            up_bias: None,
            z: Matrix::new(&mut z[..], rows, 8),
            preactivations: None,
        })
    };
    let packed = Weights::Packed(Matrix::new(&w[..], 16, 4));
    launch(Matrix::new(&x[..], 2, 4), packed, 2).unwrap();
    let named = |result: Result<(), ArgumentError>| result.unwrap_err().argument;
    assert_eq!(named(launch(Matrix::new(&x[..], 2, 5), packed, 2)), "x");
    assert_eq!(named(launch(Matrix::new(&x[..7], 2, 4), packed, 2)), "x");
    assert_eq!(named(launch(Matrix::new(&x[..], 2, 4), Weights::Packed(Matrix::new(&w[..], 4, 16)), 2)), "weights");
    let two = Weights::Separate { gate: Matrix::new(&w[..], 8, 4), up: Matrix::new(&w[..], 8, 4) };
    assert_eq!(named(launch(Matrix::new(&x[..], 2, 4), two, 2)), "weights");
    assert_eq!(named(launch(Matrix::new(&x[..], 2, 4), packed, 3)), "z");
    let half = [f16::ZERO; 64];
    let mut z_half = [f16::ZERO; 64];
    let wrong_type = plan.launch(Forward {
        x: Matrix::new(&half[..], 2, 4),
        weights: Weights::Packed(Matrix::new(&half[..], 16, 4)),
        gate_bias: None,
        up_bias: None,
        z: Matrix::new(&mut z_half[..], 2, 8),
        preactivations: None,
    });
    assert_eq!(named(wrong_type), "x");
}

#[test]
fn tf32_and_too_many_threads_are_refused_with_the_reason() {
    let error = CpuPlan::new(spec(DType::Tf32, WeightLayout::SeparateNk, 8, 8), &[]).unwrap_err().to_string();
    assert!(error.contains("tf32"), "{error}");
    let config = CpuConfig { block_m: 8, block_n: 8, threads: cpu::threads() + 1 };
    let error = CpuPlan::new(spec(DType::F32, WeightLayout::SeparateNk, 8, 8), &[(1, config)]).unwrap_err().to_string();
    assert!(error.contains("threads"), "{error}");
}
