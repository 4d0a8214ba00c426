//! The scaled formats against the float64 oracle, on a GPU: quantised, packed and launched as a caller does.

use super::{Gpu, compile_ahead, gpu, limit, spec};
use half::{bf16, f16};
use rand::{SeedableRng, rngs::SmallRng};
use rand_distr::{Distribution, StandardNormal};
use std::cell::OnceCell;
use std::sync::Arc;
use swiglu_kernels::families::{Config, Family, Target, candidates, default_of};
use swiglu_kernels::{Activation, Format, oracle, quant};
use swiglu_runtime::cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use swiglu_runtime::{
    DType, Element, ForwardSpec, LaunchError, Matrix, Plan, Preactivations, ScaledForward, Stored, WeightLayout,
    WeightScales, Weights,
};

/// Operands of one check, in O where a number has no scale.
struct Case<O> {
    spec: ForwardSpec,
    m: usize,
    /// `[M, K]`, as x stands for it.
    x: Vec<f32>,
    x_codes: Vec<u8>,
    x_scales: Vec<f32>,
    /// `[N, K]` each, as they stand for it: gate, up.
    weights: [Vec<f64>; 2],
    e4m3: [quant::E4m3Rows; 2],
    int4: [quant::Int4Columns; 2],
    bias: Vec<O>,
    /// The pre-activations in float64, computed once.
    sums: OnceCell<Vec<(f64, f64)>>,
}

impl<O: Element + Stored + DeviceRepr> Case<O> {
    /// `rows`: a scale for each row of e4m3, else one for all.
    fn new(spec: ForwardSpec, m: usize, rows: bool, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (n, k) = (spec.n as usize, spec.k as usize);
        let mut normal = |count: usize, scale: f32| -> Vec<f32> {
            (0..count).map(|_| scale * Distribution::<f32>::sample(&StandardNormal, &mut rng)).collect()
        };
        let row = |cols: usize| if rows { cols } else { usize::MAX };
        let wide = normal(m * k, 1.0);
        let quantised = quant::quantise_e4m3(&wide, row(k).min(wide.len()));
        let x: Vec<f32> = match spec.dtype.x() {
            Format::E4m3 => {
                let scale = |i: usize| quantised.scales[if rows { i / k } else { 0 }];
                quantised.codes.iter().enumerate().map(|(i, &code)| scale(i) * quant::f32_of_e4m3(code)).collect()
            }
            _ => wide.iter().map(|&value| Element::to_f32(<O as Element>::from_f32(value))).collect(),
        };
        let raw = [(); 2].map(|()| normal(n * k, 1.0 / (k as f32).sqrt()));
        let e4m3 = raw.each_ref().map(|raw| quant::quantise_e4m3(raw, row(k).min(raw.len())));
        let narrow = |scale: f32| Element::to_f32(<O as Element>::from_f32(scale));
        let int4 = raw.each_ref().map(|raw| quant::quantise_int4(raw, k, narrow));
        let weights = [0, 1].map(|which| -> Vec<f64> {
            let value = |i: usize| match spec.dtype.weights() {
                Format::Int4 => {
                    let (column, at) = (i / k, i % k);
                    let code = quant::int4_of_word(int4[which].words[at / 8 * n + column], (at % 8) as u32);
                    f64::from(code) * f64::from(int4[which].scales[at / 128 * n + column])
                }
                _ => {
                    let scale = e4m3[which].scales[if rows { i / k } else { 0 }];
                    f64::from(quant::f32_of_e4m3(e4m3[which].codes[i])) * f64::from(scale)
                }
            };
            (0..n * k).map(value).collect()
        });
        let bias = normal(n, 1.0).into_iter().map(<O as Element>::from_f32).collect();
        Self {
            spec,
            m,
            x,
            x_codes: quantised.codes,
            x_scales: quantised.scales,
            weights,
            e4m3,
            int4,
            bias,
            sums: OnceCell::new(),
        }
    }

    fn sums(&self) -> &[(f64, f64)] {
        self.sums.get_or_init(|| {
            let bias: Vec<f64> = self.bias.iter().map(|&value| f64::from(Element::to_f32(value))).collect();
            oracle::preactivations(&oracle::Forward {
                x: &self.x.iter().map(|&value| f64::from(value)).collect::<Vec<_>>(),
                gate: &self.weights[0],
                up: &self.weights[1],
                gate_bias: Some(&bias),
                up_bias: Some(&bias),
                k: self.spec.k as usize,
            })
        })
    }

