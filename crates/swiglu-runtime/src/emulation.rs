//! Kernels on a GPU in miniature: compiled for the CPU with the headers of `templates/shared/ptx` replaced, and held to
//! the oracle with the very arguments and boxes that a launch has. Not for speed: races and memory orders that only a
//! real GPU shows stay unseen.
//!
//! `emulation/machine.hpp` is the machine, `emulation/ptx/NAME.hpp` stands for `templates/shared/ptx/NAME.cuh`.
#![allow(unsafe_code, reason = "calls the compiled kernels")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use crate::launch::{KernelParams, RawForward, RawScales};
use crate::split::{self, Split};
use crate::tensor_map::{self, BoxedMatrix};
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng, seq::IndexedRandom};
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use swiglu_kernels::families::{
    Config, Family, Schedule, Staging, Target, WgmmaStreamConfig, WgmmaTmaConfig, candidates,
};
use swiglu_kernels::problem::INT4_GROUP;
use swiglu_kernels::{
    Activation, ArchSpec, DType, Format, KernelSource, Op, Problem, WeightMajor, arch, oracle, quant, render,
};

mod steps;

/// `TensorMap` of `emulation/ptx/tma.hpp`.
#[repr(C, align(64))]
struct Map {
    address: u64,
    rows: i64,
    cols: i64,
    row_bytes: i64,
    box_rows: i32,
    box_cols: i32,
    element_bytes: i32,
    swizzle_bytes: i32,
}

impl Map {
    fn new(matrix: &BoxedMatrix) -> Self {
        let element_bytes = matrix.format.bytes();
        let int = |value: u32| i32::try_from(value).unwrap();
        Self {
            address: matrix.address,
            rows: i64::from(matrix.rows),
            cols: i64::from(matrix.cols),
            row_bytes: matrix.row_stride * i64::from(element_bytes),
            box_rows: int(matrix.box_rows),
            box_cols: int(matrix.box_cols),
            element_bytes: int(element_bytes),
            swizzle_bytes: int(matrix.swizzle_bytes()),
        }
    }
}

/// The source for the CPU: other headers, shared memory from the machine, the written-out product called by name.
fn translate(source: &KernelSource) -> String {
    let mut text = String::from("#include \"machine.hpp\"\n");
    let mut file = String::new();
    let mut in_product = false;
    for line in source.text.lines() {
        if let Some(rest) = line.strip_prefix("#line ") {
            let (number, name) = rest.split_once(' ').unwrap();
            file = name.trim_matches('"').to_owned();
            if let (Some(header), "1") = (file.strip_prefix("shared/ptx/"), number) {
                writeln!(text, "#include \"ptx/{}\"", header.replace(".cuh", ".hpp")).unwrap();
            }
        } else if file.starts_with("shared/ptx/") {
        } else if line.contains("void wgmma(float (&d)[") {
            in_product = true;
            text += line;
            text += "wgmma_product<product_dtype(kDType), kTransposeA, kTransposeB>(d, a, b, accumulate); }\n";
        } else if in_product {
            in_product = line != "}";
        } else if line.trim_start().starts_with("extern __shared__") {
            let declared = line.split("[];").next().unwrap();
            let mut words = declared.rsplit(' ');
            let (name, of) = (words.next().unwrap(), words.next().unwrap());
            writeln!(text, "auto* {name} = reinterpret_cast<{of}*>(machine::cta().memory.data());").unwrap();
        } else {
            text += line;
            text.push('\n');
        }
    }
    let run = |name: &str, entry: &str| {
        format!(
            "extern \"C\" bool {name}(const void* const* arguments, unsigned grid, unsigned block, unsigned cluster, \
             unsigned long shared_bytes) {{\n\
             return machine::launch({entry}, arguments, grid, block, cluster, shared_bytes);\n}}\n"
        )
    };
    text + &run("run", source.entry) + &source.prologue.map_or_else(String::new, |entry| run("run_prologue", entry))
}

type Run = unsafe extern "C" fn(*const *const c_void, u32, u32, u32, u64) -> bool;

