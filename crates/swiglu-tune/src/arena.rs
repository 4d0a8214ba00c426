//! The operands of one problem on a GPU, in as many sets as defeat the L2 cache, and what their outputs have to be.
#![allow(unsafe_code, reason = "launches kernels on the addresses of its own buffers")]

use crate::device_memory::{Fill, Finish, GuardedBuffer, OutputMatrix, Support};
use crate::gpu_subject::{GpuLab, Stopwatch};
use crate::race::Failure;
use cudarc::driver::{CudaSlice, CudaView};
use swiglu_kernels::problem::INT4_GROUP;
use swiglu_kernels::{Format, Op, Problem, WeightMajor};
use swiglu_runtime::gpu::Kernel;
use swiglu_runtime::{RawForward, RawMatrix, RawScales, RawStep, launch};

/// Buffer sets together exceed the L2 cache by this factor, so that every launch finds it cold.
const L2_FACTOR: usize = 3;

/// One set of operands, in the order of [`Layout`].
struct BufferSet {
    inputs: Vec<GuardedBuffer>,
    outputs: Vec<GuardedBuffer>,
}

/// Standard deviation of random e4m3 codes: that of normal numbers whose largest is at the end of the range.
const E4M3_SIGMA: f32 = 100.0;
/// Standard deviation of int4 numbers that are all as likely.
const INT4_SIGMA: f32 = 4.6;

/// Standard deviation of the numbers that a format's codes stand for before their scales.
fn sigma_of_codes(format: Format) -> f32 {
    match format {
        Format::E4m3 => E4M3_SIGMA,
        Format::Int4 => INT4_SIGMA,
        Format::F32 | Format::F16 | Format::Bf16 => 1.0,
    }
}

/// One buffer that is read: what fills it, how many elements of how many bytes, and their standard deviation.
#[derive(Debug, Clone, Copy)]
struct Input {
    fill: Fill,
    elements: usize,
    element_bytes: u32,
    sigma: f32,
}

/// What the buffers of a set hold; outputs in elements. Pairs share one buffer. Of scaled formats the scales of x, then
/// those of the weights follow the forward's operands.
struct Layout {
    inputs: Vec<Input>,
    outputs: Vec<usize>,
}

impl Layout {
    fn of(problem: &Problem) -> Self {
        let (m, n, k) = (problem.m as usize, problem.n as usize, problem.k as usize);
        // Weights of 1/sqrt(K) keep gate and up near 1, where silu bends.
        let sigma = |length: usize| 1.0 / (length.max(1) as f32).sqrt();
        let of =
            |elements, sigma| Input { fill: Fill::X, elements, element_bytes: problem.dtype.output().bytes(), sigma };
        let (tokens_k, tokens_n, both) = (of(m * k, 1.0), of(m * n, 1.0), of(2 * m * n, 1.0));
        let weight = |length| of(n * k, sigma(length));
        let (inputs, outputs) = match problem.op {
            Op::Forward | Op::ForwardStatic => (Self::forward(problem), vec![m * n]),
            Op::ForwardSave => (Self::forward(problem), vec![m * n, 2 * m * n]),
            Op::Gate => (vec![both], vec![m * n]),
            Op::GateBackward => (vec![both, tokens_n], vec![2 * m * n, m * n]),
            Op::Down | Op::DownStatic => (vec![tokens_n, weight(n)], vec![m * k]),
            Op::DownInputGrad => (vec![tokens_k, weight(k)], vec![m * n]),
            Op::Dgated => (vec![tokens_k, weight(k), both], vec![2 * m * n, m * n]),
            Op::InputGrad => (vec![both, of(2 * n * k, sigma(2 * n))], vec![m * k]),
            Op::WeightGrad | Op::WeightGradAdd => (vec![both, of(m * k, sigma(m))], vec![2 * n * k]),
            Op::DownWeightGrad | Op::DownWeightGradAdd => (vec![tokens_n, of(m * k, sigma(m))], vec![n * k]),
            Op::BiasGrad | Op::BiasGradAdd => (vec![of(2 * m * n, sigma(m))], vec![2 * n]),
            Op::DownBiasGrad | Op::DownBiasGradAdd => (vec![of(m * k, sigma(m))], vec![k]),
        };
        Self { inputs, outputs }
    }

