//! The steps beside the fused forward: every op, order, number format and alignment against the float64 oracle.

use super::{FOREIGN, Gpu, Host, compile_ahead, gpu, limit};
use half::{bf16, f16};
use rand::{SeedableRng, rngs::SmallRng, seq::IndexedRandom};
use rand_distr::{Distribution, StandardNormal};
use swiglu_kernels::families::{Config, Family, Target, WgmmaGemmConfig, candidates};
use swiglu_kernels::problem::{Problem, WeightMajor};
use swiglu_kernels::{ArchSpec, Op, oracle};
use swiglu_runtime::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};
use swiglu_runtime::{DType, Element, LaunchError, RawMatrix, RawStep, StepPlan};

/// What an fp32 output holds before it is added to.
const BEFORE: f32 = 0.25;

/// Random operands of a step.
struct Case<T> {
    problem: Problem,
    gap: usize,
    left: Vec<Host<T>>,
    right: Vec<Host<T>>,
    saved: Vec<Host<T>>,
    bias: Option<Vec<T>>,
    with_z: bool,
}

impl<T: Element + DeviceRepr> Case<T> {
    fn new(problem: Problem, gap: usize, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (rows, cols) = problem.output();
        let mut several = |count: usize, (rows, cols): (u32, u32), scale: f32| -> Vec<Host<T>> {
            (0..count).map(|_| Host::normal(rows as usize, cols as usize, gap, scale, &mut rng)).collect()
        };
        let (left, right) = match problem.product() {
            Some(product) => {
                let (left, right) = problem.operands();
                let scale = 1.0 / (product.depth.max(1) as f32).sqrt();
                (several(left, product.left_shape(), 1.0), several(right, product.right_shape(), scale))
            }
            None => (several(1, (rows, cols), 1.0), Vec::new()),
        };
        let saved = several(2, (rows, cols), 1.5);
        let bias = (problem.op.is_down() && seed.is_multiple_of(2))
            .then(|| (0..cols).map(|_| T::from_f32(StandardNormal.sample(&mut rng))).collect());
        Self { problem, gap, left, right, saved, bias, with_z: !seed.is_multiple_of(3) }
    }

    fn references(&self) -> Vec<Vec<f64>> {
        let entry = |of: &[Host<T>], index: usize| {
            let wide: Vec<Vec<f64>> = of.get(index).map_or_else(Vec::new, |matrix| {
                (0..matrix.rows).map(|row| (0..matrix.cols).map(|col| matrix.at(row, col)).collect()).collect()
            });
            move |row: usize, col: usize| wide[row][col]
        };
        let [left0, left1] = [0, 1].map(|index| entry(&self.left, index));
        let [right0, right1] = [0, 1].map(|index| entry(&self.right, index));
        let [gate, up] = [0, 1].map(|index| entry(&self.saved, index));
        let bias: Option<Vec<f64>> =
            self.bias.as_ref().map(|bias| bias.iter().map(|value| f64::from(value.to_f32())).collect());
        let operands = oracle::Step {
            left: [&left0, &left1],
            right: [&right0, &right1],
            saved: [&gate, &up],
            bias: bias.as_deref(),
        };
        let mut outs = oracle::step(&self.problem, &operands);
        if self.problem.op.accumulates() {
            outs.iter_mut().flatten().for_each(|value| *value += f64::from(BEFORE));
        }
        outs
    }

