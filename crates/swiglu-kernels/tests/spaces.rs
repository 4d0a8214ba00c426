//! The tuning spaces: what is legal, what is refused and why, and that nothing panics on the way.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::TestRunner;
use std::cell::RefCell;
use std::collections::BTreeMap;
use swiglu_kernels::arch::{self, ARCHES};
use swiglu_kernels::families::{
    self, CublasltConfig, Family, MmaSyncConfig, Raster, Schedule, Staging, Target, WeightOnlyTmaConfig,
    WgmmaGemmConfig, WgmmaStreamConfig, WgmmaTmaConfig, wgmma_tma,
};
use swiglu_kernels::{ArchSpec, Config, DType, Format, Op, Problem, WeightMajor, render};

fn problems() -> impl Iterator<Item = Problem> {
    DType::ALL.into_iter().flat_map(|dtype| {
        WeightMajor::ALL.into_iter().flat_map(move |major| {
            [(1, 4096), (16, 4096), (100, 4096), (4096, 4096), (4096, 2048)].into_iter().flat_map(move |(m, k)| {
                let aligned = Problem::forward(dtype, major, m, 14336, k);
                let alignments = [16, 8, 4, 2].into_iter().filter(move |&alignment| alignment >= dtype.bytes());
                let problems = alignments.map(move |alignment| Problem { alignment, ..aligned });
                problems.flat_map(|problem| Op::ALL.into_iter().map(move |op| problem.with_op(op)))
            })
        })
    })
}

/// The tuner asks for the space of a shape once, for all M.
#[test]
fn spaces_do_not_depend_on_m() {
    let arch = arch::by_name("sm_90a").unwrap();
    for problem in problems() {
        let [here, at_one] = [problem, problem.with_m(1)].map(|problem| families::space(&problem, Target::Gpu(arch)));
        assert_eq!(here, at_one, "{problem:?}");
    }
}

#[test]
fn every_architecture_has_a_legal_default_for_every_problem_it_supports() {
    for arch in &ARCHES {
        for problem in problems() {
            let default = families::default_config(&problem, arch);
            let Problem { op, dtype, weight_major, alignment, .. } = problem;
            let supported = match (dtype, dtype.weights()) {
                _ if !op.is_forward() => !dtype.is_scaled(),
                (DType::Tf32, _) => arch.has_cp_async,
                (DType::E4m3, _) => arch.has_wgmma && weight_major == WeightMajor::K && alignment == 16,
                (_, Format::E4m3) => arch.has_cp_async && weight_major == WeightMajor::K && alignment == 16,
                (_, Format::Int4) => arch.has_cp_async && weight_major == WeightMajor::N && alignment == 16,
                _ => true,
            };
            if !supported {
                assert!(default.is_err(), "{arch} {problem:?}");
                continue;
            }
            let config = default.unwrap_or_else(|why| panic!("{arch} {problem:?}: {why}"));
            config.check(&problem, Target::Gpu(arch)).unwrap();
            render::render(&problem, &config, arch).unwrap();
        }
    }
}