    /// z and the pre-activations from poisoned memory.
    fn run(&self, gpu: &Gpu, plan: &Plan) -> Result<(Vec<O>, Vec<O>), LaunchError> {
        match self.spec.dtype.x() {
            Format::E4m3 => self.run_with(gpu, plan, &self.x_codes),
            _ => {
                let x: Vec<O> = self.x.iter().map(|&value| <O as Element>::from_f32(value)).collect();
                self.run_with(gpu, plan, &x)
            }
        }
    }

    fn run_with<X: Stored + DeviceRepr>(
        &self,
        gpu: &Gpu,
        plan: &Plan,
        x: &[X],
    ) -> Result<(Vec<O>, Vec<O>), LaunchError> {
        let (n, k) = (self.spec.n as usize, self.spec.k as usize);
        let stream = &gpu.stream;
        let bias = stream.clone_htod(&self.bias).unwrap();
        let poison = |count: usize| stream.clone_htod(&vec![<O as Element>::from_f32(f32::NAN); count.max(1)]).unwrap();
        let (mut z, mut saved) = (poison(self.m * n), poison(2 * self.m * n));
        let x = stream.clone_htod(x).unwrap();
        let x_scales = stream.clone_htod(&self.x_scales).unwrap();
        let layout = self.spec.layout;
        let packed = layout.is_packed();
        macro_rules! launch {
            ($weights:expr, $scales:expr) => {
                plan.launch_scaled(
                    stream,
                    ScaledForward {
                        x: Matrix::new(x.as_view(), self.m, k),
                        x_scales: (self.spec.dtype.x() == Format::E4m3).then(|| x_scales.as_view()),
                        weights: $weights,
                        weight_scales: $scales,
                        gate_bias: Some(bias.as_view()),
                        up_bias: Some(bias.as_view()),
                        z: Matrix::new(z.as_view_mut(), self.m, n),
                        preactivations: self
                            .spec
                            .save_preactivations
                            .then(|| Preactivations::Packed(Matrix::new(saved.as_view_mut(), self.m, 2 * n))),
                    },
                )
            };
        }
        if self.spec.dtype.weights() == Format::Int4 {
            let words = self.int4.each_ref().map(|columns| columns.words.clone());
            let scales = self.int4.each_ref().map(|columns| -> Vec<O> {
                columns.scales.iter().map(|&scale| <O as Element>::from_f32(scale)).collect()
            });
            let words = upload(stream, &words, packed, n);
            let scales = upload(stream, &scales, packed, n);
            launch!(columns(&words, n), WeightScales::Groups(columns(&scales, n)))?;
        } else {
            let codes = self.e4m3.each_ref().map(|rows| rows.codes.clone());
            let scales = self.e4m3.each_ref().map(|rows| stream.clone_htod(&rows.scales).unwrap());
            let codes = upload(stream, &codes, packed, usize::MAX);
            let weights = match &codes[..] {
                [both] => Weights::Packed(Matrix::new(both.as_view(), 2 * n, k)),
                [gate, up] => {
                    Weights::Separate { gate: Matrix::new(gate.as_view(), n, k), up: Matrix::new(up.as_view(), n, k) }
                }
                _ => panic!("one matrix or two"),
            };
            launch!(weights, WeightScales::Columns { gate: scales[0].as_view(), up: scales[1].as_view() })?;
        }
        Ok((stream.clone_dtoh(&z).unwrap(), stream.clone_dtoh(&saved).unwrap()))
    }

    fn check(&self, gpu: &Gpu, plan: &Plan, what: &str) {
        let (z, saved) = self.run(gpu, plan).unwrap();
        let (again, _) = self.run(gpu, plan).unwrap();
        let wide = |values: &[O]| values.iter().map(|&value| f64::from(Element::to_f32(value))).collect::<Vec<_>>();
        assert_eq!(wide(&z), wide(&again), "{what}: another result in the second run");
        let sums = self.sums();
        let limit = limit(self.spec.dtype, sums.len());
        let error = oracle::relative_error(wide(&z), oracle::gated(Activation::Silu, sums));
        assert!(error <= limit, "{what}: error {error:.2e}, {:?} m {}", self.spec, self.m);
        if self.spec.save_preactivations {
            let error = oracle::relative_error(wide(&saved), oracle::packed(sums, self.spec.n as usize));
            assert!(error <= limit, "{what}: pre-activations have error {error:.2e}, {:?} m {}", self.spec, self.m);
        }
    }
}