    /// The outputs, each with its gaps; `None` of those that were not asked for. `in_place` puts dgate and dup where gate
    /// and up are.
    fn run<O: Element + DeviceRepr>(
        &self,
        gpu: &Gpu,
        plan: &StepPlan,
        in_place: bool,
    ) -> Result<Vec<Option<Vec<O>>>, LaunchError> {
        let stream = &gpu.stream;
        let upload = |of: &[Host<T>]| -> Vec<CudaSlice<T>> {
            let padded = |matrix: &Host<T>| [&matrix.data[..], &[T::from_f32(FOREIGN)]].concat();
            of.iter().map(|matrix| stream.clone_htod(&padded(matrix)).unwrap()).collect()
        };
        let (left, right, saved) = (upload(&self.left), upload(&self.right), upload(&self.saved));
        let bias = self.bias.as_ref().map(|bias| stream.clone_htod(bias).unwrap());
        let raw = |of: &[Host<T>], on: &[CudaSlice<T>]| {
            [0, 1].map(|i| {
                of.get(i).zip(on.get(i)).map_or(RawMatrix::default(), |(host, data)| RawMatrix {
                    address: data.device_ptr(stream).0,
                    stride: host.row_stride as i64,
                })
            })
        };
        let (rows, cols) = self.problem.output();
        let stride = cols as usize + self.gap;
        let before = if self.problem.op.accumulates() { BEFORE } else { f32::NAN };
        let count = self.problem.op.outputs() as usize;
        let outputs: Vec<CudaSlice<O>> = (0..count)
            .map(|_| stream.clone_htod(&vec![O::from_f32(before); rows as usize * stride + 1]).unwrap())
            .collect();
        let wanted = |index: usize| index < count && (index < 2 || self.with_z);
        let mut out = [0, 1, 2].map(|index| {
            let address = outputs.get(index).filter(|_| wanted(index)).map_or(0, |out| out.device_ptr(stream).0);
            RawMatrix { address, stride: stride as i64 }
        });
        let saved_raw = raw(&self.saved, &saved);
        if in_place {
            out[..2].copy_from_slice(&saved_raw);
        }
        let args = RawStep {
            m: self.problem.m,
            left: raw(&self.left, &left),
            right: raw(&self.right, &right),
            saved: saved_raw,
            out,
            bias: bias.as_ref().map_or(0, |bias| bias.device_ptr(stream).0),
        };
        // SAFETY: the slices above hold the operands and live until the results are read back below.
        unsafe { plan.launch_raw(stream.cu_stream(), &args) }?;
        let read = |(index, output): (usize, &CudaSlice<O>)| {
            if in_place && index < 2 {
                let values = stream.clone_dtoh(&saved[index]).unwrap();
                return Some(values.iter().map(|value| O::from_f32(value.to_f32())).collect());
            }
            wanted(index).then(|| stream.clone_dtoh(output).unwrap())
        };
        Ok(outputs.iter().enumerate().map(read).collect())
    }

    /// The outputs in float64, of a case without gaps.
    fn run_wide(&self, gpu: &Gpu, plan: &StepPlan) -> Vec<Option<Vec<f64>>> {
        let mut outputs = if self.problem.op.accumulates() {
            wide(self.run::<f32>(gpu, plan, false).unwrap())
        } else {
            wide(self.run::<T>(gpu, plan, false).unwrap())
        };
        let (rows, cols) = self.problem.output();
        outputs.iter_mut().flatten().for_each(|output| output.truncate(rows as usize * cols as usize));
        outputs
    }

    /// Runs `config` and holds what it wrote to `references`.
    fn check_config(&self, gpu: &Gpu, config: &Config, references: &[Vec<f64>]) -> (StepPlan, Vec<Option<Vec<f64>>>) {
        let plan = gpu.runtime.prepare_step_config(&self.problem, *config).unwrap();
        let outputs = self.run_wide(gpu, &plan);
        for (index, (output, reference)) in outputs.iter().zip(references).enumerate() {
            let Some(output) = output else { continue };
            let what = format!("{:?} {config}: output {index}", self.problem);
            assert_eq!(output.len(), reference.len(), "{what}");
            let error = oracle::relative_error(output.iter().copied(), reference.iter().copied());
            assert!(error <= self.problem.dtype.tolerance(), "{what} has error {error:.2e}");
        }
        (plan, outputs)
    }

    /// The same twice: the same bits.
    fn check_config_twice(&self, gpu: &Gpu, config: &Config, references: &[Vec<f64>]) {
        let (plan, outputs) = self.check_config(gpu, config, references);
        assert_eq!(outputs, self.run_wide(gpu, &plan), "{:?} {config}: other bits", self.problem);
    }