    /// x and both weights, then their scales.
    fn forward(problem: &Problem) -> Vec<Input> {
        let &Problem { dtype, .. } = problem;
        let (m, n, k) = (problem.m as usize, problem.n as usize, problem.k as usize);
        let (x_codes, weight_codes) = (sigma_of_codes(dtype.x()), sigma_of_codes(dtype.weights()));
        let weight_sigma = 1.0 / (k.max(1) as f32).sqrt();
        let input = |fill, elements, element_bytes, sigma| Input { fill, elements, element_bytes, sigma };
        let words = 2 * n * k.div_ceil(dtype.weights().numbers() as usize);
        let sigma = if dtype.is_scaled() { weight_codes } else { weight_sigma };
        let mut inputs = vec![
            input(Fill::X, m * k, dtype.x().bytes(), x_codes),
            input(Fill::Weights, words, dtype.weights().bytes(), sigma),
        ];
        if dtype.x() == Format::E4m3 {
            inputs.push(input(Fill::RowScales, m, 4, 1.0 / x_codes));
        }
        match dtype.weights() {
            Format::E4m3 => inputs.push(input(Fill::RowScales, 2 * n, 4, weight_sigma / weight_codes)),
            Format::Int4 => {
                let scales = 2 * n * k.div_ceil(INT4_GROUP as usize);
                inputs.push(input(Fill::GroupScales, scales, dtype.output().bytes(), weight_sigma / weight_codes));
            }
            Format::F32 | Format::F16 | Format::Bf16 => {}
        }
        inputs
    }
}

/// Addresses of one launch.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Arguments {
    Forward(RawForward),
    Step(RawStep),
}

/// Operands of one problem, in as many sets as defeat the L2 cache.
pub(crate) struct Arena {
    pub(crate) problem: Problem,
    pub(crate) support: Support,
    sets: Vec<BufferSet>,
}

impl Arena {
    /// Allocates and fills fresh operands.
    pub(crate) fn new(lab: &GpuLab, problem: Problem, seed: u64) -> Result<Self, Failure> {
        let support = Support::load(&lab.gpu, &lab.nvrtc, &lab.cache, &lab.stream, &problem)
            .map_err(|error| Failure::new("compile", error))?;
        let Layout { inputs, outputs } = Layout::of(&problem);
        let output_bytes = problem.op.output_bytes(problem.dtype) as usize;
        let bytes = |input: &Input| (input.elements * input.element_bytes as usize).next_multiple_of(2);
        let in_bytes = inputs.iter().map(bytes);
        let all_bytes = in_bytes.chain(outputs.iter().map(|elements| elements * output_bytes)).sum::<usize>();
        let count = (L2_FACTOR * lab.gpu.l2_bytes / all_bytes.max(1) + 1).clamp(2, 256);
        let mut sets = Vec::with_capacity(count);
        let mut seeds = seed..;
        for _ in 0..count {
            let mut filled = Vec::with_capacity(inputs.len());
            for input in &inputs {
                let buffer = support.allocate(bytes(input))?;
                support.fill(&buffer, input.fill, input.element_bytes, seeds.next().unwrap_or(seed), input.sigma)?;
                filled.push(buffer);
            }
            let outputs = outputs.iter().map(|elements| support.allocate(elements * output_bytes));
            sets.push(BufferSet { inputs: filled, outputs: outputs.collect::<Result<_, _>>()? });
        }
        Ok(Self { problem, support, sets })
    }

    /// Number of sets.
    pub(crate) fn set_count(&self) -> usize {
        self.sets.len()
    }