/// `tuning-db/nvidia-h200.toml` says so of 64 tokens and more (`swiglu-db` holds the defaults to it); nothing else was measured.
#[test]
fn fp32_is_multiplied_in_parts_where_that_was_measured_to_win() {
    let family = |op, m, arch| {
        let problem = Problem::forward(DType::F32, WeightMajor::K, m, 4096, 4096).with_op(op);
        families::default_config(&problem, arch::by_name(arch).unwrap()).unwrap().family()
    };
    for (op, m, expected) in [
        (Op::Forward, 1, Family::Simt),
        (Op::Forward, 63, Family::Simt),
        (Op::Forward, 64, Family::MmaSync),
        (Op::ForwardSave, 256, Family::MmaSync),
        (Op::Forward, 257, Family::WgmmaTma),
        (Op::InputGrad, 1, Family::SimtGemm),
        (Op::Down, 63, Family::SimtGemm),
        (Op::Down, 64, Family::WgmmaGemm),
        (Op::InputGrad, 64, Family::WgmmaGemm),
        (Op::WeightGrad, 1, Family::WgmmaGemm),
        (Op::DownWeightGradAdd, 64, Family::WgmmaGemm),
        (Op::Dgated, 4096, Family::SimtGemm),
    ] {
        assert_eq!(family(op, m, "sm_90a"), expected, "{op} M {m}");
    }
    for (m, tile) in [(64, (32, 64, 32, 6)), (256, (128, 64, 32, 2))] {
        let problem = Problem::forward(DType::F32, WeightMajor::N, m, 4096, 4096);
        match families::default_config(&problem, arch::by_name("sm_90a").unwrap()).unwrap() {
            Config::MmaSync(won) => assert_eq!((won.block_m, won.block_n, won.block_k, won.stages), tile),
            other => panic!("M {m}: {other}"),
        }
    }
    for m in [1, 64, 256, 4096] {
        assert_eq!(family(Op::Forward, m, "sm_80"), Family::Simt, "M {m}");
        assert_eq!(family(Op::WeightGrad, m, "sm_80"), Family::SimtGemm, "M {m}");
    }
}

/// Whether `family` must have candidates of `op` where operands are aligned and 16-bit weights lie along K.
fn has_candidates(family: Family, op: Op, dtype: DType, arch: &ArchSpec) -> bool {
    let is_forward = op == Op::Forward;
    let is_product = matches!(op, Op::Dgated | Op::Down);
    let is_half = matches!(dtype, DType::F16 | DType::Bf16);
    let (is_scaled, is_weight_only) = (dtype.is_scaled(), dtype.is_scaled() && dtype != DType::E4m3);
    match family {
        Family::Simt => is_forward && !is_scaled && dtype != DType::Tf32,
        Family::MmaDirect => is_forward && (is_half || is_weight_only) && arch.has_cp_async,
        // It fills the shared memory of data-centre GPUs.
        Family::WeightOnlyTma => is_forward && is_weight_only && ["sm_90a", "sm_100a", "sm_103a"].contains(&arch.name),
        Family::MmaSync => is_forward && !is_scaled && arch.has_cp_async,
        Family::WgmmaStream => is_forward && is_half && arch.has_wgmma,
        Family::WgmmaTma => is_forward && (is_half || matches!(dtype, DType::F32 | DType::E4m3)) && arch.has_wgmma,
        Family::Elementwise => op == Op::Gate && !is_scaled,
        Family::ColumnSum => op == Op::BiasGrad && !is_scaled,
        Family::SimtGemm => is_product && !is_scaled,
        Family::MmaGemm => is_product && (is_half || dtype == DType::Tf32) && arch.has_cp_async,
        Family::WgmmaGemm => is_product && (is_half || dtype == DType::F32 && op == Op::Down) && arch.has_wgmma,
        Family::Cublaslt => {
            let is_fused = is_forward || op == Op::Dgated;
            let runs = matches!(dtype, DType::F32 | DType::F16) || arch.has_cp_async;
            (is_forward || is_product) && !is_scaled && !(is_fused && is_half) && runs
        }
        Family::Cpu => false,
    }
}

#[test]
fn every_space_has_the_candidates_it_must_and_they_survive_toml_and_json() {
    for arch in &ARCHES {
        for dtype in DType::ALL {
            let major = if dtype.weights() == Format::Int4 { WeightMajor::N } else { WeightMajor::K };
            let problem = Problem::forward(dtype, major, 512, 14336, 4096);
            for op in [Op::Forward, Op::Gate, Op::Dgated, Op::Down, Op::BiasGrad] {
                let problem = problem.with_op(op);
                let candidates = families::candidates(&problem, Target::Gpu(arch));
                for family in Family::GPU.into_iter().chain([Family::Cublaslt]) {
                    let some = candidates.iter().any(|config| config.family() == family);
                    assert_eq!(some, has_candidates(family, op, dtype, arch), "{family} {op} {dtype} on {arch}");
                    assert_eq!(
                        some,
                        families::default_of(family, &problem, arch).is_ok(),
                        "{family} {op} {dtype} on {arch}"
                    );
                }
                for config in candidates {
                    let text = toml::to_string(&config).unwrap();
                    assert_eq!(toml::from_str::<Config>(&text).unwrap(), config);
                    let text = serde_json::to_string(&config).unwrap();
                    assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), config);
                }
            }
        }
    }
}