    fn check(&self, gpu: &Gpu, plan: &StepPlan, what: &str) {
        if self.problem.op.accumulates() {
            self.check_as::<f32>(gpu, plan, what)
        } else {
            self.check_as::<T>(gpu, plan, what)
        }
    }

    fn check_as<O: Element + DeviceRepr>(&self, gpu: &Gpu, plan: &StepPlan, what: &str) {
        let what = format!("{:?} gap {} {what}", self.problem, self.gap);
        let outputs = self.run::<O>(gpu, plan, false).unwrap_or_else(|error| panic!("{what}: {error}"));
        let cols = self.problem.output().1 as usize;
        let stride = cols + self.gap;
        let before = if self.problem.op.accumulates() { BEFORE } else { f32::NAN };
        for (index, (output, reference)) in outputs.iter().zip(self.references()).enumerate() {
            let Some(output) = output else { continue };
            let inside =
                output.iter().enumerate().filter(|(i, _)| i % stride < cols && i / stride * cols < reference.len());
            let error =
                oracle::relative_error(inside.map(|(_, value)| f64::from(value.to_f32())), reference.iter().copied());
            let limit = limit(self.problem.dtype, reference.len());
            assert!(error <= limit, "{what}: output {index} has error {error:.2e}, limit {limit:.1e}");
            let rows = reference.len() / cols;
            let outside = output.iter().enumerate().filter(|(i, _)| i % stride >= cols || i / stride >= rows);
            let before = O::from_f32(before).to_f32().to_bits();
            assert!(outside.into_iter().all(|(_, value)| value.to_f32().to_bits() == before), "{what}: wrote outside");
        }
    }
}

macro_rules! for_formats {
    (|$dtype:ident, $type:ident| $body:block) => {{
        {
            type $type = f32;
            let $dtype = DType::F32;
            $body
        }
        {
            type $type = f32;
            let $dtype = DType::Tf32;
            $body
        }
        {
            type $type = f16;
            let $dtype = DType::F16;
            $body
        }
        {
            type $type = bf16;
            let $dtype = DType::Bf16;
            $body
        }
    }};
}