    /// The operands of set `index`, modulo their number.
    pub(crate) fn args(&self, index: usize) -> Arguments {
        if self.problem.op.is_forward() {
            Arguments::Forward(self.forward(index))
        } else {
            Arguments::Step(self.step(index))
        }
    }

    /// The same, where the op is the forward.
    pub(crate) fn forward(&self, index: usize) -> RawForward {
        let Problem { m, n, k, .. } = self.problem;
        let set = &self.sets[index % self.sets.len()];
        let [gate, up] = self.weights(set.inputs[1].address());
        let [saved_gate, saved_up] =
            set.outputs.get(1).map_or([RawMatrix::default(); 2], |both| self.beside(both.address()));
        RawForward {
            m,
            x: set.inputs[0].address(),
            x_stride: i64::from(k),
            gate: gate.address,
            gate_stride: gate.stride,
            up: up.address,
            up_stride: up.stride,
            gate_bias: 0,
            up_bias: 0,
            z: set.outputs[0].address(),
            z_stride: i64::from(n),
            saved_gate: saved_gate.address,
            saved_gate_stride: saved_gate.stride,
            saved_up: saved_up.address,
            saved_up_stride: saved_up.stride,
            scales: self.scales(set),
        }
    }

    /// Where the scales of a set lie, if its formats have any.
    fn scales(&self, set: &BufferSet) -> RawScales {
        let Problem { n, dtype, .. } = self.problem;
        let mut scales = set.inputs.iter().skip(2).map(GuardedBuffer::address);
        let x = if dtype.x() == Format::E4m3 { scales.next() } else { None };
        let weights = scales.next();
        let int4 = dtype.weights() == Format::Int4;
        let half = u64::from(n) * if int4 { u64::from(dtype.output().bytes()) } else { 4 };
        RawScales {
            x: x.unwrap_or(0),
            gate: weights.unwrap_or(0),
            up: weights.map_or(0, |both| both + half),
            stride: if int4 { 2 * i64::from(n) } else { 0 },
            x_rows: x.is_some(),
            weight_rows: weights.is_some() && !int4,
        }
    }

    /// Reads the weights of set `index` once, with `per_sm` blocks a multiprocessor.
    pub(crate) fn read_weights(&self, index: usize, per_sm: u32) -> Result<(), Failure> {
        self.support.read_once(&self.sets[index % self.sets.len()].inputs[1], per_sm)
    }