#[test]
fn a_step_is_refused_by_the_families_of_the_forward_and_its_own_say_why() {
    let arch = arch::by_name("sm_90a").unwrap();
    let problem = Problem::forward(DType::Bf16, WeightMajor::K, 512, 512, 512).with_op(Op::Dgated);
    let rule = |config: Config, problem: &Problem| config.check(problem, Target::Gpu(arch)).unwrap_err().rule;
    let forward = families::default_config(&problem.with_op(Op::Forward), arch).unwrap();
    assert_eq!(rule(forward, &problem), "the family computes this op");
    let Config::WgmmaGemm(good) = families::default_config(&problem, arch).unwrap() else { panic!("wgmma_gemm") };
    let gemm = |config| Config::WgmmaGemm(config);
    assert_eq!(rule(gemm(good), &problem.with_op(Op::Gate)), "the family computes this op");
    let boxes = "columns that are contiguous in the right operand load in boxes of 64 or 32";
    assert_eq!(rule(gemm(WgmmaGemmConfig { block_n: 80, ..good }), &problem), boxes);
    let wide = WgmmaGemmConfig { tail_n: 64, block_n: 192, stages: 4, ..good };
    gemm(wide).check(&problem, Target::Gpu(arch)).unwrap();
    let cut = "a last wave is cut into boxes of 64 columns";
    for config in [WgmmaGemmConfig { tail_n: 32, ..wide }, WgmmaGemmConfig { block_n: 64, ..wide }] {
        assert_eq!(rule(gemm(config), &problem), cut);
    }
    let together = WgmmaGemmConfig { schedule: Schedule::Cooperative, stages: 3, ..wide };
    let in_turns = "dgated has registers for a second epilogue where tiles are taken in turns";
    assert_eq!(rule(gemm(together), &problem), in_turns);
    let slots = WgmmaGemmConfig { store_buffers: 1, ..good };
    assert_eq!(rule(gemm(slots), &problem), "pre-activations arrive while others are used");
    let room = "the stages of all blocks of a multiprocessor fit in its shared memory";
    assert_eq!(rule(gemm(WgmmaGemmConfig { stages: 9, ..good }), &problem), room);
    // The strips of the same store are twice as wide in fp32.
    let plain = families::default_config(&problem.with_op(Op::WeightGrad), arch).unwrap();
    assert_eq!(rule(plain, &problem.with_op(Op::WeightGradAdd)), "a store is whole boxes of 32, 64 or 128 bytes");
    let down = problem.with_op(Op::Down).with_m(8);
    let Config::WgmmaGemm(few) = families::default_config(&down, arch).unwrap() else { panic!("wgmma_gemm") };
    assert_eq!((few.consumers, few.block_m, few.cluster_k), (1, 16, 2));
    assert_eq!(rule(gemm(few), &problem.with_op(Op::InputGrad)), "tiles of few tokens are for the down projection");
    let split = "two or four split the sums of a tile";
    for config in [WgmmaGemmConfig { cluster_k: 3, ..few }, WgmmaGemmConfig { cluster_n: 2, block_m: 64, ..few }] {
        assert_eq!(rule(gemm(config), &down), split);
    }
    assert_eq!(rule(gemm(WgmmaGemmConfig { blocks_per_sm: 2, ..few }), &down), room);
    assert_eq!(rule(gemm(WgmmaGemmConfig { fill: 2, ..few }), &down), "no more blocks are launched than fit");

    // Of few tiles: two CTAs share out the sums of one, where nothing comes between the sums and what is stored.
    let lone = problem.with_op(Op::InputGrad);
    let Config::WgmmaGemm(two) = families::default_config(&lone, arch).unwrap() else { panic!("wgmma_gemm") };
    assert_eq!((two.consumers, two.schedule, two.cluster_k), (2, Schedule::Cooperative, 2));
    let of_many = "a last wave is cut of tiles for many tokens, in 16 bits, whose sums are not split";
    assert_eq!(rule(gemm(WgmmaGemmConfig { tail_n: 64, block_n: 128, stages: 4, ..two }), &lone), of_many);
    let of_a_block = "sums that are split are of one 64-row block a warpgroup, of the plain products in 16 bits";
    for config in
        [WgmmaGemmConfig { schedule: Schedule::Pingpong, ..two }, WgmmaGemmConfig { block_m: 256, stages: 3, ..two }]
    {
        assert_eq!(rule(gemm(config), &lone), of_a_block);
    }
    assert_eq!(rule(gemm(WgmmaGemmConfig { store_buffers: 2, ..two }), &problem.with_op(Op::Dgated)), of_a_block);
    let in_parts = Problem { dtype: DType::F32, ..lone };
    assert_eq!(rule(gemm(WgmmaGemmConfig { block_k: 32, store_cols: 32, ..two }), &in_parts), of_a_block);
}

