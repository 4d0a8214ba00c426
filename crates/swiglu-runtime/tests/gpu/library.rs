//! The library's configs: every op, order, layout and number format against the float64 oracle; captured at first use; the same
//! bits in every run. They fail where cuBLASLt is not installed.

use super::{Case as ForwardCase, Gpu, alone, gpu, limit, spec};
use half::{bf16, f16};
use rand::{SeedableRng, rngs::SmallRng};
use rand_distr::{Distribution, StandardNormal};
use swiglu_db::{Environment, Measurement, Origin, Outcome, Record, TuningTable, snapshot::Snapshot};
use swiglu_kernels::families::{Config, CublasltConfig};
use swiglu_kernels::problem::{OperandMajor, Paired, Problem, WeightMajor};
use swiglu_kernels::{Family, GateOrder, Op, WeightLayout, oracle};
use swiglu_runtime::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, sys};
use swiglu_runtime::{DType, Element, ForwardSpec, LaunchError, Options, RawMatrix, RawStep, Runtime, StepPlan};

const BEFORE: f32 = 0.25;
/// Matrices start at multiples of so many elements.
const ALIGNED: usize = 64;

fn config(algorithm: u32) -> Config {
    Config::Cublaslt(CublasltConfig { algorithm })
}

/// How the two matrices of a pair lie.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Lie {
    Together,
    Apart,
}

/// Two matrices in one buffer, in elements.
#[derive(Debug, Clone, Copy)]
struct Pair {
    starts: [usize; 2],
    stride: usize,
    rows: usize,
    cols: usize,
}

impl Pair {
    /// After `end`; together they join along the columns or from row to row.
    fn place(end: &mut usize, (rows, cols): (u32, u32), along_cols: bool, lie: Lie, gap: usize) -> Self {
        let (rows, cols, start) = (rows as usize, cols as usize, end.next_multiple_of(ALIGNED));
        let (stride, second) = match (lie, along_cols) {
            (Lie::Apart, _) => (cols + gap, (rows * (cols + gap)).next_multiple_of(ALIGNED) + ALIGNED),
            (Lie::Together, true) => (2 * cols + gap, cols),
            (Lie::Together, false) => (cols + gap, rows * (cols + gap)),
        };
        *end = start + second + rows * stride;
        Self { starts: [start, start + second], stride, rows, cols }
    }

    fn raw(&self, base: u64, bytes: usize) -> [RawMatrix; 2] {
        self.starts.map(|start| RawMatrix { address: base + (start * bytes) as u64, stride: self.stride as i64 })
    }

    fn index(&self, half: usize, row: usize, col: usize) -> usize {
        self.starts[half] + row * self.stride + col
    }
}

/// A step on one buffer of inputs and one of outputs.
struct StepCase<T> {
    problem: Problem,
    left: Pair,
    right: Pair,
    saved: Pair,
    out: Pair,
    /// Where z of `dgated` starts.
    z: usize,
    z_stride: usize,
    bias: Option<usize>,
    inputs: Vec<T>,
    outputs: usize,
    references: Vec<Vec<f64>>,
}

impl<T: Element + DeviceRepr> StepCase<T> {
    fn new(problem: Problem, lie: Lie, gap: usize, seed: u64) -> Self {
        let product = problem.product().unwrap();
        let along = |major| {
            if product.paired == Paired::Depth { major == OperandMajor::Depth } else { major == OperandMajor::Outer }
        };
        let (mut end, mut outputs, size) = (0, 0, problem.output());
        let left = Pair::place(&mut end, product.left_shape(), along(product.left), lie, gap);
        let right = Pair::place(&mut end, product.right_shape(), along(product.right), lie, gap);
        let saved = Pair::place(&mut end, size, true, lie, gap);
        let bias = (problem.op.is_down() && seed.is_multiple_of(2)).then(|| end.next_multiple_of(ALIGNED));
        end = bias.map_or(end, |start| start + size.1 as usize);
        let out =
            Pair::place(&mut outputs, size, product.paired == Paired::Columns || problem.op == Op::Dgated, lie, gap);
        let z = outputs.next_multiple_of(ALIGNED);
        let mut rng = SmallRng::seed_from_u64(seed);
        // Sums of every length come out near 1.
        let scale = 1.0 / (product.depth.max(1) as f32).sqrt();
        let right_range = right.starts[0]..right.starts[1] + right.rows * right.stride;
        let value = |at: usize| {
            let number: f32 = StandardNormal.sample(&mut rng);
            T::from_f32(number * if right_range.contains(&at) { scale } else { 1.0 })
        };
        let inputs = (0..end).map(value).collect();
        let z_stride = size.1 as usize + gap;
        let outputs = z + size.0 as usize * z_stride;
        let mut case =
            Self { problem, left, right, saved, out, z, z_stride, bias, inputs, outputs, references: Vec::new() };
        case.references = case.compute_references();
        case
    }