    /// The same, where the op is a step.
    pub(crate) fn step(&self, index: usize) -> RawStep {
        let Problem { op, m, n, k, weight_major, .. } = self.problem;
        let BufferSet { inputs, outputs } = &self.sets[index % self.sets.len()];
        let none = RawMatrix::default();
        let one = |address: u64, stride: u32| RawMatrix { address, stride: i64::from(stride) };
        let input = |index: usize| inputs[index].address();
        let output = |index: usize| outputs[index].address();
        let [by_k, by_n] = [k, n].map(|stride| move |address: u64| [one(address, stride), none]);
        // Of Wd `[K,N]` or `[N,K]`.
        let down = |address| if weight_major == WeightMajor::K { by_n(address) } else { by_k(address) };
        let gated = || {
            let [dgate, dup] = self.beside(output(0));
            [dgate, dup, one(output(1), n)]
        };
        let pair = |[first, second]: [RawMatrix; 2]| [first, second, none];
        let step = RawStep { m, ..RawStep::default() };
        match op {
            Op::Forward | Op::ForwardSave | Op::ForwardStatic => step,
            Op::Gate => RawStep { saved: self.beside(input(0)), out: pair(by_n(output(0))), ..step },
            Op::GateBackward => RawStep { saved: self.beside(input(0)), left: by_n(input(1)), out: gated(), ..step },
            Op::Down | Op::DownStatic => {
                RawStep { left: by_n(input(0)), right: down(input(1)), out: pair(by_k(output(0))), ..step }
            }
            Op::DownInputGrad => {
                RawStep { left: by_k(input(0)), right: down(input(1)), out: pair(by_n(output(0))), ..step }
            }
            Op::Dgated => {
                let saved = self.beside(input(2));
                RawStep { left: by_k(input(0)), right: down(input(1)), saved, out: gated(), ..step }
            }
            Op::InputGrad => {
                let right = self.weights(input(1));
                RawStep { left: self.beside(input(0)), right, out: pair(by_k(output(0))), ..step }
            }
            Op::WeightGrad | Op::WeightGradAdd => {
                let (grads, x, out) = (self.beside(input(0)), by_k(input(1)), pair(self.weights(output(0))));
                let (left, right) = if weight_major == WeightMajor::K { (grads, x) } else { (x, grads) };
                RawStep { left, right, out, ..step }
            }
            Op::DownWeightGrad | Op::DownWeightGradAdd => {
                let (z, dy, out) = (by_n(input(0)), by_k(input(1)), pair(down(output(0))));
                let (left, right) = if weight_major == WeightMajor::K { (dy, z) } else { (z, dy) };
                RawStep { left, right, out, ..step }
            }
            Op::BiasGrad | Op::BiasGradAdd => {
                let second = output(0) + u64::from(n) * u64::from(op.output_bytes(self.problem.dtype));
                RawStep { right: self.beside(input(0)), out: [one(output(0), n), one(second, n), none], ..step }
            }
            Op::DownBiasGrad | Op::DownBiasGradAdd => {
                RawStep { right: by_k(input(0)), out: pair(by_k(output(0))), ..step }
            }
        }
    }

    /// Two `[M, N]` matrices side by side.
    fn beside(&self, address: u64) -> [RawMatrix; 2] {
        let Problem { n, dtype, .. } = self.problem;
        let half = u64::from(n) * u64::from(dtype.output().bytes());
        [0, half].map(|offset| RawMatrix { address: address + offset, stride: 2 * i64::from(n) })
    }

    /// Two weights (or their gradients) packed in one matrix.
    fn weights(&self, address: u64) -> [RawMatrix; 2] {
        let Problem { op, n, k, dtype, weight_major, .. } = self.problem;
        let (n, k) = (u64::from(n), u64::from(k));
        let (stride, second) = match weight_major {
            WeightMajor::K => (k, n * k),
            WeightMajor::N => (2 * n, n),
        };
        let bytes = if op.accumulates() { 4 } else { u64::from(dtype.weights().bytes()) };
        [0, second].map(|offset| RawMatrix { address: address + offset * bytes, stride: stride as i64 })
    }

    /// Launches `kernel` on set `index`.
    pub(crate) fn launch(&self, lab: &GpuLab, kernel: &Kernel, index: usize) -> Result<(), Failure> {
        let stream = lab.stream.cu_stream();
        let launched = match self.args(index) {
            // SAFETY: the buffers hold the problem, are apart, outlive the stream's work, and are as aligned as the
            // problem says, since they start at multiples of 16 bytes with contiguous rows.
            Arguments::Forward(args) => unsafe { launch::forward(kernel, stream, &args) },
            // SAFETY: as above.
            Arguments::Step(args) => unsafe { launch::step(kernel, stream, &args) },
        };
        launched.map_err(|refusal| Failure::new("launch", refusal))
    }
}

/// A launch whose output was right.
pub(crate) struct Verified {
    /// Relative error against the oracle.
    pub(crate) error: f64,
    /// Its time, in microseconds.
    pub(crate) once_us: f64,
}

/// What the first set's outputs have to be.
pub(crate) struct Reference {
    /// Of one output after the other.
    values: CudaSlice<f64>,
    /// Each with the root mean square of its values.
    outputs: Vec<(OutputMatrix, f64)>,
}