/// Two matrices, or one: below each other for rows of `usize::MAX`, else side by side with `n` columns each.
fn upload<T: DeviceRepr + Copy>(
    stream: &Arc<CudaStream>,
    both: &[Vec<T>; 2],
    packed: bool,
    n: usize,
) -> Vec<CudaSlice<T>> {
    let [gate, up] = both;
    if !packed {
        return vec![stream.clone_htod(gate).unwrap(), stream.clone_htod(up).unwrap()];
    }
    let rows = gate.chunks(n.min(gate.len())).zip(up.chunks(n.min(up.len())));
    let one: Vec<T> = rows.flat_map(|(gate, up)| gate.iter().chain(up).copied()).collect();
    vec![stream.clone_htod(&one).unwrap()]
}

/// Matrices of N (or 2N) columns.
fn columns<T>(slices: &[CudaSlice<T>], n: usize) -> Weights<swiglu_runtime::cudarc::driver::CudaView<'_, T>> {
    match slices {
        [both] => Weights::Packed(Matrix::new(both.as_view(), both.len() / (2 * n), 2 * n)),
        [gate, up] => Weights::Separate {
            gate: Matrix::new(gate.as_view(), gate.len() / n, n),
            up: Matrix::new(up.as_view(), up.len() / n, n),
        },
        _ => panic!("one matrix or two"),
    }
}

fn layouts(dtype: DType) -> [WeightLayout; 2] {
    match dtype.weights() {
        Format::Int4 => [WeightLayout::PackedKn, WeightLayout::SeparateKn],
        _ => [WeightLayout::PackedNk, WeightLayout::SeparateNk],
    }
}

/// Runs `body` with the element type of z of every scaled format.
macro_rules! for_scaled {
    (|$dtype:ident, $output:ident| $body:block) => {{
        { type $output = bf16; for $dtype in [DType::E4m3, DType::Bf16E4m3, DType::Bf16Int4] $body }
        { type $output = f16; for $dtype in [DType::F16E4m3, DType::F16Int4] $body }
    }};
}