    fn at(&self, pair: &Pair, half: usize) -> impl Fn(usize, usize) -> f64 {
        move |row, col| f64::from(self.inputs[pair.index(half, row, col)].to_f32())
    }

    fn compute_references(&self) -> Vec<Vec<f64>> {
        let [left0, left1] = [0, 1].map(|half| self.at(&self.left, half));
        let [right0, right1] = [0, 1].map(|half| self.at(&self.right, half));
        let [gate, up] = [0, 1].map(|half| self.at(&self.saved, half));
        let cols = self.problem.output().1 as usize;
        let bias: Option<Vec<f64>> = self
            .bias
            .map(|start| self.inputs[start..start + cols].iter().map(|value| f64::from(value.to_f32())).collect());
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

    fn arguments<O>(&self, inputs: u64, outputs: u64) -> RawStep {
        let (of_input, of_output) = (std::mem::size_of::<T>(), std::mem::size_of::<O>());
        let [first, second] = self.out.raw(outputs, of_output);
        let z = RawMatrix { address: outputs + (self.z * of_output) as u64, stride: self.z_stride as i64 };
        RawStep {
            m: self.problem.m,
            left: self.left.raw(inputs, of_input),
            right: self.right.raw(inputs, of_input),
            saved: self.saved.raw(inputs, of_input),
            out: [first, second, if self.problem.op == Op::Dgated { z } else { RawMatrix::default() }],
            bias: self.bias.map_or(0, |start| inputs + (start * of_input) as u64),
        }
    }

    /// All that the buffer of outputs holds: of a launch, then of a replay of a capture that was the first use of `plans[1]`.
    fn run<O: Element + DeviceRepr>(&self, gpu: &Gpu, plans: [&StepPlan; 2]) -> Result<[Vec<O>; 2], LaunchError> {
        let stream = &gpu.stream;
        let before = O::from_f32(if self.problem.op.accumulates() { BEFORE } else { f32::NAN });
        let inputs = stream.clone_htod(&self.inputs).unwrap();
        let outputs = [(); 2].map(|()| stream.clone_htod(&vec![before; self.outputs]).unwrap());
        let args = outputs.each_ref().map(|outputs: &CudaSlice<O>| {
            self.arguments::<O>(inputs.device_ptr(stream).0, outputs.device_ptr(stream).0)
        });
        stream.synchronize().unwrap();
        let alone = alone();
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        // SAFETY: the buffers hold the operands and live until the results are read back below.
        let captured = unsafe { plans[1].launch_raw(stream.cu_stream(), &args[1]) };
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags).unwrap().unwrap();
        drop(alone);
        captured?;
        graph.launch().unwrap();
        // SAFETY: as above.
        unsafe { plans[0].launch_raw(stream.cu_stream(), &args[0]) }?;
        Ok(outputs.map(|outputs| stream.clone_dtoh(&outputs).unwrap()))
    }

    fn check(&self, gpu: &Gpu, plans: [&StepPlan; 2], what: &str) {
        if self.problem.op.accumulates() {
            self.check_as::<f32>(gpu, plans, what)
        } else {
            self.check_as::<T>(gpu, plans, what)
        }
    }