impl Arena {
    /// The float64 oracle's outputs on the first set.
    pub(crate) fn reference(&self) -> Result<Reference, Failure> {
        let matrix = |address, row_stride| OutputMatrix { address, row_stride, f32: self.problem.op.accumulates() };
        let (values, outputs) = match self.args(0) {
            Arguments::Forward(args) => {
                let outputs = [
                    (args.z, args.z_stride),
                    (args.saved_gate, args.saved_gate_stride),
                    (args.saved_up, args.saved_up_stride),
                ];
                (self.support.oracle(&self.problem, &args)?, outputs)
            }
            Arguments::Step(args) => {
                (self.step_reference(&args)?, args.out.map(|matrix| (matrix.address, matrix.stride)))
            }
        };
        let rms = |(index, (address, stride))| {
            let output = matrix(address, stride);
            let rms = self.support.compare(&self.problem, &output, &self.part(&values, index), 0.0)?.rms;
            Ok((output, rms))
        };
        let outputs = outputs
            .into_iter()
            .take(self.problem.op.outputs() as usize)
            .enumerate()
            .map(rms)
            .collect::<Result<_, Failure>>()?;
        Ok(Reference { values, outputs })
    }

    fn step_reference(&self, args: &RawStep) -> Result<CudaSlice<f64>, Failure> {
        let Self { problem, support, .. } = self;
        let mut values = support.reference(problem.op.outputs() as usize * self.elements())?;
        let finish = match problem.op {
            Op::Gate => Finish::Gate,
            Op::GateBackward | Op::Dgated => Finish::GateBackward,
            _ => Finish::Add,
        };
        let count = problem.product().map_or(1, |product| product.outputs()) as usize;
        let size = if finish == Finish::Add { self.elements() } else { values.len() };
        for half in 0..count {
            let mut part = values.slice_mut(half * size..(half + 1) * size);
            support.oracle_step(problem, args, half, finish, &mut part)?;
        }
        Ok(values)
    }

    /// Elements of one output.
    fn elements(&self) -> usize {
        let (rows, cols) = self.problem.output();
        rows as usize * cols as usize
    }

    /// The values of output `index`.
    fn part<'a>(&self, values: &'a CudaSlice<f64>, index: usize) -> CudaView<'a, f64> {
        values.slice(index * self.elements()..(index + 1) * self.elements())
    }

    /// Launches `kernel` once on poisoned outputs; fails unless every error is within the format's tolerance and nothing
    /// outside of the outputs was written. The error told is the largest.
    pub(crate) fn verify(
        &self,
        lab: &GpuLab,
        kernel: &Kernel,
        reference: &Reference,
        stopwatch: &Stopwatch<'_>,
    ) -> Result<Verified, Failure> {
        let Self { problem, support, sets } = self;
        let set = sets.first().ok_or_else(|| Failure::new("launch", "no buffers"))?;
        for output in &set.outputs {
            if problem.op.accumulates() { support.prepare_sums(output)? } else { support.poison(output)? }
        }
        // What the library loads at its first launch is not its time.
        if kernel.config.family().is_library() {
            self.launch(lab, kernel, 1)?;
        }
        let once_us = stopwatch.time(|| self.launch(lab, kernel, 0))?;
        let mut error = 0.0f64;
        for (index, (output, rms)) in reference.outputs.iter().enumerate() {
            let found = support.compare(problem, output, &self.part(&reference.values, index), *rms)?;
            let tolerance = crate::race::tolerance(problem.dtype, found.rounding);
            if found.wrong > 0.0 || found.error.is_nan() || found.error > tolerance {
                let reason = format!(
                    "{} wrong elements, relative error {:.2e} (limit {tolerance:.1e})",
                    found.wrong, found.error
                );
                return Err(Failure::new("verify", reason));
            }
            error = error.max(found.error);
        }
        let buffers: Vec<&GuardedBuffer> = set.inputs.iter().chain(&set.outputs).collect();
        if !support.guards_intact(&buffers)? {
            return Err(Failure::new("verify", "wrote outside of its outputs"));
        }
        Ok(Verified { error, once_us })
    }
}