#[test]
#[ignore = "needs an NVIDIA GPU of compute capability 9.0"]
fn scaled_formats_match_the_oracle_in_every_layout_and_at_every_edge() {
    let gpu = gpu();
    for_scaled!(|dtype, O| {
        for layout in layouts(dtype) {
            for (index, (m, n, k)) in
                [(1, 8, 16), (3, 72, 144), (33, 136, 1040), (130, 264, 2064)].into_iter().enumerate()
            {
                let spec = ForwardSpec { save_preactivations: index % 2 == 1, ..spec(dtype, layout, n, k) };
                let plan = gpu.runtime.prepare(&spec).unwrap();
                for rows in [false, true] {
                    Case::<O>::new(spec, m, rows, index as u64).check(&gpu, &plan, "default");
                }
            }
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU of compute capability 9.0"]
fn every_config_of_the_scaled_formats_matches_the_oracle() {
    let gpu = gpu();
    let arch = gpu.runtime.gpu().arch;
    for_scaled!(|dtype, O| {
        let spec = spec(dtype, layouts(dtype)[1], 200, 1552);
        let m = if dtype == DType::E4m3 { 300 } else { 37 };
        let case = Case::<O>::new(spec, m, true, 17);
        let mut configs: Vec<Config> = candidates(&spec.problem(m as u32), Target::Gpu(arch));
        // Raster orders share a kernel; each kernel in one of them.
        configs.dedup_by_key(|config| {
            let shape = config.launch_shape(&spec.problem(1)).unwrap();
            (
                shape.block_m,
                shape.block_n,
                shape.threads,
                shape.smem_bytes,
                config.to_string().split(" along").next().and_then(|it| it.split(" resident").next()).map(String::from),
            )
        });
        compile_ahead(&configs, |config| gpu.runtime.prepare_config(&spec, config));
        for config in configs {
            let plan = gpu.runtime.prepare_config(&spec, config).unwrap();
            case.check(&gpu, &plan, &config.to_string());
        }
    });
}

/// Their tiles depend on M; 37 tokens are above.
#[test]
#[ignore = "needs an NVIDIA GPU of compute capability 9.0"]
fn every_tile_of_the_ring_for_few_tokens_matches_the_oracle() {
    let gpu = gpu();
    let arch = gpu.runtime.gpu().arch;
    for dtype in [DType::Bf16E4m3, DType::Bf16Int4] {
        // Half of the tiles at one size, half at the other, and of either both ways to put x in order, which are neighbours.
        for (half, (m, n, k)) in [(1, 200, 1552), (13, 712, 400)].into_iter().enumerate() {
            let spec = ForwardSpec { save_preactivations: m == 13, ..spec(dtype, layouts(dtype)[0], n, k) };
            let case = Case::<bf16>::new(spec, m, m == 13, 23);
            let mut all = candidates(&spec.problem(m as u32), Target::Gpu(arch));
            all.retain(|config| config.family() == Family::WeightOnlyTma);
            assert!(all.len() > 40, "{} tiles", all.len());
            let in_half = |index: usize| (index / 2 + index) % 2 == half;
            let chosen: Vec<Config> =
                all.into_iter().enumerate().filter(|(index, _)| in_half(*index)).map(|(_, config)| config).collect();
            compile_ahead(&chosen, |config| gpu.runtime.prepare_config(&spec, config));
            for config in chosen {
                let plan = gpu.runtime.prepare_config(&spec, config).unwrap();
                case.check(&gpu, &plan, &config.to_string());
            }
        }
    }
}

/// What decodes in practice, through the defaults of the family: several waves of blocks, groups of K without end.
#[test]
#[ignore = "needs an NVIDIA GPU of compute capability 9.0"]
fn the_rings_defaults_match_the_oracle_where_sums_are_long() {
    let gpu = gpu();
    let arch = gpu.runtime.gpu().arch;
    for_scaled!(|dtype, O| {
        if dtype == DType::E4m3 {
            continue; // x in few bits too: not this family's
        }
        for (m, n, k) in [(1, 1000, 8192), (8, 28672, 512), (16, 264, 4096), (32, 264, 4096)] {
            let spec = spec(dtype, layouts(dtype)[1], n, k);
            let config = default_of(Family::WeightOnlyTma, &spec.problem(m as u32), arch).unwrap();
            let plan = gpu.runtime.prepare_config(&spec, config).unwrap();
            Case::<O>::new(spec, m, true, 29).check(&gpu, &plan, &config.to_string());
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU of compute capability 9.0"]
fn long_sums_of_scaled_formats_stay_within_the_bars() {
    let gpu = gpu();
    for_scaled!(|dtype, O| {
        let spec = spec(dtype, layouts(dtype)[0], 64, 8192);
        let plan = gpu.runtime.prepare(&spec).unwrap();
        Case::<O>::new(spec, 64, true, 5).check(&gpu, &plan, "default");
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU of compute capability 9.0"]
fn a_nan_in_x_stays_in_its_row() {
    let gpu = gpu();
    for_scaled!(|dtype, O| {
        let spec = spec(dtype, layouts(dtype)[0], 64, 256);
        let plan = gpu.runtime.prepare(&spec).unwrap();
        let mut case = Case::<O>::new(spec, 20, true, 8);
        case.x[7 * 256 + 100] = f32::NAN;
        case.x_codes[7 * 256 + 100] = 0x7f;
        let (z, _) = case.run(&gpu, &plan).unwrap();
        for (i, &value) in z.iter().enumerate() {
            assert_eq!(Element::to_f32(value).is_nan(), i / 64 == 7, "{dtype} row {}, column {}", i / 64, i % 64);
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU of compute capability 9.0"]
fn scales_that_do_not_fit_are_named_and_nothing_is_launched() {
    let gpu = gpu();
    let spec = spec(DType::E4m3, WeightLayout::PackedNk, 64, 256);
    let plan = gpu.runtime.prepare(&spec).unwrap();
    let named = |result: Result<(Vec<bf16>, Vec<bf16>), LaunchError>| match result {
        Err(LaunchError::Argument(error)) => error.argument,
        other => panic!("{other:?}"),
    };
    let mut case = Case::<bf16>::new(spec, 20, true, 8);
    case.x_scales.pop();
    assert_eq!(named(case.run(&gpu, &plan)), "x_scales");
    let mut case = Case::<bf16>::new(spec, 20, true, 8);
    case.e4m3[1].scales.pop();
    assert_eq!(named(case.run(&gpu, &plan)), "weight_scales.up");
    let other = Case::<bf16>::new(ForwardSpec { dtype: DType::Bf16E4m3, ..spec }, 20, true, 8);
    assert_eq!(named(other.run(&gpu, &plan)), "x");
}
