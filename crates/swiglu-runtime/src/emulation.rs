//! Kernels on a GPU in miniature: compiled for the CPU with the headers of `templates/shared/ptx` replaced, and held to
//! the oracle with the very arguments and boxes that a launch has. Not for speed: races and memory orders that only a
//! real GPU shows stay unseen.
//!
//! `emulation/machine.hpp` is the machine, `emulation/ptx/NAME.hpp` stands for `templates/shared/ptx/NAME.cuh`.
#![allow(unsafe_code, reason = "calls the compiled kernels")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use crate::launch::{KernelParams, RawForward};
use crate::operands::Element;
use crate::tensor_map::{self, BoxedMatrix};
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{SeedableRng, seq::IndexedRandom};
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use std::ffi::c_void;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use swiglu_kernels::families::{Config, Family, Schedule, Staging, Target, candidates};
use swiglu_kernels::{Activation, ArchSpec, DType, KernelSource, Op, Problem, WeightMajor, arch, oracle, render};

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
        let dtype = matrix.dtype;
        let int = |value: u32| i32::try_from(value).unwrap();
        Self {
            address: matrix.address,
            rows: i64::from(matrix.rows),
            cols: i64::from(matrix.cols),
            row_bytes: matrix.row_stride * i64::from(dtype.bytes()),
            box_rows: int(matrix.box_rows),
            box_cols: int(matrix.box_cols),
            element_bytes: int(dtype.bytes()),
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
            text += "wgmma_product<kDType, kTransposeA, kTransposeB>(d, a, b, accumulate); }\n";
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
    text + &format!(
        "extern \"C\" bool run(const void* const* arguments, unsigned grid, unsigned block, unsigned cluster, \
         unsigned long shared_bytes) {{\n\
         return machine::launch({}, arguments, grid, block, cluster, shared_bytes);\n}}\n",
        source.entry
    )
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

/// Random operands whose rows have gaps, so that strides count.
struct Case<T> {
    problem: Problem,
    x: Vec<T>,
    gate: Vec<T>,
    up: Vec<T>,
    biases: [Vec<T>; 2],
}

/// Elements between rows: the problem stays aligned to 16 bytes.
const GAP: usize = 8;

impl<T: Element> Case<T> {
    fn new(problem: Problem, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (m, n, k) = (problem.m as usize, problem.n as usize, problem.k as usize);
        let mut normal = |count: usize, scale: f32| -> Vec<T> {
            (0..count).map(|_| T::from_f32(scale * Distribution::<f32>::sample(&StandardNormal, &mut rng))).collect()
        };
        let rows = if problem.weight_major == WeightMajor::K { n * (k + GAP) } else { k * (n + GAP) };
        let scale = 1.0 / (k as f32).sqrt();
        let (x, gate, up) = (normal(m * (k + GAP), 1.0), normal(rows, scale), normal(rows, scale));
        Self { problem, x, gate, up, biases: [normal(n, 1.0), normal(n, 1.0)] }
    }

    fn sums(&self) -> Vec<(f64, f64)> {
        let (m, n, k) = (self.problem.m as usize, self.problem.n as usize, self.problem.k as usize);
        let wide = |value: T| f64::from(value.to_f32());
        let weight = |of: &[T], row: usize, col: usize| match self.problem.weight_major {
            WeightMajor::K => wide(of[row * (k + GAP) + col]),
            WeightMajor::N => wide(of[col * (n + GAP) + row]),
        };
        let all = |of: &[T]| (0..n * k).map(|i| weight(of, i / k, i % k)).collect::<Vec<_>>();
        let bias = |of: &[T]| of.iter().map(|&value| wide(value)).collect::<Vec<_>>();
        oracle::preactivations(&oracle::Forward {
            x: &(0..m * k).map(|i| wide(self.x[i / k * (k + GAP) + i % k])).collect::<Vec<_>>(),
            gate: &all(&self.gate),
            up: &all(&self.up),
            gate_bias: Some(&bias(&self.biases[0])),
            up_bias: Some(&bias(&self.biases[1])),
            k,
        })
    }

    /// Runs `config`; says what is wrong.
    fn check(&self, config: &Config, arch: &'static ArchSpec) -> Result<(), String> {
        let problem = &self.problem;
        let source = render::render(problem, config, arch).map_err(|error| error.to_string())?;
        let folder = tempfile::tempdir().unwrap();
        let library = compile(&source, folder.path());
        // SAFETY: `translate` gives every library this function.
        let run = unsafe { library.get::<Run>(b"run") }.unwrap();

        let (m, n, k) = (problem.m as usize, problem.n as usize, problem.k as usize);
        let poison = T::from_f32(f32::NAN);
        let mut outputs = [(); 3].map(|()| vec![poison; m * (n + GAP)]);
        let address = |of: &[T]| of.as_ptr() as u64;
        let weight_stride = if problem.weight_major == WeightMajor::K { k } else { n } + GAP;
        let [z, saved_gate, saved_up] = outputs.each_mut().map(|output| output.as_mut_ptr() as u64);
        let saves = problem.op.saves_preactivations();
        let args = RawForward {
            m: problem.m,
            x: address(&self.x),
            x_stride: (k + GAP) as i64,
            gate: address(&self.gate),
            gate_stride: weight_stride as i64,
            up: address(&self.up),
            up_stride: weight_stride as i64,
            gate_bias: address(&self.biases[0]),
            up_bias: address(&self.biases[1]),
            z,
            z_stride: (n + GAP) as i64,
            saved_gate: if saves { saved_gate } else { 0 },
            saved_gate_stride: (n + GAP) as i64,
            saved_up: if saves { saved_up } else { 0 },
            saved_up_stride: (n + GAP) as i64,
        };
        let shape = config.launch_shape(problem).unwrap();
        let maps: Vec<Map> = match config {
            Config::WgmmaTma(config) => {
                let saved = tensor_map::of_preactivations(config, problem, &args).into_iter().filter(|_| saves);
                tensor_map::of_wgmma_tma(config, problem, &args).into_iter().chain(saved).collect()
            }
            Config::MmaSync(config) if config.staging == Staging::Tma => {
                tensor_map::of_mma_sync(config, problem, &args).to_vec()
            }
            _ => Vec::new(),
        }
        .iter()
        .map(Map::new)
        .collect();
        let params = KernelParams::new(problem, shape.raster, shape.raster_group, &args).unwrap();
        // Both saved maps are one argument, an array.
        let mut arguments: Vec<*const c_void> = maps.iter().take(5).map(|map| std::ptr::from_ref(map).cast()).collect();
        arguments.push((&raw const params).cast());
        let tiles = problem.m.div_ceil(shape.block_m) * problem.n.div_ceil(shape.block_n);
        // Fewer than there are tiles, so that persistent kernels walk.
        let clusters = if shape.persistent { tiles.div_ceil(2) } else { tiles };
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
            let inside = (0..output.len()).filter(|i| i % (n + GAP) < n).map(|i| f64::from(output[i].to_f32()));
            let error = oracle::relative_error(inside, reference.iter().copied());
            if error.is_nan() || error > problem.dtype.tolerance() {
                return Err(format!("{name} has error {error:.2e}"));
            }
            if (0..output.len()).any(|i| i % (n + GAP) >= n && !output[i].to_f32().is_nan()) {
                return Err(format!("wrote between the rows of {name}"));
            }
        }
        Ok(())
    }
}