fn steps() -> impl Iterator<Item = Op> {
    Op::ALL.into_iter().filter(|op| !op.is_forward())
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn every_step_order_alignment_and_edge_matches_the_oracle() {
    let gpu = gpu();
    for_formats!(|dtype, T| {
        for op in steps() {
            for major in WeightMajor::ALL {
                for (seed, (m, n, k)) in
                    [(1, 8, 8), (3, 1, 1), (65, 136, 264), (300, 200, 96), (130, 515, 77)].into_iter().enumerate()
                {
                    let problem = Problem::forward(dtype, major, m, n, k).with_op(op);
                    let plan = gpu.runtime.prepare_step(&problem).unwrap();
                    for gap in [0, 3, 8] {
                        Case::<T>::new(problem, gap, seed as u64).check(&gpu, &plan, "default");
                    }
                }
            }
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_seeded_sample_of_every_steps_space_matches_the_oracle() {
    let gpu = gpu();
    let arch = gpu.runtime.gpu().arch;
    let mut rng = SmallRng::seed_from_u64(17);
    for_formats!(|dtype, T| {
        for op in steps() {
            for major in WeightMajor::ALL {
                // More tiles than a GPU has multiprocessors where the kernels are persistent.
                let (m, n, k) = if dtype.bytes() == 2 { (1096, 1544, 264) } else { (200, 264, 136) };
                let problem = Problem::forward(dtype, major, m, n, k).with_op(op);
                let mut all = candidates(&problem, Target::Gpu(arch));
                all.retain(|config| config.family().has_source());
                let mut chosen: Vec<Config> = all.last().copied().into_iter().collect();
                for family in [Family::WgmmaGemm, Family::MmaGemm, Family::ColumnSum, Family::Elementwise] {
                    let of_family: Vec<Config> = all.iter().copied().filter(|it| it.family() == family).collect();
                    chosen.extend(of_family.sample(&mut rng, 4).copied());
                }
                compile_ahead(&chosen, |config| gpu.runtime.prepare_step_config(&problem, config));
                let case = Case::<T>::new(problem, 0, 4);
                let references = case.references();
                for config in chosen {
                    case.check_config(&gpu, &config, &references);
                }
            }
        }
    });
}

/// Tiles for few tokens, for as many as they have rows, fewer and more; sums that share out evenly and not.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_down_projection_of_few_tokens_matches_the_oracle_and_repeats_its_bits() {
    let gpu = gpu();
    let arch = gpu.runtime.gpu().arch;
    let mut rng = SmallRng::seed_from_u64(19);
    for major in WeightMajor::ALL {
        for (m, n, k) in [(1, 4096, 2048), (16, 1032, 4104), (40, 2056, 1032), (150, 520, 264)] {
            let problem = Problem::forward(DType::Bf16, major, m, n, k).with_op(Op::Down);
            let few = few_token_tiles(&problem, arch);
            let case = Case::<bf16>::new(problem, 0, 2);
            let references = case.references();
            for config in few.sample(&mut rng, 24) {
                case.check_config_twice(&gpu, config, &references);
            }
        }
    }
}

/// Both warpgroups on one tile and two CTAs on its sums: of 64 columns, so that there are more tiles than pairs, and of others; 9 and
/// 17 steps, and 18, which share out evenly.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn tiles_for_an_output_of_few_match_the_oracle_and_repeat_their_bits() {
    let gpu = gpu();
    let arch = gpu.runtime.gpu().arch;
    let mut rng = SmallRng::seed_from_u64(22);
    for (index, op) in Op::PRODUCTS.into_iter().filter(|op| *op != Op::Dgated).enumerate() {
        let major = WeightMajor::ALL[index % 2];
        let (m, n, k) = if op == Op::DownInputGrad { (1060, 1032, 520) } else { (1060, 520, 1032) };
        let problem = Problem::forward(DType::Bf16, major, m, n, k).with_op(op);
        let mut two = candidates(&problem, Target::Gpu(arch));
        two.retain(|config| matches!(config, Config::WgmmaGemm(gemm) if gemm.consumers == 2 && gemm.cluster_k == 2));
        let case = Case::<bf16>::new(problem, 0, 2);
        let references = case.references();
        let (narrow, wide_ones): (Vec<Config>, Vec<Config>) =
            two.into_iter().partition(|config| matches!(config, Config::WgmmaGemm(gemm) if gemm.block_n == 64));
        for config in narrow.sample(&mut rng, 1).chain(wide_ones.sample(&mut rng, 2)) {
            case.check_config_twice(&gpu, config, &references);
        }
    }
}

/// Tiles of 192 and 256 columns that may be cut up, by these columns and the CTAs of a cluster.
fn tiles_to_cut(problem: &Problem, arch: &'static ArchSpec) -> Vec<Vec<WgmmaGemmConfig>> {
    let all = candidates(problem, Target::Gpu(arch));
    let widths: &[u32] = if problem.op == Op::Dgated { &[192] } else { &[192, 256] };
    let of = |block_n: u32, cluster: u32| {
        let gemms = all.iter().filter_map(|config| match config {
            Config::WgmmaGemm(gemm) => Some(*gemm),
            _ => None,
        });
        let fits = |it: &WgmmaGemmConfig| (it.block_n, it.cluster_m * it.cluster_n) == (block_n, cluster);
        gemms.filter(|it| it.tail_n > 0 && fits(it)).collect()
    };
    widths.iter().flat_map(|&block_n| [of(block_n, 1), of(block_n, 2)]).collect()
}

/// Those of each group whose last wave is cut up on `sms` multiprocessors.
fn cut_up(groups: &[Vec<WgmmaGemmConfig>], problem: &Problem, sms: u32) -> Vec<Vec<WgmmaGemmConfig>> {
    let is_cut = |gemm: &&WgmmaGemmConfig| {
        let shape = Config::WgmmaGemm(**gemm).launch_shape(problem);
        shape.is_some_and(|shape| gemm.cuts(shape.tiles(problem), u64::from(sms / shape.cluster)))
    };
    groups.iter().map(|group| group.iter().filter(is_cut).copied().collect()).collect()
}

/// In every op and order, of tiles of 192 and 256 columns, shared by a pair and not: a last wave that is cut up, and the bits of
/// one that is not.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_last_wave_that_is_cut_up_matches_the_oracle_bit_for_bit_as_a_whole_one_does() {
    let gpu = gpu();
    let (arch, sms) = (gpu.runtime.gpu().arch, gpu.runtime.gpu().sm_count);
    if !arch.has_wgmma {
        return;
    }
    let mut rng = SmallRng::seed_from_u64(23);
    for (op, major) in Op::PRODUCTS.into_iter().flat_map(|op| WeightMajor::ALL.map(|major| (op, major))) {
        let of_rows = |rows| {
            let sizes = [(rows, 136, 4104), (rows, 4104, 136), (136, rows, 4104), (136, 4104, rows)];
            let problem = sizes.map(|(m, n, k)| Problem::forward(DType::Bf16, major, m, n, k).with_op(op));
            problem.into_iter().find(|problem| problem.output() == (rows, 4104)).unwrap()
        };
        // Rows are multiples of eight: a tile is legal for all of them or for none.
        let groups = tiles_to_cut(&of_rows(904), arch);
        // On 132 multiprocessors 904 or 776 rows, and 392 where outputs are two.
        let mut all = (17..512).map(|eights| of_rows(8 * eights)).map(|it| (it, cut_up(&groups, &it, sms)));
        let found = all.find(|(_, cuts)| cuts.iter().all(|cut| !cut.is_empty()));
        let (problem, cuts) = found.expect("some number of rows leaves a wave to cut, on 114 and 132 multiprocessors");
        let case = Case::<bf16>::new(problem, 0, 2);
        let references = case.references();
        for config in cuts.iter().map(|cut| *cut.sample(&mut rng, 1).next().unwrap()) {
            let (_, outputs) = case.check_config(&gpu, &Config::WgmmaGemm(config), &references);
            let whole = Config::WgmmaGemm(WgmmaGemmConfig { tail_n: 0, ..config });
            assert_eq!(outputs, case.check_config(&gpu, &whole, &references).1, "{problem:?} {config}: other bits");
        }
    }
}

/// Each launch reads what the one ahead of it stores, begins before that has ended, and writes what the one before read.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn down_projections_of_few_tokens_wait_for_each_other() {
    let gpu = gpu();
    let stream = &gpu.stream;
    let mut rng = SmallRng::seed_from_u64(20);
    let (m, n) = (4, 4096);
    let problem = Problem::forward(DType::Bf16, WeightMajor::K, m, n, n);
    let [tokens, weights] = [(m, 1.0), (n, 1.0 / (n as f32).sqrt())]
        .map(|(rows, scale)| Host::<bf16>::normal(rows as usize, n as usize, 0, scale, &mut rng).data);
    let weights = stream.clone_htod(&weights).unwrap();
    stream.synchronize().unwrap(); // static from here on
    let of_op =
        |op| few_token_tiles(&problem.with_op(op), gpu.runtime.gpu().arch).sample(&mut rng, 16).copied().collect();
    let [plain, fixed]: [Vec<Config>; 2] = [Op::Down, Op::DownStatic].map(of_op);
    let all = plain.iter().map(|config| (Op::Down, config)).chain(fixed.iter().map(|config| (Op::DownStatic, config)));
    for (op, config) in all {
        let plan = gpu.runtime.prepare_step_config(&problem.with_op(op), *config).unwrap();
        let chain = |apart: bool| {
            let buffers = [stream.clone_htod(&tokens).unwrap(), stream.clone_htod(&tokens).unwrap()];
            let raw = |data: &CudaSlice<bf16>| RawMatrix { address: data.device_ptr(stream).0, stride: i64::from(n) };
            let none = RawMatrix::default();
            for step in 0..9 {
                let (from, to) = (&buffers[step % 2], &buffers[(step + 1) % 2]);
                let args = RawStep {
                    m,
                    left: [raw(from), none],
                    right: [raw(&weights), none],
                    out: [raw(to), none, none],
                    ..RawStep::default()
                };
                // SAFETY: the slices hold the operands and live until the last output is read back below.
                unsafe { plan.launch_raw(stream.cu_stream(), &args) }.unwrap();
                if apart {
                    stream.synchronize().unwrap();
                }
            }
            let bits = |value: bf16| value.to_bits();
            stream.clone_dtoh(&buffers[1]).unwrap().into_iter().map(bits).collect::<Vec<u16>>()
        };
        assert_eq!(chain(false), chain(true), "{config}");
    }
}

fn few_token_tiles(problem: &Problem, arch: &'static ArchSpec) -> Vec<Config> {
    let mut all = candidates(problem, Target::Gpu(arch));
    all.retain(|config| matches!(config, Config::WgmmaGemm(gemm) if gemm.consumers == 1));
    assert!(!arch.has_wgmma || all.len() > 20, "{} tiles", all.len());
    all
}

fn wide<O: Element>(outputs: Vec<Option<Vec<O>>>) -> Vec<Option<Vec<f64>>> {
    let widen = |output: Vec<O>| output.iter().map(|value| f64::from(value.to_f32())).collect();
    outputs.into_iter().map(|output| output.map(widen)).collect()
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_gates_backward_works_in_place_and_twice_gives_the_same_bits() {
    let gpu = gpu();
    // The last leaves a wave that is cut up on 132 multiprocessors, by the default and by the nearest of the shipped table.
    for (op, m, n) in [(Op::GateBackward, 777, 1032), (Op::Dgated, 777, 1032), (Op::Dgated, 904, 4104)] {
        for major in WeightMajor::ALL {
            let problem = Problem::forward(DType::Bf16, major, m, n, 264).with_op(op);
            let plan = gpu.runtime.prepare_step(&problem).unwrap();
            let case = Case::<bf16>::new(problem, 0, 1);
            let bits = |in_place| -> Vec<Option<Vec<u16>>> {
                let outputs = case.run::<bf16>(&gpu, &plan, in_place).unwrap();
                let of =
                    |output: Vec<bf16>| output.iter().take((m * n) as usize).map(|value| value.to_bits()).collect();
                outputs.into_iter().map(|output| output.map(of)).collect()
            };
            let first = bits(false);
            assert_eq!(first, bits(false), "{op} {major}");
            assert_eq!(first, bits(true), "{op} {major} in place");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn of_no_tokens_weight_gradients_are_zero_and_sums_stay() {
    let gpu = gpu();
    for (op, expected) in [
        (Op::WeightGrad, 0.0),
        (Op::DownWeightGrad, 0.0),
        (Op::WeightGradAdd, BEFORE),
        (Op::BiasGrad, 0.0),
        (Op::BiasGradAdd, BEFORE),
        (Op::DownBiasGrad, 0.0),
    ] {
        let problem = Problem::forward(DType::F32, WeightMajor::K, 0, 24, 40).with_op(op);
        let plan = gpu.runtime.prepare_step(&problem).unwrap();
        let outputs = Case::<f32>::new(problem, 0, 1).run::<f32>(&gpu, &plan, false).unwrap();
        for output in outputs.into_iter().flatten() {
            let (rows, cols) = problem.output();
            assert!(output[..(rows * cols) as usize].iter().all(|&value| value == expected), "{op}");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_missing_operand_is_named() {
    let gpu = gpu();
    let problem = Problem::forward(DType::Bf16, WeightMajor::K, 8, 16, 16).with_op(Op::Down);
    let plan = gpu.runtime.prepare_step(&problem).unwrap();
    // SAFETY: nothing is launched without its operands.
    let result = unsafe { plan.launch_raw(gpu.stream.cu_stream(), &RawStep { m: 8, ..RawStep::default() }) };
    match result {
        Err(LaunchError::Argument(error)) => assert_eq!(error.argument, "left"),
        other => panic!("{other:?}"),
    }
}