/// The tuner asks for the candidates of a group of M once.
#[test]
fn the_tiles_for_an_output_of_few_depend_on_n_and_k_only() {
    let arch = arch::by_name("sm_90a").unwrap();
    let lone = |problem: &Problem| {
        let is_lone =
            |config: &&Config| matches!(config, Config::WgmmaGemm(it) if it.consumers == 2 && it.cluster_k == 2);
        families::candidates(problem, Target::Gpu(arch)).iter().filter(is_lone).count()
    };
    for (op, n, k, expected) in [
        (Op::Down, 14336, 4096, 12),
        (Op::WeightGrad, 768, 2048, 12),
        (Op::WeightGrad, 14336, 4096, 0),
        (Op::Dgated, 768, 2048, 0),
    ] {
        for m in [1, 300, 8192] {
            let problem = Problem::forward(DType::Bf16, WeightMajor::K, m, n, k).with_op(op);
            assert_eq!(lone(&problem), expected, "{op} {m} {n} {k}");
        }
    }
}

#[test]
fn some_mib_of_x_stay_in_l2_and_long_matrices_pass() {
    let hopper = arch::by_name("sm_90a").unwrap();
    let target = Target::Gpu(hopper);
    let problem = |m, n, k| Problem::forward(DType::Bf16, WeightMajor::K, m, n, k);
    let Config::WgmmaTma(tile) = families::default_config(&problem(8192, 14336, 4096), hopper).unwrap() else {
        panic!("wgmma_tma")
    };
    assert_eq!((tile.raster, tile.raster_group, tile.block_m), (Raster::Resident, 16, 128));
    for (k, cluster_m, tiles) in
        [(4096, 1, 16), (4096, 2, 8), (8192, 1, 8), (2048, 1, 32), (1 << 24, 1, 1), (8, 1, 256)]
    {
        let problem = problem(8192, 14336, k);
        let config = Config::WgmmaTma(WgmmaTmaConfig { cluster_m, ..tile });
        config.check(&problem, target).unwrap();
        assert_eq!(config.launch_shape(&problem).unwrap().raster_group, tiles, "K {k}");
    }
    let passing = |raster, (m, n, k)| wgmma_tma::passing(&problem(1, n, k), raster, m);
    assert_eq!(passing(Raster::Resident, (8192, 14336, 4096)), (true, true));
    assert_eq!(passing(Raster::Resident, (1536, 14336, 4096)), (true, false));
    assert_eq!(passing(Raster::Resident, (8192, 3584, 1024)), (false, true));
    assert_eq!(passing(Raster::AlongN, (8192, 14336, 4096)), (false, false));

    let small = problem(512, 512, 512);
    let Config::MmaSync(other) = families::default_of(Family::MmaSync, &small, hopper).unwrap() else {
        panic!("mma_sync")
    };
    let other = Config::MmaSync(MmaSyncConfig { raster: Raster::Resident, ..other });
    assert_eq!(other.check(&small, target).unwrap_err().rule, "wgmma_tma alone walks `resident`");
}