fn check(problem: Problem, config: &Config, arch: &'static ArchSpec) -> Result<(), String> {
    let result = match problem.dtype {
        DType::F32 | DType::Tf32 => Case::<f32>::new(problem, 5).check(config, arch),
        DType::F16 => Case::<f16>::new(problem, 5).check(config, arch),
        DType::Bf16 => Case::<bf16>::new(problem, 5).check(config, arch),
    };
    result.map_err(|why| format!("{problem:?} {config}: {why}"))
}

/// Whether two configs take different ways through their template.
fn way(config: &Config) -> (Family, Option<Staging>, Option<Schedule>, u32) {
    match config {
        Config::MmaSync(sync) => (Family::MmaSync, Some(sync.staging), None, 1),
        Config::WgmmaTma(tma) => (Family::WgmmaTma, None, Some(tma.schedule), tma.cluster_m + 2 * tma.cluster_n),
        Config::WgmmaGemm(gemm) => (Family::WgmmaGemm, None, Some(gemm.schedule), gemm.cluster_m + 2 * gemm.cluster_n),
        _ => (config.family(), None, None, 1),
    }
}

#[test]
fn every_way_through_every_template_matches_the_oracle() {
    let arch = arch::by_name("sm_90a").unwrap();
    let mut rng = SmallRng::seed_from_u64(11);
    let mut cases: Vec<(Problem, Config)> = Vec::new();
    for (index, dtype) in DType::ALL.into_iter().enumerate() {
        for major in WeightMajor::ALL {
            // Ragged against every tile, and more than one tile of most.
            let problem = Problem::forward(dtype, major, 150, 136, 200);
            let op = if (index % 2 == 0) == (major == WeightMajor::K) { Op::ForwardSave } else { Op::Forward };
            let problem = problem.with_op(op);
            let all = candidates(&problem, Target::Gpu(arch));
            let mut ways: Vec<_> = all.iter().map(way).collect();
            ways.sort_unstable();
            ways.dedup();
            for this in ways {
                let of_this: Vec<&Config> = all.iter().filter(|config| way(config) == this).collect();
                cases.extend(of_this.choose(&mut rng).map(|config| (problem, **config)));
            }
        }
    }
    assert!(cases.len() > 20, "{} cases", cases.len());
    let wrong: Vec<String> =
        cases.par_iter().filter_map(|(problem, config)| check(*problem, config, arch).err()).collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}
