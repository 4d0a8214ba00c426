//! Every family, layout and number format against the float64 oracle, on a GPU.
#![allow(unsafe_code, reason = "launches through raw addresses in a graph")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use half::{bf16, f16};
use rand::seq::IndexedRandom;
use rand::{SeedableRng, rngs::SmallRng};
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use swiglu_kernels::families::{Config, Family, Target, candidates, default_of};
use swiglu_kernels::{Activation, oracle};
use swiglu_runtime::cudarc::driver::{CudaContext, CudaStream, DeviceRepr, sys};
use swiglu_runtime::{
    DType, Element, Forward, ForwardSpec, GateOrder, LaunchError, Matrix, Options, Plan, Preactivations, RawForward,
    Runtime, WeightLayout, Weights,
};

#[path = "gpu/ffn.rs"]
mod ffn;
#[path = "gpu/library.rs"]
mod library;
#[path = "gpu/scaled.rs"]
mod scaled;
#[path = "gpu/static_weights.rs"]
mod static_weights;
#[path = "gpu/steps.rs"]
mod steps;

struct Gpu {
    stream: Arc<CudaStream>,
    runtime: Runtime,
}

/// Held while a graph is captured and while a stream is made: the latter waits for the whole context, which no capture survives.
static CAPTURING: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    CAPTURING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn gpu() -> Gpu {
    swiglu_runtime::library::driver().unwrap();
    let _alone = alone();
    let context = CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    let folder = std::env::temp_dir().join("swiglu-gpu-test");
    let options =
        Options { db: Some(folder.join("no-db")), cubin_cache: Some(folder.join("cubin")), ..Options::from_env() };
    Gpu { runtime: Runtime::new(&context, &options).unwrap(), stream }
}

/// Compiles side by side what is prepared one after another later: the CUBINs stay on disk.
fn compile_ahead<P, E: std::fmt::Debug>(configs: &[Config], prepare: impl Fn(Config) -> Result<P, E> + Sync) {
    configs.par_iter().for_each(|config| {
        prepare(*config).unwrap_or_else(|error| panic!("{config}: {error:?}"));
    });
}

/// A matrix on the host with `gap` foreign elements after every row.
struct Host<T> {
    data: Vec<T>,
    rows: usize,
    cols: usize,
    row_stride: usize,
}

const FOREIGN: f32 = 12345.0;

impl<T: Element> Host<T> {
    fn normal(rows: usize, cols: usize, gap: usize, scale: f32, rng: &mut SmallRng) -> Self {
        let row_stride = cols + gap;
        let value = |i: usize, rng: &mut SmallRng| {
            let number: f32 = StandardNormal.sample(rng);
            T::from_f32(if i % row_stride.max(1) < cols { scale * number } else { FOREIGN })
        };
        Self { data: (0..rows * row_stride).map(|i| value(i, rng)).collect(), rows, cols, row_stride }
    }

    fn at(&self, row: usize, col: usize) -> f64 {
        f64::from(self.data[row * self.row_stride + col].to_f32())
    }
}

/// What `‖out − ref‖ / ‖ref‖` may be for `count` elements: over a few, single roundings do not average out.
fn limit(dtype: DType, count: usize) -> f64 {
    if count >= 256 { dtype.tolerance() } else { 2.5 * dtype.tolerance() }
}

/// Operands of one check.
struct Case<T> {
    spec: ForwardSpec,
    m: usize,
    x: Host<T>,
    /// One packed matrix or two.
    weights: Vec<Host<T>>,
    biases: Option<[Vec<T>; 2]>,
    z_gap: usize,
}

impl<T: Element + DeviceRepr> Case<T> {
    fn new(spec: ForwardSpec, m: usize, gap: usize, bias: bool, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (n, k) = (spec.n as usize, spec.k as usize);
        let (rows, cols) = spec.layout.shape(n, k);
        let scale = 1.0 / (k.max(1) as f32).sqrt();
        let count = if spec.layout.is_packed() { 1 } else { 2 };
        let x = Host::normal(m, k, gap, 1.0, &mut rng);
        let weights = (0..count).map(|_| Host::normal(rows, cols, gap, scale, &mut rng)).collect();
        let mut vector = || (0..n).map(|_| T::from_f32(StandardNormal.sample(&mut rng))).collect::<Vec<T>>();
        let biases = bias.then(|| [vector(), vector()]);
        Self { spec, m, x, weights, biases, z_gap: gap }
    }

