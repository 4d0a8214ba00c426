//! The steps beside the fused forward, emulated.

use super::{GAP, Map, Run, compile, one_of, run_split, ways};
use crate::operands::Element;
use crate::split::Split;
use crate::step::{RawMatrix, RawStep, StepParams};
use crate::tensor_map;
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{SeedableRng, seq::IndexedRandom};
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ffi::c_void;
use swiglu_kernels::families::{Config, Family, Schedule, Target, candidates};
use swiglu_kernels::problem::OperandMajor;
use swiglu_kernels::{ArchSpec, DType, Op, Problem, WeightMajor, arch, oracle, render};

/// A matrix whose rows have gaps, so that strides count.
struct Strided<T> {
    data: Vec<T>,
    cols: usize,
}

impl<T: Element> Strided<T> {
    fn new((rows, cols): (usize, usize), mut value: impl FnMut() -> f32) -> Self {
        Self { data: (0..rows * (cols + GAP)).map(|_| T::from_f32(value())).collect(), cols }
    }

    fn wide(&self) -> Vec<Vec<f64>> {
        self.data
            .chunks(self.cols + GAP)
            .map(|row| row.iter().map(|value| f64::from(value.to_f32())).collect())
            .collect()
    }

    fn raw(&self) -> RawMatrix {
        RawMatrix { address: self.data.as_ptr() as u64, stride: (self.cols + GAP) as i64 }
    }

    fn inside(&self) -> impl Iterator<Item = f64> {
        (0..self.data.len()).filter(|i| i % (self.cols + GAP) < self.cols).map(|i| f64::from(self.data[i].to_f32()))
    }

    fn gaps(&self) -> impl Iterator<Item = f32> {
        (0..self.data.len()).filter(|i| i % (self.cols + GAP) >= self.cols).map(|i| self.data[i].to_f32())
    }
}

/// Random operands of a step.
struct StepCase<T> {
    problem: Problem,
    left: Vec<Strided<T>>,
    right: Vec<Strided<T>>,
    saved: Vec<Strided<T>>,
    bias: Option<Vec<T>>,
    with_z: bool,
    clusters: Clusters,
    /// The boxes of narrower tiles hold NaN.
    is_narrow_nan: bool,
}

/// Clusters of a persistent kernel, of as many tiles.
type Clusters = fn(&Config, u32) -> u32;

/// What an fp32 output holds before it is added to.
const BEFORE: f32 = 0.25;

impl<T: Element> StepCase<T> {
    fn new(problem: Problem, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut normal = |scale: f32| scale * Distribution::<f32>::sample(&StandardNormal, &mut rng);
        let (rows, cols) = problem.output();
        let mut several = |count: usize, (rows, cols): (u32, u32), scale: f32| -> Vec<Strided<T>> {
            (0..count).map(|_| Strided::new((rows as usize, cols as usize), || normal(scale))).collect()
        };
        let (left, right) = match problem.product() {
            Some(product) => {
                let (left, right) = problem.operands();
                let scale = 1.0 / (product.depth as f32).sqrt();
                (several(left, product.left_shape(), 1.0), several(right, product.right_shape(), scale))
            }
            None => (several(1, (rows, cols), 1.0), Vec::new()),
        };
        let saved = several(2, (rows, cols), 1.5);
        let bias = problem.op.is_down().then(|| (0..cols).map(|_| T::from_f32(normal(1.0))).collect());
        Self {
            problem,
            left,
            right,
            saved,
            bias,
            with_z: seed.is_multiple_of(2),
            clusters: thirds,
            is_narrow_nan: false,
        }
    }