#[test]
fn the_library_multiplies_what_it_can_and_is_never_the_default() {
    let rule = |problem: &Problem, arch: &str, algorithm| {
        let config = Config::Cublaslt(CublasltConfig { algorithm });
        config.check(problem, Target::Gpu(arch::by_name(arch).unwrap())).err().map(|why| why.rule)
    };
    for dtype in DType::ALL {
        let problem = Problem::forward(dtype, WeightMajor::K, 100, 72, 40);
        for op in Op::ALL {
            let problem = problem.with_op(op);
            let expected = match dtype {
                _ if op.is_elementwise() || op.is_column_sum() => Some("the family computes this op"),
                _ if dtype.is_scaled() && !op.is_forward() => Some("scaled formats are the forward's"),
                _ if dtype.is_scaled() => {
                    Some("scaled formats run in wgmma_tma (e4m3), mma_direct and weight_only_tma (weights only)")
                }
                DType::F16 | DType::Bf16 if op.is_forward() || op == Op::Dgated => {
                    Some("what lies between two launches is fp32")
                }
                _ => None,
            };
            assert_eq!(rule(&problem, "sm_90a", 7), expected, "{op} {dtype}");
            if let Ok(default) = families::default_config(&problem, arch::by_name("sm_90a").unwrap()) {
                assert_ne!(default.family(), Family::Cublaslt, "{op} {dtype}");
            }
        }
    }
    let down = Problem::forward(DType::Bf16, WeightMajor::K, 0, 72, 40).with_op(Op::Down);
    assert_eq!(rule(&down, "sm_80", 0), None);
    assert_eq!(rule(&down, "sm_75", 0), Some("tf32 and bf16 need compute capability 8.0"));
    assert_eq!(rule(&down, "sm_90a", 8), Some("the library proposes at most 8 algorithms"));
    assert_eq!(rule(&Problem { n: 0, ..down }, "sm_90a", 0), Some("the library needs sums of at least 1"));
    assert_eq!(rule(&down.with_op(Op::WeightGrad), "sm_90a", 0), None, "of no tokens too");
}

#[test]
fn refusals_name_the_rule() {
    let arch = arch::by_name("sm_80").unwrap();
    let problem = Problem::forward(DType::Bf16, WeightMajor::K, 512, 512, 512);
    let Config::MmaSync(good) = families::default_of(Family::MmaSync, &problem, arch).unwrap() else {
        panic!("mma_sync")
    };
    let rule = |config: MmaSyncConfig, problem: &Problem, arch| {
        Config::MmaSync(config).check(problem, Target::Gpu(arch)).unwrap_err().rule
    };
    assert_eq!(rule(MmaSyncConfig { block_m: 24, ..good }, &problem, arch), "a warp holds whole 16x8 fragments");
    assert_eq!(rule(MmaSyncConfig { stages: 0, ..good }, &problem, arch), "sizes are positive and small");
    assert_eq!(
        rule(MmaSyncConfig { block_n: 128, block_k: 64, stages: 8, ..good }, &problem, arch),
        "the stages fit in shared memory"
    );
    assert_eq!(rule(MmaSyncConfig { block_k: 48, ..good }, &problem, arch), "a K row of a tile is 64 or 128 bytes");
    assert_eq!(rule(MmaSyncConfig { warps_m: 1, warps_n: 1, ..good }, &problem, arch), "accumulators fit in registers");
    let misaligned = Problem { alignment: 2, ..problem };
    assert_eq!(rule(good, &misaligned, arch), "operands are aligned to access_bytes");
    assert_eq!(rule(good, &problem, arch::by_name("sm_75").unwrap()), "mma_sync needs compute capability 8.0");
    let tma = MmaSyncConfig { staging: Staging::Tma, ..good };
    assert_eq!(rule(tma, &problem, arch), "tma staging needs compute capability 9.0");
    let hopper = arch::by_name("sm_90a").unwrap();
    assert_eq!(rule(tma, &Problem { k: 0, ..problem }, hopper), "tma staging needs K of at least 1");
    let narrow = MmaSyncConfig { access_bytes: 8, ..tma };
    assert_eq!(rule(narrow, &Problem { alignment: 8, ..problem }, hopper), "tensor maps take 16-byte strides");
    let on_cpu = Config::MmaSync(good).check(&problem, Target::Cpu { threads: 4 }).unwrap_err();
    assert_eq!(on_cpu.rule, "the family runs on this kind of device");
}