    /// Gate and up as `[n, k]` rows.
    fn wide_weights(&self) -> [Vec<f64>; 2] {
        let (n, k) = (self.spec.n as usize, self.spec.k as usize);
        let layout = self.spec.layout;
        let half = |second: bool| {
            let matrix = if layout.is_packed() { &self.weights[0] } else { &self.weights[usize::from(second)] };
            let shift = if layout.is_packed() && second { n } else { 0 };
            let element = |row: usize, col: usize| match layout {
                WeightLayout::PackedKn | WeightLayout::SeparateKn => matrix.at(col, row + shift),
                WeightLayout::PackedNk | WeightLayout::SeparateNk => matrix.at(row + shift, col),
            };
            (0..n)
                .flat_map(|row| (0..k).map(move |col| (row, col)))
                .map(|(row, col)| element(row, col))
                .collect::<Vec<_>>()
        };
        let (first, second) = (half(false), half(true));
        if layout.is_packed() && self.spec.gate_order == GateOrder::UpFirst { [second, first] } else { [first, second] }
    }

    fn reference(&self) -> Vec<f64> {
        self.reference_rows(&(0..self.m).collect::<Vec<_>>())
    }

    /// Some rows of the reference, where all would take the CPU too long.
    fn reference_rows(&self, rows: &[usize]) -> Vec<f64> {
        oracle::gated(Activation::Silu, &self.sums_of_rows(rows))
    }

    fn sums_of_rows(&self, rows: &[usize]) -> Vec<(f64, f64)> {
        let [gate, up] = self.wide_weights();
        let x: Vec<f64> = rows.iter().flat_map(|&row| (0..self.x.cols).map(move |col| self.x.at(row, col))).collect();
        let wide = |values: &Vec<T>| values.iter().map(|value| f64::from(value.to_f32())).collect::<Vec<_>>();
        let biases = self.biases.as_ref().map(|[gate, up]| (wide(gate), wide(up)));
        let operands = oracle::Forward {
            x: &x,
            gate: &gate,
            up: &up,
            gate_bias: biases.as_ref().map(|(gate, _)| &gate[..]),
            up_bias: biases.as_ref().map(|(_, up)| &up[..]),
            k: self.spec.k as usize,
        };
        let sums = oracle::preactivations(&operands);
        if self.spec.k == 0 { sums.repeat(rows.len()) } else { sums }
    }

    /// z with its gaps, from poisoned memory.
    fn run(&self, gpu: &Gpu, plan: &Plan) -> Result<Vec<T>, LaunchError> {
        self.run_both(gpu, plan).map(|(z, _)| z)
    }