    /// The outputs in float64.
    fn references(&self) -> Vec<Vec<f64>> {
        let entry = |of: &[Strided<T>], index: usize| {
            let wide = of.get(index).map(Strided::wide).unwrap_or_default();
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

    /// Runs `config`; says what is wrong.
    fn check(&self, config: &Config, arch: &'static ArchSpec) -> Result<(), String> {
        if self.problem.op.accumulates() {
            self.check_as::<f32>(config, arch)
        } else {
            self.check_as::<T>(config, arch)
        }
    }

    fn check_as<O: Element>(&self, config: &Config, arch: &'static ArchSpec) -> Result<(), String> {
        let problem = &self.problem;
        let source = render::render(problem, config, arch).map_err(|error| error.to_string())?;
        let folder = tempfile::tempdir().unwrap();
        let library = compile(&source, folder.path());
        // SAFETY: `translate` gives every library this function.
        let run = unsafe { library.get::<Run>(b"run") }.unwrap();

        let (rows, cols) = problem.output();
        let before = if problem.op.accumulates() { BEFORE } else { f32::NAN };
        let outputs = [(); 3].map(|()| Strided::<O>::new((rows as usize, cols as usize), || before));
        let raw = |of: &[Strided<T>]| [0, 1].map(|i| of.get(i).map_or(RawMatrix::default(), Strided::raw));
        let mut out = outputs.each_ref().map(Strided::raw);
        let references = self.references();
        for (index, out) in out.iter_mut().enumerate() {
            if index >= references.len() || index == 2 && !self.with_z {
                *out = RawMatrix::default();
            }
        }
        let args = RawStep {
            m: problem.m,
            left: raw(&self.left),
            right: raw(&self.right),
            saved: raw(&self.saved),
            out,
            bias: self.bias.as_ref().map_or(0, |bias| bias.as_ptr() as u64),
        };
        let shape = config.launch_shape(problem).unwrap();
        let with_memory =
            source.prologue.map(|_| run_split(&library, Split::of_step(&problem.product().unwrap(), &args)));
        let split = with_memory.as_ref().map(|(split, _)| *split);
        let scales = split.map(|split| split.scales());
        let nan = self.is_narrow_nan.then(|| {
            let (rows, cols) = problem.product().unwrap().right_shape();
            Strided::<T>::new((rows as usize, cols as usize), || f32::NAN)
        });
        let maps: Vec<Map> = match config {
            Config::WgmmaGemm(config) => {
                let product = problem.product().unwrap();
                let (product, parts) = split.map_or((product, args), |split| split.step(&product, &args));
                let mut boxes = tensor_map::of_wgmma_gemm(config, problem, &product, &parts);
                if let Some(nan) = &nan {
                    boxes[5].address = nan.raw().address;
                    boxes[7].address = nan.raw().address;
                }
                boxes.iter().map(Map::new).collect()
            }
            _ => Vec::new(),
        };
        let params = StepParams::new(problem, shape.raster, shape.raster_group, &args).unwrap();
        let mut arguments: Vec<*const c_void> = Vec::new();
        if !maps.is_empty() {
            arguments.push(maps.as_ptr().cast());
        }
        arguments.extend(scales.iter().map(|scales| std::ptr::from_ref(scales).cast()));
        arguments.push((&raw const params).cast());
        let tiles = u32::try_from(shape.tiles(problem)).unwrap();
        let clusters = if shape.per_sm.is_some() { (self.clusters)(config, tiles) } else { tiles };
        let (grid, bytes) = (clusters * shape.cluster, u64::from(shape.smem_bytes));
        // SAFETY: the arguments are the kernel's, in its order, and alive; the operands hold the problem.
        let done = unsafe { run(arguments.as_ptr(), grid, shape.threads, shape.cluster, bytes) };
        if !done {
            return Err("its threads wait for each other for ever".into());
        }

        for (index, (output, reference)) in outputs.iter().zip(&references).enumerate() {
            if out[index].address == 0 {
                if output.inside().any(|value| !value.is_nan()) {
                    return Err(format!("wrote output {index}, which was not asked for"));
                }
                continue;
            }
            let error = oracle::relative_error(output.inside(), reference.iter().copied());
            if error.is_nan() || error > problem.dtype.tolerance() {
                return Err(format!("output {index} has error {error:.2e}"));
            }
            if output.gaps().any(|value| value.to_bits() != O::from_f32(before).to_f32().to_bits()) {
                return Err(format!("wrote between the rows of output {index}"));
            }
        }
        Ok(())
    }
}

/// Fewer than there are tiles, so that persistent kernels walk.
fn thirds(_: &Config, tiles: u32) -> u32 {
    tiles.div_ceil(3)
}

/// The fewest clusters that leave of `tiles` a last wave which is cut up.
fn cut_wave(config: &Config, tiles: u32) -> Option<u32> {
    let Config::WgmmaGemm(gemm) = config else { return None };
    (1..tiles).find(|&clusters| gemm.cuts(tiles.into(), clusters.into()))
}

fn check(
    problem: Problem,
    config: &Config,
    arch: &'static ArchSpec,
    seed: u64,
    clusters: Clusters,
) -> Result<(), String> {
    let result = match problem.dtype {
        DType::F32 | DType::Tf32 => StepCase::<f32> { clusters, ..StepCase::new(problem, seed) }.check(config, arch),
        DType::F16 => StepCase::<f16> { clusters, ..StepCase::new(problem, seed) }.check(config, arch),
        DType::Bf16 => StepCase::<bf16> { clusters, ..StepCase::new(problem, seed) }.check(config, arch),
        scaled => Err(format!("no step takes {scaled}")),
    };
    result.map_err(|why| format!("{problem:?} {config}: {why}"))
}

#[test]
fn every_way_through_every_step_matches_the_oracle() {
    let arch = arch::by_name("sm_90a").unwrap();
    let mut rng = SmallRng::seed_from_u64(12);
    let mut cases: Vec<(Problem, Config)> = Vec::new();
    let ops = Op::ALL.into_iter().filter(|op| !op.is_forward());
    for (index, op) in ops.enumerate() {
        for (order, major) in WeightMajor::ALL.into_iter().enumerate() {
            for dtype in DType::ALL {
                // Ragged against every tile, and more than one tile of most.
                let problem = Problem::forward(dtype, major, 150, 200, 136).with_op(op);
                // Both 16-bit formats take the same ways.
                if dtype == [DType::F16, DType::Bf16][(index + order) % 2] {
                    continue;
                }
                for problem in [problem, Problem { alignment: dtype.bytes(), ..problem }] {
                    let mut all = candidates(&problem, Target::Gpu(arch));
                    all.retain(|config| config.family().has_source());
                    // Every op takes the same ways through the main loop: a few of them each.
                    for this in ways(&all).sample(&mut rng, 3) {
                        cases.extend(one_of(&all, *this, &mut rng).map(|config| (problem, config)));
                    }
                }
            }
        }
    }
    assert!(cases.len() > 50, "{} cases", cases.len());
    check_all(&cases, arch);
}

/// On the oldest architecture that has it: every op, order and format, wide and narrow accesses.
#[test]
fn every_order_and_format_of_mma_gemm_matches_the_oracle() {
    let arch = arch::by_name("sm_80").unwrap();
    let mut rng = SmallRng::seed_from_u64(13);
    let mut cases: Vec<(Problem, Config)> = Vec::new();
    for (index, op) in Op::PRODUCTS.into_iter().enumerate() {
        for (order, major) in WeightMajor::ALL.into_iter().enumerate() {
            let half = [DType::F16, DType::Bf16][(index + order) % 2];
            for (dtype, alignment) in [(half, 16), (half, [2, 4, 8][index % 3]), (DType::Tf32, 16), (DType::Tf32, 4)] {
                // Depths beside whole steps, and of whole steps: the loop without edges.
                let k = if index % 2 == 0 { 136 } else { 192 };
                let problem = Problem { alignment, ..Problem::forward(dtype, major, 150, 200, k).with_op(op) };
                let all = candidates(&problem, Target::Gpu(arch));
                let of_family: Vec<&Config> = all.iter().filter(|config| config.family() == Family::MmaGemm).collect();
                cases.extend(of_family.choose(&mut rng).map(|config| (problem, **config)));
            }
        }
    }
    assert!(cases.len() > 50, "{} cases", cases.len());
    check_all(&cases, arch);
}

/// Every product that has parts, in both orders.
#[test]
fn fp32_steps_in_parts_match_the_oracle() {
    let arch = arch::by_name("sm_90a").unwrap();
    let mut rng = SmallRng::seed_from_u64(16);
    let mut cases: Vec<(Problem, Config)> = Vec::new();
    for (op, major) in Op::PRODUCTS.into_iter().flat_map(|op| WeightMajor::ALL.map(|major| (op, major))) {
        let problem = Problem::forward(DType::F32, major, 148, 200, 136).with_op(op);
        let all = candidates(&problem, Target::Gpu(arch));
        let of_family: Vec<&Config> = all.iter().filter(|config| config.family() == Family::WgmmaGemm).collect();
        cases.extend(of_family.choose(&mut rng).map(|config| (problem, **config)));
    }
    assert_eq!(cases.len(), 2 * (Op::PRODUCTS.len() - 1), "all but dgated");
    check_all(&cases, arch);
}

/// Lines of magnitudes far from 1, infinities and NaN, in every pairing, stored and added.
#[test]
fn fp32_steps_in_parts_keep_their_range_and_what_is_not_finite() {
    let arch = arch::by_name("sm_90a").unwrap();
    for op in [Op::Down, Op::InputGrad, Op::WeightGrad, Op::WeightGradAdd] {
        for major in WeightMajor::ALL {
            let problem = Problem::forward(DType::F32, major, 52, 72, 40).with_op(op);
            let product = problem.product().unwrap();
            let all = candidates(&problem, Target::Gpu(arch));
            let config = all.iter().find(|config| config.family() == Family::WgmmaGemm).unwrap();
            let mut case = StepCase::<f32>::new(problem, 6);
            // Number `depth` of line `line` of one matrix.
            let place = |major: OperandMajor, cols: usize, line: usize, depth: usize| match major {
                OperandMajor::Depth => line * (cols + GAP) + depth,
                OperandMajor::Outer => depth * (cols + GAP) + line,
            };
            for (number, line) in [(f32::INFINITY, 3), (f32::NAN, 30)] {
                for matrix in &mut case.left {
                    let at = place(product.left, matrix.cols, line, 7);
                    matrix.data[at] = number;
                }
            }
            let last = case.right.last_mut().unwrap();
            let at = place(product.right, last.cols, 5, 20);
            last.data[at] = f32::NEG_INFINITY;
            for depth in 0..product.depth as usize {
                for matrix in &mut case.left {
                    let at = place(product.left, matrix.cols, 11, depth);
                    matrix.data[at] *= 2.0_f32.powi(-60);
                }
            }
            case.check(config, arch).unwrap_or_else(|why| panic!("{problem:?}: {why}"));
        }
    }
}

#[test]
fn sums_of_columns_match_the_oracle() {
    let arch = arch::by_name("sm_90a").unwrap();
    let mut rng = SmallRng::seed_from_u64(14);
    let mut cases: Vec<(Problem, Config)> = Vec::new();
    for op in Op::ALL.into_iter().filter(|op| op.is_column_sum()) {
        for (dtype, alignment) in [(DType::Bf16, 16), (DType::F16, 2), (DType::F32, 16), (DType::F32, 4)] {
            // Odd sizes need narrow accesses.
            let odd = u32::from(alignment < 16);
            let sizes = Problem::forward(dtype, WeightMajor::K, 150, 200 + odd, 136 + odd);
            let problem = Problem { alignment, ..sizes.with_op(op) };
            let all = candidates(&problem, Target::Gpu(arch));
            cases.extend(all.sample(&mut rng, 2).map(|config| (problem, *config)));
        }
    }
    check_all(&cases, arch);
}

/// Every way through the tiles for few tokens, of fewer rows than a product has and of more tokens than a tile: sums that
/// share out evenly, and not.
#[test]
fn the_down_projection_of_few_tokens_matches_the_oracle() {
    let arch = arch::by_name("sm_90a").unwrap();
    let mut rng = SmallRng::seed_from_u64(15);
    let mut cases: Vec<(Problem, Config)> = Vec::new();
    for (dtype, major) in [(DType::Bf16, WeightMajor::K), (DType::F16, WeightMajor::N)] {
        // Of static weights also more steps than stages.
        for (op, m, n) in
            [(Op::Down, 5, 328), (Op::Down, 70, 136), (Op::DownStatic, 5, 1672), (Op::DownStatic, 70, 136)]
        {
            let problem = Problem::forward(dtype, major, m, n, 264).with_op(op);
            let mut all = candidates(&problem, Target::Gpu(arch));
            all.retain(|config| matches!(config, Config::WgmmaGemm(gemm) if gemm.consumers == 1));
            for this in ways(&all) {
                cases.extend(one_of(&all, this, &mut rng).map(|config| (problem, config)));
            }
        }
    }
    assert!(cases.len() > 20, "{} cases", cases.len());
    check_all(&cases, arch);
}

/// In every op and order: sums that two CTAs share out evenly, and not, of more tiles than pairs.
#[test]
fn sums_that_two_ctas_share_out_match_the_oracle() {
    let arch = arch::by_name("sm_90a").unwrap();
    let mut rng = SmallRng::seed_from_u64(17);
    let mut cases: Vec<(Problem, Config)> = Vec::new();
    for (index, op) in Op::PRODUCTS.into_iter().filter(|op| *op != Op::Dgated).enumerate() {
        for (order, major) in WeightMajor::ALL.into_iter().enumerate() {
            let dtype = [DType::F16, DType::Bf16][(index + order) % 2];
            let problem = Problem::forward(dtype, major, 300, 400, 264).with_op(op);
            let mut all = candidates(&problem, Target::Gpu(arch));
            all.retain(|it| matches!(it, Config::WgmmaGemm(gemm) if gemm.consumers == 2 && gemm.cluster_k == 2));
            cases.extend(all.sample(&mut rng, 1).map(|config| (problem, *config)));
        }
    }
    assert_eq!(cases.len(), 2 * (Op::PRODUCTS.len() - 1));
    check_all(&cases, arch);
}

/// Contiguous columns of the right operand whose number 64 does not divide, shared by a pair and not.
#[test]
fn columns_in_boxes_of_32_match_the_oracle() {
    let arch = arch::by_name("sm_90a").unwrap();
    let mut rng = SmallRng::seed_from_u64(16);
    let mut cases: Vec<(Problem, Config)> = Vec::new();
    for op in [Op::Dgated, Op::WeightGradAdd] {
        let problem = Problem::forward(DType::Bf16, WeightMajor::K, 150, 200, 136).with_op(op);
        for cluster_m in [1, 2] {
            let mut all = candidates(&problem, Target::Gpu(arch));
            all.retain(|config| match config {
                Config::WgmmaGemm(gemm) => gemm.block_n % 64 == 32 && gemm.cluster_m == cluster_m,
                _ => false,
            });
            cases.extend(all.sample(&mut rng, 1).map(|config| (problem, *config)));
        }
    }
    assert_eq!(cases.len(), 4);
    check_all(&cases, arch);
}

/// In every op and order, shared by a pair and not: narrower tiles behind whole ones, some of them half or wholly outside.
#[test]
fn a_last_wave_that_is_cut_up_matches_the_oracle() {
    let arch = arch::by_name("sm_90a").unwrap();
    let mut rng = SmallRng::seed_from_u64(18);
    let mut cases: Vec<(Problem, Config)> = Vec::new();
    for (index, op) in Op::PRODUCTS.into_iter().enumerate() {
        for (order, major) in WeightMajor::ALL.into_iter().enumerate() {
            let dtype = [DType::F16, DType::Bf16][(index + order) % 2];
            let problem = Problem::forward(dtype, major, 264, 456, 392).with_op(op);
            for cluster in [(1, 1), (2, 1), (1, 2)] {
                let mut all = candidates(&problem, Target::Gpu(arch));
                all.retain(|config| match config {
                    Config::WgmmaGemm(gemm) => {
                        let tiles = config.launch_shape(&problem).unwrap().tiles(&problem) as u32;
                        (gemm.cluster_m, gemm.cluster_n) == cluster && cut_wave(config, tiles).is_some()
                    }
                    _ => false,
                });
                assert!(!all.is_empty(), "{problem:?} {cluster:?}");
                cases.extend(all.sample(&mut rng, 1).map(|config| (problem, *config)));
            }
        }
    }
    check_all_on(&cases, arch, |config, tiles| cut_wave(config, tiles).unwrap());
}

/// Where the columns are whole tiles, only narrower ones load by the tails' maps, so NaN there shows who is cut up. Five tiles are
/// on four clusters; not on two, where the last one's three parts are too many; nor on fifteen, where they are the first wave.
#[test]
fn a_last_wave_is_cut_up_where_its_parts_are_no_more_than_the_clusters() {
    let arch = arch::by_name("sm_90a").unwrap();
    for (major, schedule) in [(WeightMajor::K, Schedule::Cooperative), (WeightMajor::N, Schedule::Pingpong)] {
        let problem = Problem::forward(DType::Bf16, major, 100, 72, 960).with_op(Op::Down);
        let all = candidates(&problem, Target::Gpu(arch));
        let is_it = |config: &&Config| match config {
            Config::WgmmaGemm(it) => {
                (it.schedule, it.block_n, it.tail_n, it.cluster_m * it.cluster_n) == (schedule, 192, 64, 1)
            }
            _ => false,
        };
        let config = all.iter().find(is_it).unwrap();
        let on: [Clusters; 3] = [|_, _| 4, |_, _| 2, |_, _| 15];
        for (clusters, is_cut) in on.into_iter().zip([true, false, false]) {
            let case = StepCase::<bf16> { clusters, ..StepCase::new(problem, 19) };
            case.check(config, arch).unwrap_or_else(|why| panic!("{config}: {why}"));
            let spoilt = StepCase { is_narrow_nan: true, ..case };
            assert_eq!(spoilt.check(config, arch).is_err(), is_cut, "{config} on {}", clusters(config, 5));
        }
    }
}

/// Sums of one step: a warpgroup comes to its epilogue while the other, whose slots it shares, is still in its own.
#[test]
fn slots_pass_between_warpgroups_that_take_turns() {
    let arch = arch::by_name("sm_90a").unwrap();
    let problem = Problem::forward(DType::Bf16, WeightMajor::K, 150, 400, 16).with_op(Op::Dgated);
    let mut cases: BTreeMap<(u32, u32, u32), (Problem, Config)> = BTreeMap::new();
    for config in candidates(&problem, Target::Gpu(arch)) {
        if let Config::WgmmaGemm(gemm) = config
            && gemm.schedule == Schedule::Pingpong
            && gemm.block_n <= 128
            && gemm.cluster_m * gemm.cluster_n == 1
        {
            cases.entry((gemm.block_m, gemm.block_n, gemm.store_buffers)).or_insert((problem, config));
        }
    }
    assert!(cases.len() >= 4, "{:?}", cases.keys());
    check_all(&cases.into_values().collect::<Vec<_>>(), arch);
}

fn check_all(cases: &[(Problem, Config)], arch: &'static ArchSpec) {
    check_all_on(cases, arch, thirds);
}

fn check_all_on(cases: &[(Problem, Config)], arch: &'static ArchSpec, clusters: Clusters) {
    let wrong: Vec<String> = cases
        .par_iter()
        .enumerate()
        .filter_map(|(seed, (problem, config))| check(*problem, config, arch, seed as u64, clusters).err())
        .collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}
