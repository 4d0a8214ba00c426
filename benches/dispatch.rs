//! What the host pays: starting with 2,000 records, looking configs up, rendering a source, choosing for an M.
#![allow(missing_docs, clippy::unwrap_used, reason = "criterion's macros; a bench fails by panicking")]

use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use swiglu_db::{Device, Environment, Layer, Measurement, Origin, Outcome, Record, TuningDb, TuningTable, shipped};
use swiglu_kernels::families::{Target, default_config};
use swiglu_kernels::{DType, Problem, WeightMajor, arch, render};
use swiglu_runtime::cpu::CpuPlan;
use swiglu_runtime::{CpuRuntime, ForwardSpec, GateOrder, Options, WeightLayout};

fn costs(criterion: &mut Criterion) {
    let arch = arch::by_name("sm_90a").unwrap();
    let folder = std::env::temp_dir().join(format!("swiglu-bench-{}", std::process::id()));
    let records: Vec<Record> = (0..2000)
        .map(|i| {
            let problem = Problem::forward(DType::Bf16, WeightMajor::K, 1 << (i % 14), 1024 + 64 * (i / 14), 4096);
            let measurement = Measurement { median_us: 100.0, samples: 29, ..Measurement::default() };
            Record {
                device: Device { class: "sm_90a-bench".into(), name: "bench".into() },
                problem,
                config: default_config(&problem, arch).unwrap(),
                outcome: Outcome::Measured(measurement),
                environment: Environment::default(),
                origin: Origin::Local,
            }
        })
        .collect();
    {
        let mut db = TuningDb::open(&folder).unwrap();
        db.insert(&records).unwrap();
        db.publish().unwrap();
    }
    let user = [(Layer::User, folder.clone())];
    criterion.bench_function("load a snapshot of 2000 records", |bencher| {
        bencher.iter(|| TuningTable::load(black_box(&user)))
    });
    criterion.bench_function("parse the shipped tables", |bencher| {
        let parse = |(name, text): &(&str, &str)| shipped::parse(name.as_ref(), black_box(text)).unwrap();
        bencher.iter(|| shipped::TABLES.iter().flat_map(parse).count());
    });
    let options = Options { db: Some(folder.clone()), ..Options::default() };
    criterion.bench_function("start a runtime with 2000 records", |bencher| {
        bencher.iter(|| CpuRuntime::new(black_box(&options)))
    });
    let (table, _) = TuningTable::load(&user);
    let problem = records[1000].problem;
    criterion.bench_function("explain what serves a problem", |bencher| {
        bencher.iter(|| table.explain("sm_90a-bench", black_box(&problem), Target::Gpu(arch)));
    });
    criterion.bench_function("find the configs of a tuned shape", |bencher| {
        bencher.iter(|| table.anchors("sm_90a-bench", black_box(&problem), Target::Gpu(arch)));
    });
    let untuned = Problem { n: problem.n + 32, ..problem };
    criterion.bench_function("find the configs of the nearest shape", |bencher| {
        bencher.iter(|| table.anchors("sm_90a-bench", black_box(&untuned), Target::Gpu(arch)));
    });
    let config = default_config(&problem, arch).unwrap();
    criterion.bench_function("render a source", |bencher| {
        bencher.iter(|| render::render(black_box(&problem), &config, arch))
    });
    let spec = ForwardSpec {
        dtype: DType::F32,
        layout: WeightLayout::SeparateNk,
        gate_order: GateOrder::GateFirst,
        n: 64,
        k: 64,
        save_preactivations: false,
        static_weights: false,
    };
    let plan = CpuPlan::new(spec, &[]).unwrap();
    criterion.bench_function("choose a config for an M", |bencher| bencher.iter(|| plan.config_for(black_box(777))));
    std::fs::remove_dir_all(folder).unwrap();
}

criterion_group!(benches, costs);
criterion_main!(benches);