#[test]
fn tiles_with_weights_on_the_rows_say_what_they_cannot() {
    let arch = arch::by_name("sm_90a").unwrap();
    let problem = Problem::forward(DType::Bf16, WeightMajor::K, 8, 512, 512);
    let Config::WgmmaStream(good) = families::default_config(&problem, arch).unwrap() else { panic!("wgmma_stream") };
    let rule = |config: WgmmaStreamConfig, problem: &Problem, arch: &str| {
        let target = Target::Gpu(arch::by_name(arch).unwrap());
        Config::WgmmaStream(config).check(problem, target).unwrap_err().rule
    };
    for (config, expected) in [
        (WgmmaStreamConfig { block_m: 24, ..good }, "tokens are 8, 16 or 32 columns of a product, or its 64 rows"),
        (WgmmaStreamConfig { block_n: 20, ..good }, "rows of weights are whole swizzle atoms, 16 to 128 of them"),
        (WgmmaStreamConfig { cluster_k: 3, ..good }, "a cluster is at most a pair"),
        (WgmmaStreamConfig { stages: 2, ..good }, "at least 3 stages"),
        (WgmmaStreamConfig { fill: 2, ..good }, "no more blocks are launched than fit"),
        (WgmmaStreamConfig { stagger: 0, ..good }, "sizes are positive and small"),
    ] {
        assert_eq!(rule(config, &problem, "sm_90a"), expected);
    }
    assert_eq!(rule(good, &problem, "sm_80"), "wgmma_stream needs compute capability 9.0");
    let n_major = Problem { weight_major: WeightMajor::N, ..problem };
    assert_eq!(rule(good, &n_major, "sm_90a"), "wgmma_stream reads weights along K");
    let tf32 = Problem { dtype: DType::Tf32, ..problem };
    assert_eq!(rule(good, &tf32, "sm_90a"), "wgmma_stream multiplies fp16 and bf16");
}

#[test]
fn a_warp_that_puts_x_in_order_takes_whole_passes() {
    let target = Target::Gpu(arch::by_name("sm_90a").unwrap());
    for (dtype, major) in [(DType::Bf16E4m3, WeightMajor::K), (DType::Bf16Int4, WeightMajor::N)] {
        let problem = Problem::forward(dtype, major, 64, 512, 512);
        let good = WeightOnlyTmaConfig {
            block_m: 8,
            block_n: 64,
            warps_n: 2,
            warps_k: 1,
            order_warps: 1,
            stages: 4,
            blocks_per_sm: 1,
            prefetch: 1,
            fast_silu: true,
        };
        let check = |config| Config::WeightOnlyTma(config).check(&problem, target).map_err(|why| why.rule);
        for block_m in [8, 16, 32] {
            assert_eq!(check(WeightOnlyTmaConfig { block_m, ..good }), Ok(()), "{dtype} {block_m}");
        }
        for block_m in [24, 40] {
            let refused = "a warp that puts x in order takes half of 8 tokens, or 16, at a time";
            assert_eq!(check(WeightOnlyTmaConfig { block_m, ..good }), Err(refused), "{dtype} {block_m}");
            assert_eq!(check(WeightOnlyTmaConfig { block_m, order_warps: 0, ..good }), Ok(()), "{dtype} {block_m}");
        }
        assert_eq!(check(WeightOnlyTmaConfig { order_warps: 2, ..good }), Err("one warp puts x in order, or none"));
    }
}