    fn check_as<O: Element + DeviceRepr>(&self, gpu: &Gpu, plans: [&StepPlan; 2], what: &str) {
        let what = format!("{:?} {what}", self.problem);
        let [output, replayed] = self.run::<O>(gpu, plans).unwrap_or_else(|error| panic!("{what}: {error}"));
        let bits = |values: &[O]| values.iter().map(|value| value.to_f32().to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&output), bits(&replayed), "{what}: a captured launch differs");
        let before = O::from_f32(if self.problem.op.accumulates() { BEFORE } else { f32::NAN }).to_f32().to_bits();
        let mut expected = vec![None; self.outputs];
        for (index, reference) in self.references.iter().enumerate() {
            let cols = self.out.cols;
            let place = |(i, _): (usize, &f64)| match index {
                2 => self.z + i / cols * self.z_stride + i % cols,
                half => self.out.index(half, i / cols, i % cols),
            };
            let places: Vec<usize> = reference.iter().enumerate().map(place).collect();
            let found = places.iter().map(|&at| f64::from(output[at].to_f32()));
            let error = oracle::relative_error(found, reference.iter().copied());
            let limit = limit(self.problem.dtype, reference.len());
            assert!(error <= limit, "{what}: output {index} has error {error:.2e}, limit {limit:.1e}");
            places.into_iter().for_each(|at| expected[at] = Some(index));
        }
        let outside = output.iter().zip(&expected).filter(|(_, inside)| inside.is_none());
        assert!(outside.into_iter().all(|(value, _)| value.to_f32().to_bits() == before), "{what}: wrote outside");
    }
}

fn library_gpu() -> Gpu {
    let gpu = gpu();
    swiglu_runtime::library::cublaslt().unwrap();
    // SAFETY: these tests use one stream each, which orders all its work; tracked events cannot be waited for in a capture.
    unsafe { gpu.stream.context().disable_event_tracking() };
    gpu
}

