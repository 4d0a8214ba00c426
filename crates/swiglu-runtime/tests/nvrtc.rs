//! Kernels through NVRTC for every architecture, without a GPU. A missing NVRTC fails these tests.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use rand::rngs::SmallRng;
use rand::{SeedableRng, seq::IndexedRandom};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use swiglu_kernels::arch::ARCHES;
use swiglu_kernels::families::{Family, Target, candidates, default_of};
use swiglu_kernels::{ArchSpec, Config, DType, Format, KernelSource, Op, Problem, WeightMajor, arch, render};
use swiglu_runtime::Options;
use swiglu_runtime::cubin_cache::CubinCache;
use swiglu_runtime::nvrtc::{CompileError, Nvrtc, Resources, SPILL_BUDGET_BYTES};

fn nvrtc() -> Nvrtc {
    Nvrtc::load(Options::from_env().nvrtc.as_deref()).unwrap_or_else(|error| panic!("{error}; or run scripts/test"))
}

/// Every known architecture, less what this NVRTC has dropped or does not know yet.
fn arches(nvrtc: &Nvrtc) -> Vec<&'static ArchSpec> {
    let known: Vec<_> = ARCHES.iter().filter(|arch| nvrtc.check_arch(arch).is_ok()).collect();
    assert!(THOROUGH.iter().all(|name| known.iter().any(|arch| arch.name == *name)), "{known:?}");
    known
}

/// Architectures for which more is compiled than defaults: one of each that differs in what its kernels may use.
const THOROUGH: [&str; 6] = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_120"];

/// What the worst legal config spills (docs/compile-all.md); the tuner drops such a config, a default may not be one.
const RECORDED_SPILL_BYTES: u32 = 96;