/// Numbers a damaged or hostile file may hold.
fn size() -> impl Strategy<Value = u32> {
    prop_oneof![0..=300u32, Just(u32::MAX), Just(1 << 31), (0..32u32).prop_map(|shift| 1 << shift)]
}

/// Legal configs of every family, with problems of every number format and of an op of each kind.
fn legal() -> BTreeMap<Family, Vec<(Problem, Config, Target)>> {
    let hopper = Target::Gpu(arch::by_name("sm_90a").unwrap());
    let mut legal: BTreeMap<Family, Vec<_>> = BTreeMap::new();
    for dtype in DType::ALL {
        let major = if dtype.weights() == Format::Int4 { WeightMajor::N } else { WeightMajor::K };
        let problem = Problem::forward(dtype, major, 64, 14336, 4096);
        for problem in
            [Op::Forward, Op::Gate, Op::Dgated, Op::Down, Op::WeightGradAdd, Op::BiasGrad].map(|op| problem.with_op(op))
        {
            for target in [hopper, Target::Cpu { threads: 8 }] {
                // An odd step, so that all values of every field come.
                for config in families::candidates(&problem, target).into_iter().step_by(7) {
                    legal.entry(config.family()).or_default().push((problem, config, target));
                }
            }
        }
    }
    legal
}

/// What takes the place of a number of a config: any, or what another legal config of the family has there.
#[derive(Debug, Clone, Copy)]
enum Other {
    Any(u32),
    Of(Index),
}

/// `config` with its number at `field`, of those it has, replaced.
fn with_number(config: &Config, field: usize, other: Other, all: &[(Problem, Config, Target)]) -> Config {
    let mut fields = toml::Table::try_from(config).unwrap();
    let numbers: Vec<_> = fields.iter().filter(|(_, value)| value.is_integer()).map(|(name, _)| name.clone()).collect();
    let name = &numbers[field % numbers.len()];
    let value = match other {
        Other::Any(value) => toml::Value::Integer(value.into()),
        Other::Of(index) => toml::Table::try_from(index.get(all).1).unwrap().remove(name).unwrap(),
    };
    fields.insert(name.clone(), value);
    fields.try_into().unwrap()
}

/// Legal configs and problems in which a few numbers are others.
#[test]
fn no_config_makes_check_or_render_panic() {
    let legal = legal();
    let rendered = RefCell::new(BTreeMap::new());
    let other = prop_oneof![size().prop_map(Other::Any), any::<Index>().prop_map(Other::Of)];
    let of_config = proptest::collection::vec((0..32usize, other), 0..=2);
    let of_problem = proptest::option::of((0..4usize, size()));
    let strategy = (any::<Index>(), of_config, of_problem);
    let test = |(which, of_config, of_problem): (Index, Vec<_>, Option<(usize, u32)>)| {
        for (&family, all) in &legal {
            let &(mut problem, config, target) = which.get(all);
            let replace = |config, &(field, other): &(usize, Other)| with_number(&config, field, other, all);
            let config = of_config.iter().fold(config, replace);
            if let Some((field, value)) = of_problem {
                let Problem { m, n, k, alignment, .. } = &mut problem;
                *[m, n, k, alignment][field] = value;
            }
            if matches!(target, Target::Cpu { .. }) {
                let legal = config.check(&problem, target).is_ok();
                *rendered.borrow_mut().entry(family).or_insert(0) += u32::from(legal);
                continue;
            }
            // Every architecture's rules; the source is the same for all.
            let legal: Vec<_> =
                ARCHES.iter().filter(|arch| config.check(&problem, Target::Gpu(arch)).is_ok()).collect();
            if let Some(arch) = legal.last() {
                render::digest(&problem, &config, arch).unwrap();
                *rendered.borrow_mut().entry(family).or_insert(0) += 1;
            }
        }
        Ok(())
    };
    let config = ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config).run(&strategy, test).unwrap_or_else(|error| panic!("{error}"));
    for family in Family::GPU.into_iter().chain([Family::Cublaslt, Family::Cpu]) {
        assert!(rendered.borrow().get(&family).is_some_and(|&count| count >= 10), "{family}: {rendered:?}");
    }
}