/// Every step in one number format.
fn steps_of<T: Element + DeviceRepr>(gpu: &Gpu, dtype: DType) {
    let sizes = [(1, 8, 8), (3, 1, 1), (16, 256, 512), (65, 136, 264), (130, 515, 77), (150, 200, 96)];
    let ops = Op::PRODUCTS.into_iter().filter(|&op| op != Op::Dgated || matches!(dtype, DType::F32 | DType::Tf32));
    for (op, major) in ops.flat_map(|op| WeightMajor::ALL.map(|major| (op, major))) {
        for (seed, (m, n, k)) in sizes.into_iter().enumerate() {
            let problem = Problem::forward(dtype, major, m, n, k).with_op(op);
            // Refused: the library rounds once more there.
            if dtype.bytes() == 2 && problem.alignment < 16 {
                assert!(gpu.runtime.prepare_step_config(&problem, config(0)).is_err());
                continue;
            }
            for (lie, gap) in [(Lie::Together, 0), (Lie::Together, 16), (Lie::Apart, 16)] {
                if op == Op::InputGrad && lie == Lie::Apart {
                    continue;
                }
                let case = StepCase::<T>::new(problem, lie, gap, seed as u64);
                for algorithm in [0, 4] {
                    // The second is used first while a graph is captured.
                    let [first, second] =
                        [(); 2].map(|()| gpu.runtime.prepare_step_config(&problem, config(algorithm)).unwrap());
                    case.check(gpu, [&first, &second], &format!("{lie:?} gap {gap} algorithm {algorithm}"));
                }
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn every_step_matches_the_oracle_and_its_capture() {
    let gpu = library_gpu();
    steps_of::<f32>(&gpu, DType::F32);
    steps_of::<f32>(&gpu, DType::Tf32);
    steps_of::<f16>(&gpu, DType::F16);
    steps_of::<bf16>(&gpu, DType::Bf16);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_forward_matches_the_oracle_in_every_layout_order_and_with_biases() {
    let gpu = library_gpu();
    for dtype in [DType::F32, DType::Tf32] {
        for (layout, gate_order) in WeightLayout::ALL
            .into_iter()
            .flat_map(|it| [GateOrder::GateFirst, GateOrder::UpFirst].map(|order| (it, order)))
        {
            for (index, (m, n, k)) in [(1, 8, 8), (3, 1, 1), (65, 129, 257), (130, 200, 96)].into_iter().enumerate() {
                for (save_preactivations, bias) in [(false, false), (false, true), (true, false), (true, true)] {
                    let spec = ForwardSpec { gate_order, save_preactivations, ..spec(dtype, layout, n, k) };
                    let plan = gpu.runtime.prepare_config(&spec, config(0)).unwrap();
                    for gap in [0, 8] {
                        let case = ForwardCase::<f32>::new(spec, m, gap, bias, index as u64);
                        case.check(&gpu, &plan, "cublaslt");
                        let bits = || -> Vec<u32> {
                            case.run(&gpu, &plan).unwrap().iter().map(|value| value.to_bits()).collect()
                        };
                        assert_eq!(bits(), bits(), "{spec:?} m {m}");
                    }
                }
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn of_no_tokens_weight_gradients_are_zero_and_other_outputs_empty() {
    let gpu = library_gpu();
    for (op, expected) in [(Op::WeightGrad, Some(0.0)), (Op::DownWeightGradAdd, Some(BEFORE)), (Op::Down, None)] {
        let problem = Problem::forward(DType::F32, WeightMajor::K, 0, 24, 40).with_op(op);
        let plan = gpu.runtime.prepare_step_config(&problem, config(0)).unwrap();
        let case = StepCase::<f32>::new(problem, Lie::Together, 0, 1);
        let stream = &gpu.stream;
        let inputs = stream.clone_htod(&vec![0.0f32; case.inputs.len().max(ALIGNED)]).unwrap();
        let outputs = stream.clone_htod(&vec![BEFORE; case.outputs.max(ALIGNED)]).unwrap();
        let args = case.arguments::<f32>(inputs.device_ptr(stream).0, outputs.device_ptr(stream).0);
        // SAFETY: the buffers hold the outputs and live until they are read back; of no tokens nothing is read.
        unsafe { plan.launch_raw(stream.cu_stream(), &args) }.unwrap();
        let found = stream.clone_dtoh(&outputs).unwrap();
        if let Some(expected) = expected {
            assert!(found[..24 * 40].iter().all(|&value| value == expected), "{op}");
        }
    }
}

/// A runtime whose table has the library win `problem`.
fn tuned(gpu: &Gpu, problem: &Problem) -> Runtime {
    let device = gpu.runtime.gpu().clone();
    let measurement = Measurement { median_us: 1.0, samples: 40, ..Measurement::default() };
    let record = Record {
        device: device.device.clone(),
        problem: *problem,
        config: config(0),
        outcome: Outcome::Measured(measurement),
        environment: Environment::default(),
        origin: Origin::Local,
    };
    let table = TuningTable::from_layers(vec![Snapshot::from_records(&[record]).unwrap()]);
    Runtime::on_gpu(device, &Options::from_env(), table).unwrap()
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn what_the_library_declines_a_kernel_of_ours_computes_where_it_was_tuned() {
    let gpu = library_gpu();
    let problem = Problem::forward(DType::Bf16, WeightMajor::K, 96, 136, 264).with_op(Op::InputGrad);
    let apart = StepCase::<bf16>::new(problem, Lie::Apart, 0, 3);
    let only = gpu.runtime.prepare_step_config(&problem, config(0)).unwrap();
    apart.check(&gpu, [&only, &only], "by the fallback");
    let runtime = tuned(&gpu, &problem);
    let plan = runtime.prepare_step(&problem).unwrap();
    assert_eq!(plan.choice(96).config.family(), Family::Cublaslt);
    apart.check(&gpu, [&plan, &plan], "instead");
    StepCase::<bf16>::new(problem, Lie::Together, 0, 3).check(&gpu, [&plan, &plan], "together");
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn threads_share_a_plan_over_more_sizes_than_it_remembers() {
    let gpu = library_gpu();
    let problem = Problem::forward(DType::Bf16, WeightMajor::K, 1, 64, 128).with_op(Op::DownInputGrad);
    let plan = gpu.runtime.prepare_step_config(&problem, config(0)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (gpu, plan) = (&gpu, &plan);
            scope.spawn(move || {
                let context = gpu.stream.context();
                context.bind_to_thread().unwrap();
                let stream = {
                    let _alone = alone();
                    context.new_stream().unwrap()
                };
                for m in (1..=300).map(|m| 1 + (m * 7 + thread * 31) % 300) {
                    let case = StepCase::<bf16>::new(problem.with_m(m), Lie::Together, 0, 1);
                    let inputs = stream.clone_htod(&case.inputs).unwrap();
                    let outputs = stream.clone_htod(&vec![bf16::NAN; case.outputs]).unwrap();
                    let args = case.arguments::<bf16>(inputs.device_ptr(&stream).0, outputs.device_ptr(&stream).0);
                    // SAFETY: the buffers hold the operands and live until the result is read back.
                    unsafe { plan.launch_raw(stream.cu_stream(), &args) }.unwrap();
                    let found = stream.clone_dtoh(&outputs).unwrap();
                    let values = found[..m as usize * 64].iter().map(|value| value.to_f64());
                    let error = oracle::relative_error(values, case.references[0].iter().copied());
                    assert!(error <= limit(DType::Bf16, m as usize * 64), "M {m}: {error:.2e}");
                }
            });
        }
    });
}