/// The default, the extreme and a sampled config of every family, number format, weight order and architecture of [`THOROUGH`],
/// for aligned and for misaligned operands.
#[test]
fn every_family_compiles_within_the_recorded_spills() {
    let nvrtc = nvrtc();
    let mut rng = SmallRng::seed_from_u64(1);
    let mut jobs: BTreeMap<(&str, String), (&'static ArchSpec, String, KernelSource, u32)> = BTreeMap::new();
    for name in THOROUGH {
        let arch = arch::by_name(name).unwrap();
        for dtype in DType::ALL {
            for major in WeightMajor::ALL {
                let aligned = Problem::forward(dtype, major, 2048, 14336, 4096);
                let misaligned = Problem { alignment: dtype.bytes(), ..aligned };
                let ops = [Op::ForwardSave, Op::ForwardStatic].map(|op| aligned.with_op(op));
                // Of short sums e4m3 has another default.
                let short = (dtype == DType::E4m3).then_some(Problem { k: 2048, ..aligned });
                for problem in [aligned, misaligned].into_iter().chain(ops).chain(short) {
                    let legal = candidates(&problem, Target::Gpu(arch));
                    for family in Family::GPU {
                        let of_family: Vec<_> = legal.iter().filter(|config| config.family() == family).collect();
                        let default = default_of(family, &problem, arch).map(|config| (config, SPILL_BUDGET_BYTES));
                        let others = of_family.last().into_iter().chain(of_family.choose(&mut rng));
                        // What is saved changes the epilogue only.
                        let others = others.filter(|_| !problem.op.saves_preactivations());
                        let others = others.map(|&&config| (config, RECORDED_SPILL_BYTES));
                        for (config, spill_limit) in others.chain(default.ok()) {
                            let source = render::render(&problem, &config, arch).unwrap();
                            let what = format!("{name} {dtype} {major} {config}");
                            jobs.insert((arch.name, source.digest.clone()), (arch, what, source, spill_limit));
                        }
                    }
                }
            }
        }
    }
    assert!(jobs.len() > 200, "{} kernels", jobs.len());
    let broken: Vec<String> = jobs
        .into_par_iter()
        .filter_map(|(_, (arch, what, source, spill_limit))| {
            match nvrtc.compile(&source, arch).map(|it| it.resources) {
                Ok(Resources { registers: 0, .. }) => Some(format!("{what}: no resource report")),
                Ok(Resources { wgmma_serialized: true, .. }) => Some(format!("{what}: ptxas serialised wgmma")),
                Ok(Resources { spill_bytes, .. }) => {
                    (spill_bytes > spill_limit).then(|| format!("{what}: {spill_bytes} bytes spilled"))
                }
                Err(error) => Some(format!("{what}: {error}")),
            }
        })
        .collect();
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// On the architectures that the test above leaves out: the default of every family for the forward in every number format,
/// and for every step in bf16.
#[test]
fn every_default_compiles_for_the_other_architectures() {
    let nvrtc = nvrtc();
    let mut jobs: BTreeMap<(&str, String), (&'static ArchSpec, String, KernelSource)> = BTreeMap::new();
    let mut families = BTreeSet::new();
    for arch in arches(&nvrtc).into_iter().filter(|arch| !THOROUGH.contains(&arch.name)) {
        let forwards = DType::ALL.map(|dtype| (dtype, Op::Forward)).into_iter();
        let steps = Op::ALL.into_iter().filter(|op| !op.is_forward()).map(|op| (DType::Bf16, op));
        for (dtype, op) in forwards.chain(steps) {
            let major = if dtype.weights() == Format::Int4 { WeightMajor::N } else { WeightMajor::K };
            let problem = Problem::forward(dtype, major, 16, 14336, 4096).with_op(op);
            for config in Family::GPU.into_iter().filter_map(|family| default_of(family, &problem, arch).ok()) {
                families.insert((arch.name, config.family()));
                let source = render::render(&problem, &config, arch).unwrap();
                let what = format!("{arch} {op} {dtype} {config}");
                jobs.insert((arch.name, source.digest.clone()), (arch, what, source));
            }
        }
    }
    for name in ["sm_100a", "sm_103a"].into_iter().filter(|name| nvrtc.check_arch(arch::by_name(name).unwrap()).is_ok())
    {
        assert!(families.contains(&(name, Family::WeightOnlyTma)), "{name}");
    }
    let broken: Vec<String> = jobs
        .into_par_iter()
        .filter_map(|(_, (arch, what, source))| match nvrtc.compile(&source, arch).map(|it| it.resources) {
            Ok(resources) => resources.objection().map(|objection| format!("{what}: {objection}")),
            Err(error) => Some(format!("{what}: {error}")),
        })
        .collect();
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// The default and a sampled config of every family for every step.
#[test]
fn every_step_compiles_within_the_budget() {
    let nvrtc = nvrtc();
    let mut rng = SmallRng::seed_from_u64(2);
    let mut jobs: Vec<(&'static ArchSpec, String, KernelSource)> = Vec::new();
    for (name, dtype) in [("sm_75", DType::F16), ("sm_80", DType::F32), ("sm_90a", DType::Bf16)] {
        let arch = arch::by_name(name).unwrap();
        for op in Op::ALL.into_iter().filter(|op| !op.is_forward()) {
            for major in WeightMajor::ALL {
                let aligned = Problem::forward(dtype, major, 2048, 14336, 4096).with_op(op);
                for problem in [aligned, Problem { alignment: dtype.bytes(), ..aligned }] {
                    let legal = candidates(&problem, Target::Gpu(arch));
                    for family in Family::GPU {
                        let of_family: Vec<_> = legal.iter().filter(|config| config.family() == family).collect();
                        let sampled = of_family.choose(&mut rng).map(|&&config| config);
                        for config in default_of(family, &problem, arch).into_iter().chain(sampled) {
                            let source = render::render(&problem, &config, arch).unwrap();
                            jobs.push((arch, format!("{name} {op} {dtype} {major} {config}"), source));
                        }
                    }
                }
            }
        }
    }
    assert!(jobs.len() > 100, "{} kernels", jobs.len());
    let broken: Vec<String> = jobs
        .into_par_iter()
        .filter_map(|(arch, what, source)| match nvrtc.compile(&source, arch).map(|it| it.resources) {
            Ok(resources) => resources.objection().map(|objection| format!("{what}: {objection}")),
            Err(error) => Some(format!("{what}: {error}")),
        })
        .collect();
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// A sampled config of every step and order on every architecture that has tensor cores of this kind.
#[test]
fn mma_gemm_compiles_for_every_architecture_within_the_budget() {
    let nvrtc = nvrtc();
    let mut rng = SmallRng::seed_from_u64(3);
    let mut jobs: Vec<(&'static ArchSpec, String, KernelSource)> = Vec::new();
    let places = [
        ("sm_80", DType::Bf16),
        ("sm_86", DType::Tf32),
        ("sm_89", DType::F16),
        ("sm_90a", DType::Tf32),
        ("sm_100a", DType::F16),
        ("sm_120", DType::Bf16),
    ];
    for (name, dtype) in places {
        let arch = arch::by_name(name).unwrap();
        for (op, major) in Op::PRODUCTS.into_iter().flat_map(|op| WeightMajor::ALL.map(|major| (op, major))) {
            let aligned = Problem::forward(dtype, major, 2048, 14336, 4096).with_op(op);
            for problem in [aligned, Problem { alignment: 4, ..aligned }] {
                let legal = candidates(&problem, Target::Gpu(arch));
                let of_family: Vec<_> = legal.iter().filter(|config| config.family() == Family::MmaGemm).collect();
                let &&config = of_family.choose(&mut rng).unwrap();
                let source = render::render(&problem, &config, arch).unwrap();
                jobs.push((arch, format!("{name} {op} {dtype} {major} {config}"), source));
            }
        }
    }
    let broken: Vec<String> = jobs
        .into_par_iter()
        .filter_map(|(arch, what, source)| match nvrtc.compile(&source, arch).map(|it| it.resources) {
            Ok(resources) => resources.objection().map(|objection| format!("{what}: {objection}")),
            Err(error) => Some(format!("{what}: {error}")),
        })
        .collect();
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// A sample of the tiles for few tokens: registers decide whether two fit on a multiprocessor, so none may spill at all.
#[test]
fn the_down_projections_tiles_of_few_tokens_spill_nothing() {
    let nvrtc = nvrtc();
    let arch = arch::by_name("sm_90a").unwrap();
    let mut rng = SmallRng::seed_from_u64(4);
    let cases = [
        (DType::Bf16, WeightMajor::K, Op::Down),
        (DType::F16, WeightMajor::N, Op::Down),
        (DType::Bf16, WeightMajor::K, Op::DownStatic),
    ];
    for (dtype, major, op) in cases {
        let problem = Problem::forward(dtype, major, 16, 14336, 4096).with_op(op);
        let mut all = candidates(&problem, Target::Gpu(arch));
        all.retain(|config| matches!(config, Config::WgmmaGemm(gemm) if gemm.consumers == 1));
        assert!(all.len() > 30, "{major}: {}", all.len());
        for config in all.sample(&mut rng, 8) {
            let source = render::render(&problem, config, arch).unwrap();
            let resources = nvrtc.compile(&source, arch).unwrap().resources;
            let bad = (resources.spill_bytes, resources.stack_bytes, resources.wgmma_serialized);
            assert_eq!(bad, (0, 0, false), "{major} {config}");
        }
    }
}

/// The same of the forward's, those with the most sums a thread.
#[test]
fn the_forwards_tiles_of_few_tokens_spill_nothing() {
    let nvrtc = nvrtc();
    let arch = arch::by_name("sm_90a").unwrap();
    for (dtype, op) in [(DType::Bf16, Op::ForwardSave), (DType::F16, Op::Forward), (DType::Bf16, Op::ForwardStatic)] {
        let problem = Problem::forward(dtype, WeightMajor::K, 64, 14336, 4096).with_op(op);
        for (cluster_k, blocks_per_sm) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
            for tokens_on_rows in [false, true] {
                let this = (cluster_k, blocks_per_sm, tokens_on_rows);
                let streams = candidates(&problem, Target::Gpu(arch)).into_iter().filter_map(|config| match config {
                    Config::WgmmaStream(it) if (it.cluster_k, it.blocks_per_sm, it.tokens_on_rows()) == this => {
                        Some(it)
                    }
                    _ => None,
                });
                let Some(most) = streams.max_by_key(|it| (it.accumulators(), it.block_n)) else {
                    assert!(op == Op::ForwardStatic && blocks_per_sm == 2, "{op} {cluster_k} {blocks_per_sm}");
                    continue;
                };
                let source = render::render(&problem, &Config::WgmmaStream(most), arch).unwrap();
                let resources = nvrtc.compile(&source, arch).unwrap().resources;
                let bad = (resources.spill_bytes, resources.stack_bytes, resources.wgmma_serialized);
                assert_eq!(bad, (0, 0, false), "{op} {most}");
            }
        }
    }
}

#[test]
fn the_tuners_helper_kernels_compile_everywhere() {
    let nvrtc = nvrtc();
    for arch in arches(&nvrtc) {
        for dtype in DType::ALL {
            let source = render::render_support(&Problem::forward(dtype, WeightMajor::N, 8, 8, 8)).unwrap();
            nvrtc.compile(&source, arch).unwrap();
        }
    }
}

#[test]
fn a_broken_source_comes_back_with_the_compilers_words() {
    let problem = Problem::forward(DType::F16, WeightMajor::K, 8, 8, 8);
    let mut source = render::render_support(&problem).unwrap();
    source.text.push_str("\nthis is no CUDA;\n");
    match nvrtc().compile(&source, arch::by_name("sm_80").unwrap()) {
        Err(CompileError::Rejected { log, .. }) => assert!(log.contains("support/kernels.cu.tera"), "{log}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_architecture_this_nvrtc_dropped_is_refused_with_the_wheel_to_install() {
    let nvrtc = nvrtc();
    let old = arch::by_name("sm_70").unwrap();
    match nvrtc.check_arch(old) {
        Ok(()) => assert!(nvrtc.version.0 < 13, "NVRTC 13 cannot target sm_70"),
        Err(error) => assert!(error.to_string().contains("nvidia-cuda-nvrtc-cu12"), "{error}"),
    }
}

#[test]
fn the_second_time_a_kernel_comes_from_the_cache_and_damage_is_compiled_again() {
    let nvrtc = nvrtc();
    let folder = tempfile::tempdir().unwrap();
    let cache = CubinCache::new(Some(folder.path().into()));
    let arch = arch::by_name("sm_80").unwrap();
    let source = render::render_support(&Problem::forward(DType::F32, WeightMajor::K, 8, 8, 8)).unwrap();
    let first = cache.get_or_compile(&nvrtc, &source, arch).unwrap();
    let files = || -> Vec<_> {
        let folders = folder.path().read_dir().unwrap().map(|entry| entry.unwrap().path());
        folders
            .flat_map(|path| path.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>())
            .collect()
    };
    let [file] = &files()[..] else { panic!("one file is cached") };
    let written = std::fs::metadata(file).unwrap().modified().unwrap();
    assert_eq!(cache.get_or_compile(&nvrtc, &source, arch).unwrap(), first);
    assert_eq!(std::fs::metadata(file).unwrap().modified().unwrap(), written);
    std::fs::write(file, "damaged").unwrap();
    assert_eq!(cache.get_or_compile(&nvrtc, &source, arch).unwrap(), first);
    assert!(std::fs::metadata(file).unwrap().len() > 1000, "the cache has mended itself");
}