fn compile(source: &KernelSource, folder: &Path) -> libloading::Library {
    let (text, library) = (folder.join("kernel.cpp"), folder.join("kernel.so"));
    std::fs::write(&text, translate(source)).unwrap();
    let headers = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/emulation");
    let output = Command::new(std::env::var("CXX").unwrap_or_else(|_| "c++".into()))
        .args(["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-I"])
        .args([&headers, Path::new("-o"), &library, &text])
        .output()
        .unwrap_or_else(|error| panic!("a C++ compiler is needed, `apt install g++`: {error}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // SAFETY: the library was compiled above; it runs nothing when it is loaded.
    unsafe { libloading::Library::new(&library) }.unwrap()
}

/// Numbers as a kernel finds them in memory.
struct Numbers {
    format: Format,
    bytes: Vec<u8>,
}

impl Numbers {
    /// `count` elements of the values that `value` makes.
    fn new(format: Format, count: usize, mut value: impl FnMut() -> f32) -> Self {
        let element = |value: f32| match format {
            Format::F32 => value.to_le_bytes().to_vec(),
            Format::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
            Format::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
            Format::E4m3 => vec![quant::e4m3_of_f32(value)],
            Format::Int4 => panic!("int4 comes in words"),
        };
        Self { format, bytes: (0..count).flat_map(|_| element(value())).collect() }
    }

    /// `count` words of any codes.
    fn int4(count: usize, rng: &mut SmallRng) -> Self {
        let words = (0..count).flat_map(|_| rng.random::<u32>().to_le_bytes());
        Self { format: Format::Int4, bytes: words.collect() }
    }

    /// Number `index` of an element.
    fn at(&self, element: usize, index: usize) -> f64 {
        let bytes = &self.bytes[element * self.format.bytes() as usize..];
        f64::from(self.format.read(bytes, index as u32).unwrap())
    }

    /// Puts `value` in the place of an element of fp32.
    fn put(&mut self, element: usize, value: f32) {
        self.bytes[element * 4..][..4].copy_from_slice(&value.to_le_bytes());
    }

    fn address(&self) -> u64 {
        self.bytes.as_ptr() as u64
    }
}

/// Scales of a matrix: of its rows (one or all), or of the groups of int4 with gaps between their rows.
struct Scales {
    of: Numbers,
    each: bool,
}

/// The parts of operands, written by the prologue of `library`, with their memory.
fn run_split(library: &libloading::Library, split: Split) -> (Split, Vec<u8>) {
    let memory = vec![0xa5_u8; split.bytes as usize + 256];
    let split = split.at((memory.as_ptr() as u64).next_multiple_of(256));
    let arguments = [(&raw const split.params).cast::<c_void>()];
    // SAFETY: `translate` gives every library with a prologue this function.
    let run = unsafe { library.get::<Run>(b"run_prologue") }.unwrap();
    // SAFETY: the argument is the kernel's and alive; the parts have their memory.
    let done = unsafe { run(arguments.as_ptr(), split.blocks, split::THREADS, 1, 0) };
    assert!(done, "the prologue's threads wait for each other for ever");
    (split, memory)
}

/// Random operands whose rows have gaps, so that strides count.
struct Case {
    problem: Problem,
    x: Numbers,
    weights: [Numbers; 2],
    biases: [Numbers; 2],
    x_scales: Option<Scales>,
    weight_scales: Option<[Scales; 2]>,
}

/// Elements between rows, at least.
const GAP: usize = 16;

/// Elements from row to row, whatever their length: aligned to 16 bytes.
fn pitch(len: usize) -> usize {
    (len + GAP).next_multiple_of(16)
}

impl Case {
    /// `shift` moves the middle of x and the weights away from 0, in their standard deviations.
    fn new(problem: Problem, seed: u64, shift: f32) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (m, n, k) = (problem.m as usize, problem.n as usize, problem.k as usize);
        let dtype = problem.dtype;
        let (rows, row) = match problem.weight_major {
            WeightMajor::K => (n, pitch(k)),
            WeightMajor::N => (k.div_ceil(dtype.weights().numbers() as usize), pitch(n)),
        };
        let weight = 1.0 / (k as f32).sqrt();
        // Of e4m3 the codes are 100 times as large, and the scales as much smaller.
        let codes = |format| if format == Format::E4m3 { 100.0 } else { 1.0 };
        let (x_codes, weight_codes) = (codes(dtype.x()), codes(dtype.weights()));
        let normal = |format, count, scale: f32, shift: f32, rng: &mut SmallRng| {
            Numbers::new(format, count, || scale * (Distribution::<f32>::sample(&StandardNormal, rng) + shift))
        };
        let x = normal(dtype.x(), m * pitch(k), x_codes, shift, &mut rng);
        let weights = [(); 2].map(|()| match dtype.weights() {
            Format::Int4 => Numbers::int4(rows * row, &mut rng),
            format => {
                let scale = if dtype.is_scaled() { weight_codes } else { weight };
                normal(format, rows * row, scale, shift, &mut rng)
            }
        });
        let biases = [(); 2].map(|()| normal(dtype.output(), n, 1.0, 0.0, &mut rng));
        let scales = |format, count, middle: f32, each, rng: &mut SmallRng| Scales {
            of: Numbers::new(format, count, || middle * rng.random_range(0.75..1.25)),
            each,
        };
        let (each_row, each) = (seed & 2 == 0, seed & 1 == 0);
        let x_scales = (dtype.x() == Format::E4m3)
            .then(|| scales(Format::F32, if each_row { m } else { 1 }, 1.0 / x_codes, each_row, &mut rng));
        let weight_scales = match dtype.weights() {
            Format::E4m3 => {
                let count = if each { n } else { 1 };
                Some([(); 2].map(|()| scales(Format::F32, count, weight / weight_codes, each, &mut rng)))
            }
            Format::Int4 => {
                let count = k.div_ceil(INT4_GROUP as usize) * pitch(n);
                Some([(); 2].map(|()| scales(dtype.output(), count, weight / 4.6, true, &mut rng)))
            }
            Format::F32 | Format::F16 | Format::Bf16 => None,
        };
        Self { problem, x, weights, biases, x_scales, weight_scales }
    }

    /// What the number of weight `which` for `row` (a column of z) at `k` stands for.
    fn weight(&self, which: usize, row: usize, at: usize) -> f64 {
        let (n, k) = (self.problem.n as usize, self.problem.k as usize);
        let stored = &self.weights[which];
        let numbers = stored.format.numbers() as usize;
        let number = match self.problem.weight_major {
            WeightMajor::K => stored.at(row * pitch(k) + at, 0),
            WeightMajor::N => stored.at(at / numbers * pitch(n) + row, at % numbers),
        };
        let scale = self.weight_scales.as_ref().map_or(1.0, |scales| {
            let Scales { of, each } = &scales[which];
            match stored.format {
                Format::Int4 => of.at(at / INT4_GROUP as usize * pitch(n) + row, 0),
                _ => of.at(if *each { row } else { 0 }, 0),
            }
        });
        number * scale
    }

    fn sums(&self) -> Vec<(f64, f64)> {
        let (m, n, k) = (self.problem.m as usize, self.problem.n as usize, self.problem.k as usize);
        let all = |which: usize| (0..n * k).map(|i| self.weight(which, i / k, i % k)).collect::<Vec<_>>();
        let bias = |of: &Numbers| (0..n).map(|i| of.at(i, 0)).collect::<Vec<_>>();
        let x_scale = |row: usize| {
            self.x_scales.as_ref().map_or(1.0, |scales| scales.of.at(if scales.each { row } else { 0 }, 0))
        };
        oracle::preactivations(&oracle::Forward {
            x: &(0..m * k).map(|i| x_scale(i / k) * self.x.at(i / k * pitch(k) + i % k, 0)).collect::<Vec<_>>(),
            gate: &all(0),
            up: &all(1),
            gate_bias: Some(&bias(&self.biases[0])),
            up_bias: Some(&bias(&self.biases[1])),
            k,
        })
    }

    fn raw_scales(&self) -> RawScales {
        let [gate, up] = self.weight_scales.as_ref().map_or([0, 0], |scales| scales.each_ref().map(|s| s.of.address()));
        let int4 = self.problem.dtype.weights() == Format::Int4;
        RawScales {
            x: self.x_scales.as_ref().map_or(0, |scales| scales.of.address()),
            gate,
            up,
            stride: if int4 { pitch(self.problem.n as usize) as i64 } else { 0 },
            x_rows: self.x_scales.as_ref().is_some_and(|scales| scales.each),
            weight_rows: !int4 && self.weight_scales.as_ref().is_some_and(|scales| scales[0].each),
        }
    }

    /// Runs `config`; says what is wrong.
    fn check(&self, config: &Config, arch: &'static ArchSpec, tolerance: f64) -> Result<(), String> {
        let problem = &self.problem;
        let source = render::render(problem, config, arch).map_err(|error| error.to_string())?;
        let folder = tempfile::tempdir().unwrap();
        let library = compile(&source, folder.path());
        // SAFETY: `translate` gives every library this function.
        let run = unsafe { library.get::<Run>(b"run") }.unwrap();

        let (m, n, k) = (problem.m as usize, problem.n as usize, problem.k as usize);
        let mut outputs = [(); 3].map(|()| Numbers::new(problem.dtype.output(), m * pitch(n), || f32::NAN));
        let weight_stride = pitch(if problem.weight_major == WeightMajor::K { k } else { n });
        let [z, saved_gate, saved_up] = outputs.each_mut().map(|output| output.bytes.as_mut_ptr() as u64);
        let saves = problem.op.saves_preactivations();
        let args = RawForward {
            m: problem.m,
            x: self.x.address(),
            x_stride: pitch(k) as i64,
            gate: self.weights[0].address(),
            gate_stride: weight_stride as i64,
            up: self.weights[1].address(),
            up_stride: weight_stride as i64,
            gate_bias: self.biases[0].address(),
            up_bias: self.biases[1].address(),
            z,
            z_stride: pitch(n) as i64,
            saved_gate: if saves { saved_gate } else { 0 },
            saved_gate_stride: pitch(n) as i64,
            saved_up: if saves { saved_up } else { 0 },
            saved_up_stride: pitch(n) as i64,
            scales: self.raw_scales(),
        };
        let shape = config.launch_shape(problem).unwrap();
        let with_memory = source.prologue.map(|_| run_split(&library, Split::of_forward(problem, &args)));
        let split = with_memory.as_ref().map(|(split, _)| *split);
        // Bands so narrow that small problems have several.
        let group = shape.raster_group.min(2);
        let params = |args: &RawForward| KernelParams::new(problem, shape.raster, group, args).unwrap();
        let params = params(&split.map_or(args, |split| split.scaled(&args)));
        let (of_maps, operands) = split.map_or((*problem, args), |split| split.forward(problem, &args));
        let maps: Vec<Map> = match config {
            Config::WgmmaTma(config) => {
                let saved = tensor_map::of_preactivations(config, problem, &args).into_iter().filter(|_| saves);
                tensor_map::of_wgmma_tma(config, &of_maps, &operands).into_iter().chain(saved).collect()
            }
            Config::WgmmaStream(config) => tensor_map::of_wgmma_stream(config, problem, &args).to_vec(),
            Config::WeightOnlyTma(config) => {
                let scales = tensor_map::of_int4_scales(config, problem, &args).into_iter();
                let scales = scales.filter(|_| problem.dtype.weights() == Format::Int4);
                tensor_map::of_weight_only_tma(config, problem, &args).into_iter().chain(scales).collect()
            }
            Config::MmaSync(config) if config.staging == Staging::Tma => {
                tensor_map::of_mma_sync(config, problem, &args).to_vec()
            }
            _ => Vec::new(),
        }
        .iter()
        .map(Map::new)
        .collect();
        // What comes in pairs, an operand with its tail, what is saved or scales, is one argument, an array.
        let first: &[usize] = if matches!(config, Config::WgmmaTma(_)) { &[0, 2, 4, 6, 7] } else { &[0, 1, 2, 3] };
        let mut arguments: Vec<*const c_void> =
            first.iter().filter_map(|&at| maps.get(at)).map(|map| std::ptr::from_ref(map).cast()).collect();
        arguments.push((&raw const params).cast());
        let tiles = problem.m.div_ceil(shape.block_m) * problem.n.div_ceil(shape.block_n);
        // Fewer than there are tiles, so that persistent kernels walk.
        let clusters = if shape.per_sm.is_some() { tiles.div_ceil(2) } else { tiles };
        let (grid, bytes) = (clusters * shape.cluster, u64::from(shape.smem_bytes));
        // SAFETY: the arguments are the kernel's, in its order, and alive; the operands hold the problem.
        let done = unsafe { run(arguments.as_ptr(), grid, shape.threads, shape.cluster, bytes) };
        if !done {
            return Err("its threads wait for each other for ever".into());
        }

        let sums = self.sums();
        let (gate, up): (Vec<f64>, Vec<f64>) = sums.iter().copied().unzip();
        let references = [oracle::gated(Activation::Silu, &sums), gate, up];
        for ((output, reference), name) in
            outputs.iter().zip(&references).zip(["z", "gate", "up"]).take(problem.op.outputs() as usize)
        {
            let inside = (0..m * pitch(n)).filter(|i| i % pitch(n) < n).map(|i| output.at(i, 0));
            let error = oracle::relative_error(inside, reference.iter().copied());
            if error.is_nan() || error > tolerance {
                return Err(format!("{name} has error {error:.2e}"));
            }
            // Small rows must not hide behind large ones.
            for row in 0..m {
                let inside = (0..n).map(|column| output.at(row * pitch(n) + column, 0));
                let error = oracle::relative_error(inside, reference[row * n..][..n].iter().copied());
                if error.is_nan() || error > 4.0 * tolerance {
                    return Err(format!("row {row} of {name} has error {error:.2e}"));
                }
            }
            if (0..m * pitch(n)).any(|i| i % pitch(n) >= n && !output.at(i, 0).is_nan()) {
                return Err(format!("wrote between the rows of {name}"));
            }
        }
        Ok(())
    }
}

fn check(problem: Problem, config: &Config, arch: &'static ArchSpec) -> Result<(), String> {
    // Scales of every row or of the whole, of x and of the weights.
    let seeds = if problem.dtype.weights() == Format::E4m3 { &[8, 5, 6, 7][..] } else { &[5] };
    let check = |&seed: &u64| {
        let checked = Case::new(problem, seed, 0.0).check(config, arch, problem.dtype.tolerance());
        checked.map_err(|why| format!("{problem:?} {config}, seed {seed}: {why}"))
    };
    seeds.iter().try_for_each(check)
}

fn check_all(cases: &[(Problem, Config)], arch: &'static ArchSpec) {
    let wrong: Vec<String> =
        cases.par_iter().filter_map(|(problem, config)| check(*problem, config, arch).err()).collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

fn cluster([m, n, k]: [u32; 3], blocks_per_sm: u32) -> u32 {
    m + 4 * n + 16 * k + 128 * blocks_per_sm
}

/// Different where two configs take different ways through their template.
type Way = (Family, Option<Staging>, Option<Schedule>, u32);

/// The ways that some configs take, each once.
fn ways(all: &[Config]) -> Vec<Way> {
    let mut ways: Vec<_> = all.iter().map(way).collect();
    ways.sort_unstable();
    ways.dedup();
    ways
}

/// One at random of those that go `this` way.
fn one_of(all: &[Config], this: Way, rng: &mut SmallRng) -> Option<Config> {
    let of_this: Vec<&Config> = all.iter().filter(|config| way(config) == this).collect();
    of_this.choose(rng).map(|config| **config)
}

fn way(config: &Config) -> Way {
    match config {
        Config::MmaSync(sync) => (Family::MmaSync, Some(sync.staging), None, 1),
        Config::WgmmaTma(tma) => (
            Family::WgmmaTma,
            None,
            Some(tma.schedule),
            cluster([tma.cluster_m, tma.cluster_n, tma.cluster_k], tma.blocks_per_sm)
                + 1024 * u32::from(tma.consumers == 3),
        ),
        Config::WgmmaGemm(gemm) => (
            Family::WgmmaGemm,
            None,
            Some(gemm.schedule),
            cluster([gemm.cluster_m, gemm.cluster_n, gemm.cluster_k], gemm.blocks_per_sm) + 1024 * gemm.consumers,
        ),
        Config::MmaDirect(direct) => (Family::MmaDirect, None, None, direct.loads.min(5)),
        Config::WgmmaStream(stream) => {
            let row_blocks = if stream.tokens_on_rows() { 0 } else { stream.block_n.div_ceil(64) };
            (Family::WgmmaStream, None, None, cluster([stream.stagger, row_blocks, stream.cluster_k], 1))
        }
        Config::WeightOnlyTma(tma) => (Family::WeightOnlyTma, None, None, tma.warps_k.min(2) + 2 * tma.order_warps),
        _ => (config.family(), None, None, 1),
    }
}

fn is_for_few_tokens(config: &Config) -> bool {
    matches!(config, Config::WgmmaStream(_)) || matches!(config, Config::WgmmaTma(tma) if tma.consumers == 1)
}

#[test]
fn every_way_through_every_template_matches_the_oracle() {
    let arch = arch::by_name("sm_90a").unwrap();
    let mut rng = SmallRng::seed_from_u64(11);
    let mut cases: Vec<(Problem, Config)> = Vec::new();
    for (index, dtype) in DType::ALL.into_iter().enumerate() {
        for major in WeightMajor::ALL {
            // Ragged against every tile, and more than one tile of most; K of several steps of what runs few tokens, and of
            // several sums of e4m3.
            let problem = match (dtype, dtype.is_scaled()) {
                (DType::E4m3, _) => Problem::forward(dtype, major, 150, 136, 1200),
                (_, true) => Problem::forward(dtype, major, 20, 136, 1616),
                (_, false) => Problem::forward(dtype, major, 150, 136, 208),
            };
            let op = if (index % 2 == 0) == (major == WeightMajor::K) { Op::ForwardSave } else { Op::Forward };
            let problem = problem.with_op(op);
            let mut all = candidates(&problem, Target::Gpu(arch));
            all.retain(|config| config.family().has_source());
            for this in ways(&all) {
                cases.extend(one_of(&all, this, &mut rng).map(|config| (problem, config)));
            }
        }
    }
    assert!(cases.len() > 20, "{} cases", cases.len());
    check_all(&cases, arch);
}

/// Fewer K tiles than stages, more, and several output tiles a CTA: what comes before the wait is counted once.
#[test]
fn static_weights_come_before_x() {
    let arch = arch::by_name("sm_90a").unwrap();
    let mut rng = SmallRng::seed_from_u64(12);
    let mut cases: Vec<(Problem, Config)> = Vec::new();
    for (major, k) in WeightMajor::ALL.into_iter().flat_map(|major| [(major, 200), (major, 1616)]) {
        let problem = Problem::forward(DType::Bf16, major, 20, 264, k).with_op(Op::ForwardStatic);
        let mut all = candidates(&problem, Target::Gpu(arch));
        all.retain(is_for_few_tokens);
        for this in ways(&all) {
            cases.extend(one_of(&all, this, &mut rng).map(|config| (problem, config)));
        }
    }
    assert!(cases.len() >= 20, "{} cases", cases.len());
    check_all(&cases, arch);
}

/// Columns that are no whole eights, an odd one, a K tile or less for a pair to share: strides are aligned all the same.
#[test]
fn few_tokens_match_the_oracle_at_ragged_edges() {
    let arch = arch::by_name("sm_90a").unwrap();
    let mut rng = SmallRng::seed_from_u64(13);
    let mut cases: Vec<(Problem, Config)> = Vec::new();
    for (op, m, n, k) in [
        (Op::Forward, 20, 259, 40),
        (Op::ForwardSave, 9, 133, 201),
        (Op::ForwardStatic, 1, 1, 1),
        (Op::ForwardStatic, 65, 70, 64),
    ] {
        let problem = Problem { alignment: 16, ..Problem::forward(DType::Bf16, WeightMajor::K, m, n, k).with_op(op) };
        let mut all = candidates(&problem, Target::Gpu(arch));
        all.retain(|config| config.family() == Family::WgmmaStream);
        let ways = ways(&all);
        assert_eq!(ways.len(), 6, "{problem:?}");
        for (index, this) in ways.into_iter().enumerate() {
            let Some(Config::WgmmaStream(config)) = one_of(&all, this, &mut rng) else { panic!("wgmma_stream") };
            // So few columns are one wave, of which the space has but one stagger.
            cases.push((problem, Config::WgmmaStream(WgmmaStreamConfig { stagger: 1 + index as u32 % 3, ..config })));
        }
    }
    check_all(&cases, arch);
}

/// A pair of CTAs, of which one has no rows, or no columns, or one of them; and columns that are no whole eights.
#[test]
fn a_cta_of_a_pair_that_lies_outside_changes_nothing() {
    let arch = arch::by_name("sm_90a").unwrap();
    let mut cases: Vec<(Problem, Config)> = Vec::new();
    for (major, (m, n)) in WeightMajor::ALL.into_iter().flat_map(|major| [(major, (100, 133)), (major, (129, 33))]) {
        let mut first = |dtype, is_wanted: &dyn Fn(&WgmmaTmaConfig) -> bool| {
            let problem = Problem { alignment: 16, ..Problem::forward(dtype, major, m, n, 200) };
            let all = candidates(&problem, Target::Gpu(arch));
            let found = all.iter().find(|config| matches!(config, Config::WgmmaTma(config) if is_wanted(config)));
            cases.push((problem, *found.unwrap()));
        };
        first(DType::Bf16, &|config| config.cluster_m == 2 && config.block_m == 128);
        first(DType::Bf16, &|config| config.cluster_n == 2 && config.block_n >= 64);
        first(DType::Bf16, &|config| config.cluster_m * config.cluster_n == 1 && config.block_m == 128);
        if major == WeightMajor::K {
            first(DType::E4m3, &|config| config.cluster_m == 2 && config.block_m == 128);
            first(DType::E4m3, &|config| config.cluster_n == 2 && config.block_m == 128);
        }
    }
    check_all(&cases, arch);
}

/// Each width of tile: what a warp holds of its columns' scales are runs of 32, the last of them in part.
#[test]
fn scales_of_columns_are_those_of_their_columns() {
    let arch = arch::by_name("sm_90a").unwrap();
    let problem = Problem { alignment: 16, ..Problem::forward(DType::E4m3, WeightMajor::K, 70, 150, 272) };
    let mut cases: BTreeMap<(u32, u32), (Problem, Config)> = BTreeMap::new();
    for config in candidates(&problem, Target::Gpu(arch)) {
        if let Config::WgmmaTma(tma) = config {
            cases.entry((tma.block_n, tma.consumers)).or_insert((problem, config));
        }
    }
    assert!(cases.len() >= 6, "{:?}", cases.keys());
    check_all(&cases.into_values().collect::<Vec<_>>(), arch);
}

/// Rows and columns of magnitudes far from 1, zeros, infinities and NaN: all as the formula says.
#[test]
fn fp32_in_parts_keeps_its_range_and_what_is_not_finite() {
    let arch = arch::by_name("sm_90a").unwrap();
    let tiles = [(64, 64), (128, 88), (192, 64)];
    for (major, tile) in WeightMajor::ALL.into_iter().flat_map(|major| tiles.map(|tile| (major, tile))) {
        let problem =
            Problem { alignment: 16, ..Problem::forward(DType::F32, major, 70, 150, 104).with_op(Op::ForwardSave) };
        let all = candidates(&problem, Target::Gpu(arch));
        let has_tile = |config: &&Config| matches!(config, Config::WgmmaTma(tma) if (tma.block_m, tma.block_n) == tile);
        let config = all.iter().find(has_tile).unwrap();
        let mut case = Case::new(problem, 5, 0.0);
        let (k, n) = (problem.k as usize, problem.n as usize);
        for row in 0..problem.m as usize {
            let scale = 2.0_f32.powi(if row % 3 == 1 { -60 } else { 20 * (row as i32 % 3) });
            for at in 0..k {
                let value = case.x.at(row * pitch(k) + at, 0) as f32 * scale;
                case.x.put(row * pitch(k) + at, if row == 6 { 0.0 } else { value });
            }
        }
        let place = |column: usize, at: usize| match major {
            WeightMajor::K => column * pitch(k) + at,
            WeightMajor::N => at * pitch(n) + column,
        };
        case.x.put(9 * pitch(k) + 3, f32::INFINITY);
        case.x.put(20 * pitch(k) + 103, f32::NAN);
        // In a tile's first run of 32 columns, its last one, the second tile, and the last column of all.
        case.weights[0].put(place(17, 40), f32::NEG_INFINITY);
        case.weights[1].put(place(tile.1 as usize - 2, 0), f32::NAN);
        case.weights[0].put(place(tile.1 as usize + 33, 9), f32::INFINITY);
        case.weights[1].put(place(n - 1, 0), f32::NAN);
        case.check(config, arch, problem.dtype.tolerance()).unwrap();
    }
}

/// A tile that is hardly begun, columns and tokens beyond the last, a last tile and a last group of a few numbers.
#[test]
fn weights_in_few_bits_by_tma_match_the_oracle_at_every_edge() {
    let arch = arch::by_name("sm_90a").unwrap();
    let mut rng = SmallRng::seed_from_u64(12);
    let mut cases: Vec<(Problem, Config)> = Vec::new();
    let formats = [(DType::Bf16E4m3, WeightMajor::K), (DType::Bf16Int4, WeightMajor::N)];
    for ((dtype, major), (m, n, k)) in
        formats.into_iter().flat_map(|format| [(1, 8, 16), (9, 232, 400), (37, 72, 144)].map(|size| (format, size)))
    {
        let problem = Problem::forward(dtype, major, m, n, k);
        let all = candidates(&problem, Target::Gpu(arch)).into_iter();
        let of_family: Vec<Config> = all.filter(|config| config.family() == Family::WeightOnlyTma).collect();
        for order_warps in [0, 1] {
            let this =
                |config: &&Config| matches!(config, Config::WeightOnlyTma(tma) if tma.order_warps == order_warps);
            let some: Vec<&Config> = of_family.iter().filter(this).collect();
            cases.extend(some.sample(&mut rng, 2).map(|&&config| (problem, config)));
        }
    }
    assert_eq!(cases.len(), 24);
    check_all(&cases, arch);
}

/// x far from 0: what raised pairs of int4 have on top is then many times what is left once it is taken off.
#[test]
fn raised_pairs_of_int4_cost_no_digits_that_count() {
    let arch = arch::by_name("sm_90a").unwrap();
    let problem = Problem::forward(DType::Bf16Int4, WeightMajor::N, 16, 64, 2048);
    let all = candidates(&problem, Target::Gpu(arch));
    let raised =
        |config: &&Config| matches!(config, Config::WeightOnlyTma(tma) if tma.order_warps == 1 && tma.block_m == 16);
    let config = all.iter().find(raised).unwrap();
    for shift in [2.0, -30.0] {
        Case::new(problem, 7, shift).check(config, arch, problem.dtype.tolerance()).unwrap();
    }
}

/// Positive numbers add up to a sum against which each product is small: what is cut off of it is lost, unless fp32 takes
/// over often enough. Without that the error here is 0.13, with it 0.009.
#[test]
fn long_sums_of_e4m3_are_taken_over_by_fp32() {
    let arch = arch::by_name("sm_90a").unwrap();
    let problem = Problem::forward(DType::E4m3, WeightMajor::K, 64, 16, 4096);
    let all = candidates(&problem, Target::Gpu(arch));
    let config = all.iter().min_by_key(|config| config.launch_shape(&problem).unwrap().block_n).unwrap();
    Case::new(problem, 3, 2.0).check(config, arch, 1.5e-2).unwrap();
}