    /// z and, where the plan saves them, the pre-activations.
    fn run_both(&self, gpu: &Gpu, plan: &Plan) -> Result<(Vec<T>, Vec<T>), LaunchError> {
        let (n, k) = (self.spec.n as usize, self.spec.k as usize);
        // An allocation cannot be empty; a matrix can.
        let padding = [T::from_f32(0.0)];
        let upload =
            |values: &[T]| gpu.stream.clone_htod(if values.is_empty() { &padding[..] } else { values }).unwrap();
        let x = upload(&self.x.data);
        let weights: Vec<_> = self.weights.iter().map(|matrix| upload(&matrix.data)).collect();
        let biases = self.biases.as_ref().map(|[gate, up]| (upload(gate), upload(up)));
        let z_stride = n + self.z_gap;
        let mut z = gpu.stream.clone_htod(&vec![T::from_f32(f32::NAN); (self.m * z_stride).max(1)]).unwrap();
        let saved_stride = 2 * n + self.z_gap;
        let mut saved = gpu.stream.clone_htod(&vec![T::from_f32(f32::NAN); (self.m * saved_stride).max(1)]).unwrap();
        let (rows, cols) = self.spec.layout.shape(n, k);
        let matrix = |index: usize| Matrix::strided(&weights[index], rows, cols, self.weights[index].row_stride);
        plan.launch(
            &gpu.stream,
            Forward {
                x: Matrix::strided(&x, self.m, k, self.x.row_stride),
                weights: if self.spec.layout.is_packed() {
                    Weights::Packed(matrix(0))
                } else {
                    Weights::Separate { gate: matrix(0), up: matrix(1) }
                },
                gate_bias: biases.as_ref().map(|(gate, _)| gate),
                up_bias: biases.as_ref().map(|(_, up)| up),
                z: Matrix::strided(&mut z, self.m, n, z_stride),
                preactivations: (self.spec.save_preactivations)
                    .then(|| Preactivations::Packed(Matrix::strided(&mut saved, self.m, 2 * n, saved_stride))),
            },
        )?;
        Ok((gpu.stream.clone_dtoh(&z).unwrap(), gpu.stream.clone_dtoh(&saved).unwrap()))
    }

    fn check(&self, gpu: &Gpu, plan: &Plan, what: &str) {
        let (z, saved) = self.run_both(gpu, plan).unwrap();
        let n = self.spec.n as usize;
        self.check_output(&z, n, &self.reference(), what);
        if self.spec.save_preactivations {
            let sums = self.sums_of_rows(&(0..self.m).collect::<Vec<_>>());
            self.check_output(&saved, 2 * n, &oracle::packed(&sums, n), what);
        }
    }

    fn check_output(&self, output: &[T], cols: usize, reference: &[f64], what: &str) {
        let stride = cols + self.z_gap;
        let inside = |i: &usize| i % stride.max(1) < cols;
        let out = (0..self.m * stride).filter(inside).map(|i| f64::from(output[i].to_f32()));
        let error = oracle::relative_error(out, reference.iter().copied());
        let limit = limit(self.spec.dtype, reference.len());
        assert!(error <= limit, "{what}: error {error:.2e} in {cols} columns, {:?} m {}", self.spec, self.m);
        let gap_kept = (0..self.m * stride).filter(|i| !inside(i)).all(|i| output[i].to_f32().is_nan());
        assert!(gap_kept, "{what}: wrote between rows of {cols} columns, {:?} m {}", self.spec, self.m);
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

/// Runs `body` with the element type of every number format.
macro_rules! for_dtypes {
    (|$dtype:ident, $element:ident| $body:block) => {{
        { type $element = f32; for $dtype in [DType::F32, DType::Tf32] $body }
        { type $element = f16; let $dtype = DType::F16; $body }
        { type $element = bf16; let $dtype = DType::Bf16; $body }
    }};
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn every_layout_order_bias_and_edge_matches_the_oracle() {
    let gpu = gpu();
    let sizes = [(1, 8, 8), (3, 1, 1), (17, 72, 40), (64, 64, 64), (65, 129, 257), (130, 200, 96), (257, 100, 1000)];
    for_dtypes!(|dtype, T| {
        for layout in WeightLayout::ALL {
            for gate_order in [GateOrder::GateFirst, GateOrder::UpFirst] {
                for (index, (m, n, k)) in sizes.into_iter().enumerate() {
                    let save_preactivations = index % 3 == 0;
                    let spec = ForwardSpec { gate_order, save_preactivations, ..spec(dtype, layout, n, k) };
                    let plan = gpu.runtime.prepare(&spec).unwrap();
                    for gap in [0, 3, 8] {
                        Case::<T>::new(spec, m, gap, index % 2 == 0, index as u64).check(&gpu, &plan, "default");
                    }
                }
            }
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_seeded_sample_of_every_space_matches_the_oracle() {
    use rand::seq::IndexedRandom;
    let gpu = gpu();
    let mut rng = SmallRng::seed_from_u64(7);
    for_dtypes!(|dtype, T| {
        for layout in [WeightLayout::SeparateNk, WeightLayout::PackedKn] {
            for (m, n, k) in [(200, 264, 328), (77, 136, 72)] {
                let spec = ForwardSpec { save_preactivations: m == 77, ..spec(dtype, layout, n, k) };
                let case = Case::<T>::new(spec, m, 0, true, 3);
                let mut all = candidates(&spec.problem(m as u32), Target::Gpu(gpu.runtime.gpu().arch));
                all.retain(|config| config.family().has_source());
                let chosen: Vec<Config> = all.sample(&mut rng, 12).copied().chain(all.last().copied()).collect();
                for config in chosen {
                    let plan = gpu.runtime.prepare_config(&spec, config).unwrap();
                    case.check(&gpu, &plan, &config.to_string());
                }
            }
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn few_tokens_match_the_oracle_in_configs_that_are_made_for_them() {
    let gpu = gpu();
    let arch = gpu.runtime.gpu().arch;
    for layout in [WeightLayout::SeparateNk, WeightLayout::PackedKn] {
        let spec = spec(DType::Bf16, layout, 200, 776);
        let all = candidates(&spec.problem(1), Target::Gpu(arch)).into_iter();
        for config in all.filter(|config| config.family() == Family::MmaDirect) {
            let plan = gpu.runtime.prepare_config(&spec, config).unwrap();
            for (m, gap) in [(1, 0), (7, 8), (33, 0)] {
                Case::<bf16>::new(spec, m, gap, m == 7, 13).check(&gpu, &plan, &config.to_string());
            }
        }
    }
    let mut rng = SmallRng::seed_from_u64(23);
    for (dtype, save_preactivations) in [(DType::Bf16, false), (DType::Bf16, true), (DType::F16, false)] {
        let spec = ForwardSpec { save_preactivations, ..spec(dtype, WeightLayout::SeparateNk, 1000, 776) };
        let all = candidates(&spec.problem(1), Target::Gpu(arch)).into_iter();
        let streams: Vec<Config> = all.filter(|config| config.family() == Family::WgmmaStream).collect();
        assert!(streams.len() > 100 || !arch.has_wgmma, "{}", streams.len());
        for config in streams.sample(&mut rng, 30) {
            let plan = gpu.runtime.prepare_config(&spec, *config).unwrap();
            for (m, gap) in [(1, 0), (7, 8), (33, 0), (130, 8)] {
                match dtype {
                    DType::F16 => Case::<f16>::new(spec, m, gap, m == 7, 13).check(&gpu, &plan, &config.to_string()),
                    _ => Case::<bf16>::new(spec, m, gap, m == 7, 13).check(&gpu, &plan, &config.to_string()),
                }
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_seeds_shapes_are_right_in_every_layout_and_format() {
    let gpu = gpu();
    for_dtypes!(|dtype, T| {
        for layout in WeightLayout::ALL {
            for d in [2048, 4096] {
                let spec = spec(dtype, layout, d, d);
                let plan = gpu.runtime.prepare(&spec).unwrap();
                let mut case = Case::<T>::new(spec, 1024, 0, false, 11);
                let sampled = case.reference_rows(&[0, 63, 255, 1023]);
                for (m, known_rows) in [(1024, vec![0, 63, 255, 1023]), (256, vec![0, 63, 255]), (64, vec![0, 63])] {
                    case.m = m;
                    case.x.rows = m;
                    case.x.data.truncate(m * d as usize);
                    let z = case.run(&gpu, &plan).unwrap();
                    let row = |&row: &usize| z[row * d as usize..(row + 1) * d as usize].iter();
                    let out = known_rows.iter().flat_map(row).map(|value| f64::from(value.to_f32()));
                    let known = sampled.iter().take(known_rows.len() * d as usize);
                    let error = oracle::relative_error(out, known.copied());
                    assert!(error <= dtype.tolerance(), "B {m}: error {error:.2e}, {spec:?}");
                    assert!(z.iter().all(|value| value.to_f32().is_finite()), "B {m}: elements not written, {spec:?}");
                }
            }
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn long_sums_stay_within_the_bars() {
    let gpu = gpu();
    for_dtypes!(|dtype, T| {
        let spec = spec(dtype, WeightLayout::SeparateNk, 64, 8192);
        for family in Family::GPU {
            let Ok(config) = default_of(family, &spec.problem(64), gpu.runtime.gpu().arch) else { continue };
            let plan = gpu.runtime.prepare_config(&spec, config).unwrap();
            Case::<T>::new(spec, 64, 0, false, 5).check(&gpu, &plan, &config.to_string());
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn special_values_behave_as_the_formula_says() {
    let gpu = gpu();
    let specials = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 300.0, -300.0, 3e4, -3e4];
    for_dtypes!(|dtype, T| {
        for family in Family::GPU {
            let spec = spec(dtype, WeightLayout::SeparateNk, 40, 48);
            let Ok(config) = default_of(family, &spec.problem(16), gpu.runtime.gpu().arch) else { continue };
            let plan = gpu.runtime.prepare_config(&spec, config).unwrap();
            let mut case = Case::<T>::new(spec, specials.len(), 0, false, 9);
            for (row, value) in specials.into_iter().enumerate() {
                for col in 0..48 {
                    case.x.data[row * 48 + col] = T::from_f32(if col == 5 { value } else { 0.0 });
                }
            }
            let z = case.run(&gpu, &plan).unwrap();
            let wide: Vec<f64> = z.iter().map(|value| f64::from(value.to_f32())).collect();
            // A product beyond the format's range is inf in the format, large in float64: narrow the reference too.
            let narrow = |value: f64| f64::from(T::from_f32(value as f32).to_f32());
            let reference: Vec<f64> = case.reference().into_iter().map(narrow).collect();
            for (row, special) in specials.into_iter().enumerate() {
                let range = row * 40..(row + 1) * 40;
                let error =
                    oracle::relative_error(wide[range.clone()].iter().copied(), reference[range].iter().copied());
                assert!(error <= 2.0 * dtype.tolerance(), "{config}: row of {special} has error {error:.2e}");
            }
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn empty_problems_return_and_k_of_zero_leaves_the_biases() {
    let gpu = gpu();
    for (m, n, k) in [(0, 16, 16), (4, 0, 16), (0, 0, 0)] {
        let spec = spec(DType::Bf16, WeightLayout::SeparateNk, n, k);
        let plan = gpu.runtime.prepare(&spec).unwrap();
        Case::<bf16>::new(spec, m, 0, false, 1).run(&gpu, &plan).unwrap();
    }
    for family in Family::GPU {
        let spec = spec(DType::F16, WeightLayout::PackedNk, 24, 0);
        let Ok(config) = default_of(family, &spec.problem(5), gpu.runtime.gpu().arch) else { continue };
        let plan = gpu.runtime.prepare_config(&spec, config).unwrap();
        Case::<f16>::new(spec, 5, 0, true, 2).check(&gpu, &plan, "k = 0");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_capture_that_would_wait_for_slices_is_refused_and_the_next_launch_is_not() {
    let gpu = gpu();
    let spec = spec(DType::Bf16, WeightLayout::SeparateNk, 96, 64);
    let plan = gpu.runtime.prepare(&spec).unwrap();
    let case = Case::<bf16>::new(spec, 33, 0, false, 4);
    let upload = |values: &[bf16]| gpu.stream.clone_htod(values).unwrap();
    let (x, gate, up) = (upload(&case.x.data), upload(&case.weights[0].data), upload(&case.weights[1].data));
    let mut z = upload(&[bf16::NAN; 33 * 96]);
    let mut launch = || {
        let forward = Forward {
            x: Matrix::new(&x, 33, 64),
            weights: Weights::Separate { gate: Matrix::new(&gate, 96, 64), up: Matrix::new(&up, 96, 64) },
            gate_bias: None,
            up_bias: None,
            z: Matrix::new(&mut z, 33, 96),
            preactivations: None,
        };
        plan.launch(&gpu.stream, forward)
    };
    gpu.stream.synchronize().unwrap();
    let alone = alone();
    gpu.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let refused = launch();
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    // What was captured is not valid; the stream is left as it was before.
    let _ = gpu.stream.end_capture(flags);
    drop(alone);
    assert!(matches!(refused, Err(LaunchError::Order(_))), "{refused:?}");
    launch().unwrap();
    let z = gpu.stream.clone_dtoh(&z).unwrap();
    let error = oracle::relative_error(z.iter().map(|value| value.to_f64()), case.reference());
    assert!(error <= DType::Bf16.tolerance(), "{error:.2e}");
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn misaligned_addresses_fall_to_a_config_that_is_legal_for_them() {
    let gpu = gpu();
    let spec = spec(DType::Bf16, WeightLayout::SeparateNk, 96, 64);
    let plan = gpu.runtime.prepare(&spec).unwrap();
    let case = Case::<bf16>::new(spec, 33, 0, false, 4);
    // One element of padding in front moves every base off its 16-byte boundary.
    let shifted = |values: &[bf16]| [&[bf16::NAN][..], values].concat();
    let x = gpu.stream.clone_htod(&shifted(&case.x.data)).unwrap();
    let weights: Vec<_> =
        case.weights.iter().map(|matrix| gpu.stream.clone_htod(&shifted(&matrix.data)).unwrap()).collect();
    let mut z = gpu.stream.clone_htod(&vec![bf16::NAN; 33 * 96 + 1]).unwrap();
    let (x, gate, up) = (x.slice(1..), weights[0].slice(1..), weights[1].slice(1..));
    let mut z_view = z.slice_mut(1..);
    let forward = Forward {
        x: Matrix::new(&x, 33, 64),
        weights: Weights::Separate { gate: Matrix::new(&gate, 96, 64), up: Matrix::new(&up, 96, 64) },
        gate_bias: None,
        up_bias: None,
        z: Matrix::new(&mut z_view, 33, 96),
        preactivations: None,
    };
    plan.launch(&gpu.stream, forward).unwrap();
    let z = gpu.stream.clone_dtoh(&z).unwrap();
    let error = oracle::relative_error(z[1..].iter().map(|value| value.to_f64()), case.reference());
    assert!(error <= DType::Bf16.tolerance(), "{error:.2e}");
    assert!(z[0].is_nan());
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn wrong_arguments_are_named_and_nothing_is_launched() {
    let gpu = gpu();
    let spec = spec(DType::Bf16, WeightLayout::SeparateNk, 32, 16);
    let plan = gpu.runtime.prepare(&spec).unwrap();
    let memory = gpu.stream.alloc_zeros::<bf16>(4096).unwrap();
    let other = gpu.stream.alloc_zeros::<f16>(4096).unwrap();
    let mut z = gpu.stream.alloc_zeros::<bf16>(4096).unwrap();
    let mut z_other = gpu.stream.alloc_zeros::<f16>(4096).unwrap();
    let weights =
        |rows, cols| Weights::Separate { gate: Matrix::new(&memory, 32, 16), up: Matrix::new(&memory, rows, cols) };
    let named = |result: Result<(), LaunchError>| match result {
        Err(LaunchError::Argument(error)) => error.argument,
        other => panic!("{other:?}"),
    };
    let x = Matrix::new(&memory, 8, 16);
    let bias = gpu.stream.alloc_zeros::<bf16>(31).unwrap();
    let mut launch = |x, weights, gate_bias, rows| {
        plan.launch(
            &gpu.stream,
            Forward { x, weights, gate_bias, up_bias: None, z: Matrix::new(&mut z, rows, 32), preactivations: None },
        )
    };
    launch(x, weights(32, 16), None, 8).unwrap();
    assert_eq!(named(launch(Matrix::new(&memory, 8, 15), weights(32, 16), None, 8)), "x");
    assert_eq!(named(launch(Matrix::strided(&memory, 300, 16, 16), weights(32, 16), None, 300)), "x");
    assert_eq!(named(launch(Matrix::strided(&memory, 8, 16, 4), weights(32, 16), None, 8)), "x");
    assert_eq!(named(launch(x, weights(16, 32), None, 8)), "up");
    assert_eq!(named(launch(x, Weights::Packed(Matrix::new(&memory, 64, 16)), None, 8)), "weights");
    assert_eq!(named(launch(x, weights(32, 16), Some(&bias), 8)), "gate_bias");
    assert_eq!(named(launch(x, weights(32, 16), None, 9)), "z");
    let result = plan.launch(
        &gpu.stream,
        Forward {
            x: Matrix::new(&other, 8, 16),
            weights: Weights::Separate { gate: Matrix::new(&other, 32, 16), up: Matrix::new(&other, 32, 16) },
            gate_bias: None,
            up_bias: None,
            z: Matrix::new(&mut z_other, 8, 32),
            preactivations: None,
        },
    );
    assert_eq!(named(result), "x");
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn launches_are_captured_replayed_and_equal_bit_for_bit() {
    let gpu = gpu();
    // SAFETY: this test uses one stream, which orders all its work; tracked events cannot be waited for in a capture.
    unsafe { gpu.stream.context().disable_event_tracking() };
    let sizes = |dtype| spec(dtype, WeightLayout::SeparateNk, 512, 768);
    captured::<bf16>(&gpu, sizes(DType::Bf16), &gpu.runtime.prepare(&sizes(DType::Bf16)).unwrap());
    // In two launches with memory of their own between them, on Hopper.
    let spec = sizes(DType::F32);
    if let Ok(config) = default_of(Family::WgmmaTma, &spec.problem(100), gpu.runtime.gpu().arch) {
        captured::<f32>(&gpu, spec, &gpu.runtime.prepare_config(&spec, config).unwrap());
    }
}

/// 100 tokens of 768 numbers to 512: launched twice, captured and replayed twice.
fn captured<T: Element + DeviceRepr>(gpu: &Gpu, spec: ForwardSpec, plan: &Plan) {
    let case = Case::<T>::new(spec, 100, 0, false, 6);
    let first = case.run(gpu, plan).unwrap();
    let again = case.run(gpu, plan).unwrap();
    let bits = |values: &[T]| values.iter().map(|value| value.to_f32().to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&first), bits(&again));

    use swiglu_runtime::cudarc::driver::{DevicePtr, DevicePtrMut};
    let (x, gate, up) = (
        gpu.stream.clone_htod(&case.x.data).unwrap(),
        gpu.stream.clone_htod(&case.weights[0].data).unwrap(),
        gpu.stream.clone_htod(&case.weights[1].data).unwrap(),
    );
    let mut z = gpu.stream.clone_htod(&vec![T::from_f32(f32::NAN); 100 * 512]).unwrap();
    let raw = RawForward {
        m: 100,
        x: x.device_ptr(&gpu.stream).0,
        x_stride: 768,
        gate: gate.device_ptr(&gpu.stream).0,
        gate_stride: 768,
        up: up.device_ptr(&gpu.stream).0,
        up_stride: 768,
        gate_bias: 0,
        up_bias: 0,
        z: z.device_ptr_mut(&gpu.stream).0,
        z_stride: 512,
        saved_gate: 0,
        saved_gate_stride: 0,
        saved_up: 0,
        saved_up_stride: 0,
        scales: swiglu_runtime::RawScales::default(),
    };
    gpu.stream.synchronize().unwrap();
    let _alone = alone();
    gpu.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    // SAFETY: the slices above hold the problem and outlive the graph.
    unsafe { plan.launch_raw(gpu.stream.cu_stream(), &raw) }.unwrap();
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = gpu.stream.end_capture(flags).unwrap().unwrap();
    assert!(gpu.stream.clone_dtoh(&z).unwrap().iter().all(|value| value.to_f32().is_nan()), "a capture must not run");
    for _ in 0..2 {
        graph.launch().unwrap();
        assert_eq!(bits(&gpu.stream.clone_dtoh(&z).unwrap()), bits(&first));
    }
}
